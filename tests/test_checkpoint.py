"""Adapter files: what is refused, by what name, and that neither the model nor an older file suffers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import put, retensor, rewrite
from helpers import Host, adapt, equal_bits, host, perturb, refused, snapshot
from rows import one_of_each
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from svdpeft import SORSA, SVFT, CheckpointError, HeadOnly, LoRA, PiSSA, attach, load
from svdpeft.adapter import saving
from svdpeft.adapter.file import HEADER, TENSORS
from svdpeft.adapter.loading import restore
from svdpeft.decomposition import digest, has_digest
from svdpeft.sites.weights import stored

LINEAR = ("linear", 0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter with a head, running statistics and two sites."""
    model = two_layers()
    adapter = attach(model, SORSA(rank=2), targets=["layer", "other"], train=("head",))
    perturb(adapter)
    model.train()(torch.randn(4, 7, dtype=torch.float64))
    adapter.save(tmp_path / "adapter")
    return tmp_path / "adapter"


class TwoLayers(Host):
    """Both layers take part: a site that a forward does not touch would be named in a warning."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out if not hasattr(self, "other") else out + self.other(x[..., :4]).reshape(out.shape)


def two_layers() -> Host:
    model, _ = host(LINEAR)
    model.__class__ = TwoLayers
    torch.manual_seed(5)
    model.other = nn.Linear(4, 3, dtype=torch.float64)
    return model


def no_adapter(path: Path, *words: str, model: nn.Module | None = None, **options: Any) -> None:
    model = model or two_layers()
    with refused(model, *words, error=CheckpointError):
        load(model, path, **options)
    assert not hasattr(model, "_svdpeft")


def test_good_file_loads(saved: Path):
    adapter = load(two_layers(), saved)
    assert list(adapter.sites) == ["layer", "other"]
    assert sorted(p.name for p in saved.iterdir()) == [HEADER, TENSORS]
    json.loads((saved / HEADER).read_text())


def test_a_head_that_has_not_moved_is_in_the_file_too(tmp_path: Path):
    attach(two_layers(), SORSA(rank=2), train=("head",)).save(tmp_path / "a")
    assert list(load(two_layers(), tmp_path / "a").whole) == ["head.weight", "head.bias"]


# -- reading -------------------------------------------------------------------------------------------------


def test_no_adapter_folder(tmp_path: Path, saved: Path):
    """The tensors' file alone is one: a first save that is killed between two renames leaves it."""
    no_adapter(tmp_path / "nowhere", "is not an adapter folder", TENSORS)
    for name in (HEADER, TENSORS):
        (saved / name).rename(saved / "away")
        if name == TENSORS:
            no_adapter(saved, "is not an adapter folder", TENSORS)
        else:
            attached = load(two_layers(), saved)
            assert list(attached.sites) == ["layer", "other"]
        (saved / "away").rename(saved / name)


@pytest.mark.parametrize("name", [HEADER, TENSORS])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_cut_off_file(saved: Path, name: str, share: float):
    if name == HEADER:
        retensor(saved, lambda tensors: None)  # as of an earlier revision: the header is nowhere else
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(len(data) * share)])
    no_adapter(saved, "is damaged or cut off")


def test_file_of_something_else(saved: Path):
    retensor(saved, lambda tensors: None)
    (saved / HEADER).write_bytes(b"\xff\xfe\x00garbage")
    no_adapter(saved, "is damaged or cut off")
    for content in ("[]", "3", "null", '"text"', "{}"):
        (saved / HEADER).write_text(content)
        no_adapter(saved, "has format None; this version of svdpeft reads format 3")


def test_another_format_version(saved: Path):
    rewrite(saved, lambda h: h.update(format=1))
    no_adapter(saved, "has format 1; this version of svdpeft reads format 3")


