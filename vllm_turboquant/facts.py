"""What ``vllm-turboquant doctor`` reports: one fact, and what to do where it is not as it should be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """state: "ok"; "warning", served all the same; "failed", not served. cure: what to do, None where nothing is."""

    name: str
    state: str
    detail: str
    cure: str | None = None


def ok(name: str, detail: str) -> Fact:
    return Fact(name, "ok", detail)


def warning(name: str, detail: str, cure: str) -> Fact:
    return Fact(name, "warning", detail, cure)


def failed(name: str, detail: str, cure: str) -> Fact:
    return Fact(name, "failed", detail, cure)
