"""RWKV as a language model of transformers: its tokenizers, and ``forward`` and ``generate`` with a recurrent state.

Transformers' RWKV-4 and rwkv-simple's RWKV-6 have no attention mask, so that padding on the left would change what they
say: ``RwkvLM`` gives them one, over their own layers and under their own names. RWKV-7's package has it.
``rwkv_steps`` carries the state of all three through ``generate``.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from svdpeft.models.rwkv_steps import Stepping

END = "<|endoftext|>"  # token 0 in every vocabulary of RWKV
WORLD = "vocab/rwkv_vocab_v20230424.txt"  # of the package rwkv-simple
State = list[Tensor]  # batch first, each

Run = Callable[[Tensor, State | None], tuple[Tensor, State]]


def tokenizer(vocab: int) -> Any:
    """Return the tokenizer that belongs to a size of vocabulary; token 0 is the end of text, and the padding.

    Args:
        vocab: rows of the embedding: 256 is bytes, 65,536 RWKV's World vocabulary (greedy longest match).

    Returns:
        A tokenizer of transformers; None for another size, which does not say what its tokens are.

    Raises:
        ImportError: the World vocabulary is asked for without the extra ``rwkv``.

    Example:
        >>> tokenizer(256)(["so"]).input_ids
        [[115, 111]]
    """
    builders = {256: _bytes, 65536: _world}
    return builders[vocab]() if vocab in builders else None


def _bytes() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    # A NUL byte in a text is left out: its number is the end of text.
    vocab = {END if byte == 0 else letter: byte for byte, letter in bytes_to_unicode().items()}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def _world() -> Any:
    package = importlib.util.find_spec("rwkv_simple")  # found and not imported: its kernel would be compiled
    try:
        from rwkv7_hf.tokenization_rwkv7 import RWKV7Tokenizer
    except ModuleNotFoundError:
        package = None
    if package is None or not package.submodule_search_locations:
        raise ImportError('RWKV\'s World vocabulary is in the extra rwkv: pip install "svdpeft[rwkv]"')
    return RWKV7Tokenizer(str(Path(package.submodule_search_locations[0], WORLD)), pad_token=END, eos_token=END)


@dataclass
class Output(ModelOutput):
    """What ``RwkvLM`` returns; transformers' own is a part of its RWKV-4."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: State | None = None


class RwkvLM(PreTrainedModel, GenerationMixin, ABC):
    """A causal language model whose memory is a state of fixed size; abstract, one class per version."""

    base_model_prefix = ""
    _is_stateful = True  # transformers refuses assistants: a state cannot forget the tokens that they propose in vain

    @abstractmethod
    def run(self, ids: Tensor, state: State | None, keep: int, remember: bool) -> tuple[Tensor, State]:
        """Logits of rows of equal length, and the state after them.

        Args:
            ids: tokens without padding, (B, T).
            state: after the tokens before; None at the beginning. It may be overwritten.
            keep: how many of the last positions get logits; 0: all.
            remember: whether the state is wanted.

        Returns:
            Logits (B, keep or T, vocab); the state, or what there is of it.
        """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: State | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **loss: Any,
    ) -> Output:
        """Logits, the loss against ``labels`` if they are given, and the state if ``use_cache``.

        Args:
            input_ids: tokens, (B, T).
            attention_mask: 1 for a token, 0 for padding, (B, at least T). Padding on the left is not shown to the
                model, and its logits are 0. Padding on the right comes after all that counts; it would be remembered.
            state: of an earlier call with ``use_cache``; it may be overwritten.
            labels: as ``input_ids``, -100 where there is no loss; they are shifted here.
            use_cache: whether to return the state.
            logits_to_keep: how many of the last positions get logits; 0: all.
            **loss: what transformers' loss takes (``num_items_in_batch``).

        Raises:
            ValueError: padding on the right with ``use_cache``, or a row that is nothing but padding.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        if use_cache and not mask[:, -1].all():
            raise ValueError("padding on the right would become part of the state: pad on the left, or use_cache=False")
        run = partial(self.run, keep=logits_to_keep, remember=bool(use_cache))
        logits, state = unpadded(run, input_ids, mask, state, logits_to_keep or input_ids.shape[1])
        value = None
        if labels is not None:
            value = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss)
        return Output(loss=value, logits=logits, state=state if use_cache else None)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, state: State | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What ``generate`` gives to ``forward``: the prompt first, then the last token and the state."""
        taken = {name: kwargs[name] for name in ("attention_mask", "use_cache", "logits_to_keep") if name in kwargs}
        return {"input_ids": input_ids if state is None else input_ids[:, -1:], "state": state, **taken}

    @staticmethod
    def pick(state: State, rows: Tensor) -> State:
        """The state of some rows of a batch."""
        return [each[rows] for each in state]

    def _init_weights(self, module: nn.Module) -> None:
        """The implementation has drawn them."""


