"""The race: pretrained networks and those cut from them, from a linear probe to the last rung."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import quick
import torch
from torch import nn

from nas.data.dataset import ImageData
from nas.data.images import Images, plain_transform
from nas.errors import DiskFull, TrainingError, UserError
from nas.export.folder import save_weights
from nas.networks.build import create
from nas.networks.counts import counts_of
from nas.networks.store import Store
from nas.networks.timm_network import TimmNetwork
from nas.quality.candidate import Candidate, Kind
from nas.quality.parents import Parents, covers, distance
from nas.quality.plan import TrainingPlan
from nas.quality.race import RaceTier, lower_rate
from nas.quality.surrogate import Guess, Surrogate, TrainedNetwork, describe_candidate
from nas.quality.tier import TrainingRecord
from nas.quality.trainer import CandidateTrainer
from nas.quality.tuning import Tuned, choose_rate, tuned_in, tuning_recipe
from nas.search.accuracy import compare_means
from nas.search.final import earlier_crops, final_tasks, result_path, train_fully, trainings_in
from nas.search.race import check_teacher
from nas.search.tasks import Task
from nas.search.teaching import TeacherGain, Teaching, find_teaching, larger_ready, try_teacher
from nas.training.recipes import FINETUNE, LONG_BLEND, LONG_CROPS
from search_spaces import create_model, get_arch

PX = 32


@pytest.fixture(scope="module")
def images() -> Images:
    """60 images of noise, red or blue."""
    rng = np.random.default_rng(0)
    labels = [i % 2 for i in range(60)]
    colours = [np.array([(200, 40, 40), (40, 40, 200)][label]) for label in labels]
    pictures = [np.clip(c + rng.normal(0, 60, (PX, PX, 3)), 0, 255).astype(np.uint8) for c in colours]
    return Images(pictures, labels, plain_transform(PX))


@pytest.fixture(autouse=True)
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with weights of a small shvit_s1; there are no others to be had."""
    quick.small_shvit(monkeypatch)
    quick.short_probes(monkeypatch)
    monkeypatch.setattr("nas.connection.unreachable", lambda: "no connection")
    folder = tmp_path / "zoo"
    folder.mkdir()
    write_weights(folder, seed=0)
    return folder


