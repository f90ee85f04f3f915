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

Symbols     s  batch["input"], one-hot labels and boundaries     x  batch["image"], the photo
            z  a few numbers per object: E(x), averaged over each object, or at test time drawn
            x_hat = G(s, z)     D_k  the discriminator of scale k, 1 being the finest

Paper map
    Eq. (1)     conditional GAN loss               discriminator_loss, generator_loss
    Eq. (2)     several discriminators             MultiScaleDiscriminator, discriminator_loss
    Eq. (3)     feature matching                   feature_matching_loss
    Eq. (4)     the objective, lambda = 10         train_step
    Sec. 3.2    coarse to fine                     Generator, plan, enter
    Sec. 3.3    instance boundaries                boundary_map
    Sec. 3.4    encoder, K-means, sampling         Encoder, instance_average, kmeans, draw_styles
    Sec. 4      perceptual loss (unnumbered)       perceptual_loss
    Table 1     pixel accuracy and mean IoU        evaluate
    Table 2     pairwise preferences               needs people; sample makes its images
    Fig. 1      synthesis and editing              sample, Editor
    Fig. 2      edges to faces and cats            train --preset edges2photo
    Fig. 3      G1 inside G2                       Generator
    Fig. 4      with and without boundaries        sample, after train --no-boundary
    Fig. 5      the feature map                    Encoder, instance_average
    Fig. 6      preference after a short look      needs people
    Fig. 7      Cityscapes, by loss                sample, after train --loss GAN+FM
    Fig. 8      NYU                                sample, on your own --data
    Fig. 9      Cityscapes in detail               sample, after train --loss GAN+FM
    Fig. 10     ADE20K                             sample, on your own --data
    Fig. 11     editing faces by their parts       train --preset helen, Editor
    Slides      one D or three                     evaluate, after train --scales 1
    Slides      U-Net, CRN or G1                   tests/tables.py pix2pixhd-generators

Stages      one command trains all, one after the other; what has 0 epochs is left out
    stage     size  trained       frozen  learning rate           Adam is new for  scales of D
    global    1/2   G1, E, D      -       lr, falls in 2nd half   G1, E, D         scales - 1
    enhancer  1     G2, E, D      G1      lr                      G2, E, D         scales
    joint     1     G1, G2, E, D  -       lr, falls later on      G1, G2, E        scales
    The enhancer and the joint stage share one schedule, which falls in its second half: of 10 + 90
    epochs, the rate is full until the 41st of the 90 joint ones and falls from the 42nd on. With
    --enhancers 2, G1 begins at 1/4 of the size with scales - 2, and an enhancer and a joint stage
    follow for G3. A new enhancer, the output layer and the new finest D start from random weights;
    all others go on from the stage before. With --released E is trained in the first alone.

Paper                             | Released code                     | Here
    three discriminators          | two at 512 x 1024, three above    | 3 at any size (--scales);
                                  |                                   |   2 for G1 before G2
    feature matching is summed    | averaged over the scales          | summed; --released: mean
      over the scales             |                                   |
    "multiple layers" of D        | the four before the prediction    | these four
    Eq. (1) with logs, trained as | least squares; its log form drops | least squares; --loss
      least squares               |   the sigmoid                     |   logGAN: from logits
    G minimises log(1 - D)        | its log form: -log D              | logGAN: -log D
    VGG layers not named          | relu1_1 .. relu5_1, weights 1/32, | as released; reversed if
                                  |   1/16, 1/8, 1/4, 1               |   the VGG is random, ours
    VGG's input not stated        | [-1, 1], not normalised           | as released
    D's loss: a sum               | half the sum                      | half
    order of updates not stated   | both gradients, then G, then D    | as released
    G1, then G2, then both        | G2 alone, then all, with a new    | the three stages, in one
                                  |   Adam for G; since 2019 train.py |   command; G1 is trained in
                                  |   keeps the old Adam, and G1      |   the joint one
                                  |   stays frozen to the end         |
    labels for G1 not stated      | alone: resized by nearest; inside | as released
                                  |   G2: one-hot maps averaged       |
    labels of coarser D: the same | one-hot maps averaged             | as released
    E and G trained jointly       | at full size E's maps are stored  | jointly; --released: as
                                  |   as 8 bits and E is not trained  |   stored
    z at half size not mentioned  | E reads a photo that PIL resized  | --released: photo averaged
                                  |                                   |   3 x 3, z off by .005
    windows not mentioned         | z: means over the whole photo,    | means over the part of an
                                  |   then cut to the window          |   object in the window
    all objects are clustered     | those larger than 1/64 image      | all; --released: 1/64
    a centre is picked            | classes without one: unset memory | zeros, with a notice
    boundary by 4-neighbours      | the same                          | the same, both sides marked
    normalisation not stated      | instance norm without parameters  | as released
    biases not stated             | PyTorch's default                 | PyTorch's default
    transposed convolutions       | the same; early in training they  | the same; --smooth, ours, in
                                  |   make a regular pattern of dots  |   toy, averages it away
    unknown pixels not mentioned  | an ordinary class, in every loss  | as released
    slides: two other generators  | not released                      | tests/tables.py: U-Net and
                                  |                                   |   CRN of our other scripts
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
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import common                                   # before torch: it says how torch's threads wait

import matplotlib.figure
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from tqdm import tqdm

from common import (
    COUNT, POSITIVE, UserError, Within, check_settings, check_sides, class_id, class_table,
    colour_label, draw_seed, find_preset, flag, notice, save_images, setting)

NAME = "pix2pixhd"
# In State; the first is what testing needs, the first three are networks.
NETWORKS = ("generator", "discriminator", "encoder", "stage", "styles")
MODES = ("train", "sample", "edit", "encode", "evaluate", "check", "trace")
# Who knows a flag.
TRAIN, SAMPLE, EDIT, BEFORE = ("train",), ("sample",), ("edit",), ("train", "check", "trace")
SCENES = SAMPLE + EDIT

# --------------------------------------------------------------------------------- 1 Config

# What the mode edit can change: the flag, the Editor's method, what follows, the same as a pattern.
EDITS = {"set": ("set_class", "ID=CLASS", r"(\d+)=(.+)"),
         "style": ("set_style", "ID=K", r"(\d+)=(\d+)"),
         "remove": ("remove", "ID", r"(\d+)"),
         "paste": ("paste", "ID@DOWN,RIGHT", r"(\d+)@(-?\d+),(-?\d+)"),
         "undo": ("undo", "", "")}


@dataclass
class Config:
    """Every setting is a flag. The defaults are the paper's; the text says where it states them."""
    # The task. Label maps go in and photos come out; where the data has no label maps but pairs of
    # images, such as edges and photos (Fig. 2), the first image of a pair is the input.
    data: str = setting("", "folder in a known layout; none: built-in streets", free="resume")
    direction: str = setting("AtoB", "which half of a pair is the input", ("AtoB", "BtoA"))
    classes: str = setting("", "a table of common.py, or a number; none: asks the data")
    boundary: bool = setting(True, "instance boundaries beside the labels, Sec. 3.3")
    size: tuple[int, int] = setting((1024, 2048), "height, width, Sec. 3.2", POSITIVE, free="test")
    crop: tuple[int, int] = setting((0, 0), "train enhancers on windows; 0: whole images", COUNT)
    mirror: bool = setting(True, "flip left and right, half the time; released code")
    limit: int = setting(0, "use the first so many; 0: all (400 streets)", COUNT, free="test")
    # The networks. The defaults are G1 and G2 for 1024 x 2048 pixels: 183 million parameters, of
    # which the nine residual blocks of G1 hold 170 million. Layers: halvings in G1, residual blocks
    # in G1, residual blocks in each enhancer. E is a quarter as wide as G1; released code.
    enhancers: int = setting(1, "0: G1; 1: and G2; 2: and G3; Sec. 3.2", Within(0, 4))
    width: int = setting(64, "channels after G1's first layer, halved per enhancer", POSITIVE)
    layers: tuple[int, int, int] = setting((4, 9, 3), "halvings, blocks, enhancer's; arXiv", COUNT)
    smooth: bool = setting(False, "ours: average away a transposed convolution's dots")
    scales: int = setting(3, "discriminators, each of half the size, Sec. 3.2", Within(1, 6))
    d_width: int = setting(64, "channels after D's first layer; arXiv", POSITIVE)
    features: int = setting(0, "numbers per object from the encoder; 3 in Sec. 4; 0: no E", COUNT)
    pool: str = setting("instance", "average E's map over these; Fig. 11", ("instance", "label"))
    # The objective: GAN + lambda_fm FM + lambda_vgg VGG. GAN, of weight 1, is by least squares as
    # in Sec. 4, logGAN by the logs of Eq. (1).
    loss: str = setting("GAN+FM+VGG", "Sec. 4.2", (
        "GAN+FM+VGG", "GAN+FM", "GAN", "logGAN+FM+VGG", "logGAN+FM", "logGAN"))
    lambda_fm: float = setting(10.0, "lambda in Eq. (4), Sec. 4", COUNT)
    lambda_vgg: float = setting(10.0, "weight of the perceptual loss, Sec. 4", COUNT)
    vgg: str = setting("imagenet", "VGG-19: imagenet, small, random, a file", free="test")
    released: bool = setting(False, "the middle column of the table above, where it says so")
    # Training. The numbers of epochs are those of the stages in the table above; 0 leaves one out:
    # with --epochs 0, enhancers begin around the G1 of --init. An enhancer is trained first with
    # the rest of G frozen, then with all of G.
    epochs: int = setting(200, "passes over the data that train G1; arXiv", COUNT, free="resume")
    enhancer_epochs: tuple[int, int] = setting((10, 90), "of each enhancer, alone and joint; "
                                               "released code", COUNT, free="resume")
    steps: int = setting(0, "end after so many updates; 0: epochs decide", COUNT, free="resume")
    batch_size: int = setting(1, "images per step and process; released code", POSITIVE)
    lr: float = setting(2e-4, "Adam's, all networks; arXiv", Within(1e-9, 0.9))
    seed: int = setting(0, "of initialisation, order, flips and styles", common.SEED, free="test")
    init: tuple[str, ...] = setting((), "begin with these weights: ours, or the authors'",
                                    modes=TRAIN, free="call")
    # The machine
    gpu: int | None = setting(None, "number; -1: the CPU; none: the first", Within(-1), free="call")
    workers: int | None = setting(None, "data processes; none: 4 with a GPU", COUNT, free="resume")
    precision: str = setting("fp32", "bf16: autocast", ("fp32", "bf16"), free="resume")
    compile: bool = setting(False, "torch.compile the networks", free="resume")
    channels_last: bool | None = setting(None, "memory order; none: with a GPU", free="resume")
    out: str = setting("", "the run's folder; none: the next runs/pix2pixhd-N", free="call")
    # One call
    preset: str = setting("", "a released script; none: toy with the streets", modes=BEFORE)
    resume: bool = setting(False, "go on with --out, or the newest run", modes=TRAIN, free="call")
    checkpoint: tuple[str, ...] = setting((), "to test or resume, also the authors'; none: newest",
                                          modes=MODES[:5], free="call")
    input: str = setting("", "a file or folder; none: the test split", modes=SCENES, free="call")
    instances: str = setting("", "the instance maps of --input", modes=SCENES, free="call")
    output: str = setting("", "a file or folder; none: in --out", modes=SCENES, free="call")
    samples: int = setting(1, "outputs per input", POSITIVE, modes=SAMPLE, free="call")
    vary: tuple[str, ...] = setting((), "restyle these classes alone", modes=SAMPLE, free="call")
    item: str = setting("", "one of the images by name; none: the first", modes=EDIT, free="call")
    edits: tuple[str, ...] = setting((), "change the scene, in the order given",
                                     {name: form for name, (_, form, _) in EDITS.items()},
                                     modes=EDIT, free="call")

    # No flag: as what the training data were understood, by common.Dataset.
    understood: dict = field(default_factory=dict)

    def __post_init__(self):
        check_settings(self)
        # G1 works at 1 / 2^enhancers of the size. Two pixels are the least that instance norm and
        # reflected borders can work on.
        halvings = self.layers[0] + self.enhancers
        for option, size in (("--size", self.size), ("--crop", self.crop)):
            if any(size):
                check_sides(option, size, 2 ** halvings, 2 * 2 ** halvings,
                            f"G halves each side {halvings} times")


