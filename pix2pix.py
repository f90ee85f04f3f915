"""pix2pix: one recipe for paired image-to-image translation.

P. Isola, J.-Y. Zhu, T. Zhou, A. A. Efros. Image-to-Image Translation with Conditional Adversarial
Networks. CVPR 2017. Section, equation and table numbers are those of arXiv v3 (1611.07004).

Idea. A generator G turns an input x (a label map, edges, a grey photo) into an image. An L1 loss
makes it land near the true image y, but blurred: where several images are possible for x, it takes
their median. A second network D learns to tell (x, y) from (x, G(x)), patch by patch. G has to
avoid whatever D recognises as false, blur for instance, so D is a loss that nobody had to design.
Skip connections carry the layout past G's bottleneck. Nothing is tuned per task.

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
    dropout in decoder blocks 1-3 | Lua 1-3, PyTorch 2-4 (of 7: 2-3)  | 1-3; --first-dropout 2
    D's objective is halved       | Lua: only in what it reports      | halved
    constant learning rate        | PyTorch: falls in the second half | constant; --decay falls,
                                  |   to 0 in the last epoch          |   but not to 0
    G's step after D's            | Lua: with D's old activations     | D judges anew, as in PyTorch
    L1 is a norm, a sum           | the mean over all elements        | mean; lambda refers to it
    sigmoid, then log             | PyTorch: logits                   | logits, without overflow
    the last layer of G is "a     | transposed, stride 2              | transposed: 8 halvings, 8
      convolution"                |                                   |   doublings
    checkerboards, which early    | the same                          | the same; --smooth (ours, on
      training leaves in images   |                                   |   in toy) averages them away
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
    8 bits of an image not stated | cut off                           | rounded

Run         python pix2pix.py                               built-in streets, minutes on a laptop
            python pix2pix.py --data ./cityscapes --gpu 0   the last line of Table 1
            python pix2pix.py sample --input label.png --output photo.png
"""

import atexit
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import common                                   # before torch: it says how torch's threads wait

import matplotlib.figure
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common import (
    COUNT, POSITIVE, SHARE, UserError, Within, check_settings, check_sides, class_table,
    colour_label, flag, notice, row_of, save_images, setting, smooth_grid)

# ---------------------------------------------------------------------------------- 1 Config

