"""``vllm-turboquant doctor --url`` against real servers."""

from __future__ import annotations

import re
from pathlib import Path

from tests.plugin.test_doctor import doctor

from .harness import Flags, ServerPool


def test_preset_blocks_and_tokens_of_a_server(smollm2: Path, pool: ServerPool) -> None:
    (server,) = pool.get(Flags(smollm2, "turboquant", dtype="bfloat16", extra=("--max-model-len=4096",)))
    code, facts, _ = doctor("--url", server.url)
    assert code == 0, facts
    assert {name: fact["state"] for name, fact in facts.items()} == dict.fromkeys(("server", "vllm", "model", "kv cache"), "ok")
    assert facts["model"]["detail"] == "m, requests of up to 4,096 tokens"
    match = re.fullmatch(r"turboquant: ([\d,]+) blocks of (\d+) tokens, ([\d,]+) tokens", facts["kv cache"]["detail"])
    assert match is not None, facts["kv cache"]
    blocks, size, tokens = (int(number.replace(",", "")) for number in match.groups())
    assert tokens == server.cache_tokens()
    assert tokens == blocks * size  # full attention, and a length of whole blocks


def test_server_of_another_dtype(smollm2: Path, pool: ServerPool) -> None:
    (server,) = pool.get(Flags(smollm2, "auto", dtype="bfloat16", extra=("--max-model-len=4096",)))
    code, facts, _ = doctor("--url", f"{server.url}/")
    assert code == 1
    assert [name for name, fact in facts.items() if fact["state"] == "failed"] == ["kv cache"]
    assert facts["kv cache"]["detail"].startswith("does not serve turboquant but dtype auto: ")
    assert facts["kv cache"]["cure"] == "start the server with --kv-cache-dtype turboquant"
