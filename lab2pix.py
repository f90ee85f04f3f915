"""Lab2Pix: photos from label maps, with pairs (V2) and without any (V1).

J. Zhu, L. Gao, J. Song, Y.-F. Li, F. Zheng, X. Li, H. T. Shen. Label-Guided Generative Adversarial
Network for Realistic Image Synthesis. TPAMI 2022. Section, equation and table numbers are its own.

Idea. A label map says little, so G must get all there is out of it: residual blocks whose
normalisation is steered by each pixel's class and by a global feature of the whole map (DG-Norm),
and attention that keeps what coarser layers have done well (LSCA). A strong judge pulls the images
towards photos: three discriminators, each judging at several depths with VGG-16 beside it
(hierarchical, perceptual), more strictly on foreground objects, and told that blurred photos are
fakes. With pairs (V2) D also sees the label. Without (V1) a segmentation network, trained together
with G, must find the label again in the generated image: that alone ties image and label.

Symbols     M batch["input"], labels or sketch    Y batch["image"]    X = G(z, M)    z noise
            X_3 full size, X_2 half, X_1 a quarter (lists run from X_3 on)    Y^f blurred photos
            D_i^l level l of discriminator i    W foreground mask    H global feature    S_i ICNet

Paper map   (a test reads these lines: every name must exist, and nothing numbered may be missing)
    Eq. (1)     generative residual block          GenResBlk
    Eq. (2)     global encoder                     GlobalEncoder
    Eq. (3-4)   batch norm                         DGNorm
    Eq. (5)     DG-Norm                            DGNorm, with --form eq5
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
    Table 1     ablation of V1, A_u to H_u         ABLATIONS, evaluate
    Table 2     ablation of V2, A_s to E_s         ABLATIONS, evaluate
    Table 3     unpaired, Cityscapes and Facades   evaluate, psnr, ssim
    Table 4     FID, memory and time of sketches   evaluate, frechet_distance, trace
    Table 5     paired, three data sets            evaluate
    Table 6     user study                         needs people; sample makes its images
    Fig. 1      samples of V1 and V2               sample
    Fig. 2      the framework                      step_v1, step_v2
    Fig. 3      adaptive label encoder             GeneratorV1, SketchEncoder
    Fig. 4      DG-Norm                            DGNorm
    Fig. 5      co-attention map A_m               LSCA
    Fig. 6      hierarchical discriminator         PerceptualDiscriminator, MiniInception
    Fig. 7      V1                                 step_v1
    Fig. 8      V2                                 step_v2
    Fig. 9      rows of Table 1 side by side       sample, with --ablation
    Fig. 10     rows of Table 2 side by side       sample, with --ablation
    Fig. 11-12  V1, labels and sketches            sample, with --version
    Fig. 13     V2 beside other methods            sample
    Fig. 14     V2-H beside V2                     sample, PRESETS
    Fig. 15-16  V2 beside other methods            sample
    Fig. 17     failures: rare things              evaluate, which prints the worst classes
    Fig. 18-21  random samples of V2               sample

Paper                             | Released code                     | Here
    Eq. (4): sum E^2 - mu         | batch norm                        | Misprint: mu squared
    Eq. (5): gamma (BN + 1) + beta| V2 (1 + gamma) BN + beta,         | V2's, which starts at BN;
                                  |   V1 gamma IN + beta              |   --form eq5, v1code
    BN has gamma and beta         | it has none                       | it has both; in released
                                  |                                   |   files they are 1 and 0
    BN at test time: not said     | V1 instance norm; V2 averages     | V1 the image's own; V2
                                  |   of training                     |   averages; --test-norm
    V1's blocks as V2's (Sec. 4.1)| instance norm, ReLU, no spectral  | V2's block, with spectral
                                  |   norm, no identity shortcut      |   norm; --form v1code
    V2 takes z                    | V2: the small label map instead   | z; --first label
    z and sketch concatenated     | V1: z computed, then unused       | concatenated
    labels are resized            | V1: max-pooled ids                | nearest; sketches averaged
    A_m from features and label   | V1: from normalised convolutions  | paper; --form v1code
    two encoder blocks in V2      | three, as SPADE                   | three; A_s is SPADE
    Eq. (23): three D in V2,      | two, three in V2-H                | two, three in V2-H;
      Sec. 5.2: two               |                                   |   --scales
    Eq. (10): G and D share L^R   | hinge: G minimises -D             | as released
    (12-13): sum over D_i         | V2: a mean, with weights 1/3, 1/2 | sum, weights 1 as printed
    W of its own sample           | V1, V2: the batch's mean, by      | its own
                                  |   accident                        |
    Y^f: halved and doubled       | V2: the full image alone          | every Y_i, average pool
    norms ||.||_1 in (28), (29)   | means                             | means
    Eq. (18): a norm ||.||_2      | V1: mean square, VGG-19           | the norm itself, per image
    Eq. (19): size not said       | S_i enlarged to the label         | the same
    ICNet                         | conv4_4 lacks its skip            | all blocks have theirs
    a sketch has two classes      | V1: regression to the sketch      | two classes
    four losses in V1             | a fifth, VGG-19 to a random photo | four
    VGG-16 as trained on ImageNet | V1: overwritten by random numbers | as trained
    VGG's input not stated        | raw [-1, 1] in VGG-19 and in V1;  | normalised in both;
                                  |   V2's VGG-16 normalised          |   --vgg16-raw, --vgg19-raw
    Eq. (28): sum over scales;    | full size alone; sum over layers, | paper; --released-losses
      (29): mean over layers      |   mean over D_i                   |
    weights of (28) for ImageNet  | the same                          | the same; reversed if the
                                  |                                   |   VGG is random, ours
    lr 2e-4 for all               | V2: G 1e-4, D 4e-4                | paper; --ttur
    lambda_2 rises from 0 to 1    | V1: off unless asked              | rises
    norms of D not stated         | V1 instance norm; V2 with         | as released; --d-norm
                                  |   spectral norm besides           |
    spectral norm not mentioned   | 3 power iterations a step in V2,  | 3 in V2: its parts of one
                                  |   2 in SPADE                      |   step judge with one norm
    V2's input: the label         | and the instances' edges          | with them; --no-edges
    a sketch's encoder not shown  | V1: five 3 x 3 after a 5 x 5      | as released
    initialisation not stated     | V1 N(0, 0.02), but linear layers  | V1 N(0, 0.02), V2 Xavier,
                                  |   and biases as PyTorch's, BN's   |   in all layers; biases 0,
                                  |   gain N(1, 0.02); V2 Xavier,     |   gains 1; --gain
                                  |   skips layers with spectral norm |
    which photo meets which label | V1: any, drawn with replacement   | each photo once an epoch,
                                  |                                   |   never with its own label
    foreground not listed         | Cityscapes, in V1 three more ids; | as released, ids shifted
                                  |   ADE20K, COCO by ids off by one  |   to where they belong
    baseline's D not described    | SPADE's D in V2                   | SPADE's, in Eq. (10-16)
    z at test time                | V1: the mean of ten draws         | N(0, I); --truncation
    pictures of 8 bits            | cut off                           | rounded
    FCN, DRN-D-105, DeepLab score | not released                      | FCN-8s, on your photos
    FID                           | not released                      | VGG distance; --inception
    released weights              | G, D, S of V1, G of SPADE         | G alone: it is what paints

Run         python lab2pix.py                               built-in streets, minutes on a laptop
            python lab2pix.py --version V1                  the same, without a single pair
            python lab2pix.py --data ./cityscapes --gpu 0   the last line of Table 2
            python lab2pix.py sample --samples 3            three outputs for each test layout
"""

import atexit
import copy
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import common                                   # before torch: it says how torch's threads wait

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

from common import (
    COUNT, POSITIVE, SHARE, GroupNorm, UserError, Within, boundary_map, check_settings, check_sides,
    class_table, colour_label, flag, notice, row_of, save_images, setting)

# ---------------------------------------------------------------------------------- 1 Config

