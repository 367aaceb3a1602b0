"""A network as ONNX, and the process that exports candidates so that a search survives what goes wrong there."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.data.lineage import SEEN
from nas.errors import UserError
from nas.export.card import LABELS, PREFIX, PREPROCESS, Card, Preprocess
from nas.files import drafted, replace_file, scratch, unwritable
from nas.measure.runtime import RUNTIMES, Settings
from nas.process import Worker
from nas.text import first_line

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from nas.networks.targets import TimmNetwork
    from search_spaces import Arch

OPSET = 17
TOLERANCE = 1e-4
CHECKED = 8  # images, at least, on which the exported network must agree
NUDGES = (-7, -5, -3, -1, 1, 3, 5, 7)  # millionths of the pixels
EXPORT_TIMEOUT_S = 180
CONVERTED = ("fp16", "int8")
"""Precisions that need an ONNX file of their own (see `lower_precision`)."""


def to_onnx(folded: nn.Module, path: Path, resolution: int, batch_size: int) -> None:
    """Write a folded model as ONNX with the static input "images" (batch_size, 3, R, R) and output "logits".

    The TorchScript exporter is used: for these models it is 5 to 10 times faster than the dynamo one.

    Raises:
        RuntimeError: the graph cannot be exported.
    """
    import logging

    import torch

    like = next(folded.parameters(), torch.zeros(()))
    images = like.new_zeros(batch_size, 3, resolution, resolution)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            folded,
            (images,),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            dynamo=False,
        )


def write_onnx(network: Arch | TimmNetwork, path: Path, batch_size: int) -> None:
    """Write a network with random weights (see `nas.networks.build.build`), folded, as ONNX."""
    from nas.networks.build import build

    to_onnx(build(network), path, network.resolution, batch_size)


def write_artifact(
    network: Arch | TimmNetwork, settings: Settings, stem: Path, calibration: np.ndarray | None = None
) -> Path:
    """The file `settings.runtime` loads for a network: ONNX in its precision, or the network's JSON document.

    calibration: images for int8, see `lower_precision`.

    Raises:
        RuntimeError, ValueError: the network cannot be exported.
    """
    if RUNTIMES[settings.runtime].artifact == "module":
        from nas.networks.build import to_document

        path = Path(f"{stem}.json")
        path.write_text(to_document(network))
    else:
        path = Path(f"{stem}.onnx")
        write_onnx(network, path, settings.batch_size)
        lower_precision(path, settings, calibration)
    return path


def lower_precision(path: Path, settings: Settings, calibration: np.ndarray | None = None) -> None:
    """Turn a float32 ONNX file with a static batch into what the runtime loads for a precision, in place.

    fp16 converts weights, input and output; int8 quantises (`nas.export.quantize`), with `calibration` images, float32
    (N, 3, R, R), or noise. For fp32, tf32 and bf16 the file stays: the runtime computes in them.
    """
    if settings.precision == "fp16":
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(path)), path)
    elif settings.precision == "int8":
        from nas.export.quantize import quantize

        quantize(path, calibration)


def label_onnx(path: Path, arch: Arch | None, trained: bool, card: Card) -> None:
    """Store a network's card, its Arch where it has one, and whether its weights are trained in the file's metadata.

    Raises:
        ValueError: the labelled file would pass 2 GB, protobuf's limit.
    """
    import onnx

    model = onnx.load(path)
    facts = {} if arch is None else {f"{PREFIX}arch": arch.to_json()}
    facts |= {f"{PREFIX}weights": "trained" if trained else "untrained"} | card.metadata()
    onnx.helper.set_model_props(model, facts)
    model.producer_name, model.producer_version = "vitnas", version("vitnas")
    onnx.save(model, path)


def save_model(model: nn.Module, folder: Path, with_weights: bool = True) -> None:
    """Write a network as arch.json and, unless told not to, model.safetensors.

    Raises:
        DiskFull: there is no room for it.
        UserError: a folder that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "arch.json", model.arch.to_json())
        if with_weights:
            save_weights(model, folder / "model.safetensors")
    except OSError as error:
        raise unwritable(folder, error) from None


