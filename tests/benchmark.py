"""How fast, how large: times each script's `train_step`; asserts nothing.

    python tests/benchmark.py                     the small configurations; on a GPU the papers' own
    python tests/benchmark.py toy pix2pixhd       a group, or one by name; --list names them
    python tests/benchmark.py paper --gpu 0 --precision bf16 --compile
    python tests/benchmark.py data --data DIR     the loader: images per second
    python tests/benchmark.py yardstick RUN...    how good runs' pictures are, by the streets' law
    python tests/benchmark.py small data --quick     on tiny networks: does it run?

Batches are streets, read and paired by the script that is timed; VGG has random weights, which cost
the same. Each configuration has a process of its own, so its memory is its own. On a busy machine
use --threads 1: all columns then go by the CPU's seconds, which other processes disturb least.
"""

import argparse
import contextlib
import functools
import importlib
import io
import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("", "notebooks")]

import common  # noqa: E402 (before torch: it says how torch's threads wait)

import helpers  # noqa: E402
import lab2pix  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import DataLoader, default_collate  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

# ------------------------------------------------------------------------------- configurations

def case(script: str, classes: int = 0, what: str = "step", theirs: tuple = (), **settings):
    """`classes`: label channels, the streets' own and empty ones, or 0 for the streets' alone."""
    return SimpleNamespace(script=script, classes=classes, what=what, theirs=theirs,
                           settings=settings)


# `theirs`: the authors' training steps at the same sizes and widths, measured once on an idle
# machine of two cores (2.5 GHz, AVX-512; fp32, batch 1, torch 2.15): seconds with two threads, CPU
# seconds with one thread, GFLOP. Where the releases do other work than the papers say, ours is set
# to do theirs: SPADE's first layer, VGG-19 at one size, V1's blocks.
V2 = dict(size=(128, 256), width=32, batch_size=1, first="label", released=True)
V1 = dict(size=(128, 256), version="V1", batch_size=1, dgnorm=False, released=True)
IMLE = dict(size=(128, 256), width=128, rebalance="none")
SMALL = {
    "pix2pix": case("pix2pix", theirs=(0.92, 1.80, 86.9)),
    "pix2pixhd": case("pix2pixhd", 35, theirs=(1.35, 2.49, 168),
                      size=(128, 256), enhancers=0, width=32, scales=2),
    "pix2pixhd-encoder": case("pix2pixhd", 35, theirs=(2.97, 5.45, 411), size=(256, 512),
                              enhancers=0, width=16, d_width=32, features=3, scales=2),
    "pix2pixhd-joint": case("pix2pixhd", 35, theirs=(3.07, 5.54, 415),
                            size=(256, 512), width=32, d_width=32),
    "crn_imle": case("crn_imle", 20, **IMLE),
    "crn_imle-search": case("crn_imle", 20, "search", pool=1, **IMLE),
    "spade": case("lab2pix", 35, theirs=(2.71, 5.04, 393), ablation="A_s", **V2),
    "lab2pix-v2": case("lab2pix", 35, theirs=(8.00, 14.9, 1119), **V2),
    "lab2pix-v1": case("lab2pix", 35, theirs=(5.49, 9.0, 610), **V1)}
TOY = {f"{script}-toy": case(script, preset="toy")
       for script in ("pix2pix", "pix2pixhd", "crn_imle", "lab2pix")}
TOY["lab2pix-v1-toy"] = case("lab2pix", preset="toy-V1")
PAPER = {
    "pix2pix": SMALL["pix2pix"],
    "pix2pix-batch10": case("pix2pix", preset="cityscapes-batch10", direction="AtoB"),
    "pix2pixhd-512p": case("pix2pixhd", 35, preset="512p"),
    "pix2pixhd-1024p": case("pix2pixhd", 35, preset="1024p"),
    "pix2pixhd-1024p-features": case("pix2pixhd", 35, preset="1024p-features"),
    "crn-gta": case("crn_imle", 20, preset="crn-gta"),
    "imle": case("crn_imle", 20, preset="imle", rebalance="none"),
    "spade-paper": case("lab2pix", 35, ablation="A_s", batch_size=5),          # 20 on four GPUs
    "lab2pix-v2-paper": case("lab2pix", 35, preset="V2-cityscapes", batch_size=5),
    "lab2pix-v2-h": case("lab2pix", 35, preset="V2-H-cityscapes", batch_size=2),
    "lab2pix-v1-paper": case("lab2pix", 35, preset="V1-cityscapes")}
