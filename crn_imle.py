"""Conditional IMLE: any number of different images for one layout, without an adversary.

K. Li, T. Zhang, J. Malik. Diverse Image Synthesis from Semantic Layouts via Conditional IMLE.
ICCV 2019. Numbers are those of arXiv v1 (1811.12373). With it the baseline: CRN, the cascaded
refinement network of Q. Chen and V. Koltun, ICCV 2017, one output or k of them.

Idea. Regression shown one photo per layout learns an average; a GAN may ignore its noise and drop
modes. Here T(L, z) gets noise, and *every photo looks for its nearest sample*: of m images drawn
for the layout of a photo, the one that comes nearest is pulled towards the photo. The samples that
were not nearest stay free to serve other photos. So no photo that is trained on is left without a
sample; whether every mode is then learned depends on m, on the capacity of T, on the length of the
training, and on which photos are drawn: E = 16 epochs of |S| = 400 draws meet at most 6400 of
GTA-5's 12403 photos, so that 48 % of them or more are never seen. CRN's own way is k outputs at
once, the best one trained; k is then fixed.

Symbols     L batch["input"], one-hot    I batch["image"]    z batch["noise"]    T_theta generator
            S the photos of one epoch     m candidates     K inner steps     S~ a batch

Algorithm 1, with what carries out each line; the numbers are ours, the paper has none. Misprint in
lines 6 and 11: T(L^j, z_j) and I~_ij; below is what is meant. An "epoch" is the paper's: one
search, then K updates, whatever the number of photos.
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

Paper map
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
    Fig. 10     differences of frames, half (a)    video; half (b), pix2pix's, is not made here
    Fig. 11-12  more layouts with 19 samples       sample, with --samples 19

Paper                             | Released code                     | Here
    five VGG layers               | and the pixels                    | and the pixels;
                                  |                                   |   --pixel-weight 0: five
    VGG's weights, pooling and    | ImageNet's; average; 0..255 minus | --vgg; average; mean and
      input not stated            |   Caffe's mean, not divided       |   deviation of torchvision
    a sum of absolute values      | their mean                        | mean
    lambda: equal contributions   | constants, from the means of a    | measured after epoch 1;
                                  |   CRN's 100th epoch               |   crn --released: after 100
    lambda at the start           | the same constants                | 1, or that of --init's CRN
    labels shrunk bilinearly      | by area                           | by area: at 1/2 the same
    noise shrunk bilinearly       | in effect every second pixel      | every second pixel
    features enlarged bilinearly  | corners aligned                   | corners aligned
    layer norm's epsilon not      | TensorFlow's, 1e-12               | PyTorch's, 1e-5
      stated                      |                                   |
    encoder: three convolutions   | 3x3, 3x3, 1x1; widths 100, 100    | as released;
                                  |                                   |   --encoder-width
    one training run              | at epoch 6 the encoder and Adam   | one; --released: anew at
                                  |   start anew                      |   --lr-drop
    learning rate 1e-5            | 1e-4 for six epochs, then 1e-5    | 1e-5; preset imle-released
    start not stated              | CRN's weights, k = 9              | --init, or from scratch
    a gradient step               | Adam                              | Adam
    S and S~: random subsets      | drawn with replacement            | with replacement: S may hold
                                  |                                   |   a photo twice
    a portion of S for each of    | equal fifths, of a fixed list     | equal fifths, by area;
      the five largest classes    |                                   |   unknown counts
    the search by L               | by the masked L                   | the masked L in both places
    T(L^j, z_j) in Alg. 1         | T(L_i, z_ij)                      | T(L_i, z_ij)
    I~_ij in the update           | i's nearest, rendered anew        | as released
    KDE's bandwidth not stated    | Scott's rule                      | Scott's rule
    colours in a plane (singular  | not handled                       | 1 grey level^2 is added to
      covariance) not mentioned   |                                   |   every covariance
    rare classes not mentioned    | under 67 images: a score near 0   | under 10: the image's lowest
    blank images not mentioned    | one is left out                   | they are never drawn
    CRN: k outputs, as Chen and   | best of k per class times 0.999,  | as released; ours:
      Koltun have it              |   plus mean of all k times 0.001  |   --diversity per-image
    noise between two z: linear   | linear                            | linear; interpolate shows a
                                  |                                   |   path of even variance, too
    Table 1: K-means of 100       |                                   | one K-means, on images of 32
      images, ten times           |                                   |   rows; ten choices
    Table 1, "overall": averaged  |                                   | over all pixels of named
      over all categories         |                                   |   classes. Neither fits: the
                                  |                                   |   means are 2.787 and 1.861,
                                  |                                   |   printed 3.415 and 2.870

Run         python crn_imle.py                               built-in streets, minutes on a laptop
            python crn_imle.py --data ./gta --gpu 0 --init crn.pt      the paper's run
            python crn_imle.py sample --samples 19           Fig. 3 of the newest run
"""

import atexit
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
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
    COUNT, POSITIVE, UserError, Within, check_settings, check_sides, class_id, class_table,
    colour_label, draw_seed, find_preset, flag, notice, save_images, setting)

NAME = "crn_imle"
NETWORKS = ("generator",)                       # in State
TESTS = ("sample", "interpolate", "edit", "transfer", "video", "evaluate")
MODES = ("train", *TESTS, "check", "trace")
# Who knows a flag.
TRAIN, BEFORE, DRAW, ONE = ("train",), ("train", "check", "trace"), TESTS[:-1], TESTS[1:3]

# --------------------------------------------------------------------------------- 1 Config

VGG_LAYERS = ("conv1_2", "conv2_2", "conv3_2", "conv4_2", "conv5_2")                  # Eq. (1)
VGG_19 = tuple(f"conv{i}_{j}" for i, n in enumerate(common.BLOCKS[19], 1) for j in range(1, n + 1))


