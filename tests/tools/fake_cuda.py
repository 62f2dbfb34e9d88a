"""A fake CUDA GPU for machines without one. It runs on the CPU and refuses what a real GPU refuses.

    python tests/tools/fake_cuda.py train.py --device=cuda ...     run a script as if the machine had one H200

A GPU tensor is a CPU tensor with a mark on its storage. Ops that mix the two devices raise an error, and so do
arguments that torch.cuda refuses. Waiting for the GPU raises an error during the capture of a CUDA graph and under
torch.cuda.set_sync_debug_mode("error"). Triton kernels run in Triton's interpreter. If that would take seconds, only
the launch is checked and the PyTorch twin computes the result. cuSPARSELt is emulated. torch.compile does nothing.

CUDA events count ops instead of time, so that choices by time are the same on every machine: an op takes 10 us, a
2:4 GEMM 5 us. FAKE_CUSPARSELT selects the layout of compressed matrices: "sm90" (the default) is the order that
layout.py expects on this GPU, "reversed" is another order, "padded" appends 16 bytes per row.

The changes to torch cannot be undone, so a script needs its own process.
"""

import contextlib
import functools
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # hide a real GPU
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch._library.custom_ops import OPDEFS
from torch.overrides import _get_current_function_mode_stack
from torch.profiler import ProfilerActivity
from torch.profiler import profile as _cpu_profile
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

import kernels
import sparse24
from gemm24 import cusparselt, layout, operands

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CARD = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=150754820096, L2_cache_size=62914560
)
ALGORITHMS = 3  # cuSPARSELt accepts the ids 0 to 2
LAYOUT = os.environ.get("FAKE_CUSPARSELT", "sm90")
if LAYOUT not in ("sm90", "reversed", "padded"):
    raise ValueError(f"FAKE_CUSPARSELT={LAYOUT!r}, need sm90, reversed or padded")

STATE = SimpleNamespace(
    clock_us=0.0,  # time of the GPU
    capturing=None,  # the CUDA graph that is being captured
    sync_debug_mode=0,  # 2 is "error"
    launch_only=False,  # check the launch of a Triton kernel, but do not run it
    unmasked=False,  # see unmasked()
)

# ---------------------------------------------------------------------------------------------------------------------
# Which tensors are on the GPU

_cpu_tensor_to, _cpu_tensor_device = torch.Tensor.to, torch.Tensor.device.__get__


def on_gpu(tensor: torch.Tensor) -> bool:
    return not STATE.unmasked and getattr(tensor.untyped_storage(), "on_gpu", False)


def place(tensor: torch.Tensor, gpu: bool) -> torch.Tensor:
    """Mark the tensor's storage as GPU or CPU memory. Returns the tensor."""
    tensor.untyped_storage().on_gpu = gpu
    return tensor


def is_gpu(device) -> bool:
    """True if `device` is the GPU. Raises RuntimeError for a second GPU."""
    device = torch.device(device)
    if device.type == "cuda" and device.index not in (None, 0):
        raise RuntimeError("CUDA error: invalid device ordinal")
    return device.type == "cuda"


@contextlib.contextmanager
def unmasked():
    """A context in which GPU tensors are plain CPU tensors and no op is checked."""
    before, STATE.unmasked = STATE.unmasked, True
    try:
        yield
    finally:
        STATE.unmasked = before


def captured(compute, out):
    """Returns `out`, the result of compute(). If a graph is being captured, each replay computes it again."""
    if STATE.capturing is not None:
        STATE.capturing.steps.append((compute, out))
    return out


def wait_for_gpu(what: str) -> None:
    """The host waits for the GPU here. Raises RuntimeError if that is forbidden now."""
    if STATE.capturing is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
    if STATE.sync_debug_mode == 2:
        raise RuntimeError(f"called a synchronizing CUDA operation ({what})")


# ---------------------------------------------------------------------------------------------------------------------
# Every op: check its devices and whether it waits, and place its results

_WAITING = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")  # these accept CPU indices


