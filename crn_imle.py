"""Conditional IMLE: any number of different images for one layout, without an adversary.

K. Li, T. Zhang, J. Malik. Diverse Image Synthesis from Semantic Layouts via Conditional IMLE.
ICCV 2019. Numbers are those of arXiv v1 (1811.12373). With it the baseline: CRN, the cascaded
refinement network of Q. Chen and V. Koltun, ICCV 2017, one output or k of them.

Idea. Regression shown one photo per layout learns an average; a GAN may ignore its noise and drop
modes. Here T(L, z) gets noise, and *every photo looks for its nearest sample*: of m images drawn
for the layout of a photo, the one that comes nearest is pulled towards the photo. Every photo
pulls one sample, so none is left out of the training; whether every mode is then learned depends
on m, on the capacity of T and on the length of the training. The samples that were not nearest
stay free to serve other photos. CRN's own way is k outputs at once, the best one trained; k is
then fixed.

Symbols     L batch["input"], one-hot    I batch["image"]    z batch["noise"]    T_theta generator
            S the images of one epoch     m candidates     K inner steps     S~ a batch

Algorithm 1, with what carries out each line. Misprint in lines 6 and 11: T(L^j, z_j) and I~_ij;
below is what is meant. An "epoch" is the paper's: one search, then K updates, whatever the number
of photos. Each line is named where it is carried out.
     1  initialise theta                                                   build
     2  for epoch = 1 .. E:                                                train
     3      S = |S| numbers of photos, drawn by their rarity (Sec. 3.4)    populate
     4      for i in S:                                                    search
     5          draw z_i1 .. z_im from N(0, I)                             draw_noise
     6          for j = 1 .. m:  I~_ij = T_theta(L_i, z_ij)                search
     7          sigma(i) = argmin_j of L^(I_i, I~_ij)                      search, distance
     8      for k = 1 .. K:                                                train
     9          S~ = |S~| members of S, drawn with replacement             Batches
    10          I~_i = T_theta(L_i, z_i,sigma(i)) for i in S~              train_step
    11          theta -= eta grad mean over S~ of L^(I_i, I~_i)            train_step
    12  return theta                                                       Run.save

Paper map   (a test reads these lines: every name must exist, and nothing numbered may be missing)
    Eq. (1)     distance in VGG's features         layer_terms, distance, balanced_weights
    Sec. 3.2    IMLE's objective (unnumbered)      search, train_step
    Alg. 1      conditional IMLE                   populate, search, Batches, train_step, train
    Sec. 3.3.1  the refinement network             Generator, RefinementModule
    Sec. 3.3.2  noise channels                     Generator, draw_noise
    Sec. 3.3.2  noise encoder                      NoiseEncoder
    Sec. 3.3.2  CRN with k outputs                 Generator, diversity_loss
    Sec. 3.4    C_k(p), D_p, R_p(k)                survey, rarity_scores, gaussian_kde
    Sec. 3.4    rebalanced S, masked loss          populate, paint_masks, layer_terms
    Sec. 4.2    settings                           Config, PRESETS
    Table 1     variance per class                 diversity, evaluate
    Table 2     which shows more artifacts         needs people; evaluate keeps best_of's images
    Fig. 1      histograms of hue                  notebook 3
    Fig. 2      CRN and IMLE, nine each            sample
    Fig. 3      a layout and 19 samples            sample, with --samples 19
    Fig. 4      between two noise vectors          interpolate
    Fig. 5      one noise, five layouts            transfer
    Fig. 6      grids in CRN's images              sample
    Fig. 7      edited layouts, the same noise     edit
    Fig. 8      interpolation as a video           interpolate
    Fig. 9      a car that moves away              video
    Fig. 10     differences of frames              video
    Fig. 11-12  more layouts with 19 samples       sample, with --samples 19

Paper                             | Released code                     | Here
    five VGG layers               | and the pixels                    | and the pixels;
                                  |                                   |   --pixel-weight 0: five
    VGG's pooling not stated      | average                           | average
    VGG's input not stated        | 0..255 minus Caffe's mean, not    | torchvision's: [0, 1], minus
                                  |   divided                         |   mean, over deviation
    VGG trained on ImageNet       | the same                          | --vgg; random: see build
    a sum of absolute values      | their mean                        | mean
    lambda: equal contributions   | constants                         | measured once; --calibrate
    lambda at the start           | constants of a CRN's training     | 1, or that of --init's CRN
    labels shrunk bilinearly      | by area                           | by area: at 1/2 the same
    noise shrunk bilinearly       | in effect every second pixel      | every second pixel
    features enlarged bilinearly  | corners aligned                   | corners aligned
    encoder: three convolutions   | 3x3, 3x3, 1x1; widths 100, 100    | as released;
                                  |                                   |   --encoder-width
    one training run              | encoder started anew at epoch 6   | --renew-encoder
    learning rate 1e-5            | 1e-4 for six epochs, then 1e-5    | 1e-5; preset imle-released
    start not stated              | CRN's weights, k = 9              | --init, or from scratch
    a gradient step               | Adam                              | Adam
    the search by L               | by the masked L                   | the masked L in both places
    T(L^j, z_j) in Alg. 1         | T(L_i, z_ij)                      | T(L_i, z_ij)
    I~_ij in the update           | i's nearest, rendered anew        | as released
    five largest classes          | a fixed list                      | by area, unknown counts
    KDE's bandwidth not stated    | Scott's rule                      | Scott's rule
    colours in a plane (singular  | not handled                       | 1 grey level^2 is added to
      covariance) not mentioned   |                                   |   every covariance
    rare classes not mentioned    | under 67 images: a score near 0   | under 10: the image's lowest
    blank images not mentioned    | one is left out                   | they are never drawn
    CRN trains the best of its    | that loss times 0.999, plus the   | as released
      k outputs                   |   mean of all k times 0.001       |
    noise between two z: linear   | linear                            | linear; interpolate shows a
                                  |                                   |   path of even variance, too

Run         python crn_imle.py                               built-in streets, minutes on a laptop
            python crn_imle.py --data ./gta --gpu 0 --init crn.pt      the paper's run
            python crn_imle.py sample --samples 19           Fig. 3 of the newest run
"""

import atexit
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import common                                   # before torch: it says how torch's threads wait

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common import (
    COUNT, POSITIVE, GroupNorm, UserError, Within, check_settings, check_sides, class_id,
    class_table, colour_label, flag, notice, row_of, save_images, setting)

# --------------------------------------------------------------------------------- 1 Config

VGG_LAYERS = ("conv1_2", "conv2_2", "conv3_2", "conv4_2", "conv5_2")                  # Eq. (1)
VGG_19 = tuple(f"conv{i}_{j}" for i, n in enumerate(common.BLOCKS[19], 1) for j in range(1, n + 1))


