"""What a search is asked to do: what is refused, and what earlier versions' studies must agree on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nas.cli.search import tier_of
from nas.data.pixels import IMAGENET
from nas.errors import UserError
from nas.measure.budget import Limits
from nas.measure.runtime import Settings
from nas.networks.targets import Target
from nas.quality.plan import TrainingPlan
from nas.search.folder import TRAINING_INPUTS, epochs_in, final_epochs_in, training_inputs
from nas.search.loop import left_by_an_older, open_run
from nas.search.request import SearchRequest
from nas.study.samplers import make_sampler
from nas.study.trials import ask, finish, open_study

HARDWARE = {
    "cpu": "a CPU",
    "architecture": "x86_64",
    "physical_cores": 4,
    "usable_cpus": 4,
    "threads": 2,
    "device": "cpu",
    "batch_size": 1,
    "runtime": "onnxruntime",
    "runtime_version": "1.20.0",
}
DIGESTS = '"the images of --data": "2:0123456789abcdef"'
KEPT = {  # as version 0.1.0 stored them
    "prior": '{"budget_ms": 2.0, "families": ["levit", "shvit"], "space": "0123456789ab", "num_classes": 1000, '
    f'"quality": "prior", "hardware": {json.dumps(HARDWARE)}}}',
    "train": '{"budget_ms": 2.0, "families": ["shvit"], "space": "0123456789ab", "num_classes": 10, '
    f'"quality": "train", "hardware": {json.dumps(HARDWARE)}, "resolution": 128, "throughput_at": 16, '
    '"training": {"train_images": 10000, "epochs": 9, "seed": 7}, "the network of --parent": null, '
    f'"the weights of --parent": "None", {DIGESTS}}}',
    "inherit": '{"budget_ms": 2.0, "families": ["levit"], "space": "0123456789ab", "num_classes": 1000, '
    f'"quality": "inherit", "hardware": {json.dumps(HARDWARE)}, '
    '"training": {"train_images": 10000, "epochs": 3, "seed": 0}, "the network of --parent": "9f341b9e91154951", '
    f'"the weights of --parent": "timm", {DIGESTS}}}',
}
KEPT_INPUTS = (
    '{\n "num_classes": 10,\n "quality": "train",\n "resolution": 128,\n "training": {\n  "train_images": 10000,\n'
    '  "epochs": 9,\n  "seed": 7\n },\n "the network of --parent": null,\n "the weights of --parent": "None",\n '
    '"the images of --data": "2:0123456789abcdef"\n}'
)


@pytest.fixture(autouse=True)
def digests(monkeypatch):
    """Of a machine, a space and images as they were."""
    monkeypatch.setattr("nas.measure.hardware.fingerprint", lambda settings: HARDWARE)
    monkeypatch.setattr("search_spaces.space.fingerprint", lambda spaces: "0123456789ab")
    monkeypatch.setattr("nas.data.inputs.data_digest", lambda data: "2:0123456789abcdef")


IMAGES = SimpleNamespace(demo=False, pixels=IMAGENET)


def requested(quality: str, out: Path = Path("runs")) -> SearchRequest:
    plan = TrainingPlan("./images", 10_000, 9, 30, 3, 0)
    settings = Settings("onnxruntime", "cpu", 2)
    first = SearchRequest(2.0, settings, ("shvit", "levit"), 40, None, "s", out, None, "random", None, 1000)
    if quality == "train":
        more = {"families": ("shvit",), "seed": 7, "num_classes": 10, "resolution": 128, "throughput_at": 16}
        return replace(first, quality=quality, plan=plan, **more)
    if quality == "inherit":
        return replace(first, quality=quality, families=("levit",), plan=replace(plan, epochs=3, parent="levit_128s"))
    return first


@pytest.mark.parametrize("quality", KEPT)
def test_the_identity_of_a_study_is_as_earlier_versions_stored_it(quality):
    request = requested(quality)
    found = request.identity(None if request.plan is None else IMAGES)
    assert json.dumps(found) == KEPT[quality]


def test_limits_are_part_of_a_study_s_identity_and_name() -> None:
    request = replace(requested("prior"), limits=Limits(memory_mb=64.0, file_mb=4.0), study="")
    found = request.identity()
    assert found.pop("limits") == {"memory_mb": 64.0, "file_mb": 4.0}
    assert json.dumps(found) == KEPT["prior"]
    assert request.study.endswith("-64MB-memory-4MB-file")


def test_the_inputs_of_trainings_are_as_earlier_versions_stored_them(tmp_path):
    identity = requested("train").identity(IMAGES)
    assert training_inputs(tmp_path, identity) == KEPT_INPUTS
    (tmp_path / TRAINING_INPUTS).write_text(KEPT_INPUTS)
    assert training_inputs(tmp_path, identity) == KEPT_INPUTS
    for damaged in ("", "[1]"):
        (tmp_path / TRAINING_INPUTS).write_text(damaged)
        with pytest.raises(UserError, match="is damaged; use --study for a new one"):
            training_inputs(tmp_path, identity)


@pytest.mark.parametrize(
    ("function", "other", "told"),
    [
        (
            "nas.measure.hardware.fingerprint",
            {**HARDWARE, "runtime_version": "1.31.0"},
            "hardware.runtime_version 1.20.0, this command says 1.31.0",
        ),
        ("nas.measure.hardware.fingerprint", {**HARDWARE, "cpu": "B"}, "hardware.cpu a CPU, this command says B"),
        ("nas.data.inputs.data_digest", "2:fedcba9876543210", "the images of --data 2:0123456789abcdef, this command"),
    ],
)
def test_a_worker_that_differs_is_refused_with_the_difference_named(tmp_path, monkeypatch, function, other, told):
    request = replace(requested("train"), storage=f"sqlite:///{tmp_path}/studies")
    open_run(replace(request, out=tmp_path / "here"), IMAGES)
    monkeypatch.setattr(function, lambda _: other)
    with pytest.raises(UserError, match=f"^this study has {told}.*; use --study for a new one$"):
        open_run(replace(request, out=tmp_path / "there"), IMAGES)
    assert not (tmp_path / "there" / "s").exists()


def test_a_study_of_an_earlier_version_goes_on(tmp_path):
    request = requested("prior", tmp_path)
    request.folder.mkdir()
    sampler = make_sampler("random", None)
    begun = open_study("s", request.folder / "study.journal", json.loads(KEPT["prior"]), sampler)
    finish(begun, ask(begun), 70.0, 500.0, -0.1, {"family": "shvit"})
    study, created = open_run(request, None)
    assert not created
    assert [trial.values for trial in study.trials] == [[70.0, 500.0]]
    with pytest.raises(UserError, match="budget_ms"):
        open_run(replace(request, budget_ms=3.0), None)


def test_with_images_pretrained_networks_race_unless_the_user_wants_otherwise() -> None:
    plan = TrainingPlan("./images")
    assert SearchRequest(2.0, plan=plan).quality == "race"
    assert SearchRequest(2.0, plan=replace(plan, parent="levit_128s")).quality == "inherit"
    assert SearchRequest(2.0).quality == "prior"
    assert tier_of("auto", "./images", None) == "race"
    assert tier_of("auto", "./images", None, from_scratch=True) == "train"
    assert tier_of("supernet", "./images", None, from_scratch=True) == "supernet"
    assert tier_of("auto", "./images", "levit_128s") == "inherit"
    assert tier_of("auto", None, None) == "prior"


def test_a_search_from_scratch_of_an_earlier_version_is_told(tmp_path: Path) -> None:
    plan = TrainingPlan("./images")
    request = SearchRequest(2.0, out=tmp_path, plan=plan)
    assert left_by_an_older(request) == ""
    earlier = SearchRequest(2.0, out=tmp_path, plan=plan, quality="train").folder
    earlier.mkdir()
    (earlier / TRAINING_INPUTS).write_text(KEPT_INPUTS)
    assert left_by_an_older(request) == (
        f"{earlier} holds a search from scratch: --from-scratch continues that; this is a new search"
    )
    assert left_by_an_older(replace(request, study="mine")) == ""
    with pytest.raises(UserError, match="holds a search from scratch: --from-scratch continues it; or use --study"):
        open_run(replace(request, study=earlier.name), IMAGES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"from_scratch": True, "data": None}, "^--from-scratch needs --data: images to train on$"),
        ({"parent": "levit_128s", "data": None}, "^--parent needs --data"),
        ({"quality": "race", "data": None}, "^--quality race needs --data"),
        ({"parent": "levit_128s", "from_scratch": True}, "^--from-scratch and --parent: give one of them$"),
        ({"quality": "race", "from_scratch": True}, "^--from-scratch and --quality race: give one of them$"),
        ({"quality": "race", "parent": "levit_128s"}, "^--quality race inherits nothing: leave out --parent"),
    ],
)
def test_options_that_contradict_each_other_are_told(words: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tier_of(**{"quality": "auto", "data": "./images", "parent": None} | words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget_ms": 0.0}, "budget_ms is 0.0: give a number of milliseconds above 0"),
        ({"budget_ms": "2ms"}, "budget_ms is '2ms': give a number"),
        ({"families": ("vgg",)}, "unknown family 'vgg': choose from .*shvit"),
        ({"trials": 0}, "--trials is 0: give 1 or more"),
        ({"num_classes": 0}, "--num-classes is 0: give 1 to 100000"),
        ({"num_classes": 100_001}, "--num-classes is 100001"),
        ({"resolution": 100}, "--resolution is 100: give a multiple of 32 from 32 to 512"),
        ({"resolution": 0}, "--resolution is 0"),
        ({"resolution": 544}, "--resolution is 544"),
        ({"study": ".."}, "cannot be a folder's name"),
        ({"study": "a/b"}, "cannot be a folder's name"),
        ({"against": (Target("x.onnx", onnx=Path("x.onnx")),)}, "--against x.onnx: give a published name"),
        ({"plan": TrainingPlan("./images", 10_000, 0, 30, 3, 0)}, "--epochs is 0"),
        (
            {"plan": TrainingPlan("./images", 10_000, 9, 30, 3, 0, weights_from=Path(__file__))},
            r"--weights-from .*test_request\.py is a file: give the folder that holds it$",
        ),
        ({"settings": Settings("onnxruntime", "cpu", 0)}, "threads"),
        ({"throughput_at": 0}, "batch size is 0"),
        (
            {"limits": Limits(file_mb=4.0), "settings": Settings("torch", "cpu", 1)},
            "--size-budget: runtime torch loads no file; use onnxruntime or",
        ),
    ],
)
def test_a_request_out_of_range_is_refused(change, message):
    request = replace(requested("prior"), settings=Settings("onnxruntime", "cpu", 1))
    request.check()
    with pytest.raises(UserError, match=message):
        replace(request, **change).check()


def test_a_race_that_was_begun_goes_on_with_its_own_epochs(tmp_path):
    """Where none are asked for: an older vitnas had others."""
    assert (epochs_in(tmp_path), final_epochs_in(tmp_path)) == (None, None)
    (tmp_path / TRAINING_INPUTS).write_text(json.dumps({"training": {"epochs": 9}}))
    (tmp_path / "final").mkdir()
    for name in ("0123456789abcdef-30-seed0", "0123456789abcdef-30-seed1", "parent-shvit_s1-64px-12-seed0"):
        (tmp_path / "final" / f"{name}.json").touch()
    assert (epochs_in(tmp_path), final_epochs_in(tmp_path)) == (9, 30)
    (tmp_path / "final" / "0123456789abcdef-12-seed0.json").touch()
    assert final_epochs_in(tmp_path) is None, "which of them is meant cannot be told"


def test_a_race_s_command_takes_the_epochs_of_its_folder(tmp_path, monkeypatch, vitnas):
    seen = []
    monkeypatch.setattr("nas.search.run.read_images", lambda request: seen.append(request.plan.epochs) or sys.exit(3))
    (tmp_path / "s").mkdir()
    words = ("search", "--latency-budget", "2ms", "--data", "x", "--out", str(tmp_path), "--study", "s")
    vitnas(*words)
    (tmp_path / "s" / TRAINING_INPUTS).write_text(json.dumps({"training": {"epochs": 9}}))
    vitnas(*words)
    vitnas(*words, "--epochs", "5")
    assert seen == [3, 9, 5]
