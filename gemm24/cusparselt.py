"""Cached cuSPARSELt plans, by ctypes. torch._cslt_sparse_mm builds and destroys a plan in each call.

A plan is the library's prepared GEMM D = A B with a 2:4 A: descriptors of three matrices, an algorithm, and the kernel
that was picked. Building one costs the host 0.05 to 0.5 ms, which a short GEMM cannot hide; `matmul` builds it on the
first call of a problem and afterwards calls only `cusparseLtMatmul`.

key        shape, dtypes, layouts, algorithm, split, device and thread. The library's handle belongs to one device and
           may serve one thread at a time, and autograd runs the backward pass in another thread. A thread that has the
           number of one that ended takes over its handle and plans.
lifetime   plans and handles live until the process ends. The library's structs point at each other, so each is built
           in the place where it stays.
streams    a running GEMM writes D and its workspace; the plan is const. So streams and CUDA graphs may share one. Each
           call allocates its workspace from PyTorch's allocator, as PyTorch's op does: the allocator keeps streams
           apart, and memory that is allocated during a capture belongs to the graph as long as the graph lives.
bias       is not supported. It is a pointer in the descriptor, and NVIDIA does not say whether a plan reads it again.

Values and struct sizes are those of cusparseLt.h 0.8.0; 0.7.1 has the same functions and values, and larger structs.
"""

import ctypes
import functools
import threading
from typing import NamedTuple

import torch

LIBRARY = "libcusparseLt.so.0"  # PyTorch's CUDA builds have loaded it already
OLDEST = (0, 7)  # major and minor version whose header was read
STRUCT_BYTES = 2048  # enough for every opaque struct, which has 512 bytes in 0.8.0 and 1024 in 0.7.1
ALIGNMENT = 16  # bytes, of the structs and of the matrices
CUDA_TYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
ORDER_COL, ORDER_ROW = 1, 2  # cusparseOrder_t
NON_TRANSPOSE, TRANSPOSE = 0, 1  # cusparseOperation_t
SPARSITY_50_PERCENT = 0  # cusparseLtSparsity_t
COMPUTE_32F = 2  # cusparseComputeType
ALG_DEFAULT = 0  # cusparseLtMatmulAlg_t
ALG_CONFIG_ID, SPLIT_K = 0, 3  # cusparseLtMatmulAlgAttribute_t

_P, _I64, _U32, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, ctypes.c_int, ctypes.c_size_t
_FUNCTIONS = {  # name after cusparseLt -> types of the arguments; each returns a cusparseStatus_t
    "GetProperty": (_INT, _P),
    "Init": (_P,),
    "DenseDescriptorInit": (_P, _P, _I64, _I64, _I64, _U32, _INT, _INT),
    "StructuredDescriptorInit": (_P, _P, _I64, _I64, _I64, _U32, _INT, _INT, _INT),
    "MatmulDescriptorInit": (_P, _P, _INT, _INT, _P, _P, _P, _P, _INT),
    "MatmulAlgSelectionInit": (_P, _P, _P, _INT),
    "MatmulAlgSetAttribute": (_P, _P, _INT, _P, _SIZE),
    "MatmulPlanInit": (_P, _P, _P, _P),
    "MatmulGetWorkspace": (_P, _P, _P),
    "Matmul": (_P, _P, _P, _P, _P, _P, _P, _P, _P, _P, ctypes.c_int32),
}
_ZERO, _ONE = ctypes.c_float(0.0), ctypes.c_float(1.0)  # alpha and beta, read on the host

# ---------------------------------------------------------------------------------------------------------------------
# The library


@functools.cache
def _load() -> ctypes.CDLL:
    """The library, with the types of its functions. Raises OSError, AttributeError or RuntimeError without one."""
    library = ctypes.CDLL(LIBRARY)
    library.cusparseLtGetErrorName.argtypes, library.cusparseLtGetErrorName.restype = (_INT,), ctypes.c_char_p
    for name, types in _FUNCTIONS.items():
        function = getattr(library, f"cusparseLt{name}")
        function.argtypes, function.restype = types, _INT
    version = (ctypes.c_int * 2)(-1, -1)
    for part in (0, 1):
        library.cusparseLtGetProperty(part, ctypes.byref(version, part * ctypes.sizeof(ctypes.c_int)))
    if tuple(version) < OLDEST:
        raise RuntimeError(f"cuSPARSELt {version[0]}.{version[1]} is too old, need {OLDEST[0]}.{OLDEST[1]} or later")
    return library


@functools.cache
def available() -> str | None:
    """None if the library can be loaded and has every function that is called here, else one line that says why not."""
    try:
        _load()
    except (OSError, AttributeError, RuntimeError) as error:
        return f"cuSPARSELt cannot be called directly: {str(error).partition(chr(10))[0]}"
    return None


def _call(name: str, *args) -> None:
    """Calls cusparseLt<name>. Raises RuntimeError on every status but success."""
    library = _load()
    status = getattr(library, f"cusparseLt{name}")(*args)
    if status:
        said = library.cusparseLtGetErrorName(status).decode()
        raise RuntimeError(f"cusparseLt{name} failed with status {status}, {said}")


