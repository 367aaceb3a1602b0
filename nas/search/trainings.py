"""The trainings that a study knows of, and the trainer that a search opens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nas.data.lineage import seen_among, seen_by
from nas.errors import UserError
from nas.networks.store import Store
from nas.quality.parent import find_parent, parent_weights
from nas.quality.tier import TrainingRecord
from nas.quality.trainer import CandidateTrainer

if TYPE_CHECKING:
    import optuna
    from pydantic import JsonValue

    from nas.data.dataset import ImageData
    from nas.quality.plan import TrainingPlan
    from nas.quality.surrogate import TrainedNetwork

COMPLETED, TUNED = "completed ", "tuned "
"""With a candidate's key, the study attributes that hold the rungs of a training made after its trial had ended, and
whether its tuning was kept."""


def open_trainer(
    plan: TrainingPlan,
    data: ImageData,
    study: optuna.Study,
    folder: Path,
    seed: int,
    resolution: int | None,
    progress: Callable[[str, int, int], None],
    say: Callable[[str], None],
    devices: Sequence[str] = (),
    processes: int = 1,
) -> CandidateTrainer:
    """What trains a search's candidates.

    Args:
        study: its earlier trainings are looked up there.
        folder: where unfinished trainings are kept.
        resolution: of all networks; None where the search varies it.
        progress: called with what is trained, and images done and in total.
        devices: as `nas.training.device.training_devices`, of which this process takes the first.
        processes: that make full trainings together, each on one of the devices; on the CPU all.

    Raises:
        UserError: a parent without weights, or a device that is not here.
    """
    from nas.training.device import together_on, training_devices

    found = training_devices(devices)
    device = found[0].name
    known = seen_by(parent_weights(plan.parent))
    trainer = CandidateTrainer(
        data,
        plan,
        seed,
        device,
        folder,
        lambda: results_of(study),
        progress,
        resolution=resolution,
        seen=None if known is None else seen_among(data.train, known),
        weights=Store(plan.weights_from, say),
        say=say,
        together=together_on(found, processes) if processes > 1 else (),
    )
    say(
        f"training on {device}: {trainer.used:,} of {len(data.train):,} images of {data.name} "
        f"({len(data.classes)} classes), judged on {trainer.judged:,} others of them"
    )
    if plan.parent is None:
        return trainer
    return replace(trainer, parent=find_parent(plan.parent, trainer, say))


def results_of(study: optuna.Study) -> list[TrainedNetwork]:
    """Every network the study has trained, however long."""
    import numpy as np

    from nas.quality.surrogate import TrainedNetwork

    completed, tuned = collected(study, COMPLETED), collected(study, TUNED)
    found = {}
    for trial in study.get_trials(deepcopy=False):
        detail = trial.user_attrs.get("detail", {})
        if not detail.get("training"):
            continue
        key = detail.get("key", detail["digest"])
        kept = detail["training"] | ({"rungs": completed[key]} if key in completed else {})
        kept |= {"tuned": tuned[key]} if key in tuned else {}
        try:
            training = TrainingRecord.from_json(kept)
        except ValueError:
            raise UserError(
                f"trial {trial.number} of the study has a damaged training: use --study for a new one"
            ) from None
        if training.rungs:
            found[key] = TrainedNetwork(key, np.array(training.features), training.rungs, training.tuned)
    return list(found.values())


def collected(study: optuna.Study, prefix: str) -> dict[str, JsonValue]:
    """A study's attributes whose keys have a prefix, by the rest of the key.

    What several machines add to lies under a key each: in one attribute they would overwrite each other's.
    """
    return {key.removeprefix(prefix): value for key, value in study.user_attrs.items() if key.startswith(prefix)}
