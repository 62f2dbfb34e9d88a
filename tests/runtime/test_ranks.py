"""runtime/ranks.py: two ranks train as one process does, and a rank that differs ends the run; stop signals."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from harness import (
    ROOT,
    SETTINGS,
    Crew,
    _run_as_rank,
    differences,
    free_port,
    launch,
    pristine_train,
    read_rows,
    read_state,
    rows_written,
    run_here,
    strike,
)

import train
from configurator import setting_names
from model import GPT, GPTConfig
from runtime import setup
from runtime.ranks import (
    Ranks,
    StopSignal,
    _hash_of_bits,
    disagreement,
    fingerprint,
    outvoted,
    source_hash,
    start_ranks,
)
from sparse24 import sparse_linears

STEPS = 6
EXACT = {"max_iters": STEPS, "mask_interval": STEPS + 1, "mvue": False, "eval_interval": 3, "eval_iters": 3}
EXACT |= {"gradient_accumulation_steps": 5}  # two ranks, and three, have shares of different sizes
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
    """Three ranks share five micro-batches: in the second round, one rank has none."""
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


@pytest.mark.parametrize("name", ["fst", "bi_mask"])
def test_the_fingerprint_depends_on_the_order_of_rows_columns_and_layers(name):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=2, n_head=2, n_embd=8, bias=True, sparse=name))
    one, two = (block.mlp.c_fc for block in model.transformer.h)
    if name == "bi_mask":  # every permutation has the same sum
        one.permutation.copy_(torch.arange(len(one.permutation)).flip(0))
    pairs = [(one.weight[0], one.weight[1]), (one.weight[0, :1], one.weight[0, 1:2]), (one.weight, two.weight)]
    pairs += [(one.index, two.index), (one.index[0], one.index[1]), (one.index[0, :1], one.index[0, 1:2])]
    pairs += [(a, b) for (key, a), b in zip(one.named_buffers(), two.buffers(), strict=True) if key == "permutation"]
    with torch.no_grad():
        one.index.copy_(torch.randperm(one.index.numel()).view_as(one.index))
        before = fingerprint(model)
        assert fingerprint(model) == before
        for a, b in pairs:
            assert not torch.equal(a, b)
            for swapped in (True, False):
                a_before = a.clone()
                a.copy_(b)
                b.copy_(a_before)
                assert (fingerprint(model) != before) == swapped


def test_a_large_matrix_is_hashed_in_parts_and_empty_shards_and_scalars_too(monkeypatch):
    big = torch.arange(3 * 2**20).view(3, 2**20)
    rows = [_hash_of_bits([big[[i, j, k]]]) for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0))]
    assert len({*rows}) == 4
    assert _hash_of_bits([]) == _hash_of_bits([torch.empty(0, 4), torch.empty(0)]) == 0
    assert _hash_of_bits([torch.tensor(2.0)]) != _hash_of_bits([torch.tensor(3.0)])


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
    tensors = [tensor for name, tensor in model.state_dict().items() if not name.endswith("_extra_state")]
    assert len(tensors) == 16 + 1 + 2 * len(buffers or "12")  # one weight is tied
    for tensor in tensors:
        bits = tensor.view(-1).view(torch.uint8)
        for place in (0, -1):
            bits[place] ^= 1
            with pytest.raises(RuntimeError, match=r"weights or masks of ranks \[0, 1\] differ"):
                ranks.check_equal(model)
            bits[place] ^= 1
    for layer in sparse_linears(model):  # seeds differ between ranks, and packed operands are copies of the weights
        layer.seed.add_(1)
        layer.packed += 1
    ranks.check_equal(model)


@pytest.fixture
def two_ranks(monkeypatch):
    """two_ranks(change): train.py takes itself for rank 1 of 2, whose rank 0 has the same facts after `change`."""

    def two_ranks(change):
        def gather(everyone, facts, group):
            everyone[:] = [change(facts), facts]

        monkeypatch.setattr(setup, "start_ranks", lambda *_: Ranks(1, 1, 2))
        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)

    return two_ranks


def test_fewer_micro_batches_than_ranks_are_refused(refused, two_ranks, tmp_path):
    two_ranks(lambda facts: facts)
    said = refused(tmp_path / "out", gradient_accumulation_steps=1)
    assert "gradient_accumulation_steps=1, need at least the number of ranks, 2" in said


@pytest.mark.parametrize(
    ("change", "named"),
    [
        *[
            ({key: 7}, rf"{key}=.* \(on rank 0 7\)")
            for key in ("seed", "max_iters", "out_dir", "compile", "allow_other_data")
        ],
        ({"val_checksum": "0badf00d"}, r"val_checksum='\w{8}' \(on rank 0 '0badf00d'\)"),
        ({"chars": "xyz"}, r"chars=' !.*' \(on rank 0 'xyz'\)"),
        ({"source": "1234"}, r"source='\w{12}' \(on rank 0 '1234'\)"),
        ({"torch": "1.0"}, r"torch='2.*' \(on rank 0 '1.0'\)"),
        ({"checkpoint": None}, r"checkpoint=\('.*ckpt.pt', 10, [\d.]+\) \(on rank 0 None\)"),
        ({"error": "no disk"}, "rank 0 cannot start: no disk"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_rank_that_was_started_differently_is_named(refused, two_ranks, stopped, change, named):
    two_ranks(lambda facts: facts.keys() >= {*setting_names(vars(train))} and facts | change)
    assert re.search(named, refused(stopped))


@pytest.mark.parametrize(
    ("everyone", "message"),
    [
        ([{"seed": 1}] * 3, ""),
        ([{"seed": 1}, {"seed": 1}, {"seed": 2}], r"rank 2 has seed=2 \(on rank 0 1\); start all ranks alike"),
        ([{"seed": 1, "t": "a"}, {"seed": 2, "t": "b"}], r"rank 1 has seed=2 .on rank 0 1., t='b' .on rank 0 'a'.;"),
        ([{"seed": 1}, {"error": "no disk"}, {"seed": 2}], "^rank 1 cannot start: no disk$"),
        ([{"error": "no disk"}, {"seed": 1}], "^rank 0 cannot start: no disk$"),
    ],
)
def test_the_first_rank_that_differs_is_named(everyone, message):
    found = disagreement(everyone)
    assert re.search(message, found)
    assert bool(message) == bool(found)


def test_the_hash_of_the_source_depends_on_every_file_of_a_run(monkeypatch, tmp_path):
    seen = {source_hash()}
    monkeypatch.setattr(sys.modules[source_hash.__module__], "__file__", str(tmp_path / "runtime" / "ranks.py"))
    for name in ("train.py", "gemm24/plan.py", "methods/mine.py", "runtime/ranks.py", "train.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with open(tmp_path / name, "a") as file:
            file.write("pass\n")
        seen.add(source_hash())
    (tmp_path / ".#train.py").symlink_to("nobody@nowhere")  # Emacs' lock
    (tmp_path / "notes.py").mkdir()
    seen.add(source_hash())
    assert len(seen) == 6


@pytest.mark.slow
def test_ranks_that_differ_all_end_with_one_line(data, tmp_path):
    """Real ranks, which would hang or train together."""
    other = shutil.copytree(data, tmp_path / "other")
    tokens = np.fromfile(other / "val.bin", dtype="<u2")
    tokens[::-1].tofile(other / "val.bin")
    differing = {
        "max_iters": 8, "eval_interval": 3, "checkpoint_interval": 3, "gradient_accumulation_steps": 1, "seed": 2,
        "parallel": "fsdp", "out_dir": tmp_path / "elsewhere", "init_from": "resume", "eval_only": True,
        "compile": True, "dataset": other, "block_size": 16, "sparse": "none", "n_head": 5, "learning_rate": -1.0,
    }  # fmt: skip
    with Crew(2) as crew:
        for name, value in differing.items():
            settings = {**SETTINGS, "dataset": data, "max_iters": 4, "out_dir": tmp_path / "out"}
            port, both = free_port(), (settings, {**settings, name: value})
            work = [(rank, 2, port, of_rank.pop("out_dir"), of_rank, None) for rank, of_rank in enumerate(both)]
            for rank, done in crew.pool.map_async(_run_as_rank, work, chunksize=1).get(timeout=60):
                assert done.returncode == 1
                assert re.fullmatch(r"train\.py: error: [^\n]+\n", done.stderr), (rank, done.stderr)
                assert name in done.stderr or (name, rank) == ("n_head", 0)
            assert [path.name for path in tmp_path.iterdir()] == ["other"]
        done = crew.run(tmp_path / "out", {**SETTINGS, "dataset": data, "max_iters": 1})
        assert done.returncode == 0, done.stderr


def test_a_world_of_one_agrees_with_itself():
    ranks = Ranks()
    assert ranks.master
    assert (ranks.maximum(3), ranks.total([1.5, 2.0]), ranks.decide("x")) == (3, [1.5, 2.0], "x")
    ranks.check_equal(torch.nn.Linear(2, 2))
    ranks.leave()


TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def torchrun(monkeypatch):
    """torchrun(RANK="1", ...): torchrun's environment with these changes; None is not set."""

    def torchrun(**changes):
        for name, value in (TORCHRUN | changes).items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)

    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("waited for other ranks"))
    return torchrun


