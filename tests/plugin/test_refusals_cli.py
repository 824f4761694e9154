"""The real ``vllm serve``: it exits with an error, and its last line is the sentence. Two run at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from .refused import REFUSALS, check_sentence

# Argparse's own error, patch E, vLLM's validation that would come first, settings, and an unsupported vLLM.
CASES: dict[str, list[str]] = {
    "wrong preset": ["--kv-cache-dtype", "turboquant-k9v9"],
    "built-in 4bit_nc": ["--kv-cache-dtype", "turboquant_4bit_nc"],
    "DCP": ["--kv-cache-dtype", "turboquant", "--decode-context-parallel-size", "2"],
    "unknown setting": ["--kv-cache-dtype=turboquant", "--additional-config", '{"turboquant": {"bogus": 1}}'],
    "calibration file missing": [
        "--kv-cache-dtype=turboquant",
        "--additional-config",
        '{"turboquant": {"calibration": "/no/such"}}',
    ],
    "MLA": ["--kv-cache-dtype", "turboquant"],
    "skipped layer that is none": ["--kv-cache-dtype", "turboquant", "--kv-cache-dtype-skip-layers", "0", "6"],
    "LMCache": [
        "--kv-cache-dtype",
        "turboquant",
        "--kv-transfer-config",
        json.dumps(REFUSALS["LMCache"].args["kv_transfer_config"]),
    ],
}
# The command, as an unsupported version would run it: its own code, with another number.
UNSUPPORTED = "import sys, vllm; vllm.__version__ = '0.34.1'; from vllm.entrypoints.cli.main import main; sys.exit(main())"

Outcome = tuple[int, str]


def _run(command: list[str]) -> Outcome:
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
    return done.returncode, f"{done.stdout}\nended after {time.monotonic() - started:.1f} s"


@pytest.fixture(scope="module")
def outcomes(plugin: None, models: dict[str, str]) -> dict[str, Future[Outcome]]:
    vllm = str(Path(sys.executable).with_name("vllm"))
    serve = ["serve", models["llama"], "--skip-tokenizer-init"]
    chosen = {case: models[REFUSALS[case].model] for case in CASES}
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        started = {
            case: pool.submit(_run, [vllm, "serve", chosen[case], *serve[2:], *options]) for case, options in CASES.items()
        }
        command = [sys.executable, "-c", UNSUPPORTED, *serve, "--kv-cache-dtype", "turboquant"]
        started["unsupported version"] = pool.submit(_run, command)
    return started


@pytest.mark.parametrize("case", CASES)
def test_last_line_is_the_sentence(case: str, outcomes: dict[str, Future[Outcome]]) -> None:
    code, output = outcomes[case].result()
    assert code != 0
    *_, last, took = (line for line in output.splitlines() if line.strip())
    print(f"{case}: {took}")  # 6 to 12 s on an idle core, most of it vLLM's imports
    kind, _, sentence = last.partition(" error: ")
    assert kind in ("vllm:", "vllm serve:"), output[-2000:]
    check_sentence(sentence, REFUSALS[case].parts)


def test_unsupported_version_has_the_last_word(outcomes: dict[str, Future[Outcome]]) -> None:
    code, output = outcomes["unsupported version"].result()
    assert code != 0
    *_, last, _ = (line for line in output.splitlines() if line.strip())
    for part in (
        "vllm: error: vllm-turboquant",
        "vLLM 0.34.1 is not supported",
        "--kv-cache-dtype turboquant is not available",
        "supported are vLLM 0.32 and 0.33",
        "pip install",
    ):
        assert part in last, output[-2000:]