# The released training scripts, line by line, but for the loss, which is the paper's unless
# --released says otherwise, and for D's scales: 512p has two there, and three here as in the paper.
# There, G1 at 512p and G1+G2 at 1024p are separate runs; here "1024p" trains both, one after the
# other. The authors ask for a GPU of 24 GB; a step at 1024p took 15.3 GB here.
PRESETS = {
    "512p": dict(size=(512, 1024), enhancers=0),                                  # G1 alone
    "512p-features": dict(size=(512, 1024), enhancers=0, features=3),             # and E
    "1024p": dict(),
    "1024p-12GB": dict(crop=(1024, 1024), enhancer_epochs=(20, 180)),             # windows
    "1024p-features": dict(features=3, released=True),                            # Sec. 3.4
    "1024p-features-12GB": dict(features=3, released=True, crop=(896, 896),
                                enhancer_epochs=(20, 180)),
    "labels-only": dict(boundary=False),                                          # Table 2
    "edges2photo": dict(boundary=False, size=(1024, 1024)),                       # Fig. 2
    "helen": dict(size=(1024, 1024), features=3, pool="label", boundary=False),   # Fig. 11
    # Ours, for the streets on a laptop's CPU. The networks are narrow, which allows Adam a larger
    # rate. --smooth removes the dots of the transposed convolutions, which training removes only in
    # far more steps. There is little time for full size: no stage trains the enhancer alone, and
    # half of lambda_fm gave sharper pictures.
    "toy": dict(size=(96, 192), limit=400, width=32, layers=(2, 3, 2), smooth=True, d_width=16,
                features=3, vgg="small", lambda_fm=5.0, lr=6e-4, epochs=2, enhancer_epochs=(0, 4)),
}
# Ours, too: the same for an hour, larger, and with the paper's lambda_fm.
PRESETS["streets"] = PRESETS["toy"] | dict(size=(128, 256), limit=800, lambda_fm=10.0, epochs=3,
                                           enhancer_epochs=(0, 7))


def configure(preset: str, given: dict) -> Config:
    """The paper's settings, then a preset's, then what was given."""
    cfg = Config(**{"preset": preset} | find_preset(PRESETS, "--preset", preset) | given)
    if not cfg.epochs and not (cfg.init and cfg.enhancers):
        raise UserError("--epochs 0: leaves enhancers alone; they need the G1 of an --init")
    return cfg


# ------------------------------------------------------------------------------- 2 Networks

class InstanceNorm(nn.GroupNorm):
    """Each channel of each image to mean 0, variance 1; no parameters, no running averages.

    A group norm with one channel per group is this very function, and on the CPU the faster one. On
    a GPU it copies maps into another memory order; batch norm does not, and of a single image it is
    the same function: 64 x 512 x 1024 in a sixth of the time.
    """

    def __init__(self, c: int):
        super().__init__(c, c, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        alone = x.is_cuda and len(x) == 1
        return F.batch_norm(x, None, None, training=True) if alone else super().forward(x)


def convolution(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """Convolution, instance norm, ReLU. At stride 1 borders are reflected, at stride 2 zero."""
    mode = "reflect" if stride == 1 else "zeros"
    return [nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, padding_mode=mode),
            InstanceNorm(c_out), nn.ReLU()]


def output_layer(c_in: int, c_out: int) -> nn.Sequential:
    """c7s1-3: a 7 x 7 convolution makes an image of a feature map, and tanh takes it to [-1, 1]."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 7, padding=3, padding_mode="reflect"), nn.Tanh())


def smooth_grid(x: Tensor) -> Tensor:
    """Each pixel (..., H, W) becomes the mean of itself, its right, its lower and its lower right
    neighbour; a border repeats itself.

    The kernels of a transposed convolution of stride 2 overlap in a pattern that repeats every two
    pixels. Of two neighbours one is always an overlap, so the mean removes the pattern.
    """
    if torch.compiler.is_compiling():           # it cannot take the gradient of the padding below
        x = torch.cat([x, x[..., -1:]], -1)
        return F.avg_pool2d(torch.cat([x, x[..., -1:, :]], -2), 2, 1)
    return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), "replicate"), 2, 1)


class Doubling(nn.ConvTranspose2d):
    """Transposed convolution, (B, c_in, H, W) -> (B, c_out, 2 H, 2 W).

    Its 3 x 3 kernels overlap at every other pixel, so an untrained one makes a pattern of dots, and
    training has to remove it. `smooth`, ours, takes the mean of each 2 x 2 window: the pattern
    disappears, and some sharpness with it.
    """

    def __init__(self, c_in: int, c_out: int, smooth: bool = False):
        super().__init__(c_in, c_out, 3, 2, 1, output_padding=1)
        self.smooth = smooth

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return smooth_grid(x) if self.smooth else x     # without: as in the paper and the release


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

    def __init__(self, c_in: int, width: int = 64, downs: int = 4, blocks: int = 9,
                 smooth: bool = False):
        super().__init__()
        c = [width * 2 ** i for i in range(downs + 1)]                       # 64 128 256 512 1024
        self.front = nn.Sequential(*convolution(c_in, width, 7))             # (B, 64, H, W)
        for c_a, c_b in zip(c, c[1:]):
            self.front.extend(convolution(c_a, c_b, stride=2))               # (B, 1024, H/16, W/16)
        self.residual = nn.Sequential(*(ResidualBlock(c[-1]) for _ in range(blocks)))  # unchanged
        self.back = nn.Sequential()
        for c_a, c_b in zip(c[::-1], c[-2::-1]):
            self.back.extend([Doubling(c_a, c_b, smooth), InstanceNorm(c_b), nn.ReLU()])

    def forward(self, s: Tensor) -> Tensor:
        return self.back(self.residual(self.front(s)))                       # (B, 64, H, W)


class LocalEnhancer(GlobalGenerator):
    """G2, or G3, ..., without its output layer (Sec. 3.2, Fig. 3): the layers of a G1 with a single
    halving, and a second input between them.

    s (B, c, H, W), below (B, 2 width, H/2, W/2)  ->  (B, width, H, W), after a ReLU.

    `below` is the last feature map of the next coarser network, not its image. It is added to what
    the front-end makes of the labels, and the residual blocks work on the sum.
    arXiv: c7s1-32, d64, R64 x 3, u32, and c7s1-3 to come.
    """

    def forward(self, s: Tensor, below: Tensor) -> Tensor:
        return self.back(self.residual(self.front(s) + below))


class Generator(nn.Module):
    """G = {G1, G2, ...}: the global network inside its local enhancers (Sec. 3.2, Fig. 3).

    s (B, c, H, W)  ->  image (B, 3, H, W) in [-1, 1]; sides multiples of `multiple`.

    G1 works at half the size of G2, and G2 at half that of G3. `width` is G1's and halves with each
    enhancer: 64 at 1024 x 512, 32 at 2048 x 1024, 16 at 4096 x 2048. `level` enhancers are in use:
    all, or fewer in the early stages of training. Only the outermost network in use makes an image;
    when an enhancer is put around it, its output layer is dropped. So G1, G2, ... have one each
    (early=True), of which a finished G uses the last alone.

    What G1 reads: alone, a label map that was resized to its size, where each pixel is of one
    class. Inside G2, the average of G2's one-hot labels, where a pixel at a border is a mixture.
    """

    def __init__(self, c_in: int = 36, c_out: int = 3, width: int = 64, downs: int = 4,
                 blocks: int = 9, enhancers: int = 1, enhancer_blocks: int = 3,
                 smooth: bool = False, early: bool = False):
        super().__init__()
        self.downs = downs
        self.globe = GlobalGenerator(c_in, width, downs, blocks, smooth)    # "global" is a keyword
        self.enhancers = nn.ModuleList(
            LocalEnhancer(c_in, width // 2 ** n, 1, enhancer_blocks, smooth)
            for n in range(1, enhancers + 1))
        self.output = output_layer(width // 2 ** enhancers, c_out)
        self.early_outputs = nn.ModuleList(output_layer(width // 2 ** n, c_out)
                                           for n in range(enhancers if early else 0))
        self.apply(initialise)
        self.use(enhancers)

    def use(self, level: int, alone: bool = False) -> None:
        """Put `level` enhancers to use. alone: only the outermost of them is to be trained."""
        self.level, self.multiple = level, 2 ** (self.downs + level)
        self.requires_grad_(False)
        parts = [self.globe, *self.enhancers[:level], self.output_in_use()]
        for part in parts[-2:] if alone else parts:
            part.requires_grad_(True)

    def output_in_use(self) -> nn.Module:
        return self.output if self.level == len(self.enhancers) else self.early_outputs[self.level]

    def load_state_dict(self, weights: dict):
        """Early output layers may be missing, as in the authors' files."""
        early = {k: v for k, v in self.state_dict().items() if k.startswith("early_outputs.")}
        return super().load_state_dict(early | weights)

    def forward(self, s: Tensor) -> Tensor:
        # Every network reads the labels at its own size; features go from coarse to fine.
        pyramid = [s]                                        # the largest first
        for _ in range(self.level):
            pyramid.append(half(pyramid[-1]))
        y = self.globe(pyramid.pop())                        # the smallest: (B, 64, H/2^n, W/2^n)
        for enhancer in self.enhancers[:self.level]:
            y = enhancer(pyramid.pop(), y)                   # (B, 32, 2 h, 2 w)
        return self.output_in_use()(y)                       # (B, 3, H, W)


def half(x: Tensor) -> Tensor:
    """3 x 3 average at stride 2: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)).

    For images and for one-hot labels alike: a mixed pixel says which classes meet in it. Padding is
    not counted, so borders keep their brightness.
    """
    return F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)


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
            norm = [InstanceNorm(c[i + 1])] if 0 < i < 4 else []
            relu = [nn.LeakyReLU(0.2)] if i < 4 else []      # the prediction is linear
            self.layers.append(nn.Sequential(nn.Conv2d(c[i], c[i + 1], 4, stride, 2), *norm, *relu))

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
    the coarsest stands first, and the first `used` judge. So each has images of one size before it
    all its life: "a higher resolution only requires adding an additional discriminator at the
    finest level".
    """

    def __init__(self, c_in: int = 39, width: int = 64, scales: int = 3):
        super().__init__()
        self.scales = nn.ModuleList(PatchDiscriminator(c_in, width) for _ in range(scales))
        self.apply(initialise)
        self.use(scales)

    def use(self, scales: int) -> None:
        """Put the coarsest so many to use, and to training."""
        self.used = scales
        for k, discriminator in enumerate(self.scales):
            discriminator.requires_grad_(k < scales)

    def forward(self, s: Tensor, x: Tensor) -> list[list[Tensor]]:
        y, results = torch.cat([s, x], 1), []
        for k, discriminator in enumerate(reversed(self.scales[:self.used])):
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
        outline = GlobalGenerator(3, width, downs, blocks=0)                 # 16 32 64 128 256
        self.layers = nn.Sequential(*outline.front, *outline.back)
        self.output = output_layer(width, c_out)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        z = self.output(self.layers(x))         # halved and doubled, an odd side has become even
        return z[..., :x.shape[2], :x.shape[3]]


def instance_average(z: Tensor, region: Tensor) -> Tensor:
    """Every pixel gets the mean of its object (Sec. 3.4): z (B, C, H, W), region (B, H, W) ids.

    In plain words, for each image b and each object o that is in it:

        z[b][:, region[b] == o] = z[b][:, region[b] == o].mean(1)

    So an object has one value in z, however large it is, and E cannot pass the photo itself to G.
    Below, all objects of the batch are numbered and summed at once. Sums are in float64, for a road
    is a sum of 10^5 pixels.
    """
    b, c, h, w = z.shape
    image = torch.arange(b, device=z.device).view(-1, 1, 1)
    owner = (region * b + image).unique(return_inverse=True)[1].flatten()   # (B H W): whose pixel
    pixels = z.transpose(0, 1).reshape(c, -1).double()                      # (C, B H W)
    area = owner.bincount()                                                 # (objects)
    means = pixels.new_zeros(c, len(area)).index_add(1, owner, pixels) / area     # (C, objects)
    return means[:, owner].to(z.dtype).view(c, b, h, w).transpose(0, 1)


def initialise(module: nn.Module) -> None:
    """Weights from N(0, 0.02) (arXiv). Released code: biases keep PyTorch's default."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)


