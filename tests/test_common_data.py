"""common.py, rooms 2 to 5: class tables, files, Dataset and the data doctor.

Every file is written by the test. The number of an example is written into its pixels, so a wrong
pair is seen by its values, whatever the files are called.
"""

import contextlib
import io
import itertools
import multiprocessing
import os
import random
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import png, refused, save
from PIL import Image

import common
from common import Dataset, UserError, class_table, read_image, read_instance, read_label


def grey(value: int, shape=(12, 16)) -> np.ndarray:
    return np.full(shape, value, np.uint8)


def photo(k: int, shape=(12, 16)) -> np.ndarray:
    """Flat red 20 k + 10: survives JPEG and tells k."""
    return np.full((*shape, 3), (20 * k + 10, 90, 60), np.uint8)


def number_of(image: torch.Tensor) -> float:
    """k of a photo in [-1, 1], read off its red channel."""
    return float((image[0].mean() + 1) * 127.5 - 10) / 20


def example(root: Path, name, label, image=None, instance=None) -> None:
    """One training example in pix2pixHD's layout, whose classes are counted."""
    label = np.asarray(label)
    save(root / f"train_label/{name}.png", label)
    save(root / f"train_img/{name}.png", photo(1, label.shape) if image is None else image)
    if instance is not None:
        save(root / f"train_inst/{name}.png", instance)


