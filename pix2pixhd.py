"""pix2pixHD: large images from label maps, and every object in them open to editing.

T.-C. Wang, M.-Y. Liu, J.-Y. Zhu, A. Tao, J. Kautz, B. Catanzaro. High-Resolution Image Synthesis
and Semantic Manipulation with Conditional GANs. CVPR 2018. Section, equation and table numbers are
those of the CVPR version; "arXiv" is its longer version, 1711.11585.

Idea. pix2pix stops at 256 pixels: above, training is unstable and D sees too little of the image.
So G grows from coarse to fine (a global network, then enhancers around it), three discriminators
look at the image at three sizes, and G must also match the features in their hidden layers, which
steadies the training without any pixel loss. Two inputs are added to the label map: the borders
between objects, and a few numbers per object that an encoder computes from the real photo. Chosen
freely at test time, these numbers give each car its own colour.

Symbols     s  batch["input"], one-hot labels and boundaries     x  batch["image"]
            x_hat = G(s, E(x))     z = E(x), averaged over each object     D_k  scale k, 1 finest

Paper map   (a test reads these lines: every name must exist, and nothing numbered may be missing)
    Eq. (1)     conditional GAN loss               discriminator_loss, generator_loss
    Eq. (2)     several discriminators             MultiScaleDiscriminator, discriminator_loss
    Eq. (3)     feature matching                   feature_matching_loss
    Eq. (4)     the objective, lambda = 10         train_step
    Sec. 3.2    coarse to fine                     Generator, plan, grow
    Sec. 3.3    instance boundaries                boundary_map
    Sec. 3.4    encoder, K-means, sampling         Encoder, instance_average, kmeans, draw_styles
    Sec. 4      perceptual loss (unnumbered)       perceptual_loss
    Table 1     pixel accuracy and mean IoU        evaluate
    Table 2     pairwise preferences               needs people; sample makes its images
    Fig. 1      synthesis and editing              sample, Editor
    Fig. 2      edges to faces and cats            PRESETS, edges2photo
    Fig. 3      G1 inside G2                       Generator
    Fig. 4      with and without boundaries        boundary_map, with --no-boundary
    Fig. 5      the feature map                    Encoder, instance_average
    Fig. 6      preference after a short look      needs people
    Fig. 7      Cityscapes, by loss                sample, with --loss
    Fig. 8      NYU                                sample, on your own --data
    Fig. 9      Cityscapes in detail               sample, with --loss
    Fig. 10     ADE20K                             sample, with --data
    Fig. 11     editing faces by their parts       PRESETS, helen, Editor
    Slides      generators and D scales compared   evaluate, with --generator and --scales

Stages      one command trains all, one after the other; --stage NAME trains one alone
    stage     size  trained       frozen  learning rate            Adam is new for  scales of D
    global    1/2   G1, E, D      -       lr, falls in 2nd half    G1, E, D         scales - 1
    enhancer  1     G2, E, D      G1      lr                       G2, E, D         scales
    joint     1     G1, G2, E, D  -       lr, falls in 2nd half    G1, G2, E        scales
    The enhancer and the joint stage share one schedule of --fine-epochs. With --enhancers 2, G1
    begins at 1/4 of the size with scales - 2, and an enhancer and a joint stage follow for G3. A
    new enhancer, the output layer and the new finest D start from random weights; all others
    start from those of the stage before. With --stored-features E is trained in the first alone.

Paper                             | Released code                     | Here
    three discriminators          | two at 512 x 1024, three above    | 3 at any size (--scales);
                                  |                                   |   2 for G1 before G2
    feature matching is summed    | averaged over the scales          | summed; --fm-mean
      over the scales             |                                   |
    "multiple layers" of D        | the four before the prediction    | these four
    Eq. (1) with logs, trained as | least squares; its log form drops | least squares; --gan log,
      least squares               |   the sigmoid                     |   from logits
    G minimises log(1 - D)        | its log form: -log D              | --gan log: -log D
    VGG layers not named          | relu1_1 .. relu5_1, weights 1/32, | as released; reversed if
                                  |   1/16, 1/8, 1/4, 1               |   the VGG is random, ours
    VGG's input not stated        | [-1, 1], not normalised           | as released; --vgg-normalise
    D's loss: a sum               | half the sum                      | half
    order of updates not stated   | both gradients, then G, then D    | as released
    G1, then G2, then both        | G2 alone, then all, with a new    | as released, in one command
                                  |   Adam for G                      |
    E and G trained jointly       | at full size E's maps are stored  | jointly; --stored-features
                                  |   as 8 bits and E is not trained  |
    windows not mentioned         | z: means over the whole photo,    | means over the part of an
                                  |   then cut to the window          |   object in the window
    all objects are clustered     | those larger than 1/64 image      | as released; --min-area
    a centre is picked            | classes without one: unset memory | their mean, with a notice
    boundary by 4-neighbours      | the same                          | the same, both sides marked
    labels at a smaller scale     | one-hot maps averaged             | as released
    normalisation not stated      | instance norm without parameters  | as released
    biases not stated             | PyTorch's default                 | PyTorch's default
    transposed convolutions make  | the same                          | the same; --smooth, ours, in
      a regular pattern of dots   |                                   |   toy, averages it away
    unknown pixels not mentioned  | an ordinary class, in every loss  | as released
    slides: pix2pix's U-Net       | not released                      | without its dropout
    slides: CRN's generator       | not released                      | 8 modules for 512 x 1024,
                                  |                                   |   9 for 1024 x 2048
    pictures as files             | cut down to 8 bits                | rounded: half of the values
                                  |                                   |   are larger by 1

There is no pixel loss and no noise: an output that differs from the photo is not an error here.

Run         python pix2pixhd.py                               built-in streets, minutes on a laptop
            python pix2pixhd.py --data ./cityscapes --gpu 0   2048 x 1024, coarse to fine
            python pix2pixhd.py edit --style 10001=3          the first car in another colour
"""

import atexit
import itertools
import json
import math
import os
import pickle
import re
import signal
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import common                                   # before torch: it says how torch's threads wait

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common import (
    COUNT, POSITIVE, SHARE, GroupNorm, UserError, Within, boundary_map, check_settings, check_sides,
    class_id, class_table, colour_label, flag, kmeans, notice, row_of, save_images, setting,
    smooth_grid)

# --------------------------------------------------------------------------------- 1 Config

# What the mode edit can change: each flag's form, and the same as a pattern; see in_order.
EDITS = {"set": ("ID=CLASS", r"(\d+)=(.+)"), "style": ("ID=K", r"(\d+)=(\d+)"),
         "remove": ("ID[=CLASS]", r"(\d+)(?:=(.+))?"),
         "paste": ("ID@DOWN,RIGHT", r"(\d+)@(-?\d+),(-?\d+)"),
         "paint": ("TOP,LEFT,BOTTOM,RIGHT=CLASS", r"(\d+),(\d+),(\d+),(\d+)=(.+)"),
         "undo": ("", "")}


@dataclass
class Config:
    """Every setting is a flag. The defaults are the paper's; the text says where it states them."""
    # The task. Boundaries and E need instance maps; where the data has none, labels do for E.
    data: str = setting("", "folder, in any known layout; none: the built-in streets")
    task: str = setting("labels2photo", "or pairs: an RGB input such as edges, Fig. 2", (
        "labels2photo", "pairs"))
    direction: str = setting("AtoB", "which half of a pair is the input", ("AtoB", "BtoA"))
    classes: str = setting("", "a table of common.py, or a number; none: asks the data")
    boundary: bool = setting(True, "instance boundaries beside the labels, Sec. 3.3")
    size: tuple[int, int] = setting((1024, 2048), "height, width in pixels, Sec. 3.2", POSITIVE)
    crop: tuple[int, int] = setting((0, 0), "train enhancers on windows; 0: whole images", COUNT)
    mirror: bool = setting(True, "flip left and right, half the time; released code")
    limit: int = setting(0, "use the first so many examples; 0: all (400 streets)", COUNT)
    # The networks. The defaults are G1 and G2 for 1024 x 2048 pixels: 183 million parameters, of
    # which the nine residual blocks of G1 hold 170 million.
    generator: str = setting("coarse-to-fine", "or the slides' rivals", (
        "coarse-to-fine", "unet", "crn"))
    enhancers: int = setting(1, "0: G1; 1: and G2; 2: and G3; Sec. 3.2", Within((0, 4)))
    width: int = setting(64, "channels after G1's first layer, halved per enhancer", POSITIVE)
    downs: int = setting(4, "halvings in G1; arXiv", Within((0, 8)))
    blocks: int = setting(9, "residual blocks in G1; arXiv", POSITIVE)
    enhancer_blocks: int = setting(3, "residual blocks in each enhancer; arXiv", POSITIVE)
    smooth: bool = setting(False, "ours: average away a transposed convolution's dots")
    scales: int = setting(3, "discriminators, each of half the size, Sec. 3.2", Within((1, 6)))
    d_width: int = setting(64, "channels after D's first layer; arXiv", POSITIVE)
    features: int = setting(0, "numbers per object from the encoder; 3 in Sec. 4; 0: no E", COUNT)
    e_width: int = setting(16, "channels after E's first layer; released code", POSITIVE)
    pool: str = setting("instance", "over what E's map is averaged; label: Fig. 11", (
        "instance", "label"))
    # The objective: GAN + lambda_fm FM + lambda_vgg VGG. The GAN term itself has weight 1.
    loss: str = setting("GAN+FM+VGG", "Sec. 4.2", ("GAN+FM+VGG", "GAN+FM", "GAN"))
    gan: str = setting("lsgan", "least squares, Sec. 4; or Eq. (1)'s logs", ("lsgan", "log"))
    lambda_fm: float = setting(10.0, "lambda in Eq. (4), Sec. 4", COUNT)
    lambda_vgg: float = setting(10.0, "weight of the perceptual loss, Sec. 4", COUNT)
    fm_mean: bool = setting(False, "released code: mean of Eq. (3) over the scales, not the sum")
    vgg: str = setting("imagenet", "VGG-19's weights, and the scorer's: imagenet, random, a file")
    vgg_width: int = setting(64, "64 is VGG; less with random weights, for small studies", POSITIVE)
    vgg_normalise: bool = setting(False, "ImageNet's mean and deviation before VGG")
    # Training. The three numbers of epochs are those of the stages in the table above.
    stage: str = setting("all", "coarse to fine; or one stage alone, from --init; Sec. 3.2", (
        "all", "global", "enhancer", "joint"))
    epochs: int = setting(200, "passes over the data that train G1; arXiv", POSITIVE)
    fine_epochs: int = setting(100, "of each enhancer, alone and joint; released code", POSITIVE)
    enhancer_epochs: int = setting(10, "of these, with the rest of G frozen; released code", COUNT)
    steps: int = setting(0, "end after so many updates; 0: epochs decide", COUNT)
    batch_size: int = setting(1, "images per step and process; released code", POSITIVE)
    lr: float = setting(2e-4, "Adam's, all networks; arXiv", Within((1e-9, 0.9)))
    betas: tuple[float, float] = setting((0.5, 0.999), "Adam's; released code", SHARE)
    seed: int = setting(0, "of initialisation, order, flips and styles", COUNT)
    init: tuple[str, ...] = setting((), "start from these weights: ours, or the authors'")
    save_every: int = setting(0, "steps between checkpoints and grids; 0: an epoch", COUNT)
    # Styles: what E says about each object of the training photos, clustered after training.
    stored_features: bool = setting(False, "released code: no training of E beside enhancers")
    clusters: int = setting(10, "styles per class, K of K-means, Sec. 4", POSITIVE)
    min_area: float = setting(1 / 64, "least share of the image; released code", Within((0, 1)))
    # Evaluation: the network that labels the photos in place of the paper's PSPNet.
    scorer_width: int = setting(64, "64 is VGG-16; less for small studies", POSITIVE)
    scorer_steps: int = setting(2000, "ours: batches of four that the scorer trains on", POSITIVE)
    # The machine. Nothing here changes what is learned, but for rounding.
    gpu: int | None = setting(None, "a CUDA device; -1: the CPU; none: the first", Within((-1, 99)))
    workers: int | None = setting(None, "data processes; none: 4 with a GPU", Within((0, 256)))
    precision: str = setting("fp32", "bf16: autocast around the networks", ("fp32", "bf16"))
    compile: bool = setting(False, "torch.compile the networks")
    channels_last: bool | None = setting(None, "memory order; none: with a GPU")
    out: str = setting("", "the run's folder; none: the next free runs/pix2pixhd-N")
    # One call: what a single command does, and not what a run is. See CALL in room 7 for which
    # mode reads which.
    preset: str = setting("", "a released script's settings; none: toy with the streets")
    resume: bool = setting(False, "continue the run in --out, or the newest, exactly")
    checkpoint: tuple[str, ...] = setting((), "to test with, also the authors'; none: the newest")
    input: str = setting("", "a file or a folder of any size; none: the test split")
    instances: str = setting("", "the instance maps of --input, a file or a folder")
    output: str = setting("", "a file or a folder; none: test/ or edits/ in the run's folder")
    samples: int = setting(1, "outputs per input, by other styles", POSITIVE)
    vary: tuple[str, ...] = setting((), "draw new styles for objects of these classes alone")
    item: str = setting("", "edit: an example of the test split by name; none: the first")
    edits: tuple[str, ...] = setting((), "edit: " + " ".join(
        f"--{name} {form}".strip() for name, (form, _) in EDITS.items()), action="extend")
    clusters_file: str = setting("", "encode: take the authors' clusters (.npy) from here")

    def __post_init__(self):
        check_settings(self)
        # G1 halves its input `downs` times, and works at 1 / 2^enhancers of the full size.
        n, unit = self.downs + self.enhancers, 2 ** (self.downs + self.enhancers)
        for wrong, why in (
                (self.width % 2 ** self.enhancers, f"--width {self.width}: is halved with each "
                 f"enhancer, so it must be a multiple of {2 ** self.enhancers}"),
                (self.enhancers and self.enhancer_epochs >= self.fine_epochs, "--enhancer-epochs "
                 f"{self.enhancer_epochs}: must be fewer than --fine-epochs {self.fine_epochs}, of "
                 "which they are the first"),
                (self.enhancers and self.generator != "coarse-to-fine",
                 f"--generator {self.generator}: has no enhancers; add --enhancers 0"),
                (self.stage in ("enhancer", "joint") and not self.enhancers or
                 self.stage == "enhancer" and not self.enhancer_epochs,
                 f"--stage {self.stage}: needs --enhancers and --enhancer-epochs of 1 or more"),
                (self.task == "pairs" and self.features, f"--features {self.features}: objects are "
                 "found in label maps, and --task pairs has none; use --features 0"),
                (self.instances and not self.input, "--instances: goes with --input"),
                (self.item and self.input, "--item with --input: only one can choose the scene")):
            if wrong:
                raise UserError(why)
        # Two pixels are the least that instance norm and reflected borders can work on.
        for name, size in (("--size", self.size), ("--crop", self.crop)):
            if name == "--size" or any(size):
                check_sides(name, size, unit, 2 * unit, f"G halves each side {n} times")


