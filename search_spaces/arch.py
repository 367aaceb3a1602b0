"""The Arch: a small JSON document that fully determines a network.

Every width a network has is a field of its Arch; nothing is derived at build time, so a pruned,
irregular network is just another Arch. Each family file subclasses `Arch` with its own stages and blocks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    import numpy as np

Dim = Annotated[int, Field(ge=1, le=8192)]
Heads = Annotated[int, Field(ge=1, le=64)]
Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Scale = Annotated[float, Field(gt=0, le=64, allow_inf_nan=False)]
Kernel = Literal[1, 3, 5, 7, 9]
MAX_BLOCKS = 64
MAX_STAGES = 6


class ArchError(ValueError):
    """An Arch document that cannot be read or built, in one line."""


class Doc(BaseModel):
    """Base of every part of an Arch: strict types, no unknown keys, immutable, hashable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Attn(Doc):
    """Multi-head attention: `heads` heads of `key_dim` (q and k) and `value_dim` (v) channels each."""

    heads: Heads
    key_dim: Dim
    value_dim: Dim
    scale: Scale


class Ffn(Doc):
    """Two-layer FFN; below a `keep_rate` of 1 it runs on the tokens of largest L2 norm only."""

    hidden: Dim
    keep_rate: Rate


class Arch(Doc):
    """Fields every family has; `from_json` picks the family's subclass."""

    families: ClassVar[dict[str, type[Arch]]] = {}
    width_fields: ClassVar[Mapping[str, str]] = {"embed": "embed_dim", "qk": "key_dim", "v": "value_dim"}
    """Last part of a width's name -> its field in the document, where they differ."""

    version: Literal[1]
    family: str
    resolution: Annotated[int, Field(ge=16, le=512)]
    num_classes: Annotated[int, Field(ge=1, le=100_000)]

    def __init_subclass__(cls, family: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Arch.families[family] = cls

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Accept the `family=` class keyword, already used by `__init_subclass__`."""

    @classmethod
    def from_json(cls, text: str | bytes) -> Arch:
        """Read an Arch document.

        Raises:
            ArchError: not JSON, an unknown family or version, wrong types, unknown keys, sizes out of
                range, or parts that do not fit together.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArchError(f"not a JSON document: {error}") from None
        if not isinstance(raw, dict):
            raise ArchError(f"an Arch is a JSON object, not {type(raw).__name__}")
        family = raw.get("family")
        if not isinstance(family, str) or family not in Arch.families:
            known = ", ".join(sorted(Arch.families))
            raise ArchError(f"unknown family {str(family)[:40]!r} (known: {known})")
        try:
            return Arch.families[family].model_validate_json(text)
        except ValidationError as error:
            raise ArchError(first_fault(error)) from None

    def to_json(self) -> str:
        """The document as indented JSON, ending in a newline."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"

    def digest(self) -> str:
        """SHA-256 of the canonical document, for caches."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some top-level fields changed.

        Raises:
            ArchError: the changed document does not hold together.
        """
        try:
            return type(self).model_validate({**dict(self), **changes})
        except ValidationError as error:
            raise ArchError(first_fault(error)) from None

    def _read(self, raw: Any) -> Self:
        """The Arch of a changed document of this one's family."""
        try:
            return type(self).model_validate_json(json.dumps(raw))
        except ValidationError as error:
            raise ArchError(first_fault(error)) from None

    def resized(self, units: Mapping[str, np.ndarray]) -> Self:
        """The Arch whose widths hold `units` of this one's: width name -> unit numbers, ascending along the network's
        own order, `widths.NEW` for new units; 2-D with one row per head. What is tied to a width follows it.

        Raises:
            ArchError: the changed document does not hold together.
        """
        raw = self.model_dump(mode="json")
        for name, chosen in units.items():
            *path, last = name.split(".")
            part = part_at(raw, path)
            key = int(last) if isinstance(part, list) else self.width_fields.get(last, last)
            if not isinstance(part[key], list):
                part[key] = chosen.shape[-1]
        self._follow(raw, units)
        return self._read(raw)

    def _follow(self, raw: dict[str, Any], units: Mapping[str, np.ndarray]) -> None:
        """Adjust, in the resized document, what a family ties to its widths."""

    def at(self, resolution: int) -> Self:
        """The same widths at another input resolution. Windows keep their number: their size follows the grid's.

        Raises:
            ArchError: a resolution out of range, or whose grids cannot be cut into the family's patches or windows.
        """
        raw = self.model_dump(mode="json") | {"resolution": resolution}
        if resolution != self.resolution:
            self._rescale(raw)
        return self._read(raw)

    def _rescale(self, raw: dict[str, Any]) -> None:
        """Adjust, in the document at another resolution, what a family ties to its grids."""

    def without(self, branches: Collection[str]) -> tuple[Self, dict[str, str]]:
        """The Arch without some residual branches, named by their paths ("stages.1.blocks.0.ffn"). A block left with
        none goes too, unless it is its stage's first.

        Returns:
            The Arch, and each block's path in it -> its path in this one.

        Raises:
            ArchError: a branch the network cannot do without.
        """
        raw = self.model_dump(mode="json")
        for branch in branches:
            *path, last = branch.split(".")
            part = part_at(raw, path)
            part[last] = False if last == "conv" else None
        origins: dict[str, str] = {}
        for prefix, stage in [(f"stages.{i}.", s) for i, s in enumerate(raw.get("stages", ()))] or [("", raw)]:
            left = [i for i, block in enumerate(stage["blocks"]) if i == 0 or not _empty(block)]
            stage["blocks"] = [stage["blocks"][i] for i in left]
            origins |= {f"{prefix}blocks.{ours}": f"{prefix}blocks.{theirs}" for ours, theirs in enumerate(left)}
        return self._read(raw), origins

    def summary(self) -> list[StageSummary]:
        """One row a stage in the vocabulary of the five axes."""
        raise NotImplementedError


def part_at(raw: Any, path: Sequence[str]) -> Any:
    """The part of a document at a path of keys and list positions."""
    for key in path:
        raw = raw[int(key) if isinstance(raw, list) else key]
    return raw


def attentions(documents: Iterable[Any], stage: int) -> Iterator[tuple[int, Any, Any]]:
    """(block, its attention, the document) for every block with attention in a stage of some documents."""
    for raw in documents:
        for j, block in enumerate(raw["stages"][stage]["blocks"]):
            if block["attn"]:
                yield j, block["attn"], raw


def _empty(part: Any) -> bool:
    """Whether a part of a block's document holds no branch, and drops no token that one had ranked."""
    if isinstance(part, dict):
        branches = [value for key, value in part.items() if key not in ("keep_rate", "fuse", "merge")]
        return part.get("keep_rate", 1) == 1 and all(map(_empty, branches))
    return all(map(_empty, part)) if isinstance(part, list) else part is None or part is False


class StageSummary(Doc):
    """A stage along the five axes."""

    embed_dim: int
    depth: int
    """Number of blocks."""
    heads: float
    """Mean over the blocks with attention; 0 without any."""
    key_dim: float
    """Mean over the blocks with attention; 0 without any."""
    attention_share: float
    """Share of the blocks that have attention, 0 to 1."""
    ffn_ratio: float
    """Hidden units of all FFNs / embed_dim / depth."""
    keep_rate: float
    """Mean share of tokens kept."""


def first_fault(error: ValidationError) -> str:
    """Say a pydantic error's first fault in one line, with the number of others."""
    faults = error.errors(include_url=False)
    first = faults[0]
    path = ".".join(str(part) for part in first["loc"])[:200]
    where = "".join(c if c.isprintable() else "?" for c in path)
    message = first["msg"].removeprefix("Value error, ")
    text = f"{where}: {message}" if where else message
    return text + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else "")


