"""Checkpoints in shards: written by gloo ranks (tests/shard_ranks.py), read by any number of them, damage refused."""

import errno
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import shard_ranks
import torch
from harness import ROOT, contents, differences
from shard_ranks import HASH, make, state_of

from runtime import checkpoint
from runtime.checkpoint import CheckpointError, Sharded, find, like, load, save
from runtime.checkpoint_shards import MARKER, rebuild

FILES = ["ckpt_00001200.shards/0.pt", "ckpt_00001200.shards/1.pt"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder in which two ranks did their tasks."""
    folder = tmp_path_factory.mktemp("ran")
    shard_ranks.start(2, folder, "save_fsdp", "save_hsdp", "resume", "refuse", "disk_full", "kill")
    return folder


@pytest.fixture(scope="module")
def resumed(ran):
    """resumed(3): the folder in which so many ranks read what two had saved."""

    @functools.cache
    def resume(ranks):
        if ranks != 2:
            shard_ranks.start(ranks, ran, "resume")
        return ran / ("resume" if ranks == 2 else f"resume{ranks}")

    return resume


@pytest.fixture(scope="module")
def expected():
    """The state of one process that did the same steps."""
    return state_of(*make(None))


@pytest.fixture
def out(ran, tmp_path):
    """A copy of a sharded checkpoint, to be damaged."""
    shutil.copytree(ran / "save_fsdp" / "background", tmp_path / "out")
    return tmp_path / "out"


def seen(folder, rank):
    return torch.load(folder / f"seen_{rank}.pt", weights_only=True)


def check_close(one, other):
    """Gradients are summed in another order by other numbers of ranks, so equal up to rounding."""
    one, other = ({k: v for k, v in shard_leaves(state).items() if torch.is_tensor(v)} for state in (one, other))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-5, msg=name)


def shard_leaves(state):
    """{path: leaf}"""
    found = {}
    rebuild(state, lambda path, item: found.setdefault(path, item))
    return found


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------------------------
# What two ranks write


@pytest.mark.parametrize("name", ["save_fsdp/background", "save_fsdp/at_once", "save_hsdp", "save_fsdp/plain"])
def test_one_process_loads_what_two_ranks_saved(ran, expected, name):
    state = load(ran / name / "ckpt.pt", HASH)
    check_close(state, expected)
    assert state.keys() == expected.keys()
    assert state["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    model = make(None, steps=0)[0]
    model.load_state_dict(state["model"])
    assert differences(model.state_dict(), state["model"]) == []


def test_every_rank_writes_its_rows_and_rank_0_the_rest(ran):
    folder = ran / "save_fsdp" / "background"
    assert names(folder) == ["ckpt.pt", *FILES]
    shards = [torch.load(folder / name, weights_only=True) for name in FILES]
    whole = load(folder / "ckpt.pt", HASH)
    for part, prefix in (("model", ""), ("optimizer", "state.0.")):
        assert shards[0][part].keys() == shards[1][part].keys()
        name = f"{prefix}exp_avg" if prefix else "wte.weight"
        tensor = whole["optimizer"]["state"][0]["exp_avg"] if prefix else whole["model"][name]
        assert differences([shard[part][name] for shard in shards], list(tensor.split(4))) == []
    assert [shard["model"]["one.weight"].shape for shard in shards] == [(1, 4), (0, 4)]
    main = torch.load(folder / "ckpt.pt", weights_only=True)
    marker = {MARKER: ["model", "wte.weight"], "shape": [7, 4], "dtype": torch.float32, "rows": [4, 3]}
    assert main["model"]["wte.weight"] == marker
    assert main["model"]["index"].tolist() == [*range(6)]
    assert main["model"]["_extra_state"] == {"sparse": True}
    sizes = [(folder / name).stat().st_size for name in FILES]
    assert [file["bytes"] for file in main["shards"]["files"]] == sizes


def test_what_training_changes_after_the_save_does_not_reach_the_shards(ran):
    """There 1 was added to every weight in between."""
    one, other = (load(ran / "save_fsdp" / name / "ckpt.pt", HASH) for name in ("background", "at_once"))
    assert differences(one, other) == []
    mine = seen(ran / "save_fsdp", 1)["weight"]
    assert differences(mine, other["model"]["wte.weight"][4:]) == []


def test_a_tied_weight_is_saved_once_and_stays_tied(ran):
    folder = ran / "save_fsdp" / "background"
    part = torch.load(folder / FILES[0], weights_only=True)["model"]
    assert part["wte.weight"].data_ptr() == part["head.weight"].data_ptr()
    model = load(folder / "ckpt.pt", HASH)["model"]
    assert model["wte.weight"].data_ptr() == model["head.weight"].data_ptr()
    assert model["norm.weight"].data_ptr() != model["norm.bias"].data_ptr()


def test_of_replicas_only_the_first_writes(ran):
    assert names(ran / "save_hsdp")[:2] == ["ckpt.pt", FILES[0]]
    first, second = (seen(ran / "save_hsdp", rank)["written"] for rank in (0, 1))
    assert first == [["model", "optimizer"], sorted([*checkpoint.KEYS, "shards"])]
    assert second == []


def test_bytes_are_on_disk_before_a_name_points_at_them(ran):
    """The folder's name, the shard, its name; then ckpt.pt as ever."""
    assert seen(ran / "save_hsdp", 0)["done"] == ["mkdir", *["fsync"] * 4, "replace", "fsync"]
    assert seen(ran / "save_hsdp", 1)["done"] == []


def test_a_second_save_of_an_iteration_leaves_the_shards_of_the_first(ran):
    folder = ran / "save_fsdp" / "at_once"
    second = [name.replace("200.", "200.1.") for name in FILES]
    assert names(folder) == sorted(["ckpt.pt", "ckpt_prev.pt", *FILES, *second])
    assert differences(load(folder / "ckpt.pt", HASH), load(folder / "ckpt_prev.pt", HASH)) == []


def test_a_state_without_dtensors_is_one_file_of_rank_0(ran):
    assert names(ran / "save_fsdp" / "plain") == ["ckpt.pt"]


def test_what_is_sharded_otherwise_is_refused(ran):
    for rank in (0, 1):
        said = seen(ran / "refuse", rank)
        assert re.search(r"placements \(Shard\(dim=1\),\), need Replicate, or Shard\(0\) in the last", said["columns"])
        assert "over different meshes" in said["two meshes"]
        for key in ("no ranks", "no ranks, replicas"):
            assert "a state that 2 ranks share, need the Ranks of exactly these" in said[key]


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_on_one_rank_is_raised_once_on_both(ran, background):
    first, second = (seen(ran / "disk_full", rank) for rank in (0, 1))
    said = {
        "shard of rank 1": (r"rank 1 cannot write its part of", r"cannot write .*2\.shards/1\.pt: .*No space left"),
        "ckpt.pt": (r"cannot write .*/ckpt\.pt: .*No space left.*are untouched", r"rank 0 cannot write its part of"),
        "folder": (r"cannot write .*: .*No space left", r"cannot write .*: .*No space left"),
    }
    for where, patterns in said.items():
        for errors, pattern in zip((first[where, background], second[where, background]), patterns, strict=True):
            assert len(errors) == 1
            assert re.match(f"CheckpointError: {pattern}", errors[0])
        left = [name for name in first[where, background, "left"] if "ckpt_00000001." not in name]
        assert set(left) <= {"ckpt.pt", "ckpt_prev.pt"}
        assert first[where, background, "iteration"] == 1


def test_a_kill_at_any_point_leaves_a_whole_checkpoint_with_its_shards(ran):
    """At the fourth save, with keep_last=3: the first one and its shards go."""
    album = sorted((ran / "kill" / "album").iterdir())
    found = [load(find(photo), HASH)["iter_num"] for photo in album]
    assert len(found) >= 20
    assert found == sorted(found)
    assert {found[0], found[-1]} == {3, 4}
    for photo in album:
        assert load(photo / "ckpt_prev.pt", HASH)["iter_num"] in (2, 3)
        for path in photo.glob("ckpt_0*.pt"):
            assert f"{load(path, HASH)['iter_num']:08d}" in path.name
    iterations = [f"ckpt_0000000{i}" for i in (2, 3, 4)]
    shards = [f"{name}.shards/{k}.pt" for name in iterations for k in (0, 1)]
    assert names(ran / "kill" / "run") == sorted(
        ["ckpt.pt", "ckpt_prev.pt", *shards, *(f"{name}.pt" for name in iterations)]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading on other numbers of ranks


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_rank_reads_its_rows_of_the_new_cut(ran, resumed, ranks):
    model = load(ran / "save_fsdp" / "background" / "ckpt.pt", HASH)["model"]
    for rank in range(ranks):
        got = seen(resumed(ranks), rank)
        for name in ("wte.weight", "norm.weight", "norm.bias", "one.weight", "one.bias"):
            chunks = [*model[name].chunk(ranks), *[model[name][:0]] * ranks]
            assert differences(got[f"sharded {name}"], chunks[rank]) == []
            assert differences(got[f"whole {name}"], chunks[rank]) == []
        assert differences(got["replicated"], model["wte.weight"]) == []
        assert got["scalar"] == 3.0
        assert re.search(r"source of shape \(7, 4\), need the target's, \(7, 5\)", got["wrong shape"])
        assert "Shard(0) in the last place" in got["columns"]


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_training_goes_on_as_if_it_had_not_stopped(resumed, ranks):
    model = make(None, steps=4)[0]
    got = seen(resumed(ranks), 0)["after"]
    check_close(got, {name: p.detach() for name, p in model.named_parameters()})
    assert (got["wte.weight"] - make(None)[0].wte.weight).abs().max() > 0.01


def test_a_sharded_tensor_reads_what_it_is_asked_for(out):
    whole = load(out / "ckpt.pt", HASH)["model"]["wte.weight"]
    sharded = load(out / "ckpt.pt", HASH, whole=False)["model"]["wte.weight"]
    assert isinstance(sharded, Sharded)
    assert (sharded.shape, sharded.dtype) == ((7, 4), torch.float32)
    for start in range(8):
        for stop in range(start, 8):
            assert differences(sharded.rows(start, stop), whole[start:stop]) == []
    for start, stop in ((-1, 2), (3, 2), (0, 8)):
        with pytest.raises(ValueError, match=f"{start} to {stop} of wte.weight, need 0 to 7"):
            sharded.rows(start, stop)
    assert differences(like(sharded, torch.zeros(7, 4)), whole) == []
    with pytest.raises(ValueError, match="like: a source of shape"):
        like(sharded, torch.zeros(4, 7))
    sharded.whole().zero_()  # of a copy: the file stays
    assert differences(sharded.whole(), whole) == []


def test_rows_of_one_shard_need_no_other(out):
    sharded = load(out / "ckpt.pt", HASH, whole=False)["model"]["wte.weight"]
    (out / FILES[1]).unlink()
    assert len(sharded.rows(0, 4)) == 4
    with pytest.raises(CheckpointError, match=r"shards/1\.pt cannot be used: no model wte\.weight can be read"):
        sharded.rows(0, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def refusal(out, whole=True):
    before = contents(out)
    with pytest.raises(CheckpointError) as info:
        load(out / "ckpt.pt", HASH, whole=whole)
    assert contents(out) == before
    assert str(out / "ckpt.pt") in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_in_a_shard_is_refused(out, name):
    path = out / name
    data = path.read_bytes()
    for place in range(0, len(data), 97):  # 97 is prime, so all kinds of record and table are met
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        assert f"{path} is corrupted" in refusal(out, whole=place % 2 == 0)
    path.write_bytes(data)
    load(out / "ckpt.pt", HASH)


def test_missing_and_truncated_shards_are_named(out):
    path = out / FILES[1]
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert f"{path} has {len(data) - 1} bytes, not the {len(data)} of this checkpoint: truncated" in refusal(out)
    path.unlink()
    assert f"{path} is missing" in refusal(out)
    path.mkdir()
    assert f"{path} " in refusal(out)
    shutil.rmtree(out / "ckpt_00001200.shards")
    assert f"{out / FILES[0]} is missing" in refusal(out)


def test_shards_of_another_save_are_refused(out):
    """Of the same names and sizes, and whole in themselves; and those of this one in another order."""
    first, second = (out / name for name in FILES)
    data, size = [first.read_bytes(), second.read_bytes()], first.stat().st_size
    part = torch.load(first, weights_only=True)
    part["model"]["norm.bias"] += 1
    with open(first, "wb") as file:  # as checkpoint_shards does; torch names the archive after a path
        torch.save(part, file)
    assert first.stat().st_size == size
    assert f"{first} is corrupted, or of another save: it has another CRC-32" in refusal(out)
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    assert f"{first} " in refusal(out)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("shards", {"folder": "../ckpt_00001200.shards"}),
        ("shards", {"files": [{"crc32": 1}]}),
        ("shards", {"files": 2}),
        ("model", {"wte.weight": {MARKER: ["model"]}}),
        ("model", {"wte.weight": {MARKER: ["model", "wte.weight"], "shape": [7, 4], "dtype": torch.float32}}),
    ],
)
def test_what_is_said_of_shards_in_another_way_is_refused(out, part, changes):
    state = torch.load(out / "ckpt.pt", weights_only=True)
    torch.save({**state, part: {**state[part], **changes}}, out / "ckpt.pt")
    assert "what it says of its shards is foreign" in refusal(out)


def test_a_shard_of_another_shape_is_refused(out):
    state = torch.load(out / "ckpt.pt", weights_only=True)
    state["model"]["wte.weight"]["rows"] = [3, 4]
    torch.save(state, out / "ckpt.pt")
    with pytest.raises(
        CheckpointError, match=r"0\.pt cannot .*wte\.weight is torch.float32 \(4, 4\), need .*\(3, 4\)$"
    ):
        load(out / "ckpt.pt", HASH)


def test_damage_that_one_rank_finds_is_raised_on_both(ran):
    first, second = (seen(ran / "refuse", rank)["load"] for rank in (0, 1))
    assert re.search(r"ckpt\.pt cannot be used, and rank 1 says why", first)
    assert re.search(r"shards/1\.pt is corrupted", second)


def test_the_previous_one_is_offered_only_when_its_shards_are_whole(ran, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(ran / "kill" / "run", out)
    for iteration in (4, 3):
        path = out / f"ckpt_0000000{iteration}.shards" / "0.pt"
        path.write_bytes(path.read_bytes()[::-1])
        said = re.search(r"is whole \(iteration (\d)\): to go on from there, mv '(.*)' '(.*)'$", refusal(out))
        assert bool(said) == (iteration == 4)
        assert said is None or said.groups() == ("3", str(out / "ckpt_prev.pt"), str(out / "ckpt.pt"))


# ---------------------------------------------------------------------------------------------------------------------
# Living with single files


def test_folders_of_shards_go_with_the_last_checkpoint_that_names_them(out, expected):
    """A run that goes on in one process."""
    shutil.copy(out / "ckpt.pt", out / "mine.pt")
    (out / "ckpt_00001100.shards").mkdir()  # what a kill left
    (out / "other.shards").mkdir()
    save(out, {**expected, "iter_num": 1300})
    assert not (out / "ckpt_00001100.shards").exists()
    assert (out / "other.shards").exists()
    save(out, {**expected, "iter_num": 1400})
    check_close(load(out / "mine.pt", HASH), expected)
    (out / "mine.pt").unlink()
    save(out, {**expected, "iter_num": 1500})
    assert names(out) == ["ckpt.pt", "ckpt_prev.pt"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), RuntimeError("unable to mmap 9 bytes")])
