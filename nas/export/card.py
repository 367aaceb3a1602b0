"""What a network's file says of itself, so that it can be used without vitnas: its pixels, its classes, its accuracy.

It lies in the metadata of model.onnx, and beside it as preprocess.json and labels.txt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from nas.data.pixels import IMAGENET, Interpolation, Pixels
from nas.errors import UserError
from nas.export.onnx_input import read_model
from nas.export.options import PLAIN, FileOptions
from nas.files import replace_file
from nas.networks.hub import ARCH, CONFIG
from nas.networks.timm_form import TimmForm
from nas.networks.timm_network import LARGEST

if TYPE_CHECKING:
    from onnx import ModelProto
    from timm.models import PretrainedCfg
    from torchvision.transforms import Compose

    from nas.data.dataset import ImageData
    from nas.networks.timm_network import TimmNetwork
    from search_spaces import Arch

PREFIX = "vitnas."
HELD_OUT = "training images that the search held out and chose by"
"""What the accuracy of a candidate's own training was counted on."""
IN_GRAPH, PROBABILITIES = "in_graph", "probabilities"
"""Keys, after `PREFIX`, of what differs from a file of normalised input and of logits (`FileOptions`)."""
PREPROCESS, LABELS = "preprocess.json", "labels.txt"
LARGEST_RESIZE = 2 * LARGEST
"""Px that the shorter side of an image is brought to, at most."""
CLASSIFY = """\
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

network = onnxruntime.InferenceSession("model.onnx")
facts = network.get_modelmeta().custom_metadata_map
classes, how = (json.loads(facts[f"vitnas.{key}"]) for key in ("classes", "preprocess"))


def classify(path):
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    size = [how["resize"] * side // min(image.size) for side in image.size]
    image = image.resize(size, Image.Resampling[how["interpolation"].upper()])
    left, top = (round((side - how["size"]) / 2) for side in size)
    image = image.crop((left, top, left + how["size"], top + how["size"]))
    pixels = np.array(image)
    if how["layout"] == "NCHW":  # the other files take the bytes as they are
        pixels = ((pixels / 255 - how["mean"]) / how["std"]).astype("float32").transpose(2, 0, 1)
    (scores,) = network.run(None, {"images": pixels[None]})
    return classes[scores.argmax()]


print(classify("photo.jpg"))
"""
"""How a file of batch 1, or of any, is used without vitnas."""


def _as_text(name: str) -> str:
    """A name, as long as it has no lone surrogate, which no file takes."""
    name.encode()
    return name


Name = Annotated[str, AfterValidator(_as_text)]
Colour = tuple[FiniteFloat, FiniteFloat, FiniteFloat]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0, lt=2**31)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _colour(values: Iterable[float]) -> Colour:
    import numpy as np

    red, green, blue = (float(str(np.float32(value))) for value in values)  # the shortest that means the same pixels
    return red, green, blue


class Preprocess(BaseModel):
    """How an image becomes the network's input: its shorter side is brought to `resize` px, the middle `size` px square
    of it is divided by 255, `mean` is taken off and the rest divided by `std`.

    crop_pct: what `resize` is made from at another size, floor(size / crop_pct); files of earlier versions lack it.
    """

    model_config = ConfigDict(frozen=True)

    resize: Annotated[int, Field(gt=0, le=LARGEST_RESIZE)]
    size: Annotated[int, Field(gt=0, le=LARGEST)]
    interpolation: Interpolation
    mean: Colour
    std: tuple[Positive, Positive, Positive]
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _with_its_crop(self) -> Self:
        if not self.crop_pct:
            object.__setattr__(self, "crop_pct", _crop_of(self.size, self.resize))
        if math.floor(self.size / self.crop_pct) != self.resize:
            raise ValueError(f"crop_pct {self.crop_pct} makes another resize of {self.size} than {self.resize}")
        return self

    @property
    def pixels(self) -> Pixels:
        """The same at any resolution."""
        return Pixels(self.mean, self.std, self.interpolation, self.crop_pct)

    @classmethod
    def of(cls, transform: Compose, pixels: Pixels = IMAGENET) -> Preprocess:
        """What one of timm's transforms for evaluation does, made from `pixels`."""
        from torchvision.transforms import CenterCrop, Normalize, Resize

        resize, crop, _, normalize = transform.transforms
        if not (isinstance(resize, Resize) and isinstance(crop, CenterCrop) and isinstance(normalize, Normalize)):
            raise TypeError(f"no resize, centre crop and normalisation: {transform}")
        return cls(
            resize=resize.size,
            size=crop.size[0],
            interpolation=resize.interpolation.value,
            mean=_colour(normalize.mean),
            std=_colour(normalize.std),
            crop_pct=pixels.crop_pct,
        )

    @classmethod
    def own(cls, resolution: int, pixels: Pixels = IMAGENET) -> Preprocess:
        """What vitnas validates with at R = `resolution` pixels a side."""
        return cls(
            resize=math.floor(resolution / pixels.crop_pct),
            size=resolution,
            interpolation=pixels.interpolation,
            mean=_colour(pixels.mean),
            std=_colour(pixels.std),
            crop_pct=pixels.crop_pct,
        )


