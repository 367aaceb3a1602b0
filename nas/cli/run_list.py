"""`vitnas runs`: what the folders under runs/ hold, by their files alone."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, FiniteFloat, InstanceOf, TypeAdapter

from nas.errors import UserError
from nas.quality.tier import told_score
from nas.report.tables import Column, console_of, print_table, prose

Row = dict[str, Any]
"""run: the folder's name. kind: search, train, prune, export or evaluate. budget, best: in words. state: finished,
interrupted, running, or what is damaged. bytes: of all files. changed: the last of them, ISO 8601."""
COMPLETE = 1
"""A trial's state in Optuna's journal, and below the operations that set it and a study's attributes."""
SET_STATE, SET_STUDY = 6, 2
COUNTED = re.compile(rb'"op_code": ?[26]\b')
COLUMNS = (
    Column("run", label=True, fold=0),
    Column("kind", label=True, drop=4),
    Column("budget", label=True, drop=5),
    Column("best", label=True, drop=1),
    Column("state", label=True),
    Column("size", drop=2),
    Column("changed", drop=3),
)


BUDGET_MS = TypeAdapter(FiniteFloat)
Text = InstanceOf[str]
"""With lone surrogates too, which names of files may hold."""


class Winner(BaseModel):
    """latency_ms: median. top1: percent, of a full training; quality: the score, percent, where there was none."""

    label: Text
    family: Text
    latency_ms: FiniteFloat
    top1: FiniteFloat | None = None
    quality: FiniteFloat | None = None


class SearchResult(BaseModel):
    """Of a result.json, what is listed of it, as in the records below. winner: None where nothing fits."""

    budget_ms: FiniteFloat
    winner: Winner | None
    interrupted: bool
    failures: list[Any]


class Budget(BaseModel):
    metric: Text
    text: Text


class Accuracy(BaseModel):
    """top1: percent."""

    top1: FiniteFloat | None = None


class Options(BaseModel):
    """unlabelled: the folder of images whose labels were the unpruned network's answers, where there was one."""

    unlabelled: Text | None = None


class Measured(BaseModel):
    """latency_ms: median; None where none was measured. waiting: the samples are those of a wait for a CPU."""

    latency_ms: FiniteFloat | None = None
    waiting: Any = None


class Measuring(BaseModel):
    precision: Text = "fp32"


class Price(BaseModel):
    """top1: percent, in the precision that was measured."""

    top1: FiniteFloat


class PruneResult(BaseModel):
    """Of a prune.json. accuracy: of fp32 weights, by the network's name; kept: that of the one which was kept.
    settings: that latency was measured with; price: None in fp32, or where the accuracy in theirs is not known."""

    model: Text
    budget: Budget
    accuracy: dict[str, Accuracy | None]
    after: Measured
    kept: str | None = None
    failures: list[Any] | None = None
    options: Options = Options()
    settings: Measuring = Measuring()
    price: Price | None = None


class Recipe(BaseModel):
    epochs: int


class TrainResult(BaseModel):
    """Of a metrics.json. epochs: a row each of those that are done. error: why the training failed."""

    model: Text
    recipe: Recipe
    final: Accuracy | None
    epochs: list[Any]
    error: Text | None


class JudgedNetwork(BaseModel):
    label: Text
    top1: FiniteFloat


class EvaluateResult(BaseModel):
    """Of an evaluate.json. results: of each network."""

    results: list[JudgedNetwork] = Field(min_length=1)
    interrupted: bool


class Damaged(Exception):
    """A file that is not what it should be."""


def list_runs(root: Path) -> list[Row]:
    """A row for each folder, the one changed last first.

    Raises:
        UserError: there is no such folder, or it cannot be read.
    """
    try:
        folders = [path for path in root.iterdir() if path.is_dir()]
    except OSError as error:
        raise UserError(f"{root}: {error.strerror}; name the folder that holds the runs") from None
    return sorted(filter(None, map(row_of, folders)), key=lambda row: row["changed"], reverse=True)


def row_of(folder: Path) -> Row | None:
    """What a run's folder holds; a damaged one says what is damaged. None where it has just been removed."""
    try:
        size, changed = weight(folder)
    except OSError:
        return None
    row = {"run": folder.name, "kind": "", "budget": "", "best": "", "state": "no run of vitnas's"}
    try:
        for told in (search_row, prune_row, train_row, export_row, evaluate_row):
            found = told(folder)
            if found is not None:
                if not all(isinstance(value, str) for value in found.values()):
                    raise TypeError
                row |= found
                break
    except Damaged as error:
        row["state"] = f"damaged: {error}"
    except OSError as error:
        row["state"] = f"cannot be read: {error.strerror}"
    except Exception:  # whatever a file holds, the other runs are listed
        row["state"] = "damaged, or written by another vitnas"
    return row | {"bytes": size, "changed": moment(changed)}


def search_row(folder: Path) -> Row | None:
    result, journal = folder / "result.json", folder / "study.journal"
    if result.is_file():
        told = SearchResult.model_validate(read(result))
        best = "nothing fits"
        if winner := told.winner:
            best = f"{winner.label} ({winner.family}), {winner.latency_ms:.2f} ms"
            if winner.top1 is not None:
                best += f", {winner.top1:.1f}% top-1"
            elif winner.quality is not None:
                best += f", score {told_score(winner.quality):.1f}"
        ended = "interrupted" if told.interrupted else "failed in part" if told.failures else "finished"
        return {"kind": "search", "budget": f"{told.budget_ms:g} ms", "best": best, "state": state(folder, ended)}
    if journal.is_file():
        return {"kind": "search", **of_journal(journal), "state": state(folder, "interrupted")}
    if (folder / "hardware.json").is_file():
        return {"kind": "search", "state": state(folder, "interrupted before its end")}
    return None