@dataclass
class Config:
    """Every setting is a flag. The defaults are the paper's for V2 on Cityscapes, Sec. 5.2.

    What the paper has no name for follows the released code, and says so; "ours" is in neither.
    """
    # The task. A map M goes in and a photo comes out. V2 learns from pairs of map and photo, V1
    # from maps and photos that have nothing to do with each other, V2-H is V2 for large images.
    # M is a label map, one channel per class, or in V1 a sketch of one channel.
    data: str = setting("", "folder, in any known layout; none: the built-in streets")
    version: str = setting("V2", "without pairs, with, at 512 x 1024; Sec. 4", ("V1", "V2", "V2-H"))
    ablation: str = setting("", "a row of Table 1 (A_u .. H_u) or of Table 2 (A_s .. E_s)")
    task: str = setting("labels", "V1: or from sketches, given ones or edges of the photos",
                        ("labels", "sketch", "edges"))
    direction: str = setting("AtoB", "which half of a pair is the sketch", ("AtoB", "BtoA"))
    classes: str = setting("", "a table of common.py, or a number; none: asks the data")
    edges: bool = setting(True, "V2: edges of the instances beside the labels; released code")
    size: tuple[int, int] = setting((256, 512), "height, width in pixels, Sec. 5.2", POSITIVE)
    jitter: bool = setting(False, "enlarge by 286/256 and crop; released code, COCO and ADE20K")
    mirror: bool = setting(True, "flip left and right, half the time; released code")
    limit: int = setting(0, "use the first so many examples; 0: all (400 streets)", COUNT)
    # The generator. Every width is a multiple of `width`: 64 gives the networks of the paper, less
    # gives thin ones of the same form. One block stands before or after each doubling, so `ups`
    # also says how small the first feature is: the image's sides by 2^ups. `first`, `dgnorm`, `pg`
    # and `lsca` are the switches of the ablation tables.
    width: int = setting(64, "channels before the output; 16 times as many at first", POSITIVE)
    ups: int = setting(6, "doublings in G; 5 at 256 x 256, 7 in V2-H and V1", Within((4, 8)))
    noise: int = setting(128, "length of z, Sec. 4.1.1", POSITIVE)
    z_size: tuple[int, int] | None = setting(None, "size f_z is made for; none: --size", POSITIVE)
    first: str = setting("noise", "first feature from z, or as in SPADE", ("noise", "label"))
    dgnorm: bool = setting(True, "global encoder and DG-Norm, Sec. 3.1.2; without: SPADE")
    form: str = setting("paper", "of Eq. (5): see the table on top", ("paper", "eq5", "v1code"))
    smooth: bool = setting(False, "enlarge features bilinearly: ours, against stripes")
    gain: float = setting(0.02, "of Xavier's initial weights, SPADE's; 0: N(0, 0.02), V1's", COUNT)
    loud: bool = setting(False, "labels are seen in G's first images: ours, for short V1 runs")
    pg: bool = setting(False, "V1: progressive generation, three outputs, Sec. 4.1.1")
    lsca: bool = setting(False, "V1: spatial co-attention, Sec. 3.1.3")
    # The discriminators. D_3 judges the full image at three levels, D_2 half of it at two, D_1 a
    # quarter at one. Of each, the first layers are its own; VGG-16 is frozen and shared by all.
    discriminator: str = setting("hpd", "hierarchical and perceptual, Sec. 3.2.1; or SPADE's; "
                                 "none: G alone, to test it", ("hpd", "patch", "none"))
    d_width: int = setting(64, "channels after the first layer of D; released code", POSITIVE)
    d_norm: str = setting("both", "of D: released V1 instance, released V2 both",
                          ("instance", "spectral", "both"))
    scales: int = setting(2, "of D_3, D_2, D_1 the first so many, Sec. 5.2", (1, 2, 3))
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
    released_losses: bool = setting(False, "Eq. (28) at full size alone, (29) a sum over layers")
    s_width: int = setting(32, "channels after the first layer of S_i; released code", POSITIVE)
    s_size: int = setting(256, "S_i sees squares of so many pixels; released", Within((64, 4096)))
    # Training. Both players use Adam and take turns, one update each per batch. Half of the epochs
    # run at the full rate, then it falls in equal steps; the last epoch still learns.
    epochs: int = setting(200, "passes over the training set, Sec. 5.2", POSITIVE)
    decay: bool = setting(True, "the rate falls in the second half of the epochs, Sec. 5.2")
    steps: int = setting(0, "end after so many updates; 0: epochs decide", COUNT)
    batch_size: int = setting(20, "images per step and process, Sec. 5.2", POSITIVE)
    lr: float = setting(2e-4, "Adam's, all networks, Sec. 5.2", Within((1e-9, 0.9)))
    ttur: bool = setting(False, "half of it for G, twice for D; released V2")
    betas: tuple[float, float] = setting((0.0, 0.9), "Adam's; 0.5 0.999 in V1, Sec. 5.2", SHARE)
    seed: int = setting(0, "of initialisation, order, flips and z", COUNT)
    init: tuple[str, ...] = setting((), "start from these weights: ours, or the authors'")
    save_every: int = setting(0, "steps between checkpoints and grids; 0: an epoch", COUNT)
    # VGG, test time and evaluation. Two VGGs give features, and nobody trains them: VGG-16 inside D
    # and in Eq. (18), VGG-19 in Eq. (28). Without the download of their weights, "random" shows the
    # method, not its quality. z is drawn anew for every image. What batch norm should use at test
    # time is not in the paper: see test_time, and the table on top.
    vgg: str = setting("imagenet", "weights of VGG-16 and VGG-19: imagenet, random, or a file")
    vgg_width: int = setting(64, "64 is VGG; less with random weights, for small studies", POSITIVE)
    vgg16_raw: bool = setting(False, "VGG-16 sees [-1, 1], not ImageNet's mean and deviation: V1's")
    vgg19_raw: bool = setting(False, "VGG-19 sees [-1, 1], not ImageNet's mean and deviation: V2's")
    test_norm: str = setting("running", "batch norm at test: training's averages, or its own",
                             ("running", "image"))
    truncation: float = setting(1.0, "deviation of z at test time; released V1: 0.316", COUNT)
    inception: str = setting("", "evaluate: FID by Inception-V3, imagenet or a file; none: no FID")
    scorer_width: int = setting(64, "FCN-8s scorer: 64 is VGG-16; less for small studies", POSITIVE)
    scorer_steps: int = setting(2000, "ours: batches of four that the scorer trains on", POSITIVE)
    # The machine. None of these changes what is computed, but for the last bits.
    gpu: int | None = setting(None, "a CUDA device; -1: the CPU; none: the first", Within((-1, 99)))
    workers: int | None = setting(None, "data processes; none: 4 with a GPU", Within((0, 256)))
    precision: str = setting("fp32", "bf16: autocast around the networks", ("fp32", "bf16"))
    compile: bool = setting(False, "torch.compile the networks")
    channels_last: bool | None = setting(None, "memory order; none: with a GPU")
    out: str = setting("", "the run's folder; none: the next free runs/lab2pix-N")
    # One call. These say what to do now; a checkpoint's own do not matter later.
    preset: str = setting("", "a line of Sec. 5.2; none: toy with the streets")
    resume: bool = setting(False, "continue the run in --out, or the newest, exactly")
    checkpoint: tuple[str, ...] = setting((), "to test with, also the authors'; none: the newest")
    input: str = setting("", "a file or a folder of any size; none: the test split")
    instances: str = setting("", "the instance maps of --input, a file or a folder")
    output: str = setting("", "a file or a folder; none: test/ in the run's folder")
    samples: int = setting(1, "outputs per input, which differ by z", POSITIVE)

    def __post_init__(self):
        """Ranges first, then contradictions. Flags, presets and stored configs all pass here."""
        check_settings(self)
        v1, sketch = self.version == "V1", self.task != "labels"
        for wrong, why in (
                (not 4 + v1 <= self.ups <= 7 + v1, f"--ups {self.ups}: {4 + v1}..{7 + v1} here"),
                (self.s_size % 32, f"--s-size {self.s_size}: must be a multiple of 32"),
                (self.loud and not v1, "--loud is for V1; V2 is told by the photo itself"),
                (sketch and not v1, f"--task {self.task}: sketches are for --version V1"),
                (self.pg and not v1, "--pg is for V1; V2 has one output"),
                (self.lambda_3 and not self.pg, "--lambda-3 compares V1's three outputs: --pg"),
                (self.lambda_4 and not v1, "--lambda-4 is for V1; V2's D sees the label"),
                (v1 and self.lambda_5 + self.lambda_6, "--lambda-5 and --lambda-6 need the photo "
                 "of the same label, which V1 never sees"),
                (v1 and self.edges, "--edges: V1's segmentation could not find them again"),
                (v1 and self.first == "label", "--first label is V2's (SPADE)"),
                (self.lsca and not self.pg, "--lsca joins V1's three outputs: --pg"),
                (self.pg and self.scales != 3, f"--scales {self.scales}: --pg has three outputs"),
                (self.T != 1 and self.discriminator == "patch", f"--T {self.T}: the mask belongs "
                 "to --discriminator hpd; use --T 1"),
                (self.T != 1 and sketch, f"--T {self.T}: a sketch has no foreground; use --T 1"),
                (self.form == "v1code" and (self.dgnorm or not v1), "--form v1code is V1 without "
                 "DG-Norm: --version V1 --no-dgnorm")):
            if wrong:
                raise UserError(why)


# Sec. 5.2, what each version changes against the defaults above. V1 trains on one image at a time
# with the original, vanilla GAN loss and a weaker mask (T = 2). Its lambda_3 is small because Eq.
# (18) is a norm, a root of a sum over all positions, which is large by itself.
# SKETCH is V1 for sketches: squares, no mask, a constant rate, lambda_2 = 1 from the start. AT_256
# is V2 on COCO-Stuff and ADE20K.
VERSIONS = {
    "V1": dict(version="V1", edges=False, ups=7, gain=0.0, pg=True, lsca=True, scales=3,
               d_norm="instance", gan="vanilla", T=2.0, ramp=True, lambda_3=5e-6, lambda_4=10.0,
               lambda_5=0.0, lambda_6=0.0, epochs=100, batch_size=1, betas=(0.5, 0.999),
               test_norm="image"),
    "V2": dict(version="V2"),
    "V2-H": dict(version="V2-H", size=(512, 1024), ups=7, scales=3, batch_size=8)}
SKETCH = dict(size=(256, 256), ups=5, T=1.0, ramp=False, epochs=10, decay=False, batch_size=4)
AT_256 = dict(size=(256, 256), ups=5, jitter=True, batch_size=40, epochs=100)
PRESETS = {
    "V1-cityscapes": dict(version="V1"),
    "V1-facades": dict(version="V1", size=(256, 256)),
    "V1-edges2shoes": dict(version="V1", task="sketch"),
    "V1-edges2handbags": dict(version="V1", task="sketch"),
    "V2-cityscapes": dict(version="V2"),
    "V2-coco": dict(version="V2", **AT_256),
    "V2-ade20k": dict(version="V2", **AT_256),
    "V2-H-cityscapes": dict(version="V2-H"),
    # Ours, for the streets on a laptop's CPU: narrow networks, so Adam's steps may be larger. Adam
    # moves every weight by about lr, whatever the gradient; with few weights, a larger lr is needed
    # for the output to move as far. Spectral norm alone lets D see brightness and colour (`unit`).
    # The mask and the sharpness loss are as gentle as in V1. The first feature is made from the
    # label, as SPADE has it. Averages over batches of two are too rough for testing (`test_norm`).
    "toy": dict(size=(64, 128), limit=200, width=8, ups=4, noise=32, first="label", d_width=8,
                d_norm="spectral", gain=1.0, T=2.0, ramp=True, test_norm="image", vgg="random",
                vgg_width=8, lr=5e-4, batch_size=2, epochs=4, scorer_width=16, scorer_steps=600),
    # With so few steps V1 needs more help: see speak_up and unit. So much of the paper's objective
    # is changed in this preset that a run of it says so first. One trial changed three things at
    # once, and its pictures followed the label better: a wider S, which alone ties the picture to
    # the label (s_width), a larger weight of its loss (lambda_4), bilinear doublings (smooth).
    "toy-V1": dict(version="V1", size=(64, 128), limit=200, width=8, ups=5, noise=32, d_width=8,
                   gain=1.0, loud=True, smooth=True, d_norm="spectral", s_width=8, s_size=128,
                   gan="hinge", lambda_4=3.0, lr=4e-4, betas=(0.0, 0.9), vgg="random", vgg_width=8,
                   batch_size=2, epochs=12, scorer_width=16, scorer_steps=600),
}
# Ours, too: the same for half an hour, and for three quarters.
PRESETS["streets"] = PRESETS["toy"] | dict(limit=400, epochs=12, scorer_steps=1200)
PRESETS["streets-V1"] = PRESETS["toy-V1"] | dict(limit=400, epochs=20, scorer_steps=1200)
# The rows of Tables 1 and 2, each with what it adds to the row above it. Both begin with SPADE and
# end with the full method. The paper does not say which D the rows before HPD have; it is SPADE's
# here, on the image alone in V1. Optimiser and first feature are the same in all rows of a table.
ROWS = {
    "A_u": dict(version="V1", pg=False, lsca=False, lambda_3=0.0, discriminator="patch", scales=2,
                T=1.0, lambda_2=0.0, dgnorm=False),               # SPADE and cycle segmentation
    "B_u": dict(pg=True, scales=3), "C_u": dict(lsca=True), "D_u": dict(lambda_3=5e-6),
    "E_u": dict(discriminator="hpd"), "F_u": dict(T=2.0), "G_u": dict(lambda_2=1.0),
    "H_u": dict(dgnorm=True),                                     # Lab2Pix-V1
    "A_s": dict(version="V2", discriminator="patch", T=1.0, lambda_2=0.0, dgnorm=False),   # SPADE
    "B_s": dict(discriminator="hpd"), "C_s": dict(T=5.0), "D_s": dict(lambda_2=1.0),
    "E_s": dict(dgnorm=True)}                                     # Lab2Pix-V2
