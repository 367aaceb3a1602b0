"""What may be chosen of an ONNX file."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nas.errors import UserError
from nas.export.options import OPSETS, FileOptions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "^--batch-size is 0: give 1 or more$"),
        ({"opset": 12}, "^--opset 12: give 13 to 20, "),
        ({"opset": 21}, "^--opset 21: give 13 to 20, "),
        ({"precision": "bf16"}, "^--precision bf16: a file is fp32, fp16 or int8$"),
    ],
)
def test_what_no_file_can_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FileOptions(**changes).check()


def test_what_a_file_beside_it_cannot_have_is_refused() -> None:
    FileOptions(opset=16).check(("fp32", "int8"))
    with pytest.raises(UserError, match=r"^--precision fp16 needs --opset 17 or more: "):
        FileOptions(opset=16).check(("fp32", "fp16"))
    FileOptions(precision="fp16").check(())
    for own, lower in (("int8", ()), ("fp16", ("fp32", "int8"))):
        with pytest.raises(
            UserError, match=f"^a run's model.onnx is not {own}: `vitnas export` makes one of it that is$"
        ):
            FileOptions(precision=own).check(lower)  # type: ignore[arg-type]


def test_what_a_file_can_have_is_not() -> None:
    for options in (FileOptions(), FileOptions(None, True, OPSETS[0], True, "int8"), FileOptions(opset=OPSETS[-1])):
        options.check()


def test_what_a_run_keeps_of_a_file_is_read_back() -> None:
    for options in (FileOptions(), FileOptions(None, True, OPSETS[0], True, "int8"), FileOptions(opset=OPSETS[-1])):
        kept = json.loads(json.dumps(options.identity()))
        assert FileOptions.of_identity(kept) == options
    assert FileOptions.of_identity(FileOptions(8, opset=OPSETS[-1]).identity()) == FileOptions(opset=OPSETS[-1])
