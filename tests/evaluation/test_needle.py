"""Needles: where a haystack has them, and when one counts as found."""

import pytest
import torch

from vllm_turboquant.evaluation.codecs import Case
from vllm_turboquant.evaluation.needle import FACT, PLACES, QUESTION, haystack, retrieval

from .conftest import VOCABULARY, Letters


def positions(ids, text):
    wanted = torch.tensor(Letters().encode(text, add_special_tokens=False))
    return [i for i in range(len(ids) - len(wanted) + 1) if torch.equal(ids[i : i + len(wanted)], wanted)]


def test_needles_are_where_they_should_be():
    depths = (0.0, 0.5, 1.0)
    ids, questions = haystack(Letters(), 3000, depths, seed=5)
    longest = max(len(question) for question, _ in questions)
    assert len(ids) + longest == 3000
    before, facts = 1, []
    for place, (question, answer) in zip(PLACES, questions, strict=False):
        text = "".join(chr(i - 1) for i in question.tolist())
        number = text[-answer:].strip()
        assert text == f"{QUESTION.format(place=place)} {number}" and len(number) == 5
        facts.append(FACT.format(place=place, number=number))
    room = len(ids) - 1 - sum(map(len, facts))
    for depth, fact in zip(depths, facts, strict=True):
        assert positions(ids, fact) == [before + round(depth * room)]
        before += len(fact)
    with pytest.raises(ValueError, match="no room"):
        haystack(Letters(), 250, depths, seed=5)
    with pytest.raises(ValueError, match="ascending"):
        haystack(Letters(), 3000, (0.5, 0.0), seed=5)


def test_a_random_model_finds_no_needle_and_a_rigged_one_does(model, monkeypatch):
    cases = [Case("auto"), Case("turboquant")]
    assert retrieval(model, cases, [500, 600], [0.2, 0.8]) == [[False] * 4] * 2
    right, seen = [True, False, True, True], []

    def hidden(ids, case, bases, before):
        """What a model that knows the question's next tokens gives; of the second question all but the last."""
        seen.append((case.name, before.get_seq_length() + len(ids) + 1))
        asked = next(q for _, questions in stacks for q, _ in questions if torch.equal(q[:-1], ids))
        out = asked[1:].clone()
        out[-1] += not right[(len(seen) - 1) % 4]
        return out

    stacks = [haystack(Letters(), length, [0.2, 0.8], seed) for seed, length in enumerate((500, 600))]
    monkeypatch.setattr(model, "hidden", hidden)
    monkeypatch.setattr(model, "logits", lambda hidden: torch.nn.functional.one_hot(hidden % VOCABULARY, VOCABULARY).float())
    assert retrieval(model, cases[:1], [500, 600], [0.2, 0.8]) == [right]
    assert [name for name, _ in seen] == ["auto"] * 4 and max(length for _, length in seen) == 600
