"""The evaluation on a random model: what it reads, what it collects, and that it can fail."""

import dataclasses
import json
import math

import pytest
import torch

from vllm_turboquant import cli, texts
from vllm_turboquant.evaluation import metrics
from vllm_turboquant.evaluation.calibrate import calibrate
from vllm_turboquant.evaluation.codecs import Case
from vllm_turboquant.evaluation.metrics import Divergence
from vllm_turboquant.evaluation.model import attend_windowed
from vllm_turboquant.evaluation.run import evaluate, rows
from vllm_turboquant.kernels.statistics import SKIPPED, shifts

from .conftest import HEADS, KV_HEADS, LAYERS, VOCABULARY, D, Letters

transformers = pytest.importorskip("transformers")


@pytest.fixture
def ids(seed):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (96,), generator=rng) for _ in range(3)]


def figures(model, ids, *cases, bases=None):
    """Rows, of these sequences instead of the texts that an evaluation takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_turboquant.evaluation.run.blocks", lambda *_: ids)
        return list(rows(model, "random", cases, [len(ids[0])], bases, 0))


def plain_logits(model, ids):
    """Of the same weights in transformers' own eager attention."""
    path = model.model.config._name_or_path
    other = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return other(ids[None]).logits[0]


def test_auto_is_the_model_itself(model, ids):
    logits = model.logits(model.hidden(ids[0], Case("auto")))
    # fp32 sums in another order, through three layers.
    assert torch.allclose(logits, plain_logits(model, ids[0]), rtol=1e-3, atol=1e-3)
    (row,) = figures(model, ids, Case("auto"))
    assert row["kl"] == row["kl_se"] == row["ppl_delta"] == 0 and row["top1"] == 1 and row["tokens"] == 3 * 95


def test_rows_have_every_key(model):
    (row,) = evaluate(model.model.config._name_or_path, [Case("turboquant_4bit_nc", skipped=4)], [64], tokens=128, device="cpu")
    assert set(row) >= {"model", "name", "calibrated", "skipped_layers", "bytes_d128", "context", "tokens", "kl", "kl_se", "top1"}
    assert set(row) >= {"ppl_delta", "reads", "kl_places"} and row["tokens"] == 2 * 63 and row["context"] == 64
    # All three layers are among the four.
    assert row["skipped_layers"] == 3 and row["bytes_d128"] == 512


def test_codecs_rank_by_their_bits(model, ids):
    names = ("turboquant-k2v2", "turboquant-k3v3", "turboquant-k4v3", "turboquant", "turboquant-k8v4", "auto")
    rows = figures(model, ids, *map(Case, names))
    kl = [row["kl"] for row in rows]
    assert kl == sorted(kl, reverse=True) and all(row["reads"] == "compressed" for row in rows)
    assert rows[0]["bytes_d128"] == 68


def test_exact_tokens_and_skipped_layers_remove_the_error(model, ids):
    name = "turboquant-k2v2"
    cases = (Case(name), Case(name, sinks=8), Case(name, window=8), Case(name, sinks=96), Case(name, window=96))
    plain, sinks, window, all_sinks, all_window, skipped = (r["kl"] for r in figures(model, ids, *cases, Case(name, skipped=4)))
    assert max(sinks, window) < plain and all_sinks == 0
    # The window's attention is another order of fp32 sums; what remains of skipping is bf16's rounding.
    assert all_window < 1e-6 and skipped < 1e-2 * plain


def test_every_layer_reads_decoded_keys_and_values(model, ids, monkeypatch):
    seen = []

    def decoded(case, key, value, layer, layers, basis):
        seen.append((layer, tuple(key.shape), layers))
        return key * 0, value * 0 + layer

    monkeypatch.setattr("vllm_turboquant.evaluation.model.decoded", decoded)
    outputs = []
    for block in model.model.model.layers:
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    model.hidden(ids[0], Case("fp8"))
    assert seen == [(layer, (96, KV_HEADS, D), LAYERS) for layer in range(LAYERS)]
    for layer, out in enumerate(outputs):
        assert torch.allclose(out, torch.full_like(out, layer))


