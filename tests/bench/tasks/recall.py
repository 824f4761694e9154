"""Documents of the task in recall.yaml: made here, the same every time."""

from __future__ import annotations

import random
from typing import Any

NAMES = (
    "Ada", "Bruno", "Carla", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Luis", "Mona", "Nils", "Olga",
    "Pedro", "Quinn", "Rosa", "Samir", "Tilda", "Ugo", "Vera", "Walt", "Xenia", "Yusuf", "Zora",
)  # fmt: skip
COLOURS = ("red", "green", "blue", "white", "black", "brown")
DOCUMENTS, FACTS = 100, 24


def _document(number: int) -> dict[str, str]:
    rng = random.Random(number)
    owners = rng.sample([(name, colour) for name in NAMES for colour in COLOURS], FACTS)
    codes = [str(rng.randrange(1000, 10_000)) for _ in owners]
    facts = [f"The {colour} key of {name} has the number {code}." for (name, colour), code in zip(owners, codes, strict=True)]
    asked = rng.randrange(FACTS)
    name, colour = owners[asked]
    # Three answered questions show the form.
    shown = rng.sample([index for index in range(FACTS) if index != asked], 3)
    form = [f"Question: Which number has the {owners[i][1]} key of {owners[i][0]}?\nAnswer: {codes[i]}\n" for i in shown]
    question = f"Question: Which number has the {colour} key of {name}?\nAnswer:"
    return {"text": "\n".join([*facts, "", *form, question]), "answer": codes[asked]}


def documents(**_: Any) -> dict[str, Any]:
    """By split, as lm-evaluation-harness wants them."""
    from datasets import Dataset

    return {"test": Dataset.from_list([_document(number) for number in range(DOCUMENTS)])}