def _struct() -> ctypes.Array:
    """An opaque struct, aligned. Whoever holds it must not move it."""
    memory = ctypes.create_string_buffer(STRUCT_BYTES + ALIGNMENT)
    return (ctypes.c_char * STRUCT_BYTES).from_buffer(memory, -ctypes.addressof(memory) % ALIGNMENT)


# ---------------------------------------------------------------------------------------------------------------------
# Plans


class Problem(NamedTuple):
    """The shapes, types and layouts that descriptors are made from: D (m, n) = A (m, k) B (k, n).

    column_major: B is the transpose of a contiguous (n, k). transposed: D^T is written, a contiguous (n, m).
    device: the CUDA device's index. thread: threading.get_ident() of the caller."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    column_major: bool
    transposed: bool
    device: int
    thread: int


class _Plan:
    """The structs of a problem and algorithm, built in order. Raises RuntimeError where the library refuses one."""

    def __init__(self, problem: Problem, alg_id: int, split_k: int):
        self.handle = _handle(problem.device, problem.thread)
        self.a, self.b, self.d, self.matmul, self.selection, self.plan = (_struct() for _ in range(6))
        self._describe(problem)
        _call("MatmulAlgSelectionInit", self.handle, self.selection, self.matmul, ALG_DEFAULT)
        self._set(ALG_CONFIG_ID, alg_id)
        if split_k > 1:
            self._set(SPLIT_K, split_k)
        _call("MatmulPlanInit", self.handle, self.plan, self.matmul, self.selection)
        size = ctypes.c_size_t()
        _call("MatmulGetWorkspace", self.handle, self.plan, ctypes.byref(size))
        self.workspace_bytes = size.value

    def _describe(self, p: Problem) -> None:
        """The descriptors that torch._cslt_sparse_mm makes: all row-major, but D column-major where D^T is wanted."""
        kind = CUDA_TYPES[p.dtype]
        a = (p.m, p.k, p.k, ALIGNMENT, kind, ORDER_ROW, SPARSITY_50_PERCENT)
        b = (p.n, p.k, p.k) if p.column_major else (p.k, p.n, p.n)
        ld, order = (p.m, ORDER_COL) if p.transposed else (p.n, ORDER_ROW)
        _call("StructuredDescriptorInit", self.handle, self.a, *a)
        _call("DenseDescriptorInit", self.handle, self.b, *b, ALIGNMENT, kind, ORDER_ROW)
        _call("DenseDescriptorInit", self.handle, self.d, p.m, p.n, ld, ALIGNMENT, kind, order)
        operations = NON_TRANSPOSE, TRANSPOSE if p.column_major else NON_TRANSPOSE
        matrices = self.a, self.b, self.d, self.d
        _call("MatmulDescriptorInit", self.handle, self.matmul, *operations, *matrices, COMPUTE_32F)

    def _set(self, attribute: int, value: int) -> None:
        value = ctypes.c_int(value)
        size = ctypes.sizeof(value)
        _call("MatmulAlgSetAttribute", self.handle, self.selection, attribute, ctypes.byref(value), size)


_handles: dict[tuple[int, int], ctypes.Array] = {}  # (device, thread) -> cusparseLtHandle_t
_plans: dict[tuple[Problem, int, int], _Plan] = {}  # (problem, alg_id, split_k) -> plan


def _handle(device: int, thread: int) -> ctypes.Array:
    """The library's handle for this device, which must be current, and thread."""
    if (device, thread) not in _handles:
        handle = _struct()
        _call("Init", handle)
        _handles[device, thread] = handle
    return _handles[device, thread]


def _plan(problem: Problem, alg_id: int, split_k: int) -> _Plan:
    key = problem, alg_id, split_k
    if key not in _plans:
        _plans[key] = _Plan(*key)
    return _plans[key]


def _current_stream(device: torch.device) -> int:
    """The cudaStream_t that PyTorch works on, as a number. Tests replace it: it needs a GPU."""
    return torch.cuda.current_stream(device).cuda_stream


# ---------------------------------------------------------------------------------------------------------------------
# GEMMs


def matmul(
    a: torch.Tensor, b: torch.Tensor, rows: int, transposed: bool, alg_id: int, split_k: int = 1
) -> torch.Tensor:
    """D = A B: (rows, n), or with `transposed` a contiguous (n, rows) that holds D^T; in b's dtype.

    a: packed (rows, k) operand as cuSPARSELt's compress writes it. b: (k, n) of the same dtype, bfloat16 or float16,
    contiguous or the transpose of a contiguous (n, k). matmul24 has checked both. Raises RuntimeError where the library
    refuses a problem.
    """
    k, n = b.shape
    column_major = b.stride() != (n, 1)
    problem = Problem(rows, n, k, b.dtype, column_major, transposed, b.get_device(), threading.get_ident())
    d = b.new_empty((n, rows) if transposed else (rows, n))
    with torch.cuda.device_of(b):  # does nothing for tests' tensors on a CPU
        plan = _plan(problem, alg_id, split_k)
        workspace = b.new_empty(plan.workspace_bytes, dtype=torch.uint8)
        stream = ctypes.c_void_p(_current_stream(b.device))
        pointers = ctypes.byref(_ONE), a.data_ptr(), b.data_ptr(), ctypes.byref(_ZERO), d.data_ptr(), d.data_ptr()
        _call("Matmul", plan.handle, plan.plan, *pointers, workspace.data_ptr(), ctypes.byref(stream), 1)
    return d
