"""STEP: frozen second moments and AutoSwitch, compared with steps by hand."""

import copy
import math

import pytest
import torch
import torch.nn as nn
from by_hand import adamw, close, make, normal, optimizer_for

from methods.step import RECIPE, StepAdamW
from sparse24 import get_recipe

GRADIENTS = [normal(8, 12, seed=20 + t) for t in range(6)]


def step(layer, optimizer, gradient, sparse):
    layer.sparse = sparse
    layer.weight.grad = gradient.clone()
    optimizer.step()


def test_the_recipe_is_dense_first_then_row_wise_every_step():
    assert get_recipe("step") is RECIPE
    assert (RECIPE.mask, RECIPE.mask_interval, RECIPE.masked_decay, RECIPE.mvue) == ("row", 1, 0.0, False)
    assert (RECIPE.dense_pretrain, RECIPE.dense_pretrain_latest, RECIPE.dense_finetune) == (0.1, 0.5, 0.0)
    assert RECIPE.virtual_mask == "row"


def test_second_moments_freeze_once_the_layer_is_sparse():
    model = nn.ModuleList([make("step"), nn.Linear(4, 4, bias=False, dtype=torch.float64)])
    layer, plain = model
    optimizer = optimizer_for(model, "step")
    others = [normal(4, 4, seed=40 + t) for t in range(6)]
    expected = adamw(layer.weight.detach(), GRADIENTS, frozen_from=3)
    expected_plain = adamw(plain.weight.detach(), others)
    for t, (g, h) in enumerate(zip(GRADIENTS, others, strict=True)):
        if t == 3:
            frozen = optimizer.state[layer.weight]["exp_avg_sq"].clone()
        plain.weight.grad = h.clone()
        step(layer, optimizer, g, sparse=t >= 3)
        assert torch.equal(layer.weight.grad, g)  # restored
        close(layer.weight.detach(), expected[t])
        close(plain.weight.detach(), expected_plain[t])
    assert torch.equal(optimizer.state[layer.weight]["exp_avg_sq"], frozen)


@pytest.mark.parametrize("decay_on", ["grad", "weight"])
def test_frozen_second_moments_go_with_every_kind_of_decay(decay_on):
    layer = make("step")
    optimizer = optimizer_for(layer, "step", masked_decay=0.5, decay_on=decay_on)
    mask = layer.mask

    def change(w, g, t):
        pruned = torch.where(mask, 0, w) * (t > 3)
        return (w, g + 0.5 * pruned) if decay_on == "grad" else (w - 0.1 * 0.5 * pruned, g)

    expected = adamw(layer.weight.detach(), GRADIENTS, change=change, frozen_from=3)
    for t, g in enumerate(GRADIENTS):
        step(layer, optimizer, g, sparse=t >= 3)
        close(layer.weight.detach(), expected[t])


def test_maximize_negates_the_gradient_of_frozen_weights_too():
    layers = [make("step") for _ in range(2)]
    optimizers = [optimizer_for(layer, "step", masked_decay=0.5) for layer in layers]
    optimizers[0].param_groups[0]["maximize"] = True
    for t, g in enumerate(GRADIENTS):
        for layer, optimizer, gradient in zip(layers, optimizers, (-g, g), strict=True):
            step(layer, optimizer, gradient, sparse=t >= 3)
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_a_loaded_optimizer_continues_with_the_same_steps():
    layers = [make("step") for _ in range(3)]
    optimizers = [optimizer_for(layer, "step") for layer in layers]
    for t in range(6):
        step(layers[0], optimizers[0], GRADIENTS[t], sparse=t >= 2)
        if t < 4:
            step(layers[1], optimizers[1], GRADIENTS[t], sparse=t >= 2)
    layers[2].load_state_dict(layers[1].state_dict())
    optimizers[2].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    for t in (4, 5):
        step(layers[2], optimizers[2], GRADIENTS[t], sparse=True)
    assert torch.equal(layers[2].weight, layers[0].weight)


def test_second_moments_are_updated_in_a_later_dense_phase():
    layer, frozen_steps = make("step"), []
    optimizer = optimizer_for(layer, "step")
    for t, g in enumerate(GRADIENTS):
        step(layer, optimizer, g, sparse=t in (2, 5))
        frozen_steps.append(optimizer.state[layer.weight].get("frozen_step"))
    assert frozen_steps == [None, None, 2, None, None, 5]


def test_a_sparse_step_before_any_dense_one_is_refused():
    layer = make("step")
    with pytest.raises(RuntimeError, match="a sparse weight has had no dense step; need a larger dense_pretrain"):
        step(layer, optimizer_for(layer, "step"), GRADIENTS[0], sparse=True)


# ---------------------------------------------------------------------------------------------------------------------
# AutoSwitch


def dense_steps(gradients, **options):
    """The answers of `dense_start_done` before each of these steps, the layer and its optimizer."""
    layer, answers = make("step"), []
    optimizer = StepAdamW(layer.parameters(), layer, masked_decay=0.0, **({"betas": (0.8, 0.9)} | options))
    layer.sparse = False
    for g in gradients:
        layer.weight.grad = torch.full_like(layer.weight, g)
        answers.append(optimizer.dense_start_done())
        optimizer.step()
    return answers, layer, optimizer


def test_autoswitch_waits_for_second_moments_to_settle():
    """With a constant gradient |v_t - v_{t-1}| = (1 - b2) b2^(t-1) g^2: its mean crosses eps at a known step."""
    answers, layer, optimizer = dense_steps([0.01] * 139)
    changes = []
    for t, answer in enumerate(answers, start=1):
        changes = [*changes, 0.1 * 0.9 ** (t - 1) * 0.01**2][-10:]
        assert answer == (t >= 10 and sum(changes) / 10 < 1e-8), t
    assert answers[0] is False
    assert answers[-1] is True
    layer.weight.grad = torch.full_like(layer.weight, math.inf)  # a step that GradScaler skips
    assert optimizer.dense_start_done()


@pytest.mark.parametrize(
    ("gradients", "beta2", "expected"),
    [
        ([0.0] * 12, 0.9, [False] * 9 + [True] * 3),
        ([0.0] * 25, 0.95, [False] * 19 + [True] * 6),
        ([1.0] + [0.0] * 13, 0.9, [False] * 14),
    ],
    ids=["constant moments", "a longer window", "falling moments"],
)
def test_autoswitch_averages_over_a_window_that_beta2_sets(gradients, beta2, expected):
    answers, _, optimizer = dense_steps(gradients, betas=(0.9, beta2))
    assert answers == expected
    assert len(optimizer.dense_start_log) == round(1 / (1 - beta2))


def test_autoswitch_averages_over_entries_and_not_over_layers():
    layers = nn.ModuleList([make("step", 8, 12), make("step", 8, 108)])  # 96 and 864 entries
    optimizer = StepAdamW(layers.parameters(), layers, masked_decay=0.0, betas=(0.8, 0.9))
    for layer, g in zip(layers, (1.0, 3.0), strict=True):
        layer.weight.grad = torch.full_like(layer.weight, g)
    optimizer.dense_start_done()
    assert optimizer.dense_start_log == [pytest.approx(0.1 * (96 * 1.0 + 864 * 9.0) / 960)]
