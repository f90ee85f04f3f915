"""common.py, room 5: the built-in streets, whose true distribution is claimed to be known.

The claims that make them a yardstick: the photo is a function of (layout, style), every style looks
different, and whoever knows the layout can read the style off the photo. All measured here with
means of regions, by numpy.
"""

import itertools
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))
import common  # noqa: E402
from common import CLASS_ID, STREET_CLASSES, STREET_GRAIN, Style, modes, paint, street  # noqa: E402
from common import street_scene  # noqa: E402

SIDE = 64
THINGS = {k for k, (_, _, thing) in enumerate(STREET_CLASSES) if thing}


def region_means(image: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """(H, W, 3), (H, W) region numbers 0..n-1 -> (n, 3) mean colours."""
    flat = regions.ravel()
    count = np.bincount(flat)
    return np.stack([np.bincount(flat, image[..., c].ravel().astype(float)) / \
                    count for c in range(3)], 1)


class Measured:
    """A layout with the region means of all its styles, each factor rendered once.

    A vehicle's colour is taken to change its own region alone (tested below), so 27 x 4 pictures
    stand for the up to 27 x 4 x 4 x 4 styles.
    """

    def __init__(self, index: int, size=(SIDE, SIDE)):
        self.layout = paint(street_scene(0, index), size)
        self.ids, regions = np.unique(self.layout.instance, return_inverse=True)
        self.regions = regions.reshape(size)
        self.row = [int(np.flatnonzero(self.ids == k)[0]) for k, _ in self.layout.vehicles]
        self.rest = [r for r in range(len(self.ids)) if r not in self.row]
        styles = [style for style, _ in modes(self.layout)]
        self.airs = sorted({(s.time, s.weather, s.palette) for s in styles})
        self.colours = [sorted({s.colors[k] for s in styles}) for k in range(len(self.row))]
        self.stuff, self.vehicle = {}, {}
        for air in self.airs:
            for c in range(4):
                colours = tuple(names[c % len(names)] for names in self.colours)
                means = region_means(common.render(self.layout, Style(*air, colours)), self.regions)
                self.stuff.setdefault(air, means[self.rest])
                for k, name in enumerate(colours):
                    self.vehicle[air, k, name] = means[self.row[k]]

    def read_style(self, image: np.ndarray) -> Style:
        """The style whose region means are nearest."""
        means = region_means(image, self.regions)
        best = None
        for air in self.airs:
            distance, colours = np.abs(means[self.rest] - self.stuff[air]).sum(), []
            for k, names in enumerate(self.colours):
                errors = [np.abs(means[self.row[k]] - self.vehicle[air, k, n]).sum() for n in names]
                distance += min(errors)
                colours.append(names[int(np.argmin(errors))])
            if best is None or distance < best[0]:
                best = distance, Style(*air, tuple(colours))
        return best[1]


@pytest.fixture(scope="module")
def measured():
    return [Measured(i) for i in range(20)]


# ------------------------------------------------------------------------------------- layouts

@pytest.fixture(scope="module")
def fresh_process():
    """Imports common with warnings as errors and draws one street."""
    code = ("import common, zlib; s = common.street(3, 5, (48, 96)); "
            "print([zlib.crc32(s[k].tobytes()) for k in sorted(s)])")
    return subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=HERE,
                          capture_output=True, text=True)


def test_a_street_depends_on_seed_and_index_alone(fresh_process):
    a, b, c = street(3, 5, (48, 96)), street(3, 5, (48, 96)), street(3, 6, (48, 96))
    assert set(a) == {"label", "instance", "image"}
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert not np.array_equal(a["label"], c["label"])
    assert not np.array_equal(a["label"], street(4, 5, (48, 96))["label"])
    crc = [zlib.crc32(a[k].tobytes()) for k in sorted(a)]
    assert fresh_process.stdout == f"{crc}\n", "another process draws another street"


@pytest.mark.parametrize("size", [(32, 32), (48, 96), (128, 256), (37, 53), (33, 64)])
def test_streets_of_every_size(size):
    for index in range(3):
        s = street(0, index, size)
        assert s["label"].shape == s["instance"].shape == size and s["image"].shape == (*size, 3)
        assert (
    s["label"].dtype,
    s["instance"].dtype,
    s["image"].dtype) == (
        np.int64,
        np.int64,
         np.uint8)
        assert 0 <= s["label"].min() and s["label"].max() < len(STREET_CLASSES)
        assert s["image"].std() > 10


def test_one_scene_at_two_sizes_is_the_same_street():
    for index in range(6):
        scene = street_scene(0, index)
        small, large = paint(scene, (64, 128)), paint(scene, (256, 512))
        assert small.vehicles == large.vehicles
        assert (small.label == large.label[2::4, 2::4]).mean() > .9
        style = modes(small)[0][0]
        coarse = common.render(large, style).reshape(64, 4, 128, 4, 3).mean((1, 3))
        assert np.abs(common.render(small, style) - coarse).mean() < .05


