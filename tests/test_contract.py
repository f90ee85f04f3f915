"""What the four scripts owe every user, and each other: one suite, a row per script.

Everything goes through the command line and files. Three names of the scripts are public, and used
here to look inside a run: main(arguments), train(cfg) and train_step(state, batch, cfg).
"""

import ast
import copy
import functools
import inspect
import json
import os
import re
import shutil
import zlib
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch
from conftest import (
    NAMES, ROWS, SCORER, TINY, as_user, assert_same, assert_same_state, count, ended, fails,
    free_port, label_map, lives, losses_of, paper_map, place, rooms, sample_line, script_of, shell,
    size_of, source, stored, works)
from PIL import Image

import common

pytestmark = pytest.mark.usefixtures(
    "draw_each_street_once", "steps_take_a_second", "no_plots", "small_scorer")
each_row = pytest.mark.parametrize("row", ROWS)            # the larger versions with --all alone
each_script = pytest.mark.parametrize("name", NAMES)
# What room 7 alone decides, which is the same in all: with --all for the two larger scripts.
quick_first = pytest.mark.parametrize("row", [
    pytest.param(row, marks=[pytest.mark.slow] * (row not in ("pix2pix", "crn_imle")))
    for row in NAMES])


# -------------------------------------------------------------------------------- What a script is

# Lines of code: today's numbers. The design's goal: 620, 940, 860, 1000, and 1380 in common.py.
LINES = {"pix2pix": 687, "pix2pixhd": 997, "crn_imle": 907, "lab2pix": 1172, "common": 1805}
SETTINGS = {"pix2pix": 35, "pix2pixhd": 44, "crn_imle": 42, "lab2pix": 51}
ROOMS = ["1 Config", "2 Networks", "3 Losses", "4 Training", "5 Sampling", "6 Evaluation",
         "7 The run", "8 Command line and the authors' files"]


@pytest.mark.parametrize("name", [*NAMES, "common"])
def test_lines_of_code(name):
    code, _, tree = count(name)
    assert len(code) <= LINES[name]
    wide = [i for i, line in enumerate(source(name).splitlines(), 1) if len(line) > 100]
    assert not wide, f"over 100 columns: lines {wide[:20]}"
    long = {node.name: n for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
            and (n := node.end_lineno - node.lineno + 1) > 60}
    assert not long


@each_script
def test_rooms_stand_in_order_and_the_first_four_are_commented(name):
    assert list(rooms(name)) == ROOMS
    code, comments, tree = count(name)
    first_four = set(range(*(rooms(name)[room] for room in (ROOMS[0], ROOMS[4]))))
    assert len(comments & first_four) >= len(code & first_four) / 2
    at = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert list(inspect.signature(script_of(name).train_step).parameters) == [
        "state", "batch", "cfg"]
    assert len(code & set(range(at["train"].lineno, at["train"].end_lineno + 1))) <= 30


def shared(name: str) -> list[str]:
    """Room 7, and room 8 from the line on that says so."""
    text = source(name)
    run = text[text.index("# ---", text.index("def evaluate")):]
    run = run[run.index(" 7 The run"):run.index("# ---", 10)]
    end = text.partition("\n# From here on to the end it is word for word the same")[2]
    assert "class Run" in run and "def main" in end
    return [run, end]


def test_what_all_share_is_word_for_word_the_same():
    for name in NAMES:
        for one, other in zip(shared(name), shared("pix2pix")):
            assert one.splitlines() == other.splitlines(), name