@dataclass
class Config:
    """Every setting is a flag. The defaults are the paper's; the text says where it states them."""
    # The task is always the same: a label map in, a photo out. The paper stays at 256 x 512, which
    # squeezes GTA-5's photos a little.
    data: str = setting("", "folder, in any known layout; none: the built-in streets")
    classes: str = setting("", "a table of common.py, or a number; none: asks the data")
    size: tuple[int, int] = setting((256, 512), "height, width in pixels, Sec. 4.2", POSITIVE)
    limit: int = setting(0, "use the first so many examples; 0: all (400 streets)", COUNT)
    # The network. Both models are one generator: a crn has k outputs and no noise, an imle has one
    # output, d channels of noise beside the label map, and the noise encoder. Ours, not in the
    # paper: a crn whose best output is chosen for the whole image, and noise that is one vector.
    model: str = setting("imle", "with noise, or the baseline without", ("imle", "crn"))
    outputs: int = setting(9, "crn: images per layout, k, Sec. 4.2", Within((1, 100)))
    diversity: str = setting("per-class", "crn: who is the best of k; ours: per-image", (
        "per-class", "per-image"))
    width: int = setting(1024, "channels of M0 to M4; finer ones have fewer, Sec. 3.3.1", POSITIVE)
    modules: int = setting(0, "0: down to 4 rows, so 7 at 256; Sec. 3.3.1", Within((0, 9)))
    noise_channels: int = setting(10, "d, Sec. 4.2", POSITIVE)
    noise: str = setting("spatial", "z per pixel; ours: one vector for all pixels", (
        "spatial", "broadcast"))
    encoder_width: int = setting(100, "of the noise encoder, as released; 0: no encoder", COUNT)
    # The objective. The VGG layers and the pixel term each have a lambda, which is measured once,
    # when they have been trained with lambda = 1 for --calibrate epochs; see balanced_weights.
    layers: tuple[str, ...] = setting(VGG_LAYERS, "VGG-19's, in Eq. (1)", VGG_19)
    pixel_weight: float = setting(1.0, "of the pixel term, as released; 0: Eq. (1)", COUNT)
    calibrate: int = setting(1, "ours: epochs after which lambda is measured, once", POSITIVE)
    rebalance: str = setting("both", "masks, bins of S; Sec. 3.4", ("both", "bins", "mask", "none"))
    # Algorithm 1, with the paper's letters. With its values the search is 12 % of the computation,
    # and each image of S is updated 25 times with the z that it has found. For a crn an epoch is
    # --inner-steps updates without a search. The paper's rate is for a start from a CRN's weights
    # (--init); from scratch it needs ten times as much (preset imle-released).
    epochs: int = setting(16, "E, searches; not in the paper, as released", POSITIVE)
    pool: int = setting(400, "|S|, images of an epoch, Sec. 4.2", POSITIVE)
    candidates: int = setting(10, "m, samples among which a photo looks, Sec. 4.2", POSITIVE)
    inner_steps: int = setting(10000, "K, updates of an epoch; 0: each photo once (crn)", COUNT)
    batch_size: int = setting(1, "|S~|, images per step and process, Sec. 4.2", POSITIVE)
    steps: int = setting(0, "end after so many updates; 0: epochs decide", COUNT)
    lr: float = setting(1e-5, "eta, Adam's, Sec. 4.2", Within((1e-9, 0.9)))
    lr_drop: int = setting(0, "from this epoch on a tenth of lr; 0: never. Released: 6", COUNT)
    renew_encoder: bool = setting(False, "as released: at --lr-drop the encoder starts anew")
    noise_gain: float = setting(5.0, "--init: noise's weights over CRN's RMS, as released", COUNT)
    search_batch: int = setting(5, "candidates rendered at once: memory, not results", POSITIVE)
    keep_features: int = setting(0, "photos whose features stay in memory, 64 MB at 256", COUNT)
    seed: int = setting(0, "of initialisation, order and noise", COUNT)
    init: tuple[str, ...] = setting((), "start from these weights; imle also from a crn's")
    save_every: int = setting(0, "steps between checkpoints and grids; 0: an epoch", COUNT)
    # Test time and evaluation. Nothing below here changes what training computes, but for rounding
    # (--precision, --compile, --channels-last). More images per layout than the paper's 100 let
    # best-of-n and the streets' exact measures see rarer modes.
    eval_samples: int = setting(100, "images per layout, nine of them taken, Sec. 4.3", POSITIVE)
    images: str = setting("", "score another model's NAME.png or NAME_1.png, ... of this folder")
    vgg: str = setting("imagenet", "VGG-19's weights: imagenet, random, or a file")
    vgg_width: int = setting(64, "64 is VGG; less with random weights, for small studies", POSITIVE)
    # The machine. Several processes (torchrun) share the search and average their gradients; the
    # batch is then --batch-size times their number.
    gpu: int | None = setting(None, "a CUDA device; -1: the CPU; none: the first", Within((-1, 99)))
    workers: int | None = setting(None, "data processes; none: 4 with a GPU", Within((0, 256)))
    precision: str = setting("fp32", "bf16: autocast around the networks", ("fp32", "bf16"))
    compile: bool = setting(False, "torch.compile the networks")
    channels_last: bool | None = setting(None, "memory order; none: with a GPU")
    out: str = setting("", "the run's folder; none: the next free runs/crn_imle-N")
    # One call: what a stored run says of these is not used again.
    preset: str = setting("", "a column of the releases; none: toy with the streets")
    resume: bool = setting(False, "continue the run in --out, or the newest, exactly")
    checkpoint: tuple[str, ...] = setting((), "to test with; none: the newest run's")
    input: str = setting("", "a file or a folder of any size; none: the test split")
    output: str = setting("", "a file or a folder; none: in the run's folder")
    samples: int | None = setting(None, "per layout; none: nine; transfer, edit: three", POSITIVE)
    item: str = setting("", "name of a layout to take; none: the first")
    ends: tuple[int, int] | None = setting(None, "two seeds; none: darkest and brightest", COUNT)
    frames: int | None = setting(None, "none: 8; video: 17", Within((2, 10 ** 6)))
    set: tuple[str, ...] = setting((), "changes in turn, Fig. 7: CLASS=CLASS, or a rectangle's "
                                   "TOP,LEFT,BOTTOM,RIGHT=CLASS", action="extend", metavar="CHANGE")

    def __post_init__(self):
        check_settings(self)
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise UserError(f"--layers {' '.join(self.layers)}: one or more, each named once")
        if self.renew_encoder and not (
                self.lr_drop and self.encoder_width and self.model == "imle"):
            raise UserError("--renew-encoder: happens at --lr-drop, and needs imle's noise encoder")
        if self.model == "imle" and not self.inner_steps:
            raise UserError("--inner-steps 0: each photo once is crn's epoch; imle needs K >= 1")


# Sec. 4.2, and the columns of the releases. In CRN's release an epoch on GTA-5 has 3001 of the
# 12403 photos, and lambda is measured at epoch 100: the means of the terms in the epoch before.
PRESETS = {
    "imle": dict(),                                          # Sec. 4.2, as printed
    "imle-released": dict(lr=1e-4, lr_drop=6, renew_encoder=True),
    "crn-gta": dict(model="crn", lr=1e-4, epochs=400, inner_steps=3001, calibrate=100),
    "crn-cityscapes": dict(model="crn", lr=1e-4, epochs=200, inner_steps=0, calibrate=100),
    # Ours, for the streets on a laptop's CPU. The deep layers of a narrow, random VGG: its shallow
    # ones ask for a blur. They see edges alone (see build), so the pixels, which see colour, count
    # twice. One vector of noise per image: twenty candidates sample 8 numbers better than the
    # 4 x 4 x 8 that M0 would get. No rebalancing: the streets have few distinct colours, so the
    # densities of some are very large and the masks become extreme (notebook 3 shows how much).
    "toy": dict(size=(64, 64), width=48, noise_channels=8, noise="broadcast", encoder_width=32,
                layers=VGG_LAYERS[2:], vgg_width=16, pixel_weight=2.0, epochs=8, candidates=20,
                pool=60, inner_steps=800, lr=2e-3, lr_drop=6, keep_features=400, vgg="random",
                rebalance="none"),
}
# Ours, too: the same for an hour, on wider images, and searches among three times as many
# candidates, so that a photo finds its palette, too.
PRESETS["streets"] = PRESETS["toy"] | dict(
    size=(64, 128), epochs=12, candidates=60, inner_steps=500, lr_drop=9)


def configure(preset: str, given: dict) -> Config:
    """The paper's settings, then a preset's, then what was given."""
    return Config(**{"preset": preset} | row_of(PRESETS, "--preset", preset) | given)


def fit_modules(cfg: Config) -> Config:
    """As many modules as halve the training size down to 4 rows (or columns), at most nine.

    M_0 then works at 4 x 8 for the paper's 256 x 512 (7 modules), 512 x 1024 (8), 1024 x 2048 (9).
    """
    h, w = cfg.size
    k = cfg.modules - 1 if cfg.modules else min(8, int(math.log2(max(min(h, w) / 4, 1))))
    check_sides("--size", cfg.size, 2 ** max(k, 3 if min(h, w) < 32 else 0), 32,
                f"the modules halve each side {k} times")
    return replace(cfg, modules=k + 1)


# ------------------------------------------------------------------------------- 2 Networks

class RefinementModule(nn.Module):
    """M_i: twice 3x3 convolution, layer norm, LeakyReLU(0.2), at one resolution (Sec. 3.3.1).

    (B, c_in, H, W) -> (B, c_out, H, W). Layer norm: mean and variance over C, H and W together,
    gain and shift per channel; that is GroupNorm with one group. It normalises each image by
    itself, so an image does not depend on the others of its batch, and the candidates of a search
    may share one.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.layers = nn.Sequential(*[layer for c in (c_in, c_out) for layer in (
            nn.Conv2d(c, c_out, 3, padding=1, bias=False),  # the norm has the bias
            GroupNorm(1, c_out), nn.LeakyReLU(0.2))])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class NoiseEncoder(nn.Module):
    """z_hat: the noise, transformed by three convolutions that also see the layout (Sec. 3.3.2).

    label (B, c, H, W), noise (B, d, H, W)  ->  (B, d, H, W). It learns which directions of the
    noise matter for a layout. Fewer directions need fewer candidates until one of them is near the
    photo. Paper: three layers. Released code: these three.
    """

    def __init__(self, classes: int, noise_channels: int, width: int = 100):
        super().__init__()
        layers = []
        for c_in in (classes + noise_channels, width):
            layers += [nn.Conv2d(c_in, width, 3, padding=1, bias=False), GroupNorm(1, width),
                       nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, noise_channels, 1))
        self.reset()

    def reset(self) -> None:
        """Released code: all weights from a normal of deviation 0.15, cut at two deviations."""
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, 0.0, 0.15, -0.3, 0.3)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, GroupNorm):
                module.reset_parameters()

    def forward(self, label: Tensor, noise: Tensor) -> Tensor:
        return self.layers(torch.cat([label, noise], 1))


class Generator(nn.Module):
    """CRN, and with noise channels T_theta of IMLE (Sec. 3.3).

    label (B, c, H, W) one-hot, noise (B, d, H, W)  ->  images (B, k, 3, H, W), about [-1, 1].

    M_0 sees the layout (and the noise) at 4 x 8; each next module sees them at twice that, beside
    the enlarged features of the one before. There is no tanh: values outside of [-1, 1] are clipped
    when an image is saved, never in training.
    With `modules` 7, 8 and 9 this is the network for 256, 512 and 1024 rows. A CRN (Sec. 4.2) has
    no noise and k outputs from one last convolution; an IMLE has noise and one output.
    """

    def __init__(self, classes: int, outputs: int = 1, width: int = 1024, modules: int = 7,
                 noise_channels: int = 0, encoder_width: int = 100):
        super().__init__()
        self.outputs, self.multiple = outputs, 2 ** (modules - 1)
        self.noise_channels = noise_channels
        shares = (1, 1, 1, 1, 1, 1 / 2, 1 / 2, 1 / 8, 1 / 32)    # 1024 512 128 32  (Sec. 3.3.1)
        widths = [max(1, round(width * share)) for share in shares[:modules]]
        self.encoder = NoiseEncoder(classes, noise_channels, encoder_width) \
            if noise_channels and encoder_width else None
        self.refine = nn.ModuleList(RefinementModule(before + classes + noise_channels, c)
                                    for before, c in zip([0, *widths], widths))
        self.head = nn.Conv2d(widths[-1], 3 * outputs, 1)
        for module in (*self.refine.modules(), self.head):       # the encoder has its own
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, label: Tensor, noise: Tensor | None = None) -> Tensor:
        labels = label_pyramid(label, len(self.refine))
        noises = [None] * len(labels)
        if noise is not None:
            noises = noise_pyramid(noise if self.encoder is None else self.encoder(label, noise),
                                   len(self.refine))
        x = None                                                 # F_i, the features of module i
        for module, *inputs in zip(self.refine, labels[::-1], noises[::-1]):     # from coarse
            if x is not None:                                    # to (B, C_i, 2 h_i, 2 w_i)
                inputs = [F.interpolate(x, inputs[0].shape[-2:], mode="bilinear",
                                        align_corners=True), *inputs]
            x = module(torch.cat([value for value in inputs if value is not None], 1))
        x = self.head(x)                                         # (B, 3k, H, W)
        # Released code: all reds come first; output u is channels u, k + u and 2k + u.
        return x.unflatten(1, (3, self.outputs)).transpose(1, 2)


def label_pyramid(label: Tensor, n: int) -> list[Tensor]:
    """n label maps, each half of the one before, by area: (B, c, H / 2^i, W / 2^i).

    A pixel of a coarse map holds the shares of the classes in its area, which sum to 1.
    Paper: bilinear. At one half that is the same mean of 2 x 2 pixels.
    """
    labels = [label]
    while len(labels) < n:
        labels.append(F.avg_pool2d(labels[-1], 2))
    return labels


def noise_pyramid(noise: Tensor, n: int) -> list[Tensor]:
    """n noise maps, each with every second row and column of the one before.

    Paper: bilinear. A mean of independent numbers has a smaller deviation than each of them: from
    256 x 512 to 4 x 8 it would fall to 1/64, and M_0, which decides between day and night, would
    get almost no noise. Released code: bilinear in TensorFlow 1, which at one half takes every
    second pixel, as here.
    """
    return [noise[..., ::2 ** i, ::2 ** i] for i in range(n)]


# --------------------------------------------------------------------------------- 3 Losses

def features(vgg: nn.Module, image: Tensor) -> list[Tensor]:
    """Phi_0 .. Phi_l of images (B, 3, H, W) in [-1, 1]: the image itself, then VGG's layers."""
    return [image, *vgg(image).values()]


