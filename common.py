"""What the four scripts share: it reads data and holds frozen networks. Nothing here is trained by
a paper's method; whatever changes a weight of theirs, and what a run writes, stands in the scripts.

A dataset is a folder in any common layout, found by the table LAYOUTS below; adding a layout is
adding a row. Without a folder there are the streets: a procedural set whose true distribution is
known. Every item is a dict of public names, the same in all files:

    label     (H, W) int64         class per pixel; pixels of unknown class carry the last id
    instance  (H, W) int64         object per pixel, if the dataset has instances
    image     (3, H, W) float32    the photo to be made, in [-1, 1]
    input     (3, H, W) float32    what it is made from, in image-to-image pairs
    name      str                  the file's stem

What a user can get wrong raises UserError with one line: file or value, what is wrong, the cure.

Contents    1 Settings   2 Class tables   3 Files   4 Dataset   5 Data doctor and trace   6 Streets
            7 VGG   8 FCN-8s   9 Files of weights
"""

import os

# torch's threads wait for each other by spinning, which on a busy machine keeps a core from those
# that they wait for. This bounds it, without losing speed on an idle one. Read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import contextlib
import functools
import glob
import itertools
import json
import math
import pickle
import re
import signal
import sys
import time
import zlib
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm


class UserError(Exception):
    """A mistake of the user's: shown as one line, exit code 2, no traceback."""


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are: (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@functools.cache
def notice(text: str) -> None:
    """Print what was decided on the user's behalf, once per text."""
    print("note: " + text.replace("\n", r"\n"))             # a file's name may hold one


def draw_seed(seed: int, name: str, k: int = 0) -> int:
    """The seed of sample k of the image `name`: at test time every image has draws of its own."""
    return zlib.crc32(f"{seed} {k} {name}".encode("utf-8", "surrogateescape"))


# -------------------------------------------------------------------------------- 1 Settings

@dataclass(frozen=True)
class Within:
    """What a number may be, where words have a list of choices."""
    low: float
    high: float = math.inf

    def __contains__(self, x) -> bool:
        return self.low <= x <= self.high

    def __str__(self) -> str:
        return f"{self.low} or more" if self.high == math.inf else f"{self.low}..{self.high}"


COUNT, POSITIVE, SEED = Within(0), Within(1), Within(0, 10 ** 18)


def setting(default, text: str, choices: tuple | Within | dict | None = None,
            modes: tuple[str, ...] = (), free: str = ""):
    """A field of a script's Config: the one declaration of its default, meaning, range and use.

    parse makes the flag and its line of --help from it, check_settings the check.

    choices: words, a range, or a dict: each of its words is a flag, all are kept in their order.
    modes: those that know the flag; none: all do.
    free: what a checkpoint says of it. "": its value, another one is refused. "test": another one
        may be given when the checkpoint is tested; "resume": also when its run goes on. "call":
        nothing, it belongs to one call alone.
    """
    shown = default
    if isinstance(default, bool):
        shown = "on" if default else "off"
    elif isinstance(default, tuple):
        shown = " ".join(map(str, default))
    if shown not in ("", None):
        text = f"{text} ({shown})"
    return field(default=default, metadata={"help": text, "choices": choices, "modes": modes,
                                            "free": free})


def flags(config) -> list[Field]:
    """The fields of a Config that are settings; a plain field is no flag."""
    return [f for f in fields(config) if f.metadata]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def as_argument(f: Field) -> dict:
    """How argparse adds the flag of a setting: tuple[int, int] takes two values, tuple[str, ...]
    one or more. Ranges are checked later, by check_settings, so they are no choices here."""
    kind = get_args(f.type)[0] if isinstance(f.type, UnionType) else f.type      # int | None: int
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": f.metadata["help"]}
    kind, *more = get_args(kind) or (kind,)
    words = {"type": functools.partial(as_value, f.name, kind), "help": f.metadata["help"]}
    if more:
        words |= {"nargs": "+", "action": "extend"} if more == [...] else {"nargs": 1 + len(more)}
    if isinstance(f.metadata["choices"], tuple):
        return words | {"choices": f.metadata["choices"]}
    return words | {"metavar": kind.__name__.upper()}


def as_value(name: str, kind: type, word: str) -> str | float:
    """A word of the command line as the value of a setting; argparse would name Python's types."""
    with contextlib.suppress(ValueError):
        return kind(word)
    wanted = "a whole number, in digits" if kind is int else "a number"
    if name == "gpu":
        wanted = "a CUDA number, or -1 for the CPU; Apple GPUs are not supported"
    raise UserError(f"{flag(name)} {word}: must be {wanted}")


def parse(words: list[str], settings: type, name: str, modes: tuple[str, ...],
          about: str | None) -> tuple[str, dict]:
    """A script's command line: the mode, and the settings that were given.

    Each field of `settings` is a flag. `about`: the script's docstring, whose first and last
    paragraphs frame the list of flags.
    """
    about = about or ""                         # python -OO leaves it out
    p = argparse.ArgumentParser(
        usage=f"{name}.py [{' | '.join(modes)}] [flags]", description=about.partition("\n\n")[0],
        epilog=about[about.rfind("Run  "):], argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = refuse
    p.add_argument("mode", nargs="?", default="train", help="what to do (train)")
    for f in flags(settings):
        if isinstance(f.metadata["choices"], dict):     # each word is a flag, of this form
            for word, form in f.metadata["choices"].items():
                how = {"action": "append_const", "const": word} if not form else {
                    "action": "append", "type": f"{word} {{}}".format, "metavar": form}
                p.add_argument(flag(word), dest=f.name, help=f.metadata["help"], **how)
        else:
            p.add_argument(flag(f.name), **as_argument(f))
    found, strange = p.parse_known_args(words)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(found).items()}
    mode = given.pop("mode")
    if strange:                                 # before the mode: its value stands there, perhaps
        raise UserError(f"{strange[0]}: no such flag; --help lists all")
    if mode not in modes:
        raise UserError(f"{mode}: no such mode, or a value too many; there are {', '.join(modes)}")
    if given.get("resume") and "init" in given:
        raise UserError("--init begins a run, --resume goes on with one; leave one of them out")
    for f in flags(settings):
        known = f.metadata["modes"] or modes
        if f.name in given and mode not in known:
            raise UserError(f"{flag(f.name)} goes with {' or '.join(known)}, not with {mode}")
        if given.get(f.name) in ("", ("",)):    # a shell variable that is not set
            raise UserError(f"{flag(f.name)} '': empty; leave the flag out")
    return mode, given


def refuse(text: str) -> None:
    """In place of argparse's own way, which prints a screen of usage before the one line."""
    raise UserError(f"{text}; --help lists all flags")


def check_settings(cfg) -> None:
    """Each setting of a Config lies in its range, wherever it came from."""
    for f in flags(cfg):
        value, allowed = getattr(cfg, f.name), f.metadata["choices"]
        for one in value if isinstance(value, tuple) else [value]:
            if isinstance(allowed, dict):       # "flag value": the script knows its forms
                continue
            if allowed and one is not None and one not in allowed:
                words = " or ".join(map(str, allowed)) if isinstance(allowed, tuple) else allowed
                raise UserError(f"{flag(f.name)} {one}: must be {words}")


def find_preset(table: dict[str, dict], option: str, name: str) -> dict:
    """The row of a table of settings that an option names; without a name there are none."""
    if name and name not in table:
        raise UserError(f"{option} {name}: choose one of {', '.join(table)}")
    return table.get(name, {})


def check_sides(option: str, size: tuple[int, int], unit: int, least: int, why: str) -> None:
    """Refuses a size (H, W) unless both sides are multiples of `unit`, and `least` or more."""
    if any(side % unit or side < least for side in size):
        least = math.ceil(least / unit) * unit
        near = [max(least, round(side / unit) * unit) for side in size]
        raise UserError(f"{option} {size[0]} {size[1]}: {why}, so both sides must be multiples of "
                        f"{unit}, {least} or more; the nearest is {option} {near[0]} {near[1]}")


def shell(main: Callable, name: str) -> None:
    """Run a script's main; what a user can mend is one line, and exit code 2."""
    for channel in ("stdout", "stderr"):
        if getattr(sys, channel) is None:       # closed by whoever started us
            setattr(sys, channel, open(os.devnull, "w"))
        getattr(sys, channel).reconfigure(errors="backslashreplace")    # names no console shows
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, EOFError, MemoryError, RuntimeError) as error:
        ours = isinstance(error, UserError)     # others explain themselves in several lines
        text = str(error).replace("\n", r"\n") if ours else str(error).partition("\n")[0]
        ended = (EOFError, ConnectionRefusedError, ConnectionResetError)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate" in text:
            text = ("out of memory; a smaller --size, --width or --batch-size, or --precision "
                    f"bf16, helps ({text})")
        elif isinstance(error, ended) or re.search(r"DataLoader worker \(pid|</torch_", text):
            text = ("a data process was ended from outside, by a lack of memory or of /dev/shm "
                    "perhaps; --workers 0 needs none")
        elif isinstance(error, RuntimeError):
            raise                               # a mistake of ours
        print(f"{name}.py: error: {text}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------- 2 Class tables
# A row per dataset: names, colours, which classes are things (counted one by one), and which
# numbers its files use for them.

def colour_wheel(n: int) -> np.ndarray:
    """n distinct colours (n, 3) uint8 by the bit pattern of Pascal VOC, for sets that have none."""
    ids = np.arange(1, n + 1)[:, None, None]                 # from 1: black is for unknown pixels
    bits = ids >> (3 * np.arange(8)[:, None] + np.arange(3)) & 1                      # (n, 8, 3)
    return (bits << (7 - np.arange(8)[:, None])).sum(1).astype(np.uint8)                 # (n, 3)


@dataclass(frozen=True)
class ClassTable:
    """The classes of one dataset. Ids in items run from 0; `unknown` pixels get id len(names)."""
    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...] = ()  # empty: colour_wheel
    things: frozenset[str] = frozenset()            # foreground classes
    unknown: int | None = None                      # the value of unknown pixels in the files
    first: int = 0                                  # the value of class 0 in the files
    scored: tuple[int, ...] = ()                    # ids that enter FCN-scores; empty: all

    @property
    def channels(self) -> int:
        """Number of ids in items: the classes, and one more if pixels can be unknown."""
        return len(self.names) + (self.unknown is not None)

    @property
    def palette(self) -> np.ndarray:
        """(channels, 3) uint8, one colour per id; unknown is black."""
        colours = np.array(self.colours or colour_wheel(len(self.names)), np.uint8).reshape(-1, 3)
        black = np.zeros((self.channels - len(self.names), 3), np.uint8)
        return np.concatenate([colours, black])


def rows(text: str) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """'sky 70 130 180, traffic light, ...' -> names, colours, wherever the lines break."""
    cells = [cell.split() for cell in text.split(",")]
    return (tuple(" ".join(word for word in cell if not word.isdigit()) for cell in cells),
            tuple(tuple(int(word) for word in cell if word.isdigit()) for cell in cells))


CITYSCAPES = torchvision.datasets.Cityscapes.classes       # by id; the licence plate is last, 34
TRAINED = [c for c in CITYSCAPES if not c.ignore_in_eval]  # the 19 that count, by "train id"
CAMVID = rows("""sky 128 128 128, building 128 0 0, pole 192 192 128, road 128 64 128,
    pavement 60 40 222, tree 128 128 0, sign 192 128 128, fence 64 64 128, car 64 0 128,
    pedestrian 64 64 0, bicyclist 0 128 192""")
FACADES = rows("""background 0 0 170, facade 0 0 255, window 0 85 255, door 0 170 255,
    cornice 0 255 255, sill 85 255 170, balcony 170 255 85, blind 255 255 0, deco 255 170 0,
    molding 255 85 0, pillar 255 0 0, shop 170 0 0""")
ADE20K = rows("""wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet,
    sidewalk, person, earth, door, table, mountain, plant, curtain, chair, car, water, painting,
    sofa, shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp,
    bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
    skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
    screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
    bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade
    machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
    television, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle,
    buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming
    pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step,
    tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture,
    hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin
    board, shower, radiator, glass, clock, flag""")[0]
COCO_THINGS = rows("""person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic
    light, fire hydrant, street sign, stop sign, parking meter, bench, bird, cat, dog, horse, sheep,
    cow, elephant, bear, zebra, giraffe, hat, backpack, umbrella, shoe, eye glasses, handbag, tie,
    suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon, bowl, banana,
    apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted
    plant, bed, mirror, dining table, window, desk, toilet, door, tv, laptop, mouse, remote,
    keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, blender, book, clock, vase,
    scissors, teddy bear, hair drier, toothbrush, hair brush""")[0]
COCO_STUFF = rows("""banner, blanket, branch, bridge, building-other, bush, cabinet, cage,
    cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard,
    curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, floor-stone,
    floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel,
    ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin,
    net, paper, pavement, pillow, plant-other, plastic, platform, playingfield, railing, railroad,
    river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other,
    stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree, vegetable,
    wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood,
    water-other, waterdrops, window-blind, window-other, wood""")[0]


STREETS = ("sky", "building", "vegetation", "road", "sidewalk", "terrain", "wall", "pole",
           "traffic sign", "person", "car", "truck")
TABLES = {
    "cityscapes": ClassTable(
        tuple(c.name for c in CITYSCAPES), tuple(c.color for c in CITYSCAPES),
        things=frozenset(c.name for c in CITYSCAPES if c.has_instances),
        scored=tuple(k for k, c in enumerate(CITYSCAPES) if not c.ignore_in_eval)),
    "cityscapes_train": ClassTable(
        tuple(c.name for c in TRAINED), tuple(c.color for c in TRAINED),
        things=frozenset(c.name for c in TRAINED if c.has_instances), unknown=255),
    "camvid": ClassTable(*CAMVID, things=frozenset({"car", "pedestrian", "bicyclist"}), unknown=11),
    "facades": ClassTable(*FACADES, things=frozenset(["window", "door", "balcony"]), first=1),
    "ade20k": ClassTable(ADE20K, unknown=0, first=1, things=frozenset(rows(
        "person, car, bus, truck, van, animal, bicycle, minibike, boat, airplane, chair")[0])),
    "coco_stuff": ClassTable(COCO_THINGS + COCO_STUFF, things=frozenset(COCO_THINGS), unknown=255),
    "streets": ClassTable(STREETS, tuple({c.name: c.color for c in CITYSCAPES}[name]
                                         for name in STREETS), frozenset(STREETS[9:])),
}


def class_table(name: str) -> ClassTable:
    """A row of TABLES; for a number, as in "--classes 9", so many nameless classes."""
    if name in TABLES:
        return TABLES[name]
    if not name.isdecimal() or not 0 < int(name) < 65536:
        raise UserError(f"--classes {name}: neither a number nor one of {', '.join(TABLES)}")
    unknown = 255 if int(name) < 256 else 65535              # in files of 8 and of 16 bit
    return ClassTable(tuple(f"class {i}" for i in range(int(name))), unknown=unknown)


def class_id(name: str | int, table: ClassTable) -> int:
    """A class by its name or its number."""
    if name in table.names:
        return table.names.index(name)
    if str(name).isdecimal() and int(name) < table.channels:
        return int(name)
    raise UserError(f"class {name}: choose a number below {table.channels}, or one of "
                    + ", ".join(table.names))


# ----------------------------------------------------------------------------------- 3 Files

IDS = ("label", "instance")                             # maps of ids; all other roles are photos
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"}
ARRAYS = {".npy", ".npz", ".mat", ".h5", ".exr", ".jp2", ".heic", ".avif", ".dcm"}  # not read
# All that is ever opened, whatever a file is called: for some others Pillow starts a program.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM", "GIF")
Image.MAX_IMAGE_PIXELS = 2 ** 28                         # Pillow refuses twice as many
# Kinds of pixels, in Pillow's words.
GREY = ("1", "L", "L;2", "L;4", "LA", "I;16", "I")
COLOUR = ("P", "PA", "RGB", "RGBA", "YCbCr", "RGB;16")
DEEP = ("I;16", "I", "RGB;16")                           # more than 8 bit
MAPS = ("1", "L", "P", "RGB", "I;16")                    # what a label or instance map may be


