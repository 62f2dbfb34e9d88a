"""README and docs/ tell the truth: the settings are train.py's, links lead somewhere, tables are those of the results.

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

PAGES = [
    path.relative_to(ROOT)
    for folder in (".", "data", "docs", "methods", "results")
    for path in (ROOT / folder).glob("*.md")
]
TABLES = [
    *("convergence", "methods", "methods-6seeds", "methods-texts", "methods-unseen-texts", "equal_cost", "table7"),
    *("phases", "quality", "quality-6seeds", "decay", "flip_rate", "kernels"),
]
TO_BE_MADE = ("methods/mine.py", "methods/random_mask.py", "data/mine", "data/NAME")
INTRODUCTION = """# Settings

Give a setting as `--name=value`, or in a config file, which is Python; a later one wins. Unknown names and wrong types
are refused. The message for a setting that was removed says what replaces it. `python train.py --help` prints the list.

| setting | default | |
|---|---|---|
"""


def settings_page() -> str:
    """docs/settings.md, as train.py's source has the settings."""
    names = setting_names(vars(train))
    notes, rows, shown = read_comments(train.__file__, names), [], ""
    source = (ROOT / "train.py").read_text()
    for name in names:
        heading, comment = notes[name]
        if heading != shown:
            rows.append(f"| **{heading}** | | |")
        shown = heading
        default = re.search(rf"^{name}\b[^=\n]*= ([^#\n]+)", source, re.MULTILINE)[1].strip()
        rows.append(f"| `{name}` | `{default}` | {comment} |".replace("|  |", "| |"))
    return INTRODUCTION + "\n".join(rows) + "\n"


def test_docs_list_every_setting_as_train_has_it():
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page(), (
        "run python tests/test_docs.py > docs/settings.md"
    )


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) < 11_000


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        if "://" not in target:
            assert (ROOT / page.parent / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.parts[0] != "results"], ids=str)
def test_files_that_a_page_names_are_there(page):
    """`gemm24/choose.py`, tests/test_sparse24.py: a name with a folder, of a file or a pattern."""
    text = (ROOT / page).read_text()
    for name in re.findall(
        r"\b(?:config|data|docs|gemm24|methods|runtime|benchmarks|studies|tests|results)/[\w./\\*-]*\w", text
    ):
        assert list(ROOT.glob(name.replace("\\", ""))) or name in TO_BE_MADE, name


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_results(name):
    table = (ROOT / "results" / f"{name}.md").read_text().split("\n\n")[2]
    assert table.startswith("|")
    assert table in (ROOT / "results" / "README.md").read_text()


if __name__ == "__main__":
    print(settings_page(), end="")
