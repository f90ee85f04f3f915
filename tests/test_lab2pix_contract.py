"""What lab2pix.py owes its users: runs, resuming, errors, signals, processes, a readable file."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    SCRIPTS, Trap, assert_same, assert_same_state, label_map, losses_of, picture, refuses, stored,
    torchrun)
from PIL import Image

import common
import lab2pix
from lab2pix import Config, UserError

SCRIPT = SCRIPTS / "lab2pix.py"
# Two steps an epoch (five images, batches of two): step 3 is in mid-epoch.
TINY = ("--size 64 64 --width 2 --noise 4 --d-width 2 --vgg-width 2 --vgg random --limit 5 "
        "--batch-size 2 --epochs 2000 --save-every 3 --lr 0.0002 --gpu -1 --ups 4")
TINY_V1 = TINY.replace("--ups 4", "--version V1 --ups 5 --s-width 2 --s-size 64")
SMALL = dict(size=(64, 64), width=2, noise=4, d_width=2, vgg_width=2, vgg="random", ups=4,
             batch_size=2, classes="streets")


def call(line: str) -> None:
    lab2pix.main(line.split())


fails = functools.partial(refuses, call)


def two_lists(root: Path) -> Path:
    """trainA/ with three sketches, trainB/ with two photos of other names and sizes; testA/."""
    for i in range(3):
        picture(root / "trainA" / f"sketch{i}.png", 140, 150, i)
        picture(root / "testA" / f"drawing{i}.png", 130, 60, i)
    for i in range(2):
        picture(root / "trainB" / f"photo{i}.png", 128, 200, i)
    picture(root / "testB" / "photo9.png", 99, 99)
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
    assert (config["size"], config["width"], config["classes"]) == ([64, 64], 2, "streets")
    rows = losses_of(run)
    assert [row["step"] for row in rows] == ["3", "6"]
    assert all(np.isfinite(float(row[k])) for row in rows
               for k in ("g_adv", "g_vgg", "g_fm", "d_real", "d_fake", "d_blur"))
    # Five test streets as input | output | truth, two of them side by side.
    with Image.open(run / "samples" / "0000006.png") as grid:
        assert grid.size == (6 * 66 + 2, 3 * 66 + 2)


def test_a_checkpoint_is_plain_and_carries_its_config(run):
    content = stored(run)                                  # weights_only=True: it cannot run code
    assert content["script"] == "lab2pix"
    assert (content["step"], content["epoch"], content["seen"]) == (6, 2, 4)
    assert set(content["config"]) == {f.name for f in dataclasses.fields(Config)}
    assert content["opt_g"]["state"][0]["step"] == 6


@pytest.mark.parametrize("extra", [
    TINY + " --first label --form eq5 --no-edges --released-losses --ttur --no-decay",
    TINY + " --ablation A_s --jitter --no-mirror", TINY + " --precision bf16 --channels-last",
    TINY_V1 + " --smooth --d-norm spectral --loud",
    TINY_V1 + " --task edges --form v1code --no-dgnorm",
    TINY_V1 + " --ablation A_u"])
def test_every_setting_trains_and_samples(extra):
    """Two steps, one more after resuming, two outputs: nothing that a flag selects is broken."""
    call(f"{extra} --steps 2 --out r")
    call("--resume --steps 3 --out r")
    mute = "--first label" in extra or "v1code" in extra           # no noise: one output each
    call(f"sample --out r --limit 2 --samples {1 if mute else 2} --output o")
    side = stored("r")["config"]["size"][0]
    for path in Path("o").iterdir():
        with Image.open(path) as image:
            assert image.size == (side, side) and image.mode == "RGB"
    assert len(list(Path("o").iterdir())) == (2 if mute else 4)


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


def test_same_seed_same_run_other_seed_other_run(run):
    call(f"{TINY} --steps 3 --out a --seed 1")
    call(f"{TINY} --steps 3 --out b --seed 1")
    assert losses_of("a") == losses_of("b") and losses_of("a")[0] != losses_of(run)[0]


def test_an_out_that_holds_a_run_is_refused(run, capsys):
    before = (run / "checkpoint.pt").read_bytes()
    fails(capsys, f"{TINY} --steps 6 --out {run}", str(run), "--resume")
    assert (run / "checkpoint.pt").read_bytes() == before


def test_contradicting_flags_quote_both_values(run, capsys):
    fails(capsys, f"--resume --out {run} --steps 9 --width 8", "--width 8", "2")
    fails(capsys, f"--resume --out {run} --steps 9 --lr 0.1", "--lr 0.1", "0.0002")
    fails(capsys, f"sample --out {run} --gan vanilla", "--gan vanilla", "hinge")
    fails(capsys, f"evaluate --out {run} --version V1", "V1", "V2")


def test_a_finished_run_says_so(run, capsys):
    config = (run / "config.json").read_text()
    fails(capsys, f"--resume --out {run} --steps 6", "finished at step 6", "--steps")
    fails(capsys, f"--resume --out {run} --steps 2", "finished at step 6", "--steps")
    assert (run / "config.json").read_text() == config     # a refused call changes nothing


def test_init_starts_anew_from_the_weights(run):
    """Fine-tuning: G and D as in the file, Adam and the counters from nothing."""
    cfg = dataclasses.replace(Config(), **SMALL, d_norm="spectral",
                              init=(str(run / "checkpoint.pt"),))
    state = lab2pix.build(cfg, torch.device("cpu"))
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
    for folder in ("in", "inst"):
        label_map(Path(folder) / "a.png")
        label_map(Path(folder) / "b.png", 64, 20)
    call(f"sample --out {run} --input in/a.png --instances inst/a.png --output photo.png")
    with Image.open("photo.png") as image:
        assert image.size == (53, 37)
    call(f"sample --checkpoint {run / 'checkpoint.pt'} --input in --instances inst --output photos")
    sizes = {p.name: Image.open(p).size for p in Path("photos").iterdir()}
    assert sizes == {"a.png": (53, 37), "b.png": (20, 64)}
    assert Path("photo.png").read_bytes() == Path("photos/a.png").read_bytes()
    call(f"sample --out {run} --input in/a.png --instances inst --output big.png --size 64 96")
    with Image.open("big.png") as image:
        assert image.size == (96, 64)


def test_instances_are_asked_for(run, capsys):
    label_map(Path("a.png"))
    fails(capsys, f"sample --out {run} --input a.png", "a.png", "--instances")
    fails(capsys, f"sample --out {run} --input a.png --instances nowhere.png", "nowhere.png")
    fails(capsys, f"sample --out {run} --input a.png --instances {label_map(Path('b.png'), 9, 9)}",
          "b.png", "9")


def test_samples_differ_by_noise_and_repeat_by_seed(run):
    label_map(Path("a.png"))
    line = f"sample --out {run} --input a.png --instances a.png"
    for folder in ("one", "two"):
        call(f"{line} --output {folder} --samples 2")
    call(f"{line} --output three --seed 7")
    call(f"{line} --output four --seed 7 --truncation 0")
    read = {str(p): p.read_bytes() for p in Path(".").glob("*/a*.png")}
    assert read["one/a_1.png"] == read["two/a_1.png"] and read["one/a_2.png"] == read["two/a_2.png"]
    assert len({read["one/a_1.png"], read["one/a_2.png"], read["three/a.png"],
                read["four/a.png"]}) == 4


def test_sampling_never_overwrites_its_input(run):
    source = label_map(Path("in/a.png"))
    before = source.read_bytes()
    for line in ("--input in --output in", "--input in/a.png --output in/a.png"):
        with pytest.raises(UserError, match="in"):
            call(f"sample --out {run} {line} --instances in")
    assert source.read_bytes() == before


def test_training_and_sampling_on_two_lists(capsys):
    """V1 from sketches: trainA and trainB have neither names nor sizes nor numbers in common."""
    data = two_lists(Path("data"))
    line = f"{TINY_V1} --data {data} --limit 0 --steps 2 --out r"
    fails(capsys, line, "--task sketch")
    call(f"{line} --task sketch")
    picture(Path("drawing.jpg"), 41, 29)
    call("sample --out r --input drawing.jpg --output o.png")
    with Image.open("o.png") as image:
        assert image.size == (29, 41)
    call("evaluate --out r")
    metrics = json.loads(Path("r/metrics.json").read_text())
    assert metrics["images"] == 3 and metrics["VGG distance"] > 0 and "PSNR" not in metrics
    assert "Table 4" in capsys.readouterr().out


def test_labels_and_photos_of_a_paired_layout_are_shuffled_apart(monkeypatch):
    """From label and photo folders: the label side does not even know where the photos are."""
    for split in ("train", "test"):
        for i in range(3):
            label_map(Path(f"data/{split}_label/{i}.png"), 130, 140)
            picture(Path(f"data/{split}_img/{i}.png"), 130, 140, i)
    data = lab2pix.Unpaired(common.Dataset("data", "train", (128, 128), unpaired=True))
    assert [set(files) for files in data.labels.files] == [{"label"}] * 3
    assert [set(files) for files in data.photos.files] == [{"image"}] * 3
    call(f"{TINY_V1} --data data --limit 0 --batch-size 1 --steps 1 --out r")
    call("sample --out r --output o")
    assert len(list(Path("o").iterdir())) == 3


# --------------------------------------------------------------------------- Released checkpoints

def theirs(state: dict, names: list[tuple[str, str]]) -> dict:
    """Our weights under the authors' keys: gamma and beta apart, spectral norm the old way."""
    out = {}
    for key, value in state.items():
        key = key.replace("parametrizations.weight.original", "weight_orig")
        key = re.sub(r"parametrizations\.weight\.0\._([uv])", r"weight_\1", key)
        if re.search(r"norm_[01s]\.norm\.(weight|bias)", key):
            continue                                       # they have no batch norm with a gain
        for ours, name in names:
            key = re.sub(ours, name, key)
        if "gamma_beta" in key:
            gamma, beta = value.chunk(2)
            mul, add = ("mul_conv", "add_conv") if "SPADE" in key else ("mlp_gamma", "mlp_beta")
            out |= {key.replace("gamma_beta", mul): gamma, key.replace("gamma_beta", add): beta}
        else:
            out[key] = value
    return out