def packed_png(ids: np.ndarray, depth: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits; the last two Pillow does not write."""
    bits = np.stack([ids >> k & 1 for k in reversed(range(depth))], 2).reshape(len(ids), -1)
    lines = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, 1))
    return png(*ids.shape, depth, 0, lines)


def pgm(maxval: int) -> bytes:
    return b"P5 10 6 %d\n" % maxval + IDS.tobytes()


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def palette_png(ids: np.ndarray) -> Image.Image:
    image = Image.fromarray(ids.astype(np.uint8), mode="P")
    image.putpalette([(7 * i + 3 * c) % 256 for i in range(256) for c in range(3)])
    return image


# ------------------------------------------------------------------------------- class tables

@pytest.mark.parametrize("name, n, unknown", [("cityscapes", 35, False), ("camvid", 11, True),
                                              ("facades", 12, False), ("ade20k", 150, True),
                                              ("coco_stuff", 182, True), ("streets", 12, False)])
def test_class_tables_have_the_published_numbers_of_classes(name, n, unknown):
    table = class_table(name)
    assert len(table.names) == n == len(set(table.names))
    assert table.channels == n + unknown
    assert table.palette.shape == (n + unknown, 3) and table.palette.dtype == np.uint8
    assert not unknown or not table.palette[-1].any()
    shared = 6 * (name == "cityscapes")              # five are black; both poles; car and plate
    assert len(np.unique(table.palette, axis=0)) == table.channels - shared
    assert table.things <= set(table.names) and table.things
    assert all(name == " ".join(name.split()) and "_" not in name for name in table.names)


def test_ids_of_well_known_classes():
    """Spot checks against the published lists (labels.py, objectInfo150, labels.txt)."""
    at = lambda name, k: class_table(name).names[k]
    assert [at("cityscapes", k) for k in (7, 26, 33, 34)] == [
        "road", "car", "bicycle", "license plate"]
    assert tuple(class_table("cityscapes").palette[23]) == (70, 130, 180)
    assert [at("ade20k", k) for k in (0, 2, 12, 20, 149)] == [
        "wall", "sky", "person", "car", "flag"]
    assert [at("coco_stuff", k) for k in (0, 2, 90, 148, 156, 181)] == [
        "person", "car", "hair brush", "road", "sky-other", "wood"]
    assert (at("camvid", 0), at("camvid", 8), at("facades", 2)) == ("sky", "car", "window")


def test_classes_by_number_and_by_name():
    assert len(class_table("9").names) == 9 and class_table("9").unknown == 255
    assert len(np.unique(class_table("300").palette, axis=0)) == 301
    for bad in ("0", "-3", "nine", "65536", "1.5", "", "\N{SUPERSCRIPT TWO}"):
        with refused("--classes", "cityscapes"):
            class_table(bad)


# ------------------------------------------------------------------------------------ layouts

SIX = "000000{:06d}"                                 # COCO: twelve digits
CASES = {  # layout: classes, {role: path}, raw label of example k, names of the splits, key
    "Cityscapes": ("cityscapes", {
        "label": "gtFine/{s}/aachen{o}/{k}_gtFine_labelIds.png",
        "instance": "gtFine/{s}/aachen{o}/{k}_gtFine_instanceIds.png",
        "image": "leftImg8bit/{s}/aachen{o}/{k}_leftImg8bit.jpg"}, 0, ("train", "val"),
        "aachen_{:06d}_000019"),
    "pix2pixHD Cityscapes": ("cityscapes", {
        "label": "{s}_label/{k}_gtFine_labelIds.png",
        "instance": "{s}_inst/{k}_gtFine_instanceIds.png",
        "image": "{s}_img/{k}_leftImg8bit.jpg"}, 0, ("train", "test"), "bochum_{:06d}_000019"),
    "SPADE COCO-Stuff": ("coco_stuff", {
        "label": "{s}_label/{k}.png", "instance": "{s}_inst/{k}.png", "image": "{s}_img/{k}.jpg"},
        0, ("train", "val"), SIX),
    "pix2pixHD": ("5", {
        "label": "{s}_label/{k}.png", "instance": "{s}_inst/{k}.png", "image": "{s}_img/{k}.jpg"},
        0, ("train", "test"), "mine {}"),
    "pix2pixHD pairs": ("", {"A": "{s}_A/{k}_A.png", "B": "{s}_B/{k}_B.jpg"}, 0, ("train", "test"),
                        "scene{}"),
    "ADE20K": ("ade20k", {"label": "annotations/{s}/{k}.png", "image": "images/{s}/{k}.jpg"},
               1, ("training", "validation"), "ADE_{:08d}"),
    "CamVid": ("camvid", {"label": "{s}annot/{k}.png", "image": "{s}/{k}.jpg"}, 0,
               ("train", "test"), "0001TP_{:06d}"),
    "GTA-5": ("cityscapes", {"label": "labels/{k}.png", "image": "images/{k}.jpg"}, 0, ("", ""),
              "{:05d}"),
    "CMP Facades": ("facades", {"label": "base/{k}.png", "image": "base/{k}.jpg"}, 1, ("", ""),
                    "cmp_b{:04d}"),
    "unpaired": ("", {"A": "{s}A/{k}.jpg", "B": "{s}B/{k}.png"}, 0, ("train", "test"), "n{}"),
    "A and B folders": ("", {"A": "A/{s}/{k}.jpg", "B": "B/{s}/{k}.png"}, 0, ("train", "val"),
                        "n{}"),
    "pix2pix pairs": ("", {"pair": "{s}/{k}.jpg"}, 0, ("train", "val"), "{}"),
}


def lay_out(root: Path, layout: str, numbers, split: int = 0, roles=None) -> None:
    """Write examples of these numbers in shuffled order, as `layout` lies on disk."""
    _, paths, first, splits, key = CASES[layout]
    jobs = [(role, k) for role in roles or paths for k in numbers]
    random.Random(3).shuffle(jobs)
    for role, k in jobs:
        path = root / paths[role].format(s=splits[split], k=key.format(k), o="ab"[k % 2])
        if role == "label":
            ids = grey(k + first)
            ids[:, :8] = (k + 1) % 5 + first         # two classes in each
            save(path, palette_png(ids) if layout in ("GTA-5", "CMP Facades") else ids)
        elif role == "instance":
            save(path, np.full((12, 16), 26000 + k, np.uint16))
        elif role == "pair":
            save(path, np.concatenate([photo(k), photo(k + 6)], 1))
        else:
            save(path, photo(k + 6 * (role == "B")))


def check_item(item: dict, layout: str, direction: str = "AtoB") -> int:
    """All parts of an item carry the same number, which is returned."""
    roles = CASES[layout][1]
    if "label" in roles:
        k = int(item["label"][0, -1])
        assert int(item["label"][0, 0]) == (k + 1) % 5
        assert item["label"].dtype == torch.int64 and item["label"].shape == (12, 16)
        assert number_of(item["image"]) == pytest.approx(k, abs=.2)
    else:
        parts = [number_of(item[p]) for p in ("input", "image")]
        a, b = parts if direction == "AtoB" else reversed(parts)
        k = round(a)
        assert a == pytest.approx(k, abs=.2) and b == pytest.approx(k + 6, abs=.2)
    if "instance" in roles:
        assert item["instance"].dtype == torch.int64 and (item["instance"] == 26000 + k).all()
    assert item["image"].shape == (3, 12, 16) and item["image"].dtype == torch.float32
    assert item["image"].min() >= -1 and item["image"].max() <= 1
    return k


def numbers(dataset: Dataset, layout: str, direction: str = "AtoB") -> list[int]:
    return [check_item(dataset[i], layout, direction) for i in range(len(dataset))]


@pytest.mark.parametrize("capitals", [False, True])
@pytest.mark.parametrize("layout", CASES)
def test_every_layout_is_found_and_pairs_the_right_files(layout, capitals, tmp_path):
    classes, roles, _, splits, key = CASES[layout]
    lay_out(tmp_path, layout, [4, 0, 2, 3, 1])
    if splits[0]:
        lay_out(tmp_path, layout, [3, 1], split=1)
    for path in [p for p in tmp_path.rglob("*.*") if capitals and p.is_file()]:
        path.rename(path.with_suffix(path.suffix.upper()))
    (tmp_path / "readme.txt").write_text("a file that is no image")
    train, test = Dataset(str(tmp_path), "train"), Dataset(str(tmp_path), "test")
    assert train.layout.name == test.layout.name == layout
    assert train.classes == classes
    want = {"name", "image"} | ({"label"} | {"instance"} & set(roles)
                                if "label" in roles else {"input"})
    for dataset in (train, test):
        assert all(set(item) == want for item in (dataset[i] for i in range(len(dataset))))
    trained, held_out = numbers(train, layout), numbers(test, layout)
    if splits[0]:
        assert (trained, held_out) == ([0, 1, 2, 3, 4], [1, 3])    # by key, however written
    else:
        assert sorted(trained + held_out) == [0, 1, 2, 3, 4] and trained and held_out
    assert all(key.format(k) in train[i]["name"] for i, k in enumerate(trained))
    if "label" not in roles:
        assert numbers(Dataset(str(tmp_path), direction="BtoA"), layout, "BtoA") == trained
        assert not Dataset(str(tmp_path), unpaired=True).unpaired, "they have names in common"


@pytest.mark.parametrize("layout, roles, keys", [
    ("pix2pixHD", ["label", "instance"], {"label", "instance"}),
    ("pix2pixHD Cityscapes", ["label", "instance"], {"label", "instance"}),
    ("Cityscapes", ["label", "instance"], {"label", "instance"}),
    ("pix2pixHD", ["label", "image"], {"label", "image"}),
    ("pix2pixHD pairs", ["A"], {"input"})])          # all that AtoB needs
def test_what_a_split_has_no_files_of_its_items_lack(layout, roles, keys, tmp_path):
    lay_out(tmp_path, layout, [0, 1])
    lay_out(tmp_path, layout, [2, 3], split=1, roles=roles)
    test = Dataset(str(tmp_path), "test", classes="5" if layout == "pix2pixHD" else "")
    assert [set(test[i]) for i in range(2)] == [keys | {"name"}] * 2
    if "label" in keys:
        assert [int(test[i]["label"][0, -1]) for i in range(2)] == [2, 3]


@pytest.mark.parametrize("folder", ["", "train"])
def test_photos_only_flat_and_in_a_split_folder(folder, tmp_path):
    for k in (3, 1, 0, 2):
        save(tmp_path / folder / f"p{k}.jpg", photo(k))
    train, test = (Dataset(str(tmp_path), s, photos_only=True) for s in ("train", "test"))
    assert train.layout.name == "photos" and set(train[0]) == {"image", "name"}
    trained, held_out = ([round(number_of(d[i]["image"])) for i in range(len(d))]
                         for d in (train, test))
    if folder:
        assert trained == held_out == [0, 1, 2, 3]   # no test split: the training photos
    else:
        assert sorted(trained + held_out) == [0, 1, 2, 3] and held_out


def test_streets_are_the_dataset_without_a_folder():
    train, test = Dataset(size=(32, 48)), Dataset(split="test", size=(32, 48))
    assert train.layout.name == "streets" and train.classes == "streets"
    assert (len(train), len(test)) == (400, 50)
    item = train[0]
    assert set(item) == {"label", "instance", "image", "name"}
    assert item["image"].shape == (3, 32, 48) and item["label"].shape == (32, 48)
    assert -1 <= item["image"].min() and item["image"].max() <= 1
    assert not {train[i]["name"] for i in range(5)} & {test[i]["name"] for i in range(5)}
    assert not torch.equal(train[0]["label"], test[0]["label"])
    before = item["label"].clone()
    item["label"].fill_(3)                           # an item is the reader's to change
    item["instance"].fill_(3)
    assert torch.equal(train[0]["label"], before) and train[0]["instance"].max() > 3
    with refused("--size 16 64", "32"):
        Dataset(size=(16, 64))
    with refused("--classes 5"):                     # their ids run to 11
        Dataset(size=(32, 32), classes="5")


# ------------------------------------------------------------------------------- split lists

@pytest.mark.parametrize("lists", [("train", "test"), ("train", "val"), ("train",), ("test",)])
def test_gta_split_lists_are_obeyed_and_never_overlap(lists, tmp_path):
    lay_out(tmp_path, "GTA-5", range(5))
    chosen = {"train": ["00000.png", "00003", "00004.png"], "test": ["00001.png", "00002.png"]}
    for name in lists:
        entries = chosen["train" if name == "train" else "test"]
        (tmp_path / f"{name}.txt").write_text("\n".join(entries))
    trained, held_out = (numbers(Dataset(str(tmp_path), s), "GTA-5") for s in ("train", "test"))
    if "train" in lists:
        assert trained == [0, 3, 4]
    if len(lists) == 2 or "train" not in lists:
        assert held_out == [1, 2]
    assert held_out and not set(trained) & set(held_out), "test examples are trained on"


def test_split_lists_with_a_mark_with_strangers_and_with_doubles(tmp_path, capsys):
    """Windows begins a UTF-8 text with a mark (EF BB BF), which is no part of the first name."""
    lay_out(tmp_path, "GTA-5", range(5))
    for path in tmp_path.glob("*/00003.*"):
        path.rename(path.with_stem("links um"))
    (tmp_path / "train.txt").write_bytes(b"links um.png\r\n00004\r\n")
    assert Dataset(str(tmp_path)).names == ["00004", "links um"]
    (tmp_path / "train.txt").write_bytes(
        b"\xef\xbb\xbf00000.png\r\n00002.png\r\n00009.png\r\n\r\n")
    (tmp_path / "test.txt").write_text("00001.png\n00002.png\n\n")
    assert numbers(Dataset(str(tmp_path)), "GTA-5") == [0, 2]
    assert numbers(Dataset(str(tmp_path), "test"), "GTA-5") == [1]
    said = capsys.readouterr().out
    assert "train.txt: 1 of 3 entries name no file: 00009" in said
    assert "1 files are in both lists" in said and "00002" in said


def test_without_lists_every_tenth_is_held_out(tmp_path):
    for k in range(30):
        save(tmp_path / f"{k:02d}.png", grey(k, (2, 2)))
    train, test = (Dataset(str(tmp_path), s, photos_only=True) for s in ("train", "test"))
    names = [{d.read(i)["name"] for i in range(len(d))} for d in (train, test)]
    assert len(names[0]) == 27 and len(names[1]) == 3 and not names[0] & names[1]


# ------------------------------------------------------------------------------------ pairing

@pytest.mark.parametrize("names, layout", [
    (["0000001", "0000002", "0000003"], "pix2pixHD"),           # COCO's have twelve digits
    (["a", "000000000007", "c"], "pix2pixHD"),                  # one file may be called anything
    (["a", "000000000007", "000000000008"], "SPADE COCO-Stuff")])
def test_the_layout_is_the_one_that_most_files_follow(names, layout, tmp_path, capsys):
    for k, name in enumerate(names):
        example(tmp_path, name, grey(k))
    dataset = Dataset(str(tmp_path))
    assert dataset.layout.name == layout and len(dataset) == 3 - (layout != "pix2pixHD")
    odd = sum(len(name) == 12 for name in names)
    assert (f"{odd} of 3 label files are named as in SPADE COCO-Stuff" in
            capsys.readouterr().out) == bool(odd)


@pytest.mark.parametrize("ends", [("label", "img", "inst"), ("label", "label", "label"),
                                  ("label", "image", "instance")])
def test_names_that_end_in_their_role(ends, tmp_path):
    """a_label.png beside a_img.png, or the same name a_label.png in all folders."""
    for folder, end, array in zip(("label", "img", "inst"), ends, (grey(2), photo(2), grey(5))):
        save(tmp_path / f"train_{folder}" / f"a_{end}.png", array)
    assert set(Dataset(str(tmp_path))[0]) == {"label", "image", "instance", "name"}
    assert Dataset(str(tmp_path)).names == ["a"]


def test_unpaired_folders_need_no_common_names(tmp_path):
    """Lab2Pix-V1 learns without pairs: other names, other numbers, other sizes."""
    for k in range(3):
        save(tmp_path / "trainA" / f"layout{k}.png", photo(k))
    for k in range(2):
        save(tmp_path / "trainB" / f"photo{k}.jpg", photo(k + 6, (10, 20)))
    with refused("no B of the same name"):              # the paired scripts must not mix them up
        Dataset(str(tmp_path), size=(8, 8))
    dataset = Dataset(str(tmp_path), size=(8, 8), unpaired=True)
    assert dataset.layout.name == "unpaired" and dataset.unpaired and len(dataset) == 3
    dataset.check_sizes()
    assert {"input", "image"} <= set(dataset[0]) and dataset[2]["image"].shape == (3, 8, 8)


# ------------------------------------------------------------------------------------- labels

IDS = np.uint8(np.arange(60).reshape(6, 10) % 9)     # ids 0..8


READABLE = {                                         # kind: (how many ids, what writes them)
    "grey": (9, lambda p: save(p, IDS)), "grey 16": (9, lambda p: save(p, np.uint16(IDS))),
    "palette": (9, lambda p: save(p, palette_png(IDS))),
    "bmp": (9, lambda p: save(p, IDS, format="BMP")),
    "tiff 16": (9, lambda p: save(p, np.uint16(IDS), format="TIFF")),
    "tiff 16 lzw": (9, lambda p: save(p, np.uint16(IDS), format="TIFF", compression="tiff_lzw")),
    "pgm of 255 greys": (9, lambda p: p.write_bytes(pgm(255))),
    "1 bit": (2, lambda p: p.write_bytes(packed_png(IDS % 2, 1))),
    "2 bits": (4, lambda p: p.write_bytes(packed_png(IDS % 4, 2))),    # Pillow spreads these
    "4 bits": (9, lambda p: p.write_bytes(packed_png(IDS, 4)))}        # over 0..255


@pytest.mark.parametrize("kind", READABLE)
def test_label_files_of_every_kind_give_the_ids_that_they_store(kind, tmp_path):
    path, (n, make) = tmp_path / "l.png", READABLE[kind]
    make(path)
    for ids in (read_label(path, class_table(str(n))), read_instance(path)):
        assert ids.dtype == torch.int64 and np.array_equal(ids, IDS % n)


@pytest.mark.parametrize("alpha", [False, True])
def test_colour_label_map_in_the_known_palette(alpha, tmp_path):
    row = [(128, 64, 128), (128, 128, 128), (64, 0, 128), (0, 0, 0)]      # road, sky, car, unknown
    array = np.tile(np.array(row, np.uint8), (5, 1, 1))
    if alpha:
        array = np.concatenate([array, np.full((5, 4, 1), 255, np.uint8)], 2)
    label = read_label(save(tmp_path / "l.png", array), class_table("camvid"))
    assert np.array_equal(label, np.tile([3, 0, 8, 11], (5, 1)))
    array[0, 0, :3], array[1, 1, :3] = (1, 2, 3), (250, 128, 64)
    with refused("l.png", "(1, 2, 3)", "(250, 128, 64)", "palette", "2"):
        read_label(save(tmp_path / "l.png", array), class_table("camvid"))


def test_a_0_255_mask_is_named_where_it_fits_the_classes(tmp_path, capsys):
    """--classes 2 with 0/255 masks: without a word all of class 1 would be trained as unknown."""
    example(tmp_path, "a", np.uint8(255 * (IDS > 4)))
    common.describe(Dataset(str(tmp_path), classes="2"))
    assert "mask" in capsys.readouterr().out


def test_labels_that_are_all_unknown_are_refused(tmp_path):
    example(tmp_path, "a", grey(255))
    with refused(tmp_path, "unknown", "id 255"):
        common.describe(Dataset(str(tmp_path), classes="2"))


UNREADABLE = {                                       # as ids: other values would come out
    "jpeg in a tiff": lambda p: Image.fromarray(photo(1)).save(p, "TIFF", compression="jpeg"),
    "white is zero": lambda p: Image.fromarray(np.uint8(IDS)).save(p, "TIFF", tiffinfo={262: 0}),
    "white is zero, 16 bit": lambda p: Image.fromarray(np.uint16(IDS)).save(
        p, "TIFF", tiffinfo={262: 0}),
    "jpeg 2000": lambda p: Image.fromarray(np.uint8(IDS)).save(p, "JPEG2000"),
    "lossless webp": lambda p: Image.fromarray(photo(1)).save(p, "WEBP", lossless=True),
    "pgm of 15 greys": lambda p: p.write_bytes(pgm(15)),
    "bitmap, 1 is black": lambda p: Image.fromarray(IDS > 3).save(p, "PPM"),
    "colours of 16 bit": lambda p: p.write_bytes(png(1, 2, 16, 2, bytes(13)))}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_maps_that_pillow_would_change_are_refused(kind, tmp_path):
    path = tmp_path / "a.png"
    UNREADABLE[kind](path)
    for read in (read_instance, lambda p: read_label(p, class_table("256"))):
        with refused("a.png"):
            read(path)


FOREIGN = {"EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
           "PDF": b"%PDF-1.4\n"} | {kind: encoded(kind) for kind in ("ICO", "TGA", "SGI", "PCX",
                                                                     "DDS", "JPEG2000")}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_formats_are_never_opened(kind, tmp_path):
    """Pillow hands an EPS file to Ghostscript, whatever its name."""
    path = tmp_path / "a.png"
    path.write_bytes(FOREIGN[kind])
    for read in (read_image, read_instance, lambda p: read_label(p, class_table("256"))):
        with refused("a.png", "PNG"):
            read(path)


@pytest.mark.parametrize("classes, value, words", [
    ("cityscapes", 35, ("35", "0..34", "--classes 36")), ("9", 9, ("9", "0..8", "255")),
    ("facades", 0, ("0", "1..12")), ("facades", 13, ("13", "1..12", "--classes 14")),
    ("ade20k", 151, ("151", "1..150")), ("camvid", 12, ("12", "0..10", "11"))])
def test_an_id_outside_names_file_value_and_cure(classes, value, words, tmp_path):
    ids = np.full((4, 4), 1, np.uint8)
    ids[2, 1] = value
    with refused("bad.png", "--classes", *words):
        read_label(save(tmp_path / "bad.png", ids), class_table(classes))


@pytest.mark.parametrize("classes, raw, want", [
    ("coco_stuff", [0, 181, 255], [0, 181, 182]), ("9", [0, 8, 255], [0, 8, 9]),
    ("ade20k", [0, 1, 150], [150, 0, 149]), ("facades", [1, 2, 12], [0, 1, 11]),
    ("camvid", [0, 10, 11], [0, 10, 11]), ("cityscapes", [0, 7, 34], [0, 7, 34]),
    ("65001", [0, 32767, 32768, 65000], [0, 32767, 32768, 65000]),
    ("300", [0, 255, 299, 65535], [0, 255, 299, 300])])
def test_file_values_become_ids(classes, raw, want, tmp_path):
    path = save(tmp_path / "l.png", np.array([raw], np.uint8 if max(raw) < 256 else np.uint16))
    assert read_label(path, class_table(classes)).tolist() == [want]
    assert max(want) < class_table(classes).channels
    assert read_instance(path).tolist() == [raw]


@pytest.mark.parametrize("files, classes, first", [
    ([[255, 3], [255, 6]], "7", [7, 3]),
    ([[0, 255], [8, 1]], "9", [0, 9]),               # ids 0 and 255 alone, but not in all: no mask
    ([[0, 255, 299, 65535]], "300", [0, 255, 299, 300])])
def test_classes_are_counted_where_the_layout_has_none(files, classes, first, tmp_path, capsys):
    for k, raw in enumerate(files):
        example(tmp_path, k, np.array([raw], np.uint16))
    dataset = Dataset(str(tmp_path))
    assert (dataset.classes, dataset[0]["label"].tolist()) == (classes, [first])
    assert f"{classes} classes" in capsys.readouterr().out
    assert Dataset(str(tmp_path), classes="400").table.channels == 401


# ---------------------------------------------------------------------------------- instances

def test_colour_instances_are_r_256g_65536b(tmp_path):
    array = np.array([[(1, 0, 0), (0, 1, 0), (0, 0, 1), (5, 4, 3), (255, 255, 255)]], np.uint8)
    want = [[1, 256, 65536, 5 + 4 * 256 + 3 * 65536, 2 ** 24 - 1]]
    assert read_instance(save(tmp_path / "i.png", array)).tolist() == want
    alpha = np.concatenate([array, np.full((1, 5, 1), 9, np.uint8)], 2)
    assert read_instance(save(tmp_path / "j.png", alpha)).tolist() == want


def test_32_bit_instances_survive_exactly(tmp_path):
    ids = np.array([[0, 70000, 16777215, 16777214]], np.int32)
    path = save(tmp_path / "train_inst" / "a.tif", Image.fromarray(ids, mode="I"))
    assert read_instance(path).tolist() == ids.tolist()
    save(tmp_path / "train_label" / "a.png", np.zeros((1, 4), np.uint8))
    item = Dataset(str(tmp_path), size=(2, 8), classes="2")[0]    # resizing goes through float32
    assert set(item["instance"].unique().tolist()) == set(ids.ravel().tolist())
    for bad in (2 ** 24, -1):
        path = save(tmp_path / "b.tif", Image.fromarray(np.full((2, 2), bad, np.int32), mode="I"))
        with refused("b.tif", bad):
            read_instance(path)


# ------------------------------------------------------------------------ resizing and cropping

def coordinates(root: Path) -> None:
    """An example that holds its coordinates: label x, instance 36 y + x, photo both."""
    y, x = np.mgrid[:36, :36]
    colours = np.stack([7 * x, 7 * y, 0 * x], 2).astype(np.uint8)
    example(root, "a", np.uint8(x), colours, np.uint16(36 * y + x))


def test_label_instance_and_photo_get_the_same_crop_and_flip(tmp_path):
    coordinates(tmp_path)
    dataset = Dataset(str(tmp_path), size=(32, 32), jitter=True, mirror=True, classes="36")
    places, flips = set(), 0
    for dataset.epoch in range(200):
        item = dataset[0]
        x, y = item["instance"] % 36, item["instance"] // 36
        assert torch.equal(item["label"], x)
        r, g = (((item["image"][c] + 1) * 127.5 / 7).round().long() for c in (0, 1))
        assert torch.equal(r, x) and torch.equal(g, y)
        flip = bool(x[0, 0] > x[0, -1])
        assert (x.max() - x.min(), y.max() - y.min()) == (31, 31)
        places.add((int(x.min()), int(y.min()), flip))
        flips += flip
    assert {p[0] for p in places} == {p[1] for p in places} == {0, 1, 2, 3, 4}    # 36 - 32
    assert 70 <= flips <= 130                        # four standard deviations
    assert len(places) > 35                          # of 50: row, column and flip are independent


@pytest.mark.parametrize("size", [(5, 7), (24, 32), (31, 50), (12, 16)])
def test_resizing_adds_no_id(size, tmp_path):
    ids = np.random.default_rng(0).choice([0, 3, 200], (12, 16)).astype(np.uint8)
    example(tmp_path, "a", ids, instance=np.uint16(ids) * 300)
    item = Dataset(str(tmp_path), size=size, classes="201")[0]
    assert item["label"].shape == item["instance"].shape == item["image"].shape[1:] == size
    assert set(item["label"].unique().tolist()) <= {0, 3, 200}
    assert torch.equal(item["instance"], 300 * item["label"])


def test_size_none_keeps_each_files_own_size(tmp_path):
    save(tmp_path / "0.png", photo(0, (9, 7)))
    save(tmp_path / "1.png", photo(1, (5, 30)))
    save(tmp_path / "2.png", photo(2, (8, 8)))
    dataset = Dataset(str(tmp_path), photos_only=True, jitter=True)
    assert [tuple(dataset[i]["image"].shape[1:]) for i in range(len(dataset))] == [(9, 7), (8, 8)]


def test_labels_and_photos_shrink_to_the_same_place(tmp_path):
    """An edge at source pixel e, seen after shrinking fourfold in the label and in the photo.

    Nearest neighbour at pixel centres errs by half a source pixel at most, taken over all e.
    """
    edges = np.arange(20, 100)
    left = np.arange(128)[None] >= edges[:, None]
    example(tmp_path, "a", np.uint8(left), np.uint8(np.repeat(255 * left[..., None], 3, 2)))
    item = Dataset(str(tmp_path), size=(80, 32), classes="2")[0]
    in_label = 4 * (item["label"] == 0).sum(1).double()
    in_photo = 4 * (1 - (item["image"][0].double() + 1) / 2).sum(1)
    assert abs((in_photo - torch.from_numpy(edges)).mean()) < .3
    assert abs((in_label - in_photo).mean()) <= .75, "the labels are shifted against the photos"


def test_photos_shrink_without_aliasing(tmp_path):
    """White noise of spread .577 shrinks fourfold to below .25; point samples would keep .4."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    save(tmp_path / "a.png", noise)
    assert Dataset(str(tmp_path), size=(32, 32), photos_only=True)[0]["image"].std() < .25


# ------------------------------------------------------------------------------------- photos

def test_photo_grey_is_repeated(tmp_path):
    ramp = np.arange(200, dtype=np.uint8).reshape(10, 20)
    image = read_image(save(tmp_path / "g.png", ramp))
    assert image.shape == (3, 10, 20) and image.dtype == torch.uint8
    assert all(np.array_equal(channel, ramp) for channel in image)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_photo_alpha_is_dropped_with_one_notice(mode, tmp_path, capsys):
    for name in ("a", "b", "c"):
        image = Image.fromarray(photo(3)).convert(mode)
        image.putalpha(Image.fromarray(grey(7)))
        save(tmp_path / f"{name}.png", image)
        got = read_image(tmp_path / f"{name}.png")
        want = Image.fromarray(photo(3)).convert("L" if mode == "LA" else "RGB").convert("RGB")
        assert np.array_equal(got.permute(1, 2, 0), want)
    assert capsys.readouterr().out.count("transparency is dropped") == 1     # not once per file


def test_photo_cmyk(tmp_path):
    path = save(tmp_path / "c.jpg", Image.fromarray(photo(5)).convert("CMYK"), quality=95)
    mean = read_image(path).float().mean((1, 2))
    assert Image.open(path).mode == "CMYK" and abs(mean - torch.tensor([110., 90, 60])).max() < 6


def test_photo_16_bit_is_scaled_by_its_range_with_a_notice(tmp_path, capsys):
    deep = np.linspace(1000, 41000, 192).round().astype(np.uint16).reshape(12, 16)
    got = read_image(save(tmp_path / "d.png", deep))
    want = (deep.astype(float) - 1000) / 40000 * 255
    assert np.abs(got.numpy() - want).max() <= .51
    assert re.search(r"note: .*1000.*41000", capsys.readouterr().out)
    flat = read_image(save(tmp_path / "e.png", np.full((4, 4), 500, np.uint16)))
    assert flat.shape == (3, 4, 4)                   # a range of nothing divides by nothing
    for bad in (np.nan, np.inf):                     # one would make the whole photo black
        path = save(tmp_path / "f.tif", np.float32([[0, 1], [bad, 2]]))
        with refused("f.tif", "1 pixels"):
            read_image(path)


def test_photo_animated_gif_gives_its_first_frame_with_a_notice(tmp_path, capsys):
    frames = [Image.fromarray(photo(k)) for k in (2, 5, 8)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    got = read_image(tmp_path / "a.gif")
    assert got.shape == (3, 12, 16) and abs(got[0].float().mean() - 50) < 4
    assert "first frame" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")                # Pillow warns of corrupt EXIF and TIFF tags
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "PPM", "WEBP"])
def test_no_damage_ends_in_a_traceback(kind, tmp_path):
    """Files with random bytes changed or the end missing: an image or a UserError, nothing else."""
    rng, whole = np.random.default_rng(5), encoded(kind)
    path = tmp_path / "x.png"
    for _ in range(150):
        data = bytearray(whole)
        head = 80 if rng.random() < .5 else len(data)
        for at in rng.integers(0, head, rng.integers(1, 8)):
            data[at] = rng.integers(256)
        path.write_bytes(bytes(data[:int(rng.integers(1, len(data) + 1))]
                         if rng.random() < .4 else data))
        for read in (read_image, read_instance):
            try:
                assert read(path).ndim >= 2
            except UserError as error:
                assert str(path) in str(error)


