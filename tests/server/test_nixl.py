"""Pages sent by NIXL from a server that prefills to one that decodes. vLLM runs it on a CPU too, where nixl is installed."""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from .answers import story
from .harness import LOSSLESS, Flags, Server, ServerPool, free_port
from .test_parallel import SMALL

ASKED = {"do_remote_decode": True, "do_remote_prefill": False}
NOBODY = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
UNCALIBRATED = json.dumps({"turboquant": {"calibration": "off"}})


def completion(server: Server, prompt: str, tokens: int, **more: Any) -> Any:
    asked = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 1}
    return server.client().completions.create(**asked, extra_body=more)


@pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="nixl, which CUDA machines have, is not installed")
@pytest.mark.parametrize("kv", [LOSSLESS, "turboquant"])
def test_prefilled_elsewhere(kv: str, pool: ServerPool, tiny_models: dict[str, Path], rng: random.Random) -> None:
    """The decoding server's answers are those that the other gives alone, and the prompt came from there."""
    connector = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_both",
        "kv_buffer_device": "cpu",
        "kv_load_failure_policy": "fail",
    }
    extra = (*SMALL, f"--kv-transfer-config={json.dumps(connector)}", f"--additional-config={UNCALIBRATED}")
    one = Flags(tiny_models["llama"], kv, extra=extra)
    ports = [(("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port())),) for _ in range(2)]
    prefills, decodes = pool.get(*(replace(one, environment=port) for port in ports))
    for words in (30, 90):
        prompt = story(rng, words)
        sent = completion(prefills, prompt, 1, kv_transfer_params=ASKED | NOBODY).kv_transfer_params
        there = completion(decodes, prompt, 24, kv_transfer_params=sent).choices[0].logprobs
        assert there.tokens == completion(prefills, prompt, 24).choices[0].logprobs.tokens
    assert decodes.metric("vllm:external_prefix_cache_hits_total") > 120
