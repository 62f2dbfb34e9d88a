"""Bi-Mask: the forward and the backward mask, and the search of the permutation."""

import pytest
import torch
import torch.nn as nn
from by_hand import close, make, normal, run, top2

import methods.bi_mask
import sparse24
import train
from methods.bi_mask import RECIPE, BiMaskLinear
from sparse24 import Sparse24Linear, begin_step, get_recipe, refresh_masks, seed_draws


def backward_by_hand(layer):
    """M*B, row by row in the permutation's order."""
    forward, order = top2(layer.weight), layer.permutation.tolist()
    masked = torch.where(forward, layer.weight, 0).detach()
    second = top2(masked.t()[:, order])  # (in, out)
    backward = torch.zeros_like(forward)
    for position, row in enumerate(order):
        backward[row] = second[:, position] & forward[row]
    return backward


def test_the_recipe_is_row_wise_with_a_layer_of_its_own():
    assert get_recipe("bi_mask") is RECIPE
    assert (RECIPE.mask, RECIPE.mask_interval, RECIPE.masked_decay, RECIPE.decay_on) == ("row", 1, 2e-4, "grad")
    assert RECIPE.layer is BiMaskLinear
    assert not RECIPE.fused
    with pytest.raises(ValueError, match="recipe 'bi_mask' needs BiMaskLinear; use that class, or sparsify"):
        Sparse24Linear(8, 8, True, "bi_mask")


def test_it_is_2_4_along_inputs_forward_and_along_outputs_backward():
    layer = make("bi_mask", out=16)
    begin_step(layer, 3, 0)
    order, forward, backward = layer.permutation, top2(layer.weight), backward_by_hand(layer)
    assert sorted(order.tolist()) == list(range(16)) != order.tolist()
    assert torch.equal(layer.mask, forward)
    assert torch.equal(layer.backward_mask, backward)
    assert (forward.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert (backward[order].unflatten(0, (-1, 4)).sum(1) <= 2).all()
    x, dz, z, dx, dw = run(layer)
    close(z, x @ torch.where(forward, layer.weight, 0).detach().t())
    close(dx, dz @ torch.where(backward, layer.weight, 0).detach())
    close(dw, dz.t() @ x)
    with torch.no_grad():  # both masks follow the weights
        layer.weight.copy_(normal(16, 12, seed=77))
    refresh_masks(layer)
    assert torch.equal(layer.mask, top2(layer.weight))
    assert torch.equal(layer.backward_mask, backward_by_hand(layer))


def searched(seed, iter_num, weights=(4, 4), phases=(True, True)):
    """The permutations of two layers after a search."""
    model = nn.ModuleList([make("bi_mask", out=32, features=16, seed=seed) for seed in weights])
    model[0].sparse, model[1].sparse = phases
    begin_step(model, seed, iter_num)
    return [layer.permutation for layer in model]


def test_permutations_are_a_function_of_seed_iteration_and_layer():
    first, second = searched(7, 100)
    assert not torch.equal(first, second)  # same weights, different draws
    assert torch.equal(second, searched(7, 100)[1])
    assert not torch.equal(second, searched(8, 100)[1])
    assert not torch.equal(second, searched(7, 200)[1])
    unchanged, alone = searched(7, 100, phases=(False, True))
    assert torch.equal(unchanged, torch.arange(32))  # no search in a dense phase
    assert torch.equal(alone, second)  # but the layer keeps its number
    assert torch.equal(searched(7, 101)[0], torch.arange(32))  # between two searches


def test_the_search_takes_the_best_of_a_hundred_permutations_and_the_current_one(monkeypatch):
    layer, drawn, randperm = make("bi_mask", out=16), [], torch.randperm
    mask = top2(layer.weight)

    def count(order):
        return sum(mask[order[j : j + 4]].sum(0).clamp(max=2).sum().item() for j in range(0, 16, 4))

    def draw(n, generator):
        drawn.append(randperm(n, generator=generator))
        return drawn[-1]

    monkeypatch.setattr(torch, "randperm", draw)
    begin_step(layer, 3, 0)
    assert len(drawn) == 100
    best = layer.permutation.clone()
    assert count(best) == max(count(order) for order in drawn) > count(torch.arange(16))
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    begin_step(layer, 3, 100)  # every draw is worse
    assert torch.equal(layer.permutation, best)


def test_permutations_share_no_random_numbers(monkeypatch):
    keys, words, layer = [], sparse24.seed_words, make("bi_mask")
    for module in (sparse24, methods.bi_mask):
        monkeypatch.setattr(module, "seed_words", lambda n, *key: keys.append(key) or words(n, *key))
    begin_step(layer, 1, 0)
    seed_draws(layer, 1, 0, 0)
    others = [(1, 0, 0, tag) for tag in (train._DATA, train._DROPOUT, train._EVAL)]
    assert len({*keys, *others}) == 2 + 3