@dataclass
class Config:
    """Every setting is a flag. The defaults are the paper's; the text says where it states them."""
    # The task is always the same: a label map in, a photo out. The paper stays at 256 x 512, which
    # squeezes GTA-5's photos a little.
    data: str = setting("", "folder, in any known layout; none: built-in streets", free="resume")
    classes: str = setting("", "a table of common.py, or a number; none: asks the data")
    size: tuple[int, int] = setting((256, 512), "height, width, Sec. 4.2", POSITIVE, free="test")
    limit: int = setting(0, "use the first so many examples; 0: all", COUNT, free="test")
    # The network. Both models are one generator: a crn has k outputs and no noise, an imle has one
    # output, d channels of noise beside the label map, and the noise encoder. Ours, not in the
    # paper: a crn whose best output is chosen for the whole image, and noise that is one vector.
    model: str = setting("imle", "with noise, or the baseline without", ("imle", "crn"))
    outputs: int = setting(9, "crn: images per layout, k, Sec. 4.2", Within(1, 100))
    diversity: str = setting("per-class", "crn: best of k", ("per-class", "per-image"))
    width: int = setting(1024, "channels of M0 to M4; finer ones have fewer, Sec. 3.3.1", POSITIVE)
    modules: int = setting(0, "0: down to 4 rows, so 7 at 256; Sec. 3.3.1", Within(0, 9))
    noise_channels: int = setting(10, "d, Sec. 4.2", POSITIVE)
    noise: str = setting("spatial", "z per pixel, or one for all", ("spatial", "broadcast"))
    encoder_width: int = setting(100, "of the noise encoder, as released; 0: no encoder", COUNT)
    # The objective. The VGG layers and the pixel term each have a lambda, which is measured once
    # and then stays; see balanced_weights.
    layers: tuple[str, ...] = setting(VGG_LAYERS, "VGG-19's, in Eq. (1)", VGG_19)
    pixel_weight: float = setting(1.0, "of the pixel term, as released; 0: Eq. (1)", COUNT)
    vgg: str = setting("imagenet", "weights: imagenet, small, random, a file", free="test")
    rebalance: str = setting("both", "masks, bins of S; Sec. 3.4", ("both", "bins", "mask", "none"))
    # Algorithm 1, with the paper's letters. With its values the search is 12 % of the computation,
    # and each member of S is updated 25 times with the z that it has found. For a crn an epoch is
    # --inner-steps updates without a search. The paper's rate is for a start from a CRN's weights
    # (--init); from scratch it needs ten times as much (preset imle-released).
    epochs: int = setting(16, "E, searches; not in the paper, as released", POSITIVE, free="resume")
    pool: int = setting(400, "|S|, photos of an epoch, Sec. 4.2", POSITIVE)
    candidates: int = setting(10, "m, samples among which a photo looks, Sec. 4.2", POSITIVE)
    inner_steps: int = setting(10000, "K, updates of an epoch; 0: one per photo", COUNT)
    batch_size: int = setting(1, "|S~|, images per step and process, Sec. 4.2", POSITIVE)
    steps: int = setting(0, "end after so many updates; 0: epochs decide", COUNT, free="resume")
    lr: float = setting(1e-5, "eta, Adam's, Sec. 4.2; without --init 1e-4", Within(1e-9, 0.9))
    lr_drop: int = setting(0, "from this epoch on a tenth of lr; 0: never. Released: 6", COUNT)
    released: bool = setting(False, "imle: a new encoder at --lr-drop; crn: lambda at epoch 100")
    seed: int = setting(0, "of initialisation, order and noise", common.SEED, free="test")
    init: tuple[str, ...] = setting((), "a crn's or an imle's weights", modes=TRAIN, free="call")
    # The machine. Nothing below here changes what training computes, but for rounding. Several
    # processes (torchrun) share the search and average their gradients; the batch is then
    # --batch-size times their number.
    gpu: int | None = setting(None, "number; -1: the CPU; none: the first", Within(-1), free="call")
    workers: int | None = setting(None, "data processes; none: 4 with a GPU", COUNT, free="resume")
    precision: str = setting("fp32", "bf16: autocast", ("fp32", "bf16"), free="resume")
    compile: bool = setting(False, "torch.compile the networks", free="resume")
    channels_last: bool | None = setting(None, "memory order; none: with a GPU", free="resume")
    out: str = setting("", "the run's folder; none: the next runs/crn_imle-N", free="call")
    # One call
    preset: str = setting("", "a column of the releases; none: toy with the streets", modes=BEFORE)
    resume: bool = setting(False, "go on with --out, or the newest run", modes=TRAIN, free="call")
    checkpoint: tuple[str, ...] = setting((), "none: the newest", modes=TRAIN + TESTS, free="call")
    input: str = setting("", "a file or folder; none: the test split", modes=DRAW, free="call")
    output: str = setting("", "a file or folder; none: in --out", modes=DRAW, free="call")
    samples: int | None = setting(None, "per layout: nine; transfer, edit 3; evaluate 100, Sec. 4.3"
                                  "; frames: 8; video 17", POSITIVE, modes=TESTS, free="call")
    item: str = setting("", "a layout's name; none: the first", modes=ONE, free="call")
    ends: tuple[int, int] | None = setting(None, "two samples' numbers; none: darkest, brightest",
                                           POSITIVE, modes=ONE[:1], free="call")
    set: tuple[str, ...] = setting((), "changes in turn, Fig. 7: CLASS=CLASS, or a rectangle's "
                                   "TOP,LEFT,BOTTOM,RIGHT=CLASS", modes=ONE[1:], free="call")
    # No flag: as what the training data were understood, by common.Dataset.
    understood: dict = field(default_factory=dict)

    def __post_init__(self):
        check_settings(self)


# Sec. 4.2, and the columns of the releases. In CRN's release an epoch on GTA-5 has 3001 of the
# 12403 photos.
PRESETS = {
    "imle": dict(),                                          # Sec. 4.2, as printed
    "imle-released": dict(released=True, lr=1e-4, lr_drop=6),
    "crn-gta": dict(model="crn", released=True, lr=1e-4, epochs=400, inner_steps=3001),
    "crn-cityscapes": dict(model="crn", released=True, lr=1e-4, epochs=200, inner_steps=0),
    # Ours, for the streets on a laptop's CPU. One vector of noise per image: twenty candidates
    # sample 8 numbers better than the 4 x 4 x 8 that M0 would get. No rebalancing: the streets have
    # few distinct colours, so the densities of some are very large and the masks become extreme
    # (notebook 3 shows how much).
    "toy": dict(size=(64, 64), width=48, noise_channels=8, noise="broadcast", encoder_width=32,
                vgg="small", rebalance="none", epochs=8, pool=60, candidates=20, inner_steps=800,
                lr=2e-3, lr_drop=6),
}
# Ours, too: the same for an hour, on wider images, and searches among three times as many
# candidates, so that a photo finds its palette, too.
PRESETS["streets"] = PRESETS["toy"] | dict(
    size=(64, 128), epochs=12, candidates=60, inner_steps=500, lr_drop=9)


def configure(preset: str, given: dict) -> Config:
    """The paper's settings, then a preset's, then what was given."""
    return Config(**{"preset": preset} | find_preset(PRESETS, "--preset", preset) | given)


def fit_modules(cfg: Config) -> Config:
    """As many modules as halve the training size down to 4 rows (or columns), at most nine.

    M_0 then works at 4 x 8 for the paper's 256 x 512 (7 modules), 512 x 1024 (8), 1024 x 2048 (9).
    """
    halvings = min(8, int(math.log2(max(min(cfg.size), 32) / 4)))
    return replace(cfg, modules=cfg.modules or halvings + 1)


# ------------------------------------------------------------------------------- 2 Networks

