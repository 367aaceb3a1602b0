"""Fine-tuning: the probe first, then the rate, then the epochs; the better of probe and tuned network is kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import quick
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import nas.data.dataset
import nas.training.engine
import nas.training.prepare
import nas.training.probe
import nas.training.rates
import nas.training.run
import nas.training.start
import nas.training.updater
from nas.data.dataset import open_data
from nas.data.images import sample
from nas.errors import TrainingError
from nas.networks.build import classifier_of
from nas.training.course import Held, Trial
from nas.training.rates import choose_trial, speaks_for_tuning, standard_error
from nas.training.recipes import FINETUNE, LONG_BLEND, RECIPES
from nas.training.request import TrainRequest, choose_recipe
from nas.training.run import train
from search_spaces import Arch, create_model

ARGS = ("--epochs", "1", "--batch-size", "32", "--device", "cpu")


@pytest.fixture(scope="module")
def weights(helpers, tmp_path_factory) -> tuple[str, str]:
    """A tiny SHViT as arch.json, and a file of weights for it, of other classes."""
    raw = helpers.document(helpers.random_arch("shvit", 3, num_classes=10, resolution=32))
    arch = helpers.read(raw | {"stages": raw["stages"][:2]})
    folder = tmp_path_factory.mktemp("shvit")
    (folder / "arch.json").write_text(arch.to_json())
    torch.manual_seed(0)
    model = create_model(arch.replace(num_classes=7))
    save_file(model.state_dict(), folder / "given.safetensors")
    return str(folder / "arch.json"), str(folder / "given.safetensors")


def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of them, two rates, and probes of two strengths."""

    def open_few(*args) -> nas.data.dataset.ImageData:
        data = open_data(*args)
        return dataclasses.replace(data, train=sample(data.train, 120, 0), val=sample(data.val, 40, 0))

    monkeypatch.setattr(nas.data.dataset, "open_data", open_few)
    monkeypatch.setitem(RECIPES, "finetune", dataclasses.replace(FINETUNE, rates=(1e-4, 1e-3)))
    quick.short_probes(monkeypatch)


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    few_digits(monkeypatch)


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights of the tuning ARGS on all images, which nothing has interrupted."""
    out, (model, given) = tmp_path_factory.mktemp("whole"), weights
    with pytest.MonkeyPatch.context() as patch:
        few_digits(patch)
        patch.setattr(nas.training.prepare, "speaks_for_tuning", lambda *_: True)
        recipe = choose_recipe("finetune", 1, 32)
        train(TrainRequest(model, recipe, "cpu", out, weights=given))
    return load_file(out / "model.safetensors")


@pytest.fixture
def tune(vitnas, weights, tmp_path) -> Callable[..., tuple[int, str, str]]:
    def run(*more: str) -> tuple[int, str, str]:
        model, given = weights
        return vitnas("train", model, "--weights", given, "--out", str(tmp_path / "out"), *more)

    return run


def folder_of_images(folder: Path, **counts: int) -> Path:
    """Noise, so many images of each of two classes."""
    random = np.random.default_rng(0)
    for part, count in counts.items():
        for i, name in itertools.product(range(count), "ab"):
            file = folder / part / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (8, 8), dtype=np.uint8)).save(file)
    return folder


def metrics(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "metrics.json").read_text())


def test_a_fine_tuning_is_told_step_by_step(tune, vitnas, tmp_path):
    code, text, err = tune(*ARGS)
    assert code == 0, err
    found = metrics(tmp_path)
    lines = err.splitlines()
    (probe,) = (line for line in lines if line.startswith("linear probe on the frozen network: "))
    held = found["probe"]["held"]
    assert f"{held['top1']:.1f}% top-1 (95%: {held['top1_ci'][0]:.1f} to {held['top1_ci'][1]:.1f}" in probe
    assert held["images"] == found["tuned"]["images"] == sum(trial["images"] for trial in found["trials"]) / 2
    assert [trial["lr"] for trial in found["trials"]] == [5e-5, 5e-4], "what is used with 32 images an update"
    best = max(found["trials"], key=lambda trial: trial["top1"])
    assert found["recipe"]["peak_lr"] == best["lr"]
    assert any(line.startswith(f"learning rate {best['lr']:g}, chosen by short trials") for line in lines)
    assert found["kept"] == ("tuned" if found["tuned"]["top1"] >= held["top1"] else "probe")
    assert found["start"]["source"] == "file"
    assert len(found["start"]["digest"]) == 16
    assert [path.name for path in (tmp_path / "out" / "state").iterdir()] == ["state.json"]
    code, again, err = tune(*ARGS)
    assert (code, again) == (0, text)
    assert "is finished" in err


def test_a_probe_alone_is_a_result_like_any_other(tune, vitnas, weights, tmp_path):
    code, text, err = tune("--probe", "--device", "cpu")
    assert code == 0, err
    found = metrics(tmp_path)
    assert (found["final"]["of"], found["epochs"]) == ("linear probe", [])
    assert found["recipe"] == {"name": "probe", "source": "a linear probe on the frozen network", "epochs": 0}
    assert not {"recipe", "lr", "augmentation", "rates"} & found["options"].keys()
    assert text.startswith(f"{found['top1']:.1f}% top-1 (95%: ")
    assert (tmp_path / "out" / "model.onnx").is_file()
    given = load_file(weights[1])
    ours = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name, value in ours.items() if not torch.equal(value, given[name])}
    assert changed
    assert all(name.startswith("head.") for name in changed), "all else is frozen"
    out = str(tmp_path / "out")
    code, text, _ = vitnas("show", out)
    assert (code, f"a linear probe of {weights[1]}" in " ".join(text.split())) == (0, True)
    assert vitnas("export", out, "--out", str(tmp_path / "exported"))[0] == 0


def test_images_that_a_probe_cannot_use_are_told_once(vitnas, weights, tmp_path):
    images = folder_of_images(tmp_path / "images", train=30, val=4)
    (images / "train" / "a" / "0.png").write_bytes(b"none")
    out = ("--weights", weights[1], "--data", str(images), "--device", "cpu", "--out", str(tmp_path / "out"))
    code, _, err = vitnas("train", weights[0], *out, "--probe")
    assert code == 0, err
    assert err.count("skipped 1 image that cannot be decoded: ") == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("--lr", "1e-3"), ("--epochs", "3"), ("--precision", "bf16"), ("--accumulate", "2"), ("--compile", None)],
)
def test_a_probe_refuses_what_it_does_not_use(tune, vitnas, option, value):
    refused = tune("--probe", option, *([value] if value else []))
    vitnas.refused(refused, f"--probe trains a linear classifier alone: leave out {option}")


def test_each_image_is_looked_at_once_for_the_given_statistics(tune, monkeypatch):
    """And some of them once more, for the others."""
    taken: list[int] = []

    def find(model, batches, *args, **kwargs):
        found = find_features(model, batches, *args, **kwargs)
        taken.append(len(found.labels))
        return found

    find_features = nas.training.probe.find_features
    monkeypatch.setattr(nas.training.prepare, "COMPARED", 50)
    monkeypatch.setattr(nas.training.probe, "find_features", find)
    code, _, err = tune("--probe", "--device", "cpu")
    assert code == 0, err
    assert "a probe on 50 images has" in err
    assert taken == [120, 50] + [120] * ("are taken from these images" in err)


def test_a_probe_is_fitted_to_as_many_images_as_memory_allows(tune, weights, monkeypatch):
    layers = classifier_of(create_model(Arch.from_json(Path(weights[0]).read_bytes())))
    width, fitted = sum(layer.in_features for layer in layers), []
    fit_probe = nas.training.probe.fit_probe

    def fit(features, labels, *args):
        fitted.append(len(labels))
        return fit_probe(features, labels, *args)

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(nas.training.probe, "MOST_VALUES", 40 * (width + 10))
    monkeypatch.setattr(nas.training.probe, "fit_probe", fit)
    with monkeypatch.context() as patched:
        patched.setattr(nas.training.probe._Problem, "fit", fail)
        code, _, err = tune("--probe", "--device", "cpu")
    assert code == 2
    assert err.splitlines()[-1].startswith("vitnas: fitting the probe ran out of memory")
    fitted.clear()
    code, _, err = tune("--probe", "--device", "cpu")
    assert code == 0, err
    assert set(fitted) == {40}
    assert re.search(r"linear probe on the frozen network: .*; fitted to 40 of 120 images; \d+ s", err)


def test_a_class_of_one_image_is_fitted_and_constant_features_are_refused(vitnas, weights, tmp_path):
    images = folder_of_images(tmp_path / "images", train=12, val=2)
    for i in range(1, 12):
        (images / "train" / "b" / f"{i}.png").unlink()
    args = ("train", weights[0], "--weights", weights[1], "--data", str(images), "--device", "cpu", "--probe")
    code, _, err = vitnas(*args, "--out", str(tmp_path / "one"))
    assert code == 0, err
    assert "linear probe on the frozen network: " in err
    for file in images.rglob("*.png"):
        Image.new("L", (8, 8), 90).save(file)
    code, out, err = vitnas(*args, "--out", str(tmp_path / "same"))
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("vitnas: the network's features are the same for every image")
    assert not (tmp_path / "same").exists()


def test_a_start_that_fails_leaves_the_folder_to_another(tune, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise TrainingError("taking features failed: no")

    out = tmp_path / "out"
    for there in (False, True):
        if there:
            out.mkdir()
        with monkeypatch.context() as patched:
            patched.setattr(nas.training.probe, "find_features", fail)
            code, _, err = tune("--probe", "--device", "cpu")
        assert (code, err.splitlines()[-1]) == (2, "vitnas: taking features failed: no")
        assert out.exists() == there
        assert not (out / "state").exists()
    assert tune(*ARGS)[0] == 0


def test_where_one_epoch_fits_the_rate_is_chosen_for_one(tune, monkeypatch):
    seen: list[int] = []
    monkeypatch.setattr(
        nas.training.prepare, "choose_trial", lambda trials, epochs: seen.append(epochs) or choose_trial(trials, epochs)
    )
    code, _, err = tune("--minutes", "0.0001", "--batch-size", "32", "--device", "cpu")
    assert code == 0, err
    assert re.search(r"--minutes 0.0001: 1 epoch, one takes about \d+ s, and ends about \d+ s after that time", err)
    assert seen == [10, 1], "for the teacher and the images that are trained on, then for the rate"


def test_the_better_one_is_kept(tune, tmp_path, monkeypatch):
    """Where tuning makes it worse, the files hold the probe's network, and its accuracy is told."""
    judge = nas.training.prepare.Preparation.judge

    def harsh(self, network) -> Held:
        found = judge(self, network)
        return found if self.course.probe is None else dataclasses.replace(found, top1=0.0)

    def fit(features, labels, *args):
        fitted.append(len(labels))
        return fit_probe(features, labels, *args)

    fitted: list[int] = []
    fit_probe = nas.training.probe.fit_probe
    monkeypatch.setattr(nas.training.probe, "fit_probe", fit)
    monkeypatch.setattr(nas.training.prepare.Preparation, "judge", harsh)
    code, text, err = tune(*ARGS)
    assert code == 0, err
    assert "fitting the probe 0/" in err
    assert "probe is kept, the tuned network is worse: 0.0% of held-out training images" in err
    found = metrics(tmp_path)
    assert (found["kept"], found["final"]["of"], found["final"]["epoch"]) == ("probe", "linear probe", 0)
    assert "linear probe" in text.splitlines()[0]
    assert len(found["epochs"]) == 1
    assert err.count("the probe is fitted once more, to the held-out images too") == 1
    held = found["probe"]["held"]["images"]
    assert fitted[-1] == found["data"]["train"] > found["data"]["train"] - held == fitted[-2]
    assert "the trial of that rate is no sure sign that tuning pays, beside the probe (" in err
    assert found["whole"] is False


