"""What the language tasks share: prompts, examples as tokens, the loss of a reference, and how a model is judged.

Source: the prompts are MetaMath's (Yu et al., ICLR 2024, arXiv:2309.12284), as PiSSA (Meng et al., NeurIPS 2024,
arXiv:2404.02948) and SORSA (Cao and Song, 2024, arXiv:2409.00055) use them.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from svdpeft.models import Loaded
from svdpeft.registry import near_miss
from svdpeft.tasks.base import SPLITS, SplitName, Task, TaskData, Unread, evaluating, whole
from svdpeft.tasks.generation import ENGINES, check_room, pad, pad_token, positions

INSTRUCTION = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response:"
)
STEP_BY_STEP = INSTRUCTION + " Let's think step by step."
IGNORED = -100  # the label that transformers' losses leave out
BATCH_TOKENS = 4096  # of one forward when references are measured
EXTRA_TOKENS = 8  # where the references give the length: decoding may run this much longer than the longest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One example of a language task.

    Args:
        prompt: what stands before the answer in training, and where the loss is measured.
        answer: the reference; the end of text is added.
        ask: the prompt that decoding starts from.
        gold: what a continuation is compared with; the task knows what it is.
    """

    prompt: str
    answer: str
    ask: str
    gold: Any = None


class Tokenised(Dataset[dict[str, Tensor]]):
    """Examples as token ids: ``{"input_ids": (T,), "labels": (T,)}``, prompt, answer and end of text.

    Prompt and answer are tokenised apart, so that training sees the very prompt tokens that decoding starts from. A
    prompt begins with what the tokenizer itself puts there (a BOS token, or nothing); no chat template is applied.

    Args:
        examples: the examples.
        tokenizer: a transformers tokenizer.
        max_length: tokens, T; what is longer is cut at the end, and an example of which no token of the answer would
            remain is left out. ``truncated`` and ``dropped`` count them. ``None``: nothing is cut.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: Any, max_length: int | None = None) -> None:
        eos = tokenizer.eos_token_id

        def prompts(texts: list[str]) -> list[list[int]]:
            rows = tokenizer(texts).input_ids if texts else []
            pairs = zip(rows, texts, strict=True)  # some tokenizers close every text with an end
            return [r[:-1] if r[-1] == eos and not text.endswith(tokenizer.eos_token) else r for r, text in pairs]

        before = prompts([example.prompt for example in examples])
        kept = [i for i, ids in enumerate(before) if max_length is None or len(ids) < max_length]
        self.examples = [examples[i] for i in kept]
        self.prompts = [torch.tensor(before[i]) for i in kept]
        same = all(example.ask == example.prompt for example in self.examples)
        self.asks = self.prompts if same else [torch.tensor(r) for r in prompts([e.ask for e in self.examples])]
        answers = [example.answer for example in self.examples]
        rows = tokenizer(answers, add_special_tokens=False).input_ids if answers else []
        full = [torch.tensor([*ids, eos]) for ids in rows]
        room = [None if max_length is None else max_length - len(prompt) for prompt in self.prompts]
        self.answers = [answer[:fits] for answer, fits in zip(full, room, strict=True)]
        self.truncated = sum(len(cut) < len(answer) for cut, answer in zip(self.answers, full, strict=True))
        self.dropped = len(examples) - len(kept)

    def __len__(self) -> int:
        return len(self.examples)

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


def answer_losses(
    model: nn.Module, examples: Any, collate: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]
) -> list[float]:
    """Mean cross-entropy of each example's labelled tokens, in nats; an answer's end of text is one of them."""
    sizes = [len(examples[i]["input_ids"]) for i in range(len(examples))]
    losses = torch.zeros(len(examples), dtype=torch.float64)
    with evaluating(model) as device:
        for chosen in _near(sizes):
            batch = {name: value.to(device) for name, value in collate([examples[i] for i in chosen]).items()}
            labels = batch.pop("labels")[:, 1:]  # (B, T-1): what follows each token
            logits = model(**batch).logits[:, :-1]
            told = labels != IGNORED
            each = F.cross_entropy(logits[told].float(), labels[told], reduction="none")
            total = each.new_zeros(len(chosen)).index_add(0, told.nonzero()[:, 0], each)
            losses[chosen] = (total / told.sum(-1)).double().cpu()
    return losses.tolist()


def _near(sizes: Sequence[int]) -> list[list[int]]:
    """Indices in batches of near sizes, each of at most ``BATCH_TOKENS`` tokens with its padding, or of one row."""
    batches: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        if not batches or (len(batches[-1]) + 1) * sizes[i] > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches


@dataclass(frozen=True)
class LanguageTask(Task):
    """A language task: a model learns answers, and is asked for them; greedy decoding.

    ``loss`` is the mean cross-entropy of a reference's tokens; the other metric is the task's own, of what the model
    says.

    Args:
        max_length: tokens of a training example, end of text included. What is longer loses its end, the end of text
            too; an example whose prompt alone is as long is left out; both are counted and logged. ``None``: no limit.
            Validation and test are never cut.
        max_new_tokens: tokens after which a continuation is cut; ``None``: a few more than the longest reference.
        decode_batch: prompts decoded at once.
        engine: ``"transformers"``, or ``"vllm"``, which decodes the merged model.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    decode_batch: int = 32
    engine: Literal["transformers", "vllm"] = "transformers"

    modality = "language"
    metrics = ("accuracy", "loss")
    metric = "accuracy"

    def __post_init__(self) -> None:
        for name, least in (("max_length", 2), ("max_new_tokens", 1), ("decode_batch", 1)):
            value = getattr(self, name)
            if value is None and name != "decode_batch":
                continue
            if not whole(value):
                raise ValueError(f"{name} {value!r} of task {self.name!r} is no whole number")
            if value < least:
                raise ValueError(f"{name} {value} of task {self.name!r} is below {least}")
        if self.engine not in ENGINES:
            raise ValueError(
                f"task {self.name!r} has no engine {self.engine!r}: {near_miss(str(self.engine), ENGINES)}"
            )

    @abstractmethod
    def read(self, loaded: Loaded, splits: Collection[SplitName] = SPLITS) -> dict[str, list[Example]]:
        """The examples of these splits, as many as the sizes say; nothing is read that only another one needs.

        Raises:
            ValueError: a size is outside what the data can give (``check``).
        """

    @abstractmethod
    def judge(self, texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """The task's metric of each continuation."""

    def decodes(self, examples: Sequence[Example]) -> bool:
        """Whether judging these examples takes a decoding: not where there is nothing to compare with."""
        return all(example.gold is not None for example in examples)

    def limit(self, examples: Tokenised) -> int:
        """Tokens after which a continuation is cut."""
        return self.max_new_tokens or max(map(len, examples.answers)) + EXTRA_TOKENS

    def check_length(self, loaded: Loaded, split: str, examples: Tokenised) -> None:
        """Refuse what is longer than the model has positions for; a training would end in an IndexError.

        Raises:
            ValueError: with the limit, and the option to lower.
        """
        longest = max((len(p) + len(a) for p, a in zip(examples.prompts, examples.answers, strict=True)), default=0)
        room = positions(loaded.model)
        if room is not None and longest > room:
            lower = f"lower max_length to {room}" if split == "train" else "no option shortens it"
            raise ValueError(
                f"{loaded.name!r} has positions for {room} tokens, but the {split} split of task {self.name!r} has an "
                f"example of {longest}: {lower}"
            )
        if split != "train" and self.decodes(examples.examples):
            check_room(loaded.model, examples.asks, self.limit(examples))

    def prepare(self, loaded: Loaded, seed: int = 0, splits: Collection[SplitName] = SPLITS) -> TaskData:
        """Tokenise the examples for this model.

        Raises:
            ValueError: ``loaded`` is a vision model, has no tokenizer with an end of text or no ``generate``, a size
                is outside its limit, or an example is longer than the model's positions.
        """
        self.check(loaded, **{split: getattr(self, f"{split}_size") for split in splits})
        tokenizer = loaded.processor
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise ValueError(f"task {self.name!r} needs a tokenizer with an eos token; {loaded.name!r} has none")
        if not callable(getattr(loaded.model, "generate", None)):
            raise ValueError(f"task {self.name!r} needs a model with generate(); {loaded.name!r} has none")
        data: dict[str, Dataset[Any]] = dict.fromkeys(SPLITS, Unread())
        for split, examples in self.read(loaded, splits).items():
            found = Tokenised(examples, tokenizer, self.max_length if split == "train" else None)
            if found.truncated or found.dropped:
                logger.warning(
                    "%s: of %d training examples %d are cut at max_length=%d tokens, and %d, whose prompt alone is as "
                    "long, are left out", self.name, len(examples), found.truncated, self.max_length, found.dropped,
                )  # fmt: skip
            self.check_length(loaded, split, found)
            data[split] = found
        collate = Collator(pad_token(tokenizer))

        def evaluate(model: nn.Module, examples: Dataset[Any], metrics: Collection[str] = ()) -> dict[str, list[float]]:
            assert isinstance(examples, Tokenised)
            for name in metrics:
                if name not in self.metrics:
                    raise ValueError(f"task {self.name!r} has no metric {name!r}: {near_miss(name, self.metrics)}")
            found: dict[str, list[float]] = {}
            if not metrics or self.metric in metrics:
                limit = self.limit(examples)
                texts = ENGINES[self.engine](model, tokenizer, examples.asks, limit, self.decode_batch)
                found[self.metric] = self.judge(texts, examples.examples)
            if not metrics or "loss" in metrics:
                found["loss"] = answer_losses(model, examples, collate)
            return found

        return TaskData(**data, collate=collate, evaluate=evaluate)
