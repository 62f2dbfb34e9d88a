"""choose.py with a fake clock and planted faults: what is trusted, what is chosen, what is kept."""

import dataclasses
import gc
import json
import statistics
import weakref

import pytest
import torch

from gemm24 import choose as chooser
from gemm24.choose import (
    Backend,
    Report,
    Verdicts,
    choose,
    close_to,
    default_samples,
    fault_of,
    pack,
    random_24,
    time_interleaved,
    trusted_order,
    wins,
)
from gemm24.matmul import ORDERS, Choice, Gemm, compress24, matmul24, pack_ref, unpack_ref

CPU = torch.device("cpu")
GEMMS = {
    "y": Gemm("y", 128, 64, 128, False, True, True),
    "dw": Gemm("dw", 128, 64, 4096, True, False, False),
}
DENSE, NOISE = 100.0, 1.0


def multiply(a, b, bias, rows, transposed, choice):
    """A sound library whose operands lie in sm90's order."""
    return matmul24(unpack_ref(a, rows, b.shape[0], "sm90"), b, bias, rows, transposed, Choice())


class Library:
    """A fake backend. times: (alg_id, split_k) -> us, for those that there are; faults: the same -> what goes wrong."""

    def __init__(self, times, faults=(), why=None, compress="sm90", orders=("sm90", "sm80")):
        self.times, self.faults, self.calls = times, dict(faults), []
        self.backend = Backend(lambda device: why, orders, compress, self.multiply, algorithms=8, split_k=True)

    def multiply(self, a, b, bias, rows, transposed, choice):
        key = choice.alg_id, choice.split_k
        self.calls.append(key)
        fault = self.faults.get(key)
        if fault == "out of memory":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        if key not in self.times or fault == "raises":
            raise RuntimeError("CUDA error: operation not supported when calling `cusparseLtMatmulPlanInit`\nlong text")
        d = multiply(a, b, bias, rows, transposed, choice)
        if fault == "one wrong element":
            d[3, 5] += 0.2 * d.float().square().mean().sqrt()
        if fault == "nan":
            d[0, 0] = float("nan")
        if fault == "transposed":
            d = d.t()
        if fault == "not the same each time":  # its smallest element, by less than close_to sees
            d.view(-1)[d.abs().argmin()] = 2**-8 * d.float().square().mean().sqrt() * (len(self.calls) % 2)
        return d


def fake_timer(library, dense=DENSE, noise=NOISE, log=None):
    """A clock that knows what each call takes: it runs the call, and sees which algorithm of the library that was."""

    def timer(calls, repetitions):
        times = []
        for call in calls:
            library.calls.clear()
            call()
            us = library.times[library.calls[0]] if library.calls else dense
            times.append([us + noise * (i % 5 - 2) for i in range(repetitions)])
        if log is not None:
            log.append(len(calls))
        return times

    return timer


def decide(library, mode="auto", gemms=GEMMS, **options):
    options = {
        "timer": fake_timer(library, options.pop("dense", DENSE)),
        "backends": {"cusparselt": library.backend},
        **options,
    }
    return choose(gemms, CPU, mode, **options)


# ---------------------------------------------------------------------------------------------------------------------
# The choice


def test_the_fastest_sound_algorithm_that_beats_dense_is_taken():
    library = Library({(0, 1): 120, (1, 1): 80, (2, 1): 70, (3, 1): 75})
    report = decide(library)
    assert set(report.choices.values()) == {Choice("cusparselt", "sm90", 2, 1)}
    for row in report.rows:
        assert (row["dense_us"], row["best_us"], row["ratio"], row["chosen"]) == (100, 70, pytest.approx(1 / 0.7), True)
        assert row["dense_spread_us"] == [98, 102]
        assert (row["name"], row["alg_id"], row["reason"]) in {("y", 2, ""), ("dw", 2, "")}
    assert report.notes == ["cusparselt: packs in order sm90, byte for byte its own compress"]