def unpadded(run: Run, ids: Tensor, mask: Tensor, state: State | None, width: int) -> tuple[Tensor, State]:
    """Run rows of equal length together, each without the padding on its left; the results in the order of the rows.

    Args:
        run: tokens without padding, and the state before them -> logits of the last positions, the state after them.
        ids, mask: tokens and where they are, (B, T).
        state: before the tokens; None at the beginning.
        width: positions for which there are to be logits; those of padding are 0.

    Raises:
        ValueError: a row is nothing but padding.
    """
    starts = (mask.cumsum(1) == 0).sum(1)  # (B,)
    if not starts.any():
        return run(ids, state)
    if int(starts.max()) == ids.shape[1]:
        raise ValueError(f"row {int(starts.argmax())} of the batch is nothing but padding")
    groups = [(starts == start).nonzero().squeeze(1) for start in starts.unique()]
    logits, states = [], []
    for rows in groups:
        carried = None if state is None else [each[rows] for each in state]
        out, after = run(ids[rows, int(starts[rows[0]]) :], carried)
        logits.append(F.pad(out, (0, 0, width - out.shape[1], 0)))
        states.append(after)
    order = torch.cat(groups).argsort()
    return torch.cat(logits)[order], [torch.cat(parts)[order] for parts in zip(*states, strict=True)]


class Rwkv4ForCausalLM(Stepping, RwkvLM):
    """Transformers' ``RwkvForCausalLM``, its layers and names.

    Args:
        inner: the model whose layers these are.
    """

    supports_gradient_checkpointing = True

    def __init__(self, inner: Any) -> None:
        super().__init__(inner.config)
        self.rwkv, self.head = inner.rwkv, inner.head
        self.post_init()

    def run(self, ids: Tensor, state: State | None, keep: int, remember: bool) -> tuple[Tensor, State]:
        if state is None and not remember:  # a state is written in place, which gradients do not survive
            return self.head(self.rwkv(ids, use_cache=False)[0][:, -keep:]), []
        state = self._empty(ids) if state is None else state
        # With one token, transformers 5 broadcasts the last token of each row, (B, width), against (B, 1, width): rows
        # would become positions.
        seen = [_OneToken(last) for last in state[:2]] if ids.shape[1] == 1 else state[:2]
        hidden = self.rwkv(ids, state=[*seen, *state[2:]], use_cache=True)[0]
        return self.head(hidden[:, -keep:]), state

    def _empty(self, ids: Tensor) -> State:
        shape = (len(ids), self.config.hidden_size, self.config.num_hidden_layers)
        dtypes = [self.dtype] * 2 + [torch.promote_types(self.dtype, torch.float32)] * 3
        state = [torch.zeros(shape, dtype=dtype, device=ids.device) for dtype in dtypes]
        state[4] -= 1e30  # the largest exponent so far
        return state


class _OneToken:
    """The last tokens of the rows, which read as (B, 1, width) where ``tokens[:, :, layer]`` is (B, width)."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens  # (B, width, layers)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tokens[index].unsqueeze(1)

    def __setitem__(self, index: Any, value: Tensor) -> None:
        self.tokens[index] = value


class Rwkv6Config(PreTrainedConfig):
    """What transformers wants to know of an RWKV-6."""

    model_type = "rwkv6"

    vocab_size: int = 65536
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    bos_token_id: int = 0
    eos_token_id: int = 0
    pad_token_id: int = 0


class Rwkv6ForCausalLM(Stepping, RwkvLM):
    """rwkv-simple's ``RWKV``, its layers and names.

    Args:
        inner: the model whose layers these are.
    """

    def __init__(self, inner: Any) -> None:
        config = Rwkv6Config(vocab_size=inner.vocab_size, hidden_size=inner.d_model, num_hidden_layers=inner.n_layer)
        super().__init__(config)
        self.emb, self.blocks, self.ln_out, self.head = inner.emb, inner.blocks, inner.ln_out, inner.head
        self.post_init()

    def run(self, ids: Tensor, state: State | None, keep: int, remember: bool) -> tuple[Tensor, State]:
        x, after = self.emb(ids), []
        for i, block in enumerate(self.blocks):
            before = None
            if state is not None:  # of each layer: last token and matrix of the time-mix, last token of the channel-mix
                token, matrix, fed = state[3 * i : 3 * i + 3]
                before = (token, matrix), fed
            x, ((token, matrix), fed) = block(x, state=before)
            after += [token, matrix, fed]
        return self.head(self.ln_out(x[:, -keep:])), after
