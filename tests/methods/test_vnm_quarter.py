"""vnm_quarter: the share of the units."""

import torch

from methods import vnm_quarter
from sparse24 import get_recipe


def test_a_quarter_of_the_units_is_computed():
    recipe = get_recipe("vnm_quarter")
    layer = vnm_quarter.QuarterLinear(128, 8, recipe=recipe)
    assert layer.largest(torch.rand(5, 8)).sum(-1).tolist() == [2] * 5