class LayerNorm(nn.GroupNorm):
    """Mean and variance over C, H and W together, gain and shift per channel: (B, C, H, W) to the
    same shape. It normalises each image by itself, so that an image does not depend on the others
    of its batch, and the candidates of a search may share one.

    That is GroupNorm with one group. But PyTorch's leaves an image's group to one of a GPU's many
    processors: 27 ms where the formula needs 2 (H200, forward and backward).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return super().forward(x)
        x = x.float()                           # bf16 would round the mean
        variance, mean = torch.var_mean(x, (1, 2, 3), correction=0, keepdim=True)
        gain = self.weight.view(-1, 1, 1) * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias.view(-1, 1, 1) - mean * gain, x, gain)


def convolution(c_in: int, c_out: int) -> list[nn.Module]:
    """3x3, then the norm, which has the bias, then LeakyReLU: (B, c_in, H, W) -> (B, c_out, H, W).
    """
    return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), LayerNorm(1, c_out),
            nn.LeakyReLU(0.2)]


class RefinementModule(nn.Module):
    """M_i: twice 3x3 convolution, layer norm, LeakyReLU(0.2), at one resolution (Sec. 3.3.1).

    (B, c_in, H, W) -> (B, c_out, H, W).
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.layers = nn.Sequential(*convolution(c_in, c_out), *convolution(c_out, c_out))

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
        self.layers = nn.Sequential(
            *convolution(classes + noise_channels, width), *convolution(width, width),
            nn.Conv2d(width, noise_channels, 1))
        self.reset()

    def reset(self) -> None:
        """Released code: all weights from a normal of deviation 0.15, cut at two deviations.

        It gives no reason. The norms make the first two convolutions' scale irrelevant; the last
        adds 100 channels, so that z_hat begins with a deviation of about 1, as z has.
        """
        for layer in self.layers[::3]:
            nn.init.trunc_normal_(layer.weight, 0.0, 0.15, -0.3, 0.3)
        for norm in self.layers[1::3]:
            norm.reset_parameters()
        nn.init.zeros_(self.layers[-1].bias)

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
        self.encoder = (NoiseEncoder(classes, noise_channels, encoder_width)
                        if noise_channels and encoder_width else None)
        self.refine, c = nn.ModuleList(), 0                      # c: channels of F_(i-1)
        shares = (1, 1, 1, 1, 1, 1 / 2, 1 / 2, 1 / 8, 1 / 32)    # 1024 512 128 32  (Sec. 3.3.1)
        for share in shares[:modules]:
            c_out = max(1, round(width * share))
            self.refine.append(RefinementModule(c + classes + noise_channels, c_out))
            c = c_out
        self.head = nn.Conv2d(c, 3 * outputs, 1)
        for module in (*self.refine.modules(), self.head):       # the encoder has its own start
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, label: Tensor, noise: Tensor | None = None) -> Tensor:
        n = len(self.refine)
        if self.encoder is not None:
            noise = self.encoder(label, noise)                   # z_hat, at full size
        inputs = label_pyramid(label, n)                         # the finest first
        if noise is not None:
            inputs = [torch.cat(both, 1) for both in zip(inputs, noise_pyramid(noise, n))]
        x = self.refine[0](inputs[-1])                           # F_0 (B, C_0, h_0, w_0)
        for i in range(1, n):
            beside = inputs[n - 1 - i]
            x = F.interpolate(x, beside.shape[-2:], mode="bilinear", align_corners=True)
            x = self.refine[i](torch.cat([x, beside], 1))        # F_i, twice as large
        x = self.head(x)                                         # (B, 3k, H, W)
        # Released code: all reds come first; output u is channels u, k + u and 2k + u.
        return x.unflatten(1, (3, self.outputs)).transpose(1, 2)


def label_pyramid(label: Tensor, n: int) -> list[Tensor]:
    """n label maps, each half of the one before, by area: (B, c, H / 2^i, W / 2^i).

    A pixel of a coarse map holds the shares of the classes in its area, which sum to 1.
    Paper: bilinear. At one half that is the same mean of 2 x 2 pixels.
    """
    return [F.avg_pool2d(label, 2 ** i) for i in range(n)]


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
    terms = []
    for error in layer_errors(real, fake):
        M = F.interpolate(mask[:, None], error.shape[-2:], mode="area")         # (B, 1, h_l, w_l)
        terms.append((M[:, 0] * error).mean((1, 2)))
    return torch.stack(terms, 1)


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


def balanced_weights(means: Tensor, pixel_weight: float) -> Tensor:
    """lambda "such that the loss of each layer makes the same contribution" (Sec. 3.3.1).

    means (1 + layers,): the terms' averages (or sums) over an epoch. The pixel term keeps its
    weight, and the others get lambda_l = mean_0 / mean_l, so that each contributes what a pixel
    term of weight 1 does. Adam divides each gradient by its own size, so only ratios matter.
    Released code: 1, 1 / 1.4, 1 / 1.8, 1 / 1.3, 1 / 2.2 and 10 / 0.62, for pixels of 0..255 and
    Caffe's VGG-19.
    """
    weights = means[0] / means.clamp(min=1e-12)
    weights[0] = pixel_weight
    return weights


# ------------------------------------------------------------------------------- 4 Training

def dataset(cfg: Config, split: str) -> common.Dataset:
    """Label maps and photos, without crops or flips: neither paper augments its data."""
    return common.Dataset(cfg.data, split, cfg.size, classes=cfg.classes, limit=cfg.limit,
                          seed=cfg.seed, instances=False, understood=cfg.understood)


def open_data(cfg: Config) -> tuple[Config, common.Dataset, common.Dataset]:
    """Both splits, and the config with what the data turned out to be: its classes."""
    train_set = dataset(cfg, "train").require("label").require("image")
    cfg = replace(fit_modules(cfg), classes=train_set.classes, understood=train_set.understood)
    check_sides("--size", cfg.size, 2 ** (cfg.modules - 1), 32, "the modules halve each side")
    return cfg, train_set, dataset(cfg, "test")


def class_names(cfg: Config) -> list[str]:
    """The layout's channels, c. As in both releases, Cityscapes and GTA-5 have 20: the 19 classes
    that are scored, and "other" for all else."""
    table = class_table(cfg.classes)
    if table.scored:
        return [table.names[k] for k in table.scored] + ["other"]
    return [*table.names, "unknown"][:table.channels]


def layout_of(label: Tensor, cfg: Config) -> Tensor:
    """Ids as in the files -> ids of class_names."""
    table = class_table(cfg.classes)
    if not table.scored:
        return label
    ids = torch.full((table.channels,), len(table.scored), device=label.device)
    ids[list(table.scored)] = torch.arange(len(table.scored), device=label.device)
    return ids[label]


class Balance(nn.Module):
    """lambda_l of Eq. (1), the pixel term's first, and the sums that it is measured from.

    They are buffers: on the generator's device, and part of a checkpoint. Until it is measured,
    lambda is 1. It is measured once and then stays: a lambda that followed the terms would let the
    generator lower its loss by making one term large.
    """

    def __init__(self, layers: int, pixel_weight: float):
        super().__init__()
        self.register_buffer("weights", torch.tensor([pixel_weight] + [1.0] * layers))
        self.register_buffer("sums", torch.zeros(1 + layers))      # of the terms in this epoch
        self.register_buffer("measured", torch.tensor(False))

    def add(self, terms: Tensor) -> None:
        if dist.is_initialized():               # all processes, and the checkpoint, hold one sum
            dist.all_reduce(terms := terms.clone())
        self.sums += terms


