"""Files of every option: what they take and give on ONNX Runtime and OpenVINO, and what they say of themselves."""

from __future__ import annotations

import itertools
import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from nas.data.pixels import IMAGENET, Pixels
from nas.errors import UserError
from nas.evaluate.onnx_file import OnnxFile
from nas.export.agreement import agreement, logits_of
from nas.export.artifact import lower_precision
from nas.export.card import CLASSIFY, Accuracy, Card, Latency, Preprocess, load_onnx
from nas.export.folder import save_model, save_onnx, save_weights
from nas.export.graph import to_half
from nas.export.onnx import label_onnx, to_file, to_onnx
from nas.export.options import OPSETS, PLAIN, FileOptions
from nas.export.pictures import CROPS, from_bytes, photographs, to_bytes
from nas.measure.runtime import Settings
from nas.networks.build import build
from nas.prune.request import PruneRequest, parse_pruning_budget
from nas.search.best import save_best
from search_spaces import create_model
from search_spaces import tokens as token_choice
from search_spaces.registry import FAMILIES

PIXELS = Pixels((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bilinear", 1.0)
SIZE = 16
RICH = FileOptions(None, True, OPSETS[-1], True, "fp16")
FEW = [FileOptions(), FileOptions(batch_size=3), FileOptions(precision="fp16"), RICH]
MANY = [
    *FEW,
    *(FileOptions(opset=opset) for opset in OPSETS),
    FileOptions(None, True, OPSETS[0], True),
    *(
        FileOptions(*each)
        for each in itertools.product((1, None), (False, True), (17,), (False, True), ("fp32", "fp16"))
    ),
]
"""The product of all, but for the opsets: those alone, and the first and the last with everything."""
ENDS = (OPSETS[0], FileOptions().opset, OPSETS[-1])


class Convolutions(nn.Module):
    """(B, 3, 16, 16) -> (B, 5), with normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)
        self.norm = nn.GroupNorm(1, 8)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.norm(self.first(x).relu()).mean((2, 3)) * 4)
        return logits


class Tokens(nn.Module):
    """(B, 3, 16, 16) -> (B, 5): attention over 16 tokens, of which half are worked on."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.qkv, self.last = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.patches(x).flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).chunk(3, dim=2)
        mixed = tokens + (q @ k.transpose(1, 2)).softmax(2) @ v
        chosen = token_choice.on_strongest(mixed, 8, lambda rows: rows.tanh())
        logits: Tensor = self.last(chosen.mean(1) * 4)
        return logits


def alike(options: FileOptions) -> bool:
    """Whether they are some of the choices that others make alone, or all together: a slow test."""
    plain = asdict(FileOptions())
    chosen = [name for name, value in asdict(options).items() if value != plain[name]]
    return options not in FEW and options.opset != OPSETS[0] and (len(chosen) > 1 or options.opset not in ENDS)


def named(options: FileOptions) -> str:
    """How a test of these is called."""
    return "-".join(str(each) for each in asdict(options).values())


def create(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def written(network: nn.Module, path: Path, options: FileOptions, size: int = SIZE) -> Card:
    """The network's file; returns what it says of itself."""
    card = Card(preprocess=Preprocess.own(size, PIXELS), classes=list("abcde")).of_file(options)
    to_file(network, path, size, options, PIXELS)
    label_onnx(path, None, trained=True, card=card)
    return card


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, each, marks=[pytest.mark.slow] if alike(each) else [])
        for kind, some in ((Convolutions, FEW), (Tokens, MANY))
        for each in dict.fromkeys(some)
    ],
    ids=lambda each: named(each) if isinstance(each, FileOptions) else each.__name__,
)
def test_every_file_answers_as_pytorch_on_both_runtimes(
    kind: type[nn.Module], options: FileOptions, tmp_path: Path
) -> None:
    network, path = create(kind), tmp_path / "model.onnx"
    card = written(network, path, options)
    found = agreement(network, path, SIZE, options, pixels=PIXELS)
    assert found.difference < (3e-2 if options.precision == "fp16" else 1e-5)
    assert (found.real, found.made, found.left_out) == (CROPS, 8 if options.batch_size != 3 else 9, 0)
    assert load_onnx(path).opset_import[0].version == options.opset
    pictures = [Image.fromarray(each) for each in to_bytes(photographs(SIZE, PIXELS)[:5], PIXELS)]
    values = np.stack([np.array(each) for each in pictures])
    wanted = torch.from_numpy(logits_of(network, torch.from_numpy(from_bytes(values, PIXELS))))
    for runtime in ("onnxruntime", "openvino") if options.opset in ENDS else ("onnxruntime",):
        file = OnnxFile.open(path, runtime, threads=1)
        assert (file.batch_size, file.precision) == (options.batch_size, options.precision)
        assert (file.preprocess, file.in_graph, file.probabilities) == (
            card.preprocess,
            options.in_graph,
            options.probabilities,
        )
        fed = np.stack([file.pixels(each) for each in pictures])
        assert (fed.dtype == np.uint8) == options.in_graph
        answers = torch.from_numpy(file.softmax(fed))
        assert abs(answers - wanted.softmax(1)).max() < (2e-2 if options.precision == "fp16" else 1e-5), runtime


