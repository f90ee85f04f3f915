"""common.py, rooms 1 to 5: class tables, files, Dataset and the data doctor.

Every file is written by the test. The number of an example is written into its pixels, so a wrong
pair is seen by its values, whatever the files are called. The rules are DESIGN's, section 5.
"""

import contextlib
import itertools
import os
import random
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import png, refused, save
from PIL import Image, ImageFile

import common
from common import Dataset, UserError, class_table, read_image, read_instance, read_label

CPU, CITY = torch.device("cpu"), class_table("cityscapes").palette
STREET = [7, 8, 11, 17, 20, 21, 22, 23, 24, 26, 33]  # ids of a real street


def grey(value: int, shape=(12, 16)) -> np.ndarray:
    return np.full(shape, value, np.uint8)


def photo(k: int, shape=(12, 16)) -> np.ndarray:
    """Flat red 20 k + 10: survives JPEG and tells k."""
    return np.full((*shape, 3), (20 * k + 10, 90, 60), np.uint8)


def number_of(image: torch.Tensor) -> float:
    """k of a photo in [-1, 1], read off its red channel."""
    return float((image[0].mean() + 1) * 127.5 - 10) / 20


def packed_png(ids: np.ndarray, depth: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits; the last two Pillow does not write."""
    bits = np.stack([ids >> k & 1 for k in reversed(range(depth))], 2).reshape(len(ids), -1)
    lines = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, 1))
    return png(*ids.shape, depth, 0, lines)


def deep_png(array: np.ndarray) -> bytes:
    """An RGB PNG of 16 bit, which Pillow does not write."""
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return png(*array.shape[:2], 16, 2, lines)


def palette_png(ids: np.ndarray, colours: np.ndarray | None = None) -> Image.Image:
    image = Image.fromarray(ids.astype(np.uint8), mode="P")
    image.putpalette([(7 * i + 3 * c) % 256 for i in range(256) for c in range(3)]
                     if colours is None else np.asarray(colours).ravel().tolist())
    return image


# ------------------------------------------------------------------------------- class tables

@pytest.mark.parametrize("name, n, unknown", [("cityscapes", 35, False),
                                              ("cityscapes_train", 19, True), ("camvid", 11, True),
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
    for table, ids, names in (
            ("cityscapes", (7, 26, 33, 34), "road car bicycle license_plate"),
            ("cityscapes_train", (0, 13, 18), "road car bicycle"), ("camvid", (0, 8), "sky car"),
            ("ade20k", (0, 2, 12, 20, 149), "wall sky person car flag"), ("facades", [2], "window"),
            ("coco_stuff", (0, 2, 90, 148, 156, 181), "person car hair_brush road sky-other wood")):
        assert [class_table(table).names[k].replace(" ", "_") for k in ids] == names.split()
    assert tuple(CITY[23]) == (70, 130, 180) and class_table("300").unknown == 65535
    for bad in ("0", "-3", "nine", "65536", "1.5", "", "\N{SUPERSCRIPT TWO}"):
        with refused("--classes", "cityscapes"):
            class_table(bad)


# ------------------------------------------------------------------------------------ layouts

SIX = "000000{:06d}"                                 # COCO: twelve digits
HD = {"label": "{s}_label/{k}.png", "instance": "{s}_inst/{k}.png", "image": "{s}_img/{k}.jpg"}
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
    "SPADE COCO-Stuff": ("coco_stuff", HD, 0, ("train", "val"), SIX),
    "pix2pixHD": ("5", HD, 0, ("train", "test"), "mine {}"),
    **{f"pix2pixHD, {ends}": ("5", {            # names that end in their role
        role: path.replace(".", f"_{end}.") for (role, path), end in zip(HD.items(), ends)},
        0, ("train", "test"), "mine {}") for ends in (
            ("label", "inst", "img"), ("label",) * 3, ("label", "instance", "image"))},
    "pix2pixHD pairs": ("", {"A": "{s}_A/{k}_A.png", "B": "{s}_B/{k}_B.jpg"}, 0, ("train", "test"),
                        "scene{}"),
    "ADE20K": ("ade20k", {"label": "annotations/{s}/{k}.png", "image": "images/{s}/{k}.jpg"},
               1, ("training", "validation"), "ADE_{:08d}"),
    "CamVid": ("camvid", {"label": "{s}annot/{k}.png", "image": "{s}/{k}.jpg"}, 0,
               ("train", "test"), "0001TP_{:06d}"),
    "images and labels": ("cityscapes", {
        "label": "labels/{k}_label.png", "image": "images/{k}.jpg"}, 0, ("", ""), "v1.{:05d}"),
    "CMP Facades": ("facades", {"label": "base/{k}.png", "image": "base/{k}.jpg"}, 1, ("", ""),
                    "cmp_b{:04d}"),
    "unpaired": ("", {"A": "{s}A/{k}.jpg", "B": "{s}B/{k}.png"}, 0, ("train", "test"), "n{}"),
    "A and B folders": ("", {"A": "A/{s}/{k}.jpg", "B": "B/{s}/{k}.png"}, 0, ("train", "val"),
                        "n{}"),
    "A and B folders, no splits": ("", {"A": "A/{k}_A.jpg", "B": "B/{k}_B.png"}, 0, ("", ""),
                                   "n{}"),
    "pix2pix pairs": ("", {"pair": "{s}/{k}.jpg"}, 0, ("train", "val"), "{}"),
}


NAMED = {"pix2pixHD Cityscapes": "pix2pixHD", "SPADE COCO-Stuff": "pix2pixHD"}   # by their files
USUAL = {"cityscapes": STREET, "camvid": [*range(5, 11)], "facades": [*range(5, 12)],
         "coco_stuff": [*range(95, 182, 6)], "ade20k": [*range(20, 140, 8)]}


def lay_out(root: Path, layout: str, numbers, split: int = 0, roles=None) -> None:
    """Write examples of these numbers in shuffled order, as `layout` lies on disk."""
    _, paths, first, splits, key = CASES[layout]
    jobs = [(role, k) for role in roles or paths for k in numbers]
    random.Random(3).shuffle(jobs)
    for role, k in jobs:
        path = root / paths[role].format(s=splits[split], k=key.format(k), o="ab"[k % 2])
        if role == "label":
            ids = grey(k + first)
            ids[:, :8] = (k + 1) % 5 + first         # two classes in each; below, what is usual
            usual = USUAL.get(CASES[layout][0])
            if usual:
                ids[2:] = np.resize(usual, (10, 16)) + first
            save(path, palette_png(ids, CITY) if layout == "images and labels" else ids)
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


@pytest.mark.parametrize("layout", CASES)
def test_every_layout_is_found_and_pairs_the_right_files(layout, tmp_path):
    classes, roles, _, splits, key = CASES[layout]
    lay_out(tmp_path, layout, [4, 0, 2, 3, 1])
    if splits[0]:
        lay_out(tmp_path, layout, [3, 1], split=1)
    for path in [p for p in tmp_path.rglob("*.*") if p.is_file()][::3]:
        path.rename(path.with_suffix(path.suffix.upper()))
    (tmp_path / "readme.txt").write_text("a file that is no image")
    train, test = Dataset(str(tmp_path), "train"), Dataset(str(tmp_path), "test")
    assert train.layout.name == test.layout.name == NAMED.get(layout, layout.partition(",")[0])
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
        for only, key in (("A", "input"), ("B", "image")):
            assert set(Dataset(str(tmp_path), only=only)[0]) == {key, "name"}


@pytest.mark.parametrize("layout, roles, lacks", [
    ("pix2pixHD", ["label", "instance"], "image"), ("Cityscapes", ["label", "image"], "instance"),
    ("pix2pixHD pairs", ["A"], "label")])
def test_what_a_split_has_no_files_of_its_items_lack(layout, roles, lacks, tmp_path):
    lay_out(tmp_path, layout, [0, 1])
    lay_out(tmp_path, layout, [2, 3], split=1, roles=roles)
    test = Dataset(str(tmp_path), "test", classes="35" if roles[0] == "label" else "")
    assert set(test[1]) == {"input" if role == "A" else role for role in roles} | {"name"}
    with refused(tmp_path, lacks, "--no-edges"):
        test.require(lacks, "--no-edges does without")
    assert test.fingerprint() == Dataset(str(tmp_path), "test", size=(8, 8)).fingerprint()
    assert test.fingerprint() != Dataset(str(tmp_path), "test", limit=1).fingerprint()


@pytest.mark.parametrize("folder", ["", "train"])
def test_photos_only_flat_and_in_a_split_folder(folder, tmp_path):
    for k in range(22):
        save(tmp_path / folder / f"p{k:02}.png", photo(k % 10, (4 + k, 4)))
    train, test = (Dataset(str(tmp_path), s, photos_only=True) for s in ("train", "test"))
    assert train.layout.name == "photos" and set(train[0]) == {"image", "name"}
    assert train[3]["image"].shape[1] in (7, 8)      # no size: each file's own
    if folder:
        assert train.names == test.names             # no test split: the training photos
    else:                                            # every tenth is held out
        assert sorted(train.names + test.names) == [f"p{k:02}" for k in range(22)]
        assert len(test) == 3


def test_streets_are_the_dataset_without_a_folder():
    """As many as are asked for; which photos are tested does not change with it."""
    assert [len(Dataset(split=split, limit=limit)) for split in ("train", "test")
            for limit in (0, 3, 1000)] == [400, 3, 1000, 50, 3, 50]
    train, test = Dataset(size=(32, 48)), Dataset(split="test", size=(32, 48))
    assert train.layout.name == "streets" == train.classes
    item = train[0]
    assert item["image"].shape == (3, 32, 48) and item["label"].shape == (32, 48)
    assert not {train[i]["name"] for i in range(5)} & {test[i]["name"] for i in range(5)}
    before = item["label"].clone()
    item["label"].fill_(3)                           # an item is the reader's to change
    assert torch.equal(train[0]["label"], before)
    assert set(Dataset(only="label", size=(32, 32))[0]) == {"label", "name"}


@pytest.mark.parametrize("lists, trained, tested", [
    (dict(train="0 3 4", test="1 2"), [0, 3, 4], [1, 2]), (dict(train="0 3 4"), [0, 3, 4], [1, 2]),
    (dict(test="1 2"), [0, 3, 4], [1, 2]), (dict(train="0 2 9", val="1 2"), [0, 2], [1])])
def test_split_lists_are_obeyed_and_never_overlap(lists, trained, tested, tmp_path, capsys):
    """Windows begins a UTF-8 text with a mark, no part of the first name, or writes UTF-16."""
    lay_out(tmp_path, "images and labels", range(5))
    for name, numbers_of in lists.items():
        entry, kind = ("{}", "utf-8-sig") if name == "train" else (r"a\{}_label.png", "utf-16")
        text = "".join(entry.format(f"v1.{int(k):05}") + "\r\n\r\n" for k in numbers_of.split())
        (tmp_path / f"{name}.txt").write_bytes(text.encode(kind))
    for split, want in (("train", trained), ("test", tested)):
        assert numbers(Dataset(str(tmp_path), split), "images and labels") == want
    said = capsys.readouterr().out
    assert ("train.txt: 1 of 3 entries name no file: v1.00009" in said) == ("val" in lists)
    assert ("1 files of both lists" in said) == ("val" in lists)


def test_a_folder_per_sequence_is_a_part_of_the_name(tmp_path):
    """Also one that is a link."""
    for sequence, k in itertools.product(("one", "two"), range(2)):
        for side in "AB":
            save(tmp_path / f"train_{side}" / sequence / f"{k}.png", photo(k + 6 * (side == "B")))
    save(tmp_path / "train_A" / ".hidden" / "0.png", photo(0))
    for side in "AB":
        (tmp_path / f"train_{side}" / "two").rename(tmp_path / side)
        (tmp_path / f"train_{side}" / "two").symlink_to(tmp_path / side)
    dataset = Dataset(str(tmp_path))
    assert dataset.names == ["one/0", "one/1", "two/0", "two/1"]
    assert numbers(dataset, "pix2pixHD pairs") == [0, 1, 0, 1]


# --------------------------------------------------- rule 1: a set is understood once, as a whole

@pytest.mark.parametrize("only, key, names", [("A", "input", 3), ("B", "image", 2)])
def test_one_list_alone_needs_no_partners_and_opens_none(only, key, names, tmp_path):
    """Lab2Pix-V1 learns without pairs: other names, other numbers, other sizes."""
    for k in range(3):
        save(tmp_path / "trainA" / f"layout{k}.png", photo(k))
    for k in range(2):
        save(tmp_path / "trainB" / f"photo{k}.jpg", photo(k + 6, (10, 20)))
    with refused("no B of the same name"):              # the paired scripts must not mix them up
        Dataset(str(tmp_path), size=(8, 8))
    (tmp_path / f"train{'AB'[only == 'A']}" / "broken.png").write_bytes(b"")
    dataset = Dataset(str(tmp_path), size=(8, 8), only=only)
    assert set(dataset[0]) == {key, "name"} and len(dataset) == names and dataset.roles == {only}
    turned = Dataset(str(tmp_path), only=only, direction="BtoA")
    assert set(turned[0]) == {{"input": "image", "image": "input"}[key], "name"}
    lay_out(tmp_path / "pairs", "pix2pix pairs", [1, 2])           # half a file is a list, too
    half = Dataset(str(tmp_path / "pairs"), only=only)[0]
    assert number_of(half[key]) == pytest.approx({"A": 1, "B": 7}[only], .2) and len(half) == 2


def label_set(root: Path, contents, names="{}", label="train_label", image="train_img") -> str:
    """A set of label maps, each an array or a picture, and of photos of the same size."""
    for k, content in enumerate(contents):
        with Image.open(save(root / label / f"{names.format(k)}.png", content)) as written:
            size = written.size[::-1]
        name = names.format(k).replace("_gtFine_labelIds", "")
        save(root / image / f"{name}.{'jpg' if image == label else 'png'}", photo(k % 10, size))
    return str(root)


def spots(ids, n: int = 6, seed: int = 0) -> list[np.ndarray]:
    """n label maps, in each of which all ids occur."""
    rng, kind = np.random.default_rng(seed), np.uint16 if max(ids) > 255 else np.uint8
    return [rng.permutation(np.resize(ids, 192)).reshape(12, 16).astype(kind) for _ in range(n)]


GTA = dict(label="labels", image="images")
DIGITS, CITYSCAPES_NAMES = "000000{:06d}", "x_{:06d}_gtFine_labelIds"
COCO = [0, 5, 40, 91, 100, 112, 123, 139, 145, 150, 156, 160, 168, 171, 177, 181, 255]


@pytest.mark.parametrize("folders, names, ids, classes", [
    (GTA, "{:05d}", STREET, "cityscapes"), (GTA, "{}", range(6), "6"), (GTA, "{}", range(24), "24"),
    (GTA, "{}", [k for k in range(30) if k % 7], "30"),        # no street is so even
    ({}, DIGITS, COCO, "coco_stuff"), ({}, DIGITS, [*range(10), 255], "10"),
    ({}, DIGITS, STREET + [*range(7)], "34"), ({}, "{}", [3, 6, 255], "7"),
    ({}, "{}", [0, 1, 2, 3, 65535], "4"),
    ({}, "{}", [*range(20), *range(150, 290), 255, 299, 65535], "300"),
    ({}, "{}", COCO[:-1] + list(range(100)), "182"),           # no names that speak for COCO
    ({}, CITYSCAPES_NAMES, STREET, "cityscapes"), ({}, CITYSCAPES_NAMES, [7, 26], "cityscapes"),
    ({}, CITYSCAPES_NAMES, [*range(19), 255], "cityscapes_train"),
    ({}, CITYSCAPES_NAMES, [0, 2, 10, 13], "cityscapes_train"),
    ({}, CITYSCAPES_NAMES, range(60), "60"),
    (dict(label="trainannot", image="train"), "{}", range(4), "4"),
    (dict(label="trainannot", image="train"), "{}", range(12), "camvid"),
    (dict(label="annotations/training", image="images/training"), "{}", range(9), "9"),
    (dict(label="base", image="base"), "{}", range(5), "5")])
def test_contents_decide_what_ids_mean(folders, names, ids, classes, tmp_path):
    root = label_set(tmp_path, spots(ids), names, **folders)
    dataset = Dataset(root)
    assert dataset.classes == classes and dataset[0]["label"].max() < dataset.table.channels
    assert Dataset(root, classes="400").classes == "400"


def test_headers_are_read_without_pixels_and_all_faults_are_told(tmp_path, monkeypatch, capsys):
    """2975 Cityscapes photos must not be decoded before training starts."""
    decoded, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(Dataset, "SAMPLE", 3)
    root = label_set(tmp_path, spots(range(5), 20))
    monkeypatch.setattr(ImageFile.ImageFile, "load",
                        lambda self: decoded.append(self) or load(self))
    Dataset(root)
    assert sum(image.mode == "RGB" for image in decoded) <= 12           # is a sample all grey?
    for k in (3, 5, 9):
        save(tmp_path / "train_img" / f"{k}.png", photo(1, (10, 16)))
    with refused("3.png", "one of 3 bad files"):
        Dataset(root)
    assert "5.png" in (said := capsys.readouterr().out) and "9.png" in said


def test_a_photo_turned_by_exif_is_as_upright_as_its_label(tmp_path):
    array, exif = np.zeros((8, 24, 3), np.uint8), Image.Exif()
    array[:, :12] = 255                          # stored: left half white; upright: top half white
    exif[0x0112] = 6                             # stored lying: turn clockwise to see it upright
    save(tmp_path / "train_img" / "a.jpg", array, exif=exif, quality=95)
    save(tmp_path / "train_label" / "a.png", grey(0, (24, 8)))
    got = Dataset(str(tmp_path)).read(0)["image"]
    assert got.shape == (3, 24, 8) and got[:, :10].min() > 200 and got[:, 14:].max() < 50


def drawn(kind: str, w: int, seed: int) -> np.ndarray:
    """(32, w, 3): noise, a plain photo of smooth waves, or two of these side by side; or two
    drawings with margins of white, so that no seam is seen."""
    rng = np.random.default_rng(seed)
    if kind in ("pair", "margins"):
        halves = [drawn("photo" if kind == "pair" else "noise", w // 2, 99 * seed + k)
                  for k in (0, 1)]
        for half in halves if kind == "margins" else ():
            half[:, :w // 8] = half[:, -w // 8:] = 255
        return np.concatenate(halves, 1)
    y, x = np.mgrid[:32, :w] / 32
    waves = sum(np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-2, 2, (5, 3)))
    return np.uint8(rng.integers(0, 256, (32, w, 3)) if kind == "noise" else
                    (128 + 20 * waves)[..., None].repeat(3, 2))


@pytest.mark.parametrize("kind, width, pairs", [
    ("pair", 64, True), ("pair", 90, True), ("noise", 64, True), ("margins", 64, True),
    ("photo", 64, False), ("photo", 44, False), ("photo", 90, False), ("noise", 63, False)])
def test_plain_photos_are_not_cut_in_halves(kind, width, pairs, tmp_path):
    for k in range(5):
        save(tmp_path / "train" / f"{k}.png", drawn(kind, width, k))
    if pairs:
        assert Dataset(str(tmp_path))[0]["input"].shape == (3, 32, width // 2)
        return
    with refused("0.png", "side by side", "trainA/", "--task"):
        Dataset(str(tmp_path))


# --------------------------------------------------------- rule 2: label and instance maps are PNG

IDS = np.uint8(np.arange(60).reshape(6, 10) % 9)     # ids 0..8

UNREADABLE = {                                       # as ids: other values might come out
    kind: lambda p, kind=kind, more=more: Image.fromarray(IDS).save(p, kind, **more)
    for kind, more in (("JPEG", {}), ("TIFF", {}), ("BMP", {}), ("GIF", {}), ("PPM", {}),
                       ("WEBP", {"lossless": True}))} | {
    "grey with alpha": lambda p: Image.fromarray(IDS).convert("LA").save(p),
    "colour with alpha": lambda p: Image.fromarray(photo(1)).convert("RGBA").save(p),
    "2 bits": lambda p: p.write_bytes(packed_png(IDS % 4, 2)),
    "4 bits": lambda p: p.write_bytes(packed_png(IDS, 4)),
    "colours of 16 bit": lambda p: p.write_bytes(deep_png(photo(1)))}


@pytest.mark.parametrize("write", [
    lambda p: save(p, IDS), lambda p: save(p, np.uint16(IDS)), lambda p: save(p, palette_png(IDS)),
    lambda p: p.write_bytes(packed_png(IDS % 2, 1))])
def test_map_files_of_every_kind_give_the_ids_that_they_store(write, tmp_path):
    write(tmp_path / "l.png")
    with Image.open(tmp_path / "l.png") as image:
        stored = np.asarray(image).astype(int)
    path = tmp_path / "l.png"
    for ids in (read_label(path, class_table("9")), read_instance(path)):
        assert ids.dtype == torch.int64 and np.array_equal(ids, stored)
    colours = np.array([[(1, 0, 0), (0, 1, 0), (5, 4, 3), (255, 255, 255)]], np.uint8)
    path = save(tmp_path / "i.png", colours)             # R + 256 G + 65536 B
    assert read_instance(path).tolist() == [[1, 256, 5 + 4 * 256 + 3 * 65536, 2 ** 24 - 1]]


@pytest.mark.parametrize("kind", UNREADABLE)
def test_other_maps_are_refused_with_the_cure(kind, tmp_path):
    path = tmp_path / "a.png"
    UNREADABLE[kind](path)
    for read in (read_instance, lambda p: read_label(p, class_table("256"))):
        with refused("a.png", "save as 8-bit grey PNG"):
            read(path)


@pytest.mark.parametrize("order", range(4))
def test_a_palette_of_the_sets_colours_is_read_by_colour(order, tmp_path):
    """Converters give each file an order of its own; black and 142 have several classes."""
    ids = [np.array(spots(STREET + [0, 1, 34], 1, k)[0], np.int64) for k in range(4)]
    rng = np.random.default_rng(order)
    for name, shuffle in (("a", order > 0), ("b", order > 1)):
        orders = [rng.permutation(35) if shuffle else np.arange(35) for _ in range(4)]
        label_set(tmp_path / name, [palette_png(np.argsort(o)[i], CITY[o])
                                    for i, o in zip(ids, orders)], CITYSCAPES_NAMES)
        dataset = Dataset(str(tmp_path / name))
        assert dataset.classes == "cityscapes"
        for k in range(4):
            got = dataset.read(k)["label"].numpy()
            assert np.array_equal(CITY[got], CITY[ids[k]])
            assert shuffle or np.array_equal(got, ids[k])      # an index of its own colour stays


def test_gtas_palette_has_a_colour_of_its_own(tmp_path):
    """(20, 20, 20) is no colour of Cityscapes, but the indices are its ids."""
    colours = CITY.copy()
    colours[4] = 20
    ids = spots(STREET + [4], 3)
    dataset = Dataset(label_set(tmp_path, [palette_png(i, colours) for i in ids], **GTA))
    assert dataset.classes == "cityscapes" and np.array_equal(dataset.read(0)["label"], ids[0])
    with refused("0.png", "(20, 20, 20)", "8-bit grey PNG"):   # in another order nothing is sure
        read_label(save(tmp_path / "0.png", palette_png(ids[0], np.roll(colours, 3, 0))),
                   class_table("cityscapes"))


def test_in_other_sets_an_index_has_one_colour(tmp_path, monkeypatch):
    """Also beyond the sample, and in an --input for a checkpoint."""
    colours = np.random.default_rng(0).integers(0, 256, (6, 3))
    ids, turned = spots(range(6), 7), np.roll(colours, 1, 0)
    root = label_set(tmp_path, [palette_png(i, colours) for i in ids[:6]])
    understood = Dataset(root).understood
    odd = save(tmp_path / "train_label" / "6.png", palette_png(ids[6], turned))
    save(tmp_path / "train_img" / "6.png", photo(1))
    monkeypatch.setattr(Dataset, "SAMPLE", 1)
    for open_it in (lambda: Dataset(root), lambda: Dataset(
            files=[{"label": odd}], classes="6", understood=understood)):
        with refused("6.png", "index", "8-bit grey PNG"):
            open_it()


def test_colour_label_map_in_the_known_palette(tmp_path):
    row = [(128, 64, 128), (128, 128, 128), (64, 0, 128), (0, 0, 0)]      # road, sky, car, unknown
    array = np.tile(np.array(row, np.uint8), (5, 1, 1))
    label = read_label(save(tmp_path / "l.png", array), class_table("camvid"))
    assert np.array_equal(label, np.tile([3, 0, 8, 11], (5, 1)))
    assert Dataset(label_set(tmp_path, [array])).classes == "camvid"      # whatever the layout


@pytest.mark.parametrize("classes, raw, want", [
    ("coco_stuff", [0, 181, 255], [0, 181, 182]), ("ade20k", [0, 1, 150, 255], [150, 0, 149, 150]),
    ("facades", [1, 2, 12], [0, 1, 11]), ("camvid", [0, 10, 11, 255], [0, 10, 11, 11]),
    ("cityscapes", [0, 7, 34, 255], [0, 7, 34, 0]), ("cityscapes_train", [0, 18, 255], [0, 18, 19]),
    ("4", [0, 3, 255, 65535], [0, 3, 4, 4]), ("300", [0, 255, 299, 65535], [0, 255, 299, 300])])
def test_file_values_become_ids(classes, raw, want, tmp_path):
    """-1 is 255 in 8 bit and 65535 in 16: unknown, where it is no class."""
    path = save(tmp_path / "l.png", np.array([raw], np.uint8 if max(raw) < 256 else np.uint16))
    assert read_label(path, class_table(classes)).tolist() == [want]


@pytest.mark.parametrize("classes, value, cure", [
    ("cityscapes", 35, "36"), ("facades", 0, "13"), ("ade20k", 151, "152"), ("camvid", 12, "13"),
    ("4", 250, "251"), ("4", 300, "301")])
def test_an_id_outside_names_file_value_and_a_cure_that_cures(classes, value, cure, tmp_path):
    path = save(tmp_path / "0.png", np.array([[1, value]], np.uint16))
    with refused("0.png", f"label id {value}", f"--classes {cure}"):
        read_label(path, class_table(classes))
    assert read_label(path, class_table(cure)).tolist() == [[1, value]]


SOFT = np.clip(np.mgrid[:64, :64][1] * 30 - 900, 0, 255)      # mostly 0 or 255, an edge between


@pytest.mark.parametrize("array, word", [
    (np.resize([0, 40, 80, 120, 160, 200, 240], (9, 9)), "7 of the ids 0..240"),
    (np.resize([0, 128, 255], (9, 9)), "hardly"), (255 * (IDS > 4), "mask"),
    (np.where(np.arange(4096).reshape(64, 64) < 600, np.arange(4096).reshape(64, 64) % 252, SOFT),
     "hardly")])
def test_ids_that_can_hardly_be_meant_are_refused(array, word, tmp_path):
    with refused("0.png", word):
        Dataset(label_set(tmp_path, [array.astype(np.uint8)] * 2))


@pytest.mark.parametrize("others, last, scored", [([0, 1, 4], [0, 26], True), ([0], [0, 1], False)])
def test_all_label_maps_are_read_before_a_set_is_refused(others, last, scored, tmp_path,
                                                         monkeypatch):
    monkeypatch.setattr(Dataset, "SAMPLE", 2)                  # the last is none of them
    root = label_set(tmp_path / "a", [*spots(others), *spots(last, 1)], CITYSCAPES_NAMES)
    dataset = Dataset(root, classes="cityscapes")
    with contextlib.nullcontext() if scored else refused("no class that is scored"):
        assert dataset.require_scored() is dataset
    with refused(tmp_path, "no class that is known", "unknown: id 255"):
        Dataset(label_set(tmp_path / "b", [grey(255)] * 7), classes="2")
    assert Dataset(label_set(tmp_path / "b", [grey(255)] * 6 + [grey(1)]), classes="2")


# ----------------------------------------------- rule 3: photos keep what they hold, or are refused

def test_grey_photos_are_repeated_and_a_set_of_them_is_grey(tmp_path):
    ramp = np.arange(192, dtype=np.uint8).reshape(12, 16)
    image = read_image(save(tmp_path / "g.png", ramp))
    assert image.shape == (3, 12, 16) and image.dtype == torch.uint8
    assert all(np.array_equal(channel, ramp) for channel in image)
    for k in range(4):
        save(tmp_path / "train_A" / f"{k}.png", photo(k))
        save(tmp_path / "train_B" / f"{k}.png", ramp if k % 2 else ramp[..., None].repeat(3, 2))
    there, back = (Dataset(str(tmp_path), direction=way) for way in ("AtoB", "BtoA"))
    assert there.understood["image"]["grey"] and not back.understood["image"]["grey"]
    assert back.understood["input"]["grey"]
    assert all(np.array_equal(channel, ramp) for channel in there.read(1)["image"])
    known = Dataset(files=[{"A": tmp_path / "train_A" / "3.png"}], understood=back.understood)
    assert len(known.read(0)["input"].unique(dim=0)) == 1          # colour, where grey was learned
    save(tmp_path / "train_B" / "2.png", photo(1))
    assert not Dataset(str(tmp_path)).understood["image"]["grey"]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_laid_on_white(mode, tmp_path, capsys):
    """A black drawing on nothing is black on white, not all black."""
    alpha = np.zeros((12, 16), np.uint8)
    alpha[:, 4:8], alpha[:, 8:] = 128, 255
    black = Image.fromarray(np.zeros((12, 16, 4), np.uint8))
    black.putalpha(Image.fromarray(alpha))
    image, more = black.convert(mode if mode in ("RGBA", "LA") else "RGBA"), {}
    if mode == "P":
        image = palette_png(alpha // 127, np.zeros((256, 3), int))
        more = {"transparency": b"\0\177\377"}
    elif mode == "RGB":                                            # one colour stands for nothing
        array = alpha[..., None].repeat(3, 2)
        image, more = Image.fromarray(255 - np.maximum(array, 128)), {"transparency": (127,) * 3}
    for name in "ab":
        got = read_image(save(tmp_path / f"{name}.png", image, **more))
    assert got[:, :, :4].min() == 255 and got[:, :, 8:].max() == 0 and got.shape == (3, 12, 16)
    assert capsys.readouterr().out.count("laid on white") == 1     # not once per file


def test_more_than_8_bit_are_scaled_by_the_range_of_the_whole_set(tmp_path):
    deep = [np.linspace(0, 4095 - 1000 * k, 192).reshape(12, 16) for k in range(3)]
    for k, array in enumerate(deep):
        save(tmp_path / "train_A" / f"{k}.png", array.astype(np.uint16))
        (tmp_path / "train_B").mkdir(exist_ok=True)
        (tmp_path / "train_B" / f"{k}.png").write_bytes(
            deep_png(np.stack([array, array / 2, 0 * array], 2) + 100))
    dataset = Dataset(str(tmp_path))
    assert dataset.understood["input"] == {"grey": True, "span": [0, 4095]}
    assert dataset.understood["image"] == {"grey": False, "span": [100, 4195]}
    for k, array in enumerate(deep):
        item = dataset.read(k)
        assert (item["input"].float() - torch.from_numpy(array) / 4095 * 255).abs().max() <= .63
        half = torch.from_numpy(array) / 2 / 4095 * 255
        assert (item["image"][1].float() - half).abs().max() < .7
        assert not item["image"][2].any()
    alone = Dataset(files=[{"A": tmp_path / "train_A" / "2.png"}], understood=dataset.understood)
    assert torch.equal(alone.read(0)["input"], dataset.read(2)["input"])      # as in training
    save(tmp_path / "train_A" / "1.png", photo(1))
    with refused("train_A/0.png", "train_A/1.png", "8"):
        Dataset(str(tmp_path))


@pytest.mark.parametrize("name, write", [
    ("four.tif", lambda p: Image.fromarray(photo(1)).convert("RGBX").save(p)),
    ("cmyk.jpg", lambda p: Image.fromarray(photo(5)).convert("CMYK").save(p)),
    ("float.tif", lambda p: save(p, np.float32(grey(1)))),
    ("lab.tif", lambda p: Image.fromarray(photo(1)).convert("LAB").save(p)),
    ("deep.ppm", lambda p: p.write_bytes(b"P6 2 1 65535\n" + bytes(12)))])
def test_what_would_lose_a_part_is_refused_by_name(name, write, tmp_path):
    write(tmp_path / name)
    with refused(name, "PNG"):
        read_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore")                # Pillow warns of corrupt EXIF and TIFF tags
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "PPM", "WEBP"])
def test_no_damage_ends_in_a_traceback(kind, tmp_path):
    """Files with random bytes changed or the end missing: an image or a UserError, nothing else."""
    rng, path = np.random.default_rng(5), tmp_path / "x.png"
    whole = save(path, rng.integers(0, 256, (24, 32, 3), np.uint8), format=kind).read_bytes()
    for k in range(60):
        data = bytearray(whole)
        for at in rng.integers(0, 80 if k % 2 else len(data), 4):
            data[at] = rng.integers(256)
        path.write_bytes(data[:rng.integers(1, len(data))] if k % 3 == 0 else data)
        for read in (read_image, read_instance):
            try:
                assert read(path).ndim >= 2
            except UserError as error:
                assert str(path) in str(error)


def test_label_instance_and_photo_get_the_same_crop_and_flip(tmp_path):
    y, x = np.mgrid[:36, :36]                 # label x, instance 36 y + x, photo both
    save(tmp_path / "train_label/a.png", np.uint8(x))
    save(tmp_path / "train_inst/a.png", np.uint16(36 * y + x))
    save(tmp_path / "train_img/a.png", np.uint8(np.stack([7 * x, 7 * y, 0 * x], 2)))
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


# ---------------------------------------------- rule 6: test as in training; files; the doctor

@pytest.mark.parametrize("files, size, inputs, words", [
    ((64, 64), (32, 32), (64, 64), "--size 32 32"), ((64, 64), (64, 64), (99, 99), "--size 64 64"),
    ((64, 128), (32, 64), (96, 192), "--size 32 64"), ((64, 64), (64, 64), (64, 64), None),
    ((64, 64), (64, 64), (16, 16), "--size 64 64"), ((40, 40), (96, 96), (90, 100), None)])
def test_another_scale_at_test_time_is_said(files, size, inputs, words, tmp_path, capsys):
    save(tmp_path / "train_A" / "0.png", photo(1, files))
    save(tmp_path / "train_B" / "0.png", photo(1, files))
    trained = Dataset(str(tmp_path), size=size).understood
    assert trained["file_size"] == list(files)
    given = [{"A": save(tmp_path / "in.png", photo(2, inputs))}]
    common.notice_scale(Dataset(files=given, understood=trained), trained, size)
    said = capsys.readouterr().out
    assert (words in said) if words else not said


def test_input_files_and_their_instance_maps(tmp_path, capsys):
    for name in ("x_labelIds", "y"):
        save(tmp_path / "in" / f"{name}.png", grey(1))
        save(tmp_path / "maps" / f"{name.replace('label', 'instance')}.png", grey(9))
    source, one = str(tmp_path / "in"), str(tmp_path / "in" / "y.png")
    files = common.input_files(source, "label", str(tmp_path / "maps"))
    assert [each["instance"].name for each in files] == ["x_instanceIds.png", "y.png"]
    assert common.input_files(one, "label", one)[0]["instance"] == Path(one)
    assert "ids of classes serve as ids of objects" in capsys.readouterr().out
    with refused("folder of maps"):
        common.input_files(source, "label", one)


def test_nothing_is_written_over_what_is_not_ours(tmp_path):
    lay_out(tmp_path / "data", "CamVid", [0, 1])
    items = Dataset(str(tmp_path / "data"))
    inside = tmp_path / "data" / "train"
    with refused("--output", "lies in what is read"):
        next(common.outputs(items, "", inside / ".." / "train" / "new", 1))
    out = tmp_path / "out"
    foreign = save(out / f"{items.names[1]}.png", photo(1))
    before = foreign.read_bytes()
    with refused("--output", foreign, "none of ours"):
        next(common.outputs(items, "", out, 1))          # before the first is written
    assert foreign.read_bytes() == before and len(list(out.iterdir())) == 1
    with refused(foreign, "none of ours"):
        common.save_images(torch.zeros(1, 3, 8, 8), foreign)
    foreign.write_bytes(b"")                             # of a killed process
    for _ in range(2):                                   # our own are replaced
        for item, (path,) in common.outputs(items, "", out, 1):
            common.save_images(item["image"][None], path)
    assert {path.stem for path in out.iterdir()} == set(items.names)
    common.save_images(item["image"][None], tmp_path / "a.jpg")
    assert common.made_here(tmp_path / "a.jpg")
    one = common.input_files(str(save(tmp_path / "in.png", photo(1))), "A")
    with refused("in.png", "is read"):
        next(common.outputs(Dataset(files=one), str(one[0]["A"]), tmp_path / "in.png", 1))
    assert next(common.outputs(Dataset(files=one), str(one[0]["A"]), tmp_path / "o.png", 1))


def test_the_loader_keeps_its_processes_and_shows_each_example_once_an_epoch():
    """A process that is killed is told by the words for which shell knows a cure."""
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
    Where.__getitem__ = lambda self, index: os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(common.Loader(Where(), 1, 1, CPU))


def test_check_data_counts_like_numpy_and_lists_what_only_reading_all_shows(tmp_path, capsys):
    rng, maps = np.random.default_rng(2), []
    for k in range(10):
        maps.append(rng.choice([0, 1, 3, 4, 5, 6, 8, 11], (32, 32)).astype(np.uint8))
        save(tmp_path / "data" / "trainannot" / f"s{k}.png", maps[-1])
        save(tmp_path / "data" / "train" / f"s{k}.png", photo(k, (32, 32)))
    bad = tmp_path / "data" / "train" / "s7.png"
    bad.write_bytes(bad.read_bytes()[:-30])
    dataset = Dataset(str(tmp_path / "data"), size=(8, 8))
    with refused(bad):
        common.check_data([dataset], tmp_path / "out")
    text, ids = capsys.readouterr().out, np.stack(maps[:7] + maps[8:])
    for word in ("layout CamVid", "10 examples", "32x32 (10)", "8x8", "never seen: 4 of 11",
                 "average colour", "7 of them", "building"):
        assert word in text
    rows = re.findall(r"^ +(\d+) (\S+) +in (\d+) images, ([\d.]+)% of all pixels$", text, re.M)
    assert [int(k) for k, *_ in rows] == [0, 1, 3, 4, 5, 6, 8, 11] and rows[-1][1] == "unknown"
    for k, _, n, share in rows:
        assert int(n) == 9 and float(share) == pytest.approx(100 * np.mean(ids == int(k)), abs=.006)
    with Image.open(tmp_path / "out" / "contact_train.png") as image:
        sheet = np.asarray(image).astype(int)
    assert sheet.shape == (2 + 4 * 130, 2 + 4 * 130, 3)
    reds = sheet[66::130, 196::260, 0].flatten()              # of the photos; 7 is bad, left out
    assert reds == pytest.approx([20 * k + 10 for k in (0, 1, 2, 3, 4, 5, 6, 8)], abs=1)