@pytest.mark.parametrize("enough", [True, False])
def test_where_tuning_pays_it_is_on_all_images(tune, tmp_path, monkeypatch, enough):
    """Also on those that chose the rate, where they are enough; the probe that it begins with is fitted to all of them,
    too. What is judged by a few stays apart, and so may lose to the probe."""
    judge, trained, fitted = nas.training.prepare.Preparation.judge, images_trained_on(monkeypatch), []

    def kind(self, network) -> Held:
        found = judge(self, network)
        if self.course.lr is not None and not enough:
            return dataclasses.replace(found, top1=0.0)
        return found if self.course.probe is None else dataclasses.replace(found, top1=100.0)

    def fit(features, labels, *args):
        fitted.append(len(labels))
        return fit_probe(features, labels, *args)

    fit_probe = nas.training.probe.fit_probe
    monkeypatch.setattr(nas.training.probe, "fit_probe", fit)
    monkeypatch.setattr(nas.training.prepare.Preparation, "judge", kind)
    if enough:
        monkeypatch.setattr(nas.training.rates, "ENOUGH", 10)
    code, _, err = tune(*ARGS)
    assert code == 0, err
    found = metrics(tmp_path)
    images, held = found["data"]["train"], found["probe"]["held"]["images"]
    assert (found["kept"], found["whole"]) == (("tuned", True) if enough else ("probe", False))
    brief = [(images - held, False)] * 3
    assert trained == [*brief, (images if enough else images - held, True)], "what is checked, two trials, the tuning"
    assert fitted[-2:] == [images - held, images], "at the end, where the probe is kept"
    probe = f"the probe ({found['probe']['held']['top1']:.1f}% of {held})"
    at_all = (
        f"the trial of that rate is not below {probe} by more than a standard error: trained on all {images} images"
    )
    assert (f"{at_all}, those held out too" in err) == enough
    assert ("of held-out training images, on which it was trained since, the probe" in err) == enough
    assert (f"% of {held}): the images held out stay so, and choose" in err) != enough


