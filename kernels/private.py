"""Files that later processes read: written whole, and used only where nobody else can have made or changed them."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def exposed(found: os.stat_result) -> str | None:
    """How another user can change what a file or folder holds, as the rest of a sentence; None where none but root can."""
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user ({found.st_uid}), who can replace what it holds"
    if found.st_mode & _OTHERS and not found.st_mode & stat.S_ISVTX:
        return "can be written by others"
    return None


def problem(path: Path) -> str | None:
    """Why the file at ``path`` must not be used, as the rest of a sentence; None where it may be, or is not there."""
    try:
        found, folder = os.lstat(path), os.stat(path.parent)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(found.st_mode):
        return "is not a regular file"
    why = exposed(folder)
    return f"lies in a folder that {why}" if why else exposed(found)


def write(path: Path, fill: Callable[[str], object]) -> None:
    """Makes or replaces the file at ``path`` for this user alone; other processes see it before or after, never in between.

    fill: writes the file whose name it is given. Raises OSError, PermissionError where others could change it there.
    """
    folder = path.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = os.stat(folder)
    if found.st_uid == os.geteuid() and found.st_mode & _OTHERS:
        os.chmod(folder, stat.S_IMODE(found.st_mode) & ~_OTHERS)
    why = exposed(os.stat(folder))
    if why is not None:
        raise PermissionError(None, f"{folder} {why}")
    handle, scratch = tempfile.mkstemp(dir=folder, prefix=f".{path.name}-")
    os.close(handle)
    try:
        fill(scratch)
        os.chmod(scratch, 0o600)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)
