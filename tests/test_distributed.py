"""Two processes on the CPU (gloo): the trainer is transformers' own, so data parallelism must be too."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_trainer import WithLoss, arguments, collate, make
import svdpeft

generator = torch.Generator().manual_seed(1)
data = [{{"x": torch.randn(6, generator=generator), "labels": torch.tensor(i % 3)}} for i in range(16)]
world = int(os.environ.get("WORLD_SIZE", 1))
rank = os.environ.get("RANK", "single")
for mode in {modes!r}:
    model = make(WithLoss)
    model.norm = torch.nn.Identity()  # batch statistics would depend on how the batch is cut
    adapter = svdpeft.attach(model, svdpeft.SORSA(rank=2, gamma=0.05, mode=mode), ["body"], train=["head"])
    options = {{"max_steps": 3, "per_device_train_batch_size": 4 // world, "optim": "sgd", "seed": 3}}
    if world > 1:
        options["ddp_backend"] = "gloo"
    args = arguments({folder!r}, **options)
    trainer = svdpeft.Trainer(model=model, adapter=adapter, args=args, train_dataset=data, data_collator=collate)
    trainer.train()
    torch.save({{n: p.detach().clone() for n, p in adapter.named_parameters()}}, f"{folder}/{{mode}}-{{rank}}.pt")
"""


def launch(script: Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_to_the_weights_of_one(tmp_path):
    modes = ("decoupled", "loss")
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path), modes=modes))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    runs = [launch(script, RANK=str(i), LOCAL_RANK=str(i), **common) for i in range(2)]
    for run in [*runs, launch(script)]:
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 0, output
    for mode in modes:
        single, first, second = (torch.load(tmp_path / f"{mode}-{name}.pt") for name in ("single", "0", "1"))
        assert len(single) == 5  # L, C and A, and the head
        for name, value in single.items():
            assert torch.equal(first[name], second[name]), (mode, name)
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
