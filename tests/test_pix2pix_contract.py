"""What pix2pix.py owes its users: runs, resuming, errors, signals, processes, a readable file."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    SCRIPTS, Trap, assert_same, assert_same_state, fill_the_disk, label_map, losses_of, picture,
    refuses, stored, torchrun)
from PIL import Image
from torch.nn import functional as F

import pix2pix
from pix2pix import Config, UserError

SCRIPT = SCRIPTS / "pix2pix.py"
# Two steps an epoch (five images, batches of two): step 3 is in mid-epoch.
TINY = ("--size 32 32 --width 4 --patch 16 --limit 5 --batch-size 2 --epochs 2000 --save-every 3 "
        "--lr 0.0002 --gpu -1")


def call(line: str) -> None:
    pix2pix.main(line.split())


fails = functools.partial(refuses, call)


def pairs(root: Path, n: int = 3, splits=("train", "test")) -> Path:
    for split in splits:
        for i in range(n):
            picture(root / split / f"{i}.png", 32, 64, i)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Six steps on the streets, never interrupted. Tests read it and write elsewhere."""
    out = tmp_path_factory.mktemp("shared") / "whole"
    call(f"{TINY} --steps 6 --out {out}")
    return out


# ----------------------------------------------------------------------------- A run and its folder

def test_a_run_leaves_what_the_readme_promises(run):
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert names == {"config.json", "log.csv", "losses.png", "checkpoint.pt",
                     "samples/0000003.png", "samples/0000006.png"}
    config = json.loads((run / "config.json").read_text())
    assert (config["size"], config["width"], config["classes"]) == ([32, 32], 4, "streets")
    rows = losses_of(run)
    assert [row["step"] for row in rows] == ["3", "6"]
    assert all(np.isfinite(float(row[k])) for row in rows
               for k in ("d_real", "d_fake", "g_gan", "g_l1"))
    # Five test streets as input | output | truth, two of them side by side.
    with Image.open(run / "samples" / "0000006.png") as grid:
        assert grid.size == (6 * 34 + 2, 3 * 34 + 2)


def test_a_checkpoint_is_plain_and_carries_its_config(run):
    content = stored(run)                                  # weights_only=True: it cannot run code
    assert content["script"] == "pix2pix"
    assert (content["step"], content["epoch"], content["seen"]) == (6, 2, 4)
    assert set(content["config"]) == {f.name for f in dataclasses.fields(Config)}
    assert content["opt_g"]["state"][0]["step"] == 6


def test_training_changes_both_networks_and_moves_the_averages(run):
    cfg = Config(size=(32, 32), levels=5, width=4, patch=16)
    fresh = pix2pix.build(cfg, torch.device("cpu"))
    content = stored(run)
    for name, net in (("generator", fresh.generator), ("discriminator", fresh.discriminator)):
        same = [k for k, v in net.state_dict().items()
                if torch.equal(v, content[name][k]) and "num_batches" not in k]
        assert not same, same


def test_runs_are_numbered_and_the_newest_is_taken(capsys):
    call(f"{TINY} --steps 1 --loss L1")
    call(f"{TINY} --steps 2 --loss L1")
    assert stored("runs/pix2pix-1")["step"] == 1 and stored("runs/pix2pix-2")["step"] == 2
    call("--resume --steps 3")
    assert stored("runs/pix2pix-2")["step"] == 3
    call("sample --limit 1")
    assert [p.suffix for p in Path("runs/pix2pix-2/test").iterdir()] == [".png"]


def test_l1_alone_has_no_discriminator():
    call(f"{TINY} --steps 1 --loss L1 --out r")
    assert stored("r")["discriminator"] is None and stored("r")["opt_d"] is None
    assert losses_of("r")[0].keys() == {"step", "epoch", "g_l1"}


