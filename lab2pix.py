"""Lab2Pix: photos from label maps, with pairs (V2) and without any (V1).

J. Zhu, L. Gao, J. Song, Y.-F. Li, F. Zheng, X. Li, H. T. Shen. Label-Guided Generative Adversarial
Network for Realistic Image Synthesis. TPAMI 2022. Section, equation and table numbers are its own.

Idea. A label map says little, so G must get all there is out of it: residual blocks whose
normalisation is steered by each pixel's class and by a global feature of the whole map (DG-Norm),
and attention that keeps what coarser layers have done well (LSCA). A strong judge pulls the images
towards photos: three discriminators, each judging at several depths with VGG-16 beside it
(hierarchical, perceptual), more strictly on foreground objects, and told that blurred photos are
fakes. With pairs (V2) D also sees the label. Without (V1) a segmentation network, trained together
with G, must find the label again in the generated image: that alone ties image and label.

Symbols     M batch["input"], labels or sketch    Y batch["image"]    X = G(z, M)    z noise
            X_3 full size, X_2 half, X_1 a quarter (lists run from X_3 on)    Y^f blurred photos
            D_i^l level l of discriminator i    W foreground mask    H global feature    S_i ICNet

Paper map   (a test reads these lines: every name must exist, and nothing numbered may be missing)
    Eq. (1)     generative residual block          GenResBlk
    Eq. (2)     global encoder                     GlobalEncoder
    Eq. (3-4)   batch norm                         DGNorm
    Eq. (5)     DG-Norm                            DGNorm, with --form eq5
    Eq. (6)     residual block with DG-Norm        GenResBlk
    Eq. (7)     spatial co-attention               LSCA
    Eq. (8)     hierarchical discriminators        PerceptualDiscriminator, Discriminators
    Eq. (9)     foreground enhancement mask        foreground_mask
    Eq. (10)    adversarial loss of G              generator_loss
    Eq. (11)    adversarial loss of D              discriminator_loss
    Eq. (12)    its fake part                      fake_loss
    Eq. (13)    its real part                      real_loss
    Eq. (14)    weighted mean, level weights       expectation, hierarchical
    Eq. (15)    GAN loss, both players             step_v1
    Eq. (16)    sharpness enhancement              sharpness_loss, blur
    Eq. (17)    G of V1                            GeneratorV1
    Eq. (18)    image consistency                  consistency_loss
    Eq. (19)    cycle segmentation                 cycle_segmentation_loss, ICNet
    Eq. (20)    objective of V1                    step_v1
    Eq. (21)    G of V2                            GeneratorV2
    Eq. (22)    D sees the label, too              with_label
    Eq. (23)    discriminators of V2               Discriminators
    Eq. (24)    adversarial loss of G, V2          generator_loss
    Eq. (25)    adversarial loss of D, V2          discriminator_loss
    Eq. (26)    its fake part, V2                  fake_loss
    Eq. (27)    its real part, V2                  real_loss
    Eq. (28)    perceptual loss                    perceptual_loss
    Eq. (29)    feature matching                   feature_matching_loss
    Eq. (30)    sharpness enhancement, V2          sharpness_loss
    Eq. (31)    objective of V2                    step_v2
    Eq. (32)    GAN loss of V2                     step_v2
    Table 1     ablation of V1, A_u to H_u         ABLATIONS, evaluate
    Table 2     ablation of V2, A_s to E_s         ABLATIONS, evaluate
    Table 3     unpaired, Cityscapes and Facades   evaluate, psnr, ssim
    Table 4     FID, memory and time of sketches   evaluate, frechet_distance, trace
    Table 5     paired, three data sets            evaluate
    Table 6     user study                         needs people; sample makes its images
    Fig. 1      samples of V1 and V2               sample
    Fig. 2      the framework                      step_v1, step_v2
    Fig. 3      adaptive label encoder             GeneratorV1, SketchEncoder
    Fig. 4      DG-Norm                            DGNorm
    Fig. 5      co-attention map A_m               LSCA
    Fig. 6      hierarchical discriminator         PerceptualDiscriminator, MiniInception
    Fig. 7      V1                                 step_v1
    Fig. 8      V2                                 step_v2
    Fig. 9      rows of Table 1 side by side       sample, with --ablation
    Fig. 10     rows of Table 2 side by side       sample, with --ablation
    Fig. 11-12  V1, labels and sketches            sample, with --version
    Fig. 13     V2 beside other methods            sample
    Fig. 14     V2-H beside V2                     sample, PRESETS
    Fig. 15-16  V2 beside other methods            sample
    Fig. 17     failures: rare things              evaluate, which prints the worst classes
    Fig. 18-21  random samples of V2               sample

Paper                             | Released code                     | Here
    Eq. (4): sum E^2 - mu         | batch norm                        | Misprint: mu squared
    Eq. (5): gamma (BN + 1) + beta| V2 (1 + gamma) BN + beta,         | V2's, which starts at BN;
                                  |   V1 gamma IN + beta              |   --form eq5, v1code
    BN has gamma and beta         | it has none                       | it has; files without load
    V2 takes z                    | V2: the small label map instead   | z; --first label
    z and sketch concatenated     | V1: z computed, then unused       | concatenated
    labels are resized            | V1: max-pooled ids                | nearest; sketches averaged
    A_m from features and label   | V1: from normalised convolutions  | paper; --form v1code
    two encoder blocks in V2      | three, as SPADE                   | three; A_s is SPADE
    Eq. (10): G and D share L^R   | hinge: G minimises -D             | as released
    (12-13): sum over D_i         | V2: a mean with slipped weights   | sum
    W of its own sample           | V2: the batch's mean, by accident | its own
    Y^f: halved and doubled       | V2: the full image alone          | every Y_i, average pool
    Eq. (18): a norm              | V1: mean square, VGG-19           | norm, per image
    Eq. (19): size not said       | S_i enlarged to the label         | the same
    a sketch has two classes      | V1: regression to the sketch      | two classes
    four losses in V1             | a fifth, VGG-19 to a random photo | four
    VGG-16 as trained on ImageNet | V1: overwritten by random numbers | as trained
    VGG's input not stated        | V1, (28): [-1, 1] as it is        | normalised; --vgg-raw
    Eq. (28): sum over scales;    | full size alone; sum over layers, | paper; --released-losses
      (29): mean over layers      |   mean over D_i                   |
    lr 2e-4 for all               | V2: G 1e-4, D 4e-4                | paper; --ttur
    lambda_2 rises from 0 to 1    | V1: off unless asked              | rises
    norms of D not stated         | V1 instance norm; V2 with         | as released; --d-norm
                                  |   spectral norm besides           |
    V2's input: the label         | and the instances' edges          | with them; --no-edges
    a sketch's encoder not shown  | V1: five 3 x 3 after a 5 x 5      | as released
    initialisation not stated     | V1 N(0, 0.02); V2 Xavier, skips   | so, nothing skipped
                                  |   layers with spectral norm       |
    foreground not listed         | Cityscapes; ADE20K, COCO by ids   | as released, ids shifted
                                  |   off by one                      |   to where they belong
    baseline's D not described    | SPADE's D in V2                   | SPADE's, in Eq. (10-16)
    z at test time                | V1: the mean of ten draws         | N(0, I); --truncation
    FCN, DRN-D-105, DeepLab score | not released                      | FCN-8s, on your photos
    FID                           | not released                      | VGG distance; --inception

Run         python lab2pix.py                               built-in streets, minutes on a laptop
            python lab2pix.py --version V1                  the same, without a single pair
            python lab2pix.py --data ./cityscapes --gpu 0   the last line of Table 2
"""

import argparse
import copy
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import matplotlib
import matplotlib.figure
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DistributedSampler, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import common
from common import UserError, class_table, colour_label, notice

# --------------------------------------------------------------------------------- 1 Config

@dataclass
class Config:
    """The defaults are the paper's for V2 on Cityscapes (Sec. 5.2); VERSIONS has the others."""
    # The task
    data: str = ""                   # folder; "" is the built-in streets
    version: str = "V2"              # V1 without pairs, V2 with, V2-H at 512 x 1024     Sec. 4
    ablation: str = ""               # the row of Table 1 or 2 that these settings are; a note
    task: str = "labels"             # or sketch (1 channel, given), edges (made from the photos)
    direction: str = "AtoB"          # of pairs of images: which half is the sketch
    classes: str = ""                # a table of common.py, or a number; "" asks the data
    edges: bool = True               # V2: instances' edges beside the labels; released code
    size: tuple[int, int] = (256, 512)       # height, width of the images, pixels       Sec. 5.2
    jitter: bool = False             # enlarge by 286/256 and crop; released, COCO and ADE20K
    mirror: bool = True              # flip left and right, half the time; released code
    limit: int = 0                   # use the first so many examples; 0 is all
    # The generator
    width: int = 64                  # channels before the output; the first feature has 16 times
    ups: int = 6                     # doublings in G; released code: 6, 5 at 256 x 256, 7 in V2-H
    noise: int = 128                 # length of z                                       Sec. 4.1.1
    first: str = "noise"             # the first feature from z, or from the label (SPADE)
    dgnorm: bool = True              # global encoder and DG-Norm; without: SPADE        Sec. 3.1.2
    form: str = "paper"              # (1 + gamma) BN + beta; eq5: as printed; v1code: see the table
    smooth: bool = False             # enlarge features bilinearly: ours, against stripes
    gain: float = 0.02               # of Xavier's initial weights, SPADE's; 0: N(0, 0.02), as V1
    loud: bool = False               # labels are seen in G's first images: ours, for short V1 runs
    pg: bool = False                 # progressive generation: V1's three outputs        Sec. 4.1.1
    lsca: bool = False               # co-attention, in V1 only                          Sec. 3.1.3
    # The discriminators
    discriminator: str = "hpd"       # hierarchical and perceptual; or patch, SPADE's    Sec. 3.2.1
    d_width: int = 64                # channels after the first layer of D; released code
    d_norm: str = "both"             # of D: instance (released V1), spectral, or both (V2)
    scales: int = 2                  # of D_3, D_2, D_1 the first so many                Sec. 5.2
    # The objective
    gan: str = "hinge"               # V2; vanilla in V1                                 Sec. 5.2
    T: float = 5.0                   # foreground weighs T times the background; 1: W = 1  Sec. 5.2
    lambda_2: float = 1.0            # sharpness enhancement, Eq. (16) and (30)          Sec. 5.2
    ramp: bool = False               # lambda_2 rises from 0 over the run: V1            Sec. 5.2
    lambda_3: float = 0.0            # image consistency, Eq. (18); 5e-6 in V1           Sec. 5.2
    lambda_4: float = 0.0            # cycle segmentation, Eq. (19); 10 in V1            Sec. 5.2
    lambda_5: float = 10.0           # perceptual loss, Eq. (28)                         Sec. 5.2
    lambda_6: float = 10.0           # feature matching, Eq. (29)                        Sec. 5.2
    released_losses: bool = False    # Eq. (28) at full size alone; (29) over layers a sum
    s_width: int = 32                # channels after the first layer of S_i; released code
    s_size: int = 256                # S_i sees squares of so many pixels; released code
    # Training
    epochs: int = 200                # passes over the training set                      Sec. 5.2
    decay: bool = True               # in the second half the rate falls; 100 + 100      Sec. 5.2
    steps: int = 0                   # end after so many updates; 0 leaves it to epochs
    batch_size: int = 20             # per process; the paper's 20 were on four GPUs     Sec. 5.2
    lr: float = 2e-4                 # Adam's, all networks                              Sec. 5.2
    ttur: bool = False               # released V2: half of it for G, twice for D
    betas: tuple[float, float] = (0.0, 0.9)      # Adam's; (0.5, 0.999) in V1           Sec. 5.2
    seed: int = 0                    # of initialisation, order, flips and z
    init: tuple[str, ...] = ()       # start from these weights: ours, or released ones
    save_every: int = 0              # steps between checkpoints and grids; 0 is each epoch
    # VGG, test time and evaluation
    vgg: str = "imagenet"            # VGG-16's and VGG-19's weights: imagenet, random, or a file
    vgg_width: int = 64              # 64 is VGG; less, with vgg random, for small studies
    vgg_raw: bool = False            # VGG sees [-1, 1]; else ImageNet's mean and deviation
    truncation: float = 1.0          # deviation of z at test time; released V1: 0.316
    inception: str = ""              # Inception-V3 for FID: imagenet or a file; "" leaves it out
    scorer_width: int = 64           # FCN-8s scorer: 64 is VGG-16
    scorer_steps: int = 2000         # ours: batches of four photos that the scorer trains on
    # The machine
    gpu: int | None = None           # CUDA device; -1 the CPU; None the first GPU, else the CPU
    workers: int | None = None       # data processes; None is 4 with a GPU, else 0
    precision: str = "fp32"          # or bf16: autocast around the networks
    compile: bool = False            # torch.compile the networks
    channels_last: bool | None = None    # memory order; None is on with a GPU, off on the CPU
    out: str = ""                    # the run's folder; "" is the next free runs/lab2pix-N


# Sec. 5.2, what each version changes; SKETCH is V1 for sketches.
VERSIONS = {
    "V1": dict(version="V1", edges=False, ups=7, gain=0.0, pg=True, lsca=True, scales=3,
               d_norm="instance", gan="vanilla", T=2.0, ramp=True, lambda_3=5e-6, lambda_4=10.0,
               lambda_5=0.0, lambda_6=0.0, epochs=100, batch_size=1, betas=(0.5, 0.999)),
    "V2": dict(version="V2"),
    "V2-H": dict(version="V2-H", size=(512, 1024), ups=7, scales=3, batch_size=8)}
SKETCH = dict(size=(256, 256), ups=5, T=1.0, ramp=False, epochs=10, decay=False, batch_size=4)
AT_256 = dict(size=(256, 256), ups=5, jitter=True, batch_size=40, epochs=100)
PRESETS = {
    "V1-cityscapes": dict(version="V1"),
    "V1-facades": dict(version="V1", size=(256, 256)),
    "V1-edges2shoes": dict(version="V1", task="sketch"),
    "V1-edges2handbags": dict(version="V1", task="sketch"),
    "V2-cityscapes": dict(version="V2"),
    "V2-coco": dict(version="V2", **AT_256),
    "V2-ade20k": dict(version="V2", **AT_256),
    "V2-H-cityscapes": dict(version="V2-H"),
    # Ours, for the streets on a laptop's CPU: narrow networks, so Adam's steps may be larger.
    "toy": dict(version="V2", size=(64, 128), limit=100, width=16, ups=4, noise=32, d_width=8,
                d_norm="spectral", gain=1.0, smooth=True, vgg="random", vgg_width=16, lr=5e-4,
                batch_size=2, epochs=7, scorer_width=16, scorer_steps=600),
    # With so few steps V1 needs more help: see speak_up and unit.
    "toy-V1": dict(version="V1", size=(64, 128), limit=100, width=8, ups=5, noise=32, d_width=8,
                   gain=1.0, loud=True, smooth=True, d_norm="spectral", s_width=4, s_size=64,
                   gan="hinge", lambda_4=0.03, ttur=True, lr=8e-4, betas=(0.0, 0.9), vgg="random",
                   vgg_width=16, batch_size=2, epochs=10, scorer_width=16, scorer_steps=600),
}
# The rows of Tables 1 and 2, each with what it adds to the row above it.
ROWS = {
    "A_u": dict(version="V1", pg=False, lsca=False, lambda_3=0.0, discriminator="patch", scales=2,
                T=1.0, lambda_2=0.0, dgnorm=False),               # SPADE and cycle segmentation
    "B_u": dict(pg=True, scales=3), "C_u": dict(lsca=True), "D_u": dict(lambda_3=5e-6),
    "E_u": dict(discriminator="hpd"), "F_u": dict(T=2.0), "G_u": dict(lambda_2=1.0),
    "H_u": dict(dgnorm=True),                                     # Lab2Pix-V1
    "A_s": dict(version="V2", discriminator="patch", T=1.0, lambda_2=0.0, dgnorm=False),   # SPADE
    "B_s": dict(discriminator="hpd"), "C_s": dict(T=5.0), "D_s": dict(lambda_2=1.0),
    "E_s": dict(dgnorm=True)}                                     # Lab2Pix-V2
