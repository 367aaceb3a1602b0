"""Do latencies measured alone and interleaved agree, on every runtime? (goal: within 3%)

    python tests/benchmarks/bench_interleaving.py [NAME ...] [--runtime NAME ...] [--repeats 6]

Alone: a bare loop over the runtime in a fresh process, nothing else of ours alive. Interleaved: the same file through
`Measurer` (the first network is the reference) and through `compare` (all networks side by side). The three are
repeated in turns at 1 thread and at all usable CPUs. Neighbours of a virtual machine slow it for seconds at a time, so
each way of measuring is represented by its fastest repeat, and the spread of the bare loop's own repeats (slowest over
fastest) is printed beside it: a disagreement below that spread says nothing.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nas.export.artifact import write_artifact
from nas.machine import usable_cpus
from nas.measure.device import check_settings, compare, device_lock
from nas.measure.protocol import Measurer
from nas.measure.runtime import RUNTIMES, Settings
from nas.measure.samples import MeasureError
from search_spaces import get_arch

GOAL = 0.03
BARE_LOOP = """
import os, statistics, sys, time
from pathlib import Path
from nas.measure.runtime import RUNTIMES, Settings

path, runtime, threads, *cpus = sys.argv[1:]
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, map(int, cpus))
infer = RUNTIMES[runtime].load(Path(path), Settings(runtime, threads=int(threads)))
infer()
end, times = time.perf_counter() + 0.2, []
while time.perf_counter() < end:
    infer()
end = time.perf_counter() + 0.5
while time.perf_counter() < end or len(times) < 5:
    started = time.perf_counter()
    infer()
    times.append(time.perf_counter() - started)
print(1000 * statistics.median(times))
"""


def alone(path: Path, threads: int, runtime: str = "onnxruntime") -> float:
    """Median latency in ms of half a second of inferences, pinned as the measuring processes are."""
    cpus = map(str, usable_cpus()[:threads])
    command = [sys.executable, "-c", BARE_LOOP, str(path), runtime, str(threads), *cpus]
    return float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=["levit_128s", "shvit_s1"], help="published names")
    parser.add_argument("--runtime", nargs="*", default=[r.name for r in RUNTIMES.values() if "cpu" in r.devices])
    parser.add_argument("--repeats", type=int, default=6)
    arguments = parser.parse_args()

    columns = ("runtime", "threads", "model", "alone ms", "spread alone", "Measurer ms", "ratio", "compare ms", "ratio")
    table = Table(*columns)
    worst = 0.0
    with device_lock("cpu"), tempfile.TemporaryDirectory() as folder:
        for runtime in arguments.runtime:
            for threads in sorted({1, len(usable_cpus())}):
                settings = Settings(runtime, threads=threads)
                check_settings(settings)
                paths = {
                    name: write_artifact(get_arch(name), settings, Path(folder) / name) for name in arguments.models
                }
                bare: dict[str, list[float]] = {name: [] for name in paths}
                measured: dict[str, list[float]] = {name: [] for name in paths}
                compared: dict[str, list[float]] = {name: [] for name in paths}
                for _ in range(arguments.repeats):
                    for name, path in paths.items():
                        bare[name].append(alone(path, threads, runtime))
                    with Measurer(settings, paths[arguments.models[0]], Path(folder)) as measurer:
                        for name, path in paths.items():
                            measured[name].append(measurer.measure(path, timeout_s=300).p50_ms)
                    for name, result in compare(paths, settings, timeout_s=300).items():
                        if isinstance(result, MeasureError):
                            raise result
                        compared[name].append(result.p50_ms)
                for name in paths:
                    ms, measurer_ms, compare_ms = (min(column[name]) for column in (bare, measured, compared))
                    ratios = (measurer_ms / ms, compare_ms / ms)
                    worst = max(worst, *(abs(ratio - 1) for ratio in ratios))
                    cells = [ms, max(bare[name]) / ms, measurer_ms, ratios[0], compare_ms, ratios[1]]
                    table.add_row(runtime, str(threads), name, *(f"{cell:.3f}" for cell in cells))
    Console(width=120).print(table)
    print(f"worst disagreement {worst:.1%} (goal {GOAL:.0%})")


if __name__ == "__main__":
    main()
