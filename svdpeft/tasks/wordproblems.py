"""Arithmetic word problems for language models: GSM-8K's format and prompt on stories that need no download.

The loss is taken on the response alone; the metric is the exact match of the final number, decoded greedily.

Source: the prompt is MetaMath's (Yu et al., ICLR 2024, arXiv:2309.12284), as PiSSA and SORSA use it; the
answers follow GSM-8K (Cobbe et al. 2021, arXiv:2110.14168).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import GenerationConfig

from svdpeft.models import Loaded
from svdpeft.registry import TASKS
from svdpeft.tasks.base import Task, TaskData, evaluating
from svdpeft.tasks.stories import Problem, limit, problems

PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response: Let's think step by step."
)
IGNORED = -100  # the label that transformers' losses leave out
NUMBER = re.compile(r"\s*\$?\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)")
EVAL_BATCH = 16
EXTRA_TOKENS = 8  # decoding may run this much longer than the longest reference answer


def extract(text: str) -> float | None:
    """The number after the last ``####``, or None.

    Example:
        >>> extract("72/2 = <<72/2=36>>36\\n#### 1,036 clips"), extract("36")
        (1036.0, None)
    """
    _, mark, tail = text.rpartition("####")
    number = NUMBER.match(tail) if mark else None
    return float(number.group(1).replace(",", "")) if number else None


def pad(rows: Sequence[Tensor], value: int, left: bool = False) -> Tensor:
    """Stack rows (T_i,) of different lengths into (B, max T), filled with ``value`` on one side."""
    width = max(len(row) for row in rows)
    fill = [row.new_full((width - len(row),), value) for row in rows]
    return torch.stack([torch.cat((f, row) if left else (row, f)) for row, f in zip(rows, fill, strict=True)])


class Tokenised(Dataset[dict[str, Tensor]]):
    """Problems as token ids: ``{"input_ids": (T,), "labels": (T,)}``, prompt, answer and end of text.

    Prompt and answer are tokenised apart: training sees the very prompt tokens that decoding starts from.

    Args:
        problems: the problems.
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, problems: Sequence[Problem], tokenizer: Any) -> None:
        self.problems = problems
        prompts = tokenizer([PROMPT.format(question=p.question) for p in problems]).input_ids
        answers = tokenizer([f" {p.answer}" for p in problems], add_special_tokens=False).input_ids
        self.prompts = [torch.tensor(ids) for ids in prompts]
        self.answers = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in answers]

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        prompt, answer = self.prompts[index], self.answers[index]
        labels = torch.cat((torch.full_like(prompt, IGNORED), answer))
        return {"input_ids": torch.cat((prompt, answer)), "labels": labels}


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right. The mask comes from lengths: the padding token may be the end of text."""

    pad_id: int

    def __call__(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = [example["input_ids"] for example in examples]
        return {
            "input_ids": pad(ids, self.pad_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
            "labels": pad([example["labels"] for example in examples], IGNORED),
        }


@contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Set the checkpoint's own settings aside: a temperature would warn, a penalty is not plain greedy."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def decode(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Tensor], max_new_tokens: int, batch: int = 32
) -> list[str]:
    """Continue each prompt greedily, with a key-value cache, up to the end of text.

    Args:
        model: a transformers language model, in any training mode; left as it was.
        tokenizer: its tokenizer.
        prompts: token ids, each (T_i,).
        max_new_tokens: tokens after which a continuation is cut.
        batch: prompts decoded at once, padded on the left; near lengths together.

    Returns:
        The continuations without special tokens, in the order of ``prompts``.
    """
    generate: Any = model.generate
    pad_id = pad_token(tokenizer)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts: dict[int, str] = {}
    with evaluating(model) as device, _generation_config(model, config):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            ids = pad([prompts[i] for i in chosen], pad_id, left=True).to(device)
            mask = pad([torch.ones_like(prompts[i]) for i in chosen], 0, left=True).to(device)
            new = generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]
            texts |= zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True)
    return [texts[i] for i in range(len(prompts))]


def answer_losses(
    model: nn.Module, examples: Tokenised, collate: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]
) -> list[float]:
    """Mean cross-entropy of each reference answer's tokens, in nats."""
    losses: list[float] = []
    with evaluating(model) as device:
        for start in range(0, len(examples), EVAL_BATCH):
            batch = collate([examples[i] for i in range(start, min(start + EVAL_BATCH, len(examples)))])
            labels = batch.pop("labels")[:, 1:].to(device)  # (B, T-1): what follows each token
            logits = model(**{name: value.to(device) for name, value in batch.items()}).logits[:, :-1].float()
            each = F.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")  # (B, T-1)
            losses += (each.sum(-1) / (labels != IGNORED).sum(-1)).tolist()
    return losses


def pad_token(tokenizer: Any) -> int:
    """The padding token's id; the end of text stands in where there is none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@TASKS.register("wordproblems")
@dataclass(frozen=True)
class WordProblems(Task):
    """Stories of two or three steps with the four operations; accuracy in [0, 1].

    The splits share neither a question nor a story with its numbers (see ``stories``). They are fixed: the seed of a
    run changes initialisation and batch order only.

    Args:
        train_size: number of training problems.
        validation_size: number of validation problems.
        test_size: number of test problems.
        data_seed: chooses another set of training problems; the others stay.
    """

    train_size: int = 256
    validation_size: int = 64
    test_size: int = 64
    data_seed: int = 0

    modality = "language"
    metric = "accuracy"
    metrics = ("accuracy", "loss")

    def prepare(self, loaded: Loaded, seed: int = 0) -> TaskData:
        """Tokenise the problems for this model.

        Raises:
            ValueError: ``loaded`` has no tokenizer or no ``generate``, or a size is outside its limit.
        """
        self.check(loaded, train=limit("train"), validation=limit("validation"), test=limit("test"))
        tokenizer = loaded.processor
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise ValueError(f"task {self.name!r} needs a tokenizer with an eos token; {loaded.name!r} has none")
        if not callable(getattr(loaded.model, "generate", None)):
            raise ValueError(f"task {self.name!r} needs a model with generate(); {loaded.name!r} has none")
        train = Tokenised(problems("train", self.train_size, self.data_seed), tokenizer)
        validation = Tokenised(problems("validation", self.validation_size), tokenizer)
        test = Tokenised(problems("test", self.test_size), tokenizer)
        collate = Collator(pad_token(tokenizer))

        def evaluate(model: nn.Module, examples: Dataset[Any], metrics: Collection[str] = ()) -> dict[str, list[float]]:
            assert isinstance(examples, Tokenised)
            found = {}
            if not metrics or "accuracy" in metrics:
                longest = max(len(answer) for answer in examples.answers)
                texts = decode(model, tokenizer, examples.prompts, longest + EXTRA_TOKENS)
                pairs = zip(texts, examples.problems, strict=True)
                found["accuracy"] = [float(extract(text) == problem.result) for text, problem in pairs]
            if not metrics or "loss" in metrics:
                found["loss"] = answer_losses(model, examples, collate)
            return found

        return TaskData(train, validation, test, collate, evaluate)
