"""Three small RWKV models that were really trained (RWKV-4, 6 and 7; bytes), and how to run them.

The files are no part of the repository: they lie in ``../shared/data/rwkv`` from its root, or in ``rwkv`` below the
folder that the environment variable SVDPEFT_SHARED names. Tests that need them are skipped without them.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import operator
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from svdpeft.models import rwkv

ROOT = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("SVDPEFT_SHARED", ROOT.parent / "shared" / "data")) / "rwkv"
FILES = {4: "tiny-rwkv-4v0-660K", 6: "tiny-rwkv-6v0-3m", 7: "tiny-rwkv-7v0-834K"}
PACKAGES = {4: "transformers", 6: "rwkv_simple", 7: "rwkv7_hf"}

every_version = pytest.mark.parametrize("version", FILES, ids=lambda version: f"rwkv{version}")


def file(version: int) -> Path:
    """Path of one model; a skip with the reason where it, or the package that runs it, is absent."""
    path = FOLDER / f"{FILES[version]}.safetensors"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in {FOLDER}; SVDPEFT_SHARED can name the folder above")
    if importlib.util.find_spec(PACKAGES[version]) is None:
        pytest.skip(f"RWKV-{version} is run by {PACKAGES[version]}, which is not installed")
    return path


@lru_cache
def state(version: int, layers: int | None = None) -> dict[str, Tensor]:
    """Tensors of one file, or of its first layers. Not to be changed: tests share them."""
    if layers is None:
        return rwkv.read(file(version))
    return {k: v for k, v in state(version).items() if not k.startswith("blocks.") or int(k.split(".")[1]) < layers}


def model(version: int, dtype: torch.dtype = torch.float64, layers: int | None = None) -> nn.Module:
    """A fresh model of one file, or of its first layers."""
    return rwkv.build(state(version, layers)).to(dtype)


def expected(version: int) -> Tensor:
    """Logits that the prompt must give at its last position, (vocab,)."""
    return load_file(file(version).with_suffix(".expected_logits.safetensors"))["logits"]


def tokens(length: int, batch: int = 1) -> Tensor:
    """Bytes of this repository's README, (batch, length)."""
    text = (ROOT / "README.md").read_bytes()
    return torch.tensor([list(text[i * 1000 : i * 1000 + length]) for i in range(batch)])


class Exact(TorchFunctionMode):
    """Within it a float64 model computes in float64 throughout, so that equality means more than float32's rounding.

    The implementations round parts to float32 by ``.float()``, whatever the model's dtype: the decay in RWKV-6 and 7,
    the key in RWKV-4. And rwkv-simple keeps the decay above 0.005 when it computes several tokens at once but not when
    it computes one, so that without this its two forms are two functions (7e-4 apart for the model here).
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        if func is Tensor.clamp and args[1:] == (0.005,):
            return args[0]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, chunks: int | Sequence[int] = 0) -> Tensor:
    """Logits at every position, (batch, length, vocab), in float64 throughout where the model is.

    Args:
        model: of ``rwkv.build``, or one here.
        ids: token numbers, (batch, length).
        chunks: lengths of the pieces in which the sequence is given, the model's own state carried over; 1 is one
            token at a time, 0 all at once.
    """
    pieces = ids.split(list(chunks) if isinstance(chunks, Sequence) else chunks or ids.shape[1], dim=1)
    with Exact() if next(model.parameters()).dtype == torch.float64 else nullcontext():
        carried, out = _start(model, len(ids)), []
        for piece in pieces:
            part, carried = _run(model, piece, carried)
            out.append(part)
    return torch.cat(out, dim=1)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of every next token, for training: with a gradient and without a state."""
    out = model(ids)[0] if isinstance(model, (Plain7, Fla7)) else model(ids, use_cache=False).logits
    return F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _run(model: nn.Module, ids: Tensor, carried: Any) -> tuple[Tensor, Any]:
    if isinstance(model, (Plain7, Fla7)):
        return model(ids, carried)
    if type(model).__name__ == "RWKV7ForCausalLM":
        out = model(ids, past_key_values=carried, use_cache=True)
        return out.logits, out.past_key_values
    out = model(ids, state=carried, use_cache=True)
    return out.logits, out.state


