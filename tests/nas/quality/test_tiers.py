"""The trained tiers: who goes on, who is left out, what is kept, and how validation and final figures are told."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from records import COMPLETE
from scipy.stats import kendalltau

from nas.errors import TrainingError, UserError
from nas.measure.budget import Limits
from nas.measure.runtime import Settings
from nas.networks.counts import counts_of
from nas.quality.candidate import Candidate
from nas.quality.plan import TrainingPlan
from nas.quality.ranking import GATE, RESAMPLES, Tau, rung_ranks, selects, tau, taus
from nas.quality.surrogate import Surrogate, TrainedNetwork, describe
from nas.quality.trained import SCREEN_FROM, HalvingTier, low_resolution
from nas.quality.trainer import ETA, CandidateTrainer
from nas.search import work
from nas.search.accuracy import Accuracies, compare_means, verdict
from nas.search.final import FullTraining, settle
from nas.search.rows import Trial, rank
from nas.search.trainings import results_of
from nas.search.validate import ValidatedNetwork, estimates_of
from search_spaces import Arch, get_arch, table
from search_spaces.registry import FAMILIES
from search_spaces.space import random_params

PLAN = TrainingPlan("images", images=100, epochs=9, final_epochs=2, seeds=2, validate=0)


def arch_at(seed: int, resolution: int | None = 64):
    return FAMILIES["shvit"].space.decode(random_params(np.random.default_rng(seed)), 10, resolution)


@functools.cache
def skill(arch) -> float:
    return 5 * math.log2(table(arch).params() / 1e6)


class Stub(HalvingTier):
    """Trains nothing: top-1 follows from the network's size and its epochs. `made` lists (resolution, epochs)."""

    def __init__(self, trainer: CandidateTrainer, nan_from: int | None = None) -> None:
        super().__init__(trainer)
        self.made: list[tuple[int, int]] = []
        self.nan_from = nan_from

    def begin(self, candidate, images, recipe, seed, checkpoint, weights=None, teacher=None):
        arch, tier, start = candidate.arch, self, 0 if weights is None else 1

        class Training:
            loader = SimpleNamespace(close=lambda: None)
            network = SimpleNamespace(state_dict=dict, top1=0.0)

            def __init__(self) -> None:
                self.recipe, self.epoch = recipe, 0

            def run(self, until=None, progress=None) -> None:
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                checkpoint.write_text("")
                until = until or recipe.epochs
                if tier.nan_from is not None and until >= tier.nan_from:
                    raise TrainingError(f"the loss is no longer finite in epoch {tier.nan_from}", tier.nan_from)
                tier.made.append((arch.resolution, until))
                self.network.top1 = 50 + skill(arch) + 8 * math.log((until + start) / 9)

        return Training()


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CandidateTrainer:
    known: list[TrainedNetwork] = []
    data = SimpleNamespace(train=range(1000), classes=range(10))
    found = CandidateTrainer(data, PLAN, 0, "cpu", tmp_path / "training", lambda: known, lambda *_: None)
    monkeypatch.setattr(CandidateTrainer, "split", lambda self, resolution: ("train", "judge"))
    monkeypatch.setattr(CandidateTrainer, "judge", lambda self, network, images: SimpleNamespace(top1=network.top1))
    found.__dict__["known"] = known
    return found


def learn(trainer: CandidateTrainer, tier: HalvingTier, arch) -> str:
    """What the search does with a trial: estimate it and keep what was learnt."""
    found = tier.estimate(Candidate(arch), counts_of(arch))
    rungs = found.training.rungs
    if rungs:
        trainer.__dict__["known"].append(TrainedNetwork(arch.digest(), np.array(found.training.features), rungs))
    return found.how


def test_rungs():
    def rungs(epochs: int) -> tuple[int, ...]:
        plan = TrainingPlan("x", 100, epochs, 1, 1, 0)
        return CandidateTrainer(None, plan, 0, "cpu", Path(), list, print).rungs

    assert rungs(9) == (1, 3, 9)
    assert rungs(3) == (1, 3)
    assert rungs(1) == (1,)
    assert rungs(30) == (3, 10, 30)


