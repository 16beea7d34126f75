"""GSM-8K and MATH: data from files, what is held out, the papers' prompts, where an answer stands, who judges it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import greedy, language, llama, small_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from svdpeft.models import load
from svdpeft.models.embedded import AssetError
from svdpeft.tasks import corpora, verdicts
from svdpeft.tasks.answers import final_answer
from svdpeft.tasks.generation import decode, pad
from svdpeft.tasks.gsm8k import GSM8K
from svdpeft.tasks.language import INSTRUCTION, STEP_BY_STEP, Example, Tokenised
from svdpeft.tasks.math import MATH

SHARED = Path(os.environ.get("SVDPEFT_SHARED", Path(__file__).parents[2] / "shared" / "data")) / "gsm8k"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows in GSM-8K's layout."""
    return [
        {"question": f"What is {i} and {i}?", "answer": f"It is {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
        for i in range(start, start + count)
    ]


def metamath(kind: str, original: str, query: str, answer: str) -> dict[str, Any]:
    """A row in MetaMathQA's layout."""
    response = f"Think.\n#### {answer}\nThe answer is: {answer}"
    return {"type": f"{kind}_Rephrased", "original_question": original, "query": query, "response": response}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return small_tokenizer()


@pytest.fixture(scope="module")
def tiny(tokenizer):
    return language(llama(tokenizer), tokenizer)


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "gsm8k" / "train.jsonl", sums(20))
    write(tmp_path / "gsm8k" / "test.jsonl", sums(5, start=100))
    return tmp_path / "gsm8k"


# -- GSM-8K


def test_the_own_training_set_is_in_the_prompt_of_the_evaluation(tiny, folder):
    data = GSM8K(10, 4, 3, path=str(folder)).prepare(tiny)
    assert [e.gold for e in data.train.examples] == [2.0 * i for i in range(10)]
    assert [e.gold for e in data.validation.examples] == [32.0, 34.0, 36.0, 38.0]
    assert [e.gold for e in data.test.examples] == [200.0, 202.0, 204.0]
    first = data.train.examples[0]
    assert first.prompt == first.ask == STEP_BY_STEP.format(question="What is 0 and 0?")
    assert first.answer == " It is 0+0=<<0+0=0>>0\n#### 0"
    assert data.train.asks is data.train.prompts


def test_metamathqa_is_trained_on_in_the_papers_text_and_asked_step_by_step(tiny, tokenizer, folder, tmp_path):
    rows = [metamath("GSM", f"o{i}", f"q{i}", str(i)) for i in range(8)]
    path = write(tmp_path / "MetaMathQA-395K.json", rows)
    data = GSM8K(5, 2, 3, train_on="metamathqa", path=str(folder), train_data=str(path)).prepare(tiny)
    ids = data.train[1]["input_ids"]
    assert tokenizer.decode(ids) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nq1\n\n### Response:Think.\n#### 1\nThe answer is: 1<eos>"
    )
    for split, question in ((data.validation, "q6"), (data.test, "What is 100 and 100?")):
        assert tokenizer.decode(split.asks[0]) == STEP_BY_STEP.format(question=question)
        assert tokenizer.decode(split.prompts[0]) == INSTRUCTION.format(question=question)
    assert STEP_BY_STEP == INSTRUCTION + " Let's think step by step."


def test_rephrasings_of_one_question_stay_on_one_side(tiny, folder, tmp_path):
    rows = [
        metamath("GSM", "Held", "Held in other words", "1"),  # original of a validation row
        metamath("GSM", "Free", "Free in other words", "2"),
        metamath("GSM", "X", "a  HELD question", "3"),  # asks what validation asks
        metamath("GSM", "What is 100  and 100?", "From the test", "4"),
        metamath("MATH", "M", "other kind", "5"),
        metamath("GSM", "Held", "A held question", "6"),
        metamath("GSM", "No number", "No number here", "none"),
        metamath("GSM", "Y", "what is 101 and 101?", "7"),
        metamath("MATH", "N", "the last", "8"),
    ]
    path = write(tmp_path / "train.json", rows)
    options = {"train_on": "metamathqa", "path": str(folder), "train_data": str(path)}
    data = GSM8K(4, 1, 1, **options).prepare(tiny)
    asked = [e.prompt.split("\n\n")[1].split("\n")[1] for e in data.train.examples]
    assert asked == ["Free in other words", "other kind", "No number here", "the last"]
    assert [e.gold for e in data.validation.examples] == [6.0]  # the last of GSM-8K's kind that has an answer
    with pytest.raises(ValueError, match=r"train_size 5 is outside \[1, 4\] of task 'gsm8k'"):
        GSM8K(5, 1, 1, **options).prepare(tiny)
    with pytest.raises(ValueError, match=r"validation_size 4 is outside \[1, 2\]: questions"):
        GSM8K(1, 4, 1, **options).prepare(tiny)


