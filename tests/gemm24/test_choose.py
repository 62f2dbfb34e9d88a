"""gemm24/choose.py with a fake clock and planted faults."""

import gc
import json
import math
import statistics
import weakref
from pathlib import Path

import pytest
import torch

from gemm24 import choose as chooser
from gemm24.choose import (
    Report,
    choose,
    close_to,
    fault_of,
    packed_samples,
    random_24,
    time_interleaved,
    trusted_order,
    wins,
)
from gemm24.layout import pack24, unpack24
from gemm24.matmul import Choice, Gemm
from gemm24.operands import pack_matrix
from gemm24.plan import ffn_gemms

CPU = torch.device("cpu")
Y = {"y": Gemm("y", 128, 64, 128, False, True, True)}
GEMMS = {**Y, "dw": Gemm("dw", 128, 64, 2048, True, False, False)}
SOUND = "packs in order sm90, byte for byte its own compress"
EVIDENCE = Path(__file__).parent.parent.parent / "results" / "h200" / "evidence" / "gemms.json"


class Library:
    """Algorithms and a clock. times: (alg_id, split_k) -> us of each algorithm; faults: the same -> its fault.

    sound: a correct multiplication, which `decide` sets."""

    def __init__(self, times, faults=()):
        self.times, self.faults, self.calls, self.rounds = times, dict(faults), [], 0

    def multiply(self, a, b, bias=None, transpose_result=False, alg_id=0, split_k=1):
        key = alg_id, split_k
        self.calls.append(key)
        fault = self.faults.get(key)
        if fault == "out of memory":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        if key not in self.times or fault == "raises":
            raise RuntimeError("CUDA error: operation not supported when calling `cusparseLtMatmulPlanInit`\nlong text")
        d = self.sound(a, b, bias, transpose_result)
        rms = d.float().square().mean().sqrt()
        if fault == "one wrong element":
            d[3, 5] += 0.2 * rms
        if fault == "nan":
            d[0, 0] = float("nan")
        if fault == "transposed":
            d = d.t()
        if fault == "not the same each time":  # the smallest element changes by less than close_to allows
            d.view(-1)[d.abs().argmin()] = 2**-8 * rms * (len(self.calls) % 2)
        return d

    def clock(self, calls, repetitions, graph=False, device=None):
        """Stands in for time_interleaved: runs each call to see its algorithm. A dense GEMM takes 100 us."""
        self.rounds += 1
        times = []
        for call in calls:
            self.calls.clear()
            call()
            us = self.times[self.calls[0]] if self.calls else 100.0
            times.append([us + i % 5 - 2 for i in range(repetitions)])
        return times


@pytest.fixture
def decide(monkeypatch, cslt):
    """`choose` with a Library, of which it tries eight algorithms, and a trusted order."""

    def decide(library, mode="auto", gemms=GEMMS, order="sm90", clock=None, algorithms=8, **options):
        library.sound = cslt
        monkeypatch.setattr(torch, "_cslt_sparse_mm", library.multiply)
        monkeypatch.setattr(chooser, "unavailable", lambda device, dtype: None)
        monkeypatch.setattr(chooser, "trusted_order", lambda device: (order, SOUND))
        monkeypatch.setattr(chooser, "time_interleaved", clock or library.clock)
        monkeypatch.setattr(chooser, "ALGORITHMS", algorithms)
        return choose(gemms, CPU, mode, **options)

    return decide


# ---------------------------------------------------------------------------------------------------------------------
# The choice


def test_the_fastest_sound_algorithm_that_beats_dense_is_taken(decide):
    report = decide(Library({(0, 1): 120, (1, 1): 80, (2, 1): 70, (3, 1): 75}))
    assert set(report.choices.values()) == {Choice("cusparselt", "sm90", 2, 1)}
    for row in report.rows:
        assert (row["dense_us"], row["best_us"], row["ratio"], row["chosen"]) == (100, 70, pytest.approx(1 / 0.7), True)
        assert row["dense_spread_us"] == [98, 102]
        assert (row["name"], row["alg_id"], row["reason"]) in {("y", 2, ""), ("dw", 2, "")}
    lines = report.text().splitlines()
    assert lines[0] == f"cusparselt: {SOUND}"
    assert lines[1].split() == ["2:4", "GEMM", "m", "n", "k", "dense", "us", "sparse", "us", "ratio", "chosen"]
    assert lines[2].split() == ["y", "128", "64", "128", "100.0", "70.0", "1.43", "cusparselt", "2/1"]