@each_script
def test_imports_no_other_script_and_nothing_of_unix_alone(name):
    nodes = [n for n in ast.walk(count(name)[2]) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {n: [a.name for a in n.names] + [getattr(n, "module", "")] for n in nodes}
    others = {"pix2pix", "pix2pixhd", "crn_imle", "lab2pix"} - {name}
    assert not {word for some in names.values() for word in some} & others
    at_import = {word for n, some in names.items() if n.col_offset == 0 for word in some}
    assert "common" in at_import and not at_import & {"resource", "fcntl", "pwd"}   # not on Windows


def test_scripts_import_without_a_warning_and_a_street_is_the_same_in_every_process():
    street = "sorted((k, v.tobytes()) for k, v in common.street(3, 5, (48, 96)).items())"
    Path("all_of_them.py").write_text(f"import {', '.join(NAMES)}, common, zlib\n"
                                      f"print(zlib.crc32(repr({street}).encode()))")
    result = shell("-W error all_of_them.py")
    here = zlib.crc32(repr(eval(street)).encode())
    assert (result.stdout, result.stderr) == (f"{here}\n", "")


# ----------------------------------------------------------------------------------- The paper map

NUMBERED = {"crn_imle": {"Eq.": 1, "Alg.": 1, "Table": 2, "Fig.": 12},
            "lab2pix": {"Eq.": 32, "Table": 6, "Fig.": 21},
            "pix2pix": {"Eq.": 4, "Table": 6, "Fig.": 21},
            "pix2pixhd": {"Eq.": 4, "Table": 2, "Fig.": 11}}
NOWHERE = ("nothing to reproduce", "notebook", "needs people", "tests/")


@each_script
def test_paper_map_points_at_what_exists(name):
    """Every name in it is one of the script's."""
    script, entries = script_of(name), 0
    for entry, where in paper_map(script).items():
        if where.startswith(NOWHERE):
            continue
        entries += 1
        bare = re.sub(r"--[\w-]+( [^\s,;]+)?|\[.*?\]", "", where)
        known = [word for word in re.findall(r"\w+", bare) if hasattr(script, word)]
        assert known, (entry, where)
        code = [w for w in re.findall(r"\w+", bare) if "_" in w or re.search(r"[a-z][A-Z]", w)]
        settings = {f.name for f in common.flags(script.Config)}
        assert set(code) <= set(known) | settings | set(script.PRESETS), (entry, where)
    assert entries > 10


@each_script
def test_paper_map_lists_all_that_is_numbered_and_equations_are_tagged_there(name):
    script, places = script_of(name), {}
    for entry, where in paper_map(script).items():
        for kind, first, last in re.findall(r"(Eq\.|Alg\.|Table|Fig\.) \(?(\d+)(?:-(\d+))?", entry):
            places |= {(kind, n): where for n in range(int(first), int(last or first) + 1)}
    assert not {(kind, n) for kind, last in NUMBERED[name].items()
                for n in range(1, last + 1)} - places.keys()
    for (kind, n), where in places.items():
        if kind == "Eq.":
            texts = [inspect.getsource(getattr(script, word)) for word in re.findall(r"\w+", where)
                     if hasattr(script, word)]
            tags = " ".join(re.findall(r"Eq\. (\([^.:;]*)", "\n".join(texts)))
            spans = re.findall(r"\((\d+)\)(?: to \((\d+)\))?", tags)
            assert any(int(a) <= n <= int(b or a) for a, b in spans), (n, where)


def flags_of(script) -> dict:
    """Flag, with underscores -> its setting; those of edits, in their order, are one setting."""
    return {flag: f for f in common.flags(script.Config) for flag in (
        f.metadata["choices"] if isinstance(f.metadata["choices"], dict) else [f.name])}


def accept(script, words: list[str]) -> None:
    """The program knows these words: flags that the mode has, values in their ranges; and where a
    checkpoint is tested, no flag that it fixes."""
    mode, given = common.parse(words, script.Config, script.NAME, script.MODES, script.__doc__)
    if mode in ("train", "check", "trace"):
        script.configure(given.get("preset", ""), given)
    else:
        script.Config(**given)
        free = {f.name for f in common.flags(script.Config)
                if f.metadata["free"] in ("test", "call")}
        assert set(given) <= free, f"{words}: a checkpoint fixes {set(given) - free}"


@each_script
def test_every_command_of_the_docstring_is_accepted(name):
    """Those of the map, as in "evaluate, after train --loss L1"; those of the last paragraph; and
    each flag, with its value, of the table of what the paper and the released code say."""
    script = script_of(name)
    modes, found = "|".join(script.MODES), []
    for where in paper_map(script).values():
        found += re.findall(rf"\b(?:{modes})(?: --[\w-]+(?: [^-\s,;:)][^\s,;:)]*)*)+", where)
    last = script.__doc__[script.__doc__.rfind("Run  "):]
    found += [re.split(r"\s{2,}", words)[0] for words in re.findall(rf"{name}\.py ?(.*)", last)]
    assert len(found) > 2 and not re.search(r"--\w", "".join(
        where for where in paper_map(script).values() if where.startswith(NOWHERE)))
    for words in found:
        accept(script, words.split())
    settings = flags_of(script)
    table = re.search(r"\nPaper +\|.*?\n\n", script.__doc__, re.DOTALL)[0].strip()
    here = "\n".join(line.split("|")[2].strip() for line in table.splitlines())
    for flag, value in re.findall(r"--(?:no-)?([a-z][\w-]+)(?:[ =]([\w.+-]*\w))?", here):
        f = settings[flag.replace("-", "_")]
        choices = f.metadata["choices"]
        if isinstance(choices, tuple) and value:
            assert value in map(str, choices), (flag, value)


# ------------------------------------------------------------------------------------- The settings

def help_of(name: str) -> dict[str, str]:
    """Flag -> its text, from --help."""
    text = as_user(name, "--help").out.split("\n\n", 1)[1]
    entries = re.split(r"\n  (?=-)", text.partition("Run  ")[0])
    return {re.match(r"--([\w-]+)", e)[1].replace("-", "_"): " ".join(e.split())
            for e in entries if e.startswith("--")}


@each_script
def test_every_setting_is_a_flag_explained_with_its_default(name):
    """What the help gives in brackets is what `--data DIR` alone trains with."""
    script, shown = script_of(name), help_of(name)
    config = script.configure("", {"data": "somewhere"})
    assert set(shown) == set(flags_of(script))
    assert len(common.flags(script.Config)) <= SETTINGS[name]
    for flag, text in shown.items():
        assert len(text.split()) > 3, text                 # not the flag alone
        value, told = getattr(config, flag, None), re.search(r"\(([^()]*)\)$", text)
        words = value if isinstance(value, tuple) else [value]
        words = ["on" if v is True else "off" if v is False else str(v) for v in words]
        if value not in ("", None, ()) and flag != "data":
            assert told and told[1] == " ".join(words), (flag, text, value)
    code, text, _ = as_user(name, "--help")
    assert code == 0 and name in text.strip().splitlines()[-1]


@each_script
def test_every_setting_is_read(name):
    """A setting that nothing reads is a lie to the user."""
    text = source(name)
    assert not [f.name for f in common.flags(script_of(name).Config) if not re.search(
        rf"\bcfg\.{f.name}\b|given\.get\(\"{f.name}\"|given\[\"{f.name}\"|"
        rf"\"{f.name}\" (not )?in given", text)]


@each_script
def test_every_preset_can_be_checked(name):
    """`check` reads the config of every line of the paper's training table."""
    for preset in script_of(name).PRESETS:
        fails(name, f"check --preset {preset} --limit 1 --data nowhere", "nowhere")


# Settings that change no training of a few steps: where, how fast, how long; what is tested.
APART = {"data", "classes", "task", "direction", "vgg", "epochs", "enhancer_epochs", "steps",
         "workers", "compile", "channels_last", "preset", "test_norm"}
# What has to be said besides, in both runs that are compared.
BESIDE = {"crn_imle": {"outputs": "--model crn", "diversity": "--model crn --outputs 2",
                       "released": "--lr-drop 1", "rebalance": "--limit 12"},
          "lab2pix": {"eq5": "--dgnorm", "released": "--dgnorm", "d_norm": "--discriminator hpd",
                      "lambda_2": "--no-ramp",
                      **dict.fromkeys("pg lsca lambda_3 lambda_4".split(), "--version V1 --ups 5")},
          "pix2pix": {"decay": "--epochs 2", "released": "--epochs 2", "levels": "--size 64 64",
                      "bottleneck_norm": "--size 32 64"},
          "pix2pixhd": {"lambda_vgg": "--loss GAN+FM+VGG", "enhancers": "--size 64 64",
                        "released": "--scales 2",
                        "crop": "--enhancers 1 --size 64 64 --epochs 1 --enhancer-epochs 0 9"}}
# What is said in place of the first other choice or the double.
OTHER = {"crn_imle": {"layers": "conv2_1", "modules": "3", "pool": "3", "lr_drop": "1"},
         "lab2pix": {"version": "V1 --ups 5", "ablation": "A_s", "z_size": "128 128",
                     "ups": "5", "pg": "--no-pg --no-lsca --lambda-3 0", "lsca": "--no-lsca",
                     "short": "--no-short"},
         "pix2pix": {"patch": "34", "levels": "4"},
         "pix2pixhd": {"layers": "1 2 1", "crop": "32 32"}}
EVERYWHERE = {"size": "64 96", "limit": "4", "batch_size": "1"}


def other(f, value) -> str:
    """Another value of a setting, as words of the command line."""
    flag, choices = common.flag(f.name), f.metadata["choices"]
    if isinstance(value, bool):
        return flag.replace("--", "--no-") if value else flag
    if isinstance(choices, tuple):
        return f"{flag} {next(c for c in choices if c != value)}"
    return f"{flag} {2 * value or 1}"


@quick_first
def test_every_setting_changes_the_result_and_the_network_can_be_tested(row):
    script, results = script_of(row), {}
    line = f"{TINY[row]} --steps 3"
    words = common.parse(line.split(), script.Config, row, script.MODES, "")[1]
    config = script.configure("toy", words)

    def run(more: str) -> list:
        if more not in results:
            works(row, f"{line} {more} --out 'r {more}'")
            weights = stored(f"r {more}")["generator"].values()
            results[more] = [v.double().sum().item() for v in weights] + losses_of(f"r {more}")
        return results[more]

    for f in common.flags(script.Config):
        if f.name in APART or f.metadata["free"] == "call":
            continue
        beside = BESIDE[row].get(f.name, "")
        special = (EVERYWHERE | OTHER[row]).get(f.name)
        more = special if str(special).startswith("--") else (
            f"{common.flag(f.name)} {special}" if special else other(f, getattr(config, f.name)))
        assert run(beside) != run(f"{beside} {more}"), more
        works(row, f"sample --out 'r {beside} {more}' --limit 1 --samples 1 --output o")


# ---------------------------------------------------------------------------- A run and its folder

plot = matplotlib.figure.Figure.savefig                    # before no_plots


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """row -> a run of six steps on the streets, never interrupted; made when first asked for.

    Tests read it and write elsewhere."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(row: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(matplotlib.figure.Figure, "savefig", plot)
            works(row, f"{TINY[row]} --steps 6 --out {root / row}")
        return root / row

    return run


@each_row
def test_a_run_leaves_what_the_readme_promises(row, runs):
    run, name = runs(row), row.partition("-")[0]
    assert {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} == {
        "config.json", "checkpoint.pt", "log.csv", "losses.png", "samples/0000002.png",
        "samples/0000004.png", "samples/0000006.png"}
    config = json.loads((run / "config.json").read_text())
    assert (config["classes"], config["limit"], config["gpu"]) == ("streets", 5, -1)
    assert min(size_of(run / "samples/0000006.png")) > 3 * config["size"][0]       # a grid
    assert min(size_of(run / "losses.png")) > 300
    rows = losses_of(run)
    assert [(row["step"], row["epoch"]) for row in rows] == [("2", "0"), ("4", "1"), ("6", "2")]
    assert len(rows[0]) > 2 and all(np.isfinite(float(v)) for row in rows for v in row.values())
    content = stored(run)                                  # weights_only=True: it cannot run code
    assert content["script"] == name and place(run) == (6, 2, 4)
    assert json.loads(json.dumps(content["config"])) == config
    assert content["opt_g"]["state"][0]["step"] == 6


@each_row
def test_training_moves_every_weight_that_an_optimiser_holds(row, runs):
    works(row, f"{TINY[row]} --steps 1 --lr 1e-9 --out r")              # as initialised
    first, last = stored("r"), stored(runs(row))
    nets = {k: first.get(k) for k in ("generator", "discriminator", "encoder", "segmenter")}
    for name, weights in ((k, v) for k, v in nets.items() if v):
        still = [k for k, v in weights.items() if k.endswith("weight") and v.dim() > 1
                 and torch.allclose(v, last[name][k], rtol=0, atol=1e-6)]
        assert not still, (name, still)


@quick_first
def test_runs_are_numbered_and_the_newest_is_taken(row):
    works(row, f"{TINY[row]} --steps 1")
    works(row, f"{TINY[row]} --steps 2")
    assert place(f"runs/{row}-1")[0] == 1 and place(f"runs/{row}-2")[0] == 2
    works(row, "--resume --steps 3")
    assert place(f"runs/{row}-2")[0] == 3
    works(row, "sample --limit 1 --samples 1")
    assert [p.suffix for p in Path(f"runs/{row}-2/test").iterdir()] == [".png"]


@quick_first
def test_speed_settings_train_resume_and_sample(row):
    works(row, f"{TINY[row]} --steps 2 --out r --precision bf16 --channels-last")
    works(row, "--resume --steps 3 --out r --precision bf16")
    works(row, "sample --out r --limit 1 --output o --samples 1")
    side = stored("r")["config"]["size"][0]
    assert [size_of(p) for p in Path("o").iterdir()] == [(side, side)]
    assert all(v.dtype != torch.bfloat16 for v in stored("r")["generator"].values())


@pytest.mark.slow
@each_script
def test_compiled_training_agrees(name, monkeypatch):
    """--compile changes the speed, neither the numbers nor the names in the checkpoint. What can
    fail is taking the networks apart, forwards and backwards; no C++ is made of them here."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compile_(net, backend="aot_eager"))
    for out, flag in (("plain", ""), ("compiled", "--compile")):
        assert as_user(name, f"{TINY[name]} --steps 1 --out {out} {flag}").code == 0
    a, b = losses_of("plain")[0], losses_of("compiled")[0]
    assert a.keys() == b.keys() and stored("plain")["generator"].keys() == stored("compiled")[
        "generator"].keys()
    for key in a:
        assert float(b[key]) == pytest.approx(float(a[key]), rel=1e-3, abs=1e-4)


# ------------------------------------------------------------------------------------------ Resume

@each_row
def test_resume_is_bit_exact(row, runs):
    """Stopped in mid-epoch and between epochs (4), and gone on with: equal weights and moments,
    also with data processes, and whatever has become of the log file."""
    workers = 1 if row == "pix2pix" else 0
    works(row, f"{TINY[row]} --steps 1 --out r --workers {workers}")
    for step in (4, 5, 6):
        Path("r/log.csv").write_bytes("Schritt;Straße\n3,ä\n".encode("latin-1"))
        works(row, f"--resume --steps {step} --out r --workers {workers}")
    assert_same_state("r", runs(row), log=False)
    assert [line["step"] for line in losses_of("r")] == ["1", "2", "4", "5", "6"]


def moments_as_parameters(run: Path, last: bool) -> None:
    """The checkpoint's weights and moments in the memory order that a continuation has."""
    order = torch.channels_last if last else torch.contiguous_format

    def laid(part):
        if isinstance(part, dict):
            return {k: laid(v) for k, v in part.items()}
        if torch.is_tensor(part) and part.dim() == 4:
            return part.contiguous(memory_format=order)
        return part

    torch.save(laid(stored(run)), run / "checkpoint.pt")


@each_row
def test_resume_in_another_memory_order_is_exact(row):
    """--channels-last both ways: equal to going on from moments that lay right before."""
    for first, then, last in (("", "--channels-last", True),
                              ("--channels-last", "--no-channels-last", False)):
        shutil.rmtree("a", ignore_errors=True)
        works(row, f"{TINY[row]} --steps 3 --out a {first}")
        shutil.copytree("a", "b", dirs_exist_ok=True)
        moments_as_parameters(Path("b"), last)
        for run in "ab":
            works(row, f"--resume --steps 5 --out {run} {then}")
        assert_same_state("a", "b")


@each_script
def test_the_settings_of_a_call_are_not_taken_from_a_checkpoint(name, runs):
    """What was said in one call, or forged into a file, decides nothing in the next."""
    script, content = script_of(name), stored(runs(name))
    calls = {f.name: getattr(content["config"], f.name, f.default)
             for f in common.flags(script.Config) if f.metadata["free"] == "call"}
    forged = {"out": "stolen", "output": "stolen", "input": "gone.png", "samples": 3,
              "checkpoint": ("gone.pt",), "init": ("gone.pt",), "resume": True, "gpu": 77,
              "item": "gone", "instances": "gone"}
    assert {"out", "output", "input", "samples", "gpu"} <= calls.keys()
    content["config"] |= {k: v for k, v in forged.items() if k in calls}
    Path("r").mkdir()
    torch.save(content, "r/checkpoint.pt")
    works(name, "sample --checkpoint r/checkpoint.pt --limit 1 --samples 1")
    works(name, "--resume --out r --steps 7")
    assert place("r")[0] == 7 and len(list(Path("r/test").iterdir())) == 1
    assert not Path("stolen").exists()


@each_row
def test_init_starts_anew_from_the_weights(row, runs):
    """Fine-tuning: the networks as in the file, Adam and the counters from nothing."""
    seen, script = [], script_of(row)
    shutil.copy(runs(row) / "checkpoint.pt", "weights.pt")
    step = script.train_step

    def spy(state, batch, cfg):
        seen.append((bool(state.opt_g.state), {k: v.clone() for k, v in
                                               state.generator.state_dict().items()}))
        return step(state, batch, cfg)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "train_step", spy)
        works(row, f"{TINY[row]} --steps 1 --out tuned --seed 3 --init weights.pt")
    assert not seen[0][0] and place("tuned")[0] == 1
    moving = ("num_batches_tracked", "running_mean", "running_var", "._u", "._v")
    weights = stored(runs(row))["generator"]
    assert_same({k: v for k, v in seen[0][1].items() if not k.endswith(moving)},
                {k: v for k, v in weights.items() if not k.endswith(moving)})
    Path("weights.pt").unlink()                            # resuming reads it no more
    works(row, "--resume --steps 2 --out tuned")
    works(row, "sample --limit 1 --out tuned --samples 1")


