"""Measures the papers' claims: which settings are tried, how a ratio becomes a verdict, and the rows."""

from __future__ import annotations

import difflib
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from nas.bench.papers.claims import CLAIMS, Claim
from nas.bench.papers.rows import (
    AttentionShare,
    HeadSimilarity,
    MeasuredPart,
    Other,
    Outcome,
    Pair,
    PapersResult,
    PapersRow,
)
from nas.errors import UserError
from nas.export.artifact import write_artifact
from nas.export.quantize import NOISE
from nas.export.side_by_side import measure_side_by_side
from nas.machine import usable_cpus
from nas.measure.device import device_kind, device_lock, is_here
from nas.measure.runtime import RUNTIMES, Settings
from nas.measure.samples import SURE_ROUNDS, MeasureError, Measurement, median_interval, paired_ratio, quanta
from nas.networks.timm_network import TIMM, TimmNetwork
from nas.process import Worker, WorkerError
from nas.text import first_line
from nas.units import counted

if TYPE_CHECKING:
    from search_spaces import Arch

EAGER = "torch"
BLOCK = "block/"
WITHIN = 0.10
GPU_BATCH = 256
ANSWER_S = 120  # for one step of one network: loading, warming up, a round
NOT_REMOTE = "blocks in PyTorch, and this finding, are measured on this machine only, not on a remote device"
WAITED = "waited for CPUs that other processes use, so its time is none of its own: measure again on a quiet machine"
SHARES = (0.5, 0.3, 0.2)

Timings = dict[str, Measurement | MeasureError]


@dataclass(frozen=True)
class Attempt:
    """A claim under one setting: either a ratio, or the error that stood in its way."""

    settings: Settings
    claimed: float
    """The published ratio."""
    where: str
    """Where that was measured."""
    ratio: float = 0.0
    """How many times as fast as its baseline the subject is."""
    interval: Pair = (0.0, 0.0)
    """The ratio's 95% interval."""
    subject_ms: float = 0.0
    """Median latency, as the next one."""
    baseline_ms: float = 0.0
    error: str | None = None

    @property
    def verdict(self) -> str:
        """A claim holds where the ratio is at least 90% of the claimed one, and not below 1 where a gain is claimed.

        It is unclear where only the ratio's interval reaches that far, and holds partly where the subject is certainly
        faster all the same. A claim of equal cost is exceeded by more than 110%.
        """
        least = max((1 - WITHIN) * self.claimed, min(self.claimed, 1.0) if self.claimed > 1 else 0.0)
        if self.error:
            return "not measured"
        if self.claimed == 1 and self.interval[0] > 1 + WITHIN:
            return "faster than claimed"
        if self.ratio >= least:
            return "holds"
        if self.interval[1] >= least:
            return "unclear: too noisy"
        if self.claimed > 1 and self.interval[0] > 1:
            return f"partly ({self.ratio:.2f}x of {self.claimed:.2f}x)"
        return "does not hold here"

    @property
    def outcome(self) -> Outcome:
        if self.error is not None:
            return Outcome(self.claimed, error=self.error)
        return Outcome(self.claimed, self.ratio, self.interval, self.subject_ms, self.baseline_ms, self.verdict)


@dataclass
class ClaimTrial:
    """The measurements of one claim so far."""

    claim: Claim
    attempts: list[Attempt] = field(default_factory=list)
    parts: tuple[MeasuredPart, ...] = ()

    @property
    def holds(self) -> bool:
        return any(attempt.verdict == "holds" for attempt in self.attempts)


def run_papers(
    settings: Settings,
    rounds: int = SURE_ROUNDS,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
    only: Sequence[str] | None = None,
) -> PapersResult:
    """Measure the five papers' claims on this machine, each pair interleaved.

    settings: the user's, as checked by `check_settings`; every claim is measured there first, then at a batch if it is
    about throughput, then, where it has not held, as the paper did it: in PyTorch eager, at that batch and, where the
    claim is about a CPU, on one thread. progress is called with (claims done, claims), say with a line on what comes
    next. only: papers, or ids of claims.

    Returns:
        A row per claim that was reached; a claim that cannot be measured has its error as its outcome.

    Raises:
        UserError: a name in `only` that is neither.
    """
    claims = _chosen(only)
    rows: list[PapersRow] = []
    trials: list[ClaimTrial] = []
    interrupted = None
    if say and settings.precision == "int8":
        say(NOISE)
    try:
        for paper, group in groupby(claims, key=lambda claim: claim.paper):
            members = list(group)
            trials = [ClaimTrial(claim) for claim in members if claim.id not in FINDINGS]
            _measure(paper, trials, settings, rounds, say)
            found = {trial.claim.id: _row(trial, settings) for trial in trials}
            for claim in members:
                rows.append(found.get(claim.id) or _finding(claim, settings, say))
                if progress:
                    progress(len(rows), len(claims))
    except (KeyboardInterrupt, UserError) as error:  # a remote device that is gone, say
        interrupted = str(error) or "interrupted"
        done = {row.claim.id for row in rows}
        rows += [_row(trial, settings) for trial in trials if trial.attempts and trial.claim.id not in done]
    return PapersResult(settings, rounds, interrupted, tuple(rows))