# The released training scripts, line by line, but for D's scales: 512p has two there, and three
# here as in the paper. There, G1 at 512p and G1+G2 at 1024p are separate runs; here "1024p" trains
# both, one after the other.
PRESETS = {
    "512p": dict(size=(512, 1024), enhancers=0),                                  # G1 alone
    "512p-features": dict(size=(512, 1024), enhancers=0, features=3),             # and E
    "1024p": dict(),                                                              # 24 GB of memory
    "1024p-12GB": dict(crop=(1024, 1024), fine_epochs=200, enhancer_epochs=20),   # windows
    "1024p-features": dict(features=3, stored_features=True),                     # Sec. 3.4
    "1024p-features-12GB": dict(features=3, stored_features=True, crop=(896, 896),
                                fine_epochs=200, enhancer_epochs=20),
    "labels-only": dict(boundary=False),                                          # Table 2
    "edges2photo": dict(task="pairs", boundary=False, size=(1024, 1024)),         # Fig. 2
    "helen": dict(size=(1024, 1024), features=3, pool="label", boundary=False),   # Fig. 11
    # Ours, for the streets on a laptop's CPU. The networks are narrow, which allows Adam a larger
    # rate. A random VGG keeps small objects in shape. --smooth removes the dots of the transposed
    # convolutions, which training removes only in far more steps. There is little time for full
    # size: no stage trains the enhancer alone, and half of lambda_fm gave sharper pictures.
    "toy": dict(size=(96, 192), limit=400, width=32, downs=2, blocks=3, enhancer_blocks=2,
                smooth=True, scales=3, d_width=16, features=3, e_width=8, vgg="random", vgg_width=8,
                lambda_fm=5.0, lambda_vgg=30.0, lr=6e-4, epochs=2, fine_epochs=4, enhancer_epochs=0,
                min_area=0.002, scorer_width=16, scorer_steps=600),
}
# Ours, too: the same for an hour, larger, and with the paper's lambda_fm.
PRESETS["streets"] = PRESETS["toy"] | dict(size=(128, 256), limit=800, lambda_fm=10.0, epochs=3,
                                           fine_epochs=7, scorer_steps=1200)


def configure(preset: str, given: dict) -> Config:
    """The paper's settings, then a preset's, then what was given."""
    # The slides' rivals are one network each: nothing to enhance, whatever the preset says.
    rival = {"enhancers": 0} if given.get("generator") in ("unet", "crn") else {}
    cfg = Config(**{"preset": preset} | row_of(PRESETS, "--preset", preset) | rival | given)
    if cfg.stage in ("enhancer", "joint") and not cfg.init:
        notice(f"--stage {cfg.stage} without --init: G1 starts from random weights")
    return cfg


# ------------------------------------------------------------------------------- 2 Networks

def instance_norm(c: int) -> nn.GroupNorm:
    """Each channel of each image to mean 0, variance 1; no parameters, no running averages.

    A group norm with one channel per group is this very function, and on the CPU the faster one.
    """
    return GroupNorm(c, c, affine=False)


def convolution(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """Convolution, instance norm, ReLU. At stride 1 borders are reflected, at stride 2 zero."""
    mode = "reflect" if stride == 1 else "zeros"
    return [nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, padding_mode=mode),
            instance_norm(c_out), nn.ReLU()]


class Doubling(nn.ConvTranspose2d):
    """Transposed convolution, (B, c_in, H, W) -> (B, c_out, 2 H, 2 W).

    Its 3 x 3 kernels overlap at every other pixel, so an untrained one makes a pattern of dots, and
    training has to remove it. `smooth`, ours, takes the mean of each 2 x 2 window (smooth_grid):
    the pattern disappears, and some sharpness with it.
    """
    smooth = False

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 3, 2, 1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return smooth_grid(x) if self.smooth else x     # without: as in the paper and the release


def deconvolution(c_in: int, c_out: int) -> list[nn.Module]:
    """Transposed convolution that doubles H and W, instance norm, ReLU."""
    return [Doubling(c_in, c_out), instance_norm(c_out), nn.ReLU()]


