"""What the pruning benchmarks share: images decoded once and augmented as tensors, trained networks and rows kept.

No benchmark itself. Images of 32 x 32 (CIFAR-10's own size; others are resized to it) are enlarged to the network's
resolution. The last `HELD_OUT` images of a fixed shuffle of the training images train nothing: criteria and ablations
see them only.
"""

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils import random_seed
from torch import Tensor, nn

from nas.data.dataset import open_data
from nas.data.images import Images, decode
from nas.training.evaluation import Accuracy, evaluate
from nas.training.fit import fit
from pruning import slice_weights
from pruning.units import Anatomy, Scores, Settings, cut
from search_spaces import Arch, create_model
from search_spaces.arch import Attn
from search_spaces.evit import EvitArch, EvitBlock, Mlp
from search_spaces.registry import FAMILIES

SIDE = 32
SHIFT = 4
BATCH = 64
HELD_OUT = 2048
CALIBRATION = 512
EVALUATED = 5000
SEEDS = (0, 1, 2)
MEAN = torch.tensor(IMAGENET_DEFAULT_MEAN).view(1, 3, 1, 1)
STD = torch.tensor(IMAGENET_DEFAULT_STD).view(1, 3, 1, 1)


def efficientvit(classes: int, resolution: int = 96, name: str = "efficientvit_m0") -> Arch:
    """A published EfficientViT at a smaller resolution: windows of half the first grid, as at 224 pixels."""
    family = FAMILIES["efficientvit"]
    return family.space.arch(dict(family.variants[name].values) | {"resolution": resolution}, classes)


def deit(classes: int, resolution: int = 40) -> Arch:
    """DeiT-T's shape, half as wide: 12 blocks of 96 channels, 3 heads of 32 for q, k and v, MLP ratio 4, patch 8."""
    attn = Attn(heads=3, key_dim=32, value_dim=32, scale=32**-0.5)
    block = EvitBlock(attn=attn, keep_rate=1.0, fuse=False, ffn=Mlp(hidden=384))
    return EvitArch(
        version=1,
        family="evit",
        resolution=resolution,
        num_classes=classes,
        patch_size=8,
        embed_dim=96,
        blocks=(block,) * 12,
    )


@dataclass(frozen=True)
class Pixels:
    """Decoded images (N, 3, SIDE, SIDE) uint8 and their labels (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, end: int) -> "Pixels":
        return Pixels(self.images[start:end], self.labels[start:end])


@dataclass(frozen=True)
class Shuffled:
    """Batches of augmented images (shift, flip), in an order and with shifts that `seed` and the pass decide."""

    dataset: Pixels
    resolution: int
    seed: int
    batch_size: int = BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(self.dataset), generator=generator)
            for chosen in order.split(self.batch_size):
                if len(chosen) == self.batch_size:
                    images = augment(self.dataset.images[chosen], generator)
                    yield enlarge(images, self.resolution), self.dataset.labels[chosen]


@dataclass(frozen=True)
class InOrder:
    """Batches of the images as they are."""

    dataset: Pixels
    resolution: int
    batch_size: int = 128

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.dataset), self.batch_size):
            part = self.dataset.part(start, start + self.batch_size)
            yield enlarge(part.images, self.resolution), part.labels


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to SHIFT pixels and flip half of them."""
    count = len(images)
    padded = F.pad(images, (SHIFT,) * 4)
    rows, cols = (torch.randint(2 * SHIFT + 1, (count, 1), generator=generator) + torch.arange(SIDE) for _ in range(2))
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    cols = torch.where(flipped, cols.flip(1), cols)
    pick = torch.arange(count).view(-1, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1)
    return padded[*pick, rows.view(count, 1, SIDE, 1), cols.view(count, 1, 1, SIDE)]