GROUPS, CASES = {"small": SMALL, "toy": TOY, "paper": PAPER}, SMALL | TOY | PAPER


def tiny(script, side: int = 64) -> dict:
    """Settings of --quick."""
    small = dict(size=(side, side), width=4, d_width=4, batch_size=2, vgg="random")
    return {key: value for key, value in small.items() if hasattr(script.Config, key)}


def full_vgg(depth: int, weights: str) -> tuple[int, list[torch.Tensor]]:
    """In place of common.read_vgg: without a download, at the cost of ImageNet's VGG."""
    return depth, [p.detach() for p in common.vgg_trunk(depth).parameters()]


def configure(name: str, options: argparse.Namespace):
    """The script of a configuration, and its config."""
    this, streets = CASES[name], common.TABLES["streets"]
    script = importlib.import_module(this.script)
    given = this.settings | dict(vgg="imagenet", precision=options.precision, gpu=options.gpu,
                                 channels_last=options.channels_last or None)
    if options.quick:
        given |= tiny(script, 128 if "v1" in name or "v2-h" in name else 64)    # S needs more
    else:
        common.read_vgg = full_vgg
    cfg = script.configure(given.pop("preset", ""), given)
    empty = range(len(streets.names), this.classes)
    common.TABLES["streets"] = replace(
        streets, names=streets.names + tuple(f"empty {i}" for i in empty),
        colours=streets.colours + ((0, 0, 0),) * len(empty))
    if this.settings.get("released") and "version" not in given:   # hidden layers of 128
        block, globe = script.GenResBlk, script.GlobalEncoder
        script.GenResBlk = lambda c_in, c_out, n, _, *rest: block(c_in, c_out, n, 128, *rest)
        script.GlobalEncoder = lambda n, _, *rest: globe(n, 64, *rest)
    return script, replace(cfg, classes="streets")


def batch_of(script, train_set, cfg, device: torch.device) -> dict:
    """What train_step takes: streets, as pairs on the device."""
    batch = default_collate([train_set[i] for i in range(cfg.batch_size)])
    batch = script.make_pair({k: v.to(device) if torch.is_tensor(v) else v
                              for k, v in batch.items()}, cfg)
    last = device.type == "cuda" if cfg.channels_last is None else cfg.channels_last
    order = torch.channels_last if last else torch.contiguous_format
    return {k: v.contiguous(memory_format=order) if k in ("input", "image", "noise") else v
            for k, v in batch.items()}


def work_of(name: str, script, cfg, device: torch.device):
    """What is to be timed, as a function without arguments."""
    train_set, what = script.dataset(cfg, "train"), CASES[name].what
    state = script.build(cfg, device)
    if what == "search":                        # cfg.pool photos, each with its m candidates
        state.photos = script.Photos(len(train_set), cfg)
        state.photos.chosen[:, 0] = torch.arange(cfg.pool) % len(train_set)
        return lambda: script.search(state, train_set, cfg, 0)
    batch = batch_of(script, train_set, cfg, device)
    return lambda: script.train_step(state, batch, cfg)


# -------------------------------------------------------------------------------------- seconds

def alone(function, *arguments, fork: bool = hasattr(os, "fork")):
    """function(*arguments) in a fresh process, which may start others to read data."""
    fork = fork and not torch.cuda.is_initialized()                     # spares the imports
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork" if fork else "spawn")) as pool:
        return pool.submit(function, *arguments).result()


def seconds_of(work, device: torch.device, repeats: int) -> tuple[float, float]:
    """Medians of wall seconds and of CPU seconds (all threads); of many, two first to warm up."""
    wait, clocks = torch.cuda.synchronize if device.type == "cuda" else bool, []
    warm = 2 if repeats > 1 else 0
    for _ in range(warm + repeats):
        wait()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        wait()
        clocks.append((time.perf_counter() - wall, time.process_time() - cpu))
    return tuple(statistics.median(times) for times in zip(*clocks[warm:]))


