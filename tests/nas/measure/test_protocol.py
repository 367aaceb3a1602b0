"""What samples say of the CPUs they were taken on."""

import pytest

from nas.measure.samples import Measurement, quanta, quanta_line
from nas.units import counted


@pytest.mark.parametrize(
    ("samples", "waits"),
    [
        ([2.8, 3.0, 3.3, 3.5, 4.2, 8.5, 20.5], False),  # 1 thread, a quiet machine
        ([2.7, 3.2, 10.4, 11.9, 15.2, 23.6, 47.4], True),  # 2 threads of 2, others' load on both CPUs
        ([3.0, 7.1, 15.2, 16.5, 20.6, 33.3, 97.8], True),  # the same, one other process
        ([2.5, 2.8, 7.0, 8.3, 8.8, 12.8, 17.5], True),  # 1 thread whose CPU is shared
    ],
)
def test_turns_of_the_scheduler_are_told_from_speed(samples, waits):
    """Quantiles measured of EfficientViT-M0 on 2 CPUs (0, 5, 25, 50, 75, 95, 99.9%)."""
    assert quanta(Measurement([samples])) is waits


def test_the_line_names_the_load_and_the_way_out():
    line = quanta_line({"busy_share": 0.55, "usable_cpus": 2, "threads": 2})
    assert line.startswith("other processes keep 1.1 of 2 CPUs busy: at 2 threads a network waits for them")
    assert "use --threads 1" in line
    assert "--threads" not in quanta_line({"busy_share": None, "usable_cpus": 2, "threads": 1})


def test_a_count_and_its_noun():
    assert [counted(n, "thread") for n in (0, 1, 2)] == ["0 threads", "1 thread", "2 threads"]