class Ops(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        if STATE.unmasked:
            return func(*args, **kwargs)
        if namespace == "nano24":  # the ops inside it are dispatched here one by one
            with self:
                kernel = OPDEFS[func._schema.name]._init_fn
                return by_twin(kernel, TWINS[name])(*args, **kwargs) if name in TWINS else kernel(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        gpu = [on_gpu(x) for x in tensors]
        if not any(gpu):
            return func(*args, **kwargs)
        if name == "copy_":
            to_gpu, from_gpu = gpu
            if to_gpu != from_gpu and not (kwargs.get("non_blocking") or any(args[2:])):
                wait_for_gpu("copy between the devices")
        else:
            self.check_devices(name, tensors, gpu)
        if name in _WAITING or (name == "index" and any(x.dtype == torch.bool for x in tensors[1:])):
            wait_for_gpu(name)
        out = func(*args, **kwargs)
        STATE.clock_us += 0 if func.is_view else 10
        if name != "copy_":
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    place(x, True)
        return out if func.is_view else captured(functools.partial(func, *args, **kwargs), out)

    @staticmethod
    def check_devices(name: str, tensors: list[torch.Tensor], gpu: list[bool]) -> None:
        """All tensors must be on the GPU, except numbers and the indices of a GPU tensor."""
        on_cpu = [x for x, is_on_gpu in zip(tensors, gpu, strict=True) if not is_on_gpu and x.dim() > 0]
        if on_cpu and not (name in _INDEXING and gpu[0]):
            shapes = [tuple(x.shape) for x in on_cpu]
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! {name}"
                f" got CPU tensors of shapes {shapes}"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Methods of tensors


def _to(tensor: torch.Tensor, *args, copy: bool = False, **kwargs) -> torch.Tensor:
    """Replaces torch.Tensor.to."""
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    dtype, source_gpu = dtype or tensor.dtype, on_gpu(tensor)
    if device is not None and device.type not in ("cpu", "cuda"):
        return _cpu_tensor_to(tensor, device, dtype)
    target_gpu = source_gpu if device is None else is_gpu(device)
    if source_gpu == target_gpu:
        return _cpu_tensor_to(tensor, dtype=dtype, copy=copy)
    if not non_blocking:
        wait_for_gpu("copy between the devices")
    with unmasked():
        return place(_cpu_tensor_to(tensor, dtype=dtype, copy=True), target_gpu)


def _on_cpu_only(method, message: str):
    @functools.wraps(method)
    def checked(tensor, *args, **kwargs):
        if on_gpu(tensor):
            raise TypeError(message)
        return method(tensor, *args, **kwargs)

    return checked


def _keeps_place(method):
    @functools.wraps(method)
    def placed(tensor, *args, **kwargs):
        return place(method(tensor, *args, **kwargs), on_gpu(tensor))

    return placed


def _takes_device(function, device_of_default):
    """Wrap a function that makes a tensor. Without a `device` argument the device is device_of_default(*args)."""

    @functools.wraps(function)
    def made(*args, device=None, pin_memory=False, **kwargs):
        device = device_of_default(*args) if device is None else torch.device(device)
        if device.type not in ("cpu", "cuda"):
            return function(*args, device=device, **kwargs)
        gpu, generator = is_gpu(device), kwargs.get("generator")
        if generator is not None and getattr(generator, "on_gpu", False) != gpu:
            raise RuntimeError(f"Expected a '{device.type}' device type for generator")
        return place(function(*args, device=CPU, **kwargs), gpu)

    return made


def _default_device(*_) -> torch.device:
    """The device of the innermost `with torch.device(...)`."""
    contexts = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
    return contexts[-1].device if contexts else CPU


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.on_gpu = is_gpu(device)
        return made


def change_tensors() -> None:
    tensor = torch.Tensor
    tensor.device = property(lambda x: CUDA if on_gpu(x) else _cpu_tensor_device(x))
    tensor.is_cuda = property(on_gpu)
    tensor.get_device = lambda x: 0 if on_gpu(x) else -1
    tensor.to, tensor.cuda, tensor.cpu = _to, lambda x: _to(x, CUDA), lambda x: _to(x, CPU)
    tensor.numpy = _on_cpu_only(tensor.numpy, "can't convert cuda:0 device type tensor to numpy")
    tensor.pin_memory = _on_cpu_only(lambda x: x, "cannot pin a tensor of cuda:0, only dense CPU tensors can be pinned")
    tensor.__deepcopy__ = _keeps_place(tensor.__deepcopy__)
    for name in ("empty", "zeros", "ones", "full", "arange", "eye", "tensor", "rand", "randn", "randint", "randperm"):
        setattr(torch, name, _takes_device(getattr(torch, name), _default_device))
    for name in ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"):
        setattr(torch, name, _takes_device(getattr(torch, name), lambda x, *_: x.device))
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        setattr(tensor, name, _takes_device(getattr(tensor, name), lambda x, *_: x.device))
    torch.Generator = Generator


# ---------------------------------------------------------------------------------------------------------------------
# torch.cuda, autocast, torch.compile, the profiler. Functions of torch.cuda that check their arguments remain; the
# functions that they call are replaced.


class Event:
    def __init__(self, enable_timing: bool = False):
        self.us = None

    def record(self) -> None:
        self.us = STATE.clock_us

    def elapsed_time(self, end) -> float:
        return (end.us - self.us) / 1000


class CUDAGraph:
    """A capture runs the ops and records them. A replay computes them again, into the same memory."""

    us = None

    def __init__(self):
        self.steps = []

    def replay(self) -> None:
        if self.us is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        STATE.clock_us += self.us
        with unmasked(), torch.no_grad():
            for compute, out in self.steps:
                for old, new in zip(tree_leaves(out), tree_leaves(compute()), strict=True):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)


@contextlib.contextmanager
def capture(graph: CUDAGraph):
    STATE.capturing, start = graph, STATE.clock_us
    try:
        yield
        graph.us = STATE.clock_us - start
    finally:
        STATE.capturing = None


def _synchronize() -> None:
    if STATE.capturing:  # the debug mode allows explicit waiting
        wait_for_gpu("cudaDeviceSynchronize")


class Autocast(torch.autocast):
    """Uses the CPU's autocast rules. They differ from the GPU's in a few ops that no model here calls."""

    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__(_autocast_type(device_type), *args, **kwargs)


def _autocast_type(device_type: str) -> str:
    return "cpu" if device_type == "cuda" else device_type


def _by_device_type(function):
    return lambda device_type: function(_autocast_type(device_type))


def change_cuda() -> None:
    cuda = torch.cuda
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda._lazy_init = lambda: None
    cuda._get_device_properties = lambda index: CARD
    cuda._exchange_device = cuda._maybe_exchange_device = lambda index: 0
    torch._C._cuda_getDevice = lambda: 0
    torch._C._cuda_setDevice = lambda index: is_gpu(torch.device("cuda", index))
    torch._C._cuda_synchronize = _synchronize
    torch._C._cuda_set_sync_debug_mode = functools.partial(setattr, STATE, "sync_debug_mode")
    cuda.graphs._cuda_isCurrentStreamCapturing = lambda: STATE.capturing
    cuda.Event, cuda.CUDAGraph, cuda.graph = Event, CUDAGraph, capture
    cuda.current_stream = cuda.set_stream = lambda stream=None: None
    cuda.empty_cache = lambda: None
    cuda.memory_allocated = cuda.max_memory_allocated = cuda.reset_peak_memory_stats = lambda device=None: 0
    cuda.manual_seed_all = lambda seed: None  # GPU tensors use the CPU's generator
    torch.autocast = torch.amp.autocast = Autocast
    torch.is_autocast_enabled = _by_device_type(torch.is_autocast_enabled)
    torch.get_autocast_dtype = _by_device_type(torch.get_autocast_dtype)
    torch.compile = lambda net=None, **options: net if net is not None else lambda function: function
    torch.profiler.profile = lambda activities, **options: _cpu_profile(activities=[ProfilerActivity.CPU], **options)


# ---------------------------------------------------------------------------------------------------------------------
# Triton and cuSPARSELt


def _needs_gpu(function: str, *tensors: torch.Tensor | None) -> None:
    if not all(on_gpu(x) for x in tensors if x is not None):
        raise NotImplementedError(f"Could not run 'aten::{function}' with arguments from the 'CPU' backend")


def _compress(x: torch.Tensor) -> torch.Tensor:
    """Replaces torch._cslt_compress. A group with fewer than two non-zeros also keeps its first zeros."""
    _needs_gpu("_cslt_compress", x)
    rows, columns = x.shape
    groups = (x != 0).view(rows, columns // 4, 4)
    missing = 2 - groups.sum(-1, keepdim=True)
    mask = groups | (~groups & ((~groups).cumsum(-1) <= missing))
    with unmasked():
        packed = layout.pack24(x, mask.view(rows, columns), "sm90")
        if LAYOUT == "reversed":
            metadata = layout.packed_parts(packed, rows, columns)[1]
            metadata.copy_(metadata.flip(0))
        if LAYOUT == "padded":
            packed = torch.cat((packed, packed.new_zeros(8 * rows)))
    return place(packed.view(rows, -1), True)


def _sparse_mm(
    compressed_A, dense_B, bias=None, alpha=None, out_dtype=None, transpose_result=False, alg_id=0, split_k=1
) -> torch.Tensor:
    """Replaces torch._cslt_sparse_mm."""
    _needs_gpu("_cslt_sparse_mm", compressed_A, dense_B, bias)
    if compressed_A.dim() != 2:
        raise RuntimeError("compressed_A.dim() == 2 INTERNAL ASSERT FAILED")
    if alg_id >= ALGORITHMS:
        raise RuntimeError("CUDA error: invalid value when calling `cusparseLtMatmulAlgSetAttribute`")
    rows, columns = len(compressed_A), len(dense_B)

    def compute() -> torch.Tensor:
        packed = compressed_A.flatten()[: rows * columns * 9 // 16].clone()
        if LAYOUT == "reversed":
            metadata = layout.packed_parts(packed, rows, columns)[1]
            metadata.copy_(metadata.flip(0))
        d = layout.unpack24(packed, rows, columns, "sm90").float() @ dense_B.float()
        d = d if bias is None else d + bias.float()[:, None]
        return (d.t() if transpose_result else d).to(dense_B.dtype).contiguous()

    with unmasked():
        d = compute()
    STATE.clock_us += 5
    return place(captured(compute, d), True)


def _launch(launch):
    """Wrap the launch of a kernel in Triton's interpreter."""

    @functools.wraps(launch)
    def checked(self, *args, **kwargs):
        for i, argument in enumerate(args):
            if isinstance(argument, torch.Tensor) and not on_gpu(argument):
                raise ValueError(f"Pointer argument (at {i}) cannot be accessed from Triton (cpu tensor?)")
        STATE.clock_us += 10
        if not STATE.launch_only:
            with unmasked():
                launch(self, *args, **kwargs)
            captured(lambda: launch(self, *args, **kwargs), None)

    return checked


# Operators whose kernels take seconds in the interpreter. tests/test_kernels.py compares each kernel with its twin.
TWINS = {
    operator.__name__: operator.torch
    for operator in (
        *(sparse24.mvue24, operands.activation, operands.activation_backward, operands.mvue24_pack),
        operands.activation_backward_mvue24_pack,
    )
}


def by_twin(kernel, twin):
    """Check the kernel's launch only, and let its twin compute the results."""

    @functools.wraps(kernel)
    def launched(*args, **kwargs):
        STATE.launch_only = True
        try:
            unfilled = kernel(*args, **kwargs)
        finally:
            STATE.launch_only = False
        with unmasked():
            filled = twin(*args, **kwargs)
            for empty, result in zip(tree_leaves(unfilled), tree_leaves(filled), strict=True):
                if isinstance(empty, torch.Tensor):
                    empty.copy_(result)
        return captured(functools.partial(twin, *args, **kwargs), unfilled)

    return launched


def change_libraries() -> None:
    kernels.transposable_index = by_twin(kernels.transposable_index, sparse24.transposable_index.torch)
    kernels.pack_weight_ = by_twin(kernels.pack_weight_, operands.pack_weight_.torch)
    torch.backends.cusparselt.is_available = lambda: True
    torch.backends.cusparselt.version = lambda: 800
    torch._cslt_compress, torch._cslt_sparse_mm = _compress, _sparse_mm
    cusparselt.available = lambda: "the fake GPU has only PyTorch's op"
    GridExecutor.__call__ = _launch(GridExecutor.__call__)


def install() -> None:
    """Give this process a GPU."""
    change_tensors()
    change_cuda()
    change_libraries()
    Ops().__enter__()


if __name__ == "__main__":
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    install()
    runpy.run_path(sys.argv[0], run_name="__main__")
