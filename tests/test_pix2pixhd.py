"""What the pix2pixHD paper claims and what its user is promised, tested on pix2pixhd.py.

The oracles share no code with the script: the authors' layers under their own names, numpy in
float64 with loops, printed numbers, gradients, limits. The check values come from the authors' own
PyTorch networks, filled with sines and run in float64. What all four scripts owe their users is
tested in test_contract.py.
"""

import copy
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    as_user, assert_same, assert_same_state, edges_of, fails, four_numbers, grey_levels, label_map,
    losses_of, parameters, picture, place, refused, save, size_of, stored, works)
from PIL import Image
from torch import nn
from torch.nn import functional as F

import common
import pix2pixhd
from pix2pixhd import Config, Encoder, Generator, MultiScaleDiscriminator, State

CPU = torch.device("cpu")
NETS = ("generator", "discriminator", "encoder")
pytestmark = pytest.mark.usefixtures("draw_each_street_once")


# --------------------------------------------------------------- The authors' networks, their names

class ReleasedBlock(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(c, c, 3), nn.InstanceNorm2d(c), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(c, c, 3), nn.InstanceNorm2d(c))

    def forward(self, x):
        return x + self.conv_block(x)


def around(*convs: nn.Module) -> list[nn.Module]:
    """The convolutions given, instance norm, ReLU."""
    return [*convs, nn.InstanceNorm2d(convs[-1].out_channels), nn.ReLU()]


def released_global(c_in: int, w: int, downs: int, blocks: int, c_out: int = 3) -> list[nn.Module]:
    """G1's list; with no blocks it is E's."""
    layers = around(nn.ReflectionPad2d(3), nn.Conv2d(c_in, w, 7))
    for i in range(downs):
        layers += around(nn.Conv2d(w * 2 ** i, w * 2 ** (i + 1), 3, 2, 1))
    layers += [ReleasedBlock(w * 2 ** downs) for _ in range(blocks)]
    for i in range(downs, 0, -1):
        layers += around(nn.ConvTranspose2d(w * 2 ** i, w * 2 ** (i - 1), 3, 2, 1, 1))
    return [*layers, nn.ReflectionPad2d(3), nn.Conv2d(w, c_out, 7), nn.Tanh()]


class ReleasedG(nn.Module):
    """w: the width at full resolution, so G1 has w * 2^enhancers."""

    def __init__(self, c_in: int, w: int, enhancers: int, downs: int = 4, blocks: int = 9):
        super().__init__()
        self.n, layers = enhancers, released_global(c_in, w * 2 ** enhancers, downs, blocks)
        self.model = nn.Sequential(*(layers[:-3] if enhancers else layers))
        for n in range(1, enhancers + 1):
            k = w * 2 ** (enhancers - n)
            front = [*around(nn.ReflectionPad2d(3), nn.Conv2d(c_in, k, 7)),
                     *around(nn.Conv2d(k, 2 * k, 3, 2, 1))]
            rest = [ReleasedBlock(2 * k) for _ in range(3)]
            rest += around(nn.ConvTranspose2d(2 * k, k, 3, 2, 1, 1))
            if n == enhancers:
                rest += [nn.ReflectionPad2d(3), nn.Conv2d(k, 3, 7), nn.Tanh()]
            setattr(self, f"model{n}_1", nn.Sequential(*front))
            setattr(self, f"model{n}_2", nn.Sequential(*rest))

    def forward(self, s):
        pool, inputs = nn.AvgPool2d(3, 2, [1, 1], count_include_pad=False), [s]
        for _ in range(self.n):
            inputs.append(pool(inputs[-1]))
        y = self.model(inputs.pop())
        for n in range(1, self.n + 1):
            front, rest = getattr(self, f"model{n}_1"), getattr(self, f"model{n}_2")
            y = rest(front(inputs.pop()) + y)
        return y


class ReleasedE(nn.Module):
    def __init__(self, w: int, c_out: int = 3):
        super().__init__()
        self.model = nn.Sequential(*released_global(3, w, 4, 0, c_out))

    def forward(self, x):
        return self.model(x)


def sines(*shape: int, phase: float = 0.2) -> torch.Tensor:
    return torch.from_numpy(np.sin(0.3 * np.arange(math.prod(shape)) + phase).reshape(shape))


def filled(net: nn.Module) -> nn.Module:
    """The fill rule of the check values, in the order of the file; in float64."""
    for i, value in enumerate(net.double().state_dict().values()):
        s = np.sin(0.5 + 1.7 * i + 0.37 * np.arange(value.numel())).reshape(value.shape)
        value.copy_(torch.from_numpy(s * (0.05 if value.ndim == 4 else 0.1)))
    return net


def save_released(net: nn.Module, path, prefix: str = "", old: bool = False) -> None:
    """A file as the authors write it; old: PyTorch 0.3's, with statistics that nothing reads."""
    weights = {prefix + k: v for k, v in net.state_dict().items()}
    for name, module in net.named_modules() if old else ():
        if isinstance(module, nn.InstanceNorm2d):
            for k in ("running_mean", "running_var"):
                weights[f"{prefix}{name}.{k}"] = torch.zeros(module.num_features)
    torch.save(weights, path)


def through_a_file(net: nn.Module, own: nn.Module, path, **options) -> nn.Module:
    """Our network with the weights of the authors' file."""
    save_released(net, path, **options)
    weights, = pix2pixhd.read(path).values()
    common.fill(own.double(), weights, path)
    return own


# ------------------------------------------------------------------------------------- Check values

@pytest.mark.parametrize("enhancers, width, size, numbers", [
    (0, 8, (64, 128), [-0.007884562, 0.197123630, -0.214373586, -0.077504562]),
    (1, 4, (64, 128), [-0.078856824, 0.297255844, 0.144393148, 0.380512630]),
    (2, 2, (128, 256), [-0.101932675, 0.144140810, -0.197143339, -0.016162673])])
@torch.no_grad()
def test_check_values_generators(tmp_path, enhancers, width, size, numbers):
    """The authors' G1, G1+G2, G1+G2+G3: same keys, same sums, same numbers, pixel by pixel."""
    theirs, s = filled(ReleasedG(7, width, enhancers)), sines(1, 7, *size)
    G = through_a_file(theirs, Generator(7, width=width * 2 ** enhancers, enhancers=enhancers),
                       tmp_path / "latest_net_G.pth", prefix="module.", old=True)
    assert four_numbers(G(s)) == pytest.approx(numbers, rel=1e-6, abs=1e-7)
    torch.testing.assert_close(G(s), theirs(s), rtol=0, atol=1e-6)   # norms enlarge roundings