# ------------------------------------------------------------------------- faults of a dataset

def test_classes_of_a_checkpoint_are_compared_with_the_datas(tmp_path):
    lay_out(tmp_path / "city", "Cityscapes", [0])
    lay_out(tmp_path / "own", "pix2pixHD", [0])      # its ids say no names
    for trained in ("camvid", "19"):
        common.same_classes(Dataset(str(tmp_path / "own"), classes=trained), trained)
        city = Dataset(str(tmp_path / "city"), classes=trained)
        with refused(tmp_path, "cityscapes", trained, "--classes"):
            common.same_classes(city, trained)
    common.same_classes(city, "cityscapes")


def test_a_dataset_without_the_files_that_a_task_needs(tmp_path):
    lay_out(tmp_path / "pairs", "pix2pix pairs", [0])
    lay_out(tmp_path / "labels", "pix2pixHD", [0], roles=["label"])
    pairs, labels = Dataset(str(tmp_path / "pairs")), Dataset(str(tmp_path / "labels"))
    assert pairs.has("A") is pairs and pairs.has(None) is pairs and labels.has("label") is labels
    for dataset, role in ((pairs, "label"), (labels, "A"), (labels, "instance")):
        with refused(dataset.data, role):
            dataset.has(role)


def test_a_data_set_that_grew_has_another_fingerprint(tmp_path):
    lay_out(tmp_path, "pix2pixHD", [0, 1])
    first = Dataset(str(tmp_path)).fingerprint()
    assert first == Dataset(str(tmp_path), size=(8, 8)).fingerprint()
    lay_out(tmp_path, "pix2pixHD", [2])
    assert first != Dataset(str(tmp_path)).fingerprint()
    assert first == Dataset(str(tmp_path), limit=2).fingerprint()