# --------------------------------------------------------------------------------- 3 Losses

Maps = list[list[Tensor]]       # per scale, the finest first: four hidden maps and the prediction


def discriminator_loss(real: Maps, fake: Maps, log: bool = False) -> tuple[Tensor, Tensor]:
    """Eq. (2), D's side: sum_k of Eq. (1), as (real, fake), each halved.

    Sec. 4 trains with least squares: mean (D_k(s, x) - 1)^2 and mean D_k(s, G(s))^2. They pull
    the predictions to 1 and 0 and keep a gradient where the logs of Eq. (1) are saturated. In the
    log form predictions are logits. Means run over the batch and all patches of one scale.
    Released code: half of the two; with Adam a factor hardly matters.
    """
    if log:
        return (sum(F.softplus(-maps[-1]).mean() for maps in real) / 2,   # -log sigmoid(a)
                sum(F.softplus(maps[-1]).mean() for maps in fake) / 2)    # -log(1 - sigmoid(a))
    return (sum((maps[-1] - 1).square().mean() for maps in real) / 2,
            sum(maps[-1].square().mean() for maps in fake) / 2)


def generator_loss(fake: Maps, log: bool = False) -> Tensor:
    """Eq. (2), G's side: sum_k mean (D_k(s, G(s)) - 1)^2, with weight 1.

    In the log form, as in the release, G minimises -log D_k and not Eq. (1)'s log(1 - D_k), whose
    gradient vanishes while D is winning.
    """
    if log:
        return sum(F.softplus(-maps[-1]).mean() for maps in fake)
    return sum((maps[-1] - 1).square().mean() for maps in fake)


def feature_matching_loss(real: Maps, fake: Maps, mean: bool = False) -> Tensor:
    """Eq. (3), summed over k as in Eq. (4): sum_ki ||D_k^(i)(s, x) - D_k^(i)(s, G(s))||_1 / N_i.

    N_i, the number of elements of map i, makes each term a mean. The T = 4 hidden maps count, the
    prediction does not. The real side is a target, hence detached: D "does not maximize" this loss.
    Released code: divided by the number of scales (mean=True), and by (n + 1) / 4 for n layers of
    stride 2, which is 1 for the n = 3 here.
    """
    total = 0.0
    for maps_x, maps_g in zip(real, fake):                   # D_1, D_2, D_3
        for theirs, ours in zip(maps_x[:-1], maps_g):        # without the prediction
            total = total + (theirs.detach() - ours).abs().mean()
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
    weights = reversed(VGG_LAYERS.values()) if random else VGG_LAYERS.values()
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


def dataset(cfg: Config, split: str) -> common.Dataset:
    """One split. Labels and instances are resized by nearest neighbour. Photos of the training
    split are flipped half the time, and cut to windows if asked for."""
    train = split == "train"
    return common.Dataset(
        data=cfg.data, split=split, size=cfg.size, crop=cfg.crop if train else (0, 0),
        mirror=train and cfg.mirror, classes=cfg.classes, direction=cfg.direction, limit=cfg.limit,
        seed=cfg.seed, instances=cfg.boundary or cfg.pool == "instance", understood=cfg.understood)


def needs_instances(cfg: Config) -> bool:
    return cfg.boundary or cfg.features > 0 and cfg.pool == "instance"


def usable(examples: common.Dataset, cfg: Config) -> common.Dataset:
    """A dataset itself, if it has what the networks read."""
    examples.require("label" if cfg.classes else "A")
    return examples.require("instance" if needs_instances(cfg) else None,
                            "train with --no-boundary (and --pool label) without them")


def open_data(cfg: Config) -> tuple[Config, common.Dataset, common.Dataset]:
    """Both splits, and the config with what the data turned out to be: classes, boundary, pool.

    No classes: pairs of images. No instance maps: no boundary channel, and E's map is averaged
    over labels. The checkpoint remembers it all.
    """
    train_set = dataset(cfg, "train").require("image")
    cfg = replace(cfg, understood=train_set.understood)
    if not cfg.resume:                          # else it is in the checkpoint
        labels, instances = "label" in train_set.roles, "instance" in train_set.roles
        if cfg.features and not labels:
            raise UserError(f"--data {cfg.data}: has no label maps with objects; use --features 0")
        if labels and not instances and needs_instances(cfg):
            notice("no instance maps: no boundary channel, and E's map is averaged over labels")
        cfg = replace(cfg, classes=train_set.classes if labels else "",
                      boundary=cfg.boundary and instances, pool=cfg.pool if instances else "label")
    return cfg, usable(train_set, cfg), usable(dataset(cfg, "test"), cfg)


class Stage(NamedTuple):
    """One part of the coarse-to-fine training."""
    name: str                                   # global, enhancer, joint
    level: int                                  # enhancers in use
    epochs: int                                 # its own
    schedule: range                             # the run's epochs that share a learning rate's fall


