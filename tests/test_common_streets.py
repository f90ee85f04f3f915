"""common.py, room 6: the built-in streets, whose true distribution is claimed to be known.

The claims that make them a yardstick: the photo is a function of (layout, style), every style looks
different, and whoever knows the layout can read the style off the photo. All measured here with
means of regions, by numpy.
"""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from conftest import SCRIPTS

import common
from common import CLASS_ID, STREET_GRAIN, STREETS, Style, modes, paint, street, street_scene

sys.path.insert(0, str(SCRIPTS / "notebooks"))
import helpers  # noqa: E402
from helpers import Street  # noqa: E402

SIDE = 64
THINGS = {CLASS_ID[name] for name in ("person", "car", "truck")}


@pytest.fixture(scope="module")
def oracles():
    return [Street(index, (SIDE, SIDE)) for index in range(14)]


def first_colours(oracle: Street) -> list[str]:
    return [next(iter(common.COLOR_LAW[kind])) for _, kind in oracle.layout.vehicles]


def style_of(oracle: Street, mode: torch.Tensor) -> Style:
    """The style of a mode as `Street.read` gives it."""
    names = [list(common.COLOR_LAW[kind])[c]
             for c, (_, kind) in zip(mode[1:].tolist(), oracle.layout.vehicles)]
    return Style(*oracle.airs[mode[0]], tuple(names))