def write_weights(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = create_model(get_arch("shvit_s1").at(PX).replace(num_classes=10))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    save_weights(model, folder / "shvit_s1.safetensors")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def trainer(images: Images, published: Path, tmp_path: Path, said: list[str]) -> CandidateTrainer:
    data = ImageData("colours", ["red", "blue"], images, images, images, demo=False)
    plan = TrainingPlan("colours", epochs=1, final_epochs=1)
    known: list[TrainedNetwork] = []
    return CandidateTrainer(
        data,
        plan,
        0,
        "cpu",
        tmp_path / "training",
        lambda: known,
        lambda *_: None,
        weights=Store(published, said.append),
        say=said.append,
    )


def ready(name: str = "shvit_s1") -> Candidate:
    return Candidate(get_arch(name).at(PX).replace(num_classes=2), Kind.READY, name=name)


def derived() -> Candidate:
    arch = ready().arch
    raw = json.loads(arch.to_json())
    for block in raw["stages"][0]["blocks"]:
        block["ffn"] = block["ffn"] // 2 if isinstance(block["ffn"], int) else block["ffn"]
    stage = raw["stages"][-1]
    stage["blocks"] = stage["blocks"][:1]
    return Candidate(type(arch).from_json(json.dumps(raw)), Kind.DERIVED, "shvit_s1")


def test_a_ready_network_begins_with_its_probe(trainer):
    found = RaceTier(trainer).estimate(ready(), counts_of(ready().network))
    assert set(found.training.rungs) == {0, 1}
    assert found.training.rungs[1] >= found.training.rungs[0] == 100
    assert found.how == "trained 1 of 1 epoch"
    assert list(trainer.kept.glob("*.safetensors"))


def test_a_parent_is_tuned_once_for_all_its_children(trainer, said, monkeypatch):
    tier = RaceTier(trainer)
    child = derived()
    rungs = tier.estimate(child, counts_of(child.network)).training.rungs
    assert set(rungs) == {0, 1}
    told = [line for line in said if line.startswith("parent shvit_s1, tuned at 32 px")]
    assert len(told) == 1
    assert tier.parents.record("shvit_s1", PX).tuned is not None
    monkeypatch.setattr("nas.quality.tuning._trained", None)
    weights = Parents(trainer).child(child.arch, "shvit_s1", seed=0)
    assert all(
        torch.equal(value, weights[name]) for name, value in tier.parents.child(child.arch, "shvit_s1", 0).items()
    )


def test_a_parent_that_was_tuned_from_other_weights_is_refused(trainer, published, monkeypatch):
    child = derived()
    Parents(trainer).child(child.arch, "shvit_s1", seed=0)
    before = trainer.weights.digests["shvit_s1"]
    write_weights(published, seed=1)
    trainer.__dict__["weights"] = Store(published)
    with pytest.raises(UserError, match=f"sha256 {before}, not from .*shvit_s1.safetensors .*: give the same weights"):
        Parents(trainer).child(child.arch, "shvit_s1", seed=0)


@pytest.mark.parametrize(("last", "kept", "epochs"), [(50.0, 80, 0), (60.0, 60, 1), (80.0, 80, 1)])
def test_what_tuning_makes_worse_stays_as_it_began(trainer, monkeypatch, last, kept, epochs):
    """Worse by more than two standard errors of 12 images, 23 points."""
    figures = iter([70.0, 70.0, 80.0, last])  # with other statistics, with its own, at rung 0, at rung 1
    tier = RaceTier(trainer)
    monkeypatch.setattr(RaceTier, "recipe", lambda *_: tuning_recipe(1, 1e-3))
    monkeypatch.setattr(CandidateTrainer, "judge", lambda *_: SimpleNamespace(top1=next(figures)))
    saved = {}
    monkeypatch.setattr(
        "nas.quality.trained.keep",
        lambda folder, key, network, facts, scores: saved.update(facts=facts, network=network),
    )
    found = tier.estimate(ready(), counts_of(ready().network))
    assert found.training.rungs == {0: 80, 1: kept}
    assert found.training.tuned == (epochs > 0)
    assert TrainingRecord.from_json(found.training.to_json()) == found.training
    trainer.results().append(TrainedNetwork(ready().key, np.zeros(3), found.training.rungs, found.training.tuned))
    assert tier.tuning_pays(ready()) == (epochs > 0)
    assert (saved["facts"].epochs, saved["facts"].top1) == (epochs, kept)
    assert ("as its tuning begins" in saved["facts"].words) == (epochs == 0)


def test_the_nearest_parent_that_is_larger_in_every_axis_and_has_weights(trainer, said):
    parents = Parents(trainer)
    child, largest = derived().arch, get_arch("shvit_s4").at(PX).replace(num_classes=2)
    assert covers(ready().arch, child)
    assert not covers(child, ready().arch)
    assert distance(child, child) == 0 < distance(ready().arch, child)
    assert parents.parent_for(ready().arch) is None, "no network is cut from itself"
    assert parents.parent_for(child) == "shvit_s1"
    assert parents.parent_for(largest) is None
    assert RaceTier(trainer).candidate_of(child) == derived()
    assert RaceTier(trainer).candidate_of(largest) == Candidate(largest)
    assert sum("only weights on this machine" in line for line in said) == 1


def test_a_cut_chooses_by_images_that_no_final_training_has_shown_it(trainer, monkeypatch):
    """A final training has the images that judge among its own: what it begins with is what the search judged."""
    tier, child = RaceTier(trainer), derived()
    everything = tier.data(child).train
    assert len(everything) > len(tier._split(child)[0])
    found, again = tier._start(child, tier._split(child)[0]).state_dict(), tier._start(child, everything).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in found.items())


