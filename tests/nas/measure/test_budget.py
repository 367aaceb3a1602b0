import pytest

from nas.measure.budget import LatencyBudget, Limits, Verdict


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


def test_limits_of_memory_and_size():
    limits = Limits(memory_mb=64.0, file_mb=4.0)
    assert limits.excess(80.0, 3.0) == {"memory": 0.25, "size": -0.25}
    assert limits.over(80.0, 4.0) == ("memory",)
    assert limits.over(None, 4.5) == ("memory", "size"), "what is not known is not met"
    assert limits.words == ", 64 MB of memory, a file of 4 MB"
    assert Limits().over(None, None) == ()
    assert Limits().words == ""
