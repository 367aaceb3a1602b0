"""The search axes: one vocabulary of integer parameters for all families.

Every trial suggests every parameter, each in 0..6; a family scales the index to its own ordered list of options
and ignores the parameters it has no use for. Names and ranges are the same for all families because samplers
only relate parameters that every trial shares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from search_spaces.arch import Arch

if TYPE_CHECKING:
    import numpy as np

LEVELS = 7
STAGES = (1, 2, 3, 4)
PER_STAGE = ("width", "depth", "heads", "mix", "keep")
PARAMETERS = (
    "resolution",
    "form",
    "qk",
    *(f"{axis}_s{stage}" for axis in PER_STAGE for stage in STAGES),
)
KEEPS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Space:
    """A family's axes."""

    options: Mapping[str, Sequence[Any]]
    """Parameter -> ordered options, at most seven; a parameter left out is inactive."""
    arch: Callable[[Values, int], Arch]
    """(value of every active parameter, number of classes) -> Arch. Every combination can be built."""

    def decode(self, params: Mapping[str, int], num_classes: int, resolution: int | None = None) -> Arch:
        """The Arch of a trial's integer parameters; `resolution` stands in for the trial's.

        Raises:
            ArchError: a resolution that the family cannot have. All have the multiples of 32 from 32 to 512.
        """
        values = {name: options[params[name] * len(options) // LEVELS] for name, options in self.options.items()}
        arch = self.arch(values, num_classes)
        return arch if resolution is None else arch.at(resolution)

    def encode(self, values: Values) -> dict[str, int]:
        """Integer parameters of the given option values; inactive ones sit in the middle.

        Raises:
            ValueError: a value that is not among the options.
        """
        params = dict.fromkeys(PARAMETERS, LEVELS // 2)
        for name, options in self.options.items():
            index = list(options).index(values[name])
            params[name] = -(-index * LEVELS // len(options))
        return params


def random_params(rng: np.random.Generator) -> dict[str, int]:
    """Draw every parameter uniformly: a random trial."""
    return {name: int(rng.integers(LEVELS)) for name in PARAMETERS}


def per_stage(axis: str, *values: Any) -> dict[str, Any]:
    """Name one axis's values (or lists of options) for stages 1, 2, ...: {"width_s1": ..., "width_s2": ...}."""
    return {f"{axis}_s{stage}": value for stage, value in zip(STAGES, values, strict=False)}


def with_attention(depth: int, share: float) -> list[bool]:
    """Say which of `depth` blocks carry attention: the last round(share * depth), at least one if share > 0."""
    count = max(1, round(share * depth)) if share > 0 else 0
    return [block >= depth - count for block in range(depth)]


def fingerprint(spaces: Mapping[str, Space]) -> str:
    """Hash parameter names and options to 12 hexadecimal digits: a study continues only on the space it began with."""
    text = json.dumps([PARAMETERS, LEVELS, {name: dict(s.options) for name, s in sorted(spaces.items())}])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