def test_a_cut_is_repaired_where_that_is_better(trainer, monkeypatch):
    tier, child = RaceTier(trainer), derived()
    weights = tier.parents.child(child.arch, "shvit_s1", seed=0)
    repaired = tier.parents.repaired(child.arch, "shvit_s1", weights)
    assert any(not torch.equal(value, repaired[name]) for name, value in weights.items())
    for top1, wanted in ((51.0, repaired), (49.0, weights)):
        figures = iter([50.0, top1, 0.0])  # as cut, repaired, with a new probe
        monkeypatch.setattr(CandidateTrainer, "judge", lambda *_, left=figures: SimpleNamespace(top1=next(left)))
        found = tier._cut(child).state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_a_derived_network_ends_with_its_parent_tuned_on_all_images_as_ready_ones_are(trainer, tmp_path, monkeypatch):
    tier, child, trained, crops = RaceTier(trainer), derived(), [], set()
    train = CandidateTrainer.train
    monkeypatch.setattr("nas.training.recipes.LONG_EPOCHS", 1)
    monkeypatch.setattr(RaceTier, "parent_tuning_pays", lambda *_: True)

    def watched(self, model, images, recipe, **options):
        trained.append((model.arch == child.arch, len(images), recipe, options))
        crops.update(
            each.scale[0] for each in images.transform.transforms if len(images) == 60 and hasattr(each, "scale")
        )
        return train(self, model, images, recipe, **options)

    monkeypatch.setattr(CandidateTrainer, "train", watched)
    request = SimpleNamespace(
        precisions=("fp32",), folder=tmp_path / "run", plan=dataclasses.replace(trainer.plan, seeds=2)
    )
    request.folder.mkdir()
    tasks = final_tasks(request, tier, "x", child)
    assert trainings_in(request, tier, tasks) == 4
    found = train_fully(request, tier, "x", child, "shvit_s1@32")
    assert trainings_in(request, tier, tasks[:1]) == 1, "its parent is in the folder"
    learns = [options["teacher"] is not None for _, images, _, options in trained if images == 60]
    assert learns == [False, True, False, True], "what teaches is its own parent's like"
    final = [(is_child, options["seed"]) for is_child, images, _, options in trained if images == 60]
    assert final == [(False, 0), (True, 0), (False, 1), (True, 1)]
    assert crops == {LONG_CROPS}, "as where one network is trained for long"
    blends = {recipe.blend for _, images, recipe, _ in trained if images == 60}
    assert blends == {LONG_BLEND}
    rates = {is_child: recipe.lr for is_child, images, recipe, _ in trained if images == 60}
    assert rates[True] == lower_rate(rates[False])
    assert (found.before.epochs, found.before.images, len(found.top1)) == (1, 60, 2)
    locks = sorted(path.name for path in (request.folder / "final").glob(".*.lock"))
    assert locks == [f".parent-shvit_s1-32px-1-seed{seed}.lock" for seed in (0, 1)], "one worker tunes a parent"
    assert found.before.seconds > 0
    assert found.before.times == 2
    assert not compare_means(found, found).leaves_out, "another tuning's difference is in it"
    trained.clear()
    crops.clear()
    kept = [json.loads(result_path(request, child, seed).read_text()) for seed in (0, 1)]
    assert [each["crops"] for each in kept] == [LONG_CROPS] * 2
    assert earlier_crops(request) is None
    result_path(request, child, 0).write_text(json.dumps({k: v for k, v in kept[0].items() if k != "crops"}))
    result_path(request, child, 1).unlink()
    assert train_fully(request, RaceTier(trainer), "x", child).before == found.before
    assert [each[0] for each in trained] == [True], "its parent is in the folder"
    assert crops == {FINETUNE.augmentation.scale}, "as an older vitnas trained the other seed"
    assert trained[0][2].blend == 1
    result_path(request, child, 0).unlink()
    assert earlier_crops(request) == json.loads(result_path(request, child, 1).read_text())["crops"]