@pytest.mark.parametrize("measured", [False, True])
def test_fp16_is_half_as_large_and_scores_tokens_in_float32(tmp_path: Path, measured: bool) -> None:
    """Exported, and as searches and prunings measure it, whose input is of float16 too."""
    path, network = tmp_path / "model.onnx", create(Tokens)
    to_onnx(network, path, SIZE, 1)
    if measured:
        lower_precision(path, Settings(precision="fp16"))
    else:
        to_half(path)
    graph = onnx.shape_inference.infer_shapes(load_onnx(path)).graph
    assert (graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16) == measured
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    (choice,) = [node for node in graph.node if node.op_type == "TopK"]
    assert kinds[choice.input[0]] == onnx.TensorProto.FLOAT
    products = [node for node in graph.node if node.op_type in ("MatMul", "Conv", "Gemm")]
    assert len(products) > 4
    assert all(kinds.get(node.output[0], onnx.TensorProto.FLOAT16) == onnx.TensorProto.FLOAT16 for node in products)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param(
            family,
            options,
            marks=[pytest.mark.slow] if options == RICH and family not in ("levit", "sepvit") else [],
            id=f"{family}-{'rich' if options == RICH else 'plain'}",
        )
        for family in FAMILIES
        for options in (FileOptions(), RICH)
    ],
)
def test_every_family_s_file_answers_as_pytorch(
    family: str, options: FileOptions, tmp_path: Path, helpers: Any
) -> None:
    """Of random widths, with tokens dropped."""
    arch, path = helpers.random_arch(family, 0), tmp_path / "model.onnx"
    network, size = build(arch), arch.resolution
    written(network, path, options, size)
    if (family, options) == ("sepvit", RICH):  # irregular, with more choices of tokens than a network that is of use
        with pytest.raises(
            UserError, match=r"^in fp16 a logit differs by more than 3% of the largest on \d+ of 40 images, where"
        ):
            agreement(network, path, size, options, pixels=PIXELS)
        options = replace(RICH, precision="fp32")
        written(network, path, options, size)
    agreement(network, path, size, options, pixels=PIXELS)
    given = photographs(size, PIXELS)[:1]
    wanted = torch.from_numpy(logits_of(network, torch.from_numpy(given))).softmax(1)
    for runtime in ("onnxruntime", "openvino"):
        file = OnnxFile.open(path, runtime, threads=1)
        answers = file.softmax(file.pixels(Image.fromarray(to_bytes(given, PIXELS)[0]))[None])
        assert abs(torch.from_numpy(answers) - wanted).max() < (2e-2 if options == RICH else 1e-5), runtime


class Shifted(nn.Module):
    """Logits 1e-3 beside the network's, of the largest."""

    def __init__(self, network: nn.Module, shift: float) -> None:
        super().__init__()
        self.network, self.shift = network, shift

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits + self.shift * logits.detach().abs().amax() * torch.arange(5) / 4


