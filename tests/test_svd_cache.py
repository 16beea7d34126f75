"""The folder of decompositions: a hit has the bits of the first computation, and nothing in it can hurt a run."""

import multiprocessing

import pytest
import torch
from torch import nn

import svdpeft
from svdpeft.decomposition import minor_svd, svd, truncated_svd, uncached


def refuse(monkeypatch):
    """Let every computation fail: what comes now comes from the folder."""
    for name in ("full_svd", "leading_triplets"):
        monkeypatch.setattr(svd, name, lambda *a, **k: pytest.fail("computed again"))


@pytest.mark.parametrize("driver", ["exact", "randomized"])
@pytest.mark.parametrize("shape", [(12, 7), (5, 9), (3, 6, 4)])
def test_a_hit_has_the_same_bits(tmp_path, monkeypatch, driver, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain = truncated_svd(w, 3, driver, seed=5)
    with svdpeft.svd_cache(tmp_path):
        cold = truncated_svd(w, 3, driver, seed=5)
        refuse(monkeypatch)
        warm = truncated_svd(w.clone(), 3, driver, seed=5)
    for a, b, c in zip(plain, cold, warm, strict=True):
        assert a.equal(b)
        assert a.equal(c)
        assert c.is_contiguous()


def test_one_exact_file_serves_every_rank_and_the_other_end(tmp_path, monkeypatch):
    w = torch.randn(8, 6)
    expected = truncated_svd(w, 2), truncated_svd(w), minor_svd(w, 2)
    with svdpeft.svd_cache(tmp_path):
        truncated_svd(w, 1)
        refuse(monkeypatch)
        found = truncated_svd(w, 2), truncated_svd(w), minor_svd(w, 2)
    assert len(list(tmp_path.iterdir())) == 1
    assert all(a.equal(b) for x, y in zip(expected, found, strict=True) for a, b in zip(x, y, strict=True))


def test_what_changes_the_result_has_a_file_of_its_own(tmp_path):
    w = torch.randn(8, 6, dtype=torch.float64)
    with svdpeft.svd_cache(tmp_path):
        for count, call in enumerate(
            (
                lambda: truncated_svd(w, 2, "exact"),
                lambda: truncated_svd(w + 1, 2, "exact"),
                lambda: truncated_svd(w.float(), 2, "exact"),
                lambda: truncated_svd(w.reshape(2, 4, 6), 2, "exact"),
                lambda: truncated_svd(w, 2, "randomized"),
                lambda: truncated_svd(w, 3, "randomized"),
                lambda: truncated_svd(w, 2, "randomized", seed=1),
            ),
            start=1,
        ):
            call()
            assert len(list(tmp_path.iterdir())) == count
    truncated_svd(w, 4)
    assert len(list(tmp_path.iterdir())) == count, "outside the block nothing is kept"


def test_a_hit_has_the_bits_of_the_first_computation_not_of_a_new_one(tmp_path, monkeypatch):
    w = torch.randn(8, 6)
    with svdpeft.svd_cache(tmp_path):
        first = truncated_svd(w, 2)
        exact = svd.full_svd
        monkeypatch.setattr(svd, "full_svd", lambda *a: tuple(t * (1 + 1e-6) for t in exact(*a)))  # other threads
        assert all(a.equal(b) for a, b in zip(first, truncated_svd(w, 2), strict=True))
        with uncached():
            assert not first.s.equal(truncated_svd(w, 2).s)


def test_uncached_inside_the_block_reads_and_keeps_nothing(tmp_path):
    with svdpeft.svd_cache(tmp_path):
        with uncached():
            truncated_svd(torch.randn(8, 6), 2)
        assert not list(tmp_path.iterdir())
        truncated_svd(torch.randn(8, 6), 2)
        assert len(list(tmp_path.iterdir())) == 1, "the folder is open again"
    with uncached():
        truncated_svd(torch.randn(8, 6), 2)


def test_a_damaged_file_is_made_anew(tmp_path):
    w = torch.randn(6, 4)
    expected = truncated_svd(w, 2)
    with svdpeft.svd_cache(tmp_path):
        truncated_svd(w, 2)
        (file,) = tmp_path.iterdir()
        whole = file.read_bytes()
        for damaged in (whole[: len(whole) // 2], whole[:-5] + b"\xff" + whole[-4:], b""):
            file.write_bytes(damaged)
            with pytest.warns(RuntimeWarning, match=r"safetensors is damaged, and is computed again"):
                assert truncated_svd(w, 2).u.equal(expected.u)
            assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_a_warning_alone(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("svdpeft.decomposition.cache.save_file", full)
    w = torch.randn(6, 4)
    with svdpeft.svd_cache(tmp_path), pytest.warns(RuntimeWarning, match="No space left"):
        assert truncated_svd(w, 2).u.equal(truncated_svd(w, 2).u)
    with (
        svdpeft.svd_cache(tmp_path, required=True),
        pytest.raises(OSError, match=r"could not be kept in .* No space left"),
    ):
        truncated_svd(w, 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["pissa", "sorsa", "svft", "milora", "mica", "osf", "lora-xs", "psoft"])
def test_attaching_from_the_folder_is_attaching(tmp_path, monkeypatch, name):
    """Methods that take the head of the spectrum, the tail, or all of it: the same factors, without an SVD."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 14))
    method = svdpeft.method(name)()

    def start():
        adapter = svdpeft.attach(model, method, clip_rank=True)
        factors = {key: p.detach().clone() for key, p in adapter.named_parameters()}
        adapter.detach()
        return factors

    plain = start()
    with svdpeft.svd_cache(tmp_path):
        start()
        refuse(monkeypatch)
        warm = start()
    assert plain.keys() == warm.keys()
    assert all(plain[key].equal(warm[key]) for key in plain)


def _fill(folder):
    w = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    with svdpeft.svd_cache(folder):
        for _ in range(20):
            truncated_svd(w, 3)
            for file in folder.glob("[!.]*"):
                file.unlink(missing_ok=True)


def test_processes_share_a_folder(tmp_path):
    workers = [multiprocessing.get_context("spawn").Process(target=_fill, args=(tmp_path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
