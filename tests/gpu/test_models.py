"""Kinds of models on a card: raw numbers in our pages answer as dtype `auto` does, codes nearly.

Each test starts its engines in one process of its own, half a minute for the first: run with ``-n 8``.
"""

import re
import statistics

import pytest

from vllm_turboquant.kernels.format import PRESETS

pytest.importorskip("vllm")

from ..server import images
from ..server.features import SEEING, SKIPPED, UNCALIBRATED
from ..server.shapes import SHAPES
from ..server.test_engines import deviations
from ..server.test_kinds import K4V4, OPTIONS, prompt
from .engines import LOSSLESS
from .tiny_engines import CARD_OPTIONS, GRAPHS, check, check_near, skip_without_large_heads

pytestmark = pytest.mark.gpu
KINDS = (*(kind for kind in SHAPES if kind != "llama"), "jamba")  # llama is in other tests here


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind, engines):
    if kind == "gemma 4":
        skip_without_large_heads()
    engines.each(kind)
    check(engines.run())


@pytest.mark.parametrize("kv", (LOSSLESS, K4V4, "turboquant-k2v2"))
@pytest.mark.parametrize("kind", ("llama", "gemma 3n"))
def test_graphs(kind, kv, engines):
    """Decodes from graphs as without; k2v2 with the newest tokens beside the pages."""
    engines.each(kind, dtypes=(kv,))
    engines.add("graphs", kind, kv, enforce_eager=False, compilation_config=GRAPHS)
    results = engines.run()
    check_near(results["graphs"]["answers"], results[kv]["answers"])


@pytest.mark.parametrize("kv", (LOSSLESS, K4V4))
def test_shared_layers_without_prompts(kv, engines):
    """--kv-sharing-fast-prefill: layers that share a cache see a prompt's last token alone, and read the others' codes."""
    by_position = {"max_model_len": 1024}
    engines.each("gemma 3n", {"given": False}, dtypes=(kv,), **by_position)
    engines.add("fast", "gemma 3n", kv, {"given": False}, kv_sharing_fast_prefill=True, **by_position)
    results = engines.run()
    check_near(results["fast"]["answers"], results[kv]["answers"])


def test_hybrids_start_with_any_preset_and_skipped_layers(engines):
    presets = [preset for preset in PRESETS if preset != K4V4]
    engines.each("qwen 3 next", dtypes=presets)
    options = OPTIONS["qwen 3 next"] | CARD_OPTIONS["qwen 3 next"]
    for skipped in ("1", "3"):
        engines.add(skipped, "qwen 3 next", K4V4, kv_cache_dtype_skip_layers=[skipped], **options)
    results = engines.run()
    for preset in presets:
        assert set(results[preset]["layers"].values()) == {preset}
    for skipped in ("1", "3"):
        assert {str(preset) for preset in results[skipped]["layers"].values()} == {K4V4, "None"}
    assert all(len(answer["tokens"]) == 24 for found in results.values() for answer in found["answers"])


def test_loud_key_biases(engines):
    kind = "gpt-oss, loud key biases"
    engines.add("auto", kind, "auto")
    engines.add("rule", kind, K4V4, **UNCALIBRATED)
    engines.add("by hand", kind, K4V4, kv_cache_dtype_skip_layers=["1"], **UNCALIBRATED)
    results = engines.run()
    (name,) = (name for name, preset in results["rule"]["layers"].items() if preset is None)
    assert ".1." in name
    check_near(results["rule"]["answers"], results["by hand"]["answers"])
    assert statistics.mean(deviations(results, "rule", "auto")) > 0.001  # the other layers' codes: 0.03 and more in float32


@pytest.mark.parametrize("kind", ("awq", "gptq", "fp8"))
def test_quantised_weights(kind, engines):
    engines.each(kind)
    check(engines.run())


def test_images(engines, smollm2):
    folder, image = images.write(engines.root, smollm2)
    before, after = prompt(engines.rng, 9), prompt(engines.rng, 70)
    asked = {"prompts": [[*before, image, *after]] * 2 + [prompt(engines.rng, 60)], "images": [1, 2, None]}
    engines.each("llama", asked, model=folder, **SEEING)
    results = engines.run()
    first, second, _ = results["auto"]["answers"]
    assert first["tokens"] != second["tokens"], "the model does not see"
    check(results)


@pytest.mark.parametrize("skip", SKIPPED)
def test_skipped_layers(skip, engines):
    engines.each("gemma 3", dtypes=("auto",))
    engines.each("gemma 3", dtypes=(LOSSLESS, K4V4), kv_cache_dtype_skip_layers=skip.split())
    results = engines.run()
    check_near(results[LOSSLESS]["answers"], results["auto"]["answers"])
    kept = {int(re.findall(r"\.(\d+)\.", name)[0]) for name, preset in results[K4V4]["layers"].items() if preset is None}
    assert kept == SKIPPED[skip]
