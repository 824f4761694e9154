"""A real server on a card: 256 concurrent requests in a pool that holds a tenth of them, and nothing compiled while serving."""

import os
import random
import statistics
from pathlib import Path

import pytest

from ..server.answers import complete, parting, story
from ..server.harness import LOSSLESS, Flags, ServerPool, side_by_side

pytestmark = pytest.mark.gpu
CONCURRENT, ALONE, TOKENS = 256, 24, 48
EXTRA = (
    "--max-model-len=512",
    "--max-num-batched-tokens=512",
    f"--max-num-seqs={CONCURRENT}",
    "--kv-cache-memory-bytes=1G",
    "--num-gpu-blocks-override=256",
    "--no-enable-prefix-caching",
    # The harness turns torch.compile off; decodes still replay from FULL graphs.
    '--compilation-config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 8, 32, 64]}',
)
# Triton's; the decode of these formats is the CUDA one.
OUR_KERNELS = {"_store_kernel", "_decode_kernel", "_combine_kernel", "_transform_kernel", "_load_context_kernel"}


@pytest.fixture
def servers(tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
    pool = ServerPool(tmp_path)
    yield pool
    pool.close()


def flags(model, kv):
    return Flags(Path(model), kv, dtype="bfloat16", extra=EXTRA, eager=False)


def closeness(alone, together):
    """Share of tokens before answers part, for each answer; and the largest gap of log-probabilities before."""
    shares, gap = [], 0.0
    for a, b in zip(alone, together, strict=True):
        parted = parting(a.tokens, b.tokens)
        common = TOKENS if parted is None else parted
        gap = max([gap, *(abs(x - y) for x, y in zip(a.logprobs[:common], b.logprobs[:common], strict=True))])
        shares.append(common / TOKENS)
    return shares, gap


def burst(server, prompts):
    """Some answers alone, then all at once."""
    alone = [complete(server, prompt, TOKENS) for prompt in prompts[:ALONE]]
    together = side_by_side(*[lambda prompt=prompt: complete(server, prompt, TOKENS) for prompt in prompts])
    assert server.metric("vllm:num_preemptions_total") > 0
    return closeness(alone, together[:ALONE])


def test_preempted_answers_are_as_close_to_solo_ones_as_autos(servers, smollm2, seed):
    rng = random.Random(seed)
    prompts = [story(rng, rng.randrange(5, 30)) for _ in range(CONCURRENT)]
    auto, lossless = servers.get(flags(smollm2, "auto"), flags(smollm2, LOSSLESS))
    results = {server.flags.kv: burst(server, prompts) for server in (auto, lossless)}
    for name, (shares, gap) in results.items():
        print(f"{name}: {statistics.mean(shares):.3f} of tokens as alone, log-probabilities before within {gap:.3f}")
    ours, theirs = results[LOSSLESS], results["auto"]
    # Means of 24 shares; three standard errors of their difference.
    error = (statistics.variance(ours[0]) + statistics.variance(theirs[0])) / ALONE
    assert statistics.mean(ours[0]) >= statistics.mean(theirs[0]) - 3 * error**0.5
    assert ours[1] <= max(0.3, 2 * theirs[1])  # bf16 logits of about 20 are multiples of 1/8


def test_default_preset_survives_and_compiles_nothing_while_serving(servers, smollm2, seed):
    rng = random.Random(seed)
    (server,) = servers.get(flags(smollm2, "turboquant"))

    def compiled():
        """``(folder, kernel)`` of every binary in Triton's cache, ``("cubin", name)`` of every one that NVRTC made."""
        places = (os.environ["TRITON_CACHE_DIR"], os.environ["VLLM_CACHE_ROOT"])
        return {(file.parent.name, file.stem) for place in places for file in Path(place).rglob("*.cubin")}

    before = compiled()
    assert "_store_kernel" in {kernel for _, kernel in before}
    assert len([kernel for folder, kernel in before if folder == "cubin"]) == 5, "decode, context loader, store, two turns"
    shares, _ = burst(server, [story(rng, rng.randrange(5, 140)) for _ in range(CONCURRENT)])
    print(f"turboquant: {statistics.mean(shares):.3f} of tokens as alone")
    late = compiled() - before
    print(f"compiled while serving: {sorted(kernel for _, kernel in late) or 'nothing'}")
    assert not [kernel for folder, kernel in late if folder == "cubin" or kernel in OUR_KERNELS]
