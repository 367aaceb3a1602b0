"""Importance: gates give each sample's own first-order change of the loss, and the criteria are what they say."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn
from torch_pruning.pruner.importance import GroupTaylorImportance

from pruning.importance import CRITERIA, ImportanceError, gate_gradients, score
from pruning.units import Anatomy, Knob, anatomy
from search_spaces import Arch
from search_spaces.gates import Gate, gates_of
from search_spaces.layers import NormLinear
from search_spaces.registry import FAMILIES
from search_spaces.widths import Width

SEEDS = (0, 1, 6)
STEP = 1e-7
"""So small that hardly a ReLU switches."""


def losses(subject: Any, x: Tensor, labels: Tensor, helpers: ModuleType, of: Callable[[Gate], np.ndarray]) -> Tensor:
    with torch.no_grad(), helpers.masks(subject.model, of):
        return F.cross_entropy(subject.model(x), labels, reduction="none")


def finite_differences(subject: Any, units: list[tuple[str, int]], helpers: ModuleType) -> Tensor:
    """dL/dm of (width or branch, unit) pairs for the first image, every gate of a unit weighed alike: each pair has a
    row of the batch to itself."""
    x, labels = subject.x[:1].expand(len(units), -1, -1, -1), subject.labels[:1].expand(len(units))

    def mask(gate: Gate, step: float) -> np.ndarray:
        found = np.ones((len(units), *gate.units))
        for row, (name, unit) in enumerate(units):
            numbers = helpers.gate_units(gate, name)
            if numbers is not None:
                found[row][numbers == unit] += step
        return found

    more, less = (losses(subject, x, labels, helpers, lambda gate, s=s: mask(gate, s)) for s in (STEP, -STEP))
    return (more - less) / (2 * STEP)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_are_finite_differences(family: str, seed: int, helpers: ModuleType) -> None:
    """Three units of every width and every branch, within 1 %."""
    subject = helpers.subject(family, seed)
    found = gate_gradients(subject.model, subject.x, subject.labels)
    assert found.keys() >= {knob.width for knob in subject.parts.knobs}
    rng = np.random.default_rng(seed)
    units = [
        (name, int(unit))
        for name, values in found.items()
        for unit in rng.choice(values[0].numel(), min(3, values[0].numel()), replace=False)
    ]
    wanted = finite_differences(subject, units, helpers)
    gradients = torch.stack([found[name][0].flatten()[unit] for name, unit in units])
    assert gradients.abs().max() > 0.01
    assert torch.allclose(gradients, wanted, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_unit_matters_somewhere(family: str, helpers: ModuleType) -> None:
    """So that the comparison with finite differences is not one of zeros."""
    largest: dict[str, float] = {}
    for seed in SEEDS:
        subject = helpers.subject(family, seed)
        found = gate_gradients(subject.model, subject.x, subject.labels)
        for knob in subject.parts.knobs:
            name = helpers.unit_name(knob)
            largest[name] = max(largest.get(name, 0.0), float(found[knob.width].abs().max()))
    assert min(largest.values()) > 1e-4
    assert largest.keys() >= {"hidden", "qk", "v", "heads", "attn", "ffn", "embed"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_gate_sums_to_activation_times_gradient(family: str, seed: int, helpers: ModuleType) -> None:
    """Sum of dL/dm over a gate's units = <a, dL/da>, which autograd gives without any gate."""
    subject = helpers.subject(family, seed)
    gates = gates_of(subject.model)
    seen: dict[str, Tensor] = {}
    handles = [
        gate.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
        for name, gate in gates.items()
        if not name.endswith("shift_gate")  # it never sees BatchNorm's shift unless it has a mask
    ]
    x = subject.x.clone().requires_grad_()  # so that every activation is part of the graph
    loss = F.cross_entropy(subject.model(x), subject.labels, reduction="sum")
    gradients = dict(zip(seen, torch.autograd.grad(loss, list(seen.values())), strict=True))
    for handle in handles:
        handle.remove()
    wanted = {name: (seen[name] * gradients[name]).reshape(len(x), -1).sum(1) for name in seen}
    found = gate_gradients(subject.model, subject.x, subject.labels)
    for name in found:
        reached = [key for key, gate in gates.items() if helpers.gate_units(gate, name) is not None]
        whole = [key for key in reached if key in wanted]
        if whole != reached:
            continue
        total = found[name].reshape(len(x), -1).sum(1)
        assert torch.allclose(total, sum(wanted[key] for key in whole), rtol=1e-8, atol=1e-10), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "training"), [(1, False), (4, False), (4, True)])
