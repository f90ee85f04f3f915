"""The README: every command in it runs, its numbers are those of the tables, its files exist."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY as SMALLEST
from conftest import (
    NAMES, SCORER, SCRIPTS, environment, free_port, label_map, picture, save, shell, torchrun,
    works)

import benchmark

TEXT = (SCRIPTS / "README.md").read_text("utf-8")
# The command lines of the blocks, and those of the table of default runs.
COMMANDS = [line.split(" #")[0].strip() for line in re.findall(
    r"^(?:    |\| `)((?:pip|python|torchrun) [^`\n]*)", TEXT, re.MULTILINE)]
# The least training: appended to the README's own flags, of which argparse takes the last. The
# paper's networks and losses are not at stake here.
TINY = {
    "pix2pix": f"{SMALLEST['pix2pix']} --steps 2",
    "pix2pixhd": f"{SMALLEST['pix2pixhd']} --size 128 256 --enhancers 1 --enhancer-blocks 1 "
                 "--epochs 1 --fine-epochs 2 --enhancer-epochs 1",      # of the scene to edit
    "crn_imle": f"{SMALLEST['crn_imle']} --size 64 64 --outputs 3 --steps 2",
    "lab2pix": f"{SMALLEST['lab2pix']} --steps 2"}
V1 = f"{SMALLEST['lab2pix-V1']} --steps 2"
pytestmark = pytest.mark.usefixtures("draw_each_street_once")


def small_cityscapes(root: Path) -> None:
    """DIR: five photos to train on and two to test, with labels and instances."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 5), ("val", 2)):
        for i in range(n):
            ids = np.kron(rng.choice([7, 8, 11, 21, 23, 24, 26], (4, 4)), np.ones((16, 16), int))
            for name, image in (
                    (f"leftImg8bit/{split}/a/a_{i}_leftImg8bit.png",
                     rng.integers(0, 256, (64, 64, 3), np.uint8)),
                    (f"gtFine/{split}/a/a_{i}_gtFine_labelIds.png", ids.astype(np.uint8)),
                    (f"gtFine/{split}/a/a_{i}_gtFine_instanceIds.png",
                     np.where(ids > 23, 1000 * ids, ids).astype(np.uint16))):
                save(root / name, image)


def commands_of(name: str) -> list[str]:
    """The arguments of the README's commands for a script, in their order."""
    return [c.split(f"python {name}.py", 1)[1] for c in COMMANDS if f"python {name}.py" in c]


def filled_in(name: str, words: str) -> str:
    """With a real folder or file where the README has DIR or FILE, and little to do."""
    modes = importlib.import_module(name).MODES
    mode = next((m for m in modes if words.split()[:1] == [m]), "train")
    if "--images" in words:
        return words.replace("DIR", "theirs") + " --limit 2"
    words = words.replace("DIR", "data").replace("FILE", "g/checkpoint.pt")
    if "notebooks/weights" in words:
        return words.replace("notebooks/weights", f"{SCRIPTS}/notebooks/weights") + (
            " --limit 1" if "sample" in words else " --frames 2")
    if mode == "train" and "--resume" not in words:
        tiny = TINY[name]
        if "V1" in words or "C_u" in words:
            tiny = V1
        if "--ablation" in words:               # the row has its own version
            tiny = tiny.replace("--version V1", "")
        if "V2-H" in words or "--ablation" in words:
            tiny = re.sub("--no-dgnorm|--lambda-5 0|--discriminator patch|--T 1", "", tiny)
        return f"{words} {tiny}"
    if mode == "evaluate":
        return f"{words} --limit 2 " + (SCORER if name != "crn_imle" else "")
    return words + (" --steps 4" if "--resume" in words else "")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_a_script_runs(name):
    """In the README's order, in one folder, as somebody would who types them all."""
    small_cityscapes(Path("data"))
    label_map(Path("a.png"))
    commands = commands_of(name)
    assert len(commands) > 2
    for words in commands:
        if "--stage" in words:                  # the other run that it starts from
            works(name, f"--stage global --out g {TINY[name]}")
        if "--images" in words:                 # photos of another model
            for i in range(2):
                for k in (1, 2, 3):
                    picture(Path(f"theirs/street_{1000000 + i}_{k}.png"), 64, 64, k)
        line = filled_in(name, words)
        if "--init runs/crn_imle-1" in line:    # the newest run: the one of the line before
            newest = max(Path("runs").glob("crn_imle-*"), key=lambda p: p.stat().st_mtime)
            line = line.replace("crn_imle-1", newest.name)
        works(name, line)


