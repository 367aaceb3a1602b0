"""A search that is given networks, one of timm's among them: from their trials to best/, the report, the dashboard."""

import csv
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import quick
import torch
from PIL import Image

from nas.data.pixels import IMAGENET
from nas.export.card import Card
from nas.measure.runtime import Settings
from nas.networks.build import create
from nas.networks.timm_network import TimmNetwork
from nas.quality.candidate import Candidate, Kind
from nas.quality.race import RaceTier
from nas.quality.ready import own_pixels
from nas.quality.tier import TrainedTier
from nas.quality.tiers import TIERS
from nas.search import loop
from nas.search.dashboard import Searched, note
from nas.search.given import GIVEN, enqueue_candidate, parameters_of
from nas.search.request import SearchRequest
from nas.search.trial import suggest
from search_spaces import get_arch

STUDY = "given"
READY = Candidate(TimmNetwork("test_byobnet", 32, 2), Kind.READY, name="timm/test_byobnet@32")
COMMAND = (
    *("search", "--latency-budget", "1000ms", "--trials", "2", "--study", STUDY, "--family", "shvit"),
    *("--quality", "train", "--resolution", "32", "--train-images", "100", "--epochs", "1", "--final-epochs", "1"),
    *("--seeds", "1", "--sampler", "random", "--seed", "1", "--threads", "1", "--no-cache", "--json"),
)


class Untaught(RaceTier):
    """A race whose ready networks begin with random weights, and which tries no learning rates."""

    def _start(self, candidate: Candidate, images: Any) -> Any:
        torch.manual_seed(0)
        return create(candidate.network)

    def recipe(self, epochs: int, candidate: Candidate | None = None) -> Any:
        return TrainedTier.recipe(self, epochs)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, exports: Path) -> tuple[Path, dict[str, Any]]:
    """The run's folder and the JSON of a search that was given a network of timm's, and made up another."""
    from nas.cli import app

    root = tmp_path_factory.mktemp("given")
    for part, count in (("train", 80), ("val", 4)):
        for label, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            folder = root / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((32, 32, 3), np.array(colour) + i, np.uint8)).save(folder / f"{i}.png")
    words = ["vitnas", *COMMAND, "--out", str(root), "--data", str(root / "images")]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        quick.few_rounds(patch)
        quick.brief_slices(patch)
        quick.blank_plots(patch)
        quick.small_shvit(patch)
        quick.exports_here(patch, exports)
        patch.setattr(loop, "begun_by_an_older", lambda study: True)
        patch.setattr(loop, "enqueue_published", lambda request, study, _: enqueue_candidate(request, study, READY))
        patch.setitem(TIERS, "train", Untaught)
        patch.setattr(Untaught, "candidate_of", TrainedTier.candidate_of)
        patch.setattr("nas.search.rows.rank", lambda row: (row.kind != Kind.READY, row.trial))
        patch.setattr("nas.search.closing.rank", lambda row: (row.kind != Kind.READY, row.trial))
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            app.main()
    assert stop.value.code == 0, err.getvalue()
    return root / STUDY, json.loads(out.getvalue())


def test_a_given_network_comes_out(searched: tuple[Path, dict[str, Any]]) -> None:
    folder, found = searched
    assert (found["winner"]["label"], found["winner"]["kind"]) == (READY.name, "ready")
    assert TimmNetwork.from_json((folder / "best" / "arch.json").read_text()) == READY.network
    files = {"arch.json", "model.onnx", "model.safetensors", "model.seen.npy", "preprocess.json", "labels.txt"}
    assert {path.name for path in (folder / "best").iterdir()} == files
    card = Card.read(folder / "best")
    assert (card.classes, card.preprocess.size) == (["blue", "red"], 32)
    assert card.preprocess.pixels == own_pixels(READY.network) != IMAGENET, "as its weights want it"
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [(row["name"], row["kind"], row["family"]) for row in rows] == [
        (READY.name, "ready", "timm"),
        ("", "scratch", "shvit"),
    ]
    kinds = {READY.name: "ready", "": "scratch"}
    assert found["pareto"]
    assert all((row["kind"], row["parent"]) == (kinds[row["name"]], "") for row in found["pareto"])
    page = (folder / "report.html").read_text()
    assert "timm, ready" in page
    assert "shvit, scratch" in page


def test_what_was_found_is_compared_with_the_best_ready_network(searched: tuple[Path, dict[str, Any]]) -> None:
    """Both are trained fully and judged on the same images."""
    folder, found = searched
    assert (found["best_ready"]["name"], found["best_derived"]) == (READY.name, None)
    rows = {row["label"]: row for row in found["accuracy"]["rows"]}
    assert len(rows) == 2
    first = found["accuracy"]["rows"][0]
    keys = ("name", "kind", "resolution", "accuracy", "interval", "latency_ms")
    told = {key: found["winner"][key] for key in keys}
    assert (told["name"], told["accuracy"], told["interval"]) == (first["label"], first["mean"], first["top1_ci"])
    made = next(row["mean"] for label, row in rows.items() if label != READY.name)
    gain = found["gain_over_ready"]
    assert gain["points"] == pytest.approx(made - rows[READY.name]["mean"])
    assert gain["low"] <= gain["points"] <= gain["high"]
    assert (found["teacher"], found["teacher_gain"]) == (None, None)
    assert any(note.startswith("no teacher in the final trainings: no network was tuned") for note in found["notes"])
    assert gain["verdict"] in ("gain", "tie", "loss")
    assert f"{gain['points']:+.1f} points" in (folder / "report.html").read_text().split("<h1>")[1]


def test_the_dashboard_tells_its_kind(searched: tuple[Path, dict[str, Any]]) -> None:
    import optuna

    from nas.study.storage import open_storage

    storage = open_storage(searched[0] / "study.journal", read_only=True)
    given, made = optuna.load_study(study_name=STUDY, storage=storage).trials
    assert given.params == {}
    assert "**timm/test_byobnet@32** (timm), 32 px, ready" in note(given, Searched(1000.0))
    assert "**found** (shvit), 32 px, scratch" in note(made, Searched(1000.0))


def test_a_given_network_that_timm_does_not_know_fails_its_trial_alone() -> None:
    """A `UserError` would end the search."""
    document = READY.to_json() | {"network": {"timm": "nothing_like_it", "resolution": 32, "num_classes": 2}}
    request = SearchRequest(1.0, Settings())
    with pytest.raises(ValueError, match="timm has no network"):
        suggest(SimpleNamespace(user_attrs={GIVEN: document}), request)


def test_parameters_are_those_of_exactly_the_same_network() -> None:
    request = SearchRequest(1.0, Settings(), families=("efficientvit",), num_classes=10)
    m0 = get_arch("efficientvit_m0", 10)
    ready = Candidate(m0, Kind.READY, name="efficientvit_m0")
    assert parameters_of(request, ready)["family"] == "efficientvit"
    smaller = replace(ready, network=m0.at(96), name="efficientvit_m0@96")
    assert parameters_of(request, smaller) != parameters_of(request, ready)
    for other in (
        replace(ready, network=m0.at(80), name="efficientvit_m0@80"),
        replace(ready, network=get_arch("efficientvit_m0", 11)),
        replace(ready, network=get_arch("levit_128s", 10), name="levit_128s"),
        Candidate(m0.at(96)),
        READY,
    ):
        assert parameters_of(request, other) == {}