def test_all_weights_gradients_are_finite_differences(
    family: str, batch: int, training: bool, helpers: ModuleType
) -> None:
    """Along a random direction: torch's own BatchNorm is wrong in layouts that dropped tokens or one image bring."""
    for seed in SEEDS:
        subject = helpers.subject(family, seed)
        model, x, labels = helpers.build(subject.arch).train(training), subject.x[:batch], subject.labels[:batch]
        model.load_state_dict(subject.model.state_dict())
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(F.cross_entropy(model(x), labels), parameters, allow_unused=True)
        generator = torch.Generator().manual_seed(seed)
        ways = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        found = sum(float((g * way).sum()) for g, way in zip(gradients, ways, strict=True) if g is not None)
        ends = []
        for step in (STEP, -STEP):
            model.load_state_dict(subject.model.state_dict())  # BatchNorm's running statistics among them
            with torch.no_grad():
                for parameter, way in zip(parameters, ways, strict=True):
                    parameter += step * way
                ends.append(float(F.cross_entropy(model(x), labels)))
        assert abs(found - (ends[0] - ends[1]) / (2 * STEP)) < 0.01 * max(1.0, abs(found))


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_independent(family: str, helpers: ModuleType) -> None:
    subject = helpers.subject(family, 1)
    together = gate_gradients(subject.model, subject.x, subject.labels)
    single = [
        gate_gradients(subject.model, subject.x[i : i + 1], subject.labels[i : i + 1]) for i in range(len(subject.x))
    ]
    for name, values in together.items():
        assert torch.allclose(values, torch.cat([found[name] for found in single]), rtol=1e-8, atol=1e-11), name
    batches = [(subject.x[:1], subject.labels[:1]), (subject.x[1:], subject.labels[1:])]
    for name in ("taylor", "taylor2"):
        once = score(subject.model, subject.parts, [(subject.x, subject.labels)], name)
        parted = score(subject.model, subject.parts, batches, name)
        assert all(np.allclose(parted[width], values) for width, values in once.items())


def test_a_width_adds_its_gates_with_their_signs(helpers: ModuleType) -> None:
    """A sample's gates are summed, then the magnitude is taken, then the mean over samples."""
    subject = helpers.subject("levit", 0)
    gates = [g for g in gates_of(subject.model).values() if helpers.gate_units(g, "stages.0.embed") is not None]
    assert len(gates) > 2
    signed = torch.zeros(len(subject.x), subject.parts.sizes["stages.0.embed"], dtype=torch.float64)
    apart = torch.zeros_like(signed)
    for gate in gates:
        gate.mask = torch.ones_like(signed).requires_grad_()
        loss = F.cross_entropy(subject.model(subject.x), subject.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, gate.mask)
        gate.mask = None
        signed += gradient
        apart += gradient.abs()
    found = score(subject.model, subject.parts, [(subject.x, subject.labels)], "taylor")["stages.0.embed"]
    assert np.allclose(found, signed.abs().mean(0))
    assert not np.allclose(found, apart.mean(0), rtol=0.05)