@pytest.mark.parametrize("key", ["name", "methods", "patterns", "sites", "whole", "skipped", "batch_norm"])
def test_header_that_lacks_a_key(saved: Path, key: str):
    rewrite(saved, lambda h: h.pop(key) and None)
    no_adapter(saved, "is damaged: it lacks", key)


SITE_ENTRIES = ["places", "part", "method", "shape", "hash", "tensors"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (key, value)
        for key in SITE_ENTRIES
        for value in ("absent", None, 3, "text", [])
        if (key, value) != ("part", None)
    ]
    + [("dtype", "absent")],
)
def test_site_entry_that_is_damaged(saved: Path, key: str, value: Any):
    def damage(header: dict[str, Any]) -> None:
        if value == "absent":
            del header["sites"]["other"][key]
        else:
            header["sites"]["other"][key] = value

    rewrite(saved, damage)
    no_adapter(saved, str(saved))


@pytest.mark.parametrize("key", ["name", "methods", "patterns", "sites", "whole", "skipped", "batch_norm"])
@pytest.mark.parametrize("value", [None, 3, ["nonsense"], [None]])
def test_header_entry_that_is_damaged(saved: Path, key: str, value: Any):
    rewrite(saved, lambda h: h.update({key: value}))
    no_adapter(saved, str(saved))


def test_unknown_method_kind_or_option(saved: Path):
    original = (saved / HEADER).read_text()
    for change, words in [
        (lambda h: h["methods"][0].update(name="sorza"), "did you mean 'sorsa'"),
        (lambda h: h["sites"]["other"]["method"].update(name="sorza"), "did you mean 'sorsa'"),
        (lambda h: h["sites"]["other"]["method"].update(novel=1), "novel"),
        (lambda h: h["sites"]["other"]["places"][0].update(kind="lineal"), "did you mean 'linear'"),
        (lambda h: h["sites"]["other"]["method"].update(mode="adam"), "adam"),
    ]:
        rewrite(saved, change)
        no_adapter(saved, words)
        put(saved, original)


def test_missing_extra_and_misshapen_tensors(saved: Path):
    original = (saved / TENSORS).read_bytes()
    for change, words in [
        (lambda t: t.pop("other/L0"), ("tensor other/L0 of shape [3, 2] is missing",)),
        (lambda t: t.pop("head.weight"), ("tensor head.weight is missing",)),
        (lambda t: t.update(spare=torch.zeros(1)), ("1 tensors have no place, such as spare",)),
        (lambda t: t.update({"other/Z": torch.zeros(1)}), ("such as other/Z",)),
        (lambda t: t.update({"other/L": torch.zeros(3, 3)}), ("other/L of shape [3, 2] is of shape [3, 3]",)),
        (lambda t: t.update({"head.bias": torch.zeros(4)}), ("head.bias is [4] there, [3] in this model",)),
        (lambda t: t.update({"norm.running_mean": torch.zeros(9)}), ("norm.running_mean is [9] there",)),
    ]:
        retensor(saved, change)
        no_adapter(saved, *words)
        (saved / TENSORS).write_bytes(original)


def test_file_whose_factors_do_not_fit_the_layer(saved: Path):
    """Header and tensors agree with each other and not with the site: refused at load, not in the first forward."""
    rewrite(saved, lambda h: h["sites"]["other"]["tensors"].update(L=[4, 2]))
    retensor(saved, lambda t: t.update({"other/L": torch.zeros(4, 2, dtype=torch.float64)}))
    no_adapter(saved, "other/L")


def test_integers_that_point_at_nothing():
    """Of every method that keeps some: where entries go, which row is of which cluster, which vectors are taken."""
    pointed = set()
    for method in one_of_each(factored=True):
        model, _ = host(LINEAR)
        with contextlib.suppress(ValueError):  # it is for other layers
            adapter = adapt(model, method)
            state = adapter.state_dict()
            adapter.detach()
            for name in [name for name, t in state.tensors.items() if not t.is_floating_point()]:
                pointed.add(method.name)
                beyond = {**state.tensors, name: torch.full_like(state.tensors[name], 10**6)}
                before = snapshot(model)
                if name.endswith("/chosen"):  # whether, and not where
                    continue
                with pytest.raises(CheckpointError, match="of layer points beyond its factors or its weight"):
                    load(model, state._replace(tensors=beyond))
                assert snapshot(model) == before
    assert pointed >= {"adamss", "dislora", "fourierft", "frod", "shira", "vblora", "waveft"}


