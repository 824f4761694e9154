"""Clients that a server must outlive: load in mixed lengths, answers given up half-way, requests that make no sense."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from ..server.answers import story
from ..server.harness import Server

# Mean tokens of prompts and outputs, how far from it either may be, requests, how many at once.
LOADS = ((64, 32, 0.9, 3000, 128), (512, 128, 0.9, 1500, 64), (2000, 64, 0.9, 800, 32), (256, 512, 0.5, 800, 96))
# What the body holds beside model, prompt and max_tokens, and the status that says whose fault it is.
SENSELESS: tuple[tuple[dict[str, Any] | str, int], ...] = (
    ("{not json", 400),
    ({"prompt": None}, 400),
    ({"prompt": []}, 400),
    ({"prompt": [10**9]}, 400),
    ({"prompt": "word " * 20_000}, 400),
    ({"max_tokens": -1}, 400),
    ({"max_tokens": "many"}, 400),
    ({"temperature": -1}, 400),
    ({"top_p": 2}, 400),
    ({"n": 0}, 400),
    ({"logprobs": 10**6}, 400),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}}, 400),
    ({"model": "no such model"}, 404),
)


def load(server: Server, until: float, seed: int, folder: Path, share: float) -> dict[str, int]:
    """`vllm bench serve` in one shape after the other until then; what it counted.

    until: of ``time.monotonic``. share: of the requests and of those at once, for servers that are too slow for all.
    """
    total = {"completed": 0, "failed": 0, "output_tokens": 0}
    rounds = 0
    while time.monotonic() < until:
        prompt, output, spread, requests, at_once = LOADS[rounds % len(LOADS)]
        requests, at_once = (math.ceil(share * n) for n in (requests, at_once))
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend=openai", "--model=m"]
        command += [f"--base-url={server.url}", f"--tokenizer={server.flags.model}", "--dataset-name=random", "--ignore-eos"]
        command += [f"--random-input-len={prompt}", f"--random-output-len={output}", f"--random-range-ratio={spread}"]
        command += [f"--num-prompts={requests}", f"--max-concurrency={at_once}", f"--seed={seed + rounds}", "--disable-tqdm"]
        file = folder / f"load-{rounds}.json"
        command += ["--save-result", f"--result-dir={folder}", f"--result-filename={file.name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        result = json.loads(file.read_text())
        total["completed"] += result["completed"]
        total["failed"] += requests - result["completed"]
        total["output_tokens"] += result["total_output_tokens"]
        rounds += 1
    return total


def give_up(server: Server, until: float, seed: int) -> int:
    """Streams that are closed after a few tokens, or before the first; how many."""
    rng, count = random.Random(seed), 0
    while time.monotonic() < until:
        prompt = story(rng, rng.randrange(5, 400))
        stream = server.client().completions.create(model="m", prompt=prompt, max_tokens=400, stream=True)
        for _ in zip(range(rng.choice((0, 1, 5, 60))), stream, strict=False):
            pass
        stream.close()
        count += 1
    return count


def status(server: Server, body: bytes) -> int:
    """Of a completion with this body."""
    request = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.read()
        return error.code


def senseless(server: Server, until: float) -> dict[str, int]:
    """Requests that must be refused, one after the other: how many were, and how many had another status than theirs."""
    total = {"refused": 0, "refused_wrongly": 0}
    while time.monotonic() < until:
        for extra, expected in SENSELESS:
            whole = {"model": "m", "prompt": "Once upon a time", "max_tokens": 4}
            body = extra if isinstance(extra, str) else json.dumps(whole | extra)
            got = status(server, body.encode())
            total["refused" if got == expected else "refused_wrongly"] += 1
            if got != expected:
                print(f"status {got} instead of {expected}: {body[:200]}", flush=True)
            time.sleep(0.2)
    return total
