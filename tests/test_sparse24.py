"""The operators of sparse24 except MVUE: patterns, masks, flip rate, soft threshold, FP8 and masked decay.

Exact claims are tested by enumeration: masks are compared with all 90 patterns in float64.
"""

import hashlib
import itertools
import math
from functools import partial

import by_hand
import pytest
import torch
from by_hand import generator, layouts, lognormal, soft, top2, transposable_mask_2approx
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sparse24
from sparse24 import (
    PATTERNS,
    expand_index,
    expand_pairs,
    flip_rate,
    mask24,
    masked_decay_,
    pair_index,
    simulate_fp8,
    soft_threshold24,
    soft_threshold24_backward,
    sste_scale,
    transposable_index,
    transposable_mask,
)

normal = partial(by_hand.normal, dtype=torch.float32)
PAIRS = list(itertools.combinations(range(4), 2))
INF, NAN = math.inf, math.nan
E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
TINY = 2.0**-149  # the smallest float32 above zero
STEP = 2.0**-23


def blocks_of(t):
    """(out, in) to (number of 4x4 blocks, 16), block rows first."""
    rows, columns = t.shape
    return t.reshape(rows // 4, 4, columns // 4, 4).permute(0, 2, 1, 3).reshape(-1, 16)


def kept_norms(w, mask):
    return (blocks_of(w).double().abs() * blocks_of(mask)).sum(1)


def best_norms(w):
    """The largest L1 norm that one of the 90 patterns keeps in each block, in float64."""
    return (blocks_of(w).double().abs() @ PATTERNS.flatten(1).double().t()).amax(1)


def integers(high, *shape):
    return torch.randint(-high, high + 1, shape, generator=generator(high)).float()


# ---------------------------------------------------------------------------------------------------------------------
# The 90 patterns


def test_patterns_are_all_ninety():
    rows = torch.tensor([[column in pair for column in range(4)] for pair in PAIRS])
    choices = rows[torch.cartesian_prod(*[torch.arange(6)] * 4)]  # (1296, 4, 4)
    expected = choices[(choices.sum(1) == 2).all(1)]
    assert len(expected) == 90
    assert {str(pattern) for pattern in PATTERNS.tolist()} == {str(pattern) for pattern in expected.tolist()}


def test_order_of_patterns_is_the_arithmetic_of_the_search():
    """The scores of the search, as 4x4 arrays of coefficients of |W|, are the patterns themselves."""
    a, b, c, d = torch.eye(16, dtype=torch.int64).view(4, 4, 4, 4)
    x, y, f = a - b, c - d, b - c
    e = x + y + 2 * f

    def pair_sum(t, pair):
        return t[PAIRS[pair][0]] + t[PAIRS[pair][1]]

    expected = [pair_sum(e, p) for p in range(6)]
    expected += [f.sum(0) + pair_sum(x, p) + pair_sum(y, q) for p in range(6) for q in range(6)]
    for jk in range(6):
        j, k = PAIRS[jk]
        i, l = (column for column in range(4) if column not in (j, k))
        expected += [f[j] + f[k] + x[xs] + y[ys] + e[es] for es in (i, l) for xs in (j, k) for ys in (j, k)]
    assert torch.equal(torch.stack(expected) + (c + d).sum(0), PATTERNS.long())


def test_hash_of_patterns_is_the_disk_format():
    """Checkpoints store indices into PATTERNS: another order would load without an error and prune other weights."""
    assert hashlib.sha256(bytes(PATTERNS.flatten().tolist())).hexdigest()[:16] == "c0aa3841b253ff22"
    assert sparse24.PATTERNS_HASH == "c0aa3841b253ff22"


# ---------------------------------------------------------------------------------------------------------------------
# Transposable masks

ALL_BITS = (torch.arange(2**16)[:, None] >> torch.arange(16) & 1).float()  # every block of zeros and ones
EXACT = {  # no rounding, many ties: the kept norm is the optimum to the last bit
    "all binary blocks": ALL_BITS.view(256, 256, 4, 4).permute(0, 2, 1, 3).reshape(1024, 1024),
    **{f"integers up to {high}": integers(high, 256, 256) for high in (2, 3, 5, 100)},
    "float64": 1 + integers(8, 64, 64).double() * 2.0**-50,
}
ROUNDED = {
    "gaussian": normal(256, 256),
    "bf16": normal(256, 128, dtype=torch.bfloat16),
    "fp16": normal(128, 128, dtype=torch.float16),
    "lognormal(6)": lognormal(256, 256, sigma=6.0),
    "near ties": 1 + integers(8, 128, 128) * STEP,
    "one large": torch.where(torch.rand(256, 256, generator=generator()) < 0.06, 1.0, 1e-6) * normal(256, 256),
    "subnormal": normal(128, 128) * 1e-40,
    "large": normal(128, 128) * 1e36,
}


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_search_finds_the_optimum(name):
    w = (EXACT | ROUNDED)[name]
    best, kept = best_norms(w), kept_norms(w, transposable_mask(w))
    assert torch.equal(kept, best) if name in EXACT else (kept >= best * (1 - 1e-6)).all()


@pytest.mark.parametrize(
    ("kept", "pruned", "dtype"),
    [
        (2.0, 1.0, torch.float32),
        (1.0, 0.0, torch.float32),
        (1.5, 1.4921875, torch.bfloat16),
        (2 * TINY, TINY, torch.float32),
        # two patterns differ in at least two entries, so the sum is larger for the right one
        (1 + torch.rand(90, 4, 4, generator=generator(1)), torch.rand(90, 4, 4, generator=generator(2)), torch.float32),
    ],
    ids=["two and one", "one and zero", "bf16", "tiny", "random"],
)
def test_each_pattern_as_unique_optimum_is_found(kept, pruned, dtype):
    sign = 2.0 * torch.randint(2, (90, 4, 4), generator=generator()) - 1
    w = torch.where(PATTERNS, kept, pruned) * sign
    assert transposable_index(w.permute(1, 0, 2).reshape(4, 360).to(dtype)).flatten().tolist() == list(range(90))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_weights_give_a_valid_index_and_do_not_change_other_blocks(bad):
    w = normal(64, 64)
    w[torch.rand(64, 64, generator=generator(3)) < 0.2] = bad
    w[:4, :4] = bad
    index = transposable_index(w)
    assert int(index.max()) < 90
    finite = torch.isfinite(blocks_of(w)).all(1)
    assert 0 < finite.sum() < len(finite)
    assert (kept_norms(w, expand_index(index)) >= best_norms(w) * (1 - 1e-6))[finite].all()


@pytest.mark.parametrize("shape", [(4, 4), (4, 1024), (20, 36), (1024, 4), (0, 8), (8, 0)])
def test_mask_is_transposable(shape):
    w = normal(*shape).requires_grad_()
    index, mask = transposable_index(w), transposable_mask(w)
    assert (index.dtype, index.shape) == (torch.uint8, (shape[0] // 4, shape[1] // 4))
    assert (mask.dtype, mask.shape, mask.requires_grad) == (torch.bool, shape, False)
    assert torch.equal(mask, expand_index(index))
    assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert (mask.unflatten(0, (-1, 4)).sum(1) == 2).all()
    for r, c in itertools.product(range(min(5, index.shape[0])), range(min(9, index.shape[1]))):  # blocks by themselves
        assert index[r, c] == transposable_index(w[4 * r : 4 * r + 4, 4 * c : 4 * c + 4])[0, 0]


def test_mask_of_the_transpose_is_the_transposed_mask():
    w = normal(256, 128)
    assert torch.equal(transposable_mask(w), transposable_mask(w.t()).t())


@pytest.mark.parametrize("name", layouts(normal(16, 24)))
def test_layout_does_not_matter(name):
    view = layouts(normal(16, 24))[name]
    before = view.clone()
    for function in (transposable_index, transposable_mask, mask24, soft_threshold24):
        assert torch.equal(function(view), function(view.contiguous()))
    assert float(sste_scale(view)) == pytest.approx(float(sste_scale(view.contiguous())), rel=1e-6)
    assert torch.equal(view, before)


def test_expand_index_is_the_table():
    index = torch.randint(0, 90, (5, 7), generator=generator()).to(torch.uint8)
    mask = expand_index(index)
    for r, c in itertools.product(range(20), range(28)):
        assert mask[r, c] == PATTERNS[int(index[r // 4, c // 4]), r % 4, c % 4]
    assert torch.equal(expand_index(index.t()), expand_index(index.t().contiguous()))


def test_2approx_keeps_half_the_optimum_and_at_most_two():
    for w in (normal(256, 256), lognormal(128, 128, sigma=3.0), integers(3, 128, 128)):
        mask = transposable_mask_2approx(w)
        assert (mask.unflatten(1, (-1, 4)).sum(-1) <= 2).all()
        assert (mask.unflatten(0, (-1, 4)).sum(1) <= 2).all()
        kept, best = kept_norms(w, mask), best_norms(w)
        assert (kept >= best / 2).all()
        eight = blocks_of(mask).sum(1) == 8  # seven entries that fit no pattern may have a larger norm
        assert (kept[eight] <= best[eight] * (1 + 1e-12)).all()


def test_2approx_can_end_with_seven():
    """Row 3 and column 3 have room for one more entry, but only the one that is already kept."""
    w = torch.tensor([[1.0, 15, -14, 3], [13, 1, 12, 2], [11, 10, 2, 4], [5, 6, 7, -16]])
    expected = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]]).bool()
    assert torch.equal(transposable_mask_2approx(w), expected)


def test_2approx_can_be_little_better_than_half():
    w = torch.ones(4, 4)
    w[:2, :2], w[2:, 2:] = 1.01, 0.0
    assert kept_norms(w, transposable_mask_2approx(w)).item() == pytest.approx(4.04)
    assert best_norms(w).item() == pytest.approx(8.0)


# ---------------------------------------------------------------------------------------------------------------------
# Row-wise masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_row_masks_keep_the_two_largest_magnitudes(dtype):
    w = torch.tensor(list(itertools.product([0.0, -1.0, 1.0, 2.0, -3.0], repeat=4)), dtype=dtype)
    mask, index = top2(w), pair_index(w)
    assert [PAIRS[i] for i in index.flatten()] == [tuple(row.nonzero().flatten().tolist()) for row in mask]
    assert torch.equal(expand_pairs(index), mask)
    assert torch.equal(mask24(w), mask)
    assert pair_index(normal(2, 3, 8)).shape == (2, 3, 2)
    assert mask24(torch.zeros(8, 0)).shape == (8, 0)


def test_pair_index_keeps_two_of_groups_that_are_not_finite():
    groups = list(itertools.product([0.0, INF, -INF, NAN, 1.0], repeat=4))
    for values, mask in zip(groups, expand_pairs(pair_index(torch.tensor(groups))), strict=True):
        size = [3 if math.isnan(v) else 2 if math.isinf(v) else v for v in values]
        assert mask.nonzero().flatten().tolist() == sorted(sorted(range(4), key=lambda k: (-size[k], k))[:2])


# ---------------------------------------------------------------------------------------------------------------------
# Refused shapes

BLOCKS = (transposable_index, transposable_mask)
GROUPS = (pair_index, mask24, soft_threshold24, sste_scale, lambda w: soft_threshold24_backward(w, w))


@pytest.mark.parametrize(
    ("functions", "shapes"), [(BLOCKS, [(5, 8), (8, 6), (4,), (), (2, 4, 4)]), (GROUPS, [(3, 6), (4,), (8, 4, 3)])]
)
def test_shapes_that_do_not_divide_by_four_are_refused(functions, shapes):
    for function, shape in itertools.product(functions, shapes):
        with pytest.raises(ValueError, match=r"(transposable|pair|mask24|soft|sste)\w*: shape \(.*\), need "):
            function(torch.zeros(shape))


@pytest.mark.parametrize(
    ("function", "index"),
    [
        (expand_index, torch.zeros(2, 2)),
        (expand_index, torch.zeros(2, 2, dtype=torch.int64)),
        (expand_index, torch.zeros(4, dtype=torch.uint8)),
        (expand_pairs, torch.zeros(2, 2, dtype=torch.int64)),
    ],
)
def test_other_tensors_than_an_index_matrix_are_refused(function, index):
    with pytest.raises(ValueError, match=f"{function.__name__}: .* need the uint8"):
        function(index)


# ---------------------------------------------------------------------------------------------------------------------
# Flip rate


def test_flip_rate_by_hand():
    one, other = torch.tensor([[1, 1, 0, 0]]).bool(), torch.tensor([[1, 0, 1, 0]]).bool()
    assert [flip_rate(one, one), flip_rate(one, other), flip_rate(one, ~one), flip_rate([], [])] == [0.0, 0.5, 1.0, 0.0]
    assert flip_rate([one, torch.ones(2, 4).bool()], [other, torch.ones(2, 4).bool()]) == pytest.approx(2 / 12)


def test_flip_rate_of_indices_is_that_of_masks():
    i, j = torch.meshgrid(torch.arange(90), torch.arange(90), indexing="ij")
    a, b = i.to(torch.uint8), j.to(torch.uint8)
    assert flip_rate(a, b) == flip_rate(expand_index(a), expand_index(b))
    for r, c in itertools.product(range(0, 90, 7), range(90)):
        expected = float((PATTERNS[r] != PATTERNS[c]).double().mean())
        assert flip_rate(a[r : r + 1, c : c + 1], b[r : r + 1, c : c + 1]) == expected
    a, b = a[:6, :6], b[:6, :6]  # row-wise masks
    for r, c in itertools.product(range(6), range(6)):
        one, other = a[r : r + 1, c : c + 1], b[r : r + 1, c : c + 1]
        assert flip_rate(one, other) == flip_rate(expand_pairs(one), expand_pairs(other))


def test_flip_rate_weighs_layers_by_their_entries():
    before, after = ([transposable_index(normal(*shape, seed=seed)) for shape in ((8, 8), (64, 32))] for seed in (0, 1))
    flips = sum(int((expand_index(a) != expand_index(b)).sum()) for a, b in zip(before, after, strict=True))
    assert flip_rate(before, after) == flips / (64 + 2048)


def test_flip_rate_refuses_unequal_shapes_and_dtypes():
    mask, index = torch.ones(4, 4).bool(), torch.zeros(1, 1, dtype=torch.uint8)
    wrong = [(mask, mask[:2]), (mask, index), (index, torch.zeros(1, 2, dtype=torch.uint8))]
    wrong += [(index.long(), index.long()), (mask.float(), mask.float()), ([mask, mask], [mask, mask[:1]])]
    for before, after in wrong:
        with pytest.raises(ValueError, match=r"flip_rate: .* against .*, need two bool masks or two uint8 index"):
            flip_rate(before, after)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        flip_rate([mask], [mask, mask])


# ---------------------------------------------------------------------------------------------------------------------
# Soft threshold, its scale and its gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_soft_threshold_by_hand(dtype):
    w = torch.tensor(list(itertools.product([0.0, -1.0, 1.0, 2.0, -3.0], repeat=4)), dtype=dtype)
    result = soft_threshold24(w.view(-1, 5, 4)).view_as(w)
    assert result.dtype == dtype
    assert torch.equal(result, soft(w))
    assert ((result != 0).sum(1) <= 2).all()


four_floats = st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(four_floats, four_floats)
@example([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.001])
def test_soft_threshold_is_continuous(w, other):
    """|S(w) - S(w')| <= 2 |w - w'| in the largest entry: each magnitude and the threshold move by that much at most."""
    w, other = torch.tensor([w]), torch.tensor([other])
    for t in (1.0, 0.5, 1e-3):
        near = w + t * (other - w)
        moved = (soft_threshold24(near).double() - soft_threshold24(w).double()).abs().max()
        assert moved <= 2 * (near.double() - w.double()).abs().max() + 4 * STEP * near.abs().max()


def test_scale_is_least_squares():
    w = normal(512, 512)
    beta, s = sste_scale(w), soft_threshold24(w)
    assert (beta.shape, beta.dtype) == ((), torch.float32)
    assert float(beta) == pytest.approx(1.484, abs=0.006)
    residual = [float((w - b * s).square().sum()) for b in (beta - 0.01, beta, beta + 0.01)]
    assert residual[1] < min(residual[0], residual[2])
    assert float(sste_scale(torch.tensor([[1.0, -3.0, 2.0, 0.5]]))) == pytest.approx(1.6)  # S = 0 -2 1 0: (6+2) / (4+1)
    for factor in (2.0**-20, -1.0, 1024.0):
        assert float(sste_scale(factor * w)) == pytest.approx(float(beta), rel=1e-5)
    assert sste_scale(w.double()).dtype == torch.float64
    assert sste_scale(w.bfloat16()).dtype == torch.float32
    assert float(sste_scale(w.bfloat16())) == pytest.approx(float(beta), rel=0.01)
    assert [float(sste_scale(zero)) for zero in (torch.zeros(4, 8), torch.ones(4, 8))] == [1.0, 1.0]  # S is zero


def test_the_soft_thresholds_gradient_is_autograds():
    w, ds = by_hand.normal(6, 20).requires_grad_(), by_hand.normal(6, 20, seed=1)
    a = w.unflatten(-1, (-1, 4)).abs()
    t = a.sort(dim=-1).values[..., 1:2]
    (torch.sign(w.unflatten(-1, (-1, 4))) * (a - t).clamp(min=0)).flatten(-2).backward(ds)
    torch.testing.assert_close(soft_threshold24_backward(ds, w.detach()), w.grad, rtol=0, atol=1e-12)


def test_the_soft_thresholds_gradient_of_ties_and_zeros():
    ds = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    assert soft_threshold24_backward(ds, torch.zeros(1, 4)).tolist() == [[0, 0, 0, 0]]
    # |w| = 3, 1, 1, 2: one of the two equal magnitudes sets t = 1; 3 and -2 pass
    got = soft_threshold24_backward(ds, torch.tensor([[3.0, 1.0, 1.0, -2.0]]))[0].tolist()
    assert (got[0], got[3], sorted(got[1:3])) == (1, 8, [0, 7])  # 7 = -(1 * 1 + -1 * 8)


# ---------------------------------------------------------------------------------------------------------------------
# Simulated FP8


@pytest.mark.parametrize(("dtype", "largest", "error"), [(E4, 448, 2**-4), (E5, 57344, 2**-3)])
def test_simulated_fp8_rounds_to_the_type_with_one_scale_per_tensor(dtype, largest, error):
    x = normal(64, 64) * 1e-3
    y, top = simulate_fp8(x, dtype), float(x.abs().max())
    assert y.dtype == x.dtype
    assert float(y.abs().max()) == pytest.approx(top, rel=1e-6)
    scaled = y * (largest / top)  # every value is representable
    torch.testing.assert_close(scaled.to(dtype).float(), scaled, rtol=1e-6, atol=0)
    near = x.abs() > top / 100
    assert 0 < float(((y - x).abs() / x.abs())[near].max()) <= error
    for low in (torch.bfloat16, torch.float16):  # scaled in float32
        assert torch.equal(simulate_fp8(x.to(low), dtype), simulate_fp8(x.to(low).float(), dtype).to(low))
    assert simulate_fp8(torch.zeros(3, 4), dtype).tolist() == [[0.0] * 4] * 3
    assert simulate_fp8(torch.zeros(0, 4), dtype).shape == (0, 4)
    assert torch.isfinite(simulate_fp8(torch.tensor([0.0, 1e-44, 3e-39]), dtype)).all()
    for bad in (INF, -INF, NAN):
        assert not torch.isfinite(simulate_fp8(torch.tensor([1.0, bad, 2.0]), dtype)).any()


@pytest.mark.parametrize(("dtype", "largest", "smallest"), [(E4, 448, 2**-9), (E5, 57344, 2**-16)])
def test_simulated_fp8_uses_the_whole_range_of_the_type(dtype, largest, smallest):
    """All numbers of the type stay as they are: half the range would lose the smallest, twice the range the largest."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()]
    assert (float(numbers.max()), float(numbers[numbers > 0].min())) == (largest, smallest)
    for scale in (1.0, 2.0**-20, 2.0**9):
        assert torch.equal(simulate_fp8(numbers * scale, dtype), numbers * scale)


# ---------------------------------------------------------------------------------------------------------------------
# Masked decay


def test_masked_decay_by_hand():
    grad, w = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[10.0, -20.0, 30.0, 40.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True, False]])
    result = masked_decay_(grad, w, mask, 0.5)
    assert result is grad
    assert not grad.requires_grad
    assert grad.tolist() == [[1, -8, 3, 24]]
    assert w.tolist() == [[10, -20, 30, 40]]


def test_masked_decay_does_not_read_kept_weights():
    w, mask = torch.tensor([[NAN, 1.0, INF, 2.0]]), torch.tensor([[1, 0, 1, 0]]).bool()
    assert masked_decay_(torch.zeros(1, 4), w, mask, 1.0).tolist() == [[0, 1, 0, 2]]
    assert masked_decay_(torch.zeros(1, 4), w, ~mask, 1.0)[0, 0].isnan()


def test_masked_decay_in_other_layouts_and_dtypes():
    w, start = normal(8, 12), normal(8, 12, seed=2)
    index = transposable_index(w)
    mask = expand_index(index)
    expected = start + 0.1 * ~mask * w
    storage = torch.zeros(8, 24)
    storage[:, ::2] = start
    for grad in (start.t().contiguous().t(), storage[:, ::2]):
        torch.testing.assert_close(masked_decay_(grad, w.t().contiguous().t(), mask, 0.1), expected)
    assert (storage[:, 1::2] == 0).all()
    low = masked_decay_(torch.zeros(8, 12, dtype=torch.bfloat16), w, mask, 1.0)
    assert torch.equal(low, (~mask * w).bfloat16())
    assert torch.equal(masked_decay_(start.clone(), w, index, 0.1), masked_decay_(start.clone(), w, mask, 0.1))


def test_masked_decay_refuses_unequal_shapes_and_masks():
    grad, mask = torch.zeros(4, 8), torch.ones(4, 8).bool()
    index = torch.zeros(1, 3, dtype=torch.uint8)  # (1, 2) would fit
    wrong = ((grad, grad[:, :4], mask), (grad, grad, mask[:1]), (grad[:1], grad, mask), (grad, grad, grad))
    for arguments in (*wrong, (grad, grad, index), (grad[0], grad[0], index[0, :2])):
        with pytest.raises(ValueError, match=r"masked_decay_: .*; need one shape and a bool mask"):
            masked_decay_(*arguments, 0.1)
