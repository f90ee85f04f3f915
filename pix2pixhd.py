"""pix2pixHD: large images from label maps, and every object in them open to editing.

T.-C. Wang, M.-Y. Liu, J.-Y. Zhu, A. Tao, J. Kautz, B. Catanzaro. High-Resolution Image Synthesis
and Semantic Manipulation with Conditional GANs. CVPR 2018. Section, equation and table numbers are
those of the CVPR version; "arXiv" is its longer version, 1711.11585.

Idea. pix2pix stops at 256 pixels: above, training is unstable and D sees too little. So G grows
from coarse to fine (a global network, then enhancers around it), three discriminators look at the
image at three sizes, and G must also match what they feel inside, which steadies the training
without any pixel loss. Two inputs are added to the label map: the borders between objects, and a
few numbers per object that an encoder reads off the real photo. Chosen freely at test time, they
give each car its own colour.

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

Paper                             | Released code                     | Here
    three discriminators          | two at 512 x 1024, three above    | 3, and 2 for G1 inside G2
    feature matching is summed    | averaged over the scales          | summed; --fm-mean
      over the scales             |                                   |
    "multiple layers" of D        | the four before the prediction    | these four
    Eq. (1) with logs, trained as | least squares; its log form drops | least squares; --gan log,
      least squares               |   the sigmoid                     |   from logits
    VGG layers not named          | relu1_1 .. relu5_1, weights 1/32, | as released
                                  |   1/16, 1/8, 1/4, 1               |
    VGG's input not stated        | [-1, 1], not normalised           | as released; --vgg-normalise
    D's loss: a sum               | half the sum                      | half
    order of updates not stated   | both gradients, then G, then D    | as released
    G1, then G2, then both        | enhancer alone, then all anew     | as released, in one command
    E and G trained jointly       | at full size E's maps are stored  | jointly; --stored-features
                                  |   as 8 bits and E rests           |
    all objects are clustered     | those larger than 1/64 image      | as released; --min-area
    a centre is picked            | classes without one: unset memory | their mean, with a notice
    boundary by 4-neighbours      | the same                          | the same, both sides marked
    labels at a smaller scale     | one-hot maps averaged             | as released
    normalisation not stated      | instance norm without parameters  | as released
    biases not stated             | PyTorch's default                 | PyTorch's default
    transposed convolutions' dots | the same                          | the same; --smooth, ours, in
      fade slowly                 |                                   |   toy, averages them away
    unknown pixels not mentioned  | an ordinary class, in every loss  | as released

There is no pixel loss and no noise: an output that differs from the photo is not an error here.

Run         python pix2pixhd.py                               built-in streets, minutes on a laptop
            python pix2pixhd.py --data ./cityscapes --gpu 0   2048 x 1024, coarse to fine
            python pix2pixhd.py edit --style 10001=3          the first car in another colour
"""

import argparse
import json
import math
import os
import pickle
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import matplotlib
import matplotlib.figure
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DistributedSampler, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import common
from common import UserError, class_table, colour_label, notice

# --------------------------------------------------------------------------------- 1 Config

@dataclass
class Config:
    """The defaults are the paper's; the comment says where it states them."""
    # The task
    data: str = ""                   # folder; "" is the built-in streets
    task: str = "labels2photo"       # or pairs: an RGB input, such as edges             Fig. 2
    direction: str = "AtoB"          # of pairs: which half is the input
    classes: str = ""                # a table of common.py, or a number; "" asks the data
    boundary: bool = True            # instance boundaries beside the labels             Sec. 3.3
    size: tuple[int, int] = (1024, 2048)     # height, width of the images, pixels       Sec. 3.2
    crop: tuple[int, int] = (0, 0)   # train the enhancers on windows of this size; 0: whole images
    mirror: bool = True              # flip left and right, half the time; released code
    limit: int = 0                   # use the first so many examples; 0 is all
    # The networks
    generator: str = "coarse-to-fine"        # or unet, crn: the slides' comparison
    enhancers: int = 1               # 0: G1 alone; 1: G1, G2; 2: and G3, for 4096 x 2048 Sec. 3.2
    width: int = 64                  # channels after G1's first layer; halved per enhancer  arXiv
    downs: int = 4                   # halvings in G1                                    arXiv
    blocks: int = 9                  # residual blocks in G1                             arXiv
    enhancer_blocks: int = 3         # residual blocks in each enhancer                  arXiv
    smooth: bool = False             # ours: average away a transposed convolution's dots
    scales: int = 3                  # discriminators, each at half the size of the last Sec. 3.2
    d_width: int = 64                # channels after D's first layer                    arXiv
    features: int = 0                # numbers per object from the encoder; 3 in Sec. 4; 0: no E
    e_width: int = 16                # channels after E's first layer; released code
    pool: str = "instance"           # average E's map over instances, or over labels    Fig. 11
    # The objective
    loss: str = "GAN+FM+VGG"         # or GAN+FM ("w/o VGG"), GAN                        Sec. 4.2
    gan: str = "lsgan"               # or log, Eq. (1) as written                        Sec. 4
    lambda_fm: float = 10.0          # lambda in Eq. (4)                                 Sec. 4
    lambda_vgg: float = 10.0         # of the perceptual loss                            Sec. 4
    fm_mean: bool = False            # released code: mean over the scales, not their sum
    vgg: str = "imagenet"            # VGG-19's weights, and the scorer's: imagenet, random, a file
    vgg_normalise: bool = False      # ImageNet's mean and deviation; the released code has neither
    # Training
    stage: str = "all"               # coarse to fine; or global, enhancer, joint alone  Sec. 3.2
    epochs: int = 200                # of G1, the rate falling in the second half        arXiv
    fine_epochs: int = 100           # of each enhancer, alone and joint, likewise; released code
    enhancer_epochs: int = 10        # of these, with all the rest frozen; released code
    steps: int = 0                   # end after so many updates; 0 leaves it to epochs
    batch_size: int = 1              # per process; released code
    lr: float = 2e-4                 # Adam's, all networks                              arXiv
    betas: tuple[float, float] = (0.5, 0.999)                        # Adam's; released code
    seed: int = 0                    # of initialisation, order, flips and styles
    init: tuple[str, ...] = ()       # start from these weights: ours, or released ones
    save_every: int = 0              # steps between checkpoints and grids; 0 is each epoch
    # Styles
    stored_features: bool = False    # released code: with enhancers E rests, its map at half size
    clusters: int = 10               # K of K-means, per class                           Sec. 4
    min_area: float = 1 / 64         # share of the image, to be clustered; released code
    # Evaluation
    scorer_width: int = 64           # 64 is VGG-16; less, with vgg random, for small studies
    scorer_steps: int = 2000         # ours: batches of four photos that the scorer trains on
    # The machine
    gpu: int | None = None           # CUDA device; -1 the CPU; None the first GPU, else the CPU
    workers: int | None = None       # data processes; None is 4 with a GPU, else 0
    precision: str = "fp32"          # or bf16: autocast around the networks
    compile: bool = False            # torch.compile the networks
    channels_last: bool | None = None    # memory order; None is on with a GPU, off on the CPU
    out: str = ""                    # the run's folder; "" is the next free runs/pix2pixhd-N


# The released training scripts, line by line. There, G1 at 512p and G1+G2 at 1024p are separate
# runs; here "1024p" trains both, one after the other.
PRESETS = {
    "512p": dict(size=(512, 1024), enhancers=0),
    "512p-features": dict(size=(512, 1024), enhancers=0, features=3),
    "1024p": dict(),                                                              # 24 GB of memory
    "1024p-12GB": dict(crop=(1024, 1024), fine_epochs=200, enhancer_epochs=20),
    "1024p-features": dict(features=3, stored_features=True),
    "1024p-features-12GB": dict(features=3, stored_features=True, crop=(896, 896),
                                fine_epochs=200, enhancer_epochs=20),
    "labels-only": dict(boundary=False),                                          # Table 2
    "edges2photo": dict(task="pairs", boundary=False),                            # Fig. 2
    "helen": dict(size=(1024, 1024), features=3, pool="label", boundary=False),   # Fig. 11
    # Ours. "small" is the study of the fact sheet's size: 2 million parameters.
    "small": dict(size=(128, 256), enhancers=0, width=16, downs=3, blocks=6, d_width=16, e_width=8,
                  features=3, loss="GAN+FM", vgg="random", scorer_width=16, scorer_steps=600),
    # For the streets on a laptop's CPU: narrow, so Adam's steps may be larger; few steps, so that
    # feature matching, the steadier of the two losses, weighs more; few photos, so that E and
    # the learning rate, which falls by epochs, see several passes; smooth, since these few steps do
    # not unlearn the dots.
    "toy": dict(size=(128, 256), limit=75, width=32, downs=2, blocks=3, enhancer_blocks=2,
                smooth=True, scales=4, d_width=24, features=3, e_width=8, loss="GAN+FM",
                lambda_fm=50.0, lr=3e-4, epochs=4, fine_epochs=4, enhancer_epochs=1, min_area=0.002,
                vgg="random", scorer_width=16, scorer_steps=600),
}
CHOICES = {
    "task": ("labels2photo", "pairs"), "direction": ("AtoB", "BtoA"),
    "generator": ("coarse-to-fine", "unet", "crn"), "pool": ("instance", "label"),
    "loss": ("GAN+FM+VGG", "GAN+FM", "GAN"), "gan": ("lsgan", "log"),
    "stage": ("all", "global", "enhancer", "joint"), "precision": ("fp32", "bf16")}