# --------------------------------------------------------------------------------------- Test time

@each_row
def test_sample_needs_no_flags_and_keeps_the_size(row, runs):
    """A label map of any size gives a photo of that size; a folder gives a folder, each alone."""
    label_map("in/a.png")
    label_map("in/b.png", 64, 20)
    works(row, sample_line(row, runs(row), "in/a.png", "--output photo.png"))
    works(row, sample_line(row, runs(row), "in", "--output photos"))
    assert {p.name: size_of(p) for p in Path("photos").iterdir()} == {
        "a.png": (53, 37), "b.png": (20, 64)}
    assert size_of("photo.png") == (53, 37)
    assert Path("photo.png").read_bytes() == Path("photos/a.png").read_bytes()
    works(row, sample_line(row, runs(row), "in/a.png", "--output big.jpg --size 64 96"))
    assert size_of("big.jpg") == (96, 64)


@each_row
def test_every_image_and_sample_has_a_draw_of_its_own_by_seed_and_name(row, runs):
    """Two samples of two equal layouts: four pictures; the same whenever asked, in any company."""
    label_map("in/a.png")
    shutil.copy("in/a.png", "in/b.png")
    for folder, files in (("one", "in"), ("two", "in/a.png")):
        works(row, sample_line(row, runs(row), files, f"--output {folder} --samples 2"))
    works(row, sample_line(row, runs(row), "in/a.png", "--output three --seed 7 --samples 1"))
    read = {str(p): p.read_bytes() for p in Path(".").glob("*/*.png")
            if "grid" not in p.name and p.parts[0] != "in"}
    names = [f"one/{name}_{k}.png" for name in "ab" for k in (1, 2)] + ["three/a.png"]
    assert len({read[name] for name in names}) == 5
    assert all(read[f"one/a_{k}.png"] == read[f"two/a_{k}.png"] for k in (1, 2))


