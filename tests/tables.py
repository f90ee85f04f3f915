"""The papers' tables on the built-in streets, each row trained with several seeds.

    python tests/tables.py                        all tables; those that are finished cost no time
    python tests/tables.py pix2pix-1 --seeds 3    one of them
    python tests/tables.py --half                 each row half as long, too: did the order flip?
    python tests/tables.py --list                 their names, rows and training commands

A row is a mean and a standard deviation over seeds. "a over b" of the paper holds, falls, or lies
within the spread: the means differ by less than the larger of the two standard deviations. Runs
are kept in --out, named after a checksum of their command: tables share those that are equal, and a
stopped one goes on.
"""

import argparse
import contextlib
import importlib
import json
import re
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("", "notebooks")]

import common  # noqa: E402 (before torch: it says how torch's threads wait)

import benchmark  # noqa: E402
import crn_imle  # noqa: E402
import pix2pix  # noqa: E402
import pix2pixhd  # noqa: E402
import torch  # noqa: E402
from helpers import spread, verdict  # noqa: E402
from torch import nn  # noqa: E402


def of(script: str, paper: str, measures: tuple, flags: str, rows: dict, lower: bool = False):
    """rows: {name: (flags, the paper's number or None)}; paper: what that number is. Measures are
    columns of the yardstick, or, where it does not apply, scores of the output in the script's own
    metrics.json; the first is the paper's, where there is one. lower: the paper's numbers are
    distances, of which less is better."""
    return SimpleNamespace(script=script, paper=paper, measures=measures, flags=flags, rows=rows,
                           lower=lower)


SEEN = ("sharp", "colours", "Frechet")
PIX2PIX = ("--preset toy --size 64 64 --patch 16 --generator unet --limit 400 --epochs 12 "
           "--lr 2e-3 --vgg random")
HD = ("--preset toy --size 64 64 --enhancers 0 --scales 3 --features 0 --width 16 --layers 1 2 2 "
      "--d-width 16 --lr 4e-4 --loss GAN+FM --lambda-fm 10 --epochs 6 --no-smooth --vgg small")
IMLE = "--preset toy"
LAB2PIX = "--preset toy --size 64 64 --width 8 --limit 200 --epochs 8 --vgg random"
TABLES = {
    "pix2pix-1": of("pix2pix", "pixel acc", ("pixel acc", *SEEN), PIX2PIX, {
        "L1": ("--loss L1", .42), "GAN": ("--loss GAN", .22), "cGAN": ("--loss cGAN", .57),
        "L1+GAN": ("--loss L1+GAN", .64), "L1+cGAN": ("", .66)}),
    "pix2pix-2": of("pix2pix", "pixel acc", ("pixel acc", *SEEN), PIX2PIX, {
        "encoder-decoder, L1": ("--generator encoder-decoder --loss L1", .35),
        "encoder-decoder, L1+cGAN": ("--generator encoder-decoder", .29),
        "U-Net, L1": ("--loss L1", .48), "U-Net, L1+cGAN": ("", .55)}),
    "pix2pix-3": of("pix2pix", "pixel acc", ("pixel acc", *SEEN), PIX2PIX, {
        "1 x 1": ("--patch 1", .39), "16 x 16": ("", .66), "34 x 34": ("--patch 34", None),
        "70 x 70": ("--patch 70", .42)}),       # these see 2, 25, 53 and 109 % of the side
    "pix2pix-6": of("pix2pix", "per-pixel acc", ("per-pixel acc", "class IOU"), PIX2PIX + (
        " --task photo2labels"), {
        "L1": ("--loss L1", .86), "cGAN": ("--loss cGAN", .74), "L1+cGAN": ("", .83)}),
    "pix2pixhd-losses": of("pix2pixhd", "preferred %", SEEN, HD, {    # to the full loss
        "GAN": ("--loss GAN", 31), "GAN+FM": ("", 41),
        "GAN+FM+VGG": ("--loss GAN+FM+VGG", 50)}),
    "pix2pixhd-discriminators": of("pix2pixhd", "IoU", ("IoU", *SEEN), HD, {
        "one": ("--scales 1", .578), "three": ("", .639)}),
    "pix2pixhd-generators": of("pix2pixhd", "IoU", ("IoU", "sharp", "colours"), HD.replace(
        "small", "random"), {
        "U-Net": ("--rival unet", .391), "CRN": ("--rival crn", .399), "G1": ("", .639)}),
    "pix2pixhd-boundary": of("pix2pixhd", "preferred %", ("apart", *SEEN), HD, {      # of cars
        "without": ("--no-boundary", 35.7), "with": ("", 64.3)}),
    "pix2pixhd-coarse": of("pix2pixhd", "", SEEN, "--preset toy", {      # Sec. 3.2, in equal time
        "G1 alone": ("--enhancers 0 --epochs 4", None), "G1, then G2": ("", None)}),
    "imle-1": of("crn_imle", "variance", ("variance", "colours", "times", "Frechet"), IMLE, {
        "CRN": ("--model crn --epochs 4 --lr-drop 3", 2.87),
        "IMLE": ("--epochs 4 --lr-drop 3", 3.42)}),
    "imle-rebalancing": of("crn_imle", "", ("snow", "times", "variance"), IMLE, {      # Sec. 3.4
        "without": ("--epochs 4 --lr-drop 3", None),
        "with": ("--epochs 4 --lr-drop 3 --rebalance both", None)}),
    "lab2pix-1": of("lab2pix", "FID", ("IoU", "sharp", "colours"), LAB2PIX + (
        " --version V1 --batch-size 2"), {
        f"{row}_u": (f"--ablation {row}_u", fid) for row, fid in zip(
            "ABCDEFGH", (133, 118, 83.5, 83.4, 76.0, 67.9, 65.0, 67.4))}, lower=True),
    "lab2pix-2": of("lab2pix", "FID", ("Frechet", "sharp", "colours", "small"), LAB2PIX + (
        " --no-short"), {
        f"{row}_s": (f"--ablation {row}_s", fid) for row, fid in zip(
            "ABCDE", (57.4, 49.2, 48.0, 46.0, 45.5))}, lower=True),
    "lab2pix-V1": of("lab2pix", "", ("IoU", *SEEN), "--preset toy --version V1", {
        "no S": ("--lambda-4 0", None), "no LSCA": ("--no-lsca", None), "V1": ("", None)}),
}
LESS = {"colours", "Frechet"}                   # 0 is right; below it is by chance
ONE = {"sharp", "variance", "times", "snow", "apart"}   # 1 is right


