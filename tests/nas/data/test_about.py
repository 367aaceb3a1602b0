"""A data set in one line and in JSON, and who says it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from nas.data.about import announce, describe, summary
from nas.data.dataset import ImageData, open_data
from nas.data.images import Images
from nas.prune.images import PruneJob
from nas.units import shown


def made(counts: dict[str, tuple[int, int]], **more: object) -> ImageData:
    """Blank images: of each class so many train and so many validate."""
    parts = []
    for part in (0, 1):
        labels = [label for label, pair in enumerate(counts.values()) for _ in range(pair[part])]
        parts.append(Images([np.zeros((2, 2), np.uint8)] * len(labels), labels, None))
    return ImageData("set", list(counts), parts[0], parts[0], parts[1], demo=False, validation="val/", **more)


def test_one_line() -> None:
    data = made({"daisy": (1200, 20), "rose": (90, 10)}, left_out=("3 .txt files", ".cache/"))
    assert describe(data) == (
        "set: 1,320 images of 2 classes (daisy 1,220, rose 100); 1,290 train, 30 validate (val/); "
        "left out: 3 .txt files, .cache/"
    )


def test_many_classes_are_shortened() -> None:
    equal = describe(made({f"n{i:08}": (4, 1) for i in range(100)}))
    assert "n00000008 and 91 more: 5 each)" in equal
    several = describe(made({f"n{i:08}": (4 + i % 2, 1) for i in range(100)}))
    assert "n00000000 5, n00000001 6, " in several
    assert " more of 5 to 6)" in several
    assert len(several) < 200
    assert "x" * 300 in describe(made({"x" * 300: (1, 1), "y": (1, 1)}))


def test_names_are_printable() -> None:
    assert shown("café") == "café"
    assert shown("a\nb") == "a\\nb"
    assert shown("caf\udce9") == "caf\\xe9"
    assert "\n" not in describe(made({"a\nb": (1, 1), "c": (1, 1)}))


def test_the_record_is_json() -> None:
    data = made({"a": (3, 1), "b": (2, 0)}, notes=("odd",))
    found = json.loads(json.dumps(asdict(summary(data))))
    assert found["class_names"] == data.classes == ["a", "b"]
    assert (found["classes"], found["train_counts"], found["val_counts"]) == (2, [3, 2], [1, 0])
    assert (found["validation"], found["left_out"], found["notes"]) == ("val/", [], ["odd"])


def test_digits_say_how_they_are_split() -> None:
    assert describe(open_data(None, 16, None, 3)).endswith("validate (20% of each class, picked by seed 3)")


@pytest.fixture
def job(tmp_path: Path) -> tuple[PruneJob, list[str]]:
    said: list[str] = []
    return PruneJob(tmp_path / "run", {}, said.append, lambda *_: None, "cpu"), said


def test_a_job_tells_and_records(job: tuple[PruneJob, list[str]]) -> None:
    job, said = job
    data = replace(made({"a": (3, 1), "b": (2, 1)}), notes=("something odd",))
    announce(data, job.say, job.note)
    assert said[:2] == [describe(data), "something odd"]
    assert job.state.notes[0] == "something odd"
    job.data = job.evaluated = job.calibration = data
    job.evaluated = job.calibration = data.val
    assert job.describe_data().class_names == ["a", "b"]
