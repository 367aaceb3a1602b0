"""What a search tries: first a network of each family that fits, then the published ones near, then the most promising.

No network is measured: its latency is made up from its MACs and blocks."""

from __future__ import annotations

import functools
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest

from nas.measure.budget import Limits
from nas.networks.counts import counts_of
from nas.quality.prior import PriorTier
from nas.search import finder
from nas.search.finder import BySize, ByTraining, Finder
from nas.search.guide import Guide, NothingLeft
from nas.search.loop import _Search
from nas.search.opening import Opening, ladder, rungs_of, smallest_of
from nas.search.request import SearchRequest
from nas.search.seen import Point, Seen, params_of
from nas.search.speed import Speed, coordinates
from nas.study.ledger import ledger_of
from nas.study.samplers import make_sampler
from nas.study.trials import ask, finish, open_study
from search_spaces import Arch, get_arch, stage_counts
from search_spaces.registry import FAMILIES
from search_spaces.space import LEVELS

REFERENCE_MS = 3.0
SLOWER = {"efficientvit": 1.1, "evit": 0.7, "levit": 0.8, "sepvit": 1.6, "shvit": 0.7}
"""Milliseconds for 26 MMACs."""


@functools.cache
def size_of(arch) -> tuple[float, int]:
    row = coordinates(arch)
    return math.exp(row[0]), round(math.exp(row[1]))


def latency(arch) -> float:
    macs, blocks = size_of(arch)
    return SLOWER[arch.family] * macs / 26e6 + 0.02 * blocks


@pytest.fixture(autouse=True)
def small_choice(monkeypatch):
    monkeypatch.setattr(finder, "FIRST", 60)
    monkeypatch.setattr(finder, "DRAWN", 10)
    monkeypatch.setattr(finder, "CHILDREN", 12)


@dataclass
class Worker:
    """Makes trials of a study as `nas.search.trial` does, without measuring."""

    request: SearchRequest
    folder: Path
    order: list[Point] = field(default_factory=list)
    left: str = ""
    """Why nothing was left to try."""

    def __post_init__(self) -> None:
        sampler = make_sampler(self.request.sampler, self.request.seed)
        self.study = open_study("s", self.folder / "study.journal", {}, sampler)
        self.guide = Guide(self.request, self.study, PriorTier(), REFERENCE_MS)

    def ask(self) -> tuple[optuna.Trial, Point]:
        from nas.search.trial import suggest

        trial = ask(self.study, self.guide.propose, self.guide.prepare)
        arch = suggest(trial, self.request).arch
        params = dict(trial.params)
        point = Point.at(self.request, params.pop("family"), params, trial.user_attrs.get("name", ""))
        assert point.arch == arch
        self.order.append(point)
        return trial, point

    def tell(self, trial: optuna.Trial, point: Point) -> None:
        ms, score = latency(point.arch), BySize(PriorTier()).score(point)
        needs = {"memory_mb": 10 + 3 * file_mb(point.arch), "file_mb": file_mb(point.arch)}
        over = self.request.limits.over(**needs)
        detail = {"digest": point.digest, "latency_ms": ms, "reference_ms": REFERENCE_MS, "over": [*over], **needs}
        attrs = {"feasible": int(ms <= self.request.budget_ms and not over), "detail": detail}
        finish(self.study, trial, score, 1000 / ms, ms / self.request.budget_ms - 1, attrs)

    def run(self, trials: int) -> list[Point]:
        try:
            for _ in range(trials):
                self.tell(*self.ask())
        except NothingLeft as why:
            self.left = str(why)
        return self.order


def file_mb(arch: Arch) -> float:
    return 4 * counts_of(arch).params / 1e6


def request(budget_ms: float, **more) -> SearchRequest:
    return SearchRequest(budget_ms, seed=0, **more)


@pytest.fixture(scope="module")
def tried(tmp_path_factory) -> list[Point]:
    """The first trials at 3 ms."""
    return Worker(request(3.0), tmp_path_factory.mktemp("study")).run(16)


def test_a_network_of_every_family_fits_soon(tried):
    first = next(i for i, point in enumerate(tried) if latency(point.arch) <= 3)
    assert first < 3
    assert tried[0].family == "levit", "the most promising family comes first"
    fitting = {point.family for point in tried[:10] if latency(point.arch) <= 3}
    assert fitting == set(FAMILIES)


