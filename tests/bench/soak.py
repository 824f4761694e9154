"""A server as installed under mixed load for long: no error, no growth, the same answers after as before.

    python -m tests.bench.soak --minutes 30

Starts `vllm serve` with SmolLM2-135M and a pool that is too small for the load, so that requests are preempted. Clients:
`vllm bench serve` in several ranges of lengths, streams that are closed half-way, requests that make no sense. Memory is watched
from a sixth of the time on. Appends a row to results/soak_<card>.jsonl and ends with exit code 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from vllm.third_party import pynvml

from vllm_turboquant import demo

from ..server.answers import Answer, complete, story
from ..server.harness import Flags, Server
from .clients import give_up, load, senseless
from .rows import append_row, write_row

GROWTH_MIB = 64.0
ANSWERS, TOKENS, GIVING_UP = 16, 64, 4
# Too few tokens for what runs at once.
EXTRA = ("--max-model-len=8192", "--max-num-seqs=128", "--kv-cache-memory-bytes=256M", "--max-num-batched-tokens=2048")
GRAPHS = (
    '--compilation-config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 8, 32, 64, 128]}',
)


def session_of(process: int | str) -> int | None:
    """Of a process, None if it has ended."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[3])
    except (FileNotFoundError, ProcessLookupError):
        return None


def host_mib(session: int) -> float:
    """Memory that the processes of a session have for themselves, pages shared by n counted as one n-th."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            if session_of(folder.name) == session:
                total += int(re.findall(r"^Pss:\s+(\d+)", (folder / "smaps_rollup").read_text(), re.MULTILINE)[0])
    return total / 1024


def card_mib(session: int) -> float:
    """Memory of the first card that the processes of a session have; that all have, where the driver does not tell them apart."""
    if not torch.cuda.is_available():
        return 0.0
    pynvml.nvmlInit()
    card = pynvml.nvmlDeviceGetHandleByIndex(0)
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(card)
    own = sum(process.usedGpuMemory or 0 for process in processes if session_of(process.pid) == session)
    return (own or pynvml.nvmlDeviceGetMemoryInfo(card).used) / 2**20


def watch(server: Server, until: float, warm: float) -> dict[str, float]:
    """MiB on host and card until ``warm``, and by how much they were above that afterwards."""
    assert server.process is not None
    peaks = {name: [0.0, 0.0] for name in ("host", "card")}
    while (now := time.monotonic()) < until:
        for name, mib in (("host", host_mib(server.process.pid)), ("card", card_mib(server.process.pid))):
            peaks[name][now > warm] = max(peaks[name][now > warm], mib)
        time.sleep(5)
    return {f"{name}_mib": round(before) for name, (before, _) in peaks.items()} | {
        f"{name}_growth_mib": round(after - before, 1) for name, (before, after) in peaks.items()
    }


def ask(server: Server, prompts: list[str]) -> list[Answer]:
    """Greedy answers, one after the other; the salt keeps prompts from being found in the prefix cache, as codes."""
    return [complete(server, prompt, TOKENS, cache_salt=uuid.uuid4().hex) for prompt in prompts]


def idle(server: Server) -> float:
    """Waits until nothing runs or waits; the share of the pool's blocks that is still held."""
    for _ in range(120):
        if not server.metric("vllm:num_requests_running") and not server.metric("vllm:num_requests_waiting"):
            return server.metric("vllm:kv_cache_usage_perc")
        time.sleep(0.5)
    raise AssertionError("requests are left over after a minute without clients")


def soak(server: Server, minutes: float, seed: int, folder: Path, share: float) -> dict[str, object]:
    """The row of one soak of a healthy server. share: as of `load`."""
    rng = random.Random(seed)
    prompts = [story(rng, rng.randrange(5, 200)) for _ in range(max(4, round(share * ANSWERS)))]
    before = ask(server, prompts)
    begin = time.monotonic()
    until = begin + 60 * minutes
    with ThreadPoolExecutor(8) as threads:
        watched = threads.submit(watch, server, until, begin + 10 * minutes)
        loaded = threads.submit(load, server, until, seed, folder, share)
        refused = threads.submit(senseless, server, until)
        given_up = [threads.submit(give_up, server, until, seed + i) for i in range(GIVING_UP)]
        row: dict[str, object] = {**watched.result(), **loaded.result(), **refused.result()}
        row["given_up"] = sum(task.result() for task in given_up)
    row["blocks_held"] = idle(server)
    row["preemptions"] = int(server.metric("vllm:num_preemptions_total"))
    row["answers"] = len(prompts)
    row["answers_changed"] = sum(x.tokens != y.tokens for x, y in zip(before, ask(server, prompts), strict=True))
    errors = re.findall(r"^.*(?:ERROR|Traceback|CUDA error).*$", server.log(), re.MULTILINE)
    print(*errors, sep="\n")
    return row | {"errors_logged": len(errors)}


def faults(row: dict[str, object]) -> list[str]:
    """Names of figures that must be zero, or small, and are not."""
    zero = ("failed", "refused_wrongly", "blocks_held", "answers_changed", "errors_logged")
    return [n for n in zero if row[n]] + [n for n in ("host_growth_mib", "card_growth_mib") if float(str(row[n])) > GROWTH_MIB]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kv-cache-dtype", default="turboquant")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**20))
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    flags = Flags(
        demo.ensure(), options.kv_cache_dtype, "bfloat16" if cuda else "float32", EXTRA + (GRAPHS if cuda else ()), 1, not cuda
    )
    with tempfile.TemporaryDirectory() as name:
        server = Server(flags, Path(name) / "server.log")
        server.launch()
        try:
            server.wait_until_healthy()
            row = soak(server, options.minutes, options.seed, Path(name), 1 if cuda else 0.003)
        finally:
            server.stop()
    row = {"dtype": options.kv_cache_dtype, "minutes": options.minutes, "seed": options.seed, **row}
    print(append_row("soak", row) if cuda else write_row("soak_cpu", row), flush=True)
    if wrong := faults(row):
        sys.exit(f"soak: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