def test_a_photo_turned_by_exif_is_as_upright_as_its_label(tmp_path):
    array, exif = np.zeros((8, 24, 3), np.uint8), Image.Exif()
    array[:, :12] = 255                          # stored: left half white; upright: top half white
    exif[0x0112] = 6                             # stored lying: turn clockwise to see it upright
    save(tmp_path / "train_img" / "a.jpg", array, exif=exif, quality=95)
    save(tmp_path / "train_label" / "a.png", grey(0, (24, 8)))
    dataset = Dataset(str(tmp_path))
    common.describe(dataset)                     # compares the sizes
    got = dataset.read(0)["image"]
    assert got.shape == (3, 24, 8) and got[:, :10].min() > 200 and got[:, 14:].max() < 50


def test_checking_sizes_reads_headers_only(tmp_path, monkeypatch):
    """2975 Cityscapes triples must not be decoded before training starts."""
    lay_out(tmp_path, "pix2pixHD", range(3))
    from PIL import ImageFile
    decoded, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load",
                        lambda self: decoded.append(self) or load(self))
    Dataset(str(tmp_path), classes="5").check_sizes()
    assert not decoded


def test_classes_option_overrides_the_layouts(tmp_path):
    lay_out(tmp_path, "ADE20K", [0, 1])
    dataset = Dataset(str(tmp_path), classes="9")
    assert dataset.table.channels == 10
    assert int(dataset[0]["label"][0, -1]) == 1          # no longer counted from 1


