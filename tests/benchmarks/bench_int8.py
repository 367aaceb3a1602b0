"""int8 and bf16 on networks trained here, of all five families: time relative to fp32, and points of top-1 that they
cost; where int8 costs more than a point, what every other recipe costs.

    python tests/benchmarks/bench_int8.py OUT --zoo FOLDER --zoo-data TIN100 --data TIN20 [--images 2000]

The zoo's networks are judged on the validation images of TIN100, whose classes they are trained on. LeViT-128S,
DeiT-Tiny and SepViT-Lite are first trained from scratch on TIN20 (20 classes, 2,000 images) for 16 to 24 epochs, 10 to
20 minutes of one CPU each: weakly, so that their drops say less than those of networks trained in earnest.

Time is the process's CPU time, of one thread and batch 1, fp32 and its rivals on one runtime in turns: on an idle
machine it is the latency, on a busy one it holds no waiting. Drops are paired: both files answer the same images. Those
of the other recipes are told on the images that they are compared by: the best may cost a little more on others.
OUT/rows.jsonl has a row for each network; the same command goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nas.data.dataset import ImageData, open_data
from nas.data.images import sample
from nas.evaluate.onnx_file import OnnxFile
from nas.evaluate.pairs import compare
from nas.evaluate.precision import MORE, RECIPES, HeldOut, quantize_within
from nas.export.artifact import write_trained
from nas.export.card import Card
from nas.export.options import PLAIN
from nas.export.quantize import MAX_DROP, calibration_images, quantize
from nas.measure.samples import median_interval
from nas.networks.targets import find_target
from nas.networks.timm_network import TimmNetwork
from search_spaces import Arch

PX = 64
RUNTIMES = ("onnxruntime", "openvino")
TRAINED = {"levit_128s": 24, "sepvit_lite": 16, "deit_tiny": 16}
"""Epochs."""
ZOO = ("efficientvit_m0", "efficientvit_m1", "efficientvit_m2", "shvit_s1")


@dataclass(frozen=True)
class Subject:
    """A trained network, and images of its classes."""

    name: str
    network: Arch | TimmNetwork
    weights: Path
    data: ImageData


def of_zoo(name: str, zoo: Path, data: Path) -> Subject:
    images = open_data(data, PX, None, 0)
    network = find_target(name, PX).require().replace(num_classes=len(images.classes))
    return Subject(name, network, zoo / f"{name}.safetensors", images)


def trained(name: str, out: Path, data: Path) -> Subject:
    run = out / name
    if not (run / "model.onnx").is_file():
        words = ["train", name, "--data", data, "--resolution", PX, "--recipe", "quick", "--epochs", TRAINED[name]]
        words += ["--batch-size", 64, "--lr", "1e-3", "--seed", 0, "--from-scratch", "--train-threads", 1, "--out", run]
        subprocess.run([sys.executable, "-m", "nas.cli", *map(str, words)], check=True)
    target = find_target(str(run))
    assert target.weights is not None
    return Subject(name, target.require(), target.weights, open_data(data, PX, None, 0))


def cpu_times(files: dict[str, OnnxFile], rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU an image, by round, of files that take turns."""
    pixels = {name: np.zeros((1, 3, PX, PX), np.float32) for name in files}
    runs: dict[str, Callable[[], object]] = {
        name: lambda file=file, name=name: file.run(pixels[name]) for name, file in files.items()
    }
    found: dict[str, list[float]] = {name: [] for name in files}
    for run in runs.values():
        for _ in range(10):
            run()
    for number in range(rounds):
        for name in sorted(runs, reverse=bool(number % 2)):
            begun = time.process_time()
            for _ in range(20):
                runs[name]()
            found[name].append((time.process_time() - begun) / 20)
    return found


def against(full: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Points that the second of two files loses, with the 95% interval."""
    (pair,) = compare({"lower": right, "fp32": full})
    low, high = pair.difference_ci
    return {"drop": pair.difference, "low": low, "high": high}


def measured(subject: Subject, folder: Path, images: int, rounds: int) -> dict[str, object]:
    """A network's row."""
    held = HeldOut(sample(subject.data.val, images, 0))
    calibration, _ = calibration_images(subject.data, PX, MORE)
    plain = folder / "fp32.onnx"
    write_trained(subject.network, subject.weights, plain, PLAIN, Card.of(subject.data))
    row: dict[str, object] = {"network": subject.name, "images": images, "runtimes": {}}
    for runtime in RUNTIMES:
        full = held.right(plain, runtime, 1)
        int8 = folder / f"{runtime}.onnx"
        shutil.copyfile(plain, int8)
        price = quantize_within(int8, calibration, held, runtime, -100.0, 1, RECIPES[:1])
        found: dict[str, object] = {
            "top1": price.float_top1,
            "int8": {"drop": price.drop, "low": price.drop_ci[0], "high": price.drop_ci[1]},
            "float": price.left_in_float,
        }
        files = {"fp32": OnnxFile.open(plain, runtime, threads=1), "int8": OnnxFile.open(int8, runtime, threads=1)}
        if runtime == "openvino":
            files["bf16"] = OnnxFile.open(plain, runtime, threads=1, bf16=True)
            found["bf16"] = against(full, held.right(plain, runtime, 1, bf16=True))
        if price.drop > MAX_DROP:
            remedies = []
            for recipe in RECIPES[1:]:
                other = folder / "other.onnx"
                shutil.copyfile(plain, other)
                quantize(other, calibration, recipe)
                told = against(full, held.right(other, runtime, 1))
                times = cpu_times({"fp32": files["fp32"], "int8": OnnxFile.open(other, runtime, threads=1)}, rounds)
                remedies.append({"recipe": str(recipe), **told, **ratio(times, "int8")})
            found["remedies"] = remedies
        times = cpu_times(files, rounds)
        found["ms"] = 1000 * float(np.median(times["fp32"]))
        found["ratios"] = {name: ratio(times, name) for name in files if name != "fp32"}
        row["runtimes"][runtime] = found  # type: ignore[index]
    return row


def ratio(times: dict[str, list[float]], name: str) -> dict[str, float]:
    """Of CPU times to those of fp32, round by round."""
    each = sorted(a / b for a, b in zip(times[name], times["fp32"], strict=True))
    low, high = median_interval(each)
    return {"ratio": float(np.median(each)), "ratio_low": low, "ratio_high": high}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--zoo-data", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    rows = args.out / "rows.jsonl"
    done = {json.loads(line)["network"] for line in rows.read_text().splitlines()} if rows.is_file() else set()
    subjects: dict[str, Callable[[], Subject]] = {
        **{name: lambda name=name: of_zoo(name, args.zoo, args.zoo_data) for name in ZOO},
        **{name: lambda name=name: trained(name, args.out, args.data) for name in TRAINED},
    }
    for name, make in subjects.items():
        if name not in done:
            folder = args.out / "files"
            folder.mkdir(exist_ok=True)
            row = measured(make(), folder, args.images, args.rounds)
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row, indent=1), flush=True)


if __name__ == "__main__":
    main()