@pytest.mark.parametrize("h, w", [(37, 53), (2, 3), (1, 1), (96, 64)])
def test_padding_is_by_reflection(h, w):
    """numpy's, repeated where the image is smaller than what it lacks; nothing at a multiple."""
    x = torch.rand(1, 1, h, w)
    more = [(0, max(-side % 32, 48 - side, 0)) for side in (h, w)]
    padded = common.mirror_pad(x, 32, 48)
    assert np.array_equal(padded[0, 0].numpy(), np.pad(x[0, 0].numpy(), more, "reflect"))


@each_row
def test_outputs_are_grey_where_the_photos_of_training_were(row, runs):
    content = stored(runs(row))
    content["config"]["understood"]["image"] = {"grey": True, "span": None}
    Path("r").mkdir()
    torch.save(content, "r/checkpoint.pt")
    label_map("a.png", 64, 64)
    works(row, sample_line(row, "r", more="--output o.png"))
    shades = np.asarray(Image.open("o.png").convert("RGB")).astype(int)
    assert not np.ptp(shades, -1).any() and np.ptp(shades) > 0


PRINTED = {  # the papers' numbers beside a run's: of its own patch, the truth, all or one D, ...
    "crn_imle": ["8.804 7.725", "3.415 2.87"], "lab2pix": ["0.936 0.738 0.646 45.500"],
    "pix2pix": ["16 .65 .21 .17", "true photos .80 .26 .21"],
    "pix2pixhd": ["ours 83.78 0.6389", "pix2pix 78.34 0.3948", "CRN 70.55 0.3483",
                  "oracle 84.29 0.6857", "one D 82.87 0.5775"]}


