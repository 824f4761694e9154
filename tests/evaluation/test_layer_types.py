"""Models whose layers turn keys differently, as Gemma 3's windows and full attention do."""

import pytest
import torch

from vllm_turboquant.evaluation.calibrate import calibrate
from vllm_turboquant.evaluation.codecs import Case
from vllm_turboquant.evaluation.model import EvaluatedModel
from vllm_turboquant.evaluation.run import divergences
from vllm_turboquant.kernels.statistics import bucket_shifts, bucket_tokens, shifts

from .conftest import HEADS, KV_HEADS, VOCABULARY, D, Letters

transformers = pytest.importorskip("transformers")
THETAS = {"sliding_attention": 100.0, "full_attention": 10000.0}


@pytest.fixture
def gemma(tmp_path, monkeypatch):
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * D,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=D,
        query_pre_attn_scalar=D,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in THETAS.items()},
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    built = transformers.Gemma3ForCausalLM(config)
    with torch.no_grad():
        for layer in built.model.layers:
            layer.post_attention_layernorm.weight.fill_(20.0)  # beside embeddings that would drown what attention says
    built.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: Letters())
    return EvaluatedModel(str(tmp_path), "cpu")


@pytest.mark.parametrize("kind", THETAS)
def test_each_kind_turns_by_its_own_angles(gemma, kind):
    (turn,) = gemma.turns([7], kind)
    angles = 7 * THETAS[kind] ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)
    # fp32 angles up to 7.
    assert torch.allclose(turn.diagonal()[: D // 2], angles.cos(), atol=1e-5)
    assert torch.allclose(turn[: D // 2, D // 2 :].diagonal(), -angles.sin(), atol=1e-5)


def test_it_is_calibrated_and_evaluated(gemma, seed):
    rng = torch.Generator().manual_seed(seed)
    ids = [torch.randint(VOCABULARY, (96,), generator=rng) for _ in range(4)]
    gemma.subtract_key_bias(96)  # of which there is none
    bases = calibrate(gemma, 96, ids[2:])
    cases = [Case("auto"), Case("turboquant-k2v2"), Case("turboquant-k2v2", calibrated=True), Case("turboquant")]
    auto, plain, calibrated, finer = (x.figures()["kl"] for x in divergences(gemma, cases, ids[:2], bases))
    print(f"KL at 2 bits {plain:.4f}, calibrated {calibrated:.4f}; at 4 bits {finer:.4f}")
    # Of random keys there is nothing to learn.
    assert auto == 0 and 0 < finer < plain / 4 and 0 < calibrated < 1.5 * plain
    inside = bucket_shifts(96, 96)
    for layer, (statistics, basis) in enumerate(zip(gemma.statistics(ids[2:]), bases, strict=True)):
        kind = gemma.model.config.layer_types[layer]
        buckets = torch.stack([torch.stack(gemma.turns(bucket, kind)).mean(0) for bucket in inside])
        own = statistics.spread(gemma.turns(shifts(96), kind), buckets, bucket_tokens(96)).basis()
        assert torch.equal(own.forward, basis.forward) and torch.equal(own.means, basis.means)
