"""gemm24/matmul.py: each backend compared with the dense product, and the arguments of the vendor's calls."""

import pytest
import torch
from planned_mlp import SHAPES, matrix_and_mask

from gemm24 import cusparselt
from gemm24.layout import pack24
from gemm24.matmul import Choice, matmul24


@pytest.fixture(autouse=True)
def pytorchs_op_serves(monkeypatch):
    """A CUDA build of PyTorch brings the library, which cannot be called on CPU tensors."""
    monkeypatch.setattr(cusparselt, "available", lambda: "not on a CPU")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize(("order", "rows", "columns"), SHAPES)
def test_emulated_and_masked_gemms_are_dense_products(order, rows, columns, column_major, bias, transposed):
    x, mask = matrix_and_mask(rows, columns)
    b = torch.randn(40, columns).to(x.dtype).t() if column_major else torch.randn(columns, 40).to(x.dtype)
    vector = torch.randn(rows).to(x.dtype) if bias else None
    d = matmul24(pack24(x, mask, order), b, vector, rows, transposed, Choice("emulated", order))
    masked = torch.where(mask, x, 0)
    assert torch.equal(d, matmul24(masked, b, vector, rows, transposed, Choice()))
    assert d.is_contiguous()
    expected = masked.double() @ b.double() + (vector.double()[:, None] if bias else 0)
    expected = expected.t() if transposed else expected
    assert d.shape == expected.shape
    torch.testing.assert_close(d.double(), expected, rtol=2**-8, atol=2**-8 * expected.abs().max().item())


def test_the_arguments_of_cusparselt(monkeypatch):
    calls = []

    def spy(*args, **options):
        calls.append((args, options))
        shape = (len(args[0]), args[1].shape[1])
        return args[1].new_zeros(shape[::-1] if options["transpose_result"] else shape)

    monkeypatch.setattr(torch, "_cslt_sparse_mm", spy)
    x, mask = matrix_and_mask(128, 64)
    packed, b, bias = pack24(x, mask, "sm90"), torch.randn(24, 64).to(x.dtype).t(), x.new_zeros(128)
    assert matmul24(packed, b, bias, 128, True, Choice("cusparselt", "sm90", 7, 2)).shape == (24, 128)
    ((a, b_argument), options) = calls.pop()
    assert a.shape == (128, 36)
    assert (a.data_ptr(), b_argument.data_ptr(), b_argument.stride()) == (packed.data_ptr(), b.data_ptr(), b.stride())
    assert options.pop("bias").shape == (128,)
    assert options == {"transpose_result": True, "alg_id": 7, "split_k": 2}
    padded = torch.cat((packed.view(128, -1), x.new_zeros(128, 8)), 1).flatten()  # a converter may pad
    assert matmul24(padded, b, None, 128, False, Choice("cusparselt", "library", 3)).shape == (128, 24)
    (a, _), options = calls.pop()
    assert a.shape == (128, 44)
    assert options == {"bias": None, "transpose_result": False, "alg_id": 3}


WRONG_B = {
    "a slice": lambda b: b[:, :24],
    "padded rows": lambda b: torch.zeros(64, 40).to(b)[:, :32],
    "every other column": lambda b: torch.zeros(64, 64).to(b)[:, ::2],
    "three dimensions": lambda b: b[None],
    "k of 60": lambda b: b[:60].contiguous(),
    "n of 12": lambda b: b[:, :12].contiguous(),
}


@pytest.mark.parametrize("backend", ["cusparselt", "emulated"])
def test_operands_that_a_library_would_misread_are_refused(monkeypatch, backend):
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda *args, **options: pytest.fail("was called"))
    x, mask = matrix_and_mask(128, 64)
    packed, b, choice = pack24(x, mask, "sm90"), torch.randn(64, 32).to(x.dtype), Choice(backend, "sm90")
    for change in WRONG_B.values():
        with pytest.raises(ValueError, match=f"matmul24_{backend}: B "):
            matmul24(packed, change(b), None, 128, False, choice)
    for a in (packed[:-1], packed.float(), packed.view(2, -1), torch.cat((packed, packed))[::2], packed.half()):
        with pytest.raises(ValueError, match=f"matmul24_{backend}: packed A .*need a contiguous torch.bfloat16 .4608,"):
            matmul24(a, b, None, 128, False, choice)
    with pytest.raises(ValueError, match=f"matmul24_{backend}: packed A .*of a 16-bit dtype"):
        matmul24(packed.float(), b.float(), None, 128, False, choice)
    for bias in (x.new_zeros(64), x.new_zeros(128).float(), x.new_zeros(256)[::2], x.new_zeros(128, 1)):
        with pytest.raises(ValueError, match=f"matmul24_{backend}: bias .*need a contiguous torch.bfloat16 .128,"):
            matmul24(packed, b, bias, 128, False, choice)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend 'fast' is unknown, need one of masked, cusparselt, emulated"):
        matmul24(torch.zeros(4), torch.zeros(4, 4), None, 4, False, Choice("fast"))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("column_major", [False, True])
def test_ops_have_fakes_that_fit(cslt, column_major, transposed):
    x, mask = matrix_and_mask(128, 64)
    b = torch.randn(16, 64).to(x.dtype).t() if column_major else torch.randn(64, 8).to(x.dtype)
    packed, options = pack24(x, mask, "sm90"), {"test_utils": ("test_schema", "test_faketensor")}
    args = (packed, b, x.new_zeros(128), 128, transposed)
    torch.library.opcheck(torch.ops.nano24.matmul24_emulated, (*args, "sm90"), **options)
    torch.library.opcheck(torch.ops.nano24.matmul24_cusparselt, (packed, b, None, 128, transposed, 0, 1), **options)
