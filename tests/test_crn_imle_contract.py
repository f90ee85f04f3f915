"""What crn_imle.py owes its users: runs, resuming, errors, signals, processes, a readable file."""

import dataclasses
import functools
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    SCRIPTS, Trap, assert_same, assert_same_state, fill_the_disk, label_map, losses_of, refuses,
    stored, torchrun)
from PIL import Image

import crn_imle
from crn_imle import Config, UserError

SCRIPT = SCRIPTS / "crn_imle.py"
# Two steps an epoch: step 3 is in mid-epoch.
TINY = ("--size 32 32 --width 4 --layers conv1_1 --limit 5 --pool 4 --candidates 2 --inner-steps 2 "
        "--batch-size 2 --epochs 2000 --save-every 3 --lr 0.001 --rebalance both --gpu -1")
SHAPE = Config(size=(32, 32), width=4, layers=("conv1_1",), noise_channels=8, noise="broadcast",
               encoder_width=32, classes="streets", vgg="random", pool=4, candidates=2,
               inner_steps=2, limit=5)


def call(line: str) -> None:
    crn_imle.main(line.split())


fails = functools.partial(refuses, call)


def own_data(root: Path, n: int = 3) -> Path:
    """A dataset in pix2pixHD's layout."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for i in range(n):
            label_map(root / f"{split}_label" / f"{i}.png", 40, 48)
            path = root / f"{split}_img" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Six steps on the streets, never interrupted. Tests read it and write elsewhere."""
    out = tmp_path_factory.mktemp("shared") / "whole"
    call(f"{TINY} --steps 6 --out {out}")
    return out


