"""SmolLM2's real weights on a card: what the codes cost, and how far greedy texts are `auto`'s."""

import random
from concurrent.futures import ThreadPoolExecutor
from statistics import mean

import pytest
import torch

from vllm_turboquant.evaluation import Case, EvaluatedModel
from vllm_turboquant.evaluation.run import divergences
from vllm_turboquant.kernels.format import PRESETS

from .engines import LOSSLESS, job_result

pytestmark = pytest.mark.gpu
TEXTS, LENGTH = 64, 384
LONG_TEXTS, LONG_LENGTH = 16, 1200  # over three buckets of positions
# fp16 on both sides: bf16's own rounding would be a tenth of the best preset's loss.
EAGER = {"enforce_eager": True, "dtype": "float16", "max_num_seqs": TEXTS}
EAGER |= {"kv_cache_memory_bytes": 2**31}  # all texts at once even in the lossless codec: requests that wait fall out of step
GRAPHS = EAGER | {"enforce_eager": False, "cudagraph_capture_sizes": [1, LONG_TEXTS], "max_num_seqs": LONG_TEXTS}


def forced(smollm2, folder, dtype, **job):
    job = {"model": smollm2, "kv_cache_dtype": dtype, "options": EAGER, "forced": str(folder / "texts.pt"), **job}
    return job_result(folder, job)


@pytest.fixture(scope="module")
def auto_logits(smollm2, folder):
    """The model's own words at temperature 1, and dtype `auto`'s logits along them."""
    path = str(folder / "auto-logits.pt")
    forced(smollm2, folder, "auto", sampled=[TEXTS, LENGTH], logits=path)
    return path


def reference_divergence(path, texts, preset, bases=None):
    """`run_llm.divergence` of the same model in plain torch whose attention reads through ``kernels.reference``'s pages."""
    case = Case(preset, calibrated=bases is not None, window=PRESETS[preset].recent)
    (result,) = divergences(EvaluatedModel(str(path)), [case], list(texts), bases)
    return torch.cat(result.kl).view(len(texts), -1)[:, 1:].mean(1)


def compare(label, ours, theirs):
    """Both round what they code in ways of their own, which moves codes: a text's divergence by some percent, up or down.

    The bar is 2%; where chance alone moves a mean that far, one false alarm in 2,000 comparisons.
    """
    difference = torch.tensor(ours, dtype=torch.float64) - theirs
    apart, error = difference.mean() / theirs.mean(), difference.std() / len(theirs) ** 0.5 / theirs.mean()
    print(f"{label}: KL to auto {mean(ours):.4f}, the reference's {theirs.mean():.4f}: {apart:+.2%} +- {error:.2%}")
    assert error < 0.02, "too few texts to tell"
    assert abs(apart) < max(0.02, 3.5 * error)


def by_layer(bases):
    """A calibration's bases in the order of the layers whose names have their numbers."""
    return [bases[name] for name in sorted(bases, key=lambda name: int(name.split("layers.")[1].split(".")[0]))]


@pytest.mark.parametrize("preset", PRESETS)
def test_divergence_is_the_references(smollm2, folder, auto_logits, preset):
    """Teacher-forced, every token read from compressed blocks."""
    ours = forced(smollm2, folder, preset, against=auto_logits)["kl"]
    compare(preset, ours, reference_divergence(smollm2, torch.load(folder / "texts.pt"), preset))


def kept_bases(root):
    """The calibration that an engine fitted at its first start, on the card."""
    from vllm_turboquant.calibration_file import load

    (kept,) = (root / "turboquant" / "calibration").iterdir()
    return [basis.to(torch.device("cuda")) for basis in by_layer(load(kept, 0)[1])]


@pytest.mark.parametrize("preset", ("turboquant", "turboquant-k3v3"))
def test_calibrated_divergence_is_the_references(smollm2, folder, auto_logits, preset):
    """As installed: the engine fits the basis at its first start, the reference reads the file that it kept."""
    root = folder / f"{preset}.cache"
    options = EAGER | {"additional_config": {}}
    ours = forced(smollm2, folder, preset, against=auto_logits, options=options, env={"VLLM_CACHE_ROOT": str(root)})["kl"]
    texts = torch.load(folder / "texts.pt")
    compare(f"{preset}, calibrated", ours, reference_divergence(smollm2, texts, preset, kept_bases(root)))
    plain = float(reference_divergence(smollm2, texts, preset).mean())
    print(f"data-free {plain:.4f}")
    # On random token ids, as no tokenizer is loaded; on text it is a quarter.
    assert mean(ours) < 0.6 * plain


@pytest.mark.parametrize("preset", ("turboquant", "turboquant-k3v3"))
def test_calibrated_graphs_lose_no_more(smollm2, folder, preset):
    """Steps replay from FULL graphs. The store finds the positions of the step that replays, not of the captured one: keys under
    the mean of another bucket would cost several times as much.

    Greedy texts would not do: codes turn rounding, which differs between eager and compiled models, into steps of their own size.
    """
    texts, logits, root = str(folder / "long.pt"), str(folder / "long-logits.pt"), folder / f"{preset}-graphs.cache"
    forced(smollm2, folder, "auto", sampled=[LONG_TEXTS, LONG_LENGTH], logits=logits, forced=texts, options=GRAPHS)
    options = GRAPHS | {"additional_config": {}}
    job = {"against": logits, "forced": texts, "options": options, "env": {"VLLM_CACHE_ROOT": str(root)}}
    ours = forced(smollm2, folder, preset, **job)["kl"]
    compare(f"{preset}, calibrated, graphs", ours, reference_divergence(smollm2, torch.load(texts), preset, kept_bases(root)))


def test_lossless_codec_adds_nothing(smollm2, folder, auto_logits):
    """What two engines' rounding alone costs: far below every preset's loss."""
    kl = mean(forced(smollm2, folder, LOSSLESS, against=auto_logits)["kl"])
    print(f"lossless: KL to auto {kl:.1e}")
    assert kl < 1e-4


def test_greedy_texts_part_no_more_often_than_between_autos_backends(smollm2, folder):
    stream = random.Random(3)
    prompts = [[stream.randrange(1000, 40000) for _ in range(stream.randrange(4, 40))] for _ in range(60)]
    job = {"model": smollm2, "prompts": prompts, "tokens": 200}
    engines = {
        "auto": ("auto", {}),
        "triton": ("auto", {"attention_backend": "TRITON_ATTN"}),
        "lossless": (LOSSLESS, {}),
    }

    def answers(engine):
        dtype, options = engine
        result = job_result(folder, {**job, "kv_cache_dtype": dtype, "options": {"enforce_eager": True, **options}})
        return [answer["ids"] for answer in result["answers"]]

    with ThreadPoolExecutor() as threads:
        texts = dict(zip(engines, threads.map(answers, engines.values()), strict=True))

    def parted(name, count):
        return sum(a != b for a, b in zip(texts[name][:count], texts["auto"][:count], strict=True))

    for count in (20, 60):
        print(
            f"of {count} texts part from auto's: lossless {parted('lossless', count)}, Triton backend {parted('triton', count)}"
        )
    # Two draws of 60 coin tosses differ by 5.5 (one standard deviation); a plumbing fault parts all texts at once.
    assert parted("lossless", 60) <= parted("triton", 60) + 8
