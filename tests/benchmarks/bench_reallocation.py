"""Where a trained network wants its parameters: EfficientViT's finding on DeiT, and what EfficientViT-M0 itself wants.

    python tests/benchmarks/bench_reallocation.py --data FOLDER --out FOLDER [--seeds 0,1,2]

The EfficientViT paper (section 2.3) prunes DeiT-T and Swin-T by Taylor importance and finds Q and K too wide beside V,
and the FFN ratio too high in the early blocks. Here a DeiT of 12 blocks (96 channels, q, k, v of 32 in 3 heads, MLP
ratio 4, 40 pixels, patch 8) is trained with three seeds and its q, k, v and FFN widths are cut to 0.5x and 0.7x of the
MACs in three rounds with re-scoring. Reproduced would be: kept Q, K narrower than kept V in 9 of 12 blocks or more, and
less of the FFN kept in the first four blocks than in either later third, for every seed. A deeper cut (0.35x) and a cut
of q, k and v alone (0.82x) are shown beside. Then both networks are reallocated at 1.0x. Nothing is fine-tuned.

On a free core: 4 minutes of training for each network and seed, then 2 minutes for each seed. A run that was stopped
goes on.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from pruning_bench import Data, InOrder, Rows, child, common_arguments, dense, dense_top1, markdown, prepare, say

from nas.training.evaluation import evaluate
from pruning.allocation import Costs, allocate
from pruning.importance import score
from pruning.units import KNOB_KINDS, Kind, anatomy
from search_spaces import table

INSIDE: tuple[Kind, ...] = ("ffn", "qk", "v")
WIDTHS: tuple[Kind, ...] = ("ffn", "qk", "v", "heads")
ATTENTION: tuple[Kind, ...] = ("qk", "v")
CUTS = (
    *((budget, INSIDE, criterion, m) for budget in (0.7, 0.5) for criterion in ("taylor", "taylor2") for m in (4, 8)),
    (0.35, INSIDE, "taylor", 4),
    (0.35, INSIDE, "taylor2", 4),
    (0.82, ATTENTION, "taylor", 4),
    (0.82, ATTENTION, "taylor2", 4),
)
"""(share of the MACs, kinds, criterion, multiple of). Half of all q, k and v is 0.82x."""
ROUNDS = 3
WANTED = 9
THIRDS = ((0, 4), (4, 8), (8, 12))


def cell(
    network: str,
    seed: int,
    budget: float,
    kinds: tuple[Kind, ...],
    criterion: str,
    multiple_of: int,
    data: Data,
    out: Path,
) -> dict[str, Any]:
    """Cut (below 1x) or reallocate (at 1x) a dense network; the row holds its new Arch."""
    model, arch = dense(network, data, seed, out)
    own, rounds = table(arch).macs(), ROUNDS if budget < 1 else 1
    for number in range(1, rounds + 1):
        parts = anatomy(arch)
        scores = score(model, parts, data.calibration(arch.resolution), criterion, seed)
        target = own * budget ** (number / rounds)
        settings = allocate(parts, scores, Costs(parts, "macs"), target, kinds, multiple_of, budget == 1)
        model, arch = child(model, parts, scores, settings, seed)
    return {
        "network": network,
        "seed": seed,
        "budget": budget,
        "kinds": list(kinds),
        "criterion": criterion,
        "multiple_of": multiple_of,
        "macs": table(arch).macs() / own,
        "top1": evaluate(model, InOrder(data.test, arch.resolution)).top1,
        "arch": arch.model_dump(mode="json"),
    }


def deit_widths(arch: dict[str, Any]) -> np.ndarray:
    """Per block key_dim, value_dim and FFN width, (12, 3)."""
    return np.array([[b["attn"]["key_dim"], b["attn"]["value_dim"], b["ffn"]["hidden"]] for b in arch["blocks"]])


def cells_of(
    rows: list[dict[str, Any]], budget: float, kinds: tuple[Kind, ...], criterion: str, multiple_of: int
) -> list[dict[str, Any]]:
    """The rows of one setting, by seed."""
    wanted = (budget, list(kinds), criterion, multiple_of)
    found = [row for row in rows if (row["budget"], row["kinds"], row["criterion"], row["multiple_of"]) == wanted]
    return sorted(found, key=lambda row: row["seed"])


def show_deit(rows: list[dict[str, Any]]) -> None:
    lines, narrow, shrunk = [], [], []
    for budget, kinds, criterion, multiple in CUTS:
        cells = cells_of(rows, budget, kinds, criterion, multiple)
        widths = np.array([deit_widths(row["arch"]) for row in cells])
        narrower = (widths[..., 0] < widths[..., 1]).sum(1)
        wider = (widths[..., 0] > widths[..., 1]).sum(1)
        ffn = np.array([[w[start:end, 2].mean() / 384 for start, end in THIRDS] for w in widths])
        early = ffn[:, 0] < ffn[:, 1:].min(1)
        narrow.append(bool(narrower.min() >= WANTED))
        shrunk += [bool(early.all())] if "ffn" in kinds else []
        lines.append(
            [
                f"{budget:g}x",
                ", ".join(kinds),
                criterion,
                multiple,
                f"{widths[..., 0].mean():.1f} / {widths[..., 1].mean():.1f}",
                ", ".join(map(str, narrower)),
                ", ".join(map(str, wider)),
                "yes" if narrow[-1] else "no",
                " ".join(f"{share:.2f}" for share in ffn.mean(0)),
                f"{early.sum()} of {len(early)}" if "ffn" in kinds else "",
                f"{np.mean([row['top1'] for row in cells]):.1f}",
            ]
        )
    header = ("MACs", "kinds", "criterion", "multiple of", "mean Q,K / V", "blocks with Q,K < V, by seed", "Q,K > V")
    header += (
        f">= {WANTED} in each",
        "FFN kept in blocks 1-4, 5-8, 9-12",
        "seeds with least in 1-4",
        "top-1, not tuned",
    )
    print("### DeiT: kept widths (dense: Q,K and V of 32 a head)\n")
    print(markdown(header, lines))
    print(f"Q,K narrower than V in {WANTED} blocks or more for every seed: {sum(narrow)} of {len(narrow)} settings.")
    print(f"FFNs shrunk most in blocks 1-4 for every seed: {sum(shrunk)} of {len(shrunk)} settings.\n")
    for budget, kinds, multiple in ((0.5, INSIDE, 4), (0.82, ATTENTION, 4), (1.0, INSIDE, 8)):
        cells = cells_of(rows, budget, kinds, "taylor", multiple)
        widths = np.array([deit_widths(row["arch"]) for row in cells])
        print(f"### DeiT at {budget:g}x ({', '.join(kinds)}; taylor; multiples of {multiple}): Q,K / V a head, FFN\n")
        lines = []
        for block in range(widths.shape[1]):
            qk, v, ffn = widths[:, block].mean(0)
            each = [f"{a} / {b}, {c}" for a, b, c in widths[:, block]]
            lines.append([block + 1, f"{qk:.1f}", f"{v:.1f}", f"{ffn:.0f}", f"{ffn / 96:.2f}", *each])
        print(markdown(("block", "Q,K", "V", "FFN", "FFN ratio", *(f"seed {row['seed']}" for row in cells)), lines))
        macs, top1 = np.mean([row["macs"] for row in cells]), np.mean([row["top1"] for row in cells])
        print(f"Means over seeds; MACs {macs:.3f}x, top-1 without fine-tuning {top1:.1f}.\n")


def efficientvit_widths(arch: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Sizes by stage: widths of a kind summed or averaged over the stage's blocks."""
    found = {"stem": {"embed": float(np.mean(arch["stem"]))}}
    for i, stage in enumerate(arch["stages"]):
        mixers = [m for b in stage["blocks"] for m in (*b["before"], *b["after"])]
        heads = [block["attn"]["heads"] for block in stage["blocks"] if block["attn"]]
        merge = stage["downsample"] or {}
        found[f"stage {i + 1}"] = {
            "embed": stage["embed_dim"],
            "FFN (sum)": sum(m["ffn"]["hidden"] for m in mixers if m["ffn"]),
            "qk (mean)": float(np.mean([head["key_dim"] for each in heads for head in each])) if heads else 0.0,
            "v of last heads": float(np.mean([each[-1]["value_dim"] for each in heads])) if heads else 0.0,
            "heads (sum)": sum(map(len, heads)),
            "merge": merge.get("hidden", 0),
            "merge, squeezed": merge.get("squeezed", 0),
            "merge FFNs (sum)": sum(part["ffn"]["hidden"] for part in _mixers(merge) if part["ffn"]),
            "branches": sum(bool(m[k]) for m in (*mixers, *_mixers(merge)) for k in ("conv", "ffn")) + len(heads),
        }
    return found