# A row's settings are those of all rows from the first of its table down to it.
ABLATIONS = {row: {k: v for above, changes in ROWS.items() if above[2] == row[2] and above <= row
                   for k, v in changes.items()} for row in ROWS}


def configure(preset: str = "", given: dict | None = None, **more) -> Config:
    """The settings of a version, then a preset's, then a row's of an ablation table, then `given`.

    Whatever comes later goes before. The version is the one that any of them asks for.

    configure("toy", ablation="A_u"), configure(version="V1"), configure("V2-coco", batch_size=8).
    """
    given = (given or {}) | more
    ablation = given.get("ablation", "")
    row = row_of(ABLATIONS, "--ablation", ablation)
    if preset in ("toy", "streets") and "V1" in (given.get("version"), row.get("version")):
        preset += "-V1"
    chosen = row_of(PRESETS, "--preset", preset)
    asked = {"--version": given, f"--preset {preset}": chosen, f"--ablation {ablation}": row}
    versions = [f"{name} {part['version']}" for name, part in asked.items() if "version" in part]
    version = (given | chosen | row).get("version", "V2")
    if any(not text.endswith(f" {version}") for text in versions):
        raise UserError(f"{', '.join(versions)}: these contradict each other")
    sketch = SKETCH if given.get("task", chosen.get("task", "labels")) != "labels" else {}
    all_of = VERSIONS.get(version, {}) | sketch | chosen | row | given | {"preset": preset}
    if all_of.get("lambda_2") == 0:             # there is nothing to rise
        all_of["ramp"] = False
    return Config(**all_of)


def check_size(cfg: Config) -> None:
    """The size at training time suits G, which doubles, and D, which halves.

    At test time any size does: see translate.
    """
    height, width = cfg.size
    unit = max(2 ** cfg.ups, 32)                # the deepest verdict of each D_i is at 1/32 of X_3
    check_sides("--size", cfg.size, unit, max(unit, 64),
                f"G has {cfg.ups} doublings, each discriminator up to five halvings")
    if height * width * cfg.batch_size == 4 ** cfg.ups:
        raise UserError(f"--size {height} {width}: the first feature of G would be one pixel, and "
                        "a normalised pixel is 0; use a larger --size or --batch-size")


# -------------------------------------------------------------------------------- 2 Networks
# m is M, one-hot labels or a sketch, (B, N, H, W) with n = N channels. d is the feature that the
# blocks of G hand on, d_t in the paper; h is H, the global feature, at the size that is asked for.
# What DG-Norm is guided by has `hidden` channels, 2 width. Feature maps change their size on the
# way: (B, C, ., .) where it varies. `form` says whose layers: the paper's, or with v1code those of
# the released V1, so that its weights load.

def instance_norm(c: int) -> nn.GroupNorm:
    """Each channel of each image to mean 0, variance 1; no parameters, no running averages.

    A group norm of one channel per group is the same, and also works on a map of one pixel.
    """
    return GroupNorm(c, c, affine=False)


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
        self.layers = nn.Sequential(nn.Conv2d(1, c[0], 5, 1, 2), instance_norm(c[0]), nn.ReLU())
        for c_in, c_out in zip(c, c[1:]):
            self.layers.extend([nn.Conv2d(c_in, c_out, 3, 2, 1), instance_norm(c_out), nn.ReLU()])

    def forward(self, m: Tensor) -> Tensor:
        return self.layers(m)


class GlobalEncoder(nn.Module):
    """Eq. (2): H = E_global(M), what no single pixel knows: the shapes around it (Sec. 3.1.2).

    M (B, N, H, W)  ->  `sizes` maps (B, 2 width, h 2^j, w 2^j), one for each size of block

    The paper speaks of "only one final result": one small map, enlarged to each size. The
    convolution after the enlarging is the release's. "Global" is wide, but not the whole image:
    after 7 convolutions a cell sees 129 x 129 pixels of M. With `smooth` (ours) the maps are
    enlarged after their convolution, bilinearly.
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

    A pixel of x becomes a square of factor x factor equal pixels. Inside this square, where the
    3 x 3 window covers equal pixels only, all results are equal, so one of them is enough. So it
    suffices to enlarge by 3, convolve, and repeat the middle one of every three rows and columns
    factor - 2 times.
    """
    if factor < 4:
        return conv(up(x, factor)) if factor > 1 else conv(x)
    x = conv(up(x, 3))
    for axis in (2, 3):
        first, middle, last = x.unflatten(axis, (-1, 3)).split(1, axis + 1)
        shape = [*middle.shape]
        shape[axis + 1] = factor - 2
        x = torch.cat([first, middle.expand(shape), last], axis + 1).flatten(axis, axis + 1)
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

    def __init__(self, c: int, n: int, hidden: int = 128, form: str = "paper"):
        super().__init__()
        self.form = form
        self.norm = instance_norm(c) if form == "v1code" else nn.BatchNorm2d(c)
        self.shared = nn.Conv2d(n, hidden, 3, 1, 1)
        self.gamma_beta = nn.Conv2d(hidden, 2 * c, 3, 1, 1)     # one convolution for both: faster

    def forward(self, e: Tensor, m: Tensor, h: Tensor | None = None) -> Tensor:
        guide = F.relu(self.shared(m))
        if h is not None:
            guide = guide + h
        gamma, beta = self.gamma_beta(guide).chunk(2, 1)                     # each (B, C, ., .)
        normed = self.norm(e)                                                # Eq. (3)
        if self.form == "eq5":
            return gamma * (normed + 1) + beta
        return (gamma if self.form == "v1code" else 1 + gamma) * normed + beta


class GenResBlk(nn.Module):
    """Generative residual block, Eq. (1): d' = G_rb(d, M); with H, Eq. (6): d' = G_rb*(d, M, H).

    d (B, c_in, ., .)  ->  (B, c_out, ., .), of the same size; G doubles it before or after.

    Twice normalise, activate, convolve; and a shortcut around it, which does not see H. Where the
    number of channels changes, the shortcut has a norm and a 1 x 1 convolution of its own. All
    convolutions have spectral norm: their weights are divided by their largest singular value.
    Released V1: instance norm, ReLU, no spectral norm, and where the widths agree no shortcut.
    """

    def __init__(self, c_in: int, c_out: int, n: int, hidden: int = 128, form: str = "paper"):
        super().__init__()
        self.v1, self.learned = form == "v1code", c_in != c_out
        c_mid = c_out if self.v1 else min(c_in, c_out)
        self.norm_0, self.norm_1 = DGNorm(c_in, n, hidden, form), DGNorm(c_mid, n, hidden, form)
        self.conv_0, self.conv_1 = nn.Conv2d(c_in, c_mid, 3, 1, 1), nn.Conv2d(c_mid, c_out, 3, 1, 1)
        if self.learned:                         # the shortcut has to change the width
            self.norm_s = DGNorm(c_in, n, hidden, form)
            self.conv_s = nn.Conv2d(c_in, c_out, 3 if self.v1 else 1, 1, int(self.v1), bias=self.v1)
        for name in ("conv_0", "conv_1", "conv_s")[:2 + self.learned]:
            if not self.v1:
                spectral_norm(getattr(self, name))

    def forward(self, d: Tensor, m: Tensor, h: Tensor | None = None) -> Tensor:
        act = F.relu if self.v1 else lambda x: F.leaky_relu(x, 0.2)
        shortcut = 0.0 if self.v1 else d
        if self.learned:
            shortcut = self.norm_s(d, m)
            shortcut = self.conv_s(F.relu(shortcut) if self.v1 else shortcut)
        d = self.conv_0(act(self.norm_0(d, m, h)))
        return shortcut + self.conv_1(act(self.norm_1(d, m, h)))


class LSCA(nn.Module):
    """Label-guided spatial co-attention, Eq. (7), Fig. 5: f_k = h'_(k-1) A_m + f_k (1 - A_m).

    coarse h_(k-1) (B, c_coarse, ., .), f (B, c, . 2, . 2), M of f's size  ->  (B, c, . 2, . 2)

    A_m, one number for each pixel, says where the feature of the stage before is good enough (road,
    sky) and is kept. It is made from both features and the label. The paper leaves LSCA out of V2,
    to save memory.
    Released V1: A_m from normalised features, and the label through a convolution of its own.
    """

    def __init__(self, c_coarse: int, c: int, n: int, form: str = "paper", mode: str = "nearest"):
        super().__init__()
        self.v1, self.mode = form == "v1code", mode
        self.merge = nn.Conv2d(c_coarse, c, 3, 1, 1)
        if self.v1:
            self.label, self.norm = nn.Conv2d(n, c, 3, 1, 1), instance_norm(c)
        self.mask = nn.Conv2d(2 * c + (c if self.v1 else n), 1, 3, 1, 1)

    def forward(self, coarse: Tensor, f: Tensor, m: Tensor) -> Tensor:
        coarse = self.merge(up(coarse, 2, self.mode))                        # h', of f's shape
        evidence = [coarse, f, m]
        if self.v1:
            coarse = F.relu(coarse)
            evidence = [self.norm(each) for each in (coarse, f, F.relu(self.label(m)))]
        a = torch.sigmoid(self.mask(torch.cat(evidence, 1)))                 # A_m, one channel
        return coarse * a + f * (1 - a)


def resize_label(m: Tensor, size: tuple[int, int], form: str = "paper") -> Tensor:
    """M (B, N, H, W) -> (B, N, *size): classes by nearest neighbour, a sketch (N = 1) by averages.

    Released V1: the maximum of the ids in each cell.
    """
    if m.shape[-2:] == size:
        return m
    if m.shape[1] == 1:
        return F.adaptive_avg_pool2d(m, size)
    if form == "v1code":
        ids = F.adaptive_max_pool2d(m.argmax(1, keepdim=True).float(), size)[:, 0].long()
        return F.one_hot(ids, m.shape[1]).movedim(-1, 1).to(m.dtype).contiguous()
    return F.interpolate(m, size, mode="nearest")


