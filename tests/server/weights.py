"""Random weights: for vLLM's ``load_format="dummy"``, whose own are so small that a cache could hold anything; and on disk."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch


def _numbers(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """float32 of ``tensor``'s shape, the same wherever a parameter has this name and shape."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    normal = torch.randn(tensor.shape, generator=generator)
    last = name.rpartition(".")[2]
    if last in ("A", "A_log"):  # rates of decay of state layers; A is -exp(A_log)
        rates = normal.abs() + 0.1
        return -rates if last == "A" else rates.log()
    if last == "dt_bias":
        return normal * 0.5 - 2
    if tensor.ndim < 2 or "norm" in name:
        kept = tensor.float().cpu()  # a norm that is left out is one or zero, by how the model counts it
        return kept + 0.1 * normal if "norm" in name else normal
    if "embed" in name:
        return normal
    if last == "scales":  # of codes from -8 to 7, whose root mean square is 4.6
        return (normal.abs() + 0.5) * 0.2 / (tensor.shape[0] * 128) ** 0.5
    # Attention that looks somewhere: logits of a few units.
    return normal * (1.5 if "q" in last or "attn" in name else 1.0) / tensor.shape[-1] ** 0.5


def fill(model: torch.nn.Module) -> None:
    """Overwrites all floating-point parameters, and packed codes of quantised weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.copy_(_numbers(name, parameter))
            elif not name.endswith("g_idx"):  # in which group a row is
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.copy_(torch.randint(-(2**31), 2**31, parameter.shape, generator=generator))


def amplify(model: torch.nn.Module, factors: dict[str, float]) -> None:
    """Multiplies parameters by factors, by what their names contain."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for part, factor in factors.items():
                if part in name:
                    parameter.mul_(factor)


def install() -> None:
    """In this process every dummy load fills its model so; ``amplified`` in its configuration is asked for louder parameters."""
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    def load_weights(self: object, model: torch.nn.Module, model_config: Any) -> None:
        fill(model)
        amplify(model, getattr(model_config.hf_config, "amplified", {}))

    DummyModelLoader.load_weights = load_weights  # type: ignore[method-assign]


def real_weights(root: Path, vocabulary: int, layers: int = 2) -> str:
    """On disk, where they can be read again, and by processes that ``install`` does not reach."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(root / "real")
    return str(root / "real")


def adapter(root: Path) -> str:
    """Low-rank changes of what attention reads and writes."""
    from safetensors.torch import save_file

    folder = root / "adapter"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(2):
        for name, width in (("q_proj", 256), ("k_proj", 128), ("v_proj", 128)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, 64, generator=generator) / 8
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(width, 8, generator=generator) / 2
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)