@dataclass(frozen=True)
class FolderLayout:
    """How a dataset lies on disk: a glob per role, {} for the split, "**" for any folders below.
    The first role decides."""
    name: str
    roles: dict[str, str]
    train: tuple[str, ...] = ("train",)
    test: tuple[str, ...] = ("test", "val")
    classes: str = ""            # a row of TABLES, which the files' contents confirm or not


LAYOUTS = [
    FolderLayout("Cityscapes", {"label": "gtFine/{}/*/*_gtFine_label*Ids.png",
                                "instance": "gtFine/{}/*/*_gtFine_instanceIds.png",
                                "image": "leftImg8bit/{}/*/*_leftImg8bit.*"},
                 test=("val",), classes="cityscapes"),   # the labels of its test split are withheld
    FolderLayout("pix2pixHD", {"label": "{}_label/**/*", "instance": "{}_inst/**/*",
                               "image": "{}_img/**/*"}),   # also Cityscapes, COCO-Stuff so named
    FolderLayout("pix2pixHD pairs", {"A": "{}_A/**/*", "B": "{}_B/**/*"}),
    FolderLayout("ADE20K", {"label": "annotations/{}/**/*", "image": "images/{}/**/*"},
                 train=("training",), test=("validation",), classes="ade20k"),
    FolderLayout("CamVid", {"label": "{}annot/**/*", "image": "{}/**/*"}, classes="camvid"),
    FolderLayout("images and labels", {"label": "labels/*", "image": "images/*"},
                 classes="cityscapes"),            # GTA-5 lies so, and many a set of one's own
    FolderLayout("images and labels", {"label": "labels/{}/**/*", "image": "images/{}/**/*"}),
    FolderLayout("CMP Facades", {"label": "base/*.png", "image": "base/*.jpg"}, classes="facades"),
    FolderLayout("unpaired", {"A": "{}A/**/*", "B": "{}B/**/*"}),
    FolderLayout("A and B folders", {"A": "A/{}/**/*", "B": "B/{}/**/*"}),
    FolderLayout("A and B folders", {"A": "A/*", "B": "B/*"}),
    FolderLayout("pix2pix pairs", {"pair": "{}/**/*"}),
    FolderLayout("photos", {"image": "{}/**/*"}),          # only where the task makes its own input
    FolderLayout("photos", {"image": "*"}),
]


def key_of(path: Path, role: str) -> str:
    """The name that partners share: without an ending that says what a file is."""
    ends = "_[AB]$" if role in ("A", "B") else (
        "(_gtFine)?_(labelIds|labelTrainIds|instanceIds|color)$|_leftImg8bit$|"
        "_(labels?|instances?|inst|images?|img)$")
    return re.sub(ends, "", path.stem) or path.stem


def find(root: Path, pattern: str, role: str) -> dict[str, Path]:
    """Files by key. Folders that "**" stands for are a part of it, links to folders among them."""
    folder, (stem, _, ending), found = root / pattern.partition("*")[0], pattern.partition("."), {}
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"{folder}: may not be read; check its permissions")
    # Cityscapes' maps lie side by side in several forms, of which one is meant: it comes first.
    meant = "_instanceIds" if role == "instance" else "_labelIds"
    # Hidden files and folders are left out: macOS leaves "._name.png".
    paths = [root / name for name in glob.glob(f"{stem}.*", root_dir=root, recursive=True)]
    endings = {f".{ending}"} if ending.isalpha() else SUFFIXES
    for path in sorted(paths, key=lambda path: (not path.stem.endswith(meant), path)):
        inner = path.relative_to(folder) if "**" in pattern else Path(path.name)
        if path.suffix.lower() not in endings or not path.is_file():
            continue
        key = (inner.parent / key_of(path, role)).as_posix()
        if key in found and not found[key].stem.endswith(meant):
            raise UserError(f"{path}: the same example as {found[key]}, by its name {key}; rename "
                            "or remove one")
        found.setdefault(key, path)
    return found


def detect(root: Path, photos_only: bool) -> FolderLayout:
    """The first layout of the table that has files."""
    if not root.is_dir():
        raise UserError(f"--data {root}: {'not a folder' if root.exists() else 'no such folder'}")
    left_out = ["pair"] if photos_only else ["image"]        # both would take a folder of photos
    for layout in [layout for layout in LAYOUTS if list(layout.roles) != left_out]:
        role, first = next(iter(layout.roles.items()))
        if any(find(root, first.replace("{}", split), role)
               for split in (*layout.train, *layout.test)):
            return layout
    arrays = [path for path in root.rglob("*.*") if path.suffix.lower() in ARRAYS]
    if arrays:
        raise UserError(f"{arrays[0]}: {arrays[0].suffix} is not read; save as PNG")
    if find(root, "*", "image"):
        raise UserError(f"--data {root}: photos only, for pix2pix.py --task colorization or "
                        "inpainting; pairs side by side belong into its train/")
    looked = dict.fromkeys(next(iter(layout.roles.values())).replace("{}", "train")
                           for layout in LAYOUTS)
    inside = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())[:8]
    raise UserError(f"--data {root}: no known layout; looked for {', '.join(looked)}; found "
                    + (", ".join(inside) or "nothing"))


def pair_up(root: Path, layout: FolderLayout, split: str,
            only: str = "") -> dict[str, dict[str, Path]]:
    """Partners of one split, matched by key: {key: {role: path}}, sorted. `only`: one role."""
    globs = {role: glob for role, glob in layout.roles.items() if not only or role == only
             or role == "pair" and only in ("A", "B")}
    if not globs:
        raise UserError(f"--data {root}: layout {layout.name} has no {only} files")
    first, has_splits = next(iter(globs)), "{}" in next(iter(globs.values()))
    for option in layout.train if split == "train" else layout.test:
        roles = {role: find(root, glob.replace("{}", option), role) for role, glob in globs.items()}
        if roles[first]:
            break
    keys = sorted(roles[first])
    if not has_splits:
        keys = split_keys(root, keys, split)
    for role, files in roles.items():
        missing = [key for key in keys if key not in files] if files else []
        if missing:
            raise UserError(f"{roles[first][missing[0]]}: no {role} of the same name and case "
                            f"({len(missing)} of {len(keys)} lack one: {', '.join(missing[:4])})")
        extra = sorted(set(files) - set(roles[first]))
        if extra:
            notice(f"{len(extra)} {role} files without a {first} are left out: "
                   + ", ".join(extra[:4]))
    return {key: {role: files[key] for role, files in roles.items() if files} for key in keys}


def split_keys(root: Path, keys: list[str], split: str) -> list[str]:
    """Without split folders: train.txt or test.txt if present, else every tenth is held out."""
    listed = {}
    for name in ("val", "test", "train"):           # test.txt goes before val.txt
        path = root / f"{name}.txt"
        if path.is_file():                          # Windows begins a text with a mark
            utf16 = path.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff")
            text = path.read_text("utf-16" if utf16 else "utf-8-sig", errors="replace")
            paths = [Path(line.replace("\\", "/").strip()) for line in text.splitlines()]
            stems = {key_of(p if p.suffix.lower() in SUFFIXES else Path(f"{p.name}.png"), "label")
                     for p in paths if p.name}
            listed["train" if name == "train" else "test"] = stems
            if stems - set(keys):
                notice(f"{path}: {len(stems - set(keys))} of {len(stems)} entries name no file: "
                       + ", ".join(sorted(stems - set(keys))[:4]))
    test = listed.get("test", set(keys if listed else keys[1::10]))
    train = listed.get("train", set(keys) - test)
    if test & train and len(listed) == 2:
        notice(f"{root}: {len(test & train)} files of both lists are left out of testing")
    return [key for key in keys if key in (train if split == "train" else test - train)]


@contextlib.contextmanager
def opened(path: Path, role: str) -> Iterator[tuple[Image.Image, str]]:
    """A file's image, of which the header has been read, and the kind of its pixels: one of GREY,
    COLOUR or MAPS by its role. Other kinds, and whatever goes wrong in reading, are one line."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            kind, stored = image.mode, str(image.tile[0][3]) if image.tile else ""
            if kind.startswith("I;16") or kind == "I" and image.format == "PNG":
                kind = "I;16"                   # in whatever order of bytes
            elif ";16" in stored and kind != "I" or image.format == "PPM" and "('RGB'" in stored:
                kind += ";16"                   # Pillow would drop the lower eight
            elif stored in ("L;2", "L;4"):
                kind = stored                   # Pillow would spread them over 0..255
            bands, kinds, cure = len(image.getbands()), GREY + COLOUR, "PNG, grey or RGB"
            stored_bands = image.tag_v2.get(277, bands) if image.format == "TIFF" else bands
            if role in IDS:
                kinds, cure = MAPS, "8-bit grey PNG"
            elif kind in DEEP and "transparency" in image.info:
                kind += " with transparency"
            if kind not in kinds or stored_bands > bands or image.format != "PNG" and (
                    role in IDS or kind == "RGB;16"):
                raise UserError(f"{path}: {image.format} of kind {kind}, {stored_bands} bands: as "
                                f"{role} a part of it would be lost; save as {cure}")
            yield image, kind
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or str(error).partition(", could be")[0]
        raise UserError(f"{path}: cannot be read ({why}) as {', '.join(FORMATS)} of four bands at "
                        "most; save it as PNG, or download it again")


def read_header(path: Path, role: str) -> tuple[tuple[int, int], str, bytes]:
    """(H, W) upright, the kind of pixels, and the palette if there is one; no pixel is read."""
    with opened(path, role) as (image, kind):
        turned = image.format == "TIFF" or image.info.keys() & {"exif", "xmp"}
        held = image.getexif().get(0x0112, 1) if turned else 1           # how the camera was held
        return (image.size if held >= 5 else image.size[::-1], kind,
                bytes(image.getpalette()) if kind == "P" else b"")


def read_photo(path: Path, grey: bool = False) -> np.ndarray:
    """A photo's values (H, W, 1 or 3), uint8 if it has no more than 8 bit; transparency is laid on
    white. grey: colours of 8 bit become grey."""
    with opened(path, "image") as (image, kind):
        if kind == "RGB;16":                    # Pillow reads the first byte of each two; of the
            with Image.open(path) as low:       # other order, the second
                low.tile = [(*tile[:3], "RGB;16L") for tile in low.tile]
                return 256 * np.asarray(image, np.int64) + np.asarray(low)
        if getattr(image, "is_animated", False):
            notice(f"{path}: several images in one; only the first is used")
        image = ImageOps.exif_transpose(image)
        if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):
            notice("transparency is laid on white, in all photos that have it")
            clear = image.convert("RGBA")
            image = Image.new("RGBA", image.size, "white")
            image.alpha_composite(clear)
        if kind not in DEEP:
            image = image.convert("L" if grey else "RGB")
        return np.array(image).reshape(*image.size[::-1], -1)


def read_image(path: Path, span: tuple[float, float] | None = None, grey: bool = False) -> Tensor:
    """Any photo -> (3, H, W) uint8: grey is repeated.

    span: the values that become 0 and 255 where there are more than 8 bit; None takes the file's.
    """
    values = read_photo(path, grey)
    if values.dtype != np.uint8:
        low, high = span or (values.min(), values.max())
        values = (values.astype(np.float64) - low) / max(high - low, 1e-12)
        values = np.round(255 * values.clip(0, 1)).astype(np.uint8)
    return torch.from_numpy(values).permute(2, 0, 1).expand(3, -1, -1)


CODE = np.array((1, 256, 65536))                # a colour as one number, R + 256 G + 65536 B


class MapContent(NamedTuple):
    """What a map of ids holds: its values, how many pixels have each, and their colours."""
    path: Path
    kind: str                       # of its pixels, one of MAPS
    values: np.ndarray              # ids, indices of a palette, or colours
    counts: np.ndarray
    colours: np.ndarray | None      # of the values, if they have some

    def count(self, table: ClassTable) -> np.ndarray:
        """How many pixels have each id (channels), as the table reads them."""
        return np.bincount(to_ids(self, table), self.counts, table.channels).astype(np.int64)


def read_map(path: Path, role: str) -> tuple[np.ndarray, str, np.ndarray | None]:
    """A map's values (H, W) int64, the kind of its pixels, and the colours of a palette's indices.
    """
    with opened(path, role) as (image, kind):
        values = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
        palette = np.reshape(image.getpalette(), (-1, 3)) @ CODE if kind == "P" else None
        return values @ CODE if kind == "RGB" else values, kind, palette


def content_of(path: Path) -> tuple[np.ndarray, MapContent]:
    """A label map's values (H, W) int64, and what it holds."""
    values, kind, palette = read_map(path, "label")
    counts = np.bincount(values.ravel())
    used = np.flatnonzero(counts)
    colours = used if kind == "RGB" else None
    if kind == "P":                             # -1, which is no colour, for indices beyond it
        colours = np.append(palette, np.full(256, -1))[used]
    return values, MapContent(path, kind, used, counts[used], colours)


def read_instance(path: Path) -> Tensor:
    """An instance map -> (H, W) int64: grey, palette index, or R + 256 G + 65536 B."""
    return torch.from_numpy(read_map(path, "instance")[0])


def read_label(path: Path, table: ClassTable) -> Tensor:
    """A label map -> (H, W) int64 ids, each checked against the table on the CPU."""
    values, content = content_of(path)
    id_of = np.zeros(content.values[-1] + 1, np.int64)
    id_of[content.values] = to_ids(content, table)
    return torch.from_numpy(id_of[values])


def to_ids(content: MapContent, table: ClassTable) -> np.ndarray:
    """Ids of the table, one for each value of a label map.

    Grey files hold the ids themselves. Colours are looked up in the table's palette, also those of
    a palette file, whose order may be any converter's; if they are others, its indices are the ids.
    A colour outside the palette is an error, not a guess.
    """
    path, kind, values, _, colours = content
    if kind == "RGB" or kind == "P" and table.colours:
        palette = (table.palette @ CODE).tolist()
        ids = np.array([v if palette[v:v + 1] == [c] else       # one of its own colour keeps it
                        palette.index(c) if c in palette else -1
                        for v, c in zip(values.tolist(), colours.tolist())])
        if kind == "RGB" or ids.min() >= 0 or 2 * np.sum((ids >= 0) & (ids != values)) > len(ids):
            strange = [(c & 255, c >> 8 & 255, c >> 16) for c in colours[ids < 0].tolist()]
            if strange:
                raise UserError(f"{path}: {len(strange)} colours are not in the dataset's palette: "
                                + ", ".join(map(str, strange[:5]))
                                + "; save class ids as 8-bit grey PNG")
            return ids
    n = len(table.names)
    # -1 is 255 or 65535 in files; Cityscapes has a class for what is not labelled.
    nothing = n if table.unknown is not None else 0 if table.names[0] == "unlabeled" else -1
    unknown = (values == table.unknown) | (values == 65535) | (
        values == 255) & (n + table.first <= 255)
    ids = np.where(unknown, nothing, values - table.first)
    bad = values[(ids < 0) | (ids >= n) & ~unknown]
    if bad.size:
        raise UserError(f"{path}: label id {bad[0]}, expected {table.first}..{n - 1 + table.first}"
                        + f" or {table.unknown} for unknown" * (table.unknown is not None)
                        + "; correct the file or, to train anew, pass --classes "
                        + str(max(bad[-1], n) + 1))
    return ids


