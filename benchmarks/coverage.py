"""Which weights of which networks are adapted, checked on tiny or small models with random weights, in float64.

    python benchmarks/coverage.py timm [--only beit resnet] [--out docs/coverage-timm.md]
    python benchmarks/coverage.py transformers

Every family of timm (a module of `timm.models`) is taken by its cheapest model and a few that differ most from it; the
architectures of transformers are built from tiny configurations. Nothing is downloaded. What `check` demands is the
same for all of them, with one bound. Exit status 1 if a model fails; its row says why.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import svdpeft

ROOT = Path(__file__).parent.parent
RANK = 2
BOUND = 1e-8  # of the largest output: how far a merged model may be from the adapted one. One bound for all models.
DIFFERS = 1e-5  # of the largest output: what the perturbed factors change at least
SIZES = (64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512)  # tried for a timm model


@dataclass(frozen=True)
class Case:
    """One model and how it is run."""

    family: str
    label: str
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module], Any]]]


@dataclass
class Row:
    """What was found for one model."""

    family: str
    label: str
    adapted: int = 0  # weights
    inside: int = 0  # values in them
    total: int = 0  # values in all weights
    kinds: Counter[str] = field(default_factory=Counter)
    paths: Counter[str] = field(default_factory=Counter)
    left: dict[str, Counter[str]] = field(default_factory=dict)  # why -> names
    error: str = ""


# -- the models -------------------------------------------------------------------------------------------------------


def timm_cases() -> Iterator[Case]:
    """The models of ``TIMM``, and the cheapest one of every family that is not listed there."""
    import timm

    for family in timm.list_modules():
        for model in (TIMM.get(family) or pick(family)).split():
            fewer = "".join(f", {key}={value}" for key, value in FEWER.get(model.split("@")[0], {}).items())
            yield Case(family, model + fewer, lambda model=model: timm_model(model))


def timm_model(pick: str) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """Build ``name@size``."""
    name, size = pick.split("@")
    image = torch.randn(2, 3, int(size), int(size), dtype=torch.float64)
    return create(name, int(size)), lambda model: model(image)


def create(name: str, size: int) -> nn.Module:
    """Build a timm model for an input size, where its size is a part of the model."""
    import timm

    try:
        return timm.create_model(name, img_size=size, **FEWER.get(name, {}))
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, **FEWER.get(name, {}))


def pick(family: str) -> str:
    """Find the model of a timm family with the fewest parameters and the smallest input that it takes."""
    import timm

    def cost(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name).parameters())

    name = min(timm.list_models(module=family), key=cost)
    for size in SIZES:
        try:
            with torch.no_grad():
                create(name, size).eval()(torch.zeros(2, 3, size, size))
        except Exception:  # models refuse a size in every possible way
            continue
        return f"{name}@{size}"
    return f"{name}@{SIZES[-1]}"  # the check will say what is wrong with it


def transformers_cases() -> Iterator[Case]:
    """The models of ``TRANSFORMERS``."""
    for kind, table in TRANSFORMERS.items():
        for name, entry in table.items():
            yield Case(name, kind, lambda entry=entry: transformers_model(*entry))


def transformers_model(
    name: str, overrides: dict[str, Any], shape: tuple[int, ...]
) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """Build a model class of transformers from a tiny configuration."""
    import transformers

    cls = getattr(transformers, name)
    options = overrides if "text_config" in overrides else {**TINY, **overrides}
    config = cls.config_class(**{key: value for key, value in options.items() if value is not ...})
    config._experts_implementation = "eager"  # the default, a grouped product of matrices, has no float64
    model = cls(config)
    text = torch.randint(3, TINY["vocab_size"], (2, 16))
    side = options.get("image_size", 32)
    side = side if isinstance(side, int) else side[0]
    known = {
        "input_ids": text,
        "inputs": text,
        "pixel_values": torch.randn(*shape or (2, 3, side, side), dtype=torch.float64),
        "input_values": torch.randn(*shape or (2, 400), dtype=torch.float64),
        "input_features": torch.randn(*shape or (2, 16, 16), dtype=torch.float64),
    }
    batch = {model.main_input_name: known[model.main_input_name]}
    if "text_config" in options:
        batch["pixel_values"] = known["pixel_values"]
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = text[:, :6]
    return model, lambda model: model(**batch)


# -- the checks -------------------------------------------------------------------------------------------------------


class InDouble(TorchFunctionMode):
    """Within this mode what models cast to float32 by name is float64, so that one bound holds for all of them."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)


