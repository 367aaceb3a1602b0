"""Files of weights as people have them: what is read, what is refused, and what is said."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from search_spaces import Arch, create_model
from search_spaces.checkpoints import WeightsError, read_checkpoint
from search_spaces.weights import fit, load_groups

State = dict[str, Tensor]


def tiny(**changes: Any) -> Arch:
    block = {"attn": {"heads": 2, "key_dim": 4, "value_dim": 4, "scale": 0.5}, "keep_rate": 1.0, "fuse": False}
    document = {"version": 1, "family": "evit", "resolution": 32, "num_classes": 2, "patch_size": 8, "embed_dim": 8}
    return Arch.from_json(json.dumps(document | {"blocks": [block | {"ffn": {"hidden": 16}}] * 2} | changes))


@cache
def weights() -> State:
    """A network's state dict under timm's names."""
    torch.manual_seed(0)
    state = create_model(tiny()).state_dict()
    return {name.replace("patch_embed.", "patch_embed.proj.").replace(".ffn.", ".mlp."): v for name, v in state.items()}


def under(prefix: str) -> State:
    return {prefix + name: value for name, value in weights().items()}


def averaged(prefix: str = "") -> State:
    """Other values than those of `weights`."""
    return {prefix + name: value + 1 for name, value in weights().items()}


def load(content: Any, path: Path, arch: Arch | None = None) -> nn.Module:
    """The network of a file that holds bytes as they are, or an object as PyTorch stores it."""
    path.write_bytes(content if isinstance(content, bytes) else stored(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_model(arch or tiny(), weights=path)


def stored(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def equal(model: nn.Module, tolerance: float = 0.0) -> bool:
    """Whether a network has `weights`."""
    own = zip(model.state_dict().values(), weights().values(), strict=True)
    return all(torch.allclose(value, wanted, rtol=tolerance, atol=0) for value, wanted in own)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: stored(weights()), id="torch"),
        pytest.param(lambda: stored(weights(), _use_new_zipfile_serialization=False), id="torch-before-1.6"),
        pytest.param(lambda: save(weights()), id="safetensors"),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "A.SAFETENSORS", "a.bin", "a.pth.tar", "a", "a.onnx"])
def test_content_goes_before_the_suffix(content: Callable[[], bytes], name: str, tmp_path: Path) -> None:
    assert equal(load(content(), tmp_path / name))


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "backbone.", "net.model.", "a.b.c.d."],
)
@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict", "net", "model_ema", "ema_state_dict"])
def test_any_prefix_and_level_is_found(prefix: str, key: str | None, tmp_path: Path) -> None:
    model = load({key: under(prefix), "epoch": 3} if key else under(prefix), tmp_path / "a.pth")
    assert equal(model)
    told = model.loaded.note
    assert ("taken from" in told) == (key is not None)
    assert key is None or f"taken from {key};" in told
    assert (f"prefix {prefix} stripped" in told) == bool(prefix)


def test_beside_the_weights_may_stand_what_is_none(tmp_path: Path) -> None:
    """A count of averages, an epoch, a profiler's counts, a loss's own tensors and an optimizer's."""
    step = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    beside = {"n_averaged": torch.tensor(3), "epoch": 3, "criterion.weight": torch.ones(2)}
    model = load({"state_dict": {"model": under("module.") | beside}, "optimizer": step}, tmp_path / "a.pth")
    assert equal(model)
    assert "taken from state_dict.model; prefix module. stripped" in model.loaded.note
    assert "left out: n_averaged, criterion.weight" in model.loaded.note
    thop = weights() | {"total_ops": torch.zeros(1), "blocks.0.total_params": torch.zeros(1)}
    assert "left out: total_ops, blocks.0.total_params" in load(thop, tmp_path / "a.pth").loaded.note


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema", "averaged_model", "swa_model"])
@pytest.mark.parametrize("first", ["plain", "averaged"])
def test_plain_weights_go_before_averaged_ones(key: str, first: str, tmp_path: Path) -> None:
    """As in the evaluation of the official repositories, wherever either stands; and it is said."""
    both = {"model": weights(), key: averaged("module.") | {"n_averaged": torch.tensor(9)}}
    model = load(both if first == "plain" else dict(reversed(both.items())), tmp_path / "a.pth")
    assert equal(model)
    assert f"taken from model, not {key}" in model.loaded.note
    flat = under("model.") | averaged("ema.")
    assert equal(load(flat if first == "plain" else dict(reversed(flat.items())), tmp_path / "a.pth"))


