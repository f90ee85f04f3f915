"""What goes wrong, through the command line, for every script that it concerns.

First a table: what an error says, what cures it, and ways to provoke it. Before each the working
folder holds `data/`, a sound data set with instance maps, and `run/`, a run of two steps. After
each: exit code 2, one line, no traceback, and every file that was there is there unchanged. Then
the cure that the line names, a command, a flag, a value or a file, is done, and all is well. A test
looks into the sources for what is said there and stands in no row.

Then what ends a run, or spoils it, must lose nothing.
"""

import ast
import contextlib
import functools
import io
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from conftest import (
    NAMES, ROWS, SCORER, TINY, Trap, as_user, assert_same_state, count, fails, lives, mistake,
    place, png, save, script_of, stored, works)
from PIL import Image

import common
import crn_imle
import pix2pix
import pix2pixhd

WITH_INSTANCES = ("lab2pix", "pix2pixhd")                 # the others do not read these files
WITH_VGG = ("crn_imle", "lab2pix")
WITH_SCORES = ("lab2pix", "pix2pix", "pix2pixhd")
HD, CRN, LAB, PIX = ("pix2pixhd",), ("crn_imle",), ("lab2pix",), ("pix2pix",)
T = "{train} --data data --steps 1 --out r"
X = "{train} --data x --steps 1 --out r"
C = "check --data data --out doctor"
RUN = "--checkpoint run/checkpoint.pt --gpu -1"
ON = "--resume --out run --steps 9"
FAULTS = []                        # (what is said, its cure, what is spoiled, command, words, whom)
pytestmark = pytest.mark.usefixtures(
    "draw_each_street_once", "steps_take_a_second", "no_plots", "small_scorer")
each_row = pytest.mark.parametrize("row", ROWS)
each_script = pytest.mark.parametrize("name", NAMES)


def faults(says: str, cure, *cases, only: tuple[str, ...] = NAMES) -> None:
    """says: a part of the text in the source, {} for what is filled in; of two parts, as "a|b", one
    is said.

    cure: a regular expression, sought in what was said; and the command that works, in which {0}
    is its first group, and {line} the old command; or a function of the groups that mends files, so
    that the old command works. A command alone, or a function, needs nothing from the text.
    cases: a command; or, in a tuple, what is spoiled before it, and words that must be said, too.
    """
    cure = cure if isinstance(cure, tuple) else ("", cure)
    for case in cases:
        case = case if isinstance(case, tuple) else (case,)
        spoil, line, *words = ((), *case) if len(case) < 2 or isinstance(case[0], str) else case
        FAULTS.append((says, (*cure, "{line} {0}")[:2], spoil, line, words, only))


pix, hd, crn, lab = (functools.partial(faults, only=name) for name in (PIX, HD, CRN, LAB))


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


