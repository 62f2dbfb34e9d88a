"""runtime/ranks.py: two ranks train as one process does, and a rank that differs ends the run; stop signals."""

import functools
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from harness import (
    ROOT,
    SETTINGS,
    children_of,
    differences,
    finish,
    launch,
    pristine_train,
    read_rows,
    read_state,
    run_here,
    start,
)

from model import GPT, GPTConfig
from runtime import setup
from runtime.ranks import Ranks, StopSignal, outvoted, stalled
from sparse24 import sparse_linears

STEPS = 6
EXACT = {"max_iters": STEPS, "mask_interval": STEPS + 1, "mvue": False, "eval_interval": 3, "eval_iters": 3}
MVUE = {"max_iters": 1, "mvue": True, "eval_iters": 0}  # all 18 windows of the split: five batches, the last one short
exact_and_mvue = pytest.mark.parametrize("name", ["exact", pytest.param("mvue", marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """runs(settings, ranks): the folder of a run, with its gradients, models and output. Each run is made once."""

    @functools.cache
    def make(name, ranks):
        out, changes = tmp_path_factory.mktemp(f"{name}{ranks}"), {"exact": EXACT, "mvue": MVUE}[name]
        run, dump = run_here if ranks == 1 else launch, {"kind": "dump", "folder": str(out)}
        done = run(out, {**SETTINGS, **changes, "dataset": data}, dump, ranks=ranks)
        assert done.returncode == 0, done.stderr
        (out / "stdout.txt").write_text(done.stdout)
        return out

    return make


def load(path):
    return torch.load(path, weights_only=True)


def assert_close_models(one, two):
    for name, tensor in one["model"].items():
        if torch.is_tensor(tensor) and tensor.is_floating_point():
            torch.testing.assert_close(two["model"][name], tensor, rtol=0, atol=1e-5)
        else:
            assert differences(tensor, two["model"][name]) == []


def test_two_ranks_end_in_the_weights_and_masks_of_one(runs):
    one, two = (read_state(runs("exact", ranks)) for ranks in (1, 2))
    assert one["iter_num"] == two["iter_num"] == STEPS
    assert max(g.norm() for g in load(runs("exact", 1) / "grads_0.pt")) > 0.1
    assert_close_models(one, two)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("exact", 2), *[pytest.param(*case, marks=pytest.mark.slow) for case in (("mvue", 2), ("exact", 3))]],
)
def test_ranks_log_the_numbers_of_one_process(runs, name, ranks):
    """Three ranks share four micro-batches: in the second round, two ranks have none."""
    for a, b in zip(read_rows(runs(name, 1)), read_rows(runs(name, ranks)), strict=True):
        assert a["iter"] == b["iter"]
        for key in ("train_loss", "val_loss", "lr", "grad_norm", "decay_ratio"):
            assert b[key] == (None if a[key] is None else pytest.approx(a[key], rel=1e-5)), (a["iter"], key)


@exact_and_mvue
def test_first_gradient_of_two_ranks_is_that_of_one(runs, name):
    one = load(runs(name, 1) / "grads_0.pt")
    for rank in (0, 1):
        for a, b in zip(one, load(runs(name, 2) / f"grads_{rank}.pt"), strict=True):
            assert (a - b).norm() <= 1e-6 * a.norm()


@pytest.mark.slow
def test_mvue_changes_the_gradient_that_is_compared(runs):
    exact, mvue = (load(runs(name, 1) / "grads_0.pt") for name in ("exact", "mvue"))
    assert max((a - b).norm() / a.norm() for a, b in zip(exact, mvue, strict=True)) > 0.01


@exact_and_mvue
def test_both_ranks_hold_the_same_bits(runs, name):
    states = [load(runs(name, 2) / f"model_{rank}.pt") for rank in (0, 1)]
    assert any(key.endswith(".index") for key in states[0])
    assert differences(*states) == []
    assert differences(states[0], read_state(runs(name, 2))["model"]) == []


@pytest.mark.slow
def test_ranks_follow_one_plan(runs, data, tmp_path):
    done = launch(tmp_path / "out", {**SETTINGS, **EXACT, "dataset": data, "spmm": "masked"}, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pruned matrices are multiplied, by the fused") == 1
    assert_close_models(read_state(tmp_path / "out"), read_state(runs("exact", 2)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "bi_mask"])
def test_both_ranks_take_the_same_decisions_of_a_method(data, tmp_path, name):
    """STEP's switch, Bi-Mask's row permutations."""
    settings = {**SETTINGS, "max_iters": 8, "dataset": data, "mvue": False}
    settings |= {"sparse": name, "masked_decay": 0.0, "mask_interval": 1, "dense_finetune": 0.0, "dense_start": -1}
    for ranks, run in ((1, run_here), (2, launch)):
        done = run(tmp_path / str(ranks), settings, ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (read_state(tmp_path / str(ranks)) for ranks in (1, 2))
    assert one["sparse_start"] == two["sparse_start"] == (4 if name == "step" else 0)
    for key, tensor in one["model"].items():
        if key.endswith("permutation"):
            assert torch.equal(two["model"][key], tensor)
            assert not torch.equal(tensor, torch.arange(len(tensor)))


def test_only_rank_0_writes_and_prints(runs):
    printed = (runs("exact", 2) / "stdout.txt").read_text()
    assert [int(n) for n in re.findall(rf"^iter +(\d+)/{STEPS}", printed, re.M)] == [*range(STEPS + 1)]
    assert printed.count(f"done: {STEPS} iterations") == printed.count("parameters; ") == 1
    assert [row["iter"] for row in read_rows(runs("exact", 2))] == [*range(STEPS + 1)]


@pytest.mark.slow
def test_a_rank_with_another_weight_ends_the_run_before_the_next_save(data, tmp_path):
    settings, fault = {**SETTINGS, "max_iters": 8, "dataset": data}, {"kind": "alter", "iter_num": 5}
    done = launch(tmp_path / "out", settings, fault, ranks=2)
    assert done.returncode != 0
    assert "weights or masks of ranks [0, 1] differ from the others', or from each other's; resume" in done.stderr
    assert read_state(tmp_path / "out")["iter_num"] == 4


@pytest.mark.parametrize(
    ("name", "buffers"),
    [("fst", {"index"}), ("bi_mask", {"index", "permutation", "index_t"}), ("s_ste", {"index", "beta"}), ("ste", None)],
)
def test_check_equal_sees_one_bit_of_any_weight_or_buffer(monkeypatch, name, buffers):
    """The other rank's sum stands in for the gathered one. buffers=None adds a buffer as a new method would."""
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8, bias=True, sparse=name))
    for layer in sparse_linears(model):
        if buffers is None:
            layer.register_buffer("scores", torch.rand(3))
        layer.register_buffer("packed", torch.rand(3), persistent=False)
        held = {key for key in layer.state_dict() if key not in ("weight", "bias", "_extra_state")}
        assert held == (buffers or {"index", "scores"})
    ranks, sums = Ranks(0, 0, 2), []

    def gather(gathered, this_rank, group):
        sums.append(this_rank.clone())
        for tensor, value in zip(gathered, (sums[0], this_rank), strict=True):
            tensor.copy_(value)

    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    ranks.check_equal(model)
    tensors = [tensor for tensor in model.state_dict().values() if torch.is_tensor(tensor)]
    assert len(tensors) == 16 + 1 + 2 * len(buffers or "12")  # one weight is tied
    for tensor in tensors:
        bits = tensor.view(-1).view(torch.uint8)
        for place in (0, -1):
            bits[place] ^= 1
            with pytest.raises(RuntimeError, match=r"weights or masks of ranks \[0, 1\] differ"):
                ranks.check_equal(model)
            bits[place] ^= 1
    for layer in sparse_linears(model):  # seeds differ between ranks, and packed operands are copies of the weights
        layer.seed += 1
        layer.packed += 1
    ranks.check_equal(model)


def test_fewer_micro_batches_than_ranks_are_refused(data, tmp_path, monkeypatch):
    with pristine_train():
        monkeypatch.setattr(setup, "start_ranks", lambda *_: Ranks(1, 1, 2))
        done = run_here(tmp_path / "out", {**SETTINGS, "gradient_accumulation_steps": 1, "dataset": data})
    assert done.returncode == 1
    assert "gradient_accumulation_steps=1, need at least the number of ranks, 2" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_world_of_one_agrees_with_itself():
    ranks = Ranks()
    assert ranks.master
    assert (ranks.maximum(3), ranks.total([1.5, 2.0]), ranks.decide("x")) == (3, [1.5, 2.0], "x")
    ranks.check_equal(torch.nn.Linear(2, 2))
    ranks.leave()


LEAVE = """
import os
import time
from pathlib import Path
from runtime.ranks import start_ranks

def gloo_threads():
    names = [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")]
    return sum("gloo_run" in name for name in names)

ranks = start_ranks("cpu")
assert ranks.total([1.0, 2.0]) == [2.0, 4.0] and ranks.maximum(ranks.rank) == 1 and ranks.decide(ranks.rank) == 0
assert gloo_threads() > 0
if ranks.rank == 1:
    time.sleep(2)
    Path("late").touch()
ranks.leave()
assert Path("late").exists(), "left before the others"
assert gloo_threads() == 0, gloo_threads()
print("left", flush=True)
"""


@pytest.mark.slow
def test_no_thread_of_the_control_group_outlives_it(tmp_path):
    (tmp_path / "leave.py").write_text(LEAVE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "leave.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count("left") == 2, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# On one process


@pytest.mark.parametrize(
    ("sums", "wrong"),
    [
        ([(0, 5), (0, 5), (0, 6)], [2]),
        ([(0, 6), (0, 5), (0, 5)], [0]),
        ([(0, 5), (0, 5), (0, 5)], []),
        ([(0, 5), (1, 9), (0, 5), (1, 8), (0, 5), (1, 9)], [3]),  # two shards, three replicas of each
        ([(0, 5), (1, 9)], []),  # different shards are not compared
        ([(0, 5), (0, 6)], [0, 1]),  # two ranks have no majority
        ([(0, 5), (0, 6), (0, 6), (0, 5)], [0, 1, 2, 3]),
        ([(0, 5), (0, 6), (1, 9), (1, 9)], [0, 1]),
        ([(0, 5), (0, 6), (0, 7), (0, 5)], [1, 2]),
    ],
)
def test_the_rank_that_differs_is_named(sums, wrong):
    assert outvoted(sums) == wrong


def test_a_second_ctrl_c_is_obeyed_at_once_and_a_second_sigterm_is_not():
    with pristine_train():
        stop = StopSignal(Ranks())
        assert stop.agreed() == 0
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            assert stop.received == number
            assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
        assert stop.agreed() == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.received, stop.agreed()) == (signal.SIGINT, signal.SIGUSR1)  # the ranks have agreed before
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_a_signal_that_nohup_ignores_stays_ignored():
    with pristine_train():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = StopSignal(Ranks())
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.agreed() == 0


@pytest.mark.parametrize(
    ("received", "restarts", "rank", "parent", "told"),
    [
        ([0, 0, 0, 15], "2", 3, None, True),  # two nodes of two ranks
        ([0, 0, 10, 15], "2", 3, None, False),  # the other rank of this node does it
        ([10, 10, 0, 15], "2", 3, None, True),
        ([0, 0, 15, 15], "2", 2, None, False),  # from torchrun
        ([0, 0, 10, 10], "2", 2, None, True),  # not from torchrun
        ([0, 0, 10, 10], "2", 3, None, False),
        ([0, 15, 0, 0], "2", 3, None, False),  # on another node
        ([0, 0, 0, 15], "0", 3, None, False),
        ([0, 0, 0, 15], "2", 3, 1, False),  # torchrun has died, and init is the parent
    ],
)
def test_one_rank_of_a_node_keeps_torchrun_from_restarting(monkeypatch, received, restarts, rank, parent, told):
    sent = []
    monkeypatch.setattr(os, "kill", lambda *args: sent.append(args))
    monkeypatch.setattr(Ranks, "total", lambda self, values: [float(number) for number in received])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    with pristine_train():
        stop = StopSignal(Ranks(rank, rank % 2, 4))
    stop.received = received[rank]
    monkeypatch.setattr(os, "getppid", lambda: parent or stop.parent)
    stop.tell_torchrun()
    assert sent == ([(stop.parent, signal.SIGTERM)] if told else [])


STEP = "iteration 7"


@pytest.mark.parametrize(
    ("before", "now", "ranks"),
    [
        ([[5, 3, STEP], [5, 3, STEP]], [[5, 6, STEP], [5, 3, STEP]], [1]),  # rank 1 is frozen
        ([[5, 3, STEP], None], [[5, 6, STEP], None], [1]),  # since its start
        ([[5, 3, STEP], [4, 4, STEP], [5, 3, STEP]], [[5, 6, STEP], [4, 7, STEP], [5, 6, STEP]], [1]),  # it hangs
        ([[5, 3, STEP], [4, 4, STEP]], [[5, 6, STEP], [4, 1, STEP]], []),  # behind, but it goes on
        ([[5, 3, STEP], [5, 3, STEP]], [[5, 6, STEP], [5, 6, STEP]], []),  # all are busy
        ([[5, 3, STEP], [4, 4, "the start"]], [[5, 6, STEP], [4, 7, "the start"]], []),  # it compiles
    ],
)
def test_stalled_ranks_are_silent_or_behind(before, now, ranks):
    assert stalled(before, now, 5) == ranks


# ---------------------------------------------------------------------------------------------------------------------
# torchrun, with restarts

ENDLESS = {**SETTINGS, "max_iters": 10**6, "lr_decay_iters": 10**6, "dense_start": 10**6, "eval_interval": 0}


def strike(data, out, number, victim, rows=3, max_restarts=2, **changes):
    """(process, output) of torchrun after a signal to one of its two ranks, when `rows` lines of metrics are there."""
    process = start(out, {**ENDLESS, "dataset": data, **changes}, ranks=2, max_restarts=max_restarts)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (rows <= rows_written(out)):
        time.sleep(0.05)
    os.kill(children_of(process)[victim], number)
    return finish(process)


def rows_written(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else -1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "victim"), [("SIGUSR1", 1), ("SIGTERM", 0)])
def test_a_signal_to_one_rank_stops_the_run_and_torchrun_does_not_restart_it(data, tmp_path, monkeypatch, name, victim):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    done = strike(data, tmp_path / "out", getattr(signal, name), victim)
    assert done.returncode == 1
    assert done.stdout.count("init scratch") == done.stdout.count("run the same command again") == 1
    assert "resuming" not in done.stdout
    assert rows_written(tmp_path / "out") == read_state(tmp_path / "out")["iter_num"] >= 3


@pytest.mark.slow
def test_a_signal_in_an_evaluation_of_shards_stops_all_ranks(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    changes = {"parallel": "fsdp", "eval_interval": 1, "eval_iters": 10**7}
    done = strike(data, tmp_path / "out", signal.SIGTERM, 1, 0, **changes)
    assert done.stdout.count("stopped after iteration 0, saved in") == done.stdout.count("init scratch") == 1
    assert read_state(tmp_path / "out")["iter_num"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_rank_ends_the_run_with_one_line_that_names_it(data, tmp_path, monkeypatch, victim):
    """Rank 0 holds torch's store. torchrun waits 30 s for the frozen rank, unless --shutdown-timeout is shorter."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    done = strike(data, tmp_path / "out", signal.SIGSTOP, victim, max_restarts=0, rank_timeout=5)
    assert done.returncode == 1
    place = r"(iteration \d+|its last answer|the start)"
    said = (
        rf"^train\.py: error: rank {victim} did not go on from {place} for 5 s, so rank {1 - victim} stopped waiting; "
    )
    assert len(re.findall(said, done.stderr, re.M)) == 1
    assert "[rank" not in done.stderr  # no traceback
