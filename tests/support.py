"""README's table of kinds, made from the registry in ``kinds``.

    python -m tests.support        writes the table (so does make figures)

``tests/test_support.py`` holds every row to tests that exist, and README to the registry.
"""

from __future__ import annotations

from pathlib import Path

from .kinds.features import FEATURES
from .kinds.kind import REFUSED, UNTESTED, Kind
from .kinds.models import MODELS

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- support: make figures -->\n", "<!-- end of support -->\n"
SAME = "before a device is used"  # a refusal whose test needs none


def _cell(tests: tuple[str, ...]) -> str:
    """By file; the names of one file's tests one after the other."""
    files: dict[str, dict[str, list[str]]] = {}
    for test in tests:
        file, _, name = test.partition("::")
        function, _, case = name.partition("[")
        files.setdefault(file, {}).setdefault(function.removeprefix("test_"), []).extend([case.removesuffix("]")] if case else [])
    cells = []
    for file, functions in files.items():
        names = (f"{function} ({'; '.join(cases)})" if cases else function for function, cases in functions.items())
        cells.append(f"`{file}` {', '.join(names)}")
    return "<br>".join(cells) or UNTESTED


def _on_card(kind: Kind) -> str:
    return SAME if kind.outcome == REFUSED and not kind.card else _cell(kind.card)


def section() -> str:
    """What stands between the markers in README.md."""
    lines = []
    for title, kinds in (("model", MODELS), ("feature", FEATURES)):
        lines += [f"| {title} | | on a CPU | on a card |", "|---|---|---|---|"]
        lines += [f"| {kind.name} | {kind.outcome} | {_cell(kind.cpu)} | {_on_card(kind)} |" for kind in kinds]
        lines.append("")
    return "\n".join(lines)


def with_section(readme: str) -> str:
    head, rest = readme.split(BEGIN)
    return head + BEGIN + section() + END + rest.split(END)[1]


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(with_section(readme.read_text()))


if __name__ == "__main__":
    main()
