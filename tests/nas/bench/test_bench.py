"""`vitnas bench`: tiny networks measured for real; its bookkeeping on measurements that are given."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import quick

from nas.bench import files as bench_files
from nas.bench import report, run
from nas.bench.report import to_csv, to_plot
from nas.bench.request import BenchRequest
from nas.bench.result import is_tie
from nas.bench.run import bench
from nas.bench.shapes import parse_shape
from nas.errors import UserError
from nas.export import side_by_side
from nas.export.artifact import Exporter
from nas.export.folder import save_weights
from nas.export.onnx_input import OnnxInput
from nas.export.quantize import MAX_DROP, NOISE
from nas.files import check_output
from nas.measure.device import compare
from nas.measure.protocol import Interrupted
from nas.measure.runtime import Settings
from nas.measure.samples import MeasureError, Measurement, paired_ratio
from nas.networks.targets import Target, find_arch, find_target
from nas.networks.timm_network import TimmNetwork
from nas.process import WorkerError
from search_spaces import create_model

KEYS = [
    *(
        "model",
        "resolution",
        "runtime",
        "device",
        "precision",
        "batch_size",
        "threads",
        "latency_ms",
        "p95_ms",
        "ci",
        "samples",
    ),
    *("ratio", "ratio_ci", "waiting", "throughput", "throughput_batch"),
    *("top1", "drop", "drop_ci", "within"),
    *("memory_mb", "file_mb", "energy_mj"),
]
FAST = ("--rounds", "6", "--threads", "1")


pytestmark = pytest.mark.usefixtures("exports_here")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said of a slow machine."""
    monkeypatch.setattr("nas.process.TOLD_S", 1000)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured for real never waits for a CPU."""
    monkeypatch.setattr(run, "quanta", lambda _: False)


@pytest.fixture
def fixed_here(monkeypatch: pytest.MonkeyPatch, exports_here: None) -> None:
    """ONNX files get their shape and precision in this process; runs of several runtimes leave it to a child."""
    in_a_child = Exporter.call

    def call(self: Exporter, method: str, settings: Settings, stem: Path, images: str | None, **source: Any) -> Path:
        here = {"fix": bench_files._fix, "lower": bench_files._lower, "judge": bench_files._judge}
        if method not in here:
            return in_a_child(self, method, settings, stem, images, **source)
        return Path(here[method](settings=asdict(settings), stem=str(stem), images=images, **source)["path"])

    monkeypatch.setattr(Exporter, "call", call)


@pytest.fixture
def onnx_file(tmp_path: Path) -> Callable[..., str]:
    """Writes a small network: inputs by name, each (type, sizes); a size may be a name or None."""

    def write(
        name: str = "mine.onnx", *, operator: str = "Conv", kind: str = "FLOAT", opset: int = 17, **inputs: list | None
    ) -> str:
        from onnx import TensorProto, helper

        inputs = inputs or {"images": ["batch", 3, 8, 8]}
        values = [helper.make_tensor_value_info(key, TensorProto.DataType.Value(kind), s) for key, s in inputs.items()]
        weight = np.ones((4, 3, 3, 3), np.float32)
        domain = "" if operator == "Conv" else "own"
        nodes = [
            helper.make_node("Cast", [next(iter(inputs))], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node(operator, ["pixels", "weight"], ["features"], domain=domain),
            helper.make_node("GlobalAveragePool", ["features"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["logits"]),
        ]
        graph = helper.make_graph(
            nodes,
            "graph",
            values,
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
            [onnx.numpy_helper.from_array(weight, "weight")],
        )
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
        path = tmp_path / name
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
        return str(path)

    return write


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, list[float] | str]], list]:
    """Replaces exporting and measuring: each label has its rounds' medians, or the reason why it fails.

    Returns the list of what was asked to be measured.
    """

    def install(medians: Mapping[str, list[float] | str]) -> list:
        asked: list[tuple[str, Settings]] = []

        def compare(paths, settings, rounds, progress, timeout_s, waiting):
            assert list(paths) == list(settings)
            found = {}
            for name, path in paths.items():
                asked.append((str(path), settings[name]))
                known = medians[str(path)]
                per_image = 1 if isinstance(known, str) else settings[name].batch_size
                found[name] = (
                    MeasureError(known)
                    if isinstance(known, str)
                    else Measurement([[per_image * ms] * 3 for ms in known])
                )
            progress(rounds, rounds)
            return found

        monkeypatch.setattr(side_by_side, "compare", compare)
        monkeypatch.setattr(bench_files.Files, "of", lambda self, label, settings: Path(label))
        return asked

    return install


def options(*labels: str, settings: tuple[Settings, ...] = (Settings(),), **more: object) -> BenchRequest:
    return BenchRequest([Target(label) for label in labels], settings, **more)


def failures(err: str) -> list[str]:
    """Lines of standard error that tell no progress."""
    return [line for line in err.splitlines() if line.startswith("vitnas: ")]


# --- measured for real; files are made in this process ---


@pytest.mark.usefixtures("quiet", "fixed_here")
def test_networks_of_all_kinds(vitnas, onnx_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Measurement] = {}
    monkeypatch.setattr(side_by_side, "compare", lambda *args: made.update(compare(*args)) or made)
    arch = tmp_path / "arch.json"
    arch.write_text(find_arch("efficientvit_m0").at(64).to_json())
    table, plot = tmp_path / "bench.csv", tmp_path / "bench.png"
    words = [str(arch), "timm/test_vit", onnx_file(), "--csv", str(table), "--plot", str(plot)]
    code, out, err = vitnas("bench", *words, *FAST, "--json")
    assert (code, failures(err)) == (0, [])
    found = json.loads(out)
    rows = found["results"]
    assert [row["model"] for row in rows] == words[:3]
    for row, measured in zip(rows, made.values(), strict=True):
        assert list(row) == KEYS
        assert (row["latency_ms"], row["ci"]) == (measured.p50_ms, list(measured.ci_ms))
        assert (row["runtime"], row["device"], row["precision"], row["threads"]) == ("onnxruntime", "cpu", "fp32", 1)
        assert (row["batch_size"], row["throughput_batch"]) == (1, 1)
        assert row["throughput"] == pytest.approx(1000 / row["latency_ms"])
        assert row["ci"][0] <= row["latency_ms"] <= row["ci"][1]
        assert row["ratio"] == paired_ratio(measured, made["0"])[0]
        assert row["ratio_ci"][0] <= row["ratio"] <= row["ratio_ci"][1]
    fastest = [min(map(min, measured.rounds_ms)) for measured in made.values()]  # other programs can only add
    assert fastest[2] < fastest[0]
    assert found["hardware"]["threads"] == 1
    assert found["hardware"]["cpu"]
    assert [row["model"] for row in csv.DictReader(table.read_text().splitlines())] == words[:3]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arch.json", "bench.csv", "bench.png", "mine.onnx"]


@pytest.mark.usefixtures("quiet")
def test_runtimes_and_precisions_in_one_run(vitnas, onnx_file, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("openvino")
    onnx_file(images=[None, 3, 32, 32])
    monkeypatch.chdir(tmp_path)
    words = ("--runtime", "onnxruntime", "--runtime", "openvino", "--precision", "fp32", "--precision", "int8")
    code, out, err = vitnas("bench", "mine.onnx", *words, "--throughput-at", "8", *FAST)
    assert (code, failures(err)) == (0, [])
    lines = [line.split() for line in out.splitlines()]
    assert [line[1:3] for line in lines[2:6]] == [
        ["onnxruntime", "fp32"],
        ["onnxruntime", "int8"],
        ["openvino", "fp32"],
        ["openvino", "int8"],
    ]
    assert out.startswith("One interleaved run: 32 px, cpu, batch 1, 1 thread.\n")
    assert lines[1][:3] == ["network", "runtime", "precision"]
    assert "img/s at batch 8" in out
    assert out.count("calibrated on noise") == 1


@pytest.mark.usefixtures("quiet", "fixed_here")
def test_the_others_are_told_where_one_fails(vitnas, onnx_file, tmp_path: Path, monkeypatch) -> None:
    onnx_file("good.onnx")
    onnx_file("bad.onnx", operator="Unheard")
    monkeypatch.chdir(tmp_path)
    code, out, err = vitnas("bench", "bad.onnx", "good.onnx", *FAST, "--csv", "bench.csv")
    assert code == 2
    assert "good.onnx" in out
    assert "bad.onnx" not in out
    (line,) = failures(err)
    assert "bad.onnx: " in line
    assert "Unheard" in line
    first, second = csv.DictReader(Path("bench.csv").read_text().splitlines())
    assert (first["model"], first["ratio"], first["error"]) == ("good.onnx", "1.0", "")
    assert (second["model"], second["threads"], second["ratio"]) == ("bad.onnx", "1", "")
    assert "Unheard" in second["error"]


@pytest.mark.usefixtures("fixed_here")
def test_int8_calibrated_on_images(onnx_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    for kind in ("cat", "dog"):
        folder = tmp_path / "images" / kind
        folder.mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (40, 40), (i, 100, 200)).save(folder / f"{i}.png")
    (tmp_path / "images" / "cat" / "0.png").write_bytes(b"broken")
    arrays, files = [], []
    write = np.save
    monkeypatch.setattr(np, "save", lambda path, array: (arrays.append(array), write(path, array)))

    def compare(paths, settings, *_):
        files.extend(path.read_bytes() for path in paths.values())
        return dict.fromkeys(paths, Measurement([[1.0]] * 3))

    monkeypatch.setattr(side_by_side, "compare", compare)
    target = find_target(onnx_file(images=[1, 3, 32, 32]))
    for data in (None, str(tmp_path / "images")):
        found = bench(BenchRequest([target], (Settings(precision="int8"),), data=data))
        assert not found.errors
    assert [(array.shape, array.dtype) for array in arrays] == [((35, 3, 32, 32), np.float32)]
    skipped, unknown = found.notes
    assert skipped.startswith("skipped 1 image that cannot be decoded: ")
    assert unknown.startswith(f"{target.label}: what int8 costs is not known: ")
    assert "does not say how an image becomes its input images (float32 1x3x32x32)" in unknown
    assert found.rows[0].top1 is None
    noise, images = files
    assert noise != images  # other ranges


@pytest.mark.parametrize(("max_drop", "within"), [(50.0, True), (0.0, False)])
@pytest.mark.usefixtures("fixed_here")
def test_int8_of_a_file_that_knows_the_classes_is_judged(
    onnx_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, max_drop: float, within: bool
) -> None:
    """The file that is timed is the one that is judged, on the runtime that it is timed on."""
    from PIL import Image

    from nas.bench.table import show_bench
    from nas.evaluate import precision
    from nas.evaluate.precision import HeldOut
    from nas.export.card import Card
    from nas.export.onnx import label_onnx
    from nas.export.quantize import Recipe

    for kind in ("cat", "dog"):
        for part, count in (("train", 4), ("val", 8)):
            folder = tmp_path / "images" / part / kind
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), (i, 100, 200)).save(folder / f"{i}.png")
    mine = onnx_file(images=[1, 3, 32, 32])
    card = Card.untrained(32).model_copy(update={"classes": ["dog", "c", "d", "cat"]})
    label_onnx(Path(mine), None, True, card)
    monkeypatch.setattr(precision, "RECIPES", (Recipe(), Recipe(ranges="percentile")))
    judged: list[tuple[str, bytes]] = []

    def right(self: HeldOut, path: Path, runtime: str, threads: int) -> np.ndarray:
        assert [*self.outputs] == [3, 0]
        assert len(self.images) == 16
        judged.append((runtime, path.read_bytes()))
        quantised = any(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)
        return np.arange(16) >= 4 * quantised

    monkeypatch.setattr(HeldOut, "right", right)
    timed: dict[str, bytes] = {}

    def compare(paths, settings, *_):
        timed.update({settings[name].precision: path.read_bytes() for name, path in paths.items()})
        return dict.fromkeys(paths, Measurement([[1.0]] * 3))

    monkeypatch.setattr(side_by_side, "compare", compare)
    settings = [Settings("openvino", precision=precision) for precision in ("fp32", "int8")]
    data = str(tmp_path / "images")
    found = bench(BenchRequest([find_target(mine)], settings, data=data, max_drop=max_drop))
    full, int8 = found.rows
    assert {runtime for runtime, _ in judged} == {"openvino"}
    assert timed["int8"] in [content for _, content in judged]
    assert (full.top1, full.drop, full.within) == (100, None, None)
    assert (int8.top1, int8.drop, int8.within) == (75, 25, within)
    assert len(judged) == (2 if within else 3)
    first = next(
        note for note in found.notes if note.startswith(f"{mine}: {'int8' if within else 'infeasible: int8'} ")
    )
    assert ("more than --max-drop 0 allows" in first) != within
    assert f"{mine}: left in float: nothing" in found.notes
    show_bench(found.rows, found.notes)
    out = " ".join(capsys.readouterr().out.split())
    assert ("over --max-drop" in out) != within
    assert "100.0" in out
    rows = list(csv.DictReader(to_csv(found.rows).decode().splitlines()))
    assert [(row["top1"], row["drop"], row["within"]) for row in rows] == [
        ("100.0", "", ""),
        ("75.0", "25.0", str(within)),
    ]


@pytest.fixture
def judged(onnx_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BenchRequest:
    """A file of classes a, b, c and d, of any batch, in int8, with images of a and b; nothing is timed."""
    from PIL import Image

    from nas.export.card import Card
    from nas.export.onnx import label_onnx

    for part, kind in itertools.product(("train", "val"), ("a", "b")):
        (tmp_path / "images" / part / kind).mkdir(parents=True)
        for i in range(16):
            Image.new("RGB", (40, 40), (i, 100, 200)).save(tmp_path / "images" / part / kind / f"{i}.png")
    mine = onnx_file(images=["batch", 3, 32, 32])
    label_onnx(Path(mine), None, True, Card.untrained(32).model_copy(update={"classes": list("abcd")}))
    monkeypatch.setattr(side_by_side, "compare", lambda paths, *_: dict.fromkeys(paths, Measurement([[1.0]] * 3)))
    settings = (Settings(precision="int8"), Settings(precision="int8", batch_size=4))
    return BenchRequest([find_target(mine)], settings, data=str(tmp_path / "images"), max_drop=100)


@pytest.mark.usefixtures("fixed_here")
def test_bf16_is_judged_as_int8_is(judged: BenchRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fp32 file, as the runtime computes it."""
    from nas.evaluate.precision import HeldOut

    asked = []

    def right(self: HeldOut, path: Path, runtime: str, threads: int, bf16: bool = False) -> np.ndarray:
        asked.append((runtime, bf16))
        return np.arange(32) >= 8 * bf16

    monkeypatch.setattr(HeldOut, "right", right)
    monkeypatch.setattr("nas.bench.request.check_settings", lambda _: None)
    settings = tuple(Settings("openvino", precision=precision) for precision in ("fp32", "bf16"))
    found = bench(replace(judged, settings=settings, max_drop=10))
    full, lower = found.rows
    assert asked == [("openvino", False), ("openvino", True)]
    assert (full.top1, lower.top1, lower.drop, lower.within) == (100, 75, 25, False)
    assert any("infeasible: bf16 costs 25.0 points of top-1" in note for note in found.notes)