@dataclass
class Config:
    """Every setting is a flag. The defaults are the paper's; the text says where it states them."""
    # The task. An image x of some kind goes in and the image y that belongs to it is made; only
    # here do the experiments of Sec. 4 differ, the networks and the loss are always the same.
    data: str = setting("", "folder, in any known layout; none: the built-in streets")
    task: str = setting("labels2photo", "what is made from what, Sec. 4", (
        "labels2photo", "photo2labels", "pairs", "colorization", "inpainting"))
    direction: str = setting("AtoB", "which half of a pair is the input", ("AtoB", "BtoA"))
    classes: str = setting("", "a table of common.py, or a number; none: asks the data")
    one_hot: bool = setting(False, "label maps as one-hot channels; the paper feeds colours")
    size: tuple[int, int] = setting((256, 256), "height, width in pixels, Sec. 6.2", POSITIVE)
    jitter: bool = setting(True, "resize to 286/256 of the size, crop at random, Sec. 6.2")
    mirror: bool = setting(True, "flip left and right, half the time, Sec. 6.2")
    limit: int = setting(0, "use the first so many examples; 0: all (400 streets)", COUNT)
    # The networks. G and D have the same width; width 64 is the paper's, and G has then 54 million
    # parameters, D 2.8 million.
    generator: str = setting("unet", "Table 2, Sec. 6.1.1", ("unet", "encoder-decoder"))
    width: int = setting(64, "channels after the first layer of G and of D, Sec. 6.1", POSITIVE)
    levels: int = setting(0, "halvings in G, 8 at 256; 0: all that size allows", Within((0, 8)))
    bottleneck_norm: bool = setting(False, "BatchNorm on the innermost map, Sec. 6.3")
    smooth: bool = setting(False, "ours: average away a transposed convolution's grid")
    first_dropout: int = setting(1, "first of three blocks with dropout; PyTorch: 2", (1, 2))
    patch: int = setting(70, "D's receptive field, Sec. 6.1.2", (1, 16, 34, 70, 142, 286))
    # The objective, Eq. (4): cGAN is D(x, y), GAN is D(y) alone, L1 is the distance to the photo.
    loss: str = setting("L1+cGAN", "Table 1", ("L1", "GAN", "cGAN", "L1+GAN", "L1+cGAN"))
    lambda_l1: float = setting(100.0, "lambda in Eq. (4), for images in [-1, 1]; Sec. 4.2", COUNT)
    # Training. The paper counts in epochs; an epoch of 2975 images in batches of one is 2975 steps.
    epochs: int = setting(200, "passes over the training set, Sec. 6.2", POSITIVE)
    steps: int = setting(0, "end after so many updates; 0: epochs decide", COUNT)
    batch_size: int = setting(1, "images per step and process; 10 in Table 2, Sec. 6.2", POSITIVE)
    lr: float = setting(0.0002, "Adam's, both networks, Sec. 3.3", Within((1e-9, 0.9)))
    betas: tuple[float, float] = setting((0.5, 0.999), "Adam's, Sec. 3.3", SHARE)
    decay: bool = setting(False, "not in the paper; PyTorch release: lr to 0 in the second half")
    seed: int = setting(0, "of initialisation, order, crops and noise", COUNT)
    init: tuple[str, ...] = setting((), "start from these weights: ours, or the authors'")
    save_every: int = setting(0, "steps between checkpoints and grids; 0: an epoch", COUNT)
    # Test time and evaluation. The scorer is the network that labels generated photos, Sec. 4.1.
    eval_mode: bool = setting(False, "test as PyTorch's --eval: no dropout, running averages")
    vgg: str = setting("imagenet", "where the FCN-8s scorer starts: imagenet, random, or a file")
    scorer_width: int = setting(64, "64 is VGG-16; less for small studies", POSITIVE)
    scorer_steps: int = setting(2000, "ours: batches of four that the scorer trains on", POSITIVE)
    # The machine
    gpu: int | None = setting(None, "a CUDA device; -1: the CPU; none: the first", Within((-1, 99)))
    workers: int | None = setting(None, "data processes; none: 4 with a GPU", Within((0, 256)))
    precision: str = setting("fp32", "bf16: autocast around the networks", ("fp32", "bf16"))
    compile: bool = setting(False, "torch.compile the networks")
    channels_last: bool | None = setting(None, "memory order; none: with a GPU")
    out: str = setting("", "the run's folder; none: the next free runs/pix2pix-N")
    # One call
    preset: str = setting("", "a line of Sec. 6.2; none: toy with the streets")
    resume: bool = setting(False, "continue the run in --out, or the newest, exactly")
    checkpoint: tuple[str, ...] = setting((), "to test with, also the authors'; none: the newest")
    input: str = setting("", "a file or a folder of any size; none: the test split")
    output: str = setting("", "a file or a folder; none: test/ in the run's folder")
    samples: int = setting(1, "outputs per input", POSITIVE)

    def __post_init__(self):
        check_settings(self)
        if self.one_hot and self.task != "labels2photo":
            raise UserError(f"--one-hot needs label maps as input; --task {self.task} has none")