def test_a_parent_that_tuning_made_worse_in_the_search_is_not_tuned_at_the_end(trainer, tmp_path, monkeypatch):
    tier, child, tuned = RaceTier(trainer), derived(), []
    tier.parents.tuned("shvit_s1", PX)
    (path,) = (trainer.folder / "parents").glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"first": 90.0, "tuned": 10.0}))
    assert "10.0% of 12 others, 90.0% before, and so it stays as before" in tier.parents.record("shvit_s1", PX).words
    run_fully = CandidateTrainer.run_fully

    def watched(self, training, what):
        tuned.append(what.startswith("tuning the parent"))
        run_fully(self, training, what)

    monkeypatch.setattr(CandidateTrainer, "run_fully", watched)
    plan = dataclasses.replace(trainer.plan, seeds=1)
    request = SimpleNamespace(precisions=("fp32",), folder=tmp_path / "run", plan=plan)
    request.folder.mkdir()
    assert trainings_in(request, tier, final_tasks(request, tier, "x", child)) == 1
    found = train_fully(request, tier, "x", child)
    assert tuned == [False], "the child alone"
    assert (found.before.epochs, found.before.images) == (0, 60)
    assert found.before.words.startswith("its parent shvit_s1 had a linear probe on 60 images alone (")
    assert "the weights of its parent shvit_s1, cut" in found.start
    assert "parent" not in compare_means(found, found).leaves_out


def fails(error: Exception):
    def result(task: Task) -> None:
        raise error

    return result


def test_a_teacher_is_tried_once(trainer, tmp_path, monkeypatch):
    """It is the best parent that was tuned; on the search's own split, judged on the images that are held out."""
    tier, child, learns = RaceTier(trainer), derived(), []
    monkeypatch.setattr("nas.search.teaching.candidate_of", lambda _: child)
    study = optuna.create_study()
    request = SimpleNamespace(
        plan=trainer.plan, folder=tmp_path / "run", families=("shvit",), resolution=None, num_classes=2
    )
    rows = [SimpleNamespace(kind=Kind.SCRATCH, label="scratch"), SimpleNamespace(kind=Kind.DERIVED, label="child")]
    monkeypatch.setattr("nas.search.teaching.MOST", 1.0)
    told: list[str] = []

    def find(study: optuna.Study, result=lambda task: try_teacher(tier, Task.of(task.job))) -> Teaching:
        return find_teaching(request, study, tier, rows, SimpleNamespace(result=result), told.append)

    assert "no network was tuned" in find(optuna.create_study()).words
    tier.parents.tuned("shvit_s1", PX)
    train = CandidateTrainer.train

    def watched(self, model, images, recipe, **options):
        learns.append((len(images), options["teacher"] is not None))
        return train(self, model, images, recipe, **options)

    monkeypatch.setattr(CandidateTrainer, "train", watched)
    found = find(study)
    assert (found.name, found.gain.student, found.gain.images) == ("shvit_s1@32", "child", trainer.judged)
    assert learns == [(trainer.used, False), (trainer.used, True)]
    assert find(study, result=None) == found, "the study keeps it"
    assert told[1:] == [found.words] * 2
    request.plan = dataclasses.replace(trainer.plan, teacher="none")
    assert find(study, result=None) == Teaching(asked="none"), "another answer, as nothing has been trained by one"
    request.plan = trainer.plan
    with pytest.raises(UserError, match="no room"):
        find(study, result=fails(DiskFull(tmp_path, told="no room")))
    assert "no weights" in find(study, result=fails(UserError("no weights"))).words, "nobody has named it"
    assert "diverged" in find(study, result=fails(TrainingError("diverged"))).words
    assert find(study) == dataclasses.replace(found, gain=find(study).gain), "tried again"
    trainer.results().append(TrainedNetwork(child.key, np.zeros(3), {0: 50.0, 1: 100.0}))
    assert tier.teacher_name(child) is None, "no parent is better than the student"
    assert tier.teacher_name(ready()) is None, "nor larger than itself"
    (request.folder / "final").mkdir(parents=True)
    (request.folder / "final/0123456789abcdef-1-seed0.json").write_text("{}")
    assert find(optuna.create_study()).words.endswith("some had been made without one")
    request.plan = dataclasses.replace(trainer.plan, teacher="none")
    assert find(study, result=None).teacher == find(study, result=None).teacher
    assert "--teacher none changes nothing" in told[-1]


