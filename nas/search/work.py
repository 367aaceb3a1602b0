"""How the trainings beside the trials are made (`nas.search.tasks`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nas.search.final import complete, train_final
from nas.search.tasks import Task, Tasks, What
from nas.search.validate import measure_one

if TYPE_CHECKING:
    import optuna
    from pydantic import JsonValue

    from nas.quality.tier import TrainedTier
    from nas.search.request import SearchRequest


def open_tasks(
    request: SearchRequest,
    study: optuna.Study,
    tier: TrainedTier,
    trains: bool,
    say: Callable[[str], None],
    phase: Callable[[str, int, int], None] = lambda *_: None,
    take_over: Callable[[], None] | None = None,
) -> Tasks:
    """The trainings of a search beside its trials. trains: this process makes them; else it waits for others. The rest
    as in `Tasks`."""

    def work(task: Task) -> JsonValue:
        with tier.trainer.alone_together() if task.what.full else tier.trainer.alone():
            return _made(request, study, tier, task)

    return Tasks(study, work, trains, say, phase, take_over)


def _made(request: SearchRequest, study: optuna.Study, tier: TrainedTier, task: Task) -> JsonValue:
    match task.what:
        case What.PARENT:
            from nas.quality.race import RaceTier

            assert isinstance(tier, RaceTier)
            tier.parents.tuned(task.candidate.name, task.candidate.network.resolution)
            return None
        case What.COMPLETE:
            complete(study, tier, task.candidate)
            return None
        case What.VALIDATE:
            row: Any = measure_one(tier, task.candidate).to_json()
            found: JsonValue = row
            return found
        case What.TEACHER:
            from nas.quality.race import RaceTier
            from nas.search.teaching import try_teacher

            assert isinstance(tier, RaceTier)
            return try_teacher(tier, task)
        case What.FINAL:
            return train_final(request, tier, task)