@pytest.mark.parametrize(
    ("failing", "kept"), [(TrainingError("the loss is nan"), "probe"), (KeyboardInterrupt(), "tuned")]
)
def test_what_ends_a_tuning_on_all_images_early(tune, tmp_path, monkeypatch, failing, kept):
    """No image is left that would compare it with the probe."""
    judge = nas.training.prepare.Preparation.judge

    def kind(self, network) -> Held:
        found = judge(self, network)
        return found if self.course.probe is None else dataclasses.replace(found, top1=100.0)

    def one_epoch(run, training) -> None:
        training.run(1)
        raise failing

    monkeypatch.setattr(nas.training.prepare.Preparation, "judge", kind)
    monkeypatch.setattr(nas.training.rates, "ENOUGH", 10)
    monkeypatch.setattr(nas.training.run.TrainingRun, "_epochs", one_epoch)
    code, _, err = tune("--epochs", "2", *ARGS[2:])
    assert code == (1 if kept == "probe" else 130), err
    found = metrics(tmp_path)
    assert (found["kept"], found["whole"]) == (kept, True)
    assert ("the probe is kept: the tuning failed, and was on the held-out" in err) == (kept == "probe")
    assert ("nothing tells yet whether it is better than the probe" in err) == (kept == "tuned")


def images_trained_on(monkeypatch) -> list[tuple[int, bool]]:
    """The number of images of each training, and whether it is kept."""
    found: list[tuple[int, bool]] = []

    class Watched(nas.training.engine.Training):
        def __init__(self, model, data, *args, checkpoint, **kwargs) -> None:
            found.append((len(data), checkpoint is not None))
            super().__init__(model, data, *args, checkpoint=checkpoint, **kwargs)

    monkeypatch.setattr(nas.training.engine, "Training", Watched)
    return found


