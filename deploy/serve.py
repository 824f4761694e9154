"""`make serve`: the demo model in stock vLLM, its KV cache in TurboQuant format.

Starts `vllm serve` as a child, waits until it is healthy, asks one question, shows the answer and
how many tokens the cache holds, and stays up until Ctrl-C. Arguments that it does not know are
handed to `vllm serve`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_turboquant import demo

ON_CPU = version("vllm").endswith("+cpu")
QUESTION = "What is the capital of France?"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
START_TIMEOUT = 600  # seconds; a first start on a GPU compiles and captures graphs

PLUGINS = "turboquant,turboquant-status"  # the second answers GET /turboquant
# What a CPU machine needs besides the model and the dtype.
CPU_ARGS = [
    "--enforce-eager",  # compiling would take longer than this demo runs
    "--max-model-len=4096",
    "--kv-cache-memory-bytes=1G",  # vLLM would take a share of all memory
]
CPU_ENV = {
    # The sampler is compiled even so at the first request for logprobs or penalties: that takes
    # a while, and on a machine without a C++ compiler it kills the engine.
    "TORCH_COMPILE_DISABLE": "1",
}


def server_command(model: Path, dtype: str, port: int, extra: list[str]) -> list[str]:
    vllm = Path(sys.executable).with_name("vllm")
    if vllm.is_relative_to(Path.cwd()):
        vllm = vllm.relative_to(Path.cwd())
    command = [str(vllm), "serve", str(model), "--kv-cache-dtype", dtype, f"--port={port}"]
    return command + (CPU_ARGS if ON_CPU else []) + extra


def request(url: str, body: dict[str, Any] | None = None, timeout: float = 5) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    post = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(post, timeout=timeout) as response:
        return bytes(response.read())


def wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    started = time.monotonic()
    while True:
        waited = time.monotonic() - started
        print(f"\rstarting ... {waited:.0f} s", end="", flush=True)
        # OSError: nobody listens yet, or listens and does not answer yet.
        with contextlib.suppress(OSError):
            request(f"{url}/health")
            print(f"\rhealthy after {waited:.0f} s")
            return
        if server.poll() is not None or waited > START_TIMEOUT:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            reason = "ended before it was" if server.poll() is not None else "did not become"
            raise SystemExit(f"\n{tail}\n\nvllm serve {reason} healthy; its whole log: {log}")
        time.sleep(1)


def ask(url: str, question: str) -> str:
    model = json.loads(request(f"{url}/v1/models"))["data"][0]["id"]
    message = {"role": "user", "content": question}
    body = {"model": model, "messages": [message], "temperature": 0, "max_tokens": 64}
    answer = json.loads(request(f"{url}/v1/chat/completions", body, timeout=300))
    return str(answer["choices"][0]["message"]["content"]).strip()


def slot_bytes(dtype: str, head_size: int) -> int:
    """Bytes of K and V per token and KV head."""
    if dtype == "auto":
        return 2 * head_size * 2  # two vectors of bf16
    from vllm_turboquant.kernels.format import page_format

    return page_format(dtype, head_size).slot_bytes


def cache_memory(log: str) -> int | None:
    """Bytes of the KV cache: vLLM logs what it was told to take (CPU) or what it found free."""
    for pattern in (r"(?:Explicitly|Auto) set \(([\d.]+)/", r"KV cache memory: ([\d.]+) GiB"):
        if found := re.findall(pattern, log):
            return int(float(found[-1]) * 2**30)
    return None


def capacity(model: Path, dtype: str, log: str) -> str:
    """One line: the tokens vLLM says the cache holds, against dtype `auto` in the same memory."""
    found = re.findall(r"KV cache size: ([\d,]+) tokens", log)
    memory = cache_memory(log)
    if not found or not memory:
        return "vLLM's log does not say how many tokens the cache holds"
    tokens = int(found[-1].replace(",", ""))
    config = json.loads((model / "config.json").read_text())
    head_size = config["head_dim"]
    heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    auto = memory // (heads * slot_bytes("auto", head_size))
    return (
        f"{tokens:,} tokens in {memory / 2**30:.2f} GiB "
        f"({slot_bytes(dtype, head_size)} bytes per token and KV head); "
        f"dtype auto would hold {auto:,} ({slot_bytes('auto', head_size)} bytes): "
        f"{tokens / auto:.2f}x"
    )


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and whatever it started: it leads a process group of its own."""
    for sig in ENDING:
        signal.signal(sig, signal.SIG_IGN)  # an impatient second Ctrl-C must not cut this short
    if server.poll() is None:
        print("\nstopping the server ...", flush=True)
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=20)
    with contextlib.suppress(ProcessLookupError):
        for _ in range(30):  # the engine and its workers tidy up after the server has ended
            os.killpg(server.pid, 0)
            time.sleep(0.1)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def refuse_used_port(port: int) -> None:
    """Before anything is started: otherwise somebody else's server would answer /health."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise SystemExit(f"port {port}: {error.strerror}; choose another: make serve PORT=8001") from None


def interrupted(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=int(os.environ.get("PORT", "8000")))
    parser.add_argument("--kv-cache-dtype", default="turboquant")
    parser.add_argument("--once", action="store_true", help="stop after the answer")
    args, extra = parser.parse_known_args()
    refuse_used_port(args.port)

    model = demo.ensure()
    url = f"http://localhost:{args.port}"
    command = server_command(model, args.kv_cache_dtype, args.port, extra)
    env = {"VLLM_PLUGINS": PLUGINS, **(CPU_ENV if ON_CPU else {})}
    log = Path(sys.prefix) / f"serve-{args.port}.log"
    print(f"\n{shlex.join([f'{k}={v}' for k, v in env.items()] + command)}\n", flush=True)

    for sig in ENDING:
        signal.signal(sig, interrupted)
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_healthy(server, url, log)
        print(f"question:  {QUESTION}\nanswer:    {ask(url, QUESTION)}")
        print(f"KV cache:  {capacity(model, args.kv_cache_dtype, log.read_text(errors='replace'))}")
        print(f"status:    {url}/turboquant")
        print(f"log:       {log}")
        if not args.once:
            print(f"serving at {url}/v1 until Ctrl-C", flush=True)
            raise SystemExit(f"vllm serve ended by itself ({server.wait()}); its log: {log}")
    except KeyboardInterrupt:
        pass
    finally:
        stop(server)


if __name__ == "__main__":
    main()
