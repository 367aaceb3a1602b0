"""Which weights a training begins with, by what recipe, and what is said of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import nas.training.start
from nas.errors import DiskFull, UserError
from nas.networks.pretrained import NoPretrained, Pretrained
from nas.training.inputs import open_inputs
from nas.training.recipes import FINETUNE, QUICK
from nas.training.request import TrainRequest, choose_recipe, default_folder
from nas.training.start import find_start, with_usual_recipe
from search_spaces import get_arch


@pytest.fixture
def looked(monkeypatch, tmp_path) -> list[Path | None]:
    """The folders that published weights were looked for in; there are some of shvit_s1. One, weights/, has a file."""
    seen: list[Path | None] = []

    def look(network, folder=None, progress=None):
        seen.append(folder)
        if network.family != "shvit":
            raise NoPretrained("there are no pretrained weights of it")
        return Pretrained("shvit_s1", tmp_path / "kept", "cache", "ab12", "shvit_s1.in1k")

    monkeypatch.setattr(nas.training.start, "find_pretrained", look)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "other.safetensors").touch()
    return seen


def asked(**changes) -> TrainRequest:
    known = {"model": "shvit_s1", "recipe": FINETUNE, "device": "cpu", "folder": Path("runs/x"), "data": "images"}
    return TrainRequest(**known | changes)


@pytest.mark.parametrize(
    ("changes", "recipe"),
    [
        ({}, "finetune"),
        ({"data": None}, "quick"),
        ({"data": None, "weights": "timm"}, "finetune"),
        ({"data": None, "weights_from": "weights"}, "finetune"),
        ({"weights": "none"}, "quick"),
        ({"oracle": "deit"}, "quick"),
        ({"model": "sepvit_lite"}, "quick"),
    ],
)
def test_which_recipe_is_usual(looked, changes, recipe):
    """Published weights are looked for where there are images, or where they are asked for."""
    request, start = with_usual_recipe(asked(**changes), choose_recipe, named=False)
    assert (request.recipe.name, request.folder) == (recipe, Path(f"runs/train-{request.model}-{recipe}"))
    assert start is not None
    assert len(looked) == (recipe == "finetune" or request.model == "sepvit_lite")
    if looked and recipe == "quick":
        assert start.line == "no pretrained weights of sepvit_lite: starts from random weights"
    for found in (start, find_start(request)):
        assert (found.source, found.digest) == (("cache", "ab12") if recipe == "finetune" else ("random", None))


def test_what_is_said(looked):
    start = find_start(asked())
    assert start.line == "pretrained weights of shvit_s1: shvit_s1.in1k, from timm's cache (sha256 ab12)"
    assert start.parent == "timm"
    assert find_start(asked(model="sepvit_lite")).line == (
        "no pretrained weights of sepvit_lite: starts from random weights"
    )
    for changes, words in (
        ({"probe": True}, "--probe: there are no pretrained weights of it: give --weights FILE or --weights-from DIR"),
        ({"weights": "timm"}, "--weights timm: there are no pretrained weights of it"),
    ):
        with pytest.raises(UserError, match=words):
            find_start(asked(model="sepvit_lite", **changes))


def test_a_recipe_for_random_weights_looks_for_none(looked):
    start = find_start(asked(recipe=QUICK))
    assert (start.source, start.line) == ("random", "starts from random weights (recipe quick)")
    assert not looked
    assert find_start(asked(recipe=QUICK, weights_from="weights")).source == "cache"
    assert looked == [Path("weights")]


def test_weights_that_cannot_be_had_are_no_reason_for_random_ones(looked, monkeypatch):
    def fail(*args):
        raise UserError("shvit_s1.in1k is not here: put it into a folder, and give that as --weights-from")

    monkeypatch.setattr(nas.training.start, "find_pretrained", fail)
    with pytest.raises(UserError, match="give that as --weights-from; or --from-scratch for random weights"):
        with_usual_recipe(asked(), choose_recipe, named=False)


def test_a_full_disk_is_no_reason_for_random_ones_either(looked, monkeypatch):
    def fail(*args):
        raise DiskFull("cache")

    monkeypatch.setattr(nas.training.start, "find_pretrained", fail)
    with pytest.raises(DiskFull, match=r"the same command goes on$"):
        with_usual_recipe(asked(), choose_recipe, named=False)


@pytest.mark.parametrize(
    "changes",
    [{}, {"weights": "none", "teacher": "levit_128s"}, {"model": "mine"}, {"recipe": QUICK, "teacher": "levit_128s"}],
)
@pytest.mark.parametrize("named", ["nowhere", "empty"])
def test_a_folder_without_weights_is_refused_whatever_it_is_for(looked, changes, named):
    """Also where nothing would be looked for in it: the network is random, or has its own weights."""
    Path("empty").mkdir()
    Path("mine").mkdir()
    Path("mine/arch.json").write_text(get_arch("shvit_s1").to_json())
    Path("mine/model.safetensors").write_bytes(b"trained")
    with pytest.raises(UserError, match=f"^--weights-from {named}:? (no such folder|holds no file of weights)"):
        find_start(asked(weights_from=named, **changes))
    assert looked == []


@pytest.mark.parametrize(
    ("changes", "source"),
    [({"weights": "none"}, "random"), ({"weights": "given.pth"}, "file"), ({"model": "sepvit_lite"}, "random")],
)
def test_a_folder_may_be_for_the_teacher_alone(looked, changes, source):
    Path("given.pth").write_bytes(b"weights")
    request = asked(weights_from="weights", teacher="levit_128s", **changes)
    request.check()
    assert with_usual_recipe(request, choose_recipe, named=False)[1].source == source
    assert find_start(replace(request, recipe=QUICK)).source == source
    alone = replace(request, teacher=None)
    if "weights" in changes:
        with pytest.raises(UserError, match="--weights-from"):
            alone.check()
    else:
        with pytest.raises(UserError, match="no pretrained weights"):
            find_start(alone)


def test_weights_that_the_results_would_replace_are_refused(looked):
    """Those to begin with, and those of a network that teaches."""
    Path("mine").mkdir()
    for name in ("model.safetensors", "given.safetensors"):
        Path("mine", name).write_bytes(b"trained")
    assert find_start(asked(weights="mine/given.safetensors", folder="mine")).source == "file"
    with pytest.raises(UserError, match=r"^--out mine holds the weights that the training begins with: give another"):
        find_start(asked(weights="mine/model.safetensors", folder="mine"))
    for option in ("teacher", "oracle"):
        with pytest.raises(UserError, match=f"^--out mine holds the weights of --{option}: give another"):
            asked(folder="mine", **{option: "./mine"}).check()


@pytest.mark.parametrize("changes", [{"weights": "given.pth"}, {"weights": "timm"}, {"weights_from": "weights"}])
def test_an_oracle_lends_weights_in_place_of_others(changes):
    with pytest.raises(UserError, match=r"^--oracle lends the network its own weights: leave out --weights(-from)?$"):
        asked(oracle="deit", **changes).check()
    asked(oracle="deit").check()


@pytest.mark.parametrize(("teacher", "used"), [(None, False), ("taught", False), ("levit_128s", True)])
def test_a_folder_that_is_not_used_is_told(looked, teacher, used):
    """The network has weights of its own, and the teacher has, or there is none."""
    for name in ("mine", "taught"):
        Path(name).mkdir()
        Path(name, "arch.json").write_text(get_arch("shvit_s1").to_json())
        Path(name, "model.safetensors").write_bytes(b"trained")
    told: list[str] = []
    request = asked(model="mine", teacher=teacher, weights_from="weights", data=None)
    start = open_inputs(request, told.append).start
    assert f"mine/model.safetensors (sha256 {start.digest}; --weights none: with random ones)" in start.line
    assert any(line.startswith("--weights-from weights is not used: ") for line in told) != used


@pytest.mark.parametrize(("finished", "recipe"), [(False, "quick"), (True, "finetune")])
def test_an_unfinished_training_of_an_older_vitnas_goes_on_from_random_weights(looked, finished, recipe):
    """The same command would begin with published weights today."""
    folder = default_folder("shvit_s1", "quick")
    (folder / "state").mkdir(parents=True)
    options = {name: value for name, value in asked(recipe=QUICK).identity().items() if name not in ("probe", "rates")}
    state = {"options": options, "found": {"finished": True} if finished else {}}
    (folder / "state" / "state.json").write_text(json.dumps(state))
    request, _ = with_usual_recipe(asked(folder=default_folder("shvit_s1", "finetune")), choose_recipe, named=False)
    assert (request.recipe.name, request.folder) == (recipe, default_folder("shvit_s1", recipe))
    assert find_start(asked(folder=folder)).source == "random", "also where its folder is named, and its recipe"


def test_weights_that_a_training_has_written_itself_are_not_what_it_begins_with(looked):
    """The network's folder is that of the results: the same command goes on from the published weights."""
    folder = Path("mine")
    (folder / "state").mkdir(parents=True)
    (folder / "arch.json").write_text(get_arch("shvit_s1").to_json())
    request = asked(model="mine", folder=folder)
    assert find_start(request).source == "cache"
    (folder / "model.safetensors").write_bytes(b"trained")
    with pytest.raises(UserError, match="holds the weights that the training begins with"):
        find_start(request)
    (folder / "state" / "state.json").write_text("{}")
    assert find_start(request).source == "cache"


def test_published_weights_have_the_same_images_wherever_they_are_found(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "levit_128s.safetensors").write_bytes(b"not read here")
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 40), (i, 0, ord(label))).save(tmp_path / "images" / label / f"{i}.png")
    given = {"data": str(tmp_path / "images"), "weights_from": tmp_path / "weights", "folder": tmp_path / "out"}
    inputs = open_inputs(asked(model="levit_128s", **given), lambda line: None)
    assert inputs.start.source == "folder"
    assert inputs.data.pixels.crop_pct == 0.9, "as timm says of LeViT"


def test_random_weights_are_not_trained_with_frozen_statistics(looked):
    with pytest.raises(UserError, match=r"--recipe finetune trains with frozen BatchNorm.*--recipe quick"):
        open_inputs(asked(weights="none"), lambda line: None)
