"""What may be chosen of an ONNX file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from nas.errors import UserError

if TYPE_CHECKING:
    from pydantic import JsonValue

FilePrecision = Literal["fp32", "fp16", "int8"]
OPSET = 17
LAYER_NORM = 17
"""The first opset whose LayerNormalization is one operator, which sums in float32 in every precision."""
OPSETS = range(13, 21)
"""torch's TorchScript exporter writes up to 20; below 13 it cannot write the token families' reshapes."""


@dataclass(frozen=True)
class FileOptions:
    """How a network is written as ONNX. The defaults are what vitnas writes where nothing is chosen."""

    batch_size: int | None = 1
    """Images that the input holds, 1 or more; None: any number (a dynamic batch)."""
    in_graph: bool = False
    """Whether the file normalises: its input is uint8 (B, R, R, 3), the cropped pixels as they are decoded. Else it is
    float32 (B, 3, R, R), normalised."""
    opset: int = OPSET
    """Of ONNX's operators, one of `OPSETS`."""
    probabilities: bool = False
    """Whether softmax ends the graph: the output is `probabilities` (B, classes), which add up to 1, not `logits`."""
    precision: FilePrecision = "fp32"
    """Of weights and arithmetic. Input and output are in every precision those of fp32."""

    @property
    def plain(self) -> bool:
        """Whether nothing but a static batch size is chosen."""
        return self.batch_size is not None and replace(self, batch_size=1) == FileOptions()

    def identity(self) -> dict[str, JsonValue] | None:
        """What must be equal for a run to go on; None where nothing is chosen. A static batch size is not in it."""
        if self.plain:
            return None
        chosen = asdict(self) | {"dynamic_batch": self.batch_size is None}
        del chosen["batch_size"]
        return chosen

    @classmethod
    def of_identity(cls, found: Mapping[str, Any] | None) -> FileOptions:
        """What `identity` says, for batches of 1 unless it is any; None: nothing is chosen."""
        if found is None:
            return PLAIN
        chosen = {name: value for name, value in found.items() if name != "dynamic_batch"}
        return cls(batch_size=None if found["dynamic_batch"] else 1, **chosen)

    def of_batch(self, batch_size: int) -> FileOptions:
        """The same for batches of this size, unless any are taken."""
        return self if self.batch_size is None else replace(self, batch_size=batch_size)

    @property
    def unfinished(self) -> FileOptions:
        """The same before `nas.export.graph.finish`: normalised pixels in, logits out."""
        return replace(self, in_graph=False, probabilities=False)

    def check(self, lower: Collection[str] | None = None) -> None:
        """Raises UserError for what no file can have.

        lower: of a run's model.onnx, the precisions that the network is written in beside it, with the same options;
        None: it is no run's.
        """
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}: give 1 or more")
        if self.opset not in OPSETS:
            raise UserError(
                f"--opset {self.opset}: give {OPSETS[0]} to {OPSETS[-1]}, which PyTorch writes for every network and "
                "ONNX Runtime and OpenVINO load"
            )
        if "fp16" in (self.precision, *(lower or ())) and self.opset < LAYER_NORM:
            raise UserError(
                f"--precision fp16 needs --opset {LAYER_NORM} or more: below it, normalisation is made of "
                "squares, which float16 cannot hold"
            )
        if self.precision not in get_args(FilePrecision):
            raise UserError(f"--precision {self.precision}: a file is fp32, fp16 or int8")
        if lower is not None and (
            self.precision == "int8" or (self.precision == "fp16" and {"fp16", "int8"} & {*lower})
        ):
            raise UserError(f"a run's model.onnx is not {self.precision}: `vitnas export` makes one of it that is")


PLAIN = FileOptions()
"""Nothing is chosen."""
