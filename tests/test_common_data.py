"""common.py, rooms 1 to 4: class tables, files, Dataset and the data doctor.

Every file is written by the test. The number of an example is written into its pixels, so a wrong
pair is seen by its values, whatever the files are called.
"""

import io
import os
import random
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from conftest import refused  # noqa: E402
from common import Dataset, UserError, class_table  # noqa: E402
from common import read_image, read_instance, read_label  # noqa: E402


def write(path: Path, array, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array))
    image.save(path, **options)
    return path


def grey(value: int, shape=(12, 16)) -> np.ndarray:
    return np.full(shape, value, np.uint8)


def photo(k: int, shape=(12, 16)) -> np.ndarray:
    """Flat red 20 k + 10: survives JPEG and tells k."""
    return np.full((*shape, 3), (20 * k + 10, 90, 60), np.uint8)


def number_of(image: torch.Tensor) -> float:
    """k of a photo in [-1, 1], read off its red channel."""
    return float((image[0].mean() + 1) * 127.5 - 10) / 20


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
    assert table.things <= set(table.names) and table.things
    assert all(name == " ".join(name.split()) and "_" not in name for name in table.names)


def test_cityscapes_scores_the_19_official_classes():
    table = class_table("cityscapes")
    official = ("road sidewalk building wall fence pole,traffic light,traffic sign,vegetation "
                "terrain sky person rider car truck bus train motorcycle bicycle")
    names = [w for part in official.split(",") for w in ([part] if part.startswith("traffic")
                                                         else part.split())]
    assert [table.names[i] for i in table.scored] == names and len(names) == 19


def test_ids_of_well_known_classes():
    """Spot checks against the published lists (labels.py, objectInfo150, labels.txt)."""
    at = lambda name, k: class_table(name).names[k]
    assert (at("cityscapes", 7), at("cityscapes", 26), at(
        "cityscapes", 33)) == ("road", "car", "bicycle")
    assert tuple(class_table("cityscapes").palette[23]) == (70, 130, 180)
    assert [at("ade20k", k) for k in (0, 2, 12, 20, 149)] == [
        "wall", "sky", "person", "car", "flag"]
    assert [at("coco_stuff", k) for k in (0, 2, 90, 148, 156, 181)] == [
        "person", "car", "hair brush", "road", "sky-other", "wood"]
    assert (at("camvid", 0), at("camvid", 8), at("facades", 2)) == ("sky", "car", "window")


@pytest.mark.parametrize("name", ["ade20k", "coco_stuff", "camvid", "facades", "streets", "300"])
def test_palette_tells_the_classes_apart(name):
    assert len(np.unique(class_table(name).palette, axis=0)) == class_table(name).channels


def test_classes_by_number_and_by_name():
    assert len(class_table("9").names) == 9 and class_table("9").unknown == 255
    assert class_table("ade20k").names[0] == "wall"
    for bad in ("0", "-3", "nine", "65536", "1.5", ""):
        with refused("--classes", "cityscapes"):
            class_table(bad)


def test_classes_superscript_number_is_refused_too():
    with refused("--classes"):
        class_table("\N{SUPERSCRIPT TWO}")           # str.isdigit() says yes, int() says no


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
               ("train", "test"),
               "0001TP_{:06d}"),
    "GTA-5": ("cityscapes", {"label": "labels/{k}.png", "image": "images/{k}.jpg"}, 0, ("", ""),
              "{:05d}"),
    "CMP Facades": ("facades", {"label": "base/{k}.png", "image": "base/{k}.jpg"}, 1, ("", ""),
                    "cmp_b{:04d}"),
    "unpaired": ("", {"A": "{s}A/{k}.jpg", "B": "{s}B/{k}.png"}, 0, ("train", "test"), "n{}"),
    "A and B folders": ("", {"A": "A/{s}/{k}.jpg", "B": "B/{s}/{k}.png"}, 0, ("train", "val"),
                        "n{}"),
    "pix2pix pairs": ("", {"pair": "{s}/{k}.jpg"}, 0, ("train", "val"), "{}"),
}


def lay_out(root: Path, layout: str, numbers, split: int = 0, roles=None, stray: int = 0) -> None:
    """Write examples of these numbers in shuffled order, as `layout` lies on disk."""
    _, paths, first, splits, key = CASES[layout]
    jobs = [(role, k) for role in roles or paths for k in numbers]
    random.Random(3).shuffle(jobs)
    for role, k in jobs:
        path = root / paths[role].format(s=splits[split], k=key.format(k), o="ab"[k % 2])
        if role == "label":
            ids = grey(k + first)
            ids[:, :8] = (k + 1) % 5 + first         # two classes in each
            write(path, palette_png(ids) if layout in ("GTA-5", "CMP Facades") else ids)
        elif role == "instance":
            write(path, np.full((12, 16), 26000 + k, np.uint16))
        elif role == "pair":
            write(path, np.concatenate([photo(k), photo(k + 6)], 1))
        else:
            write(path, photo(k + 6 * (role == "B")))


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


@pytest.mark.parametrize("layout", CASES)
def test_every_layout_is_found_and_pairs_the_right_files(layout, tmp_path):
    classes, roles, _, splits, key = CASES[layout]
    lay_out(tmp_path, layout, [4, 0, 2, 3, 1])
    if splits[0]:
        lay_out(tmp_path, layout, [3, 1], split=1)
    (tmp_path / "readme.txt").write_text("a file that is no image")
    train, test = Dataset(str(tmp_path), "train"), Dataset(str(tmp_path), "test")
    assert train.layout.name == test.layout.name == layout
    assert train.classes == classes
    want = {"name", "image"} | ({"label"} | {"instance"} & set(roles)
                                if "label" in roles else {"input"})
    for dataset in (train, test):
        assert all(set(item) == want for item in (dataset[i] for i in range(len(dataset))))
    numbers = [check_item(train[i], layout) for i in range(len(train))]
    held_out = [check_item(test[i], layout) for i in range(len(test))]
    if splits[0]:
        assert numbers == [
    0, 1, 2, 3, 4] and held_out == [
        1, 3]     # sorted by key, however written
    else:
        assert sorted(numbers + held_out) == [0, 1, 2, 3, 4] and numbers and held_out
    assert all(key.format(k) in train[i]["name"] for i, k in enumerate(numbers))


