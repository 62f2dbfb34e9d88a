"""A script's settings, from config files and the command line, as in nanoGPT but checked.

A script's settings are its public globals that hold an int, float, bool, str or None. A user changes them with

    python train.py config/gpt2_124m.py --batch_size=8 --learning_rate=6e-4

Later arguments win. nanoGPT executes config files inside the script's globals, so a misspelt name has no effect and a
wrong type raises an error hours later. Here a file runs in a fresh dict, and every name and type is checked before the
script does anything else: `globals().update(configure_or_exit(globals(), sys.argv[1:]))`.
"""

import ast
import contextlib
import difflib
import errno
import json
import math
import operator
import os
import re
import shlex
import sys
import traceback
import typing
import warnings

NoneType = type(None)
NEEDS = {bool: "True or False", int: "an int", float: "a float", str: "a string", NoneType: "None"}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
OPERATORS |= {ast.FloorDiv: operator.floordiv, ast.USub: operator.neg, ast.UAdd: operator.pos}
PATHS = ("out_dir", "dataset", "flip_reference")  # settings in which ~ is the home folder
_DASHES = dict.fromkeys(range(0x2010, 0x2016), "-") | {0x2212: "-"}  # for str.translate; word processors write these
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "none": None}

# Settings that train.py had up to this commit: {name: (the value that all runs use now, what replaces the setting)}.
# A dict has a value for each recipe, and "" for all others. None means any value: no weight depends on the setting.
LAST_WITH_REMOVED = "7ffc73d"
_IN_RECIPE = "it is a field of the recipe: edit RECIPES in sparse24.py"
_IN_METHOD = "it belongs to the method: edit methods/{}.py"
REMOVED = {
    "masked_decay_auto": (False, "studies.search_decay finds a decay factor before the run"),
    "masked_decay_auto_interval": (None, "studies.search_decay finds a decay factor before the run"),
    "checkpoint_async": (None, "checkpoints are always written in a thread"),
    "wandb_mode": (None, "set the environment variable WANDB_MODE"),
    "max_skipped": (None, "edit MAX_SKIPPED in runtime/health.py"),
    "check_interval": (None, "ranks are compared at each save, every checkpoint_interval steps"),
    "backend": (None, "ranks meet by nccl on GPUs and by gloo on CPUs"),
    "flip_layers": (None, "sparse24.flip_rate measures a layer's flip rate from its masks in two checkpoints"),
    "ffn_recompute": (None, "the backward always recomputes the activation of a 2:4 FFN"),
    "sparse_layers": ("ffn", "a GPT is sparse in its FFNs; sparse24.sparsify makes other linears sparse"),
    "dense_blocks": (0, "all blocks are sparse; sparse24.sparsify makes chosen linears sparse"),
    "rewarm_iters": (0, "the learning rate is warmed up once, at the start"),
    "decay_schedule": ("constant", "masked_decay is constant"),
    "mvue_estimator": ("exact", "MVUE is the exact one; sparse24.mvue24_sequential is the predecessors'"),
    "mvue_layers": ("", "mvue is for all sparse layers"),
    "decay_on": ({"sr_ste": "weight", "": "grad"}, _IN_RECIPE),
    "mask": ({"s_ste": "soft", **dict.fromkeys(("sr_ste", "step", "bi_mask"), "row"), "": "transposable"}, _IN_RECIPE),
    "backward_mask": ({"bi_mask": "own", "": "same"}, _IN_METHOD.format("bi_mask")),
    "permutation_interval": ({"bi_mask": 100, "": 0}, _IN_METHOD.format("bi_mask")),
    "precondition": ({"step": True, "": False}, _IN_METHOD.format("step")),
    "autoswitch": ({"step": True, "": False}, _IN_METHOD.format("step")),
    "beta": ({"s_ste": "init", "": "none"}, "soft weights have a scale that is fixed when the sparse phase begins"),
    "weight_gradient": ({"s_ste": "true", "": "straight"}, "sparse=s_ste has the true one, s_ste_straight the other"),
    "fp8": (False, _IN_RECIPE),
}


