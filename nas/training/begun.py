"""What a training's folder says of how it was begun: the same command goes on so, whatever the defaults are now."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from nas.training.recipes import FINETUNE, INHERITED, QUICK, RECIPES, Recipe
from nas.training.request import TrainRequest, default_folder

EARLIER: tuple[Recipe, ...] = (replace(FINETUNE, by_images=False), INHERITED)
"""Recipes as they were before their defaults changed: a training that was begun by one goes on by it."""


@dataclass(frozen=True)
class Begun:
    """A training as it was begun."""

    recipe: Recipe
    finished: bool
    from_nothing: bool
    """Whether an older vitnas has begun it, which took random weights where none were named."""


def begun_in(folder: Path) -> Begun | None:
    """The training that a folder holds; None where it holds none that can be read, of which `Job` complains."""
    try:
        state = json.loads((folder / "state" / "state.json").read_text())
        usual = RECIPES[state["options"]["recipe"]]
        named = {"name": usual.name, "source": usual.source, "teacher": usual.teacher}
        options = defaults() | state["options"] | named
        recipe = TypeAdapter(Recipe).validate_python({field.name: options[field.name] for field in fields(Recipe)})
        older = "course" not in state["found"]
        from_nothing = older and options["weights"] is None
        return Begun(recipe, bool(state["found"].get("finished")), from_nothing)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def left_by_an_older(model: str) -> Path | None:
    """The default folder of an unfinished training from random weights that an older vitnas has begun; None: there is
    none. Today the same command would begin with published weights, in another folder."""
    folder = default_folder(model, QUICK.name)
    begun = begun_in(folder)
    return folder if begun is not None and begun.from_nothing and not begun.finished else None


def as_begun(request: TrainRequest) -> TrainRequest:
    """The request by the earlier recipe that its folder's training was begun by, if it was, with the same changes."""
    begun, recipe = begun_in(request.folder), request.recipe
    usual = RECIPES.get(recipe.name)
    if begun is None or usual is None:
        return request
    asked = {name: value for name, value in vars(recipe).items() if value != getattr(usual, name)}
    for earlier in EARLIER:
        if earlier.name == recipe.name and replace(earlier, **asked) == begun.recipe:
            return replace(request, recipe=begun.recipe)
    return request


def defaults() -> dict[str, Any]:
    """What options that an older vitnas did not keep were then, as JSON has them."""
    every = (*fields(TrainRequest), *fields(Recipe))
    known = {field.name: field.default for field in every if field.default is not MISSING}
    found: dict[str, Any] = json.loads(json.dumps(known, default=asdict))
    return found
