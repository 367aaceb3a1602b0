"""Which candidates' weights a search keeps, and what is known of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from nas.networks.counts import counts_of
from nas.quality.candidate import Candidate
from nas.quality.kept import MOST, Kept, keep, path_of, read
from nas.quality.plan import TrainingPlan
from nas.quality.trained import HalvingTier
from nas.quality.trainer import CandidateTrainer
from search_spaces import get_arch


def facts(score: float = 50.0) -> Kept:
    return Kept(epochs=3, images=100, top1=60.0, judged=40, score=score)


def kept_in(folder: Path) -> set[str]:
    return {path.stem for path in folder.iterdir() if not path.name.startswith(".")}


def test_the_best_are_kept_and_the_others_removed(tmp_path):
    scores: dict[str, float] = {}
    for name, score in zip("abcdefgh", (5, 1, 8, 3, 7, 2, 6, 4), strict=True):
        scores[name] = score
        keep(tmp_path / "kept", name, nn.Linear(1, 1), facts(), scores)
        assert len(kept_in(tmp_path / "kept")) <= MOST
    assert kept_in(tmp_path / "kept") == {"a", "c", "e", "g", "h"}
    assert read(path_of(tmp_path / "kept", "c")) == facts()


def test_another_worker_s_count_as_they_ended_and_its_drafts_are_left_alone(tmp_path):
    for name, score in zip("abcde", (5, 1, 8, 3, 7), strict=True):
        keep(tmp_path, name, nn.Linear(1, 1), facts(score), {name: score})
    (tmp_path / ".z.draft.safetensors").write_bytes(b"half")
    keep(tmp_path, "mine", nn.Linear(1, 1), facts(4.0), {"mine": 4.0, "e": 0.0})
    assert kept_in(tmp_path) == {"a", "b", "c", "d", "mine"}, "e ranks lower by now"
    assert (tmp_path / ".z.draft.safetensors").is_file()


def test_a_file_that_is_gone_or_another_s_is_no_training(tmp_path):
    assert read(path_of(tmp_path, "gone")) is None
    (tmp_path / "foreign.safetensors").write_bytes(b"something")
    assert read(tmp_path / "foreign.safetensors") is None


class Stub(HalvingTier):
    """Trains nothing; a network's top-1 is a tenth of its resolution."""

    def begin(
        self,
        candidate: Candidate,
        images: Any,
        recipe: Any,
        seed: int,
        checkpoint: Path,
        weights: Any = None,
        teacher: Any = None,
    ) -> Any:
        network = nn.Linear(1, 1)
        network.arch = candidate.arch
        loader = SimpleNamespace(close=lambda: None)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(loader=loader, network=network, recipe=recipe, epoch=0, run=lambda *_: None)


@pytest.fixture
def tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    plan = TrainingPlan("images", images=100, epochs=9, final_epochs=2, seeds=2, validate=0)
    data = SimpleNamespace(train=range(1000), classes=range(10))
    trainer = CandidateTrainer(data, plan, 0, "cpu", tmp_path / "training", list, lambda *_: None)
    monkeypatch.setattr(CandidateTrainer, "split", lambda self, resolution: ("train", "judge"))
    monkeypatch.setattr(
        CandidateTrainer, "judge", lambda self, network, images: SimpleNamespace(top1=network.arch.resolution / 10)
    )
    monkeypatch.setattr("pruning.transfer.transfer", lambda *_: {})
    return Stub(trainer)


def test_a_candidate_is_kept_with_what_it_was_trained_and_judged_on(tier):
    arch = get_arch("shvit_s1").at(96)
    estimate = tier.estimate(Candidate(arch), counts_of(arch))
    found = read(path_of(tier.trainer.kept, arch.digest()))
    assert found == Kept(epochs=9, images=100, top1=9.6, judged=200, score=estimate.score)


def test_a_network_of_the_validation_takes_no_candidate_s_place(tier):
    arch = get_arch("shvit_s1").at(96)
    tier.complete(Candidate(arch), counts_of(arch), keeps=False)
    assert not tier.trainer.kept.exists()


def test_a_training_that_ends_at_a_lower_resolution_is_not_kept(tier, monkeypatch):
    """Its weights are another network's."""
    monkeypatch.setattr("nas.quality.trained.in_better_third", lambda *_: False)
    arch = get_arch("shvit_s1").at(128)
    estimate = tier.estimate(Candidate(arch), counts_of(arch))
    assert estimate.training.to_json()["rungs"] == {"1": 6.4}
    assert not tier.trainer.kept.exists()