@pytest.mark.parametrize("extra", [
    "--task photo2labels", "--task colorization", "--task inpainting", "--one-hot", "--loss GAN",
    "--generator encoder-decoder --bottleneck-norm --first-dropout 2", "--decay --no-jitter",
    "--no-mirror --levels 3 --lambda-l1 10 --smooth", "--precision bf16 --channels-last"])
def test_every_setting_trains_and_samples(extra):
    """Two steps, one more after resuming, two outputs: nothing that a flag selects is broken."""
    call(f"{TINY} --steps 2 --out r {extra}")
    call("--resume --steps 3 --out r")
    call("sample --out r --limit 2 --samples 2 --output o")
    for path in Path("o").iterdir():
        with Image.open(path) as image:
            assert image.size == (32, 32) and image.mode == "RGB"
    assert len(list(Path("o").iterdir())) == 4


def test_compile_agrees_with_eager():
    """--compile changes the speed, neither the numbers nor the names in the checkpoint."""
    torch.manual_seed(0)
    cpu, x, y = torch.device("cpu"), torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    net = pix2pix.PatchDiscriminator(width=2, patch=1)
    names, expected = list(net.state_dict()), net(x, y)
    compiled = pix2pix.dress(net, Config(compile=True), cpu)
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, y), expected.detach(), rtol=1e-5, atol=1e-6)
    assert compiled._compiled_call_impl is not None and list(compiled.state_dict()) == names


# ------------------------------------------------------------------------------------------ Resume

@pytest.mark.parametrize("workers", [0, 1])
def test_resume_is_bit_exact(run, workers):
    """Stopped at step 3, in mid-epoch, and gone on with: equal weights, moments and losses."""
    call(f"{TINY} --steps 3 --out half")
    assert stored("half")["seen"] == 2
    call(f"--resume --steps 6 --out half --workers {workers}")
    assert_same_state("half", run)
    assert losses_of("half") == losses_of(run)


def test_resume_after_a_crash_repeats_the_lost_steps(run):
    """What the log holds beyond the checkpoint is dropped, so that no step stands there twice."""
    call(f"{TINY} --steps 3 --out half")
    with open("half/log.csv", "a") as file:
        file.write("5,2,9,9,9,9,1,0.5\n")
    call("--resume --steps 6 --out half")
    assert losses_of("half") == losses_of(run)


def test_resume_survives_a_log_cut_by_a_power_loss(run):
    call(f"{TINY} --steps 3 --out half")
    with open("half/log.csv", "a") as file:
        file.write("4,2,0.3")                              # half a row, no end of line
    call("--resume --steps 6 --out half")
    assert losses_of("half") == losses_of(run)
    rows = Path("half/log.csv").read_text().splitlines()
    Path("half/log.csv").write_text("\n".join(rows[:2]) + "\n" + rows[2][:6])     # "6,2,0."
    call("--resume --steps 9 --out half")
    assert [row["step"] for row in losses_of("half")][-1] == "9"


def test_same_seed_same_run_other_seed_other_run(run):
    call(f"{TINY} --steps 3 --out a --seed 1")
    call(f"{TINY} --steps 3 --out b --seed 1")
    assert losses_of("a") == losses_of("b") and losses_of("a")[0] != losses_of(run)[0]


def test_an_out_that_holds_a_run_is_refused(run, capsys):
    before = (run / "checkpoint.pt").read_bytes()
    fails(capsys, f"{TINY} --steps 6 --out {run}", str(run), "--resume")
    assert (run / "checkpoint.pt").read_bytes() == before


def test_contradicting_flags_quote_both_values(run, capsys):
    fails(capsys, f"--resume --out {run} --steps 9 --width 8", "--width 8", "4")
    fails(capsys, f"--resume --out {run} --steps 9 --lr 0.1", "--lr 0.1", "0.0002")
    fails(capsys, f"sample --out {run} --loss L1", "--loss L1", "L1+cGAN")
    fails(capsys, f"evaluate --out {run} --task colorization", "colorization", "labels2photo")


