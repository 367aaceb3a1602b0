"""vitnas from Python: the verbs of the command line as functions of typed requests.

All names are defined in `nas`, and imported when they are first used, so that `import vitnas` loads no PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nas.bench.request import BenchRequest
    from nas.bench.result import BenchResult
    from nas.bench.run import bench
    from nas.errors import UserError
    from nas.evaluate.export import export
    from nas.evaluate.predict import PredictRequest, PredictResult, predict
    from nas.evaluate.preprocess import parse_preprocess
    from nas.evaluate.request import EvaluateRequest
    from nas.evaluate.result import EvaluateResult
    from nas.evaluate.run import evaluate
    from nas.export.options import FileOptions
    from nas.hub.push import push
    from nas.hub.request import PushRequest, PushResult
    from nas.measure.device import settings_for
    from nas.measure.runtime import Settings
    from nas.networks.targets import find_target
    from nas.networks.weights import load
    from nas.prune.records import PruneResult
    from nas.prune.request import PruneRequest, parse_pruning_budget
    from nas.prune.run import prune
    from nas.quality.plan import TrainingPlan
    from nas.search.helping import train_measured
    from nas.search.outcome import Outcome
    from nas.search.request import SearchRequest
    from nas.search.run import search
    from nas.training.request import TrainRequest, choose_recipe
    from nas.training.result import TrainResult
    from nas.training.run import train

__version__ = version("vitnas")

HOMES = {
    "BenchRequest": "nas.bench.request",
    "BenchResult": "nas.bench.result",
    "EvaluateRequest": "nas.evaluate.request",
    "EvaluateResult": "nas.evaluate.result",
    "FileOptions": "nas.export.options",
    "Outcome": "nas.search.outcome",
    "PredictRequest": "nas.evaluate.predict",
    "PredictResult": "nas.evaluate.predict",
    "PruneRequest": "nas.prune.request",
    "PruneResult": "nas.prune.records",
    "PushRequest": "nas.hub.request",
    "PushResult": "nas.hub.request",
    "SearchRequest": "nas.search.request",
    "Settings": "nas.measure.runtime",
    "TrainRequest": "nas.training.request",
    "TrainResult": "nas.training.result",
    "TrainingPlan": "nas.quality.plan",
    "UserError": "nas.errors",
    "bench": "nas.bench.run",
    "choose_recipe": "nas.training.request",
    "evaluate": "nas.evaluate.run",
    "export": "nas.evaluate.export",
    "find_target": "nas.networks.targets",
    "load": "nas.networks.weights",
    "parse_preprocess": "nas.evaluate.preprocess",
    "parse_pruning_budget": "nas.prune.request",
    "predict": "nas.evaluate.predict",
    "prune": "nas.prune.run",
    "push": "nas.hub.push",
    "search": "nas.search.run",
    "settings_for": "nas.measure.device",
    "train": "nas.training.run",
    "train_measured": "nas.search.helping",
}
"""The module that defines each name."""

__all__ = [
    "BenchRequest",
    "BenchResult",
    "EvaluateRequest",
    "EvaluateResult",
    "FileOptions",
    "Outcome",
    "PredictRequest",
    "PredictResult",
    "PruneRequest",
    "PruneResult",
    "PushRequest",
    "PushResult",
    "SearchRequest",
    "Settings",
    "TrainRequest",
    "TrainResult",
    "TrainingPlan",
    "UserError",
    "bench",
    "choose_recipe",
    "evaluate",
    "export",
    "find_target",
    "load",
    "parse_preprocess",
    "parse_pruning_budget",
    "predict",
    "prune",
    "push",
    "search",
    "settings_for",
    "train",
    "train_measured",
]


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'vitnas' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
