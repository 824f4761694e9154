"""Every start that must be refused, and what the sentence must say. Used by the API tests and the command line tests."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

FLAG = "--kv-cache-dtype turboquant"


@dataclass(frozen=True)
class Refusal:
    """``args``: EngineArgs beside ``kv_cache_dtype="turboquant"``. ``parts``: what the sentence names, in this order."""

    model: str = "llama"
    args: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()


ALLOWED = "allowed are turboquant, turboquant-k8v4, turboquant-k4v3, turboquant-k3v3, turboquant-k2v2, turboquant-k4v4-qjl"
ON_CPU = ALLOWED.replace("allowed are", "allowed on CPU are")


def _name(dtype: str, allowed: str) -> Refusal:
    return Refusal(args={"kv_cache_dtype": dtype}, parts=(f"--kv-cache-dtype {dtype}:", allowed, f"use {FLAG}."))


def _connector(name: str, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"kv_connector": name, "kv_role": "kv_both", **({"kv_connector_extra_config": extra} if extra else {})}


def _calibration(value: object, *parts: str) -> Refusal:
    return Refusal(args={"additional_config": {"turboquant": {"calibration": value}}}, parts=("--additional-config", *parts))


FILES = {"spec_name": "TieringOffloadingSpec", "secondary_tiers": [{"type": "fs", "root_dir": "/no/such"}]}
REFUSALS: dict[str, Refusal] = {
    "wrong preset": _name("turboquant-k9v9", ALLOWED),
    "upper case": _name("turboquant-K8V4", ALLOWED),
    "no hyphen": _name("turboquantk4v3", ALLOWED),
    "underscore": _name("turboquant_4bit", ON_CPU),
    **{f"built-in {name}": _name(f"turboquant_{name}", ON_CPU) for name in ("4bit_nc", "k8v4", "k3v4_nc", "3bit_nc")},
    "MLA": Refusal("mla", {}, (FLAG, "multi-head latent attention", "allowed are models with plain", "--kv-cache-dtype auto.")),
    "encoder-decoder": Refusal("encoder-decoder", {}, (FLAG, "encoder-decoder", "allowed are decoder-only", "auto.")),
    "encoder-only": Refusal("encoder-only", {}, (FLAG, "encoder-only", "auto.")),
    "attention-free": Refusal("attention-free", {}, (FLAG, "no attention layers", "auto.")),
    "ALiBi always": Refusal("alibi-always", {}, (FLAG, "ALiBi", "auto.")),
    "ALiBi configured": Refusal("alibi-configured", {}, (FLAG, "ALiBi", "auto.")),
    "image prefix": Refusal("image-prefix", {}, (FLAG, "multimodal prefix", "--language-model-only", "auto.")),
    "head size 24": Refusal("head-24", {}, (FLAG, "head size 24", "multiples of 16 from 16 to 576", "auto.")),
    "head size 592": Refusal("head-592", {}, (FLAG, "head size 592", "multiples of 16 from 16 to 576", "auto.")),
    "DCP": Refusal(
        args={"decode_context_parallel_size": 2},
        parts=(FLAG, "--decode-context-parallel-size 2", "allowed is 1", "drop --decode-context-parallel-size"),
    ),
    "DCP and TP": Refusal(
        args={"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
        parts=(FLAG, "--decode-context-parallel-size 2", "allowed is 1", "drop --decode-context-parallel-size"),
    ),
    "unknown setting": Refusal(
        args={"additional_config": {"turboquant": {"bogus": 1}}},
        parts=("--additional-config", "'bogus'", "allowed are calibration", "remove"),
    ),
    "settings no object": Refusal(
        args={"additional_config": {"turboquant": [3]}}, parts=("--additional-config", "[3]", "not an object", "calibration")
    ),
    "calibration mode": _calibration("on", "'on'", "neither a mode nor an absolute path", 'allowed are "auto", "off"', "set"),
    "calibration by relative path": _calibration("model.safetensors", "'model.safetensors'", "nor an absolute path", "set"),
    "calibration of no type": _calibration(True, "True", "neither a mode", "set"),
    "calibration file missing": _calibration("/no/such", "/no/such:", "no such file", 'with "vllm-turboquant calibrate"'),
    "calibration file foreign": _calibration(__file__, f"{__file__}:", "cannot be read", 'with "vllm-turboquant calibrate"'),
    "calibration shared": Refusal(
        args={"kv_transfer_config": _connector("ExampleConnector")},
        parts=("--additional-config", "'auto', the default", "--kv-transfer-config", "name it on every server"),
    ),
    "backend": Refusal(
        args={"attention_backend": "FLASH_ATTN"},
        parts=(FLAG, "--attention-backend FLASH_ATTN", "allowed is none", "drop --attention-backend"),
    ),
    "backend in attention config": Refusal(
        args={"attention_config": {"backend": "TRITON_ATTN"}}, parts=(FLAG, "TRITON_ATTN", "drop --attention-backend")
    ),
    "backend per kind": Refusal(
        args={"attention_config": {"backend_per_kind": {"sliding_window": "TRITON_ATTN"}}},
        parts=(FLAG, "TRITON_ATTN", "drop --attention-backend"),
    ),
    "LMCache": Refusal(
        args={"kv_transfer_config": _connector("LMCacheConnectorV1")},
        parts=(FLAG, "--kv-transfer-config", "LMCacheConnectorV1", "use another connector"),
    ),
    "LMCache inside": Refusal(
        args={"kv_transfer_config": _connector("MultiConnector", {"connectors": [_connector("LMCacheMPConnector")]})},
        parts=(FLAG, "--kv-transfer-config", "LMCacheMPConnector", "use another connector"),
    ),
    "another connector": Refusal(
        args={"kv_transfer_config": _connector("MooncakeStoreConnector")},
        parts=(FLAG, "--kv-transfer-config's MooncakeStoreConnector", "another's calibration", "allowed are Example", "auto."),
    ),
    "another connector inside": Refusal(
        args={"kv_transfer_config": _connector("MultiConnector", {"connectors": [_connector("MyConnector")]})},
        parts=(FLAG, "--kv-transfer-config's MyConnector", "another's calibration", "allowed are Example", "auto."),
    ),
    "LMCache offloading": Refusal(
        args={"kv_offloading_size": 1.0, "kv_offloading_backend": "lmcache"},
        parts=(FLAG, "--kv-offloading-backend lmcache", "allowed is native", "use --kv-offloading-backend native"),
    ),
    "tier": Refusal(
        args={"kv_transfer_config": _connector("OffloadingConnector", FILES)},
        parts=(FLAG, "--kv-transfer-config's secondary tier fs", "finds pages whatever", "drop secondary_tiers", "auto"),
    ),
    "tier inside": Refusal(
        args={"kv_transfer_config": _connector("MultiConnector", {"connectors": [_connector("OffloadingConnector", FILES)]})},
        parts=(FLAG, "--kv-transfer-config's secondary tier fs", "finds pages whatever", "drop secondary_tiers", "auto"),
    ),
    "tier without connector": Refusal(
        args={"kv_offloading_size": 1.0, "kv_transfer_config": {"kv_connector_extra_config": FILES}},
        parts=(FLAG, "--kv-transfer-config's secondary tier fs", "finds pages whatever", "drop secondary_tiers", "auto"),
    ),
    "skipped layer that is none": Refusal(
        args={"kv_cache_dtype_skip_layers": ["0", "6"]},
        parts=(
            "--kv-cache-dtype-skip-layers 6:",
            "names no layer",
            "indices from 0 to 5 and sliding_window",
            "correct or drop it",
        ),
    ),
    "skipped kind that is none": Refusal(
        args={"kv_cache_dtype_skip_layers": ["full_attention"]},
        parts=("--kv-cache-dtype-skip-layers full_attention:", "names no layer", "sliding_window", "correct or drop it"),
    ),
    "all layers skipped": Refusal(
        args={"kv_cache_dtype_skip_layers": [str(layer) for layer in range(6)]},
        parts=("--kv-cache-dtype-skip-layers 0 1 2 3 4 5:", "every layer", FLAG, "compress nothing", "name fewer layers"),
    ),
    "all windows skipped": Refusal(
        "windows",
        {"kv_cache_dtype_skip_layers": ["sliding_window"]},
        ("--kv-cache-dtype-skip-layers sliding_window:", "every layer", FLAG, "compress nothing", "name fewer layers"),
    ),
    "skipped layer whose cache another reads": Refusal(
        "sharing",
        {"kv_cache_dtype_skip_layers": ["2"]},
        ("--kv-cache-dtype-skip-layers 2:", "layer 2", "not layer 4", "cache of layer 2", "name 4 too or drop 2."),
    ),
    "skipped layer that reads another's cache": Refusal(
        "sharing",
        {"kv_cache_dtype_skip_layers": ["5"]},
        ("--kv-cache-dtype-skip-layers 5:", "layer 5", "not layer 3", "cache of layer 3", "name 3 too or drop 5."),
    ),
    "draft's preset": Refusal(
        args={"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "kv_cache_dtype": "turboquant-k9v9"}},
        parts=("--kv-cache-dtype turboquant-k9v9", ALLOWED, f"use {FLAG}."),
    ),
    "all attention of a hybrid skipped": Refusal(
        "hybrid",
        {"kv_cache_dtype_skip_layers": ["3", "7"]},
        ("--kv-cache-dtype-skip-layers 3 7:", "every layer", FLAG, "compress nothing", "name fewer layers"),
    ),
    "drafter without causal mask": Refusal(
        args={"speculative_config": {"method": "dflash", "model": "drafter", "num_speculative_tokens": 2}},
        parts=(FLAG, "--speculative-config's method dflash", "without causal mask", "another drafter", "auto"),
    ),
    "drafter without causal mask by its name": Refusal(
        args={"speculative_config": {"model": "org/Model-DFlash-b16", "num_speculative_tokens": 2}},
        parts=(FLAG, "--speculative-config's method dflash", "without causal mask", "another drafter", "auto"),
    ),
    "drafter without causal mask by its flag": Refusal(
        args={"spec_method": "dflash", "spec_model": "drafter", "spec_tokens": 2},
        parts=(FLAG, "--speculative-config's method dflash", "without causal mask", "another drafter", "auto"),
    ),
    "draft's preset with hyphens": Refusal(
        args={"speculative_config": {"method": "ngram", "num-speculative-tokens": 2, "kv-cache-dtype": "turboquant-k9v9"}},
        parts=("--kv-cache-dtype turboquant-k9v9", ALLOWED, f"use {FLAG}."),
    ),
    "diffusion": Refusal("diffusion", parts=(FLAG, "is a diffusion model", "without causal mask", "auto.")),
    "ALiBi by its encoding": Refusal("alibi-encoding", parts=(FLAG, "ALiBi", "auto.")),
    "draft's backend": Refusal(
        args={"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "attention_backend": "FLASH_ATTN"}},
        parts=(FLAG, "FLASH_ATTN", "allowed is none", "drop --attention-backend"),
    ),
}


def check_sentence(text: str, parts: tuple[str, ...]) -> None:
    """One sentence on one line: flag and value first, then why, then what to do."""
    assert "\n" not in text and "Traceback" not in text
    assert re.fullmatch(r"--\S+ .+: .+; .+\.", text), text
    position = 0
    for part in parts:
        found = text.find(part, position)
        assert found >= 0, f"{part!r} is missing, or stands too early, in {text!r}"
        position = found