def test_a_long_tuning_crops_more_of_its_images_and_keeps_some_of_its_first_weights(
    vitnas, weights, tmp_path, monkeypatch
):
    """Its trials do not; where it was interrupted it goes on so. How long it is, is by the number of images."""
    images, (model, given) = folder_of_images(tmp_path / "images", train=60, val=4), weights
    monkeypatch.setattr(nas.training.recipes, "LONG_EPOCHS", 2)
    monkeypatch.setattr(nas.training.prepare, "tuning_epochs", lambda count: count // 60)
    scales: list[float] = []
    blends: list[float] = []

    class Watched(nas.training.engine.Training):
        def __init__(self, model, data, *args, **kwargs) -> None:
            (crop,) = (each for each in data.transform.transforms if hasattr(each, "scale"))
            scales.append(crop.scale[0])
            blends.append(args[0].blend)
            super().__init__(model, data, *args, **kwargs)

    def run(name: str, *more: str) -> str:
        scales.clear()
        blends.clear()
        more = (*more, "--batch-size", "32", "--device", "cpu", "--out", str(tmp_path / name))
        code, _, err = vitnas("train", model, "--weights", given, "--data", str(images), *more)
        assert code in (0, 130), err
        return err

    monkeypatch.setattr(nas.training.engine, "Training", Watched)
    told = "2 epochs: random crops keep at least 8% of an image's area, not 35%"
    assert told not in run("short", "--epochs", "1")
    assert (set(scales), set(blends)) == ({0.35}, {1.0})
    with monkeypatch.context() as patched:
        patched.setattr(nas.training.run.TrainingRun, "_epochs", interrupt)
        err = run("long")
    assert (err.count(told), err.count("2 epochs, as there are 120 images for training")) == (1, 1)
    assert scales == [0.35] * 3 + [0.08], "what is checked, two trials, and the tuning"
    assert blends == [1.0] * 3 + [LONG_BLEND]
    assert f"the tuned network is {LONG_BLEND:.0%} of the weights learnt" in err
    assert "training, epoch 1/2 " in run("long")
    assert (scales, blends) == ([0.08], [LONG_BLEND])
    metrics = json.loads((tmp_path / "long" / "metrics.json").read_text())
    assert (metrics["recipe"]["epochs"], metrics["recipe"]["blend"]) == (2, LONG_BLEND)
    assert metrics["kept"] == "probe" or metrics["final"]["of"] == "last weights, mixed with the first"
    longer = f"`vitnas train {tmp_path / 'long'} --data {images} --epochs 10"
    for option, value, told in (
        ("--epochs", "10", f"(epochs by the number of images, not 10): give another --out; {longer}"),
        ("--lr", "3e-4", "(lr by short trials, not 0.0003): give another --out"),
    ):
        given_now = (option, value, "--batch-size", "32", "--device", "cpu", "--out", str(tmp_path / "long"))
        vitnas.refused(vitnas("train", model, "--weights", given, "--data", str(images), *given_now), told)
    given_now = ("--batch-size", "32", "--device", "cpu", "--out", str(tmp_path / "short"))
    refused = vitnas("train", model, "--weights", given, "--data", str(images), *given_now)
    vitnas.refused(refused, "(epochs 1, not by the number of images): give another --out")


def test_a_rate_that_an_older_vitnas_chose_is_trained_with_as_then(tune, tmp_path, monkeypatch):
    """On the images that were not held out."""
    with monkeypatch.context() as patched:
        patched.setattr(nas.training.run.TrainingRun, "_epochs", interrupt)
        assert tune(*ARGS)[0] == 130
    path = tmp_path / "out" / "state" / "state.json"
    kept = json.loads(path.read_text())
    del kept["found"]["course"]["whole"]
    path.write_text(json.dumps(kept))
    trained = images_trained_on(monkeypatch)
    code, _, err = tune(*ARGS)
    assert code == 0, err
    found = metrics(tmp_path)
    assert trained == [(found["data"]["train"] - found["probe"]["held"]["images"], True)]


def interrupt(*args, **kwargs) -> None:
    raise KeyboardInterrupt


def test_what_ends_in_the_first_epoch_leaves_the_probe(tune, tmp_path, monkeypatch):
    for failing, ends in ((TrainingError("the loss is nan"), 1), (KeyboardInterrupt(), 130)):

        def fail(run, training, failing=failing):
            raise failing

        with monkeypatch.context() as patched:
            patched.setattr(nas.training.run.TrainingRun, "_epochs", fail)
            assert tune(*ARGS)[0] == ends
        found = metrics(tmp_path)
        assert (found["kept"], found["final"]["of"]) == ("probe", "linear probe")
        (tmp_path / "out" / "model.onnx").unlink()
    code, _, err = tune(*ARGS)
    assert code == 0, err
    assert metrics(tmp_path)["tuned"] is not None


STEPS = {
    "probe": (nas.training.probe, "install"),
    "first trial": (nas.training.updater.Updater, "step"),
    "probe of all images": (nas.training.prepare.Preparation, "_fit_to_all"),
    "choosing": (nas.training.prepare.Preparation, "choose"),
}


def test_what_is_done_is_not_done_again(tune, whole, tmp_path, monkeypatch):
    """Killed at one step after the other, the same command ends with the same weights, and with no step done twice."""
    monkeypatch.setattr(nas.training.prepare, "speaks_for_tuning", lambda *_: True)
    done: list[str] = []
    monkeypatch.setattr(
        nas.training.prepare.Preparation,
        "keep",
        lambda self, keep=nas.training.prepare.Preparation.keep: (done.append(state(self)), keep(self)),
    )
    for step, (owner, name) in STEPS.items():
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, interrupt)
            assert tune(*ARGS)[0] == 130, step
    code, _, err = tune(*ARGS)
    assert code == 0, err
    steps = [step for step, _ in itertools.groupby(done)]
    assert len(set(steps)) == len(steps), "no step was done twice"
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(ours[key], value) for key, value in whole.items())


