"""What the four scripts share: settings, data, the streets, VGG, the FCN scorer, a run's files.

What would be word for word the same in four files stands here once: how a setting becomes a flag,
the loader, and how a run's files are written and read. The rest is data, and networks that judge.

A dataset is a folder in any common layout, found by the table LAYOUTS below; adding a layout is
adding a row. Without a folder there are the streets: a procedural set whose true distribution is
known. Every item is a dict of public names, the same in all files:

    label     (H, W) int64         class per pixel; pixels of unknown class carry the last id
    instance  (H, W) int64         object per pixel, if the dataset has instances
    image     (3, H, W) float32    the photo to be made, in [-1, 1]
    input     (3, H, W) float32    what it is made from, in image-to-image pairs
    name      str                  the file's stem

What a user can get wrong raises UserError with one line: file or value, what is wrong, the cure.

Contents    1 Settings   2 Class tables   3 Files   4 Dataset   5 Data doctor   6 Streets   7 VGG
            8 FCN-8s   9 Run files
"""

import os

# torch's threads wait for each other by spinning, which on a busy machine keeps a core from those
# that they wait for. This bounds it, without losing speed on an idle one. Read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import functools
import itertools
import math
import multiprocessing.util
import pickle
import re
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import IO, get_args

import matplotlib.figure
import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm


class UserError(Exception):
    """A mistake of the user's: shown as one line, exit code 2, no traceback."""


def place() -> tuple[int, int]:
    """(rank, number of processes): (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@functools.cache
def notice(text: str) -> None:
    """Print what was decided on the user's behalf, once per text."""
    print(f"note: {text}".encode("utf-8", "backslashreplace").decode())    # a name may be Latin-1


# -------------------------------------------------------------------------------- 1 Settings

MOST = 10 ** 9                                  # what stands for "as many as you like"


class Within(tuple):
    """(low, high): what a number may be, where words have a list of choices.

    Iterating says it in words, for the line of error.
    """

    def __contains__(self, x) -> bool:
        return self[0] <= x <= self[1]

    def __iter__(self):
        yield f"{self[0]} or more" if self[1] == MOST else f"{self[0]}..{self[1]}"


COUNT, POSITIVE, SHARE = Within((0, MOST)), Within((1, MOST)), Within((0, 0.9999))


def setting(default, text: str, choices=None, **more):
    """A field of a script's Config: the one declaration of its default, meaning and range.

    as_argument makes the flag and its line of --help from it, check_settings the check.
    """
    shown = ("off", "on")[default] if isinstance(default, bool) else (
        " ".join(map(str, default)) if isinstance(default, tuple) else default)
    shown = "" if shown in ("", None) else f" ({shown})"
    return field(default=default, metadata={"choices": choices, "help": text + shown} | more)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def kind_of(f: Field) -> tuple[type, int | str | None]:
    """A setting's type, and how many values it holds.

    int | None gives (int, None), tuple[int, int] (int, 2), tuple[str, ...] (str, "+").
    """
    kind = get_args(f.type)[0] if isinstance(f.type, UnionType) else f.type
    parts = get_args(kind)
    return (parts[0], "+" if ... in parts else len(parts)) if parts else (kind, None)


def parse(words: list[str], settings: type, name: str, modes: tuple, only: dict,
          about: str | None) -> tuple[str, dict]:
    """A script's command line: the mode, and the settings that were given.

    Each field of `settings` is a flag. `only`: the modes of those flags that not all modes know.
    `about`: the script's docstring, whose first and last paragraphs frame the list of flags.
    """
    about = about or ""                         # python -OO leaves it out
    p = argparse.ArgumentParser(
        usage=f"{name}.py [{' | '.join(modes)}] [flags]", description=about.partition("\n\n")[0],
        epilog=about[about.rfind("Run  "):], argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = refuse
    p.add_argument("mode", nargs="?", default="train", help="what to do (train)")
    for f in fields(settings):
        p.add_argument(flag(f.name), **as_argument(f))
    given, strange = p.parse_known_args(words)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(given).items()}
    mode = given.pop("mode")
    if strange:
        raise UserError(f"{strange[0]}: no such flag; --help lists all")
    if mode not in modes:
        raise UserError(f"{mode}: no such mode; there are {', '.join(modes)}")
    for key, value in given.items():
        if mode not in only.get(key, modes):
            raise UserError(f"{flag(key)} goes with {' or '.join(only[key])}, not with {mode}")
        if "" in (value if isinstance(value, tuple) else [value]):
            raise UserError(f"{flag(key)} '': empty, as a shell variable that is not set; leave "
                            "the flag out")
    return mode, given


def as_argument(f: Field) -> dict:
    """How argparse adds the flag of a setting. Ranges are checked later, by check_settings."""
    kind, n = kind_of(f)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": f.metadata["help"]}
    words = {"type": kind, "nargs": n} | f.metadata
    if isinstance(words["choices"], Within) or not words["choices"]:    # no list to choose from
        words |= {"choices": None, "metavar": words.get("metavar", kind.__name__.upper())}
    return words


def row_of(table: dict[str, dict], option: str, name: str) -> dict:
    """The row of a table of settings that an option names; without a name there are none."""
    if name and name not in table:
        raise UserError(f"{option} {name}: choose one of {', '.join(table)}")
    return table.get(name, {})


def check_sides(option: str, size: tuple[int, int], unit: int, least: int, why: str) -> None:
    """Refuses a size (H, W) unless both sides are multiples of `unit`, and `least` or more."""
    if any(side % unit or side < least for side in size):
        near = [max(least, round(side / unit) * unit) for side in size]
        raise UserError(f"{option} {size[0]} {size[1]}: {why}, so both sides must be multiples of "
                        f"{unit}, {least} or more; the nearest is {option} {near[0]} {near[1]}")


def refuse(text: str) -> None:
    """In place of argparse's own way, which prints a screen of usage before the one line."""
    raise UserError(f"{text}; --help lists all flags")


def check_settings(cfg) -> None:
    """Each setting of a Config has its type and lies in its range, wherever it came from."""
    for f in fields(cfg):
        value, allowed, (kind, n) = getattr(cfg, f.name), f.metadata["choices"], kind_of(f)
        if value is None and f.default is None:
            continue
        if isinstance(value, tuple) != bool(n) or isinstance(n, int) and len(value) != n:
            raise UserError(f"{flag(f.name)} {value}: {n or 'one'} value(s) expected")
        for one in value if n else [value]:
            numbers = (int, float) if kind is float else kind
            if not isinstance(one, numbers) or isinstance(one, bool) != (kind is bool):
                raise UserError(f"{flag(f.name)} {one}: no {kind.__name__}")
            if allowed and one not in allowed:
                raise UserError(f"{flag(f.name)} {one}: must be {' or '.join(map(str, allowed))}")


def shell(main: Callable, name: str) -> None:
    """Run a script's main; what a user can mend is one line, and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # a name may hold what the console cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        text = str(error).partition("\n")[0]
        if isinstance(error, OSError) and error.strerror:       # a full disk, permissions
            text = f"{error.filename or 'reading or writing'}: {error.strerror}"
        elif not isinstance(error, (UserError, OSError)):
            if isinstance(error, RuntimeError) and "memory" not in text:
                raise                           # a mistake of ours
            text = ("out of memory; a smaller --size, --width or --batch-size, or --precision "
                    f"bf16, helps ({text})")
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


def rows(text: str) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """'sky 70 130 180, road ...' -> names, colours. An underscore stands for a blank."""
    cells = [row.split() for row in text.replace("\n", " ").split(",")]
    colours = tuple(tuple(map(int, cell[1:])) for cell in cells)
    return tuple(cell[0].replace("_", " ") for cell in cells), colours


CITYSCAPES = torchvision.datasets.Cityscapes.classes       # by id; the licence plate is last, 34
CAMVID = rows("""sky 128 128 128, building 128 0 0, pole 192 192 128, road 128 64 128,
    pavement 60 40 222, tree 128 128 0, sign 192 128 128, fence 64 64 128, car 64 0 128,
    pedestrian 64 64 0, bicyclist 0 128 192""")
FACADES = rows("""background 0 0 170, facade 0 0 255, window 0 85 255, door 0 170 255,
    cornice 0 255 255, sill 85 255 170, balcony 170 255 85, blind 255 255 0, deco 255 170 0,
    molding 255 85 0, pillar 255 0 0, shop 170 0 0""")
ADE20K = """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet,
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
    board, shower, radiator, glass, clock, flag"""
COCO_THINGS = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, street sign, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,
    elephant, bear, zebra, giraffe, hat, backpack, umbrella, shoe, eye glasses, handbag, tie,
    suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon, bowl, banana,
    apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted
    plant, bed, mirror, dining table, window, desk, toilet, door, tv, laptop, mouse, remote,
    keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, blender, book, clock, vase,
    scissors, teddy bear, hair drier, toothbrush, hair brush"""
COCO_STUFF = """banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard,
    carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain,
    desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile,
    floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill,
    house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper,
    pavement, pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road,
    rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs,
    stone, straw, structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick,
    wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other,
    waterdrops, window-blind, window-other, wood"""


def names(text: str) -> tuple[str, ...]:
    """'wall, traffic light' -> names, wherever the lines break."""
    return tuple(" ".join(name.split()) for name in text.split(","))


STREETS = ("sky", "building", "vegetation", "road", "sidewalk", "terrain", "wall", "pole",
           "traffic sign", "person", "car", "truck")
