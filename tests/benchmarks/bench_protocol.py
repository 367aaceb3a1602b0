"""Does a measured latency hold? 30 networks of the five families, about log-uniform over 1 to 20 ms.

    python tests/benchmarks/bench_protocol.py [--networks 30] [--threads 1] [--independent]

Every network is exported once and then measured by `Measurer`, each pass in a process tree of its own: twice on the
quiet machine, and once more at 1 thread while another process keeps a CPU busy that is not the measured one. Printed:
Kendall's tau between the passes' rankings with its 95% bootstrap interval, and the ratio of the two latencies, as they
are and in units of the reference network measured beside them (this machine's clock drifts). With --independent the
slowest, median and fastest network are measured by bare loops outside vitnas too: ONNX Runtime in a fresh process, and
OpenVINO's benchmark_app against the runtime openvino.
"""

import argparse
import contextlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau

from nas.export.artifact import write_artifact
from nas.machine import usable_cpus
from nas.measure.cache import REFERENCE
from nas.measure.device import device_lock
from nas.measure.protocol import Measurer
from nas.measure.runtime import Settings
from nas.search.trial import reference_arch
from search_spaces import Arch, get_arch, table
from search_spaces.registry import FAMILIES
from search_spaces.space import random_params

RANGE_MS = (1.0, 20.0)
DRAWS = 400
BUSY = "import numpy as np\na = np.random.rand(700, 700)\nwhile True: a @ a"
ORT_LOOP = """
import statistics, sys, time
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = int(sys.argv[2]), 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = {i.name: numpy.random.rand(*i.shape).astype("f4") for i in session.get_inputs()}
times = []
for _ in range(400):
    started = time.perf_counter()
    session.run(None, feed)
    times.append(time.perf_counter() - started)
print(1000 * statistics.median(times[100:]))
"""


def draw(count: int, reference_ms: float, seed: int) -> list[Arch]:
    """Random networks, the families in turn, whose MACs lie nearest log-uniform latencies at the reference's pace."""
    rng = np.random.default_rng(seed)
    pace = reference_ms / table(reference_arch()).macs()
    pool: dict[str, list[tuple[float, Arch]]] = {name: [] for name in FAMILIES}
    for family, rows in pool.items():
        for _ in range(DRAWS):
            with contextlib.suppress(ValueError):
                arch = FAMILIES[family].space.decode(random_params(rng), 1000)
                rows.append((float(np.log(table(arch).macs() * pace)), arch))
    chosen = []
    for i, goal in enumerate(np.linspace(*np.log(RANGE_MS), count)):
        rows = pool[list(FAMILIES)[i % len(FAMILIES)]]
        nearest = min(rows, key=lambda row: abs(row[0] - goal))
        rows.remove(nearest)
        chosen.append(nearest[1])
    return chosen


def measure(folder: Path, settings: Settings) -> list[tuple[float, float]]:
    """Latency of every file in the folder, and of the reference beside it; called in a process of its own."""
    paths = sorted(folder.glob("[0-9]*.onnx"))
    with (
        tempfile.TemporaryDirectory() as work,
        device_lock("cpu"),
        Measurer(settings, folder / "reference.onnx", Path(work)) as measurer,
    ):
        results = [measurer.measure(path, timeout_s=120) for path in paths]
    return [(result.p50_ms, result.reference_p50_ms) for result in results]


def fresh(folder: Path, settings: Settings) -> np.ndarray:
    words = [sys.executable, __file__, "--measure", str(folder), "--settings", json.dumps(asdict(settings))]
    return np.array(json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout))


@contextlib.contextmanager
def loaded(cpu: int) -> Iterator[None]:
    """Another process keeps `cpu` busy."""
    process = subprocess.Popen(["taskset", "-c", str(cpu), sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def agreement(name: str, one: np.ndarray, other: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    samples = [rng.integers(len(one), size=len(one)) for _ in range(1000)]
    print(f"{name}:")
    for label, x, y in (
        ("ms", one[:, 0], other[:, 0]),
        ("units of the reference", one[:, 0] / one[:, 1], other[:, 0] / other[:, 1]),
    ):
        taus = [kendalltau(x[rows], y[rows]).statistic for rows in samples]
        ratio = y / x
        deviation = statistics.median(abs(ratio - statistics.median(ratio)))
        q = np.quantile(ratio, [0, 0.1, 0.5, 0.9, 1])
        print(
            f"  {label}: tau {kendalltau(x, y).statistic:.3f} "
            f"(95% {np.quantile(taus, 0.025):.3f}..{np.quantile(taus, 0.975):.3f}); ratio: median {q[2]:.3f}, median "
            f"absolute deviation {deviation:.1%}, min {q[0]:.3f}, p10 {q[1]:.3f}, p90 {q[3]:.3f}, max {q[4]:.3f}",
            flush=True,
        )


def independent(folder: Path, chosen: list[Path], threads: int) -> None:
    """Ratios of what vitnas reports to bare loops, alternating, five times each."""
    app = shutil.which("benchmark_app", path=Path(sys.executable).parent)
    with tempfile.TemporaryDirectory() as work, device_lock("cpu"):
        for runtime in ("onnxruntime", *(["openvino"] if app else [])):
            with Measurer(Settings(runtime, threads=threads), folder / "reference.onnx", Path(work)) as measurer:
                for path in chosen:
                    ratios = []
                    for _ in range(5):
                        ours = measurer.measure(path).p50_ms
                        if runtime == "onnxruntime":
                            words = [sys.executable, "-c", ORT_LOOP, str(path), str(threads)]
                        else:
                            words = [app, "-m", str(path), "-d", "CPU", "-hint", "none", "-nthreads", str(threads)]
                            words += ["-nstreams", "1", "-api", "sync", "-t", "2", "-infer_precision", "f32"]
                        words = ["taskset", "-c", ",".join(map(str, usable_cpus()[:threads])), *words]
                        said = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True).stdout
                        theirs = re.search(r"Median:\s*([\d.]+)", said).group(1) if "Median" in said else said
                        ratios.append(ours / float(theirs))
                    print(
                        f"{runtime}, {threads} thread(s), {path.name}, {ours:.2f} ms: vitnas / bare loop "
                        f"{statistics.median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f})"
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--independent", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, Settings(**args.settings))))
        return
    settings = Settings(threads=args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_artifact(get_arch(REFERENCE), settings, folder / "reference")
        (reference_ms, _) = fresh_reference(folder, settings)
        archs = draw(args.networks, reference_ms, args.seed)
        for i, arch in enumerate(archs):
            write_artifact(arch, settings, folder / f"{i:02}")
        first, second = fresh(folder, settings), fresh(folder, settings)
        print(
            f"{len(archs)} networks, {', '.join(sorted({arch.family for arch in archs}))}; "
            f"{first[:, 0].min():.2f} to {first[:, 0].max():.2f} ms at {args.threads} thread(s)"
        )
        agreement("quiet, twice", first, second)
        if args.threads == 1 and len(usable_cpus()) > 1:
            with loaded(usable_cpus()[-1]):
                busy = fresh(folder, settings)
            agreement("quiet against a busy other CPU", first, busy)
        if args.independent:
            order = np.argsort(first[:, 0])
            chosen = [folder / f"{order[place]:02}.onnx" for place in (0, len(order) // 2, -1)]
            independent(folder, chosen, args.threads)


def fresh_reference(folder: Path, settings: Settings) -> tuple[float, float]:
    shutil.copy(folder / "reference.onnx", folder / "00.onnx")
    return tuple(fresh(folder, settings)[0])


if __name__ == "__main__":
    main()
