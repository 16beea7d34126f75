"""The benchmark of models that are larger than memory, on a small one: its stages run one after the other."""

from folder_models import SMALL
from transformers import LlamaConfig

from benchmarks import large


def test_every_stage_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "configuration", lambda layers: LlamaConfig(vocab_size=64, dtype="bfloat16", **SMALL))
    monkeypatch.setattr(large, "RANK", 2)
    large.write_base(tmp_path / "base", 1)
    large.write_adapter(tmp_path / "base", tmp_path / "adapter")
    said = {stage.__name__: stage(tmp_path) for stage in large.STAGES}
    sites = 7
    assert said["plan"].startswith(f"{sites} sites, ")
    assert said["merge"].startswith(f"merged {sites} sites")
    assert said["export"].startswith(f"lora: LoRA of {sites} weights, rank 2")
    assert said["extract"].startswith(f"{sites} sites of rank 2")
    assert said["decompose"].startswith(f"{sites} sites: {sites} decomposed")
