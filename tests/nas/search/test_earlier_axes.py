"""A study that was begun before a family's axes changed goes on along those that it was begun with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nas.errors import UserError
from nas.measure.runtime import Settings
from nas.search.dashboard import Searched, values_of
from nas.search.loop import open_run
from nas.search.request import SearchRequest, storage_of
from nas.study.samplers import make_sampler
from nas.study.trials import open_study
from search_spaces.registry import FAMILIES, use_spaces, with_earlier_space
from search_spaces.space import fingerprint


@pytest.fixture(autouse=True)
def today(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("nas.measure.hardware.fingerprint", lambda settings: {"cpu": "one"})
    yield
    use_spaces(earlier=False)


def requested(out: Path, *families: str) -> SearchRequest:
    settings = Settings("onnxruntime", "cpu", 1)
    return SearchRequest(2.0, settings, families, 40, None, "s", out, None, "random", None, 1000)


def test_the_earlier_axes_are_those_of_then() -> None:
    """The digests are what the code gave before EViT could merge tokens."""
    use_spaces(earlier=True)
    assert fingerprint({"evit": FAMILIES["evit"].space}) == "e6de4adbc287"
    assert fingerprint({name: family.space for name, family in FAMILIES.items()}) == "64b4b8736ab0"
    use_spaces(earlier=False)
    assert FAMILIES["evit"].space.options["form"] == ("merged", "fused", "dropped")


def test_a_study_of_then_goes_on_as_it_was(tmp_path: Path) -> None:
    request = requested(tmp_path, "evit", "shvit")
    request.folder.mkdir(parents=True)
    use_spaces(earlier=True)
    begun = request.identity()
    open_study("s", storage_of(request), begun, make_sampler("random", None))
    use_spaces(earlier=False)
    assert request.identity() != begun
    open_run(request, None)
    assert with_earlier_space() == ["evit"]
    assert FAMILIES["evit"].space.options["form"] == ("fused", "dropped")
    with pytest.raises(UserError, match="budget_ms"):
        open_run(replace(request, budget_ms=3.0), None)
    assert with_earlier_space() == []
    open_run(request, None)
    open_run(replace(request, study="another"), None)
    assert with_earlier_space() == [], "a new study has today's"


def test_other_families_have_no_earlier_axes(tmp_path: Path) -> None:
    request = requested(tmp_path, "shvit")
    open_run(request, None)
    with pytest.raises(UserError, match="budget_ms"):
        open_run(replace(request, budget_ms=3.0), None)
    assert with_earlier_space() == []


def test_the_dashboard_tells_what_levels_meant_then() -> None:
    params = {"form": 0, "width_s1": 3}
    for families, space, form in (
        (("evit",), "e6de4adbc287", "fused"),
        (tuple(FAMILIES), "64b4b8736ab0", "fused"),
        (("evit",), "", "merged"),
        ((), "", "merged"),
    ):
        searched = Searched(2.0, families=families, space=space)
        assert dict(values_of(params, "evit", searched)) == {"form": form, "width_s1": 320}