TABLES = {
    "cityscapes": ClassTable(
        tuple(c.name for c in CITYSCAPES), tuple(c.color for c in CITYSCAPES),
        things=frozenset(c.name for c in CITYSCAPES if c.has_instances),
        scored=tuple(k for k, c in enumerate(CITYSCAPES) if not c.ignore_in_eval)),
    "camvid": ClassTable(*CAMVID, things=frozenset({"car", "pedestrian", "bicyclist"}), unknown=11),
    "facades": ClassTable(*FACADES, things=frozenset(["window", "door", "balcony"]), first=1),
    "ade20k": ClassTable(names(ADE20K), unknown=0, first=1, things=frozenset(names(
        "person, car, bus, truck, van, animal, bicycle, minibike, boat, airplane, chair"))),
    "coco_stuff": ClassTable(names(COCO_THINGS) + names(COCO_STUFF),
                             things=frozenset(names(COCO_THINGS)), unknown=255),
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

ITEM_KEYS = ("label", "instance", "image", "input")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"}
# All that is ever opened, whatever a file is called: for some others Pillow starts a program.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM", "GIF")
# How Pillow reads stored values that can be ids, and what it multiplies them by: 2 and 4 bits of
# grey are spread over 0..255. What is not here it inverts, rounds or scales in other ways.
ID_BITS = dict.fromkeys(("1", "L", "P", "P;1", "P;2", "P;4", "I;16", "I;16B", "I;16N", "I;16S",
                         "I;16BS", "I;16NS", "I;32N", "I;32S", "I;32BS", "RGB", "RGBA", "BGR",
                         "BGRX", "BGRA"), 1)
ID_BITS |= {"L;2": 85, "L;4": 17}


@dataclass(frozen=True)
class FolderLayout:
    """How a dataset lies on disk: a glob per role, {} for the split. The first role decides."""
    name: str
    roles: dict[str, str]
    train: tuple[str, ...] = ("train",)
    test: tuple[str, ...] = ("test", "val")
    classes: str = ""                                # a row of TABLES; "" counts the files' ids

    @property
    def first(self) -> tuple[str, str]:
        return next(iter(self.roles.items()))


LAYOUTS = [
    FolderLayout("Cityscapes", {"label": "gtFine/{}/*/*_gtFine_labelIds.png",
                                "instance": "gtFine/{}/*/*_gtFine_instanceIds.png",
                                "image": "leftImg8bit/{}/*/*_leftImg8bit.*"},
                 test=("val",), classes="cityscapes"),   # the labels of its test split are withheld
    FolderLayout("pix2pixHD Cityscapes", {"label": "{}_label/*_gtFine_labelIds.png",
                                          "instance": "{}_inst/*_gtFine_instanceIds.png",
                                          "image": "{}_img/*_leftImg8bit.*"},
                 classes="cityscapes"),
    FolderLayout("SPADE COCO-Stuff", {"label": "{}_label/000000??????.png",
                                      "instance": "{}_inst/000000??????.png",
                                      "image": "{}_img/000000??????.*"}, classes="coco_stuff"),
    FolderLayout("pix2pixHD", {"label": "{}_label/*", "instance": "{}_inst/*",
                               "image": "{}_img/*"}),
    FolderLayout("pix2pixHD pairs", {"A": "{}_A/*", "B": "{}_B/*"}),
    FolderLayout("ADE20K", {"label": "annotations/{}/*.png", "image": "images/{}/*"},
                 train=("training",), test=("validation",), classes="ade20k"),
    FolderLayout("CamVid", {"label": "{}annot/*.png", "image": "{}/*"}, classes="camvid"),
    FolderLayout("GTA-5", {"label": "labels/*.png", "image": "images/*"}, classes="cityscapes"),
    FolderLayout("CMP Facades", {"label": "base/*.png", "image": "base/*.jpg"}, classes="facades"),
    FolderLayout("unpaired", {"A": "{}A/*", "B": "{}B/*"}),
    FolderLayout("A and B folders", {"A": "A/{}/*", "B": "B/{}/*"}),
    FolderLayout("pix2pix pairs", {"pair": "{}/*"}),
    FolderLayout("photos", {"image": "{}/*"}),             # only where the task makes its own input
    FolderLayout("photos", {"image": "*"}),
]


def find(root: Path, pattern: str, split: str, role: str) -> dict[str, Path]:
    """Files by key: what `*` matched, without its ending, the layout's suffix or a role's name."""
    folder = root / pattern.replace("{}", split).rpartition("/")[0]
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):    # glob finds nothing in it
        raise UserError(f"{folder}: may not be read; check its permissions")
    stem, _, ending = pattern.partition(".")
    suffix, endings = re.split(r"[*?]", stem)[-1], {f".{ending}"} if ending.isalpha() else SUFFIXES
    words = "A|B" if role in ("A", "B") else "label|instance|inst|image|img"
    found = {}
    for path in sorted(root.glob(stem.replace("{}", split) + ".*")):
        if path.suffix.lower() not in endings or path.name.startswith(".") or not path.is_file():
            continue                             # macOS leaves "._name.png" beside name.png
        key = re.sub(rf"({re.escape(suffix)}|_({words}))$", "", path.stem)
        if key in found:
            raise UserError(f"{path}: same name as {found[key]}; pairs go by name, rename one")
        found[key] = path
    return found


def detect(root: Path, photos_only: bool) -> FolderLayout:
    """The first layout of the table that has files, and most of those in its folder."""
    if not root.is_dir():
        raise UserError(f"--data {root}: {'not a folder' if root.exists() else 'no such folder'}")
    left_out = ["pair"] if photos_only else ["image"]        # both would take a folder of photos
    layouts = [layout for layout in LAYOUTS if list(layout.roles) != left_out]
    size = lambda layout: sum(len(find(root, layout.first[1], split, layout.first[0]))
                              for split in {*layout.train, *layout.test})
    for layout in layouts:
        (role, pattern), n = layout.first, size(layout)
        most = n and max(size(other) for other in layouts
                         if other.first[1].rpartition("/")[0] == pattern.rpartition("/")[0])
        if n < most:
            notice(f"{n} of {most} {role} files are named as in {layout.name}; "
                   + ("the others are left out" if 2 * n > most else "too few to be that layout"))
        if 2 * n > most:
            return layout
    inside = sorted(p.name + "/" * p.is_dir() for p in root.iterdir())
    looked = [layout.first[1].replace("{}", "train") for layout in LAYOUTS]
    if any(Path(name).suffix.lower() in SUFFIXES for name in inside):
        raise UserError(f"--data {root}: photos only; colorization and inpainting can use them, "
                        "else labels or pairs are needed")
    raise UserError(f"--data {root}: no known layout; looked for "
                    f"{', '.join(dict.fromkeys(looked))}; found "
                    f"{', '.join(inside[:8]) or 'nothing'}{', ...' * (len(inside) > 8)}")


def pair_up(root: Path, layout: FolderLayout, split: str,
            unpaired: bool = False) -> dict[str, dict[str, Path]]:
    """Partners of one split, matched by key: {key: {role: path}}, sorted.

    `unpaired`: where names differ, A and B are two lists side by side, the shorter one repeated.
    """
    options = layout.train if split == "train" else layout.test
    first, pattern = layout.first
    has_splits = "{}" in pattern
    for option in options if has_splits else ("",):
        roles = {role: find(root, glob, option, role) for role, glob in layout.roles.items()}
        if roles[first]:
            break
    keys = sorted(roles[first])
    if not has_splits:
        keys = split_keys(root, keys, split)
    if unpaired and layout.name == "unpaired" and roles["B"] and set(roles["B"]) != set(keys):
        a, b = sorted(roles["A"].items()), sorted(roles["B"].items())
        return {a[i % len(a)][0] + f"_{i}" * (i >= len(a)):
                {"A": a[i % len(a)][1], "B": b[i % len(b)][1]} for i in range(max(len(a), len(b)))}
    for role, files in roles.items():
        missing = [key for key in keys if key not in files] if files else []
        if missing:
            raise UserError(f"{roles[first][missing[0]]}: no {role} of the same name (missing for "
                            f"{len(missing)} of {len(keys)}: {', '.join(missing[:4])})")
        extra = sorted(set(files) - set(roles[first]))
        if extra:
            notice(f"{len(extra)} {role} files without a {first} are left out: "
                   + ", ".join(extra[:4]))
    return {key: {role: files[key] for role, files in roles.items() if key in files}
            for key in keys}


def split_keys(root: Path, keys: list[str], split: str) -> list[str]:
    """Without split folders: train.txt or test.txt if present, else every tenth is held out."""
    listed = {}
    for name in ("val", "test", "train"):           # test.txt goes before val.txt
        if (root / f"{name}.txt").is_file():
            try:                                    # "-sig": Windows begins a text with a mark
                lines = (root / f"{name}.txt").read_text(encoding="utf-8-sig").split("\n")
            except UnicodeDecodeError:
                raise UserError(f"{root / name}.txt: not UTF-8; save it as UTF-8 text")
            stems = {Path(line.strip()).stem for line in lines if line.strip()}
            listed["train" if name == "train" else "test"] = stems
            if stems - set(keys):
                notice(f"{root / name}.txt: {len(stems - set(keys))} of {len(stems)} entries name "
                       f"no file: {', '.join(sorted(stems - set(keys))[:4])}")
    both = set(keys).intersection(*listed.values()) if len(listed) == 2 else set()
    if both:
        notice(f"{root}: {len(both)} files are in both lists and are left out of testing: "
               + ", ".join(sorted(both)[:4]))
        listed["test"] -= both
    if split in listed:
        return [key for key in keys if key in listed[split]]
    if listed:                                      # one list alone: the other split is the rest
        return [key for key in keys if key not in next(iter(listed.values()))]
    if len(keys) == 1:
        return keys if split == "train" else []
    return [key for i, key in enumerate(keys) if (i % 10 == 1) == (split != "train")]


