"""Layers whose key bias no code can carry: told by weights, served in full precision, named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vllm_turboquant.config import TurboQuantError
from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.format import page_format

from .conftest import EngineConfig
from .refused import FLAG, check_sentence
from .test_rotary import HEAD, qwen2_attention

HEADS, KV_HEADS = 8, 2


def with_biases(config: Any, query: float, key: float, generator: torch.Generator, **options: Any) -> Any:
    """Qwen2's attention whose query and key biases have these lengths in every head."""
    attention = qwen2_attention(config, **options)
    biases = torch.randn(HEADS + 2 * KV_HEADS, HEAD, generator=generator)
    sizes = torch.tensor([query] * HEADS + [key] * KV_HEADS + [0.0] * KV_HEADS)
    attention.qkv_proj.bias.data = (biases / biases.norm(dim=-1, keepdim=True) * sizes[:, None]).flatten()
    return attention


@pytest.mark.parametrize(
    ("preset", "bits"), (("turboquant", 4), ("turboquant-k3v3", 3), ("turboquant-k2v2", 2), ("turboquant-k8v4", 8))
)
def test_noise_is_what_codes_add(plugin: None, preset: str, bits: int, seed: int) -> None:
    """Logits of 4,096 keys of one length, read back from pages."""
    from vllm_turboquant.key_noise import logit_noise

    generator = torch.Generator().manual_seed(seed)
    d, tokens, scale = 128, 4096, 128**-0.5
    query = torch.randn(3, d, generator=generator)
    key = 50 * torch.nn.functional.normalize(torch.randn(tokens, 1, d, generator=generator, dtype=torch.float64), dim=-1)
    fmt = page_format(preset, d)
    cache = torch.zeros(tokens // 16, 1, 16, fmt.slot_bytes, dtype=torch.uint8)
    reference.store(key, key, cache, torch.arange(tokens), fmt)
    read, _ = reference.load_vectors(cache, torch.arange(tokens // 16), fmt)
    noise = ((read - key)[:, 0] @ query.double().T * scale).pow(2).mean(0).sqrt()
    said = logit_noise(query, key[0], scale, bits)
    print(f"{preset}: {noise.tolist()} nats, said {said:.3f}")
    # The scale search of the encoder takes a tenth of the variance off; 4,096 samples add 2%.
    assert 0.85 < float(noise.max()) / said < 1.05


def test_only_what_is_too_loud_is_told(one_rank: None, engine_config: EngineConfig, seed: int) -> None:
    from vllm_turboquant.key_noise import LIMIT, noisy_layers

    generator = torch.Generator().manual_seed(seed)
    config = engine_config()
    # Standard deviations at 4 bits: |q| |k| / sqrt(d) * sqrt(0.0097 / d).
    unit = 0.0097**0.5 / HEAD
    quiet, loud = (
        with_biases(config, size, size, generator, layer=i)
        for i, size in enumerate(map(math.sqrt, (0.9 * LIMIT / unit, 1.1 * LIMIT / unit)))
    )
    normed = with_biases(config, 100, 100, generator, layer=2, norm=True)
    unbiased = with_biases(config, 100, 0, generator, layer=3)
    attentions = {"quiet": quiet, "loud": loud, "normed": normed, "unbiased": unbiased}
    model = torch.nn.ModuleDict(attentions)
    noisy = noisy_layers(model, {name: attention.attn for name, attention in attentions.items()})
    assert noisy.keys() == {"loud"}
    assert 1 < noisy["loud"] / LIMIT < 1.2


def test_it_stays_in_full_precision_and_is_named(one_rank: None, engine_config: EngineConfig, seed: int) -> None:
    from vllm_turboquant.impl import compressed_layers
    from vllm_turboquant.key_noise import keep_exact, noisy_layers
    from vllm_turboquant.summary import layers_of

    generator = torch.Generator().manual_seed(seed)
    config = engine_config()
    attentions = [with_biases(config, 100, size, generator, layer=i) for i, size in enumerate((1.0, 600.0))]
    layers = {attention.attn.layer_name: attention.attn for attention in attentions}
    kept, loud = layers
    line = keep_exact(noisy_layers(torch.nn.ModuleList(attentions), layers), layers, config)
    print(line)
    more = KV_HEADS * (2 * HEAD * config.model_config.dtype.itemsize - page_format("turboquant", HEAD).slot_bytes)
    assert loud in line and kept not in line and f"{more:,} bytes more" in line and "4 bits" in line
    compressed, others = layers_of(config)
    assert compressed == [kept] and others == {"as 4 bits cannot carry their key bias": [loud]}
    assert compressed_layers(config) == [layers[kept].impl]
    assert layers[loud].get_kv_cache_spec(config).dtype == config.model_config.dtype


def test_a_model_without_a_layer_left_is_refused(one_rank: None, engine_config: EngineConfig, seed: int) -> None:
    from vllm_turboquant.key_noise import keep_exact, noisy_layers

    config = engine_config()
    attention = with_biases(config, 100, 600, torch.Generator().manual_seed(seed))
    layers = {"attn": attention.attn}
    with pytest.raises(TurboQuantError) as refusal:
        keep_exact(noisy_layers(attention, layers), layers, config)
    check_sentence(str(refusal.value), (FLAG, "every layer at 4 bits", "--kv-cache-dtype auto."))
