"""A study's trials as rows: their ranking, the feasible front, and which of them enter the closing run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nas.intervals import of_error
from nas.measure.budget import LatencyBudget, Verdict
from nas.measure.samples import HOPELESS
from nas.quality.tier import told_score

if TYPE_CHECKING:
    import optuna

    from search_spaces import Arch

Row = dict[str, Any]
INTERRUPTED = "interrupted"
"""The error of a trial that Ctrl-C has ended; the next run of the command makes it again."""
LATENCY_KEYS = (
    "latency_ms",
    "latency_p95_ms",
    "latency_ci_low_ms",
    "latency_ci_high_ms",
    "samples",
    "rounds",
    "reference_ms",
    "reference_drift",
    "throughput",
)
RESERVES = 3
"""How many of the best trials enter the closing run, should the first not meet the budget there."""
MARGINS = (0.95, 0.85, 0.7)
"""Shares of the budget below which the best trial enters it too, should all of those be over it."""


def rows_of(study: optuna.Study) -> list[Row]:
    """One flat row per told trial, in the report's columns. feasible: by the median latency; verdict: by its 95%
    interval. guessed: not trained, by a tier that trains."""
    from optuna.trial import TrialState

    rows = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state not in (TrialState.COMPLETE, TrialState.FAIL):
            continue
        attrs = trial.user_attrs
        detail = attrs.get("detail", {})
        complete = trial.state == TrialState.COMPLETE
        rows.append(
            {
                "trial": trial.number,
                "family": attrs.get("family", trial.params.get("family", "")),
                "name": attrs.get("name", ""),
                "state": "complete" if complete else "interrupted" if attrs.get("error") == INTERRUPTED else "failed",
                "error": attrs.get("error", ""),
                "quality": trial.values[0] if complete else None,
                "quality_estimate": detail.get("quality_estimate"),
                "quality_ci": detail.get("quality_ci") or earlier_ci(detail),
                "quality_how": detail.get("quality_how", ""),
                "guessed": detail.get("training", {}).get("rungs") == {},
                **{key: detail.get(key) for key in LATENCY_KEYS},
                "params_m": attrs.get("params_m"),
                "macs_m": attrs.get("macs_m"),
                "resolution": attrs.get("resolution"),
                "feasible": bool(complete and attrs.get("feasible")),
                "verdict": verdict_of(attrs["budget_ms"], detail) if complete else None,
                "source": detail.get("source", ""),
                "digest": detail.get("digest"),
                "features": detail.get("training", {}).get("features"),
                "arch": attrs.get("arch"),
            }
        )
    return rows


def verdict_of(budget_ms: float, detail: Mapping[str, Any]) -> Verdict:
    """What a trial's own measurement says of its budget; measured briefly, that of one far over it is sure."""
    ci = detail["latency_ci_low_ms"], detail["latency_ci_high_ms"]
    if None in ci:
        return Verdict.OVER if detail["latency_ms"] > HOPELESS * budget_ms else Verdict.UNSURE
    return LatencyBudget(budget_ms).judge(ci)


def interval_words(low: float | None, high: float | None) -> str:
    """The 95% interval of a latency; a few rounds have none."""
    return "measured briefly" if low is None or high is None else f"95% {low:.2f} to {high:.2f} ms"


def earlier_ci(detail: Mapping[str, Any]) -> list[float] | None:
    """The 95% interval of a trial that an earlier version told: it kept one standard error."""
    if "quality_error" not in detail:
        return None
    found = of_error(detail["quality_estimate"], detail["quality_error"]).clipped()
    return [found.low, found.high]


def rank(row: Row) -> tuple[bool, float, float, float]:
    """Sorts best first: where its tier may choose by quality, those only guessed last; then parameters, then latency
    (forms of one network differ in nothing else)."""
    selects = row.get("selects", True)
    quality = -row["quality"] if selects else 0.0
    return selects and row.get("guessed", False), quality, -row["params_m"], row["latency_ms"]


def best_of(rows: Sequence[Row]) -> Row | None:
    return min(rows, key=rank, default=None)


def choose(rows: Sequence[Row]) -> Row | None:
    """The best that surely fits; where none does, the best that may."""
    sure = best_of([row for row in rows if row["verdict"] == Verdict.FITS])
    return sure or best_of([row for row in rows if row["verdict"] == Verdict.UNSURE])


def front_of(rows: Sequence[Row]) -> list[Row]:
    """Feasible rows that no other feasible row beats in both quality and latency, fastest first; none that are only
    guessed."""
    front: list[Row] = []
    known = (r for r in rows if r["feasible"] and not r.get("guessed"))
    for row in sorted(known, key=lambda r: (r["latency_ms"], -r["quality"])):
        if not front or row["quality"] > front[-1]["quality"]:
            front.append(row)
    return front


def finalists_of(rows: Sequence[Row], budget_ms: float) -> list[Row]:
    """Rows for the closing run: every published one that fits (the fastest one where none does), the best ones, the
    best of each family, and the best with some margin, should the machine be slower in the closing run.
    """
    feasible = [row for row in rows if row["feasible"]]
    published = [row for row in rows if row["name"] and row["latency_ms"] is not None]
    baselines = [row for row in published if row["feasible"]] or sorted(published, key=lambda r: r["latency_ms"])[:1]
    ranked = sorted(feasible, key=rank)
    chosen: list[Row] = []
    seen: set[str] = set()

    def add(row: Row | None) -> None:
        if row is None:
            return
        key = json.dumps(row["arch"], sort_keys=True)
        if key not in seen:
            seen.add(key)
            chosen.append(row)

    for row in baselines + ranked[:RESERVES]:
        add(row)
    for family in dict.fromkeys(row["family"] for row in ranked):
        add(best_of([row for row in feasible if row["family"] == family]))
    for share in MARGINS:
        add(best_of([row for row in feasible if row["latency_ms"] <= share * budget_ms]))
    return chosen


def label_of(row: Row) -> str:
    return row["name"] or f"trial {row['trial']}"


def later_rounds(final: Sequence[Row]) -> str:
    """Which networks of a closing run were measured longer after it, as a sentence; "" where none was."""
    longer = [row["label"] for row in final if row.get("rounds_alone")]
    return f"Measured longer afterwards, in rounds of their own: {', '.join(longer)}." if longer else ""


def arch_of(row: Row) -> Arch:
    from search_spaces import Arch

    return Arch.from_json(json.dumps(row["arch"]))


def score_words(row: Row) -> str:
    """A row's score and the 95% interval of its estimate."""
    low, high = row["quality_ci"]
    return f"{told_score(row['quality']):.1f} (95%: {low:.1f} to {high:.1f})"