def test_published_networks_that_are_surely_over_are_not_measured(tried):
    published = {point.name: latency(point.arch) / 3 for point in tried if point.name}
    assert "efficientvit_m0" in published, "it is about the budget"
    assert sum(times > 1 for times in published.values()) >= 1, "one just above the budget closes the table"
    assert sum(times > 1.6 for times in published.values()) <= 1
    every = {name for family in FAMILIES.values() for name in family.variants}
    assert len(published) < len(every) / 3


def test_nothing_is_tried_twice(tried):
    assert len({point.digest for point in tried}) == len(tried)


def test_the_sampler_finds_better_ones_than_the_beginning_and_chance(tmp_path):
    prior = BySize(PriorTier())
    best = {}
    for name in ("auto", "random"):
        (tmp_path / name).mkdir()
        points = Worker(request(3.0, families=("levit", "shvit"), sampler=name), tmp_path / name).run(16)
        best[name] = max(prior.score(point) for point in points if latency(point.arch) <= 3)
    assert best["auto"] > best["random"] + 1


@pytest.fixture
def proposed(monkeypatch) -> list[Point]:
    """What finders have proposed."""
    found, propose = [], Finder.propose
    monkeypatch.setattr(Finder, "propose", lambda self: found.append(propose(self)) or found[-1])
    return found


def test_nothing_is_worked_out_twice(tmp_path, monkeypatch):
    """The beginning is asked once a trial; levels that come up again are not decoded again."""
    asked, next_ = [], Opening.next
    monkeypatch.setattr(Opening, "next", lambda self: asked.append(self) or next_(self))
    worker = Worker(request(3.0, families=("levit",)), tmp_path)
    worker.run(6)
    assert len(asked) == 6
    worker.guide._finder._add("levit", levels_of("levit"))
    monkeypatch.setattr(Point, "at", lambda *_: pytest.fail("it is made again"))
    worker.guide._finder._add("levit", levels_of("levit"))


def test_families_with_few_trials_keep_their_share(tmp_path, proposed):
    Worker(request(3.0, families=("levit", "shvit")), tmp_path).run(22)
    families = [point.family for point in proposed]
    assert len(families) > 10
    assert min(families.count(name) for name in ("levit", "shvit")) >= math.floor(0.15 * len(families))


def test_workers_do_not_propose_the_same(tmp_path, monkeypatch):
    """They compare at the same time, and so find the same, which one after the other proposes then."""
    request_ = request(3.0, families=("levit",))
    one = Worker(request_, tmp_path)
    one.run(6)
    two, three = Worker(request_, tmp_path), Worker(request_, tmp_path)
    for worker in (two, three):
        ledger_of(worker.study)
        worker.guide.prepare()
    first, again = (worker.guide._finder.propose() for worker in (two, three))
    assert first.digest == again.digest
    for worker in (two, three):
        monkeypatch.setattr(worker.guide, "prepare", lambda: None)
    with monkeypatch.context() as context:
        context.setattr(Finder, "compare", lambda _: pytest.fail("it keeps others waiting"))
        running = [worker.ask() for worker in (two, three, two, three)]
    assert len({point.digest for _, point in running}) == 4
    for worker, (trial, point) in zip((two, three, two, three), running, strict=True):
        worker.tell(trial, point)
    monkeypatch.setattr(finder, "CHANCE", 1.0)  # nothing fits: the likeliest
    four, five = Worker(request_, tmp_path), Worker(request_, tmp_path)
    for worker in (four, five):
        ledger_of(worker.study)
        worker.guide.prepare()
        monkeypatch.setattr(worker.guide, "prepare", lambda: None)
    with monkeypatch.context() as context:
        context.setattr(Finder, "compare", lambda _: pytest.fail("it keeps others waiting"))
        for worker in (four, five):
            worker.ask()
    five.guide._finder._ranked = five.guide._finder._of_few = []
    five.ask()
    seen = Seen(request_, get_arch("efficientvit_m0"), REFERENCE_MS)
    seen.read(two.study)
    assert len(seen.digests) == len(two.study.trials) == 13, "where others have taken all, it compares anew"
    five.guide._finder._ranked = five.guide._finder._of_few = []
    monkeypatch.setattr(Finder, "compare", lambda _: None)
    with pytest.raises(NothingLeft, match="every network that was compared has been tried"):
        five.ask()


