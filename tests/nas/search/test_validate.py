"""What a validation of a race trains fully."""

import json
from dataclasses import replace
from types import SimpleNamespace

from records import COMPLETE

from nas.networks.counts import counts_of
from nas.quality.candidate import Kind
from nas.search.validate import raced
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
