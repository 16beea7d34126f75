"""PSOFT against Hugging Face PEFT, where it is installed: 0.21.2 has no other of the methods that train such a core."""

import copy

import pytest
import torch
from torch import nn

import svdpeft

peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

SIDES = {"both": (True, True), "input": (True, False), "output": (False, True), "none": (False, False)}


def pair(method, out=9, width=7, **options):
    """Ours and theirs on one layer: the adapter, its factors, their layer, both models, an input."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(width, out)), torch.randn(4, width)
    config = peft.PsoftConfig(r=method.rank, target_modules=["0"], **options)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    adapter = svdpeft.attach(base, method)
    return adapter, adapter.sites["0"].factors, theirs.base_model.model[0], base, theirs, x


def signs(factors, layer):
    """Their triplets are ours up to a sign each, (r,)."""
    theirs, _ = layer._get_psoft_ab_cache_buffers("default")
    found = (theirs * factors.A).sum(-1).sign()
    torch.testing.assert_close(theirs, factors.A * found[:, None], rtol=1e-4, atol=1e-5)
    return found


def teach(factors, layer):
    """Draw our values, and give PEFT's the same meaning.

    Theirs are above the diagonal, row by row, ours below it; and a triplet of the other sign turns the other way.
    """
    theirs, sign = layer.psoft_R["default"], signs(factors, layer)
    r = len(sign)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        factors.Q.copy_(0.3 * torch.randn(factors.Q.shape, generator=generator))
        i, j = torch.tril_indices(r, r, -1)
        q = torch.zeros(r, r)
        q[i, j] = factors.Q
        q = sign[:, None] * (q - q.T) * sign
        theirs.weight.copy_(q[theirs.rows, theirs.cols])
        for ours, other in (("alpha_vec", theirs.vector_a), ("beta_vec", theirs.vector_b)):
            assert (ours in factors._parameters) == (other is not None)
            if other is not None:
                vector = getattr(factors, ours)
                vector.copy_(1 + 0.3 * torch.randn(vector.shape, generator=generator))
                other.copy_(vector)


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (8, 8)], ids=str)
@pytest.mark.parametrize("vectors", SIDES)
@pytest.mark.parametrize("alpha", [4, 32])
def test_psoft_has_the_forward_of_peft(shape, vectors, alpha):
    a, b = SIDES[vectors]
    method = svdpeft.PSOFT(rank=4, vectors=vectors)
    adapter, factors, layer, ours, theirs, x = pair(method, *shape, psoft_alpha=alpha, psoft_mag_a=a, psoft_mag_b=b)
    base = ours(x)
    torch.testing.assert_close(theirs(x), base)  # both start at the base
    teach(factors, layer)
    assert (ours(x) - base).abs().max() > 0.01
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-5)  # for every α: it has no effect in theirs
    torch.testing.assert_close(layer.get_delta_weight("default"), adapter.delta("0"), rtol=1e-4, atol=1e-5)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trained == adapter.trainable_count


def test_psoft_starts_at_the_factors_of_peft_up_to_sign_and_their_scale():
    adapter, factors, layer, *_ = pair(svdpeft.PSOFT(rank=4), psoft_alpha=12)
    sign = signs(factors, layer)
    _, left = layer._get_psoft_ab_cache_buffers("default")
    # theirs divide Σ_r by α/r and multiply the update by it again
    torch.testing.assert_close(left * 12 / 4, factors.L * sign, rtol=1e-4, atol=1e-5)
    assert adapter.sites["0"].method.scale == 1


@pytest.mark.parametrize(("theirs_count", "terms"), [(3, 2), (4, 2), (5, 3), (6, 4), (8, 6)])
def test_neumann_series_of_peft_counts_its_terms_otherwise(theirs_count, terms):
    """Theirs of 5 is I + 2Q + 2Q² + 2Q³ + Q⁴ = (I + Q)(I + Q + Q² + Q³); of 4 it is that of 3."""
    method = svdpeft.PSOFT(rank=4, rotation="neumann", terms=terms)
    _, factors, layer, ours, theirs, x = pair(method, use_cayley_neumann=True, num_cayley_neumann_terms=theirs_count)
    teach(factors, layer)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for k in range(8):
            q = layer.psoft_R["default"]._skew_symmetric()
            series = sum(torch.matrix_power(q, p) for p in range(k + 1))
            same = torch.allclose(
                (torch.eye(4) + q) @ series,
                layer.psoft_R["default"].get_matrix() / layer_vectors(layer),
                rtol=1e-4,
                atol=1e-5,
            )
            assert same == (k == terms)


def layer_vectors(layer):
    """What the two vectors of PEFT multiply its rotation by, entry by entry."""
    inner = layer.psoft_R["default"]
    return inner.vector_b[:, None] * inner.vector_a[None, :]


@pytest.mark.parametrize("bound", [0.3, 0.5, 0.9])
def test_bound_of_peft_on_the_norm(bound):
    """PEFT bounds Q in the Neumann form alone; the library does in both."""
    method = svdpeft.PSOFT(rank=4, rotation="neumann", terms=3, bound=bound)
    _, factors, layer, ours, theirs, x = pair(
        method, use_cayley_neumann=True, num_cayley_neumann_terms=5, cayley_neumann_eps=bound
    )
    teach(factors, layer)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-5)


def test_psoft_trains_as_in_peft():
    """The same loss, the same plain gradient steps, the same outputs."""
    adapter, factors, layer, ours, theirs, x = pair(svdpeft.PSOFT(rank=4), psoft_alpha=32)
    teach(factors, layer)
    target = torch.randn(4, 9, generator=torch.Generator().manual_seed(5))
    before = ours(x).detach()
    for model, parameters in ((ours, adapter.parameters()), (theirs, theirs.parameters())):
        optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
    assert (ours(x) - before).abs().max() > 0.01
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-5)