def first_feature(start: nn.Linear, z: Tensor, trained: tuple[int, int],
                  size: tuple[int, int]) -> Tensor:
    """f_z: a fully connected layer on z, reshaped to (B, C, *size) (Sec. 3.1.1).

    The layer makes a map for the size of training; for an image of another size it is stretched.
    """
    f = start(z).unflatten(1, (-1, *trained))
    return f if trained == size else F.interpolate(f, size, mode="nearest")


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

    def __init__(self, n: int, size: tuple[int, int] = (256, 512), width: int = 64, ups: int = 7,
                 noise: int = 128, sketch: bool = False, dgnorm: bool = True, pg: bool = True,
                 lsca: bool = True, form: str = "paper", smooth: bool = False):
        super().__init__()
        self.form, self.multiple = form, 2 ** ups
        self.mode = "bilinear" if smooth else "nearest"
        self.trained = tuple(side // 2 ** ups for side in size)
        out = [width * min(2 ** (ups - 1 - i), 16) for i in range(ups)]      # 1024 1024 1024 512 ..
        c_z = width if sketch else 16 * width
        self.encoder = SketchEncoder(width, ups) if sketch else None
        self.start = None                                                    # released: z unused
        if not (sketch and form == "v1code"):
            self.start = nn.Linear(noise, c_z * math.prod(self.trained))
        c = [16 * width + (width if sketch and self.start is not None else 0), *out]
        self.globe = GlobalEncoder(n, width, ups + 1, ups, smooth) if dgnorm else None
        self.blocks = nn.ModuleList(GenResBlk(*pair, n, 2 * width, form) for pair in zip(c, out))
        self.lsca = nn.ModuleList(LSCA(c[k], out[k], n, form, self.mode)
                                  for k in range(ups - 3, ups) if lsca)
        self.heads = nn.ModuleList(nn.Conv2d(c_out, 3, 3, 1, 1) for c_out in
                                   (out[-3:] if pg else out[-1:]))

    def forward(self, z: Tensor, m: Tensor) -> list[Tensor]:
        size = tuple(side // self.multiple for side in m.shape[-2:])         # 2 x 4 at 256 x 512
        parts = [] if self.encoder is None else [self.encoder(m)]
        if self.start is not None:
            parts.append(first_feature(self.start, z, self.trained, size))
        d, stages = torch.cat(parts, 1), len(self.blocks)                    # (B, 1024, *size)
        h = self.globe(m) if self.globe is not None else [None] * stages     # H for each block
        labels = [resize_label(m, (size[0] << k, size[1] << k), self.form)
                  for k in range(stages + 1)]
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
    """

    def __init__(self, n: int, size: tuple[int, int] = (256, 512), width: int = 64, ups: int = 6,
                 noise: int = 128, first: str = "noise", dgnorm: bool = True, form: str = "paper",
                 smooth: bool = False):
        super().__init__()
        self.first, self.multiple = first, 2 ** ups
        self.mode = "bilinear" if smooth else "nearest"
        self.trained = tuple(side // 2 ** ups for side in size)
        out = [width * f for f in (16, 16, 16, 8, 4, 2, 1)] + [width // 2] * (ups == 7)
        self.doubles = [False, ups > 4, ups > 5] + [True] * (len(out) - 3)   # before each block
        self.start = nn.Conv2d(n, 16 * width, 3, 1, 1) if first == "label" else (
            nn.Linear(noise, 16 * width * math.prod(self.trained)))
        self.globe = GlobalEncoder(n, width, ups + 1, ups + 1, smooth) if dgnorm else None
        self.blocks = nn.ModuleList(GenResBlk(c_in, c_out, n, 2 * width, form)
                                    for c_in, c_out in zip([16 * width, *out], out))
        self.head = nn.Conv2d(out[-1], 3, 3, 1, 1)

    def forward(self, z: Tensor, m: Tensor) -> list[Tensor]:
        size = tuple(side // self.multiple for side in m.shape[-2:])         # 4 x 8 at 256 x 512
        if self.first == "label":
            d = self.start(resize_label(m, size))                            # (B, 1024, *size)
        else:
            d = first_feature(self.start, z, self.trained, size)
        h, k = self.globe(m) if self.globe is not None else None, 0          # k doublings so far
        for block, double in zip(self.blocks, self.doubles):
            if double:
                d, k = up(d, 2, self.mode), k + 1
            d = block(d, resize_label(m, d.shape[-2:]), None if h is None else h[k])
        return [torch.tanh(self.head(F.leaky_relu(d, 0.2)))]


def unit(c_in: int, c_out: int, kernel: int = 3, stride: int = 1,
         norm: str = "both") -> list[nn.Module]:
    """Convolution, spectral norm on it, instance norm or both, LeakyReLU. With both, no bias.

    Spectral norm bounds how fast D's verdict can change with the image; the paper does not mention
    it, the released V2 has it. Instance norm hides from D how bright and how colourful an image is,
    since it rescales all that the convolution finds; in V2 the other losses see to that. Spectral
    norm alone (ours) does not hide it.
    """
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=norm != "both")
    layers = [conv if norm == "instance" else spectral_norm(conv)]
    return layers + [instance_norm(c_out)] * (norm != "spectral") + [nn.LeakyReLU(0.2)]


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
        ->  [[D^l (B, 1, H/2^(l+2), W/2^(l+2)) for l = 1..levels], features for Eq. (29)]

    Above is the main branch; `line` are the mini-inception blocks. Below is the perceptual branch,
    the frozen VGG-16, which tells every level what it makes of the image. In V2 x is the image with
    its label (Eq. (22)); VGG-16 sees the image alone. A verdict is a map of logits, one for each
    region of the image; the sigmoid of the vanilla loss is in the losses.
    Features are what the layers of the main branch give; the verdicts and VGG's are not among them.
    """

    def __init__(self, c_in: int, levels: int = 3, width: int = 64, norm: str = "both",
                 vgg_width: int = 64):
        super().__init__()
        c, c_taps = 8 * width, [vgg_width * f for f in (4, 8, 8)]
        first = unit(c_in, width, 3, 2, norm) if norm == "instance" else (
            [nn.Conv2d(c_in, width, 3, 2, 1), nn.LeakyReLU(0.2)])
        self.common = nn.ModuleList([nn.Sequential(*first)] + [
            nn.Sequential(*unit(width * f, width * 2 * f, 3, 2, norm)) for f in (1, 2)])

        def settle(c: int) -> list[nn.Module]:      # released V1: without a convolution
            return unit(c, c, 3, 1, norm) if norm != "instance" else (
                [instance_norm(c), nn.LeakyReLU(0.2)])

        self.pre, self.join, self.out = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.line = nn.ModuleList(MiniInception(c, norm) for _ in range(levels - 1))
        for level, c_tap in enumerate(c_taps[:levels]):
            self.pre.append(nn.Sequential(*settle(c_tap)))
            c_main = 4 * width if level == 0 else c
            self.join.append(nn.Sequential(*unit(c_main + c_tap, c, 3, 1, norm)))
            self.out.append(nn.Sequential(*settle(c), nn.Conv2d(c, 1, 5, 1, 2)))

    def forward(self, x: Tensor, vgg: dict[str, Tensor]) -> list[list[Tensor]]:
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
        return [verdicts, features]


class PatchDiscriminator(nn.Module):
    """SPADE's discriminator, for the rows of the tables before HPD: one level, no VGG.

    Four convolutions of 4 x 4, three of them with stride 2, and a fifth that makes the verdicts.
    `vgg` is taken and not used, so that both kinds of D are called alike.

    x (B, c_in, H, W)  ->  [[logits (B, 1, about H/8, W/8)], four features]
    """

    def __init__(self, c_in: int, width: int = 64):
        super().__init__()
        c = [width * f for f in (1, 2, 4, 8)]
        self.layers = nn.ModuleList([nn.Sequential(nn.Conv2d(c_in, width, 4, 2, 2),
                                                   nn.LeakyReLU(0.2))])
        for c_in, c_out, stride in zip(c, c[1:], (2, 2, 1)):
            conv = nn.Conv2d(c_in, c_out, 4, stride, 2, bias=False)
            self.layers.append(nn.Sequential(spectral_norm(conv), instance_norm(c_out),
                                             nn.LeakyReLU(0.2)))
        self.last = nn.Conv2d(c[-1], 1, 4, 1, 2)

    def forward(self, x: Tensor, vgg: dict[str, Tensor]) -> list[list[Tensor]]:
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return [[self.last(x)], features]


class Discriminators(nn.Module):
    """D_3, D_2, D_1 for X_3, X_2, X_1, Eq. (8) and (23), as one module: the largest image first.

    [x of each scale], [VGG-16's features of each image]  ->  for each scale [verdicts, features]
    D_3 has three levels, D_2 two and D_1 one: small images have little that is of a high level.
    They share no weights, and their losses are added. V2 has D_3 and D_2, V2-H and V1 all three.
    """

    def __init__(self, c_in: int, scales: int = 3, width: int = 64, kind: str = "hpd",
                 norm: str = "both", vgg_width: int = 64):
        super().__init__()
        self.scales = nn.ModuleList(
            PatchDiscriminator(c_in, width) if kind == "patch" else
            PerceptualDiscriminator(c_in, 3 - k, width, norm, vgg_width) for k in range(scales))

    def forward(self, xs: list[Tensor], vgg: list[dict[str, Tensor]]) -> list:
        return [judge(*each) for judge, *each in zip(self.scales, xs, vgg)]


def normed(c_in: int, c_out: int, kernel: int = 3, stride: int = 1,
           dilation: int = 1) -> list[nn.Module]:
    """Convolution, batch norm, ReLU; keeps the size but for the stride."""
    padding = dilation * (kernel // 2)
    return [nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation), nn.BatchNorm2d(c_out),
            nn.ReLU()]


class Bottleneck(nn.Module):
    """ICNet's residual block: 1 x 1, 3 x 3, 1 x 1, each with batch norm, around a skip.

    The 1 x 1 convolutions make the channels few for the 3 x 3 one, and many again. A dilation lets
    the 3 x 3 see further without another halving.
    """

    def __init__(self, c_in: int, c_mid: int, c_out: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.branch = nn.Sequential(
            *normed(c_in, c_mid, 1, stride), *normed(c_mid, c_mid, 3, 1, dilation),
            *normed(c_mid, c_out, 1)[:-1])
        self.skip = nn.Identity() if c_in == c_out else (
            nn.Sequential(*normed(c_in, c_out, 1, stride)[:-1]))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.branch(x))


class ICNet(nn.Module):
    """Segmentation network S_i (Sec. 4.1.2): three branches at full, half and quarter size.

    X (B, 3, any size)  ->  logits (B, classes, 256, 256). The input is first resized to 256 x 256.

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
            nn.AvgPool2d(2), *normed(3, c, 3, 2), *normed(c, c), *normed(c, 2 * c),
            nn.MaxPool2d(3, 2, 1), Bottleneck(2 * c, c, 4 * c),
            *(Bottleneck(4 * c, c, 4 * c) for _ in range(2)),
            Bottleneck(4 * c, 2 * c, 8 * c, 2))                              # (B, 256, 16, 16)
        self.sub_4 = nn.Sequential(
            nn.AvgPool2d(2), *(Bottleneck(8 * c, 2 * c, 8 * c) for _ in range(3)),
            *(Bottleneck(16 * c if i else 8 * c, 4 * c, 16 * c, 1, 2) for i in range(6)),
            *(Bottleneck(32 * c if i else 16 * c, 8 * c, 32 * c, 1, 4) for i in range(3)))
        self.reduce = nn.Sequential(*normed(32 * c, 8 * c, 1))
        self.up_4 = nn.Sequential(*normed(8 * c, 4 * c, 3, 1, 2)[:-1])
        self.side_2 = nn.Sequential(*normed(8 * c, 4 * c, 1)[:-1])
        self.up_2 = nn.Sequential(*normed(4 * c, 4 * c, 3, 1, 2)[:-1])
        self.sub_1 = nn.Sequential(
            *normed(3, c, 3, 2), *normed(c, c, 3, 2), *normed(c, 2 * c, 3, 2),
            *normed(2 * c, 4 * c, 1)[:-1])                                   # (B, 128, 32, 32)
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


def speak_up(generator: nn.Module, segmenter: nn.Module | None) -> None:
    """Initial weights with which G's first images show the label, pale on grey. Ours, for V1.

    In V1 only S ties the image to the label, and S teaches nothing before it can tell where the
    label is; with the usual weights z decides most of what is seen. So DG-Norm's guide is
    strengthened, and z weakened: its layer starts at 0, and the gain of the batch norm that follows
    at 0.1, since batch norm gives any f_z unit size, however small. S starts from "nothing known":
    a random S sends G to random, glaring colours, from which D does not bring it back.
    """
    with torch.no_grad():
        for module in generator.modules():
            if isinstance(module, DGNorm):
                module.shared.weight.mul_(10)
                module.gamma_beta.weight.mul_(3)
        if generator.start is not None:
            generator.start.weight.zero_()
            norm = generator.blocks[0].norm_0.norm
            if norm.affine:
                norm.weight.fill_(0.1)
        for head in generator.heads:
            head.weight.mul_(0.1)
        for each in segmenter.scales if segmenter is not None else ():
            each.out.weight.zero_()


# ---------------------------------------------------------------------------------- 3 Losses
# `judged` is what Discriminators return: for each D_i [verdicts of its levels, its features].

# The foreground of the released code. Of Cityscapes: poles, lights, signs, people, vehicles, number
# plates, and wall, fence and terrain; in V1 also ego vehicle, rail track and vegetation. Of ADE20K
# and COCO-Stuff the background is listed, ids from 0 (wall) and, in COCO's own counting, from 1.
FOREGROUND, MORE_IN_V1 = {12, 13, 17, 18, 19, 20, 22, *range(24, 35)}, {1, 10, 21}
ADE20K_BACKGROUND = {*range(7), 9, 11, 13, 16, 17, 21, 25, 26, 29, 32, 46, 48, 51, 52, 54, 60, 61,
                     68, 69, 81, 91, 94, 101, 128}
COCO_BACKGROUND = {*range(114, 119), 124, 126, 127, 128, 135, 136, 144, 145, 147, 148, 149, 151,
                   154, 155, *range(157, 163), 164, *range(169, 179), 182}


def foreground_classes(classes: str, version: str = "V2") -> list[int]:
    """Ids of a data set's foreground; unknown pixels are background.

    Of data that the releases do not know, classes of the same names as V2's in Cityscapes, and what
    its own table calls things.
    """
    if classes == "cityscapes":
        return sorted(FOREGROUND | (MORE_IN_V1 if version == "V1" else set()))
    table, ids = class_table(classes), set(range(len(class_table(classes).names)))
    if classes == "ade20k":
        return sorted(ids - ADE20K_BACKGROUND)
    if classes == "coco_stuff":
        return sorted(ids - {k - 1 for k in COCO_BACKGROUND})
    names = {class_table("cityscapes").names[k] for k in FOREGROUND} | table.things
    return [k for k, name in enumerate(table.names) if name in names]


def foreground_mask(label: Tensor, classes: str, T: float, version: str = "V2") -> Tensor:
    """Eq. (9): M_en (B, 1, H, W), P on background and T P on foreground, with mean 1 per image.

    P = (A + B) / (T A + B) for A pixels of foreground and B of background. With a mean of 1, D can
    weigh fakes by it although real photos have no mask in V1. Small things, people or signs, fill
    few pixels; without it, D and G would hardly care about them (Sec. 3.2.1).
    """
    ids = torch.tensor(foreground_classes(classes, version), device=label.device)
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


def hierarchical(judged: list, loss: Callable, w: Tensor | None = None) -> Tensor:
    """What Eq. (10), (12), (13) share: sum_i 1/(sum_l lambda_il) sum_l lambda_il E[loss(D_i^l)].

    lambda_il is 1, 1/2, 1/4: the finest level weighs most, and each discriminator as much as every
    other.
    """
    total = 0.0
    for verdicts, _ in judged:
        weights = [0.5 ** level for level in range(len(verdicts))]           # Eq. (14)
        terms = [k * expectation(loss(q), w) for k, q in zip(weights, verdicts)]
        total = total + sum(terms) / sum(weights)
    return total


def generator_loss(fake: list, gan: str, w: Tensor | None = None) -> Tensor:
    """Eq. (10) and (24), L_1^G: -log D(X) from logits (vanilla), or -D(X) (hinge).

    Paper: L_adv^R, D's own loss on real images, for both. With hinge that would stop teaching G
    wherever D is fooled by a margin.
    """
    return hierarchical(fake, (lambda q: -q) if gan == "hinge" else (lambda q: F.softplus(-q)), w)


def fake_loss(fake: list, gan: str, w: Tensor | None = None) -> Tensor:
    """Eq. (12) and (26), L_1^D(X)_F: -log(1 - D(X)), or max(0, 1 + D(X))."""
    return hierarchical(fake, (lambda q: F.relu(1 + q)) if gan == "hinge" else F.softplus, w)


def real_loss(real: list, gan: str, w: Tensor | None = None) -> Tensor:
    """Eq. (13) and (27), L_1^D(Y)_R: -log D(Y), or max(0, 1 - D(Y)); W in V2 alone."""
    return hierarchical(real, (lambda q: F.relu(1 - q)) if gan == "hinge" else
                        (lambda q: F.softplus(-q)), w)


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
    the sum of squares of one image, as printed; hence lambda_3 = 5e-6. Mean over the batch.
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
    they are: after ten steps of toy, the gradient of relu5_1 pointed nowhere (its cosine with the
    gradient of a pixel-wise L1 was -0.03, that of relu1_1 0.67). So, ours: with --vgg random the
    weights are taken in reverse.
    """
    return sum(weight * (x[name] - y[name]).abs().mean()
               for x, y in zip(fake, real) for name, weight in zip(VGG_LAYERS, weights))


def feature_matching_loss(fake: list, real: list, released: bool = False) -> Tensor:
    """Eq. (29), L_v2_6: sum_i 1/k sum_k || D_i^(k)(X*) - D_i^(k)(Y*) ||_1; the verdicts excluded.

    Released code: the sum over layers, the mean over discriminators.
    """
    total = 0.0
    for (_, ours), (_, theirs) in zip(fake, real):
        terms = [(x - y.detach()).abs().mean() for x, y in zip(ours, theirs)]
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


def channels(cfg: Config) -> int:
    """N, those of M: one of a sketch, or one per class and, in V2, one of the instances' edges.

    Pixels of unknown class have a channel of their own, where the data set has such pixels.
    """
    return 1 if cfg.task != "labels" else class_table(cfg.classes).channels + cfg.edges


def networks(cfg: Config) -> tuple[nn.Module, Discriminators | None, Segmenters | None]:
    """G, D and S. D sees the label in V2 alone, Eq. (22); S exists in V1 alone, Eq. (19).

    G's first feature is made for one size. That is the size of training, which a checkpoint keeps
    as z_size; so a network still fits when it is asked for images of another size.
    """
    n, v1, size = channels(cfg), cfg.version == "V1", cfg.z_size or cfg.size
    if v1:
        generator = GeneratorV1(n, size, cfg.width, cfg.ups, cfg.noise, cfg.task != "labels",
                                cfg.dgnorm, cfg.pg, cfg.lsca, cfg.form, cfg.smooth)
    else:
        generator = GeneratorV2(n, size, cfg.width, cfg.ups, cfg.noise, cfg.first, cfg.dgnorm,
                                cfg.form, cfg.smooth)
    discriminator, segmenter = None, None
    if cfg.discriminator != "none":
        discriminator = Discriminators(3 if v1 else n + 3, cfg.scales, cfg.d_width,
                                       cfg.discriminator, cfg.d_norm, cfg.vgg_width)
    if cfg.lambda_4:                            # a sketch has two classes: ink and blank
        segmenter = Segmenters(2 if cfg.task != "labels" else n, 3 if cfg.pg else 1, cfg.s_width,
                               cfg.s_size)
    for net in (generator, discriminator, segmenter):
        if net is not None:
            initialise(net, cfg.gain)
    if cfg.loud:
        speak_up(generator, segmenter)
    return generator, discriminator, segmenter


def frozen_vgg(layers: tuple[str, ...], depth: int, cfg: Config, device: torch.device) -> nn.Module:
    """VGG features that nobody trains, once for all discriminators and losses that want them.

    Each D_i has a VGG-16 of its own in the releases; all are equal, so one does for all.
    """
    raw = cfg.vgg16_raw if depth == 16 else cfg.vgg19_raw
    vgg = common.VGGFeatures(layers, depth, cfg.vgg, not raw, width=cfg.vgg_width)
    return dress(vgg, cfg, device)


def build(cfg: Config, device: torch.device) -> State:
    """Networks and optimisers; precision, compilation and distribution go around the networks.

    S is in G's optimiser, since both are net_1 (Sec. 4.1.3): the same losses train them.
    """
    torch.manual_seed(cfg.seed)
    nets = [net and dress(net, cfg, device) for net in networks(cfg)]
    layers = (TAPS if cfg.discriminator == "hpd" else ()) + (
        CONSISTENCY_LAYERS if cfg.lambda_3 else ())
    vgg16 = frozen_vgg(layers, 16, cfg, device) if layers else None
    vgg19 = frozen_vgg(VGG_LAYERS, 19, cfg, device) if cfg.lambda_5 else None
    generator, discriminator, segmenter = nets
    adam = [torch.optim.Adam(trained(*some), cfg.lr, cfg.betas, fused=True) if some[0] else None
            for some in ((generator, segmenter), (discriminator,))]
    for optimiser in filter(None, adam):
        optimiser.register_step_pre_hook(average_gradients)
    state = State(*nets, vgg16, vgg19, *adam)
    if cfg.init:
        load(state, read(*cfg.init), " ".join(cfg.init))
    return state


def trained(*nets: nn.Module | None) -> list[nn.Parameter]:
    """The parameters of networks, in the order in which an optimiser holds them."""
    return [p for net in nets if net is not None for p in net.parameters()]


def sketch_of(image: Tensor) -> Tensor:
    """An edge map (B, 1, H, W) of photos, ink -1 on paper 1, where no sketches are given. Ours.

    The paper's shoes and handbags come with sketches. For other photos: Sobel's gradient of the
    grey image, smoothed 3 x 3; the steepest eighth of the pixels is ink.
    """
    grey = F.avg_pool2d(F.pad(image.mean(1, keepdim=True), (2, 2, 2, 2), mode="replicate"), 3, 1)
    sobel = grey.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])[None, None]
    steep = F.conv2d(grey, sobel).square() + F.conv2d(grey, sobel.mT).square()
    ink = steep > steep.flatten(1).quantile(7 / 8, 1)[:, None, None, None].clamp(min=1e-3)
    return 1 - 2 * ink.float()