BLOCKS = ["head_0", "G_middle_0", "G_middle_1", "up_0", "up_1", "up_2", "up_3", "up_4"]
V2_NAMES = [(r"blocks\.(\d)", lambda k: BLOCKS[int(k[1])]), (r"\.norm\.", ".param_free_norm."),
            (r"shared", "mlp_shared.0"), (r"^head\.", "conv_img."),
            (r"globe\.heads\.(\d)", lambda k: f"fpencoder.model_up.{4 - int(k[1])}.1"),
            (r"globe\.down\.(\d)", lambda k: f"fpencoder.model_down.{2 * int(k[1])}")]
V1_NAMES = [(r"^lsca\.(\d)\.merge", lambda k: f"SPADEResBlock_{int(k[1]) + 5}_fusion.input1.0"),
            (r"^lsca\.(\d)\.label",
             lambda k: f"SPADEResBlock_{int(k[1]) + 5}_fusion.seg_process.0"),
            (r"^lsca\.(\d)\.mask", lambda k: f"SPADEResBlock_{int(k[1]) + 5}_fusion.mask.0"),
            (r"^heads\.(\d)", lambda k: f"out_{int(k[1]) + 5}.0"), (r"^fc\.", "noise_process."),
            (r"^encoder\.layers", "encoder.model"), (r"shared", "common_conv.0"),
            (r"conv_([01])", lambda k: f"SPADE_{int(k[1]) + 1}_.1"), (r"conv_s", "SPADE_res_.1"),
            (r"norm_([01])", lambda k: f"SPADE_{int(k[1]) + 1}"), (r"norm_s", "SPADE_res")]