def check_config(cfg: Config) -> None:
    """Absurd values and contradictions, each in one line, before anything is built."""
    for name, allowed in CHOICES.items():
        if getattr(cfg, name) not in allowed:
            raise UserError(f"{flag(name)} {getattr(cfg, name)}: choose one of "
                            + ", ".join(map(str, allowed)))
    bounds = dict.fromkeys(("batch_size", "epochs", "width", "d_width", "e_width", "blocks",
                            "enhancer_blocks", "scales", "clusters", "fine_epochs",
                            "scorer_width", "scorer_steps"), 1)
    bounds |= dict.fromkeys(("limit", "steps", "save_every", "seed", "workers", "enhancers",
                             "features", "lambda_fm", "lambda_vgg", "enhancer_epochs", "downs",
                             "min_area"), 0)
    highs = {"workers": 256, "enhancers": 4, "scales": 6, "downs": 8, "min_area": 1}
    for name, low in bounds.items():
        value, high = getattr(cfg, name), highs.get(name, 10 ** 9)
        if not low <= (low if value is None else value) <= high:
            raise UserError(f"{flag(name)} {value}: must lie in {low}..{high}")
    if not 0 < cfg.lr < 1:
        raise UserError(f"--lr {cfg.lr}: must lie between 0 and 1; the paper's is 0.0002")
    if not all(0 <= beta < 1 for beta in cfg.betas):
        raise UserError(f"--betas {cfg.betas[0]} {cfg.betas[1]}: both must lie in [0, 1)")
    if cfg.width % 2 ** cfg.enhancers:
        raise UserError(f"--width {cfg.width}: is halved with each of the {cfg.enhancers} "
                        f"enhancers, so it must be a multiple of {2 ** cfg.enhancers}")
    if cfg.enhancers and cfg.enhancer_epochs >= cfg.fine_epochs:
        raise UserError(f"--enhancer-epochs {cfg.enhancer_epochs}: must be fewer than "
                        f"--fine-epochs {cfg.fine_epochs}, of which they are the first")
    if cfg.generator != "coarse-to-fine" and cfg.enhancers:
        raise UserError(f"--generator {cfg.generator}: has no enhancers; add --enhancers 0")
    if cfg.stage == "enhancer" and not cfg.enhancer_epochs:
        raise UserError("--stage enhancer: has no epochs with --enhancer-epochs 0")
    if cfg.stage in ("enhancer", "joint") and not cfg.enhancers:
        raise UserError(f"--stage {cfg.stage}: there is no enhancer with --enhancers 0")
    if cfg.task == "pairs" and cfg.features:
        raise UserError(f"--features {cfg.features}: objects are found in label maps, and --task "
                        "pairs has none; use --features 0")
    unit = 2 ** (cfg.downs + cfg.enhancers)
    for name in ("size", "crop"):
        h, w = getattr(cfg, name)
        if (name == "size" or h or w) and (h % unit or w % unit or min(h, w) < 2 * unit):
            near = [max(2 * unit, round(side / unit) * unit) for side in (h, w)]
            raise UserError(f"--{name} {h} {w}: G halves each side {cfg.downs + cfg.enhancers} "
                            f"times, so it must be a multiple of {unit} and at least {2 * unit}; "
                            f"the nearest is --{name} {near[0]} {near[1]}")
    if not cfg.data and min(plan(cfg)[0].cfg.size) < 32:
        raise UserError(f"--size {cfg.size[0]} {cfg.size[1]}: the first stage would see "
                        "{} x {} pixels".format(*plan(cfg)[0].cfg.size)
                        + "; the streets need at least 32 x 32")
    if cfg.crop[0] > cfg.size[0] or cfg.crop[1] > cfg.size[1]:
        raise UserError(f"--crop {cfg.crop[0]} {cfg.crop[1]}: larger than --size {cfg.size[0]} "
                        f"{cfg.size[1]}")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ------------------------------------------------------------------------------- 2 Networks

def instance_norm(c: int) -> nn.GroupNorm:
    """Each channel of each image to mean 0, variance 1; no parameters, no running averages.

    A group norm with one channel per group is this very function, and on the CPU the faster one.
    """
    return nn.GroupNorm(c, c, affine=False)


def convolution(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """Convolution, instance norm, ReLU. At stride 1 borders are reflected, at stride 2 zero."""
    mode = "reflect" if stride == 1 else "zeros"
    return [nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, padding_mode=mode),
            instance_norm(c_out), nn.ReLU()]


class Doubling(nn.ConvTranspose2d):
    """Transposed convolution, (B, c_in, H, W) -> (B, c_out, 2 H, 2 W).

    Its 3 x 3 kernels overlap at every other pixel, so an untrained one paints dots, which training
    has to unlearn. `smooth`, ours, takes the mean of each 2 x 2 window: of two neighbours one is
    always an overlap, so what repeats every two pixels is gone, and some sharpness with it.
    """
    smooth = False

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 3, 2, 1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), "replicate"), 2, 1) if self.smooth else x


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
        self.residual = nn.Sequential(*(ResidualBlock(c[-1]) for _ in range(blocks)))
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
        self.front = nn.Sequential(*convolution(c_in, width, 7),
                                   *convolution(width, 2 * width, stride=2))
        self.residual = nn.Sequential(*(ResidualBlock(2 * width) for _ in range(blocks)))
        self.back = nn.Sequential(*deconvolution(2 * width, width))

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
        self.globe = GlobalGenerator(c_in, width, downs, blocks)
        self.enhancers = nn.ModuleList(
            LocalEnhancer(c_in, width // 2 ** n, enhancer_blocks) for n in range(1, enhancers + 1))
        self.output = nn.Sequential(nn.Conv2d(width // 2 ** enhancers, c_out, 7, padding=3,
                                              padding_mode="reflect"), nn.Tanh())
        self.apply(initialise)

    def forward(self, s: Tensor) -> Tensor:
        pyramid = [s]
        for _ in self.enhancers:
            pyramid.append(half(pyramid[-1]))
        y = self.globe(pyramid.pop())                        # the smallest: (B, 64, H/2^n, W/2^n)
        for enhancer in self.enhancers:
            y = enhancer(pyramid.pop(), y)                   # (B, 32, 2 h, 2 w)
        return self.output(y)


def half(x: Tensor) -> Tensor:
    """3 x 3 average at stride 2: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)).

    For images and for one-hot labels alike: a mixed pixel says which classes meet in it. Padding is
    not counted, so borders keep their brightness.
    """
    return F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)


class UNet(nn.Module):
    """The slides' first rival: pix2pix's U-Net under this paper's losses, with instance norm.

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
            maps.append(block(maps[-1]))
        y = self.up[0](maps.pop())
        for block in self.up[1:]:
            y = block(torch.cat([maps.pop(), y], 1))
        return y


class CRN(nn.Module):
    """The slides' second rival: the cascaded refinement network of Chen & Koltun, in these losses.

    s (B, c, H, W)  ->  (B, 3, H, W) in [-1, 1]. From 1/2^downs of the size on, each module sees the
    labels at its size beside the doubled output of the one before. Widths 16, 16, 16, 16, 16, 8, 8,
    2, 0.5 times `width`, as many modules as there are sizes; layer norm; see crn_imle.py's paper.
    """

    def __init__(self, c_in: int, c_out: int = 3, width: int = 64, downs: int = 7):
        super().__init__()
        self.multiple = 2 ** downs
        widths = [max(4, int(width * k)) for k in (16, 16, 16, 16, 16, 8, 8, 2, 0.5)][:downs + 1]
        self.refine = nn.ModuleList()
        for c_a, c_b in zip([0, *widths], widths):
            layers = []
            for c in (c_a + c_in, c_b):
                layers += [nn.Conv2d(c, c_b, 3, 1, 1), nn.GroupNorm(1, c_b), nn.LeakyReLU(0.2)]
            self.refine.append(nn.Sequential(*layers))
        self.output = nn.Sequential(nn.Conv2d(widths[-1], c_out, 1), nn.Tanh())
        self.apply(initialise)

    def forward(self, s: Tensor) -> Tensor:
        y = None
        for i, module in enumerate(self.refine):
            labels = F.interpolate(s, scale_factor=0.5 ** (len(self.refine) - 1 - i), mode="area")
            if y is not None:
                y = F.interpolate(y, labels.shape[-2:], mode="bilinear")
                labels = torch.cat([y, labels], 1)
            y = module(labels)
        return self.output(y)


class PatchDiscriminator(nn.Module):
    """One D_k: real or fake, asked for every 70 x 70 patch; and what it felt on the way.

    s and x together (B, c, H, W)  ->  [4 hidden maps, prediction (B, 1, H/8 + 3, W/8 + 3)]

    arXiv: C64-C128-C256-C512, instance norm except on the first, LeakyReLU 0.2. Padding is 2, not
    pix2pix's 1, so maps are one larger than a half, and the two of stride 1 grow by one again.
    """

    def __init__(self, c_in: int = 39, width: int = 64):
        super().__init__()
        c = [c_in, *(min(width * 2 ** i, 512) for i in range(4)), 1]
        self.layers = nn.ModuleList()
        for i, stride in enumerate((2, 2, 2, 1, 1)):         # a unit sees 4, 10, 22, 46, 70 pixels
            layer = [nn.Conv2d(c[i], c[i + 1], 4, stride, 2)]
            layer += [instance_norm(c[i + 1])] if 0 < i < 4 else []
            layer += [nn.LeakyReLU(0.2)] if i < 4 else []
            self.layers.append(nn.Sequential(*layer))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for layer in self.layers:
            x = layer(x)
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
            y = half(y) if k else y
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
        return self.output(self.layers(x))[..., :x.shape[2], :x.shape[3]]  # made even


class InstanceAverage(torch.autograd.Function):
    """`instance_average`, and its gradient: since averaging is linear and symmetric (what pixel p
    gives to q, q gives to p), the gradient is the incoming one, averaged in the same way."""

    @staticmethod
    def forward(ctx, z: Tensor, region: Tensor) -> Tensor:
        key = region * len(region) + torch.arange(len(region), device=z.device).view(-1, 1, 1)
        run, at, length = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
        owner = run.unique(return_inverse=True)[1]      # a key for each object of each image
        where = at.flatten(), length, owner             # (B H W): run of a pixel; (R); (R): object
        ctx.save_for_backward(*where)
        return InstanceAverage.average(z, *where)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return InstanceAverage.average(gradient, *ctx.saved_tensors), None

    @staticmethod
    def average(z: Tensor, at: Tensor, length: Tensor, owner: Tensor) -> Tensor:
        b, c, h, w = z.shape
        pixels = z.transpose(0, 1).reshape(c, -1).double()
        sums = torch.segment_reduce(pixels, "sum", lengths=length.expand(c, -1), axis=1)
        sums = sums.new_zeros(c, len(owner)).index_add(1, owner, sums)             # (C, objects)
        means = (sums / torch.bincount(owner, length, len(owner))).to(z.dtype)
        return means[:, owner].index_select(1, at).view(c, b, h, w).transpose(0, 1)


def instance_average(z: Tensor, region: Tensor) -> Tensor:
    """Every pixel gets its object's mean (Sec. 3.4): z (B, C, H, W), region (B, H, W) -> z's shape.

    So an object is one colour in z however large it is, and E cannot smuggle the photo through.
    No loop over objects: neighbours in a row that belong to one object are a run, and there are a
    hundred times fewer runs than pixels. Each run is summed, then each object's runs (in float64,
    since a road is a sum of 10^5 pixels), and a pixel looks its mean up by its run.
    """
    return InstanceAverage.apply(z, region)


def boundary_map(instance: Tensor) -> Tensor:
    """1 where the object differs from any of the four neighbours (Sec. 3.3, Fig. 4).

    instance (B, H, W) int64  ->  (B, 1, H, W) float. Both sides of a border are marked; the
    image's own border is none. Ids themselves cannot be fed to a network: their number varies, and
    their values mean nothing. What tells touching cars apart is where one ends.
    """
    edge = torch.zeros_like(instance, dtype=torch.bool)
    across, down = instance[:, :, 1:] != instance[:, :, :-1], instance[:, 1:] != instance[:, :-1]
    edge[:, :, 1:] |= across
    edge[:, :, :-1] |= across
    edge[:, 1:] |= down
    edge[:, :-1] |= down
    return edge[:, None].float()


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
    """Eq. (2), G's side: sum_k mean (D_k(s, G(s)) - 1)^2, or of -log D_k; with weight 1."""
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
    total = sum((theirs.detach() - ours).abs().mean()
                for maps_x, maps_g in zip(real, fake) for theirs, ours in zip(maps_x[:-1], maps_g))
    return total / len(real) if mean else total


