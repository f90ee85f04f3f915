"""The notebooks as committed; and each executed from a fresh kernel, with all answers filled in."""

import base64
import io
import json
import re
import sys
import time
from pathlib import Path

import nbformat
import pytest
from conftest import SCRIPTS
from nbclient import NotebookClient
from PIL import Image

sys.path.insert(0, str(SCRIPTS / "notebooks"))
from helpers import code_of, made_from  # noqa: E402

each_notebook = pytest.mark.parametrize(
    "path", sorted((SCRIPTS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)


def read(path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def texts(notebook) -> str:
    """All that the cells print or show as text."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "\n".join(o.get("text", "") or o.get("data", {}).get("text/markdown", "")
                     for o in outputs)


def is_exercise(cell) -> bool:
    return "exercise" in cell.metadata.get("tags", [])


def answered(notebook) -> int:
    """Put the folded answer below each exercise in place of its gap; returns how many.

    Before it, the plausible wrong answer that the exercise's metadata holds: its check must refuse
    it, and say why.
    """
    cells, n = [], 0
    for cell, after in zip(notebook.cells, [*notebook.cells[1:], None]):
        if is_exercise(cell):
            answer = re.search(r"<details>.*?```python\n(.*?)```", after.source, re.DOTALL).group(1)
            gap, mark, check = cell.source.partition("# --- check")
            assert "..." in gap and re.search("assert|expect", check), cell.source
            cells.append(nbformat.v4.new_code_cell(
                REFUSED.format(repr(cell.metadata["wrong"] + "\n" + check))))
            cell.source, n = answer + mark + check, n + 1
        cells.append(cell)
    notebook.cells = cells
    return n


REFUSED = """try:
    exec({}, globals())
except AssertionError as refusal:
    assert str(refusal)
else:
    raise RuntimeError("the exercise accepts a wrong answer")"""


@each_notebook
def test_as_committed_it_was_executed_in_order_and_is_small(path):
    notebook = read(path)
    assert path.stat().st_size < 3e6
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [cell.source for cell in code if len(cell.source.splitlines()) > 25]
    outputs = [o for cell in code for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert "it/s" not in texts(notebook) and "Warning" not in texts(notebook)
    assert 4 <= sum(map(is_exercise, code)) <= 6
    assert "QUICK = True" in "".join(cell.source for cell in code[:3])
    pictures = [data for o in outputs for kind, data in o.get("data", {}).items()
                if kind in ("image/png", "image/jpeg")]
    widths = [Image.open(io.BytesIO(base64.b64decode(data))).width for data in pictures]
    assert len(widths) > 5 and max(widths) <= 900
    assert "/tmp/" not in json.dumps(notebook) and "/home/" not in json.dumps(notebook)


@each_notebook
def test_the_code_that_it_shows_is_the_scripts(path):
    """Listings are outputs: a script, or helpers.py, may have changed since."""
    lines = {line.strip() for script in [*SCRIPTS.glob("*.py"), SCRIPTS / "notebooks/helpers.py"]
             for line in script.read_text().splitlines()}
    listings = re.findall(r"```python\n(.*?)```", texts(read(path)), re.DOTALL)
    assert len(listings) > 4
    assert not [line for text in listings for line in text.splitlines()
                if line.strip() not in lines]


@each_notebook
def test_numbers_that_the_text_quotes_from_the_committed_run_stand_in_its_outputs(path):
    notebook = read(path)
    prose = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for sentence in re.findall(r"[^.]*committed run(?:[^.]|\.\d)*", prose):
        for number in re.findall(r"(?<![\w.])\d*\.\d+", sentence):
            assert number.lstrip("0") in texts(notebook).replace("0.", "."), (number, sentence)


def execute(path) -> nbformat.NotebookNode:
    notebook = read(path)
    assert answered(notebook) >= 4
    NotebookClient(notebook, timeout=3000, kernel_name="python3",
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    return notebook


@pytest.mark.slow
@each_notebook
def test_it_runs_from_a_fresh_kernel_and_the_answers_are_right(path, execution):
    folder, process, before = execution
    file = folder / path.name
    while not file.exists():
        assert process.poll() is None or file.exists(), "see the traceback above"
        time.sleep(0.5)
    notebook = read(file)
    assert "not filled in yet" not in texts(notebook)
    assert not [o for cell in notebook.cells for o in cell.get("outputs", [])
                if o.get("name") == "stderr"]
    assert set((SCRIPTS / "notebooks").rglob("*")) == before


@each_notebook
def test_its_outputs_were_made_from_the_scripts_weights_and_cells_of_now(path):
    """`python notebooks/helpers.py` executes the notebooks, and stores what this compares."""
    notebook = read(path)
    stored, now = notebook.metadata.get("made_from", {}), made_from(notebook)
    names = sorted(stored.keys() | now.keys())
    changed = [name for name in names if stored.get(name) != now.get(name)]
    assert not changed, f"changed since: {', '.join(changed)}; python notebooks/helpers.py {path}"


def test_a_changed_comment_or_docstring_is_no_change_and_a_changed_number_is():
    text = '"""Doc."""\n\ndef f(x):\n    """Doc."""\n    return f"{x + 1} a"     # a sum\n'
    assert code_of(text) == code_of(text.replace("Doc", "Text").replace("# a sum", ""))
    assert code_of(text) != code_of(text.replace("1", "2"))
    assert code_of(text) != code_of(text.replace(" a\"", " b\""))


if __name__ == "__main__":                      # conftest.py's `execution`
    target, *notebooks = map(Path, sys.argv[1:])
    for source in notebooks:
        nbformat.write(execute(source), target / "unfinished")
        (target / "unfinished").rename(target / source.name)