def test_a_long_sum_is_also_split():
    library = Library({(0, 1): 90, (1, 1): 80, (1, 4): 60, (0, 2): 70})
    report = decide(library)
    assert report.choices == {"y": Choice("cusparselt", "sm90", 1, 1), "dw": Choice("cusparselt", "sm90", 1, 4)}
    assert {"cusparselt sm90 1/2", "cusparselt sm90 1/8"} <= report.rows[1]["faults"].keys()  # there are none of these


@pytest.mark.parametrize(("best", "taken"), [(95.0, True), (98.5, False), (100.0, False), (130.0, False)])
def test_dense_is_taken_unless_sparse_wins_by_more_than_the_noise(best, taken):
    report = decide(Library({(0, 1): best}), gemms={"y": GEMMS["y"]})
    assert (report.choices["y"] == Choice("cusparselt", "sm90")) == taken
    assert report.choices["y"].backend == ("cusparselt" if taken else "masked")
    row = report.rows[0]
    assert (row["best_us"], row["ratio"], row["chosen"]) == (best, 100 / best, taken)
    assert row["reason"] == ("" if taken else "not faster by more than the noise")


def test_wins_compares_quartiles():
    assert wins([1, 2, 3, 9], [8, 9, 10, 11])
    assert not wins([1, 2, 9, 10], [8, 9, 10, 11])
    assert not wins([5, 5, 5, 5], [5, 5, 5, 5])


def test_a_backend_asked_for_is_taken_although_slower():
    report = decide(Library({(0, 1): 300, (1, 1): 200}), "cusparselt")
    assert set(report.choices.values()) == {Choice("cusparselt", "sm90", 1)}
    assert [row["chosen"] for row in report.rows] == [True, True]


@pytest.mark.parametrize("mode", ["masked", "dense", "emulated"])
def test_what_measures_nothing(mode):
    report = choose(GEMMS, CPU, mode, timer=None, backends={})
    assert set(report.choices.values()) == {Choice("emulated", "sm90") if mode == "emulated" else Choice()}
    assert report.rows == []
    assert f"spmm={mode}" in report.text() or "emulated" in report.text()


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="need one of auto, dense, masked, cusparselt, cutlass, emul"):
        choose(GEMMS, CPU, "fast")


def test_without_a_library_auto_is_dense_and_says_why_and_asking_for_it_fails():
    for backends in (chooser.BACKENDS, {"cusparselt": Library({}, why="is not built").backend}):
        report = choose(GEMMS, CPU, backends=backends)
        assert set(report.choices.values()) == {Choice()}
        assert report.rows == []
        assert report.notes[0] in ("cusparselt: needs an NVIDIA GPU", "cusparselt: is not built")
        with pytest.raises(ValueError, match=r"spmm='cusparselt': (needs an NVIDIA|is not built).*use spmm='auto'"):
            choose(GEMMS, CPU, "cusparselt", backends=backends)
    for dtype in (torch.float32, torch.float16):
        report = choose(GEMMS, CPU, dtype=dtype, backends={"cusparselt": Library({}).backend})
        assert report.notes == [f"cusparselt: needs bfloat16, this run computes in {dtype}"]


def test_two_libraries_compete():
    first, second = Library({(0, 1): 80}), Library({(0, 1): 70}, compress="cutlass", orders=("cutlass",))

    def timer(calls, repetitions):
        out = []
        for call in calls:
            first.calls.clear()
            second.calls.clear()
            call()
            out.append([80.0 if first.calls else 70.0 if second.calls else 100.0] * repetitions)
        return out

    def sound(a, b, bias, rows, transposed, choice):
        second.calls.append(1)
        return matmul24(unpack_ref(a, rows, b.shape[0], "cutlass"), b, bias, rows, transposed, Choice())

    second.backend = Backend(lambda device: None, ("cutlass",), "cutlass", sound)
    backends = {"cusparselt": first.backend, "cutlass": second.backend}
    report = choose({"y": GEMMS["y"]}, CPU, timer=timer, backends=backends)
    assert report.choices == {"y": Choice("cutlass", "cutlass")}


