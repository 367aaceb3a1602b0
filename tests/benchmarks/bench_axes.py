"""What each axis does to latency: one published network a family, one axis moved at a time, one interleaved run.

    python tests/benchmarks/bench_axes.py [--threads N] [--rounds N]

Prints, per family and axis, the option tried, MACs and latency relative to the published network, with the 95%
interval of the latency's median.
"""

import argparse
import tempfile
from pathlib import Path

from nas.export.artifact import write_artifact
from nas.measure.device import compare, default_threads, device_lock
from nas.measure.runtime import Settings
from nas.measure.samples import MeasureError
from search_spaces import table
from search_spaces.registry import FAMILIES

BASES = {
    "levit": "levit_128s",
    "efficientvit": "efficientvit_m0",
    "evit": "deit_tiny",
    "shvit": "shvit_s1",
    "sepvit": "sepvit_lite",
}
STAGES = (1, 2, 3, 4)


def every_stage(axis: str, *values):
    """The same axis moved in every stage: one value a stage, or one for all."""
    return {f"{axis}_s{s}": values[min(s, len(values)) - 1] for s in STAGES}


MOVES = {
    "levit": {
        "width": every_stage("width", 96, 192, 256),
        "depth": every_stage("depth", 1, 2, 3),
        "heads": every_stage("heads", 2, 3, 4),
        "qk": {"qk": 8},
        "mix: FFN x1": every_stage("mix", (1.0, 1.0)),
        "mix: half the attention": every_stage("mix", (2.0, 0.5)),
        "keep 0.5": every_stage("keep", 0.5),
        "keep 0.5, last stage (true drop)": {"keep_s3": 0.5},
        "form conv": {"form": "conv"},
        "resolution 160": {"resolution": 160},
    },
    "efficientvit": {
        "width": every_stage("width", 64, 96, 160),
        "depth": every_stage("depth", 1, 1, 2),
        "heads": every_stage("heads", 2),
        "qk": {"qk": 8},
        "mix: FFN x1": every_stage("mix", (1, 1.0)),
        "mix: two FFNs a side": every_stage("mix", (2, 2.0)),
        "keep 0.5": every_stage("keep", 0.5),
        "form 3x3 queries": {"form": (3, 3, 3, 3)},
        "resolution 160": {"resolution": 160},
    },
    "evit": {
        "width": {"width_s1": 128},
        "depth": {"depth_s1": 3, "depth_s2": 2, "depth_s3": 2, "depth_s4": 2},
        "heads": every_stage("heads", 2),
        "qk": {"qk": 32},
        "mix: MLP x2": every_stage("mix", (2.0, 1.0)),
        "mix: half the attention": every_stage("mix", (4.0, 0.5)),
        "keep 0.7 fused": every_stage("keep", 0.7),
        "keep 0.5 fused": every_stage("keep", 0.5),
        "keep 0.5 dropped": {**every_stage("keep", 0.5), "form": "dropped"},
        "resolution 160": {"resolution": 160},
    },
    "shvit": {
        "width": every_stage("width", 96, 176, 256),
        "depth": every_stage("depth", 1, 3, 4),
        "heads: 4": every_stage("heads", 4),
        "form: half the channels attended": {"form": 0.5},
        "mix: FFN x1": every_stage("mix", (1.0, 1.0)),
        "mix: no attention": every_stage("mix", (2.0, 0.0)),
        "keep 0.5": every_stage("keep", 0.5),
        "resolution 160": {"resolution": 160},
    },
    "sepvit": {
        "width": every_stage("width", 16, 64, 128, 256),
        "depth": every_stage("depth", 1, 1, 4, 1),
        "heads": every_stage("heads", 1, 1, 2, 4),
        "qk": {"qk": 16},
        "mix: FFN x2": every_stage("mix", (2.0, "alternate")),
        "mix: windows only": every_stage("mix", (4.0, "windows")),
        "keep 0.5 of FFN tokens": every_stage("keep", 0.5),
        "keep 0.5 of windows": {**every_stage("keep", 0.5), "form": "windows"},
        "resolution 160": {"resolution": 160},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    settings = Settings(threads=args.threads)
    print("| family | moved | MACs | latency | 95% |\n|---|---|---|---|---|")
    for name, base in BASES.items():
        family = FAMILIES[name]
        published = dict(family.variants[base].values)
        archs = {base: family.space.arch(published, 1000)}
        for label, change in MOVES[name].items():
            values = published | {key: value for key, value in change.items() if key in published}
            family.space.encode(values)
            archs[label] = family.space.arch(values, 1000)
        with tempfile.TemporaryDirectory() as folder, device_lock("cpu"):
            paths = {k: write_artifact(a, settings, Path(folder) / str(i)) for i, (k, a) in enumerate(archs.items())}
            results = compare(paths, settings, rounds=args.rounds)
        reference, macs = results[base], table(archs[base]).macs()
        print(f"| {name} | {base} | {macs / 1e6:.0f} M | {reference.p50_ms:.2f} ms | |")
        for label in MOVES[name]:
            result = results[label]
            if isinstance(result, MeasureError):
                print(f"| {name} | {label} | | failed: {result} | |")
                continue
            low, high = (bound / reference.p50_ms for bound in result.ci_ms)
            share = table(archs[label]).macs() / macs
            row = f"x{share:.2f} | x{result.p50_ms / reference.p50_ms:.2f} | {low:.2f}..{high:.2f}"
            print(f"| {name} | {label} | {row} |", flush=True)


if __name__ == "__main__":
    main()
