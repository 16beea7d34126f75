"""An export to GGUF, put on the base in llama.cpp's layout, is the adapted model in llama.cpp's layout."""

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from helpers import perturb
from torture.kills import no_room
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import svdpeft
from svdpeft.models import embedded, load
from svdpeft.models.embedded import AssetError

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma": GemmaConfig(**{**SIZES, "tie_word_embeddings": True}),
    "gemma2": Gemma2Config(**{**SIZES, "tie_word_embeddings": True}, query_pre_attn_scalar=8),
    "phi3": Phi3Config(**SIZES),
    "gpt2": GPT2Config(vocab_size=40, n_embd=24, n_inner=36, n_layer=2, n_head=3, n_positions=16),
}
ARCHITECTURE = {"mistral": "llama"}  # of the others their own name
# llama.cpp's words for the layers of a block, written down by hand.
ATTENTION = {f"self_attn.{leaf}_proj": f"attn_{leaf}" for leaf in "qkv"} | {"self_attn.o_proj": "attn_output"}
LAYERS = {
    "phi3": {
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    "gpt2": {
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
}
OTHERS = ATTENTION | {f"mlp.{leaf}_proj": f"ffn_{leaf}" for leaf in ("gate", "up", "down")}


def model_of(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def tuned(model, method, targets="all-linear", **options):
    adapter = svdpeft.attach(model, method, targets, seed=3, **options)
    perturb(adapter, 0.1)
    return adapter


def expected_names(name):
    """Module -> tensor, of every linear layer of a block."""
    stem, layers = "transformer.h" if name == "gpt2" else "model.layers", LAYERS.get(name, OTHERS)
    return {f"{stem}.{i}.{leaf}": f"blk.{i}.{tensor}.weight" for i in range(2) for leaf, tensor in layers.items()}


def neighbours(rows, heads):
    """The rows of llama.cpp's Llama, one by one: of each head, row i of the first half, then row i of the second."""
    size = rows.shape[0] // heads
    order = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def in_their_layout(model, name, matrix):
    """A matrix (out, in) of a layer as llama.cpp's conversion of the base has it."""
    permuted = type(model).__name__ in ("LlamaForCausalLM", "MistralForCausalLM")
    if permuted and name.endswith("q_proj"):
        return neighbours(matrix, model.config.num_attention_heads)
    if permuted and name.endswith("k_proj"):
        return neighbours(matrix, model.config.num_key_value_heads)
    return matrix


def read(path):
    """The metadata that matters, and tensors as torch has their axes."""
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def updates(path):
    """llama.cpp's reading: α/r · B A of every tensor, with r from the shape of B; and the ranks."""
    fields, tensors = read(path)
    names = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    assert len(tensors) == 2 * len(names)
    found, ranks = {}, {}
    for name in names:
        a, b = (torch.from_numpy(tensors[f"{name}.lora_{side}"].astype(np.float64)) for side in "ab")
        assert a.shape[0] == b.shape[1]
        found[name], ranks[name] = fields["adapter.lora.alpha"] / b.shape[1] * b @ a, b.shape[1]
    return found, ranks


def matrix_of(module):
    weight = module.weight.detach().double()
    return weight.T if type(module).__name__ == "Conv1D" else weight


@pytest.mark.parametrize("name", CONFIGS)
def test_base_and_export_are_the_merged_model_in_their_layout(name, tmp_path):
    model = model_of(name)
    method = svdpeft.SORSA(rank={r".*(q_proj|qkv_proj|attn.c_attn)": 3, ".*": 2}, alpha=3)
    names = expected_names(name)
    base = {module: matrix_of(model.get_submodule(module)) for module in names}
    adapter = tuned(model, method, list(names))
    ranks = svdpeft.export_gguf(adapter, tmp_path / "a.gguf", dtype="f32")
    fields, tensors = read(tmp_path / "a.gguf")
    assert fields == {
        "general.architecture": ARCHITECTURE.get(name, name),
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float32)}
    found, written = updates(tmp_path / "a.gguf")
    assert {names[module]: rank for module, rank in ranks.items()} == written
    assert set(written.values()) == {4, 6}  # SORSA's update has twice the rank
    adapter.merge()
    for module, tensor in names.items():
        before, after = base[module], matrix_of(model.get_submodule(module))
        ours = in_their_layout(model, module, before) + found[tensor]
        torch.testing.assert_close(ours, in_their_layout(model, module, after), rtol=1e-5, atol=1e-6)
        assert (after - before).norm() > 0.1 * before.norm()


def test_queries_and_keys_of_llama_are_permuted_and_nothing_else_is(tmp_path):
    """The layouts differ, so that the test above cannot pass without the permutation."""
    for name, moved in (("llama", {"attn_q", "attn_k"}), ("qwen2", set())):
        model = model_of(name)
        adapter = tuned(model, svdpeft.LoRA(rank=2))
        svdpeft.export_gguf(adapter, tmp_path / f"{name}.gguf", dtype="f32")
        found, _ = updates(tmp_path / f"{name}.gguf")
        for module, tensor in expected_names(name).items():
            same = torch.allclose(found[tensor], adapter.delta(module).double(), atol=1e-6)
            assert same == (tensor.split(".")[2] not in moved)


def test_half_precision_is_the_same_up_to_rounding(tmp_path):
    adapter = tuned(model_of("llama"), svdpeft.PiSSA(rank=2))
    wide = svdpeft.export_gguf(adapter, tmp_path / "wide.gguf", dtype="f32")
    assert svdpeft.export_gguf(adapter, tmp_path / "half.gguf") == wide
    _, tensors = read(tmp_path / "half.gguf")
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float16)}
    (half, _), (exact, _) = updates(tmp_path / "half.gguf"), updates(tmp_path / "wide.gguf")
    for name, update in exact.items():
        assert 0 < (half[name] - update).norm() < 2e-3 * update.norm()


