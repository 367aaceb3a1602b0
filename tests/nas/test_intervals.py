import pytest
from scipy.stats import norm, ttest_1samp

from nas.intervals import Interval, guessing, of_accuracies, of_difference, of_mean, of_share


def test_a_share_has_wilsons_interval():
    n, p, z = 180, 0.5, norm.ppf(0.975)
    centre, half = (p + z**2 / 2 / n) / (1 + z**2 / n), z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / 4 / n**2) ** 0.5
    found = of_share(50, n)
    assert (found.low, found.high) == pytest.approx((100 * (centre - half), 100 * (centre + half)))


@pytest.mark.parametrize("percent", [0, 100])
def test_a_share_stays_possible_and_keeps_an_error(percent):
    found = of_share(percent, 20)
    assert 0 <= found.low < found.high <= 100
    assert found.high - found.low > 10


def test_no_images_have_no_accuracy():
    with pytest.raises(ValueError, match="at least one image"):
        of_share(50, 0)


def test_a_mean_has_students_interval():
    values = [51.0, 54.0, 58.5]
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    found = of_mean(values)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert of_mean([51.0]) is None


def test_seeds_widen_what_the_images_leave_open():
    images = of_share(54.5, 400)
    both = of_accuracies([51.0, 54.0, 58.5], 400)
    assert both.low < images.low
    assert both.high > images.high
    one = of_accuracies([54.5], 400)
    assert (one.low, one.high) == pytest.approx((images.low, images.high))


def test_a_difference_of_equal_intervals_is_wider_by_the_root_of_two():
    found = of_difference(60, Interval(57, 63), 50, Interval(47, 53))
    assert (found.low, found.high) == pytest.approx((10 - 3 * 2**0.5, 10 + 3 * 2**0.5))


def test_an_accuracy_that_may_be_guessed_is_told():
    assert guessing((41.0, 59.0), 2) == "not shown to be better than guessing: 50.0% among 2 classes"
    assert guessing((51.0, 69.0), 2) is None
    assert guessing((12.0, 20.0), 10) is None
