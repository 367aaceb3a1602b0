"""`Training` and `Updater`: recipes on tiny networks, against plain loops and timm's own."""

from __future__ import annotations

import dataclasses
import itertools
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad, random_seed
from torch import Tensor, nn

import nas.training.engine
from nas.data.batches import loader
from nas.data.images import Images, plain_transform
from nas.data.pixels import IMAGENET
from nas.errors import DiskFull, TrainingError, UserError
from nas.process import WorkerError
from nas.training import together
from nas.training.device import CPU
from nas.training.engine import Training
from nas.training.evaluation import evaluate
from nas.training.recipes import RECIPES, Recipe
from nas.training.updater import Updater
from search_spaces import create_model, get_arch
from search_spaces.weights import fit as load
from search_spaces.weights import translate

PLAIN = Recipe("plain", "tests", epochs=3, batch_size=8, lr=3e-3, lr_batch=8, weight_decay=0.05)
BLENDED = dataclasses.replace(PLAIN, blend=0.6)
RICH = dataclasses.replace(PLAIN, mixup=0.8, cutmix=1.0, drop_path=0.2, ema=0.99, clip=("agc", 0.02), repeats=2)


def pictures(count: int = 48, resolution: int = 16, classes: int = 4) -> Images:
    """Noise whose mean grey tells the class."""
    rng = np.random.default_rng(0)
    labels = [i % classes for i in range(count)]
    grey = [rng.integers(0, 90, (resolution, resolution, 3)) + 50 * label for label in labels]
    return Images([image.astype(np.uint8) for image in grey], labels, plain_transform(resolution, IMAGENET.whole()))