def test_a_finished_run_says_so(run, capsys):
    config = (run / "config.json").read_text()
    fails(capsys, f"--resume --out {run} --steps 6", "finished at step 6", "--steps")
    fails(capsys, f"--resume --out {run} --steps 2", "finished at step 6", "--steps")
    assert (run / "config.json").read_text() == config     # a refused call changes nothing


def test_init_starts_anew_from_the_weights(run):
    """Fine-tuning: G and D as in the file, Adam and the counters from nothing."""
    cfg = Config(size=(32, 32), levels=5, width=4, patch=16, init=str(run / "checkpoint.pt"))
    state = pix2pix.build(cfg, torch.device("cpu"))
    assert_same(dict(state.generator.state_dict()), dict(stored(run)["generator"]))
    assert_same(dict(state.discriminator.state_dict()), dict(stored(run)["discriminator"]))
    assert (state.step, state.epoch, len(state.opt_g.state)) == (0, 0, 0)
    call(f"{TINY} --steps 1 --out tuned --init {run / 'checkpoint.pt'}")
    assert stored("tuned")["step"] == 1
    call("--resume --steps 2 --out tuned")
    call("sample --limit 1 --out tuned")


def test_init_that_does_not_fit_is_refused(run, capsys):
    fails(capsys, f"{TINY} --steps 1 --width 8 --out x --init {run / 'checkpoint.pt'}",
          "checkpoint.pt", "generator", "expected")


# ---------------------------------------------------------------------------------------- Sampling

def test_sample_needs_no_flags_and_keeps_the_size(run):
    """A label map of any size gives a photo of that size; a folder gives a folder."""
    label_map(Path("in/a.png"))
    label_map(Path("in/b.png"), 64, 20)
    call(f"sample --out {run} --input in/a.png --output photo.png")
    with Image.open("photo.png") as image:
        assert image.size == (53, 37)
    call(f"sample --checkpoint {run / 'checkpoint.pt'} --input in --output photos")
    sizes = {p.name: Image.open(p).size for p in Path("photos").iterdir()}
    assert sizes == {"a.png": (53, 37), "b.png": (20, 64)}
    call(f"sample --out {run} --input in/a.png --output big.png --size 64 96")
    with Image.open("big.png") as image:
        assert image.size == (96, 64)


def test_samples_differ_by_noise_and_repeat_by_seed(run):
    label_map(Path("a.png"))
    for folder in ("one", "two"):
        call(f"sample --out {run} --input a.png --output {folder} --samples 2")
    call(f"sample --out {run} --input a.png --output three --seed 7")
    read = {str(p): p.read_bytes() for p in Path(".").glob("*/a*.png")}
    assert len(read) == 5
    assert read["one/a_1.png"] == read["two/a_1.png"] and read["one/a_2.png"] == read["two/a_2.png"]
    assert len({read["one/a_1.png"], read["one/a_2.png"], read["three/a.png"]}) == 3


def test_sample_does_not_depend_on_its_neighbours(run):
    label_map(Path("in/b.png"))
    call(f"sample --out {run} --input in --output alone")
    label_map(Path("in/a.png"), 80, 90)
    call(f"sample --out {run} --input in --output both")
    assert Path("alone/b.png").read_bytes() == Path("both/b.png").read_bytes()


@pytest.mark.parametrize("task", ["colorization", "inpainting", "pairs"])
def test_training_and_sampling_on_files(task, capsys):
    """Photos for tasks that make their own input, side-by-side files for pairs; --input a photo."""
    data = pairs(Path("data"))
    call(f"{TINY} --data {data} --steps 1 --task {task} --out r")
    picture(Path("photo.jpg"), 41, 29)
    call("sample --out r --input photo.jpg --output o.png")
    with Image.open("o.png") as image:
        assert image.size == (29, 41)
    call("evaluate --out r")
    assert json.loads(Path("r/metrics.json").read_text())["images"] == 3
    assert "no segmentation scores" in capsys.readouterr().out