def photo(h: int = 40, w: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


def ids(h: int = 40, w: int = 48, kind: type = np.uint8, first: int = 0) -> np.ndarray:
    """Blocks of twelve ids."""
    blocks = np.arange(first, first + 12).reshape(3, 4)
    return blocks[np.arange(h)[:, None] * 3 // h, np.arange(w) * 4 // w].astype(kind)


def in_palette(shift: int) -> Image.Image:
    made = Image.fromarray(ids())
    made.putpalette(range(shift, shift + 48))
    return made


def sound(root: Path | str = "data") -> Path:
    """Five examples to train on and two to test, in pix2pixHD's layout."""
    for split, n in (("train", 5), ("test", 2)):
        for i in range(n):
            save(f"{root}/{split}_label/{i}.png", ids())
            save(f"{root}/{split}_inst/{i}.png", ids(kind=np.uint16, first=26000))
            save(f"{root}/{split}_img/{i}.png", photo(seed=i))
    return Path(root)


def as_png(path: str) -> None:
    """A file saved as PNG: ids in 8 bit of grey, and photos in 8 bit of colour."""
    Path(path).unlink()
    save(Path(path).with_suffix(".png"), photo() if "img" in path else ids())


def labels(change):
    """All label maps of the data set changed."""
    return lambda: [save(path, change(np.array(Image.open(path))).astype(np.uint8))
                    for path in Path("data").glob("*_label/*.png")]


def photos(w: int, *folders: str):
    return [image(f"x/{folder}/{i}.png", photo(32, w, i)) for folder in folders for i in range(3)]


def cityscapes(label: np.ndarray = ids()) -> None:
    for split, i in (*(("train", i) for i in range(5)), ("val", 0)):
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


# -------------------------------------------------------------------------------- Faults: data

FILE = r"error: (\S+): "                                   # with which an error begins
again = lambda *_: (gone("data/*/*\n*")(), sound())
faults("not a folder|no such folder", T, (put("x", "hello"), X, "--data x"), (X, "--data x"))
faults("no known layout; looked for", (r"--data (\S+): .* train_label/\*", sound),
       (put("x/.DS_Store"), X), ([image("x/one/a.png", photo()), put("x/readme.md")], X, "one/",
       "readme.md"), (moved("data", "x/data"), X, "data/"))
pix("photos only, for pix2pix.py", ("(--task colorization)",),
    "{train} --data data/train_img --steps 1 --out r")
pix("photos only, for pix2pix.py", (r"--data (\S+): .* belong into its (train)/", lambda data,
    split: moved(data, f"y/{split}")() or moved("y", data)()), (photos(64, "."),
    f"{X} --task pairs"))
faults("is not read; save as PNG", (FILE, as_png), ([put("x/train_label/0.npy"),
       image("x/train_img/0.png", photo())], "check --data x --out o"))
faults("{} files are needed, its", again, (gone("data/*_img"), T, "data data", "train_img/**/*"))
lab("{} files are needed, its", again, (gone("data/test_inst"), T, "--data data", "instance"))
faults("{} files are needed, its", T, (photos(64, "train", "test"), X, "x", "train_label/**/*"),
       only=("crn_imle", "lab2pix"))
pix("another --task may do without", ("(--task)", "{line} {0} pairs"), (photos(64, "train", "test"),
    f"{X} --task photo2labels"))
hd("train with --no-boundary", (r"(--no-boundary) \(and (--pool label)", "{line} {0} {1}"),
   (gone("data/test_inst"), T, "--data data", "instance"))
hd("has no label maps with objects", (r"(--features 0)",), (photos(64, "train", "test"), X,
   "--data x"))
faults("no {} of the same name", again, (gone("data/train_img/4.png"), T, "data/train_label/4.png",
       "image", "1 of 5"), (image("data/test_label/a\nb.png", ids()), T, r"test_label/a\nb.png"))
faults("no {} of the same name", again, (gone("data/train_inst/1.png"), T,
       "data/train_label/1.png"), only=WITH_INSTANCES)
for cure in (lambda path: Path(path).unlink(), lambda path: Path(path).rename("data/new.png")):
    faults("the same example as", (FILE, cure), (image("data/train_img/0.jpg", photo()), T,
           "data/train_img/0.png"))
faults("with an empty {} split; fill it", again, (gone("data/train_*"), T, "--data data", "train"))
faults("sizes differ (height, width)", again, (image("data/train_img/1.png", photo(40, 47)), T,
       "train_", "1.png", "47", "48"))
pix("has no B in its {} split", "{line} --direction AtoB", (photos(32, "trainA", "trainB", "testA"),
    f"{X} --task pairs --direction BtoA"))
pix("like two images side by side", ("(--task colorization)",), (photos(63, "train", "test"), X))
pix("like two images side by side", (r"halves into (trainA)/, (trainB)/",
    lambda *halves: [do(photos(32, half)) for half in halves]), (photos(63, "train"),
    f"{X} --task pairs"))

def encoded(kind: str, mode: str = "RGB") -> bytes:
    Image.fromarray(photo()).convert(mode).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


BROKEN = {
    "of no bytes": b"", "of text": b"this is no image\n" * 20, "of zeros": bytes(2000),
    "half a PNG": encoded("PNG")[:2000], "half a JPEG": encoded("JPEG")[:900],
    "a bomb": png(60000, 60000, 8, 2, bytes(99)), "a pickle": pickle.dumps(Trap()),
    "a program in PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 40\nshowpage\n"}
for content in BROKEN.values():
    for kind, only in (("img", NAMES), ("label", NAMES), ("inst", WITH_INSTANCES)):
        faults("save it as PNG, or download it again|a part of it would be lost; save as", (
            FILE, as_png), (put(f"data/train_{kind}/0.png", content), T,
                            f"data/train_{kind}/0.png"), only=only)
faults("save it as PNG, or download it again", (FILE, as_png), (put("data/train_img/4.png",
       BROKEN["half a PNG"]), C, "data/train_img/4.png"))
faults("a part of it would be lost; save as", (FILE, as_png), ([gone("data/train_img/0.png"),
       put("data/train_img/0.jpg", encoded("JPEG", "CMYK"))], T, "data/train_img/0.jpg"))
faults("more than 8 bit per pixel", (FILE, as_png), (image("data/train_img/0.png",
       ids(kind=np.uint16, first=999)), T, "data/train_img/0.png"))
faults("8 bit per pixel, unlike", (FILE, as_png), ([gone("data/test_*/1.png"), image(
       "data/test_img/0.png", ids(kind=np.uint16, first=999))], T, "data/test_img/0.png"))
faults("a part of it would be lost; save as", (FILE, as_png), (image("data/train_img/0.png",
       ids(kind=np.uint16), transparency=5), T, "data/train_img/0.png", "with transparency"))
faults("a part of it would be lost; save as", (FILE, as_png),
       ([gone("data/train_label/0.png"), image("data/train_label/0.jpg", ids())], T))
faults("colours are not in the dataset's palette", (FILE, as_png), (image("data/train_label/0.png",
       photo()), f"{C} --classes cityscapes"))
faults("a colour label map, in the palette of no known", (FILE, as_png),
       (image("data/train_label/0.png", photo()), T))
faults("class, than in other files", (FILE, as_png),
       ([image(f"data/train_label/{i}.png", in_palette(i)) for i in (0, 1)], T))
faults("a mask; divide it by", (r"divide it by (\d+)", lambda n: labels(lambda x: x // int(n))()),
       (labels(lambda x: 255 * (x > 5)), T))
faults("divide masks of 0 and 255 by 255", (r"255 by (\d+)",
       lambda n: labels(lambda x: x // int(n))()), (labels(lambda x: 255 * (x > 5)),
       f"{C} --classes 12"))
faults("occur, hardly ids of classes", (r"(--classes \d+)",), (labels(lambda x: 9 * x), T))
faults("occur, hardly ids of classes", (r"renumber them from (0)", again), (labels(lambda x: 9 * x),
       T))
faults("correct the file or", (r"(--classes \d+)",), f"{T} --classes 3")
faults("correct the file or", (FILE, as_png), (image("data/train_label/3.png",
       ids(first=5)), f"{T} --classes 12"))
faults("no class that is {} occurs", again, (labels(lambda x: 0 * x + 255), f"{C} --classes 12"))
faults("neither a number nor one of", (r"one of (\w+)", "{line} --classes {0}"), f"{C} --classes x")
faults("if ids mean the same, say", (r"(--classes \d+)",), (cityscapes,
       f"sample {RUN} --data city --output o --limit 1 --samples 1", "city", "12"), (cityscapes,
       f"{ON} --data city", "city", "12"))
CITY = "{train} --data city --steps 1 --out c --classes"
faults("no class that is {} occurs", ("read as (--classes)", f"{CITY} 12 --out d ; "
       f"evaluate --out d {SCORER}"), ([lambda: cityscapes(ids() // 2), f"{CITY} cityscapes"],
       f"evaluate --out c {SCORER}"), only=WITH_SCORES)
faults("is of a class that is scored, so that scores", ("--classes", lambda: common.
       segmentation_scores(torch.eye(2))), lambda: common.segmentation_scores(torch.zeros(2, 2)))
faults("the streets need at least", (r"least (\d+) x (\d+)", "{line} --size {0} {1}"),
       "check --size 16 16 --limit 2 --out o")
faults("streets have their own", ("leave the flag out", "check --limit 2 --out o"),
       "check --classes 9 --limit 2 --out o")

# ------------------------------------------------------------------------------ Faults: checkpoints

S = "sample --checkpoint x.pt --gpu -1"
OK = f"sample {RUN} --limit 1 --samples 1 --output o"
named = ("name a checkpoint of", OK)
NO_FILE = "name a file in it|no such file"
faults(NO_FILE, ("name a file", "sample --checkpoint x.pt/checkpoint.pt --gpu -1 --limit 1 "
       "--samples 1"), (moved("run", "x.pt"), S, "x.pt"))
faults("train first, or name a checkpoint", ("train first", f"{T.replace('--out r', '')} ; sample"
       " --gpu -1 --limit 1 --samples 1"), ("sample --gpu -1", "runs/"),
       ("evaluate --gpu -1", "runs/"), ("--resume --steps 9", "runs/"))
faults(NO_FILE, named, (S, "x.pt"), (f"{T} --init x.pt", "x.pt"), ("--resume --out nowhere",
       "nowhere/checkpoint.pt"))
for make in (put("x.pt", "step,loss\n1,2\n"), put("x.pt"), half("run/checkpoint.pt", "x.pt"),
             put("x.pt", pickle.dumps({"script": Trap()}, 2)), changed("x.pt", place=Trap())):
    faults("damaged, or not plain weights", named, (make, S, "x.pt"), (make, f"{T} --init x.pt"))
faults("damaged, or not plain weights", ("train first", T), (half("run/checkpoint.pt"), ON))
faults("not a dict of weights", named, (saved([1, 2], "x.pt"), S, "x.pt"))
faults("and no released generator; its|released G or E; its|{}: no checkpoint of {}.py", OK,
       (saved({"epoch": 3, "state_dict": {}}, "x.pt"), S, "x.pt"), (saved(lambda c: c["generator"],
       "x.pt"), "--resume --checkpoint x.pt", "x.pt"))
faults("{}: holds {}, but no {} for this run", OK, (changed("x.pt", generator=None), S, "x.pt"),
       (changed("x.pt", generator=None), f"{T} --init x.pt", "x.pt"))
faults("has another size, other classes, or is", OK, (changed("x.pt", config={"width": 64}), S))
faults("has another size, other classes, or is", ("another (size)", "{line} --width 4"),
       f"{T} --init run/checkpoint.pt --width 64", only=("crn_imle", "pix2pix", "pix2pixhd"))
pix("a checkpoint of {}.py, not of", (r"of (\w+)\.py, not",
    lambda script: script_of(script).main(OK.split())), lambda: crn_imle.main(OK.split()))
faults(": of another version", ("(--init)", f"{T} {{0}} run/checkpoint.pt"),
       (changed(config={"frobnicate": 1}), ON, "version"), (changed(config={"frobnicate": 1}),
       f"sample {RUN}", "version"))
pix("released weights know no dataset", ("say (--input) or (--data)",
    lambda *flags: [pix2pix.stored_config(ours(), "x.pt", {flag[2:]: "data"},
    True) for flag in flags]), lambda: pix2pix.stored_config(ours(), "x.pt", {}, True))
hd("no generator among these files", ("give its file", lambda: pix2pixhd.released_config(ours(),
   {"classes": "12"})), lambda: pix2pixhd.released_config(ours("encoder"), {}))
hd("a boundary adds 1", ("--classes", lambda: pix2pixhd.released_config(ours(), {"classes": "12"})),
   lambda: pix2pixhd.released_config(ours(), {}))


def ours(*names: str) -> dict:
    """The run's weights, as if they had been read from files of the authors'."""
    return {name: stored("run").get(name) for name in names or ("generator", "encoder")}


V = "{train} --steps 1 --out r --vgg"
for title, spoil, vgg in ((NO_FILE, (), "gone.pt"), ("damaged, or not plain weights", saved(
        {"features.0.weight": Trap()}, "vgg.pt"), "vgg.pt")):
    faults(title, ("(--vgg random)",), (spoil, f"{V} {vgg} {{vgg}}", vgg), only=WITH_VGG)
faults("holds no weights of VGG-16 or VGG-19", ("(--vgg random)",),
       (f"{V} run/checkpoint.pt {{vgg}}", "--vgg run/checkpoint.pt"), only=WITH_VGG)
vgg_of = lambda depth, width: [*common.vgg_trunk(depth, width).parameters()]


def no_network() -> None:
    with patch("torch.hub.load_state_dict_from_url", side_effect=OSError("no network")):
        common.read_vgg(19, "imagenet")


crn("use --vgg small|--vgg imagenet: {} cannot be had", (r"use --vgg (small), --vgg (random), or --"
    "vgg FILE", lambda *words: [common.read_vgg(19, word) for word in words]), no_network)
crn("not {}; use VGG-16", (r"VGG-(\d+)",
    lambda depth: common.vgg_weights(common.vgg_trunk(16), vgg_of(int(depth), 64))),
    lambda: common.vgg_weights(common.vgg_trunk(16), vgg_of(16, 4)))


def scorer() -> None:
    common.fcn_scorer(common.Dataset("data", size=(32, 32)), Path("."), torch.device("cpu"),
                      "random")


def spoiled_scorer() -> None:
    scorer()
    for path in Path(".").glob("fcn8s*.pt"):
        path.write_bytes(b"")


pix("delete it; it will be trained again", (FILE + ".* (delete) it", lambda path,
    _: Path(path).unlink() or scorer()), (spoiled_scorer, scorer))

# -------------------------------------------------- Faults: flags, and files that are to be made

IN = "--input data/test_label {instances} --samples 1"
ONE = "--input data/test_label/0.png {instances} --samples 1"
faults("no such flag", ("(--help)", "{0}"), ("{train} --wid 8", "--wid"))
faults("--help lists all flags", ("(--help)", "{0}"), ("{train} --lr", "--lr"),
       ("{train} --size 32", "--size"), ("{train} --precision fp64", "fp64", "bf16"))
for line in ("--lr fast", "--width 4.5", "--gpu mps", "--limit 1e9"):
    faults("{} {}: must be {}", T, (f"{{train}} {line}", line))
faults("no such mode, or a value", (r"there are (\w+)", "{0} {train} --steps 1"), ("trian", "trian"))
faults("{} goes with {}, not with {}", ("goes with (sample)", f"{{0}} {OK[7:]}"),
       "trace {train} --samples 2", only=NAMES)
faults("{} goes with {}, not with {}", (r"goes with (train)", "{0} {train} --steps 1"),
       (f"evaluate {RUN} --preset toy", "--preset", "evaluate"), f"sample {RUN} --resume")
faults("'': empty; leave the flag out", ("leave the flag out", T), (f"{T} --out ''", "--out"),
       (f"{T} --data ''", "--data"))
faults("{} {}: must be {}", (r"(--[\w-]+) \S+: must be (\d\S*?)(\.\.|$| or)", "{line} {0} {1}"),
       *((f"{C} {flag} {value}", flag) for flag, value in (("--lr", "0"), ("--lr", "nan"), ("--lr",
       "1e400"), ("--width", "-4"), ("--seed", "-1"), ("--seed", "9" * 20), ("--batch-size", "0"))),
       f"{OK} --samples 0")
faults("{} {}: must be {}", ("(--steps)", "{line} {0} 1"), (f"{T} --steps -3", "--steps -3"))
faults("choose one of", (r"choose one of ([\w-]+)", "{line} --preset {0}"),
       (f"{C} --preset largest", "--preset", "largest"))
for name, why in (("pix2pix", "G halves each side {} times, D"), ("crn_imle", "the modules halve"),
                  ("pix2pixhd", "22{}, G halves each"), ("lab2pix", "doublings, each")):
    faults(f"{why}|so both sides must be", (r"the nearest is (--size \d+ \d+)$",),
           f"{T} --size 33 70", only=(name,))
faults("--gpu -1 is the CPU", ("(--gpu -1)",), f"{T} --gpu 99")
faults("a step needs {} images", (r"training has (\d)", "{line} --batch-size {0}"),
       f"{T} --batch-size 6", only=WITH_SCORES)
faults("holds a run already", ("(--resume)", "{0} --out run --steps 3"),
       "{train} --steps 9 --out run")
faults("ended at step", ("raise (--epochs) or (--steps)", "--resume --out run {1} 3"),
       "--resume --out run --steps 2")
faults("{} {} contradicts {}", ("leave the flag out", "--resume --out run --steps 3"),
       (f"{ON} --lr 0.1", "--lr 0.1"), (f"{ON} --seed 7", "--seed 7", "0"), (f"{ON} --size 64 96",
       "--size", "64", "96"), (f"{ON} --preset toy", "--preset toy"))
faults("{} {} contradicts {}", ("leave the flag out", OK), *((f"{mode} {RUN} --width 64", "64",
       "4") for mode in ("sample", "evaluate")), only=("crn_imle", "pix2pix", "pix2pixhd"))
for better in (f"{T} {{1}} run/checkpoint.pt", "{0} --steps 3 --checkpoint run/checkpoint.pt"):
    faults("--checkpoint goes with", (r"goes with (--resume) here; (--init)", better),
           f"{T} --checkpoint run/checkpoint.pt")
faults("leave one of them out", ("(--resume) goes on", "{0} --out run --steps 3"),
       f"{ON} --init run/checkpoint.pt")
for line in (f"--resume {RUN} --steps 3", f"sample {RUN} --limit 1 --samples 1"):
    faults("holds another run", ("name a new folder", "{line} --out y"),
           (lambda: shutil.copytree("run", "other"), f"{line} --out other"))
faults("lies in what is read", (r"(--out\w*) \S+: lies in .* another place", "{line} {0} y"),
       f"--resume {RUN} --steps 3 --out data/test_img", "check --data data --out data/test_img",
       f"sample {RUN} --limit 1 --samples 1 --out data/train_label/new",
       f"sample {RUN} {IN} --output data/test_label", f"sample {RUN} --output data/test_label "
       "--samples 1", f"sample {RUN} --output data/train_img --samples 1", f"{T} --out "
       "data/train_img", f"{T} --out data/test_img/r")
faults("holds {}; name a new folder", ("name a new folder", "{line} --out y"), (put("o/notes.txt",
       "mine"), f"{T} --out o", "notes.txt"), (put("o/log.csv", "mine"), "--resume --steps 3 "
       f"{RUN} --out o", "log.csv"))
faults("is none of ours", ("name another place", "{line} --output y.png"), (image("o.png",
       photo()), f"sample {RUN} {ONE} --output o.png"))
crn("is none of ours", ("name another place", "{line} --out y"), (put("r/metrics.json", "{}"),
    f"evaluate {RUN} --out r --limit 1 --samples 2"))
faults("is none of ours", ("name another place", "{line} --out y"), (put("r", "mine"), T),
       (image("doctor/contact_train.png", photo()), C))
faults("one file for several images", ("name a folder", "{line} --output o"),
       f"sample {RUN} {IN} --output o.png")
faults("{}: cannot be written ({})", (r"(\.png)", "{line} --output o{0}"),
       f"sample {RUN} {ONE} --output o.xyz")
faults("[Errno", "{line} --out y", (put("x"), f"{T} --out x/r", "x/r"))
faults("[Errno", "{line} --output y", (put("o"), f"sample {RUN} {IN} --output o", "o"))
faults("out of memory; a smaller", ("smaller (--size)", "{line} {0} 32 32"), (image("a.png", ids()),
       f"sample {RUN} --input a.png {{own}} --samples 1 --size 10000000 10000000 --output o.png"))
faults("a folder without images", ("folders in it are not read", f"sample {RUN} {IN} --output o"),
       (put("x/a/.DS_Store"), f"sample {RUN} --input x", "--input x"))
faults("save it as PNG, or download it again", (FILE, lambda path: save(path, ids())),
       (f"sample {RUN} --input x.png --output o --samples 1"), only=("crn_imle", "pix2pix"))
faults("several files of one name", ("by it", lambda: moved("x/a.PNG", "x/b.PNG")()),
       ([image("x/a.png", ids()), image("x/a.PNG", ids())], f"sample {RUN} --input x --output o "
        "--samples 1", "--input x", "one name"), only=("crn_imle", "pix2pix"))
faults("this network needs instance maps", (r"(--instances)$", "{line} {0} data/test_inst"),
       f"sample {RUN} --input data/test_label --samples 1 --output o", only=WITH_INSTANCES)
faults("no map named", (r"named (\w+)", lambda name: shutil.copytree("data/test_inst", "x",
       dirs_exist_ok=True)), (put("x/a.png"), f"sample {RUN} --input data/test_label --instances x "
       "--samples 1 --output o"), only=WITH_INSTANCES)
faults("colours are not in the dataset's palette", (FILE, as_png), (image("a.png", photo()),
       f"sample {RUN} --output o --input a.png {{own}} --samples 1"), only=("crn_imle", "pix2pix"))
faults("correct the file or", (FILE, as_png), (image("a.png", ids(first=5)),
       f"sample {RUN} --output o --input a.png {{own}} --samples 1", "12"))
faults("makes them alike", (r"(--size \d+ \d+)",), (image("a.png", ids(160, 192)),
       f"sample {RUN} --input a.png {{own}} --output o.png --samples 1"))

# ------------------------------------------------------------- Faults: what one paper's run has

pix("G halves each side {} times, D", (r"(--size \d+ \d+)$",), f"{T} --patch 142")
hd("--epochs 0: leaves", (r"an (--init)", "{line} {0} run/checkpoint.pt"),
   f"{T} --size 64 64 --enhancers 1 --epochs 0 --enhancer-epochs 0 9")
hd("would move a stage", ("leave it out", "--resume --out s --steps 4"),
   ([f"{T} --size 64 64 --enhancers 1 --epochs 1 --enhancer-epochs 0 9 --steps 3 --out s"],
   "--resume --out s --steps 4 --epochs 2"))
hd("so both sides must be", (r"the nearest is (--crop \d+ \d+)$",), f"{T} --crop 17 16")
PLAIN = f"{T} --features 0 --out o"                        # a run without an encoder
for line in ("encode", "sample --samples 2"):
    faults("has no encoder; train with|no encoder: a label map has one", (
        "(--features 3)", f"{T} {{0}} --out p ; {line} --out p"), ([PLAIN], f"{line} --out o"),
           only=HD)
hd("encode keeps them", ("(encode) keeps them", f"{{0}} {RUN} ; {{line}}"),
   (saved(lambda c: c | {"styles": {}}), f"edit {RUN} --style 26000=0"))
hd("object {}: not in this scene", (r"which has \[(\d+)", f"edit {RUN} --remove {{0}}"),
   f"edit {RUN} --remove 7")
hd("--style {}={}: {} has {}", (r"--(style \d+=)\d+: .* from (0) on", f"edit {RUN} --{{0}}{{1}}"),
   f"edit {RUN} --style 26000=99")
hd("no stuff that could grow", "{line} --instances data/test_label/0.png", (image("a.png",
   0 * ids() + 9), f"edit {RUN} --input data/test_label/0.png --instances a.png --remove 9"))
hd("lies outside the image", f"edit {RUN} --paste 26000@2,2", f"edit {RUN} --paste 26000@99,0")
hd("nothing was changed yet", f"edit {RUN} --remove 26000 --undo", f"edit {RUN} --undo")
hd("--{} {}: expected {}", (r"expected ID=(K)", f"edit {RUN} --style 26000=0"),
   f"edit {RUN} --style red")
hd("--item {}: not there", (r"there are (\w+)", "{line} --item {0}"), f"edit {RUN} --item 77")
hd("class {}: choose a number below", (r"of (class \d+)", f"edit {RUN} --set '26000={{0}}'"),
   f"edit {RUN} --set 26000=x")
CRN_RUN = f"{T} --model crn --out o"
crn("this CRN has {} output(s)", (r"has (\d) output", "{line} --samples {0}"), ([CRN_RUN],
    "sample --out o --samples 99 --limit 1"))
crn("needs noise, which a CRN has not", ("train with (--model imle)",
    f"{T} {{0}} ; interpolate --out r"), ([CRN_RUN], "interpolate --out o"))
crn("needs layouts of one size", (r"give (--size) H W", "{line} {0} 32 32"), ([image("x/a.png",
    ids()), image("x/b.png", ids(64, 64))], f"transfer {RUN} --input x --output o"))
crn("video drives a car of", ("(--input)$", "{line} {0} data/test_label"), f"video {RUN}")
crn("each photo is of one colour", again, ([image(f"data/train_img/{i}.png", 0 * photo())
    for i in range(5)], T, "--data data"))
lab("{}: not in --version {}", (r"not in (--version) V2", "{line} {0} V1"), f"{C} --pg")
lab("{}: not in --version {}", (r"not in (--version) V1", "{line} {0} V2"),
    f"{C} --version V1 --first label")
lab("--task sketch: for --version V1", ("for (--version V1), with (--T 1)", "{line} {0} {1}"),
    (photos(64, "trainA", "trainB", "testA"), "check --data x --out o --task sketch"))
lab("they need --pg", ("need (--pg)",), f"{C} --version V1 --no-pg")
lab("--preset or --ablation is {}'s", (r"is (V\d)'s", "{line} --version {0}"),
    f"{C} --version V2 --preset V1-cityscapes")
lab("G's first feature is one pixel", (r"larger (--size) or (--batch-size)", "{line} {1} 2"),
    f"{T} --ups 6 --batch-size 1")
lab("this network has no noise, so one", ("so (one) image", "{line} --samples 1"),
    ([f"{T} --first label --out o"], "sample --out o --samples 2 --limit 1"))


def busy(**env: str) -> None:
    with (patch.object(os, "getloadavg", lambda: (99.0,)), patch.dict(os.environ, env),
          patch.multiple(torch, get_num_threads=lambda: 8, set_num_threads=Mock())):
        if not env:
            os.environ.pop("OMP_NUM_THREADS", None)
        common.choose_threads.__wrapped__()


pix("this machine is busy", (r"(OMP_NUM_THREADS)=(\d+)", lambda name, n: busy(**{name: n})), busy)
faults("output is nan or infinite", ("another (--checkpoint)", "{line} {0} run/alive.pt"), ([
    lambda: shutil.copyfile("run/checkpoint.pt", "run/alive.pt"), saved(lambda c: c | {
        "generator": {key: 3e38 * value.sign() if value.is_floating_point() else value
                      for key, value in c["generator"].items()}})],
    "sample --out run --gpu -1 --limit 1 --samples 1"))

# What names a cure and stands in no row, and where it is looked at instead; and what names none:
# errors of which the file or the value that they begin with is the whole matter, and notices.
ELSEWHERE = {
    "to go on: python": "test_a_signal_ends_the_step_saves_and_loses_nothing",
    "looks dead: D's": "test_a_run_that_died_in_finite_numbers_says_so_and_keeps_the_last_good",
    "check its permissions": "test_what_may_not_be_read_or_written",
    "may not be written; name another": "test_what_may_not_be_read_or_written",
    "data process was ended from outside": "test_a_killed_data_process_is_one_line",
    "not saved, since weights are nan": "test_nan_is_never_saved",
    ": stopped; the last good checkpoint": "test_nan_is_never_saved",
    "cannot be written ({}); what was saved": "test_a_disk_that_is_full_half_way"}
NO_CURE = ("{}", "bad files){}", "has no {} files",
           "of another size than when the run began")


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
    return line.format(train=TINY[name], instances=maps.format("data/test_inst"), own=maps.format(
        "a.png"), vgg="--lambda-5 10" if name == "lab2pix" else "")


def do(spoil, name: str = "") -> None:
    """What is done before: a function, a command that works, or several of them."""
    for each in spoil if isinstance(spoil, (list, tuple)) else [spoil]:
        works(name, filled(each, name)) if isinstance(each, str) else each()


def snapshot() -> dict[str, bytes | None]:
    """Every path below the working folder, and what is in it."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in Path(".").rglob("*")}


def nothing_is_lost(before: dict) -> None:
    after = snapshot()
    changed = [path for path in before if path not in after or after[path] != before[path]]
    assert not changed, changed
    assert not [path for path in after.keys() - before.keys() if path.endswith("checkpoint.pt")]
    assert "sprung" not in after, "code in a file that was read has run"


@functools.cache
def texts() -> dict[tuple[str, str], str]:
    """Each text that a user gets in an error, and in a notice that names a cure, with {} for what
    is filled in: (file, text) -> function."""
    found = {}
    for name in ("common", *NAMES):
        for function in [n for n in ast.walk(count(name)[2]) if isinstance(n, ast.FunctionDef)]:
            for node in ast.walk(function):
                called = getattr(node, "func", None) or getattr(node, "targets", [None])[0]
                if getattr(called, "attr", getattr(called, "id", "")) in SPEAKERS:
                    parts = node.args if isinstance(node, ast.Call) else [node.value]
                    text = ", ".join(map(written, parts))
                    always = getattr(called, "id", "") in ("UserError", "check_sides")
                    if always or CURE.search(text):
                        found[name, text] = function.name
    return found


SPEAKERS = {"UserError", "notice", "print", "write", "load_file", "require", "check_sides",
            "cure", "text"}                                # called, or assigned to
CURE = re.compile(r"(?<!^)--[a-z]|python |; .*\b(leave|check|train|start)|\b(keep|take|save|name a|"
                  r"name another|rename|remove|delete|divide|renumber|pass|use|choose|help|"
                  r"nearest i|must be|there are|which ha|goes with|looked for|expected)s?\b")


def written(node: ast.AST) -> str:
    """The text that an expression gives, as it stands in the source."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(written, node.values))
    if isinstance(node, ast.BinOp):
        return written(node.left) + written(node.right)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.IfExp):
        return f"{written(node.value.body)} {written(node.value.orelse)}"
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "format":
        return written(node.func.value)
    return "{}"


@pytest.mark.parametrize("said, of_processes", [
    (RuntimeError("unable to write to file </torch_7_8>: No space left on device (28)"), True),
    (EOFError(), True), (ConnectionResetError(104, "Connection reset by peer"), True),
    (RuntimeError("out of resource: shared memory, Required: 98304, limit: 65536"), False)])
def test_only_errors_of_data_processes_are_taken_for_them(said, of_processes, capfd):
    with pytest.raises(SystemExit if of_processes else RuntimeError):
        common.shell(Mock(side_effect=said), "x")
    assert ("--workers 0" in capfd.readouterr().err) == of_processes


def test_all_that_is_said_stands_in_the_table():
    """So each error, and each notice that names a cure, is provoked, and the cure is taken from the
    text and applied."""
    rows = [(part, only, found) for says, (found, _), *_, only in FAULTS
            for part in says.split("|")]
    rows += [(part, NAMES, "") for part in NO_CURE] + [(part, NAMES, part) for part in ELSEWHERE]
    left, unclear = dict(texts()), []
    for part, only, found in rows:
        meant = [key for key in texts() if key[1] == part] or [k for k in texts() if part in k[1]]
        if len(meant) != len({file for file, _ in meant}) or not (meant or "Errno" in part):
            unclear.append((part, meant))
        here = {text for file, text in meant if file in ("common", *only)
                and (found or not CURE.search(text))}
        left = {key: place for key, place in left.items() if key[1] not in here}
    assert not unclear, "said nowhere, or in several places"
    assert not left, "said, and in no row that applies a cure"
    assert all(test in globals() for test in ELSEWHERE.values())


def told(name: str, line) -> tuple[int, str]:
    """Exit code of a command, or of a function that stands for one; all that it said."""
    common.notice.cache_clear()                            # else it is said once
    if isinstance(line, str):
        ended = as_user(name, filled(line, name))
        if ended.code:
            mistake(ended, name, line)
        return ended.code, ended.err + ended.out
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            line()
        except common.UserError as error:
            return 2, f"error: {error}"
    return 0, out.getvalue()


def is_said(says: str, text: str) -> bool:
    return any(re.search(re.escape(part).replace(r"\{\}", ".*"), text) for part in says.split("|"))


@pytest.mark.parametrize("name, case", [
    pytest.param(name, case, id=f"{i} {case[0][:40]}-{name}", marks=[pytest.mark.slow] * (
        k != i % len(case[-1])))
    for i, case in enumerate(FAULTS) for k, name in enumerate(case[-1])])
def test_what_goes_wrong_is_one_line_that_loses_nothing_and_its_cure_cures(name, case, templates):
    """With every script that it concerns; without --all with one, in turns."""
    says, (found, better), spoil, line, words, _ = case
    templates(name)
    do(spoil, name)
    before = snapshot()
    code, text = told(name, line)
    assert is_said(says, text) and all(word in text for word in words), text
    if code:
        nothing_is_lost(before)
    match = re.search(found, text)
    assert match, f"{found!r} is not in: {text}"
    again = line
    if callable(better) and callable(line):
        again = functools.partial(better, *match.groups())
    elif callable(better):
        better(*match.groups())
    else:
        again = better.replace("{line}", line if isinstance(line, str) else "")
        for k, group in enumerate(match.groups()):
            again = again.replace(f"{{{k}}}", group)
    for each in again.split(" ; ") if isinstance(again, str) else [again]:
        code, text = told(name, each)
        assert code == 0, f"{each}: {text}"
    assert not is_said(says, text), text


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


def test_a_data_process_says_the_same_line(templates):
    """What goes wrong there comes back as the line that it was."""
    templates("pix2pix")
    Path("data/train_img/4.png").write_bytes(BROKEN["half a PNG"])
    life = lives("pix2pix", filled(f"{T} --workers 1 --steps 9", "pix2pix"))
    assert life.code == 2 and len(life.err.splitlines()) == 1, life.err
    assert life.err.startswith("pix2pix.py: error: data/train_img/4.png"), life.err


def kill_workers(script, when: int) -> None:
    in_step(script, when, lambda state: [p.kill() for p in multiprocessing.active_children()])


@pytest.mark.parametrize("when", [1, 3])
def test_a_killed_data_process_is_one_line(when, templates):
    """By a lack of memory, say. torch says so wherever the training is, in the midst of a step."""
    templates("pix2pix", run=False)
    life = lives("pix2pix", filled(f"{T} --workers 1 --steps 9", "pix2pix"), kill_workers, when)
    assert life.code == 2 and len(life.err.splitlines()) == 1, life.err
    cure = re.search("(--workers 0) needs none", life.err)
    assert cure, life.err
    again = "--resume --out r" if Path("r/checkpoint.pt").exists() else T
    works("pix2pix", filled(f"{again} --steps 9 {cure[1]}", "pix2pix"))


def as_nobody(act, *arguments: str) -> None:
    """act(*arguments) in a process of its own; if we are root, who may do all, of another user."""
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            act(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, arguments


@pytest.mark.skipif(not hasattr(os, "fork"), reason="permissions are another thing on Windows")
@pytest.mark.parametrize("path, rights, line, cure", [
    ("data/train_label", 0, T, "check its permissions"), ("data/train_img/0.png", 0, T, ""),
    ("r", 0o555, T, ""), *(("run", 0o555, f"{mode} {RUN} --limit 1{vgg}", "name another --out")
                           for mode, vgg in (("sample", ""), ("evaluate", " --vgg random"))),
    ("run/checkpoint.pt", 0, f"sample {RUN} --limit 1", "")])
def test_what_may_not_be_read_or_written(path, rights, line, cure, templates):
    templates("pix2pix")
    Path("r").mkdir()
    for each in (Path("."), *Path(".").rglob("*")):
        each.chmod(0o777)
    line, before = filled(line, "pix2pix"), snapshot()
    Path(path).chmod(rights)
    try:
        as_nobody(fails, "pix2pix", line, path, cure)
        if "--out" in cure:
            as_nobody(works, "pix2pix", f"{line} --out y")
    finally:
        Path(path).chmod(0o777)
    nothing_is_lost(before)
    as_nobody(works, "pix2pix", line)


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


def small_disk(script, room: int) -> None:
    """No file may grow beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


@each_script
def test_a_disk_that_is_full_half_way(name, templates, whole):
    templates(name)
    before = Path("run/checkpoint.pt").read_bytes()
    life = lives(name, "--resume --steps 6 --out run", small_disk, len(before) // 2)
    assert life.code == 2 and re.search(r"run/\w+.pt: cannot be .*kept$", life.err), life
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
def test_going_on_with_another_dataset_is_said(name, templates):
    """"Exactly" holds for the same examples; of others a notice tells, and nothing breaks."""
    templates(name)
    for kind, pixels in (("label", ids()), ("inst", ids()), ("img", photo())):
        save(f"data/train_{kind}/00.png", pixels)
    out = works(name, "--resume --out run --steps 3")
    assert place("run")[0] == 3 and "data set" in out
