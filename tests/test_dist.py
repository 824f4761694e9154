"""What is released: sdist and wheel, and the wheel installed away from the repository beside the vLLM that is here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "kernels", "vllm_turboquant")

INSTALLED = """
import importlib.util, sys
from importlib.metadata import entry_points
from pathlib import Path

site = Path(sys.argv[1])
import vllm_turboquant
assert Path(vllm_turboquant.__file__).is_relative_to(site), vllm_turboquant.__file__
top = importlib.util.find_spec("kernels")  # another project's name, which may be installed
assert top is None or not Path(top.origin or "/").is_relative_to(site), top

(plugin,) = entry_points(group="vllm.general_plugins", name="turboquant")
assert plugin.load() is vllm_turboquant.register
(command,) = entry_points(group="console_scripts", name="vllm-turboquant")
assert Path(command.load().__code__.co_filename).is_relative_to(site)

from vllm.plugins import load_general_plugins
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm_turboquant.kernels.cuda.variant import source
from vllm_turboquant.kernels.format import PRESETS

load_general_plugins()
assert set(PRESETS) <= set(STR_DTYPE_TO_TORCH_DTYPE)
assert "__global__" in source("decode", "context")  # what NVRTC compiles, read from the installation
print("installed")
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Sdist, and the wheel built from it: what the sdist lacks, the wheel lacks. From a copy, which builds write into."""
    folder = tmp_path_factory.mktemp("dist")
    tree = folder / "tree"
    tree.mkdir()
    for name in SOURCES:
        # In vllm_turboquant/ there may be a link to kernels/, for type checkers.
        if (ROOT / name).is_dir():
            skip = ("__pycache__", "kernels") if name == "vllm_turboquant" else ("__pycache__",)
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns(*skip))
        else:
            shutil.copyfile(ROOT / name, tree / name)
    (tree / "tests").mkdir()
    (tree / "tests" / "test_stray.py").touch()
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def tracked(folder: str, package: str) -> set[str]:
    """Files of a source folder by the names that the wheel has them under; what is read on paper is not installed."""
    files = (p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".md")
    return {f"{package}/{p.relative_to(ROOT / folder)}" for p in files if (ROOT / folder / "kernels") not in p.parents}


def test_twine(built: tuple[Path, Path]) -> None:
    out = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *built, cwd=built[0].parent)
    assert out.count("PASSED") == 2, out


def test_wheel_holds_the_package_alone(built: tuple[Path, Path]) -> None:
    wheel = built[1]
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in names if ".dist-info/" not in name}
    expected = tracked("vllm_turboquant", "vllm_turboquant") | tracked("kernels", "vllm_turboquant/kernels")
    assert code == expected
    cuda = {Path(name).name for name in code if name.endswith((".cu", ".cuh"))}
    assert cuda == {p.name for p in (ROOT / "kernels" / "cuda").iterdir() if p.suffix in (".cu", ".cuh")} != set()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_sdist(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked("vllm_turboquant", "vllm_turboquant") | tracked("kernels", "kernels") <= names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert not any(name.startswith("tests") for name in names)


def test_wheel_away_from_the_repository(built: tuple[Path, Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--no-index", "--target", site]
    run(*pip, built[1], cwd=tmp_path)
    assert "installed" in run(sys.executable, "-c", INSTALLED, site, cwd=tmp_path, PYTHONPATH=str(site))
    helped = run(sys.executable, "-m", "vllm_turboquant.cli", "--help", cwd=tmp_path, PYTHONPATH=str(site))
    assert "calibrate" in helped
