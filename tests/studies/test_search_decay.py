"""The search for the decay factor: its runs, its recommendation, its errors and its files."""

import json
import math
import shlex
import sys

import pytest

import train
from runtime.metrics import read_config, read_metrics
from studies import search_decay

TINY = shlex.split(
    "--n_layer=1 --n_head=2 --n_embd=16 --block_size=8 --batch_size=4 --gradient_accumulation_steps=1 --device=cpu "
    "--warmup_iters=4 --learning_rate=1e-2 --lr_decay_iters=500 --sparse=fst --mask_interval=1"
)


@pytest.fixture
def words(tmp_path, data):
    return [*TINY, f"--dataset={data}", "--steps=20", "--candidates=0,1e-3", f"--search_dir={tmp_path / 'search'}"]


@pytest.fixture
def fake_train(monkeypatch, write_run):
    """fake_train(mu_of) fakes the runs: a candidate's flip rate is mu_of(lambda) times the dense one, which falls with
    the step. Returns the list of folders that ran."""

    def install(mu_of):
        ran = []

        def run_child(command, log_path, **_):
            given = dict(word[2:].split("=", 1) for word in command if word.startswith("--"))
            mu = 1.0 if given["sparse"] == "none" else mu_of(float(given["masked_decay"]))
            steps = int(given["max_iters"])
            rows = [{"iter": i, "flip_rate": mu / (i + 10)} for i in range(steps)]
            write_run(log_path.parent, [*rows, {"iter": steps, "val_loss": 2.0, "elapsed_s": 3.0}])
            ran.append(log_path.parent.name)
            return 0

        monkeypatch.setattr(search_decay.runs, "run_child", run_child)
        return ran

    return install


def error_of(words):
    with pytest.raises(SystemExit) as caught:
        search_decay.main(words)
    return str(caught.value)


def commands(words, capsys):
    """The training commands that a dry run prints, as lists of words."""
    assert search_decay.main([*words, "--dry_run"]) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()[-3:]]


def settings_of(command):
    return search_decay.configure(search_decay.train_defaults(), command[2:])


@pytest.mark.slow
def test_a_real_search_and_its_second_call(tmp_path, words, capsys):
    folder = tmp_path / "search"
    status = search_decay.main(words)
    out, written = capsys.readouterr().out, json.loads((folder / "search.json").read_text())
    names = ("dense", "decay-0", "decay-0.001")
    assert "3 runs x 20 steps = 60 steps of 32 tokens" in out
    assert "0.01 % of the training run's 600,000 steps" in out
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "search.json", "search.png"])

    configs = [read_config(folder / name) for name in names]
    assert [config["sparse"] for config in configs] == ["none", "fst", "fst"]
    assert [config["masked_decay"] for config in configs[1:]] == [0.0, 0.001]
    shared = ("seed", "max_iters", "flip_mask", "learning_rate", "warmup_iters", "lr_decay_iters")
    assert [[config[key] for key in shared] for config in configs] == [[1337, 20, "transposable", 1e-2, 4, 500]] * 3
    differing = {key for key in configs[1] if configs[1][key] != configs[2][key]}
    assert differing == {"out_dir", "masked_decay"}
    rows = [read_metrics(folder / name) for name in names]
    assert all(row["phase"] == "sparse" for row in rows[1])
    # the first batch and the initial weights are the same: the losses differ by the pruning alone
    assert math.isclose(rows[0][0]["train_loss"], rows[1][0]["train_loss"], rel_tol=0.02)
    assert rows[1][0]["train_loss"] == rows[2][0]["train_loss"]

    flips = [[row["flip_rate"] for row in run if 16 <= row["iter"] < 20] for run in rows]
    mus = [sum(run) / sum(flips[0]) for run in flips[1:]]
    assert [c["mu"] for c in written["candidates"]] == pytest.approx(mus)
    assert written["window"] == [16, 20]
    assert not list(folder.glob("*/*.pt"))
    assert written["environment"]["torch"] == configs[0]["environment"]["torch"]
    assert status == (0 if any(0.60 <= mu <= 0.95 for mu in mus) else 1)

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    assert search_decay.main(words) == status
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*")} == before
    assert json.loads((folder / "search.json").read_text()) == written
    assert "3 of them done" in capsys.readouterr().out


def test_a_stopped_search_says_so_and_goes_on_from_its_checkpoint(tmp_path, words, monkeypatch):
    def stopped(command, log_path, **_):
        (log_path.parent / "ckpt.pt").write_text("step 3")
        raise InterruptedError

    monkeypatch.setattr(search_decay.runs, "run_child", stopped)
    dense = tmp_path / "search" / "dense"
    assert error_of(words) == f"studies.search_decay: error: stopped; the same command resumes {dense}"
    assert (dense / "ckpt.pt").exists()
    assert "--init_from=auto" in search_decay.run_words(search_decay.prepare(*search_decay.parse(words)), None)