@pytest.mark.parametrize("layout", ["pix2pix pairs",
                         "pix2pixHD pairs", "unpaired", "A and B folders"])
def test_direction_swaps_input_and_image(layout, tmp_path):
    lay_out(tmp_path, layout, [0, 1])
    dataset = Dataset(str(tmp_path), direction="BtoA")
    assert [check_item(dataset[i], layout, "BtoA") for i in (0, 1)] == [0, 1]


@pytest.mark.parametrize("layout", ["pix2pixHD", "pix2pixHD Cityscapes", "Cityscapes"])
def test_a_test_split_may_have_no_images(layout, tmp_path):
    lay_out(tmp_path, layout, [0, 1])
    lay_out(tmp_path, layout, [2, 3], split=1, roles=["label", "instance"])
    test = Dataset(str(tmp_path), "test", classes="" if layout != "pix2pixHD" else "5")
    assert [set(test[i]) for i in range(2)] == [{"label", "instance", "name"}] * 2
    assert [int(test[i]["label"][0, -1]) for i in range(2)] == [2, 3]


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_a_test_split_with_one_side_only(direction, tmp_path):
    """`test_A` without `test_B` is all that AtoB needs; BtoA has no input and must say so."""
    lay_out(tmp_path, "pix2pixHD pairs", [0, 1])
    lay_out(tmp_path, "pix2pixHD pairs", [2], split=1, roles=["A"])
    if direction == "AtoB":
        assert set(Dataset(str(tmp_path), "test")[0]) == {"input", "name"}
    else:
        with refused("B"):
            Dataset(str(tmp_path), "test", direction="BtoA")[0]


@pytest.mark.parametrize("layout", ["pix2pixHD", "ADE20K", "CMP Facades"])
def test_no_instance_folder_means_no_instance_key(layout, tmp_path):
    lay_out(tmp_path, layout, [0, 1, 2], roles=["label", "image"])
    assert set(Dataset(str(tmp_path))[0]) == {"label", "image", "name"}


@pytest.mark.parametrize("folder", ["", "train"])
def test_photos_only_flat_and_in_a_split_folder(folder, tmp_path):
    for k in (3, 1, 0, 2):
        write(tmp_path / folder / f"p{k}.jpg", photo(k))
    train = Dataset(str(tmp_path), photos_only=True)
    assert train.layout.name == "photos" and set(train[0]) == {"image", "name"}
    numbers = [round(number_of(train[i]["image"])) for i in range(len(train))]
    if folder:
        assert numbers == [0, 1, 2, 3]
    else:
        test = Dataset(str(tmp_path), "test", photos_only=True)
        held_out = [round(number_of(test[i]["image"])) for i in range(len(test))]
        assert sorted(numbers + held_out) == [0, 1, 2, 3] and held_out
    if not folder:
        with refused(tmp_path, "photos only", "colorization"):
            Dataset(str(tmp_path))


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
    with refused("--size 16 64", "32"):
        Dataset(size=(16, 64))


def test_streets_refuse_a_class_table_that_their_ids_do_not_fit():
    """12 street classes in --classes 5 would end in a scatter assert on the GPU."""
    with refused("--classes"):
        item = Dataset(size=(32, 32), classes="5")[0]
        assert int(item["label"].max()) < class_table(
            "5").channels, "an id outside of the table passed"


def test_an_item_may_be_edited_without_changing_the_dataset():
    dataset = Dataset(size=(32, 32), limit=1)
    before = dataset[0]["label"].clone()
    dataset[0]["label"].fill_(3)
    dataset[0]["instance"].fill_(3)
    assert torch.equal(dataset[0]["label"], before)


def test_limit_uses_the_first_examples(tmp_path):
    lay_out(tmp_path, "pix2pixHD", [4, 3, 2, 1, 0])
    dataset = Dataset(str(tmp_path), limit=2)
    assert [check_item(dataset[i], "pix2pixHD") for i in range(len(dataset))] == [0, 1]


# ------------------------------------------------------------------------------- split lists

@pytest.mark.parametrize("lists", [("train", "test"), ("train", "val"), ("train",), ("test",)])
def test_gta_split_lists_are_obeyed_and_never_overlap(lists, tmp_path):
    lay_out(tmp_path, "GTA-5", range(5))
    chosen = {"train": ["00000.png", "00003", "00004.png"], "test": ["00001.png", "00002.png"]}
    for name in lists:
        (tmp_path /
     f"{name}.txt").write_text("\n".join(chosen["train" if name == "train" else "test"]))
    train, test = (Dataset(str(tmp_path), split) for split in ("train", "test"))
    numbers = [check_item(train[i], "GTA-5") for i in range(len(train))]
    held_out = [check_item(test[i], "GTA-5") for i in range(len(test))]
    if "train" in lists:
        assert numbers == [0, 3, 4]
    if len(lists) == 2 or "train" not in lists:
        assert held_out == [1, 2]
    assert held_out and not set(numbers) & set(held_out), "test examples are trained on"


def test_split_lists_may_name_files_with_spaces(tmp_path):
    for k, name in enumerate(["left turn", "right turn", "über alles"]):
        write(tmp_path / "labels" / f"{name}.png", palette_png(grey(k)))
        write(tmp_path / "images" / f"{name}.jpg", photo(k))
    (tmp_path / "train.txt").write_text("left turn.png\nüber alles.png\n", encoding="utf-8")
    (tmp_path / "test.txt").write_text("right turn.png\n")
    train, test = Dataset(str(tmp_path)), Dataset(str(tmp_path), "test")
    assert [int(train[i]["label"][0, 0]) for i in range(len(train))] == [0, 2]
    assert [int(test[i]["label"][0, 0]) for i in range(len(test))] == [1]


def test_without_lists_every_tenth_is_held_out(tmp_path):
    for k in range(30):
        write(tmp_path / f"{k:02d}.png", grey(k, (2, 2)))
    train, test = (Dataset(str(tmp_path), s, photos_only=True) for s in ("train", "test"))
    names = [{d.read(i)["name"] for i in range(len(d))} for d in (train, test)]
    assert len(names[0]) == 27 and len(names[1]) == 3 and not names[0] & names[1]


# ------------------------------------------------------------------------------------ pairing