@pytest.mark.parametrize(
    "changes",
    [
        *({name: None} for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")),
        *({"RANK": rank} for rank in ("zero", "", "2", "-1")),
        *({"RANK": None, "LOCAL_RANK": local_rank} for local_rank in (None, "-1")),
        *({"WORLD_SIZE": "2.0"}, {"LOCAL_RANK": "5"}),
    ],
    ids=str,
)
def test_an_environment_that_is_not_torchruns_is_refused(torchrun, changes):
    torchrun(**changes)
    values = {name: TORCHRUN[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    values |= {name: "not set" if value is None else value for name, value in changes.items()}
    with pytest.raises(ValueError, match="which torchrun does not set; start train") as refusal:
        start_ranks("cpu")
    assert all(f"{name}={value}" in str(refusal.value) for name, value in values.items())


@pytest.mark.parametrize("world_size", [None, "1"])
@pytest.mark.parametrize("rank", [None, "-1"])
def test_without_ranks_in_the_environment_a_run_is_alone(torchrun, world_size, rank):
    torchrun(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, MASTER_PORT=None)
    assert start_ranks("cpu") == Ranks()


def test_more_ranks_than_gpus_are_refused(torchrun, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    torchrun(LOCAL_RANK="1", RANK="1")
    for device in ("cuda", "auto"):
        with pytest.raises(ValueError, match=r"^LOCAL_RANK=1 needs 2 GPUs; use --nproc_per_node=1$"):
            start_ranks(device)


@pytest.mark.parametrize(("restarts", "switch"), [("3", None), ("1", "0"), ("1", "true"), ("3", "1"), ("0", None)])
def test_restarts_by_torchrun_need_ranks_that_can_reconnect(torchrun, monkeypatch, restarts, switch):
    torchrun(TORCHELASTIC_MAX_RESTARTS=restarts, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=switch)
    refusal = f"^--max_restarts={restarts} needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's .* do not reconnect"
    if switch != "1" and restarts != "0":
        with pytest.raises(ValueError, match=refusal):
            start_ranks("cpu")
    else:
        with pytest.raises(pytest.fail.Exception, match="waited for other ranks"):
            start_ranks("cpu")


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
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        stop = StopSignal(Ranks())
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.agreed() == 0
        os.kill(os.getpid(), signal.SIGINT)  # shells ignore it for a command that ends in &
        assert stop.agreed() == signal.SIGINT


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


# ---------------------------------------------------------------------------------------------------------------------
# torchrun, with restarts


@pytest.mark.slow
@pytest.mark.parametrize(("name", "victim"), [("SIGUSR1", 1), ("SIGTERM", 0)])
def test_a_signal_to_one_rank_stops_the_run_and_torchrun_does_not_restart_it(data, tmp_path, name, victim):
    done = strike(data, tmp_path / "out", getattr(signal, name), victim)
    assert done.returncode == 1
    assert done.stdout.count("init scratch") == done.stdout.count("run the same command again") == 1
    assert "resuming" not in done.stdout
    assert rows_written(tmp_path / "out") == read_state(tmp_path / "out")["iter_num"] >= 3


@pytest.mark.slow
def test_a_signal_in_an_evaluation_of_shards_stops_all_ranks(data, tmp_path):
    changes = {"parallel": "fsdp", "eval_interval": 1, "eval_iters": 10**7}
    done = strike(data, tmp_path / "out", signal.SIGTERM, 1, 0, **changes)
    assert done.stdout.count("stopped after iteration 0, saved in") == done.stdout.count("init scratch") == 1
    assert read_state(tmp_path / "out")["iter_num"] == 0
