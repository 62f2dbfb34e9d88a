"""gemm24/layout.py: packed layouts, worked by hand and compared with PyTorch's own converter."""

import pytest
import torch
from planned_mlp import SHAPES, matrix_and_mask
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from gemm24.layout import ORDERS, compress24, nibble_positions, operand_shape, pack24, packed_parts, unpack24


@pytest.mark.parametrize(("order", "rows", "columns"), SHAPES)
def test_positions_are_a_permutation(order, rows, columns):
    positions = nibble_positions(rows, columns, order)
    assert positions.shape == (rows, columns // 4)
    assert torch.equal(positions.flatten().sort().values, torch.arange(rows * columns // 4))


@pytest.mark.parametrize(
    ("order", "rows", "columns", "row", "group", "nibble"),
    [
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


def test_sm80_orders_a_32x32_block_as_pytorchs_converter_does():
    x, mask = matrix_and_mask(128, 64, torch.float16)
    packed = pack24(x, mask, "sm80")
    _, metadata = packed_parts(packed, 128, 64)
    words = metadata.view(torch.int16).view(-1, 64)  # one row per 32x32 block
    for row in range(0, 128, 32):
        for column in range(0, 64, 32):
            block = torch.where(mask, x, 0)[row : row + 32, column : column + 32].contiguous()
            _, expected = sparse_semi_structured_from_dense_cutlass(block)
            assert torch.equal(words[row // 32 + column // 32 * 4], expected.flatten()), (row, column)


@pytest.mark.parametrize(("order", "rows", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unpack_inverts_pack(order, rows, columns, dtype):
    x, mask = matrix_and_mask(rows, columns, dtype)
    packed = pack24(x, mask, order)
    assert packed.shape == (rows * columns * 9 // 16,)
    assert torch.equal(unpack24(packed, rows, columns, order), torch.where(mask, x, 0))


def test_kept_zeros_have_metadata():
    x, mask = matrix_and_mask(64, 64)
    values, metadata = packed_parts(pack24(torch.zeros_like(x), mask, "sm90"), 64, 64)
    assert not values.any()
    assert torch.equal(metadata, packed_parts(pack24(x, mask, "sm90"), 64, 64)[1])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (128, 96)])
def test_shapes_that_do_not_fit_an_order_are_refused(order, rows, columns):
    x, mask = matrix_and_mask(rows, columns)
    message = rf"24: shape \({rows}, {columns}\), order {order} needs multiples"
    with pytest.raises(ValueError, match=f"pack{message}"):
        pack24(x, mask, order)
    with pytest.raises(ValueError, match=f"unpack{message}"):
        unpack24(x.new_zeros(rows * columns * 9 // 16), rows, columns, order)


def test_wrong_input_is_named():
    x, mask = matrix_and_mask(64, 64)
    with pytest.raises(ValueError, match="metadata order 'sm70' is unknown, need one of sm80, sm90"):
        pack24(x, mask, "sm70")
    with pytest.raises(ValueError, match="exactly two of every four"):
        pack24(x, torch.ones_like(mask), "sm90")
    packed = pack24(x, mask, "sm90")
    for wrong in (packed[:-1], packed.float()):
        with pytest.raises(ValueError, match="need a 1-D 16-bit tensor"):
            packed_parts(wrong, 64, 64)
    packed_parts(packed, 64, 64)[1].zero_()  # the pair (0, 0)
    with pytest.raises(ValueError, match="do not ascend"):
        unpack24(packed, 64, 64, "sm90")


def test_compress_refuses_matrices_that_it_would_misread(cslt):
    x, mask = matrix_and_mask(64, 64)
    masked = torch.where(mask, x, 0)
    for wrong in (masked.t(), masked[None], masked[:, :32]):
        with pytest.raises(ValueError, match="need a contiguous matrix"):
            compress24(wrong)
    assert torch.equal(compress24(masked), pack24(x, mask, "sm90"))


def test_a_converter_may_pad_its_operand(cslt, monkeypatch):
    """Eager code, the fake and the compiler must agree on its size."""
    x, mask = matrix_and_mask(64, 128)
    masked = torch.where(mask, x, 0)
    padded = torch.cat((pack24(x, mask, "sm90").view(64, -1), x.new_zeros(64, 8)), 1)
    monkeypatch.setattr(torch, "_cslt_compress", lambda x: padded)
    packed = compress24(masked)
    assert torch.equal(packed, padded.flatten())
    shapes = {order: operand_shape(64, 128, order, x.dtype, x.device) for order in ("masked", "sm90", "library")}
    assert shapes == {"masked": (64, 128), "sm90": (64 * 72,), "library": (64 * 80,)}
    with FakeTensorMode() as mode:
        assert compress24(mode.from_tensor(masked)).shape == packed.shape
    size = torch.compile(lambda: operand_shape(64, 128, "library", x.dtype, x.device)[0] + x[0, 0], backend="eager")
    assert torch.equal(size(), packed.numel() + x[0, 0])


def test_ops_have_fakes_that_fit(cslt):
    x, mask = matrix_and_mask(128, 64)
    for op, args in ((torch.ops.nano24.pack24, (x, mask, "sm90")), (torch.ops.nano24.compress24, (x * mask,))):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
