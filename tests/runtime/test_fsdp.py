"""runtime/fsdp.py: FSDP trains as one process does, and writes the same checkpoint, for any number of ranks."""

import contextlib
import functools
import shutil
from types import SimpleNamespace

import pytest
import shard_ranks
import torch
from harness import SETTINGS, Crew, differences, free_port, leaves, read_rows, read_state, run_here
from shard_ranks import HASH

import sparse24
from model import GPT, GPTConfig
from runtime import checkpoint
from runtime.fsdp import shard_like, shard_model
from runtime.ranks import Ranks
from sparse24 import sparse_linears, transposable_index

# Refreshes after steps 3 and 6, dense from 9. Four ranks share the six micro-batches unevenly.
RUN = {"max_iters": 12, "dense_start": 9, "mask_interval": 3, "flip_interval": 2, "eval_interval": 5, "dropout": 0.0}
RUN |= {"gradient_accumulation_steps": 6, "batch_size": 2, "checkpoint_interval": 100, "mvue": False}
DOUBLE = {"kind": "double"}
slow = pytest.mark.slow
compiles_float64 = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 miscompiles the backward of float64 flash attention on CPUs"
)


@pytest.fixture(scope="module")
def train_on(data):
    """train_on(ranks, out_dir, fault, **changes): a run of RUN that must succeed. Returns its output."""
    with contextlib.ExitStack() as crews:
        crew = functools.cache(lambda ranks: crews.enter_context(Crew(ranks)))

        def train(ranks, out, fault=None, **changes):
            run = crew(ranks).run if ranks > 1 else run_here
            done = run(out, {**SETTINGS, **RUN, "dataset": data, **changes}, fault)
            if done.returncode:
                crew.cache_clear()  # an error ends a crew, and the next test needs another one
            assert done.returncode == 0, done.stderr
            return done.stdout

        yield train


@pytest.fixture(scope="module")
def run(train_on, tmp_path_factory):
    """run(ranks, **changes): the folder of a float64 run. Each run is made once."""

    @functools.cache
    def make(ranks: int, **changes):
        out = tmp_path_factory.mktemp("run") / "out"
        train_on(ranks, out, DOUBLE, **changes)
        return out

    return make


def assert_close_states(one, other, atol):
    """Two checkpoints have the same form and masks. Their weights and moments differ by `atol` at most."""
    tensors = [{path: v for path, v in leaves(state).items() if isinstance(v, tuple)} for state in (one, other)]
    forms = [{path: leaf[:2] for path, leaf in found.items()} for found in tensors]
    assert forms[0] == forms[1]
    assert differences(one["optimizer"]["param_groups"], other["optimizer"]["param_groups"]) == []
    for name, tensor in one["model"].items():
        if torch.is_tensor(tensor):
            tolerance = atol if tensor.is_floating_point() else 0
            torch.testing.assert_close(other["model"][name], tensor, rtol=0, atol=tolerance, msg=name)
        else:
            assert other["model"][name] == tensor
    for k, moments in one["optimizer"]["state"].items():
        torch.testing.assert_close(other["optimizer"]["state"][k], moments, rtol=0, atol=atol)


def assert_same_training(one, other):
    """Two float64 runs agree to 1e-9 in their checkpoints and in the metrics of every step, and have the same masks."""
    state = read_state(one)
    assert state["model"]["transformer.wte.weight"].dtype == torch.float64
    assert sum(name.endswith("index") for name in state["model"]) == 4
    assert_close_states(state, read_state(other), 1e-9)
    rows, other_rows = read_rows(one), read_rows(other)
    assert any(row["flip_rate"] for row in rows)
    assert {row["phase"] for row in rows} == {"sparse", "dense"}
    for a, b in zip(rows, other_rows, strict=True):
        for key in ("phase", "train_loss", "val_loss", "val_loss_24", "grad_norm", "flip_rate", "decay_ratio"):
            tolerance = 1e-6 if key == "decay_ratio" else 1e-9  # decay_ratio is computed in float32
            expected = pytest.approx(a[key], rel=tolerance) if isinstance(a[key], float) else a[key]
            assert b[key] == expected, (a["iter"], key)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {}),
        pytest.param(4, {}, marks=slow),
        pytest.param(4, {"fsdp_copies": 2}, marks=slow),
        pytest.param(2, {"spmm": "masked"}, marks=slow),
        pytest.param(2, {"compile": True}, marks=[slow, compiles_float64]),
    ],
    ids=str,
)
def test_shards_train_as_one_process_does(run, ranks, changes):
    assert_same_training(run(1), run(ranks, parallel="fsdp", **changes))


