"""A causal language model in transformers whose layers attend to keys and values as a cache gives them back."""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..kernels.basis import KeyBasis, key_basis
from ..kernels.statistics import KeyStatistics
from .codecs import Case, decoded

_QUERY_ROWS = 256  # rows attended at once where exact and decoded tokens mix: bounds the score matrix
_BIAS_POSITIONS = 1024  # over which a key bias is averaged
_numbers = itertools.count()


class EvaluatedModel:
    """The model of a folder in float32, teacher-forced, one sequence at a time.

    Under a `Case` every token attends to decoded keys and values of all tokens up to and including itself, as if it had been
    decoded from a full cache; errors propagate through the layers. device: default CUDA if there is one. Raises ValueError
    for attention that the reader does not reproduce (soft cap, sink logits).
    """

    def __init__(self, path: str, device: str | None = None) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._name = f"turboquant_evaluation_{next(_numbers)}"
        AttentionInterface.register(self._name, self._attend)
        self.model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=self._name, dtype=torch.float32)
        self.model.to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        config = self.model.config.get_text_config()
        self.layers: int = config.num_hidden_layers
        # Gemma 3's kind turns keys of its windows otherwise than those of full attention.
        rotary = getattr(self.model.base_model, "rotary_emb", None)
        typed = rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters
        self.rotary_kinds: list[str | None] = list(config.layer_types) if typed else [None] * self.layers
        self._case = Case("auto")
        self._bases: Sequence[KeyBasis] | None = None
        self._plain: list[KeyBasis | None] = [None] * self.layers
        self._statistics: dict[int, KeyStatistics] | None = None

    @torch.inference_mode()
    def hidden(self, ids: torch.Tensor, case: Case, bases: Sequence[KeyBasis] | None = None, before: Any = None) -> torch.Tensor:
        """What `logits` turns into logits: float32 ``[T, n]`` for tokens ids int64 ``[T]``. bases: one a layer.

        before: what `prefilled` gave for the tokens that come before ``ids``; read as ``case`` stores it, and left as it was.
        """
        new = ids[None].to(self.device)
        with self._reading(case, bases):
            if before is None:
                return self.model.base_model(new, use_cache=False).last_hidden_state[0]
            try:
                return self.model.base_model(new, past_key_values=before, use_cache=True).last_hidden_state[0]
            finally:
                before.crop(-len(ids))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 ``[T, n]`` to ``[T, vocabulary]``. Of models whose head is one matrix without soft cap."""
        return self.model.get_output_embeddings()(hidden)

    @torch.inference_mode()
    def prefilled(self, ids: torch.Tensor) -> Any:
        """Exact keys and values of tokens int64 ``[T]``, computed from exact ones as a prefill does; transformers' cache."""
        from transformers import DynamicCache

        with self._exactly():
            cache = DynamicCache()  # without the model's configuration: what a sliding window no longer sees is kept too
            self.model.base_model(ids[None].to(self.device), past_key_values=cache, use_cache=True)
            return cache

    @torch.inference_mode()
    def continued(self, ids: torch.Tensor, tokens: int) -> torch.Tensor:
        """ids int64 ``[T]`` and ``tokens`` more, each the likeliest with exact keys and values; int64 ``[T + tokens]``."""
        with self._exactly():
            found, new, cache = ids.tolist(), ids, None
            for _ in range(tokens):
                out = self.model(new[None].to(self.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
                new, cache = out.logits[0, -1].argmax()[None], out.past_key_values
                found.append(int(new))
            return torch.tensor(found, dtype=torch.int64)

    @torch.inference_mode()
    def statistics(self, texts: Iterable[torch.Tensor]) -> list[KeyStatistics]:
        """Of each layer, over token sequences int64 ``[T]``, unquantised."""
        self._statistics = {}
        try:
            for ids in texts:
                self.hidden(ids, Case("auto"))
            return [self._statistics[layer] for layer in range(self.layers)]
        finally:
            self._statistics = None

    @torch.inference_mode()
    def turns(self, shifts: Sequence[int], kind: str | None = None) -> list[torch.Tensor]:
        """R(p) of each shift p, float64 orthogonal ``[d, d]``: what rotary embedding at position p does to a vector.

        kind: one of ``rotary_kinds``. Raises ValueError where it is not a rotation that a shift of positions adds to another.
        """
        body = self.model.base_model
        rotate = getattr(sys.modules[type(body).__module__], "apply_rotary_pos_emb", None)
        if rotate is None or not hasattr(body, "rotary_emb"):
            raise ValueError(f"{type(body).__name__} has no rotary embedding that this evaluation knows")
        positions = torch.tensor(list(shifts), dtype=torch.int64, device=self.device)[None]
        options = {} if kind is None else {"layer_type": kind}
        cos, sin = body.rotary_emb(torch.zeros(1, 1, dtype=torch.float32, device=self.device), positions, **options)
        d = cos.shape[-1]
        eye = torch.eye(d, device=self.device)[None, None]
        turns = []
        for c, s in zip(cos[0].split(1), sin[0].split(1), strict=True):
            rows = rotate(eye, eye, c.expand(d, -1)[None], s.expand(d, -1)[None])[0][0, 0].double()
            # Scaled variants multiply by a constant, which keys and queries carry already.
            turns.append((rows / rows.norm(dim=-1).mean()).T)
            if (turns[-1] @ turns[-1].T - torch.eye(d, dtype=torch.float64, device=self.device)).abs().max() > 1e-4:
                raise ValueError("rotary embedding at a position is not orthogonal")
        return turns

    @torch.inference_mode()
    def subtract_key_bias(self, served: int) -> None:
        """From now on data-free presets do what an engine for ``served`` tokens does without calibration: where a layer's key
        projection has a bias, its mean over the positions is subtracted.
        """
        biases = [_key_bias(layer.self_attn) for layer in self.model.base_model.layers]
        turns: dict[str | None, torch.Tensor] = {}
        samples = range(0, served, max(served // _BIAS_POSITIONS, 1))
        parts = [samples[i : i + 64] for i in range(0, len(samples), 64)]
        for layer, (bias, kind) in enumerate(zip(biases, self.rotary_kinds, strict=True)):
            if bias is None:
                continue
            if kind not in turns:
                turns[kind] = torch.stack([torch.stack(self.turns(part, kind)).sum(0) for part in parts]).sum(0) / len(samples)
            mean = bias.double().view(-1, len(turns[kind])) @ turns[kind].T
            self._plain[layer] = key_basis(torch.eye(mean.shape[1]).expand(len(mean), -1, -1), mean)

    @contextmanager
    def _reading(self, case: Case, bases: Sequence[KeyBasis] | None) -> Iterator[None]:
        self._case, self._bases = case, bases
        try:
            yield
        finally:
            self._case, self._bases = Case("auto"), None

    @contextmanager
    def _exactly(self) -> Iterator[None]:
        """In transformers' own attention."""
        self.model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            self.model.set_attn_implementation(self._name)

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **rest: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention function, keys as stored. query ``[1, Hq, R, d]``, of the last R of T tokens; key and value
        ``[1, Hk, T, d]``."""
        if rest.get("softcap") or rest.get("s_aux") is not None:
            raise ValueError("attention with a soft cap or sink logits is not evaluated")
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if self._statistics is not None:
            fresh = KeyStatistics(k.shape[1], k.shape[2], k.device)
            self._statistics.setdefault(module.layer_idx, fresh).add(q, k)
        case, layer = self._case, module.layer_idx
        basis = self._plain[layer] if self._bases is None or not case.calibrated else self._bases[layer]
        k_hat, v_hat = decoded(case, k, v, layer, self.layers, basis)
        sinks = min(case.sinks, len(k))
        k_hat, v_hat = (torch.cat([x[:sinks], y[sinks:]]) for x, y in ((k, k_hat), (v, v_hat)))
        scale = scaling or q.shape[-1] ** -0.5
        if case.window or len(q) < len(k) or (sliding_window or len(k)) < len(k):
            return attend_windowed(q, k, v, k_hat, v_hat, scale, case.window, sliding_window or len(k))[None], None
        k_hat, v_hat = (x.transpose(0, 1)[None] for x in (k_hat, v_hat))
        out = scaled_dot_product_attention(query, k_hat, v_hat, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2), None


def _key_bias(attention: torch.nn.Module) -> torch.Tensor | None:
    """``[Hk * d]``; None without, and where a norm between projection and attention moves it."""
    children = dict(attention.named_children())
    bias = getattr(children.get("k_proj"), "bias", None)
    return None if bias is None or any("norm" in name for name in children) else bias


def attend_windowed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_hat: torch.Tensor,
    v_hat: torch.Tensor,
    scale: float,
    window: int,
    reach: int,
) -> torch.Tensor:
    """Causal attention that reads each query's newest ``window`` tokens from k and v, others from k_hat and v_hat.

    q and result: ``[R, Hq, d]``, of the last R of T tokens. Keys and values: ``[T, Hk, d]``. A query sees its newest ``reach``
    tokens, itself included.
    """
    tokens, heads = k.shape[:2]
    queries, first = q.unflatten(1, (heads, -1)), tokens - len(q)
    place = torch.arange(tokens, device=q.device)
    out = []
    for start in range(0, len(q), _QUERY_ROWS):
        rows = slice(start, min(start + _QUERY_ROWS, len(q)))
        stop = first + rows.stop
        age = place[first + start : stop, None] - place[None, :stop]
        exact, seen = age < window, (age >= 0) & (age < reach)
        scores = [torch.einsum("rhgd,lhd->hgrl", queries[rows], x[:stop]) * scale for x in (k, k_hat)]
        weights = torch.where(exact, *scores).masked_fill(~seen, -math.inf).softmax(-1)
        parts = ((weights * exact, v), (weights * ~exact, v_hat))
        out.append(sum(torch.einsum("hgrl,lhd->rhgd", w, x[:stop]) for w, x in parts))
    return torch.cat(out).flatten(1, 2)