ABLATIONS = {row: {k: v for above, changes in ROWS.items() if above[2] == row[2] and above <= row
                   for k, v in changes.items()} | {"ablation": row} for row in ROWS}
CHOICES = {
    "version": tuple(VERSIONS), "task": ("labels", "sketch", "edges"),
    "direction": ("AtoB", "BtoA"), "first": ("noise", "label"), "form": ("paper", "eq5", "v1code"),
    "discriminator": ("hpd", "patch"), "d_norm": ("instance", "spectral", "both"),
    "gan": ("vanilla", "hinge"), "precision": ("fp32", "bf16")}


def configure(preset: str = "", ablation: str = "", **given) -> Config:
    """The config of a version, a preset, a row of an ablation table, and settings that go before.

    configure("toy", "A_u"), configure(version="V1"), configure("V2-coco", batch_size=8).
    """
    row = ABLATIONS.get(ablation, {})
    if ablation and not row:
        raise UserError(f"--ablation {ablation}: choose one of {', '.join(ABLATIONS)}")
    if preset == "toy" and (given.get("version") or row.get("version")) == "V1":
        preset = "toy-V1"
    shape = PRESETS.get(preset, {})
    named = {name: part["version"] for name, part in
             (("--version", given), (f"--preset {preset}", shape), (f"--ablation {ablation}", row))
             if "version" in part and (name, part["version"]) != ("--preset toy", "V2")}
    if len(set(named.values())) > 1:
        raise UserError(" and ".join(f"{k} ({v})" for k, v in named.items()) + " contradict")
    version = next(iter(named.values()), "V2")
    if version not in VERSIONS:
        raise UserError(f"--version {version}: choose one of {', '.join(VERSIONS)}")
    task = given.get("task", shape.get("task", "labels"))
    sketch = SKETCH if task != "labels" else {}
    return replace(Config(), **VERSIONS[version] | sketch | shape | row | given)


def check_config(cfg: Config) -> None:
    """Absurd values and contradictions, each in one line, before anything is built."""
    for name, allowed in CHOICES.items():
        if getattr(cfg, name) not in allowed:
            raise UserError(f"{flag(name)} {getattr(cfg, name)}: choose one of "
                            + ", ".join(map(str, allowed)))
    bounds = dict.fromkeys(("batch_size", "epochs", "width", "noise", "d_width", "scales", "T",
                            "s_width", "vgg_width", "scorer_width", "scorer_steps"), 1)
    bounds |= dict.fromkeys(("limit", "steps", "save_every", "seed", "workers", "lambda_2",
                             "lambda_3", "lambda_4", "lambda_5", "lambda_6", "truncation",
                             "gain"), 0)
    bounds |= {"ups": 5 if cfg.version == "V1" else 4, "s_size": 64}
    highs = {"workers": 256, "ups": 8 if cfg.version == "V1" else 7, "scales": 3}
    for name, low in bounds.items():
        value, high = getattr(cfg, name), highs.get(name, 10 ** 9)
        if not low <= (low if value is None else value) <= high:
            raise UserError(f"{flag(name)} {value}: must lie in {low}..{high}")
    if not 0 < cfg.lr < 1:
        raise UserError(f"--lr {cfg.lr}: must lie between 0 and 1; the paper's is 0.0002")
    if not all(0 <= beta < 1 for beta in cfg.betas):
        raise UserError(f"--betas {cfg.betas[0]} {cfg.betas[1]}: both must lie in [0, 1)")
    v1, patch = cfg.version == "V1", cfg.discriminator == "patch"
    for wrong, name, why in (
            (cfg.loud and not v1, "loud", "V2 is told by the photo itself; it is for V1"),
            (not v1 and cfg.task != "labels", "task", f"{cfg.version} learns from label maps; "
             "sketches are for --version V1"),
            (not v1 and cfg.pg, "pg", "V2 has one output"),
            (not v1 and (cfg.lambda_3 or cfg.lambda_4), "lambda_3 and --lambda-4", "are V1's"),
            (v1 and (cfg.lambda_5 or cfg.lambda_6), "lambda_5 and --lambda-6", "compare with the "
             "photo of the same label, which V1 never sees"),
            (v1 and cfg.edges, "edges", "V1's segmentation could not find them again; --no-edges"),
            (v1 and cfg.first == "label", "first label", "is V2's (SPADE)"),
            (cfg.lsca and not cfg.pg, "lsca", "fuses the features of V1's three outputs: --pg"),
            (cfg.lambda_3 and not cfg.pg, "lambda_3", "compares V1's three outputs: --pg"),
            (cfg.pg and cfg.scales != 3, "scales", "must be 3 with V1's three outputs"),
            (patch and cfg.T != 1, "T", "the mask belongs to --discriminator hpd; use --T 1"),
            (cfg.task != "labels" and cfg.T != 1, "T", "a sketch has no foreground; use --T 1"),
            (cfg.form == "v1code" and (not v1 or cfg.dgnorm), "form v1code",
             "is V1 without DG-Norm: --version V1 --no-dgnorm")):
        if wrong:
            value = "" if " " in name else f" {getattr(cfg, name)}"
            raise UserError(f"{flag(name)}{value}: {why}")
    if cfg.s_size % 32:
        raise UserError(f"--s-size {cfg.s_size}: must be a multiple of 32")
    h, w = cfg.size
    unit = max(2 ** cfg.ups, 32)                # the deepest verdict of each D_i is at 1/32 of X_3
    least = max(unit, 64)
    if h % unit or w % unit or min(h, w) < least:
        near = [max(least, round(side / unit) * unit) for side in (h, w)]
        raise UserError(f"--size {h} {w}: with {cfg.ups} doublings in G and these discriminators "
                        f"both must be multiples of {unit}, {least} or more; the nearest is --size "
                        f"{near[0]} {near[1]}")
    if h * w * cfg.batch_size == 4 ** cfg.ups:
        raise UserError(f"--size {h} {w}: the first feature of G would be one pixel, and a "
                        "normalised pixel is 0; use a larger --size or --batch-size")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ------------------------------------------------------------------------------- 2 Networks

def instance_norm(c: int) -> nn.GroupNorm:
    """Each channel of each image to mean 0, variance 1; no parameters, no running averages."""
    return nn.GroupNorm(c, c, affine=False)


def up(x: Tensor, factor: int = 2, mode: str = "nearest") -> Tensor:
    return F.interpolate(x, scale_factor=float(factor), mode=mode)


class SketchEncoder(nn.Module):
    """Sec. 3.1.1, Fig. 3: convolutions of stride 2, so that every unit sees some of the ink.

    M (B, 1, H, W)  ->  f_lsk (B, 16 width, H/2^ups, W/2^ups)
    """

    def __init__(self, width: int = 64, ups: int = 5):
        super().__init__()
        c = [width * min(2 ** i, 16) for i in range(ups + 1)]                # 64 128 .. 1024 1024
        self.layers = nn.Sequential(nn.Conv2d(1, c[0], 5, 1, 2), instance_norm(c[0]), nn.ReLU())
        for c_in, c_out in zip(c, c[1:]):
            self.layers.extend([nn.Conv2d(c_in, c_out, 3, 2, 1), instance_norm(c_out), nn.ReLU()])

    def forward(self, m: Tensor) -> Tensor:
        return self.layers(m)


class GlobalEncoder(nn.Module):
    """Eq. (2): H = E_global(M), what no single pixel knows: shapes around it (Sec. 3.1.2).

    M (B, N, H, W)  ->  `heads` maps (B, 2 width, h 2^j, w 2^j), one for each size of block. With
    `smooth` (ours) they are enlarged after the convolution, bilinearly.

    "Only one final result": one small map, enlarged. The convolution in between is the release's.
    "Global" is wide, not whole: with 7 convolutions a cell sees 129 x 129 pixels of the map.
    """

    def __init__(self, n: int, width: int = 64, downs: int = 7, heads: int = 7,
                 smooth: bool = False):
        super().__init__()
        self.smooth = smooth
        c = [n] + [width * min(2 ** i, 8) for i in range(downs)]             # 64 128 256 512 512 ..
        self.down = nn.ModuleList(
            spectral_norm(nn.Conv2d(c_in, c_out, 3, 1 if i == 0 else 2, 1))
            for i, (c_in, c_out) in enumerate(zip(c, c[1:])))
        self.heads = nn.ModuleList(nn.Conv2d(c[-1], 2 * width, 3, 1, 1) for _ in range(heads))

    def forward(self, m: Tensor) -> list[Tensor]:
        for conv in self.down:
            m = F.leaky_relu(conv(m), 0.2)
        if self.smooth:
            return [F.relu(up(head(m), 2 ** j, "bilinear")) for j, head in enumerate(self.heads)]
        return [F.relu(convolve_enlarged(m, head, 2 ** j)) for j, head in enumerate(self.heads)]


def convolve_enlarged(x: Tensor, conv: nn.Conv2d, s: int) -> Tensor:
    """conv(up(x, s)) for a 3 x 3 convolution, with 9 / s^2 of its work and the same result.

    Among s x s equal pixels, all but the outermost see nothing but each other. So it suffices to
    enlarge by 3, convolve, and repeat the middle one of every three rows and columns s - 2 times.
    """
    if s < 4:
        return conv(up(x, s)) if s > 1 else conv(x)
    y = conv(up(x, 3))
    for axis in (2, 3):
        first, middle, last = y.unflatten(axis, (-1, 3)).split(1, axis + 1)
        shape = [*middle.shape]
        shape[axis + 1] = s - 2
        y = torch.cat([first, middle.expand(shape), last], axis + 1).flatten(axis, axis + 1)
    return y


class DGNorm(nn.Module):
    """Double-guided normalisation, Eq. (3) to (5), Fig. 4; without H it is SPADE.

    E (B, C, h, w), label M (B, N, h, w), H (B, hidden, h, w)  ->  (B, C, h, w)

    Batch norm takes away what E's channels had in common, gamma_DG and beta_DG give each pixel its
    own scale and shift. They come from M, so from the class of the pixel and its neighbours, and
    from H, so from the whole map; the two are added, as images of equal size.
    Misprint: Eq. (4) has mu where mu^2 is meant. Eq. (5), gamma (BN + 1) + beta, starts at 0 where
    the release, (1 + gamma) BN + beta, starts at BN; both can become the same function.
    """

    def __init__(self, c: int, n: int, hidden: int = 128, form: str = "paper"):
        super().__init__()
        self.form = form
        self.norm = instance_norm(c) if form == "v1code" else nn.BatchNorm2d(c)
        self.shared = nn.Conv2d(n, hidden, 3, 1, 1)
        self.gamma_beta = nn.Conv2d(hidden, 2 * c, 3, 1, 1)     # one convolution for both: faster

    def forward(self, e: Tensor, m: Tensor, h: Tensor | None = None) -> Tensor:
        guide = F.relu(self.shared(m))
        if h is not None:
            guide = guide + h
        gamma, beta = self.gamma_beta(guide).chunk(2, 1)                     # each (B, C, h, w)
        normed = self.norm(e)
        if self.form == "eq5":
            return gamma * (normed + 1) + beta
        return (gamma if self.form == "v1code" else 1 + gamma) * normed + beta


class GenResBlk(nn.Module):
    """Generative residual block, Eq. (1): d' = G_rb(d, M); with H, Eq. (6): d' = G_rb*(d, M, H).

    d (B, c_in, h, w)  ->  (B, c_out, h, w); G enlarges it by 2.

    The shortcut does not see H. Released V1: instance norm, ReLU, no spectral norm, and no shortcut
    at all where the widths agree.
    """

    def __init__(self, c_in: int, c_out: int, n: int, hidden: int = 128, form: str = "paper"):
        super().__init__()
        v1 = form == "v1code"
        c_mid, self.v1 = c_out if v1 else min(c_in, c_out), v1
        self.norm_0, self.norm_1 = DGNorm(c_in, n, hidden, form), DGNorm(c_mid, n, hidden, form)
        self.conv_0, self.conv_1 = nn.Conv2d(c_in, c_mid, 3, 1, 1), nn.Conv2d(c_mid, c_out, 3, 1, 1)
        self.learned = c_in != c_out
        if self.learned:
            self.norm_s = DGNorm(c_in, n, hidden, form)
            self.conv_s = nn.Conv2d(c_in, c_out, 3 if v1 else 1, 1, int(v1), bias=v1)
        for name in ("conv_0", "conv_1", "conv_s")[:2 + self.learned]:
            if not v1:
                spectral_norm(getattr(self, name))

    def forward(self, d: Tensor, m: Tensor, h: Tensor | None = None) -> Tensor:
        act = F.relu if self.v1 else lambda x: F.leaky_relu(x, 0.2)
        shortcut = 0.0 if self.v1 else d
        if self.learned:
            shortcut = self.norm_s(d, m)
            shortcut = self.conv_s(F.relu(shortcut) if self.v1 else shortcut)
        d = self.conv_0(act(self.norm_0(d, m, h)))
        return shortcut + self.conv_1(act(self.norm_1(d, m, h)))


class LSCA(nn.Module):
    """Label-guided spatial co-attention, Eq. (7), Fig. 5: f_k = h' A_m + f_k (1 - A_m).

    h (B, c_h, H/2, W/2) of the stage before, f (B, c, H, W), m (B, N, H, W)  ->  (B, c, H, W)

    A_m (B, 1, H, W) says where the coarser feature is good enough (road, sky) and is kept.
    Released V1: A_m from normalised features, and the label through a convolution of its own.
    """

    def __init__(self, c_h: int, c: int, n: int, form: str = "paper", mode: str = "nearest"):
        super().__init__()
        self.v1, self.mode = form == "v1code", mode
        self.merge = nn.Conv2d(c_h, c, 3, 1, 1)
        if self.v1:
            self.label, self.norm = nn.Conv2d(n, c, 3, 1, 1), instance_norm(c)
        self.mask = nn.Conv2d(2 * c + (c if self.v1 else n), 1, 3, 1, 1)

    def forward(self, h: Tensor, f: Tensor, m: Tensor) -> Tensor:
        h = self.merge(up(h, 2, self.mode))                                  # h', (B, c, H, W)
        if self.v1:
            h = F.relu(h)
            seen = [self.norm(each) for each in (h, f, F.relu(self.label(m)))]
        else:
            seen = [h, f, m]
        a = torch.sigmoid(self.mask(torch.cat(seen, 1)))                     # A_m, (B, 1, H, W)
        return h * a + f * (1 - a)


def resize_label(m: Tensor, size: tuple[int, int], form: str = "paper") -> Tensor:
    """M (B, N, H, W) -> (B, N, *size): classes by nearest neighbour, a sketch (N = 1) by averages.

    Released V1: the maximum of the ids in each cell.
    """
    if m.shape[-2:] == size:
        return m
    if m.shape[1] == 1:
        return F.adaptive_avg_pool2d(m, size)
    if form == "v1code":
        ids = F.adaptive_max_pool2d(m.argmax(1, keepdim=True).float(), size)[:, 0].long()
        return F.one_hot(ids, m.shape[1]).movedim(-1, 1).to(m.dtype).contiguous()
    return F.interpolate(m, size, mode="nearest")


def first_feature(fc: nn.Module, z: Tensor, c: int, trained: tuple[int, int],
                  size: tuple[int, int]) -> Tensor:
    """f_z: a fully connected layer on z, reshaped to (B, c, h, w) (Sec. 3.1.1).

    Its h and w are those of the training size; for an image of another size it is stretched.
    """
    f = fc(z).view(len(z), c, *trained)
    return f if trained == size else F.interpolate(f, size, mode="nearest")