@pytest.mark.parametrize("window, reach", [(0, 40), (5, 40), (5, 7), (40, 40)])
def test_windowed_attention_against_a_loop(seed, window, reach, monkeypatch):
    monkeypatch.setattr("vllm_turboquant.evaluation.model._QUERY_ROWS", 16)
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(40, HEADS, D, generator=rng, dtype=torch.float64)
    k, v, k_hat, v_hat = (torch.randn(40, KV_HEADS, D, generator=rng, dtype=torch.float64) for _ in range(4))
    out = attend_windowed(q, k, v, k_hat, v_hat, 0.3, window, reach)
    for t in range(40):
        for h in range(HEADS):
            tokens = range(max(t - reach + 1, 0), t + 1)
            sides = [(k, v) if t - s < window else (k_hat, v_hat) for s in tokens]
            scores = torch.stack([0.3 * q[t, h] @ side[0][s, h // 2] for s, side in zip(tokens, sides, strict=True)])
            truth = sum(w * side[1][s, h // 2] for w, s, side in zip(scores.softmax(0), tokens, sides, strict=True))
            assert torch.allclose(out[t, h], truth)


def naive_projections(model, ids, layer):
    """Queries and keys of the first layer by hand: embedding, norm, projection, rotary embedding at its positions."""
    block = model.model.model.layers[layer]
    x = block.input_layernorm(model.model.model.embed_tokens(ids)[None])
    q = block.self_attn.q_proj(x).view(len(ids), HEADS, D)
    k = block.self_attn.k_proj(x).view(len(ids), KV_HEADS, D)
    angle = torch.arange(len(ids))[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def turn(y):
        a, b = y.split(D // 2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    return turn(q), turn(k)


@torch.no_grad()
def test_statistics_are_those_of_attentions_own_keys(model, ids):
    found = model.statistics(ids)
    assert len(found) == LAYERS and found[0].tokens == 3 * (96 - SKIPPED)
    pairs = [[x[SKIPPED:].double() for x in naive_projections(model, text, 0)] for text in ids]
    keys, queries = torch.cat([k for _, k in pairs]), torch.cat([q for q, _ in pairs])
    moment = torch.einsum("thd,the->hde", keys, keys)
    # fp32 products of 100 tokens.
    assert torch.allclose(found[0].key_sum, keys.sum(0), rtol=1e-4, atol=1e-2)
    assert torch.allclose(found[0].key_moment, moment, rtol=1e-4, atol=1e-3 * float(moment.abs().max()))
    grouped = queries.unflatten(1, (KV_HEADS, -1))
    moment = torch.einsum("thgd,thge->hde", grouped, grouped)
    assert torch.allclose(found[0].query_moment, moment, rtol=1e-4, atol=1e-3 * float(moment.abs().max()))


@torch.no_grad()
def test_turns_are_the_models_rotary_embedding(model, ids):
    _, key = naive_projections(model, ids[0], 0)
    flat = naive_projections(model, ids[0][:1].repeat(96), 0)[1]  # one token at every position
    for p, turn in zip((0, 1, 95), model.turns((0, 1, 95)), strict=True):
        # fp32 angles up to 95.
        assert torch.allclose(flat[0].double() @ turn.T, flat[p].double(), atol=1e-3)
    one, two, three = model.turns((1, 2, 3))
    assert torch.allclose(one @ two, three, atol=1e-5) and key.shape == flat.shape


@pytest.mark.parametrize("served", [512, 8192, 131072])
def test_shifts_stay_within_the_context(served):
    found = shifts(served)
    assert len(found) == 24 and found[0] == 0 and max(found) < served
    assert sum(shift < served / 4 for shift in found) >= 12


def test_calibration_shows_and_a_bad_mean_shows(model, ids):
    """The check can fail: a mean ten standard deviations off must cost more than no calibration at all."""
    other = [torch.flip(x, [0]) for x in ids]
    bases = calibrate(model, 96, other)
    spreads = [
        (s.key_moment / s.tokens - (s.key_sum / s.tokens)[..., None] * (s.key_sum / s.tokens)[:, None]).diagonal(dim1=1, dim2=2)
        for s in model.statistics(other)
    ]
    bad = [
        dataclasses.replace(b, means=b.means + far[:, None], sink_mean=b.sink_mean + far)
        for b, far in zip(bases, (10 * s.clamp(min=0).sqrt().float() for s in spreads), strict=True)
    ]
    case = Case("turboquant", calibrated=True)
    (good,), (none,), (off,) = (
        figures(model, ids, c, bases=b) for c, b in ((case, bases), (Case("turboquant"), None), (case, bad))
    )
    print("KL calibrated, data-free, mean off by 10 sigma:", good["kl"], none["kl"], off["kl"])
    assert good["kl"] < 0.8 * none["kl"] and off["kl"] > 2 * none["kl"] and good["calibrated"] and not none["calibrated"]


def test_data_free_presets_subtract_the_key_bias(model, ids, monkeypatch):
    monkeypatch.setattr(model, "_plain", [None] * LAYERS)
    case, calibrated = Case("turboquant"), Case("turboquant", calibrated=True)
    bases = calibrate(model, 96, [torch.flip(x, [0]) for x in ids])
    before, first = (figures(model, ids, c, bases=bases)[0]["kl"] for c in (case, calibrated))
    model.subtract_key_bias(96)
    after, second = (figures(model, ids, c, bases=bases)[0]["kl"] for c in (case, calibrated))
    print(f"KL data-free {before:.5f}, without key bias {after:.5f}, calibrated {first:.5f}")
    assert after < 0.9 * before and first == second


def test_figures_against_float64(seed, monkeypatch):
    monkeypatch.setattr(metrics, "SEGMENT", 8)
    rng = torch.Generator().manual_seed(seed)
    result, kl, agree, loss = Divergence(), [], [], []
    for _ in range(3):  # sequences of 21 positions, given in chunks
        p, q = (torch.randn(21, 50, generator=rng) * 3 for _ in range(2))
        targets = torch.randint(50, (21,), generator=rng)
        for start in range(0, 21, 5):
            rows = slice(start, start + 5)
            result.add(p[rows], q[rows], targets[rows], start)
        for t in range(21):
            x, y = (z[t].double().exp() / z[t].double().exp().sum() for z in (p, q))
            kl.append(sum(float(a * math.log(a / b)) for a, b in zip(x, y, strict=True)))
            agree.append(bool(x.argmax() == y.argmax()))
            loss.append(math.log(x[targets[t]] / y[targets[t]]))
    found = result.figures()
    assert found["tokens"] == 63
    # Sums of 50 fp32 terms.
    assert found["kl"] == pytest.approx(sum(kl) / 63, rel=1e-4)
    assert found["top1"] == sum(agree) / 63
    assert found["ppl_delta"] == pytest.approx(math.exp(sum(loss) / 63) - 1, rel=1e-4)
    parts = torch.tensor(kl).view(3, 21)
    means = torch.cat([part.mean(1) for part in parts.split(8, 1)])  # 8, 8 and 5 positions of each
    assert found["kl_se"] == pytest.approx(float(means.std()) / 3, rel=1e-4)
    places = dict(found["kl_places"])
    assert list(places) == [0.0, 8.0, 16.0]
    assert places[16.0] == pytest.approx(float(parts[:, 16:].mean()), rel=1e-4)


def test_texts_are_the_same_at_every_context_and_halves_share_none():
    tokenizer = Letters()
    short, long = texts.blocks(tokenizer, "held-out", 4096, 512), texts.blocks(tokenizer, "held-out", 4096, 2048)
    assert [len(x) for x in short] == [512] * 8 and [len(x) for x in long] == [2048] * 2
    assert all(x[0] == 0 for x in short + long)
    assert torch.equal(long[0][1:512], short[0][1:]) and torch.equal(long[0][512:1023], short[2][1:])
    for kind in (texts.prose, texts.code):
        held, calibration = kind("held-out"), kind("calibration")
        assert not set(held.split("\n\n")) & set(calibration.split("\n\n"))
        assert min(len(held), len(calibration)) > 100_000
    with pytest.raises(ValueError, match="asked for"):
        texts.blocks(tokenizer, "held-out", 10**8, 512)


def test_tokens_after_a_prefill_read_what_a_case_stores(model, ids):
    text, auto, coarse = ids[0], Case("auto"), Case("turboquant-k2v2")
    before = model.prefilled(text[:80])
    whole = model.hidden(text, auto)[80:]
    for _ in range(2):  # it is left as it was
        # fp32 sums in another order, through three layers.
        assert torch.allclose(model.hidden(text[80:], auto, before=before), whole, atol=1e-3)
    assert (model.hidden(text[80:], coarse, before=before) - whole).abs().max() > 0.1
    exact = model.hidden(text[80:], dataclasses.replace(coarse, window=96), before=before)
    assert torch.allclose(exact, whole, atol=1e-3)


@pytest.mark.parametrize("window", [0, 5])
def test_last_rows_of_windowed_attention_are_those_of_all(seed, window):
    rng = torch.Generator().manual_seed(seed)
    q, *sides = (torch.randn(40, heads, D, generator=rng) for heads in (HEADS, *[KV_HEADS] * 4))
    alone = attend_windowed(q[29:], *sides, 0.3, window, 40)
    # fp32 sums in another order.
    assert torch.allclose(alone, attend_windowed(q, *sides, 0.3, window, 40)[29:], atol=1e-5)


def test_command_prints_a_row_a_case(model, capsys):
    path = model.model.config._name_or_path
    asked = ["evaluate", path, "--contexts", "64", "--tokens", "128", "--served", "64", "--only", "auto", "turboquant"]
    assert cli.main(asked) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[1] for row in rows] == ["auto", "turboquant", "turboquant", "turboquant"]
    assert ["calibrated" in row for row in rows] == [False, False, True, True] and "4 sinks" in rows[3]
    assert rows[0].split()[2:4] == ["512.0", "0.00000"] and rows[1].split()[2] == "132.0"
    assert all(float(row.split()[-4]) > 0 for row in rows[1:])
    assert cli.main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [f"{row['kl']:.5f}" for row in found] == [row.split()[-4] for row in rows]
    assert cli.main(["evaluate", path, "--only", "int3"]) == 2
    assert "--only int3: allowed are auto, " in capsys.readouterr().err
