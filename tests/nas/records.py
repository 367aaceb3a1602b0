"""Records of a search that tests make up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from nas.search.outcome import Outcome
from nas.search.rows import Trial

COMPLETE = Trial(
    trial=0,
    family="shvit",
    state="complete",
    quality=70.0,
    quality_estimate=71.0,
    quality_ci=(69.0, 73.0),
    latency_ms=1.0,
    params_m=1.0,
    macs_m=1.0,
    resolution=32,
    feasible=True,
)
"""A trial that found a network within the budget."""


def outcome_of(data: Mapping[str, Any]) -> Outcome:
    """The record of a document that has its fields by their names."""
    return TypeAdapter(Outcome).validate_python(data)