def enlarge(images: Tensor, resolution: int) -> Tensor:
    floats = (images.float() / 255 - MEAN) / STD
    return F.interpolate(floats, size=(resolution, resolution), mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Data:
    """`train` to train on, `held_out` for criteria and ablations, `test` to evaluate on."""

    classes: int
    train: Pixels
    held_out: Pixels
    test: Pixels

    def calibration(self, resolution: int, seed: int = 0, batch_size: int = 128) -> list[tuple[Tensor, Tensor]]:
        """CALIBRATION held-out images; another seed, others."""
        start = seed * CALIBRATION
        return list(InOrder(self.held_out.part(start, start + CALIBRATION), resolution, batch_size))


def load_data(folder: Path, out: Path) -> Data:
    """Decode an image folder once; later runs read the pixels from `out`."""
    path = out / "pixels.safetensors"
    with FileLock(out / "pixels.lock"):
        if not path.exists():
            found = open_data(folder, SIDE, None, seed=0)
            tensors = {}
            for name, part in (("train", found.train), ("test", found.val)):
                pixels = _decode(part)
                tensors |= {f"{name}.images": pixels.images, f"{name}.labels": pixels.labels}
            save_file(tensors, path)
    tensors = load_file(path)
    train, test = (_mixed(Pixels(tensors[f"{n}.images"], tensors[f"{n}.labels"])) for n in ("train", "test"))
    return Data(
        classes=int(train.labels.max()) + 1,
        train=train.part(0, len(train) - HELD_OUT),
        held_out=train.part(len(train) - HELD_OUT, len(train)),
        test=test.part(0, EVALUATED),
    )


def _decode(part: Images) -> Pixels:
    images = torch.empty(len(part), 3, SIDE, SIDE, dtype=torch.uint8)
    for i, source in enumerate(part.sources):
        images[i] = torch.from_numpy(np.array(decode(source).resize((SIDE, SIDE)))).permute(2, 0, 1)
    return Pixels(images, torch.tensor(part.labels))


def _mixed(pixels: Pixels) -> Pixels:
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return Pixels(pixels.images[order], pixels.labels[order])


def save(model: nn.Module, arch: Arch, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arch.json").write_text(arch.to_json())
    partial = folder / "model.part"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial)
    partial.rename(folder / "model.safetensors")


def load(folder: Path) -> tuple[nn.Module, Arch]:
    arch = Arch.from_json((folder / "arch.json").read_text())
    model = create_model(arch)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), arch


def trained(arch: Arch, data: Data, images: int, lr: float, seed: int, folder: Path) -> tuple[nn.Module, Arch]:
    """The network kept in `folder`, trained first where there is none."""
    if not (folder / "model.safetensors").exists():
        random_seed(seed)
        model = create_model(arch)
        started, used = time.time(), time.process_time()
        fit(model, Shuffled(data.train, arch.resolution, seed), images, lr, seed=seed, progress=said(folder.name))
        found = evaluate(model, InOrder(data.test, arch.resolution))
        row = {"images": images, "lr": lr, "seed": seed, **scored(found)}
        row |= {"wall_s": round(time.time() - started), "cpu_s": round(time.process_time() - used)}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "training.json").write_text(json.dumps(row) + "\n")
        save(model, arch, folder)
        say(f"{folder.name}: {row}")
    return load(folder)


ARCHS = {"efficientvit_m0": (efficientvit, 64_000, 2e-3), "deit": (deit, 80_000, 1e-3)}
"""The networks: an Arch for a number of classes, and the images and learning rate it is trained with."""


def dense(name: str, data: Data, seed: int, out: Path) -> tuple[nn.Module, Arch]:
    """The unpruned network of a seed, trained first where `out` does not hold it."""
    build, images, lr = ARCHS[name]
    return trained(build(data.classes), data, images, lr, seed, out / f"{name}-dense-{seed}")


def dense_top1(name: str, seed: int, out: Path) -> float:
    """Test accuracy of a dense network when its training ended."""
    return json.loads((out / f"{name}-dense-{seed}" / "training.json").read_text())["top1"]


def child(model: nn.Module, parts: Anatomy, scores: Scores, settings: Settings, seed: int) -> tuple[nn.Module, Arch]:
    """The network at these settings, with its weights cut and grown."""
    found = cut(parts, scores, settings)
    generator = torch.Generator().manual_seed(seed)
    weights = slice_weights(parts.arch, model.state_dict(), found.arch, found.select, found.blocks, generator)
    smaller = create_model(found.arch)
    smaller.load_state_dict(weights)
    return smaller.eval(), found.arch


def scored(found: Accuracy) -> dict[str, float]:
    return {"top1": found.top1, "loss": found.loss}


def said(label: str, every: int = 100) -> Callable[[int, int, float], None]:
    """A progress function that writes a line to stderr every so many updates, with the mean loss since the last."""
    losses: list[float] = []

    def progress(done: int, total: int, loss: float) -> None:
        losses.append(loss)
        if len(losses) % every == 0 or done == total:
            say(f"{label}: {done:,} of {total:,} images, loss {sum(losses[-every:]) / len(losses[-every:]):.3f}")

    return progress


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)


class Rows:
    """Rows of a JSON Lines file, one a finished cell: a run that was killed goes on with the next, and others that
    write to it at the same time are heeded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []

    def has(self, **cell: object) -> bool:
        return any(all(row.get(key) == value for key, value in cell.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    names = list(header)
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows]) + "\n"


def common_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="image folder with train/ beside val/ or test/")
    parser.add_argument("--out", type=Path, required=True, help="folder of what was trained and found")
    parser.add_argument("--threads", type=int, default=1)


def prepare(args: Namespace) -> Data:
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    return load_data(args.data, args.out)