class ResidualBlock(nn.Module):
    """x + branch(x); no ReLU after the sum, or the branch could only add (Johnson et al.)."""

    def __init__(self, c: int):
        super().__init__()
        self.branch = nn.Sequential(*convolution(c, c), *convolution(c, c)[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class GlobalGenerator(nn.Module):
    """G1 without its output layer: front-end, residual blocks, back-end (Sec. 3.2, Fig. 3).

    s (B, c, H, W)  ->  (B, width, H, W), after a ReLU; H, W multiples of 2^downs.
    arXiv: c7s1-64, d128, d256, d512, d1024, R1024 x 9, u512, u256, u128, u64, and c7s1-3 to come.
    """

    def __init__(self, c_in: int, width: int = 64, downs: int = 4, blocks: int = 9):
        super().__init__()
        c = [width * 2 ** i for i in range(downs + 1)]                       # 64 128 256 512 1024
        self.front = nn.Sequential(*convolution(c_in, width, 7))             # (B, 64, H, W)
        for c_a, c_b in zip(c, c[1:]):
            self.front.extend(convolution(c_a, c_b, stride=2))               # (B, 1024, H/16, W/16)
        self.residual = nn.Sequential(*(ResidualBlock(c[-1]) for _ in range(blocks)))  # unchanged
        self.back = nn.Sequential()
        for c_a, c_b in zip(c[::-1], c[-2::-1]):
            self.back.extend(deconvolution(c_a, c_b))                        # (B, 64, H, W)

    def forward(self, s: Tensor) -> Tensor:
        return self.back(self.residual(self.front(s)))


class LocalEnhancer(nn.Module):
    """G2, or G3, ..., without its output layer (Sec. 3.2, Fig. 3).

    s (B, c, H, W), below (B, 2 width, H/2, W/2)  ->  (B, width, H, W), after a ReLU.

    `below` is the last feature map of the next coarser network, not its image. It is added to what
    the front-end makes of the labels, and the residual blocks work on the sum.
    arXiv: c7s1-32, d64, R64 x 3, u32, and c7s1-3 to come.
    """

    def __init__(self, c_in: int, width: int = 32, blocks: int = 3):
        super().__init__()
        self.front = nn.Sequential(*convolution(c_in, width, 7),                # (B, 32, H, W)
                                   *convolution(width, 2 * width, stride=2))    # (B, 64, H/2, W/2)
        self.residual = nn.Sequential(*(ResidualBlock(2 * width) for _ in range(blocks)))
        self.back = nn.Sequential(*deconvolution(2 * width, width))             # (B, 32, H, W)

    def forward(self, s: Tensor, below: Tensor) -> Tensor:
        return self.back(self.residual(self.front(s) + below))


class Generator(nn.Module):
    """G = {G1, G2, ...}: the global network inside its local enhancers (Sec. 3.2, Fig. 3).

    s (B, c, H, W)  ->  image (B, 3, H, W) in [-1, 1]; sides multiples of 2^(downs + enhancers).

    G1 works at half the size of G2, and G2 at half that of G3. `width` is G1's and halves with each
    enhancer: 64 at 1024 x 512, 32 at 2048 x 1024, 16 at 4096 x 2048. Only the outermost network
    makes an image; when an enhancer is put around it, its output layer is dropped.
    """

    def __init__(self, c_in: int = 36, c_out: int = 3, width: int = 64, downs: int = 4,
                 blocks: int = 9, enhancers: int = 1, enhancer_blocks: int = 3):
        super().__init__()
        self.multiple = 2 ** (downs + enhancers)
        self.globe = GlobalGenerator(c_in, width, downs, blocks)    # "global" is a word of Python
        self.enhancers = nn.ModuleList(
            LocalEnhancer(c_in, width // 2 ** n, enhancer_blocks) for n in range(1, enhancers + 1))
        self.output = nn.Sequential(nn.Conv2d(width // 2 ** enhancers, c_out, 7, padding=3,
                                              padding_mode="reflect"), nn.Tanh())
        self.apply(initialise)

    def forward(self, s: Tensor) -> Tensor:
        # Every network reads the labels at its own size; features go from coarse to fine.
        pyramid = [s]                                        # the largest first
        for _ in self.enhancers:
            pyramid.append(half(pyramid[-1]))
        y = self.globe(pyramid.pop())                        # the smallest: (B, 64, H/2^n, W/2^n)
        for enhancer in self.enhancers:
            y = enhancer(pyramid.pop(), y)                   # (B, 32, 2 h, 2 w)
        return self.output(y)                                # (B, 3, H, W)


def half(x: Tensor) -> Tensor:
    """3 x 3 average at stride 2: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)).

    For images and for one-hot labels alike: a mixed pixel says which classes meet in it. Padding is
    not counted, so borders keep their brightness.
    """
    return F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)


class UNet(nn.Module):
    """The slides' first rival: pix2pix's U-Net under this paper's losses.

    It has instance norm instead of batch norm, and no dropout: there is no noise in this paper.
    s (B, c, H, W)  ->  (B, 3, H, W) in [-1, 1]. Halved `downs` times; skips join equal sizes.
    """

    def __init__(self, c_in: int, c_out: int = 3, width: int = 64, downs: int = 8):
        super().__init__()
        self.multiple = 2 ** downs
        c = [width * min(2 ** i, 8) for i in range(downs)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (c_a, c_b) in enumerate(zip([c_in, *c], c)):
            norm = [instance_norm(c_b)] if 0 < i < downs - 1 else []
            self.down.append(nn.Sequential(nn.Conv2d(c_a, c_b, 4, 2, 1), *norm, nn.LeakyReLU(0.2)))
        outputs = [*c[-2::-1], c_out]
        for c_a, c_b in zip([c[-1], *(2 * k for k in c[-2::-1])], outputs):
            last = instance_norm(c_b) if len(self.up) < downs - 1 else nn.Tanh()
            self.up.append(nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(c_a, c_b, 4, 2, 1), last))
        self.apply(initialise)

    def forward(self, s: Tensor) -> Tensor:
        maps = [s]
        for block in self.down:
            maps.append(block(maps[-1]))                     # (B, c_i, H / 2^i, W / 2^i)
        y = self.up[0](maps.pop())
        for block in self.up[1:]:                            # each also sees the map of its size
            y = block(torch.cat([maps.pop(), y], 1))
        return y


class CRN(nn.Module):
    """The slides' second rival: the cascaded refinement network of Chen & Koltun, in these losses.

    s (B, c, H, W)  ->  (B, 3, H, W) in [-1, 1]. From 1/2^downs of the size on, each module sees the
    labels at its size beside the doubled output of the one before. Widths 16, 16, 16, 16, 16, 8, 8,
    2, 0.5 times `width`: of these nine, as many as there are sizes from 4 rows to all of them.
    """

    def __init__(self, c_in: int, c_out: int = 3, width: int = 64, downs: int = 7):
        super().__init__()
        self.multiple = 2 ** downs
        widths = [max(4, int(width * k)) for k in (16, 16, 16, 16, 16, 8, 8, 2, 0.5)][:downs + 1]
        self.refine = nn.ModuleList()
        for c_a, c_b in zip([0, *widths], widths):
            layers = []
            for c in (c_a + c_in, c_b):
                layers += [nn.Conv2d(c, c_b, 3, 1, 1), GroupNorm(1, c_b), nn.LeakyReLU(0.2)]
            self.refine.append(nn.Sequential(*layers))
        self.output = nn.Sequential(nn.Conv2d(widths[-1], c_out, 1), nn.Tanh())
        self.apply(initialise)

    def forward(self, s: Tensor) -> Tensor:
        y = None                                             # the first module sees labels alone
        for i, module in enumerate(self.refine):
            labels = F.interpolate(s, scale_factor=0.5 ** (len(self.refine) - 1 - i), mode="area")
            if y is not None:
                y = F.interpolate(y, labels.shape[-2:], mode="bilinear")
                labels = torch.cat([y, labels], 1)           # (B, c_a + c, h, w)
            y = module(labels)                               # (B, c_b, h, w)
        return self.output(y)


class PatchDiscriminator(nn.Module):
    """One D_k: real or fake, asked for every 70 x 70 patch; and its hidden maps, for Eq. (3).

    s and x together (B, c, H, W)  ->  [4 hidden maps, prediction (B, 1, H/8 + 3, W/8 + 3)]

    arXiv: C64-C128-C256-C512, instance norm except on the first, LeakyReLU 0.2. Padding is 2, not
    pix2pix's 1, so maps are one larger than a half, and the two of stride 1 grow by one again.
    """

    def __init__(self, c_in: int = 39, width: int = 64):
        super().__init__()
        c = [c_in, *(min(width * 2 ** i, 512) for i in range(4)), 1]     # at most 512, as released
        self.layers = nn.ModuleList()
        for i, stride in enumerate((2, 2, 2, 1, 1)):         # a unit sees 4, 10, 22, 46, 70 pixels
            layer = [nn.Conv2d(c[i], c[i + 1], 4, stride, 2)]            # 39 64 128 256 512 1
            layer += [instance_norm(c[i + 1])] if 0 < i < 4 else []
            layer += [nn.LeakyReLU(0.2)] if i < 4 else []                # the prediction is linear
            self.layers.append(nn.Sequential(*layer))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for layer in self.layers:
            x = layer(x)                        # H/2 + 1, H/4 + 1, H/8 + 1, then H/8 + 2, H/8 + 3
            maps.append(x)
        return maps


class MultiScaleDiscriminator(nn.Module):
    """D_1, D_2, D_3: the same network, each with weights of its own, at three sizes (Sec. 3.2).

    s (B, c, H, W), x (B, 3, H, W)  ->  per scale, the finest first: a list as above.

    A unit of the finest sees 70 pixels, of the next 141, of the coarsest 283: the first judges
    texture, the last whether the whole makes sense. Labels shrink together with the image. Inside,
    the coarsest stands first, so that a larger image adds a discriminator at the end.
    """

    def __init__(self, c_in: int = 39, width: int = 64, scales: int = 3):
        super().__init__()
        self.scales = nn.ModuleList(PatchDiscriminator(c_in, width) for _ in range(scales))
        self.apply(initialise)

    def forward(self, s: Tensor, x: Tensor) -> list[list[Tensor]]:
        y, results = torch.cat([s, x], 1), []
        for k, discriminator in enumerate(reversed(self.scales)):
            y = half(y) if k else y             # labels and image together
            results.append(discriminator(y))
        return results


class Encoder(nn.Module):
    """E: what the label map leaves open, as `c_out` numbers per pixel (Sec. 3.4, Fig. 5).

    x (B, 3, H, W)  ->  (B, c_out, H, W) in [-1, 1], to be averaged by instance_average.

    It sees the photo alone, through a field of 69 pixels: G1's outline without residual blocks.
    """

    def __init__(self, c_out: int = 3, width: int = 16, downs: int = 4):
        super().__init__()
        c = [width * 2 ** i for i in range(downs + 1)]                       # 16 32 64 128 256
        self.layers = nn.Sequential(*convolution(3, width, 7))
        for c_a, c_b in zip(c, c[1:]):
            self.layers.extend(convolution(c_a, c_b, stride=2))
        for c_a, c_b in zip(c[::-1], c[-2::-1]):
            self.layers.extend(deconvolution(c_a, c_b))
        self.output = nn.Sequential(nn.Conv2d(width, c_out, 7, padding=3, padding_mode="reflect"),
                                    nn.Tanh())
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        z = self.output(self.layers(x))         # halved and doubled, an odd side has become even
        return z[..., :x.shape[2], :x.shape[3]]


def instance_average(z: Tensor, region: Tensor) -> Tensor:
    """Every pixel gets the mean of its object (Sec. 3.4): z (B, C, H, W), region (B, H, W) ids.

    In plain words, for each image b and each object o that is in it:

        z[b][:, region[b] == o] = z[b][:, region[b] == o].mean(1)

    So an object has one value in z, however large it is, and E cannot pass the photo itself to G.
    The result is that of this loop; see ObjectMean for how it is computed without one.
    """
    return ObjectMean.apply(z, region)


class ObjectMean(torch.autograd.Function):
    """The mean per object without a loop over objects, which would take a pass over z for each.

    Neighbours in a row that belong to one object are a run; there are a hundred times fewer runs
    than pixels. Each run is summed, then the runs of each object, and each pixel reads the mean of
    its run's object. Sums are in float64, for a road is a sum of 10^5 pixels.

    The gradient needs no other formula. Averaging is linear, and pixel p has the same weight in the
    result at q as q has in the result at p; so the incoming gradient is averaged in the same way.
    """

    @staticmethod
    def forward(ctx, z: Tensor, region: Tensor) -> Tensor:
        key = region * len(region) + torch.arange(len(region), device=z.device).view(-1, 1, 1)
        run, at, length = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
        owner = run.unique(return_inverse=True)[1]      # a number for each object of each image
        where = at.flatten(), length, owner             # (B H W): run of a pixel; (R); (R): object
        ctx.save_for_backward(*where)
        return ObjectMean.average(z, *where)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ObjectMean.average(gradient, *ctx.saved_tensors), None

    @staticmethod
    def average(z: Tensor, at: Tensor, length: Tensor, owner: Tensor) -> Tensor:
        b, c, h, w = z.shape
        pixels = z.transpose(0, 1).reshape(c, -1).double()
        sums = torch.segment_reduce(pixels, "sum", lengths=length.expand(c, -1), axis=1)
        sums = sums.new_zeros(c, len(owner)).index_add(1, owner, sums)             # (C, objects)
        means = (sums / torch.bincount(owner, length, len(owner))).to(z.dtype)
        return means[:, owner].index_select(1, at).view(c, b, h, w).transpose(0, 1)


def initialise(module: nn.Module) -> None:
    """Weights from N(0, 0.02) (arXiv). Released code: biases keep PyTorch's default."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)


# --------------------------------------------------------------------------------- 3 Losses

Maps = list[list[Tensor]]       # per scale, the finest first: four hidden maps and the prediction


def discriminator_loss(real: Maps, fake: Maps, gan: str = "lsgan") -> tuple[Tensor, Tensor]:
    """Eq. (2), D's side: sum_k of Eq. (1), as (real, fake), each halved.

    Sec. 4 trains with least squares: mean (D_k(s, x) - 1)^2 and mean D_k(s, G(s))^2. They pull
    the predictions to 1 and 0 and keep a gradient where the logs of Eq. (1) are saturated. In the
    log form predictions are logits. Means run over the batch and all patches of one scale.
    Released code: half of the two; with Adam a factor hardly matters.
    """
    if gan == "log":
        return (sum(F.softplus(-maps[-1]).mean() for maps in real) / 2,   # -log sigmoid(a)
                sum(F.softplus(maps[-1]).mean() for maps in fake) / 2)    # -log(1 - sigmoid(a))
    return (sum((maps[-1] - 1).square().mean() for maps in real) / 2,
            sum(maps[-1].square().mean() for maps in fake) / 2)


def generator_loss(fake: Maps, gan: str = "lsgan") -> Tensor:
    """Eq. (2), G's side: sum_k mean (D_k(s, G(s)) - 1)^2, with weight 1.

    In the log form, as in the release, G minimises -log D_k and not Eq. (1)'s log(1 - D_k), whose
    gradient vanishes while D is winning.
    """
    if gan == "log":
        return sum(F.softplus(-maps[-1]).mean() for maps in fake)
    return sum((maps[-1] - 1).square().mean() for maps in fake)


def feature_matching_loss(real: Maps, fake: Maps, mean: bool = False) -> Tensor:
    """Eq. (3), summed over k as in Eq. (4): sum_ki ||D_k^(i)(s, x) - D_k^(i)(s, G(s))||_1 / N_i.

    N_i, the number of elements of map i, makes each term a mean. The T = 4 hidden maps count, the
    prediction does not. The real side is a target, hence detached: D "does not maximize" this loss.
    Released code: divided by the number of scales (mean=True), and by (n + 1) / 4 for n layers of
    stride 2, which is 1 for the n = 3 here.
    """
    total = sum((theirs.detach() - ours).abs().mean()        # maps_x[:-1]: without the prediction
                for maps_x, maps_g in zip(real, fake) for theirs, ours in zip(maps_x[:-1], maps_g))
    return total / len(real) if mean else total


VGG_LAYERS = {"relu1_1": 1 / 32, "relu2_1": 1 / 16, "relu3_1": 1 / 8, "relu4_1": 1 / 4,
              "relu5_1": 1.0}


def perceptual_loss(real: dict[str, Tensor], fake: dict[str, Tensor],
                    random: bool = False) -> Tensor:
    """Sec. 4, unnumbered: sum_i ||F^(i)(x) - F^(i)(G(s))||_1 / M_i over layers of VGG-19.

    Paper: layers not named, weights equal. Released code: those above; the weights make up for
    maps that shrink, and the authors found equal ones to work as well. They count on layers that
    know objects; a random VGG's know the less the deeper they are. So, ours: with --vgg random the
    weights are taken in reverse.
    """
    weights = [*VGG_LAYERS.values()][::-1] if random else VGG_LAYERS.values()
    return sum(weight * (real[name] - fake[name]).abs().mean()
               for name, weight in zip(VGG_LAYERS, weights))


def perceptual_term(vgg: nn.Module, x: Tensor, x_hat: Tensor,
                    random: bool = False) -> tuple[Tensor, Tensor]:
    """The perceptual loss twice: its value, for the log, and a term of G's objective.

    A trick that saves memory. Of this loss G's backward pass needs nothing but the gradient g at
    x_hat. It is taken at once, before D sees x_hat, so VGG's maps and D's are never in memory
    together; and sum(g * x_hat), a term with the very same gradient, stands in for the loss.
    """
    with torch.no_grad():                       # the photo's features are a target: no graph
        features = vgg(x)
    loss = perceptual_loss(features, vgg(x_hat), random)
    gradient, = torch.autograd.grad(loss, x_hat)
    return loss.detach(), (gradient * x_hat).sum()


# ------------------------------------------------------------------------------- 4 Training

@dataclass
class State:
    """What training changes; a checkpoint holds it, the place in the data and the log."""
    generator: nn.Module
    discriminator: nn.Module
    encoder: nn.Module | None                   # None with --features 0
    vgg: nn.Module | None                       # frozen; None without a VGG loss
    opt_g: torch.optim.Optimizer                # of G and E
    opt_d: torch.optim.Optimizer
    stage: int = 0                              # its place in plan(cfg)
    styles: dict[int, Tensor] = field(default_factory=dict)    # class: (K, C) centres, by K-means
    means: dict[int, Tensor] = field(default_factory=dict)     # class: (C,) mean over its objects


@dataclass
class Stage:
    """One part of the coarse-to-fine training; epochs count from the start of the run."""
    name: str                                   # global, enhancer, joint
    cfg: Config                                 # with this stage's size, enhancers and scales
    first: int                                  # epochs of the run before it
    epochs: int                                 # its own
    done: int                                   # epochs of its learning-rate schedule before it
    total: int                                  # epochs of that schedule


def plan(cfg: Config) -> list[Stage]:
    """Sec. 3.2: "first train the global generator and then train the local enhancer in the order
    of their resolutions. We then jointly fine-tune all the networks together."

    G1 is trained at 1 / 2^enhancers of the size. A stage at half the size has one D fewer: "a
    higher resolution only requires adding an additional discriminator at the finest level".
    The two stages of one enhancer share one learning-rate schedule, of --fine-epochs epochs.
    """
    stages, n = [], cfg.enhancers
    for k in range(n + 1):                      # k enhancers: sizes double from one to the next
        part = replace(cfg, size=tuple(side >> (n - k) for side in cfg.size), enhancers=k,
                       crop=tuple(side >> (n - k) for side in cfg.crop) if k else (0, 0),
                       scales=max(1, cfg.scales - (n - k)), stage="all")
        # Name, epochs, and of the learning rate's schedule: epochs before, epochs in all.
        parts = [("global", cfg.epochs, 0, cfg.epochs)] if k == 0 else [
            ("enhancer", cfg.enhancer_epochs, 0, cfg.fine_epochs),
            ("joint", cfg.fine_epochs - cfg.enhancer_epochs, cfg.enhancer_epochs, cfg.fine_epochs)]
        for name, epochs, done, total in parts:
            if epochs:
                first = stages[-1].first + stages[-1].epochs if stages else 0
                stages.append(Stage(name, replace(part, stage=name), first, epochs, done, total))
    # One stage alone: of those by this name the last, which is that of the outermost network. It
    # begins at epoch 0 of its own run, and its learning rate where the whole run's would be.
    if cfg.stage != "all":
        stages = [replace(s, first=0) for s in stages if s.name == cfg.stage][-1:]
    return stages


def learning_rate(stage: Stage, epoch: int) -> float:
    """Full for the first half of the schedule, then down in equal steps; the last is not yet 0.

    The released rule: with n epochs at the full rate and m falling, epoch e (counted from 1) has
    lr (1 - (e - n - 1) / m) from e = n + 1 on.
    """
    falling = stage.total // 2                  # the epochs of the second half
    beyond = max(0, epoch - stage.first + stage.done - (stage.total - falling))
    return stage.cfg.lr * (1 - beyond / max(falling, 1))


def channels(cfg: Config) -> int:
    """Of s: 3 of an RGB input, or one per class (35 on Cityscapes) and one of the boundaries."""
    return 3 if cfg.task == "pairs" else class_table(cfg.classes).channels + cfg.boundary


def networks(cfg: Config) -> tuple[nn.Module, MultiScaleDiscriminator, Encoder | None]:
    """G, D and E of one stage. D sees s and the image, never E's features."""
    c = channels(cfg)                           # G reads E's numbers beside s, D does not
    if cfg.generator == "coarse-to-fine":
        generator = Generator(c + cfg.features, 3, cfg.width, cfg.downs, cfg.blocks, cfg.enhancers,
                              cfg.enhancer_blocks)
    else:
        kind = UNet if cfg.generator == "unet" else CRN
        generator = kind(c + cfg.features, 3, cfg.width, cfg.downs)
    for module in generator.modules():          # a setting of the layer, not a weight of it
        if isinstance(module, Doubling):
            module.smooth = cfg.smooth
    return (generator, MultiScaleDiscriminator(c + 3, cfg.d_width, cfg.scales),
            Encoder(cfg.features, cfg.e_width) if cfg.features else None)


def build(cfg: Config, device: torch.device) -> State:
    """Networks and optimisers of one stage: cfg is a stage.cfg of plan; else of the last stage.

    Precision, compilation and distribution go around the networks.
    """
    if cfg.stage == "all":
        cfg = plan(cfg)[-1].cfg
    torch.manual_seed(cfg.seed)                 # all processes begin with the same weights
    generator, discriminator, encoder = [net and dress(net, cfg, device) for net in networks(cfg)]
    if cfg.stage == "enhancer":                 # what the stages before have trained, is frozen
        for part in (generator.globe, *generator.enhancers[:-1]):
            part.requires_grad_(False)
    # Released code: in these stages E's maps are read from files, so E itself is not trained.
    if encoder is not None and cfg.stored_features and cfg.enhancers:
        encoder.requires_grad_(False)
    vgg = None                                  # only with a perceptual loss
    if "VGG" in cfg.loss:                       # frozen from the start, and not in the checkpoint
        vgg = dress(common.VGGFeatures(tuple(VGG_LAYERS), 19, cfg.vgg, cfg.vgg_normalise,
                                       width=cfg.vgg_width), cfg, device)
    state = State(generator, discriminator, encoder, vgg, adam(cfg, generator, encoder),
                  adam(cfg, discriminator))
    if cfg.init:                                # ours know their stage; the authors' have no config
        stored, where = read(*cfg.init), " ".join(cfg.init)
        theirs = stage_of(stored, where).cfg if "config" in stored else cfg
        take_over(state, cfg, stored, theirs, where, cfg.stage == "enhancer")
    return state


def trained(*nets: nn.Module | None) -> list[nn.Parameter]:
    """The parameters that the optimiser moves."""
    return [p for net in nets if net is not None for p in net.parameters() if p.requires_grad]


def adam(cfg: Config, *nets: nn.Module | None) -> torch.optim.Adam:
    """An optimiser without any moments yet, of what is to be trained in these networks."""
    optimiser = torch.optim.Adam(trained(*nets), cfg.lr, cfg.betas, fused=True)
    optimiser.register_step_pre_hook(average_gradients)
    return optimiser


def make_pair(batch: dict, cfg: Config) -> dict:
    """A batch of common.Dataset with "input" s (B, c, H, W) and "region" (B, H, W) added.

    s: one-hot labels, then the boundary map. region: the objects over which E's map is averaged.
    """
    if cfg.task == "pairs":
        return batch                            # an RGB input: nothing to make
    label = batch["label"]                      # (B, H, W) int64
    ids = torch.arange(class_table(cfg.classes).channels, device=label.device)
    s = (label[:, None] == ids.view(-1, 1, 1)).float()      # one-hot, without an int64 of each
    if cfg.boundary:
        # G and D see where an object ends, never the ids, whose values mean nothing.
        s = torch.cat([s, boundary_map(batch["instance"])], 1)
    # Fig. 11 averages over labels instead: one style for all the hair, one for all the skin.
    region = batch.get("instance", label) if cfg.pool == "instance" else label
    return batch | {"input": s, "region": region}


def style_of_photo(encoder: nn.Module, x: Tensor, region: Tensor, cfg: Config) -> Tensor:
    """z = E(x), averaged over each region (B, H, W): (B, C, H, W).

    Released code, at full size (--stored-features): the map that E makes of the photo at half the
    size, with which E was trained, is doubled and rounded to 8 bits.
    """
    if not (cfg.stored_features and cfg.enhancers):
        return instance_average(encoder(x), region)
    z = instance_average(encoder(half(x)), region[:, ::2, ::2])             # (B, C, H/2, W/2)
    z = ((z + 1) * 127.5).round() / 127.5 - 1                               # 256 values in [-1, 1]
    return F.interpolate(z, x.shape[-2:], mode="nearest")


def train_step(state: State, batch: dict, cfg: Config) -> dict[str, Tensor]:
    """One update of G and E and one of D: Eq. (4). Returns the losses by the paper's names.

    Both gradients are taken before either update, as in the released code. There D judges x_hat
    twice, once for each of the two. Here it judges once, and each backward pass is told whose
    weights it is for: G's objective reaches G and E alone, D's loss reaches D alone.
    """
    G, D, E = state.generator, state.discriminator, state.encoder
    s, x = batch["input"], batch["image"]       # (B, c, H, W), (B, 3, H, W) in [-1, 1]
    z = [] if E is None else [style_of_photo(E, x, batch["region"], cfg)]
    x_hat = G(torch.cat([s, *z], 1))            # "we replace G(s) with G(s, E(x))"       Sec. 3.4
    if "VGG" in cfg.loss:                       # before D: see perceptual_term
        loss_vgg, vgg_term = perceptual_term(state.vgg, x, x_hat, cfg.vgg == "random")
    real, fake = D(s, x), D(s, x_hat)           # per scale: four hidden maps, prediction

    # G and E: the min in Eq. (4).
    losses = {"g_gan": generator_loss(fake, cfg.gan)}           # weight 1
    objective = losses["g_gan"]
    if "FM" in cfg.loss:
        losses["g_fm"] = feature_matching_loss(real, fake, cfg.fm_mean)
        objective = objective + cfg.lambda_fm * losses["g_fm"]
    if "VGG" in cfg.loss:
        losses["g_vgg"] = loss_vgg
        objective = objective + cfg.lambda_vgg * vgg_term
    state.opt_g.zero_grad(set_to_none=True)
    objective.backward(inputs=trained(G, E), retain_graph=True)     # D's loss needs the graph, too

    # D: the max in Eq. (2).
    losses["d_real"], losses["d_fake"] = discriminator_loss(real, fake, cfg.gan)
    state.opt_d.zero_grad(set_to_none=True)
    (losses["d_real"] + losses["d_fake"]).backward(inputs=trained(D))
    state.opt_g.step()                          # only now: both gradients are of the same weights
    state.opt_d.step()
    return {name: loss.detach() for name, loss in losses.items()}


def take_over(state: State, cfg: Config, stored: dict, theirs: Config, where: str,
              larger: bool) -> None:
    """Start the networks of a stage, cfg, with weights that were trained in another, theirs.

    larger: an enhancer is new here. It, the output layer and the finest D have nothing to start
    from and keep their random weights. D's scales go by resolution, not by number: one that has
    judged images of 256 x 512 judges images of 256 x 512 again.
    """
    # In G the first two are new, in D the last; nothing in E.
    fresh = ("output.", f"enhancers.{cfg.enhancers - 1}.", f"scales.{cfg.scales - 1}.")
    shared = [name for name in NETWORKS[:3]
              if getattr(state, name) is not None and stored.get(name) is not None]
    if not shared:
        raise UserError(f"{where}: holds {', '.join(stored)}, of which this run uses nothing")
    for name in shared:                         # fill checks names and shapes
        net, weights = getattr(state, name), dict(stored[name])
        own = {k: v for k, v in net.state_dict().items() if larger and k.startswith(fresh)}
        if name == "generator":
            weights |= own
        if name == "discriminator" and (larger or theirs.size == cfg.size):
            # The coarsest of our scales and of theirs differ by so many halvings.
            coarsest = [part.size[0] / 2 ** part.scales for part in (cfg, theirs)]
            weights = own | by_resolution(weights, round(math.log2(coarsest[0] / coarsest[1])))
        common.fill(net, weights, f"{where}: {name}")


def by_resolution(weights: dict, skip: int) -> dict:
    """D's weights without its `skip` coarsest scales, the others renumbered from 0."""
    kept = {}                                   # number 0 is the coarsest
    for key, value in weights.items():          # scales.<number>.layers....
        number, _, rest = key.removeprefix("scales.").partition(".")
        if int(number) >= skip:
            kept[f"scales.{int(number) - skip}.{rest}"] = value
    if len(kept) < len(weights):
        notice(f"the {skip} coarsest discriminator(s) are left out: this stage judges no image so "
               "small")
    return kept


def grow(state: State, before: Config, cfg: Config, device: torch.device) -> State:
    """The networks of the next stage, with the weights of the present one.

    From the enhancer to the joint stage they are the same networks, and D's Adam goes on; all of G
    is trained now, by a new Adam. A larger stage has new networks, and a new Adam for all.
    """
    if cfg.enhancers == before.enhancers:
        state.generator.requires_grad_(True)
        opt_g = adam(cfg, state.generator, state.encoder)
        return replace(state, opt_g=opt_g, stage=state.stage + 1)
    new = build(replace(cfg, init=()), device)  # --init was for the first stage
    weights = {name: net.state_dict() for name in NETWORKS[:3]
               if (net := getattr(state, name)) is not None}
    take_over(new, cfg, weights, before, cfg.out, larger=True)
    return replace(new, stage=state.stage + 1)


def train(cfg: Config, stored: dict | None = None) -> Path:
    """All stages: from scratch, from --init, or on from a stored checkpoint; their folder."""
    device = pick_device(cfg)
    cfg, _, _ = open_data(cfg)
    stages = plan(cfg)                          # see the table of stages at the top
    stage = left_off(cfg, stages, stored) if stored else stages[0]
    state, (loader, test_set) = build(stage.cfg, device), open_stage(stage.cfg, stages, device)
    if stored and state.encoder is not None and stored.get("styles") == {}:
        where = f"{cfg.out}/checkpoint.pt"      # killed after its last step, before it had styles?
        common.fill(loader, stored.get("place"), f"{where}: place")
        if loader.step >= loader.total:
            load(state, stored, where)
            return finish(stage.cfg, state, Path(cfg.out))
    with Run(cfg, state, loader, test_set, stored) as run:
        if loader.rank == 0:
            announce(stages)
        while not loader.over:
            if loader.epoch == stage.first + stage.epochs:      # the next stage: larger, or joint
                before, stage = stage, stages[state.stage + 1]
                state, place = grow(state, before.cfg, stage.cfg, device), loader.state_dict()
                loader, test_set = open_stage(stage.cfg, stages, device, place)
                run.state, run.loader, run.test_set = state, loader, test_set    # for its grids
            for optimiser in (state.opt_g, state.opt_d):        # both follow one schedule
                optimiser.param_groups[0]["lr"] = learning_rate(stage, loader.epoch)
            for batch in loader:                # what is left of this epoch
                run.done(train_step(state, make_pair(batch, stage.cfg), stage.cfg))
    return finish(stage.cfg, state, run.end())


def rename_released(stored: dict, path: Path) -> dict:
    """The authors' files (a plain state dict of G or of E) under our names.

    G1 is "model", enhancer n is "model<n>_1" (front-end) and "model<n>_2" (the rest); numbers count
    layers, also those without weights. Inside each list the order is ours, so the convolutions are
    matched in order. Files from before PyTorch 0.4 hold statistics that were never used.
    """
    stored = {k: v for k, v in stored.items() if not k.endswith(
        ("running_mean", "running_var", "num_batches_tracked"))}
    # "model.16.conv_block.1" before "model.25", "model" before "model1_1": numbers as numbers.
    theirs = sorted((k.removesuffix(".weight") for k in stored if k.endswith(".weight")),
                    key=lambda k: [part.zfill(4) for part in k.split(".")])
    parts = {k.partition(".")[0] for k in theirs}                       # model, model1_1, model1_2
    if "model" not in parts:
        raise UserError(f"{path}: no checkpoint of {NAME}.py and no released G or E; its first key "
                        f"is {next(iter(stored), 'missing')}")
    # n enhancers; each block has two convolutions, and so has each halving, down and up again.
    n, count = len(parts) // 2, lambda *words: sum(all(w in k for w in words) for k in theirs)
    blocks, inner = (count(part, "conv_block") // 2 for part in ("model.", "model1_2."))
    if blocks:
        downs = (count("model.") - 2 * blocks - (1 if n else 2)) // 2
        name, net = "generator", Generator(3, 3, 2 ** n, downs, blocks, n, inner)
    else:
        name, net = "encoder", Encoder(3, 1, len(theirs) // 2 - 1)
    # Ours, from the input to the output: the same order. Only convolutions hold weights.
    ours = [key for key, module in net.named_modules()
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))]
    names, split = dict(zip(theirs, ours)), {key: key.rpartition(".") for key in stored}
    return {name: {f"{names.get(module, module)}.{tensor}": stored[key]
                   for key, (module, _, tensor) in split.items()}}


def released_config(stored: dict, given: dict) -> dict:
    """The settings that the authors' networks have, read off the shapes of their weights."""
    # The width of the first layer tells G's, the number of layers the rest, and what the first
    # layer reads besides the classes tells whether there are boundaries.
    weights, encoder = stored.get("generator"), stored.get("encoder")
    if weights is None:
        raise UserError("no generator among these files; to test, give its file, too")
    count = lambda start, end: sum(k.startswith(start) and k.endswith(end) for k in weights)
    first, n = weights["globe.front.0.weight"], count("enhancers.", ".front.0.weight")
    # "features" more channels come from E, if its file is there.
    features = 0 if encoder is None else len(encoder["output.0.bias"])
    classes = given.get("classes") or (
        dataset(Config(**given), "test").classes if "data" in given else "cityscapes")
    rest = first.shape[1] - features - class_table(classes).channels if classes else -1
    if first.shape[1] - features != 3 and rest not in (0, 1):
        raise UserError(f"takes {first.shape[1]} channels, the {classes} labels have "
                        f"{class_table(classes).channels}; a boundary adds 1, an encoder (give its "
                        "file, too) adds its features; --classes says otherwise")
    return dict(
        width=len(first), enhancers=n, features=features, classes=classes,
        task="labels2photo" if rest in (0, 1) else "pairs", boundary=rest == 1,
        downs=count("globe.back", "weight"), blocks=count("globe.residual", "branch.0.weight"),
        enhancer_blocks=count("enhancers.0.residual", "branch.0.weight") or 3,
        e_width=len(encoder["layers.0.bias"]) if features else 16,
        pool="instance" if rest == 1 else "label", stage="joint" if n else "global")


# ------------------------------------------------------------------------------- 5 Sampling

@torch.no_grad()
def translate(generator: nn.Module, s: Tensor) -> Tensor:
    """G on inputs of any size: (B, c, H, W) -> (B, 3, H, W). There is no noise and no dropout.

    Sides are mirrored up to the next multiple that G can halve, and the result is cropped. One
    image at a time: instance norm makes it independent of its neighbours anyway.
    """
    h, w = s.shape[-2:]
    padded = common.mirror_pad(s, generator.multiple, 2 * generator.multiple)
    return torch.cat([generator(one[None]) for one in padded])[..., :h, :w]


def test_pair(item: dict, state: State, cfg: Config) -> dict:
    """One item of a dataset as a batch of one where G is, made a pair."""
    return make_pair(common.batch_of_one(item, next(state.generator.parameters()).device), cfg)


def picture_of(pair: dict, cfg: Config) -> Tensor:
    """The input as a picture (B, 3, H, W) in [-1, 1]: class colours, object borders in black."""
    if cfg.task == "pairs":
        return pair["input"]
    colours = colour_label(pair["label"], class_table(cfg.classes))
    return torch.where(pair["input"][:, -1:] > 0, -1.0, colours) if cfg.boundary else colours


def generate(state: State, s: Tensor, z: Tensor) -> Tensor:
    """G(s, z): (B, c, H, W), (B, C, H, W) -> (B, 3, H, W), any size; C is 0 without an encoder."""
    return translate(state.generator, torch.cat([s, z], 1))


@torch.no_grad()
def style_map(state: State, pair: dict, cfg: Config, seed: int | None = None,
              vary: tuple[int, ...] = ()) -> Tensor:
    """z (1, C, H, W): drawn with a seed, else the photo's own. Without an encoder C is 0."""
    if state.encoder is None:
        return pair["input"][:, :0]
    if seed is None:
        return style_of_photo(state.encoder, pair["image"], pair["region"], cfg)
    need_styles(state, cfg)
    return draw_styles(state, pair["label"], pair["region"], seed, vary)


def reconstruct(state: State, pair: dict, cfg: Config) -> Tensor:
    """G(s, E(x)): with the style of the photo itself, as in training. Without E, G(s)."""
    return generate(state, pair["input"], style_map(state, pair, cfg))


def sample_grid(state: State, cfg: Config, test_set: common.Dataset, path: Path) -> None:
    """Input | output | truth of six test examples, evenly spread, two a row."""
    cfg, tiles, n = plan(cfg)[state.stage].cfg, [], min(6, len(test_set))
    for i in range(n):
        pair = test_pair(test_set[i * len(test_set) // n], state, cfg)
        if "image" in pair:
            values = [picture_of(pair, cfg), reconstruct(state, pair, cfg), pair["image"]]
        else:                                   # styles of a few photos, for this picture only
            brief = replace(state, styles={}, means={}), pair, replace(cfg, limit=20), cfg.seed
            values = [picture_of(pair, cfg), synthesise(*brief)]
        tiles += [value.cpu() for value in values]
    save_images(torch.cat(tiles), path, nrow=6 if "image" in pair else 4)


# Styles (Sec. 3.4): what E says about every training object, clustered per class.

def objects_of(z: Tensor, label: Tensor, region: Tensor) -> list[tuple[int, int, float, Tensor]]:
    """z (C, H, W), label and region (H, W)  ->  (class, id, share of the image, z (C,)) per object.

    An object's class is that of most of its pixels: ids need not follow Cityscapes' class * 1000.
    Its z is read off one pixel, of even row and column if it has one: stored maps are doubled ones,
    and their blocks of 2 x 2 reach over odd borders.
    """
    ids, index, counts = region.flatten().unique(return_inverse=True, return_counts=True)
    n = int(label.max()) + 1
    votes = torch.bincount(index * n + label.flatten(), minlength=len(ids) * n).view(-1, n)
    place = torch.arange(len(index), device=ids.device).view(region.shape)
    place[1::2] += len(index)
    place[:, 1::2] += len(index)
    first = torch.full_like(ids, 3 * len(index)).scatter_reduce(0, index, place.flatten(), "amin")
    first %= len(index)
    return [(int(votes[i].argmax()), int(ids[i]), int(counts[i]) / len(index),
             z.flatten(1)[:, first[i]]) for i in range(len(ids))]


@torch.no_grad()
def encode(cfg: Config, state: State) -> None:
    """Fill state.styles and state.means: E over the training photos, K-means per class (Sec. 3.4).

    Released code: only objects larger than 1/64 of the image are clustered (cfg.min_area), since E
    has seen too little of a small one. The means are over all objects; a class that has no object
    large enough falls back to its mean.
    """
    train_set = usable(dataset(cfg, "train", mirror=False, crop=(0, 0)).has("image"), cfg)
    found = {}
    for i in tqdm(range(len(train_set)), desc="encode", unit="image", disable=None):
        pair = test_pair(train_set[i], state, cfg)
        z = style_of_photo(state.encoder, pair["image"], pair["region"], cfg)
        for kind, _, share, value in objects_of(z[0], pair["label"][0], pair["region"][0]):
            found.setdefault(kind, []).append((share, value.cpu()))
    state.styles, state.means = {}, {}
    for kind, objects in sorted(found.items()):
        state.means[kind] = torch.stack([value for _, value in objects]).mean(0)
        large = [value for share, value in objects if share > cfg.min_area]
        if large:
            state.styles[kind] = kmeans(torch.stack(large), cfg.clusters, cfg.seed)
    names = class_table(cfg.classes).names + ("unknown",)
    print("styles: " + ", ".join(f"{names[k]} {len(v)}" for k, v in state.styles.items()))


def finish(cfg: Config, state: State, folder: Path) -> Path:
    """After training, E computes the styles of all objects once (Sec. 3.4); the run's folder."""
    if state.encoder is not None and common.place()[0] == 0:
        encode(cfg, state)
        keep_styles(state, folder / "checkpoint.pt")
    return folder


def keep_styles(state: State, path: Path) -> None:
    """The styles, into the checkpoint that the encoder is of."""
    stored = common.load_file(path, f"train first, or name a checkpoint of {NAME}.py")
    common.save_file(stored | {"styles": state.styles, "means": state.means}, path)
    print(f"{sum(map(len, state.styles.values()))} styles of {len(state.styles)} classes: {path}")


def read_clusters(path: Path) -> dict[int, Tensor]:
    """A released clusters file, numpy's pickle of {class: (K, C)}: class -> centres.

    numpy would run any code that such a file names. Here a name that is not one of numpy's own
    constructors of plain arrays is refused.
    """
    harmless = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
        (f"numpy.{core}.multiarray", name) for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")}

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) not in harmless:
                raise pickle.UnpicklingError(f"it asks for {module}.{name}")
            return super().find_class(module, name)

    try:
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("another version of the format")
            np.lib.format.read_array_header_1_0(file)
            content = Reader(file, encoding="latin1").load()
        centres = content.item() if isinstance(content, np.ndarray) else content
        return {int(k): torch.from_numpy(np.atleast_2d(np.asarray(v, np.float32)))
                for k, v in centres.items()}
    except Exception as error:                  # numpy and pickle errors share no narrower class
        raise UserError(f"{path}: not a clusters file ({type(error).__name__}: {error})")


def need_styles(state: State, cfg: Config) -> None:
    """Styles of an interrupted run are not in its checkpoint yet."""
    if not state.styles:
        if not cfg.data and cfg.classes != "streets":
            raise UserError("styles are read off training photos; name their folder with --data")
        notice("no styles in the checkpoint yet: encoding the training photos; the mode encode "
               "keeps them")
        encode(cfg, state)


def centres_of(state: State, kind: int) -> Tensor:
    """The styles of a class (K, C); its mean where there are none, zeros if never seen."""
    if kind in state.styles:
        return state.styles[kind]
    notice(f"class {kind}: no style was clustered; its "
           + ("mean" if kind in state.means else "style is 0: it was never seen"))
    some = next(iter([*state.styles.values(), *state.means.values()]))
    return state.means.get(kind, torch.zeros_like(some.flatten()[:some.shape[-1]]))[None]


def draw_styles(state: State, label: Tensor, region: Tensor, seed: int,
                vary: tuple[int, ...] = ()) -> Tensor:
    """"We randomly pick one cluster center" per object (Sec. 3.4): label, region (1, H, W) -> z.

    What an object draws depends on the seed and its id alone, so it keeps its style when others
    change. With `vary`, only objects of these classes follow the seed; all others have seed 0.
    """
    label, region = label[0], region[0]
    objects = objects_of(label.new_zeros(1, *label.shape), label, region)
    z = None
    for kind, number, _, _ in objects:
        centres = centres_of(state, kind)
        own = seed if not vary or kind in vary else 0
        draw = torch.Generator().manual_seed(hash((own, number)) % 2 ** 32)   # the same anywhere
        value = centres[torch.randint(len(centres), (1,), generator=draw)].to(label.device)
        z = torch.zeros(1, value.shape[1], *label.shape, device=label.device) if z is None else z
        z[0, :, region == number] = value.T
    return z


def synthesise(state: State, pair: dict, cfg: Config, seed: int = 0,
               vary: tuple[int, ...] = ()) -> Tensor:
    """The test-time image (1, 3, H, W): no photo is seen, styles are drawn."""
    return generate(state, pair["input"], style_map(state, pair, cfg, seed, vary))


def scenes(cfg: Config, size: tuple[int, int] | None) -> common.Dataset:
    """What to make images of: --input, at its own sizes or at `size`, or the test split."""
    if not cfg.input:
        return usable(dataset(cfg, "test"), cfg)
    files = common.input_files(cfg.input, "A" if cfg.task == "pairs" else "label",
                               cfg.instances if wants_instances(cfg) else cfg.instances or None)
    return common.Dataset(files=files, classes=cfg.classes, size=size)


def sample(cfg: Config, state: State, size: tuple[int, int] | None = None) -> Path:
    """Outputs for --input, a file or a folder of any sizes, or for the test split.

    An output has the size of its input; `size` resizes the inputs first. Several samples differ by
    the styles drawn for each object: of all, or of those whose class is named in --vary.
    """
    if state.encoder is None and (cfg.samples > 1 or cfg.vary):
        raise UserError("this run has no encoder, so a label map has one image: no --samples and "
                        "no --vary; train with --features 3 for more")
    items, target = scenes(cfg, size), Path(cfg.output or Path(cfg.out, "test"))
    vary = tuple(class_id(name, class_table(cfg.classes)) for name in cfg.vary)
    for item, paths in common.outputs(items, cfg.input, target, cfg.samples):
        pair = test_pair(item, state, cfg)
        for k, path in enumerate(paths):
            save_images(synthesise(state, pair, cfg, cfg.seed + k, vary).cpu(), path)
    return target


class Editor:
    """Instance-level editing of one scene (Sec. 4.3, Fig. 1 and 11).

    label and instance (H, W) int64 and the style map z (C, H, W) stay in step; boundaries are
    computed from the instances, and `render` shows the scene. Every change can be undone.

        editor = Editor(state, cfg, item)
        editor.set_style(10001, 3).set_class(9002, "vegetation").undo()
        image = editor.render()                              # (3, H, W) in [-1, 1]
    """

    def __init__(self, state: State, cfg: Config, item: dict, seed: int = 0):
        if "label" not in item:
            raise UserError("edit needs label maps; this run was trained on pairs of images")
        self.state, self.cfg, self.history = state, cfg, []
        self.table = class_table(cfg.classes)
        pair = test_pair(item, state, cfg)
        self.label = pair["label"][0].clone()
        self.instance = pair.get("instance", pair["label"])[0].clone()
        if state.encoder is not None:           # set_style asks for them
            need_styles(state, cfg)
        self.z = style_map(state, pair, cfg, None if "image" in pair else seed)[0].clone()
        for _, number, _, value in self.objects():
            self.z[:, self.instance == number] = value[:, None]

    def objects(self) -> list[tuple[int, int, float, Tensor]]:
        """(class, id, share of the image, style) of every object, the largest first."""
        return sorted(objects_of(self.z, self.label, self.instance), key=lambda o: -o[2])

    def where(self, number: int) -> Tensor:
        """The pixels (H, W) of an object."""
        mask = self.instance == number
        if not mask.any():
            raise UserError(f"object {number}: not in this scene; it has "
                            + ", ".join(str(o[1]) for o in self.objects()[:20]))
        return mask

    def keep(self) -> None:
        """Remember the scene as it is, for undo."""
        self.history.append((self.label.clone(), self.instance.clone(), self.z.clone()))

    def assign(self, mask: Tensor, kind: int, number: int, value: Tensor | None = None) -> None:
        """Class, id and style of some pixels. Without a value: what the object `number` has, else
        what its class has in this scene, else the first style of the class."""
        for like in (self.instance == number, self.label == kind):
            rest = like & ~mask
            if value is None and rest.any():
                value = self.z[:, rest][:, 0]
        if value is None and len(self.z):
            value = centres_of(self.state, kind)[0].to(self.z.device)
        if len(self.z):
            self.z[:, mask] = value[:, None]
        self.label[mask], self.instance[mask] = kind, number

    def countable(self, kind: int) -> bool:
        """Whether a class comes as things; of nameless classes, whether their ids say so."""
        if self.table.things:
            return self.name(kind) in self.table.things
        return bool((self.instance[self.label == kind] != kind).any())

    def free_id(self, kind: int, own: bool = False) -> int:
        """The id for a new object: class * 1000 + k, with a k that is still free. But stuff, like a
        road, takes the id that its class has here, or the number of its class, unless `own`: an
        object that is made by an edit must not melt into all others of its class."""
        used = set(self.instance.unique().tolist())
        number = kind * 1000
        same = self.instance[self.label == kind]
        if not own and not self.countable(kind):
            if len(same):
                return int(same.mode().values)
            number = number if kind in used else kind
        while number in used:
            number += 1
        return number

    def set_class(self, number: int, name: str | int) -> "Editor":
        """Make an object one of another class: a tree a building, a car a truck."""
        mask, kind = self.where(number), class_id(name, self.table)
        self.keep()
        if (self.label[mask] == kind).all():
            return self                         # it is one already
        self.assign(mask, kind, self.free_id(kind, own=True))
        return self

    def set_style(self, number: int, style: int) -> "Editor":
        """Give an object the style-th of the K modes of its class."""
        mask = self.where(number)
        if not len(self.z):
            raise UserError("--style: this run has no encoder; train with --features 3")
        kind = int(self.label[mask].mode().values)
        centres = centres_of(self.state, kind)
        if not 0 <= style < len(centres):
            raise UserError(f"--style {number}={style}: {self.name(kind)} has styles 0 to "
                            f"{len(centres) - 1}")
        self.keep()
        self.z[:, mask] = centres[style].to(self.z.device)[:, None]
        return self

    def remove(self, number: int, name: str | int | None = None) -> "Editor":
        """Take an object out; a class, or the stuff that borders on it, grows into the hole."""
        hole = self.where(number)
        if name is not None:                    # the hole joins that class: no object of its own
            kind = class_id(name, self.table)
            self.keep()
            self.assign(hole, kind, self.free_id(kind))
            return self
        if hole.all():
            raise UserError(f"object {number}: fills the image; nothing borders on it")
        self.keep()
        kinds = [kind for kind in self.label.unique().tolist() if self.countable(kind)]
        things = torch.isin(self.label, self.label.new_tensor(kinds))
        left = -1
        while hole.any():                       # a pixel a turn, from all four sides
            things &= int(hole.sum()) != left   # nothing has grown: then things may grow, too
            left = int(hole.sum())
            for shift, axis in ((1, 1), (-1, 1), (-1, 0), (1, 0)):
                source = (hole | things).roll(shift, axis)     # roll wraps round: the first line
                source.select(axis, 0 if shift == 1 else -1).fill_(True)    # has no neighbour
                take = hole & ~source
                for plane in (self.label, self.instance, *self.z):
                    plane[take] = plane.roll(shift, axis)[take]
                hole &= ~take
        return self

    def paste(self, number: int, down: int, right: int) -> "Editor":
        """Add a copy of an object, so many pixels away; what falls outside the image is cut."""
        mask, (h, w) = self.where(number), self.label.shape
        target = torch.zeros_like(mask)
        if abs(down) < h and abs(right) < w:    # a negative margin cuts, a positive one fills
            target = F.pad(mask, (right, -right, down, -down))
        if not target.any():
            raise UserError(f"--paste {number}@{down},{right}: lies outside the image")
        kind = int(self.label[mask].mode().values)
        self.keep()
        value = self.z[:, mask][:, 0].clone()
        number = self.free_id(kind, own=True)
        self.assign(target, kind, number, value)
        return self

    def paint(self, top: int, left: int, bottom: int, right: int, name: str | int) -> "Editor":
        """Fill a rectangle with a class, as its stuff or as one new object."""
        h, w = self.label.shape
        if not (0 <= top < bottom <= h and 0 <= left < right <= w):
            raise UserError(f"--paint {top},{left},{bottom},{right}: not a rectangle (top, left, "
                            f"bottom, right) within {h} x {w}")
        kind, mask = class_id(name, self.table), torch.zeros_like(self.label, dtype=torch.bool)
        mask[top:bottom, left:right] = True
        self.keep()
        self.assign(mask, kind, self.free_id(kind))
        return self

    def undo(self) -> "Editor":
        """The scene before the last change."""
        if not self.history:
            raise UserError("undo: nothing was changed yet")
        self.label, self.instance, self.z = self.history.pop()
        return self

    def name(self, kind: int) -> str:
        return (*self.table.names, "unknown")[kind]

    def pair(self) -> dict:
        """The scene as a batch of one, ready for G."""
        return make_pair({"label": self.label[None], "instance": self.instance[None]}, self.cfg)

    def render(self) -> Tensor:
        """The image (3, H, W) in [-1, 1] of the scene as it is now."""
        return generate(self.state, self.pair()["input"], self.z[None])[0].cpu()

    def picture(self) -> Tensor:
        """The label map (3, H, W) in [-1, 1], with the borders of objects in black."""
        return picture_of(self.pair(), self.cfg)[0].cpu()


def edit(cfg: Config, state: State, size: tuple[int, int] | None = None) -> Path:
    """The mode edit: the changes in their order, a picture of before and after, the objects."""
    items = scenes(cfg, size)
    item = items.named(cfg.item)
    editor = Editor(state, cfg, item, cfg.seed)
    before = [editor.picture(), editor.render()]
    for text in cfg.edits:
        apply_edit(editor, text)
    print(f"{item['name']}\n{'object':>10}  {'class':16}{'share':>8}  styles")
    for c, number, share, _ in editor.objects():
        n = len(state.styles.get(c, ())) if len(editor.z) else 0
        print(f"{number:>10}  {editor.name(c):16}{100 * share:7.2f}%  "
              + (f"0..{n - 1}" if n else "none"))
    free = (Path(cfg.out, "edits", f"{n}.png") for n in itertools.count(1))
    path = Path(cfg.output) if cfg.output else next(path for path in free if not path.exists())
    read_from = {file.parent.resolve() for files in items.files if isinstance(files, dict)
                 for file in files.values()}
    if path.exists() or path.parent.resolve() in read_from:
        raise UserError(f"--output {path}: exists already, or would join what is read there; name "
                        "another file")
    save_images(torch.stack([*before, editor.picture(), editor.render()]), path, nrow=2)
    print(f"before, and below it after: {path}")
    return path


def apply_edit(editor: Editor, text: str) -> None:
    """One change: "set 26001=building", "style 26001=3", "undo", ..."""
    kind, _, what = text.partition(" ")
    form, pattern = EDITS[kind]
    parts = re.fullmatch(pattern, what)
    if parts is None:
        raise UserError(f"--{kind} {what}: expected {form}")
    method = getattr(editor, {"set": "set_class", "style": "set_style"}.get(kind, kind))
    method(*(int(p) if re.fullmatch(r"-?\d+", p or "") else p for p in parts.groups()))


# ----------------------------------------------------------------------------- 6 Evaluation

# The paper's numbers, all on Cityscapes by PSPNet: pixel accuracy in percent, mean IoU.
TABLE_1 = {"pix2pix": (78.34, .3948), "CRN": (70.55, .3483), "ours": (83.78, .6389),
           "oracle": (84.29, .6857)}
SLIDES_GENERATORS = {"unet": (77.86, .3905), "crn": (78.96, .3994),
                     "coarse-to-fine": (83.78, .6389)}
SLIDES_SCALES = {1: (82.87, .5775), 3: (83.78, .6389)}
PREFERENCE = {"GAN": 68.55, "GAN+FM": 58.90}    # Sec. 4.2: so many percent prefer the full loss


@torch.no_grad()
def evaluate(cfg: Config, state: State) -> dict:
    """The paper's metrics on the test split, beside its tables; writes metrics.json.

    Table 1: a network trained on real photos labels the generated ones; its score on the real test
    photos, the oracle, says how well that can be done at all. Styles are drawn, not encoded.
    """
    if cfg.task == "pairs":
        raise UserError("evaluate scores images by their label maps; this run's inputs are "
                        "pictures; use sample")
    device, out = next(state.generator.parameters()).device, Path(cfg.out)
    test_set = usable(dataset(cfg, "test"), cfg).has("image")
    photos = dataset(cfg, "train", limit=0, crop=(0, 0))
    table, scorer = class_table(cfg.classes), common.fcn_scorer(
        photos, out.parent, device, cfg.vgg, cfg.scorer_width, cfg.scorer_steps)
    confusion, l1 = {}, []
    for i in tqdm(range(len(test_set)), desc="evaluate", unit="image", disable=None):
        pair = test_pair(test_set[i], state, cfg)
        x_hat = synthesise(state, pair, cfg, cfg.seed)
        l1.append((x_hat - pair["image"]).abs().mean().item())
        for row, view in {"output": x_hat, "truth": pair["image"]}.items():
            counts = common.confusion_matrix(scorer(view).argmax(1), pair["label"], table).cpu()
            confusion[row] = confusion.get(row, 0) + counts
    metrics = {"images": len(l1), "L1": sum(l1) / len(l1)}
    metrics |= {row: common.segmentation_scores(counts) for row, counts in confusion.items()}
    report(metrics, cfg)
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2))
    return metrics


def report(metrics: dict, cfg: Config) -> None:
    """The metrics as text beside the paper's. Its data and scorer are others: compare orderings."""
    here = {"this run": metrics["output"], "real photos (oracle)": metrics["truth"]}
    lines = {f"{name}: {cfg.generator}, {cfg.loss}, {cfg.scales} scale(s)" if name == "this run"
             else name: (100 * scores["per-pixel acc"], scores["class IOU"])
             for name, scores in here.items()}
    lines |= {f"paper, Cityscapes, Table 1, {name}": v for name, v in TABLE_1.items()}
    lines |= {f"paper, slides, generator {name}": v for name, v in SLIDES_GENERATORS.items()}
    lines |= {f"paper, slides, {n} scale(s) of D": v for n, v in SLIDES_SCALES.items()}
    print(f"\n{metrics['images']} test images, L1 {metrics['L1']:.4f} for values in [-1, 1] "
          "(nothing here minimises it)")
    print(f"\n{'Table 1; this run by our own scorer':50}{'pixel acc':>10}{'mean IoU':>10}")
    for name, (accuracy, iou) in lines.items():
        print(f"  {name:48}{accuracy:10.2f}{iou:10.4f}")
    for loss, percent in PREFERENCE.items():
        print(f"  people, full loss against {loss}: {percent} % prefer the full loss")


# ----------------------------------------------------------------------------- 7 Machinery
# What trains any network. Nothing below is the paper's, and from pick_device on it is word for word
# the same in the four scripts.

NAME = "pix2pixhd"
# In State; the first is what testing needs, the first three are networks.
NETWORKS = ("generator", "discriminator", "encoder", "styles", "means")
MODES = ("train", "sample", "edit", "encode", "evaluate", "check", "trace")
CALL = {"preset": ("train", "check", "trace"), "resume": ("train",),
        "checkpoint": ("sample", "evaluate", "edit", "encode"), "input": ("sample", "edit"),
        "instances": ("sample", "edit"), "output": ("sample", "edit"), "samples": ("sample",),
        "vary": ("sample",), "item": ("edit",), "edits": ("edit",),
        "clusters_file": ("encode",)}
# What may differ from the checkpoint when a run goes on, and when it is tested.
FREE = {"data", "epochs", "fine_epochs", "steps", "save_every", "gpu", "workers", "precision",
        "compile", "channels_last", "out", *CALL} - {"preset"}
FREE_AT_TEST = FREE | {"size", "limit", "seed", "vgg", "clusters", "min_area", "scorer_width",
                       "scorer_steps"}
NEEDED = {"labels2photo": "label", "pairs": "A"}     # task: kind of file
# Settings of a network that is tested, not trained: no perceptual loss, hence no VGG-19.
ALONE = {"compile": False, "loss": "GAN"}


def wants_instances(cfg: Config) -> bool:
    return cfg.boundary or cfg.features > 0 and cfg.pool == "instance"


def usable(examples: common.Dataset, cfg: Config) -> common.Dataset:
    """A dataset itself, if it has what the networks read."""
    if wants_instances(cfg) and "instance" not in examples.has(NEEDED[cfg.task]).roles:
        raise UserError(f"--data {cfg.data}: instance maps are needed, but its {examples.split} "
                        "split has none; train with --no-boundary (and --pool label) without them")
    return examples.has(NEEDED[cfg.task])


def dataset(cfg: Config, split: str, **more) -> common.Dataset:
    train = split == "train"
    return common.Dataset(**dict(
        data=cfg.data, split=split, size=cfg.size, crop=cfg.crop if train else (0, 0),
        mirror=train and cfg.mirror, classes=cfg.classes, direction=cfg.direction, limit=cfg.limit,
        seed=cfg.seed, instances=cfg.boundary or cfg.pool == "instance") | more)


def open_data(cfg: Config) -> tuple[Config, common.Dataset, common.Dataset]:
    """Both splits, and the config with what the data turned out to be: classes, boundary, pool."""
    (h, w), n = cfg.size, cfg.enhancers
    if not cfg.data and min(h, w) >> n < 32:
        raise UserError(f"--size {h} {w}: the first stage would see {h >> n} x {w >> n} pixels; "
                        "the streets need at least 32 x 32")
    if cfg.crop[0] > h or cfg.crop[1] > w:
        raise UserError(f"--crop {cfg.crop[0]} {cfg.crop[1]}: larger than --size {h} {w}")
    train_set, test_set = dataset(cfg, "train").has("image"), dataset(cfg, "test")
    roles, cfg = train_set.roles, replace(cfg, classes=train_set.classes)
    if not cfg.resume:
        if cfg.task == "labels2photo" and "label" not in roles:
            cfg = replace(cfg, task="pairs", boundary=False)
        if cfg.task == "labels2photo" and "instance" not in roles:
            if cfg.boundary:
                notice("no instance maps: trained without the boundary channel")
            if cfg.features and cfg.pool == "instance":
                notice("no instance maps: features are averaged over labels")
            cfg = replace(cfg, boundary=False, pool="label")
        if cfg.generator != "coarse-to-fine":   # these halve as often as the size allows
            least = 2 if cfg.generator == "unet" else 4     # rows and columns of the smallest map
            cfg = replace(cfg, downs=max([k for k in range(2, 9) if not (h % 2 ** k or w % 2 ** k)
                                          and min(h, w) >= least * 2 ** k], default=1))
    return cfg, usable(train_set, cfg), usable(test_set, cfg)


def stage_of(stored: dict, where: str | Path) -> Stage:
    """The stage that a checkpoint is of."""
    try:
        return plan(Config(**stored["config"]))[stored["stage"]]
    except (KeyError, TypeError, IndexError, UserError) as error:
        raise UserError(f"{where}: damaged, or of another version ({error})")


def left_off(cfg: Config, stages: list[Stage], stored: dict) -> Stage:
    """The stage of a run that goes on, which no setting may move to another epoch."""
    begun, n = stage_of(stored, Path(cfg.out, "checkpoint.pt")).first, stored["stage"]
    if stages[n].first != begun:
        raise UserError(f"--epochs {cfg.epochs}, --fine-epochs {cfg.fine_epochs}: would move "
                        f"stage {n + 1}, which began at epoch {begun}, to {stages[n].first}; only "
                        "the last stage can grow")
    return stages[n]


def open_stage(cfg: Config, stages: list[Stage], device: torch.device,
               place: dict | None = None) -> tuple[common.Loader, common.Dataset]:
    """The images of a stage, from the start or from a place in the data; and those of its grids."""
    loader = common.Loader(dataset(cfg, "train"), cfg.batch_size, cfg.workers, device, cfg.seed,
                           stages[-1].first + stages[-1].epochs, cfg.steps)
    if place:
        loader.load_state_dict(place)
    return loader, dataset(cfg, "test")


def announce(stages: list[Stage]) -> None:
    """The coarse-to-fine schedule, a line per stage."""
    for i, stage in enumerate(stages, 1):
        h, w = stage.cfg.size if 0 in stage.cfg.crop else stage.cfg.crop
        print(f"stage {i} of {len(stages)}, {stage.name}: {stage.epochs} epochs at {h}x{w} with "
              f"{stage.cfg.scales} D scale(s)")


def schedule(cfg: Config) -> set[str]:
    """The settings that the learning rate follows."""
    return {"epochs", "fine_epochs"}


def pick_device(cfg: Config) -> torch.device:
    """The device of this process. Under torchrun it also joins the other processes."""
    n, torchrun = torch.cuda.device_count(), dist.is_torchelastic_launched()
    rank = os.environ["LOCAL_RANK"] if torchrun else None
    gpu = cfg.gpu if cfg.gpu is not None else int(rank or 0) if n else -1
    if gpu >= n or gpu >= 0 and cfg.gpu is not None and rank:
        here = ", ".join(f"{k} ({torch.cuda.get_device_name(k)})" for k in range(n)) or "no GPU"
        raise UserError(f"--gpu {gpu}: this machine has {here}; -1 is the CPU; under torchrun, "
                        "which gives each process its own, leave the flag out")
    if gpu >= 0:
        torch.cuda.set_device(gpu)
        torch.backends.cudnn.benchmark = True   # sizes stay the same: search the fastest once
    if rank and not dist.is_initialized():
        dist.init_process_group("nccl" if gpu >= 0 else "gloo")
        atexit.register(dist.destroy_process_group)
    return torch.device("cuda", gpu) if gpu >= 0 else torch.device("cpu")


def dress(net: nn.Module, cfg: Config, device: torch.device) -> nn.Module:
    """A network on its device, with memory order, precision and compilation as asked for."""
    last = device.type == "cuda" if cfg.channels_last is None else cfg.channels_last
    net.to(device, memory_format=torch.channels_last if last else torch.contiguous_format)
    if dist.is_initialized() and device.type == "cuda":   # on the CPU each has its own statistics
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if cfg.precision == "bf16":                 # losses and optimisers stay in float32
        forward = torch.autocast(device.type, torch.bfloat16)(net.forward)
        net.forward = lambda *x: common.to_float(forward(*x))
    if cfg.compile:
        net.compile()                           # in place: names in the checkpoint stay as they are
    return net


def average_gradients(optimiser: torch.optim.Optimizer, *_) -> None:
    """Before each update: the mean over all processes. All began with the same weights."""
    if dist.is_initialized():
        grads = [p.grad for g in optimiser.param_groups for p in g["params"] if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads]) / dist.get_world_size()
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))


