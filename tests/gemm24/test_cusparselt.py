"""gemm24/cusparselt.py with a stand-in for NVIDIA's library, compiled from cusparselt_stub.c."""

import ctypes
import gc
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from gemm24 import cusparselt, matmul
from gemm24.matmul import Choice, matmul24

COMPILER = shutil.which("cc") or shutil.which("gcc")
ROWS, K, N = 64, 128, 24
ALL_FUNCTIONS = [name for name in cusparselt._FUNCTIONS if name != "GetProperty"]
STREAM = 0x5EED


@pytest.fixture(scope="module")
def stub_path(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("the stand-in for cuSPARSELt is written in C, and this machine has no C compiler (cc or gcc)")
    path = tmp_path_factory.mktemp("stub") / "libcusparseLt.so.0"
    source = Path(__file__).with_name("cusparselt_stub.c")
    subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    return path


def forget() -> None:
    """Empty the caches: the test has changed the library."""
    for cached in (cusparselt._load, cusparselt.available, cusparselt._handle, cusparselt._plan):
        cached.cache_clear()


@pytest.fixture
def stub(stub_path, monkeypatch):
    """The stand-in instead of NVIDIA's library, with empty caches and one stream."""
    library = ctypes.CDLL(str(stub_path))
    library.stub_log.restype = ctypes.c_char_p
    library.stub_clear()
    library.stub_version(0, 8)
    library.stub_workspace(ctypes.c_size_t(4096))
    monkeypatch.setattr(cusparselt, "LIBRARY", str(stub_path))
    monkeypatch.setattr(cusparselt, "_current_stream", lambda device: STREAM)
    forget()
    yield library
    forget()


def calls(stub, name: str = "") -> list[str]:
    """The stand-in's log since the last call, of one function or of all."""
    lines = stub.stub_log().decode().splitlines()
    stub.stub_clear()
    return [line for line in lines if not name or line.split()[0] == name]


def operands(column_major: bool = False, dtype=torch.bfloat16, k: int = K, n: int = N):
    """A, which the stand-in reads as a flat dense matrix, and B."""
    generator = torch.Generator().manual_seed(k + n)
    a = torch.randn(ROWS, k, generator=generator).to(dtype)
    b = torch.randn(*((n, k) if column_major else (k, n)), generator=generator).to(dtype)
    return a.flatten(), b.t() if column_major else b


def assert_product(d, a, b, transposed: bool = False) -> None:
    expected = a.view(ROWS, -1).float() @ b.float()
    torch.testing.assert_close(d.float(), expected.t() if transposed else expected, rtol=2**-8, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Descriptors


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("column_major", [False, True])
def test_descriptors_and_result_of_each_layout(stub, column_major, transposed):
    a, b = operands(column_major)
    d = cusparselt.matmul(a, b, ROWS, transposed, 7, 4)
    b_line = f"{N} {K} ld {K}" if column_major else f"{K} {N} ld {N}"
    ld, order = (ROWS, 1) if transposed else (N, 2)
    assert calls(stub) == [
        "Init",
        f"StructuredDescriptorInit {ROWS} {K} ld {K} align 16 type 14 order 2",
        f"DenseDescriptorInit {b_line} align 16 type 14 order 2",
        f"DenseDescriptorInit {ROWS} {N} ld {ld} align 16 type 14 order {order}",
        f"MatmulDescriptorInit op 0 {int(column_major)} compute 2",
        "MatmulAlgSelectionInit",
        "MatmulAlgSetAttribute 0 = 7",
        "MatmulAlgSetAttribute 3 = 4",
        "MatmulPlanInit alg 7 split 4",
        "MatmulGetWorkspace",
        f"Matmul alg 7 stream {STREAM:#x}",
    ]
    assert d.is_contiguous()
    assert d.dtype == torch.bfloat16
    assert_product(d, a, b, transposed)
    cusparselt.matmul(a, b, ROWS, transposed, 0, 1)  # sets no split
    assert calls(stub, "MatmulAlgSetAttribute") == ["MatmulAlgSetAttribute 0 = 0"]


@pytest.mark.parametrize(("dtype", "code"), [(torch.bfloat16, 14), (torch.float16, 2)])
def test_matrices_have_the_type_of_the_operands(stub, dtype, code):
    a, b = operands(dtype=dtype)
    assert cusparselt.matmul(a, b, ROWS, False, 0).dtype == dtype
    types = [line.split("type ")[1].split()[0] for line in calls(stub) if "type" in line]
    assert types == [str(code)] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Cached plans and handles


def test_one_plan_serves_all_calls_of_a_problem(stub):
    a, b = operands()
    results = [cusparselt.matmul(a, b, ROWS, False, 3, 1)]
    calls(stub)
    for _ in range(3):
        gc.collect()  # would free structs without a reference, to which the stand-in has pointers
        results.append(cusparselt.matmul(a.clone(), b.clone(), ROWS, False, 3, 1))
    assert calls(stub) == [f"Matmul alg 3 stream {STREAM:#x}"] * 3
    assert all(torch.equal(d, results[0]) for d in results)


def test_another_problem_has_another_plan(stub):
    a, b = operands()
    first = {"a": a, "b": b, "rows": ROWS, "transposed": False, "alg_id": 0, "split_k": 1}
    half, long, wide, turned = operands(dtype=torch.float16), operands(k=192), operands(n=32), operands(True)
    others = [{"alg_id": 1}, {"split_k": 2}, {"transposed": True}, {"rows": 32}]
    others += [dict(zip("ab", pair, strict=True)) for pair in (half, long, wide, turned)]
    for change in ({}, *others):
        cusparselt.matmul(**{**first, **change})
        assert len(calls(stub, "MatmulPlanInit")) == 1, change
    for change in ({}, *others):
        cusparselt.matmul(**{**first, **change})
        assert not calls(stub, "MatmulPlanInit"), change


def test_each_thread_has_its_own_handle_and_plans(stub):
    a, b = operands()
    cusparselt.matmul(a, b, ROWS, False, 0, 1)
    calls(stub)
    results = []
    thread = threading.Thread(target=lambda: results.append(cusparselt.matmul(a, b, ROWS, False, 0, 1)))
    thread.start()
    thread.join()
    lines = [line.split()[0] for line in calls(stub)]
    assert lines.count("Init") == lines.count("MatmulPlanInit") == 1
    assert_product(results[0], a, b)


def test_each_device_has_its_own_handle(stub):
    assert cusparselt._handle(0, 1) is cusparselt._handle(0, 1)
    assert cusparselt._handle(1, 1) is not cusparselt._handle(0, 1)
    assert calls(stub) == ["Init", "Init"]
    first, second = (cusparselt.Problem(64, 8, 64, torch.bfloat16, False, False, i, 1) for i in (0, 1))
    assert cusparselt._plan(first, 0, 1).handle is not cusparselt._plan(second, 0, 1).handle


def test_streams_share_a_plan(stub, monkeypatch):
    a, b = operands()
    for stream in (0x10, 0x20):
        monkeypatch.setattr(cusparselt, "_current_stream", lambda device, stream=stream: stream)
        cusparselt.matmul(a, b, ROWS, False, 0, 1)
    lines = calls(stub)
    launches = [line for line in lines if line.startswith("Matmul ")]
    assert launches == ["Matmul alg 0 stream 0x10", "Matmul alg 0 stream 0x20"]
    assert sum(line.startswith("MatmulPlanInit") for line in lines) == 1


@pytest.mark.parametrize("size", [0, 4096, 1 << 20])
def test_each_call_allocates_a_workspace_of_the_plans_size(stub, monkeypatch, size):
    """The stand-in writes all of it, and refuses a pointer if the size is 0."""
    stub.stub_workspace(ctypes.c_size_t(size))
    a, b = operands()
    sizes, allocate = [], torch.Tensor.new_empty

    def spy(self, *shape, **options):
        if options.get("dtype") == torch.uint8:
            sizes.append(shape[0])
        return allocate(self, *shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", spy)
    for _ in range(2):
        assert_product(cusparselt.matmul(a, b, ROWS, False, 0, 1), a, b)
    assert sizes == [size, size]


# ---------------------------------------------------------------------------------------------------------------------
# Errors, and PyTorch's op instead


@pytest.mark.parametrize("name", ALL_FUNCTIONS)
def test_a_status_is_an_error_and_nothing_broken_is_cached(stub, name):
    a, b = operands()
    stub.stub_refuse(name.encode(), 10)
    with pytest.raises(RuntimeError, match=f"cusparseLt{name} failed with status 10, CUSPARSE_STATUS_NOT_SUPPORTED"):
        cusparselt.matmul(a, b, ROWS, False, 0, 2)
    stub.stub_clear()
    assert_product(cusparselt.matmul(a, b, ROWS, False, 0, 2), a, b)


def test_available_says_why_not(stub, monkeypatch, tmp_path):
    assert cusparselt.available() is None
    stub.stub_version(0, 6)
    forget()
    assert cusparselt.available().endswith("cuSPARSELt 0.6 is too old, need 0.7 or later")
    stub.stub_version(0, 8)
    monkeypatch.setitem(cusparselt._FUNCTIONS, "NotThere", ())
    forget()
    assert "cusparseLtNotThere" in cusparselt.available()
    monkeypatch.setattr(cusparselt, "LIBRARY", str(tmp_path / "none.so"))
    forget()
    assert "none.so" in cusparselt.available()


def test_pytorchs_op_serves_for_a_bias_and_without_a_library(stub, monkeypatch):
    monkeypatch.setattr(matmul, "_check", lambda *args, **options: None)
    (a, b), bias, by_torch = operands(), torch.arange(ROWS).bfloat16(), []
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda a, b, **options: by_torch.append(options) or b.clone())
    choice = Choice("cusparselt", "sm90", 5, 2)
    assert_product(matmul24(a, b, None, ROWS, False, choice), a, b)
    assert not by_torch
    assert calls(stub, "MatmulPlanInit") == ["MatmulPlanInit alg 5 split 2"]
    matmul24(a, b, bias, ROWS, False, choice)
    assert by_torch == [{"bias": bias, "transpose_result": False, "alg_id": 5, "split_k": 2}]
    with monkeypatch.context() as patch:
        patch.setattr(cusparselt, "available", lambda: "is not there")
        matmul24(a, b, None, ROWS, False, choice)
    assert len(by_torch) == 2
    assert not calls(stub, "MatmulPlanInit")
