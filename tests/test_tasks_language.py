"""Language tasks: the papers' prompts, the loss on the answer alone, decoding that equals one by one, word problems."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_language import greedy, language, llama, mixed_modes, random_states, small_tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import svdpeft
from svdpeft.models import Loaded
from svdpeft.tasks import generation, stories
from svdpeft.tasks.answers import final_number
from svdpeft.tasks.generation import decode, pad
from svdpeft.tasks.language import STEP_BY_STEP, Example, Tokenised
from svdpeft.tasks.wordproblems import WordProblems


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return small_tokenizer()


@pytest.fixture(scope="module")
def tiny(tokenizer) -> Loaded:
    return language(llama(tokenizer), tokenizer)


def test_prompt_is_the_papers(tiny, tokenizer):
    data = WordProblems(train_size=2, test_size=2).prepare(tiny)
    question = stories.problems("train", 1)[0].question
    assert tokenizer.decode(data.train.prompts[0]) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{question}\n\n### Response: Let's think step by step."
    )


def test_the_loss_is_on_the_answer_alone(tiny, tokenizer):
    data = WordProblems(train_size=12, test_size=2).prepare(tiny)
    batch = data.collate([data.train[i] for i in range(12)])
    for row, problem in enumerate(stories.problems("train", 12)):
        ids, mask, labels = (batch[key][row] for key in ("input_ids", "attention_mask", "labels"))
        length = int(mask.sum())
        assert mask[:length].all()  # padded on the right
        assert (ids[length:] == tokenizer.eos_token_id).all()
        told = labels != -100
        assert torch.equal(labels[told], ids[told])
        assert tokenizer.decode(labels[told]) == f" {problem.answer}<eos>"  # the eos is learned, its padding twin not
        prompt = STEP_BY_STEP.format(question=problem.question)
        assert tokenizer.decode(ids[~told][: length - int(told.sum())]) == prompt
    loss = tiny.model(**batch).loss
    assert loss.isfinite()


def test_prepare_does_not_depend_on_the_run(tiny):
    task = WordProblems(train_size=6, test_size=6)
    a, b = task.prepare(tiny, seed=0), task.prepare(tiny, seed=1)
    other = WordProblems(train_size=6, test_size=6, data_seed=1).prepare(tiny)
    assert a.train.examples == b.train.examples != other.train.examples
    for split in ("validation", "test"):
        assert getattr(a, split).examples == getattr(b, split).examples == getattr(other, split).examples


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("<<1+1=2>>2\n#### 72", 72),
        ("#### 1,234,567", 1234567),
        ("#### -5", -5),
        ("#### $18.50 left", 18.5),
        ("####72.", 72),
        ("#### 1\n#### 2 clips, not 3", 2),
        ("72", None),
        ("#### ", None),
        ("#### 4\n#### none", None),
        ("", None),
        ("The answer is: 42", 42),
        ("The answer is: $3/4$ of it.", 0.75),
        ("The answer is: 1/0", None),
        (f"The answer is: 1/{'9' * 4400}", 0.0),  # Python reads no whole number of so many digits
        (f"The answer is: 1/{'0' * 4400}", None),
        (r"The answer is: $\frac{1}{2}$", 0.5),
        (r"#### -\dfrac{3}{4} cups", -0.75),
        (r"#### 3\frac{1}{2}", 3),  # a mixed number is not known
        ("The answer is: x = -.5", -0.5),
        ("#### 7\nThe answer is: 8\nThe answer is:\n 9.", 9),
        ("The answer is: 8\n#### 7", 7),  # the last marker counts
        ("The answer is: unknown\n### Instruction: I have 5", None),  # its line alone
        ("The answer is: 2,3", 2),  # no thousands
        ("the result is 5", None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == number


def asks(model: nn.Module, tokenizer: Any, size: int) -> list[Tensor]:
    return WordProblems(train_size=1, test_size=size).prepare(language(model, tokenizer)).test.asks


@pytest.mark.parametrize(("batch", "rounds"), [(1, 128), (3, 128), (8, 128), (3, 5), (8, 1)])
def test_batched_decoding_equals_one_by_one(tokenizer, batch, rounds, caplog, monkeypatch):
    model = llama(tokenizer)
    monkeypatch.setattr(generation, "ROUND", rounds)
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    for setting, value in {
        "do_sample": True,
        "temperature": 0.3,
        "top_p": 0.5,
        "repetition_penalty": 9.0,
    }.items():
        setattr(model.generation_config, setting, value)
    own = model.generation_config
    prompts = asks(model, tokenizer, 8)
    assert len({len(prompt) for prompt in prompts}) > 4
    slow = [greedy(model, prompt, 12, tokenizer.eos_token_id) for prompt in prompts]
    expected = tokenizer.batch_decode(slow, skip_special_tokens=True)
    assert len(set(expected)) > 4
    assert decode(model, tokenizer, prompts, 12, batch) == expected
    assert model.generation_config is own
    assert not caplog.records


def stopping_at(eos: int) -> Any:
    """A tokenizer of which any token can be the end of text; its texts are token ids."""
    return SimpleNamespace(eos_token_id=eos, pad_token_id=None, batch_decode=lambda ids, **_: ids)


@pytest.mark.parametrize("rounds", [128, 2])
def test_decoding_stops_at_the_end_of_text(tokenizer, rounds, monkeypatch):
    monkeypatch.setattr(generation, "ROUND", rounds)
    model = llama(tokenizer)
    prompts = asks(model, tokenizer, 4)
    free = [greedy(model, prompt, 8, -1) for prompt in prompts]
    eos = free[0][3]
    expected = [row[: row.index(eos)] if eos in row else row for row in free]
    assert len({len(row) for row in expected}) > 1
    assert decode(model, stopping_at(eos), prompts, 8) == expected


class Counter(nn.Module):
    """Says 1, 2, … up to the number that its prompt is, and then the end of text, 0."""

    generation_config = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[int]] = []

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: Any) -> Tensor:
        self.calls.append([len(input_ids), generation_config.max_new_tokens])
        new = []
        for row, mask in zip(input_ids.tolist(), attention_mask.sum(-1).tolist(), strict=True):
            goal, said = row[-mask], mask - 1
            new.append([*range(said + 1, goal + 1), *[0] * 100][: generation_config.max_new_tokens])
        return torch.cat((input_ids, torch.tensor(new)), 1)


def test_finished_rows_leave_and_the_others_are_packed_anew(monkeypatch):
    monkeypatch.setattr(generation, "ROUND", 4)
    model, goals = Counter(), [2, 9, 3, 50, 1, 6]
    found = decode(model, stopping_at(0), [torch.tensor([goal]) for goal in goals], 10, batch=2)
    assert found == [list(range(1, min(goal, 10) + 1)) for goal in goals]
    # three batches; three rows go on, in two; two go on, in one, for what is left of the ten tokens
    assert model.calls == [[2, 4], [2, 4], [2, 4], [2, 4], [1, 4], [2, 2]]


@pytest.mark.parametrize("rounds", [4, 128])
def test_a_bar_goes_to_its_end_where_there_is_a_terminal(monkeypatch, rounds):
    monkeypatch.setattr(generation, "ROUND", rounds)
    bars = []

    def shown(total: int, what: str, unit: str) -> Any:
        bars.append(tqdm(total=total, desc=what, unit=unit, disable=False, file=io.StringIO()))
        return bars[-1]

    monkeypatch.setattr(generation, "bar", shown)
    decode(Counter(), stopping_at(0), [torch.tensor([goal]) for goal in (2, 9, 3, 50, 1, 6)], 10, batch=2)
    assert bars[0].n == bars[0].total


class Reciter(nn.Module):
    """Knows problems by heart, and adds ``shift`` to each result."""

    def __init__(self, tokenizer: Any, shift: int) -> None:
        super().__init__()
        self.tokenizer, self.shift, self.generation_config = tokenizer, shift, None
        self.parts = mixed_modes()
        known = [*stories.problems("test", 40), *stories.problems("validation", 8)]
        self.known = {STEP_BY_STEP.format(question=p.question): p for p in known}

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: Any) -> Tensor:
        assert not any(module.training for module in self.modules())
        assert not torch.is_grad_enabled()
        prompts = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        problems = [self.known[self.tokenizer.decode(ids)] for ids in prompts]
        answers = [f" {p.answer.split('####')[0]}#### {p.result + self.shift:,}" for p in problems]
        new = [torch.tensor([*self.tokenizer(answer).input_ids, self.tokenizer.eos_token_id]) for answer in answers]
        return torch.cat((input_ids, pad(new, generation_config.pad_token_id)), 1)


@pytest.mark.parametrize(("shift", "right"), [(0, 1.0), (1, 0.0)])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_word_problems_against_an_oracle(tokenizer, shift, right, split):
    model = Reciter(tokenizer, shift)
    modes = [module.training for module in model.modules()]
    before = random_states()
    data = WordProblems(train_size=1, validation_size=8, test_size=40).prepare(language(model, tokenizer))
    examples = getattr(data, split)
    assert data.evaluate(model, examples, ["accuracy"]) == {"accuracy": [right] * len(examples)}  # no forward
    assert [module.training for module in model.modules()] == modes
    assert random_states() == before


def test_the_loss_of_each_reference_is_its_own(tiny, monkeypatch):
    """In batches of near lengths, in any order: each example's loss is what the model gives for it alone."""
    data = WordProblems(train_size=1, test_size=7).prepare(tiny)
    monkeypatch.setattr("svdpeft.tasks.language.BATCH_TOKENS", 700)
    with torch.no_grad():
        alone = [tiny.model(**data.collate([data.test[i]])).loss.item() for i in range(7)]
    monkeypatch.setattr(tiny.model, "generate", None)  # the loss needs none
    found = data.evaluate(tiny.model, data.test, ("loss",))
    assert found.keys() == {"loss"}
    assert found["loss"] == pytest.approx(alone, rel=1e-5)
    assert len(set(found["loss"])) == 7


