"""What goes wrong, through the command line, for every script that it concerns.

First a table of bad input: a title, what is spoiled in the working folder, the command, and the
words that the one line of error must have in it: the file, the flag, the cure. Before each the
folder holds `data/`, a sound data set with instance maps, and `run/`, a run of two steps. After
each: exit code 2, one line, no traceback, and every file that was there is there unchanged.

Then what is named as a cure is done; and what ends a run, or spoils it, must lose nothing.
"""

import functools
import io
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (
    NAMES, ROWS, TINY, Trap, as_user, assert_same_state, fails, lives, place, png, save, script_of,
    stored, works)
from PIL import Image

import common

WITH_INSTANCES = ("lab2pix", "pix2pixhd")                 # the others do not read these files
WITH_PAIRS = ("pix2pix", "pix2pixhd")                     # lab2pix: V1 alone
WITH_VGG = ("crn_imle", "lab2pix")
T = "{train} --data data --steps 1 --out r"
RUN = "--checkpoint run/checkpoint.pt --gpu -1"
ON = "--resume --out run --steps 9"
BAD, CURES = {}, {}                # title: (what is spoiled, command, words, scripts)
pytestmark = pytest.mark.usefixtures(
    "draw_each_street_once", "steps_take_a_second", "no_plots", "small_scorer")
each_row = pytest.mark.parametrize("row", ROWS)
each_script = pytest.mark.parametrize("name", NAMES)


def bad(title: str, spoil, line: str, *words: str, only: tuple[str, ...] = NAMES) -> None:
    assert title not in BAD, title
    BAD[title] = spoil, line, words, only


# ---------------------------------------------------------- What may be done to a file or a folder

def put(path: str, content: bytes | str = b""):
    def spoil():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    return spoil


def image(path: str, pixels, **options):
    return lambda: save(path, pixels, **options)


