"""A study goes on with the weights that it was begun with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.samplers import RandomSampler

from nas.errors import UserError
from nas.search.weights import FILE, agree_on_weights
from nas.study.trials import open_study


def test_other_weights_are_refused_and_new_ones_added(tmp_path: Path) -> None:
    folder = tmp_path / "training"
    files = {"levit_128s": Path("zoo/levit_128s.pth"), "timm/lcnet_050": Path("zoo/lcnet_050.pth")}

    def opened():
        return open_study("s", tmp_path / "study.journal", {"a": 1}, RandomSampler())

    def agree(found: dict[str, str], reach: bool = True) -> None:
        agree_on_weights(opened(), folder, SimpleNamespace(digests=found, files=files, reach=lambda: reach))

    agree({"levit_128s": "1111"})
    agree({"levit_128s": "1111", "timm/lcnet_050": "2222"})
    agree({"timm/lcnet_050": "2222"})
    assert json.loads((folder / FILE).read_text()) == {"levit_128s": "1111", "timm/lcnet_050": "2222"}
    with pytest.raises(
        UserError, match=r"^this study began with weights.levit_128s 1111, this command says 3333: give"
    ):
        agree({"levit_128s": "3333"})
    with pytest.raises(UserError, match=r"another --study; it has changed, or is another file: zoo/levit_128s\.pth$"):
        agree({"levit_128s": "3333", "timm/lcnet_050": "2222"})
    with pytest.raises(UserError, match=r"weights.levit_128s 1111, this command says not found here: give the same"):
        agree({"timm/lcnet_050": "2222"}, reach=False)
    (folder / FILE).write_text("{")
    with pytest.raises(UserError, match=r"weights\.json is damaged: remove it"):
        agree({"levit_128s": "1111"})
    (folder / FILE).write_text('{"levit_128s": "1111"}')
    (tmp_path / "study.journal").unlink()
    with pytest.raises(UserError, match=r"training has trainings that began with weights.levit_128s 1111, this"):
        agree({"levit_128s": "3333"})
