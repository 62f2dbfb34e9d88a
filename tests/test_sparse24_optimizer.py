"""MaskedDecayAdamW: masked decay by hand, torch's AdamW without it."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn as nn
from by_hand import adamw, make_mlp, normal

from runtime.health import decay_ratio
from sparse24 import MaskedDecayAdamW, densify, expand_index, get_recipe, refresh_masks, seed_draws, sparsify

TORCHS = {"betas": (0.9, 0.999), "weight_decay": 0.01}  # torch's defaults
KINDS = pytest.mark.parametrize("implementation", [{}, {"fused": True}, {"foreach": True}], ids=str)
EITHER = pytest.mark.parametrize("decay_on", ["grad", "weight"])


def optimizer_of(model, masked_decay=0.3, **options):
    return MaskedDecayAdamW(model.parameters(), model, masked_decay=masked_decay, **({"lr": 0.01} | options))


def set_gradients(model, step=0, scale=1.0):
    """Set seeded gradients, and return copies of them."""
    for i, p in enumerate(model.parameters()):
        p.grad = scale * normal(*p.shape, seed=1000 * (step + 1) + i, dtype=torch.float32)
    return [p.grad.clone() for p in model.parameters()]


def parameters_of(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The decay


@KINDS
def test_step_is_adamw_on_gradients_with_masked_decay(implementation):
    """Eq. 10 changes the gradient, hence both moments, of pruned entries, once per step, by the current mask."""
    model, decay = make_mlp(), 0.3
    with torch.no_grad():
        model[0].weight.copy_(normal(16, 8, seed=40))  # its mask is stale, and is used
    masks, start = [model[0].mask, None, model[2].mask, None], parameters_of(model)
    optimizer, gradients = optimizer_of(model, decay, weight_decay=0.1, **implementation), []
    for step in range(3):
        gradients.append(set_gradients(model, step))
        before = model[0].weight.detach().clone()
        optimizer.step()
        assert torch.allclose(model[0].weight.grad, gradients[-1][0] + decay * ~masks[0] * before, atol=1e-6)
    assert torch.equal(model[0].mask, masks[0])
    for i, p in enumerate(model.parameters()):
        change = lambda w, g, t, mask=masks[i]: (w, g if mask is None else g + decay * ~mask * w)  # noqa: E731
        expected = adamw(start[i], [g[i] for g in gradients], 0.01, (0.9, 0.999), weight_decay=0.1, change=change)
        assert torch.allclose(p.double(), expected[-1], atol=1e-6)


def test_decay_on_weight_is_sr_stes():
    """Eq. 8: first w -= lr * decay * ~mask * w, with each group's lr, then Adam on the plain gradient."""
    model, decay, lrs = make_mlp(), 0.3, (0.1, 0.02)
    start, masks = parameters_of(model), [model[0].mask, None, model[2].mask, None]
    groups = [{"params": model[i].parameters(), "lr": lr} for i, lr in zip((0, 2), lrs, strict=True)]
    optimizer, gradients = MaskedDecayAdamW(groups, model, masked_decay=decay, decay_on="weight"), []
    for step in range(2):
        gradients.append(set_gradients(model, step))
        optimizer.step()
        assert equal([p.grad for p in model.parameters()], gradients[-1])
    for i, p in enumerate(model.parameters()):
        lr, mask = lrs[i // 2], masks[i]
        change = lambda w, g, t, lr=lr, mask=mask: (w if mask is None else w - lr * decay * ~mask * w, g)  # noqa: E731
        assert torch.allclose(p.double(), adamw(start[i], [g[i] for g in gradients], lr, change=change, **TORCHS)[-1])


@pytest.mark.parametrize(
    "implementation",
    [{}, {"fused": True}, *(pytest.param({name: True}, marks=pytest.mark.slow) for name in ("foreach", "amsgrad"))],
    ids=str,
)
@pytest.mark.parametrize("case", ["no decay", "no sparse layer", "dense phase"])
@EITHER
def test_without_decay_it_is_torchs_adamw(case, implementation, decay_on):
    model, other = make_mlp(), make_mlp()
    if case == "no sparse layer":
        densify(model)
    if case == "dense phase":
        model[0].sparse = model[2].sparse = False
    ours = optimizer_of(model, 0.0 if case == "no decay" else 0.5, decay_on=decay_on, **implementation)
    torchs = torch.optim.AdamW(other.parameters(), lr=0.01, **implementation)
    for step in range(3):
        for each, optimizer in ((model, ours), (other, torchs)):
            set_gradients(each, step)
            optimizer.step()
    assert equal(model.parameters(), other.parameters())


def test_the_factor_may_change_and_the_learning_rate_and_dense_layers_do_not_matter():
    model = make_mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.0}]
    optimizer = MaskedDecayAdamW(groups, model, masked_decay=0.0)
    for optimizer.masked_decay in (0.0, 0.25, 2.0):
        model[0].sparse = optimizer.masked_decay < 2
        set_gradients(model, scale=0.0)
        start = parameters_of(model)
        optimizer.step()
        for i, layer in ((0, model[0]), (2, model[2])):
            assert torch.allclose(layer.weight.grad, layer.sparse * optimizer.masked_decay * ~layer.mask * start[i])
        assert torch.equal(model[2].weight, start[2])


