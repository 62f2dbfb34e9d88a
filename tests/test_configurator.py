"""configurator: what is accepted, what is refused and in which words, precedence, isolation, help."""

import errno
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import configurator
from configurator import REMOVED, ConfigError, check_ranges, configure, configure_or_exit, expand, without_removed


def settings():
    """A script's globals(): six settings and six things that are none."""
    others = {"__name__": "__main__", "_private": 1, "math": math, "helper": lambda: None, "betas": (0.9, 0.95)}
    annotations = {"compile": bool | None, "wandb_project": "str | None"}
    numbers = {"max_iters": 100, "learning_rate": 6e-4, "overwrite": False, "out_dir": "out"}
    return others | numbers | {"compile": None, "wandb_project": None, "__annotations__": annotations}


def write(folder, text, name="x.py"):
    path = folder / name
    path.write_text(text)
    return str(path)


def give(*argv):
    return configure(settings(), list(argv))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--max_iters=200", 200),
        ("--max_iters=-1", -1),
        ("--max_iters=8*5", 40),
        ("--max_iters=(2+3)*4-10//3", 17),
        ("--max_iters=1_000", 1000),
        ("--learning_rate=2e-4", 2e-4),
        ("--learning_rate=1", 1.0),
        ("--learning_rate=1/6", 1 / 6),
        ("--learning_rate=-.5", -0.5),
        ("--overwrite=True", True),
        ("--overwrite=False", False),
        ("--compile=None", None),
        ("--compile=True", True),
        ("--out_dir=out-7", "out-7"),
        ("--out_dir=123", "123"),
        ("--out_dir=None", "None"),
        ("--out_dir='a b'", "a b"),
        ('--out_dir="7"', "7"),
        ("--out_dir='", "'"),
        ("--out_dir=a=b", "a=b"),
        ("--wandb_project=None", None),
        ("--wandb_project='None'", "None"),
    ],
)
def test_word_gives_the_value_in_the_type_of_the_setting(word, expected):
    (value,) = give(word).values()
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--max_iters=1e3", r"'max_iters' on the command line: got 1000.0, need an int; write --max_iters=1000$"),
        ("--max_iters=8/2", r"got 4.0, need an int; write --max_iters=4$"),
        ("--max_iters=1/6", r"got 0.16666666666666666, need an int; its default is 100"),
        ("--max_iters=True", r"got 'True', need an int"),
        ("--max_iters=", r"got '', need an int"),
        ("--max_iters=1j", r"got '1j', need an int"),
        ("--learning_rate=fast", r"got 'fast', need a float; its default is 0.0006"),
        ("--learning_rate=1/0", r"got '1/0', need a float"),
        ("--learning_rate=None", r"got 'None', need a float"),
        ("--learning_rate=__import__('os').getpid()", r"need a float"),
        ("--overwrite=1", r"got '1', need True or False; write --overwrite=True$"),
        ("--overwrite=true", r"got 'true', need True or False; write --overwrite=True$"),
        ("--compile=maybe", r"got 'maybe', need True or False or None; its default is None$"),
        ("--out_dir=", r"got '', need the path of a folder; write --out_dir=out$"),
        ("--out_dir= ", r"got ' ', need the path of a folder; write --out_dir=out$"),
        ("--overwrite", r"'--overwrite' .* not of the form --name=value; write --overwrite=True"),
        ("--max_iters", r"write --max_iters=100"),
        ("-max_iters=5", r"not of the form --name=value; write --max_iters=5"),
        ("max_iters=5", r"cannot read config file 'max_iters=5'.*; write --max_iters=5"),
        ("--learing_rate=1", r"unknown setting 'learing_rate' on the .*; did you mean 'learning_rate'\? write --learn"),
        ("--zzz=1", r"unknown setting 'zzz' on the command line; --help lists the settings"),
        ("--_private=2", r"unknown setting '_private'"),
        ("--math=2", r"unknown setting 'math'"),
        ("--betas=2", r"unknown setting 'betas'"),
        ("config/nowhere.py", r"cannot read config file 'config/nowhere.py' \(No such file.*config/name.py"),
    ],
)
def test_wrong_word_is_refused_with_a_remedy(word, message):
    with pytest.raises(ConfigError, match=message):
        give(word)


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        (["--compile", "False"], "--compile=False"),
        (["--max_iters", "8", "--overwrite=True"], "--max_iters=8"),
        (["--max_iters", "=", "8"], "--max_iters=8"),
        (["--max_iters=", "8"], "--max_iters=8"),
        (["--max_iters", "=8"], "--max_iters=8"),
        (["--max_iters:8"], "--max_iters=8"),
        (["--max_iters==8"], "--max_iters=8"),
        (["--max_iters", "-1"], "--max_iters=-1"),
        (["--max_iters=\u22121"], "--max_iters=-1"),
        (["--learning_rate=6e\u20134"], "--learning_rate=6e-4"),
        (["-max_iters", "8"], "--max_iters=8"),
        (["\u2014compile=False"], "--compile=False"),
        (["\u2013\u2013max_iters", "8"], "--max_iters=8"),
        (["\u2013-max_iters=8"], "--max_iters=8"),
        (["max_iters=8"], "--max_iters=8"),
        (["--max-iters=8"], "--max_iters=8"),
        (["--Max_Iters", "8"], "--max_iters=8"),
        (["--MAX\u2010ITERS=8"], "--max_iters=8"),
        (["--maxiters=8"], "--max_iters=8"),
        (["--no-compile"], "--compile=False"),
        (["--no_overwrite"], "--overwrite=False"),
        (["--compile"], "--compile=True"),
        (["--compile", "--max_iters=8"], "--compile=True"),
        (["--compile", "some.py"], "--compile=True"),
        (["--overwrite=false"], "--overwrite=False"),
        (["--compile=NONE"], "--compile=None"),
        (["--compile=False\r"], "--compile=False"),
        (["--out_dir", "--max_iters=8"], "--out_dir=out"),
        (["--out_dir", "a b"], "--out_dir=a b"),
        (["-out_dir=a=b"], "--out_dir=a=b"),
        (["--learning_rate", "fast"], "--learning_rate=fast"),
    ],
    ids=" ".join,
)
def test_the_remedy_for_a_slip_repeats_what_was_typed_and_can_be_pasted(typed, remedy):
    with pytest.raises(ConfigError, match="write") as refusal:
        give(*typed)
    assert shlex.split(str(refusal.value).rpartition("write ")[2]) == [remedy]
    if remedy != "--learning_rate=fast":
        assert len(give(remedy)) == 1


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_setting_is_refused_with_what_replaces_it(tmp_path, name):
    replacement = rf"was removed after commit 7ffc73d: {re.escape(REMOVED[name][1])}$"
    for word, where in ((f"--{name}=1", "on the command line"), (write(tmp_path, f"{name} = 1"), r"in .*x\.py")):
        with pytest.raises(ConfigError, match=rf"^{name} {where} {replacement}"):
            give(word)
    assert configure({name: 3}, [f"--{name}=1"]) == {name: 1}, "another script may have a setting of that name"