VGG_LAYERS = {"relu1_1": 1 / 32, "relu2_1": 1 / 16, "relu3_1": 1 / 8, "relu4_1": 1 / 4,
              "relu5_1": 1.0}


def perceptual_loss(real: dict[str, Tensor], fake: dict[str, Tensor]) -> Tensor:
    """Sec. 4, unnumbered: sum_i ||F^(i)(x) - F^(i)(G(s))||_1 / M_i over layers of VGG-19.

    Paper: layers not named, weights equal. Released code: those above; the weights make up for
    maps that shrink, and the authors found equal ones to work as well.
    """
    return sum(weight * (real[name] - fake[name]).abs().mean()
               for name, weight in VGG_LAYERS.items())


def perceptual_pull(vgg: nn.Module, x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """The perceptual loss, and its gradient at x_hat: all that G's backward pass needs of it.

    Taken at once, before D looks at x_hat, so that VGG's maps and D's are never in memory together.
    """
    with torch.no_grad():                       # the photo's features are a target: no graph
        features = vgg(x)
    loss = perceptual_loss(features, vgg(x_hat))
    return loss, torch.autograd.grad(loss, x_hat)[0]


# ------------------------------------------------------------------------------- 4 Training

@dataclass
class State:
    """All that training changes. Whatever has a state_dict, and the rest, are saved."""
    generator: nn.Module
    discriminator: nn.Module
    encoder: nn.Module | None                   # None with --features 0
    vgg: nn.Module | None                       # frozen; None without a VGG loss
    opt_g: torch.optim.Optimizer                # of G and E
    opt_d: torch.optim.Optimizer
    stage: int = 0                              # index into plan(cfg)
    step: int = 0                               # updates done
    epoch: int = 0                              # passes completed, over all stages
    seen: int = 0                               # images of this pass already used, by all processes
    styles: dict[int, Tensor] = field(default_factory=dict)    # class: (K, C) centres, by K-means
    means: dict[int, Tensor] = field(default_factory=dict)     # class: (C,) mean over its objects


@dataclass
class Stage:
    """One part of the coarse-to-fine training."""
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
    """
    stages, n = [], cfg.enhancers
    for k in range(n + 1):                      # k enhancers
        part = replace(cfg, size=tuple(side >> (n - k) for side in cfg.size), enhancers=k,
                       crop=tuple(side >> (n - k) for side in cfg.crop) if k else (0, 0),
                       scales=max(1, cfg.scales - (n - k)))
        parts = [("global", cfg.epochs, 0, cfg.epochs)] if k == 0 else [
            ("enhancer", cfg.enhancer_epochs, 0, cfg.fine_epochs),
            ("joint", cfg.fine_epochs - cfg.enhancer_epochs, cfg.enhancer_epochs, cfg.fine_epochs)]
        for name, epochs, done, total in parts:
            if epochs:
                first = stages[-1].first + stages[-1].epochs if stages else 0
                stages.append(Stage(name, replace(part, stage=name), first, epochs, done, total))
    if cfg.stage != "all":                      # that stage alone, of the outermost network
        stages = [replace(s, first=0) for s in stages if s.name == cfg.stage][-1:]
    return stages


def learning_rate(stage: Stage, epoch: int) -> float:
    """Full for the first half of the schedule, then down in equal steps; the last is not yet 0."""
    falling = stage.total // 2
    beyond = max(0, epoch - stage.first + stage.done - (stage.total - falling))
    return stage.cfg.lr * (1 - beyond / max(falling, 1))


def channels(cfg: Config) -> int:
    """Of s: 3 of an RGB input, or one per class (35 on Cityscapes) and one of the boundaries."""
    return 3 if cfg.task == "pairs" else class_table(cfg.classes).channels + cfg.boundary


def networks(cfg: Config) -> tuple[nn.Module, MultiScaleDiscriminator, Encoder | None]:
    """G, D and E of one stage. D sees s and the image, never E's features."""
    c = channels(cfg)
    if cfg.generator == "coarse-to-fine":
        generator = Generator(c + cfg.features, 3, cfg.width, cfg.downs, cfg.blocks, cfg.enhancers,
                              cfg.enhancer_blocks)
    else:
        kind = UNet if cfg.generator == "unet" else CRN
        generator = kind(c + cfg.features, 3, cfg.width, cfg.downs)
    for module in generator.modules():
        if isinstance(module, Doubling):
            module.smooth = cfg.smooth
    return (generator, MultiScaleDiscriminator(c + 3, cfg.d_width, cfg.scales),
            Encoder(cfg.features, cfg.e_width) if cfg.features else None)


def build(cfg: Config, device: torch.device) -> State:
    """Networks and optimisers of one stage: cfg is a plan's stage.cfg; otherwise of the last stage.

    Precision, compilation and distribution go around the networks.
    """
    if cfg.stage == "all":
        cfg = plan(cfg)[-1].cfg
    torch.manual_seed(cfg.seed)
    nets = networks(cfg)
    for net in nets:
        if net is not None:
            net.to(device, memory_format=memory_format(cfg, device))
    generator, discriminator, encoder = nets
    if cfg.stage == "enhancer":                 # what the stages before have trained, rests
        for part in (generator.globe, *generator.enhancers[:-1], encoder):
            if part is not None:
                part.requires_grad_(False)
    if cfg.stored_features and cfg.enhancers and encoder is not None:
        encoder.requires_grad_(False)
    vgg = None
    if "VGG" in cfg.loss:
        vgg = common.VGGFeatures(tuple(VGG_LAYERS), 19, cfg.vgg, cfg.vgg_normalise)
        vgg = dress(vgg.to(device, memory_format=memory_format(cfg, device)), cfg, device)
    adam = [torch.optim.Adam(trained(*some), cfg.lr, cfg.betas, fused=True)
            for some in ((generator, encoder), (discriminator,))]
    state = State(*nets, vgg, *adam)
    for path in cfg.init:                       # what an enhancer stage adds, no file can have
        load_networks(state, Path(path), newcomers(cfg) if cfg.stage == "enhancer" else ())
    state.generator, state.discriminator, state.encoder = (
        net and dress(net, cfg, device) for net in nets)
    return state


def trained(*nets: nn.Module | None) -> list[nn.Parameter]:
    """The parameters that the optimiser moves."""
    return [p for net in nets if net is not None for p in net.parameters() if p.requires_grad]


def newcomers(cfg: Config) -> tuple[str, ...]:
    """What the outermost enhancer brings: itself, the output layer, the finest discriminator."""
    return ("generator.output.", f"generator.enhancers.{cfg.enhancers - 1}.",
            f"discriminator.scales.{cfg.scales - 1}.")


def grow(state: State, cfg: Config, device: torch.device) -> State:
    """The networks of the next stage, with the weights of this one. Adam starts afresh."""
    new = build(replace(cfg, init=()), device)
    old = {name: plain(getattr(state, name)).state_dict() for name in NETWORKS
           if getattr(state, name) is not None}
    larger = len(plain(new.generator).enhancers) > len(plain(state.generator).enhancers)
    fill(new, old, Path(cfg.out), newcomers(cfg) if larger else ())
    return replace(new, stage=state.stage + 1, step=state.step, epoch=state.epoch, seen=state.seen)


def make_pair(batch: dict, cfg: Config) -> dict:
    """A batch of common.Dataset with "input" s (B, c, H, W) and "region" (B, H, W) added.

    s: one-hot labels, then the boundary map. region: the objects over which E's map is averaged.
    """
    if cfg.task == "pairs":
        return batch                            # an RGB input: nothing to make
    label = batch["label"]
    ids = torch.arange(class_table(cfg.classes).channels, device=label.device)
    s = (label[:, None] == ids.view(-1, 1, 1)).float()      # one-hot, without an int64 of each
    if cfg.boundary:
        s = torch.cat([s, boundary_map(batch["instance"])], 1)
    region = batch.get("instance", label) if cfg.pool == "instance" else label
    return batch | {"input": s, "region": region}


def style_of_photo(encoder: nn.Module, x: Tensor, region: Tensor, stored: bool = False) -> Tensor:
    """z = E(x), averaged over each region (B, H, W): (B, C, H, W).

    Released code, at full size: E's map of the half-sized photo, doubled and rounded to 8 bits.
    """
    if not stored:
        return instance_average(encoder(x), region)
    z = instance_average(encoder(half(x)), region[:, ::2, ::2])
    z = ((z + 1) * 127.5).round() / 127.5 - 1
    return F.interpolate(z, x.shape[-2:], mode="nearest")


def train_step(state: State, batch: dict, cfg: Config) -> dict[str, Tensor]:
    """One update of G and E and one of D: Eq. (4). Returns the losses by the paper's names.

    Both gradients are taken before either update, as in the released code. It asks D twice about
    the same x_hat, once for each of the two; here one pass serves both, and `inputs` says which
    weights each backward pass is for. Nothing else flows anywhere: that is all a detach would do.
    """
    G, D, E = state.generator, state.discriminator, state.encoder
    s, x = batch["input"], batch["image"]       # (B, c, H, W), (B, 3, H, W) in [-1, 1]
    s_z = s
    if E is not None:                           # "we replace G(s) with G(s, E(x))"       Sec. 3.4
        stored = cfg.stored_features and cfg.enhancers > 0
        s_z = torch.cat([s, style_of_photo(E, x, batch["region"], stored)], 1)
    x_hat = G(s_z)
    pull = 0.0
    if "VGG" in cfg.loss:
        loss_vgg, pull = perceptual_pull(state.vgg, x, x_hat)
    real, fake = D(s, x), D(s, x_hat)           # per scale: four hidden maps, prediction

    # G and E: the min in Eq. (4).
    losses = {"g_gan": generator_loss(fake, cfg.gan)}
    objective = losses["g_gan"]
    if "FM" in cfg.loss:
        losses["g_fm"] = feature_matching_loss(real, fake, cfg.fm_mean)
        objective = objective + cfg.lambda_fm * losses["g_fm"]
    if "VGG" in cfg.loss:
        losses["g_vgg"] = loss_vgg
        objective = objective + cfg.lambda_vgg * (pull * x_hat).sum()    # the same gradient
    state.opt_g.zero_grad(set_to_none=True)
    objective.backward(inputs=trained(G, E), retain_graph=True)

    # D: the max in Eq. (2).
    losses["d_real"], losses["d_fake"] = discriminator_loss(real, fake, cfg.gan)
    state.opt_d.zero_grad(set_to_none=True)
    (losses["d_real"] + losses["d_fake"]).backward(inputs=trained(D))
    state.opt_g.step()
    state.opt_d.step()
    return {name: loss.detach() for name, loss in losses.items()}


# From here to Log all is word for word the same in the four scripts, but for these two names.

NAME = "pix2pixhd"
NETWORKS = ("generator", "discriminator", "encoder")       # in State


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


def load_networks(state: State, path: Path, fresh: tuple[str, ...] = ()) -> None:
    """Weights only, for --init."""
    fill(state, our_names(read_checkpoint(path), path), path, fresh)


def our_names(stored: dict, path: Path) -> dict:
    """What read_checkpoint gave; the authors' weights under our names."""
    return rename_released(stored["released"], path) if "released" in stored else stored


def fill(state: State, stored: dict, path: Path, fresh: tuple[str, ...] = ()) -> None:
    """Put stored weights into the networks; names and shapes are compared first.

    Weights whose names ("generator.output.0.bias") begin with one of `fresh` keep their values.
    """
    shared = [name for name in NETWORKS
              if getattr(state, name) is not None and stored.get(name) is not None]
    if not shared:
        raise UserError(f"{path}: holds {', '.join(stored)}, of which this run uses nothing")
    for name in shared:
        net, theirs = getattr(state, name), stored[name]
        own = plain(net).state_dict()
        shapes, got = ({k: tuple(v.shape) for k, v in weights.items()
                        if not f"{name}.{k}".startswith(fresh)} for weights in (own, theirs))
        wrong = sorted(k for k in shapes | got if shapes.get(k) != got.get(k))
        if wrong:
            raise UserError(f"{path}: another {name}: {wrong[0]} is {got.get(wrong[0], 'absent')}, "
                            f"expected {shapes.get(wrong[0], 'absent')} ({len(wrong)} such)")
        plain(net).load_state_dict(own | {k: theirs[k] for k in got})


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
        cfg.data, split, cfg.size, crop=cfg.crop if train else (0, 0), mirror=train and cfg.mirror,
        classes=cfg.classes, direction=cfg.direction, limit=cfg.limit, seed=cfg.seed,
        instances=cfg.boundary or cfg.pool == "instance")