# ---------------------------------------------------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize("fault", ["raises", "one wrong element", "nan", "transposed", "not the same each time"])
def test_a_faulty_algorithm_is_passed_over(fault):
    report = decide(Library({(0, 1): 80, (1, 1): 10, (2, 1): 90}, {(1, 1): fault}))
    assert set(report.choices.values()) == {Choice("cusparselt", "sm90", 0)}
    said = report.rows[0]["faults"]["cusparselt sm90 1/1"]
    if fault == "raises":
        assert (
            said == "raises RuntimeError: CUDA error: operation not supported when calling `cusparseLtMatmulPlanInit`"
        )
    else:
        assert said == ("not the same result each time" if fault.startswith("not") else "wrong result")


@pytest.mark.parametrize("fault", ["raises", "one wrong element", "nan", "transposed", "not the same each time"])
def test_where_all_are_faulty_dense_is_taken_and_asking_for_it_fails(fault):
    library = Library({(0, 1): 10}, {(0, 1): fault})
    report = decide(library)
    assert set(report.choices.values()) == {Choice()}
    assert report.rows[0]["best_us"] is report.rows[0]["ratio"] is None
    assert report.rows[0]["reason"] == report.rows[0]["faults"]["cusparselt sm90 0/1"]
    assert f"dense: {report.rows[0]['reason']}" in report.text()
    with pytest.raises(ValueError, match=r"spmm='cusparselt': y: .*use spmm='auto'"):
        decide(library, "cusparselt")


@pytest.mark.parametrize(("there", "tried"), [({0, 17}, 17), ({0, 16}, 33), ({3}, 20), ({40}, 16)])
def test_trying_ends_after_sixteen_that_raise_in_a_row(there, tried):
    """Ids that are wrong do not count: the good ones may come after them."""
    library = Library({(alg_id, 1): 80 for alg_id in there})
    library.backend = dataclasses.replace(library.backend, algorithms=64)
    decide(library, gemms={"y": GEMMS["y"]}, timer=lambda calls, n: [[1.0] * n for _ in calls])
    assert [*dict.fromkeys(alg for alg, _ in library.calls)] == [*range(tried)]
    library = Library({(alg_id, 1): 80 for alg_id in range(64)}, {(alg_id, 1): "nan" for alg_id in range(63)})
    library.backend = dataclasses.replace(library.backend, algorithms=64)
    report = decide(library, gemms={"y": GEMMS["y"]})
    assert report.choices == {"y": Choice("cusparselt", "sm90", 63)}


def test_one_that_cannot_be_captured_ends_the_trying(monkeypatch):
    """A capture that failed may leave more behind than its stream; the others would fail alike."""
    monkeypatch.setattr(chooser, "fault_in_graph", lambda call, reference: f"{chooser._NO_CAPTURE}: it waits")
    library = Library({(0, 1): 80, (1, 1): 70})
    usable, gemm = {"cusparselt": "sm90"}, GEMMS["y"]
    trial = chooser._Trial(gemm, usable, {"cusparselt": library.backend}, CPU, torch.bfloat16, pack, True)
    assert not trial.captured  # there are no CUDA graphs on a CPU
    trial.captured = True
    assert trial.finalists(fake_timer(library)) == []
    assert trial.faults == {Choice("cusparselt", "sm90", 0): "cannot be captured in a CUDA graph: it waits"}


def test_a_weight_whose_transpose_cannot_be_packed_is_not_tried():
    library = Library({(0, 1): 10}, compress="sm80", orders=("sm80",))
    gemms = {
        "z": Gemm("z", 256, 64, 192, False, False, False),
        "dw": Gemm("dw", 256, 64, 192, False, False, False, True),
    }
    report = decide(library, gemms=gemms)
    assert report.rows[0]["reason"].startswith(
        "raises ValueError: transposed weight: shape (192, 256), order sm80 needs"
    )
    assert "transposed" not in report.rows[1]["reason"]


def test_what_memory_did_not_allow_is_not_kept(tmp_path):
    library = Library({(0, 1): 80}, {(0, 1): "out of memory"})
    report = decide(library, cache=tmp_path / "c")
    assert "OutOfMemoryError" in report.rows[0]["reason"]
    assert not (tmp_path / "c").exists()
    library.faults = {}
    assert decide(library, cache=tmp_path / "c").choices["y"] == Choice("cusparselt", "sm90")


