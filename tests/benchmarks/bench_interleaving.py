"""Do latencies measured alone and interleaved agree? (goal: within 5%)

    python tests/benchmarks/bench_interleaving.py a.onnx b.onnx ... [--repeats 5]

Alone: a bare loop over ONNX Runtime in a fresh process, nothing else of ours alive. Interleaved: the
same file through `Measurer` (the first file is the reference) and through `compare` (all files side by
side). The three are repeated in turns at 1 thread and at all usable CPUs. Neighbours of a virtual machine slow it for
seconds at a time, so each way of measuring is represented by its fastest repeat, and the spread of the bare loop's own
repeats (slowest over fastest) is printed beside it: a disagreement below that spread says nothing.
"""

import argparse
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
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    table = Table("model", "threads", "alone ms", "spread alone", "Measurer ms", "ratio", "compare ms", "ratio")
    worst = 0.0
    with device_lock("cpu"), tempfile.TemporaryDirectory() as folder:
        for threads in sorted({1, len(usable_cpus())}):
            settings = Settings(threads=threads)
            bare: dict[Path, list[float]] = {path: [] for path in arguments.models}
            measured: dict[Path, list[float]] = {path: [] for path in arguments.models}
            compared: dict[Path, list[float]] = {path: [] for path in arguments.models}
            for _ in range(arguments.repeats):
                for path, found in bare.items():
                    found.append(alone(path, threads))
                with Measurer(settings, arguments.models[0], Path(folder)) as measurer:
                    for path, found in measured.items():
                        found.append(measurer.measure(path).p50_ms)
                beside = compare({str(path): path for path in compared}, settings)
                for path, found in compared.items():
                    result = beside[str(path)]
                    if isinstance(result, MeasureError):
                        raise result
                    found.append(result.p50_ms)
            for path in arguments.models:
                ms, measurer_ms, compare_ms = (min(column[path]) for column in (bare, measured, compared))
                ratios = (measurer_ms / ms, compare_ms / ms)
                worst = max(worst, *(abs(ratio - 1) for ratio in ratios))
                cells = [ms, max(bare[path]) / ms, measurer_ms, ratios[0], compare_ms, ratios[1]]
                name = f"{path.parent.name}/{path.name}"
                table.add_row(name, str(threads), *(f"{cell:.3f}" for cell in cells))
    Console(width=110).print(table)
    print(f"worst disagreement {worst:.1%} (goal 5%)")


if __name__ == "__main__":
    main()
