"""benchmark.py's yardstick: each column on pictures whose value is known beforehand; tables.py."""

import re
from types import SimpleNamespace

import pytest
import torch

import benchmark
import common
import tables
from conftest import NAMES, TINY, as_user


def test_energy_distance_is_0_for_the_law_and_finds_one_mode_or_one_mean():
    """Colours black .7 or white .3, by hand, over E|Y - Y'| = 2 (.7) (.3) = .42."""
    law = (torch.rand(200, 24, 1, generator=torch.Generator().manual_seed(0)) < .3).float()
    law, owner = law.expand(-1, -1, 3), torch.arange(200) // 2
    distance = lambda x: benchmark.energy_distance(x, law, owner)
    assert distance(law[:, :1]) == pytest.approx(0, abs=.03)             # a true photo of each
    shared = law[:1, :4].expand(200, -1, -1)                             # all layouts, one noise
    share = shared[0, :, 0].mean().item()
    mixed = share * .7 + (1 - share) * .3
    within = 2 * share * (1 - share) * 4 / 3
    assert distance(shared) == pytest.approx((2 * mixed - within - .42) / .42, abs=.03)
    assert distance(torch.zeros(200, 1, 3)) == pytest.approx((.6 - .42) / .42, abs=.03)
    assert distance(torch.full((200, 1, 3), .3)) == pytest.approx((.84 - .42) / .42, abs=.03)


def test_edges_are_the_laplacian_and_flat_has_none():
    """A dot of height 1 has the Laplacian -4 and 1 at each of its four neighbours: 8 in all."""
    image, label = torch.zeros(2, 3, 9, 9), torch.zeros(9, 9, dtype=torch.int64)
    image[:, :, 4, 4], label[4] = 1, 2                                   # the dot's row: class 2
    sums, counts = benchmark.edges(image, label)
    assert sums[[0, 2]].tolist() == [2 * 3 * 2, 2 * 3 * 6] and sums.sum() == 48
    assert counts[[0, 2]].tolist() == [6 * 72, 6 * 9]
    painted = benchmark.flat(image[0], label)
    assert torch.allclose(painted[:, 4], torch.tensor(1 / 9)) and not painted[:, :4].any()


def test_rows_of_the_law_have_the_values_that_they_should():
    torch.manual_seed(0)
    test_set = common.Dataset(split="test", size=(32, 32), limit=3)
    streets = [benchmark.street_of(k, test_set[i], 6) for i, k in enumerate(test_set.files)]
    judge = common.FCN8s(12, 2).eval()                                   # says "sky" everywhere
    stack = lambda make: torch.stack([make(street) for street in streets])
    true, classes = benchmark.scores(stack(lambda s: s.sampled), streets, judge)
    sky = stack(lambda s: (s.label == 0).float()).mean().item()
    assert true["pixel acc"] == pytest.approx(sky) and classes["IoU"][0] == pytest.approx(sky)
    assert .8 < true["sharp"] < 1.2 and .5 < true["variance"] < 1.5
    assert .6 < true["times"] < 1.4 and .6 < true["paints"] < 1.4
    mean = benchmark.scores(stack(lambda s: s.law.mean(0)[None]), streets, judge)[0]
    assert mean["sharp"] < .8 * true["sharp"] and "variance" not in mean
    assert mean["colours"] > .1 > true["colours"] and mean["valid"] <= true["valid"]
    same = benchmark.scores(stack(lambda s: s.sampled[:1].expand(6, -1, -1, -1)), streets, judge)[0]
    assert same["variance"] == 0 and same["times"] < true["times"]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_what_the_script_samples(name, tmp_path):
    assert as_user(name, f"train {TINY[name]} --steps 2 --out {tmp_path / 'run'}").code == 0
    options = SimpleNamespace(images=2, samples=3, gpu=-1)
    pictures = benchmark.pictures_of(tmp_path / "run", options)
    side = 64 if name == "lab2pix" else 32
    assert pictures.shape == (2, 3, 3, side, side) and pictures.abs().max() <= 1
    file = "street_1000001_3.png"
    as_user(name, f"sample --checkpoint {tmp_path}/run/checkpoint.pt --samples 3 --output o")
    assert torch.equal(pictures[1, 2], common.read_image(tmp_path / "o" / file) / 127.5 - 1)
    judge, others = common.FCN8s(12, 2).eval(), benchmark.other_streets((side, side), 3)
    made, photos = (benchmark.features(judge, pictures) for pictures in (
        benchmark.made_of(others, tmp_path / "run", -1), benchmark.photos_of(others)))
    assert made.shape == photos.shape == (3, 16) and not torch.equal(made, photos)


