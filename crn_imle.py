"""Conditional IMLE: any number of different images for one layout, without an adversary.

K. Li, T. Zhang, J. Malik. Diverse Image Synthesis from Semantic Layouts via Conditional IMLE.
ICCV 2019. Numbers are those of arXiv v1 (1811.12373). With it the baseline: CRN, the cascaded
refinement network of Q. Chen and V. Koltun, ICCV 2017, one output or k of them.

Idea. Regression shown one photo per layout learns an average; a GAN may ignore its noise and drop
modes. Here T(L, z) gets noise, and *every photo looks for its nearest sample*: of m images drawn
for the layout of a photo, the one that comes nearest is pulled towards the photo. No photo is left
without a sample, so no mode can be dropped, and other samples stay free to serve other photos.
CRN's own way is k outputs at once, the best one trained; k is then fixed.

Symbols     L batch["input"], one-hot    I batch["image"]    z batch["noise"]    T_theta generator
            S the images of one outer iteration     m candidates     K inner steps    S~ a batch

Paper map   (a test reads these lines: every name must exist, and nothing numbered may be missing)
    Eq. (1)     distance in VGG's features         layer_terms, distance, balanced_weights
    Sec. 3.2    IMLE's objective (unnumbered)      search, train_step
    Alg. 1      conditional IMLE                   populate, search, epoch_batches, train_step
    Sec. 3.3.1  the refinement network             Generator, RefinementModule
    Sec. 3.3.2  noise channels                     Generator, draw_noise
    Sec. 3.3.2  noise encoder                      NoiseEncoder
    Sec. 3.3.2  CRN with k outputs                 Generator, diversity_loss
    Sec. 3.4    C_k(p), D_p, R_p(k)                survey, rarity_scores, gaussian_kde
    Sec. 3.4    rebalanced S, masked loss          populate, paint_masks, layer_terms
    Sec. 4.2    settings                           Config, PRESETS
    Table 1     variance per class                 diversity, evaluate
    Table 2     which shows more artifacts         needs people; best_of picks the images
    Fig. 1      histograms of hue                  hue_histogram, plot_hues
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
    a sum of absolute values      | their mean                        | mean
    lambda: equal contributions   | constants                         | measured once; --calibrate
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
    rare classes not mentioned    | under 67 images: a score near 0   | under 10: the image's lowest
    blank images not mentioned    | one is left out                   | they are never drawn
    L1 min of k in CRN            | and 0.001 times the mean          | as released

Run         python crn_imle.py                               built-in streets, minutes on a laptop
            python crn_imle.py --data ./gta --gpu 0 --init crn.pt      the paper's run
            python crn_imle.py sample --samples 19           Fig. 3 of the newest run
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
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import common
from common import UserError, class_table, colour_label, notice

# --------------------------------------------------------------------------------- 1 Config

VGG_LAYERS = ("conv1_2", "conv2_2", "conv3_2", "conv4_2", "conv5_2")                  # Eq. (1)


@dataclass
class Config:
    """The defaults are the paper's; the comment says where it states them."""
    # The task
    data: str = ""                   # folder; "" is the built-in streets
    classes: str = ""                # a table of common.py, or a number; "" asks the data
    size: tuple[int, int] = (256, 512)   # height, width of the images, pixels           Sec. 4.2
    limit: int = 0                   # use the first so many examples; 0 is all
    # The network
    model: str = "imle"              # or crn, the baseline without noise
    outputs: int = 9                 # of crn only: its images per layout, k             Sec. 4.2
    diversity: str = "per-class"     # of crn only: who is best, per-class or per-image; the second
    #                                  is ours, see diversity_loss
    width: int = 1024                # channels of M0 to M4; the finer ones have fewer   Sec. 3.3.1
    modules: int = 0                 # 7 at 256 x 512; 0: until the smallest has 4 rows  Sec. 3.3.1
    noise_channels: int = 10         # d                                                 Sec. 4.2
    noise: str = "spatial"           # or broadcast: one vector z for all pixels, not in the paper
    encoder_width: int = 100         # of the noise encoder; 0: none. Not in the paper; released
    # The objective
    layers: tuple[str, ...] = VGG_LAYERS                                      # Eq. (1)
    pixel_weight: float = 1.0        # of a pixel term; 0 is Eq. (1) as printed. Released: 1
    calibrate: int = 1               # passes after which lambda is set, once; not in the paper
    rebalance: str = "both"          # or none, mask, bins                               Sec. 3.4
    # Algorithm 1
    epochs: int = 16                 # E; not in the paper; released code
    pool: int = 400                  # |S|, images of one outer iteration                Sec. 4.2
    candidates: int = 10             # m, samples among which a photo looks              Sec. 4.2
    inner_steps: int = 10000         # K, updates per epoch; 0: one pass (crn)           Sec. 4.2
    batch_size: int = 1              # |S~|, per process                                 Sec. 4.2
    steps: int = 0                   # end after so many updates; 0 leaves it to epochs
    lr: float = 1e-5                 # eta, Adam's                                       Sec. 4.2
    lr_drop: int = 0                 # from this epoch on a tenth; 0: never. Released: 6
    renew_encoder: bool = False      # at lr_drop the noise encoder starts anew; released code
    noise_gain: float = 5.0          # warm start: new weights over CRN's RMS; released code
    search_batch: int = 5            # candidates rendered at once; ours: memory, not results
    keep_features: int = 0           # photos whose VGG features stay in memory, 64 MB each at 256 p
    seed: int = 0                    # of initialisation, order and noise
    init: str = ""                   # start from these weights; imle starts from a crn's, too
    save_every: int = 0              # steps between checkpoints and grids; 0 is each epoch
    # Test time and evaluation
    eval_samples: int = 100          # images per layout, of which Table 1 takes nine    Sec. 4.3
    vgg: str = "imagenet"            # VGG-19's weights: imagenet, random, or a file
    # The machine
    gpu: int | None = None           # CUDA device; -1 the CPU; None the first GPU, else the CPU
    workers: int | None = None       # data processes; None is 4 with a GPU, else 0
    precision: str = "fp32"          # or bf16: autocast around the networks
    compile: bool = False            # torch.compile the networks
    channels_last: bool | None = None    # memory order; None is on with a GPU, off on the CPU
    out: str = ""                    # the run's folder; "" is the next free runs/crn_imle-N


PRESETS = {
    "imle": dict(),                                          # Sec. 4.2, as printed
    "imle-released": dict(lr=1e-4, lr_drop=6, renew_encoder=True),
    "crn-gta": dict(model="crn", lr=1e-4, epochs=400, inner_steps=3001, calibrate=100),
    "crn-cityscapes": dict(model="crn", lr=1e-4, epochs=200, inner_steps=0, calibrate=100),
    # Ours, for the streets on a laptop's CPU: two layers of a random VGG, not five, for speed; one
    # vector of noise per image, which ten candidates explore better than 4 x 4 of them; no
    # rebalancing, since with so few distinct colours the masks become extreme (see mode check).
    "toy": dict(size=(64, 64), width=48, noise_channels=8, noise="broadcast", encoder_width=32,
                layers=VGG_LAYERS[:2], epochs=8, pool=60, inner_steps=400, lr=2e-3, lr_drop=6,
                keep_features=400, vgg="random", rebalance="none"),
}
CHOICES = {"model": ("imle", "crn"), "diversity": ("per-class", "per-image"),
           "noise": ("spatial", "broadcast"), "rebalance": ("both", "bins", "mask", "none"),
           "precision": ("fp32", "bf16")}


def check_config(cfg: Config) -> None:
    """Absurd values and contradictions, each in one line, before anything is built."""
    for name, allowed in CHOICES.items():
        if getattr(cfg, name) not in allowed:
            raise UserError(f"{flag(name)} {getattr(cfg, name)}: choose one of "
                            + ", ".join(map(str, allowed)))
    bounds = dict.fromkeys(("batch_size", "epochs", "width", "pool", "candidates", "noise_channels",
                            "search_batch", "eval_samples", "outputs", "calibrate"), 1)
    for name in ("limit", "steps", "modules", "save_every", "seed", "workers", "encoder_width",
                 "pixel_weight", "inner_steps", "lr_drop", "noise_gain", "keep_features"):
        bounds[name] = 0
    for name, low in bounds.items():
        high = {"modules": 9, "workers": 256, "outputs": 100}.get(name, 10 ** 9)
        if not low <= (getattr(cfg, name) or 0 if low == 0 else getattr(cfg, name)) <= high:
            raise UserError(f"{flag(name)} {getattr(cfg, name)}: must lie in {low}..{high}")
    if not 0 < cfg.lr < 1:
        raise UserError(f"--lr {cfg.lr}: must lie between 0 and 1; the paper's is 0.00001")
    if min(cfg.size) < 1:
        raise UserError(f"--size {cfg.size[0]} {cfg.size[1]}: must be positive")
    if not cfg.layers or len(set(cfg.layers)) < len(cfg.layers) or set(cfg.layers) - {
            f"conv{i}_{j}" for i, n in enumerate(common.BLOCKS[19], 1) for j in range(1, n + 1)}:
        raise UserError(f"--layers {' '.join(cfg.layers)}: different layers of VGG-19, such as "
                        + " ".join(VGG_LAYERS))
    if cfg.renew_encoder and not (cfg.lr_drop and cfg.encoder_width and cfg.model == "imle"):
        raise UserError("--renew-encoder: happens at --lr-drop, and needs imle's noise encoder")
    if cfg.model == "imle" and not cfg.inner_steps:
        raise UserError("--inner-steps 0: one pass over the data is crn's; imle needs K >= 1")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def fit_modules(cfg: Config) -> Config:
    """As many modules as halve the training size down to 4 rows (or columns), at most nine."""
    h, w = cfg.size
    k = cfg.modules - 1 if cfg.modules else min(8, int(math.log2(max(min(h, w) / 4, 1))))
    unit = 2 ** k
    if h % unit or w % unit or min(h, w) < 32:
        unit = max(unit, 8)
        near = [max(32, round(s / unit) * unit) for s in (h, w)]
        raise UserError(f"--size {h} {w}: the modules halve each side {k} times, so it must be a "
                        f"multiple of {unit}; the nearest is --size {near[0]} {near[1]}")
    return replace(cfg, modules=k + 1)


