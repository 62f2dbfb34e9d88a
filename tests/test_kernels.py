"""Each kernel compared with its PyTorch specification, on a GPU if there is one, else in the Triton interpreter. With
NANO24_PTX=90 or 80, kernels are compiled for that architecture and their PTX is interpreted (tests/ptx/).

Equal means the same bits, except that any NaN equals any NaN, and -0 equals 0. If the order of a sum or a polynomial
matters, the bound is derived beside the comparison.
"""

import inspect
import itertools
import math
import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton backend: triton is not installed")

import kernels
import sparse24
from benchmarks import baselines
from gemm24 import operands
from gemm24.layout import pack24, unpack24
from gemm24.operands import ACTIVATIONS
from sparse24 import adamw_scalars, expand_index, expand_pairs, mvue24, mvue24_with_mask, transposable_index

PTX = os.environ.get("NANO24_PTX")  # compute capability, 90 or 80
DEVICE = "cuda" if torch.cuda.is_available() and not PTX else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning"),  # from numpy
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
kernels.use_patterns(sparse24.PATTERNS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16 = torch.bfloat16


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def backend():
    if not PTX:
        yield
        return
    from ptx import interpreter

    with interpreter.interpreted(int(PTX)):
        yield


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def awkward(*shape, seed=0, dtype=torch.float32, finite=False):
    """Random numbers with zeros, ties, subnormals, very large and small values and, unless `finite`, inf and NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    kind = torch.randint(0, 60, shape, generator=generator)
    small = torch.randint(-2, 3, shape, generator=generator).float()
    x = torch.where(kind < 20, small, x)
    for code, value in ((20, 1e-45), (21, -3e-39), (22, 1e30), (23, 1e-30), (24, -0.0)):
        x = torch.where(kind == code, value, x)
    if not finite:
        for code, value in ((25, math.inf), (26, -math.inf), (27, math.nan)):
            x = torch.where(kind == code, value, x)
    elif dtype == torch.float16:
        x = x.clamp(-1e4, 1e4)
    return x.to(dtype).to(DEVICE)


def assert_equal(got, expected):
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert torch.equal(got.isnan(), expected.isnan())
    got, expected = (torch.nan_to_num(t, nan=0, posinf=7e4, neginf=-7e4) for t in (got, expected))
    assert torch.equal(got, expected)


def assert_same_bits(got, expected):
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


def assert_same_pack(got, expected):
    values = len(expected) * 8 // 9
    assert_equal(got[:values], expected[:values])
    assert_same_bits(got[values:], expected[values:])


def seed_tensor(seed: int) -> torch.Tensor:
    return torch.tensor(seed, dtype=torch.int64, device=DEVICE)


LAUNCHERS = ["transposable_index", "pack_weight_", "pair_index", "soft_threshold24", "sste_scale"]
LAUNCHERS += ["activation", "activation_backward", "mvue24", "mvue24_pack", "activation_backward_mvue24_pack"]
LAUNCHERS += ["relu2_pack", "relu2_backward_pack"]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_take_the_arguments_of_their_specifications(name):
    launcher = getattr(kernels, name)
    specification = getattr(sparse24 if hasattr(sparse24, name) else operands, name).torch
    ours, theirs = (inspect.signature(getattr(f, "_init_fn", f)).parameters for f in (launcher, specification))
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default)
        for p in theirs.values()
        if p.name != "u"  # only the specification takes the caller's uniforms
    ]


def test_launchers_take_leading_dimensions_and_integer_seeds():
    for x in (awkward(8), awkward(2, 5, 12), awkward(3, 2, 4, 8).transpose(0, 2)):
        assert torch.equal(kernels.pair_index(x), sparse24.pair_index.torch(x[None])[0])
        assert_equal(kernels.soft_threshold24(x), sparse24.soft_threshold24.torch(x[None])[0])
        assert_equal(kernels.mvue24(x, 2**64 - 1), mvue24.torch(x[None], -1)[0])
    x = randn(2, 5, 12)
    torch.testing.assert_close(kernels.sste_scale(x), sparse24.sste_scale.torch(x), rtol=1e-6, atol=0)


def test_tables_hold_the_patterns(monkeypatch):
    with pytest.raises(ValueError, match="use_patterns: a process has one order of patterns"):
        kernels.use_patterns(sparse24.PATTERNS.flip(0))
    bits, nibbles = kernels._table(torch.device("cpu"))
    entries = (bits[:, None] >> torch.arange(16)) & 1
    assert torch.equal(entries.bool().view(90, 4, 4), sparse24.PATTERNS)
    for line in range(8):  # four rows, then four columns
        nibble = (nibbles >> 4 * line) & 15
        pairs = torch.stack((nibble & 3, nibble >> 2), dim=1).long()
        mask = sparse24.PATTERNS[:, line] if line < 4 else sparse24.PATTERNS[:, :, line - 4]
        assert torch.equal(torch.zeros(90, 4).scatter(1, pairs, 1).bool(), mask)
        assert (pairs[:, 0] < pairs[:, 1]).all()
    monkeypatch.setattr(kernels, "_TABLES", {})
    with pytest.raises(RuntimeError, match=r"call kernels.use_patterns\(sparse24.PATTERNS\) first"):
        kernels._table(torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# Masks and the soft threshold


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same matrix in four memory layouts."""
    rows, columns = x.shape
    wide = torch.zeros(rows, columns + 3, dtype=x.dtype, device=x.device)
    spread = torch.zeros(2 * rows, 2 * columns, dtype=x.dtype, device=x.device)
    wide[:, 3:], spread[::2, ::2] = x, x
    views = {"contiguous": x, "transposed": x.t().contiguous().t()}
    return views | {"offset": wide[:, 3:], "every other": spread[::2, ::2]}


BY_GROUPS = [(1, 4), (20, 36), (33, 140)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("transposable_index", shape) for shape in ((4, 4), (4, 516), (20, 36))),
        slow("transposable_index", (64, 128)),
        *((name, shape) for name in ("pair_index", "soft_threshold24") for shape in BY_GROUPS),
    ],
)
def test_mask_kernels_equal_their_specifications(name, shape, dtype):
    w = awkward(*shape, dtype=dtype)
    for layout, view in layouts(w).items():
        got = getattr(kernels, name)(view)
        assert_equal(got, getattr(sparse24, name).torch(w))
        assert got.is_contiguous(), layout