class Photos(nn.Module):
    """What training knows of its n photos: their rarity (Sec. 3.4), S, and what each of S found.

    They are buffers, as those of Balance are; but these stay on the CPU.
    """

    def __init__(self, n: int, cfg: Config):
        super().__init__()
        c = len(class_names(cfg))
        self.register_buffer("rarity", torch.zeros(n, c, dtype=torch.float64))       # R_p(k)
        self.register_buffer("areas", torch.zeros(c, dtype=torch.float64))           # pixels of p
        # A row per member of S: the number of a photo, and the seed of its z_sigma(i).
        self.register_buffer("chosen", torch.full((cfg.pool, 2), -1))


@dataclass
class State:
    """All that training changes; a checkpoint holds it, the place in the data and the log."""
    generator: nn.Module
    vgg: nn.Module                              # frozen; its state_dict is empty
    opt_g: torch.optim.Optimizer
    balance: Balance
    photos: Photos | None = None                # of training; None where only testing


def build(cfg: Config, device: torch.device) -> State:
    """Alg. 1, line 1: networks and optimiser; precision, compilation and distribution go around
    the networks."""
    torch.manual_seed(cfg.seed)
    cfg = fit_modules(cfg)
    k, d = (1, cfg.noise_channels) if cfg.model == "imle" else (cfg.outputs, 0)
    net = Generator(len(class_names(cfg)), k, cfg.width, cfg.modules, d, cfg.encoder_width)
    generator = prepare(net, cfg, device)
    vgg = common.VGGFeatures(cfg.layers, 19, cfg.vgg, average_pool=True, width=16)
    if cfg.vgg == "random":
        # Ours. Random filters answer to brightness above all, by which a blur is nearer to the
        # photo than a sharp picture whose windows stand elsewhere. Trained ones answer to edges;
        # so do these, once each sums to 0 and is the same for red, green and blue; the root of 3
        # gives back the scale that a mean of three takes. Colour is left to the pixel term.
        first = vgg.trunk[0].weight.data
        first[:] = (first - first.mean((2, 3), keepdim=True)).mean(1, keepdim=True) * 3 ** .5
    vgg = prepare(vgg, cfg, device)
    adam = torch.optim.Adam(generator.parameters(), cfg.lr, fused=True)
    adam.register_step_pre_hook(average_gradients)
    state = State(generator, vgg, adam, Balance(len(cfg.layers), cfg.pixel_weight).to(device))
    if cfg.init:
        start_from(state, cfg)
    return state


def start_from(state: State, cfg: Config) -> None:
    """--init: weights of a run of ours, and its lambda where that fits.

    The paper compares both models under one distance, and the release uses a CRN's lambda
    throughout. So a lambda that was measured is kept: measured anew it would balance the masked
    terms instead, and the first epoch would have none.
    """
    stored, source = read_weights(*cfg.init), " ".join(cfg.init)
    trained, balance = stored["config"], stored.get("balance")
    if cfg.model == "imle" and trained["model"] == "crn":
        stored["generator"] = warm_start(state.generator.state_dict(), stored["generator"])
    load(state, stored, source)
    same = all(trained[name] == getattr(cfg, name) for name in ("layers", "pixel_weight"))
    if same and balance and balance["measured"]:
        state.balance.load_state_dict(balance | {"sums": state.balance.sums})
    else:
        notice(f"{source}: its lambda is not measured, or of other terms: it is measured anew")