def test_the_operands_of_a_trial_go_with_it():
    """Gigabytes at a real shape: no cycle may wait for the garbage collector."""
    made = []
    gc.disable()
    try:
        decide(Library({(0, 1): 80}), packer=lambda x, order: made.append(weakref.ref(x)) or pack(x, order))
        assert len(made) == 2
        assert [ref() for ref in made] == [None, None]
    finally:
        gc.enable()


def test_a_packer_that_raises_is_a_fault_too():
    def packer(x, order):
        raise ValueError("need multiples of (128, 64)\nmore")

    report = decide(Library({(0, 1): 10}), packer=packer)
    assert set(report.choices.values()) == {Choice()}
    assert report.rows[0]["reason"] == "raises ValueError: need multiples of (128, 64)"


def test_a_converter_is_timed_where_it_runs_for_each_call(monkeypatch):
    """It does for gradients; weights are packed once per step, and our own packers write what MVUE draws."""
    converted = []
    monkeypatch.setattr(chooser, "trusted_order", lambda backend, device, samples: (backend.compress, ""))
    monkeypatch.setattr(chooser, "compress24", lambda x, o: converted.append(o) or pack_ref(x, x != 0, "sm90"))
    for order, fresh in ((o, f) for o in ("sm90", "cutlass", "library") for f in (False, True)):
        library = Library({(0, 1): 80}, compress=order)
        converted.clear()
        decide(library, gemms={"y": GEMMS["y"]._replace(fresh=fresh)}, packer=lambda x, o: pack_ref(x, x != 0, "sm90"))
        assert bool(converted) == (order != "sm90" and fresh), (order, fresh)


def test_an_error_that_is_not_the_librarys_is_not_swallowed():
    def broken(*args):
        raise TypeError("a bug of ours")

    with pytest.raises(TypeError, match="a bug of ours"):
        fault_of(broken, torch.zeros(1))


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_close_to_allows_rounding_and_no_more(size):
    reference = size * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    rounded = reference.to(torch.bfloat16)
    assert close_to(rounded, reference)
    for wrong in (rounded.roll(1), -rounded, rounded * 1.02, torch.zeros_like(rounded), rounded.roll(1, 1)):
        assert not close_to(wrong, reference)
    rms = reference.square().mean().sqrt()
    nudged = rounded.clone()
    nudged[7, 7] += 0.1 * rms
    assert not close_to(nudged, reference)


# ---------------------------------------------------------------------------------------------------------------------
# Trust in packed bytes


def test_the_order_is_the_one_whose_bytes_the_library_makes():
    for order in ORDERS:
        order_of, why = trusted_order(Backend(None, tuple(ORDERS), order, multiply), CPU)
        assert (order_of, why) == (order, f"packs in order {order}, byte for byte its own compress")


@pytest.mark.parametrize("what", ["values", "metadata", "every other time", "raises", "no order"])
def test_other_bytes_step_down_to_the_librarys_compress(monkeypatch, what):
    calls = []

    def compress(x, order):
        calls.append(order)
        if what == "raises":
            raise RuntimeError("not supported\nlong")
        blob = pack_ref(x, x != 0, "sm90").clone()
        if what != "every other time" or len(calls) % 2 == 0:
            blob.view(torch.int16)[0 if what == "values" else -1] ^= 1
        return blob

    monkeypatch.setattr(chooser, "compress24", compress)
    orders = () if what == "no order" else ("sm90", "sm80")
    order, why = trusted_order(Backend(None, orders, "library", multiply), CPU)
    assert order == "library"
    assert why.startswith("packs by its own compress")
    if what == "raises":
        assert why.endswith("sm90: RuntimeError: not supported; sm80: RuntimeError: not supported")
    elif orders:
        assert why.endswith(
            "sm90: other bytes than its own compress makes; sm80: other bytes than its own compress makes"
        )
        assert set(calls) == {"library"}


def test_a_packer_of_ours_that_writes_other_bytes_is_not_trusted():
    def samples(order, device):
        pairs = default_samples(order, device)
        pairs[-1][1][5] = 7.0
        return pairs

    order, _ = trusted_order(Backend(None, ("sm90",), "sm90", multiply), CPU, samples)
    assert order == "sm90"  # the fallback, which is the library's own here
    assert "other bytes" in trusted_order(Backend(None, ("sm90",), "sm90", multiply), CPU, samples)[1]