def test_training_checkpoints_are_read_with_their_settings(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=1e-3, data=Path("/data"), output=PureWindowsPath("out"), betas=(0.9, 0.999))
    held = {"model": weights(), "args": args, "metric": np.float64(71.3), "seed": np.int64(3), "ok": np.bool_(True)}
    held |= {"history": np.arange(3.0), "dtype": np.dtype("float32")}
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        assert equal(load(stored(held, **options), tmp_path / "a.pth"))


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name", ["PosixPath", "WindowsPath"])
@pytest.mark.parametrize("core", ["core", "_core"])
def test_other_systems_and_versions_names_are_read(module: str, name: str, core: str, tmp_path: Path) -> None:
    """Paths of the other system, of Python 3.13, and scalars of NumPy 1 and 2."""
    content = stored({"model": weights(), "path": Path("data"), "metric": np.float64(1)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.endswith("data.pkl"):
                data = data.replace(b"cpathlib\nPosixPath", f"c{module}\n{name}".encode())
                data = data.replace(b"cnumpy._core.", f"cnumpy.{core}.".encode())
            target.writestr(info.filename, data)
    assert equal(load(buffer.getvalue(), tmp_path / "a.pth"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_the_network_s(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: value.to(dtype) for name, value in weights().items()}
    for content in (stored(state), save(state)):
        model = load(content, tmp_path / "a")
        assert equal(model, 1e-2)
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_parameters_and_arrays_are_tensors(tmp_path: Path) -> None:
    assert equal(load({name: nn.Parameter(value) for name, value in weights().items()}, tmp_path / "a"))
    assert equal(load({name: value.numpy() for name, value in weights().items()}, tmp_path / "a"))


def changed(change: Callable[[Tensor], Tensor], only: str = "") -> State:
    return {name: change(value) if only in name else value for name, value in weights().items()}


def with_last(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("state", "words"),
    [
        pytest.param(lambda: changed(with_last(float("nan")), "norm.bias"), "not finite: norm.bias", id="nan"),
        pytest.param(lambda: changed(with_last(float("inf")), "1.mlp.fc2.bias"), "not finite: blocks.1.ffn", id="inf"),
        pytest.param(lambda: changed(lambda v: v.double() * 1e300, "head"), "not finite: head", id="overflow"),
        pytest.param(lambda: changed(torch.zeros_like), "all zero", id="zero"),
        pytest.param(lambda: changed(lambda v: v.to(torch.int8)), "cls_token is int8", id="int8"),
        pytest.param(lambda: changed(lambda v: v.bool(), "head.bias"), "head.bias is bool", id="bool"),
        pytest.param(
            lambda: changed(lambda v: v.to(torch.complex64), "norm.bias"), "norm.bias is complex", id="complex"
        ),
        pytest.param(lambda: changed(lambda v: v.to("meta"), "norm.bias"), "norm.bias is a meta tensor", id="meta"),
        pytest.param(lambda: changed(Tensor.to_sparse, "head.weight"), "head.weight is sparse", id="sparse"),
        pytest.param(
            lambda: changed(lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), "head.weight"),
            "head.weight is sparse or quantized",
            id="quantized",
            marks=pytest.mark.filterwarnings("ignore:.*quantize:UserWarning"),
        ),
        pytest.param(lambda: weights() | {"head.weight": torch.randn(2, 24)}, r"head.weight is \(2, 24\)", id="width"),
        pytest.param(
            lambda: {k.replace("head.", "fc."): v for k, v in weights().items()},
            "lack head.weight, head.bias and have fc.weight, fc.bias",
            id="another-name",
        ),
        pytest.param(
            lambda: {name: value for name, value in weights().items() if name != "cls_token"},
            "lack cls_token",
            id="lacks-one",
        ),
        pytest.param(
            lambda: {"resnet": {"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)}},
            r"lack all .* they have conv1.weight, fc.bias, \.\.\. \(under resnet\)",
            id="another-network",
        ),
        pytest.param(
            lambda: {k.replace("patch_embed.", "patch_embed.proj."): v for k, v in larger().items()},
            "pos_embed .*`vitnas train` resizes",
            id="resolution",
        ),
    ],
)
def test_unsound_weights_are_one_line(state: Callable[[], State], words: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=words) as caught:
        load(state(), tmp_path / "weights.pth")
    assert "\n" not in str(caught.value)
    assert "weights.pth" in str(caught.value)


def larger() -> State:
    return create_model(tiny(resolution=64)).state_dict()


def test_a_network_is_left_as_it_was_by_weights_that_do_not_fit() -> None:
    model = create_model(tiny())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError):
        fit(model, {name: value * float("nan") if "head" in name else value + 1 for name, value in before.items()})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Other:
    """Something that is no tensor and no plain data."""


def archive(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name, content in members.items():
            target.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "an empty file"),
    "zeros": (lambda: bytes(999), "neither a PyTorch file nor safetensors"),
    "text": (lambda: b"0.1 0.2 0.3\n", "neither a PyTorch file nor safetensors"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 21\n", "git lfs pull"),
    "page": (lambda: b"<!DOCTYPE html><title>Not found</title>", "a web page"),
    "index": (lambda: b'{"weight_map": {"head.weight": "model-00001-of-00002.safetensors"}}', "a JSON document"),
    "cut-zip": (lambda: stored(weights())[:-700], "damaged or cut off"),
    "cut-old": (lambda: stored(weights(), _use_new_zipfile_serialization=False)[:-900], "damaged or cut off"),
    "cut-safetensors": (lambda: save(weights())[:-9], "damaged or cut off"),
    "cut-header": (lambda: save(weights())[:99], "damaged or cut off"),
    "bad-header": (lambda: struct.pack("<Q", 9) + b"{nonsense", "damaged or cut off"),
    "damaged-zip": (lambda: stored(weights()).replace(b"torch._utils", b"torch._nasal"), "data.pkl|refused|damaged"),
    "numpy": (lambda: archive(**{"a.npy": b""}), "an archive, but not PyTorch's"),
    "script": (lambda: archive(**{"a__constants.pkl": b"", "a__data.pkl": b""}), "a TorchScript archive"),
    "list": (lambda: stored([torch.zeros(1)]), "no named tensors, but a list"),
    "numbers": (lambda: stored({"epoch": 1, "loss": 0.5}), "no named tensors, but epoch, loss"),
    "nothing": (lambda: stored({}), "no named tensors, but nothing"),
    "module": (lambda: stored(nn.Linear(2, 2)), r"Python objects \(torch.nn.modules.linear.Linear\), refused"),
    "objects": (lambda: stored({"model": weights(), "best": np.array([None])}), "refused and not run"),
    "object": (lambda: stored({"model": weights(), "best": Other()}), "refused and not run"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_files_are_one_line(name: str, suffix: str, tmp_path: Path) -> None:
    content, words = FILES[name]
    refused(content(), tmp_path / f"a{suffix}", words)


@pytest.mark.parametrize("first", range(0, 256, 5))
def test_raw_bytes_are_one_line(first: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(first).bytes(64)
    refused(bytes([first] * 3) + noise, tmp_path / "a.bin", "PyTorch")
    refused(b"\x80" + bytes([first]) + noise, tmp_path / "a.bin", "PyTorch|refused|damaged")


def refused(content: bytes, path: Path, words: str) -> None:
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=words) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=f"{tmp_path}/a.pth: no such file"):
        read_checkpoint(tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="name too long"):
        read_checkpoint(tmp_path / ("a" * 300))


def test_a_folder_names_the_file_in_it(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="a folder without weights"):
        read_checkpoint(tmp_path)
    save_file(weights(), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=f"a folder: give {tmp_path}/model.safetensors"):
        read_checkpoint(tmp_path)


class Exploit:
    """Makes a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "dump", [stored, lambda held: stored(held, _use_new_zipfile_serialization=False), pickle.dumps]
)
def test_code_in_what_may_be_read_is_not_run(dump: Callable[[Any], bytes], tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    held = {"model": weights(), "args": argparse.Namespace(path=Exploit(proof)), "metric": np.float64(1)}
    refused(dump(held), tmp_path / "a.pth", "refused|not a readable")
    assert not proof.exists()


@pytest.mark.parametrize("classes", [1, 7])
def test_another_classifier_is_left_untrained(classes: int, tmp_path: Path) -> None:
    head = {"head.weight": torch.randn(classes, 8), "head.bias": torch.randn(classes)}
    model = load(weights() | head, tmp_path / "a.pth")
    assert (model.loaded.classes, model.untrained) == (classes, ["head.weight", "head.bias"])
    assert torch.equal(model.pos_embed, weights()["pos_embed"])


def test_a_missing_classifier_is_left_untrained(tmp_path: Path) -> None:
    model = load({k: v for k, v in weights().items() if not k.startswith("head.")}, tmp_path / "a.pth")
    assert (model.loaded.classes, model.untrained) == (None, ["head.weight", "head.bias"])


def test_networks_of_others_load_under_their_own_names(tmp_path: Path) -> None:
    """A teacher of timm's."""
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save({"state_dict": {f"module.{k}": v for k, v in first.state_dict().items()}}, tmp_path / "a.pth")
    assert load_groups(second, read_checkpoint(tmp_path / "a.pth"), {None: ()}).untrained == []
    assert torch.equal(first.weight, second.weight)


def test_weights_that_cannot_be_fetched_say_where_they_are(monkeypatch):
    """The whole sentence, however long, and what to do; and without waiting for a host that does not answer."""
    import huggingface_hub
    import timm
    from huggingface_hub import constants

    from search_spaces import get_arch
    from search_spaces.checkpoints import WeightsError
    from search_spaces.weights import load_weights

    why = "An error happened while trying to locate the file on the Hub, and it is not in the cache " + "x" * 200

    def unreachable():
        raise OSError("no route")

    def refuse(*args, **kwargs):
        assert constants.HF_HUB_OFFLINE  # else its client retries for a minute
        raise OSError(f"{why}. Please check your connection\nand try again.")

    arch = get_arch("levit_128s")
    model = create_model(arch)
    monkeypatch.setattr(timm, "create_model", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", unreachable)
    with pytest.raises(WeightsError) as error:
        load_weights(model, arch, "timm")
    assert constants.HF_HUB_OFFLINE is False
    assert str(error.value) == (
        f"timm could not fetch levit_128s ({why}): fetch model.safetensors from "
        "https://huggingface.co/timm/levit_128s.fb_dist_in1k elsewhere and give --weights FILE"
    )
