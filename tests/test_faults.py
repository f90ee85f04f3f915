"""Bad input through the command line, for every script that it concerns.

BAD is one table: a title, a function that spoils something in the working folder, and the words
that the one line of error must have in it. Before each of them the folder holds `data/`, a sound
dataset of two pairs a split with instance maps, and `run/`, a finished run of one step. After each:
exit code 2, one line on stderr, no traceback, and every file that was there is there unchanged.

GOOD is the other side: input that looks strange and has to work. Last come what needs another user
(folders without permission) and a real shell.
"""

import ast
import contextlib
import functools
import importlib
import io
import os
import pickle
import shlex
import shutil
import struct
import sys
import zlib
from pathlib import Path
from types import CodeType

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, Trap, shell, stored
from PIL import Image

NAMES = ("crn_imle", "lab2pix", "pix2pix", "pix2pixhd")
WITH_INSTANCES = ("lab2pix", "pix2pixhd")                 # the others do not read these files
WITH_PAIRS = ("pix2pix", "pix2pixhd")                     # lab2pix: V1 alone
ONE = "--epochs 2 --batch-size 1 --steps 1 --gpu -1 --out r"
TRAIN = {
    "crn_imle": f"--size 32 32 --width 4 --layers conv1_1 --pool 2 --candidates 1 --inner-steps 2 "
                f"--rebalance none --vgg random --lr 0.001 {ONE}",
    "lab2pix": f"--size 64 64 --width 2 --noise 4 --d-width 2 --discriminator patch --T 1 "
               f"--scales 1 --no-dgnorm --lambda-5 0 --vgg random --vgg-width 2 --ups 4 {ONE}",
    "pix2pix": f"--size 32 32 --width 4 --patch 16 {ONE}",
    "pix2pixhd": f"--size 32 32 --enhancers 0 --width 4 --downs 2 --blocks 1 --scales 1 "
                 f"--d-width 4 --features 0 --loss GAN+FM --vgg random {ONE}"}
V1 = ("--version V1 --size 128 128 --width 2 --noise 4 --d-width 2 --vgg random --vgg-width 2 "
      f"--ups 5 --s-width 2 --s-size 64 {ONE}")
VGG = {"lab2pix": "--lambda-5 10 --vgg-width 64", "pix2pixhd": "--loss GAN+FM+VGG"}
LABELS_ONLY = {"lab2pix": "--no-edges", "pix2pixhd": "--no-boundary"}
RUN = "--checkpoint run/checkpoint.pt --gpu -1"
SCORER = "--vgg random --scorer-width 2 --scorer-steps 2"
HUGE = 10 ** 12                        # always with `check`, which would allocate nothing

BAD, GOOD = {}, {}                     # title: (function, the scripts that it concerns)


def case(table: dict, title: str, only: tuple[str, ...] = NAMES):
    """Note a function in a table. It returns a command line, and words that must be said."""
    def note(make):
        assert title not in table, title
        table[title] = make, only
        return make
    return note


def bad(title: str, only: tuple[str, ...] = NAMES):
    return case(BAD, title, only)


def good(title: str, only: tuple[str, ...] = NAMES):
    return case(GOOD, title, only)


# ------------------------------------------------------------------------------ Files of all kinds

def save(path: Path | str, image: np.ndarray | Image.Image, **options) -> str:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return str(path)


def photo(h: int = 40, w: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


def ids(h: int = 40, w: int = 48, kind: type = np.uint8, first: int = 0) -> np.ndarray:
    """Blocks of twelve ids."""
    blocks = np.arange(first, first + 12).reshape(3, 4)
    return blocks[np.arange(h)[:, None] * 3 // h, np.arange(w) * 4 // w].astype(kind)


def sound(root: Path) -> Path:
    """Two examples a split in pix2pixHD's layout."""
    for split in ("train", "test"):
        for i in range(2):
            save(root / f"{split}_label/{i}.png", ids())
            save(root / f"{split}_inst/{i}.png", ids(kind=np.uint16, first=26000))
            save(root / f"{split}_img/{i}.png", photo(seed=i))
    return root


def encoded(kind: str, image: np.ndarray | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photo() if image is None else image).save(buffer, kind, **options)
    return buffer.getvalue()


def flipped(data: bytes, at: int) -> bytes:
    """One byte changed, as a bad disk or a bad cable does."""
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1:]


def bomb(side: int = 60000) -> bytes:
    """A PNG of a hundred bytes that promises 3.6 gigapixels."""
    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))
            + chunk(b"IEND", b""))


def numpy_file() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, photo())
    return buffer.getvalue()


# ------------------------------------------------------------------ The user, and what is looked at