def open_image(path: Path) -> Image.Image:
    """The file's header; `pixels` reads the rest and turns it upright."""
    try:
        if not path.stat().st_size:
            raise UserError(f"{path}: an empty file; delete it or download it again")
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image that can be read; that is {', '.join(FORMATS)}")
    except (Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not an image that can be read ({error})")
    except OSError as error:                    # missing, no permission; without a text, damaged
        why = error.strerror or f"damaged ({error}); delete it or download it again"
        raise UserError(f"{path}: {why}")


def pixels(path: Path, image: Image.Image, mode: str = "") -> np.ndarray:
    """The first frame, upright as the camera held it, converted to `mode` if given."""
    try:
        image = ImageOps.exif_transpose(image)
        return np.asarray(image.convert(mode) if mode else image)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it or download it again")


def read_image(path: Path) -> Tensor:
    """Any photo -> (3, H, W) uint8: grey is repeated, alpha dropped, 16 bits are scaled."""
    image = open_image(path)
    if image.mode in ("I;16", "I;16B", "I", "F"):
        deep = pixels(path, image).astype(np.float64)
        low, high = deep.min(), deep.max()
        if not np.isfinite(deep).all():
            raise UserError(f"{path}: {np.sum(~np.isfinite(deep))} pixels are nan or infinite")
        notice(f"{path}: {image.mode} pixels, scaled from {low:g}..{high:g} to 0..255")
        image = Image.fromarray(np.uint8(np.round(255 * (deep - low) / max(high - low, 1e-12))))
    if image.mode in ("RGBA", "LA", "PA"):
        notice("transparency is dropped, in all files that have it")
    rgb = pixels(path, image, "RGB")
    if getattr(image, "is_animated", False):
        notice(f"{path}: animated; only the first frame is used")
    return torch.from_numpy(rgb.copy()).permute(2, 0, 1)


def read_ids(path: Path, what: str) -> np.ndarray:
    """The values stored in a label or instance map, int64: ids (H, W), or colours (H, W, 3).

    Bits that were packed with a loss, or that Pillow would not give back as they are, are refused.
    """
    image = open_image(path)
    packed = str(image.info.get("compression"))            # of a TIFF, which may hold a JPEG
    if image.format in ("JPEG", "WEBP") or path.suffix.lower() in (".jpg", ".jpeg") or (
            "jpeg" in packed or "webp" in packed):
        raise UserError(f"{path}: a lossy {what} map; JPEG changes ids, export them as PNG")
    codec, _, _, bits = image.tile[0] if image.tile else ("", (), 0, "")
    bits = "P" if image.format == "GIF" else bits if isinstance(bits, str) else bits[0]
    inverted = image.format == "TIFF" and image.tag_v2.get(262) == 0       # white is zero
    if bits not in ID_BITS or codec.startswith("ppm") or inverted:
        raise UserError(f"{path}: {image.format} with pixels of kind {bits or image.mode} is no "
                        f"{what} map; save grey or palette PNG")
    raw = pixels(path, image).astype(np.int64) // ID_BITS[bits]
    return raw[..., :3] if raw.ndim == 3 else raw


def read_label(path: Path, table: ClassTable) -> Tensor:
    """A label map -> (H, W) int64 ids, each checked against the table on the CPU.

    Palette files give their indices, grey files (up to 16 bit) their values, colour files are
    matched against the table's palette. Ids never pass through a float or a JPEG.
    """
    raw, n = read_ids(path, "label"), len(table.names)
    if raw.ndim == 3:
        return torch.from_numpy(match_palette(path, raw, table))
    unknown = raw == table.unknown
    ids = np.where(unknown, n, raw - table.first)
    bad = raw[~unknown & ((ids < 0) | (ids >= n))]
    if bad.size:
        hint = "0 and 255 only: a mask; divide it by 255" if set(np.unique(raw)) == {0, 255} else (
            f"expected {table.first}..{table.first + n - 1}"
            + (f" or {table.unknown} for unknown" if table.unknown is not None else "")
            + f"; correct the file or pass --classes {raw.max() + 1}")
        raise UserError(f"{path}: label id {bad[0]}, {hint}")
    return torch.from_numpy(ids)


def match_palette(path: Path, colours: np.ndarray, table: ClassTable) -> np.ndarray:
    """(H, W, 3) colours -> (H, W) ids. A colour outside the palette is an error, not a guess."""
    code, known = (c.astype(np.int64) @ (65536, 256, 1) for c in (colours, table.palette))
    values, inverse = np.unique(code, return_inverse=True)
    strange = values[~np.isin(values, known)]
    if len(strange):
        first = ", ".join(f"({v >> 16}, {v >> 8 & 255}, {v & 255})" for v in strange[:5])
        raise UserError(f"{path}: a colour label map, but {len(strange)} of its colours are not in "
                        f"the dataset's palette: {first}; export class ids as grey or palette PNG")
    return np.array([np.flatnonzero(known == v)[0] for v in values])[inverse].reshape(code.shape)


def read_instance(path: Path) -> Tensor:
    """An instance map -> (H, W) int64: grey of up to 32 bit, palette, or R + 256 G + 65536 B."""
    raw = read_ids(path, "instance")
    ids = raw @ (1, 256, 65536) if raw.ndim == 3 else raw
    if ids.min() < 0 or ids.max() >= 2 ** 24:   # beyond, the resizing's float32 would round
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise UserError(f"{path}: instance id {bad}, expected 0..16777215; renumber them")
    return torch.from_numpy(ids)


# --------------------------------------------------------------------------------- 4 Dataset

def input_files(source: str, role: str, instances: str | None = None) -> list[dict[str, Path]]:
    """--input, a file or a folder, as `files` for a Dataset: each by itself, without a truth.

    instances: --instances, for a network that needs them: the map of the one file, or a folder that
    has a map of the same name for each; "" is refused. None: no instances are needed.
    """
    root, there = Path(source), Path(instances or "")
    paths = [root] if not root.is_dir() else [
        path for path in sorted(root.iterdir())
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    if not paths:
        raise UserError(f"--input {source}: a folder without images")
    if len({path.stem for path in paths}) < len(paths):
        raise UserError(f"--input {source}: several files of one name; outputs are named by it")
    if instances is None:
        return [{role: path} for path in paths]
    if not instances:
        raise UserError(f"--input {source}: this network needs instance maps, too; name the map, "
                        "or the folder of maps, with --instances")
    if there.is_file() and root.is_dir():
        raise UserError(f"--instances {there}: one map for a folder of label maps; name a folder")
    maps, files = {path.stem: path for path in there.iterdir()} if there.is_dir() else {}, []
    for path in paths:
        same = maps.get(path.stem, maps.get(path.stem.replace("labelIds", "instanceIds")))
        files.append({role: path, "instance": there if there.is_file() else same})
        if not files[-1]["instance"]:
            raise UserError(f"--instances {there}: no map named {path.stem}")
        if files[-1]["instance"].resolve() == path.resolve():
            notice(f"{path}: ids of classes serve as ids of objects")
    return files


def outputs(items: "Dataset", source: str, target: Path,
            samples: int) -> Iterator[tuple[dict, list[Path]]]:
    """Each item, and where its outputs go: paths that hold nothing of what is read.

    `target` is a file for one output of one file, a folder else. A data set's own folders are
    refused, for what lies there is read as a part of it.
    """
    single = bool(source) and Path(source).is_file() and samples == 1 and not target.is_dir()
    if not (single and target.suffix) and target.suffix.lower() in SUFFIXES:
        raise UserError(f"--output {target}: one file for several images; name a folder")
    paths = [] if items.layout.name == "streets" else [
        path for files in items.files for path in files.values()]
    folders = set() if source else {path.parent.resolve() for path in paths}
    inputs = {(s.st_dev, s.st_ino) for s in map(os.stat, paths)}        # hard links are one file

    endings = [f"_{k + 1}.png" for k in range(samples)] if samples > 1 else [".png"]
    for i in tqdm(range(len(items)), unit="image", disable=None):
        names = [target] if single and target.suffix else [
            target / f"{items.names[i]}{ending}" for ending in endings]
        for path in names:
            there = path.stat() if path.exists() else None
            if path.parent.resolve() in folders or there and (there.st_dev, there.st_ino) in inputs:
                raise UserError(f"--output {target}: would overwrite or join what is read, {path}")
        yield items[i], names
    print(f"{len(items) * samples} image(s): {target}")


class Dataset(torch.utils.data.Dataset):
    """One split of a dataset in any known layout, or of the built-in streets (data="").

    Args:
        files: these, {role: path} each, instead of a folder's.
        data: the folder; "" for the streets.    split: "train" or "test".
        size: (H, W) of the items; None keeps each file's own (then only batches of one).
        jitter: enlarge by 286/256 and crop back at random.    mirror: flip, half the time.
        crop: (H, W) of a random window of each item; (0, 0) keeps it whole.
        classes: a row of TABLES or a number; "" takes the layout's, or counts the ids in the files.
        direction: which half of a pair is the input, "AtoB" or "BtoA".
        photos_only: the task makes its own input, so a folder of photos will do.
        instances: read the instance maps, where there are any.
        unpaired: trainA and trainB may be two lists without common names, sizes or numbers.
        limit: use the first so many examples; 0 is all, of the streets 400 to train on.

    What is random about item i depends on (seed, epoch, i) alone: not on the number of workers, nor
    on what was drawn before. So a resumed run sees what the uninterrupted one would have seen.
    """

    STREETS = {"train": (0, 400), "test": (1_000_000, 50)}       # first index, how many

    def __init__(self, data: str = "", split: str = "train", size: tuple[int, int] | None = None,
                 jitter: bool = False, mirror: bool = False, crop: tuple[int, int] = (0, 0),
                 classes: str = "", direction: str = "AtoB", photos_only: bool = False,
                 instances: bool = True, limit: int = 0, seed: int = 0, unpaired: bool = False,
                 files: list[dict[str, Path]] | None = None):
        self.data, self.split, self.size, self.seed, self.epoch = data, split, size, seed, 0
        self.direction, self.cache, self.unpaired = direction, {}, False
        if files is not None:
            self.layout, self.files = FolderLayout("files", dict.fromkeys(files[0], "")), files
            self.names, self.classes = [next(iter(f.values())).stem for f in files], classes
        elif data:
            root = Path(data)
            self.layout = detect(root, photos_only)
            pairs = pair_up(root, self.layout, split, unpaired)
            if split == "test" and not pairs:
                notice("no test split: training examples stand in; scores say nothing of new data")
                pairs = pair_up(root, self.layout, "train", unpaired)
            self.names = list(pairs)[:limit or None]
            self.unpaired = unpaired and any(    # two lists: what stands side by side is no pair
                len({re.sub("_[AB]$", "", path.stem) for path in files.values()}) > 1
                for files in pairs.values() if "A" in files)
            if not pairs:
                raise UserError(f"--data {data}: layout {self.layout.name}, but nothing in "
                                f"its {split} split")
            self.files = [{role: path for role, path in pairs[name].items()
                           if role != "instance" or instances} for name in self.names]
            self.classes = classes or self.layout.classes or self.count_classes()
        else:
            if size is not None and min(size) < 32:
                raise UserError(f"--size {size[0]} {size[1]}: the streets need at least 32 x 32")
            if class_table(classes or "streets") is not TABLES["streets"]:
                raise UserError(f"--classes {classes}: the streets have classes of their own")
            first, n = self.STREETS[split]
            self.layout = FolderLayout("streets", dict.fromkeys(("label", "instance", "image"), ""))
            if limit:                           # of training streets there is no end
                n = limit if split == "train" else min(limit, n)
            self.files, self.classes = list(range(first, first + n)), "streets"
            self.names = [f"street_{index:07d}" for index in self.files]
        self.table = class_table(self.classes) if self.classes else None
        self.roles = set(self.files[0] if data or files else self.layout.roles)
        if self.direction == "BtoA" and "A" in self.roles and "B" not in self.roles:
            raise UserError(f"--direction BtoA: {data} has no B in its {split} split")
        self.load_size = size and tuple(round(s * 286 / 256) if jitter else s for s in size)
        flip = [v2.RandomHorizontalFlip(0.5)] if mirror else []
        window = crop if all(crop) else size if jitter else None
        crop = [v2.RandomCrop(window)] if window else []
        self.transform = v2.Compose(crop + flip + [v2.ToPureTensor()])

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> list[int]:
        """How many examples, and a checksum of their names: has the data set changed?"""
        return [len(self), zlib.crc32("\n".join(self.names).encode("utf-8", "surrogateescape"))]

    def has(self, role: str | None) -> "Dataset":
        """Itself, where it has files of this kind ("image" may be B, and both halves of a pair)."""
        kinds = {"A": {"A", "pair"}, "image": {"image", "B", "pair"}}.get(role, {role, None})
        if role and not kinds & self.roles:
            raise UserError(f"--data {self.data}: layout {self.layout.name} has only "
                            f"{', '.join(sorted(self.roles))} files in its {self.split} split, and "
                            f"here {role} files are needed; "
                            + ("--no-edges" if role == "instance" else "another --task")
                            + " may do without")
        return self

    def named(self, name: str) -> dict[str, Tensor | str]:
        """The example of this name; without a name the first."""
        if name and name not in self.names:
            raise UserError(f"--item {name}: not there; there are {', '.join(self.names[:5])}, ...")
        return self[self.names.index(name) if name else 0]

    def count_classes(self) -> str:
        """Where the layout does not say: one more than the highest id in the first 200 files."""
        if "label" not in self.layout.roles:
            return ""
        ids = set()
        for files in self.files[:200]:
            raw = read_ids(files["label"], "label")
            ids |= set(np.unique(raw).tolist()) if raw.ndim == 2 else {0}    # read refuses colours
        if ids == {0, 255}:
            raise UserError(f"{self.files[0]['label']}: 0 and 255 only: a mask; divide it by 255")
        unknown = 255 if max(ids) < 256 else 65535
        n = max(ids - {unknown}, default=0) + 1
        notice(f"{n} classes by the ids in {len(self.files[:200])} files ({unknown} is unknown); "
               "--classes N says otherwise")
        return str(n)

    def check_sizes(self) -> None:
        """Partners must agree in size: the first thousand by their headers, all at first touch."""
        for i, files in enumerate(self.files[:1000] if self.data and not self.unpaired else ()):
            sizes = set()
            for path in files.values():
                with open_image(path) as image:
                    sizes.add(image.size)
            if len(sizes) > 1:
                self.read(i)                     # raises, unless EXIF turns the photo upright

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor | str]:
        """Example i, augmented as in self.epoch; or (epoch, i), which needs no other state."""
        epoch, i = index if isinstance(index, tuple) else (self.epoch, index)
        item, values = self.read(i), {}
        ids = ("label", "instance")
        for key in item.keys() & set(ITEM_KEYS):
            value = item[key][None] if key in ids else item[key]
            if self.size:                        # exact: at pixel centres, as in the photos
                value = v2.functional.resize(
                    value, self.load_size, v2.InterpolationMode.NEAREST_EXACT if key in ids
                    else v2.InterpolationMode.BICUBIC, antialias=True)
            values[key] = tv_tensors.Mask(value) if key in ids else tv_tensors.Image(value)
        # The joint transform draws from torch's generator; seed it for this item, then put it back.
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(hash((self.seed, epoch, i)) % 2 ** 63)
        values = self.transform(values)
        torch.set_rng_state(state)
        return {"name": item["name"]} | {
            key: value[0].long() if key in ids else value.float() / 127.5 - 1
            for key, value in values.items()}

    def read(self, i: int) -> dict[str, Tensor | str]:
        """Item i as stored: uint8 photos, int64 ids, no augmentation."""
        if self.layout.name == "streets":
            if i not in self.cache:              # drawn once, at the size needed, and kept small
                drawn = street(0, self.files[i], self.load_size or (256, 512))
                self.cache[i] = (drawn["label"].astype(np.uint8),
                                 drawn["instance"].astype(np.int32), drawn["image"])
            label, instance, image = map(torch.from_numpy, self.cache[i])
            return {"label": label.long(), "instance": instance.long(), "name": self.names[i],
                    "image": image.permute(2, 0, 1).clone()}
        files = self.files[i]
        item = {"name": self.names[i]}
        if "pair" in files:                      # one file, two halves
            both = read_image(files["pair"])
            if both.shape[2] % 2:
                raise UserError(f"{files['pair']}: {both.shape[2]} pixels wide: not two images "
                                "side by side; photos alone need --task colorization or inpainting")
            item["A"], item["B"] = both.chunk(2, 2)
        for role in {"A", "B", "image"} & set(files):
            item[role] = read_image(files[role])
        if "label" in files:
            item["label"] = read_label(files["label"], self.table)
        if "instance" in files:
            item["instance"] = read_instance(files["instance"])
        if "A" in item or "B" in item:
            first, second = ("A", "B") if self.direction == "AtoB" else ("B", "A")
            item |= {"input": item[first]} | ({"image": item[second]} if second in item else {})
        sizes = {key: tuple(item[key].shape[-2:]) for key in ITEM_KEYS if key in item}
        if len(set(sizes.values())) > 1 and not self.unpaired:
            raise UserError(f"{next(iter(files.values()))}: sizes differ (height, width): "
                            + ", ".join(f"{key} {size}" for key, size in sizes.items()))
        return item


# What asks a program to end; SIGHUP is a terminal that was closed, and unknown to Windows.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
            if hasattr(signal, name)]