def side_by_side(paths: list[Path]) -> bool:
    """Do these photos hold two images each, side by side? A seam in the middle says so.

    Of files twice as wide as high only a middle as smooth as all the rest says that they do not; of
    others the seam must be the sharpest step of each, or nearly so.
    """
    twice, smooth, ranks = True, [], []
    for path in paths:
        grey = read_image(path).float().mean(0)
        h, w = grey.shape
        steps = grey.diff(dim=1).abs().mean(0)                       # (W - 1): between columns
        seam, far = steps[w // 2 - 1], (grey[:, w // 4:] - grey[:, :w - w // 4]).abs().mean()
        twice &= w == 2 * h
        smooth.append(bool(steps.mean() / 4 < seam < 2 * steps.mean() < far))
        ranks.append(float((steps < seam).float().mean() + 1 / w) * (w % 2 == 0))
    return np.mean(smooth) < 0.5 if twice else np.mean(ranks) > 0.97


# --------------------------------------------------------------------------------- 4 Dataset

def input_files(source: str, role: str, instances: str | None = None) -> list[dict[str, Path]]:
    """--input, a file or a folder, as `files` for a Dataset: each by itself, without a truth.

    instances: --instances, for a network that needs them: the map of the one file, or a folder that
    has a map of the same name for each; "" is refused. None: no instances are needed.
    """
    root, there = Path(source), Path(instances or "")
    paths = [root] if not root.is_dir() else [
        path for path in sorted(root.glob("[!.]*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not paths:
        raise UserError(f"--input {source}: a folder without images (folders in it are not read)")
    if len({path.stem for path in paths}) < len(paths):
        raise UserError(f"--input {source}: several files of one name; outputs are named by it")
    if instances is None:
        return [{role: path} for path in paths]
    if not instances or there.is_file() and root.is_dir():
        raise UserError(f"--input {source}: this network needs instance maps, too; name the map, "
                        "or for a folder the folder of maps, with --instances")
    maps = find(there, "*", "instance") if there.is_dir() else {}
    files = [{role: path, "instance": maps.get(key_of(path, role), there)} for path in paths]
    for each in files:
        if each["instance"].is_dir():
            raise UserError(f"--instances {there}: no map named {each[role].stem}")
        if each["instance"].resolve() == each[role].resolve():
            notice(f"{each[role]}: ids of classes serve as ids of objects")
    return files


OURS = "pix2pix, pix2pixHD, CRN, IMLE, Lab2Pix"    # what a picture of ours says in its header


def writable(option: str, path: Path, reads: set[Path], own: tuple[str, ...] | None = None) -> Path:
    """`path` itself, if writing there costs nothing that is not ours; else it is refused.

    No output and no run lies in a folder that is read, or below one, where it would be read as a
    part of the data (`reads`: such folders, and single files). own: the names of a run's files, of
    which its folder may hold some already; None: `path` is a picture or a file of scores, and one
    of ours is replaced, or a folder for them.
    """
    there = path.resolve()
    if not reads.isdisjoint({there, *there.parents}):
        raise UserError(f"{option} {path}: lies in what is read; name another place")
    strange = [] if own is None else sorted(
        each.name for each in path.glob("*") if each.name not in own and each.suffix != ".tmp")
    if strange:
        raise UserError(f"{option} {path}: holds {', '.join(strange[:4])}; name a new folder")
    if own is None and path.is_file() and path.stat().st_size and not made_here(path):
        raise UserError(f"{option} {path}: exists, and is none of ours; name another place")
    return path


def at_home(given: dict, checkpoint: Path) -> dict:
    """The settings with --out, the folder of the run that left the checkpoint. One that holds
    another run is refused."""
    here, there = checkpoint.parent, Path(given.get("out", checkpoint.parent))
    if (there / "checkpoint.pt").exists() and not there.samefile(here):
        raise UserError(f"--out {there}: holds another run; name a new folder")
    return {"out": str(here)} | given if checkpoint.name == "checkpoint.pt" else given


def made_here(path: Path) -> bool:
    if path.suffix == ".json":
        return OURS in path.read_text(errors="replace")
    with contextlib.suppress(UserError), opened(path, "image") as (image, _):
        return OURS in str(image.info)
    return False


def save_scores(scores: dict, path: Path) -> None:
    """What evaluate found, in a file that says that it is ours: see `writable`."""
    path.write_text(json.dumps({"by": OURS} | scores, indent=2, allow_nan=False))


def outputs(items: "Dataset", source: str, target: Path,
            samples: int) -> Iterator[tuple[dict, list[Path]]]:
    """Each item, and where its outputs go; all places are looked at before the first is made.

    `target` is a file for one output of one file, a folder else.
    """
    single = bool(source) and Path(source).is_file() and samples == 1 and not target.is_dir()
    if not (single and target.suffix) and target.suffix.lower() in SUFFIXES:
        raise UserError(f"--output {target}: one file for several images; name a folder")
    endings = [f"_{k + 1}.png" for k in range(samples)] if samples > 1 else [".png"]
    places = [[target] if single and target.suffix else
              [target / f"{name}{ending}" for ending in endings] for name in items.names]
    reads = items.reads | ({Path(source).resolve()} if source else set())
    if source and items.found not in ("", items.classes):
        notice(f"--input {source}: looks like labels of {items.found}, read as {items.classes}")
    for path in itertools.chain(*places):
        writable("--output", path, reads)
    places[0][0].parent.mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(len(items)), unit="image", disable=None):
        yield items[i], places[i]
    print(f"{len(items) * samples} image(s): {target}")


class Dataset(torch.utils.data.Dataset):
    """One split of a dataset in any known layout, or of the built-in streets (data="").

    Args:
        files: these, {role: path} each, instead of a folder's.
        data: the folder; "" for the streets.    split: "train" or "test".
        size: (H, W) of the items; None keeps each file's own (then only batches of one).
        jitter: enlarge by 286/256 and crop back at random.    mirror: flip, half the time.
        crop: (H, W) of a random window of each item; (0, 0) keeps it whole.
        classes: a row of TABLES or a number; "" asks the contents of the label maps.
        direction: which half of a pair is the input, "AtoB" or "BtoA".
        photos_only: the task makes its own input, so a folder of photos will do.
        instances: read the instance maps, where there are any.
        only: one role alone, "A", "B", "label" or "image": its partners are neither needed nor
            opened, so that two lists without common names are two datasets.
        limit: use the first so many examples; 0 is all, of the streets 400 to train on.
        understood: that of the training's dataset, so that another is read alike.

    A set is understood once, as a whole, when it is opened. `understood` says as what, in plain
    numbers and words: its folders; file_size, the usual (H, W) of its files; colours, those of
    palette indices; of input and image whether they are grey, and their range beyond 8 bit.

    What is random about item i depends on (seed, epoch, i) alone: not on the number of workers, nor
    on what was drawn before. So a resumed run sees what the uninterrupted one would have seen.
    """

    STREETS = {"train": (0, 400), "test": (1_000_000, 50)}       # first index, how many
    SAMPLE = 100                                                 # label maps whose ids are asked

    def __init__(self, data: str = "", split: str = "train", size: tuple[int, int] | None = None,
                 jitter: bool = False, mirror: bool = False, crop: tuple[int, int] = (0, 0),
                 classes: str = "", direction: str = "AtoB", photos_only: bool = False,
                 instances: bool = True, limit: int = 0, seed: int = 0, only: str = "",
                 files: list[dict[str, Path]] | None = None, understood: dict | None = None):
        self.data, self.split, self.size, self.seed, self.epoch = data, split, size, seed, 0
        self.direction, self.only, self.classes, self.found = direction, only, classes, ""
        self.understood, self.pixels_of = dict(understood or {}), np.zeros(0, np.int64)
        if files is not None:
            self.layout, self.files = FolderLayout("files", dict.fromkeys(files[0], "")), files
            self.names = [next(iter(f.values())).stem for f in files]
        elif data:
            root = Path(data)
            self.layout = detect(root, photos_only)
            self.understood["folders"] = sorted({*self.understood.get("folders", ())} | {
                str(root / glob.replace("{}", name).partition("*")[0]) for name in (
                    *self.layout.train, *self.layout.test) for glob in self.layout.roles.values()})
            pairs = pair_up(root, self.layout, split, only)
            if split == "test" and not pairs:
                notice("no test split: training examples stand in; scores say nothing of new data")
                pairs = pair_up(root, self.layout, "train", only)
            if not pairs:
                raise UserError(f"--data {data}: {self.layout.name} with an empty {split} split; "
                                "fill it")
            self.names = list(pairs)[:limit or None]
            self.files = [{role: path for role, path in pairs[name].items()
                           if role != "instance" or instances} for name in self.names]
        else:
            self.open_streets(limit)
        self.roles = set(self.files[0] if data or files else self.layout.roles)
        if direction == "BtoA" and self.roles == {"A"} and not only:
            raise UserError(f"--direction BtoA: {data} has no B in its {split} split")
        if data or files:
            self.read_headers()
        self.table = class_table(self.classes) if self.classes else None
        self.load_size = size and tuple(round(s * 286 / 256) if jitter else s for s in size)
        flip = [v2.RandomHorizontalFlip(0.5)] if mirror else []
        window = crop if all(crop) else size if jitter else None
        crop = [v2.RandomCrop(window)] if window else []
        self.transform = v2.Compose(crop + flip + [v2.ToPureTensor()])

    def open_streets(self, limit: int) -> None:
        if self.size is not None and min(self.size) < 32:
            raise UserError("--size {} {}: the streets need at least 32 x 32".format(*self.size))
        if class_table(self.classes or "streets") is not TABLES["streets"]:
            raise UserError(f"--classes {self.classes}: streets have their own; leave the flag out")
        first, n = self.STREETS[self.split]
        roles = (self.only,) if self.only else ("label", "instance", "image")
        self.layout = FolderLayout("streets", dict.fromkeys(roles, ""))
        if limit:                               # of training streets there are a million
            n = min(limit, 10 ** 6 if self.split == "train" else n)
        self.files, self.classes = list(range(first, first + n)), "streets"
        self.names = [f"street_{index:07d}" for index in self.files]
        self.understood["file_size"] = list(self.size or (256, 512))

    # What the set as a whole says.

    def read_headers(self) -> None:
        """What all files say before their pixels: sizes, kinds, palettes. Then what a sample holds.
        """
        heads, faults = [], []
        for files in tqdm(self.files, "headers", disable=None, delay=2):
            with collected(faults):
                heads.append({role: read_header(path, role) for role, path in files.items()})
                if len({size for size, *_ in heads[-1].values()}) > 1:
                    raise UserError(f"{next(iter(files.values()))}: sizes differ (height, width): "
                                    + ", ".join(f"{k} {v[0]}" for k, v in heads[-1].items()))
        refuse_all(faults)                      # from here on, there is a head for each
        sizes, both = [next(iter(head.values()))[0] for head in heads], [*zip(self.files, heads)]
        self.sizes = Counter(sizes)
        self.understood.setdefault("file_size", [sorted(s)[len(s) // 2] for s in zip(*sizes)])
        for role in sorted(self.roles - {*IDS}):
            self.understand_photos(role, {files[role]: head[role][1] for files, head in both})
        if "label" in self.roles:
            self.understand_labels({head["label"][2]: files["label"] for files, head in both})

    def understand_photos(self, role: str, kinds: dict[Path, str]) -> None:
        """Two halves or one photo, grey or not, and the range of values of more than 8 bit."""
        some, deep = spread(list(kinds), 12), [path for path in kinds if kinds[path] in DEEP]
        if role == "pair" and not side_by_side(some):
            raise UserError(f"{some[0]}: does not look like two images side by side: put halves "
                            "into trainA/, trainB/; photos alone are for pix2pix.py --task "
                            "colorization or inpainting")
        if 0 < len(deep) < len(kinds):
            raise UserError(f"{deep[0]}: more than 8 bit per pixel; {(kinds.keys() - deep).pop()} "
                            "has 8; save all alike")
        known = [self.understood[key] for key in self.keys_of(role) if key in self.understood]
        if known and bool(known[0]["span"]) != bool(deep):
            raise UserError(f"{some[0]}: {'over ' * bool(deep)}8 bit per pixel, unlike what was "
                            f"trained on; save as {8 if deep else 16} bit")
        if known:
            return
        ends = [float(end) for v in map(read_photo, deep) for end in (v.min(), v.max())]
        span = [min(ends), max(ends)] if ends else None
        grey = set(kinds.values()) <= {*GREY} or role != "pair" and not deep and all(
            (photo == photo[:1]).all() for photo in map(read_image, some))
        for key in self.keys_of(role):
            self.understood[key] = {"grey": grey, "span": span}

    def keys_of(self, role: str) -> list[str]:
        """What files of a role become in an item."""
        if role == "pair" and not self.only:
            return ["input", "image"]
        return ["input" if (self.only or role) == self.direction[0] else "image"]

    def understand_labels(self, palettes: dict[bytes, Path]) -> None:
        """Classes by what label maps hold, unless told; one colour for each palette index."""
        paths, faults = [files["label"] for files in self.files], []
        contents = [content_of(path)[1] for path in spread(paths, self.SAMPLE)]
        self.found = decide_classes(self.layout.classes, contents)
        if not self.classes and not self.found:     # counting asks more: a class may be rare
            contents = [content_of(path)[1] for path in tqdm(
                spread(paths, 10 * self.SAMPLE), "classes", disable=None, delay=2)]
            self.classes = count_classes(contents)
        self.classes = self.classes or self.found
        table, colours = class_table(self.classes), dict(self.understood.get("colours", ()))
        self.pixels_of = np.zeros(table.channels, np.int64)
        for content in contents:
            with collected(faults):
                self.pixels_of += content.count(table)
            if content.kind == "P" and not table.colours:
                colours = dict(zip(content.values.tolist(), content.colours.tolist())) | colours
        refuse_all(faults)
        n = len(table.names)
        if self.data:
            self.require_one(range(n), "known")
        if np.flatnonzero(self.pixels_of).tolist() == [0, n] and n > 1:
            notice("only class 0 and unknown in the label maps; divide masks of 0 and 255 by 255")
        for stored, path in palettes.items():
            palette = (np.reshape([*stored], (-1, 3)) @ CODE).tolist()
            if any(palette[i] != colour for i, colour in colours.items() if i < len(palette)):
                raise UserError(f"{path}: an index of its palette has another colour, so another "
                                "class, than in other files; save class ids as 8-bit grey PNG")
        self.understood["colours"] = list(map(list, colours.items()))

    @property
    def reads(self) -> set[Path]:
        """Folders of data, also of those that were trained on, and files that are read alone."""
        alone = [] if self.data else [path for files in self.files if isinstance(files, dict)
                                      for path in files.values()]
        return {path.resolve() for path in alone} | reads_of(self.understood)

    def require_scored(self) -> "Dataset":
        """Itself, if a class that counts occurs in its label maps: a score of none is no number."""
        if self.data and "label" in self.roles:
            self.require_one(self.table.scored or range(len(self.table.names)), "scored")
        return self

    def require_one(self, ids: Sequence[int], what: str) -> None:
        """One of these is in a label map; if not in the sample, then all are read."""
        table = class_table(self.classes)
        if not self.pixels_of[list(ids)].any() and not any(
                np.isin(read_label(files["label"], table), ids).any() for files in self.files):
            raise UserError(f"--data {self.data}: no class that is {what} occurs in its "
                            f"{self.split} label maps, read as --classes {self.classes}"
                            + f" (unknown: id {table.unknown})" * (table.unknown is not None))

    # What it gives.

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> list[int]:
        """How many examples, and a checksum of names and files' sizes: has the data set changed?"""
        sizes = [str(path.stat().st_size) for files in self.files if self.data
                 for path in files.values()]
        text = "\n".join([*self.names, *sizes]).encode("utf-8", "surrogateescape")
        return [len(self), zlib.crc32(text)]

    def require(self, role: str | None, cure: str = "") -> "Dataset":
        """Itself, where it has files of this kind ("image" may be B, and both halves of a pair)."""
        kinds = {"A": {"A", "pair"}, "image": {"image", "B", "pair"}}.get(role, {role, None})
        if role and not kinds & self.roles:
            layout = next(one for one in (self.layout, *LAYOUTS[1:]) if kinds & one.roles.keys())
            places = ", ".join(layout.roles.values()).replace("{}", getattr(layout, self.split)[0])
            raise UserError(f"--data {self.data}: {role} files are needed, its {self.split} split "
                            f"has only {', '.join(sorted(self.roles))}; "
                            + (cure or f"lay them out as {places}"))
        return self

    def find_example(self, name: str) -> dict[str, Tensor | str]:
        """The example of this name; without a name the first."""
        if name and name not in self.names:
            raise UserError(f"--item {name}: not there; there are {', '.join(self.names[:5])}, ...")
        return self[self.names.index(name) if name else 0]

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor | str]:
        """Example i, augmented as in self.epoch; or (epoch, i), which needs no other state."""
        epoch, i = index if isinstance(index, tuple) else (self.epoch, index)
        item, values = self.read(i), {}
        for key in item.keys() - {"name"}:
            value = item[key][None] if key in IDS else item[key]
            if self.size:                        # exact: at pixel centres, as in the photos
                value = v2.functional.resize(
                    value, self.load_size, v2.InterpolationMode.NEAREST_EXACT if key in IDS
                    else v2.InterpolationMode.BICUBIC, antialias=True)
            values[key] = tv_tensors.Mask(value) if key in IDS else tv_tensors.Image(value)
        # The joint transform draws from torch's generator; seed it for this item, then put it back.
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(hash((self.seed, epoch, i)) % 2 ** 63)
        values = self.transform(values)
        torch.set_rng_state(state)
        return {"name": item["name"]} | {
            key: value[0].long() if key in IDS else value.float() / 127.5 - 1
            for key, value in values.items()}

    def read(self, i: int) -> dict[str, Tensor | str]:
        """Item i as stored: uint8 photos, int64 ids, no augmentation."""
        item = {}
        if self.layout.name == "streets":
            drawn = drawn_street(self.files[i], self.load_size or (256, 512))
            return {"name": self.names[i]} | {
                role: drawn[role].long() if role in IDS else drawn[role].clone()
                for role in self.layout.roles}
        for role, path in self.files[i].items():
            if role == "label":
                item[role] = read_label(path, self.table)
            elif role == "instance":
                item[role] = read_instance(path)
            else:
                keys = self.keys_of(role)
                photo = read_image(path, **self.understood[keys[0]])
                halves = photo.chunk(2, 2) if role == "pair" else (photo, photo)
                for key in keys:                 # AtoB: the left one is the input
                    item[key] = halves[(key == "image") == (self.direction == "AtoB")]
        if len({part.shape[-2:] for part in item.values()}) > 1:
            raise UserError(f"{path}: of another size than when the run began")
        return {"name": self.names[i]} | item


@functools.lru_cache(1000)
def drawn_street(index: int, size: tuple[int, int]) -> dict[str, Tensor]:
    """A street as an item, drawn once at the size needed, and kept small."""
    drawn = street(0, index, size)
    return {"label": torch.from_numpy(drawn["label"].astype(np.uint8)),
            "instance": torch.from_numpy(drawn["instance"].astype(np.int32)),
            "image": torch.from_numpy(drawn["image"]).permute(2, 0, 1)}


def reads_of(understood: dict) -> set[Path]:
    """The folders of data of a set as `understood`."""
    return {Path(path).resolve() for path in understood.get("folders", ())}


def spread(paths: list[Path], n: int) -> list[Path]:
    """n of them, from the first to the last."""
    return [paths[i * len(paths) // n] for i in range(n)] if len(paths) > n else paths


@contextlib.contextmanager
def collected(faults: list[UserError]) -> Iterator[None]:
    """What is wrong with one of many files ends nothing yet: the others are looked at, too."""
    try:
        yield
    except UserError as error:
        faults.append(error)


def refuse_all(faults: list[UserError]) -> None:
    """The first of them ends the program; the others are said before, so that all can be mended."""
    for fault in faults[1:20]:
        notice(str(fault))
    if faults:
        raise UserError(f"{faults[0]}" + f" (one of {len(faults)} bad files)" * (len(faults) > 1))


def decide_classes(suggested: str, contents: list[MapContent]) -> str:
    """The row of TABLES that label maps fit by what they hold; "" if there is none.

    A layout suggests a row, and names of files may; but a set of one's own lies in the same
    folders. What decides are colours, if all are in a row's palette, or else ids: nine of ten files
    have no others, and they are not simply 0, 1, 2, ... up to less than all.
    """
    names = [content.path.stem for content in contents]
    cityscapes = all("_gtFine_label" in name for name in names)
    if cityscapes or all(re.fullmatch(r"\d{12}", name) for name in names):
        suggested = "cityscapes" if cityscapes else suggested or "coco_stuff"
    if all(content.colours is not None for content in contents):
        seen = set(np.concatenate([content.colours for content in contents]).tolist())
        for name, table in TABLES.items():
            if table.colours and seen <= {*(table.palette @ CODE).tolist()} and (
                    name == suggested or len(seen - {0}) > 2):
                return name
    if not suggested:
        return ""
    table, strange = TABLES[suggested], []
    n, pixels_of = len(table.names), np.zeros(table.channels)
    for content in contents:
        with collected(strange):
            pixels_of += content.count(table)
    ids = np.flatnonzero(pixels_of[:n])
    if cityscapes and len(ids) and ids[-1] < 19:     # no vegetation, sky or car in any of them
        return "cityscapes_train"
    if not len(ids) or 10 * len(strange) > len(contents) or np.ptp(ids) + 1 == len(ids) < n:
        return ""
    # Names of folders are weak evidence: as many ids as real files have, and as high; of streets,
    # some street.
    enough = len(ids) >= min(n / 2, 4 + 2 * len(contents)) and ids[-1] >= n // 3
    if suggested == "cityscapes":
        enough = cityscapes or 4 * pixels_of[[7, 11, 21, 23]].sum() > pixels_of.sum()
    return suggested if enough else ""


def count_classes(contents: list[MapContent]) -> str:
    """Where nothing says it: one more than the highest id, if the ids can be meant as classes."""
    path, pixels_of = contents[0].path, np.zeros(65536)
    for content in contents:
        if content.kind == "RGB":
            raise UserError(f"{content.path}: a colour label map, in the palette of no known data "
                            "set; save class ids as 8-bit grey PNG")
        pixels_of[content.values] += content.counts
    ids = np.flatnonzero(pixels_of)
    if len(ids) == 2 and ids[0] == 0 and ids[1] in (255, 65535):
        raise UserError(f"{path}: 0 and {ids[1]} only: a mask; divide it by {ids[1]}")
    ids = ids[ids < 65535]
    if len(ids) and ids[-1] == 255:             # unknown, in files of 8 bit
        ids = ids[:-1]
    n = int(max(ids, default=0)) + 1
    soft = n > 100 and 2 * (pixels_of[0] + pixels_of[255]) > pixels_of.sum()       # a soft mask
    if n > 10 and 2 * len(ids) < n or soft:
        raise UserError(f"{path}: {len(ids)} of the ids 0..{n - 1} occur, hardly ids of classes: "
                        f"renumber them from 0 (a mask: 0 and 1), or say --classes {n}")
    return str(n)


def ignore_signals(worker: int) -> None:
    """For a data process: Ctrl-C and a closed terminal reach every process, but when to stop is for
    the training one to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):               # unknown to Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


@functools.cache
def choose_threads() -> None:
    """As many threads as cores are idle, by the load of the last minute, at least one.

    An operation in several threads ends with its last one; where each waits for a core in turn, all
    wait most of the time. OMP_NUM_THREADS, if set, decides instead.
    """
    cores = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "getloadavg"):
        return
    threads = max(1, cores - round(os.getloadavg()[0]))
    torch.set_num_threads(threads)
    if threads < cores:
        notice(f"this machine is busy: {threads} thread(s) instead of {cores}; "
               f"OMP_NUM_THREADS={cores} before the command takes all")


class Loader:
    """Which image comes when. Iterating goes through what is left of the present epoch:

        while not loader.over:
            for batch in loader: ...

    Order, crops and noise depend on seed, epoch and step alone, and state_dict() is the place in
    the data: a loader that takes it up yields what the first one would have yielded. Under torchrun
    each process reads its share, and all end at the same step.

    Images are read ahead, in processes that live as long as the loader: where Python starts each
    from nothing, that takes seconds, too long for every epoch.

    Args:
        examples: a dataset whose index may be (epoch, i), since each process has a copy of it.
        batch_size: examples per batch and process.
        workers: processes; 0 reads when asked; None is 4 where a GPU is to be fed from files,
            being too fast for one process that also trains.
        device: where the batches go.
        epochs, steps: epochs, and updates after which all is over; 0 leaves it to the epochs.
        per_epoch: updates of an epoch; 0: as many as the examples give.
    """

    def __init__(self, examples: torch.utils.data.Dataset, batch_size: int, workers: int | None,
                 device: torch.device, seed: int = 0, epochs: int = 1, steps: int = 0,
                 per_epoch: int = 0):
        self.examples, self.device, self.seed = examples, device, seed
        self.fingerprint = examples.fingerprint()
        self.rank, self.world = rank_and_world()
        if device.type == "cpu":
            choose_threads()
        self.per_step = batch_size * self.world
        self.per_epoch = per_epoch or len(examples) // self.per_step
        if not self.per_epoch:
            raise UserError(f"--batch-size {batch_size}: a step needs {self.per_step} images, "
                            f"training has {len(examples)}")
        self.total = min(steps or math.inf, epochs * self.per_epoch)
        self.step = self.epoch = self.seen = 0  # updates; epochs; images of this epoch
        self.over, self.indices = False, []
        self.begun, self.counted, self.waited = time.perf_counter(), 0, 0.0
        cuda = device.type == "cuda"
        workers = (4 if cuda and examples.data else 0) if workers is None else workers
        self.batches = torch.utils.data.DataLoader(
            examples, batch_size, sampler=self.indices, num_workers=workers, pin_memory=cuda,
            drop_last=True, persistent_workers=workers > 0, worker_init_fn=ignore_signals)

    def order(self) -> list:
        """What all processes train on in this epoch: every example once, in random order, but for a
        last batch that would not be full."""
        chance = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.examples), generator=chance).tolist()
        return order[:self.per_epoch * self.per_step]

    def __iter__(self) -> Iterator[dict]:
        mine = self.order()[self.seen + self.rank::self.world]
        self.indices[:] = [(self.epoch, i) for i in mine]
        batches, clock = self.read(), time.perf_counter()
        while not self.over and (batch := next(batches, None)) is not None:
            self.waited += time.perf_counter() - clock
            noise = (self.seed * 10 ** 9 + self.step) * self.world + self.rank
            torch.manual_seed(noise % 2 ** 63)
            self.step, self.seen = self.step + 1, self.seen + self.per_step
            self.over = self.step >= self.total
            yield to_device(batch, self.device)
            clock = time.perf_counter()
        if not self.over:
            self.epoch, self.seen = self.epoch + 1, 0

    def read(self) -> Iterator[dict]:
        """Batches of self.indices; what went wrong in a data process, as the one line it was."""
        try:
            yield from self.batches
        except UserError as error:              # a data process wraps it in its own traceback
            raise UserError(str(error).rpartition("common.UserError: ")[2].strip())

    def speed(self) -> dict[str, str]:
        """Images per second, and the share of time spent waiting for them, since the last call."""
        span = max(time.perf_counter() - self.begun, 1e-9)       # some clocks stand still
        images = (self.step - self.counted) * self.per_step
        shown = {"images/s": f"{images / span:.3g}", "wait": f"{self.waited / span:.2f}"}
        self.begun, self.counted, self.waited = time.perf_counter(), self.step, 0.0
        return shown

    def state_dict(self) -> dict:
        return {"step": self.step, "epoch": self.epoch, "seen": self.seen,
                "threads": torch.get_num_threads(), "examples": self.fingerprint}

    def load_state_dict(self, stored: dict) -> None:
        self.step, self.epoch, self.seen = stored["step"], stored["epoch"], stored["seen"]
        self.counted = self.step
        if "OMP_NUM_THREADS" not in os.environ:  # with other threads, sums round differently
            torch.set_num_threads(max(1, min(stored["threads"], os.cpu_count())))
        if stored["examples"] != self.fingerprint:
            notice("the data set is not the one that this run began with: what follows differs "
                   "from what an uninterrupted run would have given")


def same_classes(dataset: Dataset, trained: str) -> None:
    """Refuses data whose contents are other classes than the checkpoint's: an id means another."""
    if dataset.found not in ("", trained):
        raise UserError(f"--data {dataset.data}: labels of {dataset.found}, the checkpoint's of "
                        f"{trained or 'none'}; if ids mean the same, say --classes {trained}")


def notice_scale(items: Dataset, trained: dict, size: tuple[int, int]) -> None:
    """Says so where --input shows things larger or smaller than the training's items did.

    trained: `understood` of the training set.    size: that to which its files were resized.
    """
    ((h, w), _), *_ = items.sizes.most_common()
    scale = math.sqrt(h * w / math.prod(size))
    if items.size is None and not 0.9 < scale < 1.1:
        unit = math.gcd(*size) & -math.gcd(*size)            # a power of two that G surely takes
        near = [max(unit, round(side / scale / unit) * unit) for side in (h, w)]
        notice("the input is {} x {}; training saw files of {} x {} at {} x {}, so things look "
               "{:.2g} times as large here; --size {} {} makes them alike".format(
                   h, w, *trained.get("file_size", size), *size, scale, *near))


def as_trained(images: Tensor, understood: dict) -> Tensor:
    """Outputs (B, C, H, W), which must be numbers; grey if training's photos were grey: then only
    that can be right."""
    if not images.isfinite().all():
        raise UserError("the network's output is nan or infinite, so that no picture and no score "
                        "of it means anything; another --checkpoint may be sound")
    if understood.get("image", {}).get("grey"):
        return images.mean(1, keepdim=True).expand_as(images)
    return images


def to_device(batch: dict, device: torch.device) -> dict:
    """A batch with its tensors on the device; names stay as they are."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v
            for k, v in batch.items()}


def batch_of_one(item: dict, device: torch.device) -> dict:
    """One item of a dataset as a batch on the device."""
    return {k: v[None].to(device) if torch.is_tensor(v) else v for k, v in item.items()}


def mirror_pad(x: Tensor, multiple: int, least: int = 0) -> Tensor:
    """(..., H, W) mirrored back and forth up to multiples, and to `least`; F.pad reflects by n - 1
    at most."""
    for dim in (-2, -1):
        n = x.shape[dim]
        i = torch.arange(n + max(-n % multiple, least - n), device=x.device) % max(2 * n - 2, 1)
        x = x.index_select(dim, torch.minimum(i, (2 * n - 2 - i).abs()))
    return x


# ------------------------------------------------------------------ 5 Data doctor and trace

def save_images(images: Tensor, path: Path, nrow: int = 1) -> None:
    """(B, 3, H, W) in [-1, 1] to a file; several as a grid."""
    grid = torchvision.utils.make_grid(images, nrow, pad_value=1, normalize=True,
                                       value_range=(-1, 1))
    grid = grid.mul(255).add(0.5).clamp(0, 255).permute(1, 2, 0)
    save_picture(grid.to("cpu", torch.uint8).numpy(), path)


def save_picture(array: np.ndarray, path: Path) -> None:
    """(H, W, 3), or grey (H, W), uint8, to a file that says that it is ours: see `writable`."""
    about = PngInfo()
    about.add_text("Software", OURS)
    writable("picture", path, set())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path, pnginfo=about, comment=OURS)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "pictures end in .png or .jpg"
        raise UserError(f"{path}: cannot be written ({why})")


def colour_label(label: Tensor, table: ClassTable) -> Tensor:
    """Ids (..., H, W) -> colours (..., 3, H, W) float32 in [-1, 1] by the table's palette."""
    palette = torch.from_numpy(table.palette).to(label.device).float() / 127.5 - 1
    return palette[label].movedim(-1, -3).contiguous()


def describe(*datasets: Dataset) -> None:
    """The first lines that a run prints of each split: layout, sizes, and what it was taken for."""
    for items in datasets:
        way = "" if items.roles & {"label", "image"} else f" ({items.direction})"
        used = "{}x{}".format(*items.size) if items.size else "their own size"
        print(f"{items.split}: layout {items.layout.name}, {len(items)} examples with "
              f"{', '.join(sorted(items.roles))}{way}, used at {used}")
        if not items.data:
            continue
        sizes = items.sizes.most_common(6)
        lines = ["height x width " + ", ".join(f"{h}x{w} ({n})" for (h, w), n in sizes)]
        if items.size and math.prod(items.size) > 2 * math.prod(sizes[0][0]):
            lines += ["enlarged to --size: what the files do not show cannot be learned"]
        for key in [key for key in ("input", "image") if key in items.understood]:
            grey, span = items.understood[key]["grey"], items.understood[key]["span"]
            lines += [f"{key}: {'grey' if grey else 'colour'}, " + (
                "{:g}..{:g} scaled to 0..255".format(*span) if span else "8 bit")]
        if "label" in items.roles:
            names = items.table.names
            known = [name for name, n in zip(names, items.pixels_of) if n]
            lines += [f"taken as {items.classes}: {len(names)} classes; --classes says otherwise",
                      f"{len(known)} of them in a sample: " + ", ".join(known[:12])]
        print("\n".join(f"       {line}" for line in lines))


def thumbnails(item: dict, table: ClassTable | None) -> list[Tensor]:
    """What an item is made from and its photo, (3, 128, 256) in [-1, 1], for the contact sheet."""
    parts = [item[key] / 127.5 - 1 for key in ("input", "image") if key in item]
    if "label" in item:
        parts.insert(0, colour_label(item["label"], table))
    return [F.interpolate(t[None], (128, 128 * t.shape[-1] // t.shape[-2] or 1))[0]
            for t in (parts * 2)[:2]]            # a photo alone stands there twice


def check_data(datasets: list[Dataset], out: Path) -> None:
    """The `check` mode: reads every example as stored; a report per split and a contact sheet."""
    bad = []
    for dataset in datasets:
        describe(dataset)
        table, tiles, colours = dataset.table, [], []
        pixels_of, images_with = np.zeros((2, table.channels if table else 1), np.int64)
        for i in tqdm(range(len(dataset)), dataset.split, unit="example", disable=None):
            with collected(bad):
                item = dataset.read(i)
                if "label" in item:
                    count = np.bincount(item["label"].flatten(), minlength=len(pixels_of))
                    pixels_of, images_with = pixels_of + count, images_with + (count > 0)
                if "image" in item:
                    colours.append(item["image"].float().mean((1, 2)))
                if len(tiles) < 16:
                    tiles += thumbnails(item, table)
        if colours:
            mean = torch.stack(colours).mean(0).tolist()
            print("    average colour of the photos " + " ".join(f"{v:.0f}" for v in mean))
        for k in np.flatnonzero(pixels_of):
            print(f"    {k:4} {[*table.names, 'unknown'][k][:22]:22} in {images_with[k]} images, "
                  f"{100 * pixels_of[k] / pixels_of.sum():.2f}% of all pixels")
        if pixels_of.any():
            n = len(table.names)                 # unknown is none of them
            print(f"    classes never seen: {np.sum(pixels_of[:n] == 0)} of {n}")
        if tiles:
            width = max(t.shape[-1] for t in tiles)
            tiles = [F.pad(t, (0, width - t.shape[-1]), value=1) for t in tiles]
            path = writable("--out", out / f"contact_{dataset.split}.png", dataset.reads)
            save_images(torch.stack(tiles), path, nrow=4)
            print(f"    contact sheet: {path}")
    refuse_all(bad)


def trace_step(nets: dict[str, nn.Module | None], step: Callable[[], dict]) -> None:
    """The architecture figure as text: one training step's layers with parameters, the shape of
    what they last gave, FLOPs, time, memory and losses."""
    shapes, sizes = {}, {}
    for part, net in nets.items():
        for name, module in net.named_modules(prefix=part) if net is not None else ():
            if net is module or [*module.parameters(recurse=False)]:
                sizes[name] = sum(p.numel() for p in module.parameters())
                module.register_forward_hook(lambda module, x, y, name=name: shapes.update(
                    {name: tuple(y.shape) if torch.is_tensor(y) else f"{len(y)} outputs"}))
    with FlopCounterMode(display=False) as flops:
        step()
    for name, shape in shapes.items():
        print(f"{name:44}{str(shape):>22}{sizes[name]:14,}")
    begun = time.perf_counter()
    losses = "".join(f", {name} {value.item():.4f}" for name, value in step().items())
    print(f"a step: {flops.get_total_flops() / 1e9:.1f} GFLOP, {time.perf_counter() - begun:.3f} s")
    if torch.cuda.is_available():
        print(f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB of GPU memory")
    print(f"losses{losses}".replace(",", ":", 1))


# --------------------------------------------------------------------------------- 6 Streets
#
# A street is drawn in four steps, of which the first and the third draw random numbers:
#
#   street_scene(seed, index)   where everything stands, in metres          random
#   paint(scene, size)          label map, instance map, hidden detail      deterministic
#   draw_style(layout, rng)     time of day, weather, palette, car colours  p(style | layout), known
#   render(layout, style)       the photo under this style, without grain   deterministic
#
# So p(photo | layout) = sum over styles of p(style | layout) N(render(layout, style), GRAIN^2).
# World coordinates are metres: x to the right of the road's centre line, y up, z ahead of the lens.
# A point is seen at u = u0 + (x - x_cam) / z and v = v0 + (y_cam - y) / z, in units of the image
# height, (u0, v0) the vanishing point: a wider image shows more of the same street.

CLASS_ID = {name: k for k, name in enumerate(STREETS)}

STREET_GRAIN = 0.02  # sigma of the sensor noise, on [0, 1]
TIMES = {"day": 0.55, "dusk": 0.25, "night": 0.20}
WEATHERS = {"clear": 0.62, "overcast": 0.35, "snow": 0.03}  # snow is the rare mode
PALETTES = {"brick": 0.5, "cream": 0.3, "slate": 0.2}
CAR_COLORS = {"white": 0.4, "graphite": 0.3, "blue": 0.2, "red": 0.1}
TRUCK_COLORS = {"white": 0.5, "yellow": 0.3, "blue": 0.2}   # a truck is never red
COLOR_LAW = {"car": CAR_COLORS, "truck": TRUCK_COLORS}

PAINT_RGB = {"white": (.90, .90, .88), "graphite": (.15, .15, .16), "blue": (.08, .30, .84),
             "red": (.82, .08, .07), "yellow": (.95, .68, .06)}
PALETTE_RGB = {  # three shades of facade; roofs; awnings and doors
    "brick": [(.68, .24, .14), (.60, .21, .13), (.76, .32, .18), (.38, .25, .22), (.74, .20, .13)],
    "cream": [(.93, .81, .56), (.95, .88, .72), (.90, .74, .50), (.56, .33, .22), (.86, .62, .18)],
    "slate": [(.31, .46, .63), (.40, .54, .69), (.25, .41, .60), (.19, .25, .34), (.10, .40, .58)]}

# Classes and their materials: albedo, share covered when it snows, light from the sky and the sun.
MATERIALS = """
    sky           sky 0 0 0 0 0 0, star 0 0 0 0 0 0
    road          asphalt .36 .36 .38 .55 1 1, mark .90 .89 .84 .2 1 1
    sidewalk      kerb .74 .73 .70 .6 1 1, slab .66 .61 .55 .85 1 1
    terrain       grass .36 .50 .17 .9 1 1
    building      facade .6 .6 .6 .06 1 1, trim .86 .84 .79 .4 1 1, pane .20 .25 .31 0 1 .5
    building      lit .22 .26 .31 0 1 .5, shop .26 .29 .32 0 1 .5, door .26 .17 .12 0 1 1
    building      awning .72 .30 .22 .7 1 1, gable .6 .6 .6 .06 .8 .45, roof .33 .29 .31 .92 1.15 1
    building      far .6 .6 .6 .1 1 .6
    vegetation    leaf .27 .43 .13 .62 1 1, trunk .30 .22 .16 .15 .8 .6
    wall          masonry .62 .56 .50 .35 .95 1
    pole          steel .30 .32 .33 .1 1 .7, bulb .85 .84 .80 .3 1 .7
    traffic_sign  white .93 .93 .93 .1 1 .8, red .80 .08 .09 .1 1 .8, signal .08 .26 .70 .1 1 .8
    person        skin .78 .56 .43 0 1 .7, hair .22 .15 .11 .3 1 .7, coat .50 .27 .30 .1 1 .7
    person        coat2 .27 .36 .47 .1 1 .7, jeans .17 .20 .30 0 .9 .6
    car           body 1 1 1 .05 1 .6, side .85 .85 .85 .05 .9 .5, top 1.08 1.08 1.08 .30 1.15 1
    car           glass .10 .13 .16 .1 1.1 .6, tyre .07 .07 .08 0 .8 .4, rim .55 .56 .58 0 .9 .6
    car           bumper .20 .20 .21 .1 .9 .6, plate .92 .92 .86 0 1 .7
    car           head .88 .90 .90 0 1 .8, tail .70 .06 .05 0 1 .8"""
M, m_class, m_light = {}, [], []          # numbers of materials; then columns, a row per material
for line in MATERIALS.strip().splitlines():
    of, materials = line.split(maxsplit=1)
    for name, *light in map(str.split, materials.split(",")):
        M[name] = len(M)
        m_class.append(CLASS_ID[of.replace("_", " ")])
        m_light.append(light)
M_CLASS = np.array(m_class)
M_RGB, M_SNOW, M_SKY, M_SUN = np.split(np.array(m_light, np.float32), (3, 4, 5), 1)
GLOW = {"lit": (.95, .66, .30), "shop": (.80, .66, .42), "bulb": (1, .86, .55),
        "head": (1, .97, .85), "tail": (.85, .05, .04)}  # what shines by itself after sunset
M_GLOW = np.array([GLOW.get(name, (0, 0, 0)) for name in M], np.float32)

# Rows of each table: light of the sky, of the sun, of the street lamps; sky at the zenith, sky at
# the horizon, clouds.
AIR = {tuple(row.split()[:2]): np.array(row.split()[2:], np.float32).reshape(6, 3) for row in """
    day clear       .52 .57 .68  .72 .62 .44    0   0   0   .17 .40 .78  .70 .84 .95  .97 .97 .98
    day overcast    .68 .71 .75  .04 .04 .04    0   0   0   .60 .64 .69  .80 .82 .84  .47 .52 .58
    day snow        .80 .83 .88  .06 .06 .06    0   0   0   .78 .80 .83  .92 .93 .94  .70 .72 .76
    dusk clear      .40 .35 .50  .72 .38 .15  .34 .22 .08   .19 .20 .46  .98 .62 .30  .93 .45 .40
    dusk overcast   .40 .37 .43  .03 .02 .02  .46 .35 .22   .33 .31 .40  .64 .52 .50  .24 .23 .31
    dusk snow       .53 .50 .60  .03 .02 .02  .36 .26 .14   .52 .49 .58  .76 .68 .68  .44 .42 .51
    night clear     .15 .19 .33  .02 .03 .06  .84 .68 .46  .035 .06 .17  .13 .20 .38  .10 .14 .26
    night overcast  .21 .18 .17    0   0   0  .90 .75 .56   .20 .16 .16  .46 .34 .25  .31 .24 .20
    night snow      .28 .29 .37    0   0   0  .80 .68 .55   .32 .31 .37  .54 .48 .48  .42 .39 .43
    """.strip().splitlines()}
LAMPS_ON = {"day": 0.0, "dusk": 0.55, "night": 1.0}
HAZE = {"clear": 0.36, "overcast": 0.36, "snow": 0.34}

ROW = 64                          # a power of two; code of a sample = object * ROW + material
ROAD, KERB, WALL = 4.6, 4.8, 8.0  # metres from the centre line: asphalt, kerb, facades
END = 60.0                        # metres to the skyline that closes the street
LAMP_GAP = 13.0                   # metres between lamp posts
SIZES = {"car": (0.9, 1.45, 4.2), "truck": (1.15, 3.1, 6.5)}  # half width, height, length in metres


@dataclass(frozen=True)
class Style:
    """Everything that the layout leaves open; `colors` follows layout.vehicles."""
    time: str
    weather: str
    palette: str
    colors: tuple[str, ...]


@dataclass
class Thing:
    """An upright object whose near side stands on the ground at (x, z) metres.

    `detail` seeds what no label shows (leaves, clothes), so that it moves with the object.
    """
    kind: str             # car, truck, person, tree, lamp or sign
    x: float
    z: float
    height: float = 1.5   # metres; ignored for vehicles, see SIZES
    detail: int = 0
    away: bool = True     # vehicles: seen from behind


@dataclass
class Building:
    """A facade along the street (side -1 left, +1 right) from z = near to far; side 0: skyline,
    across the street from x = near to far. A garden wall where height < 2."""
    side: int
    near: float
    far: float
    height: float         # metres up to the eaves
    bay: float = 2.4      # metres between windows
    shade: int = 0        # which of the palette's three shades


@dataclass
class Scene:
    """A street in metres, at no particular resolution: move a vehicle by changing its z."""
    vanishing: tuple[float, float]  # u, v in image heights from the middle of the top edge
    camera: tuple[float, float]     # x, y in metres
    sun: int                        # shines from the right (+1) or from the left (-1)
    sky: float                      # shifts the clouds
    zebra: float                    # z of a zebra crossing, 0 for none
    verge: bool                     # grass between kerb and footpath
    lamps: float                    # z of the first lamp post
    buildings: list[Building] = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)
    vehicles: list[Thing] = field(default_factory=list)


# Streets: the scene

def street_scene(seed: int, index: int) -> Scene:
    """Street number `index` of the endless data set `seed`."""
    rng = np.random.default_rng([seed, index])
    draw = lambda low, high: low + (high - low) * rng.random()
    any_look = lambda: int(rng.integers(1 << 30))
    scene = Scene((draw(-.09, .09), draw(.42, .49)), (draw(.1, 1.1), draw(2.1, 2.5)),
                  int(rng.choice([-1, 1])), draw(0, 100), draw(11, 15) if rng.random() < .45 else 0,
                  bool(rng.random() < .45), draw(6, 11))
    add = lambda *thing: scene.things.append(Thing(*thing))
    for side in (-1, 1):
        z = 1.5
        while z < END:
            garden = z > 8 and rng.random() < .16
            far = min(z + (draw(5, 9) if garden else draw(7, 13)), END)
            height = draw(1.0, 1.4) if garden else draw(6.2, 12.0)
            scene.buildings.append(Building(side, z, far, height, draw(2.1, 2.9),
                                            int(rng.integers(3))))
            if garden:
                add("tree", side * draw(9.6, 10.5), (z + far) / 2, draw(5, 7), any_look())
            z = far
        for z in np.arange(scene.lamps, 48, LAMP_GAP):
            add("lamp", side * 5.05, float(z), 6.0)
            if rng.random() < .52:
                add("tree", side * 5.3, float(z) + draw(4, 9), draw(5, 7.5), any_look())
        if rng.random() < .6:
            add("sign", side * 4.95, draw(8, 13), 2.9, int(rng.integers(3)))
        for _ in range(rng.integers(0, 4)):
            add("person", side * draw(5.9, 7.4), draw(9, 22), draw(1.6, 1.85), any_look())
    if scene.zebra and rng.random() < .6:
        add("person", draw(-4, 4), scene.zebra + 1.2, draw(1.6, 1.85), any_look())
    x = -16.0
    while x < 16:
        width = draw(4, 8)
        scene.buildings.append(Building(0, x, x + width, draw(6, 17), 2.6, int(rng.integers(3))))
        x += width
    wanted = rng.choice([1, 2, 3], p=[.2, .45, .35])
    for _ in range(60):  # most places are taken, hidden or too far to the side
        if len(scene.vehicles) == wanted:
            break
        kind = "truck" if rng.random() < .25 else "car"
        lane = float(rng.choice([1.5, -1.5] if kind == "truck" else [1.5, -1.5, 3.65, -3.65]))
        thing = Thing(kind, lane, draw(5.4, 11.5) + 3 * (kind == "truck"), away=lane > 0)
        if vehicles_visible(scene, scene.vehicles + [thing]):
            scene.vehicles.append(thing)
    return scene


def vehicles_visible(scene: Scene, vehicles: list[Thing]) -> bool:
    """Whether each covers 80 of 64 x 64 pixels of the square view, and no two stand in one place.

    Boxes are painted far to near on a small grid: the answer does not depend on the image's size.
    """
    (u0, v0), (x_cam, y_cam) = scene.vanishing, scene.camera
    grid = np.zeros((64, 64), int)
    occluders = [t for t in scene.things if t.kind in ("person", "tree") and t.z < 15]
    for t in sorted(vehicles + occluders, key=lambda t: -t.z):
        half, height, _ = SIZES.get(t.kind, (.25, 2.0, 0))
        left, right = (int(64 * (.5 + u0 + (t.x - x_cam + d) / t.z)) for d in (-half, half))
        top, foot = (int(64 * (v0 + (y_cam - y) / t.z)) for y in (height, 0))
        number = 1 + vehicles.index(t) if t in vehicles else 0
        grid[max(top, 0):max(foot, 0), max(left, 0):max(right, 0)] = number
    apart = all(abs(a.x - b.x) > 1.9 or abs(a.z - b.z) > 7 for a, b in
                itertools.combinations(vehicles, 2))
    return apart and min(np.bincount(grid.ravel(), minlength=len(vehicles) + 1)[1:]) >= 80


# Streets: shapes, as (material, corners), to be painted in this order. Corners are p, y, z: metres
# to the side, up and ahead; of a vehicle p is in half widths, and 1 on the side that is seen.

def box(p0: float, p1: float, y0: float, y1: float, z: float = 0) -> list:
    """A rectangle that faces the camera."""
    return [(p0, y0, z), (p1, y0, z), (p1, y1, z), (p0, y1, z)]


def wall(z0: float, z1: float, y0: float, y1: float, p: float = 1) -> list:
    """A rectangle along the street."""
    return [(p, y0, z0), (p, y0, z1), (p, y1, z1), (p, y1, z0)]


def wide(p: float, y: float, z: float, p1: float, y1: float, z1: float) -> list:
    """A slope: as wide as -p..p at (y, z), and as -p1..p1 at (y1, z1)."""
    return [(-p, y, z), (p, y, z), (p1, y1, z1), (-p1, y1, z1)]


def disc(p: float, y: float, z: float, r: float, n: int = 14) -> list:
    """A circle that faces the camera."""
    return [(p + r * math.sin(k * math.tau / n), y + r * math.cos(k * math.tau / n), z)
            for k in range(n)]


def wheels(y: float, ends: tuple, radii: tuple) -> list:
    """Two circles, tyre and rim, that face the street."""
    return [(name, [(1, q, z + p) for p, q, _ in disc(0, y, 0, r)])
            for z in ends for name, r in zip(("tyre", "rim"), radii)]


def building_shape(b: Building) -> list:
    """Facade, the gable towards us and a steep roof, of which the street sees a strip."""
    if b.side == 0:
        return [("far", box(b.near, b.far, 0, b.height, END))]
    x, h, out = b.side * WALL, b.height, b.side
    front = wall(b.near, b.far, 0, h, x)
    if h < 2:
        return [("masonry", front)]
    ridge, top = x + out * .9, h + 1.7
    return [("gable", [(x, 0, b.near), (x, h, b.near), (ridge, top, b.near),
                       (x + 8 * out, top, b.near), (x + 9 * out, h, b.near),
                       (x + 9 * out, 0, b.near)]),
            ("roof", [(x, h, b.near), (x, h, b.far), (ridge, top, b.far), (ridge, top, b.near)]),
            ("facade", front)]


@functools.cache
def car_shape(away: bool) -> list:
    """Body, cabin and wheels of a hatchback, from behind or from the front."""
    foot, roof, end, tail = (.15, .75, 2.7, 3.5) if away else (1.0, 1.75, 3.4, 4.05)
    return [
        ("tyre", wall(.1, 4.1, .05, .4, .97)), ("tyre", box(-.97, .97, 0, .4, .05)),
        ("bumper", box(-.66, .66, .12, .4, .02)),
        ("side", [(1, .22, 0), (1, .22, 4.2), (1, .7, 4.2), (1, .92, tail), (1, .92, foot),
                  (1, .80, 0)]),
        ("side", [(1, .90, foot), (.80, 1.42, roof), (.80, 1.42, end), (1, .90, tail)]),
        ("glass", [(.98, .95, foot + .35), (.83, 1.35, roof + .2), (.83, 1.35, end - .2),
                   (.98, .95, tail - .35)]),
        ("side", [(.99, .9, 2.0), (.83, 1.4, 2.0), (.83, 1.4, 2.12), (.99, .9, 2.12)]),
        *wheels(.32, (.8, 3.4), (.33, .19)), ("top", wide(.80, 1.42, roof, .80, 1.44, end)),
        ("body", wide(1, .90, foot, .80, 1.42, roof)),
        ("glass", wide(.88, .95, foot + .05, .75, 1.37, roof - .05)),
        ("top", wide(1, .78, 0, .97, .92, foot)),
        ("body", [(-.98, .24, 0), (.98, .24, 0), (1, .5, 0), (.97, .82, 0), (-.97, .82, 0),
                  (-1, .5, 0)]),
        ("bumper", wide(.97, .24, 0, .99, .36, 0)),
        *[("bumper", wide(.5, .47, 0, .55, .60, 0))] * (not away),
        ("plate", box(-.27, .27, .39, .5)),
        *[("tail" if away else "head", [(s * .58, .56, 0), (s * .97, .54, 0), (s * .95, .72, 0),
                                        (s * .66, .70, 0)]) for s in (-1, 1)]]


@functools.cache
def truck_shape(away: bool) -> list:
    """A box van: seen from behind two doors, from the front a cab below the box."""
    shape = [("tyre", box(-.96, .96, 0, .5, .1)), ("bumper", box(-.5, .5, .2, .5, .1)),
             ("bumper", wall(0, 6.5, .3, .62)), *wheels(.45, (1.2, 5.2), (.46, .24))]
    if away:
        shape += [("side", wall(0, 6.3, .6, 3.1)), ("body", box(-1, 1, .5, 3.1)),
                  ("side", box(-.02, .02, .6, 3.0)), ("bumper", box(-.94, -.9, .7, 2.9)),
                  ("bumper", box(.90, .94, .7, 2.9)), ("bumper", box(.1, .2, 1.3, 1.5)),
                  ("side", box(-1, 1, 2.98, 3.1))]
    else:
        shape += [("side", wall(1.8, 6.5, .6, 3.1)), ("body", box(-1, 1, .6, 3.1, 1.8)),
                  ("side", wall(0, 1.7, .5, 2.3)), ("glass", wall(.5, 1.3, 1.4, 2.15)),
                  ("top", wide(1, 2.3, .2, .95, 2.6, 1.8)), ("body", box(-1, 1, .45, 2.3)),
                  ("glass", box(-.88, .88, 1.35, 2.12)), ("bumper", box(-.6, .6, .8, 1.15))]
    return shape + [("bumper", box(-1, 1, .38, .58)), ("plate", box(-.22, .22, .42, .54)), *[
        ("tail" if away else "head", box(s * .70, s * .94, .66, .86)) for s in (-1, 1)]]


def person_shape(detail: int) -> list:
    """Walking, arms down; measures are shares of the body's height."""
    stride, flat = .03 + .05 * (detail % 7) / 6, lambda *points: [(p, q, 0) for p, q in points]
    return [("jeans", flat((-.075, .5), (.0, .5), (-stride, .0), (-stride - .06, 0))),
            ("jeans", flat((0, .5), (.075, .5), (stride + .06, 0), (stride, 0))),
            (("coat", "coat2")[detail % 2],
             flat((-.10, .80), (-.14, .74), (-.15, .46), (-.11, .45), (-.09, .60), (-.085, .44),
                  (.085, .44), (.09, .60), (.11, .45), (.15, .46), (.14, .74), (.10, .80),
                  (.03, .84), (-.03, .84))),
            ("hair", disc(0, .935, 0, .063)), ("skin", disc(0, .915, 0, .052))]


LAMP = [("steel", box(-.08, .08, 0, 1)), ("steel", box(-.05, .05, 1, 6)),       # leans to p > 0
        ("steel", [(0, 5.92, 0), (1.1, 6.1, 0), (1.1, 6.2, 0), (0, 6.06, 0)]),
        ("bulb", box(.75, 1.3, 6, 6.15))]
SIGNS = [[("steel", box(-.045, .045, 0, 2.5)), *plate] for plate in (
    [("red", disc(0, 2.5, 0, .42)), ("white", disc(0, 2.5, 0, .30))],
    [("white", box(-.38, .38, 2.1, 2.9)), ("signal", box(-.34, .34, 2.14, 2.86)),
     ("white", disc(0, 2.5, 0, .17, n=3))],
    [("red", [(-.48, 2.1, 0), (.48, 2.1, 0), (0, 2.92, 0)]),
     ("white", [(-.27, 2.22, 0), (.27, 2.22, 0), (0, 2.66, 0)])])]


@functools.cache
def tree_crown(kind: int) -> tuple[np.ndarray, np.ndarray]:
    """Lumps of leaves of a tree 1 m tall: outlines (9, 36, 2) and balls (9, 3) as x, y, radius."""
    rng, turn = np.random.default_rng(kind), np.linspace(0, 2 * np.pi, 36, endpoint=False)
    k = np.arange(9)  # from the sides and below to the top, which is nearest to the light
    angle, reach = 2.4 * k + rng.uniform(0, 1, 9), np.where(k < 8, .2, .03)
    balls = np.stack([reach * np.cos(angle), .70 + reach * (.75 * np.sin(angle) - .25 + .08 * k),
                      rng.uniform(.14, .19, 9)], 1)
    rough = rng.uniform(-.16, .16, (9, 36))
    edge = balls[:, 2:] * (1 + .1 * np.cos(5 * turn + angle[:, None]) + rough)
    return balls[:, None, :2] + edge[..., None] * np.stack([np.cos(turn), np.sin(turn)], 1), balls


def tree_shape(t: Thing) -> list:
    """A trunk, then the lumps of leaves."""
    lumps = tree_crown(t.detail % 24)[0]
    lumps = lumps if t.z < 20 else lumps[4:, ::2]  # far away five simple lumps do
    return [("trunk", wide(.16, 0, 0, .09, .7 * t.height, 0)),
            *[("leaf", [(p, y, 0) for p, y in lump]) for lump in (t.height * lumps).tolist()]]


def shape_of(t: Thing, seen: int) -> list:
    """Where it stands in the street; `seen` is the side (-1 or +1) that the camera sees."""
    across = up = 1
    if t.kind in SIZES:
        shape = car_shape(t.away) if t.kind == "car" else truck_shape(t.away)
        across = SIZES[t.kind][0] * seen
    elif t.kind == "person":
        shape, across, up = person_shape(t.detail), t.height, t.height
    elif t.kind == "lamp":
        shape, across = LAMP, -np.sign(t.x)
    else:
        shape = tree_shape(t) if t.kind == "tree" else SIGNS[t.detail % 3]
    return [(name, [(t.x + across * p, up * y, t.z + z) for p, y, z in points])
            for name, points in shape]


# Streets: from a scene to a layout

@functools.cache
def noise_tile(power: float) -> np.ndarray:
    """(256, 256) periodic noise with amplitude 1 / frequency^power, mean 0, variance 1."""
    rng = np.random.default_rng(7)
    f = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256))
    f[0, 0] = np.inf
    wave = np.fft.ifft2(np.fft.fft2(rng.normal(size=(256, 256))) / f ** power).real
    return np.clip(wave / wave.std(), -2.5, 2.5).astype(np.float32)


def fraction(a: np.ndarray) -> np.ndarray:
    """a % 1, which numpy computes twenty times more slowly."""
    return a - np.floor(a)


def grit(x: np.ndarray, y: np.ndarray, power: float) -> np.ndarray:
    """The texel of the noise tile at (x, y)."""
    return noise_tile(power).ravel()[(x.astype(np.int32) & 255) + ((y.astype(np.int32) & 255) << 8)]


def noise(x: np.ndarray, y: np.ndarray, power: float) -> np.ndarray:
    """The tile at (x, y), in texels, interpolated linearly: clouds and stains show no texels."""
    tile, i, j = noise_tile(power).ravel(), np.floor(x), np.floor(y)
    a, b = (x - i).astype(np.float32), (y - j).astype(np.float32)
    i, j = i.astype(np.int32) & 255, (j.astype(np.int32) & 255) << 8
    i1, j1 = (i + 1) & 255, (j + 256) & 65535
    top, low = tile[i + j], tile[i + j1]
    top += a * (tile[i1 + j] - top)
    low += a * (tile[i1 + j1] - low)
    return top + b * (low - top)


# What an object's samples know of it. Of houses: side, the first window's z, bay, height, shade; of
# things: the side that is seen, class (-1: the material's), number among their like; of lumps of
# leaves: their ball.
Row = namedtuple("Row", "z side near bay height shade kind number ball_x ball_y ball_r",
                 defaults=(1e3, 0, 0, 1, 1, -1, -1, 0, 0, 0, 1))


def objects(scene: Scene, edge: float) -> tuple[list[tuple[Row, list]], list[int]]:
    """Everything far to near as (row, shape), and which of them are the vehicles.

    The street's things stand in front of all facades, so the houses are painted first. Every lump
    of leaves is a row of its own, lit as a ball. What lies beyond |u| = edge is left out.
    """
    painted, place = [(Row(), [])], {}
    things = [t for t in scene.things
              if abs(scene.vanishing[0] * t.z + t.x - scene.camera[0]) < edge * t.z + 3]
    behind = [t for t in things if abs(t.x) > WALL]
    front = [t for t in things if abs(t.x) <= WALL] + scene.vehicles
    depth = lambda a: -(a.z if isinstance(a, Thing) else a.near if a.side else 1e3)
    for a in sorted(scene.buildings + behind, key=depth) + sorted(front, key=depth):
        if isinstance(a, Building):
            painted.append((Row(END, a.side, a.near, a.bay, a.height, a.shade), building_shape(a)))
            continue
        seen, place[id(a)] = 1 if scene.camera[0] > a.x else -1, len(painted)
        number = [t for t in scene.things + scene.vehicles if t.kind == a.kind].index(a)
        row, shape = Row(a.z, seen, kind=CLASS_ID.get(a.kind, -1), number=number), shape_of(a, seen)
        painted.append((row, shape[:1] if a.kind == "tree" else shape))
        if a.kind == "tree":
            balls = tree_crown(a.detail % 24)[1][1 - len(shape):] * a.height + (a.x, 0, 0)
            painted += [(Row(*row[:-3], *ball), [lump]) for ball, lump in zip(balls, shape[1:])]
    return painted, [place[id(v)] for v in scene.vehicles]


def shadows(scene: Scene) -> list:
    """On the ground, as (whether it is the soft dark under a body or the sun's shadow, corners)."""
    quads = []
    for t in scene.things + scene.vehicles:
        half, height, length = SIZES.get(t.kind, (.25, 2.0, .4))
        if t.kind in ("lamp", "sign"):
            continue
        reach = -scene.sun * .55 * height
        a, b = t.x - half + min(reach, 0), t.x + half + max(reach, 0)
        far, near = t.z + length, t.z + .05
        for soft, x0, x1 in ((True, t.x - half, t.x + half), (False, a, b)):
            quads.append((soft, [(x0, 0, near), (x1, 0, near), (x1, 0, far), (x0, 0, far)]))
        if t.kind == "tree":
            crown = disc(t.x - scene.sun * .5 * t.height, t.z + 1.5, 0, .25 * t.height)
            quads.append((False, [(x, 0, max(z, 1)) for x, z, _ in crown]))
    return quads


def rasterise(scene: Scene, size: tuple[int, int], fine: int, painted: list):
    """Shapes -> code (h, w), cast and contact shadow (h * w,) in [0, 1], halo (H, W, 3).

    A code is object * ROW + material. The sun casts the one shadow, the other is the soft dark
    below a body; the halo is the glow around lamps.
    """
    (H, W), (u0, v0), (x_cam, y_cam) = size, scene.vanishing, scene.camera
    scale, middle = H * fine, W * fine / 2
    canvas, cast, contact = (Image.new(m, (W * fine, H * fine)) for m in ("I", "L", "L"))
    pen, pen_cast, pen_contact = (ImageDraw.Draw(im) for im in (canvas, cast, contact))
    halo = Image.new("RGB", (W, H))
    pen_halo = ImageDraw.Draw(halo)
    stars = np.random.default_rng(int(1000 * scene.sky)).uniform((-1.5, -.1), (1.5, .4), (70, 2))
    for x, y in (stars * scale + (middle, 0)).tolist():
        r = scale * .0016
        pen.ellipse((x - r, y - r, x + r, y + r), fill=M["star"])

    jobs = [(pen, row * ROW + M[name], name, points) for row, (_, shape) in enumerate(painted)
            for name, points in shape]
    jobs += [(pen_contact if soft else pen_cast, 255, "", points)
             for soft, points in shadows(scene)]
    corners = itertools.chain.from_iterable(p for *_, points in jobs for p in points)
    x, y, z = np.fromiter(corners, float).reshape(-1, 3).T  # one projection for all is much faster
    u, v = middle + scale * (u0 + (x - x_cam) / z), scale * (v0 + (y_cam - y) / z)
    flat, at = (np.stack([u, v], 1) - .5).ravel().tolist(), 0
    for brush, fill, name, points in jobs:
        here, at = flat[at:at + 2 * len(points)], at + 2 * len(points)
        brush.polygon(here, fill)
        if name in ("bulb", "head", "tail"):
            u, v = np.mean(here[::2]) / fine, np.mean(here[1::2]) / fine
            r = H * max(.16 / points[0][2], .008)
            pen_halo.ellipse((u - r, v - r, u + r, v + r), tuple(int(255 * c) for c in GLOW[name]))
    contact = contact.filter(ImageFilter.BoxBlur(scale * .006))
    near = np.asarray(halo.filter(ImageFilter.BoxBlur(H * .014)), np.float32)
    wide = halo.resize((W // 2, H // 2), Image.Resampling.BOX)
    wide = wide.filter(ImageFilter.GaussianBlur(H * .022))
    halo = near * .9 + 1.3 * np.asarray(wide.resize((W, H), Image.Resampling.BILINEAR), np.float32)
    cast, contact = (np.asarray(im, np.float32).ravel() / 255 for im in (cast, contact))
    return np.array(canvas), cast, contact, halo / 255


def facades(s, y, near, bay, height, pixel) -> tuple[np.ndarray, np.ndarray]:
    """Material and brightness of facades at s metres along the street and y up."""
    base, away = 3.3, np.clip(.16 / pixel, 0, 1)  # texture finer than a sample fades
    storey = (height - base - .5) / np.maximum(1, np.round((height - base - .5) / 2.8))
    column, row = (s - near) / bay, (y - base) / storey
    fx, fy = np.abs(fraction(column) - .5) * bay, fraction(row) * storey
    i, j = np.floor(column).astype(np.int32), np.floor(row).astype(np.int32)
    dice = (i * 7919) ^ (j * 104729) ^ ((near * 1000).astype(np.int32) * 31)
    dice = ((dice ^ (dice >> 7)) * 40503 >> 8) & 255  # the same window at every size
    tone = 1 + .05 * noise(s * 14, y * 9, 1.2)
    tone *= .93 + .07 * np.clip(y / 5, 0, 1)
    material = np.full(s.shape, M["facade"])
    half, sill, low = bay * .22, storey * .26, j < 0
    upper = ~low & (y < height - .5)
    rim = upper & (fx < half + .14) & (fy > sill - .16) & (fy < sill + 1.68)
    material[rim | (y > height - .38) | (np.abs(y - base + .12) < .13)] = M["trim"]
    hole = rim & (fx < half) & (fy > sill) & (fy < sill + 1.55)
    cross = ((fx < .035) | (np.abs(fy - sill - 1.05) < .035)) & (pixel < .06)
    hole &= ~cross
    material[hole] = np.where(dice[hole] < 120, M["lit"], M["pane"])
    tone[hole] *= .82 + .024 * (dice[hole] & 15)
    door = (dice & 3) == 0
    glass, awning = low & ~door & (y < 2.95), low & ~door & (y > 2.45) & (y < 2.95)
    material[glass & (fx < bay * .38) & (y > .75)] = M["shop"]
    material[low & door & (fx < .62) & (y < 2.3)] = M["door"]
    material[awning] = M["awning"]
    tone[awning] *= np.where(fraction(s[awning] * 2.5) < .5, 1.25, .75)
    tone -= np.float32(.07) * away * ((fraction(y * 4) < .25) & (material == M["facade"]))  # bricks
    return material, tone


class Layout:
    """What a scene looks like at one size (H, W), square or wider: all but the style.

    label     (H, W) int64    index into STREETS
    instance  (H, W) int64    class for stuff, 1000 * class + number for things
    vehicles                  list of (instance id, class name)

    The rest is what `render` needs, an entry per sample of a grid twice as fine, (h, w) = (2H, 2W),
    where not said otherwise: averaging 2 x 2 samples smooths the edges of the photo, labels stay
    hard. Photos of over 2 ** 20 pixels have one sample a pixel. Each sample belongs to an object,
    a row of `table`, and is of one material.
    """

    def __init__(self, scene: Scene, size: tuple[int, int]):
        (H, W), (u0, v0), fine = size, scene.vanishing, 2 if size[0] * size[1] <= 1 << 20 else 1
        painted, self.owner = objects(scene, W / (2 * H))           # owner: a vehicle's object
        code, cast, contact, self.halo = rasterise(scene, size, fine, painted)
        (h, w), self.scene, self.h = code.shape, scene, code.shape[0]
        self.table = Row(*np.array([row for row, _ in painted], np.float32).T)
        self.shades = self.table.shade.astype(np.int64)
        self.u = np.tile(((np.arange(w) + .5 - w / 2) / h - u0).astype(np.float32), h)
        self.v = np.repeat(((np.arange(h) + .5) / h - v0).astype(np.float32), w)
        self.object, self.material = code.ravel() >> 6, (code.ravel() & 63).astype(np.uint8)
        self.tone = np.ones(h * w, np.float32)
        self.sun, self.sky = M_SUN[self.material, 0], M_SKY[self.material, 0]
        self.find_places()
        self.lay_ground(cast, contact)
        self.lay_facades()
        self.lay_leaves()
        self.light = np.empty((h * w, 3), np.float32)           # shares of sky, sun and lamp light
        self.light[:, 2] = self.lamplight(contact)
        self.light[:, 0], self.light[:, 1] = self.sky, self.sun
        self.light *= self.tone[:, None]
        self.code = self.object.astype(np.intp) * ROW + self.material
        self.glow = self.where(*GLOW)                           # indices of what shines by itself
        window = M_CLASS[self.material[self.glow]] == CLASS_ID["building"]
        self.strength = np.where(window, self.tone[self.glow], 1)[:, None]
        self.clouds()

        centre = np.arange(h * w).reshape(h, w)[fine // 2::fine, fine // 2::fine]       # (H, W)
        o, cls, number = self.object[centre], *(a.astype(np.int64) for a in self.table[6:8])
        self.label = label = np.where(cls[o] >= 0, cls[o], M_CLASS[self.material[centre]])
        self.instance = np.where(label >= CLASS_ID["person"], 1000 * label + number[o], label)
        self.vehicles = [(int(1000 * cls[k] + number[k]), STREETS[cls[k]]) for k in self.owner]
        haze = 1 - np.exp(-self.z[centre] / 45)                 # 0 near ... 1 far
        haze[label == CLASS_ID["sky"]] = 0
        self.haze, self.flakes = haze[:, :, None], snowfall(size)                       # (H, W, 1)
        self.wet = mirror(scene, label)

    def where(self, *names) -> np.ndarray:
        """Flat indices of the samples of these materials."""
        return np.flatnonzero(np.isin(self.material, [M[name] for name in names]))

    def find_places(self) -> None:
        """Where each sample lies: x, y and z in metres."""
        (x_cam, y_cam), side = self.scene.camera, self.table.side
        z = self.z = self.table.z[self.object]
        g = self.ground = np.flatnonzero((self.object == 0) & (self.v > .9 * y_cam / END))
        z[g] = y_cam / self.v[g]
        f = self.walls = self.where("facade", "masonry", "roof")    # one plane per side
        u = np.where(self.u[f] == 0, 1e-6, self.u[f])
        z[f] = np.clip((side[self.object[f]] * WALL - x_cam) / u, 1, END)
        f = self.where("gable")                                     # faces the camera
        z[f] = self.table.near[self.object[f]]
        self.x, self.y = x_cam + self.u * z, y_cam - self.v * z

    def lay_ground(self, cast, contact) -> None:
        """Road and footpath, with the shadow that the houses on the sun's side throw."""
        scene, g = self.scene, self.ground
        x, z = self.x[g], self.z[g]
        side, rough, pixel = np.abs(x), np.minimum(1, 6 / z), z / self.h
        edges = np.array([ROAD, KERB, 5.75 if scene.verge else KERB, WALL], np.float32)
        kinds = np.array([M[k] for k in ("asphalt", "kerb", "grass", "slab", "grass")])
        material = kinds[np.searchsorted(edges, side)]
        road, grass = material == M["asphalt"], material == M["grass"]
        thin = np.maximum(.07, .45 * pixel)  # at least a sample wide: far marks do not break up
        mark = (side < thin) & (fraction(z / 5) < .52) | (np.abs(side - 2.65) < thin * .7)
        if scene.zebra:
            mark &= np.abs(z - scene.zebra - 1) > 2.5
            mark |= (np.abs(z - scene.zebra - 1) < 1.4) & (fraction(x / 1.1) < .55)
        material[mark & road] = M["mark"]
        fine, coarse = grit(x * 150 + 4000, z * 100, .3), noise(x * 7 + 40, z * 2.2, 1.3)
        tone = 1 + np.where(grass, .11, .055).astype(np.float32) * (rough * fine + coarse)
        joint = (fraction(side / .9) < .055) | (fraction(z / 1.2) < .05)
        tone[joint & (material == M["slab"]) & (pixel < .12)] -= .16
        self.material[g], self.tone[g] = material, tone

        row = sorted((b for b in scene.buildings if b.side == scene.sun), key=lambda b: b.near)
        edges, roofs = np.array([(b.near, b.height) for b in row], np.float32).T
        which = np.searchsorted(edges, z - 1.2 - .25 * (WALL - scene.sun * x)) - 1
        reach = WALL - .42 * (roofs[np.maximum(which, 0)] + 1)
        self.sun[g] = np.clip((reach - scene.sun * x) * 8 + .5, 0, 1) * (1 - cast[g])
        open_sky = np.clip(1.27 - .05 * side, .8, 1)  # the houses hide much of it from near
        self.sky[g] = (1 - .72 * contact[g]) * open_sky

    def lay_facades(self) -> None:
        """The houses of both sides, garden walls, roofs, and the skyline."""
        f = self.walls
        o, y, z, kind = self.object[f], self.y[f], self.z[f], self.material[f]
        facade = np.flatnonzero(kind == M["facade"])
        tone = 1 + .10 * grit(z * 30, y * 60 + 4000, .4)            # of walls and roofs
        near, bay, height = (column[o[facade]] for column in self.table[2:5])
        kind[facade], tone[facade] = facades(
            z[facade], y[facade], near, bay, height, z[facade] ** 2 / (self.h * 6))
        shaded = self.table.side[o] == self.scene.sun
        self.material[f], self.tone[f], self.sun[f] = kind, tone, M_SUN[kind, 0] * ~shaded
        self.sky[f] = M_SKY[kind, 0] * (.82 + .18 * np.clip(y / 6, 0, 1))
        self.sky[f] *= np.where(shaded, .92, 1)
        f = self.where("far")
        x, y = self.u[f] * END, self.y[f]
        self.tone[f] = 1 - .22 * ((fraction(x / 2.4) < .45) & (fraction(y / 3.2) < .5) & (y > 2))

    def lay_leaves(self) -> None:
        """Every lump a ball, lit from above and from the sun's side."""
        f = self.where("leaf")
        o, (ball_x, ball_y, ball_r) = self.object[f], self.table[-3:]
        a = (self.x[f] - ball_x[o]) / ball_r[o]
        b = (self.y[f] - ball_y[o]) / ball_r[o]
        leaf = grit(a * 18 + 31 * (o & 7) + 512, b * 18 + 512, .5)
        self.tone[f] = .92 + .28 * b + .17 * leaf
        self.sun[f] = np.clip(.55 + .45 * b + .45 * self.scene.sun * a + .25 * leaf, 0, 1.3)

    def lamplight(self, contact) -> np.ndarray:
        """Lamps on both sides every LAMP_GAP metres: one folded distance serves them all."""
        scene, g, y = self.scene, self.ground, self.y
        dz = self.z - scene.lamps
        dz -= LAMP_GAP * np.round(dz / LAMP_GAP)
        lamp = 1.3 / (1 + ((np.abs(self.x) - 4) ** 2 + .5 * (y - 5.5) ** 2 + .8 * dz * dz) / 26)
        beam = np.exp(-(self.u[g] * self.z[g] / 1.8) ** 2 - ((self.z[g] - 8) / 3.5) ** 2)
        lamp[g] = lamp[g] * (1 - .6 * contact[g]) + .35 * beam
        car = np.flatnonzero((self.table.kind >= CLASS_ID["car"])[self.object])
        lamp[car] = .95  # the camera's own headlights
        self.tone[car] *= .90 + .14 * np.clip(y[car] / 1.5, 0, 1)
        side = self.where("side")  # of a vehicle: turns to the sun or away from it
        self.sun[side] = np.where(self.table.side[self.object[side]] == scene.sun, .9, .15)
        return lamp

    def clouds(self) -> None:
        """Sky samples: gradient, clouds on a clear and on a grey day (in perspective), stars."""
        s, drift = self.where("sky", "star"), self.scene.sky
        up = np.clip(-self.v[s] / self.scene.vanishing[1], 0, 1)
        p = 1 / (.25 - self.v[s])
        cloud = noise(self.u[s] * p * 13 + drift * 9, p * 26 + drift, 1.6)
        cloud += .3 * noise(self.u[s] * p * 45, p * 80, 1.1)
        clear = np.clip(.55 * cloud + .12, 0, 1) * np.clip(up * 3, 0, 1)
        grey = np.clip(.5 + .30 * cloud, 0, 1)
        star = self.material[s] == M["star"]
        self.heaven, self.air = s, np.stack([1 - up, clear, grey, star], 1).astype(np.float32)


def paint(scene: Scene, size: tuple[int, int]) -> Layout:
    """The scene at one size (H, W)."""
    return Layout(scene, size)


def mirror(scene: Scene, label: np.ndarray) -> tuple:
    """Wet ground: flat indices of its pixels, the pixels that they mirror, and how strongly."""
    H, W = label.shape
    flat = np.flatnonzero((label == CLASS_ID["road"]) | (label == CLASS_ID["sidewalk"]))
    row, column = np.array(divmod(flat, W), np.float32)
    down = ((row + .5) / H - scene.vanishing[1]).astype(np.float32)
    z = scene.camera[1] / np.maximum(down, .02)
    x = scene.camera[0] + ((column + .5 - W / 2) / H - scene.vanishing[0]) * z
    puddle = np.clip(.40 + .45 * noise(x * 9 + 10, z * 5, 1.5), .15, 1) * np.exp(-2.2 * down)
    target = ((scene.vanishing[1] - .8 * down + .006 * noise(x * 40, z * 20, .9)) * H).astype(int)
    return flat, np.clip(target, 0, H - 1) * W + flat % W, puddle[:, None]


@functools.lru_cache(maxsize=8)
def snowfall(size: tuple[int, int]) -> np.ndarray:
    """(H, W, 1) soft flakes, the same places at every size."""
    H, W = size
    flakes = Image.new("L", (W * 2, H * 2))
    pen, rng = ImageDraw.Draw(flakes), np.random.default_rng(3)
    for x, y, r in rng.uniform((-1.5, 0, .001), (1.5, 1, .0045), (500, 3)) * 2 * H + (W, 0, 0):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    return np.asarray(flakes.reduce(2), np.float32)[:, :, None] / 255


# Streets: the law, and the photo under one style

def modes(layout: Layout) -> list[tuple[Style, float]]:
    """Every style with P(time) P(weather) P(palette) prod_o P(color_o | class_o)."""
    factors = [TIMES, WEATHERS, PALETTES] + [COLOR_LAW[name] for _, name in layout.vehicles]
    return [(Style(*(key for key, _ in pick[:3]), tuple(key for key, _ in pick[3:])),
             float(np.prod([p for _, p in pick])))
            for pick in itertools.product(*(f.items() for f in factors))]


def draw_style(layout: Layout, rng: np.random.Generator) -> Style:
    """One style from p(style | layout)."""
    pick = lambda law: str(rng.choice(list(law), p=list(law.values())))
    return Style(pick(TIMES), pick(WEATHERS), pick(PALETTES),
                 tuple(pick(COLOR_LAW[name]) for _, name in layout.vehicles))


def render(layout: Layout, style: Style) -> np.ndarray:
    """The photo under this style, without grain -> (H, W, 3) float32 in [0.04, 0.96]."""
    H, W = layout.label.shape
    air, on = AIR[style.time, style.weather], np.float32(LAMPS_ON[style.time])
    zenith, horizon, cloud_color = air[3:]
    albedo = np.zeros((len(layout.shades), ROW, 3), np.float32)
    albedo[:, :len(M_RGB)] = M_RGB
    shades = np.array(PALETTE_RGB[style.palette], np.float32)
    for name, gain in (("facade", 1), ("gable", .80), ("far", .95)):
        albedo[:, M[name]] = gain * shades[layout.shades]  # the others have none of it to show
    albedo[:, M["roof"]], albedo[:, M["awning"]], albedo[:, M["door"]] = shades[[3, 4, 4]]
    albedo[:, M["door"]] *= .45
    albedo[:, M["trim"]] += .4 * (shades[1] - albedo[:, M["trim"]])
    for k, color in zip(layout.owner, style.colors):
        for name in ("body", "side", "top"):
            albedo[k, M[name]] = M_RGB[M[name]] * PAINT_RGB[color]
    albedo[:, [M["pane"], M["glass"]]] += .22 * horizon          # panes mirror the sky
    if style.weather == "snow":
        albedo[:, :len(M_RGB)] += M_SNOW * (.93 - albedo[:, :len(M_RGB)])
    flat = layout.code
    image = np.take(albedo.reshape(-1, 3), flat, 0)
    # No matrix product: after one, the threads of numpy's BLAS keep torch's from the cores a while.
    image *= np.einsum("nk,kc->nc", layout.light, air[:3])
    if on:
        image[layout.glow] += on * layout.strength * M_GLOW[flat[layout.glow] % ROW]
    low, clear, grey, star = layout.air.T[:, :, None]
    cloud = (.85 * clear if style.weather == "clear" else .6 * grey)
    sky = zenith + low * (horizon - zenith)
    sky += cloud * (cloud_color - sky)
    image[layout.heaven] = sky + .8 * star * (style.time == "night" and style.weather == "clear")
    if len(flat) > H * W:
        image = image.reshape(H, 2, W * 6)
        image = (image[:, 0] + image[:, 1]).reshape(H, W, 2, 3)
        image = .25 * (image[:, :, 0] + image[:, :, 1])
    image = image.reshape(H, W, 3)
    image += HAZE[style.weather] * layout.haze * (.9 * horizon - image)
    if style.weather == "overcast":  # rain has wetted the ground
        ground, source, puddle = layout.wet
        pixels = image.reshape(-1, 3)
        pixels[ground] += (.34 + .3 * on) * puddle * (
            np.minimum(pixels[source], .6) - pixels[ground])  # .6: no lamp as a spot on the road
    image += on * layout.halo
    if style.weather == "snow":
        image += .75 * layout.flakes * (np.clip(horizon * 1.3, 0, 1) - image)
    return .04 + .92 * np.clip(image, 0, 1)


def street(seed: int, index: int, size: tuple[int, int]) -> dict:
    """Label (H, W) and instance (H, W) int64, image (H, W, 3) uint8 of one street."""
    layout = paint(street_scene(seed, index), size)
    image = render(layout, draw_style(layout, np.random.default_rng([seed, index, 1])))
    grain = np.random.default_rng([seed, index, 2]).standard_normal(image.shape, np.float32)
    image = np.clip(image + STREET_GRAIN * grain, 0, 1)
    return {"label": layout.label, "instance": layout.instance,
            "image": np.round(image * 255).astype(np.uint8)}


# ------------------------------------------------------------------------------------- 7 VGG

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # RGB, on [0, 1]
BLOCKS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}              # convolutions before each pooling
VGG_SMALL = Path(__file__).with_name("notebooks") / "weights" / "vgg_small.pt"   # tests/distill.py


def vgg_trunk(depth: int, width: int = 64, last: str = "pool5", average_pool: bool = False):
    """Simonyan & Zisserman's convolutional part, layers named conv1_1, relu1_1, ..., pool5."""
    layers, c_in = nn.Sequential(), 3
    for block, n in enumerate(BLOCKS[depth], 1):
        c_out = width * min(2 ** (block - 1), 8)
        for i in range(1, n + 1):
            layers.add_module(f"conv{block}_{i}", nn.Conv2d(c_in, c_out, 3, padding=1))
            layers.add_module(f"relu{block}_{i}", nn.ReLU())
            c_in = c_out
        layers.add_module(f"pool{block}", nn.AvgPool2d(2) if average_pool else nn.MaxPool2d(2))
    return layers[: [name for name, _ in layers.named_children()].index(last) + 1]


def vgg_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of the trunk on x; a plane that is one pixel high or wide is not halved again."""
    pool = isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d))
    return x if pool and min(x.shape[-2:]) == 1 else layer(x)


def read_vgg(depth: int, weights: str) -> tuple[int, list[Tensor]]:
    """A VGG's depth, and the weights and biases of its convolutions; of "random" there are none.

    "imagenet" is torchvision's download. "small" is VGG_SMALL, a VGG-16 of a quarter of the width.
    A file is a state dict of torchvision's VGG-16 or VGG-19, which both have all the layers that
    the papers name, or of an FCN8s as kept by fcn_scorer, whose trained trunk can stand in where
    ImageNet's weights are not to be had.
    """
    if weights == "random":
        return depth, []
    cure = ("use --vgg small, --vgg random, or --vgg FILE (torchvision's VGG-16 or VGG-19, or a "
            "trained FCN-8s)")
    if weights == "imagenet":
        source = getattr(torchvision.models, f"VGG{depth}_Weights").IMAGENET1K_V1
        try:
            stored = source.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"--vgg imagenet: {source.url} cannot be had ({error}); {cure}")
    else:
        stored = load_file(VGG_SMALL if weights == "small" else Path(weights), cure)
    stored = stored.get("scorer", stored)       # what fcn_scorer keeps
    values = [v for k, v in stored.items() if str(k).startswith(("features.", "trunk."))]
    found = [d for d, n in BLOCKS.items() if len(values) == 2 * sum(n)]
    if not found or not all(torch.is_tensor(v) and v.isfinite().all() for v in values):
        raise UserError(f"--vgg {weights}: holds no weights of VGG-16 or VGG-19; {cure}")
    if found[0] != depth:
        notice(f"--vgg {weights}: VGG-{found[0]} stands in for the paper's VGG-{depth}")
    return found[0], values


def vgg_weights(trunk: nn.Sequential, values: list[Tensor]) -> None:
    """Fill a trunk, or the first layers of one, with what read_vgg gave; without values at random,
    the same in every run, by He's initialisation: the scale survives 16 layers."""
    if not values:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            for module in trunk:
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
                    nn.init.zeros_(module.bias)
    for p, value in zip(trunk.parameters(), values):
        if p.shape != value.shape:
            raise UserError(f"--vgg: a weight {[*value.shape]}, not {[*p.shape]}; use VGG-16")
        p.data.copy_(value)


class VGGFeatures(nn.Module):
    """Frozen VGG features by layer name. image (B, 3, H, W) in [-1, 1] -> {name: (B, C, h, w)}.

    "conv1_2" is the activation after its ReLU, as "relu1_2" is: in the original Caffe network the
    ReLU overwrites the convolution, and the papers read that. The gradient reaches the image, never
    the weights.

    Released code: pix2pixHD, SPADE and Lab2Pix feed [-1, 1] as it is, as normalise=False does. CRN
    pools by average (average_pool=True), the others by maximum. `width`, of random weights alone:
    below VGG's 64 for small studies.
    """

    def __init__(self, layers: tuple[str, ...], depth: int = 19, weights: str = "imagenet",
                 normalise: bool = True, average_pool: bool = False, width: int = 64):
        super().__init__()
        self.wanted = {name: name.replace("conv", "relu") for name in layers}
        depth, values = read_vgg(depth, weights)
        with torch.device("meta"):               # no memory, no random numbers: filled below
            order = [name for name, _ in vgg_trunk(depth).named_children()]
            last = max(self.wanted.values(), key=order.index)
            self.trunk = vgg_trunk(depth, len(values[0]) if values else width, last, average_pool)
        self.trunk.to_empty(device="cpu")
        vgg_weights(self.trunk, values)
        self.requires_grad_(False)
        self.normalise = normalise
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def state_dict(self, *args, **kwargs) -> dict:
        """Nothing: a checkpoint need not hold weights that --vgg names and nobody trains."""
        return {}

    def load_state_dict(self, state_dict, *args, **kwargs) -> None:
        """Nothing to restore."""

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = ((image + 1) / 2 - self.mean) / self.std if self.normalise else image
        features = {}
        for name, layer in self.trunk.named_children():
            x = vgg_layer(layer, x)
            if name in self.wanted.values():
                features[name] = x
        return {name: features[layer] for name, layer in self.wanted.items()}


# ---------------------------------------------------------------------------------- 8 FCN-8s

class FCN8s(nn.Module):
    """FCN-8s on VGG-16 (Long et al. 2015): the judge of the pix2pix paper's FCN-score.

    image (B, 3, H, W) in [-1, 1] -> logits (B, classes, H, W). Predictions are made at stride 32
    and refined twice, with what pool4 (stride 16) and pool3 (stride 8) know. `width` 64 is VGG-16;
    smaller ones are for small studies without ImageNet weights.
    Long et al. pad the image by 100 and crop; here fc6 pads by 3, and sizes agree without cropping.
    """

    def __init__(self, classes: int, width: int = 64):
        super().__init__()
        self.trunk = vgg_trunk(16, width)
        self.fc = nn.Sequential(
            nn.Conv2d(8 * width, 64 * width, 7, padding=3), nn.ReLU(), nn.Dropout2d(),
            nn.Conv2d(64 * width, 64 * width, 1), nn.ReLU(), nn.Dropout2d())
        self.score = nn.ModuleDict({"fc": nn.Conv2d(64 * width, classes, 1),
                                    "pool4": nn.Conv2d(8 * width, classes, 1),
                                    "pool3": nn.Conv2d(4 * width, classes, 1)})
        for conv in self.score.values():        # start from "nothing known", as Long et al. do
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, image: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=image.device).view(1, 3, 1, 1)
                     for v in (IMAGENET_MEAN, IMAGENET_STD))
        x, pools = ((image + 1) / 2 - mean) / std, {}
        for name, layer in self.trunk.named_children():
            x = vgg_layer(layer, x)
            pools[name] = x
        scores = self.score["fc"](self.fc(x))                                 # stride 32
        for name in ("pool4", "pool3"):                                       # strides 16, 8
            skip = self.score[name](pools[name])
            scores = skip + F.interpolate(scores, skip.shape[-2:], mode="bilinear")
        return F.interpolate(scores, image.shape[-2:], mode="bilinear")


def scored_target(label: Tensor, table: ClassTable) -> Tensor:
    """Ids -> ids, with 255 where the class is unknown or not scored (Cityscapes: 19 of 35 are)."""
    keep = torch.full((table.channels + 1,), 255, device=label.device)
    for k in table.scored or range(len(table.names)):
        keep[k] = k
    return keep[label]


@torch.enable_grad()                            # evaluation runs without; this trains
def train_scorer(net: FCN8s, train: Dataset, device: torch.device, steps: int, batch_size: int,
                 rate: Callable[[float], float]) -> None:
    """Cross-entropy on real photos. rate: the share of steps done -> learning rate."""
    optimiser = torch.optim.Adam(net.to(device).train().parameters(), fused=True)
    bar, batches = tqdm(range(steps), "FCN-8s on real photos", unit="step", disable=None), iter(())
    for step in bar:
        batch = next(batches, None)
        if batch is None:                       # the next pass, with new crops
            train.epoch = step
            batches = iter(torch.utils.data.DataLoader(train, batch_size, shuffle=True))
            batch = next(batches)
        target = scored_target(batch["label"].to(device), train.table)
        loss = F.cross_entropy(net(batch["image"].to(device)), target, ignore_index=255)
        optimiser.param_groups[0]["lr"] = rate(step / steps)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def fcn_scorer(train: Dataset, folder: Path, device: torch.device, weights: str = "imagenet",
               width: int = 0, steps: int = 0, batch_size: int = 4, lr: float = 0) -> FCN8s:
    """The scorer for a dataset: read from `folder`, else trained on its photos and kept there.

    FCN-score (pix2pix, Sec. 4.1): a network trained on real photos labels the generated ones, at
    --size; the labels that they were made from are the truth. `confusion_matrix` counts pixels over
    the whole test split, `segmentation_scores` makes the three numbers of it. The paper's scorer
    was trained on Cityscapes. Scores by another compare with each other and with its row for the
    real test photos, not with the paper's numbers.

    width: 0 is that of the weights, 64 for ImageNet's; 16 where they begin at random.
    steps: batches that it trains on; 0 is 2000, or 1000 with a width of 16.
    lr: a constant learning rate; 0 means 1e-4, and with a width of 16 1e-3, towards which it rises
    at first, and from which it falls in the second half.

    The file's name tells what it was made from: the data set and its number of photos, and these.
    """
    width = width or {"imagenet": 64, "random": 16}.get(weights) or len(read_vgg(16, weights)[1][0])
    steps = steps or (1000 if width == 16 else 2000)
    rate = lambda done: lr or 1e-4
    if not lr and width == 16:
        rate = lambda done: 1e-3 * min(1, 10 * done + 0.01, 2 - 2 * done)
    name = Path(train.data).resolve().name if train.data else "streets"
    cache = folder / (f"fcn8s-{name}-{train.fingerprint()[1]:08x}-{train.classes}-{train.size[0]}x"
                      f"{train.size[1]}-{width}-{steps}-{lr:g}-{Path(weights).stem}.pt")
    with torch.random.fork_rng(devices=[]):     # the same scorer whatever happened before
        torch.default_generator.manual_seed(0)
        net, epoch = FCN8s(len(train.table.names), width), train.epoch
        if cache.is_file():
            kept = load_file(cache, "delete it; it will be trained again")
            net.load_state_dict(kept["scorer"])
            return net.to(device).eval()
        if weights == "random":
            notice("the scorer starts from random weights, not from ImageNet's")
        vgg_weights(net.trunk, read_vgg(16, weights)[1])
        train_scorer(net, train, device, steps, batch_size, rate)
        train.epoch = epoch
    save_file({"scorer": net.state_dict()}, cache)
    return net.eval()


def confusion_matrix(predicted: Tensor, label: Tensor, table: ClassTable) -> Tensor:
    """(n, n) int64 counts, row: truth, column: prediction; unknown and unscored pixels left out."""
    n, truth = len(table.names), scored_target(label, table)
    keep = truth != 255
    return torch.bincount(truth[keep] * n + predicted[keep], minlength=n * n).view(n, n)


def segmentation_scores(confusion: Tensor) -> dict[str, float]:
    """FCN-score from counts (n, n) of pixels, row: true class, column: predicted class.

    per-pixel acc    pixels labelled right, of all pixels
    per-class acc    pixels of a class labelled right, of those that have it; mean over the classes
    class IOU        pixels of a class labelled right, of those that have it or were labelled so;
                     mean over the classes

    All images count as one: nothing is averaged image by image. The means are over the classes that
    occur in the truth. Released code: classes that never occur enter them as 0.
    """
    hits, truth, predicted = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
    seen = truth > 0
    if not seen.any():
        raise UserError("no pixel of the test labels is of a class that is scored, so that scores "
                        "would mean nothing; --classes says which classes they hold")
    return {"per-pixel acc": (hits.sum() / truth.sum()).item(),
            "per-class acc": (hits / truth)[seen].mean().item(),
            "class IOU": (hits / (truth + predicted - hits))[seen].mean().item()}


# ------------------------------------------------------------------------ 9 Files of weights

def load_file(path: Path, cure: str) -> dict:
    """torch.load of plain tensors and built-in types only: a checkpoint cannot run code here."""
    if not path.is_file():
        raise UserError(f"{path}: {'name a file in it' if path.is_dir() else 'no such file'}"
                        f"; {cure}")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                  # pickle, zip and eof errors share no narrower class
        raise UserError(f"{path}: damaged, or not plain weights ({type(error).__name__}); {cure}")
    if not isinstance(stored, dict):
        raise UserError(f"{path}: holds a {type(stored).__name__}, not a dict of weights; {cure}")
    return stored


def save_file(content: dict, path: Path) -> None:
    """Write beside, flush, rename: at any moment `path` is the old file or the new, whole.

    Numbers that are nan or infinite replace no good ones.
    """
    if not all(part.isfinite().all() for part in tree_leaves(content) if torch.is_tensor(part)):
        raise UserError(f"{path}: not saved, since weights are nan or infinite; the last good one "
                        "is kept. Try a smaller --lr anew, not with --resume")
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:    # torch makes a full disk a RuntimeError
        beside.unlink(missing_ok=True)
        why = error if isinstance(error, OSError) else "a full disk, perhaps"
        raise UserError(f"{path}: cannot be written ({why}); what was saved before is kept")
