"""Bad input through the command line, for every script that it concerns.

BAD is one table: a title, what is spoiled in the working folder, the command, and the words that
the one line of error must have in it. Before each of them the folder holds `data/`, a sound data
set of two pairs a split with instance maps, and `run/`, a finished run of one step. After each:
exit code 2, one line on stderr, no traceback, and every file that was there is there unchanged.

GOOD is the other side: input that looks strange and has to work. Last come what needs another user
(folders without permission) and a real shell.
"""

import io
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    NAMES, SCORER, SCRIPTS, Trap, as_user, fails, png, save, shell, stored, works)
from PIL import Image

WITH_INSTANCES = ("lab2pix", "pix2pixhd")                 # the others do not read these files
WITH_PAIRS = ("pix2pix", "pix2pixhd")                     # lab2pix: V1 alone
WITH_VGG, WITH_SCORER = ("crn_imle", "lab2pix", "pix2pixhd"), ("lab2pix", "pix2pix", "pix2pixhd")
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
T = "{train} --data data"
RUN = "--checkpoint run/checkpoint.pt --gpu -1"
ON = "--resume --out run --steps 9"
HUGE = 10 ** 12                        # always with `check`, which would allocate nothing
BAD, GOOD = {}, {}                     # title: (what is spoiled, command, words, scripts)


def bad(title: str, spoil, line: str, *words: str, only: tuple[str, ...] = NAMES) -> None:
    assert title not in BAD, title
    BAD[title] = spoil, line, words, only


def good(title: str, spoil, line: str, *words: str, only: tuple[str, ...] = NAMES) -> None:
    GOOD[title] = spoil, line, words, only


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


def folder(path: str):
    return lambda: Path(path).mkdir(parents=True)


def link(path: str, target: str):
    return lambda: Path(path).symlink_to(target)


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
    """Two examples a split in pix2pixHD's layout."""
    for split in ("train", "test"):
        for i in range(2):
            save(f"{root}/{split}_label/{i}.png", ids())
            save(f"{root}/{split}_inst/{i}.png", ids(kind=np.uint16, first=26000))
            save(f"{root}/{split}_img/{i}.png", photo(seed=i))
    return Path(root)


def cityscapes(label: np.ndarray, splits=("train",)) -> None:
    for split in splits:
        for kind, pixels in (("labelIds", label), ("instanceIds", ids())):
            save(f"city/gtFine/{split}/a/x_gtFine_{kind}.png", pixels.astype(np.uint8))
        save(f"city/leftImg8bit/{split}/a/x_leftImg8bit.png", photo())


def encoded(kind: str, pixels: np.ndarray | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photo() if pixels is None else pixels).save(buffer, kind)
    return buffer.getvalue()


def flipped(data: bytes, at: int) -> bytes:
    """One byte changed, as a bad disk or a bad cable does."""
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1:]


def numpy_file() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, photo())
    return buffer.getvalue()


def saved(content, path: str = "run/checkpoint.pt"):
    """Something as a file of PyTorch's; a function makes it of the run's content."""
    return lambda: torch.save(content(stored("run")) if callable(content) else content, path)


def changed(path: str = "run/checkpoint.pt", config: dict | None = None, **parts):
    """The run's checkpoint with some parts or settings exchanged."""
    return saved(lambda c: c | parts | {"config": c["config"] | (config or {})}, path)


def wide(content: dict) -> dict:
    """Weights that are not those of the config."""
    return content | {"config": content["config"] | {"width": 2 * content["config"]["width"]}}


def moments(change):
    """The optimiser's state of the first weight, changed."""
    def spoil(content):
        change(content["opt_g"])
        return content
    return saved(spoil)


def bit(find, after: int = 1):
    """The checkpoint in bit.pt, with a byte changed beside what find(content) returns."""
    def spoil():
        whole = Path("run/checkpoint.pt").read_bytes()
        Path("bit.pt").write_bytes(flipped(whole, whole.index(find(stored("run"))) + after))
    return spoil


def half(path: str):
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:Path(path).stat().st_size // 2])


# -------------------------------------------------------------------------------- Bad: the dataset

for title, spoil, name, *words in (
        ("is a file", put("x", "hello"), "x", "not a folder"),
        ("is an empty folder", folder("x"), "x", "train_label", "found nothing"),
        ("is of no known layout", all_of(image("x/one/a.png", photo()), put("x/readme.md")), "x",
         "no known layout", "one/", "readme.md"),
        ("holds nothing but what macOS leaves", all_of(
            put("x/.DS_Store"), put("x/__MACOSX/train_label/._0.png", b"\0\0\0\1Bud1")), "x",
         "no known layout", "__MACOSX/"),
        ("is one level too deep", nothing, "data/train_img", "photos only"),
        ("is one level too high", moved("data", "x/data"), "x", "no known layout", "data/"),
        ("is a link to nowhere", link("x", "gone"), "x", "no such folder"),
        ("is missing", nothing, "x", "no such folder"),
        ("is a name of 300 letters", nothing, "x" * 300, "xxx"),
        ("is an empty shell variable", nothing, "''", "--data")):
    named = [] if len(name) > 99 else [f"--data {name}".strip("'")]
    bad(f"--data {title}", spoil, f"{{train}} --data {name}", *named, *words)

