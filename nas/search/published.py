"""The published networks that a study tries first which an older vitnas has begun: those nearest the budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nas.search.trial import reference_arch

if TYPE_CHECKING:
    import optuna

    from nas.search.request import SearchRequest


def choices(request: SearchRequest) -> dict[str, Sequence[str | int]]:
    """The permitted values of every parameter, by its name."""
    from search_spaces.space import LEVELS, PARAMETERS

    return {"family": list(request.families), **{name: range(LEVELS) for name in PARAMETERS}}


def published_order(request: SearchRequest, reference_ms: float) -> list[str]:
    """Names of the searched families' published variants, nearest the budget first, led by the nearest of each family.

    A variant's latency is guessed from its MACs, at the reference network's measured time per MAC. That is rough (up to
    about 2x off between families), but decides only what is tried first.

    Args:
        reference_ms: median latency of the reference network.
    """
    import math

    from search_spaces import count, get_arch
    from search_spaces.registry import FAMILIES

    per_mac = reference_ms / count(reference_arch()).macs
    distance = {
        name: abs(math.log(count(get_arch(name)).macs * per_mac / request.budget_ms))
        for family in request.families
        for name in FAMILIES[family].variants
    }
    ordered = sorted(distance, key=distance.__getitem__)
    first = [next(n for n in ordered if n in FAMILIES[family].variants) for family in request.families]
    return first + [name for name in ordered if name not in first]


def enqueue_published(request: SearchRequest, study: optuna.Study, reference_ms: float) -> None:
    """Enqueue the published variants nearest the budget: a quarter of the trials, and at least one of each family.

    The study's first worker chooses them. Each later worker enqueues those that a killed one had not.

    Args:
        reference_ms: median latency of the reference network.
    """
    from nas.study.trials import alone_in, enqueue
    from search_spaces.api import find_variant
    from search_spaces.registry import FAMILIES

    order = published_order(request, reference_ms)
    count = max(len(request.families), request.trials // 4)

    def choose() -> list[str]:
        if "published" not in study.user_attrs:
            study.set_user_attr("published", order[:count])
        return list(study.user_attrs["published"])

    for name in alone_in(study, choose):
        family, variant = find_variant(name)
        params: dict[str, int | str] = {"family": family, **FAMILIES[family].space.encode(variant.values)}
        enqueue(study, params, {"name": name}, choices(request))


def begun_by_an_older(study: optuna.Study) -> bool:
    """Whether an older vitnas has begun a study, which goes on as it was begun."""
    return "published" in study.user_attrs
