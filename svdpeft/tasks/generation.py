"""Greedy continuations of many prompts: in batches with a key-value cache, or by vLLM from merged weights."""

from __future__ import annotations

import gc
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from svdpeft.adapter.roster import adapters_in
from svdpeft.bars import bar
from svdpeft.sites.place import is_factor
from svdpeft.tasks.base import evaluating

ROUND = 128  # tokens after which finished rows leave their batch, and the others are packed anew

TABLE = re.compile(r"wpe|embed_positions|pos(ition)?s?_(emb|enc)\w*")  # what position tables are called


def positions(model: nn.Module) -> int | None:
    """How many tokens a model can read, where a table of positions, learned or computed once, bounds them.

    Rotary and relative positions, and recurrent models, have no such bound: None. Known by the names that transformers
    gives these tables; OPT's and BART's begin with ``offset`` rows of another use, RoBERTa's with those up to the
    padding's.

    Example:
        >>> table = nn.Module()
        >>> table.wpe = nn.Embedding(64, 8)
        >>> positions(table)
        64
    """
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and TABLE.fullmatch(name.rpartition(".")[2]):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            rows.append(module.num_embeddings - getattr(module, "offset", unused))
    for name, buffer in model.named_buffers():
        if buffer.ndim == 2 and buffer.is_floating_point() and TABLE.fullmatch(name.rpartition(".")[2]):
            rows.append(len(buffer))
    return min(rows, default=None)


def check_room(model: nn.Module, prompts: Sequence[Tensor], max_new_tokens: int) -> None:
    """Refuse a decoding that would run out of the model's ``positions``, in an IndexError after hours.

    Raises:
        ValueError: with the limit, and the option to lower.
    """
    if (room := positions(model)) is None or not prompts:
        return
    longest = max(map(len, prompts))
    if longest + max_new_tokens - 1 > room:  # the last new token is not read again
        lower = f"lower max_new_tokens to {room + 1 - longest}" if longest <= room else "the prompt alone is too long"
        raise ValueError(
            f"this model has positions for {room} tokens, not for a prompt of {longest} tokens and "
            f"max_new_tokens={max_new_tokens}: {lower}"
        )


def pad(rows: Sequence[Tensor], value: int, left: bool = False) -> Tensor:
    """Stack rows (T_i,) of different lengths into (B, max T), filled with ``value`` on one side."""
    width = max(len(row) for row in rows)
    fill = [row.new_full((width - len(row),), value) for row in rows]
    return torch.stack([torch.cat((f, row) if left else (row, f)) for row, f in zip(rows, fill, strict=True)])


def pad_token(tokenizer: Any) -> int:
    """The padding token's id; the end of text stands in where there is none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@contextmanager
def _generation_config(model: Any, config: Any) -> Iterator[None]:
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

    A batch decodes until its last row ends. So that a few long continuations do not keep every batch busy, decoding
    goes in rounds of ``ROUND`` tokens: after each, the rows that go on are packed into fewer batches, at the price of
    reading their text once again. The choices are those of decoding one by one, up to rounding.

    Args:
        model: a transformers language model, in any training mode; left as it was.
        tokenizer: its tokenizer.
        prompts: token ids, each (T_i,).
        max_new_tokens: tokens after which a continuation is cut.
        batch: prompts decoded at once, padded on the left; near lengths together.

    Returns:
        The continuations without special tokens, in the order of ``prompts``.

    Raises:
        ValueError: the model has too few positions.
    """
    from transformers import GenerationConfig

    generate: Any = model.generate
    eos, pad_id = tokenizer.eos_token_id, pad_token(tokenizer)
    config = GenerationConfig(do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad_id, eos_token_id=eos)
    texts, pending, steps = list(prompts), list(range(len(prompts))), 0
    check_room(model, prompts, max_new_tokens)
    total = len(prompts) * max_new_tokens
    progress = bar(total=total, what="decode", unit="token")
    with progress, evaluating(model) as device, _generation_config(model, config):
        while pending and steps < max_new_tokens:
            config.max_new_tokens = min(ROUND, max_new_tokens - steps)
            order, pending = sorted(pending, key=lambda i: len(texts[i])), []
            for start in range(0, len(order), batch):
                chosen = order[start : start + batch]
                ids = pad([texts[i] for i in chosen], pad_id, left=True).to(device)
                mask = pad([torch.ones_like(texts[i]) for i in chosen], 0, left=True).to(device)
                new = generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].cpu()
                for i, row in zip(chosen, new, strict=True):
                    ends = (row == eos).nonzero()
                    texts[i] = torch.cat((texts[i], row[: int(ends[0])] if len(ends) else row))
                    if not len(ends):
                        pending.append(i)
                    progress.update(max_new_tokens - steps if len(ends) else config.max_new_tokens)
            steps += config.max_new_tokens
    continuations = [text[len(prompt) :].tolist() for text, prompt in zip(texts, prompts, strict=True)]
    return _read(tokenizer, continuations)