@pytest.mark.parametrize("recipe", ["none", "fst", "s_ste", "bi_mask"])
@pytest.mark.parametrize("name", REMOVED)
def test_a_saved_run_is_taken_if_its_removed_settings_have_the_value_that_every_run_has_now(name, recipe):
    values, replacement = REMOVED[name]
    value = values.get(recipe, values[""]) if isinstance(values, dict) else values
    present, changed = {"n_layer": 3, "sparse": recipe}, {name: "another"}
    assert without_removed(present, "ckpt.pt") == without_removed({**present, name: value}, "ckpt.pt") == present
    if value is None or (recipe == "none" and isinstance(values, dict)):  # no weight depends on it
        assert without_removed(present | changed, "ckpt.pt") == present
        return
    message = f"ckpt.pt has {name}='another', need {value!r}: the setting was removed after commit 7ffc73d: "
    with pytest.raises(ConfigError, match=re.escape(f"{message}{replacement}; use that commit, or another out_dir")):
        without_removed(present | changed, "ckpt.pt")


def test_file_gives_its_public_scalars_and_helpers_are_ignored(tmp_path):
    text = "from __future__ import annotations\n"
    text += (
        "import math\nfrom pathlib import Path\nfrom os.path import join\nimport numpy as np\nfrom numpy import sqrt\n"
    )
    text += "_tokens = 2**10\ndef _double(x): return 2 * x\n_table = [1, 2]\n"
    text += "max_iters = _double(_tokens)\nlearning_rate = {}\ncompile = None"
    for learning_rate, value in (("1", 1.0), ("np.sqrt(2.0) * 1e-4", math.sqrt(2.0) * 1e-4)):
        settings = give(write(tmp_path, text.format(learning_rate)))
        assert settings == {"max_iters": 2048, "learning_rate": value, "compile": None}
        assert type(settings["learning_rate"]) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_iters = 100.0", r"setting 'max_iters' in .*x\.py: got 100.0, need an int; write max_iters=100$"),
        ("max_iters = True", r"'max_iters' in .*x\.py: got True, need an int"),
        ("max_iters = [100]", r"'max_iters' in .*x\.py: got \[100\], need an int"),
        ("learning_rate = '1e-3'", r"got '1e-3', need a float"),
        ("learning_rate = 10**400", r"need a float"),
        ("overwrite = 1", r"got 1, need True or False"),
        ("out_dir = None", r"got None, need a string; its default is 'out'"),
        ("learing_rate = 1e-3", r"unknown setting 'learing_rate' in .*x\.py; did you mean 'learning_rate'\?"),
        ("for i in range(3): pass", r"unknown setting 'i' in .*x\.py; name a helper _i"),
        ("betas = 0.9, 0.95", r"unknown setting 'betas' in .*x\.py; name a helper _betas"),
        ("Max_Iters = [3]", r"unknown setting 'Max_Iters' in .*x\.py; did you mean 'max_iters'\?$"),
        ("import numpy as np\ntable = np.ones(2)", r"unknown setting 'table' in .*x\.py; name a helper _table"),
        ("table = {}", r"unknown setting 'table' in .*x\.py; name a helper _table"),
        ("def get(): pass", r"unknown setting 'get' in .*x\.py; name a helper _get"),
        ("class Table: pass", r"unknown setting 'Table' in .*x\.py; name a helper _Table"),
        ("get = lambda: 0", r"unknown setting 'get' in .*x\.py; name a helper _get"),
        ("class _T: pass\ntable = _T()", r"unknown setting 'table' in .*x\.py; name a helper _table"),
        ("out_dir = ''", r"setting 'out_dir' in .*x\.py: got '', need the path of a folder; its default is 'out'"),
        ("max_iters = 1\nlearning_rate = (\n", r"x\.py, line 2: SyntaxError: '\(' was never closed"),
        ("\nmax_iters = 1 / 0\n", r"x\.py, line 2: ZeroDivisionError: division by zero"),
        ("_a = 1\nout_dir = str(max_iters)", r"x\.py, line 2: NameError: .*'max_iters'.*cannot read the script's set"),
        ("out_dir = 'a'\nmax_iters: 3", r"x\.py, line 2: SyntaxError: this sets nothing; .* write name = value$"),
        ('{"max_iters": 3}', r"x\.py, line 1: SyntaxError: this sets nothing"),
        ("max_iters == 3", r"x\.py, line 1: SyntaxError: this sets nothing"),
        ("import sys\nsys.exit()", r"x\.py, line 2: SystemExit: "),
        ("import no_such_module_here", r"x\.py, line 1: ModuleNotFoundError: No module named 'no_such_module_here'"),
    ],
)
def test_wrong_file_is_refused_with_its_name_and_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        give(write(tmp_path, text))