def test_search_finds_every_pattern_and_breaks_ties_as_specified():
    w = sparse24.PATTERNS.float().view(9, 10, 4, 4).transpose(1, 2).reshape(36, 40).to(DEVICE) + 1
    assert torch.equal(kernels.transposable_index(w).flatten().cpu(), torch.arange(90, dtype=torch.uint8))
    patterns = torch.randint(0, 2**16, (64, 32), generator=torch.Generator().manual_seed(0))
    bits = (patterns[..., None] >> torch.arange(16)) & 1  # (64, 32, 16): blocks of zeros and ones
    w = bits.view(64, 32, 4, 4).transpose(1, 2).reshape(256, 128).float().to(DEVICE)
    index = kernels.transposable_index(w)
    assert torch.equal(index, transposable_index.torch(w))
    norms = (w * expand_index(index)).view(64, 4, 32, 4).sum((1, 3))
    scores = bits.float() @ sparse24.PATTERNS.flatten(1).t().float()
    assert torch.equal(norms.cpu(), scores.amax(-1))


def test_pair_index_of_all_orders_ties_inf_and_nan():
    values = [0.0, -1.0, 1.0, 2.0, -3.0, math.inf, -math.inf, math.nan]
    w = torch.tensor(list(itertools.product(values, repeat=4)), device=DEVICE)
    assert torch.equal(kernels.pair_index(w), sparse24.pair_index.torch(w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_threshold_scale(dtype):
    w = randn(132, 140, dtype=dtype)
    soft, scale = sparse24.soft_threshold24.torch(w), kernels.sste_scale(w)
    exact = (w.double() * soft.double()).sum() / soft.double().square().sum()
    assert scale.dtype == torch.float32
    assert abs(scale.double() / exact - 1) < 1024 * 2**-24  # one program sums at most 1024 positive terms in float32
    assert kernels.sste_scale(torch.ones(4, 8, dtype=dtype, device=DEVICE)) == 1  # S(w) = 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_approximation_equals_its_specification(dtype):
    for w in (awkward(20, 36, dtype=dtype), awkward(36, 64, dtype=dtype).t()):
        assert torch.equal(baselines.transposable_mask_2approx(w), sparse24.transposable_mask_2approx(w))


# ---------------------------------------------------------------------------------------------------------------------
# The weight pack


def random_index(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(0, 90, (rows // 4, columns // 4), dtype=torch.uint8, generator=generator).to(DEVICE)


def empty_packs(rows: int, columns: int) -> torch.Tensor:
    return torch.zeros(2, rows * columns * 9 // 16, dtype=BF16, device=DEVICE)


def expected_packs(w, index, order):
    mask, w = expand_index(index), w.to(BF16)
    return pack24(w, mask, order), pack24(w.t().contiguous(), mask.t().contiguous(), order)


@pytest.mark.parametrize(
    ("order", "rows", "columns"),
    [("sm80", 128, 128), slow("sm80", 256, 128), ("sm90", 64, 64), ("sm90", 64, 192), ("sm90", 192, 64)],
)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_weight_pack_equals_its_specification(order, rows, columns, dtype):
    w, index = awkward(rows, columns + 64, dtype=dtype)[:, :columns], random_index(rows, columns)
    index_before, packs = index.clone(), empty_packs(rows, columns)
    kernels.pack_weight_(*packs, w, index, order)
    assert torch.equal(index, index_before)
    for got, expected in zip(packs, expected_packs(w, index, order), strict=True):
        assert_same_pack(got, expected)


@pytest.mark.parametrize("order", [slow("sm80"), "sm90"])
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_pack_may_write_one_buffer_alone(order, transposed):
    w, index = randn(256, 128), random_index(256, 128)
    pack = empty_packs(256, 128)[0]
    kernels.pack_weight_(*((None, pack) if transposed else (pack, None)), w, index, order)
    assert_same_bits(pack, expected_packs(w, index, order)[transposed])


def test_weight_pack_without_metadata_writes_values_alone():
    index, (packed, packed_t) = random_index(64, 128), empty_packs(64, 128)
    kernels.pack_weight_(packed, packed_t, randn(64, 128), index, "sm90")
    w = randn(64, 128, seed=1)
    kernels.pack_weight_(packed, packed_t, w, index, "sm90", metadata=False)
    assert torch.equal(unpack24(packed, 64, 128, "sm90"), w.to(BF16) * expand_index(index))
    assert_same_bits(packed_t, expected_packs(w, index, "sm90")[1])


@pytest.mark.parametrize(("order", "rows", "columns"), [("sm80", 128, 64), ("sm90", 64, 128)])
def test_weight_pack_of_a_row_wise_mask_equals_its_specification(order, rows, columns):
    w = awkward(rows, columns, dtype=BF16)
    index = torch.randint(0, 6, (rows, columns // 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    index, packed = index.to(DEVICE), empty_packs(rows, columns)[0]
    kernels.pack_weight_(packed, None, w, index, order)
    assert_same_pack(packed, pack24(w, expand_pairs(index), order))


def test_weight_pack_refuses_wrong_arguments():
    index, w, (packed, packed_t) = random_index(64, 64), randn(64, 64), empty_packs(64, 64)
    for changes, message in (
        ({"order": "sm70"}, "metadata order 'sm70' is unknown, need sm80 or sm90"),
        ({"order": "sm80"}, r"w \(64, 64\) with strides .* order sm80 needs multiples of 128"),
        ({"w": w.t()}, "order sm90 needs multiples of 64 and contiguous rows"),
        ({"w": randn(64, 96)}, "order sm90 needs multiples of 64"),
        ({"packed": packed.to(torch.float16)}, r"need a bfloat16 buffer of \(2304,\)"),
        ({"packed_t": packed_t[:-1]}, r"need a bfloat16 buffer of \(2304,\)"),
        ({"index": index[:8]}, r"index torch.uint8 \(8, 16\), need the contiguous uint8 \(16, 16\)"),
        ({"index": index.int()}, "index torch.int32"),
        ({"index": index.repeat(4, 1)}, r"index torch.uint8 \(64, 16\), need the contiguous uint8 \(16, 16\)"),
        ({"packed": None, "packed_t": None}, "packed and packed_t are both None"),
    ):
        args = {"packed": packed, "packed_t": packed_t, "w": w, "index": index, "order": "sm90"}
        with pytest.raises(ValueError, match=f"pack_weight_: .*{message}"):
            kernels.pack_weight_(**args | changes)
    assert not packed.any()
    assert not packed_t.any()


# ---------------------------------------------------------------------------------------------------------------------
# MVUE


MVUE_SHAPES = [(1, 4), (20, 36), (33, 140), (64, 264), (48, 8), (32, 12)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 8), *map(slow, MVUE_SHAPES)])  # bfloat16 (32, 8) is read in words
def test_mvue_equals_its_specification(shape, dtype):
    x = awkward(*shape, dtype=dtype)
    for seed in (0, -(2**40) - 3):
        for name, view in layouts(x).items():
            got = kernels.mvue24(view, seed_tensor(seed))
            assert_equal(got, mvue24.torch(x, seed))
            by_rows = dtype == torch.bfloat16 and name == "transposed" and shape == (64, 264)  # written row-major
            expected = got.contiguous() if by_rows else torch.empty_like(view)
            assert shape[0] == 1 or got.stride() == expected.stride(), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mvue_of_all_small_groups(dtype):
    """All groups in {0, 1, -3}^4, and groups with dominant, infinite and subnormal elements, for many uniforms."""
    groups = list(itertools.product([0.0, 1.0, -3.0], repeat=4))
    for values in ((1e-10, math.inf, 1, 1), (1e-45, 0, 1e-45, 0), (1, math.nan, 0, 2), (1e30, 1, 1, 1e-30)):
        groups += itertools.permutations(values)
    groups += [(0.0,) * 4] * (-len(groups) % 8)
    x = torch.tensor(groups, dtype=torch.float32).flatten()[None].repeat(32, 1).to(dtype).to(DEVICE)
    for seed in range(2):
        got, (expected, mask) = kernels.mvue24(x, seed_tensor(seed)), mvue24_with_mask(x, seed)
        assert_equal(got, expected)
        assert (mask.view(32, -1, 4).sum(-1) == 2).all()


def groups_at_the_boundary(u: torch.Tensor) -> dict[str, torch.Tensor]:
    """float32 groups for which, with the uniforms u, rounding decides the comparisons of the draw."""
    generator = torch.Generator().manual_seed(1)
    r1, r2, h = (torch.rand(u.shape, generator=generator).to(u.device) for _ in range(3))
    h += 1
    columns = {
        "a2 above h": (r1 * u * h, (1 - r1) * u * h, h * (1 + r2), h * (1 - u)),
        "a1 above h": (u * h, h * (1 + r2), r1 * (1 - u) * h, (1 - r1) * (1 - u) * h),
        "a2 zero": (u * h, h * (1 + r1), torch.zeros_like(u), (1 - u) * h),
    }
    return {name: torch.stack(group, dim=-1).flatten(-2) for name, group in columns.items()}


def test_mvue_where_rounding_decides():
    """Without the guards of the draw, such groups would lose an element of probability one."""
    for name, x in groups_at_the_boundary(sparse24.group_uniforms(32, 64, 0, DEVICE)).items():
        values, mask = mvue24_with_mask(x, 0)
        assert_equal(kernels.mvue24(x, seed_tensor(0)), values)
        groups = x.view(32, 64, 4)
        largest = groups.abs() == groups.abs().amax(-1, keepdim=True)
        assert mask.view(32, 64, 4)[largest].all(), name


def test_mvue_reads_words_only_if_they_are_full_and_aligned(monkeypatch):
    monkeypatch.setattr(kernels, "_launch_words", None)  # calling it would fail
    inside_a_word = randn(64 * 8 + 1, dtype=BF16)[1:]
    for x in (
        randn(32, 12, dtype=BF16),
        randn(48, 8, dtype=BF16),
        randn(8, 48, dtype=BF16).t(),
        randn(64, 16, dtype=BF16)[:, :8],
        inside_a_word.view(64, 8),
        inside_a_word.view(8, 64).t(),
    ):
        assert_equal(kernels.mvue24(x, seed_tensor(1)), mvue24.torch(x, 1))


@kernels.triton.jit
def _philox_kernel(out_ptr, counter, seed):
    n = kernels.tl.arange(0, 4)
    words = kernels._philox(counter + n.to(kernels.tl.int64), seed.to(kernels.tl.int64))
    for i in kernels.tl.static_range(4):
        kernels.tl.store(out_ptr + 4 * n + i, words[i].to(kernels.tl.int64))


def test_philox_uses_all_64_bits_of_counter_and_seed():
    counter, seed = 2**35 + 2**32 - 2, 2**40 + 3
    out = torch.zeros(4, 4, dtype=torch.int64, device=DEVICE)
    _philox_kernel[(1,)](out, counter, seed)
    n = counter + torch.arange(4)
    zero = torch.zeros(4, dtype=torch.int64)
    low = 2**32 - 1
    expected = sparse24.philox4x32((n & low, n >> 32, zero, zero), (torch.tensor(seed & low), torch.tensor(seed >> 32)))
    assert torch.equal(out.cpu(), torch.stack(expected, dim=-1))


def assert_operand(got, values, mask, order):
    if order == "masked":
        assert_equal(got, values)
    else:
        assert_same_bits(got, pack24(values, mask, order))


def assert_sums(sums, x):
    """Row sums in float32, in any order: each addition rounds by at most 2^-24 of the sum of magnitudes."""
    exact = x.double()
    assert sums.dtype == torch.float32
    assert ((sums - exact.sum(1)).abs() <= x.shape[1] * 2**-24 * exact.abs().sum(1)).all()


MVUE_PACKS = [slow("sm80", 128, 64), slow("sm80", 256, 192), ("sm90", 64, 64), slow("sm90", 128, 192)]
MVUE_PACKS += [("masked", 64, 40), slow("masked", 128, 256)]


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize(("order", "rows", "columns"), MVUE_PACKS)
def test_mvue_pack_equals_its_specification(order, rows, columns, token_major):
    x = awkward(rows, columns, dtype=BF16, finite=True)
    argument = x.t().contiguous() if token_major else x
    packed, sums = kernels.mvue24_pack(argument, seed_tensor(7), order, token_major, True)
    assert_operand(packed, *mvue24_with_mask(x, 7), order)
    assert_sums(sums, x)
    without_sums, empty = kernels.mvue24_pack(argument, seed_tensor(7), order, token_major, False)
    assert_same_bits(without_sums, packed)
    assert empty.shape == (0,)


@pytest.mark.parametrize("token_major", [False, True])
def test_mvue_pack_keeps_inf_and_nan(token_major):
    x = awkward(64, 64, dtype=BF16)
    argument = x.t().contiguous() if token_major else x
    packed, _ = kernels.mvue24_pack(argument, seed_tensor(7), "sm90", token_major, False)
    dense = unpack24(packed, 64, 64, "sm90")
    assert_equal(dense, mvue24.torch(x, 7))
    not_finite = ~x.isfinite().view(64, 16, 4).all(-1)
    assert not_finite.any()
    assert torch.equal(not_finite, ~dense.isfinite().view(64, 16, 4).all(-1))


def test_mvue_pack_refuses_wrong_arguments():
    for x, order in (
        (randn(64, 64), "sm90"),
        (randn(96, 64, dtype=BF16), "sm90"),
        (randn(32, 36, dtype=BF16), "masked"),
        (randn(64, 64, dtype=BF16), "sm80"),
    ):
        with pytest.raises(ValueError, match=rf"mvue24 \({order}\): .* need bfloat16, multiples of"):
            kernels.mvue24_pack(x, seed_tensor(0), order, False, False)
    with pytest.raises(ValueError, match="metadata order 'sm70' is unknown, need sm80 or sm90"):
        kernels.mvue24_pack(randn(64, 64, dtype=BF16), seed_tensor(0), "sm70", False, False)


# ---------------------------------------------------------------------------------------------------------------------
# Activations


def z_and_da(activation, d_ff, tokens, dtype, scale=3.0):
    rows = 2 * d_ff if activation in operands.GATED else d_ff
    return (scale * randn(rows, tokens)).to(dtype), randn(d_ff, tokens, seed=1, dtype=dtype)


def half_unit(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bound on the error of rounding x to dtype; eight times that in float32, where several operations round."""
    info = torch.finfo(dtype)
    return (8 if dtype == torch.float32 else 1) * (info.eps / 2 * x.abs() + info.smallest_normal)


def exact(z, da, activation):
    """a and dz in float64."""
    z, da = z.double(), da.double()
    return operands.activation.torch(z, activation), operands.activation_backward.torch(z, da, activation)


# GELU: Abramowitz and Stegun's polynomial for Phi(-|z|) has an error of 7.5e-8, which f multiplies by |z|. For
# |z| > 5.5 the tail itself is below 2e-8. Rounding to float32 adds to that, as do the GPU's approximate exponential and
# reciprocal (2^-22) of terms up to 1.
POLYNOMIAL = 5e-7
# SwiGLU in float32: the slope s (1 + z (1 - s)) multiplies an error of the sigmoid s by |1 + z (1 - 2 s)|, which is
# |z| - 1 if s is near 1, and less if s is smaller. Near 1, the sum 1 + e rounds by 2^-24 and a GPU's reciprocal errs by
# one ulp, 2^-24. (Its exponential errs by two, but e is small.) The largest |z| here is 12.3, so the error is at most
# 11.3 * 2^-23 = 1.35e-6, of which half_unit allows 4.8e-7.
SWIGLU = 1e-6


@pytest.mark.parametrize("activation", operands.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 7), slow((24, 130)), slow((64, 64))])
def test_activation_is_exact_within_rounding(activation, dtype, shape):
    z, da = z_and_da(activation, *shape, dtype)
    expected, expected_dz = exact(z, da, activation)
    gated = activation in operands.GATED
    up = z[shape[0] :].double().abs() if gated else torch.ones_like(expected)
    scale = up.clamp(min=1)
    a, dz = kernels.activation(z, activation), kernels.activation_backward(z, da, activation)
    assert a.dtype == dz.dtype == dtype
    approximate = SWIGLU if activation == "swiglu" and dtype == torch.float32 else POLYNOMIAL
    assert ((a.double() - expected).abs() <= 1.01 * half_unit(expected, dtype) + approximate * scale).all()
    scale_dz = da.double().abs() * (torch.cat((scale, scale)) if gated else scale).view(-1, *shape)
    slack = 1.01 * half_unit(expected_dz, dtype) + approximate * scale_dz.view(dz.shape)
    assert ((dz.double() - expected_dz).abs() <= slack).all()
    assert_equal(baselines.activation_by_token(z, activation), a)
    assert_equal(baselines.activation_backward_by_token(z, da, activation), dz)


@pytest.mark.skipif(DEVICE == "cuda", reason="interpreter backend: a GPU's exponential is approximate")
def test_the_error_of_the_gelu_polynomial():
    z = torch.linspace(-6, 6, 4000).view(1, -1)
    value, slope = kernels.activation(z, "gelu"), kernels.activation_backward(z, torch.ones_like(z), "gelu")
    expected, expected_slope = exact(z, torch.ones_like(z), "gelu")
    assert ((value - expected).abs() - 2**-23 * expected.abs()).max() < 3e-7
    assert (slope - expected_slope).abs().max() < 3e-7
    assert (slope - expected_slope)[:, 2000:].abs().mean() < 5e-8


@pytest.mark.parametrize("activation", operands.ACTIVATIONS)
def test_the_largest_error_is_at_most_twice_that_of_pytorch(activation):
    z, da = z_and_da(activation, 64, 64, BF16)
    leaf = z.clone().requires_grad_()
    theirs = ACTIVATIONS[activation](leaf.t()).t()
    theirs.backward(da)
    for ours, other, truth in zip(
        (kernels.activation(z, activation), kernels.activation_backward(z, da, activation)),
        (theirs.detach(), leaf.grad),
        exact(z, da, activation),
        strict=True,
    ):
        assert (ours.double() - truth).abs().max() <= 2 * (other.double() - truth).abs().max() + 1e-6


@pytest.mark.parametrize("activation", operands.ACTIVATIONS)
def test_activation_of_extreme_numbers(activation):
    z = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 30.0, -30.0, 100.0, -100.0, 3e38, -3e38, math.inf, -math.inf, math.nan])
    halves = 2 if activation in operands.GATED else 1
    z = z.repeat(halves, 1).to(DEVICE)
    da = torch.ones(1, z.shape[1], device=DEVICE)
    for got, expected in (
        (kernels.activation(z, activation), operands.activation.torch(z, activation)),
        (kernels.activation_backward(z, da, activation), operands.activation_backward.torch(z, da, activation)),
    ):
        assert torch.equal(got.isnan(), expected.isnan())
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_activation_refuses_wrong_arguments():
    for z, da, message in (
        (randn(8, 8).t()[:, ::2], None, "need contiguous feature-major"),
        (randn(3, 8), None, r"need contiguous feature-major z \(2 d_ff, tokens\)"),
        (randn(2, 4, 8), None, "need contiguous feature-major"),
        (randn(8, 8), randn(8, 8), r"da \(8, 8\); need"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.activation(z, "geglu") if da is None else kernels.activation_backward(z, da, "geglu")
    for name in ("selu", "reglu"):
        with pytest.raises(kernels.triton.TritonError):  # operands.activation raises a ValueError before
            kernels.activation(randn(4, 4), name)


@pytest.mark.parametrize("activation", ["gelu", slow("relu2"), slow("geglu"), slow("swiglu")])
@pytest.mark.parametrize(
    ("order", "d_ff", "tokens"), [slow("sm90", 64, 192), slow("sm80", 128, 64), ("masked", 32, 136)]
)
def test_fused_backward_equals_its_parts(activation, order, d_ff, tokens):
    z, da = z_and_da(activation, d_ff, tokens, BF16)
    dz, packed, sums = kernels.activation_backward_mvue24_pack(z, da, seed_tensor(-9), activation, order, True)
    assert_equal(dz, kernels.activation_backward(z, da, activation))
    assert_operand(packed, *mvue24_with_mask(dz, -9), order)
    assert_sums(sums, dz)
    _, without_sums, empty = kernels.activation_backward_mvue24_pack(z, da, seed_tensor(-9), activation, order, False)
    assert_same_bits(without_sums, packed)
    assert empty.shape == (0,)


@pytest.mark.parametrize(
    ("activation", "d_ff", "order"),
    [("gelu", 16, "masked"), ("geglu", 16, "masked"), ("geglu", 16, "sm90"), ("gelu", 64, "sm80")],
)
def test_fused_backward_refuses_wrong_arguments(activation, d_ff, order):
    z, da = z_and_da(activation, d_ff, 64, BF16)
    with pytest.raises(ValueError, match=rf"mvue24 \({order}\): .* need bfloat16, multiples of"):
        kernels.activation_backward_mvue24_pack(z, da, seed_tensor(0), activation, order, False)


# ---------------------------------------------------------------------------------------------------------------------
# 2:4 activations of squared ReLU


def assert_same_operands(got, expected, orders):
    for ours, theirs, order in zip(got, expected, orders, strict=True):
        (assert_equal if order == "masked" else assert_same_pack)(ours, theirs)


RELU2 = [("sm90", "masked", 64, 64), slow("masked", "sm90", 128, 64), slow("sm90", "sm90", 64, 192)]
RELU2 += [slow("sm80", "sm80", 128, 128), slow("sm80", "masked", 256, 128), slow("masked", "sm80", 64, 256)]
RELU2 += [slow("sm80", "sm90", 128, 64), slow("masked", "masked", 192, 128)]


@pytest.mark.parametrize(("order", "order_t", "tokens", "d_ff"), RELU2)
def test_relu2_packs_equal_their_specifications(order, order_t, tokens, d_ff):
    z, da = awkward(tokens, d_ff, dtype=BF16), awkward(tokens, d_ff, seed=1, dtype=BF16)
    z[:, ::2], da[:, ::2] = z[:, ::2].nan_to_num(0, 1, -1), da[:, ::2].nan_to_num(0, 1, -1)  # columns with finite sums
    orders, seed = (order, order_t), seed_tensor(-(2**40) - 3)
    assert_same_operands(kernels.relu2_pack(z, seed, *orders), operands.relu2_pack.torch(z, seed, *orders), orders)
    *got, sums = kernels.relu2_backward_pack(z, da, seed, *orders, True)
    *expected, _ = operands.relu2_backward_pack.torch(z, da, seed, *orders)
    assert_same_operands(got, expected, orders)
    dz = operands.relu2_backward_pack.torch(z, da, None, "masked", "masked")[1]
    finite = dz.isfinite().all(1)
    assert 0 < finite.sum() < d_ff
    assert_sums(sums[finite], dz[finite])
    assert not sums[~finite].isfinite().any()
    *without_sums, empty = kernels.relu2_backward_pack(z, da, seed, *orders)
    assert_same_operands(without_sums, got, orders)
    assert empty.shape == (0,)


@pytest.mark.slow
def test_relu2_pack_of_all_orders_ties_inf_and_nan():
    values = [0.0, -0.0, -1.0, 1.0, 2.0, math.inf, -math.inf, math.nan]
    z = torch.tensor(list(itertools.product(values, repeat=4)), dtype=BF16, device=DEVICE).view(64, 256)
    z.view(torch.int16)[z.isnan()] = 0xFF81 - 2**16  # a NaN with a sign and another payload
    packed, a_t = kernels.relu2_pack(z, seed_tensor(0), "sm90", "masked")
    assert_same_pack(packed, operands.relu2_pack.torch(z, 0, "sm90", "masked")[0])
    a = unpack24(packed, 64, 256, "sm90")
    mask = sparse24.mask24(z.float().relu())
    assert_equal(a, torch.where(mask, z.float().relu().square(), 0).to(BF16))
    assert_equal(a_t, mvue24.torch(a.t(), 0))


def test_relu2_packs_refuse_wrong_arguments():
    z = randn(64, 64, dtype=BF16)
    for changes, message in (
        ({"z": z.half()}, r"torch.float16 z \(64, 64\), torch.bfloat16 da \(64, 64\), need bfloat16"),
        ({"da": z.float()}, "torch.float32 da"),
        ({"da": z[:1]}, r"da \(1, 64\), need"),
        ({"z": z[:, :32], "da": z[:, :32]}, r"need bfloat16 \(tokens, d_ff\), multiples of \(64, 64\); change the tok"),
        ({"order": "sm80"}, r"multiples of \(128, 64\)"),
        ({"order_t": "sm80"}, r"multiples of \(64, 128\)"),
        ({"order_t": "library"}, "metadata order 'library' is unknown, need sm80 or sm90"),
    ):
        args = {"z": z, "da": z, "seed": seed_tensor(0), "order": "sm90", "order_t": "masked"} | changes
        with pytest.raises(ValueError, match=f"relu2_pack.*{message}"):
            kernels.relu2_backward_pack(**args)


# ---------------------------------------------------------------------------------------------------------------------
# AdamW


@pytest.mark.parametrize("decay_on_weight", [False, True])
def test_adamw_is_torchs(decay_on_weight):
    shapes, decay, lr = [(64, 128), (4,), (20, 36), (300,), (8, 4)], 0.3, 0.01
    starts = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    indices = [random_index(*shape) if i in (0, 2, 4) else None for i, shape in enumerate(shapes)]
    ours, theirs = [p.clone() for p in starts], [p.double().requires_grad_() for p in starts]
    m, v = ([torch.zeros_like(p) for p in starts] for _ in range(2))
    options = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8}
    weight_decays = [0.1, 0.0, 0.1, 0.0, 0.1]
    groups = [{"params": [p], "weight_decay": wd} for p, wd in zip(theirs, weight_decays, strict=True)]
    reference = torch.optim.AdamW(groups, **options)
    for step in range(1, 4):
        grads = [randn(*shape, seed=100 * step + i) for i, shape in enumerate(shapes)]
        before = [g.clone() for g in grads]
        for p, g, index in zip(theirs, grads, indices, strict=True):
            p.grad = g.double()
            if index is not None:
                masked = torch.where(expand_index(index), 0, p.detach())
                with torch.no_grad():
                    p.sub_(lr * decay * masked) if decay_on_weight else p.grad.add_(decay * masked)
        reference.step()
        factor = decay * (lr if decay_on_weight else 1)
        scalars = [adamw_scalars(step, **options, weight_decay=wd, masked_decay=factor) for wd in weight_decays]
        kernels.adamw_(ours, grads, m, v, indices, scalars, decay_on_weight)
        for got, expected, g, g_before in zip(ours, theirs, grads, before, strict=True):
            # The update is at most lr, with some roundings to float32. p itself rounds twice per step.
            bound = step * (2 * 2**-24 * expected.detach().abs().clamp(min=1) + 16 * 2**-24 * lr)
            assert ((got.double() - expected.detach()).abs() <= bound).all()
            assert torch.equal(g, g_before)


def test_adamw_refuses_wrong_arguments():
    p = randn(4, 4)
    for grad in (randn(4, 4, dtype=BF16), randn(4, 8)[:, ::2], randn(3), randn(17)[1:]):
        with pytest.raises(ValueError, match=r"adamw_: .* need contiguous float32 on"):
            kernels.adamw_([p], [grad], [p], [p], [None], [(0.0,) * 8])


# ---------------------------------------------------------------------------------------------------------------------
# Custom ops


def op_calls():
    x, z, da = (randn(rows, 64, dtype=BF16) for rows in (64, 128, 64))
    seed = seed_tensor(3)
    return {
        "mvue24": (kernels._mvue24, (x, seed)),
        "mvue24 transposed": (kernels._mvue24, (x.t(), seed)),
        "mvue24 transposed, general": (kernels._mvue24, (x[:60].t(), seed)),
        "mvue24_pack": (kernels._mvue24_pack, (x, seed, "sm90", False, True)),
        "mvue24_pack token-major": (kernels._mvue24_pack, (x, seed, "masked", True, False)),
        "activation": (kernels.activation, (z, "swiglu")),
        "activation_backward": (kernels.activation_backward, (z, da, "swiglu")),
        "fused": (kernels._activation_backward_mvue24_pack, (z, da, seed, "geglu", "sm90", True)),
        "relu2_pack": (kernels._relu2_pack, (x, None, seed, "sm90", "masked", False)),
        "relu2_backward_pack": (kernels._relu2_pack, (x, da, seed, "masked", "sm90", True)),
        "pair_index": (kernels.pair_index, (x,)),
        "pair_index of three dimensions": (kernels.pair_index, (x.view(2, 32, 64).transpose(0, 1),)),
        "soft_threshold24": (kernels._soft_threshold_and_scale, (x, True)),
        "soft_threshold24 alone": (kernels._soft_threshold_and_scale, (x.t(), False)),
    }


@pytest.mark.parametrize("name", [slow(n) if n in ("fused", "relu2_backward_pack") else n for n in op_calls()])
def test_custom_ops_and_their_fakes_agree(name):
    op, args = op_calls()[name]
    results = torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    assert set(results.values()) == {"SUCCESS"}
