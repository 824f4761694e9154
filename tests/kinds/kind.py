"""A row of the registry, and names of tests that many rows name."""

from __future__ import annotations

from dataclasses import dataclass

WORKS, REFUSED, UNTESTED = "works", "refused", "not tested"


@dataclass(frozen=True)
class Kind:
    """One row. ``cpu``, ``card``: pytest node ids below tests/, without parameters where all of them count."""

    name: str
    outcome: str
    cpu: tuple[str, ...] = ()
    card: tuple[str, ...] = ()


ORACLE = "gpu/test_engine.py::test_every_attention_call_against_the_oracle"
REFUSALS = "plugin/test_refusals.py::test_refused_by_the_configuration"
ON_GPU = "plugin/test_refusals.py::test_models_on_a_gpu"
ANSWERS = "server/test_kinds.py::test_answers"
CAPACITY = "server/test_kinds.py::test_capacity"
SPECULATION = "server/test_features.py::test_speculation"
SCHEDULES = "server/test_schedules.py::test_every_answer_is_that_of_the_request_alone"
CARD_ANSWERS = "gpu/test_models.py::test_kinds"
CARD_SPECULATION = "gpu/test_features.py::test_speculation"
ORDINARY = ("head 80, MHA", "head 96, MQA", "head 112", "head 192", "head 256")


def of(test: str, *cases: str) -> tuple[str, ...]:
    return tuple(f"{test}[{case}]" for case in cases)