def test_a_weight_that_two_layers_share_decays_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    sparsify(model, "fst", ["0", "1"])
    assert model[1].weight is model[0].weight
    set_gradients(model, scale=0.0)
    optimizer_of(model, 0.5, lr=0.0).step()
    assert torch.allclose(model[0].weight.grad, 0.5 * ~model[0].mask * model[0].weight)


def test_weights_without_gradient_or_group_are_left_alone():
    model = make_mlp()
    model[2].weight.requires_grad_(False)
    optimizer = MaskedDecayAdamW([model[2].weight, model[0].bias], model, masked_decay=0.5, decay_on="weight")
    start, gradients = parameters_of(model), set_gradients(model)
    model[2].weight.grad = None
    optimizer.step()
    assert torch.equal(model[0].weight.grad, gradients[0])
    unchanged = [torch.equal(p, before) for p, before in zip(model.parameters(), start, strict=True)]
    assert unchanged == [True, False, True, True]


@KINDS
@pytest.mark.parametrize("unscale", [True, False])
@EITHER
def test_decay_comes_after_grad_scalers_unscaling(implementation, unscale, decay_on):
    """Added to the scaled gradient it would be 2^16 times too weak."""
    model, other = make_mlp(), make_mlp()
    ours, plain = (optimizer_of(m, decay_on=decay_on, **implementation) for m in (model, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.zeros(()))  # the scale is made on first use
    for step in range(2):
        set_gradients(model, step, scale=2.0**16)
        set_gradients(other, step)
        if unscale:
            scaler.unscale_(ours)
            assert torch.equal(model[0].weight.grad, other[0].weight.grad)
            for m in (model, other):
                nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        scaler.step(ours)
        scaler.update()
        plain.step()
        assert equal(model.parameters(), other.parameters())
    before = parameters_of(model)
    set_gradients(model, 9, scale=math.inf)
    scaler.step(ours)  # an overflow: nothing moves
    assert equal(model.parameters(), before)


@pytest.mark.parametrize(
    "arguments", [*({"masked_decay": x} for x in (-1.0, math.nan, math.inf)), {"decay_on": "moments"}], ids=str
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=r"MaskedDecayAdamW: masked_decay=.*, decay_on=.*; need a finite factor of"):
        optimizer_of(make_mlp(), **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# The interface of torch's optimizers


def test_closure_is_called_once_before_the_decay():
    (model, other), calls = (make_mlp(), make_mlp()), []
    optimizer, plain = optimizer_of(model), optimizer_of(other)

    def loss_of(m):
        m.zero_grad()
        loss = m(normal(8, 8, dtype=torch.float32)).square().sum()
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    with torch.no_grad():
        loss = optimizer.step(lambda: loss_of(model))
    assert calls == [True]
    assert loss.detach() > 0
    loss_of(other)
    assert plain.step() is None
    assert equal(model.parameters(), other.parameters())


def test_step_hooks_run_once_and_learning_rate_schedules_work():
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # from now on torch wraps the step of AdamW too
    model, calls = make_mlp(), []
    optimizer = MaskedDecayAdamW(model.parameters(), model, 1.0, (0.8, 0.95), masked_decay=0.1, eps=1e-6)
    assert isinstance(optimizer, torch.optim.AdamW)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (1.0, (0.8, 0.95), 1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 * (step + 1))
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    set_gradients(model)
    optimizer.step()
    schedule.step()
    assert calls == ["before", "after"]
    assert group["lr"] == pytest.approx(0.2)


def train(model, optimizer, steps):
    losses = []
    for iter_num in steps:
        seed_draws(model, 1, iter_num, 0)
        optimizer.zero_grad()
        x = normal(32, 8, seed=2000 + iter_num, dtype=torch.float32)
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (iter_num + 1) % 4 == 0:
            refresh_masks(model)
        losses.append(float(loss.detach()))
    return losses


def test_training_lowers_the_loss_and_resumes_bit_for_bit():
    """A run stopped between two mask refreshes and resumed from a file of the state_dicts ends in the same weights."""
    model, file = make_mlp(), io.BytesIO()
    optimizer = optimizer_of(model, 1e-3, lr=0.02)
    losses = train(model, optimizer, range(30))
    torch.save(copy.deepcopy((model.state_dict(), optimizer.state_dict())), file)
    losses += train(model, optimizer, range(30, 60))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    file.seek(0)
    saved, other = torch.load(file, weights_only=True), make_mlp(seed=20)
    other.load_state_dict(saved[0])
    resumed = optimizer_of(other, 1e-3, lr=0.5)
    resumed.load_state_dict(saved[1])
    assert resumed.param_groups[0]["lr"] == 0.02
    assert train(other, resumed, range(30, 60)) == losses[30:]
    assert equal(model.parameters(), other.parameters())


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("recipe", ["fst", "step"])
@KINDS
def test_copies_and_pickles_go_on_with_the_copied_model(make_copy, recipe, implementation):
    model = make_mlp(recipe)
    model[0].sparse = model[2].sparse = recipe != "step"
    optimizer = get_recipe(recipe).optimizer or MaskedDecayAdamW
    optimizer = optimizer(model.parameters(), model, lr=0.01, masked_decay=0.3, decay_on="weight", **implementation)
    set_gradients(model)
    optimizer.step()
    before = parameters_of(model)
    other, copied = make_copy((model, optimizer))
    assert (copied.model, copied.masked_decay, copied.decay_on) == (other, 0.3, "weight")
    assert copied.dense_start_log == optimizer.dense_start_log
    assert not getattr(copied, "_step_supports_amp_scaling", False)
    for each, its in ((other, copied), (model, optimizer)):
        each[0].sparse = each[2].sparse = True
        set_gradients(each, 1)
        its.step()
        assert not equal(other.parameters(), before)
        assert equal(model.parameters(), before) == (each is other)  # the copy is independent
    assert equal(model.parameters(), other.parameters())


@KINDS
@EITHER
@pytest.mark.parametrize("maximize", ["argument", "group", "later"])
def test_masked_weights_shrink_also_when_the_objective_is_maximized(maximize, decay_on, implementation):
    """AdamW(maximize=True) negates the gradient. So the step is that of the negated gradient without it."""
    model, other = make_mlp(), make_mlp()
    groups = [{"params": model.parameters()} | ({"maximize": True} if maximize == "group" else {})]
    options = {"lr": 0.01, "masked_decay": 0.3, "decay_on": decay_on, **implementation}
    ours = MaskedDecayAdamW(groups, model, maximize=maximize == "argument", **options)
    if maximize == "later":
        ours.param_groups[0]["maximize"] = True
    plain = optimizer_of(other, decay_on=decay_on, **implementation)
    for step in range(2):
        set_gradients(model, step)
        set_gradients(other, step, scale=-1.0)
        ours.step()
        plain.step()
    assert equal(model.parameters(), other.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# runtime.health.decay_ratio: the norm of the decay divided by that of the gradient


def test_decay_ratio_by_hand():
    model = nn.Sequential(nn.Linear(4, 4))
    sparsify(model, "fst", ["0"])
    layer = model[0]
    with torch.no_grad():
        layer.index.zero_()  # pattern 0: rows 0 and 1 keep columns 0 and 1, rows 2 and 3 keep 2 and 3
        layer.weight.copy_(torch.arange(16.0).view(4, 4))
    layer.weight.grad = torch.full((4, 4), 2.0)
    pruned = [2, 3, 6, 7, 8, 9, 12, 13]
    assert expand_index(layer.index).flatten().logical_not().nonzero().flatten().tolist() == pruned
    assert decay_ratio(model, 0.1) == pytest.approx(0.1 * math.sqrt(sum(w * w for w in pruned) / 16) / 2.0)
    assert decay_ratio(model, 0.0) == 0.0


def test_decay_ratio_is_over_all_sparse_weights_and_no_others():
    model = make_mlp()
    set_gradients(model)
    model.requires_grad_(False)
    layers = [model[0], model[2]]
    while layers:
        decayed = torch.cat([(~layer.mask * layer.weight).flatten() for layer in layers])
        gradient = torch.cat([layer.weight.grad.flatten() for layer in layers])
        assert decay_ratio(model, 0.2) == pytest.approx(float(0.2 * decayed.norm() / gradient.norm()), rel=1e-5)
        layers.pop(0).sparse = False
    assert decay_ratio(model, 0.2) is None
    assert decay_ratio(nn.Linear(4, 4), 0.2) is None
