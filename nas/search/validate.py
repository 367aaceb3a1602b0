"""How well a tier's estimates rank networks: Kendall's tau with full trainings, beside that of the networks' size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap

from nas.errors import TrainingError
from nas.quality.schooling import LEAST_VALIDATED, collected

if TYPE_CHECKING:
    import optuna

    from nas.quality.trained import Train
    from nas.search.request import SearchRequest
    from search_spaces import Arch

RUN = "validation run "
"""With a digest, the study attribute that holds the row of what was trained for it."""
RESULT = "validation"
GATE = "estimate, first rung"
"""What decides whether a tier may choose: what it says of most networks of a search, which end there."""
RESAMPLES, BATCH = 2_000, 100
"""Of the bootstrap: how many in all, and at once in memory."""
TRIES = 50
SEED = 10_007


def validate(
    options: SearchRequest,
    study: optuna.Study,
    tier: Train,
    rows: Sequence[Mapping[str, Any]],
    note: Callable[[str], None],
) -> dict[str, Any] | None:
    """Train `options.lessons.validate` Archs fully that the search has not trained, and rank them by every estimate.

    They are drawn at random among networks with no more and no fewer MACs than the search found within its budget;
    full trainings have another seed, all training images but those that judge, and are judged by those.
    """
    wanted = options.lessons.validate
    within = [row["macs_m"] for row in rows if row["feasible"]]
    if not wanted or not within:
        return study.user_attrs.get(RESULT)
    seen = {row["digest"] for row in rows}

    def done() -> list[dict[str, Any]]:
        return [
            row for row in collected(study, RUN).values() if row.get("final_epochs") == options.lessons.final_epochs
        ]

    for arch in draw(options, min(within), max(within)):
        if len(done()) >= wanted:
            break
        if arch.digest() in seen or arch.digest() in collected(study, RUN):
            continue
        try:
            row = measure_one(tier, arch)
        except TrainingError as error:
            note(f"a network of the validation could not be trained: {error}")
            row = {}
        study.set_user_attr(RUN + arch.digest(), row)
    found = done()
    if len(found) < wanted:
        note(f"the validation found only {len(found)} of {wanted} networks of the budget's size")
    if len(found) < LEAST_VALIDATED:
        return None
    result = {"tier": tier.name, "networks": len(found), "tau": taus(found)}
    result["selects"] = selects(result["tau"][GATE])
    study.set_user_attr(RESULT, result)
    return result


def draw(options: SearchRequest, low: float, high: float) -> Iterator[Arch]:
    """Networks of the searched spaces with `low` to `high` million MACs, in an order that the study's seed fixes."""
    from search_spaces import table
    from search_spaces.registry import FAMILIES
    from search_spaces.space import random_params

    rng = np.random.default_rng([SEED, options.seed or 0])
    for _ in range(TRIES * options.lessons.validate):
        family = options.families[rng.integers(len(options.families))]
        arch = FAMILIES[family].space.decode(random_params(rng), options.num_classes, options.resolution)
        if low <= table(arch).macs() / 1e6 <= high:
            yield arch


def measure_one(tier: Train, arch: Arch) -> dict[str, Any]:
    """One network's size, estimates and accuracy after a full training."""
    from search_spaces import table

    counts = table(arch)
    untrained = tier.predict(arch, counts)
    estimate = tier.complete(arch, counts, keeps=False)
    rungs = estimate.training["rungs"]
    school = tier.schooling
    rest, judge = school.halves(arch.resolution)
    folder = school.folder / f"{arch.digest()[:16]}-full"
    training = tier.begin(arch, rest, tier.recipe(school.lessons.final_epochs), SEED, folder)
    try:
        training.run(None, lambda done, total, *_: school.progress("validation", done, total))
    finally:
        training.loader.close()
    found = school.judge(training.network, judge)
    folder.unlink(missing_ok=True)
    return {
        "family": arch.family,
        "params": counts.params(),
        "macs": counts.macs(),
        "final_epochs": school.lessons.final_epochs,
        "surrogate alone": untrained.value,
        GATE: tier.early(arch, counts, rungs).value,
        "estimate, last rung": estimate.value,
        "rungs": rungs,
        "top1": found.top1,
    }


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
        return agree / np.sqrt(differ[0] * differ[1])


def selects(found: Mapping[str, Any]) -> bool:
    """Whether a tier with this tau may choose: not where its interval includes 0."""
    return found["ci"] is not None and found["ci"][0] > 0