@pytest.mark.parametrize(("points", "teacher"), [(0.5, "x@64"), (0.0, None)])
def test_a_teacher_that_does_not_help_is_left_out(points, teacher):
    found = Teaching("x@64", TeacherGain("child", points, points - 2, points + 2, 400, 12, 60.0))
    assert found.to_json()["teacher"] == teacher
    assert found.to_json()["teacher_gain"]["points"] == points
    assert f"{points:+.1f} points" in found.words
    assert ("left out" in found.words) == (teacher is None)
    assert ("holds 0" in found.words) == (teacher is not None)


def test_without_a_parent_a_larger_ready_network_teaches(trainer, monkeypatch):
    """One that is not much larger, has weights here, and is likely better."""
    tier, child = RaceTier(trainer), derived()
    request = SimpleNamespace(families=("shvit",), resolution=None, num_classes=2)
    assert larger_ready(request, tier, child) == "shvit_s1@32"
    assert larger_ready(request, tier, ready()) is None, "it is no larger than itself"
    with monkeypatch.context() as patch:
        patch.setattr("nas.search.teaching.MOST", 1.0)
        assert larger_ready(request, tier, child) is None
    with monkeypatch.context() as patch:
        patch.setattr(Surrogate, "predict", lambda *_: Guess(40.0, 5.0))
        for own, wanted in ((39.0, "shvit_s1@32"), (41.0, None)):
            patch.setattr(RaceTier, "top1_of", lambda *_, own=own: own)
            assert larger_ready(request, tier, child) == wanted
    tier.parents.tuned("shvit_s1", PX)
    assert larger_ready(request, tier, child) is None, "what it is worth is known"


@pytest.mark.parametrize("kind", ["timm", "folder"])
def test_a_teacher_of_other_classes_is_tuned_once(trainer, published, said, tmp_path, monkeypatch, kind):
    """On the search's own split, as a parent is; it is none, and its weights are not the study's."""
    if kind == "timm":
        asked, name = "timm/test_byobnet", "timm/test_byobnet@32"
        save_weights(create(TimmNetwork("test_byobnet")), published / "test_byobnet.safetensors")
    else:
        arch = get_arch("shvit_s1").at(PX).replace(num_classes=10)
        folder = tmp_path / ("own" * 40) / ("own" * 40)  # more bytes than a file's name may have
        folder.mkdir(parents=True)
        asked = name = str(folder)
        (folder / "arch.json").write_text(arch.to_json())
        save_weights(create_model(arch), folder / "model.safetensors")
    plan = dataclasses.replace(trainer.plan, teacher=asked, weights_from=published)
    trainer, trained = dataclasses.replace(trainer, plan=plan), []
    check_teacher(trainer)
    line = f"the teacher {asked} is tuned on your images before the final trainings"
    assert said.count(line) == 1
    train = CandidateTrainer.train

    def watched(self, model, images, recipe, **options):
        trained.append(len(images))
        return train(self, model, images, recipe, **options)

    monkeypatch.setattr(CandidateTrainer, "train", watched)
    tier = RaceTier(trainer)
    assert tier.teacher_name(ready()) == name
    teacher = tier.find_teacher(name, ready()).eval()
    assert teacher(torch.zeros(2, 3, 48, 48)).shape == (2, 2)
    assert set(trained) == {trainer.used}
    assert sum(line.startswith(f"teacher {name}, tuned at 32 px for 1 epoch of 48 images") for line in said) == 1
    trained.clear()
    again = RaceTier(trainer).find_teacher(name, ready()).eval()
    assert torch.equal(again(torch.ones(1, 3, PX, PX)), teacher(torch.ones(1, 3, PX, PX)))
    assert not trained
    assert not [*tuned_in(trainer.folder)]
    assert not trainer.weights.digests