def test_a_folder_goes_not_while_a_checkpoint_cannot_be_read(out, expected, monkeypatch, capsys, error):
    real = torch.load

    def fail(path, **options):
        if path.name == "ckpt_best.pt":
            raise error
        return real(path, **options)

    monkeypatch.setattr(torch, "load", fail)
    os.replace(out / "ckpt.pt", out / "ckpt_best.pt")
    save(out, expected)
    assert names(out) == sorted(["ckpt.pt", "ckpt_best.pt", *FILES])
    monkeypatch.undo()
    load(out / "ckpt_best.pt", HASH)
    assert "old shards stay, since ckpt_best.pt cannot be read" in capsys.readouterr().out
    (out / "ckpt_best.pt").unlink()
    save(out, expected)
    assert names(out) == ["ckpt.pt", "ckpt_prev.pt"]


def test_converting_makes_one_file_of_either_form(out, tmp_path, capsys):
    state = load(out / "ckpt.pt", HASH)
    before = contents(out)
    once, twice = tmp_path / "once.pt", tmp_path / "twice.pt"
    checkpoint.main([str(out / "ckpt.pt"), str(once)])
    checkpoint.main([str(once), str(twice)])
    assert capsys.readouterr().out == f"wrote {once}\nwrote {twice}\n"
    assert contents(out) == before
    shutil.rmtree(out)
    for path in (once, twice):
        assert differences(load(path, HASH), state) == []
    assert "shards" not in torch.load(once, weights_only=True)
    assert names(tmp_path) == ["once.pt", "twice.pt"]