# ------------------------------------------------------------------------------- 2 Networks

class RefinementModule(nn.Module):
    """M_i: twice 3x3 convolution, layer norm, LeakyReLU(0.2), at one resolution (Sec. 3.3.1).

    Layer norm: mean and variance over C, H and W together, gain and shift per channel; that is
    GroupNorm with one group. It takes each image alone, so candidates may share a batch.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.layers = nn.Sequential(*[layer for c in (c_in, c_out) for layer in (
            nn.Conv2d(c, c_out, 3, padding=1, bias=False),  # the norm has the bias
            nn.GroupNorm(1, c_out), nn.LeakyReLU(0.2))])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class NoiseEncoder(nn.Module):
    """z_hat: the noise, bent by three convolutions that also see the layout (Sec. 3.3.2).

    label (B, c, H, W), noise (B, d, H, W)  ->  (B, d, H, W). Fewer directions of noise then matter,
    so that fewer candidates find a near sample. Paper: three layers. Released code: these three.
    """

    def __init__(self, classes: int, noise_channels: int, width: int = 100):
        super().__init__()
        layers = []
        for c_in in (classes + noise_channels, width):
            layers += [nn.Conv2d(c_in, width, 3, padding=1, bias=False), nn.GroupNorm(1, width),
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
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()

    def forward(self, label: Tensor, noise: Tensor) -> Tensor:
        return self.layers(torch.cat([label, noise], 1))


class Generator(nn.Module):
    """CRN, and with noise channels T_theta of IMLE (Sec. 3.3).

    label (B, c, H, W) one-hot, noise (B, d, H, W)  ->  images (B, k, 3, H, W), about [-1, 1].

    M_0 sees the layout (and the noise) at 4 x 8; each next module sees them at twice that, beside
    the enlarged features of the one before. There is no tanh: values outside of [-1, 1] are clipped
    when an image is saved, never in training.
    With `modules` 7, 8 and 9 this is the network for 256, 512 and 1024 rows.
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
        x = None
        for module, *inputs in zip(self.refine, labels[::-1], noises[::-1]):     # from coarse
            if x is not None:
                inputs = [F.interpolate(x, inputs[0].shape[-2:], mode="bilinear",
                                        align_corners=True), *inputs]
            x = module(torch.cat([value for value in inputs if value is not None], 1))
        x = self.head(x)                                         # (B, 3k, H, W)
        # Released code: all reds come first; output u is channels u, k + u and 2k + u.
        return x.unflatten(1, (3, self.outputs)).transpose(1, 2)


def label_pyramid(label: Tensor, n: int) -> list[Tensor]:
    """n label maps, each half of the one before, by area: coarse ones hold shares that sum to 1."""
    labels = [label]
    while len(labels) < n:
        labels.append(F.avg_pool2d(labels[-1], 2))
    return labels


def noise_pyramid(noise: Tensor, n: int) -> list[Tensor]:
    """n noise maps, each with every second row and column of the one before.

    Paper: bilinear. Averages of independent numbers shrink: from 256 x 512 to 4 x 8 their deviation
    would fall to 1/64, and M_0, which decides between day and night, would get none. Released code:
    bilinear in TensorFlow 1, which at one half is what stands here.
    """
    return [noise[..., ::2 ** i, ::2 ** i] for i in range(n)]


# --------------------------------------------------------------------------------- 3 Losses

def features(vgg: nn.Module, image: Tensor) -> list[Tensor]:
    """Phi_0 .. Phi_l of images (B, 3, H, W) in [-1, 1]: the image itself, then VGG's layers."""
    return [image, *vgg(image).values()]


def layer_errors(real: list[Tensor], fake: list[Tensor]) -> list[Tensor]:
    """|Phi_l(I) - Phi_l(I~)|, averaged over channels: (B, h_l, w_l) per layer."""
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
    """Eq. (1), masked: sum_l lambda_l times the terms, one number per image (B,)."""
    return layer_terms(real, fake, mask) @ weights


def diversity_loss(real: list[Tensor], fake: list[Tensor], label: Tensor, weights: Tensor,
                   per_image: bool = False) -> Tensor:
    """CRN's loss with k outputs: sum_p min_u l_up, of Chen & Koltun.

    fake of B * k outputs, real of as many photos, label (B, c, H, W). l_up is the distance of
    output u within class p: the error at a pixel counts for p by the share of p there, and the mean
    runs over all pixels, so that an absent class adds 0 and the classes sum to the plain distance.
    Each class picks its winner alone: nothing makes the sky, the road and the cars of one output
    belong together. Ours: per_image takes one min for the whole image, min_u sum_p l_up.
    Released code: 0.999 of that, and 0.001 of the mean over all u, which revives dead outputs.
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

    means (1 + layers,): the terms' averages in training. The pixel term keeps its weight, and the
    others get lambda_l = mean_0 / mean_l. Only ratios matter under Adam.
    """
    weights = means[0] / means.clamp(min=1e-12)
    weights[0] = pixel_weight
    return weights


# ------------------------------------------------------------------------------- 4 Training

@dataclass
class State:
    """All that training changes. Whatever has a state_dict, and the counters, are saved."""
    generator: nn.Module
    vgg: nn.Module                              # frozen; it has an empty state_dict
    opt_g: torch.optim.Optimizer
    weights: Tensor                             # lambda_l, the pixel term's first
    sums: Tensor                                # of the layers' terms in this pass
    rarity: Tensor | None = None                # R_p(k) (images, classes) of the training set
    areas: Tensor | None = None                 # pixels (classes,) of each class in it
    chosen: Tensor | None = None                # S and its nearest noise: (|S|, 2), image and seed
    step: int = 0                               # updates done
    epoch: int = 0                              # passes completed
    seen: int = 0                               # images of this pass already used, by all processes


def networks(cfg: Config) -> tuple[Generator]:
    """The generator: k outputs and no noise for crn, one output and noise for imle."""
    cfg, imle = fit_modules(cfg), cfg.model == "imle"
    return (Generator(channels(cfg), 1 if imle else cfg.outputs, cfg.width, cfg.modules,
                      cfg.noise_channels if imle else 0, cfg.encoder_width),)


def build(cfg: Config, device: torch.device) -> State:
    """Networks and optimiser; precision, compilation and distribution go around the networks."""
    torch.manual_seed(cfg.seed)
    generator, = networks(cfg)
    generator.to(device, memory_format=memory_format(cfg, device))
    vgg = common.VGGFeatures(cfg.layers, 19, cfg.vgg, average_pool=True)
    vgg = dress(vgg.to(device, memory_format=memory_format(cfg, device)), cfg, device)
    weights = torch.ones(1 + len(cfg.layers), device=device)
    weights[0] = cfg.pixel_weight
    adam = torch.optim.Adam(generator.parameters(), cfg.lr, fused=True)
    state = State(generator, vgg, adam, weights, torch.zeros_like(weights))
    if cfg.init:
        load_networks(state, Path(cfg.init), cfg.noise_gain)
    state.generator = dress(state.generator, cfg, device)
    return state


def channels(cfg: Config) -> int:
    return len(class_names(cfg))


def class_names(cfg: Config) -> list[str]:
    """The layout's channels, c: Cityscapes and GTA-5 have 19 scored classes and "other"."""
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


def make_pair(batch: dict, cfg: Config) -> dict:
    """A batch of common.Dataset with what train_step needs, where it is not there yet.

    "layout" (B, H, W) ids of class_names, "input" (B, c, H, W) one-hot, "mask" (B, H, W) ones,
    and for imle "noise" (B, d, H, W), fresh.
    """
    if "label" not in batch:
        raise UserError("layouts are label maps; this dataset has none")
    layout = layout_of(batch["label"], cfg)
    label = F.one_hot(layout, channels(cfg)).movedim(-1, 1).float().contiguous()
    more = {"layout": layout, "input": label, "mask": torch.ones_like(label[:, 0])}
    if cfg.model == "imle" and "noise" not in batch:
        seeds = torch.randint(2 ** 62, (len(layout),)).tolist()
        more["noise"] = torch.stack([draw_noise(s, cfg, layout.shape[1:], layout.device)
                                     for s in seeds])
    return more | batch


def draw_noise(seed: int, cfg: Config, size: tuple[int, int], device: torch.device) -> Tensor:
    """z ~ N(0, I): (d, H, W). A seed stands for its noise: no z is ever stored.

    It is drawn on the device, whose generators differ: a seed's image on a GPU is not that on the
    CPU. Ours: --noise broadcast draws one vector and repeats it at every pixel; fewer numbers, so
    that fewer candidates find a near sample, which is what the paper wants of the encoder.
    """
    shape = (cfg.noise_channels, *(size if cfg.noise == "spatial" else (1, 1)))
    noise = torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    return noise.expand(-1, *size)


# Rebalancing (Sec. 3.4): images of rare appearance are drawn more often, and weigh more.

