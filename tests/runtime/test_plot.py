"""runtime/plot.py: labels, changes of phase, and the two PNGs of finished and running runs."""

import json
import math
import re
import struct
import sys
from pathlib import Path

import pytest

from runtime import plot

pytest.importorskip("matplotlib", reason="plot.py draws with matplotlib")


def row(i, phase="sparse", **values):
    return {"iter": i, "phase": phase, "train_loss": 3 + math.exp(-i / 50), "val_loss": None, **values}


def write_run(folder, rows, tail="", **config):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def sparse_run(folder, **config):
    """200 iterations, dense from 160, a flip rate every 10 and a validation loss every 50."""
    rows = [row(i, "sparse" if i < 160 else "dense", flip_rate=0.01 * math.exp(-i / 80)) for i in range(0, 200, 10)]
    for r in rows[::5]:
        r["val_loss"] = r["train_loss"] + 0.1
    return write_run(folder, rows, **{"sparse": "fst", "masked_decay": 6e-5} | config)


def dense_run(folder, **values):
    return write_run(folder, [row(i, "dense", **values) for i in range(0, 200, 10)], sparse="none", masked_decay=6e-5)


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_two_runs_give_two_pngs_in_the_first_folder_or_in_out(tmp_path, capsys):
    a, b = sparse_run(tmp_path / "a"), dense_run(tmp_path / "b", flip_rate=0.02)
    plot.main([a, b])
    assert png_size(tmp_path / "a" / "loss.png") == (1040, 585)
    assert png_size(tmp_path / "a" / "flip_rate.png") == (1040, 585)
    assert not (tmp_path / "b" / "loss.png").exists()
    assert capsys.readouterr().out.count("wrote ") == 2
    plot.main([b, "--out", str(tmp_path / "new" / "plots")])
    assert sorted(p.name for p in (tmp_path / "new" / "plots").iterdir()) == ["flip_rate.png", "loss.png"]


def test_a_run_of_act24_gets_a_third_png_with_a_line_per_block(tmp_path, capsys, monkeypatch):
    counts = {"over_two": [0.2, 0.01], "energy_dropped": [0.01, None], "joined": [0, 1]}
    rows = [row(i, **({"zeros": [0.5, 0.9]} | counts if i % 20 == 0 else {})) for i in range(0, 200, 10)]
    figures, finish = [], plot.finish
    monkeypatch.setattr(plot, "finish", lambda figure, path: figures.append(figure) or finish(figure, path))
    act24 = write_run(tmp_path / "act24", rows, sparse="act24")
    plot.main([dense_run(tmp_path / "dense"), act24, "--out", str(tmp_path)])
    assert png_size(tmp_path / "activations.png") == (1040, 1170)
    assert "wrote" in capsys.readouterr().out.splitlines()[-1]
    for axes, column in zip(figures[-1].axes, plot.SHARES, strict=True):
        assert [len(line.get_xdata()) for line in axes.lines] == [10, 10], column
    labels = [line.get_label() for line in figures[-1].axes[0].lines]
    assert labels == ["act24 (act24), block 0", "act24 (act24), block 1"]


def test_a_switch_has_the_colour_of_its_run_and_is_grey_where_several_have_it(tmp_path):
    late = write_run(tmp_path / "late", [row(i, "dense" if i < 20 else "sparse") for i in range(0, 60, 10)])
    runs = plot.load_runs([sparse_run(tmp_path / "a"), sparse_run(tmp_path / "b"), late, dense_run(tmp_path / "c")])
    axes = plot.new_figure("t", "y")[1]
    plot.mark_switches(axes, runs)
    marks = [(text.get_text(), text.get_color()) for text in axes.texts]
    assert marks == [("dense from 160", "0.35"), ("sparse from 20", plot.COLOURS[2])]
    assert [(line.get_xdata()[0], line.get_color()) for line in axes.lines] == [(160, "0.35"), (20, plot.COLOURS[2])]
    assert plot.switches([row(0, "dense"), row(1), row(2, "dense")]) == {1: "sparse", 2: "dense"}


