"""The cost of the kernels: predicted from their machine code, and measured against a copy on this machine's GPU.

`python bench.py --suite kernels [--predict]` runs this (see `run`) and writes results/kernels.{json,md}.

Prediction. Each kernel is compiled for the GPU by its own launcher, and its instructions (I) are counted. The code has
no loops, so each instruction runs once. A kernel must move its bytes (B) at the speed of a copy, and it must issue its
instructions: all of them at one per lane and clock, those of the ALU pipe (integers, logic, comparisons, selects,
conversions) at half that rate, special functions at an eighth. Let m be the longest of these three issue times over the
time of the copy. The predicted share of copy bandwidth is (1 + m^4)^(-1/4), at most 0.92. This is a rule of thumb.

Measurement. Each kernel runs in one CUDA graph on rotating sets of tensors, together larger than the L2 cache, so
neither the cache nor the launches count. A copy of as many bytes is timed in the same way, in turns with the kernel.
The share is copy time over kernel time: median (smallest to largest) over the repetitions.
"""

import contextlib
import functools
import itertools
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch

import sparse24
from benchmarks.machine import attempt, read_json
from benchmarks.roofline import CARDS, COPY_SHARE
from configurator import write_json
from gemm24 import choose
from gemm24.operands import GATED, activation_ref

if find_spec("triton"):
    import kernels
    from benchmarks import baselines

    kernels.use_patterns(sparse24.PATTERNS)

GPUS = {name.upper(): CARDS[name] for name in ("a100", "h200", "b200")}
_ALU = re.compile(
    r"(FMNMX|FSETP|FSEL|SEL|LOP3|SHF|PRMT|F2FP|ISETP|IADD3|LEA|VIADD|PLOP3|HMNMX2|IMNMX|VIMNMX|SGXT|IABS|POPC|BMSK|VOTE)"
)
_SPECIAL = re.compile(r"(MUFU|F2F|I2F|F2I)\b")
BLOCK, GROUP, ELEMENT = ("4x4 block", 16), ("group of 4", 4), ("element", 1)  # unit, and its number of elements


@dataclass(frozen=True)
class Case:
    """One launcher call, whose kernel is counted and timed."""

    name: str
    unit: tuple[str, int]  # bytes and instructions are counted per unit
    bytes: float  # moved per unit
    ceiling: float  # instructions per unit, on every architecture
    # 16-byte global loads and stores in the code. A thread that writes fewer contiguous bytes has no such stores: one
    # index byte, 4 B of packed weights, 8 B of packed gradients. Its warp still writes complete cache lines.
    wide: tuple[int, int]
    make: Callable  # (rows, columns, order, device, **options) -> a function that launches the kernel once
    options: dict = field(default_factory=dict)
    graph: bool = True  # False if a CUDA graph cannot hold the launch

    def launcher(self, rows: int, columns: int, order: str, device: str) -> Callable:
        return self.make(rows, columns, order, device, **self.options)

    def moved(self, rows: int, columns: int) -> float:
        """Bytes that one launch moves."""
        return self.bytes * rows * columns / self.unit[1]