def test_halving_trains_few_to_the_end(trainer):
    tier = Stub(trainer)
    arches = [arch_at(seed) for seed in range(24)]
    ways = [learn(trainer, tier, arch) for arch in arches]
    ends = [how for how in ways if how == "trained 9 of 9 epochs"]
    first = [how for how in ways if how.startswith("trained")]
    untrained = [how for how in ways if how.startswith("predicted")]
    assert 2 <= len(ends) <= len(ways) / 2
    assert untrained, "the surrogate knows by then which are worse"
    assert all(how.startswith("trained") for how in ways[:SCREEN_FROM])
    assert len(first) + len(untrained) == len(ways)
    by_skill = sorted(arches, key=skill)
    known = {one.key: one.rungs for one in trainer.__dict__["known"]}
    assert 9 in known[by_skill[-1].digest()], "the best goes to the end"
    worst = known.get(by_skill[0].digest(), {})
    assert 9 not in worst or ways[arches.index(by_skill[0])] in ways[:ETA]
    assert not list(trainer.folder.glob("*")), "no checkpoint is left of a finished trial"


def test_one_fit_serves_until_a_training_adds_to_it(trainer, monkeypatch):
    fits = []

    class Counted(Surrogate):
        def __init__(self, *args) -> None:
            fits.append(args)
            super().__init__(*args)

    monkeypatch.setattr("nas.quality.surrogate.Surrogate", Counted)
    tier, arches = Stub(trainer), [arch_at(seed) for seed in range(5)]
    for arch in arches[:4]:
        learn(trainer, tier, arch)
    assert len(fits) == 1 + len(tier.made), "one of nothing, one a rung"
    tier.predict(Candidate(arches[4]), counts_of(arches[4]))
    tier.review([(arch.digest(), describe(arch, counts_of(arch))) for arch in arches[:4]])
    tier.held_out()
    assert len(fits) == 1 + len(tier.made)
    assert [each.key for each in tier.surrogate().trained] == [each.key for each in trainer.__dict__["known"]]


@pytest.mark.parametrize("reach", [-30.0, -3.0, 0.5, 3.0, 30.0])
def test_estimates_stay_within_0_and_100(trainer, reach):
    """Far beyond what was trained a straight line says 199% or -60%; a network that nothing like it was trained of
    cannot rank first."""
    arches = [arch_at(seed) for seed in range(6)]
    shapes = np.array([describe(arch, counts_of(arch)) for arch in arches])
    for i, shape in enumerate(shapes):
        trainer.__dict__["known"].append(TrainedNetwork(str(i), shape, {9: 55.0 + 4 * i}))
    asked = shapes[0] + reach * (shapes[5] - shapes[0])
    tier = Stub(trainer)
    (found,) = tier.review([("", asked)])
    assert 0 < found.interval.low <= found.value <= found.interval.high < 100
    assert 0 < found.score < found.value + 1e-9
    if abs(reach) >= 30:
        best = max(each.score for each in tier.review([(str(i), shape) for i, shape in enumerate(shapes)]))
        assert found.score < best
        assert found.interval.low < 50
    json.dumps(found.to_dict())


def test_an_interval_holds_the_noise_of_the_images_that_judge(trainer, monkeypatch):
    from nas.intervals import of_share
    from nas.quality.surrogate import Guess

    monkeypatch.setattr(Surrogate, "predict", lambda self, features, key="": Guess(60.0, 0.01))
    found = Stub(trainer).predict(Candidate(arch_at(0)), counts_of(arch_at(0)))
    assert trainer.judged == 200
    alone = of_share(60.0, 200)
    assert found.interval.low == pytest.approx(alone.low, abs=0.01)
    assert found.interval.high == pytest.approx(alone.high, abs=0.01)
    assert found.score == pytest.approx(59.99), "the same images judge all, so they do not rank"
    monkeypatch.setattr(Surrogate, "predict", lambda self, features, key="": Guess(60.0, 4.0))
    wide = Stub(trainer).predict(Candidate(arch_at(0)), counts_of(arch_at(0))).interval
    assert wide.low < 60 - 1.96 * 4 < 60 + 1.96 * 4 < wide.high


def test_trials_tell_whether_they_were_trained(trainer, tmp_path):
    from optuna.samplers import RandomSampler

    from nas.search.rows import best_of, front_of, rows_of
    from nas.study.trials import finish, open_study

    study, tier = open_study("s", tmp_path / "journal", {}, RandomSampler()), Stub(trainer)
    for seed, feasible in ((0, True), (1, False)):
        arch = arch_at(seed)
        found = (tier.estimate if feasible else tier.predict)(Candidate(arch), counts_of(arch))
        detail = {"digest": arch.digest(), **found.to_dict(), "training": found.training.to_json()}
        told = dict.fromkeys(("latency_ms", "latency_ci_low_ms", "latency_ci_high_ms"), 1.0)
        attrs = {"detail": detail | told, "feasible": feasible, "params_m": 1.0, "budget_ms": 2.0}
        finish(study, study.ask(), found.score, 1.0, -0.5, attrs)
    first, second = rows_of(study)
    assert (first.guessed, second.guessed) == (False, True)
    better = dataclasses.replace(second, feasible=True, quality=99.0, latency_ms=0.5)
    assert best_of([first, better]) is first, "a guess does not win over what was trained"
    assert front_of([first, better]) == [first]