def test_a_number_must_be_finite_and_in_its_range():
    ranges = {"n": (1, 8), "x": (0, math.inf)}
    for n, x in ((1, 0), (8, 1e308), (None, 0.5)):
        check_ranges({"n": n, "x": x, "text": "other"}, ranges)
    for n in (0, 9, 10**400, math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"^n={n}, need at least 1 and at most 8$"):
            check_ranges({"n": n, "x": 0}, ranges)
    for x in (-1e-9, math.nan, math.inf, -math.inf, 10**400):
        with pytest.raises(ConfigError, match=f"^x={x}, need at least 0 and finite$"):
            check_ranges({"n": 1, "x": x}, ranges)


def test_a_tilde_is_the_home_folder_in_paths_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert give("--out_dir=~/run", "--wandb_project=~x") == {"out_dir": f"{tmp_path}/run", "wandb_project": "~x"}
    write(tmp_path, "out_dir = '~/a'\n")
    assert give("~/x.py") == {"out_dir": f"{tmp_path}/a"}
    assert expand("~root/run") == os.path.expanduser("~root/run") != "~root/run"
    assert give("--out_dir=./~x", "--out_dir=a~b") == {"out_dir": "a~b"}


@pytest.mark.parametrize("home", ["", "elsewhere"])
@pytest.mark.parametrize("path", ["~/run", "~"])
def test_without_a_home_folder_a_tilde_is_refused(monkeypatch, home, path):
    monkeypatch.setenv("HOME", home)
    for typed in (f"--out_dir={path}", path):
        with pytest.raises(ConfigError, match=f"^'{path}': no home folder is known for ~; write the complete path$"):
            give(typed)
    with pytest.raises(ConfigError, match="no home folder is known for ~nobody_here"):
        give("--out_dir=~nobody_here/run")


