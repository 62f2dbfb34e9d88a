"""README and docs/ against the repository: settings, links, names of files, tables of the results.

python tests/test_docs.py > docs/settings.md       after a setting has changed
"""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this file is also run as a script

import train
from configurator import read_comments, setting_names

ROOT = Path(train.__file__).parent

FOLDERS = (".", "data", "docs", "methods", "results")
PAGES = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).glob("*.md")]
TABLES = [
    *("convergence", "methods", "methods-6seeds", "methods-texts", "methods-unseen-texts", "equal_cost", "table7"),
    *("phases", "quality", "quality-6seeds", "decay", "flip_rate", "kernels"),
]
EXAMPLES = ("methods/mine.py", "methods/random_mask.py", "data/mine", "data/NAME")
INTRODUCTION = """# Settings

Give a setting as `--name=value`, or in a config file, which is Python; a later one wins. Unknown names and wrong types
are refused. The message for a setting that was removed says what replaces it. `python train.py --help` prints the list.

| setting | default | |
|---|---|---|
"""


def settings_page() -> str:
    """The text of docs/settings.md, made from the settings in train.py."""
    names = setting_names(vars(train))
    comments, rows, last_heading = read_comments(train.__file__, names), [], ""
    source = (ROOT / "train.py").read_text()
    for name in names:
        heading, comment = comments[name]
        if heading != last_heading:
            rows.append(f"| **{heading}** | | |")
        last_heading = heading
        default = re.search(rf"^{name}\b[^=\n]*= ([^#\n]+)", source, re.MULTILINE)[1].strip()
        rows.append(f"| `{name}` | `{default}` | {comment} |".replace("|  |", "| |"))
    return INTRODUCTION + "\n".join(rows) + "\n"


def test_settings_page_is_up_to_date():
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page(), (
        "run python tests/test_docs.py > docs/settings.md"
    )


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) < 11_000


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_point_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        if "://" not in target:
            assert (ROOT / page.parent / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.parts[0] != "results"], ids=str)
def test_files_that_a_page_names_exist(page):
    """A name has a folder, and may be a pattern: `gemm24/choose.py`, tests/test_sparse24*.py."""
    folders = "config|data|docs|gemm24|methods|runtime|benchmarks|studies|tests|results"
    for name in re.findall(rf"\b(?:{folders})/[\w./\\*-]*\w", (ROOT / page).read_text()):
        assert list(ROOT.glob(name.replace("\\", ""))) or name in EXAMPLES, name


@pytest.mark.parametrize("name", TABLES)
def test_results_readme_has_the_tables_of_the_results(name):
    table = (ROOT / "results" / f"{name}.md").read_text().split("\n\n")[2]
    assert table.startswith("|")
    assert table in (ROOT / "results" / "README.md").read_text()


if __name__ == "__main__":
    print(settings_page(), end="")