def test_bytes_are_compared_at_each_gemms_own_shape(monkeypatch):
    """A library that orders odd shapes in another way: its own compress serves there, our packers elsewhere."""

    def compress(x, order):
        blob = pack_ref(x, x != 0, "sm90").clone()
        return blob.roll(1) if x.shape[1] == 4096 else blob

    class Odd(Library):
        def multiply(self, a, b, *args):
            return super().multiply(a.roll(-1) if b.shape[0] == 4096 else a, b, *args)

    monkeypatch.setattr(chooser, "compress24", compress)
    library = Odd({(0, 1): 80}, compress="library")
    report = decide(library)
    assert report.choices == {"y": Choice("cusparselt", "sm90"), "dw": Choice("cusparselt", "library")}
    fault = report.rows[1]["faults"]["cusparselt sm90 0/1"]
    assert fault == "raises ValueError: order sm90 is not what the library's compress writes at this shape"


def test_random_24_has_two_in_each_group_and_pack_takes_it():
    x = random_24(128, 256, CPU)
    assert ((x != 0).view(-1, 4).sum(1) == 2).all()
    assert not torch.equal(x, random_24(128, 256, CPU, seed=1))
    assert pack(x, "masked") is x
    assert torch.equal(unpack_ref(pack(x, "sm80"), 128, 256, "sm80"), x)
    assert torch.equal(pack(x, "cutlass"), compress24(x, "cutlass"))


# ---------------------------------------------------------------------------------------------------------------------
# What is kept on disk


def test_verdicts_are_kept_and_checked_again(tmp_path):
    cache, log = tmp_path / "deep" / "spmm.json", []
    library = Library({(0, 1): 80, (1, 1): 70})
    first = decide(library, cache=cache, timer=fake_timer(library, log=log))
    measured = len(log)
    assert measured > 0
    library.calls.clear()
    again = decide(library, cache=cache, timer=fake_timer(library, log=log))
    assert (again.choices, again.rows) == (first.choices, first.rows)
    assert again.notes == [*first.notes, f"2 of 2 GEMMs as measured earlier, see {cache}: delete it to measure anew"]
    assert len(log) == measured
    assert library.calls == [(1, 1)] * 8  # the two chosen were run to be trusted again
    library.faults[(1, 1)] = "one wrong element"
    third = decide(library, cache=cache, timer=fake_timer(library, log=log))
    assert set(third.choices.values()) == {Choice("cusparselt", "sm90", 0)}
    assert third.notes[1].endswith("alg_id=1, split_k=1) was chosen earlier but now wrong result")
    assert "earlier, see" not in str(third.notes)


@pytest.mark.parametrize(
    "changes",
    [
        {"graph": True},
        {"mode": "cusparselt"},
        {"gemms": {"y": GEMMS["y"]._replace(n=72)}},
        {"gemms": {"y": GEMMS["y"]._replace(b_column_major=True)}},
        {"gemms": {"y": GEMMS["y"]._replace(transposed=False)}},
        {"gemms": {"y": GEMMS["y"]._replace(bias=False)}},
        {"gemms": {"y": GEMMS["y"]._replace(fresh=True)}},
    ],
)
def test_another_question_is_measured_anew(tmp_path, changes):
    library, log = Library({(0, 1): 80}), []
    options = {"gemms": {"y": GEMMS["y"]}, "cache": tmp_path / "c", "timer": fake_timer(library, log=log)}
    decide(library, **options)
    before = len(log)
    decide(library, **{**options, "gemms": {"other name": GEMMS["y"]}})
    assert len(log) == before
    decide(library, **{**options, **changes})
    assert len(log) > before


def test_another_machine_is_measured_anew(tmp_path, monkeypatch):
    library, log = Library({(0, 1): 80}), []
    options = {"cache": tmp_path / "c", "timer": fake_timer(library, log=log)}
    decide(library, **options)
    before = len(log)
    monkeypatch.setattr(chooser, "_machine", lambda device: ["another"])
    decide(library, **options)
    assert len(log) == 2 * before


