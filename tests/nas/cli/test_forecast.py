"""The time left, with a clock that the tests turn."""

import pytest

from nas.cli.forecast import CLOSING_NETWORKS, Forecast, Pace, Plan, about


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_search_without_training_counts_its_trials_and_the_closing_run(clock):
    forecast = Forecast(Plan(trials=12), clock)
    assert forecast.left_s() is None
    forecast.trial(2, trial_s=6.0, measuring_s=5.0)
    closing = CLOSING_NETWORKS * 5
    assert forecast.left_s() == pytest.approx(10 * 6 + closing)
    clock.now += 4
    assert forecast.left_s() == pytest.approx(10 * 6 - 4 + closing)
    clock.now += 400  # a long trial: those after it are still to come
    assert forecast.left_s() == pytest.approx(9 * 6 + closing)


def test_a_resumed_search_says_at_once_what_is_left(clock):
    forecast = Forecast(Plan(trials=12), clock)
    forecast.trial(10, trial_s=6.0, measuring_s=0.0)
    assert 2 * 6 < forecast.left_s() < 2 * 6 + 60


def test_no_trial_begins_after_the_timeout(clock):
    forecast = Forecast(Plan(trials=1000, timeout_s=60), clock)
    forecast.trial(1, trial_s=6.0, measuring_s=2.0)
    assert forecast.left_s() <= 60 + 6 + 16


def trained(forecast, clock, images_per_s=50, seconds=20):
    forecast.phase("trial 0: training, epoch 1/9", 0, 9000)
    clock.now += seconds
    forecast.phase("trial 0: training, epoch 1/9", images_per_s * seconds, 9000)


def test_trainings_at_the_end_are_counted_by_the_measured_pace(clock):
    plan = Plan(trials=4, final_images=3000, seeds=3, validation_images=2000, validated=6)
    forecast = Forecast(plan, clock)
    forecast.trial(1, 10.0, 2.0)
    assert forecast.left_s() is None, "nothing was trained yet"
    trained(forecast, clock, 50)
    forecast.trial(2, 10.0, 2.0)
    closing = CLOSING_NETWORKS * 2
    assert forecast.left_s() == pytest.approx(2 * 10 + closing + (2 * 3 * 3000 + 6 * 2000) / 50)


def test_the_time_left_moves_during_a_final_training(clock):
    forecast = Forecast(Plan(trials=2, final_images=3000, seeds=3), clock)
    trained(forecast, clock, 50)
    forecast.trial(2, 10.0, 2.0)
    forecast.phase("closing side-by-side run", 0, 30)
    clock.now += 10
    forecast.phase("closing side-by-side run", 10, 30)
    assert forecast.left_s() == pytest.approx(20 + 18_000 / 50)
    clock.now += 20
    for done in (30, 0, 10):  # some are measured longer
        forecast.phase("closing side-by-side run", done, 30)
        clock.now += 5
    assert forecast.left_s() == pytest.approx(10 + 18_000 / 50)
    forecast.phase("final trainings", 0, 5)
    forecast.phase("final training, trial 1, seed 0", 0, 3000)
    assert forecast.left_s() == pytest.approx(15_000 / 50), "as many as it was told"
    clock.now += 20
    forecast.phase("final training, trial 1, seed 0", 1000, 3000)
    assert forecast.left_s() == pytest.approx(14_000 / 50)


def test_final_trainings_of_an_earlier_run_are_not_counted_again(clock):
    forecast = Forecast(Plan(trials=2, final_images=3000, seeds=3), clock)
    forecast.trial(2, 10.0, 2.0)
    forecast.phase("final trainings", 0, 4)
    forecast.phase("final training, trial 1, seed 2", 0, 3000)
    clock.now += 10
    forecast.phase("final training, trial 1, seed 2", 1000, 3000)
    assert forecast.left_s() == pytest.approx((2000 + 9000) / 100)
    forecast.phase("final training, efficientvit_m0, seed 0", 0, 3000)
    assert forecast.left_s() == pytest.approx(9000 / 100)


def test_a_teacher_is_tried_and_a_parent_tuned_before_each_final_training_of_what_is_cut_from_it(clock):
    forecast = Forecast(Plan(trials=2, final_images=3000, seeds=2, networks=3, taught_images=4000), clock)
    trained(forecast, clock, 100)
    forecast.trial(2, 10.0, 2.0)
    forecast.phase("closing side-by-side run", 30, 30)
    assert forecast.left_s() == pytest.approx((18_000 + 4000) / 100)
    for tuned in ("parent x", "teacher timm/x"):  # nobody knew that one would be
        forecast.phase(f"tuning the {tuned}", 1000, 2000)
        assert forecast.left_s() == pytest.approx((18_000 + 5000) / 100)
    for what, left in (("without", 3000), ("by", 1000)):
        forecast.phase(f"trying the teacher x@64 on trial 1, {what} it", 0, 2000)
        clock.now += 10
        forecast.phase(f"trying the teacher x@64 on trial 1, {what} it", 1000, 2000)
        assert forecast.left_s() == pytest.approx((18_000 + left) / 100)
    parent, child = "tuning the parent efficientvit_m1 on all images, seed {}", "final training, trial 1, seed {}"
    left = 12_000
    forecast.phase("final trainings", 0, 4)
    assert forecast.left_s() == pytest.approx(left / 100)
    for seed in range(2):
        for what in (parent, child):
            for done in (0, 3000):
                forecast.phase(what.format(seed), done, 3000)
                clock.now += 30
            left -= 3000
            assert forecast.left_s() == pytest.approx(left / 100)


def test_networks_of_the_validation_are_counted_down(clock):
    forecast = Forecast(Plan(trials=2, validation_images=1000, validated=6), clock)
    trained(forecast, clock, 50)
    forecast.trial(2, 10.0, 2.0)
    before = forecast.left_s()
    for done in (0, 1000, 0, 500):
        forecast.phase("validation", done, 1000)
    assert forecast.left_s() == pytest.approx(
        before - 1500 / forecast._pace.images_per_s + 6000 / forecast._pace.images_per_s - 6000 / 50
    )


def test_a_pace_forgets_what_was_long_ago(clock):
    pace = Pace(clock)
    done = 0
    for images_per_s, seconds in ((100, 600), (10, 600)):
        for _ in range(seconds // 10):
            pace.see("training", done)
            clock.now += 10
            done += 10 * images_per_s
    pace.see("training", done)
    assert pace.images_per_s == pytest.approx(10, rel=0.1)


def test_a_pause_between_two_trainings_is_not_their_pace(clock):
    pace = Pace(clock)
    pace.see("one", 0)
    clock.now += 10
    pace.see("one", 100)
    clock.now += 1000
    pace.see("two", 500)
    assert pace.images_per_s == 10
    clock.now += 10
    pace.see("two", 600)
    assert pace.images_per_s == pytest.approx(10)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "about 5 s"),
        (43, "about 45 s"),
        (89, "about 90 s"),
        (90, "about 2 min"),
        (12 * 60 + 20, "about 12 min"),
        (95 * 60, "about 1 h 35 min"),
        (26 * 3600, "about 26 h"),
    ],
)
def test_in_words(seconds, words):
    assert about(seconds) == words