def open_data(cfg: Config) -> tuple[Config, common.Dataset, common.Dataset]:
    """Both splits, and the config with what the data turned out to be: classes, boundary, pool."""
    train_set = dataset(cfg, "train")
    cfg = replace(cfg, classes=train_set.classes)
    if not train_set.roles & {"image", "B", "pair"}:
        raise UserError(f"--data {cfg.data}: layout {train_set.layout.name}, without photos; "
                        "training needs them")
    if "label" not in train_set.roles and cfg.task == "labels2photo":
        if cfg.features:
            raise UserError(f"--features {cfg.features}: objects are found in label maps, and "
                            f"{cfg.data} has none; use --features 0")
        cfg = replace(cfg, task="pairs", boundary=False)
    elif "label" in train_set.roles and cfg.task == "pairs":
        raise UserError("--task pairs: this dataset has label maps; --task labels2photo is the way")
    if "instance" not in train_set.roles and cfg.task == "labels2photo":
        if cfg.boundary:
            notice("no instance maps: trained without the boundary channel")
        if cfg.features and cfg.pool == "instance":
            notice("no instance maps: features are averaged over labels")
        cfg = replace(cfg, boundary=False, pool="label")
    if cfg.generator != "coarse-to-fine":       # these halve as often as the size allows
        limit = 8 if cfg.generator == "unet" else 6
        deepest = [k for k in range(1, limit + 1) if all(side % 2 ** k == 0 and side >= 2 ** (k + 1)
                                                         for side in cfg.size)]
        cfg = replace(cfg, downs=max(deepest, default=1))
    images = cfg.batch_size * place()[1]
    if images > len(train_set):
        raise UserError(f"--batch-size {cfg.batch_size}: a step needs {images} images, training "
                        f"has {len(train_set)}")
    check_config(cfg)
    test_set = dataset(cfg, "test")
    if (cfg.boundary or cfg.features and cfg.pool == "instance") and (
            "instance" not in test_set.roles):
        raise UserError(f"--data {cfg.data}: instance maps for training, but none for testing; add "
                        "them, or train with --no-boundary (and --pool label)")
    return cfg, train_set, test_set


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
    """All stages, from scratch, from --init, or on from the checkpoint; returns the folder."""
    device, stored = pick_device(cfg), None
    rank, world = place()
    if resume:
        stored = read_checkpoint(Path(cfg.out) / "checkpoint.pt")
    cfg, train_set, test_set = open_data(cfg)
    if resume and cfg.boundary != stored["config"]["boundary"]:
        raise UserError(f"--data {cfg.data}: the run began with instance maps, which are gone")
    stages = plan(cfg)
    per_step = cfg.batch_size * world
    per_epoch = len(train_set) // per_step
    total = min(cfg.steps or math.inf, sum(stage.epochs for stage in stages) * per_epoch)
    state = build(stages[stored["stage"] if resume else 0].cfg, device)
    if resume:
        restore(state, stored, Path(cfg.out) / "checkpoint.pt")
        begun = [[s.first for s in some[:state.stage + 1]]
                 for some in (stages, plan(Config(**stored["config"])))]
        if begun[0] != begun[1]:
            raise UserError(f"--epochs {cfg.epochs}, --fine-epochs {cfg.fine_epochs}: would move "
                            f"stages that have begun (at epochs {begun[1]}, now {begun[0]}); only "
                            "the last stage can grow")
    if state.step >= total and state.encoder is not None and not state.styles:
        if rank == 0:                           # killed before it had them
            encode(replace(stages[state.stage].cfg, out=cfg.out), state)
            save_checkpoint(state, cfg)
        return Path(cfg.out)
    if state.step >= total:
        raise UserError(f"{cfg.out}: finished at step {state.step}, epoch {state.epoch}; a larger "
                        "--epochs or --steps goes on")
    if rank == 0:
        common.describe(train_set)
        common.describe(test_set)
        cfg = open_run(cfg, resume)
        log = Log(Path(cfg.out), state.step)
        print(f"{device}: {total} steps of {per_step} image(s), {per_epoch} an epoch; in {cfg.out}")
        announce(stages)
    save_every = cfg.save_every or per_epoch
    bar = tqdm(total=total, initial=state.step, unit="step", disable=None if rank == 0 else True)
    with Stop() as stop:
        last, stage = False, None
        while not last:
            number = max(i for i, s in enumerate(stages) if s.first <= state.epoch)
            if number != state.stage:
                state = grow(state, replace(stages[number].cfg, out=cfg.out), device)
            before, stage = stage, stages[number]
            if before is None or stage.cfg.enhancers > before.cfg.enhancers:     # a larger size
                train_set, test_set = (dataset(stage.cfg, split) for split in ("train", "test"))
                loader = open_loader(train_set, cfg, device)
            for optimiser in (state.opt_g, state.opt_d):
                optimiser.param_groups[0]["lr"] = learning_rate(stage, state.epoch)
            clock = time.time()
            for batch in epoch_batches(loader, cfg, state):
                waited = time.time() - clock
                losses = train_step(state, to_pair(batch, stage.cfg, device), stage.cfg)
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
                        sample_grid(state, replace(stage.cfg, out=cfg.out), test_set, device)
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
    if rank == 0 and state.encoder is not None:
        encode(replace(stage.cfg, out=cfg.out), state)
        save_checkpoint(state, cfg)
    return Path(cfg.out)


def announce(stages: list[Stage]) -> None:
    """The coarse-to-fine schedule, a line per stage."""
    moved = {"global": "G1", "enhancer": "the new enhancer, the rest frozen", "joint": "all of G"}
    for i, stage in enumerate(stages, 1):
        cfg = stage.cfg
        h, w = cfg.size if 0 in cfg.crop else cfg.crop
        print(f"stage {i} of {len(stages)}, {stage.name}: {stage.epochs} epochs at {h}x{w} with "
              f"{cfg.scales} D scale(s), training "
              f"{moved[stage.name] if cfg.generator == 'coarse-to-fine' else cfg.generator}")