@contextmanager
def in_double() -> Iterator[None]:
    """Everything in float64, every random draw of the model the same."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        with InDouble():
            yield
    finally:
        torch.set_default_dtype(before)


def tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in an output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)


def check(case: Case) -> Row:
    """Adapt every weight of one model and check what svdpeft promises.

    Raises:
        AssertionError: which promise was broken.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the models' own making
        model, forward = case.make()
        model = model.double().eval().requires_grad_(False)

        def run() -> Tensor:
            with in_double():
                return torch.cat([t.flatten() for t in tensors(forward(model))])

        with torch.no_grad():
            settle(model, run)
            base = run()
        assert base.isfinite().all(), "the base model's output is not finite"
        before = {name: t.clone() for name, t in state(model)}
        keys = list(model.state_dict())
        matrices = {name: p for name, p in model.named_parameters() if p.ndim > 1}

    adapter = svdpeft.attach(model, svdpeft.LoRA(rank=RANK), targets="all", clip_rank=True)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        assert same(run(), base), "the adapted model does not start at the base model"
    warned = any("adapter.unreached" in str(w.message) for w in caught)
    assert warned == bool(adapter.unreached), "sites that the batch does not reach, and no warning, or the reverse"
    row = describe(case, model, adapter, matrices)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        note_idle(row, adapter, run)
        perturb(adapter)
        with torch.no_grad():
            adapted = run()
        size = adapted.abs().max()
        assert size.isfinite(), "the adapted model's output is not finite"
        assert (adapted - base).abs().max() > DIFFERS * size, "the adapters change nothing"
        with torch.no_grad():
            adapter.merge()
            error = (run() - adapted).abs().max() / size
            assert error <= BOUND, f"merged, the output is off by {error:.1e} of its size"
            adapter.unmerge()
            assert same(run(), adapted), "unmerge() does not give the adapted model back"
            adapter.detach()
            assert list(model.state_dict()) == keys, "detach() leaves other names in the state_dict"
            after = dict(state(model))
            assert list(after) == list(before), "detach() leaves other parameters or buffers"
            changed = [name for name in before if not same(before[name], after[name])]
            assert not changed, f"detach() does not give {changed} back"
            assert same(run(), base), "detach() does not give the base model back"
    return row


def settle(model: nn.Module, run: Callable[[], Tensor]) -> None:
    """Move a random model off its special values, which hide what a weight does.

    Gates and scales that start at 0 or 1e-6 would switch whole branches off, and normalisation layers without
    statistics of the data let activations fade away.
    """
    for p in model.parameters():
        if p.numel() and bool((p == p.flatten()[0]).all()):
            p.add_(0.1 * torch.randn_like(p))

    def normalise(module: Any, args: tuple[Tensor]) -> None:
        axes = [0, *range(2, args[0].ndim)]
        module.running_mean.copy_(args[0].mean(axes) / 2)  # never a variance of zero, from a single position
        module.running_var.copy_(args[0].square().mean(axes))

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    handles = [norm.register_forward_pre_hook(normalise) for norm in norms]
    run()
    for handle in handles:
        handle.remove()


@torch.no_grad()
def perturb(adapter: svdpeft.Adapter, seed: int = 0, relative: float = 0.05) -> None:
    """Move every factor off its start, so that each update has about this size relative to its weight."""
    generator = torch.Generator().manual_seed(seed)
    for site in adapter.sites.values():
        n = site.shape[-1]
        for role, p in site.factors.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if role == "L":  # a row of A has the norm 1/√3
                p.copy_(relative * site.weight.original.square().mean().sqrt() * (3 * n / RANK) ** 0.5 * noise)
            else:
                p.add_(0.1 * p.square().mean().sqrt() * noise)


def describe(case: Case, model: nn.Module, adapter: svdpeft.Adapter, matrices: dict[str, nn.Parameter]) -> Row:
    """Count what is adapted, and check that every weight is either adapted or named with a reason."""
    row = Row(case.family, case.label, len(adapter.sites))
    adapted: set[int] = set()
    for site in adapter.sites.values():
        adapted.add(id(site.weight.owner._parameters[site.weight.parameter]))
        batch, m, n = site.shape
        row.inside += batch * m * n
        row.kinds[site.kind.name] += 1
        row.paths[site.path] += 1
    left: set[int] = set()
    for name, why in adapter.skipped.items():
        owner, _, attribute = name.rpartition(".")
        whole = getattr(model.get_submodule(owner), attribute) if name else model
        held = [whole] if isinstance(whole, Tensor) else list(whole.parameters(recurse=False))
        if nn.utils.parametrize.is_parametrized(whole):
            held += whole.parametrizations.parameters()
        left |= set(map(id, held))
        row.left.setdefault(blocks(why.partition(";")[0]), Counter())[blocks(name)] += 1
    if adapter.unreached:
        row.left["not reached by this input"] = Counter(map(blocks, adapter.unreached))
    for name, p in matrices.items():
        known, vector = id(p) in adapted | left, sum(size > 1 for size in p.shape) < 2
        assert known or vector, f"{name} is neither adapted nor named"
        row.total += p.numel() if known else 0
    return row