class Rival(nn.Module):
    """A generator of another script in the place of G1, with what pix2pixhd.py asks of one."""
    level = 0                                   # one network: there is nothing to enhance

    def __init__(self, net: nn.Module, multiple: int):
        super().__init__()
        self.net, self.multiple = net, multiple
        self.net.apply(pix2pixhd.initialise)

    def use(self, level: int, alone: bool = False) -> None:
        """The only stage that there is."""

    def forward(self, s: torch.Tensor) -> torch.Tensor:
        return self.net(s)


def rival(kind: str, c: int, cfg: pix2pixhd.Config) -> Rival:
    """pix2pix's U-Net, without its dropout, since this paper has no noise; or the cascaded
    refinement network, which ends in tanh here. Both are as deep as the size allows."""
    fits = [k for k in range(1, 9) if not (cfg.size[0] % 2 ** k or cfg.size[1] % 2 ** k)]
    if kind == "unet":                          # down to 2 rows or more
        levels = max(k for k in fits if min(cfg.size) >= 2 ** (k + 1))
        net = pix2pix.Generator(c, 3, cfg.width, levels)
        for block in net.decoder:
            block.dropout = False
        return Rival(net, net.multiple)
    modules = max(k for k in fits if min(cfg.size) >= 2 ** (k + 2)) + 1       # from 4 rows on
    net = crn_imle.Generator(c, width=16 * cfg.width, modules=modules)
    return Rival(nn.Sequential(net, nn.Flatten(1, 2), nn.Tanh()), net.multiple)


@contextlib.contextmanager
def rival_in_place(command: str):
    """pix2pixhd.py with the generator that a command names by --rival; without, its own."""
    own, named = pix2pixhd.networks, re.search(r"--rival (\w+)", command)

    def networks(cfg):
        others = own(cfg)[1:]
        return rival(named[1], pix2pixhd.channels(cfg) + cfg.features, cfg), *others

    if named:
        pix2pixhd.networks = networks
    try:
        yield
    finally:
        pix2pixhd.networks = own