def measure(name: str, options: argparse.Namespace) -> SimpleNamespace:
    """One row of the table."""
    torch.set_num_threads(options.threads)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        script, cfg = configure(name, options)
        device = script.pick_device(cfg)
        work = work_of(name, script, cfg, device)
        with FlopCounterMode(display=False) as flops:
            work()
        if options.compile:                     # the counter sees nothing in compiled code
            work = None                         # frees its memory
            work = work_of(name, script, replace(cfg, compile=True), device)
            work()
        if device.type == "cuda":               # not what the search for fast kernels has used
            torch.cuda.reset_peak_memory_stats()
        wall, cpu = seconds_of(work, device, options.repeats)
    return SimpleNamespace(cfg=cfg, wall=wall, cpu=cpu, gflop=flops.get_total_flops() / 1e9,
                           gib=peak_memory(device))


def peak_memory(device: torch.device) -> float:
    """GiB that this process has held at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def convolution_peak(options: argparse.Namespace) -> float:
    """GFLOP/s of the fastest of a few 3 x 3 convolutions: what this machine can do at best."""
    torch.set_num_threads(options.threads)
    device = torch.device("cpu") if options.gpu < 0 else torch.device("cuda", options.gpu)
    torch.backends.cudnn.benchmark = True
    kind = torch.bfloat16 if options.precision == "bf16" else torch.float32
    batch, speeds = 1 if options.gpu < 0 else 16, []
    for c, side in ((64, 128), (128, 64), (256, 64), (512, 32)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x, w = (torch.randn(shape, device=device, dtype=kind).contiguous(memory_format=layout)
                    for shape in ((batch, c, side, side), (c, c, 3, 3)))
            times = seconds_of(lambda: F.conv2d(x, w, padding=1), device, options.repeats)
            speeds.append(2 * 9 * c * x.numel() / times[options.by_cpu] / 1e9)
    return max(speeds)


def line(first: str, *cells: float | str) -> None:
    """A line of a table: numbers with three digits or more, flush right."""
    print(f"{first:26}" + "".join(
        f"{c if isinstance(c, str) else f'{c:.0f}' if c >= 100 else f'{c:.3g}':>10}"
        for c in cells), flush=True)


def steps_table(names: list[str], options: argparse.Namespace) -> None:
    peak, by_cpu = alone(convolution_peak, options), options.by_cpu
    print(f"\n{options.device}, {options.threads} thread(s), {options.precision}"
          f"{', compiled' * options.compile}; best 3x3 convolution {peak:.0f} GFLOP/s; medians of "
          f"{options.repeats} steps.\nreleased: the authors' step on an idle two-core machine, in "
          f"{'CPU seconds with one thread' if by_cpu else 'seconds with two threads'}, and its "
          "GFLOP; then its time over ours. That machine's best convolution had 255 GFLOP/s\n"
          "with two threads: where yours has another, so has the ratio.")
    line("configuration", "size", "s/step", "CPU s", "images/s", "GFLOP", "GFLOP/s", "of peak",
         "GiB", *(("released", "GFLOP", "faster") if options.gpu < 0 else ()))
    for name in names:
        row, released = alone(measure, name, options), CASES[name].theirs
        seconds = row.cpu if by_cpu else row.wall
        speed = row.gflop / seconds
        more = (released[by_cpu], released[2], f"{released[by_cpu] / seconds:.2f}x") if (
            released and options.gpu < 0 and not options.quick) else ()
        line(name, "{}x{}".format(*row.cfg.size), row.wall, row.cpu, row.cfg.batch_size / seconds,
             row.gflop, speed, f"{speed / peak:.0%}", row.gib, *more)


# ----------------------------------------------------------------------------------------- data

def loader_speed(data: str, size: tuple[int, int], workers: int, n: int) -> list[float]:
    """Images per second of n after the first: of the first pass, and of the next."""
    torch.set_num_threads(1)
    train_set, speeds = common.Dataset(data, "train", size, mirror=True), []
    order = [i % len(train_set) for i in range(n + 1)]
    for _ in range(2):
        loader = iter(DataLoader(train_set, 1, sampler=order, num_workers=workers))
        next(loader)
        clock = time.perf_counter()
        speeds.append(sum(1 for _ in loader) / (time.perf_counter() - clock))
    return speeds


def data_tables(options: argparse.Namespace) -> None:
    sources = {Path(options.data).name: options.data} if options.data else {}
    sources |= {} if options.quick and sources else {"streets": ""}         # their drawing is slow
    print("\nThe loader: images per second, first pass and next (streets, once drawn, are kept).")
    line("data", "size", *(word for n in (0, 1, 2) for word in (f"{n} workers", "next")))
    for name, data in sources.items():
        for size, n in (((128, 256), 48), ((256, 512), 48), ((1024, 2048), 12))[:3 if data else 2]:
            n = 2 if options.quick else n
            speeds = [alone(loader_speed, data, size, workers, n) for workers in (0, 1, 2)]
            line(name, "{}x{}".format(*size), *(speed for some in speeds for speed in some))


# ------------------------------------------------------------------------------------ yardstick
# Pictures of held-out streets against the law of the streets, which is known: by any run of the
# four scripts. All runs see the same layouts, each at its own size.

COLUMNS = {
    "pixel acc": "FCN-score: share of pixels that a judge, trained on real photos, labels right",
    "IoU": "FCN-score: intersection over union, mean over the classes",
    "small": "IoU of persons, poles and traffic signs alone",
    "sharp": "mean |Laplacian| over that of true photos: 1 is right, below is blurred, above noisy;"
             "\n           without the sensor's grain, which few models make, see that row",
    "least": "sharp of the class where it is least", "of": "that class",
    "Frechet": "distance of pictures to photos in the judge's features, if --frechet asks for it",
    "colours": "energy distance of regions' mean colours to the law, over the law's own spread,\n"
               "           mean over the classes: 0 is right, by chance a little below it",
    "variance": "of pixels over the samples of one layout, over that of the law: 1 is right",
    "snow": "share of snow among the samples, over its share of the law: 1 is right",
    "times": "times of day among the samples of a layout, over those among as many true photos",
    "paints": "colours of a vehicle among the samples of a layout, over those among true photos",
    "apart": "difference of colours across the border of vehicles that touch, over that of photos",
    "fits": "class validity: share of regions whose mean colour is that of some mode",
    "valid": "joint precision: share of pictures all of whose regions are of one mode"}
DRAWS = 32                                      # of the law, to compare with
JUDGE = dict(width=16, steps=1200)     # after 600 the law's median is still on par with photos


def weights_of(path: Path) -> tuple[Path, dict]:
    """The file of a run's folder, or this file itself; and what it holds."""
    path = path / "checkpoint.pt" if path.is_dir() else path
    return path, common.load_file(path, "name a run's folder, or a file of its weights")


