"""What a search came to, as a record: its report, its files and what a command prints are made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from nas.data.about import Summary
from nas.measure.budget import Limits, Verdict
from nas.measure.runtime import Settings
from nas.networks.timm_network import TimmNetwork
from nas.quality.candidate import Kind
from nas.quality.ranking import RungRank, Tau
from nas.search.accuracy import FinalTrainings
from nas.search.contest import Contest
from nas.search.latency import Pair, pair
from nas.search.log import PhaseTime
from nas.search.rows import ClosingRow, Network, OutsideRow, Trial, front_of, known, network_of
from nas.search.teaching import Teaching

if TYPE_CHECKING:
    from search_spaces import Arch

FORMAT = 2
"""The version of result.json."""
OVERHEAD = ("start", "estimate", "storage", "other")
"""Phases outside sampling, export, session creation and timed runs."""
FRONT_KEYS = (
    "family",
    "name",
    "kind",
    "parent",
    "quality",
    "quality_estimate",
    "quality_ci",
    "latency_ms",
    "verdict",
    "precision",
    "throughput",
    "params_m",
    "macs_m",
    "trial",
)
"""What pareto.json has of a trial beside its Arch."""


@dataclass(frozen=True)
class TierFacts:
    """The quality tier that estimated."""

    name: str
    label: str
    """What its figures are called."""
    note: str
    """What every reader of them should know, in one line."""
    trained: bool
    """Whether it judges by trainings on the user's images."""
    held_out: tuple[float, float | None] | None = None
    """Of its surrogate on networks left out: mean absolute error in points, and Kendall's tau; None: all are equal."""
    rungs: tuple[RungRank, ...] = ()
    """How well each rung ranked those that went on to the last."""


@dataclass(frozen=True)
class Validation:
    """How well a tier ranks networks that it has not trained for the search."""

    networks: int
    """How many were trained fully."""
    tau: Mapping[str, Tau]
    """By the estimates' names."""
    selects: bool
    """Whether the tier may choose."""
    tier: str = ""

    @classmethod
    def from_json(cls, found: object) -> Validation:
        """What a study keeps of one."""
        return TypeAdapter(cls).validate_python(found)


@dataclass(frozen=True)
class Winner:
    """The network in best/. Its latency is that of the closing run, or of its trial where there was none."""

    label: str
    family: str
    trial: int
    latency_ms: float
    """Median."""
    verdict: Verdict
    quality: float
    """Its score, percent."""
    quality_estimate: float
    """Of its top-1, percent."""
    quality_ci: Pair
    """The estimate's 95% interval, percent."""
    ci_low_ms: float | None
    """Ends of the latency's 95% interval; None where it was measured briefly."""
    ci_high_ms: float | None
    arch: Mapping[str, object]
    """The document of its network."""
    summary: tuple[Mapping[str, float], ...]
    """A row a stage; see `search_spaces.arch.StageSummary`. Empty for a network of timm's."""
    top1: float | None = None
    """Of its full trainings, percent, as the next four; None and empty without any."""
    top1_ci: Pair | None = None
    images: int | None = None
    """Validation images."""
    seeds: int | None = None
    words: str = ""
    """All of that in words."""
    kind: Kind | None = None
    """As `nas.quality.candidate.Candidate` has it, as the next; None outside of a race."""
    parent: str = ""
    resolution: int | None = None
    """Height and width of the input in pixels."""
    parent_epochs: int | None = None
    """That a derived network's parent was tuned for before its own training, as the next; None without one."""
    parent_seconds: float | None = None
    """That this took."""
    precision: str | None = None
    """That it was measured in, and is shipped in; None in studies of earlier versions."""
    published_top1: float | None = None
    """As `nas.search.rows.ClosingRow` has it; None without a closing run."""

    @classmethod
    def of(cls, row: Network) -> Winner:
        low, high = row.latency_ci or (None, None)
        found = row.accuracy if isinstance(row, ClosingRow) else None
        before = found.before if found else None
        return cls(
            label=row.label,
            family=row.family,
            trial=row.trial,
            latency_ms=known(row.latency_ms),
            verdict=known(row.verdict),
            quality=known(row.quality),
            quality_estimate=known(row.quality_estimate),
            quality_ci=known(row.quality_ci),
            ci_low_ms=low,
            ci_high_ms=high,
            arch=known(row.arch),
            summary=summary_of(network_of(row)),
            top1=found.mean if found else None,
            top1_ci=found.ci if found else None,
            images=found.images if found else None,
            seeds=len(found.top1) if found else None,
            words=found.words if found else "",
            kind=row.kind,
            parent=row.parent,
            resolution=row.resolution,
            parent_epochs=before.epochs if before else None,
            parent_seconds=before.seconds if before else None,
            precision=row.precision,
            published_top1=row.published_top1 if isinstance(row, ClosingRow) else None,
        )

    def to_json(self) -> dict[str, object]:
        """With the fields of `nas.search.contest.Standing`, too."""
        return asdict(self) | {"name": self.label, "accuracy": self.top1, "interval": self.top1_ci}

    @property
    def latency_ci(self) -> Pair | None:
        return pair(self.ci_low_ms, self.ci_high_ms)


