"""The README: what it says to type runs, its numbers are those of the tables, its files exist."""

import re
from pathlib import Path

import pytest
from conftest import NAMES, SCORER, SCRIPTS, TINY, label_map, torchrun, works
from test_faults import cityscapes

TEXT = (SCRIPTS / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"(?:^ {4}.*\n)+", TEXT, re.MULTILINE)
COMMANDS = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines()
            if re.match(r" +(pip|python|jupyter|torchrun) ", line)]
pytestmark = pytest.mark.usefixtures("draw_each_street_once", "small_scorer")


def filled_in(name: str, words: str) -> str:
    """With a real folder where the README has DIR, and little to do: argparse takes the last."""
    words = words.replace("DIR", "city").replace("notebooks", f"{SCRIPTS}/notebooks")
    mode = (words.split() or ["train"])[0]
    if mode.startswith("--") and "--resume" not in words:
        return f"{words} {TINY[name + '-V1' * ('V1' in words)]} --steps 2"
    more = {"--resume": "--steps 4", "evaluate": f"--limit 2 {SCORER}",
            "interpolate": "--samples 2", "video": "--samples 2"}
    return f"{words} {more.get(mode, '--limit 1' if mode == 'sample' else '')}"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_a_script_runs(name):
    """In the README's order, in one folder, as somebody would who types them all."""
    cityscapes()
    label_map(Path("a.png"))
    if name == "pix2pixhd":                     # "after training"
        works(name, f"{TINY[name]} --size 128 256 --steps 2")
    commands = [c.split(f"python {name}.py", 1)[1].strip() for c in COMMANDS
                if f"python {name}.py" in c and not c.startswith("pip")]
    assert commands
    for words in commands:
        works(name, filled_in(name, words))


@pytest.mark.slow
def test_the_command_for_several_processes_runs():
    words, = (c.split("torchrun ")[1] for c in COMMANDS if c.startswith("torchrun"))
    cityscapes()
    words = words.replace("--nproc_per_node=4 ", "").replace("DIR", "city").replace(
        "pix2pix.py", f"{SCRIPTS}/pix2pix.py")             # two are enough
    result = torchrun(f"{words} {TINY['pix2pix']} --batch-size 1 --steps 2")
    assert result.returncode == 0, result.stderr
    assert [p.name for p in Path("runs").iterdir()] == ["pix2pix-1"]            # rank 0 alone


def test_the_lines_of_python_run(monkeypatch):
    lines, = (block for block in BLOCKS if "import " in block)
    for folder in (SCRIPTS, SCRIPTS / "notebooks"):
        monkeypatch.syspath_prepend(str(folder))
    names = {}
    exec("\n".join(line.strip() for line in lines.splitlines()), names)
    assert names["image"].shape == (1, 3, *names["cfg"].size)
    assert float(names["image"].std()) > 0.1               # a picture, not one colour


def test_files_and_commands_that_it_names_exist_and_it_is_short():
    assert len(TEXT.splitlines()) <= 130
    for name in re.findall(r"\b[\w/]+\.(?:py|ipynb|jpg)\b|tests/\w+\.txt", TEXT):
        assert (SCRIPTS / name).exists(), name
    assert set(re.findall(r"notebooks/\w+\.ipynb", TEXT)) == {
        f"notebooks/{p.name}" for p in (SCRIPTS / "notebooks").glob("*.ipynb")}
    installs = [c for c in COMMANDS if c.startswith("pip")]
    assert len(installs) == 2 and installs[1].endswith("python -m pytest")
    assert "python -m pytest" in (SCRIPTS / ".ci" / "run").read_text()


def test_our_numbers_are_those_of_the_tables():
    """Each number of a claim, but for those of the shipped weights, is a mean of tables.txt."""
    claims = TEXT.split("| claim | here |")[1].split("\n\n")[0].splitlines()[2:]
    printed = (SCRIPTS / "tests" / "tables.txt").read_text("utf-8")
    means = {f"{float(x):.2f}" for x in re.findall(r"(-?[\d.]+) ±", printed)}
    ours = {f"{float(x):.2f}" for line in claims for x in re.findall(
        r"(?<![\d.])\d?\.\d\d\b", line.split(" | ")[1].partition("the shipped")[0])}
    assert len(claims) > 5 and len(ours) > 10
    assert not ours - means, ours - means