def test_site_without_one_of_its_factors(saved: Path):
    rewrite(saved, lambda h: h["sites"]["other"]["tensors"].pop("L") and None)
    retensor(saved, lambda t: t.pop("other/L") is None)
    no_adapter(saved, "other")


# -- another base --------------------------------------------------------------------------------------------


def test_another_base_is_refused_by_the_first_weight_that_differs(saved: Path):
    model = two_layers()
    with torch.no_grad():
        model.other.weight.view(-1)[5] += 2**-50
    no_adapter(saved, "was made for another base: the first weight that differs is other;", model=model)
    with torch.no_grad():
        model.layer.weight.view(-1)[0] += 2**-50
    no_adapter(saved, "the first weight that differs is layer;", model=model)
    adapter = load(model, saved, check_base=False)
    assert list(adapter.sites) == ["layer", "other"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_precision_is_loaded_with_a_warning(saved: Path, dtype: torch.dtype):
    """And another base is refused in whichever precision: the values are looked at, not the name of the model."""
    model = two_layers().to(dtype)
    words = rf"for a base in torch\.float64, and layer is in {dtype} here, with 1 other weights: .* up to rounding"
    with pytest.warns(UserWarning, match=words):
        adapter = load(model, saved)
    assert adapter.sites["layer"].factors.L.dtype == torch.float64
    assert model(torch.randn(2, 7, dtype=dtype)).dtype == dtype
    other = two_layers()
    with torch.no_grad():
        other.layer.weight.mul_(1.03)
    no_adapter(saved, f"layer (saved for torch.float64, here {dtype})", "another base", model=other.to(dtype))
    assert load(other, saved, check_base=False)


def test_a_file_of_an_earlier_revision_says_the_other_dtype(saved: Path):
    """It holds no values of the weights by which they could be known."""
    rewrite(saved, lambda h: [entry.pop("sample") for entry in h["sites"].values()] and None)
    model = two_layers().float()
    no_adapter(saved, "layer (saved for torch.float64, here torch.float32)", model=model)


def test_the_base_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two saves read the base once; a weight that has changed is read again, however that was done."""
    from svdpeft.sites import weights

    model = two_layers()
    adapter = attach(model, LoRA(rank=1), targets=["layer", "other"])
    counted: list[Any] = []
    monkeypatch.setattr(weights, "digest", lambda w: counted.append(w) or digest(w))
    for name in ("a", "b"):
        adapter.save(tmp_path / name)
    adapter.merge()
    adapter.save(tmp_path / "c")
    adapter.unmerge()
    assert len(counted) <= 4, "once, and once for the copy that is kept while it is merged"
    hashes = json.loads((tmp_path / "a" / HEADER).read_text())["sites"]["other"]["hash"]
    weight = stored(model.other, "weight")
    for change in (lambda: weight.data.add_(1), lambda: weight.detach().add_(1)):
        change()
        adapter.save(tmp_path / "d")
        found = json.loads((tmp_path / "d" / HEADER).read_text())["sites"]["other"]["hash"]
        assert found == digest(weight) != hashes


def test_another_shape_is_refused_whatever_is_checked(saved: Path):
    model = two_layers()
    model.other = nn.Linear(4, 5, dtype=torch.float64)
    for check in (True, False):
        no_adapter(saved, "other is [3, 4] there, [5, 4] here", model=model, check_base=check)


def test_model_without_the_site_or_with_another_layer_there(saved: Path):
    model = two_layers()
    del model.other
    no_adapter(saved, "adapts other, which this model does not have", model=model)
    model.other = nn.Conv1d(4, 3, 1, dtype=torch.float64)
    no_adapter(saved, "other is a Conv1d here, not of kind 'linear'", model=model)
    model = two_layers()
    model.head = nn.Identity()
    no_adapter(saved, "trains head.weight, which this model does not have", model=model)


def test_tied_layers_must_be_tied_in_the_model_too(tmp_path: Path):
    def build(tied: bool) -> nn.ModuleDict:
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(6, 5) for name in "ab"})
        model["b"].weight = model["a"].weight if tied else nn.Parameter(model["a"].weight.detach().clone())
        return model

    attach(build(True), PiSSA(rank=2)).save(tmp_path / "tied")
    no_adapter(tmp_path / "tied", "b", model=build(False))
    attach(build(False), PiSSA(rank=2), targets=["a"]).save(tmp_path / "single")
    assert load(build(True), tmp_path / "single").sites["a"].owners  # one user of it alone
    assert load(build(True), tmp_path / "tied").sites["a"].owners


def test_the_name_must_be_free(saved: Path):
    model = two_layers()
    load(model, saved)
    with refused(model, "an adapter named 'default' is attached already"):
        load(model, saved)
    load(model, saved, name="two")


def test_load_while_another_adapter_is_merged_or_folded(tmp_path: Path):
    model, x = host(LINEAR)
    adapter = adapt(model, SORSA(rank=2), name="first")
    perturb(adapter)
    adapter.save(tmp_path / "a")
    adapter.detach()
    other = adapt(model, PiSSA(rank=2), name="other")
    perturb(other)
    for into in ("merge", "fold"):
        getattr(other, into)()
        first = load(model, tmp_path / "a")  # the base's own value is hashed, not what is written over it
        out = model(x)
        getattr(other, f"un{into}")()
        torch.testing.assert_close(model(x), out, rtol=1e-10, atol=1e-12)
        first.detach()


# -- writing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", one_of_each(), ids=str)
def test_file_does_not_depend_on_the_state(method: Any, tmp_path: Path):
    model, x = host(LINEAR)
    adapter = adapt(model, method, train=("head",))
    perturb(adapter)
    model.train()(x)
    for i, change in enumerate((None, "merge", "unmerge", "fold", "unfold")):
        if change:
            getattr(adapter, change)()
        adapter.save(tmp_path / str(i))
        for name in (HEADER, TENSORS):
            assert (tmp_path / str(i) / name).read_bytes() == (tmp_path / "0" / name).read_bytes()
    with adapter.disabled():
        adapter.save(tmp_path / "off")
    for name in (HEADER, TENSORS):
        assert (tmp_path / "off" / name).read_bytes() == (tmp_path / "0" / name).read_bytes()
    adapter.detach()
    with pytest.raises(RuntimeError, match="is detached"):
        adapter.save(tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_only_files_of_our_own_are_replaced(tmp_path: Path):
    """A folder with other things in it keeps them, and a file that is called as ours is not taken for ours."""
    model, x = host(LINEAR)
    adapter = adapt(model, LoRA(rank=1))
    for name in ("README.md", "tokenizer.json", "checkpoints/1/thesis.txt"):
        (tmp_path / "full" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "full" / name).write_text(name)
    (tmp_path / "full" / "link").symlink_to("README.md")
    before = {file: file.read_bytes() for file in (tmp_path / "full").rglob("*") if file.is_file()}
    for seed in range(2):
        perturb(adapter, seed=seed)
        adapter.save(tmp_path / "full")
        after = {file: file.read_bytes() for file in (tmp_path / "full").rglob("*") if file.is_file()}
        ours = {tmp_path / "full" / name for name in (HEADER, TENSORS)}
        assert {file: after[file] for file in before} == before
        assert after.keys() - before.keys() == ours
        assert (tmp_path / "full" / "link").is_symlink()
    out = model(x)
    adapter.detach()
    load(model, tmp_path / "full")
    assert torch.equal(model(x), out)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (HEADER, b'{"scan": "page 1"}'),
        (HEADER, b"[1, 2]"),
        (HEADER, b"\xff\xfe"),
        (HEADER, b'{"format": 3, "sites": {'),
        (TENSORS, b"not of ours"),
        (TENSORS, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"),  # tensors of somebody else: none
    ],
)
def test_a_file_of_somebody_else_is_not_replaced(tmp_path: Path, name: str, content: bytes):
    model, _ = host(LINEAR)
    adapter = adapt(model, LoRA(rank=1))
    (tmp_path / name).write_bytes(content)
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(FileExistsError, match=rf"{name} is damaged or was not written by svdpeft: .* move it away"):
        adapter.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {name: content, "thesis.txt": b"words"}
    with pytest.raises(FileExistsError, match=r"thesis.txt is a file: an adapter is a folder"):
        adapter.save(tmp_path / "thesis.txt")
    adapter.save(str(tmp_path / "deep" / "er" / "adapter"))


def test_an_adapter_of_an_earlier_revision_is_replaced(tmp_path: Path):
    """Its tensors did not carry the header."""
    model, _ = host(LINEAR)
    adapter = adapt(model, LoRA(rank=1))
    adapter.save(tmp_path)
    retensor(tmp_path, lambda tensors: None)
    adapter.save(tmp_path)
    (tmp_path / HEADER).unlink()  # the first save was cut off between the two
    adapter.save(tmp_path)


def test_replacing_leaves_one_complete_folder(tmp_path: Path):
    model, x = host(LINEAR)
    adapter = adapt(model, SORSA(rank=2))
    for seed in range(3):
        perturb(adapter, seed=seed)
        adapter.save(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    out = model(x)
    adapter.detach()
    load(model, tmp_path / "a")
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("place", ["save_file", "write_text", "first rename", "second rename"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failure_while_writing_leaves_the_old_adapter_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: type[BaseException]
):
    """The two differ in tensors and header, so that a mixture of their files would not load."""
    model, x = host(LINEAR)
    outputs = {}
    for rank in (1, 2):
        adapter = adapt(model, SORSA(rank=rank))
        perturb(adapter)
        outputs[rank] = model(x)
        if rank == 1:
            adapter.save(tmp_path / "a")
            adapter.detach()
    renames = []

    def fail(*_: Any, **__: Any) -> None:
        raise error("the disk is full")

    def counted(*args: Any, real: Any = os.replace) -> None:
        renames.append(args)
        if len(renames) == (1 if place == "first rename" else 2):
            fail()
        real(*args)

    if place == "save_file":
        monkeypatch.setattr(saving, "save_file", fail)
    elif place == "write_text":
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        monkeypatch.setattr(os, "replace", counted)
    with pytest.raises(error):
        adapter.save(tmp_path / "a")
    monkeypatch.undo()
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [HEADER, TENSORS]
    adapter.detach()
    load(model, tmp_path / "a")
    assert torch.equal(model(x), outputs[2 if place == "second rename" else 1])


def test_files_can_be_read_by_those_who_may_read_their_neighbours(tmp_path: Path):
    model, _ = host(LINEAR)
    adapt(model, LoRA(rank=1)).save(tmp_path / "a")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    for ours, plain in (("a", "plain"), (f"a/{HEADER}", "plain/file"), (f"a/{TENSORS}", "plain/file")):
        assert stat.S_IMODE((tmp_path / ours).stat().st_mode) == stat.S_IMODE((tmp_path / plain).stat().st_mode)


def test_a_training_s_folder_is_where_its_adapter_is_found(tmp_path: Path):
    model, x = host(LINEAR)
    adapter = adapt(model, SORSA(rank=1))
    perturb(adapter)
    adapter.save(tmp_path / "out" / "adapter")
    out = model(x)
    adapter.detach()
    load(model, tmp_path / "out")
    assert torch.equal(model(x), out)


def test_digest():
    w = torch.randn(4, 6)
    assert digest(w) == digest(w.clone()) == digest(w.mT.contiguous().mT)
    for other in (w.mT, w.double(), w.view(6, 4), w + 2**-20, w.bfloat16()):
        assert digest(other) != digest(w)
    assert digest(torch.zeros(2, 3)) != digest(-torch.zeros(2, 3)), "every bit counts"
    earlier = hashlib.sha256(b"torch.float32 (4, 6) " + w.numpy().tobytes()).hexdigest()[:32]
    assert has_digest(w, digest(w))
    assert has_digest(w, earlier), "files of earlier revisions"
    assert not any(has_digest(w + 1, known) for known in (digest(w), earlier))


@pytest.mark.parametrize("shape", [(6, 4, 1, 1), (6, 4, 3, 3), (6, 1, 3, 3)])
def test_the_digest_of_a_convolution_is_that_of_its_values(shape):
    """In channels-last the strides are others, and those of a 1×1 convolution count as contiguous all the same."""
    w = torch.randn(shape)
    assert digest(w.to(memory_format=torch.channels_last)) == digest(w)


# -- restore -------------------------------------------------------------------------------------------------


def test_restore(tmp_path: Path):
    model, x = host(LINEAR)
    adapter = adapt(model, SVFT(pattern="random"), train=("head",))
    perturb(adapter)
    model.train()(x)
    model.eval()
    out = model(x)
    adapter.save(tmp_path / "a")
    identity = {n: id(p) for n, p in adapter.named_parameters()}
    perturb(adapter, seed=9)
    model.train()(x)
    model.eval()
    assert not torch.equal(model(x), out)
    restore(adapter, tmp_path / "a")
    assert torch.equal(model(x), out)
    assert {n: id(p) for n, p in adapter.named_parameters()} == identity, "an optimizer still holds them"
    adapter.detach()
    assert not hasattr(model, "_svdpeft")


def test_restore_gives_the_base_s_statistics_where_the_file_has_none(tmp_path: Path):
    """It was saved before they had changed, and the training went on."""
    model, x = host(LINEAR)
    adapter = adapt(model, SORSA(rank=2))
    perturb(adapter)
    adapter.save(tmp_path / "a")
    out = model.eval()(x)
    perturb(adapter, seed=9)
    for _ in range(3):
        model.train()(x)
    restore(adapter, tmp_path / "a")
    assert torch.equal(model.eval()(x), out)
    assert not adapter.own.changed()


def test_restore_refuses_another_adapter(tmp_path: Path):
    model, _ = host(LINEAR)
    adapter = adapt(model, SORSA(rank=2))
    adapter.save(tmp_path / "a")
    adapter.detach()
    for method, words in [
        (PiSSA(rank=2), "another method at layer: name differs"),
        (SORSA(rank=3), "another method at layer: rank differs"),
        (HeadOnly(), "only one of them has the tensor"),
    ]:
        other = adapt(model, method)
        perturb(other)
        before = {n: p.clone() for n, p in other.named_parameters()}
        with pytest.raises(CheckpointError, match=words):
            restore(other, tmp_path / "a")
        assert all(equal_bits(p, before[n]) for n, p in other.named_parameters())
        other.detach()


def test_restore_refuses_another_base_and_other_shapes_before_it_copies(tmp_path: Path):
    model = two_layers()
    adapter = attach(model, SORSA(rank=2), targets=["layer", "other"])
    perturb(adapter)
    adapter.save(tmp_path / "a")
    perturb(adapter, seed=9)
    before = {n: p.clone() for n, p in adapter.named_parameters()}

    def refuses(words: str) -> None:
        with pytest.raises(CheckpointError, match=words):
            restore(adapter, tmp_path / "a")
        assert all(equal_bits(p, before[n]) for n, p in adapter.named_parameters())

    with torch.no_grad():
        stored(model.other, "weight").add_(1e-3)
    refuses("another base: the weight of other differs")
    with torch.no_grad():
        stored(model.other, "weight").copy_(two_layers().other.weight)
    retensor(tmp_path / "a", lambda tensors: tensors.update({"other/L": tensors["other/L"][:2].clone()}))
    refuses(r"other/L is \[2, 2\] there, \[3, 2\] here")


def test_restore_into_a_merged_adapter_is_seen_in_the_output(tmp_path: Path):
    model, x = host(LINEAR)
    adapter = adapt(model, SORSA(rank=2))
    perturb(adapter)
    out = model(x)
    adapter.save(tmp_path / "a")
    perturb(adapter, seed=9)
    adapter.merge()
    before = snapshot(model)
    try:
        restore(adapter, tmp_path / "a")
    except RuntimeError:  # either it is refused and nothing changed, or the model computes with the restored factors
        assert snapshot(model) == before
    else:
        torch.testing.assert_close(model(x), out, rtol=1e-10, atol=1e-12)


def test_a_file_without_start_values_or_with_whole_numbers_is_refused(tmp_path):
    """Edited by hand, header and tensors alike: without L0 the start would silently be the trained L."""
    for change in (lambda t: t.pop("layer/L0"), lambda t: t.update({"layer/L": t["layer/L"].long()})):
        model = nn.ModuleDict({"layer": nn.Linear(6, 5)})
        adapter = attach(model, PiSSA(rank=2), ["layer"])
        adapter.save(tmp_path / "a")
        adapter.detach()
        tensors = load_file(tmp_path / "a" / "adapter.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "a" / "adapter.safetensors")
        header = json.loads((tmp_path / "a" / "adapter.json").read_text())
        shapes = header["sites"]["layer"]["tensors"]
        header["sites"]["layer"]["tensors"] = {k: v for k, v in shapes.items() if f"layer/{k}" in tensors}
        (tmp_path / "a" / "adapter.json").write_text(json.dumps(header))
        with refused(model, "missing, or not of floating point", error=CheckpointError):
            load(model, tmp_path / "a")


# -- what a file costs ---------------------------------------------------------------------------------------


def test_saving_copies_nothing_that_lies_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tensors go to the file as they are; one that is a part of another, or lies otherwise, is copied before."""
    model, copies = two_layers(), []
    adapter = attach(model, LoRA(rank=2), targets=["layer", "other"])
    perturb(adapter)
    wide = torch.randn(5, 4, dtype=torch.float64)
    adapter.sites["other"].factors.A.data = wide[1:3]
    adapter.sites["layer"].factors.L.data = adapter.sites["layer"].factors.L.data.mT.contiguous().mT
    expected = adapter.state_dict()
    copy = saving._copy
    monkeypatch.setattr(saving, "_copy", lambda t: copies.append(t.data_ptr()) or copy(t))
    adapter.save(tmp_path / "a")
    there = [adapter.sites[name].factors.get_parameter(role) for name, role in (("layer", "L"), ("other", "A"))]
    assert sorted(copies) == sorted(t.data_ptr() for t in there)
    written = load_file(tmp_path / "a" / TENSORS)
    assert written.keys() == expected.tensors.keys()
    assert all(equal_bits(written[name], tensor) for name, tensor in expected.tensors.items())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    assert all(bool(tensor.any()) for tensor in expected.tensors.values()), "a state is of copies"


def test_the_header_for_people_has_a_line_for_a_site(saved: Path):
    """And it says what the tensors' file says."""
    text = (saved / HEADER).read_text()
    with safe_open(saved / TENSORS, "pt") as opened:
        assert json.loads(text) == json.loads(opened.metadata()[HEADER])
    for name in ("layer", "other"):
        assert sum(line.strip().startswith(f'"{name}": {{"places"') for line in text.splitlines()) == 1
    assert len(text.splitlines()) < 30
