"""What a search that found nothing says would help."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from records import COMPLETE

from nas.measure.budget import Limits
from nas.search.advice import advice, rounded_up, with_budget
from nas.search.rows import ClosingRow
from search_spaces import get_arch

COMMAND = "vitnas search --latency-budget 1ms --family shvit --study mine --out 'my runs'"
QUIET, BUSY = ({"physical_cores": 2, "usable_cpus": 2, "busy_share": share} for share in (0.01, 0.5))


def lines(
    hardware: dict,
    latency: float = 3.21,
    state: str = "complete",
    threads: int = 1,
    plan: SimpleNamespace | None = None,
    closing: dict | None = None,
    exhausted: bool = False,
    limits: Limits = Limits(),  # noqa: B008
    name: str = "shvit_s1",
) -> list[str]:
    row = replace(
        COMPLETE,
        trial=3,
        name=name,
        state=state,
        latency_ms=latency,
        latency_ci_low_ms=0.95 * latency,
        latency_ci_high_ms=1.05 * latency,
        resolution=160,
        memory_mb=80.5,
        file_mb=25.0,
        arch=json.loads(get_arch("shvit_s1").to_json()),
    )
    settings = SimpleNamespace(device="cpu", threads=threads, runtime="onnxruntime", batch_size=2, precision="fp32")
    options = SimpleNamespace(
        settings=settings, budget_ms=1.0, families=("shvit",), plan=plan, resolution=None, limits=limits
    )
    final = [] if closing is None else [ClosingRow.of(row, **{"latency_ms": latency} | closing)]
    return advice(options, SimpleNamespace(hardware=hardware, exhausted=exhausted), [row], final, COMMAND)


def test_it_names_the_budget_that_would_work_and_what_makes_networks_faster():
    budget, smaller, pruned, *_ = lines(QUIET)
    assert budget == (
        "a budget of 3.4 ms, which shvit_s1 meets: vitnas search --latency-budget 3.4ms --family shvit --out 'my runs'"
    )
    assert smaller.startswith("--resolution ")
    assert "an estimate of " in smaller
    assert pruned.endswith(
        ": vitnas prune --model shvit_s1@160 --latency-budget 1ms --device cpu --runtime onnxruntime --threads 1 "
        "--batch-size 2 --precision fp32"
    )


def test_one_that_was_measured_briefly_has_no_interval_to_go_by():
    brief = {"error": "", "ci_low_ms": None, "ci_high_ms": None, "latency_p95_ms": 3.31}
    assert lines(QUIET, closing=brief)[0].startswith("a budget of about 3.4 ms (shvit_s1)")


def test_a_pruning_gets_the_images_of_the_search():
    told = lines(QUIET, plan=SimpleNamespace(data="my images", parent=None))
    assert any(line.endswith("--precision fp32 --data 'my images'") for line in told)


def test_the_closing_run_counts_where_there_was_one():
    """The trial's own interval is below the budget that the closing run showed to be missed."""
    over = {"error": "", "latency_ms": 1.03, "ci_low_ms": 1.01, "ci_high_ms": 1.07}
    budget, *_ = lines(QUIET, latency=0.94, closing=over)
    assert budget.startswith("a budget of 1.1 ms, which shvit_s1 meets: ")


def test_no_budget_below_the_one_given_is_advised():
    told = lines(QUIET, latency=0.94, closing={"error": "killed"})
    assert told
    assert not any(line.startswith("a budget") or "vitnas prune" in line for line in told)


def test_a_lower_resolution_is_named_only_where_it_would_fit():
    assert not any(line.startswith("--resolution") for line in lines(QUIET, latency=3000.0))


def test_what_cannot_help_is_not_advised():
    assert any(line.startswith("more --trials") for line in lines(QUIET))
    assert not any(line.startswith("more --trials") for line in lines(QUIET, exhausted=True))
    assert not any("vitnas prune" in line for line in lines(QUIET, latency=25.0))
    assert not any("vitnas prune" in line for line in lines(QUIET, name="timm/lcnet_050@64")), "it is refused"


def test_more_threads_are_advised_where_their_cpus_are_idle():
    assert any(line.startswith("--threads 2") for line in lines(QUIET))
    for hardware in (BUSY, {"physical_cores": 2, "usable_cpus": 2, "busy_share": None}):
        assert not any(line.startswith("--threads") for line in lines(hardware))


def test_no_advice_where_nothing_was_measured():
    assert lines(QUIET, state="interrupted") == []


@pytest.mark.parametrize(
    ("ms", "up"), [(3.3705, 3.4), (3.4, 3.4), (0.04123, 0.042), (15.2, 16), (123.0, 130), (9.99, 10), (1.0, 1.0)]
)
def test_a_budget_is_rounded_up_to_two_digits(ms, up):
    assert rounded_up(ms) == up


def test_the_budget_of_a_command_is_replaced():
    assert with_budget("vitnas search --latency-budget=2ms --study=s", 3.4) == "vitnas search --latency-budget 3.4ms"


def test_a_limit_that_some_network_meets_is_named_first():
    found = lines(QUIET, latency=0.5, limits=Limits(memory_mb=64.0, file_mb=30.0))
    assert found[0] == "--memory-budget 81MB, which shvit_s1 meets"
    assert not any(line.startswith(("--size-budget", "a budget of")) for line in found)
