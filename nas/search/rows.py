"""A study's trials and the networks of its closing run as records: their ranking, and the feasible front."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from nas.intervals import of_error
from nas.measure.budget import Verdict
from nas.networks.timm_network import TIMM
from nas.quality.candidate import Candidate, Kind
from nas.search.accuracy import Accuracies
from nas.search.latency import Pair, TrialLatency, pair

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from nas.networks.timm_network import TimmNetwork
    from search_spaces import Arch

ACCURACY = "accuracy"
"""In `over`, of a network that its precision costs more than it may."""
INTERRUPTED = "interrupted"
"""The error of a trial that Ctrl-C has ended; the next run of the command makes it again."""
RESERVES = 3
"""How many of the best trials enter the closing run, should the first not meet the budget there."""
NORMAL = 1.96
"""Standard errors that a 95% interval reaches to either side."""
MARGINS = (0.95, 0.85, 0.7)
"""Shares of the budget below which the best trial enters it too, should all of those be over it."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial that has ended. What was not measured or estimated is None, as all of a failed trial's figures are."""

    trial: int
    """Its number in the study."""
    family: str
    name: str = ""
    """Of a ready network or a published variant; empty for a network that the search made up."""
    kind: Kind | None = None
    """As `nas.quality.candidate.Candidate` has it, as the next and the name; None outside of a race."""
    parent: str = ""
    state: str
    """complete, failed, or interrupted by Ctrl-C."""
    error: str = ""
    """Why it failed, in one line."""
    quality: float | None = None
    """The score that the search ranks by, percent; see `nas.quality.tier.Estimate`."""
    quality_estimate: float | None = None
    """Of its top-1, percent."""
    quality_ci: Pair | None = None
    """The estimate's 95% interval, percent."""
    quality_how: str = ""
    """Where the estimate is from."""
    guessed: bool = False
    """Whether a tier that trains has not trained this network."""
    selects: bool = True
    """Whether its tier may choose by quality."""
    latency_ms: float | None = None
    """Median, as the next ones in milliseconds."""
    latency_p95_ms: float | None = None
    latency_ci_low_ms: float | None = None
    """Ends of the median's 95% interval; None where it was measured briefly."""
    latency_ci_high_ms: float | None = None
    samples: int | None = None
    """Timed inferences."""
    rounds: int | None = None
    reference_ms: float | None = None
    """Median latency of the reference network in the same rounds."""
    reference_drift: float | None = None
    """How far that moved within the trial, as a share of it."""
    throughput: float | None = None
    """Images a second."""
    memory_mb: float | None = None
    """Peak resident memory of its process above that of the runtime alone, in 10^6 bytes, as the next one."""
    file_mb: float | None = None
    """Size of its ONNX file."""
    energy_mj: float | None = None
    """Of an image, in millijoules, idle power included."""
    precision: str | None = None
    """That it was measured in, as the next one as `nas.search.latency.TrialLatency` has it."""
    by_precision: Mapping[str, float] | None = None
    over: tuple[str, ...] = ()
    """Limits beside the latency that it does not meet: memory, size."""
    params_m: float | None = None
    """Parameters in millions."""
    macs_m: float | None = None
    """Multiply-accumulate operations of one image in millions."""
    resolution: int | None = None
    """Height and width of the input in pixels."""
    feasible: bool = False
    """Whether its median latency meets the budget, and its memory and size their limits."""
    verdict: Verdict | None = None
    """What the interval of its latency says of the budget; over where it does not meet the limits."""
    source: str = ""
    """Where the latency is from: measured, reused (of the same network), or cache with a date."""
    digest: str | None = None
    """Of its network."""
    key: str | None = None
    """Of its candidate."""
    features: Sequence[float] | None = None
    """What the surrogate of a tier that trains goes by."""
    arch: Mapping[str, object] | None = None
    """The document of its network."""

    @property
    def label(self) -> str:
        return self.name or f"trial {self.trial}"

    @property
    def complete(self) -> bool:
        return self.state == "complete"

    @property
    def latency_ci(self) -> Pair | None:
        """The 95% interval of the median latency in milliseconds; None where it was measured briefly."""
        return pair(self.latency_ci_low_ms, self.latency_ci_high_ms)

    def to_json(self) -> dict[str, object]:
        """All of it but the network."""
        return _flat(self, leaving_out=("arch", "features", "key"))


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A network of the closing run, and its latency there. One that could not be measured has an error alone."""

    label: str
    resolution: int | None = None
    """Height and width of the input in pixels."""
    error: str = ""
    verdict: Verdict | None = None
    """What the interval of its latency says of the budget; over where it does not meet the limits."""
    latency_ms: float | None = None
    """Median, as the next ones in milliseconds."""
    latency_p95_ms: float | None = None
    ci_low_ms: float | None = None
    """Ends of the median's 95% interval."""
    ci_high_ms: float | None = None
    samples: int | None = None
    """Timed inferences."""
    rounds_alone: int | None = None
    """Rounds that it was measured in after those that all networks took part in."""
    throughput: float | None = None
    """Images a second."""
    memory_mb: float | None = None
    """As `Trial` has it, as the next four."""
    file_mb: float | None = None
    energy_mj: float | None = None
    over: tuple[str, ...] = ()
    precision: str | None = None

    @property
    def latency_ci(self) -> Pair | None:
        """The 95% interval of the median latency in milliseconds."""
        return pair(self.ci_low_ms, self.ci_high_ms)

    def to_json(self) -> dict[str, object]:
        unmeasured = ("latency_ms", "latency_p95_ms", "ci_low_ms", "ci_high_ms", "samples", "rounds_alone")
        needs = ("throughput", "memory_mb", "file_mb", "energy_mj", "over")
        return _flat(self, leaving_out=(*unmeasured, *needs, "arch") if self.error else ("arch",))