@pytest.mark.usefixtures("fixed_here")
def test_another_batch_size_has_the_same_recipe(judged: BenchRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from nas.evaluate import precision
    from nas.export.quantize import Recipe

    recipe, used, quantize = Recipe(ranges="percentile", kept=("first",), images=32), [], bench_files.quantize
    monkeypatch.setattr(precision, "RECIPES", (recipe,))
    monkeypatch.setattr(bench_files, "quantize", lambda *args: (used.append(args[2]), quantize(*args)))
    found = bench(judged)
    assert used == [recipe]
    assert [row.batch_size for row in found.rows] == [1, 4]
    assert found.rows[0].top1 == found.rows[1].top1 is not None
    assert f"which images {judged.targets[0].onnx} was trained on is unknown" in " ".join(found.notes)


@pytest.mark.usefixtures("fixed_here")
def test_a_file_that_is_int8_already_is_not_judged(judged: BenchRequest) -> None:
    from nas.export.artifact import lower_precision

    (target,), settings = judged.targets, Settings(precision="int8")
    assert target.onnx is not None
    lower_precision(target.onnx, settings)
    found = bench(replace(judged, settings=(settings,)))
    assert (found.errors, found.rows[0].top1) == ([], None)
    assert f"{target.label} is int8 already, and not judged: `vitnas evaluate` tells its accuracy." in found.notes
    found = bench(replace(judged, settings=(Settings(), settings), data=None, max_drop=MAX_DROP))
    assert [row.precision for row in found.rows] == ["int8"]
    assert NOISE not in found.notes


def test_a_trained_network_is_built_where_pytorch_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder has weights, but what PyTorch's runtimes load is its document."""
    network = find_arch("efficientvit_m0").replace(num_classes=2)
    (tmp_path / "arch.json").write_text(network.to_json())
    save_weights(create_model(network), tmp_path / "model.safetensors")
    called = []

    def call(self: Exporter, method: str, settings: Settings, stem: Path, images: str | None, **source: Any) -> Path:
        called.append((settings.runtime, method))
        return stem

    monkeypatch.setattr(Exporter, "call", call)
    monkeypatch.setattr(side_by_side, "compare", lambda paths, *_: dict.fromkeys(paths, Measurement([[1.0]] * 3)))
    bench(BenchRequest([find_target(str(tmp_path))], (Settings("torch"), Settings("onnxruntime"))))
    assert called == [("torch", "export"), ("onnxruntime", "trained")]


@pytest.mark.usefixtures("fixed_here")
def test_a_tool_that_fails_costs_its_row_alone(judged: BenchRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from nas.evaluate import precision
    from nas.export.quantize import Recipe

    monkeypatch.setattr(precision, "RECIPES", (Recipe(),))

    def fails(*_: object) -> None:
        raise WorkerError("the tool's own kind of error")

    monkeypatch.setattr(bench_files, "quantize", fails)
    found = bench(judged)
    (line,) = found.errors
    assert "own kind of error" in line
    assert found.rows[0].latency_ms is not None


def test_networks_are_calibrated_on_the_images_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nas.export import artifact

    seen = []

    def write_artifact(network, settings, stem, calibration):
        seen.append((network, settings, calibration.tolist()))
        return stem.with_suffix(".onnx")

    monkeypatch.setattr(artifact, "write_artifact", write_artifact)
    arch, settings, images = find_arch("efficientvit_m0"), Settings(precision="int8"), tmp_path / "images.npy"
    np.save(images, np.arange(3, dtype=np.float32))
    answer = artifact.export_here(arch.to_json(), asdict(settings), str(tmp_path / "0"), str(images))
    assert answer == {"path": str(tmp_path / "0.onnx")}
    assert seen == [(arch, settings, [0, 1, 2])]


# --- bookkeeping ---


def test_rows_are_all_combinations(given) -> None:
    asked = given({"a": [1.0] * 6, "b": [2.0] * 6})
    settings = tuple(Settings(runtime, threads=t) for runtime in ("onnxruntime", "openvino") for t in (1, 2))
    found = bench(options("a", "b", settings=settings))
    assert [(row.runtime, row.threads, row.model) for row in found.rows] == [
        (each.runtime, each.threads, label) for each in settings for label in ("a", "b")
    ]
    assert [row.ratio for row in found.rows] == [1, 2] * 4
    assert asked == [(label, each) for each in settings for label in ("a", "b")]
    assert (found.errors, found.notes) == ([], [])


def test_throughput_of_another_batch(given) -> None:
    asked = given({"a": [2.0] * 6})
    settings = (Settings(), Settings(batch_size=8))
    found = bench(options("a", settings=settings, throughput_at=8))
    assert [each.batch_size for _, each in asked] == [1, 8]  # once each
    assert [(row.batch_size, row.latency_ms) for row in found.rows] == [(1, 2.0), (8, 16.0)]
    assert [(row.throughput, row.throughput_batch) for row in found.rows] == [(500.0, 8)] * 2


def test_throughput_that_cannot_be_measured(given, monkeypatch: pytest.MonkeyPatch) -> None:
    given({"a": [2.0] * 6})
    compare = side_by_side.compare

    def no_large_batch(paths, settings, *rest):
        results = compare(paths, settings, *rest)
        return {name: MeasureError("too much") if settings[name].batch_size > 1 else results[name] for name in results}

    monkeypatch.setattr(side_by_side, "compare", no_large_batch)
    found = bench(options("a", throughput_at=64))
    assert [(row.latency_ms, row.throughput) for row in found.rows] == [(2.0, None)]
    assert found.errors == ["a (batch 64): too much"]

    def waits_at_a_large_batch(paths, settings, *_):
        return {
            name: Measurement([[1.0, 8.0, 8.0] if settings[name].batch_size > 1 else [2.0] * 3] * 6) for name in paths
        }

    monkeypatch.setattr(side_by_side, "compare", waits_at_a_large_batch)
    found = bench(options("a", throughput_at=64))
    assert [(row.waiting, row.throughput) for row in found.rows] == [(False, None)]
    told = "a: its throughput at batch 64 is not told, as it waited for CPUs that other processes use."
    assert found.notes == [told]


def test_what_fails_is_told_and_the_ratio_is_to_the_first_row(given) -> None:
    given({"a": "it broke", "b": [2.0] * 6, "c": [3.0] * 6})
    found = bench(options("a", "b", "c"))
    assert [(row.model, row.ratio) for row in found.rows] == [("b", 1), ("c", 1.5)]
    assert found.errors == ["a: it broke"]
    assert [(row.model, row.threads, row.error) for row in found.failed] == [("a", 1, "it broke")]


def test_what_cannot_be_prepared_is_told(onnx_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a trained network, whose file is in the precision asked for."""
    made: list[set[str]] = []

    def compare(paths: dict[str, Path], *_: object) -> dict[str, Measurement]:
        made.extend({node.op_type for node in onnx.load(path).graph.node} for path in paths.values())
        return dict.fromkeys(paths, Measurement([[1.0]] * 6))

    monkeypatch.setattr(side_by_side, "compare", compare)
    monkeypatch.setattr("nas.process.TOLD_S", 0.01)
    network, folder = quick.small_reference(), tmp_path / "net"
    folder.mkdir()
    (folder / "arch.json").write_text(network.to_json())
    save_weights(create_model(network), folder / "model.safetensors")
    path, said = onnx_file(operator="Unheard"), []
    targets = [find_target(path), find_target(str(folder))]
    found = bench(BenchRequest(targets, (Settings(precision="int8"),)), say=said.append)
    assert said[0] == f"waiting for {path}: no answer for 0 s, will give up after 600 s (--timeout)"
    assert [row.model for row in found.rows] == [str(folder)]
    assert ["QuantizeLinear" in each for each in made] == [True]
    assert len(found.errors) == 1
    assert found.errors[0].startswith(f"{path}: cannot be prepared: ")
    assert "Unheard" in found.errors[0]


def test_what_is_waited_for_is_told(given, vitnas, monkeypatch: pytest.MonkeyPatch) -> None:
    given({"efficientvit_m0": [1.0] * 6, "shvit_s1": "no answer in 90 s"})
    compare = side_by_side.compare

    def slow(paths, settings, rounds, progress, timeout_s, waiting):
        for waited_s in (10, 10, 70):
            waiting("1", waited_s, timeout_s)
        return compare(paths, settings, rounds, progress, timeout_s, waiting)

    monkeypatch.setattr(side_by_side, "compare", slow)
    code, out, err = vitnas("bench", "efficientvit_m0", "shvit_s1", "--timeout", "90s", "--json")
    assert code == 2
    assert [line for line in err.splitlines() if line.startswith(("waiting", "vitnas"))] == [
        "waiting for shvit_s1: no answer for 10 s, will give up after 90 s (--timeout)",
        "waiting for shvit_s1: no answer for 70 s, will give up after 90 s (--timeout)",
        "vitnas: shvit_s1: no answer in 90 s",
    ]
    found = json.loads(out)
    assert [row["model"] for row in found["results"]] == ["efficientvit_m0"]
    assert [(row["model"], row["error"]) for row in found["failed"]] == [("shvit_s1", "no answer in 90 s")]


@pytest.mark.parametrize(("done", "coverage"), [(6, ""), (2, ": intervals cover less than 95%"), (0, None)])
def test_ctrl_c_tells_the_rounds_made(
    vitnas, given, tmp_path: Path, monkeypatch, done: int, coverage: str | None
) -> None:
    given({})
    results = {"0": Measurement([[1.0] * 3] * done), "1": MeasureError("it broke"), "2": Measurement([[2.0]] * done)}

    def compare(*_: object) -> None:
        raise Interrupted(results, done)

    monkeypatch.setattr(side_by_side, "compare", compare)
    table = tmp_path / "bench.csv"
    code, out, err = vitnas("bench", "efficientvit_m0", "shvit_s1", "levit_128s", "--csv", str(table))
    assert (code, err.splitlines()[-1]) == (130, "interrupted")
    if coverage is None:
        assert out == ""
        assert not table.exists()
    else:
        assert "2.000" in out
        assert f"Interrupted: {done} of 30 rounds were made{coverage}.\nshvit_s1: it broke\n" in out
        rows = list(csv.DictReader(table.read_text().splitlines()))
        assert [row["model"] for row in rows] == ["efficientvit_m0", "levit_128s", "shvit_s1"]


def test_a_network_named_twice_is_measured_once(given) -> None:
    asked = given({"a": [1.0] * 6, "b": [1.0] * 6})
    found = bench(options("a", "b", "a"))
    assert len(asked) == 2
    assert found.notes == ["a is named more than once: measured once."]


@pytest.mark.parametrize(("medians", "said"), [([1.0, 1.2] * 3, False), ([1.0, 1.4] * 3, True)])
def test_a_busy_machine_is_told(given, medians: list[float], said: bool) -> None:
    given({"calm": [1.0] * 6, "busy": medians})
    notes = bench(options("calm", "busy")).notes
    assert bool(notes) is said
    assert all("busy varied by" in note for note in notes)


@pytest.mark.parametrize(
    ("factors", "tie"), [([1.01, 0.99, 1.02, 0.98, 1.0, 1.01], True), ([1.01, 1.02, 1.03, 1.02, 1.01, 1.02], False)]
)
def test_a_tie_is_called_one(given, vitnas, factors: list[float], tie: bool) -> None:
    given({"efficientvit_m0": [1.0] * 6, "shvit_s1": factors})
    code, out, _ = vitnas("bench", "efficientvit_m0", "shvit_s1")
    assert code == 0
    first, second = out.splitlines()[2:4]
    assert "tie" not in first
    assert second.rstrip().endswith("tie") is tie
    found = bench(options("efficientvit_m0", "shvit_s1"))
    assert not is_tie(found.rows[0], found.rows[0])
    assert is_tie(found.rows[1], found.rows[0]) is tie


def test_csv_and_plots(given) -> None:
    labels = [f"{'a folder with a rather long name/' * (i % 2)}network {i}" for i in range(8)]
    labels[7] = "caf\udce9"  # of bytes that are not UTF-8
    given({label: [1 + i / 10] * 6 for i, label in enumerate(labels)})
    found = bench(options(*labels, settings=(Settings(), Settings(batch_size=8))))
    lines = list(csv.DictReader(to_csv(found.rows).decode(errors="surrogateescape").splitlines()))
    assert [line["model"] for line in lines] == labels * 2
    assert list(lines[1]) == list(report.COLUMNS)
    assert (lines[1]["model"], float(lines[1]["ratio_high"]), lines[1]["ci_low_ms"]) == (labels[1], 1.1, "1.1")
    assert to_plot(found.rows, ".png").startswith(b"\x89PNG")
    assert b"<svg" in to_plot(found.rows, ".svg")
    assert to_plot(found.rows, ".pdf").startswith(b"%PDF")


# --- resolutions ---


def test_every_kind_of_network_at_another_resolution(vitnas, given, onnx_file, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx_file(images=["N", 3, "H", "W"])
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "arch.json").write_text(find_arch("levit_128s").to_json())
    (tmp_path / "run@2").mkdir()
    (tmp_path / "run@2" / "arch.json").write_text(find_arch("levit_128s").at(96).to_json())
    words = ["shvit_s1@64", "run@64", "run/best/arch.json@64", "timm/test_vit@64", "mine.onnx@64", "run@2"]
    given(dict.fromkeys(words, [1.0] * 6))
    code, out, _ = vitnas("bench", *words, "--json")
    found = json.loads(out)
    assert code == 0
    assert [(row["model"], row["resolution"]) for row in found["results"]] == [
        *((word, 64) for word in words[:5]),
        ("run@2", 96),
    ]
    assert found["notes"][-1:] == ["run@2 runs at 96 px, the others at 64 px: add @64."]


def test_resolution_of_all_that_have_none_of_their_own(vitnas, given, onnx_file, tmp_path: Path) -> None:
    path, table = onnx_file(images=["N", "H", "W", 3]), tmp_path / "bench.csv"
    given({name: [1.0] * 6 for name in ("levit_128s@128", "timm/test_vit", path)})
    words = ("levit_128s@128", "timm/test_vit", path, "--resolution", "96")
    code, out, _ = vitnas("bench", *words, "--csv", str(table))
    assert code == 0
    assert [row["resolution"] for row in csv.DictReader(table.read_text().splitlines())] == ["128", "96", "96"]
    assert f"timm/test_vit and {path} run at 96 px, levit_128s@128 at 128 px." in out
    assert out.splitlines()[1].split()[:2] == ["network", "px"]


def test_networks_of_one_resolution_have_it_above_the_table(vitnas, given) -> None:
    given({name: [1.0] * 6 for name in ("levit_128s", "timm/test_vit@224")})
    _, out, _ = vitnas("bench", "levit_128s", "timm/test_vit@224", "--threads", "1")
    assert out.startswith("One interleaved run: 224 px, onnxruntime, cpu, fp32, batch 1, 1 thread.\n")
    assert "px" not in out.splitlines()[1]


def test_a_timm_network_beside_small_ones_is_told(given) -> None:
    given({name: [1.0] * 6 for name in ("levit_128s@64", "shvit_s1@64", "timm/test_vit", "timm/lcnet_050")})
    targets = [find_target(name) for name in ("levit_128s@64", "shvit_s1@64", "timm/test_vit", "timm/lcnet_050")]
    notes = bench(BenchRequest(targets, (Settings(),))).notes
    assert notes == ["timm/test_vit runs at 160 px, timm/lcnet_050 runs at 224 px, the others at 64 px: add @64."]


def test_a_run_trained_at_another_resolution_is_told(given, tmp_path: Path) -> None:
    (tmp_path / "arch.json").write_text(find_arch("levit_128s").at(64).to_json())
    (tmp_path / "model.safetensors").touch()
    label = f"{tmp_path}@96"
    given({label: [1.0] * 6})
    target = find_target(label)
    assert bench(BenchRequest([target], (Settings(),))).notes == [f"{label}: trained at 64 px, measured at 96 px."]
    with pytest.raises(UserError, match=f"trained at 64 px: `vitnas train {tmp_path} --weights .* --resolution 96`"):
        _ = target.weights
    assert target.as_trained().arch.resolution == 64
    assert target.as_trained().weights == tmp_path / "model.safetensors"
    assert find_target(f"{tmp_path}@64").weights == tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("shvit_s1@", ("shvit_s1@64",)),
        ("shvit_s1@abc", ("shvit_s1@64",)),
        ("shvit_s1@0", ("shvit_s1@64",)),
        ("@64", ("levit_128s@64",)),
        ("shvit_s9@64", ("unknown model 'shvit_s9'",)),
        ("shvit_s1@8", ("16 to 512 px, not 8",)),
        ("shvit_s1@600", ("16 to 512 px, not 600",)),
        ("shvit_s1@99999", ("1 to 4096 px",)),
        ("deit_tiny@100", ("patch_size 16", "96 px and 128 px work")),
        ("sepvit_lite@50", ("cannot be cut", "32 px and 64 px work")),
        ("timm/test_vit@100", ("cannot take images of 100 px", "96 px and 128 px work")),
        ("timm/nothing@64", ("no network 'nothing'",)),
        ("none/run@64", ("none/run: no such file or folder",)),
        ("me@host/mine.onnx", ("me@host/mine.onnx: no such file",)),
    ],
)
def test_resolutions_that_are_refused(vitnas, given, word: str, said: tuple[str, ...]) -> None:
    given({})
    vitnas.refused(vitnas("bench", word), *said)


@pytest.mark.parametrize(
    ("sizes", "words", "said"),
    [
        (["N", 3, 8, 8], ("{path}@64",), ("fixed at ?x3x8x8", "cannot take 64 px", "dynamic sizes")),
        (["N", 3, 8, 8], ("{path}", "--resolution", "64"), ("fixed at ?x3x8x8", "leave out its resolution")),
        (["N", "T"], ("{path}@64",), ("takes no images", "?x?")),
        (["N", 3, "H", "W"], ("{path}@64", "--shape", "images=1x3x32x32"), ("--shape images=1x3x32x32", "64 px")),
    ],
)
def test_resolutions_of_onnx_files_that_are_refused(vitnas, given, onnx_file, sizes, words, said) -> None:
    given({})
    path = onnx_file(images=sizes)
    vitnas.refused(vitnas("bench", *(word.format(path=path) for word in words)), *said)


def test_images_that_are_not_square(onnx_file, given) -> None:
    path, words = onnx_file(images=[1, 3, 8, 16]), onnx_file("words.onnx", images=[1, 7])
    given({path: [1.0] * 6, words: [1.0] * 6})
    found = bench(BenchRequest([find_target(path), find_target(words)], (Settings(),), own_batch=True))
    assert [row.resolution for row in found.rows] == ["8x16", None]
    assert found.notes == []


def test_timm_networks_of_fixed_size_are_built_for_another(exports_here) -> None:
    from nas.networks.build import build

    network = find_target("timm/vit_tiny_patch16_224@64").timm
    assert network.resolution == 64
    assert build(network).pos_embed.shape[1] == 17


# --- a busy machine ---


def test_waiting_times_have_no_ratio(vitnas, given, monkeypatch: pytest.MonkeyPatch) -> None:
    given({})
    waiting = Measurement([[1.0, 8.0, 8.0]] * 6)
    told = {"0": Measurement([[2.0] * 3] * 6), "1": waiting, "2": Measurement([[3.0] * 3] * 6)}
    monkeypatch.setattr(side_by_side, "compare", lambda *_: told)
    _, out, _ = vitnas("bench", "efficientvit_m0", "shvit_s1", "levit_128s", "--json")
    found = json.loads(out)
    assert [(row["waiting"], row["ratio"]) for row in found["results"]] == [(False, 1), (True, None), (False, 1.5)]
    assert [row["throughput"] is None for row in found["results"]] == [False, True, False]
    assert "so the figures marked waiting are waiting times, not speed" in found["notes"][0]
    _, out, _ = vitnas("bench", "efficientvit_m0", "shvit_s1", "levit_128s")
    assert out.splitlines()[1].split()[-1] == "note"
    assert out.splitlines()[3].split()[-1] == "waiting"
    assert "A ratio is the median over rounds of the ratio within a round." in out
    assert "tie" not in out
    assert "busy: the rounds" not in out
    told["0"] = waiting
    rows = bench(options("a", "b", "c")).rows
    assert [row.ratio for row in rows] == [None] * 3
    assert [line["ratio"] for line in csv.DictReader(to_csv(rows).decode().splitlines())] == [""] * 3
    assert b"<svg" in to_plot(rows, ".svg")


# --- the table ---


def test_nothing_is_said_of_ratios_or_speed_that_are_not_printed(given, capsys) -> None:
    from nas.bench.table import show_bench

    given({"a": [1.0] * 6, "b": [2.0] * 6})
    rows = bench(options("a", "b", throughput_at=8)).rows
    show_bench(rows, [])
    assert "ratio to the first row" in capsys.readouterr().out
    show_bench([replace(row, waiting=True, ratio=None, ratio_ci=None, throughput=None) for row in rows], [])
    out = capsys.readouterr().out
    assert "ratio" not in out
    assert "img/s" not in out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_figure_is_cut_in_a_narrow_terminal(given, monkeypatch, capsys, width: int) -> None:
    from rich.console import Console

    from nas.bench import table as bench_table

    labels = ["runs/cpu-onnxruntime-1.5ms-all-224px-flowers", "timm/mobilenetv3_large_100.ra_in1k"]
    given({label: [1234.567] * 6 for label in labels})
    settings = tuple(
        Settings(runtime, precision=kind) for runtime in ("onnxruntime", "openvino") for kind in ("fp32", "int8")
    )
    rows = bench(options(*labels, settings=settings, throughput_at=64)).rows
    console = Console(width=width, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(bench_table, "console_of", lambda: console)
    bench_table.show_bench(rows, ["a note " * 20])
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= max(width, 79)
    assert out.count("1234.567") >= 8
    assert "cpu" in out.splitlines()[0]


# --- ONNX files ---


@pytest.mark.parametrize(
    ("sizes", "more", "batches"),
    [
        (["N", 3, 8, 8], {"own_batch": True}, [1]),
        (["N", 3, 8, 8], {"settings": (Settings(batch_size=2), Settings(batch_size=8))}, [2, 8]),
        ([4, 3, 8, 8], {"own_batch": True}, [4]),
        ([4, 3, 8, 8], {"settings": (Settings(batch_size=4),)}, [4]),
        (["N", 3, "H", "W"], {"own_batch": True, "shapes": {"images": (2, 3, 8, 8)}}, [2]),
        (["N", 3, "H", "W"], {"settings": (Settings(batch_size=4),), "shapes": {"images": (1, 3, 8, 8)}}, [4]),
        (["N", 3, 8, 8], {"own_batch": True, "throughput_at": 16}, [1, 16]),
    ],
)
def test_batch_of_an_onnx_file(onnx_file, given, sizes: list, more: dict, batches: list[int]) -> None:
    path = onnx_file(images=sizes)
    asked = given({path: [1.0] * 6})
    found = bench(replace(BenchRequest([find_target(path)], (Settings(),)), **more))
    assert [each.batch_size for _, each in asked] == batches
    assert [row.batch_size for row in found.rows] == (batches if "throughput_at" not in more else [1])


@pytest.mark.usefixtures("fixed_here")
def test_the_file_that_is_measured_has_the_shape(onnx_file, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    shapes = []

    def compare(paths, settings, *_):
        for name, path in paths.items():
            (image,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()
            shapes.append((settings[name].batch_size, image.name, image.shape))
        return dict.fromkeys(paths, Measurement([[1.0]] * 3))

    monkeypatch.setattr(side_by_side, "compare", compare)
    path = onnx_file(**{"in/put": ["N", 3, "H", "W"]})
    settings = (Settings(batch_size=2), Settings(batch_size=2, threads=2), Settings(batch_size=4))
    bench(BenchRequest([find_target(path)], settings, shapes={"in/put": (1, 3, 16, 8)}))
    assert shapes == [(2, "in/put", [2, 3, 16, 8])] * 2 + [(4, "in/put", [4, 3, 16, 8])]
    assert OnnxInput.read(Path(path)).sizes == (None, 3, None, None)  # the user's own file is as it was
    path = onnx_file(images=None)
    bench(BenchRequest([find_target(path)], (Settings(batch_size=2),), shapes={"images": (1, 3, 16, 8)}))
    assert shapes[-1] == (2, "images", [2, 3, 16, 8])


@pytest.mark.parametrize(
    ("inputs", "words", "said"),
    [
        ({"x": ["N", 3, "H", None]}, (), ("x is ?x3x?x?", "--shape x=1x3x224x224")),
        ({"x": [2, "T"]}, (), ("--shape x=2x128",)),
        ({"x": None}, (), ("x is of any shape", "--shape x=1x3x224x224")),
        ({"x": []}, (), ("one input", "x (float32 without dimensions)")),
        ({"x": ["N", 3, 8, 8], "mask": [1, 8]}, (), ("one input", "x (float32 ?x3x8x8), mask (float32 1x8)")),
        ({"x": ["N", 3, 8, 8]}, ("--shape", "y=1x3x8x8"), ("--shape y", "x")),
        ({"x": ["N", 3, 8, 8]}, ("--shape", "x=1x3x16x16"), ("--shape x=1x3x16x16", "?x3x8x8")),
        ({"x": ["N", 3, 8, 8]}, ("--shape", "x=1x3x8"), ("--shape x=1x3x8", "?x3x8x8")),
        (
            {"x": ["N", 3, "H", "W"]},
            ("--shape", "x=1x3x8x8", "--shape", "x=1x3x16x16"),
            ("--shape x=1x3x16x16: it is 1x3x8x8 already",),
        ),
        ({"x": ["N", 3, 8, 8]}, ("--shape", "1x3x8"), ("--shape 1x3x8", "images=1x3x224x224")),
        ({"x": ["N", 3, 8, 8]}, ("--shape", "x=0x3x8x8"), ("--shape x=0x3x8x8", "images=1x3x224x224")),
        ({"x": [4, 3, 8, 8]}, ("--batch-size", "4", "--batch-size", "1"), ("fixed at batch size 4", "--batch-size 1")),
        ({"x": [4, 3, 8, 8]}, ("--throughput-at", "8"), ("fixed at batch size 4", "--throughput-at 8")),
        ({"x": ["N", 3, 8, 8]}, ("--runtime", "torch"), ("runtime torch does not load ONNX", "onnxruntime")),
        ({"x": ["N", 1, 8, 8]}, ("--precision", "int8", "--data", "{data}"), ("takes 1x8x8", "--data")),
    ],
)
def test_onnx_files_that_are_refused(vitnas, onnx_file, given, tmp_path, inputs, words, said) -> None:
    monkeyed = given({})
    words = [word.format(data=tmp_path) for word in words]
    vitnas.refused(vitnas("bench", onnx_file(**inputs), *words), *said)
    assert monkeyed == []


def test_an_onnx_file_of_integers_is_refused(vitnas, onnx_file) -> None:
    vitnas.refused(vitnas("bench", onnx_file(kind="INT64", ids=[1, 128])), "mine.onnx", "ids (int64 1x128)")


@pytest.mark.usefixtures("fixed_here")
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("kind", "dtype"), [("UINT8", "uint8"), ("FLOAT16", "float16")])
def test_inputs_of_other_types_are_measured(onnx_file, monkeypatch, runtime: str, kind: str, dtype: str) -> None:
    from nas.measure.runtime import RUNTIMES
    from nas.measure.runtimes.ort import check_static

    pytest.importorskip(runtime)
    checked = []
    monkeypatch.setattr(
        f"nas.measure.runtimes.{'ort' if runtime == 'onnxruntime' else runtime}.check_static",
        lambda *args: checked.append(check_static(*args)) or checked[-1],
    )

    def compare(paths, settings, *_):
        for name, path in paths.items():
            logits = RUNTIMES[runtime].load(path, settings[name])()
            assert np.isfinite(logits).all()
            assert abs(logits).max() > 0
        return dict.fromkeys(paths, Measurement([[1.0]] * 6))

    monkeypatch.setattr(side_by_side, "compare", compare)
    target = find_target(onnx_file(kind=kind, images=[1, 3, 8, 8]))
    found = bench(BenchRequest([target], (Settings(runtime), Settings(runtime, precision="int8"))))
    assert found.errors == []
    assert checked == [("images", dtype, (1, 3, 8, 8))] * 2


def test_images_of_data_are_not_for_inputs_of_bytes(vitnas, onnx_file, given, tmp_path: Path) -> None:
    given({})
    path = onnx_file(kind="UINT8", images=[1, 3, 8, 8])
    result = vitnas("bench", path, "--precision", "int8", "--data", str(tmp_path))
    vitnas.refused(result, "takes uint8", "leave --data out")


def test_weights_of_float16_are_told(onnx_file, given) -> None:
    path = onnx_file()
    given({path: [1.0] * 6})

    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float16), "more"))
    onnx.save(model, path)
    (note,) = bench(BenchRequest([find_target(path)], (Settings(),))).notes
    assert note.startswith(f"{path} holds weights of float16")


def test_what_is_made_for_batch_1_inside_is_told(onnx_file, given) -> None:
    path = onnx_file()
    given({path: "Fail: while running Reshape node. Name:'' Status Message: cannot be reshaped"})
    errors = bench(BenchRequest([find_target(path)], (Settings(batch_size=2),))).errors
    said = "its Reshape node does not run: cannot be reshaped; it may be made for batch 1 inside: leave out batch 2"
    assert errors == [f"{path}: {said}"]
    (error,) = bench(BenchRequest([find_target(path)], (Settings(),))).errors
    assert "made for batch" not in error


def test_a_damaged_file_is_refused_before_the_device_is_waited_for(vitnas, tmp_path: Path, monkeypatch) -> None:
    def lock(_: str) -> None:
        pytest.fail("waited for the device")

    monkeypatch.setattr("nas.measure.device.device_lock", lock)
    for content, said in (
        (b"\x08\x08broken", "damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "a web page"),
    ):
        (tmp_path / "broken.onnx").write_bytes(content)
        vitnas.refused(vitnas("bench", "efficientvit_m0", str(tmp_path / "broken.onnx")), "broken.onnx", said)


@pytest.mark.parametrize(("held", "said"), [(None, "not there"), (3, "cut off, 3 of 432 bytes")])
def test_weights_beside_the_file_that_are_not_all_there(vitnas, onnx_file, given, held, said: str) -> None:

    given({})
    path = Path(onnx_file())
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    data = path.parent / "weights.bin"
    whole = data.read_bytes()
    data.unlink()
    if held is not None:
        data.write_bytes(whole[:held])
    vitnas.refused(vitnas("bench", str(path)), "weights.bin", said)


def test_a_file_without_outputs(vitnas, onnx_file, given) -> None:

    given({})
    path = onnx_file()
    model = onnx.load(path)
    del model.graph.output[:]
    onnx.save(model, path)
    vitnas.refused(vitnas("bench", path), "holds no network: 4 nodes, 1 input, 0 outputs")


def test_a_file_of_an_unknown_type(vitnas, onnx_file, given) -> None:
    given({})
    path = onnx_file()
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = 999
    Path(path).write_bytes(model.SerializeToString())
    vitnas.refused(vitnas("bench", path), "only networks of one input", "(type 999 ")


def test_a_name_that_is_no_text(vitnas, onnx_file, given) -> None:
    given({})
    path = Path(onnx_file())
    path.write_bytes(path.read_bytes().replace(b"images", b"im\xff\xfees"))
    vitnas.refused(vitnas("bench", str(path)), "mine.onnx is damaged: the name of its input is no text")


@pytest.mark.parametrize("kind", ["sequence", "optional"])
def test_an_input_that_is_no_tensor(vitnas, onnx_file, given, kind: str) -> None:
    given({})
    path = onnx_file()
    model = onnx.load(path)
    tensor = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [1, 3, 8, 8])
    made = {"sequence": onnx.helper.make_sequence_type_proto, "optional": onnx.helper.make_optional_type_proto}[kind]
    model.graph.input[0].CopyFrom(onnx.helper.make_value_info("images", made(tensor)))
    onnx.save(model, path)
    vitnas.refused(vitnas("bench", path), "only networks of one input", f"images ({kind} of any shape)")


def test_sparse_weights_that_are_inputs_too(onnx_file) -> None:
    path = onnx_file(images=[1, 3, 8, 8], weight=[4, 3, 3, 3])
    model = onnx.load(path)
    del model.graph.initializer[0]
    values = onnx.numpy_helper.from_array(np.ones(1, np.float32), "weight")
    places = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "places")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, places, [4, 3, 3, 3]))
    onnx.save(model, path)
    assert OnnxInput.read(Path(path)).name == "images"


def test_an_old_onnx_file_in_int8_is_refused(vitnas, onnx_file, given) -> None:
    asked = given({})
    vitnas.refused(vitnas("bench", onnx_file(opset=7), "--precision", "int8"), "mine.onnx is of opset 7", "needs 13")
    assert asked == []


@pytest.mark.usefixtures("fixed_here")
def test_int8_of_a_file_whose_weights_are_inputs_too(onnx_file, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "compare", lambda paths, *_: dict.fromkeys(paths, Measurement([[1.0]] * 6)))
    path = onnx_file(images=[1, 3, 8, 8], weight=[4, 3, 3, 3])
    assert bench(BenchRequest([find_target(path)], (Settings(precision="int8"),))).errors == []


def test_the_suffix_may_be_in_capitals(onnx_file) -> None:
    assert find_target(onnx_file("MINE.ONNX")).onnx is not None


@pytest.mark.parametrize(
    ("name", "content"), [("model.pth", b"PK\3\4"), ("m.tflite", b"\x1c\0\0\0TFL3"), ("empty", b"")]
)
def test_files_that_hold_no_network(vitnas, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    vitnas.refused(vitnas("bench", str(tmp_path / name)), f"{name} holds no network", "timm/NAME", ".onnx")


def test_an_arch_needs_no_suffix(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text(f"\n{find_arch('efficientvit_m0').to_json()}")
    assert find_arch(str(tmp_path / "mine")) == find_arch("efficientvit_m0")


@pytest.mark.parametrize("content", [b"", b"not a network", bytes(range(256))])
def test_a_file_that_is_no_onnx(vitnas, onnx_file, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.onnx").write_bytes(content)
    vitnas.refused(vitnas("bench", onnx_file(), str(tmp_path / "broken.onnx")), "broken.onnx")


def test_the_network_is_not_overwritten(vitnas, onnx_file) -> None:
    path = onnx_file()
    vitnas.refused(vitnas("bench", path, "--csv", path), "--csv", "would overwrite what is read: name another file")


def test_parse_shape() -> None:
    assert parse_shape("a=b=1x3x224x200") == ("a=b", (1, 3, 224, 200))
    assert parse_shape("x=7") == ("x", (7,))
    for text in ("x=", "=1", "x=1x", "x=1X3", "x=-1x3", "x=Nx3"):
        with pytest.raises(UserError, match="write it like"):
            parse_shape(text)


# --- bad input ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch-size", "0"), ("batch size is 0",)),
        (("--batch-size", "1", "--batch-size", "-1"), ("batch size is -1",)),
        (("--throughput-at", "0"), ("batch size is 0",)),
        (("--throughput-at", "100000000"), ("memory",)),
        (("--threads", "1", "--threads", "4096"), ("threads is 4096",)),
        (("--resolution", "0"), ("a resolution of 0 px", "1 to 4096 px")),
        (("--rounds", "5"), ("--rounds is 5", "6 or more")),
        (("--timeout", "soon"), ("timeout 'soon'", "90s")),
        (("--runtime", "onnxruntime", "--runtime", "onxruntime"), ("unknown runtime", "onnxruntime")),
        (("--precision", "fp32", "--precision", "fp31"), ("unknown precision", "fp32")),
        (("--runtime", "onnxruntime", "--runtime", "torch", "--precision", "int8"), ("runtime torch", "int8")),
        (("--device", "tpu"), ("unknown device",)),
        (("--data", "{folder}"), ("--data", "--precision int8")),
        (("--precision", "int8", "--data", "{folder}/none"), ("none",)),
        (("--shape", "images=1x3x8x8"), ("--shape images", "no .onnx file")),
        (("--csv", "{folder}/none/table.csv"), ("--csv", "No such file or directory")),
        (("--csv", "{folder}"), ("--csv", "is a folder")),
        (("--plot", "{folder}/plot.gif"), ("--plot", ".png, .svg, .pdf")),
        (("--plot", "/proc/plot.png"), ("--plot", "/proc/plot.png")),
        (("timm/lcnet_75",), ("no network 'lcnet_75'", "timm/lcnet_075")),
        (("timm/resnet18.none",), ("'none'", "timm/resnet18")),
        (("efficientvit_m9",), ("efficientvit_m",)),
        (("{folder}/none.onnx",), ("none.onnx", "no such file")),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(vitnas, given, tmp_path: Path, words, said) -> None:
    asked = given({"efficientvit_m0": [1.0] * 6})
    words = [word.format(folder=tmp_path) for word in words]
    vitnas.refused(vitnas("bench", "efficientvit_m0", *words), *said)
    assert asked == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("efficientvit_m0",), "leave out networks"),
        (("--max-drop", "3"), "leave out --max-drop"),
        (("--throughput-at", "0"), "leave out --throughput-at"),
        (("--threads", "1", "--threads", "2"), "--threads can be given once"),
    ],
)
def test_what_a_suite_does_not_take(vitnas, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str) -> None:
    monkeypatch.setattr("nas.cli.bench.run_suite", lambda *_: None)
    vitnas.refused(vitnas("bench", "--suite", "papers", *words), said)


def test_a_full_disk_leaves_no_half_file(vitnas, given, tmp_path: Path, fill_disk: Callable[[], None]) -> None:
    given({"efficientvit_m0": [1.0] * 6})
    table = tmp_path / "bench.csv"
    table.write_text("old")
    fill_disk()
    code, _, err = vitnas("bench", "efficientvit_m0", "--csv", str(table))
    assert (code, len(failures(err))) == (1, 1)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("bench.csv", "old")]


def test_check_output_leaves_nothing(tmp_path: Path) -> None:
    check_output("--csv", tmp_path / "table.csv")
    check_output("--plot", tmp_path / "plot.svg", report.PLOTS)
    assert list(tmp_path.iterdir()) == []


def test_timm_targets() -> None:
    assert find_target("timm/efficientnet_b2").timm == TimmNetwork("efficientnet_b2", 256)  # timm's input_size
    assert TimmNetwork("lcnet_050").resolution == 224
    assert TimmNetwork("lcnet_050", 96).resolution == 96
    with pytest.raises(UserError, match="one of timm's networks"):
        find_arch("timm/lcnet_050")
    with pytest.raises(UserError, match="square"):
        TimmNetwork("vit_base_patch16_sapiens2")


def test_help_has_examples(vitnas) -> None:
    _, out, _ = vitnas("bench", "--help")
    assert out.count("Example:  vitnas bench ") == 3
