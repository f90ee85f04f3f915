"""pix2pix: one recipe for paired image-to-image translation.

P. Isola, J.-Y. Zhu, T. Zhou, A. A. Efros. Image-to-Image Translation with Conditional Adversarial
Networks. CVPR 2017. Section, equation and table numbers are those of arXiv v3 (1611.07004).

Idea. A generator G turns an input x (a label map, edges, a grey photo) into an image. An L1 loss
makes it land near the true image y, but blurred: where several images are possible for x, it takes
their median. A second network D learns to tell (x, y) from (x, G(x)), patch by patch, and so
penalises what no photo has, whatever that is. Skip connections carry the layout past G's
bottleneck. Nothing is tuned per task.

Symbols     x batch["input"]   y batch["image"]   y_hat = G(x, z)   z the dropout in G

Paper map   (a test reads these lines: every name must exist, and nothing numbered may be missing)
    Eq. (1)     conditional GAN loss               discriminator_loss, generator_loss
    Eq. (2)     unconditional GAN loss             PatchDiscriminator, with conditional=False
    Eq. (3)     L1 loss                            l1_loss
    Eq. (4)     the objective, lambda = 100        train_step
    Sec. 3.3    D halved, D then G                 discriminator_loss, train_step
    Sec. 3.3    at test time as in training        BatchNorm, Up, translate
    Table 1     losses, FCN-score                  evaluate, with --loss
    Table 2     generators, FCN-score              evaluate, with --generator
    Table 3     receptive fields of D, FCN-score   evaluate, with --patch
    Table 4     perceptual study of maps           needs people; translate makes its images
    Table 5     perceptual study of colorization   needs people; translate makes its images
    Table 6     photo to labels                    evaluate, nearest_colour
    Fig. 1      samples of every task              PRESETS, sample
    Fig. 2      D sees the edge map and the photo  PatchDiscriminator
    Fig. 3      encoder-decoder and U-Net          Generator
    Fig. 4      L1, cGAN, L1+cGAN side by side     sample, with --loss
    Fig. 5      generators side by side            sample, with --generator
    Fig. 6      patch sizes side by side           sample, with --patch
    Fig. 7      Lab histograms, intersections      colour_histograms, histogram_intersection
    Fig. 8      512 x 512 from a 256 x 256 model   translate
    Fig. 9      colorization                       make_pair, rgb_to_lab, lab_to_rgb
    Fig. 10     semantic segmentation              PRESETS, cityscapes-photo2labels
    Fig. 11-12  the community's uses               nothing to reproduce
    Fig. 13-20  more samples of each task          PRESETS, sample
    Fig. 21     failures                           evaluate, which draws the worst outputs by L1

Paper                             | Released code                     | Here
    all convolutions have stride 2| the last two of D have stride 1   | stride 1: else D sees 94
    BatchNorm on the bottleneck   | removed (errata, Sec. 6.3)        | removed; --bottleneck-norm
    all encoder ReLUs are leaky   | plain ReLU after the bottleneck   | plain ReLU
    dropout in decoder blocks 1-3 | Lua 1-3, PyTorch 2-4              | 1-3; --first-dropout 2
    D's objective is halved       | Lua: only in what it reports      | halved
    constant learning rate        | PyTorch: half the epochs, then    | constant; --decay
                                  |   linearly to 0                   |
    G's step after D's            | Lua: with D's old activations     | D judges anew, as in PyTorch
    L1 is a norm, a sum           | the mean over all elements        | mean; lambda refers to it
    sigmoid, then log             | PyTorch: logits                   | logits, without overflow
    the last layer of G is "a     | transposed, stride 2              | transposed: 8 halvings, 8
      convolution"                |                                   |   doublings
    grid of young transposed      | the same                          | the same; --smooth, ours, in
      convolutions                |                                   |   toy, averages it away
    gains of BatchNorm not stated | N(1, 0.02)                        | N(1, 0.02)
    biases not stated             | Lua zeroes them, PyTorch has none | none before a norm, e1, e8
    jitter's filter not stated    | Lua bilinear, PyTorch bicubic     | bicubic; ids by nearest
    channel order not stated      | Lua BGR, PyTorch RGB              | RGB
    label maps as colour images   | the same, as JPEG                 | colours of ids; --one-hot
    order of images not stated    | Lua draws with replacement        | each image once per epoch
    test as in training           | the same; PyTorch has --eval      | the same; --eval-mode
    FCN-8s trained on Cityscapes, | its weights are not to be had     | FCN-8s trained on your
      scored at 1024 x 2048       |   any more                        |   photos, scored at --size
    IOU: absent classes not said  | they count as 0                   | they are left out

Run         python pix2pix.py                               built-in streets, minutes on a laptop
            python pix2pix.py --data ./cityscapes --gpu 0   the last line of Table 1
            python pix2pix.py sample --input label.png --output photo.png
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import matplotlib.figure
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DistributedSampler, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import common
from common import UserError, class_table, colour_label

# --------------------------------------------------------------------------------- 1 Config

@dataclass
class Config:
    """The defaults are the paper's; the comment says where it states them."""
    # The task
    data: str = ""                   # folder; "" is the built-in streets
    task: str = "labels2photo"       # photo2labels, pairs, colorization, inpainting     Sec. 4
    direction: str = "AtoB"          # of side-by-side pairs: which half is the input
    classes: str = ""                # a table of common.py, or a number; "" asks the data
    one_hot: bool = False            # label maps as one-hot channels; the paper feeds colours
    size: tuple[int, int] = (256, 256)   # height, width of the images, pixels           Sec. 6.2
    jitter: bool = True              # resize to 286/256 of the size, crop at random     Sec. 6.2
    mirror: bool = True              # flip left and right, half the time                Sec. 6.2
    limit: int = 0                   # use the first so many examples; 0 is all
    # The networks
    generator: str = "unet"          # or encoder-decoder                                Sec. 6.1.1
    width: int = 64                  # channels after the first layer of G and of D      Sec. 6.1
    levels: int = 0                  # halvings in G, 8 at 256; 0: all that size allows, up to 8
    bottleneck_norm: bool = False    # BatchNorm on the innermost map, as in the paper's runs, 6.3
    smooth: bool = False             # ours: average away a transposed convolution's grid
    first_dropout: int = 1           # dropout from this decoder block on, in three; 2 in PyTorch
    patch: int = 70                  # D's field, pixels: 1, 16, 34, 70, 142 or 286      Sec. 6.1.2
    # The objective
    loss: str = "L1+cGAN"            # or L1, GAN, cGAN, L1+GAN                          Table 1
    lambda_l1: float = 100.0         # lambda in Eq. (4), for images in [-1, 1]          Sec. 4.2
    # Training
    epochs: int = 200                # passes over the training set                      Sec. 6.2
    steps: int = 0                   # end after so many updates; 0 leaves it to epochs
    batch_size: int = 1              # per process; 1, and 10 in Table 2                 Sec. 6.2
    lr: float = 2e-4                 # Adam's, both networks                             Sec. 3.3
    betas: tuple[float, float] = (0.5, 0.999)                         # Adam's           Sec. 3.3
    decay: bool = False              # not in the paper; PyTorch release: lr to 0 in the second half
    seed: int = 0                    # of initialisation, order, crops and noise
    init: str = ""                   # start from these weights: ours, or released ones
    save_every: int = 0              # steps between checkpoints and grids; 0 is each epoch
    # Test time and evaluation
    eval_mode: bool = False          # no dropout, running averages: PyTorch's --eval, not the paper
    vgg: str = "imagenet"            # where the FCN-8s scorer starts: imagenet, random, or a file
    scorer_width: int = 64           # 64 is VGG-16; less, with vgg random, for small studies
    scorer_steps: int = 2000         # ours: batches of four photos that the scorer trains on
    # The machine
    gpu: int | None = None           # CUDA device; -1 the CPU; None the first GPU, else the CPU
    workers: int | None = None       # data processes; None is 4 with a GPU, else 0
    precision: str = "fp32"          # or bf16: autocast around the networks
    compile: bool = False            # torch.compile both networks
    channels_last: bool | None = None    # memory order; None is on with a GPU, off on the CPU
    out: str = ""                    # the run's folder; "" is the next free runs/pix2pix-N