@each_row
def test_evaluate_writes_its_metrics_beside_the_papers_and_repeats_them(row, runs):
    more, texts = "" if row == "crn_imle" else SCORER, []
    shutil.copytree(runs(row), "r")
    for folder, line in (("r", ""), ("new/folder", "--checkpoint r/checkpoint.pt")):
        out = " ".join(works(row, f"evaluate {line} --out {folder} {more} --limit 2").split())
        texts.append(Path(folder, "metrics.json").read_text())
        assert all(line in out for line in PRINTED.get(row, [])) and re.search(r"\d\.\d\d", out)
    assert texts[0] == texts[1] and 2 in json.loads(texts[0]).values()
    assert "NaN" not in texts[0]                           # not JSON


@each_script
def test_check_reports_and_trains_nothing(name):
    text = works(name, "check --size 64 128 --limit 3")
    assert "streets" in text and "road" in text
    assert len(list(Path(".").rglob("contact_*.png"))) == 2
    assert not list(Path(".").rglob("checkpoint.pt"))


@each_row
def test_trace_prints_stages_and_costs(row, runs):
    text = works(row, f"trace {TINY[row]}")
    size = stored(runs(row))["config"]["size"]
    assert re.search(rf"\(\d, 3, {size[0]}, {size[1]}\)", text)
    parameters = sum(v.numel() for k, v in stored(runs(row))["generator"].items() if not k.endswith(
        ("running_mean", "running_var", "num_batches_tracked", "._u", "._v")))
    assert f"{parameters:,}" in text or row == "pix2pixhd" and "generator" in text
    assert "GFLOP" in text and not Path("runs").exists()