def ignore_signals(ended: "multiprocessing.synchronize.Event", worker: int) -> None:
    """For a data process: Ctrl-C reaches every process of the terminal, SIGTERM every one of a job,
    but when to stop is for the training one to say. At its own end, it does so by SIGTERM, too:
    then they leave, without an exit code that would look like a failure."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ended.is_set() else None)


def idle_seconds() -> float:
    """How long the machine's cores have been idle since it started, all together (Linux)."""
    return int(Path("/proc/stat").read_text().split()[4]) / os.sysconf("SC_CLK_TCK")


@functools.cache
def choose_threads(span: float = 0.25) -> None:
    """As many threads as cores are idle: all, unless other work keeps some of them busy.

    An operation in several threads ends with its last one; where each waits for a core in turn, all
    wait most of the time. OMP_NUM_THREADS, if set, decides instead.
    """
    cores = torch.get_num_threads()
    if cores == 1 or "OMP_NUM_THREADS" in os.environ or not Path("/proc/stat").exists():
        return
    before = idle_seconds()
    time.sleep(span)
    threads = max(1, min(cores, round((idle_seconds() - before) / span)))
    torch.set_num_threads(threads)
    if threads < cores:
        notice(f"this machine is busy: {threads} thread(s) instead of {cores}")


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
        self.rank, self.world = place()
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
        self.begun, self.counted, self.waited = time.time(), 0, 0.0
        cuda = device.type == "cuda"
        workers = (4 if cuda and examples.data else 0) if workers is None else workers
        self.batches = torch.utils.data.DataLoader(
            examples, batch_size, sampler=self.indices, num_workers=workers, pin_memory=cuda,
            drop_last=True, persistent_workers=workers > 0)
        if workers:
            ended = multiprocessing.Event()
            multiprocessing.util.Finalize(None, ended.set, exitpriority=0)  # before it ends any
            self.batches.worker_init_fn = functools.partial(ignore_signals, ended)

    def order(self) -> list:
        """What all processes train on in this epoch: every example once, in random order, but for a
        last batch that would not be full."""
        chance = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.examples), generator=chance).tolist()
        return order[:self.per_epoch * self.per_step]

    def __iter__(self) -> Iterator[dict]:
        mine = self.order()[self.seen + self.rank::self.world]
        self.indices[:] = [(self.epoch, i) for i in mine]
        batches, clock = self.read(), time.time()
        while not self.over and (batch := next(batches, None)) is not None:
            self.waited += time.time() - clock
            noise = (self.seed * 10 ** 9 + self.step) * self.world + self.rank
            torch.manual_seed(noise % 2 ** 63)
            self.step, self.seen = self.step + 1, self.seen + self.per_step
            self.over = self.step >= self.total
            yield to_device(batch, self.device)
            clock = time.time()
        if not self.over:
            self.epoch, self.seen = self.epoch + 1, 0

    def read(self) -> Iterator[dict]:
        """Batches of self.indices; what went wrong in a data process, as the one line it was."""
        try:
            yield from self.batches
        except UserError as error:              # a data process wraps it in its own traceback
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("common.UserError: "))
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(f"--workers {self.batches.num_workers}: a data process was ended from "
                            "outside, by a lack of memory perhaps; fewer need less")

    def speed(self) -> dict[str, str]:
        """Images per second, and the share of time spent waiting for them, since the last call."""
        span, images = time.time() - self.begun, (self.step - self.counted) * self.per_step
        shown = {"images/s": f"{images / span:.3g}", "wait": f"{self.waited / span:.2f}"}
        self.begun, self.counted, self.waited = time.time(), self.step, 0.0
        return shown

    def state_dict(self) -> dict:
        return {"step": self.step, "epoch": self.epoch, "seen": self.seen,
                "threads": torch.get_num_threads(), "examples": self.examples.fingerprint()}

    def load_state_dict(self, stored: dict) -> None:
        numbers = [stored[k] for k in ("step", "epoch", "seen", "threads")]
        if not all(isinstance(n, int) and 0 <= n < 2 ** 53 for n in numbers):
            raise ValueError(f"step, epoch, seen, threads: {numbers}")
        self.step, self.epoch, self.seen, threads = numbers
        if "OMP_NUM_THREADS" not in os.environ:  # with other threads, sums round differently
            torch.set_num_threads(max(1, min(threads, os.cpu_count())))
        self.counted = self.step
        if stored["examples"] != self.examples.fingerprint():
            notice("the data set is not the one that this run began with: what follows differs "
                   "from what an uninterrupted run would have given")


def same_classes(dataset: Dataset, trained: str) -> None:
    """Refuses data whose layout says other classes than the checkpoint's: an id means another."""
    own = dataset.layout.classes
    if own not in ("", trained):
        raise UserError(f"--data {dataset.data}: layout {dataset.layout.name} has the classes of "
                        f"{own}, the checkpoint those of {trained or 'none'}; if the ids mean the "
                        f"same, say --classes {trained}")


def to_float(output):
    """float32 of a tensor, or of every tensor in a list or a dict: what autocast has left."""
    if isinstance(output, dict):
        return {name: each.float() for name, each in output.items()}
    return output.float() if torch.is_tensor(output) else [to_float(each) for each in output]


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


class GroupNorm(nn.GroupNorm):
    """PyTorch's GroupNorm, (B, C, H, W) to the same shape, by faster kernels where a GPU has them.

    With a channel per group (instance norm) it copies maps into another memory order; batch norm
    does not, and of a single image it is the same function: 64 x 512 x 1024 in a sixth of the time.
    With one group (layer norm) it leaves an image to one of the GPU's many processors: 27 ms where
    the formula needs 2 (H200, forward and backward).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and len(x) == 1 and self.num_groups == self.num_channels:
            return F.batch_norm(x, None, None, self.weight, self.bias, True, eps=self.eps)
        if x.is_cuda and self.num_groups == 1 and self.affine:
            x = x.float()                       # bf16 would round the mean
            var, mean = torch.var_mean(x, (1, 2, 3), correction=0, keepdim=True)
            gain = self.weight.view(-1, 1, 1) * (var + self.eps).rsqrt()
            return torch.addcmul(self.bias.view(-1, 1, 1) - mean * gain, x, gain)
        return super().forward(x)


def smooth_grid(x: Tensor) -> Tensor:
    """Each pixel (..., H, W) becomes the mean of itself, its right, its lower and its lower right
    neighbour; a border repeats itself.

    The kernels of a transposed convolution of stride 2 overlap in a pattern that repeats every two
    pixels. Of two neighbours one is always an overlap, so the mean removes the pattern.
    """
    if torch.compiler.is_compiling():           # it cannot take the gradient of the padding below
        x = torch.cat([x, x[..., -1:]], -1)
        return F.avg_pool2d(torch.cat([x, x[..., -1:, :]], -2), 2, 1)
    return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), "replicate"), 2, 1)


def boundary_map(instance: Tensor) -> Tensor:
    """1 where the object differs from any of the four neighbours (pix2pixHD, Sec. 3.3, Fig. 4).

    instance (B, H, W) int64  ->  (B, 1, H, W) float. Both sides of a border are marked; the
    image's own border is none. Ids themselves cannot be fed to a network: their number varies, and
    their values mean nothing. What tells touching cars apart is where one ends.
    """
    # Of each pair of neighbours that differ, both pixels are marked.
    across, down = instance.diff(dim=2) != 0, instance.diff(dim=1) != 0
    edge = (F.pad(across, (1, 0)) | F.pad(across, (0, 1))
            | F.pad(down, (0, 0, 1, 0)) | F.pad(down, (0, 0, 0, 1)))
    return edge[:, None].float()


# ----------------------------------------------------------------------------- 5 Data doctor

def save_images(images: Tensor, path: Path, nrow: int = 1) -> None:
    """(B, 3, H, W) in [-1, 1] to a file; several as a grid."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torchvision.utils.save_image(images, path, nrow=nrow, pad_value=1, normalize=True,
                                     value_range=(-1, 1))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be written ({error}); pictures end in .png or .jpg")


def colour_label(label: Tensor, table: ClassTable) -> Tensor:
    """Ids (..., H, W) -> colours (..., 3, H, W) float32 in [-1, 1] by the table's palette."""
    palette = torch.from_numpy(table.palette).to(label.device).float() / 127.5 - 1
    return palette[label].movedim(-1, -3).contiguous()


def title(dataset: Dataset) -> str:
    """A split in one line: its layout, and what its examples hold."""
    kinds = ", ".join(sorted(dataset.roles))
    way = "" if dataset.roles & {"label", "image"} else f" ({dataset.direction})"
    return (f"{dataset.split}: layout {dataset.layout.name}, {len(dataset)} examples with "
            f"{kinds}{way}")


def describe(*datasets: Dataset) -> None:
    """The first lines that a run prints: layout, pairs, sizes, classes seen."""
    for dataset in datasets:
        dataset.check_sizes()
        h, w = next(v.shape[-2:] for v in dataset.read(0).values() if torch.is_tensor(v))
        print(f"{title(dataset)}; the first is {h}x{w}, used at "
              + ("{}x{}".format(*dataset.size) if dataset.size else "its own size"))
        if "label" not in dataset.roles:
            continue
        n, names = min(len(dataset), 20), dataset.table.names
        seen = sorted({int(k) for i in range(n) for k in dataset.read(i)["label"].unique()})
        known = [k for k in seen if k < len(names)]
        if not known:
            raise UserError(f"--data {dataset.data}: all pixels of the first {n} label maps are "
                            f"unknown (id {dataset.table.unknown}); there is nothing to learn")
        if known == [0] and len(seen) > 1:
            print("       only class 0 and unknown: if these are masks of 0 and 255, divide by 255")
        print(f"       {len(known)} of {len(names)} classes in the first {n}: "
              + ", ".join([*names, "unknown"][k] for k in seen[:12]) + ", ..." * (len(seen) > 12))


