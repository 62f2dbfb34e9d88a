"""methods/README.md: its example trains, resumes and samples; files that define no method are refused."""

import ast
import re
import sys

import pytest
import torch
from harness import ROOT, SETTINGS, make_dataset, read_rows, read_state, run_here, state_differences

import methods
import sample
from sparse24 import MaskedDecayAdamW, Recipe, Sparse24Linear, get_recipe

README = (ROOT / "methods" / "README.md").read_text()
EXAMPLE = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]


@pytest.fixture
def write_method(tmp_path, monkeypatch):
    """write_method(name, source): a file in another folder that counts as methods/."""
    folder = tmp_path / "methods"
    folder.mkdir()
    monkeypatch.setattr(methods.__spec__, "submodule_search_locations", [*methods.__path__, str(folder)])
    monkeypatch.setattr(methods, "__path__", methods.__spec__.submodule_search_locations)

    def write(name, source):
        monkeypatch.delitem(sys.modules, f"methods.{name}", raising=False)
        (folder / f"{name}.py").write_text(source)

    return write


@pytest.fixture
def run(tmp_path):
    """run(fault=None, **settings): train.py with this method in tmp_path / "out"."""
    data = make_dataset(tmp_path / "data")

    def run(out="out", fault=None, **settings):
        chosen = {name: value for name, value in SETTINGS.items() if name not in ("mask_interval", "masked_decay")}
        return run_here(tmp_path / out, {**chosen, "dataset": data, **settings}, fault)

    return run


def test_the_example_trains_resumes_and_samples(write_method, run, tmp_path, monkeypatch, capsys):
    write_method("random_mask", EXAMPLE)
    settings = {"sparse": "random_mask", "mvue": False}
    done = run("whole", **settings)
    assert "done: 32 iterations" in done.stdout, done.stderr
    rows, state = read_rows(tmp_path / "whole"), read_state(tmp_path / "whole")
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    layer = "transformer.h.0.mlp.c_fc"
    model = get_recipe("random_mask").layer(32, 128, False, "random_mask")
    model.begin_step(1337, 30, 0)  # masks are drawn at 0, 10, 20 and 30
    assert torch.equal(state["model"][f"{layer}.index"], model.index)

    stopped = run("parts", {"kind": "signal", "signal": "SIGTERM", "iter_num": 13, "micro_batch": 1}, **settings)
    assert "stopped after iteration 14" in stopped.stdout, stopped.stderr
    run("parts", **settings)
    assert state_differences(read_state(tmp_path / "parts"), state) == []

    monkeypatch.setattr(sample, "out_dir", str(tmp_path / "whole"))
    model, _ = sample.load_model()
    assert type(model.transformer.h[0].mlp.c_fc).__name__ == "RandomMaskLinear"
    assert "iteration 32, 4 of 4 sparse linears in the 2:4 phase" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "",
            r"methods/mine\.py has no RECIPE of the file's name, need RECIPE = Recipe\(.mine., .*; there it is None",
        ),
        (
            "from sparse24 import Recipe\nRECIPE = Recipe('yours')",
            r"methods/mine\.py has no RECIPE .*; there it is 'yours'",
        ),
        ("RECIPE = 'mine'", r"methods/mine\.py has no RECIPE .*; there it is 'mine'"),
        ("import nothing", r"methods/mine\.py cannot be imported: ModuleNotFoundError: No module named 'nothing'"),
        ("RECIPE = Recipe('mine')", r"methods/mine\.py cannot be imported: NameError: name 'Recipe' is not defined"),
        ("RECIPE = (", r"methods/mine\.py cannot be imported: SyntaxError: '\(' was never closed \(mine\.py, line 1\)"),
        (None, r"recipe 'mine' is unknown, need one of fst, ste, sr_ste, s_ste, s_ste_straight, .*; a new"),
    ],
    ids=["no RECIPE", "another name", "no recipe", "no module", "no name", "no Python", "no file"],
)
def test_a_file_that_defines_no_method_is_refused_in_one_line(write_method, run, source, message):
    if source is not None:
        write_method("mine", source)
    with pytest.raises(ValueError, match=message):
        get_recipe("mine")
    done = run(sparse="mine")
    assert done.returncode == 1
    assert re.fullmatch(rf"train\.py: error: {message}[^\n]*\n", done.stderr)


def test_a_file_with_the_name_of_a_recipe_of_sparse24_is_refused(write_method):
    write_method("fst", "")
    with pytest.raises(ValueError, match=r"methods/fst\.py has the name of a recipe in sparse24\.py; rename the file"):
        get_recipe("fst")


def test_a_misspelt_name_is_guessed():
    with pytest.raises(ValueError, match=r"recipe 'bi-mask' is unknown, .*; did you mean 'bi_mask'\?"):
        get_recipe("bi-mask")


def test_the_example_draws_its_mask_in_the_first_sparse_step(write_method, run, tmp_path):
    """Before the evaluation and the save of that iteration, also where mask_interval does not divide it."""
    write_method("random_mask", EXAMPLE)
    run("out", sparse="random_mask", mvue=False, dense_pretrain=0.25, max_iters=12, dense_start=12, keep_every=1)
    drawn = get_recipe("random_mask").layer(32, 128, False, "random_mask")
    drawn.begin_step(1337, 3, 0, begin=True)
    saved = read_state(tmp_path / "out", "ckpt_00000003.pt")["model"]["transformer.h.0.mlp.c_fc.index"]
    assert torch.equal(saved, drawn.index)


@pytest.mark.parametrize("name", ["../step", "a.b", "", "2:4", "none"])
def test_only_files_of_the_folder_are_methods(name):
    with pytest.raises(ValueError, match="is unknown, need one of fst"):
        get_recipe(name)


def test_every_method_opens_with_its_equations_and_has_a_recipe_of_its_name():
    for path in (ROOT / "methods").glob("[!_]*.py"):
        assert re.search("W|dX", ast.get_docstring(ast.parse(path.read_text())))
        assert get_recipe(path.stem).name == path.stem


def test_the_readme_names_existing_hooks():
    hooks = re.findall(r"^\| (layer|optimizer) \| `(\w+)", README, re.MULTILINE)
    classes = {"layer": Sparse24Linear, "optimizer": MaskedDecayAdamW}
    assert len(hooks) == 10
    for kind, name in hooks:
        assert name == "dense_start_log" or name in vars(classes[kind]), name
    assert {"layer", "optimizer"} <= Recipe.__dataclass_fields__.keys()
