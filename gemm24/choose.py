"""Chooses the backend of each 2:4 GEMM of a run by measuring it. Nothing is trusted.

trust    We pack the library's operands ourselves only if its own compress makes the same bytes, several times.
check    An algorithm must give the dense result, and the same bits each time. Libraries have shipped some that do not.
choice   The fastest sound algorithm is taken if it beats the dense GEMM on the same pruned matrix by more than noise.
cache    Rows are saved by shape, layout, dtype, versions, device and driver. A choice that is read back is checked.

After a failure the next in this order is tried: our packers, the library's compress, another algorithm, the dense GEMM.
The report, which is printed at the start and saved with the run, has a line for each failure.
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
from gemm24.layout import ORDERS, check_packable, compress24
from gemm24.matmul import Choice, Gemm, matmul24
from gemm24.operands import mvue24_pack, pack_matrix, pack_weight_, relu2_backward_pack, relu2_pack
from sparse24 import expand_index, transposable_index

MODES = ("auto", "dense", "masked", "cusparselt", "emulated")  # the values of the setting `spmm`
_NOTES = {  # the modes that measure nothing
    "dense": "no 2:4 GEMMs: pruned matrices are multiplied, layer by layer (spmm=dense)",
    "masked": "no 2:4 GEMMs: pruned matrices are multiplied, by the fused feed-forward layer (spmm=masked)",
    "emulated": "2:4 GEMMs are emulated, to test layouts",
}


def check_mode(mode: str) -> None:
    """Raises ValueError if the setting `spmm` has no such value."""
    if mode not in MODES:
        raise ValueError(f"spmm={mode!r}, need one of {', '.join(MODES)}")


def reason(error: Exception) -> str:
    """The type and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


ALGORITHMS = 64  # number of cuSPARSELt algorithm ids to try; the library does not say how many it has
_NO_MORE = 16  # stop after this many ids in a row that raise: the library has no more algorithms
_REPEATS = 4  # runs of a GEMM that must agree bit for bit
_NO_CAPTURE = "cannot be captured in a CUDA graph"
_WARM_UP = 0.2  # seconds under load before timing, so that clocks and temperature are as in a run
_FORMAT = 1  # version of a row and of its measurement; raise it to measure all earlier rows anew


