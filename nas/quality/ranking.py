"""How well estimates rank networks: Kendall's tau with full trainings, with its interval."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap

GATE = "estimate, first rung"
"""What decides whether a tier may choose: what it says of most networks of a search, which end there."""
RESAMPLES, BATCH = 2_000, 100
"""Of the bootstrap: how many in all, and at once in memory."""


def taus(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Kendall's tau with the accuracy of full trainings, with its 95% interval, of every estimate."""
    truth = [row["top1"] for row in rows]
    names = (GATE, "estimate, last rung", "params", "macs", "surrogate alone")
    columns = {name: [row[name] for row in rows] for name in names}
    for epochs in rows[0]["rungs"]:
        columns[f"after {epochs} epochs"] = [row["rungs"][epochs] for row in rows]
    told: dict[str, list[float]] = {}
    for name, values in columns.items():
        if values not in told.values():
            told[name] = values
    return {name: tau(values, truth) for name, values in told.items()}


def tau(values: Sequence[float], truth: Sequence[float]) -> dict[str, Any]:
    """Kendall's tau-b and its 95% interval by bootstrap over networks; None where all values are equal."""
    x, y = np.asarray(values, float), np.asarray(truth, float)
    if len(set(values)) < 2 or len(set(truth)) < 2:
        return {"tau": None, "ci": None}
    how = {"paired": True, "vectorized": True, "method": "percentile", "rng": np.random.default_rng(0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # its interval is nan where one resample's tau is
        found = bootstrap((x, y), _tau_b, n_resamples=RESAMPLES, batch=BATCH, **how)
    low, high = np.nanpercentile(found.bootstrap_distribution, [2.5, 97.5])
    return {"tau": float(_tau_b(x, y)), "ci": [float(low), float(high)]}


def _tau_b(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Kendall's tau-b along the last axis, as `scipy.stats.kendalltau` has it for one sample; nan where all values of
    a sample are equal."""
    signs = [np.sign(each[..., :, None] - each[..., None, :]) for each in (x, y)]
    agree, *differ = (each.sum((-2, -1)) for each in (signs[0] * signs[1], *map(np.abs, signs)))
    with np.errstate(invalid="ignore"):
        taus: np.ndarray = agree / np.sqrt(differ[0] * differ[1])
    return taus


def selects(found: Mapping[str, Any]) -> bool:
    """Whether a tier with this tau may choose: not where its interval includes 0."""
    return found["ci"] is not None and found["ci"][0] > 0
