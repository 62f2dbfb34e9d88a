"""Philox, MVUE and the predecessors' estimator.

Exact claims are tested by enumeration. MVUE is averaged over a fine grid of its one uniform: sample variances would be
misleading, because a rarely drawn element shows none. The predecessors' estimator is tested by its ordered pairs.
"""

import itertools
import math
from fractions import Fraction
from functools import partial

import by_hand
import numpy as np
import pytest
import torch
from by_hand import generator, layouts, lognormal
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse24 import group_uniforms, mvue24, philox4x32

TINY, STEP = 2.0**-149, 2.0**-23  # the smallest float32 above zero; the step of the uniforms
normal = partial(by_hand.normal, dtype=torch.float32)
seeded = settings(deadline=None, derandomize=True, max_examples=150)


# ---------------------------------------------------------------------------------------------------------------------
# Randomness


def philox_by_hand(counter, key):
    """Philox4x32-10 in Python ints, after Salmon et al. (2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        high0, high1 = product0 >> 32, product1 >> 32
        c = [high1 ^ c[1] ^ k[0], product1 & 0xFFFFFFFF, high0 ^ c[3] ^ k[1], product0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def uniform_by_hand(row, group, groups, seed):
    """One uniform, from the formula in group_uniforms' docstring."""
    counter = (8 * (row // 16) + row % 8) * 4 * math.ceil(groups / 8) + 4 * (group // 8) + group % 4
    word = 2 * (row // 8 % 2) + group // 4 % 2
    seed %= 2**64
    words = philox_by_hand((counter % 2**32, counter >> 32, 0, 0), (seed % 2**32, seed >> 32))
    return (words[word] % 2**23) / 2**23


RANDOM123 = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""  # counter, key, answer: kat_vectors of Random123, philox4x32 with 10 rounds


def test_philox_gives_the_known_answers_and_equals_python_ints():
    known = torch.tensor([[int(word, 16) for word in line.split()] for line in RANDOM123.split("\n")[1:-1]]).t()
    random = torch.randint(0, 2**32, (6, 200), generator=generator())
    random[:, :20] = torch.where(random[:, :20] % 2 == 0, 0xFFFFFFFF, random[:, :20] % 2)
    inputs = torch.cat([known[:6], random], 1)
    words = torch.stack(philox4x32(tuple(inputs[:4]), tuple(inputs[4:])))
    assert torch.equal(words[:, :3], known[6:])
    assert words.t().tolist() == [philox_by_hand(column[:4], column[4:]) for column in inputs.t().tolist()]


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (16, 8), (17, 9), (35, 20), (3, 33)])
@pytest.mark.parametrize("seed", [0, 1337, 2**40 + 7, -5, 2**63 + 11])
def test_uniforms_follow_the_formula(rows, groups, seed):
    u = group_uniforms(rows, groups, seed)
    assert u.shape == (rows, groups)
    assert u.dtype == torch.float32
    for r, q in {(r, q) for r in range(rows) for q in range(groups) if (7 * r + 3 * q) % 5 == 0}:
        assert u[r, q].item() == uniform_by_hand(r, q, groups, seed)


def test_smaller_matrices_are_corners_of_larger_ones():
    large = group_uniforms(50, 24, 5)
    for rows, groups in ((50, 17), (1, 24), (33, 20)):
        assert torch.equal(group_uniforms(rows, groups, 5), large[:rows, :groups])
    wider = group_uniforms(50, 25, 5)  # another number of 32-column tiles changes the counters of all but two rows
    assert torch.equal(wider[0, :24], large[0])
    assert not torch.equal(wider[1, :24], large[1])


def test_seed_is_an_int_or_a_tensor():
    for seed in (0, 1, -1, 2**31, 2**32 + 1, -(2**63), 2**63 - 1):
        assert torch.equal(group_uniforms(9, 9, seed), group_uniforms(9, 9, torch.tensor(seed)))
        assert torch.equal(group_uniforms(9, 9, seed), group_uniforms(9, 9, seed + 2**64))
    assert torch.equal(group_uniforms(9, 9, 2**63), group_uniforms(9, 9, -(2**63)))
    assert torch.equal(group_uniforms(9, 9, 2**64 - 1), group_uniforms(9, 9, -1))
    assert torch.equal(group_uniforms(9, 9, np.int64(7)), group_uniforms(9, 9, 7))
    draws = [group_uniforms(9, 9, s) for s in (0, 1, 2**32, 2**63, -1)]
    for a, b in itertools.combinations(draws, 2):
        assert (a == b).float().mean() < 0.05


def test_uniforms_look_uniform():
    state = torch.get_rng_state()
    u = group_uniforms(1024, 256, 11).double()
    assert torch.equal(torch.get_rng_state(), state)
    n = u.numel()
    assert u.unique().numel() > 0.98 * n  # no two groups share a word: 2^18 draws of 2^23 values
    assert ((u >= 0) & (u < 1)).all()
    assert (u / STEP == (u / STEP).round()).all()
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    counts = torch.histc(u, 64, 0, 1)
    chi2 = ((counts - n / 64).square() / (n / 64)).sum()
    assert chi2 < 63 + 5 * math.sqrt(2 * 63)
    bits = ((u / STEP).long()[..., None] >> torch.arange(23) & 1).double().mean((0, 1))
    assert ((bits - 0.5).abs() < 5 * 0.5 / math.sqrt(n)).all()
    other = group_uniforms(1024, 256, 12).double()
    for a, b in ((u[1:], u[:-1]), (u[8:], u[:-8]), (u[:, 1:], u[:, :-1]), (u[:, 4:], u[:, :-4]), (u, other)):
        correlation = 12 * ((a - 0.5) * (b - 0.5)).mean()
        assert abs(correlation) < 5 / math.sqrt(a.numel())


# ---------------------------------------------------------------------------------------------------------------------
# MVUE

SMALL = torch.tensor(list(itertools.product((0.0, 1.0, 2.0, 5.0), repeat=4))) * TINY
GRID = (torch.arange(4096) + 0.5) / 4096
GROUPS = {
    "all of {0, 1, -3}": torch.tensor(list(itertools.product((0.0, 1.0, -3.0), repeat=4))),
    "gaussian": normal(100, 4),
    "lognormal(1)": lognormal(60, 4, sigma=1.0),
    "lognormal(3)": lognormal(60, 4, sigma=3.0),
    "lognormal(12)": lognormal(100, 4, sigma=12.0),
    "subnormal": normal(60, 4) * 1e-39,
    "1e30 beside 1e-30": torch.tensor(list(itertools.product((0.0, 1e30, -1e-30), repeat=4))),
    "dominated": torch.tensor([[9.0, 1, 2, 3], [1, -9, 2, 3], [1, 2, 9, 3], [1, 2, 3, -9], [6, 1, 2, 3], [3, 1, 1, 1]]),
}


def optimum(x):
    """The exact solution for groups (..., 4), in float64: inclusion probabilities, kept magnitudes, variance."""
    a = x.double().abs()
    s = a.sort(-1).values
    rest = s[..., :3].sum(-1)
    total = rest + s[..., 3]
    dominated = s[..., 3] > total / 2
    h = torch.where(dominated, rest, total / 2).unsqueeze(-1)
    inclusion = torch.where(a >= h, 1.0, a / h) * (a > 0)
    variance = torch.where(
        dominated, rest.square() - s[..., :3].square().sum(-1), total.square() / 2 - a.square().sum(-1)
    )
    return inclusion, torch.maximum(a, h), variance.clamp(min=0)


def sample_grid(x, grid=GRID):
    """mvue24 of the groups x (n, 4) at every u of the grid: (len(grid), n, 4)."""
    u = grid.view(-1, 1, 1).expand(-1, len(x), 1)
    return mvue24(x.expand(len(grid), -1, -1), 0, u=u)


@pytest.mark.parametrize("name", GROUPS)
def test_mvue_is_unbiased_of_least_variance_and_keeps_two(name):
    x = GROUPS[name]
    y = sample_grid(x)
    inclusion, magnitude, variance = optimum(x)
    kept = y != 0
    assert torch.equal(kept.sum(-1), (x != 0).sum(-1).clamp(max=2).expand(len(GRID), -1))
    values = torch.where(kept, x.sign().double() * magnitude, 0)
    tolerance = 3e-7 * magnitude + 2 * TINY
    assert ((y.double() - values).abs() <= tolerance).all()

    step = 1 / len(GRID) + 2e-6
    frequency = kept.double().mean(0)
    assert ((frequency - inclusion).abs() <= step).all()
    assert (frequency[(inclusion == 1) & (x != 0)] == 1).all()
    assert ((y.double().mean(0) - x.double()).abs() <= magnitude * step + tolerance).all()
    # An inclusion probability off by one step changes the variance by (v^2 - 2 v a) steps.
    slack = ((magnitude.square() - 2 * magnitude * x.double().abs()).abs() * (inclusion < 1)).sum(-1) * step
    error = (y.double() - x.double()).square().sum(-1).mean(0) - variance
    assert (error.abs() <= slack + 1e-6 * magnitude.square().amax(-1)).all()

    y = sample_grid(SMALL, GRID[::8])  # rounding of a few smallest numbers: off by at most two of them
    assert torch.equal((y != 0).sum(-1), (SMALL != 0).sum(-1).clamp(max=2).expand(512, -1))
    assert ((y.double().mean(0) - SMALL.double()).abs() <= 2 * TINY).all()


def test_mvue_by_hand():
    def draw(group, u):
        return mvue24(torch.tensor([group]), 0, u=torch.tensor([[u]])).tolist()[0]

    # S = 10, h = 5: running sums 1 3 6 10, points 5u and 5u + 5
    assert draw([1.0, 2.0, -3.0, 4.0], 0.1) == [5, 0, -5, 0]
    assert draw([1.0, 2.0, -3.0, 4.0], 0.3) == [0, 5, 0, 5]
    assert draw([1.0, 2.0, -3.0, 4.0], 0.7) == [0, 0, -5, 5]
    # 9 > S/2, the rest is 6: 9 is kept unchanged, and one of the others gets magnitude 6
    assert draw([1.0, -9.0, 2.0, 3.0], 0.1) == [6, -9, 0, 0]
    assert draw([1.0, -9.0, 2.0, 3.0], 0.3) == [0, -9, 6, 0]
    assert draw([1.0, -9.0, 2.0, 3.0], 0.6) == [0, -9, 0, 6]
    assert draw([0.0, -7.0, 0.0, 0.0], 0.5) == [0, -7, 0, 0]
    for dtype in (torch.float32, torch.bfloat16):
        assert (mvue24(torch.tensor([[0.0, -0.0, 0.0, 0.0]] * 4, dtype=dtype), 1) == 0).all()
    assert mvue24(torch.zeros(0, 8), 0).shape == (0, 8)


@pytest.mark.parametrize(
    "group",
    [(1.0, 2.0, 3.0, 4.0), (1.0, 1.0, 1.0, 1.0), (0.5, 1.0, 2.0, 9.0), (0.0, 1.0, 2.0, 4.0), (1.0, 2.0, 3.0, 6.0)],
)
def test_no_other_inclusion_probabilities_have_lower_variance(group):
    """Compare sum a^2/pi - sum a^2 over all pi in [0, 1] of sum 2, in steps of 1/48. Kept values are a/pi."""
    a, steps = np.array(group), 48
    counts = np.stack(np.meshgrid(*[np.arange(steps + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    counts = np.concatenate([counts, 2 * steps - counts.sum(1, keepdims=True)], 1)
    counts = counts[(counts[:, 3] >= 0) & (counts[:, 3] <= steps)]
    counts = counts[((counts > 0) | (a == 0)).all(1)]  # an element that is never kept is biased
    pi = counts / steps
    variance = np.divide(a**2, pi, out=np.zeros_like(pi), where=pi > 0).sum(1) - (a**2).sum()
    least = float(optimum(torch.tensor([group]))[2])
    assert variance.min() >= least * (1 - 1e-12)
    assert variance.min() <= least * 1.01  # the grid is fine enough for the comparison
    sampled = (sample_grid(torch.tensor([group])).double() - torch.tensor(group)).square().sum(-1).mean()
    assert float(sampled) == pytest.approx(least, rel=0.01)


def critical_uniforms(x):
    """Multiples of 2^-23 at and near each u where the choice changes, and at the ends of [0, 1)."""
    a = [Fraction(abs(v)) for v in x]
    h = min(sum(a) / 2, sum(a) - max(a))
    ks = {0, 1, 2, 2**22, 2**23 - 2, 2**23 - 1}
    if h:
        total = Fraction(0)
        for v in a:
            total += min(v, h)
            edge = math.floor((total % h) / h * 2**23)
            ks |= {min(max(edge + d, 0), 2**23 - 1) for d in (-2, -1, 0, 1, 2)}
    return torch.tensor(sorted(ks), dtype=torch.float64).mul(STEP).float()


any_float = st.floats(width=32, allow_nan=False, allow_infinity=False)
near_each_other = st.integers(0, 3).map(float) | st.integers(2**23 - 3, 2**23 + 3).map(lambda i: i * STEP)
subnormal = st.integers(-9, 9).map(lambda i: i * TINY)
hard_groups = st.one_of(
    *(st.tuples(s, s, s, s) for s in (any_float, near_each_other, subnormal, any_float | near_each_other | subnormal))
)


@seeded
@given(hard_groups, st.lists(st.integers(0, 2**23 - 1), min_size=4, max_size=4))
@example((0.0, 0.0, TINY, TINY), [0, 1, 2, 3])
@example((TINY, 0.0, TINY, 3e38), [0, 1, 2, 3])
@example((1.0, 100.0, 0.0, 1.5 * STEP), [2**23 - 2, 2**23 - 1, 0, 1])  # h = 1 + a3 is rounded up
def test_mvue_keeps_exactly_two_non_zeros(group, ks):
    x = torch.tensor([group], dtype=torch.float32)
    u = torch.cat([critical_uniforms(x[0].tolist()), torch.tensor(ks).float() * STEP])
    y = sample_grid(x, u)[:, 0]
    assert ((y != 0).sum(1) == min(2, int(x.count_nonzero()))).all()
    assert (y[:, x[0] == 0] == 0).all()
    magnitude = optimum(x)[1].expand(len(u), -1)
    if x.double().abs().sum() < 3e38:
        kept = y != 0
        assert torch.allclose(y.double().abs()[kept], magnitude[kept], rtol=4e-7, atol=3 * TINY)
        assert torch.equal(y.sign()[kept], x.sign().expand(len(u), -1)[kept])


@seeded
@given(hard_groups, st.integers(0, 3))
@example((1e-10, 1e30, 1.0, 1.0), 1)
@example((1e-10, 1.0, 1e30, 1.0), 2)
def test_mvue_always_keeps_what_exceeds_half_the_sum(group, position):
    """Dropping it even once in 2^23 draws, by rounding, would give an unbounded variance."""
    others = [Fraction(abs(v)) for v in np.float32(group).tolist()]
    others[position] = Fraction(0)
    x = np.float32(group)
    with np.errstate(over="ignore"):
        x[position] = max(abs(x[position]), np.float32(float(sum(others)) * 1.001))
    if not math.isfinite(x[position]) or not sum(map(float, abs(x))) < 3e38 or sum(others) < 2**20 * TINY:
        return
    y = sample_grid(torch.from_numpy(x)[None], critical_uniforms(x.tolist()))[:, 0, position]
    assert (y == float(x[position])).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_group_with_a_non_finite_element_stays_non_finite(bad):
    others = torch.tensor(list(itertools.product((0.0, 1.0, -1e-10, 3.0, 1e30, TINY), repeat=3)))
    u = torch.tensor([0, 1, 3, 2**22, 2**23 - 2, 2**23 - 1]) * STEP
    for position in range(4):
        x = torch.cat([others[:, :position], torch.full((len(others), 1), bad), others[:, position:]], 1)
        finite = torch.isfinite(sample_grid(x, u)).all(-1).nonzero()
        assert not len(finite), f"{x[finite[0, 1]].tolist()} at u = {u[finite[0, 0]]} becomes finite"
    x = torch.full((8, 8), 1.0)
    x[3, 5] = bad
    finite = torch.isfinite(mvue24(x, 0)).view(8, 2, 4).all(-1)
    assert (finite.sum(), finite[3, 1]) == (15, False)  # the other groups stay finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(dtype):
    x = (normal(64, 128) * 10.0 ** normal(64, 1, seed=1)).to(dtype)
    y = mvue24(x, 5)
    assert y.dtype == dtype
    assert torch.equal(y, mvue24(x.float(), 5).to(dtype))


def test_float64_is_drawn_alike_and_computed_in_float64():
    x = normal(64, 128, dtype=torch.float64) * (1 + 2.0**-40)
    y, single = mvue24(x, 5), mvue24(x.float(), 5)
    assert y.dtype == torch.float64
    assert ((y != 0) == (single != 0)).double().mean() > 0.999
    both = (y != 0) & (single != 0)
    assert torch.allclose(y[both], single[both].double(), rtol=1e-5)
    magnitude = optimum(x.view(-1, 4))[1].view_as(x)
    assert torch.allclose(y[y != 0].abs(), magnitude[y != 0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", layouts(normal(16, 24)))
def test_draws_do_not_depend_on_the_layout(name):
    view = layouts(normal(16, 24))[name]
    before, state = view.clone(), torch.get_rng_state()
    assert torch.equal(mvue24(view, 9), mvue24(view.contiguous(), 9))
    assert torch.equal(view, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_are_those_of_group_uniforms_in_flattened_rows():
    x = normal(3, 5, 24)
    u = group_uniforms(15, 6, 42)
    assert torch.equal(mvue24(x, 42), mvue24(x, 0, u=u.view(3, 5, 6)))
    assert torch.equal(mvue24(x, 42), mvue24(x.view(15, 24), 42).view(3, 5, 24))
    assert torch.equal(mvue24(x, 42), mvue24(x, torch.tensor(42)))
    assert not torch.equal(mvue24(x, 42), mvue24(x, 43))


def test_mvue_refuses_shapes():
    for shape in ((8,), (4, 6), ()):
        with pytest.raises(ValueError, match="mvue24: shape"):
            mvue24(torch.zeros(shape), 0)
    for u in (torch.zeros(2), torch.zeros(2, 4), torch.zeros(1, 2), torch.zeros(2, 2, 1)):
        with pytest.raises(ValueError, match=r"mvue24: u has shape .* need \(2, 2\)"):
            mvue24(torch.zeros(2, 8), 0, u=u)


def test_the_variance_on_gaussians_is_that_of_chmiel_et_al():
    """0.474 of the squared norm. The estimator before it, two draws without replacement, has 0.503."""
    x = normal(200000, 4)
    square = x.double().square().sum()
    exact = optimum(x)[2].sum() / square
    drawn = (mvue24(x, 1) - x).double().square().sum() / square
    assert float(exact) == pytest.approx(0.474, abs=0.003)
    assert float(drawn) == pytest.approx(float(exact), abs=0.004)