# Sec. 6.2, line by line. Where it is silent on jitter and mirroring: on, as in both releases.
# Directions are those of the authors' side-by-side files: facades and cityscapes hold (photo,
# labels), maps (aerial, map), night2day (night, day), the edges sets (edges, photo).
PRESETS = {
    "cityscapes": dict(direction="BtoA", epochs=200, batch_size=1),                 # 2975 images
    "cityscapes-batch10": dict(direction="BtoA", epochs=200, batch_size=10),        # Table 2
    "cityscapes-photo2labels": dict(task="photo2labels", epochs=200, batch_size=1),  # Table 6
    "facades": dict(direction="BtoA", epochs=200, batch_size=1),                    # 400
    "map2aerial": dict(task="pairs", direction="BtoA", epochs=200, batch_size=1),   # 1096
    "aerial2map": dict(task="pairs", epochs=200, batch_size=1),                     # 1096
    "colorization": dict(task="colorization", epochs=6, batch_size=4, jitter=False),  # 1.2 million
    "edges2shoes": dict(task="pairs", epochs=15, batch_size=4),                     # 50 000
    "edges2handbags": dict(task="pairs", epochs=15, batch_size=4),                  # 137 000
    "sketches": dict(task="pairs"),                          # tests the edges models, trains none
    "day2night": dict(task="pairs", direction="BtoA", epochs=17, batch_size=4),     # 17 823
    "thermal2color": dict(task="pairs", epochs=10, batch_size=4),                   # 36 609
    "inpainting": dict(task="inpainting", epochs=25, batch_size=4),                 # 14 900
    # Ours, for the streets on a laptop's CPU. Adam moves each weight by about lr, however few there
    # are: a net of a quarter of the width needs a larger one to change its output as fast. The
    # decay then calms it within the few epochs that there are.
    "toy": dict(size=(128, 128), width=16, levels=5, epochs=8, lr=2e-3, decay=True, smooth=True,
                vgg="random", scorer_width=16, scorer_steps=600),
}
PATCHES = {1: 0, 16: 1, 34: 2, 70: 3, 142: 4, 286: 5}   # D's receptive field: its halvings
CHOICES = {
    "task": ("labels2photo", "photo2labels", "pairs", "colorization", "inpainting"),
    "direction": ("AtoB", "BtoA"), "generator": ("unet", "encoder-decoder"),
    "patch": tuple(PATCHES), "first_dropout": (1, 2),
    "loss": ("L1", "GAN", "cGAN", "L1+GAN", "L1+cGAN"), "precision": ("fp32", "bf16")}


def check_config(cfg: Config) -> None:
    """Absurd values and contradictions, each in one line, before anything is built."""
    for name, allowed in CHOICES.items():
        if getattr(cfg, name) not in allowed:
            raise UserError(f"{flag(name)} {getattr(cfg, name)}: choose one of "
                            + ", ".join(map(str, allowed)))
    bounds = dict.fromkeys(("batch_size", "epochs", "width", "scorer_width", "scorer_steps"), 1)
    for name in ("limit", "steps", "levels", "save_every", "lambda_l1", "seed", "workers"):
        bounds[name] = 0
    for name, low in bounds.items():
        high = {"levels": 8, "workers": 256}.get(name, 10 ** 9)
        if not low <= (getattr(cfg, name) or 0 if low == 0 else getattr(cfg, name)) <= high:
            raise UserError(f"{flag(name)} {getattr(cfg, name)}: must lie in {low}..{high}")
    if not 0 < cfg.lr < 1:
        raise UserError(f"--lr {cfg.lr}: must lie between 0 and 1; the paper's is 0.0002")
    if not all(0 <= beta < 1 for beta in cfg.betas):
        raise UserError(f"--betas {cfg.betas[0]} {cfg.betas[1]}: both must lie in [0, 1)")
    if cfg.decay and cfg.epochs < 2:
        raise UserError("--decay with --epochs 1: the rate would be 0 from the start")
    if min(cfg.size) < 1:
        raise UserError(f"--size {cfg.size[0]} {cfg.size[1]}: must be positive")
    if cfg.one_hot and cfg.task != "labels2photo":
        raise UserError(f"--one-hot needs label maps as input; --task {cfg.task} has none")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def fit_levels(cfg: Config) -> Config:
    """The number of halvings that the training size allows, at most the paper's 8."""
    h, w = cfg.size
    deepest = max(k for k in range(9) if h % 2 ** k == 0 and w % 2 ** k == 0)
    if min(h, w) < 32 or deepest < max(cfg.levels, 4):
        unit = 2 ** max(cfg.levels, 5)
        near = [max(unit, round(s / unit) * unit) for s in (h, w)]
        raise UserError(f"--size {h} {w}: G halves each side {cfg.levels or '4 to 8'} times, so it "
                        f"must be a multiple of {unit}; the nearest is --size {near[0]} {near[1]}")
    halvings = PATCHES[cfg.patch]                # D's last two convolutions need 3 x 3 units
    if "GAN" in cfg.loss and halvings and min(h, w) < 3 * 2 ** halvings:
        raise UserError(f"--patch {cfg.patch}: D halves each side {halvings} times; --size {h} {w} "
                        f"is too small, {3 * 2 ** halvings} would do")
    return replace(cfg, levels=cfg.levels or deepest)


