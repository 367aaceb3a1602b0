"""What a width that is no multiple of 8 costs: the same network with its FFNs cut to widths around one half.

    python tests/benchmarks/bench_widths.py [--model efficientvit_m4] [--threads 1] [--rounds 40]

Latencies from one interleaved run on ONNX Runtime, with MACs beside them; about a minute.
"""

import argparse
import tempfile
from pathlib import Path

from nas.export.onnx import write_onnx
from nas.export.options import FileOptions
from nas.measure.device import compare, device_lock
from nas.measure.runtime import Settings
from pruning.units import anatomy, cut, equal_scores
from search_spaces import get_arch, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="efficientvit_m4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    parts = anatomy(get_arch(options.model))
    equal = equal_scores(parts)
    archs = {"whole": parts.arch}
    for more in (0, 1, 3, 4, 8):
        half = {k.name: k.size // 2 // 8 * 8 + more for k in parts.knobs if k.width.endswith("ffn.hidden")}
        archs[f"half, + {more}" if more else "half, multiples of 8"] = cut(parts, equal, half).arch
    settings = Settings("onnxruntime", "cpu", options.threads, 1)
    with tempfile.TemporaryDirectory() as folder, device_lock("cpu"):
        paths = {name: Path(folder) / f"{i}.onnx" for i, name in enumerate(archs)}
        for name, path in paths.items():
            write_onnx(archs[name], path, FileOptions())
        results = compare(paths, settings, options.rounds)
    whole, macs = results["whole"], parts.table.macs()
    print(f"{options.model}, ONNX Runtime, {options.threads} thread(s), batch 1\n")
    print("| FFN widths | MACs | ms | 95% | speed-up | for MACs |\n|---|---|---|---|---|---|")
    for name, result in results.items():
        low, high = result.ci_ms
        fewer, faster = macs / table(archs[name]).macs(), whole.p50_ms / result.p50_ms
        latency = f"{result.p50_ms:.3f} | {low:.3f}..{high:.3f}"
        print(f"| {name} | {1 / fewer:.3f}x | {latency} | {faster:.2f}x | {fewer:.2f}x |")


if __name__ == "__main__":
    main()
