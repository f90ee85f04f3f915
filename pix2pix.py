"""pix2pix: one recipe for paired image-to-image translation.

P. Isola, J.-Y. Zhu, T. Zhou, A. A. Efros. Image-to-Image Translation with Conditional Adversarial
Networks. CVPR 2017. Section, equation and table numbers are those of arXiv v3 (1611.07004).

Idea. A generator G turns an input x (a label map, edges, a grey photo) into an image. An L1 loss
makes it land near the true image y, but blurred: where several images are possible for x, it takes
their median. A second network D learns to tell (x, y) from (x, G(x)), patch by patch. G has to
avoid whatever D recognises as false, blur for instance, so D is a loss that nobody had to design.
Skip connections carry the layout past G's bottleneck. Nothing is tuned per task.

Symbols     x batch["input"]   y batch["image"]   y_hat = G(x, z)   z the dropout in G

Paper map
    Eq. (1)     conditional GAN loss               discriminator_loss, generator_loss
    Eq. (2)     unconditional GAN loss             PatchDiscriminator, with conditional=False
    Eq. (3)     L1 loss                            l1_loss
    Eq. (4)     the objective, lambda = 100        train_step
    Sec. 3.3    D halved, D then G                 discriminator_loss, train_step
    Sec. 3.3    at test time as in training        BatchNorm, Up, translate
    Table 1     losses, FCN-score                  evaluate, after train --loss cGAN, ...
    Table 2     generators, FCN-score              evaluate, after train --generator encoder-decoder
    Table 3     receptive fields of D, FCN-score   evaluate, after train --patch 16, ...
    Table 4     perceptual study of maps           needs people; translate makes its images
    Table 5     perceptual study of colorization   needs people; translate makes its images
    Table 6     photo to labels                    evaluate, nearest_colour
    Fig. 1      samples of every task              PRESETS, sample
    Fig. 2      D sees the edge map and the photo  PatchDiscriminator
    Fig. 3      encoder-decoder and U-Net          Generator
    Fig. 4      L1, cGAN, L1+cGAN side by side     sample, after train --loss L1, ...
    Fig. 5      generators side by side            sample, after train --generator encoder-decoder
    Fig. 6      patch sizes side by side           sample, after train --patch 16, ...
    Fig. 7      Lab histograms, intersections      colour_histograms, histogram_intersection
    Fig. 8      512 x 512 from a 256 x 256 model   translate
    Fig. 9      colorization                       make_pair, rgb_to_lab, lab_to_rgb
    Fig. 10     semantic segmentation              train --preset cityscapes-photo2labels
    Fig. 11-12  the community's uses               nothing to reproduce
    Fig. 13-20  more samples of each task          PRESETS, sample
    Fig. 21     failures                           evaluate, which draws the worst outputs by L1

Paper                             | Released code                     | Here
    all convolutions have stride 2| the last two of D have stride 1   | stride 1: else D sees 94
    BatchNorm on the bottleneck   | removed (errata, Sec. 6.3)        | removed; --bottleneck-norm
    all encoder ReLUs are leaky   | plain ReLU after the bottleneck   | plain ReLU
    dropout in decoder blocks 1-3 | Lua 1-3, PyTorch 2-4 (of 7: 2-3)  | 1-3; --released 2-4
    D's objective is halved       | Lua: only in what it reports      | halved
    constant learning rate        | PyTorch: falls in the second half | constant; --released and our
                                  |   to 0 in the last epoch          |   --decay: 0 after the last
    G's step after D's            | Lua: with D's old activations     | D judges anew, as in PyTorch
    L1 is a norm, a sum           | the mean over all elements        | mean; lambda refers to it
    sigmoid, then log             | PyTorch: logits                   | logits, without overflow
    the last layer of G is "a     | transposed, stride 2              | transposed: 8 halvings, 8
      convolution"                |                                   |   doublings
    the decoder's convolutions    | transposed; early in training     | the same; in toy, ours,
      upsample by 2               |   they make a checkerboard        |   --generator unet-smooth
    gains of BatchNorm not stated | N(1, 0.02)                        | N(1, 0.02)
    biases not stated             | Lua zeroes them, PyTorch has none | none before a norm, e1, e8
    jitter's filter not stated    | Lua bilinear, PyTorch bicubic     | bicubic; ids by nearest
    channel order not stated      | Lua BGR, PyTorch RGB              | RGB
    label maps as colour images   | the same, as JPEG                 | colours of ids, exact
    order of images not stated    | Lua draws with replacement        | each image once per epoch
    test as in training           | the same; PyTorch has --eval      | the same
    FCN-8s trained on Cityscapes  | its weights are gone; it scores   | FCN-8s trained on your
                                  |   at 1024 x 2048                  |   photos, scored at --size
    receptive fields 1, 16, 70,   | any number of layers              | 34 and 142 by the same rule
      286                         |                                   |
    IOU: absent classes not said  | they count as 0                   | they are left out
    8 bits of an image not stated | cut off                           | rounded

Run         python pix2pix.py                               built-in streets, minutes on a laptop
            python pix2pix.py --data ./cityscapes --gpu 0   the last line of Table 1
            python pix2pix.py sample --input label.png --output photo.png
"""

import atexit
import itertools
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

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
    COUNT, POSITIVE, UserError, Within, check_settings, check_sides, class_table, colour_label,
    draw_seed, find_preset, flag, notice, save_images, setting)

NAME = "pix2pix"
NETWORKS = ("generator", "discriminator")       # in State; the first is what testing needs
MODES = ("train", "sample", "evaluate", "check", "trace")
TRAIN, SAMPLE, BEFORE = ("train",), ("sample",), ("train", "check", "trace")    # who knows a flag

