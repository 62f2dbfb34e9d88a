"""What the kernels cost: predicted from their machine code, and measured beside a plain copy on this machine's GPU.

`python bench.py --suite kernels [--predict]` runs this (see `run`); results/kernels.{json,md} are what it wrote.

Prediction. A kernel's code is compiled for the GPU by its own launcher, and its instructions (I) are counted: all are
straight-line code, so what is there runs once. Beside the bytes (B) that it must move at the speed of a copy stand the
instructions it must issue, one a lane and clock, those of the half-rate ALU pipe (integers, logic, comparisons,
selects, conversions) and of the 1/8-rate special functions. The largest of the three, m, as a fraction of the copy's
time, gives the predicted share of copy bandwidth (1 + m^4)^(-1/4), at most 0.92: a rule of thumb, no measurement.

Measurement. Each kernel runs on rotating sets of tensors larger than the L2 cache together, in one CUDA graph, so that
neither the cache nor the host's launches are timed; so does the copy of as many bytes. The share is copy time over
kernel time, median (smallest to largest) over repetitions that alternate with the copy's.
"""

import contextlib
import functools
import json
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

import sparse24
from benchmarks import roofline
from configurator import write_json
from gemm24.choose import reason
from gemm24.operands import GATED, activation_ref

if find_spec("triton"):
    import kernels
    from benchmarks import baselines

    kernels.use_patterns(sparse24.PATTERNS)

# Compute capability, SMs, clock in GHz (an assumption), memory bandwidth in TB/s by the vendor's data sheets.
GPUS = {
    "A100": (80, 108, 1.41, roofline.DATA_SHEET["a100"][1]),
    "H200": (90, 132, 1.75, roofline.DATA_SHEET["h200"][1]),
    "B200": (100, 148, 1.85, roofline.DATA_SHEET["b200"][1]),
}
_COPY = roofline.COPY_SHARE  # of that bandwidth, what a copy is taken to reach
_ALU = re.compile(
    r"(FMNMX|FSETP|FSEL|SEL|LOP3|SHF|PRMT|F2FP|ISETP|IADD3|LEA|VIADD|PLOP3|HMNMX2|IMNMX|VIMNMX|SGXT|IABS|POPC|BMSK|VOTE)"
)
_SPECIAL = re.compile(r"(MUFU|F2F|I2F|F2I)\b")


@dataclass(frozen=True)
class Case:
    """One launcher call, whose kernel is counted and timed."""

    name: str
    unit: str  # what bytes and instructions are counted per
    per_unit: int  # elements of the shape in a unit
    bytes: float  # moved per unit
    ceiling: float  # instructions per unit, on every architecture
    # 16-byte global loads and stores in the code. No stores, where a thread writes fewer contiguous bytes than that: an
    # index byte, 4 B of packed weights, 8 B of packed gradients; a warp writes whole lines of them.
    wide: tuple[int, int]
    make: Callable[[int, int, str, str], Callable]  # (rows, columns, order, device) -> what launches the kernel once
    graph: bool = True  # whether a CUDA graph can hold the launch