def _read(tokenizer: Any, continuations: list[list[int]]) -> list[str]:
    """Token ids as text, untouched: the clean-up of some tokenizers would move the spaces of code."""
    return tokenizer.batch_decode(continuations, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within the block every adapter that is switched on is in the weights; afterwards each is as it was."""
    were = [(a, a.state) for a in adapters_in(model) if a.state in ("attached", "folded")]
    try:
        for adapter, _ in were:
            adapter.merge()
        yield
    finally:
        for adapter, state in reversed(were):
            if adapter.state == "merged":
                adapter.unmerge()
            if state == "folded" and adapter.state == "attached":
                adapter.fold()


def save_merged(model: nn.Module, tokenizer: Any, folder: str) -> None:
    """Write a transformers model with its adapters in the weights, and its tokenizer, as any tool can load them.

    Args:
        model: with or without adapters; afterwards every bit of it is as it was.
        tokenizer: its tokenizer.
        folder: where to.

    Raises:
        ValueError: the model is not one of transformers.
    """
    from transformers import GenerationConfig, PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"a {type(model).__name__} cannot be written as a folder in transformers' layout")
    with merged(model), _generation_config(model, GenerationConfig()):
        weights = {name: w for name, w in model.state_dict().items() if not is_factor(name)}
        model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def decode_vllm(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Tensor], max_new_tokens: int, batch: int = 32
) -> list[str]:
    """Continue each prompt greedily with vLLM, which is given the merged weights in a temporary folder.

    Args:
        model: a transformers language model; left as it was.
        tokenizer: its tokenizer.
        prompts: token ids, each (T_i,): the very ones that ``decode`` gets.
        max_new_tokens: tokens after which a continuation is cut.
        batch: not used: vLLM schedules by itself.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: the model is not one of transformers.
    """
    try:
        from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('engine="vllm" needs vLLM: pip install "svdpeft[vllm]"') from error
    options: dict[str, Any] = {}
    if torch.cuda.is_available():  # the model under training stays where it is: vLLM gets of the rest
        free, total = torch.cuda.mem_get_info()
        options["gpu_memory_utilization"] = 0.9 * free / total
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    greedy = SamplingParams(
        temperature=0.0, top_p=1.0, max_tokens=max_new_tokens, stop_token_ids=[tokenizer.eos_token_id]
    )
    with tempfile.TemporaryDirectory() as folder:
        save_merged(model, tokenizer, folder)
        llm = LLM(model=folder, dtype=dtype, seed=0, generation_config="vllm", **options)
        outputs = llm.generate([{"prompt_token_ids": ids.tolist()} for ids in prompts], greedy, use_tqdm=False)
        del llm
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return _read(tokenizer, [list(output.outputs[0].token_ids) for output in outputs])


ENGINES: dict[str, Callable[[nn.Module, Any, Sequence[Tensor], int, int], list[str]]] = {
    "transformers": decode,
    "vllm": decode_vllm,
}