def network(seed: int = 0, classes: int = 4) -> nn.Module:
    """A convolution, BatchNorm and dropout."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8, classes),
    )
    model.num_classes = classes
    return model


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def narrow(helpers, family: str, **changes) -> nn.Module:
    torch.manual_seed(1)
    return create_model(helpers.random_arch(family, 3, num_classes=4, **changes))


# Course and checkpoints


def test_it_learns_and_tells_its_course():
    seen = []
    recipe = dataclasses.replace(PLAIN, epochs=8, lr=0.1)
    training = Training(network(), pictures(), recipe)
    training.run(progress=lambda done, total, loss: seen.append((done, total)))
    assert seen == [(8 * i, 8 * 48) for i in range(1, 49)]
    assert [row["epoch"] for row in training.history] == list(range(1, 9))
    losses, rates = ([row[key] for row in training.history] for key in ("loss", "lr"))
    assert losses[-1] < 0.8 * losses[0]
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert evaluate(training.network, loader(pictures(), 8, shuffle=False, seed=0)).top1 > 70


@pytest.mark.parametrize("recipe", [PLAIN, RICH, BLENDED], ids=["plain", "rich", "blended"])
def test_stopped_at_an_epoch_it_goes_on_bit_for_bit(recipe, tmp_path):
    """Also where trainings take turns in one process."""
    whole = Training(network(), pictures(), recipe)
    whole.run()
    other = Training(network(5), pictures(), recipe, seed=7)
    file = tmp_path / "new" / "checkpoint"
    for epochs, seed in ((1, 0), (2, 3), (None, 4)):
        part = Training(network(seed), pictures(), recipe, checkpoint=file)
        part.run(epochs)
        other.run(epochs)
    assert same(whole.model, part.model)
    assert same(whole.network, part.network)
    assert part.epoch == 3
    assert [row["loss"] for row in part.history] == [row["loss"] for row in whole.history]
    assert not same(whole.model, other.model)
    assert (whole.network is whole.model) == (recipe is PLAIN)


def test_a_blend_is_between_the_first_and_the_learnt_weights():
    first, judged = network(), []
    training = Training(network(), pictures(), BLENDED, validate=lambda found: judged.append(found) or {})
    plain = Training(network(), pictures(), PLAIN)
    training.run()
    plain.run()
    assert same(training.model, plain.model), "what is learnt is as without it"
    begun, learnt = first.state_dict(), training.model.state_dict()
    for name, value in training.network.state_dict().items():
        wanted = 0.4 * begun[name] + 0.6 * learnt[name] if value.is_floating_point() else learnt[name]
        torch.testing.assert_close(value, wanted)
    assert same(judged[-1], training.network), "it is what is judged"


class Clock:
    """An update takes a minute."""

    def __init__(self, monkeypatch) -> None:
        self.now, step = 0.0, Updater.step
        monkeypatch.setattr(nas.training.engine, "time", self)

        def timed(*args):
            self.now += 60
            return step(*args)

        monkeypatch.setattr(Updater, "step", timed)

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("recipe", [PLAIN, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("how", ["asked to stop", "killed"])
def test_stopped_within_an_epoch_it_goes_on_bit_for_bit(recipe, how, tmp_path, monkeypatch):
    """Where it was asked to stop, or with what is kept every few minutes; an image that is broken takes its place."""
    data = pictures(96)
    data.sources[5] = Path("no such file")
    Clock(monkeypatch)
    whole = Training(network(), data, recipe)
    whole.run()
    file, begun, asked = tmp_path / "checkpoint", [], iter([False] * 6 + [True] + [False] * 9 + [True] + [False] * 99)
    stop = (lambda: next(asked)) if how == "asked to stop" else (lambda: False)
    for at in (7, 9, 99):
        part = Training(network(at - 7), data, recipe, checkpoint=file)
        begun.append((part.epoch, part.within.updates))

        def killed(done: int, total: int, loss: float, last: int = at) -> None:
            if how == "killed" and done == 8 * last:
                raise KeyboardInterrupt

        try:
            part.run(None, killed, stop)
        except KeyboardInterrupt:
            assert (tmp_path / "checkpoint-within").is_file()
    assert begun == ([(0, 0), (0, 6), (1, 3)] if how == "asked to stop" else [(0, 0), (0, 4), (0, 8)])
    assert same(whole.model, part.model)
    assert same(whole.network, part.network)
    assert [row["loss"] for row in part.history] == [row["loss"] for row in whole.history]
    assert [row["seconds"] for row in part.history] == [720] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_diverged_epoch_goes_back_to_the_one_before(tmp_path, monkeypatch):
    """Not to what was kept within it, and a checkpoint within an epoch that is done counts for nothing."""
    Clock(monkeypatch)
    file = tmp_path / "checkpoint"
    training = Training(network(), pictures(), PLAIN, checkpoint=file)
    training.run(1)
    done = [value.clone() for value in training.model.state_dict().values()]
    asked = iter([False] * 4 + [True])
    with pytest.raises(KeyboardInterrupt):
        training.run(None, stop=lambda: next(asked))
    old = (tmp_path / "checkpoint-within").read_bytes()
    training.restore(within=False)
    assert (training.epoch, training.within.updates) == (1, 0)
    assert all(torch.equal(a, b) for a, b in zip(done, training.model.state_dict().values(), strict=True))
    training.run(2)
    (tmp_path / "checkpoint-within").write_bytes(old)
    again = Training(network(), pictures(), PLAIN, checkpoint=file)
    assert (again.epoch, again.within.updates) == (2, 0)
    assert same(again.model, training.model)


def test_one_update_in_all_is_made_at_the_full_rate(caplog):
    """timm would warm up only, and warn of its schedule."""
    training = Training(network(), pictures(8), dataclasses.replace(PLAIN, epochs=1))
    training.run()
    assert training.history[0]["lr"] == PLAIN.peak_lr
    assert not caplog.records


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("seed", {"seed": 1}),
        ("recipe", {"recipe": dataclasses.replace(PLAIN, lr=1e-4)}),
        ("images", {"data": pictures(40)}),
        ("network", {"model": nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten())}),
        ("at_once", {"accumulate": 2}),
        ("precision", {"precision": "bf16"}),
        ("teacher", {"teacher": network(1)}),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(what, changes, tmp_path):
    given = {"model": network(), "data": pictures(), "recipe": PLAIN, "checkpoint": tmp_path / "checkpoint"}
    Training(**given).run(1)
    assert Training(**given).epoch == 1
    with pytest.raises(UserError, match=f"another training \\({what} differs\\)"):
        Training(**given | changes)


def test_a_checkpoint_of_an_older_version_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(nas.training.engine, "ranks", lambda: (0, 2))
    recipe, file = dataclasses.replace(PLAIN, epochs=2), tmp_path / "checkpoint"
    Training(network(), pictures(), recipe, checkpoint=file).run(until=1)
    state = torch.load(file, weights_only=True)
    for name in ("batch_norm", "from_probe", "rates"):
        del state["agree"]["recipe"][name]
    state["agree"]["batch"] = state["agree"].pop("at_once") // 2
    torch.save(state, file)
    assert Training(network(), pictures(), recipe, checkpoint=file).epoch == 1
    del state["agree"]["recipe"]["blend"], state["first"]
    torch.save(state, file)
    training = Training(network(), pictures(), dataclasses.replace(recipe, blend=0.6), checkpoint=file)
    assert training.network is training.model, "it ends as it was begun"
    assert training.recipe.blend == 1, "and says so"
    with pytest.raises(UserError, match="recipe differs"):
        Training(network(), pictures(), dataclasses.replace(recipe, batch_norm="frozen"), checkpoint=file)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, fill_disk, monkeypatch):
    file = tmp_path / "checkpoint"
    training = Training(network(), pictures(), PLAIN, checkpoint=file)
    training.run(1)
    before = file.read_bytes()
    with monkeypatch.context():
        fill_disk()
        with pytest.raises(DiskFull, match=rf"^no space left in {tmp_path} .*at least .* needed.*: make room, then"):
            training.run()
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    monkeypatch.undo()
    again = Training(network(9), pictures(), PLAIN, checkpoint=file)
    again.run()
    whole = Training(network(), pictures(), PLAIN)
    whole.run()
    assert same(again.model, whole.model)


def test_findings_of_each_epoch_enter_the_history(tmp_path):
    def validate(model: nn.Module) -> dict[str, float]:
        return {"top1": evaluate(model, loader(pictures(), 8, shuffle=False, seed=0)).top1}

    file = tmp_path / "checkpoint"
    Training(network(), pictures(), RICH, checkpoint=file, validate=validate).run(2)
    found = Training(network(), pictures(), RICH, checkpoint=file)
    assert [row["top1"] for row in found.history][1] == validate(found.network)["top1"]


# Faults


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_loss_that_is_not_finite_names_its_epoch(epoch, tmp_path):
    training = Training(network(), pictures(), PLAIN, checkpoint=tmp_path / "checkpoint")
    if epoch > 1:
        training.run(epoch - 1)
    good = [value.clone() for value in training.model.state_dict().values()]
    with torch.no_grad():
        training.model[0].weight[0] = torch.nan
    with pytest.raises(TrainingError, match=f"the loss is no longer finite in epoch {epoch}") as found:
        training.run()
    assert found.value.epoch == epoch
    assert training.epoch == len(training.history) == epoch - 1
    if epoch > 1:
        training.restore()
        assert all(torch.equal(a, b) for a, b in zip(good, training.model.state_dict().values(), strict=True))


def test_weights_that_the_last_update_broke_are_not_kept(tmp_path, monkeypatch):
    """The loss before it was still finite."""
    file = tmp_path / "checkpoint"
    training = Training(network(), pictures(8), PLAIN, checkpoint=file)
    training.run(1)
    step = Updater.step

    def broken(self: Updater, at: int, batches: list) -> Tensor:
        loss = step(self, at, batches)
        with torch.no_grad():
            training.model[0].weight[0] = torch.inf
        return loss

    monkeypatch.setattr(Updater, "step", broken)
    with pytest.raises(TrainingError, match="weights are no longer finite in epoch 2"):
        training.run()
    assert Training(network(), pictures(8), PLAIN, checkpoint=file).epoch == 1


class Limited(nn.Module):
    """Runs out of memory above `most` images, in forward or in backward."""

    def __init__(self, model: nn.Module, most: int, error: Exception, backward: bool) -> None:
        super().__init__()
        self.model, self.most, self.error, self.backward = model, most, error, backward
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        y = self.model(x)
        if len(x) > self.most:
            if not self.backward:
                raise self.error
            self.model[0].weight.register_hook(self.fail)  # the classifier has its gradients by then
        return y

    def fail(self, gradient: Tensor) -> None:
        if self.sizes[-1] > self.most:
            raise self.error


def flat() -> nn.Module:
    """No BatchNorm, no dropout: batches may be split."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_halves_the_batch_and_keeps_the_update(error, backward):
    said: list[str] = []
    wanted = Training(flat(), pictures(), PLAIN)
    wanted.run(1)
    limited = Limited(flat(), 3, error, backward)
    training = Training(limited, pictures(), PLAIN, say=said.append)
    training.run(1)
    assert max(limited.sizes[-6:]) == 2
    for ours, theirs in zip(limited.model.parameters(), wanted.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert [line.split(":")[0] for line in said] == ["out of memory"] * 2
    assert "going on with 2 images at a time" in said[-1]


def test_the_batch_that_fits_is_remembered(tmp_path):
    """In the same run, and by one that goes on."""
    file, recipe = tmp_path / "checkpoint", dataclasses.replace(PLAIN, epochs=2)
    said: list[str] = []
    for epoch in (1, 2):
        limited = Limited(network(), 4, MemoryError(), False)
        limited.model.num_classes = 4
        Training(limited, pictures(), recipe, checkpoint=file, say=said.append).run(epoch)
        assert limited.sizes[(epoch == 1) :] == [4] * 12
    assert said == [
        "out of memory: going on with 4 images at a time, gradients accumulated to the same update; "
        "BatchNorm sees the smaller batches"
    ]


def test_no_memory_for_two_images():
    with pytest.raises(TrainingError, match=r"^out of memory with 2 images: lower --resolution"):
        Training(Limited(flat(), 1, MemoryError(), False), pictures(), PLAIN, say=lambda line: None).run()


def test_other_errors_are_told_as_such(tmp_path):
    """In one line; the checkpoint is that of the epoch before."""
    file = tmp_path / "checkpoint"
    training = Training(
        Limited(flat(), 8, RuntimeError("shapes\n  1 and 2"), False), pictures(), PLAIN, checkpoint=file
    )
    training.run(1)
    training.model.most = 7
    with pytest.raises(TrainingError, match=r"^training in epoch 2 failed: shapes$") as found:
        training.run()
    assert found.value.epoch == 2
    assert torch.load(file)["epoch"] == 1


def test_judging_runs_out_of_memory(monkeypatch):
    """Smaller batches give the same figures; what fails on one image is told."""
    said: list[str] = []
    batches = list(loader(pictures(), 16, shuffle=False, seed=0))
    wanted = evaluate(flat(), batches)
    limited = Limited(flat(), 4, torch.OutOfMemoryError("CUDA out of memory"), False)
    found = evaluate(limited, batches, say=said.append)
    assert (found.correct, found.total) == (wanted.correct, wanted.total)
    assert found.loss == pytest.approx(wanted.loss)
    assert limited.sizes == [16, 8] + [4] * 12
    assert said == [f"out of memory: judging goes on with {count} images at a time" for count in (8, 4)]
    with pytest.raises(TrainingError, match=r"^out of memory with one image to judge"):
        evaluate(Limited(flat(), 0, MemoryError(), False), batches, say=said.append)
    with pytest.raises(TrainingError, match=r"^judging failed: shapes$"):
        evaluate(Limited(flat(), 0, RuntimeError("shapes"), False), batches)


def test_fewer_images_than_a_batch():
    said: list[str] = []
    training = Training(flat(), pictures(6), PLAIN, say=said.append)
    training.run()
    assert said == ["updates of 6 images, not 8: the learning rate is scaled with them"]
    assert training.updates == 1
    assert training.recipe.peak_lr == pytest.approx(PLAIN.lr * 6 / 8)
    with pytest.raises(UserError, match="batches of 1 images"):
        Training(flat(), pictures(6), PLAIN, accumulate=4)


# Updates


def test_an_update_of_every_recipe_is_that_of_a_plain_loop():
    """Mixed, clipped adaptively, averaged, on a cosine; drop-last, and a new order each epoch."""
    training = Training(network(), pictures(44), RICH, seed=5)
    training.run()
    twin = network()
    images = loader(pictures(44), 8, shuffle=True, seed=5, repeats=2)
    decaying = [p for p in twin.parameters() if p.ndim > 1]
    others = [p for p in twin.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decaying, "weight_decay": 0.05}, {"params": others, "weight_decay": 0}])
    mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=4)
    ema = ModelEmaV3(twin, 0.99, use_warmup=True)
    total, update = 3 * 5, 0
    for epoch in range(3):
        images.set_epoch(epoch)
        twin.train()
        for x, y in itertools.islice(images, 5):
            random_seed(int(np.random.SeedSequence([5, update, 0]).generate_state(1)[0]))
            x, y = mixup(x.clone(), y)
            rate = 3e-3 * (1 + np.cos(np.pi * update / total)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate if update else 1e-6
            optimizer.zero_grad()
            torch.sum(-y * F.log_softmax(twin(x), dim=1), dim=1).mean().backward()
            dispatch_clip_grad(twin.parameters(), 0.02, "agc")
            optimizer.step()
            update += 1
            ema.update(twin, update)
    for ours, theirs in ((training.model, twin), (training.network, ema.module)):
        for name, value in theirs.state_dict().items():
            assert torch.allclose(value.float(), ours.state_dict()[name].float(), atol=1e-5), name
    assert not same(training.model, training.network)


def test_accumulated_parts_make_the_same_update():
    whole, parts = flat(), flat()
    Training(whole, pictures(), PLAIN).run(1)
    Training(parts, pictures(), PLAIN, accumulate=4).run(1)
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_stays_near_full_precision(precision, helpers, tmp_path):
    """Weights stay fp32; half of the work is in fewer bits, so losses differ a little, and a stop changes nothing."""
    trainings = []
    for kind, stops in (("fp32", (2,)), (precision, (2,)), (precision, (1, 2))):
        model = narrow(helpers, "levit")
        data = pictures(32, model.arch.resolution)
        for stop in stops:
            training = Training(model, data, PLAIN, precision=kind, checkpoint=tmp_path / f"{kind}-{len(stops)}")
            training.run(stop)
        trainings.append(training)
    full, half, stopped = trainings
    assert [row["loss"] for row in half.history] == pytest.approx([row["loss"] for row in full.history], rel=0.05)
    assert all(value.dtype == torch.float32 for value in half.model.parameters())
    assert not same(full.model, half.model)
    assert same(half.model, stopped.model)


def test_mixing_takes_an_even_number_and_broken_files_are_left_out():
    data = pictures(48)
    data.sources[5] = Path("no such file")
    training = Training(network(), data, dataclasses.replace(RICH, repeats=1))
    training.run(1)
    assert training.loader.skipped == ["no such file"]


def test_a_batch_that_a_broken_file_leaves_one_image_of_is_left_out_alone():
    """All other images of the epoch are trained on."""
    data, done = pictures(48), []
    data.sources[5] = Path("no such file")
    training = Training(network(), data, dataclasses.replace(PLAIN, batch_size=2))
    training.run(1, lambda *told: done.append(told))
    assert len(done) == 23


# Distillation


class Choice(nn.Module):
    """A teacher: fixed logits for each image, by its mean."""

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return torch.stack([x.mean((1, 2, 3)) * k for k in (1.0, -2.0, 3.0, 0.5)], 1)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("distilled", [True, False])
def test_distillation_by_hand(kind, distilled, helpers):
    """With two heads the second one learns from the teacher, with one it learns from both."""
    model = narrow(helpers, "levit", distilled=distilled)
    data = pictures(8, model.arch.resolution)
    images, labels = next(iter(loader(data, 8, shuffle=False, seed=0)))
    updater = Updater(model, dataclasses.replace(PLAIN, distillation=kind), 10, "cpu", teacher=Choice())
    model.train()
    features: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0].detach()))
    before = {name: value.clone() for name, value in model.head.state_dict().items()}
    loss = updater.step(0, [(images, labels)])
    model.head.load_state_dict(before)
    first = model.head.cls(features[0])
    second = model.head.dist(features[0]) if distilled else first
    wanted = Choice().eval()(images)
    on_labels = F.cross_entropy(first, labels, label_smoothing=0.1)
    if kind == "hard":
        on_teacher = F.cross_entropy(second, wanted.argmax(1))
    else:
        on_teacher = 4 * F.kl_div((second / 2).log_softmax(1), (wanted / 2).softmax(1), reduction="batchmean")
    assert loss.item() == pytest.approx((on_labels + on_teacher).item() / 2, rel=1e-4)
    assert all(value.grad is not None and value.grad.any() for value in model.head.parameters())