def test_released_v2_generator_samples_without_flags(capsys):
    """Keys of the fact sheet: four doublings, N = 36, first feature from the label."""
    G = lab2pix.GeneratorV2(36, (64, 64), 2, 4, 4, first="label").eval()
    torch.save(theirs(G.state_dict(), V2_NAMES), "latest_net_G.pth")
    content = torch.load("latest_net_G.pth")
    assert content["fpencoder.model_up.0.1.weight"].equal(G.globe.heads[4].weight)
    assert {"head_0.norm_0.mlp_gamma.weight", "up_0.conv_s.weight_orig", "conv_img.bias",
            "up_1.norm_s.param_free_norm.running_var", "up_2.norm_1.mlp_shared.0.weight",
            "fpencoder.model_down.8.weight_v", "fc.weight"} <= set(content)
    label_map(Path("a.png"))
    fails(capsys, "sample --checkpoint latest_net_G.pth --gpu -1", "--input")
    line = "sample --checkpoint latest_net_G.pth --gpu -1 --input a.png --instances a.png"
    call(f"{line} --output o.png")
    with Image.open("o.png") as image:
        assert image.size == (53, 37)
    cfg, state = lab2pix.load_for_test({"gpu": -1}, {"checkpoint": "latest_net_G.pth",
                                                     "input": "a.png"})
    assert (cfg.ups, cfg.width, cfg.first, cfg.edges, cfg.classes) == (4, 2, "label", True,
                                                                       "cityscapes")
    m = torch.rand(1, 36, 64, 64)
    torch.testing.assert_close(state.generator.eval()(None, m)[0], G(None, m)[0])