def test_the_same_network_is_not_trained_twice(trainer):
    tier = Stub(trainer)
    learn(trainer, tier, arch_at(0))
    made = list(tier.made)
    assert learn(trainer, tier, arch_at(0)) == "trained 9 of 9 epochs"
    assert tier.made == made


def test_a_resumed_trial_keeps_what_its_rungs_showed(trainer, monkeypatch):
    """Killed in epoch 6, whose checkpoint stands: rungs 1 and 3 are not judged anew on that network."""
    tier, arch = Stub(trainer), arch_at(0)
    whole = tier.complete(Candidate(arch), counts_of(arch)).training.rungs
    until = Stub._until

    def killed(self, training, epochs):
        if epochs == 9:
            raise KeyboardInterrupt
        return until(self, training, epochs)

    monkeypatch.setattr(Stub, "_until", killed)
    with pytest.raises(KeyboardInterrupt):
        tier.complete(Candidate(arch), counts_of(arch))
    monkeypatch.setattr(Stub, "_until", lambda self, training, epochs: until(self, training, 9))
    assert tier.complete(Candidate(arch), counts_of(arch)).training.rungs == whole


@pytest.mark.parametrize("content", ["", "[1]", '{"1": "much"}', '{"one": 1.0}', '{"1": null}'])
def test_a_damaged_file_of_rungs_is_one_line(trainer, content):
    tier, arch = Stub(trainer), arch_at(0)
    path = trainer.folder / arch.digest()[:16] / "rungs.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(UserError, match=r"rungs\.json is damaged: remove it"):
        tier.complete(Candidate(arch), counts_of(arch))


def test_large_networks_begin_at_half_their_resolution(trainer, monkeypatch):
    monkeypatch.setattr("pruning.transfer.transfer", lambda *args: {})
    tier, arch = Stub(trainer), arch_at(0, 224)
    learn(trainer, tier, arch)
    assert tier.made == [(96, 1), (224, 2), (224, 8)]
    assert low_resolution(arch_at(0, 96)) is None
    assert low_resolution(arch_at(0, 128)) == 64


def test_a_training_that_diverges_is_told_with_its_epoch_and_an_interrupted_one_is_kept(trainer):
    tier = Stub(trainer, nan_from=3)
    with pytest.raises(TrainingError, match="epoch 3") as caught:
        tier.estimate(Candidate(arch_at(0)), counts_of(arch_at(0)))
    assert caught.value.epoch == 3
    assert list(trainer.folder.glob("*")), "its checkpoint stays for a retry"


def test_the_best_are_settled_by_training_them_to_the_end(trainer):
    tier = Stub(trainer)
    rows, known = [], trainer.__dict__["known"]
    for i, arch in enumerate(arch_at(seed) for seed in range(12)):
        rungs = {e: 50 + skill(arch) + 8 * math.log(e / 9) for e in ((1, 3, 9) if i < 3 else (1,))}
        known.append(TrainedNetwork(arch.digest(), describe(arch, counts_of(arch)), rungs))
        rows.append(
            dataclasses.replace(
                COMPLETE,
                trial=i,
                digest=arch.digest(),
                key=arch.digest(),
                features=describe(arch, counts_of(arch)).tolist(),
                feasible=i != 5,
                quality=0.0,
                arch=arch.model_dump(mode="json"),
            )
        )
    attrs: dict = {}

    def keep(name, value):
        attrs[name] = value
        for j, one in enumerate(known):
            if name.endswith(one.key):
                known[j] = TrainedNetwork(one.key, one.features, {int(e): t for e, t in value.items()})

    trials = [
        SimpleNamespace(user_attrs={"detail": {"digest": one.key, "training": {"features": one.features, "rungs": {}}}})
        for one in known
    ]
    study = SimpleNamespace(user_attrs=attrs, set_user_attr=keep, get_trials=lambda deepcopy: trials)
    monkey = pytest.MonkeyPatch()
    monkey.setattr("nas.search.final.results_of", lambda study: known)
    found = settle(study, tier, rows, True, print, at_once(study, tier))
    monkey.undo()
    best = sorted((row for row in found if row.feasible), key=lambda row: -row.quality_estimate)[:3]
    done = {one.key for one in known if 9 in one.rungs}
    assert all(row.digest in done for row in best)
    archs = [Arch.from_json(json.dumps(row.arch)) for row in rows if row.feasible]
    assert best[0].arch == max(archs, key=skill).model_dump(mode="json")
    assert len(done) < len(known)