@slow
@pytest.mark.parametrize(
    ("begun", "ended"), [("fsdp4", "fsdp2"), ("fsdp4", "ddp2"), ("fsdp4", "ddp1"), ("ddp1", "fsdp4"), ("ddp2", "fsdp2")]
)
def test_a_run_is_resumed_on_other_ranks_with_or_without_shards(run, train_on, tmp_path, begun, ended):
    out = shutil.copytree(run(int(begun[-1]), parallel=begun[:-1], max_iters=6), tmp_path / "out")
    assert {path.name for path in out.glob("ckpt*")} == {"ckpt.pt", "ckpt_prev.pt"}
    printed = train_on(int(ended[-1]), out, DOUBLE, parallel=ended[:-1])
    assert f"resuming {out / 'ckpt.pt'} at iteration 6" in printed
    assert_same_training(run(1), out)


@slow
@pytest.mark.parametrize(
    "changes",
    [
        {"sparse": "sr_ste"},
        {"sparse": "step", "dense_pretrain": 0.25},
        {"sparse": "bi_mask"},
        {"sparse": "s_ste", "mask_interval": 1},
    ],
    ids=str,
)
def test_every_recipe_trains_in_shards(run, changes):
    changes = {"masked_decay": 2e-3, "dense_start": -1, "dense_finetune": 0.25, "mask_interval": 3, **changes}
    assert_same_training(run(1, **changes), run(2, parallel="fsdp", **changes))


ACT24 = {"activation": "relu2", "learning_rate": 3e-2, "masked_decay": 0.0, "dense_pretrain": 0.25, "max_iters": 13}
ACT24 |= {"dense_start": -1, "dense_finetune": 0.0, "mask_interval": 1, "mvue": True}
ACT24 |= {"gradient_accumulation_steps": 3, "checkpoint_interval": 1, "keep_every": 5}


def joined(state) -> list[bool]:
    """Which layers have joined, in a checkpoint."""
    return [bool(v[1]) for k, v in state["model"].items() if k.endswith("c_proj._extra_state") and v.numel() > 1]


@slow
@pytest.mark.parametrize("name", ["act24", "act24_soft"])
def test_act24_takes_the_same_decisions_on_any_ranks(train_on, tmp_path, name):
    """Two ranks share three micro-batches. Only rank 0 counts, also in the dense start and before the last save."""

    def train(kind, out):
        train_on(int(kind[-1]), out, {"kind": "decide_often"}, sparse=name, parallel=kind[:-1], **ACT24)
        return [read_state(out, file) for file in ("ckpt_00000010.pt", "ckpt.pt")]

    expected = train("ddp1", tmp_path / "ddp1")
    assert any(joined(expected[0]))
    for begun, ended in (("", "ddp2"), ("", "fsdp2"), ("ddp2", "ddp1"), ("ddp1", "fsdp2")):
        out = tmp_path / (begun + ended)
        if begun:
            out.mkdir()
            shutil.copy(tmp_path / begun / "ckpt_00000005.pt", out / "ckpt.pt")
        for got, state in zip(train(ended, out), expected, strict=True):
            assert joined(got) == joined(state)
            assert_close_states(state, got, 1e-9)