@pytest.mark.parametrize("sketch", [False, True])
def test_released_v1_generator_loads(sketch):
    options = dict(n=1, ups=5, sketch=True) if sketch else dict(n=35, ups=7, noise=8)
    G = lab2pix.GeneratorV1(size=(128, 256), width=2, dgnorm=False, form="v1code", **options)
    names = V1_NAMES + [(r"blocks\.(\d)", lambda k: f"SPADEResBlock_{int(k[1]) + 1 + 2 * sketch}")]
    content = theirs(G.eval().state_dict(), names)
    if sketch:
        content["noise_process.weight"] = torch.zeros(16, 4)          # there, but without effect
    torch.save(content, "net_G.pth")
    assert {"SPADEResBlock_3.SPADE_1.common_conv.0.weight", "SPADEResBlock_7.SPADE_res_.1.bias",
            "SPADEResBlock_5_fusion.input1.0.weight", "out_7.0.weight",
            "SPADEResBlock_6.SPADE_2.mul_conv.weight"} <= set(content)
    given = {"gpu": -1, "size": (128, 256)}
    cfg, state = lab2pix.load_for_test(given, {"checkpoint": "net_G.pth", "input": "a.png"})
    m, z = torch.rand(1, options["n"], 128, 256), torch.randn(1, 8)
    for a, b in zip(state.generator.eval()(z, m), G(z, m)):
        torch.testing.assert_close(a, b)
    assert cfg.form == "v1code" and cfg.version == "V1"


