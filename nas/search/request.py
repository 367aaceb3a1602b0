"""What a search is asked to do, and what must agree to continue its study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.data.inputs import identity
from nas.measure.device import device_label
from nas.measure.runtime import Settings
from nas.search.folder import JOURNAL

if TYPE_CHECKING:
    from nas.data.dataset import ImageData
    from nas.networks.targets import Target
    from nas.quality.plan import TrainingPlan
    from search_spaces import Arch


@dataclass(frozen=True)
class SearchRequest:
    """What a search is asked to do.

    resolution: of all networks (None: it is searched). plan: how it trains. throughput_at: batch size whose
    throughput is the second objective (None: that of the latency). against: networks of the closing run (`targets`).
    cache: whether latencies measured earlier on this machine count.
    """

    budget_ms: float
    settings: Settings
    families: tuple[str, ...]
    trials: int
    timeout_s: float | None
    study: str
    out: Path
    storage: str | None
    sampler: str
    seed: int | None
    num_classes: int
    quality: str = "prior"
    resolution: int | None = None
    plan: TrainingPlan | None = None
    throughput_at: int | None = None
    against: tuple[Target, ...] = ()
    cache: bool = True

    @property
    def folder(self) -> Path:
        return self.out / self.study


def default_study(options: Mapping[str, Any]) -> str:
    """Study name from device, runtime, budget, families, and whatever else is not as it is by default."""
    from nas.measure.device import default_threads
    from search_spaces.registry import FAMILIES

    settings = options["settings"]
    parts = [
        device_label(settings.device),
        settings.runtime if settings.precision == "fp32" else f"{settings.runtime}-{settings.precision}",
        f"{options['budget_ms']:g}ms",
        "all" if set(options["families"]) == set(FAMILIES) else "+".join(sorted(options["families"])),
    ]
    for form, value, usual in (
        ("{}t", settings.threads, default_threads(settings.device)),
        ("b{}", settings.batch_size, 1),
        ("at{}", options.get("throughput_at"), None),
        ("{}px", options.get("resolution"), None),
        ("{}c", options.get("num_classes") or 1000, 1000),
        ("{}", options["quality"], "prior"),
    ):
        if value != usual:
            parts.append(form.format(value))
    return "-".join(parts)


def meta(options: SearchRequest, data: ImageData | None = None) -> dict[str, Any]:
    """What must agree for a command to continue a study; `data` are the images of its plan."""
    from nas.measure.hardware import fingerprint
    from search_spaces.registry import FAMILIES
    from search_spaces.space import fingerprint as space_fingerprint

    agreed = {
        "budget_ms": options.budget_ms,
        "families": sorted(options.families),
        "space": space_fingerprint({name: FAMILIES[name].space for name in options.families}),
        "num_classes": options.num_classes,
        "quality": options.quality,
        "hardware": fingerprint(options.settings),
    }
    if options.resolution is not None:
        agreed["resolution"] = options.resolution
    if options.throughput_at is not None:
        agreed["throughput_at"] = options.throughput_at
    if options.plan is not None:
        plan = options.plan
        agreed["training"] = {
            "train_images": plan.images,
            "epochs": plan.epochs,
            "seed": options.seed or 0,
        }
        agreed |= identity(data, parent=network_of(plan.parent))
    return agreed


def network_of(name: str | None) -> tuple[Arch, str | Path] | None:
    """The Arch of a trained network, and where its weights are; None without a name."""
    from nas.networks.targets import find_target

    if name is None:
        return None
    target = find_target(name)
    return target.arch, target.weights or "timm"


def storage_of(options: SearchRequest) -> str | Path:
    return options.storage or options.folder / JOURNAL