def test_a_teacher_that_cannot_be_tuned_ends_its_trial_alone(trainer, published, monkeypatch):
    save_weights(create(TimmNetwork("test_byobnet")), published / "test_byobnet.safetensors")

    def tune(*_):
        raise ValueError("features that are no numbers")

    monkeypatch.setattr("nas.quality.teacher.tune", tune)
    with pytest.raises(TrainingError, match="cannot be tuned: ValueError: features that are no numbers"):
        RaceTier(trainer).find_teacher("timm/test_byobnet@32", ready())


def test_a_teacher_has_the_student_s_resolution_unless_another_is_named_or_that_cannot_be(trainer, said):
    for asked, px, wanted in (
        ("shvit_s1", 64, "shvit_s1@64"),
        ("shvit_s1@96", 64, "shvit_s1@96"),
        ("timm/test_byobnet", 64, "timm/test_byobnet@64"),
        ("timm/vit_tiny_patch16_224", 8, "timm/vit_tiny_patch16_224@224"),
    ):
        plan = dataclasses.replace(trainer.plan, teacher=asked)
        tier = RaceTier(dataclasses.replace(trainer, plan=plan))
        assert not said
        assert tier.teacher_name(SimpleNamespace(network=SimpleNamespace(resolution=px))) == wanted
    told = "the teacher timm/vit_tiny_patch16_224 takes no images of 8 px: it is tuned, and asked, at 224 px"
    assert said == [told]


def test_what_cannot_teach_is_refused_at_the_start(trainer, published, tmp_path):
    for name, why in (
        ("shvit_s2", "weights"),
        ("shvit_s1@x", "resolution"),
        (str(tmp_path / "none"), "none"),
        ("timm/test_byobnet", "test_byobnet"),
        ("timm/no_such_network", "timm has no network"),
    ):
        plan = dataclasses.replace(trainer.plan, teacher=name, weights_from=published)
        with pytest.raises(UserError, match=why):
            check_teacher(dataclasses.replace(trainer, plan=plan))
    check_teacher(dataclasses.replace(trainer, plan=dataclasses.replace(trainer.plan, teacher="shvit_s1@64")))
    assert not trainer.weights.digests, "the study does not begin with a teacher's weights"


def test_rung_0_fits_its_probe_to_some_images_of_every_class(trainer, monkeypatch):
    tier, images = RaceTier(trainer), trainer.split(PX)[0]
    assert tier._some(images) is images
    monkeypatch.setattr("nas.quality.race.PROBED", 3)
    assert Counter(tier._some(images).labels) == {0: 3, 1: 3}, "three of each, not three in all"


def test_a_dead_channel_keeps_a_share_of_its_variance(trainer):
    tier, candidate = RaceTier(trainer), ready()
    model = tier._own(candidate)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    before = norm.running_var.clone()
    convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    nn.init.zeros_(convolution.weight)
    tier._restate(model, candidate)
    assert torch.allclose(norm.running_var, 0.01 * before)


def test_a_network_that_tuning_did_not_make_better_is_left_as_it_begins(trainer):
    tier, candidate = RaceTier(trainer), ready()
    assert tier.tuning_pays(candidate), "nothing is known of it"
    features = describe_candidate(candidate, counts_of(candidate.network))
    known = trainer.results()
    for last, pays in ((50.0, False), (51.0, True)):
        known[:] = [TrainedNetwork(candidate.key, features, {0: 50.0, 1: last})]
        assert tier.tuning_pays(candidate) == pays


