"""FSDP2 trains as DDP does, with weights in shards, and writes the same checkpoint, for any number of ranks."""

import contextlib
import functools
import shutil
from types import SimpleNamespace

import pytest
import shard_ranks
import torch
from harness import SETTINGS, Crew, differences, free_port, leaves, make_dataset, read_rows, read_state, run_here
from shard_ranks import HASH

import sparse24
from model import GPT, GPTConfig
from runtime import checkpoint
from runtime.fsdp import shard_like, shard_model
from runtime.ranks import Ranks
from sparse24 import sparse_linears, transposable_index

# Refreshes after steps 3 and 6, dense from 9; six micro-batches, which 4 ranks share unevenly.
RUN = {"max_iters": 12, "dense_start": 9, "mask_interval": 3, "flip_interval": 2, "eval_interval": 5, "dropout": 0.0}
RUN |= {"gradient_accumulation_steps": 6, "batch_size": 2, "checkpoint_interval": 100, "mvue": False}
DOUBLE = {"kind": "double"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def train_on(data):
    """train_on(ranks, out_dir, fault, **changes): a run of RUN, which must succeed; returns what it printed."""
    with contextlib.ExitStack() as crews:
        crew = functools.cache(lambda ranks: crews.enter_context(Crew(ranks)))

        def train(ranks, out, fault=None, **changes):
            run = crew(ranks).run if ranks > 1 else run_here
            done = run(out, {**SETTINGS, **RUN, "dataset": data, **changes}, fault)
            if done.returncode:
                crew.cache_clear()  # a crew is gone after an error: the next test needs another
            assert done.returncode == 0, done.stderr
            return done.stdout

        yield train


@pytest.fixture(scope="module")
def run(train_on, tmp_path_factory):
    """Call it with settings and ranks: the folder of a float64 run, each made once."""
    made = {}

    def make(ranks: int, **changes):
        key = (ranks, *sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run") / "out"
            train_on(ranks, made[key], DOUBLE, **changes)
        return made[key]

    return make


def assert_close_states(one, other, close):
    """Two checkpoints have the same form; their weights and moments are as close as said, and masks are equal."""
    tensors = [{path: v for path, v in leaves(state).items() if isinstance(v, tuple)} for state in (one, other)]
    forms = [{path: leaf[:2] for path, leaf in found.items()} for found in tensors]
    assert forms[0] == forms[1]
    assert differences(one["optimizer"]["param_groups"], other["optimizer"]["param_groups"]) == []
    for name, tensor in one["model"].items():
        if torch.is_tensor(tensor):
            close_to = close if tensor.is_floating_point() else 0
            torch.testing.assert_close(other["model"][name], tensor, rtol=0, atol=close_to, msg=name)
        else:
            assert other["model"][name] == tensor
    for k, moments in one["optimizer"]["state"].items():
        torch.testing.assert_close(other["optimizer"]["state"][k], moments, rtol=0, atol=close)


def assert_same_training(one, other):
    """Checkpoints of float64 runs within 1e-9, masks exactly, and the metrics of every step."""
    state = read_state(one)
    assert state["model"]["transformer.wte.weight"].dtype == torch.float64
    assert sum(name.endswith("index") for name in state["model"]) == 4
    assert_close_states(state, read_state(other), 1e-9)
    rows, other_rows = read_rows(one), read_rows(other)
    assert any(row["flip_rate"] for row in rows)
    assert {row["phase"] for row in rows} == {"sparse", "dense"}
    for a, b in zip(rows, other_rows, strict=True):
        for key in ("phase", "train_loss", "val_loss", "val_loss_24", "grad_norm", "flip_rate", "decay_ratio"):
            close = 1e-6 if key == "decay_ratio" else 1e-9  # which is taken in float32
            expected = pytest.approx(a[key], rel=close) if isinstance(a[key], float) else a[key]
            assert b[key] == expected, (a["iter"], key)


@pytest.mark.parametrize(
    ("ranks", "copies"),
    [(2, 1), pytest.param(4, 1, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_shards_train_as_copies_do(run, ranks, copies):
    """Through two refreshes and the dense switch; four ranks also share six micro-batches."""
    assert_same_training(run(2), run(ranks, parallel="fsdp", fsdp_copies=copies))


def test_two_copies_train_as_one_process_does(run):
    assert_same_training(run(1), run(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begun", "ended"), [("fsdp4", "fsdp2"), ("fsdp4", "ddp2"), ("fsdp4", "ddp1"), ("ddp1", "fsdp4"), ("ddp2", "fsdp2")]
)
def test_a_run_is_resumed_on_other_ranks_with_or_without_shards(run, train_on, tmp_path, begun, ended):
    out = shutil.copytree(run(int(begun[-1]), parallel=begun[:-1], max_iters=6), tmp_path / "out")
    assert {path.name for path in out.glob("ckpt*")} == {"ckpt.pt", "ckpt_prev.pt"}
    printed = train_on(int(ended[-1]), out, DOUBLE, parallel=ended[:-1])
    assert f"resuming {out / 'ckpt.pt'} at iteration 6" in printed
    assert_same_training(run(2), out)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sr_ste", "step", "bi_mask", "s_ste"])
def test_every_recipe_trains_in_shards(run, recipe):
    changes = {"sparse": recipe, "masked_decay": 2e-3, "dense_start": -1, "dense_finetune": 0.25, "mask_interval": 3}
    changes |= {"dense_pretrain": 0.25} if recipe == "step" else {}
    changes |= {"mask_interval": 1} if recipe == "s_ste" else {}
    assert_same_training(run(1, **changes), run(2, parallel="fsdp", **changes))


def test_draws_do_not_depend_on_shards(run):
    """MVUE draws are functions of step, micro-batch, layer and place: the gradients are those of DDP to rounding, which
    a draw at the border of two elements could turn over, as it does for another number of ranks too."""
    changes = {"mvue": True, "max_iters": 3, "dense_start": 3}
    ddp, fsdp = (read_rows(run(2, parallel=how, **changes)) for how in ("ddp", "fsdp"))
    for a, b in zip(ddp[:3], fsdp[:3], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-6)
    assert ddp[0]["grad_norm"] == pytest.approx(fsdp[0]["grad_norm"], rel=1e-9)
    assert ddp[0]["grad_norm"] != pytest.approx(read_rows(run(2))[0]["grad_norm"], rel=1e-3)  # MVUE did something


@pytest.mark.slow
def test_fused_feed_forward_layers_train_in_shards(run):
    assert_same_training(run(2), run(2, parallel="fsdp", spmm="masked"))


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="torch up to 2.11 miscompiles the backward of flash attention in float64 on a CPU, which this test needs",
)
def test_blocks_compile_in_shards(run):
    assert_same_training(run(2), run(2, parallel="fsdp", compile=True))


def test_every_block_and_the_head_are_compiled(data, tmp_path, monkeypatch):
    compiled, settings = [], {**SETTINGS, **RUN, "dataset": data, "parallel": "fsdp", "compile": True, "max_iters": 1}
    monkeypatch.setattr(torch, "compile", lambda call, **how: compiled.append((call, how)) or call)
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    assert run_here(tmp_path / "out", settings).returncode == 0
    assert [call.__name__ for call, _ in compiled] == ["_call_impl"] * SETTINGS["n_layer"] + ["head"]
    model = compiled[-1][0].__self__
    assert [call.__self__ for call, _ in compiled[:-1]] == [*model.transformer.h]
    assert all(how == {"mode": "default"} for _, how in compiled)
    assert all(layer.prune_again for layer in sparse_linears(model))
    assert all(sparse24.is_dtensor(p) for p in model.parameters())


@pytest.mark.slow
def test_bfloat16_shards_follow_bfloat16_copies(train_on, tmp_path):
    rows = {}
    for how in ("ddp", "fsdp"):
        train_on(2, tmp_path / how, dtype="bfloat16", parallel=how)
        rows[how] = [row["train_loss"] for row in read_rows(tmp_path / how) if row["train_loss"]]
        assert read_state(tmp_path / how)["model"]["transformer.wte.weight"].dtype == torch.float32
    assert rows["fsdp"] == pytest.approx(rows["ddp"], abs=0.01)


@pytest.mark.parametrize(
    ("n_embd", "copies", "message"),
    [
        (24, 1, "24 rows of a sparse layer do not lie on 4 ranks by fours; set fsdp_copies to one of 4, 2"),
        (32, 3, "fsdp_copies=3, need a divisor of the number of ranks, 4"),
    ],
)
def test_ranks_that_rows_do_not_lie_on_are_refused(n_embd, copies, message):
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=n_embd, sparse="fst"))
    weights = [*model.parameters()]
    with pytest.raises(ValueError, match=message):
        shard_model(model, model.transformer.h, Ranks(0, 0, 4), torch.device("cpu"), copies, torch.float32, None)
    assert all(p is w for p, w in zip(model.parameters(), weights, strict=True))


@pytest.mark.slow
def test_dense_runs_of_any_width_are_measured_alike(run):
    """24 rows on 4 ranks: pieces of 6, which cut through blocks, so that flips are counted on whole weights."""
    changes = {"sparse": "none", "n_embd": 24, "max_iters": 5, "masked_decay": 0.0}
    one, four = read_rows(run(1, **changes)), read_rows(run(4, parallel="fsdp", **changes))
    assert any(row["flip_rate"] for row in one)
    for a, b in zip(one, four, strict=True):
        for key in ("flip_rate", "train_loss", "val_loss_24"):
            assert b[key] == (pytest.approx(a[key], rel=1e-9) if a[key] else a[key]), (a["iter"], key)


def test_copies_without_shards_are_refused(data, tmp_path):
    done = run_here(tmp_path / "out", {**SETTINGS, "dataset": data, "fsdp_copies": 2})
    assert "fsdp_copies=2 is for parallel='fsdp'" in done.stderr


@pytest.mark.parametrize("changes", [{"dtype": "float16"}, {"compile_mode": "reduce-overhead"}])
def test_settings_that_shards_cannot_have(data, tmp_path, changes):
    done = run_here(tmp_path / "out", {**SETTINGS, **changes, "dataset": data, "parallel": "fsdp"})
    assert done.returncode == 1
    assert "parallel='fsdp' needs bfloat16 or float32 and compile_mode='default'" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder in which two ranks did their tasks."""
    folder = tmp_path_factory.mktemp("ran")
    shard_ranks.start(2, folder, "save", "resume")
    return folder


def seen(folder, ranks=2):
    return [torch.load(folder / f"seen_{rank}.pt", weights_only=True) for rank in range(ranks)]


def test_shards_are_saved_as_one_process_saves(ran):
    """And the file does not have what was added to every weight while it was written."""
    assert {path.name for path in (ran / "save2").glob("*.pt")} == {"ckpt.pt", "seen_0.pt", "seen_1.pt"}
    state, expected = checkpoint.load(ran / "save2" / "ckpt.pt", HASH), shard_ranks.state_of(*shard_ranks.make(None))
    assert_close_states(expected, state, 1e-5)  # other numbers of ranks sum gradients in another order
    assert list(state["model"]) == list(expected["model"])
    assert state["model"]._metadata == expected["model"]._metadata
    assert state["model"]["wte.weight"].data_ptr() == state["model"]["head.weight"].data_ptr()


def test_one_gathered_tensor_is_in_memory_at_once_and_rank_1_keeps_nothing(ran):
    """Five weights, of which a tied one is gathered once, with two moments each; rank 0 also copies five steps and the
    index."""
    first, second = seen(ran / "save2")
    assert first == {"gathered": 15, "most": 1, "alive": 0, "copies": 21}
    assert second == {"gathered": 15, "most": 1, "alive": 0, "copies": 0}


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_rank_copies_its_rows_and_trains_on(ran, ranks):
    if ranks != 2:
        shard_ranks.start(ranks, ran, "resume")
    saved = checkpoint.load(ran / "save2" / "ckpt.pt", HASH)["model"]
    expected = dict(shard_ranks.make(None, steps=4)[0].named_parameters())
    for rank, got in enumerate(seen(ran / f"resume{ranks}", ranks)):
        for name, part in got["shards"].items():
            chunks = [*saved[name].chunk(ranks), *[saved[name][:0]] * ranks]
            assert differences(part, chunks[rank]) == []
        assert (got["extra"], got["index"].tolist()) == ({"sparse": True}, [*range(6)])
        torch.testing.assert_close(got["after"], expected, rtol=0, atol=1e-5)
        assert got["mapped"] == [True, False]  # the run does not hold on to the file
    assert (expected["wte.weight"] - saved["wte.weight"]).abs().max() > 0.01


def test_a_shape_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"full has shape \(7, 4\), need the target's, \(4, 7\)"):
        shard_like(torch.zeros(7, 4), torch.zeros(4, 7))


# ---------------------------------------------------------------------------------------------------------------------
# Rows on ranks


def piece_of(w: torch.Tensor, ranks: int, rank: int):
    """What rows_of asks of a DTensor, without a process group."""
    pieces = [*w.chunk(ranks), *[w[:0]] * ranks]
    mesh = SimpleNamespace(ndim=1, size=lambda dim: ranks, get_local_rank=lambda dim: rank)
    return SimpleNamespace(placements=(), device_mesh=mesh, shape=w.shape, to_local=lambda: pieces[rank])


@pytest.mark.parametrize("ranks", range(1, 10))
@pytest.mark.parametrize("rows", [*range(1, 7), 8, 12, 16, 24, 36, 40])
def test_rows_and_their_masks_are_cut_as_torch_cuts_them(rows, ranks):
    w = torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))
    pieces = [piece_of(w, ranks, rank) for rank in range(ranks)]
    counts, mask = [len(piece.to_local()) for piece in pieces], w > 0
    assert sparse24.cut(rows, ranks) == counts
    for piece in pieces:
        assert torch.equal(sparse24.rows_of(piece, mask), piece.to_local() > 0)
    if rows % 4 == 0:
        assert sparse24.fits(rows, ranks) == all(count % 4 == 0 for count in counts)
        index = transposable_index(w)
        for piece in pieces if sparse24.fits(rows, ranks) else ():
            assert torch.equal(sparse24.rows_of(piece, index), transposable_index(piece.to_local()))
        assert sparse24.rows_of(w, index) is index