for title, spoil, *words in (
        ("labels whose photos were never copied", gone("data/*_img"), "--data data", "image"),
        ("a folder of photos that is still empty", gone("data/train_img/*"), "--data data",
         "image"),
        ("a copy that stopped half way", gone("data/train_img/1.png"), "data/train_label/1.png",
         "no image", "1 of 2"),
        ("a photo that is still downloading", moved("data/train_img/1.png",
                                                    "data/train_img/1.part"),
         "data/train_label/1.png", "no image"),
        ("a photo that is a link to nowhere", all_of(gone("data/train_img/0.png"), link(
            "data/train_img/0.png", "/gone/0.png")), "data/train_label/0.png", "no image"),
        ("a folder with the name of a photo", all_of(gone("data/train_img/0.png"), folder(
            "data/train_img/0.png")), "data/train_label/0.png", "no image"),
        ("photos under other names", all_of(*(moved(
            f"data/train_img/{i}.png", f"data/train_img/photo_{i}.png") for i in (0, 1))),
         "data/train_label/0.png", "no image", "2 of 2"),
        ("two photos of one name", image("data/train_img/0.jpg", photo()), "data/train_img/0.png",
         "same name", "rename"),
        ("no training split", gone("data/train_*"), "--data data", "train split"),
        ("a photo of the test split is missing", gone("data/test_img/1.png"),
         "data/test_label/1.png", "no image"),
        ("a photo of another size", image("data/train_img/1.png", photo(40, 47)),
         "data/train_label/1.png", "sizes differ", "47", "48"),
        ("a photo turned by a quarter", image("data/train_img/1.png", photo(48, 40)),
         "data/train_label/1.png", "sizes differ"),
        ("a photo of another size in the test split", image("data/test_img/1.png", photo(39, 48)),
         "data/test_label/1.png", "sizes differ", "39"),
        ("colour label maps where classes are counted", all_of(*(image(
            f"data/train_label/{i}.png", photo()) for i in (0, 1))), "data/train_label/0.png",
         "colour label map", "palette"),
        ("masks where classes are counted", all_of(*(image(
            f"data/train_label/{i}.png", (ids() // 6 * 255).astype(np.uint8)) for i in (0, 1))),
         "data/train_label/0.png", "mask", "divide it by 255")):
    bad(title, spoil, T, *words)

for title, spoil, *words in (
        ("an instance map is missing", gone("data/train_inst/1.png"), "data/train_label/1.png",
         "no instance"),
        ("instance maps for training alone", gone("data/test_inst"), "--data data", "instance"),
        ("an instance map of another size", image("data/train_inst/1.png", ids(20, 24)),
         "data/train_label/1.png", "sizes differ", "20", "24")):
    bad(title, spoil, T, *words, only=WITH_INSTANCES)

GTA = [image(f"x/{kind}/{i}.png", pixels) for i in range(3)
       for kind, pixels in (("labels", ids()), ("images", photo()))]
PAIRS = all_of(*(image(f"x/{split}/{i}.png", photo(32, 64)) for split in ("train", "test")
                 for i in (0, 1)))
for title, spoil, line, only, *words in (
        ("a split list that names other files", all_of(*GTA, put("x/train.txt", "images/9.png\n")),
         "", NAMES, "--data x", "train split"),
        ("a split list that is not UTF-8", all_of(*GTA, put(
            "x/train.txt", "Straße.png\n".encode("latin-1"))), "", NAMES, "x/train.txt", "UTF-8"),
        ("a list without B", image("x/trainA/0.png", photo()), "", WITH_PAIRS, "--data x",
         "image"),
        ("pairs of photos where label maps are needed", PAIRS, "", ("crn_imle", "lab2pix"),
         "--data x", "label"),
        ("photos alone, taken for pairs", image("x/train/0.png", photo(32, 63)), "", WITH_PAIRS,
         "x/train/0.png", "63", "side by side"),
        ("pairs in the direction that has no B", image("x/trainA/0.png", photo()),
         "--direction BtoA", WITH_PAIRS, "--direction BtoA", "no B"),
        ("A and B of different sizes", all_of(image("x/trainA/0.png", photo()), image(
            "x/trainB/0.png", photo(40, 50))), "", WITH_PAIRS, "x/trainA/0.png", "sizes differ"),
        ("Cityscapes with the ids of training, 255 for unknown", lambda: cityscapes(
            np.where(ids() > 9, 255, ids())), "", NAMES, "labelIds.png", "label id 255", "0..34"),
        ("facades with ids from 0", all_of(image("x/base/x.png", ids()), image(
            "x/base/x.jpg", photo())), "", NAMES, "x/base/x.png", "label id 0", "1..12")):
    name = "city" if "Cityscapes" in title else "x"
    bad(title, spoil, f"{{train}} --data {name} {line}", *words, only=only)

bad("one example where two are needed", gone("data/*/1.png"), f"{V1} --data data", "--data data",
    "one example", only=("lab2pix",))
bad("a mask where the classes are known", image("data/train_label/0.png", (ids() // 6 * 255).astype(
    np.uint8)), f"{T} --classes cityscapes", "data/train_label/0.png", "mask", "divide it by 255")

# ---------------------------------------------------------------------------------- Bad: the files

BROKEN = {
    "of no bytes": b"", "of text": b"this is no image\n" * 20,
    "of nothing but zeros": bytes(2000),                  # the disk was full, or the power went
    "an error page": b"<html><body>404 Not Found</body></html>",
    "a vector drawing": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "half a PNG": encoded("PNG")[:2000], "half a JPEG": encoded("JPEG")[:900],
    "half a GIF": encoded("GIF")[:900], "half a WebP": encoded("WEBP")[:900],
    "half a TIFF": encoded("TIFF")[:900], "the head of a PNG": encoded("PNG")[:30],
    "a PNG with a wrong bit": flipped(encoded("PNG"), 900), "a numpy array": numpy_file(),
    "an archive": b"PK\x03\x04" + bytes(100), "a bomb": png(60000, 60000, 8, 2, bytes(99)),
    "a pickle": pickle.dumps(Trap()),
    "a program in PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 40\nshowpage\n"}
SOME = ("of no bytes", "of text", "half a PNG", "a PNG with a wrong bit", "a bomb",
        "a program in PostScript")
for title, content in BROKEN.items():
    bad(f"a photo that is {title}", put("data/train_img/0.png", content), T, "data/train_img/0.png")
    if title in SOME:
        bad(f"a label map that is {title}", put("data/train_label/0.png", content), T,
            "data/train_label/0.png")
        bad(f"an instance map that is {title}", put("data/train_inst/0.png", content), T,
            "data/train_inst/0.png", only=WITH_INSTANCES)
        bad(f"--input is {title}", put("a.png", content), f"sample {RUN} --output o --input a.png",
            "a.png")

# A label map: its suffix, its picture, how it is stored, and what is said of it.
for title, suffix, pixels, options, *words in (
        ("a JPEG", ".jpg", ids(), {}, "lossy"), ("a WebP", ".webp", ids(), {}, "lossy"),
        ("a JPEG named png", ".png", ids(), {"format": "JPEG"}, "lossy"),
        ("a colour picture", ".png", photo(), {}, "colour label map", "palette"),
        ("a colour picture with alpha", ".png", photo()[..., [0, 1, 2, 0]], {}, "colour label map"),
        ("grey with alpha", ".png", Image.fromarray(ids()).convert("LA"), {}, " LA"),
        ("in CMYK", ".tif", Image.fromarray(photo()).convert("CMYK"), {}, " CMYK"),
        ("of floats", ".tif", ids(kind=np.float32), {}, " F"),
        ("of ids from 1", ".png", ids(first=1), {}, "label id 12", "0..11"),
        ("of 16-bit ids too many", ".png", ids(kind=np.uint16, first=40000), {}, "40000", "0..11"),
        ("of negative ids", ".tif", ids(kind=np.int32, first=-1), {}, "label id -1", "0..11"),
        ("of palette indices too many", ".png", Image.fromarray(ids(first=9)).convert("P"), {},
         "label id", "0..11")):
    bad(f"a label map that is {title}", all_of(gone("data/train_label/0.png"), image(
        f"data/train_label/0{suffix}", pixels, **options)), f"{T} --classes 12",
        f"data/train_label/0{suffix}", *words)

for title, pixels, options, word in (
        ("a JPEG named png", ids(), {"format": "JPEG"}, "lossy"),
        ("grey with alpha", Image.fromarray(ids()).convert("LA"), {}, " LA"),
        ("of negative ids", ids(kind=np.int32, first=-3), {"format": "TIFF"}, "instance id -3"),
        ("of ids too large", ids(kind=np.int32, first=2 ** 25), {"format": "TIFF"}, "0..16777215")):
    bad(f"an instance map that is {title}", image("data/train_inst/0.png", pixels, **options), T,
        "data/train_inst/0.png", word, only=WITH_INSTANCES)

bad("the doctor finds half a photo", put("data/train_img/1.png", BROKEN["half a PNG"]),
    "check --data data --out doctor", "--data data", "1 bad file")
bad("the doctor finds an id outside of the classes", nothing,
    "check --data data --classes 3 --out doctor", "--data data", "4 bad file")
bad("trace meets a label map of no bytes", all_of(*(put(f"data/train_label/{i}.png")
                                                    for i in (0, 1))),
    "trace {train} --data data --classes 12", "data/train_label/", "empty file")

# ------------------------------------------------------------------------------ Bad: checkpoints

NUMBERS = {0: torch.zeros(1)}
for title, make, *words in (
        ("a folder", folder("x.pt"), "folder", "checkpoint.pt"),
        ("missing", nothing, "no such file"), ("a log", put("x.pt", "step,loss\n1,2\n"), "damaged"),
        ("of no bytes", put("x.pt"), "x.pt"), ("of nothing but zeros", put("x.pt", bytes(5000)),
                                               "damaged"),
        ("cut in half", all_of(lambda: shutil.copy("run/checkpoint.pt", "x.pt"), half("x.pt")),
         "damaged"),
        ("a pipe", lambda: os.mkfifo("x.pt"), "x.pt"),
        ("of another script", changed("x.pt", script="pix2pixxl"), "pix2pixxl"),
        ("in the old format that runs code", put("x.pt", pickle.dumps({"script": Trap()}, 2)),
         "damaged"),
        ("in the new format that runs code", changed("x.pt", place=Trap()), "damaged"),
        ("a list", saved([1, 2], "x.pt"), "list"), ("of numbered tensors", saved(NUMBERS, "x.pt"),
                                                    "x.pt"),
        ("of another project", saved({"epoch": 3, "state_dict": {}}, "x.pt"), "x.pt"),
        ("without the network", changed("x.pt", generator=None), "x.pt"),
        ("with a list for the network", changed("x.pt", generator=[1, 2]), "x.pt"),
        ("with numbers for weights", changed("x.pt", generator={"a": 3}), "x.pt"),
        ("with the weights of another width", saved(wide, "x.pt"), "expected"),
        ("with weights that are not a number", saved(lambda c: c | {"generator": {
            k: torch.full_like(v, torch.nan) if v.is_floating_point() else v
            for k, v in c["generator"].items()}}, "x.pt"), "nan"),
        ("whose config is a list", saved(lambda c: c | {"config": [1, 2]}, "x.pt"), "x.pt"),
        ("without a config", saved(lambda c: {k: v for k, v in c.items() if k != "config"}, "x.pt"),
         "x.pt"),
        ("of a newer version", changed("x.pt", config={"frobnicate": 1}), "version", "frobnicate")):
    bad(f"a checkpoint that is {title}", make, "sample --checkpoint x.pt --gpu -1", "x.pt", *words)
    if "config" not in title and "version" not in title and "width" not in title:
        words = [word for word in words if word != "checkpoint.pt"]
        bad(f"weights to start from that are {title}", make, f"{T} {{plain}} --init x.pt", "x.pt",
            *words)
bad("weights to start from that are of another width", nothing,
    f"{T} --width 8 --init run/checkpoint.pt", "run/checkpoint.pt", "generator", "expected")
bad("a checkpoint with a wrong bit", bit(lambda c: b"generator", -5),
    "sample --checkpoint bit.pt --gpu -1", "bit.pt", "damaged")
bad("a checkpoint with a wrong bit in a weight", bit(lambda c: next(
    v for k, v in c["generator"].items() if k.endswith("weight")).numpy().tobytes()),
    "sample --checkpoint bit.pt --gpu -1", "bit.pt", "damaged")


def first(optimiser: dict) -> dict:
    return optimiser["state"][0]


for title, spoil, *words in (
        ("half a checkpoint", half("run/checkpoint.pt"), "damaged"),
        ("a checkpoint of no bytes", put("run/checkpoint.pt"), "damaged"),
        ("a checkpoint that runs code", changed(place=Trap()), "damaged"),
        ("bare weights", saved(lambda c: c["generator"]), "run/checkpoint.pt"),
        ("a newer version's run", changed(config={"frobnicate": 1}), "version", "frobnicate"),
        ("a run without the moments", changed(opt_g=None), "opt_g"),
        ("a run without its place", changed(place=None), "place"),
        ("a run whose place is a word", changed(place={"step": "one", "epoch": 0, "seen": 0}),
         "place"),
        ("a run whose place lies before the start", saved(lambda c: c | {"place": c["place"] | {
            "step": -5, "seen": -3}}), "place"),
        ("weights that are not those of the config", saved(wide), "expected"),
        ("moments of another shape", moments(lambda o: first(o).update(exp_avg=torch.zeros(3))),
         "opt_g"),
        ("second moments of no shape", moments(lambda o: first(o).update(
            exp_avg_sq=torch.tensor(0.5))), "opt_g"),
        ("moments of whole numbers", moments(lambda o: first(o).update(
            exp_avg=first(o)["exp_avg"].long())), "opt_g"),
        ("a list for the moments", moments(lambda o: first(o).update(exp_avg=[1.0])), "opt_g"),
        ("a moment less", moments(lambda o: first(o).pop("exp_avg")), "opt_g"),
        ("a word for the number of updates", moments(lambda o: first(o).update(step="many")),
         "opt_g"),
        ("many numbers of updates", moments(lambda o: first(o).update(step=torch.ones(5))),
         "opt_g"),
        ("moments of weights that are none", moments(lambda o: o["state"].update(
            {99999: first(o)})), "opt_g")):
    bad(f"going on from {title}", spoil, ON, "run/checkpoint.pt", *words)

for title, spoil, line, *words in (
        ("going on in a folder that was never there", nothing, "--resume --out nowhere",
         "nowhere/checkpoint.pt", "no such file"),
        ("going on in a folder without a checkpoint", gone("run/checkpoint.pt"), ON,
         "run/checkpoint.pt", "no such file"),
        ("going on without any run", nothing, "--resume --steps 9", "runs/", "train first"),
        ("scoring without any run", nothing, "evaluate --gpu -1", "runs/", "train first"),
        ("going on without the dataset", moved("data", "elsewhere"), ON, "--data data",
         "no such folder"),
        ("sampling without the dataset", moved("data", "elsewhere"), f"sample {RUN}", "--data data",
         "no such folder"),
        ("going on with pairs in place of labels", PAIRS, f"{ON} --data x", "--data x"),
        ("sampling pairs with a network of labels", PAIRS, f"sample {RUN} --data x --output o",
         "--data x"),
        ("scoring pairs with a network of labels", PAIRS,
         f"evaluate {RUN} {{scorer}} --data x", "--data x"),
        ("sampling with classes of another data set", lambda: cityscapes(ids(), ("train", "val")),
         f"sample {RUN} --data city --output o", "city", "12"),
        ("going on with classes of another data set", lambda: cityscapes(ids(), ("train", "val")),
         f"{ON} --data city", "city", "12")):
    bad(title, spoil, line, *words)

bad("scoring without photos", gone("data/test_img"), f"evaluate {RUN} {SCORER}", "image",
    only=WITH_PAIRS)
bad("a VGG file that runs code", saved({"features.0.weight": Trap()}, "vgg.pt"),
    "{train} --data data --vgg vgg.pt {vgg}", "vgg.pt", "damaged", only=WITH_VGG)
bad("a VGG file that is another network", nothing,
    "{train} --data data --vgg run/checkpoint.pt {vgg}", "--vgg run/checkpoint.pt", "VGG-19",
    only=WITH_VGG)
bad("a VGG file that is missing", nothing, "{train} --data data --vgg vgg.pt {vgg}", "vgg.pt",
    only=WITH_VGG)
for side in (32, 64):
    name = f"fcn8s-data-{side}x{side}.pt"
    bad(f"a scorer's file of {side} pixels that runs code", saved({"made": Trap()}, name),
        f"evaluate {RUN} {SCORER}", name, "damaged",
        only=("lab2pix",) if side == 64 else WITH_PAIRS)

# ------------------------------------------------------------- Bad: flags, and files to be made

EACH = "--input data/test_label {instances}"
for title, spoil, line, *words in (
        ("--out is a file", put("r", "mine"), T, "r: "),
        ("--out is below a file", put("x", "mine"), f"{T} --out x/r", "x/r: "),
        ("--output is a file, for a folder of inputs", put("o", "mine"),
         f"sample {RUN} {EACH} --output o --samples 1", "o"),
        ("--output is one picture, for a folder of inputs", nothing,
         f"sample {RUN} {EACH} --output o.png --samples 1", "--output o.png"),
        ("--output is where the data set's labels are", nothing,
         f"sample {RUN} --output data/test_label --samples 1", "--output data/test_label"),
        ("--output has an ending that nobody knows", nothing, f"sample {RUN} --input data/"
         "test_label/0.png {instances} --output o.xyz --samples 1", "o.xyz"),
        ("--input is an empty folder", folder("x"), f"sample {RUN} --input x", "--input x",
         "without images"),
        ("--input is missing", nothing, f"sample {RUN} --input x.png", "x.png"),
        ("--input has two files of one name", all_of(image("x/a.png", ids()), image(
            "x/a.tif", ids())), f"sample {RUN} --input x", "--input x", "one name"),
        ("--input is a photo", image("a.png", photo()), f"sample {RUN} --output o --input a.png",
         "a.png", "colour label map"),
        ("--input is a JPEG", image("a.jpg", ids()), f"sample {RUN} --output o --input a.jpg",
         "a.jpg", "lossy"),
        ("--input is of ids too many", image("a.png", ids(first=5)),
         f"sample {RUN} --output o --input a.png", "a.png", "label id 12"),
        ("--size at test time is larger than any memory", image("a.png", ids()),
         f"sample {RUN} --input a.png --size 10000000 10000000 --output o", "--size")):
    bad(title, spoil, line, *words)
# Whole command lines, and what is said.
for line, *words in (
        ("{train} --lr 0", "--lr 0"), ("{train} --lr inf", "--lr inf"),
        ("{train} --lr 1", "--lr 1"), ("{train} --lr nan", "--lr nan"),
        ("{train} --lr -1", "--lr -1"),
        ("{train} --lr 1e400", "--lr inf"), ("{train} --lr fast", "--lr", "fast"),
        ("{train} --lr", "--lr"), ("{train} --width -4", "--width -4"),
        ("{train} --width 0", "--width 0"), ("{train} --width 4.5", "--width", "4.5"),
        ("{train} --width ''", "--width"), ("{train} --size 32", "--size"),
        ("{train} --size 0 64", "--size"), ("{train} --size 31 47", "31", "47"),
        ("{train} --size -64 -64", "--size"), ("{train} --seed -1", "--seed -1"),
        ("{train} --seed 99999999999999999999999", "--seed"),
        ("{train} --save-every -5", "--save-every -5"), ("{train} --classes 0", "--classes 0"),
        ("{train} --classes -5", "--classes -5"), ("{train} --classes x", "x", "cityscapes"),
        ("{train} --classes 70000", "--classes 70000"), ("{train} --steps nan", "--steps", "nan"),
        ("{train} --steps -3", "--steps -3"), ("{train} --epochs -1", "--epochs -1"),
        ("{train} --epochs 0", "--epochs 0"), ("{train} --limit -1", "--limit -1"),
        ("{train} --batch-size 0", "--batch-size 0"), ("{train} --workers -1", "--workers -1"),
        ("{train} --gpu first", "--gpu", "first"), ("{train} --gpu 99", "--gpu 99", "-1"),
        ("{train} --gpu -2", "--gpu -2"), ("{train} --learning-rate 1", "--learning-rate"),
        ("{train} --wid 8", "--wid"), ("{train} --preset largest", "--preset", "largest"),
        ("{train} --init ''", "--init"), ("{train} --out ''", "--out"),
        ("{train} --precision fp64", "fp64", "bf16"), ("trian", "trian", "train"),
        ("train sample", "sample"), ("{train} --checkpoint run/checkpoint.pt", "--checkpoint"),
        ("{train} --input a.png", "--input"), ("{train} --samples 3", "--samples"),
        ("trace {train} --output o", "--output", "trace"),
        ("check --checkpoint x.pt", "--checkpoint"),
        (f"evaluate {RUN} --samples 2", "--samples", "evaluate"),
        (f"check --data data --out doctor --width {HUGE}", f"--width {HUGE}"),
        (f"check --data data --out doctor --batch-size {HUGE}", f"--batch-size {HUGE}"),
        ("check --data data --out doctor --workers 1000000", "--workers 1000000"),
        (f"sample {RUN} --width 8", "--width 8", "run/checkpoint.pt"),
        (f"sample {RUN} --size 0 0", "--size"), (f"sample {RUN} --samples -3", "--samples -3"),
        (f"sample {RUN} --samples 0", "--samples 0"), (f"sample {RUN} --gpu 99", "--gpu 99"),
        (f"sample {RUN} --input ''", "--input"), (f"sample {RUN} --output ''", "--output"),
        (f"sample {RUN} --resume", "--resume"),
        (f"{ON} --seed 7", "--seed 7", "0"), (f"{ON} --batch-size 2", "--batch-size 2", "1"),
        (f"{ON} --size 64 32", "--size", "64", "32"),
        (f"{ON} --checkpoint run/checkpoint.pt", "--checkpoint"), (f"{ON} --steps -9", "-9")):
    bad(line.replace(RUN, "RUN").replace(ON, "ON"), nothing, line, *words)
SOME_LINES = {"{train} --betas nan 0.9": WITH_SCORER, "{train} --betas 0.5": WITH_SCORER,
              "{train} --betas 2 0.9": WITH_SCORER, "{train} --scorer-steps 0": WITH_SCORER,
              "{train} --loss nonsense": WITH_PAIRS, "{train} --direction left": WITH_PAIRS,
              "{train} --patch 71": ("pix2pix",), "{train} --patch 142": ("pix2pix",),
              "{train} --patch 286": ("pix2pix",), "{train} --levels 9": ("pix2pix",),
              "{train} --levels -1": ("pix2pix",), "{train} --task pairs": ("pix2pix",),
              "{train} --lambda-l1 nan": ("pix2pix",), "{train} --lambda-l1 -1": ("pix2pix",),
              "{train} --one-hot --task photo2labels": ("pix2pix",)}
for line, only in SOME_LINES.items():
    bad(line, nothing, f"{line} --data data", line.split()[1], only=only)

# ------------------------------------------------------------------------------------------- Good

def everything(change):
    """The same for every file of the dataset."""
    return lambda: [change(path) for path in sorted(Path("data").glob("*/*.png"))]


def awkward_names() -> None:
    for path in sorted(Path("data").glob("*/*.png")):
        path.rename(path.with_stem(("Straße im Schnee", "l'été à Paris #2 (100 %) 東京")[
            int(path.stem)]))
    Path("data").rename("Bilder [für] Übung 1")


def latin_1_name() -> None:
    """As an old archive gives it."""
    name = os.fsdecode("Straße.png".encode("latin-1"))
    try:
        Path(name).touch()
    except OSError:
        pytest.skip("this disk holds names in UTF-8 alone")
    for each in Path("data").iterdir():
        (each / "0.png").rename(each / name)
    save("data/train_img/" + name.replace("S", "s"), photo())


good("names with spaces, umlauts and quotes", awkward_names,
     "{train} --data 'Bilder [für] Übung 1' --out 'Läufe im März/r'", "2 examples")
for title, spoil, *words in (
        ("a name in Latin-1", latin_1_name, "left out"),
        ("capital endings", everything(lambda p: p.rename(p.with_suffix(".PNG"))), "2 examples"),
        ("what Windows and macOS leave in folders", all_of(*(
            put(f"data/{kind}/{name}", b"\0\0\0\1Bud1") for kind in ("train_img", "test_label")
            for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini"))), "2 examples"),
        ("one image only", gone("data/*/1.png", "data/test_label"), "1 examples", "no test split"),
        ("a photo more than there are labels", image("data/train_img/99.png", photo()),
         "left out: 99"),
        ("pairs of different sizes", all_of(*(image(f"data/train_{kind}/1.png", pixels)
         for kind, pixels in (("label", ids(70, 33)), ("inst", ids(70, 33)),
                              ("img", photo(70, 33))))), "2 examples"),
        ("images of one pixel", everything(lambda p: Image.open(p).crop((0, 0, 1, 1)).save(p)),
         "1x1")):
    good(title, spoil, f"{T} --classes 12" if "pixel" in title else T, *words)


# ------------------------------------------------------------------ The user, and what is looked at

@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> Path:
    """A sound dataset, and a run of one step by each script, to be copied."""
    root = tmp_path_factory.mktemp("templates")
    sound(root / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in NAMES:
            works(name, f"{TRAIN[name]} --data data {LABELS_ONLY.get(name, '')} --out {name}")
    return root


pytestmark = pytest.mark.usefixtures("no_plots")


def prepare(templates: Path, name: str) -> None:
    shutil.copytree(templates / "data", "data")
    shutil.copytree(templates / name, "run")


def filled(line: str, name: str) -> str:
    instances = "" if name not in WITH_INSTANCES else "--instances data/test_inst"
    return line.format(train=TRAIN[name], vgg=VGG.get(name, ""), instances=instances,
                       plain=LABELS_ONLY.get(name, ""),
                       scorer=SCORER if name in WITH_SCORER else "")


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
    return pytest.mark.parametrize("name, title", [
        pytest.param(name, title, marks=[pytest.mark.slow] * (k != i % len(only)))
        for i, (title, (*_, only)) in enumerate(table.items()) for k, name in enumerate(only)])


@each_case(BAD)
def test_bad_input_is_one_line_and_loses_nothing(name, title, templates):
    prepare(templates, name)
    spoil, line, words, _ = BAD[title]
    spoil()
    before = snapshot()
    fails(name, filled(line, name), *words)
    nothing_is_lost(before)


@each_case(GOOD)
def test_strange_input_that_is_sound_trains(name, title, templates):
    """Two steps, a checkpoint, and the notices that it calls for."""
    shutil.copytree(templates / "data", "data")
    spoil, line, words, _ = GOOD[title]
    spoil()
    out = works(name, f"{filled(line, name)} --steps 2")
    checkpoint, = Path(".").rglob("checkpoint.pt")
    assert stored(checkpoint.parent)["place"]["step"] == 2
    for word in words:
        assert word in out, f"{word!r} is not in: {out}"


# A setting in a checkpoint that somebody has edited.
CRAFTED = (None, [], [1, 2, 3], {}, "x", -1, 0.5, 10 ** 30, float("nan"), True)


@pytest.mark.parametrize("name, part", [pytest.param(
    name, part, marks=[pytest.mark.slow] * (k != part)) for k, name in enumerate(NAMES)
    for part in range(4)])
def test_crafted_settings_are_no_traceback(name, part, templates):
    """Each setting of a checkpoint as something else: refused in a line, or it does no harm."""
    shutil.copytree(templates / name, "run")
    content = stored("run")
    config = content["config"]
    for i, key in list(enumerate(config))[part::4]:
        value = CRAFTED[i % len(CRAFTED)]
        torch.save(content | {"config": config | {key: value}}, "x.pt")
        code, _, err = as_user(name, "sample --checkpoint x.pt --limit 1 --samples 1 --output o "
                                     f"--data {templates / 'data'} --gpu -1")
        assert code in (0, 2) and len(err.splitlines()) == code // 2, (key, value, code, err)


@pytest.mark.parametrize("name", WITH_INSTANCES)
def test_going_on_without_the_instance_maps_of_before(name, templates):
    """The network has a channel for them: the folder is named, not the shapes of weights."""
    shutil.copytree(templates / "data", "data")
    works(name, f"{TRAIN[name]} --data data")
    gone("data/*_inst")()
    before = snapshot()
    fails(name, "--resume --out r --steps 9", "--data data", "instance")
    nothing_is_lost(before)


@pytest.mark.parametrize("name", NAMES)
def test_going_on_with_a_mended_dataset(name, templates):
    """A bad file found after a checkpoint costs nothing but the steps since; found before the first
    checkpoint, the same command can be given again: the folder is not taken for a run."""
    prepare(templates, name)
    whole, line = Path("data/train_img/0.png").read_bytes(), f"{TRAIN[name]} --data data"
    Path("data/train_img/0.png").write_bytes(whole[:2000])
    before = snapshot()
    fails(name, "--resume --out run --steps 3", "data/train_img/0.png")
    nothing_is_lost(before)
    fails(name, line, "data/train_img/0.png")
    Path("data/train_img/0.png").write_bytes(whole)
    works(name, "--resume --out run --steps 3")
    works(name, line)
    assert [stored(run)["place"]["step"] for run in ("run", "r")] == [3, 1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", ["more", "fewer"])
def test_going_on_with_another_dataset_is_said(name, change, templates):
    """"Exactly" holds for the same examples; of others a notice tells, and nothing breaks."""
    prepare(templates, name)
    if change == "more":
        for kind, pixels in (("label", ids()), ("inst", ids()), ("img", photo())):
            save(f"data/train_{kind}/7.png", pixels)
    else:
        gone("data/train_*/1.png")()
    out = as_user(name, "--resume --out run --steps 3")
    assert out.code in (0, 2) and len(out.err.splitlines()) == out.code // 2, out
    assert {"more": "3", "fewer": "1"}[change] in out.out + out.err
    assert "2" in out.out + out.err


# ---------------------------------------------------------------------------- Without permission

# What may not be read (0) or written (0o555), the command, and what is said.
FORBIDDEN = {
    "a dataset": ("data", 0, T, ["data", "ermission"]),
    "a folder of a dataset": ("data/train_label", 0, T, ["data/train_label", "ermission"]),
    "a photo": ("data/train_img/0.png", 0, T, ["data/train_img/0.png", "ermission"]),
    "a checkpoint": ("run/checkpoint.pt", 0, f"sample {RUN}", ["run/checkpoint.pt", "ermission"]),
    "where runs go": (".", 0o555, T, ["r", "ermission denied"]),
    "a run to go on with": ("run", 0o555, ON, ["run", "ermission denied"]),
    "where a picture goes": (".", 0o555, f"sample {RUN} --input data/test_label/0.png {{instances}}"
                             " --output o.png --samples 1", ["o.png", "ermission denied"])}


def as_nobody(name: str, line: str, words: list[str]) -> str:
    """fails() in a process of its own; if we are root, who may do all, it is of another user."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            fails(name, line, *words)
        except BaseException as error:
            os.write(write, str(error)[:4000].encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        answer = file.read().decode()
    os.waitpid(child, 0)
    return answer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="permissions are another thing on Windows")
@pytest.mark.parametrize("name, title", [pytest.param(
    name, title, marks=[pytest.mark.slow] * (k != i % 4)) for i, title in enumerate(FORBIDDEN)
    for k, name in enumerate(NAMES)])
def test_what_may_not_be_read_or_written(name, title, templates):
    path, rights, line, words = FORBIDDEN[title]
    prepare(templates, name)
    for each in (Path("."), *Path(".").rglob("*")):
        each.chmod(0o777)
    before = snapshot()
    inside = Path(path).rglob("*") if path == "run" else ()
    for each in (*inside, Path(path)):
        each.chmod(rights)
    try:
        answer = as_nobody(name, filled(line, name), words)
    finally:
        Path(path).chmod(0o777)
    assert not answer, answer
    nothing_is_lost(before)


# ------------------------------------------------------------------------------------ From a shell

SHELL = {"lab2pix": "a bomb", "pix2pix": "a PNG with a wrong bit", "pix2pixhd": "half a JPEG"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHELL)
def test_bad_input_from_a_shell(name, templates):
    """The whole process: nothing that a library prints or warns of stands beside the line."""
    prepare(templates, name)
    Path("data/train_img/1.png").write_bytes(BROKEN[SHELL[name]])
    before = snapshot()
    result = shell(f"{SCRIPTS / name}.py {TRAIN[name]} --data data --workers 1 --steps 4")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith(f"{name}.py: error: data/train_img/1.png"), result.stderr
    nothing_is_lost(before)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("name", NAMES)
def test_three_kills_and_a_full_disk(name):
    """The short form of kill.py, as a user would call it."""
    result = shell(f"{SCRIPTS / 'tests' / 'kill.py'} --script {name} --kills 3", timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "bit-equal" in result.stdout and "full disk" in result.stdout
