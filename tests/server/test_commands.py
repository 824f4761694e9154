"""``vllm-turboquant plan`` against the lines that vLLM itself writes at start, ``doctor --url`` against real servers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.plugin.test_doctor import doctor
from vllm_turboquant.kernels.format import page_format

from .harness import ENVIRONMENT, Flags, ServerPool
from .test_engines import LLM, run_jobs

MIB = 2**20
MEMORY = LLM["kv_cache_memory_bytes"]
SERVED = ("--max-model-len=4096",)  # vLLM chooses everything else


def planned(model: Path, *options: str) -> dict[str, Any]:
    """By dtype, of the command itself."""
    command = [sys.executable, "-m", "vllm_turboquant.cli", "plan", str(model), "--json", *options]
    environment = os.environ | ENVIRONMENT | {"TURBOQUANT_DEBUG": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return {row["dtype"]: row for row in json.loads(done.stdout)["rows"]}


def test_engines_say_what_was_planned(smollm2: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Full attention, sliding windows, and head sizes mixed within one model; blocks of the user's choice."""
    dtypes = {
        smollm2: ("fp8", "turboquant-k3v3"),
        tiny_models["gemma3"]: ("auto", "turboquant"),
        tiny_models["gemma4"]: ("auto", "turboquant-k8v4"),
    }
    pairs = [(model, dtype) for model, names in dtypes.items() for dtype in names]
    jobs = [
        {
            "name": str(index),
            "prompts": [[1, 2, 3]],
            "max_tokens": 1,
            "llm": LLM | {"model": str(model), "dtype": "bfloat16", "kv_cache_dtype": dtype},
        }
        for index, (model, dtype) in enumerate(pairs)
    ]
    run_jobs(jobs, tmp_path)
    log = (tmp_path / "engines.log").read_text(errors="replace")
    lines = re.findall(r"KV cache size: ([\d,]+) tokens, Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x", log)
    assert len(lines) == len(pairs)
    options = [f"--{name.replace('_', '-')}={LLM[name]}" for name in ("max_model_len", "max_num_batched_tokens", "block_size")]
    plans = {model: planned(model, f"--kv-cache-memory={MEMORY}", "--dtype=bfloat16", *options) for model in dtypes}
    for (model, dtype), (tokens, length, requests) in zip(pairs, lines, strict=True):
        row = plans[model][dtype]
        print(f"{model.name} {dtype}: vLLM {tokens} tokens {requests}x, planned {row['tokens']:,} tokens {row['requests']:.2f}x")
        assert (f"{row['tokens']:,}", f"{row['longest']:,}", f"{row['requests']:.2f}") == (tokens, length, requests)


@pytest.mark.parametrize("dtype", ["auto", "turboquant"])
def test_servers_line_within_one_percent(dtype: str, smollm2: Path, pool: ServerPool) -> None:
    """What vLLM says of its memory is rounded to hundredths of a GiB."""
    (server,) = pool.get(Flags(smollm2, dtype, dtype="bfloat16", extra=SERVED))
    (memory,) = re.findall(r"Available KV cache memory: ([\d.]+) GiB|\(([\d.]+)/[\d.]+\) GiB for KV cache", server.log())[-1:]
    found = planned(smollm2, f"--kv-cache-memory={memory[0] or memory[1]}GiB", *SERVED)[dtype]
    print(f"{dtype}: vLLM {server.cache_tokens():,} tokens of {memory}, planned {found['tokens']:,}")
    assert found["tokens"] == pytest.approx(server.cache_tokens(), rel=0.01)


def test_preset_blocks_and_tokens_of_a_server(smollm2: Path, pool: ServerPool) -> None:
    (server,) = pool.get(Flags(smollm2, "turboquant", dtype="bfloat16", extra=SERVED))
    code, facts, _ = doctor("--url", server.url)
    assert code == 0, facts
    assert {name: fact["state"] for name, fact in facts.items()} == dict.fromkeys(
        ("server", "vllm", "model", "kv cache", "compression"), "ok"
    )
    assert facts["model"]["detail"] == "m, requests of up to 4,096 tokens"
    match = re.fullmatch(r"turboquant: ([\d,]+) blocks of (\d+) tokens, ([\d,]+) tokens", facts["kv cache"]["detail"])
    assert match is not None, facts["kv cache"]
    blocks, size, tokens = (int(number.replace(",", "")) for number in match.groups())
    assert tokens == server.cache_tokens()
    assert tokens == blocks * size  # full attention, and a length of whole blocks
    # Word for word what the server logged: 30 layers of 3 heads of 64 dims.
    told = facts["compression"]["detail"]
    assert f"TurboQuant: {told}\n" in server.log()
    assert told.startswith(
        "turboquant; 30 attention layers compressed (68 bytes per token and KV head of 64 dims); none left out; "
    )
    assert f"; 6,120 instead of 23,040 bytes per token (3.76x); {tokens:,} tokens, 3.7" in told
    assert "; calibrated by " in told


