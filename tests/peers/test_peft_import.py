"""A folder of the real PEFT becomes an adapter here: the same function, which trains on, merges and goes back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import svdpeft
from svdpeft.interop.peft_export import export_lora

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
IDS = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Every kind of layer that PEFT's methods know, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 8)
        self.wide, self.back = nn.Linear(8, 16), nn.Linear(16, 8)
        self.turned = Conv1D(8, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv2d(2, 8, (3, 2), stride=2, padding=1)
        self.head = nn.Linear(8, 3)
        nn.init.normal_(self.turned.weight)
        self.double().eval()

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        h = self.back(torch.tanh(self.wide(self.embed(ids))))
        h = self.norm(h + self.turned(h)).mean(1)
        return self.head(torch.tanh(h + self.conv(image).mean((2, 3))))


X = (torch.arange(12).reshape(3, 4), torch.randn(3, 2, 6, 5, generator=torch.Generator().manual_seed(2)).double())
LINEAR = ["wide", "back", "turned"]
ALL = [*LINEAR, "embed", "conv"]
LORA = peft.LoraConfig

CONFIGS = {
    "lora": LORA(r=3, lora_alpha=5, target_modules=ALL, lora_dropout=0.2),
    "rslora": LORA(r=4, lora_alpha=5, use_rslora=True, target_modules=ALL),
    "patterns": LORA(r=3, target_modules=ALL, rank_pattern={"wide": 2, "^conv": 4}, alpha_pattern={"^ba.*": 7}),
    "bias": LORA(r=2, target_modules=ALL, bias="lora_only"),
    "every bias": LORA(r=2, target_modules=LINEAR, bias="all"),
    "modules": LORA(r=2, target_modules=LINEAR, modules_to_save=["head", "norm"]),
    "rows": LORA(r=2, target_modules=LINEAR, trainable_token_indices={"embed": [7, 2, 3]}),
    "parameters": LORA(r=2, target_modules=[], target_parameters=["wide.weight"]),
    "dora": LORA(r=3, lora_alpha=5, use_dora=True, target_modules=ALL),
    "gaussian": LORA(r=3, init_lora_weights="gaussian", target_modules=ALL),
    "orthogonal": LORA(r=4, init_lora_weights="orthogonal", target_modules=LINEAR),
    "eva": LORA(r=3, init_lora_weights=False, target_modules=LINEAR),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=5, target_modules=[*LINEAR, "conv"], total_step=9),
    "vera": peft.VeraConfig(r=5, target_modules=LINEAR),
    "randlora": peft.RandLoraConfig(r=3, target_modules=LINEAR),
    "sparse": peft.RandLoraConfig(r=3, sparse=True, randlora_alpha=7, target_modules=["wide", "back"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["wide", "back", "embed"], use_cayley_neumann=False),
    "oft neumann": peft.OFTConfig(oft_block_size=4, target_modules=["wide", "back", "embed"]),
    "oft short": peft.OFTConfig(oft_block_size=4, target_modules=["wide", "back"], num_cayley_neumann_terms=3),
    "oft shared": peft.OFTConfig(oft_block_size=4, target_modules=["wide", "back"], block_share=True),
    "coft": peft.OFTConfig(oft_block_size=4, target_modules=["wide", "back"], coft=True, eps=0.05),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["wide", "back"], bias="boft_only"),
    "ln": peft.LNTuningConfig(target_modules=["norm"]),
}


def trained(config: Any, model: nn.Module, seed: int = 3) -> Any:
    """PEFT's model with what it trains moved."""
    theirs = peft.get_peft_model(model, copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if p.requires_grad and "ranknum" not in n:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return theirs.double() if next(model.parameters()).dtype == torch.float64 else theirs


def close(a: Tensor, b: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_imported_adapter_is_that_of_peft(name, tmp_path):
    base = Net()
    theirs = trained(CONFIGS[name], copy.deepcopy(base))
    theirs.save_pretrained(tmp_path / "theirs")
    want, before = theirs(*X), base(*X)
    assert (want - before).abs().max() > 1e-3
    adapter = svdpeft.import_peft(base, tmp_path / "theirs")
    rtol = 1e-7 if name == "coft" else 1e-10  # PEFT projects with the root of a number in float32
    close(base(*X), want, rtol)
    adapter.save(tmp_path / "ours")
    with adapter.disabled():
        assert torch.equal(base(*X), before)
    adapter.merge()
    close(base(*X), want, rtol)
    adapter.unmerge()
    again = svdpeft.load(Net(), tmp_path / "ours")
    assert torch.equal(again.model(*X), base(*X))
    # it trains on, and goes back
    loss = base(*X).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    torch.optim.SGD(adapter.parameters(), 1e-4).step()
    adapter.after_step()
    assert base(*X).square().sum() < loss
    if name in WITHOUT_SITES:
        return
    export_lora(adapter, tmp_path / "back", max_rank=None if name not in FULL else 16)
    back = peft.PeftModel.from_pretrained(Net(), tmp_path / "back").eval()
    close(back(*X), base(*X), 1e-9)


FULL = {name for name in CONFIGS if name.startswith(("dora", "oft", "coft", "boft"))}
WITHOUT_SITES = {"ln"}


@pytest.mark.parametrize("name", ["lora", "rslora", "patterns", "dora", "adalora", "vera", "randlora", "oft neumann"])
def test_a_step_of_training_is_that_of_peft(name, tmp_path):
    """With a method's own penalty left out, which PEFT's model adds to a loss of its own."""
    config = copy.deepcopy(CONFIGS[name])
    if name == "lora":
        config.lora_dropout = 0.0
    base, copied = Net(), Net()
    theirs = trained(config, copied)
    theirs.save_pretrained(tmp_path)
    adapter = svdpeft.import_peft(base, tmp_path)
    for parameters, run in ((theirs.parameters(), theirs), (adapter.parameters(), base)):
        optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad and p.numel() > 1], 1e-3)
        for _ in range(2):
            run(*X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if run is base:
                adapter.before_step(1e-3), adapter.after_step()
    close(base(*X), theirs(*X), 1e-9)


def test_butterflies(monkeypatch, tmp_path):
    """Only with an extension for CUDA does PEFT have several: here it is given one in Python."""

    class Diagonal:
        @staticmethod
        def forward(blocks):
            return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: Diagonal)
    config = peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, target_modules=["wide", "back"])
    theirs = trained(config, Net())
    theirs.save_pretrained(tmp_path)
    base = Net()
    adapter = svdpeft.import_peft(base, tmp_path)
    close(base(*X), theirs(*X))
    assert "butterflies=3" in str(adapter.methods[0])


