"""matmul.py: the packed layouts, against the formulas they come from and PyTorch's own converter."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from gemm24 import matmul
from gemm24.matmul import ORDERS, Choice, compress24, matmul24, nibble_positions, pack_ref, packed_parts, unpack_ref
from sparse24 import mask24_ref

SHAPES = [("sm80", 128, 64), ("sm80", 256, 192), ("sm90", 64, 64), ("sm90", 192, 128), ("sm90", 64, 256)]


@pytest.fixture(autouse=True)
def pytorchs_op_serves(monkeypatch):
    """A CUDA build of PyTorch brings a library that could be called directly, but not on tensors of a CPU."""
    monkeypatch.setattr(matmul.cusparselt, "available", lambda: "not on a CPU")


def random_24(rows: int, columns: int, dtype=torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)).to(dtype)
    return x, mask24_ref(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(("order", "rows", "columns"), SHAPES)
def test_positions_are_a_permutation(order, rows, columns):
    positions = nibble_positions(rows, columns, order)
    assert positions.shape == (rows, columns // 4)
    assert torch.equal(positions.flatten().sort().values, torch.arange(rows * columns // 4))


@pytest.mark.parametrize(
    ("order", "rows", "columns", "row", "group", "nibble"),
    [  # worked by hand
        ("sm90", 64, 64, 0, 0, 0),
        ("sm90", 64, 64, 8, 0, 1),  # row p+8: the byte's high nibble
        ("sm90", 64, 64, 0, 4, 2),  # q = 4: byte 1
        ("sm90", 64, 64, 0, 1, 4),  # q = 1: byte 2
        ("sm90", 64, 64, 1, 0, 16),  # the next row: 8 bytes on
        ("sm90", 64, 64, 16, 0, 128),  # the next 16 rows: 64 bytes on
        ("sm90", 64, 64, 0, 8, 512),  # the next 32 columns: 256 bytes on
        ("sm90", 128, 64, 64, 0, 1024),  # the next 64 rows: 8 * 64 bytes on
        ("sm80", 128, 64, 0, 3, 3),
        ("sm80", 128, 64, 8, 0, 4),  # row 8: the next 16-bit word
        ("sm80", 128, 64, 0, 4, 8),  # the next 16 columns: two words on
        ("sm80", 128, 64, 16, 0, 16),
        ("sm80", 128, 64, 1, 0, 32),
        ("sm80", 128, 64, 32, 0, 256),
        ("sm80", 128, 64, 0, 8, 1024),
        ("sm80", 256, 64, 128, 0, 2048),
        ("sm80", 256, 128, 0, 16, 4096),
    ],
)
def test_positions_by_hand(order, rows, columns, row, group, nibble):
    assert nibble_positions(rows, columns, order)[row, group] == nibble


def test_sm80_order_inside_a_32x32_block_is_that_of_pytorchs_converter():
    x, kept = random_24(128, 64, torch.float16)
    packed = pack_ref(x, kept, "sm80")
    _, metadata = packed_parts(packed, 128, 64)
    words = metadata.view(torch.int16).view(-1, 64)  # each 32x32 block is 64 words in a row
    for row in range(0, 128, 32):
        for column in range(0, 64, 32):
            block = torch.where(kept, x, 0)[row : row + 32, column : column + 32].contiguous()
            _, expected = sparse_semi_structured_from_dense_cutlass(block)
            # 64 words to a 32x32 block, 256 to 128 rows of 32 columns
            assert torch.equal(words[row // 32 + column // 32 * 4], expected.flatten()), (row, column)


@pytest.mark.parametrize(("order", "rows", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unpack_inverts_pack(order, rows, columns, dtype):
    x, kept = random_24(rows, columns, dtype)
    packed = pack_ref(x, kept, order)
    assert packed.shape == (rows * columns * 9 // 16,)
    assert torch.equal(unpack_ref(packed, rows, columns, order), torch.where(kept, x, 0))


def test_zeros_that_are_kept_keep_their_place():
    x, kept = random_24(64, 64)
    values, metadata = packed_parts(pack_ref(torch.zeros_like(x), kept, "sm90"), 64, 64)
    assert not values.any()
    assert torch.equal(metadata, packed_parts(pack_ref(x, kept, "sm90"), 64, 64)[1])


def test_wrong_input_is_named():
    x, kept = random_24(64, 64)
    for order in ORDERS:
        with pytest.raises(ValueError, match=rf"pack: shape \(16, 64\), order {order} needs multiples"):
            pack_ref(x[:16], kept[:16], order)
    with pytest.raises(ValueError, match="metadata order 'sm70' is unknown, need one of sm80, sm90"):
        pack_ref(x, kept, "sm70")
    with pytest.raises(ValueError, match="exactly two of every four"):
        pack_ref(x, torch.ones_like(kept), "sm90")
    packed = pack_ref(x, kept, "sm90")
    with pytest.raises(ValueError, match="need a 1-D 16-bit tensor"):
        packed_parts(packed[:-1], 64, 64)
    with pytest.raises(ValueError, match="need a 1-D 16-bit tensor"):
        packed_parts(packed.float(), 64, 64)
    packed_parts(packed, 64, 64)[1].zero_()  # the pair (0, 0)
    with pytest.raises(ValueError, match="do not ascend"):
        unpack_ref(packed, 64, 64, "sm90")


# ---------------------------------------------------------------------------------------------------------------------
# matmul24


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize(("order", "rows", "columns"), [*SHAPES, ("cutlass", 96, 128)])
def test_emulated_gemm_is_the_dense_one_on_the_unpacked_matrix(order, rows, columns, column_major, bias, transposed):
    x, kept = random_24(rows, columns)
    b = torch.randn(40, columns).to(x.dtype).t() if column_major else torch.randn(columns, 40).to(x.dtype)
    vector = torch.randn(rows).to(x.dtype) if bias else None
    d = matmul24(pack_ref(x, kept, order), b, vector, rows, transposed, Choice("emulated", order))
    masked = torch.where(kept, x, 0)
    assert torch.equal(d, matmul24(masked, b, vector, rows, transposed, Choice()))
    assert d.is_contiguous()
    expected = masked.double() @ b.double() + (vector.double()[:, None] if bias else 0)
    expected = expected.t() if transposed else expected
    assert d.shape == expected.shape
    torch.testing.assert_close(d.double(), expected, rtol=2**-8, atol=2**-8 * expected.abs().max().item())


def vendor_spy(monkeypatch, name: str) -> list:
    calls = []

    def spy(*args, **options):
        calls.append((args, options))
        b, m = args[-1], args[0].shape[0] if name == "_cslt_sparse_mm" else args[-3].shape[0]
        n = b.shape[1]
        return b.new_zeros((n, m) if options.get("transpose_result") else (m, n))

    monkeypatch.setattr(torch, name, spy)
    return calls


def test_what_cusparselt_is_called_with(monkeypatch):
    calls = vendor_spy(monkeypatch, "_cslt_sparse_mm")
    x, kept = random_24(128, 64)
    packed, b, bias = pack_ref(x, kept, "sm90"), torch.randn(24, 64).to(x.dtype).t(), x.new_zeros(128)
    d = matmul24(packed, b, bias, 128, True, Choice("cusparselt", "sm90", 7, 2))
    assert d.shape == (24, 128)
    ((a, given), options) = calls.pop()
    assert a.shape == (128, 36)
    assert (a.data_ptr(), given.data_ptr(), given.stride()) == (packed.data_ptr(), b.data_ptr(), b.stride())
    bias = options.pop("bias")
    assert options == {"transpose_result": True, "alg_id": 7, "split_k": 2}
    assert bias.shape == (128,)
    assert matmul24(packed, b, None, 128, False, Choice("cusparselt", "library", 3)).shape == (128, 24)
    assert calls.pop()[1] == {"bias": None, "transpose_result": False, "alg_id": 3}


@pytest.mark.parametrize("transposed", [False, True])
def test_what_cutlass_is_called_with(monkeypatch, transposed):
    x, kept = random_24(64, 128)
    packed = pack_ref(x, kept, "cutlass")
    assert torch.equal(packed, compress24(torch.where(kept, x, 0), "cutlass"))
    b, bias = torch.randn(128, 8).to(x.dtype), x.new_zeros(64)
    for vector, name in ((None, "_sparse_semi_structured_mm"), (bias, "_sparse_semi_structured_addmm")):
        calls = vendor_spy(monkeypatch, name)
        d = matmul24(packed, b, vector, 64, transposed, Choice("cutlass", "cutlass"))
        assert d.shape == ((8, 64) if transposed else (64, 8))
        assert d.is_contiguous()
        values, metadata, given = calls[0][0][-3:]
        reference = sparse_semi_structured_from_dense_cutlass(torch.where(kept, x, 0))
        assert torch.equal(values, reference[0])
        assert torch.equal(metadata, reference[1])
        assert torch.equal(given, b)


WRONG_B = {
    "a slice": lambda b: b[:, :24],
    "padded rows": lambda b: torch.zeros(64, 40).to(b)[:, :32],
    "every other column": lambda b: torch.zeros(64, 64).to(b)[:, ::2],
    "three dimensions": lambda b: b[None],
    "k of 60": lambda b: b[:60].contiguous(),
    "n of 12": lambda b: b[:, :12].contiguous(),
}


@pytest.mark.parametrize("backend", ["cusparselt", "cutlass", "emulated"])
def test_what_a_library_would_misread_is_refused(monkeypatch, backend):
    for name in ("_cslt_sparse_mm", "_sparse_semi_structured_mm", "_sparse_semi_structured_addmm"):
        monkeypatch.setattr(torch, name, lambda *args, **options: pytest.fail("was called"))
    x, kept = random_24(128, 64)
    order = "sm90" if backend == "emulated" else backend
    packed, b, choice = pack_ref(x, kept, "sm90"), torch.randn(64, 32).to(x.dtype), Choice(backend, order)
    for change in WRONG_B.values():
        with pytest.raises(ValueError, match=f"matmul24_{backend}: B "):
            matmul24(packed, change(b), None, 128, False, choice)
    for a in (packed[:-1], packed.float(), packed.view(2, -1), torch.cat((packed, packed))[::2], packed.half()):
        with pytest.raises(ValueError, match=f"matmul24_{backend}: packed A .*need a contiguous torch.bfloat16 .4608,"):
            matmul24(a, b, None, 128, False, choice)
    for bias in (x.new_zeros(64), x.new_zeros(128).float(), x.new_zeros(256)[::2], x.new_zeros(128, 1)):
        with pytest.raises(ValueError, match=f"matmul24_{backend}: bias .*need a contiguous torch.bfloat16 .128,"):
            matmul24(packed, b, bias, 128, False, choice)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend 'fast' is unknown"):
        matmul24(torch.zeros(4), torch.zeros(4, 4), None, 4, False, Choice("fast"))


def test_compress_refuses_what_it_would_misread(monkeypatch):
    x, kept = random_24(64, 64)
    masked = torch.where(kept, x, 0)
    for wrong in (masked.t(), masked[None], masked[:, :32]):
        with pytest.raises(ValueError, match="need a contiguous matrix"):
            compress24(wrong, "library")
    monkeypatch.setattr(torch, "_cslt_compress", lambda x: pack_ref(x, kept, "sm90").view(64, 36))
    assert torch.equal(compress24(masked, "library"), pack_ref(x, kept, "sm90"))


def test_a_library_that_pads_is_taken_as_it_is(monkeypatch):
    """Its blob is longer than 9/16 of the matrix: in eager code, in the fake, and for the multiplication."""
    x, kept = random_24(64, 128)
    masked = torch.where(kept, x, 0)
    padded = torch.cat((pack_ref(x, kept, "sm90").view(64, -1), x.new_zeros(64, 8)), 1)
    monkeypatch.setattr(torch, "_cslt_compress", lambda x: padded)
    matmul._ask_library.cache_clear()
    blob = compress24(masked, "library")
    assert torch.equal(blob, padded.flatten())
    assert matmul.compressed_size(64, 128, "library", x.dtype, x.device) == blob.numel() == 64 * 80
    assert matmul.compressed_size(64, 128, "sm90", x.dtype, x.device) == 64 * 72
    with FakeTensorMode() as mode:
        assert compress24(mode.from_tensor(masked), "library").shape == blob.shape
    size = torch.compile(
        lambda: matmul.compressed_size(64, 128, "library", x.dtype, x.device) + x[0, 0], backend="eager"
    )
    assert torch.equal(size(), blob.numel() + x[0, 0])  # a compiler takes it for a constant
    seen = []
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda a, b, **options: seen.append(a.shape) or b.new_zeros(64, 8))
    matmul24(blob, x.new_zeros(128, 8), None, 64, False, Choice("cusparselt", "library"))
    assert seen == [(64, 80)]
    with pytest.raises(ValueError, match="packed A"):
        matmul24(blob[:-1], x.new_zeros(128, 8), None, 64, False, Choice("cusparselt", "library"))
    matmul._ask_library.cache_clear()


def test_ops_have_fakes_that_fit(monkeypatch):
    x, kept = random_24(128, 64)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda a, b, bias, transpose_result, alg_id: b.new_zeros(
        (b.shape[1], a.shape[0]) if transpose_result else (a.shape[0], b.shape[1])))  # fmt: skip
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", lambda a, meta, b: b.new_zeros(a.shape[0], b.shape[1]))
    ops = torch.ops.nano24
    for b in (torch.randn(64, 8).to(x.dtype), torch.randn(16, 64).to(x.dtype).t()):
        for transposed in (False, True):
            a = pack_ref(x, kept, "sm90")
            check_op(ops.matmul24_emulated, (a, b, x.new_zeros(128), 128, transposed, "sm90"))
            check_op(ops.matmul24_cusparselt, (a, b, None, 128, transposed, 0, 1))
            check_op(ops.matmul24_cutlass, (pack_ref(x, kept, "cutlass"), b, None, 128, transposed))
    check_op(ops.compress24, (torch.where(kept, x, 0), "cutlass"))
    check_op(ops.pack24, (x, kept, "sm90"))


def check_op(op, args):
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["cusparselt", "cutlass", "emulated"])
def test_operands_of_four_bytes_are_refused(monkeypatch, backend):
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda *args, **options: pytest.fail("was called"))
    x, kept = random_24(128, 64)
    packed, b = pack_ref(x, kept, "sm90").float(), torch.randn(64, 32)
    with pytest.raises(ValueError, match=f"matmul24_{backend}: packed A .*of a 16-bit dtype"):
        matmul24(packed, b, None, 128, False, Choice(backend, "sm90"))


def test_columns_that_do_not_fit_an_order_are_refused():
    for order in ORDERS:
        x, kept = random_24(128, 96)
        with pytest.raises(ValueError, match=rf"pack: shape \(128, 96\), order {order} needs multiples"):
            pack_ref(x, kept, order)
        with pytest.raises(ValueError, match=rf"unpack: shape \(128, 96\), order {order} needs multiples"):
            unpack_ref(x.new_zeros(128 * 96 * 9 // 16), 128, 96, order)