def test_a_published_network_with_weights_is_ready(trainer):
    found = RaceTier(trainer).candidate_of(ready().arch)
    assert found == dataclasses.replace(ready(), name="shvit_s1@32")


def test_a_parent_that_cannot_be_tuned_at_a_resolution_is_told_once(trainer, said, monkeypatch):
    def tune(name, arch, published, trainer):
        if arch.resolution == PX:
            raise ValueError("features that are no numbers")
        return create_model(arch)

    monkeypatch.setattr("nas.quality.parents.tune", tune)
    parents = Parents(trainer)
    for _ in range(2):
        with pytest.raises(TrainingError, match="features that are no numbers"):
            parents.tuned("shvit_s1", PX)
    assert [line for line in said if "no parent" in line] == [
        "shvit_s1 is no parent at 32 px: ValueError: features that are no numbers"
    ]
    assert parents.parent_for(derived().arch) is None
    assert "shvit_s1" not in parents.failed


def test_a_tuning_goes_on_with_the_epochs_that_it_was_begun_with(trainer, monkeypatch):
    epochs: list[int] = []

    def trained(model, images, trainer, recipe, what, state=None):
        if state is not None:
            epochs.append(recipe.epochs)
            if len(epochs) == 1:
                raise KeyboardInterrupt
        return model

    monkeypatch.setattr("nas.quality.tuning._trained", trained)
    for final_epochs in (9, 30):
        trainer.__dict__["plan"] = dataclasses.replace(trainer.plan, final_epochs=final_epochs)
        try:
            Parents(trainer).tuned("shvit_s1", PX)
        except KeyboardInterrupt:
            continue
    assert epochs == [9, 9]


def test_weights_that_cannot_be_had_are_told(trainer):
    other = ready("shvit_s2")
    with pytest.raises(UserError, match="shvit_s2"):
        RaceTier(trainer).estimate(other, counts_of(other.network))


def test_the_first_of_each_kind_goes_on_and_then_the_better_third(trainer):
    def known(candidate: Candidate, size: float, rungs: dict[int, float]) -> TrainedNetwork:
        features = describe_candidate(candidate, counts_of(candidate.network))
        features[0] = size
        return TrainedNetwork(str(size), features, rungs)

    tier = RaceTier(trainer)
    some = [known(ready(), size, {0: 50.0 + size, 1: 60.0 + size}) for size in range(6)]
    poor, first = Guess(20.0, 1.0), Surrogate(some, 1)
    assert tier._goes_on(Kind.DERIVED, first, poor, 0)
    assert not tier._goes_on(Kind.READY, first, poor, 0)
    assert tier._goes_on(Kind.READY, first, Guess(90.0, 1.0), 0)
    assert tier._goes_on(Kind.DERIVED, Surrogate([*some, known(derived(), 9, {0: 30.0})], 1), poor, 0)
    later = Surrogate([*some, known(derived(), 9, {0: 30.0, 1: 40.0})], 1)
    assert not tier._goes_on(Kind.DERIVED, later, poor, 0), "one has shown what its kind gains"


def test_the_learning_rate_is_tried_once_for_a_family(trainer, said, monkeypatch):
    tried: list[float] = []

    def trained(model, images, trainer, recipe, what, state=None):
        tried.append(recipe.lr)
        if recipe.lr == 1e-3:
            raise TrainingError("the loss is no longer finite")
        if len(tried) == 2 and not said:
            said.append("killed")
            raise KeyboardInterrupt
        return SimpleNamespace(top1=40 + 1e5 * recipe.lr)

    monkeypatch.setattr("nas.quality.tuning._trained", trained)
    monkeypatch.setattr(CandidateTrainer, "judge", lambda self, network, images: SimpleNamespace(top1=network.top1))
    start = lambda: (None, None, None)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        choose_rate(ready().network, trainer, start)
    assert choose_rate(ready().network, trainer, start) == 3e-4
    assert tried == [1e-4, 3e-4, 3e-4, 1e-3], "what was tried before the kill is not tried again"
    assert choose_rate(derived().network.at(64), trainer, start) == 3e-4
    assert len(tried) == 4
    assert said[-1] == "learning rate of shvit: 0.0003 (after an epoch with 0.0001 50.0%, 0.0003 70.0%, 0.001 0.0%)"