def _index(w: torch.Tensor) -> torch.Tensor:
    index = torch.arange(w.numel() // 16, device=w.device).remainder(90).to(torch.uint8)
    return index.view(w.shape[0] // 4, w.shape[1] // 4)


def _of_weight(rows, columns, order, device, kernel, dtype=torch.float32):
    w = torch.randn(rows, columns, device=device, dtype=dtype)
    return lambda: kernel(w)


def _pack(rows, columns, order, device, dtype=torch.float32, forms=(True, True), pairs=False, **options):
    w = torch.randn(rows, columns, device=device, dtype=dtype)
    sizes = [w.numel() * 9 // 16 if form else None for form in forms]
    packed = [size and torch.empty(size, dtype=torch.bfloat16, device=device) for size in sizes]
    index = sparse24.pair_index(w) if pairs else _index(w)
    return lambda: kernels.pack_weight_(*packed, w, index, order, **options)


def _mvue(rows, columns, order, device, dtype=torch.bfloat16, token_major=False):
    x, seed = torch.randn(rows, columns, device=device, dtype=dtype), torch.tensor(1, device=device)
    x = x.t().contiguous().t() if token_major else x
    return lambda: kernels.mvue24(x, seed)


def _mvue_pack(rows, columns, order, device, token_major=False):
    shape = (columns, rows) if token_major else (rows, columns)
    x, seed = torch.randn(*shape, device=device, dtype=torch.bfloat16), torch.tensor(1, device=device)
    return lambda: kernels.mvue24_pack(x, seed, order, token_major)


def _z_and_da(rows, columns, device, activation):
    z = torch.randn(rows * (2 if activation in GATED else 1), columns, device=device, dtype=torch.bfloat16)
    return z, z[:rows].clone()


def _activation(rows, columns, order, device, activation, by_token=False):
    z, _ = _z_and_da(rows, columns, device, activation)
    return lambda: (baselines.activation_by_token if by_token else kernels.activation)(z, activation)


def _activation_backward(rows, columns, order, device, activation, by_token=False):
    z, da = _z_and_da(rows, columns, device, activation)
    f = baselines.activation_backward_by_token if by_token else kernels.activation_backward
    return lambda: f(z, da, activation)


def _fused(rows, columns, order, device, activation, bias=False):
    (z, da), seed = _z_and_da(rows, columns, device, activation), torch.tensor(1, device=device)
    return lambda: kernels.activation_backward_mvue24_pack(z, da, seed, activation, order, bias)


def _relu2(rows, columns, order, device, backward=False, bias=False):
    (z, da), seed = _z_and_da(rows, columns, device, "relu2"), torch.tensor(1, device=device)
    if backward:
        return lambda: kernels.relu2_backward_pack(z, da, seed, order, order, bias)
    return lambda: kernels.relu2_pack(z, seed, order, order)


def _adamw(rows, columns, order, device):
    p, g, m, v = (torch.randn(rows, columns, device=device).abs_() for _ in range(4))
    scalars = [sparse24.adamw_scalars(1, 1e-4, (0.9, 0.95), 1e-8, 0.1, 1e-4)]
    index = _index(p)
    return lambda: kernels.adamw_([p], [g], [m], [v], [index], scalars)


# These are lambdas, since there is no module `kernels` without Triton.
_SEARCH = {"kernel": lambda w: kernels.transposable_index(w)}
_PAIRS = {"kernel": lambda w: kernels.pair_index(w)}
_SOFT = {"kernel": lambda w: kernels.soft_threshold24(w)}
_SCALE = {"kernel": lambda w: kernels.sste_scale(w)}
_BF16 = {"dtype": torch.bfloat16}
_BF16_FORWARD = _BF16 | {"forms": (True, False)}
_BF16_BACKWARD = _BF16 | {"forms": (False, True)}
CASES = [
    Case("mask search, fp32 weights", BLOCK, 65, 265, (4, 0), _of_weight, _SEARCH),
    Case("mask search, bf16 weights", BLOCK, 33, 270, (0, 0), _of_weight, _SEARCH | _BF16),
    Case("weight pack, values", BLOCK, 97, 250, (4, 0), _pack, {"metadata": False}),
    Case("weight pack, values and metadata", BLOCK, 101, 400, (4, 0), _pack),
    # FSDP packs the gathered bf16 weight in the forward and again in the backward:
    Case("weight pack of bf16", BLOCK, 51, 245, (0, 0), _pack, _BF16_FORWARD),
    Case("weight pack of bf16, transposed", BLOCK, 51, 262, (0, 0), _pack, _BF16_BACKWARD),
    Case("weight pack of bf16, row-wise mask", BLOCK, 54, 275, (0, 0), _pack, _BF16_FORWARD | {"pairs": True}),
    Case("MVUE, masked dense", GROUP, 16, 80, (4, 4), _mvue),
    Case("MVUE, transposed to masked dense", GROUP, 16, 92, (4, 4), _mvue, {"token_major": True}),
    Case("MVUE, masked dense, fp32", GROUP, 32, 110, (8, 8), _mvue, {"dtype": torch.float32}),
    Case("MVUE, packed", GROUP, 12.5, 85, (4, 0), _mvue_pack),
    Case("MVUE, transposed and packed", GROUP, 12.5, 97, (4, 0), _mvue_pack, {"token_major": True}),
    Case("gelu, forward", ELEMENT, 4, 23, (1, 1), _activation, {"activation": "gelu"}),
    Case("relu2, forward", ELEMENT, 4, 9, (1, 1), _activation, {"activation": "relu2"}),
    Case("geglu, forward", ELEMENT, 6, 26, (2, 1), _activation, {"activation": "geglu"}),
    Case("swiglu, forward", ELEMENT, 6, 17, (2, 1), _activation, {"activation": "swiglu"}),
    Case("gelu, backward", ELEMENT, 6, 26, (2, 1), _activation_backward, {"activation": "gelu"}),
    Case("relu2, backward", ELEMENT, 6, 12, (2, 1), _activation_backward, {"activation": "relu2"}),
    Case("geglu, backward", ELEMENT, 10, 32, (3, 2), _activation_backward, {"activation": "geglu"}),
    Case("swiglu, backward", ELEMENT, 10, 25, (3, 2), _activation_backward, {"activation": "swiglu"}),
    Case("gelu backward, MVUE, packed", GROUP, 28.5, 175, (8, 4), _fused, {"activation": "gelu"}),
    Case("gelu backward, MVUE, packed, bias", GROUP, 28.5, 185, (8, 4), _fused, {"activation": "gelu", "bias": True}),
    Case("relu2 backward, MVUE, packed", GROUP, 28.5, 122, (8, 4), _fused, {"activation": "relu2"}),
    Case("geglu backward, MVUE, packed", GROUP, 49, 280, (12, 8), _fused, {"activation": "geglu"}),
    Case("swiglu backward, MVUE, packed", GROUP, 49, 245, (12, 8), _fused, {"activation": "swiglu"}),
    Case("relu2 and top2, MVUE, packed both ways", GROUP, 17, 132, (4, 0), _relu2),
    Case("relu2 backward and top2, MVUE, packed both ways", GROUP, 25, 137, (8, 0), _relu2, {"backward": True}),
    Case("row mask, fp32", GROUP, 17, 90, (1, 0), _of_weight, _PAIRS),
    Case("soft threshold, fp32", GROUP, 32, 80, (1, 1), _of_weight, _SOFT),
    Case("soft threshold and scale, fp32", GROUP, 32, 150, (1, 1), _of_weight, _SCALE),
    Case("AdamW with masked decay", ELEMENT, 28.0625, 112, (4, 3), _adamw, graph=False),
]
DEVICE = "cuda"  # the device that is measured
SHAPE = (16384, 4096)  # rows and columns of the tensors that are measured
TOKENS = 32 * 512
# The shapes of the paper's tables.
TABLE2 = ((3072, 768), (4096, 1024), (5120, 1280), (1024, 1600), (8192, 2048), (16384, 4096), (30768, 8192))
TABLE3 = (768, 1024, 1280, 1600, 2048, 4096, 8192)

# ---------------------------------------------------------------------------------------------------------------------
# Prediction


@contextlib.contextmanager
def redirected(arch: int, launch: Callable):
    """While this context is open, each kernel launch compiles for sm_`arch` and calls launch(compiled, grid,
    {argument: value}) instead of running on a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    stand_in = SimpleNamespace(  # for Triton's CUDA driver, so that launchers compile without the GPU
        get_current_device=lambda: arch,  # one cache of compiled kernels per architecture
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )

    def compile_it(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        launch(compiled, grid, dict(zip(self.arg_names, args, strict=False)) | options)
        return compiled

    driver.set_active(stand_in)
    JITFunction.run = compile_it
    try:
        yield
    finally:
        JITFunction.run = run
        driver.set_active(None)  # Triton creates the real driver again when it needs it


def compile_only(call: Callable, arch: int) -> list[tuple]:
    """Compile the kernels that `call` would launch for sm_`arch`, without running them. Returns [(compiled, grid)]."""
    launched = []
    with redirected(arch, lambda compiled, grid, arguments: launched.append((compiled, grid))):
        call()
    return launched


def read_code(compiled) -> dict:
    """Registers, stack, shared memory and instructions of a compiled kernel, from its machine code. Assumes that no
    forward branch is taken. Raises RuntimeError for a loop."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    line = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);"
    lines = re.findall(line, sass, re.MULTILINE)
    code = [instruction for _, instruction, _ in lines]
    code = code[: len(code) - code[::-1].index("EXIT")]  # padding and rare slow paths of division follow
    for address, instruction, operands in lines[: len(code)]:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if instruction.startswith("BR") and not (target and int(target[1], 16) > int(address, 16)):
            raise RuntimeError(f"{compiled.metadata.name} loops at {address}: its instructions cannot be counted")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared, "code": code}


def predict(case: Case, arch: int) -> dict:
    """Count one kernel's code for sm_`arch`; instructions are per unit."""
    rows = columns = 256
    call = case.launcher(rows, columns, "sm80" if arch < 90 else "sm90", "cpu")
    ((compiled, grid),) = compile_only(call, arch)
    counts = read_code(compiled)
    code = counts.pop("code")
    threads_per_unit = grid[0] * compiled.metadata.num_warps * 32 * case.unit[1] / (rows * columns)

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, instruction)) for instruction in code)

    per_unit = {"instructions": "", "alu": _ALU, "special": _SPECIAL}
    return counts | {
        "kernel": compiled.metadata.name,
        **{name: round(count(pattern) * threads_per_unit, 2) for name, pattern in per_unit.items()},
        "nan_dropping": len(re.findall(r"\b(?:min|max)\.(?:ftz\.)?(?:f32|f16|bf16)", compiled.asm["ptx"])),
        "local": count("LDL|STL"),
        "wide_loads": count(r"LDG.*\.128"),
        "wide_stores": count(r"STG.*\.128"),
    }