def read(*paths: str | Path) -> dict:
    """The content of checkpoints; of the authors' files, their weights under our names."""
    content = {}
    for path in paths:
        stored = common.load_file(Path(path), f"train first, or name a checkpoint of {NAME}.py")
        if "script" not in stored:
            stored = rename_released({str(k).removeprefix("module."): v for k, v in stored.items()},
                                     Path(path))
        elif stored["script"] != NAME:
            raise UserError(f"{path}: a checkpoint of {stored['script']}.py, not of {NAME}.py")
        elif not isinstance(stored.get(NETWORKS[0]), dict):
            raise UserError(f"{path}: damaged, without the {NETWORKS[0]}")
        content = stored | content
    return content


def load(state: State, stored: dict, where: str, everything: bool = False) -> None:
    """The networks, or (--resume) everything, go from what was read into state."""
    names = [name for name, value in vars(state).items() if everything or (
        name in NETWORKS and value is not None and stored.get(name) is not None)]
    if not names:
        raise UserError(f"{where}: holds {', '.join(stored)}, of which this run uses nothing")
    for name in names:
        value = getattr(state, name)
        if hasattr(value, "load_state_dict"):
            common.fill(value, stored.get(name), f"{where}: {name}")
        else:                                   # a tensor, a number, or None
            setattr(state, name, stored.get(name))
    stored.clear()                              # no second copy stays in memory


