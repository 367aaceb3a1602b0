"""Fine-tuning: the probe first, then the rate, then the epochs; the better of probe and tuned network is kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
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
import nas.training.run
import nas.training.start
import nas.training.updater
from nas.data.dataset import open_data
from nas.data.images import sample
from nas.errors import TrainingError
from nas.training.course import Held, Trial
from nas.training.rates import choose_trial, speak_for_tuning
from nas.training.recipes import FINETUNE, RECIPES
from nas.training.request import TrainRequest, choose_recipe
from nas.training.run import train
from search_spaces import create_model

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
    """Weights of the tuning ARGS that nothing has interrupted."""
    out, (model, given) = tmp_path_factory.mktemp("whole"), weights
    with pytest.MonkeyPatch.context() as patch:
        few_digits(patch)
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
    assert "--minutes 0.0001: 1 epoch, " in err
    assert seen == [1]


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
    assert "the best trial is worse than the probe: the images held out stay so" in err
    assert found["whole"] is False


def test_where_tuning_pays_it_is_on_all_images(tune, tmp_path, monkeypatch):
    """Also on those that chose the rate; the probe that it begins with is fitted to all of them, too."""
    judge, trained, fitted = nas.training.prepare.Preparation.judge, images_trained_on(monkeypatch), []

    def kind(self, network) -> Held:
        found = judge(self, network)
        return found if self.course.probe is None else dataclasses.replace(found, top1=100.0)

    def fit(features, labels, *args):
        fitted.append(len(labels))
        return fit_probe(features, labels, *args)

    fit_probe = nas.training.probe.fit_probe
    monkeypatch.setattr(nas.training.probe, "fit_probe", fit)
    monkeypatch.setattr(nas.training.prepare.Preparation, "judge", kind)
    code, _, err = tune(*ARGS)
    assert code == 0, err
    found = metrics(tmp_path)
    images, held = found["data"]["train"], found["probe"]["held"]["images"]
    assert (found["kept"], found["whole"]) == ("tuned", True)
    assert trained == [(images - held, False)] * 3 + [(images, True)], "what is checked, two trials, and the tuning"
    assert fitted[-2:] == [images - held, images]
    assert f"the best trial is no worse than the probe: trained on all {images} images, those held out too" in err
    assert "of held-out training images, on which it was trained since, the probe" in err


def images_trained_on(monkeypatch) -> list[tuple[int, bool]]:
    """The number of images of each training, and whether it is kept."""
    found: list[tuple[int, bool]] = []

    class Watched(nas.training.engine.Training):
        def __init__(self, model, data, *args, checkpoint, **kwargs) -> None:
            found.append((len(data), checkpoint is not None))
            super().__init__(model, data, *args, checkpoint=checkpoint, **kwargs)

    monkeypatch.setattr(nas.training.engine, "Training", Watched)
    return found


def test_a_long_tuning_crops_more_of_its_images(vitnas, weights, tmp_path, monkeypatch):
    """Its trials do not; where it was interrupted it goes on so."""
    images, (model, given) = folder_of_images(tmp_path / "images", train=60, val=4), weights
    monkeypatch.setattr(nas.training.recipes, "LONG_EPOCHS", 2)
    scales: list[float] = []

    class Watched(nas.training.engine.Training):
        def __init__(self, model, data, *args, **kwargs) -> None:
            (crop,) = (each for each in data.transform.transforms if hasattr(each, "scale"))
            scales.append(crop.scale[0])
            super().__init__(model, data, *args, **kwargs)

    def run(epochs: int) -> str:
        scales.clear()
        out = str(tmp_path / f"of {epochs}")
        more = ("--epochs", str(epochs), "--batch-size", "32", "--device", "cpu")
        code, _, err = vitnas("train", model, "--weights", given, "--data", str(images), "--out", out, *more)
        assert code in (0, 130), err
        return err

    monkeypatch.setattr(nas.training.engine, "Training", Watched)
    told = "2 epochs: random crops keep at least 8% of an image's area, not 35%"
    assert told not in run(1)
    assert set(scales) == {0.35}
    with monkeypatch.context() as patched:
        patched.setattr(nas.training.run.TrainingRun, "_epochs", interrupt)
        assert run(2).count(told) == 1
    assert scales == [0.35] * 3 + [0.08], "what is checked, two trials, and the tuning"
    run(2)
    assert scales == [0.08]


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


@pytest.mark.parametrize(("tops", "pays"), [((44.0, 30.0), True), ((42.0, 41.0), True), ((41.0, 41.0), False)])
def test_tuning_pays_where_a_trial_is_within_a_standard_error_of_the_probe(tops, pays):
    trials = [Trial(lr=1e-3, top1=top1, top1_ci=(0.0, 100.0), images=300) for top1 in tops]
    assert speak_for_tuning(trials, Held(top1=44.3, top1_ci=(39.0, 50.0), images=300)) == pays


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
