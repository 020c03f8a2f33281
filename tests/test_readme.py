"""The README's results are those of the committed files."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def readme():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "bench" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_results_in_the_readme_are_those_of_the_files(readme):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.written(text) == text, "python bench/readme.py writes them"
    for name in readme.PARTS:
        assert text.count(f"<!-- results: {name} -->") == 1


def test_another_figure_in_a_file_is_another_readme(readme, tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in readme.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "study").symlink_to(readme.RESULTS / "study")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.written(text) == text
    run = json.loads((tmp_path / "demo.json").read_text())
    (tmp_path / "demo.json").write_text(json.dumps({**run, "accuracy": run["accuracy"] + 0.01}))
    assert readme.written(text) != text