def test_later_word_wins_and_only_what_was_given_comes_back(tmp_path):
    assert give() == {}
    assert give("--out_dir=out") == {"out_dir": "out"}, "given explicitly, though equal to the default"
    a = write(tmp_path, "max_iters = 1\nout_dir = 'a'\n", "a.py")
    b = write(tmp_path, "max_iters = 2\n", "b.py")
    assert give(a, b) == {"max_iters": 2, "out_dir": "a"}
    assert give(b, a) == {"max_iters": 1, "out_dir": "a"}
    assert give(a, "--max_iters=3", b)["max_iters"] == 2
    assert give(a, b, "--max_iters=3", "--max_iters=4")["max_iters"] == 4


def test_file_runs_alone_and_changes_nothing(tmp_path):
    text = "_seen = sorted(set(globals()) - {'__builtins__'})\nout_dir = ' '.join(_seen)\n"
    path, defaults = write(tmp_path, text), settings()
    before = dict(defaults)
    first, second = configure(defaults, [path]), configure(defaults, [path])
    assert first == second == {"out_dir": "__file__ __name__"}
    assert defaults == before
    with pytest.raises(ConfigError, match="NameError"):
        give(write(tmp_path, "max_iters = 7\n", "a.py"), write(tmp_path, "out_dir = str(max_iters)\n", "b.py"))


@pytest.mark.parametrize("annotations", ["__annotations__", "__annotate__"])  # Python 3.14 has the latter
def test_annotation_decides_the_type(annotations):
    def take(default, kind, text):
        kinds = {"n": kind}
        value = kinds if annotations == "__annotations__" else lambda form: kinds if form == 1 else None
        return configure({"n": default, annotations: value}, [f"--n={text}"])["n"]

    assert take(0, float, "0.1") == 0.1
    assert take(None, "int | None", "5") == 5
    assert take(None, int | None, "None") is None
    for text, value in (("3", 3), ("True", True), ("fast", "fast")):
        assert take("auto", str | int | bool, text) == value


@given(st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_survives(value):
    x = configure({"x": 1.0}, [f"--x={value!r}"])["x"]
    assert (x, math.copysign(1, x)) == (float(value), math.copysign(1, value))
    assert isinstance(value, float) or configure({"n": 1}, [f"--n={value}"]) == {"n": value}


@given(st.text())
def test_every_string_survives_in_quotes(value):
    assert configure({"s": ""}, [f"--s='{value}'"]) == {"s": value}
    if value[:1] not in ("'", '"'):
        assert configure({"s": ""}, [f"--s={value}"]) == {"s": value}


SCRIPT = '''"""A script."""

import sys

from configurator import configure_or_exit

_hidden = 1
# ---- data ----
dataset = "owt"  # folder under data/
batch_size: int = 12  # sequences per micro-step,
#                       a comment line of its own belongs to nobody
# -- optimiser
learning_rate = 6e-4
compile: bool | None = None  # None: where it helps
text = "# not a comment"
# ---- end of settings ----
globals().update(configure_or_exit(globals(), sys.argv[1:]))
print(batch_size, compile)


def train():
    batch_size = 1  # not a setting
'''

HELP = """\
usage: python script.py [config/file.py ...] [--name=value ...]     later arguments win

data
  --dataset=owt                         str        folder under data/
  --batch_size=12                       int        sequences per micro-step,

optimiser
  --learning_rate=0.0006                float
  --compile=None                        bool|None  None: where it helps
  --text=# not a comment                str
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Run SCRIPT in a process of its own: (exit status, stdout, stderr)."""
    monkeypatch.setenv("PYTHONPATH", str(sys.modules["configurator"].__file__.rpartition("configurator.py")[0]))
    path = write(tmp_path, SCRIPT, "script.py")

    def run(*argv):
        done = subprocess.run([sys.executable, path, *argv], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["\u2014help"], ["nowhere.py", "--batch_size=x", "--help"]])