def test_evaluation_has_the_mean_of_both_heads(helpers):
    model = narrow(helpers, "levit", distilled=True)
    data = pictures(16, model.arch.resolution)
    training = Training(model, data, PLAIN, teacher=Choice())
    training.run(1)
    model.eval()
    x = torch.stack([data[i][0] for i in range(4)])
    seen: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(x)
        handle.remove()
        assert torch.allclose(logits, (model.head.cls(seen[0]) + model.head.dist(seen[0])) / 2)


# Families


@pytest.mark.parametrize("how", ["train", "frozen"])
def test_frozen_batch_norm_keeps_its_statistics_and_normalises_with_them(how):
    model, recipe = network(), dataclasses.replace(PLAIN, epochs=1, batch_norm=how)
    norm, gamma = model[1], model[1].weight.clone()
    norm.running_mean += 0.5
    before = norm.running_mean.clone(), norm.running_var.clone()
    training = Training(model, pictures(), recipe)
    training.run()
    kept = torch.equal(norm.running_mean, before[0]) and torch.equal(norm.running_var, before[1])
    assert kept == (how == "frozen")
    assert not torch.equal(norm.weight, gamma)
    assert model[5].training


def test_drop_path_and_keep_rates_follow_the_recipe():
    """EViT begins as DeiT and ends at its own rates, iteration by iteration."""
    arch = get_arch("evit_tiny_keep50", 4).at(64)
    model = create_model(arch)
    recipe = dataclasses.replace(PLAIN, drop_path=0.3, keep_warmup=(0.25, 0.75), epochs=2)
    counts: list[int] = []
    model.blocks[-1].register_forward_pre_hook(lambda module, inputs: counts.append(inputs[0].shape[1]))
    training = Training(model, pictures(32, 64), recipe)
    assert model.blocks[-1].ffn.branch_gate.drop_path == pytest.approx(0.3)
    training.run()
    whole, own = 17, arch.token_counts()[-1] + 1
    assert counts == sorted(counts, reverse=True)
    assert counts[:3] == [whole] * 3
    assert counts[-2:] == [own] * 2
    assert whole > counts[4] > own