def test_the_size_at_test_time_is_free(run):
    """Fig. 8: a network trained at one size runs at another; its depth is that of its training."""
    call(f"sample --out {run} --size 64 64 --limit 1 --output o")
    assert [Image.open(p).size for p in Path("o").iterdir()] == [(64, 64)]


def test_sampling_never_overwrites_its_input(run, capsys):
    source = label_map(Path("in/a.png"))
    before = source.read_bytes()
    for line in ("--input in --output in", "--input in/a.png --output in/a.png"):
        with pytest.raises(UserError, match="in"):
            call(f"sample --out {run} {line}")
    assert source.read_bytes() == before


def released_file(path: Path, width: int = 2) -> Path:
    """A small U-Net under the authors' keys: 5 levels, made from ours by name."""
    G = pix2pix.Generator(width=width, levels=5, first_dropout=2)
    own, theirs = G.state_dict(), {}
    prefix = ["model.model."] + ["model.model.1.model." + "3.model." * i for i in range(4)]
    for key, value in own.items():
        side, i, kind, rest = key.split(".", 3)
        i = int(i)
        level = i if side == "encoder" else 4 - i
        index = {("encoder", "conv"): 0 if level == 0 else 1, ("encoder", "norm"): 2,
                 ("decoder", "conv"): {0: 3, 4: 3}.get(level, 5),
                 ("decoder", "norm"): 4 if level == 4 else 6}[side, kind]
        theirs[f"{prefix[level]}{index}.{rest}"] = value
    torch.save(theirs, path)
    return path


def test_released_weights_need_no_flags():
    """The authors' file tells its width and depth; its dropout is in blocks 2-4."""
    released_file(Path("latest_net_G.pth"))
    picture(Path("p.png"), 33, 70)
    call("sample --checkpoint latest_net_G.pth --input p.png --output o.png --gpu -1")
    with Image.open("o.png") as image:
        assert image.size == (70, 33)
    cfg, state = pix2pix.load_for_test(
        {"gpu": -1}, {"checkpoint": "latest_net_G.pth", "input": "p.png"})
    assert (cfg.width, len(state.generator.decoder), cfg.first_dropout) == (2, 5, 2)
    call("sample --checkpoint latest_net_G.pth --preset facades --direction BtoA --gpu -1"
         " --input p.png --output o2.png")


def test_released_weights_without_an_input_say_what_is_missing(capsys):
    released_file(Path("latest_net_G.pth"))
    fails(capsys, "sample --checkpoint latest_net_G.pth --gpu -1", "--input")


# -------------------------------------------------------------------------------------- Evaluation

def test_evaluate_writes_the_papers_metrics(run, capsys):
    call(f"evaluate --out {run} --scorer-width 2 --scorer-steps 3 --vgg random --limit 3")
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("metrics.json", "worst.png", "histograms.png"):
        (run / name).unlink()
    assert metrics["images"] == 3 and 0 < metrics["L1"] < 2
    assert len(metrics["histogram intersection"]) == 3
    assert all(0 <= v <= 1.001 for v in metrics["histogram intersection"])
    for row in ("output", "truth"):
        assert set(metrics[row]) == {"per-pixel acc", "per-class acc", "class IOU"}
        assert all(0 <= v <= 1 for v in metrics[row].values())
    text = " ".join(capsys.readouterr().out.split())
    assert "0.65 0.21 0.17" in text and "0.80 0.26 0.21" in text    # patch 16, ground truth


