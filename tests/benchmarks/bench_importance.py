"""Importance honesty: how well each criterion ranks what really happens when a unit is silenced.

    python tests/benchmarks/bench_importance.py --data FOLDER --out FOLDER [--network NAME] [--per-knob N]
    python tests/benchmarks/bench_importance.py --data FOLDER --out FOLDER --weights FOLDER --network NAME

Silences single units of a trained network, up to N of every knob (FFN units, qk and v dims, heads, stage widths,
whole branches), by the gates' masks in eval mode, on 512 images of all classes that the network was not trained
on. Removing a unit of a stage's width silences the value dims tied to it as well, as slicing would. Three targets:
the mean over images of the absolute change of the loss, which the Taylor criteria predict, the change of the mean loss,
which none of them claims to, and the mean length of the change of the classifier's inputs, which features predicts.
Prints Spearman correlations with 95% bootstrap intervals (over units; over knobs for those within a knob). Goals: at
least 0.95 over all units and 0.85 within a knob, for taylor and for features, scored on the images that judge and on
others: 512, as a pruning scores, and all training images. With `--weights` the network is a published one with the
weights of FOLDER/NAME.safetensors, of other classes, and a linear probe (see bench_compensation.py), which those others
helped to fit: taylor goes by the probe, features by no label.

On a free core: 4 minutes of training where `--out` holds no network yet (bench_pruning.py and bench_reallocation.py
train the same ones), then 3 minutes. A run that was stopped goes on.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bench_compensation import SCORED, subject
from bench_compensation import batches as in_batches
from pruning_bench import ARCHS, Rows, common_arguments, dense, markdown, prepare, say
from scipy.stats import spearmanr
from torch import Tensor, nn

from nas.data.images import sample
from pruning import importance
from pruning.importance import criterion, score
from pruning.units import Anatomy, Knob, anatomy
from search_spaces.gates import Gate, gates_of
from search_spaces.widths import places

GOALS = 0.95, 0.85
RESAMPLES = 2000
NORMALISED, RAW = "torch-pruning", "torch-pruning, un-normalised sum"
CRITERIA = ("taylor", "taylor2", "features", "magnitude", "random", NORMALISED, RAW)
WITH_GOALS = ("taylor", "features")
OTHER_IMAGES = "{} on {:,} other images"


@criterion(RAW)
def torch_pruning_raw(
    model: nn.Module, parts: Anatomy, batches: importance.Batches, seed: int
) -> dict[str, np.ndarray]:
    """GroupTaylorImportance summed over a group, not divided by its mean: comparable between groups."""
    from torch_pruning.pruner.importance import GroupTaylorImportance

    importance._accumulate_gradients(model, batches)
    scorer = GroupTaylorImportance(normalizer=None, group_reduction="sum")
    scores = importance._over_weights(model, parts, importance._taylor_of_weight)
    cascades = {knob.width for knob in parts.knobs if knob.from_last}
    for width, shape in importance._shapes(parts).items():
        if shape and width not in cascades:
            group = importance._group(model, parts, width, shape)
            scores[width] = scorer(group)[: int(np.prod(shape))].numpy().astype(np.float64).reshape(shape)
    model.zero_grad(set_to_none=True)
    return scores


def silence(gates: Iterable[Gate], knob: Knob, row: int, unit: int) -> None:
    """Set the masks that take a unit out of the network."""
    for gate in gates:
        mask = torch.ones(1, *gate.units)
        if knob.kind == "blocks":
            if gate.branch == knob.width:
                mask.zero_()
        elif knob.kind == "heads":
            if gate.heads is not None and gate.heads[0].name == knob.width:
                if gate.heads[1] is None:
                    mask[:, unit] = 0
                elif gate.heads[1] == unit:
                    mask.zero_()
        else:
            rows, units = places(gate.axis, knob.width)
            there = (units == unit) & ((rows == row) | (knob.rows == 1))
            mask.view(-1)[torch.from_numpy(np.flatnonzero(there))] = 0
        gate.mask = None if mask.all() else mask


@torch.no_grad()
def judge(model: nn.Module, parts: Anatomy, batches: importance.Batches) -> tuple[Tensor, Tensor]:
    """Every image's loss and its inputs of the classifier."""
    losses, features = [], []
    with importance.features_of(model, parts) as read:
        for images, labels in batches:
            logits, found = read(images)
            losses.append(F.cross_entropy(logits, labels, reduction="none"))
            features.append(found)
    return torch.cat(losses), torch.cat(features)