def test_released_discriminators_load(capsys):
    """V2's one file, V1's three, SPADE's: with the VGG inside theirs left out."""
    def fold(k):
        return str(int(k[2]) * 2 // 3)

    v2 = [(r"scales\.(\d)", r"discriminator_\1"), (r"common\.([12])\.0", r"common.\1.0.0"),
          (r"pre\.(\d)\.0", lambda k: f"pre{int(k[1]) + 1}.0.0"),
          (r"join\.(\d)\.0", lambda k: f"gcb{int(k[1]) + 1}.0.0"),
          (r"out\.(\d)\.0", lambda k: f"conv{int(k[1]) + 1}_out.0.0"),
          (r"out\.(\d)\.3", lambda k: f"conv{int(k[1]) + 1}_out.2"),
          (r"line\.(\d)\.", lambda k: f"conv{int(k[1]) + 1}_line.0."),
          (r"pool\.1", "pool_branch.1.0"),
          (r"(three)\.(\d)", lambda k: f"conv3_branch.{fold(k)}.0"),
          (r"(five)\.(\d)", lambda k: f"conv5_branch.{fold(k)}.0")]
    v1 = [(r"scales\.\d\.", ""), (r"common\.(\d)\.0", lambda k: f"common.{3 * int(k[1])}"),
          (r"join\.(\d)\.0", lambda k: f"gcb{int(k[1]) + 1}.0"),
          (r"out\.(\d)\.2", lambda k: f"conv{int(k[1]) + 1}_out.2"),
          (r"line\.(\d)\.", lambda k: f"conv{int(k[1]) + 1}_line.0."),
          (r"pool\.1", "pool_branch.1"), (r"three\.(\d)", r"conv3_branch.\1"),
          (r"five\.(\d)", r"conv5_branch.\1")]
    patch = [(r"scales\.(\d)", r"discriminator_\1"), (r"layers\.([123])\.0", r"model\1.0.0"),
             (r"layers\.0\.0", "model0.0"), (r"last", "model4.0")]
    vgg = {"backboneNet.slice1.0.weight": torch.zeros(1)}
    for names, extra in ((v2, {}), (patch, dict(discriminator="patch", T=1.0))):
        cfg = dataclasses.replace(lab2pix.configure("toy"), **SMALL | extra, seed=1,
                                  d_norm="both")
        D = lab2pix.build(cfg, torch.device("cpu")).discriminator
        torch.save(theirs(D.state_dict(), names) | (vgg if not extra else {}), "net_D.pth")
        other = dataclasses.replace(cfg, seed=2, init=("net_D.pth",))
        assert_same(dict(lab2pix.build(other, torch.device("cpu")).discriminator.state_dict()),
                    dict(D.state_dict()))
    cfg = dataclasses.replace(lab2pix.configure("toy-V1"), **SMALL | dict(ups=5), seed=1,
                              d_norm="instance")
    D = lab2pix.build(cfg, torch.device("cpu")).discriminator
    files = []
    for k, name in enumerate(("D1", "D2", "D3")):          # theirs: D1 sees the largest image
        part = {key: v for key, v in D.state_dict().items() if key.startswith(f"scales.{k}.")}
        torch.save({**theirs(part, v1), **vgg}, f"net_{name}.pth")
        files.append(f"net_{name}.pth")
    other = dataclasses.replace(cfg, seed=2, init=tuple(files))
    assert_same(dict(lab2pix.build(other, torch.device("cpu")).discriminator.state_dict()),
                dict(D.state_dict()))
    fails(capsys, "sample --checkpoint net_D1.pth --gpu -1 --input a.png", "discriminator")


# -------------------------------------------------------------------------------------- Evaluation

def test_evaluate_writes_the_papers_metrics(run, capsys):
    call(f"evaluate --out {run} --scorer-width 2 --scorer-steps 3 --vgg random --limit 3")
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").unlink()
    assert metrics["images"] == 3 and metrics["PSNR"] > 0 and -1 <= metrics["SSIM"] <= 1
    assert metrics["VGG distance"] > 0 and "FID (torchvision)" not in metrics
    for row in ("output", "truth"):
        assert set(metrics[row]) == {"per-pixel acc", "per-class acc", "class IOU"}
    assert len(metrics["worst classes"]) == 5
    text = " ".join(capsys.readouterr().out.split())
    assert "0.936 0.738 0.646 45.500" in text and "Table 5, SPADE" in text
    fails(capsys, f"evaluate --out {run} --scorer-width 2 --scorer-steps 3 --vgg random "
                  f"--inception {run / 'checkpoint.pt'}", "Inception")


# ---------------------------------------------------------------------------- Damage and bad values

def test_check_mode_reports_and_trains_nothing(capsys):
    call("check --size 64 64 --limit 3")
    text = capsys.readouterr().out
    assert "streets" in text and "road" in text
    assert not list(Path(".").rglob("checkpoint.pt"))
    assert len(list(Path(".").rglob("contact_*.png"))) == 2


def test_trace_prints_stages_and_parameters(capsys):
    call(f"trace {TINY}")
    text = capsys.readouterr().out
    parameters = sum(p.numel() for p in lab2pix.GeneratorV2(13, (64, 64), 2, 4, 4).parameters())
    assert f"{parameters:,}" in text and "(2, 2, 64, 64)" in text and "(2, 1, 8, 8)" in text
    assert "GFLOP" in text and "GiB" in text
    call(f"trace {TINY_V1}")
    assert "LSCA" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["sample --checkpoint", "train --steps 1 --init"])
