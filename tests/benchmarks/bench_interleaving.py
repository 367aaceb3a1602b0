"""Do latencies measured alone and interleaved agree? (goal: within 5%)

    python tests/benchmarks/bench_interleaving.py a.onnx b.onnx ... [--repeats 3]

Alone: a bare loop over ONNX Runtime in a fresh process, nothing else of ours alive. Interleaved: the
same file through `Measurer` (the first file is the reference) and through `compare` (all files side by
side). The three are repeated in turns at 1 thread and at all usable CPUs; a ratio is the median over
the repeats of interleaved over alone.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nas.measure import MeasureError, Measurer, Settings, compare, device_lock
from nas.process import usable_cpus

BARE_LOOP = """
import os, statistics, sys, time
import numpy, onnxruntime

path, threads, *cpus = sys.argv[1:]
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, map(int, cpus))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(threads)
options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
feed = {i.name: numpy.random.rand(*i.shape).astype("f4")
        for i in session.get_inputs()}
end, times = time.perf_counter() + 0.1, []
while time.perf_counter() < end:
    session.run(None, feed)
end = time.perf_counter() + 0.5
while time.perf_counter() < end or len(times) < 5:
    started = time.perf_counter()
    session.run(None, feed)
    times.append(time.perf_counter() - started)
print(1000 * statistics.median(times))
"""


def alone(path: Path, threads: int) -> float:
    """Median latency in ms of half a second of inferences, pinned as the measuring processes are."""
    cpus = map(str, usable_cpus()[:threads])
    command = [sys.executable, "-c", BARE_LOOP, str(path), str(threads), *cpus]
    return float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path, help="ONNX files, static shape, batch 1")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    table = Table("model", "threads", "alone ms", "Measurer ms", "ratio", "compare ms", "ratio")
    worst = 0.0
    with device_lock("cpu"), tempfile.TemporaryDirectory() as folder:
        for threads in sorted({1, len(usable_cpus())}):
            settings = Settings(threads=threads)
            rows: dict[Path, list[tuple[float, float, float]]] = {p: [] for p in arguments.models}
            for _ in range(arguments.repeats):
                bare = {path: [alone(path, threads)] for path in rows}
                with Measurer(settings, arguments.models[0], Path(folder)) as measurer:
                    measured = {path: measurer.measure(path).p50_ms for path in rows}
                compared = compare({str(path): path for path in rows}, settings)
                for path, row in rows.items():
                    beside = compared[str(path)]
                    if isinstance(beside, MeasureError):
                        raise beside
                    bare[path].append(alone(path, threads))
                    row.append((statistics.mean(bare[path]), measured[path], beside.p50_ms))
            for path, row in rows.items():
                ms = [statistics.median(column) for column in zip(*row, strict=True)]
                ratios = [statistics.median(r[i] / r[0] for r in row) for i in (1, 2)]
                worst = max(worst, *(abs(ratio - 1) for ratio in ratios))
                cells = [ms[0], ms[1], ratios[0], ms[2], ratios[1]]
                table.add_row(path.stem, str(threads), *(f"{cell:.3f}" for cell in cells))
    Console(width=100).print(table)
    print(f"worst disagreement {worst:.1%} (goal 5%)")


if __name__ == "__main__":
    main()