def survey(train_set: common.Dataset, cfg: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """C_k(p), the mean colour of class p in image k: (N, c, 3) on 0..255; and areas (c,).

    NaN where p does not occur in k. A blank image counts as empty: rarity would love it.
    """
    c = channels(cfg)
    colours = torch.full((len(train_set), c, 3), torch.nan, dtype=torch.float64)
    areas = torch.zeros(c, dtype=torch.float64)
    one_by_one = open_loader(train_set, replace(cfg, batch_size=None), device)
    items = one_by_one.read(0, range(len(train_set)))
    for k, item in enumerate(tqdm(items, "survey", len(train_set), unit="image", disable=None)):
        layout = layout_of(item["label"], cfg).flatten()
        image = (item["image"].double().flatten(1).T + 1) * 127.5                    # (H * W, 3)
        if image.std(0).max() == 0:
            notice(f"{item['name']}: a blank image; it is never drawn")
            continue
        area = torch.bincount(layout, minlength=c)
        sums = torch.zeros(c, 3, dtype=torch.float64).index_add_(0, layout, image)
        colours[k] = torch.where(area[:, None] > 0, sums / area[:, None], torch.nan)
        areas += area
    return colours, areas


def gaussian_kde(points: Tensor) -> Tensor:
    """log D of a Gaussian KDE at its own points: (n, 3) -> (n,), float64.

    Scott's rule: the kernel's covariance is n^(-2/7) times the data's, in three dimensions. Colours
    that lie in a plane have none: one grey level of independent noise is added, 1^2 on 0..255.
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
    Tight classes have a large D, so a small R everywhere: that is the paper's definition.
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
    """S: |S| indices of images (Sec. 3.4). A fifth of the slots goes to each of the five largest
    classes, and within it P(k) is proportional to R_q(k); without bins all images are equal."""
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
def search(state: State, train_set: common.Dataset, cfg: Config, known: dict,
           ) -> tuple[Tensor, Tensor]:
    """Algorithm 1, the outer half: a new S, and for each of its images the nearest of m samples.

    Returns (|S|, 2), image and seed of z_sigma(i); and all distances (|S|, m). Only seeds are kept:
    the update renders the image anew, with the theta it has by then. Candidates share a batch
    (layer norm takes each alone), and the photo's features are computed once for all of them.
    """
    generator, device = plain(state.generator), state.weights.device
    rank, world = place()
    chosen = torch.zeros(cfg.pool, 2, dtype=torch.int64)
    losses = torch.zeros(cfg.pool, cfg.candidates, dtype=torch.float64)
    images = populate(state.rarity, state.areas, cfg, state.epoch).tolist()
    for i in tqdm(range(rank, cfg.pool, world), desc="search", unit="image", leave=False,
                  disable=None if rank == 0 else True):
        pair = photo(state, train_set, images[i], cfg)
        real = known_features(state, pair["image"], images[i], known, cfg)
        seeds = [hash((cfg.seed, state.epoch, i, j)) % 2 ** 62 for j in range(cfg.candidates)]
        for j in range(0, cfg.candidates, cfg.search_batch):
            noise = torch.stack([draw_noise(s, cfg, pair["layout"].shape[1:], device)
                                 for s in seeds[j:j + cfg.search_batch]])
            fake = generator(pair["input"].expand(len(noise), -1, -1, -1), noise)[:, 0]
            losses[i, j:j + len(noise)] = distance(real, features(state.vgg, fake), pair["mask"],
                                                   state.weights).cpu()
        chosen[i] = torch.tensor([images[i], seeds[int(losses[i].argmin())]])
    if world > 1:                               # each process has searched its share of S
        chosen, losses = chosen.to(device), losses.to(device)
        dist.all_reduce(chosen)
        dist.all_reduce(losses)
    return chosen.cpu(), losses.cpu()


def photo(state: State, train_set: common.Dataset, k: int, cfg: Config) -> dict:
    """Training image k as a batch of one, with its mask."""
    return masked(pair_of(train_set[k], cfg, state.weights.device), state, [k], cfg)


def masked(pair: dict, state: State, images: list[int], cfg: Config) -> dict:
    """The pair with the rarity masks of these training images, if the loss is rebalanced."""
    if cfg.model == "imle" and cfg.rebalance in ("both", "mask"):
        return pair | {"mask": paint_masks(pair["layout"], state.rarity[images])}
    return pair


@torch.no_grad()
def known_features(state: State, image: Tensor, k: int, known: dict, cfg: Config) -> list[Tensor]:
    """Phi(I) of training image k, (1, 3, H, W): it never changes, so once is enough, if kept."""
    if k in known:
        return known[k]
    found = features(state.vgg, image)
    if len(known) < cfg.keep_features:
        known[k] = found
    return found


def train_step(state: State, batch: dict, cfg: Config) -> dict[str, Tensor]:
    """Algorithm 1, one inner update: theta -= eta grad L^(I_i, T_theta(L_i, z_sigma(i))).

    batch as from to_pair or make_pair. For crn: one update on the diversity loss.
    """
    L = batch["input"]                                             # (B, c, H, W)
    made = state.generator(L, batch.get("noise"))                  # (B, k, 3, H, W); k = 1 for imle
    fake, k = features(state.vgg, made.flatten(0, 1)), made.shape[1]    # gradients pass through VGG
    real = batch.get("real")
    if real is None:
        with torch.no_grad():
            real = features(state.vgg, batch["image"])
    if cfg.model == "crn":
        real = [value.repeat_interleave(k, 0) for value in real]
        loss = diversity_loss(real, fake, L, state.weights, cfg.diversity == "per-image")
        with torch.no_grad():                                      # for lambda and the log alone
            terms = layer_terms(real, fake, batch["mask"].repeat_interleave(k, 0))
    else:
        terms = layer_terms(real, fake, batch["mask"])
        loss = (terms @ state.weights).mean()                      # Eq. (1), masked
    state.opt_g.zero_grad(set_to_none=True)
    loss.backward()
    state.opt_g.step()
    terms = terms.detach().mean(0)
    state.sums += terms
    return {"loss": loss.detach()} | dict(zip(("pixel", *cfg.layers), terms))


def learning_rate(cfg: Config, epoch: int) -> float:
    """Constant in the paper. Released code (--lr-drop 6): a tenth of it from epoch 6 on."""
    return cfg.lr / 10 if cfg.lr_drop and epoch >= cfg.lr_drop else cfg.lr


def begin_epoch(state: State, train_set: common.Dataset, cfg: Config, known: dict) -> str:
    """What happens between two passes: lambda, a new encoder, the search. Returns a line to print.

    lambda changes here and nowhere else: search and descent must mean the same distance.
    """
    line = ""
    if state.epoch == cfg.calibrate:
        if dist.is_initialized():
            dist.all_reduce(state.sums)
        state.weights = balanced_weights(state.sums, cfg.pixel_weight)
        line = "lambda, measured (released): " + ", ".join(
            f"{name} {w:.3g} ({RELEASED_WEIGHTS.get(name, 1):.3g})"
            for name, w in zip(("pixel", *cfg.layers), state.weights.tolist())) + "\n"
    state.sums = torch.zeros_like(state.sums)
    if cfg.renew_encoder and state.epoch == cfg.lr_drop:
        torch.manual_seed(cfg.seed + state.epoch)
        plain(state.generator).encoder.reset()
        state.opt_g.state.clear()               # Adam's moments, too
    if cfg.model == "imle":
        clock = time.time()
        state.chosen, losses = search(state, train_set, cfg, known)
        near, mean = losses.amin(1).mean(), losses.mean()
        line += (f"search: nearest of {cfg.candidates} at {near:.4f}, their mean {mean:.4f}; "
                 f"{time.time() - clock:.0f} s")
    return line


# From here to Log all is word for word the same in the four scripts, but for these two names.

NAME = "crn_imle"
NETWORKS = ("generator",)                     # in State


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


def load_networks(state: State, path: Path, noise_gain: float = 0.0) -> None:
    """Weights only, for --init and for testing; names and shapes are compared first.

    noise_gain > 0 (--init) lets a generator with noise start from a CRN's weights: see warm_start.
    """
    stored = read_checkpoint(path)
    if "released" in stored:
        raise UserError(f"{path}: bare weights of unknown shape; give a checkpoint of {NAME}.py "
                        "(the authors' own files are TensorFlow's, which PyTorch cannot read)")
    net, theirs = plain(state.generator), stored["generator"]
    if noise_gain and net.noise_channels and stored["config"]["model"] == "crn":
        theirs = warm_start(net.state_dict(), theirs, net.noise_channels, noise_gain)
    shapes, got = ({k: tuple(v.shape) for k, v in weights.items()}
                   for weights in (net.state_dict(), theirs))
    wrong = sorted(k for k in shapes | got if shapes.get(k) != got.get(k))
    if wrong:
        raise UserError(f"{path}: another generator: {wrong[0]} is {got.get(wrong[0], 'absent')}, "
                        f"expected {shapes.get(wrong[0], 'absent')} ({len(wrong)} such)")
    net.load_state_dict(theirs)


def warm_start(own: dict, crn: dict, d: int, gain: float) -> dict:
    """A CRN's weights for a generator with d noise channels, as the released code starts.

    Its output 0 becomes the only one. The noise channels come last in the first convolution of each
    module; their weights are normal with `gain` times the RMS of CRN's, so that noise matters from
    the first step: among m equal candidates there would be no nearest one.
    """
    weights = {k: v for k, v in own.items() if k.startswith("encoder.")}     # keeps its start
    for name, value in crn.items():
        if name.startswith("head."):                           # all k reds, greens, blues
            value = value[:: len(value) // 3]
        elif name.endswith("layers.0.weight"):
            more = torch.randn(len(value), d, *value.shape[2:]) * value.square().mean().sqrt()
            value = torch.cat([value, gain * more], 1)
        weights[name] = value
    return weights


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
    return common.Dataset(cfg.data, split, cfg.size, classes=cfg.classes, limit=cfg.limit,
                          seed=cfg.seed, instances=False)


def open_data(cfg: Config) -> tuple[Config, common.Dataset, common.Dataset]:
    """Both splits, and the config with what the data turned out to be: its classes."""
    train_set = dataset(cfg, "train")
    cfg = replace(fit_modules(cfg), classes=train_set.classes)
    for role in ("label", "image"):
        if role not in train_set.roles:
            raise UserError(f"--data {cfg.data}: layout {train_set.layout.name}, without "
                            f"{role}s; training needs label maps and their photos")
    images = cfg.batch_size * place()[1]
    if cfg.model == "crn" and images > len(train_set):
        raise UserError(f"--batch-size {cfg.batch_size}: a step needs {images} images, training "
                        f"has {len(train_set)}")
    check_config(cfg)
    return cfg, train_set, dataset(cfg, "test")


def epoch_order(state: State, cfg: Config, n: int) -> Tensor:
    """What this pass trains on: (updates, processes, B) slots of S, or images of the n of crn.

    imle: S~ is drawn from S "uniformly", with replacement. crn: all images, then all anew.
    """
    per_step = cfg.batch_size * place()[1]
    updates = cfg.inner_steps or n // per_step
    generator = torch.Generator().manual_seed(hash((cfg.seed, state.epoch, 1)) % 2 ** 62)
    if cfg.model == "imle":
        order = torch.randint(len(state.chosen), (updates * per_step,), generator=generator)
    else:
        rounds = -(-updates * per_step // n)
        order = torch.cat([torch.randperm(n, generator=generator) for _ in range(rounds)])
    return order[:updates * per_step].view(updates, -1, cfg.batch_size)


def open_loader(train_set: common.Dataset, cfg: Config, device: torch.device) -> common.Loader:
    return common.Loader(train_set, cfg.batch_size, cfg.workers, device, files=bool(cfg.data))


def epoch_batches(loader: common.Loader, cfg: Config, state: State):
    """The rest of this pass; the order hangs on (seed, epoch) alone. With each batch go the numbers
    of its "images" and, for imle, the "seeds" of z_sigma(i)."""
    rank, world = place()
    slots = epoch_order(state, cfg, len(loader.examples))
    slots = slots[state.seen // (world * cfg.batch_size):, rank]                    # (updates, B)
    images, seeds = state.chosen[slots].unbind(2) if cfg.model == "imle" else (slots, slots[:, :0])
    for batch, k, s in zip(loader.read(state.epoch, images.flatten().tolist()), images, seeds):
        yield batch | {"images": k.tolist(), "seeds": s.tolist()}


def to_pair(batch: dict, cfg: Config, state: State, known: dict) -> dict:
    """A batch of epoch_batches as a pair on the device, with noise, masks and known features."""
    device = state.weights.device
    batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v
             for k, v in batch.items()}
    if batch["seeds"]:
        batch["noise"] = torch.stack([draw_noise(s, cfg, batch["label"].shape[1:], device)
                                      for s in batch["seeds"]])
    batch = masked(make_pair(batch, cfg), state, batch["images"], cfg)
    if cfg.keep_features:
        each = [known_features(state, image[None], k, known, cfg)
                for image, k in zip(batch["image"], batch["images"])]
        batch["real"] = [torch.cat(values) for values in zip(*each)]
    return {k: v.contiguous(memory_format=memory_format(cfg, device))
            if k in ("input", "image", "noise") else v for k, v in batch.items()}


def train(cfg: Config, resume: bool = False) -> Path:
    """Train from scratch, from --init, or on from the checkpoint in cfg.out; returns the folder."""
    device, stored = pick_device(cfg), None
    rank, world = place()
    if resume:
        stored = read_checkpoint(Path(cfg.out) / "checkpoint.pt")
    cfg, train_set, test_set = open_data(cfg)
    per_step = cfg.batch_size * world
    per_epoch = cfg.inner_steps or len(train_set) // per_step
    total = min(cfg.steps or math.inf, cfg.epochs * per_epoch)
    state, known = build(cfg, device), {}
    loader = open_loader(train_set, cfg, device)
    if resume:
        restore(state, stored, Path(cfg.out) / "checkpoint.pt")
        state.weights, state.sums = state.weights.to(device), state.sums.to(device)
    if state.step >= total:
        raise UserError(f"{cfg.out}: finished at step {state.step}, epoch {state.epoch}; a larger "
                        "--epochs or --steps goes on")
    if cfg.model == "imle" and state.rarity is None:
        colours, state.areas = survey(train_set, cfg, device)
        state.rarity = rarity_scores(colours)
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
            clock = time.time()
            line = begin_epoch(state, train_set, cfg, known) if state.seen == 0 else ""
            if rank == 0 and line:
                bar.write(line)
                log.begun += time.time() - clock    # the search has its own line
            state.opt_g.param_groups[0]["lr"] = learning_rate(cfg, state.epoch)
            clock = time.time()
            for batch in epoch_batches(loader, cfg, state):
                waited = time.time() - clock
                losses = train_step(state, to_pair(batch, cfg, state, known), cfg)
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
                        sample_grid(state, cfg, test_set)
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
    return Path(cfg.out)


# ------------------------------------------------------------------------------- 5 Sampling

@torch.no_grad()
def translate(generator: nn.Module, label: Tensor, noise: Tensor | None) -> Tensor:
    """(1, c, H, W) one-hot and (1, d, H, W) of any size -> (k, 3, H, W) in [-1, 1].

    Sides are mirrored up to the next multiple that G can halve, and the result is cropped.
    """
    h, w = label.shape[-2:]
    rows, columns = (reflect(side, -side % generator.multiple).to(label.device) for side in (h, w))
    label, noise = (value if value is None else value[..., rows, :][..., columns]
                    for value in (label, noise))
    return generator(label, noise)[0, ..., :h, :w].clamp(-1, 1)


def pair_of(item: dict, cfg: Config, device: torch.device) -> dict:
    """One item of a dataset as a batch of one on the device, made a pair; noise is drawn later."""
    batch = {k: v[None].to(device) if torch.is_tensor(v) else v for k, v in item.items()}
    return make_pair(batch | {"noise": None}, cfg)


def noise_of(seed: int, pair: dict, cfg: Config) -> Tensor:
    """The noise (1, d, H, W) of a seed at this layout's size: the same on all layouts of a size."""
    return draw_noise(seed, cfg, pair["layout"].shape[1:], pair["layout"].device)[None]


def draw(state: State, pair: dict, cfg: Config, n: int, first: int = 0) -> Tensor:
    """n images of a layout, (n, 3, H, W) in [-1, 1]: by seeds from cfg.seed + first on, or a CRN's
    outputs."""
    generator = plain(state.generator)
    if cfg.model == "crn":
        if n > cfg.outputs:
            raise UserError(f"--samples {n}: this CRN has {cfg.outputs} output(s) per layout and "
                            "no noise; train with --model imle for more")
        return translate(generator, pair["input"], None)[:n]
    return torch.cat([translate(generator, pair["input"], noise_of(cfg.seed + first + j, pair, cfg))
                      for j in range(n)])


def need_noise(cfg: Config, mode: str) -> None:
    if cfg.model == "crn":
        raise UserError(f"{mode} needs noise, which a CRN has not; train with --model imle")


def colours_of(pair: dict, cfg: Config) -> Tensor:
    """The layout as a picture (1, 3, H, W) in [-1, 1]."""
    return colour_label(pair["label"], class_table(cfg.classes))


def sample_grid(state: State, cfg: Config, test_set: common.Dataset) -> None:
    """samples/<step>.png: layout | up to six samples | truth, of five test examples."""
    tiles, n, device = [], min(5, len(test_set)), state.weights.device
    for i in range(n):
        pair = pair_of(test_set[i * len(test_set) // n], cfg, device)
        made = draw(state, pair, cfg, min(6, cfg.outputs) if cfg.model == "crn" else 6)
        tiles += [colours_of(pair, cfg), made, *([pair["image"]] if "image" in pair else [])]
    tiles = torch.cat(tiles).cpu()
    path = Path(cfg.out) / "samples" / f"{state.step:07d}.png"
    save_images(tiles, path, nrow=len(tiles) // n)


def reflect(n: int, more: int) -> Tensor:
    """Indices 0 .. n-1 and `more` back and forth: F.pad reflects, but not by more than n - 1."""
    i = torch.arange(n + more) % max(2 * n - 2, 1)
    return torch.minimum(i, (2 * n - 2 - i).abs())


def save_images(images: Tensor, path: Path, nrow: int = 1) -> None:
    """(B, 3, H, W) in [-1, 1] to a file; several as a grid."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        grid = make_grid(images, nrow, padding=2 if len(images) > 1 else 0, pad_value=1)
        save_image((grid + 1) / 2, path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({error}); pictures end in .png or .jpg")


def save_gif(images: Tensor, path: Path) -> None:
    """(n, 3, H, W) in [-1, 1] as an endless animation, eight frames a second."""
    frames = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    first, *rest = (Image.fromarray(frame) for frame in frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    first.save(path, save_all=True, append_images=rest, duration=125, loop=0)


def read_input(path: Path, cfg: Config) -> dict:
    """A user's label map as an item."""
    return {"label": common.read_label(path, class_table(cfg.classes)), "name": path.stem}


def items_of(cfg: Config, source: str, size: tuple[int, int] | None) -> list[dict]:
    """Items from a file or a folder (resized if `size` is given), or the test split."""
    if not source:
        return dataset(cfg, "test")
    root = Path(source)
    files = sorted(p for p in root.iterdir() if p.suffix.lower() in common.SUFFIXES) \
        if root.is_dir() else [root]
    if not files:
        raise UserError(f"--input {source}: a folder without images")
    if len({path.stem for path in files}) < len(files):
        raise UserError(f"--input {source}: several files of one name; outputs are named by it")
    items = [read_input(path, cfg) for path in files]
    for item in items if size else ():
        label = item["label"][None, None].double()
        item["label"] = F.interpolate(label, size, mode="nearest-exact")[0, 0].long()
    return items


def sample(cfg: Config, state: State, source: str = "", output: str = "", samples: int = 9,
           size: tuple[int, int] | None = None) -> Path:
    """Images for a file or a folder of any sizes, or for the test split; returns where they are.

    An output has the size of its input. With several samples there is also NAME_grid.png, the
    layout and all of them (Fig. 2 and 3); how much they differ is printed.
    """
    if samples < 1:
        raise UserError(f"--samples {samples}: must be 1 or more")
    root, target = Path(source), Path(output) if output else Path(cfg.out or ".") / "test"
    items, apart = items_of(cfg, source, size), []
    inputs = {p.resolve() for p in (root.iterdir() if root.is_dir() else [root])} if source else ()
    to_file = root.is_file() and samples == 1 and target.suffix and not target.is_dir()
    if not to_file and target.suffix.lower() in common.SUFFIXES:
        raise UserError(f"--output {output}: one file for several images; name a folder")
    for i in tqdm(range(len(items)), unit="layout", disable=None):
        pair = pair_of(items[i], cfg, state.weights.device)
        made = draw(state, pair, cfg, samples).cpu()
        paths = [target if to_file else target / f"{pair['name']}.png"] if samples == 1 else [
            target / f"{pair['name']}_{k + 1}.png" for k in range(samples)]
        for path, image in zip(paths, made):
            if path.resolve() in inputs:
                raise UserError(f"--output {output}: would overwrite the input {path}")
            save_images(image[None], path)
        if samples > 1:
            both = torch.cat([colours_of(pair, cfg).cpu(), made])
            save_images(both, target / f"{pair['name']}_grid.png", math.ceil(math.sqrt(len(both))))
            apart.append(torch.pdist(made.flatten(1), 1).mean().item() / made[0].numel())
    print(f"{len(items) * samples} image(s): {target}")
    if apart:
        print(f"two samples of one layout differ by {sum(apart) / len(apart):.4f} per value "
              "on average (mean absolute difference of images in [-1, 1])")
    return target


def between(a: Tensor, b: Tensor, t: float, linear: bool = True) -> Tensor:
    """The noise at t in [0, 1] between two. Paper: (1 - t) a + t b, whose variance sinks to 1/2 in
    the middle. Ours, beside it: cos and sin of a quarter turn, which keep the variance at 1."""
    if linear:
        return (1 - t) * a + t * b
    return math.cos(t * math.pi / 2) * a + math.sin(t * math.pi / 2) * b


def dark_and_bright(state: State, pair: dict, cfg: Config, n: int = 30) -> tuple[int, int]:
    """The seeds of the darkest and the brightest of n samples: night and day, where T knows them.
    Paper: chosen by eye."""
    grey = draw(state, pair, cfg, n).mean((1, 2, 3))
    return cfg.seed + int(grey.argmin()), cfg.seed + int(grey.argmax())


def interpolate(cfg: Config, state: State, pair: dict, ends: tuple[int, int] = (),
                frames: int = 8, output: str = "") -> dict[str, Tensor]:
    """Fig. 4 and 8: images from one seed's noise to another's, as a strip and as animations.

    Row 1 of the strip is the paper's linear path, row 2 keeps the variance. Returns the frames.
    """
    need_noise(cfg, "interpolate")
    target, generator = Path(output or Path(cfg.out or ".") / "interpolate"), plain(state.generator)
    ends = ends or dark_and_bright(state, pair, cfg)
    a, b = (noise_of(seed, pair, cfg) for seed in ends)
    rows = {name: torch.cat([
        translate(generator, pair["input"], between(a, b, i / (frames - 1), name == "linear"))
        for i in range(frames)]).cpu() for name in ("linear", "variance-preserving")}
    label = colours_of(pair, cfg).cpu()
    save_images(torch.cat([torch.cat([label, row]) for row in rows.values()]),
                target / "strip.png", frames + 1)
    print(f"{pair['name']}, from seed {ends[0]} to {ends[1]}: {target}")
    street = street_of(pair, cfg)
    for name, row in rows.items():
        save_gif(torch.cat([row, row.flip(0)[1:-1]]), target / f"{name}.gif")
        step = (row[1:] - row[:-1]).abs().mean((1, 2, 3))
        told = f"  {name}: largest step {step.max():.3f}, mean step {step.mean():.3f}"
        if street:
            seen = street.read(row)
            told += (f"; valid {seen['valid'].mean():.2f}, mode switches {switches(seen['mode'])}, "
                     "times " + " ".join(street.times(seen["mode"])))
        print(told)
    return rows


def transfer(cfg: Config, state: State, pairs: list[dict], rows: int = 3, output: str = "",
             ) -> Tensor:
    """Fig. 5: the same noise on several layouts of one size; a row per noise, a column per layout.
    Returns the images (rows, columns, 3, H, W)."""
    need_noise(cfg, "transfer")
    if len({pair["layout"].shape for pair in pairs}) > 1:
        raise UserError("transfer: the same noise needs layouts of one size; give --size H W")
    made = torch.stack([draw(state, pair, cfg, rows) for pair in pairs], 1).cpu()
    path = Path(output or Path(cfg.out or ".") / "transfer.png")
    labels = torch.cat([colours_of(pair, cfg) for pair in pairs]).cpu()
    save_images(torch.cat([labels, made.flatten(0, 1)]), path, len(pairs))
    print(f"{rows} noise(s) on {len(pairs)} layouts: {path}")
    streets = [street_of(pair, cfg) for pair in pairs]
    if all(streets):
        times = [s.times(s.read(made[:, i])["mode"]) for i, s in enumerate(streets)]
        print(f"  same time of day on two layouts: {agreement(times):.2f} (by chance "
              f"{sum(p * p for p in common.TIMES.values()):.2f})")
    return made


EDIT_FORMS = {"set": "CLASS=CLASS", "paint": "TOP,LEFT,BOTTOM,RIGHT=CLASS"}


def class_id(name: str, table: common.ClassTable) -> int:
    """A class by its name or its number."""
    if name in table.names:
        return table.names.index(name)
    if name.isdecimal() and int(name) < table.channels:
        return int(name)
    raise UserError(f"class {name}: choose a number below {table.channels}, or one of "
                    + ", ".join(table.names))


def relabel(label: Tensor, kind: str, text: str, table: common.ClassTable) -> Tensor:
    """One edit of a label map (H, W): ("set", "car=road") or ("paint", "20,30,40,60=car")."""
    left, _, right = text.partition("=")
    if not right:
        raise UserError(f"--{kind} {text}: expected {EDIT_FORMS[kind]}")
    if kind == "set":
        return torch.where(label == class_id(left, table), class_id(right, table), label)
    (h, w), numbers = label.shape, left.split(",")
    if len(numbers) != 4 or not all(n.isdecimal() for n in numbers):
        raise UserError(f"--{kind} {text}: expected {EDIT_FORMS[kind]}")
    top, left, bottom, right_edge = map(int, numbers)
    if not (top < bottom <= h and left < right_edge <= w):
        raise UserError(f"--{kind} {text}: not a rectangle within {h} x {w}")
    label = label.clone()
    label[top:bottom, left:right_edge] = class_id(right, table)
    return label


def edit(cfg: Config, state: State, item: dict, edits: list[tuple[str, str]], columns: int = 3,
         output: str = "") -> Tensor:
    """Fig. 7: the layout and after each edit the layout again, a row each, with the same noises.
    Returns the images (rows, columns, 3, H, W)."""
    items = [item]
    for kind, text in edits:
        label = relabel(items[-1]["label"], kind, text, class_table(cfg.classes))
        items.append({"label": label, "name": item["name"]})
    pairs = [pair_of(each, cfg, state.weights.device) for each in items]
    made = torch.stack([draw(state, pair, cfg, columns) for pair in pairs]).cpu()
    tiles = [torch.cat([colours_of(pair, cfg).cpu(), row]) for pair, row in zip(pairs, made)]
    path = Path(output or Path(cfg.out or ".") / "edit.png")
    save_images(torch.cat(tiles), path, columns + 1)
    print(f"{item['name']}: {path}")
    for (kind, text), before, after, a, b in zip(edits, pairs, pairs[1:], made, made[1:]):
        same = (before["label"] == after["label"])[0].cpu()
        print(f"  --{kind} {text}: relabelled {100 * (~same).float().mean():.1f} % of the pixels; "
              f"the others changed by {(a - b).abs().mean((0, 1))[same].mean():.4f}")
    return made


def moving_car(cfg: Config, frames: int = 17) -> list[dict]:
    """Fig. 9: the layouts of a test street whose first car drives away and comes back."""
    start = common.Dataset.STREETS["test"][0]
    scene = next(s for s in (common.street_scene(0, start + i) for i in range(1000))
                 if s.vehicles and s.vehicles[0].kind == "car")
    items = []
    for i in range(frames):
        away = 1 - abs(2 * i / (frames - 1) - 1)                    # 0 ... 1 ... 0
        scene.vehicles[0].z = 5.5 + 14 * away
        layout = common.paint(scene, cfg.size)
        items.append({"label": torch.from_numpy(layout.label), "name": f"frame_{i:03d}"})
    return items


def video(cfg: Config, state: State, items: list[dict], output: str = "") -> dict[str, float]:
    """Fig. 9 and 10: a film whose frames know nothing of each other, from one noise, and with the
    noise moving from dark to bright; differences of adjacent frames.

    Returns their mean where the labels of both frames agree: the ideal is 0 for the fixed noise.
    """
    need_noise(cfg, "video")
    target, generator = Path(output or Path(cfg.out or ".") / "video"), plain(state.generator)
    pairs = [pair_of(item, cfg, state.weights.device) for item in items]
    if len(pairs) < 2 or len({pair["layout"].shape for pair in pairs}) > 1:
        raise UserError("video needs two or more layouts of one size")
    a, b = (noise_of(seed, pairs[0], cfg) for seed in dark_and_bright(state, pairs[0], cfg))
    labels = torch.cat([colours_of(pair, cfg) for pair in pairs]).cpu()
    same = torch.cat([x["label"] == y["label"] for x, y in zip(pairs, pairs[1:])]).cpu()
    rows, told = [labels], {}
    for name in ("fixed", "moving"):
        film = torch.cat([translate(generator, pair["input"], between(
            a, b, i / (len(pairs) - 1) if name == "moving" else 1.0, linear=False))
            for i, pair in enumerate(pairs)]).cpu()
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
TABLE_2 = {"CRN": (.636, .242), "IMLE": (.364, .242)}   # share judged to show more artifacts, +-


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


def spread_nine(images: Tensor, clusters: int = 9, repeats: int = 10) -> list[Tensor]:
    """Table 1's choice: 9 clusters of (n, 3, H, W), one image of each at random: indices (9,), ten
    times. Ours: K-means on images shrunk to 32 rows by area; the clusters are found once."""
    small = F.adaptive_avg_pool2d(images, (min(32, images.shape[2]),
                                           min(32 * images.shape[3] // images.shape[2],
                                               images.shape[3])))
    # n points span n dimensions at most: there K-means is the same, and fast.
    points = torch.linalg.qr(small.flatten(1).double().T)[1].T.contiguous()
    owner = torch.cdist(points.float(), kmeans(points, clusters)).argmin(1)
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
    """The sample nearest to the photo in l1, as for Table 2, and its mean error on [0, 1]."""
    errors = (images - truth).abs().mean((1, 2, 3))
    return int(errors.argmin()), errors.min().item()


class Street:
    """What one built-in street can look like, exactly: all its modes and their probabilities.

    A mode is an "air" (time, weather, palette) and a colour per vehicle. A region is a vehicle,
    another object, or the stuff of one class, from 1 % of the image on (vehicles: always). Regions
    are compared by mean colours on [0, 1]; a vehicle's paint is taken to change its own region
    alone (a test of common.py holds that), so that 27 x 4 renderings stand for all modes.
    """

    def __init__(self, index: int, size: tuple[int, int]):
        self.layout = common.paint(common.street_scene(0, index), size)
        ids, regions = np.unique(self.layout.instance, return_inverse=True)
        self.regions = torch.from_numpy(regions.reshape(-1))
        self.area = torch.bincount(self.regions)
        own = [int(np.flatnonzero(ids == k)[0]) for k, _ in self.layout.vehicles]
        self.rest = [r for r in range(len(ids)) if r not in own
                     and self.area[r] >= 0.01 * len(self.regions)]
        self.own = own
        laws = [common.COLOR_LAW[name] for _, name in self.layout.vehicles]
        self.airs = [(t, w, p) for t in common.TIMES for w in common.WEATHERS
                     for p in common.PALETTES]
        self.time = torch.tensor([list(common.TIMES).index(t) for t, _, _ in self.airs])
        p_air = [common.TIMES[t] * common.WEATHERS[w] * common.PALETTES[p] for t, w, p in self.airs]
        self.p = torch.tensor(p_air, dtype=torch.float64)
        for law in laws:                                           # (27, n_1, n_2, ...)
            self.p = self.p[..., None] * torch.tensor(list(law.values()), dtype=torch.float64)
        stuff, paint = [], torch.full((len(self.airs), len(own), 4, 3), torch.inf)
        for a, air in enumerate(self.airs):
            for c in range(4):
                names = [list(law)[c % len(law)] for law in laws]
                photo = common.render(self.layout, common.Style(*air, tuple(names)))
                means = self.means(torch.from_numpy(photo).permute(2, 0, 1)[None] * 2 - 1)[0]
                stuff += [means[self.rest]] if c == 0 else []
                for v, law in enumerate(laws):
                    paint[a, v, c % len(law)] = means[own[v]]
        self.stuff, self.paint = torch.stack(stuff), paint         # (27, R, 3), (27, V, 4, 3)
        gaps = [(self.stuff[a] - self.stuff[b]).abs().max().item()
                for a in range(27) for b in range(a)]
        for v, law in enumerate(laws):
            gaps += [(paint[:, v, a] - paint[:, v, b]).abs().amax(1).min().item()
                     for a in range(len(law)) for b in range(a)]
        self.tau = min(gaps) / 2                # half the way to the nearest other mode

    def means(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [-1, 1] -> mean colours of all regions (n, regions, 3) on [0, 1]."""
        values = (images.clamp(-1, 1).float().flatten(2).movedim(2, 0) + 1) / 2    # (H * W, n, 3)
        sums = torch.zeros(len(self.area), *values.shape[1:]).index_add_(0, self.regions, values)
        return (sums / self.area[:, None, None]).transpose(0, 1)

    def read(self, images: Tensor) -> dict[str, Tensor]:
        """The nearest mode of each image (n, 1 + vehicles), and whether it is that mode.

        valid (n,): all regions within tau of it. fits (n, R): the region alone fits some mode.
        agree (n,): every region, taken alone, votes for the same time of day. majority (n,): the
        share of the regions' area whose vote is the most frequent one.
        """
        means = self.means(images)
        stuff = (means[:, None, self.rest] - self.stuff).abs()     # (n, 27, R, 3)
        paint = (means[:, None, self.own, None] - self.paint).abs()           # (n, 27, V, 4, 3)
        cost, colour = paint.sum(4).min(3)                         # (n, 27, V)
        air = (stuff.sum((2, 3)) + cost.sum(2)).argmin(1)
        rows = torch.arange(len(means))
        colour = colour[rows, air]                                 # (n, V)
        worst = stuff[rows, air].amax((1, 2))
        for v in range(len(self.own)):
            worst = torch.maximum(worst, paint[rows, air, v, colour[:, v]].amax(1))
        alone = torch.cat([stuff.amax(3), paint.amax(4).amin(3)], 2)          # (n, 27, R + V)
        votes = self.time[torch.cat([stuff.sum(3), cost], 2).argmin(1)]       # (n, R + V)
        area = self.area[self.rest + self.own] / self.area[self.rest + self.own].sum()
        most = (F.one_hot(votes, len(common.TIMES)) * area[:, None]).sum(1)   # (n, times)
        return {"mode": torch.cat([air[:, None], colour], 1), "valid": (worst < self.tau).float(),
                "fits": (alone.amin(1) < self.tau).float(),
                "agree": (votes == votes[:, :1]).all(1).float(), "majority": most.amax(1)}

    def times(self, modes: Tensor) -> list[str]:
        """The times of day of modes as `read` gives them."""
        return [self.airs[a][0] for a in modes[:, 0]]

    def sample(self, n: int, seed: int) -> Tensor:
        """The true sampler: n photos (n, 3, H, W) in [-1, 1] of this layout."""
        rng = np.random.default_rng([seed, 7])
        photos = [common.render(self.layout, common.draw_style(self.layout, rng))
                  for _ in range(n)]
        photos = np.stack([photo + common.STREET_GRAIN * rng.standard_normal(photo.shape)
                           for photo in photos])
        return torch.from_numpy(photos).float().clamp(0, 1).permute(0, 3, 1, 2) * 2 - 1

    def measure(self, seen: dict[str, Tensor]) -> dict[str, float]:
        """The exact measures of what `read` saw in n samples; see MEASURES. TV is NaN where none is
        valid."""
        n, p = len(seen["mode"]), self.p.flatten()
        strides = torch.tensor([math.prod(self.p.shape[i + 1:]) for i in range(self.p.ndim)])
        valid = (seen["mode"] * strides).sum(1)[seen["valid"] > 0]
        hit = torch.zeros(len(p), dtype=torch.bool)
        hit[valid] = True
        share = torch.bincount(valid, minlength=len(p)) / max(len(valid), 1)
        times = torch.bincount(self.time[seen["mode"][:, 0]], minlength=3) / n
        law = torch.tensor(list(common.TIMES.values()))
        rare = p < 0.05
        return {"joint precision": seen["valid"].mean().item(),
                "class validity": seen["fits"].mean().item(),
                "T-agreement": seen["agree"].mean().item(),
                "T-majority": seen["majority"].mean().item(),
                "recall": hit.double().mean().item(), "mass recall": p[hit].sum().item(),
                "rare recall": hit[rare].double().mean().item(),
                "TV": (share - p).abs().sum().item() / 2 if len(valid) else math.nan,
                "time TV": (times - law).abs().sum().item() / 2,
                "ideal recall": (1 - (1 - p) ** n).mean().item()}


MEASURES = {  # what no real dataset allows; the row of the true sampler says what can be reached
    "joint precision": "share of samples with all regions within tau of one mode",
    "class validity": "share of regions that alone fit some mode",
    "T-agreement": "share of samples whose regions all vote for one time of day",
    "T-majority": "share of a sample's area that votes for its most voted time of day",
    "recall": "share of modes that a valid sample hits", "mass recall": "their probability",
    "rare recall": "recall of modes below 5 %",
    "TV": "total variation of the valid samples' modes from the truth",
    "time TV": "the same of the times of day of all samples' nearest modes",
    "ideal recall": "recall that n draws from the truth have on average"}


def street_of(pair: dict, cfg: Config) -> Street | None:
    """The oracle of an example, if it is a built-in street as drawn."""
    name = pair["name"]
    if cfg.data or cfg.classes != "streets" or not name.startswith("street_"):
        return None
    street = Street(int(name.removeprefix("street_")), tuple(pair["layout"].shape[1:]))
    same = np.array_equal(street.layout.label, pair["label"][0].cpu().numpy())
    return street if same else None


def switches(modes: Tensor) -> int:
    """How often the mode changes along a path (n, ...)."""
    return int((modes[1:] != modes[:-1]).any(1).sum())


def agreement(times: list[list]) -> float:
    """P[two layouts show the same time of day for one noise]: times[layout][noise]."""
    pairs = [a == b for i, x in enumerate(times) for y in times[:i] for a, b in zip(x, y)]
    return sum(pairs) / max(len(pairs), 1)


def folder_images(folder: Path, name: str, size: tuple[int, int]) -> Tensor:
    """Another model's images of a layout, NAME.png or NAME_1.png, NAME_2.png, ...: (n, 3, H, W)."""
    numbered = [p for p in folder.glob(f"{name}_*") if p.stem[len(name) + 1:].isdecimal()]
    paths = sorted(numbered, key=lambda p: int(p.stem[len(name) + 1:])) or sorted(
        folder.glob(f"{name}.*"))
    if not paths:
        raise UserError(f"--images {folder}: no image of {name}, as {name}.png or {name}_1.png")
    images = [common.read_image(path).float() / 127.5 - 1 for path in paths]
    for path, image in zip(paths, images):
        if tuple(image.shape[1:]) != tuple(size):
            raise UserError(f"{path}: {tuple(image.shape[1:])} pixels, but the layout has "
                            f"{tuple(size)}; say --size H W")
    return torch.stack(images)


@torch.no_grad()
def evaluate(cfg: Config, state: State | None, folder: str = "") -> dict:
    """Table 1 step by step and best-of-n l1; on the streets the exact measures, too.

    Table 1: many samples per layout, 9 clusters, one of each, the variance per class; ten times.
    A CRN's outputs, and another model's images in `folder`, are taken as they are: the first nine.
    """
    test_set, names, out = dataset(cfg, "test"), class_names(cfg), Path(cfg.out or ".")
    device = state.weights.device if state else torch.device("cpu")
    table, l1, exact, times = {}, {}, {}, {}
    for i in tqdm(range(len(test_set)), desc="evaluate", unit="layout", disable=None):
        pair = pair_of(test_set[i], cfg, device)
        size, layout = tuple(pair["layout"].shape[1:]), pair["layout"][0].cpu()
        made = folder_images(Path(folder), pair["name"], size) if folder else draw(
            state, pair, cfg, cfg.outputs if cfg.model == "crn" else cfg.eval_samples).cpu()
        unit = (made + 1) / 2
        picks = [torch.arange(min(9, len(made)))]
        rows = {"first nine": picks}
        if not folder and cfg.model == "imle" and len(made) > 9:
            rows["one of each cluster"] = spread_nine(unit)
        street = street_of(pair, cfg)
        if street:
            truth = street.sample(len(made), i)
            rows |= {"true sampler, nine": picks}
        for row, chosen in rows.items():
            source = (truth + 1) / 2 if row.startswith("true") else unit
            v = torch.stack([diversity(source[nine], layout, len(names)) for nine in chosen])
            table.setdefault(row, []).append(v)
        table.setdefault("area", []).append(torch.bincount(layout.flatten(), minlength=len(names)))
        sizes = sorted({min(9, len(made)), len(made)})
        for n in sizes if "image" in pair else ():
            photo = (pair["image"].cpu() + 1) / 2
            l1.setdefault(f"this run, n={n}", []).append(best_of(unit[:n], photo)[1])
            if street:
                l1.setdefault(f"true sampler, n={n}", []).append(
                    best_of((truth[:n] + 1) / 2, photo)[1])
        if street:
            for n in sizes:
                for row, images in (("this run", made[:n]), ("true sampler", truth[:n])):
                    seen = street.read(images)
                    exact.setdefault(f"{row}, n={n}", []).append(
                        street.measure(seen) | {"tau": street.tau})
                    times.setdefault(f"{row}, n={n}", []).append(street.times(seen["mode"]))
    metrics = {"layouts": len(test_set), "Table 1": summarise(table, names),
               "best-of-n l1": {row: sum(v) / len(v) for row, v in l1.items()}}
    if exact:
        metrics["exact"] = {row: {k: float(np.nanmean([one[k] for one in some])) if any(
            math.isfinite(one[k]) for one in some) else math.nan for k in some[0]}
            | {"style agreement": agreement(times[row])} for row, some in exact.items()}
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
                                "deviation": overall.std(correction=0).item()}
    return rows


def report(metrics: dict, cfg: Config) -> None:
    """The metrics as text beside the paper's. Its data are others: compare orderings."""
    rows = metrics["Table 1"]
    print(f"\n{metrics['layouts']} layouts. Table 1: variance over nine images, times 100, images "
          "on [0, 1]\n" + f"{'':16}" + "".join(f"{row[:19]:>21}" for row in rows)
          + f"{'paper: IMLE':>14}{'CRN':>8}")
    for name in [*next(iter(rows.values()))]:
        cells = []
        for row in rows.values():
            cell = row[name]
            zero = f" ({100 * cell['absent as 0']:.3f})" if "absent as 0" in cell else ""
            cells.append(f"{100 * cell['variance']:.3f}{zero}")
        paper = "".join(f"{v:{n}.4g}" for v, n in zip(TABLE_1.get(name, ()), (14, 8)))
        print(f"{name:16}" + "".join(f"{cell:>21}" for cell in cells) + paper)
    print("in brackets: layouts without the class count as 0")
    if "true sampler, nine" in rows:
        base = rows["true sampler, nine"]["overall"]["variance"]
        print("variance ratio (1 is right, more is wrong): " + ", ".join(
            f"{row} {cell['overall']['variance'] / base:.3f}" for row, cell in rows.items()))
    print("\nbest-of-n l1 on [0, 1] to the photo" + " (a perfect hit has "
          f"{common.STREET_GRAIN * math.sqrt(2 / math.pi):.4f})" * ("exact" in metrics))
    for row, value in metrics["best-of-n l1"].items():
        print(f"  {row:24}{value:.4f}")
    if "exact" in metrics:
        print("\nexact, on the streets: " + f"{'':9}" + "".join(
            f"{row:>22}" for row in metrics["exact"]))
        for name in [*MEASURES, "style agreement", "tau"]:
            print(f"  {name:30}" + "".join(f"{cell[name]:22.3f}"
                                           for cell in metrics["exact"].values()))
        for name, meaning in MEASURES.items():
            print(f"    {name}: {meaning}")
    print("Table 2, people asked which image shows more artifacts: "
          + ", ".join(f"{name} {a} +- {b}" for name, (a, b) in TABLE_2.items()))


def hue_histogram(images: Tensor, bins: int = 36) -> Tensor:
    """Fig. 1: counts (bins,) of the hues of (..., 3, H, W) in [-1, 1]. Grey has no hue: pixels with
    a saturation below 0.05 are left out; the paper does not say."""
    r, g, b = ((images + 1) / 2).clamp(0, 1).movedim(-3, 0).flatten(1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    span = (high - low).clamp(min=1e-12)
    hue = torch.where(high == r, (g - b) / span % 6,
                      torch.where(high == g, (b - r) / span + 2, (r - g) / span + 4)) / 6
    return torch.histc(hue[span > 0.05 * high], bins, 0, 1)


def plot_hues(train_set: common.Dataset, path: Path, n: int = 400) -> Tensor:
    """Fig. 1 for the first n photos: the share of each hue."""
    counts = sum(hue_histogram(train_set[i]["image"]) for i in range(min(n, len(train_set))))
    share = counts / counts.sum().clamp(min=1)
    figure = matplotlib.figure.Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    wheel = matplotlib.colormaps["hsv"]
    axes.bar(range(len(share)), share.tolist(),
             color=[wheel(k / len(share)) for k in range(len(share))])
    axes.set(xlabel=f"hue, {len(share)} bins from red to red", ylabel="share of coloured pixels")
    figure.savefig(path, dpi=110)
    return share


def rebalance_report(train_set: common.Dataset, cfg: Config, device: torch.device) -> None:
    """What rarity would do to this dataset (Sec. 3.4): scores per class, and who gets into S."""
    colours, areas = survey(train_set, cfg, device)
    rarity, names = rarity_scores(colours), class_names(cfg)
    top = largest_classes(rarity, areas)
    print(f"{'class':16}{'images':>8}{'R max / median':>16}   the mask on average")
    scale = rarity / rarity.amax(1, keepdim=True).clamp(min=1e-300)
    for p, name in enumerate(names):
        some = rarity[:, p] > 0
        if some.any():
            ratio = rarity[some, p].max() / rarity[some, p].median()
            print(f"{name:16}{int(some.sum()):8}{ratio:16.1f}{scale[some, p].mean():12.3f}"
                  + "   one of the five largest" * (p in top))
    draws = torch.cat([populate(rarity, areas, replace(cfg, rebalance="bins", pool=4000), e)
                       for e in range(5)])
    counts = torch.bincount(draws, minlength=len(rarity)).sort(descending=True).values
    rarest = max(1, len(rarity) // 100)
    print(f"S by rarity: 1 % of the images take {100 * counts[:rarest].sum() / len(draws):.0f} % "
          "of the draws")
    if not cfg.data:
        styles = []
        for index in train_set.files:           # as common.street draws them
            layout = common.paint(common.street_scene(0, index), (32, 32))
            styles.append(common.draw_style(layout, np.random.default_rng([0, index, 1])))
        for factor, law in (("time", common.TIMES), ("weather", common.WEATHERS)):
            for row, index in (("in the set", range(len(styles))), ("in S", draws.tolist())):
                share = [np.mean([getattr(styles[k], factor) == name for k in index])
                         for name in law]
                print(f"{factor} {row}: " + ", ".join(
                    f"{name} {s:.2f}" for name, s in zip(law, share)))


# --------------------------------------------------------------------------- 7 Command line

def trace(cfg: Config) -> None:
    """One forward and one training step: stage, shape, parameters; FLOPs, memory; what the search
    costs beside the updates."""
    device = pick_device(cfg)
    cfg, train_set, _ = open_data(replace(cfg, compile=False))
    state = build(cfg, device)
    items = [train_set[i] for i in range(len(train_set))[:cfg.batch_size]]
    batch = make_pair({k: v.to(device) if torch.is_tensor(v) else v
                       for k, v in default_collate(items).items()}, cfg)
    print(f"{device}; layout {tuple(batch['input'].shape)}, image {tuple(batch['image'].shape)}")
    net = state.generator
    print(f"\n{'generator':34}{'output':>22}{'parameters':>14}")
    hooks = [module.register_forward_hook(
        lambda module, _, y, name=name: print(f"  {name:32}{str(tuple(y.shape)):>22}"
            f"{sum(p.numel() for p in module.parameters()):14,}"))
        for name, module in net.named_modules()
        if isinstance(module, (RefinementModule, NoiseEncoder)) or name == "head"]
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        made = net(batch["input"], batch.get("noise"))
    for hook in hooks:
        hook.remove()
    print(f"  {'in all':54}{sum(p.numel() for p in net.parameters()):14,}   "
          f"{forward.get_total_flops() / 1e9:.2f} GFLOP forward")
    with torch.no_grad(), FlopCounterMode(display=False) as judge:
        features(state.vgg, made.flatten(0, 1))
    with FlopCounterMode(display=False) as flops:
        train_step(state, batch, cfg)
    clock = time.time()
    losses = ", ".join(f"{k} {v.item():.4f}" for k, v in train_step(state, batch, cfg).items())
    per_step = flops.get_total_flops() / 1e9
    print(f"\none training step: {per_step:.1f} GFLOP, {time.time() - clock:.3f} s, "
          f"{peak_memory(device):.2f} GiB at most; {losses}")
    if cfg.model == "imle":
        g, v = (count.get_total_flops() / 1e9 / cfg.batch_size for count in (forward, judge))
        hunt, descent = cfg.pool * (cfg.candidates * (g + v) + v), cfg.inner_steps * per_step
        print(f"one outer iteration: search {hunt:.0f} GFLOP, {cfg.inner_steps} updates "
              f"{descent:.0f} GFLOP; the search is {100 * hunt / (hunt + descent):.1f} %")


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


class Edit(argparse.Action):
    """Collects --set and --paint in one list, in the order of the command line."""

    def __call__(self, parser, namespace, values, option_string=None):
        edits = getattr(namespace, "edits", [])
        namespace.edits = [*edits, (option_string.removeprefix("--"), values)]


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
        choices=("train", "sample", "interpolate", "transfer", "edit", "video", "evaluate", "check",
                 "trace"))
    add("--data", metavar="DIR", help="a dataset in any known layout (the built-in streets)")
    add("--preset", choices=PRESETS, help="a column of the releases (toy with the streets)")
    add("--classes", metavar="N|NAME", help="a number, or a table of common.py (the data's)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels (256 512)")
    add("--limit", type=int, metavar="N", help="use the first N examples (0: all)")
    add("--model", choices=CHOICES["model"], help="with noise, or the baseline (imle)")
    add("--outputs", type=int, metavar="N", help="crn: images per layout, k (9)")
    add("--diversity", choices=CHOICES["diversity"], help="crn: who is best of k (per-class)")
    add("--width", type=int, metavar="N", help="channels of the coarse modules (1024)")
    add("--modules", type=int, metavar="N", help="resolutions (0: down to 4 rows)")
    add("--noise-channels", type=int, metavar="N", help="d (10)")
    add("--noise", choices=CHOICES["noise"], help="per pixel, or one vector for all (spatial)")
    add("--encoder-width", type=int, metavar="N", help="of the noise encoder; 0: none (100)")
    add("--layers", nargs="+", metavar="NAME", help="VGG-19's in Eq. (1) (the paper's five)")
    add("--pixel-weight", type=float, metavar="X", help="of the pixel term; 0: Eq. (1) (1.0)")
    add("--calibrate", type=int, metavar="N", help="passes after which lambda is set (1)")
    add("--rebalance", choices=CHOICES["rebalance"], help="masks, bins of S; Sec. 3.4 (both)")
    add("--epochs", type=int, metavar="N", help="outer iterations, or passes of crn (16)")
    add("--pool", type=int, metavar="N", help="|S|, images of an outer iteration (400)")
    add("--candidates", type=int, metavar="N", help="m, samples per image of S (10)")
    add("--inner-steps", type=int, metavar="N", help="K, updates; 0: a pass, of crn (10000)")
    add("--batch-size", type=int, metavar="N", help="images per step and process (1)")
    add("--steps", type=int, metavar="N", help="end after so many updates (0: epochs decide)")
    add("--lr", type=float, metavar="X", help="Adam's learning rate (1e-05)")
    add("--lr-drop", type=int, metavar="N", help="from this epoch on a tenth of it (0: never)")
    add("--renew-encoder", action="store_true", help="at --lr-drop the noise encoder starts anew")
    add("--noise-gain", type=float, metavar="X", help="warm start: new weights over CRN's RMS (5)")
    add("--search-batch", type=int, metavar="N", help="candidates rendered at once (5)")
    add("--keep-features", type=int, metavar="N", help="photos whose features stay in memory (0)")
    add("--seed", type=int, metavar="N", help="of initialisation, order and noise (0)")
    add("--init", metavar="FILE", help="start from these weights; imle from a crn's, too (none)")
    add("--resume", action="store_true", help="continue the run in --out, or the newest, exactly")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints (0: an epoch)")
    add("--checkpoint", metavar="FILE", help="to test with (the newest run's)")
    add("--input", metavar="PATH", help="layouts: a file or a folder, any size (the test split)")
    add("--output", metavar="PATH", help="a file or a folder (in the run's folder)")
    add("--samples", type=int, metavar="N", help="sample: per layout (9); transfer, edit: noises "
        "(3)")
    add("--item", metavar="NAME", help="interpolate, edit: a test example (the first)")
    add("--ends", type=int, nargs=2, metavar="SEED", help="interpolate: (darkest and brightest)")
    add("--frames", type=int, metavar="N", help="interpolate (8), video of a street (17)")
    for name, form in EDIT_FORMS.items():
        add(f"--{name}", dest="edits", action=Edit, metavar=form,
            help={"set": "edit: turn a class into another",
                  "paint": "edit: fill a rectangle with a class"}[name])
    add("--images", metavar="DIR", help="evaluate: another model's NAME.png or NAME_1.png, ...")
    add("--eval-samples", type=int, metavar="N", help="evaluate: images per layout (100)")
    add("--vgg", metavar="WEIGHTS", help="VGG-19: imagenet, random or a file (imagenet)")
    add("--gpu", type=int, metavar="N", help="CUDA device, -1 the CPU (the first GPU if any)")
    add("--workers", type=int, metavar="N", help="processes that load data (4 with a GPU, else 0)")
    add("--precision", choices=CHOICES["precision"], help="bf16: autocast the networks (fp32)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--channels-last", action=argparse.BooleanOptionalAction, help="memory order (with a GPU)")
    add("--out", metavar="DIR", help="the run's folder (the next free runs/crn_imle-N)")
    return p


EXAMPLES = """examples:
  python crn_imle.py                                    train on the built-in streets
  python crn_imle.py sample --samples 9                 nine images of each test layout
  python crn_imle.py edit --set car=road                the first layout without its cars"""
# Flags of the one call, by the modes that read them; all others are fields of Config.
TEST_MODES = ("sample", "interpolate", "transfer", "edit", "video", "evaluate")
CALL = {"preset": ("train", "check", "trace"), "resume": ("train",),
        "checkpoint": TEST_MODES, "input": TEST_MODES[:-1], "output": TEST_MODES[:-1],
        "samples": ("sample", "transfer", "edit"), "item": ("interpolate", "edit"),
        "ends": ("interpolate",), "frames": ("interpolate", "video"), "edits": ("edit",),
        "images": ("evaluate",)}
# What may differ from the checkpoint when a run goes on, and when it is tested.
FREE = {"data", "epochs", "steps", "save_every", "search_batch", "keep_features", "gpu", "workers",
        "precision", "compile", "channels_last", "out"}
FREE_AT_TEST = FREE | {"size", "limit", "seed", "vgg", "eval_samples"}


def load_for_test(given: dict, call: dict) -> tuple[Config, State]:
    """Network and config of --checkpoint or the newest run. VGG is not needed: a random one."""
    path = Path(call["checkpoint"]) if "checkpoint" in call else (
        Path(given["out"]) if "out" in given else newest_run()) / "checkpoint.pt"
    stored = read_checkpoint(path)
    if "released" in stored:
        raise UserError(f"{path}: bare weights; give a checkpoint of {NAME}.py")
    cfg = stored_config(stored, path, given, FREE_AT_TEST)
    cfg = replace(cfg, init="", out=given.get("out", str(path.parent)))
    check_config(cfg)
    state = build(replace(cfg, compile=False, vgg="random"), pick_device(cfg))
    load_networks(state, path)
    return cfg, state


def find_item(cfg: Config, call: dict, size: tuple[int, int] | None) -> dict:
    """The layout of --input, or of --item in the test split."""
    if "input" in call:
        return items_of(cfg, call["input"], size)[0]
    test_set = dataset(cfg, "test")
    name = call.get("item", test_set.names[0])
    if name not in test_set.names:
        raise UserError(f"--item {name}: not in the test split, which has "
                        + ", ".join(test_set.names[:5]) + ", ...")
    return test_set[test_set.names.index(name)]


def run_test_mode(mode: str, given: dict, call: dict) -> None:
    """sample and what the paper does at test time; evaluate."""
    if "images" in call:                        # no network: data and size are as the flags say
        cfg = replace(Config(), **{"size": PRESETS["toy"]["size"]} | given)
        cfg = replace(cfg, classes=dataset(cfg, "test").classes)
        evaluate(cfg, None, call["images"])
        return
    cfg, state = load_for_test(given, call)
    source, output, size = call.get("input", ""), call.get("output", ""), given.get("size")
    for name, low in (("samples", 1), ("frames", 2)):
        if call.get(name, low) < low:
            raise UserError(f"--{name} {call[name]}: must be {low} or more")
    if mode == "evaluate":
        evaluate(cfg, state)
    elif mode == "sample":
        default = min(9, cfg.outputs) if cfg.model == "crn" else 9
        sample(cfg, state, source, output, call.get("samples", default), size)
    elif mode == "transfer":
        items = items_of(cfg, source, size)
        n = min(5, len(items))
        pairs = [pair_of(items[i * len(items) // n], cfg, state.weights.device) for i in range(n)]
        transfer(cfg, state, pairs, call.get("samples", 3), output)
    elif mode == "video":
        items = items_of(cfg, source, size) if source else moving_car(cfg, call.get("frames", 17))
        video(cfg, state, items, output)
    elif mode == "edit":
        columns = call.get("samples", min(3, cfg.outputs) if cfg.model == "crn" else 3)
        edit(cfg, state, find_item(cfg, call, size), call.get("edits", ()), columns, output)
    else:
        pair = pair_of(find_item(cfg, call, size), cfg, state.weights.device)
        interpolate(cfg, state, pair, call.get("ends", ()), call.get("frames", 8), output)


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
            what += f" {call[name]}" if name == "preset" else ""
            raise UserError(f"{what} goes with {' or '.join(CALL[name])}, not with {mode}")
    for name, other in (("item", "input"), ("images", "checkpoint")):
        if name in call and other in call:
            raise UserError(f"--{name} with --{other}: only one of them can choose")
    resume = call.get("resume", False)
    if resume and "preset" in call:
        raise UserError(f"--preset {call['preset']} with --resume: the run knows its settings")
    if mode in TEST_MODES:
        run_test_mode(mode, given, call)
        return
    if resume:
        path = (Path(given["out"]) if "out" in given else newest_run()) / "checkpoint.pt"
        cfg = stored_config(read_checkpoint(path), path, given, FREE)
        cfg = replace(cfg, out=str(path.parent), init="")
    else:
        preset = call.get("preset", "" if given.get("data") else "toy")
        cfg = replace(Config(), **PRESETS.get(preset, {}) | given)
    check_config(cfg)
    if mode == "check":
        splits = [dataset(cfg, split) for split in ("train", "test")]
        out = Path(cfg.out) if cfg.out else next_run("check")
        bad = common.check_data(splits, out)
        if bad:
            raise UserError(f"--data {cfg.data}: {bad} bad file(s), listed above")
        if {"label", "image"} <= splits[0].roles:
            cfg = replace(cfg, classes=splits[0].classes)
            rebalance_report(splits[0], cfg, torch.device("cpu"))
            plot_hues(splits[0], out / "hues.png")
            print(f"histogram of hues: {out / 'hues.png'}")
    elif mode == "trace":
        trace(cfg)
    else:
        if cfg.vgg == "random":
            notice("VGG-19 has random weights: it sees edges and textures, but knows no objects")
        if cfg.model == "imle" and not (cfg.init or resume) and cfg.lr < 5e-5:
            notice(f"--lr {cfg.lr} is for --init with a trained crn (--model crn); from scratch, "
                   "preset imle-released starts at 1e-4")
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
