"""``svdpeft train``: from own data to an adapter that loads, and all that may happen between."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import rwkv_models
import timm
import torch
from filelock import FileLock
from own_data import PAIRS, assert_equal_bits, command, jsonl, place, record, saved_models, training, weights, words
from PIL import Image
from rows import EVERYTHING
from test_launchers import launch
from test_svd_cache import refuse
from timm.models import save_for_hf
from tiny_language import greedy
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from typer.testing import CliRunner

import svdpeft
from svdpeft.cli import app
from svdpeft.finetuning.session import Session, batches
from svdpeft.finetuning.train import Training
from svdpeft.models import load, rwkv

__all__ = ["place", "saved_models"]  # fixtures
IDS = torch.tensor([[5, 30, 77, 200, 31, 8]])


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def program(folder: str) -> dict[str, Any]:
    """What the Python of an adapter's README gives."""
    (block,) = re.findall(r"```python\n(.*?)```", Path(folder, "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    return names


def measured(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["eval", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["metrics"]


def test_from_own_rows_to_an_adapter_that_loads(place):
    made = training()
    before = logits(made.session.model)
    made.run(progress=False)
    trained = logits(made.session.model)
    assert (trained - before).abs().max() > 0.1
    assert sorted(os.listdir("out")) == ["README.md", "adapter.json", "adapter.safetensors", "training.json"]

    loaded = load("tiny")
    adapter = svdpeft.load(loaded.model, "out")
    assert torch.equal(logits(loaded.model), trained)
    assert torch.equal(logits(program("out")["base"]), trained)

    told = record()
    assert (told["steps"], told["sites"], told["trainable"]) == (4, 14, adapter.trainable_count)
    assert told["settings"]["recipe"]["lr"] == 1e-2
    assert told["settings"]["method"]["rank"] == 4
    assert [row["step"] for row in told["log"] if "loss" in row] == [1, 2, 3, 4]
    own = ["tiny", "--task", "text", "--option", "data=own.jsonl", "--split", "validation"]
    assert measured(*own, "--adapter", "out")["loss"]["value"] < measured(*own)["loss"]["value"] - 0.5

    tokens = loaded.processor(PAIRS[3]["prompt"], return_tensors="pt").input_ids[0]
    answer = greedy(loaded.model, tokens, 8, loaded.processor.eos_token_id)
    adapter.merge(permanent=True)
    loaded.model.save_pretrained("whole")
    plain = AutoModelForCausalLM.from_pretrained("whole").eval()
    assert greedy(plain, tokens, 8, loaded.processor.eos_token_id) == answer


def assert_trained_alike(*ways: dict[str, Any]) -> None:
    """Two trainings move every parameter to the same place, up to rounding."""
    start = {name: p.detach().clone() for name, p in training(out="start").adapter.named_parameters()}
    found = []
    for options in ways:
        made = training(**options)
        made.run(progress=False)
        found.append({name: p.detach() for name, p in made.adapter.named_parameters()})
    for name, one in found[0].items():
        moved = (one - start[name]).abs().max()
        assert moved > 0
        assert (one - found[1][name]).abs().max() < 1e-3 * moved, name


def test_accumulation_is_a_larger_batch(place):
    # Answers of several lengths: the loss is a mean over the tokens of all the forwards.
    jsonl("own.jsonl", [{"prompt": f"Say {i}", "answer": " again" * (i % 5 + 1)} for i in range(33)])
    assert_trained_alike({"batch_size": 8, "out": "one"}, {"batch_size": 2, "accumulate": 4, "out": "four"})


class Dies(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def interrupted(out: str, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        training(out=out, save_every=2, **options).run(progress=False, callbacks=[Dies()])


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "lora:rank=4:dropout=0.3", "accumulate": 2}, {"method": "pissa:rank=4", "mixed_precision": "bf16"}],
    ids=["sorsa", "lora", "pissa"],
)
def test_a_training_that_was_killed_goes_on_to_the_same_bits(place, options):
    options = {"batch_size": 4, "epochs": 2, **options}
    training(out="whole", save_every=2, **options).run(progress=False)
    interrupted("parts", **options)
    assert not Path("parts", "adapter.safetensors").exists()
    assert [path.name for path in Path("parts").glob("checkpoint-*")] == ["checkpoint-2"]
    command("--resume", out="parts", save_every=2, **options)
    assert_equal_bits(weights("parts"), weights("whole"))
    assert record("parts")["steps"] == record("whole")["steps"] > 3


def test_other_settings_are_not_resumed(place):
    interrupted("parts")
    for change, told in (
        ({"lr": 0.5}, "recipe.lr was 0.01 and is 0.5"),
        ({"method": "sorsa:rank=2"}, "method.rank was 4 and is 2"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"length": 7}, "task.max_length was None and is 7"),
        ({"targets": ["q_proj"]}, "targets was None and is ['q_proj']"),
    ):
        result = command("--resume", code=2, out="parts", save_every=2, **change)
        assert f"parts was begun with other settings: {told}" in result.stderr
    command("--resume", out="parts", save_every=1)  # when it is saved decides nothing


def test_two_trainings_into_one_folder_are_one_too_many(place):
    Path("out").mkdir()
    with FileLock("out/.training.lock"):  # of one that runs
        assert "another process trains into out: wait" in command(code=2).stderr
    assert os.listdir("out") == [".training.lock"]
    command(steps=1)  # one that was killed holds nothing


def test_a_training_that_ended_while_another_was_made_ready_stays(place, monkeypatch):
    """Both have found the folder empty."""
    made_ready = Session.attach

    def attach(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(Session, "attach", made_ready)
            command(steps=1)
        return made_ready(*args, **options)

    monkeypatch.setattr(Session, "attach", attach)
    assert "out holds a training already" in command(code=2, steps=2).stderr
    assert json.loads(Path("out", "training.json").read_text())["steps"] == 1


def test_what_cannot_be_resumed_says_so(place):
    assert "holds no training to resume: it has no training.json" in command("--resume", code=2).stderr
    command(steps=1)
    assert "has no checkpoint to resume from" in command("--resume", code=2, steps=1).stderr
    before = Path("out", "training.json").read_bytes()
    assert "out holds a training already" in command(code=2).stderr
    assert Path("out", "training.json").read_bytes() == before
    assert "own.jsonl is a file" in command(code=2, out="own.jsonl").stderr
    Path("project").mkdir()
    Path("project", "README.md").write_text("mine")
    assert "project has a README.md, where the adapter's is to be" in command(code=2, out="project").stderr
    assert [path.read_text() for path in Path("project").iterdir()] == ["mine"]


def test_the_validation_loss_and_the_checkpoints_have_their_steps(place):
    command(batch_size=4, eval_every=3, save_every=2)
    log = record()["log"]
    assert [row["step"] for row in log if "eval_loss" in row] == [3, 6, 8]  # and at the end
    assert {path.name for path in Path("out").glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}
    assert (
        f"| eval_loss | {[r for r in log if 'eval_loss' in r][-1]['eval_loss']:.4g} |"
        in Path("out/README.md").read_text()
    )


def test_a_second_training_decomposes_nothing(place, monkeypatch):
    command(steps=2, svd_cache="cache")
    refuse(monkeypatch)
    command(steps=2, svd_cache="cache", out="again")
    assert_equal_bits(weights("again"), weights())


def test_a_seed_decides_the_start_and_the_order(place):
    for seed, out in ((0, "a"), (0, "b"), (1, "c")):
        command(method="lora:rank=2", steps=2, seed=seed, out=out)
    assert_equal_bits(weights("a"), weights("b"))
    assert any(not torch.equal(value, weights("c")[name]) for name, value in weights("a").items())
    assert record("a")["log"][0]["loss"] != record("c")["log"][0]["loss"]


def test_data_whose_outputs_are_to_stay(place):
    """SC-LoRA's second set of data: the start is the one of both calibrations by hand."""
    jsonl("kept.jsonl", [{"text": f"Once upon a time there were {i} bears."} for i in range(20)])
    made = training(method="sc-lora:rank=2", preserve="kept.jsonl")
    session, model = made.session, load("tiny").model
    task, kept = (
        svdpeft.calibrate(model, batches(model, data, 8), session.targets)
        for data in (session.data, session.preserved())
    )
    by_hand = svdpeft.attach(model, svdpeft.SCLoRA(rank=2), session.targets, calibration=task.preserving(kept))
    assert_equal_bits(made.adapter.state_dict().tensors, by_hand.state_dict().tensors)
    without = training(method="sc-lora:rank=2,beta=0", out="without")
    assert any(
        not torch.equal(a, b) for a, b in zip(made.adapter.parameters(), without.adapter.parameters(), strict=True)
    )
    assert made.order.settings()["preserve"] == "kept.jsonl"
    with pytest.raises(ValueError, match=r"SCLoRA.* starts from data whose outputs are to stay, too: .*preserve=PATH"):
        training(method="sc-lora:rank=2", out="none")
    with pytest.raises(ValueError, match=r"preserve='kept.jsonl': none of LoRA\(rank=2\) starts from"):
        training(method="lora:rank=2", preserve="kept.jsonl", out="none")


def test_patterns_say_what_is_adapted_and_what_is_trained_whole(place):
    made = training(targets=["q_proj", "o_proj"], exclude=[".*layers.1.*"], train=["norm"])
    assert set(made.adapter.sites) == {f"model.layers.0.self_attn.{name}_proj" for name in "qo"}
    assert "model.norm.weight" in made.adapter.whole
    before = made.session.model.get_parameter("model.norm.weight").detach().clone()
    made.run(progress=False)
    assert not torch.equal(made.session.model.get_parameter("model.norm.weight"), before)
    again = load("tiny").model
    svdpeft.load(again, "out")
    assert torch.equal(again.get_parameter("model.norm.weight"), made.session.model.get_parameter("model.norm.weight"))


def test_a_new_head_has_a_rate_of_its_own(place):
    made = training(model="bert", data="reviews.csv", task="classification", head_lr=0.25)
    optimizer = made.session.trainer(made.adapter, made.order.recipe, Path("out")).create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    head = {id(p) for p in made.session.model.get_submodule("classifier").parameters()}
    assert {rates[each] for each in head} == {0.25}
    assert {rate for each, rate in rates.items() if each not in head} == {1e-2}


def gradients(**options: Any) -> tuple[dict[str, Tensor], Any]:
    made = training(**options)
    trainer = made.session.trainer(made.adapter, made.order.recipe, Path("out"))
    data = made.session.data
    trainer.compute_loss(made.session.model.train(), data.collate([data.train[i] for i in range(4)])).backward()
    return {name: p.grad for name, p in made.adapter.named_parameters()}, made.session.model


def test_activations_are_computed_again_to_the_same_gradients(place):
    usual, _ = gradients(method="pissa:rank=4")
    again, model = gradients(method="pissa:rank=4", checkpoint_activations=True)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for name, gradient in usual.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


def test_mixed_precision(place):
    command(out="exact")
    command(mixed_precision="bf16")
    exact, mixed = ([row["loss"] for row in record(out)["log"] if "loss" in row] for out in ("exact", "out"))
    assert mixed != exact
    assert mixed == pytest.approx(exact, rel=0.05)
    assert {value.dtype for value in weights().values() if value.is_floating_point()} == {torch.float32}


def test_packed_texts_train_to_the_weights_of_padded_ones(place):
    assert_trained_alike({"out": "padded"}, {"out": "packed", "option": ["packing=true"]})


def test_a_base_in_half_precision(place):
    command(dtype="bfloat16", steps=2)
    names = program("out")
    assert next(names["base"].parameters()).dtype == torch.bfloat16


def test_flags_go_before_the_file(place):
    Path("order.toml").write_text(
        'model = "tiny"\ndata = "own.jsonl"\nmethod = "pissa:rank=2"\nlr = 1e-3\nsteps = 3\nseed = 5\n'
        'targets = "q_proj"\nout = "from-file"\n[option]\ntemplate = "instruction"\n'
    )
    result = CliRunner().invoke(app, ["train", "order.toml", "--steps", "1", "--option", "loss_on=all"])
    assert result.exit_code == 0, result.output
    told = record("from-file")
    assert told["steps"] == 1
    settings = told["settings"]
    assert (settings["seed"], settings["targets"], settings["recipe"]["lr"]) == (5, ["q_proj"], 1e-3)
    assert (settings["task"]["template"], settings["task"]["loss_on"]) == ("instruction", "all")


def test_a_dry_run_writes_nothing(place):
    before = sorted(os.listdir())
    assert "5 × the data" in command("--dry-run", epochs=5).stdout
    plan = json.loads(command("--dry-run", "--json").stdout)
    assert plan["steps"] == "4 of 8 examples, 1 × the data; cosine from 0.01"
    assert sorted(os.listdir()) == before


def test_what_is_printed(place):
    result = command(epochs=10)
    plan = result.stdout.splitlines()
    assert [line.split()[0] for line in plan] == ["model", "method", "trains", "data", "steps", "memory", "out", "the"]
    assert all(line == line.rstrip() for line in plan)
    assert "32 texts of" in plan[3]
    log = result.stderr.splitlines()
    assert len(log) == 11  # the first, and every tenth part
    assert all(re.fullmatch(r"step \d+/\d+: loss [\d.]+, learning_rate [\d.e-]+", line) for line in log), log


def test_as_json(place):
    result = command("--json", steps=1)
    assert json.loads(result.stdout) == record()


def test_an_interrupt_ends_with_130(place, monkeypatch):
    def stop(self: Training, resume: bool = False) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "run", stop)
    assert "--resume goes on" in command(code=130).stdout


def test_the_command_names_no_folder_of_this_machine(place, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/svdpeft", "train", *words(steps=1)])
    command(steps=1)
    assert record()["command"].startswith("svdpeft train --model tiny")
    assert "/somewhere" not in Path("out", "README.md").read_text()


# -- other models and data ---------------------------------------------------------------------------------------------


def test_classes_of_texts(place):
    command(model="bert", data="reviews.csv", task="classification", head_lr=1e-2, epochs=12, save_every=20)
    assert {path.name for path in Path("out").glob("checkpoint-*")} == {"checkpoint-20", "checkpoint-36"}
    base = program("out")["base"]
    assert base.config.num_labels == 2
    eval_ = ["bert", "--task", "classification", "--option", "data=reviews.csv", "--split", "train"]
    assert measured(*eval_, "--adapter", "out")["loss"]["value"] < 0.6  # log 2 is what guessing gives
    assert measured(*eval_, "--adapter", "out")["accuracy"]["value"] > 0.9


@pytest.mark.parametrize("name", ["DebertaV2", "DistilBert", "XLMRoberta"])
def test_all_that_is_new_on_an_encoder_is_trained(name, place):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if name == "DistilBert":
        sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(vocab_size=400, **sizes))
    model.save_pretrained("encoder")
    load("tiny").processor.save_pretrained("encoder")
    own = dict(load("encoder").model.named_parameters())
    made = training(model="encoder", data="reviews.csv", task="classification")
    new = [
        each
        for each in dict(load("encoder", num_classes=2).model.named_parameters())
        if each.split(".", 1)[1] not in own
    ]
    assert made.session.head[-1] == "classifier"
    assert set(made.adapter.whole) == set(new)
    made.run(progress=False)
    again = load("encoder", num_classes=2, seed=9).model
    svdpeft.load(again, "out")
    assert torch.equal(logits(again), logits(made.session.model))


def test_a_folder_of_pictures(place):
    for i, name in enumerate(("blue", "red")):
        Path("pictures", name).mkdir(parents=True)
        for shade in range(10):
            Image.new("RGB", (32, 32), (200 * i, 5 * shade, 200 * (1 - i))).save(f"pictures/{name}/{shade}.png")
    torch.default_generator.manual_seed(0)
    save_for_hf(timm.create_model("test_vit"), "vision")
    more = {"model": "vision", "data": "pictures", "image_size": 32}
    command(**more, steps=8, batch_size=12, checkpoint_activations=True, eval_every=4)
    log = record()["log"]
    assert [row["step"] for row in log if "eval_loss" in row] == [4, 8]
    assert program("out")["base"].num_classes == 2
    found = measured(
        "vision", "--task", "images", "--option", "data=pictures", "--image-size", "32", "--adapter", "out"
    )
    assert found["accuracy"]["value"] == 1.0
    usual, _ = gradients(**more, out="x")
    again, model = gradients(**more, out="x", checkpoint_activations=True)
    assert model.grad_checkpointing
    for name, gradient in usual.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)


def test_an_rwkv_file(place):
    rwkv.write(rwkv_models.model(4, torch.float32, layers=1), "rwkv.pth")
    command(model="rwkv.pth", targets=["rwkv"], steps=3)
    losses = [row["loss"] for row in record()["log"] if "loss" in row]
    assert len(losses) == 3
    found = measured(
        "rwkv.pth", "--task", "text", "--option", "data=own.jsonl", "--split", "validation", "--adapter", "out"
    )
    assert found["loss"]["value"] < losses[0] + 0.5
    assert (
        "does not tell packed texts apart" in command(code=2, model="rwkv.pth", option=["packing=true"], out="x").stderr
    )


def test_a_task_in_the_place_of_data(place):
    sizes = [f"{split}_size=4" for split in ("train", "validation", "test")]
    command(data=None, task="wordproblems", option=[*sizes, "max_new_tokens=2"], batch_size=2)
    assert record()["steps"] == 2


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_write_one_adapter(place):
    told = launch("ddp", "--no_python", "svdpeft", "train", *words(batch_size=4, steps=3, lr=1e-3), folder=place)
    assert told.count("3 of 8 examples") == 1  # the first one speaks for both
    assert told.count("the adapter is in out") == 1
    assert not Path("out", "decompositions").exists()  # which they have shared
    command(batch_size=8, steps=3, lr=1e-3, out="one")
    one, two = weights("one"), weights()
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there accelerate trains with FSDP")
@pytest.mark.skipif(not EVERYTHING, reason="in one process: tests/test_devices.py; --all has two")
def test_fsdp_on_a_cpu_is_refused_where_accelerate_would_train_without_it(place):
    told = launch("fsdp2", "--no_python", "svdpeft", "train", *words(steps=1), folder=place, fails=True)
    assert "FSDP was asked for (ACCELERATE_USE_FSDP=true), and accelerate trains without it on cpu" in told
    assert not Path("out", "adapter").exists()