def layer_errors(real: list[Tensor], fake: list[Tensor]) -> list[Tensor]:
    """|Phi_l(I) - Phi_l(I~)|, averaged over channels: (B, h_l, w_l) per layer. A real (1, ...)
    serves all fakes of a batch: that is how a photo is compared with its candidates."""
    assert all(a.shape[1:] == b.shape[1:] for a, b in zip(real, fake))
    return [(a.float() - b.float()).abs().mean(1) for a, b in zip(real, fake)]


def layer_terms(real: list[Tensor], fake: list[Tensor], mask: Tensor) -> Tensor:
    """The terms of Eq. (1) and of the masked loss L^ (Sec. 3.4), without lambda: (B, 1 + layers).

    ||M_l o [Phi_l(I) - Phi_l(I~)]||_1 per layer, M (B, H, W) shrunk to the layer's size by area.
    Paper: a sum. Released code: a mean over all elements, as here; lambda belongs to it.
    """
    return torch.stack([
        (F.interpolate(mask[:, None], error.shape[-2:], mode="area")[:, 0] * error).mean((1, 2))
        for error in layer_errors(real, fake)], 1)


def distance(real: list[Tensor], fake: list[Tensor], mask: Tensor, weights: Tensor) -> Tensor:
    """Eq. (1), masked: L^ = sum_l lambda_l times the terms, one number per image (B,)."""
    return layer_terms(real, fake, mask) @ weights


def diversity_loss(real: list[Tensor], fake: list[Tensor], label: Tensor, weights: Tensor,
                   per_image: bool = False) -> Tensor:
    """CRN's loss with k outputs: sum_p min_u l_up, of Chen & Koltun.

    fake of B * k outputs, real of as many photos, label (B, c, H, W). l_up is the distance of
    output u within class p: the error at a pixel counts for p by the share of p there, and the mean
    runs over all pixels, so that an absent class adds 0 and the classes sum to the plain distance.
    The min is taken for each class separately: nothing makes the sky, the road and the cars of one
    output belong together. Ours: per_image takes one min for the whole image, min_u sum_p l_up.
    Released code: 0.999 of that, and 0.001 of the mean over all u. An output that is never the
    best gets its gradient from the second part alone; without it, it would stay as it is for ever.
    """
    k = len(fake[0]) // len(label)
    parts = torch.zeros(len(label), k, label.shape[1], device=label.device)          # l_up
    for weight, error in zip(weights, layer_errors(real, fake)):
        share = F.interpolate(label, error.shape[-2:], mode="area")
        error = error.unflatten(0, (-1, k))                                          # (B, k, h, w)
        parts = parts + weight * torch.einsum("bkhw,bphw->bkp", error, share) / error[0, 0].numel()
    if per_image:
        parts = parts.sum(2, keepdim=True)
    return (0.999 * parts.amin(1) + 0.001 * parts.mean(1)).sum(1).mean()


RELEASED_WEIGHTS = {"conv1_2": 1 / 1.4, "conv2_2": 1 / 1.8, "conv3_2": 1 / 1.3, "conv4_2": 1 / 2.2,
                    "conv5_2": 10 / 0.62}       # beside 1 for pixels of 0..255, for Caffe's VGG-19


def balanced_weights(means: Tensor, pixel_weight: float) -> Tensor:
    """lambda "such that the loss of each layer makes the same contribution" (Sec. 3.3.1).

    means (1 + layers,): the terms' averages (or sums) over an epoch. The pixel term keeps its
    weight, and the others get lambda_l = mean_0 / mean_l, so that each contributes what a pixel
    term of weight 1 does. Adam divides each gradient by its own size, so only ratios matter.
    """
    weights = means[0] / means.clamp(min=1e-12)
    weights[0] = pixel_weight
    return weights


# ------------------------------------------------------------------------------- 4 Training

class Balance(nn.Module):
    """lambda_l of Eq. (1), the pixel term's first, and the sums that it is measured from.

    Both are buffers, so that a checkpoint holds them. Until it is measured, lambda is 1. It is
    measured once and then stays: a lambda that followed the terms would let the generator lower
    its loss by making one term large.
    """

    def __init__(self, terms: int, pixel_weight: float):
        super().__init__()
        self.register_buffer("weights", torch.ones(terms))
        self.register_buffer("sums", torch.zeros(terms))           # of the terms in this epoch
        self.register_buffer("measured", torch.tensor(False))
        self.weights[0] = pixel_weight

    def add(self, terms: Tensor) -> None:
        if dist.is_initialized():               # all processes, and the checkpoint, hold one sum
            dist.all_reduce(terms := terms.clone())
        self.sums += terms

    def measure(self) -> None:
        self.weights[:] = balanced_weights(self.sums, self.weights[0].item())
        self.measured.fill_(True)


class Photos(nn.Module):
    """What training knows of its N photos: their rarity (Sec. 3.4), S, and what each of S found.

    These are buffers, so that a checkpoint holds them. The features Phi(I) of a photo never change,
    neither between candidates nor between epochs: those of the first --keep-features photos that
    are met stay in memory, in no checkpoint.
    """

    def __init__(self, n: int, cfg: Config):
        super().__init__()
        c = channels(cfg)
        self.register_buffer("rarity", torch.zeros(n, c, dtype=torch.float64))       # R_p(k)
        self.register_buffer("areas", torch.zeros(c, dtype=torch.float64))           # pixels of p
        # A row per slot of S: the number of a photo, and the seed of z_sigma(i); -1: not searched.
        self.register_buffer("chosen", torch.full((cfg.pool, 2), -1))
        self.features: dict[int, list[Tensor]] = {}

    def load_state_dict(self, stored: dict) -> None:
        """As for any module; other numbers of photos get a message that says what to do."""
        before, now = len(stored["rarity"]), len(self.rarity)
        if before != now:
            raise UserError(f"this run began with {before} photos, now there are {now}: rarity and "
                            "S are no longer right; restore the data, or start anew with --init")
        super().load_state_dict(stored)


@dataclass
class State:
    """All that training changes; a checkpoint holds it, the place in the data and the log."""
    generator: nn.Module
    vgg: nn.Module                              # frozen; its state_dict is empty
    opt_g: torch.optim.Optimizer
    balance: Balance
    photos: Photos | None = None                # of training; None where only testing
    start: dict | None = None                   # G as the epoch began, while S is searched in part


def networks(cfg: Config) -> tuple[Generator]:
    """The generator: k outputs and no noise for crn, one output and noise for imle. A tuple, as in
    the scripts that have several networks."""
    cfg, imle = fit_modules(cfg), cfg.model == "imle"
    return (Generator(channels(cfg), 1 if imle else cfg.outputs, cfg.width, cfg.modules,
                      cfg.noise_channels if imle else 0, cfg.encoder_width),)


def build(cfg: Config, device: torch.device) -> State:
    """Alg. 1, line 1: networks and optimiser; precision, compilation and distribution go around
    the networks."""
    torch.manual_seed(cfg.seed)
    generator = dress(networks(cfg)[0], cfg, device)
    vgg = common.VGGFeatures(cfg.layers, 19, cfg.vgg, average_pool=True, width=cfg.vgg_width)
    if cfg.vgg == "random":
        # Ours. Random filters answer to brightness above all, by which a blur is nearer to the
        # photo than a sharp picture whose windows stand elsewhere. Trained ones answer to edges;
        # so do these, once each sums to 0 and is the same for red, green and blue; the root of 3
        # gives back the scale that a mean of three takes. Colour is left to the pixel term.
        first = vgg.trunk[0].weight.data
        first[:] = (first - first.mean((2, 3), keepdim=True)).mean(1, keepdim=True) * 3 ** .5
    vgg = dress(vgg, cfg, device)
    adam = torch.optim.Adam(generator.parameters(), cfg.lr, fused=True)
    adam.register_step_pre_hook(average_gradients)
    balance = Balance(1 + len(cfg.layers), cfg.pixel_weight).to(device)
    state = State(generator, vgg, adam, balance)
    if cfg.init:
        start_from(state, cfg)
    return state