def _crop_of(size: int, resize: int) -> float:
    """ImageNet's share of an image, where that is the one that was used, or else what comes to the same at `size`."""
    if math.floor(size / IMAGENET.crop_pct) == resize:
        return IMAGENET.crop_pct
    share = min(1.0, size / resize)
    return share if math.floor(size / share) == resize else math.nextafter(share, 0)


class Accuracy(BaseModel):
    """top1: percent; ci: its 95% interval; data: the name of what it was counted on."""

    model_config = ConfigDict(frozen=True)

    top1: Percent
    ci: tuple[Percent, Percent]
    images: Count
    data: str

    @classmethod
    def counted(cls, top1: float, images: int, data: str) -> Accuracy:
        """With the interval that so many images leave."""
        from nas.intervals import of_share

        interval = of_share(top1, images)
        return cls(top1=top1, ci=(interval.low, interval.high), images=images, data=data)


class Latency(BaseModel):
    """ms: the median; ci: its 95% interval."""

    model_config = ConfigDict(frozen=True)

    ms: Milliseconds
    ci: tuple[FiniteFloat, FiniteFloat]
    device: str
    runtime: str
    precision: str
    threads: Count
    batch_size: Count
    cpu: str | None = None


class Card(BaseModel):
    """classes: names in the order of the logits. None: not known, as of random weights. in_graph: whether the file
    takes bytes (B, R, R, 3) and normalises them itself, as `preprocess` says. probabilities: whether its output is."""

    model_config = ConfigDict(frozen=True)

    preprocess: Preprocess | None = None
    classes: list[Name] | None = None
    accuracy: Accuracy | None = None
    latency: Latency | None = None
    in_graph: bool = False
    probabilities: bool = False

    @property
    def pixels(self) -> Pixels:
        """ImageNet's where nothing says them."""
        return self.preprocess.pixels if self.preprocess else IMAGENET

    def of_file(self, options: FileOptions) -> Card:
        """Of the same network's file, written as `options` say. What was measured with other ones is left out: the
        accuracy where the precision differs, the latency where anything does."""
        latency = self.latency
        preprocess = self.preprocess and self.preprocess.model_copy(
            update={"layout": "NHWC" if options.in_graph else "NCHW"}
        )
        return self.model_copy(
            update={
                "preprocess": preprocess,
                "accuracy": self.accuracy if options.precision == "fp32" else None,
                "latency": latency if latency and options == replace(PLAIN, batch_size=latency.batch_size) else None,
                "in_graph": options.in_graph,
                "probabilities": options.probabilities,
            }
        )

    @classmethod
    def of(cls, data: ImageData, top1: float | None = None, images: int = 0, part: str = "") -> Card:
        """Of a network trained on `data`, whose transforms are those at its resolution. top1: percent of `images`, the
        `part` of the data (validation where it is not named)."""
        accuracy = None
        if top1 is not None:
            accuracy = Accuracy.counted(top1, images, f"{data.name}, {part}" if part else data.name)
        classes = [name.encode(errors="surrogateescape").decode(errors="replace") for name in data.classes]
        return cls(preprocess=Preprocess.of(data.val.transform, data.pixels), classes=classes, accuracy=accuracy)

    @classmethod
    def untrained(cls, resolution: int) -> Card:
        """Of random weights."""
        return cls(preprocess=Preprocess.own(resolution))

    @classmethod
    def timm(cls, network: Arch | TimmNetwork) -> Card:
        """Of timm's pretrained weights for a network."""
        from timm.data.imagenet_info import ImageNetInfo

        preprocess = Preprocess.own(network.resolution, pixels_of(network, "timm"))
        info = ImageNetInfo()
        classes = [info.index_to_description(i) for i in range(info.num_classes())]
        return cls(preprocess=preprocess, classes=classes if network.num_classes == len(classes) else None)

    @classmethod
    def of_form(cls, form: TimmForm) -> Card:
        """Of what timm writes beside weights.

        Raises:
            UserError: images that are prepared in a way that vitnas does not know.
        """
        told = form.pretrained_cfg
        try:
            preprocess = Preprocess.model_validate(
                {
                    "resize": form.resize,
                    "size": told.input_size[-1],
                    "interpolation": told.interpolation,
                    "mean": _colour(told.mean),
                    "std": _colour(told.std),
                    "crop_pct": told.crop_pct,
                }
            )
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "crop_pct"
            raise UserError(f"{CONFIG}: {field} {first['input']!r}: {first['msg']}") from None
        return cls(preprocess=preprocess, classes=list(form.labels) if form.labels else None)

    @classmethod
    def read(cls, path: Path) -> Card:
        """Of an ONNX file, or of a folder: its model.onnx's, or what lies beside where that cannot be read or says
        nothing, as an earlier version's; its accuracy is then that in metrics.json. Of a repository of timm's on the
        hub, what config.json says.

        Raises:
            UserError: a file that cannot be read.
        """
        if path.is_dir():
            with suppress(UserError):
                card = cls.read(path / "model.onnx")
                if card.preprocess is not None:
                    return card
            preprocess, labels = _text(path / PREPROCESS), _text(path / LABELS)
            if preprocess is None and labels is None and (path / CONFIG).is_file():
                return cls.of_form(TimmForm.read(path / CONFIG, str(path / CONFIG)))
            found = {
                "preprocess": "null" if preprocess is None else preprocess,
                "classes": json.dumps(None if labels is None else labels.splitlines()),
            }
            found = {**_measured(path / "metrics.json"), **{key: text for key, text in found.items() if text != "null"}}
        else:
            return cls.of_metadata(metadata_of(load_onnx(path)), path)
        return cls._parsed(found, f"{path / PREPROCESS} or metrics.json")

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str], path: Path) -> Card:
        """Of an ONNX file's metadata. path: how a message calls the file.

        Raises:
            UserError: they are damaged.
        """
        return cls._parsed({key.removeprefix(PREFIX): value for key, value in metadata.items()}, str(path))

    @classmethod
    def _parsed(cls, found: Mapping[str, str], place: str) -> Card:
        try:
            return cls(**{key: json.loads(found[key]) for key in cls.model_fields if key in found})
        except (ValueError, RecursionError):
            raise UserError(
                f"{place} is damaged: what it says of the network cannot be read; export it again"
            ) from None

    def metadata(self) -> dict[str, str]:
        """What an ONNX file holds of it."""
        known = self.model_dump(exclude_none=True).items()
        return {f"{PREFIX}{key}": json.dumps(value) for key, value in known if value is not False}

    def write(self, folder: Path) -> None:
        """Write preprocess.json and labels.txt; what is not known has no file afterwards."""
        inside = {IN_GRAPH: True} if self.in_graph else {}
        texts = {
            PREPROCESS: self.preprocess and json.dumps(self.preprocess.model_dump() | inside, indent=1),
            LABELS: self.classes and "".join(f"{' '.join(name.splitlines())}\n" for name in self.classes),
        }
        for name, text in texts.items():
            if text:
                replace_file(folder / name, text)
            else:
                (folder / name).unlink(missing_ok=True)


