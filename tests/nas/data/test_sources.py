"""Public data sets and shards: what of them is found on a disk, and what is said where a host cannot be reached."""

from __future__ import annotations

import errno
import gzip
import io
import os
import pickle
import re
import socket
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, Places365
from torchvision.datasets.utils import calculate_md5

from nas.data import shards, sources
from nas.data.batches import loader
from nas.data.dataset import open_data
from nas.data.images import Images, decode, hold_out, sample
from nas.data.sources import TORCH
from nas.errors import DiskFull, UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VITNAS_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The seconds slept between tries; they are not slept."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def picture(level: int, form: str = "PNG", size: tuple[int, int] = (12, 10)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(out, form)
    return out.getvalue()


def levels(images: Images) -> list[int]:
    """The grey of each image's middle."""
    found = []
    for source in images.sources:
        image = decode(source)
        found.append(image.getpixel((image.width // 2, image.height // 2))[0])
    return found


def message(name: str | Path, num_classes: int | None = None) -> str:
    with pytest.raises(UserError) as error:
        open_data(name, 16, num_classes, seed=0)
    assert "\n" not in str(error.value)
    return str(error.value)


# torchvision's data sets


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, kind: type[CIFAR10] = CIFAR10) -> None:
    """30 training images of grey levels 0 to 29 and 10 test images of 100 to 109, with labels 0 to 9 by turns."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: dict[str, object]) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return calculate_md5(folder / name)

    def batch(name: str, grey: range) -> list[list[str]]:
        data = np.repeat(np.array(grey, np.uint8)[:, None], 3072, axis=1)
        key = "labels" if kind is CIFAR10 else "fine_labels"
        return [[name, write(name, {"data": data, key: [i % 10 for i in grey]})]]

    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    monkeypatch.setattr(kind, "train_list", batch("a", range(30)))
    monkeypatch.setattr(kind, "test_list", batch("b", range(100, 110)))
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": write(kind.meta["filename"], {kind.meta["key"]: names})})


def write_idx(file: Path, values: np.ndarray) -> None:
    code = {"uint8": 8, "int32": 12}[values.dtype.name]
    header = bytes([0, 0, code, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(header + values.astype(values.dtype.newbyteorder(">")).tobytes())


def write_mnist(folder: Path, extended: bool) -> None:
    for split, first in (("train", 0), ("test", 100)):
        digits = np.repeat(np.arange(first, first + 20, dtype=np.uint8), 784).reshape(20, 28, 28)
        labels = (np.arange(20) % 10).astype(np.uint8)
        if extended:
            write_idx(folder / f"qmnist-{split}-images-idx3-ubyte", digits)
            write_idx(folder / f"qmnist-{split}-labels-idx2-int", np.stack([labels.astype(np.int32)] * 8, axis=1))
        else:
            stem = "train" if split == "train" else "t10k"
            write_idx(folder / f"{stem}-images-idx3-ubyte", digits)
            write_idx(folder / f"{stem}-labels-idx1-ubyte", labels)


def write_classes(root: Path, names: list[str], first: int) -> None:
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in (1, 0):
            (root / name / f"{j}.png").write_bytes(picture(first + 2 * i + j))


def write_imagenet(root: Path) -> None:
    root.mkdir(parents=True)
    torch.save(({"n01": ("tench", "Tinca tinca"), "n02": ("goldfish",)}, []), root / "meta.bin")
    for split, first in (("train", 0), ("val", 100)):
        write_classes(root / split, ["n01", "n02"], first)


def write_inaturalist(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: sorted(listed(folder), reverse=True))
    for split, first in (("2021_train", 0), ("2021_valid", 100)):
        write_classes(root / split, [f"0000{i}_Animalia_a_b_c_d_{i}_e" for i in (0, 1)], first)


def write_places(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Places365, "_CATEGORIES_META", ("categories.txt", None))
    monkeypatch.setattr(Places365, "_FILE_LIST_META", {"train-standard": ("t.txt", None), "val": ("v.txt", None)})
    root.mkdir(parents=True)
    (root / "categories.txt").write_text("/a/airfield 0\n/b/bar 1\n")
    for split, listed, first in (("data_large_standard", "t.txt", 0), ("val_large", "v.txt", 100)):
        write_classes(root / split, ["x", "y"], first)
        (root / listed).write_text("/x/0.png 0\n/x/1.png 0\n/y/0.png 1\n/y/1.png 1\n")


@pytest.mark.parametrize("name", TORCH)
def test_torchvision_data_on_the_disk(name, cache, monkeypatch, no_network):
    root = cache / "torch"
    write = {
        "cifar10": lambda: write_cifar(root, monkeypatch),
        "cifar100": lambda: write_cifar(root, monkeypatch, CIFAR100),
        "mnist": lambda: write_mnist(root / "MNIST" / "raw", extended=False),
        "kmnist": lambda: write_mnist(root / "KMNIST" / "raw", extended=False),
        "fashion_mnist": lambda: write_mnist(root / "FashionMNIST" / "raw", extended=False),
        "qmnist": lambda: write_mnist(root / "QMNIST" / "raw", extended=True),
        "imagenet": lambda: write_imagenet(root),
        "inaturalist": lambda: write_inaturalist(root, monkeypatch),
        "places365": lambda: write_places(root, monkeypatch),
    }
    write[name]()
    data = open_data(f"torch/{name}", 16, None, seed=0)
    count = 30 if "cifar" in name else 20 if "mnist" in name else 4
    classes = 10 if count > 4 else 2
    assert (data.name, data.demo, len(data.classes)) == (f"torch/{name}", False, classes)
    assert levels(data.train) == list(range(count))
    assert data.train.labels == [i % classes if classes == 10 else i // classes for i in range(count)]
    assert min(levels(data.val)) == 100
    assert all(isinstance(each, str) for each in data.classes)
    image, label = data.train[2]
    assert (image.shape, label) == ((3, 16, 16), data.train.labels[2])
    if name == "imagenet":
        assert data.classes == ["tench, Tinca tinca", "goldfish"]


def test_workers_read_torchvision_data(cache, monkeypatch):
    write_cifar(cache / "torch", monkeypatch)
    data = open_data("torch/CIFAR10", 16, 10, seed=0)
    found = loader(sample(data.train, 20, seed=1), 6, shuffle=True, seed=0, workers=2)
    assert sum(len(labels) for _, labels in found) == 20
    assert len(pickle.loads(pickle.dumps(data.train))) == 30  # where processes are not forked


def test_number_of_classes(cache, monkeypatch):
    write_cifar(cache / "torch", monkeypatch)
    assert message("torch/cifar10", 7) == "torch/cifar10 has 10 classes but --num-classes is 7"


@pytest.mark.parametrize("name", [each for each in TORCH if each != "imagenet"])
def test_a_download_that_cannot_be(name, cache, no_network, pauses):
    assert re.match(
        rf"torch/{name} cannot be had in \S+ \(.+\): copy its files there, .*, or give --data DIR",
        message(f"torch/{name}"),
    )
    assert pauses == []


def test_a_file_that_is_cut_off(cache, no_network):
    write_mnist(cache / "torch" / "MNIST" / "raw", extended=False)
    (cache / "torch" / "MNIST" / "raw" / "train-labels-idx1-ubyte").write_bytes(b"")
    assert message("torch/mnist").startswith("torch/mnist cannot be had in ")


def test_a_host_that_does_not_answer(cache, monkeypatch):
    """It is given up after TIMEOUT, not waited for without end."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr("nas.data.sources.TIMEOUT", 0.2)
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/cifar.tar.gz")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        started = time.monotonic()
        assert "timed out" in message("torch/cifar10")
        assert time.monotonic() - started < 60
    assert socket.getdefaulttimeout() is None


def test_imagenet_cannot_be_downloaded(cache):
    assert "The archive ILSVRC2012_devkit_t12.tar.gz is not present" in message("torch/imagenet")


@pytest.mark.parametrize(
    ("name", "near"), [("cifar", "torch/cifar10"), ("mnnist", "torch/mnist"), ("x", "torch/imagenet")]
)
def test_an_unknown_name(name, near):
    assert near in message(f"torch/{name}")
    assert f"torch/{name} is not known: did you mean torch/" in message(f"torch/{name}")


def test_a_full_disk(cache, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources, "_torch_split", full)
    with pytest.raises(DiskFull):
        sources.torch_dataset("cifar10")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITNAS_DATA", str(tmp_path / "file"))
    assert "cannot be had in" in message("torch/cifar10")


# Hugging Face's data sets


@pytest.fixture
def hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is missing: hfds/ not tested")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    datasets.disable_progress_bars()
    return datasets


def write_hub(
    hub, folder: Path, labels: dict[str, list], feature: object, image: str = "image", label: str = "label"
) -> str:
    """Parquet files, one a split; image i of a split has the grey level i."""
    folder.mkdir()
    for split, values in labels.items():
        rows = {
            image: [{"bytes": picture(i), "path": None} for i in range(len(values))],
            label: values,
        }
        features = hub.Features({image: hub.Image(), label: feature})
        hub.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return f"hfds/{folder}"


def test_a_hub_data_set_with_splits(hub, tmp_path):
    labels = {"train": [0, 1, 2] * 4, "validation": [2, 1, 0], "test": [0] * 5}
    name = write_hub(hub, tmp_path / "set", labels, hub.ClassLabel(names=["ant", "bee", "cow"]))
    data = open_data(name, 16, 3, seed=0)
    assert (data.name, data.classes) == (name, ["ant", "bee", "cow"])
    assert (data.train.labels, levels(data.train)) == (labels["train"], list(range(12)))
    assert (data.val.labels, levels(data.val)) == ([2, 1, 0], [0, 1, 2])
    assert str(data.train.sources[3]) == f"{name}, train[3]"
    for workers in (0, 2):
        found = loader(data.train.pick([3, 4, 5]), 2, shuffle=False, seed=0, workers=workers)
        assert [labels.tolist() for _, labels in found] == [[0, 1], [2]]
    assert len(pickle.loads(pickle.dumps(data.train))) == 12


def test_a_hub_data_set_without_validation(hub, tmp_path):
    """Its test split keeps its labels secret."""
    labels = {"train": [0, 1] * 20, "test": [-1] * 5}
    data = open_data(write_hub(hub, tmp_path / "set", labels, hub.ClassLabel(names=["ant", "bee"])), 16, None, seed=0)
    assert (len(data.train), sorted(data.val.labels)) == (36, [0, 0, 1, 1])
    assert sorted(levels(data.train) + levels(data.val)) == list(range(40))
    assert all(level % 2 == label for level, label in zip(levels(data.val), data.val.labels, strict=True))


def test_labels_in_words(hub, tmp_path):
    labels = {"train": ["class 10", "class 9"] * 3, "test": ["class 9", "class 10"]}
    name = write_hub(hub, tmp_path / "set", labels, hub.Value("string"), image="img", label="target")
    data = open_data(name, 16, None, seed=0)
    assert data.classes == ["class 9", "class 10"]
    assert (data.train.labels, data.val.labels) == ([1, 0] * 3, [0, 1])
    assert data.name == f"{name} (label: target)"


def test_labels_in_numbers(hub, tmp_path):
    name = write_hub(hub, tmp_path / "set", {"train": [0, 1, 5] * 3, "test": [0, 1]}, hub.Value("int64"))
    assert open_data(name, 16, None, seed=0).classes == list("012345")
    assert len(open_data(name, 16, 8, seed=0).classes) == 8
    assert message(name, 5) == f"{name} has label 5 but --num-classes 5 ends at 4"


@pytest.mark.parametrize(
    ("labels", "feature", "column", "expected"),
    [
        ({"train": [0, 0, 0]}, "int64", "label", "has one class ('0')"),
        ({"train": [0, 0, 0, 1]}, "int64", "label", "/1 holds one image"),
        ({"train": [0, None, 1]}, "int64", "label", "has images without a label"),
        ({"train": [0.5, 1.5]}, "float64", "label", "column label holds no labels but Value"),
        ({"train": [[0, 1], [1]]}, "lists", "label", "column label holds no labels but List"),
        ({"train": [0, 1]}, "int64", "kind", "needs a column of images and one of labels, but has image, kind"),
        ({"test": [0, 1]}, "int64", "label", "has no split 'train' but test"),
    ],
)
def test_hub_data_that_is_refused(hub, tmp_path, labels, feature, column, expected):
    of = hub.Sequence(hub.Value("int64")) if feature == "lists" else hub.Value(feature)
    assert expected in message(write_hub(hub, tmp_path / "set", labels, of, label=column))


def test_a_hub_that_cannot_be_reached(hub, no_network, pauses):
    found = message("hfds/nobody/nothing")
    assert re.match(
        r"hfds/nobody/nothing cannot be loaded \(.*nobody/nothing.*\): fetch https://huggingface.co/data", found
    )
    assert found.endswith("elsewhere and give hfds/FOLDER, or --data DIR")
    assert pauses == []


def test_a_hub_folder_without_data(hub, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in message(f"hfds/{tmp_path / 'empty'}")


def test_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert message("hfds/cifar10") == "hfds/cifar10 needs the package datasets: pip install 'vitnas[huggingface]'"


# Shards


def write_shard(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, split: str, count: int, each: int, first: int = 0) -> None:
    """Image i has the grey level i and label i % 2."""
    for shard in range(count):
        numbers = range(first + shard * each, first + (shard + 1) * each)
        members = [
            part
            for i in numbers
            for part in ((f"{i:05}.png", picture(i)), (f"{i:05}.cls", str(i % 2).encode()), (f"{i:05}.json", b"{}"))
        ]
        write_shard(folder / f"{split}-{shard:04}.tar", *members)


def test_shards_of_train_and_val(tmp_path):
    write_shards(tmp_path / "s", "set-train", 3, 10)
    write_shards(tmp_path / "s", "set-val", 1, 8, first=100)
    for name in (f"wds/{tmp_path / 's'}", str(tmp_path / "s" / "set-{train-{0000..0002},val-0000}.tar")):
        data = open_data(name, 16, 2, seed=0)
        assert (data.name, data.classes) == (name.removeprefix("wds/"), ["0", "1"])
        assert (levels(data.train), levels(data.val)) == (list(range(30)), list(range(100, 108)))
        assert all(level % 2 == label for level, label in zip(levels(data.train), data.train.labels, strict=True))
        assert str(data.train.sources[11]) == f"{tmp_path}/s/set-train-0001.tar/00011.png"
    assert len(open_data(tmp_path / "s" / "set-train-*.tar", 16, 2, seed=0).train) == 26


def test_shards_are_split_and_sampled_like_images(tmp_path):
    write_shards(tmp_path / "s", "x", 4, 10)
    data = open_data(f"wds/{tmp_path / 's'}", 16, None, seed=0)
    assert sorted(data.val.labels) == [0, 0, 1, 1]
    assert sorted(levels(data.train) + levels(data.val)) == list(range(40))
    again, other = (open_data(f"wds/{tmp_path / 's'}", 16, None, seed=seed) for seed in (0, 1))
    assert levels(data.val) == levels(again.val) != levels(other.val)
    rest, held = hold_out(data.train, 6, seed=0)
    assert held.labels.count(0) == 3
    assert sorted(levels(rest) + levels(held)) == sorted(levels(data.train))
    part = sample(data.train, 10, seed=0)
    assert part.files.tolist() == [level // 10 for level in levels(part)]
    assert len(pickle.loads(pickle.dumps(part))) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_shuffled_and_go_on(tmp_path, workers):
    write_shards(tmp_path / "s", "train", 4, 10)
    data = open_data(f"wds/{tmp_path / 's'}", 16, None, seed=0)

    def passes(first: int) -> list[torch.Tensor]:
        found = loader(data.train, 8, shuffle=True, seed=0, workers=workers)
        found.set_epoch(first)
        return [torch.cat([images for images, _ in found]) for _ in range(2)]

    first, second = passes(0)
    assert not torch.equal(first.mean((1, 2, 3)), second.mean((1, 2, 3)))
    assert torch.allclose(first.mean((1, 2, 3)).sort()[0], second.mean((1, 2, 3)).sort()[0], atol=1e-4)
    assert torch.equal(passes(1)[0], second)


def test_the_index_is_read_once_and_again_after_a_change(tmp_path, cache, monkeypatch):
    write_shards(tmp_path / "s", "train", 2, 10)
    first = open_data(f"wds/{tmp_path / 's'}", 16, None, seed=0)
    (kept,) = (cache / "shards").glob("*.npz")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-30])
    assert message(f"wds/{tmp_path / 's'}") == f"{kept} is damaged: remove it, and the shards are read again"
    kept.write_bytes(whole)
    scan, calls = shards._scan, []
    monkeypatch.setattr(shards, "_scan", lambda shard: calls.append(shard) or scan(shard))
    again = open_data(f"wds/{tmp_path / 's'}", 16, None, seed=0)
    assert (levels(again.train), again.train.labels, calls) == (levels(first.train), first.train.labels, [])
    write_shards(tmp_path / "s", "train", 2, 14)
    assert len(open_data(f"wds/{tmp_path / 's'}", 16, None, seed=0).train) == 26
    assert len(calls) == 2


def test_a_broken_image_in_a_shard(tmp_path):
    members = [(f"{i:03}.jpg", picture(i, "JPEG")) for i in range(40)]
    members[7] = ("007.jpg", b"no image")
    labels = [(f"{i:03}.cls", b"%d\n" % (i % 2)) for i in range(40)]
    shard = write_shard(
        tmp_path / "train-0.tar", *(part for pair in zip(members, labels, strict=True) for part in pair)
    )
    data = open_data(shard, 16, 2, seed=0)
    found = [loader(part, 8, shuffle=False, seed=0) for part in (data.train, data.val)]
    assert sum(len(labels) for each in found for _, labels in each) == 39
    assert [name for each in found for name in each.skipped] == [f"{shard}/007.jpg"]


def test_labels_beyond_the_classes(tmp_path):
    shard = write_shard(
        tmp_path / "train-0.tar",
        *(part for i in range(12) for part in ((f"{i}.png", picture(i)), (f"{i}.cls", b"%d" % (i % 4)))),
    )
    assert message(shard, 3) == f"{shard} has label 3 but --num-classes 3 ends at 2"
    assert len(open_data(shard, 16, 1000, seed=0).classes) == 1000


LABELLED = (("a.png", picture(1)), ("a.cls", b"0"), ("b.png", picture(2)), ("b.cls", b"0"))


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("a.cls", b"1"), ("a.txt", b"")], "holds no images (.jpg, "),
        ([*LABELLED, ("c.png", picture(0))], "c.png has no c.cls with its label beside it"),
        ([*LABELLED, ("c.png", picture(0)), ("c.cls", b"dog")], "a.png has the label 0 but others words ('dog')"),
        ([*LABELLED, ("c.png", picture(0)), ("c.cls", b"1.5")], "c.cls says 1.5: a label is the number of a class"),
        ([*LABELLED, ("c.png", picture(0)), ("c.cls", b"9" * 400)], f"c.cls says {'9' * 20}: a label is the number of"),
        ([*LABELLED, ("c.png", picture(0)), ("c.json", b'{"label": NaN}')], "c.json says nan: a label is the number"),
        ([*LABELLED, ("c.png", picture(0)), ("c.cls", b" ")], "c.cls says b' ': a label is the number or the name"),
        ([*LABELLED, ("c.png", picture(0)), ("c.json", b"{}")], "c.png has no c.cls with its label beside it, nor has"),
        ([*LABELLED, ("c.png", picture(0)), ("c.json", b"{")], "c.json is no JSON document, and c.png has no c.cls"),
        (
            [*LABELLED, ("c.png", picture(0)), ("c.cls", b"5000")],
            "c.png has label 5,000, but 2 labels are in use",
        ),
        (
            [*LABELLED, ("c.v1.png", picture(0)), ("c.v2.png", picture(0)), ("c.cls", b"1")],
            "c.v1 and c.v2 have one",
        ),
        ([*LABELLED, ("a.jpg", picture(0))], "holds two images called a"),
        ([*LABELLED, ("c.png", picture(0)), ("c.cls", b"-1")], "has images without a label (or with label -1)"),
        (LABELLED, "has one class ('0')"),
    ],
)
def test_shards_that_are_refused(tmp_path, members, expected):
    assert expected in message(write_shard(tmp_path / "x.tar", *members))