def _chosen(only: Sequence[str] | None) -> list[Claim]:
    if not only:
        return list(CLAIMS)
    names = [name.lower() for name in only]
    known = [claim.id for claim in CLAIMS] + list(dict.fromkeys(claim.paper.lower() for claim in CLAIMS))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            meant = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
            raise UserError(f"no claim or paper {name!r}: {meant}")
    return [claim for claim in CLAIMS if claim.id in names or claim.paper.lower() in names]


def _measure(
    paper: str, trials: list[ClaimTrial], settings: Settings, rounds: int, say: Callable[[str], None] | None
) -> None:
    """Measure the claims of one paper, those that share settings in one interleaved run."""
    for plan, only_failed in ((first_settings, False), (further_settings, True)):
        steps = {trial.claim.id: plan(trial.claim, settings) for trial in trials}
        for wanted in _distinct(one for trial in sorted(trials, key=_is_network) for one in steps[trial.claim.id]):
            asked = [t for t in trials if wanted in steps[t.claim.id] and not (only_failed and t.holds)]
            names = dict.fromkeys(name for trial in asked for name in _names(trial, wanted))
            if not names:
                continue
            if say:
                say(f"{paper}, {settings_words(wanted)}: {', '.join(name for name in names if '.' not in name)}")
            timings = time_networks(list(names), wanted, rounds)
            for trial in asked:
                trial.attempts.append(_attempt(trial.claim, wanted, timings))
                if _has_parts(trial, wanted):
                    trial.parts = _parts(trial.claim, timings)


def first_settings(claim: Claim, settings: Settings) -> list[Settings]:
    """What a claim is always measured under: the user's settings, or for blocks PyTorch first, as in the papers."""
    if not claim.subject.startswith(BLOCK):
        return _distinct([settings, replace(settings, batch_size=_batch(claim, settings))])
    plain = replace(settings, precision="fp32", batch_size=settings.batch_size if claim.batch else 1)
    eager = replace(plain, runtime=EAGER, threads=claim.threads or settings.threads)
    steps = [eager] if is_here(settings.device) else []
    return _distinct(steps + ([plain] if RUNTIMES[settings.runtime].artifact == "onnx" else []))


def further_settings(claim: Claim, settings: Settings) -> list[Settings]:
    """What is tried where a claim has not held: the paper's own way, as near as this device comes."""
    if claim.subject.startswith(BLOCK) and not is_here(settings.device):
        return []
    cuda = device_kind(settings.device) == "cuda"
    precision = "fp16" if cuda and "fp16" in claim.conditions else "fp32"
    papers = replace(settings, runtime=EAGER, precision=precision, batch_size=_batch(claim, settings))
    if not cuda and any(figure.where == "CPU" for figure in claim.published):
        papers = replace(papers, threads=1)
    return [papers] if papers not in first_settings(claim, settings) else []


def _batch(claim: Claim, settings: Settings) -> int:
    """What stands for the paper's batch on this device."""
    return 1 if claim.batch is None else GPU_BATCH if device_kind(settings.device) == "cuda" else claim.batch


def _is_network(trial: ClaimTrial) -> bool:
    return not trial.claim.subject.startswith(BLOCK)


def _distinct(steps: Iterable[Settings]) -> list[Settings]:
    return list(dict.fromkeys(steps))


def settings_words(settings: Settings) -> str:
    words = [settings.runtime]
    words += [settings.precision] if settings.precision != "fp32" else []
    words += [settings.device] if settings.device != "cpu" else []
    return ", ".join([*words, f"batch {settings.batch_size}", counted(settings.threads, "thread")])