def described(folder: Path) -> bool:
    """Whether a folder holds a network's document, so that what lies beside it is that network's."""
    return any((folder / name).is_file() for name in (ARCH, CONFIG))


def pixels_of(network: Arch | TimmNetwork, weights: str | Path | None) -> Pixels:
    """What a network's images are made into: as its weights were trained with.

    Args:
        weights: "timm", a file, or None for random ones, which have ImageNet's. What a file wants is told by the run's
            folder that it lies in, or by a preprocess.json beside it. Where nothing tells it, a network of timm has
            what timm's checkpoint wants, and so has an Arch of as many classes as its own checkpoint, which the file
            then likely is. Any other has ImageNet's, as vitnas trains it.

    Raises:
        UserError: what lies beside the weights is damaged.
    """
    from search_spaces import Arch
    from search_spaces.checkpoints import WeightsError
    from search_spaces.weights import timm_name

    if weights is None:
        return IMAGENET
    if str(weights) != "timm":
        told = _told_beside(Path(weights))
        if told is not None:
            return told.pixels
    try:
        config = _config_of_timm(timm_name(network) if isinstance(network, Arch) else network.name)
    except WeightsError:
        return IMAGENET
    if isinstance(network, Arch) and str(weights) != "timm" and network.num_classes != config.num_classes:
        return IMAGENET
    return Pixels.of_timm(config)


def _told_beside(weights: Path) -> Preprocess | None:
    beside = weights.name == "model.safetensors" or (weights.parent / PREPROCESS).is_file()
    return Card.read(weights.parent).preprocess if beside and weights.is_file() else None


def _config_of_timm(name: str) -> PretrainedCfg:
    from timm import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    if config is None:
        raise UserError(f"timm does not say what images {name} takes")
    return config


def _text(path: Path) -> str | None:
    try:
        return path.read_text() if path.is_file() else None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is no text; export the network again") from None


def _measured(path: Path) -> dict[str, str]:
    """What a training's metrics.json says of its network, each as JSON."""
    found = {}
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        metrics = json.loads(path.read_text())
        if "class_names" in metrics["data"]:
            found["classes"] = json.dumps(metrics["data"]["class_names"])
        top1, images = (metrics["final"][key] for key in ("top1", "val_images"))
        found["accuracy"] = Accuracy.counted(top1, images, metrics["data"]["name"]).model_dump_json()
    return found


def metadata_of(model: ModelProto) -> dict[str, str]:
    return {prop.key: prop.value for prop in model.metadata_props}


def load_onnx(path: Path) -> ModelProto:
    """An ONNX file without weights that lie beside it.

    Raises:
        UserError: it is none.
    """
    model = read_model(path)
    try:
        metadata_of(model)
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: what it says of the network is no text; export it again") from None
    return model
