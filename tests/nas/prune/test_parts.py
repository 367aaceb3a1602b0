"""What `nas.prune` decides, without pruning anything: verdicts, the control, what is said beforehand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import nas.prune
import nas.prune.run
import nas.prune.steps
from nas.errors import UserError
from nas.export import side_by_side
from nas.intervals import of_share
from nas.measure.budget import Verdict
from nas.measure.runtime import Settings
from nas.measure.samples import Measurement
from nas.prune.images import PruneJob
from nas.prune.records import Accuracy, NetworkRow
from nas.prune.request import PruneRequest, parse_pruning_budget, show
from nas.prune.source import trained_on
from nas.prune.steps import (
    closing_run,
    latency_verdict,
    make_ready,
    tune,
    tune_control,
    waiting_line,
    worse_after_tuning,
)
from nas.prune.words import passes

SETTINGS = Settings("torch", "cpu", 1, 1)


def timed(*rounds: float) -> Measurement:
    return Measurement(rounds_ms=[[ms] for ms in rounds])


def test_a_share_is_judged_by_the_paired_ratio() -> None:
    """The machine's drift, half as fast at the end, is in both latencies and not in their ratio."""
    drift = [1.0 + i / 10 for i in range(10)]
    results = {"before": timed(*(2 * d for d in drift)), "after": timed(*(1.1 * d for d in drift))}
    assert latency_verdict(parse_pruning_budget(None, None, "0.56x"), results)[0] == Verdict.FITS
    assert latency_verdict(parse_pruning_budget(None, None, "0.54x"), results)[0] == Verdict.OVER
    assert latency_verdict(parse_pruning_budget(None, None, "1.6ms"), results)[0] == Verdict.UNSURE
    assert latency_verdict(parse_pruning_budget("0.5x", None, None), results) == (None, None)


@pytest.mark.parametrize("content", ["{", "[]", '{"before": {}}'])
def test_a_damaged_result_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "prune.json").write_text(content)
    with pytest.raises(UserError, match=r"prune\.json is damaged: give another --out"):
        PruneJob(tmp_path, {}, print, print, "cpu").read()


