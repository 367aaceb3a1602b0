"""The folder of a search: what it holds from the start, and what must agree to train in it."""

from __future__ import annotations

import csv
import json
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nas.errors import UserError
from nas.files import replace_file, unwritable
from nas.identity import differences, older

if TYPE_CHECKING:
    import optuna

    from nas.measure.hardware import Hardware
    from nas.measure.runtime import Settings


JOURNAL, HARDWARE, TRAINING_INPUTS = "study.journal", "hardware.json", "lessons.json"
RESULT, TRIALS = "result.json", "trials.csv"


FINAL = "final"
"""Folder of the results of final trainings in a run's: KEY-EPOCHS-seedN.json."""
ELSEWHERE = ("budget_ms", "families", "space", "hardware", "precisions", "throughput_at")
"""What a study must agree on and a training does not depend on."""


def withdraw(study: optuna.Study, folder: Path) -> None:
    """Remove a study that this process has made, if it has no trial and no other worker uses it.

    Left there, it would hold the next command to the same settings.
    """
    from nas.study.trials import alone_in

    def decide() -> None:
        if not study.get_trials(deepcopy=False) and not (folder / "tmp").exists():
            for name in (JOURNAL, f"{JOURNAL}.guard", HARDWARE, TRAINING_INPUTS):
                (folder / name).unlink(missing_ok=True)

    alone_in(study, decide)
    with suppress(OSError):  # it holds something
        folder.rmdir()


def training_inputs(folder: Path, agreed: Mapping[str, object]) -> str:
    """What a folder's trainings depend on, for its `TRAINING_INPUTS`: they are found there by their networks alone.

    Raises:
        UserError: trainings of others are there, though the study may not be: its journal was removed, say; or what
            they depend on is damaged.
    """
    wanted = json.loads(json.dumps({key: value for key, value in agreed.items() if key not in ELSEWHERE}))
    found, path = wanted, folder / TRAINING_INPUTS
    if path.is_file():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{path} is damaged; use --study for a new one")
    elif any((folder / name).exists() for name in ("final", "training", "kept")):
        found = {}
    if older(found, wanted):
        raise UserError(f"{folder} holds trainings of an older vitnas; use --study for a new one")
    if differs := differences(found, wanted):
        raise UserError(f"{folder} holds trainings with {differs}; use --study for a new one")
    return json.dumps(wanted, indent=1)


def quality_in(folder: Path) -> str | None:
    """The tier that a folder's trainings were begun with; None where it has none, or they cannot be read."""
    try:
        found = json.loads((folder / TRAINING_INPUTS).read_text())
    except (OSError, ValueError):
        return None
    return found.get("quality") if isinstance(found, dict) else None


def epochs_in(folder: Path) -> int | None:
    """The epochs of the last rung that a folder's trainings were begun with; None where it has none, or they cannot be
    read."""
    try:
        found = json.loads((folder / TRAINING_INPUTS).read_text())["training"]["epochs"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


def final_epochs_in(folder: Path) -> int | None:
    """The epochs of the final trainings that a folder has; None where it has none, or of several numbers."""
    names = (re.fullmatch(r"[0-9a-f]{16}-(\d+)-seed\d+", path.stem) for path in (folder / FINAL).glob("*.json"))
    found = {int(name[1]) for name in names if name}
    return found.pop() if len(found) == 1 else None


def has_ended(folder: Path, complete: int) -> bool:
    """Whether a folder has the result of a run that came to its end, with a closing run, of so many complete trials."""
    try:
        found = json.loads((folder / RESULT).read_text())
        with (folder / TRIALS).open(newline="") as file:
            told = sum(row["state"] == "complete" for row in csv.DictReader(file))
        return bool(found["final"]) and not found["interrupted"] and told == complete
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return False


def make_folder(folder: Path) -> bool:
    """Create a run's folder and see that it can be written; returns whether it was not there.

    Raises:
        UserError: it cannot.
    """
    made = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
            made = True
        except FileExistsError:
            folder.mkdir(exist_ok=True)  # raises where it is a file
        with tempfile.TemporaryFile(dir=folder):
            pass
        return made
    except OSError as error:
        raise unwritable(folder, error) from None


def write_hardware(folder: Path, settings: Settings) -> Hardware:
    """Describe the measured machine, as it is now, in a run folder's hardware.json; returns the description."""
    from nas.measure.hardware import describe

    described = describe(settings)
    folder.mkdir(parents=True, exist_ok=True)  # its maker may have been refused and removed it, empty
    replace_file(folder / HARDWARE, json.dumps(described, indent=1) + "\n")
    return described