# Sec. 6.2, line by line. Where it is silent on jitter and mirroring: on, as in both releases.
# Directions are those of the authors' side-by-side files: facades and cityscapes hold (photo,
# labels), maps (aerial, map), night2day (night, day), the edges sets (edges, photo). Its sketches
# test the edges models and train none.
PRESETS = {
    "cityscapes": dict(direction="BtoA", epochs=200, batch_size=1),                 # 2975 images
    # The runs with batch size 10 had BatchNorm on the bottleneck, too (Sec. 6.3).
    "cityscapes-batch10": dict(direction="BtoA", epochs=200, batch_size=10, bottleneck_norm=True),
    "cityscapes-photo2labels": dict(task="photo2labels", epochs=200, batch_size=1),  # Table 6
    "facades": dict(direction="BtoA", epochs=200, batch_size=1),                    # 400
    "map2aerial": dict(task="pairs", direction="BtoA", epochs=200, batch_size=1),   # 1096
    "aerial2map": dict(task="pairs", epochs=200, batch_size=1),                     # 1096
    "colorization": dict(task="colorization", epochs=6, batch_size=4, jitter=False),  # 1.2 million
    "edges2shoes": dict(task="pairs", epochs=15, batch_size=4),                     # 50 000
    "edges2handbags": dict(task="pairs", epochs=15, batch_size=4),                  # 137 000
    "day2night": dict(task="pairs", direction="BtoA", epochs=17, batch_size=4),     # 17 823
    "thermal2color": dict(task="pairs", epochs=10, batch_size=4),                   # 36 609
    "inpainting": dict(task="inpainting", epochs=25, batch_size=4),                 # 14 900
    # Ours, for the streets on a laptop's CPU. Adam moves each weight by about lr, however few there
    # are: a net of a quarter of the width needs a larger one to change its output as fast. The
    # decay then calms it within the few epochs that there are. D sees a quarter of the side, 34
    # pixels of 128, as the paper's 70 of 256. Lambda is smaller: in our trials, which changed more
    # than this, 100 left the outputs blurred for longer.
    "toy": dict(size=(128, 128), width=16, levels=5, patch=34, lambda_l1=20.0, epochs=8, lr=2e-3,
                decay=True, smooth=True, vgg="random", scorer_width=16, scorer_steps=600),
}
# Ours, too: the same for half an hour.
PRESETS["streets"] = PRESETS["toy"] | dict(epochs=50, scorer_steps=1200)
PATCHES = {1: 0, 16: 1, 34: 2, 70: 3, 142: 4, 286: 5}   # D's receptive field: its halvings


def configure(preset: str, given: dict) -> Config:
    """The paper's settings, then a preset's, then what was given."""
    return Config(**{"preset": preset} | row_of(PRESETS, "--preset", preset) | given)


def fit_levels(cfg: Config) -> Config:
    """The number of halvings that the training size allows, at most the paper's 8."""
    h, w = cfg.size
    deepest = max(k for k in range(9) if h % 2 ** k == 0 and w % 2 ** k == 0)
    check_sides("--size", cfg.size, 2 ** max(cfg.levels, 4), 32,
                f"G halves each side {cfg.levels or '4 to 8'} times")
    halvings = PATCHES[cfg.patch]                # D's last two convolutions need 3 x 3 units
    if "GAN" in cfg.loss and halvings and min(h, w) < 3 * 2 ** halvings:
        raise UserError(f"--patch {cfg.patch}: D halves each side {halvings} times; --size {h} {w} "
                        f"is too small, {3 * 2 ** halvings} would do")
    return replace(cfg, levels=cfg.levels or deepest)


# -------------------------------------------------------------------------------- 2 Networks

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


class Up(nn.Module):
    """Decoder block: ReLU, transposed convolution, BatchNorm, dropout; doubles H and W.

    The dropout is the noise z, and the only one: given a noise vector, G learned to ignore it
    (Sec. 3.1). Hence it stays on at test time, unless `deterministic` (--eval-mode).
    `smooth`, ours, takes the mean of each 2 x 2 window. This removes the checkerboard that a
    transposed convolution leaves early in training (see smooth_grid), costs some sharpness, and
    moves the picture half a pixel up and left in each block.
    """
    deterministic = smooth = False

    def __init__(self, c_in: int, c_out: int, dropout: bool = False, last: bool = False):
        super().__init__()
        self.dropout = dropout
        self.conv = nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=last)
        self.norm = nn.Identity() if last else BatchNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.relu(x))
        x = self.norm(smooth_grid(x) if self.smooth else x)
        return F.dropout(x, 0.5, training=True) if self.dropout and not self.deterministic else x