# ------------------------------------------------------------------------------- 2 Networks

class BatchNorm(nn.BatchNorm2d):
    """BatchNorm with the statistics of the batch at hand, at test time too (Sec. 3.3).

    With one image in the batch this is what was later called instance normalisation. The running
    averages are kept in training, as in the released files, and used only with --eval-mode.
    """
    use_running = False

    def forward(self, x: Tensor) -> Tensor:
        if self.use_running:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                                eps=self.eps)
        if x.numel() == x.shape[1]:    # One value per channel is its own mean, which leaves beta:
            return x * 0 + self.bias.view(1, -1, 1, 1)   # the "zeroed" bottleneck of Sec. 6.3.
        mean, var = (self.running_mean, self.running_var) if self.training else (None, None)
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)


class Down(nn.Module):
    """Encoder block: LeakyReLU(0.2), convolution, BatchNorm; halves H and W.

    The paper writes convolution, BatchNorm, ReLU. With each ReLU moved to the front of the next
    block it is the same chain, and a skip carries the value before the activation; the decoder's
    ReLU makes of it what it would have made of the activated one: ReLU(LeakyReLU(v)) = ReLU(v).
    """

    def __init__(self, c_in: int, c_out: int, norm: bool = True, first: bool = False):
        super().__init__()
        self.first = first
        self.conv = nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False)
        self.norm = BatchNorm(c_out) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x if self.first else F.leaky_relu(x, 0.2)))


class Up(nn.Module):
    """Decoder block: ReLU, transposed convolution, BatchNorm, dropout; doubles H and W.

    The dropout is the noise z, and the only one: given a noise vector, G learned to ignore it
    (Sec. 3.1). Hence it stays on at test time, unless `deterministic` (--eval-mode).
    `smooth`, ours, takes the mean of each 2 x 2 window: the grid of period two that a kernel paints
    early in training is gone, and some sharpness with it.
    """
    deterministic = smooth = False

    def __init__(self, c_in: int, c_out: int, dropout: bool = False, last: bool = False):
        super().__init__()
        self.dropout = dropout
        self.conv = nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=last)
        self.norm = nn.Identity() if last else BatchNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.relu(x))
        if self.smooth:
            x = F.avg_pool2d(F.pad(x, (0, 1, 0, 1), "replicate"), 2, 1)
        x = self.norm(x)
        return F.dropout(x, 0.5, training=True) if self.dropout and not self.deterministic else x