def test_the_classifiers_own_gate_is_of_the_shift_alone() -> None:
    """What writes its input has gates already: with the whole of BatchNorm's output they would count twice."""
    layer = NormLinear(Width("embed", 4), Width("classes", 3)).double().eval()
    with torch.no_grad():
        layer.norm.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    layer.norm.running_mean += 0.5
    layer.norm.running_var *= 2
    x, mask = torch.randn(2, 4, dtype=torch.float64), torch.tensor([[1.0, 0.0, 1.0, 0.5]], dtype=torch.float64)
    scale = (2 + layer.norm.eps) ** -0.5
    wanted = layer.linear(scale * x + mask * (layer.norm.bias - 0.5 * scale))
    whole = layer(x)
    layer.shift_gate.mask = mask
    assert torch.allclose(layer(x), wanted)
    assert not torch.allclose(wanted, whole)
    assert torch.allclose(layer.folded()(x), whole)


# The model is left as it was


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(criterion: str, training: bool, helpers: ModuleType) -> None:
    subject = helpers.subject("shvit", 1)
    model = helpers.build(subject.arch, 1)
    model.train(training)
    frozen = next(iter(model.parameters()))
    if criterion != "torch-pruning":
        frozen.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score(model, subject.parts, [(subject.x, subject.labels)], criterion)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(module.training == training for module in model.modules())
    assert all(gate.mask is None for gate in gates_of(model).values())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_exception_leaves_no_mask_behind(helpers: ModuleType) -> None:
    subject = helpers.subject("shvit", 1)
    model = helpers.build(subject.arch, 1).train()
    with pytest.raises(IndexError):
        score(model, subject.parts, [(subject.x, subject.labels + 100)], "taylor")
    assert all(gate.mask is None for gate in gates_of(model).values())
    assert all(p.requires_grad for p in model.parameters())
    assert model.training


# Criteria


