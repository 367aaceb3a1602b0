"""An ONNX file as it is deployed: the logits of PyTorch, and one line for each file that cannot be used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from toy_onnx import CLASSES, flags, odd_images, toy_card, write_toy

from nas.data.decoding import RibbonError, decode
from nas.data.images import plain_transform
from nas.errors import UserError
from nas.evaluate import onnx_file, session
from nas.evaluate.onnx_file import OnnxFile, softmax
from nas.evaluate.preprocess import PRESETS, parse_preprocess
from nas.export.card import Preprocess
from nas.export.onnx import label_onnx, to_onnx
from nas.measure.runtime import no_bf16

RUNTIMES = ("onnxruntime", "openvino")
HUGE = '{"resize": 1000000000, "size": 16, "interpolation": "bicubic", "mean": [0, 0, 0], "std": [1, 1, 1]}'


def random_pixels(count: int, size: int = 16) -> Any:
    return np.random.default_rng(2).standard_normal((count, 3, size, size)).astype(np.float32)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_logits_are_those_of_pytorch(tmp_path: Path, runtime: str) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 49, 3)
    ).eval()
    path, transform = tmp_path / "model.onnx", plain_transform(16)
    to_onnx(network, path, 16, 4)
    label_onnx(path, None, True, toy_card())
    file, paths = OnnxFile.open(path, runtime, threads=1), odd_images(tmp_path)
    assert (file.classes, file.num_classes, file.batch_size, file.notes) == (CLASSES, 3, 4, ())
    assert file.preprocess == Preprocess.own(16)
    images = [decode(each) for each in paths.values()]
    with torch.inference_mode():
        wanted = network(torch.stack([transform(image) for image in images])).numpy()
    found = file.logits(np.stack([file.pixels(image) for image in images]))  # 19 images, in batches of 4
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(file.softmax(np.stack([file.pixels(i) for i in images])), softmax(wanted), atol=1e-5)


def test_pixels_are_made_of_an_image_in_any_mode(tmp_path: Path) -> None:
    from PIL import Image

    file = OnnxFile.open(write_toy(tmp_path / "toy.onnx", card=toy_card()))
    for kind, path in odd_images(tmp_path).items():
        with Image.open(path) as image:
            before = image.size
            assert np.array_equal(file.pixels(image), file.pixels(decode(path))), kind
            assert kind == "turned tiff" or image.size == before, kind  # which Pillow turns itself
    with pytest.raises(RibbonError):
        file.pixels(Image.new("RGB", (3000, 4)))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_layout_batch_and_kind_has_the_same_answer(tmp_path: Path, runtime: str) -> None:
    image, card = decode(odd_images(tmp_path)["plain"]), toy_card(pixels=PRESETS["none"])
    wanted = None
    for i, (shape, kind, more) in enumerate(
        [
            ((1, 3, 16, 16), "float32", {"card": card}),
            ((5, 3, 16, 16), "float32", {"card": card}),
            (("N", 3, 16, 16), "float32", {"card": card}),
            ((1, 16, 16, 3), "float32", {"card": card}),
            (("N", 16, 16, 3), "float16", {"card": card}),
            ((1, 3, 16, 16), "float16", {"card": card, "half": True}),
            ((2, 16, 16, 3), "uint8", {"card": card, "metadata": flags(in_graph=True)}),
            ((1, 3, 16, 16), "float32", {"card": card, "squeeze": False}),
        ]
    ):
        file = OnnxFile.open(write_toy(tmp_path / f"{i}.onnx", shape, kind, **more), runtime)
        assert file.batch_size == (shape[0] if isinstance(shape[0], int) else None)
        pixels = file.pixels(image)
        assert pixels.shape == ((16, 16, 3) if shape[3] == 3 else (3, 16, 16))
        assert pixels.dtype == ("uint8" if kind == "uint8" else "float32")
        found = file.logits(np.stack([pixels] * 3))
        assert found.shape == (3, 3)
        assert file.logits(np.stack([pixels] * 3)[:0]).shape == (0, 3)
        wanted = found if wanted is None else wanted
        np.testing.assert_allclose(found, wanted, atol=2e-2 if kind == "float16" else 1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_probabilities_are_not_normalised_twice(tmp_path: Path, runtime: str) -> None:
    pixels, card = random_pixels(4), toy_card()
    plain = OnnxFile.open(write_toy(tmp_path / "a.onnx", card=card), runtime)
    said = OnnxFile.open(
        write_toy(tmp_path / "b.onnx", card=card, softmax=True, metadata=flags(probabilities=True)), runtime
    )
    seen = OnnxFile.open(write_toy(tmp_path / "c.onnx", softmax=True), runtime, parse_preprocess("imagenet"))
    assert (plain.probabilities, said.probabilities, seen.probabilities) == (False, True, True)
    assert said.notes == ()
    assert seen.notes == (
        f"{tmp_path / 'c.onnx'}: its outputs are from 0 to 1 and add up to 1: taken as probabilities",
    )
    for file in (said, seen):
        np.testing.assert_allclose(file.softmax(pixels), plain.softmax(pixels), atol=1e-6)
        np.testing.assert_allclose(softmax(file.logits(pixels)), plain.softmax(pixels), atol=1e-6)


def test_a_foreign_file_needs_to_be_told_its_preprocessing(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "theirs.onnx", ("N", 3, "H", "W"))
    with pytest.raises(UserError) as raised:
        OnnxFile.open(path)
    for word in (
        "does not say how an image becomes its input images (float32 ?x3x?x?)",
        "--preprocess",
        *PRESETS,
        "mean=",
    ):
        assert word in str(raised.value)
    with pytest.raises(UserError, match="takes images of any size: add size=PX"):
        OnnxFile.open(path, preprocess=parse_preprocess("imagenet"))
    file = OnnxFile.open(path, preprocess=parse_preprocess("imagenet,size=20"), classes=CLASSES)
    assert (file.preprocess, file.classes, file.num_classes) == (Preprocess.own(20), CLASSES, 3)
    assert OnnxFile.open(path, preprocess=Preprocess.own(24)).classes is None


def test_the_shape_of_a_foreign_file_is_read(tmp_path: Path) -> None:
    last = write_toy(tmp_path / "last.onnx", (1, 24, 24, 3), "uint8")
    with pytest.raises(UserError, match="takes uint8 pixels, so what normalises them is inside: say --preprocess raw"):
        OnnxFile.open(last, preprocess=parse_preprocess("imagenet"))
    file = OnnxFile.open(last, preprocess=parse_preprocess("raw,crop=0.9"))
    assert (file.channels_last, file.preprocess.size, file.in_graph) == (True, 24, False)


def test_the_layout_is_the_files_where_its_shape_does_not_tell_it(tmp_path: Path) -> None:
    card = toy_card()
    last = card.model_copy(update={"preprocess": Preprocess.own(16).model_copy(update={"layout": "NHWC"})})
    any_shape = write_toy(tmp_path / "any.onnx", ("N", "A", "B", "C"), card=last)
    assert OnnxFile.open(any_shape).channels_last
    assert not OnnxFile.open(any_shape, preprocess=parse_preprocess("imagenet,size=16,layout=nchw")).channels_last
    for shape, said in (((1, 3, 16, 16), "nhwc"), ((1, 16, 16, 3), "nchw")):
        path = write_toy(tmp_path / f"{said}.onnx", shape, card=card)
        assert OnnxFile.open(path).preprocess.layout != said.upper()
        with pytest.raises(UserError, match=f"--preprocess says layout={said.upper()}: leave the layout out"):
            OnnxFile.open(path, preprocess=parse_preprocess(f"imagenet,layout={said}"))


def test_two_classes_of_one_name_are_told(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "net.onnx", card=toy_card(classes=("cat", "dog", "cat")))
    assert OnnxFile.open(path).notes == (f"{path}: several outputs are called cat: their index tells them apart",)


def test_a_machine_without_memory_is_not_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> Any:
        raise MemoryError

    path, opened = write_toy(tmp_path / "net.onnx", card=toy_card()), session._onnxruntime
    monkeypatch.setattr(session, "_onnxruntime", lambda *given: opened(*given)._replace(run=no_memory))
    file = OnnxFile.open(path)
    with pytest.raises(MemoryError):
        file.logits(random_pixels(1))
    monkeypatch.setattr(session, "_onnxruntime", no_memory)
    with pytest.raises(MemoryError):
        OnnxFile.open(path)


@pytest.mark.parametrize("change", ["opset", "ir"])
def test_a_file_that_is_newer_than_the_runtime_is_told(tmp_path: Path, change: str) -> None:
    import onnx

    path = write_toy(tmp_path / "net.onnx", card=toy_card())
    model = onnx.load(path)
    if change == "opset":
        model.opset_import[0].version = 99
    else:
        model.ir_version = 99
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"is newer than onnxruntime .* reads: pip install -U onnxruntime, or export"):
        OnnxFile.open(path)


def test_other_pixels_than_its_own_are_told(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "own.onnx", card=toy_card())
    file = OnnxFile.open(path, preprocess=parse_preprocess("inception"))
    assert file.notes == (f"{path}: pixels as --preprocess says, not as the file's own metadata do",)
    assert file.preprocess.mean == (0.5, 0.5, 0.5)
    random = write_toy(tmp_path / "random.onnx", card=toy_card(), metadata={"vitnas.weights": "untrained"})
    assert OnnxFile.open(random).notes == (f"{random}: its weights are random, and so are its answers",)


def test_a_folder_stands_for_its_file(tmp_path: Path) -> None:
    best = tmp_path / "best"
    best.mkdir()
    write_toy(best / "model.onnx")
    toy_card().write(best)  # as earlier versions told it
    for folder in (tmp_path, best):
        file = OnnxFile.open(folder)
        assert (file.path, file.classes) == (best / "model.onnx", CLASSES)
        assert file.notes == ()
    (best / "model.int8.onnx").touch()
    assert OnnxFile.open(tmp_path).notes == (
        f"{best}/model.onnx is used, not model.int8.onnx beside it, made for the device: name that to use it",
    )
    assert OnnxFile.open(write_toy(best / "model.onnx", card=toy_card())).notes == ()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no model.onnx and no best/model.onnx".replace(".", r"\.")):
        OnnxFile.open(tmp_path / "empty")


def test_precision_and_digest(tmp_path: Path) -> None:
    from nas.export.artifact import lower_precision
    from nas.measure.runtime import Settings

    for precision in ("fp32", "fp16", "int8"):
        path = write_toy(tmp_path / f"{precision}.onnx", card=toy_card(), half=precision == "fp16")
        if precision == "int8":
            lower_precision(path, Settings(precision="int8"), random_pixels(8))
        file = OnnxFile.open(path)
        assert file.precision == precision
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)


def test_bf16_is_computed_in_where_there_is_some(tmp_path: Path) -> None:
    path, pixels = write_toy(tmp_path / "net.onnx", card=toy_card()), random_pixels(4)
    with pytest.raises(UserError, match="runtime onnxruntime has fp32, int8 on cpu, not bf16"):
        OnnxFile.open(path, bf16=True)
    if why := no_bf16():
        pytest.skip(why)
    half, whole = (OnnxFile.open(path, "openvino", bf16=bf16) for bf16 in (True, False))
    assert (half.precision, whole.precision) == ("bf16", "fp32")
    difference = abs(half.logits(pixels) - whole.logits(pixels)).max()
    assert 0 < difference < 0.2


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")


def without_weights(path: Path) -> None:
    path.with_name(f"{path.name}.data").unlink()


def cut_weights(path: Path) -> None:
    data = path.with_name(f"{path.name}.data")
    data.write_bytes(data.read_bytes()[:10])


def no_number(path: Path) -> None:
    _change_records(path, "length", "abc")


def no_location(path: Path) -> None:
    _change_records(path, "location", None)


def empty_location(path: Path) -> None:
    _change_records(path, "location", "")


def long_location(path: Path) -> None:
    _change_records(path, "location", "x" * 5000)


def before_the_beginning(path: Path) -> None:
    _change_records(path, "offset", "-8")


def absolute_location(path: Path) -> None:
    _change_records(path, "location", "/etc/hostname")


def location_above(path: Path) -> None:
    _change_records(path, "location", "a/../../weights.data")


def location_that_is_no_text(path: Path) -> None:
    _change_records(path, "location", "w12345")
    path.write_bytes(path.read_bytes().replace(b"w12345", b"w\xff\xfe345"))


def location_of_two_lines(path: Path) -> None:
    _change_records(path, "location", "weights\nbin")


def _change_records(path: Path, key: str, value: str | None) -> None:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        kept = {each.key: each.value for each in tensor.external_data if each.key != key}
        del tensor.external_data[:]
        for each, text in (kept | ({} if value is None else {key: value})).items():
            tensor.external_data.add(key=each, value=text)
    path.write_bytes(model.SerializeToString())


def web_page(path: Path) -> None:
    path.write_text("<html></html>")


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def name_that_is_no_text(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"images", b"im\xff\xfees"))


def constant_elsewhere(path: Path) -> None:
    model = onnx.load(path)
    weights = model.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="gone.data")
    model.graph.node.insert(0, helper.make_node("Constant", [], [weights.name], value=weights))
    del model.graph.initializer[0]
    path.write_bytes(model.SerializeToString())


def operator_of_their_own(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[0].CopyFrom(helper.make_node("Magic", ["images"], ["cast"], domain="com.acme"))
    model.opset_import.append(helper.make_opsetid("com.acme", 1))
    onnx.save(model, path)


def yes_or_no(path: Path) -> None:
    _answer_in(path, TensorProto.BOOL)


def whole_numbers(path: Path) -> None:
    _answer_in(path, TensorProto.INT64)


def _answer_in(path: Path, kind: int) -> None:
    model = onnx.load(path)
    model.graph.node[-2].attribute[0].i = kind
    model.graph.output[0].type.tensor_type.elem_type = kind
    onnx.save(model, path)


def sequence_of_images(path: Path) -> None:
    model = onnx.load(path)
    model.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("images", TensorProto.FLOAT, (1, 3, 16, 16)))
    model.graph.node.insert(0, helper.make_node("SequenceAt", ["images", "place"], ["image"]))
    model.graph.node[1].input[0] = "image"
    model.graph.initializer.append(helper.make_tensor("place", TensorProto.INT64, (), [0]))
    onnx.save(model, path)


def one_number(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[-1].CopyFrom(helper.make_node("ReduceSum", ["wide"], ["logits"], keepdims=0))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ()))
    onnx.save(model, path)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("made", "change", "message"),
    [
        ({"external": True}, without_weights, "its weights are in .*, which is not there: put it beside the file"),
        ({"external": True}, cut_weights, "is cut off, .* bytes: fetch it again"),
        ({"external": True}, no_number, "is damaged: where its weights are in another file cannot be read"),
        ({"external": True}, no_location, "is damaged: where its weights are in another file cannot be read"),
        ({"external": True}, empty_location, "is damaged: where its weights are in another file cannot be read"),
        ({"external": True}, before_the_beginning, "is damaged: where its weights are in another file cannot be read"),
        ({"external": True}, long_location, "the file of its weights cannot be read: File name too long"),
        ({"external": True}, absolute_location, "its weights are in /etc/hostname, outside of its folder"),
        ({"external": True}, location_above, "its weights are in a/../../weights.data, outside of its folder"),
        ({"external": True}, location_that_is_no_text, "is damaged: "),
        ({"external": True}, location_of_two_lines, "its weights are in .*, which is not there"),
        ({}, constant_elsewhere, "its weights are in .*gone.data, which is not there: put it beside the file"),
        ({}, emptied, "is empty: fetch or export it again"),
        ({}, pipe, "is a pipe or a device, which cannot be read twice: save it as an .onnx file"),
        ({}, name_that_is_no_text, "is damaged: .*name.* is no text; export it again"),
        ({}, operator_of_their_own, "cannot open .*: (onnxruntime|openvino) has no operator com.acme.Magic$"),
        ({}, yes_or_no, r"is no classifier: .* of float32, .*, it has logits \(bool(ean)? 1x3\)"),
        ({}, whole_numbers, r"is no classifier: .* of float32, .*, it has logits \(i(nt)?64 1x3\)"),
        ({}, one_number, "is no classifier: (it answers one number|.* it has logits .without dimensions)"),
        ({}, sequence_of_images, r"takes seq\(tensor\(float\)\) pixels|only networks of one input .*\(sequence of any"),
        ({}, damaged, "is no ONNX file, or a damaged one"),
        ({}, pointer, "is a pointer of Git LFS, not the file: `git lfs pull` fetches it"),
        ({}, web_page, "is a web page, not an ONNX file"),
        ({}, Path.unlink, "no such file or folder"),
        (
            {"shape": (3, 16, 16)},
            None,
            "has no batch dimension, its input images is 3x16x16: export it with images of 1x3",
        ),
        (
            {"shape": (1, 3, 16, 16), "kind": "float64"},
            None,
            "takes float64 pixels: only float32, float16, uint8 are fed",
        ),
        ({"kind": "uint8"}, None, "takes uint8 pixels, so what normalises them is inside"),
        ({"inputs": 2}, None, r"has 2 inputs \(images \(1x3x16x16\), mask1 \(1x3x16x16\)\): only one of images is fed"),
        ({"outputs": 2}, None, "is no classifier: one of its outputs must be"),
        ({"outputs": 2}, None, r"and only one, but logits \(1x3\), more1 \(1x3\) all are"),
        ({"classes": 1, "card": toy_card(classes=None)}, None, "has one output: a classifier has one for each class"),
        ({"shape": (1, 3, 4100, 4100)}, None, "takes images of 4,100 px: at most 4,096 are fed"),
        ({"kind": "int64"}, None, "takes (int64|i64) pixels: only float32"),
        (
            {"card": None, "metadata": {"vitnas.preprocess": HUGE}},
            None,
            "is damaged: what it says of the network cannot be read",
        ),
        ({"shape": (1, 3, 16, 12)}, None, "takes images of 12 x 16 px: only square ones are fed"),
        ({"card": toy_card(24)}, None, "takes images of 16 px, but is said to take 24 px"),
        ({"card": toy_card(classes=("a", "b"))}, None, "has 3 outputs, 2 names of classes are in its metadata"),
        ({"metadata": {"vitnas.classes": "[3"}}, None, "is damaged: what it says of the network cannot be read"),
        ({"metadata": {"vitnas.in_graph": "maybe"}}, None, "is damaged: its metadata say vitnas.in_graph is 'maybe'"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_a_line(
    tmp_path: Path,
    runtime: str,
    made: dict[str, Any],
    change: Any,
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = write_toy(tmp_path / "net.onnx", **{"card": toy_card(), **made})
    if change:
        change(path)
    with pytest.raises(UserError, match=message) as raised:
        OnnxFile.open(path, runtime)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_an_input_of_no_images_is_told(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "net.onnx", (0, 3, 16, 16), card=toy_card())
    with pytest.raises(UserError, match="its input images is 0x3x16x16: export it with dynamic sizes, not with 0"):
        OnnxFile.open(path)


def test_an_input_that_says_no_shape_is_fed(tmp_path: Path) -> None:
    path, pixels = write_toy(tmp_path / "net.onnx", card=toy_card()), random_pixels(1)
    wanted = OnnxFile.open(path).logits(pixels)
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    np.testing.assert_array_equal(OnnxFile.open(path).logits(pixels), wanted)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_logits_in_whole_numbers_are_ranked(runtime: str, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "net.onnx", card=toy_card())
    _answer_in(path, TensorProto.INT32)
    file = OnnxFile.open(path, runtime)
    logits = file.logits(random_pixels(1))
    assert (file.num_classes, logits.dtype) == (3, np.float32)
    np.testing.assert_array_equal(logits, np.trunc(logits))


def test_a_file_in_openvino_s_own_format_is_opened(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    path, own = write_toy(tmp_path / "net.onnx", card=None), tmp_path / "net.xml"
    openvino.save_model(openvino.Core().read_model(path), own, compress_to_fp16=False)
    how = parse_preprocess("imagenet")
    wanted = OnnxFile.open(path, "openvino", preprocess=how).logits(random_pixels(1))
    np.testing.assert_allclose(OnnxFile.open(own, "openvino", preprocess=how).logits(random_pixels(1)), wanted, 1e-5)


def test_an_output_that_is_no_tensor_is_no_rival(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "net.onnx", card=toy_card(), squeeze=False)
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("SequenceConstruct", ["logits"], ["list"]))
    model.graph.output.insert(0, helper.make_tensor_sequence_value_info("list", TensorProto.FLOAT, None))
    onnx.save(model, path)
    assert OnnxFile.open(path).num_classes == 3


def test_a_file_that_is_made_for_batch_1_inside_is_told(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "net.onnx", ("N", 3, 16, 16), card=toy_card())
    model = onnx.load(path)
    model.graph.node[-1].CopyFrom(helper.make_node("Reshape", ["wide", "one"], ["logits"]))
    model.graph.initializer.append(helper.make_tensor("one", TensorProto.INT64, (2,), [1, 3]))
    onnx.save(model, path)
    file = OnnxFile.open(path)
    assert file.logits(random_pixels(1)).shape == (1, 3)
    with pytest.raises(
        UserError, match=r"its Reshape node .* made for batch 1 inside: export it with a batch of 1"
    ) as e:
        file.logits(random_pixels(2))
    assert "ONNXRuntimeError" not in str(e.value)


def test_a_batch_that_no_memory_holds_is_told(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "net.onnx", (10**7, 3, 16, 16), card=toy_card())
    with pytest.raises(UserError, match="takes 10,000,000 images of 16 px at once, more than 4 GiB: export it with"):
        OnnxFile.open(path)


def test_probabilities_that_are_none_are_told(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "net.onnx", card=toy_card(), metadata=flags(probabilities=True))
    for answer in (OnnxFile.open(path).logits, OnnxFile.open(path).softmax):
        with pytest.raises(UserError, match="its outputs should be probabilities, and are not from 0 to 1: export it"):
            answer(random_pixels(2))


def test_sigmoids_are_not_taken_for_probabilities(tmp_path: Path) -> None:
    """Of an image of zeros two of them are 0.5, and add up to 1."""
    path = write_toy(tmp_path / "net.onnx", softmax=True, classes=2)
    model = onnx.load(path)
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Sigmoid"
    onnx.save(model, path)
    assert not OnnxFile.open(path, preprocess=parse_preprocess("none")).probabilities


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_answers_that_are_no_numbers_are_told(tmp_path: Path, runtime: str) -> None:
    file = OnnxFile.open(write_toy(tmp_path / "net.onnx", card=toy_card(), scale=float("inf")), runtime)
    with pytest.raises(UserError, match="its outputs are NaN or infinite for 2 of 2 images: export it again"):
        file.logits(random_pixels(2))


def test_answers_for_other_images_than_were_fed_are_told(tmp_path: Path) -> None:
    file = OnnxFile.open(write_toy(tmp_path / "net.onnx", ("N", 3, 16, 16), card=toy_card()))
    one = replace(file, run=lambda batch: file.run(batch[:1]))
    with pytest.raises(UserError, match="answers 1x3 for 2 images, not 2x3: it does not take the batch that it states"):
        one.logits(random_pixels(2))


def test_names_that_are_given_must_be_as_many(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "net.onnx", card=toy_card(classes=None))
    with pytest.raises(UserError, match="has 3 outputs, 4 names of classes are given"):
        OnnxFile.open(path, classes=("a", "b", "c", "d"))
    assert OnnxFile.open(path).classes is None


def test_a_runtime_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_toy(tmp_path / "net.onnx", card=toy_card())
    with pytest.raises(UserError, match="unknown runtime 'tensorrt': choose from onnxruntime, openvino"):
        OnnxFile.open(path, "tensorrt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"openvino is not installed: pip install 'vitnas\[openvino\]'"):
        OnnxFile.open(path, "openvino")


def test_a_name_that_is_no_file_is_told_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"levit_128s: no such file or folder; `vitnas export levit_128s --out DIR`"):
        OnnxFile.open("levit_128s")
    for name, message in (
        ("nowhere", "nowhere: no such file or folder; give an .onnx file, or the folder of a run or a network"),
        (str(tmp_path), "holds no model.onnx and no best/model.onnx: give an .onnx file, or the folder of a run"),
        ("", "the network has an empty name"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            OnnxFile.open(name)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"model\.safetensors holds weights, not a network: give an \.onnx file"):
        OnnxFile.open(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="threads is 0: give 1 to"):
        OnnxFile.open(write_toy(tmp_path / "net.onnx", card=toy_card()), threads=0)


def test_pixels_and_logits_need_neither_torch_nor_onnx(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "net.onnx", card=toy_card())
    code = (
        "import sys; from PIL import Image; from nas.evaluate.onnx_file import OnnxFile\n"
        f"file = OnnxFile.open({str(path)!r}); file.logits(file.pixels(Image.new('RGB', (20, 20)))[None])\n"
        "sys.exit(', '.join({'torch', 'torchvision', 'timm', 'onnx', 'openvino', 'scipy'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(onnx_file.__file__).parents[2])