def test_a_run_that_is_resumed_keeps_its_rows_before_the_cache(tmp_path):
    library = Library({(0, 1): 80, (1, 1): 70})
    first = decide(library)
    library.times = {(0, 1): 60, (1, 1): 70}
    decide(library, cache=tmp_path / "c")  # another run, with other luck
    rows = json.loads(json.dumps(first.rows))
    assert decide(library, cache=tmp_path / "c", known=rows).choices == first.choices
    assert decide(library, cache=tmp_path / "c").choices != first.choices


@pytest.mark.parametrize("text", ["{ half", "[1, 2]", "\x00\xff"])
def test_a_cache_that_cannot_be_read_costs_the_measuring_alone(tmp_path, text):
    cache = tmp_path / "spmm.json"
    cache.write_bytes(text.encode("latin-1"))
    report = decide(Library({(0, 1): 80}), cache=cache)
    assert report.choices["y"] == Choice("cusparselt", "sm90")
    assert f"{cache} cannot be read" in report.notes[-1]
    assert len(json.loads(cache.read_text())) == 2
    assert list(tmp_path.iterdir()) == [cache]  # written whole, under another name first


def test_a_cache_that_cannot_be_written_costs_a_note(tmp_path):
    (tmp_path / "file").write_text("")
    report = decide(Library({(0, 1): 80}), cache=tmp_path / "file" / "spmm.json")
    assert report.choices["y"] == Choice("cusparselt", "sm90")
    assert sum("verdicts are not kept" in note for note in report.notes) == 1


@pytest.mark.parametrize(
    "row",
    [
        {},
        pytest.param(3, marks=pytest.mark.slow),
        pytest.param(None, marks=pytest.mark.slow),
        {"chosen": True},
        pytest.param([1], marks=pytest.mark.slow),
    ],
)
def test_rows_of_another_form_are_measured_anew(tmp_path, row):
    library, cache = Library({(0, 1): 80}), tmp_path / "c"
    decide(library, cache=cache)
    cache.write_text(json.dumps(dict.fromkeys(json.loads(cache.read_text()), row)))
    assert decide(library, cache=cache).choices["y"] == Choice("cusparselt", "sm90")
    assert all(kept["chosen"] is True for kept in json.loads(cache.read_text()).values())


def test_verdicts_of_other_runs_stay(tmp_path):
    first, second = Verdicts(tmp_path / "c"), Verdicts(tmp_path / "c")
    first.add("a", {"x": 1})
    second.add("b", {"x": 2})
    assert Verdicts(tmp_path / "c").known == {"a": {"x": 1}, "b": {"x": 2}}


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


def test_the_table_says_what_was_chosen_and_why():
    library = Library({(0, 1): 80, (1, 1): 130})
    text = decide(library).text()
    lines = text.splitlines()
    assert lines[0] == "cusparselt: packs in order sm90, byte for byte its own compress"
    assert lines[1].split() == ["2:4", "GEMM", "m", "n", "k", "dense", "us", "sparse", "us", "ratio", "chosen"]
    assert lines[2].split() == ["y", "128", "64", "128", "100.0", "80.0", "1.25", "cusparselt", "0/1"]
    assert "dense: not faster by more than the noise" in decide(Library({(0, 1): 130})).text()


def test_the_three_fastest_are_timed_again_and_longer():
    library, asked = Library({(0, 1): 80, (1, 1): 70, (2, 1): 90, (3, 1): 95}), []
    clock = fake_timer(library)

    def timer(calls, repetitions):
        asked.append((len(calls), repetitions))
        times = clock(calls, repetitions)
        return times if repetitions == 15 else [[80.0] * 3, [85.0] * 3, [90.0] * 3, [95.0] * 3]  # a short look misleads

    report = decide(library, gemms={"y": GEMMS["y"]}, timer=timer)
    assert asked == [(4, 3), (4, 15)]  # all sound ones; dense and three
    assert report.choices["y"].alg_id == 1


