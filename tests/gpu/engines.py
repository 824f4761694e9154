"""Engines in processes of their own, results shared between test workers: run with ``-n 6`` to start several at once."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

LOSSLESS = "turboquant-debug-lossless"
RECENT = "turboquant-debug-recent"  # with the newest 64 tokens read from beside the pages
ROOT = Path(__file__).parents[2]


def run_job(job):
    """The result of run_llm.py for ``job``; raises AssertionError with the end of its output."""
    command = [sys.executable, str(Path(__file__).with_name("run_llm.py")), json.dumps(job)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    child = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    lines = [line for line in child.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"engine failed:\n{child.stdout[-3000:]}\n{child.stderr[-6000:]}"
    return json.loads(lines[0].removeprefix("RESULT "))


def shared_folder(tmp_path_factory):
    """One folder for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def job_result(folder, job):
    """`run_job`, run by the first process that asks for this job; a failure is not kept."""
    path = folder / f"{hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]}.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            path.write_text(json.dumps(run_job(job)))
    return json.loads(path.read_text())
