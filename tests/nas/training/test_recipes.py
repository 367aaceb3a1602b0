"""Recipes: what the papers and their code state, and numbers that make sense together."""

from __future__ import annotations

import dataclasses
import json

import pytest

from nas.data.images import Augmentation
from nas.training.begun import as_begun
from nas.training.recipes import FINETUNE, INHERITED, RECIPES
from nas.training.request import TrainRequest, choose_recipe
from search_spaces.registry import FAMILIES

PUBLISHED = {
    # epochs, batch, highest rate, decay, clip, repeats, drop path
    "levit": (1000, 2048, 2e-3, 0.025, ("agc", 0.01), 3, 0.0),
    "efficientvit": (300, 2048, 4e-3, 0.025, ("agc", 0.02), 3, 0.0),
    "evit": (300, 2048, 2e-3, 0.05, None, 3, 0.1),
    "shvit": (300, 2048, 4e-3, 0.03, ("agc", 0.02), 3, 0.0),
    "sepvit": (300, 1024, 1e-3, 0.05, ("norm", 5.0), 1, 0.2),
}


def test_every_family_has_its_own():
    assert set(FAMILIES) == set(PUBLISHED) == set(RECIPES) - {"quick", "finetune"}
    assert all(recipe.name == name and recipe.source for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name):
    recipe = RECIPES[name]
    epochs, batch, rate, decay, clip, repeats, drop_path = PUBLISHED[name]
    assert (recipe.epochs, recipe.batch_size, recipe.weight_decay, recipe.clip) == (epochs, batch, decay, clip)
    assert (recipe.repeats, recipe.drop_path) == (repeats, drop_path)
    assert recipe.peak_lr == pytest.approx(rate)
    assert recipe.warmup * recipe.epochs == pytest.approx(5)
    assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing) == (0.8, 1.0, 0.1)
    assert recipe.augmentation == Augmentation(0.08, 0.5, "rand-m9-mstd0.5-inc1", 0.25)
    assert recipe.ema == (None if name == "sepvit" else 0.99996)
    assert (recipe.teacher is not None) == (name == "levit")


def test_keep_rates_shrink_over_epochs_10_to_110():
    start, end = RECIPES["evit"].keep_warmup
    assert (300 * start, 300 * end) == pytest.approx((10, 110))
    assert [name for name, recipe in RECIPES.items() if recipe.keep_warmup] == ["evit"]


def test_the_rate_follows_the_batch_size():
    recipe = dataclasses.replace(RECIPES["levit"], batch_size=256)
    assert recipe.peak_lr == pytest.approx(2.5e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_go_into_json(name):
    assert json.loads(json.dumps(dataclasses.asdict(RECIPES[name])))["name"] == name


@pytest.mark.parametrize("recipe", [INHERITED, dataclasses.replace(FINETUNE, by_images=False)])
@pytest.mark.parametrize("epochs", [None, 3])
def test_a_training_begun_by_an_earlier_finetune_goes_on_by_it(tmp_path, recipe, epochs):
    request = TrainRequest("net", choose_recipe("finetune", epochs), "cpu", tmp_path)
    earlier = dataclasses.replace(recipe, epochs=epochs or 10)
    options = dataclasses.replace(request, recipe=earlier).identity()
    del options["by_images"]
    if recipe == INHERITED:
        del options["batch_norm"]
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "state.json").write_text(json.dumps({"options": options, "found": {}}))
    assert (FINETUNE.batch_norm, FINETUNE.by_images) == ("frozen", True)
    assert as_begun(request).recipe == earlier
