"""The part of ``vllm-turboquant doctor`` that looks at what is kept on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from .facts import Fact, ok, warning
from .kernels import private


def cache() -> Fact:
    """A server starts without, and calibrates and compiles at every start."""
    from vllm import envs

    root = Path(envs.VLLM_CACHE_ROOT).expanduser()
    folder = root / "turboquant"
    cure = "make it a folder that this user alone can write, or set VLLM_CACHE_ROOT"
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        again = "nothing is kept: every start calibrates and compiles again"
        return warning("cache folder", f"{folder} cannot be written ({error.strerror}); {again}", cure)
    for own in (root, folder, *(child for child in folder.glob("*") if child.is_dir())):
        if own.exists() and (problem := private.exposed(own.stat())):
            return warning("cache folder", f"{own} {problem}", f"chown it to this user and chmod go-w {own}")
    return ok("cache folder", str(folder))


def calibrations() -> Iterator[Fact]:
    from tqdm import tqdm

    from .calibration import cache_folder

    try:
        files = sorted(cache_folder().glob("*.safetensors"))
    except OSError:
        return  # the fact before says so
    if not files:
        yield ok("calibration", "none yet: a model's first start makes one")
    for path in tqdm(files, "calibration files", leave=False, disable=None):
        yield _calibration(path)


def _calibration(path: Path) -> Fact:
    from .calibration_file import FORMAT, CalibrationFileError, load, read_identity

    exposed = private.problem(path)
    if exposed is not None:
        return warning("calibration", f"{path} {exposed}", "delete it: the next start makes a new one")
    try:
        identity = read_identity(path)
        for rank in range(identity.ranks):
            load(path, rank)
    except CalibrationFileError as error:
        return warning("calibration", f"{path} {error}", "delete it: the next start makes a new one")
    made = f"{identity.model}, {len(identity.layers)} layers, up to {identity.positions} tokens, {identity.ranks} rank(s)"
    return ok("calibration", f"{path.name}: {made}, format {FORMAT}")
