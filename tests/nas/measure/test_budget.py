import pytest

from nas.measure.budget import LatencyBudget, Verdict


@pytest.mark.parametrize(
    ("ci", "verdict"),
    [
        ((1.8, 1.9), Verdict.FITS),
        ((1.8, 2.0), Verdict.FITS),
        ((1.9, 2.1), Verdict.UNSURE),
        ((2.0, 2.1), Verdict.UNSURE),
        ((2.01, 2.2), Verdict.OVER),
    ],
)
def test_a_verdict_goes_by_the_interval(ci, verdict):
    assert LatencyBudget(2.0).judge(ci) is verdict