@pytest.mark.parametrize(("family", "updates"), [("evit", 200), ("sepvit", 120)])
def test_families_without_an_oracle_overfit_a_batch(family, updates, helpers):
    model = narrow(helpers, family)
    images, _ = next(iter(loader(pictures(8, model.arch.resolution), 8, shuffle=False, seed=0)))
    labels = torch.arange(8) // 2  # against the grey levels
    recipe = dataclasses.replace(PLAIN, label_smoothing=0.0, lr=0.01)
    updater = Updater(model.train(), recipe, updates, "cpu")
    losses = [updater.step(i, [(images, labels)]).item() for i in range(updates)]
    assert losses[-1] < 0.1 < losses[0]


REFERENCE = {
    "levit": ("levit_128s", "levit_128s", 64, {"img_size": 64}),
    "efficientvit": ("efficientvit_m0", "efficientvit_m0", 112, {"img_size": 112}),
    "shvit": ("shvit_s1", "shvit_s1", 64, {}),
    "evit": ("deit_tiny", "deit_tiny_patch16_224", 64, {"img_size": 64}),
}


@pytest.mark.parametrize(
    "family", ["levit", *(pytest.param(each, marks=pytest.mark.slow) for each in ("efficientvit", "shvit", "evit"))]
)
def test_the_loss_curve_is_timm_s(family):
    """Five updates of the family's recipe on equal weights and images, in fp64: timm's network, its parameter groups,
    optimizer, schedule, mixup and clipping on one side, ours on the other."""
    name, timm_name, resolution, options = REFERENCE[family]
    recipe = dataclasses.replace(RECIPES[family], batch_size=4, epochs=1, lr=1e-3, lr_batch=4, drop_path=0.0)
    torch.manual_seed(0)
    theirs = timm.create_model(timm_name, num_classes=4, **options)
    model = create_model(get_arch(name, 4).replace(resolution=resolution))
    state = model.state_dict()
    load(model, translate(theirs.state_dict(), model.arch, state))
    model, theirs = model.double().train(), theirs.double().train()
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(4, 3, resolution, resolution, generator=generator).double(), torch.arange(4)) for _ in range(5)
    ]
    random_seed(3)
    updater = Updater(model, recipe, 5, "cpu")
    ours = [float(updater.step(i, [batch])) for i, batch in enumerate(batches)]
    random_seed(3)
    optimizer = create_optimizer_v2(theirs, "adamw", lr=1e-3, weight_decay=recipe.weight_decay)
    schedule = CosineLRScheduler(
        optimizer, t_initial=5, lr_min=1e-5, warmup_t=1, warmup_lr_init=1e-6, t_in_epochs=False
    )
    mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=4)
    wanted = []
    for i, (x, y) in enumerate(batches):
        schedule.step_update(i)
        x, y = mixup(x.clone(), y)
        optimizer.zero_grad()
        loss = torch.sum(-y * F.log_softmax(theirs(x), dim=1), dim=1).mean()
        loss.backward()
        if recipe.clip is not None:
            dispatch_clip_grad(theirs.parameters(), recipe.clip[1], recipe.clip[0])
        optimizer.step()
        wanted.append(loss.item())
    assert ours == pytest.approx(wanted, rel=1e-6)
    assert max(wanted) - min(wanted) > 0.01