def test_splits_do_not_depend_on_the_seed_or_on_the_random_state(tiny, folder):
    task = GSM8K(10, 4, 3, path=str(folder))
    one, other = task.prepare(tiny, seed=0), task.prepare(tiny, seed=1)
    for split in ("train", "validation", "test"):
        assert getattr(one, split).examples == getattr(other, split).examples


class Reciter(nn.Module):
    """Knows one answer for each prompt."""

    generation_config = None

    def __init__(self, tokenizer: Any, known: dict[str, str]) -> None:
        super().__init__()
        self.tokenizer, self.known = tokenizer, known

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: Any) -> Tensor:
        prompts = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        said = [self.known[self.tokenizer.decode(ids)] for ids in prompts]
        new = [torch.tensor([*self.tokenizer(text).input_ids, self.tokenizer.eos_token_id]) for text in said]
        return torch.cat((input_ids, pad(new, generation_config.pad_token_id)), 1)


def test_gsm8k_accepts_both_markers_and_asks_the_papers_prompt(tokenizer, folder, tmp_path):
    says = ["Half.\n#### 200", "The answer is: 202.", "#### 202", "206", "The answer is: $208.0"]
    known = {STEP_BY_STEP.format(question=f"What is {100 + i} and {100 + i}?"): said for i, said in enumerate(says)}
    path = write(tmp_path / "meta.json", [metamath("GSM", f"o{i}", f"q{i}", str(i)) for i in range(4)])
    model = Reciter(tokenizer, known)
    for options in ({"train_on": "gsm8k"}, {"train_on": "metamathqa", "train_data": str(path)}):
        data = GSM8K(2, 1, 5, path=str(folder), **options).prepare(language(model, tokenizer))
        found = data.evaluate(model, data.test, ["accuracy"])
        assert found == {"accuracy": [1.0, 1.0, 0.0, 0.0, 1.0]}


def test_gsm8k_of_a_real_model_class(tiny, folder, monkeypatch):
    data = GSM8K(2, 1, 3, path=str(folder), max_new_tokens=7).prepare(tiny)
    limits = []
    inner = tiny.model.generate
    monkeypatch.setattr(
        tiny.model, "generate", lambda **k: limits.append(k["generation_config"].max_new_tokens) or inner(**k)
    )
    found = data.evaluate(tiny.model, data.test)
    assert found["accuracy"] == [0.0] * 3
    assert len(found["loss"]) == 3
    assert limits == [7]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no GSM-8K in {SHARED}")
