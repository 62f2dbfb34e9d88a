"""sample.py decodes with the dataset's vocabulary, in the phase and with the recipe of the checkpoint."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

import sample
import sparse24
from model import GPT, GPTConfig
from runtime import checkpoint

ROOT = Path(__file__).resolve().parent.parent
CHARS = "\nabcdefghiä"


@pytest.fixture
def run(tmp_path):
    """The folder of a checkpoint and its dataset, a function that saves another checkpoint, and the untrained model."""
    data = tmp_path / "data"
    data.mkdir()
    meta = {"tokenizer": "char", "vocab_size": len(CHARS), "chars": CHARS}
    (data / "meta.json").write_text(json.dumps(meta))
    torch.manual_seed(0)
    args = {"block_size": 16, "vocab_size": len(CHARS), "n_layer": 1, "n_head": 2, "n_embd": 16, "sparse": "fst"}
    model = GPT(GPTConfig(**args))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20)  # so that the likeliest tokens depend on the phase

    def save(**changes):
        state = dict.fromkeys(checkpoint.KEYS)
        config = {"dataset": str(data), "sparse": "fst"}
        state |= {"model": model.state_dict(), "iter_num": 7, "model_args": args, "config": config}
        checkpoint.save(tmp_path, state | {"patterns_hash": sparse24.PATTERNS_HASH} | changes)

    save()
    return tmp_path, save, model


def run_sample(folder, *words):
    """Run sample.py's main in this process: (exit status, stdout, stderr)."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        for name, value in vars(sample).items():
            patch.setattr(sample, name, value)  # restores the settings
        patch.setattr(sys, "argv", ["sample.py", f"--out_dir={folder}", "--max_new_tokens=20", "--device=cpu", *words])
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                sample.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            stderr.write("" if isinstance(end.code, int) else end.code)
    return status, stdout.getvalue(), stderr.getvalue()


def test_samples_follow_the_phase_of_the_checkpoint(run):
    folder, save, model = run
    texts = {}
    for phase in (True, False):
        for layer in sparse24.sparse_linears(model):
            layer.sparse = phase
        save(model=model.state_dict())
        status, stdout, stderr = run_sample(folder, "--start=abc", "--num_samples=1", "--temperature=0")
        assert status == 0, stderr
        first, text = stdout.split("\n", 1)
        assert f"iteration 7, {2 * phase} of 2 sparse linears in the 2:4 phase" in first
        texts[phase] = text.removesuffix("\n---------------\n")
        greedy = model.eval().generate(torch.tensor([[1, 2, 3]]), 20, temperature=0)[0]
        assert texts[phase] == "".join(CHARS[token] for token in greedy)
    assert texts[True] != texts[False]


def test_prompt_from_a_file_and_equal_seeds(run):
    folder, _, _ = run
    (folder / "prompt.txt").write_text("fig")
    words = (f"--start=FILE:{folder / 'prompt.txt'}", "--num_samples=2", "--seed=5")
    status, first, stderr = run_sample(folder, *words)
    assert status == 0, stderr
    assert run_sample(folder, *words)[1] == first
    assert first.count("fig") >= 2
    assert run_sample(folder, *words[:-1], "--seed=6")[1] != first


def test_the_script_prints_what_the_terminal_can_show_and_ends_quietly_if_the_reader_leaves(run):
    words = f"--out_dir={run[0]} --start=ä --device=cpu --max_new_tokens=2 --num_samples=999"
    command = f"{sys.executable} sample.py {words} | head -2"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, shell=True, capture_output=True, text=True, env=environment)
    assert done.stderr == ""
    assert "iteration 7" in done.stdout
    assert "\n\\xe4" in done.stdout


def test_a_closed_console_and_a_reader_of_the_help_that_leaves_are_no_error(run):
    words = f"--out_dir={run[0]} --device=cpu --max_new_tokens=2 --num_samples=1"
    for command in (f"sample.py {words} >&-", "sample.py --help | true"):
        done = subprocess.run(f"{sys.executable} {command}", cwd=ROOT, shell=True, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--start=XYZ"], "the dataset's vocabulary has no 'XYZ'"),
        (["--start="], "start is empty"),
        (["--start=FILE:nowhere.txt"], "nowhere.txt"),
        (["--start=FILE:tests"], "Is a directory: 'tests'"),
        (["--start=FILE:~/nowhere.txt"], str(Path.home() / "nowhere.txt")),
        (["--ckpt=ckpt_best.pt"], "ckpt_best.pt does not exist"),
        (["--top_k=many"], "top_k"),
        (["--top_k=0"], "top_k=0, need at least 1"),
        (["--temperature=-1"], "temperature=-1.0, need at least 0"),
        (["--temperature=1e999"], "temperature=inf, need"),
        (["--num_samples=0"], "num_samples=0, need at least 1"),
        (["--max_new_tokens=-1"], "max_new_tokens=-1, need at least 0"),
        (["--seed=-1"], "seed=-1, need at least 0"),
        ([f"--seed={2**64}"], "seed=18446744073709551616, need"),
        (["--dtype=fp16"], "dtype='fp16', need one of auto, float32, bfloat16, float16"),
        (["--device=cuda:99"], "device='cuda:99' cannot be used: "),
        (["--device=tpu"], "device='tpu' cannot be used: "),
        (["--init_from=gpt9"], "name='gpt9' is unknown"),
    ],
)
def test_wrong_input_gives_one_clear_line(run, words, message):
    status, stdout, stderr = run_sample(run[0], *words)
    assert status != 0
    assert re.fullmatch(r"sample\.py: error: [^\n]+\n?", stderr)
    assert message in stderr
    assert stdout in ("", f"{run[0]}/ckpt.pt: iteration 7, 2 of 2 sparse linears in the 2:4 phase\n")


