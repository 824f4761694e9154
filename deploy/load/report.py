"""The results page of one load test: ``report.md`` out of what `vllm bench sweep serve` wrote, beside vLLM's own pictures.

    python deploy/load/report.py EXPERIMENT_DIR

Every pair of a server and a load is a row: medians of its runs, and the ratio to dtype ``auto`` under the same load.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

BASE = "auto"
# What a row shows: heading, vLLM's key, format. More is better of the first, less of the others.
FIGURES = (
    ("output tokens/s", "output_throughput", ".1f"),
    ("TTFT, median (ms)", "median_ttft_ms", ".0f"),
    ("TTFT, p99 (ms)", "p99_ttft_ms", ".0f"),
    ("per output token, median (ms)", "median_tpot_ms", ".1f"),
)
# Titles of the pictures that `make load` has vLLM draw.
PICTURES = {
    "output_throughput.png": "Output tokens a second against concurrent requests",
    "median_ttft_ms.png": "Time to first token against concurrent requests",
    "median_tpot_ms.png": "Time per output token against concurrent requests",
    "pareto/PARETO.png": "Speed of one request against throughput of the machine",
}
Runs = list[dict[str, Any]]


def machine() -> dict[str, str]:
    """Where a load test runs, as its page says it."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    names = ("vllm", "torch", "vllm-turboquant")
    return {"device": card, **{name: version(name) for name in names}}


def measured(experiment: Path) -> dict[tuple[str, int], Runs]:
    """By dtype and concurrent requests. Raises SystemExit where the folder holds no results."""
    found: dict[tuple[str, int], Runs] = {}
    for path in sorted(experiment.glob("*/summary.json")):
        for run in json.loads(path.read_text()):
            found.setdefault((run["kv_cache_dtype"], run["max_concurrency"]), []).append(run)
    if not found:
        raise SystemExit(f"{experiment}: no results of vllm bench sweep serve; run make load first")
    return dict(sorted(found.items(), key=lambda item: item[0][1]))


def value(runs: Runs, key: str) -> float:
    return median(float(run[key]) for run in runs)


def table(found: dict[tuple[str, int], Runs]) -> list[str]:
    headings = ["at once", "`--kv-cache-dtype`", "requests", "failed", *(heading for heading, _, _ in FIGURES)]
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for (dtype, users), runs in found.items():
        cells = [str(users), f"`{dtype}`", str(sum(run["completed"] for run in runs)), str(sum(run["failed"] for run in runs))]
        for _, key, form in FIGURES:
            cell = format(value(runs, key), form)
            if dtype != BASE and (BASE, users) in found:
                cell += f" ({value(runs, key) / value(found[BASE, users], key):.2f}x)"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(experiment: Path, where: dict[str, str]) -> str:
    """Markdown. Pictures that are not there are left out."""
    found = measured(experiment)
    (first, *_) = next(iter(found.values()))
    shape = f"{first['random_input_len']} tokens in, {first['random_output_len']} out"
    runs = max(map(len, found.values()))
    lines = [
        f"# Load test: {Path(first['model_id']).name}",
        "",
        f"{where['device']}, vLLM {where['vllm']}, torch {where['torch']}, vllm-turboquant {where['vllm-turboquant']}. Random",
        f"requests of {shape}; medians of {runs} run{'s' if runs > 1 else ''}; in brackets the ratio to `{BASE}` under one load.",
    ]
    if where["device"].startswith("CPU"):
        lines += [
            "",
            "On a CPU the plugin computes with its reference code, and the times say nothing about a GPU: this page shows that",
            "servers of every dtype stand the load, and what the page of a card looks like.",
        ]
    lines += ["", *table(found)]
    for name, title in PICTURES.items():
        if (experiment / name).is_file():
            lines += ["", f"## {title}", "", f"![{title}]({name})"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    experiment = parser.parse_args().experiment
    measured(experiment)
    # Written beside the first page: later ones may be made on another machine.
    place = experiment / "machine.json"
    if not place.is_file():
        place.write_text(json.dumps(machine(), indent=4) + "\n")
    target = experiment / "report.md"
    target.write_text(page(experiment, json.loads(place.read_text())))
    print(target)


if __name__ == "__main__":
    main()