def test_server_of_another_dtype(smollm2: Path, pool: ServerPool) -> None:
    (server,) = pool.get(Flags(smollm2, "auto", dtype="bfloat16", extra=SERVED))
    code, facts, _ = doctor("--url", f"{server.url}/")
    assert code == 1
    assert [name for name, fact in facts.items() if fact["state"] == "failed"] == ["kv cache"]
    assert facts["kv cache"]["detail"].startswith("does not serve turboquant but dtype auto: ")
    assert facts["kv cache"]["cure"] == "start the server with --kv-cache-dtype turboquant"


def ask(server: Any, path: str, accept: str = "*/*") -> tuple[str, str]:
    """Content type and text."""
    request = urllib.request.Request(f"{server.url}{path}", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_status_of_a_compressing_server(smollm2: Path, pool: ServerPool) -> None:
    (server,) = pool.get(Flags(smollm2, "turboquant", dtype="bfloat16", extra=SERVED))
    kind, text = ask(server, "/turboquant")
    assert kind == "application/json"
    status = json.loads(text)
    assert (status["model"], status["preset"], status["stored"]) == ("m", "turboquant", "4-bit keys, 4-bit values")
    assert status["layers"] == {"compressed": 30, "shared": 0, "kept": []}
    calibration = status["calibration"]
    assert (calibration["setting"], calibration["fitted"], calibration["layers"]) == ("auto", True, 30)
    assert re.fullmatch("[0-9a-f]{16}", calibration["fingerprint"])
    # 30 layers of 3 KV heads of 64 dims.
    ours, auto = 90 * page_format("turboquant", 64).slot_bytes, 90 * 2 * 64 * 2
    capacity = status["capacity"]
    assert (capacity["bytes_per_token"], capacity["auto_bytes_per_token"]) == (ours, auto)
    assert capacity["tokens"] == server.cache_tokens()
    assert capacity["auto_tokens"] == pytest.approx(capacity["tokens"] * ours / auto, abs=1)
    assert (status["pool"]["running"], status["pool"]["waiting"]) == (0, 0) and 0 <= status["pool"]["usage"] <= 1
    kind, page = ask(server, "/turboquant", "text/html,application/xhtml+xml")
    assert kind.startswith("text/html")
    for part in (f"{capacity['tokens']:,}", f"{capacity['auto_tokens']:,}", calibration["fingerprint"], "30 compressed"):
        assert part in page
    assert str(smollm2) not in page + text and str(Path.home()) not in page + text
    described = json.loads(ask(server, "/openapi.json")[1])
    answer = described["paths"]["/turboquant"]["get"]["responses"]["200"]["content"]["application/json"]
    assert answer["schema"]["$ref"].endswith("/Status")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_status_in_a_browser(smollm2: Path, pool: ServerPool, tmp_path: Path) -> None:
    """What a person sees while a request runs: the page's own words and bars, nothing that a template or script left open."""
    (server,) = pool.get(Flags(smollm2, "turboquant", dtype="bfloat16", extra=SERVED))
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    with server.client().completions.create(model="m", prompt=[7] * 2000, max_tokens=1500, temperature=0, stream=True) as text:
        next(iter(text))
        # vLLM's counts of running requests and used blocks follow a step behind.
        for _ in range(20):
            if json.loads(ask(server, "/turboquant")[1])["pool"]["usage"] > 0:
                break
            time.sleep(0.5)
        done = subprocess.run([*command, f"{server.url}/turboquant"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    page = done.stdout
    assert "<h1>turboquant</h1>" in page and f"{server.cache_tokens():,}</span> tokens" in page
    assert "1 request running, 0 waiting" in page and "30 compressed" in page
    widths = [float(width) for width in re.findall(r'style="width: ([\d.]+)%', page)]
    assert len(widths) == 3 and widths[0] == 100 and 0 < widths[2] < widths[1] == pytest.approx(100 / 3.76, abs=0.5)
    assert "{{" not in page and "{%" not in page and "<script" not in page


def test_status_of_a_server_that_compresses_nothing(smollm2: Path, pool: ServerPool) -> None:
    (server,) = pool.get(Flags(smollm2, "auto", dtype="bfloat16", extra=SERVED))
    status = json.loads(ask(server, "/turboquant")[1])
    assert (status["kv_cache_dtype"], status["preset"], status["capacity"], status["layers"]) == ("auto", None, None, None)
    assert "nothing is compressed" in ask(server, "/turboquant", "text/html")[1]