def save_onnx(
    model: nn.Module, folder: Path, batch_size: int, trained: bool, card: Card, images: np.ndarray | None = None
) -> str:
    """Write a network as model.onnx, its card beside it; where that fails there is no model.onnx afterwards, rather
    than an older one.

    images: of the kind it is for, float32 (N, 3, R', R'), where there are any, to look at beside others.

    Returns:
        How nearly ONNX Runtime and PyTorch agree, see `agreement`.

    Raises:
        DiskFull: there is no room for it.
        UserError: a folder that cannot be written, a network that cannot be exported, or one whose ONNX form disagrees
            with PyTorch by more than 1e-4.
    """
    from search_spaces import fold

    arch, folded, path = model.arch, fold(model), folder / "model.onnx"
    try:
        path.unlink(missing_ok=True)
        card.write(folder)
        with drafted(path) as draft:
            to_onnx(folded, draft, arch.resolution, batch_size)
            label_onnx(draft, arch, trained, card)
            return agreement(folded, draft, arch.resolution, batch_size, images)
    except OSError as error:
        raise unwritable(folder, error) from None
    except (RuntimeError, ValueError, MemoryError) as error:
        raise UserError(f"this network cannot be exported: {first_line(error)}") from None


def save_weights(model: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a network's state dict as safetensors."""
    from safetensors.torch import save

    tensors = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    replace_file(path, save(tensors, metadata))


def export_folder(arch: Arch, folder: Path, weights: str | None, num_classes: int | None, batch_size: int) -> str:
    """Write arch.json, model.onnx with its card and, where weights are given, model.safetensors; returns what was done.

    Of weights that vitnas trained, the card, metrics.json and the images they have seen are taken from the folder they
    lie in.

    Raises:
        UserError: a folder that cannot be written, weights that cannot be had or do not fit, or an ONNX network that
            disagrees with PyTorch by more than 1e-4.
    """
    from search_spaces import ArchError, create_model
    from search_spaces.checkpoints import WeightsError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = create_model(arch, num_classes, weights)
    except (ArchError, WeightsError) as error:
        raise UserError(str(error)) from None
    if weights is not None and model.untrained:
        raise UserError(_other_classifier(model, weights))
    card, facts = card_for(model.arch, weights)
    agreed = replace_network(model, folder, batch_size, weights is not None, card, facts)
    what = "with random, untrained weights"
    if model.loaded:
        what = "with the given weights" + (f" ({model.loaded.note})" if model.loaded.note else "")
        if card.classes is None:
            agreed += f"; the weights do not say what their classes are called, and {PREPROCESS} is what vitnas does"
    return f"{folder}/model.onnx: {arch.family} {what}; {agreed}"


def card_for(arch: Arch, weights: str | None) -> tuple[Card, list[Path]]:
    """The card of an Arch with weights, and the files beside these that are true of them.

    Of a run's model.safetensors they are the run's own, without accuracy and metrics where the Arch is another.
    """
    if weights is None:
        return Card.untrained(arch.resolution), []
    if weights == "timm":
        return Card.timm(arch), []
    path = Path(weights)
    seen = [path.with_name(SEEN)] if path.with_name(SEEN).is_file() else []
    if path.name != "model.safetensors" or not (path.parent / "arch.json").is_file():
        return Card.untrained(arch.resolution), seen
    card = Card.read(path.parent)
    if (path.parent / "arch.json").read_text() == arch.to_json():
        facts = (path.with_name(name) for name in ("metrics.json", "prune.json"))
        own = card.preprocess or Preprocess.own(arch.resolution)
        return card.model_copy(update={"preprocess": own}), [*seen, *(each for each in facts if each.is_file())]
    classes = card.classes if card.classes and len(card.classes) == arch.num_classes else None
    return Card(preprocess=Preprocess.own(arch.resolution), classes=classes), seen


def replace_network(
    model: nn.Module, folder: Path, batch_size: int, trained: bool, card: Card, facts: Sequence[Path] = ()
) -> str:
    """Write arch.json, model.onnx, its card and, of a trained network, model.safetensors; all of them or none. No file
    that speaks of an earlier network stays.

    facts: files that speak of this one, to be copied.

    Returns, Raises:
        As `save_onnx`.
    """
    try:
        with scratch(folder) as draft:
            save_model(model, draft, with_weights=trained)
            agreed = save_onnx(model, draft, batch_size, trained, card)
            for fact in facts:
                replace_file(draft / fact.name, fact.read_bytes())
            for name in ("metrics.json", "prune.json", PREPROCESS, LABELS):
                (folder / name).unlink(missing_ok=True)
            for earlier in folder.glob("model.*"):
                earlier.unlink()
            for path in draft.iterdir():
                path.replace(folder / path.name)
    except OSError as error:
        raise unwritable(folder, error) from None
    finally:
        with suppress(OSError):  # it holds something
            folder.rmdir()
    return agreed


def _other_classifier(model: nn.Module, weights: str) -> str:
    """Why weights leave a network's classifier untrained, and what to do."""
    classes = model.loaded.classes
    if classes is None:
        return f"{weights} has no classifier: `vitnas train --weights` trains one"
    named = "1 class" if classes == 1 else f"{classes} classes"
    return (
        f"{weights} has a classifier of {named} and the network one of {model.arch.num_classes}: "
        f"add --num-classes {classes}, or train it with `vitnas train --weights`"
    )


def agreement(folded: nn.Module, path: Path, resolution: int, batch_size: int, images: np.ndarray | None = None) -> str:
    """How nearly ONNX Runtime and PyTorch agree, as a sentence: to 1e-4 of the largest logit, or a UserError.

    They see `check_images`. Near a tie between tokens rounding decides which is kept: an image on which PyTorch
    disagrees with itself after a change of a few millionths of the pixels is left out, and the sentence says so.

    Raises:
        UserError: they disagree, logits are not finite, or every image is left out.
    """
    import numpy as np
    import torch

    pixels = check_images(resolution, batch_size, images)
    wanted, found = logits_of(folded, pixels, batch_size), onnx_logits(path, pixels, batch_size)
    for name, logits in (("PyTorch", wanted), ("ONNX Runtime", found)):
        broken = int((~np.isfinite(logits).all(1)).sum())
        if broken:
            raise UserError(
                f"the network's logits in {name} are NaN or infinite on {broken} of {len(logits)} images: "
                "it needs other weights"
            )
    largest = max(abs(wanted).max(), 1e-30)
    errors = abs(found - wanted).max(1) / largest
    told = np.full(len(errors), True)
    for i in np.flatnonzero(errors > TOLERANCE):
        nudged = torch.cat([pixels[i : i + 1] * (1 + step * 1e-6) for step in NUDGES])
        told[i] = abs(logits_of(folded, nudged, batch_size) - wanted[i]).max() / largest <= TOLERANCE
    if errors[told].max(initial=0) > TOLERANCE:
        raise UserError(f"the exported network disagrees with PyTorch by {errors[told].max():.1e} of its largest logit")
    if not told.any():
        raise UserError("float32 is too coarse for this network: its logits change with the last digits of the pixels")
    text = f"ONNX Runtime and PyTorch agree to {errors[told].max():.0e} of the largest logit"
    return text if told.all() else f"{text} on {told.sum()} of {len(told)} images; on the others rounding picks tokens"


def check_images(resolution: int, batch_size: int, images: np.ndarray | None = None) -> Tensor:
    """Whole batches, at least 8 images (N, 3, R, R): in turn noise, one colour, one blurred between bars, one of
    `images`.
    """
    import torch
    import torch.nn.functional as F

    count, generator = math.ceil(CHECKED / batch_size) * batch_size, torch.Generator().manual_seed(0)
    each = math.ceil(count / 3)
    noise = torch.randn(each, 3, resolution, resolution, generator=generator)
    colour = torch.randn(each, 3, 1, 1, generator=generator).expand_as(noise)
    blurred = F.interpolate(torch.randn(each, 3, 5, 5, generator=generator), noise.shape[2:], mode="bilinear")
    boxed = colour.clone()
    rows = slice(resolution // 4, 3 * resolution // 4)
    boxed[:, :, rows] = blurred[:, :, rows]
    kinds = [noise, colour, boxed]
    if images is not None:
        given = F.interpolate(torch.from_numpy(images[:each]), noise.shape[2:], mode="bilinear", antialias=True)
        kinds.append(given.repeat(math.ceil(each / len(given)), 1, 1, 1)[:each])
    return torch.stack(kinds, 1).flatten(0, 1)[:count]


def logits_of(folded: nn.Module, pixels: Tensor, batch_size: int) -> np.ndarray:
    """PyTorch's logits (N, classes), batch by batch."""
    import torch

    with torch.inference_mode():
        return torch.cat([folded(batch) for batch in pixels.split(batch_size)]).numpy()


def onnx_logits(path: Path, pixels: Tensor, batch_size: int) -> np.ndarray:
    """ONNX Runtime's logits (N, classes), in the file's batches."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"images": batch.numpy()})[0] for batch in pixels.split(batch_size)])


class Exporter:
    """`write_artifact` in a child process: a network that crashes it, or fills its memory, is a WorkerError.

    images: what int8 is calibrated on, see `lower_precision`. module: what the child runs, with "export" among its
    methods (see `export_here`). waiting: see `Worker`.
    """

    def __init__(
        self,
        images: np.ndarray | None = None,
        module: str = "nas.export.artifact",
        timeout_s: float = EXPORT_TIMEOUT_S,
        waiting: Callable[[float, float], None] | None = None,
    ) -> None:
        self._images, self._module, self._timeout_s, self._waiting = images, module, timeout_s, waiting
        self._worker: Worker | None = None

    def __enter__(self) -> Exporter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.close()

    @property
    def running(self) -> list[Worker]:
        """The child, where there is one: to be stopped while something is timed."""
        return [self._worker] if self._worker is not None and self._worker.alive else []

    def write(self, network: Arch | TimmNetwork, settings: Settings, stem: Path) -> Path:
        """The network's file; the calibration images are kept beside it. Raises WorkerError."""
        from nas.networks.build import to_document

        return self.call("export", settings, stem, self._calibration(stem.parent), document=to_document(network))

    def call(self, method: str, settings: Settings, stem: Path, images: str | None, **source: Any) -> Path:
        """The file that a method of the child makes; a child that has died is started again. Raises WorkerError."""
        if not self.running:
            if self._worker is not None:
                self._worker.close()
            self._worker = Worker(self._module, waiting=self._waiting)
        answer = self._worker.call(
            method, self._timeout_s, settings=asdict(settings), stem=str(stem.absolute()), images=images, **source
        )
        return Path(answer["path"])

    def _calibration(self, folder: Path) -> str | None:
        import numpy as np

        if self._images is None:
            return None
        path = folder / "images.npy"
        if not path.exists():
            np.save(path, self._images)
        return str(path)


def export_here(document: str, settings: dict[str, Any], stem: str, images: str | None) -> dict[str, str]:
    """`write_artifact` as a child process offers it. images: a .npy file to calibrate on."""
    import numpy as np

    from nas.networks.build import from_document

    calibration = np.load(images) if images else None
    return {"path": str(write_artifact(from_document(document), Settings(**settings), Path(stem), calibration))}


if __name__ == "__main__":
    from nas.process import serve

    serve({"export": export_here})