class Rough(Shifted):
    """Rounded by PyTorch in float32, exact in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dtype == torch.float32 else self.network(x)


@pytest.mark.parametrize(("share", "agrees"), [(3e-4, True), (3e-3, False)])
def test_a_network_that_pytorch_itself_rounds_much_may_differ_as_much_and_no_more(
    share: float, agrees: bool, tmp_path: Path
) -> None:
    network, path = create(Convolutions), tmp_path / "model.onnx"
    written(network, path, PLAIN)
    with nullcontext() if agrees else pytest.raises(UserError, match="disagrees with PyTorch by"):
        assert agreement(Rough(network, share), path, SIZE).difference > share / 3


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize(("precision", "borne", "refused"), [("fp32", 5e-5, 3e-4), ("fp16", 1e-2, 8e-2)])
def test_the_check_sees_what_a_precision_does_not_bear(
    precision: str, borne: float, refused: float, probabilities: bool, tmp_path: Path
) -> None:
    network, path = create(Convolutions), tmp_path / "model.onnx"
    options = FileOptions(probabilities=probabilities, precision=precision)  # type: ignore[arg-type]
    written(network, path, options)
    assert agreement(Shifted(network, borne), path, SIZE, options).difference > borne / 3
    with pytest.raises(UserError, match="disagrees with PyTorch by") as error:
        agreement(Shifted(network, refused), path, SIZE, options)
    assert ("leave out --precision fp16" in str(error.value)) == (precision == "fp16")


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    network, path = create(Convolutions), tmp_path / "model.onnx"
    with torch.no_grad():
        network.first.weight *= 2e5
    written(network, path, FileOptions())
    agreement(network, path, SIZE)
    options = FileOptions(precision="fp16")
    written(network, path, options)
    line = r"^float16 ends at 65,504, and \d+ values of this network pass it, the first /first/Conv_output_0: leave out"
    with pytest.raises(UserError, match=line):
        agreement(network, path, SIZE, options)


def test_a_changed_class_is_counted(tmp_path: Path) -> None:
    """Two logits that are all but equal."""
    network, path = create(Convolutions), tmp_path / "model.onnx"
    with torch.no_grad():
        network.last.weight[1] = network.last.weight[0]
        network.last.bias[:2] = torch.tensor([9.0, 9.00001])
    written(network, path, FileOptions())
    with torch.no_grad():
        network.last.bias[0] = 9.00002
    found = agreement(network, path, SIZE)
    assert found.changed == CROPS
    assert str(found).endswith(
        f"of the largest logit on {CROPS} photographs and 8 images of noise; top-1 changed on 32 of 32"
    )


def test_given_images_are_compared(tmp_path: Path) -> None:
    network, path = create(Convolutions), tmp_path / "model.onnx"
    written(network, path, FileOptions(in_graph=True))
    images = photographs(32, PIXELS)[:7]
    found = agreement(network, path, SIZE, FileOptions(in_graph=True), images, PIXELS)
    assert (found.real, found.made, found.source) == (7, 8, "images of the data")
    with pytest.raises(UserError, match="disagrees with PyTorch"):
        agreement(network, path, SIZE, FileOptions(in_graph=True), images, IMAGENET)


def test_bytes_and_back() -> None:
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert (to_bytes(from_bytes(values, PIXELS), PIXELS) == values).all()
    wanted = torch.from_numpy(values).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (PIXELS.mean, PIXELS.std))
    assert (torch.from_numpy(from_bytes(values, PIXELS)) == (wanted - mean) / std).all()
    assert to_bytes(np.full((1, 3, 2, 2), 99, np.float32), PIXELS).max() == 255


def test_the_photographs_differ() -> None:
    found = photographs(SIZE, IMAGENET)
    assert found.shape == (CROPS, 3, SIZE, SIZE)
    assert len({each.tobytes() for each in found}) == CROPS
    assert (found == photographs(SIZE, IMAGENET)).all()


@pytest.mark.parametrize("options", [FileOptions(), RICH], ids=["plain", "rich"])
def test_a_card_tells_what_is_true_of_its_file(options: FileOptions) -> None:
    latency = Latency(
        ms=1, ci=(0.9, 1.1), device="cpu", runtime="onnxruntime", precision="fp32", threads=1, batch_size=1
    )
    whole = Card(
        preprocess=Preprocess.own(SIZE, PIXELS),
        accuracy=Accuracy.counted(50, 10, "images"),
        latency=latency,
        in_graph=True,
        probabilities=True,
    )
    card = whole.of_file(options)
    assert card.preprocess is not None
    assert card.preprocess.pixels == PIXELS
    if options == RICH:
        assert card.metadata().keys() == {f"vitnas.{key}" for key in ("preprocess", "in_graph", "probabilities")}
        assert (card.preprocess.layout, card.metadata()["vitnas.in_graph"]) == ("NHWC", "true")
    else:
        assert card.metadata().keys() == {f"vitnas.{key}" for key in ("preprocess", "accuracy", "latency")}
        assert card.preprocess.layout == "NCHW"
    assert whole.of_file(FileOptions(None)).latency is None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, helpers: Any) -> Path:
    """A folder of images of two classes, and a network with weights."""
    root = tmp_path_factory.mktemp("made")
    images = root / "images"
    for part, label in itertools.product(("train", "val"), ("dark", "light")):
        (images / part / label).mkdir(parents=True)
        for i in range(3):
            picture = photographs(64, IMAGENET)[i + 3 * (label == "light")]
            Image.fromarray(to_bytes(picture[None], IMAGENET)[0]).save(images / part / label / f"{i}.png")
    model = create_model(helpers.random_arch("shvit", 0, num_classes=2, resolution=32))
    save_model(model, root / "run")
    save_onnx(model, root / "run", FileOptions(), True, Card(preprocess=Preprocess.own(32), classes=["dark", "light"]))
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """The network, and what says which images it was trained on; copies."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"data": {"name": str(tmp_path / "images")}}))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ((), FileOptions()),
        (("--dynamic-batch", "--preprocess-in-graph", "--probabilities", "--precision", "fp16", "--opset", "20"), RICH),
    ],
    ids=["plain", "rich"],
)
def test_a_run_is_exported_and_checked_on_its_own_images(
    words: tuple[str, ...], wanted: FileOptions, run: Path, tmp_path: Path, vitnas: Any
) -> None:
    code, line, _ = vitnas("export", str(run), "--out", str(tmp_path / "out"), *words)
    assert code == 0
    assert " of the largest logit on 6 images of the data and 8 images of noise; top-1 changed on 0 of 6" in " ".join(
        line.split()
    )
    file = OnnxFile.open(tmp_path / "out")
    assert (file.batch_size, file.in_graph, file.probabilities, file.precision) == (
        wanted.batch_size,
        wanted.in_graph,
        wanted.probabilities,
        wanted.precision,
    )
    beside = json.loads((tmp_path / "out" / "preprocess.json").read_text())
    assert (beside["layout"], beside.get("in_graph", False)) == ("NHWC" if wanted.in_graph else "NCHW", wanted.in_graph)
    assert vitnas("export", str(tmp_path / "out"), "--out", str(tmp_path / "again"))[0] == 0
    assert not OnnxFile.open(tmp_path / "again").in_graph, "what was chosen of a file is not the network's"