def at_once(study, tier):
    """Trainings that are made as soon as they are wanted."""
    made = functools.partial(work._made, None, study, tier)
    return SimpleNamespace(post=lambda tasks: None, result=made, forget=lambda task: None)


def test_trainings_of_a_study_are_read_or_damaged():
    def study(kept, **attrs):
        trial = SimpleNamespace(number=4, user_attrs={"detail": {"digest": "d", "training": kept}})
        return SimpleNamespace(user_attrs=attrs, get_trials=lambda deepcopy: [trial])

    kept = {"features": [1.0, 2.0], "rungs": {"1": 40.0, "3": 50.0}, "seconds": 2.5}
    (found,) = results_of(study(kept))
    assert (found.key, found.features.tolist(), found.rungs) == ("d", [1.0, 2.0], {1: 40.0, 3: 50.0})
    (found,) = results_of(study(kept, **{"completed d": {"1": 40.0, "3": 50.0, "9": 60.0}}))
    assert found.rungs[9] == 60.0, "of a training made after the trial had ended"
    for kept in ({"features": [1.0], "rungs": {}}, {}):
        assert results_of(study(kept)) == []
    for kept in ({"features": [1.0]}, {"features": ["x"], "rungs": {"1": 2.0}}, {"features": [1.0], "rungs": {"a": 1}}):
        with pytest.raises(UserError, match="trial 4 of the study has a damaged training"):
            results_of(study(kept))


def validated(top1: float, first: float, surrogate: float, size: int) -> ValidatedNetwork:
    """A network of the validation. first: the estimate after the first rung."""
    return ValidatedNetwork(
        family="levit",
        params=size,
        macs=-size,
        final_epochs=2,
        predicted=surrogate,
        first_rung=first,
        last_rung=top1,
        rungs={"1": surrogate, "3": top1},
        top1=top1,
    )


def test_machines_keep_each_others_trainings(trainer, tmp_path, monkeypatch):
    """Before one stores what it has trained, another one does: the best, and networks of the validation."""
    from optuna.samplers import RandomSampler

    from nas.search import validate as validation
    from nas.search.trainings import collected
    from nas.study.trials import finish, open_study

    mine, theirs = (open_study("s", tmp_path / "journal", {}, RandomSampler()) for _ in range(2))
    tier, rows = Stub(trainer), []
    for i, arch in enumerate(arch_at(seed) for seed in range(2)):
        features = describe(arch, counts_of(arch)).tolist()
        found = {"digest": arch.digest(), "training": {"features": features, "rungs": {"1": 40.0}}}
        finish(mine, mine.ask(), 40.0, 1.0, -0.5, {"detail": found})
        found = {"trial": i, "digest": arch.digest(), "key": arch.digest(), "features": features}
        found["arch"] = arch.model_dump(mode="json")
        rows.append(dataclasses.replace(COMPLETE, quality=0.0, **found))
    store = mine.set_user_attr

    def store_last(key, value):
        settle(theirs, tier, rows[1:], True, print, at_once(theirs, tier))
        store(key, value)

    with monkeypatch.context() as patch:
        patch.setattr(mine, "set_user_attr", store_last)
        settle(mine, tier, rows[:1], True, print, at_once(mine, tier))
    assert [sorted(one.rungs) for one in results_of(mine)] == [[1, 3, 9]] * 2

    def measure_one(tier, candidate):
        trained = validated(top1=50.0, first=50.0, surrogate=50.0, size=1)
        if candidate.arch is drawn[0]:
            theirs.set_user_attr(validation.RUN + drawn[1].digest(), trained.to_json())
        return trained

    drawn = [arch_at(seed) for seed in (5, 6)]
    monkeypatch.setattr(validation, "draw", lambda *_: drawn)
    monkeypatch.setattr(work, "measure_one", measure_one)
    options = SimpleNamespace(plan=dataclasses.replace(PLAN, validate=6))
    validation.validate(options, mine, tier, rows, print, at_once(mine, tier))
    assert set(collected(theirs, validation.RUN)) == {arch.digest() for arch in drawn}