def start_from(state: State, cfg: Config) -> None:
    """--init: weights of a run of ours, and its lambda where that fits.

    The paper compares both models under one distance, and the release uses a CRN's lambda
    throughout. So a lambda that was measured is kept: measured anew it would balance the masked
    terms instead, and the first epoch would have none.
    """
    stored, where = read(*cfg.init), " ".join(cfg.init)
    theirs, net, old = stored["generator"], state.generator, stored.get("config", {})
    if net.noise_channels and not any(name.startswith("encoder.") for name in theirs) and (
            old.get("model") == "crn"):
        theirs = warm_start(net.state_dict(), theirs, net.noise_channels, cfg.noise_gain)
    common.fill(net, theirs, f"{where}: generator")
    lambdas, same = stored.get("balance") or {}, (cfg.layers, cfg.pixel_weight)
    if lambdas.get("measured") and (old.get("layers"), old.get("pixel_weight")) == same:
        common.fill(state.balance, lambdas, f"{where}: balance")
        state.balance.sums.zero_()
    else:
        notice(f"{where}: ended before its --calibrate, or has other --layers or --pixel-weight: "
               "lambda is measured anew")


def warm_start(own: dict, crn: dict, d: int, gain: float) -> dict:
    """A CRN's weights for a generator with d noise channels, as the released code starts.

    Its output 0 becomes the only one. The noise channels come last in the first convolution of each
    module; their weights are normal with `gain` times the RMS of CRN's, so that noise matters from
    the first step: among m equal candidates there would be no nearest one.
    """
    weights = {k: v for k, v in own.items() if k.startswith("encoder.")}     # keeps its start
    for name, value in crn.items():
        if name.startswith("head."):                           # all k reds, greens, blues
            value = value[:: max(1, len(value) // 3)]
        elif name.endswith("layers.0.weight"):
            more = torch.randn(len(value), d, *value.shape[2:]) * value.square().mean().sqrt()
            value = torch.cat([value, gain * more], 1)
        weights[name] = value
    return weights


def class_names(cfg: Config) -> list[str]:
    """The layout's channels, c. As in both releases, Cityscapes and GTA-5 have 20: the 19 classes
    that are scored, and "other" for all else."""
    table = class_table(cfg.classes)
    if table.scored:
        return [table.names[k] for k in table.scored] + ["other"]
    return [*table.names, "unknown"][:table.channels]


def channels(cfg: Config) -> int:
    return len(class_names(cfg))


def layout_of(label: Tensor, cfg: Config) -> Tensor:
    """Ids as in the files -> ids of class_names."""
    table = class_table(cfg.classes)
    if not table.scored:
        return label
    ids = torch.full((table.channels,), len(table.scored), device=label.device)
    ids[list(table.scored)] = torch.arange(len(table.scored), device=label.device)
    return ids[label]


def make_pair(batch: dict, cfg: Config) -> dict:
    """A batch of common.Dataset with what train_step needs, where it is not there yet:

    "layout" (B, H, W) ids of class_names, "input" (B, c, H, W) one-hot, "mask" (B, H, W) ones,
    and for imle "noise" (B, d, H, W): by the seeds of Batches, else fresh.
    """
    layout = layout_of(batch["label"], cfg)
    label = F.one_hot(layout, channels(cfg)).movedim(-1, 1).float().contiguous()
    more = {"layout": layout, "input": label, "mask": torch.ones_like(label[:, 0])}
    if cfg.model == "imle" and "noise" not in batch:
        drawn = batch.get("drawn") or zip(layout, torch.randint(2 ** 62, (len(layout),)).tolist())
        more["noise"] = torch.stack([draw_noise(seed, cfg, layout.shape[1:], layout.device)
                                     for _, seed in drawn])
    return more | batch


def draw_noise(seed: int, cfg: Config, size: tuple[int, int], device: torch.device) -> Tensor:
    """Alg. 1, line 5: z ~ N(0, I), (d, H, W). A seed stands for its noise: no z is ever stored.

    It is drawn on the device, whose generators differ: a seed's image on a GPU is not that on the
    CPU. Ours: --noise broadcast draws one vector and repeats it at every pixel. Fewer numbers are
    explored by fewer candidates, which is what the paper wants of the encoder.
    """
    shape = (cfg.noise_channels, *(size if cfg.noise == "spatial" else (1, 1)))
    noise = torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    return noise.expand(-1, *size)


# Rebalancing (Sec. 3.4). A network that is trained on many grey streets and few snowy ones sees
# few snowy ones. So images of rare appearance are drawn into S more often (bins), and in each image
# the objects of rare appearance weigh more (mask). What is rare is measured once for the data set:
# the mean colour of each class in each image is a point in RGB, and rare is where the density of
# these points is low.

def survey(train_set: common.Dataset, cfg: Config, device: torch.device,
           run: "Run | None" = None) -> tuple[Tensor, Tensor]:
    """C_k(p), the mean colour of class p in image k: (N, c, 3) on 0..255; and areas (c,).

    NaN where p does not occur in k. A blank image counts as empty: few images have its colour, so
    its rarity score would be the largest of all.
    """
    c = channels(cfg)
    colours = torch.full((len(train_set), c, 3), torch.nan, dtype=torch.float64)
    areas = torch.zeros(c, dtype=torch.float64)
    # Once through the photos in their order, read by the data processes where there are some.
    loader = common.Loader(train_set, 1, cfg.workers, device)
    loader.indices[:] = [(0, k) for k in range(len(train_set))]
    for k, item in enumerate(tqdm(loader.read(), "survey", len(train_set), unit="image",
                                  disable=None)):
        if run and run.asked:
            break
        layout = layout_of(item["label"], cfg).flatten()
        image = (item["image"][0].double().flatten(1).T + 1) * 127.5                 # (H * W, 3)
        if image.std(0).max() == 0:
            notice(f"{item['name'][0]}: a blank image; it is never drawn")
            continue
        area = torch.bincount(layout, minlength=c)
        sums = torch.zeros(c, 3, dtype=torch.float64).index_add_(0, layout, image)
        colours[k] = torch.where(area[:, None] > 0, sums / area[:, None], torch.nan)
        areas += area
    return colours, areas


def gaussian_kde(points: Tensor) -> Tensor:
    """log D of a Gaussian KDE at its own points: (n, 3) -> (n,), float64.

    Scott's rule: the kernel's covariance is n^(-2/7) times the data's, in three dimensions. Ours:
    1 grey level^2 (on 0..255) is added to every covariance, as if the colours had independent noise
    of deviation 1. Colours that lie in a plane, as few distinct ones do, have no inverse without.
    """
    n, d = points.shape
    kernel = n ** (-2 / (d + 4)) * (torch.cov(points.T) + torch.eye(d, dtype=points.dtype))
    root = torch.linalg.cholesky(kernel)
    white = torch.linalg.solve_triangular(root, points.T, upper=False).T             # (n, 3)
    logs = [torch.logsumexp(-(some[:, None] - white).square().sum(2) / 2, 1)
            for some in white.split(1024)]
    return torch.cat(logs) - math.log(n) - d / 2 * math.log(math.tau) - root.diag().log().sum()


def rarity_scores(colours: Tensor) -> Tensor:
    """R_p(k) = 1 / D_p(C_k(p)), 0 where p is not in k: (N, c, 3) -> (N, c), float64.

    Ours: a class in fewer than 10 images has no density; it takes the image's lowest score.
    A class whose colours vary little has a large D everywhere, so small scores: that is the paper's
    definition.
    """
    there = ~colours[..., 0].isnan()
    scores = torch.full(there.shape, torch.inf, dtype=torch.float64)
    for p in (there.sum(0) >= 10).nonzero()[:, 0]:
        scores[there[:, p], p] = torch.exp(-gaussian_kde(colours[there[:, p], p]))
    lowest = scores.amin(1, keepdim=True)
    scores = torch.where(scores.isinf(), torch.where(lowest.isinf(), 1.0, lowest), scores)
    return torch.where(there, scores, 0.0)


def largest_classes(rarity: Tensor, areas: Tensor) -> Tensor:
    """The five classes of the largest area over the training set, among those that have scores."""
    usable = torch.where(rarity.sum(0) > 0, areas, 0.0)
    return usable.topk(min(5, int((usable > 0).sum()))).indices


def populate(rarity: Tensor, areas: Tensor, cfg: Config, epoch: int) -> Tensor:
    """Alg. 1, line 3: S, |S| numbers of photos (Sec. 3.4).

    A fifth of the slots goes to each of the five largest classes, and within it P(k) is
    proportional to R_q(k). Without bins all images are equal.
    """
    generator = torch.Generator().manual_seed(hash((cfg.seed, epoch, 0)) % 2 ** 62)
    weights = (rarity.sum(1, keepdim=True) > 0).double()                             # (N, 1)
    if cfg.rebalance in ("both", "bins"):
        weights = rarity[:, largest_classes(rarity, areas)]                          # (N, 5)
    cdf = (weights / weights.sum(0)).cumsum(0)
    draws = torch.rand(cfg.pool, dtype=torch.float64, generator=generator)
    slots = torch.arange(cfg.pool) % weights.shape[1]
    index = torch.stack([torch.searchsorted(cdf[:, q].contiguous(), u, right=True)
                         for q, u in zip(slots, draws)])
    return index.clamp(max=len(rarity) - 1)


def paint_masks(layout: Tensor, scores: Tensor) -> Tensor:
    """M^ = M / max M, in (0, 1]: layout (B, H, W), R of these images (B, c) -> (B, H, W)."""
    scores = (scores / scores.amax(1, keepdim=True)).float().to(layout.device)
    return scores.gather(1, layout.flatten(1)).view(layout.shape)


@torch.no_grad()
def recall(pair: dict, state: State, cfg: Config) -> dict:
    """The pair with what is known of its training photos: masks (Sec. 3.4), and features.

    It is what a batch of training has beyond make_pair's. Without it the masks are 1, and
    train_step computes the features itself.
    """
    numbers, kept = [k for k, _ in pair["drawn"]], state.photos.features
    if cfg.model == "imle" and cfg.rebalance in ("both", "mask"):
        pair = pair | {"mask": paint_masks(pair["layout"], state.photos.rarity[numbers])}
    if not cfg.keep_features:
        return pair
    real = [kept.get(k) or features(state.vgg, image[None])
            for k, image in zip(numbers, pair["image"])]            # a list of layers per photo
    for k, found in zip(numbers, real):
        if len(kept) < cfg.keep_features:
            kept[k] = found
    return pair | {"real": real}


@torch.no_grad()
def real_features(pair: dict, state: State) -> list[Tensor]:
    """Phi(I) of a batch, computed here unless it is known."""
    if "real" in pair:
        return [torch.cat(layer) for layer in zip(*pair["real"])]
    return features(state.vgg, pair["image"])


@torch.no_grad()
def search(state: State, train_set: common.Dataset, cfg: Config, epoch: int,
           slots: list[int] | None = None, run: "Run | None" = None) -> Tensor:
    """Alg. 1, lines 4 to 7: the photos in these slots of S (none given: all) look for their nearest
    samples. state.photos.chosen gets the seeds of z_sigma(i).

    No image is kept, for the update renders it anew, with the theta that it has by then. Candidates
    share a batch, since layer norm treats each alone; the photo's features are computed once for
    all of them. Returns the distances (|S|, m), NaN where nothing was searched.
    """
    device, (rank, world) = state.balance.weights.device, common.place()
    slots, chosen = list(range(cfg.pool)) if slots is None else slots, state.photos.chosen
    found = torch.zeros(cfg.pool, cfg.candidates, dtype=torch.float64)       # 0: not searched
    # Whoever is told to stop leaves between two batches of candidates, and all processes together
    # before the next photo. On a CPU a large candidate takes seconds, and batches are no faster.
    large = math.prod(cfg.size) * cfg.width > 2 ** 21 and device.type == "cpu"
    at_once = 1 if large else cfg.search_batch
    rounds = tqdm(range(0, len(slots), world), desc="search", unit=f"{world} image", leave=False,
                  disable=None if rank == 0 else True)
    for first in rounds:                        # line 4: each process searches its share of S
        if run and run.stopped(now=True):
            break
        for i in slots[first + rank:first + world:world]:
            k = int(chosen[i, 0])
            pair = test_pair(train_set[k] | {"drawn": [(k, 0)]}, state, cfg)
            pair = recall(pair, state, cfg)
            real, seeds = real_features(pair, state), candidate_seeds(cfg, epoch, i)
            for j in range(0, cfg.candidates, at_once):
                if run and run.asked:
                    break
                z = torch.stack([draw_noise(s, cfg, pair["layout"].shape[1:], device)
                                 for s in seeds[j:j + at_once]])              # line 5
                L = pair["input"].expand(len(z), -1, -1, -1)
                fake = features(state.vgg, state.generator(L, z)[:, 0])                # line 6
                found[i, j:j + len(z)] = distance(real, fake, pair["mask"],
                                                  state.balance.weights).cpu()
    if world > 1:
        dist.all_reduce(found := found.to(device))
    found = found.cpu()
    searched = (found > 0).all(1)               # a search that was broken off leaves zeros
    for i in searched.nonzero()[:, 0].tolist():                                        # line 7
        chosen[i, 1] = candidate_seeds(cfg, epoch, i)[int(found[i].argmin())]
    return found.where(searched[:, None], torch.nan)


def candidate_seeds(cfg: Config, epoch: int, slot: int) -> list[int]:
    """The seeds of z_i1 .. z_im: new ones for each slot of S and each epoch (a photo that is in S
    twice has two searches)."""
    return [hash((cfg.seed, epoch, slot, j)) % 2 ** 62 for j in range(cfg.candidates)]


class Batches(common.Loader):
    """Alg. 1, lines 8 and 9: S~ of each update, drawn from S "uniformly", so with replacement.

    For crn an epoch's order is all photos at random, then all anew. The order depends on seed and
    epoch alone. So --resume can take it up anywhere, and the members of S that an epoch will use
    are known before its search.
    """

    def __init__(self, train_set: common.Dataset, cfg: Config, device: torch.device,
                 photos: Photos):
        self.cfg, self.photos = cfg, photos
        super().__init__(train_set, cfg.batch_size, cfg.workers, device, cfg.seed, cfg.epochs,
                         cfg.steps, cfg.inner_steps)

    def slots(self) -> list[int]:
        """What all processes draw in this epoch: slots of S; for crn, numbers of photos.

        An update takes the next |S~| of them.
        """
        generator = torch.Generator().manual_seed(hash((self.cfg.seed, self.epoch, 1)) % 2 ** 62)
        n, images = len(self.examples), self.per_epoch * self.per_step
        if self.cfg.model == "imle":
            return torch.randint(self.cfg.pool, (images,), generator=generator).tolist()
        rounds = [torch.randperm(n, generator=generator) for _ in range(-(-images // n))]
        return torch.cat(rounds)[:images].tolist()

    def order(self) -> list[tuple[int, int]]:
        """The same as pairs: number of the photo, seed of z_sigma(i); crn has no noise."""
        if self.cfg.model == "crn":
            return [(k, 0) for k in self.slots()]
        return list(map(tuple, self.photos.chosen[self.slots()].tolist()))

    def unsearched(self) -> list[int]:
        """The slots that must be searched before this epoch can go on.

        All of S, unless --steps ends the run so soon that S has more members than updates are left
        for: then those alone that will be drawn. A larger --steps later finds what is missing.
        """
        images = (self.total - self.step) * self.per_step + self.seen     # from its start on
        if self.cfg.model == "crn":
            return []
        slots = range(self.cfg.pool) if images >= self.cfg.pool else sorted(
            set(self.slots()[:images]))
        return [i for i in slots if self.photos.chosen[i, 1] < 0]

    def read(self) -> Iterator[dict]:
        """With each batch go its photos' numbers and seeds, as "drawn".

        The numbers lead to masks and features (recall), the seeds to z (make_pair).
        """
        drawn, n = [pair for _, pair in self.indices], self.per_step // self.world
        self.indices[:] = [(self.epoch, k) for k, _ in drawn]
        for batch, at in zip(super().read(), range(0, len(drawn), n)):
            yield batch | {"drawn": drawn[at:at + n]}


def train_step(state: State, batch: dict, cfg: Config) -> dict[str, Tensor]:
    """Alg. 1, lines 10 and 11: theta -= eta grad L^(I_i, T_theta(L_i, z_sigma(i))).

    batch as from make_pair, or also from recall. For crn: one update on the diversity loss.
    """
    L = batch["input"]                                             # (B, c, H, W)
    made = state.generator(L, batch.get("noise"))                  # (B, k, 3, H, W); k = 1 for imle
    fake, k = features(state.vgg, made.flatten(0, 1)), made.shape[1]    # gradients pass through VGG
    real = real_features(batch, state)                             # no gradient: a constant
    if cfg.model == "crn":
        real = [value.repeat_interleave(k, 0) for value in real]   # each photo beside its k outputs
        loss = diversity_loss(real, fake, L, state.balance.weights, cfg.diversity == "per-image")
        with torch.no_grad():                                      # for lambda and the log alone
            terms = layer_terms(real, fake, batch["mask"].repeat_interleave(k, 0))
    else:
        terms = layer_terms(real, fake, batch["mask"])             # (B, 1 + layers)
        loss = (terms @ state.balance.weights).mean()              # Eq. (1), masked: L^
    state.opt_g.zero_grad(set_to_none=True)
    loss.backward()
    state.opt_g.step()
    terms = terms.detach().mean(0)
    state.balance.add(terms)
    return {"loss": loss.detach()} | dict(zip(("pixel", *cfg.layers), terms))


def learning_rate(cfg: Config, epoch: int) -> float:
    """Constant in the paper. Released code (--lr-drop 6): a tenth of it from epoch 6 on."""
    return cfg.lr / 10 if cfg.lr_drop and epoch >= cfg.lr_drop else cfg.lr


def begin_epoch(state: State, loader: Batches, run: "Run", cfg: Config) -> bool:
    """Before the updates of an epoch: lambda, a new encoder, and Alg. 1, lines 3 to 7.

    lambda changes here and nowhere else: search and update must mean the same distance. A run that
    is taken up in mid-epoch finds S in its checkpoint and has nothing to do here, unless --steps
    had bounded the search. False: told to stop. The epoch then begins again with --resume, and all
    of this comes out as before.
    """
    photos, epoch, first, clock = state.photos, loader.epoch, loader.seen == 0, time.time()
    if first and epoch == cfg.calibrate and not state.balance.measured:
        state.balance.measure()
        run.bar.write("lambda, measured (released): " + ", ".join(
            f"{name} {w:.3g} ({RELEASED_WEIGHTS.get(name, 1):.3g})" for name, w in zip(
                ("pixel", *cfg.layers), state.balance.weights.tolist())))
    if first and cfg.renew_encoder and epoch == cfg.lr_drop:
        torch.manual_seed(cfg.seed + epoch)
        state.generator.encoder.reset()
        state.opt_g.state.clear()               # Adam's moments, too
    if first and cfg.model == "imle":
        if not photos.areas.any():              # once per run: photos do not change
            colours, areas = survey(loader.examples, cfg, loader.device, run)
            if run.stopped(now=True):
                return False
            photos.rarity, photos.areas = rarity_scores(colours), areas
        photos.chosen[:, 0] = populate(photos.rarity, photos.areas, cfg, epoch)         # line 3
        photos.chosen[:, 1] = -1
    # The search must see theta as it was when the epoch began, also where --steps had left members
    # of S out and a larger one now asks for them.
    slots, G = loader.unsearched(), state.generator
    if slots:                                   # lines 4 to 7
        now = {name: value.clone() for name, value in G.state_dict().items()}
        start = now if first else state.start
        G.load_state_dict(start)
        distances = search(state, loader.examples, cfg, epoch, slots, run)
        G.load_state_dict(now)
        if run.stopped(now=True):
            return False
        if loader.rank == 0:
            near, mean = distances.amin(1).nanmean(), distances.nanmean()
            run.bar.write(f"search: nearest of {cfg.candidates} at {near:.4f}, their mean "
                          f"{mean:.4f}; {time.time() - clock:.0f} s")
        state.start = start if photos.chosen[:, 1].min() < 0 else None
        loader.speed()                          # the search is not training
    if first:
        state.balance.sums.zero_()
    return True


def train(cfg: Config, stored: dict | None = None) -> Path:
    """From scratch, from --init, or on from a stored checkpoint; returns the run's folder.

    This is Alg. 1 from line 2 on. For a crn there is no search: begin_epoch measures lambda, and
    the batches are photos without noise.
    """
    device = pick_device(cfg)
    cfg, train_set, test_set = open_data(cfg)
    state = build(cfg, device)
    state.photos = Photos(len(train_set) if cfg.model == "imle" else 0, cfg)
    loader = Batches(train_set, cfg, device, state.photos)
    with Run(cfg, state, loader, test_set, stored) as run:
        while not loader.over:                                     # Alg. 1, line 2
            if not begin_epoch(state, loader, run, cfg):           # lines 3 to 7
                loader.over, run.kept = True, None                 # saves even at step 0
                break
            state.opt_g.param_groups[0]["lr"] = learning_rate(cfg, loader.epoch)
            for batch in loader:                                   # lines 8 and 9
                pair = recall(make_pair(batch, cfg), state, cfg)
                run.done(train_step(state, pair, cfg))             # lines 10 and 11
    return run.end()                                               # line 12


def rename_released(stored: dict, path: Path) -> dict:
    """Refused: the authors' own files are TensorFlow's, which PyTorch cannot read."""
    raise UserError(f"{path}: no checkpoint of {NAME}.py; its first key is "
                    f"{next(iter(stored), 'missing')}")


def released_config(stored: dict, given: dict) -> dict:
    """Never reached: see rename_released."""
    return {}


# ------------------------------------------------------------------------------- 5 Sampling

@torch.no_grad()
def translate(generator: Generator, label: Tensor, noise: Tensor | None) -> Tensor:
    """(1, c, H, W) one-hot and (1, d, H, W) of any size -> (k, 3, H, W) in [-1, 1].

    Sides are mirrored up to the next multiple that G can halve, and the result is cropped.
    """
    h, w = label.shape[-2:]
    label, noise = (value if value is None else common.mirror_pad(value, generator.multiple)
                    for value in (label, noise))
    return generator(label, noise)[0, ..., :h, :w].clamp(-1, 1)


def test_pair(item: dict, state: State, cfg: Config) -> dict:
    """One item of a dataset as a batch of one where G is, made a pair; noise is drawn later."""
    device = state.balance.weights.device if state else torch.device("cpu")
    return make_pair(common.batch_of_one(item, device) | {"noise": None}, cfg)


def noise_of(seed: int, pair: dict, cfg: Config) -> Tensor:
    """The noise (1, d, H, W) of a seed at this layout's size: the same on all layouts of a size."""
    return draw_noise(seed, cfg, pair["layout"].shape[1:], pair["layout"].device)[None]


def draw(state: State, pair: dict, cfg: Config, n: int) -> Tensor:
    """n images of a layout, (n, 3, H, W) in [-1, 1]: by seeds from cfg.seed on, or a CRN's outputs.
    """
    if cfg.model == "crn":
        if n > cfg.outputs:
            raise UserError(f"--samples {n}: this CRN has {cfg.outputs} output(s) per layout and "
                            "no noise; train with --model imle for more")
        return translate(state.generator, pair["input"], None)[:n]
    return torch.cat([translate(state.generator, pair["input"], noise_of(cfg.seed + j, pair, cfg))
                      for j in range(n)])


def how_many(cfg: Config, otherwise: int) -> int:
    """--samples; where it is not given, so many, or all that a CRN has."""
    return cfg.samples or (min(otherwise, cfg.outputs) if cfg.model == "crn" else otherwise)


def colours_of(pair: dict, cfg: Config) -> Tensor:
    """The layout as a picture (1, 3, H, W) in [-1, 1]."""
    return colour_label(pair["label"], class_table(cfg.classes)).cpu()


def sample_grid(state: State, cfg: Config, test_set: common.Dataset, path: Path) -> None:
    """Layout | up to six samples | truth, of five test examples, evenly spread, a row each."""
    tiles, n = [], min(5, len(test_set))
    for i in range(n):
        pair = test_pair(test_set[i * len(test_set) // n], state, cfg)
        made = draw(state, pair, cfg, min(6, cfg.outputs) if cfg.model == "crn" else 6).cpu()
        tiles += [colours_of(pair, cfg), made, *([pair["image"].cpu()] if "image" in pair else [])]
    tiles = torch.cat(tiles)
    save_images(tiles, path, nrow=len(tiles) // n)


def save_gif(images: Tensor, path: Path) -> None:
    """(n, 3, H, W) in [-1, 1] as an endless animation, eight frames a second."""
    frames = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    first, *rest = (Image.fromarray(frame) for frame in frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    first.save(path, save_all=True, append_images=rest, duration=125, loop=0)


def layouts(cfg: Config, size: tuple[int, int] | None) -> common.Dataset:
    """The layouts of --input, a file or a folder (resized if `size` is given), or the test split.
    """
    if not cfg.input:
        return dataset(cfg, "test").has("label")
    return common.Dataset(files=common.input_files(cfg.input, "label"), classes=cfg.classes,
                          size=size)


def one_layout(cfg: Config, size: tuple[int, int] | None) -> dict:
    """The layout of this --item, or the first one, of --input or of the test split."""
    return layouts(cfg, size).named(cfg.item)


def sample(cfg: Config, state: State, size: tuple[int, int] | None = None) -> Path:
    """Images for --input, a file or a folder of any sizes, or for the test split.

    An output has the size of its input; `size` resizes the inputs first. With several samples there
    is also NAME_grid.png, the layout and all of them (Fig. 2 and 3); how much they differ is
    printed.
    """
    target, items, apart = Path(cfg.output or Path(cfg.out, "test")), layouts(cfg, size), []
    n = how_many(cfg, 9)
    for item, paths in common.outputs(items, cfg.input, target, n):
        pair = test_pair(item, state, cfg)
        made = draw(state, pair, cfg, n).cpu()
        for image, path in zip(made, paths):
            save_images(image[None], path)
        if n > 1:
            both = torch.cat([colours_of(pair, cfg), made])
            save_images(both, target / f"{pair['name']}_grid.png", math.ceil(math.sqrt(len(both))))
            apart.append(torch.pdist(made.flatten(1), 1).mean().item() / made[0].numel())
    if apart:
        print(f"two samples of one layout differ by {sum(apart) / len(apart):.4f} per value "
              "on average (mean absolute difference of images in [-1, 1])")
    return target


def between(a: Tensor, b: Tensor, t: float, linear: bool = True) -> Tensor:
    """The noise at t in [0, 1] between two: the default is the paper's (1 - t) a + t b.

    Half-way, the variance of that is 1/2, less than T ever saw in training. Ours, beside it: cos
    and sin of a quarter of a circle, which keep the variance at 1.
    """
    if linear:
        return (1 - t) * a + t * b
    return math.cos(t * math.pi / 2) * a + math.sin(t * math.pi / 2) * b


def dark_and_bright(state: State, pair: dict, cfg: Config, n: int = 30) -> tuple[int, int]:
    """The seeds of the darkest and the brightest of n samples: night and day, where T knows them.
    Paper: chosen by eye."""
    grey = draw(state, pair, cfg, n).mean((1, 2, 3))
    return cfg.seed + int(grey.argmin()), cfg.seed + int(grey.argmax())


def interpolate(cfg: Config, state: State, pair: dict) -> dict[str, Tensor]:
    """Fig. 4 and 8: images from one seed's noise to another's, as a strip and as animations.

    Row 1 of the strip is the paper's linear path, row 2 keeps the variance. Returns the frames.
    """
    target, n = Path(cfg.output or Path(cfg.out, "interpolate")), cfg.frames or 8
    ends = cfg.ends or dark_and_bright(state, pair, cfg)
    a, b = (noise_of(seed, pair, cfg) for seed in ends)
    rows = {name: torch.cat([
        translate(state.generator, pair["input"], between(a, b, i / (n - 1), name == "linear"))
        for i in range(n)]).cpu() for name in ("linear", "variance-preserving")}
    label = colours_of(pair, cfg)
    save_images(torch.cat([torch.cat([label, row]) for row in rows.values()]),
                target / "strip.png", n + 1)
    print(f"{pair['name']}, from seed {ends[0]} to {ends[1]}: {target}")
    for name, row in rows.items():
        save_gif(torch.cat([row, row.flip(0)[1:-1]]), target / f"{name}.gif")
    return rows


def transfer(cfg: Config, state: State, pairs: list[dict]) -> Tensor:
    """Fig. 5: the same noise on several layouts of one size; a row per noise, a column per layout.
    Returns the images (rows, columns, 3, H, W)."""
    rows, path = how_many(cfg, 3), Path(cfg.output or Path(cfg.out, "transfer.png"))
    if len({pair["layout"].shape for pair in pairs}) > 1:
        raise UserError("transfer: the same noise needs layouts of one size; give --size H W")
    made = torch.stack([draw(state, pair, cfg, rows) for pair in pairs], 1).cpu()
    labels = torch.cat([colours_of(pair, cfg) for pair in pairs])
    save_images(torch.cat([labels, made.flatten(0, 1)]), path, len(pairs))
    print(f"{rows} noise(s) on {len(pairs)} layouts: {path}")
    return made


def relabel(label: Tensor, change: str, table: common.ClassTable) -> Tensor:
    """One change of a label map (H, W): "car=road", or "20,30,40,60=car" for a rectangle."""
    where, _, new = change.partition("=")
    if not new:
        raise UserError(f"--set {change}: expected CLASS=CLASS or TOP,LEFT,BOTTOM,RIGHT=CLASS")
    if "," not in where or where in table.names:
        return torch.where(label == class_id(where, table), class_id(new, table), label)
    (h, w), numbers = label.shape, where.split(",")
    if len(numbers) != 4 or not all(n.isdecimal() for n in numbers):
        raise UserError(f"--set {change}: expected TOP,LEFT,BOTTOM,RIGHT=CLASS")
    top, left, bottom, right = map(int, numbers)
    if not (top < bottom <= h and left < right <= w):
        raise UserError(f"--set {change}: not a rectangle within {h} x {w}")
    label = label.clone()
    label[top:bottom, left:right] = class_id(new, table)
    return label


def edit(cfg: Config, state: State, item: dict) -> Tensor:
    """Fig. 7: the layout and after each change the layout again, a row each, with the same noises.
    Returns the images (rows, columns, 3, H, W)."""
    items, columns = [item], how_many(cfg, 3)
    for change in cfg.set:
        label = relabel(items[-1]["label"], change, class_table(cfg.classes))
        items.append({"label": label, "name": item["name"]})
    pairs = [test_pair(each, state, cfg) for each in items]
    made = torch.stack([draw(state, pair, cfg, columns) for pair in pairs]).cpu()
    tiles = [torch.cat([colours_of(pair, cfg), row]) for pair, row in zip(pairs, made)]
    path = Path(cfg.output or Path(cfg.out, "edit.png"))
    save_images(torch.cat(tiles), path, columns + 1)
    print(f"{item['name']}: {path}")
    for change, before, after, a, b in zip(cfg.set, pairs, pairs[1:], made, made[1:]):
        same = (before["label"] == after["label"])[0].cpu()
        print(f"  --set {change}: relabelled {100 * (~same).float().mean():.1f} % of the pixels; "
              f"the others changed by {(a - b).abs().mean((0, 1))[same].mean():.4f}")
    return made


def moving_car(cfg: Config) -> list[dict]:
    """Fig. 9: the layouts of a test street whose first car drives away and comes back."""
    start, frames = common.Dataset.STREETS["test"][0], cfg.frames or 17
    scene = next(s for s in (common.street_scene(0, start + i) for i in range(1000))
                 if s.vehicles and s.vehicles[0].kind == "car")
    items = []
    for i in range(frames):
        away = 1 - abs(2 * i / (frames - 1) - 1)                    # 0 ... 1 ... 0
        scene.vehicles[0].z = 5.5 + 14 * away
        layout = common.paint(scene, cfg.size)
        items.append({"label": torch.from_numpy(layout.label), "name": f"frame_{i:03d}"})
    return items


def video(cfg: Config, state: State, items: list[dict]) -> dict[str, float]:
    """Fig. 9 and 10: a film whose frames are made independently, from one noise (a), and with the
    noise moving from dark to bright (b); differences of adjacent frames.

    The noise moves along the paper's line. Returns the mean difference where the labels of both
    frames agree: ideal is 0 for the fixed noise.
    """
    target = Path(cfg.output or Path(cfg.out, "video"))
    pairs = [test_pair(item, state, cfg) for item in items]
    if len(pairs) < 2 or len({pair["layout"].shape for pair in pairs}) > 1:
        raise UserError("video needs two or more layouts of one size")
    a, b = (noise_of(seed, pairs[0], cfg) for seed in dark_and_bright(state, pairs[0], cfg))
    labels = torch.cat([colours_of(pair, cfg) for pair in pairs])
    same = torch.cat([x["label"] == y["label"] for x, y in zip(pairs, pairs[1:])]).cpu()
    rows, told = [labels], {}
    for name in ("fixed", "moving"):
        noises = [between(a, b, i / (len(pairs) - 1)) if name == "moving" else b
                  for i in range(len(pairs))]
        film = torch.cat([translate(state.generator, pair["input"], z)
                          for pair, z in zip(pairs, noises)]).cpu()
        change = (film[1:] - film[:-1]).abs().mean(1)                          # (n - 1, H, W)
        told[name] = (change[same].mean() / 2).item()
        dark = torch.cat([change[:1] * 0, change])[:, None].expand(-1, 3, -1, -1)
        rows += [film, dark * 2 - 1]                                # darker: smaller, as in Fig. 10
        save_gif(torch.cat([labels, film], 3), target / f"{name}.gif")
    save_images(torch.cat(rows), target / "strip.png", len(pairs))
    print(f"{len(pairs)} frames: {target}\n  mean change where labels stay, of images in [0, 1]: "
          + ", ".join(f"{name} noise {value:.4f}" for name, value in told.items()))
    return told


# ----------------------------------------------------------------------------- 6 Evaluation

# The paper's variances on GTA-5, times 100: IMLE, CRN with nine outputs. Higher is more diverse.
TABLE_1 = {
    "road": (8.804, 7.725), "sidewalk": (10.41, 6.941), "building": (6.362, 3.071),
    "wall": (5.500, 2.760), "fence": (1.901, .7764), "pole": (2.534, 1.907),
    "traffic light": (1.168, .4820), "traffic sign": (1.703, 1.378), "vegetation": (1.716, .8079),
    "terrain": (5.018, 2.664), "sky": (1.645, 2.267), "person": (2.103, .8848),
    "rider": (.2772, .1338), "car": (1.390, 1.298), "truck": (1.872, 2.004), "bus": (.3267, .1791),
    "train": (.01217, .002938), "motorcycle": (.1878, .06913), "bicycle": (.01628, .005704),
    "overall": (3.415, 2.870)}


def spread_nine(images: Tensor, clusters: int = 9, repeats: int = 10) -> list[Tensor]:
    """Table 1's choice: 9 clusters of (n, 3, H, W), one image of each at random: indices (9,), ten
    times. Ours: K-means on images shrunk to 32 rows by area; the clusters are found once."""
    small = F.adaptive_avg_pool2d(images, (min(32, images.shape[2]),
                                           min(32 * images.shape[3] // images.shape[2],
                                               images.shape[3])))
    # n points span n dimensions at most: there K-means is the same, and fast.
    points = torch.linalg.qr(small.flatten(1).double().T)[1].T.contiguous()
    owner = torch.cdist(points.float(), common.kmeans(points, clusters)).argmin(1)
    generator = torch.Generator().manual_seed(0)
    members = [(owner == u).nonzero()[:, 0] for u in owner.unique()]
    return [torch.stack([members[u % len(members)][torch.randint(
        len(members[u % len(members)]), (), generator=generator)] for u in range(clusters)])
        for _ in range(repeats)]


def diversity(images: Tensor, layout: Tensor, classes: int) -> Tensor:
    """v_p of Table 1: the variance of k images (k, 3, H, W) on [0, 1], averaged over channels and
    over the pixels of class p: (classes,), NaN where p does not occur in layout (H, W)."""
    variance = images.var(0, correction=0).mean(0).flatten().double()
    area = torch.bincount(layout.flatten(), minlength=classes)
    sums = torch.zeros(classes, dtype=torch.float64).index_add_(0, layout.flatten(), variance)
    return sums / area


def best_of(images: Tensor, truth: Tensor) -> tuple[int, float]:
    """The sample (of images in [-1, 1]) nearest to the photo in l1, and its mean error on [0, 1].

    Table 2 shows people such images of both models: .636 +- .242 of CRN's and .364 +- .242 of
    IMLE's were judged to have more artifacts.
    """
    errors = ((images + 1) / 2 - (truth + 1) / 2).abs().mean((1, 2, 3))
    return int(errors.argmin()), errors.min().item()


def images_in_folder(pair: dict, cfg: Config) -> Tensor:
    """Another model's images of a layout, NAME.png or NAME_1.png, NAME_2.png, ...: (n, 3, H, W)."""
    folder, name, size = Path(cfg.images), pair["name"], tuple(pair["layout"].shape[1:])
    numbered = [p for p in folder.glob(f"{name}_*") if p.stem[len(name) + 1:].isdecimal()]
    paths = sorted(numbered, key=lambda p: int(p.stem[len(name) + 1:])) or sorted(
        folder.glob(f"{name}.*"))
    images = [common.read_image(path).float() / 127.5 - 1 for path in paths]
    if not images or {tuple(image.shape[1:]) for image in images} != {size}:
        raise UserError(f"--images {folder}: {len(images)} image(s) of {name}, as {name}.png or "
                        f"{name}_1.png, ..., but not all of {size[0]} x {size[1]}; say --size H W")
    return torch.stack(images)


@torch.no_grad()
def evaluate(cfg: Config, state: State | None) -> dict:
    """Table 1 step by step and best-of-n l1; on the streets the exact measures, too.

    Table 1: many samples per layout, 9 clusters, one of each, the variance per class; ten times.
    A CRN's outputs, and another model's images in --images, are taken as they are: the first nine.
    For Table 2 the nearest of the nine to the photo is kept, in best/ of the run's folder.
    """
    test_set, names, out = dataset(cfg, "test").has("label"), class_names(cfg), Path(cfg.out)
    many = cfg.outputs if cfg.model == "crn" else cfg.eval_samples
    table, l1, exact, times, best = {}, {}, {}, {}, {}
    for i in tqdm(range(len(test_set)), desc="evaluate", unit="layout", disable=None):
        pair = test_pair(test_set[i], state, cfg)
        made = images_in_folder(pair, cfg) if cfg.images else draw(state, pair, cfg, many).cpu()
        street = common.street_of(pair) if cfg.classes == "streets" and not cfg.data else None
        truth, layout = street and street.sample(len(made), i), pair["layout"][0].cpu()
        picks = [torch.arange(min(9, len(made)))]
        rows = {"first nine": ((made + 1) / 2, picks)}
        if not cfg.images and cfg.model == "imle" and len(made) > 9:
            rows["one of each cluster"] = (made + 1) / 2, spread_nine((made + 1) / 2)
        if street:
            rows["true sampler, nine"] = (truth + 1) / 2, picks
        for row, (images, chosen) in rows.items():
            v = [diversity(images[nine], layout, len(names)) for nine in chosen]
            table.setdefault(row, []).append(torch.stack(v))
        table.setdefault("area", []).append(torch.bincount(layout.flatten(), minlength=len(names)))
        for n in sorted({min(9, len(made)), len(made)}):
            for row, images in (("this run", made), ("true sampler", truth)):
                if images is not None and "image" in pair:
                    k, error = best_of(images[:n], pair["image"].cpu())
                    l1.setdefault(f"{row}, n={n}", []).append(error)
                    if row == "this run" and n <= 9 and cfg.out:
                        best[pair["name"]] = k
                        save_images(made[k][None], out / "best" / f"{pair['name']}.png")
                if street:
                    seen = street.read(images[:n])
                    exact.setdefault(f"{row}, n={n}", []).append(
                        street.measure(seen) | {"tau": street.tau})
                    times.setdefault(f"{row}, n={n}", []).append(street.times(seen["mode"]))
    metrics = {"layouts": len(test_set), "Table 1": summarise(table, names),
               "best-of-n l1": {row: sum(v) / len(v) for row, v in l1.items()}, "best": best}
    if exact:
        metrics["exact"] = {row: {"style agreement": common.agreement(times[row])} | {
            k: float(np.nanmean([one[k] for one in some])) for k in some[0]
            if not np.isnan([one[k] for one in some]).all()} for row, some in exact.items()}
    report(metrics, cfg)
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2))
    return metrics


def summarise(table: dict[str, list[Tensor]], names: list[str]) -> dict:
    """V_p per row: the mean over layouts that have p; with absent classes as 0; the deviation over
    the repeats; overall: the mean over all pixels of named classes."""
    area = torch.stack(table["area"]).double()                             # (N, c)
    area[:, [k for k, name in enumerate(names) if name in ("other", "unknown")]] = 0
    rows = {}
    for row, values in table.items():
        if row == "area":
            continue
        v = torch.stack(values)                                            # (N, repeats, c)
        zeros = v.nan_to_num(0)
        overall = (zeros * area[:, None]).sum((0, 2)) / area.sum()         # (repeats,)
        means, as_zero = v.nanmean(0), zeros.mean(0)                       # (repeats, c)
        rows[row] = {name: {"variance": means[:, p].mean().item(),
                            "absent as 0": as_zero[:, p].mean().item(),
                            "deviation": means[:, p].std(correction=0).item()}
                     for p, name in enumerate(names) if means[:, p].isfinite().all()}
        rows[row]["overall"] = {"variance": overall.mean().item(),
                                "absent as 0": overall.mean().item(),
                                "deviation": overall.std(correction=0).item()}
    return rows


def report(metrics: dict, cfg: Config) -> None:
    """The metrics as text beside the paper's. Its data are others: compare orderings."""
    def line(name: str, *cells) -> None:
        print(f"  {name:30}" + "".join(f"{c if isinstance(c, str) else format(c, '.4f'):>22}"
                                       for c in cells))

    rows = metrics["Table 1"]
    print(f"\n{metrics['layouts']} layouts. Table 1: variance over nine images on [0, 1], times "
          "100 (the same, where layouts without the class count as 0)")
    line("", *rows, "paper: IMLE", "paper: CRN")
    for name in next(iter(rows.values())):
        line(name, *(f"{100 * cell['variance']:.3f} ({100 * cell['absent as 0']:.3f})"
                     for cell in (row[name] for row in rows.values())),
             *(f"{v:.4g}" for v in TABLE_1.get(name, ())))
    if "true sampler, nine" in rows:
        base = rows["true sampler, nine"]["overall"]["variance"]
        line("overall over the truth's", *(row["overall"]["variance"] / base
                                           for row in rows.values()), "(1 is right)")
    print("\nbest-of-n l1 to the photo, on [0, 1]" + " (a perfect hit has "
          f"{common.STREET_GRAIN * math.sqrt(2 / math.pi):.4f})" * ("exact" in metrics))
    for name, value in metrics["best-of-n l1"].items():
        line(name, value)
    if "exact" in metrics:
        print("\nexact, on the streets")
        line("", *metrics["exact"])
        for name in [*common.MEASURES, "style agreement", "tau"]:
            line(name, *(cell.get(name, "none valid") for cell in metrics["exact"].values()))
        for name, meaning in common.MEASURES.items():
            print(f"    {name}: {meaning}")


# ------------------------------------------------------------------------------- 7 Machinery
# What trains any network. Nothing below is the paper's, and from pick_device on it is word for word
# the same in the four scripts.

NAME = "crn_imle"
NETWORKS = ("generator",)                       # in State
MODES = ("train", "sample", "interpolate", "transfer", "edit", "video", "evaluate", "check",
         "trace")
TESTS = MODES[1:7]
CALL = {"preset": ("train", "check", "trace"), "resume": ("train",), "checkpoint": TESTS,
        "input": TESTS[:-1], "output": TESTS[:-1], "samples": ("sample", "transfer", "edit"),
        "item": ("interpolate", "edit"), "ends": ("interpolate",), "set": ("edit",),
        "frames": ("interpolate", "video"), "images": ("evaluate",)}
# What may differ from the checkpoint when a run goes on, and when it is tested.
FREE = {"data", "epochs", "steps", "save_every", "search_batch", "keep_features", "gpu", "workers",
        "precision", "compile", "channels_last", "out", *CALL} - {"preset"}
FREE_AT_TEST = FREE | {"size", "limit", "seed", "vgg", "vgg_width", "eval_samples"}
ALONE = {"compile": False, "vgg": "random"}     # settings of a network that is tested, not trained


def dataset(cfg: Config, split: str) -> common.Dataset:
    return common.Dataset(cfg.data, split, cfg.size, classes=cfg.classes, limit=cfg.limit,
                          seed=cfg.seed, instances=False)


def open_data(cfg: Config) -> tuple[Config, common.Dataset, common.Dataset]:
    """Both splits, and the config with what the data turned out to be: its classes."""
    train_set = dataset(cfg, "train").has("label").has("image")
    cfg = replace(fit_modules(cfg), classes=train_set.classes)
    if cfg.vgg == "random":
        notice("VGG-19 has random weights: it sees edges, but no colours and no objects")
    if cfg.model == "imle" and not (cfg.init or cfg.resume) and cfg.lr < 5e-5:
        notice(f"--lr {cfg.lr} is for --init with a trained crn (--model crn); from scratch, "
               "preset imle-released starts at 1e-4")
    return cfg, train_set, dataset(cfg, "test")


def schedule(cfg: Config) -> set[str]:
    """The settings that the learning rate follows: lr_drop alone, which no --resume may change."""
    return set()


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
    if "images" in given:                       # no network is needed to score another's images
        cfg = replace(Config(), **{"size": PRESETS["toy"]["size"]} | given)
        evaluate(replace(cfg, classes=dataset(cfg, "test").classes), None)
        return
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
    size = given.get("size")
    if mode in ("interpolate", "transfer", "video") and cfg.model == "crn":
        raise UserError(f"{mode} needs noise, which a CRN has not; train with --model imle")
    if mode == "evaluate":
        evaluate(cfg, state)
    elif mode == "sample":
        sample(cfg, state, size)
    elif mode == "transfer":
        items = layouts(cfg, size)
        n = min(5, len(items))
        transfer(cfg, state, [test_pair(items[i * len(items) // n], state, cfg) for i in range(n)])
    elif mode == "video":
        items = layouts(cfg, size) if cfg.input else None
        video(cfg, state, [items[i] for i in range(len(items))] if items else moving_car(cfg))
    elif mode == "edit":
        edit(cfg, state, one_layout(cfg, size))
    else:
        interpolate(cfg, state, test_pair(one_layout(cfg, size), state, cfg))


def trace(cfg: Config) -> None:
    """Stage, output and parameters of the generator in one training step, FLOPs and time."""
    device = pick_device(cfg)
    cfg, train_set, _ = open_data(replace(cfg, compile=False))
    state, loader = build(cfg, device), common.Loader(train_set, cfg.batch_size, 0, device)
    pair = make_pair(next(iter(loader)), cfg)
    common.trace_step({"generator": state.generator}, lambda: train_step(state, pair, cfg))


if __name__ == "__main__":
    common.shell(main, NAME)
