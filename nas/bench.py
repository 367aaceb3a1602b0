"""Networks side by side on one device."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nas.errors import UserError, first_line
from nas.export import write_artifact
from nas.measure import RUNTIMES, MeasureError, Settings, compare, device_lock
from nas.targets import Target


def run_bench(
    targets: Sequence[Target], settings: Settings, rounds: int, progress: Callable[[int, int], None] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure all targets in one interleaved run.

    Returns:
        A row per network that could be measured, in the order given; one line per network that could not.

    Raises:
        UserError: an ONNX file for a runtime that does not load ONNX.
    """
    if RUNTIMES[settings.runtime].artifact != "onnx":
        for target in targets:
            if target.onnx:
                raise UserError(f"{target.label}: runtime {settings.runtime} does not load ONNX; use onnxruntime")
    with tempfile.TemporaryDirectory(prefix="vitnas-") as folder, device_lock(settings.device):
        paths = {}
        for i, target in enumerate(targets):
            try:
                paths[str(i)] = target.onnx or write_artifact(target.arch, settings, Path(folder) / str(i))
            except (RuntimeError, ValueError) as error:
                raise UserError(f"{target.label} cannot be exported: {first_line(error)}") from None
        results = compare(paths, settings, rounds, progress)
    rows, errors, first = [], [], None
    for i, target in enumerate(targets):
        result = results[str(i)]
        if isinstance(result, MeasureError):
            errors.append(f"{target.label}: {result}")
            continue
        first = first or result.p50_ms
        low, high = result.ci_ms
        rows.append(
            {
                "model": target.label,
                "runtime": settings.runtime,
                "device": settings.device,
                "batch_size": settings.batch_size,
                "threads": settings.threads,
                "latency_ms": result.p50_ms,
                "p95_ms": result.p95_ms,
                "ci": [low, high],
                "samples": result.n,
                "throughput": result.throughput(settings.batch_size),
                "ratio": result.p50_ms / first,
            }
        )
    return rows, errors