def tensor(photo: np.ndarray) -> torch.Tensor:
    """(H, W, 3) on [0, 1] -> (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(photo).permute(2, 0, 1)[None].float() * 2 - 1


# ------------------------------------------------------------------------------------- layouts

def test_a_street_depends_on_seed_and_index_alone():
    a, b, c = street(3, 5, (48, 96)), street(3, 5, (48, 96)), street(3, 6, (48, 96))
    assert set(a) == {"label", "instance", "image"}
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert not np.array_equal(a["label"], c["label"])
    assert not np.array_equal(a["label"], street(4, 5, (48, 96))["label"])


@pytest.mark.parametrize("size", [(32, 32), (48, 96), (128, 256), (37, 53), (33, 64)])
def test_streets_of_every_size(size):
    for index in range(3):
        s = street(0, index, size)
        assert s["label"].shape == s["instance"].shape == size and s["image"].shape == (*size, 3)
        assert s["label"].dtype == s["instance"].dtype == np.int64 and s["image"].dtype == np.uint8
        assert 0 <= s["label"].min() and s["label"].max() < len(STREETS)
        assert s["image"].std() > 10


def test_one_scene_at_two_sizes_is_the_same_street():
    """And a wider view shows the same middle: fully convolutional tests compare sizes."""
    for index in range(3):
        scene = street_scene(0, index)
        square, wide = paint(scene, (64, 64)), paint(scene, (64, 128))
        assert (square.label == wide.label[:, 32:96]).mean() > .97
        small, large = paint(scene, (64, 128)), paint(scene, (256, 512))
        assert small.vehicles == large.vehicles
        assert (small.label == large.label[2::4, 2::4]).mean() > .9
        style = modes(small)[0][0]
        coarse = common.render(large, style).reshape(64, 4, 128, 4, 3).mean((1, 3))
        assert np.abs(common.render(small, style) - coarse).mean() < .05


def test_instances_agree_with_labels():
    """Things are class * 1000 + k, stuff is its class: the convention of Cityscapes."""
    for index in range(12):
        layout = paint(street_scene(0, index), (64, 128))
        for k in np.unique(layout.instance):
            classes = np.unique(layout.label[layout.instance == k])
            assert len(classes) == 1
            assert (classes[0] in THINGS and k // 1000 == classes[0]) or k == classes[0]
            assert (k >= 1000) == (classes[0] in THINGS)
        for k, name in layout.vehicles:
            assert k // 1000 == CLASS_ID[name] and name in ("car", "truck")
            assert (layout.instance == k).sum() >= 40, "a vehicle of the law cannot be seen"
        vehicles = {k for k, _ in layout.vehicles}
        seen = np.unique(layout.instance)
        assert vehicles == {k for k in seen if k // 1000 in (CLASS_ID["car"], CLASS_ID["truck"])}


def test_streets_differ_and_show_at_least_eight_classes():
    labels = [paint(street_scene(0, i), (64, 128)).label for i in range(30)]
    counts = [len(np.unique(label)) for label in labels]
    assert min(counts) >= 6 and np.median(counts) >= 8
    assert set().union(*map(np.unique, labels)) == set(range(len(STREETS)))
    assert max((a == b).mean() for a, b in itertools.combinations(labels[:12], 2)) < .95


# ----------------------------------------------------------------------------------- the law

def test_modes_are_distinct_and_sum_to_one():
    trucks = 0
    for index in range(30):
        layout = paint(street_scene(0, index), (32, 32))
        styles, p = zip(*modes(layout))
        assert len(set(styles)) == len(styles)
        assert sum(p) == pytest.approx(1, rel=1e-6) and min(p) > 0
        assert len(styles) == 27 * np.prod([4 if n == "car" else 3 for _, n in layout.vehicles])
        assert all(len(s.colors) == len(layout.vehicles) for s in styles)
        snow = sum(q for s, q in zip(styles, p) if s.weather == "snow")
        assert snow == pytest.approx(.03, rel=1e-6)          # the rare mode
        for k, (_, name) in enumerate(layout.vehicles):      # a truck is never red
            assert ("red" in {style.colors[k] for style in styles}) == (name == "car")
            trucks += name == "truck"
    assert trucks >= 3


@pytest.mark.parametrize("index", [0, 1, 2])
def test_styles_are_drawn_by_their_probabilities(index):
    """Chi-square of every factor and of every pair of factors, against sums over modes()."""
    layout, n = paint(street_scene(0, index), (32, 32)), 3000
    rng = np.random.default_rng(11)
    parts = lambda s: (s.time, s.weather, s.palette, *s.colors)
    drawn = [parts(common.draw_style(layout, rng)) for _ in range(n)]
    law = [(parts(style), p) for style, p in modes(layout)]
    axes = range(len(drawn[0]))
    for group in [(a,) for a in axes] + list(itertools.combinations(axes, 2)):
        want = {}
        for key, p in law:
            cell = tuple(key[a] for a in group)
            want[cell] = want.get(cell, 0) + p * n
        got = {cell: 0 for cell in want}
        for key in drawn:
            got[tuple(key[a] for a in group)] += 1       # a KeyError: a style without a probability
        chi2, freedom = sum((got[c] - want[c]) ** 2 / want[c] for c in want), len(want) - 1
        assert chi2 < freedom + 5 * np.sqrt(2 * freedom), (group, chi2, freedom)


# --------------------------------------------------------------------- the photo and its style

def test_photos_are_in_range_and_rendering_changes_nothing(oracles):
    for o in oracles[:6]:
        layout, colours = o.layout, tuple(first_colours(o))
        label, instance = layout.label.copy(), layout.instance.copy()
        before = common.render(layout, Style(*o.airs[0], colours))
        for air in o.airs:
            image = common.render(layout, Style(*air, colours))
            assert 0 <= image.min() and image.max() <= 1 and np.isfinite(image).all()
        assert np.array_equal(before, common.render(layout, Style(*o.airs[0], colours)))
        assert np.array_equal(layout.label, label) and np.array_equal(layout.instance, instance)


def test_a_vehicles_colour_changes_its_own_region(oracles):
    """Elsewhere only reflections on wet ground may change, and edges of one pixel."""
    for o, weather in itertools.product(oracles[:10], ("clear", "overcast")):
        for k, (number, kind) in enumerate(o.layout.vehicles):
            base, images = first_colours(o), []
            for base[k] in list(common.COLOR_LAW[kind])[:2]:
                images.append(common.render(o.layout, Style("day", weather, "brick", tuple(base))))
            change, ids = np.abs(images[0] - images[1]), o.layout.instance
            means = {n: change[ids == n].mean(0).max() for n in np.unique(ids)}
            own = means.pop(number)
            assert own > .08 and max(means.values()) < .5 * own


def test_no_two_modes_look_alike(oracles):
    """Two styles differ by over 0.1 in some region and channel; grain averages to 0.02/sqrt(n)."""
    assert min(2 * oracle.tau for oracle in oracles) > .1


def test_the_truth_scores_one_and_has_the_laws_probability(oracles):
    """Assignment by region means returns the style that was drawn, through grain and 8 bits."""
    for seed, (i, o) in itertools.product(range(2), enumerate(oracles)):
        rng, laws = np.random.default_rng([seed, i]), dict(modes(o.layout))
        style = common.draw_style(o.layout, rng)
        image = common.render(o.layout, style)
        image = np.clip(image + STREET_GRAIN * rng.standard_normal(image.shape), 0, 1)
        seen = o.read(tensor(np.round(image * 255) / 255))
        assert style_of(o, seen["mode"][0]) == style and seen["valid"][0] == 1
        assert o.times(seen["mode"]) == [style.time] and o.p.numel() == len(laws)
        assert o.p[tuple(seen["mode"][0])].item() == pytest.approx(laws[style], rel=1e-6)


def test_streets_of_the_set_show_one_of_their_modes(oracles):
    """street() itself: its photo is one of the modes, plus grain of the stated size."""
    for i, o in enumerate(oracles[:8]):
        photo = street(0, i, (SIDE, SIDE))["image"] / 255
        truth = common.render(o.layout, style_of(o, o.read(tensor(photo))["mode"][0]))
        assert abs(np.std(photo - truth) / STREET_GRAIN - 1) < .1


def test_night_is_dark_with_windows_and_lamps_lit_and_snow_is_white(oracles):
    """Night links the sky, the windows and the headlights: one draw, seen in three places."""
    windows, lights = [], []
    for m in oracles:
        colours = tuple("graphite" if kind == "car" else "blue" for _, kind in m.layout.vehicles)
        day, night, grey, snow = (common.render(m.layout, Style(*air, "slate", colours)).mean(-1)
                                  for air in (("day", "clear"), ("night", "clear"),
                                              ("day", "overcast"), ("day", "snow")))
        sky, building, ground = (m.layout.label == CLASS_ID[name]
                                 for name in ("sky", "building", "sidewalk"))
        assert not sky.any() or night[sky].mean() < .5 * day[sky].mean()
        assert night.mean() < day.mean() and snow[ground].mean() > grey[ground].mean() + .08
        windows.append((night[building] > day[building]).mean())     # share that shines by itself
        for k, _ in m.layout.vehicles:
            region = m.layout.instance == k
            lights.append((night[region] > day[region] + .1).any())
    assert np.mean(windows) > .15 and np.mean(lights) > .95


def test_the_photo_has_detail_that_no_label_shows():
    """Windows, lane marks, texture, shadows: spread inside a region, well above the grain."""
    spreads = {"building": [], "road": [], "vegetation": [], "car": []}
    for index in range(10):
        layout = paint(street_scene(0, index), (128, 256))
        image = common.render(layout, modes(layout)[0][0]).mean(-1)
        for name, values in spreads.items():
            for k in np.unique(layout.instance[layout.label == CLASS_ID[name]]):
                if (layout.instance == k).sum() > 100:
                    values.append(image[layout.instance == k].std())
    for name, values in spreads.items():
        assert np.median(values) > 2 * STREET_GRAIN, (name, np.median(values))


# ---------------------------------------------------------------------------------- the oracle

@pytest.fixture(scope="module")
def oracle(oracles):
    return oracles[3]


def test_the_true_sampler_is_precise_and_reaches_the_ideal_recall(oracles):
    for index, oracle in enumerate(oracles[:3]):
        got = oracle.measure(oracle.read(oracle.sample(100, index)))
        assert set(got) == set(helpers.MEASURES)
        assert got["joint precision"] > .99 and got["class validity"] > .99
        assert got["T-agreement"] > .95 and got["T-majority"] > .99
        assert got["recall"] == pytest.approx(got["ideal recall"], abs=.06)
        assert got["time TV"] < .15


def test_region_means_and_their_gap_equal_numpys(oracle):
    """tau is half of the smallest largest difference between two modes of the 27 x 4 rendered."""
    layout, colours, means = oracle.layout, tuple(first_colours(oracle)), []
    numbers = [n for n in np.unique(layout.instance)]
    for air in oracle.airs:
        photo = common.render(layout, Style(*air, colours)).astype(np.float64)
        means.append([photo[layout.instance == n].mean(0) for n in numbers])
    got = oracle.means(tensor(common.render(layout, Style(*oracle.airs[4], colours))))[0]
    assert got.numpy() == pytest.approx(np.array(means[4]), rel=1e-4)
    stuff = np.array(means)[:, oracle.rest]
    gap = min(np.abs(a - b).max() for a, b in itertools.combinations(stuff, 2))
    assert oracle.tau <= gap / 2 + 1e-5 and np.abs(oracle.stuff.numpy() - stuff).max() < 1e-4


def test_a_constant_generator_and_a_mixed_image_are_found_out(oracle):
    """One mode at most; and day's sky over night's road: each region fits, the image does not."""
    one = oracle.sample(1, 0)
    got = oracle.measure(oracle.read(one.expand(20, -1, -1, -1)))
    assert got["recall"] == pytest.approx(1 / oracle.p.numel(), rel=1e-6)
    assert got["TV"] == pytest.approx(1 - oracle.p[tuple(oracle.read(one)["mode"][0])].item())
    white = ("white",) * len(oracle.layout.vehicles)
    day, night = (tensor(common.render(oracle.layout, Style(time, "clear", "brick", white)))
                  for time in ("day", "night"))
    sky = torch.from_numpy(oracle.layout.label == CLASS_ID["sky"])
    seen = oracle.read(torch.where(sky, day, night))
    assert seen["fits"].mean() > .99 and seen["valid"][0] == 0 and seen["agree"][0] == 0
    grey = oracle.measure(oracle.read(torch.zeros(4, 3, SIDE, SIDE) + .9))
    assert grey["joint precision"] == 0 and math.isnan(grey["TV"]) and grey["recall"] == 0


def test_an_edited_street_has_no_oracle(oracle):
    pair = {"name": "street_0000003", "label": torch.from_numpy(oracle.layout.label)[None].clone()}
    assert torch.equal(helpers.street_of(pair).p, oracle.p)
    pair["label"][0, :5] = CLASS_ID["wall"]
    assert helpers.street_of(pair) is None


def test_switches_and_agreement():
    path = torch.tensor([[1, 2], [1, 2], [1, 3], [0, 3], [0, 3]])
    assert helpers.switches(path) == 2
    assert helpers.agreement([["day", "night"], ["day", "day"], ["dusk", "night"]]) \
        == pytest.approx(2 / 6)