def test_the_real_gsm8k(tiny):
    found = GSM8K(7217, 256, 1319, path=str(SHARED)).read(tiny)
    train, validation, test = (found[split] for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (7217, 256, 1319)
    questions = [{e.ask for e in split} for split in (train, validation, test)]
    assert sum(map(len, questions)) == len(set.union(*questions)) == 7473 + 1319
    for example in (*train, *validation, *test):
        assert example.gold == float(example.answer.rpartition("####")[2].replace(",", ""))
    assert max(e.gold for e in train) > 1e7


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no GSM-8K in {SHARED}")
@pytest.mark.apart
def test_smollm2_on_real_problems():
    """Batches with padding say what the model says to each prompt alone; the loss is a language model's."""
    try:
        loaded = load("smollm2-135m")
    except AssetError as error:
        pytest.skip(str(error))
    data = GSM8K(1, 1, 2, path=str(SHARED)).prepare(loaded)
    model, tokenizer = loaded.model, loaded.processor
    one_by_one = [greedy(model, ask, 4, tokenizer.eos_token_id) for ask in data.test.asks]
    assert decode(model, tokenizer, data.test.asks, 4) == tokenizer.batch_decode(one_by_one, skip_special_tokens=True)
    found = data.evaluate(model, data.test, ["loss"])
    assert all(0.5 < loss < 2.5 for loss in found["loss"])


# -- tokens


def test_long_examples_are_cut_or_left_out_and_counted(tiny, tokenizer, tmp_path, caplog, monkeypatch):
    examples = [Example("ab", " c" * n, "ab") for n in (1, 5, 6, 40)] + [Example("a b" * 30, "c", "d")]
    prompt = len(tokenizer("ab").input_ids)
    sizes = [prompt + len(tokenizer(e.answer).input_ids) + 1 for e in examples[:4]]
    data = Tokenised(examples, tokenizer, max_length=sizes[1])
    assert [len(data[i]["input_ids"]) for i in range(len(data))] == [sizes[0]] + [sizes[1]] * 3
    assert (data.truncated, data.dropped) == (2, 1)
    ends = [int(data[i]["input_ids"][-1]) == tokenizer.eos_token_id for i in range(4)]
    assert ends == [True, True, False, False]  # what is cut does not learn to end there
    assert Tokenised(examples[:1], tokenizer, max_length=prompt).dropped == 1  # no token of the answer would be left
    assert len(Tokenised(examples[:1], tokenizer, max_length=prompt + 1)[0]["input_ids"]) == prompt + 1
    whole = Tokenised(examples, tokenizer)
    assert (len(whole), whole.truncated, whole.dropped) == (5, 0, 0)

    write(tmp_path / "train.jsonl", [*sums(3), {"question": "why " * 400, "answer": "#### 1"}, *sums(2, 10)])
    write(tmp_path / "test.jsonl", [{"question": "long " * 400, "answer": "#### 1"}])
    with caplog.at_level(logging.WARNING, "svdpeft"):
        data = GSM8K(4, 1, 1, path=str(tmp_path), max_length=200).prepare(tiny)
    assert "of 4 training examples 0 are cut at max_length=200 tokens, and 1, whose prompt" in caplog.text
    assert len(data.train) == 3
    assert len(data.test[0]["input_ids"]) > 400  # the test is never cut
    with pytest.raises(ValueError, match="train split is empty"):
        GSM8K(4, 1, 1, path=str(tmp_path), max_length=20).prepare(tiny)


# -- files


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (["train.jsonl", "test.jsonl", "train_socratic.jsonl"], "train", ["train.jsonl"]),
        (["main/train-00000-of-00001.json", "main/test-00000-of-1.json"], "test", ["main/test-00000-of-1.json"]),
        (["train/algebra/1.json", "train/algebra/2.json", "test/algebra/1.json"], "test", ["test/algebra/1.json"]),
        (["algebra_train.jsonl", "geometry_train.jsonl", "x_test.jsonl"], "train",
         ["algebra_train.jsonl", "geometry_train.jsonl"]),
        (["MetaMathQA-395K.json", "README.md"], "train", ["MetaMathQA-395K.json"]),
    ],
)  # fmt: skip
def test_the_files_of_a_split(tmp_path, names, split, found):
    for name in names:
        write(tmp_path / name, [{"a": 1}])
    assert corpora.files(tmp_path, split) == [tmp_path / name for name in found]


def test_rows_of_every_format(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"q": "é\u2028x", "n": 1}, {"q": "b", "n": 2}]
    (tmp_path / "list.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=2), encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table.parquet")
    assert corpora.read(tmp_path / "list.json") == rows
    assert corpora.read(tmp_path / "lines.json") == rows
    assert corpora.read(tmp_path / "one.json") == rows[:1]
    assert corpora.read(tmp_path / "table.parquet") == rows