def test_a_tier_that_may_not_choose_leaves_it_to_parameters():
    small, large = (
        dataclasses.replace(COMPLETE, quality=quality, params_m=params)
        for quality, params in ((60.0, 2.0), (50.0, 4.0))
    )
    assert rank(small) < rank(large)
    assert rank(dataclasses.replace(large, selects=False)) < rank(dataclasses.replace(small, selects=False))


def test_the_closing_run_leaves_it_to_parameters_too(tmp_path, monkeypatch):
    from contextlib import nullcontext

    from nas.export import side_by_side
    from nas.measure.samples import Measurement
    from nas.search import closing

    def row(number: int, quality: float, params: float, selects: bool) -> Trial:
        arch = {"number": number}
        return dataclasses.replace(COMPLETE, trial=number, quality=quality, params_m=params, selects=selects, arch=arch)

    monkeypatch.setattr(closing, "network_of", lambda row: row.arch)
    exporter = SimpleNamespace(write=lambda network, settings, stem: stem)
    monkeypatch.setattr(closing, "Exporter", lambda images: nullcontext(exporter))
    monkeypatch.setattr(side_by_side, "device_lock", lambda device: nullcontext())
    monkeypatch.setattr(side_by_side, "compare", lambda paths, *_, **__: dict.fromkeys(paths, Measurement([[1.0]] * 6)))
    settings = Settings()
    options = SimpleNamespace(
        budget_ms=2.0, settings=settings, folder=tmp_path, against=(), throughput_at=None, limits=Limits()
    )
    for selects_, best in ((True, 1), (False, 2)):
        rows = [row(1, 60.0, 2.0, selects_), row(2, 50.0, 4.0, selects_)]
        assert closing.closing_run(options, rows)[0][0].trial == best


def test_taus():
    truth = np.linspace(50, 60, 16)
    noise = np.random.default_rng(5).standard_normal(16)
    exact = tau(truth, truth)
    assert exact.tau == pytest.approx(1)
    assert exact.ci == pytest.approx([1, 1])
    assert selects(exact)
    nothing = tau(noise, truth)
    assert nothing.ci[0] < 0 < nothing.ci[1]
    assert not selects(nothing)
    assert tau([1.0] * 16, truth) == Tau(None, None)
    assert not selects(tau([1.0] * 16, truth))
    ties = np.round(noise)
    picked = np.random.default_rng(0).integers(16, size=(RESAMPLES, 16))
    scipys = [kendalltau(ties[i], truth[i]).statistic for i in picked]
    assert tau(ties, truth).ci == pytest.approx(list(np.percentile(scipys, [2.5, 97.5])))
    assert tau(ties, truth).tau == pytest.approx(kendalltau(ties, truth).statistic)
    few = [1.0] * 5 + [2.0]
    assert tau(few, few).ci == pytest.approx([1, 1]), "resamples of one value count for nothing"
    rows = [
        validated(top1=t, first=t + n, surrogate=n, size=i) for i, (t, n) in enumerate(zip(truth, noise, strict=True))
    ]
    found = taus(estimates_of(rows), [row.top1 for row in rows])
    assert found["params"].tau == found["estimate, last rung"].tau == pytest.approx(1)
    assert "after 1 epochs" not in found, "the surrogate alone says the same"
    assert found["macs"].tau == pytest.approx(-1)
    assert found[GATE].ci[0] <= found[GATE].tau <= found[GATE].ci[1]