# ---------------------------------------------------------------------------------- 1 Config

@dataclass
class Config:
    """Every setting is a flag. The defaults are the paper's; the text says where it states them."""
    # The task. An image x of some kind goes in and the image y that belongs to it is made; only
    # here do the experiments of Sec. 4 differ, the networks and the loss are always the same.
    data: str = setting("", "folder in a known layout; none: built-in streets", free="resume")
    task: str = setting("labels2photo", "what is made from what, Sec. 4", (
        "labels2photo", "photo2labels", "pairs", "colorization", "inpainting"))
    direction: str = setting("AtoB", "which half of a pair is the input", ("AtoB", "BtoA"))
    classes: str = setting("", "a table of common.py, or a number; none: asks the data")
    size: tuple[int, int] = setting((256, 256), "height, width, Sec. 6.2", POSITIVE, free="test")
    augment: str = setting("jitter", "enlarge by 286/256, crop, mirror; or mirror alone, Sec. 6.2",
                           ("jitter", "mirror", "none"))
    limit: int = setting(0, "use the first so many; 0: all (400 streets)", COUNT, free="test")
    # The networks. G and D have the same width; width 64 is the paper's, and G has then 54 million
    # parameters, D 2.8 million. unet-smooth, ours, averages away a transposed convolution's grid.
    generator: str = setting("unet", "Table 2, Sec. 6.1.1",
                             ("unet", "encoder-decoder", "unet-smooth"))
    width: int = setting(64, "channels after the first layer of G and of D, Sec. 6.1", POSITIVE)
    levels: int = setting(0, "halvings in G, 8 at 256; 0: all that size allows", Within(0, 8))
    bottleneck_norm: bool = setting(False, "BatchNorm on the innermost map, Sec. 6.3")
    patch: int = setting(70, "D's receptive field, Sec. 6.1.2", (1, 16, 34, 70, 142, 286))
    # The objective, Eq. (4): cGAN is D(x, y), GAN is D(y) alone, L1 is the distance to the photo.
    loss: str = setting("L1+cGAN", "Table 1", ("L1", "GAN", "cGAN", "L1+GAN", "L1+cGAN"))
    lambda_l1: float = setting(100.0, "lambda in Eq. (4), for images in [-1, 1]; Sec. 4.2", COUNT)
    # Training. The paper counts in epochs; an epoch of 2975 images in batches of one is 2975 steps.
    epochs: int = setting(200, "passes over the training set, Sec. 6.2", POSITIVE, free="resume")
    steps: int = setting(0, "end after so many updates; 0: epochs decide", COUNT, free="resume")
    batch_size: int = setting(1, "images per step and process; 10 in Table 2, Sec. 6.2", POSITIVE)
    lr: float = setting(0.0002, "Adam's, both networks, Sec. 3.3", Within(1e-9, 0.9))
    decay: bool = setting(False, "ours, in toy: lr falls to 0 in the second half")
    released: bool = setting(False, "as the PyTorch release: lr falls, dropout from block 2 on")
    seed: int = setting(0, "of initialisation, order, crops and noise", common.SEED, free="test")
    init: tuple[str, ...] = setting((), "begin with these weights: ours, or the authors'",
                                    modes=TRAIN, free="call")
    # Evaluation. The scorer is the network that labels generated photos, Sec. 4.1.
    vgg: str = setting("imagenet", "scorer's start: imagenet, small, random, a file", free="test")
    # The machine
    gpu: int | None = setting(None, "number; -1: the CPU; none: the first", Within(-1), free="call")
    workers: int | None = setting(None, "data processes; none: 4 with a GPU", COUNT, free="resume")
    precision: str = setting("fp32", "bf16: autocast", ("fp32", "bf16"), free="resume")
    compile: bool = setting(False, "torch.compile the networks", free="resume")
    channels_last: bool | None = setting(None, "memory order; none: with a GPU", free="resume")
    out: str = setting("", "the run's folder; none: the next runs/pix2pix-N", free="call")
    # One call
    preset: str = setting("", "a line of Sec. 6.2; none: toy with the streets", modes=BEFORE)
    resume: bool = setting(False, "go on with --out, or the newest run", modes=TRAIN, free="call")
    checkpoint: tuple[str, ...] = setting((), "to test or resume, also the authors'; none: newest",
                                          modes=("train", "sample", "evaluate"), free="call")
    input: str = setting("", "a file or folder; none: the test split", modes=SAMPLE, free="call")
    output: str = setting("", "a file or folder; none: test/ in --out", modes=SAMPLE, free="call")
    samples: int = setting(1, "outputs per input", POSITIVE, modes=SAMPLE, free="call")

    # No flag: as what the training data were understood, by common.Dataset.
    understood: dict = field(default_factory=dict)

    def __post_init__(self):
        check_settings(self)


