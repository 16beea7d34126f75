"""BitFit and LayerNorm tuning: which parameters they name, on models of every sort."""

import pytest
import torch
from torch import nn

import svdpeft
from svdpeft import BitFit, LNTuning
from svdpeft.models import load


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, add_bias_kv=True)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv1d(6, 4, 1)
        self.relative_position_bias_table = nn.Parameter(torch.randn(3, 2))
        self.q_bias = nn.Parameter(torch.randn(6))
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x):
        y = self.attention(x, x, x)[0] + self.q_bias
        return self.conv((self.norm(y) * self.scale).mT)


def test_bitfit_trains_the_bias_vectors_and_nothing_else():
    adapter = svdpeft.attach(Net(), BitFit())
    names = {"attention.in_proj_bias", "attention.out_proj.bias", "norm.bias", "conv.bias", "q_bias"}
    assert set(adapter.whole) == names  # bias_k and bias_v of the attention are (1, 1, 6): vectors of another sort
    assert adapter.trainable_count == 18 + 6 + 6 + 4 + 6
    trains = {name for name, p in adapter.model.named_parameters() if p.requires_grad}
    assert trains == names


def test_layernorm_tuning_trains_norms_and_nothing_else():
    adapter = svdpeft.attach(Net(), LNTuning())
    assert set(adapter.whole) == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize(("method", "model"), [(BitFit(), nn.Linear(3, 2, bias=False)), (LNTuning(), nn.Linear(3, 2))])
def test_a_model_without_them_is_refused(method, model):
    with pytest.raises(ValueError, match="has none"):
        svdpeft.attach(model, method)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*trains whole in torch.bfloat16")
@pytest.mark.apart
@pytest.mark.parametrize("name", ["dinov2-vits14", "efficientnet-lite0", "smollm2-135m"])
def test_counts_on_real_models(name):
    options = {"dtype": torch.bfloat16} if name == "smollm2-135m" else {"num_classes": 10}
    model = load(name, **options).model
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    expected = sum(p.numel() for m in norms for p in m.parameters(recurse=False))
    adapter = svdpeft.attach(model, LNTuning())
    assert adapter.trainable_count == expected > 0
    adapter.detach()
    if name == "smollm2-135m":  # no biases at all
        with pytest.raises(ValueError, match="biases"):
            svdpeft.attach(model, BitFit())
        return
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    assert svdpeft.attach(model, BitFit()).trainable_count == biases > 0


def test_bases_come_back_bit_for_bit():
    model, x = Net().eval(), torch.randn(5, 2, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for method in (BitFit(), LNTuning()):
        adapter = svdpeft.attach(model, method)
        model(x).square().sum().backward()
        with torch.no_grad():
            for p in adapter.parameters():
                assert p.grad is not None
                p.sub_(0.1 * p.grad)
        with adapter.disabled():
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        adapter.detach()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