@pytest.fixture(scope="module")
def crn(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shared") / "crn"
    call(f"{TINY} --model crn --outputs 2 --steps 2 --out {out}")
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
    assert all(np.isfinite(float(row[k])) for row in rows for k in ("loss", "pixel", "conv1_1"))
    # Five test streets: layout | six samples | truth.
    with Image.open(run / "samples" / "0000006.png") as grid:
        assert grid.size == (8 * 34 + 2, 5 * 34 + 2)


def test_a_checkpoint_is_plain_and_carries_its_config(run):
    content = stored(run)                                  # weights_only=True: it cannot run code
    assert content["script"] == "crn_imle"
    assert (content["step"], content["epoch"], content["seen"]) == (6, 2, 4)
    assert set(content["config"]) == {f.name for f in dataclasses.fields(Config)}
    assert content["opt_g"]["state"][0]["step"] == 6 and content["vgg"] == {}
    assert content["chosen"].shape == (4, 2)               # seeds, no noise and no images


def test_training_changes_every_weight(run):
    fresh = crn_imle.build(SHAPE, torch.device("cpu")).generator.state_dict()
    assert not [k for k, v in fresh.items() if torch.equal(v, stored(run)["generator"][k])]


def test_runs_are_numbered_and_the_newest_is_taken():
    call(f"{TINY} --steps 1")
    call(f"{TINY} --steps 2")
    assert stored("runs/crn_imle-1")["step"] == 1 and stored("runs/crn_imle-2")["step"] == 2
    call("--resume --steps 3")
    assert stored("runs/crn_imle-2")["step"] == 3
    call("sample --limit 1 --samples 1")
    assert [p.suffix for p in Path("runs/crn_imle-2/test").iterdir()] == [".png"]


@pytest.mark.parametrize("extra", [
    "--model crn --outputs 3 --inner-steps 0", "--model crn --outputs 1 --limit 2",
    "--model crn --outputs 2 --diversity per-image", "--noise spatial --encoder-width 0",
    "--rebalance bins --pixel-weight 0 --calibrate 2", "--lr-drop 1 --renew-encoder",
    "--rebalance none --keep-features 2 --search-batch 1 --layers conv1_2 conv2_1",
    "--rebalance mask --precision bf16 --channels-last --modules 3 --noise-channels 2"])
def test_every_setting_trains_and_samples(extra):
    """Two steps, one more after resuming, an output: nothing that a flag selects is broken."""
    call(f"{TINY} --steps 2 --out r {extra}")
    call("--resume --steps 3 --out r")
    call("sample --out r --limit 2 --samples 1 --output o")
    for path in Path("o").iterdir():
        with Image.open(path) as image:
            assert image.size == (32, 32) and image.mode == "RGB"
    assert len(list(Path("o").iterdir())) == 2


# ------------------------------------------------------------------------------------------ Resume

@pytest.mark.parametrize("workers", [0, 1])
def test_resume_is_bit_exact(run, workers):
    """Stopped at step 3, in mid-epoch, and gone on with: equal weights, moments and losses."""
    call(f"{TINY} --steps 3 --out half")
    assert stored("half")["seen"] == 2
    call(f"--resume --steps 6 --out half --workers {workers}")
    assert_same_state("half", run)
    assert losses_of("half") == losses_of(run)


def test_resume_between_two_passes_searches_again(run):
    call(f"{TINY} --steps 2 --out half")
    call("--resume --steps 6 --out half")
    assert_same_state("half", run)


def test_resume_of_crn_is_bit_exact():
    line = f"{TINY} --model crn --outputs 2 --inner-steps 0"
    call(f"{line} --steps 3 --out half")
    call("--resume --steps 5 --out half")
    call(f"{line} --steps 5 --out whole")
    assert_same_state("half", "whole")


def test_resume_after_a_crash_repeats_the_lost_steps(run):
    """What the log holds beyond the checkpoint is dropped, so that no step stands there twice."""
    call(f"{TINY} --steps 3 --out half")
    with open("half/log.csv", "a") as file:
        file.write("5,2,9,9,9,1,0.5\n")
    call("--resume --steps 6 --out half")
    assert losses_of("half") == losses_of(run)


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
    fails(capsys, f"--resume --out {run} --steps 9 --lr 0.1", "--lr 0.1", "0.001")
    fails(capsys, f"sample --out {run} --model crn", "--model crn", "imle")


def test_a_finished_run_says_so(run, capsys):
    config = (run / "config.json").read_text()
    fails(capsys, f"--resume --out {run} --steps 6", "finished at step 6", "--steps")
    fails(capsys, f"--resume --out {run} --steps 2", "finished at step 6", "--steps")
    assert (run / "config.json").read_text() == config     # a refused call changes nothing


def test_init_starts_anew_from_the_weights(run):
    """Fine-tuning: the generator as in the file, Adam and the counters from nothing."""
    cfg = dataclasses.replace(SHAPE, init=str(run / "checkpoint.pt"))
    state = crn_imle.build(cfg, torch.device("cpu"))
    assert_same(dict(state.generator.state_dict()), dict(stored(run)["generator"]))
    assert (state.step, state.epoch, len(state.opt_g.state)) == (0, 0, 0)
    call(f"{TINY} --steps 1 --out tuned --init {run / 'checkpoint.pt'}")
    call("--resume --steps 2 --out tuned")
    call("sample --limit 1 --out tuned")


def test_imle_starts_from_a_crn_but_not_the_other_way(run, crn, capsys):
    call(f"{TINY} --steps 1 --out warm --init {crn / 'checkpoint.pt'}")
    assert stored("warm")["step"] == 1
    fails(capsys, f"{TINY} --steps 1 --out x --model crn --init {run / 'checkpoint.pt'}",
          "checkpoint.pt", "generator", "expected")


def test_init_that_does_not_fit_is_refused(run, capsys):
    fails(capsys, f"{TINY} --steps 1 --width 8 --out x --init {run / 'checkpoint.pt'}",
          "checkpoint.pt", "generator", "expected")


# ---------------------------------------------------------------------------------------- Test time

def test_sample_needs_no_flags_and_keeps_the_size(run):
    """A label map of any size gives photos of that size; a folder gives a folder."""
    label_map(Path("in/a.png"))
    label_map(Path("in/b.png"), 64, 20)
    call(f"sample --out {run} --input in/a.png --output photo.png --samples 1")
    with Image.open("photo.png") as image:
        assert image.size == (53, 37)
    call(f"sample --checkpoint {run / 'checkpoint.pt'} --input in --output photos --samples 2")
    sizes = {p.name: Image.open(p).size for p in Path("photos").iterdir()}
    assert {k: v for k, v in sizes.items() if "grid" not in k} == {
        "a_1.png": (53, 37), "a_2.png": (53, 37), "b_1.png": (20, 64), "b_2.png": (20, 64)}
    assert "a_grid.png" in sizes and "b_grid.png" in sizes
    call(f"sample --out {run} --input in/a.png --output big.png --size 64 96 --samples 1")
    with Image.open("big.png") as image:
        assert image.size == (96, 64)


def test_samples_differ_by_noise_and_repeat_by_seed(run, capsys):
    label_map(Path("a.png"))
    for folder in ("one", "two"):
        call(f"sample --out {run} --input a.png --output {folder} --samples 2")
    call(f"sample --out {run} --input a.png --output three --seed 7 --samples 1")
    read = {str(p): p.read_bytes() for p in Path(".").glob("*/a*.png") if "grid" not in p.name}
    assert len(read) == 5
    assert read["one/a_1.png"] == read["two/a_1.png"] and read["one/a_2.png"] == read["two/a_2.png"]
    assert len({read["one/a_1.png"], read["one/a_2.png"], read["three/a.png"]}) == 3
    assert "differ by" in capsys.readouterr().out


def test_sample_does_not_depend_on_its_neighbours(run):
    label_map(Path("in/b.png"))
    call(f"sample --out {run} --input in --output alone --samples 1")
    label_map(Path("in/a.png"), 80, 90)
    call(f"sample --out {run} --input in --output both --samples 1")
    assert Path("alone/b.png").read_bytes() == Path("both/b.png").read_bytes()


def test_sampling_never_overwrites_its_input(run, capsys):
    source = label_map(Path("in/a.png"))
    before = source.read_bytes()
    for line in ("--input in --output in", "--input in/a.png --output in/a.png"):
        with pytest.raises(UserError, match="in"):
            call(f"sample --out {run} {line} --samples 1")
    assert source.read_bytes() == before


def test_the_papers_figures_have_a_mode_each(run, capsys):
    """Fig. 4, 5, 7 to 10 on the streets, without any file."""
    checkpoint = f"--checkpoint {run / 'checkpoint.pt'}"
    call(f"interpolate {checkpoint} --output i --frames 3")
    assert {p.name for p in Path("i").iterdir()} == {
        "strip.png", "linear.gif", "variance-preserving.gif"}
    with Image.open("i/strip.png") as strip:
        assert strip.size == (4 * 34 + 2, 2 * 34 + 2)
    assert "mode switches" in capsys.readouterr().out
    call(f"transfer {checkpoint} --output t.png --samples 2")
    with Image.open("t.png") as grid:
        assert grid.size == (5 * 34 + 2, 3 * 34 + 2)
    assert "same time of day" in capsys.readouterr().out
    call(f"edit {checkpoint} --output e.png --set car=road --paint 0,0,9,9=building")
    with Image.open("e.png") as grid:
        assert grid.size == (4 * 34 + 2, 3 * 34 + 2)
    call(f"video {checkpoint} --output v --frames 3")
    assert {p.name for p in Path("v").iterdir()} == {"strip.png", "fixed.gif", "moving.gif"}
    assert "mean change where labels stay" in capsys.readouterr().out


def test_the_papers_figures_on_own_layouts(run, capsys):
    for name in "abc":
        label_map(Path(f"in/{name}.png"), 40, 48)
    checkpoint = f"--checkpoint {run / 'checkpoint.pt'}"
    call(f"video {checkpoint} --input in --output v")
    call(f"transfer {checkpoint} --input in --output t.png")
    call(f"interpolate {checkpoint} --input in/a.png --output i --ends 3 4 --frames 2")
    call(f"edit {checkpoint} --input in/a.png --output e.png --set 3=4")
    label_map(Path("in/d.png"), 50, 50)
    fails(capsys, f"transfer {checkpoint} --input in --output t.png", "one size")
    fails(capsys, f"video {checkpoint} --input in --output v", "one size")


@pytest.mark.parametrize("mode", ["interpolate", "transfer", "video"])
def test_a_crn_has_no_noise(crn, capsys, mode):
    fails(capsys, f"{mode} --out {crn}", mode, "noise")
    fails(capsys, f"sample --out {crn} --samples 3 --limit 1", "--samples 3", "2 output")


# -------------------------------------------------------------------------------------- Evaluation

def test_evaluate_writes_the_measures_beside_the_papers(run, capsys):
    call(f"evaluate --out {run} --eval-samples 12 --limit 2")
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").unlink()
    assert set(metrics["Table 1"]) == {"first nine", "one of each cluster", "true sampler, nine"}
    assert set(metrics["exact"]) == {f"{row}, n={n}" for row in ("this run", "true sampler")
                                     for n in (9, 12)}
    assert metrics["exact"]["true sampler, n=12"]["joint precision"] > .95
    assert set(crn_imle.MEASURES) <= set(metrics["exact"]["this run, n=9"])
    best = metrics["best-of-n l1"]
    assert best["this run, n=12"] <= best["this run, n=9"]
    text = " ".join(capsys.readouterr().out.split())
    assert "8.804 7.725" in text and "3.415 2.87" in text and "0.636" in text


def test_evaluate_takes_a_crn_as_it_is(crn):
    call(f"evaluate --out {crn} --limit 2")
    metrics = json.loads((crn / "metrics.json").read_text())
    assert set(metrics["Table 1"]) == {"first nine", "true sampler, nine"}
    assert set(metrics["exact"]) == {"this run, n=2", "true sampler, n=2"}


def test_evaluate_scores_the_images_of_another_model(capsys):
    """Here the other model is the truth itself, under names as `sample` gives them."""
    for index in range(2):
        street = crn_imle.Street(1_000_000 + index, (64, 64))
        for k, image in enumerate(street.sample(4, 0), 1):
            crn_imle.save_images(image[None], Path(f"theirs/street_100000{index}_{k}.png"))
    call("evaluate --images theirs --limit 2 --out o")
    exact = json.loads(Path("o/metrics.json").read_text())["exact"]
    assert exact["this run, n=4"]["joint precision"] == 1
    fails(capsys, "evaluate --images theirs --limit 3 --out o", "street_1000002")
    fails(capsys, "evaluate --images theirs --limit 2 --out o --size 32 32", "--size")


def test_evaluate_without_a_known_truth():
    """On own data there are no exact measures, and classes without a name."""
    data = own_data(Path("data"))
    call(f"{TINY} --data {data} --classes 12 --vgg random --steps 1 --out r")
    call("evaluate --out r --eval-samples 10")
    metrics = json.loads(Path("r/metrics.json").read_text())
    assert "exact" not in metrics and metrics["layouts"] == 3
    assert set(metrics["Table 1"]) == {"first nine", "one of each cluster"}


# ---------------------------------------------------------------------------- Damage and bad values

def test_check_mode_reports_and_trains_nothing(capsys):
    call("check --size 32 32 --limit 12")
    text = capsys.readouterr().out
    assert "streets" in text and "road" in text and "one of the five largest" in text
    assert "time in S" in text and "of the draws" in text
    assert not list(Path(".").rglob("checkpoint.pt"))
    assert len(list(Path(".").rglob("contact_*.png"))) == 2 and list(Path(".").rglob("hues.png"))


def test_trace_prints_stages_parameters_and_the_cost_of_the_search(capsys):
    call("trace --size 64 128 --width 4 --limit 2 --gpu -1 --preset imle --vgg random")
    text = capsys.readouterr().out
    assert "(1, 4, 4, 8)" in text and "(1, 4, 64, 128)" in text
    with torch.device("meta"):
        net = crn_imle.Generator(12, width=4, modules=5, noise_channels=10)
    assert f"{sum(p.numel() for p in net.parameters()):,}" in text
    assert re.search(r"the search is \d+\.\d %", text)


@pytest.mark.parametrize("mode", ["sample --checkpoint", "train --steps 1 --init"])
def test_foreign_and_damaged_checkpoints(run, capsys, mode):
    whole, content = (run / "checkpoint.pt").read_bytes(), stored(run)
    Path("cut.pt").write_bytes(whole[:len(whole) // 2])
    Path("empty.pt").write_bytes(b"")
    torch.save(content | {"script": "pix2pixhd"}, "other.pt")
    torch.save({"script": "crn_imle", "config": Trap()}, "trap.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"epoch": 3, "state_dict": {}}, "foreign.pt")
    torch.save({0: torch.zeros(1)}, "numbers.pt")
    torch.save({"head.weight": torch.zeros(3, 4, 1, 1)}, "bare.pt")
    for name, *words in (("cut.pt", "damaged"), ("empty.pt", ""), ("other.pt", "pix2pixhd"),
                         ("trap.pt", "damaged"), ("list.pt", "list"), ("foreign.pt", ""),
                         ("numbers.pt", ""), ("bare.pt", "bare weights"),
                         ("missing.pt", "no such file")):
        fails(capsys, f"{mode} {name} {TINY if 'init' in mode else '--gpu -1'}", name, *words)
    assert not Path("sprung").exists()


def test_checkpoint_of_another_version(run, capsys):
    content = stored(run)
    content["config"]["frobnicate"] = 1
    torch.save(content, "newer.pt")
    fails(capsys, "sample --checkpoint newer.pt --gpu -1", "newer.pt", "frobnicate")


@pytest.mark.parametrize("flags, words", [
    ("--size 30 40", ["30 40"]), ("--size 0 64", ["0 64"]), ("--size 33 64", ["33 64", "32 64"]),
    ("--batch-size 0", ["--batch-size 0"]), ("--lr -1", ["-1"]), ("--lr nan", ["nan"]),
    ("--classes x", ["x", "cityscapes"]), ("--limit -1", ["--limit -1"]),
    ("--width 0", ["--width 0"]), ("--steps -3", ["--steps -3"]), ("--epochs 0", ["--epochs 0"]),
    ("--model gan", ["gan"]), ("--outputs 0 --model crn", ["--outputs 0"]), ("--pool 0", ["0"]),
    ("--candidates 0", ["--candidates 0"]), ("--inner-steps 0", ["--inner-steps 0"]),
    ("--noise-channels 0", ["--noise-channels 0"]), ("--modules 10", ["10", "9"]),
    ("--modules 7", ["32 32"]), ("--layers conv9_9", ["conv9_9"]), ("--calibrate 0", ["0"]),
    ("--pixel-weight -1", ["-1"]), ("--renew-encoder --lr-drop 0", ["--lr-drop"]),
    ("--noise pink", ["pink"]),
    ("--batch-size 6 --model crn", ["--batch-size 6", "5"]), ("--data nowhere", ["nowhere"]),
    ("--gpu -2", ["-2"]), ("--seed 99999999999999999999999", ["--seed"]),
    ("--workers -1", ["--workers -1"]), ("--vgg nofile.pth", ["nofile.pth"])])
def test_absurd_values_are_refused_in_one_line(capsys, flags, words):
    given = [t for t in flags.split() if t.startswith("--")]
    base = [t for t in re.split(r" (?=--)", TINY) if t.split()[0] not in given]
    fails(capsys, " ".join(base) + f" --steps 2 --out r {flags}", *words)
    assert not Path("r/checkpoint.pt").exists()


def test_a_refused_call_leaves_no_folder(capsys):
    """Else the next free number, or the same --out, is taken by a run that never was."""
    fails(capsys, f"{TINY} --batch-size 6 --steps 1 --model crn", "6")
    fails(capsys, f"{TINY} --init nofile.pt --steps 1", "nofile.pt")
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


@pytest.mark.parametrize("line, words", [
    ("sample --input nowhere.png", ["nowhere.png"]), ("sample --samples 0", ["--samples 0"]),
    ("sample --limit 1 --output o/x.xyz --samples 1 --input a.png", ["x.xyz"]),
    ("edit --set car", ["--set car", "CLASS=CLASS"]), ("edit --set car=cat", ["cat"]),
    ("edit --paint 0,0,40,4=car", ["0,0,40,4", "32 x 32"]), ("edit --item x", ["--item x"]),
    ("edit --paint 0,0,4=car", ["TOP,LEFT"]), ("interpolate --frames 1", ["--frames 1"]),
    ("transfer --samples 0", ["--samples 0"]),
    ("evaluate --images x", ["--images", "--checkpoint"])])
def test_mistakes_at_test_time(run, capsys, line, words):
    label_map(Path("a.png"))
    fails(capsys, f"{line} --checkpoint {run / 'checkpoint.pt'}", *words)


def test_flags_that_the_mode_ignores_are_refused(run, capsys):
    """A flag that nothing reads is a lie to the user."""
    fails(capsys, f"{TINY} --steps 1 --out r --input a.png", "--input")
    fails(capsys, f"{TINY} --steps 1 --out r --samples 3", "--samples")
    fails(capsys, f"{TINY} --steps 1 --out r --set car=road", "--set")
    fails(capsys, f"sample --out {run} --frames 3", "--frames")
    fails(capsys, f"--resume --out {run} --steps 9 --preset imle", "--preset")


def test_photos_alone_and_pairs_are_refused(capsys):
    for i in range(3):
        path = Path(f"data/train/{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 32)).save(path)
    fails(capsys, f"{TINY} --data data --steps 1 --vgg random", "label")


def test_a_damaged_image_is_one_line_even_from_a_worker(capsys):
    """The workers' own traceback must not reach the user."""
    data = own_data(Path("data"))
    path = Path("data/train_img/1.png")
    path.write_bytes(path.read_bytes()[:-400])
    for workers in (0, 1):
        for model in ("imle", "crn"):
            text = fails(capsys, f"{TINY} --data {data} --classes 12 --vgg random --steps 3 "
                                 f"--batch-size 1 --out {model}{workers} --workers {workers} "
                                 f"--model {model}",
                         "data/train_img/1.png")
            assert "Traceback" not in text


# ------------------------------------------------------------------------ NaN, full disks, signals

def test_nan_stops_with_its_name_and_keeps_the_checkpoint(capsys, monkeypatch):
    """Weights that become infinite after step 3: the loss and its step are named."""
    call(f"{TINY} --steps 3 --out r")
    before, step = Path("r/checkpoint.pt").read_bytes(), crn_imle.train_step

    def broken(state, batch, cfg):
        if state.step == 4:                                # the fifth step
            with torch.no_grad():
                state.generator.head.weight.fill_(torch.inf)
        return step(state, batch, cfg)

    with monkeypatch.context() as patch:
        patch.setattr(crn_imle, "train_step", broken)
        text = fails(capsys, "--resume --steps 9 --out r", "step 5", "nan", "--lr")
    assert re.search(r"\b(loss|pixel)\b", text)
    assert Path("r/checkpoint.pt").read_bytes() == before
    call("--resume --steps 4 --out r")


def test_nan_weights_are_never_saved(capsys, monkeypatch):
    """An update can ruin the weights while its own loss was still finite: at step 6, a save."""
    call(f"{TINY} --steps 3 --out r")
    step = crn_imle.train_step

    def broken(state, batch, cfg):
        losses = step(state, batch, cfg)
        if state.step == 5:                                # the sixth step; its losses are fine
            with torch.no_grad():
                state.generator.head.weight.fill_(torch.nan)
        return losses

    monkeypatch.setattr(crn_imle, "train_step", broken)
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


def test_signals_belong_to_the_caller_again_after_training():
    """A notebook that has called train() must still be interruptible."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    call(f"{TINY} --steps 1 --out r")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_before_the_first_step_still_saves(monkeypatch):
    """Ctrl-C while the first batch is being loaded: what is said to be saved must be saved."""
    batches = crn_imle.epoch_batches

    def slow(*arguments):
        signal.raise_signal(signal.SIGINT)
        return batches(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(crn_imle, "epoch_batches", slow)
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
    assert [p.name for p in Path("runs").iterdir()] == ["crn_imle-1"]
    content = stored("runs/crn_imle-1")
    assert (content["step"], content["epoch"], content["seen"]) == (3, 1, 2)
    assert not any(k.startswith("module.") for k in content["generator"])
    call("--resume --steps 5")
    content = stored("runs/crn_imle-1")
    assert (content["step"], content["epoch"]) == (5, 2)


WORKER = """
import sys, dataclasses, torch, crn_imle
from test_crn_imle_contract import SHAPE
cfg = dataclasses.replace(SHAPE, gpu=-1, seed=5, batch_size=1, lr=1e-3, rebalance="both")
device = crn_imle.pick_device(cfg)
state, rank = crn_imle.build(cfg, device), torch.distributed.get_rank()
train_set = crn_imle.dataset(cfg, "train")
colours, state.areas = crn_imle.survey(train_set, cfg, device)
state.rarity = crn_imle.rarity_scores(colours)
state.chosen, losses = crn_imle.search(state, train_set, cfg, {})
loader = crn_imle.open_loader(train_set, cfg, device)
for batch in crn_imle.epoch_batches(loader, cfg, state):
    crn_imle.train_step(state, crn_imle.to_pair(batch, cfg, state, {}), cfg)
torch.save({"generator": state.generator.module.state_dict(), "chosen": state.chosen,
            "losses": losses}, f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_share_the_search_and_average_the_gradients():
    """Two processes, a photo each: the same S and z*, and the steps of batches of two."""
    Path("worker.py").write_text(WORKER)
    result = torchrun("worker.py")
    assert result.returncode == 0, result.stderr[-3000:]
    cfg = dataclasses.replace(SHAPE, gpu=-1, seed=5, batch_size=2, lr=1e-3, rebalance="both")
    state = crn_imle.build(cfg, torch.device("cpu"))
    train_set = crn_imle.dataset(cfg, "train")
    colours, state.areas = crn_imle.survey(train_set, cfg, torch.device("cpu"))
    state.rarity = crn_imle.rarity_scores(colours)
    state.chosen, losses = crn_imle.search(state, train_set, cfg, {})
    loader = crn_imle.open_loader(train_set, cfg, torch.device("cpu"))
    for batch in crn_imle.epoch_batches(loader, cfg, state):
        crn_imle.train_step(state, crn_imle.to_pair(batch, cfg, state, {}), cfg)
    both = [torch.load(f"{rank}.pt") for rank in (0, 1)]
    for one in both:
        assert torch.equal(one["chosen"], state.chosen)
        torch.testing.assert_close(one["losses"], losses)
        for key, p in state.generator.named_parameters():
            torch.testing.assert_close(one["generator"][key], p, rtol=0, atol=2e-5)
    assert_same(both[0]["generator"], both[1]["generator"])


# --------------------------------------------------------------------------------- The help text

@pytest.mark.parametrize("flag", ["lr", "width", "pool", "candidates",
                                  "inner_steps", "epochs", "outputs", "noise", "rebalance"])
def test_help_tells_the_default_of_a_folder(flag, monkeypatch):
    """What the help gives in brackets is what `--data DIR` alone trains with."""
    seen = []
    monkeypatch.setattr(crn_imle, "train", lambda cfg, *a: seen.append(cfg))
    call("--data somewhere")
    action, = (a for a in crn_imle.parser()._actions if a.dest == flag)
    told = re.findall(r"\(([^()]*)\)$", action.help)[-1]
    assert told == str(getattr(seen[0], flag))