def share_of_copy(case: Case, counts: dict, gpu: str) -> float:
    """Predicted share of copy bandwidth, by the rule at the top of this file."""
    card = GPUS[gpu]
    copy_ps = case.bytes / (card.tb_per_s * COPY_SHARE)
    m = max(counts["instructions"], 2 * counts["alu"], 8 * counts["special"]) / card.lanes_per_ps / copy_ps
    return min(0.92, (1 + m**4) ** -0.25)


# ---------------------------------------------------------------------------------------------------------------------
# Measurement


def time_calls(calls: list[Callable], repetitions: int, graph: bool = True) -> list[float]:
    """Microseconds per call, one number per repetition. All calls are captured in one CUDA graph, which keeps their
    results alive. graph=False launches the calls one by one: for calls that copy from the host, which a graph cannot
    hold. Their kernels must take longer than their launch."""
    results, times = [], []

    def body():
        results[:] = [call() for call in calls]

    body()  # compile, and fill the caches of tables
    torch.cuda.synchronize()
    results.clear()
    replay = choose._captured(body) if graph else body
    for repetition in range(repetitions + 3):  # the first three warm up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        if repetition >= 3:
            times.append(1000 * start.elapsed_time(end) / len(calls))
    return times


def measure(make: Callable[[], Callable], moved: float, repetitions: int, graph: bool = True) -> dict:
    """Time a kernel that moves `moved` bytes, and a copy of as many bytes, on sets of tensors that are together four
    times the L2 cache. With the limit of 256 sets, kernels below a 64th of the L2 run inside it, like their copy."""
    sets = min(256, max(2, int(4 * torch.cuda.get_device_properties(0).L2_cache_size / moved) + 1))
    sources = [torch.empty(int(moved) // 2, dtype=torch.uint8, device=DEVICE) for _ in range(sets)]
    targets = [torch.empty_like(source) for source in sources]
    copies = [functools.partial(target.copy_, source) for source, target in zip(sources, targets, strict=True)]
    calls = [make() for _ in range(sets)]
    kernel_us, copy_us = [], []
    for _ in range(3):
        kernel_us += time_calls(calls, repetitions, graph)
        copy_us += time_calls(copies, repetitions)
    shares = sorted(c / k for k, c in zip(kernel_us, copy_us, strict=True))
    return {
        "us": statistics.median(kernel_us),
        "copy_us": statistics.median(copy_us),
        "gb_per_s": moved / statistics.median(kernel_us) / 1000,
        "share": statistics.median(shares),
        "share_range": [shares[0], shares[-1]],
    }


def speed(row: dict) -> str:
    """One line for the console: speed and time, or the reason why there are none."""
    return row.get("reason") or f"{row['gb_per_s']:.0f} GB/s, {row['us']:.1f} us, {row['share']:.2f} of a copy's speed"


def compared(rows: list[tuple[dict, Callable, float]], repetitions: int) -> Iterator[dict]:
    """Measure several ways to compute the same result. rows: (name, `make` of `measure`, bytes moved), ours first."""
    ours = None
    for name, make, moved in rows:
        result = attempt(functools.partial(measure, make, moved, repetitions))
        ours = ours or result
        if "us" in result and "us" in ours:
            result["times_ours"] = result["us"] / ours["us"]
        print(f"{' '.join(map(str, name.values()))}: {speed(result)}", flush=True)
        yield name | result


def table2(shapes, repetitions: int) -> Iterator[dict]:
    """The paper's Table 2: GB/s of the transposable mask search, counting the read of w and the write of the result."""
    patterns = baselines.pattern_table(sparse24.PATTERNS.to(DEVICE))
    searches = {  # name -> (search, bytes that it writes per 4x4 block)
        "8 candidates (ours)": (kernels.transposable_index, 1),
        "90 scores": (lambda w: baselines.transposable_index_dot(w, patterns), 1),
        "2-approximation": (baselines.transposable_mask_2approx, 16),
        "torch's greedy tile": (_torch_tile, 16 * 2.25),  # packed operands of w and w^T
    }
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16), shapes):
        rows = []
        for name, (search, written) in searches.items():
            if search is _torch_tile and (dtype != torch.bfloat16 or any(n % 128 for n in shape)):
                continue
            make = functools.partial(_of_weight, *shape, "", DEVICE, search, dtype)
            moved = shape[0] * shape[1] / 16 * (16 * dtype.itemsize + written)
            rows.append(({"shape": shape, "dtype": str(dtype)[6:], "search": name}, make, moved))
        yield from compared(rows, repetitions)