def _index(w: torch.Tensor) -> torch.Tensor:
    index = torch.arange(w.numel() // 16, device=w.device).remainder(90).to(torch.uint8)
    return index.view(w.shape[0] // 4, w.shape[1] // 4)


def _randn(*shape: int, device: str, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def _search(rows, columns, order, device, dtype=torch.float32):
    w = _randn(rows, columns, device=device, dtype=dtype)
    return lambda: kernels.transposable_index(w)


def _pack(rows, columns, order, device, dtype=torch.float32, forms=(True, True), pairs=False, **options):
    w = _randn(rows, columns, device=device, dtype=dtype)
    sizes = [w.numel() * 9 // 16 if form else None for form in forms]
    packed = [size and torch.empty(size, dtype=torch.bfloat16, device=device) for size in sizes]
    index = sparse24.pair_index(w) if pairs else _index(w)
    return lambda: kernels.pack_weight_(*packed, w, index, order, **options)


def _mvue(rows, columns, order, device, dtype=torch.bfloat16, token_major=False):
    x, seed = _randn(rows, columns, device=device, dtype=dtype), torch.tensor(1, device=device)
    x = x.t().contiguous().t() if token_major else x
    return lambda: kernels.mvue24(x, seed)


def _mvue_pack(rows, columns, order, device, token_major=False):
    shape = (columns, rows) if token_major else (rows, columns)
    x, seed = _randn(*shape, device=device, dtype=torch.bfloat16), torch.tensor(1, device=device)
    return lambda: kernels.mvue24_pack(x, seed, order, token_major)


def _z_and_da(rows, columns, device, activation):
    z = _randn(rows * (2 if activation in GATED else 1), columns, device=device, dtype=torch.bfloat16)
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


def _soft(rows, columns, order, device, scale=False):
    w = _randn(rows, columns, device=device)
    return lambda: (kernels.sste_scale if scale else kernels.soft_threshold24)(w)


def _pairs(rows, columns, order, device):
    w = _randn(rows, columns, device=device)
    return lambda: kernels.pair_index(w)


def _adamw(rows, columns, order, device):
    p, g, m, v = (_randn(rows, columns, device=device).abs_() for _ in range(4))
    scalars = [sparse24.adamw_scalars(1, 1e-4, (0.9, 0.95), 1e-8, 0.1, 1e-4)]
    index = _index(p)
    return lambda: kernels.adamw_([p], [g], [m], [v], [index], scalars)


_GROUP = "group of 4"
CASES = [
    Case("mask search, fp32 weights", "4x4 block", 16, 65, 265, (4, 0), _search),
    Case(
        "mask search, bf16 weights", "4x4 block", 16, 33, 270, (0, 0), functools.partial(_search, dtype=torch.bfloat16)
    ),
    Case("weight pack, values", "4x4 block", 16, 97, 250, (4, 0), functools.partial(_pack, metadata=False)),
    Case("weight pack, values and metadata", "4x4 block", 16, 101, 400, (4, 0), _pack),
    *(  # as FSDP packs a gathered weight where it multiplies
        Case(
            f"weight pack of bf16{', transposed' if transposed else ''}",
            "4x4 block",
            16,
            51,
            ceiling,
            (0, 0),
            functools.partial(_pack, dtype=torch.bfloat16, forms=(not transposed, transposed)),
        )
        for transposed, ceiling in ((False, 245), (True, 262))
    ),
    Case(
        "weight pack of bf16, row-wise mask",
        "4x4 block",
        16,
        54,
        275,
        (0, 0),
        functools.partial(_pack, dtype=torch.bfloat16, forms=(True, False), pairs=True),
    ),
    Case("MVUE, masked dense", _GROUP, 4, 16, 80, (4, 4), _mvue),
    Case("MVUE, transposed to masked dense", _GROUP, 4, 16, 92, (4, 4), functools.partial(_mvue, token_major=True)),
    Case("MVUE, masked dense, fp32", _GROUP, 4, 32, 110, (8, 8), functools.partial(_mvue, dtype=torch.float32)),
    Case("MVUE, packed", _GROUP, 4, 12.5, 85, (4, 0), _mvue_pack),
    Case("MVUE, transposed and packed", _GROUP, 4, 12.5, 97, (4, 0), functools.partial(_mvue_pack, token_major=True)),
    *(
        Case(
            f"{name}, forward", "element", 1, size, ceiling, (loads, 1), functools.partial(_activation, activation=name)
        )
        for name, size, ceiling, loads in (
            ("gelu", 4, 23, 1),
            ("relu2", 4, 9, 1),
            ("geglu", 6, 26, 2),
            ("swiglu", 6, 17, 2),
        )
    ),
    *(
        Case(
            f"{name}, backward",
            "element",
            1,
            size,
            ceiling,
            wide,
            functools.partial(_activation_backward, activation=name),
        )
        for name, size, ceiling, wide in (
            ("gelu", 6, 26, (2, 1)),
            ("relu2", 6, 12, (2, 1)),
            ("geglu", 10, 32, (3, 2)),
            ("swiglu", 10, 25, (3, 2)),
        )
    ),
    *(
        Case(
            f"{name} backward, MVUE, packed{', bias' if bias else ''}",
            _GROUP,
            4,
            size,
            ceiling,
            wide,
            functools.partial(_fused, activation=name, bias=bias),
        )
        for name, bias, size, ceiling, wide in (
            ("gelu", False, 28.5, 175, (8, 4)),
            ("gelu", True, 28.5, 185, (8, 4)),
            ("relu2", False, 28.5, 122, (8, 4)),
            ("geglu", False, 49, 280, (12, 8)),
            ("swiglu", False, 49, 245, (12, 8)),
        )
    ),
    Case("row mask, fp32", _GROUP, 4, 17, 90, (1, 0), _pairs),
    Case("soft threshold, fp32", _GROUP, 4, 32, 80, (1, 1), _soft),
    Case("soft threshold and scale, fp32", _GROUP, 4, 32, 150, (1, 1), functools.partial(_soft, scale=True)),
    Case("AdamW with masked decay", "element", 1, 28.0625, 112, (4, 3), _adamw, graph=False),
]
DEVICE = "cuda"  # where things are measured
TOKENS = 32 * 512
# The paper's shapes.
TABLE2 = ((3072, 768), (4096, 1024), (5120, 1280), (1024, 1600), (8192, 2048), (16384, 4096), (30768, 8192))
TABLE3 = (768, 1024, 1280, 1600, 2048, 4096, 8192)
# What issues more than an H200 can in the time of its bytes, and why that is accepted. (Two kernels more would be
# limited by the ALU pipe alone, if it runs at half rate as NVIDIA's table says.)
ISSUE_BOUND = {
    "mask search, bf16 weights": "half the bytes for the same search; the master weights of training are float32",
    "MVUE, transposed and packed": "dY alone, a fifth of what is drawn; its exchange by shared memory comes on top",
}

# ---------------------------------------------------------------------------------------------------------------------
# Prediction


class _Target:
    """Stands in for Triton's CUDA driver, so that launchers compile for an architecture without its GPU."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # one cache of compiled kernels per architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def redirected(arch: int, launch: Callable):
    """Within it every kernel is compiled for sm_`arch` and goes to launch(compiled, grid, {argument: value}), not to a
    GPU."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_it(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        launch(compiled, grid, dict(zip(self.arg_names, args, strict=False)) | options)
        return compiled

    driver.set_active(_Target(arch))
    JITFunction.run = compile_it
    try:
        yield
    finally:
        JITFunction.run = run
        driver.set_active(None)  # the real one is made again when it is needed


def compile_only(call: Callable, arch: int) -> list[tuple]:
    """The kernels that `call` would launch, compiled for sm_`arch` and not run: a list of (compiled, grid)."""
    launched = []
    with redirected(arch, lambda compiled, grid, arguments: launched.append((compiled, grid))):
        call()
    return launched


def read_code(compiled) -> dict:
    """Of a compiled kernel: registers, stack, shared memory and its instructions, from its machine code.

    Branches forward count as not taken. Raises RuntimeError for a loop.
    """
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
    code = code[: len(code) - code[::-1].index("EXIT")]  # rare slow paths of division and padding follow
    for address, instruction, operands in lines[: len(code)]:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if instruction.startswith("BR") and not (target and int(target[1], 16) > int(address, 16)):
            raise RuntimeError(f"{compiled.metadata.name} loops at {address}: its instructions cannot be counted")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared, "code": code}


def predict(case: Case, arch: int, rows: int = 256, columns: int = 256) -> dict:
    """Counts of one kernel's code for sm_`arch`; instructions per unit."""
    call = case.make(rows, columns, "sm80" if arch < 90 else "sm90", "cpu")
    ((compiled, grid),) = compile_only(call, arch)
    found = read_code(compiled)
    code = found.pop("code")
    threads_per_unit = grid[0] * compiled.metadata.num_warps * 32 * case.per_unit / (rows * columns)

    def per_unit(pattern) -> float:
        return round(sum(bool(re.match(pattern, i)) for i in code) * threads_per_unit, 2)

    return found | {
        "kernel": compiled.metadata.name,
        "instructions": per_unit(""),
        "alu": per_unit(_ALU),
        "special": per_unit(_SPECIAL),
        "nan_dropping": len(re.findall(r"\b(?:min|max)\.(?:ftz\.)?(?:f32|f16|bf16)", compiled.asm["ptx"])),
        "local": sum(i.startswith(("LDL", "STL")) for i in code),
        "wide_loads": sum(bool(re.match(r"LDG.*\.128", i)) for i in code),
        "wide_stores": sum(bool(re.match(r"STG.*\.128", i)) for i in code),
    }


def share_of_copy(case: Case, counts: dict, gpu: str) -> float:
    """Predicted share of copy bandwidth: see the top of this file."""
    _, sms, ghz, bandwidth = GPUS[gpu]
    lanes = sms * 128 * ghz / 1000  # lane-instructions per picosecond
    copy_ps = case.bytes / (bandwidth * _COPY)
    m = max(counts["instructions"], 2 * counts["alu"], 8 * counts["special"]) / lanes / copy_ps
    return min(0.92, (1 + m**4) ** -0.25)


# ---------------------------------------------------------------------------------------------------------------------
# Measurement


def time_calls(calls: list[Callable], repetitions: int, graph: bool = True) -> list[float]:
    """Microseconds per call, one per repetition: all calls captured in one CUDA graph, their results kept alive.

    graph=False times plain calls: for those that copy from the host, and only where they outlast their launch.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()  # compiles, and fills caches of tables
    torch.cuda.synchronize()
    results, times = [], []

    def replay():
        for call in calls:
            call()

    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for call in calls:
                results.append(call())
        replay = captured.replay
    for repetition in range(repetitions + 3):  # the first three warm up
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        if repetition >= 3:
            times.append(1000 * start.elapsed_time(end) / len(calls))
    return times


def measure(make: Callable[[], Callable], moved: float, repetitions: int, graph: bool = True) -> dict:
    """Time of a kernel that moves `moved` bytes, and of a copy of as many, over four times what the L2 holds.

    At most 256 sets of tensors: kernels that move less than a 64th of the L2 are timed inside it, as the copy is.
    """
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


def attempt(make: Callable[[], Callable], moved: float, repetitions: int, graph: bool = True) -> dict:
    """`measure`, or {"reason": why not}: the cases that follow are worth having."""
    try:
        return measure(make, moved, repetitions, graph)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        return {"reason": reason(error)}


def speed(row: dict) -> str:
    """A measurement in a few words."""
    return row.get("reason") or f"{row['gb_per_s']:.0f} GB/s, {row['us']:.1f} us, {row['share']:.2f} of a copy's speed"


def table2(shapes, repetitions: int) -> Iterator[dict]:
    """The paper's Table 2: transposable mask search, GB/s of real bytes (w read, its result written)."""
    patterns = baselines.pattern_table(sparse24.PATTERNS.to(DEVICE))
    for dtype in (torch.float32, torch.bfloat16):
        for shape in shapes:
            ours_us = None  # the first row of these
            searches = {
                "8 candidates (ours)": (kernels.transposable_index, 1),
                "90 scores": (lambda w: baselines.transposable_index_dot(w, patterns), 1),
                "2-approximation": (baselines.transposable_mask_2approx, 16),
            }
            if dtype == torch.bfloat16 and not any(n % 128 for n in shape):
                searches["torch's greedy tile"] = (_torch_tile, 16 * 2.25)  # packed operands of w and w^T
            for name, (search, written) in searches.items():

                def make(search=search, shape=shape, dtype=dtype):
                    w = _randn(*shape, device=DEVICE, dtype=dtype)
                    return lambda: search(w)

                moved = shape[0] * shape[1] / 16 * (16 * dtype.itemsize + written)
                result = attempt(make, moved, repetitions)
                ours_us = result.get("us") if search is kernels.transposable_index else ours_us
                if "us" in result and ours_us:
                    result["times_ours"] = result["us"] / ours_us
                yield {"shape": shape, "dtype": str(dtype)[6:], "search": name} | result
                print(f"{shape} {dtype} {name}: {speed(result)}", flush=True)


def _torch_tile(w):
    return torch._sparse_semi_structured_tile(w, algorithm="largest_abs_values_greedy", use_cutlass=True)


def table3(widths, repetitions: int) -> Iterator[dict]:
    """The paper's Table 3: GEGLU on feature-major tensors of 32x512 tokens, along tokens, along features, by torch."""
    compiled = torch.compile(lambda z: activation_ref(z, "geglu"))
    for width in widths:
        cases = [
            (name, make, moved, functools.partial(make, width, TOKENS, "", DEVICE, "geglu", by_token))
            for name, by_token in (("along tokens (ours)", False), ("along features (intuitive)", True))
            for make, moved in ((_activation, 6), (_activation_backward, 10))
        ]

        def by_torch(width=width):
            z, _ = _z_and_da(width, TOKENS, DEVICE, "geglu")
            return lambda: compiled(z)

        ours_us = {}  # of each pass, the first row
        for name, make, moved, call in (*cases, ("torch.compile", _activation, 6, by_torch)):
            result = attempt(call, moved * width * TOKENS, repetitions)
            ours_us.setdefault(make, result.get("us"))
            if "us" in result and ours_us[make]:
                result["times_ours"] = result["us"] / ours_us[make]
            yield {"width": width, "order": name, "pass": make.__name__[1:]} | result
            print(f"{width} {name} {make.__name__[1:]}: {speed(result)}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------


def markdown(results: dict) -> str:
    """The kernels' table, with the measured share of a copy's bandwidth where there is one."""
    measured = results["measured"]
    head = ["kernel", "unit", "B", "I (sm_80, 90, 100)", f"predicted share: {', '.join(GPUS)}"]
    head += [f"measured share, {results['measured_on']['device_name']}"] if measured else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in results["kernels"]:
        counts = ", ".join(f"{row['counts'][str(arch)]['instructions']:.3g}" for arch, *_ in GPUS.values())
        shares = ", ".join(f"{share:.2f}" for share in row["predicted"].values())
        cells = [row["name"], row["unit"], f"{row['bytes']:g}", counts, shares]
        if measured:
            found = measured.get(row["name"], {"reason": "not measured"})
            cells.append(found.get("reason") or _share(found))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(row: dict) -> str:
    low, high = row["share_range"]
    return f"{row['share']:.2f} ({low:.2f} to {high:.2f})"


def paper_table(rows: list[dict], *keys: str) -> str:
    """One of the paper's tables: GB/s of real bytes, time, its ratio to ours, and the share of a copy's bandwidth."""
    lines = [f"| {' | '.join(keys)} | GB/s | us | times ours | share of copy |", "|---" * (len(keys) + 4) + "|"]
    for row in rows:
        cells = [str(row[key]) for key in keys]
        if "us" in row:
            times = f"{row['times_ours']:.2f}" if "times_ours" in row else ""
            cells += [f"{row['gb_per_s']:.0f}", f"{row['us']:.1f}", times, _share(row)]
        else:
            cells += ["", "", "", row["reason"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(results: dict) -> str:
    """kernels.md: the kernels' table and, where they were measured, the paper's."""
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
    return (
        "\n\n".join(["# Kernels", f"`python bench.py --suite kernels`. {made}. All of it: kernels.json.", *tables])
        + "\n"
    )


def earlier_measurements(path: Path) -> dict:
    """What an earlier run measured, so that predicting anew does not lose it."""
    keys = ("measured", "measured_on", "table2", "table3")
    earlier = json.loads(path.read_text()) if path.exists() else {}
    return {key: earlier.get(key) for key in keys}


def count_all() -> list[dict]:
    """The kernels' table without its measured column: every case compiled and counted for every GPU of GPUS."""
    rows = []
    for case in CASES:
        counts = {str(arch): predict(case, arch) for arch, *_ in GPUS.values()}
        shares = {gpu: share_of_copy(case, counts[str(GPUS[gpu][0])], gpu) for gpu in GPUS}
        row = {"name": case.name, "unit": case.unit, "bytes": case.bytes, "counts": counts, "predicted": shares}
        rows.append(row)
        print(f"{case.name}: {counts['90']['instructions']} I, predicted {shares['H200']:.2f} on H200", flush=True)
    return rows


def measure_all(shape: tuple[int, int], repetitions: int) -> Iterator[tuple[str, dict]]:
    """(case, its measurement) on tensors of `shape`."""
    order = "sm80" if torch.cuda.get_device_capability() < (9, 0) else "sm90"
    for case in CASES:
        moved = case.bytes * shape[0] * shape[1] / case.per_unit
        found = attempt(functools.partial(case.make, *shape, order, DEVICE), moved, repetitions, case.graph)
        print(f"{case.name}: {speed(found)}", flush=True)
        yield case.name, found


def failures(results: dict) -> list[str]:
    """The kernels and searches of this repository that could not be measured, and why."""
    rows = [*(results["measured"] or {}).items()]
    rows += [(f"{row['shape']} {row['search']}", row) for row in results["table2"] or ()]
    rows += [(f"{row['width']} {row['order']}", row) for row in results["table3"] or ()]
    return [f"{name}: {row['reason']}" for name, row in rows if "reason" in row and "torch" not in name]


def spread_out(shapes: Sequence, count: int) -> list:
    """`count` of the shapes, from small to large."""
    return list(shapes[:: max(1, len(shapes) // count)][:count])


def run(
    out: Path,
    environment: dict,
    measuring: bool,
    shape=(16384, 4096),
    repetitions: int = 10,
    tables: int = 7,
    counting: bool = True,
) -> dict:
    """Compile and count every kernel, measure them and the paper's tables too if asked (it takes a CUDA GPU), and
    write `out`/kernels.json and kernels.md. Measurements that are there already stay where nothing is measured.

    counting=False takes the counts from results/kernels.json. The file is written after each measurement, so that a run
    that is killed loses none."""
    out.mkdir(parents=True, exist_ok=True)
    path, counted = out / "kernels.json", Path(__file__).parents[1] / "results" / "kernels.json"
    earlier = json.loads(counted.read_text()) if not counting else {}
    kernels_rows = count_all() if counting else earlier["kernels"]
    results = {"environment": earlier.get("environment", environment), "kernels": kernels_rows}
    results |= earlier_measurements(path)
    save = functools.partial(write_json, path, results)
    if measuring:
        results |= {"measured": {}, "measured_on": environment, "table2": [], "table3": []}
        for name, found in measure_all(shape, repetitions):
            results["measured"][name] = found
            save()
        for key, rows in (
            ("table2", table2(spread_out(TABLE2, tables), repetitions)),
            ("table3", table3(spread_out(TABLE3, tables), repetitions)),
        ):
            for row in rows:
                results[key].append(row)
                save()
    save()
    (out / "kernels.md").write_text(text := report(results))
    print(f"{text}\nwrote {out}/kernels.json and .md; README.md holds the first table, which a test compares")
    return results
