"""Whole models of vLLM run without KV cache, as calibration runs them, and what a worker's start does with its files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .conftest import EngineConfig

COMMON = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # ten times the usual spread: attention must matter
    "tie_word_embeddings": False,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    # Soft cap in all layers, a window in every other one.
    "gemma2": (
        "Gemma2Config",
        {"attn_logit_softcapping": 2.0, "sliding_window": 40, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    ),
}
Load = Callable[..., SimpleNamespace]


@pytest.fixture
def load(
    one_rank: None, engine_config: EngineConfig, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Load:
    """``load(kind, seed, **engine_args)``: a worker as calibration sees it, and transformers' model with the same weights."""
    import transformers
    from vllm import envs
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    from vllm_turboquant import calibration, calibration_run

    recipe = replace(calibration_run.RECIPE, tokens=512, sequence=256)  # a tiny model needs no more, and is started often
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's CPU worker has it
    monkeypatch.setattr(calibration_run, "RECIPE", recipe)
    monkeypatch.setattr(calibration, "RECIPE", recipe)
    monkeypatch.setattr(envs, "VLLM_CACHE_ROOT", str(tmp_path / "cache"), raising=False)

    def create(kind: str, seed: int, calibration: str = "auto", **arguments: Any) -> SimpleNamespace:
        name, options = KINDS[kind]
        torch.manual_seed(seed)
        folder = tmp_path / f"{kind}-{seed}"
        if not folder.exists():
            made = getattr(transformers, name)(**COMMON | options)
            reference = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
            if kind == "qwen2":
                for layer in reference.model.layers:
                    torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=20.0)
            reference.save_pretrained(folder)
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        models[folder.name] = str(folder)
        config = engine_config(
            folder.name,
            dtype="float32",
            max_model_len=1024,
            additional_config={"turboquant": {"calibration": calibration}},
            # The unpacked 0.33 has no compiled operators.
            compilation_config={"custom_ops": ["none"]},
            **arguments,
        )
        with set_current_vllm_config(config):
            model = get_model(vllm_config=config)
        runner = SimpleNamespace(get_model=lambda: model)
        return SimpleNamespace(
            vllm_config=config, model_runner=runner, device=torch.device("cpu"), model=model, reference=reference
        )

    return create


def layers(worker: SimpleNamespace) -> dict[str, Any]:
    context = worker.vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in context.items() if hasattr(layer, "impl")}


