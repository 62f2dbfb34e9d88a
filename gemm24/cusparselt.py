"""Calls cuSPARSELt by ctypes, with cached plans. torch._cslt_sparse_mm builds and destroys a plan in each call.

A plan is the library's prepared GEMM D = A B with a 2:4 A: descriptors of three matrices, an algorithm and its kernel.
Building one takes the host 0.05 to 0.5 ms, which a short GEMM cannot hide. `matmul` builds the plan at the first call
of a problem; later calls run `cusparseLtMatmul` alone.

key        Shape, dtypes, layouts, algorithm, split, device and thread. A handle belongs to one device and serves one
           thread at a time, and autograd runs the backward pass in a thread of its own. Python may give a new thread
           the number of a thread that ended; the new one then takes over its handle and plans.
lifetime   Plans and handles live until the process ends. Structs point at each other, so none may move.
streams    A running GEMM writes D and its workspace, and only reads the plan, so streams and CUDA graphs may share a
           plan. Each call gets its workspace from PyTorch's allocator, which keeps streams apart. Memory that is
           allocated during a capture belongs to the graph as long as the graph lives.
bias       Not supported: the descriptor holds a pointer to it, and NVIDIA does not say when a plan reads that.

Constants and struct sizes are from cusparseLt.h 0.8.0. In 0.7.1 functions and constants are equal, structs larger.
"""

import ctypes
import functools
import threading
from typing import NamedTuple

import torch

LIBRARY = "libcusparseLt.so.0"  # PyTorch's CUDA builds have loaded it already
OLDEST = (0, 7)  # oldest supported version, major and minor
STRUCT_BYTES = 2048  # enough for every opaque struct: 512 bytes in 0.8.0, 1024 in 0.7.1
ALIGNMENT = 16  # structs and matrices begin at multiples of this, in bytes
CUDA_TYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
ORDER_COL, ORDER_ROW = 1, 2  # cusparseOrder_t
NON_TRANSPOSE, TRANSPOSE = 0, 1  # cusparseOperation_t
SPARSITY_50_PERCENT = 0  # cusparseLtSparsity_t
COMPUTE_32F = 2  # cusparseComputeType
ALG_DEFAULT = 0  # cusparseLtMatmulAlg_t
ALG_CONFIG_ID, SPLIT_K = 0, 3  # cusparseLtMatmulAlgAttribute_t

_P, _I64, _U32, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, ctypes.c_int, ctypes.c_size_t
_FUNCTIONS = {  # name without cusparseLt -> types of the arguments; each returns a cusparseStatus_t
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
_ZERO, _ONE = ctypes.c_float(0.0), ctypes.c_float(1.0)  # beta and alpha, in host memory

# ---------------------------------------------------------------------------------------------------------------------
# The library


@functools.cache
def _load() -> ctypes.CDLL:
    """The library, with its functions typed. Raises OSError, AttributeError or RuntimeError if it is missing or old."""
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
    """None if the library can be loaded and has all functions that we call, else one line that says why not."""
    try:
        _load()
    except (OSError, AttributeError, RuntimeError) as error:
        return f"cuSPARSELt cannot be called directly: {str(error).partition(chr(10))[0]}"
    return None


def _call(name: str, *args) -> None:
    """Call cusparseLt<name>. Raises RuntimeError if its status is not success."""
    library = _load()
    status = getattr(library, f"cusparseLt{name}")(*args)
    if status:
        status_name = library.cusparseLtGetErrorName(status).decode()
        raise RuntimeError(f"cusparseLt{name} failed with status {status}, {status_name}")


def _struct() -> ctypes.Array:
    """Aligned memory for an opaque struct, which must not be moved."""
    memory = ctypes.create_string_buffer(STRUCT_BYTES + ALIGNMENT)
    return (ctypes.c_char * STRUCT_BYTES).from_buffer(memory, -ctypes.addressof(memory) % ALIGNMENT)


# ---------------------------------------------------------------------------------------------------------------------
# Plans


class Problem(NamedTuple):
    """Shapes, types and layouts of a GEMM, D (m, n) = A (m, k) B (k, n).

    column_major: B is the transpose of a contiguous (n, k). transposed: D^T is written, a contiguous (n, m). device:
    index of the CUDA device. thread: threading.get_ident() of the caller."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    column_major: bool
    transposed: bool
    device: int
    thread: int


class _Plan:
    """The structs of a problem and algorithm. Raises RuntimeError if the library refuses one."""

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
        """Make the descriptors that torch._cslt_sparse_mm makes: row-major, but D is column-major to write D^T."""
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


@functools.cache
def _handle(device: int, thread: int) -> ctypes.Array:
    """The library's handle for this device and thread. The device must be the current one."""
    handle = _struct()
    _call("Init", handle)
    return handle


_plan = functools.cache(_Plan)  # (problem, alg_id, split_k) -> plan


def _current_stream(device: torch.device) -> int:
    """PyTorch's current cudaStream_t, as a number. It needs a GPU, so tests replace it."""
    return torch.cuda.current_stream(device).cuda_stream


# ---------------------------------------------------------------------------------------------------------------------
# GEMMs


def matmul(
    a: torch.Tensor, b: torch.Tensor, rows: int, transposed: bool, alg_id: int, split_k: int = 1
) -> torch.Tensor:
    """D = A B: (rows, n), or with `transposed` a contiguous (n, rows) that holds D^T; in b's dtype.

    a: packed (rows, k) operand in the layout of cuSPARSELt's compress. b: (k, n), bfloat16 or float16 as a, contiguous
    or the transpose of a contiguous (n, k). The caller, matmul24_cusparselt, has checked both. Raises RuntimeError if
    the library refuses the problem.
    """
    k, n = b.shape
    column_major = b.stride() != (n, 1)
    problem = Problem(rows, n, k, b.dtype, column_major, transposed, b.get_device(), threading.get_ident())
    d = b.new_empty((n, rows) if transposed else (rows, n))
    with torch.cuda.device_of(b):  # does nothing for the CPU tensors of the tests
        plan = _plan(problem, alg_id, split_k)
        workspace = b.new_empty(plan.workspace_bytes, dtype=torch.uint8)
        stream = ctypes.c_void_p(_current_stream(b.device))
        pointers = ctypes.byref(_ONE), a.data_ptr(), b.data_ptr(), ctypes.byref(_ZERO), d.data_ptr(), d.data_ptr()
        _call("Matmul", plan.handle, plan.plan, *pointers, workspace.data_ptr(), ctypes.byref(stream), 1)
    return d