class Run:
    """A run's folder while it trains: checkpoint, log, pictures; and how it is stopped.

    Whatever ends a run, its checkpoint is whole, and --resume repeats exactly what came after it.
    Ctrl-C, SIGTERM and SIGHUP end the step and save first; a second one ends at once.
    """

    def __init__(self, cfg: Config, state: State, loader: common.Loader, test_set: common.Dataset,
                 stored: dict | None = None):
        self.state, self.loader, self.test_set = state, loader, test_set
        self.log, self.pending, self.asked = [], [], 0          # asked: the signal that came
        path = Path(cfg.out, "checkpoint.pt")
        if stored:                              # --resume
            common.fill(loader, stored.get("place"), f"{path}: place")
            self.log = stored.get("log", [])
            load(state, stored, str(path), everything=True)
        elif cfg.out and path.exists():
            raise UserError(f"--out {cfg.out}: holds a run already; --resume continues it")
        if loader.step >= loader.total:
            raise UserError(f"{cfg.out}: finished at step {loader.step}, epoch {loader.epoch}; a "
                            "larger --epochs or --steps goes on")
        self.kept = loader.state_dict()         # the place at which all was saved
        if loader.rank == 0:                    # nothing is left to refuse: there may be a folder
            common.describe(loader.examples, test_set)
            cfg = replace(cfg, out=cfg.out or str(common.free_folder(NAME)), resume=False)
            self.lock = common.lock(Path(cfg.out))
            Path(cfg.out, "config.json").write_text(json.dumps(asdict(cfg), indent=2))
            print(f"{loader.device}: {loader.total} steps of {loader.per_step} image(s), "
                  f"{loader.per_epoch} an epoch; in {cfg.out}")
        self.cfg = cfg

    def __enter__(self) -> "Run":
        loader = self.loader
        self.bar = tqdm(total=loader.total, initial=loader.step, unit="step",
                        disable=None if loader.rank == 0 else True)
        heard = [n for n in common.STOPPING if signal.getsignal(n) != signal.SIG_IGN]    # nohup
        self.before = {number: signal.signal(number, self.stop) for number in heard}
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.loader.rank == 0:
            self.lock.close()

    def stop(self, number: int, frame) -> None:
        self.asked = number
        signal.signal(number, self.before[number])

    def stopped(self, now: bool = False) -> bool:
        """Whether any process was told to stop: all must leave at the same step."""
        now |= self.loader.world == 1 or self.loader.step % 10 == 0
        if now and self.loader.world > 1:       # asking makes everyone wait
            told = torch.tensor(self.asked, device=self.loader.device)
            dist.all_reduce(told, dist.ReduceOp.MAX)
            self.asked = int(told)
        return now and self.asked > 0

    def done(self, losses: dict[str, Tensor]) -> None:
        """After each step. Every 20 a row of the log; every epoch a checkpoint and pictures."""
        loader = self.loader
        loader.over |= self.stopped()
        if loader.rank == 0:
            self.bar.update()
            self.pending.append(losses)         # on the device still: no step waits for them
            saving = loader.over or loader.step % (self.cfg.save_every or loader.per_epoch) == 0
            if saving or loader.step % 20 == 0:
                self.note()
            if saving:
                self.save()

    def note(self) -> None:
        """A row: losses, the mean since the last; images per second; share of waiting for data."""
        names, step, epoch = list(self.pending[0]), self.loader.step, self.loader.epoch
        values = torch.stack([torch.stack(list(losses.values())) for losses in self.pending]).cpu()
        for i, k in (~values.isfinite()).nonzero().tolist():
            bad = step + 1 + i - len(values)
            raise UserError(f"loss {names[k]} is {values[i, k]} at step {bad}: stopped; the last "
                            "good checkpoint is kept. A smaller --lr may help")
        self.log.append({"step": step, "epoch": epoch} | self.loader.speed() | {
            name: f"{value:.5g}" for name, value in zip(names, values.mean(0).tolist())})
        self.bar.set_postfix(self.log[-1])
        self.pending = []

    def save(self) -> None:
        """The checkpoint: everything that --resume needs, as plain tensors and numbers. Pictures.

        It comes first and whole; a full disk, or nobody who reads what is printed, costs no work.
        """
        out, self.kept = Path(self.cfg.out), self.loader.state_dict()
        common.save_file({name: value.state_dict() if hasattr(value, "state_dict") else value
                          for name, value in vars(self.state).items()} | {
            "script": NAME, "config": asdict(self.cfg), "log": self.log, "place": self.kept},
            out / "checkpoint.pt")
        if self.log:
            common.plot_log(self.log, out)
            self.bar.write("  ".join(f"{name} {value}" for name, value in self.log[-1].items()))
        if not self.asked:                      # who wants to stop does not wait for pictures
            sample_grid(self.state, self.cfg, self.test_set,
                        out / "samples" / f"{self.loader.step:07d}.png")
        self.loader.speed()                     # saving and drawing are not training

    def end(self) -> Path:
        """After the last step. Whoever was stopped elsewhere, in a search, has yet to save."""
        if self.loader.rank == 0 and self.kept != self.loader.state_dict():
            self.save()
        if self.asked:
            if self.loader.rank == 0:
                print(f"stopped at step {self.loader.step} and saved; to go on: "
                      f"python {NAME}.py --resume --out {self.cfg.out}")
            sys.exit(128 + self.asked)
        return Path(self.cfg.out)


