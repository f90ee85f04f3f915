"""What pix2pixhd.py owes its users: stages, resuming, styles, editing, errors and signals."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    SCRIPTS, Trap, assert_same, assert_same_state, fill_the_disk, losses_of, refused, refuses,
    stored, torchrun)
from PIL import Image

import pix2pixhd
from pix2pixhd import Config

SCRIPT = SCRIPTS / "pix2pixhd.py"
# Two steps an epoch (five images, batches of two): the global stage is steps 1 to 4, the enhancer's
# 5 and 6, the joint one 7 to 10. Step 3 is in mid-epoch.
NETS = ("--width 4 --downs 2 --blocks 1 --enhancer-blocks 1 --scales 2 --d-width 4 --features 2 "
        "--e-width 2")
DATES = "--batch-size 2 --epochs 2 --fine-epochs 3 --enhancer-epochs 1 --save-every 3"
TINY = f"--size 64 64 {NETS} {DATES} --limit 5 --loss GAN+FM --vgg random --lr 0.0002 --gpu -1"
ONE = f"{TINY} --size 32 32 --enhancers 0"               # a single stage, and a quicker one
STEPS = 10
SCORER = "--vgg random --scorer-width 2 --scorer-steps 2"
pytestmark = pytest.mark.usefixtures("draw_each_street_once")


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """losses.png is drawn in the fixture `run` alone: it takes longer than these networks."""
    monkeypatch.setattr(pix2pixhd.Log, "plot", lambda self: None)


def call(line: str) -> None:
    pix2pixhd.main(line.split())


fails = functools.partial(refuses, call)


def weights(run: Path | str) -> dict:
    return {k: stored(run)[k] for k in pix2pixhd.NETWORKS}


def without_adam(run: Path, out: Path) -> Path:
    """A copy that is quicker to read; testing needs no moments."""
    out.mkdir(exist_ok=True)
    content = {k: v for k, v in stored(run).items() if not k.startswith("opt")}
    torch.save(content, out / "checkpoint.pt")
    return out


def same(a, b) -> bool:
    try:
        assert_same(a, b)
    except AssertionError:
        return False
    return True


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def picture(path: Path, h: int = 40, w: int = 50, seed: int = 0) -> Path:
    return save(path, np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8))


def label_map(path: Path, h: int = 33, w: int = 47) -> Path:
    """Blocks of the streets' twelve classes."""
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    return save(path, ids[np.arange(h)[:, None] * 3 // h, np.arange(w) * 4 // w])


def instance_map(path: Path, h: int = 33, w: int = 47) -> Path:
    ids = np.arange(10_000, 10_012, dtype=np.uint16).reshape(3, 4)
    return save(path, ids[np.arange(h)[:, None] * 3 // h, np.arange(w) * 4 // w])


PLAIN = ("{}.png",) * 3
CITY = ("{}_gtFine_labelIds.png", "{}_gtFine_instanceIds.png", "{}_leftImg8bit.png")


def scenes(root: Path, names=PLAIN, instances=("train", "test"), photos=("train", "test"),
           touching: bool = True) -> Path:
    """Three scenes in pix2pixHD's layout: road 7, sky 23, two cars 26 that touch, a bicycle 33."""
    for split in ("train", "test"):
        for i in range(3):
            label = np.full((64, 64), 7, np.uint8)
            label[:20], label[40:, 8:16 + i], label[24:32, 40:60] = 23, 26, 33
            ids = label.astype(np.uint16)
            ids[40:, 8:16 + i], ids[24:32, 40:60] = 26000, 33001
            second = slice(16 + i, 30) if touching else slice(40, 54)
            label[40:, second], ids[40:, second] = 26, 26001
            save(root / f"{split}_label" / names[0].format(i), label)
            if split in instances:
                save(root / f"{split}_inst" / names[1].format(i), ids)
            if split in photos:
                picture(root / f"{split}_img" / names[2].format(i), 64, 64, i)
    return root


def edges(root: Path) -> Path:
    for split in ("train", "test"):
        for i in range(3):
            picture(root / f"{split}_A" / f"{i}.png", 64, 64, i)
            picture(root / f"{split}_B" / f"{i}.png", 64, 64, 9 + i)
    return root


def size_of(path: Path | str) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def run(shared) -> Path:
    """All three stages on the streets, never interrupted. Tests read it and write elsewhere."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        call(f"{TINY} --out {shared / 'whole'}")
    (shared / "said.txt").write_text(text.getvalue())
    return shared / "whole"


@pytest.fixture(scope="module")
def light(run, shared) -> Path:
    return without_adam(run, shared / "light")


@pytest.fixture(scope="module")
def legs(shared) -> dict[int, Path]:
    """The same run, stopped at steps 3, 4, 6 and 9 and gone on with: a copy of each stop."""
    out, copies = shared / "legs", {}
    for step in (3, 4, 6, 9):
        call(f"{TINY} --out {out} --steps 3" if step == 3 else f"--resume --out {out} "
             f"--steps {step}")
        copies[step] = shared / f"at-{step}"
        shutil.copytree(out, copies[step])
    return copies


@pytest.fixture(scope="module")
def mute(shared) -> Path:
    """A run without an encoder."""
    call(f"{ONE} --features 0 --steps 1 --out {shared / 'mute'}")
    return without_adam(shared / "mute", shared / "mute")


@pytest.fixture(scope="module")
def city(shared) -> Path:
    """Two steps on files in the released Cityscapes layout, with styles."""
    data = scenes(shared / "city-data", CITY)
    call(f"{TINY} --enhancers 0 --steps 2 --data {data} --out {shared / 'city'}")
    return without_adam(shared / "city", shared / "city")


@pytest.fixture
def inputs(monkeypatch) -> list[torch.Tensor]:
    """What G is given at test time: s, then the styles z in the last channels."""
    seen, translate = [], pix2pixhd.translate

    def spy(generator, s):
        seen.append(s.clone())
        return translate(generator, s)

    monkeypatch.setattr(pix2pixhd, "translate", spy)
    return seen


def interrupt_at(when: int, patch) -> None:
    """Ctrl-C during the update after step `when`."""
    step = pix2pixhd.train_step

    def interrupted(state, batch, cfg):
        if state.step == when:
            signal.raise_signal(signal.SIGINT)
        return step(state, batch, cfg)

    patch.setattr(pix2pixhd, "train_step", interrupted)


# ----------------------------------------------------------------------------- A run and its folder

def test_a_run_leaves_what_the_readme_promises(run):
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert names == {"config.json", "log.csv", "losses.png", "checkpoint.pt"} | {
        f"samples/{step:07d}.png" for step in (3, 6, 9, 10)}
    config = json.loads((run / "config.json").read_text())
    assert (config["size"], config["width"], config["classes"]) == ([64, 64], 4, "streets")
    rows = losses_of(run)
    assert [row["step"] for row in rows] == ["3", "6", "9", "10"]
    assert rows[0].keys() == {"step", "epoch", "g_gan", "g_fm", "d_real", "d_fake"}
    assert all(np.isfinite(float(v)) for row in rows for v in row.values())
    # Five test streets as input | output | truth, two of them side by side; half as large at first.
    assert size_of(run / "samples" / "0000003.png") == (6 * 34 + 2, 3 * 34 + 2)
    assert size_of(run / "samples" / "0000010.png") == (6 * 66 + 2, 3 * 66 + 2)
    assert size_of(run / "losses.png")[0] > 300


def test_one_command_prints_and_trains_the_schedule(run):
    text = (run.parent / "said.txt").read_text()
    for part in ("stage 1 of 3, global: 2 epochs at 32x32 with 1 D scale",
                 "stage 2 of 3, enhancer: 1 epochs at 64x64 with 2 D scale",
                 "stage 3 of 3, joint: 2 epochs at 64x64 with 2 D scale", "10 steps of 2 image"):
        assert part in text, text


def test_a_checkpoint_is_plain_and_carries_its_config(run):
    content = stored(run)                                  # weights_only=True: it cannot run code
    assert content["script"] == "pix2pixhd"
    assert [content[k] for k in ("stage", "step", "epoch", "seen")] == [2, STEPS, 4, 4]
    assert set(content["config"]) == {f.name for f in dataclasses.fields(Config)}
    assert content["opt_g"]["state"][0]["step"] == 4       # Adam starts afresh with each stage
    assert {k.split(".")[0] for k in content["generator"]} == {"globe", "enhancers", "output"}


def test_styles_and_means_are_in_the_checkpoint_after_training(run):
    content = stored(run)
    assert set(content["means"]) == set(range(12)) >= set(content["styles"])
    assert len(content["styles"][10]) > 1                  # cars: more than one style
    for values in content["styles"].values():
        assert values.shape[1] == 2 and len(values) <= 10 and values.abs().max() <= 1
    assert not torch.equal(content["means"][10], content["means"][3])


def test_each_stage_trains_what_it_says(legs, run):
    """The enhancer's stage leaves G1 and E as they are; the joint stage moves everything."""
    first, second, last = stored(legs[4]), stored(legs[6]), stored(run)
    fresh = pix2pixhd.build(Config(**first["config"]), torch.device("cpu"))
    globe = {k: v for k, v in first["generator"].items() if k.startswith("globe")}
    for name, weights in (("generator", globe), ("encoder", first["encoder"])):
        own = getattr(fresh, name).state_dict()
        for key, value in weights.items():
            assert torch.equal(second[name][key], value), key
            assert not torch.equal(last[name][key], value), key
            if key.endswith("weight"):
                assert not torch.equal(own[key], value), key
    new = [k for k in second["generator"] if k.startswith(("enhancers", "output"))]
    own = fresh.generator.state_dict()                     # what an enhancer starts from
    assert new and not [k for k in new if k.endswith("weight")
                        and torch.equal(second["generator"][k], own[k])]


def test_runs_are_numbered_and_the_newest_is_taken():
    call(f"{ONE} --steps 1 --features 0")
    call(f"{ONE} --steps 2 --features 0")
    assert stored("runs/pix2pixhd-1")["step"] == 1 and stored("runs/pix2pixhd-2")["step"] == 2
    call("--resume --steps 3")
    assert stored("runs/pix2pixhd-2")["step"] == 3
    call("sample --limit 1")
    assert [p.suffix for p in Path("runs/pix2pixhd-2/test").iterdir()] == [".png"]


def test_the_perceptual_loss_leaves_no_vgg_in_the_checkpoint():
    call(f"{ONE} --steps 2 --loss GAN+FM+VGG --out r")
    call(f"{ONE} --steps 2 --loss GAN+FM+VGG --vgg-normalise --out n")
    assert not stored("r")["vgg"] and Path("r/checkpoint.pt").stat().st_size < 2e6
    row, other = losses_of("r")[-1], losses_of("n")[-1]
    assert 0 < float(row["g_vgg"]) != float(other["g_vgg"]) > 0
    call("sample --out r --limit 1 --output o")            # testing builds no VGG


# ---------------------------------------------------------------------------------------- Settings

@pytest.fixture(scope="module")
def base(shared, run) -> dict[str, Path]:
    """Two steps with nothing changed: of G1, and of G1 inside G2."""
    call(f"{ONE} --steps 2 --out {shared / 'one'}")
    call(f"{TINY} --stage joint --init {run / 'checkpoint.pt'} --steps 2 --out {shared / 'two'}")
    return {"one": shared / "one", "two": shared / "two"}


@pytest.mark.parametrize("extra", [
    "--loss GAN", "--gan log", "--fm-mean", "--no-smooth", "--lambda-fm 1", "--pool label",
    "--no-mirror", "--no-boundary", "--features 0", "--features 3", "--scales 1", "--betas 0 0.9",
    "--generator unet", "--generator crn", "--precision bf16 --channels-last",
    "two --crop 32 32", "two --stored-features"])
def test_every_setting_trains_and_samples_and_changes_the_result(base, run, extra):
    """Two steps and an output, and resuming with other networks: all that a flag selects works."""
    two = extra.startswith("two ")
    line = f"{TINY} --stage joint --init {run / 'checkpoint.pt'}" if two else ONE
    call(f"{line} --steps 2 --out r {extra.removeprefix('two ')}")
    assert not same(weights("r"), weights(base["two" if two else "one"]))
    if two or "generator" in extra:
        call("--resume --steps 3 --out r")
        assert stored("r")["step"] == 3
    call("sample --out r --limit 1 --output o")
    assert [size_of(p) for p in Path("o").iterdir()] == [(64, 64) if two else (32, 32)]


def test_stored_features_leave_the_encoder_as_it_is(run):
    """Released code: at full size E's maps are read from files, so E cannot learn any more."""
    line = f"{TINY} --stage joint --init {run / 'checkpoint.pt'} --steps 1"
    for name, flags in (("rests", "--stored-features"), ("moves", "")):
        call(f"{line} --out {name} {flags}")
        assert same(stored(name)["encoder"], stored(run)["encoder"]) == (name == "rests")


def test_bf16_and_eager_nearly_agree(base):
    call(f"{ONE} --steps 2 --out r --precision bf16")
    for key, value in losses_of("r")[-1].items():
        assert float(value) == pytest.approx(float(losses_of(base["one"])[-1][key]), rel=0.1)


def test_compile_agrees_with_eager():
    """--compile changes the speed, neither the numbers nor the names in the checkpoint."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    torch.manual_seed(0)
    net = torch.nn.Sequential(*pix2pixhd.convolution(2, 2))          # each layer takes seconds
    x = torch.rand(1, 2, 8, 8)
    names, expected = list(net.state_dict()), net(x)
    compiled = pix2pixhd.dress(net, Config(compile=True), torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected.detach(), rtol=1e-4, atol=1e-5)
    assert compiled._compiled_call_impl is not None and list(compiled.state_dict()) == names


def test_training_compiles(monkeypatch):
    """The networks as torch.compile takes them apart; turning that into C++ is its own affair."""
    line, original = f"{ONE} --features 0 --scales 1 --steps 2", torch.nn.Module.compile
    call(f"{line} --out plain")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: original(net, backend="eager"))
    call(f"{line} --out r --compile")
    assert losses_of("r") == losses_of("plain")
    for name in pix2pixhd.NETWORKS[:2]:
        assert stored("r")[name].keys() == stored("plain")[name].keys()
    call("sample --out r --limit 1 --output o")


@pytest.mark.parametrize("generator", ["unet", "crn"])
def test_other_generators_have_no_enhancers(generator, capsys):
    fails(capsys, f"{TINY} --generator {generator} --enhancers 1", f"--generator {generator}",
          "--enhancers 0")


def test_any_size_that_g_can_halve_trains():
    """E halves more often than a G with --downs 2: 40 pixels must not be a traceback."""
    call(f"{ONE} --size 40 40 --steps 1 --out r")
    assert stored("r")["step"] == 1


# ------------------------------------------------------------------------------------------ Resume

def test_resume_is_bit_exact_in_every_stage(legs, run):
    """Stopped inside the global and the joint stage and at both borders; a log without seams."""
    assert [stored(p)["stage"] for p in legs.values()] == [0, 0, 1, 2]
    assert [stored(p)["seen"] for p in legs.values()] == [2, 4, 4, 2]
    shutil.copytree(legs[9], "r")
    call(f"--resume --out r --steps {STEPS}")
    assert_same_state("r", run)
    for step in (3, 6):                                    # in mid-epoch, and before a new stage
        assert losses_of(legs[step])[:1] == losses_of(run)[:1]


@pytest.mark.parametrize("stops, workers", [((2, 5, 8), 0), ((3, 5, 6), 1)])
def test_resume_with_workers_and_inside_the_enhancer_stage(run, stops, workers):
    call(f"{TINY} --out r --steps {stops[0]} --workers {workers}")
    for step in (*stops[1:], 0):
        assert stored("r")["step"] == stops[0] or step != stops[1]
        call(f"--resume --out r --steps {step} --workers {workers}")
    assert_same_state("r", run)


def test_resume_after_a_kill_repeats_the_lost_steps(run, monkeypatch):
    """Killed in the enhancer's stage, with the last checkpoint in the global one."""
    step = pix2pixhd.train_step

    def killed(state, batch, cfg):
        if state.step == 5:
            raise MemoryError("as good as kill -9")
        return step(state, batch, cfg)

    with monkeypatch.context() as patch:
        patch.setattr(pix2pixhd, "train_step", killed)
        with pytest.raises(MemoryError):
            call(f"{TINY} --out r")
    assert stored("r")["step"] == 3
    with open("r/log.csv", "a") as file:
        file.write("5,2,9,9,9,9,1,0.5\n4,2,0.3")           # a row too far, and half a row
    call("--resume --out r")
    assert_same_state("r", run)
    assert losses_of("r") == losses_of(run)


@pytest.mark.parametrize("when", [2, 5, 8])
def test_interrupted_in_any_stage_equals_uninterrupted(run, monkeypatch, capsys, when):
    with monkeypatch.context() as patch:
        interrupt_at(when, patch)
        with pytest.raises(SystemExit) as caught:
            call(f"{TINY} --out r")
    assert caught.value.code == 130
    assert f"stopped at step {when + 1}" in capsys.readouterr().out
    assert (stored("r")["step"], stored("r")["styles"]) == (when + 1, {})
    call("--resume --out r")
    assert_same_state("r", run)


def test_same_seed_same_run_other_seed_other_run(base):
    call(f"{ONE} --steps 2 --out a")
    call(f"{ONE} --steps 2 --out b --seed 1")
    assert losses_of("a") == losses_of(base["one"]) != losses_of("b")


def test_more_epochs_than_planned(legs, run, capsys):
    """A stage whose end is still ahead may grow. One that has begun cannot be pushed away."""
    for place, flags in ((legs[6], "--epochs 5"), (run, "--epochs 3"), (legs[6], "--epochs 1"),
                         (legs[9], "--epochs 1")):
        shutil.copytree(place, "copy")
        before = Path("copy/config.json").read_text()
        fails(capsys, f"--resume --out copy {flags} --steps 99", flags)
        assert Path("copy/config.json").read_text() == before
        shutil.rmtree("copy")
    shutil.copytree(legs[3], "r")
    call("--resume --out r --epochs 3 --steps 6")          # still in the global stage
    assert (stored("r")["stage"], stored("r")["epoch"]) == (0, 2)
    shutil.copytree(run, "s")
    call("--resume --out s --fine-epochs 4")
    assert (stored("s")["stage"], stored("s")["step"]) == (2, STEPS + 2)


def test_an_out_that_holds_a_run_is_refused(run, capsys):
    before = (run / "checkpoint.pt").read_bytes()
    fails(capsys, f"{TINY} --steps 6 --out {run}", str(run), "--resume")
    assert (run / "checkpoint.pt").read_bytes() == before


def test_contradicting_flags_quote_both_values(light, capsys):
    fails(capsys, f"--resume --out {light} --steps 19 --width 8", "--width 8", "4")
    fails(capsys, f"--resume --out {light} --steps 19 --lr 0.1", "--lr 0.1", "0.0002")
    fails(capsys, f"sample --out {light} --loss GAN", "--loss GAN", "GAN+FM")
    fails(capsys, f"evaluate --out {light} --enhancers 0", "--enhancers 0", "1")
    fails(capsys, f"edit --out {light} --no-boundary", "boundary", "True")


def test_a_finished_run_says_so(run, capsys):
    config = (run / "config.json").read_text()
    for flags in ("", f"--steps {STEPS}", "--steps 2"):
        fails(capsys, f"--resume --out {run} {flags}", f"finished at step {STEPS}", "--steps")
    assert (run / "config.json").read_text() == config     # a refused call changes nothing


# ---------------------------------------------------------------------------------- Stages and init

def test_stages_one_by_one_make_what_the_whole_run_makes(run, legs):
    """--stage global, enhancer, joint, each from the checkpoint of the one before."""
    call(f"{TINY} --stage global --out g")
    assert (stored("g")["step"], stored("g")["stage"]) == (4, 0)
    assert_same(stored("g")["generator"], stored(legs[4])["generator"])
    call("sample --out g --limit 1 --output o")            # half-sized images
    assert [size_of(p) for p in Path("o").iterdir()] == [(32, 32)]
    call(f"{TINY} --stage enhancer --init g/checkpoint.pt --out e")
    assert stored("e")["step"] == 2
    frozen = {k: v for k, v in stored("g")["generator"].items() if k.startswith("globe")}
    assert_same({k: stored("e")["generator"][k] for k in frozen}, frozen)
    assert_same(stored("e")["encoder"], stored("g")["encoder"])
    call(f"{TINY} --stage joint --init e/checkpoint.pt --out j")
    assert stored("j")["step"] == 4
    assert not same({k: stored("j")["generator"][k] for k in frozen}, frozen)
    for name in pix2pixhd.NETWORKS:
        assert {k: v.shape for k, v in stored("j")[name].items()} == {
            k: v.shape for k, v in stored(run)[name].items()}
    call("sample --out j --limit 1 --output p")


def test_init_starts_anew_from_the_weights(run):
    """Fine-tuning: all networks as in the file, Adam and the counters from nothing."""
    cfg = Config(**stored(run)["config"])
    state = pix2pixhd.build(dataclasses.replace(cfg, init=(str(run / "checkpoint.pt"),)),
                            torch.device("cpu"))
    for name in pix2pixhd.NETWORKS:
        assert_same(dict(getattr(state, name).state_dict()), dict(stored(run)[name]))
    assert (state.step, state.epoch, len(state.opt_g.state)) == (0, 0, 0)
    call(f"{TINY} --stage joint --steps 1 --out tuned --init {run / 'checkpoint.pt'}")
    assert stored("tuned")["step"] == 1
    call("--resume --steps 2 --out tuned")


@pytest.mark.parametrize("flags, words", [
    ("--stage joint --width 8", ["generator", "enhancers.0", "expected"]),
    ("--stage joint --no-boundary", ["generator", "front.0.weight", "expected"]),
    ("--stage joint --features 3", ["expected", ".weight"]),
    ("--stage enhancer --enhancers 2 --size 128 128 --blocks 2", ["globe.residual.1", "absent"]),
    ("", ["enhancers.0", "absent"]), ("--enhancers 0", ["enhancers.0", "absent"])])
def test_init_that_does_not_fit_names_the_weight(run, capsys, flags, words):
    fails(capsys, f"{TINY} --steps 1 --out x --init {run / 'checkpoint.pt'} {flags}",
          "checkpoint.pt", *words)
    assert not Path("x").exists()


@pytest.mark.parametrize("stage", ["enhancer", "joint"])
def test_a_stage_of_enhancers_needs_enhancers(stage, capsys):
    fails(capsys, f"{TINY} --stage {stage} --enhancers 0", f"--stage {stage}", "--enhancers 0")


# ------------------------------------------------------------------------------- Data of many kinds

def test_without_instance_maps_the_labels_do(capsys):
    """Told once, remembered by the checkpoint, and nobody is asked for instances again."""
    data = scenes(Path("data"), instances=())
    call(f"{TINY} --enhancers 0 --data {data} --steps 2 --out r")
    text = capsys.readouterr().out
    assert "no instance maps: trained without the boundary" in text
    assert "averaged over labels" in text
    config = stored("r")["config"]
    assert (config["boundary"], config["pool"]) == (False, "label")
    assert set(stored("r")["styles"]) == {7, 23, 26, 33}
    call("sample --out r --input data/test_label/1.png --output o.png")
    assert size_of("o.png") == (64, 64)
    call("edit --out r --style 26=1 --output e.png")       # both cars are one region
    assert re.search(r"^ +26 +class 26 ", capsys.readouterr().out, re.MULTILINE)


def test_labels_only_by_choice_needs_no_instances(shared, city, capsys):
    """Fig. 4's other side: what no network reads, nobody has to bring."""
    data = shared / "city-data"
    call(f"{TINY} --preset labels-only --enhancers 0 --features 0 --data {data} --steps 1 --out r")
    call(f"sample --out r --input {data / 'test_label' / CITY[0].format(0)} --output o.png")
    assert size_of("o.png") == (64, 64)


def test_instances_missing_from_one_split_are_named(capsys):
    """A boundary channel that the test split cannot fill: said before training, not after."""
    data = scenes(Path("data"), instances=("train",))
    fails(capsys, f"{TINY} --enhancers 0 --data {data} --steps 1 --out r", "data", "test",
          "instance")
    assert not Path("r").exists()


def test_edges_to_photos(capsys):
    data = edges(Path("data"))
    line = f"{TINY} --preset edges2photo --features 0 --data {data}"
    call(f"{line} --steps 7 --out r")                      # through all three stages
    assert stored("r")["config"]["task"] == "pairs" and stored("r")["stage"] == 2
    call(f"sample --out r --output o --input {picture(Path('e.jpg'), 33, 47)}")
    assert size_of("o/e.png") == (47, 33)
    call("sample --out r --limit 2")
    assert sorted(p.name for p in Path("r/test").iterdir()) == ["0.png", "1.png"]
    fails(capsys, line.replace("--features 0", "--features 2") + " --out x", "--features 2",
          "--features 0")
    fails(capsys, "evaluate --out r", "sample")
    fails(capsys, "edit --out r", "label")
    fails(capsys, "encode --out r", "encoder")
    call(f"{TINY} --features 0 --data {data} --steps 1 --out s --direction BtoA")   # task by layout
    assert losses_of("s") != losses_of("r")


def test_ids_of_16_bits_survive(city, shared, capsys):
    """33001 does not fit in a signed number of 16 bits."""
    call(f"edit --out {city} --style 33001=0 --output e.png")
    text = capsys.readouterr().out
    assert re.search(r"^ +33001 +bicycle ", text, re.MULTILINE), text
    label, instance = (shared / "city-data" / folder / name.format(0)
                       for folder, name in zip(("test_label", "test_inst"), CITY))
    call(f"edit --out {city} --input {label} --instances {instance} --output f.png")
    assert re.search(r"^ +33001 +bicycle ", capsys.readouterr().out, re.MULTILINE)


def test_a_test_split_without_photos(capsys):
    """Cityscapes as the authors ship it: labels and instances to test with, and no truth."""
    data = scenes(Path("data"), CITY, photos=("train",))
    call(f"{TINY} --enhancers 0 --data {data} --steps 2 --out r")
    assert size_of("r/samples/0000002.png") == (4 * 66 + 2, 2 * 66 + 2)      # input | output
    call("sample --out r --samples 2")
    assert len(list(Path("r/test").iterdir())) == 6
    fails(capsys, f"evaluate --out r {SCORER}", "truth", "sample")
    assert not list(Path(".").glob("fcn8s*"))              # said before a scorer is trained
    call("edit --out r --style 26000=1 --output e.png")


def test_styles_are_of_the_newest_encoder(monkeypatch):
    """Grids without photos need styles; the next checkpoint must not pass them off as its own."""
    data = scenes(Path("data"), CITY, photos=("train",))
    line = f"{TINY} --enhancers 0 --data {data} --lr 0.01 --epochs 9 --save-every 1"
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        with pytest.raises(SystemExit):
            call(f"{line} --out s")                        # stopped at step 4, after three grids
    call("sample --out s --output o")
    call(f"{line} --out r --steps 4")
    call("sample --out r --output p")
    assert Path("o/0.png").read_bytes() == Path("p/0.png").read_bytes()


# ---------------------------------------------------------------------------------------- Sampling

def test_sample_keeps_odd_sizes(light):
    """A label map of any size gives a photo of that size; a folder gives a folder."""
    for name, h, w in (("a", 33, 47), ("b", 64, 20)):
        label_map(Path(f"in/{name}.png"), h, w)
        instance_map(Path(f"ids/{name}.png"), h, w)
    call(f"sample --out {light} --input in/a.png --instances ids/a.png --output photo.png")
    assert size_of("photo.png") == (47, 33)
    call(f"sample --checkpoint {light}/checkpoint.pt --input in --instances ids --output photos")
    assert {p.name: size_of(p) for p in Path("photos").iterdir()} == {
        "a.png": (47, 33), "b.png": (20, 64)}
    assert Path("photos/a.png").read_bytes() == Path("photo.png").read_bytes()    # no neighbours
    call(f"sample --out {light} --input in/a.png --instances ids --output big.png --size 64 96")
    assert size_of("big.png") == (96, 64)


def test_sample_the_test_split(light):
    call(f"sample --out {light} --limit 2 --output o")
    assert sorted(p.name for p in Path("o").iterdir()) == [
        "street_1000000.png", "street_1000001.png"]
    assert not (light / "test").exists()
    call(f"sample --out {light} --limit 1 --output p --size 32 48")          # Fig. 8: another size
    assert size_of("p/street_1000000.png") == (48, 32)


def test_a_run_with_crops_samples_below_the_crop(run):
    """What was a window in training is no bound on the images afterwards."""
    call(f"{TINY} --stage joint --init {run / 'checkpoint.pt'} --crop 64 32 --steps 1 --out r")
    call("sample --out r --limit 1 --size 32 32 --output o")
    assert size_of("o/street_1000000.png") == (32, 32)


def test_cityscapes_names_pair_up_in_folders(city, shared):
    """x_gtFine_labelIds.png goes with x_gtFine_instanceIds.png, as it does in --data."""
    data = shared / "city-data"
    call(f"sample --out {city} --input {data / 'test_label'} --instances {data / 'test_inst'} "
         "--output o")
    assert len(list(Path("o").iterdir())) == 3


def test_samples_differ_and_repeat_by_seed(light):
    for folder in ("one", "two"):
        call(f"sample --out {light} --limit 1 --output {folder} --samples 3")
    call(f"sample --out {light} --limit 1 --output three --seed 1")
    read = {str(p): p.read_bytes() for p in Path(".").glob("*/street*.png")}
    assert len(read) == 7
    one = [read[f"one/street_1000000_{k}.png"] for k in (1, 2, 3)]
    assert one == [read[f"two/street_1000000_{k}.png"] for k in (1, 2, 3)]
    assert len(set(one)) == 3 and one[1] == read["three/street_1000000.png"]


@pytest.mark.parametrize("vary", ["", "--vary car", "--vary 10 person"])
def test_vary_moves_the_styles_of_these_classes_alone(light, inputs, vary):
    call(f"sample --out {light} --limit 1 --output o --samples 3 {vary}")
    first, *rest = inputs
    label = first[0, :12].argmax(0)
    moved = torch.stack([(first != other)[0, 13:].any(0) for other in rest]).any(0)
    kinds = {int(k) for k in label[moved].unique()}
    assert kinds <= {"": set(range(12)), "--vary car": {10}, "--vary 10 person": {9, 10}}[vary]
    assert 10 in kinds and (vary or len(kinds) > 2)
    assert all(torch.equal(first[:, :13], other[:, :13]) for other in rest)      # the labels stay


@pytest.mark.parametrize("h, w", [(64, 64), (33, 47)])
def test_reference_lends_its_styles(light, inputs, h, w):
    """Each class that occurs in the reference looks as it does there, wherever it is."""
    picture(Path("photo.png"), h, w)
    label_map(Path("label.png"), h, w)
    call(f"sample --out {light} --limit 1 --output o --reference photo.png label.png")
    call(f"sample --out {light} --limit 1 --output p")
    label, z, drawn = inputs[0][0, :12].argmax(0), inputs[0][0, 13:], inputs[1][0, 13:]
    values = {int(k): z[:, label == k] for k in label.unique()}
    for value in values.values():
        assert torch.equal(value, value[:, :1].expand_as(value))
    assert len({tuple(value[:, 0].tolist()) for value in values.values()}) == len(values)
    assert not torch.equal(z, drawn)


def test_sampling_never_overwrites_its_input(light, capsys):
    source, _ = label_map(Path("in/a.png")), instance_map(Path("ids/a.png"))
    before = source.read_bytes()
    for flags in ("--input in --output in", "--input in/a.png --output in/a.png",
                  "--input in/a.png --output in"):
        fails(capsys, f"sample --out {light} {flags} --instances ids", "in/a.png")
    assert source.read_bytes() == before


@pytest.mark.parametrize("flags, words", [
    ("--input in", ["--instances"]), ("--input in/a.png", ["in/a.png", "--instances"]),
    ("--input in --instances ids --output o.png", ["o.png", "folder"]),
    ("--input in/a.png --instances ids --output o.png --samples 2", ["o.png", "folder"]),
    ("--input in/a.png --instances nowhere", ["nowhere"]),
    ("--input in/a.png --instances wide.png", ["wide.png", "(33, 47)"]),
    ("--input nowhere.png --instances ids", ["nowhere.png"]), ("--samples 0", ["--samples 0"]),
    ("--samples -1", ["--samples -1"]), ("--vary dragon", ["dragon", "car"]),
    ("--vary 99", ["99", "car"]), ("--reference photo.png nolabel.png", ["nolabel.png"]),
    ("--reference photo.png in/a.png", ["in/a.png", "(33, 47)"]),
    ("--input in/a.png --instances ids --output o/x.xyz", ["x.xyz"]),
    ("--size 30 40", ["--size 30 40", "32 40"])])
def test_mistakes_at_sampling(light, capsys, flags, words):
    for name in ("a", "b"):
        label_map(Path(f"in/{name}.png"))
        instance_map(Path(f"ids/{name}.png"))
    instance_map(Path("wide.png"), 33, 48)
    picture(Path("photo.png"), 50, 50)
    fails(capsys, f"sample --out {light} --output o {flags}", *words)
    assert not [p for p in Path("o").rglob("*") if p.is_file()]


@pytest.mark.parametrize("flags", ["--samples 2", "--vary car", "--reference a.png b.png"])
def test_without_an_encoder_there_is_one_image(mute, capsys, flags):
    fails(capsys, f"sample --out {mute} {flags}", "no encoder", "--features 3")
    call(f"sample --out {mute} --limit 1 --output o")


# ------------------------------------------------------------------------------------------ Styles

def test_encode_completes_an_interrupted_run(run, monkeypatch, capsys):
    """It fills in the styles and leaves all else in the checkpoint as it was."""
    with monkeypatch.context() as patch:
        interrupt_at(STEPS - 1, patch)
        with pytest.raises(SystemExit):
            call(f"{TINY} --out r")
    before = stored("r")
    call("sample --out r --limit 1 --output o")            # works without, and says so
    assert "no styles in the checkpoint yet" in capsys.readouterr().out
    assert not stored("r")["styles"]
    call(f"sample --out {run} --limit 1 --output p")       # --limit is of test images here
    assert len({p.read_bytes() for p in Path(".").glob("[op]/*.png")}) == 1
    call("encode --out r")
    after = stored("r")
    styles = {k: after.pop(k) for k in ("styles", "means")}
    assert_same(after, {k: v for k, v in before.items() if k not in styles})
    assert_same(styles, {k: stored(run)[k] for k in styles})
    call("encode --out r --clusters 2 --min-area 0")
    assert max(len(v) for v in stored("r")["styles"].values()) == 2


def test_encode_on_a_checkpoint_elsewhere(run):
    Path("copy").mkdir()
    content = stored(run) | {"styles": {}, "means": {}}
    torch.save(content, "copy/other.pt")
    before = (run / "checkpoint.pt").read_bytes()
    call("encode --checkpoint copy/other.pt")
    there = torch.load("copy/other.pt", weights_only=True)
    assert_same(there["styles"], stored(run)["styles"])
    assert (run / "checkpoint.pt").read_bytes() == before


def test_the_authors_clusters_can_be_read(run, inputs, capsys):
    """Their file is numpy's pickle of {class: (K, C)}; cars then have these styles and no other."""
    shutil.copytree(run, "r")
    centres = np.array([[.25, -.5], [.75, .125]])
    np.save("clusters.npy", {10: centres, 3: np.zeros((1, 2))}, allow_pickle=True)
    call("encode --out r --clusters-file clusters.npy")
    assert_same(stored("r")["styles"], {10: torch.tensor(centres).float(), 3: torch.zeros(1, 2)})
    call("sample --out r --limit 2 --output o --samples 2")
    values = {tuple(v) for s in inputs for v in
              s[0, 13:][:, s[0, :12].argmax(0) == 10].T.tolist()}
    assert values == {(.25, -.5), (.75, .125)}
    np.save("wide.npy", {10: np.zeros((2, 3))}, allow_pickle=True)
    np.save("far.npy", {99: np.zeros((2, 2))}, allow_pickle=True)
    np.save("none.npy", {}, allow_pickle=True)
    Path("text.npy").write_text("no numbers")
    before = Path("r/checkpoint.pt").read_bytes()
    for name in ("wide.npy", "far.npy", "none.npy", "text.npy", "missing.npy"):
        fails(capsys, f"encode --out r --clusters-file {name}", name)
    assert Path("r/checkpoint.pt").read_bytes() == before


def test_encode_needs_an_encoder(mute, capsys):
    fails(capsys, f"encode --out {mute}", "no encoder", "--features 3")


# ----------------------------------------------------------------------------------------- Editing

def objects_in(text: str) -> dict[int, str]:
    """The list that the mode edit prints: {id: class}."""
    return {int(k): v for k, v in re.findall(r"^ +(\d+)  (\w.*?) +[\d.]+%", text, re.MULTILINE)}


@pytest.mark.parametrize("flags, expected", [
    ("", {7: "road", 23: "sky", 26000: "car", 26001: "car", 33001: "bicycle"}),
    ("--set 33001=person --remove 26001 --paste 26000@-6,25 --paint 0,0,8,8=vegetation --undo "
     "--paint 50,50,60,60=truck --style 26000=0",
     {7: "road", 23: "sky", 24000: "person", 26000: "car", 26001: "car", 27000: "truck"}),
    ("--remove 26001=building", {7: "road", 23: "sky", 26000: "car", 33001: "bicycle",
                                 11: "building"}),
    ("--set 26000=25 --set 25000=26", {7: "road", 23: "sky", 26000: "car", 26001: "car",
                                       33001: "bicycle"}),
    ("--paste 26000@-6,25 --remove 26002 --remove 26001",
     {7: "road", 23: "sky", 26000: "car", 33001: "bicycle"})])
def test_edits_happen_in_the_order_given(city, capsys, flags, expected):
    call(f"edit --out {city} --output e.png {flags}")
    assert objects_in(capsys.readouterr().out) == expected
    assert size_of("e.png") == (2 * 66 + 2, 2 * 66 + 2)
    with Image.open("e.png") as image:
        pixels = np.asarray(image)
    before, after = pixels[2:66, 68:132], pixels[68:132, 68:132]
    assert (before == after).all() == (flags == "")


def test_undo_takes_back_the_change_before_it(city, capsys):
    call(f"edit --out {city} --output a.png --set 33001=person --undo")
    assert objects_in(capsys.readouterr().out)[33001] == "bicycle"
    fails(capsys, f"edit --out {city} --output b.png --undo --set 33001=person", "undo", "nothing")
    assert not Path("b.png").exists()


def test_style_edits_change_z_of_one_object(city, inputs):
    call(f"edit --out {city} --output e.png --style 26000=1")
    before, after = inputs[0][0], inputs[1][0]
    changed = (before[36:] != after[36:]).any(0)
    assert changed[45, 10] and not changed[:40].any() and not changed[:, 32:].any()
    centre = stored(city)["styles"][26][1]
    assert torch.equal(after[36:, 45, 10], centre)
    assert torch.equal(before[:36], after[:36])


def test_set_keeps_labels_boundaries_and_styles_in_step(city, inputs):
    call(f"edit --out {city} --output e.png --set 26001=road")
    before, after = inputs[0][0], inputs[1][0]
    label = after[:35].argmax(0)
    assert label[50, 20] == 7 == label[50, 40] and before[:35].argmax(0)[50, 20] == 26
    assert before[35, 50, 29] == 1 and after[35, 50, 29] == 0              # road touches road
    assert torch.equal(after[36:, 50, 20], after[36:, 50, 50])


def test_paste_is_a_new_object_on_own_data_too(capsys):
    """Without a table of things, ids tell: 26000 is an object, not the class 26."""
    data = scenes(Path("data"))
    call(f"{TINY} --enhancers 0 --data {data} --steps 1 --out r")
    capsys.readouterr()
    call("edit --out r --paste 26000@-6,25 --output e.png")
    assert len(objects_in(capsys.readouterr().out)) == 6


def test_pictures_of_edits_are_numbered(city, capsys):
    shutil.copytree(city, "r")
    call("edit --out r")
    call("edit --out r --set 33001=person")
    assert sorted(p.name for p in Path("r/edits").iterdir()) == ["1.png", "2.png"]
    assert "r/edits/2.png" in capsys.readouterr().out
    before = Path("r/edits/1.png").read_bytes()
    fails(capsys, "edit --out r --output r/edits/1.png", "r/edits/1.png", "exists")
    assert Path("r/edits/1.png").read_bytes() == before


def test_edit_by_item_and_by_file(light, capsys):
    call(f"edit --out {light} --item street_1000002 --output a.png")
    assert "street_1000002" in capsys.readouterr().out
    label_map(Path("in/mine.png"))
    instance_map(Path("ids/mine.png"))
    call(f"edit --out {light} --input in/mine.png --instances ids --set 10003=car --output b.png")
    text = capsys.readouterr().out
    assert "mine" in text and objects_in(text)[10012] == "car" and 10003 not in objects_in(text)
    assert size_of("b.png") == (2 * 49 + 2, 2 * 35 + 2)


@pytest.mark.parametrize("flags, words", [
    ("--set 26000", ["--set 26000", "ID=CLASS"]), ("--set car=26000", ["ID=CLASS"]),
    ("--set 26000=", ["ID=CLASS"]), ("--set 1,2=car", ["ID=CLASS"]),
    ("--style 26000", ["ID=K"]), ("--style 26000=red", ["ID=K"]),
    ("--remove car", ["--remove car", "ID"]), ("--remove =car", ["ID"]),
    ("--paste 26000", ["ID@DOWN,RIGHT"]), ("--paste 26000@1", ["ID@DOWN,RIGHT"]),
    ("--paste 26000=1,2", ["ID@DOWN,RIGHT"]), ("--paint 0,0,9=car", ["TOP,LEFT,BOTTOM,RIGHT"]),
    ("--paint 0,0,9,9", ["TOP,LEFT,BOTTOM,RIGHT"]),
    ("--paint 0,0,99,9=car", ["0,0,99,9", "64"]), ("--paint 9,9,9,12=car", ["9,9,9,12"]),
    ("--set 5=car", ["object 5", "26000", "33001"]), ("--remove 5", ["object 5", "26000"]),
    ("--style 26000=99", ["99", "car", "0 to"]), ("--style 26000=-1", ["-1", "0 to"]),
    ("--set 26000=dragon", ["dragon", "truck"]), ("--paint 0,0,9,9=99", ["99", "truck"]),
    ("--paste 26000@999,0", ["outside"]), ("--item nobody", ["nobody", "0"])])
def test_mistakes_in_edits(city, capsys, flags, words):
    fails(capsys, f"edit --out {city} --output e.png {flags}", *words)
    assert not Path("e.png").exists()


def test_styles_cannot_be_edited_without_an_encoder(mute, capsys):
    call(f"edit --out {mute} --set 3=4 --output e.png")
    fails(capsys, f"edit --out {mute} --style 3=0 --output f.png", "--style", "no encoder")


def test_the_editor_is_as_strict_in_a_notebook(city):
    cfg, state = pix2pixhd.load_for_test("sample", {"out": str(city)}, {})
    editor = pix2pixhd.Editor(state, cfg, pix2pixhd.dataset(cfg, "test")[0])
    with refused("object 5", 26000):
        editor.set_class(5, "car")
    with refused("undo"):
        editor.undo()
    first = editor.render()
    editor.set_style(26000, 1).set_class(33001, "person").remove(26001).reset()
    assert torch.equal(editor.render(), first)


# -------------------------------------------------------------------------------------- Evaluation

def test_evaluate_writes_the_papers_metrics(light, capsys):
    shutil.copytree(light, "r")
    call(f"evaluate --out r {SCORER} --limit 3")
    metrics = json.loads(Path("r/metrics.json").read_text())
    assert metrics["images"] == 3 and 0 < metrics["L1"] < 2
    for row in ("output", "truth"):
        assert set(metrics[row]) == {"per-pixel acc", "per-class acc", "class IOU",
                                     "border contrast"}
        assert all(0 <= v <= 2 for v in metrics[row].values())
    assert metrics["output"]["border contrast"] != metrics["truth"]["border contrast"]
    text = " ".join(capsys.readouterr().out.split())
    for part in ("ours 83.78 0.6389", "pix2pix 78.34 0.3948", "CRN 70.55 0.3483",
                 "oracle 84.29 0.6857", "68.55", "58.9"):
        assert part in text


def test_metrics_are_json_where_no_objects_touch():
    """NaN is no JSON: a browser or jq cannot read it."""
    data = scenes(Path("data"), CITY, touching=False)
    call(f"{TINY} --enhancers 0 --data {data} --steps 1 --out r")
    call(f"evaluate --out r {SCORER}")
    json.loads(Path("r/metrics.json").read_text(), parse_constant=pytest.fail)


def test_evaluate_into_another_folder(light):
    call(f"evaluate --checkpoint {light / 'checkpoint.pt'} --out new/run {SCORER} --limit 1")
    assert Path("new/run/metrics.json").exists() and not (light / "metrics.json").exists()


# ----------------------------------------------------------------------------- The authors' weights

def released(path: Path, net: torch.nn.Module, keys: str) -> None:
    """A network's convolutions under the authors' keys, in order, as their files hold them."""
    names, values = keys.split(), net.state_dict()
    assert len(names) == len(pix2pixhd.ours(net))
    content = {f"module.{new}.{kind}": values[f"{old}.{kind}"] for old, new in
               zip(pix2pixhd.ours(net), names) for kind in ("weight", "bias")}
    if "model.1" in names:                                 # from before PyTorch 0.4
        content["module.model.2.running_mean"] = torch.ones(2)
    torch.save(content, path)


G1 = ("model.1 model.4 model.7 model.10.conv_block.1 model.10.conv_block.5 "
      "model.11.conv_block.1 model.11.conv_block.5 model.12 model.15")
G2 = f"{G1} model1_1.1 model1_1.4 model1_2.0.conv_block.1 model1_2.0.conv_block.5 model1_2.1"
E_KEYS = " ".join(f"model.{i}" for i in (1, 4, 7, 10, 13, 16, 19, 22, 25, 29))
D_KEYS = " ".join(f"scale{i}_layer{j}.0" for i in (0, 1) for j in range(5))


@pytest.fixture(scope="module")
def theirs(shared) -> dict[str, Path]:
    """Small networks with the authors' key names, and the data they need."""
    torch.manual_seed(3)
    make, folder = functools.partial(pix2pixhd.Generator, c_out=3, width=4, downs=2, blocks=2,
                                     enhancer_blocks=1), shared / "theirs"
    folder.mkdir()
    released(folder / "G1.pth", make(35, enhancers=0), f"{G1} model.19")
    released(folder / "G2.pth", make(36, enhancers=1), f"{G2} model1_2.5")
    released(folder / "GE.pth", make(38, enhancers=1), f"{G2} model1_2.5")
    released(folder / "RGB.pth", make(3, enhancers=0), f"{G1} model.19")
    released(folder / "E.pth", pix2pixhd.Encoder(2, 2), E_KEYS)
    released(folder / "D.pth", pix2pixhd.MultiScaleDiscriminator(39, 4, 2), D_KEYS)
    return {p.stem: p for p in folder.iterdir()} | {"data": shared / "city-data"}


def test_released_weights_tell_their_own_shape(theirs, city):
    label, ids = (theirs["data"] / folder / name.format(0)
                  for folder, name in zip(("test_label", "test_inst"), CITY))
    call(f"sample --checkpoint {theirs['G2']} --gpu -1 --input {label} --instances {ids} "
         "--output a.png")
    call(f"sample --checkpoint {theirs['G1']} --gpu -1 --input {label} --output b.png")
    assert size_of("a.png") == size_of("b.png") == (64, 64)
    call(f"sample --checkpoint {theirs['RGB']} --gpu -1 --input {picture(Path('p.png'), 33, 47)} "
         "--output c.png")
    assert size_of("c.png") == (47, 33)
    cfg, state = pix2pixhd.load_for_test("sample", {"gpu": -1}, {"checkpoint": (str(theirs["G2"]),),
                                                       "input": "a.png"})
    assert (cfg.width, cfg.downs, cfg.blocks, cfg.enhancers, cfg.enhancer_blocks, cfg.boundary) \
        == (4, 2, 2, 1, 1, True)
    weights = torch.load(theirs["G2"])
    for ours, key in (("globe.back.3.weight", "model.15.weight"),
                      ("enhancers.0.residual.0.branch.3.bias", "model1_2.0.conv_block.5.bias"),
                      ("output.0.weight", "model1_2.5.weight")):
        assert torch.equal(state.generator.state_dict()[ours], weights[f"module.{key}"])


def test_released_weights_with_an_encoder(theirs, city, inputs):
    both = f"--checkpoint {theirs['GE']} {theirs['E']} --gpu -1"
    call(f"sample {both} --data {theirs['data']} --size 64 64 --output o --samples 2")
    assert len(list(Path("o").iterdir())) == 6 and inputs[0].shape[1] == 38
    assert not torch.equal(inputs[0], inputs[1])
    call(f"edit {both} --data {theirs['data']} --size 64 64 --style 26000=1 --output e.png")
    call(f"evaluate --checkpoint {theirs['G2']} --gpu -1 --data {theirs['data']} --size 64 64 "
         f"{SCORER} --limit 1")
    assert Path("runs/released/metrics.json").exists()


def test_a_reference_needs_no_styles(theirs, city):
    """The authors' G and E with a photo to look like: no training photos are needed."""
    label, ids, photo = (theirs["data"] / folder / name.format(0) for folder, name in
                         zip(("test_label", "test_inst", "test_img"), CITY))
    call(f"sample --checkpoint {theirs['GE']} {theirs['E']} --gpu -1 --input {label} "
         f"--instances {ids} --reference {photo} {label} --output o.png")
    assert size_of("o.png") == (64, 64)


def test_mistakes_with_released_weights(theirs, city, capsys):
    label, ids = (theirs["data"] / folder / name.format(0)
                  for folder, name in zip(("test_label", "test_inst"), CITY))
    scene = f"--gpu -1 --input {label} --instances {ids} --output o.png"
    fails(capsys, f"sample --checkpoint {theirs['G2']} --gpu -1", "--input", "--data")
    fails(capsys, f"sample --checkpoint {theirs['E']} {scene}", "E.pth", "generator")
    fails(capsys, f"sample --checkpoint {theirs['GE']} {scene}", "38", "35", "encoder")
    fails(capsys, f"sample --checkpoint {theirs['GE']} {theirs['E']} {scene}", "--data")
    fails(capsys, f"encode --checkpoint {theirs['GE']} {theirs['E']} --gpu -1 --size 64 64 "
                  f"--data {theirs['data']}", "GE.pth", "--init")
    torch.save({"conv1.weight": torch.zeros(2, 2, 3, 3)}, "resnet.pth")
    fails(capsys, f"sample --checkpoint resnet.pth {scene}", "resnet.pth", "conv1.weight")


def test_training_starts_from_released_weights(theirs, city, capsys):
    line = f"{TINY} --data {theirs['data']} --stage joint --blocks 2 --steps 1"
    call(f"{line} --init {theirs['GE']} {theirs['E']} {theirs['D']} --out r --lr 1e-12")
    content = stored("r")
    for path, name, ours, key in (
            ("GE", "generator", "globe.front.0.weight", "model.1.weight"),
            ("E", "encoder", "output.0.weight", "model.29.weight"),
            ("D", "discriminator", "scales.1.layers.2.0.weight", "scale1_layer2.0.weight")):
        expected = torch.load(theirs[path])[f"module.{key}"]
        torch.testing.assert_close(content[name][ours], expected, rtol=0, atol=1e-9)
    fails(capsys, f"{line} --init {theirs['G2']} --out s", "G2.pth", "front.0.weight", "expected")
    fails(capsys, f"{line} --features 0 --init {theirs['E']} --out s", "E.pth", "encoder")
    assert not Path("s").exists()


# ---------------------------------------------------------------------------- Damage and bad values

def test_check_mode_reports_and_trains_nothing(capsys):
    call("check --size 64 64 --limit 3")
    text = capsys.readouterr().out
    assert "streets" in text and "road" in text
    assert not list(Path(".").rglob("checkpoint.pt"))
    assert len(list(Path(".").rglob("contact_*.png"))) == 2


def test_trace_prints_stages_and_parameters(capsys):
    call(f"trace {TINY} --scales 3")
    text = capsys.readouterr().out
    with torch.device("meta"):
        G = pix2pixhd.Generator(15, 3, 4, 2, 1, 1, 1)
        D = pix2pixhd.MultiScaleDiscriminator(16, 4, 3)
    for net in (G, D):
        assert f"{sum(p.numel() for p in net.parameters()):,}" in text
    for part in ("stage 3 of 3, joint", "(2, 13, 64, 64)", "(2, 3, 64, 64)", "70, 141, 283 pixels"):
        assert part in text
    assert not Path("runs").exists()


@pytest.mark.parametrize("mode", ["sample --gpu -1 --checkpoint", f"{ONE} --steps 1 --init",
                                  "encode --checkpoint"])
def test_foreign_and_damaged_checkpoints(run, capsys, mode):
    whole, content = (run / "checkpoint.pt").read_bytes(), stored(run)
    Path("cut.pt").write_bytes(whole[:len(whole) // 2])
    Path("empty.pt").write_bytes(b"")
    torch.save(content | {"script": "pix2pix"}, "other.pt")
    torch.save({"script": "pix2pixhd", "config": Trap()}, "trap.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"epoch": 3, "state_dict": {}}, "foreign.pt")
    torch.save({0: torch.zeros(1)}, "numbers.pt")
    torch.save({"model.1.weight": torch.zeros(4, 3, 7, 7), "epoch": 3}, "mixed.pt")
    for name, *words in (("cut.pt", "damaged"), ("empty.pt", ""), ("other.pt", "pix2pix.py"),
                         ("trap.pt", "damaged"), ("list.pt", "list"), ("foreign.pt", ""),
                         ("numbers.pt", ""), ("mixed.pt", ""), ("missing.pt", "no such file")):
        fails(capsys, f"{mode} {name}", name, *words)
    assert not Path("sprung").exists()


def test_a_checkpoint_of_pix2pix_is_refused_by_name(capsys):
    import pix2pix                              # here alone: the scripts know nothing of each other
    pix2pix.main("--size 32 32 --width 4 --patch 16 --limit 1 --steps 1 --gpu -1 --out p".split())
    fails(capsys, "sample --out p", "p/checkpoint.pt", "pix2pix.py", "pix2pixhd.py")


def test_checkpoint_of_another_version(run, capsys):
    content = stored(run)
    torch.save(content | {"config": content["config"] | {"frobnicate": 1}}, "newer.pt")
    fails(capsys, "sample --checkpoint newer.pt --gpu -1", "newer.pt", "frobnicate")


@pytest.mark.parametrize("flags, words", [
    ("--size 60 64", ["--size 60 64", "--size 64 64", "8"]), ("--size 8 64", ["8 64", "16"]),
    ("--size 0 64", ["0 64"]), ("--size 32 64", ["32"]), ("--size 64 128 --enhancers 2", ["32"]),
    ("--crop 96 64", ["--crop 96 64", "64"]),
    ("--crop 20 32", ["--crop 20 32", "--crop 16 32"]), ("--crop 32 0", ["--crop 32 0"]),
    ("--width 3", ["--width 3", "2"]), ("--width 0", ["--width 0"]),
    ("--min-area 2", ["--min-area 2"]), ("--clusters 0", ["--clusters 0"]),
    ("--enhancer-epochs 3", ["--enhancer-epochs 3", "--fine-epochs 3"]),
    ("--fine-epochs 0", ["--fine-epochs 0"]), ("--epochs 0", ["--epochs 0"]),
    ("--enhancers 9", ["--enhancers 9"]), ("--scales 0", ["--scales 0"]),
    ("--scales 99", ["--scales 99"]), ("--downs -1", ["--downs -1"]), ("--blocks 0", ["--blocks"]),
    ("--features -1", ["--features -1"]), ("--lambda-fm -1", ["--lambda-fm -1"]),
    ("--lambda-vgg inf", ["inf"]), ("--lr -1", ["-1"]), ("--lr nan", ["nan"]),
    ("--betas 2 0.9", ["--betas", "2"]), ("--batch-size 0", ["--batch-size 0"]),
    ("--batch-size 6", ["--batch-size 6", "5"]), ("--limit -1", ["--limit -1"]),
    ("--steps -3", ["--steps -3"]), ("--workers -1", ["--workers -1"]), ("--gpu -2", ["-2"]),
    ("--seed 99999999999999999999999", ["--seed"]), ("--classes x", ["x", "cityscapes"]),
    ("--data nowhere", ["nowhere"]), ("--preset 2048p", ["2048p", "1024p"]),
    ("--task pairs --features 0", ["--task pairs"]), ("--task pairs", ["--features 2"]),
    ("--loss L1", ["L1", "GAN+FM"]), ("--gan wgan", ["wgan", "lsgan"]),
    ("--stage enhancer --enhancer-epochs 0", ["--enhancer-epochs 0"]),
    ("--stage last", ["last", "joint"]), ("--vgg nofile.pth --loss GAN+FM+VGG", ["nofile.pth"]),
    ("--init nofile.pt", ["nofile.pt"])])
def test_absurd_values_are_refused_in_one_line(capsys, flags, words):
    """And a refused call leaves no folder, else the --out is taken by a run that never was."""
    fails(capsys, f"{TINY} --steps 2 --out r {flags}", *words)
    fails(capsys, f"{TINY} --steps 2 {flags}", *words)
    assert not list(Path(".").iterdir())


@pytest.mark.parametrize("line, words", [
    ("evaluate --vgg nofile.pth --scorer-width 2 --scorer-steps 2", ["nofile.pth"]),
    ("evaluate --vgg imagenet --scorer-width 2 --scorer-steps 2", ["--scorer-width 2"]),
    ("encode --clusters 0", ["--clusters 0"]), ("edit --size 60 64", ["--size 60 64"]),
    ("sample --preset toy", ["--preset toy"]), ("sample --gpu 77", ["--gpu 77"]),
    ("sample --data nowhere", ["nowhere"])])
def test_mistakes_at_test_time(light, capsys, line, words):
    fails(capsys, f"{line} --checkpoint {light / 'checkpoint.pt'}", *words)


@pytest.mark.parametrize("line, words", [
    ("{TINY} --out r --input a.png", ["--input"]), ("{TINY} --out r --samples 3", ["--samples"]),
    ("{TINY} --out r --set 1=2", ["--set", "edit"]), ("{TINY} --out r --vary car", ["--vary"]),
    ("{TINY} --out r --clusters-file c.npy", ["--clusters-file", "encode"]),
    ("--resume --out {run} --preset toy", ["--preset toy"]),
    ("sample --out {run} --style 1=2", ["--style", "edit"]),
    ("sample --out {run} --undo", ["--undo", "edit"]),
    ("sample --out {run} --resume", ["--resume"]), ("sample --out {run} --item a", ["--item"]),
    ("evaluate --out {run} --paint 0,0,1,1=car", ["--paint", "edit"]),
    ("edit --out {run} --samples 2", ["--samples", "sample"]),
    ("encode --out {run} --input a.png", ["--input"]),
    ("sample --out {run} --instances ids", ["--instances", "--input"]),
    ("edit --out {run} --instances ids", ["--instances", "--input"]),
    ("edit --out {run} --input in/a.png --instances ids --item x", ["--item", "--input"]),
    ("sample --out {run} --reference p.png in/a.png --samples 2", ["--reference", "--samples"]),
    ("sample --out {run} --reference p.png in/a.png --vary car", ["--reference", "--vary"])])
def test_flags_that_the_call_ignores_are_refused(light, capsys, line, words):
    """A flag that nothing reads is a lie to the user."""
    label_map(Path("in/a.png"))
    instance_map(Path("ids/a.png"))
    picture(Path("p.png"), 33, 47)
    output = {"sample": " --output o", "edit": " --output o.png"}.get(line.split()[0], "")
    fails(capsys, line.format(TINY=TINY, run=light) + output, *words)
    assert not [name for name in ("r", "o", "o.png") if Path(name).exists()]


def test_a_damaged_image_is_one_line_even_from_a_worker(capsys):
    """The workers' own traceback must not reach the user."""
    data = scenes(Path("data"))
    whole = Path("data/train_img/1.png").read_bytes()
    Path("data/train_img/1.png").write_bytes(whole[:len(whole) - 400])
    for workers in (0, 1):
        text = fails(capsys, f"{TINY} --data {data} --steps 3 --batch-size 1 --out r{workers} "
                             f"--workers {workers}", "data/train_img/1.png")
        assert "Traceback" not in text


# ------------------------------------------------------------------------ NaN, full disks, signals

@pytest.mark.parametrize("when, weight", [(1, "globe"), (4, "enhancers")])
def test_nan_stops_with_its_name_and_keeps_the_checkpoint(capsys, monkeypatch, when, weight):
    """Weights that become infinite: the loss and its step are named, in any stage."""
    step = pix2pixhd.train_step

    def broken(state, batch, cfg):
        if state.step == when:
            part = getattr(state.generator, weight)
            with torch.no_grad():
                next(part.parameters()).fill_(torch.inf)
        return step(state, batch, cfg)

    with monkeypatch.context() as patch:
        patch.setattr(pix2pixhd, "train_step", broken)
        text = fails(capsys, f"{TINY} --save-every {when} --out r", f"step {when + 1}", "nan",
                     "--lr")
    assert re.search(r"\b(g_gan|g_fm|d_fake)\b", text)
    assert stored("r")["step"] == when
    call(f"--resume --steps {when + 1} --out r")


def test_nan_weights_are_never_saved(capsys, monkeypatch):
    """An update can ruin the weights while its own loss was still finite: at step 3, a save."""
    call(f"{ONE} --steps 2 --out r")
    step = pix2pixhd.train_step

    def broken(state, batch, cfg):
        losses = step(state, batch, cfg)
        with torch.no_grad():
            state.encoder.output[0].weight.fill_(torch.nan)
        return losses

    monkeypatch.setattr(pix2pixhd, "train_step", broken)
    fails(capsys, "--resume --steps 3 --out r", "nan")
    assert all(v.isfinite().all() for v in stored("r")["encoder"].values())


@pytest.mark.parametrize("broken", ["torch.save", "os.fsync", "os.replace"])
def test_a_full_disk_keeps_the_last_good_checkpoint(capsys, monkeypatch, broken):
    call(f"{ONE} --steps 1 --out r")
    before = Path("r/checkpoint.pt").read_bytes()
    with monkeypatch.context() as patch:
        fill_the_disk(patch, broken)
        fails(capsys, "--resume --steps 2 --out r", "checkpoint.pt", "No space left")
        fails(capsys, "encode --out r --clusters 1", "checkpoint.pt", "No space left")
    assert Path("r/checkpoint.pt").read_bytes() == before
    assert not list(Path("r").rglob("*.tmp"))
    call("--resume --steps 2 --out r")


def test_torchrun_with_a_gpu_number_is_refused(monkeypatch):
    """--gpu 0 in two processes would put both on one card: each takes its own, or the CPU."""
    for name, value in (("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda k: "a card")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: None)
    assert pix2pixhd.pick_device(Config()).index == 1
    with refused("--gpu 0"):
        pix2pixhd.pick_device(Config(gpu=0))


def test_signals_belong_to_the_caller_again_after_training():
    """A notebook that has called train() must still be interruptible."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    call(f"{ONE} --steps 1 --out r")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_before_the_first_step_still_saves(monkeypatch):
    """Ctrl-C while the first batch is being loaded: what is said to be saved must be saved."""
    batches = pix2pixhd.epoch_batches

    def slow(*arguments):
        signal.raise_signal(signal.SIGINT)
        return batches(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pix2pixhd, "epoch_batches", slow)
        with pytest.raises(SystemExit) as caught:
            call(f"{ONE} --out r")
    assert (caught.value.code, stored("r")["step"]) == (130, 1)
    call("--resume --steps 2 --out r")


# A user's own terminal, and a launcher that makes a warning during the import an error.
LAUNCHED = {signal.SIGINT: (130, [SCRIPT]), signal.SIGTERM: (143, [
    "-W", "error", "-c", "import warnings, pix2pixhd; warnings.resetwarnings(); pix2pixhd.main()"])}


def test_interrupted_processes_save_and_go_on(request):
    """Ctrl-C and SIGTERM from outside: saved, how to resume is said, and it is true."""
    line, processes, steps = f"{ONE} --save-every 1000 --epochs 2000", {}, {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS)}
    for number, (_, start) in LAUNCHED.items():
        processes[number] = subprocess.Popen(
            [sys.executable, *start, *f"{line} --out r{number}".split()], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        request.addfinalizer(processes[number].kill)       # whatever fails below
    deadline = time.time() + 90
    while len(list(Path(".").glob("*/log.csv"))) < 2 and time.time() < deadline \
            and all(process.poll() is None for process in processes.values()):
        time.sleep(0.02)                                   # until both have done 20 steps
    for number, process in processes.items():
        process.send_signal(number)
    for number, process in processes.items():
        out, err = process.communicate(timeout=90)
        assert process.returncode == LAUNCHED[number][0], err
        assert "Traceback" not in err
        steps[number] = stored(f"r{number}")["step"]
        assert f"stopped at step {steps[number]}" in out and f"--resume --out r{number}" in out
    last = max(steps.values()) + 1
    for number in LAUNCHED:
        call(f"--resume --out r{number} --steps {last}")
    assert last > 20
    assert_same_state(*(f"r{number}" for number in LAUNCHED))


# ----------------------------------------------------------------------------- Several processes

WORKER = """
import sys, torch, pix2pixhd
from torch import distributed as dist
cfg = pix2pixhd.Config(**torch.load("config.pt"))
device = pix2pixhd.pick_device(cfg)
rank, batch = dist.get_rank(), torch.load("batch.pt")
for stage in pix2pixhd.plan(cfg)[1:]:                      # enhancer, joint
    state = pix2pixhd.build(stage.cfg, device)
    one = {k: v[rank:rank + 1] for k, v in batch.items() if torch.is_tensor(v)}
    pix2pixhd.train_step(state, pix2pixhd.make_pair(one, stage.cfg), stage.cfg)
    torch.save({f"{name}.{key}": p.grad for name in pix2pixhd.NETWORKS for key, p in
                pix2pixhd.plain(getattr(state, name)).named_parameters()},
               f"{stage.name}-{rank}.pt")
pix2pixhd.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def two(shared) -> Path:
    """One torchrun of two processes: a step of two stages whose gradients are kept, and a run."""
    folder = shared / "two-processes"
    folder.mkdir()
    line = f"{TINY} --batch-size 1 --epochs 1"
    flags = vars(pix2pixhd.parser().parse_args(line.split()))
    cfg = Config(**{k: v for k, v in flags.items() if k != "mode"} | {"classes": "streets"})
    train_set = pix2pixhd.dataset(cfg, "train")
    torch.save(dataclasses.asdict(cfg), folder / "config.pt")
    torch.save(torch.utils.data.default_collate([train_set[0], train_set[1]]), folder / "batch.pt")
    (folder / "worker.py").write_text(WORKER)
    result = torchrun(f"worker.py {line} --steps 5", cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_torchrun_makes_one_run_which_one_process_can_resume(two, monkeypatch):
    shutil.copytree(two / "runs", "runs")
    assert [p.name for p in Path("runs").iterdir()] == ["pix2pixhd-1"]
    content = stored("runs/pix2pixhd-1")       # an epoch is four images in two steps
    assert [content[k] for k in ("step", "epoch", "seen", "stage")] == [5, 2, 2, 2]
    assert not any(k.startswith("module.") for name in pix2pixhd.NETWORKS for k in content[name])
    assert content["styles"]
    call("--resume --steps 7")
    content = stored("runs/pix2pixhd-1")       # one process: one image a step, two more in all
    assert [content[k] for k in ("step", "epoch", "seen")] == [7, 2, 4]


@pytest.mark.parametrize("stage", ["enhancer", "joint"])
def test_two_processes_average_the_gradients_of_two_images(two, stage):
    """Two processes with an image each have the gradients of one process with both."""
    cfg = Config(**torch.load(two / "config.pt"))
    cfg, = (part.cfg for part in pix2pixhd.plan(cfg) if part.name == stage)
    state = pix2pixhd.build(cfg, torch.device("cpu"))
    pix2pixhd.train_step(state, pix2pixhd.make_pair(torch.load(two / "batch.pt"), cfg), cfg)
    first, second = (torch.load(two / f"{stage}-{rank}.pt") for rank in (0, 1))
    assert_same(first, second)
    moved = 0
    for name in pix2pixhd.NETWORKS:
        for key, p in getattr(state, name).named_parameters():
            if p.grad is None:
                assert stage == "enhancer" and first[f"{name}.{key}"] is None, key
            else:
                torch.testing.assert_close(first[f"{name}.{key}"], p.grad, rtol=1e-3, atol=1e-4)
                moved += p.grad.abs().max() > 1e-2
    assert moved > 10


# --------------------------------------------------------------------------------- The help text

@pytest.mark.parametrize("preset", pix2pixhd.PRESETS)
def test_every_preset_is_consistent(preset):
    pix2pixhd.check_config(dataclasses.replace(Config(), **pix2pixhd.PRESETS[preset]))


@pytest.mark.parametrize("flag", ["task", "lr", "width", "loss", "scales", "enhancers", "clusters",
                                  "enhancer_epochs", "lambda_fm", "pool", "gan", "size", "betas"])
def test_help_tells_the_default_of_a_folder(flag, monkeypatch):
    """What the help gives in brackets is what `--data DIR` alone trains with."""
    seen = []
    monkeypatch.setattr(pix2pixhd, "train", lambda cfg, *a: seen.append(cfg))
    call("--data somewhere")
    action, = (a for a in pix2pixhd.parser()._actions if a.dest == flag)
    told = re.findall(r"\(([^()]*)\)$", action.help)[-1].split()
    value = getattr(seen[0], flag)
    value = value if isinstance(value, tuple) else (value,)
    assert told == [f"{v:g}" if isinstance(v, float) else str(v) for v in value]
