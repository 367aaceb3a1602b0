"""Growth: new units change nothing at the moment they come, and they learn."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.importance import gate_gradients
from pruning.units import Cut, Knob, cut
from search_spaces.registry import FAMILIES
from search_spaces.widths import places, width_table

SEEDS = range(6)
UNITS = {
    "levit": ("stem", "embed", "hidden", "qk", "v"),
    "efficientvit": ("stem", "embed", "hidden", "squeezed", "qk", "v"),
    "shvit": ("stem", "embed", "hidden", "squeezed", "qk", "v"),
    "evit": ("hidden", "qk", "v"),
    "sepvit": ("hidden", "qk", "point_qk", "v"),
}
"""What can grow: no stage width (nor values) under LayerNorm, and none by whose norm tokens are dropped."""
PAIRS = [(family, unit) for family, units in UNITS.items() for unit in units]
MORE = 3


def grown(subject: Any, knobs: list[Knob], **others: int) -> Cut:
    return cut(subject.parts, subject.scores, {k.name: k.size + MORE for k in knobs} | others)


def growing(family: str, unit: str, seed: int, helpers: ModuleType) -> tuple[Any, list[Knob]]:
    """A random network and its knobs of a kind that can grow."""
    subject = helpers.subject(family, seed, whole=unit == "embed")
    return subject, [knob for knob in subject.parts.knobs if knob.grows and helpers.unit_name(knob) == unit]


@torch.no_grad()
def change(subject: Any, done: Cut, helpers: ModuleType) -> float:
    return helpers.error(helpers.child_of(subject, done)(subject.x), subject.out)


# New units change nothing


@pytest.mark.parametrize(("family", "unit"), PAIRS)
@pytest.mark.parametrize("networks", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_new_units_change_nothing(family: str, unit: str, networks: int, helpers: ModuleType) -> None:
    """All knobs of a kind at once, in the first networks that have one."""
    shown = 0
    for seed in SEEDS:
        subject, knobs = growing(family, unit, seed, helpers)
        if knobs and shown < networks:
            assert change(subject, grown(subject, knobs), helpers) < 1e-8  # float64; the requirement is 1e-5
            shown += 1
    assert shown


def check_grown_and_pruned(family: str, seed: int, helpers: ModuleType) -> None:
    """Each knob grows, shrinks or stays: the result is the network whose removed units are silent."""
    subject, rng = helpers.subject(family, seed), np.random.default_rng(seed)
    choices = {knob.name: rng.choice(["grow", "shrink", "stay"]) for knob in subject.parts.knobs}
    larger = [knob for knob in subject.parts.knobs if knob.grows and choices[knob.name] == "grow"]
    smaller = [knob for knob in subject.provable() if choices[knob.name] == "shrink" and rng.random() < 0.8]
    settings = helpers.shrunk(smaller, seed)
    done = grown(subject, larger, **settings)
    gone = [knob.width for knob in smaller if knob.kind == "blocks"]
    with torch.no_grad():
        found = helpers.child_of(subject, done)(subject.x)
    assert helpers.error(found, helpers.silenced(subject, done, gone), subject.out) < 1e-8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_growing_some_and_pruning_others(family: str, seed: int, helpers: ModuleType) -> None:
    check_grown_and_pruned(family, seed, helpers)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_growing_and_pruning_very_many_networks(family: str, helpers: ModuleType) -> None:
    for seed in range(200, 280):
        check_grown_and_pruned(family, seed, helpers)
        helpers.subject.cache_clear()


# What cannot grow


@pytest.mark.parametrize(
    ("family", "unit"),
    [("evit", "embed"), ("sepvit", "embed"), ("sepvit", "v"), ("shvit", "embed"), ("levit", "embed")],
)
def test_what_is_declared_not_to_grow_changes_the_outputs(family: str, unit: str, helpers: ModuleType) -> None:
    """LayerNorm's and GroupNorm's statistics change, or the norm by which tokens are dropped."""
    for seed in SEEDS:
        subject = helpers.subject(family, seed)
        knobs = [k for k in subject.parts.knobs if not k.grows and helpers.unit_name(k) == unit]
        if knobs and change(subject, grown(subject, knobs), helpers) > 1e-4:
            return
    pytest.fail("it changes nothing: it could grow")


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_branches_do_not_grow(family: str, helpers: ModuleType) -> None:
    knobs = [knob for seed in SEEDS for knob in helpers.subject(family, seed).parts.knobs]
    assert not any(knob.grows for knob in knobs if knob.kind in ("heads", "blocks"))
    subject = next(s for s in (helpers.subject(family, seed) for seed in SEEDS) if heads_of(s))
    with pytest.raises(ValueError, match="heads"):
        helpers.child_of(subject, grown(subject, heads_of(subject)[:1]))


def heads_of(subject: Any) -> list[Knob]:
    return [knob for knob in subject.parts.knobs if knob.kind == "heads"]


# New units learn


def weights_of_new(
    model: nn.Module, done: Cut, vectors: bool = False
) -> list[tuple[tuple[str, int, int], str, tuple[Tensor, int, int]]]:
    """Each new unit (its width, head and number), a weight (or bias or norm) that it indexes, and where it does."""
    found = []
    parameters = dict(model.named_parameters())
    for entry in width_table(model).entries:
        if not entry.trainable or (len(entry.axes) < 2 and not vectors):
            continue
        for dim, axis in enumerate(entry.axes):
            for width, chosen in done.select.items():
                for position, (row, unit) in enumerate(zip(*places(axis, width), strict=True)):
                    if unit >= 0 and (chosen if chosen.ndim == 1 else chosen[row])[unit] < 0:
                        found.append(((width, row, unit), entry.name, (parameters[entry.name], dim, position)))
    return found


def trained(model: nn.Module, subject: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[dict[str, Tensor]]:
    """Gradients of every step of training on the subject's images."""
    model.train()
    gradients = []
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(subject.x), subject.labels).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return gradients