def test_word_problems_with_a_real_model_class(tiny):
    data = WordProblems(train_size=1, test_size=3).prepare(tiny)
    tiny.model.train()
    found = data.evaluate(tiny.model, data.test)
    assert found["accuracy"] == [0.0] * 3
    assert list(found) == ["accuracy", "loss"]
    assert all(module.training for module in tiny.model.modules())
    tiny.model.eval()


def test_word_problems_refuse_what_they_cannot_use(tiny, tokenizer):
    task = WordProblems(train_size=1, test_size=1)
    with pytest.raises(ValueError, match="needs a tokenizer with an eos token; 'tiny' has none"):
        task.prepare(language(tiny.model, None))
    with pytest.raises(ValueError, match=r"needs a model with generate\(\); 'tiny' has none"):
        task.prepare(language(nn.Linear(2, 2), tokenizer))
    for field in ("train_size", "validation_size", "test_size"):
        with pytest.raises(ValueError, match=f"{field} 0 is outside"):
            WordProblems(**{field: 0}).prepare(tiny)
    data = task.prepare(tiny)
    with pytest.raises(ValueError, match="no metric 'acuracy': did you mean 'accuracy'"):
        data.evaluate(tiny.model, data.test, ["acuracy"])
    with pytest.raises(ValueError, match="no engine 'vlm': did you mean 'vllm'"):
        WordProblems(engine="vlm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decode_batch 0 of task 'wordproblems' is below 1"):
        WordProblems(decode_batch=0)