def test_waiting_times_judge_no_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network whose CPUs others use, most samples wait for a turn; no longer run is made of them."""
    quiet, waits = timed(*[1.6] * 30), timed(*[1.6, *[14.9] * 29])
    budget = parse_pruning_budget(None, None, "14.9ms")
    assert waiting_line({"before": quiet, "after": quiet}, SETTINGS) is None
    assert "waiting times, not speed" in waiting_line({"before": quiet, "after": waits}, SETTINGS)
    assert latency_verdict(budget, {"before": quiet, "after": waits}) == (None, None)
    assert [NetworkRow.of(1, 1, found, SETTINGS).waiting for found in (quiet, waits)] == [False, True]


@pytest.mark.parametrize(("noisy", "made", "verdict"), [(0, 1, "fits"), (1, 2, "fits"), (9, 4, "unsure")])
def test_an_unsure_closing_run_is_made_longer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, noisy: int, made: int, verdict: str
) -> None:
    """Up to 120 rounds, and no further than needed; only for a latency budget."""
    runs: list[int] = []

    def compare(paths, settings, rounds, *_):
        runs.append(rounds)
        after = [0.9, 1.1] * (rounds // 2) if len(runs) <= noisy else [0.9] * rounds
        return {"before": timed(*[2.0] * rounds), "after": timed(*after)}

    monkeypatch.setattr(side_by_side, "compare", compare)
    budget = parse_pruning_budget(None, None, "1ms")
    asked = replace(options(), folder=tmp_path, budget=budget)
    results = closing_run({"before": 0, "after": 1}, lambda network, stem: stem, asked)
    assert len(runs) == made
    assert len(results["after"].rounds_ms) == 30 * made
    assert latency_verdict(budget, results)[0] == verdict
    runs.clear()
    asked = replace(asked, budget=parse_pruning_budget("0.5x", None, None))
    closing_run({"before": 0, "after": 1}, lambda network, stem: stem, asked)
    assert len(runs) == 1


class FakeJob:
    """Notes what it is asked to train, probe and judge."""

    def __init__(self, kept: Path = Path(), **found: object) -> None:
        self.kept = kept
        self.state = SimpleNamespace(found=dict(found))
        self.data = SimpleNamespace(train=range(12), name="flowers")
        self.calibration = range(12)
        self.notes, self.fits, self.said, self.probed = [], [], [], []
        self.note, self.say = self.notes.append, self.said.append

    def for_probe(self, model: object) -> range:
        return self.calibration

    def probe(self, model: object, images: range) -> None:
        assert images == self.calibration
        self.probed.append(model)

    def fit(self, phase, model, images, lr, batch_norm, teacher=None) -> None:
        self.fits.append((model, images, lr, batch_norm, teacher))

    def accuracy(self, model, which) -> None:
        self.state.found[which] = {"top1": 58.0}


def options(**changes: object) -> PruneRequest:
    budget = parse_pruning_budget(None, None, None)
    return PruneRequest("net", budget, SETTINGS, Path("out"), **changes)


def test_the_control_gets_the_same_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many images, at the same rate, from the unpruned network where the pruned one had it; once, and what is
    trained when it is interrupted is not trained again."""
    networks = [nn.Linear(1, 1) for _ in range(3)]
    left = iter(networks)
    job = FakeJob(tmp_path, tuned_images=36)
    with monkeypatch.context() as patch:
        patch.setattr(FakeJob, "accuracy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tune_control(job, options(distill=True), lambda: next(left))
    assert job.fits == [(networks[0], 36, nas.prune.steps.FINETUNE_LR, "frozen", networks[1])]
    tune_control(job, options(distill=True), lambda: next(left))
    assert len(job.fits) == 1
    assert torch.equal(networks[2].weight, networks[0].weight)
    assert job.state.found["control"] == {"top1": 58.0}
    tune_control(job, options(), lambda: pytest.fail("made already"))


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_no_control_is_said() -> None:
    job = FakeJob(tuned_images=36)
    tune_control(job, options(control=False), lambda: pytest.fail("not asked for"))
    assert "control" not in job.state.found
    (note,) = job.notes
    assert note.startswith("no control (--no-control)")
    job = FakeJob()
    tune_control(job, options(control=False), lambda: pytest.fail("nothing was fine-tuned"))
    assert not job.notes
    assert "control" not in options(control=False).identity()  # what is pruned does not depend on it


def test_a_tie_with_the_control_is_called_one() -> None:
    pruned = Accuracy(56.0, (48.7, 63.1), 1.0, 180)
    found = pruned.minus(Accuracy(58.1, (50.8, 65.1), 1.0, 180))
    assert found.verdict == "tie"
    assert found.difference == pytest.approx(-2.1)
    assert found.ci[0] < 0 < found.ci[1]
    assert pruned.minus(Accuracy(90.0, (85.0, 93.0), 1.0, 180)).verdict == "less accurate"
    assert pruned.minus(Accuracy(20.0, (15.0, 26.0), 1.0, 180)).verdict == "more accurate"


def test_the_control_is_compared_image_by_image() -> None:
    """10 of 200 images are told right by the control alone: apart the two would be a tie."""
    rows = {}
    for name, correct in (("pruned", 100), ("control", 110)):
        ci = of_share(correct / 2, 200)
        hits = "1" * correct + "0" * (200 - correct)
        rows[name] = Accuracy(correct / 2, (ci.low, ci.high), 1.0, 200, hits)
    assert rows["pruned"].minus(rows["control"]).verdict == "less accurate"
    assert worse_after_tuning(rows["pruned"], rows["control"])
    assert "hits" not in rows["pruned"].to_json(), "prune.json holds no answers"
    assert replace(rows["pruned"], hits="").minus(rows["control"]).verdict == "tie"


def test_the_plan_is_told_first() -> None:
    job = FakeJob()
    make_ready(job, options(finetune=2.0), "net", "training")
    assert job.said == [
        "to do: training on 4,500 images (375 passes over 12); 3 rounds of scoring 12 images and cutting; fine-tuning "
        "on 24 images (2 passes over 12); the same for the unpruned network, as a control; a closing run of 30 rounds"
    ]
    assert job.fits == [("net", 4_500, nas.prune.steps.BRIEF_LR, "train", None)]
    make_ready(job, options(finetune=0.0, rounds=1), "net", "nothing")
    assert job.said[1] == "to do: 1 round of scoring 12 images and cutting; a closing run of 30 rounds"
    make_ready(job, options(rounds=1, control=False), "net", "probe")
    assert job.said[2] == (
        "to do: a linear probe; 1 round of scoring 12 images and cutting; fine-tuning on 12 images with "
        "the unpruned network as teacher, which runs on each too; a closing run of 30 rounds"
    )
    assert (job.probed, job.state.found["probe_images"]) == (["net"], 12)
    assert len(job.fits) == 1


@pytest.mark.parametrize(
    ("distill", "first", "taught"),
    [
        (None, "nothing", True),
        (None, "probe", True),
        (None, "training", False),
        (True, "training", True),
        (False, "nothing", False),
    ],
)
def test_the_unpruned_network_teaches_unless_it_was_trained_here(
    distill: bool | None, first: nas.prune.steps.First, taught: bool
) -> None:
    job, asked = FakeJob(), options(distill=distill)
    make_ready(job, asked, "whole", first)
    tune(job, asked, "cut", "whole")
    assert job.fits[-1][-1] == ("whole" if taught else None)


def test_a_run_of_an_older_vitnas_is_tuned_as_it_was_asked_for() -> None:
    """Which kept no decision on the teacher: it was one where that was asked for."""
    for distill in (None, True):
        job = FakeJob()
        tune(job, options(distill=distill), "cut", "whole")
        assert job.fits[-1][-1] == ("whole" if distill else None)


def test_images_without_labels_have_other_defaults() -> None:
    assert (options().criterion, options().distill) == ("taylor", None)
    asked = options(unlabelled="photos")
    asked.check()
    assert (asked.criterion, asked.distill) == ("features", True)
    assert options(unlabelled="photos", criterion="magnitude").criterion == "magnitude"
    with pytest.raises(UserError, match="--unlabelled with --no-distill: only the unpruned network can teach"):
        options(unlabelled="photos", distill=False).check()


def test_images_of_a_small_folder_are_passes() -> None:
    assert passes(4_500, 12) == "4,500 images (375 passes over 12)"
    assert passes(320, 1_437) == "320 images"


@pytest.mark.parametrize("given", [("0.5", None, None), (None, ".5", None), (None, None, "0.5"), ("1", None, None)])
def test_a_share_without_its_x(given: tuple[str | None, ...]) -> None:
    text = next(filter(None, given))
    with pytest.raises(UserError, match=f"did you mean {text}x of the network's own"):
        parse_pruning_budget(*given)


def test_amounts_are_plain_numbers() -> None:
    assert [show("macs", value) for value in (1.15e9, 904e6, 1.2e4)] == ["1,150 MMACs", "904 MMACs", "0.0120 MMACs"]
    assert show("latency", 1234.5) == "1,234 ms"


def test_a_run_tells_the_images_it_was_trained_on(tmp_path: Path) -> None:
    assert trained_on(tmp_path) is None
    (tmp_path / "metrics.json").write_text(json.dumps({"options": {"data": None}}))
    assert trained_on(tmp_path) is None
    (tmp_path / "prune.json").write_text(json.dumps({"options": {"data": "images/flowers"}}))
    assert trained_on(tmp_path) == "images/flowers"
    (tmp_path / "prune.json").write_text("[")
    assert trained_on(tmp_path) is None