def _mixers(merge: dict[str, Any]) -> list[dict[str, Any]]:
    return [merge[side] for side in ("before", "after")] if merge else []


def show_efficientvit(rows: list[dict[str, Any]], dense_arch: dict[str, Any], kinds: tuple[Kind, ...]) -> None:
    before = efficientvit_widths(dense_arch)
    after = [efficientvit_widths(row["arch"]) for row in rows]
    names = list(before["stage 1"])
    lines = []
    for stage, widths in before.items():
        line = [stage]
        for name in names:
            own = widths.get(name, 0)
            found = [each[stage][name] for each in after] if own else []
            low, high = (min(found), max(found)) if found else (0, 0)
            line.append(f"{own:g} -> {np.mean(found):.0f} ({low:g}..{high:g})" if own else "")
        lines.append(line)
    print(f"### EfficientViT-M0 at 1.0x ({', '.join(kinds)}), multiples of 8: dense -> mean over seeds (least..most)\n")
    print(markdown(("", *names), lines))
    top1 = ", ".join(f"{row['top1']:.1f}" for row in rows)
    macs = ", ".join(f"{row['macs']:.3f}x" for row in rows)
    print(f"MACs {macs}; top-1 without fine-tuning {top1}.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    data = prepare(args)
    rows = Rows(args.out / "reallocation.jsonl")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    wanted = [("deit", *setting) for setting in CUTS]
    wanted += [("deit", 1.0, INSIDE, "taylor", 8)]
    wanted += [("efficientvit_m0", 1.0, kinds, "taylor", 8) for kinds in (WIDTHS, tuple(KNOB_KINDS))]
    for seed in seeds:
        for network, budget, kinds, criterion, multiple in wanted:
            key = {"network": network, "seed": seed, "budget": budget, "kinds": list(kinds)}
            key |= {"criterion": criterion, "multiple_of": multiple}
            if not rows.has(**key):
                rows.add(cell(network, seed, budget, kinds, criterion, multiple, data, args.out))
                say(str(key))
    chosen = [row for row in rows.rows if row["seed"] in seeds]
    for network in ("deit", "efficientvit_m0"):
        accuracies = [dense_top1(network, seed, args.out) for seed in seeds]
        print(f"{network}, dense: top-1 {', '.join(f'{value:.1f}' for value in accuracies)}\n")
    show_deit([row for row in chosen if row["network"] == "deit"])
    arch = dense("efficientvit_m0", data, seeds[0], args.out)[1]
    for kinds in (WIDTHS, tuple(KNOB_KINDS)):
        cells = cells_of([row for row in chosen if row["network"] == "efficientvit_m0"], 1.0, kinds, "taylor", 8)
        show_efficientvit(cells, arch.model_dump(mode="json"), kinds)


if __name__ == "__main__":
    main()