def make_pair(batch: dict, cfg: Config) -> dict:
    """A batch of common.Dataset with "input" M (B, N, H, W) added, and with T > 1 its "mask" M_en.

    Labels are one-hot, in V2 with the edges of instances, which the paper does not mention and the
    release feeds. A sketch has one channel, ink -1, and its "label" (for S) says where the ink is.
    The mask is made here, at full size; every level of every D_i averages it to its own.
    """
    if cfg.task != "labels":
        m = batch["input"].mean(1, keepdim=True) if "input" in batch else sketch_of(batch["image"])
        return batch | {"input": m, "label": (m[:, 0] < 0).long()}
    m = F.one_hot(batch["label"], class_table(cfg.classes).channels).movedim(-1, 1).float()
    if cfg.edges:
        m = torch.cat([m, boundary_map(batch["instance"])], 1)
    batch = batch | {"input": m.contiguous()}
    if cfg.T != 1:
        batch["mask"] = foreground_mask(batch["label"], cfg.classes, cfg.T, cfg.version)
    return batch


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
    return (step_v1 if cfg.version == "V1" else step_v2)(state, batch, cfg)


def step_v1(state: State, batch: dict, cfg: Config) -> dict[str, Tensor]:
    """Eq. (20), Fig. 7: M and Y have nothing to do with each other. Returns the paper's losses.

        z, M -> G -> X_i -> S_i -> is it M?  Eq. (19)      X_(i+1), halved, is like X_i?  Eq. (18)
                      |
                      v
        Y_i, Y_i^f -> D_i -> a photo, and sharp?  Eq. (15), (16)

    Eq. (15) is one sum of both players' losses, but no player can minimise the other's: G lowers
    L^G, D lowers L^D. Both parts are made of one pass of G and D, before either update; `inputs`
    says whose gradients each backward pass makes. S_i is trained with G, on generated images only,
    since V1 has no photo whose label is known.
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
    objective = losses["g_adv"]
    if cfg.lambda_3:
        halved = [F.avg_pool2d(x, 2) for x in xs[:2]]                        # P_2(X_3), P_2(X_2)
        losses["g_con"] = consistency_loss(features[1:], perceive(state.vgg16, halved))
        objective = objective + cfg.lambda_3 * losses["g_con"]
    if cfg.lambda_4:
        losses["g_seg"] = cycle_segmentation_loss(S(xs if cfg.pg else xs[:1]), batch["label"])
        objective = objective + cfg.lambda_4 * losses["g_seg"]
    state.opt_g.zero_grad(set_to_none=True)
    objective.backward(inputs=trained(G, S), retain_graph=True)

    # net_2, D_i: photos, generated images (judged above), blurred photos. Blurred ones are fakes to
    # D, so that it learns to look at sharpness, and G must be sharp (Sec. 3.2.2).
    ys = pyramid(y, cfg.scales, cfg)                                         # Y_3, Y_2, Y_1
    softs = [blur(each) for each in ys]                                      # Y_3^f, Y_2^f, Y_1^f
    with parametrize.cached():                  # one D for both: its spectral norms, found once
        real = D(ys, perceive(state.vgg16, ys))
        blurred = D(softs, perceive(state.vgg16, softs)) if cfg.lambda_2 or cfg.ramp else None
    losses["d_real"] = real_loss(real, cfg.gan)                              # Eq. (13)
    losses["d_fake"] = fake_loss(fake, cfg.gan, w)                           # Eq. (12)
    objective = discriminator_loss(losses["d_real"], losses["d_fake"])       # Eq. (11)
    if blurred is not None:
        losses["d_blur"] = fake_loss(blurred, cfg.gan)      # Y^f has no label here, so no mask
        objective = objective + cfg.lambda_2 * sharpness_loss(losses["d_real"], losses["d_blur"])
    state.opt_d.zero_grad(set_to_none=True)
    objective.backward(inputs=trained(D))
    state.opt_g.step()
    state.opt_d.step()
    return {name: loss.detach() for name, loss in losses.items()}


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
    objective = losses["g_adv"]
    if cfg.lambda_5:
        k = 1 if cfg.released_losses else n
        weights = LAMBDA_M[::-1] if cfg.vgg == "random" else LAMBDA_M
        losses["g_vgg"] = perceptual_loss(perceive(state.vgg19, xs[:k]),
                                          perceive(state.vgg19, ys[:k]), weights)      # Eq. (28)
        objective = objective + cfg.lambda_5 * losses["g_vgg"]
    if cfg.lambda_6:
        real = D(with_label(ys, ms), vgg_y)
        losses["g_fm"] = feature_matching_loss(fake, real, cfg.released_losses)        # Eq. (29)
        objective = objective + cfg.lambda_6 * losses["g_fm"]
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
    losses["d_real"] = real_loss(real, cfg.gan, w)                           # Eq. (27)
    losses["d_fake"] = fake_loss(fake, cfg.gan, w)                           # Eq. (26)
    objective = discriminator_loss(losses["d_real"], losses["d_fake"])       # Eq. (25)
    if blurred is not None:
        losses["d_blur"] = fake_loss(blurred, cfg.gan, w)
        objective = objective + cfg.lambda_2 * sharpness_loss(losses["d_real"], losses["d_blur"])
    state.opt_d.zero_grad(set_to_none=True)
    objective.backward()
    state.opt_d.step()
    return {name: loss.detach() for name, loss in losses.items()}


def learning_rates(cfg: Config, epoch: int) -> tuple[float, float]:
    """Of G and of D: constant for half the epochs, then down in equal steps; the last is not 0.

    Paper: "decay to 0" (Sec. 5.2), which would be reached one epoch after the end.
    """
    falling = cfg.epochs // 2 if cfg.decay else 0
    rate = cfg.lr * (1 - max(0, epoch - (cfg.epochs - falling)) / max(falling, 1))
    return (rate / 2, 2 * rate) if cfg.ttur else (rate, rate)


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


# The authors' names of layers -> ours, applied one after the other to every key. First those of
# V2 and of SPADE, which share a code base; from _fusion on those of V1.
RELEASED = (
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
    (r"^encoder\.model", "encoder.layers"))


def rename_released(stored: dict, path: Path) -> dict:
    """The authors' generators, of V1 and of V2, and SPADE's, under our names.

    Two convolutions for gamma and beta become one. Batch norms without gamma_BN, beta_BN get 1, 0.
    Of ADE20K's 151 channels, unknown pixels have the first there, the last here.
    """
    if not {"noise_process.weight", "conv_img.weight"} & stored.keys():
        raise UserError(f"{path}: no checkpoint of {NAME}.py and no released generator; its first "
                        f"key is {next(iter(stored), 'missing')}")
    blocks = [b for b in ("head_0", "G_middle_0", "G_middle_1", *(f"up_{k}" for k in range(5)),
                          *(f"SPADEResBlock_{k}" for k in range(1, 8)))
              if any(k.startswith(b + ".") for k in stored)]
    sizes = len({k.split(".")[2] for k in stored if k.startswith("fpencoder.model_up")})
    # Sketches: the release computes a first feature of z and does not use it; it is left out.
    sketch, named = "encoder.model.0.weight" in stored, {}
    ade20k = stored.get("head_0.norm_0.mlp_shared.0.weight", torch.empty(0, 0)).shape[1] == 151
    for key, value in stored.items():
        block = key.split(".")[0]
        if sketch and block == "noise_process":                     # computed, then not used
            continue
        if block in blocks:
            key = key.replace(block, f"blocks.{blocks.index(block)}", 1)
        if key.startswith("fpencoder.model_up"):                    # theirs: largest factor first
            j, kind = key.split(".")[2], key.split(".")[-1]
            key = f"globe.enlarged.{sizes - 1 - int(j)}.{kind}"
        for pattern, name in RELEASED:
            key = re.sub(pattern, name, key)
        if ade20k and value.numel() == 151 * 9:
            value = value.view(151, 9).roll(-1, 0).flatten()        # spectral norm's v
        elif ade20k and value.ndim == 4 and value.shape[1] == 151:
            value = value.roll(-1, 1)
        named[key] = value
    for key in [k for k in named if re.search(r"mlp_gamma|mul_conv", k)]:
        beta = named.pop(key.replace("mlp_gamma", "mlp_beta").replace("mul_conv", "add_conv"))
        both = torch.cat([named.pop(key), beta])
        named[re.sub("mlp_gamma|mul_conv", "gamma_beta", key)] = both
    for key in [k for k in named if k.endswith("running_mean")]:
        named.setdefault(key.replace("running_mean", "weight"), torch.ones_like(named[key]))
        named.setdefault(key.replace("running_mean", "bias"), torch.zeros_like(named[key]))
    return {"generator": named}


# N, the channels of M, tells of which data set a released generator is: (classes, edges).
# Cityscapes has 35 ids, ADE20K 150 and unknown, COCO-Stuff 182 and unknown; edges add one.
RELEASED_DATA = {35: ("cityscapes", False), 36: ("cityscapes", True), 151: ("ade20k", False),
                 183: ("coco_stuff", False), 184: ("coco_stuff", True)}


def released_config(stored: dict, given: dict) -> dict:
    """The settings that the authors' generator has, read off the shapes of its weights.

    The number of channels of M tells the data set, and that the size it was trained at. --classes
    and --ups say otherwise.
    """
    weights = stored["generator"]
    hidden, n = weights["blocks.0.norm_0.shared.weight"].shape[:2]
    blocks = len({k.split(".")[1] for k in weights if k.startswith("blocks")})
    sizes = sum(k.startswith("globe.enlarged") and k.endswith("bias") for k in weights)
    classes, edges = RELEASED_DATA.get(n, (str(n - 1), False))
    found = dict(width=hidden // 2, dgnorm=sizes > 0, classes=classes, edges=edges)
    if "heads.0.weight" in weights:
        found |= VERSIONS["V1"] | dict(form="v1code", ups=blocks, edges=False)
        if n == 1:
            return found | SKETCH | dict(task="sketch", ups=blocks, classes="")
        area, noise = len(weights["start.weight"]) // (8 * hidden), weights["start.weight"].shape[1]
        side = max(k for k in range(1, area) if area % k == 0 and k * k <= area)
        return found | dict(noise=noise, z_size=(side << blocks, area // side << blocks))
    # SPADE's own has 6 doublings at 256 x 512, 5 at 256 x 256, and one block more at 512 x 1024.
    ups = sizes - 1 if sizes else 7 if blocks == 8 else 6 if classes == "cityscapes" else 5
    return found | dict(ups=ups, first="label" if weights["start.weight"].ndim == 4 else "noise")


# -------------------------------------------------------------------------------- 5 Sampling

@torch.no_grad()
def translate(generator: nn.Module, z: Tensor, m: Tensor) -> Tensor:
    """X_3 for maps of any size: (B, noise), (B, N, H, W) -> (B, 3, H, W).

    Sides are mirrored up to the next multiple of 2^ups, at least two (of one pixel, a norm leaves
    nothing), and the result is cropped. One image at a time: none depends on its neighbours.
    """
    height, width = m.shape[-2:]
    padded = common.mirror_pad(m, generator.multiple, 2 * generator.multiple)
    images = [generator(z[k:k + 1], padded[k:k + 1])[0] for k in range(len(m))]
    return torch.cat(images)[..., :height, :width]


def test_time(state: State, cfg: Config) -> nn.Module:
    """A copy of G for test time: which statistics its batch norms use is --test-norm's to say.

    V2 trains with batches, and averages of training stand for them, as in SPADE. V1 trains on one
    image at a time, with that image's own statistics; so it does at test time, as its release does,
    where batch norm is instance norm.
    A copy, since synchronised batch norm must not be entered by one process alone.
    """
    source = state.generator
    size = tuple(side * source.multiple for side in source.trained)      # cfg's may be another one
    generator = networks(replace(cfg, **ALONE, z_size=size))[0].to(next(source.parameters()).device)
    generator.load_state_dict(source.state_dict())
    for module in generator.modules():
        if isinstance(module, nn.BatchNorm2d) and cfg.test_norm == "image":
            module.running_mean = module.running_var = None     # it then asks the image itself
    return generator.eval()


def draw(cfg: Config, seed: int, device: torch.device) -> Tensor:
    """z (1, noise) from N(0, truncation^2), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (cfg.truncation * torch.randn(1, cfg.noise, generator=generator)).to(device)