def test_a_full_training_is_read_or_damaged(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"top1": 50.0, "images": 4, "seconds": 1}')
    assert FullTraining.read(path) == FullTraining(50.0, 4, 1.0), "of a vitnas that kept no hits"
    for content in ("", "{", "[]", '{"top1": 50.0}', '{"top1": NaN, "images": 4, "seconds": 1}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"x\.json is damaged: remove it"):
            FullTraining.read(path)


def test_final_figures_are_compared_with_their_spread():
    one = Accuracies("ours", [61.0, 62.0, 63.0], 500, 9.0)
    near = Accuracies("theirs", [60.5, 61.9, 62.0], 500, 9.0)
    far = Accuracies("theirs", [50.0, 50.5, 51.0], 500, 9.0)
    tie = compare_means(one, near)
    assert tie.tie
    assert "a tie" in verdict(tie, one, near)
    gain = compare_means(one, far)
    assert not gain.tie
    assert gain.ci[0] < 11.5 < gain.ci[1]
    assert "a gain" in verdict(gain, one, far)
    assert "a loss" in verdict(compare_means(far, one), far, one)
    alike = Accuracies("theirs", [100.0, 100.0], 500, 3.0)
    same = compare_means(alike, alike)
    assert same.tie
    assert same.ci[0] < 0 < same.ci[1], "500 of 500 images do not show that there is no difference"


def answers(right: int, images: int = 100, flip: int = 0) -> list[bool]:
    """The first `right` images, with the first `flip` of them wrong and as many of the others right."""
    hits = [i < right for i in range(images)]
    return [not hits[i] if i < flip or right <= i < right + flip else hits[i] for i in range(images)]


def test_a_comparison_holds_the_noise_of_the_images():
    """Seeds that agree with each other do not make 40 images say more than they do."""
    one, other = Accuracies("a", [60.0, 60.1, 60.0], 40, 1.0), Accuracies("b", [55.0, 55.1, 55.0], 40, 1.0)
    found = compare_means(one, other)
    assert found.tie
    assert found.ci[0] < -10 < 5 < 20 < found.ci[1]
    line = verdict(found, one, other)
    assert "40 images, 3 seeds" in line
    assert "95%: " in line


def test_one_seed_is_compared_by_its_images_and_says_so():
    one, other = Accuracies("a", [60.0], 100, 1.0), Accuracies("b", [58.0], 100, 1.0)
    found = compare_means(one, other)
    assert found.tie
    assert "a tie (one seed: the spread of seeds is not in it)" in verdict(found, one, other)
    gain = compare_means(one, Accuracies("b", [20.0], 100, 1.0))
    assert not gain.tie
    assert "one seed" in gain.leaves_out


def test_what_no_seed_changes_has_no_spread():
    """A network that is left as it begins has one accuracy; the other's seeds alone vary."""
    begun, trained = Accuracies("a", [50.0], 10**6, 1.0, epochs=0), Accuracies("b", [52.0, 53.0, 54.0], 10**6, 1.0)
    for one, other, points in ((trained, begun, 3), (begun, trained, -3)):
        found = compare_means(one, other)
        low, high = found.ci
        assert (low + high) / 2 == pytest.approx(points, abs=0.01)
        assert (high - low) / 2 == pytest.approx(4.303 / 3**0.5, abs=0.01), "Student's t of two degrees of freedom"
        assert not found.leaves_out
        assert "images, 3 seeds)" in verdict(found, one, other)
    assert "seed" not in begun.words
    assert "seed" not in verdict(compare_means(begun, begun), begun, begun)


def test_the_same_images_are_compared_one_by_one():
    """Newcombe's interval of paired shares (1998, method 10): narrower the more the answers agree."""
    nearly = Accuracies("b", [70.0], 100, 1.0, [answers(70)]), Accuracies("a", [66.0], 100, 1.0, [answers(66)])
    unknown = [dataclasses.replace(each, hits=[]) for each in nearly]
    paired, apart = compare_means(*nearly).ci, compare_means(*unknown).ci
    assert paired[1] - paired[0] < 0.5 * (apart[1] - apart[0])
    unlike = dataclasses.replace(nearly[1], hits=[answers(66, flip=30)])
    far = compare_means(nearly[0], unlike).ci
    assert far[1] - far[0] > 1.5 * (paired[1] - paired[0])
    alike = Accuracies("a", [50.0], 90, 1.0, [answers(45, 90)])
    low, high = compare_means(alike, alike).ci
    assert low < -1 < 1 < high, "the same answers on 90 images do not show that there is no difference"
    # Newcombe (1998), table II, row (a): 36, 12, 2, 0 of 50 pairs
    first = [True] * 48 + [False] * 2
    second = [True] * 36 + [False] * 12 + [True] * 2
    pair = [Accuracies("x", [100 * sum(hits) / 50], 50, 1.0, [hits]) for hits in (first, second)]
    assert compare_means(*pair).ci == pytest.approx([5.69, 34.04], abs=0.02)


def test_final_trainings_are_told_with_their_interval_images_and_seeds():
    found = Accuracies("a", [58.0, 59.0, 61.0], 180, 9.0)
    low, high = found.to_json()["top1_ci"]
    assert low < 59.3 - 6 < 59.3 + 6 < high, "180 images leave 7 points open"
    assert found.words == f"59.3% top-1 (95%: {low:.1f} to {high:.1f}, 180 images, 3 seeds)"
    low, high = Accuracies("a", [100.0, 99.0], 100, 9.0).to_json()["top1_ci"]
    assert high <= 100


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"images": 5}, "--train-images"),
        ({"epochs": 0}, "--epochs"),
        ({"final_epochs": 0}, "--final-epochs"),
        ({"seeds": 0}, "--seeds"),
        ({"validate": 2}, "--validate"),
    ],
)
def test_a_training_plan_out_of_range(change, word):
    from dataclasses import replace

    with pytest.raises(UserError, match=word):
        replace(PLAN, **change).check()