def test_a_long_sum_is_also_split(decide):
    report = decide(Library({(0, 1): 90, (1, 1): 80, (1, 4): 60, (0, 2): 70}))
    assert report.choices == {"y": Choice("cusparselt", "sm90", 1, 1), "dw": Choice("cusparselt", "sm90", 1, 4)}
    assert {"cusparselt sm90 1/2", "cusparselt sm90 1/8"} <= report.rows[1]["faults"].keys()  # these raise


@pytest.mark.parametrize(
    ("mode", "best", "taken"),
    [*(("auto", us, us == 95.0) for us in (95.0, 98.5, 100.0, 130.0)), ("cusparselt", 130.0, True)],
)
def test_dense_is_taken_unless_sparse_wins_by_more_than_the_noise_or_is_forced(decide, mode, best, taken):
    report = decide(Library({(0, 1): best}), mode, Y)
    assert report.choices["y"] == (Choice("cusparselt", "sm90") if taken else Choice())
    row = report.rows[0]
    assert (row["best_us"], row["ratio"], row["chosen"]) == (best, 100 / best, taken)
    assert row["reason"] == ("" if taken else "not faster by more than the noise")
    assert ("dense: not faster by more than the noise" in report.text()) == (not taken)


def test_wins_compares_quartiles():
    assert wins([1, 2, 3, 9], [8, 9, 10, 11])
    assert not wins([1, 2, 9, 10], [8, 9, 10, 11])
    assert not wins([5, 5, 5, 5], [5, 5, 5, 5])


def test_the_three_fastest_are_timed_longer_and_compared_by_medians(decide):
    library, rounds = Library({(0, 1): 80, (1, 1): 70, (2, 1): 90, (3, 1): 95}), []

    def clock(calls, repetitions, **options):
        rounds.append((len(calls), repetitions))
        if repetitions == 3:
            return [[80.0] * 3, [85.0] * 3, [90.0] * 3, [95.0] * 3]  # a short measurement misleads
        times = library.clock(calls, repetitions)
        times[1][-1] = 1.0  # one lucky sample of algorithm 0
        return times

    assert decide(library, gemms=Y, clock=clock).choices["y"].alg_id == 1
    assert rounds == [(4, 3), (4, 15)]  # first all sound algorithms, then dense and three


@pytest.mark.parametrize("mode", ["masked", "dense", "emulated"])
def test_modes_that_measure_nothing(mode):
    report = choose(GEMMS, CPU, mode)
    assert set(report.choices.values()) == {Choice("emulated", "sm90") if mode == "emulated" else Choice()}
    assert report.rows == []
    assert f"spmm={mode}" in report.text() or "emulated" in report.text()
    for m, k in ((96, 64), (64, 96)):  # an operand or its transpose does not fit order sm90
        assert choose({"z": Gemm("z", m, 8, k, True, False, False)}, CPU, mode).choices == {"z": Choice()}


def test_other_modes_are_refused():
    with pytest.raises(ValueError, match="need one of auto, dense, masked, cusparselt, emulated"):
        choose(GEMMS, CPU, "fast")


def test_without_a_library_auto_is_dense_and_cusparselt_is_refused():
    report = choose(GEMMS, CPU)
    assert (set(report.choices.values()), report.rows) == ({Choice()}, [])
    assert report.notes == ["cusparselt: needs an NVIDIA GPU"]
    with pytest.raises(ValueError, match="spmm='cusparselt': needs an NVIDIA GPU; use spmm='auto'"):
        choose(GEMMS, CPU, "cusparselt")