# ----------------------------------------------------------------------------- a user's files

def test_input_files_of_a_folder(tmp_path):
    for name in ("b.png", "a.jpg", "._a.png", "notes.txt"):
        save(tmp_path / "in" / name, photo(1), format="PNG")
    files = common.input_files(str(tmp_path / "in"), "A")
    assert [each["A"].name for each in files] == ["a.jpg", "b.png"]      # nothing of macOS's
    assert Dataset(files=files)[0]["input"].shape == (3, 12, 16)


def test_input_files_with_instance_maps(tmp_path, capsys):
    for name in ("x_labelIds", "y"):
        save(tmp_path / "in" / f"{name}.png", grey(1))
        save(tmp_path / "maps" / f"{name.replace('label', 'instance')}.png", grey(9))
    source, one = str(tmp_path / "in"), str(tmp_path / "in" / "y.png")
    files = common.input_files(source, "label", str(tmp_path / "maps"))
    assert [each["instance"].name for each in files] == ["x_instanceIds.png", "y.png"]
    assert common.input_files(one, "label", one)[0]["instance"] == Path(one)
    assert "ids of classes serve as ids of objects" in capsys.readouterr().out
    for given, words in (("", ["--instances"]), (one, ["one map for a folder"]),
                         (str(tmp_path), ["no map named x_labelIds"])):
        with refused(*words):
            common.input_files(source, "label", given)


