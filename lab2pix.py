"""Lab2Pix: photos from label maps, with pairs (V2) and without any (V1).

J. Zhu, L. Gao, J. Song, Y.-F. Li, F. Zheng, X. Li, H. T. Shen. Label-Guided Generative Adversarial
Network for Realistic Image Synthesis. TPAMI 2022. Section, equation and table numbers are its own.

Idea. A label map says little, so G must get all there is out of it: residual blocks whose
normalisation is steered by each pixel's class and by a global feature of the whole map (DG-Norm),
and attention that keeps what coarser layers have done well (LSCA). A strong judge pulls the images
towards photos: discriminators at two or three sizes, the largest judging at three depths, all with
VGG-16 beside them (hierarchical, perceptual), more strictly on foreground objects, and told that
blurred photos are fakes. With pairs (V2) D also sees the label. Without (V1) a segmentation
network, trained together with G, must find the label again in the generated image: that alone ties
image and label.

Symbols     M batch["input"], labels or sketch    Y batch["image"]    X = G(z, M)    z noise
            X_3 full size, X_2 half, X_1 a quarter (lists run from X_3 on)    Y^f blurred photos
            D_i^l level l of discriminator i    W foreground mask    H global feature    S_i ICNet

Paper map
    Eq. (1)     generative residual block          GenResBlk
    Eq. (2)     global encoder                     GlobalEncoder
    Eq. (3-4)   batch norm                         DGNorm
    Eq. (5)     DG-Norm                            DGNorm; as printed: train --eq5
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
    Table 1     ablation of V1, A_u to H_u         evaluate, after train --ablation A_u
    Table 2     ablation of V2, A_s to E_s         evaluate, after train --ablation A_s
    Table 3     unpaired, Cityscapes and Facades   evaluate, psnr, ssim, after train --version V1
    Table 4     sketches: FID, memory, time        evaluate, after train --version V1 --task sketch
    Table 5     paired, three data sets            evaluate, frechet_distance
    Table 6     user study                         needs people; sample makes its images
    Fig. 1      samples of V1 and V2               sample
    Fig. 2      the framework                      step_v1, step_v2
    Fig. 3      adaptive label encoder             GeneratorV1, SketchEncoder
    Fig. 4      DG-Norm                            DGNorm
    Fig. 5      co-attention map A_m               LSCA
    Fig. 6      hierarchical discriminator         PerceptualDiscriminator, MiniInception
    Fig. 7      V1                                 step_v1
    Fig. 8      V2                                 step_v2
    Fig. 9      rows of Table 1 side by side       sample, after train --ablation A_u
    Fig. 10     rows of Table 2 side by side       sample, after train --ablation A_s
    Fig. 11-12  V1, labels and sketches            sample, after train --version V1
    Fig. 13     V2 beside other methods            sample
    Fig. 14     V2-H beside V2                     sample, after train --preset V2-H-cityscapes
    Fig. 15-16  V2 beside other methods            sample
    Fig. 17     failures: rare things              sample
    Fig. 18-21  random samples of V2               sample

Paper                             | Released code                     | Here
    Eq. (4): sum E^2 - mu         | batch norm                        | Misprint: mu squared
    Eq. (5): gamma (BN + 1) + beta| V2 (1 + gamma) BN + beta,         | V2's, which starts at BN;
                                  |   V1 gamma IN + beta              |   --eq5
    BN has gamma and beta         | none                              | both; 1 and 0 for released
                                  |                                   |   files, which have none
    BN at test time: not said     | V1 instance norm; V2 averages     | V1 the image's own; V2
                                  |   of training                     |   averages; --test-norm
    V1's blocks as V2's (Sec. 4.1)| instance norm, ReLU, no spectral  | V2's block, with spectral
                                  |   norm, no identity shortcut      |   norm; --released
    Eq. (2): H is one result      | a convolution for each size       | as released
                                  |   after the enlarging             |
    Eq. (6): the block sees H     | V2: all but the shortcut's norm   | as released
    V2 takes z                    | V2: the small label map instead   | z; --first label
    z and sketch concatenated     | V1: z computed, then unused       | concatenated; --released
    labels are resized            | V1: max-pooled ids; sketches      | G: nearest, --released;
                                  |   averaged                        |   sketches averaged
    Eq. (22): D sees (X_i, M)     | V2: M averaged 3 x 3 like X_i     | as released
    A_m from features and label   | V1: from normalised convolutions  | paper; --released
    two encoder blocks in V2      | three, as SPADE                   | three; A_s is SPADE
    Eq. (23): three D in V2,      | two, three in V2-H                | two, three in V2-H
      Sec. 5.2: two               |                                   |
    Eq. (10): G and D share L^R   | hinge: G minimises -D             | as released
    (12-13): sum over D_i         | V2: a mean, with weights 1/3, 1/2 | sum, weights 1 as printed
    W of its own sample           | V1, V2: the batch's mean, by      | its own
                                  |   accident                        |
    Y^f: halved and doubled       | V2: the full image alone          | every Y_i, average pool
    norms ||.||_1 in (28), (29)   | means                             | means
    Eq. (18): a norm ||.||_2      | V1: mean square, VGG-19           | the norm itself, per image
    Eq. (19): size not said       | S_i squeezes X_i to 256 x 256,    | the same; smaller images
                                  |   its output grows to the label   |   to squares of their width
    ICNet                         | conv4_4 lacks its skip            | all blocks have theirs
    a sketch has two classes      | V1: regression to the sketch      | two classes
    four losses in V1             | a fifth, VGG-19 to a random photo | four
    VGG-16 as trained on ImageNet | V1: overwritten by random numbers | as trained
    VGG's input not stated        | raw [-1, 1] in VGG-19 and in V1;  | normalised; --released
                                  |   V2's VGG-16 normalised          |
    Eq. (28): sum over scales;    | full size alone; sum over layers, | paper; --released
      (29): mean over layers      |   mean over D_i                   |
    Eq. (29): layers of D_i       | the main branch's; neither        | as released
                                  |   verdicts nor VGG                |
    Eq. (28): weights 1/32 .. 1   | the same                          | the same; reversed if the
                                  |                                   |   VGG is random, ours
    lr 2e-4 for all               | V2: G 1e-4, D 4e-4                | paper; --released
    net_1 and net_2 in turn       | V1: both after one pass; V2: G,   | as released
                                  |   then D against the new G        |
    lambda_2 rises from 0 to 1    | V1: off unless asked, and then in | rises, and ends at 1;
                                  |   n epochs up to (n - 1) / n      |   --released: 1
    norms of D not stated         | V1 instance norm; V2 with         | as released; --d-norm
                                  |   spectral norm besides           |
    spectral norm not mentioned   | 3 power iterations a step in V2,  | 3 in V2: its parts of one
                                  |   2 in SPADE                      |   step judge with one norm;
                                  |                                   |   half an iteration from
                                  |                                   |   theirs, as PyTorch's today
    V2's input: the label         | and the instances' edges          | with them; --no-edges
    a sketch's encoder not shown  | V1: five 3 x 3 after a 5 x 5      | as released
    initialisation not stated     | V1 N(0, 0.02), but linear layers  | V1 N(0, 0.02), V2 Xavier,
                                  |   and biases as PyTorch's, BN's   |   in all layers; biases 0,
                                  |   gain N(1, 0.02); V2 Xavier,     |   gains 1; --gain
                                  |   skips layers with spectral norm |
    images resized by nearest     | V1 nearest, V2 bicubic photos     | labels nearest, photos
      neighbour (Sec. 5.1)        |                                   |   bicubic and antialiased
    which photo meets which label | V1: any, drawn with replacement   | any, but never its own
    foreground not listed         | Cityscapes, in V1 three more ids; | as released, ids shifted
                                  |   ADE20K, COCO by ids off by one  |   to where they belong
    baseline's D not described    | SPADE's D in V2                   | SPADE's, in Eq. (10-16)
    z at test time                | V1: the mean of ten draws         | N(0, I); --released
    pictures of 8 bits            | cut off                           | rounded
    FCN, DRN-D-105, DeepLab score | not released                      | FCN-8s, on your photos
    FID                           | not released                      | the same distance, of VGG's
                                  |                                   |   features
    released weights              | G, D, S of V1, G of SPADE         | G alone: it is what paints

Run         python lab2pix.py                               built-in streets, minutes on a laptop
            python lab2pix.py --version V1                  the same, without a single pair
            python lab2pix.py --data ./cityscapes --gpu 0   the last line of Table 2
            python lab2pix.py sample --samples 3            three outputs for each test layout
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
from collections.abc import Callable
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
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._pytree import tree_map
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from common import (
    COUNT, POSITIVE, UserError, Within, check_settings, check_sides, class_table, colour_label,
    draw_seed, find_preset, flag, notice, save_images, setting)

NAME = "lab2pix"
NETWORKS = ("generator", "discriminator", "segmenter")       # in State; the first is for testing
MODES = ("train", "sample", "evaluate", "check", "trace")
TRAIN, SAMPLE, BEFORE = ("train",), ("sample",), ("train", "check", "trace")    # who knows a flag

# ---------------------------------------------------------------------------------- 1 Config

# Settings that one version knows, and what they are in the other.
V1_ALONE = {"pg": False, "lambda_3": 0, "lambda_4": 0}
V2_ALONE = {"edges": False, "first": "noise", "lambda_5": 0, "lambda_6": 0}


@dataclass
class Config:
    """Every setting is a flag. The defaults are the paper's for V2 on Cityscapes, Sec. 5.2.

    What the paper has no name for follows the released code, and says so; "ours" is in neither.
    """
    # The task. A map M goes in and a photo comes out. V2 learns from pairs of map and photo, V1
    # from maps and photos that have nothing to do with each other, V2-H is V2 for large images.
    # M is a label map, one channel per class, or in V1 a sketch of one channel. `released` is the
    # middle column of the table on top, wherever the right one names it. Released code flips half
    # of the photos, and for COCO and ADE20K also crops from 286/256 of the size (`augment`).
    data: str = setting("", "folder in a known layout; none: built-in streets", free="resume")
    version: str = setting("V2", "without pairs, with, at 512 x 1024; Sec. 4", ("V1", "V2", "V2-H"))
    ablation: str = setting("", "a row of Table 1 (A_u .. H_u) or of Table 2 (A_s .. E_s)")
    released: bool = setting(False, "what the authors' code does, where it is not the paper's")
    task: str = setting("labels", "made into photos; sketch: in V1", ("labels", "sketch"))
    direction: str = setting("AtoB", "which half of a pair is the sketch", ("AtoB", "BtoA"))
    classes: str = setting("", "a table of common.py, or a number; none: asks the data")
    edges: bool = setting(True, "V2: edges of the instances beside the labels; released code")
    size: tuple[int, int] = setting((256, 512), "height, width, Sec. 5.2", POSITIVE, free="test")
    augment: str = setting("mirror", "jitter: crop 286/256, too", ("none", "mirror", "jitter"))
    limit: int = setting(0, "use the first so many; 0: all (400 streets)", COUNT, free="test")
    # The networks. Every width is a multiple of `width`: 64 gives those of the paper, less gives
    # thin ones of the same form, S_i and a random VGG included. One block of G stands before or
    # after each doubling, so `ups` also says how small the first feature is: the image's sides by
    # 2^ups. dgnorm, pg, lsca and discriminator are the switches of the ablation tables. D_3 judges
    # the full image at three levels, D_2 half of it at two, D_1 a quarter at one.
    width: int = setting(64, "channels before the output; 16 times as many at first", POSITIVE)
    ups: int = setting(6, "doublings in G; 5 at 256 x 256, 7 in V2-H and V1", Within(4, 7))
    first: str = setting("noise", "first feature from z, or as in SPADE", ("noise", "label"))
    dgnorm: bool = setting(True, "global encoder and DG-Norm, Sec. 3.1.2; without: SPADE")
    eq5: bool = setting(False, "Eq. (5) as it is printed")
    short: bool = setting(False, "help for short runs, ours: bilinear doublings; V1: speak_up")
    pg: bool = setting(False, "V1: progressive generation, three outputs, Sec. 4.1.1")
    lsca: bool = setting(False, "V1: spatial co-attention, Sec. 3.1.3")
    discriminator: str = setting("hpd", "Sec. 3.2.1, or SPADE's", ("hpd", "patch"))
    d_norm: str = setting("both", "in D; instance: V1's", ("instance", "spectral", "both"))
    gain: float = setting(0.02, "of Xavier's initial weights, SPADE's; 0: N(0, 0.02), V1's", COUNT)
    # The objective, Eq. (20) for V1 and Eq. (31) for V2. The lambdas carry the paper's numbers, and
    # 0 takes a term out. Of V1's terms only lambda_4's knows of which label the image was made;
    # V2's lambda_5 and lambda_6 compare with the one photo that belongs to the label.
    gan: str = setting("hinge", "adversarial loss; vanilla in V1, Sec. 5.2", ("vanilla", "hinge"))
    T: float = setting(5.0, "weight of foreground to background, Sec. 5.2; 1: no mask", POSITIVE)
    lambda_2: float = setting(1.0, "weight of the sharpness loss, Eq. (16), (30); Sec. 5.2", COUNT)
    ramp: bool = setting(False, "lambda_2 rises from 0 over the run: V1, Sec. 5.2")
    lambda_3: float = setting(0.0, "weight of Eq. (18), consistency; 5e-6 in V1, Sec. 5.2", COUNT)
    lambda_4: float = setting(0.0, "weight of Eq. (19), segmentation; 10 in V1, Sec. 5.2", COUNT)
    lambda_5: float = setting(10.0, "weight of Eq. (28), perceptual loss, Sec. 5.2", COUNT)
    lambda_6: float = setting(10.0, "weight of Eq. (29), feature matching, Sec. 5.2", COUNT)
    # Training. Both players use Adam, one update each per batch.
    epochs: int = setting(200, "passes over the training set, Sec. 5.2", POSITIVE, free="resume")
    steps: int = setting(0, "end after so many updates; 0: epochs decide", COUNT, free="resume")
    batch_size: int = setting(20, "images per step and process, Sec. 5.2", POSITIVE)
    lr: float = setting(2e-4, "Adam's, all networks, Sec. 5.2", Within(1e-9, 0.9))
    seed: int = setting(0, "of initialisation, order, flips and z", common.SEED, free="test")
    init: tuple[str, ...] = setting((), "weights to begin with", modes=TRAIN, free="call")
    # Two VGGs give features, and nobody trains them: VGG-16 inside D and in Eq. (18), VGG-19 in Eq.
    # (28). "random" weights show the method, not its quality. At test time batch norm uses averages
    # of training, or the image's own statistics (test_time).
    vgg: str = setting("imagenet", "VGG-16, -19: imagenet, small, random, a file", free="test")
    test_norm: str = setting("running", "of batch norm at test", ("running", "image"), free="test")
    # The machine. None of these changes what is computed, but for the last bits.
    gpu: int | None = setting(None, "number; -1: the CPU; none: the first", Within(-1), free="call")
    workers: int | None = setting(None, "data processes; none: 4 with a GPU", COUNT, free="resume")
    precision: str = setting("fp32", "bf16: autocast", ("fp32", "bf16"), free="resume")
    compile: bool = setting(False, "torch.compile the networks", free="resume")
    channels_last: bool | None = setting(None, "memory order; none: with a GPU", free="resume")
    out: str = setting("", "the run's folder; none: the next runs/lab2pix-N", free="call")
    # One call. These say what to do now; a checkpoint's own do not matter later. --checkpoint and
    # --init read our files and the authors'.
    preset: str = setting("", "a line of Sec. 5.2; none: toy with the streets", modes=BEFORE)
    resume: bool = setting(False, "go on with --out, or the newest run", modes=TRAIN, free="call")
    checkpoint: tuple[str, ...] = setting((), "to test or resume; none: the newest", free="call")
    input: str = setting("", "a file or folder; none: the test split", modes=SAMPLE, free="call")
    instances: str = setting("", "instance maps of --input", modes=SAMPLE, free="call")
    output: str = setting("", "a file or folder; none: test/ in --out", modes=SAMPLE, free="call")
    samples: int = setting(1, "outputs per input, by z", POSITIVE, modes=SAMPLE, free="call")

    # No flags: as what the training data were understood, by common.Dataset; the size that f_z is
    # made for, that of training.
    understood: dict = field(default_factory=dict)
    z_size: tuple[int, int] | None = None

    def __post_init__(self):
        """Ranges first, then contradictions. Flags, presets and stored configs all pass here."""
        check_settings(self)
        v1 = self.version == "V1"
        for name, off in (V2_ALONE if v1 else V1_ALONE).items():
            if getattr(self, name) != off:
                raise UserError(f"{flag(name)}: not in --version {self.version}")
        if self.task == "sketch" and (not v1 or self.T != 1):
            raise UserError("--task sketch: for --version V1, with --T 1: no foreground")
        if (self.lsca or self.lambda_3) and not self.pg:
            raise UserError("--lsca and --lambda-3 join V1's three outputs: they need --pg")

    # What follows from the settings.
    @property
    def noise(self) -> int:
        """The length of z: 128 in the paper's networks, Sec. 4.1.1."""
        return max(32, 2 * self.width)

    @property
    def scales(self) -> int:
        """How many of D_3, D_2, D_1 there are, Sec. 5.2. Row A_u has SPADE's two, of X_3 alone."""
        return 3 if self.pg or self.version == "V2-H" else 2