def test_a_missing_photo_is_named(tmp_path):
    lay_out(tmp_path, "pix2pixHD", range(5))
    (tmp_path / "train_img" / "mine 3.jpg").unlink()
    with refused("mine 3", "image", "1 of 5"):
        Dataset(str(tmp_path))


def test_a_missing_instance_map_is_named(tmp_path):
    lay_out(tmp_path, "Cityscapes", range(3))
    next(tmp_path.glob("gtFine/train/*/*000002_000019_gtFine_instanceIds.png")).unlink()
    with refused("aachen_000002_000019", "instance"):
        Dataset(str(tmp_path))


def test_an_extra_photo_is_left_out_with_a_notice(tmp_path, capsys):
    lay_out(tmp_path, "pix2pixHD", [0, 2])
    lay_out(tmp_path, "pix2pixHD", [1], roles=["image"])
    dataset = Dataset(str(tmp_path))
    assert [check_item(dataset[i], "pix2pixHD") for i in range(len(dataset))] == [0, 2]
    assert re.search(r"note: 1 image .*mine 1", capsys.readouterr().out)


@pytest.mark.parametrize("role, twin", [("img", "mine 1.png"), ("label", "mine 1.PNG"),
                                        ("label", "mine 1.bmp")])
def test_two_files_of_one_stem_are_refused(role, twin, tmp_path):
    lay_out(tmp_path, "pix2pixHD", [0, 1])
    write(tmp_path / f"train_{role}" / twin, grey(1))
    with refused("mine 1", "same name"):
        Dataset(str(tmp_path))


def test_stems_with_spaces_dots_and_umlauts(tmp_path):
    names = ["Straße 1", "naïve.v2", "日本 3", "a[b]c*", "x (copy)"]
    for k, name in enumerate(names):
        write(tmp_path / "train_label" / f"{name}.png", grey(k))
        write(tmp_path / "train_img" / f"{name}.jpeg", photo(k))
    dataset = Dataset(str(tmp_path), classes="5")
    got = {}
    for i in range(len(dataset)):
        item = dataset[i]
        got[item["name"]] = int(item["label"][0, 0]), round(number_of(item["image"]))
    assert got == {name: (k, k) for k, name in enumerate(names)}


def test_a_dataset_folder_with_special_characters(tmp_path):
    root = tmp_path / "my [data] *ü {0}"
    lay_out(root, "pix2pixHD", [0, 1])
    assert [check_item(Dataset(str(root))[i], "pix2pixHD") for i in (0, 1)] == [0, 1]


@pytest.mark.parametrize("layout", ["pix2pixHD", "ADE20K", "CMP Facades", "Cityscapes", "GTA-5"])
def test_upper_case_suffixes(layout, tmp_path):
    lay_out(tmp_path, layout, range(3))
    for path in [p for p in tmp_path.rglob("*") if p.is_file()]:
        path.rename(path.with_suffix(path.suffix.upper()))
    dataset = Dataset(str(tmp_path))
    assert dataset.layout.name == layout
    assert all(check_item(dataset[i], layout) < 3 for i in range(len(dataset)))
    assert len(dataset) == (2 if layout in ("CMP Facades", "GTA-5") else 3)


@pytest.mark.parametrize("stray", ["Thumbs.db", ".DS_Store", "desktop.ini", "list.txt",
                                   ".thumbs/x.png", "._mine 0.png", ".hidden.png"])
def test_stray_files_are_ignored(stray, tmp_path):
    """`._name.png` are the resource forks that macOS leaves on foreign disks and in zip files."""
    lay_out(tmp_path, "pix2pixHD", [0, 1])
    for folder in ("train_label", "train_img", "train_inst"):
        path = tmp_path / folder / stray
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    dataset = Dataset(str(tmp_path))
    assert [check_item(dataset[i], "pix2pixHD") for i in range(len(dataset))] == [0, 1]


def test_own_data_with_seven_digit_names_is_not_coco(tmp_path):
    """COCO's names have twelve digits; 0000001.png is anybody's."""
    for k in range(3):
        write(tmp_path / "train_label" / f"{k:07d}.png", grey(k))
        write(tmp_path / "train_img" / f"{k:07d}.jpg", photo(k))
    dataset = Dataset(str(tmp_path))
    assert (dataset.layout.name, dataset.classes) == ("pix2pixHD", "3")


def test_unpaired_folders_need_no_common_names(tmp_path):
    """Lab2Pix-V1 learns without pairs: other names, other numbers, other sizes."""
    for k in range(3):
        write(tmp_path / "trainA" / f"layout{k}.png", photo(k))
    for k in range(2):
        write(tmp_path / "trainB" / f"photo{k}.jpg", photo(k + 6, (10, 20)))
    with refused("no B of the same name"):              # the paired scripts must not mix them up
        Dataset(str(tmp_path), size=(8, 8))
    dataset = Dataset(str(tmp_path), size=(8, 8), unpaired=True)
    assert dataset.layout.name == "unpaired" and dataset.unpaired and len(dataset) == 3
    dataset.check_sizes()
    assert {"input", "image"} <= set(dataset[0]) and dataset[2]["image"].shape == (3, 8, 8)


# ------------------------------------------------------------------------------------- labels

IDS = np.arange(60).reshape(6, 10) % 9               # ids 0..8


@pytest.mark.parametrize("kind", ["grey 8", "grey 16", "palette", "bmp", "tiff 16"])
def test_label_files_of_every_kind_give_the_same_ids(kind, tmp_path):
    path = tmp_path / f"l.{'bmp' if kind == 'bmp' else 'tif' if 'tiff' in kind else 'png'}"
    write(path, palette_png(IDS) if kind == "palette" else
          IDS.astype(np.uint16 if "16" in kind else np.uint8))
    label = read_label(path, class_table("9"))
    assert label.dtype == torch.int64 and np.array_equal(label, IDS)


def test_one_bit_labels(tmp_path):
    path = write(tmp_path / "l.png", Image.fromarray((IDS > 3)))
    assert Image.open(path).mode == "1"
    assert np.array_equal(read_label(path, class_table("2")), IDS > 3)