def test_a_name_that_the_console_cannot_show():
    console = io.TextIOWrapper(io.BytesIO(), "cp1252")
    with contextlib.redirect_stdout(console):
        common.shell(lambda: common.notice("\u65e5"), "x")
    console.seek(0)
    assert console.read() == "note: \\u65e5\n"


# --------------------------------------------------------------------------------- randomness

@pytest.fixture
def noisy(tmp_path):
    for k in range(6):
        noise = np.random.default_rng(k).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        save(tmp_path / "train" / f"{k}.png", noise)
    return lambda **options: Dataset(str(tmp_path), **{
        "size": (16, 16), "jitter": True, "mirror": True, "photos_only": True} | options)


def images(dataset, order=range(6)):
    got = {i: dataset[i]["image"] for i in order}
    return torch.stack([got[i] for i in range(6)])


def test_item_i_depends_on_seed_epoch_and_i_alone(noisy):
    want = images(noisy(seed=3))
    assert torch.equal(want, images(noisy(seed=3), [5, 0, 3, 1, 4, 2]))
    torch.manual_seed(99)
    torch.rand(7)
    assert torch.equal(want, images(noisy(seed=3)))
    again = noisy(seed=3)
    for again.epoch in (4, 0):
        got = images(again)
    assert torch.equal(want, got)
    assert not torch.equal(want, images(noisy(seed=4)))


