"""The weights that a training begins with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nas.data.lineage import TIMM
from nas.errors import DiskFull, UserError
from nas.identity import file_digest
from nas.networks.hub import WEIGHTS, Bytes
from nas.networks.pretrained import NoPretrained, check_folder, find_pretrained
from nas.networks.targets import find_target
from nas.training.begun import begun_in, left_by_an_older
from nas.training.course import StartRecord
from nas.training.recipes import FINETUNE, QUICK, Recipe
from nas.training.request import RANDOM, TrainRequest, default_folder

if TYPE_CHECKING:
    from nas.networks.targets import Target


@dataclass(frozen=True)
class Start:
    """The weights that a training begins with."""

    path: Path | None = None
    """Their file; None: random ones."""
    digest: str | None = None
    """As `nas.identity.file_digest`."""
    source: str = "random"
    """Where they are from: random, file (the user's), run (the network's own), or as `Pretrained.source`."""
    line: str = ""
    """What to tell of them; "" where nothing is to be told."""

    @property
    def published(self) -> bool:
        """Whether they are a published network's, which have seen none of the user's images."""
        return self.source in ("folder", "cache", "download")

    @classmethod
    def of(cls, record: StartRecord) -> Start:
        """As a run has kept it."""
        return cls(None if record.file is None else Path(record.file), record.digest, record.source, record.told)

    @property
    def record(self) -> StartRecord:
        """As the run keeps it."""
        file = None if self.path is None else str(self.path)
        return StartRecord(source=self.source, file=file, digest=self.digest, told=self.line)

    @property
    def parent(self) -> str | None:
        """As `nas.data.lineage` takes it."""
        return TIMM if self.published else str(self.path) if self.path is not None else None


def find_start(request: TrainRequest, progress: Bytes | None = None) -> Start:
    """Find the weights that a request begins with: those it names, those in the network's own folder, or the published
    ones, where it fine-tunes.

    progress: told of the bytes of a download.

    Raises:
        UserError: no such network or file, a folder without weights, weights that are known but cannot be had, none
            where they are needed, or a folder for the results that holds the weights it begins with.
        DiskFull: no room for the download.
    """
    target = find_target(request.model)
    if request.weights_from is not None:
        check_folder(request.weights_from)
    if request.weights == RANDOM:
        return Start()
    if request.weights not in (None, TIMM):
        digest = file_digest(Path(request.weights))
        _writes_itself(request.folder, Path(request.weights))
        return Start(Path(request.weights), digest, "file", f"weights of {request.weights} (sha256 {digest})")
    own = target.as_trained().weights if request.weights is None else None
    if own is not None and not _writes_itself(request.folder, own):
        digest = file_digest(own)
        told = f"begins with the weights of {own} (sha256 {digest}; --weights none: with random ones)"
        return Start(own, digest, "run", told)
    begun = begun_in(request.folder)
    fine_tunes = request.recipe.name == FINETUNE.name and request.oracle is None
    if not asks_for_weights(request) and (not fine_tunes or (begun is not None and begun.from_nothing)):
        says = request.data is not None and request.oracle is None
        return Start(line=f"starts from random weights (recipe {request.recipe.name})" if says else "")
    return _published(request, target, progress)


def asks_for_weights(request: TrainRequest) -> bool:
    """Whether an option of the request needs trained weights; with a teacher, --weights-from may be for that alone."""
    looks = request.weights_from is not None and request.teacher is None
    return request.weights == TIMM or looks or request.probe


def with_usual_recipe(
    request: TrainRequest, by: Callable[[str], Recipe], named: bool, progress: Bytes | None = None
) -> tuple[TrainRequest, Start | None]:
    """A request for which no recipe was asked for, with its own: that of its folder's training; else `finetune`, where
    it begins with weights, or `quick`. Digits, a demonstration, need no weights. Also the weights, where they had to be
    looked for.

    Args:
        by: gives the recipe of a name, with the user's changes.
        named: whether the user named the folder; else it is that of the recipe.

    Raises:
        UserError: as `find_start`.
    """
    begun = begun_in(request.folder)
    if begun is not None and request.weights is None:
        return replace(request, recipe=by(begun.recipe.name)), None
    older = (
        None if named or request.weights is not None or asks_for_weights(request) else left_by_an_older(request.model)
    )
    if older is not None:
        return replace(request, recipe=by(QUICK.name), folder=older), None
    needs_none = request.data is None and not asks_for_weights(request)
    start = find_start(replace(request, recipe=QUICK if needs_none else FINETUNE), progress)
    name = QUICK.name if start.path is None else FINETUNE.name
    folder = request.folder if named else default_folder(request.model, name)
    return replace(request, recipe=by(name), folder=folder), start


def _writes_itself(folder: Path, weights: Path) -> bool:
    """Whether weights lie where those of the results do, because this very command has written them.

    Raises:
        UserError: they lie there, and this command has not.
    """
    if not folder.is_dir() or weights.name != WEIGHTS or folder.resolve() != weights.parent.resolve():
        return False
    if not (folder / "state" / "state.json").is_file():
        raise UserError(f"--out {folder} holds the weights that the training begins with: give another")
    return True


def _published(request: TrainRequest, target: Target, progress: Bytes | None) -> Start:
    try:
        found = find_pretrained(target.as_trained().require(), request.weights_from, progress)
    except NoPretrained as error:
        if not asks_for_weights(request):
            return Start(line=f"no pretrained weights of {request.model}: starts from random weights")
        if request.weights_from is not None:  # which the error names
            raise
        what = f"--weights {TIMM}" if request.weights == TIMM else "--probe"
        raise UserError(f"{what}: {error}: give --weights FILE or --weights-from DIR") from None
    except DiskFull:
        raise
    except UserError as error:
        if asks_for_weights(request):
            raise
        raise UserError(f"{error}; or --from-scratch for random weights") from None
    return Start(found.path, found.digest, found.source, found.line)