def summary_of(network: Arch | TimmNetwork) -> tuple[Mapping[str, float], ...]:
    """A row a stage; none for a network of timm's."""
    return () if isinstance(network, TimmNetwork) else tuple(stage.model_dump() for stage in network.summary())


@dataclass(frozen=True)
class Fastest:
    """The fastest network that was measured, in the closing run where there was one."""

    label: str
    family: str
    latency_ms: float
    latency_ci_low_ms: float | None
    latency_ci_high_ms: float | None
    precision: str | None = None
    """That it was measured in; None in studies of earlier versions."""

    @classmethod
    def of(cls, row: Network) -> Fastest:
        low, high = row.latency_ci or (None, None)
        return cls(row.label, row.family, known(row.latency_ms), low, high, row.precision)

    @property
    def latency_ci(self) -> Pair | None:
        return pair(self.latency_ci_low_ms, self.latency_ci_high_ms)


@dataclass(frozen=True)
class ShortTraining:
    """The search's own training of the network in best/, where it was not trained fully."""

    epochs: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All that a search knows at its end."""

    study: str
    command: str
    """As typed."""
    started: str
    """ISO 8601, as the next."""
    finished: str
    interrupted: bool
    failures: tuple[str, ...]
    """A line for each step that has failed."""
    budget_ms: float
    limits: Limits = field(default_factory=Limits)
    """Beside the latency."""
    settings: Settings
    precisions: tuple[str, ...] = ()
    """That networks were tried in; that of the settings is the first."""
    throughput_at: int | None
    """The batch size of the throughput, where it is not that of the latency."""
    num_classes: int
    seed: int | None
    sampler: str
    hardware: Mapping[str, object]
    """As `nas.measure.hardware.describe` has it."""
    data: Summary | None = None
    """The images that it trained on."""
    quality_tier: TierFacts
    validation: Validation | None
    accuracy: FinalTrainings | None
    families: tuple[str, ...] = ()
    """That were searched."""
    ruled_out: tuple[str, ...] = ()
    """Those of them whose smallest shape was measured over the budget."""
    trials: tuple[Trial, ...]
    final: tuple[ClosingRow, ...]
    """The closing run's table, best first."""
    against: tuple[OutsideRow, ...]
    winner: Winner | None
    """None where nothing fits."""
    contest: Contest | None = None
    """Of a race with a winner."""
    teaching: Teaching | None = None
    """Of a race whose final trainings were begun: what they learn from."""
    fastest: Fastest | None
    """None where nothing was measured."""
    ties: tuple[str, ...]
    """This and the next four: lines for people."""
    advice: tuple[str, ...]
    notes: tuple[str, ...]
    skipped: tuple[str, ...]
    protocol: tuple[str, ...]
    breakdown: tuple[PhaseTime, ...]
    trials_per_minute: float
    median_trial_s: float
    untrained: bool
    """Whether best/ holds random weights."""
    short_training: ShortTraining | None

    @cached_property
    def front(self) -> list[Trial]:
        """The trials within the budget that none there beats in both score and latency, fastest first."""
        return front_of(self.trials)

    @property
    def budget(self) -> str:
        """What a network has to meet, in words."""
        return f"{self.budget_ms:g} ms{self.limits.words}"

    @property
    def beside(self) -> ClosingRow | None:
        """The network of the closing table that the ratios of `against` are to."""
        named = {row.beside for row in self.against}
        return next((row for row in self.final if row.label in named), next(iter(self.final), None))

    @property
    def better_published(self) -> ClosingRow | OutsideRow | None:
        """Where nothing is trained: of the networks of the closing run that surely fit, that with the best published
        top-1, if it is above what was published or else is predicted of the winner; any where there is no winner."""
        if self.quality_tier.trained:
            return None
        least = (self.winner.published_top1 or self.winner.quality_estimate) if self.winner else 0.0
        rows: list[ClosingRow | OutsideRow] = [*self.final, *self.against]
        fit = [row for row in rows if row.verdict == Verdict.FITS and not row.error]
        found = [row for row in fit if (row.published_top1 or 0.0) > least]
        return max(found, key=lambda row: known(row.published_top1), default=None)

    @property
    def overhead_share(self) -> float:
        """Share of the trials' wall time that went into `OVERHEAD`."""
        return sum(row.share for row in self.breakdown if row.phase in OVERHEAD)

    @property
    def exit_code(self) -> int:
        """0 where a network surely fits and every step was made, else 1."""
        return 0 if self.winner and self.winner.verdict == Verdict.FITS and not self.failures else 1

    def to_json(self) -> dict[str, object]:
        """result.json: all but the trials, which trials.csv has."""
        return {
            "version": FORMAT,
            "study": self.study,
            "command": self.command,
            "started": self.started,
            "finished": self.finished,
            "interrupted": self.interrupted,
            "failures": self.failures,
            "budget_ms": self.budget_ms,
            "limits": asdict(self.limits),
            "settings": asdict(self.settings),
            "precisions": self.precisions,
            "throughput_at": self.throughput_at,
            "num_classes": self.num_classes,
            "seed": self.seed,
            "sampler": self.sampler,
            "families": self.families,
            "ruled_out": self.ruled_out,
            "hardware": self.hardware,
            "data": self.data and asdict(self.data),
            "quality_tier": asdict(self.quality_tier),
            "validation": self.validation and asdict(self.validation),
            "accuracy": self.accuracy and self.accuracy.to_json(),
            "pareto": self.front_json(),
            "final": [row.to_json() for row in self.final],
            "against": [row.to_json() for row in self.against],
            "winner": self.winner and self.winner.to_json(),
            **(self.contest.to_json() | (self.teaching or Teaching()).to_json() if self.contest else {}),
            "fastest": self.fastest and asdict(self.fastest),
            "ties": self.ties,
            "advice": self.advice,
            "notes": self.notes,
            "skipped": self.skipped,
            "protocol": self.protocol,
            "breakdown": [asdict(row) for row in self.breakdown],
            "trials_per_minute": self.trials_per_minute,
            "median_trial_s": self.median_trial_s,
            "untrained": self.untrained,
            "short_training": self.short_training and asdict(self.short_training),
        }

    def front_json(self) -> list[dict[str, object]]:
        """pareto.json: the front with its Archs."""
        return [{"arch": row.arch, **{key: getattr(row, key) for key in FRONT_KEYS}} for row in self.front]
