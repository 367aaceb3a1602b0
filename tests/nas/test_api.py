"""`import vitnas`: every name is there, and the examples of docs/reference/python.md run, with small numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitnas

PAGE = Path(__file__).parents[2] / "docs/reference/python.md"
FENCE = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
SMALLER = {
    "budget_ms=2.0": "budget_ms=500.0",
    "trials=20)": 'trials=2, families=("shvit",), resolution=64)',
    "epochs=5": "epochs=1, batch_size=8",
    '"efficientvit_m0"': '"shvit_s1"',
    "resolution=128": "resolution=64",
    'latency="0.6x"': 'macs="0.7x"',
    'm0-pruned"), data=': 'm0-pruned"), rounds=1, finetune=0, control=False, data=',
    "timm/lcnet_050": "shvit_s1@64",
    '"levit_128s"': '"levit_128s@64"',
    "[vitnas.settings_for(threads=1)]": "[vitnas.settings_for(threads=1)], rounds=6",
    'vitnas.export("levit_128s@64"': 'vitnas.export("runs/m0"',
}
"""What a test replaces in the examples."""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of noise, dark and light."""
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for name, colour in (("dark", 20), ("light", 200)):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = random.integers(0, 40, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(noise + np.uint8(colour)).save(folder / f"{i}.png")
    return tmp_path


def test_every_name_is_there() -> None:
    assert set(vitnas.__all__) == set(vitnas.HOMES)
    for name in vitnas.__all__:
        assert getattr(vitnas, name).__name__ == name
    assert set(dir(vitnas)) >= set(vitnas.__all__)
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        vitnas.serch  # noqa: B018


def test_a_bench_checks_its_request() -> None:
    with pytest.raises(vitnas.UserError, match="name the networks to measure"):
        vitnas.bench(vitnas.BenchRequest([], [vitnas.Settings()]))


def test_a_folder_may_be_text() -> None:
    recipe = vitnas.choose_recipe("quick")
    budget = vitnas.parse_pruning_budget(macs="0.5x")
    assert vitnas.TrainRequest("shvit_s1", recipe, "cpu", "runs/a").folder == Path("runs/a")
    assert vitnas.PruneRequest("shvit_s1", budget, vitnas.Settings(), "runs/a").folder == Path("runs/a")
    assert vitnas.SearchRequest(2.0, study="a", out="runs").folder == Path("runs/a")


def test_importing_it_loads_no_pytorch() -> None:
    code = "import sys, vitnas; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PAGE.parents[2])


@pytest.mark.parametrize(
    ("epochs", "device", "message"), [(0, "cpu", "--epochs is 0"), (1, "tpu", "choose cpu or cuda")]
)
def test_training_checks_its_request(tmp_path: Path, epochs: int, device: str, message: str) -> None:
    recipe = vitnas.choose_recipe("quick", epochs=epochs)
    with pytest.raises(vitnas.UserError, match=message):
        vitnas.train(vitnas.TrainRequest("shvit_s1", recipe, device, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "--rounds is 0: give 1 or more"),
        ({"kinds": ("ffn", "mlp")}, "--axes 'ffn,mlp': choose from ffn"),
        ({"settings": vitnas.Settings(threads=0)}, "threads is 0"),
        ({"unlabelled": "photos", "distill": False}, "--unlabelled with --no-distill"),
    ],
)
def test_pruning_checks_its_request(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    budget = vitnas.parse_pruning_budget(macs="0.5x")
    given: dict[str, Any] = {"settings": vitnas.Settings(), **change}
    with pytest.raises(vitnas.UserError, match=message):
        vitnas.prune(vitnas.PruneRequest("shvit_s1", budget, folder=tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()


def test_the_examples_run(
    pictures: Path, few_rounds: Any, small_shvit: Any, exports_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures)
    page, names = PAGE.read_text(), {}
    for text, small in SMALLER.items():
        assert text in page or "@64" in text
        page = page.replace(text, small)
    for code in FENCE.findall(page):
        exec(code, names)
    assert names["outcome"].winner.family == "shvit"
    assert {path.name for path in Path("levit").iterdir()} >= {"arch.json", "model.onnx", "model.safetensors"}
    assert Path("runs/m0-pruned/model.safetensors").is_file()
    assert len(names["result"].rows) == len(names["judged"].results) == 2