def test_help_prints_every_setting_with_heading_and_comment(script, argv):
    assert script(*argv) == (0, HELP, "")


def test_script_takes_overrides_and_reports_an_error_in_one_line(script):
    assert script("--batch_size=3", "--compile=False") == (0, "3 False\n", "")
    message = "script.py: error: unknown setting 'batchsize' on the command line; did you mean 'batch_size'? "
    assert script("--batchsize=3") == (2, "", f"{message}write --batch_size=3\n")


def test_an_error_of_a_config_file_in_several_lines_is_printed_in_one(script, tmp_path):
    path = write(tmp_path, "raise RuntimeError('first\\nsecond')")
    assert script(path) == (2, "", f"script.py: error: {path}, line 1: RuntimeError: first second\n")


def test_help_without_a_source_still_lists_the_settings(capsys):
    with pytest.raises(SystemExit, match="0"):
        configure_or_exit(settings(), ["--help"])
    assert "--learning_rate=0.0006 " in capsys.readouterr().out


@pytest.mark.parametrize("error", [BrokenPipeError(32, "x"), OSError(5, "x"), OSError(28, "x"), ValueError("closed")])
def test_a_console_that_fails_loses_text_and_prints_again_later(error):
    class Stream(io.StringIO):
        failing = True

        def write(self, text):
            if self.failing:
                raise error
            return super().write(text)

        def flush(self):
            if self.failing:
                raise error

    stream = Stream()
    console = configurator.Console(stream)
    print("lost", file=console, flush=True)
    stream.failing = False
    print("printed", file=console, flush=True)
    assert stream.getvalue() == "printed\n"
    assert console.isatty() is False


def test_keep_console_takes_closed_streams_and_characters_that_a_terminal_lacks(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", None)
    configurator.keep_console()
    print("λ and \udcff", flush=True)
    print("lost", file=sys.stderr, flush=True)
    assert terminal.buffer.getvalue() == rb"\u03bb and \udcff" + b"\n"


def test_a_small_file_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path, done = tmp_path / "config.json", []
    configurator.write_json(path, {"a": [1, None]})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(path.read_text()) or replace(a, b))
    configurator.write_small_file(path, "second")
    assert (done[0], json.loads(done[1]), path.read_text()) == ("fsync", {"a": [1, None]}, "second")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *args: [][0])
            with pytest.raises(IndexError):
                configurator.write_small_file(path, "third")
        assert path.read_text() == "second"
        assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_without_fsync_costs_a_warning_and_a_broken_disk_an_error(tmp_path, monkeypatch, number):
    def fail(file):
        raise OSError(number, "refused")

    monkeypatch.setattr(os, "fsync", fail)
    ends = pytest.raises(OSError, match="refused") if number == errno.EIO else pytest.warns(match="fsync is not supp")
    with ends:
        configurator.write_small_file(tmp_path / "file", "text")
    assert (tmp_path / "file").exists() == (number != errno.EIO)


def test_a_temporary_file_does_not_follow_a_symbolic_link(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "config.json"
    victim.write_text("precious")
    for target in (victim, tmp_path / "nothing"):
        (tmp_path / f"config.json.{os.getpid()}.tmp").symlink_to(target)
        configurator.write_small_file(path, "text")
    assert (victim.read_text(), path.read_text(), path.is_symlink()) == ("precious", "text", False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "victim"]