@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> Path:
    """A sound dataset, and a run of one step by each script, to be copied."""
    root = tmp_path_factory.mktemp("templates")
    sound(root / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in NAMES:
            line = f"{TRAIN[name]} --data data {LABELS_ONLY.get(name, '')} --out {name}"
            code, _, err = as_user(name, line)
            assert code == 0, err
    return root


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """losses.png takes longer to draw than all the rest."""
    for name in NAMES:
        monkeypatch.setattr(importlib.import_module(name).Log, "plot", lambda self: None)


def prepare(templates: Path, name: str) -> None:
    shutil.copytree(templates / "data", "data")
    shutil.copytree(templates / name, "run")


@functools.cache
def last_lines(name: str) -> CodeType:
    """What stands below `if __name__ == "__main__"`."""
    source = ast.parse((SCRIPTS / f"{name}.py").read_text())
    return compile(ast.Module([source.body[-1]], type_ignores=[]), f"{name}.py", "exec")


def as_user(name: str, line: str) -> tuple[int, str, str]:
    """The script as it runs from a shell, in this process: exit code, stdout, stderr.

    What main raises goes through the script's own last lines; what they let through would be a
    traceback.
    """
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")          # as strict as a terminal
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    code, before = 0, sys.argv
    sys.argv = [f"{name}.py", *shlex.split(line)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            exec(last_lines(name), vars(importlib.import_module(name)) | {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code or 0
    except Exception as error:
        code = f"a traceback: {type(error).__name__}: {error}"
    finally:
        sys.argv = before
    for stream in (out, err):
        stream.seek(0)
    return code, out.read(), err.read()


def snapshot() -> dict[str, bytes | None]:
    """Every path below the working folder, and what is in it."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in Path(".").rglob("*")}


def assert_refused(name: str, line: str, words: tuple, code: int, err: str, before: dict) -> None:
    assert code == 2, f"{line}: exit code or error {code}"
    lines = err.splitlines()
    assert len(lines) == 1, f"{line}: {len(lines)} lines, the last of them {lines[-1]}"
    assert err.startswith(f"{name}.py: error: "), err
    for word in words:
        assert word in err, f"{word!r} is not in: {err}"
    after = snapshot()
    changed = [path for path in before if path not in after or after[path] != before[path]]
    assert not changed, changed
    assert not [path for path in after.keys() - before.keys() if path.endswith("checkpoint.pt")]
    assert "sprung" not in after, "code in a file that was read has run"


# -------------------------------------------------------------------------------- Bad: the dataset

@bad("--data is a file")
def _():
    Path("notes.txt").write_text("hello")
    return "{train} --data notes.txt", "--data notes.txt", "not a folder"


@bad("--data is an empty folder")
def _():
    Path("empty").mkdir()
    return "{train} --data empty", "--data empty", "train_label", "found nothing"


@bad("--data is of no known layout")
def _():
    save("scans/one/a.png", photo())
    Path("scans/readme.md").write_text("hello")
    return "{train} --data scans", "--data scans", "no known layout", "one/", "readme.md"


@bad("--data holds nothing but what macOS leaves")
def _():
    Path("mac/__MACOSX/train_label").mkdir(parents=True)
    for name in ("mac/.DS_Store", "mac/__MACOSX/train_label/._0.png"):
        Path(name).write_bytes(b"\0\0\0\1Bud1")
    return "{train} --data mac", "--data mac", "no known layout", "__MACOSX/"


@bad("--data is one level too deep")
def _():
    return "{train} --data data/train_img", "--data data/train_img", "photos only"


@bad("--data is one level too high")
def _():
    Path("all").mkdir()
    Path("data").rename("all/data")
    return "{train} --data all", "--data all", "no known layout", "data/"


@bad("--data is a link to nowhere")
def _():
    Path("link").symlink_to("gone")
    return "{train} --data link", "--data link", "no such folder"


@bad("a name of 300 letters")
def _():
    return f"{{train}} --data {'x' * 300}", "xxx"


@bad("labels whose photos were never copied")
def _():
    shutil.rmtree("data/train_img")
    shutil.rmtree("data/test_img")
    return "{train} --data data", "--data data", "photos"


@bad("a folder of photos that is still empty")
def _():
    for path in Path("data/train_img").iterdir():
        path.unlink()
    return "{train} --data data", "--data data", "photos"


@bad("a copy that stopped half way: the second photo is missing")
def _():
    Path("data/train_img/1.png").unlink()
    return "{train} --data data", "data/train_label/1.png", "no image", "1 of 2"


@bad("a photo that is still downloading")
def _():
    Path("data/train_img/1.png").rename("data/train_img/1.png.part")
    return "{train} --data data", "data/train_label/1.png", "no image"


@bad("a photo that is a link to nowhere")
def _():
    Path("data/train_img/0.png").unlink()
    Path("data/train_img/0.png").symlink_to("/gone/0.png")
    return "{train} --data data", "data/train_label/0.png", "no image"


@bad("a folder with the name of a photo")
def _():
    Path("data/train_img/0.png").unlink()
    Path("data/train_img/0.png").mkdir()
    return "{train} --data data", "data/train_label/0.png", "no image"


@bad("photos under other names")
def _():
    for i in range(2):
        Path(f"data/train_img/{i}.png").rename(f"data/train_img/photo_{i}.png")
    return "{train} --data data", "data/train_label/0.png", "no image", "2 of 2"


@bad("two photos of one name")
def _():
    save("data/train_img/0.jpg", photo())
    return "{train} --data data", "data/train_img/0.png", "same name", "rename"


@bad("no training split")
def _():
    for path in Path("data").glob("train_*"):
        shutil.rmtree(path)
    return "{train} --data data", "--data data", "train split"


@bad("a photo of the test split is missing")
def _():
    Path("data/test_img/1.png").unlink()
    return "{train} --data data", "data/test_label/1.png", "no image"


@bad("an instance map is missing", WITH_INSTANCES)
def _():
    Path("data/train_inst/1.png").unlink()
    return "{train} --data data", "data/train_label/1.png", "no instance"


@bad("instance maps for training alone", WITH_INSTANCES)
def _():
    shutil.rmtree("data/test_inst")
    return "{train} --data data", "--data data", "instance maps", "--no-"


def gta() -> None:
    for i in range(3):
        save(f"gta/labels/{i}.png", ids())
        save(f"gta/images/{i}.png", photo())


@bad("a split list that names other files")
def _():
    gta()
    Path("gta/train.txt").write_text("images/00001.png\n")
    return "{train} --data gta", "--data gta", "train split"


@bad("a split list that is not UTF-8")
def _():
    gta()
    Path("gta/train.txt").write_bytes("Straße.png\n".encode("latin-1"))
    return "{train} --data gta", "gta/train.txt", "UTF-8"


@bad("a list without B", WITH_PAIRS)
def _():
    save("one/trainA/0.png", photo())
    return "{train} --data one", "--data one", "without photos"


@bad("pairs of photos where label maps are needed", ("crn_imle", "lab2pix"))
def _():
    save("pairs/train/0.png", photo(32, 64))
    return "{train} --data pairs", "--data pairs", "pix2pix pairs", "label"


@bad("photos alone, taken for pairs", WITH_PAIRS)
def _():
    save("pairs/train/0.png", photo(32, 63))
    return "{train} --data pairs", "pairs/train/0.png", "63", "side by side"


@bad("pairs in the direction that has no B", WITH_PAIRS)
def _():
    save("ab/trainA/0.png", photo())
    return "{train} --data ab --direction BtoA", "--direction BtoA", "no B"


@bad("one example where two are needed", ("lab2pix",))
def _():
    for path in Path("data").glob("*/1.png"):
        path.unlink()
    return f"{V1} --data data", "--data data", "one example"


# ---------------------------------------------------------------------------------- Bad: the files

BROKEN = {
    "of no bytes": lambda: b"", "of text": lambda: b"this is no image\n" * 20,
    "of nothing but zeros": lambda: bytes(2000),          # the disk was full, or the power went
    "an error page": lambda: b"<html><body>404 Not Found</body></html>",
    "a vector drawing": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "half a PNG": lambda: encoded("PNG")[:2000], "half a JPEG": lambda: encoded("JPEG")[:900],
    "half a GIF": lambda: encoded("GIF")[:900], "half a WebP": lambda: encoded("WEBP")[:900],
    "half a TIFF": lambda: encoded("TIFF")[:900], "the head of a PNG": lambda: encoded("PNG")[:30],
    "a PNG with a wrong bit": lambda: flipped(encoded("PNG"), 900),
    "a numpy array": numpy_file, "an archive": lambda: b"PK\x03\x04" + bytes(100), "a bomb": bomb,
    "a pickle": lambda: pickle.dumps(Trap())}

for title, content in BROKEN.items():
    @bad(f"a photo that is {title}")
    def _(content=content):
        Path("data/train_img/0.png").write_bytes(content())
        return "{train} --data data", "data/train_img/0.png"

for title in ("of no bytes", "of text", "half a PNG", "a PNG with a wrong bit", "a bomb"):
    @bad(f"a label map that is {title}")
    def _(content=BROKEN[title]):
        Path("data/train_label/0.png").write_bytes(content())
        return "{train} --data data", "data/train_label/0.png"

    @bad(f"an instance map that is {title}", WITH_INSTANCES)
    def _(content=BROKEN[title]):
        Path("data/train_inst/0.png").write_bytes(content())
        return "{train} --data data", "data/train_inst/0.png"

# A label map: its suffix, its picture, how it is stored, and what is said of it.
MAPS = {
    "a JPEG": (".jpg", ids(), {}, ["lossy"]),
    "a JPEG named png": (".png", ids(), {"format": "JPEG"}, ["lossy"]),
    "a WebP": (".webp", ids(), {}, ["lossy"]),
    "a colour picture": (".png", photo(), {}, ["colour label map", "palette"]),
    "a colour picture with alpha": (".png", photo()[..., [0, 1, 2, 0]], {}, ["colour label map"]),
    "grey with alpha": (".png", Image.fromarray(ids()).convert("LA"), {}, ["mode LA"]),
    "in CMYK": (".tif", Image.fromarray(photo()).convert("CMYK"), {}, ["mode CMYK"]),
    "of floats": (".tif", ids(kind=np.float32), {}, ["mode F"]),
    "of ids from 1": (".png", ids(first=1), {}, ["label id 12", "0..11"]),
    "of 16-bit ids too many": (".png", ids(kind=np.uint16, first=40000), {}, ["40000", "0..11"]),
    "of negative ids": (".tif", ids(kind=np.int32, first=-1), {}, ["label id -1", "0..11"]),
    "of palette indices too many": (".png", Image.fromarray(ids(first=9)).convert("P"), {},
                                    ["label id", "0..11"])}

for title, (suffix, image, options, words) in MAPS.items():
    @bad(f"a label map that is {title}")
    def _(suffix=suffix, image=image, options=options, words=words):
        Path("data/train_label/0.png").unlink()
        path = save(f"data/train_label/0{suffix}", image, **options)
        return "{train} --data data --classes 12", path, *words


@bad("a colour label map where classes are counted")
def _():
    for i in range(2):
        save(f"data/train_label/{i}.png", photo())
    return "{train} --data data", "data/train_label/0.png", "colour label map", "palette"


@bad("a mask where classes are counted")
def _():
    for i in range(2):
        save(f"data/train_label/{i}.png", (ids() // 6 * 255).astype(np.uint8))
    return "{train} --data data", "data/train_label/0.png", "mask", "divide it by 255"


@bad("Cityscapes with the ids of training, 255 for unknown")
def _():
    for kind, image in (("labelIds", np.where(ids() > 9, 255, ids())), ("instanceIds", ids())):
        save(f"city/gtFine/train/a/x_gtFine_{kind}.png", image.astype(np.uint8))
    save("city/leftImg8bit/train/a/x_leftImg8bit.png", photo())
    return "{train} --data city", "x_gtFine_labelIds.png", "label id 255", "0..34"


@bad("a mask where the classes are known")
def _():
    save("data/train_label/0.png", (ids() // 6 * 255).astype(np.uint8))
    return ("{train} --data data --classes cityscapes", "data/train_label/0.png", "mask",
            "divide it by 255")


@bad("facades with ids from 0")
def _():
    save("facades/base/x.png", ids())
    save("facades/base/x.jpg", photo())
    return "{train} --data facades", "facades/base/x.png", "label id 0", "1..12"


# An instance map: how it is stored, and what is said of it.
OBJECTS = {
    "a JPEG named png": (ids(), {"format": "JPEG"}, "lossy"),
    "grey with alpha": (Image.fromarray(ids()).convert("LA"), {}, "mode LA"),
    "of negative ids": (ids(kind=np.int32, first=-3), {"format": "TIFF"}, "instance id -3"),
    "of ids too large": (ids(kind=np.int32, first=2 ** 25), {"format": "TIFF"}, "0..16777215")}

for title, (image, options, word) in OBJECTS.items():
    @bad(f"an instance map that is {title}", WITH_INSTANCES)
    def _(image=image, options=options, word=word):
        return "{train} --data data", save("data/train_inst/0.png", image, **options), word


@bad("a photo of another size than its label map")
def _():
    save("data/train_img/1.png", photo(40, 47))
    return "{train} --data data", "data/train_label/1.png", "sizes differ", "47", "48"


@bad("a photo turned by a quarter")
def _():
    save("data/train_img/1.png", photo(48, 40))
    return "{train} --data data", "data/train_label/1.png", "sizes differ"


@bad("a photo of another size in the test split")
def _():
    save("data/test_img/1.png", photo(39, 48))
    return "{train} --data data", "data/test_label/1.png", "sizes differ", "48x39"


@bad("an instance map of another size", WITH_INSTANCES)
def _():
    save("data/train_inst/1.png", ids(20, 24))
    return "{train} --data data", "data/train_label/1.png", "sizes differ", "24x20"


@bad("A and B of different sizes", WITH_PAIRS)
def _():
    save("ab/trainA/0.png", photo())
    save("ab/trainB/0.png", photo(40, 50))
    return "{train} --data ab", "ab/trainA/0.png", "sizes differ", "50x40"


@bad("the doctor finds half a photo")
def _():
    Path("data/train_img/1.png").write_bytes(BROKEN["half a PNG"]())
    return "check --data data --out doctor", "--data data", "1 bad file"


@bad("the doctor finds an id outside of the classes")
def _():
    return "check --data data --classes 3 --out doctor", "--data data", "4 bad file"


@bad("trace meets a label map of no bytes")
def _():
    for i in range(2):
        Path(f"data/train_label/{i}.png").write_bytes(b"")
    return "trace {train} --data data --classes 12", "data/train_label/", "empty file"


# ---------------------------------------------------------------------------- Bad: checkpoints

def altered(path: str = "run/checkpoint.pt", drop: str = "", config: dict | None = None,
            **changes) -> str:
    """The run's checkpoint with something changed."""
    content = stored("run") | changes
    content.pop(drop, None)
    content["config"] = content["config"] | config if config else content["config"]
    torch.save(content, path)
    return path


@bad("a folder for a checkpoint")
def _():
    return "sample --checkpoint run --gpu -1", "run", "folder", "checkpoint.pt"


@bad("the log for a checkpoint")
def _():
    return "sample --checkpoint run/log.csv --gpu -1", "run/log.csv", "damaged"


@bad("a checkpoint of nothing but zeros")
def _():
    Path("zeros.pt").write_bytes(bytes(5000))
    return "sample --checkpoint zeros.pt --gpu -1", "zeros.pt", "damaged"


@bad("a checkpoint with a wrong bit")
def _():
    whole = Path("run/checkpoint.pt").read_bytes()
    Path("bit.pt").write_bytes(flipped(whole, whole.index(b"generator") - 5))
    return "sample --checkpoint bit.pt --gpu -1", "bit.pt", "damaged"


@bad("a checkpoint with a wrong bit in a weight")
def _():
    whole = Path("run/checkpoint.pt").read_bytes()
    weight = next(v for k, v in stored("run")["generator"].items() if k.endswith("weight"))
    Path("bit.pt").write_bytes(flipped(whole, whole.index(weight.numpy().tobytes()) + 1))
    return "sample --checkpoint bit.pt --gpu -1", "bit.pt", "damaged"


@bad("a checkpoint in the old format that runs code")
def _():
    Path("trap.pt").write_bytes(pickle.dumps({"script": Trap()}, 2))
    return "sample --checkpoint trap.pt --gpu -1", "trap.pt", "damaged"


@bad("a checkpoint in the new format that runs code")
def _():
    return f"sample --checkpoint {altered('trap.pt', step=Trap())} --gpu -1", "trap.pt", "damaged"


@bad("a checkpoint without the network")
def _():
    return (f"sample --checkpoint {altered('old.pt', drop='generator')} --gpu -1", "old.pt",
            "generator")


@bad("a checkpoint whose config is a list")
def _():
    content = stored("run") | {"config": [1, 2]}
    torch.save(content, "list.pt")
    return "sample --checkpoint list.pt --gpu -1", "list.pt"


@bad("a checkpoint whose config has a word for a number")
def _():
    altered("word.pt", config={"width": "wide"})
    return "sample --checkpoint word.pt --gpu -1", "word.pt"


@bad("a checkpoint whose weights are not those of its config")
def _():
    altered("wide.pt", config={"width": 2 * stored("run")["config"]["width"]})
    return "sample --checkpoint wide.pt --gpu -1", "wide.pt", "expected"


@bad("going on from half a checkpoint")
def _():
    whole = Path("run/checkpoint.pt").read_bytes()
    Path("run/checkpoint.pt").write_bytes(whole[:len(whole) // 2])
    return "--resume --steps 9 --out run", "run/checkpoint.pt", "damaged"


@bad("going on from a checkpoint of no bytes")
def _():
    Path("run/checkpoint.pt").write_bytes(b"")
    return "--resume --steps 9 --out run", "run/checkpoint.pt", "damaged"


@bad("going on from a checkpoint that runs code")
def _():
    altered(step=Trap())
    return "--resume --steps 9 --out run", "run/checkpoint.pt", "damaged"


@bad("going on from bare weights")
def _():
    torch.save(stored("run")["generator"], "run/checkpoint.pt")
    return "--resume --steps 9 --out run", "run/checkpoint.pt", "--init"


@bad("going on from a newer version's run")
def _():
    altered(config={"frobnicate": 1})
    return "--resume --steps 9 --out run", "run/checkpoint.pt", "version", "frobnicate"


@bad("going on from an older version's run, without the moments")
def _():
    altered(drop="opt_g")
    return "--resume --steps 9 --out run", "run/checkpoint.pt", "opt_g"


@bad("going on from an older version's run, without a counter")
def _():
    altered(drop="seen")
    return "--resume --steps 9 --out run", "run/checkpoint.pt", "seen"


@bad("going on with weights that are not those of the config")
def _():
    altered(config={"width": 2 * stored("run")["config"]["width"]})
    return "--resume --steps 9 --out run", "run/checkpoint.pt"


@bad("going on in a folder that was never there")
def _():
    return "--resume --steps 9 --out nowhere", "nowhere/checkpoint.pt", "no such file"


@bad("going on in a folder without a checkpoint")
def _():
    Path("run/checkpoint.pt").unlink()
    return "--resume --steps 9 --out run", "run/checkpoint.pt", "no such file"


@bad("going on without any run")
def _():
    return "--resume --steps 9", "runs/", "train first"


@bad("scoring without any run")
def _():
    return "evaluate --gpu -1", "runs/", "train first"


@bad("going on without the dataset")
def _():
    Path("data").rename("elsewhere")
    return "--resume --steps 9 --out run", "--data data", "no such folder"


@bad("sampling without the dataset")
def _():
    Path("data").rename("elsewhere")
    return f"sample {RUN}", "--data data", "no such folder"


@bad("scoring without photos", WITH_PAIRS)
def _():
    shutil.rmtree("data/test_img")
    return f"evaluate {RUN} {SCORER}", "no truth"


@bad("a VGG file that runs code", ("crn_imle", "lab2pix", "pix2pixhd"))
def _():
    torch.save({"features.0.weight": Trap()}, "vgg.pt")
    return "{train} --data data --vgg vgg.pt {vgg}", "vgg.pt", "damaged"


@bad("a VGG file that is another network", ("crn_imle", "lab2pix", "pix2pixhd"))
def _():
    return ("{train} --data data --vgg run/checkpoint.pt {vgg}", "--vgg run/checkpoint.pt",
            "VGG-19")


@bad("a scorer's file that runs code", ("lab2pix", "pix2pix", "pix2pixhd"))
def _():
    side = stored("run")["config"]["size"][0]
    torch.save({"made": Trap()}, f"fcn8s-data-{side}x{side}.pt")
    return f"evaluate {RUN} {SCORER}", f"fcn8s-data-{side}x{side}.pt", "damaged"


# ------------------------------------------------------------- Bad: flags, and files to be made

@bad("--out is a file")
def _():
    Path("r").write_text("mine")
    return "{train} --data data", "--out r"


@bad("--out is below a file")
def _():
    Path("notes.txt").write_text("mine")
    return "{train} --data data --out notes.txt/r", "--out notes.txt/r"


@bad("runs/ is a file")
def _():
    Path("runs").write_text("mine")
    return "{train} --data data --out ''", "runs/", "--out"


@bad("--output is a file, for a folder of inputs")
def _():
    Path("o").write_text("mine")
    return f"sample {RUN} --input data/test_label --output o --samples 1", "o/0.png"


@bad("--output is one picture, for a folder of inputs")
def _():
    return f"sample {RUN} --input data/test_label --output o.png --samples 1", "--output o.png"


@bad("--input is an empty folder")
def _():
    Path("empty").mkdir()
    return f"sample {RUN} --input empty", "--input empty", "without images"


@bad("--input has two files of one name")
def _():
    save("in/a.png", ids())
    save("in/a.tif", ids())
    return f"sample {RUN} --input in", "--input in", "one name"


# A file to make a picture from: its name, its picture, and what is said of it.
INPUTS = {"a photo": ("a.png", photo(), "colour label map"), "a JPEG": ("a.jpg", ids(), "lossy"),
          "of ids too many": ("a.png", ids(first=5), "label id 12")}

for title, (file, image, word) in INPUTS.items():
    @bad(f"--input is {title}")
    def _(file=file, image=image, word=word):
        return f"sample {RUN} --output o --input {save(file, image)}", file, word

for title in ("of no bytes", "of text", "half a PNG"):
    @bad(f"--input is {title}")
    def _(content=BROKEN[title]):
        Path("a.png").write_bytes(content())
        return f"sample {RUN} --output o --input a.png", "a.png"


@bad("--size at test time is larger than any memory")
def _():
    save("a.png", ids())
    return f"sample {RUN} --input a.png --size 10000000 10000000 --output o", "--size"


# Whole command lines, and what is said.
LINES = {
    "{train} --lr 0": ["--lr 0"], "{train} --lr inf": ["--lr inf"], "{train} --lr 1": ["--lr 1"],
    "{train} --lr 1e400": ["--lr inf"], "{train} --lr fast": ["--lr", "fast"],
    "{train} --lr": ["--lr"], "{train} --width -4": ["--width -4"],
    "{train} --width 4.5": ["--width", "4.5"], "{train} --width ''": ["--width"],
    "{train} --size 32": ["--size"], "{train} --size -64 -64": ["--size -64 -64"],
    "{train} --seed -1": ["--seed -1"], "{train} --save-every -5": ["--save-every -5"],
    "{train} --classes 0": ["--classes 0"], "{train} --classes -5": ["--classes -5"],
    "{train} --classes 70000": ["--classes 70000"], "{train} --steps nan": ["--steps", "nan"],
    "{train} --gpu first": ["--gpu", "first"], "{train} --gpu 99": ["--gpu 99", "--gpu -1"],
    "{train} --learning-rate 1": ["--learning-rate"], "{train} --wid 8": ["--wid"],
    "{train} --preset largest": ["--preset", "largest"], "trian": ["trian", "train"],
    "{train} --precision fp64": ["fp64", "bf16"],
    "train sample": ["sample"], "{train} --checkpoint run/checkpoint.pt": ["--checkpoint"],
    "trace {train} --output o": ["--output", "trace"], "check --checkpoint x.pt": ["--checkpoint"],
    f"evaluate {RUN} --samples 2": ["--samples", "evaluate"],
    f"check --data data --out doctor --width {HUGE}": [f"--width {HUGE}"],
    f"check --data data --out doctor --batch-size {HUGE}": [f"--batch-size {HUGE}"],
    "check --data data --out doctor --workers 1000000": ["--workers 1000000"],
    f"sample {RUN} --width 8": ["--width 8", "run/checkpoint.pt"],
    f"sample {RUN} --size 0 0": ["--size 0 0"], f"sample {RUN} --samples -3": ["--samples -3"],
    f"sample {RUN} --gpu 99": ["--gpu 99"], f"sample {RUN} --resume": ["--resume"],
    f"sample {RUN} --preset toy": ["--preset toy"],
    "--resume --out run --steps 9 --seed 7": ["--seed 7", "0"],
    "--resume --out run --steps 9 --batch-size 2": ["--batch-size 2", "1"],
    "--resume --out run --steps 9 --size 64 32": ["--size", "(64, 32)"],
    "--resume --out run --steps 9 --init run/checkpoint.pt": ["--init"],
    "--resume --out run --steps 9 --checkpoint run/checkpoint.pt": ["--checkpoint"],
    "--resume --out run --steps -9": ["--steps -9"]}
PART = {"{train} --betas nan 0.9": ("lab2pix", "pix2pix", "pix2pixhd"),
        "{train} --betas 0.5": ("lab2pix", "pix2pix", "pix2pixhd"),
        "{train} --scorer-steps 0": ("lab2pix", "pix2pix", "pix2pixhd"),
        "{train} --patch 142": ("pix2pix",), "{train} --patch 286": ("pix2pix",),
        "{train} --loss nonsense": WITH_PAIRS, "{train} --direction left": WITH_PAIRS,
        "{train} --lambda-l1 nan": ("pix2pix",), "{train} --lambda-vgg nan": ("pix2pixhd",),
        "{train} --lambda-2 nan": ("lab2pix",), "{train} --T inf": ("lab2pix",),
        "{train} --pixel-weight nan": ("crn_imle",), "{train} --noise-gain nan": ("crn_imle",),
        f"check --candidates {HUGE} --data data --out doctor": ("crn_imle",),
        f"check --inner-steps {HUGE} --data data --out doctor": ("crn_imle",)}

for line, words in LINES.items():
    bad(line.replace(RUN, "RUN"))(lambda line=line, words=words: (line, *words))
for line, only in PART.items():
    bad(line, only)(lambda line=line: (line, line.split()[1]))


# ------------------------------------------------------------------------------------------- Good

@good("names with spaces, umlauts and quotes")
def _():
    names = ("Straße im Schnee", "l'été à Paris #2 (100 %) 東京")
    for folder in Path("data").iterdir():
        for i, name in enumerate(names):
            (folder / f"{i}.png").rename(folder / f"{name}.png")
    Path("data").rename("Bilder für Übung 1")
    return "{train} --data 'Bilder für Übung 1' --out 'Läufe im März/r'", "2 examples"


@good("a name in Latin-1, as an old archive gives")
def _():
    name = os.fsdecode("Straße.png".encode("latin-1"))
    try:
        Path(name).touch()
    except OSError:
        pytest.skip("this disk holds names in UTF-8 alone")
    for folder in Path("data").iterdir():
        (folder / "0.png").rename(folder / name)
    save("data/train_img/" + name.replace("S", "s"), photo())
    return "{train} --data data", "left out"


@good("capital endings")
def _():
    for path in Path("data").rglob("*.png"):
        path.rename(path.with_suffix(".PNG"))
    return "{train} --data data", "2 examples"


@good("what Windows and macOS leave in folders")
def _():
    for folder in Path("data").iterdir():
        for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini"):
            (folder / name).write_bytes(b"\0\0\0\1Bud1")
    return "{train} --data data", "2 examples"


@good("one image only")
def _():
    for path in Path("data").glob("*/1.png"):
        path.unlink()
    shutil.rmtree("data/test_label")
    return "{train} --data data", "1 examples", "no test split"


@good("a photo more than there are labels")
def _():
    save("data/train_img/99.png", photo())
    return "{train} --data data", "left out: 99"


@good("pairs of different sizes")
def _():
    for folder, image in (("label", ids(70, 33)), ("inst", ids(70, 33)), ("img", photo(70, 33))):
        save(f"data/train_{folder}/1.png", image)
    return "{train} --data data", "2 examples"


@good("images of one pixel")
def _():
    for split in ("train", "test"):
        for i in range(2):
            for folder, image in (("label", ids(1, 1)), ("inst", ids(1, 1)), ("img", photo(1, 1))):
                save(f"data/{split}_{folder}/{i}.png", image)
    return "{train} --data data --classes 12", "1x1"


# The photos as a camera, a scanner or a web page gives them.
def camera(image: np.ndarray) -> tuple[Image.Image, dict]:
    """Lying on its side, with a note that says so."""
    note = Image.Exif()
    note[0x0112] = 6
    return Image.fromarray(np.rot90(image).copy()), {"exif": note.tobytes(), "quality": 95}


def moving(image: np.ndarray) -> tuple[Image.Image, dict]:
    frames = [Image.fromarray(frame) for frame in (image, image[::-1])]
    return frames[0], {"save_all": True, "append_images": frames[1:]}


def mode(name: str, **options):
    return lambda image: (Image.fromarray(image).convert(name), options)


def deep(kind: type, factor: float):
    return lambda image: (Image.fromarray((image[..., 0] * factor).astype(kind)), {})


PHOTOS = {"alpha.png": mode("RGBA"), "grey.png": mode("L"), "grey alpha.png": mode("LA"),
          "palette.png": mode("P"), "one bit.png": mode("1"), "cmyk.jpg": mode("CMYK"),
          "ycbcr.jpg": mode("YCbCr"), "16 bits.png": deep(np.uint16, 99), "moving.gif": moving,
          "floats.tif": deep(np.float32, 1 / 7), "turned.jpg": camera, "bitmap.bmp": mode("RGB"),
          "progressive.jpg": mode("RGB", progressive=True), "webp.webp": mode("RGB")}


@good("photos of all kinds")
def _():
    shutil.rmtree("data")
    for split in ("train", "test"):
        for name, make in PHOTOS.items():
            image, options = make(photo())
            path = Path(save(f"data/{split}_img/{name}", image, **options))
            save(f"data/{split}_label/{path.stem}.png", ids())
    return ("{train} --data data", f"{len(PHOTOS)} examples", "transparency is dropped",
            "16 bits.png: I;16 pixels, scaled", "floats.tif: F pixels, scaled",
            "moving.gif: animated; only the first frame is used")


@good("label maps of all kinds")
def _():
    palette = Image.fromarray(ids())
    palette.putpalette(list(range(36)))
    save("data/train_label/0.png", ids(kind=np.uint16))
    save("data/train_label/1.png", palette)
    Path("data/test_label/0.png").unlink()
    save("data/test_label/0.tif", ids(kind=np.int32))
    return "{train} --data data", "12 of 12 classes", "2 examples"


# ------------------------------------------------------------------------------------- The tests

@pytest.mark.parametrize("name, title", [(n, t) for t, (_, only) in BAD.items() for n in only])
def test_bad_input_is_one_line_and_loses_nothing(name, title, templates):
    prepare(templates, name)
    line, *words = BAD[title][0]()
    line = line.format(train=TRAIN[name], vgg=VGG.get(name, ""))
    before = snapshot()
    code, _, err = as_user(name, line)
    assert_refused(name, line, words, code, err, before)


@pytest.mark.parametrize("name, title", [(n, t) for t, (_, only) in GOOD.items() for n in only])
def test_strange_input_that_is_sound_trains(name, title, templates):
    """Two steps, a checkpoint, and the notices that it calls for."""
    shutil.copytree(templates / "data", "data")
    line, *words = GOOD[title][0]()
    code, out, err = as_user(name, f"{line.format(train=TRAIN[name])} --steps 2")
    assert (code, err) == (0, "")
    checkpoint, = Path(".").rglob("checkpoint.pt")
    assert stored(checkpoint.parent)["step"] == 2
    for word in words:
        assert word in out, f"{word!r} is not in: {out}"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_failed_before_its_first_checkpoint_can_be_started_again(name, templates):
    """The file is mended, the same command given again: the folder is not taken for a run."""
    prepare(templates, name)
    whole = Path("data/train_img/0.png").read_bytes()
    Path("data/train_img/0.png").write_bytes(whole[:2000])
    line = f"{TRAIN[name]} --data data"
    assert as_user(name, line)[0] == 2
    Path("data/train_img/0.png").write_bytes(whole)
    code, _, err = as_user(name, line)
    assert (code, err) == (0, "")
    assert stored("r")["step"] == 1


@pytest.mark.parametrize("name", WITH_INSTANCES)
def test_going_on_without_the_instance_maps_of_before(name, templates):
    """The network has a channel for them: the folder is named, not the shapes of weights."""
    shutil.copytree(templates / "data", "data")
    assert as_user(name, f"{TRAIN[name]} --data data")[0] == 0
    for split in ("train", "test"):
        shutil.rmtree(f"data/{split}_inst")
    before = snapshot()
    code, _, err = as_user(name, "--resume --out r --steps 9")
    assert_refused(name, "--resume", ("--data data", "instance"), code, err, before)


@pytest.mark.parametrize("name", NAMES)
def test_going_on_with_a_mended_dataset(name, templates):
    """A bad file found after a checkpoint costs nothing but the steps since."""
    prepare(templates, name)
    whole = Path("data/train_img/0.png").read_bytes()
    Path("data/train_img/0.png").write_bytes(b"")
    before = snapshot()
    code, _, err = as_user(name, "--resume --out run --steps 3")
    assert_refused(name, "--resume", ("data/train_img/0.png",), code, err, before)
    Path("data/train_img/0.png").write_bytes(whole)
    assert as_user(name, "--resume --out run --steps 3")[0] == 0
    assert stored("run")["step"] == 3


# ---------------------------------------------------------------------------- Without permission

# What may not be read (0) or written (0o555), the command, and what is said.
FORBIDDEN = {
    "a dataset": ("data", 0, "{train} --data data", ["data", "ermission"]),
    "a folder of a dataset": ("data/train_label", 0, "{train} --data data",
                              ["data/train_label", "ermission"]),
    "a photo": ("data/train_img/0.png", 0, "{train} --data data",
                ["data/train_img/0.png", "permission"]),
    "a checkpoint": ("run/checkpoint.pt", 0, f"sample {RUN}", ["run/checkpoint.pt", "ermission"]),
    "where runs go": (".", 0o555, "{train} --data data", ["--out r", "Permission denied"]),
    "a run to go on with": ("run", 0o555, "--resume --out run --steps 9",
                            ["run", "Permission denied"]),
    "where a picture goes": (".", 0o555, f"sample {RUN} --input data/test_label/0.png --output "
                             "o.png --samples 1", ["o.png", "Permission denied"])}


def as_nobody(name: str, line: str) -> tuple[int, str, str]:
    """as_user in a process of its own. If we are root, who may do all, it is of another user."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            os.write(write, pickle.dumps(as_user(name, line)))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        answer = file.read()
    os.waitpid(child, 0)
    return pickle.loads(answer)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="permissions are another thing on Windows")
@pytest.mark.parametrize("title", FORBIDDEN)
@pytest.mark.parametrize("name", NAMES)
def test_what_may_not_be_read_or_written(name, title, templates):
    path, mode, line, words = FORBIDDEN[title]
    prepare(templates, name)
    for each in (Path("."), *Path(".").rglob("*")):
        each.chmod(0o777)
    before, line = snapshot(), line.format(train=TRAIN[name])
    inside = Path(path).rglob("*") if path == "run" else ()
    for each in (*inside, Path(path)):
        each.chmod(mode)
    try:
        code, _, err = as_nobody(name, line)
    finally:
        Path(path).chmod(0o777)
    assert_refused(name, line, words, code, err, before)


# ------------------------------------------------------------------------------------ From a shell

SHELL = {"lab2pix": "a bomb", "pix2pix": "a PNG with a wrong bit", "pix2pixhd": "half a JPEG"}


@pytest.mark.parametrize("name", SHELL)
def test_bad_input_from_a_shell(name, templates):
    """The whole process: nothing that a library prints or warns of stands beside the line."""
    prepare(templates, name)
    Path("data/train_img/1.png").write_bytes(BROKEN[SHELL[name]]())
    before = snapshot()
    line = f"{TRAIN[name]} --data data --workers 1 --steps 4"
    result = shell(f"{SCRIPTS / name}.py {line}")
    assert_refused(name, line, ("data/train_img/1.png",), result.returncode, result.stderr, before)
