"""One process and where its weights are: a device for decompositions, device maps, offloading, memory formats."""

import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from launched import AROUND, METHODS, NOT_WITH_DEEPSPEED, data, model
from torch import nn
from torch.nn import functional as F

import svdpeft
from svdpeft.decomposition import own_share_first, svd, svd_cache_until_attached
from svdpeft.training.callback import AdapterCallback
from svdpeft.training.distribution import prepare

PARTS = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}


def result(base, adapter):
    """The loss of a batch, and its gradients, with an update that is not zero."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.01
    ids = torch.stack([row["input_ids"] for row in data()[:2]])
    loss = base(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in adapter.named_parameters()}


def assert_plain(found):
    base = model(torch.float64)
    loss, gradients = result(base, svdpeft.attach(base, METHODS["sorsa"]))
    assert torch.equal(found[0], loss)
    assert found[1].keys() == gradients.keys()
    assert all(torch.equal(found[1][name], gradient) for name, gradient in gradients.items())


# -- decompositions ----------------------------------------------------------------------------------------------------


def test_matrices_are_decomposed_elsewhere_and_come_back(monkeypatch):
    """There is no other device here: one that holds no values stands for it."""
    w, there, exact = torch.randn(5, 4), torch.device("meta"), svd.full_svd
    monkeypatch.setattr(svd, "full_svd", lambda on, *rest: exact(w.double(), *rest) if on.device == there else None)
    token = svd._DEVICE.set(there)
    found = svd.truncated_svd(w, 2)
    svd._DEVICE.reset(token)
    assert {t.device.type for t in found} == {"cpu"}
    monkeypatch.setattr(svd, "full_svd", exact)
    assert all(torch.equal(a, b) for a, b in zip(found, svd.truncated_svd(w, 2), strict=True))


def test_a_device_for_decompositions_reaches_them(monkeypatch):
    seen = []
    exact = svd.full_svd
    monkeypatch.setattr(svd, "full_svd", lambda *args: [seen.append(svd._DEVICE.get()), exact(*args)][1])
    layer = nn.Linear(4, 3)
    svdpeft.attach(layer, svdpeft.SORSA(rank=1), decompose_on="cpu").detach()
    svdpeft.attach(layer, svdpeft.SORSA(rank=1)).detach()
    assert seen == [torch.device("cpu"), None]
    for wrong, why in (("gpu-7", "is no device here"), ("meta", "nothing can be computed there")):
        with pytest.raises(ValueError, match=f"decompose_on='{wrong}'.*{why}"):
            svdpeft.attach(layer, svdpeft.SORSA(rank=1), decompose_on=wrong)
    assert not hasattr(layer, "svdpeft")


def test_one_weight_at_a_time_is_in_memory_in_the_precision_of_its_decomposition(monkeypatch):
    alive, most, exact = weakref.WeakSet(), [], svd.full_svd

    def watched(w, *rest):
        alive.add(w)
        most.append(sum(t.numel() for t in alive))
        return exact(w, *rest)

    monkeypatch.setattr(svd, "full_svd", watched)
    layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5))).bfloat16()
    svdpeft.attach(layers, svdpeft.SORSA(rank=2))
    assert most == [256] * 5


def test_processes_share_decompositions(tmp_path, monkeypatch):
    """Each begins with its own share; the last one that has attached deletes the folder."""
    orders, exact, made = [], svd.full_svd, []
    monkeypatch.setattr(svd, "full_svd", lambda *args: [made.append(args[1]), exact(*args)][1])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        orders.append(own_share_first(5))
        assert (tmp_path / "shared").exists() == (rank == "1")
        with svd_cache_until_attached(tmp_path / "shared"):
            adapter = svdpeft.attach(nn.Sequential(*map(seeded, range(3))), svdpeft.SORSA(rank=2))
        assert list(adapter.sites) == ["0", "1", "2"]
    assert orders == [[0, 2, 4, 1, 3], [1, 3, 0, 2, 4]]
    assert made == ["0", "2", "1"]  # the second found all of them
    assert not (tmp_path / "shared").exists()
    for rank in ("0", "1"):  # nor does an error leave it
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ValueError, match="rank 9"), svd_cache_until_attached(tmp_path / "shared"):
            svdpeft.attach(seeded(0), svdpeft.SORSA(rank=9))
    assert not (tmp_path / "shared").exists()


def seeded(seed):
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


# -- device maps, offloading, memory formats ---------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("parts", [{"": "cpu"}, {**PARTS, "lm_head": "cpu"}])
def test_a_dispatched_model_trains_as_the_plain_one(before, parts):
    base = model(torch.float64)
    if before:
        dispatch_model(base, parts, force_hooks=True)
    adapter = svdpeft.attach(base, METHODS["sorsa"])
    if not before:
        dispatch_model(base, parts, force_hooks=True)
    assert_plain(result(base, adapter))


def test_what_is_not_adapted_may_be_offloaded(tmp_path):
    base = model(torch.float64)
    dispatch_model(base, {**PARTS, "lm_head": "disk"}, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert base.lm_head.weight.is_meta
    assert_plain(result(base, svdpeft.attach(base, METHODS["sorsa"])))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_what_is_adapted_is_not_offloaded(tmp_path, where):
    def offload(base):
        if where == "cpu":
            cpu_offload(base, execution_device=torch.device("cpu"))
        else:
            disk_offload(base, str(tmp_path), execution_device=torch.device("cpu"))

    base = model(torch.float64)
    offload(base)
    with pytest.raises(ValueError, match=r"q_proj is offloaded by accelerate .*Keep what is adapted on a device"):
        svdpeft.attach(base, METHODS["sorsa"])
    assert not any("svdpeft" in name for name, _ in base.named_modules())
    base = model(torch.float64)
    adapter = svdpeft.attach(base, METHODS["sorsa"])
    offload(base)
    with pytest.raises(RuntimeError, match=r"are on meta and the layer computes on cpu.*cannot be offloaded"):
        result(base, adapter)


@pytest.mark.parametrize("before", [True, False])
def test_channels_last(before):
    found = []
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for last in (False, True):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(80, 3)).double()
        form = torch.channels_last if last else torch.contiguous_format
        if before:
            base.to(memory_format=form)
        adapter = svdpeft.attach(base, svdpeft.SORSA(rank=2), "all", train=["4.weight"], exclude=["4"])
        if not before:
            base.to(memory_format=form)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.01
        loss = F.cross_entropy(base(x.to(memory_format=form)), torch.tensor([0, 1]))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in adapter.parameters())])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=0, atol=16 * math.ulp(1.0))


# -- what a sharded training refuses -----------------------------------------------------------------------------------


def accelerator(fsdp=None, deepspeed=None):
    state = SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=deepspeed)
    return SimpleNamespace(state=state, device=torch.device("cpu"))


def plugin(**options):
    return SimpleNamespace(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False, "ignored_modules": None} | options)


def test_what_fsdp_cannot_shard_is_refused():
    base = model(torch.float64)
    adapter = svdpeft.attach(base, METHODS["vera"])
    shared = {id(p) for site in adapter.sites.values() for p in (site.factors.A, site.factors.B)}
    for options, why in (
        ({"fsdp_version": 1}, "one flat parameter"),
        ({"cpu_ram_efficient_loading": True}, "processes but one without weights"),
        ({"ignored_modules": "lm_head"}, "'lm_head' of FSDP is a pattern"),
    ):
        found = plugin(**options)
        with pytest.raises(ValueError, match=why):
            prepare(accelerator(found), adapter)
        assert vars(found) == vars(plugin(**options))
    found = plugin(ignored_modules=[base.lm_head])
    prepare(accelerator(found), adapter)
    head, left_out = found.ignored_modules
    assert head is base.lm_head
    assert {id(p) for p in left_out.parameters()} == shared
    adapter.detach()
    tied = svdpeft.attach(base, svdpeft.method("tinylora")(rank=2, u=2, tie="all"))
    with pytest.raises(ValueError, match=r"trains v of model\.layers\.0\.self_attn\.q_proj for several sites"):
        prepare(accelerator(plugin()), tied)


def test_fsdp_that_accelerate_does_not_take_up_is_refused(monkeypatch):
    adapter = svdpeft.attach(model(torch.float64), METHODS["lora"])
    given = accelerator()
    given.state.distributed_type = "MULTI_CPU"
    prepare(given, adapter)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP was asked for .* trains without it on cpu \(MULTI_CPU\).*ddp\.yaml"):
        prepare(given, adapter)
    prepare(accelerator(plugin()), adapter)


@pytest.mark.parametrize("name", METHODS)
def test_deepspeed_takes_methods_without_a_memory(name):
    adapter = svdpeft.attach(model(torch.float64), METHODS[name])
    if name in NOT_WITH_DEEPSPEED - AROUND.keys():  # what a trainer does around the step is refused by the trainer
        with pytest.raises(ValueError, match="DeepSpeed takes its step within backward"):
            prepare(accelerator(deepspeed=object()), adapter)
    else:
        prepare(accelerator(deepspeed=object()), adapter)


def test_a_stock_trainer_does_not_save_a_sharded_model():
    base = model(torch.float64)
    callback = AdapterCallback(svdpeft.attach(base, METHODS["lora"]))
    base.lm_head.weight.ds_id = 0
    state = SimpleNamespace(global_step=0)
    with pytest.raises(ValueError, match=r"gathers a sharded model whole.*use svdpeft\.Trainer"):
        callback.on_train_begin(SimpleNamespace(save_strategy="steps"), state, None, model=base)
    callback.on_train_begin(SimpleNamespace(save_strategy="no"), state, None, model=base)
    with pytest.raises(ValueError, match=r"lm_head\.weight is sharded over processes: load the values before"):
        callback.adapter.load_state_dict(callback.adapter.state_dict())
