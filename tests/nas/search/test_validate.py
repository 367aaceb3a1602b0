"""What a validation of a race trains fully."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.samplers import RandomSampler
from records import COMPLETE

from nas.networks.counts import counts_of
from nas.quality.candidate import Kind
from nas.search import validate as layer
from nas.search.validate import RESULT, RUN, ValidatedNetwork, raced, validate
from nas.study import storage as study_storage
from nas.study.trials import open_study
from search_spaces import get_arch


def test_a_race_is_validated_by_its_ready_networks_and_by_new_ones_cut_from_its_parents() -> None:
    arch = json.loads(get_arch("efficientvit_m0").replace(num_classes=5).at(64).to_json())

    def row(number: int, kind: Kind, quality: float, fits: bool = True):
        parent = "efficientvit_m1" if kind == Kind.DERIVED else ""
        name = f"efficientvit_m0@{number}" if kind == Kind.READY else ""
        found = replace(COMPLETE, trial=number, kind=kind, parent=parent, name=name, quality=quality, feasible=fits)
        return replace(found, resolution=64, arch=arch, key=str(number))

    rows = [row(1, Kind.READY, 40), row(2, Kind.READY, 50), row(3, Kind.READY, 60, fits=False), row(4, Kind.READY, 45)]
    rows += [row(5, Kind.READY, 30), row(6, Kind.DERIVED, 55)]
    request = SimpleNamespace(plan=SimpleNamespace(validate=6), seed=0, num_classes=5)
    ready, made = [], []
    for candidate in raced(request, rows, 5.0, 9.0):
        (ready if candidate.kind == Kind.READY else made).append(candidate)
    assert [each.name for each in ready] == ["efficientvit_m0@2", "efficientvit_m0@4", "efficientvit_m0@1"]
    assert len(made) > 6
    assert {(each.kind, each.parent, each.network.resolution) for each in made} == {
        (Kind.DERIVED, "efficientvit_m1", 64)
    }
    assert all(5 <= counts_of(each.network).macs / 1e6 <= 9 for each in made)
    assert list(raced(request, rows[:2], 5.0, 9.0))[2:] == [], "no parent was tuned"


NO_TASKS = SimpleNamespace()
"""All is trained."""


def test_a_validation_is_of_every_machine_s_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine trains one more while this one concludes: whichever stores last has read it."""
    ours, others = (open_study("s", tmp_path / "j", {}, RandomSampler()) for _ in range(2))
    for n in range(7):
        row = ValidatedNetwork("shvit", n, n, 2, n, n, n, {"1": n}, n)
        ours.set_user_attr(RUN + str(n), row.to_json())
    request = SimpleNamespace(plan=SimpleNamespace(validate=7, full_epochs=2), seed=0, num_classes=5)
    tier = SimpleNamespace(name="train", candidate_of=lambda _: None)
    monkeypatch.setattr(layer, "draw", lambda *_: iter([None]))
    rows = [replace(COMPLETE, macs_m=float(n), feasible=True) for n in (5, 9)]
    taus, exclusive, waits = layer.taus, study_storage.exclusive, threading.Event()

    def watched(storage):
        if threading.current_thread() is other:
            waits.set()
        return exclusive(storage)

    def conclude() -> None:
        others.set_user_attr(RUN + "8", ValidatedNetwork("shvit", 8, 8, 2, 8, 8, 8, {"1": 8}, 8).to_json())
        assert validate(request, others, tier, rows, pytest.fail, NO_TASKS)

    other = threading.Thread(target=conclude)

    def meanwhile(*given):
        monkeypatch.setattr(layer, "taus", taus)
        other.start()
        while other.is_alive() and not waits.wait(0.01):
            pass
        return taus(*given)

    monkeypatch.setattr(layer, "taus", meanwhile)
    monkeypatch.setattr(study_storage, "exclusive", watched)
    assert validate(request, ours, tier, rows, pytest.fail, NO_TASKS).networks == 7
    other.join()
    assert open_study("s", tmp_path / "j", {}, RandomSampler()).user_attrs[RESULT]["networks"] == 8