def plan(cfg: Config) -> list[Stage]:
    """Sec. 3.2: "first train the global generator and then train the local enhancer in the order
    of their resolutions. We then jointly fine-tune all the networks together."

    The two stages of one enhancer share one learning-rate schedule.
    """
    stages = [Stage("global", 0, cfg.epochs, range(cfg.epochs))]
    alone, joint = cfg.enhancer_epochs
    for level in range(1, cfg.enhancers + 1):
        begin = stages[-1].schedule.stop
        both = range(begin, begin + alone + joint)
        stages += [Stage("enhancer", level, alone, both), Stage("joint", level, joint, both)]
    return [stage for stage in stages if stage.epochs]


def stage_at(stages: list[Stage], epoch: int) -> int:
    """Which stage an epoch of the run belongs to; the last has all that are left."""
    ends = itertools.accumulate(stage.epochs for stage in stages[:-1])
    return sum(epoch >= end for end in ends)


def learning_rate(cfg: Config, stage: Stage, epoch: int) -> float:
    """Full for the first half of the schedule, then down in equal steps; the last is not yet 0.

    The released rule: with n epochs at the full rate and m falling, epoch e (counted from 1) has
    lr (1 - (e - n - 1) / m) from e = n + 1 on. So of 10 + 90 epochs, n = m = 50, the 51st, which is
    the 41st joint one, still has lr; the 42nd has 49/50 of it, and the 90th 1/50.
    """
    falling = len(stage.schedule) // 2          # the epochs of the second half
    beyond = max(0, epoch - (stage.schedule.stop - falling))    # the run's epochs count from 0
    return cfg.lr * (1 - beyond / max(falling, 1))


def at_level(cfg: Config, level: int) -> Config:
    """The config of what is in use with `level` enhancers: G1 has 1 / 2^enhancers of the size and
    each enhancer doubles it; half the size has one discriminator fewer. G1 sees whole images."""
    halvings = cfg.enhancers - level
    return replace(cfg, enhancers=level, scales=max(1, cfg.scales - halvings),
                   size=tuple(side >> halvings for side in cfg.size),
                   crop=tuple(side >> halvings for side in cfg.crop) if level else (0, 0))


def enter(state: State, cfg: Config, k: int) -> None:
    """Stage k of the plan: which part of G and D it uses, and what of it is trained.

    Adam begins anew; but D's goes on from the enhancer to the joint stage, which share their D.
    Released code: at full size E's maps are read from files, so E itself is not trained there.
    """
    G, D, E, stage = state.generator, state.discriminator, state.encoder, plan(cfg)[k]
    same_size = state.opt_d is not None and G.level == stage.level      # so D is the same, too
    G.use(stage.level, alone=stage.name == "enhancer")
    D.use(at_level(cfg, stage.level).scales)
    if E is not None:
        E.requires_grad_(not (cfg.released and stage.level))
    state.stage, state.opt_g = k, adam(cfg, G, E)
    if not same_size:
        state.opt_d = adam(cfg, D)


def channels(cfg: Config) -> int:
    """Of s: 3 of an RGB input, or one per class (35 on Cityscapes) and one of the boundaries."""
    return class_table(cfg.classes).channels + cfg.boundary if cfg.classes else 3


