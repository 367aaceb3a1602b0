"""Which pretrained weights a study was begun with: it goes on with the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from nas.errors import UserError
from nas.files import read_kept, replace_file
from nas.identity import differences
from nas.units import listed

if TYPE_CHECKING:
    import optuna

    from nas.networks.store import Store

ATTRIBUTE, FILE = "weights", "weights.json"
"""Of the study, and in the folder of its trainings: SHA-256 by the name of the network."""


def agree_on_weights(study: optuna.Study, folder: Path, store: Store) -> None:
    """Keep which weights the study and the trainings in its folder go by; such as were not there before are added.

    Args:
        folder: of the trainings.
        store: has looked up the weights of all networks that may race; from now on it refuses others.

    Raises:
        UserError: the study, or a training, was made with others, or with some that cannot be had any more.
    """
    from nas.study.trials import alone_in

    found = store.digests

    def decide() -> None:
        path = folder / FILE
        in_folder = read_kept(path, TypeAdapter(dict[str, str]), "to go on with the weights of today") or {}
        in_study = study.user_attrs.get(ATTRIBUTE, {})
        lost = not {**in_study, **in_folder}.keys() <= found.keys() and not store.reach()
        for what, known in (("this study", in_study), (f"{folder} has trainings that", in_folder)):
            compared = {name: found.get(name, "not found here") for name in known if name in found or lost}
            if differs := differences({"weights": {n: known[n] for n in compared}}, {"weights": compared}):
                changed = listed([str(store.files[n]) for n in known if n in found and known[n] != found[n]])
                told = f"; it has changed, or is another file: {changed}" if changed else ""
                raise UserError(f"{what} began with {differs}: give the same --weights-from, or another --study{told}")
        store.begun = {**in_study, **in_folder, **found}
        if {**in_study, **found} != in_study:
            study.set_user_attr(ATTRIBUTE, {**in_study, **found})
        if {**in_folder, **found} != in_folder:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps({**in_folder, **found}, indent=1) + "\n")

    alone_in(study, decide)