def note_idle(row: Row, adapter: svdpeft.Adapter, run: Callable[[], Tensor]) -> None:
    """Note the sites that change nothing, though the model reached them; only those with a known reason may.

    A few units happen to be off at any one place, and everything behind them, so that several are tried.
    """
    idle = [name for name in adapter.sites if name not in adapter.unreached]
    for draw in range(1, 6):
        perturb(adapter, draw, 0.02 * 2**draw)
        output = run()
        (output * torch.randn_like(output)).sum().backward()
        idle = [name for name in idle if not any(map(moves, adapter.sites[name].factors.parameters()))]
        if not idle:
            break
    for name in idle:
        pattern, why = IDLE.get(row.family, ("", ""))
        assert re.fullmatch(pattern, name), f"{name} is adapted, is not reported as unreached, and changes nothing"
        row.left.setdefault(f"adapted without effect: {why}", Counter())[blocks(name)] += 1


def moves(p: Tensor) -> bool:
    """Whether the output depends on a trained tensor."""
    return p.grad is not None and bool((p.grad.isfinite() & (p.grad != 0)).any())


def state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, the buffers that are not saved too."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


# -- the page ---------------------------------------------------------------------------------------------------------


def blocks(name: str) -> str:
    """``blocks.3.attn.q`` -> ``blocks.*.attn.q``: repeated blocks share an entry."""
    return re.sub(r"(?<![a-z])\d+|(?<=layer|stage|block)\d+", "*", name)


def counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common())


def listed(names: Counter[str], limit: int = 6) -> str:
    parts = [f"`{name}`" + (f" ×{count}" if count > 1 else "") for name, count in names.items()]
    rest = sum(list(names.values())[limit:])
    return ", ".join(parts[:limit]) + (f" and {rest} more" if rest else "")