def of_journal(path: Path) -> Row:
    """Budget and progress of a search that has no result yet; a last line torn by a kill is left out."""
    budget, done, result = "", 0, None
    for line in path.read_bytes().splitlines():
        if not COUNTED.search(line):
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("op_code") == SET_STATE:
            done += entry.get("state") == COMPLETE
        elif entry.get("op_code") == SET_STUDY:
            attributes = entry["user_attr"]
            if "budget_ms" in (attributes.get("vitnas") or {}):
                budget = f"{BUDGET_MS.validate_python(attributes['vitnas']['budget_ms']):g} ms"
            result = attributes.get("result", result)
    if not budget:
        raise Damaged(f"{path.name} holds no study of vitnas's")
    return {"budget": budget, "best": result or f"no result yet, {done} trial{'s' * (done != 1)} measured"}


def prune_row(folder: Path) -> Row | None:
    path = folder / "prune.json"
    if not path.is_file():
        return unfinished(folder, "prune", "budget")
    told = PruneResult.model_validate(read(path))
    found = told.accuracy[told.kept or ("recovered" if told.accuracy.get("recovered") else "pruned")]
    measure = "agreement" if told.options.unlabelled else "top-1"
    latency, accuracy = "", f"{found.top1:.1f}% {measure}" if found else ""
    if told.after.latency_ms is not None and not told.after.waiting:
        precision = told.settings.precision
        lower = f" in {precision}" if precision != "fp32" else ""
        latency = f"{told.after.latency_ms:.2f} ms{lower}"
        if lower and accuracy:
            accuracy = f"{told.price.top1:.1f}% top-1{lower}" if told.price else f"{accuracy} in fp32"
    best = ", ".join(filter(None, (told.model, latency, accuracy)))
    budget = f"{told.budget.metric} {told.budget.text}"
    ended = "failed in part" if told.failures else "finished"
    return {"kind": "prune", "budget": budget, "best": best, "state": state(folder, ended)}


def train_row(folder: Path) -> Row | None:
    path = folder / "metrics.json"
    if not path.is_file() or "recipe" not in (found := read(path)):
        return unfinished(folder, "train", "recipe")
    told = TrainResult.model_validate(found)
    best = told.model + (f", {told.final.top1:.1f}% top-1" if told.final and told.final.top1 is not None else "")
    done, epochs = len(told.epochs), told.recipe.epochs
    ended = "failed" if told.error else "finished" if done >= epochs else f"interrupted, {done} of {epochs} epochs"
    return {"kind": "train", "best": best, "state": state(folder, ended)}


def export_row(folder: Path) -> Row | None:
    if not (folder / "arch.json").is_file():
        return None
    found = read(folder / "arch.json")
    best = f"timm/{found['timm']}" if "timm" in found else found["family"]
    return {"kind": "export", "best": best, "state": "finished"}


def evaluate_row(folder: Path) -> Row | None:
    path = folder / "evaluate.json"
    if not path.is_file():
        return None
    told = EvaluateResult.model_validate(read(path))
    best = max(told.results, key=lambda each: each.top1)
    ended = "interrupted" if told.interrupted else "finished"
    return {"kind": "evaluate", "best": f"{best.label}, {best.top1:.1f}% top-1", "state": state(folder, ended)}


def unfinished(folder: Path, kind: str, option: str) -> Row | None:
    """The row of a command whose state is kept but that has no result, told from others by one of its options."""
    path = folder / "state" / "state.json"
    if not path.is_file():
        return None
    options = read(path)["options"]
    return (
        {"kind": kind, "best": options["model"], "state": state(folder, "interrupted")} if option in options else None
    )


def read(path: Path) -> Any:
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise Damaged(path.name) from None
    if not isinstance(found, Mapping):
        raise Damaged(path.name)
    return found


def state(folder: Path, ended: str) -> str:
    """`running` where a process has the folder."""
    return "running" if running(folder) else ended


def running(folder: Path) -> bool:
    for name in (".lock", ".end.lock"):
        path = folder / name
        if path.is_file() and path.stat().st_size and locked(path):  # one that nobody has is empty, or a killed one's
            return True
    return any(map(locked, (folder / "tmp").glob("vitnas-*")))


def locked(path: Path) -> bool:
    """Whether a process holds a file or folder."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False


def weight(folder: Path) -> tuple[int, float]:
    """Bytes of all files in a folder, and when the last of them changed; what cannot be read does not count."""
    size, changed = 0, folder.stat().st_mtime
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(place, name))
            except OSError:
                continue
            size += found.st_size
            changed = max(changed, found.st_mtime)
    return size, changed


def moment(seconds: float) -> str:
    """ISO 8601; nothing where a file's time is none."""
    try:
        return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return ""


def show_runs(rows: list[Row], root: Path) -> None:
    console = console_of()
    if not rows:
        prose(console, f"There is no run under {root}.")
        return
    told = [
        (row["run"], row["kind"], row["budget"], row["best"], row["state"], size_of(row["bytes"]), when(row["changed"]))
        for row in rows
    ]
    print_table(console, COLUMNS, told)


def size_of(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def when(changed: str) -> str:
    return changed[:16].replace("T", " ")
