"""Batches: the same after a restart and for any number of workers, parts for ranks, repeats, images kept in memory."""

from __future__ import annotations

import gc
import itertools
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nas.data import batches, images
from nas.data.batches import loader
from nas.data.images import Augmentation, Images, cached, plain_transform, train_transform
from nas.data.memory import cgroup_memory

EVERYTHING = Augmentation(scale=0.2, auto_augment="rand-m9-mstd0.5-inc1", erasing=0.5)


def numbered(count: int, transform: object = None) -> Images:
    """Random pictures; each one's label is its number."""
    pixels = np.random.default_rng(0).integers(0, 255, (count, 12, 10, 3), dtype=np.uint8)
    return Images(list(pixels), list(range(count)), transform or plain_transform(8))


def augmented(count: int) -> Images:
    return numbered(count, train_transform(8, EVERYTHING, demo=False))


def passes(count: int, **options: int) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of each of three passes."""
    found = loader(augmented(count), 4, shuffle=True, seed=5, **options)
    return [tuple(torch.cat(part) for part in zip(*found, strict=True)) for _ in range(3)]


def equal(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_is_the_same_after_a_restart(workers):
    """Whatever was drawn before it, and whether or not earlier passes took place."""
    wanted = passes(18)
    assert not torch.equal(wanted[0][1], wanted[1][1])
    random.seed(workers)
    np.random.seed(workers)
    torch.manual_seed(workers)
    resumed = loader(augmented(18), 4, shuffle=True, seed=5, workers=workers)
    resumed.set_epoch(1)
    for epoch in (1, 2):
        assert equal(wanted[epoch], tuple(torch.cat(part) for part in zip(*resumed, strict=True)))
    resumed.set_epoch(0)
    list(itertools.islice(resumed, 2))  # a pass broken off
    resumed.set_epoch(0)
    assert equal(wanted[0], tuple(torch.cat(part) for part in zip(*resumed, strict=True)))


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    data = augmented(20)

    def shown(batch_size: int, shuffle: bool, seed: int, epoch: int) -> dict[int, Tensor]:
        found = loader(data, batch_size, shuffle, seed)
        found.set_epoch(epoch)
        return {int(label): image for batch in found for image, label in zip(*batch, strict=True)}

    wanted = shown(4, True, 7, 3)
    assert all(torch.equal(image, wanted[label]) for label, image in shown(7, False, 7, 3).items())
    for seed, epoch in ((8, 3), (7, 4), (3, 7)):
        assert not any(torch.equal(image, wanted[label]) for label, image in shown(4, True, seed, epoch).items())


def test_no_strength_of_augmentation_fails():
    """timm's policy at its strongest, on enough images that each of its operations has its turn."""
    data = numbered(800, train_transform(8, Augmentation(auto_augment="rand-m10-mstd0.5-inc1", erasing=0.5), False))
    assert all(torch.isfinite(found).all() for found, _ in loader(data, 100, True, seed=0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_leaves_the_global_generators_alone(workers):
    def state() -> bytes:
        return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))

    before = state()
    list(loader(augmented(9), 4, shuffle=True, seed=0, workers=workers))
    assert state() == before


def test_a_transform_that_fails_leaves_them_alone_too():
    def fail(image: Image.Image) -> Tensor:
        raise ArithmeticError

    before = random.getstate()
    with pytest.raises(ArithmeticError):
        list(loader(numbered(4, fail), 4, shuffle=False, seed=0))
    assert random.getstate() == before