def test_final_trainings_of_a_race_go_through_as_many_images_whatever_their_number():
    plan = TrainingPlan("images")
    assert plan.full_epochs == plan.settled("train", 2_000).full_epochs == 30
    assert [plan.settled("race", images).full_epochs for images in (100, 2_000, 50_000)] == [30, 12, 3]
    assert plan.settled("race", 2_000, made=30).full_epochs == 30, "those that an older vitnas has made"
    assert PLAN.settled("race", 2_000, made=30) == PLAN, "as the user said"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--quality", "train"), "--data"),
        (("--parent", "levit_128s"), "--data"),
        (("--quality", "oracle"), "choose"),
        (("--quality", "inherit", "--data", "x"), "--parent"),
        (("--quality", "train", "--data", "x", "--parent", "levit_128s"), "--parent"),
        (("--quality", "prior", "--data", "x"), "--data"),
        (("--data", "nowhere"), "no such folder"),
        (("--data", "x", "--parent", "levit_128s", "--family", "shvit"), "--family"),
        (("--resolution", "100"), "multiple of 32"),
        (("--data", "x", "--seeds", "0"), "--seeds"),
        (("--final-epochs", "9"), "--final-epochs needs --data"),
    ],
)
def test_bad_words_are_refused(vitnas, tmp_path, words, said):
    result = vitnas("search", "--latency-budget", "2ms", "--out", str(tmp_path / "runs"), *words)
    vitnas.refused(result, said)
    assert not (tmp_path / "runs").exists()


def test_published_arch_keeps_its_own_figures_only_at_home():
    from nas.search.rows import published_top1

    arch = get_arch("shvit_s1")
    home = dataclasses.replace(COMPLETE, name="shvit_s1", resolution=224, arch=arch.model_dump())
    assert published_top1(home) == pytest.approx(72.8)
    assert published_top1(dataclasses.replace(home, resolution=64)) is None
    assert published_top1(dataclasses.replace(home, arch=arch.replace(num_classes=10).model_dump())) is None
    assert published_top1(COMPLETE) is None


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 8)):
        for label in ("dark", "light"):
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                level = rng.normal(60 if label == "dark" else 200, 30, (32, 32, 3)).clip(0, 255)
                Image.fromarray(level.astype(np.uint8)).save(root / part / label / f"{i}.png")
    return root


def real_trainer(pictures: Path, folder: Path, **more) -> CandidateTrainer:
    from nas.data.dataset import open_data

    data = open_data(str(pictures), 32, None, 0)
    plan = TrainingPlan(str(pictures), 100, more.pop("epochs", 1), 1, 1, 0)
    return CandidateTrainer(data, plan, 0, "cpu", folder, list, lambda *_: None, resolution=32, **more)


def test_judges_are_never_trained_on(pictures, tmp_path):
    trainer = real_trainer(pictures, tmp_path)
    rest, judge = trainer.halves(32)
    assert len(judge) == trainer.judged == 16
    assert not set(rest.sources) & set(judge.sources)
    assert {path.parts[-3] for path in (*rest.sources, *judge.sources)} == {"train"}, (
        "validation images are for the end"
    )
    assert len(rest) + len(judge) == 80
    images, judges = trainer.split(32)
    assert len(images) == trainer.used == 64
    assert list(judges.labels) == list(judge.labels)


def test_images_of_earlier_resolutions_are_let_go(pictures, tmp_path):
    """What was trained and judged keeps no images alive, and still tells which could not be decoded."""
    import gc
    import shutil
    import weakref

    from nas.data.batches import skipped_line
    from search_spaces import create_model

    broken = tmp_path / "pictures"
    shutil.copytree(pictures, broken)
    for label in ("dark", "light"):
        (broken / "train" / label / "0.png").write_bytes(b"broken")
    trainer = real_trainer(broken, tmp_path)
    tier, kept = HalvingTier(trainer), []
    for size in (32, 64, 96):
        arch = arch_at(3, size).replace(num_classes=2)
        images, judge = trainer.split(size)
        kept.append((weakref.ref(images), weakref.ref(judge)))
        tier.begin(Candidate(arch), images, tier.recipe(1), 0, tmp_path / str(size)).run()
        trainer.judge(create_model(arch), judge)
    del images, judge
    gc.collect()
    assert [each() for each in kept[0]] == [None, None]
    assert "skipped 2 images" in skipped_line(trainer.loaders)