def test_a_worker_proposes_the_same_again_with_the_same_seed(tmp_path, proposed):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Worker(request(3.0, families=("shvit",)), tmp_path / name).run(12)
    half = len(proposed) // 2
    assert half > 1
    assert [point.digest for point in proposed[:half]] == [point.digest for point in proposed[half:]]


def test_a_proposal_is_seen_as_soon_as_its_trial_begins(tmp_path):
    worker = Worker(request(3.0, families=("levit",)), tmp_path)
    worker.run(6)
    trial = ask(worker.study, worker.guide.propose, worker.guide.prepare)
    assert trial.params == worker.study.trials[-1].params
    family, found = params_of(worker.study.trials[-1])
    assert family == "levit"
    seen = Seen(worker.request, get_arch("efficientvit_m0"), REFERENCE_MS)
    seen.read(worker.study)
    assert Point.at(worker.request, "levit", found).digest in seen.digests


def test_what_was_measured_before_a_study_foretells_its_latencies(tmp_path):
    options, arch = request(3.0, families=("levit",)), get_arch("levit_128s")
    row = Point.at(options, "levit", levels_of("levit")).coordinates[None]
    reference = get_arch("efficientvit_m0")
    (guess,), (unsure,) = Seen(options, reference, REFERENCE_MS).speed.predict(row)
    seen = Seen(options, reference, REFERENCE_MS, [(arch, 0.1)])
    worker = Worker(options, tmp_path)
    for _ in range(2):
        (mean,), (error,) = seen.speed.predict(row)
        assert mean < guess - 0.5
        assert error < unsure
        worker.run(1)
        seen.read(worker.study)
        seen.learn()


def test_far_below_everything_the_smallest_shapes_are_measured_and_no_more(tmp_path):
    worker = Worker(request(0.05), tmp_path)
    points = worker.run(20)
    assert {point.digest for point in points} == {smallest_of(worker.request, name).digest for name in FAMILIES}
    assert worker.left == "the smallest shape of every family was measured, far over 0.05 ms"


def test_far_above_everything_the_search_ends_with_the_best_of_the_space(tmp_path):
    worker = Worker(request(2000.0, families=("levit", "shvit")), tmp_path)
    points = worker.run(30)
    assert len(points) < 20
    assert worker.left == "of the networks compared last, over 2000 ms or not, none promises more than the best"
    prior = BySize(PriorTier())
    published = max(prior.score(point) for name in ("levit", "shvit") for point in rungs_of(worker.request, name))
    assert max(prior.score(point) for point in points) >= published - finder.MARGIN


def test_a_family_is_given_up_only_once_its_smallest_shape_is_over(tmp_path, monkeypatch):
    monkeypatch.setitem(SLOWER, "sepvit", 8.0)
    slow = request(2.0, families=("sepvit", "shvit"))
    points = [point for point in Worker(slow, tmp_path).run(8) if point.family == "sepvit"]
    assert all(latency(point.arch) > 2 for point in points)
    tried = [point.digest for point in points]
    assert tried.index(smallest_of(slow, "sepvit").digest) > 0, "larger ones were likelier than they turned out"


def test_one_family_at_two_milliseconds(tmp_path):
    points = Worker(request(2.0, families=("sepvit",)), tmp_path).run(4)
    assert any(latency(point.arch) <= 2 for point in points)


@pytest.mark.parametrize(("older", "sampler"), [(True, "AutoSampler"), (False, "RandomSampler")])
def test_an_older_study_goes_on_as_it_was_begun(tmp_path, older, sampler):
    options = request(3.0, families=("levit",), out=tmp_path)
    search = _Search(options, lambda _: None, lambda _: None, lambda *_: None, None)
    if older:
        search.study.set_user_attr("published", ["levit_192"])
    runner = SimpleNamespace(reference_ms=REFERENCE_MS, measured_before=list, trial=print)
    search._trials(ExitStack(), runner, PriorTier())
    assert type(search.study.sampler).__name__ == sampler
    assert [trial.user_attrs["name"] for trial in search.study.trials] == ["levit_192"] * older


