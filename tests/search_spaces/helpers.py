"""Random networks, random weights and error measures for the tests of search_spaces and pruning."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from pruning import slice_weights
from pruning.importance import score
from pruning.units import Anatomy, Cut, Knob, Scores, anatomy
from search_spaces import Arch, evit
from search_spaces.gates import Gate
from search_spaces.registry import FAMILIES
from search_spaces.widths import Each, widths_of

SMALLEST = {
    "levit": "levit_128s",
    "efficientvit": "efficientvit_m0",
    "shvit": "shvit_s1",
    "evit": "evit_tiny_keep70",
    "sepvit": "sepvit_lite",
}
INITIALISERS = dict.fromkeys(
    ("kaiming_uniform_", "uniform_", "trunc_normal_", "ones_", "zeros_", "constant_"), lambda tensor, *_, **__: tensor
)
"""Of parameters that are to be random anyway."""
RATES = (0.3, 0.5, 0.55, 0.7, 0.9, 1.0, 1.0)


def build(arch: Arch, seed: int | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The network of an Arch in eval mode; with a seed every parameter and buffer is random."""
    with nullcontext() if seed is None else mock.patch.multiple(nn.init, **INITIALISERS):
        model = FAMILIES[arch.family].build(arch).to(dtype).eval()
    return model if seed is None else randomise(model, seed)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Replace every parameter and every running statistic so that no term is zero, one or negligible."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * std)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            is_norm = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm)
            is_product = isinstance(module, nn.Linear | nn.Conv2d)
            for name, value in module.named_parameters(recurse=False):
                if is_norm and name == "weight":
                    uniform(value, 0.3, 0.9)
                elif name == "bias":
                    normal(value, 0.3)
                elif is_product and name == "weight":
                    normal(value, (value[0].numel()) ** -0.5)
                else:
                    normal(value, 0.7)
            for name, value in module.named_buffers(recurse=False):
                if name == "running_mean":
                    normal(value, 0.3)
                elif name == "running_var":
                    uniform(value, 0.5, 2.0)
    return model


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor, seed: int) -> nn.Module:
    """Set each BatchNorm's running statistics near those of its input, so that activations stay moderate in eval mode.

    They are off by up to a third of a deviation and a factor of two in variance, and later layers see the result.
    """
    generator = torch.Generator().manual_seed(seed)

    def measure(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        values = inputs[0].transpose(0, 1).flatten(1)
        std = values.std(1) + 1e-3
        noise = torch.rand(2, std.numel(), generator=generator, dtype=torch.float64).to(std)
        norm.running_mean.copy_(values.mean(1) + std * (noise[0] - 0.5) * 0.6)
        norm.running_var.copy_(std.square() * 2 ** (2 * noise[1] - 1))

    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    model.eval()
    model(x)
    for handle in handles:
        handle.remove()
    return model


def image(arch_or_size: Arch | int, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random images for an Arch: coarse patches under noise, so that they still differ after pooling."""
    size = arch_or_size if isinstance(arch_or_size, int) else arch_or_size.resolution
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, 3, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)
    return (nn.functional.interpolate(coarse, size=size) + 0.5 * noise).to(dtype)


def error(found: Tensor, wanted: Tensor, whole: Tensor | None = None) -> float:
    """Largest deviation relative to how much `wanted` (or `whole`) varies between images (not to what all share)."""
    found, wanted = found.detach(), wanted.detach()
    assert found.shape == wanted.shape
    assert found.isfinite().all()
    scale = wanted if whole is None else whole
    spread = (scale - scale.mean(0)).abs().max() if scale.shape[0] > 1 else scale.abs().max()
    assert spread > 1e-3, "the reference does not depend on the image: the comparison would show nothing"
    return float((found - wanted).abs().max() / spread)


def document(arch: Arch) -> dict[str, Any]:
    """An Arch as plain JSON values."""
    return json.loads(arch.to_json())


def read(raw: dict[str, Any]) -> Arch:
    """The Arch of plain JSON values."""
    return Arch.from_json(json.dumps(raw))


def random_arch(family: str, seed: int, **changes: Any) -> Arch:
    """A small irregular network: every block has its own heads, widths, keep rate; parts are missing at random."""
    rng = random.Random(seed)
    raw = {"version": 1, "family": family, "num_classes": rng.randint(2, 7), **RANDOM[family](rng), **changes}
    return read(raw)


def _maybe(rng: random.Random, value: Any, chance: float = 0.8) -> Any:
    return value if rng.random() < chance else None


def _attn(rng: random.Random) -> dict[str, Any]:
    return {
        "heads": rng.randint(1, 3),
        "key_dim": rng.randint(2, 7),
        "value_dim": rng.randint(2, 7),
        "scale": round(rng.uniform(0.2, 0.9), 3),
    }


def _ffn(rng: random.Random) -> dict[str, Any]:
    return {"hidden": rng.randint(4, 20), "keep_rate": rng.choice(RATES)}


def _stem(rng: random.Random) -> list[int]:
    return [rng.randint(3, 8) for _ in range(3)]


def _levit(rng: random.Random) -> dict[str, Any]:
    count = rng.randint(1, 3)
    stages = [
        {
            "embed_dim": rng.randint(6, 20),
            "downsample": {"attn": _attn(rng), "ffn": _maybe(rng, _ffn(rng))} if s else None,
            "keep_rate": rng.choice(RATES) if s == count - 1 else 1.0,
            "blocks": [
                {"attn": _maybe(rng, _attn(rng)), "ffn": _maybe(rng, _ffn(rng))} for _ in range(rng.randint(0, 3))
            ],
        }
        for s in range(count)
    ]
    return {
        "resolution": rng.choice((64, 80, 100)),
        "form": rng.choice(("linear", "conv")),
        "distilled": rng.random() < 0.5,
        "stem": _stem(rng),
        "stages": stages,
    }


def _mixer(rng: random.Random) -> dict[str, Any]:
    return {"conv": rng.random() < 0.8, "ffn": _maybe(rng, _ffn(rng))}


def _merge(rng: random.Random) -> dict[str, Any]:
    return {
        "before": _mixer(rng),
        "hidden": rng.randint(6, 24),
        "squeezed": _maybe(rng, rng.randint(2, 8)),
        "after": _mixer(rng),
    }


def _cascade(rng: random.Random, embed: int) -> dict[str, Any]:
    count = rng.randint(1, 3)
    dims = [rng.randint(2, embed // 2) for _ in range(count)]
    heads = [
        {
            "offset": rng.randint(0, embed - dims[j]),
            "dim": dims[j],
            "key_dim": rng.randint(2, 6),
            "value_dim": dims[j + 1] if j + 1 < count else rng.randint(2, 7),
            "kernel": rng.choice((1, 3, 5, 7)),
            "scale": round(rng.uniform(0.2, 0.9), 3),
        }
        for j in range(count)
    ]
    return {"window": rng.randint(2, 6), "heads": heads}


def _efficientvit(rng: random.Random) -> dict[str, Any]:
    stages = []
    for s in range(rng.randint(1, 3)):
        embed = rng.randint(8, 20)
        blocks = [
            {
                "before": [_mixer(rng) for _ in range(rng.randint(0, 2))],
                "attn": _maybe(rng, _cascade(rng, embed)),
                "after": [_mixer(rng) for _ in range(rng.randint(0, 2))],
            }
            for _ in range(rng.randint(0, 3))
        ]
        stages.append({"embed_dim": embed, "downsample": _merge(rng) if s else None, "blocks": blocks})
    return {
        "resolution": rng.choice((64, 80, 100)),
        "distilled": rng.random() < 0.5,
        "stem": _stem(rng),
        "stages": stages,
    }


def _shvit(rng: random.Random) -> dict[str, Any]:
    stages = []
    for s in range(rng.randint(1, 3)):
        embed = rng.randint(8, 20)
        blocks = [
            {
                "conv": rng.random() < 0.8,
                "attn": _maybe(rng, {"dim": rng.choice((embed, rng.randint(2, embed - 1))), **_attn(rng)}),
                "ffn": _maybe(rng, _ffn(rng)),
            }
            for _ in range(rng.randint(0, 3))
        ]
        stages.append({"embed_dim": embed, "downsample": _merge(rng) if s else None, "blocks": blocks})
    return {
        "resolution": rng.choice((64, 80, 100)),
        "distilled": rng.random() < 0.5,
        "stem": _stem(rng),
        "stages": stages,
    }


def _evit(rng: random.Random) -> dict[str, Any]:
    patch = rng.choice((4, 8, 16))
    blocks = []
    for i in range(rng.randint(1, 4)):
        attn = _maybe(rng, _attn(rng), chance=0.8 if i else 1.0)  # without any, the class token would see no image
        rate, way = rng.choice(RATES) if attn else 1.0, rng.random()
        blocks.append(
            {
                "attn": attn,
                "keep_rate": rate,
                "fuse": way < 0.5,
                "merge": way > 0.7 and rate >= 0.5,
                "ffn": _maybe(rng, {"hidden": rng.randint(4, 20)}),
            }
        )
    return {
        "resolution": patch * max(rng.randint(2, 5), 16 // patch),
        "patch_size": patch,
        "embed_dim": rng.randint(6, 20),
        "blocks": blocks,
    }


def _sepvit(rng: random.Random) -> dict[str, Any]:
    grid, stages = 8, []
    for _ in range(rng.randint(1, 3)):
        embed, blocks = rng.randint(6, 16), []
        for _ in range(rng.randint(0, 3)):
            attn = _attn(rng)
            inner = attn["heads"] * attn["value_dim"]
            attn |= {
                "window": rng.choice([w for w in (1, 2, 4, 8) if w <= grid]),
                "point_key_dim": rng.randint(2, 6),
                "point_scale": round(rng.uniform(0.2, 0.9), 3),
                "keep_rate": rng.choice(RATES),
                "residual": _maybe(rng, [rng.randint(-1, embed - 1) for _ in range(inner)], 0.4),
            }
            blocks.append({"attn": _maybe(rng, attn), "ffn": _maybe(rng, _ffn(rng))})
        stages.append({"embed_dim": embed, "blocks": blocks})
        grid //= 2
    return {"resolution": 32, "stages": stages}


RANDOM = {
    "levit": _levit,
    "efficientvit": _efficientvit,
    "shvit": _shvit,
    "evit": _evit,
    "sepvit": _sepvit,
}


def shrink(arch: Arch, seed: int) -> tuple[Arch, dict[str, str]]:
    """A smaller network that fits into `arch`, and which of its blocks come from which."""
    rng = random.Random(seed)
    raw = document(arch)
    stages = raw.get("stages", [raw])
    renames: dict[str, str] = {}
    if "stem" in raw:
        raw["stem"] = [rng.randint(1, width) for width in raw["stem"]]
    for s, stage in enumerate(stages):
        before, stage["embed_dim"] = (
            stage["embed_dim"],
            rng.randint(max(2, stage["embed_dim"] // 2), stage["embed_dim"]),
        )
        prefix = f"stages.{s}.blocks" if "stages" in raw else "blocks"
        depth = len(stage["blocks"])
        least = 0 if "stages" in raw else 1
        chosen = sorted(rng.sample(range(depth), rng.randint(min(least, depth), depth)))
        renames |= {f"{prefix}.{ours}": f"{prefix}.{theirs}" for ours, theirs in enumerate(chosen)}
        stage["blocks"] = [stage["blocks"][theirs] for theirs in chosen]
        for part in (stage.get("downsample"), *stage["blocks"]):
            _shrink_part(part, rng, before, stage["embed_dim"])
    return read(raw), renames


def _shrink_part(part: Any, rng: random.Random, before: int, embed: int) -> None:
    """Shrink the widths of a block or downsampling in place; `before` and `embed` are its old and new width."""
    if isinstance(part, list):
        for item in part:
            _shrink_part(item, rng, before, embed)
        return
    if not isinstance(part, dict):
        return
    cascade = part.get("heads")
    if isinstance(cascade, list):
        _shrink_cascade(cascade, rng, embed)
        return
    if "dim" in part:
        rest = before - part["dim"]
        part["dim"] = rng.randint(max(1, embed - rest), min(part["dim"], embed))
    for key in ("heads", "key_dim", "value_dim", "point_key_dim", "hidden", "squeezed"):
        if part.get(key):
            part[key] = rng.randint(1, part[key])
    if part.get("residual") is not None:
        part["residual"] = [rng.randint(-1, embed - 1) for _ in range(part["heads"] * part["value_dim"])]
    for value in part.values():
        _shrink_part(value, rng, before, embed)


def _shrink_cascade(heads: list[dict[str, Any]], rng: random.Random, embed: int) -> None:
    del heads[rng.randint(1, len(heads)) :]
    for head in heads:
        head["dim"] = rng.randint(1, min(head["dim"], embed))
        head["offset"] = min(head["offset"], embed - head["dim"])
        head["key_dim"] = rng.randint(1, head["key_dim"])
        head["kernel"] = rng.randrange(1, head["kernel"] + 1, 2)
    for j, head in enumerate(heads):
        head["value_dim"] = heads[j + 1]["dim"] if j + 1 < len(heads) else rng.randint(1, head["value_dim"])


def assert_equals_reference(reference: Callable[..., Tensor], arch: Arch, seed: int) -> None:
    """The network equals reference(arch, state, image), image by image."""
    model = build(arch, seed)
    x = image(arch, 2, seed)
    state = model.state_dict()
    with torch.no_grad():
        found = model(x)
    wanted = torch.stack([reference(arch, state, pixels) for pixels in x])
    assert error(found, wanted) < 1e-8  # float64; the requirement is 1e-5


# Networks taken apart, for the tests of pruning


@dataclass(frozen=True)
class Subject:
    """A random network with its anatomy, random scores, images, labels and its logits. Shared: leave it as it is."""

    arch: Arch
    model: nn.Module
    parts: Anatomy
    scores: Scores
    x: Tensor
    labels: Tensor
    out: Tensor

    def unprovable(self) -> set[str]:
        """Widths whose units cannot go without a trace: what is left is normalised anew.

        LayerNorm and GroupNorm over them; in EViT, the mean over heads of the attention that ranks tokens, or of the
        keys that match them.
        """
        norms = [m for m in self.model.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)]
        blocks = [(name, module) for name, module in self.model.named_modules() if isinstance(module, evit.Block)]
        reducing = {name: block for name, block in blocks if block.keep < block.patches}
        ranking = {f"{name}.attn.heads" for name in reducing}
        matching = {f"{name}.attn.qk" for name, block in reducing.items() if block.merge}
        return {width.name for norm in norms for width in widths_of(norm.axes["weight"][0])} | ranking | matching

    def provable(self) -> list[Knob]:
        """Knobs whose units can go without a trace."""
        unprovable = self.unprovable()
        return [knob for knob in self.parts.knobs if not unprovable & {knob.width, *knob.follows}]


@functools.cache
def subject(family: str, seed: int, whole: bool = False) -> Subject:
    """The `seed`th random network of a family, calibrated; `whole`: with no token dropped."""
    arch = random_arch(family, seed)
    if whole:
        arch = read(_replaced(document(arch), "keep_rate", 1.0))
    model, x = build(arch, seed), image(arch, 4, seed)
    calibrate(model, x, seed)
    parts = anatomy(arch)
    scores = score(model, parts, (), "random", seed)
    with torch.no_grad():
        return Subject(arch, model, parts, scores, x, torch.arange(4) % arch.num_classes, model(x))


def _replaced(part: Any, key: str, value: Any) -> Any:
    """A document with another value wherever it has a key."""
    if isinstance(part, dict):
        return {name: value if name == key else _replaced(inner, key, value) for name, inner in part.items()}
    return [_replaced(inner, key, value) for inner in part] if isinstance(part, list) else part


def unit_name(knob: Knob) -> str:
    """What a knob's units are called: "stem", or the last part of its path."""
    return "stem" if knob.width.startswith("stem.") else knob.width.split(".")[-1]


def shrunk(knobs: Iterable[Knob], seed: int) -> dict[str, int]:
    """Random smaller sizes."""
    rng = random.Random(seed)
    return {k.name: 0 if k.kind == "blocks" else rng.randint((k.size + 1) // 2, max(1, k.size - 1)) for k in knobs}


def child_of(subject: Subject, cut: Cut, seed: int = 0) -> nn.Module:
    """The network of a cut, with weights sliced out of its subject's."""
    generator = torch.Generator().manual_seed(seed)
    weights = subject.model.state_dict()
    child = build(cut.arch)
    child.load_state_dict(slice_weights(subject.arch, weights, cut.arch, cut.select, cut.blocks, generator))
    return child


def gate_units(gate: Gate, name: str) -> np.ndarray | None:
    """Which unit of a width (counted head by head) or branch each entry of a gate's mask silences; None: of none."""
    width = gate.axis.inner if isinstance(gate.axis, Each) else gate.axis
    numbers = np.arange(np.prod(gate.units)).reshape(gate.units)
    if name == width.name:
        return numbers
    if width.part_of is not None and width.part_of[0] == name:
        return numbers + width.part_of[1]
    if gate.heads is not None and gate.heads[0].name == name:
        return numbers // gate.units[-1] if gate.heads[1] is None else np.full(gate.units, gate.heads[1])
    return np.zeros(gate.units, dtype=int) if gate.branch == name else None


@contextmanager
def masks(model: nn.Module, of: Callable[[Gate], np.ndarray]) -> Iterator[None]:
    """A network with the masks (B or 1, *units) that `of` gives for its gates."""
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    for gate in gates:
        gate.mask = torch.from_numpy(of(gate))
    try:
        yield
    finally:
        for gate in gates:
            gate.mask = None


@torch.no_grad()
def silenced(subject: Subject, cut: Cut, gone: Collection[str] = ()) -> Tensor:
    """Logits of a subject whose gates are shut for all that a cut removes."""
    kept = dict.fromkeys(gone, np.zeros(1))
    rows = {knob.width: knob.rows for knob in subject.parts.knobs}
    for name, chosen in cut.select.items():
        flags = np.zeros((rows[name], subject.parts.sizes[name]))
        for row, units in zip(flags, np.broadcast_to(chosen, (rows[name], chosen.shape[-1])), strict=True):
            row[units[units >= 0]] = 1
        kept[name] = flags.flatten()

    def mask(gate: Gate) -> np.ndarray:
        found = np.ones(gate.units)
        for name, flags in kept.items():
            units = gate_units(gate, name)
            if units is not None:
                found *= flags[units]
        return found[None]

    with masks(subject.model, mask):
        return subject.model(subject.x)