def rename_released(stored: dict, path: Path) -> dict:
    """The authors' files (a plain state dict of G, D or E) under our names.

    G1 is "model", enhancer n is "model<n>_1" (front-end) and "model<n>_2" (the rest); numbers count
    layers, also those without weights. Inside each list the order is ours, so the convolutions are
    matched in order. Files from before PyTorch 0.4 hold statistics that were never used.
    """
    stored = {k: v for k, v in stored.items() if not k.endswith(
        ("running_mean", "running_var", "num_batches_tracked"))}
    lists = {}                                  # "model1_2": its convolutions, in order
    for key in stored:
        if key.endswith(".weight"):
            first, _, rest = key.removesuffix(".weight").partition(".")
            order = [int(part) for part in rest.split(".") if part.isdecimal()]
            lists.setdefault(first, []).append((order, key.removesuffix(".weight")))
    lists = {first: [key for _, key in sorted(convs)] for first, convs in lists.items()}
    names = {}
    if lists and all(first.startswith(("scale", "layer")) for first in lists):
        name = "discriminator"
        for key in (key for convs in lists.values() for key in convs):
            scale, _, layer = key.replace("scale", "").partition("_layer")
            if layer:                           # scale0_layer3.0
                names[key] = f"scales.{scale}.layers.{layer.split('.')[0]}.0"
        for first, convs in lists.items():      # layer0.8, where feature matching was off
            for i, key in enumerate(convs if first.startswith("layer") else ()):
                names[key] = f"scales.{first.removeprefix('layer')}.layers.{i}.0"
    elif "model" in lists and not any("conv_block" in key for key in stored):
        name, convs = "encoder", lists["model"]
        if convs[-1] == "model.28":
            notice(f"{path}: an early encoder, whose last layer padded with zeros; borders differ")
        names = dict(zip(convs, ours(Encoder(3, 1, len(convs) // 2 - 1))))
    elif "model" in lists:
        name, n = "generator", sum(first.endswith("_1") for first in lists)
        convs = [key for first in sorted(lists) for key in lists[first]]
        blocks = sum("conv_block" in key for key in lists["model"]) // 2
        downs = (len(lists["model"]) - 2 * blocks - (1 if n else 2)) // 2
        inner = sum("conv_block" in key for key in lists.get("model1_2", ())) // 2
        names = dict(zip(convs, ours(Generator(3, 3, 2 ** n, downs, blocks, n, inner))))
    else:
        raise UserError(f"{path}: no checkpoint of {NAME}.py and no released G, D or E; its first "
                        f"key is {next(iter(stored), 'missing')}")
    split = {key: key.rpartition(".") for key in stored}               # module, ".", tensor
    return {name: {f"{names.get(module, module)}.{tensor}": stored[key]
                   for key, (module, _, tensor) in split.items()}}


def ours(net: nn.Module) -> list[str]:
    """The names of a network's convolutions, from its input to its output."""
    return [name for name, module in net.named_modules()
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))]


# ------------------------------------------------------------------------------- 5 Sampling

@torch.no_grad()
def translate(generator: nn.Module, s: Tensor) -> Tensor:
    """G on inputs of any size: (B, c, H, W) -> (B, 3, H, W). There is no noise and no dropout.

    Sides are mirrored up to the next multiple that G can halve, and the result is cropped. One
    image at a time: instance norm makes it independent of its neighbours anyway.
    """
    h, w = s.shape[-2:]
    unit = generator.multiple
    rows, columns = (reflect(side, max(-side % unit, 2 * unit - side)).to(s.device)
                     for side in (h, w))
    padded = s[..., rows, :][..., columns]
    return torch.cat([generator(one[None]) for one in padded])[..., :h, :w]


def reflect(n: int, more: int) -> Tensor:
    """Indices 0 .. n-1 and `more` back and forth: F.pad reflects, but not by more than n - 1."""
    i = torch.arange(n + more) % max(2 * n - 2, 1)
    return torch.minimum(i, (2 * n - 2 - i).abs())


def pair_of(item: dict, cfg: Config, device: torch.device) -> dict:
    """One item of a dataset as a batch of one on the device, made a pair."""
    batch = {k: v[None].to(device) if torch.is_tensor(v) else v for k, v in item.items()}
    return make_pair(batch, cfg)


def picture_of(pair: dict, cfg: Config) -> Tensor:
    """The input as a picture (B, 3, H, W) in [-1, 1]: class colours, object borders in black."""
    if cfg.task == "pairs":
        return pair["input"]
    colours = colour_label(pair["label"], class_table(cfg.classes))
    return torch.where(pair["input"][:, -1:] > 0, -1.0, colours) if cfg.boundary else colours


def generate(state: State, s: Tensor, z: Tensor | None) -> Tensor:
    """G(s, z), or G(s) without an encoder: (B, c, H, W), (B, C, H, W) -> (B, 3, H, W), any size."""
    return translate(plain(state.generator), s if z is None else torch.cat([s, z], 1))


@torch.no_grad()
def reconstruct(state: State, pair: dict, cfg: Config) -> Tensor:
    """G(s, E(x)): with the style of the photo itself, as in training. Without E, G(s)."""
    z = None
    if state.encoder is not None:
        z = encode_photo(state, pair["image"], pair["region"], cfg)
    return generate(state, pair["input"], z)


def encode_photo(state: State, x: Tensor, region: Tensor, cfg: Config) -> Tensor:
    """z = E(x) per object as in training: (B, 3, H, W), (B, H, W) -> (B, C, H, W), any size."""
    return style_of_photo(plain(state.encoder), x, region,
                          cfg.stored_features and cfg.enhancers > 0)


def sample_grid(state: State, cfg: Config, test_set: common.Dataset, device: torch.device) -> None:
    """samples/<step>.png: input | output | truth of six test examples, evenly spread, two a row."""
    tiles, n = [], min(6, len(test_set))
    for i in range(n):
        pair = pair_of(test_set[i * len(test_set) // n], cfg, device)
        if "image" in pair:
            values = [picture_of(pair, cfg), reconstruct(state, pair, cfg), pair["image"]]
        else:                                   # styles of a few photos, for this picture only
            brief = replace(state, styles={}, means={}), pair, replace(cfg, limit=20), cfg.seed
            values = [picture_of(pair, cfg), synthesise(*brief)]
        tiles += [value.cpu() for value in values]
    path = Path(cfg.out) / "samples" / f"{state.step:07d}.png"
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


def kmeans(points: Tensor, k: int, seed: int = 0, restarts: int = 10) -> Tensor:
    """K-means: points (n, C) -> centres (min(k, distinct points), C), the best of ten starts.

    Starts are those of k-means++: each new centre is a point drawn with probability proportional to
    its squared distance from the nearest centre so far.
    """
    generator = torch.Generator().manual_seed(seed)
    points, best = points.double().cpu(), (math.inf, None)
    k = min(k, len(points.unique(dim=0)))

    def distances(centres: Tensor) -> Tensor:   # (n, K), squared; torch.cdist would round
        return (points[:, None] - centres).square().sum(2)

    for _ in range(restarts):
        centres = points[torch.randint(len(points), (1,), generator=generator)]
        while len(centres) < k:
            chance = distances(centres).amin(1)
            new = torch.multinomial(chance / chance.max(), 1, generator=generator)
            centres = torch.cat([centres, points[new]])
        for _ in range(100):
            owner = distances(centres).argmin(1)
            sums = torch.zeros_like(centres).index_add_(0, owner, points)
            sizes = torch.bincount(owner, minlength=k)[:, None]
            moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
            if torch.equal(moved, centres):
                break
            centres = moved
        inertia = distances(centres).amin(1).sum().item()
        if inertia < best[0]:
            best = (inertia, centres)
    return best[1].float()


@torch.no_grad()
def encode(cfg: Config, state: State) -> None:
    """Fill state.styles and state.means: E over the training photos, K-means per class (Sec. 3.4).

    Released code: only objects larger than 1/64 of the image are clustered (cfg.min_area), since E
    has seen too little of a small one. The means are over all objects; a class that has no object
    large enough falls back to its mean.
    """
    device, found = next(plain(state.generator).parameters()).device, {}
    train_set = dataset(replace(cfg, mirror=False, crop=(0, 0)), "train")
    for i in tqdm(range(len(train_set)), desc="encode", unit="image", disable=None):
        pair = pair_of(train_set[i], cfg, device)
        z = encode_photo(state, pair["image"], pair["region"], cfg)
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
                raise UserError(f"{path}: asks for {module}.{name}; a clusters file holds arrays")
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
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a clusters file (.npy)")
    except UserError:
        raise
    except Exception as error:                  # numpy and pickle errors share no narrower class
        raise UserError(f"{path}: not a clusters file ({type(error).__name__}: {error})")


def need_styles(state: State, cfg: Config) -> None:
    """Styles of an interrupted run are not in its checkpoint yet."""
    if not state.styles:
        if not cfg.data and cfg.classes != "streets":
            raise UserError("styles are read off training photos: name them with --data, or one "
                            "photo and its labels with --reference")
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

    An object's draw hangs on (seed, id) alone, so it keeps its style when others change. With
    `vary`, only objects of these classes follow the seed, and all others that of seed 0.
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


def styles_of_reference(state: State, reference: dict, label: Tensor, cfg: Config) -> Tensor:
    """The style of another photo: each class gets its mean in the reference, where it occurs there.

    reference: a pair with "image", "label", "region"; label (1, H, W) of the target -> (1, C, H, W)
    """
    z = encode_photo(state, reference["image"], reference["label"], cfg)[0]
    out = torch.zeros(1, z.shape[0], *label.shape[1:], device=z.device)
    for kind in label.unique().tolist():
        there = reference["label"][0] == kind
        if not there.any():
            need_styles(state, cfg)
        value = z[:, there][:, 0] if there.any() else centres_of(state, kind)[0].to(z.device)
        out[0, :, label[0] == kind] = value[:, None]
    return out


@torch.no_grad()
def synthesise(state: State, pair: dict, cfg: Config, seed: int = 0, vary: tuple[int, ...] = (),
               reference: dict | None = None) -> Tensor:
    """The test-time image (1, 3, H, W): no photo is seen; styles are drawn, or a reference's."""
    z = None
    if state.encoder is not None and reference is None:
        need_styles(state, cfg)
        z = draw_styles(state, pair["label"], pair["region"], seed, vary)
    elif state.encoder is not None:
        z = styles_of_reference(state, reference, pair["label"], cfg)
    return generate(state, pair["input"], z)


def class_id(name: str | int, table: common.ClassTable) -> int:
    """A class by its name or its number."""
    if name in table.names:
        return table.names.index(name)
    if str(name).isdecimal() and int(name) < table.channels:
        return int(name)
    raise UserError(f"class {name}: choose a number below {table.channels}, or one of "
                    + ", ".join(table.names))


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
        self.device = next(plain(state.generator).parameters()).device
        pair = pair_of(item, cfg, self.device)
        self.label = pair["label"][0].clone()
        self.instance = pair.get("instance", pair["label"])[0].clone()
        self.z = None
        if state.encoder is not None:           # the photo's own styles, or drawn ones
            need_styles(state, cfg)
            with torch.no_grad():
                self.z = (encode_photo(state, pair["image"], pair["region"], cfg)
                          if "image" in pair else
                          draw_styles(state, pair["label"], pair["region"], seed))[0].clone()
            for _, number, _, value in self.objects():
                self.z[:, self.instance == number] = value[:, None]

    def objects(self) -> list[tuple[int, int, float, Tensor]]:
        """(class, id, share of the image, style) of every object, the largest first."""
        z = self.label.new_zeros(1, *self.label.shape) if self.z is None else self.z
        return sorted(objects_of(z, self.label, self.instance), key=lambda o: -o[2])

    def where(self, number: int) -> Tensor:
        """The pixels (H, W) of an object."""
        mask = self.instance == number
        if not mask.any():
            raise UserError(f"object {number}: not in this scene; it has "
                            + ", ".join(str(o[1]) for o in self.objects()[:20]))
        return mask

    def keep(self) -> None:
        """Remember the scene as it is, for undo."""
        self.history.append((self.label.clone(), self.instance.clone(),
                             None if self.z is None else self.z.clone()))

    def assign(self, mask: Tensor, kind: int, number: int, value: Tensor | None = None) -> None:
        """Class, id and style of some pixels. Without a value: what the object `number` has, else
        what its class has in this scene, else the first style of the class."""
        if self.z is not None:
            if value is None:
                for like in (self.instance == number, self.label == kind):
                    rest = like & ~mask
                    if value is None and rest.any():
                        value = self.z[:, rest][:, 0]
            if value is None:
                value = centres_of(self.state, kind)[0].to(self.device)
            self.z[:, mask] = value[:, None]
        self.label[mask], self.instance[mask] = kind, number

    def countable(self, kind: int) -> bool:
        """Whether a class comes as things; of nameless classes, whether their ids say so."""
        if self.table.things:
            return self.name(kind) in self.table.things
        return bool((self.instance[self.label == kind] != kind).any())

    def free_id(self, kind: int) -> int:
        """The id for a new object: stuff joins its like or has the class as its id, things have
        class * 1000 + k. An id that something else has is never taken."""
        used = set(self.instance.unique().tolist())
        number = kind * 1000
        same = self.instance[self.label == kind]
        if not self.countable(kind):
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
        self.assign(mask, kind, self.free_id(kind))
        return self

    def set_style(self, number: int, style: int) -> "Editor":
        """Give an object the style-th of the K modes of its class."""
        mask = self.where(number)
        if self.z is None:
            raise UserError("--style: this run has no encoder; train with --features 3")
        kind = int(self.label[mask].mode().values)
        centres = centres_of(self.state, kind)
        if not 0 <= style < len(centres):
            raise UserError(f"--style {number}={style}: {self.name(kind)} has styles 0 to "
                            f"{len(centres) - 1}")
        self.keep()
        self.z[:, mask] = centres[style].to(self.device)[:, None]
        return self

    def remove(self, number: int, name: str | int | None = None) -> "Editor":
        """Take an object out; a class, or the stuff that borders on it, grows into the hole."""
        hole = self.where(number)
        if name is not None:
            return self.set_class(number, name)
        if hole.all():
            raise UserError(f"object {number}: fills the image; nothing borders on it")
        self.keep()
        hole, things = hole.clone(), torch.zeros_like(hole)
        for kind in self.label.unique().tolist():
            things |= (self.label == kind) & self.countable(kind)
        left = -1
        while hole.any():                       # a pixel a turn, from all four sides
            things &= int(hole.sum()) != left   # stuck between things only: then these must do
            left = int(hole.sum())
            for shift, axis in ((1, 1), (-1, 1), (-1, 0), (1, 0)):
                source = (hole | things).roll(shift, axis)
                ends = [slice(None)] * 2        # roll wraps round: the first line has no neighbour
                ends[axis] = 0 if shift == 1 else -1
                source[tuple(ends)] = True
                take = hole & ~source
                for plane in (self.label, self.instance, *([] if self.z is None else self.z)):
                    plane[take] = plane.roll(shift, axis)[take]
                hole &= ~take
        return self

    def paste(self, number: int, down: int, right: int) -> "Editor":
        """Add a copy of an object, so many pixels away; what falls outside the image is cut."""
        mask = self.where(number)
        rows, columns = mask.nonzero(as_tuple=True)
        rows, columns = rows + down, columns + right
        inside = (rows >= 0) & (rows < mask.shape[0]) & (columns >= 0) & (columns < mask.shape[1])
        if not inside.any():
            raise UserError(f"--paste {number}@{down},{right}: lies outside the image")
        target = torch.zeros_like(mask)
        target[rows[inside], columns[inside]] = True
        kind = int(self.label[mask].mode().values)
        self.keep()
        value = None if self.z is None else self.z[:, mask][:, 0].clone()
        number = self.free_id(kind) if self.countable(kind) else number
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

    def reset(self) -> "Editor":
        """The scene as it was at first."""
        while self.history:
            self.undo()
        return self

    def name(self, kind: int) -> str:
        return (*self.table.names, "unknown")[kind]

    def pair(self) -> dict:
        """The scene as a batch of one, ready for G."""
        return make_pair({"label": self.label[None], "instance": self.instance[None]}, self.cfg)

    def render(self) -> Tensor:
        """The image (3, H, W) in [-1, 1] of the scene as it is now."""
        z = None if self.z is None else self.z[None]
        return generate(self.state, self.pair()["input"], z)[0].cpu()

    def picture(self) -> Tensor:
        """The label map (3, H, W) in [-1, 1], with the borders of objects in black."""
        return picture_of(self.pair(), self.cfg)[0].cpu()


def save_images(images: Tensor, path: Path, nrow: int = 1) -> None:
    """(B, 3, H, W) in [-1, 1] to a file; several as a grid."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        grid = make_grid(images, nrow, padding=2 if len(images) > 1 else 0, pad_value=1)
        save_image((grid + 1) / 2, path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({error}); pictures end in .png or .jpg")


def read_input(path: Path, cfg: Config, instances: str = "") -> dict:
    """A user's file as an item: a label map, and its instance map if G wants one; or a picture."""
    if cfg.task == "pairs":
        return {"input": common.read_image(path).float() / 127.5 - 1, "name": path.stem}
    item = {"label": common.read_label(path, class_table(cfg.classes)), "name": path.stem}
    if instances or cfg.boundary or cfg.features and cfg.pool == "instance":
        if not instances:
            raise UserError(f"{path}: this run was trained with instance maps; name the file or "
                            "the folder that holds them with --instances")
        there = Path(instances)
        where = there if there.is_file() else there / path.name
        if not where.exists():                  # Cityscapes
            where = there / path.name.replace("labelIds", "instanceIds")
        if where.resolve() == path.resolve():
            notice(f"{path}: ids of classes serve as ids of objects")
        item["instance"] = common.read_instance(where)
        if item["instance"].shape != item["label"].shape:
            raise UserError(f"{where}: {tuple(item['instance'].shape)} pixels, but {path} has "
                            f"{tuple(item['label'].shape)}")
    return item


def resize_item(item: dict, size: tuple[int, int]) -> dict:
    """Labels and instances by nearest neighbour, pictures by antialiased bicubic."""
    out = dict(item)
    for k in {"input", "image"} & item.keys():
        picture = F.interpolate(item[k][None], size, mode="bicubic", antialias=True)
        out[k] = picture[0].clamp(-1, 1)
    for k in {"label", "instance"} & item.keys():
        ids = F.interpolate(item[k][None, None].double(), size, mode="nearest-exact")
        out[k] = ids[0, 0].long()
    return out


def read_reference(paths: tuple[str, ...], cfg: Config, device: torch.device) -> dict:
    """--reference PHOTO LABEL as a pair whose styles others can take."""
    photo, label = (Path(path) for path in paths)
    item = {"image": common.read_image(photo).float() / 127.5 - 1, "name": photo.stem,
            "label": common.read_label(label, class_table(cfg.classes))}
    if item["label"].shape != item["image"].shape[1:]:
        raise UserError(f"{label}: {tuple(item['label'].shape)} pixels, but {photo} has "
                        f"{tuple(item['image'].shape[1:])}")
    return {k: v[None].to(device) if torch.is_tensor(v) else v for k, v in item.items()}


def sample(cfg: Config, state: State, source: str = "", output: str = "", samples: int = 1,
           size: tuple[int, int] | None = None, instances: str = "", vary: tuple[str, ...] = (),
           reference: tuple[str, ...] = ()) -> Path:
    """Outputs for a file or a folder of any sizes, or for the test split; returns where they are.

    An output has the size of its input; `size` resizes the inputs first. Several samples differ by
    the styles drawn for each object: of all, or of those whose class is named in `vary`.
    """
    device = next(plain(state.generator).parameters()).device
    if samples < 1:
        raise UserError(f"--samples {samples}: must be 1 or more")
    if state.encoder is None and (samples > 1 or vary or reference):
        raise UserError("this run has no encoder, so a label map has one image: no --samples, "
                        "--vary or --reference; train with --features 3 for more")
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
    kinds = tuple(class_id(name, class_table(cfg.classes)) for name in vary)
    model = read_reference(reference, cfg, device) if reference else None
    for item in tqdm(items, total=len(files), unit="image", disable=None):
        pair = pair_of(item, cfg, device)
        for k in range(samples):
            x_hat = synthesise(state, pair, cfg, cfg.seed + k, kinds, model)
            number = f"_{k + 1}" if samples > 1 else ""
            path = target if to_file else target / f"{item['name']}{number}.png"
            if source and any(path.resolve() == file.resolve() for file in files):
                raise UserError(f"--output {output}: would overwrite the input {path}")
            save_images(x_hat.cpu(), path)
    print(f"{len(files) * samples} image(s): {target}")
    return target


def edit(cfg: Config, state: State, edits: list[tuple[str, str]], item: dict, output: str = "",
         ) -> Path:
    """The mode edit: the changes in their order, a picture of before and after, the objects."""
    editor = Editor(state, cfg, item, cfg.seed)
    before = [editor.picture(), editor.render()]
    for kind, text in edits:
        apply_edit(editor, kind, text)
    print(f"{item['name']}\n{'object':>10}  {'class':16}{'share':>8}  styles")
    for c, number, share, _ in editor.objects():
        n = len(state.styles.get(c, ())) if editor.z is not None else 0
        print(f"{number:>10}  {editor.name(c):16}{100 * share:7.2f}%  "
              + (f"0..{n - 1}" if n else "none"))
    path = Path(output)
    if not output:                              # the next free edits/N.png
        n = 1
        while (path := Path(cfg.out or ".") / "edits" / f"{n}.png").exists():
            n += 1
    elif path.exists():
        raise UserError(f"--output {path}: exists already; name another file")
    save_images(torch.stack([*before, editor.picture(), editor.render()]), path, nrow=2)
    print(f"before, and below it after: {path}")
    return path


EDIT_FORMS = {"set": "ID=CLASS", "style": "ID=K", "remove": "ID or ID=CLASS",
              "paste": "ID@DOWN,RIGHT", "paint": "TOP,LEFT,BOTTOM,RIGHT=CLASS", "undo": ""}


def apply_edit(editor: Editor, kind: str, text: str) -> None:
    """One change as the command line spells it: ("set", "26001=building"), ("undo", ""), ..."""
    left, _, right = text.partition("@" if kind == "paste" else "=")
    try:
        numbers = [int(n) for n in left.split(",")] if left else []
        if kind == "set" and right:
            editor.set_class(*numbers, right)
        elif kind == "style":
            editor.set_style(*numbers, int(right))
        elif kind == "remove" and numbers:
            editor.remove(*numbers, right or None)
        elif kind == "paste":
            editor.paste(*numbers, *(int(n) for n in right.split(",")))
        elif kind == "paint" and right:
            editor.paint(*numbers, right)
        elif kind == "undo":
            editor.undo()
        else:
            raise ValueError
    except (ValueError, TypeError):             # no number, or too many of them
        raise UserError(f"--{kind} {text}: expected {EDIT_FORMS[kind]}")


# ----------------------------------------------------------------------------- 6 Evaluation

# The paper's numbers, all on Cityscapes by PSPNet: pixel accuracy in percent, mean IoU.
TABLE_1 = {"pix2pix": (78.34, .3948), "CRN": (70.55, .3483), "ours": (83.78, .6389),
           "oracle": (84.29, .6857)}
SLIDES_GENERATORS = {"unet": (77.86, .3905), "crn": (78.96, .3994),
                     "coarse-to-fine": (83.78, .6389)}
SLIDES_SCALES = {1: (82.87, .5775), 3: (83.78, .6389)}
PREFERENCE = {"GAN": 68.55, "GAN+FM": 58.90}    # Sec. 4.2: so many percent prefer the full loss


def scorer_for(cfg: Config, device: torch.device) -> common.FCN8s:
    """The FCN-8s of this dataset, trained once and kept beside the runs."""
    name = Path(cfg.data).resolve().name if cfg.data else "streets"
    path = Path(cfg.out or ".").parent / f"fcn8s-{name}-{cfg.size[0]}x{cfg.size[1]}.pt"
    photos = dataset(replace(cfg, limit=0, crop=(0, 0)), "train")
    return common.fcn_scorer(photos, path, device, cfg.vgg, cfg.scorer_width, cfg.scorer_steps)


def touching(label: Tensor, instance: Tensor) -> Tensor:
    """Where two objects of one class touch, (B, H, W) bool: borders that the labels do not show."""
    same = torch.zeros_like(label, dtype=torch.bool)
    for axis in (1, 2):
        n = label.shape[axis] - 1
        here, there = ((t.narrow(axis, 0, n), t.narrow(axis, 1, n)) for t in (label, instance))
        hidden = (here[0] == here[1]) & (there[0] != there[1])
        same.narrow(axis, 0, n).logical_or_(hidden)
        same.narrow(axis, 1, n).logical_or_(hidden)
    return same


def border_contrast(image: Tensor, mask: Tensor) -> Tensor:
    """Fig. 4 as a number: how much grey changes over 3 x 3 pixels, at the pixels of mask."""
    grey = image.mean(1, keepdim=True)
    spread = F.max_pool2d(grey, 3, 1, 1) + F.max_pool2d(-grey, 3, 1, 1)      # maximum - minimum
    return spread[:, 0][mask]


@torch.no_grad()
def evaluate(cfg: Config, state: State) -> dict:
    """The paper's metrics on the test split, beside its tables; writes metrics.json.

    Table 1: a network trained on real photos labels the generated ones; its score on the real test
    photos, the oracle, says how well that can be done at all. Styles are drawn, not encoded.
    """
    device, out = next(plain(state.generator).parameters()).device, Path(cfg.out or ".")
    test_set = dataset(cfg, "test")
    if cfg.task == "pairs":
        raise UserError("evaluate scores images by their label maps; this run's inputs are "
                        "pictures; use sample")
    if "image" not in test_set.roles:
        raise UserError(f"--data {cfg.data}: its test split has no photos, so there is no truth to "
                        "compare with; use sample")
    table, scorer = class_table(cfg.classes), scorer_for(cfg, device)
    confusion, contrast, l1 = {}, {}, []
    for i in tqdm(range(len(test_set)), desc="evaluate", unit="image", disable=None):
        pair = pair_of(test_set[i], cfg, device)
        x_hat = synthesise(state, pair, cfg, cfg.seed)
        l1.append((x_hat - pair["image"]).abs().mean().item())
        for row, view in {"output": x_hat, "truth": pair["image"]}.items():
            counts = common.confusion_matrix(scorer(view).argmax(1), pair["label"], table).cpu()
            confusion[row] = confusion.get(row, 0) + counts
            if "instance" in pair:
                mask = touching(pair["label"], pair["instance"])
                contrast.setdefault(row, []).append(border_contrast(view, mask).cpu())
    metrics = {"images": len(l1), "L1": sum(l1) / len(l1)}
    metrics |= {row: common.segmentation_scores(counts) for row, counts in confusion.items()}
    for row, values in contrast.items():
        if len(torch.cat(values)):              # some objects of one class touch
            metrics[row]["border contrast"] = torch.cat(values).mean().item()
    report(metrics, cfg)
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2))
    return metrics


def report(metrics: dict, cfg: Config) -> None:
    """The metrics as text beside the paper's. Its data and scorer are others: compare orderings."""
    def line(name: str, accuracy: float, iou: float, contrast: float = math.nan) -> None:
        print(f"  {name:48}{accuracy:8.2f}{iou:10.4f}"
              + (f"{contrast:10.3f}" if math.isfinite(contrast) else ""))

    print(f"\n{metrics['images']} test images, L1 {metrics['L1']:.4f} for values in [-1, 1] "
          "(nothing here minimises it)")
    print(f"\n{'Table 1, by our own scorer':46}{'pixel acc':>12}{'mean IoU':>10}   contrast where"
          "\n" + " " * 71 + "objects of one class touch")
    for row, name in (("output", f"this run: {cfg.generator}, {cfg.loss}, {cfg.scales} scale(s)"),
                      ("truth", "real photos (oracle)")):
        scores = metrics[row]
        line(name, 100 * scores["per-pixel acc"], scores["class IOU"],
             scores.get("border contrast", math.nan))
    print("  the paper's, on Cityscapes:")
    for name, values in TABLE_1.items():
        line(f"Table 1, {name}", *values)
    for name, values in SLIDES_GENERATORS.items():
        line(f"slides, generator {name}", *values)
    for n, values in SLIDES_SCALES.items():
        line(f"slides, {n} scale(s) of D", *values)
    for loss, percent in PREFERENCE.items():
        print(f"  people, full loss against {loss}: {percent} % prefer the full loss")


# --------------------------------------------------------------------------- 7 Command line

def trace(cfg: Config) -> None:
    """One forward and one training step: shapes, parameters; then FLOPs, fields and memory."""
    device = pick_device(cfg)
    cfg, _, _ = open_data(replace(cfg, compile=False))
    announce(plan(cfg))
    cfg = plan(cfg)[-1].cfg
    state = build(cfg, device)
    train_set = dataset(cfg, "train")
    batch = to_pair(default_collate([train_set[i] for i in range(cfg.batch_size)]), cfg, device)
    s, x = batch["input"], batch["image"]
    print(f"{device}; input {tuple(s.shape)}, image {tuple(x.shape)}")
    wide = torch.cat([s, s.new_zeros(len(s), cfg.features, *s.shape[2:])], 1)
    for title, net, inputs in (("generator", state.generator, (wide,)),
                               ("discriminator", state.discriminator, (s, x)),
                               ("encoder", state.encoder, (x,))):
        if net is None:
            continue
        print(f"\n{title:34}{'output':>20}{'parameters':>14}")
        hooks = [module.register_forward_hook(
            lambda module, _, y, name=name: print(f"  {name:32}{str(tuple(y.shape)):>20}"
                f"{sum(p.numel() for p in module.parameters()):14,}"))
            for name, module in net.named_modules()
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and "branch" not in name
            or isinstance(module, ResidualBlock)]
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            net(*inputs)
        for hook in hooks:
            hook.remove()
        print(f"  {'in all':52}{sum(p.numel() for p in net.parameters()):14,}   "
              f"{flops.get_total_flops() / 1e9:.2f} GFLOP forward")
    with FlopCounterMode(display=False) as flops:
        train_step(state, batch, cfg)
    clock = time.time()
    losses = ", ".join(f"{k} {v.item():.4f}" for k, v in train_step(state, batch, cfg).items())
    print(f"\none training step: {flops.get_total_flops() / 1e9:.1f} GFLOP, "
          f"{time.time() - clock:.3f} s, {peak_memory(device):.2f} GiB at most; {losses}")
    fields = ", ".join(f"{receptive_field(k)}" for k in range(cfg.scales))
    print(f"receptive fields of D's scales: {fields} pixels, asked of the gradient")


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


def receptive_field(scale: int) -> int:
    """The side of the square of input pixels that one unit of D_(scale + 1) depends on."""
    net = MultiScaleDiscriminator(4, 1, scale + 1)
    for layer in (layer for d in net.scales for layer in d.layers):
        for i, module in enumerate(layer):      # a normalisation would couple all pixels
            if isinstance(module, nn.GroupNorm):
                layer[i] = nn.Identity()
    n = 160 * 2 ** scale
    x = torch.zeros(1, 3, n, n, requires_grad=True)
    verdicts = net(torch.zeros(1, 1, n, n), x)[scale][-1]
    verdicts[0, 0, verdicts.shape[2] // 2, verdicts.shape[3] // 2].backward()
    rows = x.grad[0].abs().sum((0, 2)).nonzero()
    return int(rows.max() - rows.min() + 1)


class Edit(argparse.Action):
    """Collects --set, --style, ... in one list, in the order of the command line."""

    def __call__(self, parser, namespace, values, option_string=None):
        edits = getattr(namespace, "edits", [])
        namespace.edits = [*edits, (option_string.removeprefix("--"), values or "")]


def refuse(text: str) -> None:
    """In place of argparse's own way, which prints a screen of usage before the one line."""
    raise UserError(f"{text}; --help lists all flags")


def parser() -> argparse.ArgumentParser:
    """A flag per field of Config, and a few for the call; only those given are in the result."""
    p = argparse.ArgumentParser(
        f"{NAME}.py", description=__doc__.split("\n\n")[0], epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    p.error = refuse
    add = p.add_argument
    add("mode", nargs="?", default="train", help="what to do (train)",
        choices=("train", "sample", "edit", "encode", "evaluate", "check", "trace"))
    add("--data", metavar="DIR", help="a dataset in any known layout (the built-in streets)")
    add("--preset", choices=PRESETS, help="a released script's settings (toy with the streets)")
    add("--task", choices=CHOICES["task"], help="what is made from what (labels2photo)")
    add("--direction", choices=("AtoB", "BtoA"), help="of pairs, which half is the input (AtoB)")
    add("--classes", metavar="N|NAME", help="a number, or a table of common.py (the data's)")
    add("--no-boundary", dest="boundary", action="store_false", help="labels only (Sec. 3.3)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels, at the end (1024 2048)")
    add("--crop", type=int, nargs=2, metavar=("H", "W"), help="windows for the enhancers (0: none)")
    add("--no-mirror", dest="mirror", action="store_false", help="no random flips")
    add("--limit", type=int, metavar="N", help="use the first N examples (0: all)")
    add("--generator", choices=CHOICES["generator"], help="the slides' table (coarse-to-fine)")
    add("--enhancers", type=int, metavar="N", help="0: G1; 1: and G2; 2: and G3 (1)")
    add("--width", type=int, metavar="N", help="channels after G1's first layer (64)")
    add("--downs", type=int, metavar="N", help="halvings in G1 (4)")
    add("--blocks", type=int, metavar="N", help="residual blocks in G1 (9)")
    add("--enhancer-blocks", type=int, metavar="N", help="residual blocks in an enhancer (3)")
    add("--scales", type=int, metavar="N", help="discriminators at the full size; Eq. (2) (3)")
    add("--d-width", type=int, metavar="N", help="channels after D's first layer (64)")
    add("--features", type=int, metavar="N", help="numbers per object; 3 in Sec. 4 (0: no E)")
    add("--e-width", type=int, metavar="N", help="channels after E's first layer (16)")
    add("--pool", choices=CHOICES["pool"], help="over what E's map is averaged (instance)")
    add("--loss", choices=CHOICES["loss"], help="Sec. 4.2 (GAN+FM+VGG)")
    add("--gan", choices=CHOICES["gan"], help="least squares, or Eq. (1) as written (lsgan)")
    add("--lambda-fm", type=float, metavar="X", help="lambda in Eq. (4) (10)")
    add("--lambda-vgg", type=float, metavar="X", help="weight of the perceptual loss (10)")
    add("--smooth", action=argparse.BooleanOptionalAction, help="average away dots in G; ours")
    add("--fm-mean", action="store_true", help="average Eq. (3) over the scales; released code")
    add("--vgg", metavar="WEIGHTS", help="VGG's weights: imagenet, random or a file (imagenet)")
    add("--vgg-normalise", action="store_true", help="ImageNet's mean and deviation before VGG")
    add("--stage", choices=CHOICES["stage"], help="train one stage alone, from --init (all)")
    add("--epochs", type=int, metavar="N", help="passes that train G1 (the preset's)")
    add("--fine-epochs", type=int, metavar="N", help="passes of each enhancer (the preset's)")
    add("--enhancer-epochs", type=int, metavar="N", help="of these, with the rest frozen (10)")
    add("--steps", type=int, metavar="N", help="end after so many updates (0: epochs decide)")
    add("--batch-size", type=int, metavar="N", help="images per step and process (1)")
    add("--lr", type=float, metavar="X", help="Adam's learning rate (0.0002)")
    add("--betas", type=float, nargs=2, metavar="B", help="Adam's momentum parameters (0.5 0.999)")
    add("--seed", type=int, metavar="N", help="of initialisation, order, flips and styles (0)")
    add("--init", nargs="+", metavar="FILE", help="start from these weights, ours or the authors'")
    add("--resume", action="store_true", help="continue the run in --out, or the newest, exactly")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints (0: an epoch)")
    add("--stored-features", action="store_true", help="E rests in fine stages; released code")
    add("--clusters", type=int, metavar="N", help="styles per class, K of K-means (10)")
    add("--min-area", type=float, metavar="X", help="share of the image to be clustered (1/64)")
    add("--checkpoint", nargs="+", metavar="FILE", help="to test with (the newest run's)")
    add("--clusters-file", metavar="FILE", help="encode: take the authors' clusters (none)")
    add("--input", metavar="PATH", help="sample, edit: a file or folder, any size (the test split)")
    add("--instances", metavar="PATH", help="sample, edit: the instance maps of --input")
    add("--output", metavar="PATH", help="sample, edit: a file or a folder (in the run's folder)")
    add("--samples", type=int, metavar="N", help="sample: outputs per input (1)")
    add("--vary", nargs="+", metavar="CLASS", help="sample: draw new styles for these only (all)")
    add("--reference", nargs=2, metavar=("PHOTO", "LABEL"), help="sample: the style of a photo")
    add("--item", metavar="NAME", help="edit: an example of the test split (the first)")
    for name, form in EDIT_FORMS.items():
        add(f"--{name}", dest="edits", action=Edit, metavar=form or None, nargs=None if form else 0,
            help={"set": "edit: give an object another class", "style": "edit: another style",
                  "remove": "edit: take it out; a class or its surroundings fill the hole",
                  "paste": "edit: add a copy, so many pixels away",
                  "paint": "edit: fill a rectangle with a class",
                  "undo": "edit: take back the change before"}[name])
    add("--scorer-width", type=int, metavar="N", help="FCN-8s scorer: 64 is VGG-16 (64)")
    add("--scorer-steps", type=int, metavar="N", help="FCN-8s scorer: batches of four (2000)")
    add("--gpu", type=int, metavar="N", help="CUDA device, -1 the CPU (the first GPU if any)")
    add("--workers", type=int, metavar="N", help="processes that load data (4 with a GPU, else 0)")
    add("--precision", choices=CHOICES["precision"], help="bf16: autocast the networks (fp32)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--channels-last", action=argparse.BooleanOptionalAction, help="memory order (with a GPU)")
    add("--out", metavar="DIR", help="the run's folder (the next free runs/pix2pixhd-N)")
    return p


EXAMPLES = """examples:
  python pix2pixhd.py                                   train on the built-in streets
  python pix2pixhd.py sample --samples 4 --vary car     four times other cars
  python pix2pixhd.py edit                              list the objects of the first test scene"""
# Flags of the one call, by the modes that read them; all others are fields of Config.
CALL = {"preset": ("train", "check", "trace", "sample", "evaluate"), "resume": ("train",),
        "checkpoint": ("sample", "evaluate", "edit", "encode"), "input": ("sample", "edit"),
        "instances": ("sample", "edit"), "output": ("sample", "edit"), "samples": ("sample",),
        "vary": ("sample",), "reference": ("sample",), "item": ("edit",), "edits": ("edit",),
        "clusters_file": ("encode",)}
# What may differ from the checkpoint when a run goes on, and when it is tested.
FREE = {"data", "epochs", "fine_epochs", "steps", "save_every", "gpu", "workers", "precision",
        "compile", "channels_last", "out"}
FREE_AT_TEST = FREE | {"size", "limit", "seed", "vgg", "clusters", "min_area", "scorer_width",
                       "scorer_steps"}


def load_for_test(mode: str, given: dict, call: dict) -> tuple[Config, State]:
    """Networks and config of --checkpoint or the newest run. A released G tells its own shape."""
    paths = [Path(p) for p in call.get("checkpoint", ())] or [
        (Path(given["out"]) if "out" in given else newest_run()) / "checkpoint.pt"]
    contents = [read_checkpoint(path) for path in paths]       # once: at full size they are large
    stored, named = contents[0], [our_names(*both) for both in zip(contents, paths)]
    if "released" in stored:
        cfg = released_config(paths[0], named, given, call)
    elif "preset" in call:
        raise UserError(f"--preset {call['preset']}: {paths[0]} knows its settings; leave the flag "
                        "out")
    else:
        cfg = stored_config(stored, paths[0], given, FREE_AT_TEST)
        cfg = replace(plan(cfg)[stored["stage"]].cfg, out=given.get("out", str(paths[0].parent)),
                      crop=(0, 0))
        cfg = replace(cfg, **{k: given[k] for k in ("size",) if k in given})
    check_config(cfg)
    vgg = {"loss": "GAN+FM"} if "VGG" in cfg.loss else {}          # testing needs no VGG-19
    state = build(replace(cfg, compile=False, init=(), **vgg), pick_device(cfg))
    for path, weights in zip(paths, named):
        fill(state, weights, path)
    for name in {"styles", "means"} & stored.keys():
        setattr(state, name, stored[name])
    if state.encoder is not None and "config" in stored and mode != "encode" and (
            "reference" not in call):           # with as many photos as the run had
        need_styles(state, replace(cfg, limit=stored["config"]["limit"]))
    return cfg, state


def released_config(path: Path, named: list[dict], given: dict, call: dict) -> Config:
    """The shape of the authors' networks from their weights, the classes from the data."""
    both = {name: weights for one in named for name, weights in one.items()}
    if "generator" not in both:
        raise UserError(f"{path}: no generator; to test, give its file, too")
    if not {"input", "data"} & set(given | call):
        raise UserError(f"{path}: released weights know no dataset; say --input or --data")
    weights, n = both["generator"], sum(
        k.endswith(".front.0.weight") for k in both["generator"]) - 1
    first = weights["globe.front.0.weight"]
    features = 0
    if "encoder" in both:
        features = both["encoder"]["output.0.weight"].shape[0]
    classes = given.get("classes") or (dataset(replace(Config(), **given), "test").classes
                                       if "data" in given else "cityscapes")
    rest = first.shape[1] - features - class_table(classes).channels if classes else -1
    if first.shape[1] - features != 3 and rest not in (0, 1):
        raise UserError(f"{path}: takes {first.shape[1]} channels, the {classes} labels have "
                        f"{class_table(classes).channels}; a boundary adds 1, an encoder (give its "
                        "file, too) adds its features; --classes says otherwise")
    shape = dict(
        width=first.shape[0], enhancers=n, features=features, classes=classes,
        task="labels2photo" if rest in (0, 1) else "pairs", boundary=rest == 1,
        downs=sum(k.startswith("globe.back") and k.endswith("weight") for k in weights),
        blocks=sum(k.startswith("globe.residual") and k.endswith("branch.0.weight")
                   for k in weights), e_width=len(both["encoder"]["layers.0.bias"]) if features
        else 16, enhancer_blocks=sum(k.startswith("enhancers.0.residual") and
                                     k.endswith("branch.0.weight") for k in weights) or 3,
        pool="instance" if rest == 1 else "label", loss="GAN+FM", out="runs/released", stage="joint"
        if n else "global")
    return replace(Config(**shape), **PRESETS.get(call.get("preset"), {}) | given)


def main(arguments: list[str] | None = None) -> None:
    """The command line: arguments -> config -> mode. Raises UserError for a user's mistake."""
    arguments, p = sys.argv[1:] if arguments is None else arguments, parser()
    flags = {name for action in p._actions for name in action.option_strings}
    for word in arguments:                      # argparse would take its value for the mode
        if word.startswith("--") and word.partition("=")[0] not in flags:
            raise UserError(f"{word}: no such flag; --help lists all")
    given = vars(p.parse_args(arguments))
    mode, call = given.pop("mode"), {k: given.pop(k) for k in CALL if k in given}
    given, call = ({k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()}
                   for flags in (given, call))
    for name in call:
        if mode not in CALL[name]:
            what = f"--{call[name][0][0]}" if name == "edits" else flag(name)
            raise UserError(f"{what} goes with {' or '.join(CALL[name])}, not with {mode}")
    if "instances" in call and "input" not in call:
        raise UserError("--instances: goes with --input, whose instance maps it names")
    for name, other in (("item", "input"), ("samples", "reference"), ("vary", "reference")):
        if name in call and other in call:
            raise UserError(f"--{name} with --{other}: only one of them can choose")
    resume = call.get("resume", False)
    if resume and "preset" in call:
        raise UserError(f"--preset {call['preset']} with --resume: the run knows its settings")
    if mode in ("sample", "evaluate", "edit", "encode"):
        cfg, state = load_for_test(mode, given, call)
        if mode == "evaluate":
            evaluate(cfg, state)
        elif mode == "encode":
            encode_again(cfg, state, call)
        elif mode == "sample":
            sample(cfg, state, call.get("input", ""), call.get("output", ""),
                   call.get("samples", 1), given.get("size"), call.get("instances", ""),
                   call.get("vary", ()), call.get("reference", ()))
        else:
            edit(cfg, state, call.get("edits", ()), scene(cfg, given, call), call.get("output", ""))
        return
    if resume:
        path = (Path(given["out"]) if "out" in given else newest_run()) / "checkpoint.pt"
        cfg = stored_config(read_checkpoint(path), path, given, FREE)
        cfg = replace(cfg, out=str(path.parent), init=())
    else:
        preset = call.get("preset", "" if given.get("data") else "toy")
        shape = PRESETS.get(preset, {})
        if given.get("generator", "coarse-to-fine") != "coarse-to-fine":
            shape = shape | {"enhancers": 0}
        cfg = replace(Config(), **shape | given)
        if cfg.stage in ("enhancer", "joint") and not cfg.init:
            notice(f"--stage {cfg.stage} without --init: G1 starts from random weights")
    check_config(cfg)
    if mode == "check":
        splits = [dataset(replace(cfg, mirror=False, crop=(0, 0)), s) for s in ("train", "test")]
        bad = common.check_data(splits, Path(cfg.out) if cfg.out else next_run("check"))
        if bad:
            raise UserError(f"--data {cfg.data}: {bad} bad file(s), listed above")
    elif mode == "trace":
        trace(cfg)
    else:
        train(cfg, resume)


def scene(cfg: Config, given: dict, call: dict) -> dict:
    """The item to edit: --input, or an example of the test split by --item."""
    if "input" in call:
        item = read_input(Path(call["input"]), cfg, call.get("instances", ""))
        return resize_item(item, given["size"]) if "size" in given else item
    test_set = dataset(cfg, "test")
    name = call.get("item", test_set.names[0])
    if name not in test_set.names:
        raise UserError(f"--item {name}: not in the test split, which has "
                        + ", ".join(test_set.names[:5]) + ", ...")
    return test_set[test_set.names.index(name)]


def encode_again(cfg: Config, state: State, call: dict) -> None:
    """The mode encode: new styles, computed or read, into the checkpoint."""
    path = Path(call["checkpoint"][0]) if "checkpoint" in call else Path(cfg.out) / "checkpoint.pt"
    stored = read_checkpoint(path)
    if state.encoder is None or "released" in stored:
        raise UserError(f"{path}: " + ("the authors' file cannot hold styles; start a run from it "
                        "with --init" if "released" in stored else "has no encoder; train with "
                        "--features 3"))
    if "clusters_file" in call:
        state.styles = read_clusters(Path(call["clusters_file"]))
        n = class_table(cfg.classes).channels
        if not state.styles or any(k not in range(n) or v.shape[1] != cfg.features
                                   for k, v in state.styles.items()):
            raise UserError(f"{call['clusters_file']}: holds classes {sorted(state.styles)}; this "
                            f"run has classes 0 to {n - 1}, with {cfg.features} numbers each")
    else:
        encode(cfg, state)
    common.save_file(stored | {"styles": state.styles, "means": state.means}, path)
    print(f"{sum(map(len, state.styles.values()))} styles of {len(state.styles)} classes: {path}")


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