class Generator(nn.Module):
    """U-Net or encoder-decoder (Sec. 3.2.1 and 6.1.1, Fig. 3).

    x (B, c_x, H, W) in [-1, 1]  ->  y_hat (B, c_y, H, W) in [-1, 1]; H, W multiples of 2^levels.

    With 8 levels and 256 x 256: down C64-C128-C256-C512-C512-C512-C512-C512 to 1 x 1, and up again
    CD512-CD512-CD512-C512-C256-C128-C64 and the output. The U-Net adds skips: up block i also sees
    what down block n - i made, so its *inputs* are those of the paper's U-Net decoder line, which
    are 512-1024-1024-1024-1024-512-256-128. Severed, they leave the encoder-decoder (Sec. 4.3).
    """

    def __init__(self, c_x: int = 3, c_y: int = 3, width: int = 64, levels: int = 8,
                 skips: bool = True, bottleneck_norm: bool = False, first_dropout: int = 1):
        super().__init__()
        self.skips, self.multiple = skips, 2 ** levels
        channels = [width * min(2 ** i, 8) for i in range(levels)]   # 64 128 256 512 512 ...
        self.encoder = nn.ModuleList(
            Down(c_in, c_out, norm=i > 0 and (i < levels - 1 or bottleneck_norm), first=i == 0)
            for i, (c_in, c_out) in enumerate(zip([c_x, *channels], channels)))
        outputs = [*channels[-2::-1], c_y]                           # 512 512 512 512 256 128 64 3
        inputs = [channels[-1]] + [(2 if skips else 1) * c for c in outputs[:-1]]
        noisy = range(first_dropout, first_dropout + 3)              # decoder blocks, from 1
        self.decoder = nn.ModuleList(
            Up(c_in, c_out, dropout=i in noisy and i < levels, last=i == levels)
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
    that is 1, 4, 7, 16, 34, 70.
    Unconditional (Eq. (2)): D does not see x, and can only say whether y looks like a photo.
    Paper: all convolutions have stride 2. That D would see 94 pixels; 70 needs 1 in the last two.
    """

    def __init__(self, c_x: int = 3, c_y: int = 3, width: int = 64, patch: int = 70,
                 conditional: bool = True):
        super().__init__()
        self.conditional = conditional
        halvings = PATCHES[patch]                           # 0: the PixelGAN, C64-C128 of 1 x 1
        kernel = dict(kernel_size=4, padding=1) if halvings else dict(kernel_size=1)
        c = width
        layers = [nn.Conv2d(c_x + c_y if conditional else c_y, c, stride=2 if halvings else 1,
                            **kernel), nn.LeakyReLU(0.2)]   # no BatchNorm on the first (Sec. 6.1.2)
        for i in range(1, max(halvings, 1) + 1):            # C128-C256-C512
            c_in, c = c, width * min(2 ** i, 8)
            layers += [nn.Conv2d(c_in, c, stride=2 if i < halvings else 1, bias=False, **kernel),
                       BatchNorm(c), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(c, 1, bias=halvings > 0, **kernel)]       # its sigmoid is in the loss
        self.layers = nn.Sequential(*layers)
        self.apply(initialise)

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


# --------------------------------------------------------------------------------- 3 Losses

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


# ------------------------------------------------------------------------------- 4 Training

@dataclass
class State:
    """All that training changes. Whatever has a state_dict, and the counters, are saved."""
    generator: nn.Module
    discriminator: nn.Module | None             # None with --loss L1
    opt_g: torch.optim.Optimizer
    opt_d: torch.optim.Optimizer | None
    step: int = 0                               # updates done
    epoch: int = 0                              # passes completed
    seen: int = 0                               # images of this pass already used, by all processes


def networks(cfg: Config) -> tuple[Generator, PatchDiscriminator | None]:
    """G and D with the channels that the task calls for (colorization: 1 to 2, Sec. 6.1.1)."""
    c_x, c_y = (1, 2) if cfg.task == "colorization" else (3, 3)
    c_x = class_table(cfg.classes).channels if cfg.one_hot else c_x
    levels = cfg.levels or fit_levels(cfg).levels
    generator = Generator(c_x, c_y, cfg.width, levels, cfg.generator == "unet",
                          cfg.bottleneck_norm, cfg.first_dropout)
    for block in generator.decoder:
        block.smooth = cfg.smooth
    if cfg.loss == "L1":
        return generator, None
    return generator, PatchDiscriminator(c_x, c_y, cfg.width, cfg.patch, "cGAN" in cfg.loss)


def build(cfg: Config, device: torch.device) -> State:
    """Networks and optimisers; precision, compilation and distribution go around the networks."""
    torch.manual_seed(cfg.seed)
    nets, optimisers = networks(cfg), []
    for net in nets:
        if net is not None:
            net.to(device, memory_format=memory_format(cfg, device))
        optimisers.append(net and torch.optim.Adam(net.parameters(), cfg.lr, cfg.betas, fused=True))
    state = State(*nets, *optimisers)
    if cfg.init:
        load_networks(state, Path(cfg.init))
    state.generator, state.discriminator = (net and dress(net, cfg, device) for net in nets)
    return state


def make_pair(batch: dict, cfg: Config) -> dict:
    """A batch of common.Dataset with "input" x (B, c_x, H, W) and, where known, "image" y added.

    Label maps become colour images, as in the paper, or one-hot channels. Colorization works in
    Lab: x = L / 50 - 1, y = (a, b) / 110. Inpainting whitens the central square of half the side.
    """
    if cfg.task == "colorization":
        lab = rgb_to_lab(batch["image"])        # the definition stands with Fig. 7, in room 6
        return batch | {"input": lab[:, :1] / 50 - 1, "image": lab[:, 1:] / 110}
    if cfg.task == "inpainting":
        x = batch["image"].clone()
        h, w = x.shape[-2:]
        x[..., h // 4: h // 4 + h // 2, w // 4: w // 4 + w // 2] = 1.0
        return batch | {"input": x}
    if "input" in batch:
        return batch                            # pairs of images: nothing to make
    table = class_table(cfg.classes)
    colours = colour_label(batch["label"], table)                                # (B, 3, H, W)
    if cfg.task == "photo2labels":
        return batch | {"input": batch["image"], "image": colours}
    if cfg.one_hot:
        colours = F.one_hot(batch["label"], table.channels).movedim(-1, 1).float()
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
        state.opt_d.zero_grad(set_to_none=True)
        (real + fake).backward()
        state.opt_d.step()
        losses |= {"d_real": real.detach(), "d_fake": fake.detach()}

    # G: the min in Eq. (4), against the D just updated; gradients pass through D, not into it.
    objective = 0.0
    if D is not None:
        D.requires_grad_(False)
        judge = plain(D)                        # DDP's own wrapper would wait for gradients of D
        loss_gan = generator_loss(judge(x, y_hat))
        objective, losses["g_gan"] = loss_gan, loss_gan.detach()
    loss_l1 = l1_loss(y_hat, y)                 # without lambda; logged even where not trained on
    if "L1" in cfg.loss:
        objective = objective + cfg.lambda_l1 * loss_l1
    state.opt_g.zero_grad(set_to_none=True)
    objective.backward()
    state.opt_g.step()
    if D is not None:
        D.requires_grad_(True)
    return losses | {"g_l1": loss_l1.detach()}


def learning_rate(cfg: Config, epoch: int) -> float:
    """Constant in the paper. PyTorch release (--decay): full for half the epochs, then to 0."""
    half = cfg.epochs // 2
    falling = max(0, epoch + 2 - half) / (cfg.epochs - half + 1)     # epoch counts from 0
    return cfg.lr * (1 - falling) if cfg.decay else cfg.lr


# From here to Log all is word for word the same in the four scripts, but for these two names.

NAME = "pix2pix"
NETWORKS = ("generator", "discriminator")       # in State


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


def load_networks(state: State, path: Path) -> None:
    """Weights only, for --init and for testing; names and shapes are compared first."""
    stored = read_checkpoint(path)
    if "released" in stored:
        stored = rename_released(stored["released"], path)
    shared = [name for name in NETWORKS
              if getattr(state, name) is not None and stored.get(name) is not None]
    if not shared:
        raise UserError(f"{path}: holds {', '.join(stored)}, of which this run uses nothing")
    for name in shared:
        net, theirs = getattr(state, name), stored[name]
        own = plain(net).state_dict()
        shapes = {k: tuple(v.shape) for k, v in own.items() if "num_batches" not in k}
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


def dataset(cfg: Config, split: str, instances: bool = False) -> common.Dataset:
    train = split == "train"
    return common.Dataset(
        cfg.data, split, cfg.size, jitter=train and cfg.jitter, mirror=train and cfg.mirror,
        classes=cfg.classes, direction=cfg.direction, limit=cfg.limit, seed=cfg.seed,
        photos_only=cfg.task in ("colorization", "inpainting"), instances=instances)


def open_data(cfg: Config) -> tuple[Config, common.Dataset, common.Dataset]:
    """Both splits, and the config with what the data turned out to be: its classes, its task."""
    train_set = dataset(cfg, "train")
    cfg = replace(fit_levels(cfg), classes=train_set.classes)
    if train_set.roles & {"A", "B", "pair"} and cfg.task == "labels2photo":
        cfg = replace(cfg, task="pairs")        # label maps that are colour images beside photos
    elif "label" in train_set.roles and cfg.task == "pairs":
        raise UserError("--task pairs: this dataset has label maps; --task labels2photo is the way")
    if not train_set.roles & {"image", "B", "pair"}:
        raise UserError(f"--data {cfg.data}: layout {train_set.layout.name}, without photos; "
                        "training needs them")
    images = cfg.batch_size * place()[1]
    if images > len(train_set):
        raise UserError(f"--batch-size {cfg.batch_size}: a step needs {images} images, training "
                        f"has {len(train_set)}")
    check_config(cfg)
    return cfg, train_set, dataset(cfg, "test")


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
    per_step = cfg.batch_size * world
    per_epoch = len(train_set) // per_step
    total = min(cfg.steps or math.inf, cfg.epochs * per_epoch)
    state, loader = build(cfg, device), open_loader(train_set, cfg, device)
    if resume:
        restore(state, stored, Path(cfg.out) / "checkpoint.pt")
    if state.step >= total:
        raise UserError(f"{cfg.out}: finished at step {state.step}, epoch {state.epoch}; a larger "
                        "--epochs or --steps goes on")
    if rank == 0:
        common.describe(train_set)
        common.describe(test_set)
        cfg = open_run(cfg, resume)
        log = Log(Path(cfg.out), state.step)
        print(f"{device}: {total} steps of {per_step} image(s), {per_epoch} an epoch; in {cfg.out}")
    save_every = cfg.save_every or per_epoch
    bar = tqdm(total=total, initial=state.step, unit="step", disable=None if rank == 0 else True)
    with Stop() as stop:
        last = False
        while not last:
            for optimiser in (state.opt_g, state.opt_d):
                if optimiser is not None:
                    optimiser.param_groups[0]["lr"] = learning_rate(cfg, state.epoch)
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
                  f"python pix2pix.py --resume --out {cfg.out}")
        sys.exit(128 + stop.signal)
    return Path(cfg.out)


def rename_released(stored: dict, path: Path) -> dict:
    """The authors' PyTorch files (a plain state dict of G or of D) under our names.

    Their U-Net is nested: level i + 1 is submodule 3 of level i (submodule 1 of the outermost), so
    its keys carry i prefixes. Layers without parameters own an index too: hence 1, 2, 5 and 6.
    """
    if "model.model.0.weight" in stored:
        n = sum(k.endswith(".1.weight") for k in stored) + 1          # one down-convolution a level
        names = {"model.model.0": "encoder.0.conv", "model.model.3": f"decoder.{n - 1}.conv"}
        for i in range(1, n):
            prefix, last = "model.model.1.model." + "3.model." * (i - 1), i == n - 1
            names |= {f"{prefix}1": f"encoder.{i}.conv", f"{prefix}2": f"encoder.{i}.norm"}
            names |= {f"{prefix}{3 if last else 5}": f"decoder.{n - 1 - i}.conv",
                      f"{prefix}{4 if last else 6}": f"decoder.{n - 1 - i}.norm"}
        split = {k: k.rpartition(".") for k in stored}                 # module, ".", tensor
        return {"generator": {f"{names.get(module, module)}.{tensor}": stored[k]
                              for k, (module, _, tensor) in split.items()}}
    if any(k in stored for k in ("model.0.weight", "net.0.weight")):   # a patch or a pixel D
        return {"discriminator": {"layers." + k.split(".", 1)[1]: v for k, v in stored.items()}}
    raise UserError(f"{path}: no checkpoint of pix2pix.py and no released generator or "
                    f"discriminator; its first key is {next(iter(stored), 'missing')}")


# ------------------------------------------------------------------------------- 5 Sampling

@torch.no_grad()
def translate(generator: Generator, x: Tensor) -> Tensor:
    """G on images of any size, convolutionally (Sec. 4.4, Fig. 8): (B, c_x, H, W) -> (B, c_y, ...).

    Sides are mirrored up to the next multiple of 2^levels, and the result is cropped. One image at
    a time, so that its statistics are its own (Sec. 3.3).
    """
    h, w = x.shape[-2:]
    rows, columns = (reflect(side, -side % generator.multiple).to(x.device) for side in (h, w))
    padded = x[..., rows, :][..., columns]
    return torch.cat([generator(one[None]) for one in padded])[..., :h, :w]


def reflect(n: int, more: int) -> Tensor:
    """Indices 0 .. n-1 and `more` back and forth: F.pad reflects, but not by more than n - 1."""
    i = torch.arange(n + more) % max(2 * n - 2, 1)
    return torch.minimum(i, (2 * n - 2 - i).abs())


def test_time(state: State, cfg: Config) -> Generator:
    """A copy of G for test time, where it runs "in exactly the same manner" as in training.

    A copy, since synchronised BatchNorm must not be entered by one process alone. eval() merely
    keeps the running averages from moving; dropout and batch statistics stay (Sec. 3.3).
    """
    source = plain(state.generator)
    generator = networks(cfg)[0].to(next(source.parameters()).device)
    generator.load_state_dict(source.state_dict())
    for module in generator.modules():
        if isinstance(module, BatchNorm):
            module.use_running = cfg.eval_mode
        elif isinstance(module, Up):
            module.deterministic = cfg.eval_mode
    return generator.eval()


def to_rgb(value: Tensor, pair: dict, cfg: Config) -> Tensor:
    """An input or output of G as a picture (B, 3, H, W) in [-1, 1]."""
    if cfg.task == "colorization" and value.shape[1] == 2:
        return lab_to_rgb(torch.cat([50 * (pair["input"] + 1), 110 * value], 1))
    if cfg.one_hot and value is pair["input"]:
        return colour_label(value.argmax(1), class_table(cfg.classes))
    return value.expand(-1, 3, -1, -1) if value.shape[1] == 1 else value


def pair_of(item: dict, cfg: Config, device: torch.device) -> dict:
    """One item of a dataset as a batch of one on the device, made a pair."""
    batch = {k: v[None].to(device) if torch.is_tensor(v) else v for k, v in item.items()}
    return make_pair(batch, cfg)


def sample_grid(state: State, cfg: Config, test_set: common.Dataset, device: torch.device) -> None:
    """samples/<step>.png: input | output | truth of six test examples, evenly spread, two a row."""
    generator, tiles = test_time(state, cfg), []
    n = min(6, len(test_set))
    for i in range(n):
        pair = pair_of(test_set[i * len(test_set) // n], cfg, device)
        torch.manual_seed(cfg.seed)             # the same noise in every grid
        values = [pair["input"], translate(generator, pair["input"]), pair.get("image")]
        tiles += [to_rgb(value, pair, cfg).cpu() for value in values if value is not None]
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


def read_input(path: Path, cfg: Config) -> dict:
    """A user's file as an item: a label map if G was trained on label maps, else a picture."""
    if cfg.task == "labels2photo":
        return {"label": common.read_label(path, class_table(cfg.classes)), "name": path.stem}
    key = "image" if cfg.task in ("colorization", "inpainting") else "input"
    return {key: common.read_image(path).float() / 127.5 - 1, "name": path.stem}


def resize_item(item: dict, size: tuple[int, int]) -> dict:
    """Labels by nearest neighbour, pictures by antialiased bicubic."""
    out = dict(item)
    for k in ("input", "image"):
        if k in item:
            picture = F.interpolate(item[k][None], size, mode="bicubic", antialias=True)
            out[k] = picture[0].clamp(-1, 1)
    if "label" in item:
        label = item["label"][None, None].double()
        out["label"] = F.interpolate(label, size, mode="nearest-exact")[0, 0].long()
    return out


def sample(cfg: Config, state: State, source: str = "", output: str = "", samples: int = 1,
           size: tuple[int, int] | None = None) -> Path:
    """Outputs for a file or a folder of any sizes, or for the test split; returns where they are.

    An output has the size of its input; `size` resizes the inputs first. Several samples differ by
    their dropout; the paper observes "only minor stochasticity" (Sec. 3.1).
    """
    device, generator = next(plain(state.generator).parameters()).device, test_time(state, cfg)
    if samples < 1:
        raise UserError(f"--samples {samples}: must be 1 or more")
    root, target = Path(source), Path(output) if output else Path(cfg.out or ".") / "test"
    if source:
        files = sorted(p for p in root.iterdir() if p.suffix.lower() in common.SUFFIXES) \
            if root.is_dir() else [root]
        if not files:
            raise UserError(f"--input {source}: a folder without images")
        if len({path.stem for path in files}) < len(files):
            raise UserError(f"--input {source}: several files of one name; outputs are named by it")
        items = (read_input(path, cfg) for path in files)
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
            torch.manual_seed(cfg.seed + k)
            y_hat = to_rgb(translate(generator, pair["input"]), pair, cfg)
            number = f"_{k + 1}" if samples > 1 else ""
            path = target if to_file else target / f"{item['name']}{number}.png"
            if source and any(path.resolve() == file.resolve() for file in files):
                raise UserError(f"--output {output}: would overwrite the input {path}")
            save_images(y_hat, path)
    print(f"{len(files) * samples} image(s): {target}")
    return target


# ----------------------------------------------------------------------------- 6 Evaluation

# The paper's numbers, all on Cityscapes: per-pixel accuracy, per-class accuracy, class IOU.
TABLE_1 = {"L1": (.42, .15, .11), "GAN": (.22, .05, .01), "cGAN": (.57, .22, .16),
           "L1+GAN": (.64, .20, .15), "L1+cGAN": (.66, .23, .17), "ground truth": (.80, .26, .21)}
TABLE_2 = {("encoder-decoder", "L1"): (.35, .12, .08), ("unet", "L1"): (.48, .18, .13),
           ("encoder-decoder", "L1+cGAN"): (.29, .09, .05), ("unet", "L1+cGAN"): (.55, .20, .14)}
TABLE_3 = {1: (.39, .15, .10), 16: (.65, .21, .17), 70: (.66, .23, .17), 286: (.42, .16, .11)}
TABLE_6 = {"L1": (.86, .42, .35), "cGAN": (.74, .28, .22), "L1+cGAN": (.83, .36, .29)}
FIGURE_7 = {"L1": (.81, .69, .70), "cGAN": (.87, .74, .84), "L1+cGAN": (.86, .84, .82),
            "PixelGAN": (.83, .68, .78)}        # histogram intersection with the truth: L, a, b

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


def scorer_for(cfg: Config, device: torch.device) -> common.FCN8s:
    """The FCN-8s of this dataset, trained once and kept beside the runs."""
    name = Path(cfg.data).resolve().name if cfg.data else "streets"
    path = Path(cfg.out or ".").parent / f"fcn8s-{name}-{cfg.size[0]}x{cfg.size[1]}.pt"
    photos = dataset(replace(cfg, limit=0), "train")
    return common.fcn_scorer(photos, path, device, cfg.vgg, cfg.scorer_width, cfg.scorer_steps)


@torch.no_grad()
def evaluate(cfg: Config, state: State) -> dict:
    """The paper's metrics on the test split, beside its tables; writes metrics.json and pictures.

    FCN-score (Tables 1 to 3): a network trained on real photos labels the generated ones. Its score
    on the real test photos, the ground-truth row, says how well that can be done at all. For photo
    to labels (Table 6) the output's colours are read as the nearest classes, without a network.
    """
    device, out = next(plain(state.generator).parameters()).device, Path(cfg.out or ".")
    generator, test_set = test_time(state, cfg), dataset(cfg, "test")
    if not test_set.roles & {"image", "B", "pair"}:
        raise UserError(f"--data {cfg.data}: its test split has no photos, so there is no truth to "
                        "compare with; use sample")
    table = class_table(cfg.classes) if cfg.classes else None
    scorer = scorer_for(cfg, device) if cfg.task == "labels2photo" else None
    scored = table is not None and cfg.task in ("labels2photo", "photo2labels")
    confusion, histograms, l1, tiles = {}, {}, [], []
    for i in tqdm(range(len(test_set)), desc="evaluate", unit="image", disable=None):
        pair = pair_of(test_set[i], cfg, device)
        if "image" not in pair:
            raise UserError(f"{pair['name']}: no truth to compare with; use sample")
        torch.manual_seed(cfg.seed)
        y_hat = translate(generator, pair["input"])
        l1.append(l1_loss(y_hat, pair["image"]).item())
        views = {"output": to_rgb(y_hat, pair, cfg), "truth": to_rgb(pair["image"], pair, cfg)}
        tiles.append(torch.cat([to_rgb(pair["input"], pair, cfg), *views.values()]).cpu())
        for row, view in views.items():
            histograms[row] = histograms.get(row, 0) + colour_histograms(view).cpu()
            if scored:
                label = pair["label"] if "label" in pair else nearest_colour(pair["image"], table)
                found = scorer(view).argmax(1) if scorer else nearest_colour(view, table)
                counts = common.confusion_matrix(found, label, table).cpu()
                confusion[row] = confusion.get(row, 0) + counts
    lab = histogram_intersection(histograms["output"], histograms["truth"]).tolist()
    metrics = {"images": len(l1), "L1": sum(l1) / len(l1), "histogram intersection": lab}
    metrics |= {row: common.segmentation_scores(counts) for row, counts in confusion.items()}
    report(metrics, cfg)
    worst = sorted(range(len(l1)), key=lambda i: -l1[i])[:8]                          # Fig. 21
    save_images(torch.cat([tiles[i] for i in worst]), out / "worst.png", nrow=6)
    plot_histograms(histograms, out / "histograms.png")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2))
    return metrics


