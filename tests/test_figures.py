"""The README's figures are the committed rows'."""

from pathlib import Path

from .bench.figures import PARETO, PICTURE, context_rows, decode_rows, with_section


def test_readme_is_what_make_figures_writes() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert with_section(readme) == readme
    assert PICTURE.is_file() and PARETO.is_file()


def test_newest_rows_have_rivals_and_one_tree() -> None:
    for rows in (decode_rows(), context_rows()):
        assert rows and all(row["fa3_bf16_ms"] and row["fa3_fp8_ms"] and row["builtin_ms"] for row in rows)
        assert len({row["kernels_tree"] for row in rows}) == 1