# ----------------------------------------------------------------------------- Several processes

def two_processes(name: str, line: str, act=None, *arguments) -> None:
    """The script as torchrun starts it twice on one machine."""
    port, running = str(free_port()), []
    for rank in "01":
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                   MASTER_PORT=port, TORCHELASTIC_RUN_ID="test")
        running.append(lives(name, line, act, *arguments, env=env, wait=False))
    for rank, process in zip("01", running):
        life = ended(process, rank)
        assert life.code == 0, life.err[-3000:]


def record_gradients(script, kind: str) -> None:
    """Each update's gradients go to a file; of kind "one", a batch of two is two batches of one."""
    step, rank = script.train_step, int(os.environ.get("RANK", 0))

    def one(state, batch, cfg, k):
        torch.manual_seed(k)
        losses = step(state, batch, cfg)
        torch.save([p.grad for net in vars(state).values() if isinstance(net, torch.nn.Module)
                    for p in net.parameters()], f"{kind}{k}.pt")
        return losses

    def told(state, batch, cfg):
        if kind == "two":
            return one(state, batch, cfg, rank)
        for k in (0, 1):
            part = {key: [layer[k:k + 1] for layer in v] if torch.is_tensor(v[0]) and not
                    torch.is_tensor(v) else v[k:k + 1] for key, v in batch.items()}
            losses = one(copy.deepcopy(state), part, cfg, k)
        return losses

    script.train_step = told


