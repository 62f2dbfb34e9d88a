"""Which backend multiplies each 2:4 GEMM of a run: nothing is trusted, everything is measured.

trust    a library's operands may be packed by us only if its own compress makes the same bytes, several times over
check    an algorithm must give the dense result, and the same bits each time (libraries have shipped ones that do not)
choice   the fastest sound one is taken where it beats the dense GEMM on the same pruned matrix by more than the noise
cache    rows are kept on disk by shape, layout, dtype, versions, device and driver; what they chose is checked again

A failure steps down: our packers, the library's compress, another algorithm, the dense GEMM. Each step is a line of the
report that is printed at the start and kept with the run.
"""

import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import write_json
from gemm24.matmul import CONVERTED, ORDERS, Choice, Gemm, check_packable, compress24, matmul24, pack_ref


@dataclass(frozen=True)
class Backend:
    """What `choose` needs to know of a library. Tests plant faulty ones."""

    unavailable: Callable[[torch.device], str | None]  # why this device cannot use it, or None
    orders: tuple[str, ...]  # in which our packers may write its operand, if it proves to read them so
    compress: str  # the order of its own converter
    multiply: Callable[..., torch.Tensor]  # (a, b, bias, rows, transposed, choice) -> D
    algorithms: int = 1  # ids 0 .. algorithms - 1 are tried
    split_k: bool = False


