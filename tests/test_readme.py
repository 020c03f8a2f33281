"""The results on the pages are those of the committed files."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def readme():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "bench" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_results_on_the_pages_are_those_of_the_files(readme):
    texts = [page.read_text(encoding="utf-8") for page in readme.PAGES]
    for text in texts:
        assert readme.written(text) == text, "python bench/readme.py writes them"
        # A paragraph that is still to be written.
        assert not re.search(r"^[A-Z0-9-]{4,}$", text, re.MULTILINE)
    for name in readme.PARTS:
        assert "".join(texts).count(f"<!-- results: {name} -->") == 1


@pytest.mark.parametrize(
    "file, figure, page",
    [("demo.json", "accuracy", 0), ("bench.json", "ratio", 0), ("bench-amx.json", "ratio", 1)],
)
def test_another_figure_in_a_file_is_another_page(
    readme, tmp_path, monkeypatch, file, figure, page
):
    text = readme.PAGES[page].read_text(encoding="utf-8")
    for path in readme.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "study").symlink_to(readme.RESULTS / "study")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.written(text) == text
    found = json.loads((tmp_path / file).read_text())
    for row in found.get("rows", [found]):
        row[figure] += 0.01
    (tmp_path / file).write_text(json.dumps(found))
    assert readme.written(text) != text


def test_check_writes_nothing_and_tells(readme, tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    monkeypatch.setattr(readme, "PAGES", [page])
    old = "<!-- results: demo -->\nold\n<!-- end -->\n"
    page.write_text(old)
    monkeypatch.setattr(readme.sys, "argv", ["readme.py", "--check"])
    assert readme.main() == 1 and page.read_text() == old
    monkeypatch.setattr(readme.sys, "argv", ["readme.py"])
    assert readme.main() == 0 and "every B at zero" in page.read_text()
    monkeypatch.setattr(readme.sys, "argv", ["readme.py", "--check"])
    assert readme.main() == 0


def test_the_best_peer_of_a_model_is_the_one_of_least_time(readme, monkeypatch):
    def row(subject, model, ratio):
        return {"op": "step", "subject": subject, "model": model, "ratio": ratio}

    rows = [
        row("ffa_kernels, private", "a", 0.9),
        row("ffa_kernels, private", "b", 0.8),
        row("fastDP", "a", 1.2),
        row("Opacus, hooks", "b", 1.3),
        row("fastDP", "b", 1.25),
        row("Opacus, hooks", "a", 1.1),
        {"op": "growth", "subject": "fastDP", "model": "a", "ratio": 0.1},
    ]
    monkeypatch.setattr(readme, "PROCESSORS", {"bench.json": "Some"})
    found = {"rows": rows, "environment": {"date": "today"}}
    monkeypatch.setattr(readme, "_read", lambda name: found)
    lines = readme.processors().splitlines()
    assert lines[0].endswith("| a | b |") and len(lines) == 4
    assert lines[2] == "| Some, today | private | 0.900 | 0.800 |"
    assert lines[3] == "| Some, today | the best private peer | 1.100 | 1.250 |"