def test_when_cusparselt_is_unavailable(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert chooser.unavailable(device, torch.bfloat16) is None
    assert chooser.unavailable(device, torch.float16) == "needs bfloat16, this run computes in torch.float16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert chooser.unavailable(device, torch.bfloat16) == "needs compute capability 8.0 or more"
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert chooser.unavailable(device, torch.bfloat16).endswith("has no cuSPARSELt")


# ---------------------------------------------------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize("fault", ["raises", "one wrong element", "nan", "transposed", "not the same each time"])
def test_a_faulty_algorithm_is_not_chosen(decide, fault):
    message = {
        "raises": "raises RuntimeError: CUDA error: operation not supported when calling `cusparseLtMatmulPlanInit`",
        "not the same each time": "not the same result each time",
    }.get(fault, "wrong result")
    report = decide(Library({(0, 1): 80, (1, 1): 10, (2, 1): 90}, {(1, 1): fault}))
    assert set(report.choices.values()) == {Choice("cusparselt", "sm90", 0)}
    assert report.rows[0]["faults"]["cusparselt sm90 1/1"] == message
    library = Library({(0, 1): 10}, {(0, 1): fault})  # its only algorithm
    report = decide(library)
    assert set(report.choices.values()) == {Choice()}
    assert report.rows[0]["best_us"] is report.rows[0]["ratio"] is None
    assert report.rows[0]["reason"] == message
    assert f"dense: {message}" in report.text()
    with pytest.raises(ValueError, match=r"spmm='cusparselt': y: .*use spmm='auto'"):
        decide(library, "cusparselt")


@pytest.mark.parametrize(("ids", "tried"), [({0, 17}, 17), ({0, 16}, 33), ({3}, 20), ({40}, 16)])
def test_the_search_ends_after_sixteen_ids_that_raise(decide, ids, tried):
    library = Library({(alg_id, 1): 80 for alg_id in ids})
    decide(library, gemms=Y, order="library", algorithms=64, clock=lambda calls, n, **_: [[1.0] * n for _ in calls])
    assert [*dict.fromkeys(alg for alg, _ in library.calls)] == [*range(tried)]


def test_wrong_results_do_not_end_the_search(decide):
    library = Library({(alg_id, 1): 80 for alg_id in range(64)}, {(alg_id, 1): "nan" for alg_id in range(63)})
    assert decide(library, gemms=Y, algorithms=64).choices == {"y": Choice("cusparselt", "sm90", 63)}


def test_a_failed_capture_ends_the_search(monkeypatch, decide):
    decide(Library({(0, 1): 80, (1, 1): 70}), gemms=Y)
    monkeypatch.setattr(chooser, "fault_in_graph", lambda call, reference: f"{chooser._NO_CAPTURE}: it waits")
    trial = chooser._Trial(Y["y"], "library", CPU, True)
    assert not trial.captured  # there are no CUDA graphs on a CPU
    trial.captured = True
    assert trial.finalists() == []
    assert trial.faults == {Choice("cusparselt", "library", 0): "cannot be captured in a CUDA graph: it waits"}


def test_a_weight_whose_transpose_cannot_be_packed_is_not_tried(decide):
    z = Gemm("z", 256, 64, 192, False, False, False)
    report = decide(Library({(0, 1): 10}), gemms={"z": z, "dw": z._replace(fresh=True)}, order="sm80")
    faults = [row["faults"]["cusparselt sm80 0/1"] for row in report.rows]
    assert faults[0].startswith("raises ValueError: transposed weight: shape (192, 256), order sm80 needs")
    assert "transposed" not in faults[1]


def test_a_row_that_ran_out_of_memory_is_not_saved(decide, tmp_path):
    library = Library({(0, 1): 80}, {(0, 1): "out of memory"})
    report = decide(library, cache=tmp_path / "c")
    assert "OutOfMemoryError" in report.rows[0]["reason"]
    assert not (tmp_path / "c").exists()
    report.save(tmp_path / "run")
    assert Report.read(tmp_path / "run").rows == []
    library.faults = {}
    assert decide(library, cache=tmp_path / "c").choices["y"] == Choice("cusparselt", "sm90")


def test_the_operands_of_a_trial_are_freed_without_the_garbage_collector(decide, monkeypatch):
    made = []
    pack = lambda x, order: made.append(weakref.ref(x)) or pack_matrix(x, order)  # noqa: E731
    monkeypatch.setattr(chooser, "pack_matrix", pack)
    gc.disable()
    try:
        decide(Library({(0, 1): 80}))
        assert len(made) == 2
        assert [ref() for ref in made] == [None, None]
    finally:
        gc.enable()


def test_a_packer_that_raises_is_a_fault(decide, monkeypatch):
    def pack(x, order):
        raise ValueError("need multiples of (128, 64)\nmore")

    monkeypatch.setattr(chooser, "pack_matrix", pack)
    report = decide(Library({(0, 1): 10}))
    assert set(report.choices.values()) == {Choice()}
    assert report.rows[0]["reason"] == "raises ValueError: need multiples of (128, 64)"


@pytest.mark.parametrize("order", ["sm90", "library"])
@pytest.mark.parametrize("fields", [{}, {"fresh": True}, {"repacked": True}], ids=str)
def test_packing_is_timed_where_it_is_a_pass_in_each_call(decide, monkeypatch, order, fields):
    """For gradients the library's converter is one, and for weights that are packed in each call every packer."""
    library, packed = Library({(0, 1): 80}), []

    def clock(calls, repetitions, **options):
        packed.clear()
        return library.clock(calls, repetitions)

    pack = lambda x, order: packed.append(order) or pack24(x, x != 0, "sm90")  # noqa: E731
    monkeypatch.setattr(chooser, "pack_matrix", pack)
    decide(library, gemms={"y": Y["y"]._replace(**fields)}, order=order, clock=clock)
    assert packed == ([order] if "repacked" in fields or ("fresh" in fields and order == "library") else [])


def test_a_bug_of_ours_is_not_a_fault():
    with pytest.raises(TypeError):
        fault_of(lambda: len(None), torch.zeros(1))


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_close_to_allows_rounding_and_no_more(size):
    reference = size * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    rounded = reference.to(torch.bfloat16)
    assert close_to(rounded, reference)
    for wrong in (rounded.roll(1), -rounded, rounded * 1.02, torch.zeros_like(rounded), rounded.roll(1, 1)):
        assert not close_to(wrong, reference)
    rms = reference.square().mean().sqrt()
    for place, error in ((7 * 64 + 7, 0.1), (reference.abs().argmin(), 0.03)):
        nudged = rounded.clone()
        nudged.view(-1)[place] += error * rms
        assert not close_to(nudged, reference)


# ---------------------------------------------------------------------------------------------------------------------
# Trust in packed bytes


@pytest.mark.parametrize("order", ["sm80", "sm90"])
def test_the_order_is_the_one_whose_bytes_the_library_makes(cslt, monkeypatch, order):
    monkeypatch.setattr(torch, "_cslt_compress", lambda x: pack24(x, x != 0, order))
    assert trusted_order(CPU) == (order, f"packs in order {order}, byte for byte its own compress")


@pytest.mark.parametrize("wrong", ["values", "metadata", "every other time", "the fourth time", "raises", "our packer"])
def test_with_other_bytes_the_librarys_compress_packs(monkeypatch, wrong):
    calls = []

    def samples(order, device):
        pairs = packed_samples(order, device)
        if wrong == "our packer":
            pairs[-1][1][5] = 7.0
        return pairs

    def compress(x):
        calls.append(1)
        if wrong == "raises":
            raise RuntimeError("not supported\nlong")
        packed = pack24(x, x != 0, "sm90").clone()
        sound = {"every other time": len(calls) % 2, "the fourth time": len(calls) % 48 != 40, "our packer": True}
        if not sound.get(wrong, False):
            packed.view(torch.int16)[0 if wrong == "values" else -1] ^= 1
        return packed

    monkeypatch.setattr(chooser, "packed_samples", samples)
    monkeypatch.setattr(torch, "_cslt_compress", compress)
    order, why = trusted_order(CPU)
    fault = "RuntimeError: not supported" if wrong == "raises" else "other bytes than its own compress makes"
    assert (order, why) == ("library", f"packs by its own compress; sm90: {fault}; sm80: {fault}")


@pytest.mark.parametrize("order", ["sm80", "sm90"])
def test_samples_and_packers_write_the_layout(order):
    pairs = packed_samples(order, CPU)
    assert len(pairs) == 24
    for x, packed in pairs:
        assert torch.equal(unpack24(packed, *x.shape, order), x)
        assert ((x != 0).view(-1, 4).sum(1) == 2).all()
    x = random_24(128, 256, CPU)
    assert ((x != 0).view(-1, 4).sum(1) == 2).all()
    assert not torch.equal(x, random_24(128, 256, CPU, seed=1))
    assert torch.equal(unpack24(pack_matrix(x, order), 128, 256, order), x)


def test_bytes_are_compared_at_each_gemms_own_shape(decide, monkeypatch):
    """The library packs K = 2048 in another order: its own compress serves there, our packers elsewhere."""

    class Reordering(Library):
        def multiply(self, a, b, *args, **options):
            return super().multiply(a.flatten().roll(-1).view(a.shape) if len(b) == 2048 else a, b, *args, **options)

    def compress(x):
        packed = pack24(x, x != 0, "sm90").clone()
        return packed.roll(1) if x.shape[1] == 2048 else packed

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    report = decide(Reordering({(0, 1): 80}))
    assert report.choices == {"y": Choice("cusparselt", "sm90"), "dw": Choice("cusparselt", "library")}
    fault = report.rows[1]["faults"]["cusparselt sm90 0/1"]
    assert fault == "raises ValueError: order sm90 is not what the library's compress writes at this shape"


# ---------------------------------------------------------------------------------------------------------------------
# The report as a file, of a run or of all runs


def test_rows_are_saved_and_checked_again(decide, tmp_path):
    cache, library = tmp_path / "deep" / "spmm.json", Library({(0, 1): 80, (1, 1): 70})
    first = decide(library, cache=cache)
    measured = library.rounds
    assert measured > 0
    library.calls.clear()
    second = decide(library, cache=cache)
    assert (second.choices, second.rows) == (first.choices, first.rows)
    assert second.notes == [*first.notes, f"2 of 2 GEMMs as measured earlier, see {cache}: delete it to measure anew"]
    assert library.rounds == measured
    assert library.calls == [(1, 1)] * 8  # the choices of both GEMMs were checked again
    library.faults[(1, 1)] = "one wrong element"
    third = decide(library, cache=cache)
    assert set(third.choices.values()) == {Choice("cusparselt", "sm90", 0)}
    assert third.notes[1].endswith("alg_id=1, split_k=1) was chosen earlier but now wrong result")
    assert "earlier, see" not in str(third.notes)


@pytest.mark.parametrize(
    "changes",
    [
        *({"graph": True}, {"mode": "cusparselt"}, {"order": "library"}, {}),
        *({"gemms": {"y": Y["y"]._replace(**change)}} for change in (
            {"n": 72}, {"b_column_major": True}, {"transposed": False}, {"bias": False}, {"fresh": True})),
    ],
    ids=str,
)  # fmt: skip
def test_another_question_or_machine_is_measured_anew(decide, monkeypatch, tmp_path, changes):
    library, options = Library({(0, 1): 130}), {"gemms": Y, "cache": tmp_path / "c"}
    decide(library, **options)
    before = library.rounds
    decide(library, **{**options, "gemms": {"other name": Y["y"]}})
    assert library.rounds == before
    if not changes:
        monkeypatch.setattr(chooser, "_machine", lambda device: ["another"])
    decide(library, **{**options, **changes})
    assert library.rounds > before


def test_two_gemms_of_one_shape_share_a_row_and_each_is_named(decide, tmp_path):
    library = Library({(0, 1): 80})
    report = decide(library, gemms={name: Y["y"]._replace(name=name) for name in ("y", "dx")}, cache=tmp_path / "c")
    assert [row["name"] for row in report.rows] == ["y", "dx"]
    assert library.rounds == 2
    assert len(Report.read(tmp_path / "c").rows) == 1
    report.save(tmp_path / "run")
    assert Report.read(tmp_path / "run").rows == report.rows


def test_the_rows_of_a_resumed_run_win_over_the_cache(decide, tmp_path):
    library = Library({(0, 1): 80, (1, 1): 70})
    first = decide(library)
    first.layer = {
        "us": {"dense": [3.0] * 3, "layers": [3.0, 2.0, 4.0], "plan": [1.0] * 3},
        "taken": "plan",
    }
    first.save(tmp_path / "run")
    library.times = {(0, 1): 60, (1, 1): 70}
    decide(library, cache=tmp_path / "c")  # another run measures other times
    saved = Report.read(tmp_path / "run")
    assert (saved.rows, saved.layer, saved.notes) == (first.rows, first.layer, [])
    assert decide(library, cache=tmp_path / "c", known=saved.rows).choices == first.choices
    assert decide(library, cache=tmp_path / "c").choices != first.choices


POISON = {  # changes of a row, each of which measuring cannot give
    "key": (None, 3, "[]", "{}", "[" * 10**5, '[1, [64, 64, 128, 0, 0, 0, 0], "", "auto"]'),
    "m": (None, 64, "128", 128.5), "k": (-128, True), "chosen": (None, 1, "yes"), "backend": ("emulated", "", None),
    "order": ("sm10", None, []), "alg_id": (-1, 64, 10**30, 1.0, "1", None), "split_k": (0, 9, 10**30, None),
    "dense_us": (math.nan, math.inf, -100.0, 0, 1e30, "100", None, 60.0, 10**400),
    "best_us": (math.nan, -70.0, 0.0, 1e-30, "70", None, True, 1.0), "ratio": (math.nan, 0, "1.4", None, 3.0),
    "faults": (None, 3, {"x": 3}, ["x"]), "reason": (None, 3),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in POISON.items() for value in values])