def page(library: str, rows: list[Row]) -> str:
    """The generated page as markdown."""
    import timm
    import transformers

    version = {"timm": timm, "transformers": transformers}[library].__version__
    good = [row for row in rows if not row.error]
    kinds, paths = (sum((getattr(row, which) for row in good), Counter()) for which in ("kinds", "paths"))
    inside, total = sum(row.inside for row in good), sum(row.total for row in good)
    lines = [
        f"# Coverage: {library}",
        "",
        f"Made by `python benchmarks/coverage.py {library}` with {library} {version} and torch "
        f"{torch.__version__.split('+')[0]}, on random weights, in float64; do not edit it.",
        "",
        f'Every model got `attach(model, LoRA(rank={RANK}), targets="all", clip_rank=True)`. Checked on each:',
        "",
        "- attached, its output is the base model's, bit for bit;",
        "- every parameter with two axes or more is either adapted or named with the reason why it is not, but for "
        "vectors with axes to broadcast along, such as class tokens;",
        "- with all factors moved off their start, the output is another, and every adapted weight has a part in it: "
        "the gradient of its factors is not zero;",
        f"- merged, the output is the adapted one within {BOUND:.0e} of its size; unmerged, bit for bit;",
        "- detached, every parameter, buffer, `state_dict` key and the output are the base model's, bit for bit.",
        "",
        f"**{len({row.family for row in rows})} families, {len(rows)} models, {len(rows) - len(good)} failed.** "
        f"{sum(row.adapted for row in good):,} weights are adapted, with {inside / max(total, 1):.1%} of the values "
        f"in all weights. By kind: {counted(kinds)}. By path: {counted(paths)}.",
        "",
        "In the table, `share` is that share of one model, and `*` stands for the numbers of repeated blocks.",
        "",
        f"| family | {'model @ input' if library == 'timm' else 'sort'} | weights | share | by kind | by path | left |",
        "| --- | --- | ---: | ---: | --- | --- | --- |",
    ]
    for row in rows:
        left = "; ".join(f"{why}: {listed(names)}" for why, names in row.left.items())
        cells = [str(row.adapted), f"{row.inside / row.total:.1%}" if row.total else "", counted(row.kinds)]
        if row.error:
            left = f"**failed**: {row.error}"
        lines.append(" | ".join([f"| {row.family}", row.label, *cells, counted(row.paths), f"{left} |"]))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Check the models, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=["timm", "transformers"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families or models; the table is printed")
    parser.add_argument("--out", type=Path, help="default: docs/coverage-LIBRARY.md, unless --only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = list(timm_cases() if options.library == "timm" else transformers_cases())
    if options.only:
        cases = [case for case in cases if {case.family, case.label.split("@")[0]} & set(options.only)]
    rows = []
    bar = tqdm(cases, unit="model")
    for case in bar:
        bar.set_postfix_str(f"{case.family} {case.label}")
        try:
            rows.append(check(case))
        except Exception as error:  # whatever it is, the other models are still checked
            rows.append(Row(case.family, case.label, error=f"{type(error).__name__}: {error}".replace("\n", " ")[:300]))
            bar.write(f"{case.family} {case.label}: {rows[-1].error}")
        gc.collect()
    text, out = page(options.library, rows), options.out
    if out is None and not options.only:
        out = ROOT / "docs" / f"coverage-{options.library}.md"
    if out is None:
        print(text)
    else:
        part = out.with_suffix(".part")
        part.write_text(text)
        os.replace(part, out)
    sys.exit(any(row.error for row in rows))


# -- the tables --------------------------------------------------------------------------------------------------------

# timm: family -> models, each at the smallest input that it takes. The first is the cheapest of the family; the others
# have layers of another sort. A family that is not here is picked by `pick`.
TIMM = {
    "beit": "beit_base_patch16_224@64 beitv2_base_patch16_224@64",
    "byoanet": "eca_botnext26ts_256@64 halonet_h1@256 lambda_resnet26rpt_256@64",
    "byobnet": "test_byobnet@64 mobileone_s0@64 repvgg_a0@64 gernet_s@64 resnet50_clip@64",
    "cait": "cait_xxs24_224@64",
    "coat": "coat_tiny@64 coat_lite_tiny@64",
    "convit": "convit_tiny@64",
    "convmixer": "convmixer_768_32@64",
    "convnext": "test_convnext@64 test_convnext2@64 test_convnext3@64",
    "cpubone": "cpubone_nano@64",
    "crossvit": "crossvit_tiny_240@240",
    "csatv2": "csatv2@64",
    "cspnet": "cs3darknet_focus_s@64 cspresnet50@64 darknet17@64",
    "cspnext": "cspnext_tiny@64",
    "davit": "davit_tiny@64",
    "deepseek_vit": "deepseek_vit_412m@112",
    "deit": "deit_tiny_patch16_224@64 deit_tiny_distilled_patch16_224@64 deit3_small_patch16_224@64",
    "densenet": "densenet121@64",
    "dla": "dla46x_c@64",
    "dpn": "dpn48b@64",
    "edgenext": "edgenext_xx_small@64",
    "efficientformer": "efficientformer_l1@224",
    "efficientformer_v2": "efficientformerv2_s0@64",
    "efficientnet": "test_efficientnet@64 tf_efficientnet_cc_b0_4e@64 mixnet_s@64 mobilenetv4_hybrid_medium_075@64",
    "efficientvim": "efficientvim_m1@64",
    "efficientvit_mit": "efficientvit_b0@64",
    "efficientvit_msra": "efficientvit_m0@96",
    "eva": "vit_tiny_patch16_dinov3_qkvb@64 eva02_tiny_patch14_224@64 vit_pe_core_tiny_patch16_384@64",
    "fasternet": "fasternet_t0@64",
    "fastvit": "fastvit_t8@64 fastvit_sa12@64",
    "focalnet": "focalnet_tiny_srf@64",
    "gcvit": "gcvit_xxtiny@64",
    "gemma4_vit": "gemma4_vit_167m@64",
    "ghostnet": "ghostnet_050@64 ghostnetv2_100@64 ghostnetv3_050@64",
    "hardcorenas": "hardcorenas_b@64",
    "hgnet": "hgnetv2_b0@64",
    "hiera": "hiera_tiny_224@64",
    "hieradet_sam2": "sam2_hiera_tiny@64",
    "hrnet": "hrnet_w18_small@64",
    "iformer": "iformer_t@64",
    "inception_next": "inception_next_atto@64",
    "inception_resnet_v2": "inception_resnet_v2@96",
    "inception_v3": "inception_v3@96",
    "inception_v4": "inception_v4@96",
    "lcnetv2": "lcnetv2_small@64",
    "levit": "levit_128s@64 levit_conv_128s@64",
    "lowformer": "lowformer_b0@64",
    "mambaout": "test_mambaout@64",
    "maxxvit": "test_coatnet@64 test_maxvit@64 maxxvit_rmlp_nano_rw_256@64",
    "metaformer": "poolformerv2_s12@64 convformer_s18@64 caformer_s18@64",
    "mlp_mixer": "gmlp_ti16_224@64 gmixer_12_224@64 mixer_s32_224@64 resmlp_12_224@64",
    "mobilenetv3": "mobilenetv3_small_050@64 lcnet_035@64 fbnetv3_b@64",
    "mobilenetv5": "mobilenetv5_base@64",
    "mobilevit": "mobilevit_xxs@64 mobilevitv2_050@64",
    "mvitv2": "mvitv2_tiny@64",
    "naflexvit": "naflexvit_base_patch16_gap@64 naflexvit_base_patch16_map@64",
    "nasnet": "nasnetalarge@64",
    "nest": "nest_tiny@64",
    "nextvit": "nextvit_small@64",
    "nfnet": "test_nfnet@64 nf_resnet26@64 eca_nfnet_l0@64",
    "pit": "pit_ti_224@64 pit_ti_distilled_224@64",
    "pnasnet": "pnasnet5large@64",
    "pvt_v2": "pvt_v2_b0@64",
    "qwen3_vit": "qwen3_vit_88m@64",
    "rdnet": "rdnet_tiny@64",
    "regnet": "regnetx_002@64 regnety_002@64",
    "repghost": "repghostnet_050@64",
    "repvit": "repvit_m1@64",
    "res2net": "res2next50@64",
    "resnest": "resnest14d@64",
    "resnet": "test_resnet@64 resnet10t@64 ecaresnet26t@64 seresnext26t_32x4d@64",
    "resnetv2": "resnetv2_18@64 resnetv2_50x1_bit@64",
    "rexnet": "rexnet_100@64",
    "selecsls": "selecsls42@64",
    "senet": "legacy_seresnet18@64 legacy_seresnext26_32x4d@64",
    "sequencer": "sequencer2d_s@64",
    "shvit": "shvit_s1@64",
    "sknet": "skresnet18@64",
    "starnet": "starnet_s050@64",
    "swiftformer": "swiftformer_xs@64",
    "swin_transformer": "swin_tiny_patch4_window7_224@64",
    "swin_transformer_v2": "swinv2_tiny_window8_256@64",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224@64",
    "tiny_vit": "tiny_vit_5m_224@64",
    "tnt": "tnt_s_legacy_patch16_224@64 tnt_s_patch16_224@64",
    "tresnet": "tresnet_m@64",
    "twins": "twins_svt_small@64 twins_pcpvt_small@64",
    "vgg": "vgg11@64",
    "visformer": "visformer_tiny@64",
    "vision_transformer": "test_vit@64 test_vit2@64 vit_small_patch16_18x2_224@64 vit_base_patch16_siglip_224@64",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224@64",
    "vision_transformer_relpos": "test_vit_relpos@64 vit_srelpos_small_patch16_224@64",
    "vision_transformer_sam": "samvit_base_patch16_224@64",
    "vitamin": "vitamin_small_224@64",
    "volo": "volo_d1_224@64",
    "vovnet": "ese_vovnet19b_slim_dw@64 vovnet39a@64",
    "xception": "legacy_xception@64",
    "xception_aligned": "xception41p@64",
    "xcit": "xcit_nano_12_p8_224@64",
}
# Blocks that only repeat are left out where even the cheapest model is large.
FEWER = {
    "beit_base_patch16_224": {"depth": 3},
    "beitv2_base_patch16_224": {"depth": 3},
    "deepseek_vit_412m": {"depth": 2},
    "gemma4_vit_167m": {"depth": 2},
    "naflexvit_base_patch16_gap": {"depth": 2},
    "naflexvit_base_patch16_map": {"depth": 2},
    "qwen3_vit_88m": {"depth": 2},
    "samvit_base_patch16_224": {"depth": 3},
    "vit_base_patch16_siglip_224": {"depth": 2},
    "vit_small_patch16_18x2_224": {"depth": 2},
}

# transformers: every configuration starts from these values; `...` in an override leaves one to the configuration.
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
# What several of them share.

SSM = {"mamba_d_state": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
MLA = {
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
SPEECH = {
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
IMAGE = {"image_size": 32, "patch_size": 8}
VIDEO = {"image_size": 16, "patch_size": 8, "num_frames": 4}
STAGES = {
    "image_size": 64,
    "num_hidden_layers": ...,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 2, 1],
    "num_attention_heads": [1, 2, 2, 4],
}


def tiny(name: str, *shared: dict[str, Any], shape: tuple[int, ...] = (), **own: Any) -> tuple[Any, ...]:
    """A model class, its configuration, and the shape of its input where it is not the usual one."""
    options: dict[str, Any] = {}
    for part in (*shared, own):
        options |= part
    return name, options, shape


TRANSFORMERS = {
    "decoder": {
        "biogpt": tiny("BioGptForCausalLM"),
        "bitnet": tiny("BitNetForCausalLM"),
        "bloom": tiny("BloomForCausalLM"),
        "codegen": tiny("CodeGenForCausalLM", n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
        "cohere": tiny("CohereForCausalLM"),
        "cohere2": tiny("Cohere2ForCausalLM"),
        "ctrl": tiny("CTRLLMHeadModel", n_embd=32, dff=48, n_layer=2, n_head=4),
        "diffllama": tiny("DiffLlamaForCausalLM"),
        "exaone4": tiny("Exaone4ForCausalLM"),
        "falcon": tiny("FalconForCausalLM"),
        "gemma": tiny("GemmaForCausalLM", head_dim=8),
        "gemma2": tiny("Gemma2ForCausalLM", head_dim=8),
        "gemma3": tiny("Gemma3ForCausalLM", head_dim=8),
        "gemma3n": tiny(
            "Gemma3nForCausalLM",
            head_dim=8,
            vocab_size_per_layer_input=64,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            laurel_rank=4,
            intermediate_size=[48, 48],
            layer_types=["sliding_attention", "full_attention"],
            activation_sparsity_pattern=[0.5, 0.0],
        ),
        "glm4": tiny("Glm4ForCausalLM", head_dim=8),
        "gpt-bigcode": tiny("GPTBigCodeForCausalLM"),
        "gpt-neo": tiny("GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]], window_size=4),
        "gpt-neox": tiny("GPTNeoXForCausalLM"),
        "gpt2": tiny("GPT2LMHeadModel"),
        "gptj": tiny("GPTJForCausalLM", n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
        "granite": tiny("GraniteForCausalLM"),
        "llama": tiny("LlamaForCausalLM"),
        "minicpm3": tiny("MiniCPM3ForCausalLM", MLA),
        "mistral": tiny("MistralForCausalLM"),
        "modernbert-decoder": tiny("ModernBertDecoderForCausalLM"),
        "mpt": tiny("MptForCausalLM", d_model=32, n_heads=4, n_layers=2),
        "nanochat": tiny("NanoChatForCausalLM"),
        "nemotron": tiny("NemotronForCausalLM"),
        "olmo": tiny("OlmoForCausalLM"),
        "olmo2": tiny("Olmo2ForCausalLM"),
        "olmo3": tiny("Olmo3ForCausalLM"),
        "opt": tiny("OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=16),
        "persimmon": tiny("PersimmonForCausalLM"),
        "phi": tiny("PhiForCausalLM"),
        "phi3": tiny("Phi3ForCausalLM"),
        "qwen2": tiny("Qwen2ForCausalLM"),
        "qwen3": tiny("Qwen3ForCausalLM", head_dim=8),
        "smollm3": tiny("SmolLM3ForCausalLM"),
        "stablelm": tiny("StableLmForCausalLM"),
        "starcoder2": tiny("Starcoder2ForCausalLM"),
        "xglm": tiny("XGLMForCausalLM", d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
        "xlnet": tiny("XLNetLMHeadModel", d_model=32, n_layer=2, n_head=4, d_inner=48, max_position_embeddings=...),
    },
    "encoder": {
        "albert": tiny("AlbertForSequenceClassification", embedding_size=16),
        "bert": tiny("BertForSequenceClassification"),
        "big-bird": tiny("BigBirdModel", attention_type="original_full"),
        "canine": tiny("CanineModel", num_hash_buckets=64, downsampling_rate=2, local_transformer_stride=8),
        "convbert": tiny("ConvBertForSequenceClassification", embedding_size=16),
        "deberta": tiny("DebertaForSequenceClassification", relative_attention=True, pos_att_type=["p2c", "c2p"]),
        "deberta-v2": tiny(
            "DebertaV2ForSequenceClassification",
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            conv_kernel_size=3,
        ),
        "distilbert": tiny("DistilBertForSequenceClassification", dim=32, n_layers=2, n_heads=4, hidden_dim=48),
        "electra": tiny("ElectraForSequenceClassification", embedding_size=16),
        "esm": tiny("EsmForSequenceClassification", position_embedding_type="rotary", mask_token_id=5),
        "fnet": tiny("FNetForSequenceClassification"),
        "funnel": tiny(
            "FunnelForSequenceClassification",
            d_model=32,
            d_head=8,
            n_head=4,
            d_inner=48,
            block_sizes=[1, 1],
            num_decoder_layers=1,
            num_hidden_layers=...,
        ),
        "ibert": tiny("IBertForSequenceClassification"),
        "longformer": tiny("LongformerModel", attention_window=4),
        "mobilebert": tiny(
            "MobileBertForSequenceClassification", embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16
        ),
        "modernbert": tiny("ModernBertForSequenceClassification", local_attention=8),
        "mpnet": tiny("MPNetForSequenceClassification"),
        "nomic-bert": tiny("NomicBertForSequenceClassification"),
        "nystromformer": tiny("NystromformerForSequenceClassification", num_landmarks=4, segment_means_seq_len=16),
        "perceiver": tiny(
            "PerceiverForSequenceClassification",
            num_latents=8,
            d_latents=32,
            d_model=32,
            num_self_attends_per_block=1,
            num_self_attention_heads=4,
            num_cross_attention_heads=4,
        ),
        "roberta": tiny("RobertaForSequenceClassification"),
        "roformer": tiny("RoFormerForSequenceClassification", embedding_size=16),
        "squeezebert": tiny("SqueezeBertForSequenceClassification", embedding_size=32),
        "xlm-roberta": tiny("XLMRobertaForSequenceClassification"),
    },
    "encoder-decoder": {
        "bart": tiny("BartForConditionalGeneration", SEQ2SEQ),
        "blenderbot": tiny("BlenderbotForConditionalGeneration", SEQ2SEQ),
        "led": tiny(
            "LEDForConditionalGeneration",
            SEQ2SEQ,
            attention_window=4,
            max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64,
        ),
        "longt5": tiny(
            "LongT5ForConditionalGeneration",
            T5,
            encoder_attention_type="transient-global",
            local_radius=3,
            global_block_size=4,
        ),
        "m2m-100": tiny("M2M100ForConditionalGeneration", SEQ2SEQ),
        "marian": tiny("MarianMTModel", SEQ2SEQ, decoder_vocab_size=64),
        "mbart": tiny("MBartForConditionalGeneration", SEQ2SEQ),
        "mt5": tiny("MT5ForConditionalGeneration", T5),
        "pegasus": tiny("PegasusForConditionalGeneration", SEQ2SEQ),
        "prophetnet": tiny(
            "ProphetNetForConditionalGeneration",
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            num_hidden_layers=...,
        ),
        "t5": tiny("T5ForConditionalGeneration", T5),
    },
    "mixture of experts": {
        "dbrx": tiny(
            "DbrxForCausalLM",
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
            ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        ),
        "deepseek-v2": tiny("DeepseekV2ForCausalLM", MOE, MLA),
        "deepseek-v3": tiny("DeepseekV3ForCausalLM", MOE, MLA),
        "ernie4-5-moe": tiny("Ernie4_5_MoeForCausalLM", moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
        "glm4-moe": tiny("Glm4MoeForCausalLM", MOE, head_dim=8),
        "gpt-oss": tiny("GptOssForCausalLM", MOE, head_dim=8, sliding_window=8),
        "granitemoe": tiny("GraniteMoeForCausalLM", MOE),
        "jetmoe": tiny("JetMoeForCausalLM", MOE, kv_channels=8),
        "llama4": tiny("Llama4ForCausalLM", MOE, head_dim=8, intermediate_size_mlp=48),
        "mixtral": tiny("MixtralForCausalLM", MOE),
        "olmoe": tiny("OlmoeForCausalLM", MOE),
        "phimoe": tiny("PhimoeForCausalLM", MOE),
        "qwen2-moe": tiny("Qwen2MoeForCausalLM", MOE, shared_expert_intermediate_size=16),
        "qwen3-moe": tiny("Qwen3MoeForCausalLM", MOE, head_dim=8),
        "switch-transformers": tiny(
            "SwitchTransformersForConditionalGeneration",
            T5,
            num_decoder_layers=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_experts=4,
        ),
    },
    "recurrent, hybrid": {
        "bamba": tiny("BambaForCausalLM", SSM, attn_layer_indices=[1]),
        "falcon-h1": tiny("FalconH1ForCausalLM", SSM, mamba_d_ssm=64),
        "falcon-mamba": tiny("FalconMambaForCausalLM", state_size=4),
        "granitemoehybrid": tiny(
            "GraniteMoeHybridForCausalLM", MOE, SSM, layer_types=["mamba", "attention"], shared_intermediate_size=16
        ),
        "jamba": tiny(
            "JambaForCausalLM",
            MOE,
            mamba_d_state=4,
            mamba_dt_rank=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            use_mamba_kernels=False,
        ),
        "lfm2": tiny("Lfm2ForCausalLM", layer_types=["conv", "full_attention"]),
        "mamba": tiny("MambaForCausalLM", state_size=4, time_step_rank=4),
        "mamba2": tiny("Mamba2ForCausalLM", state_size=4, num_heads=8, head_dim=8, n_groups=2, chunk_size=4),
        "minimax": tiny(
            "MiniMaxForCausalLM", MOE, head_dim=8, layer_types=["linear_attention", "full_attention"], block_size=4
        ),
        "nemotron-h": tiny(
            "NemotronHForCausalLM",
            layers_block_type=["mamba", "attention"],
            head_dim=8,
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=4,
            n_groups=2,
            chunk_size=4,
        ),
        "qwen3-next": tiny(
            "Qwen3NextForCausalLM",
            MOE,
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            shared_expert_intermediate_size=16,
        ),
        "recurrent-gemma": tiny(
            "RecurrentGemmaForCausalLM", num_hidden_layers=3, lru_width=32, attention_window_size=8
        ),
        "rwkv": tiny("RwkvForCausalLM", attention_hidden_size=32, context_length=64),
        "xlstm": tiny("xLSTMForCausalLM", hidden_size=64, num_heads=4, qk_dim_factor=1.0, chunk_size=16),
        "zamba2": tiny(
            "Zamba2ForCausalLM",
            num_hidden_layers=3,
            layers_block_type=["mamba", "hybrid", "mamba"],
            mamba_d_state=4,
            n_mamba_heads=8,
            mamba_headdim=8,
            mamba_ngroups=2,
            chunk_size=4,
            num_mem_blocks=1,
            adapter_rank=4,
        ),
    },
    "vision": {
        "beit": tiny("BeitForImageClassification", IMAGE, use_relative_position_bias=True),
        "bit": tiny(
            "BitForImageClassification", STAGES, embedding_size=16, hidden_sizes=[16, 32, 48, 64], num_groups=4
        ),
        "convnext": tiny("ConvNextForImageClassification", STAGES),
        "convnextv2": tiny("ConvNextV2ForImageClassification", STAGES),
        "cvt": tiny(
            "CvtForImageClassification",
            num_hidden_layers=...,
            num_attention_heads=...,
            image_size=64,
            embed_dim=[8, 16, 32],
            num_heads=[1, 2, 4],
            depth=[1, 2, 3],
        ),
        "data2vec-vision": tiny("Data2VecVisionForImageClassification", IMAGE, use_shared_relative_position_bias=True),
        "deit": tiny("DeiTForImageClassification", IMAGE),
        "dinov2": tiny("Dinov2ForImageClassification", IMAGE),
        "dinov3-vit": tiny("DINOv3ViTModel", IMAGE),
        "dpt": tiny(
            "DPTForDepthEstimation",
            IMAGE,
            num_hidden_layers=4,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 16, 24, 32],
            fusion_hidden_size=16,
            is_hybrid=False,
        ),
        "efficientnet": tiny(
            "EfficientNetForImageClassification",
            image_size=64,
            width_coefficient=0.25,
            depth_coefficient=0.2,
            hidden_dim=320,
            num_hidden_layers=...,
        ),
        "hiera": tiny(
            "HieraForImageClassification",
            embed_dim=8,
            image_size=[64, 64],
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 2, 4],
            masked_unit_size=[8, 8],
        ),
        "levit": tiny(
            "LevitForImageClassification",
            STAGES,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 2, 2],
            depths=[1, 1, 1],
            image_size=128,
            key_dim=[8, 8, 8],
        ),
        "mobilenet-v2": tiny("MobileNetV2ForImageClassification", depth_multiplier=0.25, image_size=64),
        "mobilevit": tiny(
            "MobileViTForImageClassification",
            image_size=128,
            patch_size=2,
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
        ),
        "poolformer": tiny("PoolFormerForImageClassification", STAGES, patch_size=...),
        "pvt": tiny("PvtForImageClassification", STAGES),
        "regnet": tiny(
            "RegNetForImageClassification", STAGES, hidden_sizes=[32, 48, 64, 80], embedding_size=8, groups_width=8
        ),
        "resnet": tiny("ResNetForImageClassification", STAGES, embedding_size=8),
        "sam": tiny(
            "SamVisionModel",
            IMAGE,
            initializer_range=0.02,
            output_channels=16,
            window_size=2,
            global_attn_indexes=[1],
            mlp_dim=48,
        ),
        "segformer": tiny("SegformerForSemanticSegmentation", STAGES, decoder_hidden_size=16),
        "swin": tiny(
            "SwinForImageClassification",
            IMAGE,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            num_hidden_layers=...,
            num_attention_heads=...,
        ),
        "swinv2": tiny(
            "Swinv2ForImageClassification",
            IMAGE,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            num_hidden_layers=...,
            num_attention_heads=...,
        ),
        "timesformer": tiny("TimesformerForVideoClassification", VIDEO, shape=(2, 4, 3, 16, 16)),
        "videomae": tiny("VideoMAEForVideoClassification", VIDEO, tubelet_size=2, shape=(2, 4, 3, 16, 16)),
        "vit": tiny("ViTForImageClassification", IMAGE),
        "vit-mae": tiny(
            "ViTMAEForPreTraining",
            IMAGE,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=24,
        ),
        "vivit": tiny("VivitForVideoClassification", VIDEO, tubelet_size=[2, 8, 8], shape=(2, 4, 3, 16, 16)),
    },
    "vision and text": {
        "clip": tiny("CLIPModel", text_config=TINY, vision_config={**TINY, **IMAGE}, projection_dim=16),
        "siglip": tiny("SiglipModel", text_config=TINY, vision_config={**TINY, **IMAGE}),
    },
    "audio": {
        "ast": tiny(
            "ASTForAudioClassification",
            max_length=32,
            num_mel_bins=16,
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
            shape=(2, 32, 16),
        ),
        "data2vec-audio": tiny("Data2VecAudioForCTC", SPEECH, num_conv_pos_embeddings=2, conv_pos_kernel_size=3),
        "hubert": tiny("HubertForCTC", SPEECH),
        "moonshine": tiny(
            "MoonshineForConditionalGeneration",
            encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
            shape=(2, 2000),
        ),
        "sew": tiny("SEWForCTC", SPEECH),
        "speech-to-text": tiny(
            "Speech2TextForConditionalGeneration",
            SEQ2SEQ,
            input_feat_per_channel=16,
            input_channels=1,
            conv_channels=16,
            max_source_positions=64,
            max_target_positions=32,
            shape=(2, 32, 16),
        ),
        "unispeech": tiny("UniSpeechForCTC", SPEECH),
        "wav2vec2": tiny("Wav2Vec2ForCTC", SPEECH),
        "wav2vec2-bert": tiny(
            "Wav2Vec2BertForCTC", feature_projection_input_dim=16, conv_depthwise_kernel_size=5, shape=(2, 20, 16)
        ),
        "wav2vec2-conformer": tiny("Wav2Vec2ConformerForCTC", SPEECH, conv_depthwise_kernel_size=5),
        "wavlm": tiny("WavLMForCTC", SPEECH),
        "whisper": tiny(
            "WhisperForConditionalGeneration",
            SEQ2SEQ,
            num_mel_bins=16,
            max_source_positions=16,
            max_target_positions=32,
            shape=(2, 16, 32),
        ),
    },
}

# Sites that a model computes and then ignores, so that no adapter there can have an effect: family -> (names, why).
IDLE = {
    "cvt": (r".*stages\.2\.layers\.2\..*query.*", "of the last layer only the class token is read"),
}


if __name__ == "__main__":
    main()
