"""`make load`: the CPU-size sweep with real servers, its page; the parameter files against vLLM's own parsers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from deploy.load.report import FIGURES, page
from tests.server.harness import free_port
from vllm_turboquant.config import is_ours
from vllm_turboquant.kernels.format import PRESETS

from .commands import DEPLOY

ROOT = DEPLOY.parent
SIZES = ("cpu", "card")
WHERE = {"device": "NVIDIA Test", "vllm": "0", "torch": "1", "vllm-turboquant": "2"}
PARSE = """
import json, sys
from vllm.benchmarks.serve import add_cli_args
from vllm.benchmarks.sweep.param_sweep import ParameterSweep
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

load_general_plugins()
serve, bench = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()), FlexibleArgumentParser()
add_cli_args(bench)
found = {}
for size in sys.argv[2:]:
    servers, loads = (ParameterSweep.read_json(f"{sys.argv[1]}/{size}/{name}.json") for name in ("serve", "bench"))
    read = [serve.parse_args(item.apply_to_cmd(["--model", "m"])).kv_cache_dtype for item in servers]
    asked = [vars(bench.parse_args(item.apply_to_cmd(["--dataset-name", "random"]))) for item in loads]
    keys = ("max_concurrency", "num_prompts", "random_input_len", "random_output_len")
    found[size] = read, [[a[key] for key in keys] for a in asked]
print(json.dumps(found))
"""


def test_parameters_are_vllms_own() -> None:
    """Both sizes compare with `auto`, ask for as many requests as run at once or more, and name presets that there are."""
    command = [sys.executable, "-c", PARSE, DEPLOY / "load", *SIZES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"VLLM_PLUGINS": "turboquant"})
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for size in SIZES:
        dtypes, loads = found[size]
        assert dtypes[0] == "auto" and "turboquant" in dtypes and set(filter(is_ours, dtypes)) <= set(PRESETS)
        assert loads == sorted(loads) and all(requests >= users for users, requests, *_ in loads)
        assert len({(shape_in, shape_out) for *_, shape_in, shape_out in loads}) == 1


def run_of(dtype: str, users: int, **figures: float) -> dict[str, Any]:
    shape = {"random_input_len": 4096, "random_output_len": 256, "model_id": "somewhere/Model"}
    return {"kv_cache_dtype": dtype, "max_concurrency": users, "completed": 8, "failed": 0, **shape, **figures}


def test_page_of_given_runs(tmp_path: Path) -> None:
    """Medians of the runs, ratios to `auto` under the same load, pictures that exist; a dtype without its `auto` has no ratio."""
    keys = [key for _, key, _ in FIGURES]
    runs = {
        "a": [run_of("auto", 16, **dict.fromkeys(keys, speed)) for speed in (100.0, 300.0, 110.0)],
        "b": [run_of("turboquant", 16, **dict.fromkeys(keys, 275.0))],
        "c": [run_of("turboquant", 512, **dict.fromkeys(keys, 50.0)) | {"failed": 3}],
    }
    for name, found in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(found))
    (tmp_path / "median_ttft_ms.png").touch()
    text = page(tmp_path, WHERE)
    assert "# Load test: Model\n" in text and "NVIDIA Test, vLLM 0, torch 1" in text and "On a CPU" not in text
    assert "On a CPU the plugin" in page(tmp_path, WHERE | {"device": "CPU (x86_64)"})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]
    assert [row[:4] for row in rows] == [
        ["16", "`auto`", "24", "0"],
        ["16", "`turboquant`", "8", "0"],
        ["512", "`turboquant`", "8", "3"],
    ]
    assert [row[4] for row in rows] == ["110.0", "275.0 (2.50x)", "50.0"]
    assert re.findall(r"\]\((.*?)\)", text) == ["median_ttft_ms.png"]


def test_page_without_results_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, DEPLOY / "load" / "report.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr == f"{tmp_path}: no results of vllm bench sweep serve; run make load first\n"


@pytest.mark.server
@pytest.mark.skipif("+cpu" not in version("vllm"), reason="this load test is for CPUs; `make load` on a GPU is for people")
def test_load_of_cpu_size(tmp_path: Path) -> None:
    """The target itself. Every request is answered under either dtype, and the page says what vLLM's client measured."""
    arguments = [f"LOAD_RESULTS={tmp_path}", f"PORT={free_port()}", "LOAD=cpu", "MODEL="]
    done = subprocess.run(["make", "load", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = {path: json.loads(path.read_text()) for path in (tmp_path / "cpu").glob("*/summary.json")}
    loads = json.loads((DEPLOY / "load" / "cpu" / "bench.json").read_text()).values()
    asked = {(dtype, load["max_concurrency"]): load["num_prompts"] for dtype in ("auto", "turboquant") for load in loads}
    runs = {(run["kv_cache_dtype"], run["max_concurrency"]): run for (run,) in found.values()}
    assert {key: (run["completed"], run["failed"]) for key, run in runs.items()} == {key: (n, 0) for key, n in asked.items()}
    text = (tmp_path / "cpu" / "report.md").read_text()
    assert all(f"| {run['output_throughput']:.1f}" in text for run in runs.values()) and "On a CPU" in text