@pytest.mark.parametrize(
    ("image", "label", "write"),
    [
        ("{}.PNG", "{}.CLS", "{}"),
        ("img.{}.v2.png", "img.{}.v2.cls", "{}"),
        ("{}.v2.png", "{}.cls", "{}.0"),
        ("{}.png", "{}.json", '{{"label": {}}}'),
    ],
)
def test_labels_that_are_clear(tmp_path, image, label, write):
    members = [
        part
        for i in range(12)
        for part in ((image.format(i), picture(i)), (label.format(i), write.format(i % 2).encode()))
    ]
    data = open_data(write_shard(tmp_path / "x.tar", *members), 16, None, seed=0)
    assert sorted(levels(data.train) + levels(data.val)) == list(range(12))
    assert all(level % 2 == label for level, label in zip(levels(data.train), data.train.labels, strict=True))
    assert data.classes == ["0", "1"]


def test_shards_with_words_and_parts_of_samples(tmp_path):
    members = [
        part
        for i in range(12)
        for part in (
            (f"{i}.gif", picture(i, "GIF")),
            (f"{i}.seg.png", picture(200)),
            (f"{i}.cls", ("dog", "cat")[i % 2].encode()),
        )
    ]
    shard = write_shard(tmp_path / "x.tar", *members, ("lost.cls", b"cat"), ("lost.heic", b""))
    for _ in range(2):  # the second time from the index that is kept
        data = open_data(shard, 16, None, seed=0)
        assert data.classes == ["cat", "dog"]
        assert all((level + 1) % 2 == label for level, label in zip(levels(data.val), data.val.labels, strict=True))
        assert data.left_out == (
            "12 images that are parts of others (0.seg.png)",
            "1 labels without an image that Pillow can open (lost.cls)",
        )