@pytest.mark.parametrize("alpha", [False, True])
def test_colour_label_map_in_the_known_palette(alpha, tmp_path):
    colours = {
    "sky": (
        128, 128, 128), "road": (
            128, 64, 128), "car": (
                64, 0, 128), "unknown": (
                    0, 0, 0)}
    row = np.array([colours[c] for c in ("road", "sky", "car", "unknown")], np.uint8)
    array = np.tile(row, (5, 1, 1))
    if alpha:
        array = np.concatenate([array, np.full((5, 4, 1), 255, np.uint8)], 2)
    label = read_label(write(tmp_path / "l.png", array), class_table("camvid"))
    assert np.array_equal(label, np.tile([3, 0, 8, 11], (5, 1)))


def test_unknown_colours_are_quoted(tmp_path):
    array = np.zeros((4, 4, 3), np.uint8)
    array[0, 0], array[1, 1] = (1, 2, 3), (250, 128, 64)
    with refused("l.png", "(1, 2, 3)", "(250, 128, 64)", "palette", "2"):
        read_label(write(tmp_path / "l.png", array), class_table("camvid"))


@pytest.mark.parametrize("mode", ["LA", "CMYK", "F"])
def test_label_maps_of_strange_modes_are_refused(mode, tmp_path):
    path = write(tmp_path / f"l.{'png' if mode == 'LA' else 'tif'}",
                 Image.fromarray(IDS.astype(np.uint8)).convert(mode))
    assert Image.open(path).mode == mode
    with refused(path.name):
        read_label(path, class_table("9"))


@pytest.mark.parametrize("name", ["l.jpg", "l.JPEG", "really a jpeg.png"])
def test_jpeg_label_map_is_refused_whatever_its_name(name, tmp_path):
    path = write(tmp_path / name, IDS.astype(np.uint8), format="JPEG")
    with refused(name, "lossy"):
        read_label(path, class_table("256"))


@pytest.mark.parametrize("classes", ["cityscapes", "camvid", "facades", "ade20k"])
def test_a_0_255_mask_is_named_as_a_mask(classes, tmp_path):
    path = write(tmp_path / "l.png", np.uint8(255 * (IDS > 4)))
    with refused("l.png", "255", "mask"):
        read_label(path, class_table(classes))


def test_a_0_255_mask_is_named_when_classes_are_counted(tmp_path):
    for k in range(2):
        write(tmp_path / "train_label" / f"{k}.png", np.uint8(255 * (IDS > 4)))
        write(tmp_path / "train_img" / f"{k}.png", photo(k, IDS.shape))
    with refused("0.png", "mask"):
        Dataset(str(tmp_path))


def test_masks_are_named_when_the_classes_are_given_too(tmp_path, capsys):
    """--classes 2 with 0/255 masks: without a word all of class 1 would be trained as unknown."""
    for k in range(2):
        write(tmp_path / "train_label" / f"{k}.png", np.uint8(255 * (IDS > 4)))
        write(tmp_path / "train_img" / f"{k}.png", photo(k, IDS.shape))
    try:
        dataset = Dataset(str(tmp_path), classes="2")
        common.describe(dataset)
        said = capsys.readouterr().out
    except UserError as error:
        said = str(error)
    assert "mask" in said


def test_one_file_of_class_0_and_unknown_is_no_mask(tmp_path):
    """Where ids are 0..8, a map that happens to hold only 0 and 255 (unknown) is right."""
    write(tmp_path / "train_label" / "0.png", np.where(IDS > 4, 255, 0).astype(np.uint8))
    write(tmp_path / "train_label" / "1.png", IDS.astype(np.uint8))
    for k in range(2):
        write(tmp_path / "train_img" / f"{k}.png", photo(k, IDS.shape))
    dataset = Dataset(str(tmp_path))
    assert dataset.classes == "9" and set(dataset[0]["label"].unique().tolist()) == {0, 9}


@pytest.mark.parametrize("classes, value, words", [
    ("cityscapes", 35, ("35", "0..34", "--classes 36")), ("9", 9, ("9", "0..8", "255")),
    ("facades", 0, ("0", "1..12")), ("facades", 13, ("13", "1..12", "--classes 14")),
    ("ade20k", 151, ("151", "1..150")), ("camvid", 12, ("12", "0..10", "11"))])
def test_an_id_outside_names_file_value_and_cure(classes, value, words, tmp_path):
    ids = np.full((4, 4), 1, np.uint8)
    ids[2, 1] = value
    with refused("bad.png", "--classes", *words):
        read_label(write(tmp_path / "bad.png", ids), class_table(classes))


def test_an_id_outside_is_refused_by_a_loader_worker_too(tmp_path):
    lay_out(tmp_path, "CamVid", range(2))
    write(tmp_path / "trainannot" / "0001TP_000001.png", grey(77))
    batches = iter(DataLoader(Dataset(str(tmp_path)), num_workers=1))
    next(batches)
    try:
        next(batches)
        said = ""
    except UserError as error:
        said = str(error)  # no pytest.raises: it would keep the worker alive
    assert "0001TP_000001.png: label id 77" in said


@pytest.mark.parametrize("classes, raw, want", [
    ("coco_stuff", [0, 181, 255], [0, 181, 182]), ("9", [0, 8, 255], [0, 8, 9]),
    ("ade20k", [0, 1, 150], [150, 0, 149]), ("facades", [1, 2, 12], [0, 1, 11]),
    ("camvid", [0, 10, 11], [0, 10, 11]), ("cityscapes", [0, 7, 34], [0, 7, 34])])
def test_file_values_become_ids(classes, raw, want, tmp_path):
    path = write(tmp_path / "l.png", np.array([raw], np.uint8))
    assert read_label(path, class_table(classes)).tolist() == [want]
    assert max(want) < class_table(classes).channels


def test_ids_above_32767_stay_positive(tmp_path):
    raw = np.array([[0, 32767, 32768, 65000]], np.uint16)
    path = write(tmp_path / "l.png", raw)
    assert read_label(path, class_table("65001")).tolist() == raw.tolist()
    assert read_instance(path).tolist() == raw.tolist()


def test_unknown_layouts_count_their_ids(tmp_path, capsys):
    for k, top in enumerate((3, 6)):
        ids = grey(top)
        ids[0, 0] = 255
        write(tmp_path / "train_label" / f"{k}.png", ids)
        write(tmp_path / "train_img" / f"{k}.png", photo(k))
    dataset = Dataset(str(tmp_path))
    assert dataset.classes == "7" and dataset[0]["label"][0, 0] == 7
    assert "7 classes" in capsys.readouterr().out
    assert Dataset(str(tmp_path), classes="20").table.channels == 21
    with refused("label id 6", "0..4"):
        Dataset(str(tmp_path), classes="5")[1]


