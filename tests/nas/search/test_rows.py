"""Which trials win, enter the closing run, and form the front."""

import json
from dataclasses import replace

from records import COMPLETE

from nas.intervals import of_error
from nas.measure.budget import Verdict
from nas.quality.tier import Estimate
from nas.search.log import keep_samples
from nas.search.rows import ClosingRow, Trial, best_of, choose, finalists_of, front_of, rank
from nas.search.words import interval_words, score_words, ties_of


def row(
    trial: int, quality: float, latency: float, params: float = 1.0, family: str = "levit", name: str = ""
) -> Trial:
    return replace(
        COMPLETE,
        trial=trial,
        quality=quality,
        latency_ms=latency,
        params_m=params,
        family=family,
        name=name,
        feasible=latency <= 2,
        verdict=Verdict.FITS if latency <= 2 else Verdict.OVER,
        arch={"trial": trial},
        quality_estimate=quality + 1,
        quality_ci=(quality - 1, quality + 3),
    )


def closing(row: Trial, role: str) -> ClosingRow:
    return replace(ClosingRow.of(row, latency_ms=row.latency_ms, verdict=row.verdict), role=role)


def test_equal_quality_goes_by_parameters_then_by_latency():
    assert best_of([row(0, 70, 1.0), row(1, 70, 1.5, params=2)]).trial == 1
    assert best_of([row(0, 70, 1.5), row(1, 70, 1.0)]).trial == 1
    assert best_of([]) is None


def test_poor_estimates_still_rank_by_what_they_say():
    """Until three networks are trained every estimate is 15 points unsure."""
    rows = []
    for trial, (value, error) in enumerate([(2, 3), (10, 15), (1, 3), (14, 15)]):
        score = Estimate.within(value, error, of_error(value, error)).score
        rows.append(replace(row(trial, score, 1.0, params=4 - trial), quality_ci=(0.0, 30.0)))
    assert [each.trial for each in sorted(rows, key=rank)] == [3, 1, 0, 2]
    assert len({each.quality for each in rows}) == 4
    assert {score_words(each)[:4] for each in rows} == {"4.5 ", "2.1 ", "0.4 ", "0.1 "}, "none is told below 0"


def test_one_that_surely_fits_goes_before_a_better_one_that_may():
    sure, unsure, over = row(0, 60, 1.0), replace(row(1, 70, 1.95), verdict=Verdict.UNSURE), row(2, 80, 2.5)
    assert choose([over, unsure, sure]) is sure
    assert choose([over, unsure]) is unsure
    assert choose([over]) is None


def test_what_was_measured_briefly_has_no_interval():
    assert interval_words((1.234, 2.0)) == "95% 1.23 to 2.00 ms"
    assert interval_words(None) == "measured briefly"


def test_front_has_no_dominated_and_no_infeasible_row():
    rows = [row(0, 60, 1.0), row(1, 59, 1.1), row(2, 65, 1.5), row(3, 80, 2.5), row(4, 65, 1.6)]
    assert [r.trial for r in front_of(rows)] == [0, 2]


def test_finalists_keep_a_margin_below_the_budget():
    """Should the machine be slower at the end, networks well within the budget are among the finalists."""
    rows = [row(i, 70 - i, 1.99) for i in range(5)] + [row(9, 50, 1.3), row(10, 40, 0.5, name="published")]
    chosen = {r.trial for r in finalists_of(rows, 2.0)}
    assert {0, 1, 2, 9, 10} <= chosen
    assert 4 not in chosen


def test_overlapping_estimates_are_called_a_tie():
    first, near, far = row(0, 70, 1.0), row(1, 69, 1.0, family="shvit"), row(2, 60, 1.0, family="evit")
    same_family, over = row(3, 69, 0.5), row(4, 70, 3.0)
    first, near, far = (closing(first, "winner"), *(closing(each, "family winner") for each in (near, far)))
    same_family, over = closing(same_family, ""), closing(over, "")
    (line,) = ties_of([first, near, far, same_family, over])
    assert "A tie with trial 0" in line
    assert "trial 3 (levit, 0.50 ms), trial 1 (shvit, 1.00 ms);" in line
    assert line.endswith("; the best score, then the most parameters, made the choice")
    (line,) = ties_of([replace(first, selects=False), near])
    assert line.endswith("; the most parameters, made the choice")
    assert ties_of([first, far, over]) == []


def test_a_torn_last_sample_spoils_no_other(tmp_path):
    keep_samples(tmp_path, {"trial": 0})
    path = tmp_path / "samples.jsonl"
    path.write_text(path.read_text() + '{"trial": 1, "rounds')
    keep_samples(tmp_path, {"trial": 2})
    lines = path.read_text().splitlines()
    assert [json.loads(lines[0])["trial"], json.loads(lines[2])["trial"]] == [0, 2]
