"""How networks are trained: the families' published recipes, and others for small data and for fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from nas.data.images import Augmentation

BatchNorm = Literal["train", "frozen"]
LIGHT = Augmentation()
DEIT_AUGMENTATION = Augmentation(scale=0.08, auto_augment="rand-m9-mstd0.5-inc1", erasing=0.25)


@dataclass(frozen=True)
class Recipe:
    """A training by AdamW with warm-up and cosine, set at each update; only matrices and kernels decay."""

    name: str
    source: str
    """Where it comes from, in words."""
    epochs: int
    batch_size: int
    """Images an update, of all processes."""
    lr: float
    """The highest learning rate with `lr_batch` images an update; it scales with their number."""
    lr_batch: int
    weight_decay: float
    min_lr: float = 0.0
    """At the end of the cosine."""
    warmup: float = 0.05
    """Share of all epochs, so that a shorter training keeps the recipe's form."""
    warmup_lr: float = 1e-6
    """At the beginning."""
    clip: tuple[Literal["agc", "norm"], float] | None = ("norm", 1.0)
    """How gradients are clipped, "agc" (adaptive, by the weights' norm) or "norm", and the bound; None: not at all."""
    augmentation: Augmentation = LIGHT
    repeats: int = 1
    """Times that an image comes in a row, each augmented on its own; an epoch then has fewer images."""
    label_smoothing: float = 0.1
    mixup: float = 0.0
    """Alpha; 0: none. Likewise cutmix."""
    cutmix: float = 0.0
    drop_path: float = 0.0
    """Highest chance that a residual branch is left out, 0 to 1."""
    ema: float | None = None
    """Decay of the weights' moving average, which grows to it (timm's ModelEmaV3 with warm-up); None: no average."""
    distillation: Literal["hard", "soft", "features"] = "hard"
    """What of a teacher is learnt, where there is one: its choice, the softmax of its logits, or its features."""
    teacher: str | None = None
    """The teacher of the published recipe, which the user must name."""
    keep_warmup: tuple[float, float] | None = None
    """Between these shares of the training a keep rate that drops tokens goes from 1 to its own along a cosine."""
    batch_norm: BatchNorm = "train"
    """What BatchNorm normalises with: each batch's statistics, or the running ones, which then stay as they are."""
    from_probe: bool = False
    """Whether trained weights first get a linear probe's head, and the better of probe and tuned network is kept."""
    rates: tuple[float, ...] = ()
    """Instead of `lr`, those that short trials choose from, on held-out images; none: there are no trials."""
    by_images: bool = False
    """Whether the number of images says how many epochs there are (`tuning_epochs`), instead of `epochs`."""
    blend: float = 1.0
    """Share of the learnt weights in the result; the rest is those that the training began with (WiSE-FT, arXiv
    2109.01903)."""

    @property
    def peak_lr(self) -> float:
        return self.lr * self.batch_size / self.lr_batch

    @property
    def tuning_crops(self) -> float:
        """The least share of an image's area that random crops keep in a fine-tuning: its own, unless it is long."""
        own = self.augmentation.scale
        return min(own, LONG_CROPS) if self.epochs >= LONG_EPOCHS else own

    @property
    def tuning_blend(self) -> float:
        """The `blend` of a fine-tuning: its own, unless it is long."""
        return min(self.blend, LONG_BLEND) if self.epochs >= LONG_EPOCHS else self.blend


QUICK = Recipe(
    name="quick",
    source="this project: small data (thousands to 100,000 images), from scratch, in minutes to hours",
    epochs=30,
    batch_size=64,
    lr=2e-3,
    lr_batch=64,
    weight_decay=0.05,
    warmup_lr=1e-4,
)
INHERITED = Recipe(
    name="finetune",
    source="this project: from trained weights; hardly any weight decay, as EfficientViT and SHViT are fine-tuned",
    epochs=10,
    batch_size=64,
    lr=2e-4,
    lr_batch=64,
    weight_decay=1e-8,
    distillation="soft",
)
"""For weights cut from another network, whose statistics BatchNorm has to find again; once it was `finetune` itself."""
FINETUNE = replace(INHERITED, lr=3e-4, batch_norm="frozen", from_probe=True, rates=(1e-4, 3e-4, 1e-3), by_images=True)
TUNED, LEAST_TUNED, MOST_TUNED = 24_000, 3, 30
"""Images that a network with pretrained weights is tuned on, repeats counted, where the user does not say for how many
epochs; and the fewest and the most epochs of that."""
LONG_EPOCHS, LONG_CROPS, LONG_BLEND = 20, 0.08, 0.7
"""A fine-tuning of so many epochs or more crops as trainings from scratch do: the least share of the image's area. And
its result has so much of the learnt weights. Without either, 30 epochs of 2,000 images may end below 10
(docs/results/finetune.md)."""
EVIT = Recipe(
    name="evit",
    source="DeiT (ICML 2021) and EViT (ICLR 2022): 300 epochs, keep rate down over epochs 10 to 110",
    epochs=300,
    batch_size=2048,
    lr=5e-4,
    lr_batch=512,
    weight_decay=0.05,
    min_lr=1e-5,
    warmup=5 / 300,
    clip=None,
    augmentation=DEIT_AUGMENTATION,
    repeats=3,
    mixup=0.8,
    cutmix=1.0,
    drop_path=0.1,
    ema=0.99996,
    keep_warmup=(10 / 300, 110 / 300),
)
LEVIT = replace(
    EVIT,
    name="levit",
    source="LeViT (ICCV 2021): 1000 epochs, hard distillation from RegNetY-16GF",
    epochs=1000,
    weight_decay=0.025,
    warmup=5 / 1000,
    clip=("agc", 0.01),
    drop_path=0.0,
    teacher="timm/regnety_160.deit_in1k",
    keep_warmup=None,
)
EFFICIENTVIT = replace(
    LEVIT,
    name="efficientvit",
    source="EfficientViT (CVPR 2023): 300 epochs, highest rate 4e-3 at 2,048 images as its code has it, not distilled",
    epochs=300,
    lr=1e-3,
    warmup=5 / 300,
    clip=("agc", 0.02),
    teacher=None,
)
SHVIT = replace(
    EFFICIENTVIT,
    name="shvit",
    source="SHViT (CVPR 2024): 300 epochs; weight decay is S4's, of S1 to S3 it is 0.025, 0.032, 0.035",
    weight_decay=0.03,
)
SEPVIT = replace(
    EVIT,
    name="sepvit",
    source="SepViT (arXiv 2203.15380): 300 epochs; drop path is Tiny's, of Small 0.3 and of Base 0.5 (with decay 0.1)",
    batch_size=1024,
    clip=("norm", 5.0),
    repeats=1,
    drop_path=0.2,
    ema=None,
    keep_warmup=None,
)
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (QUICK, FINETUNE, LEVIT, EFFICIENTVIT, EVIT, SHVIT, SEPVIT)
}


def tuning_epochs(images: int) -> int:
    """For how many epochs a network with pretrained weights is tuned on so many images, where the user does not say."""
    return min(max(TUNED // images, LEAST_TUNED), MOST_TUNED)