def test_foreign_and_damaged_checkpoints(run, capsys, mode):
    whole, content = (run / "checkpoint.pt").read_bytes(), stored(run)
    Path("cut.pt").write_bytes(whole[:len(whole) // 2])
    Path("empty.pt").write_bytes(b"")
    torch.save(content | {"script": "pix2pixhd"}, "other.pt")
    torch.save({"script": "lab2pix", "config": Trap()}, "trap.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"epoch": 3, "state_dict": {}}, "foreign.pt")
    torch.save({0: torch.zeros(1)}, "numbers.pt")
    torch.save({"noise_process.weight": torch.zeros(4, 3), "epoch": 3}, "mixed.pt")
    for name, *words in (("cut.pt", "damaged"), ("empty.pt", ""), ("other.pt", "pix2pixhd"),
                         ("trap.pt", "damaged"), ("list.pt", "list"), ("foreign.pt", ""),
                         ("numbers.pt", ""), ("mixed.pt", ""), ("missing.pt", "no such file")):
        fails(capsys, f"{mode} {name} {TINY if 'init' in mode else '--gpu -1'}", name, *words)
    assert not Path("sprung").exists()


def test_checkpoint_of_another_version(run, capsys):
    content = stored(run)
    content["config"]["frobnicate"] = 1
    torch.save(content, "newer.pt")
    fails(capsys, "sample --checkpoint newer.pt --gpu -1", "newer.pt", "frobnicate")


@pytest.mark.parametrize("flags, words", [
    ("--size 60 40", ["60 40", "64"]), ("--betas 2 0.9", ["--betas", "2"]),
    ("--size 0 64", ["0 64"]), ("--batch-size 0", ["--batch-size 0"]),
    ("--lr -1", ["-1"]), ("--lr nan", ["nan"]), ("--gain -1", ["--gain -1"]),
    ("--classes x", ["x", "cityscapes"]), ("--limit -1", ["--limit -1"]),
    ("--width 0", ["--width 0"]), ("--steps -3", ["--steps -3"]), ("--epochs -1", ["-1"]),
    ("--lambda-2 -1", ["-1"]), ("--lambda-6 inf", ["inf"]), ("--ups 3", ["--ups 3", "4"]),
    ("--T 0.5", ["--T 0.5"]), ("--workers -1", ["--workers -1"]), ("--scales 4", ["4", "3"]),
    ("--task edges", ["--task edges", "V1"]), ("--pg", ["--pg"]), ("--lsca", ["--lsca"]),
    ("--lambda-4 10", ["--lambda-4", "V1"]), ("--discriminator patch", ["--T"]),
    ("--ablation H_u --version V2", ["--ablation H_u", "V1", "V2"]), ("--version V3", ["V3"]),
    ("--version V1 --ups 5 --lambda-5 10", ["--lambda-5", "V1"]),
    ("--version V1 --ups 5 --edges", ["--edges"]),
    ("--version V1 --ups 7 --size 128 128 --batch-size 1", ["one pixel"]),
    ("--form v1code", ["v1code"]), ("--batch-size 6", ["--batch-size 6", "5"]),
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
    ("sample --input nowhere.png --instances nowhere.png", ["nowhere.png"]),
    ("sample --samples 0", ["--samples 0"]),
    ("sample --samples -1", ["--samples -1"]), ("sample --limit 1 --output o/x.xyz", ["x.xyz"])])
def test_mistakes_at_test_time(run, capsys, line, words):
    if "x.xyz" in line:
        label_map(Path("a.png"))
        line += " --input a.png --instances a.png"
    fails(capsys, f"{line} --checkpoint {run / 'checkpoint.pt'}", *words)


def test_flags_that_the_mode_ignores_are_refused(run, capsys):
    """A flag that nothing reads is a lie to the user."""
    fails(capsys, f"{TINY} --steps 1 --out r --input a.png", "--input")
    fails(capsys, f"{TINY} --steps 1 --out r --samples 3", "--samples")
    fails(capsys, f"--resume --out {run} --steps 9 --preset V2-coco", "--preset")


def test_trace_with_too_few_images(capsys):
    fails(capsys, f"trace {TINY} --batch-size 6", "--batch-size 6")


def test_a_damaged_image_is_one_line_even_from_a_worker(capsys):
    """The workers' own traceback must not reach the user."""
    data = two_lists(Path("data"))
    whole = Path("data/trainB/photo1.png").read_bytes()
    Path("data/trainB/photo1.png").write_bytes(whole[:len(whole) - 400])
    for workers in (0, 1):
        text = fails(capsys, f"{TINY_V1} --task sketch --data {data} --steps 9 --batch-size 1 "
                             f"--out r{workers} --workers {workers}", "data/trainB/photo1.png")
        assert "Traceback" not in text


# ------------------------------------------------------------------------ NaN, full disks, signals

def test_nan_stops_with_its_name_and_keeps_the_checkpoint(capsys, monkeypatch):
    """Weights that become infinite after step 3: the loss and its step are named."""
    call(f"{TINY} --steps 3 --out r")
    before, step = Path("r/checkpoint.pt").read_bytes(), lab2pix.train_step

    def broken(state, batch, cfg):
        if state.step == 4:                                # the fifth step
            with torch.no_grad():
                state.generator.head.weight.fill_(torch.inf)
        return step(state, batch, cfg)

    with monkeypatch.context() as patch:
        patch.setattr(lab2pix, "train_step", broken)
        text = fails(capsys, "--resume --steps 9 --out r", "step 5", "nan", "--lr")
    assert re.search(r"\b(g_adv|g_vgg|g_fm|d_fake)\b", text)
    assert Path("r/checkpoint.pt").read_bytes() == before
    call("--resume --steps 4 --out r")


def test_nan_weights_are_never_saved(capsys, monkeypatch):
    """An update can ruin the weights while its own loss was still finite: at step 6, a save."""
    call(f"{TINY} --steps 3 --out r")
    step = lab2pix.train_step

    def broken(state, batch, cfg):
        losses = step(state, batch, cfg)
        if state.step == 5:                                # the sixth step; its losses are fine
            with torch.no_grad():
                state.generator.head.weight.fill_(torch.nan)
        return losses

    monkeypatch.setattr(lab2pix, "train_step", broken)
    fails(capsys, "--resume --steps 9 --out r", "nan")
    assert all(v.isfinite().all() for v in stored("r")["generator"].values())


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
    assert lab2pix.pick_device(Config()).index == 1
    with pytest.raises(UserError, match="--gpu 0"):
        lab2pix.pick_device(Config(gpu=0))


# ----------------------------------------------------------------------------- Several processes

def test_torchrun_makes_one_run_which_one_process_can_resume():
    line = TINY.replace("--batch-size 2", "--batch-size 1")
    result = torchrun(f"{SCRIPT} {line} --steps 3")
    assert result.returncode == 0, result.stderr[-3000:]
    assert [p.name for p in Path("runs").iterdir()] == ["lab2pix-1"]
    content = stored("runs/lab2pix-1")
    assert (content["step"], content["epoch"], content["seen"]) == (3, 1, 2)     # 2 of 4 images
    assert not any(k.startswith("module.") for k in content["generator"])
    call("--resume --steps 5")
    content = stored("runs/lab2pix-1")
    assert (content["step"], content["epoch"]) == (5, 1)     # one process: one image a step


WORKER = """
import sys, torch, lab2pix
from dataclasses import replace
images = torch.load("images.pt")
for version, extra in (("V1", dict(ups=5, s_width=2, s_size=64)), ("V2", {})):
    small = dict(size=(64, 64), width=2, noise=4, d_width=2, vgg_width=2, vgg="random", ups=4)
    cfg = replace(lab2pix.configure("toy", version=version), **small | extra, classes="streets",
                  gpu=-1, seed=5)
    state, rank = lab2pix.build(cfg, lab2pix.pick_device(cfg)), torch.distributed.get_rank()
    for step in range(2):
        torch.manual_seed(10 * step + rank)
        h, w = cfg.size
        item = {k: v[rank:rank + 1, ..., :h, :w] for k, v in images.items()}
        lab2pix.train_step(state, lab2pix.make_pair(item, cfg), cfg)
    nets = {k: getattr(state, k) for k in lab2pix.NETWORKS if getattr(state, k) is not None}
    torch.save({k: (v.module.state_dict(), {n: p.grad for n, p in v.module.named_parameters()})
                for k, v in nets.items()}, f"{version}-{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_average_the_gradients_of_two_images():
    """V1 and V2, two steps: both processes hold the same weights, and the same mean gradients."""
    torch.manual_seed(0)
    label = torch.randint(0, 12, (2, 16, 16)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    torch.save({"label": label, "instance": label, "image": torch.rand(2, 3, 128, 128) * 2 - 1},
               "images.pt")
    Path("worker.py").write_text(WORKER)
    result = torchrun("worker.py")
    assert result.returncode == 0, result.stderr[-3000:]
    for version in ("V1", "V2"):
        both = [torch.load(f"{version}-{rank}.pt") for rank in (0, 1)]
        assert len(both[0]) == (3 if version == "V1" else 2)
        for name in both[0]:
            (weights, grads), (others, theirs_too) = both[0][name], both[1][name]
            for key in grads:
                assert torch.equal(weights[key], others[key]), (version, name, key)
                assert torch.equal(grads[key], theirs_too[key]), (version, name, key)


# --------------------------------------------------------------------------------- The help text

@pytest.mark.parametrize("flag", ["direction", "task", "lr", "T", "width", "gan", "lambda_5"])
def test_help_tells_the_default_of_a_folder(flag, monkeypatch):
    """What the help gives in brackets is what `--data DIR` alone trains with."""
    seen = []
    monkeypatch.setattr(lab2pix, "train", lambda cfg, *a: seen.append(cfg))
    call("--data somewhere")
    action, = (a for a in lab2pix.parser()._actions if a.dest == flag)
    told = re.findall(r"\(([^()]*)\)$", action.help)[-1]
    assert told == str(getattr(seen[0], flag))