def test_a_pruned_adalora_keeps_its_scale(tmp_path):
    theirs = trained(CONFIGS["adalora"], Net())
    ranks = {
        "wide": [True, False, True, False],
        "back": [False] * 4,
        "turned": [True] * 4,
        "conv": [False] * 3 + [True],
    }
    config = theirs.peft_config["default"]
    config.rank_pattern = {f"{layer}.lora_E": kept for layer, kept in ranks.items()}
    with torch.no_grad():  # as the allocator leaves them
        for layer, kept in ranks.items():
            getattr(theirs.base_model.model, layer).lora_E["default"][~torch.tensor(kept)] = 0
    # PEFT's own saving looks for the adapter's name in these
    config.rank_pattern = {f"{layer}.lora_E.default": kept for layer, kept in ranks.items()}
    theirs.save_pretrained(tmp_path)
    base = Net()
    adapter = svdpeft.import_peft(base, tmp_path)
    close(base(*X), theirs(*X))
    assert {name: site.method.rank for name, site in adapter.sites.items()} == {"wide": 2, "turned": 4, "conv": 1}


def test_running_statistics_come_along(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()

    config = LORA(r=2, target_modules=["0"], modules_to_save=["1"])
    theirs, x = peft.get_peft_model(make(), config), torch.randn(6, 4).double()
    theirs(x)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    base = make().eval()
    adapter = svdpeft.import_peft(base, tmp_path / "theirs")
    close(base(x), theirs(x))
    found = export_lora(adapter, tmp_path / "back")
    assert "saved whole" in str(found)
    close(peft.PeftModel.from_pretrained(make(), tmp_path / "back").eval()(x), base(x))


def llama(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=40, attention_bias=True, **sizes, **options)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def mixture(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.MixtralConfig(
        vocab_size=40, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, **sizes, **options
    )
    model = transformers.MixtralForCausalLM(config).double().eval()
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    return model


def same(make: Any, config: Any, folder: Path, rtol: float = 1e-10) -> tuple[Any, Tensor]:
    """The imported adapter, whose logits are those of PEFT."""
    theirs = trained(config, make())
    theirs.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(make(), folder).eval()
    with torch.no_grad():
        want = loaded(IDS).logits
    base = make()
    adapter = svdpeft.import_peft(base, folder)
    close(base(IDS).logits.detach(), want, rtol)
    return adapter, want


LM = ["q_proj", "down_proj"]
MODELS = {
    "embedding and head": (llama, LORA(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "tied head alone": (lambda: llama(tie_word_embeddings=True), LORA(r=2, target_modules=["lm_head", "q_proj"])),
    "tied, both": (lambda: llama(tie_word_embeddings=True), LORA(r=2, target_modules=["lm_head", "embed_tokens"])),
    "tied head saved": (
        lambda: llama(tie_word_embeddings=True),
        LORA(r=2, target_modules=LM, modules_to_save=["lm_head"]),
    ),
    "tied embedding saved": (
        lambda: llama(tie_word_embeddings=True),
        LORA(r=2, target_modules=LM, modules_to_save=["embed_tokens"]),
    ),
    "rows": (llama, LORA(r=2, target_modules=LM, trainable_token_indices=[9, 3, 4])),
    "tied rows": (
        lambda: llama(tie_word_embeddings=True),
        LORA(r=2, target_modules=LM, trainable_token_indices=[9, 3, 4]),
    ),
    "experts": (mixture, LORA(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])),
    "both of the experts": (
        mixture,
        LORA(
            r=2,
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            rank_pattern={"experts.down_proj": 3},
            alpha_pattern={"experts.gate_up_proj": 3},
        ),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name, tmp_path):
    make, config = MODELS[name]
    adapter, want = same(make, config, tmp_path / "theirs")
    export_lora(adapter, tmp_path / "back")
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "back").eval()
    close(back(IDS).logits.detach(), want, 1e-9)
    if name == "tied, both":  # one update for each use of one weight: PEFT's own merge adds both to it
        with pytest.raises(ValueError, match="lm_head cannot be untied"):
            adapter.merge(untie=True)
    else:
        adapter.merge(untie=True)
    close(adapter.model(IDS).logits.detach(), want, 1e-9)


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_start_that_peft_takes_out_of_the_base(init, dora, tmp_path):
    def make() -> Any:
        return llama(torch.float32)  # PEFT's rule

    if init == "mica" and dora:
        pytest.skip("PEFT has no such method")
    config = LORA(r=3, lora_alpha=5, init_lora_weights=init, use_dora=dora, target_modules=LM)
    adapter, _ = same(make, config, tmp_path, 2e-5)
    assert {"pissa": "PiSSA", "olora": "OLoRA", "mica": "MiCA"}[init] in str(adapter.methods[0])


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "type": ("lora", {"peft_type": "IA3"}, "peft_type 'IA3'; known are LORA, ADALORA, VERA"),
    "no type": ("lora", {"peft_type": None}, "peft_type None; known are"),
    "kasa": (
        "lora",
        {"kasa_config": {"beta": 1.0}},
        r"says kasa_config=.*not understood of LORA; or merge it with PEFT",
    ),
    "unknown": ("lora", {"use_something_new": True}, "use_something_new=True: it is not understood"),
    "replication": ("lora", {"layer_replication": [[0, 2]]}, "layer_replication"),
    "pissa at random": ("lora", {"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "corda": ("lora", {"init_lora_weights": "corda"}, "was taken out of the base's weight"),
    "no dora": ("lora", {"use_dora": True}, "lacks lora_magnitude_vector of"),
    "dora": ("dora", {"use_dora": False}, "lora_magnitude_vector of .* has no place in the LoRA"),
    "no alpha": ("lora", {"lora_alpha": ...}, "lacks 'lora_alpha'"),
    "no bases": ("vera", {"save_projection": False}, "save_projection=False: the random bases are not in the folder"),
    "series": ("oft neumann", {"num_cayley_neumann_terms": 2}, "num_cayley_neumann_terms=2"),
    "rows": ("rows", {"trainable_token_indices": {"embed": [7, 2]}}, r"has 3 rows of embed, and .* \[7, 2\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_configuration_that_is_not_understood_is_named(name, tmp_path):
    which, changes, message = BAD[name]
    trained(CONFIGS[which], Net()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    refused(tmp_path, message)


def refused(folder: Path, message: str, base: nn.Module | None = None) -> None:
    base = Net() if base is None else base
    before = {name: t.clone() for name, t in base.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        svdpeft.import_peft(base, folder)
    assert not svdpeft.adapters(base)
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    file = tmp_path / "adapter_model.safetensors"
    trained(CONFIGS["modules"], Net()).save_pretrained(tmp_path)
    good = load_file(file)

    def changed(message: str, **tensors: Any) -> None:
        named = {f"base_model.model.{name.replace('__', '.')}": t for name, t in tensors.items()}
        save_file({name: t for name, t in (good | named).items() if t is not ...}, file)
        refused(tmp_path, message)

    changed("lacks lora_B of wide", wide__lora_B__weight=...)
    changed("adapts strange, which this model does not have", strange__lora_A__weight=torch.ones(2, 3))
    changed("strange.weight has no place in this model", strange__weight=torch.ones(2, 3))
    changed(r"wide has \[2, 9\] there, and \[2, 8\] here", wide__lora_A__weight=torch.ones(2, 9).double())
    changed(
        "wide.lora_A.weight holds values that are not finite", wide__lora_A__weight=torch.full((2, 8), float("nan"))
    )
    changed(r"head.weight is \[4, 8\] there, \[3, 8\] in this model", head__weight=torch.ones(4, 8).double())
    changed("wide.weight is adapted, and the folder was made for another base", wide__weight=torch.ones(16, 8).double())
    changed(
        "adapts norm.weight, which is no matrix of this model",
        norm__lora_A__weight=torch.ones(2, 8),
        norm__lora_B__weight=torch.ones(8, 2),
    )
    file.write_bytes(file.read_bytes()[:-9])
    refused(tmp_path, "damaged or cut off")
    file.unlink()
    refused(tmp_path, "lacks adapter_model.safetensors; it is what PeftModel.save_pretrained writes")


def test_layers_in_which_peft_does_another_thing_are_refused(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    peft.get_peft_model(Attention(), LORA(r=2, target_modules=["attention"])).save_pretrained(tmp_path / "a")
    refused(tmp_path / "a", "PEFT adds the update of out_proj twice", Attention())
    peft.get_peft_model(Net(), peft.OFTConfig(oft_block_size=2, target_modules=["conv"])).save_pretrained(
        tmp_path / "b"
    )
    refused(tmp_path / "b", "conv is a convolution: PEFT computes")

    def wide():
        return nn.Sequential(nn.Conv2d(4, 6, 3, padding="same", dilation=2), nn.Conv2d(6, 6, 1))

    peft.get_peft_model(wide(), LORA(r=2, target_modules=["0"])).save_pretrained(tmp_path / "c")
    refused(tmp_path / "c", "0 has groups, a dilation or a padding mode", wide())


def test_a_grown_vocabulary_wants_a_grown_base(tmp_path):
    def make(size: int) -> Any:
        return llama(tie_word_embeddings=True) if size == 40 else _grown(llama(tie_word_embeddings=True), size)

    theirs = trained(LORA(r=2, target_modules=["q_proj"]), make(43))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    refused(tmp_path, r"weight is \[43, 16\] there, \[40, 16\].*resize_token_embeddings", make(40))
    base = make(43)
    adapter = svdpeft.import_peft(base, tmp_path)
    close(base(IDS).logits, theirs(IDS).logits)
    assert not adapter.whole  # they were written and not trained


def _grown(model: Any, size: int) -> Any:
    torch.manual_seed(5)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def test_of_a_module_that_is_saved_whole_the_rest_is_the_base_and_no_other_adapter(tmp_path):
    base, copied = Net(), Net()
    first = svdpeft.attach(base, svdpeft.LoRA(rank=1), ["wide"], train=["head.weight"])
    second = svdpeft.attach(base, svdpeft.LoRA(rank=1), ["back"], train=["head.bias"], name="second")
    with torch.no_grad():
        for p in (*first.parameters(), *second.parameters()):
            p.add_(0.3)
    export_lora(first, tmp_path / "first")
    theirs = peft.PeftModel.from_pretrained(copied, tmp_path / "first").eval()
    with svdpeft.only(base, "default"):
        close(theirs(*X), base(*X))


def test_a_second_adapter_beside_the_first(tmp_path):
    trained(CONFIGS["lora"], Net()).save_pretrained(tmp_path)
    base = Net()
    first = svdpeft.attach(base, svdpeft.LoRA(rank=1), ["wide"])
    second = svdpeft.import_peft(base, tmp_path, name="theirs")
    want = Net()
    svdpeft.import_peft(want, tmp_path)
    close(base(*X), want(*X))
    assert svdpeft.adapters(base) == {"default": first, "theirs": second}
    with pytest.raises(ValueError, match="'theirs' is attached already"):
        svdpeft.import_peft(base, tmp_path, name="theirs")