def report(metrics: dict, cfg: Config) -> None:
    """The metrics as text beside the paper's. Its data and scorer are others: compare orderings."""
    def line(name: str, values, digits: int) -> None:
        print(f"  {name:46}" + "".join(f"{v:8.{digits}f}" for v in values))

    print(f"\n{metrics['images']} test images, L1 {metrics['L1']:.4f} for values in [-1, 1]")
    print(f"\nFig. 7d, histogram intersection {'L':>23}{'a':>8}{'b':>8}")
    line("this run", metrics["histogram intersection"], 3)
    figure = FIGURE_7.get("PixelGAN" if (cfg.loss, cfg.patch) == ("L1+cGAN", 1) else cfg.loss)
    if figure:
        line("paper, Cityscapes", figure, 2)
    if "output" not in metrics:
        print("\nno segmentation scores: this task or dataset has no label maps")
        return
    labels = cfg.task == "photo2labels"
    print(f"\n{'Labels by nearest colour' if labels else 'FCN-score, by our own scorer':32}"
          f"{'per-pixel':>23}{'class':>8}{'IOU':>8}")
    name = f"this run: {cfg.generator}, {cfg.loss}, {cfg.patch} x {cfg.patch}"
    line(name, metrics["output"].values(), 3)
    line("the truth, scored alike", metrics["truth"].values(), 3)
    paper = {f"Table 6, {cfg.loss}": TABLE_6.get(cfg.loss)} if labels else {
        f"Table 2, {cfg.generator}, {cfg.loss}": TABLE_2.get((cfg.generator, cfg.loss)),
        "Table 1, ground truth": TABLE_1["ground truth"]}
    if cfg.generator == "unet" and cfg.patch == 70 and not labels:
        paper[f"Table 1, {cfg.loss}"] = TABLE_1[cfg.loss]
    if cfg.generator == "unet" and cfg.loss == "L1+cGAN" and not labels:
        paper[f"Table 3, {cfg.patch} x {cfg.patch}"] = TABLE_3.get(cfg.patch)
    for name, values in paper.items():
        if values:
            line(f"paper, Cityscapes, {name}", values, 2)