def test_parts_of_a_fused_weight_are_one_tensor(tmp_path):
    for name, fused in (("phi3", "model.layers.1.self_attn.qkv_proj"), ("gpt2", "transformer.h.1.attn.c_attn")):
        model = model_of(name)
        adapter = tuned(model, svdpeft.LoRA(rank={r".*\[q\]": 2, ".*": 3}), [f"{fused}[q,v]"])
        assert len(adapter.sites) == 2
        assert svdpeft.export_gguf(adapter, tmp_path / f"{name}.gguf", dtype="f32") == {fused: 5}
        found, _ = updates(tmp_path / f"{name}.gguf")
        total = sum(site.delta() for site in adapter.sites.values())
        total = total.T if name == "gpt2" else total
        torch.testing.assert_close(found["blk.1.attn_qkv.weight"], total.double(), rtol=1e-5, atol=1e-6)


def test_an_untied_embedding_lies_the_other_way(tmp_path):
    model = model_of("llama")
    adapter = tuned(model, svdpeft.LoRA(rank=2), ["embed_tokens", "lm_head"])
    ranks = svdpeft.export_gguf(adapter, tmp_path / "a.gguf", dtype="f32")
    assert ranks == {"model.embed_tokens": 2, "lm_head": 2}
    _, tensors = read(tmp_path / "a.gguf")
    a, b = (torch.from_numpy(tensors[f"token_embd.weight.lora_{side}"]) for side in "ab")
    assert a.shape == (40, 2)  # rows of it are looked up
    assert b.shape == (24, 2)
    torch.testing.assert_close(a @ b.T, adapter.delta("model.embed_tokens"))
    a, b = (torch.from_numpy(tensors[f"output.weight.lora_{side}"]) for side in "ab")
    torch.testing.assert_close(b @ a, adapter.delta("lm_head"))


def test_a_largest_rank_takes_the_nearest_update(tmp_path):
    targets = ["v_proj"]
    adapter = tuned(model_of("llama"), svdpeft.OFT(block_size=8), targets)  # of full rank
    with pytest.raises(ValueError, match=r"OFT.* has an update of full rank"):
        svdpeft.export_gguf(adapter, tmp_path / "a.gguf")
    ranks = svdpeft.export_gguf(adapter, tmp_path / "a.gguf", dtype="f32", max_rank=3)
    assert set(ranks.values()) == {3}
    found, _ = updates(tmp_path / "a.gguf")
    for module in ranks:
        u, s, vh = torch.linalg.svd(adapter.delta(module).double(), full_matrices=False)
        nearest = u[:, :3] * s[:3] @ vh[:3]
        torch.testing.assert_close(found[expected_names("llama")[module]], nearest, rtol=1e-4, atol=1e-5)
    adapter = tuned(model_of("llama"), svdpeft.LoRA(rank=2), targets)
    assert set(svdpeft.export_gguf(adapter, tmp_path / "b.gguf", max_rank=9).values()) == {2}