def test_dry_run_prints_the_commands_and_writes_nothing(tmp_path, words, capsys, monkeypatch):
    monkeypatch.setattr(search_decay.shutil, "which", lambda name: f"/bin/{name}")
    launcher = "torchrun --standalone --nproc_per_node=8"
    lines = commands([*words, f"--launcher={launcher}"], capsys)
    start = [*launcher.split(), str(search_decay.runs.TRAIN), *TINY]  # the user's words, unchanged and first
    assert [line[: len(start)] for line in lines] == [start] * 3
    assert [word for word in lines[2] if "decay=" in word] == ["--masked_decay=0.001"]
    assert "--sparse=none" in lines[0]
    assert not any(word.startswith("--masked_decay=") for word in lines[0])
    assert not (tmp_path / "search").exists()
    assert commands(words, capsys)[0][0] == sys.executable


@pytest.mark.parametrize(
    ("more", "needed"),
    [
        ("--sparse=step", "dense start fills the warm-up"),
        ("--sparse=act24", "dense start fills the warm-up"),
        ("--init_from=gpt2", "starts from scratch"),
        ("--eval_only=True", "has to train"),
        ("--learning_rat=1", "did you mean 'learning_rate'"),
        ("--candidates=0,x", "need numbers with commas"),
        ("--candidates=0", "one above 0"),
        ("--candidates=-1,1", "at least 0"),
        ("--steps=9", "at least 10 steps"),
        ("--launcher=no-such-program x", "no such program"),
        ("--dataset=no_such_data", "does not exist"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(tmp_path, words, more, needed):
    message = error_of([*words, more])
    assert message.startswith("studies.search_decay: error: ")
    assert needed in message
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize("in_file", [True, False])
def test_the_user_may_give_settings_of_the_search(tmp_path, words, capsys, in_file):
    """The search's settings follow the user's, and a dense recipe becomes fst."""
    config = tmp_path / "run.py"
    settings = (
        'out_dir = "x"\nmax_iters = 1000\nmasked_decay = 1e-3\nsparse = "none"\ndense_start = 5\n'
        "eval_interval = 7\ndense_pretrain = 0.5\nflip_reference = 'out-dense'\n"
    )
    config.write_text(settings)
    typed = [f"--{line.replace(' = ', '=')}" for line in settings.splitlines()]
    given = [word for word in words if not word.startswith(("--sparse", "--steps"))]
    search_decay.main([*([str(config)] if in_file else typed), *given, "--dry_run"])
    out = capsys.readouterr().out
    assert "3 runs x 100 steps = 300 steps of 32 tokens" in out
    assert "30 % of the training run's 1,000 steps" in out
    final = settings_of(shlex.split(out.splitlines()[-1]))
    assert (final["sparse"], final["max_iters"], final["dense_start"]) == ("fst", 100, 100)
    assert final["masked_decay"] == 1e-3
    assert (final["eval_interval"], final["dense_pretrain"], final["flip_reference"]) == (0, 0.0, "")
    assert final["out_dir"] == str(tmp_path / "search" / "decay-0.001")


def test_the_default_length_is_one_and_a_half_warm_ups(words, capsys):
    given = [word for word in words if not word.startswith("--steps")]
    search_decay.main([*given, "--warmup_iters=2000", "--dry_run"])
    assert "sampled at steps 2,400 to 2,999, every 12" in capsys.readouterr().out
    search_decay.main([*given, "--warmup_iters=2000", "--steps=1000", "--dry_run"])
    assert "before the warm-up's end, 2,000" in capsys.readouterr().out


@pytest.mark.parametrize(("more", "mask"), [([], "row"), (["--flip_mask=transposable"], "transposable")])
def test_the_dense_run_counts_the_recipes_kind_of_masks_or_the_users(words, capsys, more, mask):
    lines = commands([*words, "--sparse=sr_ste", *more], capsys)
    assert {settings_of(line)["flip_mask"] for line in lines} == {mask}


def test_another_setting_in_the_same_folder_is_refused_once_a_run_has_begun(tmp_path, words, fake_train, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(search_decay.runs, "run_child", lambda command, log, **_: log.write_text("no\n") and 1)
        error_of([*words, "--learning_rate=7e-2"])
    fake_train(lambda decay: 0.8)
    assert search_decay.main(words) == 0
    before = (tmp_path / "search" / "search.json").read_bytes()
    message = error_of([*words, "--learning_rate=5e-2", "--steps=30"])
    assert "learning_rate=0.05 (there 0.01)" in message
    assert "max_iters=30 (there 20)" in message
    assert "seed" not in message
    assert (tmp_path / "search" / "search.json").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "ckpt.pt").write_text("a run")
    assert "holds something else than a search" in error_of([*words, f"--search_dir={tmp_path / 'other'}"])
    assert search_decay.main([*words, "--log_interval=3", "--candidates=0,1e-3,2e-3"]) == 0  # harmless changes


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic


def test_mu_is_a_ratio_of_means():
    dense = {8: 0.002, 10: 0.004}
    result = search_decay.compare({8: 0.001, 10: 0.0035}, dense)
    assert result["mu"] == pytest.approx(0.75)  # not the mean of 0.5 and 0.875
    assert (result["mu_smallest"], result["mu_largest"]) == pytest.approx((0.5, 0.875))
    for sparse, reference, message in (
        ({8: 0.001}, dense, "the same steps"),
        ({}, {}, "the same steps"),
        ({8: 0.1}, {8: 0.0}, "there is no mu"),
    ):
        with pytest.raises(ValueError, match=message):
            search_decay.compare(sparse, reference)


@pytest.mark.parametrize(
    ("mus", "best"),
    [
        ({0.0: 1.1, 1e-4: 0.94, 3e-4: 0.8, 1e-3: 0.61}, 3e-4),
        ({1e-4: 0.60, 3e-4: 0.96}, 1e-4),  # the band's ends belong to it
        ({1e-4: 0.5999, 3e-4: 0.9501}, None),
        ({0.0: 0.9, 1e-4: 0.5}, 0.0),
        ({1e-4: 0.62, 2e-4: 0.91}, 2e-4),  # nearer by ratio (1.21 against 1.22), further by difference
    ],
)
def test_recommended_is_the_healthy_one_nearest_to_the_middle(mus, best):
    assert search_decay.recommend(mus) == best


def test_if_no_candidate_fits_it_gives_advice_and_writes_the_results(tmp_path, words, fake_train, capsys):
    ran = fake_train(lambda decay: 1.3 - decay)
    assert search_decay.main(words) == 1
    out = capsys.readouterr().out
    assert "no lambda has mu from 0.60 to 0.95; nearest is 0.001 with 1.299" in out
    assert "add a lambda above 0.001 to --candidates" in out
    assert ran == ["dense", "decay-0", "decay-0.001"]
    written = json.loads((tmp_path / "search" / "search.json").read_text())
    assert (written["masked_decay"], written["command"]) == (None, None)
    assert (tmp_path / "search" / "search.png").exists()
    assert search_decay.main([*words, "--candidates=0,1e-3,0.6"]) == 0
    assert ran == ["dense", "decay-0", "decay-0.001", "decay-0.6"]


@pytest.mark.parametrize(
    ("mus", "advice"),
    [
        ({0.0: 0.5, 1e-3: 0.4}, "no lambda will help: measure later"),
        ({0.0: 1.1, 1e-3: 0.2}, "add a lambda above 0 to --candidates"),
        ({0.0: 1.1, 1e-3: 0.59}, "add a lambda below 0.001 to --candidates"),
    ],
)
def test_the_advice_follows_the_nearest_candidate(words, mus, advice):
    search = search_decay.prepare(*search_decay.parse(words))
    rates = {"flip_rate": 1.0, "mu_smallest": 1.0, "mu_largest": 1.0}
    search.results = {decay: rates | {"mu": mu} for decay, mu in mus.items()}
    assert advice in search_decay.report(search)


def test_a_method_with_a_layer_of_its_own_is_searched_too(tmp_path, words, fake_train):
    fake_train(lambda decay: 1.1 if decay == 0 else 0.8)
    assert search_decay.main([*words, "--sparse=bi_mask"]) == 0
    assert json.loads((tmp_path / "search" / "search.json").read_text())["masked_decay"] == 1e-3


def test_advice_and_figure(tmp_path, words, fake_train, monkeypatch, capsys):
    fake_train(lambda decay: 1.1 if decay == 0 else 0.8)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert search_decay.main(words) == 0
    assert not (tmp_path / "search" / "search.png").exists()
    out = capsys.readouterr().out
    assert "pip install matplotlib" in out
    command = next(line for line in out.splitlines() if line.startswith("    python train.py"))
    assert shlex.split(command)[2:] == [*words[: len(TINY) + 1], "--sparse=fst", "--masked_decay=0.001"]
    assert f"--flip_reference={tmp_path / 'search' / 'dense'}" in out

    pytest.importorskip("matplotlib", reason="search_decay.py draws with matplotlib")
    drawn = []
    monkeypatch.setattr(search_decay, "finish", lambda figure, path: drawn.append(figure))
    search_decay.main(words)
    [axes] = drawn[0].axes
    expected = {"dense", "λ = 0, μ = 1.10", "λ = 0.001, μ = 0.80 (recommended)", "healthy: 0.60 to 0.95 of dense"}
    assert set(axes.get_legend_handles_labels()[1]) == {*expected, "window"}
    assert axes.get_yscale() == "log"
    first = [y for x, y in axes.collections[0].get_paths()[0].vertices if x == 0]  # the band at step 0
    dense = axes.lines[0].get_ydata()[0]
    assert (min(first), max(first)) == pytest.approx((0.60 * dense, 0.95 * dense))


def test_defaults_are_train_s_and_options_do_not_hide_a_setting():
    defaults = search_decay.train_defaults()
    names = set(search_decay.setting_names(defaults))
    assert not vars(search_decay.parse([])[0]).keys() & names
    expected = {name: vars(train)[name] for name in search_decay.setting_names(vars(train))}
    assert {name: defaults[name] for name in search_decay.setting_names(defaults)} == expected
    assert search_decay.configure(defaults, ["--compile=None"]) == {"compile": None}


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert search_decay.parse(["--search_dir=~/search"])[0].search_dir == "/home/me/search"