def test_shards_that_are_missing_or_no_tar_files(tmp_path):
    write_shards(tmp_path, "train", 2, 10)
    assert message(str(tmp_path / "train-{0000..0002}.tar")) == f"{tmp_path}/train-0002.tar: no such shard"
    assert message(str(tmp_path / "train-{0..1.tar")) == f"{tmp_path}/train-{{0..1.tar: no such shard"
    assert message(f"wds/{tmp_path}/*.tgz") == f"{tmp_path}/*.tgz: no such shard"
    assert message(f"wds/{tmp_path}/none") == f"{tmp_path}/none: no such shard"
    assert message(tmp_path).endswith(f"for its shards write wds/{tmp_path}")
    (tmp_path / "empty").mkdir()
    assert message(f"wds/{tmp_path}/empty") == f"{tmp_path}/empty holds no shards (*.tar)"
    whole = (tmp_path / "train-0000.tar").read_bytes()
    for content in (b"no tar", whole[:3000]):
        (tmp_path / "cut.tar").write_bytes(content)
        assert "cut.tar is not a whole, uncompressed tar file" in message(tmp_path / "cut.tar")
    (tmp_path / "packed.tar").write_bytes(gzip.compress(whole))
    assert message(tmp_path / "packed.tar").endswith("it is compressed, unpack it to a plain .tar first")


def test_an_index_that_cannot_be_kept(tmp_path, monkeypatch):
    write_shards(tmp_path, "train", 1, 10)
    monkeypatch.setenv("VITNAS_DATA", str(tmp_path / "train-0000.tar"))
    assert re.search(r"cannot write to \S+ \(.+\): \$VITNAS_DATA names another$", message(tmp_path / "train-0000.tar"))


def test_a_shard_that_vanishes(tmp_path):
    write_shards(tmp_path, "train", 1, 10)
    data = open_data(tmp_path / "train-0000.tar", 16, None, seed=0)
    (tmp_path / "train-0000.tar").unlink()
    with pytest.raises(UserError, match=r"cannot be decoded.*train-0000.tar from byte \d+"):
        list(loader(data.train, 4, shuffle=False, seed=0))


def test_long_names_in_a_shard(tmp_path):
    stem = "deep/" * 30 + "picture"
    members = [(f"{stem}{i}.png", picture(i)) for i in range(8)] + [
        (f"{stem}{i}.cls", b"%d" % (i % 2)) for i in range(8)
    ]
    data = open_data(write_shard(tmp_path / "x.tar", *members), 16, None, seed=0)
    assert sorted(levels(data.train) + levels(data.val)) == list(range(8))