def _has_parts(trial: ClaimTrial, wanted: Settings) -> bool:
    return bool(trial.claim.parts) and wanted.runtime == EAGER and not trial.parts


def _names(trial: ClaimTrial, wanted: Settings) -> list[str]:
    names = [trial.claim.subject, trial.claim.baseline]
    if _has_parts(trial, wanted):
        names += [name for part in trial.claim.parts for name in (part.subject, part.baseline) if name]
    return names


def _attempt(claim: Claim, wanted: Settings, timings: Timings) -> Attempt:
    figure = claim.published_for(wanted)
    subject, baseline = timings[claim.subject], timings[claim.baseline]
    failed = [f"{name}: {why}" for name in (claim.subject, claim.baseline) if (why := _useless(timings[name]))]
    if isinstance(subject, Measurement) and isinstance(baseline, Measurement) and not failed:
        times = *paired_ratio(baseline, subject), subject.p50_ms, baseline.p50_ms
        return Attempt(wanted, figure.ratio, figure.where, *times)
    return Attempt(wanted, figure.ratio, figure.where, error="; ".join(failed))


def _useless(timing: Measurement | MeasureError) -> str | None:
    """Why a timing says nothing of its network."""
    if isinstance(timing, MeasureError):
        return str(timing)
    return WAITED if quanta(timing) else None


def _parts(claim: Claim, timings: Timings) -> tuple[MeasuredPart, ...]:
    def microseconds(name: str | None) -> float | None:
        timing = timings[name] if name else None
        return round(1000 * timing.p50_ms, 1) if isinstance(timing, Measurement) and not quanta(timing) else None

    return tuple(
        MeasuredPart(part.name, part.published_us, (microseconds(part.subject), microseconds(part.baseline)))
        for part in claim.parts
    )


def time_networks(names: Sequence[str], settings: Settings, rounds: int) -> Timings:
    """Latencies by name, interleaved: networks in a process each, blocks in PyTorch in one."""
    blocks = [name for name in names if name.startswith(BLOCK) and settings.runtime == EAGER]
    timings: Timings = _time_blocks(blocks, settings, rounds) if blocks else {}
    networks = {name: name for name in names if name not in blocks}
    if not networks:
        return timings

    def export(name: str, stem: Path) -> Path:
        try:
            return _artifact(name, settings, stem)
        except Exception as error:
            raise _measure_error(error) from None

    try:
        return timings | measure_side_by_side(networks, export, settings, rounds, timeout_s=ANSWER_S)
    except MeasureError as error:
        return timings | dict.fromkeys(networks, error)


def _measure_error(error: Exception) -> MeasureError:
    return MeasureError(first_line(error))


def network(name: str) -> Arch | TimmNetwork:
    """A published name of ours or "timm/NAME", each with "@px" for another resolution."""
    from search_spaces import get_arch

    plain, _, pixels = name.partition("@")
    if plain.startswith(TIMM):
        return TimmNetwork(plain.removeprefix(TIMM), int(pixels or 0))
    return get_arch(plain).at(int(pixels)) if pixels else get_arch(plain)


def _artifact(name: str, settings: Settings, stem: Path) -> Path:
    if not name.startswith(BLOCK):
        return write_artifact(network(name), settings, stem)
    from nas.bench.papers.blocks import export_block

    path = stem.with_suffix(".onnx")
    export_block(name.removeprefix(BLOCK), path, settings.batch_size)
    return path


def _time_blocks(names: Sequence[str], settings: Settings, rounds: int) -> Timings:
    timings = {name: Measurement() for name in names}
    try:
        with device_lock(settings.device), _bench(settings) as bench:
            bench.call("load_blocks", ANSWER_S, names=[name.removeprefix(BLOCK) for name in names])
            for _ in range(rounds):
                samples = bench.call("time_round", ANSWER_S)
                for name, timing in timings.items():
                    timing.rounds_ms.append(samples[name.removeprefix(BLOCK)])
    except WorkerError as error:
        return dict.fromkeys(names, MeasureError(str(error)))
    return {**timings}


@contextmanager
def _bench(settings: Settings) -> Iterator[Worker]:
    with Worker("nas.bench.papers.worker", usable_cpus()[: settings.threads]) as bench:
        bench.call("start", ANSWER_S, settings=asdict(settings))
        yield bench