def test_evaluate_photo_to_labels_by_nearest_colour(capsys):
    """Table 6: no scorer; the true label maps score 1."""
    call(f"{TINY} --steps 1 --task photo2labels --loss L1 --out r")
    call("evaluate --out r --limit 2")
    metrics = json.loads(Path("r/metrics.json").read_text())
    assert all(v == 1 for v in metrics["truth"].values())
    assert metrics["output"]["per-pixel acc"] < 1
    assert "0.86 0.42 0.35" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("loss, patch, generator, told", [
    ("L1+cGAN", 16, "unet", "Table 3"), ("L1", 70, "unet", ""), ("cGAN", 16, "unet", ""),
    ("L1+cGAN", 70, "encoder-decoder", "Table 2")])
def test_report_shows_the_rows_that_the_run_reproduces(loss, patch, generator, told, capsys):
    """Table 3 is of L1+cGAN with the U-Net; an L1 run has no D to have a receptive field."""
    scores = {"per-pixel acc": 0.0, "per-class acc": 0.0, "class IOU": 0.0}
    metrics = {"images": 1, "L1": 0.0, "histogram intersection": [0.0, 0.0, 0.0],
               "output": scores, "truth": scores}
    pix2pix.report(metrics, Config(loss=loss, patch=patch, generator=generator))
    text = capsys.readouterr().out
    assert ("Table 3" in text) == (told == "Table 3")
    assert told in text


# ---------------------------------------------------------------------------- Damage and bad values

def test_check_mode_reports_and_trains_nothing(capsys):
    call("check --size 32 32 --limit 3")
    text = capsys.readouterr().out
    assert "streets" in text and "road" in text
    assert not list(Path(".").rglob("checkpoint.pt"))
    assert len(list(Path(".").rglob("contact_*.png"))) == 2


def test_trace_prints_stages_and_parameters(capsys):
    call("trace --size 256 256 --width 4 --limit 2 --gpu -1 --preset cityscapes")
    text = capsys.readouterr().out
    assert "(1, 32, 1, 1)" in text and "(1, 1, 30, 30)" in text and "70 pixels" in text
    with torch.device("meta"):
        parameters = sum(p.numel() for p in pix2pix.Generator(width=4).parameters())
    assert f"{parameters:,}" in text