class Generator(nn.Module):
    """U-Net or encoder-decoder (Sec. 3.2.1 and 6.1.1, Fig. 3).

    x (B, c_x, H, W) in [-1, 1]  ->  y_hat (B, c_y, H, W) in [-1, 1]; H, W multiples of 2^levels.

    With 8 levels and 256 x 256: down C64-C128-C256-C512-C512-C512-C512-C512 to 1 x 1, and up again
    CD512-CD512-CD512-C512-C256-C128-C64 and the output. The U-Net adds skips: up block i also sees
    what down block n - i + 1 made, so its *inputs* are those of the paper's U-Net decoder line,
    512-1024-1024-1024-1024-512-256-128. Without skips it is the encoder-decoder (Sec. 4.3).
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
        # Blocks 1 to 3 have dropout. PyTorch release: all from 2 on that make 512 channels of 1024,
        # which are 2 to 4 with 8 levels and only 2 and 3 with the 7 of its unet_128.
        noisy = range(1, 4) if first_dropout == 1 else range(2, levels - 3)
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
    """Networks and optimisers; precision, compilation and distribution go around the networks.

    Both are trained by Adam with the same learning rate and momentum parameters (Sec. 3.3). All
    processes of a run on several GPUs start from the same weights, since the seed is the same.
    """
    torch.manual_seed(cfg.seed)
    nets = [net and dress(net, cfg, device) for net in networks(cfg)]
    adam = [net and torch.optim.Adam(net.parameters(), cfg.lr, cfg.betas, fused=True)
            for net in nets]
    for optimiser in filter(None, adam):
        optimiser.register_step_pre_hook(average_gradients)
    state = State(*nets, *adam)
    if cfg.init:
        load(state, read(*cfg.init), " ".join(cfg.init))
    return state


def make_pair(batch: dict, cfg: Config) -> dict:
    """A batch of common.Dataset with "input" x (B, c_x, H, W) and, where known, "image" y added.

    Label maps become colour images, as in the paper, or one-hot channels. Colorization works in
    Lab: x = L / 50 - 1, y = (a, b) / 110, so that G has one input and two output channels and
    cannot change the lightness. Inpainting whitens the central square of half the side.
    """
    if cfg.task == "colorization":
        lab = rgb_to_lab(batch["image"])        # the definition stands with Fig. 7, in room 6
        return batch | {"input": lab[:, :1] / 50 - 1, "image": lab[:, 1:] / 110}
    if cfg.task == "inpainting":
        x = batch["image"].clone()              # the photo is the target, so it must stay whole
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
        colours = F.one_hot(batch["label"], table.channels).movedim(-1, 1).float().contiguous()
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
        loss_gan = generator_loss(D(x, y_hat))
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
    """Constant in the paper. PyTorch release (--decay): full for half the epochs, then down in
    equal steps, which reach 0 in the release's last epoch and after the last epoch here."""
    half = cfg.epochs // 2
    falling = max(0, epoch + 1 - half) / (cfg.epochs - half + 1)     # epoch counts from 0
    return cfg.lr * (1 - falling) if cfg.decay else cfg.lr


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


def rename_released(stored: dict, path: Path) -> dict:
    """The authors' PyTorch files (a plain state dict of G or of D) under our names.

    Their U-Net is nested: level i + 1 is submodule 3 of level i (submodule 1 of the outermost), so
    its keys carry i prefixes. Layers without parameters own an index too: hence 1, 2, 5 and 6.
    """
    if {"model.model.0.weight", "model.model.3.weight"} <= stored.keys():
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
    raise UserError(f"{path}: no checkpoint of pix2pix.py and no released generator; its first key "
                    f"is {next(iter(stored), 'missing')}")


def released_config(stored: dict, given: dict) -> dict:
    """The settings that the authors' generator has, read off the shapes of its weights.

    Nothing else is in their files. Two output channels can only be colorization.
    """
    weights = stored["generator"]
    n = sum(k.startswith("encoder.") and k.endswith("conv.weight") for k in weights)
    c_y = weights[f"decoder.{n - 1}.conv.weight"].shape[1]
    return dict(levels=n, width=len(weights["encoder.0.conv.weight"]), first_dropout=2, loss="L1",
                task="pairs" if c_y == 3 else "colorization")


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
    for module in generator.modules():
        if isinstance(module, BatchNorm):
            module.use_running = cfg.eval_mode
        elif isinstance(module, Up):
            module.deterministic = cfg.eval_mode
    return generator.eval()