@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_have_disjoint_parts_of_equal_length(shuffle):
    data = numbered(23)

    def part(rank: int, epoch: int = 0) -> list[int]:
        found = loader(data, 4, shuffle, seed=1, rank=rank, world_size=4)
        found.set_epoch(epoch)
        assert len(found) == 2
        return [label for _, labels in found for label in labels.tolist()]

    parts = [part(rank) for rank in range(4)]
    assert [len(each) for each in parts] == [5] * 4
    assert len(set().union(*parts)) == 20
    alone = [label for _, labels in loader(data, 4, shuffle, seed=1) for label in labels.tolist()]
    assert alone[:20] == [label for together in zip(*parts, strict=True) for label in together]
    if shuffle:
        left_out = [set(range(23)) - {label for rank in range(4) for label in part(rank, epoch)} for epoch in (0, 1)]
        assert left_out[0] != left_out[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_repeats(world_size):
    """12 images, three times each, in a pass of 12: four of them; the copies differ and lie on different ranks."""
    parts = []
    for rank in range(world_size):
        found = loader(augmented(12), 4, True, seed=2, rank=rank, world_size=world_size, repeats=3)
        parts.append([(int(label), image) for batch in found for image, label in zip(*batch, strict=True)])
    assert [len(each) for each in parts] == [12 // world_size] * world_size
    copies: dict[int, list[Tensor]] = {}
    for label, image in itertools.chain(*parts):
        copies.setdefault(label, []).append(image)
    assert [len(each) for each in copies.values()] == [3] * 4
    for first, second, third in copies.values():
        assert not torch.equal(first, second)
        assert not torch.equal(second, third)
    if world_size == 3:
        assert all(len({label for label, _ in part}) == 4 for part in parts)


def test_images_in_files_come_nearly_file_by_file(monkeypatch):
    monkeypatch.setattr(batches, "SHUFFLE_BUFFER", 10)
    data = numbered(60)
    data.files = np.repeat(np.arange(6), 10)

    def order(epoch: int) -> list[int]:
        found = loader(data, 60, shuffle=True, seed=0)
        found.set_epoch(epoch)
        return next(iter(found))[1].tolist()

    first = order(0)
    assert sorted(first) == list(range(60))
    assert first == order(0) != order(1)
    turns = list(dict.fromkeys(label // 10 for label in first))
    assert turns != list(range(6))
    for place, label in enumerate(first):  # ten places of delay, and as many of others that came before
        assert abs(place - (10 * turns.index(label // 10) + label % 10)) <= 10
    assert sum(a + 1 == b for a, b in itertools.pairwise(first)) < 20


def photographs(folder: Path, count: int = 6) -> list[Path]:
    files = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (9, 12, 3), dtype=np.uint8)
        files.append(folder / f"{i}.jpg")
        Image.fromarray(pixels).resize((120, 90)).save(files[-1])
    return files


def test_cached_images_are_read_once_and_look_the_same(tmp_path):
    files = photographs(tmp_path)
    data = Images(files, list(range(6)), plain_transform(32), files=np.zeros(6, np.int64))
    kept = cached(data, 32)
    assert (kept.labels, kept.transform, kept.files is data.files) == (data.labels, data.transform, True)
    assert {source.shape for source in kept.sources} == {(36, 48, 3)}  # floor(32 / 0.875) high
    wanted = [data[i][0] for i in range(6)]
    for file in files:
        file.unlink()
    assert all(torch.equal(kept[i][0], wanted[i]) for i in range(6))


def test_small_images_are_cached_as_they_are(tmp_path):
    data = Images(photographs(tmp_path), list(range(6)), train_transform(224, EVERYTHING, demo=False))
    kept = cached(data, 224)
    assert {source.shape for source in kept.sources} == {(90, 120, 3)}
    first, second = ([image for image, _ in loader(each, 6, True, seed=0)] for each in (data, kept))
    assert torch.equal(first[0], second[0])


def test_broken_images_stay_broken_in_memory(tmp_path):
    files = photographs(tmp_path, 40)
    files[3].write_text("no image")
    kept = cached(Images(files, [0] * 40, plain_transform(32)), 32)
    found = loader(kept, 8, shuffle=False, seed=0)
    assert sum(len(labels) for _, labels in found) == 39
    assert found.skipped == [str(files[3])]


IMAGE = 36 * 48 * 3
"""Bytes of one of the photographs, reduced."""


def in_memory(data: Images) -> int:
    return sum(isinstance(source, np.ndarray) for source in data.sources)


def test_caches_share_one_bound(tmp_path, monkeypatch):
    """What has no room is decoded each time, to the same pixels; what is dropped makes room."""
    said: list[str] = []
    files = photographs(tmp_path)
    data = Images(files, list(range(6)), train_transform(32, EVERYTHING, demo=False))
    whole = cached(data, 32, said.append)
    assert (in_memory(whole), said) == (6, [])
    wanted = list(loader(whole, 6, True, seed=0))
    del whole
    gc.collect()
    assert images._held == 0
    monkeypatch.setattr(images, "CACHE_LIMIT", 10 * IMAGE)
    first, second = cached(data, 32, said.append), cached(data, 32, said.append)
    assert (in_memory(first), in_memory(second)) == (6, 4)
    assert said == ["no memory to keep more than 4 of 6 images decoded: the others are decoded each time"]
    assert all(equal(*pair) for pair in zip(loader(second, 6, True, seed=0), wanted, strict=True))
    assert str(second.sources[5]) == str(files[5])
    del first
    gc.collect()
    assert in_memory(cached(data, 32)) == 6


def test_caches_leave_half_of_the_free_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "free_memory", lambda: 6 * IMAGE)
    data = Images(photographs(tmp_path), list(range(6)), plain_transform(32))
    assert in_memory(cached(data, 32, lambda line: None)) == 3


def test_a_cache_that_finds_no_memory_ends_there(tmp_path, monkeypatch):
    said: list[str] = []
    data = Images(photographs(tmp_path), list(range(6)), plain_transform(32))
    whole, decoded = images.decode, itertools.count()

    def failing(source: object) -> Image.Image:
        if next(decoded) == 2:
            raise MemoryError
        return whole(source)

    monkeypatch.setattr(images, "decode", failing)
    kept = cached(data, 32, said.append)
    assert in_memory(kept) == 2
    assert said == ["no memory to keep more than 2 of 6 images decoded: the others are decoded each time"]
    assert sum(len(labels) for _, labels in loader(kept, 6, False, seed=0)) == 6


CGROUPS = [
    ("0::/a/b", "", ("memory.max", "memory.current", "inactive_file")),
    ("3:cpu:/x\n5:memory:/a/b", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
]


@pytest.mark.parametrize(("own", "mount", "names"), CGROUPS, ids=["cgroup 2", "cgroup 1"])
def test_memory_of_the_tightest_cgroup(tmp_path, own, mount, names):
    (tmp_path / "own").write_text(own)
    for folder, limit, used in (("a", "1000", 700), ("a/b", "5000", 600)):
        group = tmp_path / "root" / mount / folder
        group.mkdir(parents=True)
        for name, value in zip(names[:2], (limit, used), strict=True):
            (group / name).write_text(f"{value}\n")
        (group / "memory.stat").write_text(f"anon 5\n{names[2]} 50\n")
    assert cgroup_memory(tmp_path / "root", tmp_path / "own") == 1000 - 700 + 50
    (tmp_path / "root" / mount / "a" / names[0]).write_text("max\n" if mount == "" else f"{2**63 - 4096}\n")
    assert cgroup_memory(tmp_path / "root", tmp_path / "own") == 5000 - 600 + 50
    assert cgroup_memory(tmp_path / "none", tmp_path / "own") == sys.maxsize