class GeneratorV1(nn.Module):
    """X_i = G_v1(z, M), Eq. (17), Fig. 7: three images in one pass, to be judged one by one.

    z (B, noise), M (B, N, H, W)  ->  [X_3 (B, 3, H, W), X_2 at half the size, X_1 at a quarter]

    Labels: two blocks encode f_z and M, five more generate; each is followed by a doubling. Sketch:
    f_z is concatenated with the sketch encoder's feature, and five blocks follow. The last three
    blocks have LSCA and, progressively, an image each; without pg there is X_3 alone.
    """

    def __init__(self, n: int, size: tuple[int, int] = (256, 512), width: int = 64, ups: int = 7,
                 noise: int = 128, sketch: bool = False, dgnorm: bool = True, pg: bool = True,
                 lsca: bool = True, form: str = "paper", smooth: bool = False):
        super().__init__()
        self.form, self.multiple = form, 2 ** ups
        self.mode = "bilinear" if smooth else "nearest"
        self.trained = tuple(side // 2 ** ups for side in size)
        out = [width * min(2 ** (ups - 1 - i), 16) for i in range(ups)]      # 1024 1024 1024 512 ..
        self.c_z = width if sketch else 16 * width
        self.encoder = SketchEncoder(width, ups) if sketch else None
        self.fc = None                                                       # released: z unused
        if not (sketch and form == "v1code"):
            self.fc = nn.Linear(noise, self.c_z * math.prod(self.trained))
        c = [16 * width + (width if sketch and self.fc is not None else 0), *out]
        hidden = 2 * width
        self.globe = GlobalEncoder(n, width, ups + 1, ups, smooth) if dgnorm else None
        self.blocks = nn.ModuleList(GenResBlk(*pair, n, hidden, form) for pair in zip(c, out))
        self.lsca = nn.ModuleList(LSCA(c[k], out[k], n, form, self.mode)
                                  for k in range(ups - 3, ups) if lsca)
        self.heads = nn.ModuleList(nn.Conv2d(c_out, 3, 3, 1, 1) for c_out in
                                   (out[-3:] if pg else out[-1:]))

    def forward(self, z: Tensor, m: Tensor) -> list[Tensor]:
        size = tuple(side // self.multiple for side in m.shape[-2:])
        parts = [] if self.encoder is None else [self.encoder(m)]
        if self.fc is not None:
            parts.append(first_feature(self.fc, z, self.c_z, self.trained, size))
        d, n = torch.cat(parts, 1), len(self.blocks)                         # (B, 1024, h, w)
        h = self.globe(m) if self.globe is not None else [None] * n          # H, per size
        labels = [resize_label(m, (size[0] << k, size[1] << k), self.form) for k in range(n + 1)]
        images = []
        for k, block in enumerate(self.blocks):
            f = up(block(d, labels[k], h[k]), 2, self.mode)                  # (B, c, h 2^(k+1), ..)
            if k >= n - 3 and len(self.lsca):
                f = self.lsca[k - n + 3](d, f, labels[k + 1])
            d = f
            if k >= n - len(self.heads):
                images.append(torch.tanh(self.heads[k - n + len(self.heads)](d)))
        return images[::-1]


class GeneratorV2(nn.Module):
    """X = G_v2(z, M), Eq. (21), Fig. 8: one image; D sees it at several sizes.

    z (B, noise), M (B, N, H, W)  ->  [X (B, 3, H, W)]

    Seven blocks, 1024-1024-1024-512-256-128-64, and with 7 doublings one more, 32 (V2-H). Paper:
    two encoder blocks and four more; three and four here, as released, since row A_s is SPADE.
    first="label": the first feature is made of the small label map, and z is not used (SPADE).
    """

    def __init__(self, n: int, size: tuple[int, int] = (256, 512), width: int = 64, ups: int = 6,
                 noise: int = 128, first: str = "noise", dgnorm: bool = True, form: str = "paper",
                 smooth: bool = False):
        super().__init__()
        self.first, self.multiple, self.c_z = first, 2 ** ups, 16 * width
        self.mode = "bilinear" if smooth else "nearest"
        self.trained = tuple(side // 2 ** ups for side in size)
        out = [width * f for f in (16, 16, 16, 8, 4, 2, 1)] + [width // 2] * (ups == 7)
        self.doubles = [False, ups > 4, ups > 5] + [True] * (len(out) - 3)   # before each block
        self.fc = nn.Conv2d(n, self.c_z, 3, 1, 1) if first == "label" else (
            nn.Linear(noise, self.c_z * math.prod(self.trained)))
        self.globe = GlobalEncoder(n, width, ups + 1, ups + 1, smooth) if dgnorm else None
        self.blocks = nn.ModuleList(GenResBlk(c_in, c_out, n, 2 * width, form)
                                    for c_in, c_out in zip([16 * width, *out], out))
        self.head = nn.Conv2d(out[-1], 3, 3, 1, 1)

    def forward(self, z: Tensor, m: Tensor) -> list[Tensor]:
        size = tuple(side // self.multiple for side in m.shape[-2:])
        if self.first == "label":
            d = self.fc(resize_label(m, size))                               # (B, 1024, h, w)
        else:
            d = first_feature(self.fc, z, self.c_z, self.trained, size)
        h, k = self.globe(m) if self.globe is not None else None, 0          # k doublings so far
        for block, double in zip(self.blocks, self.doubles):
            if double:
                d, k = up(d, 2, self.mode), k + 1
            d = block(d, resize_label(m, d.shape[-2:]), None if h is None else h[k])
        return [torch.tanh(self.head(F.leaky_relu(d, 0.2)))]


def unit(c_in: int, c_out: int, kernel: int = 3, stride: int = 1,
         norm: str = "both") -> list[nn.Module]:
    """Convolution, spectral norm on it, instance norm or both, LeakyReLU. With both, no bias.

    Instance norm hides from D how bright and how colourful an image is, all that its convolution
    finds being rescaled; in V2 the other losses see to that. Spectral norm alone (ours) does not.
    """
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=norm != "both")
    layers = [conv if norm == "instance" else spectral_norm(conv)]
    return layers + [instance_norm(c_out)] * (norm != "spectral") + [nn.LeakyReLU(0.2)]


class MiniInception(nn.Module):
    """Mini-inception block (Sec. 3.2.1, Fig. 6): three branches, added; halves H and W.

    x (B, c, H, W)  ->  (B, c, H/2, W/2). A field of 5 pixels is made of two 3 x 3.
    """

    def __init__(self, c: int, norm: str = "both"):
        super().__init__()
        self.pool = nn.Sequential(nn.AvgPool2d(2), *unit(c, c, 1, 1, norm))
        self.three = nn.Sequential(*unit(c, c, 1, 1, norm), *unit(c, c, 3, 2, norm))
        self.five = nn.Sequential(*unit(c, c, 1, 1, norm), *unit(c, c, 3, 1, norm),
                                  *unit(c, c, 3, 2, norm))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) + self.three(x) + self.five(x)


class PerceptualDiscriminator(nn.Module):
    """D_i = {D_i^1, ..., D_i^levels}, Eq. (8): low, middle and high level verdicts (Fig. 6).

    x (B, c_in, H, W), taps [(B, c_l, H/2^(l+2), W/2^(l+2)) for l = 1..]
        ->  [[logits (B, 1, H/2^(l+2), W/2^(l+2)) for l = 1..levels], features for Eq. (29)]

    The main branch judges alone if it must; at each level what the frozen VGG-16 makes of the image
    (pool3, pool4, pool5) is concatenated: v_1, v_2, v_3, the perceptual branch. A label is for the
    main branch only.
    """

    def __init__(self, c_in: int, levels: int = 3, width: int = 64, norm: str = "both",
                 vgg_width: int = 64):
        super().__init__()
        c, taps = 8 * width, [vgg_width * f for f in (4, 8, 8)]
        first = unit(c_in, width, 3, 2, norm) if norm == "instance" else (
            [nn.Conv2d(c_in, width, 3, 2, 1), nn.LeakyReLU(0.2)])
        self.common = nn.ModuleList([nn.Sequential(*first)] + [
            nn.Sequential(*unit(width * f, width * 2 * f, 3, 2, norm)) for f in (1, 2)])

        def settle(c: int) -> list[nn.Module]:      # released V1: without a convolution
            return unit(c, c, 3, 1, norm) if norm != "instance" else (
                [instance_norm(c), nn.LeakyReLU(0.2)])

        self.pre, self.join, self.out = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.line = nn.ModuleList(MiniInception(c, norm) for _ in range(levels - 1))
        for level, c_tap in enumerate(taps[:levels]):
            self.pre.append(nn.Sequential(*settle(c_tap)))
            c_main = 4 * width if level == 0 else c
            self.join.append(nn.Sequential(*unit(c_main + c_tap, c, 3, 1, norm)))
            self.out.append(nn.Sequential(*settle(c), nn.Conv2d(c, 1, 5, 1, 2)))

    def forward(self, x: Tensor, taps: list[Tensor]) -> list[list[Tensor]]:
        levels, features = [], []
        for layer in self.common:
            x = layer(x)                                    # (B, 64 2^k, H/2^(k+1), W/2^(k+1))
            features.append(x)
        for level, (pre, join, out) in enumerate(zip(self.pre, self.join, self.out)):
            if level > 0:
                x = self.line[level - 1](x)                 # (B, 512, half the size)
                features.append(x)
            x = join(torch.cat([x, pre(taps[level])], 1))   # (B, 512, h, w)
            features.append(x)
            levels.append(out(x))
        return [levels, features]


class PatchDiscriminator(nn.Module):
    """SPADE's discriminator, for the rows of the tables before HPD: one level, no VGG.

    x (B, c_in, H, W)  ->  [[logits (B, 1, about H/8, W/8)], four features]
    """

    def __init__(self, c_in: int, width: int = 64):
        super().__init__()
        c = [width * f for f in (1, 2, 4, 8)]
        self.layers = nn.ModuleList([nn.Sequential(nn.Conv2d(c_in, width, 4, 2, 2),
                                                   nn.LeakyReLU(0.2))])
        for c_in, c_out, stride in zip(c, c[1:], (2, 2, 1)):
            conv = nn.Conv2d(c_in, c_out, 4, stride, 2, bias=False)
            self.layers.append(nn.Sequential(spectral_norm(conv), instance_norm(c_out),
                                             nn.LeakyReLU(0.2)))
        self.last = nn.Conv2d(c[-1], 1, 4, 1, 2)

    def forward(self, x: Tensor, taps: list[Tensor]) -> list[list[Tensor]]:
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return [[self.last(x)], features]


class Discriminators(nn.Module):
    """D_3, D_2, D_1 for X_3, X_2, X_1, Eq. (8) and (23), as one module: the largest image first.

    [x of each scale], [its VGG taps]  ->  per scale [logits of each level, features]
    D_3 has three levels, D_2 two and D_1 one: small images have little that is of a high level.
    """

    def __init__(self, c_in: int, scales: int = 3, width: int = 64, kind: str = "hpd",
                 norm: str = "both", vgg_width: int = 64):
        super().__init__()
        self.scales = nn.ModuleList(
            PatchDiscriminator(c_in, width) if kind == "patch" else
            PerceptualDiscriminator(c_in, 3 - k, width, norm, vgg_width) for k in range(scales))

    def forward(self, images: list[Tensor], taps: list[list[Tensor]]) -> list:
        return [d(*both) for d, *both in zip(self.scales, images, taps)]


class Bottleneck(nn.Module):
    """ICNet's residual block: 1 x 1, 3 x 3, 1 x 1, each with batch norm, around a skip."""

    def __init__(self, c_in: int, c_mid: int, c_out: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.branch = nn.Sequential(
            *normed(c_in, c_mid, 1, stride), *normed(c_mid, c_mid, 3, 1, dilation),
            *normed(c_mid, c_out, 1)[:-1])
        self.skip = nn.Identity() if c_in == c_out else (
            nn.Sequential(*normed(c_in, c_out, 1, stride)[:-1]))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.branch(x))


def normed(c_in: int, c_out: int, kernel: int = 3, stride: int = 1,
           dilation: int = 1) -> list[nn.Module]:
    """Convolution, batch norm, ReLU; keeps the size but for the stride."""
    padding = dilation * (kernel // 2)
    return [nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation), nn.BatchNorm2d(c_out),
            nn.ReLU()]


class ICNet(nn.Module):
    """Segmentation network S_i (Sec. 4.1.2): three branches at full, half and quarter size.

    X (B, 3, any size)  ->  logits (B, classes, 256, 256). The input is first resized to 256 x 256.
    Layers are the release's, without its two extra outputs, which enter no loss.
    """

    def __init__(self, classes: int, width: int = 32, size: int = 256):
        super().__init__()
        w, self.size = width, size
        self.sub_2 = nn.Sequential(                                          # for 256: 128 -> 32
            nn.AvgPool2d(2), *normed(3, w, 3, 2), *normed(w, w), *normed(w, 2 * w),
            nn.MaxPool2d(3, 2, 1), Bottleneck(2 * w, w, 4 * w),
            *(Bottleneck(4 * w, w, 4 * w) for _ in range(2)),
            Bottleneck(4 * w, 2 * w, 8 * w, 2))                              # (B, 256, 16, 16)
        self.sub_4 = nn.Sequential(
            nn.AvgPool2d(2), *(Bottleneck(8 * w, 2 * w, 8 * w) for _ in range(3)),
            *(Bottleneck(16 * w if i else 8 * w, 4 * w, 16 * w, 1, 2) for i in range(6)),
            *(Bottleneck(32 * w if i else 16 * w, 8 * w, 32 * w, 1, 4) for i in range(3)))
        self.reduce = nn.Sequential(*normed(32 * w, 8 * w, 1))
        self.up_4 = nn.Sequential(*normed(8 * w, 4 * w, 3, 1, 2)[:-1])
        self.side_2 = nn.Sequential(*normed(8 * w, 4 * w, 1)[:-1])
        self.up_2 = nn.Sequential(*normed(4 * w, 4 * w, 3, 1, 2)[:-1])
        self.sub_1 = nn.Sequential(
            *normed(3, w, 3, 2), *normed(w, w, 3, 2), *normed(w, 2 * w, 3, 2),
            *normed(2 * w, 4 * w, 1)[:-1])                                   # (B, 128, 32, 32)
        self.out = nn.Conv2d(4 * w, classes, 5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, (self.size, self.size), mode="nearest")
        c31 = self.sub_2(x)
        deep = self.sub_4(c31)                                               # (B, 1024, 8, 8)
        side = deep.shape[-1]
        pools = [F.avg_pool2d(deep, max(1, k * side // 8)) for k in (8, 4, 3, 2)]
        deep = self.reduce(sum(F.interpolate(p, (side, side), mode="nearest") for p in pools))
        middle = F.relu(self.up_4(up(deep)) + self.side_2(c31))              # (B, 128, 16, 16)
        fine = F.relu(self.up_2(up(middle)) + self.sub_1(x))                 # (B, 128, 32, 32)
        return up(self.out(up(fine, 4)))


class Segmenters(nn.Module):
    """S_3, S_2, S_1 for X_3, X_2, X_1, independent of each other, as one module."""

    def __init__(self, classes: int, images: int = 3, width: int = 32, size: int = 256):
        super().__init__()
        self.scales = nn.ModuleList(ICNet(classes, width, size) for _ in range(images))

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [s(x) for s, x in zip(self.scales, images)]


def initialise(net: nn.Module, gain: float = 0.02) -> None:
    """Convolutions and linear layers: Xavier with a gain (V2), or N(0, 0.02) (V1); biases 0.

    Under spectral norm a weight's scale changes nothing but how fast Adam turns it: with SPADE's
    0.02 the first hundreds of steps are spent on growing. A short run wants 1.
    """
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            nn.init.xavier_normal_(parameter, gain) if gain else (
                nn.init.normal_(parameter, 0.0, 0.02))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def speak_up(generator: nn.Module, segmenter: nn.Module | None) -> None:
    """Initial weights with which G's first images show the label, pale on grey. Ours, for V1.

    In V1 only S ties the image to the label, and S teaches nothing before it can tell where the
    label is; with the usual weights z drowns it. So DG-Norm is louder, and z silent. S starts from
    "nothing known": a random S sends G to random, glaring colours, and D never gets it back.
    """
    with torch.no_grad():
        for module in generator.modules():
            if isinstance(module, DGNorm):
                module.shared.weight.mul_(10)
                module.gamma_beta.weight.mul_(3)
        if generator.fc is not None:
            generator.fc.weight.zero_()
        for head in generator.heads:
            head.weight.mul_(0.1)
        for s in segmenter.scales if segmenter is not None else ():
            s.out.weight.zero_()


# --------------------------------------------------------------------------------- 3 Losses

# The foreground of the released code, by class. Cityscapes: what is small or moves. Of ADE20K and
# COCO-Stuff the background is listed, ids from 0 (wall) and, in COCO's own counting, from 1.
FOREGROUND = {12, 13, 17, 18, 19, 20, 22, *range(24, 34)}
ADE20K_BACKGROUND = {*range(7), 9, 11, 13, 16, 17, 21, 25, 26, 29, 32, 46, 48, 51, 52, 54, 60, 61,
                     68, 69, 81, 91, 94, 101, 128}
COCO_BACKGROUND = {*range(114, 119), 124, 126, 127, 128, 135, 136, 144, 145, 147, 148, 149, 151,
                   154, 155, *range(157, 163), 164, *range(169, 179), 182}


def foreground_classes(classes: str) -> list[int]:
    """Ids of a data set's foreground; unknown pixels are background."""
    table, n = class_table(classes), len(class_table(classes).names)
    if classes == "ade20k":
        return sorted(set(range(n)) - ADE20K_BACKGROUND)
    if classes == "coco_stuff":
        return sorted(set(range(n)) - {k - 1 for k in COCO_BACKGROUND})
    names = {class_table("cityscapes").names[k] for k in FOREGROUND} | table.things
    return [k for k, name in enumerate(table.names) if name in names]


def foreground_mask(label: Tensor, classes: str, T: float) -> Tensor:
    """Eq. (9): M_en (B, 1, H, W), P on background and T P on foreground, with mean 1 per image.

    P = (A + B) / (T A + B) for A pixels of foreground and B of background. With a mean of 1, D can
    weigh fakes by it although real photos have no mask in V1.
    """
    front = torch.isin(label, torch.tensor(foreground_classes(classes), device=label.device))
    weight = torch.where(front, T, 1.0)[:, None]                             # (B, 1, H, W)
    return weight / weight.mean((2, 3), keepdim=True)


def expectation(q: Tensor, w: Tensor | None = None) -> Tensor:
    """Eq. (14): E_M^il[q] = E[W_i^l q], W_i^l being M_en averaged to the size of q (B, 1, h, w).

    Without a mask (real photos in V1, sketches, T = 1) all weights are one.
    """
    if w is None:
        return q.mean()
    assert w.shape[1] == q.shape[1] == 1    # (B, h, w) times (B, 1, h, w) would mix the batch
    return (F.adaptive_avg_pool2d(w, q.shape[-2:]) * q).mean()


def hierarchical(verdicts: list, loss: Callable, w: Tensor | None = None) -> Tensor:
    """What Eq. (10), (12), (13) share: sum_i 1/(sum_l lambda_il) sum_l lambda_il E[loss(D_i^l)].

    lambda_il is 1, 1/2, 1/4: the finest level weighs most, and each discriminator as much as every
    other. verdicts: per scale [[logits per level], features].
    """
    total = 0.0
    for levels, _ in verdicts:
        weights = [0.5 ** l for l in range(len(levels))]                     # Eq. (14)
        terms = [k * expectation(loss(d), w) for k, d in zip(weights, levels)]
        total = total + sum(terms) / sum(weights)
    return total


def generator_loss(fake: list, gan: str, w: Tensor | None = None) -> Tensor:
    """Eq. (10) and (24), L_1^G: -log D(X) from logits (vanilla), or -D(X) (hinge).

    Paper: L_adv^R, D's own loss on real images, for both. With hinge that would stop teaching G
    wherever D is fooled by a margin.
    """
    return hierarchical(fake, (lambda d: -d) if gan == "hinge" else (lambda d: F.softplus(-d)), w)


def fake_loss(fake: list, gan: str, w: Tensor | None = None) -> Tensor:
    """Eq. (12) and (26), L_1^D(X)_F: -log(1 - D(X)), or max(0, 1 + D(X))."""
    return hierarchical(fake, (lambda d: F.relu(1 + d)) if gan == "hinge" else F.softplus, w)


def real_loss(real: list, gan: str, w: Tensor | None = None) -> Tensor:
    """Eq. (13) and (27), L_1^D(Y)_R: -log D(Y), or max(0, 1 - D(Y)); W in V2 alone."""
    return hierarchical(real, (lambda d: F.relu(1 - d)) if gan == "hinge" else
                        (lambda d: F.softplus(-d)), w)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Eq. (11) and (25): half of D's real and fake parts."""
    return (real + fake) / 2


def sharpness_loss(real: Tensor, blurred: Tensor) -> Tensor:
    """Eq. (16) and (30), L_2: blurred photos are fakes; the real part again keeps the balance."""
    return (real + blurred) / 2


def blur(y: Tensor) -> Tensor:
    """Y^f: "downscale real images and upscale the downsampled ones", by 2 (Sec. 3.2.2)."""
    return up(F.avg_pool2d(y, 2))


def consistency_loss(images: list[dict], pooled: list[dict]) -> Tensor:
    """Eq. (18), L_v1_3: sum over two pairs and layers of || Phi_l(P_2(X_i+1)) - Phi_l(X_i) ||_2.

    images: VGG-16's features of X_2, X_1; pooled: of the halved X_3, X_2. The norm is the root of
    the sum of squares of one image, as printed; hence lambda_3 = 5e-6. Mean over the batch.
    """
    return sum((a[name] - b[name]).flatten(1).norm(dim=1).mean()
               for a, b in zip(images, pooled) for name in CONSISTENCY_LAYERS)


def cycle_segmentation_loss(logits: list[Tensor], label: Tensor) -> Tensor:
    """Eq. (19), L_v1_4: sum_i of the cross-entropy of S_i(X_i) with the label that made X_i.

    logits [(B, N, any size)], label (B, H, W). Every S_i's output is enlarged to the label's size.
    """
    return sum(F.cross_entropy(F.interpolate(s, label.shape[-2:], mode="nearest"), label)
               for s in logits)


VGG_LAYERS = {"relu1_1": 1 / 32, "relu2_1": 1 / 16, "relu3_1": 1 / 8, "relu4_1": 1 / 4,
              "relu5_1": 1.0}                                # of VGG-19, with lambda_M of Eq. (28)
CONSISTENCY_LAYERS = ("conv1_2", "conv2_2", "conv3_2", "conv4_2", "conv5_2")      # of VGG-16
TAPS = ("pool3", "pool4", "pool5")                           # of VGG-16, for D's perceptual branch


def perceptual_loss(fake: list[dict], real: list[dict]) -> Tensor:
    """Eq. (28), L_v2_5: sum over scales and layers of lambda_Ml || Phi_l(X_i) - Phi_l(Y_i) ||_1."""
    return sum(weight * (x[name] - y[name]).abs().mean()
               for x, y in zip(fake, real) for name, weight in VGG_LAYERS.items())


def feature_matching_loss(fake: list, real: list, released: bool = False) -> Tensor:
    """Eq. (29), L_v2_6: sum_i 1/k sum_k || D_i^(k)(X*) - D_i^(k)(Y*) ||_1; the verdicts excluded.

    Released code: the sum over layers, the mean over discriminators.
    """
    total = 0.0
    for (_, ours), (_, theirs) in zip(fake, real):
        terms = [(x - y.detach()).abs().mean() for x, y in zip(ours, theirs)]
        total = total + (sum(terms) / len(fake) if released else sum(terms) / len(terms))
    return total


# ------------------------------------------------------------------------------- 4 Training

@dataclass
class State:
    """All that training changes. Whatever has a state_dict, and the counters, are saved."""
    generator: nn.Module
    discriminator: nn.Module                    # D_3, D_2, D_1
    segmenter: nn.Module | None                 # S_3, S_2, S_1, with lambda_4
    vgg16: nn.Module | None                     # frozen: D's perceptual branch and Eq. (18)
    vgg19: nn.Module | None                     # frozen: Eq. (28)
    opt_g: torch.optim.Optimizer                # of G and S_i: net_1                    Sec. 4.1.3
    opt_d: torch.optim.Optimizer                # of D_i: net_2
    step: int = 0                               # updates done
    epoch: int = 0                              # passes completed
    seen: int = 0                               # images of this pass already used, by all processes


def channels(cfg: Config) -> int:
    """Of M: one of a sketch, or one per class and, in V2, one of the instances' edges."""
    return 1 if cfg.task != "labels" else class_table(cfg.classes).channels + cfg.edges


def networks(cfg: Config) -> tuple[nn.Module, Discriminators, Segmenters | None]:
    """G, D and S. D sees the label in V2 alone, Eq. (22)."""
    n, v1 = channels(cfg), cfg.version == "V1"
    if v1:
        generator = GeneratorV1(n, cfg.size, cfg.width, cfg.ups, cfg.noise, cfg.task != "labels",
                                cfg.dgnorm, cfg.pg, cfg.lsca, cfg.form, cfg.smooth)
    else:
        generator = GeneratorV2(n, cfg.size, cfg.width, cfg.ups, cfg.noise, cfg.first, cfg.dgnorm,
                                cfg.form, cfg.smooth)
    discriminator = Discriminators(3 if v1 else n + 3, cfg.scales, cfg.d_width, cfg.discriminator,
                                   cfg.d_norm, cfg.vgg_width)
    segmenter = None
    if cfg.lambda_4:                            # a sketch has two classes: ink and blank
        segmenter = Segmenters(2 if cfg.task != "labels" else n, 3 if cfg.pg else 1, cfg.s_width,
                               cfg.s_size)
    for net in (generator, discriminator, segmenter):
        if net is not None:
            initialise(net, cfg.gain)
    if cfg.loud:
        speak_up(generator, segmenter)
    return generator, discriminator, segmenter


def frozen_vgg(layers: tuple[str, ...], depth: int, cfg: Config, device: torch.device) -> nn.Module:
    """VGG features that nobody trains, once for all discriminators and losses that want them."""
    vgg = common.VGGFeatures(layers, depth, cfg.vgg, not cfg.vgg_raw, width=cfg.vgg_width)
    return dress(vgg.to(device, memory_format=memory_format(cfg, device)), cfg, device)


def build(cfg: Config, device: torch.device) -> State:
    """Networks and optimisers; precision, compilation and distribution go around the networks."""
    torch.manual_seed(cfg.seed)
    nets = networks(cfg)
    for net in nets:
        if net is not None:
            net.to(device, memory_format=memory_format(cfg, device))
    layers = (TAPS if cfg.discriminator == "hpd" else ()) + (
        CONSISTENCY_LAYERS if cfg.lambda_3 else ())
    vgg16 = frozen_vgg(layers, 16, cfg, device) if layers else None
    vgg19 = frozen_vgg(tuple(VGG_LAYERS), 19, cfg, device) if cfg.lambda_5 else None
    generator, discriminator, segmenter = nets
    adam = [torch.optim.Adam(trained(*some), rate, cfg.betas, fused=True) for some, rate in
            zip(((generator, segmenter), (discriminator,)), learning_rates(cfg, 0))]
    state = State(*nets, vgg16, vgg19, *adam)
    for path in cfg.init:
        load_networks(state, Path(path))
    state.generator, state.discriminator, state.segmenter = (
        net and dress(net, cfg, device) for net in nets)
    return state


def trained(*nets: nn.Module | None) -> list[nn.Parameter]:
    """The parameters that the optimiser moves."""
    return [p for net in nets if net is not None for p in net.parameters() if p.requires_grad]


def boundary_map(instance: Tensor) -> Tensor:
    """(B, H, W) -> (B, 1, H, W): 1 where the object differs from one of its four neighbours."""
    edge = torch.zeros_like(instance, dtype=torch.bool)
    across, down = instance[:, :, 1:] != instance[:, :, :-1], instance[:, 1:] != instance[:, :-1]
    edge[:, :, 1:] |= across
    edge[:, :, :-1] |= across
    edge[:, 1:] |= down
    edge[:, :-1] |= down
    return edge[:, None].float()


def sketch_of(image: Tensor) -> Tensor:
    """An edge map (B, 1, H, W) of photos, ink -1 on paper 1, where no sketches are given. Ours.

    Sobel's gradient of the grey image, smoothed 3 x 3; the steepest eighth of the pixels is ink.
    """
    grey = F.avg_pool2d(F.pad(image.mean(1, keepdim=True), (2, 2, 2, 2), mode="replicate"), 3, 1)
    sobel = grey.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])[None, None]
    steep = F.conv2d(grey, sobel).square() + F.conv2d(grey, sobel.mT).square()
    ink = steep > steep.flatten(1).quantile(7 / 8, 1)[:, None, None, None].clamp(min=1e-3)
    return 1 - 2 * ink.float()


def make_pair(batch: dict, cfg: Config) -> dict:
    """A batch of common.Dataset with "input" M (B, N, H, W) added, and with T > 1 its "mask" M_en.

    Labels are one-hot, in V2 with the edges of instances. A sketch has one channel, ink -1, and its
    "label" (for S) says where the ink is.
    """
    if cfg.task != "labels":
        m = batch["input"].mean(1, keepdim=True) if "input" in batch else sketch_of(batch["image"])
        return batch | {"input": m, "label": (m[:, 0] < 0).long()}
    m = F.one_hot(batch["label"], class_table(cfg.classes).channels).movedim(-1, 1).float()
    if cfg.edges:
        m = torch.cat([m, boundary_map(batch["instance"])], 1)
    mask = {"mask": foreground_mask(batch["label"], cfg.classes, cfg.T)} if cfg.T != 1 else {}
    return batch | {"input": m} | mask


def pyramid(x: Tensor, n: int, cfg: Config) -> list[Tensor]:
    """[x, half, quarter, ...], n in all. V1 averages 2 x 2 pixels, V2 3 x 3, padding not counted.

    In V2 the label goes through it as well, and gets fractional; X_i* of Eq. (22) is M_i and X_i.
    """
    sizes = [x]
    while len(sizes) < n:
        sizes.append(F.avg_pool2d(sizes[-1], 2) if cfg.version == "V1" else
                     F.avg_pool2d(sizes[-1], 3, 2, 1, count_include_pad=False))
    return sizes


def with_label(images: list[Tensor], labels: list[Tensor]) -> list[Tensor]:
    """Eq. (22): X_i* = (X_i, M), along the channels; M serves several groups of images."""
    return [torch.cat([m.repeat(len(x) // len(m), 1, 1, 1), x], 1)
            for x, m in zip(images, labels)]


def perceive(vgg: nn.Module | None, images: list[Tensor]) -> list[dict]:
    """The frozen VGG's features of every image; nothing where the discriminator has no use."""
    return [vgg(x) if vgg is not None else {} for x in images]


def taps(features: list[dict]) -> list[list[Tensor]]:
    """Per scale v_1, v_2, v_3 (Fig. 6), for D's perceptual branch."""
    return [[f[name] for name in TAPS if name in f] for f in features]


def split(verdicts: list, n: int) -> list:
    """Verdicts on n groups of images that were judged in one batch, group by group."""
    parts = [[[t.chunk(n) for t in kind] for kind in scale] for scale in verdicts]
    return [[[[t[k] for t in kind] for kind in scale] for scale in parts] for k in range(n)]


def lambda_2(cfg: Config, epoch: int) -> float:
    """Of the sharpness loss: constant, or from 0 to 1 over the run (Sec. 5.2)."""
    return cfg.lambda_2 * epoch / max(cfg.epochs - 1, 1) if cfg.ramp else cfg.lambda_2


def train_step(state: State, batch: dict, cfg: Config) -> dict[str, Tensor]:
    """One update of G (with S) and one of D: Eq. (20) of V1, Eq. (31) of V2."""
    return (step_v1 if cfg.version == "V1" else step_v2)(state, batch, cfg)


def step_v1(state: State, batch: dict, cfg: Config) -> dict[str, Tensor]:
    """Eq. (20), Fig. 7: M and Y have nothing to do with each other. Returns the paper's losses.

    Both players' gradients are taken from one pass, before either update (Eq. (15)); `inputs` says
    whose weights each backward pass is for, so nothing is computed twice for a detach.
    """
    G, D, S = state.generator, state.discriminator, state.segmenter
    m, y, w = batch["input"], batch["image"], batch.get("mask")
    x = G(torch.randn(len(m), cfg.noise, device=m.device), m)                # [X_3, X_2, X_1]
    x = x if cfg.pg else pyramid(x[0], cfg.scales, cfg)
    seen = perceive(state.vgg16, x)             # serves D and Eq. (18)
    fake = D(x, taps(seen))

    # net_1, G and S_i: they know no photo but through D.
    losses = {"g_adv": generator_loss(fake, cfg.gan, w)}                     # Eq. (10)
    objective = losses["g_adv"]
    if cfg.lambda_3:
        halved = [F.avg_pool2d(each, 2) for each in x[:2]]                   # P_2(X_3), P_2(X_2)
        losses["g_con"] = consistency_loss(seen[1:], perceive(state.vgg16, halved))
        objective = objective + cfg.lambda_3 * losses["g_con"]
    if cfg.lambda_4:
        losses["g_seg"] = cycle_segmentation_loss(S(x if cfg.pg else x[:1]), batch["label"])
        objective = objective + cfg.lambda_4 * losses["g_seg"]
    state.opt_g.zero_grad(set_to_none=True)
    objective.backward(inputs=trained(G, S), retain_graph=True)

    # net_2, D_i: real and blurred photos in one batch; instance norm keeps them apart.
    with torch.no_grad():
        ys = pyramid(y, cfg.scales, cfg)                                     # Y_3, Y_2, Y_1
        groups = 2 if cfg.lambda_2 else 1
        photos = [torch.cat([each, blur(each)]) if cfg.lambda_2 else each for each in ys]
        seen = taps(perceive(state.vgg16, photos))
    real, *blurred = split(D(photos, seen), groups)
    losses["d_real"] = real_loss(real, cfg.gan)                              # Eq. (13)
    losses["d_fake"] = fake_loss(fake, cfg.gan, w)                           # Eq. (12)
    objective = discriminator_loss(losses["d_real"], losses["d_fake"])       # Eq. (11)
    for each in blurred:
        losses["d_blur"] = fake_loss(each, cfg.gan)     # Y^f has no label here, so no mask
        sharp = sharpness_loss(losses["d_real"], losses["d_blur"])           # Eq. (16)
        objective = objective + lambda_2(cfg, state.epoch) * sharp
    state.opt_d.zero_grad(set_to_none=True)
    objective.backward(inputs=trained(D))
    state.opt_g.step()
    state.opt_d.step()
    return {name: loss.detach() for name, loss in losses.items()}


def step_v2(state: State, batch: dict, cfg: Config) -> dict[str, Tensor]:
    """Eq. (31) and (32), Fig. 8: an update of G, then one of D against the new G.

    What VGG-16 and VGG-19 see in the real photo is computed once, without a graph.
    """
    G, D, n = state.generator, state.discriminator, cfg.scales
    m, y, w = batch["input"], batch["image"], batch.get("mask")
    z = torch.randn(len(m), cfg.noise, device=m.device)
    labels, ys = pyramid(m, n, cfg), pyramid(y, n, cfg)                      # M, Y_3, Y_2, (Y_1)

    # G: D is frozen, and shows G what it feels at the real photo, too.
    D.requires_grad_(False)
    judge = plain(D)                            # DDP's own wrapper would wait for gradients of D
    xs = pyramid(G(z, m)[0], n, cfg)                                         # X_3, X_2, (X_1)
    fake = judge(with_label(xs, labels), taps(perceive(state.vgg16, xs)))
    losses = {"g_adv": generator_loss(fake, cfg.gan, w)}                     # Eq. (24)
    objective = losses["g_adv"]
    with torch.no_grad():
        known = taps(perceive(state.vgg16, ys))
    if cfg.lambda_5:
        k = 1 if cfg.released_losses else n
        with torch.no_grad():
            target = perceive(state.vgg19, ys[:k])
        losses["g_vgg"] = perceptual_loss(perceive(state.vgg19, xs[:k]), target)      # Eq. (28)
        objective = objective + cfg.lambda_5 * losses["g_vgg"]
    if cfg.lambda_6:
        with torch.no_grad():
            real = judge(with_label(ys, labels), known)
        losses["g_fm"] = feature_matching_loss(fake, real, cfg.released_losses)       # Eq. (29)
        objective = objective + cfg.lambda_6 * losses["g_fm"]
    state.opt_g.zero_grad(set_to_none=True)
    objective.backward()
    state.opt_g.step()

    # D: real, generated and blurred photos in one batch; instance norm keeps them apart.
    D.requires_grad_(True)
    with torch.no_grad():
        new = pyramid(G(z, m)[0], n, cfg)
        if cfg.lambda_2:
            new = [torch.cat([x, blur(each)]) for x, each in zip(new, ys)]
        found = taps(perceive(state.vgg16, new))
        images = with_label([torch.cat(pair) for pair in zip(ys, new)], labels)
        seen = [[torch.cat(t) for t in zip(*pair)] for pair in zip(known, found)]
    real, fake, *blurred = split(D(images, seen), 3 if cfg.lambda_2 else 2)
    losses["d_real"], losses["d_fake"] = real_loss(real, cfg.gan, w), fake_loss(fake, cfg.gan, w)
    objective = discriminator_loss(losses["d_real"], losses["d_fake"])       # Eq. (25)
    for each in blurred:
        losses["d_blur"] = fake_loss(each, cfg.gan, w)
        sharp = sharpness_loss(losses["d_real"], losses["d_blur"])           # Eq. (30)
        objective = objective + lambda_2(cfg, state.epoch) * sharp
    state.opt_d.zero_grad(set_to_none=True)
    objective.backward()
    state.opt_d.step()
    return {name: loss.detach() for name, loss in losses.items()}


def learning_rates(cfg: Config, epoch: int) -> tuple[float, float]:
    """Of G and of D: constant for half the epochs, then down in equal steps; the last is not 0."""
    falling = cfg.epochs // 2 if cfg.decay else 0
    rate = cfg.lr * (1 - max(0, epoch - (cfg.epochs - falling)) / max(falling, 1))
    return (rate / 2, 2 * rate) if cfg.ttur else (rate, rate)


# From here to Log all is word for word the same in the four scripts, but for these two names.

NAME = "lab2pix"
NETWORKS = ("generator", "discriminator", "segmenter")       # in State


def memory_format(cfg: Config, device: torch.device) -> torch.memory_format:
    on = device.type == "cuda" if cfg.channels_last is None else cfg.channels_last
    return torch.channels_last if on else torch.contiguous_format


def dress(net: nn.Module, cfg: Config, device: torch.device) -> nn.Module:
    """Autocast, torch.compile and DistributedDataParallel, as asked for, around a network."""
    if cfg.precision == "bf16":                 # losses and optimisers stay in float32
        forward = torch.autocast(device.type, torch.bfloat16)(net.forward)
        net.forward = lambda *x: to_float(forward(*x))
    if cfg.compile:
        net.compile()                           # in place: names in the checkpoint stay as they are
    if dist.is_initialized() and any(p.requires_grad for p in net.parameters()):
        if device.type == "cuda":               # on the CPU each process has its own statistics
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        ids = [device.index] if device.type == "cuda" else None
        net = nn.parallel.DistributedDataParallel(net, ids, broadcast_buffers=False)
    return net


def to_float(output):
    """float32 of a tensor, or of every tensor in a list or a dict."""
    if isinstance(output, dict):
        return {name: each.float() for name, each in output.items()}
    return output.float() if torch.is_tensor(output) else [to_float(each) for each in output]


def plain(net: nn.Module) -> nn.Module:
    """The network itself, without DistributedDataParallel around it."""
    return net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net


def place() -> tuple[int, int]:
    """(rank, number of processes): (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def pick_device(cfg: Config) -> torch.device:
    """The device of this process. Under torchrun it also joins the other processes."""
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpu = cfg.gpu if cfg.gpu is not None else int(os.environ.get("LOCAL_RANK", 0)) if n else -1
    if cfg.gpu is not None and cfg.gpu >= 0 and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"--gpu {gpu}: torchrun gives each process its own GPU; leave the flag out")
    if not -1 <= gpu < n:
        here = ", ".join(f"{k} ({torch.cuda.get_device_name(k)})" for k in range(n)) or "no GPU"
        raise UserError(f"--gpu {gpu}: this machine has {here}; use --gpu -1 for the CPU")
    device = torch.device("cpu") if gpu < 0 else torch.device("cuda", gpu)
    if gpu >= 0:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True   # sizes stay the same: search the fastest once
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if gpu >= 0 else "gloo")
    return device


class Stop:
    """Ctrl-C and SIGTERM: end the step, save, say how to resume. A second Ctrl-C ends at once."""
    signal = 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, self.before[number])

    def asked(self, device: torch.device, step: int) -> bool:
        """True once any process was asked to stop: all must leave the loop at the same step."""
        if dist.is_initialized():
            if step % 10:                       # asking makes everyone wait
                return False
            signals = torch.tensor(self.signal, device=device)
            dist.all_reduce(signals, dist.ReduceOp.MAX)
            self.signal = int(signals)
        return self.signal > 0


def save_checkpoint(state: State, cfg: Config) -> None:
    """Everything that resuming needs, as plain tensors and numbers, in one file."""
    for net in (getattr(state, name) for name in NETWORKS):
        if net is not None and not all(p.isfinite().all() for p in net.parameters()):
            raise UserError(f"a weight is nan or infinite after step {state.step}: stopped; the "
                            "last good checkpoint is kept. A smaller --lr may help")
    content = {"script": NAME, "config": asdict(cfg)}
    for name, value in vars(state).items():
        content[name] = plain(value).state_dict() if hasattr(value, "state_dict") else value
    common.save_file(content, Path(cfg.out) / "checkpoint.pt")


def read_checkpoint(path: Path) -> dict:
    """The content of a checkpoint, or {"released": weights} of a file that is not ours."""
    stored = common.load_file(path, f"give a checkpoint of {NAME}.py")
    if "script" not in stored:
        if not all(isinstance(k, str) and torch.is_tensor(v) for k, v in stored.items()):
            raise UserError(f"{path}: neither a checkpoint of {NAME}.py nor a dict of weights")
        return {"released": {k.removeprefix("module."): v for k, v in stored.items()}}
    if stored["script"] != NAME:
        raise UserError(f"{path}: a checkpoint of {stored['script']}.py, not of {NAME}.py")
    if NETWORKS[0] not in stored:
        raise UserError(f"{path}: damaged, without the {NETWORKS[0]}")
    return stored


def stored_config(stored: dict, path: Path, given: dict, free: set[str]) -> Config:
    """The checkpoint's config with the given flags; those not `free` must not contradict it."""
    if "config" not in stored:
        raise UserError(f"{path}: bare weights; start from them with --init")
    strange = set(stored["config"]) - set(vars(Config()))
    if strange:
        raise UserError(f"{path}: made by another version; it has a setting '{min(strange)}'")
    cfg = Config(**stored["config"])
    try:
        check_config(cfg)
    except TypeError as error:
        raise UserError(f"{path}: damaged, a setting makes no sense ({error})")
    for name, value in given.items():
        if name not in free and value != getattr(cfg, name):
            raise UserError(f"{flag(name)} {value} contradicts {path}, which was trained with "
                            f"{getattr(cfg, name)}; leave the flag out")
    return replace(cfg, **given)


def restore(state: State, stored: dict, path: Path) -> None:
    """Continue exactly: networks, optimisers, and the place in the data."""
    try:
        for name, value in vars(state).items():
            if hasattr(value, "load_state_dict"):
                plain(value).load_state_dict(stored[name])
            else:
                setattr(state, name, stored[name])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:    # of another version
        raise UserError(f"{path}: cannot be gone on with ({str(error).partition(chr(10))[0]}); "
                        "start from its weights with --init")


def load_networks(state: State, path: Path, names: tuple[str, ...] = NETWORKS) -> None:
    """Weights only, for --init and for testing; names and shapes are compared first.

    A released D of V1 is one of three files; what it does not hold stays as it is.
    """
    stored = read_checkpoint(path)
    released = "released" in stored
    if released:
        stored = rename_released(stored["released"], path)
    shared = [name for name in names
              if getattr(state, name) is not None and stored.get(name) is not None]
    if not shared:
        raise UserError(f"{path}: holds {', '.join(stored)}, of which this run uses nothing")
    for name in shared:
        net, theirs = getattr(state, name), stored[name]
        own = plain(net).state_dict()
        part = tuple({k.split(".")[1] for k in theirs}) if released and name != "generator" else ()
        shapes = {k: tuple(v.shape) for k, v in own.items() if "num_batches" not in k
                  and (not part or k.split(".")[1] in part)}
        got = {k: tuple(v.shape) for k, v in theirs.items() if "num_batches" not in k}
        wrong = sorted(k for k in shapes | got if shapes.get(k) != got.get(k))
        if wrong:
            raise UserError(f"{path}: another {name}: {wrong[0]} is {got.get(wrong[0], 'absent')}, "
                            f"expected {shapes.get(wrong[0], 'absent')} ({len(wrong)} such)")
        plain(net).load_state_dict(own | theirs)


def next_run(kind: str = NAME) -> Path:
    """The next free runs/<kind>-N, claimed by making it."""
    for n in range(1, 10 ** 6):
        path = Path("runs") / f"{kind}-{n}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{path}: cannot be made ({error.strerror}); say where with --out")


def newest_run() -> Path:
    """The folder in runs/ whose checkpoint is the youngest."""
    runs = sorted(Path("runs").glob(f"{NAME}-*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError(f"runs/: no run of {NAME}.py yet; train first, or say --checkpoint FILE")
    return runs[-1].parent


def open_run(cfg: Config, resume: bool) -> Config:
    """Make the run's folder, never one that holds another run; write config.json."""
    out = Path(cfg.out) if cfg.out else next_run()
    if (out / "checkpoint.pt").exists() and not resume:    # without one, there is nothing to lose
        raise UserError(f"--out {out}: holds a run already; --resume continues it")
    cfg = replace(cfg, out=str(out))
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(cfg), indent=2))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})")
    return cfg


class Log:
    """log.csv and losses.png. Losses stay on the device until `write`: no step waits for them."""
    EVERY = 20                                  # steps per row

    def __init__(self, folder: Path, step: int):
        self.path, self.pending, self.begun, self.waited = folder / "log.csv", [], time.time(), 0.0
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = lines[:1] + [line for line in lines[1:] if line.count(",") == lines[0].count(",")
                            and int(line.split(",")[0]) <= step]
        if lines:                               # resuming repeats the steps after the checkpoint
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("\n".join(kept) + "\n" if step else "")
            os.replace(temporary, self.path)

    def write(self, state: State, images: int) -> dict:
        """A row: losses, the mean since the last; images per second; share of waiting for data."""
        names = list(self.pending[0])
        values = torch.stack([torch.stack([step[k] for k in names]) for step in self.pending]).cpu()
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise UserError(
                f"loss {names[column]} is {values[row, column]} at step "
                f"{state.step - len(values) + 1 + row}: stopped; the last good checkpoint is kept. "
                "A smaller --lr may help")
        span = time.time() - self.begun
        row = {"step": state.step, "epoch": state.epoch}
        row |= {k: f"{v:.5g}" for k, v in zip(names, values.mean(0).tolist())}
        row["images/s"] = f"{images * len(values) / span:.3g}"
        row["wait"] = f"{self.waited / span:.2f}"
        with open(self.path, "a") as file:
            if not file.tell():
                file.write(",".join(row) + "\n")
            file.write(",".join(map(str, row.values())) + "\n")
        self.pending, self.begun, self.waited = [], time.time(), 0.0
        return row

    def plot(self) -> None:
        names, *rows = [line.split(",") for line in self.path.read_text().splitlines()]
        figure = matplotlib.figure.Figure(figsize=(8, 4.5))
        axes = figure.subplots()
        for k, name in enumerate(names[2:-2], 2):
            values = [float(row[k]) for row in rows]
            smooth = [sum(v) / len(v) for v in (values[max(0, i - 9): i + 1]
                                                for i in range(len(values)))]
            axes.plot([int(row[0]) for row in rows], smooth, label=name)
        axes.set(xlabel="step", ylabel="loss (mean over ten rows of log.csv)", ylim=(0, None))
        axes.legend(frameon=False)
        figure.savefig(self.path.with_name("losses.png"), dpi=120, bbox_inches="tight")


def dataset(cfg: Config, split: str) -> common.Dataset:
    train = split == "train"
    return common.Dataset(
        cfg.data, split, cfg.size, jitter=train and cfg.jitter, mirror=train and cfg.mirror,
        classes=cfg.classes, direction=cfg.direction, limit=cfg.limit, seed=cfg.seed,
        photos_only=cfg.task == "edges", instances=cfg.edges, unpaired=cfg.version == "V1")


class Unpaired(torch.utils.data.Dataset):
    """Labels and photos of one data set, shuffled apart: no photo ever meets its own label (V1).

    Item i has label i and the photo that follows i in a random cycle through all photos, another
    cycle in each epoch. A cycle has no fixed point, and passes each photo once.
    """

    def __init__(self, source: common.Dataset, edges: bool = False):
        self.source, self.labels, self.photos = source, copy.copy(source), copy.copy(source)
        self.edges, self.epoch, self.cycle = edges, 0, (None, None)
        if len(source) < 2:
            raise UserError(f"--data {source.data}: one example; V1 needs two, never to be paired")
        if source.data and not edges:           # what is not read cannot leak
            photo = ("image", "B" if source.direction == "AtoB" else "A")
            self.labels.files, self.photos.files = (
                [{k: v for k, v in files.items() if k not in unread} for files in source.files]
                for unread in (photo, ("label", "instance")))

    def __len__(self) -> int:
        return len(self.source)

    def partner(self, i: int, epoch: int) -> int:
        """The photo of item i in an epoch; it hangs on (seed, epoch) alone."""
        if self.cycle[0] != epoch:
            seed = hash((self.source.seed, epoch)) % 2 ** 63
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
            follower = torch.empty_like(order)
            follower[order] = order.roll(-1)
            self.cycle = (epoch, follower)
        return int(self.cycle[1][i])

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        epoch, i = index if isinstance(index, tuple) else (self.epoch, index)
        item = self.labels[epoch, i]
        if self.edges:
            item = {"name": item["name"], "input": sketch_of(item["image"][None])[0]}
        return {k: item[k] for k in ("name", "label", "input") if k in item} | {
            "image": self.photos[epoch, self.partner(i, epoch)]["image"]}


def open_data(cfg: Config) -> tuple[Config, torch.utils.data.Dataset, common.Dataset]:
    """Both splits, and the config with what the data turned out to be: classes, edges, T."""
    train_set = dataset(cfg, "train")
    roles, layout = train_set.roles, train_set.layout.name
    cfg = replace(cfg, classes=train_set.classes)
    if not roles & {"image", "B", "pair"}:
        raise UserError(f"--data {cfg.data}: layout {layout}, without photos; training needs them")
    if "label" not in roles and cfg.task == "labels":
        raise UserError(f"--data {cfg.data}: layout {layout} has no label maps; for sketches, "
                        "--version V1 --task sketch; to make them from the photos, --task edges")
    if "label" in roles and cfg.task == "sketch":
        raise UserError("--task sketch: this dataset has label maps; --task labels, or edges")
    if cfg.edges and "instance" not in roles:
        notice("no instance maps: trained without their edges")
        cfg = replace(cfg, edges=False)
    if cfg.T != 1 and not foreground_classes(cfg.classes):
        notice("no foreground classes known for this dataset: all pixels weigh the same (T = 1)")
        cfg = replace(cfg, T=1.0)
    images = cfg.batch_size * place()[1]
    if images > len(train_set):
        raise UserError(f"--batch-size {cfg.batch_size}: a step needs {images} images, training "
                        f"has {len(train_set)}")
    check_config(cfg)
    test_set = dataset(cfg, "test")
    if cfg.edges and "instance" not in test_set.roles:
        raise UserError(f"--data {cfg.data}: instance maps for training, but none for testing; add "
                        "them, or train with --no-edges")
    unpaired = cfg.version == "V1"
    return cfg, Unpaired(train_set, cfg.task == "edges") if unpaired else train_set, test_set


def open_loader(train_set: common.Dataset, cfg: Config, device: torch.device) -> common.Loader:
    return common.Loader(train_set, cfg.batch_size, cfg.workers, device, files=bool(cfg.data))


def epoch_batches(loader: common.Loader, cfg: Config, state: State):
    """The rest of this epoch; the order hangs on (seed, epoch) alone."""
    rank, world = place()
    sampler = DistributedSampler(loader.examples, world, rank, seed=cfg.seed, drop_last=True)
    sampler.set_epoch(state.epoch)
    return loader.read(state.epoch, list(sampler)[state.seen // world:])


def to_pair(batch: dict, cfg: Config, device: torch.device) -> dict:
    """A batch of the loader as a pair on the device."""
    batch = make_pair({k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v
                       for k, v in batch.items()}, cfg)
    return {k: v.contiguous(memory_format=memory_format(cfg, device))
            if k in ("input", "image") else v for k, v in batch.items()}


def train(cfg: Config, resume: bool = False) -> Path:
    """Train from scratch, from --init, or on from the checkpoint in cfg.out; returns the folder."""
    device, stored = pick_device(cfg), None
    rank, world = place()
    if resume:
        stored = read_checkpoint(Path(cfg.out) / "checkpoint.pt")
    cfg, train_set, test_set = open_data(cfg)
    if resume and cfg.edges != stored["config"]["edges"]:
        raise UserError(f"--data {cfg.data}: the run began with instance maps, which are gone")
    per_step = cfg.batch_size * world
    per_epoch = len(train_set) // per_step
    total = min(cfg.steps or math.inf, cfg.epochs * per_epoch)
    state, loader = build(cfg, device), open_loader(train_set, cfg, device)
    began = time.time()
    if resume:
        restore(state, stored, Path(cfg.out) / "checkpoint.pt")
    if state.step >= total:
        raise UserError(f"{cfg.out}: finished at step {state.step}, epoch {state.epoch}; a larger "
                        "--epochs or --steps goes on")
    if rank == 0:
        if cfg.version == "V1":
            print(f"V1: {len(train_set)} labels and photos, shuffled apart")
        common.describe(train_set.source if cfg.version == "V1" else train_set)
        common.describe(test_set)
        cfg = open_run(cfg, resume)
        log = Log(Path(cfg.out), state.step)
        print(f"{device}: {total} steps of {per_step} image(s), {per_epoch} an epoch; in {cfg.out}")
    save_every = cfg.save_every or per_epoch
    bar = tqdm(total=total, initial=state.step, unit="step", disable=None if rank == 0 else True)
    with Stop() as stop:
        last = False
        while not last:
            for optimiser, rate in zip((state.opt_g, state.opt_d),
                                       learning_rates(cfg, state.epoch)):
                optimiser.param_groups[0]["lr"] = rate
            clock = time.time()
            for batch in epoch_batches(loader, cfg, state):
                waited = time.time() - clock
                # The noise hangs on (seed, step, process) alone: a resumed run draws the same.
                torch.manual_seed(((cfg.seed * 10 ** 9 + state.step) * world + rank) % 2 ** 63)
                losses = train_step(state, to_pair(batch, cfg, device), cfg)
                state.step, state.seen = state.step + 1, state.seen + per_step
                bar.update()
                last = stop.asked(device, state.step) or state.step >= total
                save = last or state.step % save_every == 0
                if rank == 0:
                    log.pending.append(losses)
                    log.waited += waited
                    if save or state.step % Log.EVERY == 0:
                        row = log.write(state, per_step)
                        bar.set_postfix(row)
                    if save:
                        bar.write("  ".join(f"{k} {v}" for k, v in row.items()))
                        save_checkpoint(state, cfg)
                        sample_grid(state, cfg, test_set, device)
                        log.plot()
                        log.begun = time.time()     # saving and drawing are not training
                if last:
                    break
                clock = time.time()
            else:
                state.epoch, state.seen = state.epoch + 1, 0
    bar.close()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if stop.signal:
        if rank == 0:
            print(f"stopped at step {state.step} and saved; to go on: "
                  f"python {NAME}.py --resume --out {cfg.out}")
        sys.exit(128 + stop.signal)
    if rank == 0:                               # Table 4
        print(f"{(time.time() - began) / 60:.1f} minutes, {peak_memory(device):.1f} GiB at most")
    return Path(cfg.out)


RELEASED = (                                    # keys in the authors' files -> ours, in this order
    (r"weight_orig$", "parametrizations.weight.original"),
    (r"weight_([uv])$", r"parametrizations.weight.0._\1"),
    (r"param_free_norm", "norm"), (r"mlp_shared\.0", "shared"), (r"^conv_img", "head"),  # V2: G
    (r"fpencoder\.model_down\.(\d+)", lambda k: f"globe.down.{int(k[1]) // 2}"),
    (r"_fusion\.input1\.0", "_fusion.merge"), (r"_fusion\.seg_process\.0", "_fusion.label"),
    (r"_fusion\.mask\.0", "_fusion.mask"),                                               # V1: G
    (r"SPADEResBlock_(\d)_fusion", lambda k: f"lsca.{int(k[1]) - 5}"),
    (r"SPADE_([12])_\.1", lambda k: f"conv_{int(k[1]) - 1}"), (r"SPADE_res_\.1", "conv_s"),
    (r"SPADE_([12])\.", lambda k: f"norm_{int(k[1]) - 1}."), (r"SPADE_res\.", "norm_s."),
    (r"common_conv\.0", "shared"), (r"^noise_process", "fc"),
    (r"^out_(\d)\.0", lambda k: f"heads.{int(k[1]) - 5}"),
    (r"^encoder\.model", "encoder.layers"),
    (r"^discriminator_(\d)\.", r"scales.\1."), (r"model4\.0", "last"),                   # D
    (r"model0\.0", "layers.0.0"), (r"model([123])\.0\.0", r"layers.\1.0"),
    (r"common\.([12])\.0\.0", r"common.\1.0"),
    (r"^common\.(\d)\.(weight|bias)", lambda k: f"common.{int(k[1]) // 3}.0.{k[2]}"),
    (r"pre(\d)\.0\.0", lambda k: f"pre.{int(k[1]) - 1}.0"),
    (r"gcb(\d)\.0(\.0)?", lambda k: f"join.{int(k[1]) - 1}.0"),
    (r"conv(\d)_line\.0\.", lambda k: f"line.{int(k[1]) - 1}."),
    (r"pool_branch\.1(\.0)?", "pool.1"),
    (r"conv([35])_branch\.(\d)(\.0)?", lambda k: ("three." if k[1] == "3" else "five.")
     + str(int(k[2]) * 3 // 2 if k[3] else k[2])),
    (r"conv(\d)_out\.0\.0", lambda k: f"out.{int(k[1]) - 1}.0"),
    (r"(scales.*)conv(\d)_out\.2", lambda k: f"{k[1]}out.{int(k[2]) - 1}.3"),
    (r"conv(\d)_out\.2", lambda k: f"out.{int(k[1]) - 1}.2"))


def rename_released(stored: dict, path: Path) -> dict:
    """The authors' files, and SPADE's, under our names: G and D of V1 and of V2.

    Two convolutions for gamma and beta become one. The frozen VGG-16 inside each of their D is left
    out: --vgg says which. Batch norms without gamma_BN, beta_BN get 1 and 0.
    """
    if not any(k in stored for k in ("noise_process.weight", "conv_img.weight", "common.0.weight",
                                     "discriminator_0.common.0.0.weight",
                                     "discriminator_0.model0.0.weight")):
        raise UserError(f"{path}: no checkpoint of {NAME}.py and no released generator or "
                        f"discriminator; its first key is {next(iter(stored), 'missing')}")
    blocks = [b for b in ("head_0", "G_middle_0", "G_middle_1", *(f"up_{k}" for k in range(5)),
                          *(f"SPADEResBlock_{k}" for k in range(1, 8)))
              if any(k.startswith(b + ".") for k in stored)]
    heads = len({k.split(".")[2] for k in stored if k.startswith("fpencoder.model_up")})
    sketch = "encoder.model.0.weight" in stored
    levels = sum(k.startswith("gcb") and k.endswith("weight") for k in stored)
    renamed = {}
    for key, value in stored.items():
        if "backboneNet" in key or sketch and key.startswith("noise_process"):
            continue
        head = key.split(".")[0]
        if head in blocks:
            key = key.replace(head, f"blocks.{blocks.index(head)}", 1)
        if key.startswith("fpencoder.model_up"):                    # theirs: largest factor first
            j, kind = key.split(".")[2], key.split(".")[-1]
            key = f"globe.heads.{heads - 1 - int(j)}.{kind}"
        for pattern, name in RELEASED:
            key = re.sub(pattern, name, key)
        renamed[f"scales.{3 - levels}.{key}" if levels else key] = value
    for key in [k for k in renamed if re.search(r"mlp_gamma|mul_conv", k)]:
        beta = renamed.pop(key.replace("mlp_gamma", "mlp_beta").replace("mul_conv", "add_conv"))
        name = re.sub("mlp_gamma|mul_conv", "gamma_beta", key)
        renamed[name] = torch.cat([renamed.pop(key), beta])
    for key in [k for k in renamed if k.endswith("running_mean")]:
        renamed.setdefault(key.replace("running_mean", "weight"), torch.ones_like(renamed[key]))
        renamed.setdefault(key.replace("running_mean", "bias"), torch.zeros_like(renamed[key]))
    return {"discriminator" if next(iter(renamed)).startswith("scales.") else "generator": renamed}


# ------------------------------------------------------------------------------- 5 Sampling

@torch.no_grad()
def translate(generator: nn.Module, z: Tensor, m: Tensor) -> Tensor:
    """X_3 for maps of any size: (B, noise), (B, N, H, W) -> (B, 3, H, W).

    Sides are mirrored up to the next multiple of 2^ups, and the result is cropped. One image at a
    time, so that none depends on its neighbours.
    """
    h, w = m.shape[-2:]
    rows, columns = (reflect(side, -side % generator.multiple).to(m.device) for side in (h, w))
    padded = m[..., rows, :][..., columns]
    images = [generator(z[k:k + 1], padded[k:k + 1])[0] for k in range(len(m))]
    return torch.cat(images)[..., :h, :w]


def reflect(n: int, more: int) -> Tensor:
    """Indices 0 .. n-1 and `more` back and forth: F.pad reflects, but not by more than n - 1."""
    i = torch.arange(n + more) % max(2 * n - 2, 1)
    return torch.minimum(i, (2 * n - 2 - i).abs())


# At test time G is alone: no other network is built.
ALONE = dict(init=(), compile=False, discriminator="patch", T=1.0, lambda_3=0.0, lambda_4=0.0,
             lambda_5=0.0)


def test_time(state: State, cfg: Config) -> nn.Module:
    """A copy of G for test time: batch norm uses the averages of training (Sec. 3.1.2).

    A copy, since synchronised batch norm must not be entered by one process alone.
    """
    source = plain(state.generator)
    size = tuple(side * source.multiple for side in source.trained)      # cfg's may be another one
    generator = networks(replace(cfg, size=size, **ALONE))[0].to(next(source.parameters()).device)
    generator.load_state_dict(source.state_dict())
    return generator.eval()


def draw(cfg: Config, seed: int, device: torch.device) -> Tensor:
    """z (1, noise) from N(0, truncation^2), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (cfg.truncation * torch.randn(1, cfg.noise, generator=generator)).to(device)


def picture_of(pair: dict, cfg: Config) -> Tensor:
    """The input as a picture (B, 3, H, W): the labels' colours, or the sketch."""
    if cfg.task != "labels":
        return pair["input"].expand(-1, 3, -1, -1)
    return colour_label(pair["label"], class_table(cfg.classes))


def pair_of(item: dict, cfg: Config, device: torch.device, unpaired: bool = False) -> dict:
    """One item of a dataset as a batch of one on the device; a stranger's photo is no truth."""
    batch = {k: v[None].to(device) if torch.is_tensor(v) else v for k, v in item.items()
             if k != "image" or not unpaired}
    return make_pair(batch, cfg)


def sample_grid(state: State, cfg: Config, test_set: common.Dataset, device: torch.device) -> None:
    """samples/<step>.png: input | output | truth of six test examples, evenly spread, two a row."""
    generator, tiles = test_time(state, cfg), []
    n = min(6, len(test_set))
    for i in range(n):
        pair = pair_of(test_set[i * len(test_set) // n], cfg, device, test_set.unpaired)
        values = [picture_of(pair, cfg), translate(generator, draw(cfg, cfg.seed + i, device),
                                                   pair["input"]), pair.get("image")]
        tiles += [value.cpu() for value in values if value is not None]
    path = Path(cfg.out) / "samples" / f"{state.step:07d}.png"
    save_images(torch.cat(tiles), path, nrow=6 if "image" in pair else 4)


def save_images(images: Tensor, path: Path, nrow: int = 1) -> None:
    """(B, 3, H, W) in [-1, 1] to a file; several as a grid."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        grid = make_grid(images, nrow, padding=2 if len(images) > 1 else 0, pad_value=1)
        save_image((grid + 1) / 2, path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({error}); pictures end in .png or .jpg")


def read_input(path: Path, cfg: Config, instances: str = "") -> dict:
    """A user's file as an item: labels (and instances, where G takes their edges), or a picture."""
    if cfg.task != "labels":
        key = "input" if cfg.task == "sketch" else "image"
        return {key: common.read_image(path).float() / 127.5 - 1, "name": path.stem}
    item = {"label": common.read_label(path, class_table(cfg.classes)), "name": path.stem}
    if cfg.edges:
        if not instances:
            raise UserError(f"{path}: this network takes the edges of instances, too; name their "
                            "map, or the folder of maps, with --instances")
        source = Path(instances)
        found = [p for p in sorted(source.iterdir()) if p.stem == path.stem] if (
            source.is_dir()) else [source]
        if not found:
            raise UserError(f"--instances {instances}: no map named {path.stem}")
        item["instance"] = common.read_instance(found[0])
        if item["instance"].shape != item["label"].shape:
            raise UserError(f"{found[0]}: {tuple(item['instance'].shape)}, its label map is "
                            f"{tuple(item['label'].shape)} (height, width)")
    return item


def resize_item(item: dict, size: tuple[int, int]) -> dict:
    """Ids by nearest neighbour, pictures by antialiased bicubic."""
    out = dict(item)
    for k in {"input", "image"} & item.keys():
        picture = F.interpolate(item[k][None], size, mode="bicubic", antialias=True)
        out[k] = picture[0].clamp(-1, 1)
    for k in {"label", "instance"} & item.keys():
        ids = item[k][None, None].double()
        out[k] = F.interpolate(ids, size, mode="nearest-exact")[0, 0].long()
    return out


def sample(cfg: Config, state: State, source: str = "", output: str = "", samples: int = 1,
           size: tuple[int, int] | None = None, instances: str = "") -> Path:
    """Outputs for a file or a folder of any sizes, or for the test split; returns where they are.

    An output has the size of its input; `size` resizes the inputs first. Several samples of one
    input differ by z.
    """
    device, generator = next(plain(state.generator).parameters()).device, test_time(state, cfg)
    if samples < 1:
        raise UserError(f"--samples {samples}: must be 1 or more")
    if samples > 1 and (cfg.first == "label" or generator.fc is None):
        raise UserError(f"--samples {samples}: this network has no noise; it makes one image of "
                        "each input")
    root, target = Path(source), Path(output) if output else Path(cfg.out or ".") / "test"
    if source:
        files = sorted(p for p in root.iterdir() if p.suffix.lower() in common.SUFFIXES) \
            if root.is_dir() else [root]
        if not files:
            raise UserError(f"--input {source}: a folder without images")
        if len({path.stem for path in files}) < len(files):
            raise UserError(f"--input {source}: several files of one name; outputs are named by it")
        items = (read_input(path, cfg, instances) for path in files)
        items = (resize_item(item, size) if size else item for item in items)
    else:
        files = dataset(cfg, "test")
        items = (files[i] for i in range(len(files)))
    to_file = root.is_file() and samples == 1 and target.suffix and not target.is_dir()
    if not to_file and target.suffix.lower() in common.SUFFIXES:
        raise UserError(f"--output {output}: one file for several images; name a folder")
    for item in tqdm(items, total=len(files), unit="image", disable=None):
        pair = pair_of(item, cfg, device)
        for k in range(samples):
            x = translate(generator, draw(cfg, cfg.seed + k, device), pair["input"])
            number = f"_{k + 1}" if samples > 1 else ""
            path = target if to_file else target / f"{item['name']}{number}.png"
            if source and any(path.resolve() == file.resolve() for file in files):
                raise UserError(f"--output {output}: would overwrite the input {path}")
            save_images(x, path)
    print(f"{len(files) * samples} image(s): {target}")
    return target


# ----------------------------------------------------------------------------- 6 Evaluation

# The paper's numbers: PPA, PCA, class IoU, FID.
TABLE_1_2 = {"A_u": (.48, .09, .08, 133.2), "B_u": (.33, .11, .08, 117.7),
             "C_u": (.48, .15, .12, 83.5), "D_u": (.54, .18, .14, 83.4),
             "E_u": (.64, .22, .18, 76.0), "F_u": (.69, .23, .18, 67.9),
             "G_u": (.77, .22, .18, 65.0), "H_u": (.76, .25, .20, 67.4),
             "A_s": (.930, .681, .592, 57.4), "B_s": (.934, .711, .621, 49.2),
             "C_s": (.935, .727, .636, 48.0), "D_s": (.934, .731, .639, 46.0),
             "E_s": (.936, .738, .646, 45.5)}
TABLE_3 = {"CycleGAN": (.52, .17, .11, math.nan), "SCAN": (.64, .20, .16, math.nan),
           "SPAP": (.73, .22, .17, math.nan), "Lab2Pix-V1": (.76, .25, .20, math.nan),
           "pix2pix, paired": (.71, .25, .18, math.nan)}
FACADES = {"CycleGAN": (11.72, .20), "SCAN": (10.67, .17), "SPAP": (12.20, .21),
           "Lab2Pix-V1": (11.85, .28)}          # Table 3: PSNR, SSIM
TABLE_4 = {"CycleGAN": (137.9, 98.0, 11, 1.4), "MUNIT": (105.5, 87.4, 12, 2.8),
           "Lab2Pix-V1": (100.1, 81.1, 8, 1.0), "Lab2Pix-V1*": (76.7, 78.7, 8, 2.0)}
TABLE_5 = {                                     # in percent, and FID
    "cityscapes": {"real images": (93.0, 72.7, 62.1, math.nan), "pix2pixHD": (92.2, 64.4, 55.5,
                   70.3), "SPADE": (93.4, 70.4, 61.2, 62.3), "CC-FPSE": (93.5, 72.5, 63.0, 54.8),
                   "TSIT": (93.6, 71.5, 62.4, 85.9), "Lab2Pix-V2": (93.6, 72.8, 63.6, 47.7)},
    "coco_stuff": {"real images": (59.6, 39.3, 28.3, math.nan), "pix2pixHD": (56.4, 32.0, 22.8,
                   25.7), "SPADE": (61.6, 38.1, 28.0, 22.2), "CC-FPSE": (63.6, 41.6, 30.9, 17.8),
                   "TSIT": (58.4, 34.7, 25.2, 22.1), "Lab2Pix-V2": (62.9, 40.9, 30.5, 16.8)},
    "ade20k": {"real images": (77.3, 44.8, 33.6, math.nan), "pix2pixHD": (78.2, 35.8, 32.5, 38.2),
               "SPADE": (81.2, 48.0, 41.0, 34.3), "CC-FPSE": (82.3, 50.3, 42.9, 33.2),
               "TSIT": (79.8, 43.4, 36.9, 35.3), "Lab2Pix-V2": (80.8, 47.7, 40.7, 28.2)}}


def scorer_for(cfg: Config, device: torch.device) -> common.FCN8s:
    """The FCN-8s of this dataset, trained once and kept beside the runs."""
    name = Path(cfg.data).resolve().name if cfg.data else "streets"
    path = Path(cfg.out or ".").parent / f"fcn8s-{name}-{cfg.size[0]}x{cfg.size[1]}.pt"
    photos = dataset(replace(cfg, limit=0), "train")
    return common.fcn_scorer(photos, path, device, cfg.vgg, cfg.scorer_width, cfg.scorer_steps)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Table 3: peak signal-to-noise ratio in dB of images in [-1, 1], (B, 3, H, W) -> (B,)."""
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(1))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Table 3: structural similarity (Wang et al. 2004) of images in [-1, 1], -> (B,).

    Gaussian windows of 11 x 11, sigma 1.5, K = (0.01, 0.03); mean over windows and channels.
    """
    x, y = (x + 1) / 2, (y + 1) / 2             # it is no matter of differences alone
    line = torch.exp(-(torch.arange(11.0, device=x.device) - 5) ** 2 / (2 * 1.5 ** 2))
    window = (line[:, None] * line / line.sum() ** 2).to(x.dtype).expand(3, 1, 11, 11)

    def mean(t: Tensor) -> Tensor:
        return F.conv2d(t, window, groups=3)

    a, b = mean(x), mean(y)
    var_a, var_b, cov = mean(x * x) - a * a, mean(y * y) - b * b, mean(x * y) - a * b
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    score = (2 * a * b + c1) * (2 * cov + c2) / ((a * a + b * b + c1) * (var_a + var_b + c2))
    return score.flatten(1).mean(1)


def frechet_distance(p: Tensor, q: Tensor) -> float:
    """|mu_p - mu_q|^2 + tr(C_p + C_q - 2 (C_p C_q)^(1/2)) of features (n, c): FID, if Inception's.

    The trace of the root is the nuclear norm of P^T Q, P and Q centred and divided by sqrt(n - 1):
    n x n instead of c x c, and no root of a nearly singular matrix.
    """
    p, q = p.double(), q.double()
    centred = [(f - f.mean(0)) / math.sqrt(max(len(f) - 1, 1)) for f in (p, q)]
    root = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    return ((p.mean(0) - q.mean(0)).square().sum() + sum(c.square().sum() for c in centred)
            - 2 * root).item()


def feature_networks(cfg: Config, device: torch.device) -> dict[str, Callable]:
    """What the Frechet distances compare: {name: images in [-1, 1] -> features (B, c)}.

    VGG's distance works offline. FID needs Inception-V3: torchvision's weights, which are not those
    of published FIDs, so the numbers do not compare with the paper's.
    """
    vgg = frozen_vgg(("relu5_3",), 16, cfg, device)
    nets = {"VGG distance": lambda x: vgg(x)["relu5_3"].mean((2, 3))}
    if cfg.inception:
        net = torchvision.models.inception_v3(weights=None, init_weights=False)
        if cfg.inception == "imagenet":
            source = torchvision.models.Inception_V3_Weights.IMAGENET1K_V1
            try:
                stored = source.get_state_dict(progress=False, check_hash=True)
            except (OSError, RuntimeError, EOFError) as error:
                raise UserError(f"--inception imagenet: {source.url} cannot be had ({error})")
        else:
            stored = common.load_file(Path(cfg.inception), "torchvision's Inception-V3 is needed")
        try:
            net.load_state_dict(stored)
        except (RuntimeError, AttributeError):
            raise UserError(f"--inception {cfg.inception}: not torchvision's Inception-V3")
        net.fc = nn.Identity()
        net.to(device).eval()
        nets["FID (torchvision)"] = lambda x: net(
            F.interpolate(x, (299, 299), mode="bilinear", antialias=True))
    return nets


@torch.no_grad()
def evaluate(cfg: Config, state: State) -> dict:
    """The paper's metrics on the test split, beside its tables; writes metrics.json.

    PPA, PCA, class IoU: a network trained on real photos labels the generated ones. PSNR and SSIM
    where the photo of the label is known, Frechet distances to the test photos, or to photos of the
    training list where the test split has none of its own.
    """
    device, out = next(plain(state.generator).parameters()).device, Path(cfg.out or ".")
    generator, test_set = test_time(state, cfg), dataset(cfg, "test")
    table = class_table(cfg.classes) if cfg.task == "labels" else None
    scorer = scorer_for(cfg, device) if table else None
    photos = test_set if not test_set.unpaired and test_set.roles & {"image", "B", "pair"} else (
        dataset(cfg, "train"))
    nets, confusion, pairwise = feature_networks(cfg, device), {}, []
    features = {name: ([], []) for name in nets}
    for i in tqdm(range(len(test_set)), desc="evaluate", unit="image", disable=None):
        pair = pair_of(test_set[i], cfg, device, test_set.unpaired)
        x = translate(generator, draw(cfg, cfg.seed + i, device), pair["input"])
        photo = pair.get("image") if photos is test_set else (
            photos[i % len(photos)]["image"][None].to(device))
        for name, net in nets.items():
            for kept, view in zip(features[name], (x, photo)):
                kept.append(net(view).cpu())
        if photos is test_set:
            pairwise.append([psnr(x, photo).item(), ssim(x, photo).item()])
        for row, view in (("output", x), ("truth", pair.get("image"))):
            if scorer is not None and view is not None:
                counts = common.confusion_matrix(scorer(view).argmax(1), pair["label"], table)
                confusion[row] = confusion.get(row, 0) + counts.cpu()
    metrics = {"images": len(test_set)}
    if pairwise:
        metrics |= dict(zip(("PSNR", "SSIM"), torch.tensor(pairwise).mean(0).tolist()))
    metrics |= {name: frechet_distance(*map(torch.cat, both)) for name, both in features.items()}
    metrics |= {row: common.segmentation_scores(counts) for row, counts in confusion.items()}
    if confusion:
        metrics["worst classes"] = worst_classes(confusion["output"], table)
    report(metrics, cfg)
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2))
    return metrics


def worst_classes(confusion: Tensor, table: common.ClassTable) -> dict[str, float]:
    """Fig. 17: the five classes that are recognised least in the outputs, by IoU."""
    hits, truth, found = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
    iou = {table.names[k]: (hits[k] / (truth[k] + found[k] - hits[k])).item()
           for k in range(len(hits)) if truth[k]}
    return dict(sorted(iou.items(), key=lambda pair: pair[1])[:5])


def report(metrics: dict, cfg: Config) -> None:
    """The metrics as text beside the paper's. Its data and scorers are others: compare orderings.
    """
    def line(name: str, values, digits: int = 3) -> None:
        print(f"  {name:44}" + "".join(f"{v:9.{digits}f}" for v in values if math.isfinite(v)))

    row = f", row {cfg.ablation}" if cfg.ablation else ""
    print(f"\n{metrics['images']} test images, Lab2Pix-{cfg.version}{row}\n")
    for name in ("PSNR", "SSIM", "VGG distance", "FID (torchvision)"):
        if name in metrics:
            line(name, [metrics[name]])
    print("  (neither distance compares with a published FID)")
    if cfg.version == "V1":
        print("\nTable 3, Facades: PSNR, SSIM")
        for name, values in FACADES.items():
            line(f"paper, {name}", values, 2)
    if cfg.task != "labels":
        print("\nTable 4: FID of shoes, of handbags; GB at batch 4; time")
        for name, values in TABLE_4.items():
            line(f"paper, {name}", values, 1)
        return
    print(f"\n{'FCN-score, by our own scorer':47}{'PPA':>8}{'PCA':>9}{'C-IoU':>9}{'FID':>9}")
    for name in ("output", "truth"):
        if name in metrics:
            line({"output": "this run", "truth": "the photos, scored alike"}[name],
                 metrics[name].values())
    table = 1 if cfg.version == "V1" else 2
    for name, values in TABLE_1_2.items():
        if name.endswith("u") == (table == 1):
            line(f"paper, Table {table}, {name}" + " (this one)" * (name == cfg.ablation), values)
    others = TABLE_3 if table == 1 else TABLE_5.get(cfg.classes, TABLE_5["cityscapes"])
    for name, values in others.items():
        line(f"paper, Table {3 if table == 1 else 5}, {name}", values, 2)
    print("\nrecognised least (IoU): "
          + ", ".join(f"{name} {iou:.2f}" for name, iou in metrics["worst classes"].items()))


# --------------------------------------------------------------------------- 7 Command line

def trace(cfg: Config) -> None:
    """One forward and one training step: stage, shape, parameters; then FLOPs and memory."""
    device = pick_device(cfg)
    cfg, train_set, _ = open_data(replace(cfg, compile=False))
    state = build(cfg, device)
    batch = to_pair(default_collate([train_set[i] for i in range(cfg.batch_size)]), cfg, device)
    m, y = batch["input"], batch["image"]
    print(f"{device}; input {tuple(m.shape)}, image {tuple(y.shape)}")
    z, ys = torch.randn(len(m), cfg.noise, device=device), pyramid(y, cfg.scales, cfg)
    seen = taps(perceive(state.vgg16, ys))
    judged = ys if cfg.version == "V1" else with_label(ys, pyramid(m, cfg.scales, cfg))
    for title, net, inputs in (("generator", state.generator, (z, m)),
                               ("discriminators", state.discriminator, (judged, seen)),
                               ("segmentation", state.segmenter, (ys[:3 if cfg.pg else 1],))):
        if net is None:
            continue
        print(f"\n{title:42}{'output':>20}{'parameters':>14}")
        hooks = [module.register_forward_hook(
            lambda module, _, y, name=name: print(f"  {name + ' ' + type(module).__name__:40}"
                f"{str(tuple(y.shape)):>20}{sum(p.numel() for p in module.parameters()):14,}"))
            for name, module in net.named_modules()
            if isinstance(module, (GenResBlk, LSCA, SketchEncoder, ICNet, MiniInception))
            or re.search(r"(common|join|out|layers|heads|down)\.\d$|^fc$|(head|last)$", name)]
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            net(*inputs)
        for hook in hooks:
            hook.remove()
        print(f"  {'in all':60}{sum(p.numel() for p in net.parameters()):14,}   "
              f"{flops.get_total_flops() / 1e9:.2f} GFLOP forward")
    with FlopCounterMode(display=False) as flops:
        train_step(state, batch, cfg)
    clock = time.time()
    losses = ", ".join(f"{k} {v.item():.4f}" for k, v in train_step(state, batch, cfg).items())
    print(f"\none training step: {flops.get_total_flops() / 1e9:.1f} GFLOP, "
          f"{time.time() - clock:.3f} s, {peak_memory(device):.2f} GiB at most; {losses}")


def peak_memory(device: torch.device) -> float:
    """The most memory this process has used so far, GiB: the GPU's, or the computer's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    try:
        import resource                         # not on Windows
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def add_training_flags(add: Callable) -> None:
    """The objective's and the optimisers'."""
    choice = argparse.BooleanOptionalAction
    for k, what in ((2, "sharpness, Eq. (16)"), (3, "consistency, Eq. (18)"),
                    (4, "cycle segmentation, Eq. (19)"), (5, "perceptual loss, Eq. (28)"),
                    (6, "feature matching, Eq. (29)")):
        default = {f.name: f.default for f in fields(Config)}[f"lambda_{k}"]
        add(f"--lambda-{k}", type=float, metavar="X", help=f"weight: {what} ({default})")
    add("--ramp", action=choice, help="lambda_2 rises from 0 (V1)")
    add("--released-losses", action=choice, help="Eq. (28), (29) as in the released code")
    add("--epochs", type=int, metavar="N", help="passes over the training set (the preset's)")
    add("--decay", action=choice, help="the rate falls in the second half (yes)")
    add("--steps", type=int, metavar="N", help="end after so many updates (0: epochs decide)")
    add("--batch-size", type=int, metavar="N", help="images per step and process (the preset's)")
    add("--lr", type=float, metavar="X", help="Adam's learning rate (0.0002)")
    add("--ttur", action=choice, help="half the rate for G, twice for D; released V2")
    add("--betas", type=float, nargs=2, metavar="B", help="Adam's momentum parameters (0 0.9)")
    add("--seed", type=int, metavar="N", help="of initialisation, order, flips and z (0)")
    add("--init", nargs="+", metavar="FILE", help="start from these weights, ours or the authors'")
    add("--resume", action="store_true", help="continue the run in --out, or the newest, exactly")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints (0: an epoch)")


def refuse(text: str) -> None:
    """In place of argparse's own way, which prints a screen of usage before the one line."""
    raise UserError(f"{text}; --help lists all flags")


def parser() -> argparse.ArgumentParser:
    """A flag per field of Config, and a few for the call; only those given are in the result."""
    p = argparse.ArgumentParser(
        f"{NAME}.py", description=__doc__.split("\n\n")[0], epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    p.error = refuse
    add, choice = p.add_argument, argparse.BooleanOptionalAction
    add("mode", nargs="?", default="train", help="what to do (train)",
        choices=("train", "sample", "evaluate", "check", "trace"))
    add("--data", metavar="DIR", help="a dataset in any known layout (the built-in streets)")
    add("--preset", choices=PRESETS, help="a line of Sec. 5.2 (toy with the streets)")
    add("--version", choices=CHOICES["version"], help="unpaired, paired, paired and large (V2)")
    add("--ablation", choices=ABLATIONS, help="a row of Table 1 (u: V1) or of Table 2 (s: V2)")
    add("--task", choices=CHOICES["task"], help="V1: from what; edges: of the photos (labels)")
    add("--direction", choices=CHOICES["direction"], help="of pairs, where the sketch is (AtoB)")
    add("--classes", metavar="N|NAME", help="a number, or a table of common.py (the data's)")
    add("--edges", action=choice, help="edges of instances beside the labels (V2)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels of the images (256 512)")
    add("--jitter", action=choice, help="enlarge by 286/256 and crop (COCO, ADE20K)")
    add("--mirror", action=choice, help="flip left and right, half the time (yes)")
    add("--limit", type=int, metavar="N", help="use the first N examples (0: all)")
    add("--width", type=int, metavar="N", help="channels of G before its output (64)")
    add("--ups", type=int, metavar="N", help="doublings in G (6)")
    add("--noise", type=int, metavar="N", help="length of z (128)")
    add("--first", choices=CHOICES["first"], help="first feature from z, or as in SPADE (noise)")
    add("--dgnorm", action=choice, help="global encoder and DG-Norm; without: SPADE (yes)")
    add("--form", choices=CHOICES["form"], help="of Eq. (5): see the table above (paper)")
    add("--smooth", action=choice, help="enlarge features bilinearly: ours, against stripes (no)")
    add("--gain", type=float, metavar="X", help="of Xavier's initial weights; 0: as in V1 (0.02)")
    add("--loud", action=choice, help="labels are seen in G's first images: ours, for V1 (no)")
    add("--pg", action=choice, help="progressive generation, three outputs (V1)")
    add("--lsca", action=choice, help="spatial co-attention (V1)")
    add("--discriminator", choices=CHOICES["discriminator"], help="or SPADE's (hpd)")
    add("--d-width", type=int, metavar="N", help="channels of D after its first layer (64)")
    add("--d-norm", choices=CHOICES["d_norm"], help="in D (both; V1 instance)")
    add("--scales", type=int, metavar="N", help="discriminators (2)")
    add("--gan", choices=CHOICES["gan"], help="adversarial loss; vanilla in V1 (hinge)")
    add("--T", type=float, metavar="X", help="foreground to background weight, 1: none (5.0)")
    add("--s-width", type=int, metavar="N", help="channels of S after its first layer (32)")
    add("--s-size", type=int, metavar="N", help="side of what S sees, pixels (256)")
    add_training_flags(add)
    add("--checkpoint", metavar="FILE", help="to sample or evaluate with (the newest run's)")
    add("--input", metavar="PATH", help="sample: a file or a folder of any size (the test split)")
    add("--instances", metavar="PATH", help="sample: the instance maps of --input")
    add("--output", metavar="PATH", help="sample: a file or a folder (test/ in the run's folder)")
    add("--samples", type=int, metavar="N", help="sample: outputs per input (1)")
    add("--truncation", type=float, metavar="X", help="deviation of z at test time (1.0)")
    add("--vgg", metavar="WEIGHTS", help="VGG's weights: imagenet, random or a file (imagenet)")
    add("--vgg-width", type=int, metavar="N", help="64 is VGG; less with random weights (64)")
    add("--vgg-raw", action=choice, help="VGG sees [-1, 1] as it is, as released")
    add("--inception", metavar="WEIGHTS", help="evaluate: FID by imagenet or a file (none)")
    add("--scorer-width", type=int, metavar="N", help="FCN-8s scorer: 64 is VGG-16 (64)")
    add("--scorer-steps", type=int, metavar="N", help="FCN-8s scorer: batches of four (2000)")
    add("--gpu", type=int, metavar="N", help="CUDA device, -1 the CPU (the first GPU if any)")
    add("--workers", type=int, metavar="N", help="processes that load data (4 with a GPU, else 0)")
    add("--precision", choices=CHOICES["precision"], help="bf16: autocast the networks (fp32)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--channels-last", action=choice, help="memory order (with a GPU)")
    add("--out", metavar="DIR", help="the run's folder (the next free runs/lab2pix-N)")
    return p


EXAMPLES = """examples:
  python lab2pix.py                                     train V2 on the built-in streets
  python lab2pix.py --ablation A_s                      the SPADE baseline of Table 2 on them
  python lab2pix.py sample --samples 3                  three outputs for each test layout"""
# Flags of the one call, by the modes that read them; all others are fields of Config.
CALL = {"preset": ("train", "check", "trace", "sample", "evaluate"), "resume": ("train",),
        "checkpoint": ("sample", "evaluate"), "input": ("sample",), "instances": ("sample",),
        "output": ("sample",), "samples": ("sample",)}
# What may differ from the checkpoint when a run goes on, and when it is tested.
FREE = {"data", "epochs", "steps", "save_every", "gpu", "workers", "precision", "compile",
        "channels_last", "out"}
FREE_AT_TEST = FREE | {"size", "limit", "seed", "vgg", "truncation", "inception", "scorer_width",
                       "scorer_steps"}


def load_for_test(given: dict, call: dict) -> tuple[Config, State]:
    """G and config of --checkpoint or the newest run. A released G tells its own shape."""
    path = Path(call["checkpoint"]) if "checkpoint" in call else (
        Path(given["out"]) if "out" in given else newest_run()) / "checkpoint.pt"
    stored = read_checkpoint(path)
    if "released" in stored:
        cfg = released_config(rename_released(stored["released"], path), path, given, call)
        trained_size = cfg.size
    elif "preset" in call:
        raise UserError(f"--preset {call['preset']}: {path} knows its settings; leave the flag out")
    else:
        cfg = stored_config(stored, path, given, FREE_AT_TEST)
        cfg = replace(cfg, init=(), out=given.get("out", str(path.parent)))
        trained_size = tuple(stored["config"]["size"])
    check_config(replace(cfg, size=trained_size))          # an image to be made may have any size
    if min(cfg.size) < 1:
        raise UserError(f"--size {cfg.size[0]} {cfg.size[1]}: must be positive")
    state = build(replace(cfg, size=trained_size, **ALONE), pick_device(cfg))
    load_networks(state, path, ("generator",))
    return cfg, state


def released_config(named: dict, path: Path, given: dict, call: dict) -> Config:
    """The shape of the authors' generators from their weights, the classes from the data."""
    if "generator" not in named:
        raise UserError(f"{path}: a released discriminator; to test, a generator is needed")
    if not {"input", "data"} & set(given | call):
        raise UserError(f"{path}: released weights know no dataset; say --input or --data")
    weights = named["generator"]
    n = weights["blocks.0.norm_0.shared.weight"].shape[1]
    blocks = len({k.split(".")[1] for k in weights if k.startswith("blocks")})
    heads = sum(k.startswith("globe.heads") and k.endswith("bias") for k in weights)
    v1, sketch = "heads.0.weight" in weights, n == 1
    shape = dict(width=weights["blocks.0.norm_0.shared.weight"].shape[0] // 2, dgnorm=heads > 0,
                 task="sketch" if sketch else "labels", out="runs/released")
    if v1:
        shape |= dict(version="V1", form="v1code", ups=blocks)
        if not sketch:
            shape["noise"] = weights["fc.weight"].shape[1]
    else:                                       # SPADE's: only the size tells 5 from 6 doublings
        shape |= dict(version="V2", first="label" if weights["fc.weight"].ndim == 4 else "noise",
                      ups=heads - 1 if heads else 7 if blocks == 8 else 6)
    preset = {k: v for k, v in PRESETS.get(call.get("preset"), {}).items() if k != "version"}
    cfg = configure(**shape | preset | given)
    if not sketch:
        classes = given.get("classes") or (
            dataset(cfg, "test").classes if "data" in given else "cityscapes")
        rest = n - class_table(classes).channels
        if rest not in (0, 1):
            raise UserError(f"{path}: takes {n} channels, the {classes} labels have "
                            f"{class_table(classes).channels}, edges add 1; --classes says "
                            "otherwise")
        cfg = replace(cfg, classes=classes, edges=rest == 1)
    return cfg


def main(arguments: list[str] | None = None) -> None:
    """The command line: arguments -> config -> mode. Raises UserError for a user's mistake."""
    arguments, p = sys.argv[1:] if arguments is None else arguments, parser()
    flags = {name for action in p._actions for name in action.option_strings}
    for word in arguments:                      # argparse would take its value for the mode
        if word.startswith("--") and word.partition("=")[0] not in flags:
            raise UserError(f"{word}: no such flag; --help lists all")
    given = vars(p.parse_args(arguments))
    mode, call = given.pop("mode"), {k: given.pop(k) for k in CALL if k in given}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    for name in call:
        if mode not in CALL[name]:
            raise UserError(f"--{name} goes with {' or '.join(CALL[name])}, not with {mode}")
    if "instances" in call and "input" not in call:
        raise UserError("--instances: goes with --input, whose instance maps it names")
    resume = call.get("resume", False)
    if resume and "preset" in call:
        raise UserError(f"--preset {call['preset']} with --resume: the run knows its settings")
    if mode == "sample":
        cfg, state = load_for_test(given, call)
        sample(cfg, state, call.get("input", ""), call.get("output", ""), call.get("samples", 1),
               given.get("size"), call.get("instances", ""))
        return
    if mode == "evaluate":
        evaluate(*load_for_test(given, call))
        return
    if resume:
        path = (Path(given["out"]) if "out" in given else newest_run()) / "checkpoint.pt"
        cfg = stored_config(read_checkpoint(path), path, given, FREE)
        cfg = replace(cfg, out=str(path.parent), init=())
    else:
        preset = call.get("preset", "" if given.get("data") else "toy")
        cfg = configure(preset, **given)
    check_config(cfg)
    if mode == "check":
        cfg = replace(cfg, jitter=False, mirror=False)
        splits = [dataset(cfg, split) for split in ("train", "test")]
        bad = common.check_data(splits, Path(cfg.out) if cfg.out else next_run("check"))
        if bad:
            raise UserError(f"--data {cfg.data}: {bad} bad file(s), listed above")
    elif mode == "trace":
        trace(cfg)
    else:
        train(cfg, resume)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"{NAME}.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:                    # a disk that is full, a folder that is read-only
        print(f"{NAME}.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:    # numpy's, the GPU's, and torch's on the CPU
        if not (isinstance(error, MemoryError) or "memory" in str(error)):
            raise
        print(f"{NAME}.py: error: out of memory; a smaller --size, --width or --batch-size, or "
              f"--precision bf16, helps ({str(error).partition(chr(10))[0]})", file=sys.stderr)
        sys.exit(2)