def test_another_trusted_order_is_measured_anew(tmp_path):
    library, log = Library({(0, 1): 130}), []  # not chosen, so not run again before it is believed
    options = {"gemms": {"y": GEMMS["y"]}, "cache": tmp_path / "c", "timer": fake_timer(library, log=log)}
    decide(library, **options)
    before = len(log)
    library.backend = Library({}, compress="cutlass", orders=()).backend
    decide(library, **options)
    assert len(log) > before


@pytest.mark.parametrize("changed", ["get_device_name", "version", "driver"])
def test_what_a_machine_is(monkeypatch, tmp_path, changed):
    """A card, a driver or a library that changed makes verdicts void."""
    driver = tmp_path / "version"
    driver.write_text("NVRM version: 580.1\nGCC version: 12")
    monkeypatch.setattr(chooser, "Path", lambda path: driver)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 702)
    cuda = torch.device("cuda", 0)
    before = chooser._machine(cuda)
    assert before == chooser._machine(cuda)
    assert json.loads(json.dumps(before)) == before
    if changed == "driver":
        driver.write_text("NVRM version: 590.2\nGCC version: 12")
    else:
        monkeypatch.setattr(*((torch.cuda, changed, lambda device: "GPU Y") if changed == "get_device_name"
                              else (torch.backends.cusparselt, changed, lambda: 800)))  # fmt: skip
    assert chooser._machine(cuda) != before


def test_rows_of_another_name_are_named_anew(tmp_path):
    """Two GEMMs of one shape share a verdict; the table names each."""
    library = Library({(0, 1): 80})
    report = decide(library, gemms={name: GEMMS["y"]._replace(name=name) for name in ("y", "dx")}, cache=tmp_path / "c")
    assert [row["name"] for row in report.rows] == ["y", "dx"]


def test_bytes_must_be_the_same_several_times_over(monkeypatch):
    calls = []

    def compress(x, order):  # sound the first time that it sees a matrix, as a library that warms up may be
        calls.append(order)
        blob = pack_ref(x, x != 0, "sm90").clone()
        blob.view(torch.int16)[0] ^= int(len(calls) > 3)
        return blob

    monkeypatch.setattr(chooser, "compress24", compress)
    assert trusted_order(Backend(None, ("sm90",), "library", multiply), CPU)[0] == "library"


def test_a_backend_asked_for_is_the_only_one_tried():
    first, second = Library({(0, 1): 80}), Library({(0, 1): 10}, why="not here")
    report = choose(
        GEMMS, CPU, "cusparselt", timer=fake_timer(first),
        backends={"cusparselt": first.backend, "cutlass": Library({(0, 1): 10}).backend, "other": second.backend},
    )  # fmt: skip
    assert {choice.backend for choice in report.choices.values()} == {"cusparselt"}
    assert len(report.notes) == 1


def test_one_lucky_sample_does_not_choose():
    library = Library({(0, 1): 80, (1, 1): 70})
    clock = fake_timer(library)

    def timer(calls, repetitions):
        times = clock(calls, repetitions)
        for sample in times:
            if sample[0] == 78:
                sample[-1] = 1.0
        return times

    assert decide(library, gemms={"y": GEMMS["y"]}, timer=timer).choices["y"].alg_id == 1


def test_close_to_refuses_a_small_error_of_a_small_element():
    reference = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    wrong = reference.to(torch.bfloat16)
    wrong.view(-1)[reference.abs().argmin()] += 0.03
    assert not close_to(wrong, reference)


@pytest.mark.parametrize(("host_us", "advised"), [({}, False), ({"plan": 900.0}, False), ({"plan": 1100.0}, True)])
def test_a_host_that_is_slower_than_the_gpu_is_named(host_us, advised):
    """A report of an earlier version has no host times."""
    us = {"dense": [2000.0, 1990.0, 2010.0], "plan": [1000.0, 990.0, 1010.0]}
    text = Report({}, [], [], {"us": us, "taken": "plan", "host_us": host_us}).text()
    advice = "the host takes 1.100 ms to enqueue that layer, longer than the GPU takes: --compile_mode=reduce-overhead"
    assert (advice in text) == advised
    assert ("reduce-overhead" in text) == advised