# Several processes


def unnormalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))


def test_processes_that_train_together_end_as_one_does(tmp_path):
    recipe, said, seen = dataclasses.replace(PLAIN, epochs=2), [], []
    alone = Training(unnormalised(), pictures(16), recipe, checkpoint=tmp_path / "alone")
    alone.run(1)
    (tmp_path / "together").write_bytes((tmp_path / "alone").read_bytes())
    alone.run()
    made = Training(unnormalised(), pictures(16), recipe, checkpoint=tmp_path / "together")
    together.run_together(made, [CPU] * 3, lambda *told: seen.append(told), said.append)
    assert said == ["updates of 8 images: 2 of 3 processes train"]
    assert seen[-1] == (32, 32)
    assert (made.epoch, made.history[0]) == (2, alone.history[0])
    for name, value in alone.network.state_dict().items():
        assert torch.allclose(value, made.network.state_dict()[name], atol=1e-4)


def test_where_one_of_them_fails_the_training_has(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "MODULE", "crew_worker")
    made = Training(unnormalised(), pictures(16), PLAIN, checkpoint=tmp_path / "c")
    with pytest.raises(UserError, match="of 2 processes that trained together one failed: TypeError: ") as found:
        together.run_together(made, [CPU] * 2, lambda *_: None, print)
    assert found.type is UserError, "a process that is lost says nothing of the network"


@pytest.mark.parametrize(
    ("of_first", "kind", "why"),
    [
        ({"error": "closed by peer", "of_network": False}, UserError, "one failed: killed by signal 9"),
        (WorkerError("killed by signal 9"), UserError, "one failed: killed by signal 9"),
        ({"error": "no longer finite", "of_network": True}, TrainingError, "no longer finite"),
        ({"error": "cannot be written", "of_network": False}, UserError, "cannot be written"),
        (DiskFull("."), DiskFull, "no space left"),
    ],
)
def test_the_first_of_them_that_failed_is_heard_or_one_that_was_lost(monkeypatch, of_first, kind, why):
    """And not the others, which may never answer."""
    monkeypatch.setattr(together, "LOST_S", 0.01)
    others, first = Future(), Future()
    if isinstance(of_first, dict):
        first.set_result(of_first)
        if "signal" in why:
            others.set_exception(WorkerError("killed by signal 9"))
    else:
        first.set_exception(of_first)
    with pytest.raises(kind, match=why) as found:
        list(together._heard([others, first]))
    assert found.type is kind