def random_24(rows: int, columns: int, device, dtype=torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """A random matrix with exactly two non-zeros in every group of four along its columns."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, columns // 4, 4, generator=generator, device=device)
    x = torch.where(x.abs() < 0.01, 0.01, x)
    mask = torch.rand(x.shape, generator=generator, device=device).argsort(-1) < 2
    return torch.where(mask, x, 0).view(rows, columns).to(dtype)


def packed_samples(order: str, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of a pruned matrix and its operand from one of our packers. The packers write weights, their transposes,
    gradients and activations. All shapes are multiples of 128; _Trial compares the bytes again at each GEMM's shape."""
    pairs = []
    for seed, shape in enumerate([(256, 512), (512, 256), (384, 128)]):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(shape, generator=generator)
        w = torch.where(w.abs() < 0.01, 0.01, w).to(device)  # libraries find the kept entries by `!= 0`
        index = transposable_index(w)
        packed, packed_t = (torch.empty(w.numel() * 9 // 16, dtype=torch.bfloat16, device=device) for _ in range(2))
        pack_weight_(packed, packed_t, w, index, order)
        w_24 = torch.where(expand_index(index), w, 0).to(torch.bfloat16)
        w_24_t = w_24.t().contiguous()
        gradient, _ = mvue24_pack(w_24_t, 0, order, token_major=True)  # MVUE leaves a 2:4 matrix as it is
        pairs += [(w_24, packed), (w_24_t, packed_t), (w_24, pack_matrix(w_24, order)), (w_24, gradient)]
        z = w_24[:128, :128].abs()  # the two largest of four, and MVUE, leave its square as it is
        a, a_t = relu2_pack(z, 0, order, order)
        dz, dz_t, _ = relu2_backward_pack(z, torch.ones_like(z), 0, order, order)
        z_t = z.t().contiguous()
        pairs += [(z.square(), a), (z_t.square(), a_t), (2 * z, dz), (2 * z_t, dz_t)]
    return pairs


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why cuSPARSELt cannot be used, or None."""
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    if not torch.backends.cusparselt.is_available():
        return f"this build of torch {torch.__version__} has no cuSPARSELt"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 or more"
    return None if dtype == torch.bfloat16 else f"needs bfloat16, this run computes in {dtype}"


def trusted_order(device: torch.device) -> tuple[str, str]:
    """(order in which to pack cuSPARSELt's operands, one line that says why). It is the first order in which all our
    packers write the same bytes as the library's compress, several times; "library" if there is none."""
    wrong = []
    for order in ("sm90", "sm80"):
        try:
            pairs = packed_samples(order, device)
            same = all(torch.equal(compress24(x), packed) for _ in range(_REPEATS) for x, packed in pairs)
        except (RuntimeError, ValueError) as error:
            wrong.append(f"{order}: {reason(error)}")
            continue
        if same:
            return order, f"packs in order {order}, byte for byte its own compress"
        wrong.append(f"{order}: other bytes than its own compress makes")
    return "library", "; ".join(["packs by its own compress", *wrong])


def close_to(d: torch.Tensor, reference: torch.Tensor) -> bool:
    """Returns whether the result of a 16-bit GEMM is right. Each element may differ from the float32 reference by one
    rounding to bfloat16, 2^-7 of it, plus 2^-6 of the RMS for partial sums. A misplaced element differs by about the
    RMS."""
    slack = 2**-6 * torch.linalg.vector_norm(reference, dtype=torch.float64) / reference.numel() ** 0.5
    return bool(((d.float() - reference).abs() <= 2**-7 * reference.abs() + slack).all())  # False for NaN


def fault_of(call: Callable[[], torch.Tensor], reference: torch.Tensor) -> str | None:
    """Return the fault of a GEMM, or None: it raises, its result is wrong, or it differs from run to run."""
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
    """Return the fault of a GEMM that is replayed from a CUDA graph, or None."""
    results = []
    try:
        replay = _captured(lambda: results.append(call()))
        for _ in range(2):  # the eager call between the replays reuses memory that the first call has freed
            results[0].fill_(math.nan)
            replay()
            if not close_to(results[0], reference):
                return "wrong result from a CUDA graph"
            call()
    except RuntimeError as error:
        return f"{_NO_CAPTURE}: {reason(error)}"
    return None


def time_interleaved(calls: Sequence[Callable], repetitions: int, graph=False, device=None) -> list[list[float]]:
    """Microseconds per call: `repetitions` samples of each call, taken in turns.

    On CUDA a sample is a number of calls that takes about 2 ms. It starts on an idle GPU, so that the host's time
    counts where it is longer. graph: replay CUDA graphs instead, where the host's time does not count."""
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
    """Microseconds that the host takes to enqueue one call, the least of five. On a CPU, the time of the call."""
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
    finally:  # a failed capture leaves its own stream current
        torch.cuda.set_stream(stream)
    return graph.replay


def wins(sparse_us: Sequence[float], dense_us: Sequence[float]) -> bool:
    """Returns whether sparse is faster by more than the noise: its upper quartile is below the lower one of dense."""
    return statistics.quantiles(sparse_us, n=4)[2] < statistics.quantiles(dense_us, n=4)[0]


def _are_times(us) -> bool:
    return all(type(one) in (int, float) and 1e-2 <= one <= 1e9 for one in us)  # microseconds


def _can_be_measured(row: dict) -> bool:
    """Returns whether `_Trial.measure` can have made this row. A missing or wrong field may raise an error instead."""
    _, (m, n, k, *_), _, mode, *_ = json.loads(row["key"])
    us = [row["dense_us"], *([] if row["best_us"] is None else [row["best_us"]])]
    valid = _are_times(us) and all(type(one) is int for one in (m, n, k, row["alg_id"], row["split_k"]))
    valid &= [m, n, k] == [row["m"], row["n"], row["k"]] and type(row["chosen"]) is bool
    valid &= all(type(text) is str for text in (row["reason"], *row["faults"].values()))
    valid &= len(us) == 1 or math.isclose(row["ratio"], us[0] / us[1])
    if row["chosen"]:  # not 20 times as fast, because 2:4 halves the arithmetic
        valid &= us[1] < (us[0] if mode == "auto" else math.inf) and row["ratio"] < 20
        valid &= row["backend"] == "cusparselt" and row["order"] in (*ORDERS, "library")
        valid &= 0 <= row["alg_id"] < ALGORITHMS and 1 <= row["split_k"] <= 8
    return valid


def _can_be_timed(layer: dict) -> bool:
    """The same for the times of a layer, which plan.time_ways makes."""
    us, taken = layer["us"], layer["taken"]
    valid = _are_times([*us["dense"], *us["layers"], *us["plan"], *layer.get("host_us", {}).values()])
    return valid and {len(times) for times in us.values()} == {3} and us[taken][0] <= us["layers"][0]


@dataclass
class Report:
    """The choice for each GEMM and its measurements. A run saves its report in its out_dir. The cache that runs share
    is a report too, with the rows of many runs."""

    choices: dict[str, Choice]
    rows: list[dict]  # one per GEMM
    notes: list[str]
    layer: dict | None = None  # times of one whole layer, dense and by the choices, from plan.time_ways

    @classmethod
    def read(cls, path: Path | None) -> "Report":
        """The rows and layer times saved at `path`. A file that cannot be read gives an empty report with a note. The
        GEMMs are then measured again, and the run goes on."""
        try:
            saved = json.loads(path.read_bytes()) if path and path.exists() else {"rows": [], "whole": None}
            rows, layer = saved["rows"], saved["whole"]
            if not all(map(_can_be_measured, rows)) or not (layer is None or _can_be_timed(layer)):
                raise ValueError("it has other values than measurements give")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            return cls({}, [], [f"{path} cannot be read ({reason(error)}): GEMMs are measured anew"])
        return cls({}, rows, [], layer)

    def save(self, path: Path) -> None:
        """Write atomically. Rows that ran out of memory are left out: a later run may have room."""
        rows = [row for row in self.rows if not ran_out_of_memory(row)]
        write_json(path, {"notes": self.notes, "rows": rows, "whole": self.layer})

    def pays(self) -> bool:
        """Returns whether a 2:4 layer was faster than a dense one. If no layer was timed, whether any GEMM was."""
        if self.layer:
            us = {way: median for way, (median, _, _) in self.layer["us"].items()}
            return us[self.layer["taken"]] < us["dense"]
        return any(row["chosen"] for row in self.rows)

    def text(self) -> str:
        """The notes, and a table with one line per GEMM."""
        lines = list(self.notes)
        if self.rows:
            lines.append("2:4 GEMM        m      n      k   dense us  sparse us  ratio  chosen")
        for r in self.rows:
            best = f"{r['best_us']:9.1f}  {r['ratio']:5.2f}" if r["best_us"] else "        -      -"
            verdict = f"{r['backend']} {r['alg_id']}/{r['split_k']}" if r["chosen"] else f"dense: {r['reason']}"
            lines.append(f"{r['name']:<9} {r['m']:>7} {r['n']:>6} {r['k']:>6}  {r['dense_us']:9.1f}  {best}  {verdict}")
        if self.layer:
            us, taken = self.layer["us"], self.layer["taken"]
            ways = ", ".join(f"{way} {median / 1000:.3f} ms" for way, (median, _, _) in us.items())
            lines.append(f"one layer, forward and backward: {ways}; taken: {taken}")
            host_us = self.layer.get("host_us", {}).get(taken, 0)  # reports of earlier versions have none
            if host_us > us[taken][0]:
                lines.append(
                    f"the host takes {host_us / 1000:.3f} ms to enqueue that layer, longer than the GPU takes: "
                    "--compile_mode=reduce-overhead replays CUDA graphs instead"
                )
        return "\n".join(lines)


def _add_to_cache(cache: Path | None, row: dict, notes: list[str]) -> Path | None:
    """Add a row to the cache, which is read again because another run may have written to it. Returns the cache, or
    None after a note if it cannot be written."""
    if cache is None or ran_out_of_memory(row):
        return cache
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        rows = [other for other in Report.read(cache).rows if other["key"] != row["key"]]
        Report({}, [*rows, row], []).save(cache)
    except OSError as error:
        notes.append(f"verdicts are not saved: {error}")
        return None
    return cache


class _Trial:
    """One GEMM on random operands: its sound algorithms, and the faults of the others."""

    def __init__(self, gemm: Gemm, order: str, device: torch.device, graph: bool):
        self.gemm, self.order = gemm, order
        self.captured = graph and device.type == "cuda"
        self.time = functools.partial(time_interleaved, graph=graph, device=device)
        self.a = random_24(gemm.m, gemm.k, device)
        options = {"generator": torch.Generator(device).manual_seed(1), "device": device, "dtype": torch.bfloat16}
        b = torch.randn(*((gemm.n, gemm.k) if gemm.b_column_major else (gemm.k, gemm.n)), **options)
        self.b = b.t() if gemm.b_column_major else b
        self.bias = torch.randn(gemm.m, **options) if gemm.bias else None
        bias = None if self.bias is None else self.bias.float()
        self.reference = matmul24(self.a.float(), self.b.float(), bias, gemm.m, gemm.transposed, Choice())
        self.operands: dict[str, torch.Tensor] = {}  # by order
        self.sound: dict[Choice, Callable] = {}
        self.faults: dict[Choice, str] = {}
        self.us: dict[Choice, float] = {}  # microseconds of each sound algorithm in the first round

    def dense(self) -> torch.Tensor:
        return matmul24(self.a, self.b, self.bias, self.gemm.m, self.gemm.transposed, Choice())

    def is_sound(self, choice: Choice) -> bool:
        """Run an algorithm until it can be trusted or shows a fault."""
        gemm = self.gemm
        try:
            once = not (gemm.fresh or gemm.repacked)
            if once and choice.order in ORDERS:  # a weight is packed with its transpose, which must fit too
                check_packable("transposed weight", gemm.k, gemm.m, choice.order)
            if choice.order not in self.operands:
                self.operands[choice.order] = self._pack(choice.order)
        except (RuntimeError, ValueError) as error:
            self.faults[choice] = f"raises {reason(error)}"
            return False
        # The time of packing counts where it is a pass of its own in each call. Our packers pack gradients and
        # activations while they compute them; the library's converter cannot.
        operand, pack = self.operands[choice.order], gemm.repacked or (gemm.fresh and choice.order == "library")

        def call():
            a = pack_matrix(self.a, choice.order) if pack else operand
            return matmul24(a, self.b, self.bias, gemm.m, gemm.transposed, choice)

        fault = fault_of(call, self.reference) or (fault_in_graph(call, self.reference) if self.captured else None)
        if fault is None:
            self.sound[choice] = call
        else:
            self.faults[choice] = fault
            self._check_context(choice)
        return fault is None

    def _pack(self, order: str) -> torch.Tensor:
        """The packed A. Raises ValueError if our packer writes other bytes than the library's compress at this shape:
        the library may pad or order small or ragged shapes in another way."""
        operand = pack_matrix(self.a, order)
        if order != "library" and not torch.equal(operand, compress24(self.a)):
            raise ValueError(f"order {order} is not what the library's compress writes at this shape")
        return operand

    def _check_context(self, choice: Choice) -> None:
        """Raises RuntimeError if an algorithm has broken the CUDA context, so that nothing more can run."""
        if self.a.is_cuda:
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise RuntimeError(
                    f"{choice} of the 2:4 GEMM {self.gemm} broke the CUDA context ({self.faults[choice]}); "
                    "use --spmm=masked"
                ) from error

    def _fastest(self) -> list[Choice]:
        times = self.time(list(self.sound.values()), 3)
        self.us = dict(zip(self.sound, map(statistics.median, times), strict=True))
        return sorted(self.sound, key=self.us.get)[:3]

    def _try_algorithms(self, order: str) -> None:
        raised = 0
        for alg_id in range(ALGORITHMS):
            choice = Choice("cusparselt", order, alg_id)
            fault = None if self.is_sound(choice) else self.faults[choice]
            raised = raised + 1 if fault and fault.startswith("raises") else 0
            if order not in self.operands or raised == _NO_MORE or (fault and fault.startswith(_NO_CAPTURE)):
                break

    def finalists(self) -> list[Choice]:
        """The three fastest sound algorithms. If K is long, splits of the sum compete too."""
        self._try_algorithms(self.order)
        if not self.sound and self.order != "library":
            self._try_algorithms("library")
        if not self.sound:
            return []
        best = self._fastest()
        split = [self.is_sound(c._replace(split_k=n)) for c in best for n in (2, 4, 8) if self.gemm.k >= 2048]
        return self._fastest() if any(split) else best

    def measure(self, forced: bool) -> dict:
        """A row of the report, in JSON types; times in microseconds. forced: choose 2:4 even if it is slower."""
        finalists = self.finalists()
        dense_us, *sparse_us = self.time([self.dense, *(self.sound[choice] for choice in finalists)], 15)
        row = {**self.gemm._asdict(), "dense_us": statistics.median(dense_us)}
        row["dense_spread_us"] = [min(dense_us), max(dense_us)]
        row |= {"best_us": None, "best_spread_us": None, "ratio": None, "chosen": False, **Choice()._asdict()}
        row["faults"] = {_label(choice): fault for choice, fault in self.faults.items()}
        row["algorithms_us"] = {_label(choice): us for choice, us in self.us.items()}
        row["reason"] = next(iter(row["faults"].values()), "no algorithm")
        if finalists:
            us, choice = min(zip(sparse_us, finalists, strict=True), key=lambda pair: statistics.median(pair[0]))
            row |= {"best_us": statistics.median(us), "best_spread_us": [min(us), max(us)], **choice._asdict()}
            row |= {"ratio": row["dense_us"] / row["best_us"], "chosen": forced or wins(us, dense_us)}
            row["reason"] = "" if row["chosen"] else "not faster by more than the noise"
        self.sound.clear()  # its closures hold the trial, and so gigabytes of operands
        return row

    def fault_now(self, choice: Choice) -> str | None:
        """The fault that an algorithm chosen earlier has today, or None."""
        self.is_sound(choice)
        self.sound.clear()
        return self.faults.get(choice)


def _label(choice: Choice) -> str:
    return f"{choice.backend} {choice.order} {choice.alg_id}/{choice.split_k}"


def _choice_of(row: dict) -> Choice:
    return Choice(*(row[field] for field in Choice._fields)) if row["chosen"] else Choice()


def choose(
    gemms: dict[str, Gemm],
    device: torch.device,
    mode: str = "auto",
    *,
    dtype: torch.dtype = torch.bfloat16,
    graph: bool = False,
    cache: Path | None = None,
    known: Sequence[dict] = (),
) -> Report:
    """Choose how each GEMM of a run is multiplied.

    mode: "auto" takes for each GEMM the fastest sound algorithm if it beats the dense GEMM by more than the noise;
    "cusparselt" takes the fastest even if it is slower; "masked", "dense" and "emulated" measure nothing. graph: the
    run replays CUDA graphs, so host time does not count. cache: file of rows that runs share. known: rows of the run
    that is resumed; they win over those of the cache. Raises ValueError if "cusparselt" cannot multiply a GEMM.
    """
    check_mode(mode)
    if mode in _NOTES:
        choices = {name: _emulated(gemm) if mode == "emulated" else Choice() for name, gemm in gemms.items()}
        return Report(choices, [], [_NOTES[mode]])
    if why := unavailable(device, dtype):
        if mode != "auto":
            raise ValueError(f"spmm={mode!r}: {why}; use spmm='auto'")
        return Report(dict.fromkeys(gemms, Choice()), [], [f"cusparselt: {why}"])
    order, why = trusted_order(device)
    saved = Report.read(cache)
    notes = [f"cusparselt: {why}", *saved.notes]
    earlier = {row["key"]: row for row in (*saved.rows, *known)}
    by_key, reused, rows = {}, 0, []  # two GEMMs of one shape have one key and share a row
    for name, gemm in gemms.items():
        settings = [str(dtype), mode, {"cusparselt": order}, graph, *_machine(device)]
        fields = gemm[1:] if gemm.repacked else gemm[1:-1]  # rows of earlier versions have no such field
        key = json.dumps([_FORMAT, fields, *settings])
        if key not in by_key:
            row, trial = earlier.get(key), functools.partial(_Trial, gemm, order, device, graph)
            if row and row["chosen"] and (fault := trial().fault_now(_choice_of(row))):
                notes.append(f"{name}: {_choice_of(row)} was chosen earlier but now {fault}")
                row = None
            reused += row is not None
            by_key[key] = row or {**trial().measure(forced=mode != "auto"), "key": key}
            cache = cache if row else _add_to_cache(cache, by_key[key], notes)
        rows.append({**by_key[key], "name": name})
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if reused:
        source = cache or "the run"
        notes.append(f"{reused} of {len(by_key)} GEMMs as measured earlier, see {source}: delete it to measure anew")
    if failed := [row for row in rows if mode != "auto" and not row["chosen"]]:
        raise ValueError(f"spmm={mode!r}: {failed[0]['name']}: {failed[0]['reason']}; use spmm='auto'")
    return Report({row["name"]: _choice_of(row) for row in rows}, rows, notes)


def _emulated(gemm: Gemm) -> Choice:
    """The emulated GEMM in order sm90, or the dense one if an operand or its transpose does not fit that order."""
    return Choice("emulated", "sm90") if gemm.m % 64 == gemm.k % 64 == gemm.n % 8 == 0 else Choice()


def ran_out_of_memory(row: dict) -> bool:
    """True if an algorithm failed for lack of memory. Such a row is not saved."""
    return any("OutOfMemory" in fault for fault in row["faults"].values())


def _machine(device: torch.device) -> list:
    """The device, versions and driver that a verdict holds for."""
    if device.type != "cuda":
        return [str(device), torch.__version__]
    driver = Path("/proc/driver/nvidia/version")
    driver = driver.read_text(encoding="utf-8", errors="replace").partition("\n")[0] if driver.exists() else ""
    cusparselt = torch.backends.cusparselt.version()
    return [torch.cuda.get_device_name(device), torch.__version__, torch.version.cuda, cusparselt, driver]
