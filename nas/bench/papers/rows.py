"""What was measured of the papers' claims: the rows that JSON, CSV, Markdown and the table are made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from nas.bench.papers.claims import Claim
from nas.measure.runtime import Settings

Pair = tuple[float, float]


@dataclass(frozen=True)
class Outcome:
    """A claim under one setting. What was not measured is None."""

    claimed: float | None = None
    """The published ratio."""
    measured: float | None = None
    """The ratio, or the figure of a finding."""
    ci: Pair | None = None
    """Its 95% interval."""
    subject_ms: float | None = None
    """Median latency of the claim's subject."""
    baseline_ms: float | None = None
    verdict: str = "not measured"
    error: str | None = None
    """Why it was not measured."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ci": self.ci and list(self.ci)}


@dataclass(frozen=True)
class Other:
    """A further setting that a claim was measured under."""

    settings: Settings
    outcome: Outcome

    def to_json(self) -> dict[str, Any]:
        return asdict(self.settings) | self.outcome.to_json()


@dataclass(frozen=True)
class MeasuredPart:
    """A part of a block in microseconds, of the (subject, baseline); None where one has no such part."""

    part: str
    published_us: tuple[float | None, float | None]
    measured_us: tuple[float | None, float | None]

    def to_json(self) -> dict[str, Any]:
        return {"part": self.part, "published_us": [*self.published_us], "measured_us": [*self.measured_us]}


@dataclass(frozen=True)
class AttentionShare:
    """Swin-T with another share of attention layers."""

    mhsa_share: float
    ms: float
    """Median time in all operators."""
    memory_bound_share: float
    """Share of that time in operators that are bound by memory."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class HeadSimilarity:
    """How alike a block's attention heads are."""

    block: int
    """From 0."""
    similarity: float
    """Mean cosine similarity of a head to the most similar other one."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PapersRow:
    """A claim beside what was measured."""

    claim: Claim
    settings: Settings
    """What the outcome was measured under."""
    outcome: Outcome = field(default_factory=Outcome)
    quantity: str = ""
    """What is claimed and measured."""
    claimed_on: str | None = None
    """Where the published figure was measured: GPU, CPU or ONNX CPU."""
    caveat: str = ""
    """What weakens the published figure."""
    why: str = ""
    """What explains the outcome, other settings' ones included."""
    others: tuple[Other, ...] = ()
    parts: tuple[MeasuredPart, ...] | tuple[AttentionShare, ...] | tuple[HeadSimilarity, ...] = ()

    def to_json(self) -> dict[str, Any]:
        claim, found = self.claim, self.outcome.to_json()
        return {
            "id": claim.id,
            "paper": claim.paper,
            "claim": claim.statement,
            "subject": claim.subject,
            "baseline": claim.baseline,
            "quantity": self.quantity,
            "claimed": found["claimed"],
            "claimed_on": self.claimed_on,
            "caveat": self.caveat,
            "published": [asdict(figure) | {"ratio": figure.ratio} for figure in claim.published],
            "conditions": claim.conditions,
            "source": claim.source,
            "note": claim.note,
            "measured": found["measured"],
            "ci": found["ci"],
            "subject_ms": found["subject_ms"],
            "baseline_ms": found["baseline_ms"],
            **asdict(self.settings),
            "verdict": found["verdict"],
            "why": self.why,
            "others": [other.to_json() for other in self.others],
            "parts": [part.to_json() for part in self.parts],
            "error": found["error"],
        }


@dataclass(frozen=True)
class PapersResult:
    """The claims that were reached."""

    settings: Settings
    """The user's."""
    rounds: int
    interrupted: str | None
    """What cut it short; None where nothing did."""
    rows: tuple[PapersRow, ...]
    """In the order of `CLAIMS`."""

    def to_json(self) -> dict[str, Any]:
        rows = [row.to_json() for row in self.rows]
        return {
            "settings": asdict(self.settings),
            "rounds": self.rounds,
            "interrupted": self.interrupted,
            "rows": rows,
        }