# ---------------------------------------------------------------------------------- instances

def test_8_and_16_bit_and_palette_instances_are_the_same(tmp_path):
    ids = (np.arange(192).reshape(12, 16) % 41).astype(np.uint8)
    items = []
    for kind, image in {"a": ids, "b": ids.astype(np.uint16), "c": palette_png(ids)}.items():
        root = tmp_path / kind
        lay_out(root, "pix2pixHD", [0])
        write(root / "train_inst" / "mine 0.png", image)
        items.append(Dataset(str(root), size=(8, 12), jitter=True, mirror=True)[0]["instance"])
    assert torch.equal(items[0], items[1]) and torch.equal(items[0], items[2])
    assert len(items[0].unique()) > 30               # not merged into one, as 8 bit is in pix2pixHD


def test_colour_instances_are_r_256g_65536b(tmp_path):
    array = np.array([[(1, 0, 0), (0, 1, 0), (0, 0, 1), (5, 4, 3), (255, 255, 255)]], np.uint8)
    want = [[1, 256, 65536, 5 + 4 * 256 + 3 * 65536, 2 ** 24 - 1]]
    assert read_instance(write(tmp_path / "i.png", array)).tolist() == want
    alpha = np.concatenate([array, np.full((1, 5, 1), 9, np.uint8)], 2)
    assert read_instance(write(tmp_path / "j.png", alpha)).tolist() == want


def test_32_bit_instances_survive_exactly(tmp_path):
    ids = np.array([[0, 70000, 16777215, 16777214]], np.int32)
    path = write(tmp_path / "train_inst" / "a.tif", Image.fromarray(ids, mode="I"))
    assert read_instance(path).tolist() == ids.tolist()
    write(tmp_path / "train_label" / "a.png", np.zeros((1, 4), np.uint8))
    item = Dataset(str(tmp_path), size=(2, 8), classes="2")[0]    # resizing goes through float32
    assert set(item["instance"].unique().tolist()) == set(ids.ravel().tolist())
    for bad in (2 ** 24, -1):
        path = write(tmp_path / "b.tif", Image.fromarray(np.full((2, 2), bad, np.int32), mode="I"))
        with refused("b.tif", bad):
            read_instance(path)


def test_grey_alpha_instances_are_read_or_refused(tmp_path):
    path = write(tmp_path / "i.png", Image.fromarray(IDS.astype(np.uint8)).convert("LA"))
    try:
        assert np.array_equal(read_instance(path), IDS)
    except UserError as error:
        assert "i.png" in str(error)


def test_jpeg_instance_map_is_refused(tmp_path):
    with refused("i.jpg"):
        read_instance(write(tmp_path / "i.jpg", IDS.astype(np.uint8)))


# ------------------------------------------------------------------------ resizing and cropping