@pytest.mark.slow
def test_the_commands_for_several_processes_run():
    """torchrun on one machine; on two, here two launchers side by side, one machine each."""
    one, two = (c.split("torchrun ")[1] for c in COMMANDS if c.startswith("torchrun"))
    assert "--nnodes" not in one and "--nnodes=2" in two
    small_cityscapes(Path("data"))
    one, two = (words.replace("DIR", "data").replace("FIRST", "127.0.0.1").replace(
        "pix2pix.py", f"{SCRIPTS}/pix2pix.py") + f" {TINY['pix2pix']} --workers 0"
        for words in (one, two))
    result = torchrun(one.replace("--nproc_per_node=4 ", ""))              # two are enough
    assert result.returncode == 0, result.stderr
    launch = f"{sys.executable} -m torch.distributed.run --master_port {free_port()} "
    nodes = [subprocess.Popen((launch + two.replace("=4", "=1").replace("rank=0", f"rank={k}")
                               ).split(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, env=environment()) for k in (0, 1)]
    said = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert {p.name for p in Path("runs").iterdir()} == {"pix2pix-1", "pix2pix-2"}    # rank 0 alone


@pytest.mark.slow
def test_the_other_commands():
    """The tools in their short forms; installing and testing is what CI does with these lines."""
    yardstick, tables, bench, kill = (c.split(maxsplit=1)[1] for c in COMMANDS if "tests/" in c)
    assert kill == "tests/kill.py" and (SCRIPTS / kill).exists()           # test_faults.py runs it
    assert shell(f"{SCRIPTS}/{tables} --list").stdout.count("python pix2pix.py") == 15
    assert "benchmark.py yardstick" in yardstick and (SCRIPTS / yardstick.split()[-1]).exists()
    small_cityscapes(Path("data"))
    result = shell(f"{SCRIPTS}/{bench.replace('DIR', 'data')} --quick --gpu -1", timeout=900)
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert set(benchmark.CASES) - set(benchmark.TOY) - {"pix2pixhd-1024p-features"} <= set(rows)
    assert len(re.findall(r"^data +(?:pix2pix|pix2pixhd|crn_imle|lab2pix) .*%", result.stdout,
                          re.MULTILINE)) == 4
    for script in NAMES:            # the rest: a plain run times toys, too
        assert f"{script}-toy" in benchmark.TOY
    installs = [c for c in COMMANDS if c.startswith("pip")]
    assert len(installs) == 2 and installs[1].endswith("python -m pytest")
    assert "python -m pytest" in (SCRIPTS / ".ci" / "run").read_text()


def test_files_that_it_names_exist_and_it_is_short():
    assert len(TEXT.splitlines()) <= 150
    for name in re.findall(r"\b[\w/]+\.py\b|\w+/\w+\.jpg|requirements\.txt", TEXT):
        assert (SCRIPTS / name).exists(), name
    notebooks = re.findall(r"\| `(\d_\w+)`", TEXT)
    assert {f"{n}.ipynb" for n in notebooks} == {p.name for p in
                                                (SCRIPTS / "notebooks").glob("*.ipynb")}


def printed_tables() -> dict[str, str]:
    """What `python tests/tables.py` printed: its output, as it is committed, a text per table."""
    text = (SCRIPTS / "tests" / "tables.txt").read_text("utf-8")
    return {block.partition(",")[0]: block for block in text.strip().split("\n\n")}


def test_our_numbers_and_verdicts_are_those_of_the_tables():
    """Means in the order of the rows, the largest deviation, each pair that does not hold."""
    lines = TEXT.split("| table: rows; measure |")[1].split("\n\n")[0].splitlines()[2:]
    printed = printed_tables()
    assert [line.split("`")[1] for line in lines] == list(printed)
    for line in lines:
        what, here, _, order = (cell.strip() for cell in line.strip("|").split(" | "))
        head, *rows = printed[what.split("`")[1]].splitlines()[1:]
        measure, short = what.rpartition("; ")[2], lambda x: f"{float(x):.2f}".lstrip("0")
        column = re.split(r"  +", head.strip()).index(measure) - 1
        cells = [re.findall(r"(\S+) ± (\S+)", row)[column] for row in rows if "±" in row]
        assert here == " ".join(short(mean) for mean, _ in cells) + (
            f" ±{short(max(float(sd) for _, sd in cells))}"), what
        said = [(row.partition(":")[0].strip(), re.search(rf"\b{measure} ([a-z ]*[a-z])", row)[1])
                for row in rows if " over " in row]
        holds = sum(verdict == "holds" for _, verdict in said)
        assert order == "; ".join([f"{holds} of {len(said)} hold"] * (len(said) > 1) + [
            f"{pair} {verdict}" for pair, verdict in said
            if verdict != "holds" or len(said) == 1]), (what, order)