def test_images_are_given_or_photographs(run: Path, tmp_path: Path, vitnas: Any) -> None:
    images = str(tmp_path / "images")
    shutil.copytree(images, tmp_path / "more")
    words = ("export", str(run), "--out", str(tmp_path / "out"))
    (tmp_path / "more" / "val" / "dark" / "0.png").unlink()
    assert "on 5 images of the data" in vitnas(*words, "--data", str(tmp_path / "more"))[1]
    vitnas.refused(vitnas(*words, "--data", str(tmp_path / "none")), "none")
    shutil.rmtree(images)
    assert "on 32 photographs" in vitnas(*words)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--opset", "12"), "--opset 12: give 13 to 20"),
        (("--opset", "16", "--precision", "fp16"), "--precision fp16 needs --opset 17 or more"),
        (("--precision", "bf16"), "a file is fp32, fp16 or int8"),
        (("--batch-size", "2", "--dynamic-batch"), "--batch-size 2 and --dynamic-batch: give one of them"),
        (("--precision", "int8"), "--precision int8 needs --data"),
    ],
)
def test_what_cannot_be_is_refused(words: tuple[str, ...], message: str, tmp_path: Path, vitnas: Any) -> None:
    vitnas.refused(vitnas("export", "shvit_s1@64", "--out", str(tmp_path / "out"), *words), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [FileOptions(in_graph=True), replace(RICH, precision="fp32")], ids=lambda each: named(each)
)
def test_the_guide_s_lines_use_every_file(
    options: FileOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, path = create(Convolutions), tmp_path / "model.onnx"
    written(network, path, options)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(CLASSIFY.partition("\n\n\nprint(")[0], names)
    pictures = to_bytes(photographs(48, IMAGENET), IMAGENET)
    found = []
    for i, each in enumerate(pictures):
        Image.fromarray(each).save(tmp_path / f"{i}.png")
        found.append(names["classify"](f"{i}.png"))
    file = OnnxFile.open(path)
    answers = file.logits(np.stack([file.pixels(Image.fromarray(each)) for each in pictures])).argmax(1)
    assert found == ["abcde"[i] for i in answers]
    assert len(set(found)) > 1


def test_a_training_leaves_the_file_that_was_asked_for(run: Path, tmp_path: Path, vitnas: Any) -> None:
    """Another one needs another folder; a training of an earlier version, which knew no choice, goes on."""
    words = ("train", str(run), "--data", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--from-scratch")
    words += ("--epochs", "1", "--batch-size", "4", "--device", "cpu")
    asked = ("--dynamic-batch", "--preprocess-in-graph", "--probabilities", "--opset", "18")
    assert vitnas(*words, *asked)[0] == 0
    file = OnnxFile.open(tmp_path / "out")
    assert (file.batch_size, file.in_graph, file.probabilities, file.classes) == (None, True, True, ("dark", "light"))
    assert load_onnx(tmp_path / "out" / "model.onnx").opset_import[0].version == 18
    vitnas.refused(vitnas(*words), "'dynamic_batch': True}, now not given")
    state = tmp_path / "out" / "state" / "state.json"
    known = json.loads(state.read_text())
    del known["options"]["onnx"]
    state.write_text(json.dumps(known))
    assert vitnas(*words)[0] == 0
    vitnas.refused(vitnas(*words, *asked), "onnx None, not {")


def test_a_pruning_continues_with_its_file_only(tmp_path: Path) -> None:
    plain = PruneRequest("shvit_s1", parse_pruning_budget(macs="0.5x"), Settings(), tmp_path)
    assert plain.identity()["onnx"] is None
    assert replace(plain, file=RICH).identity()["onnx"] == {
        "dynamic_batch": True,
        "in_graph": True,
        "opset": 20,
        "probabilities": True,
        "precision": "fp16",
    }
    assert "file" not in plain.identity()
    with pytest.raises(UserError, match="--opset 12"):
        replace(plain, file=FileOptions(opset=12)).check()
    assert RICH.of_batch(8) == RICH
    assert FileOptions(opset=18).of_batch(8) == FileOptions(8, opset=18)


@pytest.mark.parametrize("trained", [False, True])
def test_a_search_s_file_is_as_asked_for(trained: bool, tmp_path: Path, helpers: Any) -> None:
    arch = helpers.random_arch("shvit", 0, num_classes=2, resolution=32)
    weights = None
    if trained:
        weights = tmp_path / "weights.safetensors"
        save_weights(create_model(arch), weights)
    options = replace(RICH, precision="fp32")
    save_best(arch, tmp_path, weights, options, Card(preprocess=Preprocess.own(32, PIXELS), classes=["a", "b"]))
    file = OnnxFile.open(tmp_path)
    assert (file.batch_size, file.in_graph, file.probabilities) == (None, True, True)
    assert file.softmax(np.zeros((3, 32, 32, 3), np.uint8)).shape == (3, 2)


@pytest.mark.parametrize("kept", ["run/state/state.json", "run/result.json", "result.json"])
def test_a_run_s_own_folder_is_not_written_over(kept: str, run: Path, tmp_path: Path, vitnas: Any) -> None:
    if kept == "result.json":
        run = run.rename(tmp_path / "best")
    (tmp_path / kept).parent.mkdir(exist_ok=True)
    (tmp_path / kept).write_text("{}")
    before = (run / "model.onnx").read_bytes()
    words = ("export", str(run), "--out", str(run), "--dynamic-batch")
    vitnas.refused(vitnas(*words), f"{run.name} is a run's own folder: give another --out")
    assert (run / "model.onnx").read_bytes() == before
