"""vnm.py with a quarter of the hidden units in each tile: A = M relu(X W1^T)^2, where M keeps a quarter of them."""

from dataclasses import replace

from methods import vnm


class QuarterLinear(vnm.VnmLinear):
    DENSITY = 1 / 4


RECIPE = replace(vnm.RECIPE, name="vnm_quarter", layer=vnm.RECIPE.layer | {"c_proj": QuarterLinear})
