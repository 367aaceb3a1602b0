"""What a command came to, on standard output; its progress is on standard error (`progress`)."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from nas.intervals import guessing
from nas.measure.budget import Verdict
from nas.networks.timm_network import TimmNetwork
from nas.quality.tier import told_score
from nas.report.tables import Column, console_of, print_table, prose
from nas.search.outcome import OVERHEAD, Outcome
from nas.search.rows import INTERRUPTED, ClosingRow, OutsideRow, Timed, role_of
from nas.search.words import better_line, interval_words, later_rounds, quality_words, validation_line
from nas.units import counted

if TYPE_CHECKING:
    from nas.training.result import TrainResult


def clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def show_result(
    outcome: Outcome, folder: Path, to_stderr: bool, verbose: bool = False, images: str | None = None
) -> None:
    """A search's result: the answer, the closing table, ties and notes, then its files and what to do next.

    Args:
        verbose: tell where the time went, too.
        images: what it trained on, as named on the command line.
    """
    console = console_of(to_stderr)
    show_answer(console, outcome)
    if outcome.final:
        show_final(console, outcome.final, outcome.quality_tier.name)
        if outcome.against:
            show_against(console, outcome.against, outcome.beside)
        prose(
            console,
            " ".join(filter(None, ("One interleaved run.", later_rounds(outcome.final))))
            + " Intervals of latency: 95%, of its median. A score is the estimate less one standard error, to rank by."
            + (" Weights are untrained." if outcome.untrained else "")
            + (f" Images a second are at batch {outcome.throughput_at}." if outcome.throughput_at else ""),
        )
    elif outcome.against:
        show_against(console, outcome.against)
    show_accuracy(console, outcome)
    for line in (*outcome.ties, *outcome.notes, *outcome.failures):
        prose(console, line)
    if outcome.skipped:
        prose(console, "Some published networks were not tried: report.html lists them.")
    if outcome.interrupted and any(trial.state == INTERRUPTED for trial in outcome.trials):
        prose(console, "An interrupted trial is made again by the same command.")
    failed = sum(trial.state == "failed" for trial in outcome.trials)
    if failed:
        prose(console, f"{counted(failed, 'trial')} failed; report.html groups them by reason")
    prose(console, outcome.quality_tier.note)
    if verbose and outcome.median_trial_s:
        shares = ", ".join(f"{row.phase} {row.share:.1%}" for row in outcome.breakdown)
        prose(
            console,
            f"{outcome.trials_per_minute:.1f} trials a minute, median {outcome.median_trial_s:.2f} s; {shares}; "
            f"overhead ({', '.join(OVERHEAD)}) {outcome.overhead_share:.1%}",
        )
    for line in what_now(outcome, folder, images):
        console.print(line)


def show_answer(console: Console, outcome: Outcome) -> None:
    """The winner, or the fastest network and what may help."""
    budget, settings = outcome.budget, outcome.settings
    precisions = " or ".join(outcome.precisions) or settings.precision
    own = outcome.winner.precision if outcome.winner else None
    where = (
        f"{settings.runtime} {own or precisions}, {settings.device}, "
        f"{counted(settings.threads, 'thread')}, batch {settings.batch_size}"
    )
    fastest, winner = outcome.fastest, outcome.winner
    if better := better_line(outcome):
        prose(console, f"{better}.")
    if outcome.contest:
        prose(console, f"{outcome.contest.line}.")
    if fastest is None:
        prose(console, "No trial was measured.")
    elif winner is None:
        prose(console, f"Nothing fits {budget} ({where}).")
        ends, lower = interval_words(fastest.latency_ci), f" in {fastest.precision}" if outcome.precisions[1:] else ""
        prose(
            console,
            f"Fastest measured: {fastest.label} ({fastest.family}), {fastest.latency_ms:.2f} ms{lower} ({ends}).",
        )
        for line in outcome.advice:
            prose(console, f"  may help: {line}")
    else:
        sure = winner.verdict == Verdict.FITS
        found = f"Best within {budget}" if sure else f"No network surely fits {budget}; the best of those that may"
        ends = interval_words(winner.latency_ci)
        prose(
            console,
            f"{found} ({where}): {winner.label} of the family {winner.family}, {winner.latency_ms:.2f} ms "
            f"({'' if sure else 'unsure: '}{ends}), {quality_words(winner)}.",
        )


def what_now(outcome: Outcome, folder: Path, images: str | None) -> list[str]:
    """A search's file, its report, and the next useful command; nothing is wrapped, so that it can be copied."""
    lines, best = [], folder / "best"
    trained = (best / "model.safetensors").is_file()
    lower = best / f"model.{outcome.winner.precision if outcome.winner else None}.onnx"
    network = lower if lower.is_file() else best / "model.onnx"
    if network.is_file():
        kind = "random" if not trained else "briefly trained" if outcome.short_training else "trained"
        lines.append(f"Network: {network} ({kind} weights{first_seed(outcome)})")
    lines.append(f"Report: {folder / 'report.html'}")
    if outcome.failures:
        lines.append(f"To go on: {outcome.command}")
    elif outcome.winner is not None and not outcome.interrupted:
        data = f"--data {shlex.quote(images) if images else 'FOLDER_OF_IMAGES'}"
        if not trained:
            then = f"train {shlex.quote(str(best))} {data}"
        elif outcome.winner.family == TimmNetwork.family:  # a trained one of timm's cannot be pruned
            then = f"predict {shlex.quote(str(folder))} IMAGE"
        else:
            then = f"prune --model {shlex.quote(str(best))} {data}"
        lines.append(f"Next: vitnas {then}")
    return lines


