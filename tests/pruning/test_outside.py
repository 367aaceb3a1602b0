"""timm models outside the families: the probe, its refusals, and what pruning leaves."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch_pruning as tp
from forked import Forked
from torch import Tensor, nn

from pruning import outside, outside_graph, outside_probe
from pruning.compensation import refit
from pruning.macs import count_macs
from pruning.outside import load_outside, prune_outside, resize_outside
from pruning.outside_graph import CutNetwork, Group, OutsideError, fresh
from pruning.outside_probe import Probe, run_probe

CLASSES = 10


def ordinary(name: str) -> nn.Module:
    """A model as if trained: no zero-initialised scales."""
    torch.manual_seed(0)
    model, _ = load_outside(name, CLASSES)
    outside_probe._randomise(model)
    return model


def batches(resolution: int) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, resolution, resolution, generator=generator)
    return lambda: [(images, torch.arange(8))]


def logits(model: nn.Module, resolution: int) -> Tensor:
    images = torch.randn(2, 3, resolution, resolution, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return fresh(model)(images)


def macs(model: nn.Module, resolution: int) -> int:
    return count_macs(fresh(model), torch.zeros(1, 3, resolution, resolution))[""]


def network(model: nn.Module, resolution: int) -> CutNetwork:
    return CutNetwork(model, torch.zeros(1, 3, resolution, resolution), multiple_of=8, inner=False)


def group_of(pruned: CutNetwork, layer: str) -> Group:
    """The group that holds output channels of a layer."""
    module = pruned.model.get_submodule(layer)
    return next(
        g for g in pruned.groups() if any(d.target.module is module and pruned._outputs(d) for d, _ in g.coupled)
    )


@pytest.fixture(scope="module")
def resnet_probe() -> Probe:
    return run_probe("resnet18", 64, CLASSES, 8, time_limit_s=120)


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch, resnet_probe: Probe) -> None:
    """The child process answers as it did for resnet18."""
    monkeypatch.setattr(outside, "run_probe", lambda *_: resnet_probe)


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(outside_probe, "PROBE", [sys.executable, "-c", code])


# --- loading


def test_unknown_name_says_near_ones() -> None:
    with pytest.raises(OutsideError, match=r"no model 'resnet18x': did you mean .*timm/resnet18\b"):
        load_outside("resnet18x", None)
    with pytest.raises(OutsideError, match="no model 'hf_hub:someone/something'"):
        load_outside("hf_hub:someone/something", None)
    with pytest.raises(OutsideError, match=r"could not build resnet18\.nope: .*nope"):
        load_outside("resnet18.nope", None)


def test_no_classifier_is_refused() -> None:
    with pytest.raises(OutsideError, match="no classifier"):
        load_outside("test_resnet", 0)


def test_resolution_is_the_models_own() -> None:
    model, resolution = load_outside("test_vit", None)
    assert resolution == 160
    assert model.num_classes == 1000
    assert not model.training


# --- the probe


def test_hang_is_killed_and_points_to_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "import time; print('build the graph of', flush=True); time.sleep(60)")
    start = time.monotonic()
    with pytest.raises(OutsideError) as caught:
        run_probe("efficientvit_m0", 224, CLASSES, 8, time_limit_s=3)
    assert time.monotonic() - start < 30
    assert str(caught.value) == (
        "torch-pruning could not build the graph of timm/efficientvit_m0 within 3 s; "
        "our own efficientvit_m0 can be pruned: vitnas prune --model efficientvit_m0"
    )


def test_failing_child_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "import sys; print('cut'); sys.exit('IndexError: out of bounds')")
    with pytest.raises(
        OutsideError, match=r"^torch-pruning could not cut timm/resnet18 \(IndexError: out of bounds\)$"
    ):
        run_probe("resnet18", 224, CLASSES, 8, time_limit_s=60)


def test_killed_child_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(OutsideError, match="killed by SIGKILL"):
        run_probe("resnet18", 224, CLASSES, 8, time_limit_s=60)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds a child to its parent")
def test_a_probe_dies_with_its_parent(tmp_path: Path) -> None:
    probe = """
        import json, os, sys, time
        from pathlib import Path
        from pruning import outside_probe

        request = {"fallback": False, "time_limit_s": 90, "parent": os.getpid()}
        read, write = os.pipe()
        os.write(write, json.dumps(request).encode())
        os.close(write)
        if os.fork() == 0:
            sys.stdin = os.fdopen(read)
            outside_probe._attempt = lambda **_: (Path(sys.argv[1]).write_text(str(os.getpid())), time.sleep(100))
            outside_probe.answer_probe()
        time.sleep(100)
    """
    told = tmp_path / "pid"
    parent = Forked(textwrap.dedent(probe), str(told))
    deadline = time.monotonic() + 60
    while not (told.exists() and told.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    pid = int(told.read_text())
    assert psutil.pid_exists(pid)
    parent.kill()
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], 60)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def probe_here(name: str, resolution: int, inner: bool = False) -> int:
    return outside_probe._attempt(name, resolution, CLASSES, 8, inner, stage=lambda _: None)


def test_a_network_that_runs_but_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe_here("test_vit", 160) > 0
    monkeypatch.setattr(outside_graph, "_scale_queries", lambda *_: None)
    with pytest.raises(OutsideError, match="differs from the masked one"):
        probe_here("test_vit", 160)


def test_channels_coupled_wrongly_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    get_pruning_group = tp.DependencyGraph.get_pruning_group

    def shifted(self: tp.DependencyGraph, *args: object) -> tp.dependency.Group:
        group = get_pruning_group(self, *args)
        dep, indices = group[-1]
        if 0 < len(indices) < 16:
            group[-1] = tp._helpers.GroupItem(dep, [i ^ 1 for i in indices])
        return group

    monkeypatch.setattr(tp.DependencyGraph, "get_pruning_group", shifted)
    with pytest.raises(OutsideError, match="differs from the masked one"):
        probe_here("resnet18", 64)


def test_residual_streams_stay_where_only_inner_widths_work() -> None:
    model, _ = load_outside("fasternet_t0", CLASSES)
    with pytest.raises(IndexError):
        probe_here("fasternet_t0", 64)
    assert probe_here("fasternet_t0", 64, inner=True) < macs(model, 64) / 2


# --- refitting


def double(pruned: CutNetwork, group: Group, unit: int | None, twin: int) -> None:
    """Make a unit do what another one does, or nothing, in all that writes it; what reads it stays as it is."""
    for dep, indices in pruned.graph.get_pruning_group(group.root, group.prune, group.indices([twin])):
        module = dep.target.module
        if pruned._outputs(dep) or isinstance(module, outside_graph.NORMS):
            for tensor in filter(lambda each: each.ndim, (*module.parameters(), *module.buffers())):
                to = list(indices)
                tensor.data[to] = 0 if unit is None else tensor.data[[i + unit - twin for i in to]].clone()


@pytest.mark.parametrize(
    ("name", "size", "layer", "unit"),
    [
        ("test_resnet", 64, "layer3.0.conv2", 1),
        ("test_efficientnet", 64, "blocks.1.0.conv_exp", 1),  # its BatchNorm has an activation
        ("test_vit", 160, "blocks.0.mlp.fc1", 1),
        ("test_vit", 160, "blocks.1.attn.qkv", None),  # a head dim's product is not another's: those that do nothing
    ],
)
def test_channels_that_others_can_stand_in_for_are_no_loss(name: str, size: int, layer: str, unit: int | None) -> None:
    """Cut one after the other, the first before the second, and then refitted."""
    model = ordinary(name)
    pruned = CutNetwork(model, torch.zeros(1, 3, size, size), multiple_of=1, inner=False)
    for twin in (3, 5):
        double(pruned, group_of(pruned, layer), unit, twin)
    whole, wanted = copy.deepcopy(fresh(model)), logits(model, size)
    for twin in (3, 4):
        pruned.cut(group_of(pruned, layer), [twin])
    missed = (logits(model, size) - wanted).abs().max() / wanted.abs().max()
    assert missed > 1e-3 or unit is None, "the cut did nothing: the comparison shows nothing"
    images = torch.randn(24, 3, size, size, generator=torch.Generator().manual_seed(2))
    refitted = refit(whole.requires_grad_(False), fresh(model).requires_grad_(False), pruned.sources(), images)
    assert (refitted > 0) == (unit is not None)
    assert (logits(model, size) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_fewer_images_refit_a_network_of_large_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ordinary("test_vit")
    monkeypatch.setattr(outside, "run_probe", lambda *_: Probe(1, None))
    images = torch.randn(24, 3, 160, 160, generator=torch.Generator().manual_seed(2))
    largest = outside._largest(model, images[:1])
    assert largest == max(100 * 64, 101 * 3 * 64, 101 * model.blocks[0].mlp.fc1.out_features)
    monkeypatch.setattr(outside, "ACTIVATION", 5 * largest)
    result = prune_outside(model, 160, batches(160), macs(model, 160) * 3 // 4, "magnitude", 8, 1, inputs=images)
    assert result.refitted > 0
    assert result.refitted_on == 5


# --- pruning


def test_prunes_end_to_end(resnet_probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "run_probe", lambda *_: resnet_probe)
    model, told = ordinary("resnet18"), []
    before = macs(model, 64)
    result = prune_outside(model, 64, batches(64), before // 2, "taylor", 8, 3, progress=lambda *now: told.append(now))
    assert result.macs_before == before
    assert before * 0.4 < result.macs_after <= before // 2
    assert result.macs_after == macs(model, 64)
    assert result.params_after == sum(p.numel() for p in model.parameters()) < result.params_before
    assert [now[:2] for now in told] == [(1, 3), (2, 3), (3, 3)]
    assert before > told[0][2] > told[1][2] > told[2][2] == result.macs_after
    assert result.inner_only is None

    layers = {layer.name: layer for layer in result.layers}
    assert layers["fc"].after[1] == CLASSES
    assert all(layer.after[1] % 8 == 0 for layer in result.layers if layer.name != "fc")
    conv = layers["layer4.1.conv1"]
    assert conv.after == (model.layer4[1].conv1.in_channels, model.layer4[1].conv1.out_channels)
    assert conv.removed == pytest.approx(1 - conv.after[0] * conv.after[1] / (conv.before[0] * conv.before[1]))

    assert logits(model, 64).shape == (2, CLASSES)
    model.train()(torch.randn(2, 3, 64, 64)).sum().backward()  # trains on
    assert all(p.grad.shape == p.shape for p in model.parameters())
    again, _ = load_outside("resnet18", CLASSES)
    resize_outside(again, model.state_dict())
    assert torch.equal(logits(again, 64), logits(model, 64))


def test_vit_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(probe_here("test_vit", 160), inner_only=None)
    monkeypatch.setattr(outside, "run_probe", lambda *_: probe)
    model = ordinary("test_vit")
    before = macs(model, 160)
    result = prune_outside(model, 160, batches(160), int(0.4 * before), "magnitude", 8, 2)
    assert result.macs_after <= 0.4 * before
    attention = model.blocks[0].attn
    assert attention.head_dim < 32
    assert attention.head_dim % 8 == 0
    again, _ = load_outside("test_vit", CLASSES)
    assert torch.equal(logits(resize_outside(again, model.state_dict()), 160), logits(model, 160))


@pytest.mark.usefixtures("no_probe")
@pytest.mark.parametrize("criterion", ["magnitude", pytest.param("random", marks=pytest.mark.slow), "torch-pruning"])
def test_uniform_criteria_cut_the_same_share_of_every_group(criterion: str) -> None:
    model = ordinary("resnet18")
    result = prune_outside(model, 64, batches(64), int(0.5 * macs(model, 64)), criterion, 8, 2)
    layers = [layer for layer in result.layers if layer.name != "fc"]
    kept = layers[-1].after[1] / layers[-1].before[1]  # of the widest
    assert 0.5 < kept < 0.9
    assert all(layer.after[1] / layer.before[1] == pytest.approx(kept, abs=8 / layer.before[1]) for layer in layers)


@pytest.mark.usefixtures("no_probe")
def test_the_stated_minimum_is_reachable_and_nothing_below(resnet_probe: Probe) -> None:
    model = ordinary("resnet18")
    minimum = resnet_probe.minimum_macs
    with pytest.raises(OutsideError, match=f"the reachable minimum is {minimum / 1e6:.1f} M with widths of 8"):
        prune_outside(model, 64, batches(64), minimum - 1, "magnitude", 8, 1)
    result = prune_outside(model, 64, batches(64), minimum, "magnitude", 8, 1)
    assert result.macs_after == minimum
    assert {layer.after[1] for layer in result.layers} == {8, CLASSES}


def test_target_must_be_below_the_model() -> None:
    model = ordinary("resnet18")
    with pytest.raises(OutsideError, match="not below"):
        prune_outside(model, 64, batches(64), macs(model, 64), "taylor", 8, 1)


@pytest.mark.usefixtures("no_probe")
@pytest.mark.parametrize("criterion", ["taylor", "torch-pruning"])
def test_zero_initialised_scales_are_refused(criterion: str) -> None:
    model, _ = load_outside("resnet18", CLASSES)  # the last BatchNorm of each branch is zero
    before = macs(model, 64)
    with pytest.raises(OutsideError, match=r"importances of layer\d\.\d\.conv1's \d+ units are all zero or not finite"):
        prune_outside(model, 64, batches(64), before // 2, criterion, 8, 1)
    assert macs(model, 64) == before


@pytest.mark.usefixtures("no_probe")
def test_cutting_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tp.dependency.Group, "prune", lambda *_: None)
    model = ordinary("resnet18")
    with pytest.raises(OutsideError, match="cut nothing"):
        prune_outside(model, 64, batches(64), macs(model, 64) // 2, "magnitude", 8, 1)


@pytest.mark.usefixtures("no_probe")
def test_no_images_are_refused() -> None:
    model = ordinary("resnet18")
    with pytest.raises(OutsideError, match="no images"):
        prune_outside(model, 64, list, macs(model, 64) // 2, "taylor", 8, 1)


def test_taylor_importance_is_what_the_docstring_says() -> None:
    model = ordinary("resnet18")
    pruned = network(model, 64)
    outside._gradients(model, batches(64)())
    scores = pruned._scores(group_of(pruned, "layer1.0.conv1"), outside.CRITERIA["taylor"].importance())
    first, second = ((c.weight * c.weight.grad).abs().detach() for c in (model.layer1[0].conv1, model.layer1[0].conv2))
    torch.testing.assert_close(scores, first.sum((1, 2, 3)) + second.sum((0, 2, 3)))


def test_estimated_macs_of_a_unit_are_exact_for_one_group() -> None:
    for name, layer, resolution in [("resnet18", "layer2.0.conv1", 64), ("test_vit", "blocks.0.attn.qkv", 160)]:
        pruned = network(ordinary(name), resolution)
        group = group_of(pruned, layer)
        estimate = pruned._unit_macs(group, count_macs(pruned.model, pruned.images)) * 8
        before = pruned.macs()
        pruned.cut(group, list(range(8)))
        assert before - pruned.macs() == pytest.approx(estimate, rel=1e-6)


# --- masked equals sliced, against masks written by hand


@pytest.mark.parametrize(
    ("layer", "convolutions", "norms"),
    [
        ("layer1.0.conv1", ["layer1.0.conv1"], ["layer1.0.bn1"]),
        (
            "layer2.0.conv2",
            ["layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"],
            ["layer2.0.bn2", "layer2.0.downsample.1", "layer2.1.bn2"],
        ),
    ],
)
def test_masked_equals_sliced(layer: str, convolutions: list[str], norms: list[str]) -> None:
    model = ordinary("resnet18")
    masked, units = copy.deepcopy(model), [1, 2, 5, 11, 30, 31, 40, 63]
    with torch.no_grad():
        for name in convolutions:
            masked.get_submodule(name).weight[units] = 0
        forgotten = logits(masked, 64)  # BatchNorm's bias and running mean are left behind
        for name in norms:
            masked.get_submodule(name).weight[units] = 0
            masked.get_submodule(name).bias[units] = 0
    pruned = network(model, 64)
    pruned.cut(group_of(pruned, layer), units)
    expected = logits(masked, 64)
    torch.testing.assert_close(logits(model, 64), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert (forgotten - expected).abs().max() > 1e-3 * expected.abs().max()


def test_head_dims_keep_the_scale_fused_or_not() -> None:
    model = ordinary("test_vit")
    attention = model.blocks[0].attn
    with torch.no_grad():
        attention.qkv.weight.mul_(20)  # logits far from uniform, so that their scale shows
    masked, units = copy.deepcopy(model), [0, 3, 4, 9, 16, 22, 30, 31]
    rows = [part * 64 + head * 32 + unit for part in range(3) for head in range(2) for unit in units]
    with torch.no_grad():
        masked.blocks[0].attn.qkv.weight[rows] = 0
        masked.blocks[0].attn.qkv.bias[rows] = 0
    pruned = network(model, 160)
    pruned.cut(group_of(pruned, "blocks.0.attn.qkv"), units)
    assert attention.head_dim == 24
    expected = logits(masked, 160)
    tolerance = 1e-5 * expected.abs().max().item()
    for fused in (True, False):
        attention.fused_attn = fused
        torch.testing.assert_close(logits(model, 160), expected, rtol=0, atol=tolerance)
    with torch.no_grad():
        outside_graph._scale_queries(attention, (32 / 24) ** 0.5)  # the scale of the new head dim instead
    assert (logits(model, 160) - expected).abs().max() > 100 * tolerance


def test_macs_agree_with_fvcore() -> None:
    from fvcore.nn import FlopCountAnalysis

    model, images = ordinary("resnet18"), torch.zeros(1, 3, 64, 64)
    theirs = FlopCountAnalysis(model, images).by_operator()
    assert count_macs(model, images)[""] == theirs["conv"] + theirs["linear"]


# --- slow


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientvit_m0", "levit_128s", "shvit_s1"])
def test_our_families_are_refused_with_a_pointer(name: str) -> None:
    with pytest.raises(OutsideError, match=rf"could not .* timm/{name} .*vitnas prune --model {name}$"):
        run_probe(name, 224, CLASSES, 8, time_limit_s=30)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("mobilenetv3_small_100", False),
        ("lcnet_075", False),
        ("deit_tiny_patch16_224", False),
        ("convnext_atto", False),
        ("repghostnet_100", False),
        ("tiny_vit_5m_224", False),
        ("swin_tiny_patch4_window7_224", True),
        ("fasternet_t0", True),
    ],
)
def test_well_known_models(name: str, inner: bool) -> None:
    model = ordinary(name)
    before = macs(model, 224)
    result = prune_outside(model, 224, batches(224), before // 2, "taylor", 8, 2, time_limit_s=120)
    assert 0.45 * before < result.macs_after <= before // 2
    assert (result.inner_only is not None) == inner
    again, _ = load_outside(name, CLASSES)
    assert torch.equal(logits(resize_outside(again, model.state_dict()), 224), logits(model, 224))


@pytest.mark.slow
def test_child_ends_by_itself_where_nobody_waits() -> None:
    request = {"name": "efficientvit_m0", "resolution": 224, "num_classes": 10, "multiple_of": 8}
    orphan = subprocess.Popen(outside_probe.PROBE, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    orphan.stdin.write(json.dumps(request | {"time_limit_s": 10, "fallback": False}))
    orphan.stdin.close()
    assert orphan.wait(60) == -signal.SIGALRM
