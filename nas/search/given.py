"""Trials that are given their candidate, whether or not its network can be written as parameters of the search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nas.networks.timm_network import TIMM
from nas.quality.candidate import Candidate

if TYPE_CHECKING:
    import optuna

    from nas.search.request import SearchRequest

GIVEN = "candidate"
"""The attribute of a trial that holds the document of its candidate."""


def enqueue_candidate(request: SearchRequest, study: optuna.Study, candidate: Candidate) -> bool:
    """Enqueue a trial of a candidate: with its parameters where the searched space has exactly its network.

    Call it while no other process of the study decides (`nas.study.trials.alone_in`).

    Returns:
        False if the study has had such a trial before.
    """
    document = candidate.to_json()
    if any(trial.user_attrs.get(GIVEN) == document for trial in study.get_trials(deepcopy=False)):
        return False
    study.enqueue_trial(parameters_of(request, candidate), {GIVEN: document, **origin(candidate)})
    return True


def parameters_of(request: SearchRequest, candidate: Candidate) -> dict[str, int | str]:
    """The parameters that the search decodes to a published variant's network; none where there are no such."""
    from search_spaces.api import find_variant
    from search_spaces.registry import FAMILIES

    name, network = candidate.name.partition("@")[0], candidate.network
    if not name or name.startswith(TIMM) or network.family not in request.families:
        return {}
    family, variant = find_variant(name)
    space = FAMILIES[family].space
    resolution = variant.values["resolution"] if request.resolution else network.resolution
    try:
        params = space.encode({**variant.values, "resolution": resolution})
    except ValueError:  # not among the options
        return {}
    if space.decode(params, request.num_classes, request.resolution) != network:
        return {}
    return {"family": family, **params}


def origin(candidate: Candidate) -> dict[str, str]:
    """What a trial's attributes say in a race of where its network is from, also where it fails."""
    found = {"family": candidate.network.family, "kind": str(candidate.kind)}
    more = {"parent": candidate.parent, "name": candidate.name}
    return found | {key: value for key, value in more.items() if value}