def test_ladders_change_resolution_first_then_width_and_depth():
    family = FAMILIES["shvit"]
    levels = family.space.encode(family.variants["shvit_s2"].values)
    rungs = [levels, *ladder(levels, family.space.options, True)]
    first = [name for name in levels if rungs[1][name] != levels[name]]
    assert first == ["resolution"]
    archs = [family.space.decode(rung, 10) for rung in rungs]
    down = [size_of(arch)[0] for arch in archs[: len(archs) // 2]]
    assert down == sorted(down, reverse=True)
    assert rungs[-1]["resolution"] == LEVELS - 1
    fixed = list(ladder(levels, family.space.options, False))
    assert {rung["resolution"] for rung in fixed} == {levels["resolution"]}


def test_latencies_are_foretold_better_with_every_family_that_is_measured():
    rng = np.random.default_rng(0)
    options = request(3.0)
    points = []
    for number in range(60):
        family = tuple(FAMILIES)[number % 5]
        levels = {name: int(rng.integers(LEVELS)) for name in levels_of(family)}
        points.append(Point.at(options, family, levels))
    rows = np.array([point.coordinates for point in points])
    truth = np.log([latency(point.arch) / REFERENCE_MS for point in points])
    reference = coordinates(get_arch("efficientvit_m0")), 1.0

    def errors(known: int) -> np.ndarray:
        speed = Speed(reference, [(row, math.exp(each)) for row, each in zip(rows[:known], truth[:known], strict=True)])
        mean, deviation = speed.predict(rows[40:])
        found = np.abs(mean - truth[40:])
        assert np.mean(found <= 2.5 * deviation) > 0.8
        return found

    assert errors(40).mean() < 0.1 < errors(0).mean()


def test_what_each_stage_holds_tells_networks_apart():
    """Two networks that agree in all else: a measurement of the one says less of the other."""
    arch = get_arch("sepvit_lite")
    row, macs = coordinates(arch), [each.macs for each in stage_counts(arch)]
    assert row[8:12] == pytest.approx(np.array(macs) / sum(macs))
    assert row[12:16] == pytest.approx(0.5 * np.log([1 + stage.depth for stage in arch.summary()]))
    assert coordinates(get_arch("levit_128s"))[[11, 15]].tolist() == [0.0, 0.0], "it has three stages"
    moved = row.copy()
    moved[[9, 10, 13, 14]] = row[[10, 9, 14, 13]]
    speed = Speed((coordinates(get_arch("efficientvit_m0")), 1.0), [(row, 5.0)])
    (known, like), (sure, less_sure) = speed.predict(np.array([row, moved]))
    assert like < known
    assert less_sure > sure + 0.01


def levels_of(family: str) -> dict[str, int]:
    return FAMILIES[family].space.encode(next(iter(FAMILIES[family].variants.values())).values)


def test_a_tier_that_trains_judges_by_its_surrogate(tmp_path):
    """The most promising network is the one that its trainings say is best, not the largest."""
    options = request(3.0, families=("levit",))
    seen = Seen(options, get_arch("efficientvit_m0"), REFERENCE_MS)
    asked: list[float] = []

    def predict(features: np.ndarray, key: str = "") -> SimpleNamespace:
        asked.append(features[0])
        return SimpleNamespace(value=50.0 - 5 * float(features[0]), error=0.5)  # the smaller, the better

    surrogate = SimpleNamespace(trained=[SimpleNamespace(key="", features=np.array([20.0]))] * 3, predict=predict)
    judge = ByTraining(SimpleNamespace(surrogate=lambda: surrogate), BySize(PriorTier(recipes=False)))
    chosen = Finder(options, seen, judge).propose()
    assert asked
    large = Finder(options, seen, BySize(PriorTier())).propose()
    assert chosen.coordinates[3] < large.coordinates[3] - 0.2


@pytest.mark.parametrize(
    ("limits", "most_mb"), [(Limits(file_mb=12.0), 12.0), (Limits(memory_mb=46.0), 12.0)], ids=["size", "memory"]
)
def test_a_search_stays_within_its_limits(tmp_path: Path, limits: Limits, most_mb: float) -> None:
    """At 100 ms everything is fast enough."""
    worker = Worker(request(100.0, families=("levit", "shvit"), limits=limits), tmp_path)
    sizes = [file_mb(point.arch) for point in worker.run(16)]
    fitting = [size for size in sizes if size <= most_mb]
    assert len(fitting) >= 10
    assert max(fitting) > 0.8 * most_mb, "it is used"


def test_limits_that_no_family_can_meet_end_the_search(tmp_path: Path) -> None:
    worker = Worker(request(100.0, families=("levit", "shvit"), limits=Limits(file_mb=0.01)), tmp_path)
    assert len(worker.run(16)) <= 4
    assert worker.left == ("the smallest shape of every family was measured, far over 100 ms, a file of 0.01 MB")