@dataclass(frozen=True, kw_only=True)
class ClosingRow(Timed):
    """A trial's network in the closing run; the first fields are its trial's."""

    trial: int
    family: str
    name: str
    kind: Kind | None = None
    parent: str = ""
    quality: float
    quality_estimate: float
    quality_ci: Pair
    quality_how: str
    guessed: bool
    selects: bool = True
    params_m: float
    macs_m: float
    arch: Mapping[str, object] | None = None
    role: str
    """winner, family winner, published or found, or a ready or derived network's kind."""
    published_top1: float | None = None
    """Percent, as its authors published it; None where this network is not exactly theirs."""
    accuracy: Accuracies | None = None
    """Of its full trainings, where it had any."""

    @classmethod
    def of(cls, trial: Trial, **measured: Any) -> ClosingRow:
        """A complete trial's row. measured: the fields of `Timed`."""
        return cls(
            label=trial.label,
            resolution=trial.resolution,
            trial=trial.trial,
            family=trial.family,
            name=trial.name,
            kind=trial.kind,
            parent=trial.parent,
            quality=known(trial.quality),
            quality_estimate=known(trial.quality_estimate),
            quality_ci=known(trial.quality_ci),
            quality_how=trial.quality_how,
            guessed=trial.guessed,
            selects=trial.selects,
            params_m=known(trial.params_m),
            macs_m=known(trial.macs_m),
            arch=trial.arch,
            role=role_of(trial),
            published_top1=published_top1(trial),
            **measured,
        )

    def to_json(self) -> dict[str, object]:
        found = super().to_json()
        del found["accuracy"]
        return found | ({"accuracy": self.accuracy.to_json()} if self.accuracy else {})


@dataclass(frozen=True, kw_only=True)
class OutsideRow(Timed):
    """A network of --against in the closing run."""

    ratio: float | None = None
    """Its latency over that of the first network of the final table, as the closing run ended, from pairs of rounds."""
    ratio_low: float | None = None
    """Ends of the ratio's 95% interval."""
    ratio_high: float | None = None
    published_top1: float | None = None
    """Of one of timm's at this resolution, percent; None where none is known."""
    beside: str = ""
    """The label of the network that the ratio is to; "" without a ratio, and in results of earlier versions."""