def test_draws_do_not_depend_on_shards(run):
    """MVUE draws depend on step, micro-batch, layer and position. Rounding can still change a draw, later in a run."""
    changes = {"mvue": True, "max_iters": 3, "dense_start": 3}
    ddp, fsdp = (read_rows(run(2, parallel=parallel, **changes)) for parallel in ("ddp", "fsdp"))
    for a, b in zip(ddp[:3], fsdp[:3], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-6)
    assert ddp[0]["grad_norm"] == pytest.approx(fsdp[0]["grad_norm"], rel=1e-9)
    assert ddp[0]["grad_norm"] != pytest.approx(read_rows(run(1))[0]["grad_norm"], rel=1e-3)  # MVUE had an effect


def test_every_block_and_the_head_are_compiled(data, tmp_path, monkeypatch):
    compiled, settings = [], {**SETTINGS, **RUN, "dataset": data, "parallel": "fsdp", "compile": True, "max_iters": 1}
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled.append((call, options)) or call)
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    assert run_here(tmp_path / "out", settings).returncode == 0
    assert [call.__name__ for call, _ in compiled] == ["_call_impl"] * SETTINGS["n_layer"] + ["head"]
    model = compiled[-1][0].__self__
    assert [call.__self__ for call, _ in compiled[:-1]] == [*model.transformer.h]
    assert all(options == {"mode": "default"} for _, options in compiled)
    assert all(layer.prune_again for layer in sparse_linears(model))
    assert all(sparse24.is_dtensor(p) for p in model.parameters())


@slow
def test_bfloat16_shards_follow_bfloat16_replicas(train_on, tmp_path):
    losses = {}
    for parallel in ("ddp", "fsdp"):
        train_on(2, tmp_path / parallel, dtype="bfloat16", parallel=parallel)
        losses[parallel] = [row["train_loss"] for row in read_rows(tmp_path / parallel) if row["train_loss"]]
        assert read_state(tmp_path / parallel)["model"]["transformer.wte.weight"].dtype == torch.float32
    assert losses["fsdp"] == pytest.approx(losses["ddp"], abs=0.01)


@pytest.mark.parametrize(
    ("n_embd", "copies", "message"),
    [
        (24, 1, "24 rows of a sparse layer cannot be sharded over 4 ranks by fours; set fsdp_copies to one of 4, 2"),
        (32, 3, "fsdp_copies=3, need a divisor of the number of ranks, 4"),
    ],
)
def test_ranks_that_do_not_divide_the_rows_are_refused(n_embd, copies, message):
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=n_embd, sparse="fst"))
    weights = [*model.parameters()]
    with pytest.raises(ValueError, match=message):
        shard_model(model, model.transformer.h, Ranks(0, 0, 4), torch.device("cpu"), copies, torch.float32, None)
    assert all(p is w for p, w in zip(model.parameters(), weights, strict=True))


@slow
def test_dense_runs_of_any_width_are_measured_alike(run):
    """Shards of 6 rows cut through 4x4 blocks, so flips are counted on full weights."""
    changes = {"sparse": "none", "n_embd": 24, "max_iters": 5, "masked_decay": 0.0}
    one, four = read_rows(run(1, **changes)), read_rows(run(4, parallel="fsdp", **changes))
    assert any(row["flip_rate"] for row in one)
    for a, b in zip(one, four, strict=True):
        for key in ("flip_rate", "train_loss", "val_loss_24"):
            assert b[key] == (pytest.approx(a[key], rel=1e-9) if a[key] else a[key]), (a["iter"], key)


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint


@pytest.fixture(scope="module")
def tasks_done(tmp_path_factory):
    """The folder in which two ranks saved and resumed."""
    folder = tmp_path_factory.mktemp("tasks")
    shard_ranks.start(2, folder, "save", "resume")
    return folder


def seen(folder, ranks=2):
    return [torch.load(folder / f"seen_{rank}.pt", weights_only=True) for rank in range(ranks)]


