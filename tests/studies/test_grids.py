"""The grids have settings of train.py, and table7 has the paper's rows."""

import pytest

import train
from configurator import configure
from sparse24 import recipe_names
from studies import cost, grids
from studies.grids import STUDIES


@pytest.mark.parametrize("name", STUDIES)
def test_a_grid_is_settings_of_train_and_has_its_references(name):
    grid = STUDIES[name]
    assert set(grid.references) <= grid.variants.keys()
    for settings in [*grid.variants.values(), *grids.PRESETS.values(), grids.FLIP_COMMON]:
        configure(vars(train), [f"--{word}" for word in settings.split()])


def test_methods_and_act24_are_all_recipes():
    variants = [*STUDIES["methods"].variants.values(), *STUDIES["act24"].variants.values()]
    assert {grids.words(v)["sparse"] for v in variants} == {"none", *recipe_names()}


def test_table7_is_the_papers_five_rows():
    rows = [cost.recipe_of(settings) for settings in list(STUDIES["table7"].variants.values())[1:]]
    found = [(row.masked_decay, row.mvue, round(row.dense_finetune, 4)) for row in rows]
    assert found == [(0, False, 0), (2e-3, False, 0), (2e-3, True, 0), (2e-3, False, 0.1667), (2e-3, True, 0.1667)]


def test_another_decay_factor_is_for_fst_with_the_presets_alone():
    variants = grids.with_decay(STUDIES["table7"], "1").variants
    decays = [grids.words(text).get("masked_decay") for text in variants.values()]
    assert decays == [None, "0", "1", "1", "1", "1"]
    assert grids.with_decay(STUDIES["flip_rate"], "1") == STUDIES["flip_rate"]