Network = Trial | ClosingRow
N = TypeVar("N", Trial, ClosingRow)


def role_of(row: Network) -> str:
    """The role of a network that is no winner."""
    if row.kind in (Kind.READY, Kind.DERIVED):
        return row.kind
    return "published" if row.name else "found"


def known(value: T | None) -> T:
    """A figure that every complete trial has."""
    assert value is not None
    return value


def _flat(row: Trial | Timed, leaving_out: Sequence[str]) -> dict[str, object]:
    return {each.name: getattr(row, each.name) for each in fields(row) if each.name not in leaving_out}


def rows_of(study: optuna.Study) -> list[Trial]:
    """The trials of a study that have ended, in order."""
    from nas.study.ledger import ledger_of

    return ledger_of(study).read(trial_of)


def trial_of(trial: FrozenTrial) -> Trial:
    """What a study keeps of a trial."""
    from optuna.trial import TrialState

    attrs = trial.user_attrs
    detail = attrs.get("detail", {})
    complete = trial.state == TrialState.COMPLETE
    ends = detail.get("quality_ci") or _earlier_ci(detail)
    latency = TrialLatency.read(detail) if "latency_ms" in detail else None
    over = tuple(detail.get("over", ()))
    verdict = latency.verdict(attrs["budget_ms"]) if complete and latency else None
    return Trial(
        trial=trial.number,
        family=attrs.get("family", trial.params.get("family", "")),
        name=attrs.get("name", ""),
        kind=Kind(attrs["kind"]) if "kind" in attrs else None,
        parent=attrs.get("parent", ""),
        state="complete" if complete else "interrupted" if attrs.get("error") == INTERRUPTED else "failed",
        error=attrs.get("error", ""),
        quality=trial.values[0] if complete else None,
        quality_estimate=detail.get("quality_estimate"),
        quality_ci=ends and (ends[0], ends[1]),
        quality_how=detail.get("quality_how", ""),
        guessed=detail.get("training", {}).get("rungs") == {},
        **(asdict(latency) if latency else {}),
        params_m=attrs.get("params_m"),
        macs_m=attrs.get("macs_m"),
        resolution=attrs.get("resolution"),
        feasible=bool(complete and attrs.get("feasible")),
        over=over,
        verdict=Verdict.OVER if verdict and over else verdict,
        digest=detail.get("digest"),
        key=detail.get("key", detail.get("digest")),
        features=detail.get("training", {}).get("features"),
        arch=attrs.get("arch"),
    )


def _earlier_ci(detail: Mapping[str, Any]) -> Pair | None:
    """The 95% interval of a trial that an earlier version told: it kept one standard error."""
    if "quality_error" not in detail:
        return None
    found = of_error(detail["quality_estimate"], detail["quality_error"]).clipped()
    return found.low, found.high


def rank(row: Network) -> tuple[bool, float, float, float]:
    """Sorts best first: where its tier may choose by quality, those only guessed last; then parameters, then latency
    (forms of one network differ in nothing else)."""
    quality = -known(row.quality) if row.selects else 0.0
    return row.selects and row.guessed, quality, -known(row.params_m), known(row.latency_ms)


def best_of(rows: Sequence[N]) -> N | None:
    return min(rows, key=rank, default=None)


def peers_of(best: N, rows: Sequence[N]) -> list[N]:
    """Children of a network's parent that are as good as far as the images that judge can tell, those with the most
    MACs first: an estimate that is short of the best by less than a standard error is no reason to take more away.

    Args:
        best: a child, which is among the result.
    """
    low, high = known(best.quality_ci)
    least = known(best.quality_estimate) - (high - low) / (2 * NORMAL)
    place = best.parent, best.resolution
    found = [row for row in rows if row.selects and not row.guessed and (row.parent, row.resolution) == place]
    found = [row for row in found if known(row.quality_estimate) >= least]
    return sorted(found, key=lambda row: -known(row.macs_m))


