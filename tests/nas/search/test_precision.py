"""Which precision a trial keeps, and how fast networks may be in those that are not measured."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nas.errors import UserError
from nas.evaluate.onnx_file import OnnxFile
from nas.evaluate.precision import Price
from nas.export.card import Card
from nas.export.options import PLAIN, FileOptions
from nas.export.quantize import Recipe
from nas.intervals import Interval
from nas.measure.budget import Limits
from nas.measure.remote import LinkLost
from nas.measure.runtime import Settings
from nas.measure.samples import PRECISION, MeasureError
from nas.quality.candidate import Candidate
from nas.quality.tier import Estimate
from nas.search import precision
from nas.search.best import BestFolder
from nas.search.latency import TrialLatency
from nas.search.lower import LowerFiles
from nas.search.precision import HOPELESS, RATIOS, Faster, expected_drop, first_that_fits, ladder, less
from nas.search.request import SearchRequest

ALL = ("fp32", "bf16", "int8")
LATENCY = TrialLatency(1.0, 1.0, 1.0, 1.0, 100, 20, 1.0, 0.0, 1.0, "measured", file_mb=4.0)


def tried(measured: dict[str, Any], faster: Faster | None = None, **fields: Any) -> tuple[TrialLatency, list[str]]:
    """What a trial keeps at a budget of 1 ms of latencies, or errors, by precision; and what it measured and noted."""
    request = SearchRequest(budget_ms=1.0, lower=ALL[1:], **fields)
    told: list[str] = []

    def measure(name: str, within: float) -> TrialLatency:
        exactly = within == PRECISION
        told.append(f"{name}, exactly" if exactly else name)
        found = measured.get(told[-1], measured[name])
        if isinstance(found, Exception):
            raise found
        ms, size = found if isinstance(found, tuple) else (found, 4.0)
        ends = {"latency_ci_low_ms": ms, "latency_ci_high_ms": ms}
        if isinstance(ms, list):
            low, ms, high = ms if len(ms) == 3 else (None, *ms, None)
            ends = {"latency_ci_low_ms": low, "latency_ci_high_ms": high}
        return replace(LATENCY, latency_ms=ms, file_mb=size, precision=name, **ends)

    return first_that_fits(request, faster or Faster(ALL), "shvit", measure, told.append), told


def test_the_first_precision_that_meets_the_budget_is_kept() -> None:
    found, told = tried({"fp32": 1.5, "bf16": 0.9, "int8": 0.5})
    assert (found.precision, found.latency_ms, told) == ("bf16", 0.9, ["fp32", "bf16"])
    assert found.by_precision == {"fp32": 1.5, "bf16": 0.9}
    assert tried({"fp32": 1.0})[1] == ["fp32"]


def test_a_precision_that_only_may_meet_the_budget_is_not_enough() -> None:
    """In a later run it may be over."""
    found, told = tried({"fp32": [0.9, 0.98, 1.1], "bf16": 0.7, "int8": 0.5})
    assert (found.precision, told) == ("bf16", ["fp32", "fp32, exactly", "bf16"])
    assert found.by_precision == {"fp32": 0.98, "bf16": 0.7}


def test_a_median_within_the_budget_is_measured_more_exactly_before_a_lower_precision_is_tried() -> None:
    found, told = tried({"fp32": [0.9, 0.96, 1.02], "fp32, exactly": [0.95, 0.97, 0.99], "bf16": 0.7})
    assert (found.precision, found.latency_ms, told) == ("fp32", 0.97, ["fp32", "fp32, exactly"])
    assert tried({"fp32": [0.9, 1.01, 1.1], "bf16": 0.7})[1] == ["fp32", "bf16"], "over it, most likely"


def test_what_is_known_exactly_is_not_measured_again() -> None:
    assert tried({"fp32": [0.98, 0.99, 1.001], "bf16": 0.7})[1] == ["fp32", "bf16"]


def test_where_the_more_exact_measurement_fails_the_first_one_counts() -> None:
    measured = {"fp32": [0.9, 0.98, 1.1], "fp32, exactly": MeasureError("killed"), "bf16": 1.2, "int8": 1.2}
    found, told = tried(measured)
    assert (found.precision, found.latency_ms) == ("fp32", 0.98)
    assert told[2] == "not measured more exactly in fp32: MeasureError: killed"
    with pytest.raises(LinkLost):
        tried(measured | {"fp32, exactly": LinkLost("gone")})


def test_where_none_surely_meets_it_the_first_that_may_is_kept() -> None:
    """A half percent of a latency decides nothing."""
    assert tried({"fp32": [0.9, 0.98, 1.1], "bf16": 1.2, "int8": [0.9, 0.96, 1.1]})[0].precision == "fp32"
    assert tried({"fp32": [0.9, 1.01, 1.1], "bf16": [0.9, 0.99, 1.1], "int8": 1.2})[0].precision == "bf16", "its median"
    assert tried({"fp32": [0.9, 1.05, 1.1], "bf16": 1.04, "int8": [0.9, 1.01, 1.1]})[0].precision == "fp32"
    held = {"fp32": ([0.9, 0.98, 1.1], 4.0), "bf16": ([0.9, 1.02, 1.1], 4.0), "int8": ([0.9, 1.03, 1.1], 1.0)}
    assert tried(held, limits=Limits(file_mb=2.0))[0].precision == "int8"


def test_a_network_measured_briefly_surely_fits_only_where_it_is_far_below() -> None:
    assert tried({"fp32": [0.6], "bf16": 0.5})[1] == ["fp32"]
    assert tried({"fp32": [0.8], "bf16": 0.5})[1] == ["fp32", "fp32, exactly", "bf16"]
    assert tried({"fp32": [1.45], "bf16": 1.3, "int8": 1.02})[0].precision == "int8", "the nearest"


def test_where_none_meets_it_the_nearest_is_kept() -> None:
    found, told = tried({"fp32": 2.0, "bf16": 1.2, "int8": 1.6})
    assert (found.precision, told) == ("bf16", [*ALL])
    assert TrialLatency.read(found.to_json()) == found


def test_limits_beside_the_latency_count() -> None:
    measured = {"fp32": (0.8, 4.0), "bf16": (0.5, 4.0), "int8": (0.9, 1.0)}
    found, told = tried(measured, limits=Limits(file_mb=2.0))
    assert (found.precision, told) == ("int8", [*ALL])


def test_what_hardly_fits_is_not_measured() -> None:
    least = HOPELESS * RATIOS["int8"][0]
    assert tried({"fp32": 1.01 / least})[1] == ["fp32"]
    learnt = Faster(ALL, [("shvit", {"fp32": 1.0, "bf16": 0.9, "int8": 0.2})] * 3)
    assert tried({"fp32": 1.01 / least, "int8": 0.6}, learnt)[1] == ["fp32", "int8"]


def test_a_precision_that_fails_is_told_and_the_first_one_s_failure_raised() -> None:
    found, told = tried({"fp32": 1.5, "bf16": MeasureError("no such kernel"), "int8": 0.7})
    assert (found.precision, told[2]) == ("int8", "not measured in bf16: MeasureError: no such kernel")
    with pytest.raises(MeasureError):
        tried({"fp32": MeasureError("broken")})
    with pytest.raises(LinkLost):
        tried({"fp32": 1.5, "bf16": LinkLost("gone")})


def test_one_precision_is_measured_as_ever() -> None:
    request = SearchRequest(budget_ms=1.0, settings=Settings(precision="int8"))
    assert request.precisions == ("int8",)
    found = first_that_fits(request, Faster(("int8",)), "shvit", lambda *_: LATENCY, print)
    assert found is LATENCY
    assert expected_drop("int8", found.by_precision) == 0


def test_ratios_are_learnt_from_what_was_measured() -> None:
    empty = Faster(ALL)
    assert (empty.likely("int8", "shvit"), empty.least("int8")) == (RATIOS["int8"][1], RATIOS["int8"][0])
    assert empty.fastest_ms("shvit", {"fp32": 2.0}) == 2.0 * RATIOS["bf16"][1]
    assert empty.leeway == RATIOS["bf16"][1] / RATIOS["bf16"][0]
    seen = [("shvit", {"fp32": 2.0, "int8": 1.0}), ("levit", {"fp32": 2.0, "int8": 1.8}), ("levit", {"fp32": 1.0})]
    faster = Faster(("fp32", "int8"), seen)
    assert [faster.likely("int8", name) for name in ("shvit", "levit", "evit")] == [0.5, 0.9, pytest.approx(0.7)]
    assert faster.least("int8") == RATIOS["int8"][0], "two tell too little"
    assert Faster(("fp32", "int8"), [*seen, ("evit", {"fp32": 1.0, "int8": 0.6})]).least("int8") == 0.4
    assert faster.fastest_ms("shvit", {"fp32": 3.0}) == 1.5
    assert faster.fastest_ms("shvit", {"fp32": 3.0, "int8": 3.2}) == 3.0
    assert (Faster(("fp32",)).ratio(), Faster(("fp32",)).leeway) == (1.0, 1.0)
    assert [faster.ratio(name) for name in ("shvit", "levit", "")] == [0.5, 0.9, pytest.approx(0.7)]
    assert Faster(("fp32", "int8"), [("evit", {"fp32": 1.0, "int8": 1.3})]).ratio() == 1.0, "never slower"


def test_an_estimate_is_lowered_by_what_is_expected() -> None:
    assert expected_drop("int8", {"fp32": 1.0}) > expected_drop("bf16", {"fp32": 1.0}) > 0
    assert expected_drop("fp32", {"fp32": 1.0}) == 0
    found = less(Estimate(50.0, Interval(0.1, 60.0), 48.0), 0.5)
    assert (found.value, found.interval, found.score) == (49.5, Interval(0.0, 59.5), 47.5)


def test_the_ladder_has_what_this_machine_can(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {"bf16"}

    def check(settings: Settings) -> None:
        if settings.precision in lacking:
            raise UserError("no bf16 here")

    monkeypatch.setattr(precision, "check_settings", check)
    assert ladder(Settings("openvino")) == ("fp32", "int8")
    lacking.clear()
    assert ladder(Settings("openvino")) == ALL
    assert ladder(Settings("onnxruntime", "cuda")) == ("fp32", "tf32", "fp16")
    assert ladder(Settings("torch", "ssh://me@there/cuda"))[:1] == ("fp32",)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(kept=("first",))])
@pytest.mark.parametrize("file", [PLAIN, FileOptions(None, in_graph=True)])
def test_what_is_shipped_and_timed(
    recipe: Recipe, file: FileOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helpers: Any
) -> None:
    """Of a recipe that trials have not timed it is a file that takes what theirs do."""
    written: list[Any] = []

    def write_lower(network: Any, weights: Path, path: Path, *rest: Any) -> Price:
        written.append(rest[-1])
        path.write_bytes(b"shipped")
        return Price(recipe, "onnxruntime", 200, 50.0, 50.0, 0.0, (-1.0, 1.0), 1.0)

    def write_measured(network: Any, weights: Path, path: Path, data: Any, settings: Settings, recipe: Recipe) -> None:
        written.append((settings.precision, recipe))
        path.write_bytes(b"measured")

    monkeypatch.setattr("nas.search.lower.weights_of", lambda *_: tmp_path / "weights")
    monkeypatch.setattr("nas.evaluate.precision.write_lower", write_lower)
    monkeypatch.setattr("nas.evaluate.precision.write_measured", write_measured)
    request = SearchRequest(budget_ms=1.0, out=tmp_path, study="s", file=file)
    tier: Any = SimpleNamespace(trainer=None, data=lambda _: SimpleNamespace(val=None))
    request.folder.mkdir()
    made = LowerFiles(request, tier).of(Candidate(helpers.random_arch("shvit", 0)), "int8")
    assert made is not None
    anew = [("int8", recipe)] if recipe.kept and file != PLAIN else []
    assert (made.content, made.measured, written) == (b"shipped", b"measured" if anew else None, [file, *anew])


@pytest.mark.parametrize("lower", ["fp16", "int8"])
@pytest.mark.parametrize("file", [PLAIN, FileOptions(None, True, 18, True)])
def test_the_file_of_an_untrained_search_is_as_asked_for(
    lower: str, file: FileOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helpers: Any
) -> None:
    """In the precision that was measured; its latency is told where it is that file's."""
    request = SearchRequest(budget_ms=1.0, settings=Settings(precision=lower), out=tmp_path, study="s", file=file)
    log: Any = SimpleNamespace(calibration=None, hardware={})

    def step(_: str) -> AbstractContextManager[None]:
        return nullcontext()

    row: Any = SimpleNamespace(precision=None, latency_ci=(0.9, 1.1), latency_ms=1.0)
    candidate = Candidate(helpers.random_arch("shvit", 0, num_classes=2, resolution=32))
    monkeypatch.setattr("nas.search.best.candidate_of", lambda _: candidate)
    (tmp_path / "s").mkdir()
    best = BestFolder(request, log, None, step)
    assert best.write(row) is None
    for name, precision_of in (("model", "fp32"), (f"model.{lower}", lower)):
        found = OnnxFile.open(best.folder / f"{name}.onnx")
        assert (found.batch_size, found.in_graph, found.probabilities, found.precision) == (
            file.batch_size,
            file.in_graph,
            file.probabilities,
            precision_of,
        )
    card = Card.read(best.folder / f"model.{lower}.onnx")
    assert (card.latency is None, card.accuracy) == (file != PLAIN, None)