def gone(*patterns: str):
    def spoil():
        for path in [p for pattern in patterns for p in Path(".").glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return spoil


def moved(a: str, b: str):
    def spoil():
        Path(b).parent.mkdir(parents=True, exist_ok=True)
        Path(a).rename(b)
    return spoil


def all_of(*spoils):
    return lambda: [spoil() for spoil in spoils]


def nothing():
    pass


def photo(h: int = 40, w: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


def ids(h: int = 40, w: int = 48, kind: type = np.uint8, first: int = 0) -> np.ndarray:
    """Blocks of twelve ids."""
    blocks = np.arange(first, first + 12).reshape(3, 4)
    return blocks[np.arange(h)[:, None] * 3 // h, np.arange(w) * 4 // w].astype(kind)


def sound(root: Path | str) -> Path:
    """Five examples to train on and two to test, in pix2pixHD's layout."""
    for split, n in (("train", 5), ("test", 2)):
        for i in range(n):
            save(f"{root}/{split}_label/{i}.png", ids())
            save(f"{root}/{split}_inst/{i}.png", ids(kind=np.uint16, first=26000))
            save(f"{root}/{split}_img/{i}.png", photo(seed=i))
    return Path(root)


def cityscapes(label: np.ndarray = ids()) -> None:
    for split, i in (("train", 0), ("train", 1), ("val", 0)):
        for kind in ("labelIds", "instanceIds"):
            save(f"city/gtFine/{split}/a/{i}_gtFine_{kind}.png", label)
        save(f"city/leftImg8bit/{split}/a/{i}_leftImg8bit.png", photo())


def saved(content, path: str = "run/checkpoint.pt"):
    """Something as a file of PyTorch's; a function makes it of the run's content."""
    return lambda: torch.save(content(stored("run")) if callable(content) else content, path)


def changed(path: str = "run/checkpoint.pt", config: dict | None = None, **parts):
    """The run's checkpoint with some parts or settings exchanged."""
    return saved(lambda c: c | parts | {"config": c["config"] | (config or {})}, path)


def half(path: str, target: str = ""):
    return lambda: Path(target or path).write_bytes(
        Path(path).read_bytes()[:Path(path).stat().st_size // 2])


# ---------------------------------------------------------------------------- Bad: data and files

for title, spoil, name, *words in (
        ("is a file", put("x", "hello"), "x"), ("is an empty folder", put("x/.DS_Store"), "x"),
        ("is of no known layout", all_of(image("x/one/a.png", photo()), put("x/readme.md")), "x",
         "one/", "readme.md"),
        ("is one level too deep", nothing, "data/train_img"),
        ("is one level too high", moved("data", "x/data"), "x", "data/"),
        ("is missing", nothing, "x"),
        ("is an empty shell variable", nothing, "''")):
    bad(f"--data {title}", spoil, f"{{train}} --data {name}", f"--data {name}".strip("' "), *words)

for title, spoil, *words in (
        ("labels whose photos were never copied", gone("data/*_img"), "--data data", "image"),
        ("a copy that stopped half way", gone("data/train_img/4.png"), "data/train_label/4.png",
         "image", "1 of 5"),
        ("two photos of one name", image("data/train_img/0.jpg", photo()), "data/train_img/0.png",
         "rename"),
        ("no training split", gone("data/train_*"), "--data data", "train"),
        ("a photo of the test split is missing", gone("data/test_img/1.png"),
         "data/test_label/1.png", "image"),
        ("a photo of another size", image("data/train_img/1.png", photo(40, 47)), "train_",
         "1.png", "47", "48")):
    bad(title, spoil, T, *words)
for title, spoil, *words in (
        ("an instance map is missing", gone("data/train_inst/1.png"), "data/train_label/1.png"),
        ("instance maps for training alone", gone("data/test_inst"), "--data data", "instance")):
    bad(title, spoil, T, *words, only=WITH_INSTANCES)
bad("pairs where label maps are needed", all_of(*(image(f"x/{split}/{i}.png", photo(32, 64))
    for split in ("train", "test") for i in range(3))), "{train} --data x", "--data x", "label",
    only=("crn_imle", "lab2pix"))

def encoded(kind: str) -> bytes:
    Image.fromarray(photo()).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


BROKEN = {
    "of no bytes": b"", "of text": b"this is no image\n" * 20, "of zeros": bytes(2000),
    "half a PNG": encoded("PNG")[:2000], "half a JPEG": encoded("JPEG")[:900],
    "a bomb": png(60000, 60000, 8, 2, bytes(99)), "a pickle": pickle.dumps(Trap()),
    "a program in PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 40\nshowpage\n"}
for title, content in BROKEN.items():
    for kind, only in (("img", NAMES), ("label", NAMES), ("inst", WITH_INSTANCES)):
        bad(f"{kind} that is {title}", put(f"data/train_{kind}/0.png", content), T,
            f"data/train_{kind}/0.png", only=only)
bad("a label map that is a JPEG", all_of(gone("data/train_label/0.png"), image(
    "data/train_label/0.jpg", ids())), T, "data/train_label/0", "PNG")
bad("the doctor finds half a photo", put("data/train_img/4.png", BROKEN["half a PNG"]),
    "check --data data --out doctor", "--data data")

# ------------------------------------------------------------------------------ Bad: checkpoints

for title, make, *words in (
        ("a folder", put("x.pt/a"), "checkpoint.pt"), ("missing", nothing),
        ("a log", put("x.pt", "step,loss\n1,2\n")), ("of no bytes", put("x.pt")),
        ("cut in half", half("run/checkpoint.pt", "x.pt")),
        ("of another script", changed("x.pt", script="pix2pixxl"), "pix2pixxl"),
        ("in the old format that runs code", put("x.pt", pickle.dumps({"script": Trap()}, 2))),
        ("in the new format that runs code", changed("x.pt", place=Trap())),
        ("a list", saved([1, 2], "x.pt")), ("of another project", saved(
            {"epoch": 3, "state_dict": {}}, "x.pt")),
        ("without the network", changed("x.pt", generator=None)),
        ("with the weights of another width", changed("x.pt", config={"width": 64})),
        ("of a newer version", changed("x.pt", config={"frobnicate": 1}), "version", "--init")):
    bad(f"a checkpoint that is {title}", make, "sample --checkpoint x.pt --gpu -1", "x.pt", *words)
    if title in ("missing", "cut in half", "in the new format that runs code",
                 "of another project", "without the network"):
        bad(f"weights to start from that are {title}", make, f"{T} --init x.pt", "x.pt", *words)

for title, spoil, line, *words in (
        ("going on from half a checkpoint", half("run/checkpoint.pt"), ON, "run/checkpoint.pt"),
        ("going on from bare weights", saved(lambda c: c["generator"]), ON, "run/checkpoint.pt"),
        ("going on in a folder that was never there", nothing, "--resume --out nowhere",
         "nowhere/checkpoint.pt"),
        ("going on without any run", nothing, "--resume --steps 9", "runs/", "train first"),
        ("scoring without any run", nothing, "evaluate --gpu -1", "runs/", "train first"),
        ("going on without the dataset", moved("data", "elsewhere"), ON, "--data data"),
        ("sampling without the dataset", moved("data", "elsewhere"), f"sample {RUN}",
         "--data data"),
        ("going on with classes of another data set", cityscapes, f"{ON} --data city", "city",
         "12", "--classes")):
    bad(title, spoil, line, *words)
bad("a VGG file that runs code", saved({"features.0.weight": Trap()}, "vgg.pt"),
    f"{T} --vgg vgg.pt {{vgg}}", "vgg.pt", "--vgg", only=WITH_VGG)
bad("a VGG file that is another network", nothing, f"{T} --vgg run/checkpoint.pt {{vgg}}",
    "--vgg run/checkpoint.pt", "VGG-19", only=WITH_VGG)

# ------------------------------------------------------------- Bad: flags, and files to be made

EACH = "--input data/test_label {instances} --samples 1"
for title, spoil, line, *words in (
        ("--out is a file", put("r", "mine"), T, "r"),
        ("--out is below a file", put("x", "mine"), f"{T} --out x/r", "x/r"),
        ("--output is a file, for a folder of inputs", put("o", "mine"),
         f"sample {RUN} {EACH} --output o", "o"),
        ("--output is the folder of the inputs", nothing,
         f"sample {RUN} {EACH} --output data/test_label", "--output data/test_label"),
        ("--output is where the data set's labels are", nothing,
         f"sample {RUN} --output data/test_label --samples 1", "--output data/test_label"),
        ("--input is an empty folder", put("x/.DS_Store"), f"sample {RUN} --input x", "--input x"),
        ("--input is missing", nothing, f"sample {RUN} --input x.png", "x.png"),
        ("--input has two files of one name", all_of(image("x/a.png", ids()), image(
            "x/a.bmp", ids())), f"sample {RUN} --input x", "--input x", "one name"),
        ("--input is a photo", image("a.png", photo()), f"sample {RUN} --output o --input a.png "
         "{own}", "a.png"),
        ("--input is of ids too many", image("a.png", ids(first=5)),
         f"sample {RUN} --output o --input a.png {{own}}", "a.png", "12"),
        ("--size at test time is larger than any memory", image("a.png", ids()),
         f"sample {RUN} --input a.png {{own}} --size 10000000 10000000 --output o", "--size"),
        ("--out is a folder of data", nothing, f"{T} --out data/train_img", "--out"),
        ("--out lies in a folder of data", nothing, f"{T} --out data/test_img/r", "--out"),
        ("--out holds what is no run's", put("o/notes.txt", "mine"), f"{T} --out o", "notes.txt"),
        ("--output lies where the data set's photos are", nothing,
         f"sample {RUN} --output data/train_img --samples 1", "--output data/train_img"),
        ("--output is a photo of one's own", image("o.png", photo()), f"sample {RUN} --input data/"
         "test_label/0.png {instances} --output o.png --samples 1", "o.png")):
    bad(title, spoil, line, *words)
# Whole command lines, and what is said.
for line, *words in (
        ("{train} --lr 0", "--lr 0"), ("{train} --lr nan", "--lr nan"),
        ("{train} --lr 1e400", "--lr inf"), ("{train} --lr fast", "--lr", "fast"),
        ("{train} --lr", "--lr"), ("{train} --width -4", "--width -4"),
        ("{train} --width 4.5", "--width", "4.5"),
        ("{train} --size 32", "--size"), ("{train} --seed -1", "--seed -1"),
        ("{train} --classes x", "x", "cityscapes"), ("{train} --steps -3", "--steps -3"),
        ("{train} --epochs 0", "--epochs 0"), ("{train} --batch-size 0", "--batch-size 0"),
        ("{train} --gpu first", "--gpu", "first"), ("{train} --wid 8", "--wid"),
        ("{train} --preset largest", "--preset", "largest"), ("{train} --out ''", "--out"),
        ("{train} --precision fp64", "fp64", "bf16"), ("trian", "trian", "train"),
        (f"evaluate {RUN} --preset toy", "--preset", "evaluate"),
        (f"sample {RUN} --samples 0", "--samples 0"), (f"sample {RUN} --resume", "--resume"),
        (f"{ON} --seed 7", "--seed 7", "0"), (f"{ON} --size 64 96", "--size", "64", "96")):
    bad(line.replace(RUN, "RUN").replace(ON, "ON"), nothing, line, *words)

# ------------------------------------------------------------------------------------------ Cures


def cure(title: str, spoil, line: str, found: str, better: str, only=NAMES) -> None:
    """`found` is sought in the error; its groups stand in `better`, the command that then works."""
    CURES[title] = spoil, line, (found, better), only


PHOTOS = all_of(*(image(f"x/{split}/{i}.png", photo(32, 63)) for split in ("train", "test")
                  for i in range(3)))
STEPS = "--steps 1 --out r"
for title, spoil, line, found, better in (
        ("a size", nothing, f"{{train}} {STEPS} --size 33 70", r"(--size \d+ \d+)$", "{line} {0}"),
        ("the CPU", nothing, f"{{train}} {STEPS} --gpu 99", "(--gpu -1)", "{line} {0}"),
        ("go on", nothing, "{train} --steps 9 --out run", "(--resume)",
         "{0} --out run --steps 3"),
        ("more steps", nothing, "--resume --out run --steps 2", "(--steps)",
         "--resume --out run {0} 3"),
        ("leave it out", nothing, f"{ON} --lr 0.1", "leave the flag out", ON.replace("9", "3")),
        ("another mode", nothing, "trace {train} --samples 2", "goes with (sample)",
         f"{{0}} {RUN} --samples 2 --limit 1 --output o"),
        ("a checkpoint to train from", nothing, f"{T} --checkpoint run/checkpoint.pt", "(--init)",
         f"{T} {{0}} run/checkpoint.pt"),
        ("a newer version", changed(config={"frobnicate": 1}), ON, "(--init)",
         f"{T} {{0}} run/checkpoint.pt"),
        ("classes", nothing, f"{T} --classes 3", r"(--classes \d+)", "{line} {0}"),
        ("classes of another set", cityscapes, f"sample {RUN} --data city --output o --limit 1 "
         "--samples 1", r"(--classes \d+)", "{line} {0}"),
        ("train first", nothing, "sample --gpu -1 --limit 1 --samples 1", "train first",
         "{train} --steps 1"),
        ("a folder for several", nothing, f"sample {RUN} {EACH} --output o.png", "name a folder",
         "{line} --output o"),
        ("an ending", nothing, f"sample {RUN} --input data/test_label/0.png {{instances}} --output "
         "o.xyz --samples 1", r"(\.png)", "{line} --output o{0}")):
    cure(title, spoil, line, found, better)
cure("a smaller batch", nothing, f"{{train}} {STEPS} --batch-size 6", r"training has (\d)",
     "{line} --batch-size {0}", ("lab2pix", "pix2pix", "pix2pixhd"))
cure("photos alone", PHOTOS, f"{{train}} --data x {STEPS}", "(--task colorization)",
     "{line} {0}", ("pix2pix",))
cure("a larger size for D", nothing, f"{{train}} {STEPS} --patch 142", r"(--size \d+ \d+)$",
     "{line} {0}", ("pix2pix",))
cure("no VGG", nothing, f"{T} --vgg gone.pt {{vgg}}", "(--vgg random)", "{line} {0}", WITH_VGG)
cure("instances for --input", nothing, f"sample {RUN} --input data/test_label --samples 1 "
     "--output o", "(--instances)", "{line} {0} data/test_inst", WITH_INSTANCES)


# ------------------------------------------------------------------ The user, and what is looked at

def runs_in(root: Path, steps: int):
    """row -> its run of so many steps on the data set root / "data", made when first asked for."""
    @functools.cache
    def run(row: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            works(row, f"{TINY[row]} --data data --steps {steps} --out {row}")
        return root / row

    return run


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """A sound dataset, and a run of two steps by a script, copied to the working folder."""
    root = tmp_path_factory.mktemp("templates")
    sound(root / "data")

    trained = runs_in(root, 2)

    def copy(name: str, run: bool = True) -> None:
        shutil.copytree(root / "data", "data")
        if run:
            shutil.copytree(trained(name), "run")

    return copy


def filled(line: str, name: str) -> str:
    maps = "--instances {}" if name in WITH_INSTANCES else ""
    return line.format(train=TINY[name], instances=maps.format("data/test_inst"),
                       own=maps.format("a.png"), vgg="--lambda-5 10" if name == "lab2pix" else "")


def snapshot() -> dict[str, bytes | None]:
    """Every path below the working folder, and what is in it."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in Path(".").rglob("*")}


def nothing_is_lost(before: dict) -> None:
    after = snapshot()
    changed = [path for path in before if path not in after or after[path] != before[path]]
    assert not changed, changed
    assert not [path for path in after.keys() - before.keys() if path.endswith("checkpoint.pt")]
    assert "sprung" not in after, "code in a file that was read has run"


def each_case(table: dict):
    """Every case with every script that it concerns; without --all with one, in turns."""
    cases = [(title, [name for name in NAMES if name in only])
             for title, (*_, only) in table.items()]
    return pytest.mark.parametrize("name, title", [
        pytest.param(name, title, marks=[pytest.mark.slow] * (k != i % len(only)))
        for i, (title, only) in enumerate(cases) for k, name in enumerate(only)])


@each_case(BAD)
def test_bad_input_is_one_line_and_loses_nothing(name, title, templates):
    templates(name)
    spoil, line, words, _ = BAD[title]
    spoil()
    before = snapshot()
    fails(name, filled(line, name), *words)
    nothing_is_lost(before)


@each_script
def test_strange_input_that_is_sound_trains(name, templates):
    """Names of any kind, capital endings, what macOS leaves in folders, a photo more than there are
    labels, no test split, a folder whose name has blanks."""
    templates(name, run=False)
    for path in sorted(Path("data").glob("train_*/*.png")):
        stem = ("Straße", "l'été à Paris #2 (100 %) 東京", "a b", "-x", "c")[int(path.stem)]
        path.rename(path.with_name(f"{stem}.PNG"))
        path.with_name("._0.png").write_bytes(b"\0\0\0\1Bud1")
    save("data/train_img/99.png", photo())
    gone("data/test_*")()
    Path("data").rename("Bilder [für] Übung 1")
    out = works(name, f"{TINY[name]} --steps 1 --data 'Bilder [für] Übung 1' --out 'Läufe im/r'")
    assert place("Läufe im/r")[0] == 1
    assert "5 examples" in out and "99" in out and "no test split" in out


@each_case(CURES)
def test_a_named_cure_cures(name, title, templates):
    """What an error names, a command, a flag or a value, is done; then the next step is reached."""
    templates(name)
    spoil, line, (found, better), _ = CURES[title]
    spoil()
    line, before = filled(line, name), snapshot()
    said = fails(name, line).strip()
    nothing_is_lost(before)
    match = re.search(found, said)
    assert match, f"{found!r} is not in: {said}"
    text = better.replace("{line}", line)
    for k, group in enumerate(match.groups()):
        text = text.replace(f"{{{k}}}", group)
    works(name, filled(text, name))


def test_a_data_process_says_the_same_line(templates):
    """What goes wrong there comes back as the line that it was."""
    templates("pix2pix")
    Path("data/train_img/4.png").write_bytes(BROKEN["half a PNG"])
    life = lives("pix2pix", filled(f"{T} --workers 1 --steps 9", "pix2pix"))
    assert life.code == 2 and len(life.err.splitlines()) == 1, life.err
    assert life.err.startswith("pix2pix.py: error: data/train_img/4.png"), life.err


def as_nobody(name: str, line: str, word: str) -> None:
    """fails() in a process of its own; if we are root, who may do all, it is of another user."""
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            fails(name, line, word)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, line


@pytest.mark.skipif(not hasattr(os, "fork"), reason="permissions are another thing on Windows")
@pytest.mark.parametrize("path, rights, line", [
    ("data/train_label", 0, T), ("data/train_img/0.png", 0, T), ("r", 0o555, T),
    ("run/checkpoint.pt", 0, f"sample {RUN}")])
def test_what_may_not_be_read_or_written(path, rights, line, templates):
    templates("pix2pix")
    Path("r").mkdir()
    for each in (Path("."), *Path(".").rglob("*")):
        each.chmod(0o777)
    before = snapshot()
    Path(path).chmod(rights)
    try:
        as_nobody("pix2pix", filled(line, "pix2pix"), path)
    finally:
        Path(path).chmod(0o777)
    nothing_is_lost(before)


@each_script
def test_a_refused_call_leaves_no_folder(name):
    """Else the next free number, or the same --out, is taken by a run that never was."""
    for words in ("--init nofile.pt", "--gpu 77", "--preset nothing", "--data nowhere"):
        fails(name, f"{TINY[name]} --steps 1 {words}", words.split()[1])
    assert not list(Path(".").iterdir())


def test_exit_codes_of_what_goes_wrong_elsewhere(monkeypatch):
    """A full disk, no memory and Ctrl-C before training: a line each, no traceback."""
    for error, code, words in (
            (OSError(28, "No space left on device", "x/log.csv"), 2, ["No space left"]),
            (KeyboardInterrupt(), 130, []), (MemoryError(), 2, ["--size", "--width"]),
            (torch.OutOfMemoryError("CUDA out of memory.\nMuch more text."), 2,
             ["CUDA out of memory", "--size", "--width", "--precision"])):
        monkeypatch.setattr(common, "describe", Mock(side_effect=error))
        ended = as_user("pix2pix", f"{TINY['pix2pix']} --steps 1")
        assert ended.code == code and len(ended.err.splitlines()) <= 1, ended
        assert all(word in ended.err for word in words), ended


# ------------------------------------------------------------------------------ What ends a run

@pytest.fixture(scope="module")
def whole(tmp_path_factory, templates):
    """row -> a run of six steps on the data set `data`, never interrupted."""
    root = tmp_path_factory.mktemp("whole")
    sound(root / "data")
    return runs_in(root, 6)


def in_step(script, when: int, act) -> None:
    """Call act(state) after the update number `when` of a run, counted from 1."""
    count, step = 0, script.train_step

    def told(state, batch, cfg):
        nonlocal count
        losses = step(state, batch, cfg)
        count += 1
        if count == when:
            act(state)
        return losses

    script.train_step = told


@pytest.fixture
def in_steps(monkeypatch):
    """in_step, and as it was before after the test."""
    def begin(row: str, when: int, act) -> None:
        script = script_of(row)
        monkeypatch.setattr(script, "train_step", script.train_step)
        in_step(script, when, act)

    return begin


def stop_in_step(script, when: int, number: int) -> None:
    def act(state):
        if number == getattr(signal, "SIGHUP", 0):         # with the terminal goes what reads us
            read, write = os.pipe()
            os.close(read)
            os.dup2(write, 1), os.dup2(write, 2)
        os.kill(os.getpid(), number)

    in_step(script, when, act)


def goes_on(row: str, whole, run: str = "r") -> None:
    """Resumed, the run equals the one that nobody interrupted."""
    assert place(run)[0] < 6
    works(row, f"--resume --steps 6 --out {run}")
    assert_same_state(run, whole(row), log=False)


SIGNALS = [n for n in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, n)]


@pytest.mark.parametrize("row, number", [
    *(("pix2pix", number) for number in SIGNALS),
    *((row, SIGNALS[i % len(SIGNALS)]) for i, row in enumerate(NAMES) if row != "pix2pix")])
def test_a_signal_ends_the_step_saves_and_loses_nothing(row, number, templates, whole):
    """Ctrl-C, kill, a closed terminal, where what is printed may only come after what is saved.
    The command that is said to go on with it does."""
    templates(row, run=False)
    number = getattr(signal, number)
    code, out, err = lives(row, f"{TINY[row]} --data data --steps 9 --out r", stop_in_step, 3,
                           int(number))
    assert place("r")[0] == 3
    if number != getattr(signal, "SIGHUP", 0):
        assert code == 128 + number and "Traceback" not in err, err
        words = re.search(rf"at step 3 .* python {row}\.py (--resume .*)$", out, re.MULTILINE)[1]
        works(row, f"{words} --steps 5")
    goes_on(row, whole)


def close_stderr(script) -> None:
    os.close(2)
    sys.stderr = None


@each_script
def test_a_closed_stderr_ends_nothing(name, templates):
    templates(name, run=False)
    assert lives(name, filled(T, name), close_stderr).code == 0
    assert place("r")[0] == 1


@each_row
def test_a_photo_that_goes_bad_late_costs_no_step(row, in_steps, templates, whole):
    """The run ends in the one line, is saved as far as it was, and goes on with the file mended."""
    templates(row, run=False)
    good = {path: path.read_bytes() for path in Path("data/train_img").iterdir()}
    in_steps(row, 3, lambda state: [p.write_bytes(v[:2000]) for p, v in good.items()])
    fails(row, f"{TINY[row]} --data data --steps 6 --out r", "data/train_img/")
    assert place("r")[0] >= 3 and not list(Path("r").glob("*.tmp"))
    for path, content in good.items():
        path.write_bytes(content)
    goes_on(row, whole)


@each_row
def test_a_test_photo_that_cannot_be_read_ends_no_run(row, in_steps, templates, whole):
    templates(row, run=False)
    in_steps(row, 1, lambda state: [p.write_bytes(b"") for p in Path("data/test_img").iterdir()])
    out = works(row, f"{TINY[row]} --data data --steps 6 --out r")
    assert "data/test_img/" in out
    assert_same_state("r", whole(row), log=False)


# ------------------------------------------------------------------------ kill -9, and full disks

def die(script, what: str, n: int) -> None:
    """kill -9 at the n-th call of os.fsync or os.replace, or in the n-th step."""
    def dead(*arguments):
        nonlocal n
        n -= 1
        if n == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    owner = script if what == "train_step" else os
    function = getattr(owner, what)
    setattr(owner, what, dead)


@pytest.mark.parametrize("row, what", [
    (row, ("os.fsync", "os.replace", "train_step")[i % 3]) for i, row in enumerate(NAMES)]
    + [("pix2pix", "os.fsync"), ("pix2pix", "train_step")])
def test_kill_9_leaves_a_whole_checkpoint(row, what, templates, whole):
    """In the second save, written but not named yet; or in a step after it."""
    templates(row, run=False)
    n = 5 if what == "train_step" else 2
    life = lives(row, f"{TINY[row]} --data data --steps 6 --out r", die,
                 what.removeprefix("os."), n)
    assert life.code == -signal.SIGKILL, life.err
    assert place("r")[0] in ((2,) if n == 2 else (2, 4))
    goes_on(row, whole)


def test_killed_in_its_first_save_a_run_is_started_again_by_the_same_command(templates):
    templates("pix2pix", run=False)
    line = filled(T, "pix2pix")
    assert lives("pix2pix", line, die, "fsync", 1).code == -signal.SIGKILL
    works("pix2pix", line)


@pytest.mark.slow
@each_row
def test_many_kills_at_random_moments(row, templates, whole):
    """Started, killed and gone on with, ten times or until it has ended by itself."""
    templates(row, run=False)
    chance, name, step, kills = random.Random(0), row.partition("-")[0], 0, 0
    total = 120
    while step < total:
        line = "--resume --out r" if step else f"{TINY[row]} --data data --out r"
        process = lives(name, f"{line} --steps {total}", wait=False)
        process.join(chance.uniform(0.2, 0.7) if kills < 10 else 600)
        kills += process.exitcode is None
        process.kill()
        process.join()
        now = place("r")[0] if Path("r/checkpoint.pt").exists() else 0
        assert now >= step and process.exitcode in (0, -signal.SIGKILL)
        step = now
    works(row, f"{TINY[row]} --data data --out one --steps {total}")
    assert kills                               # how many depends on the machine
    assert_same_state("r", "one", log=False)


def small_disk(script, room: int) -> None:
    """No file may grow beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


@each_script
def test_a_disk_that_is_full_half_way(name, templates, whole):
    templates(name)
    before = Path("run/checkpoint.pt").read_bytes()
    life = lives(name, "--resume --steps 6 --out run", small_disk, len(before) // 2)
    assert life.code == 2 and "run/checkpoint.pt" in life.err and "Traceback" not in life.err, life
    assert Path("run/checkpoint.pt").read_bytes() == before
    assert not list(Path("run").rglob("*.tmp"))
    goes_on(name, whole, "run")


# ------------------------------------------------------------------------------ What spoils a run

@torch.no_grad()
def ruin(state) -> None:
    next(state.generator.parameters()).fill_(torch.nan)


@each_row
def test_nan_is_never_saved(row, in_steps, templates, whole):
    """Weights ruined by the last update before a save, whose loss was finite, and one earlier."""
    templates(row)
    before = Path("run/checkpoint.pt").read_bytes()
    for when in (2, 1):
        in_steps(row, when, ruin)
        fails(row, "--resume --steps 9 --out run", "nan", "--lr")
        assert Path("run/checkpoint.pt").read_bytes() == before


def flat(script):
    """All outputs of a grid are equal."""
    grid = script.sample_grid

    def zeros(*arguments):
        images = grid(*arguments)
        assert images.ndim == 4 and images.shape[1] == 3 and not images.is_cuda
        return 0 * images

    script.sample_grid = zeros


def always_right(script):
    """D's losses are 0."""
    step = script.train_step
    script.train_step = lambda *a: {name: 0 * value if name.startswith("d_") else value
                                    for name, value in step(*a).items()}


@pytest.mark.parametrize("how", [flat, always_right])
@each_row
def test_a_run_that_died_in_finite_numbers_says_so_and_keeps_the_last_good(row, how, templates,
                                                                           monkeypatch):
    templates(row)
    script = script_of(row)
    if how is always_right and "discriminator" not in stored("run"):
        pytest.skip("it has no D")
    for function in ("train_step", "sample_grid"):         # put back in the end
        monkeypatch.setattr(script, function, getattr(script, function))
    how(script)
    out = works(row, "--resume --steps 6 --out run")
    assert "run/alive.pt" in out and "--lr" in out and place("run")[0] == 6
    assert torch.load("run/alive.pt", weights_only=True)["place"]["step"] == 2
    works(row, "sample --checkpoint run/alive.pt --limit 1 --samples 1 --output o")


@each_script
def test_saves_cost_at_most_a_tenth_of_the_time(name, templates, monkeypatch,
                                                steps_take_a_second):
    """A save of ten seconds, steps of one: after the first it waits for a hundred; and whoever
    stops a run gets a save."""
    saves, write, script = [], common.save_file, script_of(name)

    def slow(content, path):
        steps_take_a_second.now += 10
        saves.append(content["place"]["step"])
        write(content, path)

    monkeypatch.setattr(common, "save_file", slow)
    monkeypatch.setattr(script, "train_step", lambda state, batch, cfg: {
        "d_real": torch.tensor(0.5), "g": torch.tensor(1.0)})
    templates(name, run=False)
    works(name, f"{TINY[name]} --data data --steps 120 --out r")
    assert sorted(set(saves)) == [2, 94, 120]


@each_script
def test_another_scale_than_in_training_is_said_with_its_cure(name, templates):
    templates(name)
    save("a.png", ids(160, 192))
    line = filled(f"sample {RUN} --input a.png {{own}} --output o.png --samples 1", name)
    cure = re.search(r"--size \d+ \d+", works(name, line))[0]
    assert "--size" not in works(name, f"{line} {cure}")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "crn_imle"])
def test_a_score_of_nothing_is_an_error(name):
    """Cityscapes' ids 0 to 5 do not enter a score."""
    cityscapes(ids() // 2)
    works(name, f"{TINY[name]} --data city --classes cityscapes --steps 1 --out r")
    fails(name, "evaluate --out r --vgg random", "--classes")


@each_script
def test_going_on_with_another_dataset_is_said(name, templates):
    """"Exactly" holds for the same examples; of others a notice tells, and nothing breaks."""
    templates(name)
    for kind, pixels in (("label", ids()), ("inst", ids()), ("img", photo())):
        save(f"data/train_{kind}/00.png", pixels)
    out = works(name, "--resume --out run --steps 3")
    assert place("run")[0] == 3 and "data set" in out
