"""The task for lm-evaluation-harness: what its documents ask can be answered from them."""

from __future__ import annotations

import re
from pathlib import Path

from .tasks.recall import DOCUMENTS, FACTS, _document


def test_every_question_has_one_answer_in_its_text() -> None:
    numbers = []
    for number in range(DOCUMENTS):
        document = _document(number)
        assert document == _document(number)
        facts, asked = document["text"].split("\n\n", 1)
        told = dict(re.findall(r"The (\w+ key of \w+) has the number (\d{4})\.", facts))
        assert len(told) == FACTS
        *shown, last = re.findall(r"Which number has the (\w+ key of \w+)\?\nAnswer:(?: (\d{4}))?", asked)
        assert [told[owner] for owner, _ in shown] == [answer for _, answer in shown] and len(shown) == 3
        assert last == (last[0], "") and told[last[0]] == document["answer"]
        assert last[0] not in [owner for owner, _ in shown]
        numbers.append(document["answer"])
    assert len(set(numbers)) > DOCUMENTS // 2
    task = (Path(__file__).parent / "tasks" / "recall.yaml").read_text()
    assert "!function recall.documents" in task and set(re.findall(r"{{(\w+)}}", task)) == set(_document(0))