def test_a_prompt_file_may_begin_with_a_byte_order_mark_but_must_be_utf8(run):
    prompt = run[0] / "prompt.txt"
    prompt.write_text("abc", encoding="utf-8-sig")
    assert "\nabc" in run_sample(run[0], f"--start=FILE:{prompt}", "--num_samples=1")[1]
    prompt.write_text("abc", encoding="utf-16")
    assert "sample.py: error: 'utf-8' codec can't decode" in run_sample(run[0], f"--start=FILE:{prompt}")[2]


@pytest.mark.parametrize(
    "words", [["--temperature=1e-40"], ["--dtype=float16"], ["--max_new_tokens=0"], ["--top_k=99"]]
)
def test_settings_at_the_edge_of_their_range_give_text(run, words):
    status, stdout, stderr = run_sample(run[0], "--start=abc", "--num_samples=1", *words)
    assert (status, stderr) == (0, "")
    assert "\nabc" in stdout


def test_a_prompt_may_be_longer_than_the_block(run):
    assert "\n" + "abc" * 30 in run_sample(run[0], "--start=" + "abc" * 30, "--num_samples=1")[1]


def test_ctrl_c_ends_in_one_word(run, monkeypatch):
    monkeypatch.setattr(sample.GPT, "generate", Mock(side_effect=KeyboardInterrupt))
    assert run_sample(run[0])[::2] == (1, "sample.py: stopped")


@pytest.mark.parametrize("folder_now", ["gone", "other", "damaged"])
def test_the_checkpoints_own_vocabulary_is_used(run, folder_now):
    folder, save, _ = run
    save(data={"tokenizer": "char", "vocab_size": len(CHARS), "chars": CHARS, "train_tokens": 9, "train_checksum": "0"})
    words = ("--start=abc", "--num_samples=1", "--temperature=0")
    expected = run_sample(folder, *words)[1]
    path = folder / "data" / "meta.json"
    (folder / "data" / "train.bin").touch()
    if folder_now == "gone":
        shutil.rmtree(folder / "data")
    if folder_now == "other":
        path.write_text(json.dumps({"tokenizer": "char", "vocab_size": len(CHARS), "chars": CHARS.upper()}))
    if folder_now == "damaged":
        path.write_text("{")
    status, stdout, stderr = run_sample(folder, *words)
    assert status == 0, stderr
    assert stdout.endswith(expected)
    assert ("has another vocabulary than the run had" in stdout) == (folder_now == "other")
    assert "vocabulary has no 'ABC'" in run_sample(folder, "--start=ABC")[2]


def test_the_checkpoint_before_a_damaged_one_is_offered(run):
    folder, save, _ = run
    save(iter_num=8)
    (folder / "ckpt.pt").write_bytes(b"gone")
    status, _, stderr = run_sample(folder)
    assert status == 1
    assert stderr.endswith(f"iteration 7 is intact: to continue from it, mv {folder}/ckpt_prev.pt {folder}/ckpt.pt")
    assert "\n" not in stderr


def test_dataset_with_more_tokens_than_the_model_is_refused(run):
    folder, _, _ = run
    meta = {"tokenizer": "char", "vocab_size": 64, "chars": "".join(map(chr, range(64)))}
    (folder / "data" / "meta.json").write_text(json.dumps(meta))
    assert "now has 64 tokens, but the checkpoint has 11" in run_sample(folder)[2]


@pytest.mark.parametrize("name", ["sr_ste", "s_ste"])
def test_a_model_is_sampled_by_the_recipe_that_it_was_trained_with(run, monkeypatch, name):
    folder, save, model = run
    trained = GPT(dataclasses.replace(model.config, sparse=name))
    args = dataclasses.asdict(trained.config)
    save(model=trained.state_dict(), model_args=args, config={"dataset": str(folder / "data"), "sparse": name})
    monkeypatch.setattr(sample, "out_dir", str(folder))
    layer, x = sample.load_model()[0].transformer.h[0].mlp.c_fc, torch.randn(3, 16)
    w = layer.weight.detach()
    soft = sparse24.soft_threshold24(w) * sparse24.sste_scale(w)
    pruned = soft if name == "s_ste" else torch.where(sparse24.mask24(w), w, 0)
    assert torch.equal(layer(x), F.linear(x, pruned, layer.bias))


def test_a_removed_setting_is_accepted_only_at_the_value_that_remains(run):
    folder, save, model = run
    args = dataclasses.asdict(model.config)
    save(model_args={**args, "sparse_layers": "ffn"})
    assert run_sample(folder)[0] == 0
    save(model_args={**args, "sparse_layers": "ffn+attn"})
    status, _, stderr = run_sample(folder)
    assert status == 1
    assert "ckpt.pt has sparse_layers='ffn+attn', need 'ffn': the setting was removed after commit 7ffc73d" in stderr
