"""What a training asks of a network: each head's logits, drop path."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import timm
import torch
from torch import Tensor, distributed, nn

import search_spaces
from nas.export.onnx import to_onnx
from search_spaces.gates import Gate, set_drop_path
from search_spaces.network import fold, heads_of
from search_spaces.registry import FAMILIES
from search_spaces.weights import fit, translate
from search_spaces.widths import Width

# Heads


def test_two_heads_have_the_forward_s_mean(helpers: ModuleType) -> None:
    for family in ("levit", "efficientvit", "shvit"):
        arch = helpers.random_arch(family, 1, distilled=True)
        model, x = helpers.build(arch, 1), helpers.image(arch, 4)
        helpers.calibrate(model, x, 1)
        for mode in (True, False):
            model.train(mode)
            with torch.no_grad():
                first, second = heads_of(model, x)
                assert first.shape == second.shape == (4, arch.num_classes)
                assert helpers.error((first + second) / 2, model(x)) < 1e-12
                assert helpers.error(first, second) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_one_head_is_the_forward(family: str, helpers: ModuleType) -> None:
    changes = {} if family in ("evit", "sepvit") else {"distilled": False}
    arch = helpers.random_arch(family, 1, **changes)
    model, x = helpers.build(arch, 1), helpers.image(arch, 4)
    with torch.no_grad():
        (found,) = heads_of(model, x)
        assert torch.equal(found, model(x))


def test_a_folded_network_has_one_head(helpers: ModuleType) -> None:
    arch = helpers.random_arch("levit", 1, distilled=True)
    model, x = helpers.build(arch, 1), helpers.image(arch, 4)
    assert len(heads_of(search_spaces.fold(model), x)) == 1


def test_heads_after_a_fault(helpers: ModuleType) -> None:
    """A batch that cannot run leaves the network's forward as it was."""
    arch = helpers.random_arch("levit", 1, distilled=True)
    model = helpers.build(arch, 1)
    with pytest.raises(RuntimeError):
        heads_of(model, torch.zeros(1, 4, 8, 8, dtype=torch.float64))
    assert model(helpers.image(arch)).shape == (2, arch.num_classes)


# Drop path


def branches(model: nn.Module) -> dict[str, Gate]:
    """The gates at a network's residual branches."""
    return {m.branch: m for m in model.modules() if isinstance(m, Gate) and m.branch is not None}


def test_what_is_kept_is_scaled() -> None:
    """Whole images, in the stated share, so that the mean stays."""
    gate = Gate(Width("e", 3), -1, branch="blocks.0.ffn")
    gate.drop_path = 0.25
    torch.manual_seed(0)
    x = torch.rand(20_000, 5, 3, dtype=torch.float64) + 0.5
    share = (gate(x) / x).round(decimals=12)
    assert torch.equal(share.amin((1, 2)), share.amax((1, 2)))
    assert set(share.flatten().tolist()) == {0.0, round(1 / 0.75, 12)}
    assert float(share.mean()) == pytest.approx(1, abs=0.02)
    gate.mask = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64)
    masked = gate(x) / x
    assert float(masked[:, :, 2].mean()) == pytest.approx(2, abs=0.05)
    assert not masked[:, :, 1].any()
    assert torch.equal(gate.eval()(x), x * gate.mask)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6))
def test_whole_images_are_dropped(family: str, seed: int, helpers: ModuleType) -> None:
    """Where windows attend and where only some tokens do, an image keeps all of a branch or nothing."""
    arch = helpers.random_arch(family, seed)
    model, x = helpers.build(arch, seed), helpers.image(arch, 16)
    helpers.calibrate(model, x, seed)
    set_drop_path(model, 0.5)
    torch.manual_seed(seed)
    gates = branches(model)
    fates: list[bool] = []

    def note(gate: Gate, inputs: tuple[Tensor], out: Tensor) -> None:
        assert len(inputs[0]) == 16
        dropped = ~out.flatten(1).any(1)
        wanted = torch.where(dropped.view(-1, *[1] * (out.ndim - 1)), 0, inputs[0] / (1 - gate.drop_path))
        assert torch.allclose(out, wanted, rtol=1e-12)
        fates.extend(dropped.tolist() if gate.drop_path else [])

    for gate in gates.values():
        gate.register_forward_hook(note)
    model.train()(x)
    assert not fates or 0 < sum(fates) < len(fates)


@pytest.mark.parametrize("name", ["sepvit_lite", "levit_128s", "efficientvit_m1", "deit_tiny", "shvit_s1"])
def test_rates_rise_with_depth(name: str) -> None:
    """Evenly from 0 to the rate, one rate a block."""
    model = search_spaces.create_model(name)
    set_drop_path(model, 0.3)
    rates = {branch: gate.drop_path for branch, gate in branches(model).items()}
    assert list(rates.values()) == sorted(rates.values())
    assert (min(rates.values()), max(rates.values())) == (0, 0.3)
    steps = sorted(set(rates.values()))
    assert torch.allclose(torch.tensor(steps), torch.linspace(0, 0.3, len(steps)))
    depth = sum(len(stage.blocks) for stage in getattr(model.arch, "stages", [model.arch]))
    downsamplings = 0 if name in ("sepvit_lite", "deit_tiny") else 2
    assert len(steps) == depth + downsamplings
    set_drop_path(model, 0)
    assert not any(gate.drop_path for gate in branches(model).values())
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="drop path"):
            set_drop_path(model, rate)


def test_drop_path_equals_timm(helpers: ModuleType) -> None:
    """The same seed drops the same branches of the same images in timm's DeiT."""
    theirs = helpers.randomise(timm.create_model("deit_tiny_patch16_224", drop_path_rate=0.4), 1).train()
    model = search_spaces.create_model("deit_tiny").train()
    fit(model, translate(theirs.state_dict(), model.arch, model.state_dict()))
    x, outputs = helpers.image(224, 4, dtype=torch.float32), []
    set_drop_path(model, 0.4)
    for network in (theirs, model):
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append(network(x))
    assert helpers.error(outputs[1], outputs[0]) < 1e-4
    with torch.no_grad():
        assert helpers.error(model(x), outputs[0]) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_eval_and_export_know_no_drop_path(family: str, helpers: ModuleType, tmp_path: Path) -> None:
    arch = helpers.random_arch(family, 1)
    model = helpers.build(arch, 1, torch.float32)
    x, found = helpers.image(arch, 2, dtype=torch.float32), []
    for rate in (0.0, 0.5):
        set_drop_path(model, rate)
        path = tmp_path / f"{rate}.onnx"
        to_onnx(fold(model.train()), path, arch.resolution, 2)
        with torch.no_grad():
            found.append((model.eval()(x), Counter(node.op_type for node in onnx.load(path).graph.node)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_wrapped_for_several_processes(helpers: ModuleType, tmp_path: Path) -> None:
    """Under DDP every parameter has its gradient though branches are dropped, and both heads come out."""
    arch = helpers.random_arch("levit", 1, distilled=True)
    model, x = helpers.build(arch, 1), helpers.image(arch, 4)
    helpers.calibrate(model, x, 1)
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model.train())
        set_drop_path(wrapped, 0.5)
        for _ in range(2):
            first, second = heads_of(wrapped, x)
            (first.square().sum() + second.square().sum()).backward()
    finally:
        distributed.destroy_process_group()
    assert max(gate.drop_path for gate in branches(model).values()) == 0.5
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())
