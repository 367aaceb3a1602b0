"""Candidates of a search: what they are told apart by, and as JSON."""

import json

import pytest

from nas.networks.timm_network import TimmNetwork
from nas.quality.candidate import Candidate, Kind
from search_spaces import get_arch

M0 = get_arch("efficientvit_m0")


def test_a_candidate_is_read_as_it_was_written():
    for each in (
        Candidate(M0, name="efficientvit_m0"),
        Candidate(M0, Kind.DERIVED, "efficientvit_m1"),
        Candidate(TimmNetwork("test_vit", 160, 3), Kind.READY, name="timm/test_vit"),
    ):
        assert Candidate.from_json(json.loads(json.dumps(each.to_json()))) == each


def test_key_tells_parents_apart():
    scratch = Candidate(M0)
    first, second = (Candidate(M0, Kind.DERIVED, parent) for parent in ("efficientvit_m1", "efficientvit_m2"))
    assert scratch.key == Candidate(M0, Kind.READY, name="efficientvit_m0").key == M0.digest()
    assert len({scratch.key, first.key, second.key}) == 3


def test_a_timm_network_has_no_arch():
    assert Candidate(M0).arch is M0
    with pytest.raises(TypeError, match="timm/test_vit has no Arch"):
        _ = Candidate(TimmNetwork("test_vit", 160, 3)).arch


@pytest.mark.parametrize(("kind", "parent"), [(Kind.DERIVED, ""), (Kind.READY, "efficientvit_m1")])
def test_derived_ones_alone_have_a_parent(kind, parent):
    with pytest.raises(ValueError, match="parent"):
        Candidate(M0, kind, parent)


@pytest.mark.parametrize("kept", [None, {}, {"network": {}, "kind": "other", "parent": "", "name": ""}])
def test_something_else_is_refused(kept):
    with pytest.raises(ValueError, match="validation error"):
        Candidate.from_json(kept)
