"""Against the servers of vLLM and llama.cpp, where their programs are on the PATH: what they answer over HTTP with an
exported adapter is what the adapted model says.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import torch
from gguf_base import dequantised, smollm2
from test_gguf import tuned

import svdpeft

__all__ = ["smollm2"]  # a fixture
NEW = 12  # tokens of an answer, none of which ends it


def program(name):
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not on the PATH")


@contextlib.contextmanager
def serving(command, log):
    """A server that answers at the address which is yielded."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    few = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(log, "w") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=out,
            stderr=out,
            env=few,
            start_new_session=True,
        )
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-3000:]
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"{address}/health", timeout=5)
                    break
                time.sleep(0.5)
            else:
                pytest.fail(f"no answer in five minutes: {log.read_text()[-3000:]}")
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            process.wait(60)


def ask(address, path, **what):
    request = urllib.request.Request(address + path, json.dumps(what).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


@torch.no_grad()
def said(model, ids):
    """The log-probabilities of the tokens that follow."""
    return model(torch.tensor([ids])).logits[0, -NEW - 1 : -1].double().log_softmax(-1)


def holds(answers, model, adapter, ids):
    """That the tokens are the greedy ones, and their log-probabilities those of the model with or without the adapter.

    The bound is a share of how far the other one's are, which zeros exceed a hundred times.
    """
    for enabled, (tokens, logprobs) in answers.items():
        adapted = said(model, [*ids, *tokens])
        with adapter.disabled():
            base = said(model, [*ids, *tokens])
        ours, other = (adapted, base) if enabled else (base, adapted)
        assert tokens == ours.argmax(-1).tolist(), f"adapted: {enabled}"
        chosen = torch.arange(NEW), torch.tensor(tokens)
        off = (torch.tensor(logprobs) - ours[chosen]).norm() / (other - ours)[chosen].norm()
        assert off < 1e-3, f"adapted: {enabled}: off by {off:.1e} of the change"
    assert answers[True][0] != answers[False][0], "the adapter changes no token"


@contextlib.contextmanager
def tuned_on(loaded):
    adapter = tuned(loaded.model, svdpeft.SORSA(rank=4, driver="randomized"), [r".*layers\.\d+\..*_proj"])
    try:
        yield adapter, loaded.processor("The old king had three daughters, and the youngest")["input_ids"]
    finally:
        adapter.detach()


@program("vllm")
def test_vllm_serves_base_and_adapter(smollm2, tmp_path):
    _, loaded = smollm2
    base, answers = tmp_path / "base", {}
    loaded.model.save_pretrained(base)
    loaded.processor.save_pretrained(base)
    with tuned_on(loaded) as (adapter, ids):
        svdpeft.export_lora(adapter, tmp_path / "lora")
        command = ["vllm", "serve", str(base), "--enable-lora", "--max-lora-rank", "16"]
        command += ["--lora-modules", f"mine={tmp_path / 'lora'}", "--dtype", "float32", "--max-model-len", "64"]
        with serving([*command, "--enforce-eager"], tmp_path / "log") as address:
            for enabled, name in ((True, "mine"), (False, str(base))):
                options = {"max_tokens": NEW, "temperature": 0, "logprobs": 0}
                options["return_tokens_as_token_ids"] = True
                answer = ask(address, "/v1/completions", model=name, prompt=ids, **options)
                found = answer["choices"][0]["logprobs"]
                tokens = [int(token.removeprefix("token_id:")) for token in found["tokens"]]
                answers[enabled] = tokens, found["token_logprobs"]
        holds(answers, loaded.model, adapter, ids)
    shutil.rmtree(base)  # half a gigabyte


@program("llama-server")
def test_llama_cpp_serves_base_and_adapter(smollm2, tmp_path):
    path, loaded = smollm2
    base, answers = tmp_path / "base.gguf", {}
    dequantised(path, base)
    with tuned_on(loaded) as (adapter, ids):
        svdpeft.export_gguf(adapter, tmp_path / "adapter.gguf", dtype="f32")
        command = ["llama-server", "-m", str(base), "--lora", str(tmp_path / "adapter.gguf")]
        command += ["--ctx-size", "64", "--cache-type-k", "f32", "--cache-type-v", "f32"]
        command += ["--flash-attn", "off"]  # which computes in half precision
        with serving(command, tmp_path / "log") as address:
            for enabled, scale in ((True, 1.0), (False, 0.0)):
                options = {"n_predict": NEW, "temperature": 0, "n_probs": 1}
                answer = ask(address, "/completion", prompt=ids, lora=[{"id": 0, "scale": scale}], **options)
                found = answer["completion_probabilities"]
                answers[enabled] = [each["id"] for each in found], [each["logprob"] for each in found]
        holds(answers, loaded.model, adapter, ids)
    base.unlink()  # half a gigabyte