def test_a_row_that_was_not_measured_is_measured_anew(decide, tmp_path, name, value):
    cache = tmp_path / "spmm.json"
    decide(Library({(0, 1): 80, (1, 1): 70}), gemms=Y, cache=cache)
    saved = json.loads(cache.read_text())
    saved["rows"][0][name] = value
    if (name, value) == ("best_us", 1.0):  # a time that fits its ratio, but not the card
        saved["rows"][0]["ratio"] = 100.0
    cache.write_text(json.dumps(saved))
    library = Library({(0, 1): 80, (1, 1): 70})
    report = decide(library, gemms=Y, cache=cache)
    assert report.choices["y"] == Choice("cusparselt", "sm90", 1)
    assert library.rounds == 2
    assert f"{cache} cannot be read" in report.notes[-1]
    assert Report.read(cache).rows == report.rows


def test_a_row_without_a_field_is_measured_anew(decide, tmp_path):
    cache = tmp_path / "spmm.json"
    decide(Library({(0, 1): 80}), gemms=Y, cache=cache)
    text = cache.read_text()
    for name in POISON:
        saved = json.loads(text)
        del saved["rows"][0][name]
        cache.write_text(json.dumps(saved))
        assert f"{cache} cannot be read" in decide(Library({(0, 1): 80}), gemms=Y, cache=cache).notes[-1]


