"""vnm: the router, its tiles, and the settings that it needs."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from methods import vnm
from model import MLP, GPTConfig
from sparse24 import get_recipe, sparsify

D, D_FF = 8, 64  # four units of 16


@pytest.fixture
def mlp() -> MLP:
    torch.manual_seed(0)
    mlp = MLP(GPTConfig(n_embd=D, n_head=1, activation="relu2", bias=False, ffn_ratio=D_FF / D))
    sparsify(mlp, get_recipe("vnm"), ["c_fc", "c_proj"])
    layer = mlp.c_proj
    layer.centroids.copy_(F.normalize(torch.randn(vnm.CENTROIDS, D), dim=-1))
    layer.energies.copy_(torch.rand(vnm.CENTROIDS, D_FF // vnm.UNIT))
    layer.all_units = layer.updating = layer.is_first = False
    return mlp


def test_the_tokens_of_a_tile_compute_the_units_of_most_energy_over_the_tile(mlp):
    layer, x = mlp.c_proj, F.normalize(torch.randn(2 * vnm.V, D), dim=-1)
    computed = layer.computed_units(x)
    nearest = (x @ layer.centroids.t()).argmax(-1)
    order = sorted(range(2 * vnm.V), key=lambda token: (int(nearest[token]), token))
    for tile in (order[: vnm.V], order[vnm.V :]):
        energies = layer.energies[nearest[tile]].sum(0)
        largest = set(energies.argsort(descending=True)[:2].tolist())
        assert all(set(computed[token].nonzero().flatten().tolist()) == largest for token in tile)


def test_an_evaluation_computes_the_units_of_each_tokens_own_centroid(mlp):
    x = F.normalize(torch.randn(10, D), dim=-1)
    mlp.eval()
    computed = mlp.c_proj.computed_units(x)
    for token in range(10):
        energies = mlp.c_proj.energies[(mlp.c_proj.centroids @ x[token]).argmax()]
        assert set(computed[token].nonzero().flatten().tolist()) == set(energies.argsort()[-2:].tolist())


def test_the_layer_is_the_masked_dense_one_with_its_gradient(mlp):
    x = torch.randn(2, vnm.V // 2, D, requires_grad=True)
    computed = mlp.c_proj.computed_units(F.normalize(x.detach().flatten(0, 1), dim=-1))
    mask = computed.repeat_interleave(vnm.UNIT, -1).view(2, vnm.V // 2, D_FF)
    assert 0 < mask.float().mean() < 1
    expected = (F.relu(x @ mlp.c_fc.weight.t()).square() * mask) @ mlp.c_proj.weight.t()
    y = mlp(x)
    torch.testing.assert_close(y, expected)
    inputs = (x, mlp.c_fc.weight, mlp.c_proj.weight)
    for got, want in zip(
        torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_an_update_moves_centroids_and_energies_towards_the_means(mlp):
    layer = mlp.c_proj
    x, a = F.normalize(torch.randn(40, D), dim=-1), torch.rand(40, D_FF)
    layer.updates.fill_(1)
    before = layer.centroids.clone(), layer.energies.clone()
    nearest = layer.nearest(x)
    layer.update(x, a)
    for k in range(vnm.CENTROIDS):
        members = nearest == k
        centroid, energy = before[0][k], before[1][k]
        if members.any():
            centroid = F.normalize(0.9 * centroid + 0.1 * x[members].mean(0), dim=-1)
            sums = a[members].square().unflatten(-1, (-1, vnm.UNIT)).sum(-1)
            energy = 0.9 * energy + 0.1 * sums.mean(0)
        torch.testing.assert_close(layer.centroids[k], centroid)
        torch.testing.assert_close(layer.energies[k], energy)
    assert layer.updates == 2


def test_the_first_update_takes_tokens_as_centroids(mlp):
    layer, x = mlp.c_proj, F.normalize(torch.randn(4 * vnm.CENTROIDS, D), dim=-1)
    layer.update(x, torch.ones(4 * vnm.CENTROIDS, D_FF))
    members = F.one_hot((x @ x[::4].t()).argmax(-1), vnm.CENTROIDS).float()
    torch.testing.assert_close(layer.centroids, F.normalize(members.t() @ x, dim=-1))
    torch.testing.assert_close(layer.energies, torch.full_like(layer.energies, vnm.UNIT))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3, "block_size": 21}, "batch_size x block_size = 63 to be a multiple of the V=64"),
        ({"dense_pretrain": 0.0}, "needs a dense start; use --dense_pretrain=0.05"),
        ({"ffn_ratio": 3.5}, "a hidden width that is a multiple of 16, not 28"),
    ],
)
def test_settings_that_cannot_be_routed_are_refused(change, message):
    settings = {"n_embd": 8, "ffn_ratio": 4.0, "batch_size": 4, "block_size": 32, "max_iters": 100}
    settings |= {"dense_pretrain": 0.05, "sparse": "vnm"}
    vnm.check(SimpleNamespace(**settings))
    with pytest.raises(ValueError, match=message):
        vnm.check(SimpleNamespace(**settings | change))


def test_several_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    settings = {"n_embd": 8, "ffn_ratio": 4.0, "batch_size": 4, "block_size": 32, "max_iters": 100}
    with pytest.raises(ValueError, match="needs one rank, not 2, because ranks do not share their centroids"):
        vnm.check(SimpleNamespace(**settings, dense_pretrain=0.05, sparse="vnm"))


def test_a_training_batch_that_does_not_divide_into_tiles_is_refused(mlp):
    with pytest.raises(ValueError, match=r"vnm: 65 tokens, need a multiple of V=64"):
        mlp(torch.randn(65, D))