def networks(cfg: Config) -> tuple[nn.Module, nn.Module, nn.Module | None]:
    """G, D and E of all stages. G reads E's numbers beside s; D sees s and the image, never z."""
    c, (downs, blocks, enhancer_blocks) = channels(cfg), cfg.layers
    generator = Generator(c + cfg.features, 3, cfg.width, downs, blocks, cfg.enhancers,
                          enhancer_blocks, cfg.smooth, early=True)
    discriminator = MultiScaleDiscriminator(c + 3, cfg.d_width, cfg.scales)
    encoder = Encoder(cfg.features, max(cfg.width // 4, 1)) if cfg.features else None
    return generator, discriminator, encoder


def build(cfg: Config, device: torch.device) -> State:
    """Networks and optimisers, at the last stage of the plan; see `enter` for another. Precision,
    compilation and distribution go around the networks."""
    torch.manual_seed(cfg.seed)                 # all processes begin with the same weights
    G, D, E = (None if net is None else prepare(net, cfg, device) for net in networks(cfg))
    vgg = None
    if "VGG" in cfg.loss:                       # frozen from the start, and not in the checkpoint
        vgg = common.VGGFeatures(tuple(VGG_LAYERS), 19, cfg.vgg, normalise=False,
                                 width=8 if cfg.vgg == "random" else 64)      # ours: a narrow one
        vgg = prepare(vgg, cfg, device)
    state = State(G, D, E, vgg, None, None)
    if cfg.init:
        start_from(state, read_weights(*cfg.init), " ".join(cfg.init))
    enter(state, cfg, len(plan(cfg)) - 1)
    return state


def by_level(weights: dict) -> dict:
    """A network's weights, its output layer called by the number of enhancers inside it."""
    n = len({key.split(".")[1] for key in weights if key.startswith("enhancers.")})
    return {key.replace("output.", f"early_outputs.{n}."): value for key, value in weights.items()}


def start_from(state: State, stored: dict, path: str) -> None:
    """--init: each weight from its namesake, which must fit. An enhancer, an output layer or a D
    that the file has not begins at random, which is said.

    D's scales go by number, the coarsest first, as in the release: a run of G1 alone with one scale
    less (see the table of stages) gives each D images of the size that it knows.
    """
    weights, new = {}, set()
    for name in NETWORKS[:3]:
        if getattr(state, name) is not None and stored.get(name) is not None:
            own, theirs = getattr(state, name).state_dict(), by_level(stored[name])
            names = dict(zip(by_level(own), own))
            known = {names[level]: theirs[level] for level in theirs if level in names}
            new |= {f"{name}.{'.'.join(key.split('.')[:2])}" for key in own.keys() - known.keys()}
            weights[name] = own | known
    load(state, weights or stored, path)
    if new:
        notice(f"{path}: has no {', '.join(sorted(new))}; random weights begin there")


def trained(*nets: nn.Module | None) -> list[nn.Parameter]:
    """The parameters that the optimiser moves."""
    return [p for net in nets if net is not None for p in net.parameters() if p.requires_grad]


def adam(cfg: Config, *nets: nn.Module | None) -> torch.optim.Adam:
    """An optimiser without any moments yet, of what is to be trained in these networks."""
    optimiser = torch.optim.Adam(trained(*nets), cfg.lr, (0.5, 0.999), fused=True)     # released
    optimiser.register_step_pre_hook(average_gradients)
    return optimiser


def boundary_map(instance: Tensor) -> Tensor:
    """1 where the object differs from any of the four neighbours (pix2pixHD, Sec. 3.3, Fig. 4).

    instance (B, H, W) int64  ->  (B, 1, H, W) float. Both sides of a border are marked; the
    image's own border is none. Ids themselves cannot be fed to a network: their number varies, and
    their values mean nothing. What tells touching cars apart is where one ends.
    """
    # Of each pair of neighbours that differ, both pixels are marked.
    across, down = instance.diff(dim=2) != 0, instance.diff(dim=1) != 0
    edge = (F.pad(across, (1, 0)) | F.pad(across, (0, 1))
            | F.pad(down, (0, 0, 1, 0)) | F.pad(down, (0, 0, 0, 1)))
    return edge[:, None].float()


def make_pair(batch: dict, cfg: Config) -> dict:
    """A batch of common.Dataset with "input" s (B, c, H, W) and "region" (B, H, W) added.

    s: one-hot labels, then the boundary map. region: the objects over which E's map is averaged.
    """
    if not cfg.classes:
        return batch                            # pairs of images: nothing to make
    label = batch["label"]                      # (B, H, W) int64
    ids = torch.arange(class_table(cfg.classes).channels, device=label.device)
    s = (label[:, None] == ids.view(-1, 1, 1)).float()      # one-hot, without an int64 of each
    if cfg.boundary:
        s = torch.cat([s, boundary_map(batch["instance"])], 1)
    # Fig. 11 averages over labels instead: one style for all the hair, one for all the skin.
    region = batch.get("instance", label) if cfg.pool == "instance" else label
    return batch | {"input": s, "region": region}


def style_of_photo(encoder: nn.Module, x: Tensor, region: Tensor, cfg: Config) -> Tensor:
    """z = E(x), averaged over each region (B, H, W): (B, C, H, W).

    Released code, at full size: the map that E makes of the photo at half the size, with which E
    was trained, is doubled and rounded to 8 bits.
    """
    if not (cfg.released and cfg.enhancers):
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
    losses, vgg_term = {}, 0.0
    if "VGG" in cfg.loss:                       # before D: see perceptual_term
        losses["g_vgg"], vgg_term = perceptual_term(state.vgg, x, x_hat, cfg.vgg == "random")
    real, fake = D(s, x), D(s, x_hat)           # per scale: four hidden maps, prediction
    log = "log" in cfg.loss

    # G and E: the min in Eq. (4).
    losses["g_gan"] = generator_loss(fake, log)
    if "FM" in cfg.loss:
        losses["g_fm"] = feature_matching_loss(real, fake, cfg.released)
    objective = (losses["g_gan"] + cfg.lambda_fm * losses.get("g_fm", 0.0)
                 + cfg.lambda_vgg * vgg_term)
    state.opt_g.zero_grad(set_to_none=True)
    objective.backward(inputs=trained(G, E), retain_graph=True)     # D's loss needs the graph, too

    # D: the max in Eq. (2).
    losses["d_real"], losses["d_fake"] = discriminator_loss(real, fake, log)
    state.opt_d.zero_grad(set_to_none=True)
    (losses["d_real"] + losses["d_fake"]).backward(inputs=trained(D))
    state.opt_g.step()                          # only now: both gradients are of the same weights
    state.opt_d.step()
    return {name: loss.detach() for name, loss in losses.items()}


def train(cfg: Config, stored: dict | None = None) -> Path:
    """All stages: from scratch, from --init, or on from a stored checkpoint; their folder.

    The stages are those of the table at the top. Each has a loader of its own, for its size, which
    goes on where the last one was.
    """
    device = pick_device(cfg)
    cfg, _, _ = open_data(cfg)
    stages, state, first = plan(cfg), build(cfg, device), stored["stage"] if stored else 0
    if stored and stage_at(stages, stored["place"]["epoch"]) != first:
        raise UserError(f"--epochs {cfg.epochs}: would move a stage that has begun; leave it out")
    enter(state, cfg, first)
    here, loader, test_set = open_stage(cfg, first, device)
    with Run(cfg, state, loader, test_set, stored) as run:
        while not loader.over:
            k = stage_at(stages, loader.epoch)
            if k != state.stage:                # this stage's epochs are over
                enter(state, cfg, k)
                here, loader, run.test_set = open_stage(cfg, k, device)
                loader.load_state_dict(run.loader.state_dict())
                run.loader = loader
            for optimiser in (state.opt_g, state.opt_d):        # both follow one schedule
                optimiser.param_groups[0]["lr"] = learning_rate(cfg, stages[k], loader.epoch)
            for batch in loader:                # what is left of this epoch
                run.done(train_step(state, make_pair(batch, here), here))
    folder = run.end()
    if state.encoder is not None and loader.rank == 0:
        keep_styles(here, state, folder / "checkpoint.pt")      # of all objects, by the trained E
    return folder


def open_stage(cfg: Config, k: int, device: torch.device) -> tuple:
    """A stage's config, its images, and those of the pictures."""
    stage, epochs = plan(cfg)[k], sum(stage.epochs for stage in plan(cfg))
    here = at_level(cfg, stage.level)
    loader = common.Loader(dataset(here, "train"), cfg.batch_size, cfg.workers, device, cfg.seed,
                           epochs, cfg.steps)
    if loader.rank == 0:
        tqdm.write(f"{stage.name}: {stage.epochs} of {epochs} epochs, at {here.size}, with "
                   f"{here.scales} discriminator(s)")
    return here, loader, dataset(here, "test")


# ------------------------------------------------------------------------------- 5 Sampling

@torch.no_grad()
def generate(state: State, s: Tensor, z: Tensor, cfg: Config) -> Tensor:
    """x_hat = G(s, z), any size: (B, c, H, W), (B, C, H, W) -> (B, 3, H, W). There is no noise.

    Sides are mirrored up to the next multiple that G can halve, and the result is cropped. One
    image at a time: instance norm makes it independent of its neighbours anyway.
    """
    G, (h, w) = state.generator, s.shape[-2:]
    padded = common.mirror_pad(torch.cat([s, z], 1), G.multiple, 2 * G.multiple)
    return common.as_trained(torch.cat([G(one[None]) for one in padded])[..., :h, :w],
                             cfg.understood)


@torch.no_grad()
def style_map(state: State, pair: dict, cfg: Config, k: int | None = None,
              vary: tuple[int, ...] = ()) -> Tensor:
    """z (1, C, H, W): draw k of the styles, or without k the photo's own, as in training. Without
    an encoder it has no channels; without k and a photo, zeros."""
    if state.encoder is None or k is None and "image" not in pair:
        return pair["input"].new_zeros(1, cfg.features, *pair["input"].shape[2:])
    if k is None:
        return style_of_photo(state.encoder, pair["image"], pair["region"], cfg)
    return draw_styles(state, pair, cfg, k, vary)


def test_pair(item: dict, state: State, cfg: Config) -> dict:
    """One item of a dataset as a batch of one where G is, made a pair."""
    return make_pair(common.batch_of_one(item, next(state.generator.parameters()).device), cfg)


def picture_of(pair: dict, cfg: Config) -> Tensor:
    """The input as a picture (B, 3, H, W) in [-1, 1]: class colours, object borders in black."""
    if not cfg.classes:
        return pair["input"]
    colours = colour_label(pair["label"], class_table(cfg.classes))
    return torch.where(pair["input"][:, -1:] > 0, -1.0, colours) if cfg.boundary else colours


def sample_grid(state: State, cfg: Config, test_set: common.Dataset, path: Path) -> Tensor:
    """Input | output | truth of six test examples, evenly spread, two a row. Returns the outputs.
    Styles are those of the photos, or zeros where there are none."""
    cfg, rows, n = at_level(cfg, state.generator.level), [], min(6, len(test_set))
    for i in range(n):
        pair = test_pair(test_set[i * len(test_set) // n], state, cfg)
        x_hat = generate(state, pair["input"], style_map(state, pair, cfg), cfg)
        truth = [pair["image"]] if "image" in pair else []
        rows.append(torch.cat([picture_of(pair, cfg), x_hat, *truth]).cpu())
    save_images(torch.cat(rows), path, nrow=2 * len(rows[0]))
    return torch.stack([row[1] for row in rows])


# Styles (Sec. 3.4): what E says about every training object, clustered per class.

def objects_in(label: Tensor, region: Tensor) -> list[tuple[int, int, float, Tensor]]:
    """label, region (H, W)  ->  (class, id, share, its pixels (H, W) bool) of each object, by id.

    An object's class is that of most of its pixels: ids need not follow Cityscapes' class * 1000.
    """
    objects = []
    for number in region.unique().tolist():
        mask = region == number
        votes = label[mask].bincount()
        objects.append((int(votes.argmax()), number, votes.sum().item() / mask.numel(), mask))
    return objects


def style_at(z: Tensor, mask: Tensor) -> Tensor:
    """The numbers (C,) of an object, read off z (C, H, W).

    All its pixels have the same, but with --released: there, blocks of 2 x 2 pixels reach over odd
    borders, and what most have counts.
    """
    return z[:, mask].median(1).values


@torch.no_grad()
def encode(cfg: Config, state: State) -> None:
    """Fill state.styles: E over the training photos, K-means per class (Sec. 3.4).

    Ten styles a class (Sec. 4). Released code: only objects larger than 1/64 of the image are
    clustered, since E has seen too little of a small one, and classes without one get unset memory.
    Here such a class is clustered all the same.
    """
    whole = replace(cfg, mirror=False, crop=(0, 0))
    photos = usable(dataset(whole, "train").require("image"), cfg)
    found, state.styles = {}, {}
    for i in tqdm(range(len(photos)), desc="encode", unit="image", disable=None):
        pair = test_pair(photos[i], state, cfg)
        z = style_map(state, pair, cfg)[0]
        for kind, _, share, mask in objects_in(pair["label"][0], pair["region"][0]):
            found.setdefault(kind, []).append((share, style_at(z, mask).cpu()))
    for kind, objects in sorted(found.items()):
        large = [value for share, value in objects if share > 1 / 64 or not cfg.released]
        values = large or [value for _, value in objects]
        state.styles[kind] = kmeans(torch.stack(values), 10, cfg.seed)
    print("styles of each class:", {kind: len(v) for kind, v in state.styles.items()})


def kmeans(points: Tensor, k: int, seed: int = 0) -> Tensor:
    """K-means: points (n, C) -> centres (min(k, distinct points), C).

    The start is that of k-means++: each new centre is a point drawn with probability proportional
    to its squared distance from the nearest centre so far. Released code: the best of ten starts.
    """
    generator, points = torch.Generator().manual_seed(seed), points.double().cpu()
    k = min(k, len(points.unique(dim=0)))

    def distances(centres: Tensor) -> Tensor:   # (n, K), squared; torch.cdist would round
        return (points[:, None] - centres).square().sum(2)

    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < k:
        chance = distances(centres).amin(1)
        new = torch.multinomial(chance / chance.max(), 1, generator=generator)
        centres = torch.cat([centres, points[new]])
    for _ in range(100):                        # long before the last, nothing moves any more
        owner = distances(centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, owner, points)
        sizes = owner.bincount(minlength=k)[:, None]
        centres = torch.where(sizes > 0, sums / sizes, centres)         # one without points stays
    return centres.float()


def keep_styles(cfg: Config, state: State, path: Path) -> None:
    """The mode encode: the styles, into the checkpoint that the encoder is of."""
    stored = common.load_file(path, f"train first, or name a checkpoint of {NAME}.py")
    if state.encoder is None or "script" not in stored:
        raise UserError(f"{path}: has no encoder; train with --features 3. The authors' files "
                        "have one but cannot hold styles; start a run from them with --init")
    encode(cfg, state)
    common.save_file(stored | {"styles": state.styles}, path)


def centres_of(state: State, cfg: Config, kind: int) -> Tensor:
    """The styles of a class (K, C); one of zeros if training never saw it.

    The checkpoint of an interrupted run has none yet, and the authors' files never have.
    """
    if cfg.features and not state.styles:
        notice("no styles in the checkpoint yet: encoding the training photos; encode keeps them")
        encode(cfg, state)
    if cfg.features and kind not in state.styles:
        notice(f"class {kind}: was never seen in training; its style is 0")
    return state.styles.get(kind, torch.zeros(1, cfg.features))


def draw_styles(state: State, pair: dict, cfg: Config, k: int, vary: tuple = ()) -> Tensor:
    """"We randomly pick one cluster center" per object (Sec. 3.4): a pair of one image -> z.

    A draw follows from the seed, the image's name, k and the object's id: so it is another in each
    image, and an object keeps its style when others change. With `vary`, only objects of these
    classes have a draw for each k; all others keep that of k = 0.
    """
    label, region = pair["label"][0], pair["region"][0]
    z = torch.zeros(1, cfg.features, *label.shape, device=label.device)
    for kind, number, _, mask in objects_in(label, region):
        centres = centres_of(state, cfg, kind)
        seed = draw_seed(cfg.seed, f"{pair['name']} {number}", k if not vary or kind in vary else 0)
        choice = torch.randint(len(centres), (1,), generator=torch.Generator().manual_seed(seed))
        z[0, :, mask] = centres[choice].T.to(z)
    return z


def scenes(cfg: Config, size: tuple[int, int] | None) -> common.Dataset:
    """What to make images of: --input, at its own sizes or at `size`, or the test split."""
    if not cfg.input:
        return usable(dataset(cfg, "test"), cfg)
    instances = cfg.instances or ("" if needs_instances(cfg) else None)
    files = common.input_files(cfg.input, "label" if cfg.classes else "A", instances)
    items = common.Dataset(files=files, classes=cfg.classes, size=size, understood=cfg.understood)
    common.notice_scale(items, cfg.understood, cfg.size)
    return items


def sample(cfg: Config, state: State, size: tuple[int, int] | None = None) -> Path:
    """Outputs for --input, a file or a folder of any sizes, or for the test split.

    An output has the size of its input; `size` resizes the inputs first. Several samples differ by
    the styles drawn for each object: of all, or of those whose class is named in --vary.
    """
    if state.encoder is None and (cfg.samples > 1 or cfg.vary):
        raise UserError("no encoder: a label map has one image; train with --features 3 for more")
    items, target = scenes(cfg, size), Path(cfg.output or Path(cfg.out, "test"))
    vary = tuple(class_id(name, class_table(cfg.classes)) for name in cfg.vary)
    for item, paths in common.outputs(items, cfg.input, target, cfg.samples):
        pair = test_pair(item, state, cfg)
        for k, path in enumerate(paths):
            z = style_map(state, pair, cfg, k, vary)
            save_images(generate(state, pair["input"], z, cfg), path)
    return target


class Editor:
    """Instance-level editing of one scene (Sec. 4.3, Figs. 1 and 11).

    label and instance (H, W) int64 and the style map z (C, H, W) stay in step; boundaries are
    computed from the instances, and `render` shows the scene. Every change goes through `put`,
    which remembers the scene as it was, for `undo`.

        editor = Editor(state, cfg, item)
        editor.set_style(10001, 3).set_class(9002, "vegetation").undo()
        image = editor.render()                              # (3, H, W) in [-1, 1]
    """

    def __init__(self, state: State, cfg: Config, item: dict):
        self.state, self.cfg, self.history = state, cfg, []
        self.table, pair = class_table(cfg.classes), test_pair(item, state, cfg)
        self.label, self.instance = pair["label"][0], pair.get("instance", pair["label"])[0]
        self.z = style_map(state, pair, cfg, None if "image" in pair else 0)[0]
        for _, number, _, value in self.objects():
            self.z[:, self.instance == number] = value[:, None]

    def objects(self) -> list[tuple[int, int, float, Tensor]]:
        """(class, id, share of the image, style) of every object, the largest first."""
        found = [(*rest, style_at(self.z, mask))
                 for *rest, mask in objects_in(self.label, self.instance)]
        return sorted(found, key=lambda each: -each[2])

    def find(self, number: int) -> tuple[Tensor, int]:
        """The pixels (H, W) of an object, and the class of most of them."""
        mask = self.instance == number
        if not mask.any():
            raise UserError(f"object {number}: not in this scene, which has "
                            f"{self.instance.unique().tolist()}")
        return mask, int(self.label[mask].bincount().argmax())

    def put(self, mask: Tensor, kind, number, value: Tensor) -> "Editor":
        """Class, id and style (C,) of some pixels; or one for each of them, the style (C, pixels).
        """
        self.history.append((self.label, self.instance, self.z))
        self.label, self.instance, self.z = (part.clone() for part in self.history[-1])
        self.label[mask], self.instance[mask] = kind, number
        self.z[:, mask] = (value if value.ndim == 2 else value[:, None]).to(self.z)
        return self

    def new_id(self, kind: int) -> int:
        """For a new object: class * 1000 + k, with a k that is free."""
        return next(n for n in itertools.count(1000 * kind) if not (self.instance == n).any())

    def set_class(self, number: int, name: str | int) -> "Editor":
        """Make an object one of another class, of its first style: a tree a building."""
        mask, kind = self.find(number)[0], class_id(name, self.table)
        first = centres_of(self.state, self.cfg, kind)[0]
        return self.put(mask, kind, self.new_id(kind), first)

    def set_style(self, number: int, style: int) -> "Editor":
        """Give an object the style-th of the K modes of its class."""
        mask, kind = self.find(number)
        centres = centres_of(self.state, self.cfg, kind)
        if not 0 <= style < len(centres):
            raise UserError(f"--style {number}={style}: {self.name(kind)} has {len(centres)} "
                            "style(s), from 0 on; without --features 3 there is one")
        return self.put(mask, self.label[mask], number, centres[style])

    def remove(self, number: int) -> "Editor":
        """Take an object out; the stuff that borders on it grows into the hole."""
        hole, _ = self.find(number)
        kinds = [k for k in self.label.unique().tolist() if self.name(k) in self.table.things]
        things = torch.isin(self.label, self.label.new_tensor(kinds))
        # From which pixel each one takes all it has; counted from 1, and 0 is not known yet.
        count = 1 + torch.arange(hole.numel(), device=hole.device).view(1, *hole.shape).double()
        source = count * ~(hole | things)
        if not source.any():
            raise UserError(f"object {number}: there is no stuff that could grow into its place")
        while not source[0, hole].all():        # a pixel a turn, from all sides
            source = torch.where(source > 0, source, F.max_pool2d(source, 3, 1, 1))
        taken = source[0, hole].long() - 1
        return self.put(hole, self.label.flatten()[taken], self.instance.flatten()[taken],
                        self.z.flatten(1)[:, taken])

    def paste(self, number: int, down: int, right: int) -> "Editor":
        """Add a copy of an object, so many pixels away; what falls outside the image is cut."""
        (mask, kind), (h, w) = self.find(number), self.label.shape
        target = torch.zeros_like(mask)
        if abs(down) < h and abs(right) < w:
            target = F.pad(mask, (right, -right, down, -down))
        if not target.any():
            raise UserError(f"--paste {number}@{down},{right}: lies outside the image")
        return self.put(target, kind, self.new_id(kind), style_at(self.z, mask))

    def undo(self) -> "Editor":
        """The scene before the last change."""
        if not self.history:
            raise UserError("--undo: nothing was changed yet")
        self.label, self.instance, self.z = self.history.pop()
        return self

    def name(self, kind: int) -> str:
        return (*self.table.names, "unknown")[kind]

    def pair(self) -> dict:
        """The scene as a batch of one, ready for G."""
        return make_pair({"label": self.label[None], "instance": self.instance[None]}, self.cfg)

    def render(self) -> Tensor:
        """The image (3, H, W) in [-1, 1] of the scene as it is now."""
        return generate(self.state, self.pair()["input"], self.z[None], self.cfg)[0].cpu()

    def picture(self) -> Tensor:
        """The label map (3, H, W) in [-1, 1], with the borders of objects in black."""
        return picture_of(self.pair(), self.cfg)[0].cpu()


def edit(cfg: Config, state: State, size: tuple[int, int] | None = None) -> Path:
    """The mode edit: the changes in their order, a picture of before and after, the objects."""
    items = scenes(cfg, size).require("label")
    item = items.find_example(cfg.item)
    path = Path(cfg.output or Path(cfg.out, "edits", item["name"] + ".png"))
    common.writable("--output", path, items.reads)
    editor = Editor(state, cfg, item)
    before = [editor.picture(), editor.render()]
    for text in cfg.edits:                      # as "style 10001=3"
        name, _, value = text.partition(" ")
        method, form, pattern = EDITS[name]
        parts = re.fullmatch(pattern, value)
        if parts is None:
            raise UserError(f"--{name} {value}: expected {form}")
        getattr(editor, method)(*(int(part) if part.lstrip("-").isdigit() else part
                                  for part in parts.groups()))
    print(f"{item['name']}\n{'object':>10}  {'class':16}{'share':>8}  styles")
    for kind, number, share, _ in editor.objects():
        styles = len(state.styles.get(kind, ()))
        print(f"{number:>10}  {editor.name(kind):16}{100 * share:7.2f}%  {styles}")
    save_images(torch.stack([*before, editor.picture(), editor.render()]), path, nrow=2)
    print(f"before, and below it after: {path}")
    return path


# ----------------------------------------------------------------------------- 6 Evaluation

# The paper's numbers, all on Cityscapes by PSPNet: pixel accuracy in percent, mean IoU. Its users
# (Sec. 4.2), of whom nothing is measured here: 68.55 % prefer the full loss to GAN alone, and 58.90
# % to GAN+FM.
TABLE_1 = {"pix2pix": (78.34, .3948), "CRN": (70.55, .3483), "ours": (83.78, .6389),
           "oracle": (84.29, .6857)}
SLIDES = {"U-Net": (77.86, .3905), "CRN": (78.96, .3994), "one D": (82.87, .5775)}


@torch.no_grad()
def evaluate(cfg: Config, state: State) -> dict:
    """The paper's metrics on the test split, beside its tables; writes metrics.json.

    Table 1: a network trained on real photos labels the generated ones; its score on the real test
    photos, the oracle, says how well that can be done at all. Styles are drawn, not encoded.
    """
    test_set = usable(dataset(cfg, "test"), cfg).require("image").require("label").require_scored()
    device, out = next(state.generator.parameters()).device, Path(cfg.out)
    photos, table = dataset(replace(cfg, limit=0, crop=(0, 0)), "train"), class_table(cfg.classes)
    scorer = common.fcn_scorer(photos, out.parent, device, cfg.vgg)
    confusion = {"output": 0, "truth": 0}
    for i in tqdm(range(len(test_set)), desc="evaluate", unit="image", disable=None):
        pair = test_pair(test_set[i], state, cfg)
        x_hat = generate(state, pair["input"], style_map(state, pair, cfg, 0), cfg)
        for row, image in (("output", x_hat), ("truth", pair["image"])):
            labels = scorer(image).argmax(1)
            confusion[row] += common.confusion_matrix(labels, pair["label"], table).cpu()
    metrics = {row: common.segmentation_scores(counts) for row, counts in confusion.items()}
    metrics["images"] = len(test_set)
    report(metrics)
    common.save_scores(metrics, out / "metrics.json")
    return metrics


def report(metrics: dict) -> None:
    """The metrics as text beside the paper's. Its data and scorer are others: compare orderings."""
    scores = {name: (100 * metrics[row]["per-pixel acc"], metrics[row]["class IOU"])
              for name, row in (("this run", "output"), ("its real photos", "truth"))}
    scores |= {f"paper, Table 1, {name}": value for name, value in TABLE_1.items()}
    scores |= {f"paper, slides, {name}": value for name, value in SLIDES.items()}
    print(f"{metrics['images']} images {'pixel acc':>27}{'mean IoU':>10}")
    for name, (accuracy, iou) in scores.items():
        print(f"  {name:28}{accuracy:10.2f}{iou:10.4f}")


# -------------------------------------------------------------------------------- 7 The run
# Device, checkpoint, log, stop: what any training needs. Nothing of it is the paper's, and all of
# it is word for word the same in the four scripts.

def pick_device(cfg: Config) -> torch.device:
    """The device of this process. Under torchrun it also joins the other processes, and each has a
    GPU of its own, whichever --gpu names."""
    n, torchrun = torch.cuda.device_count(), dist.is_torchelastic_launched()
    gpu = min(n, 1) - 1 if cfg.gpu is None else cfg.gpu          # the first, or none: -1
    if torchrun and gpu >= 0:
        gpu = int(os.environ["LOCAL_RANK"])
    if gpu >= n:
        raise UserError(f"--gpu {gpu}: this machine has {n} GPU(s), from 0 on; --gpu -1 is the CPU")
    if gpu >= 0:
        torch.cuda.set_device(gpu)
        torch.backends.cudnn.benchmark = True   # sizes stay the same: search the fastest once
    if torchrun and not dist.is_initialized():
        dist.init_process_group("nccl" if gpu >= 0 else "gloo")
        atexit.register(dist.destroy_process_group)
    return torch.device("cuda", gpu) if gpu >= 0 else torch.device("cpu")


def prepare(net: nn.Module, cfg: Config, device: torch.device) -> nn.Module:
    """A network on its device, with memory order, precision and compilation as asked for."""
    last = device.type == "cuda" if cfg.channels_last is None else cfg.channels_last
    net.to(device, memory_format=torch.channels_last if last else torch.contiguous_format)
    if dist.is_initialized() and device.type == "cuda":   # on the CPU each has its own statistics
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if cfg.precision == "bf16":                 # losses and optimisers stay in float32
        forward = torch.autocast(device.type, torch.bfloat16)(net.forward)
        net.forward = lambda *x: tree_map(lambda y: y.float(), forward(*x))
    if cfg.compile:
        net.compile()                           # in place: names in the checkpoint stay as they are
    return net


def average_gradients(optimiser: torch.optim.Optimizer, *_) -> None:
    """Before each update: the mean over all processes. All began with the same weights."""
    if dist.is_initialized():
        for parameter in itertools.chain(*(group["params"] for group in optimiser.param_groups)):
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad.div_(dist.get_world_size()))


def read_weights(*paths: str | Path) -> dict:
    """The content of checkpoints; of the authors' files, their weights under our names."""
    content = {}
    for path in map(Path, paths):
        stored = common.load_file(path, f"train first, or name a checkpoint of {NAME}.py")
        if "script" not in stored:
            stored = {str(key).removeprefix("module."): value for key, value in stored.items()}
            stored = rename_released(stored, path)
        elif stored["script"] != NAME:
            raise UserError(f"{path}: a checkpoint of {stored['script']}.py, not of {NAME}.py")
        content = stored | content
    return content


def load(state: State, stored: dict, path: str | Path, everything: bool = False) -> None:
    """The networks, or (--resume) everything, go from what was read into state."""
    names = [name for name, value in vars(state).items() if everything or (
        name in NETWORKS and value is not None and stored.get(name) is not None)]
    if NETWORKS[0] not in names:
        raise UserError(f"{path}: holds {', '.join(stored)}, but no {NETWORKS[0]} for this run")
    for name in names:
        value = getattr(state, name)
        try:
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(stored[name])
            else:                               # a tensor, a number, or None
                setattr(state, name, stored[name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: its {name} has another size, other classes, or is of another "
                            f"version ({' '.join(str(error).split()):.160})")
        if isinstance(value, torch.optim.Optimizer):    # --channels-last may differ, and the fused
            for parameter, moments in value.state.items():    # update pairs values as they lie
                for key in ("exp_avg", "exp_avg_sq"):
                    moments[key] = torch.empty_like(parameter).copy_(moments[key])


class Run:
    """A run's folder while it trains: checkpoint, log, pictures; and how it is stopped.

    Whatever ends a run, its checkpoint is whole, and --resume repeats exactly what came after it.
    Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 end the step and save first; a second one ends at once.
    """

    def __init__(self, cfg: Config, state: State, loader: common.Loader, test_set: common.Dataset,
                 stored: dict | None = None):
        self.state, self.loader, self.test_set = state, loader, test_set
        self.log, self.pending, self.unsaved = [], [], None     # unsaved: a step that is complete
        self.asked, self.before = 0, {}         # by which signal to stop; who heard it before us
        if stored:                              # --resume
            load(state, stored, cfg.out, everything=True)
            loader.load_state_dict(stored["place"])
            self.log = stored["log"]
        if not cfg.out or not Path(cfg.out, "checkpoint.pt").exists():
            common.writable("--out", Path(cfg.out or f"runs/{NAME}"),
                            loader.examples.reads | test_set.reads, ("samples",))
        elif not stored:
            raise UserError(f"--out {cfg.out}: holds a run already; --resume continues it")
        if loader.step >= loader.total:
            raise UserError(f"the run ended at step {loader.step}; raise --epochs or --steps")
        if loader.rank == 0:                    # nothing is left to refuse: there may be a folder
            common.describe(loader.examples, test_set)
            cfg = replace(cfg, out=run_folder(cfg.out, NAME))
            print(f"{loader.device}: {loader.total} steps of {loader.per_step} image(s), "
                  f"{loader.per_epoch} an epoch; in {cfg.out}")
        self.cfg, self.clock, self.cost = cfg, time.perf_counter(), 0.0    # of the last save
        self.bar = tqdm(total=loader.total, initial=loader.step, unit="step",
                        disable=None if loader.rank == 0 else True)

    def __enter__(self) -> "Run":
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):         # the last: SLURM's
            number = getattr(signal, name, None)                        # not all on Windows
            if number and signal.getsignal(number) != signal.SIG_IGN:   # as nohup sets it
                self.before[number] = signal.signal(number, self.stop)
        return self

    def __exit__(self, kind: type, error: BaseException, trace) -> None:
        """An error between two steps, as a file that cannot be read, costs none of them."""
        if error and self.unsaved == self.loader.step:
            self.save()
        self.bar.close()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self, number: int, frame) -> None:
        self.asked = number
        signal.signal(number, self.before[number])

    def stopped(self) -> bool:
        """Whether any process was told to stop: all must leave at the same step."""
        now = self.loader.world == 1 or self.loader.step % 10 == 0
        if self.loader.world > 1 and now:       # asking makes everyone wait
            told = torch.tensor(self.asked, device=self.loader.device)
            dist.all_reduce(told, dist.ReduceOp.MAX)
            self.asked = int(told)
        return now and self.asked > 0

    def done(self, losses: dict[str, Tensor]) -> None:
        """After each step. Every 20 a row of the log: losses, the mean since the last; images per
        second; share of waiting for data. Every epoch, or half an hour, a checkpoint and pictures,
        if that costs less than a tenth of the time."""
        loader = self.loader
        loader.over |= self.stopped()
        if loader.rank > 0:
            return
        self.bar.update()
        self.pending.append(torch.stack(list(losses.values())))     # on the device still
        since = time.perf_counter() - self.clock
        due = loader.step % loader.per_epoch == 0 or since > 1800
        saving = loader.over or due and since > 9 * self.cost
        if saving or loader.step % 20 == 0:
            mean = dict(zip(losses, torch.stack(self.pending).mean(0).tolist()))
            if not np.isfinite(list(mean.values())).all():
                raise UserError(f"step {loader.step}: {mean}: stopped; the last good checkpoint is "
                                "kept. Try a smaller --lr anew, not with --resume")
            self.log.append({"step": loader.step, "epoch": loader.epoch} | loader.speed()
                            | {name: f"{value:.5g}" for name, value in mean.items()})
            self.pending = []
            self.bar.set_postfix(self.log[-1])
        if saving:
            self.save()
        self.unsaved = None if saving else loader.step

    def save(self) -> None:
        """Pictures, which never end a run. Then the checkpoint: everything that --resume needs, as
        tensors and numbers; a run that died in finite numbers keeps the last one before."""
        out, begun, row = Path(self.cfg.out), time.perf_counter(), (self.log or [{}])[-1]
        of_d = [float(value) for name, value in row.items() if name.startswith("d_")]
        dead = len(of_d) > 0 and sum(of_d) < 1e-6                # D is always right
        if not self.asked:                      # who wants to stop does not wait for pictures
            try:
                images = sample_grid(self.state, self.cfg, self.test_set,
                                     out / "samples" / f"{self.loader.step:07d}.png")
                equal = len(images) > 1 and images.diff(dim=0).abs().max() < 0.01
                dead = bool(dead or equal or images.abs().mean() > 0.98)
            except (UserError, OSError, RuntimeError) as error:
                notice(f"no pictures at step {self.loader.step}: {error}")
        last, alive = out / "checkpoint.pt", out / "alive.pt"
        if dead and last.exists() and not alive.exists():
            common.save_file(common.load_file(last, "a new run"), alive)
            self.bar.write(f"step {self.loader.step} looks dead: D's loss 0, or outputs equal or "
                           f"saturated. {alive} is the last before; try a smaller --lr anew")
        common.save_file({name: value.state_dict() if hasattr(value, "state_dict") else value
                          for name, value in vars(self.state).items()} | {
            "script": NAME, "config": asdict(self.cfg), "log": self.log,
            "place": self.loader.state_dict()}, last)
        (out / "config.json").write_text(json.dumps(asdict(self.cfg), indent=2, allow_nan=False))
        if row:
            plot_log(self.log, out)
            self.bar.write("  ".join(f"{name} {value}" for name, value in row.items()))
        if self.asked:
            self.bar.write(f"stopped at step {self.loader.step} and saved; to go on: "
                           f"python {NAME}.py --resume --out {out}")
        self.loader.speed()                     # saving and drawing are not training
        self.clock, self.cost = time.perf_counter(), time.perf_counter() - begun

    def end(self) -> Path:
        """After the last step."""
        if self.asked:
            sys.exit(128 + self.asked)
        return Path(self.cfg.out)


def plot_log(log: list[dict], out: Path) -> None:
    """log.csv, and losses.png, whose curves are means over ten of its rows."""
    lines = [log[0], *(row.values() for row in log)]
    (out / "log.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    figure, n = matplotlib.figure.Figure(figsize=(8, 4.5)), min(10, len(log))
    axes = figure.subplots()
    for name in list(log[0])[4:]:                # after step, epoch and the loader's speed
        mean = np.convolve([float(row[name]) for row in log], np.ones(n) / n, "valid")
        axes.plot([row["step"] for row in log[n - 1:]], mean, ".-", label=name)
    axes.set(xlabel="step", ylabel="loss (mean over ten rows of log.csv)", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(out / "losses.png", dpi=120)


def run_folder(out: str, kind: str, reads: set[Path] = frozenset()) -> str:
    """--out, or else the next free runs/<kind>-N; made, but not in a folder that is read, nor where
    files of others have the names of ours; a run's own folder has none."""
    numbered = (Path("runs", f"{kind}-{n}") for n in itertools.count(1))
    path = Path(out) if out else next(path for path in numbered if not path.exists())
    names = () if (path / "checkpoint.pt").exists() else ("metrics.json", "histograms.png")
    for each in (path, *map(path.joinpath, names)):
        common.writable("--out", each, reads)
    path.mkdir(parents=True, exist_ok=bool(out))
    if not os.access(path, os.W_OK):
        raise UserError(f"--out {path}: may not be written; name another --out")
    return str(path)


# ------------------------------------------------- 8 Command line and the authors' files

def for_testing(cfg: Config) -> Config:
    """The config with which a network is built to be tested: no perceptual loss, hence no VGG."""
    return replace(cfg, compile=False, loss="GAN")


def run_mode(mode: str, cfg: Config, state: State, given: dict) -> None:
    """What is done with a trained network; a run of several stages may be at an early one."""
    enter(state, cfg, state.stage)
    cfg = at_level(cfg, state.generator.level)
    if "size" in given:
        cfg = replace(cfg, size=given["size"])
    if mode == "evaluate":
        evaluate(cfg, state)
    elif mode == "encode":
        keep_styles(cfg, state, Path(*(cfg.checkpoint[:1] or (cfg.out, "checkpoint.pt"))))
    else:
        {"sample": sample, "edit": edit}[mode](cfg, state, given.get("size"))


def trace(cfg: Config) -> None:
    """Layers, shapes and parameters in one training step of the last stage; FLOPs and time."""
    device = pick_device(cfg)
    cfg, _, _ = open_data(replace(cfg, compile=False))
    state = build(cfg, device)
    here, loader, _ = open_stage(cfg, state.stage, device)
    pair = make_pair(next(iter(loader)), here)
    common.trace_step({name: getattr(state, name) for name in NETWORKS[:3]},
                      lambda: train_step(state, pair, here))


def rename_released(stored: dict, path: Path) -> dict:
    """The authors' files (a plain state dict of G or of E) under our names.

    G1 is "model", enhancer n is "model<n>_1" (front-end) and "model<n>_2" (the rest); numbers count
    layers, also those without weights. Inside each list the order is ours, so the convolutions are
    matched in order. Files from before PyTorch 0.4 hold statistics, too, that were never used.
    """
    # "model.16.conv_block.1" before "model.25", "model" before "model1_1": numbers as numbers.
    theirs = sorted((key.removesuffix(".weight") for key in stored if key.endswith(".weight")),
                    key=lambda key: [part.zfill(4) for part in key.split(".")])
    parts = {key.partition(".")[0] for key in theirs}                   # model, model1_1, model1_2
    if "model" not in parts:
        raise UserError(f"{path}: no checkpoint of {NAME}.py and no released G or E; its first key "
                        f"is {next(iter(stored), 'missing')}")
    # n enhancers; each block has two convolutions, and so has each halving, down and up again.
    n, globe = len(parts) // 2, [key for key in theirs if key.startswith("model.")]
    blocks = sum("conv_block" in key for key in globe) // 2
    inner = sum("model1_2." in key and "conv_block" in key for key in theirs) // 2
    if blocks:
        downs = (len(globe) - 2 * blocks - (1 if n else 2)) // 2
        name, net = "generator", Generator(3, 3, 2 ** n, downs, blocks, n, inner)
    else:
        name, net = "encoder", Encoder(3, 1, len(theirs) // 2 - 1)
    # Ours, from the input to the output: the same order. Only convolutions hold weights.
    ours = [key for key, module in net.named_modules()
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))]
    return {name: {f"{own}.{tensor}": stored[f"{key}.{tensor}"] for key, own in zip(theirs, ours)
                   for tensor in ("weight", "bias") if f"{key}.{tensor}" in stored}}


def released_config(stored: dict, given: dict) -> dict:
    """The settings that the authors' networks have, read off the shapes of their weights."""
    # The width of the first layer tells G's, the number of layers the rest, and what the first
    # layer reads besides the classes tells whether there are boundaries.
    weights, encoder = stored.get("generator"), stored.get("encoder")
    if weights is None:
        raise UserError("no generator among these files; to test, give its file, too")

    def count(start: str, end: str) -> int:
        return sum(key.startswith(start) and key.endswith(end) for key in weights)

    # "features" channels come from E, if its file is there; the rest are classes and a boundary.
    features = 0 if encoder is None else len(encoder["output.0.bias"])
    width, c = weights["globe.front.0.weight"].shape[:2]
    classes = given.get("classes", "cityscapes")
    rest = c - features - class_table(classes).channels
    if rest not in (0, 1) and c - features != 3:
        raise UserError(f"takes {c} channels, the {classes} labels have {c - features - rest}; a "
                        "boundary adds 1, an encoder (give its file, too) adds its features; "
                        "--classes says otherwise")
    return dict(
        width=width, enhancers=count("enhancers.", ".front.0.weight"), features=features,
        classes=classes if rest in (0, 1) else "", boundary=rest == 1,
        pool="instance" if rest == 1 else "label",
        layers=(count("globe.back", "weight"), count("globe.residual", "branch.0.weight"),
                count("enhancers.0.residual", "branch.0.weight") or 3))


# From here on to the end it is word for word the same in the four scripts again.

def stored_config(stored: dict, path: str, given: dict, testing: bool) -> Config:
    """A checkpoint's config with the given flags; those not free must not contradict it."""
    ours, free = "script" in stored, ("call", "resume", "test") if testing else ("call", "resume")
    if not ours and not given.keys() & {"data", "input"}:
        raise UserError(f"{path}: released weights know no dataset; say --input or --data")
    config = stored["config"] if ours else released_config(stored, given)
    kinds = {f.name: f.metadata["free"] for f in common.flags(Config)}
    for name, value in given.items():
        if ours and kinds[name] not in free and value != config.get(name, value):
            raise UserError(f"{flag(name)} {value} contradicts {path}, which was trained with "
                            f"{config[name]}; leave the flag out")
    kept = {name: value for name, value in config.items() if kinds.get(name) != "call"}
    try:
        cfg = Config(**kept | given)
    except TypeError as error:
        raise UserError(f"{path}: of another version ({error}); --init starts a run from it")
    if ours and cfg.classes and given.keys() & {"data", "classes"} == {"data"}:
        common.same_classes(dataset(cfg, "test"), cfg.classes)
    return cfg


def main(arguments: list[str] | None = None) -> None:
    """The command line: arguments -> config -> mode. Raises UserError for a user's mistake."""
    mode, given = common.parse(arguments, Config, NAME, MODES, __doc__)
    testing, stored = mode not in ("train", "check", "trace"), None
    if testing or given.get("resume"):
        newest = max(Path("runs").glob(f"{NAME}-*/checkpoint.pt"), key=os.path.getmtime,
                     default=Path("runs", f"{NAME}-1", "checkpoint.pt"))
        paths = given.get("checkpoint", (Path(given.get("out", newest.parent), newest.name),))
        stored, path = read_weights(*paths), " ".join(map(str, paths))
        if not given.keys() & {"out", "checkpoint"}:
            notice(f"the newest run with a checkpoint is {newest.parent}")
        given = common.at_home(given, Path(paths[0]))
        cfg = stored_config(stored, path, given, testing)
    elif "checkpoint" in given:
        raise UserError("--checkpoint goes with --resume here; --init starts a run from weights")
    else:
        cfg = configure(given.get("preset", "" if given.get("data") else "toy"), given)
    if testing:
        if not cfg.output:                      # of weights that lie in no run's folder: a new one
            cfg = replace(cfg, out=run_folder(cfg.out, NAME, common.reads_of(cfg.understood)))
        cfg = for_testing(cfg)
        state = build(cfg, pick_device(cfg))
        load(state, stored, path)
        run_mode(mode, cfg, state, given)
    elif mode == "train":
        train(cfg, stored)
    elif mode == "check":
        common.check_data([dataset(cfg, split) for split in ("train", "test")],
                          Path(run_folder(cfg.out, "check")))
    else:
        trace(cfg)


if __name__ == "__main__":
    common.shell(main, NAME)