def state(steps) -> str:
    course = steps.course
    return f"{course.probe is not None} {len(course.trials)} {course.lr} {course.kept}"


def test_of_a_finished_training_the_weights_may_be_gone_but_not_be_others(tune, weights, vitnas, tmp_path):
    """Others are refused with the difference."""
    assert tune("--probe", "--device", "cpu")[0] == 0
    model, given = weights
    other, away = tmp_path / "other.safetensors", tmp_path / "away.safetensors"
    save_file(
        {name: value * 2 if value.is_floating_point() else value for name, value in load_file(given).items()}, other
    )
    Path(given).rename(away)
    code, text, err = tune("--probe", "--device", "cpu")
    away.rename(given)
    assert (code, "is finished" in err) == (0, True), err
    assert "linear probe" in text
    refused = vitnas("train", model, "--weights", str(other), "--out", str(tmp_path / "out"), "--probe")
    digest = metrics(tmp_path)["start"]["digest"]
    vitnas.refused(refused, f"was begun with {given} (sha256 {digest}), not {other} (sha256 ", "give another --out")


@pytest.mark.parametrize(
    ("tops", "epochs", "lr"),
    [
        ((89.0, 88.0, 72.0), 10, 3e-4),  # within the best one's standard error of 1.8 points
        ((89.0, 87.0, 72.0), 10, 1e-4),
        ((47.0, 47.5, 45.0), 3, 1e-3),
        ((47.0, 47.5, 45.0), 1, 3e-4),
        ((100.0, 99.9, 99.9), 3, 1e-4),
        ((0.0, 0.0, 0.0), 3, 1e-4),  # all have diverged
    ],
)
def test_the_highest_rate_that_is_as_good_as_the_best(tops, epochs, lr):
    trials = [
        Trial(lr=rate, top1=top1, top1_ci=(0.0, 100.0), images=300)
        for rate, top1 in zip((1e-4, 3e-4, 1e-3), tops, strict=True)
    ]
    assert choose_trial(trials, epochs).lr == lr