CPU = torch.device("cpu")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_reads_in_the_order_asked_for_as_of_the_epoch(workers, noisy):
    dataset, orders = noisy(seed=3), {0: [3, 0, 2, 1], 1: [2, 1, 5, 4]}
    loader = common.Loader(dataset, 2, workers, CPU, epochs=2, per_epoch=2)
    loader.order = lambda: orders[loader.epoch]
    for epoch, order in orders.items():
        batches = list(loader)
        dataset.epoch = epoch
        want = torch.stack([dataset[i]["image"] for i in order])
        assert torch.equal(torch.cat([batch["image"] for batch in batches]), want)
    assert loader.over


def test_the_loader_keeps_its_processes_and_goes_on_from_its_place(noisy):
    class Where(torch.utils.data.Dataset):
        data, fingerprint = "", lambda self: [8, 0]
        __len__ = lambda self: 8
        __getitem__ = lambda self, index: {"index": index, "process": os.getpid()}

    loader, seen = common.Loader(Where(), 1, 2, CPU, epochs=3), []
    while not loader.over:
        for batch in loader:
            seen.append((int(batch["index"][0]), int(batch["index"][1]), int(batch["process"])))
    assert [epoch for epoch, _, _ in seen] == [0] * 8 + [1] * 8 + [2] * 8
    assert sorted(i for epoch, i, _ in seen if epoch == 1) == [*range(8)]
    assert len({process for *_, process in seen} - {os.getpid()}) == 2
    first, second = (common.Loader(Where(), 1, 0, CPU, epochs=3) for _ in range(2))
    for _ in zip(range(11), itertools.chain(first, first)):
        pass
    second.load_state_dict(first.state_dict())
    rest = [tuple(map(int, batch["index"])) for _ in range(2) for batch in second]
    assert rest == [(epoch, i) for epoch, i, _ in seen[second.step - len(rest):]]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="not Linux")
@pytest.mark.parametrize("idle, expected", [(0, 1), (1.2, 1), (1.9, 2), (7, 4)])
def test_threads_are_as_many_as_cores_are_idle_and_a_run_that_goes_on_keeps_them(
        idle, expected, noisy, monkeypatch):
    """Convolutions round differently with other numbers of threads."""
    assert common.idle_seconds() <= common.idle_seconds()
    clock, count = [0.0], [4]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: count[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: count.__setitem__(0, n))
    monkeypatch.setattr(common.time, "sleep", lambda span: clock.__setitem__(0, idle * span))
    monkeypatch.setattr(common, "idle_seconds", lambda: clock[0])
    common.choose_threads.cache_clear()
    loader = common.Loader(noisy(), 1, 0, CPU)
    assert count == [expected]
    count[0] = 5
    place = loader.state_dict()
    count[0] = 2
    loader.load_state_dict(place)
    assert count == [5]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    count[0] = 3
    loader.load_state_dict(place)               # whoever says a number has the last word
    assert count == [3]
    common.choose_threads.cache_clear()


def test_what_goes_wrong_in_a_data_process_is_one_line(tmp_path):
    class Killed(torch.utils.data.Dataset):
        data, __len__ = "", lambda self: 8
        __getitem__ = lambda self, index: os.kill(os.getpid(), signal.SIGKILL)

    lay_out(tmp_path, "CamVid", range(2))
    save(tmp_path / "trainannot" / "0001TP_000001.png", grey(77))
    for examples, words in ((Dataset(str(tmp_path)), ["0001TP_000001.png: label id 77"]),
                            (Killed(), ["--workers 1", "data process"])):
        with refused(*words):
            list(common.Loader(examples, 1, 1, CPU))


@pytest.mark.skipif(sys.platform == "win32", reason="ends processes in another way")
def test_data_processes_outlive_a_sigterm_but_not_the_training_process(noisy):
    """Also where it fails, or leaves its loader to the garbage collector."""
    def training():
        loader = common.Loader(noisy(), 1, 1, CPU, epochs=2)
        loader.itself = loader
        for _ in loader:
            (reader,) = multiprocessing.active_children()
            os.kill(reader.pid, signal.SIGTERM)
        raise SystemExit(5 if loader.epoch == 1 and reader.is_alive() else 1)

    process = multiprocessing.get_context("fork").Process(target=training)
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 5


