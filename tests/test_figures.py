"""The README's figures are the committed rows'."""

from pathlib import Path

from .bench.figures import PICTURES, with_section
from .bench.newest import CARDS, context_rows, decode_rows, engine_rows


def test_readme_is_what_make_figures_writes() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert with_section(readme) == readme
    for name, place in PICTURES.items():
        assert place.is_file() and readme.count(f"results/{name}.svg)") == 1


def test_newest_rows_have_rivals_and_one_tree() -> None:
    for rows in (decode_rows(), context_rows()):
        assert rows and all(row["fa3_bf16_ms"] and row["fa3_fp8_ms"] and row["builtin_ms"] for row in rows)
        assert len({row["kernels_tree"] for row in rows}) == 1
    for card in CARDS:
        assert len({(row["call"], row["card"]) for row in engine_rows(card).values()}) == 1
