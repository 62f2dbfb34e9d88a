"""spmm.py: the packed layouts, against the formulas they come from and PyTorch's own converter."""

import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from operators import mask24_ref
from spmm import ORDERS, nibble_positions, pack_ref, packed_parts, unpack_ref

SHAPES = [("sm80", 128, 64), ("sm80", 256, 192), ("sm90", 64, 64), ("sm90", 192, 128), ("sm90", 64, 256)]


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
        with pytest.raises(ValueError, match=rf"pack: shape \(32, 64\), order {order} needs multiples"):
            pack_ref(x[:32], kept[:32], order)
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