@pytest.mark.parametrize("skipped", [[], ["1"]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_without_cache_is_the_model(load: Load, kind: str, skipped: list[str], seed: int) -> None:
    """Hidden states after all layers are those of transformers, with uncompressed layers between as well."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    from vllm_turboquant.calibration_run import _Run, _standing_in
    from vllm_turboquant.kernels.statistics import SKIPPED

    worker = load(kind, seed % 1000, kv_cache_dtype_skip_layers=skipped)
    ids = torch.randint(512, (100,), generator=torch.Generator().manual_seed(seed))
    config, run = worker.vllm_config, _Run(set(layers(worker)), set())
    before = {name: layer.impl for name, layer in layers(worker).items()}
    with torch.inference_mode(), set_current_vllm_config(config), _standing_in(run, worker.model, layers(worker)):
        with set_forward_context(None, config, num_tokens=100, skip_compiled=True):
            got = worker.model(input_ids=ids, positions=torch.arange(100), intermediate_tensors=None, inputs_embeds=None)
        expected = worker.reference.model(ids[None]).last_hidden_state[0]
    # fp32 in two orders of summation through three layers.
    assert (got - expected).norm() < 1e-3 * expected.norm()
    assert before == {name: layer.impl for name, layer in layers(worker).items()}, "stand-ins stay behind"
    assert all(one.tokens == 100 - SKIPPED for one in run.statistics.values()) and len(run.statistics) == 3
    assert all(module is not None for module in run.rotary.values())


def test_first_start_calibrates_and_later_ones_load(load: Load, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    from vllm_turboquant.calibration import cache_folder, calibrate_worker

    def start(worker: SimpleNamespace) -> tuple[Path | None, str]:
        caplog.clear()
        path, _ = calibrate_worker(worker)
        return path, "\n".join(record.getMessage() for record in caplog.records if "TurboQuant" in record.getMessage())

    caplog.set_level(logging.INFO, logger="vllm.turboquant")
    logging.getLogger("vllm").addHandler(caplog.handler)
    try:
        worker = load("llama", seed % 1000)
        path, lines = start(worker)
        assert path is not None and path.is_file() and path.parent == cache_folder()
        assert "calibrating keys of 3 layers" in lines and f"kept in {path}" in lines
        first = {name: layer.impl.basis for name, layer in layers(worker).items()}
        again = load("llama", seed % 1000)
        assert start(again) == (path, f"TurboQuant: calibration of 3 layers loaded from {path}.")
        for name, layer in layers(again).items():
            assert torch.equal(layer.impl.basis.forward, first[name].forward)
            assert torch.equal(layer.impl.basis.means, first[name].means) and layer.impl.basis.buckets == 2
        # Broken: one line, and the same again.
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        found, lines = start(load("llama", seed % 1000))
        assert found == path and f"{path} cannot be read" in lines and "calibrating again." in lines
        assert path.read_bytes() == whole, "calibration is not deterministic"
        # Other weights under the same configuration: another file, and this one is refused where it is named.
        other = load("llama", seed % 1000 + 1)
        assert start(other)[0] != path
        from vllm_turboquant.config import TurboQuantError

        with pytest.raises(TurboQuantError, match=r"with other weights; make one with"):
            start(load("llama", seed % 1000 + 1, calibration=str(path)))
        assert start(load("llama", seed % 1000, calibration=str(path)))[0] == path
    finally:
        logging.getLogger("vllm").removeHandler(caplog.handler)


def test_what_each_kind_of_layer_gets(load: Load, seed: int) -> None:
    from vllm_turboquant.calibration import calibrate_worker

    qwen = load("qwen2", seed % 1000)
    assert calibrate_worker(qwen)[0] is not None
    calibrated = {name: layer.impl.basis for name, layer in layers(qwen).items()}
    off = load("qwen2", seed % 1000, calibration="off")
    assert calibrate_worker(off)[0] is None
    for name, layer in layers(off).items():
        basis = layer.impl.basis
        assert basis is not None and basis.means.norm() > 10
        # Without the weights' help the run finds the same mean: its slowly turning part, the other averages out.
        similarity = torch.cosine_similarity(basis.means[:, 0], calibrated[name].means.mean(1), dim=-1)
        assert similarity.min() > 0.9, similarity
        assert (basis.forward @ basis.forward.mT - torch.eye(32)).abs().max() < 1e-5, "more than the plain rotation"
    capped = load("gemma2", seed % 1000)
    assert calibrate_worker(capped)[0] is not None
    for layer in layers(capped).values():
        assert not layer.impl.basis.means.any(), "a soft cap sees a subtracted mean"
    plain = load("llama", seed % 1000, calibration="off")
    assert calibrate_worker(plain)[0] is None
    assert all(layer.impl.basis is None for layer in layers(plain).values())


def test_models_that_cannot_be_run(load: Load, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    from vllm_turboquant.calibration import calibrate_worker, undriveable

    worker = load("llama", seed % 1000)
    config, attention = worker.vllm_config, layers(worker)
    assert undriveable(config, worker.model, attention) is None
    stage = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=2))
    assert undriveable(stage, worker.model, attention) == "pipeline parallelism is not handled"
    worker.model.forward = lambda positions: None  # fails when it is run
    logging.getLogger("vllm").addHandler(caplog.handler)
    try:
        assert calibrate_worker(worker)[0] is None
    finally:
        logging.getLogger("vllm").removeHandler(caplog.handler)
    (line,) = (
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and "TurboQuant" in record.getMessage()
    )
    assert "keys are stored without calibration: the run failed with TypeError" in line
    assert all(layer.impl.basis is None for layer in attention.values())
