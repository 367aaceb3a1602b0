"""Parents: published networks, tuned once on the user's images, that smaller ones of their family are cut from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from nas.errors import FAULTS, DiskFull, TrainingError, UserError, is_full, reason
from nas.quality.ready import own_pixels
from nas.quality.trainer import Parent
from nas.quality.tuning import Tuned, check_weights, tune, tuned_in
from search_spaces import ArchError, get_arch
from search_spaces.registry import FAMILIES

if TYPE_CHECKING:
    from torch import Tensor

    from nas.networks.pretrained import Pretrained
    from nas.quality.trainer import CandidateTrainer
    from search_spaces import Arch

SCORED_IMAGES = 512
"""Images that the importance of units is measured on."""


class Parents:
    """A search's parents, by their published names."""

    def __init__(self, trainer: CandidateTrainer) -> None:
        self.trainer = trainer
        self.failed: dict[str, str] = {}
        """Those whose weights cannot be had, with the reason."""
        self.uncut: dict[tuple[str, int], str] = {}
        """Names and resolutions in px at which a parent cannot be tuned or cut, with the reason."""
        self._tuned: dict[tuple[str, int], Parent] = {}
        self.elsewhere: Callable[[str, int], None] | None = None
        """Has a parent tuned by another process that shares the folder; None: this one does."""

    def parent_for(self, arch: Arch) -> str | None:
        """The nearest parent by shape and size of those that are larger, and in no axis smaller; None: there is none.
        One that is tuned already goes before others. Weights are downloaded where they must be."""
        px = arch.resolution
        sized = [(name, self.arch(name, px)) for name in FAMILIES[arch.family].variants if (name, px) not in self.uncut]
        larger = [
            ((name, px) not in self._tuned, distance(each, arch), name)
            for name, each in sized
            if each is not None and each != arch and covers(each, arch)
        ]
        return next((name for *_, name in sorted(larger) if self.published(name) is not None), None)

    def published(self, name: str) -> Pretrained | None:
        """A parent's published weights; None where they cannot be had, which is told once."""
        if name in self.failed:
            return None
        store, network = self.trainer.weights, get_arch(name)
        try:
            return store.get(network)
        except DiskFull:
            raise
        except UserError as error:
            # that there is no connection the store has told, and weights that nobody published are missed by nobody
            self._fail(name, error, silent=store.offline or not FAMILIES[network.family].variants[name].timm)
            return None

    def arch(self, name: str, resolution: int) -> Arch | None:
        """A published network for the user's classes; None where it takes no images of this size."""
        try:
            return get_arch(name).replace(num_classes=len(self.trainer.data.classes)).at(resolution)
        except ArchError:
            return None

    def tuned(self, name: str, resolution: int) -> Parent:
        """A parent with the importance of its units; tuned now where no earlier run has.

        Raises:
            TrainingError: it cannot be had or cut. UserError: the run's folder has it tuned from other weights.
        """
        key = name, resolution
        if key not in self._tuned:
            published = self.published(name)
            if published is None:
                raise TrainingError(f"its parent {name}: {self.failed[name]}")
            if key in self.uncut:
                raise TrainingError(f"its parent {name}: {self.uncut[key]}")
            check_weights(name, resolution, published, self.trainer)
            try:
                if self.elsewhere and self.record(name, resolution) is None:
                    self.elsewhere(name, resolution)
                    if self.record(name, resolution) is None:
                        self.trainer.say(f"{name} is tuned here, too: who has tuned it keeps it in another folder")
                with self.trainer.alone():
                    self._tuned[key] = self._open(name, resolution, published)
            except FAULTS as error:
                if is_full(error):
                    raise
                self.uncut[key] = reason(error)
                self.trainer.say(f"{name} is no parent at {resolution} px: {reason(error)}")
                raise TrainingError(f"its parent {name}: {reason(error)}") from error
        return self._tuned[key]

    def record(self, name: str, resolution: int) -> Tuned | None:
        """How a parent was tuned; None where it has not been."""
        found = tuned_in(self.trainer.folder, name)
        return next((each for each in found if each.resolution == resolution), None)

    def child(self, arch: Arch, name: str, seed: int, tuned: Parent | None = None) -> dict[str, Tensor]:
        """Weights of a smaller network, cut from the parent `name` by the importance of its units.

        Args:
            tuned: the parent with other weights; None: as the search tuned it.

        Raises:
            TrainingError: the parent cannot be had or cut.
        """
        import torch

        from pruning.transfer import transfer

        given = tuned or self.tuned(name, arch.resolution)
        try:
            return transfer(given.arch, given.weights, arch, given.scores, torch.Generator().manual_seed(seed))
        except ValueError as error:
            raise TrainingError(f"it cannot be cut from {name}: {error}") from None

    def repaired(
        self, arch: Arch, name: str, weights: Mapping[str, Tensor], tuned: Parent | None = None
    ) -> dict[str, Tensor]:
        """The weights that `child` gave, refitted so that the network does what its parent does; without labels.

        Args:
            tuned: as `child` was given it.
        """
        import torch

        from nas.data.images import shuffled_sample
        from pruning.compensation import compensate, images_for
        from pruning.transfer import transfer_origins

        trainer, resolution, pixels = self.trainer, arch.resolution, own_pixels(get_arch(name))
        given = tuned or self.tuned(name, resolution)
        images = shuffled_sample(trainer.split(resolution, pixels)[0], images_for(resolution), trainer.seed)
        batches = trainer.batches(trainer.plain(images, resolution, pixels))
        inputs = torch.cat([x for x, _ in batches]).to(trainer.device)
        origins = transfer_origins(given.arch, arch, given.scores)
        return compensate(given.arch, given.weights, arch, weights, origins, inputs)[0]

    def _fail(self, name: str, why: UserError, silent: bool = False) -> None:
        self.failed[name] = str(why)
        if not silent:
            self.trainer.say(f"{name} is no parent: {why}")

    def _open(self, name: str, resolution: int, published: Pretrained) -> Parent:
        from nas.data.images import sample
        from pruning.importance import ImportanceError, score
        from pruning.units import anatomy

        trainer, arch = self.trainer, self.arch(name, resolution)
        if arch is None:
            raise TrainingError(f"it takes no images of {resolution} px")
        model = tune(name, arch, published, trainer)
        pixels = own_pixels(arch)
        images = sample(trainer.split(resolution, pixels)[0], SCORED_IMAGES, trainer.seed)
        batches = trainer.batches(trainer.plain(images, resolution, pixels))
        try:
            scores = score(model, anatomy(arch), batches, "taylor")
        except (ImportanceError, ArchError) as error:
            raise TrainingError(f"its units cannot be ranked: {error}") from None
        return Parent(name, arch, model.state_dict(), scores)


def covers(larger: Arch, smaller: Arch) -> bool:
    """Whether a network is at least as large as another in every axis: by stage width, depth, blocks with attention, qk
    width and FFN width."""
    ours, theirs = _axes(larger), _axes(smaller)
    return len(ours) == len(theirs) and all(a >= b - 1e-6 for a, b in zip(ours, theirs, strict=True))


def distance(one: Arch, other: Arch) -> float:
    """How far the shapes of two networks of as many stages are apart: the sum over their axes of |log2(ratio)|."""
    pairs = zip(_axes(one), _axes(other), strict=True)
    return sum(abs(math.log2((1 + a) / (1 + b))) for a, b in pairs)


def _axes(arch: Arch) -> list[float]:
    return [
        value
        for stage in arch.summary()
        for value in (
            stage.embed_dim,
            stage.depth,
            stage.attention_share * stage.depth,
            stage.heads * stage.key_dim,
            stage.ffn_ratio * stage.embed_dim * stage.depth,
        )
    ]