def learners(family: str, unit: str, helpers: ModuleType) -> tuple[Any, nn.Module, Cut]:
    """A network with new units where the old ones have gradients (in attention over one token they have none)."""
    for seed in SEEDS:
        subject, knobs = growing(family, unit, seed, helpers)
        own = gate_gradients(subject.model, subject.x, subject.labels)
        knobs = [knob for knob in knobs if own[knob.width].abs().amax() > 1e-6]
        if knobs:
            done = grown(subject, knobs)
            return subject, helpers.child_of(subject, done), done
    raise LookupError(f"no {unit} of {family} has a gradient")


@pytest.mark.parametrize(("family", "unit"), PAIRS)
def test_all_new_units_get_gradients_within_two_steps(family: str, unit: str, helpers: ModuleType) -> None:
    """Every weight of every new unit, queries and keys alike."""
    subject, model, done = learners(family, unit, helpers)
    gradients = trained(model, subject, torch.optim.SGD(model.parameters(), lr=0.1), steps=2)
    found = weights_of_new(model, done)
    assert {new for new, _, _ in found}
    for new, name, (_, dim, position) in found:
        moved = max(step[name].select(dim, position).abs().max() for step in gradients)
        assert moved > 1e-12, f"{new} in {name}"


@pytest.mark.parametrize(
    ("family", "unit"),
    [pair if pair[0] in ("levit", "evit") else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS],
)
def test_new_units_do_not_stay_twins(family: str, unit: str, helpers: ModuleType) -> None:
    subject, model, done = learners(family, unit, helpers)
    trained(model, subject, torch.optim.AdamW(model.parameters(), lr=1e-3), steps=4)
    parts: dict[tuple[str, int, int], list[Tensor]] = {}
    for new, name, (weight, dim, position) in weights_of_new(model, done):
        part = weight.detach().select(dim, position).flatten()
        assert part.abs().max() > 0, f"{new} in {name}"
        parts.setdefault(new, []).append(part)
    for width, row in {new[:2] for new in parts}:
        units = [torch.cat(found) for new, found in parts.items() if new[:2] == (width, row)]
        pairs = [(a, b) for i, a in enumerate(units) for b in units[:i] if a.shape == b.shape]
        assert min(float((a - b).abs().max()) for a, b in pairs) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_both_at_zero_never_learn(family: str, helpers: ModuleType) -> None:
    """The negative control: what the random queries beside the zero keys are for."""
    subject, model, done = learners(family, "qk", helpers)
    found = weights_of_new(model, done, vectors=True)
    with torch.no_grad():
        for _, _, (weight, dim, position) in found:
            weight.select(dim, position).zero_()
    gradients = trained(model, subject, torch.optim.SGD(model.parameters(), lr=0.1), steps=2)
    for _, name, (_, dim, position) in found:
        assert max(step[name].select(dim, position).abs().max() for step in gradients) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_step_of_training_is_as_small_as_before(family: str, helpers: ModuleType) -> None:
    """In training mode too the new units come in smoothly: BatchNorm must not blow a zero row's first step up."""
    subject, grown_model, _ = learners(family, "qk", helpers)
    whole = helpers.build(subject.arch)
    whole.load_state_dict(subject.model.state_dict())
    moved = []
    for model in (whole.train(), grown_model.train()):
        with torch.no_grad():
            before = model(subject.x)
        trained(model, subject, torch.optim.SGD(model.parameters(), lr=1e-6), steps=1)
        with torch.no_grad():
            moved.append(helpers.error(model(subject.x), before))
    assert 0 < moved[1] < 2 * moved[0]


def test_a_new_squeezed_channel_is_not_dead(helpers: ModuleType) -> None:
    """Squeeze-excite reads positive means, much alike in all images, behind a ReLU without a norm."""
    subject, knobs = next(
        found for found in (growing("shvit", "squeezed", seed, helpers) for seed in SEEDS) if found[1]
    )
    model = helpers.child_of(subject, cut(subject.parts, subject.scores, {k.name: k.size + 40 for k in knobs}))
    active = []
    for knob in knobs:
        squeeze = model.get_submodule(knob.width.removesuffix(".squeezed")).se
        squeeze.gate.register_forward_hook(lambda module, inputs, output: active.append(output[:, -40:] > 0))
    with torch.no_grad():
        model(subject.x)
    assert len(active) == len(knobs)
    assert all(bool(on.any(0).all()) for on in active)