def test_candidates_inherit_the_parent_s_weights_and_are_taught_by_it(pictures, tmp_path):
    import torch

    from nas.quality.inherit import InheritTier
    from nas.quality.trainer import Parent
    from search_spaces import create_model

    arch = arch_at(3, 32).replace(num_classes=2)
    torch.manual_seed(1)
    weights = create_model(arch).state_dict()
    tier = InheritTier(real_trainer(pictures, tmp_path, parent=Parent("ours", arch, weights, {})))
    trainer = tier.trainer
    images, _ = trainer.split(32)
    same = tier.begin(Candidate(arch), images, tier.recipe(1), 0, tmp_path / "a")
    assert all(torch.equal(value, weights[name]) for name, value in same.network.state_dict().items())
    other = arch_at(4, 32).replace(num_classes=2)
    found = tier.estimate(Candidate(other), counts_of(other))
    assert found.how == "trained 1 of 1 epoch"
    assert tier.teacher(32) is tier.teacher(32)
    stranger = InheritTier(real_trainer(pictures, tmp_path, parent=Parent("x", arch.replace(num_classes=7), {}, {})))
    assert stranger.teacher(32) is None, "seven classes cannot teach two"


def test_shared_weights_are_trained_once_and_may_not_choose_unproven(pictures, tmp_path, monkeypatch):
    from nas.quality.shared import SupernetTier
    from nas.training.supernet import Supernet

    few = [arch_at(seed, 32).replace(num_classes=2) for seed in (3, 4)]
    monkeypatch.setattr(Supernet, "over", classmethod(lambda cls, *words: cls.among(few)))
    tier = SupernetTier(real_trainer(pictures, tmp_path))
    found = [tier.estimate(Candidate(arch), counts_of(arch)) for arch in few]
    assert tier.needs_validation
    assert all(
        0 <= one.interval.low < one.value <= one.interval.high <= 100 and one.how == "with shared weights"
        for one in found
    )
    monkeypatch.setattr(Supernet, "train", None)
    again = SupernetTier(real_trainer(pictures, tmp_path)).estimate(Candidate(few[0]), counts_of(few[0]))
    assert again.value == found[0].value, "the weights that the first one kept"


def test_a_parent_is_a_folder_with_weights(pictures, tmp_path, helpers):
    import torch

    from nas.export.folder import save_weights
    from nas.quality.parent import find_parent
    from search_spaces import create_model

    trainer, said = real_trainer(pictures, tmp_path / "training"), []
    for classes, lines in ((2, 1), (7, 2)):
        folder = tmp_path / str(classes)
        folder.mkdir()
        model = helpers.randomise(create_model(arch_at(3, 32).replace(num_classes=classes)), 1)
        (folder / "arch.json").write_text(model.arch.to_json())
        with pytest.raises(UserError, match=r"has no model\.safetensors"):
            find_parent(str(folder), trainer, said.append)
        assert not said
        save_weights(model, folder / "model.safetensors")
        found = find_parent(str(folder), trainer, said.append)
        assert all(torch.equal(value, found.weights[name]) for name, value in model.state_dict().items())
        assert found.scores
        assert found.seen == said[0]
        assert ("cannot teach" in said[-1]) == (classes == 7)
        assert len(said) == lines
        said.clear()


def test_each_rung_is_ranked_by_the_networks_that_went_on():
    def network(*top1: float) -> TrainedNetwork:
        return TrainedNetwork(str(top1), np.zeros(3), dict(zip((0, 1, 9), top1, strict=False)))

    some = [network(40, 45, 50), network(41, 44, 51), network(42, 46, 53), network(39, 47, 54), network(60, 70)]
    zero, one = rung_ranks(some, last=9)
    assert (zero.epochs, one.epochs) == (0, 1)
    assert (zero.networks, one.networks) == (4, 4), "the last network did not come to the end"
    assert zero.tau.tau == pytest.approx(0)
    assert zero.regret == 1, "the best there ends at 53, the best of all at 54"
    assert one.tau.tau == pytest.approx(2 / 3)
    assert one.regret == 0
    assert rung_ranks(some[3:], last=9) == []