def test_touching_vehicles_are_told_apart_by_their_border():
    label = torch.full((4, 6), common.CLASS_ID["road"])
    label[1:3, 1:5], instance = common.CLASS_ID["car"], torch.zeros(4, 6, dtype=torch.int64)
    instance[1:3, 1:3], instance[1:3, 3:5] = 1, 2
    street, grey = SimpleNamespace(label=label, instance=instance), torch.zeros(2, 3, 4, 6)
    apart = grey.clone()
    apart[..., instance == 2] = .5
    assert benchmark.across(grey, street) == 0
    assert benchmark.across(apart, street) == .5 * 3 * 2                 # 2 pixels high
    street.instance = torch.ones_like(instance)
    assert benchmark.across(apart, street) == 0


def test_an_order_holds_falls_or_lies_within_the_spread():
    assert tables.verdict([3, 4, 5], [0, 1, 2]) == "holds"
    assert tables.verdict([0, 1, 2], [3, 4, 5]) == "falls"
    assert tables.verdict([3, 4, 5], [2.5, 3.5, 4.5]) == "within the spread"
    assert tables.verdict([.2], [.2]) == "within the spread"             # one seed, a tie
    assert tables.goodness("sharp", 1.5) == tables.goodness("sharp", .5) < 0
    assert tables.goodness("colours", .1) > tables.goodness("colours", .2)
    assert tables.goodness("colours", -.1) == tables.goodness("colours", 0.)


def test_a_table_trains_each_row_once_and_goes_on(tmp_path, monkeypatch, capsys):
    flags = f"{TINY['pix2pix']} --steps 2"
    tiny = tables.of("pix2pix", "IoU", ("IoU", "sharp", "Frechet"), flags, {
        "L1": ("--loss L1", .42), "L1+cGAN": ("", .66)})
    labels = tables.of("pix2pix", "class IOU", ("class IOU",), f"{flags} --task photo2labels", {
        "cGAN": ("--loss cGAN", .74), "L1+cGAN": ("", .83)})
    monkeypatch.setattr(tables, "TABLES", {"one": tiny, "two": tiny, "labels": labels})
    monkeypatch.setattr(benchmark, "JUDGE", dict(width=2, steps=2))
    words = "tables --seeds 2 --images 2 --samples 2 --frechet 3 --threads 1 --gpu -1 --out"
    monkeypatch.setattr("sys.argv", [*words.split(), str(tmp_path)])
    tables.main()
    said = capsys.readouterr().out
    assert len(list(tmp_path.glob("pix2pix-*/table.json"))) == 8       # two rows, two seeds, twice
    assert len(re.findall(r"L1\+cGAN over L1: IoU (?:holds|falls|within)", said)) == 2
    assert len(re.findall(r"L1\+cGAN over cGAN: class IOU (?:holds|falls|within)", said)) == 1
    assert len(re.findall(r"^L1\+cGAN +0\.66 +0\.\d+ ± 0\.\d+", said, re.MULTILINE)) == 2
    next(tmp_path.glob("pix2pix-*/table.json")).unlink()               # trained, but not judged
    tables.main()
    assert capsys.readouterr().out.endswith(said[said.index("\none, pix2pix"):][-400:])


def test_runs_are_compared_with_half_as_long_ones(capsys, monkeypatch):
    table = tables.of("pix2pix", "IoU", ("IoU", "sharp"), "--epochs 12 --size 64 64", {
        "a": ("", .4), "b": ("", .5), "c": ("", .6)})
    monkeypatch.setattr(tables, "TABLES", {"one": table})
    assert tables.commands("one", 1, half=True)["a", 0] == "--epochs 6 --size 64 64 --seed 0"
    of = lambda **rows: {row: [dict(zip(table.measures, values))] for row, values in rows.items()}
    half = of(a=(.1, .75), b=(.2, .5), c=(.3, 1.25))
    assert tables.orders("one", half) == {"b over a": ["holds", "falls"],
                                          "c over b": ["holds", "holds"]}
    tables.show("one", of(a=(.3, .75), b=(.2, .75), c=(.4, 1.25)), half)
    said = capsys.readouterr().out
    was = "sharp within the spread (half as long"
    assert "--epochs 12" in said and f"c over b: IoU holds, {was}: holds)" in said
    assert f"b over a: IoU falls (half as long: holds), {was}: falls)" in said
    assert "flipped, holds to falls or back: 1 of 4" in said             # ties are no flips