def plot_histograms(histograms: dict[str, Tensor], path: Path) -> None:
    """Fig. 7a-c: log probability of L, a and b, output against truth."""
    figure = matplotlib.figure.Figure(figsize=(11, 3), layout="constrained")
    for c, axes in enumerate(figure.subplots(1, 3)):
        for (row, h), style in zip(histograms.items(), ("-", ":")):
            share = h[c] / h[c].sum()
            axes.plot(torch.arange(-109.5, 110), share.where(share > 0, torch.nan).log(), style,
                      label=row)
        axes.set(xlabel="Lab"[c], ylabel="log P", xlim=(0, 100) if c == 0 else (-60, 60))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")


# --------------------------------------------------------------------------- 7 Command line

def trace(cfg: Config) -> None:
    """One forward and one training step: stage, shape, parameters; then FLOPs, field and memory."""
    device = pick_device(cfg)
    cfg, train_set, _ = open_data(replace(cfg, compile=False))
    state = build(cfg, device)
    batch = to_pair(default_collate([train_set[i] for i in range(cfg.batch_size)]), cfg, device)
    x, y = batch["input"], batch["image"]
    print(f"{device}; input {tuple(x.shape)}, image {tuple(y.shape)}")
    for title, net, inputs in (("generator", state.generator, (x,)),
                               ("discriminator", state.discriminator, (x, y))):
        if net is None:
            continue
        print(f"\n{title:30}{'output':>18}{'parameters':>14}")
        hooks = [module.register_forward_hook(
            lambda module, _, y, name=name: print(f"  {name + ' ' + type(module).__name__:28}"
                f"{str(tuple(y.shape)):>18}{sum(p.numel() for p in module.parameters()):14,}"))
            for name, module in net.named_modules()
            if isinstance(module, (Down, Up)) or name.startswith("layers.")]
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            net(*inputs)
        for hook in hooks:
            hook.remove()
        print(f"  {'in all':46}{sum(p.numel() for p in net.parameters()):14,}   "
              f"{flops.get_total_flops() / 1e9:.2f} GFLOP forward")
    with FlopCounterMode(display=False) as flops:
        train_step(state, batch, cfg)
    clock = time.time()
    losses = ", ".join(f"{k} {v.item():.4f}" for k, v in train_step(state, batch, cfg).items())
    print(f"\none training step: {flops.get_total_flops() / 1e9:.1f} GFLOP, "
          f"{time.time() - clock:.3f} s, {peak_memory(device):.2f} GiB at most; {losses}")
    if state.discriminator is not None:
        print(f"receptive field of D: {receptive_field(cfg.patch)} pixels, asked of the gradient")


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