def pictures_of(path: Path, options: argparse.Namespace) -> torch.Tensor:
    """What a run makes of the first test streets, (layouts, samples, 3, H, W) in [-1, 1].

    Its script's own `sample` writes them. It refuses --samples where it has no noise: one is made.
    """
    path, stored = weights_of(path)
    cfg = stored.get("config", {})
    if cfg.get("data") != "" or cfg.get("task") not in (None, "labels", "labels2photo"):
        raise common.UserError(f"{path}: no run that makes photos of the built-in streets' labels")
    script = importlib.import_module(stored["script"])
    names = common.Dataset(split="test", limit=options.images).names
    with tempfile.TemporaryDirectory() as folder:
        words = ["sample", "--checkpoint", str(path), "--output", folder,
                 "--limit", str(options.images), "--gpu", str(options.gpu)]
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                script.main([*words, "--samples", str(options.samples)])
            except common.UserError:
                script.main(words)
        ends = ["", *(f"_{k + 1}" for k in range(options.samples))]
        files = [[file for end in ends if (file := Path(folder, f"{name}{end}.png")).is_file()]
                 for name in names]
        return torch.stack([torch.stack([common.read_image(file) / 127.5 - 1 for file in some])
                            for some in files])


def other_streets(size: tuple[int, int], n: int) -> list[dict]:
    """Streets that nobody has trained on or chosen by."""
    return [common.street(0, 2_000_000 + i, size) for i in range(n)]


def photos_of(streets: list[dict]) -> Iterator[torch.Tensor]:
    """(1, 3, H, W) in [-1, 1]."""
    for street in streets:
        yield torch.from_numpy(street["image"]).permute(2, 0, 1)[None] / 127.5 - 1


