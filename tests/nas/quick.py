"""What makes real searches short: few rounds of timing, small networks, exports without a child process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nas.search.request import SearchRequest
    from nas.search.seen import Point
    from search_spaces import Arch

SMALLEST = {"efficientvit": "efficientvit_m0", "levit": "levit_128s", "shvit": "shvit_s1"}


def few_rounds(patch: pytest.MonkeyPatch) -> None:
    """Time networks in few rounds, few of them in the closing run, beside two stages of the reference network, and try
    the smallest published ones first."""
    patch.setattr("nas.search.rows.RESERVES", 1)
    patch.setattr("nas.search.rows.MARGINS", ())
    patch.setattr("nas.measure.samples.MAX_ROUNDS", 8)
    patch.setattr("nas.search.closing.CLOSING_ROUNDS", 6)
    patch.setattr("nas.search.closing.MOST_ROUNDS", 12)
    patch.setattr("nas.search.closing.THROUGHPUT_ROUNDS", 3)
    patch.setattr("nas.search.trial.reference_arch", small_reference)
    patch.setattr("nas.search.closing.PRECISION", 1.0)
    patch.setattr("nas.search.closing.rivals_of", lambda request, rows, measured=(): [])
    patch.setattr("nas.search.opening.rungs_of", smallest_published)
    patch.setattr("nas.search.published.published_order", lambda options, _: [SMALLEST[f] for f in options.families])


def smallest_published(request: SearchRequest, family: str) -> Iterator[Point]:
    """The smallest published network of a family, and no ladder."""
    from nas.search.seen import Point
    from search_spaces.api import find_variant
    from search_spaces.registry import FAMILIES

    name = SMALLEST[family]
    yield Point.at(request, family, FAMILIES[family].space.encode(find_variant(name)[1].values), name)


def small_reference() -> Arch:
    """The first two stages of EfficientViT-M0 at 64 px."""
    from search_spaces import Arch, get_arch

    raw = json.loads(get_arch("efficientvit_m0", 10).at(64).to_json())
    return Arch.from_json(json.dumps(raw | {"stages": raw["stages"][:2]}))


def small_shvit(patch: pytest.MonkeyPatch) -> None:
    """Decode every point of SHViT's space, published ones too, to a quarter of its widths and at most two blocks a
    stage."""
    _smaller(patch, "shvit", {"depth": 2})


def small_levit(patch: pytest.MonkeyPatch) -> None:
    """The same of LeViT's, to one block a stage, of two heads."""
    _smaller(patch, "levit", {"depth": 1, "heads": 2})


def _smaller(patch: pytest.MonkeyPatch, name: str, most: dict[str, int]) -> None:
    from search_spaces.registry import FAMILIES

    family = FAMILIES[name]

    def arch(values: Any, num_classes: int) -> Any:
        small = {k: v // 4 for k, v in values.items() if k.startswith("width")}
        small |= {k: min(v, limit) for k, v in values.items() for axis, limit in most.items() if k.startswith(axis)}
        return family.space.arch({**values, **small}, num_classes)

    patch.setitem(FAMILIES, name, replace(family, space=replace(family.space, arch=arch)))


def exports_here(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Export networks in this process, each once; what a child does is tested in test_measure.

    folder: for the files that are kept; processes may share it.
    """
    from nas.export.artifact import Exporter, export_here

    in_a_child = Exporter.call

    def call(self: Any, method: str, settings: Any, stem: Path, images: str | None, **source: Any) -> Path:
        if method != "export" or images is not None:
            return in_a_child(self, method, settings, stem, images, **source)
        key = json.dumps([asdict(settings), source], sort_keys=True)
        kept = folder / hashlib.sha256(key.encode()).hexdigest()
        if not kept.exists():
            made = export_here(settings=asdict(settings), stem=f"{kept}.{os.getpid()}", images=images, **source)["path"]
            Path(made).rename(kept.with_suffix(Path(made).suffix))
            kept.symlink_to(kept.with_suffix(Path(made).suffix).name)
        return Path(shutil.copyfile(kept, f"{stem}{kept.resolve().suffix}"))

    patch.setattr(Exporter, "call", call)


def brief_slices(patch: pytest.MonkeyPatch) -> None:
    """Time networks roughly: few inferences a round."""
    patch.setattr("nas.measure.protocol.WORKER", "brief_worker")


def brief_looks(patch: pytest.MonkeyPatch) -> None:
    """Look for 0.05 s at how busy the machine is."""
    patch.setattr("nas.measure.hardware.SAMPLE_S", 0.05)
    patch.setattr("nas.threads.SAMPLE_S", 0.05)


def blank_plots(patch: pytest.MonkeyPatch) -> None:
    """Draw no plot into a search's report; what it shows is tested in test_report."""
    patch.setattr("nas.search.report.plot_front", lambda outcome: b"")


def short_probes(patch: pytest.MonkeyPatch) -> None:
    """Choose a linear probe's strength among two, by two folds; how it is chosen is tested in test_probe."""
    patch.setattr("nas.training.probe.STRENGTHS", (1.0, 0.1))
    patch.setattr("nas.training.probe.FOLDS", 2)


def program(exporting: Path | None = None) -> str:
    """The command with few rounds and small networks, for a process of its own; its words follow.

    exporting: the folder of `exports_here`, for a process that exports by itself.
    """
    lines = [
        f"import sys, pathlib; sys.path.insert(0, {str(Path(__file__).parent)!r}); import pytest, quick",
        "patch = pytest.MonkeyPatch(); quick.few_rounds(patch); quick.brief_looks(patch)",
        "quick.small_shvit(patch); quick.small_levit(patch)",
    ]
    if exporting is not None:
        lines.append(f"quick.exports_here(patch, pathlib.Path({str(exporting)!r}))")
    return "; ".join([*lines, "from nas.cli.app import main", "main()"])
