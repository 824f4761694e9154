"""How the line that workers log after start-up reaches the process that answers /metrics: by a folder that both know."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

ENVIRONMENT = "TURBOQUANT_STATUS"  # names the folder; processes of the engine inherit it
LABEL = "turboquant"


def open_folder() -> None:
    """Makes the folder, unless a parent process has; it ends with this process."""
    if os.environ.get(ENVIRONMENT):
        return
    folder, owner = tempfile.mkdtemp(prefix="turboquant-"), os.getpid()
    os.environ[ENVIRONMENT] = folder

    def close() -> None:
        if os.getpid() == owner:  # not in a fork
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(close)


def write(name: str, line: str) -> None:
    """Leaves the line of one engine's pipeline stage. Workers on other machines have no such folder."""
    folder = os.environ.get(ENVIRONMENT)
    if folder and os.path.isdir(folder):
        (Path(folder) / name).write_text(line)


def read() -> str:
    """All lines, by engine and stage; empty where no worker of this machine has left one."""
    folder = os.environ.get(ENVIRONMENT)
    lines = [file.read_text() for file in sorted(Path(folder).iterdir())] if folder and os.path.isdir(folder) else []
    return " | ".join(lines)