# ---------------------------------------------------------------------------- 8 Command line

def stored_config(stored: dict, where: str, given: dict, free: set[str]) -> Config:
    """A checkpoint's config with the given flags; those not `free` must not contradict it."""
    ours = "script" in stored
    if not ours and not given.keys() & {"data", "input"}:
        raise UserError(f"{where}: released weights know no dataset; say --input or --data")
    config = stored.get("config") if ours else released_config(stored, given)
    try:
        cfg = Config(**config)
    except (TypeError, UserError) as error:
        raise UserError(f"{where}: damaged, or of another version ({error}); start a run from its "
                        "weights with --init")
    for name, value in given.items():
        if ours and name not in free and value != getattr(cfg, name):
            raise UserError(f"{flag(name)} {value} contradicts {where}, which was trained with "
                            f"{getattr(cfg, name)}; leave the flag out")
        if "resume" in given and name in schedule(cfg) and value != getattr(cfg, name):
            notice(f"{flag(name)} {value}, begun with {getattr(cfg, name)}: the learning rate "
                   f"follows it, so this is no run that had {value} from its start")
    cfg = replace(cfg, **{"init": ()} | given)
    if ours and cfg.classes and given.keys() & {"data", "classes"} == {"data"}:
        common.same_classes(dataset(cfg, "test"), cfg.classes)
    return cfg


