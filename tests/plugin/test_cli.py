"""The command itself: help, exit codes, one JSON document on standard output, and what is said where it cannot work."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_turboquant import cli
from vllm_turboquant.budget import Budget
from vllm_turboquant.planner import Plan, Row
from vllm_turboquant.tables import byte_count, gibibytes, plan_text

LLAMA = Path(__file__).parent / "models" / "Llama-3.1-8B"


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "vllm_turboquant.cli", *arguments]
    return subprocess.run(line, env=os.environ | environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ["plan", "doctor", "calibrate", "evaluate"])
def test_help_has_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    examples = capsys.readouterr().out.split("examples:\n")[1].splitlines()
    assert len(examples) >= 2
    for example in examples:
        program, *arguments = example.split()
        assert program == "vllm-turboquant"
        cli._parser().parse_args(arguments)
        cli._parser().parse_args([*arguments, "--json"])


@pytest.mark.parametrize(
    ("text", "bare", "unit"),
    [("80", 80, "GiB"), ("79.1", 79.1, "GiB"), ("80GB", 80e9, "GB"), ("512MiB", 2**29, "MiB"), ("1.5 TiB", 1.5 * 2**40, "TiB")],
)
def test_sizes(text: str, bare: float, unit: str) -> None:
    assert gibibytes(text) == int(bare * 2**30 if text.replace(".", "").isdigit() else bare)
    assert byte_count(text) == int(bare)


@pytest.mark.parametrize("text", ["", "0", "-1", "80XB", "GiB", "1e9", "nan", "1.2.3", "80 gib"])
def test_no_sizes(text: str) -> None:
    for kind in (byte_count, gibibytes):
        with pytest.raises(argparse.ArgumentTypeError, match=r"is not a size; allowed is .* GiB"):
            kind(text)


def test_plan_text() -> None:
    rows = (
        Row("auto", None, None, 1200, 16, 1000.0),
        Row("fp8", problem="no kernel"),
        Row("turboquant", 40000, 10.0, 4000, 16, 250.0),
    )
    budget = Budget(3 * 2**30, 2**30, "parameters", None, 8 * 2**30, 0.75, 2 * 2**30)
    lines = plan_text(Plan("M", "A", 2, 2, 4000, 2048, "gpu", budget, rows, 64)).splitlines()
    assert lines[0] == "M: A, 2 layers, on 2 GPUs, requests of up to 4,000 tokens, steps of up to 2,048"
    assert [line.split()[:1] + line.split()[-1:] for line in lines[3:7]] == [
        ["vLLM's", "0.75"],
        ["weights", "model"],
        ["working", "libraries"],
        ["KV", "estimate"],
    ]
    assert "6.00" in lines[3] and "1.00" in lines[4] and "2.00" in lines[5] and "3.00" in lines[6]
    assert [line.split() for line in lines[9:12]] == [
        ["auto", "1,000", "1.00x", "-", "-"],
        ["fp8", "-", "-", "-", "-"],
        ["turboquant", "250", "4.00x", "40,000", "10.00"],
    ]
    assert lines[12:14] == ["auto: no request of 4,000 tokens fits; --max-model-len 1200 does", "fp8: no kernel"]


def test_plan_prints_one_json_document(plugin: None) -> None:
    done = command("plan", str(LLAMA), "--gpu-memory", "80", "--tp", "2", "--json")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert (found["tensor_parallel_size"], found["max_model_len"], found["budget"]["utilization"]) == (2, 131072, 0.92)
    assert found["rows"][2]["dtype"] == "turboquant"


def test_plan_refuses_in_the_sentence_of_the_server(plugin: None, models: dict[str, str]) -> None:
    done = command("plan", models["mla"], "--gpu-memory", "80")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("vllm-turboquant: error: --kv-cache-dtype turboquant: model ") and "(MLA)" in line


def test_plan_says_what_vllm_refuses(plugin: None) -> None:
    done = command("plan", str(LLAMA), "--gpu-memory", "80", "--tp", "3")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("vllm-turboquant: error: Total number of attention heads (32) must be divisible by")


def test_without_torch(plugin: None, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('no libtorch.so')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = command("plan", str(LLAMA), "--gpu-memory", "80", PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "vllm-turboquant: error: no libtorch.so; vllm-turboquant doctor says what is missing and the cure\n"


@pytest.mark.parametrize("name", ["plan", "calibrate", "evaluate"])
def test_folders_that_do_not_exist(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert cli.main([name, str(missing)]) == 2
    assert capsys.readouterr().err == f"vllm-turboquant: error: MODEL {missing}: there is no such folder\n"


def test_evaluation_of_a_folder_without_weights() -> None:
    done = command("evaluate", str(LLAMA), "--only", "auto", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"vllm-turboquant: error: {LLAMA}: ") and "Traceback" not in done.stderr