def first_seed(outcome: Outcome) -> str:
    """Whose weights best/ holds, where the accuracy told is a mean over seeds."""
    top1 = outcome.accuracy.rows[0].top1 if outcome.accuracy else []
    return f" of the first of {len(top1)} seeds: {top1[0]:.1f}%" if len(top1) > 1 else ""


def show_accuracy(console: Console, outcome: Outcome) -> None:
    """The final trainings, and how well the tier ranks, where it was validated."""
    found = outcome.accuracy
    if found:
        for row in found.rows:
            prose(console, f"{row.line}.")
        prose(console, f"{found.how}, judged on validation images.")
        prose(console, f"{found.verdict[:1].upper()}{found.verdict[1:]}.")
    if outcome.quality_tier.trained:
        prose(console, validation_line(outcome.quality_tier, outcome.validation))


def show_final(console: Console, final: Sequence[ClosingRow], tier: str) -> None:
    """The table of the closing run, then what could not be measured in it. tier: whose scores these are."""
    lower = any(row.precision not in (None, "fp32") for row in final)
    rows = [
        (
            row.label if row.name else f"{row.label} ({row.family})",
            row.role if row.role == role_of(row) or row.kind is None else f"{row.role}, {row.kind}",
            " ".join(filter(None, (row.verdict, ", ".join(row.over)))),
            str(row.resolution),
            (row.precision or "") if lower else "",
            "not trained" if row.guessed else f"{told_score(row.quality):.1f}",
            "" if row.guessed else "{:.1f}..{:.1f}".format(*row.quality_ci),
            f"{row.published_top1:.1f}" if row.published_top1 else "",
            f"{row.latency_ms:.2f}",
            f"{row.ci_low_ms:.2f}..{row.ci_high_ms:.2f}",
            rate(row.throughput),
            *("" if value is None else f"{value:.1f}" for value in (row.memory_mb, row.file_mb, row.energy_mj)),
            f"{row.params_m:.1f}",
            f"{row.macs_m:.0f}",
        )
        for row in final
        if not row.error
    ]
    columns = (
        Column("network", label=True),
        Column("role", label=True),
        Column("in budget", label=True),
        Column("px", drop=5),
        Column("in", label=True, drop=8),
        Column(f"score ({tier})", drop=1),
        Column("95% of estimate", drop=2),
        Column("published", drop=5),
        Column("ms"),
        Column("95% of ms", drop=3),
        Column("img/s", drop=4),
        Column("memory MB", drop=7),
        Column("file MB", drop=8),
        Column("mJ/img", drop=9),
        Column("M params", drop=6),
        Column("MMACs", drop=7),
    )
    print_table(console, columns, rows)
    show_failed(console, final)