def halved(flags: str) -> str:
    """With half the epochs (IMLE's table has its lengths in its rows)."""
    return re.sub(r"(?<=--epochs )\d+", lambda epochs: str(int(epochs[0]) // 2), flags)


def commands(name: str, seeds: int, half: bool = False) -> dict[tuple[str, int], str]:
    """The training command of each row and seed, without its folder."""
    table = TABLES[name]
    shared = halved(table.flags) if half else table.flags
    return {(row, seed): " ".join(f"{shared} {flags} --seed {seed}".split())
            for row, (flags, _) in table.rows.items() for seed in range(seeds)}


def finish(script: str, command: str, out: Path, gpu: int) -> None:
    """The run of a command, trained to its end; a finished one is left as it is."""
    words = re.sub(r"--rival \w+", "", command).split()
    if (out / "checkpoint.pt").exists():
        words = ["--resume"]
    try:
        importlib.import_module(script).main([*words, "--out", str(out), "--gpu", str(gpu)])
    except common.UserError as error:
        if "ended at step" not in str(error):
            raise


def values_of(table: SimpleNamespace, command: str, options: argparse.Namespace) -> dict:
    """The measures of a command's run, which are kept beside it; trained if need be."""
    out = Path(options.out, f"{table.script}-{zlib.crc32(command.encode()):08x}")
    kept = out / "table.json"
    if kept.exists() and set(table.measures) <= set(found := json.loads(kept.read_text())):
        return found
    with rival_in_place(command):
        finish(table.script, command, out, options.gpu)
        if set(table.measures) <= set(benchmark.COLUMNS):
            (rows,) = benchmark.judged([str(out)], options, law=False).values()
            found = rows[str(out)][0]
        else:
            importlib.import_module(table.script).main(
                ["evaluate", "--out", str(out), "--gpu", str(options.gpu)])
            found = json.loads((out / "metrics.json").read_text())["output"]
        kept.write_text(json.dumps({m: v for m, v in found.items() if v == v}, allow_nan=False))
    return found


def goodness(measure: str, value: float) -> float:
    """A value of which more is better."""
    return -abs(value - 1) if measure in ONE else -max(value, 0.) if measure in LESS else value


def orders(name: str, values: dict) -> dict[str, list[str]]:
    """What became of the paper's order: {"better row over the next one": verdicts by measure}."""
    table = TABLES[name]
    ranked = sorted((r for r in table.rows if table.rows[r][1] is not None),
                    key=lambda r: table.rows[r][1] * (-1 if table.lower else 1))
    return {f"{high} over {low}": [
        verdict(*([goodness(m, v[m]) for v in values[row]] for row in (high, low)))
        for m in table.measures] for low, high in zip(ranked, ranked[1:])}


def show(name: str, values: dict, half: dict | None = None) -> None:
    """The table and its orders; beside each what it was in runs half as long, if it was another."""
    table = TABLES[name]
    print(f"\n{name}, {table.script}.py {table.flags}")
    head = ", ".join(filter(None, ("paper", table.paper)))
    print(f"{'':26}{head:>20}" + "".join(f"{m:>18}" for m in table.measures))
    for row, (_, paper) in table.rows.items():
        cells = [f"{spread([v[m] for v in values[row]]):>18}" for m in table.measures]
        print(f"{row:26}{'-' if paper is None else paper:>20}" + "".join(cells))
    found, before = orders(name, values), orders(name, half or values)
    for pair in found:
        said = [f"{m} {now}" + f" (half as long: {then})" * (now != then)
                for m, now, then in zip(table.measures, found[pair], before[pair])]
        print(f"    {pair}: {', '.join(said)}")
    if half:
        flips = sum({now, then} == {"holds", "falls"} for pair in found
                    for now, then in zip(found[pair], before[pair]))
        print(f"    flipped, holds to falls or back: {flips} of {len(found) * len(table.measures)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TABLE", help="none: all")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    parser.add_argument("--seeds", type=int, default=3, help="runs per row (3)")
    parser.add_argument("--half", action="store_true", help="train each half as long, too")
    parser.add_argument("--out", default="runs/tables", metavar="DIR", help="(%(default)s)")
    parser.add_argument("--gpu", type=int, default=0 if torch.cuda.is_available() else -1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--images", type=int, default=50, help="of the test split (50)")
    parser.add_argument("--samples", type=int, default=4, help="of each, where there are several")
    parser.add_argument("--frechet", type=int, default=500, help="streets for the distance (500)")
    options = parser.parse_args()
    options.folder = str(Path(options.out, "judge"))
    if unknown := set(options.names) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    for name in options.names or TABLES:
        lengths = [False, True] if options.half and "--epochs" in TABLES[name].flags else [False]
        columns = {half: {row: [] for row in TABLES[name].rows} for half in lengths}
        for half, values in columns.items():
            for (row, seed), command in commands(name, options.seeds, half).items():
                if options.list:
                    print(f"{name}: python {TABLES[name].script}.py {command}")
                else:
                    values[row].append(values_of(TABLES[name], command, options))
        if not options.list:
            show(name, columns[False], columns.get(True))


if __name__ == "__main__":
    common.shell(main, "tables")