def test_a_wider_view_shows_the_same_middle():
    """Fully convolutional tests compare sizes: a square is the middle of the wide view."""
    for index in range(4):
        scene = street_scene(0, index)
        square, wide = paint(scene, (64, 64)), paint(scene, (64, 128))
        assert (square.label == wide.label[:, 32:96]).mean() > .97


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


def test_streets_show_at_least_eight_classes():
    counts = [len(np.unique(paint(street_scene(0, i), (64, 128)).label)) for i in range(20)]
    assert min(counts) >= 6 and np.median(counts) >= 8
    every = set().union(*(np.unique(paint(street_scene(0, i), (64, 128)).label) for i in range(30)))
    assert every == set(range(len(STREET_CLASSES)))


def test_layouts_differ():
    labels = [paint(street_scene(0, i), (32, 64)).label for i in range(12)]
    agree = [(a == b).mean() for a, b in itertools.combinations(labels, 2)]
    assert max(agree) < .95


# ----------------------------------------------------------------------------------- the law

def test_modes_are_distinct_and_sum_to_one():
    for index in range(12):
        layout = paint(street_scene(0, index), (32, 32))
        styles, p = zip(*modes(layout))
        assert len(set(styles)) == len(styles) and sum(
            p) == pytest.approx(1, abs=1e-12) and min(p) > 0
        assert len(styles) == 27 * np.prod([4 if n == "car" else 3 for _, n in layout.vehicles])
        assert all(len(s.colors) == len(layout.vehicles) for s in styles)
        assert sum(q for s, q in zip(styles, p) if s.weather ==
                   "snow") <= .03 + 1e-9     # the rare mode


def test_trucks_are_never_red():
    trucks = 0
    for index in range(30):
        layout = paint(street_scene(0, index), (32, 32))
        for k, (_, name) in enumerate(layout.vehicles):
            colours = {style.colors[k] for style, _ in modes(layout)}
            assert ("red" in colours) == (name == "car")
            trucks += name == "truck"
    assert trucks >= 3


def test_most_layouts_have_more_than_nine_modes():
    """More than the samples that papers draw per layout, so that coverage is a hard test."""
    numbers = [len(modes(paint(street_scene(0, i), (32, 32)))) for i in range(20)]
    assert np.mean([n > 30 for n in numbers]) > .9


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


def test_streets_are_drawn_by_the_law_too():
    """Of 150 streets of the set, read off the means: about 20 % night, 55 % day (5 sigma)."""
    bright = []
    for index in range(150):
        s = street(0, index, (32, 32))
        sky = s["image"][s["label"] == CLASS_ID["sky"]].mean()
        bright.append(sky)
    dark = np.mean(np.array(bright) < 90)
    assert .04 < dark < .40


# --------------------------------------------------------------------- the photo and its style

def test_photos_are_in_range_and_the_same_each_time(measured):
    for m in measured[:4]:
        style = common.draw_style(m.layout, np.random.default_rng(0))
        a, b = common.render(m.layout, style), common.render(m.layout, style)
        assert np.array_equal(a, b) and a.shape == (SIDE, SIDE, 3)
    for m in measured[:6]:
        for air in m.airs:
            image = common.render(m.layout, Style(*air, tuple(names[0] for names in m.colours)))
            assert 0 <= image.min() and image.max() <= 1 and np.isfinite(image).all()


def test_rendering_leaves_the_layout_as_it_was():
    layout = paint(street_scene(0, 1), (32, 32))
    styles = [style for style, _ in modes(layout)]
    before = common.render(layout, styles[0])
    label, instance = layout.label.copy(), layout.instance.copy()
    for style in styles[::7]:
        common.render(layout, style)
    assert np.array_equal(common.render(layout, styles[0]), before)
    assert np.array_equal(layout.label, label) and np.array_equal(layout.instance, instance)


def test_a_vehicles_colour_changes_its_own_region(measured):
    """Elsewhere only reflections on wet ground may change, and edges of one pixel."""
    for m in measured[:10]:
        for weather in ("clear", "overcast"):
            for k, names in enumerate(m.colours):
                base = [n[0] for n in m.colours]
                images = []
                for name in names[:2]:
                    base[k] = name
                    images.append(
    common.render(
        m.layout,
        Style(
            "day",
            weather,
            "brick",
             tuple(base))))
                change = region_means(np.abs(images[0] - images[1]), m.regions).max(1)
                assert change[m.row[k]] > .08
                assert np.delete(change, m.row[k]).max() < .5 * change[m.row[k]]


