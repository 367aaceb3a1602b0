"""What a search is asked to do, and what must agree to continue its study."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from nas.data.inputs import identity
from nas.errors import UserError
from nas.export.options import PLAIN, FileOptions
from nas.export.quantize import MAX_DROP, check_max_drop
from nas.measure.budget import Limits
from nas.measure.device import check_settings, default_threads, device_label
from nas.measure.runtime import LOWER, RUNTIMES, Settings
from nas.search.folder import JOURNAL

if TYPE_CHECKING:
    from pydantic import JsonValue

    from nas.data.dataset import ImageData
    from nas.networks.targets import Target
    from nas.quality.plan import TrainingPlan
    from search_spaces import Arch

MOST_CLASSES = 100_000
RESOLUTIONS = range(32, 513, 32)


@dataclass(frozen=True)
class SearchRequest:
    """What a search is asked to do."""

    budget_ms: float
    """Latency budget in ms, above 0."""
    settings: Settings = field(default_factory=Settings)
    """Device, runtime, precision, threads and batch size that latency is measured with."""
    families: tuple[str, ...] = ()
    """Names of the families to search; empty: all of them."""
    trials: int = 100
    """Total number of trials, earlier runs included; 1 or more."""
    timeout_s: float | None = None
    """Seconds after which no trial is started; None: no limit."""
    study: str = ""
    """Name of the study, and of its folder in `out`; empty: `default_study`."""
    out: Path = Path("runs")
    """Folder that holds the run's folder."""
    storage: str | None = None
    """URL of the database that workers share; None: a journal file in the run's folder."""
    sampler: str = "auto"
    """auto, gp, tpe, nsga2 or random."""
    seed: int | None = None
    """Seed of the sampler, of data splits and of trainings; None: the sampler's is random, the others are 0."""
    num_classes: int = 1000
    """Classes of the networks' head, 1 to 100,000; with a plan, those of its images."""
    quality: str = "auto"
    """Name of the tier that estimates quality (`nas.quality.tiers.TIERS`); auto: `inherit` where the plan has a parent,
    `race` with another plan, else `prior`."""
    resolution: int | None = None
    """Input resolution of all networks in px, a multiple of 32 from 32 to 512; None: it is searched."""
    plan: TrainingPlan | None = None
    """How candidates are trained; None for a tier that trains none."""
    throughput_at: int | None = None
    """Batch size of the throughput that is the second objective; None: that of `settings`."""
    against: tuple[Target, ...] = ()
    """Networks to measure beside the finalists in the closing run; no .onnx files."""
    max_drop: float = MAX_DROP
    """Points of top-1 that a lower precision may cost a network of the closing run on held-out images, where the search
    trains."""
    cache: bool = True
    """Whether to use latencies that were measured earlier on this machine."""
    limits: Limits = field(default_factory=Limits)
    """What a network may need beside time; one over them is infeasible."""
    file: FileOptions = PLAIN
    """How best/model.onnx is written; unless it takes any batch, it has that of `settings`."""
    lower: tuple[str, ...] = ()
    """Precisions that a trial tries after that of the settings, until its network surely meets the budget; see
    `nas.search.precision.ladder`."""
    train_devices: tuple[str, ...] = ()
    """Where networks train: cpu, cuda (every GPU), cuda:N, GPU-UUID; empty: every GPU that this process may see, or the
    CPU. Not what latency is measured on."""
    train_threads: int | None = None
    """CPU threads of trainings; None: the CPUs that are idle, adjusted as others come and go."""
    train_processes: int = 1
    """Processes that make a full training together, at the end and for a validation: each on one of the training
    devices, or all on the CPU."""
    workers: int | None = None
    """Processes that this search starts to train what it measures, one a training device; 0: it trains by itself.
    None: as many as there are training devices, where there are several or the measured device is another machine's;
    else 0."""
    only: Literal["measure", "train"] | None = None
    """What this process does of a search that others share: measure, and end it, while others train; or train alone
    (`vitnas.train_measured`). None: both."""

    def __post_init__(self) -> None:
        from search_spaces.registry import FAMILIES

        if not isinstance(self.budget_ms, Real) or not 0 < self.budget_ms < math.inf:
            raise UserError(f"budget_ms is {self.budget_ms!r}: give a number of milliseconds above 0")
        for name in self.families:
            if name not in FAMILIES:
                raise UserError(f"unknown family {name!r}: choose from {', '.join(FAMILIES)}")
        object.__setattr__(self, "out", Path(self.out))
        if not self.families:
            object.__setattr__(self, "families", tuple(FAMILIES))
        if self.quality == "auto":
            tier = "prior" if self.plan is None else "race" if self.plan.parent is None else "inherit"
            object.__setattr__(self, "quality", tier)
        if not self.study:
            object.__setattr__(self, "study", default_study(self))

    @property
    def precisions(self) -> tuple[str, ...]:
        """All that a network is tried in, in order."""
        return (self.settings.precision, *self.lower)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.out / self.study

    @property
    def trains(self) -> bool:
        """Whether this process trains; else it waits for others."""
        return self.only != "measure" and not self.workers

    def check(self) -> None:
        """Check every value that can be checked without reading images or opening the study.

        Raises:
            UserError: a value out of range, a name that cannot be a folder's, or settings that cannot be measured.
        """
        if self.trials < 1:
            raise UserError(f"--trials is {self.trials}: give 1 or more")
        if not 1 <= self.num_classes <= MOST_CLASSES:
            raise UserError(f"--num-classes is {self.num_classes}: give 1 to {MOST_CLASSES}")
        if self.resolution is not None and self.resolution not in RESOLUTIONS:
            raise UserError(f"--resolution is {self.resolution}: give a multiple of 32 from 32 to 512")
        if not self.study.strip(".") or "/" in self.study or "\0" in self.study:
            raise UserError(f"--study {self.study!r} cannot be a folder's name")
        for target in self.against:
            if target.onnx:
                raise UserError(f"--against {target.label}: give a published name, an arch.json or timm/NAME")
        if self.plan is not None:
            self.plan.check()
        check_max_drop(self.max_drop, any(each in LOWER for each in self.precisions) and self.plan is not None)
        if self.lower and self.plan is None:
            raise UserError("--precision auto needs --data: images to judge lower precisions by")
        self._check_processes()
        if self.only == "train":
            return  # the measured device is others'
        for precision in self.precisions:
            check_settings(replace(self.settings, precision=precision))
        if self.limits.file_mb is not None and RUNTIMES[self.settings.runtime].artifact != "onnx":
            able = " or ".join(name for name, each in RUNTIMES.items() if each.artifact == "onnx")
            raise UserError(f"--size-budget: runtime {self.settings.runtime} loads no file; use {able}")
        self.file.check(self.precisions if RUNTIMES[self.settings.runtime].artifact == "onnx" else ())
        if self.throughput_at is not None:
            check_settings(replace(self.settings, batch_size=self.throughput_at))

    def _check_processes(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise UserError(f"--workers is {self.workers}: give 0 or more, or auto")
        for option, given in (
            ("--only", self.only),
            ("--workers", self.workers),
            ("--train-processes", self.train_processes != 1),
            ("--train-device", self.train_devices),
        ):
            if given and self.plan is None:
                raise UserError(f"{option} needs --data: without images nothing is trained")
            if given and option != "--train-device" and self.quality == "supernet":
                raise UserError(f"{option}: --quality supernet trains one network for all of a family, in one process")
        if self.train_processes != 1 and self.only == "measure":
            raise UserError("--train-processes: --only measure trains nothing")
        if (self.train_devices and self.only != "measure") or self.train_processes != 1:
            from nas.training.device import together_on, training_devices

            together_on(training_devices(self.train_devices), self.train_processes)
        if self.only and self.workers:
            raise UserError("--only and --workers: give one of them")

    def space(self) -> str:
        """A digest of the axes that its families are searched along."""
        from search_spaces.registry import FAMILIES
        from search_spaces.space import fingerprint

        return fingerprint({name: FAMILIES[name].space for name in self.families})

    def identity(self, data: ImageData | None = None) -> dict[str, JsonValue]:
        """What must agree for a command to continue a study, as the study stores it.

        Networks and images count by their content, so a renamed or moved folder is the same input.

        Args:
            data: the images that candidates train on, with a `plan`.

        Returns:
            Without the hardware where this process only trains.

        Raises:
            UserError: weights of the parent that cannot be read.
        """
        from nas.measure.hardware import fingerprint

        agreed: dict[str, JsonValue] = {
            "budget_ms": self.budget_ms,
            "families": [*sorted(self.families)],
            "space": self.space(),
            "num_classes": self.num_classes,
            "quality": self.quality,
        }
        if self.lower:
            agreed["precisions"] = [*self.precisions]
        if self.only != "train":
            agreed["hardware"] = cast("dict[str, JsonValue]", fingerprint(self.settings))
        if self.resolution is not None:
            agreed["resolution"] = self.resolution
        if self.throughput_at is not None:
            agreed["throughput_at"] = self.throughput_at
        if self.limits != Limits():
            agreed["limits"] = {"memory_mb": self.limits.memory_mb, "file_mb": self.limits.file_mb}
        if self.plan is not None:
            agreed["training"] = {
                "train_images": self.plan.images,
                "epochs": self.plan.epochs,
                "seed": self.seed or 0,
            }
            agreed |= identity(data, parent=_parent(self.plan.parent))
        return agreed


def default_study(request: SearchRequest) -> str:
    """A study's name: device, runtime, budget, families, and every other setting that is not the default."""
    from search_spaces.registry import FAMILIES

    settings = request.settings
    precision = "auto" if request.lower else settings.precision
    usual = settings.threads if request.only == "train" and not settings.threads else default_threads(settings.device)
    parts = [
        device_label(settings.device),
        settings.runtime if precision == "fp32" else f"{settings.runtime}-{precision}",
        f"{request.budget_ms:g}ms",
        "all" if set(request.families) == set(FAMILIES) else "+".join(sorted(request.families)),
    ]
    for form, value, default in (
        ("{}t", settings.threads, usual),
        ("b{}", settings.batch_size, 1),
        ("at{}", request.throughput_at, None),
        ("{:g}MB-memory", request.limits.memory_mb, None),
        ("{:g}MB-file", request.limits.file_mb, None),
        ("{}px", request.resolution, None),
        ("{}c", request.num_classes, 1000),
        ("{}", request.quality, "prior"),
    ):
        if value != default:
            parts.append(form.format(value))
    return "-".join(parts)


def storage_of(request: SearchRequest) -> str | Path:
    """URL of the study's database, or path of its journal."""
    return request.storage or request.folder / JOURNAL


def _parent(name: str | None) -> tuple[Arch | str, str | Path | None] | None:
    """The Arch of a trained network, and where its weights are; None without a name."""
    from nas.networks.targets import find_target

    if name is None:
        return None
    target = find_target(name)
    return None if target.arch is None else (target.arch, target.weights or "timm")
