"""What is kept on disk for later starts, kernels and calibrations: damaged or exposed files are made anew, never used."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_turboquant import calibration
from vllm_turboquant.calibration_file import save
from vllm_turboquant.kernels import private
from vllm_turboquant.kernels.cuda import launch, nvrtc
from vllm_turboquant.kernels.cuda.driver import Device
from vllm_turboquant.kernels.cuda.variant import Options
from vllm_turboquant.kernels.format import page_format

from .test_calibration import IDENTITY, bases  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[2]
CUBIN = b"what the compiler made" * 100
H100 = Device(90, 132, 233472, 232448)
Cache = tuple[Path, Callable[[], bool]]  # a file in it, and whether that is used


@pytest.fixture
def cubins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    compiled: list[int] = []

    def compile_cubin(variant: object, arch: int) -> tuple[bytes, str]:
        compiled.append(arch)
        return CUBIN, ""

    monkeypatch.setattr(nvrtc, "compile_cubin", compile_cubin)
    variant = launch.choose_variant(H100, Options(page_format("turboquant", 64), 16, True, 1, 1))
    assert nvrtc.load_cubin(variant, 90) == CUBIN and compiled == [90]
    (path,) = (tmp_path / "turboquant" / "cubin").iterdir()

    def used() -> bool:
        before = len(compiled)
        assert nvrtc.load_cubin(variant, 90) == CUBIN
        return len(compiled) == before

    return path, used


@pytest.fixture
def calibrations(tmp_path: Path, bases: list[Any], monkeypatch: pytest.MonkeyPatch) -> Cache:  # noqa: F811
    monkeypatch.setattr(calibration, "get_tp_group", lambda: SimpleNamespace(rank_in_group=0))
    path = tmp_path / "turboquant" / "calibration" / IDENTITY.file_name()
    save(path, IDENTITY, bases)

    def used() -> bool:
        found, problem = calibration._load(path, IDENTITY, kept=True)
        if found is None:
            assert problem
            with contextlib.suppress(OSError):  # as a server does that has calibrated again
                save(path, IDENTITY, bases)
        return found is not None

    return path, used


@pytest.fixture(params=("cubins", "calibrations"))
def cache(request: pytest.FixtureRequest) -> Cache:
    found: Cache = request.getfixturevalue(request.param)
    return found


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-20] ^= 4
    path.write_bytes(whole)


def link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def writable(path: Path) -> None:
    path.chmod(0o666)


def writable_folder(path: Path) -> None:
    path.parent.chmod(0o777)


@pytest.mark.parametrize("damage", (cut, empty, flip, link, writable, writable_folder))
def test_damaged_and_exposed_files_are_made_anew(cache: Cache, damage: Callable[[Path], None]) -> None:
    path, used = cache
    assert used()
    damage(path)
    assert not used(), "used although anybody can have made it"
    assert used(), "not made anew"
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600 and stat.S_ISREG(path.lstat().st_mode)
    assert not path.parent.stat().st_mode & 0o022


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_of_another_user_are_made_anew(cache: Cache) -> None:
    path, used = cache
    os.chown(path, 12345, -1)
    assert not used()
    assert used() and path.stat().st_uid == 0
    os.chown(path.parent, 12345, -1)
    assert not used()
    assert not used(), "kept in a folder whose owner can change it"


def test_a_file_is_private_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    private.write(path, lambda scratch: Path(scratch).write_bytes(b"x"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert private.problem(path) is None and private.problem(path.with_name("other")) is None


WRITER = """
import hashlib, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import private
for _ in range(100):
    body = os.urandom(1) * 300000
    private.write(Path(sys.argv[1]), lambda name: Path(name).write_bytes(hashlib.sha256(body).digest() + body))
"""


def test_writers_at_once_leave_whole_files(tmp_path: Path) -> None:
    path, kernels = tmp_path / "cache" / "file", str(Path(private.__file__).parent)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), kernels]) for _ in range(4)]
    seen: set[bytes] = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            whole = path.read_bytes()
            assert hashlib.sha256(whole[32:]).digest() == whole[:32]
            seen.add(whole[:32])
    assert [writer.returncode for writer in writers] == [0] * 4
    assert len(seen) > 1 and os.listdir(path.parent) == [path.name]


def test_nothing_that_users_name_is_unpickled() -> None:
    """No pickle, marshal, shelve or torch.load in what is installed."""
    for file in (*ROOT.glob("vllm_turboquant/**/*.py"), *ROOT.glob("kernels/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}, file
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), file