def ablate(model: nn.Module, parts: Anatomy, batches: importance.Batches, per_knob: int, rows: Rows) -> None:
    """Add a row for every sampled unit that has none yet."""
    losses, features = judge(model, parts, batches)
    gates = list(gates_of(model).values())
    source = np.random.default_rng(0)
    for knob in parts.knobs:
        count = knob.rows * knob.size
        for chosen in source.choice(count, min(per_knob, count), replace=False):
            row, unit = divmod(int(chosen), knob.size)
            if rows.has(knob=knob.name, row=row, unit=unit):
                continue
            silence(gates, knob, row, unit + knob.start)
            if all(gate.mask is None for gate in gates):
                raise LookupError(f"no gate silences unit {unit} of {knob.name}")
            silenced, without = judge(model, parts, batches)
            change, moved = (silenced - losses).double(), (without - features).double().norm(dim=1)
            rows.add(
                {
                    "knob": knob.name,
                    "kind": knob.kind,
                    "row": row,
                    "unit": unit,
                    "absolute": change.abs().mean().item(),
                    "signed": change.mean().item(),
                    "moved": moved.mean().item(),
                }
            )
    for gate in gates:
        gate.mask = None


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; NaN where one side is constant."""
    return float(spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else float("nan")


def interval(values: Callable[[np.ndarray], float], count: int) -> str:
    """Bootstrap interval of a statistic of resampled indices, as text."""
    source = np.random.default_rng(0)
    found = [values(source.integers(count, size=count)) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(found, (2.5, 97.5))
    return f"{low:.2f}..{high:.2f}"


def within(found: np.ndarray, target: np.ndarray, knobs: np.ndarray) -> np.ndarray:
    """Spearman within each knob with three sampled units or more; knobs where it is undefined are left out."""
    each = [correlation(found[knobs == knob], target[knobs == knob]) for knob in np.unique(knobs) if _many(knobs, knob)]
    return np.array([value for value in each if np.isfinite(value)])


def _many(knobs: np.ndarray, knob: str) -> bool:
    return int((knobs == knob).sum()) >= 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--network", default="efficientvit_m0", help=f"{', '.join(ARCHS)}, or one of --weights")
    parser.add_argument("--weights", type=Path, help="folder of NAME.safetensors, trained at 64 pixels")
    parser.add_argument("--per-knob", type=int, default=6, help="units silenced of each knob, at least 3")
    args = parser.parse_args()
    if args.weights:
        torch.set_num_threads(args.threads)
        args.out.mkdir(parents=True, exist_ok=True)
        of = subject(args.network, args.data, args.weights)
        model, arch, batches = of.model, of.arch, in_batches(sample(of.val, SCORED, seed=0))
        others = {SCORED: of.scored, len(of.calibration): in_batches(of.calibration)}
    else:
        data = prepare(args)
        model, arch = dense(args.network, data, 0, args.out)
        batches, others = data.calibration(arch.resolution, 0), {SCORED: data.calibration(arch.resolution, 1)}
    parts = anatomy(arch)
    rows = Rows(args.out / f"importance-{args.network}{'-probe' if args.weights else ''}.jsonl")
    ablate(model, parts, batches, args.per_knob, rows)

    scores = {}
    for name in CRITERIA:
        scores[name] = score(model, parts, batches, name)
        say(f"{name} done")
    with_goals = [*WITH_GOALS, *(OTHER_IMAGES.format(name, count) for name in WITH_GOALS for count in others)]
    for name, (count, other) in itertools.product(WITH_GOALS, others.items()):
        scores[OTHER_IMAGES.format(name, count)] = score(model, parts, other, name)
    knob_of = {knob.name: knob for knob in parts.knobs}
    absolute, signed, moved = (np.array([row[key] for row in rows.rows]) for key in ("absolute", "signed", "moved"))
    knobs, kinds = (np.array([row[key] for row in rows.rows]) for key in ("knob", "kind"))
    found = {
        name: np.array([knob_of[r["knob"]].importance(values)[r["row"], r["unit"]] for r in rows.rows])
        for name, values in scores.items()
    }
    lowered = (signed < 0).mean()
    print(f"## {args.network}, {len(rows.rows)} ablations, 512 held-out images; {lowered:.0%} lower the mean loss\n")
    table = []
    for name, values in found.items():
        inside, inside_moved = within(values, absolute, knobs), within(values, moved, knobs)
        table.append(
            [
                name,
                f"{correlation(values, absolute):.2f}",
                interval(lambda i, v=values: correlation(v[i], absolute[i]), len(values)),
                f"{inside.mean():.2f}",
                interval(lambda i, v=inside: v[i].mean(), len(inside)),
                f"{correlation(values, signed):.2f}",
                interval(lambda i, v=values: correlation(v[i], signed[i]), len(values)),
                f"{correlation(values, moved):.2f}",
                interval(lambda i, v=values: correlation(v[i], moved[i]), len(values)),
                f"{inside_moved.mean():.2f}",
                interval(lambda i, v=inside_moved: v[i].mean(), len(inside_moved)),
            ]
        )
    header = ("criterion", "all units", "95%", "within a knob", "95%", "signed change", "95%")
    header += ("features, all units", "95%", "features, within a knob", "95%")
    print(markdown(header, table))
    present = list(dict.fromkeys(kinds))
    print("Spearman with the mean absolute loss change, units of one kind:\n")
    names = [f"{kind} ({(kinds == kind).sum()})" for kind in present]
    by_kind = [
        [name, *(f"{correlation(values[kinds == kind], absolute[kinds == kind]):.2f}" for kind in present)]
        for name, values in found.items()
    ]
    print(markdown(("criterion", *names), by_kind))
    targets = {"loss": absolute, "features": moved}
    for name, (of_what, target) in itertools.product(with_goals, targets.items()):
        reached = correlation(found[name], target), within(found[name], target, knobs).mean()
        for where, value, goal in zip(("over all units", "within a knob"), reached, GOALS, strict=True):
            verdict = "reached" if value >= goal else "missed"
            print(f"{name}, the {of_what}'s change, {where}: {value:.2f}, goal {goal}: {verdict}")


if __name__ == "__main__":
    main()