def test_label_is_the_folder_and_the_recipe(tmp_path):
    a, b = sparse_run(tmp_path / "x" / "run"), dense_run(tmp_path / "y" / "run")
    c = sparse_run(tmp_path / "ste", sparse="ste", masked_decay=0.0)
    (tmp_path / "ste2").mkdir()
    (tmp_path / "ste2" / "metrics.jsonl").write_text(json.dumps(row(0)) + "\n")
    labels = [run["label"] for run in plot.load_runs([a, b, c + "/", str(tmp_path / "ste2")])]
    assert labels == [f"{a} (fst, decay 6e-05)", f"{b} (dense)", "ste (ste)", "ste2"]


def test_a_label_is_drawn_as_it_is(tmp_path):
    folders = [dense_run(tmp_path / name) for name in ("_old", "lr$1e-3$", r"a$\frac$b")]
    assert plot.load_runs(folders)[0]["label"] == "./_old (dense)"
    plot.main([*folders, f"--out={tmp_path}"])  # no formula is parsed
    assert png_size(tmp_path / "loss.png")


def test_runs_differ_in_colour_and_then_in_line(tmp_path):
    runs = plot.load_runs([dense_run(tmp_path / str(i)) for i in range(2 * len(plot.COLOURS))])
    assert len({tuple(run["style"].values()) for run in runs}) == len(runs)


@pytest.mark.parametrize("flip", [None, 0.0, math.nan])
def test_without_a_flip_rate_only_the_loss_is_drawn(tmp_path, capsys, flip):
    plot.main([dense_run(tmp_path / "a", flip_rate=flip)])
    assert "no run has a flip rate above zero" in capsys.readouterr().out
    assert (tmp_path / "a" / "loss.png").exists()
    assert not (tmp_path / "a" / "flip_rate.png").exists()


def test_without_a_finite_loss_only_the_flip_rate_is_drawn(tmp_path, capsys):
    rows = [row(i, train_loss=None, val_loss=math.nan, flip_rate=0.5) for i in range(5)]
    plot.main([write_run(tmp_path / "a", [*rows, row(5, train_loss="3.1", flip_rate="high")])])
    assert f"no run has a finite loss; {tmp_path / 'a' / 'loss.png'} not written" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "a").glob("*.png")) == ["flip_rate.png"]


def test_first_row_alone_and_a_diverged_run_can_be_drawn(tmp_path):
    rows = [row(i, train_loss=math.nan, val_loss=math.inf, flip_rate=math.nan) for i in range(5)]
    plot.main([write_run(tmp_path / "nan", rows), write_run(tmp_path / "one", [row(0, flip_rate=0.5)], '{"iter": 1')])
    assert (tmp_path / "nan" / "flip_rate.png").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"no such run folder: .*nowhere'; give the out_dir of a run"),
        ("empty", r"no .*metrics\.jsonl yet; train\.py writes it"),
        ("starting", r"metrics\.jsonl has no complete line yet; try again later"),
        ("config", r"config\.json: .*; delete it to continue without the run's settings"),
        ("list", r"config\.json: .*; delete it to continue without the run's settings"),
        ("fine --out=file", r"File exists: 'file'"),
        ("fine --out=/proc/plots", r"'/proc/plots'"),
        ("~/nowhere", re.escape(f"no such run folder: '{Path.home() / 'nowhere'}'")),
        ("", "arguments are required: out-dir"),
        ("fine --size=3", "unrecognized arguments: --size=3"),
    ],
)
def test_error_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    sparse_run(tmp_path / "fine")
    write_run(tmp_path / "list", [row(0)])
    (tmp_path / "list" / "config.json").write_text("[1]")
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "starting", [], tail='{"it')
    write_run(tmp_path / "config", [row(0)])
    (tmp_path / "config" / "config.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        plot.main(name.split())
    assert stop.value.code == 2
    assert re.fullmatch(rf"plot\.py: error: [^\n]*{message}[^\n]*\n", capsys.readouterr().err)


def test_a_missing_matplotlib_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        plot.main([sparse_run(tmp_path / "a")])
    assert capsys.readouterr().err.endswith("; pip install matplotlib\n")