def _start(model: nn.Module, batch: int) -> Any:
    """An empty state, with the recurrence in float64 for a float64 model; rwkv7-hf's own has it in float32."""
    dtype = next(model.parameters()).dtype
    wide = torch.promote_types(dtype, torch.float32)
    if type(model).__name__ == "RWKV7ForCausalLM":
        from rwkv7_hf import RWKV7Cache

        c = model.config
        matrices = [torch.zeros(batch, c.num_heads, c.head_dim, c.head_dim, dtype=wide) for _ in model.model.layers]
        return RWKV7Cache(matrices, *([torch.zeros(batch, c.hidden_size, dtype=dtype) for _ in matrices] for _ in "ab"))
    return None


# -- RWKV-7 by its equations, under two sets of names ----------------------------------------------------------------


class Plain7(nn.Module):
    """RWKV-7 with the official names: its low-rank matrices are raw parameters, used as ``x @ w``."""

    def __init__(self, shape: rwkv.Shape, low: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Block7(shape, low, first=i == 0) for i in range(shape.layers))
        self.ln_out = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)

    def forward(self, ids: Tensor, carried: None = None) -> tuple[Tensor, None]:
        x, first = self.emb(ids), None
        for block in self.blocks:
            x, first = block(x, first)
        return self.head(self.ln_out(x)), None


class Block7(nn.Module):
    """Layer norms, time-mix and channel-mix."""

    def __init__(self, shape: rwkv.Shape, low: int, first: bool) -> None:
        super().__init__()
        if first:
            self.ln0 = nn.LayerNorm(shape.width)
        self.ln1, self.ln2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.att, self.ffn = TimeMix7(shape, low, first), ChannelMix7(shape)

    def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.ln0(x) if "ln0" in self._modules else x
        mixed, first = self.att(self.ln1(x), first)
        x = x + mixed
        return x + self.ffn(self.ln2(x)), first


class TimeMix7(nn.Module):
    """The recurrence S ← S (diag(w) − κ̂ᵀ (a ⊙ κ̂)) + vᵀ k, y = r Sᵀ, for each head."""

    def __init__(self, shape: rwkv.Shape, low: int, first: bool) -> None:
        super().__init__()
        c, self.heads, self.size = shape.width, shape.heads, shape.head_size
        pairs = "wag" if first else "wagv"
        for name in [*(f"x_{part}" for part in "rwkvag"), *(f"{part}0" for part in pairs if part != "g"), "k_k", "k_a"]:
            setattr(self, name, nn.Parameter(torch.zeros(1, 1, c)))
        for part in pairs:
            setattr(self, f"{part}1", nn.Parameter(torch.zeros(c, low)))
            setattr(self, f"{part}2", nn.Parameter(torch.zeros(low, c)))
        self.r_k = nn.Parameter(torch.zeros(self.heads, self.size))
        for name in ("receptance", "key", "value", "output"):
            setattr(self, name, nn.Linear(c, c, bias=False))
        self.ln_x = nn.GroupNorm(self.heads, c, eps=self.size * 1e-5)

    def low_rank(self, part: str, x: Tensor, between: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        return between(x @ getattr(self, f"{part}1")) @ getattr(self, f"{part}2")

    def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        step = F.pad(x, (0, 0, 1, -1)) - x  # to the token before
        xr, xw, xk, xv, xa, xg = (x + step * getattr(self, f"x_{part}") for part in "rwkvag")
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(self.w0 + self.low_rank("w", xw, torch.tanh)))
        a = torch.sigmoid(self.a0 + self.low_rank("a", xa))
        g = self.low_rank("g", xg, torch.sigmoid)
        if first is not None:
            v = v + (first - v) * torch.sigmoid(self.v0 + self.low_rank("v", xv))
        split = functools.partial(torch.unflatten, dim=-1, sizes=(self.heads, self.size))
        kk = F.normalize(split(k * self.k_k), dim=-1)
        k = k * (1 + (a - 1) * self.k_a)
        y = self.recurrence(*map(split, (r, w, k, v)), kk, kk * split(a))  # (b, t, h, d)
        y = self.ln_x(y.flatten(0, 1).flatten(1)).view(x.shape)
        bonus = (split(r * k) * self.r_k).sum(-1, keepdim=True) * split(v)
        return self.output((y + bonus.flatten(2)) * g), v if first is None else first

    @staticmethod
    def recurrence(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, b: Tensor) -> Tensor:
        s, out = 0 * v[:, 0, :, :, None] * k[:, 0, :, None], []  # (b, h, value, key)
        for t in range(r.shape[1]):
            removed = (s @ kk[:, t, :, :, None]) * b[:, t, :, None]
            s = s * w[:, t, :, None] - removed + v[:, t, :, :, None] * k[:, t, :, None]
            out.append((s @ r[:, t, :, :, None]).squeeze(-1))
        return torch.stack(out, dim=1)


