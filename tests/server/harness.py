"""Real `vllm serve` processes: start, wait for /health, read log and metrics, always end the whole group."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from openai import OpenAI

HOST = "127.0.0.1"
LOSSLESS = "turboquant-debug-lossless"
RECENT = "turboquant-debug-recent"  # with the newest 64 tokens read from beside the pages
START_TIMEOUT = 400  # seconds; 20 to 60 on two idle cores
REQUEST_TIMEOUT = 240  # seconds; no request of the tests takes 60 on two idle cores
MAX_ALIVE = 2  # servers; each of them is bound to one thread
ENVIRONMENT = {
    "TURBOQUANT_DEBUG": "1",  # registers the lossless codec
    "VLLM_PLUGINS": "turboquant,turboquant-status",  # the second only where it is named
    "TORCH_COMPILE_DISABLE": "1",  # the sampler is compiled even with --enforce-eager
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
_PR_SET_PDEATHSIG = 1

T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def end_with_parent() -> None:
    """In the child: a server must not outlive a test run that was killed. vLLM ends its engine on SIGTERM."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass(frozen=True)
class Flags:
    """What tells servers apart. ``kv``: value of --kv-cache-dtype. ``extra``: further arguments of `vllm serve`."""

    model: Path
    kv: str
    dtype: str = "float32"
    extra: tuple[str, ...] = ()
    cores: int = 1  # 2: one tensor-parallel rank a core
    eager: bool = True
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Server:
    flags: Flags
    log_path: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def name(self) -> str:
        return f"{self.flags.kv}/{self.flags.dtype}"

    def client(self) -> OpenAI:
        # No retries: a request that fails once is a failure.
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=REQUEST_TIMEOUT)

    def launch(self) -> None:
        """Must be called in the main thread: the parent-death signal belongs to the thread that forks."""
        flags = self.flags
        command = [
            str(Path(sys.executable).with_name("vllm")),
            "serve",
            str(flags.model),
            f"--kv-cache-dtype={flags.kv}",
        ]
        command += [f"--dtype={flags.dtype}", f"--host={HOST}", f"--port={self.port}", "--served-model-name=m"]
        # vLLM would ask for nearly all memory where no cache size is given, and two servers share it.
        command += ["--gpu-memory-utilization=0.1", *(["--enforce-eager"] if flags.eager else []), *flags.extra]
        environment = (
            {"VLLM_CACHE_ROOT": str(self.log_path.with_suffix(".cache"))} | os.environ | ENVIRONMENT | dict(flags.environment)
        )
        if flags.cores > 1:
            cores = os.environ["TEST_CORES"].split(",") if "TEST_CORES" in os.environ else os.sched_getaffinity(0)
            own = sorted(map(int, cores))
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(own[i % len(own)]) for i in range(flags.cores))
        with self.log_path.open("wb") as output:
            output.write(f"{shlex.join(command)}\n".encode())
            output.flush()
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def wait_until_healthy(self) -> None:
        assert self.process is not None
        started = time.monotonic()
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                    assert answer.status == 200
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass  # nobody listens yet
            waited = time.monotonic() - started
            if self.process.poll() is not None or waited > START_TIMEOUT:
                tail = "\n".join(self.log().splitlines()[-40:])
                raise AssertionError(f"{self.name} is not healthy after {waited:.0f} s; {self.log_path} ends:\n{tail}")
            time.sleep(0.5)
        print(f"{self.name} healthy after {time.monotonic() - started:.0f} s")

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            print(f"{self.name} ignores SIGTERM")
        with contextlib.suppress(ProcessLookupError):  # the whole group is gone, as it should be
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def scrape(self) -> str:
        """What Prometheus reads."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        """The sum of a metric's samples over all labels. KeyError if vLLM does not export it."""
        samples = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", self.scrape(), re.MULTILINE)
        if not samples:
            raise KeyError(name)
        return sum(map(float, samples))

    def cache_tokens(self) -> int:
        """N of the log line `KV cache size: N tokens`."""
        return int(re.findall(r"KV cache size: ([\d,]+) tokens", self.log())[-1].replace(",", ""))


class ServerPool:
    """Servers by their flags; starts what is asked for and stops what was used longest ago."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.alive: OrderedDict[Flags, Server] = OrderedDict()

    def get(self, *wanted: Flags) -> list[Server]:
        """The servers with these flags, all alive at once; the missing ones start side by side."""
        assert len(wanted) <= MAX_ALIVE
        missing = [flags for flags in wanted if flags not in self.alive]
        for old in [flags for flags in self.alive if flags not in wanted]:
            if len(self.alive) + len(missing) <= MAX_ALIVE:
                break
            self.alive.pop(old).stop()
        for flags in missing:
            self.alive[flags] = Server(flags, self.logs / f"server-{time.monotonic_ns()}.log")
            self.alive[flags].launch()
        for flags in missing:
            self.alive[flags].wait_until_healthy()
        for flags in wanted:
            self.alive.move_to_end(flags)
        return [self.alive[flags] for flags in wanted]

    def close(self) -> None:
        while self.alive:
            self.alive.popitem()[1].stop()


def side_by_side(*tasks: Callable[[], T]) -> list[T]:
    """Results of ``tasks``, all started at once."""
    with ThreadPoolExecutor(len(tasks)) as threads:
        return [future.result() for future in [threads.submit(task) for task in tasks]]