# Sec. 6.2, line by line. Where it is silent on jitter and mirroring: on, as in both releases.
# Directions are those of the authors' side-by-side files: facades and cityscapes hold (photo,
# labels), maps (aerial, map), night2day (night, day), the edges sets (edges, photo). Its sketches
# test the edges models and train none.
PRESETS = {
    "cityscapes": dict(direction="BtoA", epochs=200, batch_size=1),                 # 2975 images
    # The runs of Table 2 had batch size 10 (Sec. 6.2) and BatchNorm on the bottleneck (Sec. 6.3).
    "cityscapes-batch10": dict(direction="BtoA", epochs=200, batch_size=10, bottleneck_norm=True),
    # Table 6; it has no line of its own in Sec. 6.2, so this is the line of its inverse.
    "cityscapes-photo2labels": dict(task="photo2labels", epochs=200, batch_size=1),
    "facades": dict(direction="BtoA", epochs=200, batch_size=1),                    # 400
    "map2aerial": dict(task="pairs", direction="BtoA", epochs=200, batch_size=1),   # 1096
    "aerial2map": dict(task="pairs", epochs=200, batch_size=1),                     # 1096
    "colorization": dict(task="colorization", epochs=6, batch_size=4, augment="mirror"),  # 1.2 M
    "edges2shoes": dict(task="pairs", epochs=15, batch_size=4),                     # 50 000
    "edges2handbags": dict(task="pairs", epochs=15, batch_size=4),                  # 137 000
    "day2night": dict(task="pairs", direction="BtoA", epochs=17, batch_size=4),     # 17 823
    "thermal2color": dict(task="pairs", epochs=10, batch_size=4),                   # 36 609
    "inpainting": dict(task="inpainting", epochs=25, batch_size=4),                 # 14 900
    # Ours, for the streets on a laptop's CPU. Adam moves each weight by about lr, however few there
    # are: a net of a quarter of the width needs a larger one to change its output as fast. The
    # decay then calms it within the few epochs that there are. D sees a quarter of the side, 34
    # pixels of 128, as the paper's 70 of 256. Of 400 streets it learns many by heart, and what G
    # then paints against it are spots that no street has.
    "toy": dict(size=(128, 128), limit=1000, width=16, levels=5, patch=34, epochs=8, lr=1e-3,
                decay=True, generator="unet-smooth", vgg="small"),
}
# Ours, too: the same for half an hour, on more streets.
PRESETS["streets"] = PRESETS["toy"] | dict(limit=2000, epochs=10)
PATCHES = {1: 0, 16: 1, 34: 2, 70: 3, 142: 4, 286: 5}   # D's receptive field: its halvings


def configure(preset: str, given: dict) -> Config:
    """The paper's settings, then a preset's, then what was given."""
    return Config(**{"preset": preset} | find_preset(PRESETS, "--preset", preset) | given)


def fit_levels(cfg: Config) -> Config:
    """The number of halvings that the training size allows, at most the paper's 8."""
    deepest = max(k for k in range(9) if all(side % 2 ** k == 0 for side in cfg.size))
    halvings = 0 if cfg.loss == "L1" else PATCHES[cfg.patch]    # D ends in maps of 3 x 3 or more
    check_sides("--size", cfg.size, 2 ** max(cfg.levels, 4), max(32, 3 * 2 ** halvings),
                f"G halves each side {cfg.levels or '4 to 8'} times, D {halvings} times")
    return replace(cfg, levels=cfg.levels or deepest)


# -------------------------------------------------------------------------------- 2 Networks