US = {"dense": [3.0] * 3, "layers": [2.0] * 3, "plan": [1.0] * 3}


@pytest.mark.parametrize(
    "layer",
    [
        *(3, [], {}, {"us": US}, {"us": {}, "taken": "plan"}, {"us": US, "taken": "fast"}, {"us": US, "taken": []}),
        *({"us": US | {"plan": us}, "taken": "plan"} for us in ([], [1.0], [-1.0] * 3, [math.nan] * 3, ["1"] * 3, 3)),
        {"us": US | {"plan": [2.5] * 3}, "taken": "plan"},  # slower than what was left for it
        {"us": US, "taken": "plan", "host_us": {"plan": math.nan}},
    ],
    ids=str,
)
def test_times_of_a_layer_that_were_not_measured_are_ignored(tmp_path, layer):
    for given, notes in ((layer, 1), ({"us": US, "taken": "plan", "host_us": {"plan": 1}}, 0), (None, 0)):
        (tmp_path / "run").write_text(json.dumps({"rows": [], "whole": given}))
        saved = Report.read(tmp_path / "run")
        assert len(saved.notes) == notes
        assert saved.layer == (None if notes else given)


def test_a_folder_or_a_deep_file_in_the_caches_place_costs_notes(decide, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "deep").write_text("[" * 10**6)
    for name in ("folder", "deep"):
        report = decide(Library({(0, 1): 80}), cache=tmp_path / name)
        assert report.choices["y"] == Choice("cusparselt", "sm90")
        assert any(f"{tmp_path / name} cannot be read" in note for note in report.notes)