def _torch_tile(w):
    return torch._sparse_semi_structured_tile(w, algorithm="largest_abs_values_greedy", use_cutlass=True)


def table3(widths, repetitions: int) -> Iterator[dict]:
    """The paper's Table 3: GEGLU on feature-major tensors of 32x512 tokens, along tokens, along features, compiled."""
    compiled = torch.compile(lambda z: activation_ref(z, "geglu"))

    def by_torch(*shape):
        z, _ = _z_and_da(*shape, DEVICE, "geglu")
        return lambda: compiled(z)

    passes = (("activation", _activation, 6), ("activation_backward", _activation_backward, 10))
    for width, (name, make, moved) in itertools.product(widths, passes):
        ours = functools.partial(make, width, TOKENS, "", DEVICE, "geglu")
        ways = {"along tokens (ours)": ours, "along features (intuitive)": functools.partial(ours, by_token=True)}
        if name == "activation":
            ways["torch.compile"] = functools.partial(by_torch, width, TOKENS)
        rows = []
        for order, way in ways.items():
            rows.append(({"width": width, "order": order, "pass": name}, way, moved * width * TOKENS))
        yield from compared(rows, repetitions)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def markdown(results: dict) -> str:
    """The kernels' table, with the measured share of copy bandwidth if there are measurements."""
    measured = results["measured"]
    head = ["kernel", "unit", "B", "I (sm_80, 90, 100)", f"predicted share: {', '.join(GPUS)}"]
    head += [f"measured share, {results['measured_on']['device_name']}"] if measured else []
    rows = []
    for row in results["kernels"]:
        counts = ", ".join(f"{row['counts'][str(card.capability)]['instructions']:.3g}" for card in GPUS.values())
        shares = ", ".join(f"{share:.2f}" for share in row["predicted"].values())
        rows.append([row["name"], row["unit"], f"{row['bytes']:g}", counts, shares])
        if measured:
            result = measured.get(row["name"], {"reason": "not measured"})
            rows[-1].append(result.get("reason") or _share(result))
    return _table(head, rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _share(row: dict) -> str:
    low, high = row["share_range"]
    return f"{row['share']:.2f} ({low:.2f} to {high:.2f})"


def paper_table(rows: list[dict], *keys: str) -> str:
    """One of the paper's tables: GB/s, time, its ratio to ours, and the share of copy bandwidth."""
    lines = []
    for row in rows:
        cells = ["", "", "", row.get("reason")]
        if "us" in row:
            times = f"{row['times_ours']:.2f}" if "times_ours" in row else ""
            cells = [f"{row['gb_per_s']:.0f}", f"{row['us']:.1f}", times, _share(row)]
        lines.append([*(str(row[key]) for key in keys), *cells])
    return _table([*keys, "GB/s", "us", "times ours", "share of copy"], lines)


def report(results: dict) -> str:
    """The text of kernels.md: the kernels' table and, if there are measurements, the paper's tables."""
    e = results["environment"]
    made = f"Compiled by Triton {e['triton']}, torch {e['torch']}, commit {e['commit']}"
    tables = [markdown(results)]
    if results["measured"] is not None:
        on = results["measured_on"]
        made += f"; measured on {on['device_name']}, Triton {on['triton']}, torch {on['torch']}, commit {on['commit']}"
        tables.append("Transposable mask search, the paper's Table 2:")
        tables.append(paper_table(results["table2"], "dtype", "shape", "search"))
        tables.append("GEGLU of 32x512 tokens, feature-major, the paper's Table 3:")
        tables.append(paper_table(results["table3"], "width", "order", "pass"))
    start = f"`python bench.py --suite kernels`. {made}. All of it: kernels.json."
    return "\n\n".join(["# Kernels", start, *tables]) + "\n"


def count_all() -> list[dict]:
    """Compile and count every case for every GPU of GPUS. Returns the rows of kernels.json."""
    rows = []
    for case in CASES:
        counts = {str(card.capability): predict(case, card.capability) for card in GPUS.values()}
        shares = {gpu: share_of_copy(case, counts[str(card.capability)], gpu) for gpu, card in GPUS.items()}
        row = {"name": case.name, "unit": case.unit[0], "bytes": case.bytes, "counts": counts, "predicted": shares}
        rows.append(row)
        print(f"{case.name}: {counts['90']['instructions']} I, predicted {shares['H200']:.2f} on H200", flush=True)
    return rows


def measure_all(repetitions: int) -> Iterator[tuple[str, dict]]:
    """Yield (name, measurement) of every case on tensors of SHAPE."""
    order = "sm80" if torch.cuda.get_device_capability() < (9, 0) else "sm90"
    for case in CASES:
        make = functools.partial(case.launcher, *SHAPE, order, DEVICE)
        result = attempt(functools.partial(measure, make, case.moved(*SHAPE), repetitions, case.graph))
        print(f"{case.name}: {speed(result)}", flush=True)
        yield case.name, result


def failures(results: dict) -> list[str]:
    """The kernels that could not be measured, as "name: reason", without torch's own."""
    rows = [*(results["measured"] or {}).items()]
    rows += [(f"{row['shape']} {row['search']}", row) for row in results["table2"] or ()]
    rows += [(f"{row['width']} {row['order']}", row) for row in results["table3"] or ()]
    return [f"{name}: {row['reason']}" for name, row in rows if "reason" in row and "torch" not in name]


def spread_out(shapes: Sequence, count: int) -> list:
    """`count` of the shapes, evenly spaced from small to large."""
    return list(shapes[:: max(1, len(shapes) // count)][:count])


def run(out: Path, environment: dict, measuring: bool, repetitions=10, tables=7, counting=True) -> dict:
    """Compile and count every kernel, and write `out`/kernels.json and kernels.md.

    measuring: also measure the kernels and `tables` shapes of each of the paper's tables, on a CUDA GPU. Otherwise the
    earlier measurements stay. counting=False reads the counts from results/kernels.json. The file is written after each
    measurement, so a killed run loses none."""
    out.mkdir(parents=True, exist_ok=True)
    path, counted = out / "kernels.json", Path(__file__).parents[1] / "results" / "kernels.json"
    earlier = read_json(path) or {}
    results = {"environment": environment, "kernels": count_all()} if counting else read_json(counted)
    results |= {key: earlier.get(key) for key in ("measured", "measured_on", "table2", "table3")}
    if measuring:
        results |= {"measured": {}, "measured_on": environment, "table2": [], "table3": []}
        for name, result in measure_all(repetitions):
            results["measured"][name] = result
            write_json(path, results)
        for key, make, shapes in (("table2", table2, TABLE2), ("table3", table3, TABLE3)):
            for row in make(spread_out(shapes, tables), repetitions):
                results[key].append(row)
                write_json(path, results)
    write_json(path, results)
    (out / "kernels.md").write_text(text := report(results), encoding="utf-8")
    print(
        f"{text}\nwrote {out}/kernels.json and .md; copy the first table into results/README.md, which a test compares"
    )
    return results
