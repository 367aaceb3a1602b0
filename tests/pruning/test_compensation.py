"""Compensation: what other units can say of those that were cut is made good, and nothing else is touched."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pruning import compensation
from pruning.compensation import Source, compensate, refit
from pruning.slicing import origins_of, slice_weights
from pruning.units import cut, with_all_tokens
from search_spaces import Arch, table
from search_spaces.registry import FAMILIES
from search_spaces.widths import places

State = dict[str, Tensor]

HEADS, EMBED = 3, 12
ATTN = {"heads": HEADS, "key_dim": 5, "value_dim": 6, "scale": 0.55}
FFN = {"hidden": 14, "keep_rate": 1.0}
MIXER = {"conv": True, "ffn": FFN}
MERGE = {"before": MIXER, "hidden": 16, "squeezed": 4, "after": MIXER}


def staged(block: dict[str, Any], downsample: dict[str, Any], **more: Any) -> dict[str, Any]:
    first = {"embed_dim": EMBED, "downsample": None, "blocks": [block], **more}
    return {"stages": [first, {**first, "downsample": downsample}], "resolution": 32}


def cascade() -> dict[str, Any]:
    heads = [{"offset": 4 * j, "dim": 4, "key_dim": 5, "value_dim": 4, "kernel": 3, "scale": 0.55} for j in range(3)]
    return {"before": [MIXER], "attn": {"window": 2, "heads": heads}, "after": []}


def documents() -> dict[str, dict[str, Any]]:
    shvit = {"conv": True, "attn": {"dim": 5, **ATTN}, "ffn": FFN}
    evit = {"attn": ATTN, "keep_rate": 1.0, "fuse": False, "ffn": {"hidden": 14}}
    sepvit = {**ATTN, "window": 8, "point_key_dim": 5, "point_scale": 0.4, "keep_rate": 1.0, "residual": [-1] * 18}
    return {
        "levit": staged({"attn": ATTN, "ffn": FFN}, {"attn": ATTN, "ffn": FFN}, keep_rate=1.0) | {"form": "linear"},
        "efficientvit": staged(cascade(), MERGE),
        "shvit": staged(shvit, MERGE),
        "evit": {"blocks": [evit] * 2, "resolution": 32, "patch_size": 8, "embed_dim": EMBED},
        "sepvit": {"stages": [{"embed_dim": EMBED, "blocks": [{"attn": sepvit, "ffn": FFN}] * 2}], "resolution": 32},
    }


def parent_of(family: str, helpers: ModuleType) -> tuple[Arch, State, Tensor]:
    arch = helpers.random_arch(family, 0, num_classes=5, **documents()[family])
    model, images = helpers.build(arch, 3), helpers.image(arch, 24, 4)
    helpers.calibrate(model, images, 5)
    return arch, model.state_dict(), images


CASES = {
    "levit": ("ffn.hidden", "attn.qk", "attn.v", "attn.heads", "stages.1.embed", "stem"),
    "efficientvit": ("ffn.hidden", "heads.1.qk", "heads.2.v", "stem", "downsample.hidden", "downsample.squeezed"),
    "shvit": ("ffn.hidden", "attn.qk", "attn.v", "attn.heads", "stem", "downsample.hidden"),
    "evit": ("ffn.hidden", "attn.qk", "attn.v", "attn.heads"),
    "sepvit": ("ffn.hidden", "attn.qk", "attn.v", "attn.heads"),
}
"""By family the widths, by a part of their names. Stage widths under a LayerNorm or GroupNorm change its statistics."""
MIXED = {
    "levit": ("attn.qk", "stages.1.embed"),
    "efficientvit": ("heads.1.qk",),
    "shvit": ("attn.qk",),
    "evit": ("attn.qk", "attn.v", "attn.heads"),
    "sepvit": ("attn.qk", "attn.v", "attn.heads"),
}
"""Those without an activation between what writes them and what reads them."""


def double(arch: Arch, state: State, part: str) -> dict[str, np.ndarray]:
    """Make the last unit of each such width do what its first does, in place; returns the widths without the last."""
    parents = table(arch)
    names = [name for name in parents.widths() if part in name and not name.endswith(("kernel", "dim"))]
    for name in names:
        last = parents.widths()[name].size - 1
        for entry in parents.entries:
            if not entry.axes:
                continue
            rows, units = places(entry.axes[0], name)
            for row in np.unique(rows):
                first, twin = (np.flatnonzero((units == unit) & (rows == row)) for unit in (0, last))
                state[entry.name][twin] = state[entry.name][first].clone()
    assert names
    return {name: np.arange(parents.widths()[name].size - 1) for name in names}


def mix(arch: Arch, state: State, part: str) -> dict[str, np.ndarray]:
    """Make the last unit of each such width a mixture of all others, in place; returns the widths without the last.

    A BatchNorm leaves its scale to the layer before it, so that both mix; a depthwise filter becomes that of all units.
    """
    select, entries = double(arch, state, part), [entry for entry in table(arch).entries if len(entry.axes) > 1]
    for name, others in select.items():
        shares = torch.linspace(-0.2, 1, len(others), dtype=torch.float64)
        for entry in entries:
            rows, units = places(entry.axes[0], name)
            if (units >= 0).any():
                writer = entry.name.removesuffix(".weight")
                for values in _linear(state, writer, np.flatnonzero(units >= 0), depthwise=entry.axes[1].size == 1):
                    for row in np.unique(rows[units >= 0]):
                        at = np.stack(
                            [np.flatnonzero((units == unit) & (rows == row)) for unit in (*others, len(others))]
                        )
                        values[at[-1]] = torch.tensordot(shares / shares.sum(), values[at[:-1]], dims=1)
    return select


def _linear(state: State, writer: str, units: np.ndarray, depthwise: bool) -> list[Tensor]:
    """The tensors that make these outputs of a layer, after what keeps them from being linear in each is gone."""
    norm = f"{writer.removesuffix('linear')}norm"
    if f"{norm}.running_var" not in state:
        return [state[f"{writer}.weight"], state[f"{writer}.bias"]]
    weight, scale, shift, mean, var = (
        state[name]
        for name in (f"{writer}.weight", *(f"{norm}.{x}" for x in ("weight", "bias", "running_mean", "running_var")))
    )
    if depthwise:
        for values in (weight, scale, shift, mean, var):
            values[units] = values[units[0]].clone()
        return []
    eps = nn.BatchNorm1d(1).eps
    factor = scale[units] / (var[units] + eps).sqrt()
    weight[units] *= factor.view(-1, *[1] * (weight.ndim - 1))
    mean[units] *= factor
    scale[units], var[units] = 1.0, 1.0 - eps
    return [weight, shift, mean]


def mix_heads(arch: Arch, state: State, part: str) -> dict[str, np.ndarray]:
    """Make the last head of each attention attend as its first one, to mixtures of its values, in place; as `mix`."""
    select = double(arch, state, part)
    for name, others in select.items():
        for entry in table(arch).entries:
            if entry.axes:
                rows, units = places(entry.axes[0], f"{name.removesuffix('heads')}v")
                first, last = (np.flatnonzero((units >= 0) & (rows == head)) for head in (0, len(others)))
                values = state[entry.name][first]
                state[entry.name][last] = values.roll(1, 0) + 0.5 * values
    return select


@pytest.mark.parametrize(("family", "part"), [(family, part) for family, parts in CASES.items() for part in parts])
def test_units_that_others_can_stand_in_for_are_no_loss(family: str, part: str, helpers: ModuleType) -> None:
    arch, state, images = parent_of(family, helpers)
    made = double if part not in MIXED[family] else mix_heads if part == "attn.heads" else mix
    select = made(arch, state, part)
    child = arch.resized(select)
    sliced = slice_weights(arch, state, child, select)
    repaired, changed = compensate(arch, state, child, sliced, origins_of(arch, child, select), images)

    def outputs(of: Arch, weights: State) -> Tensor:
        model = helpers.build(of)
        model.load_state_dict(weights)
        with torch.no_grad():
            return model(helpers.image(arch, 8, 9))

    wanted = outputs(arch, state)
    assert helpers.error(outputs(child, sliced), wanted) > 1e-4, "the cut did nothing: the comparison shows nothing"
    assert helpers.error(outputs(child, repaired), wanted) < 1e-5
    assert changed


@pytest.mark.parametrize("family", CASES)
def test_a_network_that_lost_nothing_stays_as_it_is(family: str, helpers: ModuleType) -> None:
    arch, state, images = parent_of(family, helpers)
    repaired, changed = compensate(arch, state, arch, state, origins_of(arch, arch), images)
    assert changed == 0
    assert all(torch.equal(repaired[name], state[name]) for name in state)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(2))
def test_any_cut_of_any_network_is_repaired(family: str, seed: int, helpers: ModuleType) -> None:
    """Irregular ones too: tokens dropped, windows, blocks removed; what the images show comes nearer."""
    subject = helpers.subject(family, seed)
    found = cut(subject.parts, subject.scores, helpers.shrunk(subject.parts.knobs[seed::3], seed))
    state, images = subject.model.state_dict(), helpers.image(subject.arch, 24, 4)
    sliced = slice_weights(subject.arch, state, found.arch, found.select, found.blocks)
    origins = origins_of(subject.arch, found.arch, found.select, found.blocks)
    repaired, changed = compensate(subject.arch, state, found.arch, sliced, origins, images)
    missed = []
    models = [helpers.build(with_all_tokens(arch)) for arch in (subject.arch, found.arch)]
    models[0].load_state_dict(state)
    for weights in (sliced, repaired):
        models[1].load_state_dict(weights)
        with torch.no_grad():
            missed.append((models[1](images) - models[0](images)).square().mean().item())
    assert changed
    assert missed[1] < missed[0]


def test_layers_before_the_cut_stay_as_they_are(helpers: ModuleType) -> None:
    arch, state, images = parent_of("evit", helpers)
    select = {"blocks.1.ffn.hidden": np.arange(9)}
    child = arch.resized(select)
    sliced = slice_weights(arch, state, child, select)
    repaired, _ = compensate(arch, state, child, sliced, origins_of(arch, child, select), images)
    changed = {name.rpartition(".")[0] for name in sliced if not torch.equal(sliced[name], repaired[name])}
    assert changed == {"blocks.1.ffn.fc2", "head"}


def test_tokens_that_are_dropped_do_not_disturb_it(helpers: ModuleType) -> None:
    blocks = [{"attn": ATTN, "keep_rate": 0.6, "fuse": True, "ffn": {"hidden": 14}}] * 2
    arch = helpers.random_arch("evit", 0, blocks=blocks, resolution=32, patch_size=8, embed_dim=EMBED, num_classes=5)
    state, images = helpers.build(arch, 3).state_dict(), helpers.image(arch, 24, 4)
    select = double(arch, state, "ffn.hidden")
    child = arch.resized(select)
    sliced = slice_weights(arch, state, child, select)
    repaired, _ = compensate(arch, state, child, sliced, origins_of(arch, child, select), images)
    models = [helpers.build(each) for each in (arch, child)]
    for model, weights in zip(models, (state, repaired), strict=True):
        model.load_state_dict(weights)
    with torch.no_grad():
        wanted, found = (model(helpers.image(arch, 8, 9)) for model in models)
    assert helpers.error(found, wanted) < 1e-5


class Signed(nn.Module):
    """A linear layer on x * s, where (x, s) are an image's two values and s is -1 or 1."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.head.weight, weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images[:, :1] * images[:, 1:]) if self.head.weight else self.head(images[:, :1])


