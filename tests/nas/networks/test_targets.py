"""NAME@PX in the verbs that take one network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nas.networks.targets import find_arch

FOLDERS = ("export", "{run}@96", "--out", "{out}"), ("prune", "--model", "{run}@96", "--out", "{out}")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder of a trained network of 64 px; nobody reads its weights."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "arch.json").write_text(find_arch("shvit_s1").at(64).to_json())
    (folder / "model.safetensors").touch()
    return folder


def test_show_at_another_resolution(vitnas, run: Path) -> None:
    _, out, _ = vitnas("show", f"{run}@96", "--json")
    assert json.loads(out)["resolution"] == 96


def test_export_at_another_resolution(vitnas, tmp_path: Path) -> None:
    code, _, err = vitnas("export", "shvit_s1@64", "--out", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    assert find_arch(str(tmp_path / "out")).resolution == 64


@pytest.mark.parametrize("words", FOLDERS, ids=lambda words: words[0])
def test_weights_of_another_resolution_are_refused(vitnas, run: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    words = [word.format(run=run, out=out) for word in words]
    vitnas.refused(vitnas(*words), "trained at 64 px", f"vitnas train {run}", "--resolution 96")
    assert not out.exists()


def test_timm_networks_are_pruned_at_their_own_resolution(vitnas, tmp_path: Path) -> None:
    vitnas.refused(vitnas("prune", "--model", "timm/test_resnet@64", "--out", str(tmp_path / "out")), "leave out @64")
    assert not (tmp_path / "out").exists()