def kept(rate: float, tokens: int) -> int:
    """Tokens a keep rate keeps: ceil(rate * tokens), safe against binary rounding (0.55 * 100 is 55)."""
    return min(tokens, max(1, math.ceil(rate * tokens - 1e-6)))


def summarise(embed_dim: int, attns: list[Attn | None], ffn_hidden: list[int], keeps: list[float]) -> StageSummary:
    """Build a stage's summary from its blocks' attentions, summed FFN widths and keep rates."""
    present = [a for a in attns if a is not None]
    depth = len(attns)
    return StageSummary(
        embed_dim=embed_dim,
        depth=depth,
        heads=sum(a.heads for a in present) / len(present) if present else 0.0,
        key_dim=sum(a.key_dim for a in present) / len(present) if present else 0.0,
        attention_share=len(present) / depth if depth else 0.0,
        ffn_ratio=sum(ffn_hidden) / embed_dim / depth if depth else 0.0,
        keep_rate=sum(keeps) / len(keeps) if keeps else 1.0,
    )


def check_downsamples(stages: Sequence[Any]) -> None:
    """Every stage but the first begins with a downsampling.

    Raises:
        ValueError: one that does not, or a first stage that does.
    """
    for i, stage in enumerate(stages):
        if (stage.downsample is None) != (i == 0):
            raise ValueError(f"stages.{i}.downsample: the first stage has none, every other stage has one")