@pytest.mark.parametrize(
    "text", ["{ half", "[1, 2]", "\x00\xff", '{"rows": 1}', *(f'{{"rows": [{x}], "whole": null}}' for x in ("{}", "3"))]
)
def test_a_cache_that_cannot_be_read_is_measured_anew(decide, tmp_path, text):
    cache = tmp_path / "spmm.json"
    cache.write_bytes(text.encode("latin-1"))
    report = decide(Library({(0, 1): 80}), cache=cache)
    assert report.choices["y"] == Choice("cusparselt", "sm90")
    assert f"{cache} cannot be read" in report.notes[-1]
    assert len(Report.read(cache).rows) == 2
    assert list(tmp_path.iterdir()) == [cache]  # written under another name first


def test_a_cache_that_cannot_be_written_costs_a_note(decide, tmp_path):
    (tmp_path / "file").write_text("")
    report = decide(Library({(0, 1): 80}), cache=tmp_path / "file" / "spmm.json")
    assert report.choices["y"] == Choice("cusparselt", "sm90")
    assert sum("verdicts are not saved" in note for note in report.notes) == 1


def test_rows_of_other_runs_stay(decide, tmp_path):
    for gemms in (Y, {"y": Y["y"]._replace(n=72)}, Y):
        decide(Library({(0, 1): 80}), gemms=gemms, cache=tmp_path / "c")
    assert [row["n"] for row in Report.read(tmp_path / "c").rows] == [64, 72]


