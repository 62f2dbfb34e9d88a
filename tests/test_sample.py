"""sample.py: decodes with the run's own vocabulary and honours the phase of the checkpoint."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample
import sparse24
from model import GPT, GPTConfig
from runtime import checkpoint, loader

ROOT = Path(__file__).resolve().parent.parent
CHARS = "\nabcdefghij"


@pytest.fixture
def run(tmp_path):
    """A folder with a checkpoint of an untrained sparse model and its dataset; returns (folder, save)."""
    data = tmp_path / "data"
    data.mkdir()
    meta = {"tokenizer": "char", "vocab_size": len(CHARS), "chars": CHARS}
    (data / "meta.json").write_text(json.dumps(meta))
    torch.manual_seed(0)
    args = {"block_size": 16, "vocab_size": len(CHARS), "n_layer": 1, "n_head": 2, "n_embd": 16, "sparse": "fst"}
    model = GPT(GPTConfig(**args))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20)  # so that pruned and dense weights give other likeliest tokens

    def save(**changes):
        state = dict.fromkeys(checkpoint.KEYS)
        config = {"dataset": str(data), "sparse": "fst"}
        state |= {"model": model.state_dict(), "iter_num": 7, "model_args": args, "config": config}
        checkpoint.save(tmp_path, state | {"patterns_hash": sparse24.PATTERNS_HASH} | changes)

    save()
    return tmp_path, save, model


def run_sample(folder, *words):
    """sample.py's main in this process: (exit status, stdout, stderr)."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    words = ["sample.py", f"--out_dir={folder}", "--max_new_tokens=20", "--device=cpu", *words]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in vars(sample).items():
            patch.setattr(sample, name, value)  # restores the settings
        patch.setattr(sys, "argv", words)
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                sample.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            stderr.write("" if isinstance(end.code, int) else end.code)
    return status, stdout.getvalue(), stderr.getvalue()


def greedy(model, prompt):
    idx = torch.tensor([[CHARS.index(c) for c in prompt]])
    return "".join(CHARS[t] for t in model.eval().generate(idx, 20, temperature=0)[0])


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
        assert texts[phase] == greedy(model, "abc")
    assert texts[True] != texts[False]


def test_prompt_from_a_file_and_equal_seeds(run):
    folder, _, _ = run
    (folder / "prompt.txt").write_text("jig")
    words = (f"--start=FILE:{folder / 'prompt.txt'}", "--num_samples=2", "--seed=5")
    status, first, stderr = run_sample(folder, *words)
    assert status == 0, stderr
    assert run_sample(folder, *words)[1] == first
    assert first.count("jig") >= 2
    assert run_sample(folder, *words[:-1], "--seed=6")[1] != first


def test_the_script_runs_as_a_user_runs_it(run):
    command = [sys.executable, "sample.py", f"--out_dir={run[0]}", "--max_new_tokens=5", "--num_samples=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "iteration 7" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--start=XYZ"], "the dataset's vocabulary has no 'XYZ'"),
        (["--start="], "start is empty"),
        (["--start=FILE:nowhere.txt"], "nowhere.txt"),
        (["--ckpt=ckpt_best.pt"], "ckpt_best.pt does not exist"),
        (["--top_k=many"], "top_k"),
    ],
)
def test_wrong_input_gives_one_clear_line(run, words, message):
    status, stdout, stderr = run_sample(run[0], *words)
    assert status != 0
    assert message in stderr
    assert "---" not in stdout


def test_dataset_with_more_tokens_than_the_model_is_refused(run):
    folder, _, _ = run
    meta = {"tokenizer": "char", "vocab_size": 64, "chars": CHARS}
    (folder / "data" / "meta.json").write_text(json.dumps(meta))
    assert "now has 64 tokens, the checkpoint 11" in run_sample(folder)[2]


def test_char_tokenizer_round_trip():
    encode, decode = loader.load_tokenizer({"tokenizer": "char", "chars": CHARS})
    assert decode(encode("a\nbad\n")) == "a\nbad\n"
    assert encode("\nab") == [0, 1, 2]


def test_windows_are_shifted_by_one_and_a_function_of_the_key(tmp_path):
    np.arange(100, dtype="<u2").tofile(tmp_path / "train.bin")
    tokens = loader.Tokens(tmp_path, "train", 8, 100)

    def windows(count, *key):
        return tokens.windows(tokens.random_starts(count, *key), torch.device("cpu"))

    x, y = windows(6, 1, 2, 3)
    assert x.shape == y.shape == (6, 8)
    assert torch.equal(x + 1, y)
    assert torch.equal(x, windows(6, 1, 2, 3)[0])
    assert not torch.equal(x, windows(6, 1, 2, 4)[0])
    starts = torch.cat([windows(64, 9, k)[0][:, 0] for k in range(40)])
    assert starts.min() == 0
    assert starts.max() == 91  # the last window ends with the last token as target


def test_meta_that_belongs_to_other_files_is_refused(tmp_path):
    np.zeros(10, dtype="<u2").tofile(tmp_path / "train.bin")
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": "char", "vocab_size": 5, "train_tokens": 11}))
    with pytest.raises(ValueError, match=r"counts 11 tokens in train.bin, which holds 10; prepare the dataset again"):
        loader.load_meta(tmp_path)


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


def test_a_checkpoint_with_a_removed_setting_is_sampled_at_the_value_that_stayed(run):
    folder, save, model = run
    args = dataclasses.asdict(model.config)
    save(model_args={**args, "sparse_layers": "ffn"})
    assert run_sample(folder)[0] == 0
    save(model_args={**args, "sparse_layers": "ffn+attn"})
    status, _, stderr = run_sample(folder)
    assert status == 1
    assert "ckpt.pt has sparse_layers='ffn+attn', need 'ffn': the setting was removed after commit 7ffc73d" in stderr
