"""Unpack the Python part of a vLLM wheel into a folder: `unpack_vllm.py 0.33.0 FOLDER`.

The tests run that version's registration and planning code on the CPU, beside the vLLM that is
installed. The wheel holds CUDA binaries and is deleted again (336 MB; what stays is 54 MB).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def wanted(name: str) -> bool:
    return name.endswith((".py", ".json")) or ".dist-info/" in name


def main(version: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".vllm-wheel-") as scratch:
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
        download += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", scratch]
        subprocess.run([*download, f"vllm=={version}"], check=True)
        (wheel,) = Path(scratch).glob("vllm-*.whl")
        tree = Path(scratch) / "tree"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tree, [name for name in archive.namelist() if wanted(name)])
        shutil.rmtree(target, ignore_errors=True)
        tree.rename(target)
    print(f"vLLM {version}'s Python code is in {target}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