@torch.no_grad()
def test_check_values_encoder(tmp_path):
    """E before pooling, and after, over rectangles with ids as large as Cityscapes'."""
    theirs, x = filled(ReleasedE(4)), sines(1, 3, 64, 128)
    E = through_a_file(theirs, Encoder(3, 4), tmp_path / "latest_net_E.pth", prefix="module.",
                       old=True)
    assert four_numbers(E(x)) == pytest.approx(
        [0.100350096, 0.350718725, 0.310822662, -0.051041511], rel=1e-6, abs=1e-8)
    torch.testing.assert_close(E(x), theirs(x), rtol=0, atol=1e-9)
    ids = torch.tensor([[24000 + 1000 * (r // 20) + c // 50 for c in range(128)]
                        for r in range(64)])
    assert four_numbers(pix2pixhd.instance_average(E(x), ids[None])) == pytest.approx(
        [0.100350096, 0.057445395, 0.156594678, 0.157777223], rel=1e-6, abs=1e-8)


S, REAL, FAKE = (sines(1, c, 64, 128, phase=phase) for c, phase in ((4, 0.2), (3, 1.0), (3, 2.0)))


@pytest.mark.parametrize("scales, means, numbers, matching", [
    (2, [0.120650118, 0.055500604], [1.9232031527, 0.2616222350, 1.8997149719],
     [0.6272961654, 1.1448039305]),
    (3, [-0.137676451, 0.142323092, 0.045534747], [3.1228981592, 0.2131672758, 3.1022125446],
     [0.9043935935, 0.8885353901, 0.4699026548])])
@torch.no_grad()
def test_check_values_discriminators_and_losses(scales, means, numbers, matching):
    """Predictions, the GAN losses of both sides and Eq. (3), scale by scale, the finest first.

    In the authors' file the coarsest D comes first, as in ours. One digit is not the fact sheet's:
    it prints 0.2131672158 for three scales, where the authors' layers give 0.2131672758.
    """
    D = filled(MultiScaleDiscriminator(7, 8, scales))
    real, fake = D(S, REAL), D(S, FAKE)
    assert [maps[-1].shape[2:] for maps in real] == [(11, 19), (7, 11), (5, 7)][:scales]
    assert [maps[-1].mean().item() for maps in real] == pytest.approx(means, rel=1e-6)
    d_real, d_fake = pix2pixhd.discriminator_loss(real, fake)
    g = pix2pixhd.generator_loss(fake)
    assert [g.item(), 2 * d_fake.item(), 2 * d_real.item()] == pytest.approx(numbers, rel=1e-6)
    per_scale = [pix2pixhd.feature_matching_loss([a], [b]).item() for a, b in zip(real, fake)]
    assert per_scale == pytest.approx(matching, rel=1e-6)


# ------------------------------------------------------------------------------ Parameters and cost

@pytest.mark.parametrize("arguments, number", [
    (dict(c_in=35, enhancers=0), 182_543_619), (dict(c_in=36, enhancers=0), 182_546_755),
    (dict(c_in=39, enhancers=0), 182_556_163), (dict(c_in=3, enhancers=0), 182_443_267),
    (dict(c_in=35), 182_852_355), (dict(), 182_857_059), (dict(c_in=39), 182_871_171),
    (dict(enhancers=2), 182_947_699), (dict(width=32, enhancers=0), 45_672_611),
    (dict(width=16, downs=3, blocks=6, enhancers=0), 1_995_475)])
def test_generator_parameters(arguments, number):
    with torch.device("meta"):
        assert parameters(Generator(**arguments)) == number


@pytest.mark.parametrize("c_in, width, numbers", [
    (39, 64, [2_801_601, 5_603_202, 8_404_803]), (38, 64, [2_800_577, 5_601_154, 8_401_731]),
    (6, 64, [2_767_809, 5_535_618, 8_303_427]), (39, 32, [None, None, 2_138_019]),
    (39, 16, [None, None, 552_915])])
def test_discriminator_parameters(c_in, width, numbers):
    for scales, number in enumerate(numbers, 1):
        with torch.device("meta"):
            D = MultiScaleDiscriminator(c_in, width, scales)
        assert number in (None, parameters(D))


def test_encoder_and_vgg_parameters():
    with torch.device("meta"):
        assert parameters(Encoder()) == 788_803
        assert parameters(common.vgg_trunk(19, 64, "relu5_1")) == 12_944_960


# ------------------------------------------------------------------------------- Inputs and outputs

def test_table_of_input_channels():
    """Labels, boundary, features: the features are for G alone, never for D."""
    for options, g, d in (
            (dict(boundary=False), 35, 38), (dict(), 36, 39), (dict(features=3), 39, 39),
            (dict(task="pairs", boundary=False), 3, 6)):
        cfg = Config(classes="" if "task" in options else "cityscapes", **options)
        with torch.device("meta"):
            G, D, E = pix2pixhd.networks(cfg)
        assert pix2pixhd.channels(cfg) == d - 3
        assert G.globe.front[0].in_channels == G.enhancers[0].front[0].in_channels == g
        assert [scale.layers[0][0].in_channels for scale in D.scales] == [d] * 3
        assert (E is None) == (g != 39)


def test_input_is_one_hot_labels_then_the_boundary():
    cfg = Config(classes="streets", pool="label")
    label, instance = torch.randint(0, 12, (2, 6, 5)), torch.randint(0, 3, (2, 6, 5)) + 40000
    pair = pix2pixhd.make_pair({"label": label, "instance": instance}, cfg)
    assert pair["input"].shape == (2, 13, 6, 5)
    for b, i, j in itertools.product(range(2), range(6), range(5)):
        expected = [float(k == label[b, i, j]) for k in range(12)]
        assert pair["input"][b, :12, i, j].tolist() == expected
    assert torch.equal(pair["input"][:, 12:], pix2pixhd.boundary_map(instance))
    assert torch.equal(pair["region"], label)                       # Fig. 11: pooled by label
    batch = {"label": label, "instance": instance}
    assert torch.equal(pix2pixhd.make_pair(batch, Config(classes="streets"))["region"], instance)
    without = pix2pixhd.make_pair(batch, Config(classes="streets", boundary=False))
    assert torch.equal(without["input"], pair["input"][:, :12])


@pytest.mark.parametrize("kind, downs", [("unet", 5), ("crn", 4)])
def test_rival_generators(kind, downs):
    """The slides' U-Net and CRN: images in [-1, 1], with every level in use, from 1 of 2^downs."""
    cfg = Config(classes="streets", generator=kind, enhancers=0, width=4, downs=downs, features=3)
    G, D, E = pix2pixhd.networks(cfg)
    s = torch.rand(2, 16, 64, 32, requires_grad=True)
    image = G(s)
    assert image.shape == (2, 3, 64, 32) and image.abs().max() <= 1 and G.multiple == 2 ** downs
    image.square().sum().backward()
    weights = [p for p in G.parameters() if p.ndim == 4]
    assert all(p.grad.abs().max() > 0 for p in weights)
    assert s.grad[0].abs().sum(0).count_nonzero() == 64 * 32
    levels = len(G.down) if kind == "unet" else len(G.refine) - 1
    assert levels == downs


@pytest.mark.parametrize("size, kind, downs, last", [
    ((512, 1024), "crn", 7, 128), ((1024, 2048), "crn", 8, 32), ((1024, 1024), "unet", 8, None)])
def test_rivals_go_down_as_far_as_their_papers(size, kind, downs, last):
    """CRN: from 4 rows on; 8 modules that end in 128 channels, or 9 that end in 32. U-Net: 8."""
    cfg, _, _ = pix2pixhd.open_data(Config(classes="streets", generator=kind, enhancers=0,
                                           size=size, limit=1))
    assert cfg.downs == downs
    with torch.device("meta"):
        G = pix2pixhd.networks(cfg)[0]
    if kind == "crn":
        assert (len(G.refine), G.output[0].in_channels) == (downs + 1, last)
        assert [m[0].out_channels for m in G.refine][:7] == [1024] * 5 + [512] * 2


# --------------------------------------------------------------------------------- Receptive fields

def linear(net: nn.Module) -> nn.Module:
    """Without norm, which couples all pixels, and with positive weights: no gradient cancels."""
    for parent in list(net.double().modules()):
        for name, child in parent.named_children():
            if isinstance(child, (nn.GroupNorm, nn.Tanh)):
                setattr(parent, name, nn.Identity())
    for p in net.parameters():
        nn.init.constant_(p, 1 / p[0].numel() if p.ndim == 4 else 0.0)
    return net


def columns_seen(unit: torch.Tensor, x: torch.Tensor) -> int:
    """How many columns of x a number depends on; they must lie side by side."""
    gradient, = torch.autograd.grad(unit, x, retain_graph=True)
    columns = gradient[0].abs().sum((0, 1)).nonzero().flatten()
    assert len(columns) == columns.max() - columns.min() + 1 and columns.min() > 0
    assert columns.max() < x.shape[3] - 1                         # the border did not cut it off
    return len(columns)


@pytest.mark.parametrize("make, c_in, width, field", [
    (lambda: Generator(1, width=1, enhancers=0), 1, 736, 645), (lambda: Encoder(1, 1), 3, 160, 69)])
def test_receptive_fields_of_g1_and_e(make, c_in, width, field):
    """The largest of all phases of the four doublings."""
    x = torch.ones(1, c_in, 32, width, dtype=torch.float64, requires_grad=True)
    y = linear(make())(x)
    assert max(columns_seen(y[0, 0, 16, width // 2 + k], x) for k in range(16)) == field


def test_receptive_fields_of_the_three_discriminators():
    """Sec. 3.2: the coarsest sees the largest field; labels and image alike."""
    D = linear(MultiScaleDiscriminator(2, 1, 3))
    s, x = torch.ones(2, 1, 1, 64, 640, dtype=torch.float64).requires_grad_().unbind()
    for maps, field in zip(D(s, x), (70, 141, 283)):
        prediction = maps[-1]
        unit = prediction[0, 0, prediction.shape[2] // 2, prediction.shape[3] // 2]
        assert columns_seen(unit, s) == columns_seen(unit, x) == field


# ----------------------------------------------------------------- Norm, residuals, initial weights

@pytest.mark.parametrize("c, h, w", [(6, 5, 7), (64, 8, 16), (1, 9, 4)])
def test_instance_norm_is_pytorchs_in_any_memory_order(c, h, w):
    """Value and gradient; contiguous or channels-last, input or incoming gradient."""
    norm, x, g = pix2pixhd.instance_norm(c), torch.randn(2, c, h, w), torch.randn(2, c, h, w)
    assert not list(norm.parameters()) and not norm.state_dict()
    theirs = nn.InstanceNorm2d(c)(x.requires_grad_())
    torch.testing.assert_close(norm(x), theirs, rtol=1e-5, atol=1e-5)
    expected, = torch.autograd.grad(theirs, x, g)
    orders = (torch.contiguous_format, torch.channels_last)
    for of_x, of_g in itertools.product(orders, orders):
        own = x.detach().contiguous(memory_format=of_x).requires_grad_()
        gradient, = torch.autograd.grad(norm(own), own, g.contiguous(memory_format=of_g))
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_initialisation():
    """Weights from N(0, 0.02); biases by PyTorch's default, uniform up to 1 / sqrt(fan in)."""
    G, D, E = pix2pixhd.networks(Config(classes="streets", width=16, downs=3, blocks=2,
                                        d_width=16, features=3))
    for net in (G, D, E):
        weights = torch.cat([p.flatten() for p in net.parameters() if p.ndim == 4])
        assert abs(weights.mean()) < 1e-3 and weights.std().item() == pytest.approx(0.02, rel=0.02)
        kurtosis = ((weights / weights.std()) ** 4).mean()
        assert kurtosis.item() == pytest.approx(3, abs=0.2)          # uniform would be 1.8
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and module.out_channels > 15:
                bound = 1 / math.sqrt(module.weight[0].numel())
                assert 0.7 * bound < module.bias.abs().max() <= bound


# ---------------------------------------------------------------------------------- Equations 1 - 4

RNG = np.random.default_rng(0)
SHAPES = [[(2, 3, 5, 7), (2, 4, 3, 4), (2, 6, 2, 3), (2, 7, 2, 2), (2, 1, 3, 4)],
          [(2, 3, 3, 4), (2, 4, 2, 2), (2, 6, 1, 2), (2, 7, 2, 1), (2, 1, 2, 2)]]
MAPS = [[[torch.from_numpy(RNG.normal(0.3, 2, shape)) for shape in scale] for scale in SHAPES]
        for _ in "xg"]                             # real and fake, two scales, batch of two


def mean_over(predictions: list[torch.Tensor], term) -> float:
    """Summed over the scales, averaged over batch and patches of each."""
    return sum(sum(term(a) for a in p.flatten().tolist()) / p.numel() for p in predictions)


def minus_log(a: float) -> float:
    return -math.log(1 / (1 + math.exp(-a)))


@pytest.mark.parametrize("gan, is_real, is_fake", [
    ("lsgan", lambda a: (a - 1) ** 2, lambda a: a ** 2),
    ("log", minus_log, lambda a: minus_log(-a))])
def test_eq_1_and_2_from_their_definitions(gan, is_real, is_fake):
    """D's two terms are halved, G's is not: G wants its images to be called real. Over the scales
    stands a sum, not a mean."""
    real, fake = ([maps[-1] for maps in side] for side in MAPS)
    losses = (*pix2pixhd.discriminator_loss(*MAPS, gan), pix2pixhd.generator_loss(MAPS[1], gan))
    assert [loss.item() for loss in losses] == pytest.approx(
        [mean_over(real, is_real) / 2, mean_over(fake, is_fake) / 2, mean_over(fake, is_real)],
        rel=1e-12)


def test_eq_3_from_its_definition():
    """Absolute differences of the four hidden maps, each over its N_i, without the prediction; it
    moves the side of the fake images alone."""
    sides = [[[m.clone().requires_grad_() for m in maps] for maps in side] for side in MAPS]
    per_scale = []
    for real, fake in zip(*MAPS):
        total = 0.0
        for i in range(4):
            x, g = real[i].numpy(), fake[i].numpy()
            total += sum(abs(x[k] - g[k]) for k in np.ndindex(x.shape)) / x.size
        per_scale.append(total)
    loss = pix2pixhd.feature_matching_loss(*sides)
    assert loss.item() == pytest.approx(sum(per_scale), rel=1e-12)
    mean = pix2pixhd.feature_matching_loss(*MAPS, mean=True)
    assert mean.item() == pytest.approx(sum(per_scale) / 2, rel=1e-12)
    loss.backward()
    assert all(m.grad is None for maps in sides[0] for m in maps)  # D "does not maximize" it
    for maps in sides[1]:
        assert maps[-1].grad is None and all(m.grad.any() for m in maps[:-1])


@pytest.mark.parametrize("random", [False, True])
def test_perceptual_loss_from_its_definition(random):
    """Sec. 4: the mean over M_i elements of each layer, with the released weights 1/32 ... 1; of a
    random VGG the first layer weighs most."""
    names = ["relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"]
    real, fake = ({n: torch.from_numpy(RNG.normal(0, 1, (2, 2 + i, 4, 3)))
                   for i, n in enumerate(names)} for _ in "xg")
    expected, weights = 0.0, [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1]
    for name, weight in zip(names, weights[::-1] if random else weights):
        x, g = real[name].numpy(), fake[name].numpy()
        expected += weight * sum(abs(x[k] - g[k]) for k in np.ndindex(x.shape)) / x.size
    loss = pix2pixhd.perceptual_loss(real, fake, random)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("normalise", [False, True])
def test_vgg_sees_the_image_as_it_is_unless_asked(normalise):
    """The release feeds [-1, 1]; --vgg-normalise takes ImageNet's mean and deviation first."""
    cfg = tiny(loss="GAN+FM+VGG", vgg="random", vgg_normalise=normalise)
    assert not Config().vgg_normalise
    vgg = pix2pixhd.build(cfg, CPU).vgg
    assert vgg.normalise == normalise
    assert list(vgg(torch.rand(1, 3, 16, 16))) == [f"relu{k}_1" for k in range(1, 6)]


def tiny(**changes) -> Config:
    """The streets at 32 x 64, with networks of a few hundred weights."""
    small = dict(classes="streets", size=(32, 64), width=4, downs=2, blocks=1, enhancers=0,
                 enhancer_blocks=1, scales=2, d_width=2, features=3, e_width=2, loss="GAN+FM",
                 epochs=4, fine_epochs=4, enhancer_epochs=1, out="run")
    return Config(**small | changes)


class FewFeatures(nn.Module):
    """Stands in for VGG-19: five frozen maps by the same names."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 2 + i, 3, stride=2) for i in range(5))
        self.requires_grad_(False)

    def forward(self, x):
        return {f"relu{i}_1": layer(x).relu() for i, layer in enumerate(self.layers, 1)}


def loops_average(z: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """Differentiable: object after object, image after image."""
    rows = []
    for b in range(len(z)):
        out = 0
        for number in region[b].unique():
            mask = (region[b] == number).to(z.dtype)
            out = out + ((z[b] * mask).sum((1, 2)) / mask.sum())[:, None, None] * mask
        rows.append(out)
    return torch.stack(rows)


def released_step(nets, optimisers, batch: dict, cfg: Config, vgg) -> dict[str, float]:
    """The release's order: D on x_hat cut off, on x, on x_hat again; then G steps, then D."""
    (G, D, E), (s, x) = nets, (batch["input"], batch["image"])
    z = [] if E is None else [loops_average(E(x), batch["region"])]
    x_hat = G(torch.cat([s, *z], 1))
    apart, real, fake = D(s, x_hat.detach()), D(s, x), D(s, x_hat)

    def gan(scales, truth):
        total = 0
        for *_, a in scales:
            p = 1 / (1 + (-a).exp())
            term = (a - truth) ** 2 if cfg.gan == "lsgan" else -(p if truth else 1 - p).log()
            total = total + term.sum() / a.numel()
        return total

    values = {"d_real": gan(real, 1) / 2, "d_fake": gan(apart, 0) / 2, "g_gan": gan(fake, 1)}
    objective = values["g_gan"]
    if "FM" in cfg.loss:
        values["g_fm"] = sum((real[k][i].detach() - fake[k][i]).abs().sum() / fake[k][i].numel()
                             for k in range(len(fake)) for i in range(4))
        values["g_fm"] = values["g_fm"] / (len(fake) if cfg.fm_mean else 1)
        objective = objective + cfg.lambda_fm * values["g_fm"]
    if "VGG" in cfg.loss:
        theirs, ours = vgg(x.detach()), vgg(x_hat)
        values["g_vgg"] = sum((theirs[f"relu{i}_1"] - ours[f"relu{i}_1"]).abs().mean() * 2.0 ** k
                              for i, k in zip(range(1, 6), (-5, -4, -3, -2, 0)))
        objective = objective + cfg.lambda_vgg * values["g_vgg"]
    for optimiser, loss in zip(optimisers, (objective, values["d_real"] + values["d_fake"])):
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {k: v.item() for k, v in values.items()}


def some_batch(cfg: Config, images: int = 2) -> dict:
    """Random inputs in float64, a few objects of which each image has its own."""
    torch.manual_seed(5)
    h, w = cfg.size
    blocks = torch.randint(0, 5, (images, h // 8, w // 8)) + 26000
    return {"input": torch.rand(images, pix2pixhd.channels(cfg), h, w, dtype=torch.float64),
            "image": torch.rand(images, 3, h, w, dtype=torch.float64) * 2 - 1,
            "region": blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)}


def large_weights(*nets: nn.Module | None) -> None:
    """In float64, with gradients worth comparing."""
    for net in filter(None, nets):
        for p in net.double().parameters():
            if p.ndim == 4:
                nn.init.normal_(p, 0, 0.2)


@pytest.mark.parametrize("changes", [
    dict(loss="GAN"), dict(loss="GAN", features=0), dict(loss="GAN+FM"),
    dict(loss="GAN+FM", features=0, lambda_fm=3.0), dict(loss="GAN+FM", fm_mean=True),
    dict(loss="GAN+FM", gan="log"), dict(loss="GAN+FM+VGG", lambda_vgg=7.0),
    dict(loss="GAN+FM", stage="joint", enhancers=1, scales=3),
    dict(loss="GAN+FM", stage="enhancer", enhancers=2, scales=3),
    dict(loss="GAN+FM", channels_last=True)],
    ids=lambda changes: "-".join(map(str, changes.values())))
def test_eq_4_train_step_is_the_releases_step(changes):
    """Two steps of Adam: the same losses, gradients and weights, with and without E."""
    cfg = tiny(lr=0.01, **{"stage": "global"} | changes)
    vgg = FewFeatures().double() if "VGG" in cfg.loss else None
    state = pix2pixhd.build(replace(cfg, loss="GAN"), CPU)
    state.vgg, nets = vgg, (state.generator, state.discriminator, state.encoder)
    large_weights(*nets)
    copies, batch = copy.deepcopy(nets), some_batch(cfg)
    adam = [torch.optim.Adam([p for net in some if net is not None for p in net.parameters()
                              if p.requires_grad], 0.01, (0.5, 0.999))
            for some in ((copies[0], copies[2]), (copies[1],))]
    for _ in range(2):
        expected = released_step(copies, adam, batch, cfg, vgg)
        values = pix2pixhd.train_step(state, batch, cfg)
        assert {k: v.item() for k, v in values.items()} == pytest.approx(expected, rel=1e-6)
        assert not any(v.requires_grad for v in values.values())
        for net, copied in zip(nets, copies):
            for p, q in zip(net.parameters() if net else (), copied.parameters() if net else ()):
                assert (p.grad is None) == (q.grad is None) == (not p.requires_grad)
                if p.requires_grad:
                    torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-10)
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_the_perceptual_term_has_the_losss_gradient_and_frees_its_maps():
    vgg, x, x_hat = FewFeatures(), torch.rand(1, 3, 9, 9), torch.rand(1, 3, 9, 9).requires_grad_()
    direct = pix2pixhd.perceptual_loss(vgg(x), vgg(x_hat))
    value, term = pix2pixhd.perceptual_term(vgg, x, x_hat)
    assert torch.equal(value, direct.detach()) and not value.requires_grad
    assert torch.equal(torch.autograd.grad(term, x_hat)[0], torch.autograd.grad(direct, x_hat)[0])
    assert [f[0].name() for f in term.grad_fn.next_functions] == ["MulBackward0"]


# ------------------------------------------------------- Gradients reach exactly the right networks

def street_batch(cfg: Config, images: int = 1) -> dict:
    data = common.Dataset("", "test", cfg.size, limit=images)
    batch = torch.utils.data.default_collate([data[i] for i in range(images)])
    return pix2pixhd.make_pair(batch, cfg)


def moved_by_a_step(cfg: Config) -> tuple[set[str], set[str]]:
    """Names of the convolutions' weights that one step changes, and of those it does not."""
    state = pix2pixhd.build(cfg, CPU)
    nets = {k: getattr(state, k) for k in NETS}
    before = {f"{k}.{n}": v.clone() for k, net in nets.items() for n, v in net.state_dict().items()
              if v.ndim == 4}
    pix2pixhd.train_step(state, street_batch(cfg), cfg)
    after = {f"{k}.{n}": v for k, net in nets.items() for n, v in net.state_dict().items()}
    changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
    return changed, before.keys() - changed


@pytest.mark.parametrize("enhancers, stage, frozen, changes", [
    (0, "global", (), {}), (1, "joint", (), {}), (2, "joint", (), {}),
    (1, "enhancer", ("generator.globe",), {}),
    (2, "enhancer", ("generator.globe", "generator.enhancers.0"), {}),
    (1, "enhancer", ("generator.globe", "encoder"), dict(stored_features=True)),
    (1, "joint", ("encoder",), dict(stored_features=True)),
    (0, "global", (), dict(stored_features=True))])
def test_a_stage_moves_exactly_its_networks(enhancers, stage, frozen, changes):
    """Sec. 3.2: the enhancer alone, with D and with E, which now sees larger photos. Only stored
    features keep E as it is, and only where there are enhancers."""
    moved, still = moved_by_a_step(tiny(enhancers=enhancers, stage=stage, scales=2, **changes))
    assert all(name.startswith(frozen) for name in still), still
    assert bool(still) == bool(frozen)
    assert not frozen or not any(name.startswith(frozen) for name in moved)
    assert {name.split(".")[0] for name in moved} == set(NETS) - set(frozen)
    assert any(name.startswith("generator.output") for name in moved)


def test_stored_features_are_half_sized_and_of_8_bits():
    """The release's file: E's map at half size, as an 8-bit picture, doubled by repetition."""
    E, x = Encoder(3, 2, 2), torch.rand(1, 3, 32, 64) * 2 - 1
    region = torch.tensor([[[(r + 1) // 9 + 10 * ((c + 1) // 16) for c in range(64)]
                            for r in range(32)]])                  # odd borders: which pixel counts
    with torch.no_grad():
        z = pix2pixhd.style_of_photo(E, x, region, Config(features=3, stored_features=True))
        small = loops_average(E(F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
                              region[:, ::2, ::2])
    bits = np.round((small.double().numpy() + 1) * 127.5)
    expected = np.repeat(np.repeat(bits, 2, 2), 2, 3) / 127.5 - 1
    assert np.abs(z.numpy() - expected).max() < 1e-6
    whole = pix2pixhd.style_of_photo(E, x, region, Config(features=3))
    torch.testing.assert_close(whole, loops_average(E(x), region), rtol=1e-5, atol=1e-6)


def test_one_batch_can_be_overfitted():
    """One image, 60 steps: Eq. (3), which alone compares with the photo here, falls by half."""
    cfg = tiny(stage="global", lr=2e-3, width=8, d_width=4)
    state, batch = pix2pixhd.build(cfg, CPU), street_batch(cfg)

    def distance():
        with torch.no_grad():
            z = loops_average(state.encoder(batch["image"]), batch["region"])
            x_hat = state.generator(torch.cat([batch["input"], z], 1))
            return (x_hat - batch["image"]).abs().mean().item()

    before = distance()
    for _ in range(60):
        pix2pixhd.train_step(state, batch, cfg)
    assert distance() < 0.6 * before


# -------------------------------------------------------------------- Boundaries, instance averages

def test_boundary_map_from_its_definition():
    """Any of the four neighbours in the image, of the same image of the batch."""
    ids = torch.randint(0, 3, (3, 6, 7)) + 65530
    edges = pix2pixhd.boundary_map(ids)
    assert edges.shape == (3, 1, 6, 7) and edges.dtype == torch.float32
    assert np.array_equal(edges[:, 0], [edges_of(each) for each in ids.numpy()])


def test_instance_average_from_its_definition():
    """Batch items with equal ids do not mix, and ids may be large and far apart. The gradient of a
    mean: what reaches the pixels of an object, averaged over it."""
    z, g = torch.from_numpy(RNG.normal(0, 1, (2, 3, 2, 6, 7)))
    region = torch.tensor([0, 1, 26000, 65535])[torch.randint(0, 4, (3, 6, 7))]
    ours = pix2pixhd.instance_average(z.requires_grad_(), region)
    torch.testing.assert_close(ours, loops_average(z, region), rtol=0, atol=1e-12)
    gradient, = torch.autograd.grad(ours, z, g)
    torch.testing.assert_close(gradient, loops_average(g, region), rtol=0, atol=1e-12)


def test_instance_average_of_a_large_region_is_exact():
    """A road of half a million pixels: a sum in float32 would be off in the fourth digit."""
    z, region = torch.full((1, 1, 512, 1024), 0.1), torch.full((1, 512, 1024), 7)
    z[:, :, :, 512:] = -0.7
    mean = pix2pixhd.instance_average(z, region)
    assert (mean + 0.3).abs().max() < 2e-7
    assert (pix2pixhd.instance_average(torch.full_like(z, 0.1), region) - 0.1).abs().max() < 2e-7


def test_smooth_takes_away_what_repeats_every_two_pixels():
    torch.manual_seed(0)
    layer = pix2pixhd.Doubling(4, 3)
    x = torch.ones(1, 4, 6, 6)
    dots = layer(x)[..., :-2, :-2]              # at the far border the overlap ends
    layer.smooth = True
    flat = layer(x)[..., :-2, :-2]
    assert layer(x).shape == (1, 3, 12, 12)
    assert dots.std((2, 3)).min() > 0.01
    torch.testing.assert_close(flat, dots.mean((2, 3), keepdim=True).expand_as(flat))


# ------------------------------------------------------------------------- Sec. 3.2, coarse to fine

def stages_of(cfg: Config) -> list[tuple]:
    return [(s.name, s.cfg.size, s.cfg.crop, s.cfg.enhancers, s.cfg.scales, s.first, s.epochs)
            for s in pix2pixhd.plan(cfg)]


@pytest.mark.parametrize("preset, expected", [
    ("512p", [("global", (512, 1024), (0, 0), 0, 3, 0, 200)]),
    ("1024p", [("global", (512, 1024), (0, 0), 0, 2, 0, 200),
               ("enhancer", (1024, 2048), (0, 0), 1, 3, 200, 10),
               ("joint", (1024, 2048), (0, 0), 1, 3, 210, 90)]),
    ("1024p-12GB", [("global", (512, 1024), (0, 0), 0, 2, 0, 200),
                    ("enhancer", (1024, 2048), (1024, 1024), 1, 3, 200, 20),
                    ("joint", (1024, 2048), (1024, 1024), 1, 3, 220, 180)]),
    ("1024p-features-12GB", [("global", (512, 1024), (0, 0), 0, 2, 0, 200),
                             ("enhancer", (1024, 2048), (896, 896), 1, 3, 200, 20),
                             ("joint", (1024, 2048), (896, 896), 1, 3, 220, 180)])])
def test_plan_of_the_presets(preset, expected):
    """Sizes, crops, discriminators and epochs of the released scripts, G1 first."""
    cfg = Config(**pix2pixhd.PRESETS[preset], classes="cityscapes")
    assert stages_of(cfg) == expected
    assert cfg.features == (3 if "features" in preset else 0)
    assert [s.cfg.stage for s in pix2pixhd.plan(cfg)] == [row[0] for row in expected]


def test_presets_that_show_square_images_train_square_ones():
    """Fig. 2's faces and cats and Fig. 11's faces are square: nothing may stretch them."""
    for name in ("edges2photo", "helen"):
        assert Config(**pix2pixhd.PRESETS[name]).size == (1024, 1024)


def test_plan_of_one_stage_or_few_scales():
    cfg = Config(classes="cityscapes", scales=1)
    assert [row[4] for row in stages_of(cfg)] == [1, 1, 1]         # never without a discriminator
    for name, epochs in (("global", 200), ("enhancer", 10), ("joint", 90)):
        stage, = pix2pixhd.plan(replace(cfg, stage=name))
        assert (stage.name, stage.first, stage.epochs) == (name, 0, epochs)
    alone, = pix2pixhd.plan(Config(classes="cityscapes", enhancers=2, stage="enhancer",
                                   size=(2048, 4096)))
    assert (alone.cfg.enhancers, alone.cfg.size) == (2, (2048, 4096))
    short = replace(cfg, enhancer_epochs=0)
    assert [s.name for s in pix2pixhd.plan(short)] == ["global", "joint"]


@pytest.mark.parametrize("options", [
    dict(), dict(epochs=5, fine_epochs=7, enhancer_epochs=2), dict(fine_epochs=200, enhancers=2,
                                                                  enhancer_epochs=150),
    dict(epochs=1, fine_epochs=2, enhancer_epochs=1), dict(stage="joint")])
def test_learning_rate_is_the_sheets_rule(options):
    """Full to epoch n + 1, then lr (1 - (e - n - 1) / m); enhancer and joint share a schedule."""
    cfg = Config(classes="cityscapes", **{"size": (1024, 2048)} | options)
    epoch, runs = 0, {}
    for stage in pix2pixhd.plan(cfg):
        for _ in range(stage.epochs):
            key = stage.cfg.enhancers
            runs.setdefault(key, []).append(pix2pixhd.learning_rate(stage, epoch))
            epoch += 1
    skipped = cfg.enhancer_epochs if cfg.stage == "joint" else 0
    for enhancers, rates in runs.items():
        total = cfg.fine_epochs if enhancers else cfg.epochs
        m = total // 2
        n = total - m
        rule = [2e-4 * (1 if e <= n + 1 else 1 - (e - n - 1) / m) for e in range(1, total + 1)]
        assert rates == pytest.approx(rule[skipped:], rel=1e-12)
        assert rates[-1] == pytest.approx(2e-4 / max(m, 1), rel=1e-9)


def weights_of(state: State) -> dict[str, torch.Tensor]:
    return {f"{k}.{n}": v.clone() for k in NETS
            for n, v in getattr(state, k).state_dict().items()}


def marked(state: State) -> dict[str, torch.Tensor]:
    """All weights as if trained: drawn from 5 to 6."""
    for name in NETS:
        for p in getattr(state, name).parameters():
            nn.init.uniform_(p, 5, 6)
    return weights_of(state)


def test_grow_keeps_what_is_trained_and_starts_the_rest_afresh():
    """G1, E and the coarse D_k by their resolution; enhancer, output and the finest D_k are new."""
    cfg = tiny(enhancers=2, scales=3)
    stages = pix2pixhd.plan(cfg)
    state = pix2pixhd.build(stages[0].cfg, CPU)
    for number, (before, stage) in enumerate(itertools.pairwise(stages), 1):
        old, opt_g, opt_d = marked(state), state.opt_g, state.opt_d
        state = pix2pixhd.grow(state, before.cfg, stage.cfg, CPU)
        new, k = weights_of(state), stage.cfg.enhancers - 1
        assert state.stage == number and state.opt_g is not opt_g and not state.opt_g.state
        assert (state.opt_d is opt_d) == (stage.name == "joint")   # Adam of D goes on, as released
        born = ((f"generator.enhancers.{k}.", "generator.output.",
                 f"discriminator.scales.{stage.cfg.scales - 1}.")
                if stage.name == "enhancer" else ())
        assert bool(born) != (new.keys() == old.keys())
        for name, value in new.items():
            if name.startswith(born):
                assert value.abs().max() < 2, name
            else:
                assert torch.equal(value, old[name]), name
    assert {id(p) for p in state.opt_g.param_groups[0]["params"]} == {
        id(p) for net in (state.generator, state.encoder) for p in net.parameters()}


@pytest.mark.parametrize("scales, ours, theirs", [
    (3, ["32", "64", "128"], ["16", "32", "64"]), (2, ["64", "128"], ["32", "64"]),
    (1, ["128"], ["64"])])
def test_init_of_an_enhancer_matches_discriminators_by_resolution(scales, ours, theirs, capsys):
    """A run of G1 alone has as many D as asked for, not one less: each goes to the D that sees
    images of the same height; one for smaller images than any here is left out, with a notice."""
    small = tiny(size=(64, 128), scales=scales)
    Path("one").mkdir()
    first = pix2pixhd.build(pix2pixhd.plan(small)[0].cfg, CPU)
    marked(first)
    content = {name: getattr(first, name).state_dict() for name in NETS}
    torch.save(content | {"script": "pix2pixhd", "config": vars(small), "stage": 0}, "one/c.pt")
    cfg = tiny(size=(128, 256), enhancers=1, scales=scales, stage="enhancer", init=("one/c.pt",))
    state = pix2pixhd.build(pix2pixhd.plan(cfg)[0].cfg, CPU)
    heights = dict(zip(theirs, first.discriminator.scales))        # the coarsest first
    for height, scale in zip(ours, state.discriminator.scales):
        for p, q in zip(scale.parameters(), heights.get(height, scale).parameters()):
            assert torch.equal(p, q) and (p.min() >= 5) == (height in heights)
    assert "left out" in capsys.readouterr().out
    assert state.generator.globe.front[0].weight.min() >= 5
    assert state.generator.output[0].weight.max() < 1


# ----------------------------------------------------------------------------- Released checkpoints

# Keys of the released files as the fact sheet prints them, some of each part, with their shapes.
PRINTED = {
    "G1": {"model.1.weight": (64, 36, 7, 7), "model.13.weight": (1024, 512, 3, 3),
           "model.24.conv_block.5.weight": (1024, 1024, 3, 3),
           "model.25.weight": (1024, 512, 3, 3), "model.34.bias": (64,),
           "model.38.weight": (3, 64, 7, 7)},
    "G1+G2": {"model.34.weight": (128, 64, 3, 3), "model1_1.1.weight": (32, 36, 7, 7),
              "model1_1.4.weight": (64, 32, 3, 3), "model1_2.2.conv_block.5.weight": (64, 64, 3, 3),
              "model1_2.3.weight": (64, 32, 3, 3), "model1_2.7.weight": (3, 32, 7, 7)},
    "E": {"model.1.weight": (16, 3, 7, 7), "model.13.weight": (256, 128, 3, 3),
          "model.16.weight": (256, 128, 3, 3), "model.25.bias": (16,),
          "model.29.weight": (3, 16, 7, 7)}}
RELEASED = {
    "G1": (lambda: ReleasedG(36, 64, 0), lambda: Generator(36, enhancers=0)),
    "G1+G2": (lambda: ReleasedG(36, 32, 1), lambda: Generator(36)),
    "E": (lambda: ReleasedE(16), lambda: Encoder())}


@pytest.mark.parametrize("kind", RELEASED)
def test_released_names_and_shapes_at_full_width(tmp_path, kind):
    """The printed keys are those of the oracle's networks, and each finds its place in ours."""
    with torch.device("meta"):
        stored, own = (make().state_dict() for make in RELEASED[kind])
    shapes = {k: tuple(v.shape) for k, v in stored.items()}
    assert PRINTED[kind].items() <= shapes.items() and len(shapes) == len(own)
    weights, = pix2pixhd.rename_released(dict(stored), tmp_path / "x.pth").values()
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in own.items()}


def test_files_of_foreign_networks_are_refused(tmp_path):
    save_released(ReleasedE(3), tmp_path / "E.pth")
    save_released(ReleasedG(5, 2, 0, 2, 1), tmp_path / "G.pth")
    with refused("G.pth", "generator", "size mismatch"):
        pix2pixhd.build(tiny(init=(str(tmp_path / "G.pth"),)), CPU)
    with refused("E.pth", "encoder", "uses nothing"):
        pix2pixhd.build(tiny(features=0, init=(str(tmp_path / "E.pth"),)), CPU)
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "fc.pth")
    with refused("fc.pth", "no released G or E", "fc.weight"):
        pix2pixhd.read(tmp_path / "fc.pth")


def test_released_files_paint_the_authors_pictures(shared, city):
    """Files as the authors publish them, from networks as their code describes them, through the
    command line: labels alone; with boundaries; with E and the styles of a photo; with clusters."""
    label_file, ids_file, photo_file = (shared / "city-data" / folder / name.format(1) for
                                        folder, name in zip(("test_label", "test_inst", "test_img"),
                                                            CITY))
    with Image.open(label_file) as image, Image.open(ids_file) as ids, Image.open(photo_file) as x:
        label, region = np.asarray(image).astype(np.int64), np.asarray(ids).astype(np.int64)
        photo = torch.from_numpy(np.asarray(x).astype(np.float32) / 127.5 - 1).movedim(-1, 0)[None]
    one_hot = F.one_hot(torch.from_numpy(label), 35).movedim(-1, 0)[None].float()
    edge = torch.from_numpy(edges_of(region))[None, None].float()
    s = torch.cat([one_hot, edge], 1)
    nets = {"G1": ReleasedG(35, 4, 0, 2, 2), "G2": ReleasedG(36, 2, 1, 2, 2),
            "GE": ReleasedG(39, 2, 1, 2, 2), "E": ReleasedE(2), "RGB": ReleasedG(3, 4, 0, 2, 2)}
    for name, net in nets.items():
        large_weights(net)
        save_released(net.float().requires_grad_(False), f"{name}.pth",
                      prefix="module." * (name == "G2"))
    scene = f"--gpu -1 --input {label_file}"
    call(f"sample --checkpoint G1.pth {scene} --output a.png")
    assert grey_levels("a.png", nets["G1"](one_hot)[0]) <= 1
    call(f"sample --checkpoint G2.pth {scene} --instances {ids_file} --output b.png")
    assert grey_levels("b.png", nets["G2"](s)[0]) <= 1
    call(f"sample --checkpoint RGB.pth --gpu -1 --input {photo_file} --output c.png")
    assert grey_levels("c.png", nets["RGB"](photo)[0]) <= 1
    call(f"edit --checkpoint GE.pth E.pth --gpu -1 --data {shared / 'city-data'} --size 64 64 "
         "--item 1 --output d.png")
    with Image.open("d.png") as image:                     # label map and photo; below, the same
        image.crop((68, 2, 132, 66)).save("photo.png")
    z = loops_average(nets["E"](photo), torch.from_numpy(region)[None])
    assert grey_levels("photo.png", nets["GE"](torch.cat([s, z], 1))[0]) <= 1
    # Their clusters file, a centre per class, read into a run that starts from their weights.
    draw = np.random.default_rng(0)
    centres = {int(k): draw.uniform(-1, 1, (1, 3)) for k in set(label.flat)}
    np.save("clusters.npy", centres, allow_pickle=True)
    call(f"--data {shared / 'city-data'} --size 64 64 --stage joint --init GE.pth E.pth --out r "
         "--gpu -1 --width 4 --downs 2 --blocks 2 --d-width 4 --features 3 --e-width 2 --loss GAN "
         "--steps 1 --lr 1e-9 --vgg random")
    call("encode --out r --clusters-file clusters.npy")
    call(f"sample --out r {scene} --instances {ids_file} --output e.png")
    z = torch.zeros(1, 3, 64, 64)
    for kind, centre in centres.items():
        z[0, :, torch.from_numpy(label == kind)] = torch.from_numpy(centre.T).float()
    assert grey_levels("e.png", nets["GE"](torch.cat([s, z], 1))[0]) <= 1


# --------------------------------------------------------------------------------- Sec. 3.4, styles

def test_objects_of_from_its_definition():
    """Every id once: the class of most of its pixels, its share of the image, its z."""
    region = torch.randint(0, 6, (9, 11)) * 7000 + 3
    label = torch.randint(0, 4, (9, 11))
    z = torch.rand(3, 9, 11)
    for number in region.unique():
        z[:, region == number] = torch.rand(3, 1)
    found = pix2pixhd.objects_of(z, label, region)
    assert [o[1] for o in found] == sorted(set(region.flatten().tolist()))
    for kind, number, share, value in found:
        mask = region == number
        votes = [int((label[mask] == k).sum()) for k in range(4)]
        assert votes[kind] == max(votes) and share == pytest.approx(mask.sum().item() / 99)
        assert torch.equal(value, z[:, mask][:, 0])


def inertia(points: torch.Tensor, centres: torch.Tensor) -> float:
    return sum(min(math.dist(p, c) ** 2 for c in centres.tolist()) for p in points.tolist())


def test_kmeans_is_a_minimum_and_keeps_the_best_start():
    """A fixed point: each centre is the mean of the points nearest to it; more starts, no worse."""
    points = torch.rand(60, 3)
    centres = pix2pixhd.kmeans(points, 7)
    owner = torch.cdist(points, centres).argmin(1)
    for k in range(7):
        torch.testing.assert_close(centres[k], points[owner == k].mean(0), rtol=0, atol=1e-5)
    costs = [inertia(points, pix2pixhd.kmeans(points, 7, restarts=n)) for n in range(1, 11)]
    assert all(b <= a + 1e-6 for a, b in zip(costs, costs[1:])) and costs[-1] < costs[0] - 1e-4


def test_kmeans_with_few_points_or_many_equal_ones():
    """min(k, distinct points) centres, and then they are the points themselves."""
    for points, k, n in (([[1.0, 2.0]], 10, 1), ([[0.0, 0.0], [1.0, 1.0], [2.0, 5.0]], 10, 3),
                         ([[0.5, 0.5]] * 30, 4, 1), ([[0.0, 0.0]] * 50 + [[1.0, 0.0]], 2, 2),
                         ([[0.0, 0.0]] * 99 + [[1.0, 0.0], [1.0, 1e-3]], 3, 3)):
        for seed in range(5):
            centres = pix2pixhd.kmeans(torch.tensor(points), k, seed)
            assert centres.shape == (n, 2)
            distinct = {tuple(p) for p in torch.tensor(points).tolist()}
            assert {tuple(c) for c in centres.tolist()} == distinct


CLUSTERS = {7: RNG.normal(0, 1, (10, 3)).astype(np.float32), 26: RNG.normal(0, 1, (4, 3)),
            np.int64(33): RNG.normal(0, 1, (1, 3)).astype(np.float32)}


@pytest.mark.parametrize("protocol", ["numpy's", 2, 3, 4])
def test_read_clusters(tmp_path, protocol):
    """numpy.save of a dict; of this numpy or of one before 2.0, which named its modules otherwise,
    or of Python 2, whose strings were bytes."""
    path = tmp_path / "features_clustered_010.npy"
    np.save(path, CLUSTERS)
    if protocol != "numpy's":
        head = path.read_bytes()[:128]
        body = pickle.dumps(np.array(CLUSTERS, dtype=object), protocol)
        if protocol == 2:
            assert b"numpy._core" in body
            body = body.replace(b"numpy._core", b"numpy.core")
        path.write_bytes(head + body)
    read = pix2pixhd.read_clusters(path)
    assert list(read) == [7, 26, 33] and all(type(k) is int for k in read)
    for k, v in CLUSTERS.items():
        assert read[k].dtype == torch.float32 and read[k].shape == v.shape
        assert np.array_equal(read[k].numpy(), v.astype(np.float32))


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [
    (os.system, "touch pwned"), (eval, "open('pwned', 'w')"), (open, "pwned", "w"),
    (np.save, "pwned", 1), (getattr, "word", "upper"), (os.mkdir, "pwned"),
    (pickle.loads, b"cos\nmkdir\n(S'pwned'\ntR.")], ids=lambda call: call[0].__name__)
def test_read_clusters_runs_nothing(tmp_path, call):
    """A file that names a function is refused in one line, before anything is called."""
    np.save(tmp_path / "evil.npy", {7: Evil(*call)})
    before = sorted(os.listdir(tmp_path))
    with refused("evil.npy", "asks for", call[0].__name__):
        pix2pixhd.read_clusters(tmp_path / "evil.npy")
    assert sorted(os.listdir(tmp_path)) == before


def styled(k: int = 4) -> State:
    """A state that only has styles: k centres per class, each with the class's number first."""
    styles = {kind: torch.tensor([[kind, i, -i] for i in range(k)]).float() for kind in range(12)}
    return State(None, None, None, None, None, None, styles=styles)


def many_objects(n: int = 2000, kind: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    region = torch.arange(n).view(1, 40, -1) + 1000 * kind
    return torch.full_like(region, kind), region


def test_draw_styles_depends_on_seed_and_object_alone():
    """The same seed, the same styles; another seed, others; an object gone, the rest unmoved."""
    label, region = many_objects()
    torch.manual_seed(1)
    first = pix2pixhd.draw_styles(styled(), label, region, 3)
    torch.manual_seed(2)
    assert torch.equal(pix2pixhd.draw_styles(styled(), label, region, 3), first)
    other = pix2pixhd.draw_styles(styled(), label, region, 4)
    assert 0.65 < (other != first).any(1).float().mean() < 0.85     # a quarter falls on the same
    shifted = other[0, 1].flatten()[:-1] == first[0, 1].flatten()[1:]
    assert shifted.float().mean() < 0.35                            # nor is it the next one's draw
    gone = region == 10123
    fewer = pix2pixhd.draw_styles(styled(), label.masked_fill(gone, 0), region.masked_fill(gone, 0),
                                  3)
    assert torch.equal(fewer[0][:, ~gone[0]], first[0][:, ~gone[0]])


def test_draw_styles_falls_back_to_the_mean_then_to_zero(capsys):
    """A class without a large object: its mean. One never seen: zeros, not unset memory."""
    label = torch.tensor([[[0, 1, 2]]])
    state = styled()
    state.styles, state.means = {0: torch.ones(1, 3)}, {1: torch.tensor([1.0, 2.0, 3.0])}
    z = pix2pixhd.draw_styles(state, label, label, 0)
    assert z[0, :, 0].T.tolist() == [[1, 1, 1], [1, 2, 3], [0, 0, 0]]
    printed = capsys.readouterr().out
    assert "class 1: no style" in printed and "mean" in printed and "never seen" in printed


def test_encode_clusters_large_objects_and_averages_all(capsys):
    """Sec. 3.4 and the release: K-means over objects above the area, means over all of a class."""
    cfg = tiny(limit=3, min_area=0.02, clusters=2)
    state = pix2pixhd.build(cfg, CPU)
    pix2pixhd.encode(cfg, state)
    data, found = common.Dataset("", "train", cfg.size, limit=3), {}
    for i in range(3):
        item = data[i]
        with torch.no_grad():
            z = state.encoder(item["image"][None])[0]
        for number in item["instance"].unique():
            mask = item["instance"] == number
            kind = int(item["label"][mask][0])
            found.setdefault(kind, []).append((mask.float().mean().item(), z[:, mask].mean(1)))
    assert state.means.keys() == found.keys()
    for kind, objects in found.items():
        mean = torch.stack([value for _, value in objects]).mean(0)
        torch.testing.assert_close(state.means[kind], mean, rtol=0, atol=1e-5)
        large = [value for share, value in objects if share > 0.02]
        assert (kind in state.styles) == bool(large)
        if 0 < len(large) <= 2:                                     # then they are the centres
            ours = sorted(state.styles[kind].tolist())
            theirs = sorted(value.tolist() for value in large)
            assert np.array(ours) == pytest.approx(np.array(theirs), abs=1e-5)
        elif large:
            assert state.styles[kind].shape == (2, 3)
    assert found.keys() - state.styles.keys()                       # the threshold left some out


# ----------------------------------------------------------------- Editor: Sec. 4.3, Figs. 1 and 11

@pytest.fixture
def editor():
    """The first street of the test split: cars 10000 - 10002, people 9000 - 9003, no truck."""
    cfg = tiny()
    state = pix2pixhd.build(cfg, CPU)
    state.styles = {k: torch.rand(4, 3) * 2 - 1 for k in range(12)}
    return pix2pixhd.Editor(state, cfg, common.Dataset("", "test", (32, 64))[0])


def scene(editor) -> tuple[torch.Tensor, ...]:
    return editor.label.clone(), editor.instance.clone(), editor.z.clone()


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


def in_step(editor) -> None:
    """Each object has one class and one style, and the border channel is of these objects."""
    for number in editor.instance.unique():
        mask = editor.instance == number
        assert len(editor.label[mask].unique()) == 1, f"classes of {number}"
        assert editor.z[:, mask].unique(dim=1).shape[1] == 1, f"styles of {number}"
    s = editor.pair()["input"]
    assert torch.equal(s[:, -1:], pix2pixhd.boundary_map(editor.instance[None]))
    assert torch.equal(s[0, :-1].argmax(0), editor.label)


def changed_only(before: tuple, editor, mask: torch.Tensor) -> bool:
    return all(torch.equal(old[..., ~mask], new[..., ~mask])
               for old, new in zip(before, scene(editor)))


def test_fig_1_the_scene_as_it_is(editor):
    in_step(editor)
    found = editor.objects()
    assert [o[2] for o in found] == sorted((o[2] for o in found), reverse=True)
    assert sum(o[2] for o in found) == pytest.approx(1)
    assert {o[1] for o in found} >= {10000, 10001, 10002, 9000, 0, 1}
    with torch.no_grad():                                           # the photo's own styles
        item = common.Dataset("", "test", (32, 64))[0]
        z = loops_average(editor.state.encoder(item["image"][None]), item["instance"][None])[0]
    torch.testing.assert_close(editor.z, z, rtol=0, atol=1e-5)
    image = editor.render()
    assert image.shape == (3, 32, 64) and image.abs().max() <= 1
    with torch.no_grad():
        s = torch.cat([editor.pair()["input"], editor.z[None]], 1)
        torch.testing.assert_close(image, editor.state.generator(s)[0], rtol=0, atol=1e-5)
    edge = pix2pixhd.boundary_map(editor.instance[None])[0, 0] > 0
    assert (editor.picture()[:, edge] == -1).all()                  # borders in black
    sky = (editor.label == 0) & ~edge
    colour = torch.tensor([70, 130, 180]) / 127.5 - 1
    torch.testing.assert_close(editor.picture()[:, sky].unique(dim=1)[:, 0], colour)


def test_remove_fills_the_hole_from_around_it(editor):
    """No pixel of the object is left; each takes class, id and style of a pixel beside it."""
    before, mask = scene(editor), editor.instance == 10002
    editor.remove(10002)
    in_step(editor)
    assert not (editor.instance == 10002).any() and changed_only(before, editor, mask)
    rows, columns = mask.nonzero(as_tuple=True)
    border = set()
    for r, c in zip(rows.tolist(), columns.tolist()):
        near = [(a, b) for a, b in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1))
                if 0 <= a < 32 and 0 <= b < 64]
        assert any(editor.instance[a, b] == editor.instance[r, c] for a, b in near)
        border |= {int(before[1][a, b]) for a, b in near} - {10002}
    assert set(editor.instance[mask].tolist()) <= border


def test_remove_does_not_wrap_round_the_image(editor):
    """A strip along the left edge is filled from its right, not from the image's other side."""
    editor.label[:], editor.instance[:] = 3, 3
    editor.label[:, -5:], editor.instance[:, -5:] = 0, 0
    editor.label[:, :4], editor.instance[:, :4] = 10, 10000
    editor.z = editor.instance[None].float().repeat(3, 1, 1)
    editor.remove(10000)
    assert (editor.instance[:, :-5] == 3).all() and (editor.instance[:, -5:] == 0).all()


def test_edits_change_exactly_their_pixels_and_are_undone(editor):
    """A new object's id is class * 1000 + k, never one in use; its style is that of its class, in
    the scene or else of the clusters. A copy is cut at the image's edge. Undo goes all the way."""
    right = 66 - int((editor.instance == 10002).nonzero()[:, 1].max())     # two columns too far
    scenes, image, styles = [scene(editor)], editor.render(), editor.state.styles
    for name, *arguments, kind in (
            ("set_class", 9000, "car", 10), ("set_class", 10000, 11, 11),
            ("set_class", 10001, "truck", 11), ("set_style", 10002, 3, 10),
            ("paste", 10002, -6, 4, 10), ("paste", 10002, 0, right, 10),
            ("paint", 0, 0, 9, 9, "car", 10), ("set_class", 3, "building", 1)):
        label, instance, z = before = scenes[-1]
        mask = instance == arguments[0]
        allowed = z[:, label == kind].T                    # styles of this class in the scene
        if name == "paste":
            source, mask = mask, torch.zeros_like(mask)
            for r, c in source.nonzero().tolist():
                if 0 <= r + arguments[1] < 32 and 0 <= c + arguments[2] < 64:
                    mask[r + arguments[1], c + arguments[2]] = True
            allowed = z[:, source].T
        elif name == "paint":
            mask = torch.zeros_like(mask)
            mask[:9, :9] = True
        elif name == "set_style":
            allowed = styles[10][3:4]
        getattr(editor, name)(*arguments)
        in_step(editor)
        assert changed_only(before, editor, mask) and (editor.label[mask] == kind).all()
        number, = editor.instance[mask].unique().tolist()
        assert number // 1000 == kind           # a building that was a car is no part of the houses
        assert number not in instance or name == "set_style"
        allowed = allowed if len(allowed) else styles[kind][:1]
        assert (allowed == editor.z[:, mask][:, 0]).all(1).any(), (name, arguments)
        scenes.append(scene(editor))
        assert not same(scenes[-1], before)
    assert not torch.equal(editor.render(), image)         # and it is seen
    for expected in scenes[-2::-1]:
        editor.undo()
        assert same(scene(editor), expected)
    with refused("undo", "nothing was changed"):
        editor.undo()


def test_editor_without_an_encoder():
    """Labels can be edited, styles cannot."""
    cfg = tiny(features=0)
    item = common.Dataset("", "test", (32, 64))[0]
    editor = pix2pixhd.Editor(pix2pixhd.build(cfg, CPU), cfg, item)
    first = editor.render()
    editor.set_class(10000, "road").remove(10001).paste(10002, -3, 0).paint(0, 0, 5, 5, "truck")
    assert not len(editor.z) and not torch.equal(editor.render(), first)
    with refused("--style", "no encoder"):
        editor.set_style(10002, 0)
    with refused("label maps"):
        pix2pixhd.Editor(editor.state, cfg, {"input": torch.zeros(3, 32, 64)})


def test_editor_with_ids_of_another_convention():
    """Ids counted through, as panoptic sets have them: two pieces of stuff, a car whose id is the
    number of a class. New objects take no id of another class; styles stay with their objects."""
    cfg = tiny()
    state = pix2pixhd.build(cfg, CPU)
    state.styles = {k: torch.rand(4, 3) * 2 - 1 for k in range(12)}
    label, instance = torch.zeros(2, 32, 64).long()
    label[:, :30], instance[:, :20], instance[:, 20:30] = 1, 1, 2
    label[10:20, 40:50], instance[10:20, 40:50] = 10, 3
    item = {"label": label, "instance": instance, "image": torch.rand(3, 32, 64) * 2 - 1}
    for name, *arguments in (("paint", 0, 35, 5, 40, "road"), ("paste", 2, 0, 30),
                             ("set_class", 2, "road"), ("paint", 0, 35, 5, 40, "building")):
        editor = pix2pixhd.Editor(state, cfg, item)
        getattr(editor, name)(*arguments)
        in_step(editor)


# ----------------------------------------------------------------------- As a user calls it: stages

# Two steps an epoch (five images, batches of two): the global stage is steps 1 to 4, the enhancer's
# 5 and 6, the joint one 7 to 10. Step 3 is in mid-epoch.
SMALL = ("--width 4 --downs 2 --blocks 1 --enhancer-blocks 1 --scales 2 --d-width 4 --features 2 "
         "--e-width 2")
TINY = (f"--size 64 64 {SMALL} --batch-size 2 --epochs 2 --fine-epochs 3 --enhancer-epochs 1 "
        "--save-every 3 --limit 5 --loss GAN+FM --vgg random --lr 0.0002 --gpu -1")
CITY = ("{}_gtFine_labelIds.png", "{}_gtFine_instanceIds.png", "{}_leftImg8bit.png")
STEPS = 10


def call(line: str) -> str:
    return works("pix2pixhd", line)


def refuse(line: str, *words) -> None:
    fails("pix2pixhd", line, *words)


@pytest.fixture(autouse=True)
def quickly(no_plots):
    """losses.png takes longer to draw than these networks to train."""


def scenes(root: Path, names=("{}.png",) * 3, instances=("train", "test"),
           photos=("train", "test")) -> Path:
    """Three scenes in pix2pixHD's layout: road 7, sky 23, two cars 26 that touch, a bicycle 33."""
    for split in ("train", "test"):
        for i in range(3):
            label = np.full((64, 64), 7, np.uint8)
            label[:20], label[40:, 8:30], label[24:32, 40:60] = 23, 26, 33
            ids = label.astype(np.uint16)
            ids[40:, 8:16 + i], ids[40:, 16 + i:30], ids[24:32, 40:60] = 26000, 26001, 33001
            save(root / f"{split}_label" / names[0].format(i), label)
            if split in instances:
                save(root / f"{split}_inst" / names[1].format(i), ids)
            if split in photos:
                picture(root / f"{split}_img" / names[2].format(i), 64, 64, i)
    return root


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def run(shared) -> Path:
    """All three stages on the streets, never interrupted. Tests read it and write elsewhere."""
    (shared / "said.txt").write_text(call(f"{TINY} --out {shared / 'whole'}"))
    return shared / "whole"


@pytest.fixture(scope="module")
def legs(shared) -> dict[int, Path]:
    """The same run, stopped at steps 3, 4, 6 and 9 and gone on with: a copy of each stop."""
    out, copies = shared / "legs", {}
    for step in (3, 4, 6, 9):
        call(f"{TINY} --out {out} --steps 3" if step == 3 else f"--resume --out {out} "
             f"--steps {step}")
        copies[step] = shared / f"at-{step}"
        shutil.copytree(out, copies[step])
    return copies


@pytest.fixture(scope="module")
def city(shared) -> Path:
    """Two steps on files in the released Cityscapes layout, with styles."""
    data = scenes(shared / "city-data", CITY)
    call(f"{TINY} --enhancers 0 --steps 2 --data {data} --out {shared / 'city'}")
    return shared / "city"


@pytest.fixture
def inputs(monkeypatch) -> list[torch.Tensor]:
    """What G is given at test time: s, then the styles z in the last channels."""
    seen, translate = [], pix2pixhd.translate

    def spy(generator, s):
        seen.append(s.clone())
        return translate(generator, s)

    monkeypatch.setattr(pix2pixhd, "translate", spy)
    return seen


def test_one_command_prints_and_trains_the_schedule(run):
    text = (run.parent / "said.txt").read_text()
    for part in ("stage 1 of 3, global: 2 epochs at 32x32 with 1 D scale",
                 "stage 2 of 3, enhancer: 1 epochs at 64x64 with 2 D scale",
                 "stage 3 of 3, joint: 2 epochs at 64x64 with 2 D scale", "10 steps of 2 image"):
        assert part in text, text
    # Five test streets as input | output | truth, two of them side by side; half as large at first.
    assert size_of(run / "samples" / "0000003.png") == (6 * 34 + 2, 3 * 34 + 2)
    assert size_of(run / "samples" / "0000010.png") == (6 * 66 + 2, 3 * 66 + 2)
    content = stored(run)
    assert (content["stage"], place(run)) == (2, (STEPS, 4, 4))
    assert content["opt_g"]["state"][0]["step"] == 4        # G's Adam starts afresh in each stage,
    assert content["opt_d"]["state"][0]["step"] == 6        # D's with each new D
    assert set(content["means"]) == set(range(12)) >= set(content["styles"])
    assert len(content["styles"][10]) > 1                   # cars: more than one style
    assert all(v.shape[1] == 2 and len(v) <= 10 for v in content["styles"].values())


@pytest.mark.parametrize("when, workers", [(2, 0), (3, 0), (5, 1), (7, 0)])
def test_interrupted_in_any_stage_equals_uninterrupted(run, monkeypatch, when, workers):
    """Inside the global and the joint stage, and at both borders between stages."""
    step, done = pix2pixhd.train_step, itertools.count()

    def interrupted(state, batch, cfg):
        if next(done) == when:
            signal.raise_signal(signal.SIGINT)
        return step(state, batch, cfg)

    with monkeypatch.context() as patch:
        patch.setattr(pix2pixhd, "train_step", interrupted)
        ended = as_user("pix2pixhd", f"{TINY} --out r --workers {workers}")
    assert ended.code == 130 and f"stopped at step {when + 1}" in ended.out
    assert (place("r")[0], stored("r")["styles"]) == (when + 1, {})
    call("--resume --out r")
    assert_same({k: v for k, v in stored("r").items() if k in NETS + ("styles", "opt_g", "opt_d")},
                {k: v for k, v in stored(run).items() if k in NETS + ("styles", "opt_g", "opt_d")})


def test_more_epochs_than_planned(legs, run):
    """A stage whose end is still ahead may grow. One that has begun cannot be pushed away."""
    for where, flags in ((legs[6], "--epochs 5"), (run, "--epochs 3"), (legs[9], "--epochs 1")):
        shutil.copytree(where, "copy")
        refuse(f"--resume --out copy {flags} --steps 99", flags)
        assert_same_state("copy", where)
        shutil.rmtree("copy")
    shutil.copytree(legs[3], "r")
    call("--resume --out r --epochs 3 --steps 6")          # still in the global stage
    assert (stored("r")["stage"], place("r")) == (0, (6, 2, 4))
    shutil.copytree(run, "s")
    text = call("--resume --out s --fine-epochs 4")
    assert (stored("s")["stage"], place("s")[0]) == (2, STEPS + 2)
    assert "the learning rate follows it" in text


def test_stages_one_by_one_make_what_the_whole_run_makes(run, legs):
    """--stage global, enhancer, joint, each from the checkpoint of the one before."""
    call(f"{TINY} --stage global --out g --scales 1")
    assert (place("g")[0], stored("g")["stage"]) == (4, 0)
    call("sample --out g --limit 1 --output o")            # half-sized images
    assert [size_of(p) for p in Path("o").iterdir()] == [(32, 32)]
    call(f"{TINY} --stage enhancer --init g/checkpoint.pt --out e")
    frozen = {k: v for k, v in stored("g")["generator"].items() if k.startswith("globe")}
    assert_same({k: stored("e")["generator"][k] for k in frozen}, frozen)
    call(f"{TINY} --stage joint --init e/checkpoint.pt --out j")
    assert not torch.equal(stored("j")["generator"][min(frozen)], frozen[min(frozen)])
    for name in NETS:
        assert {k: v.shape for k, v in stored("j")[name].items()} == {
            k: v.shape for k, v in stored(run)[name].items()}
    call("sample --out j --limit 1 --output p")


@pytest.mark.parametrize("flags, words", [
    ("--stage joint --width 8", ["generator", "size mismatch"]),
    ("--stage joint --no-boundary", ["generator", "size mismatch"]),
    ("--stage joint --features 3", ["size mismatch"]),
    ("--stage enhancer --enhancers 2 --size 128 128 --blocks 2", ["globe.residual.1"]),
    ("", ["enhancers.0"]), ("--enhancers 0", ["enhancers.0"]),
    ("--stage enhancer --enhancers 0", ["--stage enhancer", "--enhancers"])])
def test_init_that_does_not_fit_names_the_weight(run, flags, words):
    refuse(f"{TINY} --steps 1 --out x --init {run / 'checkpoint.pt'} {flags}", *words)
    assert not Path("x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--crop 32 32", "--stored-features"])
def test_settings_of_the_enhancer_train_resume_and_sample(run, flags):
    line = f"{TINY} --stage joint --init {run / 'checkpoint.pt'} --steps 2"
    call(f"{line} --out r {flags}")
    if "stored" in flags:                                  # E is as it was in the file
        assert_same(stored("r")["encoder"], stored(run)["encoder"])
    else:
        call(f"{line} --out plain")
        assert losses_of("r") != losses_of("plain")
    call("--resume --steps 3 --out r")
    call("sample --out r --limit 1")
    assert [size_of(p)[0] for p in Path("r/test").iterdir()] == [64]


# ------------------------------------------------------------ As a user calls it: data and sampling

def test_without_instance_maps_the_labels_do():
    """Told once, remembered by the checkpoint, and nobody is asked for instances again."""
    data = scenes(Path("data"), instances=())
    text = call(f"{TINY} --enhancers 0 --data {data} --steps 2 --out r")
    assert "trained without the boundary" in text and "averaged over labels" in text
    config = stored("r")["config"]
    assert (config["boundary"], config["pool"]) == (False, "label")
    assert set(stored("r")["styles"]) == {7, 23, 26, 33}
    call("sample --out r --input data/test_label/1.png --output o.png")
    text = call("edit --out r --style 26=1 --output e.png")         # both cars are one region
    assert re.search(r"^ +26 +class 26 ", text, re.MULTILINE)


def test_data_without_what_the_networks_read_is_refused(city):
    """Instance maps in one split alone, or gone when testing or going on; labels gone."""
    data = scenes(Path("half"), instances=("train",))
    refuse(f"{TINY} --enhancers 0 --data {data} --steps 1 --out r", "half", "test split",
           "--no-boundary")
    none = scenes(Path("none"), CITY, instances=())
    shutil.copytree(city, "c")
    for line in ("sample", "edit", "encode", "evaluate", "--resume --steps 9"):
        refuse(f"{line} --out c --data {none}", "none", "instance maps are needed")
    for split in ("train", "test"):
        for side in "AB":
            picture(Path(f"pairs/{split}_{side}/1.png"), 64, 64)
    for line in ("sample", "edit", "encode", "evaluate", "--resume --steps 9"):
        refuse(f"{line} --out c --data pairs", "pairs", "label")
    assert not Path("r").exists() and not list(Path(".").rglob("fcn8s*"))


def test_edges_to_photos():
    for split, side, i in itertools.product(("train", "test"), "AB", range(3)):
        picture(Path(f"data/{split}_{side}/{i}.png"), 64, 64, i + 9 * (side == "B"))
    line = f"{TINY} --preset edges2photo --features 0 --data data"
    call(f"{line} --steps 7 --out r")                      # through all three stages
    assert stored("r")["config"]["task"] == "pairs" and stored("r")["stage"] == 2
    call(f"sample --out r --output o --input {picture(Path('e.jpg'), 33, 47)}")
    assert size_of("o/e.png") == (47, 33)
    refuse(line.replace("--features 0", "--features 2") + " --out x", "--features 2",
           "--features 0")
    for mode, word in (("evaluate", "sample"), ("edit", "label"), ("encode", "encoder")):
        refuse(f"{mode} --out r", word)
    for flags in ("--samples 2", "--vary car"):
        refuse(f"sample --out r {flags}", "no encoder", "--features 3")


def test_a_test_split_without_photos():
    """Cityscapes as the authors ship it: labels and instances to test with, and no truth."""
    data = scenes(Path("data"), CITY, photos=("train",))
    call(f"{TINY} --enhancers 0 --data {data} --steps 2 --out r")
    assert size_of("r/samples/0000002.png") == (4 * 66 + 2, 2 * 66 + 2)      # input | output
    call("sample --out r --samples 2")
    assert len(list(Path("r/test").iterdir())) == 6
    refuse("evaluate --out r --vgg random --scorer-width 2", "test split", "image files")
    assert not list(Path(".").rglob("fcn8s*"))              # said before a scorer is trained
    call("edit --out r --style 26000=1 --output e.png")


def test_sample_reads_a_folder_of_cityscapes_names(city, shared):
    data = shared / "city-data"
    call(f"sample --out {city} --input {data / 'test_label'} --instances {data / 'test_inst'} "
         "--output o")
    assert len(list(Path("o").iterdir())) == 3


@pytest.mark.parametrize("vary", ["", "--vary car", "--vary 10 person"])
def test_vary_moves_the_styles_of_these_classes_alone(run, inputs, vary):
    call(f"sample --out {run} --limit 1 --output o --samples 3 {vary}")
    first, *rest = inputs
    label = first[0, :12].argmax(0)
    moved = torch.stack([(first != other)[0, 13:].any(0) for other in rest]).any(0)
    kinds = {int(k) for k in label[moved].unique()}
    assert kinds <= {"": set(range(12)), "--vary car": {10}, "--vary 10 person": {9, 10}}[vary]
    assert 10 in kinds and (vary or len(kinds) > 2)
    assert all(torch.equal(first[:, :13], other[:, :13]) for other in rest)      # the labels stay


@pytest.mark.parametrize("flags, words", [
    ("--input in", ["--instances"]), ("--input in/a.png", ["in/a.png", "--instances"]),
    ("--input in/a.png --instances nowhere", ["nowhere"]),
    ("--input in --instances wide.png", ["wide.png", "folder"]),
    ("--input in/a.png --instances wide.png", ["in/a.png", "(33, 48)"]),
    ("--vary dragon", ["dragon", "car"]), ("--vary 99", ["99", "car"]),
    ("--instances ids", ["--instances", "--input"]),
    ("--size 30 40", ["--size 30 40", "32 40"])])
def test_mistakes_at_sampling(run, flags, words):
    for path in ("in/a.png", "in/b.png"):
        label_map(path, 33, 47)
    label_map("wide.png", 33, 48)
    refuse(f"sample --out {run} --output o {flags}", *words)
    assert not [p for p in Path("o").rglob("*") if p.is_file()]


@pytest.mark.parametrize("flags, words", [
    ("--size 60 64", ["--size 60 64", "--size 64 64", "8"]), ("--size 8 64", ["8 64", "16"]),
    ("--size 32 64", ["32"]), ("--size 64 128 --enhancers 2", ["32"]),
    ("--crop 96 64", ["--crop 96 64", "64"]), ("--crop 20 32", ["--crop 20 32", "--crop 16 32"]),
    ("--crop 32 0", ["--crop 32 0"]), ("--width 3", ["--width 3", "2"]),
    ("--min-area 2", ["--min-area 2"]), ("--enhancer-epochs 3", ["--fine-epochs 3"]),
    ("--enhancers 9", ["--enhancers 9"]), ("--scales 99", ["--scales 99"]),
    ("--generator unet --enhancers 1", ["--generator unet", "--enhancers 0"]),
    ("--task pairs", ["--features 2"]), ("--task pairs --features 0 --no-boundary", ["A files"]),
    ("--stage enhancer --enhancer-epochs 0", ["--enhancer-epochs"]),
    ("--set 1=2", ["edit"]), ("--clusters-file c.npy", ["--clusters-file", "encode"])])
def test_absurd_values_are_refused_in_one_line(flags, words):
    refuse(f"{TINY} --steps 2 --out r {flags}", *words)
    assert not list(Path(".").iterdir())


# -------------------------------------------------------- As a user calls it: styles, edits, scores

def test_encode_completes_an_interrupted_run(run, legs):
    """It fills in the styles and leaves all else in the checkpoint as it was."""
    shutil.copytree(legs[9], "r")
    torch.save(stored(run) | {"styles": {}, "means": {}}, "r/checkpoint.pt")
    before = stored("r")
    assert "no styles in the checkpoint yet" in call("sample --out r --output o")
    call(f"sample --out {run} --output p")
    assert Path("o/street_1000000.png").read_bytes() == Path("p/street_1000000.png").read_bytes()
    call("encode --out r")
    after = stored("r")
    styles = {k: after.pop(k) for k in ("styles", "means")}
    assert_same(after, {k: v for k, v in before.items() if k not in styles})
    assert_same(styles, {k: stored(run)[k] for k in styles})
    torch.save(before, "r/checkpoint.pt")                   # ended from outside after the last step
    call("--resume --out r")
    assert_same_state("r", run)
    refuse("--resume --out r", f"finished at step {STEPS}")
    call("encode --out r --clusters 2 --min-area 0")
    assert max(len(v) for v in stored("r")["styles"].values()) == 2
    shutil.copy("r/checkpoint.pt", "other.pt")
    call("encode --checkpoint other.pt")
    assert_same(torch.load("other.pt", weights_only=True)["styles"], stored(run)["styles"])
    for broken in ({10: [1.0]}, {99: torch.zeros(1, 2)}, {10: torch.zeros(3)}, [1]):
        torch.save(stored(run) | {"styles": broken}, "broken.pt")
        refuse("sample --limit 1 --checkpoint broken.pt", "broken.pt", "styles")


def test_the_authors_clusters_can_be_read(run, inputs):
    """Their file is numpy's pickle of {class: (K, C)}; cars then have these styles and no other."""
    shutil.copytree(run, "r")
    centres = np.array([[.25, -.5], [.75, .125]])
    np.save("clusters.npy", {10: centres, 3: np.zeros((1, 2))}, allow_pickle=True)
    call("encode --out r --clusters-file clusters.npy")
    assert_same(stored("r")["styles"], {10: torch.tensor(centres).float(), 3: torch.zeros(1, 2)})
    call("sample --out r --limit 2 --output o --samples 2")
    values = {tuple(v) for s in inputs for v in
              s[0, 13:][:, s[0, :12].argmax(0) == 10].T.tolist()}
    assert values == {(.25, -.5), (.75, .125)}
    np.save("wide.npy", {10: np.zeros((2, 3))}, allow_pickle=True)
    np.save("far.npy", {99: np.zeros((2, 2))}, allow_pickle=True)
    np.save("none.npy", {}, allow_pickle=True)
    before = Path("r/checkpoint.pt").read_bytes()
    for name in ("wide.npy", "far.npy", "none.npy", "missing.npy"):
        refuse(f"encode --out r --clusters-file {name}", name)
    assert Path("r/checkpoint.pt").read_bytes() == before


def objects_in(text: str) -> dict[int, str]:
    """The list that the mode edit prints: {id: class}."""
    return {int(k): v for k, v in re.findall(r"^ +(\d+)  (\w.*?) +[\d.]+%", text, re.MULTILINE)}


@pytest.mark.parametrize("flags, expected", [
    ("", {7: "road", 23: "sky", 26000: "car", 26001: "car", 33001: "bicycle"}),
    ("--set 33001=person --remove 26001 --paste 26000@-6,25 --paint 0,0,8,8=vegetation --undo "
     "--paint 50,50,60,60=truck --style 26000=0",
     {7: "road", 23: "sky", 24000: "person", 26000: "car", 26001: "car", 27000: "truck"}),
    ("--remove 26001=building", {7: "road", 23: "sky", 26000: "car", 33001: "bicycle",
                                 11: "building"}),
    ("--set 26000=25 --set 25000=26", {7: "road", 23: "sky", 26000: "car", 26001: "car",
                                       33001: "bicycle"}),
    ("--paste 26000@-6,25 --remove 26002 --remove 26001",
     {7: "road", 23: "sky", 26000: "car", 33001: "bicycle"})])
def test_edits_happen_in_the_order_given(city, flags, expected):
    assert objects_in(call(f"edit --out {city} --output e.png {flags}")) == expected
    assert size_of("e.png") == (2 * 66 + 2, 2 * 66 + 2)
    with Image.open("e.png") as image:
        pixels = np.asarray(image)
    before, after = pixels[2:66, 68:132], pixels[68:132, 68:132]
    assert (before == after).all() == (flags == "")


def test_pictures_of_edits_are_numbered_and_overwrite_nothing(city, shared):
    shutil.copytree(city, "r")
    call("edit --out r --item 2")
    call("edit --out r --set 33001=person")
    assert sorted(p.name for p in Path("r/edits").iterdir()) == ["1.png", "2.png"]
    before = Path("r/edits/1.png").read_bytes()
    refuse("edit --out r --output r/edits/1.png", "r/edits/1.png", "exists")
    assert Path("r/edits/1.png").read_bytes() == before
    there = shared / "city-data" / "test_label" / "new.png"
    refuse(f"edit --out r --output {there}", "new.png", "join")
    assert not there.exists()


@pytest.mark.parametrize("flags, words", [
    ("--set 26000", ["--set 26000", "ID=CLASS"]), ("--set car=26000", ["ID=CLASS"]),
    ("--style 26000=red", ["ID=K"]), ("--style 26000=-1", ["ID=K"]), ("--remove =car", ["ID"]),
    ("--paste 26000=1,2", ["ID@DOWN,RIGHT"]), ("--paint 0,0,9,9", ["TOP,LEFT,BOTTOM,RIGHT"]),
    ("--paint 0,0,99,9=car", ["0,0,99,9", "64"]), ("--paint 9,9,9,12=car", ["9,9,9,12"]),
    ("--remove 5", ["object 5", "26000", "33001"]), ("--style 26000=99", ["99", "car", "0 to"]),
    ("--set 26000=dragon", ["dragon", "truck"]), ("--paste 26000@999,0", ["outside"]),
    ("--undo --set 33001=person", ["undo", "nothing"]), ("--item nobody", ["nobody", "0"])])
def test_mistakes_in_edits(city, flags, words):
    refuse(f"edit --out {city} --output e.png {flags}", *words)
    assert not Path("e.png").exists()


def test_evaluate_prints_the_papers_numbers(run):
    text = call(f"evaluate --checkpoint {run / 'checkpoint.pt'} --out new/run --vgg random "
                "--scorer-width 2 --scorer-steps 2 --limit 3")
    metrics = json.loads(Path("new/run/metrics.json").read_text())
    assert metrics["images"] == 3 and 0 < metrics["L1"] < 2
    for row in ("output", "truth"):
        assert set(metrics[row]) == {"per-pixel acc", "per-class acc", "class IOU"}
    text = " ".join(text.split())
    for part in ("ours 83.78 0.6389", "pix2pix 78.34 0.3948", "CRN 70.55 0.3483",
                 "oracle 84.29 0.6857", "68.55", "58.9"):
        assert part in text


@pytest.mark.parametrize("change", [{"stage": 7}, {"stage": None}, {"stage": "joint"}])
def test_a_stage_that_makes_no_sense_is_damage(run, change):
    torch.save(stored(run) | change, "broken.pt")
    refuse("sample --checkpoint broken.pt", "broken.pt", "damaged")
    Path("r").mkdir()
    torch.save(stored(run) | change, "r/checkpoint.pt")
    refuse("--resume --out r --steps 99", "damaged")