@pytest.mark.parametrize(
    ("top1", "images", "pays"),
    [
        (41.5, 300, True),
        (41.4, 300, False),
        (44.3, 250, True),
        (90.0, 249, False),
        (90.0, 10, False),
        (90.0, 40, False),
    ],
)
def test_a_trial_speaks_for_tuning_where_it_is_near_the_probe_on_enough_images(top1, images, pays):
    """A standard error of 44.3% of 300 images is 2.87 points."""
    trial, probe = Trial(lr=1e-3, top1=top1, top1_ci=(0.0, 100.0), images=images), 44.3
    assert speaks_for_tuning(trial, Held(top1=probe, top1_ci=(39.0, 50.0), images=images)) == pays


def test_tuning_a_run_further_never_ends_below_it(vitnas, weights, tmp_path, monkeypatch):
    """Where the weights were trained on all images, some of these choose, and it is said."""
    images = folder_of_images(tmp_path / "images", train=60, val=8)
    first, out, args = tmp_path / "first", tmp_path / "further", ("--data", str(images), *ARGS)
    assert vitnas("train", weights[0], "--out", str(first), *args, "--from-scratch")[0] == 0
    judge = nas.training.prepare.Preparation.judge

    def harsh(self, network) -> Held:
        found = judge(self, network)
        return found if self.course.probe is None else dataclasses.replace(found, top1=0.0)

    monkeypatch.setattr(nas.training.prepare.Preparation, "judge", harsh)
    code, _, err = vitnas("train", str(first), "--out", str(out), *args)
    assert code == 0, err
    assert "the weights were trained on the images held out: accuracies on them are too high, and only compare" in err
    found = json.loads((out / "metrics.json").read_text())
    assert (found["kept"], len(found["trials"])) == ("probe", 2)
    before, after = (load_file(folder / "model.safetensors") for folder in (first, out))
    assert all(torch.equal(value, after[name]) for name, value in before.items() if not name.startswith("head."))


