"""``vllm-turboquant calibrate``: a model's first start, ahead of serving."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from vllm import LLM

from .config import AUTO, SETTINGS_KEY
from .kernels.format import DEFAULT_PRESET


def calibrate(engine: dict[str, Any], output: Path | None) -> Path | None:
    """Starts an engine, which calibrates, and ends it. Returns the file, copied to ``output`` if that is given; None where none
    was made, and vLLM's log says why. engine: arguments of `vllm.LLM`."""
    settings = {SETTINGS_KEY: {"calibration": AUTO}}
    llm = LLM(kv_cache_dtype=DEFAULT_PRESET, additional_config=settings, enforce_eager=True, **engine)
    path = llm.collective_rpc("turboquant_calibration")[0]
    llm.llm_engine.engine_core.shutdown()
    if path is None or not Path(path).is_file():
        return None
    if output is None:
        return Path(path)
    _copy(Path(path), output)
    return output.absolute()


def _copy(source: Path, target: Path) -> None:
    """Atomically: a server that starts meanwhile sees all or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        scratch = Path(folder) / target.name
        shutil.copyfile(source, scratch)
        os.replace(scratch, target)
