"""The repo's shape: imports point down, importing needs neither GPU nor Triton, tests mirror the tree."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train
from configurator import configure, setting_names
from model import PRESETS

ROOT = Path(__file__).resolve().parent.parent
# A file imports only from what stands to its left.
ORDER = "configurator kernels | sparse24 | gemm24 | methods model | runtime | benchmarks | train bench sample studies"
FOLDERS = [".", *(name for name in ORDER.split() if (ROOT / name).is_dir())]
# Test files that belong to no module, all names of the form test_<name>.py or test_<name>_<part>.py.
BELONG_TO_NO_MODULE = {"structure", "docs", "two_files", "guard", "data", "gpu", "readme"}
CONFIGS = sorted((ROOT / "config").glob("*.py"))


def imported(path: Path) -> set[str]:
    """The modules of this repository that a file imports, as it names them: "sparse24", "runtime.ranks"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if (ROOT / f"{name.replace('.', '/')}.py").exists()}


def test_imports_point_left():
    place = {name: depth for depth, names in enumerate(ORDER.split("|")) for name in names.split()}
    files = list(ROOT.glob("*.py"))
    files += [path for name in place for path in (ROOT / name).glob("*.py")]
    for path in files:
        room = path.relative_to(ROOT).with_suffix("").parts[0]
        assert room in place, f"{path}: a new file needs its place in ORDER"
        for name in imported(path):
            other = name.split(".")[0]
            allowed = other == room or place[other] < place[room]
            assert allowed, f"{path} imports {name}, which does not stand to its left"


def test_imports_inside_a_folder_run_one_way():
    folders = [path for path in ROOT.iterdir() if (path / "__init__.py").exists()]
    for folder in folders:
        modules = {f"{folder.name}.{path.stem}": path for path in folder.glob("*.py")}
        graph = {name: imported(path) & modules.keys() for name, path in modules.items()}
        assert list(graphlib.TopologicalSorter(graph).static_order()), folder  # CycleError names a circle


def modules(folder: Path) -> set[str]:
    """Names of the folder's modules, without an `__init__.py` that holds nothing but its docstring."""
    parsed = {path.stem: ast.parse(path.read_text()) for path in folder.glob("*.py")}
    return {name for name, tree in parsed.items() if name != "__init__" or len(tree.body) > 1}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_has_its_test_file(folder):
    wanted = {f"test_{name}.py" for name in modules(ROOT / folder)}
    assert not wanted - {path.name for path in (ROOT / "tests" / folder).glob("*.py")}


def test_every_test_file_is_named_after_a_module_of_its_folder():
    """The folder is the one that tests/ mirrors, or tests/ itself for the tools of the tests."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests")
        names = modules(ROOT / folder) | modules(path.parent) | BELONG_TO_NO_MODULE
        beginnings = tuple(f"test_{name}_" for name in names)
        assert f"{path.stem}_".startswith(beginnings), f"{path} is named after no module"


def test_both_halves_of_make_test_together_are_all_tests():
    makefile = (ROOT / "Makefile").read_text()
    assert "\ntwo_halves = $(call side_by_side,$(1) $(2),$(1) tests $(2:%=--ignore=%))\n" in makefile
    assert re.findall(r"^\t\$\(call (\w+),-m ([^,]+),", makefile, re.MULTILINE) == [
        ("two_halves", '"not slow"'),
        ("two_halves", "slow"),
    ]


def test_model_imports_without_triton_and_optional_packages():
    hidden = ["triton", "matplotlib", "wandb", "datasets", "tiktoken", "transformers"]
    ours = "train, sample, gemm24.plan, runtime.plot"
    code = f"import sys\nfor n in {hidden}: sys.modules[n] = None\nimport {ours}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_names_only_settings_and_says_what_it_reproduces_and_costs(path):
    defaults = {name: vars(train)[name] for name in setting_names(vars(train))} | {
        "__annotations__": train.__annotations__
    }
    overrides = configure(defaults, [str(path)])
    assert {"out_dir", "dataset", "max_iters", "learning_rate"} <= overrides.keys()
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert re.search("[Rr]eproduces|baseline", text)
    assert "cost" in text.lower()


@pytest.mark.parametrize(
    ("name", "size", "decay"),
    [
        ("train_gpt2_sparse", "124M", 6e-5),
        ("train_gpt2_medium_sparse", "350M", 2e-4),
        ("train_gpt2_large_sparse", "774M", 2e-4),
        ("train_gpt2_xl_sparse", "1558M", 6e-5),
    ],
)
def test_gpt2_configs_are_the_papers(name, size, decay):
    """Table 1's decay factors, and the schedule of the paper's runs."""
    config = vars(train) | configure(vars(train), [str(ROOT / "config" / f"{name}.py")])
    assert {key: config[key] for key in PRESETS[size]} == PRESETS[size]
    assert config["batch_size"] * config["block_size"] * config["gradient_accumulation_steps"] == 524288
    assert (config["learning_rate"], config["min_lr"], config["warmup_iters"]) == (1.5e-4, 1e-5, 3000)
    assert (config["masked_decay"], config["mask_interval"], config["sparse"]) == (decay, 40, "fst")
    assert round(config["max_iters"] * (1 - config["dense_finetune"])) == 250000
