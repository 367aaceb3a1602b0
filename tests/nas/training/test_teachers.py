"""A teacher: fine-tuned first where it is of other classes, and left out where a short trial with it is no better."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import quick
import torch
from PIL import Image

import nas.data.dataset
import nas.training.engine
import nas.training.inputs
import nas.training.prepare
from nas.data.dataset import open_data
from nas.data.images import sample
from nas.training.course import Course, Trial
from nas.training.prepare import Preparation
from nas.training.recipes import FINETUNE, RECIPES
from nas.training.request import TrainRequest, choose_recipe
from nas.training.teachers import OtherClassesError, find_feature_teacher, find_teacher, teacher_in_folder, tuning_of
from search_spaces import Arch, create_model, get_arch

ARGS = ("--epochs", "1", "--batch-size", "32", "--device", "cpu")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few digits, two rates, and probes of two strengths."""

    def open_few(*args: Any) -> nas.data.dataset.ImageData:
        data = open_data(*args)
        return dataclasses.replace(data, train=sample(data.train, 100, 0), val=sample(data.val, 32, 0))

    monkeypatch.setattr(nas.data.dataset, "open_data", open_few)
    monkeypatch.setitem(RECIPES, "finetune", dataclasses.replace(FINETUNE, rates=(1e-4, 1e-3)))
    quick.short_probes(monkeypatch)


@pytest.fixture
def of_seven(helpers: Any, tmp_path: Path) -> tuple[str, str]:
    """A tiny SHViT for ten classes, and weights for it, of seven."""
    raw = helpers.document(helpers.random_arch("shvit", 3, num_classes=10, resolution=32))
    arch = helpers.read(raw | {"stages": raw["stages"][:2]})
    (tmp_path / "arch.json").write_text(arch.to_json())
    torch.manual_seed(0)
    torch.save(create_model(arch.replace(num_classes=7)).state_dict(), tmp_path / "seven.pth")
    return str(tmp_path / "arch.json"), str(tmp_path / "seven.pth")


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def trial(lr: float, top1: float) -> Trial:
    return Trial(lr=lr, top1=top1, top1_ci=(40.0, 60.0), images=100)