class ChannelMix7(nn.Module):
    """A squared-ReLU network over the token mixed with the one before."""

    def __init__(self, shape: rwkv.Shape) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.key = nn.Linear(shape.width, shape.ffn, bias=False)
        self.value = nn.Linear(shape.ffn, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        step = F.pad(x, (0, 0, 1, -1)) - x
        return self.value(torch.relu(self.key(x + step * self.x_k)).square())


class Fla7(nn.Module):
    """The same with flash-linear-attention's names: its low-rank matrices are linear layers, and all are called."""

    def __init__(self, shape: rwkv.Shape, low: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embeddings = nn.Embedding(shape.vocab, shape.width)
        self.model.layers = nn.ModuleList(FlaBlock7(shape, low, first=i == 0) for i in range(shape.layers))
        self.model.norm = nn.LayerNorm(shape.width)
        self.lm_head = nn.Linear(shape.width, shape.vocab, bias=False)

    def forward(self, ids: Tensor, carried: None = None) -> tuple[Tensor, None]:
        x, first = self.model.embeddings(ids), None
        for block in self.model.layers:
            x, first = block(x, first)
        return self.lm_head(self.model.norm(x)), None


class FlaBlock7(nn.Module):
    """``Block7`` under other names."""

    def __init__(self, shape: rwkv.Shape, low: int, first: bool) -> None:
        super().__init__()
        if first:
            self.pre_norm = nn.LayerNorm(shape.width)
        self.attn_norm, self.ffn_norm = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.attn, self.ffn = FlaTimeMix7(shape, low, first), ChannelMix7(shape)

    def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.pre_norm(x) if "pre_norm" in self._modules else x
        mixed, first = self.attn(self.attn_norm(x), first)
        x = x + mixed
        return x + self.ffn(self.ffn_norm(x)), first


class FlaTimeMix7(TimeMix7):
    """``TimeMix7`` under other names; the vectors w0, a0 and v0 are the biases of the low-rank pairs."""

    w0 = a0 = v0 = 0.0
    receptance, key, value, output, ln_x = (
        property(operator.attrgetter(name)) for name in ("r_proj", "k_proj", "v_proj", "o_proj", "g_norm")
    )

    def __init__(self, shape: rwkv.Shape, low: int, first: bool) -> None:
        nn.Module.__init__(self)
        c, self.heads, self.size = shape.width, shape.heads, shape.head_size
        for part in "rwkvag":
            setattr(self, f"x_{part}", nn.Parameter(torch.zeros(1, 1, c)))
        self.k_k, self.k_a = nn.Parameter(torch.zeros(c)), nn.Parameter(torch.zeros(c))
        self.r_k = nn.Parameter(torch.zeros(self.heads, self.size))
        for part in "rkvo":
            setattr(self, f"{part}_proj", nn.Linear(c, c, bias=False))
        for part, between in {"w": nn.Tanh, "a": nn.Identity, "g": nn.Sigmoid, "v": nn.Identity}.items():
            if part != "v" or not first:
                setattr(self, f"{part}_lora", LowRank7(c, low, between(), bias=part != "g"))
        self.g_norm = nn.GroupNorm(self.heads, c, eps=self.size * 1e-5)

    def low_rank(self, part: str, x: Tensor, between: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        return getattr(self, f"{part}_lora")(x)


class LowRank7(nn.Module):
    """Two linear layers with a function between them."""

    def __init__(self, width: int, low: int, between: nn.Module, bias: bool) -> None:
        super().__init__()
        self.lora = nn.Sequential(nn.Linear(width, low, bias=False), between, nn.Linear(low, width, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)
