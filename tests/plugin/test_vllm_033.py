"""The tests of this folder once more, on the Python code of vLLM 0.33, in a process of its own.

``make test`` unpacks that code. It has no compiled parts, so what needs a kernel or a server runs on the installed vLLM only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from .conftest import require_033

HERE = Path(__file__).parent
FILES = (
    "registration",
    "arguments",
    "selection",
    "summary",
    "planning",
    "planner",
    "views",
    "offloading",
    "refusals",
    "rotary",
    "key_noise",
    "calibration",
    "calibration_run",
    "deploy",
)


# 0.33's parser takes any name, so an unsupported version ends in a traceback of its configuration.
UNSUPPORTED = """
import sys, vllm
vllm.__version__ = "0.34.1"
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args()
EngineArgs.from_cli_args(parsed).create_engine_config()
"""


@pytest.fixture
def environment() -> dict[str, str]:
    """That of a process in which ``import vllm`` finds 0.33."""
    code = require_033()
    return {
        **os.environ,
        "PYTHONPATH": str(code),
        "VLLM_TARGET_DEVICE": "cpu",
        "TURBOQUANT_TEST_EXPECTS": "0.33",
    }


def test_vllm_033(tmp_path: Path, environment: dict[str, str]) -> None:
    report = tmp_path / "report.xml"
    files = [str(HERE / f"test_{name}.py") for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-20000:]
    suite = ElementTree.parse(report).getroot()[0]
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    print(f"vLLM 0.33: {counts}")
    assert counts["failures"] == counts["errors"] == counts["skipped"] == 0
    assert counts["tests"] > 100


def test_unsupported_version_has_the_last_word(environment: dict[str, str], models: dict[str, str]) -> None:
    options = ["--model", models["llama"], "--skip-tokenizer-init", "--kv-cache-dtype", "turboquant"]
    command = [sys.executable, "-c", UNSUPPORTED, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "Traceback" in done.stderr, "vLLM refuses by itself now: is the sentence at exit still needed?"
    last = done.stderr.strip().splitlines()[-1]
    for part in ("vllm: error: ", "vLLM 0.34.1 is not supported", "--kv-cache-dtype turboquant is not", "pip install"):
        assert part in last, done.stderr[-2000:]
