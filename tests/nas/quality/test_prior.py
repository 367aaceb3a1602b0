"""The size prior: its leave-one-out error, its growth with distance, EViT's keep rates, ties."""

import numpy as np
import pytest

from nas.networks.counts import counts_of
from nas.quality.candidate import Candidate
from nas.quality.prior import Line, PriorTier, references, sizes
from nas.quality.tier import Estimate
from nas.quality.tiers import TIERS
from search_spaces import get_arch, list_models, table
from search_spaces.api import find_variant
from search_spaces.evit import EvitArch


@pytest.fixture(scope="module")
def prior() -> PriorTier:
    return PriorTier()


def estimate(prior: PriorTier, arch) -> Estimate:
    return prior.estimate(Candidate(arch), counts_of(arch))


def test_leave_one_out_error_is_that_of_refitting():
    points = [(2**i, y) for i, y in ((20, 60.0), (21, 66.0), (22, 69.0), (24, 75.0))]
    residuals = []
    for left_out in range(4):
        rest = [p for i, p in enumerate(points) if i != left_out]
        x, y = np.log2([m for m, _ in rest]), [t for _, t in rest]
        slope = np.cov(x, y, bias=True)[0, 1] / np.var(x)
        residuals.append(points[left_out][1] - (np.mean(y) + slope * (np.log2(points[left_out][0]) - np.mean(x))))
    assert Line(points).error == pytest.approx(np.sqrt(np.mean(np.square(residuals))))


def test_errors_agree_with_quality_measured_before():
    """Mean leave-one-out errors of .89 to 1.0 (LeViT, EfficientViT) and .46 (SHViT) were found on timm's figures."""
    found = references()
    assert found["efficientvit"] == pytest.approx(1.0, abs=0.3)
    assert found["levit"] == pytest.approx(1.2, abs=0.3)
    assert found["shvit"] == pytest.approx(0.5, abs=0.2)
    assert found["evit"] > 3, "three sizes fix a line badly, and the error says so"


@pytest.mark.parametrize("name", [n for n in list_models() if find_variant(n)[1].top1 is not None])
def test_published_networks_lie_within_twice_the_error(prior, name):
    found = estimate(prior, get_arch(name))
    assert found.interval.holds(find_variant(name)[1].top1)


def test_the_interval_is_the_line_s_prediction_interval():
    """Student's t: three networks say far less than six. Against numpy's and SciPy's own figures of a regression."""
    from scipy.stats import linregress, t

    points = [(2**i, y) for i, y in ((20, 60.0), (21, 66.0), (22, 69.0), (24, 75.0))]
    line, x = Line(points), np.log2([macs for macs, _ in points])
    fit = linregress(x, [y for _, y in points])
    spread = fit.stderr * np.sqrt(((x - x.mean()) ** 2).sum())
    error_of_mean = np.hypot(fit.intercept_stderr, 0) ** 2 + (23 * fit.stderr) ** 2 - 2 * 23 * x.mean() * fit.stderr**2
    assert line.doubt(2**23) == pytest.approx(np.sqrt(spread**2 + error_of_mean))
    assert line.freedom == 2
    assert t.ppf(0.975, 2) > 4


def width(found: Estimate) -> float:
    return found.interval.high - found.interval.low


def test_intervals_are_95_percent_and_the_score_is_as_it_was(prior):
    """The score is one leave-one-out error below, which ranks; the interval is wider than that both ways."""
    for name in ("levit_192", "efficientvit_m2", "shvit_s2", "sepvit_lite", "deit_small"):
        arch = get_arch(name)
        found = estimate(prior, arch)
        error = Line([(table(get_arch(n)).macs(), find_variant(n)[1].top1) for n in sizes(arch.family)]).error
        assert found.score == pytest.approx(found.value - error)
        assert found.interval.low < found.score
        assert 0 <= found.interval.low < found.value < found.interval.high <= 100


def test_error_grows_away_from_published_shapes(prior):
    arch = get_arch("shvit_s1")
    at_home = estimate(prior, arch)
    stage = arch.stages[1]
    wider = arch.replace(stages=(arch.stages[0], stage.model_copy(update={"blocks": stage.blocks * 2}), arch.stages[2]))
    extreme = arch.replace(
        stages=(arch.stages[0], stage.model_copy(update={"blocks": stage.blocks * 8}), arch.stages[2])
    )
    errors = [width(at_home), width(estimate(prior, wider)), width(estimate(prior, extreme))]
    assert errors == sorted(errors)
    assert errors[2] > 2 * errors[0]
    assert estimate(prior, extreme).value > at_home.value
    assert estimate(prior, extreme).score < at_home.score, "a shape nobody has trained must not win by its size"


def test_resolution_counts_as_distance(prior):
    arch = get_arch("levit_128s")
    assert width(estimate(prior, arch.replace(resolution=128))) > width(estimate(prior, arch))


@pytest.mark.parametrize(("suffix", "cost"), [("", (0.0, 0.0, 0.3, 0.9, 1.3)), ("_drop", (-0.1, 0.1, 0.4, 0.7, 1.4))])
def test_keep_rates_cost_what_was_published(prior, suffix, cost):
    whole = estimate(prior, get_arch("deit_small"))
    for keep, points in zip((90, 80, 70, 60, 50), cost, strict=True):
        found = estimate(prior, get_arch(f"evit_small_keep{keep}{suffix}"))
        assert whole.value - found.value == pytest.approx(points, abs=0.01)


def test_keeping_fewer_tokens_than_published_costs_more(prior):
    arch = get_arch("evit_small_keep50")
    assert isinstance(arch, EvitArch)
    fewer = [b.model_copy(update={"keep_rate": 0.4}) if b.keep_rate < 1 else b for b in arch.blocks]
    below = estimate(prior, arch.replace(blocks=tuple(fewer)))
    assert below.value < estimate(prior, arch).value
    assert below.value - below.score > estimate(prior, arch).value - estimate(prior, arch).score


def test_it_is_never_called_accuracy():
    tier = TIERS["prior"](None)
    assert "accuracy" not in (tier.label + tier.note).lower()