class ConfigError(ValueError):
    """A mistake in a setting, file or argument; the message names the remedy."""


def configure(defaults, argv):
    """Return {name: value} of the settings given in `argv`, checked; an int is converted to float where needed.

    `defaults`: a script's globals(), with annotations for settings such as `compile: bool | None = None`.
    `argv`: config file paths and --name=value, or --help, which prints every setting and raises SystemExit(0).
    Raises ConfigError for mistakes of the user.
    """
    kinds = _kinds(defaults)
    if any(word.translate(_DASHES) in ("-h", "-help", "--help") for word in argv):
        _print_help(defaults, kinds)
        raise SystemExit(0)
    overrides = {}
    for place, word in enumerate(argv):
        read = _read_word if word.translate(_DASHES).startswith("-") else _read_file
        overrides |= read(word, _meant(word, argv[place + 1 :], defaults, kinds), defaults, kinds)
    return overrides


def configure_or_exit(defaults, argv):
    """`configure`, but a ConfigError prints one line to stderr, `train.py: error: ...`, and exits with status 2."""
    try:
        return configure(defaults, argv)
    except ConfigError as error:
        print(f"{_script_name(defaults)}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def setting_names(defaults):
    """The names of a script's settings, in the order of its source."""
    return list(_kinds(defaults))


def check_ranges(settings: dict, ranges: dict) -> None:
    """Raise ConfigError unless each setting in `ranges`, {name: (least, most)}, is finite and in between, or None."""
    for name, (least, most) in ranges.items():
        if settings[name] is not None and not least <= settings[name] <= min(most, sys.float_info.max):  # NaN too
            end = "finite" if most == math.inf else f"at most {most}"
            raise ConfigError(f"{name}={settings[name]}, need at least {least} and {end}")


def expand(path: str) -> str:
    """`path` with ~ and ~user replaced by the home folder. Raises ConfigError if there is none."""
    expanded = path if os.environ.get("HOME") == "" else os.path.expanduser(path)
    if path.startswith("~") and not os.path.isabs(expanded):
        raise ConfigError(f"{path!r}: no home folder is known for {path.split('/')[0]}; write the complete path")
    return expanded


def without_removed(saved: dict, source) -> dict:
    """A saved run's settings or model_args, read from the file `source`, without the settings in REMOVED.

    Raises ConfigError if one of these has another value than all runs use now, because the run would change.
    """
    recipe = saved.get("sparse", "none")
    for name, (current, replacement) in REMOVED.items():
        if isinstance(current, dict):
            current = None if recipe == "none" else current.get(recipe, current[""])
        if current is not None and saved.get(name, current) != current:
            raise ConfigError(
                f"{source} has {name}={saved[name]!r}, need {current!r}: the setting was removed after commit "
                f"{LAST_WITH_REMOVED}: {replacement}; use that commit, or another out_dir"
            )
    return {name: value for name, value in saved.items() if name not in REMOVED}


def _script_name(defaults):
    return os.path.basename(defaults.get("__file__") or "script")


def _kinds(defaults):
    """{name: tuple of accepted types} of every setting, from its annotation or its default."""
    lazy = defaults.get("__annotate__")  # Python 3.14 has this function instead (PEP 649); 1 requests plain values
    annotations = defaults.get("__annotations__") or (lazy(1) if lazy else {})
    by_name = {kind.__name__: kind for kind in NEEDS} | {"None": NoneType}
    kinds = {}
    for name, default in defaults.items():
        if type(default) in NEEDS and not name.startswith("_"):
            kind = annotations.get(name, type(default))
            parts = kind.split("|") if isinstance(kind, str) else typing.get_args(kind) or (kind,)
            kinds[name] = tuple(by_name[part.strip()] if isinstance(part, str) else part for part in parts)
    return kinds


def _check_name(name, kinds, where, meant=None):
    if name in kinds:
        return
    if name in REMOVED:
        raise ConfigError(f"{name} {where} was removed after commit {LAST_WITH_REMOVED}: {REMOVED[name][1]}")
    near = difflib.get_close_matches(name.lower().replace("-", "_"), kinds, n=1)
    remedy = f"name a helper _{name}" if where.startswith("in ") else "--help lists the settings"
    if near:
        remedy = f"did you mean {near[0]!r}?" + (f" write {meant}" if meant else "")
    raise ConfigError(f"unknown setting {name!r} {where}; {remedy}")


def _fit(name, value, defaults, kinds, where, meant=None):
    """`value`, as a float if the setting needs one; ~ is expanded in PATHS. Raises ConfigError if it does not fit.
    meant: the word to write instead, or None."""
    plain = next((kind(value) for kind in (bool, int, float, str) if isinstance(value, kind)), value)  # np.float64
    is_blank = name in PATHS and type(plain) is str and not plain.strip() and defaults[name] != ""
    if type(plain) in kinds[name] and not is_blank:
        return expand(plain) if name in PATHS and plain else plain
    if type(plain) is int and float in kinds[name] and abs(plain) < 2**1023:
        return float(plain)
    need = "the path of a folder" if is_blank else " or ".join(NEEDS[kind] for kind in kinds[name])
    if int in kinds[name] and type(plain) is float and plain.is_integer():
        meant = f"{'--' if where.startswith('on ') else ''}{name}={plain:.0f}"
    remedy = f"write {meant}" if meant else f"its default is {defaults[name]!r}"
    raise ConfigError(f"setting {name!r} {where}: got {value!r}, need {need}; {remedy}")


def _meant(word, later_words, defaults, kinds):
    """The --name=value that the user meant by `word`, in quotes for a shell; None if that is unclear, or `word` itself.

    Covers argparse's form, whose value is the next word; one dash, none or those of word processors; and --no-name."""
    name, separator, value = re.fullmatch("([^=:]*)([=:]*)(.*)", word, re.DOTALL).groups()
    name = name.translate(_DASHES).lstrip("-").replace("-", "_").lower()
    if bool in kinds.get(name.removeprefix("no_"), ()) and name not in kinds:
        return f"--{name.removeprefix('no_')}=False"
    near = difflib.get_close_matches(name, kinds, n=1)
    if not near:
        return None
    name = near[0]
    next_word = next((other for other in later_words if other != "="), "--")
    value = value.strip() or ("" if next_word.startswith("--") else next_word.lstrip("="))
    if str not in kinds[name]:
        value = value.translate(_DASHES)
    if bool in kinds[name]:
        value = _BOOLS.get(value.lower(), value if separator else True)
    meant = f"--{name}={defaults[name] if value == '' else value}"
    return None if meant == word else shlex.quote(meant)


def _read_word(word, meant, defaults, kinds):
    """{name: value} of --name=value."""
    where = "on the command line"
    name, _, text = word.partition("=")
    name = name.translate(_DASHES).lstrip("-")
    _check_name(name, kinds, where, meant)
    if word != f"--{name}={text}":
        raise ConfigError(f"{word!r} {where} is not of the form --name=value; write {meant}")
    return {name: _fit(name, _parse(text, kinds[name]), defaults, kinds, where, meant)}


def _parse(text, kinds):
    """The value of `text` for a setting of these types; the text itself if it is no such value."""
    for kind, words in ((NoneType, {"None": None}), (bool, {"True": True, "False": False})):
        if kind in kinds and text in words:
            return words[text]
    if int in kinds or float in kinds:
        try:
            return _arithmetic(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
            pass  # not a number: a str setting takes the text, and _fit refuses it for other types
    quoted = str in kinds and len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _arithmetic(node):
    """Evaluate numbers with + - * / // and signs. Other syntax raises ValueError; nothing is executed."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_arithmetic(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_arithmetic(node.left), _arithmetic(node.right))
    raise ValueError("not arithmetic on numbers")


def _sets_nothing(node):
    """True for a statement of YAML or JSON, or a comparison, that Python accepts: `a: 3`, `{"a": 3}`, `a == 3`."""
    if isinstance(node, ast.AnnAssign):
        return node.value is None
    return isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call | ast.Constant)


def _read_file(word, meant, defaults, kinds):
    """{name: value} of the settings that a config file assigns. The file runs in a fresh dict."""
    path = expand(word)
    namespace = {"__name__": "config", "__file__": path}
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        hint = f"write {meant}" if meant and "=" in word else "give a path such as config/name.py, or --name=value"
        raise ConfigError(f"cannot read config file {path!r} ({error.strerror}); {hint}") from None
    try:
        tree = ast.parse(source, path)
        for node in tree.body:
            if _sets_nothing(node):
                text = "this sets nothing; a config file is Python, write name = value"
                raise SyntaxError(text, (path, node.lineno, 1, ""))
        exec(compile(tree, path, "exec", dont_inherit=True), namespace)
    except (Exception, SystemExit) as error:
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = frames[-1] if frames else getattr(error, "lineno", None)
        hint = "; a config file cannot read the script's settings" if isinstance(error, NameError) else ""
        reason = f"{type(error).__name__}: {getattr(error, 'msg', error)}"
        raise ConfigError(f"{path}, line {line}: {reason}{hint}") from error
    overrides = {}
    for name, value in namespace.items():
        # modules, functions and classes have a __name__, and those that the file does not define may be imports
        imported = hasattr(value, "__name__") and getattr(value, "__module__", None) != "config"
        imported = imported or type(value).__module__ == "__future__"
        if name in kinds or not (name.startswith("_") or imported):
            _check_name(name, kinds, f"in {path}")
            overrides[name] = _fit(name, value, defaults, kinds, f"in {path}")
    return overrides


def _print_help(defaults, kinds):
    """Print every setting as --name=default with its type and comment, under the headings in the script's source."""
    notes = read_comments(defaults.get("__file__"), kinds)
    print(f"usage: python {_script_name(defaults)} [config/file.py ...] [--name=value ...]     later arguments win")
    heading = ""
    for name in kinds:
        previous, (heading, comment) = heading, notes[name]
        if heading != previous:
            print(f"\n{heading}")
        types = "|".join(kind.__name__.replace("NoneType", "None") for kind in kinds[name])
        print(f"  {f'--{name}={defaults[name]}':<36}  {types:<9}  {comment}".rstrip())


def read_comments(path, kinds):
    """{name: (heading, comment)}: the comment after a setting's assignment, and the `# ---- heading ----` above it."""
    notes, heading = dict.fromkeys(kinds, ("", "")), ""
    if not path or not os.path.exists(path):
        return notes
    with open(path, encoding="utf-8") as file:
        for line in file:
            title = re.match(r"# ?--+ (.*[^-\s])", line)
            heading = title[1] if title else heading
            name = re.match(r"\w*", line)[0]
            if name in kinds and notes[name] == ("", ""):
                notes[name] = (heading, line.partition("  # ")[2].strip())
    return notes


# ---- the console of a script -----------------------------------------------------------------------------------------
class Console:
    """Standard output or error that may go away, or whose disk may be full. Then text is lost, but nothing fails."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a character that the terminal's encoding lacks

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream was closed
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def keep_console() -> None:
    """Let no print, warning or exit of this process fail."""
    for name in ("stdin", "stdout", "stderr"):
        # None: it was closed at the start. Without this file, the next one that is opened would get its number.
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        setattr(sys, name, stream if name == "stdin" else Console(stream))


# ---- small files of a run: its settings and measurements -------------------------------------------------------------
def sync(file_descriptor):
    """fsync. If the file system cannot do it for this kind of file, warn and go on. Raises OSError for other errors."""
    try:
        os.fsync(file_descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
        text = f"fsync is not supported here ({error}); a power failure may lose the newest files"
        warnings.warn(text, stacklevel=2)


def open_new(path):
    """Open a new file for writing bytes. A file of that name is deleted, and a symbolic link is not followed."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return open(path, "xb")


def write_small_file(path, text):
    """Write a text file atomically: a kill or a full disk leaves the earlier file. Raises OSError."""
    temporary = f"{path}.{os.getpid()}.tmp"  # several processes may write the same file
    try:
        with open_new(temporary) as file:
            file.write(text.encode())
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.lexists(temporary):
            os.unlink(temporary)


def write_json(path, data):
    write_small_file(path, json.dumps(data, indent=1) + "\n")