@pytest.mark.parametrize("family", FAMILIES)
def test_of_one_image_taylor2_is_the_square(family: str, helpers: ModuleType) -> None:
    subject = helpers.subject(family, 0)
    batch = [(subject.x[:1], subject.labels[:1])]
    first, second = (score(subject.model, subject.parts, batch, name) for name in ("taylor", "taylor2"))
    assert first.keys() == second.keys() >= {knob.width for knob in subject.parts.knobs}
    assert all(np.allclose(first[width] ** 2, values) for width, values in second.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_every_knob(family: str, criterion: str, helpers: ModuleType) -> None:
    subject = helpers.subject(family, 1)
    found = score(subject.model, subject.parts, [(subject.x, subject.labels)], criterion)
    for knob in subject.parts.knobs:
        assert knob.importance(found).shape == (knob.rows, knob.size)
        assert (knob.importance(found) >= 0).all()


def test_random_scores_are_seeded(helpers: ModuleType) -> None:
    subject = helpers.subject("sepvit", 1)
    first, again, other = (score(subject.model, subject.parts, (), "random", seed) for seed in (3, 3, 4))
    assert all(np.array_equal(first[width], values) for width, values in again.items())
    assert not any(np.array_equal(first[width], values) for width, values in other.items())


def test_magnitude_is_the_norm_of_a_units_weights(helpers: ModuleType) -> None:
    """By hand, in an EViT whose blocks hold two heads of three q, three k and two v rows each, all q first."""
    attn = {"heads": 2, "key_dim": 3, "value_dim": 2, "scale": 0.5}
    block = {"attn": attn, "keep_rate": 1.0, "fuse": False, "ffn": {"hidden": 5}}
    arch = helpers.random_arch("evit", 0, resolution=16, patch_size=4, embed_dim=6, blocks=[block, block])
    model = helpers.build(arch, 2)
    found = score(model, anatomy(arch), (), "magnitude")
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    for i in range(2):
        qkv, proj = weights[f"blocks.{i}.attn.qkv.weight"], weights[f"blocks.{i}.attn.proj.weight"]
        fc1, fc2 = weights[f"blocks.{i}.ffn.fc1.weight"], weights[f"blocks.{i}.ffn.fc2.weight"]
        for unit in range(5):
            parts = [fc1[unit], fc2[:, unit]]
            assert found[f"blocks.{i}.ffn.hidden"][unit] == pytest.approx(np.linalg.norm(np.concatenate(parts)))
        for head in range(2):
            for unit in range(3):
                parts = [qkv[3 * head + unit], qkv[6 + 3 * head + unit]]
                assert found[f"blocks.{i}.attn.qk"][head, unit] == pytest.approx(np.linalg.norm(np.concatenate(parts)))
            for unit in range(2):
                parts = [qkv[12 + 2 * head + unit], proj[:, 2 * head + unit]]
                assert found[f"blocks.{i}.attn.v"][head, unit] == pytest.approx(np.linalg.norm(np.concatenate(parts)))
            rows = [*range(3 * head, 3 * head + 3), *range(6 + 3 * head, 9 + 3 * head), 12 + 2 * head, 13 + 2 * head]
            parts = [qkv[rows].flatten(), proj[:, 2 * head : 2 * head + 2].flatten()]
            assert found[f"blocks.{i}.attn.heads"][head] == pytest.approx(np.linalg.norm(np.concatenate(parts)))
        branch = np.concatenate([qkv.flatten(), proj.flatten()])
        assert found[f"blocks.{i}.attn"] == pytest.approx(np.linalg.norm(branch))
        assert found[f"blocks.{i}.ffn"] == pytest.approx(np.linalg.norm(np.concatenate([fc1.flatten(), fc2.flatten()])))
    columns = [weights["patch_embed.weight"].reshape(6, -1), weights["cls_token"].reshape(1, 6).T]
    columns += [weights["pos_embed"].reshape(-1, 6).T, weights["head.weight"].T]
    for i in range(2):
        columns += [weights[f"blocks.{i}.attn.qkv.weight"].T, weights[f"blocks.{i}.attn.proj.weight"]]
        columns += [weights[f"blocks.{i}.ffn.fc1.weight"].T, weights[f"blocks.{i}.ffn.fc2.weight"]]
    assert found["embed"] == pytest.approx(np.linalg.norm(np.concatenate(columns, axis=1), axis=1))


def plain(family: str, helpers: ModuleType) -> Arch:
    """A network whose graph torch-pruning can build: an EViT that keeps all tokens, an EfficientViT of mixers only."""
    if family == "evit":
        attn = {"heads": 2, "key_dim": 4, "value_dim": 4, "scale": 0.5}
        block = {"attn": attn, "keep_rate": 1.0, "fuse": False, "ffn": {"hidden": 9}}
        return helpers.random_arch("evit", 0, resolution=32, patch_size=8, embed_dim=12, blocks=[block, block])
    mixer = {"conv": True, "ffn": {"hidden": 9, "keep_rate": 1.0}}
    block = {"before": [mixer], "attn": None, "after": [mixer]}
    merge = {"before": mixer, "hidden": 16, "squeezed": 4, "after": mixer}
    stages = [
        {"embed_dim": 10, "downsample": None, "blocks": [block]},
        {"embed_dim": 12, "downsample": merge, "blocks": [block]},
    ]
    return helpers.random_arch("efficientvit", 0, resolution=64, distilled=False, stem=[4, 5, 6], stages=stages)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("family", ["evit", "efficientvit"])
def test_the_criterion_of_torch_pruning_on_groups_of_its_own(family: str, helpers: ModuleType) -> None:
    """Its dependency graph finds the groups that our width table names, and its scores on them are ours."""
    arch = plain(family, helpers)
    model, x = helpers.build(arch, 1), helpers.image(arch, 4, 1)
    labels = torch.arange(4) % arch.num_classes
    helpers.calibrate(model, x, 1)
    parts = anatomy(arch)
    ours = score(model, parts, [(x, labels)], "torch-pruning")
    graph = torch_pruning.DependencyGraph().build_dependency(model, x[:1])
    F.cross_entropy(model(x), labels).backward()
    compared = []
    for knob in parts.knobs:
        writer = first_writer(model, parts, knob)
        if writer is None:
            continue
        remove = (
            torch_pruning.prune_conv_out_channels
            if isinstance(writer, nn.Conv2d)
            else torch_pruning.prune_linear_out_channels
        )
        group = graph.get_pruning_group(writer, remove, list(range(knob.size)))
        theirs = GroupTaylorImportance()(group).numpy()
        assert theirs / theirs.mean() == pytest.approx(ours[knob.width], rel=1e-5)
        compared.append(helpers.unit_name(knob))
    assert {*compared} == ({"embed", "hidden"} if family == "evit" else {"stem", "embed", "hidden", "squeezed"})


def first_writer(model: nn.Module, parts: Anatomy, knob: Knob) -> nn.Module | None:
    """The first layer whose outputs are just the knob's units; None for q, k, v, heads and branches."""
    for entry in parts.table.entries:
        module = model.get_submodule(entry.name.rpartition(".")[0])
        mixes = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if mixes and isinstance(entry.axes[0], Width) and entry.axes[0].name == knob.width:
            return module
    return None


# Refusals


@pytest.mark.parametrize("criterion", ["taylor", "taylor2", "torch-pruning"])
@pytest.mark.parametrize("family", ["levit", "efficientvit", "shvit"])
def test_an_untrained_network_is_refused(family: str, criterion: str, helpers: ModuleType) -> None:
    """Its residual branches begin at zero: every unit in them scores zero."""
    subject = helpers.subject(family, 1)
    model = helpers.build(subject.arch)
    with pytest.raises(ImportanceError, match=r"zero BatchNorm weight.*Train it") as caught:
        score(model, subject.parts, [(subject.x, subject.labels)], criterion)
    assert "\n" not in str(caught.value)
    assert model.training is False


@pytest.mark.parametrize("criterion", ["taylor", "taylor2", "magnitude", "torch-pruning"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(criterion: str, value: float, helpers: ModuleType) -> None:
    subject = helpers.subject("evit", 1)
    model = helpers.build(subject.arch, 1)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[0, 0] = value
    with pytest.raises(ImportanceError, match="not finite") as caught:
        score(model, subject.parts, [(subject.x, subject.labels)], criterion)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "family",
    [each if each in ("levit", "evit") else pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES],
)
def test_the_change_of_the_features_needs_no_labels(family: str, helpers: ModuleType) -> None:
    """Of many draws of signs, the mean square is the length of the first-order change of the classifier's inputs."""
    subject = helpers.subject(family, 0)
    one = (subject.x[:1], subject.labels[:1])
    draws = [score(subject.model, subject.parts, [one], "features", seed) for seed in range(60)]
    other = score(subject.model, subject.parts, [(one[0], one[1] * 0)], "features", 0)
    assert all(np.array_equal(draws[0][width], values) for width, values in other.items())
    heads = [
        subject.model.get_submodule(entry.name.removesuffix(".weight"))
        for entry in subject.parts.table.entries
        if len(entry.axes) == 2 and getattr(entry.axes[0], "name", "") == "classes"
    ]
    seen: list[Tensor] = []
    handles = [head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for head in heads]
    branch = next(gate for gate in gates_of(subject.model).values() if gate.branch is not None)
    ends = []
    for step in (1 + STEP, 1 - STEP):
        seen.clear()
        branch.mask = torch.full((1, *branch.units), step, dtype=subject.x.dtype)
        with torch.no_grad():
            subject.model(one[0])
        ends.append(torch.cat(seen, 1))
    branch.mask = None
    for handle in handles:
        handle.remove()
    wanted = ((ends[0] - ends[1]) / (2 * STEP)).norm().item()
    found = np.mean([draw[branch.branch] ** 2 for draw in draws]) ** 0.5
    assert found == pytest.approx(wanted, rel=0.35)