def test_one_of_other_classes_is_fine_tuned_first(
    vitnas: Any, of_seven: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of its own; a short trial with it is no better here, so it is left out."""
    has: dict[int, bool] = {}
    trained: list[bool] = []

    class Peek(nas.training.engine.Training):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            has[id(self)] = kwargs["teacher"] is not None
            if kwargs["checkpoint"] is not None:
                trained.append(kwargs["teacher"] is not None)

    monkeypatch.setattr(nas.training.engine, "Training", Peek)
    monkeypatch.setattr(Preparation, "_try", lambda _, each, __: trial(each.recipe.lr, 49.0 if has[id(each)] else 50.0))
    asked = []
    find = nas.training.inputs.own_teacher
    monkeypatch.setattr(nas.training.inputs, "own_teacher", lambda *args: asked.append(args[:3]) or find(*args))
    out, (model, seven) = tmp_path / "out", of_seven
    args = ("train", model, "--weights", seven, "--teacher", model, "--teacher-weights", seven, "--out", str(out))
    code, _, err = vitnas(*args, *ARGS)
    assert code == 0, err
    own = metrics(out / "teacher")
    assert (own["recipe"]["name"], own["recipe"]["epochs"], len(own["classes"])) == ("finetune", 1, 10)
    assert own["taught"] is None
    assert f"is fine-tuned on these images, in {out / 'teacher'}" in err
    assert "soft distillation from" in err
    assert asked == [("--teacher", str(out / "teacher"), None)]
    assert trained == [False, False], "the teacher's own, then the student's"
    assert "the teacher does not help and is left out: 49.0% of " in err
    assert "in a short trial with it, 50.0% without" in err
    found = metrics(out)
    assert found["taught"]["top1"] == 49.0
    assert found["phases"]["the teacher"] > 0


@pytest.mark.parametrize(("top1", "helps"), [(51.0, True), (50.0, False), (49.0, False)])
def test_it_teaches_where_its_trial_is_better(top1: float, helps: bool) -> None:
    """Than that of the same rate without it."""
    course = Course(trials=[trial(1e-4, 60.0), trial(1e-3, 50.0)], taught=trial(1e-3, top1))
    assert course.teaches == helps


def test_without_a_trial_it_teaches() -> None:
    """As in folders from before there was one."""
    assert Course.read({"course": {"lr": 1e-4}}, "").teaches


@pytest.mark.parametrize(("epochs", "own"), [(None, (10, True)), (3, (3, False)), (30, (10, False))])
def test_its_own_tuning_is_as_long_as_the_student_s(tmp_path: Path, epochs: int | None, own: tuple[int, bool]) -> None:
    """Ten epochs at most, or by the number of images."""
    request = TrainRequest("net", choose_recipe("finetune", epochs), "cpu", tmp_path, teacher="large")
    recipe = tuning_of(request).recipe
    assert (recipe.epochs, recipe.by_images) == own


def test_its_own_tuning_goes_on_as_an_older_vitnas_began_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the epochs of then, where the number of images says how many there are today."""
    monkeypatch.setitem(RECIPES, "finetune", FINETUNE)
    request = TrainRequest("net", choose_recipe("finetune"), "cpu", tmp_path, teacher="large")
    tuning = tuning_of(request)
    options = tuning.identity()
    del options["by_images"]
    (tuning.folder / "state").mkdir(parents=True)
    (tuning.folder / "state" / "state.json").write_text(json.dumps({"options": options, "found": {}}))
    assert tuning.recipe.by_images
    assert tuning_of(request).recipe == dataclasses.replace(FINETUNE, by_images=False)


def test_other_classes_are_told_apart_from_no_weights(of_seven: tuple[str, str], tmp_path: Path) -> None:
    """Of a network of as many classes as its weights, and of one of as many as the images."""
    model, seven = of_seven
    arch = Arch.from_json(Path(model).read_bytes()).replace(num_classes=7)
    (tmp_path / "own.json").write_text(arch.to_json())
    classes = ["class"] * 10
    with pytest.raises(OtherClassesError, match="has 7 classes and the data 10"):
        find_teacher(str(tmp_path / "own.json"), seven, classes)
    with pytest.raises(OtherClassesError, match="another classifier"):
        find_teacher(model, seven, classes)


def test_features_of_any_classes_teach(vitnas: Any, of_seven: tuple[str, str], tmp_path: Path) -> None:
    """Without a fine-tuning of the teacher, and of images without labels."""
    more, out, (model, seven) = tmp_path / "more" / "below", tmp_path / "out", of_seven
    more.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(more / f"{i}.png")
    (more / "broken.png").write_bytes(b"no image")
    args = ("train", model, "--from-scratch", "--teacher", model, "--teacher-weights", seven, "--out", str(out), *ARGS)
    unlabelled = ("--unlabelled", str(more.parent))
    vitnas.refused(vitnas(*args, *unlabelled), "--unlabelled needs --teacher and --distillation features")
    args = (*args, "--distillation", "features")
    code, _, err = vitnas(*args, *unlabelled)
    assert code == 0, err
    assert f"features of {model} are matched, on 5 unlabelled images too" in err
    assert "9 of 105 images an epoch fill no batch of 32 and are left out" in err
    assert "skipped 1 image that cannot be decoded: " in err
    found = metrics(out)
    assert found["recipe"]["distillation"] == "features"
    assert found["options"]["unlabelled"] == str(more.parent)
    assert not (out / "teacher").exists()
    assert "is finished" in vitnas(*args, *unlabelled)[2]
    vitnas.refused(vitnas(*args), "another content of the images of --unlabelled")
    state = out / "state" / "state.json"
    recorded = state.read_text()
    document = json.loads(recorded)
    del document["inputs"]["the images of --unlabelled"]  # as an older vitnas kept it
    state.write_text(json.dumps(document))
    assert "is finished" in vitnas(*args, *unlabelled)[2]
    state.write_text(recorded)
    (more / "0.png").unlink()
    vitnas.refused(vitnas(*args, *unlabelled), "another content of the images of --unlabelled")


@pytest.mark.parametrize(("helps", "told"), [(True, "3 epochs, one takes about 64 s"), (False, "15 epochs")])
def test_images_without_labels_count_in_the_minutes(monkeypatch: pytest.MonkeyPatch, helps: bool, told: str) -> None:
    """Where their teacher is not left out. Each update of 32 takes 4 s."""
    clock, said = itertools.count(0, 4), list[str]()
    monkeypatch.setattr(nas.training.prepare, "monotonic", lambda: next(clock))

    def run(until: int, progress: Callable[[], None], stop: Callable[[], bool]) -> None:
        for _ in range(4):
            progress()

    steps = SimpleNamespace(
        course=Course(trials=[trial(1e-3, 50.0)], taught=trial(1e-3, 51.0 if helps else 49.0)),
        images=range(128),
        inputs=SimpleNamespace(train=range(128), data=SimpleNamespace(val=())),
        job=SimpleNamespace(phase=nullcontext, state=SimpleNamespace(phases={})),
        keep=lambda: None,
        note=said.append,
        stop=lambda: False,
    )
    Preparation.choose_epochs(steps, 4.0, SimpleNamespace(run=run, images=32, count=128 + 384))
    assert said[0].startswith(f"--minutes 4: {told}")


@pytest.mark.parametrize("option", [True, False])
def test_published_weights_in_a_folder_of_the_user_s_teach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: bool
) -> None:
    """That of --weights-from, or of $VITNAS_WEIGHTS; those of another resolution are resized."""
    folder, told = tmp_path / "weights", list[str]()
    folder.mkdir()
    network = create_model(get_arch("efficientvit_m0", 7).at(64))
    torch.save(network.state_dict(), folder / "efficientvit_m0.pth")
    if not option:
        monkeypatch.setenv("VITNAS_WEIGHTS", str(folder))
    request = TrainRequest("shvit_s1", FINETUNE, "cpu", tmp_path / "out", weights_from=folder if option else None)
    data = open_data(None, 32, None, 0)
    for px in (64, 96):
        asked = dataclasses.replace(request, teacher=f"efficientvit_m0@{px}")
        assert teacher_in_folder(asked) == str(folder / "efficientvit_m0.pth")
        teacher = find_feature_teacher(asked, data, told.append).model
        assert teacher.arch.resolution == px
        found = teacher.state_dict()
        assert torch.equal(found["stem.0.linear.weight"], network.state_dict()["stem.0.linear.weight"])
        assert any("resized to 96 px (@64 behind its name" in line for line in told) == (px == 96)
    with pytest.raises(OtherClassesError, match="--teacher efficientvit_m0@64: weights with another classifier"):
        find_teacher("efficientvit_m0@64", None, data.classes, weights_from=request.weights_from)