def test_another_epoch_and_another_example_give_another_crop(tmp_path):
    """The same file under eight names: not all crops of an epoch may be alike."""
    y, x = np.mgrid[:24, :24]
    for k in range(8):
        save(tmp_path / "train" / f"{k}.png", np.stack([x, y, x], 2).astype(np.uint8) * 10)
    dataset = Dataset(str(tmp_path), size=(16, 16), jitter=True, mirror=True, photos_only=True)
    assert len({dataset[i]["image"].numpy().tobytes() for i in range(8)}) > 2
    assert len({dataset[epoch, 0]["image"].numpy().tobytes() for epoch in range(20)}) > 6


def test_reading_leaves_the_global_generators_alone(noisy):
    dataset = noisy()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    dataset[0], dataset[3]
    Dataset(size=(32, 32), jitter=True, mirror=True)[1]
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1]) and before[2] == random.getstate()


def test_without_jitter_and_mirror_an_item_is_always_the_same(noisy):
    dataset = noisy(jitter=False, mirror=False)
    want = images(dataset)
    for dataset.epoch in (1, 7):
        assert torch.equal(images(dataset), want)
    assert torch.equal(images(noisy(jitter=False, mirror=False, seed=8)), want)


# ------------------------------------------------------------------------------ the data doctor

@pytest.fixture
def clinic(tmp_path):
    """Four CamVid examples with random labels and photos; returns the folder and the arrays."""
    rng, truth = np.random.default_rng(2), []
    for k in range(4):
        ids = rng.choice([0, 3, 8, 11], (10, 14), p=[.5, .3, .15, .05]).astype(np.uint8)
        rgb = rng.integers(0, 256, (10, 14, 3), dtype=np.uint8)
        save(tmp_path / "trainannot" / f"s{k}.png", ids)
        save(tmp_path / "train" / f"s{k}.png", rgb)
        truth.append((ids, rgb))
    return tmp_path, truth


def test_check_data_counts_like_numpy(clinic, capsys):
    root, truth = clinic
    common.check_data([Dataset(str(root))], root / "out")
    text, ids = capsys.readouterr().out, np.concatenate([t[0] for t in truth])
    assert "10x14 (4)" in text and "classes never seen: 8 of 12" in text
    found = {int(k): (name, int(n), float(share)) for k, name, n, share in re.findall(
        r"^ +(\d+) (\S+) +in (\d+) images, ([\d.]+)% of all pixels$", text, re.M)}
    assert {k: name for k, (name, _, _) in found.items()} == {
        0: "sky", 3: "road", 8: "car", 11: "unknown"}
    for k, (_, n, share) in found.items():
        assert n == sum((t[0] == k).any() for t in truth)
        assert share == pytest.approx(100 * np.mean(ids == k), abs=.006)


def test_check_data_lists_all_bad_files(clinic, capsys):
    root, _ = clinic
    (root / "train" / "s0.png").write_bytes(b"")
    (root / "train" / "s1.png").write_bytes((root / "train" / "s1.png").read_bytes()[:-200])
    save(root / "trainannot" / "s2.png", grey(99, (10, 14)))
    save(root / "train" / "s3.png", photo(3, (7, 14)))
    with refused(root, "4 bad file(s)"):
        common.check_data([Dataset(str(root))], root / "out")
    bad = [line for line in capsys.readouterr().out.splitlines() if "BAD" in line]
    assert len(bad) == 4 and "label id 99" in bad[2] and "sizes differ" in bad[3]
    assert all(f"s{k}.png" in line for k, line in enumerate(bad))


def test_check_data_draws_eight_pairs(tmp_path, capsys):
    for k in range(10):
        save(tmp_path / "data" / "trainannot" / f"s{k}.png", grey(k % 5, (32, 32)))
        save(tmp_path / "data" / "train" / f"s{k}.png", photo(k, (32, 32)))
    save(tmp_path / "data" / "trainannot" / "s7.png", grey(50, (32, 32)))
    with refused("1 bad file(s)"):
        common.check_data([Dataset(str(tmp_path / "data"))], tmp_path / "out")
    text = capsys.readouterr().out
    assert "CamVid" in text and "10 examples" in text
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_train.png")).astype(int)
    cells = [sheet[2 + 130 * r + 64, 2 + 130 * c + 64] for r in range(4) for c in range(4)]
    assert sheet.shape == (2 + 4 * 130, 2 + 4 * 130, 3)
    for at, k in enumerate([0, 1, 2, 3, 4, 5, 6, 8]):        # 7 is bad and left out
        assert abs(cells[2 * at] - common.CAMVID[1][k % 5]).max() <= 1
        assert abs(cells[2 * at + 1] - (20 * k + 10, 90, 60)).max() <= 1


@pytest.mark.parametrize("layout", ["pix2pix pairs", "GTA-5", "unpaired", "photos"])
def test_check_data_works_for_other_layouts(layout, tmp_path, capsys):
    if layout == "photos":
        for k in range(2):
            save(tmp_path / "d" / f"tall{k}.png", photo(1, (300, 2)))
    else:
        lay_out(tmp_path / "d", layout, range(4))
    common.check_data([Dataset(str(tmp_path / "d"), s, photos_only=layout == "photos")
                       for s in ("train", "test")], tmp_path / "out")
    for split in ("train", "test"):
        assert (tmp_path / "out" / f"contact_{split}.png").is_file()


def test_describe_prints_layout_pairs_sizes_and_classes(clinic, capsys):
    common.describe(Dataset(str(clinic[0]), size=(8, 8)))
    text = capsys.readouterr().out
    for word in ("CamVid", "4 examples", "10x14", "8x8", "sky", "road", "car", "label", "image"):
        assert word in text
    assert "3 of 11 classes" in text                 # unknown is not a class


def test_colour_label_uses_the_palette():
    label = torch.tensor([[[0, 8], [11, 3]]])
    colour = ((common.colour_label(label, class_table("camvid")) + 1) * 127.5).round().int()
    assert colour.shape == (1, 3, 2, 2)
    assert colour[0, :, 0, 1].tolist() == [64, 0, 128] and colour[0, :, 1, 0].tolist() == [0, 0, 0]