class BatchNorm(nn.BatchNorm2d):
    """BatchNorm with the statistics of the batch at hand, at test time too (Sec. 3.3).

    With one image in the batch this is instance normalisation. The running averages, which nothing
    here uses, are kept since the released files hold them.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[1]:             # one value per channel equals its mean: 0 is left,
            return x * 0 + self.bias.view(1, -1, 1, 1)   # and beta. Sec. 6.3: "zeroed" activations
        mean, var = (self.running_mean, self.running_var) if self.training else (None, None)
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)


class Down(nn.Module):
    """Encoder block: LeakyReLU(0.2), convolution, BatchNorm; halves H and W.

    The paper writes convolution, BatchNorm, ReLU. With each ReLU moved to the front of the next
    block it is the same chain. A skip then carries a value v before its activation. That changes
    nothing, since the decoder begins with a ReLU, and ReLU(LeakyReLU(v)) = ReLU(v).
    """

    def __init__(self, c_in: int, c_out: int, norm: bool = True, first: bool = False):
        super().__init__()
        self.first = first
        self.conv = nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False)
        self.norm = BatchNorm(c_out) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x if self.first else F.leaky_relu(x, 0.2)))


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


class Up(nn.Module):
    """Decoder block: ReLU, transposed convolution, BatchNorm, dropout; doubles H and W.

    The dropout is the noise z, and the only one: given a noise vector, G learned to ignore it
    (Sec. 3.1). Hence it stays on at test time.
    `smooth`, ours, takes the mean of each 2 x 2 window. This removes the checkerboard that a
    transposed convolution leaves early in training, costs some sharpness, and moves the picture
    half a pixel up and left in each block.
    """

    def __init__(self, c_in: int, c_out: int, dropout: bool = False, last: bool = False,
                 smooth: bool = False):
        super().__init__()
        self.dropout, self.smooth = dropout, smooth
        self.conv = nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=last)
        self.norm = nn.Identity() if last else BatchNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.relu(x))
        x = self.norm(smooth_grid(x) if self.smooth else x)
        return F.dropout(x, 0.5, training=True) if self.dropout else x


class Generator(nn.Module):
    """U-Net or encoder-decoder (Sec. 3.2.1 and 6.1.1, Fig. 3).

    x (B, c_x, H, W) in [-1, 1]  ->  y_hat (B, c_y, H, W) in [-1, 1]; H, W multiples of 2^levels.

    With 8 levels and 256 x 256: down C64-C128-C256-C512-C512-C512-C512-C512 to 1 x 1, and up again
    CD512-CD512-CD512-C512-C256-C128-C64 and the output. The U-Net adds skips: up block i also sees
    what down block n - i + 1 made, so its *inputs* are those of the paper's U-Net decoder line,
    512-1024-1024-1024-1024-512-256-128. Here n counts the halvings; the paper joins layer i to
    layer n - i with n the number of all layers, which is the same. Without skips it is the
    encoder-decoder (Sec. 4.3).
    """

    def __init__(self, c_x: int = 3, c_y: int = 3, width: int = 64, levels: int = 8,
                 skips: bool = True, bottleneck_norm: bool = False, first_dropout: int = 1,
                 smooth: bool = False):
        super().__init__()
        self.skips, self.multiple = skips, 2 ** levels
        channels = [width * min(2 ** i, 8) for i in range(levels)]   # 64 128 256 512 512 ...
        self.encoder = nn.ModuleList(
            Down(c_in, c_out, norm=i > 0 and (i < levels - 1 or bottleneck_norm), first=i == 0)
            for i, (c_in, c_out) in enumerate(zip([c_x, *channels], channels)))
        outputs = [*channels[-2::-1], c_y]                           # 512 512 512 512 256 128 64 3
        inputs = [channels[-1]] + [(2 if skips else 1) * c for c in outputs[:-1]]
        # Blocks 1 to 3 have dropout. PyTorch release: all from 2 on that make 512 channels of 1024,
        # which are 2 to 4 with 8 levels and only 2 and 3 with the 7 of its unet_128.
        noisy = range(1, 4) if first_dropout == 1 else range(2, levels - 3)
        self.decoder = nn.ModuleList(
            Up(c_in, c_out, dropout=i in noisy and i < levels, last=i == levels, smooth=smooth)
            for i, (c_in, c_out) in enumerate(zip(inputs, outputs), 1))
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        down = []
        for block in self.encoder:
            x = block(x)
            down.append(x)                                  # e_i (B, C_i, H / 2^i, W / 2^i)
        x = self.decoder[0](down.pop())                     # d_1, from the bottleneck e_n
        for block in self.decoder[1:]:                      # d_i, from [e_(n-i+1), d_(i-1)]
            x = block(torch.cat([down.pop(), x], 1) if self.skips else x)
        return torch.tanh(x)                                # (B, c_y, H, W)


class PatchDiscriminator(nn.Module):
    """Real or fake, asked once for every patch of `patch` x `patch` pixels (Sec. 3.2.2, 6.1.2).

    x (B, c_x, H, W), y (B, c_y, H, W)  ->  logits (B, 1, h, w); 30 x 30 for 256 x 256, patch 70.

    Nobody cuts patches here. A unit of the last map sees 70 x 70 input pixels and no more, so the
    map is a grid of verdicts on overlapping patches, all judged with the same weights. The field
    grows backwards from one unit: kernel 4 and stride s make r into (r - 1) s + 4; for patch 70
    that is 1, 4, 7, 16, 34, 70. A patch at the border sees zeros beyond it, the padding.
    Unconditional (Eq. (2)): D does not see x, and can only say whether y looks like a photo.
    Paper: all convolutions have stride 2. That D would see 94 pixels; 70 needs 1 in the last two.
    """

    def __init__(self, c_x: int = 3, c_y: int = 3, width: int = 64, patch: int = 70,
                 conditional: bool = True):
        super().__init__()
        self.conditional = conditional
        halvings = PATCHES[patch]                           # 0: the PixelGAN, C64-C128 of 1 x 1
        kernel, pad = (4, 1) if halvings else (1, 0)
        c = [width * min(2 ** i, 8) for i in range(max(halvings, 1) + 1)]   # C64-C128-C256-C512
        self.layers = nn.Sequential()
        for i, c_in in enumerate([c_x + c_y if conditional else c_y, *c[:-1]]):
            stride = 2 if i < halvings else 1
            self.layers.append(nn.Conv2d(c_in, c[i], kernel, stride, pad, bias=i == 0))
            if i > 0:                                       # no BatchNorm on the first (Sec. 6.1.2)
                self.layers.append(BatchNorm(c[i]))
            self.layers.append(nn.LeakyReLU(0.2))
        self.layers.append(nn.Conv2d(c[-1], 1, kernel, 1, pad, bias=halvings > 0))   # the logits:
        self.apply(initialise)                              # their sigmoid is in the loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layers(torch.cat([x, y], 1) if self.conditional else y)


def initialise(module: nn.Module) -> None:
    """Weights from N(0, 0.02) (Sec. 6.2). Released code: BatchNorm's gains from N(1, 0.02)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, BatchNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)


# ---------------------------------------------------------------------------------- 3 Losses