def test_pair(item: dict, state: State, cfg: Config) -> dict:
    """One item of a dataset as a batch of one where G is, made a pair."""
    return make_pair(common.batch_of_one(item, next(state.generator.parameters()).device), cfg)


def picture_of(pair: dict, cfg: Config) -> Tensor:
    """The input as a picture (B, 3, H, W): the labels' colours, or the sketch."""
    if cfg.task != "labels":
        return pair["input"].expand(-1, 3, -1, -1)
    return colour_label(pair["label"], class_table(cfg.classes))


def sample_grid(state: State, cfg: Config, test_set: common.Dataset, path: Path) -> None:
    """Input | output | truth of six test examples, evenly spread, two a row."""
    generator, tiles, n = test_time(state, cfg), [], min(6, len(test_set))
    for i in range(n):
        pair = test_pair(test_set[i * len(test_set) // n], state, cfg)
        z = draw(cfg, cfg.seed + i, pair["input"].device)
        values = [picture_of(pair, cfg), translate(generator, z, pair["input"])]
        values += [pair["image"]] if "image" in pair and not test_set.unpaired else []
        tiles += [value.cpu() for value in values]
    save_images(torch.cat(tiles), path, nrow=2 * len(values))


def sample(cfg: Config, state: State, size: tuple[int, int] | None = None) -> Path:
    """Outputs for --input, a file or a folder of any sizes, or for the test split.

    An output has the size of its input; `size` resizes the inputs first. Several samples of one
    input differ by z.
    """
    generator, target = test_time(state, cfg), Path(cfg.output or Path(cfg.out, "test"))
    if cfg.samples > 1 and (cfg.first == "label" or generator.start is None):
        raise UserError(f"--samples {cfg.samples}: this network has no noise; it makes one image "
                        "of each input")
    role = {"labels": "label", "sketch": "A", "edges": "image"}[cfg.task]
    items = dataset(cfg, "test").has(NEEDED.get(cfg.task)) if not cfg.input else common.Dataset(
        files=common.input_files(cfg.input, role, cfg.instances if cfg.edges else None),
        classes=cfg.classes, size=size)
    for item, paths in common.outputs(items, cfg.input, target, cfg.samples):
        pair = test_pair(item, state, cfg)
        for k, path in enumerate(paths):
            z = draw(cfg, cfg.seed + k, pair["input"].device)
            save_images(translate(generator, z, pair["input"]), path)
    return target


# ------------------------------------------------------------------------------ 6 Evaluation

# The paper's numbers: PPA, PCA, class IoU, FID.
TABLE_1_2 = {"A_u": (.48, .09, .08, 133.2), "B_u": (.33, .11, .08, 117.7),
             "C_u": (.48, .15, .12, 83.5), "D_u": (.54, .18, .14, 83.4),
             "E_u": (.64, .22, .18, 76.0), "F_u": (.69, .23, .18, 67.9),
             "G_u": (.77, .22, .18, 65.0), "H_u": (.76, .25, .20, 67.4),
             "A_s": (.930, .681, .592, 57.4), "B_s": (.934, .711, .621, 49.2),
             "C_s": (.935, .727, .636, 48.0), "D_s": (.934, .731, .639, 46.0),
             "E_s": (.936, .738, .646, 45.5)}
TABLE_3 = {"CycleGAN": (.52, .17, .11, math.nan), "SCAN": (.64, .20, .16, math.nan),
           "SPAP": (.73, .22, .17, math.nan), "Lab2Pix-V1": (.76, .25, .20, math.nan),
           "pix2pix, paired": (.71, .25, .18, math.nan)}
FACADES = {"CycleGAN": (11.72, .20), "SCAN": (10.67, .17), "SPAP": (12.20, .21),
           "Lab2Pix-V1": (11.85, .28)}          # Table 3: PSNR, SSIM
TABLE_4 = {"CycleGAN": (137.9, 98.0, 11, 1.4), "MUNIT": (105.5, 87.4, 12, 2.8),
           "Lab2Pix-V1": (100.1, 81.1, 8, 1.0), "Lab2Pix-V1*": (76.7, 78.7, 8, 2.0)}
TABLE_5 = {                                     # in percent, and FID
    "cityscapes": {"real images": (93.0, 72.7, 62.1, math.nan), "pix2pixHD": (92.2, 64.4, 55.5,
                   70.3), "SPADE": (93.4, 70.4, 61.2, 62.3), "CC-FPSE": (93.5, 72.5, 63.0, 54.8),
                   "TSIT": (93.6, 71.5, 62.4, 85.9), "Lab2Pix-V2": (93.6, 72.8, 63.6, 47.7)},
    "coco_stuff": {"real images": (59.6, 39.3, 28.3, math.nan), "pix2pixHD": (56.4, 32.0, 22.8,
                   25.7), "SPADE": (61.6, 38.1, 28.0, 22.2), "CC-FPSE": (63.6, 41.6, 30.9, 17.8),
                   "TSIT": (58.4, 34.7, 25.2, 22.1), "Lab2Pix-V2": (62.9, 40.9, 30.5, 16.8)},
    "ade20k": {"real images": (77.3, 44.8, 33.6, math.nan), "pix2pixHD": (78.2, 35.8, 32.5, 38.2),
               "SPADE": (81.2, 48.0, 41.0, 34.3), "CC-FPSE": (82.3, 50.3, 42.9, 33.2),
               "TSIT": (79.8, 43.4, 36.9, 35.3), "Lab2Pix-V2": (80.8, 47.7, 40.7, 28.2)}}


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Table 3: peak signal-to-noise ratio in dB of images in [-1, 1], (B, 3, H, W) -> (B,)."""
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(1))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Table 3: structural similarity (Wang et al. 2004) of images in [-1, 1], -> (B,).

    Gaussian windows of 11 x 11, sigma 1.5, K = (0.01, 0.03); mean over windows and channels.
    """
    x, y = (x + 1) / 2, (y + 1) / 2             # brightness counts here, not differences alone
    line = torch.exp(-(torch.arange(11.0, device=x.device) - 5) ** 2 / (2 * 1.5 ** 2))
    window = (line[:, None] * line / line.sum() ** 2).to(x.dtype).expand(3, 1, 11, 11)

    def mean(t: Tensor) -> Tensor:
        return F.conv2d(t, window, groups=3)

    a, b = mean(x), mean(y)
    var_a, var_b, cov = mean(x * x) - a * a, mean(y * y) - b * b, mean(x * y) - a * b
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    score = (2 * a * b + c1) * (2 * cov + c2) / ((a * a + b * b + c1) * (var_a + var_b + c2))
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


def feature_networks(cfg: Config, device: torch.device) -> dict[str, Callable]:
    """What the Frechet distances compare: {name: images in [-1, 1] -> features (B, c)}.

    VGG's distance works offline. FID needs Inception-V3: torchvision's weights, which are not those
    of published FIDs, so the numbers do not compare with the paper's.
    """
    vgg = frozen_vgg(("relu5_3",), 16, cfg, device)
    nets = {"VGG distance": lambda x: vgg(x)["relu5_3"].mean((2, 3))}
    if cfg.inception:
        net = torchvision.models.inception_v3(weights=None, init_weights=False)
        stored = common.pretrained("--inception", cfg.inception, "Inception_V3",
                                   "torchvision's Inception-V3 is needed")
        common.fill(net, stored, f"--inception {cfg.inception}")
        net.fc = nn.Identity()
        net.to(device).eval()
        nets["FID (torchvision)"] = lambda x: net(
            F.interpolate(x, (299, 299), mode="bilinear", antialias=True))
    return nets


@torch.no_grad()
def evaluate(cfg: Config, state: State) -> dict:
    """The paper's metrics on the test split, beside its tables; writes metrics.json.

    PPA, PCA, class IoU: a network trained on real photos labels the generated ones. PSNR and SSIM
    where the photo of the label is known, Frechet distances to the test photos, or to photos of the
    training list where the test split has none of its own.
    """
    generator, test_set = test_time(state, cfg), dataset(cfg, "test").has(NEEDED.get(cfg.task))
    device, out = next(generator.parameters()).device, Path(cfg.out)
    table, scorer = class_table(cfg.classes) if cfg.task == "labels" else None, None
    if table is not None:                       # trained once, and kept beside the runs
        scorer = common.fcn_scorer(dataset(cfg, "train", limit=0, jitter=False), out.parent, device,
                                   cfg.vgg, cfg.scorer_width, cfg.scorer_steps)
    known = not test_set.unpaired and bool(test_set.roles & {"image", "B", "pair"})
    photos = test_set if known else dataset(cfg, "train").has("image")
    nets, confusion, pairwise = feature_networks(cfg, device), {}, []
    features = {name: ([], []) for name in nets}
    for i in tqdm(range(len(test_set)), desc="evaluate", unit="image", disable=None):
        pair = test_pair(test_set[i], state, cfg)
        x = translate(generator, draw(cfg, cfg.seed + i, device), pair["input"])
        photo = pair["image"] if known else photos[i % len(photos)]["image"][None].to(device)
        for name, net in nets.items():
            for kept, view in zip(features[name], (x, photo)):
                kept.append(net(view).cpu())
        if known:
            pairwise.append([psnr(x, photo).item(), ssim(x, photo).item()])
        for row, view in [("output", x), ("truth", photo)][:1 + known] if scorer else ():
            counts = common.confusion_matrix(scorer(view).argmax(1), pair["label"], table)
            confusion[row] = confusion.get(row, 0) + counts.cpu()
    metrics = {"images": len(test_set)}
    if pairwise:
        metrics |= dict(zip(("PSNR", "SSIM"), torch.tensor(pairwise).mean(0).tolist()))
    metrics |= {name: frechet_distance(*map(torch.cat, both)) for name, both in features.items()}
    metrics |= {row: common.segmentation_scores(counts) for row, counts in confusion.items()}
    if confusion:
        metrics["worst classes"] = worst_classes(confusion["output"], table)
    report(metrics, cfg)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2))
    return metrics


