"""The published networks that a search tries first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nas.search.trial import reference_arch

if TYPE_CHECKING:
    import optuna

    from nas.search.request import SearchRequest


def choices(options: SearchRequest) -> dict[str, Any]:
    """Every parameter's permitted values."""
    from search_spaces.space import LEVELS, PARAMETERS

    return {"family": list(options.families), **{name: range(LEVELS) for name in PARAMETERS}}


def published_order(options: SearchRequest, reference_ms: float) -> list[str]:
    """Published variants of the searched families, likeliest nearest the budget first, one of each family in front.

    Nearness goes by MACs, at the reference network's measured time per MAC: rough (within about 2x between
    families), but it only decides what is tried first.
    """
    import math

    from search_spaces import get_arch, table
    from search_spaces.registry import FAMILIES

    per_mac = reference_ms / table(reference_arch()).macs()
    distance = {
        name: abs(math.log(table(get_arch(name)).macs() * per_mac / options.budget_ms))
        for family in options.families
        for name in FAMILIES[family].variants
    }
    ordered = sorted(distance, key=distance.__getitem__)
    first = [next(n for n in ordered if n in FAMILIES[family].variants) for family in options.families]
    return first + [name for name in ordered if name not in first]


def enqueue_published(options: SearchRequest, study: optuna.Study, reference_ms: float) -> None:
    """Enqueue the published variants nearest the budget: one a family at least, a quarter of the trials at most.

    The choice is made once a study; a worker that joins enqueues what one killed meanwhile had not.
    """
    from nas.study.storage import alone
    from nas.study.trials import enqueue
    from search_spaces.api import find_variant
    from search_spaces.registry import FAMILIES

    order = published_order(options, reference_ms)
    count = max(len(options.families), options.trials // 4)

    def choose() -> list[str]:
        if "published" not in study.user_attrs:
            study.set_user_attr("published", order[:count])
        return study.user_attrs["published"]

    for name in alone(study._storage, choose):
        family, variant = find_variant(name)
        params = {"family": family, **FAMILIES[family].space.encode(variant.values)}
        enqueue(study, params, {"name": name}, choices(options))