def discriminator_loss(d_real: Tensor, d_fake: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (1) and (2), D's side: -E[log D(x, y)] / 2 and -E[log(1 - D(x, G(x)))] / 2, from logits.

    D maximises the sum of both logs, so their negatives are minimised; halved, "which slows down
    the rate at which D learns relative to G" (Sec. 3.3). The mean runs over the batch and over all
    patches.
    """
    real = F.softplus(-d_real).mean() / 2       # softplus(-a) = -log sigmoid(a), without overflow
    fake = F.softplus(d_fake).mean() / 2        # softplus(a) = -log(1 - sigmoid(a))
    return real, fake


def generator_loss(d_fake: Tensor) -> Tensor:
    """Eq. (1) and (2), G's side: -E[log D(x, G(x))], from logits; not halved.

    Read literally, G would minimise E[log(1 - D)], whose gradient vanishes while D is winning.
    Sec. 3.3 maximises log D instead: same fixed point, strong gradient early on.
    """
    return F.softplus(-d_fake).mean()


def l1_loss(y_hat: Tensor, y: Tensor) -> Tensor:
    """Eq. (3): E[||y - G(x)||_1] as a mean over all elements, of images in [-1, 1].

    Paper: a norm, so a sum. Released code: a mean, and lambda = 100 belongs to it. L1 rather than
    L2, since it blurs less (Sec. 3.1): its minimiser is a median, not a mean.
    """
    assert y_hat.shape == y.shape, (y_hat.shape, y.shape)   # 1 and 3 channels would broadcast
    return (y_hat - y).abs().mean()


# -------------------------------------------------------------------------------- 4 Training

@dataclass
class State:
    """What training changes; a checkpoint holds it, the place in the data and the log.

    D is a part of the objective rather than of the result: to test a run, G alone is needed.
    """
    generator: nn.Module
    discriminator: nn.Module | None             # None with --loss L1
    opt_g: torch.optim.Optimizer
    opt_d: torch.optim.Optimizer | None


NEEDED = {"labels2photo": "label", "photo2labels": "label", "pairs": "A"}    # task: kind of file


def dataset(cfg: Config, split: str, **changes) -> common.Dataset:
    """One split. What is random about an example, its crop and flip, is the same for x and y."""
    train = split == "train"
    return common.Dataset(**dict(
        data=cfg.data, split=split, size=cfg.size, jitter=train and cfg.augment == "jitter",
        mirror=train and cfg.augment != "none", limit=cfg.limit, classes=cfg.classes,
        direction=cfg.direction, seed=cfg.seed,
        photos_only=cfg.task in ("colorization", "inpainting"), instances=False,
        understood=cfg.understood) | changes)


def open_data(cfg: Config) -> tuple[Config, common.Dataset, common.Dataset]:
    """Both splits, and the config with what the data turned out to be: its classes, its task."""
    train_set = dataset(cfg, "train").require("image")
    cfg = replace(fit_levels(cfg), classes=train_set.classes, understood=train_set.understood)
    if not cfg.resume and cfg.task == "labels2photo" and "label" not in train_set.roles:
        cfg = replace(cfg, task="pairs")        # label maps that are colour images beside photos
    train_set.require(NEEDED.get(cfg.task), "another --task may do without")
    return cfg, train_set, dataset(cfg, "test")


def networks(cfg: Config) -> tuple[Generator, PatchDiscriminator | None]:
    """G and D with the channels that the task calls for (colorization: 1 to 2, Sec. 6.1.1)."""
    c_x, c_y = (1, 2) if cfg.task == "colorization" else (3, 3)
    generator = Generator(
        c_x, c_y, cfg.width, cfg.levels or fit_levels(cfg).levels,
        skips=cfg.generator != "encoder-decoder", bottleneck_norm=cfg.bottleneck_norm,
        first_dropout=2 if cfg.released else 1, smooth=cfg.generator == "unet-smooth")
    return generator, None if cfg.loss == "L1" else PatchDiscriminator(
        c_x, c_y, cfg.width, cfg.patch, conditional="cGAN" in cfg.loss)


def adam(net: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    """Both networks have the same learning rate and momentum parameters (Sec. 3.3)."""
    optimiser = torch.optim.Adam(net.parameters(), cfg.lr, betas=(0.5, 0.999), fused=True)
    optimiser.register_step_pre_hook(average_gradients)
    return optimiser


def build(cfg: Config, device: torch.device) -> State:
    """Networks and optimisers; precision, compilation and distribution go around the networks.

    All processes of a run on several GPUs start from the same weights, since the seed is the same.
    """
    torch.manual_seed(cfg.seed)
    G, D = (None if net is None else prepare(net, cfg, device) for net in networks(cfg))
    state = State(G, D, adam(G, cfg), None if D is None else adam(D, cfg))
    if cfg.init:
        load(state, read_weights(*cfg.init), " ".join(cfg.init))
    return state


def make_pair(batch: dict, cfg: Config) -> dict:
    """A batch of common.Dataset with "input" x (B, c_x, H, W) and, where known, "image" y added.

    Label maps become colour images, as in the paper. Colorization works in Lab: x = L / 50 - 1,
    y = (a, b) / 110, so that G has one input and two output channels and cannot change the
    lightness. Inpainting whitens the central square of half the side.
    """
    if cfg.task == "colorization":
        lab = rgb_to_lab(batch["image"])        # the definition stands with Fig. 7, further down
        return batch | {"input": lab[:, :1] / 50 - 1, "image": lab[:, 1:] / 110}
    if cfg.task == "inpainting":
        x = batch["image"].clone()              # the photo is the target, so it must stay whole
        h, w = x.shape[-2:]
        x[..., h // 4: h // 4 + h // 2, w // 4: w // 4 + w // 2] = 1.0
        return batch | {"input": x}
    if "input" in batch:
        return batch                            # pairs of images: nothing to make
    colours = colour_label(batch["label"], class_table(cfg.classes))             # (B, 3, H, W)
    if cfg.task == "photo2labels":
        return batch | {"input": batch["image"], "image": colours}
    return batch | {"input": colours}


def train_step(state: State, batch: dict, cfg: Config) -> dict[str, Tensor]:
    """One update of D, then one of G: Eq. (4). Returns the losses by the paper's names."""
    G, D = state.generator, state.discriminator
    x, y = batch["input"], batch["image"]       # (B, c_x, H, W), (B, c_y, H, W) in [-1, 1]
    y_hat = G(x)                                # one draw of the noise z serves both updates
    losses = {}

    # D: the max in Eq. (4). Real and fake pass separately: BatchNorm must never mix them.
    if D is not None:
        real, fake = discriminator_loss(D(x, y), D(x, y_hat.detach()))   # detach: must not reach G
        state.opt_d.zero_grad()
        (real + fake).backward()
        state.opt_d.step()
        losses = {"d_real": real, "d_fake": fake, "g_gan": generator_loss(D(x, y_hat))}

    # G: the min in Eq. (4), against the D just updated; gradients pass through D, not into it.
    losses["g_l1"] = l1_loss(y_hat, y)          # without lambda; logged even where not trained on
    objective = losses.get("g_gan", 0.0)
    if "L1" in cfg.loss:
        objective = objective + cfg.lambda_l1 * losses["g_l1"]
    state.opt_g.zero_grad()
    objective.backward(inputs=list(G.parameters()))
    state.opt_g.step()
    return {name: loss.detach() for name, loss in losses.items()}


def learning_rate(cfg: Config, epoch: int) -> float:
    """Constant in the paper. PyTorch release: full for half the epochs, then down in equal steps,
    which reach 0 in its last epoch, and after the last epoch here."""
    half = cfg.epochs // 2
    falling = max(0, epoch + 1 - half) / (cfg.epochs - half + 1)     # epoch counts from 0
    return cfg.lr * (1 - falling) if cfg.decay or cfg.released else cfg.lr


def train(cfg: Config, stored: dict | None = None) -> Path:
    """From scratch, from --init, or on from a stored checkpoint; returns the run's folder.

    The outer loop counts epochs, the inner one steps. The loader knows the place in the data, so
    that a run that goes on continues within its epoch; run.done logs, saves, and notes a Ctrl-C.
    """
    device = pick_device(cfg)
    cfg, train_set, test_set = open_data(cfg)
    state = build(cfg, device)
    loader = common.Loader(train_set, cfg.batch_size, cfg.workers, device, cfg.seed, cfg.epochs,
                           cfg.steps)
    with Run(cfg, state, loader, test_set, stored) as run:
        while not loader.over:
            for optimiser in filter(None, (state.opt_g, state.opt_d)):
                optimiser.param_groups[0]["lr"] = learning_rate(cfg, loader.epoch)
            for batch in loader:                # what is left of this epoch
                run.done(train_step(state, make_pair(batch, cfg), cfg))
    return run.end()


# -------------------------------------------------------------------------------- 5 Sampling

@torch.no_grad()
def translate(generator: Generator, x: Tensor) -> Tensor:
    """G on images of any size, convolutionally (Sec. 4.4, Fig. 8): (B, c_x, H, W) -> (B, c_y, ...).

    Sides are mirrored up to the next multiple of 2^levels, and the result is cropped. One image at
    a time, so that its statistics are its own (Sec. 3.3).
    """
    h, w = x.shape[-2:]
    padded = common.mirror_pad(x, generator.multiple)
    return torch.cat([generator(one[None]) for one in padded])[..., :h, :w]


def test_time(state: State, cfg: Config) -> Generator:
    """A copy of G for test time, where it runs "in exactly the same manner" as in training.

    A copy, since synchronised BatchNorm must not be entered by one process alone. eval() merely
    keeps the running averages from moving; dropout and batch statistics stay (Sec. 3.3).
    """
    generator = networks(cfg)[0].to(next(state.generator.parameters()).device)
    generator.load_state_dict(state.generator.state_dict())
    return generator.eval()


def test_pair(item: dict, state: State, cfg: Config) -> dict:
    """One item of a dataset as a batch of one where G is, made a pair."""
    return make_pair(common.batch_of_one(item, next(state.generator.parameters()).device), cfg)


def to_rgb(value: Tensor, pair: dict, cfg: Config) -> Tensor:
    """An input or output of G as a picture (B, 3, H, W) in [-1, 1]."""
    if cfg.task == "colorization" and value.shape[1] == 2:
        return lab_to_rgb(torch.cat([50 * (pair["input"] + 1), 110 * value], 1))
    if value is not pair["input"]:
        value = common.as_trained(value, cfg.understood)
    return value.expand(-1, 3, -1, -1) if value.shape[1] == 1 else value


def example(generator: Generator, item: dict, state: State, cfg: Config,
            k: int = 0) -> tuple[dict, Tensor, dict[str, Tensor]]:
    """One item of a dataset: its pair, y_hat with the k-th draw of its own noise, and the pictures
    of both and of the truth, where it is known."""
    pair = test_pair(item, state, cfg)
    torch.manual_seed(draw_seed(cfg.seed, pair["name"], k))        # the same in every call
    y_hat = translate(generator, pair["input"])
    views = {"input": pair["input"], "output": y_hat, "truth": pair.get("image")}
    return pair, y_hat, {name: to_rgb(view, pair, cfg) for name, view in views.items()
                         if view is not None}


def sample_grid(state: State, cfg: Config, test_set: common.Dataset, path: Path) -> Tensor:
    """Input | output | truth of six test examples, evenly spread, two a row. Returns the outputs
    (6, 3, H, W)."""
    generator, n = test_time(state, cfg), min(6, len(test_set))
    rows = [example(generator, test_set[i * len(test_set) // n], state, cfg)[2] for i in range(n)]
    tiles = [view.cpu() for views in rows for view in views.values()]
    save_images(torch.cat(tiles), path, nrow=2 * len(rows[0]))
    return torch.cat([views["output"] for views in rows]).cpu()


def sample(cfg: Config, state: State, size: tuple[int, int] | None = None) -> Path:
    """Outputs for --input, a file or a folder of any sizes, or for the test split.

    An output has the size of its input; `size` resizes the inputs first. Several samples differ by
    their dropout, drawn for each image and each sample; the paper observes "only minor
    stochasticity" (Sec. 3.1). Of photo2labels the class ids are written, too, in ids/ beside them.
    """
    generator, target = test_time(state, cfg), Path(cfg.output or Path(cfg.out, "test"))
    role = {"labels2photo": "label", "colorization": "image", "inpainting": "image"}
    if cfg.input:
        files = common.input_files(cfg.input, role.get(cfg.task, "A"))
        items = common.Dataset(files=files, classes=cfg.classes, size=size,
                               understood=cfg.understood)
        common.notice_scale(items, cfg.understood, cfg.size)
    else:
        items = dataset(cfg, "test").require(NEEDED.get(cfg.task))
    for item, paths in common.outputs(items, cfg.input, target, cfg.samples):
        for k, path in enumerate(paths):
            _, y_hat, views = example(generator, item, state, cfg, k)
            save_images(views["output"], path)
            if cfg.task == "photo2labels":
                ids = nearest_colour(y_hat, class_table(cfg.classes))[0].cpu().numpy()
                there = path.parent / "ids" / f"{path.stem}.png"
                common.save_picture(ids.astype(np.uint8), there)
    return target


# ------------------------------------------------------------------------------ 6 Evaluation

PAPER = """The paper's, on Cityscapes and by another scorer: compare orderings.
Histogram intersection, L, a, b
  Fig. 7d  L1 .81 .69 .70    cGAN .87 .74 .84    L1+cGAN .86 .84 .82    PixelGAN .83 .68 .78
Labels to photo: per-pixel accuracy, per-class accuracy, class IOU
  Table 1  L1 .42 .15 .11    GAN .22 .05 .01    cGAN .57 .22 .16
           L1+GAN .64 .20 .15    L1+cGAN .66 .23 .17    true photos .80 .26 .21
  Table 2  encoder-decoder: L1 .35 .12 .08    L1+cGAN .29 .09 .05    (batches of 10)
           U-Net: L1 .48 .18 .13    L1+cGAN .55 .20 .14
  Table 3  patch 1 .39 .15 .10    16 .65 .21 .17    70 .66 .23 .17    286 .42 .16 .11
Photo to labels
  Table 6  L1 .86 .42 .35    cGAN .74 .28 .22    L1+cGAN .83 .36 .29"""

XYZ = [[0.4124564, 0.3575761, 0.1804375],       # linear sRGB to CIE XYZ, D65
       [0.2126729, 0.7151522, 0.0721750],
       [0.0193339, 0.1191920, 0.9503041]]
WHITE = [0.95047, 1.0, 1.08883]


def rgb_to_lab(image: Tensor) -> Tensor:
    """sRGB (..., 3, H, W) in [-1, 1] -> CIE Lab under D65: L in [0, 100], a and b within +-110."""
    c = (image.clamp(-1, 1) + 1) / 2
    linear = torch.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    xyz = torch.einsum("ij,...jhw->...ihw", image.new_tensor(XYZ), linear)
    t = xyz / image.new_tensor(WHITE).view(3, 1, 1)
    root = t.clamp(min=1e-12) ** (1 / 3)
    f = torch.where(t > (6 / 29) ** 3, root, t * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f.unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -3)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """The inverse of rgb_to_lab; what sRGB cannot show is clipped."""
    lightness, a, b = lab.unbind(-3)
    y = (lightness + 16) / 116
    f = torch.stack([y + a / 500, y, y - b / 200], -3)
    t = torch.where(f > 6 / 29, f ** 3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    linear = torch.einsum("ij,...jhw->...ihw", torch.linalg.inv(lab.new_tensor(XYZ)),
                          t * lab.new_tensor(WHITE).view(3, 1, 1)).clamp(0, 1)
    curved = 1.055 * linear.clamp(min=1e-12) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, curved, 12.92 * linear).clamp(0, 1) * 2 - 1


def colour_histograms(image: Tensor) -> Tensor:
    """Fig. 7: counts (3, 220) of L, a and b over all pixels, in bins of one unit from -110 on."""
    lab = rgb_to_lab(image).movedim(-3, 0).flatten(1)                  # (3, pixels)
    return torch.stack([torch.histc(c.float().clamp(-109.99, 109.99), 220, -110, 110) for c in lab])


def histogram_intersection(p: Tensor, q: Tensor) -> Tensor:
    """Fig. 7d: sum_i min(p_i, q_i) of histograms (..., bins), each scaled to sum 1."""
    return torch.minimum(p / p.sum(-1, True), q / q.sum(-1, True)).sum(-1)


def nearest_colour(image: Tensor, table: common.ClassTable) -> Tensor:
    """Colours (B, 3, H, W) -> ids (B, H, W), the class of the nearest palette colour (Table 6)."""
    palette = torch.from_numpy(table.palette[:len(table.names)]).to(image.device)    # (n, 3)
    pixels = image.movedim(1, -1)
    distances = torch.cdist(pixels.flatten(0, 2), palette / 127.5 - 1)
    return distances.argmin(1).view(pixels.shape[:-1])


@torch.no_grad()
def evaluate(cfg: Config, state: State) -> dict:
    """The paper's metrics on the test split, beside its tables; writes metrics.json and pictures.

    FCN-score (Tables 1 to 3): a network trained on real photos labels the generated ones, at --size
    like all else here. Of all test pixels together: the share that is right; the mean over classes
    of the share right of a class; and the mean over classes of intersection over union. The score
    of the real test photos, the ground-truth row, says how well that can be done at all. For photo
    to labels (Table 6) the output's colours are read as the nearest classes, without a network.
    """
    generator, out = test_time(state, cfg), Path(cfg.out)
    test_set = dataset(cfg, "test").require("image").require(NEEDED.get(cfg.task))
    scored, table, scorer = cfg.task in ("labels2photo", "photo2labels"), test_set.table, None
    histograms, confusion, l1, tiles = {"output": 0, "truth": 0}, {"output": 0, "truth": 0}, [], []
    if cfg.task == "labels2photo":              # trained once, and kept beside the runs
        test_set.require_scored()
        photos = dataset(cfg, "train", limit=0, jitter=False)      # as large as those it judges
        device = next(generator.parameters()).device
        scorer = common.fcn_scorer(photos, out.parent, device, cfg.vgg)
    for i in tqdm(range(len(test_set)), desc="evaluate", unit="image", disable=None):
        pair, y_hat, views = example(generator, test_set[i], state, cfg)
        l1.append(l1_loss(y_hat, pair["image"]).item())
        tiles.append(torch.cat([*views.values()]).cpu())
        for row in histograms:
            histograms[row] += colour_histograms(views[row]).cpu()
            if scored:
                labels = (scorer(views[row]).argmax(1) if scorer else
                          nearest_colour(views[row], table))
                confusion[row] += common.confusion_matrix(labels, pair["label"], table).cpu()
    lab = histogram_intersection(histograms["output"], histograms["truth"]).tolist()
    metrics = {"images": len(l1), "L1": sum(l1) / len(l1), "histogram intersection": lab}
    if scored:
        metrics |= {row: common.segmentation_scores(n) for row, n in confusion.items()}
    report(metrics, cfg)
    worst = sorted(range(len(l1)), key=lambda i: -l1[i])[:8]                          # Fig. 21
    save_images(torch.cat([tiles[i] for i in worst]), out / "worst.png", nrow=6)
    plot_histograms(histograms, out / "histograms.png")
    common.save_scores(metrics, out / "metrics.json")
    return metrics


def report(metrics: dict, cfg: Config) -> None:
    """The metrics, and below them the paper's."""
    rows = {"histogram intersection: L, a, b": metrics["histogram intersection"]}
    if "output" in metrics:                     # the task and the data know label maps
        rows |= {"per-pixel accuracy, per-class accuracy, class IOU": metrics["output"].values(),
                 "of the truth, scored alike": metrics["truth"].values()}
    print(f"{cfg.generator}, {cfg.loss}, {cfg.patch} x {cfg.patch}; {metrics['images']} test "
          f"images; L1 {metrics['L1']:.4f} for values in [-1, 1]")
    for name, values in rows.items():
        print(f"    {name:52}" + "".join(f"{v:8.3f}" for v in values))
    print(PAPER)


def plot_histograms(histograms: dict[str, Tensor], path: Path) -> None:
    """Fig. 7a-c: log probability of L, a and b, output against truth."""
    figure = matplotlib.figure.Figure(figsize=(11, 3), layout="constrained")
    for c, axes in enumerate(figure.subplots(1, 3)):
        for (row, h), style in zip(histograms.items(), ("-", ":")):
            axes.semilogy(torch.arange(-109.5, 110), h[c] / h[c].sum(), style, label=row)
        axes.set(xlabel="Lab"[c], ylabel="P", xlim=(0, 100) if c == 0 else (-60, 60))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": common.OURS})


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

def rename_released(stored: dict, path: Path) -> dict:
    """The authors' PyTorch files (a plain state dict of G or of D) under our names.

    Their U-Net is nested: level i + 1 is submodule 3 of level i (submodule 1 of the outermost), so
    its keys carry i prefixes. Layers without parameters own an index too: convolution and norm of
    the encoder are 1 and 2 (0 outermost), of the decoder 5 and 6 (3 and 4 innermost, 3 outermost).
    """
    if {"model.model.0.weight", "model.model.3.weight"} <= stored.keys():
        found, n = {}, max(key.count("model.") for key in stored) - 1              # n levels
        for key, value in stored.items():
            module, _, tensor = key.rpartition(".")
            i, layer = module.count("model.") - 2, module[-1:]
            part = f"encoder.{i}" if layer in "012" else f"decoder.{n - 1 - i}"
            found[f"{part}.{'norm' if layer in '246' else 'conv'}.{tensor}"] = value
        return {"generator": found}
    raise UserError(f"{path}: no checkpoint of pix2pix.py and no released generator; its first key "
                    f"is {next(iter(stored), 'missing')}")


def released_config(stored: dict, given: dict) -> dict:
    """The settings that the authors' generator has, read off the shapes of its weights.

    Nothing else is in their files. Two output channels can only be colorization.
    """
    weights = stored["generator"]
    n = sum(k.startswith("encoder.") and k.endswith("conv.weight") for k in weights)
    c_y = weights[f"decoder.{n - 1}.conv.weight"].shape[1]
    return dict(levels=n, width=len(weights["encoder.0.conv.weight"]), released=True, loss="L1",
                task="pairs" if c_y == 3 else "colorization")


def for_testing(cfg: Config) -> Config:
    """The config with which a network is built to be tested."""
    return replace(cfg, compile=False)


def run_mode(mode: str, cfg: Config, state: State, given: dict) -> None:
    """What is done with a trained network."""
    if mode == "sample":
        sample(cfg, state, given.get("size"))
    else:
        evaluate(cfg, state)


def trace(cfg: Config) -> None:
    """Stage, output and parameters of both networks in one training step, FLOPs and time."""
    device = pick_device(cfg)
    cfg, train_set, _ = open_data(replace(cfg, compile=False))
    state, loader = build(cfg, device), common.Loader(train_set, cfg.batch_size, 0, device)
    pair = make_pair(next(iter(loader)), cfg)
    common.trace_step({name: getattr(state, name) for name in NETWORKS},
                      lambda: train_step(state, pair, cfg))
    print(f"on {device}; a unit of D sees {cfg.patch} x {cfg.patch} pixels")


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