def coordinates(root: Path, side: int = 36) -> None:
    """An example that holds its coordinates: label x, instance side * y + x, photo both."""
    y, x = np.mgrid[:side, :side]
    write(root / "train_label" / "a.png", x.astype(np.uint8))
    instance = side * y + x
    write(root / "train_inst" / "a.png", np.stack([instance % 256, instance // 256 % 256,
                                                   instance // 65536], 2).astype(np.uint8))
    step = 252 // side if side < 252 else 1
    write(root /
    "train_img" /
    "a.png", np.stack([step *
    x %
    256, step *
    y %
    256, 0 *
     x], 2).astype(np.uint8))


def test_label_instance_and_photo_get_the_same_crop_and_flip(tmp_path):
    coordinates(tmp_path)
    dataset = Dataset(str(tmp_path), size=(32, 32), jitter=True, mirror=True, classes="36")
    places = set()
    for dataset.epoch in range(200):
        item = dataset[0]
        x, y = item["instance"] % 36, item["instance"] // 36
        assert torch.equal(item["label"], x)
        r, g = (((item["image"][c] + 1) * 127.5 / 7).round().long() for c in (0, 1))
        assert torch.equal(r, x) and torch.equal(g, y)
        flip = bool(x[0, 0] > x[0, -1])
        assert (x.max() - x.min(), y.max() - y.min()) == (31, 31)
        places.add((int(x.min()), int(y.min()), flip))
    assert {p[0] for p in places} == {p[1] for p in places} == {0, 1, 2, 3, 4}    # 36 - 32
    assert {p[2] for p in places} == {False, True}
    assert len(places) > 35                          # of 50: row, column and flip are independent


def test_jitter_at_256_is_286_cropped_at_0_to_30(tmp_path):
    """Sec. 6.2 of pix2pix: resize to 286 x 286, crop back to 256 x 256."""
    coordinates(tmp_path, 286)
    os.remove(tmp_path / "train_label" / "a.png")    # x would not fit into 8 bits
    write(tmp_path / "train_label" / "a.png", np.zeros((286, 286), np.uint8))
    dataset = Dataset(str(tmp_path), size=(256, 256), jitter=True, classes="2")
    corners = []
    for dataset.epoch in range(250):
        corners.append(divmod(int(dataset[0]["instance"][0, 0]), 286))
    rows, columns = zip(*corners)
    assert (min(rows), max(rows), min(columns), max(columns)) == (0, 30, 0, 30)


def test_mirror_flips_half_of_the_time(tmp_path):
    coordinates(tmp_path)
    dataset = Dataset(str(tmp_path), mirror=True, classes="36")
    flips = 0
    for dataset.epoch in range(400):
        flips += int(dataset[0]["label"][0, 0] == 35)
    assert 160 <= flips <= 240                       # four standard deviations


@pytest.mark.parametrize("size", [(5, 7), (24, 32), (31, 50), (12, 16)])
def test_resizing_adds_no_id(size, tmp_path):
    ids = np.random.default_rng(0).choice([0, 3, 200], (12, 16)).astype(np.uint8)
    write(tmp_path / "train_label" / "a.png", ids)
    write(tmp_path / "train_inst" / "a.png", np.uint16(ids) * 300)
    write(tmp_path / "train_img" / "a.png", photo(1))
    item = Dataset(str(tmp_path), size=size, classes="201")[0]
    assert item["label"].shape == item["instance"].shape == item["image"].shape[1:] == size
    assert set(item["label"].unique().tolist()) <= {0, 3, 200}
    assert torch.equal(item["instance"], 300 * item["label"])


def test_size_none_keeps_each_files_own_size(tmp_path):
    write(tmp_path / "0.png", photo(0, (9, 7)))
    write(tmp_path / "1.png", photo(1, (5, 30)))
    write(tmp_path / "2.png", photo(2, (8, 8)))
    dataset = Dataset(str(tmp_path), photos_only=True, jitter=True)
    assert [tuple(dataset[i]["image"].shape[1:]) for i in range(len(dataset))] == [(9, 7), (8, 8)]


def test_labels_and_photos_shrink_to_the_same_place(tmp_path):
    """An edge at source pixel e, seen after shrinking fourfold in the label and in the photo.

    Nearest neighbour at pixel centres errs by half a source pixel at most, taken over all e.
    """
    edges = np.arange(20, 100)
    left = np.arange(128)[None] >= edges[:, None]
    write(tmp_path / "train_label" / "a.png", left.astype(np.uint8))
    write(tmp_path / "train_img" / "a.png", np.repeat(255 * left[..., None], 3, 2).astype(np.uint8))
    item = Dataset(str(tmp_path), size=(80, 32), classes="2")[0]
    in_label = 4 * (item["label"] == 0).sum(1).double()
    in_photo = 4 * (1 - (item["image"][0].double() + 1) / 2).sum(1)
    assert abs((in_photo - torch.from_numpy(edges)).mean()) < .3
    assert abs((in_label - in_photo).mean()) <= .75, "the labels are shifted against the photos"


def test_photos_shrink_without_aliasing(tmp_path):
    """White noise of spread .577 shrinks fourfold to below .25; point samples would keep .4."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    write(tmp_path / "a.png", noise)
    assert Dataset(str(tmp_path), size=(32, 32), photos_only=True)[0]["image"].std() < .25


# ------------------------------------------------------------------------------------- photos

def exif_rotated(array: np.ndarray) -> tuple[Image.Image, dict]:
    exif = Image.Exif()
    exif[0x0112] = 6                             # stored lying: turn clockwise to see it upright
    return Image.fromarray(array), {"exif": exif, "quality": 95}


def test_photo_grey_is_repeated(tmp_path):
    ramp = np.arange(200, dtype=np.uint8).reshape(10, 20)
    image = read_image(write(tmp_path / "g.png", ramp))
    assert image.shape == (3, 10, 20) and image.dtype == torch.uint8
    assert all(np.array_equal(channel, ramp) for channel in image)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_photo_alpha_is_dropped_with_one_notice(mode, tmp_path, capsys):
    for name in ("a", "b", "c"):
        image = Image.fromarray(photo(3)).convert(mode)
        image.putalpha(Image.fromarray(grey(7)))
        write(tmp_path / f"{name}.png", image)
        got = read_image(tmp_path / f"{name}.png")
        want = np.asarray(
    Image.fromarray(
        photo(3)).convert(
            "L" if mode == "LA" else "RGB").convert("RGB"))
        assert np.array_equal(got.permute(1, 2, 0), want)
    assert capsys.readouterr().out.count("transparency is dropped") == 1     # not once per file


def test_photo_cmyk(tmp_path):
    path = write(tmp_path / "c.jpg", Image.fromarray(photo(5)).convert("CMYK"), quality=95)
    assert Image.open(path).mode == "CMYK"
    got = read_image(path)
    assert got.shape == (3, 12, 16) and abs(got.float().mean(
        (1, 2)) - torch.tensor([110., 90, 60])).max() < 6


def test_photo_palette(tmp_path):
    image = palette_png(np.tile(np.arange(16, dtype=np.uint8), (12, 1)))
    got = read_image(write(tmp_path / "p.png", image))
    want = [[(7 * i + 3 * c) % 256 for i in range(16)] for c in range(3)]
    assert got[:, 0].tolist() == want


def test_photo_16_bit_is_scaled_by_its_range_with_a_notice(tmp_path, capsys):
    deep = np.linspace(1000, 41000, 192).round().astype(np.uint16).reshape(12, 16)
    got = read_image(write(tmp_path / "d.png", deep))
    want = (deep.astype(float) - 1000) / 40000 * 255
    assert np.abs(got.numpy() - want).max() <= .51
    assert re.search(r"note: .*1000.*41000", capsys.readouterr().out)
    flat = read_image(write(tmp_path / "e.png", np.full((4, 4), 500, np.uint16)))
    assert flat.shape == (3, 4, 4)                   # a range of nothing divides by nothing


def test_photo_animated_gif_gives_its_first_frame_with_a_notice(tmp_path, capsys):
    frames = [Image.fromarray(photo(k)) for k in (2, 5, 8)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    got = read_image(tmp_path / "a.gif")
    assert got.shape == (3, 12, 16) and abs(got[0].float().mean() - 50) < 4
    assert "first frame" in capsys.readouterr().out


def test_photo_exif_rotation_is_applied(tmp_path):
    array = np.zeros((8, 24, 3), np.uint8)
    # stored: left half white; upright: top half white
    array[:, :12] = 255
    image, options = exif_rotated(array)
    got = read_image(write(tmp_path / "r.jpg", image, **options))
    assert got.shape == (3, 24, 8)
    assert got[:, :10].min() > 200 and got[:, 14:].max() < 50


BROKEN = {
    "zero.png": lambda: b"",
    "text.png": lambda: b"this is no image\n" * 20,
    "page.jpg": lambda: b"<html><body>404 Not Found</body></html>",
    "half.jpg": lambda: encoded("JPEG")[:-400],
    "half.png": lambda: encoded("PNG")[:-400],
    "header.png": lambda: encoded("PNG")[:30],
    "header.jpg": lambda: encoded("JPEG")[:30],
    "half.gif": lambda: encoded("GIF")[:400],
    "half.tif": lambda: encoded("TIFF")[:-1200],
    "half.webp": lambda: encoded("WEBP")[:-100],
    "bomb.png": lambda: bomb(),
    "zip.png": lambda: b"PK\x03\x04" + bytes(100),
}


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def bomb(side: int = 60000) -> bytes:
    """A PNG of 100 bytes whose header promises 3.6 Gigapixels."""
    chunk = lambda tag, data: (struct.pack(">I", len(data)) + tag + data
                               + struct.pack(">I", zlib.crc32(tag + data)))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))


@pytest.mark.parametrize("reader", ["image", "label", "instance"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name, reader, tmp_path):
    path = tmp_path / name
    path.write_bytes(BROKEN[name]())
    read = {"image": read_image, "label": lambda p: read_label(p, class_table("cityscapes")),
            "instance": read_instance}[reader]
    with refused(path):
        read(path)


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


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.png", photo(1))

    def deny(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Image, "open", deny)
    with refused("a.png", "permission"):
        read_image(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid()
                    == 0, reason="root may read everything")
def test_permissions_on_disk(tmp_path):
    path = write(tmp_path / "train" / "a.png", photo(1))
    path.chmod(0)
    with refused("a.png", "permission"):
        read_image(path)
    path.chmod(0o444)
    path.parent.chmod(0o555)
    tmp_path.chmod(0o555)                            # a read-only dataset is fine
    assert len(Dataset(str(tmp_path), photos_only=True)[0]["image"]) == 3
    tmp_path.chmod(0o755)
    path.parent.chmod(0)
    with refused(tmp_path):
        Dataset(str(tmp_path), photos_only=True)
    path.parent.chmod(0o755)


def test_a_missing_file_is_named(tmp_path):
    with refused("gone.png", "no such file"):
        read_image(tmp_path / "gone.png")


# ------------------------------------------------------------------------- faults of a dataset

def test_data_missing(tmp_path):
    with refused("--data", tmp_path / "nowhere", "no such folder"):
        Dataset(str(tmp_path / "nowhere"))


def test_data_is_a_file(tmp_path):
    with refused("--data", "a.png", "not a folder"):
        Dataset(str(write(tmp_path / "a.png", photo(1))))


def test_data_is_empty(tmp_path):
    with refused("--data", tmp_path, "train_label", "gtFine", "nothing"):
        Dataset(str(tmp_path))


def test_data_of_no_known_layout_says_what_was_looked_for_and_found(tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "notes.md").write_text("hello")
    with refused("no known layout", "scans/", "notes.md", "gtFine", "train_label", "annotations",
                 "trainA", "train/*"):
        Dataset(str(tmp_path))


def test_photos_without_labels_are_no_dataset_of_labels(tmp_path):
    for k in range(2):
        write(tmp_path / "train_img" / f"{k}.jpg", photo(k))
    with refused("train_img/", "train_label"):
        Dataset(str(tmp_path))


def test_sizes_that_differ_are_found_before_training(tmp_path):
    lay_out(tmp_path, "pix2pixHD", range(3))
    write(tmp_path / "train_img" / "mine 2.jpg", photo(2, (20, 31)))
    with refused("mine 2", "16x12", "31x20"):
        common.describe(Dataset(str(tmp_path)))      # runs print this before they train


def test_a_photo_turned_by_exif_fits_its_upright_label(tmp_path):
    lay_out(tmp_path, "pix2pixHD", range(2), roles=["label", "image"])
    image, options = exif_rotated(photo(0, (16, 12)))
    write(tmp_path / "train_img" / "mine 0.jpg", image, **options)
    dataset = Dataset(str(tmp_path))
    common.describe(dataset)
    assert check_item(dataset[0], "ADE20K") == 0


def test_checking_sizes_reads_headers_only(tmp_path, monkeypatch):
    """2975 Cityscapes triples must not be decoded before training starts."""
    lay_out(tmp_path, "pix2pixHD", range(3))
    from PIL import ImageFile
    decoded, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(
    ImageFile.ImageFile,
    "load",
     lambda self: decoded.append(self) or load(self))
    Dataset(str(tmp_path), classes="5").check_sizes()
    assert not decoded


def test_an_empty_train_split_is_named(tmp_path):
    lay_out(tmp_path, "ADE20K", [0, 1], split=1)
    with refused(tmp_path, "ADE20K", "train"):
        Dataset(str(tmp_path))


def test_an_empty_split_of_a_counted_layout_says_nothing_false(tmp_path, capsys):
    lay_out(tmp_path, "pix2pixHD", [0, 1], split=1)
    with refused(tmp_path, "train"):
        Dataset(str(tmp_path))
    assert "0 classes" not in capsys.readouterr().out


def test_without_a_test_split_training_examples_stand_in_aloud(tmp_path, capsys):
    lay_out(tmp_path, "ADE20K", [0, 1, 2])
    test = Dataset(str(tmp_path), "test")
    assert len(test) == 3 and "no test split" in capsys.readouterr().out


def test_one_image_only_serves_both_splits_aloud(tmp_path, capsys):
    write(tmp_path / "only.png", photo(4))
    train, test = (Dataset(str(tmp_path), s, photos_only=True) for s in ("train", "test"))
    assert len(train) == len(test) == 1
    assert "test split" in capsys.readouterr().out


def test_a_pair_too_narrow_for_two_halves(tmp_path):
    write(tmp_path / "train" / "thin.png", photo(1, (5, 1)))
    with refused("thin.png", "narrow"):
        Dataset(str(tmp_path))[0]


def test_classes_option_overrides_the_layouts(tmp_path):
    lay_out(tmp_path, "ADE20K", [0, 1])
    dataset = Dataset(str(tmp_path), classes="9")
    assert dataset.table.channels == 10 and int(
        dataset[0]["label"][0, -1]) == 1     # no longer 1-based
    with refused("--classes", "ade20K"):
        Dataset(str(tmp_path), classes="ade20K")


# --------------------------------------------------------------------------------- randomness

@pytest.fixture
def noisy(tmp_path):
    for k in range(6):
        noise = np.random.default_rng(k).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        write(tmp_path / "train" / f"{k}.png", noise)
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


@pytest.mark.parametrize("workers", [0, 2])
def test_items_do_not_depend_on_the_number_of_workers(workers, noisy):
    dataset = noisy(seed=3)
    dataset.epoch = 2
    want = images(dataset)
    loader = DataLoader(dataset, 2, num_workers=workers)
    for _ in range(2):
        assert torch.equal(torch.cat([batch["image"] for batch in loader]), want)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_reads_in_order_as_of_the_epoch_asked_for(workers, noisy):
    dataset = noisy(seed=3)
    loader = common.Loader(dataset, 2, workers)
    for epoch, order in ((5, [3, 0, 2, 1]), (6, [2, 1]), (5, [3, 0, 2, 1, 0])):    # an odd one ends
        batches = list(loader.read(epoch, order))
        dataset.epoch = epoch
        want = torch.stack([dataset[i]["image"] for i in order[:len(order) // 2 * 2]])
        assert torch.equal(torch.cat([batch["image"] for batch in batches]), want)


def test_the_loader_keeps_its_processes_and_goes_on_after_a_break():
    class Where(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return {"index": index, "process": os.getpid()}

    loader, processes = common.Loader(Where(), None, 2), set()
    for epoch in range(3):
        for k, item in enumerate(loader.read(epoch, range(8))):
            assert tuple(item["index"]) == (epoch, k)
            processes.add(item["process"])
            if k == 5:
                break
    assert len(processes) == 2 and os.getpid() not in processes


def test_another_epoch_gives_another_crop(noisy):
    dataset = noisy()
    seen = set()
    for dataset.epoch in range(20):
        seen.add(dataset[0]["image"].numpy().tobytes())
    assert len(seen) > 6                             # of 4 places x 2 flips (load size 18)


def test_examples_of_one_epoch_are_cropped_independently(tmp_path):
    """The same file under eight names: not all crops of an epoch may be alike."""
    y, x = np.mgrid[:24, :24]
    for k in range(8):
        write(tmp_path / "train" / f"{k}.png", np.stack([x, y, x], 2).astype(np.uint8) * 10)
    dataset = Dataset(str(tmp_path), size=(16, 16), jitter=True, mirror=True, photos_only=True)
    assert len({dataset[i]["image"].numpy().tobytes() for i in range(8)}) > 2


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
        write(tmp_path / "trainannot" / f"s{k}.png", ids)
        write(tmp_path / "train" / f"s{k}.png", rgb)
        truth.append((ids, rgb))
    return tmp_path, truth


def test_examine_counts_like_numpy(clinic):
    root, truth = clinic
    lines, bad = common.examine(Dataset(str(root)))
    ids, rgb = np.concatenate([t[0] for t in truth]), np.concatenate([t[1] for t in truth])
    assert bad == [] and "10x14 (4)" in lines[0]
    rows = {}
    for line in lines:
        match = re.match(r" *(\d+) (\S+) +([\d.]+)% +(\d+) +\(?(\d+), (\d+), (\d+)\)?$", line)
        if match:
            rows[int(match[1])] = match[2], float(match[3]), int(
                match[4]), [int(match[k]) for k in (5, 6, 7)]
    assert set(rows) == {0, 3, 8, 11}
    assert [rows[k][0] for k in (0, 3, 8, 11)] == ["sky", "road", "car", "unknown"]
    for k, (_, share, n, colour) in rows.items():
        assert share == pytest.approx(100 * np.mean(ids == k), abs=.006)
        assert n == sum((t[0] == k).any() for t in truth)
        assert colour == pytest.approx(rgb[ids == k].mean(0), abs=.51)


def test_examine_lists_all_bad_files(clinic):
    root, _ = clinic
    (root / "train" / "s0.png").write_bytes(b"")
    (root / "train" / "s1.png").write_bytes((root / "train" / "s1.png").read_bytes()[:-200])
    write(root / "trainannot" / "s2.png", grey(99, (10, 14)))
    lines, bad = common.examine(Dataset(str(root)))
    assert len(bad) == 3
    for name, line in zip(("s0.png", "s1.png", "s2.png"), bad):
        assert name in line
    write(root / "train" / "s3.png", photo(3, (7, 14)))
    _, bad = common.examine(Dataset(str(root)))
    assert len(bad) == 4 and "s3.png" in bad[3] and "sizes differ" in bad[3]
    assert "10x14 (1)" in lines[0]


def test_examine_lists_bad_pixels_of_several_files(clinic):
    """What the headers do not show: ids outside and a photo cut off."""
    root, _ = clinic
    for k in (1, 2, 3):
        write(root / "trainannot" / f"s{k}.png", grey(90 + k, (10, 14)))
    _, bad = common.examine(Dataset(str(root)))
    assert [re.search(r"s(\d).png: label id (\d+)", line).groups() for line in bad] == [
        ("1", "91"), ("2", "92"), ("3", "93")]


def test_check_data_reports_and_draws_eight_pairs(tmp_path, capsys):
    for k in range(10):
        ids = grey(k % 5, (32, 32))
        write(tmp_path / "data" / "trainannot" / f"s{k}.png", ids)
        write(tmp_path / "data" / "train" / f"s{k}.png", photo(k, (32, 32)))
    write(tmp_path / "data" / "trainannot" / "s7.png", grey(50, (32, 32)))
    dataset = Dataset(str(tmp_path / "data"), size=(32, 32))
    assert common.check_data([dataset], tmp_path / "out") == 1
    text = capsys.readouterr().out
    assert "CamVid" in text and "10 examples" in text and "BAD" in text and "s7.png" in text
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_train.png")).astype(int)
    cells = [sheet[2 + 130 * r + 64, 2 + 130 * c + 64] for r in range(4) for c in range(4)]
    assert sheet.shape == (2 + 4 * 130, 2 + 4 * 130, 3)
    for at, k in enumerate([0, 1, 2, 3, 4, 5, 6, 8]):        # 7 is bad and left out
        assert abs(cells[2 * at] - common.CAMVID[1][k % 5]).max() <= 1
        assert abs(cells[2 * at + 1] - (20 * k + 10, 90, 60)).max() <= 1


@pytest.mark.parametrize("layout", ["pix2pix pairs", "GTA-5", "unpaired"])
def test_check_data_works_for_other_layouts(layout, tmp_path, capsys):
    lay_out(tmp_path / "d", layout, range(4))
    sets = [Dataset(str(tmp_path / "d"), s) for s in ("train", "test")]
    assert common.check_data(sets, tmp_path / "out") == 0
    assert (tmp_path / "out" / "contact_train.png").is_file()
    assert (tmp_path / "out" / "contact_test.png").is_file()


def test_check_data_draws_very_tall_photos(tmp_path):
    write(tmp_path / "d" / "train" / "tall.png", photo(1, (300, 2)))
    assert common.check_data(
        [Dataset(str(tmp_path / "d"), photos_only=True)], tmp_path / "out") == 0


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