def main(arguments: list[str] | None = None) -> None:
    """The command line: arguments -> config -> mode. Raises UserError for a user's mistake."""
    words = in_order(sys.argv[1:] if arguments is None else arguments)
    mode, given = common.parse(words, Config, NAME, MODES, CALL, __doc__)
    runs = [Path(given["out"], "checkpoint.pt")] if "out" in given else sorted(
        Path("runs").glob(f"{NAME}-*/checkpoint.pt"), key=os.path.getmtime)
    paths = given.get("checkpoint", ([Path(f"runs/{NAME}-1/checkpoint.pt")] + runs)[-1:])
    where, testing = " ".join(map(str, paths)), mode not in ("train", "check", "trace")
    if testing or given.get("resume"):
        stored, given = read(*paths), {"out": common.run_of(paths[0])} | given
        cfg = stored_config(stored, where, given, FREE_AT_TEST if testing else FREE)
    else:
        stored = None
        cfg = configure(given.get("preset", "" if given.get("data") else "toy"), given)
    if testing:
        cfg = at_stage(cfg, given, stored, where)
        state = build(replace(cfg, **ALONE), pick_device(cfg))
        ours = "script" in stored
        load(state, stored, where)
        if not (cfg.out or cfg.output):         # weights that lie in no run's folder
            cfg = replace(cfg, out=str(common.free_folder(NAME)))
        run_mode(mode, cfg, state, given, ours)
    elif mode == "train":
        train(cfg, stored)
    elif mode == "check":
        common.check_data([dataset(cfg, split) for split in ("train", "test")],
                          Path(cfg.out or common.free_folder("check")))
    else:
        trace(cfg)