def made_of(streets: list[dict], path: Path, gpu: int) -> Iterator[torch.Tensor]:
    """What a run makes of them, (1, 3, H, W) in [-1, 1]."""
    path, stored = weights_of(path)
    script = importlib.import_module(stored["script"])
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("label", "instance"):
            Path(folder, kind).mkdir()
            for i, street in enumerate(streets):
                Image.fromarray(street[kind].astype("uint16")).save(f"{folder}/{kind}/{i}.png")
        words = ["sample", "--checkpoint", str(path), "--input", f"{folder}/label", "--output",
                 f"{folder}/made", "--samples", "1", "--gpu", str(gpu)]
        if hasattr(script.Config, "instances"):
            words += ["--instances", f"{folder}/instance"]
        with contextlib.redirect_stdout(io.StringIO()):
            script.main(words)
        for i in range(len(streets)):
            yield common.read_image(Path(folder, "made", f"{i}.png"))[None] / 127.5 - 1


@torch.no_grad()
def features(judge: common.FCN8s, pictures: Iterator[torch.Tensor]) -> torch.Tensor:
    """What the judge sees at its last pooling, on average over each picture: (n, 128)."""
    seen, device = [], next(judge.parameters()).device
    hook = judge.trunk[-1].register_forward_hook(
        lambda layer, x, out: seen.append(out.mean((2, 3)).cpu()))
    for picture in pictures:
        judge(picture.to(device))
    hook.remove()
    return torch.cat(seen)


def street_of(index: int, item: dict, samples: int) -> SimpleNamespace:
    """A test street, with draws of its law, and with the first of them once more without grain."""
    oracle, rng = helpers.Street(index, item["label"].shape), np.random.default_rng([index, 7])
    clean = np.stack([common.render(oracle.layout, common.draw_style(oracle.layout, rng))
                      for _ in range(samples + DRAWS)])
    draws = (clean + common.STREET_GRAIN * rng.standard_normal(clean.shape)).clip(0, 1)
    clean, draws = (torch.from_numpy(x).float().permute(0, 3, 1, 2) * 2 - 1 for x in (clean, draws))
    kinds = torch.zeros(len(oracle.area), dtype=torch.int64)        # the class of each region
    kinds[oracle.regions] = item["label"].flatten()
    return SimpleNamespace(oracle=oracle, label=item["label"], instance=item["instance"],
                           kinds=kinds, photo=item["image"], clean=clean[:samples],
                           sampled=draws[:samples], law=draws[samples:])