def warm_start(own: dict, crn: dict, gain: float = 5.0) -> dict:
    """A CRN's weights for a generator with noise channels, as the released code starts.

    Its output 0 becomes the only one. The noise channels come last in the first convolution of each
    module; their weights are normal with `gain` times the RMS of CRN's, so that noise matters from
    the first step: among m equal candidates there would be no nearest one.
    """
    weights = {k: v for k, v in own.items() if k.startswith("encoder.")}     # keeps its start
    for name, value in crn.items():
        if name.startswith("head."):                           # all k reds, greens, blues
            value = value[::len(value) // 3]
        elif name.endswith("layers.0.weight"):
            more = torch.randn(len(value), own[name].shape[1] - value.shape[1], *value.shape[2:])
            value = torch.cat([value, gain * (more * value.square().mean().sqrt())], 1)
        weights[name] = value
    return weights


def make_pair(batch: dict, cfg: Config, photos: Photos | None = None) -> dict:
    """A batch of common.Dataset with what train_step needs: "layout" (B, H, W), ids of class_names,
    "input" (B, c, H, W), one-hot, "mask" (B, H, W), and for imle "noise" (B, d, H, W).

    Batches gives the numbers of the photos, which lead to their masks (Sec. 3.4), and the seeds of
    z. Without, masks are 1, and noise is fresh.
    """
    layout = layout_of(batch["label"], cfg)
    label = F.one_hot(layout, len(class_names(cfg))).movedim(-1, 1).float().contiguous()
    pair = batch | {"layout": layout, "input": label, "mask": torch.ones_like(label[:, 0])}
    if cfg.model == "imle":
        seeds = batch.get("seeds", torch.randint(2 ** 62, (len(layout),)).tolist())
        pair["noise"] = torch.stack([draw_noise(seed, cfg, layout.shape[1:], layout.device)
                                     for seed in seeds])
        if "numbers" in batch and cfg.rebalance in ("both", "mask"):
            pair["mask"] = paint_masks(layout, photos.rarity[batch["numbers"]])
    return pair


def test_pair(item: dict, state: State | None, cfg: Config) -> dict:
    """One item of a dataset as a batch of one where G is, made a pair."""
    device = state.balance.weights.device if state else torch.device("cpu")
    return make_pair(common.batch_of_one(item, device), cfg, state.photos if state else None)


def draw_noise(seed: int, cfg: Config, size: tuple[int, int], device: torch.device) -> Tensor:
    """Alg. 1, line 5: z ~ N(0, I), (d, H, W). A seed stands for its noise: no z is ever stored.

    It is drawn on the device, whose generators differ: a seed's image on a GPU is not that on the
    CPU. Ours: --noise broadcast draws one vector and repeats it at every pixel. Fewer numbers are
    explored by fewer candidates, which is what the paper wants of the encoder.
    """
    shape = (cfg.noise_channels, *(size if cfg.noise == "spatial" else (1, 1)))
    noise = torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    return noise.expand(-1, *size)


def mixed(*numbers: int) -> int:
    """One seed from several numbers, such as seed and epoch: a change of any of them gives another
    (a sum would give seed 0's epoch 1 what seed 1's epoch 0 has). Python hashes integers in the
    same way in every process, so that --resume finds the same S, order and noise again."""
    return hash(numbers) % 2 ** 62


# Rebalancing (Sec. 3.4). A network that is trained on many grey streets and few snowy ones sees
# few snowy ones. So images of rare appearance are drawn into S more often (bins), and in each image
# the objects of rare appearance weigh more (mask). What is rare is measured once for the data set:
# the mean colour of each class in each image is a point in RGB, and rare is where the density of
# these points is low.

def survey(train_set: common.Dataset, cfg: Config) -> tuple[Tensor, Tensor]:
    """C_k(p), the mean colour of class p in image k: (N, c, 3) on 0..255; and areas (c,).

    NaN, which is 0 / 0, where p does not occur in k. A blank image counts as empty: few images have
    its colour, so its rarity score would be the largest of all.
    """
    c = len(class_names(cfg))
    colours = torch.full((len(train_set), c, 3), torch.nan, dtype=torch.float64)
    areas = torch.zeros(c, dtype=torch.float64)
    for k in tqdm(range(len(train_set)), "survey", disable=None):
        item = train_set[k]
        layout = layout_of(item["label"], cfg).flatten()
        image = (item["image"].double().flatten(1).T + 1) * 127.5                    # (H * W, 3)
        if image.std(0).max() == 0:
            continue                            # a blank image
        area = torch.bincount(layout, minlength=c)
        sums = torch.zeros(c, 3, dtype=torch.float64).index_add_(0, layout, image)
        colours[k] = sums / area[:, None]
        areas += area
    if not areas.any():
        raise UserError(f"--data {cfg.data}: each photo is of one colour, which teaches nothing")
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
    lowest = torch.where(lowest.isinf(), 1.0, lowest)           # of an image without any score
    return torch.where(there, torch.where(scores.isinf(), lowest, scores), 0.0)


def populate(rarity: Tensor, areas: Tensor, cfg: Config, epoch: int) -> Tensor:
    """Alg. 1, line 3: S, |S| numbers of photos (Sec. 3.4), drawn with replacement.

    A fifth of S goes to each of the five classes of the largest area over the training set, among
    those that have scores, and within it P(k) is proportional to R_q(k). Without bins all images
    are equal.
    """
    generator = torch.Generator().manual_seed(mixed(cfg.seed, epoch, 0))
    weights = (rarity.sum(1, keepdim=True) > 0).double()                             # (N, 1)
    if cfg.rebalance in ("both", "bins"):
        areas = torch.where(rarity.sum(0) > 0, areas, 0.0)
        weights = rarity[:, areas.topk(min(5, int((areas > 0).sum()))).indices]      # (N, 5)
    cdf = (weights / weights.sum(0)).cumsum(0).T.contiguous()                        # (5, N)
    draws = torch.rand(cfg.pool, dtype=torch.float64, generator=generator)
    S = torch.zeros(cfg.pool, dtype=torch.int64)
    for q, sums in enumerate(cdf):                              # members q, q + 5, q + 10, ...
        S[q::len(cdf)] = torch.searchsorted(sums, draws[q::len(cdf)].contiguous(), right=True)
    return S.clamp(max=len(rarity) - 1)                         # the last sum may round below 1


def paint_masks(layout: Tensor, scores: Tensor) -> Tensor:
    """M^ = M / max M, in (0, 1]: layout (B, H, W), R of these images (B, c) -> (B, H, W)."""
    scores = (scores / scores.amax(1, keepdim=True)).float().to(layout.device)
    return scores.gather(1, layout.flatten(1)).view(layout.shape)


SEARCH_BATCH = 5                                # candidates rendered at once: memory, not results


@torch.no_grad()
def search(state: State, train_set: common.Dataset, cfg: Config, epoch: int) -> Tensor:
    """Alg. 1, lines 4 to 7: every photo of S looks for its nearest sample.

    state.photos.chosen gets the seeds of z_sigma(i). No image is kept: the update renders it anew,
    with the theta that it has by then. Returns the distances (|S|, m).

    Each member of S has its own candidates, new ones in each epoch: a photo that is in S twice has
    two searches.
    """
    chosen, (rank, world) = state.photos.chosen, common.rank_and_world()
    found = torch.zeros(cfg.pool, cfg.candidates, dtype=torch.float64)
    for i in tqdm(range(rank, cfg.pool, world), "search", leave=False, disable=rank > 0 or None):
        k = int(chosen[i, 0])                                                         # line 4
        seeds = [mixed(cfg.seed, epoch, i, j) for j in range(cfg.candidates)]         # line 5
        pair = test_pair(train_set[k] | {"numbers": [k], "seeds": seeds}, state, cfg)
        real = features(state.vgg, pair["image"])
        for j in range(0, cfg.candidates, SEARCH_BATCH):
            z = pair["noise"][j:j + SEARCH_BATCH]
            L = pair["input"].expand(len(z), -1, -1, -1)
            fake = features(state.vgg, state.generator(L, z)[:, 0])                   # line 6
            found[i, j:j + len(z)] = distance(real, fake, pair["mask"], state.balance.weights)
    if world > 1:
        dist.all_reduce(found := found.to(state.balance.weights.device))      # others' rows: 0
    for i, j in enumerate(found.argmin(1).tolist()):                                  # line 7
        chosen[i, 1] = mixed(cfg.seed, epoch, i, j)
    return found.cpu()


class Batches(common.Loader):
    """Alg. 1, lines 8 and 9: S~ of each update, drawn from S with replacement.

    For crn an epoch's order is all photos at random, then all anew. The order depends on seed and
    epoch alone, so that --resume can take it up anywhere.
    """

    def __init__(self, examples: common.Dataset, cfg: Config, device: torch.device, photos: Photos):
        self.cfg, self.photos = cfg, photos
        super().__init__(examples, cfg.batch_size, cfg.workers, device, cfg.seed, cfg.epochs,
                         cfg.steps, cfg.inner_steps)

    def order(self) -> list[tuple[int, int]]:
        """What all processes train on in this epoch: number of the photo, seed of z_sigma(i)."""
        generator = torch.Generator().manual_seed(mixed(self.cfg.seed, self.epoch, 1))
        n, images = len(self.examples), self.per_epoch * self.per_step
        if self.cfg.model == "imle":
            members = torch.randint(self.cfg.pool, (images,), generator=generator)
            return self.photos.chosen[members].tolist()
        rounds = [torch.randperm(n, generator=generator) for _ in range(math.ceil(images / n))]
        return [(k, 0) for k in torch.cat(rounds)[:images].tolist()]        # crn has no noise

    def read(self) -> Iterator[dict]:
        """With each batch go the numbers of its photos, and the seeds of their z."""
        drawn, n = [pair for _, pair in self.indices], self.per_step // self.world
        self.indices[:] = [(self.epoch, k) for k, _ in drawn]
        for batch, at in zip(super().read(), range(0, len(drawn), n)):
            numbers, seeds = zip(*drawn[at:at + n])
            yield batch | {"numbers": list(numbers), "seeds": seeds}


def train_step(state: State, batch: dict, cfg: Config) -> dict[str, Tensor]:
    """Alg. 1, lines 10 and 11: theta -= eta grad L^(I_i, T_theta(L_i, z_sigma(i))).

    batch as from make_pair. For crn: one update on the diversity loss.
    """
    L = batch["input"]                                             # (B, c, H, W)
    made = state.generator(L, batch.get("noise"))                  # (B, k, 3, H, W); k = 1 for imle
    fake, k = features(state.vgg, made.flatten(0, 1)), made.shape[1]    # gradients pass through VGG
    with torch.no_grad():
        real = features(state.vgg, batch["image"])                 # a constant
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


def begin_epoch(state: State, loader: Batches, run: "Run", cfg: Config) -> None:
    """Before the updates of an epoch: lambda, a new encoder, and Alg. 1, lines 3 to 7.

    lambda changes here and nowhere else: search and update must mean the same distance. A run that
    is taken up in mid-epoch finds S and its seeds in the checkpoint, and does none of this; one
    that was stopped in here does all of it again, and with the same result.
    """
    photos, balance, epoch = state.photos, state.balance, loader.epoch
    due = 100 if cfg.released and cfg.model == "crn" else 1
    if epoch == due and not balance.measured:
        balance.weights[:] = balanced_weights(balance.sums, cfg.pixel_weight)
        balance.measured.fill_(True)
    if cfg.released and state.generator.encoder is not None and epoch == cfg.lr_drop:
        torch.manual_seed(cfg.seed + epoch)
        state.generator.encoder.reset()
        state.opt_g.state.clear()               # Adam's moments, too
    if cfg.model == "imle":
        if not photos.areas.any():              # once per run: photos do not change
            colours, photos.areas = survey(loader.examples, cfg)
            photos.rarity = rarity_scores(colours)
        photos.chosen[:, 0] = populate(photos.rarity, photos.areas, cfg, epoch)         # line 3
        found = search(state, loader.examples, cfg, epoch)                              # 4 to 7
        if loader.rank == 0:
            run.bar.write(f"lambda {[round(x, 3) for x in balance.weights.tolist()]}; distances: "
                          f"nearest {found.amin(1).mean():.4f}, mean {found.mean():.4f}")
        loader.speed()                          # the search is not training
    balance.sums.zero_()


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
            if loader.seen == 0:
                begin_epoch(state, loader, run, cfg)               # lines 3 to 7
            state.opt_g.param_groups[0]["lr"] = learning_rate(cfg, loader.epoch)
            for batch in loader:                                   # lines 8 and 9
                pair = make_pair(batch, cfg, state.photos)
                run.done(train_step(state, pair, cfg))             # lines 10 and 11
    return run.end()                                               # line 12


# ------------------------------------------------------------------------------- 5 Sampling

@torch.no_grad()
def translate(generator: Generator, label: Tensor, noise: Tensor | None) -> Tensor:
    """(1, c, H, W) one-hot and (1, d, H, W) of any size -> (k, 3, H, W) in [-1, 1].

    Sides are mirrored up to the next multiple that G can halve, and the result is cropped.
    """
    h, w = label.shape[-2:]
    label = common.mirror_pad(label, generator.multiple)
    noise = None if noise is None else common.mirror_pad(noise, generator.multiple)
    return generator(label, noise)[0, ..., :h, :w].clamp(-1, 1)


def noise_of(seed: int, pair: dict, cfg: Config) -> Tensor:
    """The noise (1, d, H, W) of a seed at this layout's size: the same on all layouts of a size."""
    return draw_noise(seed, cfg, pair["layout"].shape[1:], pair["layout"].device)[None]


def own_seeds(pair: dict, cfg: Config, n: int) -> list[int]:
    """The seeds of a layout's samples 1 to n, by --seed and the layout's name: another layout has
    other noise, whatever else is sampled in the same call."""
    return [draw_seed(cfg.seed, pair["name"], k) for k in range(n)]


def render(state: State, pairs: Iterable[dict], noises: Iterable, cfg: Config) -> Tensor:
    """The images (n, 3, H, W) of layouts, each with its noise; on the CPU, in [-1, 1]."""
    images = torch.cat([translate(state.generator, pair["input"], noise).cpu()
                        for pair, noise in zip(pairs, noises)])
    return common.as_trained(images, cfg.understood)


def draw(state: State, pair: dict, cfg: Config, seeds: Sequence[int]) -> Tensor:
    """An image of a layout for each seed, (n, 3, H, W) in [-1, 1]; or a CRN's first n outputs."""
    if cfg.model == "crn":
        return render(state, [pair], [None], cfg)[:len(seeds)]
    noises = (noise_of(seed, pair, cfg) for seed in seeds)
    return render(state, itertools.repeat(pair), noises, cfg)


def how_many(cfg: Config, otherwise: int) -> int:
    """--samples; where it is not given, so many, or all that a CRN has."""
    most = cfg.outputs if cfg.model == "crn" else math.inf
    if cfg.samples and cfg.samples > most:
        raise UserError(f"--samples {cfg.samples}: this CRN has {most} output(s); an imle has more")
    return cfg.samples or min(otherwise, most)


def colours_of(pair: dict, cfg: Config) -> Tensor:
    """The layout as a picture (1, 3, H, W) in [-1, 1]."""
    return colour_label(pair["label"], class_table(cfg.classes)).cpu()


def five(items: common.Dataset, state: State, cfg: Config) -> list[dict]:
    """Five examples, evenly spread."""
    n = min(5, len(items))
    return [test_pair(items[i * len(items) // n], state, cfg) for i in range(n)]


def sample_grid(state: State, cfg: Config, test_set: common.Dataset, path: Path) -> Tensor:
    """Layout | up to six samples | truth, of five test examples, a row each. Returns the samples
    (n, 3, H, W)."""
    rows, n = [], how_many(cfg, 6)
    for pair in five(test_set, state, cfg):
        truth = [pair["image"].cpu()] if "image" in pair else []
        made = draw(state, pair, cfg, own_seeds(pair, cfg, n))
        rows.append(torch.cat([colours_of(pair, cfg), made, *truth]))
    save_images(torch.cat(rows), path, len(rows[0]))
    return torch.cat([row[1:n + 1] for row in rows])


def layouts(cfg: Config, size: tuple[int, int] | None) -> common.Dataset:
    """The layouts of --input, a file or a folder (resized if `size` is given), or the test split.
    """
    if not cfg.input:
        return dataset(cfg, "test").require("label")
    items = common.Dataset(files=common.input_files(cfg.input, "label"), classes=cfg.classes,
                           size=size, understood=cfg.understood)
    common.notice_scale(items, cfg.understood, cfg.size)
    return items


def sample(cfg: Config, state: State, size: tuple[int, int] | None = None) -> Path:
    """Images for --input, a file or a folder of any sizes, or for the test split.

    An output has the size of its input; `size` resizes the inputs first. With several samples there
    is also NAME_grid.png, the layout and all of them (Fig. 2 and 3).
    """
    target, n = Path(cfg.output or Path(cfg.out, "test")), how_many(cfg, 9)
    for item, paths in common.outputs(layouts(cfg, size), cfg.input, target, n):
        pair = test_pair(item, state, cfg)
        made = draw(state, pair, cfg, own_seeds(pair, cfg, n))
        for image, path in zip(made, paths):
            save_images(image[None], path)
        if n > 1:
            path = common.writable("--output", target / f"{pair['name']}_grid.png", set())
            save_images(torch.cat([colours_of(pair, cfg), made]), path, math.ceil((n + 1) ** .5))
    return target


def write(cfg: Config, rows: list[Tensor], films: dict[str, Tensor] | None = None) -> None:
    """Rows of images (n, 3, H, W) as the picture --output; films as endless animations beside it,
    eight frames a second."""
    path = Path(cfg.output)
    save_images(torch.cat(rows), path, len(rows[0]))
    for name, images in (films or {}).items():
        gif = common.writable("--output", path.with_name(f"{path.stem}_{name}.gif"), set())
        frames = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        first, *rest = map(common.Image.fromarray, frames)
        first.save(gif, save_all=True, append_images=rest, duration=125, loop=0,
                   comment=common.OURS)
    print(f"{len(rows)} rows of {len(rows[0])} images: {path}")


def between(a: Tensor, b: Tensor, t: float, linear: bool = True) -> Tensor:
    """The noise at t in [0, 1] between two: the default is the paper's (1 - t) a + t b.

    Half-way, the variance of that is 1/2, less than T ever saw in training. Ours, beside it: cos
    and sin of a quarter of a circle, which keep the variance at 1.
    """
    if linear:
        return (1 - t) * a + t * b
    return math.cos(t * math.pi / 2) * a + math.sin(t * math.pi / 2) * b


def end_noises(state: State, pair: dict, cfg: Config) -> list[Tensor]:
    """The noise of two samples of a layout, --ends. Without it, of the darkest and the brightest of
    thirty: night and day, where T knows them. Paper: chosen by eye."""
    ends = cfg.ends
    if not ends:
        grey = draw(state, pair, cfg, own_seeds(pair, cfg, 30)).mean((1, 2, 3))
        ends = int(grey.argmin()) + 1, int(grey.argmax()) + 1
    print(f"{pair['name']}: from sample {ends[0]} to sample {ends[1]}")
    return [noise_of(draw_seed(cfg.seed, pair["name"], k - 1), pair, cfg) for k in ends]


def interpolate(cfg: Config, state: State, items: common.Dataset) -> dict[str, Tensor]:
    """Fig. 4 and 8: images from one noise to another, as a strip and as animations, there and back.

    Row 1 of the strip is the paper's linear path, row 2 keeps the variance. Returns the rows.
    """
    pair, n = test_pair(items.find_example(cfg.item), state, cfg), max(cfg.samples or 8, 2)
    a, b = end_noises(state, pair, cfg)
    rows, films = {}, {}
    for name in ("linear", "variance-preserving"):
        noises = (between(a, b, i / (n - 1), name == "linear") for i in range(n))
        rows[name] = render(state, itertools.repeat(pair), noises, cfg)
        films[name] = torch.cat([rows[name], rows[name].flip(0)[1:-1]])
    write(cfg, [torch.cat([colours_of(pair, cfg), row]) for row in rows.values()], films)
    return rows


def relabel(label: Tensor, change: str, table: common.ClassTable) -> Tensor:
    """One change of a label map (H, W): "car=road", or "20,30,40,60=car" for a rectangle."""
    old, _, new = change.partition("=")
    edited, rectangle = label.clone(), re.fullmatch(r"(\d+),(\d+),(\d+),(\d+)", old)
    if rectangle:
        top, left, bottom, right = map(int, rectangle.groups())
        edited[top:bottom, left:right] = class_id(new, table)
    else:
        edited[label == class_id(old, table)] = class_id(new, table)
    return edited


def grid(cfg: Config, state: State, pairs: list[dict], seeds: Sequence[int]) -> Tensor:
    """The same noises on several layouts: a row per layout, a column per noise. Writes them, and
    returns the images (rows, columns, 3, H, W)."""
    made = torch.stack([draw(state, pair, cfg, seeds) for pair in pairs])
    write(cfg, [torch.cat([colours_of(pair, cfg), row]) for pair, row in zip(pairs, made)])
    return made


def edit(cfg: Config, state: State, items: common.Dataset) -> Tensor:
    """Fig. 7: a layout and after each change the layout again, with its own noises."""
    pairs = [test_pair(items.find_example(cfg.item), state, cfg)]
    for change in cfg.set:
        label = relabel(pairs[-1]["label"][0], change, class_table(cfg.classes))
        pairs.append(test_pair({"label": label, "name": pairs[0]["name"]}, state, cfg))
    return grid(cfg, state, pairs, own_seeds(pairs[0], cfg, how_many(cfg, 3)))


def transfer(cfg: Config, state: State, items: common.Dataset) -> Tensor:
    """Fig. 5: five layouts of one size, which share their noises on purpose."""
    return grid(cfg, state, five(items, state, cfg), range(cfg.seed, cfg.seed + how_many(cfg, 3)))


def moving_car(cfg: Config) -> list[dict]:
    """Fig. 9: the layouts of a test street whose first car drives away and comes back."""
    start, frames = common.Dataset.STREETS["test"][0], max(cfg.samples or 17, 2)
    scenes = (common.street_scene(0, start + i) for i in range(1000))
    scene = next(s for s in scenes if s.vehicles and s.vehicles[0].kind == "car")
    items = []
    for i in range(frames):
        scene.vehicles[0].z = 19.5 - 14 * abs(2 * i / (frames - 1) - 1)     # 5.5 ... 19.5 ... 5.5
        label = torch.from_numpy(common.paint(scene, cfg.size).label)
        items.append({"label": label, "name": f"frame_{i:03d}"})
    return items


def video(cfg: Config, state: State, items: Sequence[dict]) -> dict[str, float]:
    """Fig. 9 and half (a) of Fig. 10: a film whose frames are made independently, from one noise
    (a), and with the noise moving from dark to bright (b); differences of adjacent frames.

    Both ends are samples of the first frame, and all frames share them on purpose. The noise moves
    along the paper's line. Returns the mean difference, of images on [0, 1], where the labels of
    both frames agree: ideal is 0 for the fixed noise.
    """
    n = len(items)
    pairs = [test_pair(items[i], state, cfg) for i in range(n)]
    a, b = end_noises(state, pairs[0], cfg)
    labels = torch.cat([colours_of(pair, cfg) for pair in pairs])
    ids = torch.cat([pair["label"] for pair in pairs]).cpu()
    rows, films, told = [labels], {}, {}
    moving = (between(a, b, i / max(n - 1, 1)) for i in range(n))
    for name, noises in (("fixed", itertools.repeat(b)), ("moving", moving)):
        film = render(state, pairs, noises, cfg)
        change = (film[1:] - film[:-1]).abs().mean(1)                          # (n - 1, H, W)
        told[name] = (change[ids[1:] == ids[:-1]].mean() / 2).item()
        dark = torch.cat([change[:1] * 0, change])[:, None].expand(-1, 3, -1, -1)
        rows += [film, dark * 2 - 1]                                # darker: smaller, as in Fig. 10
        films[name] = torch.cat([labels, film], 3)
    write(cfg, rows, films)
    print("mean change where labels stay: fixed {fixed:.4f}, moving {moving:.4f}".format(**told))
    return told


# ----------------------------------------------------------------------------- 6 Evaluation

# The paper's variances on GTA-5, times 100: IMLE, CRN with nine outputs. Higher is more diverse.
IMLE = (8.804, 10.41, 6.362, 5.500, 1.901, 2.534, 1.168, 1.703, 1.716, 5.018,     # road to terrain
        1.645, 2.103, .2772, 1.390, 1.872, .3267, .01217, .1878, .01628, 3.415)   # sky to overall
CRN = (7.725, 6.941, 3.071, 2.760, .7764, 1.907, .4820, 1.378, .8079, 2.664,
       2.267, .8848, .1338, 1.298, 2.004, .1791, .002938, .06913, .005704, 2.870)
TABLE_1 = dict(zip(common.TABLES["cityscapes_train"].names + ("overall",), zip(IMLE, CRN)))


def spread_nine(images: Tensor, seed: int = 0, repeats: int = 10) -> list[Tensor]:
    """Table 1's choice: 9 clusters of (n, 3, H, W), one image of each at random: indices (9,), ten
    times. Ours: K-means on images shrunk to 32 rows by area, begun with images that are far from
    each other; the clusters are found once. Equal images make fewer clusters."""
    h, w = images.shape[2:]
    points = F.adaptive_avg_pool2d(images, (min(32, h), min(32 * w // h, w))).flatten(1).double()
    centres, chance = points[:1], torch.Generator().manual_seed(seed)
    while len(centres) < 9:
        far = torch.cdist(points, centres).amin(1).argmax()    # the farthest from all centres
        centres = torch.cat([centres, points[far][None]])
    for _ in range(50):
        owner = torch.cdist(points, centres).argmin(1)
        for u in owner.unique():
            centres[u] = points[owner == u].mean(0)
    orders = [torch.randperm(len(points), generator=chance) for _ in range(repeats)]
    return [torch.stack([order[owner[order] == u][0] for u in owner.unique()])
            for order in orders]                               # of each cluster the first


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


def evaluate(cfg: Config, state: State) -> dict:
    """Table 1 step by step, and best-of-n l1.

    Table 1: a hundred samples per layout (--samples), 9 clusters, one of each, the variance per
    class; ten times. A CRN's outputs are taken as they are. For Table 2 the nearest of the first
    nine to the photo is kept, in best/ of the run's folder.
    """
    test_set = dataset(cfg, "test").require("label").require_scored()
    names, out, n = class_names(cfg), Path(cfg.out), how_many(cfg, 100)
    areas, variances, l1 = [], [], []
    for i in tqdm(range(len(test_set)), "evaluate", unit="layout", disable=None):
        pair = test_pair(test_set[i], state, cfg)
        layout, made = pair["layout"][0].cpu(), draw(state, pair, cfg, own_seeds(pair, cfg, n))
        picks = [torch.arange(min(9, n))]
        if cfg.model == "imle" and n > 9:
            picks = spread_nine((made + 1) / 2, draw_seed(cfg.seed, pair["name"], n))
        v = [diversity((made[pick] + 1) / 2, layout, len(names)) for pick in picks]
        variances.append(torch.stack(v).mean(0))
        areas.append(torch.bincount(layout.flatten(), minlength=len(names)))
        if "image" in pair:
            l1.append(best_of(made, pair["image"].cpu())[1])
            k, _ = best_of(made[:9], pair["image"].cpu())
            save_images(made[k][None], out / "best" / f"{pair['name']}.png")
    metrics = {"layouts": len(test_set), "samples": n,
               "Table 1": summarise(variances, areas, names)}
    if l1:                                      # there are photos to compare with
        metrics["best-of-n l1"] = sum(l1) / len(l1)
    report(metrics)
    common.save_scores(metrics, out / "metrics.json")
    return metrics


def summarise(variances: list[Tensor], areas: list[Tensor], names: list[str]) -> dict:
    """V_p of Table 1, from v_p (c,) of each layout and its pixels per class (c,).

    A class counts as 0 where a layout lacks it: so small are the paper's numbers of rare classes.
    "overall" is the mean over all pixels of named classes.
    """
    v, area = torch.stack(variances).nan_to_num(0), torch.stack(areas).double()      # (N, c)
    area[:, [k for k, name in enumerate(names) if name in ("other", "unknown")]] = 0
    overall = (v * area).sum() / area.sum()
    return dict(zip([*names, "overall"], [*v.mean(0).tolist(), overall.item()]))


def report(metrics: dict) -> None:
    """The metrics as text beside the paper's. Its data are others: compare orderings."""
    print(f"\n{metrics['layouts']} layouts. Table 1: variance over nine images on [0, 1], times "
          "100; the paper's, of IMLE and of CRN")
    for name, value in metrics["Table 1"].items():
        values = (100 * value, *TABLE_1.get(name, ()))
        print(f"  {name:20}" + "".join(f"{value:12.4g}" for value in values))
    if "best-of-n l1" in metrics:
        print("\nbest-of-{samples} l1 to the photo: {best-of-n l1:.4f}".format(**metrics))


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
    """Refused: the authors' own files are TensorFlow's, which PyTorch cannot read."""
    raise UserError(f"{path}: no checkpoint of {NAME}.py")


def released_config(stored: dict, given: dict) -> dict:
    """Never reached: see rename_released."""
    return {}


def for_testing(cfg: Config) -> Config:
    """The config with which a network is built to be tested: no VGG need be had."""
    return replace(cfg, compile=False, vgg="random")


def run_mode(mode: str, cfg: Config, state: State, given: dict) -> None:
    """What is done with a trained network. All modes but sample and evaluate make one picture."""
    if mode == "evaluate":
        evaluate(cfg, state)
    elif mode == "sample":
        sample(cfg, state, given.get("size"))
    else:
        if cfg.model == "crn" and mode != "edit":
            raise UserError(f"{mode} needs noise, which a CRN has not; train with --model imle")
        items, path = layouts(cfg, given.get("size")), Path(cfg.output or cfg.out)
        if not (cfg.output and path.suffix):
            path = path / f"{mode}.png"
        reads = items.reads | {Path(cfg.input).resolve()} if cfg.input else items.reads
        common.writable("--output", path, reads)
        if cfg.input and not items.size and len(items.sizes) > 1 and mode in ("video", "transfer"):
            raise UserError(f"{mode} needs layouts of one size; give --size H W")
        if mode == "video" and not cfg.input:
            if cfg.classes != "streets":
                raise UserError("video drives a car of the built-in streets, which have other "
                                "classes; name a folder of label maps with --input")
            items = moving_car(cfg)
        make = {"interpolate": interpolate, "transfer": transfer, "edit": edit, "video": video}
        make[mode](replace(cfg, output=str(path)), state, items)


def trace(cfg: Config) -> None:
    """Stage, output and parameters of the generator in one training step, FLOPs and time."""
    device = pick_device(cfg)
    cfg, train_set, _ = open_data(replace(cfg, compile=False))
    state, loader = build(cfg, device), common.Loader(train_set, cfg.batch_size, 0, device)
    pair = make_pair(next(iter(loader)), cfg)
    common.trace_step({"generator": state.generator}, lambda: train_step(state, pair, cfg))


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
