"""What the four scripts owe each other: rooms, repeated parts word for word, settings and flags."""

import ast
import dataclasses
import importlib
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, as_script, assert_same_state, shell, stored

import common

NAMES = sorted(p.stem for p in SCRIPTS.glob("*.py") if p.stem != "common")
ROOMS = ["1 Config", "2 Networks", "3 Losses", "4 Training", "5 Sampling", "6 Evaluation",
         "7 Command line"]
REPEATED = ["memory_format", "dress", "to_float", "plain", "place", "pick_device", "Stop",
            "save_checkpoint", "read_checkpoint", "stored_config", "restore", "next_run",
            "newest_run", "open_run", "Log", "save_images", "reflect", "peak_memory", "flag",
            "refuse"]

each_script = pytest.mark.parametrize("name", NAMES)


def text(name: str) -> str:
    return (SCRIPTS / f"{name}.py").read_text()


@pytest.mark.parametrize("part", REPEATED)
def test_repeated_parts_are_word_for_word_the_same(part):
    sources = {inspect.getsource(getattr(importlib.import_module(name), part)) for name in NAMES}
    assert len(NAMES) > 1 and len(sources) == 1


@each_script
def test_rooms_stand_in_the_same_order(name):
    assert re.findall(r"^# -{20,} (.+)$", text(name), re.MULTILINE) == ROOMS


@pytest.mark.parametrize("name", [*NAMES, "common"])
def test_lines_and_functions_are_short(name):
    wide = [i for i, line in enumerate(text(name).splitlines(), 1) if len(line) > 100]
    assert not wide, f"{name}: over 100 columns: lines {wide[:20]}"
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(
        ast.parse(text(name))) if isinstance(node, ast.FunctionDef)}
    allowed = {"train": 90, "parser": 80}                  # parser: a line per flag
    assert not {k: n for k, n in lengths.items() if n > allowed.get(k, 60)}


@each_script
def test_imports_no_other_script_and_nothing_of_unix_alone(name):
    nodes = [node for node in ast.walk(ast.parse(text(name)))
             if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {node: [n.name for n in node.names] + [getattr(node, "module", "")] for node in nodes}
    assert not {n for some in names.values() for n in some} & (set(NAMES) - {name})
    at_import = {n for node, some in names.items() if node.col_offset == 0 for n in some}
    assert "common" in at_import and not at_import & {"resource", "fcntl", "pwd"}   # not on Windows


@each_script
def test_every_setting_is_read(name):
    """Outside the dataclass, as cfg.<field>: a setting that nothing reads is a lie to the user."""
    body = text(name).split("\nPRESETS = ", 1)[1]
    fields = [f.name for f in dataclasses.fields(importlib.import_module(name).Config)]
    assert not [field for field in fields if not re.search(rf"\bcfg\.{field}\b", body)]


@each_script
def test_every_flag_is_a_setting_and_explained(name):
    script = importlib.import_module(name)
    fields = {f.name for f in dataclasses.fields(script.Config)}
    actions = [a for a in script.parser()._actions if a.dest != "help"]
    assert {a.dest for a in actions} == fields | set(script.CALL) | {"mode"}
    assert not [a.option_strings for a in actions if not a.help]
    assert script.FREE <= fields and script.FREE_AT_TEST <= fields
    modes, = (a.choices for a in actions if a.dest == "mode")
    assert all(set(some) <= set(modes) for some in script.CALL.values())
    assert all(set(preset) <= fields for preset in script.PRESETS.values())


@each_script
def test_help_ends_with_three_commands_that_parse(name, capsys):
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as caught:
        script.main(["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.strip().splitlines()
    start = f"  python {name}.py"
    commands = [line.removeprefix(start) for line in lines if line.startswith(start)]
    assert len(commands) == 3 and all(line.startswith(start) for line in lines[-3:])
    documented = re.findall(rf"^(?:Run)?\s+python {name}\.py(.*)$", script.__doc__, re.MULTILINE)
    assert len(documented) == 3
    for command in commands + documented:
        script.parser().parse_args(re.split(r"   ", command)[0].split())


def tiny(name: str) -> str:
    """The flags of the least training that the script's own tests use."""
    tests = importlib.import_module(f"test_{name}_contract")
    return getattr(tests, "ONE", tests.TINY)


@each_script
def test_exit_codes_of_the_command_line(name, monkeypatch, capsys):
    """A mistake, a full disk, no memory and Ctrl-C before training: a line each, no traceback."""
    assert as_script(name, f"{tiny(name)} --lr -1", monkeypatch) == 2
    line, = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"{name}.py: error: --lr -1")
    assert as_script(name, f"{tiny(name)} --gpu 77 --steps 1", monkeypatch) == 2
    line, = capsys.readouterr().err.strip().splitlines()
    assert "--gpu 77" in line and "--gpu -1" in line       # what is wrong, and the cure
    assert not Path("runs").exists()

    def disk_full(*arguments):
        raise OSError(28, "No space left on device", "somewhere/log.csv")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMuch more text.")

    for broken, code, words in ((disk_full, 2, ["No space left"]), (interrupted, 130, []),
                                (out_of_memory, 2, ["--size", "--width", "--precision"])):
        with monkeypatch.context() as patch:
            patch.setattr(common, "describe", broken)
            assert as_script(name, f"{tiny(name)} --steps 1 --out {broken.__name__}", patch) == code
            err = capsys.readouterr().err.strip()
            assert "Traceback" not in err and all(word in err for word in words)


# pix2pixhd's stages have a test of their own; `Stop` is the same in all.
@pytest.mark.parametrize("name, extra, number, code", [
    ("pix2pix", "", signal.SIGINT, 130), ("crn_imle", "--inner-steps 50", signal.SIGINT, 130),
    ("crn_imle", "--model crn --inner-steps 0", signal.SIGTERM, 143),
    ("lab2pix", "", signal.SIGTERM, 143)])
def test_interrupted_and_resumed_equals_uninterrupted(name, extra, number, code):
    """Ctrl-C and SIGTERM: the step is finished and saved, how to resume is said, and it is true."""
    line = f"{tiny(name)} {extra}"
    process = subprocess.Popen(
        [sys.executable, SCRIPTS / f"{name}.py", *f"{line} --save-every 2 --out r".split()],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.time() + 90
    while not Path("r/checkpoint.pt").exists() and time.time() < deadline:      # two steps are done
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=90)
    assert process.returncode == code, err
    assert "Traceback" not in err
    step = stored("r")["step"]
    assert f"stopped at step {step}" in out and "--resume --out r" in out
    main = importlib.import_module(name).main
    main(f"--resume --out r --steps {step + 2}".split())
    main(f"{line} --save-every 1000 --out whole --steps {step + 2}".split())
    assert_same_state("r", "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_interrupted_with_its_data_processes_beside_it(start):
    """Ctrl-C goes to all of them, also where Python starts them from nothing."""
    program = (f"import multiprocessing as m; m.set_start_method({start!r}); import pix2pix; "
               f"pix2pix.main({(tiny('pix2pix') + ' --workers 1 --save-every 1 --out r').split()})")
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"OMP_NUM_THREADS": "1",
                                                 "PYTHONPATH": str(SCRIPTS)})
    deadline = time.time() + 90
    while not Path("r/checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert f"stopped at step {stored('r')['step']}" in out


def test_scripts_import_without_a_warning():
    Path("all_of_them.py").write_text(f"import {', '.join(NAMES)}")
    result = shell("-W error all_of_them.py")
    assert result.returncode == 0, result.stderr