def in_order(words: list[str]) -> list[str]:
    """--set, --style, ... as --edits, which collects them in the order of the command line."""
    rest, out = iter(words), []
    for word in rest:
        name, sign, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in EDITS:
            out.append(word)
        else:
            value = next(rest, "") if EDITS[name][0] and not sign else value
            out += ["--edits", f"{name} {value}".strip()]
    return out


def at_stage(cfg: Config, given: dict, stored: dict, where: str) -> Config:
    """The config of the stage that a checkpoint is of: a run of several may be at an early one."""
    if cfg.stage != "all":                      # of one stage, or the authors'
        return plan(cfg)[0].cfg
    size = stage_of(stored, where).cfg.size
    return replace(plan(cfg)[stored["stage"]].cfg, size=given.get("size", size))


def run_mode(mode: str, cfg: Config, state: State, given: dict, ours: bool) -> None:
    """What is done with a trained network."""
    path = Path([*cfg.checkpoint, Path(cfg.out, "checkpoint.pt")][0])
    if mode != "encode" and not (fit(state.styles, 2, cfg) and fit(state.means, 1, cfg)):
        raise UserError(f"{path}: its styles do not fit its classes; the mode encode mends them")
    if mode == "sample":
        sample(cfg, state, given.get("size"))
    elif mode == "edit":
        edit(cfg, state, given.get("size"))
    elif mode == "encode":
        encode_again(cfg, state, path, ours)
    else:
        evaluate(cfg, state)


def fit(styles: dict, ndim: int, cfg: Config) -> bool:
    """Whether these are numbers per object, as many as there are features, by known classes."""
    return isinstance(styles, dict) and all(
        k in range(class_table(cfg.classes).channels) and torch.is_tensor(v) and v.ndim == ndim
        and v.shape[-1] == cfg.features for k, v in styles.items())


def encode_again(cfg: Config, state: State, path: Path, ours: bool) -> None:
    """The mode encode: new styles, computed or read, into the checkpoint."""
    if state.encoder is None or not ours:
        raise UserError(f"{path}: has no encoder (--features 3), or is the authors' file, which "
                        "cannot hold styles; start a run from it with --init")
    if cfg.clusters_file:
        state.styles = read_clusters(Path(cfg.clusters_file))
        if not state.styles or not fit(state.styles, 2, cfg):
            raise UserError(f"{cfg.clusters_file}: holds classes {sorted(state.styles)}; this run "
                            f"has {class_table(cfg.classes).channels}, with {cfg.features} numbers")
    else:
        encode(cfg, state)
    keep_styles(state, path)


def trace(cfg: Config) -> None:
    """Layers, shapes and parameters in one training step of the last stage; FLOPs and time."""
    device = pick_device(cfg)
    cfg, _, _ = open_data(replace(cfg, compile=False))
    stages = plan(cfg)
    announce(stages)
    cfg = stages[-1].cfg
    state, loader = build(cfg, device), open_stage(cfg, stages, device)[0]
    pair = make_pair(next(iter(loader)), cfg)
    common.trace_step({name: getattr(state, name) for name in NETWORKS[:3]},
                      lambda: train_step(state, pair, cfg))


if __name__ == "__main__":
    common.shell(main, NAME)