def flat(image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Each class in its mean colour."""
    out = torch.empty_like(image)
    for k in label.unique():
        out[:, label == k] = image[:, label == k].mean(1, keepdim=True)
    return out


def edges(images: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Per class: the sum of |Laplacian| over images (n, 3, H, W), and the number of values."""
    x = F.pad(images, (1, 1, 1, 1), "replicate")
    centre, middle = x[..., 1:-1, 1:-1], slice(1, -1)
    around = (x[..., :-2, middle] + x[..., 2:, middle] + x[..., middle, :-2] + x[..., middle, 2:])
    size = (around - 4 * centre).abs().sum((0, 1)).double().flatten()
    n = len(common.STREETS)
    return torch.stack([torch.bincount(label.flatten(), size, n),
                        torch.bincount(label.flatten(), minlength=n) * 3 * len(images)])


def across(images: torch.Tensor, street: SimpleNamespace) -> float:
    """How much colours differ, |difference| summed, from pixel to pixel where one vehicle touches
    another; images (n, 3, H, W), mean over n."""
    total, of_vehicle = 0., [common.CLASS_ID[kind] for kind in common.COLOR_LAW]
    for turn in (lambda x: x, lambda x: x.mT):              # down, and to the right
        label, instance = turn(street.label), turn(street.instance)
        vehicle = torch.isin(label, torch.tensor(of_vehicle))
        border = vehicle[1:] & vehicle[:-1] & (instance[1:] != instance[:-1])
        total += turn(images).diff(dim=-2).abs()[..., border].sum().item()
    return total / len(images)


def energy_distance(x: torch.Tensor, law: torch.Tensor, owner: torch.Tensor) -> float:
    """Of colours x (R, n, 3) of R regions in n samples from those of the law (R, m, 3):
    2 E|X - Y| - E|X - X'| - E|Y - Y'| over E|Y - Y'|.

    Only regions in different layouts, and different samples, are compared: so the expectation is 0
    for the law, even if there is one sample of each layout, and if all layouts share their noise.
    """
    apart = owner[:, None] != owner

    def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        d = torch.cdist(a.flatten(0, 1), b.flatten(0, 1))
        d = d.view(*a.shape[:2], *b.shape[:2]).transpose(1, 2)[apart]       # (pairs, n, m)
        if a is b and a.shape[1] > 1:
            d = d[:, ~torch.eye(a.shape[1], dtype=torch.bool)]
        return d.mean()

    spread = mean(law, law)
    return ((2 * mean(x, law) - mean(x, x) - spread) / spread).item()


def variety(shown: list, law: dict) -> tuple[int, float]:
    """How many values samples show, and how many as many draws of the law show on average."""
    return len(set(shown)), sum(1 - (1 - p) ** len(shown) for p in law.values())


def scores(pictures: torch.Tensor, streets: list, judge: torch.nn.Module) -> tuple[dict, dict]:
    """A row of the yardstick, and its values per class; pictures (layouts, n, 3, H, W)."""
    table, device = common.TABLES["streets"], next(judge.parameters()).device
    confusion, made, true, regions, cells = 0, 0, 0, [], {}
    for i, (images, street) in enumerate(zip(pictures, streets)):
        label, oracle = street.label, street.oracle
        with torch.no_grad():
            read = torch.cat([judge(image[None].to(device)).argmax(1).cpu() for image in images])
        confusion = confusion + common.confusion_matrix(read, label.expand_as(read), table)
        made, true = made + edges(images, label), true + edges(street.law, label)
        regions += zip(street.kinds.tolist(), *(oracle.means(x).transpose(0, 1) for x in (
            images, street.law)), [i] * len(street.kinds))
        seen = oracle.read(images)
        pairs = [(name, (seen[name].mean().item(), 1)) for name in ("fits", "valid")]
        if (truth := across(street.law, street)) > 0:
            pairs += [("apart", (across(images, street), truth))]
        if len(images) > 1:
            pairs += [("variance", tuple(x.var(0).mean().item() for x in (images, street.law))),
                      ("times", variety(oracle.times(seen["mode"]), common.TIMES))]
            snow = sum(oracle.airs[air][1] == "snow" for air in seen["mode"][:, 0])
            pairs += [("snow", (snow / len(images), common.WEATHERS["snow"]))]
            paints = zip(seen["mode"].T[1:].tolist(), oracle.layout.vehicles)
            pairs += [("paints", variety(x, common.COLOR_LAW[kind])) for x, (_, kind) in paints]
        for name, pair in pairs:
            cells.setdefault(name, []).append(pair)
    hits, counts = confusion.diag(), confusion.sum(1) + confusion.sum(0)
    classes = {"IoU": hits / (counts - hits), "sharp": made[0] / made[1] * true[1] / true[0],
               "colours": torch.full((len(table.names),), math.nan)}
    for k in {kind for kind, *_ in regions}:
        x, law, owner = zip(*(values for kind, *values in regions if kind == k))
        if len(set(owner)) > 1:
            classes["colours"][k] = energy_distance(
                torch.stack(x), torch.stack(law), torch.tensor(owner))
    row = {name: sum(a for a, _ in some) / sum(b for _, b in some) for name, some in cells.items()}
    low = classes["sharp"].nan_to_num(math.inf).argmin().item()
    overall = (made.sum(1)[0] / made.sum(1)[1] * true.sum(1)[1] / true.sum(1)[0]).item()
    found = common.segmentation_scores(confusion)
    small = [table.names.index(name) for name in ("person", "pole", "traffic sign")]
    return row | {"pixel acc": found["per-pixel acc"], "IoU": found["class IOU"], "sharp": overall,
                  "small": classes["IoU"][small].nanmean().item(),
                  "least": classes["sharp"][low].item(), "of": table.names[low][:9],
                  "colours": classes["colours"].nanmean().item()}, classes


@functools.cache
def ruler(size: tuple[int, int], images: int, samples: int, folder: str, gpu: int,
          frechet: int) -> tuple:
    """The test streets of a size with draws of their law; the judge, trained if need be; and for
    the distance other streets, and what the judge sees in their photos."""
    device = torch.device("cpu") if gpu < 0 else torch.device("cuda", gpu)
    test_set = common.Dataset(split="test", size=size, limit=images)
    streets = [street_of(k, test_set[i], samples) for i, k in enumerate(test_set.files)]
    judge = common.fcn_scorer(common.Dataset(size=size), Path(folder), device, "random", **JUDGE)
    others = other_streets(size, frechet)
    return streets, judge, others, features(judge, photos_of(others)) if others else None


def judged(paths: list[str], options: argparse.Namespace, law: bool = True) -> dict:
    """{size: {name: (row, values per class)}} of runs or weights, after the law's own rows."""
    torch.set_num_threads(options.threads)
    sizes, found = {}, {}
    for path in paths:
        pictures = pictures_of(Path(path), options)
        sizes.setdefault(tuple(pictures.shape[-2:]), {})[path] = pictures
    for size, rows in sizes.items():
        streets, judge, others, photos = ruler(size, options.images, options.samples,
                                               options.folder, options.gpu, options.frechet)
        each = lambda make: torch.stack([make(street) for street in streets])
        if law:
            rows = {"photos": each(lambda s: s.photo[None]),
                    "true samples": each(lambda s: s.sampled),
                    "without grain": each(lambda s: s.clean),
                    "median of the law": each(lambda s: s.law.median(0, True)[0]),
                    "mean colours": each(lambda s: flat(s.law.mean(0), s.label)[None])} | rows
        found[size] = {name: scores(pictures, streets, judge) for name, pictures in rows.items()}
        for path in set(rows) & set(paths) if others else ():
            found[size][path][0]["Frechet"] = lab2pix.frechet_distance(
                features(judge, made_of(others, Path(path), options.gpu)), photos)
    return found


def yardstick(paths: list[str], options: argparse.Namespace) -> None:
    """The table of runs, a block per size, below the law's own rows."""
    n = len(common.Dataset(split="test", limit=options.images))
    for size, rows in judged(paths, options).items():
        print(f"\n{size[0]}x{size[1]}, {n} streets of the test split, "
              f"{options.samples} samples of each where there are several")
        line("", *COLUMNS)
        for name, (row, _) in rows.items():
            line(name[-25:], *(row.get(column, "-") for column in COLUMNS))
    print("\n" + "\n".join(f"{name:10} {meaning}" for name, meaning in COLUMNS.items()))


# --------------------------------------------------------------------------------- command line

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help="configurations or groups: small, toy, paper, data; "
                             "or yardstick, and runs' folders or files of weights")
    parser.add_argument("--list", action="store_true", help="name the configurations and stop")
    parser.add_argument("--data", default="", metavar="DIR", help="with data: this folder, too")
    parser.add_argument("--gpu", type=int, default=0 if torch.cuda.is_available() else -1,
                        help="CUDA device; -1 is the CPU (default: the first GPU, else the CPU)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(),
                        help="of the CPU (default here: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--channels-last", action="store_true", help="on the CPU; a GPU has it")
    parser.add_argument("--repeats", type=int, default=5, help="steps per median (default: 5)")
    parser.add_argument("--quick", action="store_true",
                        help="tiny networks, a step or two: shows that all runs, not how fast")
    parser.add_argument("--images", type=int, default=20, help="yardstick: streets (20)")
    parser.add_argument("--samples", type=int, default=8, help="yardstick: of each street (8)")
    parser.add_argument("--frechet", type=int, default=0, metavar="N",
                        help="yardstick: the distance, by N other streets; 500 are enough (0)")
    parser.add_argument("--folder", default="runs/yardstick", metavar="DIR",
                        help="yardstick: where its judge is kept (%(default)s)")
    options = parser.parse_args()
    if options.names[:1] == ["yardstick"]:
        return yardstick(options.names[1:], options)
    options.repeats = 1 if options.quick else options.repeats
    options.device = torch.cuda.get_device_name(options.gpu) if options.gpu >= 0 else "CPU"
    options.by_cpu = options.gpu < 0 and options.threads == 1
    wanted = options.names or ["paper" if options.gpu >= 0 else "small"]
    unknown = set(wanted) - set(CASES) - set(GROUPS) - {"data"}
    if unknown:
        parser.error(f"no configuration {', '.join(sorted(unknown))}; --list names them")
    names = [name for w in wanted for name in GROUPS.get(w, [w] if w in CASES else [])]
    if options.list:
        print("\n".join(f"{group}: {', '.join(cases)}" for group, cases in GROUPS.items()))
        return
    if names:
        steps_table(list(dict.fromkeys(names)), options)
    if "data" in wanted:
        data_tables(options)


if __name__ == "__main__":
    common.shell(main, "benchmark")