def _row(trial: ClaimTrial, settings: Settings) -> PapersRow:
    """A claim beside what was measured; the first attempt gives the verdict, the others go into `why`."""
    claim = trial.claim
    if not trial.attempts:
        return PapersRow(claim, settings, Outcome(error=NOT_REMOTE))
    main, *others = trial.attempts
    figure = claim.published_for(main.settings)
    return PapersRow(
        claim,
        main.settings,
        main.outcome,
        quantity="speed-up",
        claimed_on=figure.where,
        caveat=figure.caveat,
        why="; ".join(f"{settings_words(one.settings)}: {_found(one)}" for one in others),
        others=tuple(Other(one.settings, one.outcome) for one in others),
        parts=trial.parts,
    )


def _found(attempt: Attempt) -> str:
    if attempt.error:
        return f"not measured ({attempt.error})"
    holds = "holds, " if attempt.verdict == "holds" else ""
    return f"{holds}{attempt.ratio:.2f}x of {attempt.claimed:.2f}x ({attempt.where})"


def _finding(claim: Claim, settings: Settings, say: Callable[[str], None] | None) -> PapersRow:
    """The row of a claim of FINDINGS, which are not about the speed of one network against another's."""
    threads = claim.threads or settings.threads
    wanted = replace(settings, runtime=EAGER, precision="fp32", batch_size=claim.batch or 1, threads=threads)
    row = PapersRow(claim, wanted)
    if not is_here(settings.device):
        return replace(row, outcome=Outcome(error=NOT_REMOTE))
    if say:
        say(f"{claim.paper}, {settings_words(wanted)}: {claim.subject}")
    try:
        return FINDINGS[claim.id](row)
    except Exception as error:
        return replace(row, outcome=Outcome(error=str(_measure_error(error))))


def _mhsa_share(row: PapersRow) -> PapersRow:
    """Share of the time of Swin-T that is bound by memory, at several shares of attention layers."""
    with device_lock(row.settings.device), _bench(row.settings) as bench:
        shares = bench.call("load_swins", ANSWER_S, shares=list(SHARES))["shares"]
        rounds = [bench.call("profile_round", ANSWER_S)["profiles"] for _ in range(SURE_ROUNDS)]
    columns = list(zip(*rounds, strict=True))  # per network, its (ms, share) of each round
    middle = [tuple(map(statistics.median, zip(*column, strict=True))) for column in columns]
    ratios = [own / few for (_, own), (_, few) in zip(columns[0], columns[-1], strict=True)]
    low, high = median_interval(ratios)
    said = [f"{share:.0%} MHSA: {bound:.1%} of {ms:.0f} ms" for share, (ms, bound) in zip(shares, middle, strict=True)]
    return replace(
        row,
        quantity="memory-bound share at 50% MHSA over that at 20%",
        outcome=Outcome(
            measured=statistics.median(ratios),
            ci=(low, high),
            subject_ms=middle[-1][0],
            baseline_ms=middle[0][0],
            verdict="holds" if low > 1 else "unclear: too noisy" if high > 1 else "does not hold here",
        ),
        why=f"memory-bound (all but matrix products and convolutions): {'; '.join(said)}",
        parts=tuple(AttentionShare(share, ms, bound) for share, (ms, bound) in zip(shares, middle, strict=True)),
    )


def _head_similarity(row: PapersRow) -> PapersRow:
    """Mean over blocks of `head_similarity` of the trained DeiT-Tiny on scikit-learn's two photographs."""
    from nas.bench.papers.blocks import head_similarity, photographs
    from nas.networks.timm_network import TimmNetwork
    from nas.networks.weights import load

    try:
        model = load(TimmNetwork("deit_tiny_patch16_224"), "timm").eval()
    except UserError as error:
        raise MeasureError("needs timm's trained deit_tiny_patch16_224, which could not be downloaded") from error
    found = head_similarity(model, photographs(model))
    return replace(
        row,
        quantity="cosine similarity to the most similar other head",
        outcome=Outcome(measured=sum(found) / len(found), verdict="measured, no figure to hold it against"),
        why="per block: " + ", ".join(f"{value:.2f}" for value in found) + "; on two photographs, not ImageNet",
        parts=tuple(HeadSimilarity(i, value) for i, value in enumerate(found)),
    )


FINDINGS: dict[str, Callable[[PapersRow], PapersRow]] = {
    "swin-mhsa-share": _mhsa_share,
    "deit-head-similarity": _head_similarity,
}