def choose(rows: Sequence[N]) -> N | None:
    """The best that surely fits; where none does, the best that may."""
    sure = best_of([row for row in rows if row.verdict == Verdict.FITS])
    return sure or best_of([row for row in rows if row.verdict == Verdict.UNSURE])


def front_of(rows: Sequence[Trial]) -> list[Trial]:
    """Feasible trials that no other feasible one beats in both quality and latency, fastest first; none that are only
    guessed."""
    front: list[Trial] = []
    candidates = (row for row in rows if row.feasible and not row.guessed)
    for row in sorted(candidates, key=lambda row: (known(row.latency_ms), -known(row.quality))):
        if not front or known(row.quality) > known(front[-1].quality):
            front.append(row)
    return front


def finalists_of(rows: Sequence[Trial], budget_ms: float) -> list[Trial]:
    """Trials for the closing run: every published one that fits (of ready ones the best that may) and the fastest one
    that does not, of ready ones where none fits; the best ones, the largest of each parent's best (see `peers_of`), the
    best of each kind and family, and the best with some margin, should the machine be slower in the closing run.
    """
    feasible = [row for row in rows if row.feasible]
    published = [row for row in rows if row.name and row.latency_ms is not None]
    may_fit = [
        row for row in rows if row.feasible or (row.verdict == Verdict.UNSURE and row.complete and not row.guessed)
    ]
    ready = sorted((row for row in may_fit if row.kind == Kind.READY), key=rank)[:RESERVES]
    variants = [row for row in published if row.feasible and row.kind != Kind.READY]
    above = (row for row in published if not row.feasible and (row.kind != Kind.READY or not variants + ready))
    baselines = variants + ready + sorted(above, key=lambda row: known(row.latency_ms))[:1]
    ranked = sorted(feasible, key=rank)
    chosen: dict[str, Trial] = {}

    def add(row: Trial | None) -> None:
        if row is not None:
            chosen.setdefault(json.dumps([row.arch, row.parent], sort_keys=True), row)

    for row in baselines + ranked[:RESERVES]:
        add(row)
    for kind in Kind:
        add(best_of([row for row in feasible if row.kind == kind]))
    for parent in dict.fromkeys((row.parent, row.resolution) for row in ranked if row.parent):
        children = [row for row in ranked if (row.parent, row.resolution) == parent]
        for row in peers_of(children[0], children)[:RESERVES]:
            add(row)
    for family in dict.fromkeys(row.family for row in ranked):
        add(best_of([row for row in feasible if row.family == family]))
    for share in MARGINS:
        add(best_of([row for row in feasible if known(row.latency_ms) <= share * budget_ms]))
    return list(chosen.values())


def network_of(row: Network) -> Arch | TimmNetwork:
    from nas.networks.build import from_document

    return from_document(json.dumps(row.arch))


def candidate_of(row: Network) -> Candidate:
    return Candidate(network_of(row), row.kind or Kind.SCRATCH, row.parent, row.name)


def lost_in(final: Sequence[ClosingRow]) -> str:
    """The precisions that cost networks of the closing run more than they may: "int8"; "" where none does."""
    found = dict.fromkeys(row.precision or "int8" for row in final if ACCURACY in row.over)
    return " and ".join(found)


def published_top1(row: Trial) -> float | None:
    """What was published of a variant, percent, at its own resolution and number of classes; None of a network of
    timm's."""
    from search_spaces.api import find_variant

    if not row.name or row.name.startswith(TIMM) or row.arch is None:
        return None
    _, variant = find_variant(row.name.partition("@")[0])
    at_home = row.resolution == variant.values["resolution"] and row.arch["num_classes"] == 1000
    return variant.top1 if at_home else None