def test_a_run_s_own_classifier_stays_where_none_of_few_images_is_held_out(vitnas, weights, tmp_path, monkeypatch):
    """Unless a probe is better, by its cross-validation; the images may be those that the classifier was trained on."""
    images = folder_of_images(tmp_path / "images", train=8, val=4)
    first, args = tmp_path / "first", ("--data", str(images), *ARGS)
    assert vitnas("train", weights[0], "--out", str(first), *args, "--from-scratch")[0] == 0
    judge, before = nas.training.prepare.Preparation.judge, load_file(first / "model.safetensors")
    better = nas.training.prepare.Preparation._better_features
    monkeypatch.setattr(nas.training.prepare.Preparation, "_better_features", lambda *given: (better(*given)[0], True))
    for words, top1 in (("stays", 101.0), ("is replaced", -1.0)):
        monkeypatch.setattr(
            nas.training.prepare.Preparation,
            "judge",
            lambda self, network, top1=top1: dataclasses.replace(judge(self, network), top1=top1),
        )
        out = tmp_path / words
        code, _, err = vitnas("train", str(first), "--out", str(out), *args)
        assert code == 0, err
        assert "so to tune by: only a classifier is fitted" in err
        assert re.search(
            rf"its own classifier {words}: .* 16 images\), of images that it may have been trained on", err
        )
        assert ("; BatchNorm's statistics stay the given ones, too" in err) == (words == "stays")
        after = load_file(out / "model.safetensors")
        assert all(torch.equal(value, after[name]) for name, value in before.items()) == (words == "stays")


@pytest.mark.slow
def test_a_fine_tuning_does_not_end_below_its_probe(vitnas, weights, tmp_path, monkeypatch):
    """Of all digits, by more than a standard error of those that tell; it begins with random features."""
    monkeypatch.setattr(nas.data.dataset, "open_data", open_data)
    found = []
    for name, more in (("probe", ("--probe",)), ("tuned", ("--epochs", "3"))):
        out = tmp_path / name
        code, _, err = vitnas("train", weights[0], "--weights", weights[1], "--device", "cpu", "--out", str(out), *more)
        assert code == 0, err
        found.append(json.loads((out / "metrics.json").read_text()))
    probe, tuned = found
    held = Held(top1=probe["top1"], top1_ci=probe["top1_ci"], images=probe["images"])
    assert held.top1 > 40, "something can be learnt"
    assert tuned["top1"] >= held.top1 - standard_error(held)


def test_a_network_of_timm_s_from_a_folder_of_weights(vitnas, tmp_path, monkeypatch):
    """Its file is found by its name, once, its classifier replaced, and its run is one like any other."""
    import timm

    folder, out = tmp_path / "weights", tmp_path / "out"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet").state_dict(), folder / "test_efficientnet.safetensors")
    args = ("train", "timm/test_efficientnet", "--weights-from", str(folder), "--resolution", "32", "--out", str(out))
    looked, find = [], nas.training.start.find_pretrained
    monkeypatch.setattr(nas.training.start, "find_pretrained", lambda *given: looked.append(given) or find(*given))
    code, _, err = vitnas(*args, *ARGS, "--lr", "1e-3")
    assert code == 0, err
    assert len(looked) == 1
    assert f"pretrained weights of timm/test_efficientnet: from {folder}" in err
    assert "has a classifier of 1000 classes: one for the 10 classes of these images begins untrained" in err
    found = metrics(tmp_path)
    assert (found["start"]["source"], found["family"], found["trials"]) == ("folder", "timm", [])
    assert json.loads((out / "arch.json").read_text())["num_classes"] == 10
    code, text, _ = vitnas("show", str(out))
    assert (code, "timm/test_efficientnet" in text) == (0, True)
    code, text, err = vitnas(*args, *ARGS, "--lr", "1e-3")
    assert (code, "is finished" in err) == (0, True)
    assert ("vitnas bench" in text, "vitnas prune" in text) == (True, False)
    refused = vitnas(*args[:2], "--weights-from", str(tmp_path), "--out", str(tmp_path / "x"))
    vitnas.refused(refused, f"--weights-from {tmp_path} holds no file of weights")
