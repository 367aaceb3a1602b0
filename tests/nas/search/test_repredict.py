"""A study that an older size prior has scored is ranked on one scale."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from records import COMPLETE

from nas.measure.budget import Verdict
from nas.networks.counts import counts_of
from nas.quality.candidate import Candidate
from nas.quality.prior import PriorTier
from nas.search import finish
from nas.search.log import SearchLog
from nas.search.repredict import repredict
from nas.search.request import SearchRequest
from nas.search.rows import best_of
from search_spaces import get_arch


@pytest.fixture(scope="module")
def tier():
    return PriorTier()


def now(tier, name):
    arch = get_arch(name)
    return tier.estimate(Candidate(arch), counts_of(arch))


def row(trial, name, score):
    document = json.loads(get_arch(name).to_json())
    return replace(COMPLETE, trial=trial, quality=score, quality_estimate=score, arch=document, verdict=Verdict.FITS)


def test_scores_of_an_older_prior_are_predicted_again(tier):
    said = now(tier, "levit_192").score
    rows = [
        row(0, "levit_128s", 90.0),
        row(1, "levit_192", said),
        replace(COMPLETE, trial=2, state="failed", quality=None, arch=None),
    ]
    assert best_of(rows[:2]).trial == 0
    found, line = repredict(tier, rows)
    told = now(tier, "levit_128s")
    assert (found[0].quality, found[0].quality_estimate) == (told.score, told.value)
    assert found[0].quality_ci == (told.interval.low, told.interval.high)
    assert found[1:] == rows[1:]
    assert best_of(found[:2]).trial == 1
    assert line.startswith("an earlier prior scored 1 of the 3 trials")
    assert repredict(tier, found) == (found, "")


def test_the_end_of_a_search_ranks_by_what_the_prior_says_now(tier, tmp_path, monkeypatch):
    log = SearchLog("2026-11-30T12:00:00+00:00", tier=tier)
    monkeypatch.setattr(finish, "rows_of", lambda study: [row(0, "levit_128s", 90.0), row(1, "levit_192", 70.0)])
    monkeypatch.setattr(finish._Finish, "_measure", lambda self: None)
    monkeypatch.setattr(finish._Finish, "_write", lambda self: self)
    study = SimpleNamespace(user_attrs={})
    request = SearchRequest(50.0, out=tmp_path, study="s")
    request.folder.mkdir()
    ended = finish.finish_run(request, study, log, "vitnas search")
    assert [each.quality for each in ended.rows] == [now(tier, name).score for name in ("levit_128s", "levit_192")]
    assert "earlier prior" in ended.notes[0]
    assert ended.winner.trial == 1