def worst_classes(confusion: Tensor, table: common.ClassTable) -> dict[str, float]:
    """Fig. 17: the five classes that are recognised least in the outputs, by IoU."""
    hits, truth, found = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
    iou = {table.names[k]: (hits[k] / (truth[k] + found[k] - hits[k])).item()
           for k in range(len(hits)) if truth[k]}
    return dict(sorted(iou.items(), key=lambda pair: pair[1])[:5])


def report(metrics: dict, cfg: Config) -> None:
    """The metrics as text beside the paper's. Its data and scorers are others: compare orderings.
    """
    def line(name: str, values, digits: int = 3) -> None:
        print(f"  {name:44}" + "".join(f"{v:9.{digits}f}" for v in values if math.isfinite(v)))

    row = f", row {cfg.ablation}" if cfg.ablation else ""
    print(f"\n{metrics['images']} test images, Lab2Pix-{cfg.version}{row}\n")
    for name in ("PSNR", "SSIM", "VGG distance", "FID (torchvision)"):
        if name in metrics:
            line(name, [metrics[name]])
    print("  (neither distance compares with a published FID)")
    if cfg.version == "V1":
        print("\nTable 3, Facades: PSNR, SSIM")
        for name, values in FACADES.items():
            line(f"paper, {name}", values, 2)
    if cfg.task != "labels":
        print("\nTable 4: FID of shoes, of handbags; GB at batch 4; time")
        for name, values in TABLE_4.items():
            line(f"paper, {name}", values, 1)
        return
    print(f"\n{'FCN-score, by our own scorer':47}{'PPA':>8}{'PCA':>9}{'C-IoU':>9}{'FID':>9}")
    for name, text in {"output": "this run", "truth": "the photos, scored alike"}.items():
        if name in metrics:
            line(text, metrics[name].values())
    v1 = cfg.version == "V1"
    for name, values in TABLE_1_2.items():
        if name.endswith("u") == v1:
            line(f"paper, Table {2 - v1}, {name}" + " (this one)" * (name == cfg.ablation), values)
    others = TABLE_3 if v1 else TABLE_5.get(cfg.classes, TABLE_5["cityscapes"])
    for name, values in others.items():
        line(f"paper, Table {3 if v1 else 5}, {name}", values, 2)
    print("\nrecognised least (IoU): "
          + ", ".join(f"{name} {iou:.2f}" for name, iou in metrics["worst classes"].items()))