def test_the_penalty_is_chosen_on_images_from_everywhere() -> None:
    """Not on the first ones, which may be of one class: here they want the opposite of the others."""
    images = torch.stack([torch.linspace(-1, 1, 10).repeat(4), torch.ones(40)], 1)
    images[:10, 1] = -1
    whole, cut = Signed(1.0), Signed(0.0)
    assert refit(whole, cut, {"head": Source("head", torch.arange(1))}, images) == 1
    assert 0.1 < cut.head.weight.item() < 0.6


@pytest.mark.parametrize("rows", [6, 30])
def test_both_forms_of_ridge_regression_agree(rows: int) -> None:
    """With fewer rows than inputs there are as many equations as rows."""
    generator = torch.Generator().manual_seed(0)
    x, missed = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (12, 3))
    for ridge, found in zip((1.0, 0.01), compensation._solutions(x, missed, (1.0, 0.01)), strict=True):
        penalty = ridge * x.square().sum(0).mean() * torch.eye(12)
        assert torch.allclose(found, torch.linalg.inv(x.T @ x + penalty) @ x.T @ missed)


def test_a_wide_layer_is_fitted_by_few_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all 640 positions fewer than its 36 inputs, and those of an image at a time are unfolded."""
    sizes: list[int] = []
    solve, unfold = torch.linalg.solve, torch.nn.functional.unfold
    monkeypatch.setattr(torch.linalg, "solve", lambda a, b: (sizes.append(len(a)), solve(a, b))[1])
    monkeypatch.setattr(compensation.F, "unfold", lambda x, *a: (sizes.append(len(x)), unfold(x, *a))[1])
    monkeypatch.setattr(compensation, "VALUES", 36 * 20)
    torch.manual_seed(0)
    whole, cut = (nn.Sequential(nn.Conv2d(4, 3, 3, padding=1)) for _ in range(2))
    images = torch.randn(10, 4, 8, 8)
    missed = (cut(images) - whole(images)).square().mean()
    assert refit(whole, cut, {"0": Source("0", torch.arange(3))}, images) == 1
    assert max(sizes) == 20
    assert sizes.count(1) == 10
    assert (cut(images) - whole(images)).square().mean() < missed


def test_a_layer_that_no_penalty_helps_is_not_counted() -> None:
    """The images that choose the penalty want the opposite of the others."""
    images = torch.stack([torch.linspace(-1, 1, 10).repeat(4), torch.ones(40)], 1)
    images[::4, 1] = -1
    whole, cut = Signed(1.0), Signed(0.0)
    assert refit(whole, cut, {"head": Source("head", torch.arange(1))}, images) == 0
    assert cut.head.weight.item() == 0
