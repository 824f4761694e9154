"""The page of ``GET /turboquant``. Jinja comes with torch and with vLLM."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


@cache
def _template() -> Template:
    environment = Environment(loader=PackageLoader("vllm_turboquant", "."), autoescape=True, undefined=StrictUndefined)
    environment.filters["count"] = "{:,.0f}".format
    return environment.get_template("endpoint.html")


def render(status: dict[str, Any]) -> str:
    """HTML of a `Status` as plain values."""
    return _template().render(status)
