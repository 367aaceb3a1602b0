"""A race's trials: no candidate twice, also with two workers; what ends it, and what is told."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from optuna.samplers import RandomSampler

from nas.errors import UserError
from nas.intervals import Interval
from nas.measure.budget import Limits
from nas.measure.runtime import Settings
from nas.networks.counts import counts_of
from nas.quality.candidate import Candidate, Kind
from nas.quality.surrogate import describe_candidate
from nas.quality.tier import Estimate
from nas.search.final import seeds_of
from nas.search.given import GIVEN
from nas.search.latency import TrialLatency
from nas.search.log import Clock, SearchLog
from nas.search.race import Race, find_field
from nas.search.ready import Entrant
from nas.search.rows import finalists_of, trial_of
from nas.search.trial import TrialRunner
from nas.study.trials import AllBegun, ask, finish, open_study
from search_spaces import get_arch

BUDGET_MS = 0.6
NAMES = ("efficientvit_m0", "efficientvit_m1")


def entrants() -> list[Entrant]:
    return [Entrant(name, "efficientvit", get_arch(name).replace(num_classes=5), (64,)) for name in NAMES]


class Runner:
    """Measures as it is told."""

    reference_ms = 1.0

    def __init__(self, study: optuna.Study, ms: float) -> None:
        self.study, self.ms, self.trials = study, ms, 8
        self.stage = lambda *_: None
        self.made: list[Candidate] = []

    def trial(self, log: SearchLog, enqueue_one) -> None:
        with suppress(AllBegun):
            self._run(ask(self.study, enqueue_one, total=self.trials))

    def _run(self, trial: optuna.Trial) -> None:
        candidate = Candidate.from_json(trial.user_attrs[GIVEN])
        self.made.append(candidate)
        features = describe_candidate(candidate, counts_of(candidate.network)).tolist()
        detail = {
            "digest": candidate.network.digest(),
            "key": candidate.key,
            "latency_ms": self.ms,
            "training": {"features": features, "rungs": {}},
        }
        attrs = {"family": "efficientvit", "detail": detail, "feasible": int(self.ms <= BUDGET_MS)}
        finish(self.study, trial, 50.0, 1.0, self.ms - BUDGET_MS, attrs)


def race(folder: Path, ms: float = 0.5, digests: dict[str, str] | None = None) -> tuple[Race, Runner]:
    study = open_study("s", folder / "study.journal", {"a": 1}, RandomSampler(seed=0))
    runner = Runner(study, ms)
    store = SimpleNamespace(digests=digests or {}, files={}, reach=lambda: True, left_out={})
    parents = SimpleNamespace(failed={"efficientvit_m0": "no", "efficientvit_m1": "no"})
    surrogate = SimpleNamespace(trained=[])
    plan = SimpleNamespace(teacher=None)
    trainer = SimpleNamespace(weights=store, folder=folder / "training", plan=plan, judged=100)
    tier = SimpleNamespace(parents=parents, surrogate=lambda: surrogate, trainer=trainer)
    request = SimpleNamespace(
        budget_ms=BUDGET_MS,
        trials=8,
        seed=0,
        families=("efficientvit",),
        sampler="auto",
        resolution=64,
        num_classes=5,
        limits=Limits(),
        settings=Settings(),
        precisions=("fp32",),
    )
    return Race(request, study, tier, entrants(), runner), runner


def test_trials_go_on_until_nothing_is_left(tmp_path: Path) -> None:
    made, runner = race(tmp_path)
    log = SearchLog("now")
    assert [made.trial(log) for _ in range(3)] == [True, True, False]
    assert sorted(each.name for each in runner.made) == ["efficientvit_m0@64", "efficientvit_m1@64"]
    assert log.notes == [
        "nothing is left to try: every ready network that may meet the budget has been, and no pretrained network of "
        "these families is over it, to cut smaller ones from; may help: a smaller --latency-budget, --weights-from DIR "
        "with weights of larger networks, --from-scratch"
    ]
    assert log.exhausted
    assert made.lines() == []


@pytest.mark.parametrize(
    ("ms", "said"),
    [
        (100.0, ", and the pretrained networks over it take more than 4 times as long, too long to be cut to it"),
        (0.7, ", and of the pretrained networks over it none could be cut"),
    ],
)
def test_why_nothing_is_left_is_told(tmp_path: Path, ms: float, said: str) -> None:
    made, _ = race(tmp_path, ms)
    log = SearchLog("now")
    while made.trial(log):
        pass
    assert said in log.notes[0]


def test_that_other_ready_networks_are_left_is_told(tmp_path: Path) -> None:
    made, runner = race(tmp_path)
    made._request.trials = 2
    log = SearchLog("now")
    while made.trial(log):
        pass
    assert len(runner.made) == 1
    assert "try: ready networks have had their half of the trials, and no" in log.notes[0]
    assert "may help: more --trials, for other ready networks, a smaller" in log.notes[0]


def test_two_workers_do_not_try_the_same(tmp_path: Path) -> None:
    (first, one), (second, other) = race(tmp_path), race(tmp_path)
    offered = [each.at(64) for each in entrants()]
    first._chooser.offer = second._chooser.offer = lambda study: offered
    log = SearchLog("now")
    assert first.trial(log)
    assert second.trial(log)
    assert one.made[0].key != other.made[0].key
    assert first.trial(log), "the others have taken what was offered: it looks again"
    assert len(one.made) == 1


def test_workers_that_tuned_a_parent_meanwhile_make_no_trial_too_many(tmp_path: Path) -> None:
    (first, one), (second, other) = race(tmp_path), race(tmp_path)
    one.trials = other.trials = 1
    offered = [each.at(64) for each in entrants()]
    first._chooser.offer = second._chooser.offer = lambda study: offered
    log = SearchLog("now")
    assert first.trial(log)
    assert second.trial(log)
    assert (len(one.made), len(other.made)) == (1, 0)
    assert not log.notes
    assert not log.exhausted


def test_that_no_ready_network_fits_is_told(tmp_path: Path) -> None:
    made, runner = race(tmp_path, ms=100.0)
    log = SearchLog("now")
    while made.trial(log):
        pass
    assert runner.made, "one is measured, whatever its size says"
    lines = made.lines()
    assert lines[-1] == f"no ready network met 0.6 ms in its trial: the fastest, {runner.made[0].name}, took 100 ms"
    assert all(line.startswith("surely over 0.6 ms, and so not measured: efficientvit_m") for line in lines[:-1])


def test_weights_that_are_downloaded_belong_to_the_study(tmp_path: Path) -> None:
    made, _ = race(tmp_path)
    made._tier.trainer.weights.digests = {"efficientvit_m0": "1111"}
    made.trial(SearchLog("now"))
    assert made._study.user_attrs["weights"] == {"efficientvit_m0": "1111"}


def test_who_races_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = race(tmp_path, digests={"efficientvit_m0": "1111"})
    trainer, told = made._tier.trainer, []
    monkeypatch.setattr("nas.search.race.find_entrants", lambda *_: (entrants(), ["a", "b", "c", "d"]))
    assert [each.name for each in find_field(made._request, made._study, trainer, told.append)] == list(NAMES)
    assert told == [
        "pretrained networks in the race: efficientvit_m0, efficientvit_m1",
        "left out, as their weights cannot be had: a, b, c and 1 more",
    ]
    trainer.judged = 4
    find_field(made._request, made._study, trainer, told.append)
    assert told[2] == (
        "4 images judge: a top-1 of 50% is known within 35 points, so which of two networks is better is often chance; "
        "more training images help"
    )
    trainer.judged = 100
    made._request.sampler = "random"
    find_field(made._request, made._study, trainer, told.append)
    assert told.pop().startswith("--sampler random makes up networks of any family and resolution: a parent is tuned")
    made._request.sampler = "auto"
    trainer.weights.left_out = {"b": "zoo/b.safetensors: no"}
    find_field(made._request, made._study, trainer, told.append)
    assert told[-1] == "left out: zoo/b.safetensors: no"
    trainer.weights.digests = {"efficientvit_m0": "2222"}
    trainer.weights.files = {"efficientvit_m0": Path("zoo/m0.safetensors")}
    with pytest.raises(UserError, match=r"began with weights\.efficientvit_m0 1111, this command says 2222"):
        find_field(made._request, made._study, trainer, told.append)
    monkeypatch.setattr("nas.search.race.find_entrants", lambda *_: ([], ["a"]))
    trainer.weights.digests = {}
    find_field(made._request, made._study, trainer, told.append)
    assert told[-1].startswith("no pretrained weights were found: every network begins with random ones")


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    made, runner = race(tmp_path)
    made.trial(SearchLog("now"))
    (trial,) = made._study.trials
    assert (trial.user_attrs["kind"], runner.made[0].kind) == ("ready", Kind.READY)


@pytest.mark.parametrize(
    ("kind", "ms", "estimated"),
    [(Kind.READY, 0.602, True), (Kind.READY, 0.62, False), (Kind.DERIVED, 0.602, False), (Kind.DERIVED, 0.59, True)],
)
def test_a_ready_network_that_may_meet_the_budget_is_in_the_race(
    tmp_path: Path, kind: Kind, ms: float, estimated: bool
) -> None:
    """Its latency may be what the budget was taken from."""
    study = open_study("s", tmp_path / "study.journal", {"a": 1}, RandomSampler(seed=0))
    parent = "efficientvit_m1" if kind == Kind.DERIVED else ""
    candidate = Candidate(get_arch("efficientvit_m0").at(64), kind, parent)
    asked = []

    def judge(what: str) -> Estimate:
        asked.append(what)
        return Estimate(50.0, Interval(48.0, 52.0), 49.0)

    tier = SimpleNamespace(
        name="race",
        trained=True,
        estimate=lambda *_: judge("estimate"),
        predict=lambda *_: judge("predict"),
        trainer=SimpleNamespace(alone=nullcontext),
    )
    runner = TrialRunner(SimpleNamespace(budget_ms=BUDGET_MS, limits=Limits()), study, tier)
    latency = TrialLatency(ms, ms, ms - 0.005, ms + 0.005, 100, 20, 1.0, 0.0, 1.0, "measured")
    runner._known = lambda digest: latency
    assert runner._measure_and_tell(ask(study), candidate, Clock(SearchLog("now").phases), lambda: None)
    assert asked == ["estimate" if estimated else "predict"]
    made = trial_of(study.trials[0])
    assert made.feasible == (ms <= BUDGET_MS), "what is told to be within the budget is"
    judged = replace(made, guessed=not estimated, arch={"n": 1})
    fitting = replace(judged, trial=9, kind=Kind.DERIVED, parent="x", feasible=True, latency_ms=0.5, arch={"n": 9})
    assert (judged in finalists_of([judged, fitting], BUDGET_MS)) == estimated


@pytest.mark.parametrize(("memory_mb", "over"), [(64.0, ()), (80.0, ("memory",)), (None, ("memory",))])
def test_a_network_over_a_limit_is_infeasible_and_not_trained(
    tmp_path: Path, memory_mb: float | None, over: tuple[str, ...]
) -> None:
    study = open_study("s", tmp_path / "study.journal", {"a": 1}, RandomSampler(seed=0))
    asked = []

    def judge(what: str) -> Estimate:
        asked.append(what)
        return Estimate(50.0, Interval(48.0, 52.0), 49.0)

    tier = SimpleNamespace(
        name="race",
        trained=True,
        estimate=lambda *_: judge("estimate"),
        predict=lambda *_: judge("predict"),
        trainer=SimpleNamespace(alone=nullcontext),
    )
    limits = Limits(memory_mb=64.0)
    runner = TrialRunner(SimpleNamespace(budget_ms=BUDGET_MS, limits=limits), study, tier)
    latency = TrialLatency(0.1, 0.1, 0.1, 0.1, 100, 20, 1.0, 0.0, 1.0, "measured", memory_mb, 2.0)
    runner._known = lambda digest: latency
    candidate = Candidate(get_arch("efficientvit_m0").at(64), Kind.READY, "")
    assert runner._measure_and_tell(ask(study), candidate, Clock(SearchLog("now").phases), lambda: None)
    made = trial_of(study.trials[0])
    assert asked == ["predict" if over else "estimate"]
    assert (made.feasible, made.over, made.verdict) == (not over, over, "over" if over else "fits")
    assert (made.memory_mb, made.file_mb) == (memory_mb, 2.0)
    assert study.trials[0].constraints["memory"] == (1.0 if memory_mb is None else memory_mb / 64 - 1)


@pytest.mark.parametrize(("parent", "tuned", "seeds"), [("", False, 1), ("larger", False, 1), ("larger", True, 3)])
def test_what_no_seed_changes_is_trained_once(parent: str, tuned: bool, seeds: int) -> None:
    """A network that stays as it begins, unless its parent is tuned from each seed."""
    tier = SimpleNamespace(tuning_pays=lambda _: False, parent_tuning_pays=lambda _: tuned)
    request, candidate = SimpleNamespace(plan=SimpleNamespace(seeds=3)), SimpleNamespace(parent=parent)
    assert len(seeds_of(request, tier, candidate)) == seeds  # type: ignore[arg-type]
