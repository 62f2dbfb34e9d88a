"""The structure of the repository: directions of imports, test files that mirror the tree, config files."""

import ast
import functools
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
# Modules and folders. Each imports only from groups to its left, and from itself.
ORDER = "configurator kernels | sparse24 | gemm24 | methods model | runtime | benchmarks | train bench sample studies"
FOLDERS = [".", *(name for name in ORDER.split() if (ROOT / name).is_dir())]
# Test files test_<name>.py that belong to no module
BELONG_TO_NO_MODULE = {"structure", "docs", "two_files", "data", "gpu", "readme"}
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
    depth = {name: number for number, names in enumerate(ORDER.split("|")) for name in names.split()}
    for path in [*ROOT.glob("*.py"), *(path for name in depth for path in (ROOT / name).glob("*.py"))]:
        importer = path.relative_to(ROOT).with_suffix("").parts[0]
        assert importer in depth, f"{path}: add the new file to ORDER"
        for name in imported(path):
            target = name.split(".")[0]
            assert target == importer or depth[target] < depth[importer], f"{path} imports {name}, not to its left"


def test_text_files_are_utf8_in_every_locale():
    """Bytes need no encoding, and json reads them as UTF-8."""
    for path in [*ROOT.glob("*.py"), *(path for name in FOLDERS[1:] for path in (ROOT / name).glob("**/*.py"))]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(call, "func", None), "attr", getattr(getattr(call, "func", None), "id", None))
            is_open = name == "open" and isinstance(call.func, ast.Name)
            binary = is_open and len(call.args) > 1 and "b" in call.args[1].value
            if (is_open and not binary) or name in ("read_text", "write_text"):
                assert "encoding" in {word.arg for word in call.keywords}, f"{path}:{call.lineno}: name the encoding"


def test_imports_inside_a_folder_run_one_way():
    folders = [path for path in ROOT.iterdir() if (path / "__init__.py").exists()]
    for folder in folders:
        modules = {f"{folder.name}.{path.stem}": path for path in folder.glob("*.py")}
        graph = {name: imported(path) & modules.keys() for name, path in modules.items()}
        assert list(graphlib.TopologicalSorter(graph).static_order()), folder  # CycleError names a cycle


@functools.cache
def modules(folder: Path) -> set[str]:
    """Names of the folder's modules. An `__init__.py` counts only if it has more than a docstring."""
    parsed = {path.stem: ast.parse(path.read_text()) for path in folder.glob("*.py")}
    return {name for name, tree in parsed.items() if name != "__init__" or len(tree.body) > 1}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_has_its_test_file(folder):
    expected = {f"test_{name}.py" for name in modules(ROOT / folder)}
    assert not expected - {path.name for path in (ROOT / "tests" / folder).glob("*.py")}


def test_every_test_file_is_named_after_a_module_of_its_folder():
    """The module is in the folder that the test folder mirrors, or, for helpers of the tests, in the test folder."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests")
        names = modules(ROOT / folder) | modules(path.parent) | BELONG_TO_NO_MODULE
        prefixes = tuple(f"test_{name}_" for name in names)
        assert f"{path.stem}_".startswith(prefixes), f"{path} is named after no module"


def test_the_two_halves_of_make_test_are_all_tests():
    makefile = (ROOT / "Makefile").read_text()
    assert "\ntwo_halves = $(call side_by_side,$(1) $(2),$(1) tests $(2:%=--ignore=%))\n" in makefile
    assert re.findall(r"^\t\$\(call (\w+),-m ([^,]+),", makefile, re.MULTILINE) == [
        ("two_halves", '"not slow"'),
        ("two_halves", "slow"),
    ]


def test_model_imports_without_triton_and_optional_packages():
    hidden = ["triton", "matplotlib", "wandb", "datasets", "tiktoken", "transformers"]
    code = f"import sys\nfor n in {hidden}: sys.modules[n] = None\nimport train, sample, gemm24.plan, runtime.plot"
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
    """The decay factors of Table 1, and the schedule of the paper's runs."""
    config = vars(train) | configure(vars(train), [str(ROOT / "config" / f"{name}.py")])
    assert {key: config[key] for key in PRESETS[size]} == PRESETS[size]
    assert config["batch_size"] * config["block_size"] * config["gradient_accumulation_steps"] == 524288
    assert (config["learning_rate"], config["min_lr"], config["warmup_iters"]) == (1.5e-4, 1e-5, 3000)
    assert (config["masked_decay"], config["mask_interval"], config["sparse"]) == (decay, 40, "fst")
    assert round(config["max_iters"] * (1 - config["dense_finetune"])) == 250000
