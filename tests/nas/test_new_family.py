"""A family of one file goes through the whole program."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import quick
import torch
from PIL import Image

import nas.prune.figures
import nas.prune.steps
from nas.measure.samples import Measurement
from search_spaces import Arch, create_model, table
from search_spaces.registry import FAMILIES

FILE = Path(__file__).parents[1] / "toy_family.py"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The family of tests/toy_family.py, registered for one test."""
    families, archs = dict(FAMILIES), dict(Arch.families)
    spec = importlib.util.spec_from_file_location("toy_family", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # pydantic looks there
    spec.loader.exec_module(module)
    (name,) = FAMILIES.keys() - families.keys()
    monkeypatch.setitem(quick.SMALLEST, name, next(iter(FAMILIES[name].variants)))
    yield name
    for registry, before in ((FAMILIES, families), (Arch.families, archs)):
        registry.clear()
        registry.update(before)


@pytest.fixture
def images(tmp_path: Path) -> str:
    """Two classes of noisy one-coloured images."""
    rng = np.random.default_rng(0)
    for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return str(tmp_path / "images")


@pytest.fixture
def no_closing_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """All networks take a millisecond in pruning's closing run."""

    def measure(networks, *_):
        return dict.fromkeys(networks, Measurement(rounds_ms=[[1.0] * 3] * 3))

    monkeypatch.setattr(nas.prune.steps, "measure_side_by_side", measure)
    monkeypatch.setattr(nas.prune.figures, "png_of", lambda figure: b"")


@pytest.mark.usefixtures("few_rounds", "exports_here", "no_closing_run")
def test_a_new_family_is_one_file(vitnas, toy, images, tmp_path):
    def done(*words: str) -> None:
        code, printed, said = vitnas(*words)
        assert code == 0, printed + said

    here = ("--runtime", "onnxruntime", "--threads", "1")
    searched, trained, pruned, exported = (tmp_path / name for name in ("searched", "trained", "pruned", "exported"))
    space = ("--family", toy, "--resolution", "32", "--num-classes", "2", "--sampler", "random", "--trials", "2")
    done("search", "--latency-budget", "50ms", *space, "--study", "s", "--out", str(searched), *here)
    few = ("--data", images, "--epochs", "1", "--batch-size", "8", "--device", "cpu")
    done("train", str(searched / "s"), "--out", str(trained), *few)
    whole = Arch.from_json((trained / "arch.json").read_bytes())
    assert (whole.family, whole.resolution) == (toy, 32)

    less = ("--macs", "0.8x", "--rounds", "1", "--no-control")
    done("prune", "--model", str(trained), "--data", images, "--out", str(pruned), *less, *here)
    arch = Arch.from_json((pruned / "arch.json").read_bytes())
    assert table(arch).macs() <= 0.8 * table(whole).macs()

    done("export", str(pruned / "arch.json"), "--weights", str(pruned / "model.safetensors"), "--out", str(exported))
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (logits,) = onnxruntime.InferenceSession(exported / "model.onnx").run(None, {"images": x.numpy()})
    with torch.no_grad():
        expected = create_model(arch, weights=pruned / "model.safetensors").eval()(x)
    assert np.allclose(logits, expected, atol=1e-4)
