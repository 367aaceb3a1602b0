"""A long command's folder: what is done so far, so that the same command goes on where it was interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, InstanceOf, TypeAdapter, with_config

from nas.errors import UserError
from nas.files import replace_file, sweep_drafts, unwritable
from nas.identity import PIXELS, changed, older

NAMED = ("model", "weights", "data", "unlabelled", "teacher", "teacher_weights", "oracle")
"""Options that name what a run reads: its content must be equal (`Job.agree`), not its name."""

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]
"""Called with a phase, what is done of it and its total."""


@with_config(ConfigDict(extra="forbid"))
@dataclass
class State:
    """What is done so far. network names the saved network that stands; rounds: a row each; origins: a block's path in
    that network -> its path in the first one; phases: seconds; inputs: an `identity` of what the run reads."""

    options: dict[str, Any]
    started: str
    network: str = ""
    rounds: list[dict[str, Any]] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[InstanceOf[str]] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str | None] = field(default_factory=dict)


def default_folder_of(verb: str, model: str, how: str) -> Path:
    """runs/<verb>-<model>-<how>; a colon, which scp takes for a host's, is left out."""
    label = "-".join(
        part
        for part in model.replace("hf-hub:", "hf-hub/").strip("/").split("/")
        if part not in ("", ".", "..", "runs")
    )
    return Path("runs") / f"{verb}-{label.removesuffix('.json')}-{how}"


class Job:
    """options: what must be equal for the folder's run to go on, as JSON has it. device: where networks train. result:
    the file that a finished run leaves. hints: what a refusal says besides, by the option that differs. defaults: what
    options that an older vitnas did not keep were then. as_given: options as a user gives them, which are compared."""

    def __init__(
        self,
        folder: Path,
        options: dict[str, Any],
        say: Say,
        progress: Progress,
        device: str,
        result: str = "prune.json",
        hints: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
        as_given: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda options: options,
    ) -> None:
        self.folder, self.kept, self.device, self.result = folder, folder / "state", device, folder / result
        self._say, self._progress = say, progress
        path = self.kept / "state.json"
        if not path.is_file():
            self.state = State(options, now())
            return
        try:
            self.state = TypeAdapter(State).validate_python(json.loads(path.read_text()))
        except (ValueError, RecursionError):
            raise UserError(
                f"{path} is damaged or not vitnas's: give another --out, or remove it to start again"
            ) from None
        before = as_given({**(defaults or {}), **self.state.options})
        for key, value in as_given(options).items():
            known = before.get(key)
            if known != value and key not in NAMED:
                hint = (hints or {}).get(key, "")
                now_given = "now not given" if value is None else f"not {value}"
                raise UserError(f"{folder} holds another run ({key} {known}, {now_given}): give another --out{hint}")

    def agree(self, inputs: dict[str, str | None]) -> None:
        """Go on only with the inputs that the run was begun with; see `identity`.

        Raises:
            UserError: they hold something else now.
        """
        if not (self.kept / "state.json").is_file():
            self.state.inputs = inputs
        elif not self.state.inputs:
            raise UserError(
                f"{self.folder} was begun by an older vitnas, which kept no record of what it read: give another --out"
            )
        elif older(self.state.inputs, inputs):
            if not self.finished:
                raise UserError(f"{self.folder} was begun by an older vitnas: give another --out")
            self.say(f"{self.folder} was finished by an older vitnas: whether its images were today's is unknown")
        elif self.state.inputs.get(PIXELS) != inputs.get(PIXELS):
            before, after = (each.get(PIXELS) or "ImageNet's" for each in (self.state.inputs, inputs))
            raise UserError(
                f"{self.folder} was begun with images prepared otherwise ({before}; now {after}): give another --out"
            )
        elif what := changed(self.state.inputs, inputs):
            unlabelled = self.state.options.get("unlabelled") and not self.state.options.get("data")
            what = what.replace("--data", "--unlabelled") if unlabelled else what
            raise UserError(f"{self.folder} was begun with another content of {what}: give another --out")
        if self.state.network and not self.finished:
            self.say(f"going on after {self.state.network} in {self.folder}")

    @property
    def finished(self) -> bool:
        return bool(self.state.found.get("finished")) and self.result.is_file()

    def read_result(self, *names: str) -> dict[str, Any]:
        """What a finished run has left, which holds these `names`.

        Raises:
            UserError: the file is damaged.
        """
        try:
            found: dict[str, Any] = json.loads(self.result.read_text())
            return {name: found[name] for name in names} | found
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{self.result} is damaged: give another --out to start again") from None

    def make_folder(self) -> None:
        try:
            self.kept.mkdir(parents=True, exist_ok=True)
            sweep_drafts(self.folder)
        except OSError as error:
            raise unwritable(self.folder, error) from None

    def save(self) -> None:
        replace_file(self.kept / "state.json", json.dumps(asdict(self.state), indent=1))

    def finish(self) -> None:
        """Everything is written: the networks of the single rounds are no longer needed."""
        self.state.found["finished"] = True
        self.save()
        for kept in self.kept.glob("*.safetensors"):
            kept.unlink()

    def say(self, line: str) -> None:
        self._say(line)

    def note(self, line: str) -> None:
        """Tell the user, and the report; a run that goes on does not repeat it."""
        if line not in self.state.notes:
            self.state.notes.append(line)
            self._say(line)

    @contextmanager
    def phase(self, name: str, part: str = "") -> Iterator[Callable[..., None]]:
        """Time a phase; yields its progress callback (done, total, ...). part: of it, which is told behind its name."""
        started = time.monotonic()
        try:
            yield lambda done, total, *_: self._progress(name + part, done, total)
        finally:
            self.state.phases[name] = self.state.phases.get(name, 0.0) + time.monotonic() - started


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