def test_what_llama_cpp_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    def refuse(adapter, message, **options):
        with pytest.raises(ValueError, match=message):
            svdpeft.export_gguf(adapter, tmp_path / "a.gguf", **options)
        assert not list(tmp_path.iterdir())

    lora, way_out = svdpeft.LoRA(rank=1), "; merge the adapter and convert the merged model"
    bert = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    refuse(svdpeft.attach(bert, lora), f"no export to llama.cpp for BertModel, only for .*LlamaForCausalLM.*{way_out}")
    refuse(svdpeft.attach(model_of("llama").model, lora), "for LlamaModel, only for")
    whole = "is trained whole: a LoRA file holds low-rank updates only; merge"
    refuse(svdpeft.attach(model_of("llama"), lora, train=["embed_tokens"]), f"model.embed_tokens.weight {whole}")
    refuse(svdpeft.attach(model_of("qwen2"), lora, ["q_proj"], bias=True), f"q_proj.bias {whole}")
    refuse(svdpeft.attach(model_of("llama"), lora, train=["norm"]), f"norm.weight {whole}")
    rows = svdpeft.attach(model_of("llama"), lora, ["q_proj"], train={"embed_tokens": [3, 4]})
    rows.sites["model.embed_tokens[rows]"].factors.W.data.add_(1)  # two rows: a LoRA of rank 1, exactly
    assert svdpeft.export_gguf(rows, tmp_path / "rows.gguf")["model.embed_tokens"] == 1
    (tmp_path / "rows.gguf").unlink()
    refuse(svdpeft.attach(model_of("gpt2"), lora, ["wpe"]), f"'gpt2' do not reach transformer.wpe, .*{way_out}")
    clover = svdpeft.attach(model_of("gpt2"), svdpeft.CLOVER(), "all-linear")
    refuse(clover, f"'gpt2' do not reach transformer.h.0.attn.*, of kind 'hf-conv1d heads'{way_out}", max_rank=1)
    tied = f"shares its weight with another layer: llama.cpp's adapters cannot say that{way_out}"
    refuse(svdpeft.attach(model_of("gpt2"), lora, ["lm_head"]), f"lm_head {tied}")
    refuse(svdpeft.attach(model_of("gpt2"), lora, ["wte", "lm_head"]), f"transformer.wte {tied}")
    both = model_of("llama")
    both.model.layers[1].mlp.up_proj.weight = both.model.layers[0].mlp.up_proj.weight
    refuse(svdpeft.attach(both, lora, ["up_proj"]), f"up_proj {tied}")
    refuse(svdpeft.attach(model_of("llama"), svdpeft.Full()), "no factors")
    adapter = tuned(model_of("llama"), lora)
    refuse(adapter, "dtype 'fp16': did you mean 'f16'", dtype="fp16")
    refuse(adapter, "max_rank 0 is not a whole number of at least 1", max_rank=0)
    refuse(adapter, "max_rank True is not a whole number", max_rank=True)
    site = adapter.sites["model.layers.1.mlp.up_proj"]
    site.factors.L.data.mul_(1e12)
    refuse(adapter, r"layers\.1\.mlp\.up_proj has factors of up to .*, which f16 cannot hold")
    site.factors.L.data[0, 0] = float("nan")
    refuse(adapter, "not finite")


def test_a_disk_that_is_full_before_the_last_tensor(tmp_path):
    """``tofile`` of numpy says nothing where C's buffer has no room when it is closed."""
    pytest.importorskip("resource")
    adapter = tuned(model_of("llama"), svdpeft.LoRA(rank=2), ["q_proj"])
    svdpeft.export_gguf(adapter, tmp_path / "whole.gguf")
    size = (tmp_path / "whole.gguf").stat().st_size
    for room in range(0, size, size // 50):
        with pytest.raises(OSError, match=r"File too large|could not be written whole|requested and"), no_room(room):
            svdpeft.export_gguf(adapter, tmp_path / "a.gguf")
        assert [file.name for file in tmp_path.iterdir()] == ["whole.gguf"]


def test_an_export_does_not_overwrite(tmp_path):
    (tmp_path / "a.gguf").write_text("somebody's")
    with pytest.raises(FileExistsError, match="does not overwrite"):
        svdpeft.export_gguf(tuned(model_of("llama"), svdpeft.LoRA(rank=1)), tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_text() == "somebody's"


@pytest.mark.apart
def test_names_shapes_and_rows_are_those_of_a_file_of_llama_cpp(tmp_path):
    """A file that llama.cpp made of a real Llama, and the model that transformers makes of that file."""
    try:
        path = embedded.fetch("smollm2-135m")
        loaded = load("smollm2-135m", dtype=torch.float32)
    except AssetError as error:
        pytest.skip(str(error))
    reader = GGUFReader(path)  # takes seconds, for all the tokens
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    assert reader.fields["general.architecture"].contents() == "llama"
    adapter = tuned(loaded.model, svdpeft.LoRA(rank=2), [r"model\.layers\.(0|29)\..*_proj"])
    try:
        svdpeft.export_gguf(adapter, tmp_path / "a.gguf")
        ours = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
        names = {name.rpartition(".lora_")[0] for name in ours}
        assert len(names) == 14
        for name in names:
            n, m = map(int, theirs[name].shape)
            assert ours[f"{name}.lora_a"].shape.tolist() == [n, 2]
            assert ours[f"{name}.lora_b"].shape.tolist() == [2, m]
    finally:
        adapter.detach()
    block, config = loaded.model.model.layers[29].self_attn, loaded.model.config
    for layer, tensor, heads in (
        (block.q_proj, "attn_q", config.num_attention_heads),
        (block.k_proj, "attn_k", config.num_key_value_heads),
    ):
        data = theirs[f"blk.29.{tensor}.weight"]
        stored = torch.from_numpy(dequantize(data.data, data.tensor_type))
        assert torch.equal(neighbours(layer.weight.detach(), heads), stored)
        assert not torch.equal(layer.weight, stored)