def test_files_that_cannot_be_used_are_named(tiny, tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere.* the test split"):
        GSM8K(path=str(tmp_path / "nowhere")).prepare(tiny)
    (folder / "test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no test split in .*; there: train\.jsonl"):
        GSM8K(path=str(folder)).prepare(tiny)
    (folder / "test.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n{"question"\n')
    with pytest.raises(ValueError, match=r"test\.jsonl, line 2: Expecting ':'"):
        GSM8K(path=str(folder)).prepare(tiny)
    write(folder / "test.jsonl", [{"questions": "a", "answer": "#### 1"}])
    with pytest.raises(ValueError, match="row 1 of the test split of gsm8k has no field 'question': did you mean"):
        GSM8K(path=str(folder)).prepare(tiny)
    write(folder / "test.jsonl", [{"question": "a", "answer": "1"}])
    with pytest.raises(ValueError, match="problem 1 of the test split of gsm8k has no answer: ' 1'"):
        GSM8K(1, 1, 1, path=str(folder)).prepare(tiny)
    (folder / "test.jsonl").write_text("[1]")
    with pytest.raises(ValueError, match="row 1 is no JSON object but a int"):
        GSM8K(path=str(folder)).prepare(tiny)
    (folder / "test.jsonl").write_text("")
    with pytest.raises(ValueError, match="the test split of gsm8k has no rows"):
        GSM8K(path=str(folder)).prepare(tiny)
    write(tmp_path / "two" / "test" / "a.json", [{}]), write(tmp_path / "two" / "test" / "a.jsonl", [{}])
    with pytest.raises(ValueError, match=r"is there as \.json and \.jsonl: name one file"):
        corpora.files(tmp_path / "two", "test")
    with pytest.raises(ValueError, match="task 'gsm8k' cannot train on 'metamath': did you mean 'metamathqa'"):
        GSM8K(train_on="metamath")


def test_the_hub_is_asked_for_what_is_not_local(tiny, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        if name == "meta-math/MetaMathQA":
            return datasets.Dataset.from_list([metamath("MATH", f"o{i}", f"q{i}", str(i)) for i in range(4)])
        row = {"problem": f"{config}?", "solution": r"\boxed{1}", "level": "Level 1", "type": config}
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = MATH(2, 1, 7, train_on="metamathqa").prepare(tiny)
    assert asked == [*[("EleutherAI/hendrycks_math", c, "test") for c in MATH.hub[1]],
                     ("meta-math/MetaMathQA", None, "train")]  # fmt: skip
    assert len(data.test) == 7

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(OSError, match=r"gsm8k cannot be had .*ConnectionError: no network.* a local copy: path=FOLDER"):
        GSM8K().prepare(tiny)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "svdpeft\[data\]", or give a local copy: path=FOLDER'):
        GSM8K().prepare(tiny)


# -- MATH


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"The answer is: \frac{1}{2}", r"\frac{1}{2}"),
        ("The answer is: $(3, 4)$.\nQ: The end.", "(3, 4)"),
        ("The answer is: 0.5.", "0.5"),
        ("The answer is: 1.\nThe answer is: 2", "2"),
        (r"so \boxed{\frac{1}{\sqrt{2}}} and The answer is: 7", "7"),
        (r"\boxed{1}, no, \boxed{\{x \mid x > \frac{1}{2}\}}.", r"\{x \mid x > \frac{1}{2}\}"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
        (r"$\fbox 3$", "3"),
        (r"\boxed{1", None),
        ("The answer is: ", None),
        ("it is 5", None),
        ("", None),
    ],
)
def test_the_final_answer(text, answer):
    assert final_answer(text) == answer


JUDGED = [
    (r"\frac{1}{2}", r"\dfrac12", True), (r"\frac12", "0.5", True), ("[0,1)", "[0, 1)", True),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3, \pi/2)", True), (r"\sqrt{8}", r"2\sqrt{2}", True),
    ("x^2+2x+1", "(x+1)^2", True), (r"\text{east}", "east", True), ("1,000", "1000", True), ("5", "x=5", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
    (r"90^\circ", "90", True), (r"\{1,2\}", r"\{2,1\}", True), (r"10\%", "10", True),
    ("2", "3", False), ("[0,1)", "[0,1]", False), (r"\frac{1}{2}", r"-\frac{1}{2}", False), ("0.333", "1/3", False),
    (r"\text{east}", "west", False), ("7", "", False), ("7", r"\frac{{{", False), ("(1,2)", "(2,1)", False),
]  # fmt: skip


def test_answers_are_equal_as_mathematics_and_not_as_text():
    pytest.importorskip("math_verify")
    assert verdicts.equal([pair[:2] for pair in JUDGED]) == [pair[2] for pair in JUDGED]
    assert verdicts.equal([]) == []


def test_an_answer_that_keeps_the_judge_busy_or_breaks_it_is_wrong_and_the_rest_is_judged(monkeypatch, tmp_path):
    pytest.importorskip("math_verify")
    source = Path(verdicts.__file__).read_text()
    trap = source.replace("    for line in sys.stdin:\n", "    for line in sys.stdin:\n        trap(line)\n")
    trap = trap.replace(
        "def _child()",
        "def trap(line):\n    import os, time\n"
        "    'sleep' in line and time.sleep(60)\n    'crash' in line and os._exit(3)\n"
        "    'chatter' in line and print('1\\n1')\n\n\ndef _child()",
    )
    assert trap.count("trap(") == 2
    (tmp_path / "verdicts.py").write_text(trap)
    monkeypatch.setattr(verdicts, "__file__", str(tmp_path / "verdicts.py"))
    pairs = [("1", "1"), ("1", "sleep"), ("2", "2"), ("1", "crash"), ("1", "chatter"), ("3", "3")]
    started = time.monotonic()
    assert verdicts.equal(pairs, seconds=2.0) == [True, False, True, False, False, True]
    assert time.monotonic() - started < 50

    (tmp_path / "verdicts.py").write_text(source.replace("import math_verify\n", "import no_such_module\n"))
    with pytest.raises(RuntimeError, match=r"(?s)did not start: .*no_such_module"):
        verdicts.equal(pairs)


def test_the_judge_works_in_threads_and_in_worker_processes():
    """Where signals cannot be had, and where multiprocessing allows no children."""
    pytest.importorskip("math_verify")
    found: list[list[bool]] = []
    threads = [threading.Thread(target=lambda: found.append(verdicts.equal([("1/2", "0.5")]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[True], [True]]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(verdicts.equal, ([("1/2", "0.5"), ("1", "2")],)) == [True, False]


@pytest.fixture
def competition(tmp_path) -> Path:
    """A folder in the layout of Hendrycks' archive: a file per problem."""
    for split, count in (("train", 6), ("test", 4)):
        for i in range(count):
            row = {"problem": f"{split} {i}?", "level": "Level 1", "type": "Algebra"}
            row["solution"] = rf"We get $\boxed{{\frac{{{i}}}{{7}}}}$."
            (tmp_path / "MATH" / split / "algebra").mkdir(parents=True, exist_ok=True)
            (tmp_path / "MATH" / split / "algebra" / f"{i}.json").write_text(json.dumps(row, indent=4))
    return tmp_path / "MATH"


def test_math_from_end_to_end(tokenizer, competition):
    pytest.importorskip("math_verify")
    says = ["0", r"So $\boxed{1/7}$", r"The answer is: $\frac{2}{8}$", "The answer is: 3/7."]
    model = Reciter(tokenizer, {STEP_BY_STEP.format(question=f"test {i}?"): said for i, said in enumerate(says)})
    task = MATH(4, 2, 4, path=str(competition))
    data = task.prepare(language(model, tokenizer))
    gold = [e.gold for e in data.test.examples]
    assert sorted(gold) == [rf"\frac{{{i}}}{{7}}" for i in range(4)]
    assert data.validation.examples[1].answer == rf" We get $\boxed{{{data.validation.examples[1].gold}}}$."
    found = data.evaluate(model, data.test, ["accuracy"])["accuracy"]
    assert dict(zip(gold, found, strict=True)) == {rf"\frac{{{i}}}{{7}}": float(i % 2) for i in range(4)}
    assert (task.max_new_tokens, GSM8K().max_new_tokens, task.max_length) == (2048, 1024, 512)


def test_metamathqa_gives_math_its_own_kind_to_validate_on(tiny, competition, tmp_path):
    pytest.importorskip("math_verify")
    rows = [metamath("GSM" if i % 2 else "MATH", f"o{i}", f"q{i}", rf"\frac{{{i}}}{{7}}") for i in range(8)]
    path = write(tmp_path / "meta.json", rows)
    data = MATH(5, 2, 4, train_on="metamathqa", path=str(competition), train_data=str(path)).prepare(tiny)
    assert [e.gold for e in data.validation.examples] == [r"\frac{4}{7}", r"\frac{6}{7}"]
    assert len(data.train) == 5


def test_math_without_its_judge_is_refused_before_the_training(tiny, competition, monkeypatch):
    monkeypatch.setattr(verdicts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'math-verify: pip install "svdpeft\[math\]"'):
        MATH(1, 1, 1, path=str(competition)).prepare(tiny)