def receptive_field(patch: int) -> int:
    """The side of the square of input pixels that one unit of D depends on, by its gradient."""
    net = PatchDiscriminator(width=1, patch=patch)
    for module in net.modules():                # a normalisation would couple all pixels
        if isinstance(module, BatchNorm):
            module.use_running = True
    x = torch.zeros(1, 3, 640, 640, requires_grad=True)
    verdicts = net(x, torch.zeros_like(x))
    verdicts[0, 0, verdicts.shape[2] // 2, verdicts.shape[3] // 2].backward()
    rows = x.grad[0].abs().sum((0, 2)).nonzero()
    return int(rows.max() - rows.min() + 1)


def refuse(text: str) -> None:
    """In place of argparse's own way, which prints a screen of usage before the one line."""
    raise UserError(f"{text}; --help lists all flags")


def parser() -> argparse.ArgumentParser:
    """A flag per field of Config, and a few for the call; only those given are in the result."""
    p = argparse.ArgumentParser(
        "pix2pix.py", description=__doc__.split("\n\n")[0], epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    p.error = refuse
    add = p.add_argument
    add("mode", nargs="?", default="train", help="what to do (train)",
        choices=("train", "sample", "evaluate", "check", "trace"))
    add("--data", metavar="DIR", help="a dataset in any known layout (the built-in streets)")
    add("--preset", choices=PRESETS, help="a line of Sec. 6.2 (toy with the streets)")
    add("--task", choices=CHOICES["task"], help="what is made from what (labels2photo)")
    add("--direction", choices=("AtoB", "BtoA"), help="of pairs, which half is the input (AtoB)")
    add("--classes", metavar="N|NAME", help="a number, or a table of common.py (the data's)")
    add("--one-hot", action="store_true", help="label maps as one-hot channels, not as colours")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels, multiples of 16 (256 256)")
    add("--no-jitter", dest="jitter", action="store_false", help="no resize to 286/256 and crop")
    add("--no-mirror", dest="mirror", action="store_false", help="no random flips")
    add("--limit", type=int, metavar="N", help="use the first N examples (0: all)")
    add("--generator", choices=CHOICES["generator"], help="Table 2 (unet)")
    add("--width", type=int, metavar="N", help="channels after the first layer (64)")
    add("--levels", type=int, metavar="N", help="halvings in G (0: as the size allows, up to 8)")
    add("--bottleneck-norm", action="store_true", help="BatchNorm on the innermost map (Sec. 6.3)")
    add("--smooth", action=argparse.BooleanOptionalAction, help="average away the grid in G; ours")
    add("--first-dropout", type=int, choices=(1, 2), help="first of three blocks with dropout (1)")
    add("--patch", type=int, choices=PATCHES, help="receptive field of D, pixels; Table 3 (70)")
    add("--loss", choices=CHOICES["loss"], help="Table 1 (L1+cGAN)")
    add("--lambda-l1", type=float, metavar="X", help="weight of L1 in Eq. (4) (100)")
    add("--epochs", type=int, metavar="N", help="passes over the training set (the preset's)")
    add("--steps", type=int, metavar="N", help="end after so many updates (0: epochs decide)")
    add("--batch-size", type=int, metavar="N", help="images per step and process (the preset's)")
    add("--lr", type=float, metavar="X", help="Adam's learning rate (0.0002)")
    add("--betas", type=float, nargs=2, metavar="B", help="Adam's momentum parameters (0.5 0.999)")
    add("--decay", action="store_true", help="learning rate to 0 in the second half of the epochs")
    add("--seed", type=int, metavar="N", help="of initialisation, order, crops and noise (0)")
    add("--init", metavar="FILE", help="start from these weights, ours or the authors' (none)")
    add("--resume", action="store_true", help="continue the run in --out, or the newest, exactly")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints (0: an epoch)")
    add("--checkpoint", metavar="FILE", help="to sample or evaluate with (the newest run's)")
    add("--input", metavar="PATH", help="sample: a file or a folder of any size (the test split)")
    add("--output", metavar="PATH", help="sample: a file or a folder (test/ in the run's folder)")
    add("--samples", type=int, metavar="N", help="sample: outputs per input (1)")
    add("--eval-mode", action="store_true", help="test without dropout, with running averages")
    add("--vgg", metavar="WEIGHTS", help="FCN-8s scorer: imagenet, random or a file (imagenet)")
    add("--scorer-width", type=int, metavar="N", help="FCN-8s scorer: 64 is VGG-16 (64)")
    add("--scorer-steps", type=int, metavar="N", help="FCN-8s scorer: batches of four (2000)")
    add("--gpu", type=int, metavar="N", help="CUDA device, -1 the CPU (the first GPU if any)")
    add("--workers", type=int, metavar="N", help="processes that load data (4 with a GPU, else 0)")
    add("--precision", choices=CHOICES["precision"], help="bf16: autocast the networks (fp32)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--channels-last", action=argparse.BooleanOptionalAction, help="memory order (with a GPU)")
    add("--out", metavar="DIR", help="the run's folder (the next free runs/pix2pix-N)")
    return p


EXAMPLES = """examples:
  python pix2pix.py                                     train on the built-in streets
  python pix2pix.py evaluate                            score the newest run beside the paper
  python pix2pix.py sample --samples 3                  three outputs for each test layout"""
# Flags of the one call, by the modes that read them; all others are fields of Config.
CALL = {"preset": ("train", "check", "trace", "sample", "evaluate"), "resume": ("train",),
        "checkpoint": ("sample", "evaluate"), "input": ("sample",), "output": ("sample",),
        "samples": ("sample",)}
# What may differ from the checkpoint when a run goes on, and when it is tested.
FREE = {"data", "epochs", "steps", "save_every", "gpu", "workers", "precision", "compile",
        "channels_last", "out"}
FREE_AT_TEST = FREE | {"size", "limit", "seed", "eval_mode", "vgg", "scorer_width", "scorer_steps"}


def load_for_test(given: dict, call: dict) -> tuple[Config, State]:
    """Network and config of --checkpoint or the newest run. A released G tells its own shape."""
    path = Path(call["checkpoint"]) if "checkpoint" in call else (
        Path(given["out"]) if "out" in given else newest_run()) / "checkpoint.pt"
    stored = read_checkpoint(path)
    if "released" in stored:
        weights = rename_released(stored["released"], path).get("generator")
        if weights is None:
            raise UserError(f"{path}: a released discriminator; to sample, a generator is needed")
        if not {"input", "data"} & set(given | call):
            raise UserError(f"{path}: released weights know no dataset; say --input or --data")
        n = sum(k.startswith("encoder") and k.endswith("conv.weight") for k in weights)
        shape = dict(levels=n, width=weights["encoder.0.conv.weight"].shape[0], first_dropout=2,
                     task="pairs" if len(weights[f"decoder.{n - 1}.conv.bias"]) == 3
                     else "colorization", loss="L1", out="runs/released")
        cfg = replace(Config(**shape), **PRESETS.get(call.get("preset"), {}) | given)
    elif "preset" in call:
        raise UserError(f"--preset {call['preset']}: {path} knows its settings; leave the flag out")
    else:
        cfg = stored_config(stored, path, given, FREE_AT_TEST)
        cfg = replace(cfg, init="", out=given.get("out", str(path.parent)))
    check_config(cfg)
    state = build(replace(cfg, compile=False), pick_device(cfg))
    load_networks(state, path)
    return cfg, state


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
    resume = call.get("resume", False)
    if resume and "preset" in call:
        raise UserError(f"--preset {call['preset']} with --resume: the run knows its settings")
    if mode == "sample":
        cfg, state = load_for_test(given, call)
        sample(cfg, state, call.get("input", ""), call.get("output", ""), call.get("samples", 1),
               given.get("size"))
        return
    if mode == "evaluate":
        evaluate(*load_for_test(given, call))
        return
    if resume:
        path = (Path(given["out"]) if "out" in given else newest_run()) / "checkpoint.pt"
        cfg = stored_config(read_checkpoint(path), path, given, FREE)
        cfg = replace(cfg, out=str(path.parent), init="")
    else:
        preset = call.get("preset", "" if given.get("data") else "toy")
        cfg = replace(Config(), **PRESETS.get(preset, {}) | given)
        if preset == "sketches" and mode == "train":
            raise UserError("--preset sketches: the paper tests the edges models on sketches and "
                            "trains none; use sample with a checkpoint of edges2shoes")
    check_config(cfg)
    if mode == "check":
        cfg = replace(cfg, jitter=False, mirror=False)
        splits = [dataset(cfg, split, instances=True) for split in ("train", "test")]
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
        print(f"pix2pix.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:                    # a disk that is full, a folder that is read-only
        print(f"pix2pix.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:    # numpy's, the GPU's, and torch's on the CPU
        if not (isinstance(error, MemoryError) or "memory" in str(error)):
            raise
        print("pix2pix.py: error: out of memory; a smaller --size, --width or --batch-size, or "
              f"--precision bf16, helps ({str(error).partition(chr(10))[0]})", file=sys.stderr)
        sys.exit(2)