def test_pair(item: dict, state: State, cfg: Config) -> dict:
    """One item of a dataset as a batch of one where G is, made a pair."""
    return make_pair(common.batch_of_one(item, next(state.generator.parameters()).device), cfg)


def to_rgb(value: Tensor, pair: dict, cfg: Config) -> Tensor:
    """An input or output of G as a picture (B, 3, H, W) in [-1, 1]."""
    if cfg.task == "colorization" and value.shape[1] == 2:
        return lab_to_rgb(torch.cat([50 * (pair["input"] + 1), 110 * value], 1))
    if cfg.one_hot and value is pair["input"]:
        return colour_label(value.argmax(1), class_table(cfg.classes))
    return value.expand(-1, 3, -1, -1) if value.shape[1] == 1 else value


def sample_grid(state: State, cfg: Config, test_set: common.Dataset, path: Path) -> None:
    """Input | output | truth of six test examples, evenly spread, two a row."""
    generator, tiles, n = test_time(state, cfg), [], min(6, len(test_set))
    for i in range(n):
        pair = test_pair(test_set[i * len(test_set) // n], state, cfg)
        torch.manual_seed(cfg.seed)             # the same noise in every grid
        values = [pair["input"], translate(generator, pair["input"]), pair.get("image")]
        tiles += [to_rgb(value, pair, cfg).cpu() for value in values if value is not None]
    save_images(torch.cat(tiles), path, nrow=6 if "image" in pair else 4)


def sample(cfg: Config, state: State, size: tuple[int, int] | None = None) -> Path:
    """Outputs for --input, a file or a folder of any sizes, or for the test split.

    An output has the size of its input; `size` resizes the inputs first. Several samples differ by
    their dropout; the paper observes "only minor stochasticity" (Sec. 3.1).
    """
    generator, target = test_time(state, cfg), Path(cfg.output or Path(cfg.out, "test"))
    role = {"labels2photo": "label", "colorization": "image", "inpainting": "image"}
    items = dataset(cfg, "test").has(NEEDED.get(cfg.task)) if not cfg.input else common.Dataset(
        files=common.input_files(cfg.input, role.get(cfg.task, "A")), classes=cfg.classes,
        size=size)
    for item, paths in common.outputs(items, cfg.input, target, cfg.samples):
        pair = test_pair(item, state, cfg)
        for k, path in enumerate(paths):
            torch.manual_seed(cfg.seed + k)
            save_images(to_rgb(translate(generator, pair["input"]), pair, cfg), path)
    return target


# ------------------------------------------------------------------------------ 6 Evaluation

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
    test_set = dataset(cfg, "test").has("image").has(NEEDED.get(cfg.task))
    device = next(generator.parameters()).device
    table, scorer = class_table(cfg.classes) if cfg.classes else None, None
    if cfg.task == "labels2photo":              # trained once, and kept beside the runs
        photos = dataset(cfg, "train", limit=0, jitter=False)      # as large as those it judges
        scorer = common.fcn_scorer(photos, out.parent, device, cfg.vgg, cfg.scorer_width,
                                   cfg.scorer_steps)
    scored = table is not None and cfg.task in ("labels2photo", "photo2labels")
    confusion, histograms, l1, tiles = {}, {}, [], []
    for i in tqdm(range(len(test_set)), desc="evaluate", unit="image", disable=None):
        pair = test_pair(test_set[i], state, cfg)
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
    def line(name: str, values, digits: int = 2) -> None:
        if values:
            print(f"  {name:46}" + "".join(f"{v:8.{digits}f}" for v in values))

    print(f"\n{metrics['images']} test images, L1 {metrics['L1']:.4f} for values in [-1, 1]")
    print(f"\nFig. 7d, histogram intersection {'L':>23}{'a':>8}{'b':>8}")
    line("this run", metrics["histogram intersection"], 3)
    pixel = (cfg.loss, cfg.patch) == ("L1+cGAN", 1)
    line("paper, Cityscapes", FIGURE_7.get("PixelGAN" if pixel else cfg.loss))
    if "output" not in metrics:                 # neither the task nor the data knows label maps
        return
    labels, unet = cfg.task == "photo2labels", cfg.generator == "unet"
    print(f"\n{'Labels by nearest colour' if labels else 'FCN-score, by our own scorer':32}"
          f"{'per-pixel':>23}{'class':>8}{'IOU':>8}")
    line(f"this run: {cfg.generator}, {cfg.loss}, {cfg.patch} x {cfg.patch}",
         metrics["output"].values(), 3)
    line("the truth, scored alike", metrics["truth"].values(), 3)
    if labels:
        line(f"paper, Cityscapes, Table 6, {cfg.loss}", TABLE_6.get(cfg.loss))
        return
    line("paper, Cityscapes, Table 1, ground truth", TABLE_1["ground truth"])
    line(f"paper, Cityscapes, Table 2, {cfg.generator}, {cfg.loss}",
         TABLE_2.get((cfg.generator, cfg.loss)))
    if unet and cfg.patch == 70:
        line(f"paper, Cityscapes, Table 1, {cfg.loss}", TABLE_1[cfg.loss])
    if unet and cfg.loss == "L1+cGAN":
        line(f"paper, Cityscapes, Table 3, {cfg.patch} x {cfg.patch}", TABLE_3.get(cfg.patch))


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


# ------------------------------------------------------------------------------- 7 Machinery
# What trains any network. Nothing below is the paper's, and from pick_device on it is word for word
# the same in the four scripts.

NAME = "pix2pix"
NETWORKS = ("generator", "discriminator")       # in State; the first is what testing needs
MODES = ("train", "sample", "evaluate", "check", "trace")
CALL = {"preset": ("train", "check", "trace"), "resume": ("train",), "input": ("sample",),
        "checkpoint": ("sample", "evaluate"), "output": ("sample",), "samples": ("sample",)}
# What may differ from the checkpoint when a run goes on, and when it is tested.
FREE = {"data", "epochs", "steps", "save_every", "gpu", "workers", "precision", "compile",
        "channels_last", "out", *CALL} - {"preset"}
FREE_AT_TEST = FREE | {"size", "limit", "seed", "eval_mode", "vgg", "scorer_width", "scorer_steps"}
NEEDED = {"labels2photo": "label", "photo2labels": "label", "pairs": "A"}    # task: kind of file
ALONE = {"compile": False}                      # settings of a network that is tested, not trained


def dataset(cfg: Config, split: str, **more) -> common.Dataset:
    train = split == "train"
    return common.Dataset(**dict(
        data=cfg.data, split=split, size=cfg.size, jitter=train and cfg.jitter, limit=cfg.limit,
        mirror=train and cfg.mirror, classes=cfg.classes, direction=cfg.direction, seed=cfg.seed,
        photos_only=cfg.task in ("colorization", "inpainting"), instances=False) | more)


def open_data(cfg: Config) -> tuple[Config, common.Dataset, common.Dataset]:
    """Both splits, and the config with what the data turned out to be: its classes, its task."""
    train_set = dataset(cfg, "train").has("image")
    cfg = replace(fit_levels(cfg), classes=train_set.classes)
    if not cfg.resume and cfg.task == "labels2photo" and "label" not in train_set.roles:
        cfg = replace(cfg, task="pairs")        # label maps that are colour images beside photos
    return cfg, train_set.has(NEEDED.get(cfg.task)), dataset(cfg, "test")


def schedule(cfg: Config) -> set[str]:
    """The settings that the learning rate follows."""
    return {"epochs"} if cfg.decay else set()


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
    words = list(sys.argv[1:] if arguments is None else arguments)
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
        state = build(replace(cfg, **ALONE), pick_device(cfg))
        load(state, stored, where)
        if not (cfg.out or cfg.output):         # weights that lie in no run's folder
            cfg = replace(cfg, out=str(common.free_folder(NAME)))
        run_mode(mode, cfg, state, given)
    elif mode == "train":
        train(cfg, stored)
    elif mode == "check":
        common.check_data([dataset(cfg, split) for split in ("train", "test")],
                          Path(cfg.out or common.free_folder("check")))
    else:
        trace(cfg)


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


if __name__ == "__main__":
    common.shell(main, NAME)