@pytest.mark.parametrize("mode", ["sample --checkpoint", "train --steps 1 --init"])
def test_foreign_and_damaged_checkpoints(run, capsys, mode):
    whole, content = (run / "checkpoint.pt").read_bytes(), stored(run)
    Path("cut.pt").write_bytes(whole[:len(whole) // 2])
    Path("empty.pt").write_bytes(b"")
    torch.save(content | {"script": "pix2pixhd"}, "other.pt")
    torch.save({"script": "pix2pix", "config": Trap()}, "trap.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"epoch": 3, "state_dict": {}}, "foreign.pt")
    torch.save({0: torch.zeros(1)}, "numbers.pt")
    torch.save({"model.model.0.weight": torch.zeros(4, 3, 4, 4), "epoch": 3}, "mixed.pt")
    for name, *words in (("cut.pt", "damaged"), ("empty.pt", ""), ("other.pt", "pix2pixhd"),
                         ("trap.pt", "damaged"), ("list.pt", "list"), ("foreign.pt", ""),
                         ("numbers.pt", ""), ("mixed.pt", ""), ("missing.pt", "no such file")):
        fails(capsys, f"{mode} {name} {TINY if 'init' in mode else '--gpu -1'}", name, *words)
    assert not Path("sprung").exists()


def test_init_that_nothing_takes_is_refused(capsys):
    """A released D for a run without a D: nothing would be loaded, and nobody would know."""
    D = pix2pix.PatchDiscriminator(width=4, patch=16)
    torch.save({k.replace("layers.", "model."): v for k, v in D.state_dict().items()}, "net_D.pth")
    call(f"{TINY} --steps 1 --out r --init net_D.pth")
    fails(capsys, f"{TINY} --steps 1 --out r2 --init net_D.pth --loss L1", "net_D.pth")


def test_checkpoint_of_another_version(run, capsys):
    content = stored(run)
    content["config"]["frobnicate"] = 1
    torch.save(content, "newer.pt")
    fails(capsys, "sample --checkpoint newer.pt --gpu -1", "newer.pt", "frobnicate")


@pytest.mark.parametrize("flags, words", [
    ("--size 30 40", ["30 40", "32"]), ("--betas 2 0.9", ["--betas", "2"]),
    ("--size 0 64", ["0 64"]), ("--batch-size 0", ["--batch-size 0"]),
    ("--lr -1", ["-1"]), ("--lr nan", ["nan"]), ("--patch 71", ["71", "70"]),
    ("--classes x", ["x", "cityscapes"]), ("--limit -1", ["--limit -1"]),
    ("--width 0", ["--width 0"]), ("--steps -3", ["--steps -3"]), ("--epochs -1", ["-1"]),
    ("--lambda-l1 -1", ["-1"]), ("--lambda-l1 inf", ["inf"]), ("--levels -1", ["-1"]),
    ("--levels 9 --size 512 512", ["9", "8"]), ("--workers -1", ["--workers -1"]),
    ("--one-hot --task photo2labels", ["--one-hot", "photo2labels"]),
    ("--preset sketches", ["sketches"]), ("--batch-size 6", ["--batch-size 6", "5"]),
    ("--task pairs", ["--task pairs"]), ("--task nonsense", ["nonsense"]),
    ("--data nowhere", ["nowhere"]), ("--epochs 0", ["--epochs 0"]),
    ("--gpu -2", ["-2"]), ("--seed 99999999999999999999999", ["--seed"])])
def test_absurd_values_are_refused_in_one_line(capsys, flags, words):
    given = [t for t in flags.split() if t.startswith("--")]
    base = [t for t in re.split(r" (?=--)", TINY) if t.split()[0] not in given]
    fails(capsys, " ".join(base) + f" --steps 2 --out r {flags}", *words)
    assert not Path("r/checkpoint.pt").exists()


def test_a_refused_call_leaves_no_folder(capsys):
    """Else the next free number, or the same --out, is taken by a run that never was."""
    fails(capsys, f"{TINY} --batch-size 6 --steps 1", "6")
    fails(capsys, f"{TINY} --init nofile.pt --steps 1", "nofile.pt")
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


@pytest.mark.parametrize("line, words", [
    ("evaluate --vgg nofile.pth --scorer-width 2 --scorer-steps 3", ["nofile.pth"]),
    ("evaluate --vgg imagenet --scorer-width 2 --scorer-steps 3", ["--scorer-width 2"]),
    ("sample --input nowhere.png", ["nowhere.png"]), ("sample --samples 0", ["--samples 0"]),
    ("sample --samples -1", ["--samples -1"]), ("sample --limit 1 --output o/x.xyz", ["x.xyz"])])
def test_mistakes_at_test_time(run, capsys, line, words):
    if "x.xyz" in line:
        label_map(Path("a.png"))
        line += " --input a.png"
    fails(capsys, f"{line} --checkpoint {run / 'checkpoint.pt'}", *words)


def test_flags_that_the_mode_ignores_are_refused(run, capsys):
    """A flag that nothing reads is a lie to the user."""
    fails(capsys, f"{TINY} --steps 1 --out r --input a.png", "--input")
    fails(capsys, f"{TINY} --steps 1 --out r --samples 3", "--samples")
    fails(capsys, f"--resume --out {run} --steps 9 --preset facades", "--preset")


def test_trace_with_too_few_images(capsys):
    fails(capsys, f"trace {TINY} --batch-size 6", "--batch-size 6")


def test_a_damaged_image_is_one_line_even_from_a_worker(capsys):
    """The workers' own traceback must not reach the user."""
    data = pairs(Path("data"))
    whole = Path("data/train/1.png").read_bytes()
    Path("data/train/1.png").write_bytes(whole[:len(whole) - 400])
    for workers in (0, 1):
        text = fails(capsys, f"{TINY} --data {data} --steps 3 --batch-size 1 --out r{workers} "
                             f"--workers {workers}", "data/train/1.png")
        assert "Traceback" not in text


# ------------------------------------------------------------------------ NaN, full disks, signals

def test_nan_stops_with_its_name_and_keeps_the_checkpoint(capsys, monkeypatch):
    """Weights that become infinite after step 3: the loss and its step are named."""
    call(f"{TINY} --steps 3 --out r")
    before, step = Path("r/checkpoint.pt").read_bytes(), pix2pix.train_step

    def broken(state, batch, cfg):
        if state.step == 4:                                # the fifth step
            with torch.no_grad():
                state.generator.encoder[0].conv.weight.fill_(torch.inf)
        return step(state, batch, cfg)

    with monkeypatch.context() as patch:
        patch.setattr(pix2pix, "train_step", broken)
        text = fails(capsys, "--resume --steps 9 --out r", "step 5", "nan", "--lr")
    assert re.search(r"\b(g_l1|g_gan|d_fake)\b", text)
    assert Path("r/checkpoint.pt").read_bytes() == before
    call("--resume --steps 4 --out r")


def test_nan_weights_are_never_saved(capsys, monkeypatch):
    """An update can ruin the weights while its own loss was still finite: at step 6, a save."""
    call(f"{TINY} --steps 3 --out r")
    step = pix2pix.train_step

    def broken(state, batch, cfg):
        losses = step(state, batch, cfg)
        if state.step == 5:                                # the sixth step; its losses are fine
            with torch.no_grad():
                state.generator.encoder[0].conv.weight.fill_(torch.nan)
        return losses

    monkeypatch.setattr(pix2pix, "train_step", broken)
    fails(capsys, "--resume --steps 9 --out r", "nan")
    assert all(v.isfinite().all() for v in stored("r")["generator"].values())


@pytest.mark.parametrize("broken", ["torch.save", "os.fsync", "os.replace"])
def test_a_full_disk_keeps_the_last_good_checkpoint(capsys, monkeypatch, tmp_path, broken):
    call(f"{TINY} --steps 3 --out r")
    before = Path("r/checkpoint.pt").read_bytes()
    with monkeypatch.context() as patch:
        fill_the_disk(patch, broken)
        fails(capsys, "--resume --steps 6 --out r", "checkpoint.pt", "No space left")
    assert Path("r/checkpoint.pt").read_bytes() == before
    assert not list(Path("r").rglob("*.tmp"))
    call("--resume --steps 6 --out r")


def test_torchrun_with_a_gpu_number_is_refused(monkeypatch, capsys):
    """--gpu 0 in two processes would put both on one card: each takes its own, or the CPU."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda k: "a card")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: None)
    assert pix2pix.pick_device(Config()).index == 1
    with pytest.raises(UserError, match="--gpu 0"):
        pix2pix.pick_device(Config(gpu=0))


def test_signals_belong_to_the_caller_again_after_training():
    """A notebook that has called train() must still be interruptible."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    call(f"{TINY} --steps 1 --out r")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_before_the_first_step_still_saves(monkeypatch):
    """Ctrl-C while the first batch is being loaded: what is said to be saved must be saved."""
    batches = pix2pix.epoch_batches

    def slow(*arguments):
        signal.raise_signal(signal.SIGINT)
        return batches(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pix2pix, "epoch_batches", slow)
        with pytest.raises(SystemExit) as caught:
            call(f"{TINY} --steps 9 --out r")
    assert caught.value.code == 130
    call("--resume --steps 3 --out r")
    assert stored("r")["step"] == 3


# ----------------------------------------------------------------------------- Several processes

def test_torchrun_makes_one_run_which_one_process_can_resume():
    line = TINY.replace("--batch-size 2", "--batch-size 1")
    result = torchrun(f"{SCRIPT} {line} --steps 3")
    assert result.returncode == 0, result.stderr[-3000:]
    assert [p.name for p in Path("runs").iterdir()] == ["pix2pix-1"]
    content = stored("runs/pix2pix-1")
    assert (content["step"], content["epoch"], content["seen"]) == (3, 1, 2)     # 2 of 4 images
    assert not any(k.startswith("module.") for k in content["generator"])
    call("--resume --steps 5")
    content = stored("runs/pix2pix-1")
    assert (content["step"], content["epoch"]) == (5, 1)     # one process: one image a step


WORKER = """
import sys, torch, pix2pix
images = torch.load("images.pt")
for loss in ("L1+cGAN", "L1"):
    cfg = pix2pix.Config(size=(32, 32), levels=5, width=4, patch=16, loss=loss, gpu=-1, seed=5)
    device = pix2pix.pick_device(cfg)
    state, rank = pix2pix.build(cfg, device), torch.distributed.get_rank()
    for module in state.generator.modules():
        module.deterministic = True
    for _ in range(2):
        pair = {k: v[rank:rank + 1] for k, v in images.items()}
        pix2pix.train_step(state, pair, cfg)
    nets = {"g": state.generator, "d": state.discriminator}
    torch.save({k: v.module.state_dict() for k, v in nets.items() if v}, f"{loss}-{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_average_the_gradients_of_two_images():
    """Two processes, an image each: the step is that of the mean of the two images' gradients."""
    torch.manual_seed(0)
    images = dict(zip(("input", "image"), torch.rand(2, 2, 3, 32, 32) * 2 - 1))
    torch.save(images, "images.pt")
    Path("worker.py").write_text(WORKER)
    result = torchrun("worker.py")
    assert result.returncode == 0, result.stderr[-3000:]
    for loss in ("L1+cGAN", "L1"):
        cfg = Config(size=(32, 32), levels=5, width=4, patch=16, loss=loss, seed=5)
        torch.manual_seed(cfg.seed)
        G, D = pix2pix.networks(cfg)
        for module in G.modules():
            module.deterministic = True
        adam = [torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (G, D) if net]
        for _ in range(2):
            made = [G(x[None]) for x in images["input"]]
            if D:
                adam[1].zero_grad()
                for x, y, y_hat in zip(images["input"], images["image"], made):
                    real, fake = D(x[None], y[None]), D(x[None], y_hat.detach())
                    (F.softplus(-real).mean() / 4 + F.softplus(fake).mean() / 4).backward()
                adam[1].step()
            adam[0].zero_grad()
            total = sum(100 * (y_hat - y).abs().mean() / 2
                        for y_hat, y in zip(made, images["image"]))
            if D:
                total = total + sum(F.softplus(-D(x[None], y_hat)).mean() / 2
                                    for x, y_hat in zip(images["input"], made))
            total.backward()
            adam[0].step()
        both = [torch.load(f"{loss}-{rank}.pt") for rank in (0, 1)]
        for name, net in (("g", G), ("d", D)):
            for key, p in net.named_parameters() if net else ():
                assert torch.equal(both[0][name][key], both[1][name][key]), key
                torch.testing.assert_close(both[0][name][key], p, rtol=0, atol=2e-6)


# --------------------------------------------------------------------------------- The help text

@pytest.mark.parametrize("flag", ["direction", "task", "lr", "patch", "width", "loss"])
def test_help_tells_the_default_of_a_folder(flag, monkeypatch):
    """What the help gives in brackets is what `--data DIR` alone trains with."""
    seen = []
    monkeypatch.setattr(pix2pix, "train", lambda cfg, *a: seen.append(cfg))
    call("--data somewhere")
    action, = (a for a in pix2pix.parser()._actions if a.dest == flag)
    told = re.findall(r"\(([^()]*)\)$", action.help)[-1]
    assert told == str(getattr(seen[0], flag))