def test_no_two_modes_look_alike(measured):
    """Two styles differ by over 0.1 in some region and channel; grain averages to 0.02/sqrt(n)."""
    smallest = []
    for m in measured:
        for a, b in itertools.combinations(m.airs, 2):
            smallest.append((np.abs(m.stuff[a] - m.stuff[b]).max(), m.layout.vehicles, a, b))
        for air in m.airs:
            for k, names in enumerate(m.colours):
                for a, b in itertools.combinations(names, 2):
                    difference = np.abs(m.vehicle[air, k, a] - m.vehicle[air, k, b]).max()
                    smallest.append((difference, m.layout.vehicles, air, (k, a, b)))
    assert min(smallest, key=lambda s: s[0])[0] > .1, min(smallest, key=lambda s: s[0])


def test_the_truth_scores_one(measured):
    """Assignment by region means returns the style that was drawn, through grain and 8 bits."""
    for seed in range(2):
        for i, m in enumerate(measured):
            rng = np.random.default_rng([seed, i])
            style = common.draw_style(m.layout, rng)
            image = common.render(m.layout, style)
            image = np.clip(image + STREET_GRAIN * rng.standard_normal(image.shape), 0, 1)
            assert m.read_style(np.round(image * 255) / 255) == style, (i, style)


def test_streets_of_the_set_show_one_of_their_modes(measured):
    """street() itself: its photo is one of the modes, plus grain of the stated size."""
    for i, m in enumerate(measured[:8]):
        photo = street(0, i, (SIDE, SIDE))["image"] / 255
        truth = common.render(m.layout, m.read_style(photo))
        assert abs(np.std(photo - truth) / STREET_GRAIN - 1) < .1


def test_every_factor_can_be_seen(measured):
    for m in measured[:5]:
        colours = tuple(n[0] for n in m.colours)
        base = Style("day", "clear", "brick", colours)
        image = common.render(m.layout, base)
        for air in (("night", "clear", "brick"), ("dusk", "clear", "brick"),
                    ("day", "snow", "brick"), ("day", "overcast", "brick"),
                    ("day", "clear", "cream"), ("day", "clear", "slate")):
            change = Style(*air, colours)
            assert np.abs(common.render(m.layout, change) - image).mean() > .01, change


def test_night_is_dark_and_its_windows_and_lamps_are_lit(measured):
    """Night links the sky, the windows and the headlights: one draw, seen in three places."""
    windows, lights = [], []
    for m in measured:
        colours = tuple("graphite" if "graphite" in n else n[0] for n in m.colours)
        day, night = (common.render(m.layout, Style(t, "clear", "slate", colours)).mean(-1)
                      for t in ("day", "night"))
        sky, building = (m.layout.label == CLASS_ID[name] for name in ("sky", "building"))
        if sky.any():
            assert night[sky].mean() < .5 * day[sky].mean()
        assert night.mean() < day.mean()
        windows.append((night[building] > day[building]).mean())     # share that shines by itself
        for k, _ in m.layout.vehicles:
            region = m.layout.instance == k
            lights.append((night[region] > day[region] + .1).any())
    assert np.mean(windows) > .15 and np.mean(lights) > .95


def test_snow_whitens_the_ground(measured):
    for m in measured[:6]:
        colours = tuple(n[0] for n in m.colours)
        plain, snow = (common.render(m.layout, Style("day", w, "brick", colours))
                       for w in ("overcast", "snow"))
        ground = m.layout.label == CLASS_ID["sidewalk"]
        assert snow[ground].mean() > plain[ground].mean() + .08


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


def test_a_moved_car_moves(measured):
    """Scenes can be edited: the same car, nearer, is larger, and the rest stays."""
    scene = street_scene(0, 0)
    before = paint(scene, (64, 64))
    number = before.vehicles[0][0]
    scene.vehicles[0].z -= 1.5
    after = paint(scene, (64, 64))
    assert (after.instance == number).sum() > (before.instance == number).sum()
    both = (before.label < CLASS_ID["person"]) & (after.label < CLASS_ID["person"])
    assert (before.label[both] == after.label[both]).mean() > .97


def test_speed_is_printed():
    """No assertion on the clock of a shared machine; see tests/benchmark.py."""
    for size in ((64, 64), (128, 256)):
        start = time.perf_counter()
        for index in range(5):
            street(0, index, size)
        print(f"street {size[0]}x{size[1]}: {(time.perf_counter() - start) / 5 * 1000:.0f} ms")


# -------------------------------------------------------------------------------- the file itself

def test_no_line_over_100_columns():
    lines = (HERE / "common.py").read_text(encoding="utf-8").splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []


def test_import_without_a_warning(fresh_process):
    assert (fresh_process.returncode, fresh_process.stderr) == (0, "")
    assert fresh_process.stdout.count("\n") == 1         # nothing is said at import