def test_shards_are_saved_as_one_process_saves(tasks_done):
    """The weights change while the thread writes the file, which must not show."""
    folder = tasks_done / "save2"
    assert {path.name for path in folder.glob("*.pt")} == {"ckpt.pt", "seen_0.pt", "seen_1.pt"}
    state, expected = checkpoint.load(folder / "ckpt.pt", HASH), shard_ranks.state_of(*shard_ranks.make(None))
    assert_close_states(expected, state, 1e-5)  # two ranks sum gradients in another order
    assert list(state["model"]) == list(expected["model"])
    assert state["model"]._metadata == expected["model"]._metadata
    assert state["model"]["wte.weight"].data_ptr() == state["model"]["head.weight"].data_ptr()


def test_one_gathered_tensor_is_in_memory_at_a_time_and_rank_1_keeps_none(tasks_done):
    """15 = five weights with two moments each. Rank 0 also copies five step counts and the index."""
    first, second = seen(tasks_done / "save2")
    assert first == {"gathered": 15, "most": 1, "alive": 0, "copies": 21}
    assert second == {"gathered": 15, "most": 1, "alive": 0, "copies": 0}


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=slow)])
def test_every_rank_copies_its_rows_and_trains_on(tasks_done, ranks):
    if ranks != 2:
        shard_ranks.start(ranks, tasks_done, "resume")
    saved = checkpoint.load(tasks_done / "save2" / "ckpt.pt", HASH)["model"]
    expected = dict(shard_ranks.make(None, steps=4)[0].named_parameters())
    for rank, result in enumerate(seen(tasks_done / f"resume{ranks}", ranks)):
        for name, shard in result["shards"].items():
            chunks = [*saved[name].chunk(ranks), *[saved[name][:0]] * ranks]
            assert differences(shard, chunks[rank]) == []
        assert (result["extra"], result["index"].tolist()) == ({"sparse": True}, [*range(6)])
        torch.testing.assert_close(result["after"], expected, rtol=0, atol=1e-5)
        assert result["mapped"] == [True, False]  # after loading, the file is not mapped any more
    assert (expected["wte.weight"] - saved["wte.weight"]).abs().max() > 0.01


def test_a_shape_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"full has shape \(7, 4\), need the target's, \(4, 7\)"):
        shard_like(torch.zeros(7, 4), torch.zeros(4, 7))


# ---------------------------------------------------------------------------------------------------------------------
# Rows on ranks


def shard_of(w: torch.Tensor, ranks: int, rank: int):
    """A stand-in for a DTensor without a process group."""
    shards = [*w.chunk(ranks), *[w[:0]] * ranks]
    mesh = SimpleNamespace(ndim=1, size=lambda dim: ranks, get_local_rank=lambda dim: rank)
    return SimpleNamespace(placements=(), device_mesh=mesh, shape=w.shape, to_local=lambda: shards[rank])


@pytest.mark.parametrize("ranks", range(1, 10))
@pytest.mark.parametrize("rows", [*range(1, 7), 8, 12, 16, 24, 36, 40])
def test_rows_and_their_masks_are_cut_as_torch_cuts_them(rows, ranks):
    w = torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))
    shards = [shard_of(w, ranks, rank) for rank in range(ranks)]
    counts, mask = [len(shard.to_local()) for shard in shards], w > 0
    assert sparse24.cut(rows, ranks) == counts
    for shard in shards:
        assert torch.equal(sparse24.rows_of(shard, mask), shard.to_local() > 0)
    if rows % 4 == 0:
        assert sparse24.fits(rows, ranks) == all(count % 4 == 0 for count in counts)
        index = transposable_index(w)
        for shard in shards if sparse24.fits(rows, ranks) else ():
            assert torch.equal(sparse24.rows_of(shard, index), transposable_index(shard.to_local()))
        assert sparse24.rows_of(w, index) is index
