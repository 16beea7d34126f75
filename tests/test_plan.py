"""``plan``: what a training would take, held against trainings that happen."""

import gc
import json
from pathlib import Path

import pytest
import rwkv_models
import torch
import transformers
from rows import EVERYTHING
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

import svdpeft
from svdpeft.adapter.file import held
from svdpeft.cli import app
from svdpeft.finetuning import tracing
from svdpeft.finetuning.plan import plan
from svdpeft.finetuning.replay import Calls, Shape
from svdpeft.finetuning.session import call, loss
from svdpeft.finetuning.tracing import Untraceable, shapes_only, trace_step, without_values
from svdpeft.layers.quantised import form_of
from svdpeft.registry import METHODS
from svdpeft.training.recipe import Recipe

CONFIG = transformers.LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    attention_bias=True,
    architectures=["LlamaForCausalLM"],
)
OPTIONS = {"partial": {"layers": ["model.norm"]}, "dora": {}}


def llama(device="cpu", layers=2):
    with torch.device(device):
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": layers})
        )


def text(size=3, length=16):
    ids = torch.randint(0, 128, (size, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def attached(model, method, batch):
    seen = None
    if getattr(method, "needs", None):
        gradients = method.needs == "gradients"
        seen = svdpeft.calibrate(
            model, [batch] * 4, inputs=not gradients, gradients=gradients, loss=loss, call=call, mask=lambda batch: None
        )
        seen = seen.preserving(seen) if method.preserves else seen
    return svdpeft.attach(model, method, clip_rank=True, calibration=seen, train=["lm_head"])


def shapes(adapter):
    return {
        (site, name): tuple(tensor.shape)
        for site, (tensors, _) in held(adapter.sites).items()
        for name, tensor in tensors.items()
    }


def test_nothing_of_a_plan_is_met_by_who_attaches_afterwards(tmp_path):
    """Sizes that no other test has: what the process remembers of them, it first computes in the plan."""
    model = torch.nn.Linear(37, 29)
    with svdpeft.svd_cache(tmp_path):
        with shapes_only():
            bare = torch.nn.Linear(37, 29, device="meta")
            without_values(bare)
            svdpeft.attach(bare, svdpeft.SORSA(rank=2))
        assert not list(tmp_path.iterdir())
        svdpeft.attach(model, svdpeft.SORSA(rank=2))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", list(METHODS))
def test_an_adapter_of_shapes_has_the_shapes_of_a_real_one(name):
    """All methods, those that start from data among them: no value decides what is made. One block has sites of one
    shape, which share, and of several."""
    method = METHODS.make(name, OPTIONS.get(name, {}))
    real = attached(llama(layers=1), method, text())
    with shapes_only():
        model = llama("meta", layers=1)
        without_values(model)
        planned = attached(model, method, text())
    if name in ("eva", "gora"):  # say by their data which site gets how many of the ranks
        ranks = [shape[-1] for (_, factor), shape in shapes(planned).items() if factor == "L"]
        assert sum(ranks) == 8 * len(real.sites)
        return
    assert shapes(planned) == shapes(real)
    assert planned.trainable_count == real.trainable_count > 0


def allocated(model, adapter, batch, mixed_precision=None):
    """The most bytes that torch's allocator gives out in a step beyond what was there, counted by its profiler."""
    model.train()
    gc.collect()  # what others have left is freed now, and not in between
    gc.disable()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
            value = loss(call(model, batch), batch)
        penalty = adapter.penalty()
        (value if penalty is None else value + penalty).backward()
    gc.enable()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            most = max(most, now)
    return most


def tokens(size=4, length=64):
    ids = torch.randint(0, 128, (size, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0  # a batch without padding needs no mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def pictures(size):
    drawn = torch.rand(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {"x": drawn, "labels": torch.arange(8)}


def vision(name, size):
    return svdpeft.models.load(name, num_classes=10, image_size=size).model


STEPS = [
    (llama, tokens, svdpeft.LoRA(rank=4), None),
    (llama, tokens, svdpeft.SORSA(rank=4), None),
    (llama, tokens, svdpeft.SVFT(pattern="banded"), None),
    (llama, tokens, svdpeft.DoRA(), None),
    (llama, tokens, svdpeft.OFT(), None),
    (llama, tokens, svdpeft.Full(), None),
    (llama, tokens, svdpeft.LoRA(rank=4), "bf16"),
    (lambda: vision("dinov2-vits14", 98), lambda: pictures(98), svdpeft.PiSSA(rank=4), None),
    (lambda: vision("efficientnet-lite0", 64), lambda: pictures(64), svdpeft.LoRA(rank=4), None),
]


@pytest.mark.apart
@pytest.mark.parametrize(("make", "batch", "method", "precision"), STEPS)
def test_a_traced_step_holds_what_a_real_one_does(make, batch, method, precision):
    model, shown = make(), batch()
    mode = model.training
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    adapter = svdpeft.attach(model, method)
    with shapes_only() as fake:
        traced = trace_step(fake, adapter, shown, mixed_precision=precision)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training == mode
    ours = sum(tensor.numel() * tensor.element_size() for tensor in shown.values())  # the batch is there before
    assert traced.step - ours == pytest.approx(allocated(model, adapter, shown, precision), rel=0.15)
    assert traced.weights == weights


def test_gradients_that_stay_are_counted_where_steps_accumulate():
    adapter = svdpeft.attach(model := llama(), svdpeft.Full())
    with shapes_only() as fake:
        once, twice = (trace_step(fake, adapter, tokens(), accumulate=count).step for count in (1, 2))
    assert twice > once
    assert twice - once <= 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.apart
@pytest.mark.parametrize(("version", "cut"), [(4, True), (6, False), *([(7, True)] if EVERYTHING else [])])
def test_a_text_that_is_read_token_by_token_is_run_in_part(version, cut, monkeypatch):
    model = rwkv_models.model(version, torch.float32, layers=1)
    adapter, shown = svdpeft.attach(model, svdpeft.SORSA(rank=2), ["rwkv"]), tokens(2, 40)
    real = allocated(model, adapter, shown, None) + sum(tensor.nbytes for tensor in shown.values())
    with shapes_only() as fake:
        found = trace_step(fake, adapter, shown)
        monkeypatch.setattr(tracing, "SHORT", 20)
        whole = trace_step(fake, adapter, shown)
    assert (found.tokens, whole.tokens) == (32 if cut else None, None)
    assert ("run on 32" in str(found)) == cut
    assert found.step == pytest.approx(whole.step, rel=0.02)
    assert found.step == pytest.approx(real, rel=0.15)


def test_a_step_of_too_many_calls_is_given_up():
    adapter = svdpeft.attach(llama(), svdpeft.LoRA(rank=4))
    with shapes_only() as fake, pytest.raises(Untraceable, match="TimeoutError: it has too many calls for 0 s"):
        trace_step(fake, adapter, tokens(), seconds=0.0)
    assert all(parameter.grad is None for parameter in adapter.parameters())


def test_matrices_of_seven_billion_values_from_a_configuration(tmp_path):
    """Counted by hand, for two of the 32 blocks: rank 16 (m + n) of seven matrices, and as many as they started."""
    config = json.loads(Path("examples/shapes/llama-2-7b.json").read_text())
    path = tmp_path / "two.json"
    path.write_text(json.dumps({**config, "num_hidden_layers": 2}))
    recipe = Recipe(lr=1.0, batch_size=1, checkpoint_activations=True)
    found = plan(str(path), svdpeft.PiSSA(rank=16), recipe, length=64, dtype="bfloat16", devices=8, timed=False)
    sides = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    block, rest = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096, 2 * 32000 * 4096 + 4096
    trained = 2 * 16 * sides
    assert (found.parameters, found.sites, found.trains) == (2 * block + rest, 14, trained)
    assert found.adapter_bytes == found.memory.adapter == 2 * 4 * trained
    assert 0 <= found.memory.weights - 2 * found.parameters < 2**12  # and the angles of the rotations
    assert found.memory.optimizer == 2 * 4 * trained
    assert found.replicated == found.memory.total + 4 * trained
    shared = found.memory.total - found.memory.step + 4 * trained
    at_once = 2 * rest + 2 * (2 * block + 2 * 4 * 16 * sides)
    assert found.sharded == shared // 8 + at_once + found.memory.step - 4 * trained


def test_checkpointed_activations_take_less(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    step = [
        plan(
            str(tmp_path),
            svdpeft.LoRA(rank=4),
            Recipe(lr=1.0, batch_size=8, checkpoint_activations=again),
            length=256,
            timed=False,
        ).memory.step
        for again in (False, True)
    ]
    assert step[1] < step[0]


@pytest.mark.parametrize("scheme", ["nf4", "int8", "torchao-int8", "torchao-int4"])
def test_a_quantised_base_is_planned_as_it_is_stored(scheme, tmp_path):
    """Beside a real one: the bytes of its weights with their scales, and a step that the allocator counts."""
    CONFIG.save_pretrained(tmp_path)
    recipe = Recipe(lr=1.0, batch_size=4)
    planned = plan(str(tmp_path), svdpeft.LoRA(rank=4), recipe, length=64, quantize=scheme, timed=False).memory
    svdpeft.quantize(model := llama(), scheme=scheme, iterations=0, nuclear=False)
    forms = [
        form_of(module, key) for module in model.modules() for key, t in module._parameters.items() if t is not None
    ]
    weights = sum(form.nbytes for form in forms) + sum(buffer.nbytes for buffer in model.buffers())
    assert planned.weights == pytest.approx(weights, rel=0.01)
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=4))
    assert planned.step == pytest.approx(allocated(model, adapter, tokens()), rel=0.15)


def test_what_attaching_calls_is_counted_and_timed(tmp_path):
    """A PiSSA decomposes every weight, and a LoRA none; of those of one shape one is timed."""
    CONFIG.save_pretrained(tmp_path)
    decompositions = []
    for method in (svdpeft.LoRA(rank=4), svdpeft.PiSSA(rank=4)):
        with shapes_only(), Calls() as calls:
            model = llama("meta")
            without_values(model)
            adapter = svdpeft.attach(model, method)
        decompositions.append([count for made, count in calls.counts.items() if "eigh" in str(made.function)])
        assert len(adapter.sites) == 14
    assert [sum(counts) for counts in decompositions] == [0, 14]
    assert len(decompositions[1]) == 2  # short sides: that of k and v, and all others'
    planned = plan(str(tmp_path), svdpeft.PiSSA(rank=4), Recipe(lr=1.0, batch_size=1), length=4)
    assert (planned.attach_seconds or 0) > 0


def test_a_call_that_is_too_large_is_timed_by_smaller_ones():
    """The halves of a product keep its layout, and its short sides."""
    w = Shape((8192, 4096), (1, 8192), torch.float32)
    assert w.halved() == Shape((4096, 2048), (1, 4096), torch.float32)
    assert Shape((16, 100), (100, 1), torch.float32).halved() == Shape((16, 50), (50, 1), torch.float32)
    with shapes_only(), Calls() as calls:
        _ = torch.empty(2**14, 2**14) @ torch.empty(2**14, 8)
    (product,) = (call for call in calls.counts if call.function is torch.ops.aten.mm.default)
    assert product.size() > product.limit
    assert 0 < calls.seconds() < 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "pisa"], "did you mean 'pissa'"),
        (["--method", "lora", "--optimizer", "adam"], "optimizer 'adam': did you mean 'adamw'"),
        (["--method", "lora", "--dtype", "bf16"], "dtype 'bf16'"),
        (["--method", "lora", "--quantize", "nf5"], "scheme 'nf5': did you mean 'nf4'"),
        (["--method", "lora", "--devices", "0"], "devices 0 is not a whole number of at least 1"),
        (["--method", "lora", "--batch-size", "0"], "batch_size 0"),
        (["--method", "lora", "--model", "smollm2"], "did you mean 'smollm2-135m'"),
        (["--method", "lora", "--model", "minilm-l6"], "needs num_classes"),
        (["--method", "lora", "--targets", "q_prj"], "q_prj"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(words, message):
    model = [] if "--model" in words else ["--model", "smollm2-135m"]
    result = CliRunner().invoke(app, ["plan", *model, *words, "--no-time", "--length", "4"])
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert message in result.stderr


def test_the_command_prints_lines_or_json():
    words = ["plan", "--model", "dinov2-vits14", "--method", "lora", "--image-size", "98", "--num-classes", "10"]
    run = CliRunner()
    plain = run.invoke(app, [*words, "--devices", "2", "--no-time"]).stdout.splitlines()
    assert [line.split()[0] for line in plain] == ["model", "method", "trains", "memory", "devices"]
    found = json.loads(run.invoke(app, [*words, "--no-time", "--json"]).stdout)
    assert found["sites"] == 48
    assert found["attach_seconds"] is None
    parts = ("weights", "adapter", "optimizer", "step")
    assert found["memory"].keys() == {*parts, "total", "tokens"}
    assert found["memory"]["total"] == sum(found["memory"][part] for part in parts)
    assert found["memory"]["tokens"] is None  # no text is cut short


def test_a_configuration_has_no_weights_to_load():
    with pytest.raises(ValueError, match="is a configuration, which has no weights"):
        svdpeft.models.load("examples/shapes/llama-2-7b.json")


@pytest.mark.parametrize("given", [{"length": 10**20}, {"length": 0}, {"devices": 2**31}, {"length": 1.5}])
def test_numbers_that_no_tensor_has(given: dict[str, float]):
    with pytest.raises(ValueError, match=r"is not a whole number of at least 1, and below 2\^31"):
        plan("smollm2-135m", svdpeft.LoRA(rank=2), Recipe(lr=1.0), timed=False, **given)