# ------------------------------------------------------------------------------- 7 Machinery
# What trains any network. Nothing below is the paper's, and from pick_device on it is word for word
# the same in the four scripts.

NAME = "lab2pix"
NETWORKS = ("generator", "discriminator", "segmenter")       # in State; the first is for testing
MODES = ("train", "sample", "evaluate", "check", "trace")
CALL = {"preset": ("train", "check", "trace"), "resume": ("train",), "input": ("sample",),
        "instances": ("sample",), "checkpoint": ("sample", "evaluate"), "output": ("sample",),
        "samples": ("sample",)}
# What may differ from the checkpoint when a run goes on, and when it is tested.
FREE = {"data", "epochs", "steps", "save_every", "gpu", "workers", "precision", "compile",
        "channels_last", "out", *CALL} - {"preset"}
FREE_AT_TEST = FREE | {"size", "limit", "seed", "vgg", "truncation", "test_norm", "inception",
                       "scorer_width", "scorer_steps"}
NEEDED = {"labels": "label", "sketch": "A"}     # task: kind of file
# Settings of a network that is tested, not trained: G is alone.
ALONE = dict(compile=False, discriminator="none", lambda_3=0.0, lambda_4=0.0, lambda_5=0.0)


def dataset(cfg: Config, split: str, kind: type = common.Dataset, **more) -> common.Dataset:
    train = split == "train"
    return kind(**dict(
        data=cfg.data, split=split, size=cfg.size, jitter=train and cfg.jitter, limit=cfg.limit,
        mirror=train and cfg.mirror, classes=cfg.classes, direction=cfg.direction, seed=cfg.seed,
        photos_only=cfg.task == "edges", instances=cfg.edges, unpaired=cfg.version == "V1") | more)


class Unpaired(common.Dataset):
    """V1's training set: labels and photos, shuffled apart. No photo ever meets its own label.

    Item i has label i and the photo that follows i in a random cycle through all photos, another
    cycle in each epoch. A cycle has no fixed point, and passes each photo once.
    """

    def __init__(self, **options):
        super().__init__(**options)
        if len(self) < 2:
            raise UserError(f"--data {self.data}: one example; V1 needs two, never to be paired")
        self.cycle, self.labels, self.photos = (None, None), copy.copy(self), copy.copy(self)
        self.edges = options.get("photos_only", False)      # --task edges: of a photo of its own
        if self.data and not self.edges:        # what is not read cannot leak
            photo = ("image", "B" if self.direction == "AtoB" else "A")
            self.labels.files, self.photos.files = (
                [{role: path for role, path in files.items() if role not in unread}
                 for files in self.files] for unread in (photo, ("label", "instance")))

    def partner(self, i: int, epoch: int) -> int:
        """The photo of item i in an epoch; the cycle depends on (seed, epoch) alone."""
        if self.cycle[0] != epoch:
            seed = hash((self.seed, epoch)) % 2 ** 63
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
            follower = torch.empty_like(order)
            follower[order] = order.roll(-1)
            self.cycle = (epoch, follower)
        return int(self.cycle[1][i])

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        epoch, i = index if isinstance(index, tuple) else (self.epoch, index)
        ours, theirs = (common.Dataset.__getitem__(part, (epoch, k)) for part, k in
                        ((self.labels, i), (self.photos, self.partner(i, epoch))))
        if self.edges:
            ours = {"name": ours["name"], "input": sketch_of(ours["image"][None])[0]}
        return {k: ours[k] for k in ("name", "label", "input") if k in ours} | {
            "image": theirs["image"]}


def open_data(cfg: Config) -> tuple[Config, common.Dataset, common.Dataset]:
    """Both splits, and the config with what the data turned out to be: classes, edges, T."""
    check_size(cfg)
    if cfg.discriminator == "none":
        raise UserError("--discriminator none: training needs one")
    kind = Unpaired if cfg.version == "V1" else common.Dataset
    train_set, test_set = dataset(cfg, "train", kind).has("image"), dataset(cfg, "test")
    cfg = replace(cfg, classes=train_set.classes, z_size=cfg.z_size or cfg.size)
    train_set.has(NEEDED.get(cfg.task))
    if cfg.edges and not cfg.resume and "instance" not in train_set.roles:
        notice("no instance maps: trained without their edges")
        cfg = replace(cfg, edges=False)
    for each in (train_set, test_set) if cfg.edges else ():
        each.has("instance")
    if cfg.preset.startswith(("toy", "streets")):
        own = (f"{flag(name)} {getattr(cfg, name)}" for name in PRESETS[cfg.preset])
        notice(f"preset {cfg.preset}, ours, is not the paper's {cfg.version}: {', '.join(own)}")
    most, usual = len(train_set) // common.place()[1], configure(cfg.preset, version=cfg.version,
                                                                 task=cfg.task).batch_size
    if 0 < most < cfg.batch_size == usual and not cfg.resume:
        notice(f"{len(train_set)} images: a step has {most} of them, not the usual {usual}")
        cfg = replace(cfg, batch_size=most)
    if cfg.T != 1 and not foreground_classes(cfg.classes):
        notice("no foreground classes known for this dataset: all pixels weigh the same (T = 1)")
        cfg = replace(cfg, T=1.0)
    return cfg, train_set, test_set


def schedule(cfg: Config) -> set[str]:
    """The settings that the learning rate follows."""
    return {"epochs"} if cfg.decay or cfg.ramp else set()


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
    """Stage, output and parameters of all networks in one training step, FLOPs and time."""
    device = pick_device(cfg)
    cfg, train_set, _ = open_data(replace(cfg, compile=False))
    state, loader = build(cfg, device), common.Loader(train_set, cfg.batch_size, 0, device)
    pair = make_pair(next(iter(loader)), cfg)
    common.trace_step({name: getattr(state, name) for name in NETWORKS},
                      lambda: train_step(state, pair, cfg))


if __name__ == "__main__":
    common.shell(main, NAME)