def _no_cusparselt(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    if not torch.backends.cusparselt.is_available():
        return f"this build of torch {torch.__version__} has no cuSPARSELt"
    return None if torch.cuda.get_device_capability(device) >= (8, 0) else "needs compute capability 8.0 or more"


def _no_cutlass(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] != 8:
        return "torch's CUTLASS 2:4 kernels need compute capability 8.x"
    return None


BACKENDS = {
    # The library does not say how many algorithms there are; ids are tried until several in a row fail.
    "cusparselt": Backend(_no_cusparselt, ("sm90", "sm80"), "library", matmul24, algorithms=64, split_k=True),
    "cutlass": Backend(_no_cutlass, (), "cutlass", matmul24),
}
MODES = ("auto", "dense", "masked", *BACKENDS, "emulated")  # what `spmm` may be set to
_NONE = {  # what is said of the modes that measure nothing
    "dense": "no 2:4 GEMMs: pruned matrices are multiplied, layer by layer (spmm=dense)",
    "masked": "no 2:4 GEMMs: pruned matrices are multiplied, by the fused feed-forward layer (spmm=masked)",
}


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


Sample = tuple[torch.Tensor, torch.Tensor]  # a pruned matrix, 16-bit, and its packed operand
_REPEATS = 4  # runs of a GEMM that must agree bit for bit
_NO_CAPTURE = "cannot be captured in a CUDA graph"
_WARM_UP = 0.2  # seconds under load before anything is timed: clocks and temperature are then those of a run
_NO_MORE = 16  # algorithm ids in a row that raise: the library has no more
_FORMAT = 1  # of a row and of how it is measured: raise it, and earlier verdicts are measured anew
_FIELDS = {"chosen", "dense_us", "best_us", "ratio", "reason", "faults", *Choice._fields}


def random_24(rows: int, columns: int, device, dtype=torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """A random matrix with exactly two non-zeros in every group of four along its columns."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, columns // 4, 4, generator=generator, device=device)
    x = torch.where(x.abs() < 0.01, 0.01, x)
    kept = torch.rand(x.shape, generator=generator, device=device).argsort(-1) < 2
    return torch.where(kept, x, 0).view(rows, columns).to(dtype)


def pack(x: torch.Tensor, order: str) -> torch.Tensor:
    """The packed operand of a matrix with exactly two non-zeros in every group, in any order; itself for "masked"."""
    if order == "masked":
        return x
    return compress24(x, order) if order in CONVERTED else pack_ref(x, x != 0, order)


def default_samples(order: str, device: torch.device) -> list[Sample]:
    """What pack_ref makes of a few matrices: the layouts as they are written down here."""
    matrices = [random_24(*shape, device, seed=i) for i, shape in enumerate([(128, 128), (256, 384), (384, 128)])]
    return [(x, pack_ref(x, x != 0, order)) for x in matrices]


def trusted_order(backend: Backend, device: torch.device, samples=default_samples) -> tuple[str, str]:
    """(order in which this library's operands can be written, one line on why): the first of backend.orders in which
    samples(order, device), packed by us, are byte for byte what its own compress makes, repeatedly; else its own."""
    wrong = []
    for order in backend.orders:
        try:
            pairs = samples(order, device)
            same = all(torch.equal(pack(x, backend.compress), ours) for _ in range(_REPEATS) for x, ours in pairs)
        except (RuntimeError, ValueError) as error:
            wrong.append(f"{order}: {reason(error)}")
            continue
        if same:
            return order, f"packs in order {order}, byte for byte its own compress"
        wrong.append(f"{order}: other bytes than its own compress makes")
    return backend.compress, "; ".join(["packs by its own compress", *wrong])


def close_to(d: torch.Tensor, reference: torch.Tensor) -> bool:
    """Whether a 16-bit GEMM's result is right: each element within one rounding to bfloat16 of the float32 reference,
    2^-7 of it, plus 2^-6 of the RMS for what partial sums lose. Misplaced elements are off by about the RMS."""
    slack = 2**-6 * torch.linalg.vector_norm(reference, dtype=torch.float64) / reference.numel() ** 0.5
    return bool(((d.float() - reference).abs() <= 2**-7 * reference.abs() + slack).all())  # False for NaN


def fault_of(call: Callable[[], torch.Tensor], reference: torch.Tensor) -> str | None:
    """What is wrong with a GEMM: it raises, its result is not right, or not the same each time. None if it is sound."""
    try:
        first = call()
        if first.shape != reference.shape or not close_to(first, reference):
            return "wrong result"
        if not all(torch.equal(call(), first) for _ in range(_REPEATS - 1)):
            return "not the same result each time"
    except (RuntimeError, ValueError) as error:
        return f"raises {reason(error)}"
    return None


def fault_in_graph(call: Callable[[], torch.Tensor], reference: torch.Tensor) -> str | None:
    """What is wrong with a GEMM that is replayed from a CUDA graph; None if it is sound."""
    results = []
    try:
        replay = _captured(lambda: results.append(call()))
        for _ in range(2):  # the call between replays reuses the memory of whatever the first call left behind
            results[0].fill_(math.nan)
            replay()
            if not close_to(results[0], reference):
                return "wrong result from a CUDA graph"
            call()
    except RuntimeError as error:
        return f"{_NO_CAPTURE}: {reason(error)}"
    return None


def time_interleaved(calls: Sequence[Callable], repetitions: int, graph=False, device=None) -> list[list[float]]:
    """Microseconds per call, `repetitions` of each, taken in turns. On CUDA a sample is as many calls as take about
    2 ms, begun on an idle GPU: the host's time counts where it is longer, and cannot hide behind the call before.
    graph: replay them as CUDA graphs instead, so that it does not count."""
    if not (torch.cuda.is_available() if device is None else device.type == "cuda"):
        turns = [[_host_us(call, 1) for call in calls] for _ in range(repetitions)]
        return [list(times) for times in zip(*turns, strict=True)]
    counts = [max(1, min(100, math.ceil(2000 / max(_host_us(call, 3, torch.cuda.synchronize), 1)))) for call in calls]
    bodies = [functools.partial(_repeat, call, count) for call, count in zip(calls, counts, strict=True)]
    bodies = [_captured(body) for body in bodies] if graph else bodies
    events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)] for _ in calls]
    end = time.perf_counter() + _WARM_UP
    while time.perf_counter() < end:
        for body in bodies:
            body()
        torch.cuda.synchronize()
    for i in range(repetitions):
        for body, pairs in zip(bodies, events, strict=True):
            if not graph:
                torch.cuda.synchronize()
            pairs[i][0].record()
            body()
            pairs[i][1].record()
    torch.cuda.synchronize()
    return [[1000 * a.elapsed_time(b) / n for a, b in pairs] for pairs, n in zip(events, counts, strict=True)]


def _repeat(call: Callable, count: int) -> None:
    for _ in range(count):
        call()


def _host_us(call: Callable, count: int, finish: Callable = lambda: None) -> float:
    call()
    finish()
    start = time.perf_counter()
    _repeat(call, count)
    finish()
    return 1e6 * (time.perf_counter() - start) / count


def enqueue_us(call: Callable, device: torch.device) -> float:
    """Microseconds that the host takes to enqueue one call, the least of five. On a CPU the time of the whole call."""
    times = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return min(times)


def _captured(body: Callable[[], None]) -> Callable[[], None]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            body()
    finally:  # a capture that fails leaves its own stream current
        torch.cuda.set_stream(stream)
    return graph.replay


def wins(sparse_us: Sequence[float], dense_us: Sequence[float]) -> bool:
    """Whether sparse is faster by more than the noise: its upper quartile lies below dense's lower one."""
    return statistics.quantiles(sparse_us, n=4)[2] < statistics.quantiles(dense_us, n=4)[0]


@dataclass
class Report:
    """What was chosen for each GEMM, and the measurements behind it."""

    choices: dict[str, Choice]
    rows: list[dict]
    notes: list[str]
    whole: dict | None = None  # ffn.time_ways: what a whole layer takes, dense and by the choices

    def save(self, path: Path) -> None:
        """Whole or not at all: a kill may come at any time. What memory did not allow to measure is the moment's."""
        rows = [row for row in self.rows if not ran_out_of_memory(row)]
        write_json(path, {"notes": self.notes, "rows": rows, "whole": self.whole})

    def pays(self) -> bool:
        """Whether a 2:4 layer was faster than a dense one; where no layer was timed, whether any of its GEMMs was."""
        if self.whole:
            us = {way: median for way, (median, _, _) in self.whole["us"].items()}
            return us[self.whole["taken"]] < us["dense"]
        return any(row["chosen"] for row in self.rows)

    def text(self) -> str:
        """A table, one line a GEMM, below what was found out about the backends."""
        lines = list(self.notes)
        if self.rows:
            lines.append("2:4 GEMM        m      n      k   dense us  sparse us  ratio  chosen")
        for r in self.rows:
            best = f"{r['best_us']:9.1f}  {r['ratio']:5.2f}" if r["best_us"] else "        -      -"
            how = f"{r['backend']} {r['alg_id']}/{r['split_k']}" if r["chosen"] else f"dense: {r['reason']}"
            lines.append(f"{r['name']:<9} {r['m']:>7} {r['n']:>6} {r['k']:>6}  {r['dense_us']:9.1f}  {best}  {how}")
        if self.whole:
            ways = ", ".join(f"{way} {us[0] / 1000:.3f} ms" for way, us in self.whole["us"].items())
            lines.append(f"one layer, forward and backward: {ways}; taken: {self.whole['taken']}")
            lines += self._host_note()
        return "\n".join(lines)

    def _host_note(self) -> list[str]:
        """Advice where the host takes longer to enqueue a layer than the GPU takes to compute it."""
        taken, host_us = self.whole["taken"], self.whole.get("host_us", {})
        gpu_us = self.whole["us"][taken][0]
        if host_us.get(taken, 0) <= gpu_us:
            return []
        return [
            f"the host takes {host_us[taken] / 1000:.3f} ms to enqueue that layer, longer than the GPU takes: "
            "--compile_mode=reduce-overhead replays CUDA graphs instead"
        ]


def read_report(path: Path | None) -> tuple[list[dict], dict | None]:
    """(rows, whole) of a report that was saved; nothing, and a line that says so, of a file that cannot be read."""
    try:
        found = json.loads(path.read_text()) if path and path.exists() else {"rows": [], "whole": None}
        return [row for row in found["rows"] if row["key"]], found["whole"]
    except (ValueError, LookupError, TypeError) as error:
        print(f"{path} cannot be read ({reason(error)}): GEMMs are measured anew")
        return [], None


class _Trial:
    """One GEMM on random operands: its sound algorithms, and what was wrong with the others."""

    def __init__(self, gemm: Gemm, usable: dict[str, str], backends, device, dtype, packer, graph: bool):
        self.gemm, self.usable, self.backends, self.packer = gemm, usable, backends, packer
        self.captured = graph and device.type == "cuda"
        self.a = random_24(gemm.m, gemm.k, device, dtype)
        options = {"generator": torch.Generator(device).manual_seed(1), "device": device, "dtype": dtype}
        b = torch.randn(*((gemm.n, gemm.k) if gemm.b_column_major else (gemm.k, gemm.n)), **options)
        self.b = b.t() if gemm.b_column_major else b
        self.bias = torch.randn(gemm.m, **options) if gemm.bias else None
        bias = None if self.bias is None else self.bias.float()
        self.reference = matmul24(self.a.float(), self.b.float(), bias, gemm.m, gemm.transposed, Choice())
        self.operands: dict[tuple[str, str], torch.Tensor] = {}  # by backend and order
        self.sound: dict[Choice, Callable] = {}
        self.faults: dict[Choice, str] = {}
        self.us: dict[Choice, float] = {}  # microseconds of each sound algorithm, the first time round

    def dense(self) -> torch.Tensor:
        return matmul24(self.a, self.b, self.bias, self.gemm.m, self.gemm.transposed, Choice())

    def is_sound(self, choice: Choice) -> bool:
        """Run it as often as it takes to trust it."""
        multiply, gemm = self.backends[choice.backend].multiply, self.gemm
        try:
            if not gemm.fresh and choice.order in ORDERS:  # a weight is packed together with its transpose
                check_packable("transposed weight", gemm.k, gemm.m, choice.order)
            if choice[:2] not in self.operands:
                self.operands[choice[:2]] = self._pack(choice)
        except (RuntimeError, ValueError) as error:
            self.faults[choice] = f"raises {reason(error)}"
            return False
        operand, converted = self.operands[choice[:2]], gemm.fresh and choice.order in CONVERTED

        def call():  # a converter's time is part of it where it runs each time; our own packers write as MVUE draws
            a = compress24(self.a, choice.order) if converted else operand
            return multiply(a, self.b, self.bias, gemm.m, gemm.transposed, choice)

        fault = fault_of(call, self.reference) or (fault_in_graph(call, self.reference) if self.captured else None)
        if fault is None:
            self.sound[choice] = call
        else:
            self.faults[choice] = fault
            self._check_context(choice)
        return fault is None

    def _pack(self, choice: Choice) -> torch.Tensor:
        """The operand. Raises ValueError where our packer writes other bytes than the library's compress at this shape.
        A library may pad or order small or ragged shapes in another way than the rest."""
        operand, compress = self.packer(self.a, choice.order), self.backends[choice.backend].compress
        if choice.order not in CONVERTED and not torch.equal(operand, pack(self.a, compress)):
            raise ValueError(f"order {choice.order} is not what the library's compress writes at this shape")
        return operand

    def orders(self, name: str) -> list[str]:
        """The orders to try for a backend: the trusted one, then the one of its own converter."""
        return list(dict.fromkeys((self.usable[name], self.backends[name].compress)))

    def _check_context(self, choice: Choice) -> None:
        """Raises RuntimeError where an algorithm left the GPU in a state in which nothing more can be run."""
        if self.a.is_cuda:
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise RuntimeError(
                    f"{choice} of the 2:4 GEMM {self.gemm} broke the CUDA context ({self.faults[choice]}); "
                    "use --spmm=masked, or another backend"
                ) from error

    def fastest(self, timer) -> list[Choice]:
        times = timer(list(self.sound.values()), 3)
        self.us = dict(zip(self.sound, map(statistics.median, times), strict=True))
        return sorted(self.sound, key=self.us.get)[:3]

    def _try_algorithms(self, name: str, order: str) -> None:
        raised = 0
        for alg_id in range(self.backends[name].algorithms):
            choice = Choice(name, order, alg_id)
            fault = None if self.is_sound(choice) else self.faults[choice]
            raised = raised + 1 if fault and fault.startswith("raises") else 0
            packed = (name, order) in self.operands
            if not packed or raised == _NO_MORE or (fault and fault.startswith(_NO_CAPTURE)):
                break

    def finalists(self, timer) -> list[Choice]:
        """The three fastest sound algorithms; where the sum is long, also with the sum split."""
        for name in self.usable:
            for order in self.orders(name):
                self._try_algorithms(name, order)
                if any(choice[:2] == (name, order) for choice in self.sound):
                    break
        if not self.sound:
            return []
        best = self.fastest(timer)
        splittable = [c for c in best if self.backends[c.backend].split_k and self.gemm.k >= 2048]
        split = [self.is_sound(c._replace(split_k=k)) for c in splittable for k in (2, 4, 8)]
        return self.fastest(timer) if any(split) else best


def _measure(trial: _Trial, forced: bool, timer) -> dict:
    """A row of the report, in plain JSON types; times in microseconds. forced: chosen whether faster or not."""
    finalists = trial.finalists(timer)
    dense_us, *sparse_us = timer([trial.dense, *(trial.sound[choice] for choice in finalists)], 15)
    row = {**trial.gemm._asdict(), "dense_us": statistics.median(dense_us), "dense_spread_us": _spread(dense_us)}
    row |= {"best_us": None, "best_spread_us": None, "ratio": None, "chosen": False, **Choice()._asdict()}
    row["faults"] = {_label(choice): fault for choice, fault in trial.faults.items()}
    row["algorithms_us"] = {_label(choice): us for choice, us in trial.us.items()}
    row["reason"] = next(iter(row["faults"].values()), "no backend")
    if finalists:
        us, choice = min(zip(sparse_us, finalists, strict=True), key=lambda pair: statistics.median(pair[0]))
        row |= {"best_us": statistics.median(us), "best_spread_us": _spread(us), **choice._asdict()}
        row |= {"ratio": row["dense_us"] / row["best_us"], "chosen": forced or wins(us, dense_us)}
        row["reason"] = "" if row["chosen"] else "not faster by more than the noise"
    return row


def _label(choice: Choice) -> str:
    return f"{choice.backend} {choice.order} {choice.alg_id}/{choice.split_k}"


def _choice_of(row: dict) -> Choice:
    return Choice(*(row[field] for field in Choice._fields)) if row["chosen"] else Choice()


def _spread(times: Sequence[float]) -> list[float]:
    return [min(times), max(times)]


def choose(
    gemms: dict[str, Gemm],
    device: torch.device,
    mode: str = "auto",
    *,
    dtype: torch.dtype = torch.bfloat16,
    graph: bool = False,
    cache: Path | None = None,
    known: Sequence[dict] = (),
    timer: Callable | None = None,
    samples: Callable = default_samples,
    packer: Callable = pack,
    backends: dict[str, Backend] = BACKENDS,
) -> Report:
    """Decide how each GEMM of a run is multiplied.

    mode: "auto" takes, per GEMM, the fastest sound algorithm where it beats the dense GEMM by more than the noise; a
    backend's name takes its fastest everywhere; "masked" and "dense" measure nothing. graph: whether the run replays
    CUDA graphs, so that host time does not count. cache: a JSON file of earlier verdicts, by shape, layout, dtype,
    versions, device and driver; known: rows of a report, which go before it, so that a run that is resumed goes on with
    its own. timer, samples, packer, backends: what tests replace, and `ffn` to use the kernels.
    Raises ValueError where a backend that was asked for by name cannot do it.
    """
    if mode not in MODES:
        raise ValueError(f"spmm={mode!r}, need one of {', '.join(MODES)}")
    if mode in ("dense", "masked"):
        return Report(dict.fromkeys(gemms, Choice()), [], [_NONE[mode]])
    if mode == "emulated":
        return Report(dict.fromkeys(gemms, Choice("emulated", "sm90")), [], ["2:4 GEMMs are emulated, to test layouts"])
    timer = timer or functools.partial(time_interleaved, graph=graph, device=device)
    usable, notes = _usable(backends, device, dtype, mode, samples)
    verdicts, rows = Verdicts(cache, known), []
    for gemm in gemms.values() if usable else ():
        key = json.dumps([_FORMAT, gemm[1:], str(dtype), mode, usable, graph, *_machine(device)])
        make_trial = functools.partial(_Trial, gemm, usable, backends, device, dtype, packer, graph)
        row = _kept_row(verdicts, key, make_trial) or _new_row(verdicts, key, make_trial, mode != "auto", timer)
        rows.append({**row, "name": gemm.name, "key": key})
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if verdicts.kept:
        where = f"{verdicts.kept} of {len(rows)} GEMMs as measured earlier, see {cache or 'the run'}"
        notes.append(f"{where}: delete it to measure anew")
    notes += verdicts.notes
    if failed := [row for row in rows if mode != "auto" and not row["chosen"]]:
        raise ValueError(f"spmm={mode!r}: {failed[0]['name']}: {failed[0]['reason']}; use spmm='auto'")
    picked = [_choice_of(row) for row in rows] or [Choice()] * len(gemms)
    return Report(dict(zip(gemms, picked, strict=True)), rows, notes)


def _kept_row(verdicts, key: str, make_trial: Callable[[], _Trial]) -> dict | None:
    """An earlier row of this GEMM, if there is one and what it chose is still sound."""
    row = verdicts.known.get(key)
    if not isinstance(row, dict) or not row.keys() >= _FIELDS:
        return None
    if row["chosen"]:
        trial, choice = make_trial(), _choice_of(row)
        sound = trial.is_sound(choice)
        trial.sound.clear()  # its closures hold it, and gigabytes with it
        if not sound:
            verdicts.notes.append(f"{trial.gemm.name}: {choice} was chosen earlier but now {trial.faults[choice]}")
            return None
    verdicts.kept += 1
    return row


def _new_row(verdicts, key: str, make_trial: Callable[[], _Trial], forced: bool, timer) -> dict:
    trial = make_trial()
    row = _measure(trial, forced, timer)
    trial.sound.clear()
    if not ran_out_of_memory(row):
        verdicts.add(key, row)
    return row


def _usable(backends, device, dtype, mode: str, samples) -> tuple[dict[str, str], list[str]]:
    """(backend -> the order in which it reads operands, a line on each). Raises ValueError where `mode` names one that
    cannot be used."""
    usable, notes = {}, []
    for name, backend in backends.items():
        if mode not in ("auto", name):
            continue
        why = backend.unavailable(device)
        if why is None and dtype != torch.bfloat16:
            why = f"needs bfloat16, this run computes in {dtype}"
        if why is None:
            usable[name], why = trusted_order(backend, device, samples)
        elif mode == name:
            raise ValueError(f"spmm={mode!r}: {why}; use spmm='auto'")
        notes.append(f"{name}: {why}")
    return usable, notes


def ran_out_of_memory(row: dict) -> bool:
    """Whether a verdict is the moment's and not the GEMM's: it is not kept."""
    return any("OutOfMemory" in fault for fault in row["faults"].values())


def _machine(device: torch.device) -> list:
    """What a verdict depends on besides the GEMM."""
    if device.type != "cuda":
        return [str(device), torch.__version__]
    driver = Path("/proc/driver/nvidia/version")
    driver = driver.read_text().partition("\n")[0] if driver.exists() else ""
    cusparselt = torch.backends.cusparselt.version()
    return [torch.cuda.get_device_name(device), torch.__version__, torch.version.cuda, cusparselt, driver]


class Verdicts:
    """Rows of earlier choices by key, kept in a JSON file that several runs may share. A file that cannot be read or
    written costs the measuring again, and a note, never the run. rows: of a report, which go before the file's."""

    def __init__(self, path: Path | None, rows: Sequence[dict] = ()):
        self.path, self.notes, self.kept = path, [], 0  # kept: how many rows were taken as they are
        self.known = self._read() | {row["key"]: row for row in rows}

    def _read(self) -> dict:
        try:
            known = json.loads(self.path.read_text()) if self.path and self.path.exists() else {}
            if not isinstance(known, dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError) as error:
            self.notes.append(f"{self.path} cannot be read ({error}): measured anew")
            return {}
        return known

    def add(self, key: str, row: dict) -> None:
        self.known[key] = row
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # what another run has written since stays
            write_json(self.path, {**self._read(), key: row})
        except OSError as error:
            self.path = None
            self.notes.append(f"verdicts are not kept: {error}")
