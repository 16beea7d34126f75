"""Text of one's own for a language model: prompts with answers, conversations, or plain text."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from svdpeft.models import Loaded
from svdpeft.registry import TASKS, near_miss
from svdpeft.tasks.base import SPLITS, SplitName, TaskData, Unread, evaluating, whole
from svdpeft.tasks.corpora import Row
from svdpeft.tasks.generation import pad_token, positions
from svdpeft.tasks.language import IGNORED, INSTRUCTION, Collator, answer_losses
from svdpeft.tasks.own import OwnTask, column

PROMPTS = ("prompt", "instruction", "question", "query", "input")
ANSWERS = ("answer", "completion", "response", "output", "chosen")
MESSAGES, TEXT = ("messages", "conversations", "conversation"), ("text", "content")
TEMPLATES = {"plain": "{prompt}", "instruction": INSTRUCTION.replace("{question}", "{prompt}") + " "}
CHAT = "chat"

logger = logging.getLogger(__name__)


class Texts(Dataset[dict[str, Tensor]]):
    """Texts as token ids: ``{"input_ids": (T,), "labels": (T,)}``, labels -100 where no loss is taken.

    Args:
        rows: ids and labels of each.
        max_length: tokens, T; the end of what is longer is cut off, and a text of which no labelled token would remain
            is left out. ``truncated`` and ``dropped`` count them.
    """

    def __init__(self, rows: Sequence[tuple[list[int], list[int]]], max_length: int | None) -> None:
        self.lengths = [len(ids) for ids, _ in rows]  # of all, before anything is cut
        cut = [(ids[:max_length], labels[:max_length]) for ids, labels in rows]
        # The first token of a text is told by none before it.
        kept = [i for i, (_, labels) in enumerate(cut) if any(label != IGNORED for label in labels[1:])]
        self.rows = [tuple(map(torch.tensor, cut[i])) for i in kept]
        self.truncated = sum(len(cut[i][0]) < len(rows[i][0]) for i in kept)
        self.dropped = len(rows) - len(kept)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, labels = self.rows[index]
        return {"input_ids": ids, "labels": labels}

    def __str__(self) -> str:
        """What there is, for people: number of texts, their lengths, what does not fit."""
        if not self.lengths:
            return "no text"
        middle, most = statistics.median(self.lengths), max(self.lengths)
        told = f"{len(self.lengths):,} texts of {min(self.lengths)} to {most} tokens, median {middle:g}"
        told += f"; {self.truncated:,} cut" if self.truncated else ""
        return told + (f"; {self.dropped:,} left out, of which nothing to learn would remain" if self.dropped else "")


@TASKS.register("text")
@dataclass(frozen=True)
class Text(OwnTask):
    """Prompts with answers, conversations, or plain text; the metric is the loss in nats per token.

    Which of the three is told by the columns: ``messages`` (a list of ``{"role": …, "content": …}``, written by the
    tokenizer's chat template), a prompt and an answer, or ``text``. The loss is taken on answers, and of plain text on
    all of it.

    Args:
        prompt: column of the prompt; ``None``: prompt, instruction, question, query or input, what is there first.
        answer: column of the answer; ``None``: answer, completion, response, output or chosen.
        messages: column of the conversation; ``None``: messages, conversations or conversation.
        text: column of plain text; ``None``: text or content.
        template: what is put around a prompt: ``"plain"``, ``"instruction"`` (Alpaca's), ``"chat"`` (the tokenizer's
            chat template), or a text with ``{prompt}`` in it.
        loss_on: ``"answers"``, or ``"all"``: of the prompts, too.
        max_length: tokens of a training text; what is longer loses its end, and both that and what is left out is
            counted. ``None``: no limit. Validation and test are never cut.
        packing: the texts of a batch go one after the other, without padding; each sees itself alone. For models of
            transformers that tell texts apart by their positions.
    """

    prompt: str | None = None
    answer: str | None = None
    messages: str | None = None
    text: str | None = None
    template: str = "plain"
    loss_on: Literal["answers", "all"] = "answers"
    max_length: int | None = None
    packing: bool = False

    metric: ClassVar[str] = "loss"
    metrics: ClassVar[tuple[str, ...]] = ("loss",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and not (whole(self.max_length) and self.max_length >= 2):
            raise ValueError(f"max_length {self.max_length!r} of task {self.name!r} is no whole number of at least 2")
        if self.loss_on not in ("answers", "all"):
            raise ValueError(f"loss_on {self.loss_on!r}: {near_miss(str(self.loss_on), ('answers', 'all'))}")
        if self.template not in (*TEMPLATES, CHAT) and "{prompt}" not in self.template:
            raise ValueError(
                f"template {self.template!r} has no {{prompt}} in it: {near_miss(self.template, (*TEMPLATES, CHAT))}"
            )

    def key(self, row: Row) -> str:
        return repr([row[name] for name in (*MESSAGES, *PROMPTS, *TEXT, *self._named()) if name in row] or row)

    def _named(self) -> list[str]:
        return [name for name in (self.messages, self.prompt, self.text) if name is not None]

    def prepare(self, loaded: Loaded, seed: int = 0, splits: Collection[SplitName] = SPLITS) -> TaskData:
        """Tokenise the texts for this model.

        Raises:
            ValueError: a vision model or an encoder, no tokenizer with an end of text, no such column, a row that is
                no conversation, a text longer than the model's positions; packing where the model mixes the texts.
            OSError: the data are not there.
        """
        tokenizer = loaded.processor
        found = self.read(loaded, splits)
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise ValueError(f"task {self.name!r} needs a tokenizer with an eos token; {loaded.name!r} has none")
        if not callable(getattr(loaded.model, "generate", None)):
            raise ValueError(
                f"task {self.name!r} needs a model that continues texts; {loaded.name!r} has no generate()"
            )
        data: dict[str, Dataset[Any]] = dict.fromkeys(SPLITS, Unread())
        for split, rows in found.items():
            where = f"the {split} split of {self.data}"
            texts = Texts(self._tokens(rows, tokenizer, where), self.max_length if split == "train" else None)
            room, longest = positions(loaded.model), max((len(ids) for ids, _ in texts.rows), default=0)
            if room is not None and longest > room:
                lower = f"lower max_length to {room}" if split == "train" else "leave it out"
                raise ValueError(f"{loaded.name!r} has positions for {room} tokens; {where} has {longest}: {lower}")
            logger.info("%s: %s", where, texts)
            data[split] = texts
        collate = Collator(pad_token(tokenizer))
        if self.packing:
            # With a cache transformers takes a row for one text. A trainer switches it off, too, but only later.
            loaded.model.config.use_cache = False  # type: ignore[union-attr]
            if not _apart(loaded.model):
                raise ValueError(
                    f"packing: {loaded.name!r} does not tell packed texts apart, each sees those before it"
                )

        def evaluate(model: nn.Module, examples: Dataset[Any], metrics: Collection[str] = ()) -> dict[str, list[float]]:
            for name in metrics:
                if name != "loss":
                    raise ValueError(f"task {self.name!r} has no metric {name!r}: {near_miss(name, self.metrics)}")
            return {"loss": answer_losses(model, examples, collate)}

        return TaskData(**data, collate=packed if self.packing else collate, evaluate=evaluate)

    def _tokens(self, rows: Sequence[Row], tokenizer: Any, where: str) -> list[tuple[list[int], list[int]]]:
        if not rows:
            raise ValueError(f"{where} has no rows")
        known = rows[0]
        if self.messages or (not self._named() and any(name in known for name in MESSAGES)):
            name = column(rows, self.messages, MESSAGES, "messages", where)
            talks = [_conversation(row[name], f"row {i} of {where}") for i, row in enumerate(rows, 1)]
            return [self._chat(talk, tokenizer, f"row {i} of {where}") for i, talk in enumerate(talks, 1)]
        if self.text or (not self.prompt and not self.answer and not any(name in known for name in PROMPTS)):
            name = column(rows, self.text, TEXT, "text", where)
            closed = [[*ids, tokenizer.eos_token_id] for ids in _open(tokenizer, [str(row[name]) for row in rows])]
            return [(ids, ids) for ids in closed]
        ask = column(rows, self.prompt, PROMPTS, "prompt", where)
        tell = column(rows, self.answer, ANSWERS, "answer", where)
        pairs = [(str(row[ask]), str(row[tell])) for row in rows]
        if self.template == CHAT:
            roles = ("user", "assistant")
            talks = [[{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)] for pair in pairs]
            return [self._chat(talk, tokenizer, f"row {i} of {where}") for i, talk in enumerate(talks, 1)]
        frame = TEMPLATES.get(self.template, self.template)
        # Apart, so that training sees the very prompt tokens that decoding starts from.
        before = _open(tokenizer, [frame.replace("{prompt}", prompt) for prompt, _ in pairs])
        after = tokenizer([answer for _, answer in pairs], add_special_tokens=False).input_ids
        return [self._joined(a, [*b, tokenizer.eos_token_id]) for a, b in zip(before, after, strict=True)]

    def _joined(self, prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        labels = prompt if self.loss_on == "all" else [IGNORED] * len(prompt)
        return [*prompt, *answer], [*labels, *answer]

    def _chat(self, talk: Sequence[dict[str, str]], tokenizer: Any, where: str) -> tuple[list[int], list[int]]:
        """A conversation as the chat template writes it; the loss is on what the assistant says."""
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"the tokenizer has no chat template, which conversations need: {where}")

        def written(count: int, ask: bool = False) -> list[int]:
            told = tokenizer.apply_chat_template(list(talk[:count]), add_generation_prompt=ask, return_dict=True)
            return list(told["input_ids"])

        ids = written(len(talk))
        if self.loss_on == "all":
            return ids, ids
        labels = [IGNORED] * len(ids)
        for i, message in enumerate(talk):
            if message["role"] == "assistant":
                start, end = written(i, ask=True), written(i + 1)
                if ids[: len(end)] != end or end[: len(start)] != start:
                    raise ValueError(
                        f"the chat template writes the beginning of {where} differently when more follows, so that its "
                        "answers cannot be told apart: loss_on='all' takes the loss on everything"
                    )
                labels[len(start) : len(end)] = ids[len(start) : len(end)]
        return ids, labels


def packed(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Texts one after the other in one row; positions begin anew with each, by which a model tells them apart."""
    from transformers import DataCollatorWithFlattening

    rows = [{name: tensor.tolist() for name, tensor in example.items()} for example in examples]
    found: Any = DataCollatorWithFlattening(return_tensors="pt")(rows)
    return dict(found)


def _apart(model: nn.Module) -> bool:
    """Whether a model tells packed texts apart: what stands in the first does not touch what it says to the second."""

    def second(*first: int) -> Tensor:
        texts = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in (first, (4, 5, 6))]
        batch = {name: value.to(device) for name, value in packed(texts).items() if name != "labels"}
        return model(**batch).logits[:, len(first) :]

    with evaluating(model) as device:
        return torch.equal(second(1, 2, 3), second(3, 1, 1))


def _open(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Texts as the tokenizer begins them, without an end that it may put behind."""
    rows, eos = tokenizer(texts).input_ids, tokenizer.eos_token_id
    pairs = zip(rows, texts, strict=True)
    return [r[:-1] if r[-1:] == [eos] and not text.endswith(tokenizer.eos_token) else r for r, text in pairs]


def _conversation(value: Any, where: str) -> list[dict[str, str]]:
    """A conversation as roles and contents; ShareGPT's words for them are understood."""
    words = {"human": "user", "gpt": "assistant"}
    found = []
    for message in value if isinstance(value, list) else [value]:
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        content = message.get("content", message.get("value")) if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f'{where}: {message!r} is no message, {{"role": …, "content": …}}')
        found.append({"role": words.get(role, role), "content": content})
    if not any(message["role"] == "assistant" for message in found):
        raise ValueError(f"{where}: nobody is the assistant, whose answers are learned")
    return found