# Sec. 5.2, what V1 and V2-H change against the defaults above, which are V2's. V1 trains on one
# image at a time with the original, vanilla GAN loss and a weaker mask (T = 2). Its lambda_3 is
# small because Eq. (18) is a norm, a root of a sum over all positions, which is large by itself.
# SKETCH is V1 for sketches: squares, no mask, lambda_2 = 1 from the start. AT_256 is V2 on
# COCO-Stuff and ADE20K.
VERSIONS = {
    "V1": dict(version="V1", edges=False, ups=7, gain=0.0, pg=True, lsca=True, d_norm="instance",
               gan="vanilla", T=2.0, ramp=True, lambda_3=5e-6, lambda_4=10.0, lambda_5=0.0,
               lambda_6=0.0, epochs=100, batch_size=1, test_norm="image"),
    "V2-H": dict(version="V2-H", size=(512, 1024), ups=7, batch_size=8)}
SKETCH = dict(size=(256, 256), ups=5, T=1.0, ramp=False, epochs=10, batch_size=4)
AT_256 = dict(size=(256, 256), ups=5, augment="jitter", batch_size=40, epochs=100)
PRESETS = {
    "V1-cityscapes": dict(version="V1"),
    "V1-facades": dict(version="V1", size=(256, 256)),
    "V1-edges2shoes": dict(version="V1", task="sketch"),
    "V1-edges2handbags": dict(version="V1", task="sketch"),
    "V2-cityscapes": dict(version="V2"),
    "V2-coco": dict(version="V2", **AT_256),
    "V2-ade20k": dict(version="V2", **AT_256),
    "V2-H-cityscapes": dict(version="V2-H"),
    # Ours, for the streets on a laptop's CPU: thin networks and larger steps, since Adam moves each
    # weight by about lr, and with few weights an output moves less far. Spectral norm alone lets D
    # see brightness and colour (`unit`); the mask is as gentle as V1's, the sharpness loss gentler,
    # since G overdoes it in rims; batches of two give averages that are too rough for testing. What
    # `nearest` doubles stays visible after so few steps, a grid of lines in the walls: so `short`.
    "toy": dict(size=(64, 128), limit=600, width=8, ups=4, first="label", d_norm="spectral",
                gain=1.0, short=True, T=2.0, lambda_2=0.3, ramp=True, test_norm="image",
                vgg="small", lr=5e-4, batch_size=2, epochs=8),
    # With so few steps V1 needs more help: also the hinge loss and a smaller lambda_4.
    # A lambda_4 of 1 or .3 gives crisper cars, but houses grow into the sky or get bright rims.
    "toy-V1": dict(version="V1", size=(64, 128), limit=400, width=8, ups=5, gain=1.0, short=True,
                   d_norm="spectral", gan="hinge", lambda_4=3.0, lr=4e-4, vgg="small", epochs=8),
}
# Ours, too: the same for half an hour, and for three quarters.
PRESETS["streets"] = PRESETS["toy"] | dict(limit=1200, epochs=12)
PRESETS["streets-V1"] = PRESETS["toy-V1"] | dict(batch_size=2, epochs=20)
# The rows of Tables 1 and 2, each with what it adds to the row above it. Both begin with SPADE and
# end with the full method. The paper does not say which D the rows before HPD have; it is SPADE's
# here: in V1 on the image alone, in A_u on X_3 and its half, in B_u to D_u one for each X_i; in V2
# on image and label, of two sizes. Optimiser and first feature are the same in all rows of a table.
ROWS = {
    "A_u": dict(version="V1", pg=False, lsca=False, lambda_3=0.0, discriminator="patch", T=1.0,
                lambda_2=0.0, dgnorm=False),                      # SPADE and cycle segmentation
    "B_u": dict(pg=True), "C_u": dict(lsca=True), "D_u": dict(lambda_3=5e-6),
    "E_u": dict(discriminator="hpd"), "F_u": dict(T=2.0), "G_u": dict(lambda_2=1.0),
    "H_u": dict(dgnorm=True),                                     # Lab2Pix-V1
    "A_s": dict(version="V2", discriminator="patch", T=1.0, lambda_2=0.0, dgnorm=False),   # SPADE
    "B_s": dict(discriminator="hpd"), "C_s": dict(T=5.0), "D_s": dict(lambda_2=1.0),
    "E_s": dict(dgnorm=True)}                                     # Lab2Pix-V2

ABLATIONS = {}
for row, added in ROWS.items():                 # the settings of B_u are those of A_u, and its own
    above = chr(ord(row[0]) - 1) + row[1:]
    ABLATIONS[row] = ABLATIONS.get(above, {}) | added


def configure(preset: str = "", given: dict | None = None, **more) -> Config:
    """The settings of a version, then a preset's, then a row's of an ablation table, then `given`.

    Whatever comes later goes before. The version is the one that any of them asks for. What else
    `released` changes stands in networks, frozen_vgg, step_v2, learning_rates and draw.

    configure("toy", ablation="A_u"), configure(version="V1"), configure("V2-coco", batch_size=8).
    """
    given = (given or {}) | more
    row = find_preset(ABLATIONS, "--ablation", given.get("ablation", ""))
    if preset in ("toy", "streets") and "V1" in (given.get("version"), row.get("version")):
        preset += "-V1"
    chosen = find_preset(PRESETS, "--preset", preset)
    own = chosen | row | given | {"preset": preset}
    version = own.get("version", "V2")
    for part in (chosen, row):
        if part.get("version", version) != version:
            raise UserError(f"--version {version}: --preset or --ablation is {part['version']}'s")
    config = dict(VERSIONS.get(version, {}))
    if own.get("task") == "sketch":
        config |= SKETCH
    if own.get("released"):
        config |= dict(dgnorm=False, ramp=False) if version == "V1" else dict(first="label")
    config |= own
    if config.get("lambda_2") == 0:             # there is nothing to rise
        config["ramp"] = False
    return Config(**config)


def check_size(cfg: Config) -> None:
    """The size at training time suits G, which doubles, and D, which halves; at test time any does.

    The deepest verdict of each D_i is at 1/32 of X_3. A single pixel, normalised, would be 0.
    """
    least, h, w = max(2 ** cfg.ups, 32), *cfg.size
    check_sides("--size", cfg.size, least, max(least, 64),
                f"G has {cfg.ups} doublings, each discriminator up to five halvings")
    if h * w * cfg.batch_size == 4 ** cfg.ups:
        raise UserError(f"--size {h} {w}: G's first feature is one pixel, which a norm makes 0; a "
                        "larger --size or --batch-size would do")


# -------------------------------------------------------------------------------- 2 Networks
# m is M, one-hot labels or a sketch, (B, N, H, W) with n = N channels. d is the feature that the
# blocks of G hand on, d_t in the paper; h is H, the global feature, at the size that is asked for.
# What DG-Norm is guided by has `hidden` channels, 2 width. Feature maps change their size on the
# way: (B, C, ., .) where it varies.

