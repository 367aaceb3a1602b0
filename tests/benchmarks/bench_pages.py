"""A training step in huge pages against one in ordinary pages (nas/process.py), and the memory that each takes.

    python tests/benchmarks/bench_pages.py [NAME ...] [--resolution 64] [--batch 64] [--pairs 7]

Each process trains for a few seconds at one thread; those with and without huge pages take turns. The ratio is of CPU
time, the median over pairs, with its 95% interval. Linux must give huge pages to who asks for them (`[madvise]` in
/sys/kernel/mm/transparent_hugepage/enabled, its default).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

from nas.measure.samples import median_interval
from nas.process import HUGE_PAGES, THP, TUNABLES

NAMES = ("efficientvit_m1", "levit_128s", "shvit_s1", "deit_tiny", "sepvit_lite")
SECONDS = 4.0


def train(name: str, resolution: int, batch: int) -> None:
    """Print milliseconds of CPU time a step, and MB at most."""
    import torch
    from bench_training import step_of

    from search_spaces import create_model, get_arch

    torch.set_num_threads(1)
    images = torch.randn(batch, 3, resolution, resolution).contiguous(memory_format=torch.channels_last)
    step = step_of(create_model(get_arch(name, 20).at(resolution)), images, torch.randint(0, 20, (batch,)))
    step(), step()
    begun, steps = time.process_time(), 0
    while time.process_time() - begun < SECONDS:
        step()
        steps += 1
    ms = 1e3 * (time.process_time() - begun) / steps
    print(json.dumps([ms, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def step_ms(huge: bool, name: str, args: argparse.Namespace) -> tuple[float, float]:
    words = [sys.executable, __file__, "--child", name, "--resolution", args.resolution, "--batch", args.batch]
    environment = os.environ | {TUNABLES: HUGE_PAGES if huge else ""}
    ms, mb = json.loads(subprocess.run([*map(str, words)], env=environment, check=True, capture_output=True).stdout)
    return ms, mb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        train(args.child, args.resolution, args.batch)
        return
    if "[madvise]" not in THP.read_text():
        sys.exit(f"{THP} has {THP.read_text().strip()!r}: nothing to compare")
    print("| network | step in huge pages / in others | 95% | ms in others | MB in huge pages | in others |")
    print("|---|---|---|---|---|---|")
    for name in args.names:
        pairs = []
        for i in range(args.pairs):
            found = {huge: step_ms(huge, name, args) for huge in (i % 2 == 0, i % 2 == 1)}
            pairs.append((found[True], found[False]))
        ratios = [huge[0] / other[0] for huge, other in pairs]
        low, high = median_interval(sorted(ratios))
        others_ms = statistics.median(other[0] for _, other in pairs)
        huge_mb, others_mb = (statistics.median(pair[i][1] for pair in pairs) for i in range(2))
        print(
            f"| {name} | {statistics.median(ratios):.2f} | {low:.2f} to {high:.2f} | {others_ms:.0f} | "
            f"{huge_mb:.0f} | {others_mb:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