@pytest.mark.slow
@each_row
def test_two_processes_have_the_mean_of_two_images_gradients(row):
    """At a learning rate near 0, so that D is the same when G is updated against it."""
    name, line = row.partition("-")[0], f"{TINY[row]} --steps 1 --lr 1e-9 --gpu -1"
    two_processes(name, f"{line} --batch-size 1 --out a", record_gradients, "two")
    life = lives(name, f"{line} --batch-size 2 --out b", record_gradients, "one")
    assert life.code == 0, life.err
    both, alone = ([torch.load(f"{kind}{k}.pt") for k in (0, 1)] for kind in ("two", "one"))
    assert_same(both[0], both[1])
    moved = 0
    for mean, a, b in zip(both[0], *alone):
        if mean is not None:
            scale = float(a.abs().max() + b.abs().max())
            torch.testing.assert_close(mean, (a + b) / 2, rtol=1e-3, atol=1e-4 * scale + 1e-9)
            moved += bool(scale)
    assert moved > 5


@pytest.mark.slow
@each_script
def test_two_processes_make_one_run_which_one_process_can_resume(name):
    two_processes(name, f"{TINY[name]} --batch-size 1 --steps 3")
    assert [p.name for p in Path("runs").iterdir()] == [f"{name}-1"]
    assert place(f"runs/{name}-1") == (3, 1, 2)            # two of four images
    assert not any(k.startswith("module.") for k in stored(f"runs/{name}-1")["generator"])
    works(name, "--resume --steps 5")
    assert place(f"runs/{name}-1")[0] == 5