def thumbnails(item: dict, table: ClassTable | None) -> list[Tensor]:
    """What an item is made from and its photo, (3, 128, ...) in [-1, 1], for the contact sheet."""
    parts = [item[key] / 127.5 - 1 for key in ("input", "image") if key in item]
    if "label" in item:
        parts.insert(0, colour_label(item["label"], table))
    return [F.interpolate(t[None], (128, max(1, 128 * t.shape[-1] // t.shape[-2])))[0]
            for t in (parts * 2)[:2]]            # a photo alone stands there twice


def check_data(datasets: list[Dataset], out: Path) -> None:
    """The `check` mode: reads every example as stored; a report per split and a contact sheet."""
    out.mkdir(parents=True, exist_ok=True)
    total = 0
    for dataset in datasets:
        table, sizes, bad, tiles = dataset.table, {}, [], []
        pixels_of, images_with = np.zeros((2, table.channels if table else 1), np.int64)
        for i in range(len(dataset)):
            try:
                item = dataset.read(i)
            except UserError as error:
                bad.append(error)
                continue
            size = next(tuple(v.shape[-2:]) for v in item.values() if torch.is_tensor(v))
            sizes[size] = sizes.get(size, 0) + 1
            if "label" in item:
                count = np.bincount(item["label"].flatten(), minlength=len(pixels_of))
                pixels_of, images_with = pixels_of + count, images_with + (count > 0)
            if len(tiles) < 16:
                tiles += thumbnails(item, table)
        print(title(dataset))
        print("    sizes (height x width): " + ", ".join(
            f"{h}x{w} ({n})" for (h, w), n in sorted(sizes.items(), key=lambda s: -s[1])[:6]))
        for k in np.flatnonzero(pixels_of):
            print(f"    {k:4} {[*table.names, 'unknown'][k][:22]:22} in {images_with[k]} images, "
                  f"{100 * pixels_of[k] / pixels_of.sum():.2f}% of all pixels")
        if pixels_of.any():
            print(f"    classes never seen: {np.sum(pixels_of == 0)} of {len(pixels_of)}")
        for error in bad[:20]:
            print(f"    BAD {error}")
        total += len(bad)
        if tiles:
            width = max(t.shape[-1] for t in tiles)
            tiles = [F.pad(t, (0, width - t.shape[-1]), value=1) for t in tiles]
            path = out / f"contact_{dataset.split}.png"
            save_images(torch.stack(tiles), path, nrow=4)
            print(f"    contact sheet: {path}")
    if total:
        raise UserError(f"--data {datasets[0].data}: {total} bad file(s), listed above")


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

# Material: class, albedo, share covered when it snows, light from the sky, light from the sun.
MATERIALS = {
    "sky": ("sky", (0, 0, 0), 0, 0, 0), "star": ("sky", (0, 0, 0), 0, 0, 0),
    "asphalt": ("road", (.36, .36, .38), .55, 1, 1), "mark": ("road", (.90, .89, .84), .2, 1, 1),
    "kerb": ("sidewalk", (.74, .73, .70), .6, 1, 1),
    "slab": ("sidewalk", (.66, .61, .55), .85, 1, 1),
    "grass": ("terrain", (.36, .50, .17), .9, 1, 1),
    "facade": ("building", (.6, .6, .6), .06, 1, 1),
    "trim": ("building", (.86, .84, .79), .4, 1, 1),
    "pane": ("building", (.20, .25, .31), 0, 1, .5),
    "lit": ("building", (.22, .26, .31), 0, 1, .5),
    "shop": ("building", (.26, .29, .32), 0, 1, .5), "door": ("building", (.26, .17, .12), 0, 1, 1),
    "awning": ("building", (.72, .30, .22), .7, 1, 1),
    "gable": ("building", (.6, .6, .6), .06, .8, .45),
    "roof": ("building", (.33, .29, .31), .92, 1.15, 1),
    "far": ("building", (.6, .6, .6), .1, 1, .6),
    "leaf": ("vegetation", (.27, .43, .13), .62, 1, 1),
    "trunk": ("vegetation", (.30, .22, .16), .15, .8, .6),
    "masonry": ("wall", (.62, .56, .50), .35, .95, 1),
    "steel": ("pole", (.30, .32, .33), .1, 1, .7), "bulb": ("pole", (.85, .84, .80), .3, 1, .7),
    "white": ("traffic sign", (.93, .93, .93), .1, 1, .8),
    "red": ("traffic sign", (.80, .08, .09), .1, 1, .8),
    "signal": ("traffic sign", (.08, .26, .70), .1, 1, .8),
    "skin": ("person", (.78, .56, .43), 0, 1, .7), "hair": ("person", (.22, .15, .11), .3, 1, .7),
    "coat": ("person", (.50, .27, .30), .1, 1, .7), "coat2": ("person", (.27, .36, .47), .1, 1, .7),
    "jeans": ("person", (.17, .20, .30), 0, .9, .6),
    "body": ("car", (1, 1, 1), .05, 1, .6),
    "side": ("car", (.85, .85, .85), .05, .9, .5),
    "top": ("car", (1.08, 1.08, 1.08), .30, 1.15, 1),
    "glass": ("car", (.10, .13, .16), .1, 1.1, .6),
    "tyre": ("car", (.07, .07, .08), 0, .8, .4), "rim": ("car", (.55, .56, .58), 0, .9, .6),
    "bumper": ("car", (.20, .20, .21), .1, .9, .6), "plate": ("car", (.92, .92, .86), 0, 1, .7),
    "head": ("car", (.88, .90, .90), 0, 1, .8), "tail": ("car", (.70, .06, .05), 0, 1, .8)}
M = {name: k for k, name in enumerate(MATERIALS)}    # numbers of materials; then the columns
M_CLASS = np.array([CLASS_ID[m[0]] for m in MATERIALS.values()])
M_RGB = np.array([m[1] for m in MATERIALS.values()], np.float32)
M_SNOW = np.array([m[2] for m in MATERIALS.values()], np.float32)[:, None]
M_SKY, M_SUN = (np.array([m[k] for m in MATERIALS.values()], np.float32) for k in (3, 4))
GLOW = {"lit": (.95, .66, .30), "shop": (.80, .66, .42), "bulb": (1, .86, .55),
        "head": (1, .97, .85), "tail": (.85, .05, .04)}  # what shines by itself after sunset
M_GLOW = np.array([GLOW.get(name, (0, 0, 0)) for name in MATERIALS], np.float32)

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


# Streets: shapes, as (material, corners in metres), to be painted in this order

def box(x0: float, x1: float, y0: float, y1: float, z: float) -> list:
    """A rectangle that faces the camera."""
    return [(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)]


def disc(x: float, y: float, z: float, r: float, sideways: bool = False, n: int = 14) -> list:
    """A circle that faces the camera or, sideways, the street (a wheel)."""
    circle = [(r * math.sin(k * math.tau / n), r * math.cos(k * math.tau / n)) for k in range(n)]
    return [(x, y + q, z + p) if sideways else (x + p, y + q, z) for p, q in circle]


def building_shape(b: Building) -> list:
    """Facade, the gable towards us and a steep roof, of which the street sees a strip."""
    if b.side == 0:
        return [("far", box(b.near, b.far, 0, b.height, END))]
    x, h, out = b.side * WALL, b.height, b.side
    front = [(x, 0, b.near), (x, 0, b.far), (x, h, b.far), (x, h, b.near)]
    if h < 2:
        return [("masonry", front)]
    ridge, top = x + out * .9, h + 1.7
    return [("gable", [(x, 0, b.near), (x, h, b.near), (ridge, top, b.near),
                       (x + 8 * out, top, b.near), (x + 9 * out, h, b.near),
                       (x + 9 * out, 0, b.near)]),
            ("roof", [(x, h, b.near), (x, h, b.far), (ridge, top, b.far), (ridge, top, b.near)]),
            ("facade", front)]


def car_shape(t: Thing, seen: int) -> list:
    """Body, cabin and wheels of a hatchback; `seen` is the side (-1 or +1) that the camera sees."""
    foot, roof, end, tail = (.15, .75, 2.7, 3.5) if t.away else (1.0, 1.75, 3.4, 4.05)
    at = lambda points: [(t.x + .9 * seen * p, y, t.z + z) for p, y, z in points]
    wide = lambda p, y, z, q, y2, z2: at([(-p, y, z), (p, y, z), (q, y2, z2), (-q, y2, z2)])
    lamp = "tail" if t.away else "head"
    front = [] if t.away else [("bumper", wide(.5, .47, 0, .55, .60, 0))]
    return [
        ("tyre", at([(.97, .05, .1), (.97, .05, 4.1), (.97, .4, 4.1), (.97, .4, .1)])),
        ("tyre", wide(.97, 0, .05, .97, .4, .05)), ("bumper", wide(.66, .12, .02, .66, .4, .02)),
        ("side", at([(1, .22, 0), (1, .22, 4.2), (1, .7, 4.2), (1, .92, tail), (1, .92, foot),
                     (1, .80, 0)])),
        ("side", at([(1, .90, foot), (.80, 1.42, roof), (.80, 1.42, end), (1, .90, tail)])),
        ("glass", at([(.98, .95, foot + .35), (.83, 1.35, roof + .2), (.83, 1.35, end - .2),
                      (.98, .95, tail - .35)])),
        ("side", at([(.99, .9, 2.0), (.83, 1.4, 2.0), (.83, 1.4, 2.12), (.99, .9, 2.12)])),
        *[(m, disc(t.x + .9 * seen, .32, t.z + z, r, True)) for z in (.8, 3.4)
          for m, r in (("tyre", .33), ("rim", .19))],
        ("top", wide(.80, 1.42, roof, .80, 1.44, end)),
        ("body", wide(1, .90, foot, .80, 1.42, roof)),
        ("glass", wide(.88, .95, foot + .05, .75, 1.37, roof - .05)),
        ("top", wide(1, .78, 0, .97, .92, foot)),
        ("body", at([(-.98, .24, 0), (.98, .24, 0), (1, .5, 0), (.97, .82, 0), (-.97, .82, 0),
                     (-1, .5, 0)])),
        ("bumper", wide(.97, .24, 0, .99, .36, 0)), *front,
        ("plate", wide(.27, .39, 0, .27, .5, 0)),
        *[(lamp, at([(s * .58, .56, 0), (s * .97, .54, 0), (s * .95, .72, 0), (s * .66, .70, 0)]))
          for s in (-1, 1)]]


def truck_shape(t: Thing, seen: int) -> list:
    """A box van: seen from behind two doors, from the front a cab below the box."""
    at = lambda points: [(t.x + 1.15 * seen * p, y, t.z + z) for p, y, z in points]
    flat = lambda p0, p1, y0, y1, z=0: at([(p0, y0, z), (p1, y0, z), (p1, y1, z), (p0, y1, z)])
    wall = lambda z0, z1, y0, y1: at([(1, y0, z0), (1, y0, z1), (1, y1, z1), (1, y1, z0)])
    lamp = "tail" if t.away else "head"
    shape = [("tyre", flat(-.96, .96, 0, .5, .1)), ("bumper", flat(-.5, .5, .2, .5, .1)),
             ("bumper", wall(0, 6.5, .3, .62)),
             *[(m, disc(t.x + 1.15 * seen, .45, t.z + z, r, True)) for z in (1.2, 5.2)
               for m, r in (("tyre", .46), ("rim", .24))]]
    if t.away:
        shape += [("side", wall(0, 6.3, .6, 3.1)), ("body", flat(-1, 1, .5, 3.1)),
                  ("side", flat(-.02, .02, .6, 3.0)), ("bumper", flat(-.94, -.9, .7, 2.9)),
                  ("bumper", flat(.90, .94, .7, 2.9)), ("bumper", flat(.1, .2, 1.3, 1.5)),
                  ("side", flat(-1, 1, 2.98, 3.1))]
    else:
        shape += [("side", wall(1.8, 6.5, .6, 3.1)), ("body", flat(-1, 1, .6, 3.1, 1.8)),
                  ("side", wall(0, 1.7, .5, 2.3)), ("glass", wall(.5, 1.3, 1.4, 2.15)),
                  ("top", at([(-1, 2.3, .2), (1, 2.3, .2), (.95, 2.6, 1.8), (-.95, 2.6, 1.8)])),
                  ("body", flat(-1, 1, .45, 2.3)), ("glass", flat(-.88, .88, 1.35, 2.12)),
                  ("bumper", flat(-.6, .6, .8, 1.15))]
    return shape + [("bumper", flat(-1, 1, .38, .58)), ("plate", flat(-.22, .22, .42, .54)),
                    *[(lamp, flat(s * .70, s * .94, .66, .86)) for s in (-1, 1)]]


def person_shape(t: Thing) -> list:
    """Walking, arms down; measures are shares of the body's height."""
    h, stride = t.height, .03 + .05 * (t.detail % 7) / 6
    at = lambda *points: [(t.x + h * p, h * q, t.z) for p, q in points]
    coat = ("coat", "coat2")[t.detail % 2]
    return [("jeans", at((-.075, .5), (.0, .5), (-stride, .0), (-stride - .06, 0))),
            ("jeans", at((0, .5), (.075, .5), (stride + .06, 0), (stride, 0))),
            (coat, at((-.10, .80), (-.14, .74), (-.15, .46), (-.11, .45), (-.09, .60), (-.085, .44),
                      (.085, .44), (.09, .60), (.11, .45), (.15, .46), (.14, .74), (.10, .80),
                      (.03, .84), (-.03, .84))),
            ("hair", disc(t.x, h * .935, t.z, h * .063)),
            ("skin", disc(t.x, h * .915, t.z, h * .052))]


def post_shape(t: Thing) -> list:
    """A street lamp that leans over the road, or a traffic sign."""
    x, z, h, out = t.x, t.z, t.height, -np.sign(t.x)
    if t.kind == "lamp":
        return [("steel", box(x - .08, x + .08, 0, 1.0, z)),
                ("steel", box(x - .05, x + .05, 1, h, z)),
                ("steel", [(x, h - .08, z), (x + out * 1.1, h + .1, z), (x + out * 1.1, h + .2, z),
                           (x, h + .06, z)]),
                ("bulb", box(x + out * .75, x + out * 1.3, h + .0, h + .15, z))]
    plate = [[("red", disc(x, h - .4, z, .42)), ("white", disc(x, h - .4, z, .30))],
             [("white", box(x - .38, x + .38, h - .8, h, z)),
              ("signal", box(x - .34, x + .34, h - .76, h - .04, z)),
              ("white", disc(x, h - .4, z, .17, n=3))],
             [("red", [(x - .48, h - .8, z), (x + .48, h - .8, z), (x, h + .02, z)]),
              ("white", [(x - .27, h - .68, z), (x + .27, h - .68, z), (x, h - .24, z)])]]
    return [("steel", box(x - .045, x + .045, 0, h - .4, z)), *plate[t.detail % 3]]


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


def tree_shape(t: Thing) -> tuple[list, np.ndarray]:
    """A trunk, then the lumps of leaves; and the lumps' balls (9, 3) in metres."""
    lumps, balls = tree_crown(t.detail % 24)
    shape = [("trunk", [(t.x - .16, 0, t.z), (t.x + .16, 0, t.z), (t.x + .09, .7 * t.height, t.z),
                        (t.x - .09, .7 * t.height, t.z)])]
    keep = slice(None if t.z < 20 else 4, None)  # far away five simple lumps do
    shape += [("leaf", [(t.x + p, q, t.z) for p, q in (t.height * lump).tolist()])
              for lump in lumps[keep, ::1 if t.z < 20 else 2]]
    return shape, balls[keep] * t.height + (t.x, 0, 0)


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


def objects(scene: Scene, edge: float) -> tuple[list, np.ndarray]:
    """Everything far to near as (table row, shape) and the table's row of each vehicle.

    A row holds x, z, side, near, bay, height, palette shade, class (-1: the material's), number,
    ball. The street's things stand in front of all facades, so the houses are painted first. Every
    lump of leaves is a row of its own, lit as a ball. What lies beyond |u| = edge is left out.
    """
    painted, owner = [((0, 1e3, 0, 0, 1, 1, -1, -1, 0, 0, 0, 1), [])], {}
    number = {id(t): k for k, t in enumerate(t for t in scene.things if t.kind == "person")}
    for kind in SIZES:
        number.update((id(v), k) for k, v in enumerate(v for v in scene.vehicles if v.kind == kind))
    things = [t for t in scene.things
              if abs(scene.vanishing[0] * t.z + t.x - scene.camera[0]) < edge * t.z + 3]
    behind = [t for t in things if abs(t.x) > WALL]
    front = [t for t in things if abs(t.x) <= WALL] + scene.vehicles
    depth = lambda a: -(a.z if isinstance(a, Thing) else a.near if a.side else 1e3)
    for a in sorted(scene.buildings + behind, key=depth) + sorted(front, key=depth):
        if isinstance(a, Building):
            painted.append(((0, END, a.side, a.near, a.bay, a.height, a.shade, -1, 0, 0, 0, 1),
                            building_shape(a)))
            continue
        row = lambda side=0, cls=-1, ball=(0, 0, 1): (a.x, a.z, side, 0, 1, 1, -1, cls,
                                                      number.get(id(a), 0), *ball)
        if a.kind == "tree":
            shape, balls = tree_shape(a)
            painted += [(row(ball=ball), [lump]) for lump, ball in zip(shape, [(0, 0, 1), *balls])]
        elif a.kind in SIZES:
            seen = 1 if scene.camera[0] > a.x else -1  # the side that the camera sees
            owner[id(a)] = len(painted)
            painted.append((row(seen, CLASS_ID[a.kind]),
                            (car_shape if a.kind == "car" else truck_shape)(a, seen)))
        elif a.kind == "person":
            painted.append((row(cls=CLASS_ID["person"]), person_shape(a)))
        else:
            painted.append((row(), post_shape(a)))
    return painted, np.array([owner[id(v)] for v in scene.vehicles])


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


def ground(scene: Scene, x, z, pixel) -> tuple[np.ndarray, np.ndarray]:
    """Material and brightness of the ground at (x, z) metres; `pixel` its width in metres."""
    side, rough = np.abs(x), np.minimum(1, 6 / z)
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
    return material, tone


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
        (h, w), self.table = code.shape, np.array([row for row, _ in painted], np.float32).T
        self.scene, self.h, self.shades = scene, h, self.table[6].astype(np.int64)
        self.u = np.tile(((np.arange(w) + .5 - w / 2) / h - u0).astype(np.float32), h)
        self.v = np.repeat(((np.arange(h) + .5) / h - v0).astype(np.float32), w)
        self.object, self.material = code.ravel() >> 6, (code.ravel() & 63).astype(np.uint8)
        self.z = self.table[1][self.object]
        self.tone = np.ones(h * w, np.float32)
        self.sun, self.sky = M_SUN[self.material], M_SKY[self.material]
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
        o, (cls, number) = self.object[centre], self.table[7:9].astype(np.int64)
        self.label = label = np.where(cls[o] >= 0, cls[o], M_CLASS[self.material[centre]])
        self.instance = np.where(label >= CLASS_ID["person"], 1000 * label + number[o], label)
        self.vehicles = [(int(1000 * cls[k] + number[k]), STREETS[cls[k]]) for k in self.owner]
        haze = 1 - np.exp(-self.z[centre] / 45)                 # 0 near ... 1 far
        haze[label == CLASS_ID["sky"]] = 0
        self.haze, self.flakes = haze[:, :, None], snowfall(size)                       # (H, W, 1)
        self.wet = mirror(scene, label)

    def where(self, *names) -> np.ndarray:
        """Flat indices of the samples of these materials."""
        found = [self.material == M[name] for name in names]
        return np.flatnonzero(functools.reduce(np.logical_or, found))

    def lay_ground(self, cast, contact) -> None:
        """Road and footpath, with the shadow that the houses on the sun's side throw."""
        scene, (x_cam, y_cam) = self.scene, self.scene.camera
        g = self.ground = np.flatnonzero((self.object == 0) & (self.v > .9 * y_cam / END))
        z = self.z[g] = y_cam / self.v[g]
        x = x_cam + self.u[g] * z
        self.material[g], self.tone[g] = ground(scene, x, z, z / self.h)
        row = sorted((b for b in scene.buildings if b.side == scene.sun), key=lambda b: b.near)
        edges, roofs = (np.array(a, np.float32) for a in ([b.near for b in row],
                                                          [b.height for b in row]))
        which = np.searchsorted(edges, z - 1.2 - .25 * (WALL - scene.sun * x)) - 1
        reach = WALL - .42 * (roofs[np.maximum(which, 0)] + 1)
        self.sun[g] = np.clip((reach - scene.sun * x) * 8 + .5, 0, 1) * (1 - cast[g])
        open_sky = np.clip(1.27 - .05 * np.abs(x), .8, 1)  # the houses hide much of it from near
        self.sky[g] = (1 - .72 * contact[g]) * open_sky

    def lay_facades(self) -> None:
        """One plane per side of the street, and the skyline."""
        _, _, side, near, bay, height, *_ = self.table
        scene, f = self.scene, self.where("facade", "masonry", "roof")
        o, u = self.object[f], self.u[f]
        z = (side[o] * WALL - scene.camera[0]) / np.where(u == 0, 1e-6, u)
        z = self.z[f] = np.clip(z, 1, END).astype(np.float32)
        y = scene.camera[1] - self.v[f] * z
        plain = self.material[f] != M["facade"]
        kind, tone = facades(z, y, near[o], bay[o], height[o], z * z / (self.h * 6))
        self.material[f] = np.where(plain, self.material[f], kind)
        tone[plain] = 1 + .10 * grit(z[plain] * 30, y[plain] * 60 + 4000, .4)
        self.tone[f], shaded = tone, side[o] == scene.sun
        self.sun[f] = M_SUN[self.material[f]] * ~shaded
        self.sky[f] = M_SKY[self.material[f]] * (.82 + .18 * np.clip(y / 6, 0, 1))
        self.sky[f] *= np.where(shaded, .92, 1)
        f = self.where("gable")  # faces the camera
        self.z[f] = near[self.object[f]]
        f = self.where("far")
        x, y = self.u[f] * END, scene.camera[1] - self.v[f] * END
        self.tone[f] = 1 - .22 * ((fraction(x / 2.4) < .45) & (fraction(y / 3.2) < .5) & (y > 2))

    def lay_leaves(self) -> None:
        """Every lump a ball, lit from above and from the sun's side."""
        f = self.where("leaf")
        o, (x_cam, y_cam), (bx, by, br) = self.object[f], self.scene.camera, self.table[-3:]
        a = (x_cam + self.u[f] * self.z[f] - bx[o]) / br[o]
        b = (y_cam - self.v[f] * self.z[f] - by[o]) / br[o]
        leaf = grit(a * 18 + 31 * (o & 7) + 512, b * 18 + 512, .5)
        self.tone[f] = .92 + .28 * b + .17 * leaf
        self.sun[f] = np.clip(.55 + .45 * b + .45 * self.scene.sun * a + .25 * leaf, 0, 1.3)

    def lamplight(self, contact) -> np.ndarray:
        """Lamps on both sides every LAMP_GAP metres: one folded distance serves them all."""
        scene, g = self.scene, self.ground
        x, y = scene.camera[0] + self.u * self.z, scene.camera[1] - self.v * self.z
        dz = self.z - scene.lamps
        dz -= LAMP_GAP * np.round(dz / LAMP_GAP)
        lamp = 1.3 / (1 + ((np.abs(x) - 4) ** 2 + .5 * (y - 5.5) ** 2 + .8 * dz * dz) / 26)
        beam = np.exp(-(self.u[g] * self.z[g] / 1.8) ** 2 - ((self.z[g] - 8) / 3.5) ** 2)
        lamp[g] = lamp[g] * (1 - .6 * contact[g]) + .35 * beam
        car = np.flatnonzero((self.table[7] >= CLASS_ID["car"])[self.object])
        lamp[car] = .95  # the camera's own headlights
        self.tone[car] *= .90 + .14 * np.clip(y[car] / 1.5, 0, 1)
        side = self.where("side")  # of a vehicle: turns to the sun or away from it
        self.sun[side] = np.where(self.table[2][self.object[side]] == scene.sun, .9, .15)
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


# Streets: what one street can look like, exactly

class Street:
    """The oracle of one built-in street: all its modes, their probabilities, and how to tell them.

    A mode is an "air" (time, weather, palette) and a colour per vehicle. A region is a vehicle,
    another object, or the stuff of one class, from 1 % of the image on (vehicles: always). Regions
    are compared by mean colours on [0, 1]. A vehicle's paint is taken to change its own region
    alone (a test measures that), so that 27 x 4 renderings stand for all modes.
    """

    def __init__(self, index: int, size: tuple[int, int]):
        self.layout = paint(street_scene(0, index), size)
        laws = [COLOR_LAW[name] for _, name in self.layout.vehicles]
        self.airs = list(itertools.product(TIMES, WEATHERS, PALETTES))
        self.time = torch.tensor([list(TIMES).index(time) for time, _, _ in self.airs])
        p = torch.tensor([p for _, p in modes(self.layout)], dtype=torch.float64)
        self.p = p.view(len(self.airs), *map(len, laws))           # (27, n_1, n_2, ...)
        ids, regions = np.unique(self.layout.instance, return_inverse=True)
        self.regions = torch.from_numpy(regions.reshape(-1))
        self.area = torch.bincount(self.regions)
        self.own = own = [int(np.flatnonzero(ids == k)[0]) for k, _ in self.layout.vehicles]
        self.rest = [r for r in range(len(ids)) if r not in own
                     and self.area[r] >= 0.01 * len(self.regions)]
        self.stuff = torch.empty(len(self.airs), len(self.rest), 3)
        self.paint = torch.full((len(self.airs), len(own), 4, 3), torch.inf)
        for (a, air), c in itertools.product(enumerate(self.airs), range(4)):
            style = Style(*air, tuple(list(law)[c % len(law)] for law in laws))
            photo = torch.from_numpy(render(self.layout, style)).permute(2, 0, 1)
            means = self.means(photo[None] * 2 - 1)[0]
            if c == 0:
                self.stuff[a] = means[self.rest]
            for v, law in enumerate(laws):
                self.paint[a, v, c % len(law)] = means[own[v]]
        gaps = [(a - b).abs().max() for a, b in itertools.combinations(self.stuff, 2)]
        for v, law in enumerate(laws):
            colours = self.paint[:, v, :len(law)].unbind(1)
            gaps += [(a - b).abs().amax(1).min() for a, b in itertools.combinations(colours, 2)]
        self.tau = min(gaps).item() / 2         # half the way to the nearest other mode

    def means(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [-1, 1] -> mean colours of all regions (n, regions, 3) on [0, 1]."""
        values = (images.clamp(-1, 1).float().flatten(2).movedim(2, 0) + 1) / 2    # (H * W, n, 3)
        sums = torch.zeros(len(self.area), *values.shape[1:]).index_add_(0, self.regions, values)
        return (sums / self.area[:, None, None]).transpose(0, 1)

    def read(self, images: Tensor) -> dict[str, Tensor]:
        """The nearest mode of each image (n, 1 + vehicles), and whether it is that mode.

        valid (n,): all regions within tau of it. fits (n, R): the region alone fits some mode.
        agree (n,): every region, taken alone, votes for the same time of day. majority (n,): the
        share of the regions' area whose vote is the most frequent one.
        """
        means, rows = self.means(images), torch.arange(len(images))
        stuff = (means[:, None, self.rest] - self.stuff).abs()                # (n, 27, R, 3)
        paint = (means[:, None, self.own, None] - self.paint).abs()           # (n, 27, V, 4, 3)
        cost, colour = paint.sum(4).min(3)                                    # (n, 27, V)
        air = (stuff.sum((2, 3)) + cost.sum(2)).argmin(1)
        colour = colour[rows, air]                                            # (n, V)
        worst = stuff[rows, air].amax((1, 2))
        for v in range(len(self.own)):
            worst = torch.maximum(worst, paint[rows, air, v, colour[:, v]].amax(1))
        alone = torch.cat([stuff.amax(3), paint.amax(4).amin(3)], 2)          # (n, 27, R + V)
        votes = self.time[torch.cat([stuff.sum(3), cost], 2).argmin(1)]       # (n, R + V)
        area = self.area[self.rest + self.own] / self.area[self.rest + self.own].sum()
        most = (F.one_hot(votes, len(TIMES)) * area[:, None]).sum(1)          # (n, times)
        return {"mode": torch.cat([air[:, None], colour], 1), "valid": (worst < self.tau).float(),
                "fits": (alone.amin(1) < self.tau).float(),
                "agree": (votes == votes[:, :1]).all(1).float(), "majority": most.amax(1)}

    def times(self, modes: Tensor) -> list[str]:
        """The times of day of modes as `read` gives them."""
        return [self.airs[a][0] for a in modes[:, 0]]

    def sample(self, n: int, seed: int) -> Tensor:
        """The true sampler: n photos (n, 3, H, W) in [-1, 1] of this layout."""
        rng = np.random.default_rng([seed, 7])
        photos = [render(self.layout, draw_style(self.layout, rng)) for _ in range(n)]
        photos = np.stack([photo + STREET_GRAIN * rng.standard_normal(photo.shape)
                           for photo in photos])
        return torch.from_numpy(photos).float().clamp(0, 1).permute(0, 3, 1, 2) * 2 - 1

    def measure(self, seen: dict[str, Tensor]) -> dict[str, float]:
        """MEASURES of what `read` saw in n samples. TV is NaN where none is valid."""
        n, p = len(seen["mode"]), self.p.flatten()
        strides = torch.tensor([math.prod(self.p.shape[i + 1:]) for i in range(self.p.ndim)])
        valid = (seen["mode"] * strides).sum(1)[seen["valid"] > 0]
        count = torch.bincount(valid, minlength=len(p))
        hit, rare, tv = (count > 0).double(), p < 0.05, (count / max(len(valid), 1) - p).abs().sum()
        times = torch.bincount(self.time[seen["mode"][:, 0]], minlength=3) / n
        values = [*(seen[k].mean() for k in ("valid", "fits", "agree", "majority")),
                  hit.mean(), p[hit > 0].sum(), hit[rare].mean(),
                  tv / 2 if len(valid) else torch.tensor(math.nan),
                  (times - torch.tensor(list(TIMES.values()))).abs().sum() / 2,
                  (1 - (1 - p) ** n).mean()]
        return {name: value.item() for name, value in zip(MEASURES, values, strict=True)}


MEASURES = {  # what no real dataset allows; the row of the true sampler says what can be reached
    "joint precision": "share of samples with all regions within tau of one mode",
    "class validity": "share of regions that alone fit some mode",
    "T-agreement": "share of samples whose regions all vote for one time of day",
    "T-majority": "share of a sample's area that votes for its most voted time of day",
    "recall": "share of modes that a valid sample hits", "mass recall": "their probability",
    "rare recall": "recall of modes below 5 %",
    "TV": "total variation of the valid samples' modes from the truth",
    "time TV": "the same of the times of day of all samples' nearest modes",
    "ideal recall": "recall that n draws from the truth have on average"}


def street_of(pair: dict) -> Street | None:
    """The oracle of a batch of one of the built-in streets, unless its layout was edited."""
    label = pair["label"][0].cpu().numpy()                         # (H, W)
    oracle = Street(int(pair["name"].removeprefix("street_")), label.shape)
    return oracle if np.array_equal(oracle.layout.label, label) else None


def switches(modes: Tensor) -> int:
    """How often the mode changes along a path (n, 1 + vehicles)."""
    return int((modes[1:] != modes[:-1]).any(1).sum())


def agreement(times: list[list]) -> float:
    """P[two layouts show the same time of day for one noise]: times[layout][noise]."""
    pairs = [a == b for i, x in enumerate(times) for y in times[:i] for a, b in zip(x, y)]
    return sum(pairs) / max(len(pairs), 1)


# ------------------------------------------------------------------------------------- 7 VGG

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # RGB, on [0, 1]
BLOCKS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}              # convolutions before each pooling


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


def pretrained(option: str, weights: str, network: str, cure: str) -> dict:
    """"imagenet", which is torchvision's download of a network's weights, or those of a file."""
    if weights != "imagenet":
        return load_file(Path(weights), cure)
    source = getattr(torchvision.models, f"{network}_Weights").IMAGENET1K_V1
    try:
        return source.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{option} imagenet: {source.url} cannot be had ({error}); {cure}")


def vgg_weights(trunk: nn.Sequential, depth: int, weights: str) -> None:
    """Fill a trunk: "imagenet" (torchvision's download), "random" (seeded), or a file.

    A file is a state dict of torchvision's VGG, or an FCN8s as kept by fcn_scorer, whose trained
    trunk can stand in where ImageNet's weights are not to be had. Shapes are checked.
    """
    ways = f"use --vgg FILE (torchvision's VGG-{depth}, or a trained FCN-8s) or --vgg random"
    if weights == "random":                     # He's initialisation: the scale survives 16 layers
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(0)  # the same features in every run
        for module in trunk:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        torch.set_rng_state(state)
        return
    stored = pretrained("--vgg", weights, f"VGG{depth}", ways)
    stored = stored.get("scorer", stored)
    files = [] if not isinstance(stored, dict) else [
        v for k, v in stored.items() if str(k).startswith(("features.", "trunk."))]
    own = list(trunk.parameters())
    shapes = [tuple(p.shape) for p in own]
    if len(files) != 2 * sum(BLOCKS[depth]) or shapes != [
            tuple(getattr(v, "shape", ())) for v in files[:len(own)]]:
        raise UserError(f"--vgg {weights}: does not hold the weights of VGG-{depth}; {ways}")
    if not finite(dict(enumerate(files))):
        raise UserError(f"--vgg {weights}: holds nan or infinite weights; {ways}")
    with torch.no_grad():
        for parameter, value in zip(own, files):
            parameter.copy_(value)


class VGGFeatures(nn.Module):
    """Frozen VGG features by layer name. image (B, 3, H, W) in [-1, 1] -> {name: (B, C, h, w)}.

    "conv1_2" is the activation after its ReLU, as "relu1_2" is: in the original Caffe network the
    ReLU overwrites the convolution, and the papers read that. The gradient reaches the image, never
    the weights.

    Released code: pix2pixHD, SPADE and Lab2Pix feed [-1, 1] as it is, as normalise=False does. CRN
    pools by average (average_pool=True), the others by maximum. A width below VGG's 64 is for small
    studies with random weights.
    """

    def __init__(self, layers: tuple[str, ...], depth: int = 19, weights: str = "imagenet",
                 normalise: bool = True, average_pool: bool = False, width: int = 64):
        super().__init__()
        self.wanted = {name: name.replace("conv", "relu") for name in layers}
        with torch.device("meta"):               # no memory, no random numbers: filled below
            order = [name for name, _ in vgg_trunk(depth).named_children()]
            last = max(self.wanted.values(), key=order.index)
            self.trunk = vgg_trunk(depth, width, last, average_pool)
        self.trunk.to_empty(device="cpu")
        vgg_weights(self.trunk, depth, weights)
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
               width: int = 64, steps: int = 2000, batch_size: int = 4, lr: float = 0) -> FCN8s:
    """The scorer for a dataset: read from `folder`, else trained on its photos and kept there.

    FCN-score (pix2pix, Sec. 4.1): a network trained on real photos labels the generated ones, at
    --size; the labels that they were made from are the truth. `confusion_matrix` counts pixels over
    the whole test split, `segmentation_scores` makes the three numbers of it. The paper's scorer
    was trained on Cityscapes. Scores by another compare with each other and with its row for the
    real test photos, not with the paper's numbers.

    lr: a constant learning rate; 0 means 1e-4, and where the weights begin at random 1e-3, towards
    which it rises at first, and from which it falls in the second half: the toy presets' scorer
    then labels 92 % of the pixels of held-out streets right, with 1e-4 88 %.

    A kept scorer is used again while the settings and the files (by size and time of change) are
    those that it was made from.
    """
    rate = lambda done: lr or 1e-4
    if not lr and weights == "random":
        rate = lambda done: 1e-3 * min(1, 10 * done + 0.01, 2 - 2 * done)
    name = Path(train.data).resolve().name if train.data else "streets"
    cache = folder / f"fcn8s-{name}-{train.size[0]}x{train.size[1]}.pt"
    stats = [path.stat() for files in train.files for path in files.values()] if train.data else ()
    made = {"data": train.data, "n": len(train), "size": list(train.size), "classes": train.classes,
            "files": zlib.crc32(repr([(s.st_size, s.st_mtime_ns) for s in stats]).encode()),
            "width": width, "steps": steps, "vgg": weights, "lr": lr}
    stored = load_file(cache, "delete it; it will be trained again") if cache.is_file() else {}
    known = stored.get("made") == made
    if stored and not known:
        notice(f"{cache}: another scorer ({stored.get('made')}); training a new one")
    if not known and width != 64 and weights == "imagenet":
        raise UserError(f"--scorer-width {width}: ImageNet's VGG-16 has width 64; use --vgg random")
    rng_state, epoch = torch.get_rng_state(), train.epoch
    torch.default_generator.manual_seed(0)      # the same scorer whatever happened before
    net = FCN8s(len(train.table.names), width)
    if known:
        torch.set_rng_state(rng_state)
        fill(net, stored["scorer"], f"{cache}: scorer")
        return net.to(device).eval()
    if weights == "random":
        notice("the scorer starts from random weights, not from ImageNet's")
    vgg_weights(net.trunk, 16, weights)
    train_scorer(net, train, device, steps, batch_size, rate)
    torch.set_rng_state(rng_state)
    train.epoch = epoch
    save_file({"made": made, "scorer": net.state_dict()}, cache)
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
    return {"per-pixel acc": (hits.sum() / truth.sum()).item(),
            "per-class acc": (hits / truth)[seen].mean().item(),
            "class IOU": (hits / (truth + predicted - hits))[seen].mean().item()}


def kmeans(points: Tensor, k: int, seed: int = 0, restarts: int = 10) -> Tensor:
    """K-means: points (n, C) -> centres (min(k, distinct points), C), the best of ten starts.

    Starts are those of k-means++: each new centre is a point drawn with probability proportional to
    its squared distance from the nearest centre so far.
    """
    generator = torch.Generator().manual_seed(seed)
    points, best = points.double().cpu(), (math.inf, None)
    k = min(k, len(points.unique(dim=0)))

    def distances(centres: Tensor) -> Tensor:   # (n, K), squared; torch.cdist would round
        return (points[:, None] - centres).square().sum(2)

    for _ in range(restarts):
        centres = points[torch.randint(len(points), (1,), generator=generator)]
        while len(centres) < k:
            chance = distances(centres).amin(1)
            new = torch.multinomial(chance / chance.max(), 1, generator=generator)
            centres = torch.cat([centres, points[new]])
        for _ in range(100):
            owner = distances(centres).argmin(1)
            sums = torch.zeros_like(centres).index_add_(0, owner, points)
            sizes = torch.bincount(owner, minlength=k)[:, None]
            moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
            if torch.equal(moved, centres):
                break
            centres = moved
        inertia = distances(centres).amin(1).sum().item()
        if inertia < best[0]:
            best = (inertia, centres)
    return best[1].float()


# ------------------------------------------------------------------------------- 9 Run files

def load_file(path: Path, cure: str) -> dict:
    """torch.load of plain tensors and built-in types only: a checkpoint cannot run code here."""
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a file in it, like {path / 'checkpoint.pt'}; "
                        f"{cure}")
    if path.exists() and not path.is_file():    # a pipe would be waited for
        raise UserError(f"{path}: not a file; {cure}")
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():   # torch checks no sums
            raise ValueError("wrong checksum")
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {cure}")
    except Exception as error:                  # pickle, zip and eof errors share no narrower class
        raise UserError(f"{path}: damaged, or not plain weights ({type(error).__name__}); {cure}")
    if not isinstance(stored, dict):
        raise UserError(f"{path}: holds a {type(stored).__name__}, not a dict of weights; {cure}")
    return stored


def fill(target, stored: dict, name: str) -> None:
    """load_state_dict of a network, an optimiser or a Loader, whose error is one line.

    An optimiser takes its moments alone, and only in the shape of its parameters: a compiled update
    would read past the end of a smaller one. Its rates are the config's.
    """
    try:
        if isinstance(target, torch.optim.Optimizer):
            own = target.state_dict()["param_groups"]
            sizes = [p.shape for group in target.param_groups for p in group["params"]]
            for k, values in stored["state"].items():
                if values.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                    raise ValueError(f"parameter {k} has {', '.join(values)}")
                for what, value in values.items():
                    wanted = torch.Size() if what == "step" else sizes[k]
                    if value.shape != wanted or value.dtype != torch.float32:
                        raise ValueError(f"{what} of parameter {k} is {tuple(value.shape)}, "
                                         f"expected {tuple(wanted)}")
            stored = {"state": stored["state"], "param_groups": own}
        target.load_state_dict(stored)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(f"{name}: another {type(target).__name__} than expected here "
                        f"({' '.join(str(error).split()):.160})")
    if isinstance(target, nn.Module) and not finite(target.state_dict()):
        raise UserError(f"{name}: holds nan or infinite weights, from a run that diverged perhaps")


def finite(part) -> bool:
    """Whether all tensors of a state dict are finite numbers."""
    values = part.values() if isinstance(part, dict) else [part]
    return all(value.isfinite().all() for value in values if torch.is_tensor(value))


def save_file(content: dict, path: Path) -> None:
    """Write beside, flush, rename: at any moment `path` is the old file or the new, whole.

    Weights that are nan or infinite replace no good ones.
    """
    for name, part in content.items():
        if not finite(part):
            raise UserError(f"{path}: not saved, since the {name} is nan or infinite; the last "
                            "good one is kept. A smaller --lr may help")
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # torch reports a full disk as RuntimeError
        if temporary.is_file():
            temporary.unlink()
        if isinstance(error.__context__, OSError):          # what torch does not pass on
            error = error.__context__
        raise UserError(f"{path}: cannot be written ({error}); the last good one is kept")


def plot_log(log: list[dict], out: Path) -> None:
    """log.csv, and losses.png, whose curves are means over ten of its rows."""
    lines = [log[0], *(row.values() for row in log)]
    (out / "log.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    figure, n = matplotlib.figure.Figure(figsize=(8, 4.5)), min(10, len(log))
    axes = figure.subplots()
    for name in list(log[0])[4:]:                # after step, epoch and the loader's speed
        mean = np.convolve([float(row[name]) for row in log], np.ones(n) / n, "valid")
        axes.plot([row["step"] for row in log[n - 1:]], mean, ".-", label=name)
    axes.set(xlabel="step", ylabel="loss (mean over ten rows of log.csv)", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(out / "losses.png", dpi=120)


def trace_step(nets: dict[str, nn.Module | None], step: Callable[[], dict]) -> None:
    """The architecture figure as text: one training step's layers with parameters, the shape of
    what they last gave, FLOPs, time, memory and losses."""
    rows, size = {}, {}
    for part, net in nets.items():
        for name, module in net.named_modules() if net is not None else ():
            if name and not [*module.parameters(recurse=False)]:
                continue
            name = f"{part}.{name}".strip(".")
            size[name] = sum(p.numel() for p in module.parameters())
            module.register_forward_hook(lambda module, _, y, name=name: rows.update(
                {name: tuple(y.shape) if torch.is_tensor(y) else f"{len(y)} outputs"}))
    with FlopCounterMode(display=False) as flops:
        step()
    for name, shape in rows.items():
        print(f"{name:44}{str(shape):>22}{size[name]:14,}")
    clock = time.time()
    losses = {name: f"{value.item():.4f}" for name, value in step().items()}
    memory = torch.cuda.max_memory_allocated() / 2 ** 30 if torch.cuda.is_available() else 0
    print(f"a step: {flops.get_total_flops() / 1e9:.1f} GFLOP, {time.time() - clock:.3f} s"
          + (f", {memory:.1f} GiB of GPU memory" if memory else "")
          + "; losses: " + ", ".join(f"{name} {value}" for name, value in losses.items()))


def run_of(path: str | Path) -> str:
    """The folder of the run that a checkpoint is of; "" for other weights, like the authors'."""
    return str(Path(path).parent) if Path(path).name == "checkpoint.pt" else ""


def free_folder(kind: str) -> Path:
    """The next free runs/<kind>-N, claimed by making it."""
    for n in itertools.count(1):
        path = Path("runs") / f"{kind}-{n}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if Path("runs").is_file():
                raise UserError("runs: a file; runs are kept in a folder of this name; say where "
                                "with --out")
        except OSError as error:
            raise UserError(f"{path}: cannot be made ({error.strerror}); say where with --out")


def lock(folder: Path) -> IO:
    """Makes a run's folder; it is this process's alone until the returned file is closed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})")
    try:
        import fcntl                            # not on Windows
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)    # gone with the process, however it ends
    except ImportError:
        pass
    except OSError:
        raise UserError(f"--out {folder}: in use, a run writes to it at this moment")
    return file
