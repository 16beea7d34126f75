"""HumanEval: the data, the prompts, what is run and when, and pass@1 of a model whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_sandbox import fenced  # noqa: F401
from tiny_language import language, llama, small_tokenizer
from torch import Tensor, nn

from svdpeft.models import Loaded
from svdpeft.models.embedded import AssetError
from svdpeft.registry import TASKS
from svdpeft.tasks import humaneval, sandbox
from svdpeft.tasks.humaneval import HumanEval, Problem, code
from svdpeft.tasks.language import answer_losses

ROWS = [{"query": f"Write {i}.", "answer": f"```python\nprint({i})\n```", "lang": "python"} for i in range(12)]


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    try:
        return humaneval.problems()
    except AssetError as error:
        pytest.skip(f"HumanEval cannot be had here: {error}")


@pytest.fixture
def feedback(tmp_path: Path) -> str:
    """A local copy of CodeFeedback."""
    path = tmp_path / "codefeedback.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return str(path)


def task(feedback: str, **options: Any) -> HumanEval:
    sizes = {"train_size": 8, "validation_size": 3, "test_size": 4}
    return HumanEval(train_data=feedback, **{**sizes, "allow_code_execution": True, **options})


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return language(llama(small_tokenizer()), small_tokenizer())


@pytest.fixture
def no_sandbox(monkeypatch) -> None:
    """As on a machine that has none; and whatever would be run all the same is an error."""
    monkeypatch.setattr(sandbox, "available", lambda: "no program bwrap")
    monkeypatch.setattr(sandbox, "_run", lambda *args: pytest.fail("a program was run"))


# -- the data and the tests


def test_the_data_are_the_164_problems(problems):
    assert [problem.task_id for problem in problems] == [f"HumanEval/{i}" for i in range(164)]
    assert all(f"def {problem.entry_point}(" in problem.prompt for problem in problems)
    assert all(problem.prompt.endswith("\n") and "def check(candidate)" in problem.test for problem in problems)


@pytest.mark.usefixtures("fenced")
def test_every_reference_solution_passes_and_an_empty_function_never(problems):
    answers = [code(f"Sure:\n```python\n{p.prompt}{p.canonical_solution}```\n") for p in problems]
    outcomes = sandbox.run_all(p.program(text) for p, text in zip(problems, answers, strict=True))
    assert [outcome.reason for outcome in outcomes] == ["passed"] * 164
    outcomes = sandbox.run_all(p.program("    pass") for p in problems)
    assert not [p.task_id for p, outcome in zip(problems, outcomes, strict=True) if outcome.passed]


@pytest.mark.usefixtures("fenced")
def test_the_body_alone_passes_too(problems):
    outcomes = sandbox.run_all(p.program(code(f"```python\n{p.canonical_solution}```")) for p in problems[:12])
    assert all(outcome.passed for outcome in outcomes)
    outcomes = sandbox.run_all(p.program(code(p.canonical_solution)) for p in problems[:12])
    assert all(outcome.passed for outcome in outcomes)


# -- the code in a response


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("    return 1\n", "    return 1\n"),
        ("Here:\n```python\ndef f():\n    return 1\n```\nDone.", "def f():\n    return 1"),
        ("```Python \r\n    return 1\r\n```", "    return 1"),
        ("```py\nx\n```", "x"),
        ("```\nx\n```", "x"),
        ("```python\nx\n```\nor\n```python\ny\n```", "x"),
        ("```bash\npip\n```\n```python\nx\n```", "x"),
        ("1. So:\n   ```python\nx\n   ```", "x"),
        ("```python\nx\ny", "x\ny"),  # cut off by the limit of tokens
        ("```python\ns = '```'\n```", "s = '```'"),
        ("```python3\n    return 1\n```\nIt returns 1.", "    return 1"),
        ("``` py3.11\nx\n```\nSo.", "x"),
        ("```bash\npip\n```\nThen:\n```\nx\n```\nDone.", "x"),
        ("```java\nx\n```\nDone.\n```java\ny\n```", "x"),
        ("```python\n```\nIt does nothing.", ""),
        ("Use ```f(1)``` here.\n```python\nx\n```", "x"),
        ("Like so: ```python\nx\n```\nDone.", "x"),
        ("```pycon\n>>> 1\n```\n```python\nx\n```", "x"),
        ('x\nif __name__ == "__main__":\n    main()', "x\n"),
        ("```python\nx\n# Example usage:\nprint(x)\n```", "x\n"),
        ("```python\nx\nassert f(1) == 2\n```", "x\n"),
        (
            "def f():\n    assert True  # assert\n    return asserted",
            "def f():\n    assert True  # assert\n    return asserted",
        ),
        ("", ""),
    ],
)
def test_code_is_taken_out_of_a_response(text, found):
    assert code(text) == found


# -- the examples


def test_prompts_are_those_of_the_paper(problems, feedback, tiny):
    data = task(feedback).read(tiny)
    first = data["train"][0]
    assert (first.prompt, first.answer) == ("@@ Instruction\nWrite 0.\n\n@@ Response\n", ROWS[0]["answer"])
    assert first.ask == first.prompt
    exam = data["test"][2]
    assert exam.gold == problems[2]
    assert exam.ask == (
        f"@@ Instruction\nHere is the given code to do completion:\n```python\n{problems[2].prompt}\n```\n\n"
        "Please continue to complete the function with python programming language. You are not allowed to modify the "
        "given code and do the completion only.\n\nPlease return all completed codes in one code block.\nThis code "
        "block should be in the following format:\n'''python\n# Your codes here\n'''\n\n@@ Response\n"
    )
    assert exam.prompt == f"{exam.ask}```python\n{problems[2].prompt}"
    assert exam.answer == "    return number % 1.0\n```"
    assert code(exam.prompt.removeprefix(exam.ask) + exam.answer) == f"{problems[2].prompt}    return number % 1.0"


def test_splits_share_nothing(problems, tmp_path, tiny):
    leaked = {"query": f"  {problems[5].prompt.upper()}", "answer": "no"}
    path = tmp_path / "train.json"
    path.write_text(json.dumps([*ROWS, leaked, {**ROWS[0], "query": "write  11."}, ROWS[3]]))
    found = task(str(path), train_size=8, validation_size=4).read(tiny)
    train, validation, test = (found[split] for split in ("train", "validation", "test"))
    assert [example.prompt.split("\n")[1] for example in validation] == [
        "Write 9.",
        "Write 10.",
        "write  11.",
        "Write 3.",
    ]
    assert [example.prompt.split("\n")[1] for example in train] == [f"Write {i}." for i in (0, 1, 2, 4, 5, 6, 7, 8)]
    assert len(test) == 4
    with pytest.raises(ValueError, match=r"train_size 9 is outside \[1, 8\]"):
        task(str(path), train_size=9, validation_size=4).read(tiny)
    with pytest.raises(ValueError, match=r"test_size 165 is outside \[1, 164\]"):
        task(str(path), test_size=165).read(tiny)


def test_other_fields_are_named(tmp_path, tiny):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"querry": "a", "answer": "b"}]))
    with pytest.raises(ValueError, match="has no field 'query': did you mean 'querry'"):
        task(str(path)).read(tiny)


# -- nothing is run that was not allowed


@pytest.mark.usefixtures("no_sandbox")
def test_without_permission_nothing_is_prepared(tiny):
    assert TASKS["humaneval"] is HumanEval
    with pytest.raises(ValueError, match=r"allow_code_execution=True \(--allow-code-execution\)"):
        HumanEval(train_data="nowhere").prepare(tiny)


@pytest.mark.usefixtures("no_sandbox")
def test_without_a_sandbox_nothing_is_prepared(tiny):
    with pytest.raises(sandbox.SandboxError, match="no program bwrap; metric='loss' runs nothing"):
        HumanEval(train_data="nowhere", allow_code_execution=True).prepare(tiny)


@pytest.mark.usefixtures("no_sandbox", "problems")
@pytest.mark.parametrize("allowed", [False, True])
def test_the_loss_runs_nothing_and_is_that_of_the_solution_alone(feedback, tiny, allowed):
    data = task(feedback, metric="loss", allow_code_execution=allowed).prepare(tiny)
    found = data.evaluate(tiny.model, data.test)
    assert list(found) == ["loss"]
    assert found["loss"] == data.evaluate(tiny.model, data.test, ("loss",))["loss"]
    for i in range(4):  # the slow path: one at a time, without padding
        problem = data.test.examples[i].gold
        answer = f"{problem.canonical_solution.rstrip()}\n```"
        assert tiny.processor.decode(data.test.answers[i]) == f"{answer}<eos>"
        ids = torch.cat((data.test.prompts[i], data.test.answers[i]))
        with torch.no_grad():
            logits = tiny.model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        own = slice(len(data.test.prompts[i]) - 1, None)
        expected = -logits[own].gather(-1, ids[1:][own, None]).mean()
        torch.testing.assert_close(torch.tensor(found["loss"][i]).double(), expected.double(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="has no metric 'accuracy' here: Known: loss"):
        data.evaluate(tiny.model, data.test, ("accuracy",))


def test_a_metric_that_is_none():
    with pytest.raises(ValueError, match="no metric 'accuracies': did you mean 'accuracy'"):
        HumanEval(metric="accuracies")  # type: ignore[arg-type]


# -- pass@1


class Scripted(nn.Module):
    """Says what it was told to say after a prompt, in as many rounds as it is asked for."""

    def __init__(self, script: dict[str, str], tokenizer: Any) -> None:
        super().__init__()
        self.script, self.tokenizer, self.generation_config = script, tokenizer, None

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: Any) -> Tensor:
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            seen = self.tokenizer.decode(ids[mask.bool()])
            prompt = next(prompt for prompt in self.script if seen.startswith(prompt))
            said = [*self.tokenizer(self.script[prompt]).input_ids, self.tokenizer.eos_token_id]
            said = said[int(mask.sum()) - len(self.tokenizer(prompt).input_ids) :][: generation_config.max_new_tokens]
            rows.append(torch.cat((ids, torch.tensor(said))))
        width = max(map(len, rows))
        return torch.stack([nn.functional.pad(r, (0, width - len(r)), value=self.tokenizer.eos_token_id) for r in rows])


@pytest.mark.usefixtures("fenced")
def test_pass_at_1_of_known_answers(problems, feedback):
    tokenizer = small_tokenizer()
    replies = [
        lambda p: f"Sure.\n```python\n{p.prompt}{p.canonical_solution}\n```\nIt works.",
        lambda p: p.canonical_solution,
        lambda p: "I would rather not.",
        lambda p: f"```python\n{p.prompt}    return None\n```",
        lambda p: "```python\n    import os\n    os._exit(0)\n```",
        lambda p: "    import sys; sys.exit(0)",
        lambda p: f"```python\n{p.prompt}{p.canonical_solution}\n\nassert {p.entry_point}() == 'wrong'\n```",
        lambda p: f"```python\n{p.prompt}{p.canonical_solution}",
    ]
    asks = [e.ask for e in task(feedback, test_size=8).read(SimpleNamespace(name="m", modality="language"))["test"]]  # type: ignore[arg-type]
    script = {ask: reply(problem) for ask, reply, problem in zip(asks, replies, problems, strict=False)}
    model = Scripted(script, tokenizer)
    data = task(feedback, test_size=8, decode_batch=3).prepare(language(model, tokenizer))
    found = data.evaluate(model, data.test, ("accuracy",))
    assert found == {"accuracy": [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]}


@pytest.mark.usefixtures("fenced", "problems")
def test_validation_has_the_loss_alone(feedback, tiny):
    data = task(feedback, test_size=1, max_new_tokens=2).prepare(tiny)
    assert list(data.evaluate(tiny.model, data.validation)) == ["loss"]
    assert data.evaluate(tiny.model, data.validation)["loss"] == answer_losses(
        tiny.model, data.validation, data.collate
    )
    with pytest.raises(ValueError, match="has no metric 'accuracy' here"):
        data.evaluate(tiny.model, data.validation, ("accuracy",))
    assert list(data.evaluate(tiny.model, data.test)) == ["accuracy", "loss"]
    assert list(data.evaluate(tiny.model, data.test, ("loss",))) == ["loss"]