def test_converting_overwrites_nothing_and_says_what_is_wrong(out, tmp_path):
    target = tmp_path / "target.pt"
    target.write_text("mine")
    for source, place, message in (
        (out / "ckpt.pt", target, r"target\.pt exists; name a file that is to be made"),
        (out / "none.pt", tmp_path / "new.pt", r"none\.pt does not exist"),
        (target, tmp_path / "new.pt", r"was not written by torch\.save"),
        (out / "ckpt.pt", tmp_path / "nowhere" / "new.pt", r"cannot write .*nowhere"),
    ):
        with pytest.raises(SystemExit, match=rf"^runtime\.checkpoint: error: .*{message}"):
            checkpoint.main([str(source), str(place)])
    assert target.read_text() == "mine"
    assert names(tmp_path) == sorted(["out/ckpt.pt", *(f"out/{name}" for name in FILES), "target.pt"])


@pytest.mark.slow
def test_the_command_line_is_the_documented_one(out, tmp_path):
    command = [sys.executable, "-m", "runtime.checkpoint", out / "ckpt.pt", tmp_path / "whole.pt"]
    assert "python -m runtime.checkpoint out/ckpt.pt whole.pt" in Path(checkpoint.__file__).read_text()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert load(tmp_path / "whole.pt", HASH)["iter_num"] == 1200