@pytest.mark.parametrize("template", ["$A", "<bos> $A", "<bos> $A <eos>"])
def test_a_prompt_begins_as_the_tokenizer_says_and_does_not_end(template):
    copy = type(small_tokenizer()._tokenizer).from_str(small_tokenizer()._tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy, eos_token="<eos>", bos_token="<bos>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    )
    data = Tokenised([Example("a b", " c", "a b d")], tokenizer)
    start = "<bos>" if "<bos>" in template else ""
    assert tokenizer.decode(data.prompts[0]) == f"{start}a b"
    assert tokenizer.decode(data.asks[0]) == f"{start}a b d"
    assert tokenizer.decode(data[0]["input_ids"]) == f"{start}a b c<eos>"


# -- vLLM: what it would be given. It is not run here.


@pytest.fixture
def vllm(monkeypatch) -> SimpleNamespace:
    seen = SimpleNamespace(llm=None, params=None, prompts=None, logits=None)

    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            seen.llm = options
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
            seen.config = json.loads(Path(model, "generation_config.json").read_text())
            seen.files = {file.name for file in Path(model).iterdir()}
            seen.weights = load_file(Path(model, "model.safetensors")).keys()
            with torch.no_grad():
                seen.logits = loaded(torch.arange(9)[None]).logits

        def generate(self, prompts: list[Any], params: Any, use_tqdm: bool) -> list[Any]:
            seen.prompts, seen.params = prompts, params
            ids = [SimpleNamespace(token_ids=prompt["prompt_token_ids"][-3:]) for prompt in prompts]
            return [SimpleNamespace(outputs=[each]) for each in ids]

    module = SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return seen


def test_vllm_is_given_the_merged_weights_and_the_same_prompts(tokenizer, vllm):
    model = llama(tokenizer)
    model.generation_config.temperature = 0.3  # a setting that transformers refuses to save
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=2))
    folded = svdpeft.attach(model, svdpeft.PiSSA(rank=2), name="folded")
    off = svdpeft.attach(model, svdpeft.LoRA(rank=2), name="off")
    with torch.no_grad():
        for parameter in (*adapter.parameters(), *folded.parameters(), *off.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
    folded.fold()
    ids = torch.arange(9)[None]
    data = WordProblems(1, 1, 3, engine="vllm", max_new_tokens=5).prepare(language(model, tokenizer))
    with off.disabled(), torch.no_grad():
        adapted = model(ids).logits
        weights = {name: w.clone() for name, w in model.state_dict().items()}
        texts = generation.ENGINES["vllm"](model, tokenizer, data.test.asks, 5, 32)
        assert data.evaluate(model, data.test, ["accuracy"]) == {"accuracy": [0.0] * 3}
        assert (adapter.state, folded.state, off.state) == ("attached", "folded", "disabled")
        assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items())
    torch.testing.assert_close(vllm.logits, adapted, rtol=1e-9, atol=1e-9)
    assert vllm.prompts == [{"prompt_token_ids": ask.tolist()} for ask in data.test.asks]
    assert texts == [tokenizer.decode(ask[-3:]) for ask in data.test.asks]
    stop = [tokenizer.eos_token_id]
    assert vllm.params == {"temperature": 0.0, "top_p": 1.0, "max_tokens": 5, "stop_token_ids": stop}
    assert {k: v for k, v in vllm.llm.items() if k != "gpu_memory_utilization"} == {
        "dtype": "float64", "seed": 0, "generation_config": "vllm",
    }  # fmt: skip
    assert "temperature" not in vllm.config
    assert vllm.weights == llama(tokenizer).state_dict().keys()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= vllm.files
    assert model.generation_config.temperature == 0.3


def test_vllm_is_named_where_it_is_missing_and_refuses_what_it_cannot_read(tiny, tokenizer, monkeypatch, vllm):
    ask = [torch.arange(3)]
    with pytest.raises(ValueError, match="a Linear cannot be written as a folder in transformers' layout"):
        generation.decode_vllm(nn.Linear(2, 2), tokenizer, ask, 5)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r'engine="vllm" needs vLLM: pip install "svdpeft\[vllm\]"'):
        generation.decode_vllm(tiny.model, tokenizer, ask, 5)


def test_merged_takes_back_what_it_did_after_an_error(tokenizer):
    model = llama(tokenizer)
    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=2))
    states = []

    def fails() -> None:
        with generation.merged(model):
            states.append(adapter.state)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert states == ["merged"]
    assert adapter.state == "attached"
    with generation.merged(nn.Linear(2, 2)):  # no adapters, nothing to do
        pass
