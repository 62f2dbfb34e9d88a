"""A small dataset, and the files that a run of train.py leaves."""

import json

import pytest
from harness import make_dataset


@pytest.fixture
def data(tmp_path):
    return make_dataset(tmp_path / "tiny")


@pytest.fixture
def write_run():
    """Write rows, given as dicts, and settings into a folder. Returns the folder."""

    def write(folder, rows=(), **config):
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"phase": "sparse"} | row) + "\n" for row in rows]
        (folder / "metrics.jsonl").write_text("".join(lines))
        (folder / "config.json").write_text(json.dumps({"environment": {"torch": "x"}} | config))
        return folder

    return write