def test_the_committed_rows_are_read(decide, monkeypatch):
    saved = Report.read(EVIDENCE)
    assert (len(saved.rows), saved.notes) == (32, [])
    machine = json.loads(saved.rows[0]["key"])[6:]
    monkeypatch.setattr(chooser, "_machine", lambda device: machine)
    monkeypatch.setattr(chooser._Trial, "__init__", lambda *args: None)
    monkeypatch.setattr(chooser._Trial, "fault_now", lambda *args: None)
    gemms = ffn_gemms(1600, 6400, 16384, "gelu", False)
    report = decide(Library({}), gemms=gemms, graph=True, known=saved.rows)
    assert report.notes[-1].startswith("4 of 4 GEMMs as measured earlier")  # z and da, y and dx have one shape


@pytest.mark.parametrize("changed", ["get_device_name", "version", "driver"])
def test_the_machine_is_its_gpu_library_and_driver(monkeypatch, tmp_path, changed):
    driver = tmp_path / "version"
    driver.write_text("NVRM version: 580.1\nGCC version: 12")
    monkeypatch.setattr(chooser, "Path", lambda path: driver)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 702)
    cuda = torch.device("cuda", 0)
    before = chooser._machine(cuda)
    assert before == chooser._machine(cuda) == json.loads(json.dumps(before))
    if changed == "driver":
        driver.write_text("NVRM version: 590.2\nGCC version: 12")
    elif changed == "version":
        monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 800)
    else:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU Y")
    assert chooser._machine(cuda) != before


# ---------------------------------------------------------------------------------------------------------------------
# The clock and the table


def test_calls_are_timed_in_turns():
    order = []
    calls = [lambda i=i: order.append(i) for i in range(3)]
    times = time_interleaved(calls, 4, device=CPU)
    assert [len(t) for t in times] == [4, 4, 4]
    assert all(us > 0 for t in times for us in t)
    assert statistics.multimode(order) == [0, 1, 2]
    first_of_each_turn = [i for n, i in enumerate(order) if n == 0 or order[n - 1] != i]
    assert first_of_each_turn == [0, 1, 2] * 4


@pytest.mark.parametrize(("host_us", "advised"), [({}, False), ({"plan": 900.0}, False), ({"plan": 1100.0}, True)])
def test_a_host_that_is_slower_than_the_gpu_is_reported(host_us, advised):
    us = {"dense": [2000.0, 1990.0, 2010.0], "plan": [1000.0, 990.0, 1010.0]}
    text = Report({}, [], [], {"us": us, "taken": "plan", "host_us": host_us}).text()
    advice = "the host takes 1.100 ms to enqueue that layer, longer than the GPU takes: --compile_mode=reduce-overhead"
    assert (advice in text) == advised
    assert ("reduce-overhead" in text) == advised
