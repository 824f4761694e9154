"""The README's table of kinds is the registry's, and every test that the registry names exists."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .kinds.features import FEATURES
from .kinds.kind import REFUSED, UNTESTED, WORKS, Kind
from .kinds.models import MODELS
from .support import ROOT, with_section

KINDS = MODELS + FEATURES


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """Node ids below tests/ that pytest finds in the files which the registry names."""
    files = {test.partition("::")[0] for kind in KINDS for test in (*kind.cpu, *kind.card)}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *sorted(f"tests/{file}" for file in files)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return {line.removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_named_tests_exist(kind: Kind, collected: set[str]) -> None:
    known = collected | {test.partition("[")[0] for test in collected}
    missing = [test for test in (*kind.cpu, *kind.card) if test not in known]
    assert not missing


def test_rows_are_told_apart_and_tested_where_they_should_be() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    for kind in KINDS:
        assert kind.outcome in (WORKS, REFUSED, UNTESTED), kind
        assert bool(kind.cpu or kind.card) is (kind.outcome != UNTESTED), f"{kind.name}: nothing tests it, or something does"
        assert all(test.startswith("gpu/") for test in kind.card), kind
        assert not any(test.startswith("gpu/") for test in kind.cpu), kind


def test_readme_is_what_make_figures_writes() -> None:
    readme = (ROOT / "README.md").read_text()
    assert with_section(readme) == readme
