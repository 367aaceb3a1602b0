"""What the terminal and the report both say of a pruning."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

from nas.prune.records import PruneResult


def passes(images: int, train: int) -> str:
    """How many images a training draws from a set of `train`, as words: 4,500 images (375 passes over 12)."""
    over = f" ({images / train:.3g} passes over {train:,})" if images > train else ""
    return f"{images:,} images{over}"


def measure_of(result: PruneResult) -> str:
    """What the accuracies are: agreement with the unpruned network, where no image has a label."""
    return "agreement" if result.options.unlabelled else "top-1"


def tuning_words(result: PruneResult) -> str | None:
    """What fine-tuning has done to the pruned network's accuracy, or agreement; None where there was none."""
    recovered = result.accuracy.recovered
    if result.tuning is None or recovered is None:
        return None
    old, new = result.accuracy.pruned.top1, recovered.top1
    verdict = {"tie": "a tie", "more accurate": "a gain", "less accurate": "a loss"}[result.tuning.verdict]
    low, high = result.tuning.ci
    change = f"{new - old:+.1f} points, 95%: {low:+.1f} to {high:+.1f}"
    return f"fine-tuning changed it from {old:.1f} to {new:.1f}%: {verdict} ({change})"


def control_words(result: PruneResult) -> str | None:
    """How the pruned network compares with the unpruned one that was fine-tuned alike; None without a control."""
    control = result.control
    if control is None:
        return None
    low, high = control.ci
    than = control.verdict.replace("accurate", "in agreement") if result.options.unlabelled else control.verdict
    verdict = "a tie" if than == "tie" else f"the pruned one is {than}"
    points = f"{control.difference:+.1f} points (95%: {low:+.1f} to {high:+.1f})"
    return f"pruned minus unpruned, fine-tuned alike: {points}: {verdict}"


def next_steps(folder: Path, result: PruneResult) -> list[tuple[str, str]]:
    """What is useful now, and the command for it, the most useful first."""
    here, model, settings = shlex.quote(str(folder)), shlex.quote(result.model), asdict(result.settings)
    flags = {"device": "device", "runtime": "runtime", "threads": "threads", "batch-size": "batch_size"}
    on = " ".join(f"--{flag} {settings[key]}" for flag, key in flags.items())
    demo = ("Figures that count, on your own images", f"vitnas prune --model {model} --data ./images")
    if not result.parts.blocks:
        bench = f"vitnas bench {model}@{result.parts.resolution} {here}/model.onnx {on}"
        return [("Measure both again, side by side", bench), *[demo] * result.data.demo]
    steps = [("Measure both again, side by side", f"vitnas bench {model} {here} {on}")]
    weights = f"--weights {here}/model.safetensors"
    if result.options.unlabelled:
        unseen = f" --unlabelled {shlex.quote(result.options.unlabelled)}"
        return [*steps, ("Cut it further", f"vitnas prune --model {here}{unseen} --macs 0.8x")]
    images = f" --data {shlex.quote(result.options.data)}" if result.options.data and not result.data.demo else ""
    if result.data.demo:
        steps.append(demo)
    else:
        steps.append(("Train it further", f"vitnas train {here} {weights}{images}"))
    batch = 8 if settings["batch_size"] == 1 else 1
    steps.append(
        ("Export it for another batch size", f"vitnas export {here} {weights} --batch-size {batch} --out exported")
    )
    steps.append(("Cut it further", f"vitnas prune --model {here}{images} --macs 0.8x"))
    return steps