class InstanceNorm(nn.GroupNorm):
    """Each channel of each image to mean 0, variance 1; no parameters, no running averages.

    A group norm of one channel per group is the same, and also works on a map of one pixel. On a
    GPU it copies maps into another memory order; batch norm does not, and of a single image it is
    the same function: 64 x 512 x 1024 in a sixth of the time.
    """

    def __init__(self, c: int):
        super().__init__(c, c, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        alone = x.is_cuda and len(x) == 1
        return F.batch_norm(x, None, None, training=True) if alone else super().forward(x)


def up(x: Tensor, factor: int = 2, mode: str = "nearest") -> Tensor:
    """Enlarged by a factor: each pixel repeated, or with mode "bilinear" blended into the next."""
    return F.interpolate(x, scale_factor=float(factor), mode=mode)


class SketchEncoder(nn.Module):
    """Sec. 3.1.1, Fig. 3: convolutions of stride 2, so that every unit sees some of the ink.

    A label map says something at every pixel, a sketch only where a line is: resized like a label,
    it would lose most lines. The paper shows a picture of this encoder without its layers; they are
    the release's: 5 x 5, then `ups` times 3 x 3 with stride 2.

    M (B, 1, H, W)  ->  f_lsk (B, 16 width, H/2^ups, W/2^ups)
    """

    def __init__(self, width: int = 64, ups: int = 5):
        super().__init__()
        c = [width * min(2 ** i, 16) for i in range(ups + 1)]                # 64 128 .. 1024 1024
        self.layers = nn.Sequential(nn.Conv2d(1, c[0], 5, 1, 2), InstanceNorm(c[0]), nn.ReLU())
        for c_in, c_out in zip(c, c[1:]):
            self.layers.extend([nn.Conv2d(c_in, c_out, 3, 2, 1), InstanceNorm(c_out), nn.ReLU()])

    def forward(self, m: Tensor) -> Tensor:
        return self.layers(m)


class GlobalEncoder(nn.Module):
    """Eq. (2): H = E_global(M), what no single pixel knows: the shapes around it (Sec. 3.1.2).

    M (B, N, H, W)  ->  `sizes` maps (B, 2 width, h 2^j, w 2^j), one for each size of block

    The paper speaks of "only one final result": one small map, enlarged to each size. The
    convolution after the enlarging is the release's. "Global" is wide, but not the whole image:
    after 7 convolutions a cell sees 129 x 129 pixels of M. `smooth`, ours, enlarges the maps after
    their convolution, bilinearly; this leaves no stripes.
    """

    def __init__(self, n: int, width: int = 64, downs: int = 7, sizes: int = 7,
                 smooth: bool = False):
        super().__init__()
        self.smooth = smooth
        c = [n] + [width * min(2 ** i, 8) for i in range(downs)]             # 64 128 256 512 512 ..
        self.down = nn.ModuleList(
            spectral_norm(nn.Conv2d(c_in, c_out, 3, 1 if i == 0 else 2, 1))
            for i, (c_in, c_out) in enumerate(zip(c, c[1:])))
        self.enlarged = nn.ModuleList(nn.Conv2d(c[-1], 2 * width, 3, 1, 1) for _ in range(sizes))

    def forward(self, m: Tensor) -> list[Tensor]:
        for conv in self.down:
            m = F.leaky_relu(conv(m), 0.2)                                   # at last the one map
        if self.smooth:
            return [F.relu(up(conv(m), 2 ** j, "bilinear")) for j, conv in enumerate(self.enlarged)]
        return [F.relu(convolve_enlarged(m, conv, 2 ** j)) for j, conv in enumerate(self.enlarged)]


def convolve_enlarged(x: Tensor, conv: nn.Conv2d, factor: int) -> Tensor:
    """conv(up(x, factor)) for a 3 x 3 convolution: the same result, with 9 / factor^2 of its work.

    A pixel becomes a square of equal ones, and inside it all results are equal: it is enlarged by
    3, convolved, and the middle one of every three rows and columns repeated factor - 2 times.
    """
    if factor < 4:
        return conv(up(x, factor))
    x = conv(up(x, 3))
    for axis in (2, 3):
        first, middle, last = x.unflatten(axis, (-1, 3)).split(1, axis + 1)
        middle = middle.repeat_interleave(factor - 2, axis + 1)
        x = torch.cat([first, middle, last], axis + 1).flatten(axis, axis + 1)
    return x


class DGNorm(nn.Module):
    """Double-guided normalisation, Eq. (3) to (5), Fig. 4; without H it is SPADE.

    E (B, C, ., .), M (B, N, ., .), H (B, hidden, ., .), of equal size  ->  (B, C, ., .)

    Batch norm takes away what E's channels had in common, gamma_DG and beta_DG give each pixel its
    own scale and shift. They come from M, so from the class of the pixel and of its neighbours, and
    from H, so from a wide part of the map; the two are added.
    Misprint: Eq. (4) has mu where mu^2 is meant. Eq. (5), gamma (BN + 1) + beta, starts at 0 where
    the release, (1 + gamma) BN + beta, starts at BN; both can become the same function.
    """

    def __init__(self, c: int, n: int, hidden: int = 128, eq5: bool = False,
                 norm: type[nn.Module] = nn.BatchNorm2d):
        super().__init__()
        self.eq5, self.norm = eq5, norm(c)
        self.shared = nn.Conv2d(n, hidden, 3, 1, 1)
        self.gamma_beta = nn.Conv2d(hidden, 2 * c, 3, 1, 1)     # one convolution for both: faster

    def forward(self, e: Tensor, m: Tensor, h: Tensor | None = None) -> Tensor:
        guide = F.relu(self.shared(m))
        if h is not None:
            guide = guide + h
        gamma, beta = self.gamma_beta(guide).chunk(2, 1)                     # each (B, C, ., .)
        e = self.norm(e)                                                     # Eq. (3)
        if self.eq5:
            return gamma * (e + 1) + beta
        return (1 + gamma) * e + beta


class GenResBlk(nn.Module):
    """Generative residual block, Eq. (1): d' = G_rb(d, M); with H, Eq. (6): d' = G_rb*(d, M, H).

    d (B, c_in, ., .)  ->  (B, c_out, ., .), of the same size; G doubles it before or after.

    Twice normalise, activate, convolve; and a shortcut around it, which does not see H. Where the
    number of channels changes, the shortcut has a norm and a 1 x 1 convolution of its own. These
    two or three convolutions have spectral norm: their weights are divided by their largest
    singular value. Those inside DG-Norm have not.
    """

    def __init__(self, c_in: int, c_out: int, n: int, hidden: int = 128, eq5: bool = False):
        super().__init__()
        c_mid, self.learned = min(c_in, c_out), c_in != c_out
        self.norm_0, self.norm_1 = DGNorm(c_in, n, hidden, eq5), DGNorm(c_mid, n, hidden, eq5)
        self.conv_0, self.conv_1 = nn.Conv2d(c_in, c_mid, 3, 1, 1), nn.Conv2d(c_mid, c_out, 3, 1, 1)
        if self.learned:                         # the shortcut has to change the width
            self.norm_s = DGNorm(c_in, n, hidden, eq5)
            self.conv_s = nn.Conv2d(c_in, c_out, 1, bias=False)
        for name, part in self.named_children():
            if name.startswith("conv"):
                spectral_norm(part)

    def forward(self, d: Tensor, m: Tensor, h: Tensor | None = None) -> Tensor:
        shortcut = self.conv_s(self.norm_s(d, m)) if self.learned else d
        d = self.conv_0(F.leaky_relu(self.norm_0(d, m, h), 0.2))
        return shortcut + self.conv_1(F.leaky_relu(self.norm_1(d, m, h), 0.2))


class LSCA(nn.Module):
    """Label-guided spatial co-attention, Eq. (7), Fig. 5: f_k = h'_(k-1) A_m + f_k (1 - A_m).

    coarse h_(k-1) (B, c_coarse, ., .), f (B, c, . 2, . 2), M of f's size  ->  (B, c, . 2, . 2)

    A_m, one number for each pixel, says where the feature of the stage before is good enough (road,
    sky) and is kept. It is made from both features and the label. To see it, as Fig. 5 shows it:
    the sigmoid of what a forward hook on `mask` gets. The paper leaves LSCA out of V2, to save
    memory.
    """

    def __init__(self, c_coarse: int, c: int, n: int, mode: str = "nearest"):
        super().__init__()
        self.mode = mode
        self.merge = nn.Conv2d(c_coarse, c, 3, 1, 1)
        self.mask = nn.Conv2d(2 * c + n, 1, 3, 1, 1)

    def forward(self, coarse: Tensor, f: Tensor, m: Tensor) -> Tensor:
        coarse = self.merge(up(coarse, 2, self.mode))                        # h', of f's shape
        a = torch.sigmoid(self.mask(torch.cat([coarse, f, m], 1)))           # A_m, one channel
        return coarse * a + f * (1 - a)


def resize_label(m: Tensor, size: tuple[int, int]) -> Tensor:
    """M (B, N, H, W) -> (B, N, *size): classes by nearest neighbour, a sketch (N = 1) by averages.
    """
    if m.shape[1] == 1:
        return F.adaptive_avg_pool2d(m, size)
    return F.interpolate(m, size, mode="nearest")


def first_feature(f: Tensor, trained: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """f_z (Sec. 3.1.1): what the fully connected layer made of z, as a map (B, C, *size).

    The layer makes a map for the size of training; for an image of another size it is stretched.
    """
    return F.interpolate(f.unflatten(1, (-1, *trained)), size, mode="nearest")


class GeneratorV1(nn.Module):
    """X_i = G_v1(z, M), Eq. (17): three images in one pass, to be judged one by one. In Fig. 7:

          z -> start -> f_z                        M, resized -> each block
                         |                         M -> globe -> H -> each block
        block 1 -> block 2 -> block 3 -> block 4 -> block 5 -> block 6 -> block 7
                                                      LSCA       LSCA       LSCA
                                                       |          |          |
        after each block a doubling: 2 x 4 -> 256 x 512   X_1 at 1/4  X_2 at 1/2  X_3

    z (B, noise), M (B, N, H, W)  ->  [X_3 (B, 3, H, W), X_2 at half the size, X_1 at a quarter]

    From labels: blocks 1 and 2 encode f_z and M, five more generate. From sketches: f_z and the
    sketch encoder's feature, concatenated, enter five blocks. Without pg there is X_3 alone.
    """

    # What the authors' V1 has otherwise: ReleasedV1, in room 8.
    block, fusion, resize, uses_z = GenResBlk, LSCA, staticmethod(resize_label), True

    def __init__(self, n: int, size: tuple[int, int] = (256, 512), width: int = 64, ups: int = 7,
                 noise: int = 128, sketch: bool = False, dgnorm: bool = True, pg: bool = True,
                 lsca: bool = True, eq5: bool = False, smooth: bool = False):
        super().__init__()
        self.multiple, self.mode = 2 ** ups, "bilinear" if smooth else "nearest"
        self.trained = tuple(side // 2 ** ups for side in size)
        self.encoder = SketchEncoder(width, ups) if sketch else None
        c_z = width if sketch else 16 * width
        c = [16 * width] + [width * min(2 ** (ups - 1 - i), 16) for i in range(ups)]   # .. 1024 512
        if sketch and self.uses_z:               # f_z beside the sketch's feature
            c[0] += c_z
        self.start = nn.Linear(noise, c_z * math.prod(self.trained))
        self.globe = GlobalEncoder(n, width, ups + 1, ups, smooth) if dgnorm else None
        pairs, last = list(zip(c, c[1:])), 3 if pg else 1
        self.blocks = nn.ModuleList(self.block(*pair, n, 2 * width, eq5) for pair in pairs)
        self.lsca = nn.ModuleList(self.fusion(*pair, n, self.mode) for pair in pairs[-3:] if lsca)
        self.heads = nn.ModuleList(nn.Conv2d(c_out, 3, 3, 1, 1) for c_out in c[-last:])

    def forward(self, z: Tensor, m: Tensor) -> list[Tensor]:
        size = tuple(side // self.multiple for side in m.shape[-2:])         # 2 x 4 at 256 x 512
        d, stages = first_feature(self.start(z), self.trained, size), len(self.blocks)
        if self.encoder is not None:
            d = torch.cat([self.encoder(m), d], 1) if self.uses_z else self.encoder(m)
        h = self.globe(m) if self.globe is not None else [None] * stages     # H for each block
        labels = [self.resize(m, (size[0] << k, size[1] << k)) for k in range(stages + 1)]
        images = []
        for k, block in enumerate(self.blocks):
            f = up(block(d, labels[k], h[k]), 2, self.mode)                  # size 2^(k+1)
            if k >= stages - 3 and len(self.lsca):
                f = self.lsca[k - stages](d, f, labels[k + 1])               # Eq. (7)
            d = f
            if k >= stages - len(self.heads):
                images.append(torch.tanh(self.heads[k - stages](d)))         # X_1, X_2, X_3
        return images[::-1]


class GeneratorV2(nn.Module):
    """X = G_v2(z, M), Eq. (21), Fig. 8: one image; D sees it at several sizes.

    z (B, noise), M (B, N, H, W)  ->  [X (B, 3, H, W)]

    Each doubling stands before a block. At 256 x 512, with 6 of them, the blocks run at 4 x 8,
    8 x 16, 16 x 32, ..., 256 x 512; with 5, at 256 x 256, the second and the third share 16 x 16.
    There is no LSCA, and only the last feature becomes an image: D gets it at several sizes.

    Seven blocks, 1024-1024-1024-512-256-128-64, and with 7 doublings one more, 32 (V2-H). Paper:
    two encoder blocks and four more; three and four here, as released, since row A_s is SPADE.
    first="label": the first feature is made of the small label map, and z is not used (SPADE).
    smooth, ours: all doublings are bilinear, since nearest ones leave a grid of lines.
    """

    def __init__(self, n: int, size: tuple[int, int] = (256, 512), width: int = 64, ups: int = 6,
                 noise: int = 128, first: str = "noise", dgnorm: bool = True, eq5: bool = False,
                 smooth: bool = False):
        super().__init__()
        self.multiple, self.mode = 2 ** ups, "bilinear" if smooth else "nearest"
        self.trained = tuple(side // 2 ** ups for side in size)
        c = [width * k for k in (16, 16, 16, 16, 8, 4, 2, 1)] + [width // 2] * (ups == 7)
        # How many doublings stand before each block.
        self.levels = [*itertools.accumulate([0, ups > 4, ups > 5, 1, 1, 1, 1, 1])]
        self.start = nn.Conv2d(n, c[0], 3, 1, 1) if first == "label" else (
            nn.Linear(noise, c[0] * math.prod(self.trained)))
        self.globe = GlobalEncoder(n, width, ups + 1, ups + 1, smooth) if dgnorm else None
        self.blocks = nn.ModuleList(
            GenResBlk(c_in, c_out, n, 2 * width, eq5) for c_in, c_out in zip(c, c[1:]))
        self.head = nn.Conv2d(c[-1], 3, 3, 1, 1)

    def forward(self, z: Tensor, m: Tensor) -> list[Tensor]:
        size = tuple(side // self.multiple for side in m.shape[-2:])         # 4 x 8 at 256 x 512
        d = self.start(resize_label(m, size)) if isinstance(self.start, nn.Conv2d) else (
            first_feature(self.start(z), self.trained, size))                # (B, 1024, *size)
        h = self.globe(m) if self.globe is not None else [None] * 8
        for block, k in zip(self.blocks, self.levels):
            here = (size[0] << k, size[1] << k)                              # 4 x 8 .. 256 x 512
            d = block(F.interpolate(d, here, mode=self.mode), resize_label(m, here), h[k])
        return [torch.tanh(self.head(F.leaky_relu(d, 0.2)))]


def unit(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, norm: str = "batch",
         dilation: int = 1) -> list[nn.Module]:
    """Convolution, norm, activation: what D_i and S_i are made of. S_i has "batch" norm and ReLU;
    a slice [:2] of it is without the ReLU.

    D_i has LeakyReLU and one of three norms. Spectral norm bounds how fast its verdict can change
    with the image; the paper does not mention it, the released V2 has it. Instance norm hides from
    D how bright and how colourful an image is, since it rescales all that the convolution finds; in
    V2 the other losses see to that. Spectral norm alone (ours) does not hide it.
    """
    conv = nn.Conv2d(c_in, c_out, kernel, stride, dilation * (kernel // 2), dilation,
                     bias=norm != "both")
    if norm == "batch":
        return [conv, nn.BatchNorm2d(c_out), nn.ReLU()]
    conv = spectral_norm(conv) if norm in ("spectral", "both") else conv
    normed = [InstanceNorm(c_out)] if norm in ("instance", "both") else []
    return [conv, *normed, nn.LeakyReLU(0.2)]


class MiniInception(nn.Module):
    """Mini-inception block (Sec. 3.2.1, Fig. 6): three branches, added; halves H and W.

    x (B, c, H, W)  ->  (B, c, H/2, W/2)

    The branches see 2, 3 and 5 pixels of x at once, so small and larger details. A field of 5 is
    made of two 3 x 3, with fewer weights than one 5 x 5.
    """

    def __init__(self, c: int, norm: str = "both"):
        super().__init__()
        self.pool = nn.Sequential(nn.AvgPool2d(2), *unit(c, c, 1, 1, norm))
        self.three = nn.Sequential(*unit(c, c, 1, 1, norm), *unit(c, c, 3, 2, norm))
        self.five = nn.Sequential(*unit(c, c, 1, 1, norm), *unit(c, c, 3, 1, norm),
                                  *unit(c, c, 3, 2, norm))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) + self.three(x) + self.five(x)


class Judged(NamedTuple):
    """What a D_i finds: a map of verdicts for each of its levels, and the features for Eq. (29).

    A verdict (B, 1, ., .) is a map of logits, one for each region of the image; the sigmoid of the
    vanilla loss is in the losses.
    """
    verdicts: list[Tensor]
    features: list[Tensor]


TAPS = ("pool3", "pool4", "pool5")              # of VGG-16: v_1, v_2, v_3 of the perceptual branch


class PerceptualDiscriminator(nn.Module):
    """D_i = {D_i^1, ..., D_i^levels}, Eq. (8): low, middle and high level verdicts. Fig. 6, D_3:

        x -> common ----> join 1 -> line 1 ----> join 2 -> line 2 ----> join 3
              1/8          ^   |     1/16         ^   |     1/32         ^   |
                           |  out 1               |  out 2               |  out 3
                          pre 1 |                pre 2 |                pre 3 |
                           ^   D^1                ^   D^2                ^   D^3
        image -> VGG-16 -> v_1 -----------------> v_2 -----------------> v_3

    x (B, c_in, H, W), VGG-16's features of the image, v_l (B, c_l, H/2^(l+2), W/2^(l+2))
        ->  Judged, D^l (B, 1, H/2^(l+2), W/2^(l+2)) for l = 1..levels

    Above is the main branch; `line` are the mini-inception blocks. Below is the perceptual branch,
    the frozen VGG-16, which tells every level what it makes of the image. In V2 x is the image with
    its label (Eq. (22)); VGG-16 sees the image alone. Features are what the layers of the main
    branch give; the verdicts and VGG's are not among them.
    """

    def __init__(self, c_in: int, levels: int = 3, width: int = 64, norm: str = "both",
                 vgg_width: int = 64):
        super().__init__()
        c, c_taps = 8 * width, [4 * vgg_width, 8 * vgg_width, 8 * vgg_width]
        first = unit(c_in, width, 3, 2, norm if norm == "instance" else "none")   # as each release
        self.common = nn.ModuleList(nn.Sequential(*layers) for layers in (
            first, unit(width, 2 * width, 3, 2, norm), unit(2 * width, 4 * width, 3, 2, norm)))
        self.pre, self.join, self.out = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.line = nn.ModuleList(MiniInception(c, norm) for _ in range(levels - 1))

        def settle(c: int) -> list[nn.Module]:      # the released V1 has no convolution here
            v1 = norm == "instance"
            return [InstanceNorm(c), nn.LeakyReLU(0.2)] if v1 else unit(c, c, 3, 1, norm)

        for c_main, c_tap in [*zip((4 * width, c, c), c_taps)][:levels]:
            self.pre.append(nn.Sequential(*settle(c_tap)))
            self.join.append(nn.Sequential(*unit(c_main + c_tap, c, 3, 1, norm)))
            self.out.append(nn.Sequential(*settle(c), nn.Conv2d(c, 1, 5, 1, 2)))

    def forward(self, x: Tensor, vgg: dict[str, Tensor]) -> Judged:
        verdicts, features = [], []
        for layer in self.common:
            x = layer(x)                                    # (B, 64 2^k, H/2^(k+1), W/2^(k+1))
            features.append(x)
        for level, (pre, join, out) in enumerate(zip(self.pre, self.join, self.out)):
            if level > 0:
                x = self.line[level - 1](x)                 # (B, 512, half the size)
                features.append(x)
            x = join(torch.cat([x, pre(vgg[TAPS[level]])], 1))         # (B, 512, of that size)
            features.append(x)
            verdicts.append(out(x))                         # one logit for each position
        return Judged(verdicts, features)


class PatchDiscriminator(nn.Module):
    """SPADE's discriminator, for the rows of the tables before HPD: one level, no VGG.

    Four convolutions of 4 x 4, three of them with stride 2, and a fifth that makes the verdicts.
    `vgg` is taken and not used, so that both kinds of D are called alike.

    x (B, c_in, H, W)  ->  Judged, one verdict (B, 1, about H/8, W/8), four features
    """

    def __init__(self, c_in: int, width: int = 64):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(*layers) for layers in (
            unit(c_in, width, 4, 2, "none"), unit(width, 2 * width, 4, 2, "both"),
            unit(2 * width, 4 * width, 4, 2, "both"), unit(4 * width, 8 * width, 4, 1, "both")))
        self.last = nn.Conv2d(8 * width, 1, 4, 1, 2)

    def forward(self, x: Tensor, vgg: dict[str, Tensor]) -> Judged:
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return Judged([self.last(x)], features)


class Discriminators(nn.Module):
    """D_3, D_2, D_1 for X_3, X_2, X_1, Eq. (8) and (23), as one module: the largest image first.

    [x of each scale], [VGG-16's features of each image]  ->  [Judged for each scale]

    D_3 has three levels, D_2 two and D_1 one: small images have little that is of a high level.
    They share no weights, and their losses are added. V2 has D_3 and D_2, V2-H and V1 all three.
    """

    def __init__(self, c_in: int, scales: int = 3, width: int = 64, kind: str = "hpd",
                 norm: str = "both", vgg_width: int = 64):
        super().__init__()
        self.scales = nn.ModuleList(
            PatchDiscriminator(c_in, width) if kind == "patch" else
            PerceptualDiscriminator(c_in, 3 - k, width, norm, vgg_width) for k in range(scales))

    def forward(self, xs: list[Tensor], vgg: list[dict[str, Tensor]]) -> list[Judged]:
        return [d_i(x, features) for d_i, x, features in zip(self.scales, xs, vgg)]


class Bottleneck(nn.Module):
    """ICNet's residual block: 1 x 1, 3 x 3, 1 x 1, each with batch norm, around a skip.

    The 1 x 1 convolutions make the channels few for the 3 x 3 one, and many again. A dilation lets
    the 3 x 3 see further without another halving.
    """

    def __init__(self, c_in: int, c_mid: int, c_out: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.branch = nn.Sequential(
            *unit(c_in, c_mid, 1, stride), *unit(c_mid, c_mid, dilation=dilation),
            *unit(c_mid, c_out, 1)[:2])
        self.skip = nn.Identity() if c_in == c_out else (
            nn.Sequential(*unit(c_in, c_out, 1, stride)[:2]))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.branch(x))


class ICNet(nn.Module):
    """Segmentation network S_i (Sec. 4.1.2): three branches at full, half and quarter size.

    X (B, 3, any size)  ->  logits (B, classes, 256, 256). The input is first resized to 256 x 256,
    so a wide image is squeezed; for smaller images `size` is their longer side.

    The deepest branch sees a quarter of the size, through many layers; the half-size branch is its
    beginning, the full-size branch three convolutions. Each is enlarged and added to the next finer
    one. In between, averages over the whole map, a half, a third and a quarter of it are added up,
    so that every cell knows what else is in the image.
    Layers are the release's, without its two extra outputs, which enter no loss.
    """

    def __init__(self, classes: int, width: int = 32, size: int = 256):
        super().__init__()
        c, self.size = width, size
        self.sub_2 = nn.Sequential(                                          # for 256: 128 -> 32
            nn.AvgPool2d(2), *unit(3, c, 3, 2), *unit(c, c), *unit(c, 2 * c),
            nn.MaxPool2d(3, 2, 1), Bottleneck(2 * c, c, 4 * c),
            *(Bottleneck(4 * c, c, 4 * c) for _ in range(2)),
            Bottleneck(4 * c, 2 * c, 8 * c, 2))                              # (B, 256, 16, 16)
        self.sub_4 = nn.Sequential(
            nn.AvgPool2d(2), *(Bottleneck(8 * c, 2 * c, 8 * c) for _ in range(3)),
            *(Bottleneck(16 * c if i else 8 * c, 4 * c, 16 * c, 1, 2) for i in range(6)),
            *(Bottleneck(32 * c if i else 16 * c, 8 * c, 32 * c, 1, 4) for i in range(3)))
        self.reduce = nn.Sequential(*unit(32 * c, 8 * c, 1))
        self.up_4 = nn.Sequential(*unit(8 * c, 4 * c, dilation=2)[:2])
        self.side_2 = nn.Sequential(*unit(8 * c, 4 * c, 1)[:2])
        self.up_2 = nn.Sequential(*unit(4 * c, 4 * c, dilation=2)[:2])
        self.sub_1 = nn.Sequential(
            *unit(3, c, 3, 2), *unit(c, c, 3, 2), *unit(c, 2 * c, 3, 2),
            *unit(2 * c, 4 * c, 1)[:2])                                      # (B, 128, 32, 32)
        self.out = nn.Conv2d(4 * c, classes, 5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, (self.size, self.size), mode="nearest")
        half = self.sub_2(x)
        deep = self.sub_4(half)                                              # (B, 1024, 8, 8)
        side = deep.shape[-1]
        pools = [F.avg_pool2d(deep, max(1, k * side // 8)) for k in (8, 4, 3, 2)]
        deep = self.reduce(sum(F.interpolate(pool, (side, side), mode="nearest") for pool in pools))
        middle = F.relu(self.up_4(up(deep)) + self.side_2(half))             # (B, 128, 16, 16)
        fine = F.relu(self.up_2(up(middle)) + self.sub_1(x))                 # (B, 128, 32, 32)
        return up(self.out(up(fine, 4)))


class Segmenters(nn.Module):
    """S_3, S_2, S_1 for X_3, X_2, X_1, independent of each other, as one module."""

    def __init__(self, classes: int, images: int = 3, width: int = 32, size: int = 256):
        super().__init__()
        self.scales = nn.ModuleList(ICNet(classes, width, size) for _ in range(images))

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [segment(x) for segment, x in zip(self.scales, images)]


def initialise(net: nn.Module, gain: float = 0.02) -> None:
    """Convolutions and linear layers: Xavier with a gain (V2), or N(0, 0.02) (V1); biases 0.

    Gains of batch norms stay 1. Under spectral norm a weight's scale changes nothing but how fast
    Adam turns it: with SPADE's 0.02 the first hundreds of steps are spent on growing. A short run
    wants 1.
    """
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            nn.init.xavier_normal_(parameter, gain) if gain else (
                nn.init.normal_(parameter, 0.0, 0.02))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


@torch.no_grad()
def speak_up(generator: nn.Module, segmenter: nn.Module | None) -> None:
    """Initial weights with which G's first images show the label, pale on grey. Ours, for V1.

    In V1 only S ties the image to the label, and S teaches nothing before it can tell where the
    label is; with the usual weights z decides most of what is seen. So DG-Norm's guide is
    strengthened, and z weakened: its layer starts at 0, and the gain of the batch norm that follows
    at 0.1, since batch norm gives any f_z unit size, however small. S starts from "nothing known":
    a random S sends G to random, glaring colours, from which D does not bring it back.
    """
    for module in generator.modules():
        if isinstance(module, DGNorm):
            module.shared.weight.mul_(10)
            module.gamma_beta.weight.mul_(3)
    generator.start.weight.zero_()
    generator.blocks[0].norm_0.norm.weight.fill_(0.1)
    for head in generator.heads:
        head.weight.mul_(0.1)
    for each in segmenter.scales if segmenter is not None else ():
        each.out.weight.zero_()


# ---------------------------------------------------------------------------------- 3 Losses
# `judged`, `fake` and `real` are what Discriminators return: for each D_i a Judged.

# The foreground of the released code. Of Cityscapes: poles, lights, signs, people, vehicles, number
# plates, and wall, fence and terrain; in V1 also ego vehicle, rail track and vegetation. Of ADE20K
# and COCO-Stuff the background is listed, ids from 0 (wall) and, in COCO's own counting, from 1.
MORE_IN_V1 = {1, 10, 21}
ADE20K_BACKGROUND = {*range(7), 9, 11, 13, 16, 17, 21, 25, 26, 29, 32, 46, 48, 51, 52, 54, 60, 61,
                     68, 69, 81, 91, 94, 101, 128}
COCO_BACKGROUND = {*range(114, 119), 124, 126, 127, 128, 135, 136, 144, 145, 147, 148, 149, 151,
                   154, 155, *range(157, 163), 164, *range(169, 179), 182}
FOREGROUND = {"cityscapes": {12, 13, 17, 18, 19, 20, 22, *range(24, 35)},
              "ade20k": {*range(150)} - ADE20K_BACKGROUND,
              "coco_stuff": {*range(182)} - {k - 1 for k in COCO_BACKGROUND}}


def foreground_classes(classes: str, version: str = "V2") -> list[int]:
    """Ids of a data set's foreground; unknown pixels are background.

    Of data that the releases do not know, classes of the same names as V2's in Cityscapes, and what
    its own table calls things. Where no class is known to be foreground, all pixels weigh the same.
    """
    if classes in FOREGROUND:
        more = MORE_IN_V1 if (classes, version) == ("cityscapes", "V1") else set()
        return sorted(FOREGROUND[classes] | more)
    cityscapes, table = class_table("cityscapes").names, class_table(classes)
    names = {cityscapes[k] for k in FOREGROUND["cityscapes"]} | table.things
    return [k for k, name in enumerate(table.names) if name in names]


def foreground_mask(label: Tensor, classes: str, T: float, version: str = "V2") -> Tensor:
    """Eq. (9): M_en (B, 1, H, W), P on background and T P on foreground, with mean 1 per image.

    P = (A + B) / (T A + B) for A pixels of foreground and B of background. With a mean of 1, D can
    weigh fakes by it although real photos have no mask in V1. Small things, people or signs, fill
    few pixels; without it, D and G would hardly care about them (Sec. 3.2.1).
    """
    ids = torch.tensor(foreground_classes(classes, version), dtype=torch.long, device=label.device)
    front = torch.isin(label, ids)
    weight = torch.where(front, T, 1.0)[:, None]                             # (B, 1, H, W)
    return weight / weight.mean((2, 3), keepdim=True)


def expectation(q: Tensor, w: Tensor | None = None) -> Tensor:
    """Eq. (14): E_M^il[q] = E[W_i^l q], W_i^l being M_en averaged to the size of q (B, 1, ., .).

    Without a mask (real photos in V1, sketches, T = 1) all weights are one. The mean runs over the
    batch and all positions, and is not divided by the weights' sum: their mean is 1 anyway.
    """
    if w is None:
        return q.mean()
    assert w.shape[1] == q.shape[1] == 1    # (B, ., .) times (B, 1, ., .) would mix the batch
    return (F.adaptive_avg_pool2d(w, q.shape[-2:]) * q).mean()


def hierarchical(judged: list[Judged], loss: Callable, w: Tensor | None = None) -> Tensor:
    """What Eq. (10), (12), (13) share: sum_i 1/(sum_l lambda_il) sum_l lambda_il E[loss(D_i^l)].

    lambda_il is 1, 1/2, 1/4: the finest level weighs most, and each discriminator as much as every
    other.
    """
    total = 0.0
    for d_i in judged:
        weights = [0.5 ** level for level in range(len(d_i.verdicts))]       # Eq. (14)
        terms = [k * expectation(loss(q), w) for k, q in zip(weights, d_i.verdicts)]
        total = total + sum(terms) / sum(weights)
    return total


def generator_loss(fake: list[Judged], gan: str, w: Tensor | None = None) -> Tensor:
    """Eq. (10) and (24), L_1^G: -log D(X) from logits (vanilla), or -D(X) (hinge).

    Paper: L_adv^R, D's own loss on real images, for both. With hinge that would stop teaching G
    wherever D is fooled by a margin. softplus(-q) is -log of the sigmoid of q, without overflow.
    """
    return hierarchical(fake, lambda q: -q if gan == "hinge" else F.softplus(-q), w)


def fake_loss(fake: list[Judged], gan: str, w: Tensor | None = None) -> Tensor:
    """Eq. (12) and (26), L_1^D(X)_F: -log(1 - D(X)), or max(0, 1 + D(X))."""
    return hierarchical(fake, lambda q: F.relu(1 + q) if gan == "hinge" else F.softplus(q), w)


def real_loss(real: list[Judged], gan: str, w: Tensor | None = None) -> Tensor:
    """Eq. (13) and (27), L_1^D(Y)_R: -log D(Y), or max(0, 1 - D(Y)); W in V2 alone."""
    return hierarchical(real, lambda q: F.relu(1 - q) if gan == "hinge" else F.softplus(-q), w)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Eq. (11) and (25): half of D's real and fake parts."""
    return (real + fake) / 2


def sharpness_loss(real: Tensor, blurred: Tensor) -> Tensor:
    """Eq. (16) and (30), L_2: blurred photos are fakes; the real part again keeps the balance.

    It is D's alone. G gets nothing from it but a D that knows blur.
    """
    return (real + blurred) / 2


def blur(y: Tensor) -> Tensor:
    """Y^f: "downscale real images and upscale the downsampled ones", by 2 (Sec. 3.2.2)."""
    return up(F.avg_pool2d(y, 2))


CONSISTENCY_LAYERS = ("conv1_2", "conv2_2", "conv3_2", "conv4_2", "conv5_2")      # of VGG-16


def consistency_loss(images: list[dict], pooled: list[dict]) -> Tensor:
    """Eq. (18), L_v1_3: sum over two pairs and layers of || Phi_l(P_2(X_i+1)) - Phi_l(X_i) ||_2.

    images: VGG-16's features of X_2, X_1; pooled: of the halved X_3, X_2. The norm is the root of
    the sum of squares of one image, as printed; hence lambda_3 = 5e-6. Mean over the batch. Neither
    side is detached: the finer image is pulled to the coarser one, and the coarser one to it.
    """
    return sum((a[name] - b[name]).flatten(1).norm(dim=1).mean()
               for a, b in zip(images, pooled) for name in CONSISTENCY_LAYERS)


def cycle_segmentation_loss(logits: list[Tensor], label: Tensor) -> Tensor:
    """Eq. (19), L_v1_4: sum_i of the cross-entropy of S_i(X_i) with the label that made X_i.

    logits [(B, N, any size)], label (B, H, W). Every S_i's output is enlarged to the label's size.
    """
    return sum(F.cross_entropy(F.interpolate(found, label.shape[-2:], mode="nearest"), label)
               for found in logits)


VGG_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")         # of VGG-19, Eq. (28)
LAMBDA_M = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)


def perceptual_loss(fake: list[dict], real: list[dict], weights: tuple = LAMBDA_M) -> Tensor:
    """Eq. (28), L_v2_5: sum over scales and layers of lambda_Ml || Phi_l(X_i) - Phi_l(Y_i) ||_1.

    The printed weights count on layers that know objects. A random VGG's know the less the deeper
    they are: after ten steps on the streets, the gradient of relu5_1 pointed nowhere (its cosine
    with the gradient of a pixel-wise L1 was -0.03, that of relu1_1 0.67). So, ours: with --vgg
    random the weights are taken in reverse.
    """
    return sum(weight * (x[name] - y[name]).abs().mean()
               for x, y in zip(fake, real) for name, weight in zip(VGG_LAYERS, weights))


def feature_matching_loss(fake: list[Judged], real: list[Judged],
                          released: bool = False) -> Tensor:
    """Eq. (29), L_v2_6: sum_i 1/k sum_k || D_i^(k)(X*) - D_i^(k)(Y*) ||_1; real features are fixed.

    Released code: the sum over layers, the mean over discriminators.
    """
    total = 0.0
    for ours, theirs in zip(fake, real):
        terms = [(x - y.detach()).abs().mean() for x, y in zip(ours.features, theirs.features)]
        total = total + (sum(terms) / len(fake) if released else sum(terms) / len(terms))
    return total


# -------------------------------------------------------------------------------- 4 Training

@dataclass
class State:
    """All that training changes, and the frozen networks that it asks."""
    generator: nn.Module
    discriminator: nn.Module | None             # D_3, D_2, D_1
    segmenter: nn.Module | None                 # S_3, S_2, S_1, with lambda_4
    vgg16: nn.Module | None                     # frozen: D's perceptual branch and Eq. (18)
    vgg19: nn.Module | None                     # frozen: Eq. (28)
    opt_g: torch.optim.Optimizer                # of G and S_i: net_1, Sec. 4.1.3
    opt_d: torch.optim.Optimizer | None         # of D_i: net_2


def dataset(cfg: Config, split: str, kind: type = common.Dataset, **changes) -> common.Dataset:
    """One split: pairs of M and Y, in V2 with instances; of sketches, which V1 alone knows, M."""
    train = split == "train"
    return kind(**dict(
        data=cfg.data, split=split, size=cfg.size, jitter=train and cfg.augment == "jitter",
        mirror=train and cfg.augment != "none", limit=cfg.limit, classes=cfg.classes,
        direction=cfg.direction, seed=cfg.seed, instances=cfg.edges, understood=cfg.understood,
        only=lists(cfg)[0] if cfg.task == "sketch" else "") | changes)


def lists(cfg: Config) -> tuple[str, str]:
    """The files of M and those of Y, which V1 reads apart."""
    if cfg.task == "labels":
        return "label", "image"
    return ("A", "B") if cfg.direction == "AtoB" else ("B", "A")


class Unpaired(common.Dataset):
    """V1's training set: a list of labels or sketches, and beside each a photo of another list.

    Photo i + shift stands beside label i, with another shift in each epoch; where that would be the
    label's own photo, the next one. No loss of V1 sees a label and a photo together, so who stands
    beside whom changes nothing but the order.
    """

    def __init__(self, only: tuple[str, str], understood: dict, **options):
        super().__init__(only=only[0], understood=understood, **options)
        self.photos = common.Dataset(only=only[1], understood=self.understood, **options)
        self.understood = self.photos.understood            # of both lists

    def partner(self, i: int, epoch: int) -> int:
        """Which photo stands beside label i in an epoch."""
        n = len(self.photos)
        chance = torch.Generator().manual_seed(hash((self.seed, epoch)) % 2 ** 63)
        k = (i + int(torch.randint(1, max(n, 2), (1,), generator=chance))) % n
        return (k + 1) % n if self.photos.names[k] == self.names[i] else k

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        epoch, i = index if isinstance(index, tuple) else (self.epoch, index)
        photo = self.photos[epoch, self.partner(i, epoch)]
        return super().__getitem__((epoch, i)) | {"image": photo["image"]}


def open_data(cfg: Config) -> tuple[Config, common.Dataset, common.Dataset]:
    """Both splits, and the config with what the data turned out to be: classes, edges."""
    check_size(cfg)
    if cfg.version == "V1":
        train_set = dataset(cfg, "train", Unpaired, only=lists(cfg))
    else:
        train_set = dataset(cfg, "train").require("image").require("label")
    cfg = replace(cfg, classes=train_set.classes, understood=train_set.understood,
                  z_size=cfg.z_size or cfg.size)
    if cfg.edges and not cfg.resume and "instance" not in train_set.roles:
        notice("no instance maps: trained without their edges")
        cfg = replace(cfg, edges=False)
    needed, cure = "instance" if cfg.edges else None, "train with --no-edges"
    return cfg, train_set.require(needed, cure), dataset(cfg, "test").require(needed, cure)


def channels(cfg: Config) -> int:
    """N, those of M: one of a sketch, or one per class and, in V2, one of the instances' edges.

    Pixels of unknown class have a channel of their own, where the data set has such pixels.
    """
    return 1 if cfg.task == "sketch" else class_table(cfg.classes).channels + cfg.edges


def networks(cfg: Config) -> tuple[nn.Module, Discriminators | None, Segmenters | None]:
    """G, D and S. D sees the label in V2 alone, Eq. (22); S exists in V1 alone, Eq. (19), and a
    sketch has two classes for it: ink and blank.

    G's first feature is made for one size, that of training, which a checkpoint keeps as z_size: so
    it still fits when it is asked for images of another size.
    """
    n, v1, sketch = channels(cfg), cfg.version == "V1", cfg.task == "sketch"
    sizes = n, cfg.z_size or cfg.size, cfg.width, cfg.ups, cfg.noise
    if v1:
        generator = (ReleasedV1 if cfg.released else GeneratorV1)(
            *sizes, sketch, cfg.dgnorm, cfg.pg, cfg.lsca, cfg.eq5, cfg.short)
    else:
        generator = GeneratorV2(*sizes, cfg.first, cfg.dgnorm, cfg.eq5, cfg.short)
    discriminator, segmenter = None, None
    if cfg.discriminator:                        # VGG has 64 channels; a random one is as thin as D
        vgg_width = {"random": cfg.width, "imagenet": 64}.get(cfg.vgg) or len(
            common.read_vgg(16, cfg.vgg)[1][0])
        discriminator = Discriminators(3 if v1 else n + 3, cfg.scales, cfg.width,
                                       cfg.discriminator, cfg.d_norm, vgg_width)
    if cfg.lambda_4:
        segmenter = Segmenters(2 if sketch else n, 3 if cfg.pg else 1, min(cfg.width, 32),
                               min(256, max(cfg.size)))
    for net in filter(None, (generator, discriminator, segmenter)):
        initialise(net, cfg.gain)
    if v1 and cfg.short and not cfg.released:
        speak_up(generator, segmenter)
    return generator, discriminator, segmenter


def frozen_vgg(layers: tuple[str, ...], depth: int, cfg: Config, device: torch.device) -> nn.Module:
    """VGG features that nobody trains, once for all discriminators and losses that want them.

    Each D_i has a VGG-16 of its own in the releases; all are equal, so one does for all. What the
    releases feed is [-1, 1] as it is, but for V2's VGG-16.
    """
    raw = cfg.released and (depth == 19 or cfg.version == "V1")
    vgg = common.VGGFeatures(layers, depth, cfg.vgg, not raw, width=cfg.width)
    return prepare(vgg, cfg, device)


def trained(*nets: nn.Module | None) -> list[nn.Parameter]:
    """The parameters of networks, in the order in which an optimiser holds them."""
    return [p for net in nets if net is not None for p in net.parameters()]


def adam(cfg: Config, *nets: nn.Module | None) -> torch.optim.Optimizer:
    """Sec. 5.2 gives the betas with the kind of adversarial loss."""
    betas = (0.0, 0.9) if cfg.gan == "hinge" else (0.5, 0.999)
    optimiser = torch.optim.Adam(trained(*nets), cfg.lr, betas, fused=True)
    optimiser.register_step_pre_hook(average_gradients)
    return optimiser


def build(cfg: Config, device: torch.device) -> State:
    """Networks and optimisers; precision, compilation and distribution go around the networks.

    S is in G's optimiser, since both are net_1 (Sec. 4.1.3): the same losses train them.
    """
    torch.manual_seed(cfg.seed)
    G, D, S = (None if net is None else prepare(net, cfg, device) for net in networks(cfg))
    layers = TAPS if cfg.discriminator == "hpd" else ()
    if cfg.lambda_3:
        layers += CONSISTENCY_LAYERS
    vgg16 = frozen_vgg(layers, 16, cfg, device) if layers else None
    vgg19 = frozen_vgg(VGG_LAYERS, 19, cfg, device) if cfg.lambda_5 else None
    opt_d = adam(cfg, D) if D is not None else None
    state = State(G, D, S, vgg16, vgg19, adam(cfg, G, S), opt_d)
    if cfg.init:
        load(state, read_weights(*cfg.init), " ".join(cfg.init))
    return state


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
    """A batch of common.Dataset with "input" M (B, N, H, W) added, and of labels "mask" M_en.

    Labels are one-hot, in V2 with the edges of instances, which the paper does not mention and the
    release feeds. A sketch has one channel, ink -1, and its "label" (for S) says where the ink is.
    The mask is made here, at full size; every level of every D_i averages it to its own.
    """
    if cfg.task == "sketch":
        m = batch["input"].mean(1, True)
        return batch | {"input": m, "label": (m[:, 0] < 0).long()}
    m = F.one_hot(batch["label"], class_table(cfg.classes).channels).movedim(-1, 1).float()
    if cfg.edges:
        m = torch.cat([m, boundary_map(batch["instance"])], 1)
    mask = foreground_mask(batch["label"], cfg.classes, cfg.T, cfg.version)
    return batch | {"input": m.contiguous(), "mask": mask}


def pyramid(x: Tensor, n: int, cfg: Config) -> list[Tensor]:
    """[x, half, quarter, ...], n in all. V1 averages 2 x 2 pixels, V2 3 x 3, padding not counted.

    In V2 the label goes through it as well: at the borders of classes its channels get fractional,
    which says how much of each class the larger pixel covers. X_i* of Eq. (22) is X_i and M_i.
    Both ways are the releases'; in V1, D_2 and D_1 judge what G itself makes at these sizes.
    """
    sizes = [x]
    while len(sizes) < n:
        sizes.append(F.avg_pool2d(sizes[-1], 2) if cfg.version == "V1" else
                     F.avg_pool2d(sizes[-1], 3, 2, 1, count_include_pad=False))
    return sizes


def with_label(images: list[Tensor], labels: list[Tensor]) -> list[Tensor]:
    """Eq. (22): X_i* = (X_i, M), along the channels, at each scale.

    So D_i can ask whether the image fits its label, not only whether it looks like a photo. The
    label's channels come first, as in the release.
    """
    return [torch.cat([m, x], 1) for x, m in zip(images, labels)]


def perceive(vgg: nn.Module | None, images: list[Tensor]) -> list[dict[str, Tensor]]:
    """The frozen VGG's features of each image; nothing where the discriminator has no use.

    Gradients pass through VGG to a generated image, and so tell G what VGG would rather see.
    """
    return [vgg(x) if vgg is not None else {} for x in images]


def train_step(state: State, batch: dict, cfg: Config) -> dict[str, Tensor]:
    """One update of G (with S) and one of D: Eq. (20) of V1, Eq. (31) of V2.

    The losses that are returned are without their lambdas: g_... are G's, d_... are D's.
    """
    step = step_v1 if cfg.version == "V1" else step_v2
    return {name: loss.detach() for name, loss in step(state, batch, cfg).items()}


def update_d(state: State, real: list[Judged], fake: list[Judged], blurred: list[Judged] | None,
             cfg: Config, w_y: Tensor | None, w_x: Tensor | None) -> dict[str, Tensor]:
    """D's update in both versions: Eq. (11) and lambda_2 Eq. (16); in V2 Eq. (25) and (30).

    w_y and w_x are the masks of photos and of generated images. Only D gets gradients.
    """
    losses = {"d_real": real_loss(real, cfg.gan, w_y),                       # Eq. (13), (27)
              "d_fake": fake_loss(fake, cfg.gan, w_x)}                       # Eq. (12), (26)
    objective = discriminator_loss(losses["d_real"], losses["d_fake"])
    if blurred is not None:
        losses["d_blur"] = fake_loss(blurred, cfg.gan, w_y)
        objective = objective + cfg.lambda_2 * sharpness_loss(losses["d_real"], losses["d_blur"])
    state.opt_d.zero_grad(set_to_none=True)
    objective.backward(inputs=trained(state.discriminator))
    state.opt_d.step()
    return losses


def step_v1(state: State, batch: dict, cfg: Config) -> dict[str, Tensor]:
    """Eq. (20), Fig. 7: M and Y have nothing to do with each other. Returns the paper's losses.

        z, M -> G -> X_i -> S_i -> is it M?  Eq. (19)      X_(i+1), halved, is like X_i?  Eq. (18)
                      |
                      v
        Y_i, Y_i^f -> D_i -> a photo, and sharp?  Eq. (15), (16)

    Eq. (15) is one sum of both players' losses, but no player can minimise the other's: G lowers
    L^G, D lowers L^D. Both parts are made of one pass of G and D on the fakes, before either
    update; `inputs` says whose gradients each backward pass makes. S_i is trained with G, on
    generated images only, since V1 has no photo whose label is known.
    """
    G, D, S = state.generator, state.discriminator, state.segmenter
    m, y, w = batch["input"], batch["image"], batch.get("mask")
    xs = G(torch.randn(len(m), cfg.noise, device=m.device), m)               # [X_3, X_2, X_1]
    xs = xs if cfg.pg else pyramid(xs[0], cfg.scales, cfg)
    features = perceive(state.vgg16, xs)        # for D and for Eq. (18)
    fake = D(xs, features)

    # net_1, G and S_i: they know no photo but through D. The fake verdicts serve twice, here for
    # G's gradient, below for D's; hence the graph is retained.
    losses = {"g_adv": generator_loss(fake, cfg.gan, w)}                     # Eq. (10)
    if cfg.lambda_3:
        halved = [F.avg_pool2d(x, 2) for x in xs[:2]]                        # P_2(X_3), P_2(X_2)
        losses["g_con"] = consistency_loss(features[1:], perceive(state.vgg16, halved))
    if cfg.lambda_4:
        losses["g_seg"] = cycle_segmentation_loss(S(xs if cfg.pg else xs[:1]), batch["label"])
    objective = (losses["g_adv"] + cfg.lambda_3 * losses.get("g_con", 0.0)
                 + cfg.lambda_4 * losses.get("g_seg", 0.0))
    state.opt_g.zero_grad(set_to_none=True)
    objective.backward(inputs=trained(G, S), retain_graph=True)
    state.opt_g.step()

    # net_2, D_i: photos, generated images (judged above), blurred photos. Blurred ones are fakes to
    # D, so that it learns to look at sharpness, and G must be sharp (Sec. 3.2.2).
    ys = pyramid(y, cfg.scales, cfg)                                         # Y_3, Y_2, Y_1
    softs = [blur(each) for each in ys]                                      # Y_3^f, Y_2^f, Y_1^f
    with parametrize.cached():                  # one D for both: its spectral norms, found once
        real = D(ys, perceive(state.vgg16, ys))
        blurred = D(softs, perceive(state.vgg16, softs)) if cfg.lambda_2 or cfg.ramp else None
    return losses | update_d(state, real, fake, blurred, cfg, None, w)   # photos without a label


def step_v2(state: State, batch: dict, cfg: Config) -> dict[str, Tensor]:
    """Eq. (31) and (32), Fig. 8: an update of G, then one of D against the new G.

        z, M -> G -> X -> X_i, M -> D_i -> a photo, and sharp?  Eq. (32), (30)
                      |   Y_i, M -> D_i
                      |             D_i's features of both alike?  Eq. (29)
                      + , Y -> VGG-19's features of both alike?    Eq. (28)

    As in SPADE, G is updated first, and D then judges an image of the new G, made of the same z.
    Photos need no gradient, and both VGGs are frozen: what is found in Y keeps no graph.
    """
    G, D, n = state.generator, state.discriminator, cfg.scales
    m, y, w = batch["input"], batch["image"], batch.get("mask")
    z = torch.randn(len(m), cfg.noise, device=m.device)
    ms, ys = pyramid(m, n, cfg), pyramid(y, n, cfg)                          # M; Y_3, Y_2, (Y_1)
    vgg_y = perceive(state.vgg16, ys)           # serves both players

    # G: D is frozen, and shows G which features it finds in the real photo, too.
    D.requires_grad_(False)
    xs = pyramid(G(z, m)[0], n, cfg)                                         # X_3, X_2, (X_1)
    fake = D(with_label(xs, ms), perceive(state.vgg16, xs))
    losses = {"g_adv": generator_loss(fake, cfg.gan, w)}                     # Eq. (24)
    if cfg.lambda_5:
        k = 1 if cfg.released else n
        weights = LAMBDA_M[::-1] if cfg.vgg == "random" else LAMBDA_M
        losses["g_vgg"] = perceptual_loss(perceive(state.vgg19, xs[:k]),
                                          perceive(state.vgg19, ys[:k]), weights)      # Eq. (28)
    if cfg.lambda_6:
        real = D(with_label(ys, ms), vgg_y)
        losses["g_fm"] = feature_matching_loss(fake, real, cfg.released)        # Eq. (29)
    objective = (losses["g_adv"] + cfg.lambda_5 * losses.get("g_vgg", 0.0)
                 + cfg.lambda_6 * losses.get("g_fm", 0.0))
    state.opt_g.zero_grad(set_to_none=True)
    objective.backward()
    state.opt_g.step()

    # D: photos, images of the new G, blurred photos, all three with the label and the mask. Judged
    # in one batch or one by one they get the same verdicts, since instance norm looks at each image
    # alone; one by one is as fast.
    D.requires_grad_(True)
    with torch.no_grad():
        xs = pyramid(G(z, m)[0], n, cfg)
    softs = [blur(each) for each in ys]                                      # Y_3^f, Y_2^f, (Y_1^f)
    with parametrize.cached():                  # one D for all: its spectral norms, found once
        real = D(with_label(ys, ms), vgg_y)
        fake = D(with_label(xs, ms), perceive(state.vgg16, xs))
        blurs = cfg.lambda_2 or cfg.ramp
        blurred = D(with_label(softs, ms), perceive(state.vgg16, softs)) if blurs else None
    return losses | update_d(state, real, fake, blurred, cfg, w, w)


def learning_rates(cfg: Config, epoch: int) -> tuple[float, float]:
    """Of G and of D: constant for half the epochs, then down in equal steps; the last is not 0.

    Paper: "decay to 0" (Sec. 5.2), which would be reached one epoch after the end. Sketches keep
    the full rate. Released V2: half of it for G, twice for D.
    """
    falling = cfg.epochs // 2 if cfg.task == "labels" else 0
    rate = cfg.lr * (1 - max(0, epoch - (cfg.epochs - falling)) / max(falling, 1))
    return (rate / 2, 2 * rate) if cfg.released and cfg.version != "V1" else (rate, rate)


def lambda_2(cfg: Config, epoch: int) -> float:
    """Weight of the sharpness loss: constant, or from 0 to 1 over the run (Sec. 5.2).

    In the first epoch of a ramp blurred photos are judged and logged, but do not count.
    """
    return cfg.lambda_2 * epoch / max(cfg.epochs - 1, 1) if cfg.ramp else cfg.lambda_2


def train(cfg: Config, stored: dict | None = None) -> Path:
    """From scratch, from --init, or on from a stored checkpoint; returns the run's folder."""
    device = pick_device(cfg)
    cfg, train_set, test_set = open_data(cfg)
    state = build(cfg, device)
    loader = common.Loader(train_set, cfg.batch_size, cfg.workers, device, cfg.seed, cfg.epochs,
                           cfg.steps)
    with Run(cfg, state, loader, test_set, stored) as run:
        while not loader.over:
            # Once an epoch: both learning rates, and in V1 the weight of the sharpness loss.
            rates = learning_rates(cfg, loader.epoch)
            for optimiser, rate in zip((state.opt_g, state.opt_d), rates):
                optimiser.param_groups[0]["lr"] = rate
            now = replace(cfg, lambda_2=lambda_2(cfg, loader.epoch))
            for batch in loader:                # what is left of this epoch
                run.done(train_step(state, make_pair(batch, now), now))
    return run.end()


# -------------------------------------------------------------------------------- 5 Sampling

@torch.no_grad()
def translate(generator: nn.Module, z: Tensor, m: Tensor) -> Tensor:
    """X_3 for one map of any size: (1, noise), (1, N, H, W) -> (1, 3, H, W).

    Sides are mirrored up to the next multiple of 2^ups, at least two (of one pixel, a norm leaves
    nothing), and the result is cropped. One image at a time: none depends on its neighbours.
    """
    (height, width), multiple = m.shape[-2:], generator.multiple
    return generator(z, common.mirror_pad(m, multiple, 2 * multiple))[0][..., :height, :width]


def test_time(state: State, cfg: Config) -> nn.Module:
    """A copy of G for test time: which statistics its batch norms use is --test-norm's to say.

    V2 trains with batches, and averages of training stand for them, as in SPADE. V1 trains on one
    image at a time, with that image's own statistics; so it does at test time, as its release does,
    where batch norm is instance norm.
    A copy, since synchronised batch norm must not be entered by one process alone.
    """
    generator, _, _ = networks(for_testing(cfg))
    generator.load_state_dict(state.generator.state_dict())
    generator.to(next(state.generator.parameters()).device)
    for module in generator.modules():
        if isinstance(module, nn.BatchNorm2d) and cfg.test_norm == "image":
            module.running_mean = module.running_var = None     # it then asks the image itself
    return generator.eval()


def draw(cfg: Config, name: str, k: int, device: torch.device) -> Tensor:
    """z (1, noise) from N(0, I): each image and each sample k of it has its own, on every device
    the same. Released V1: the mean of ten, so that its deviation is 0.316."""
    chance = torch.Generator().manual_seed(draw_seed(cfg.seed, name, k))
    z = torch.randn(1, cfg.noise, generator=chance).to(device)
    return z * 0.1 ** 0.5 if cfg.released and cfg.version == "V1" else z


def test_pair(item: dict, state: State, cfg: Config) -> dict:
    """One item of a dataset as a batch of one where G is, made a pair."""
    return make_pair(common.batch_of_one(item, next(state.generator.parameters()).device), cfg)


def output_of(generator: nn.Module, pair: dict, cfg: Config, k: int = 0) -> Tensor:
    """X_3 (1, 3, H, W) of a pair with its k-th z; grey, where the photos of training were grey."""
    m = pair["input"]
    x = translate(generator, draw(cfg, pair["name"], k, m.device), m)
    return common.as_trained(x, cfg.understood)


def sample_grid(state: State, cfg: Config, test_set: common.Dataset, path: Path) -> Tensor:
    """Input | output | truth of six test examples, evenly spread, two a row. Returns the outputs
    (6, 3, H, W)."""
    generator, tiles, outputs, n = test_time(state, cfg), [], [], min(6, len(test_set))
    for i in range(n):
        pair = test_pair(test_set[i * len(test_set) // n], state, cfg)
        outputs.append(output_of(generator, pair, cfg).cpu())
        shown = pair["input"].expand(-1, 3, -1, -1) if cfg.task == "sketch" else (
            colour_label(pair["label"], class_table(cfg.classes)))
        tiles += [shown.cpu(), outputs[-1]]
        if "image" in pair:
            tiles.append(pair["image"].cpu())
    save_images(torch.cat(tiles), path, nrow=2 * len(tiles) // n)
    return torch.cat(outputs)


def sample(cfg: Config, state: State, size: tuple[int, int] | None = None) -> Path:
    """Outputs for --input, a file or a folder of any sizes, or for the test split.

    An output has the size of its input; `size` resizes the inputs first. Several samples of one
    input differ by z.
    """
    generator, target = test_time(state, cfg), Path(cfg.output or Path(cfg.out, "test"))
    if cfg.samples > 1 and cfg.first == "label":
        raise UserError(f"--samples {cfg.samples}: this network has no noise, so one image is all")
    if cfg.input:
        files = common.input_files(cfg.input, "label" if cfg.task == "labels" else "A",
                                   cfg.instances if cfg.edges else None)
        items = common.Dataset(files=files, classes=cfg.classes, size=size,
                               understood=cfg.understood)
        common.notice_scale(items, cfg.understood, cfg.size)
    else:
        items = dataset(cfg, "test").require("label" if cfg.task == "labels" else None)
    for item, paths in common.outputs(items, cfg.input, target, cfg.samples):
        pair = test_pair(item, state, cfg)
        for k, path in enumerate(paths):
            save_images(output_of(generator, pair, cfg, k), path)
    return target


# ------------------------------------------------------------------------------ 6 Evaluation

# The paper's numbers: PPA, PCA, class IoU, FID.
TABLE_1_2 = {"V1": {"A_u": (.48, .09, .08, 133.2), "B_u": (.33, .11, .08, 117.7),
                    "C_u": (.48, .15, .12, 83.5), "D_u": (.54, .18, .14, 83.4),
                    "E_u": (.64, .22, .18, 76.0), "F_u": (.69, .23, .18, 67.9),
                    "G_u": (.77, .22, .18, 65.0), "H_u": (.76, .25, .20, 67.4)},
             "V2": {"A_s": (.930, .681, .592, 57.4), "B_s": (.934, .711, .621, 49.2),
                    "C_s": (.935, .727, .636, 48.0), "D_s": (.934, .731, .639, 46.0),
                    "E_s": (.936, .738, .646, 45.5)}}


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Table 3: peak signal-to-noise ratio in dB of images in [-1, 1], (B, 3, H, W) -> (B,).

    At most 100, which equal images have: infinity would be the mean of any set that has a pair.
    """
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(1).clamp(min=4e-10))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Table 3: structural similarity (Wang et al. 2004) of images in [-1, 1], -> (B,).

    Gaussian windows of 11 x 11, sigma 1.5, K = (0.01, 0.03); mean over windows and channels.
    """
    x, y = (x + 1) / 2, (y + 1) / 2             # brightness counts here, not differences alone
    a, b, aa, bb, ab = (gaussian_blur(t, 11, 1.5)[..., 5:-5, 5:-5]      # whole windows alone
                        for t in (x, y, x * x, y * y, x * y))
    score = (2 * a * b + 0.01 ** 2) * (2 * (ab - a * b) + 0.03 ** 2)
    score = score / ((a * a + b * b + 0.01 ** 2) * (aa - a * a + bb - b * b + 0.03 ** 2))
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


@torch.no_grad()
def evaluate(cfg: Config, state: State) -> dict:
    """The paper's metrics on the test split, beside its tables; writes metrics.json.

    PPA, PCA, class IoU: a network trained on real photos labels the generated ones. PSNR and SSIM
    where the photo of the label is known; a Frechet distance of VGG-16's features, in place of
    Inception's, to the test photos, or to photos of the training list where none are known.
    """
    generator, labels = test_time(state, cfg), cfg.task == "labels"
    device = next(generator.parameters()).device
    test_set = dataset(cfg, "test").require("label" if labels else None)
    known = "image" in test_set[0]
    photos = test_set if known else dataset(cfg, "train", only=lists(cfg)[1])
    vgg = common.VGGFeatures(("relu5_3",), 16, cfg.vgg, width=cfg.width).to(device)
    features, confusion, pairwise = {"output": [], "truth": []}, {}, []
    if labels:                                  # the scorer is trained once, and kept by the runs
        table, pairs = test_set.require_scored().table, dataset(cfg, "train", limit=0, jitter=False)
        scorer = common.fcn_scorer(pairs, Path(cfg.out).parent, device, cfg.vgg)
        confusion = {"output": 0, "truth": 0} if known else {"output": 0}
    for i in tqdm(range(len(test_set)), desc="evaluate", unit="image", disable=None):
        pair = test_pair(test_set[i], state, cfg)
        x, y = output_of(generator, pair, cfg), photos[i % len(photos)]["image"][None].to(device)
        pairwise.append([psnr(x, y).item(), ssim(x, y).item()])
        for row, view in (("output", x), ("truth", y)):
            features[row].append(vgg(view)["relu5_3"].mean((2, 3)).cpu())
            if row in confusion:
                found = scorer(view).argmax(1)
                confusion[row] += common.confusion_matrix(found, pair["label"], table).cpu()
    metrics = {"images": len(test_set),
               "VGG distance": frechet_distance(*map(torch.cat, features.values()))}
    if known:
        metrics["PSNR"], metrics["SSIM"] = torch.tensor(pairwise).mean(0).tolist()
    metrics |= {row: common.segmentation_scores(counts) for row, counts in confusion.items()}
    report(metrics, cfg)
    common.save_scores(metrics, Path(cfg.out, "metrics.json"))
    return metrics


def report(metrics: dict, cfg: Config) -> None:
    """The metrics as text beside the paper's rows. Its data and scorers are others, and its FID is
    Inception's: compare orderings alone."""
    rows = {name: value.values() for name, value in metrics.items() if isinstance(value, dict)}
    print(f"\nLab2Pix-{cfg.version} {cfg.ablation}: " + ", ".join(
        f"{name} {value:.5g}" for name, value in metrics.items() if name not in rows))
    rows |= {f"paper, {row}": values for row, values in TABLE_1_2[cfg.version[:2]].items()}
    print(f"{'FCN-score, by our own scorer':47}{'PPA':>8}{'PCA':>9}{'C-IoU':>9}{'FID':>9}")
    for name, values in rows.items():
        print(f"  {name:44}" + "".join(f"{value:9.3f}" for value in values))


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

# The authors' V1, for its files and --released: instance norm; blocks with ReLU, without spectral
# norm and without a shortcut where the widths agree; labels by the largest id of each cell; A_m
# from normalised features; of sketches z is computed and not used.

class ReleasedBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, n: int, hidden: int = 128, eq5: bool = False):
        super().__init__()
        self.norm_0, self.norm_1 = (DGNorm(c, n, hidden, norm=InstanceNorm) for c in (c_in, c_out))
        self.conv_0, self.conv_1 = (nn.Conv2d(c, c_out, 3, 1, 1) for c in (c_in, c_out))
        if c_in != c_out:
            self.norm_s = DGNorm(c_in, n, hidden, norm=InstanceNorm)
            self.conv_s = nn.Conv2d(c_in, c_out, 3, 1, 1)

    def forward(self, d: Tensor, m: Tensor, h: None = None) -> Tensor:
        shortcut = self.conv_s(F.relu(self.norm_s(d, m))) if hasattr(self, "conv_s") else 0.0
        d = self.conv_0(F.relu(self.norm_0(d, m)))
        return shortcut + self.conv_1(F.relu(self.norm_1(d, m)))


class ReleasedLSCA(LSCA):
    def __init__(self, c_coarse: int, c: int, n: int, mode: str = "nearest"):
        super().__init__(c_coarse, c, c, mode)
        self.label, self.norm = nn.Conv2d(n, c, 3, 1, 1), InstanceNorm(c)

    def forward(self, coarse: Tensor, f: Tensor, m: Tensor) -> Tensor:
        coarse, m = F.relu(self.merge(up(coarse, 2, self.mode))), F.relu(self.label(m))
        a = torch.sigmoid(self.mask(torch.cat([self.norm(coarse), self.norm(f), self.norm(m)], 1)))
        return coarse * a + f * (1 - a)


def largest_id(m: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest id in each cell; of a sketch the average."""
    if m.shape[1] == 1:
        return resize_label(m, size)
    ids = F.adaptive_max_pool2d(m.argmax(1, keepdim=True).float(), size)[:, 0].long()
    return F.one_hot(ids, m.shape[1]).movedim(-1, 1).to(m.dtype).contiguous()


class ReleasedV1(GeneratorV1):
    block, fusion, resize, uses_z = ReleasedBlock, ReleasedLSCA, staticmethod(largest_id), False


# The authors' names of layers -> ours, applied one after the other to every key. First those of
# V2 and of SPADE, which share a code base; from _fusion on those of V1.
RENAMED = (
    (r"weight_orig$", "parametrizations.weight.original"),
    (r"weight_([uv])$", r"parametrizations.weight.0._\1"),
    (r"param_free_norm", "norm"), (r"mlp_shared\.0", "shared"), (r"^conv_img", "head"),
    (r"fpencoder\.model_down\.(\d+)", lambda k: f"globe.down.{int(k[1]) // 2}"),
    (r"_fusion\.input1\.0", "_fusion.merge"), (r"_fusion\.seg_process\.0", "_fusion.label"),
    (r"_fusion\.mask\.0", "_fusion.mask"),
    (r"SPADEResBlock_(\d)_fusion", lambda k: f"lsca.{int(k[1]) - 5}"),
    (r"SPADE_([12])_\.1", lambda k: f"conv_{int(k[1]) - 1}"), (r"SPADE_res_\.1", "conv_s"),
    (r"SPADE_([12])\.", lambda k: f"norm_{int(k[1]) - 1}."), (r"SPADE_res\.", "norm_s."),
    (r"common_conv\.0", "shared"), (r"^(noise_process|fc)\.", "start."),
    (r"^out_(\d)\.0", lambda k: f"heads.{int(k[1]) - 5}"),
    (r"^encoder\.model", "encoder.layers"), (r"mul_conv", "mlp_gamma"), (r"add_conv", "mlp_beta"))


def rename_released(stored: dict, path: Path) -> dict:
    """The authors' generators, of V1 and of V2, and SPADE's, under our names.

    Two convolutions for gamma and beta become one; V1's gamma is our 1 + gamma. Batch norms without
    gamma_BN, beta_BN get 1, 0. Of ADE20K's 151 channels, unknown pixels have the first there, the
    last here.
    """
    if not {"noise_process.weight", "conv_img.weight"} & stored.keys():
        raise UserError(f"{path}: no checkpoint of {NAME}.py and no released generator; its first "
                        f"key is {next(iter(stored), 'missing')}")
    # Blocks stand there in the order in which they run, heads of the global encoder in reverse.
    blocks = dict.fromkeys(key.split(".")[0] for key in stored if re.search("norm_0|SPADE_1", key))
    sizes = len({key.split(".")[2] for key in stored if key.startswith("fpencoder.model_up")})
    here = [(rf"^{block}\.", f"blocks.{k}.") for k, block in enumerate(blocks)]
    here.append((r"^fpencoder\.model_up\.(\d+)\.\d+",
                 lambda k: f"globe.enlarged.{sizes - 1 - int(k[1])}"))
    found, ade20k = {}, any(v.ndim == 4 and v.shape[1] == 151 for v in stored.values())
    for key, value in stored.items():
        name = key
        for pattern, ours in (*here, *RENAMED):
            name = re.sub(pattern, ours, name)
        if ade20k and (value.shape[1:2] == (151,) or value.numel() == 151 * 9):     # and v of norms
            value = value.view(-1, 151, 9).roll(-1, 1).view_as(value)
        found[name] = value - 1 if key.endswith("mul_conv.bias") else value
    for name in [name for name in found if "mlp_gamma" in name]:
        both = torch.cat([found.pop(name), found.pop(name.replace("gamma", "beta"))])
        found[name.replace("mlp_gamma", "gamma_beta")] = both
    for name in [name for name in found if name.endswith("running_mean")]:
        found[name.replace("running_mean", "weight")] = torch.ones_like(found[name])
        found[name.replace("running_mean", "bias")] = torch.zeros_like(found[name])
    return {"generator": found}


# N, the channels of M, tells of which data set a released generator is: (classes, edges).
# Cityscapes has 35 ids, ADE20K 150 and unknown, COCO-Stuff 182 and unknown; edges add one.
RELEASED_DATA = {35: ("cityscapes", False), 36: ("cityscapes", True), 151: ("ade20k", False),
                 183: ("coco_stuff", False), 184: ("coco_stuff", True)}


def released_config(stored: dict, given: dict) -> dict:
    """The settings that the authors' generator has, read off the shapes of its weights.

    The number of channels of M tells the data set, and that the size it was trained at: V1's first
    feature is 2 x 4 in all their files, from sketches 8 x 8. --classes and --ups say otherwise.
    """
    weights = stored["generator"]
    hidden, n = weights["blocks.0.norm_0.shared.weight"].shape[:2]
    blocks = len({key.split(".")[1] for key in weights if key.startswith("blocks")})
    sizes = sum(key.startswith("globe.enlarged") and key.endswith("bias") for key in weights)
    classes, edges = RELEASED_DATA.get(n, (str(n - 1), False))
    config = dict(released=True, width=hidden // 2, dgnorm=sizes > 0, classes=classes, edges=edges)
    if "heads.0.weight" not in weights:
        # SPADE's own has 6 doublings at 256 x 512, 5 at 256 x 256, and one block more in V2-H.
        spade = 7 if blocks == 8 else 6 if classes == "cityscapes" else 5
        return config | dict(ups=sizes - 1 if sizes else spade, first="label")
    config |= VERSIONS["V1"] | dict(ups=blocks, dgnorm=False)
    if n == 1:
        return config | SKETCH | dict(task="sketch", classes="", z_size=SKETCH["size"])
    return config | dict(z_size=(256, 512))


def for_testing(cfg: Config) -> Config:
    """The config with which a network is built to be tested: G alone."""
    return replace(cfg, compile=False, discriminator=None, lambda_3=0.0, lambda_4=0.0, lambda_5=0.0)


def run_mode(mode: str, cfg: Config, state: State, given: dict) -> None:
    """What is done with a trained network."""
    if mode == "sample":
        sample(cfg, state, given.get("size"))
    else:
        evaluate(cfg, state)


def trace(cfg: Config) -> None:
    """Stage, output and parameters of all networks in one training step, FLOPs and time."""
    device = pick_device(cfg)
    cfg, train_set, _ = open_data(replace(cfg, compile=False))
    state, loader = build(cfg, device), common.Loader(train_set, cfg.batch_size, 0, device)
    pair = make_pair(next(iter(loader)), cfg)
    common.trace_step({name: getattr(state, name) for name in NETWORKS},
                      lambda: train_step(state, pair, cfg))


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