def show_failed(console: Console, rows: Sequence[Timed]) -> None:
    """A line for each network that could not be measured."""
    for row in rows:
        if row.error:
            prose(console, f"{row.label} failed: {row.error}")


def rate(throughput: float | None) -> str:
    return "" if throughput is None else f"{throughput:.0f}"


def show_against(console: Console, rows: Sequence[OutsideRow], first: ClosingRow | None = None) -> None:
    """Outside networks of the closing run, beside the network that their ratios are to, if any, and who runs at which
    size."""
    from nas.bench.run import unequal

    columns = (
        Column("against", label=True),
        Column("px"),
        Column("in budget", label=True, drop=3),
        Column("published", drop=6),
        Column("ms"),
        Column("95% of ms", drop=2),
        Column("img/s", drop=4),
        Column(f"time of {first.label}'s" if first else ""),
        Column("95% of that", drop=1),
    )
    told = [
        (
            row.label,
            str(row.resolution),
            row.verdict or "",
            "" if row.published_top1 is None else f"{row.published_top1:.1f}",
            f"{row.latency_ms:.2f}",
            f"{row.ci_low_ms:.2f}..{row.ci_high_ms:.2f}",
            rate(row.throughput),
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if row.ratio is None else f"{row.ratio_low:.2f}..{row.ratio_high:.2f}",
        )
        for row in rows
        if not row.error
    ]
    if told:
        print_table(console, columns, told)
    show_failed(console, rows)
    if told and first:
        sizes = {row.label: row.resolution for row in (first, *rows) if not row.error}
        own = next(row.precision for row in rows if not row.error)  # all have the same
        if own != first.precision:
            prose(console, f"They are measured in {own}, {first.label} in {first.precision}.")
        prose(console, unequal(sizes, ()) or f"All of these run at {first.resolution} px, as {first.label} does.")


def show_train(result: TrainResult, folder: Path, to_stderr: bool) -> None:
    """What a training came to."""
    console, final = console_of(to_stderr), result.final
    if final is None:
        console.print("No epoch was finished.")
        return
    recipe = f"recipe {result.recipe['name']}"
    which = f"{final.of}, epoch {final.epoch} of {result.recipe['epochs']}, {recipe}" if final.epoch else final.of
    if final.top1_ci is None:
        console.print(f"Epoch {final.epoch} was not judged ({which}).")
    else:
        console.print(f"{final.accuracy()} of {result.data['name']}: {which}.")
        chance = guessing(final.top1_ci, result.data["classes"])
        if chance:
            prose(console, f"{chance[:1].upper()}{chance[1:]}.")
    size = f"{result.params / 1e6:.2f} M parameters, {result.macs / 1e6:.0f} MMACs at {result.resolution} px"
    seconds = sum(epoch.seconds for epoch in result.epochs)
    images = sum(epoch.images_per_s * epoch.seconds for epoch in result.epochs)
    speed = f"; trained in {clock(seconds)} at {images / seconds:.0f} images/s" if result.epochs else ""
    console.print(f"{size}{speed}.")
    files = [name for name in ("model.safetensors", "model.onnx", "metrics.json") if (folder / name).is_file()]
    console.print(f"Network: {folder} ({', '.join(files)})")
    if "model.onnx" in files:
        data = f" --data {shlex.quote(result.options['data'])}" if result.options["data"] else ""
        ours = result.family != TimmNetwork.family  # a run of timm's cannot be pruned
        smaller = ", or a smaller one made of it" * ours
        console.print(f"Next, classes of new images, its speed beside a network of timm's{smaller}:")
        console.print(f"  vitnas predict {shlex.quote(str(folder))} IMAGE")
        console.print(f"  vitnas bench {shlex.quote(str(folder))} timm/lcnet_050@{result.resolution}")
        if ours:
            console.print(f"  vitnas prune --model {shlex.quote(str(folder))}{data}")