def test_a_parent_is_tuned_as_long_as_a_final_training_or_as_time_allows(trainer, monkeypatch):
    tunings: list[int] = []

    def trained(model, images, trainer, recipe, what, state=None):
        if state is not None:
            tunings.append(recipe.epochs)
        return model

    monkeypatch.setattr("nas.quality.tuning._trained", trained)
    trainer.__dict__["plan"] = dataclasses.replace(trainer.plan, final_epochs=9)
    monkeypatch.setattr("nas.quality.tuning.PASSED", 7 * trainer.used)
    parents = Parents(trainer)
    parents.tuned("shvit_s1", PX)
    parents.tuned("shvit_s1", 64)
    assert tunings == [7, 2], "at a second resolution a third of them"


def test_a_final_training_is_left_out_where_tuning_did_not_pay(trainer, tmp_path, monkeypatch):
    candidate = ready()
    features = describe_candidate(candidate, counts_of(candidate.network))
    trainer.results().append(TrainedNetwork(candidate.key, features, {0: 50.0, 1: 50.0}))
    monkeypatch.setattr("nas.quality.race.choose_rate", lambda *_: 1e-3)
    monkeypatch.setattr("nas.training.engine.Training.run", None)
    request = SimpleNamespace(precisions=("fp32",), folder=tmp_path, plan=dataclasses.replace(trainer.plan, seeds=3))
    found = train_fully(request, RaceTier(trainer), "x", candidate)
    assert found.as_begun
    assert len(found.top1) == 1, "no seed changes it"
    request.plan = dataclasses.replace(trainer.plan, seeds=1)
    trainer.results().clear()
    assert train_fully(request, RaceTier(trainer), "x", candidate).epochs == 0, "its file has it"
    file = next((tmp_path / "final").glob("*.json"))
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "epochs"}))
    older = train_fully(request, RaceTier(trainer), "x", candidate)
    assert older.epochs == trainer.plan.final_epochs, "a file of an older vitnas"
    assert found.mean == 100


@pytest.mark.parametrize(("judged", "rate"), [(400, 1e-3), (2_000, 3e-4)])
def test_where_few_images_judge_a_higher_rate_is_taken(trainer, judged, rate):
    """As EfficientViT-M1 on 20 classes of Tiny-ImageNet: after an epoch; after 10 the order is the other way round."""
    path = trainer.folder / "rates" / "shvit.json"
    path.parent.mkdir(parents=True)
    tried = [{"lr": 1e-4, "top1": 48.2}, {"lr": 3e-4, "top1": 47.2}, {"lr": 1e-3, "top1": 43.5}]
    path.write_text(json.dumps(tried))
    plan = dataclasses.replace(trainer.plan, final_epochs=10)
    few = SimpleNamespace(folder=trainer.folder, plan=plan, judged=judged, say=print)
    assert choose_rate(ready().network, few, None) == rate


@pytest.mark.parametrize(("tuned", "pays"), [(53.5, True), (52.75, True), (50.0, False), (0.0, False)])
def test_a_tuned_parent_stays_unless_it_is_clearly_worse(tuned, pays):
    """A standard error of 53% of 400 images is 2.5 points."""
    found = Tuned("shvit_s1", 64, "", 1_600, 400, first=53.0, tuned=tuned)
    assert (found.pays, found.top1) == (pays, tuned if pays else 53.0)
