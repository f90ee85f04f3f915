"""What the pix2pixHD paper claims, tested on pix2pixhd.py.

The oracles share no code with the script: the authors' layers under their own names, numpy in
float64 with loops, printed numbers, gradients, limits. The check values come from the authors' own
PyTorch networks, filled with sines and run in float64.
"""

import copy
import itertools
import math
import os
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from conftest import paper_map, refused
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import common
import pix2pixhd
from pix2pixhd import Config, Encoder, Generator, MultiScaleDiscriminator, State

CPU = torch.device("cpu")


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


class ReleasedD(nn.Module):
    def __init__(self, c_in: int, w: int, scales: int, matching: bool = True):
        super().__init__()
        self.n, self.matching, c = scales, matching, [c_in, w, 2 * w, 4 * w, 8 * w, 1]
        for i in range(scales):
            groups = []
            for j, stride in enumerate((2, 2, 2, 1, 1)):
                norm = [nn.InstanceNorm2d(c[j + 1])] if 0 < j < 4 else []
                rest = [*norm, nn.LeakyReLU(0.2)] if j < 4 else []
                groups.append([nn.Conv2d(c[j], c[j + 1], 4, stride, 2), *rest])
            if matching:
                for j, group in enumerate(groups):
                    setattr(self, f"scale{i}_layer{j}", nn.Sequential(*group))
            else:
                setattr(self, f"layer{i}", nn.Sequential(*itertools.chain(*groups)))

    def forward(self, s, x):
        """Per scale, the finest first: the five maps, or the last alone."""
        y, results = torch.cat([s, x], 1), []
        for k in range(self.n):
            own, maps, a = self.n - 1 - k, [], y
            names = [f"scale{own}_layer{j}" for j in range(5)] if self.matching else [f"layer{own}"]
            for name in names:
                a = getattr(self, name)(a)
                maps.append(a)
            results.append(maps)
            y = F.avg_pool2d(y, 3, 2, 1, count_include_pad=False)
        return results


class ReleasedE(nn.Module):
    """early: the last convolution pads with zeros itself, and so stands at index 28."""

    def __init__(self, w: int, early: bool = False):
        super().__init__()
        layers = released_global(3, w, 4, 0)
        if early:
            layers[-3:] = [nn.Conv2d(w, 3, 7, padding=3), nn.Tanh()]
        self.model = nn.Sequential(*layers)

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


def state_of(generator=None, discriminator=None, encoder=None) -> State:
    nets = [net if net is None else net.double() for net in (generator, discriminator, encoder)]
    return State(*nets, None, None, None)


def through_a_file(net: nn.Module, state: State, path, **options) -> State:
    save_released(net, path, **options)
    pix2pixhd.load_networks(state, path)
    return state


def four_numbers(t: torch.Tensor) -> list[float]:
    h, w = t.shape[-2:]
    return [t.mean().item(), t.std(correction=0).item(), t[0, 0, 0, 0].item(),
            t[-1, -1, h // 2, w // 3].item()]


# ------------------------------------------------------------------------------------- Check values

@pytest.mark.parametrize("enhancers, width, size, numbers", [
    (0, 8, (64, 128), [-0.007884562, 0.197123630, -0.214373586, -0.077504562]),
    (1, 4, (64, 128), [-0.078856824, 0.297255844, 0.144393148, 0.380512630]),
    (2, 2, (128, 256), [-0.101932675, 0.144140810, -0.197143339, -0.016162673])])
@torch.no_grad()
def test_check_values_generators(tmp_path, enhancers, width, size, numbers):
    """The authors' G1, G1+G2, G1+G2+G3: same keys, same sums, same numbers, pixel by pixel."""
    theirs, s = filled(ReleasedG(7, width, enhancers)), sines(1, 7, *size)
    state = state_of(Generator(7, width=width * 2 ** enhancers, enhancers=enhancers))
    G = through_a_file(theirs, state, tmp_path / "latest_net_G.pth").generator
    assert four_numbers(G(s)) == pytest.approx(numbers, abs=1e-8)
    torch.testing.assert_close(G(s), theirs(s), rtol=0, atol=1e-6)   # norms enlarge roundings


@torch.no_grad()
def test_check_values_encoder(tmp_path):
    """E before pooling, and after, over rectangles with ids as large as Cityscapes'."""
    theirs, x = filled(ReleasedE(4)), sines(1, 3, 64, 128)
    E = through_a_file(theirs, state_of(encoder=Encoder(3, 4)), tmp_path / "E.pth").encoder
    assert four_numbers(E(x)) == pytest.approx(
        [0.100350096, 0.350718725, 0.310822662, -0.051041511], abs=1e-8)
    torch.testing.assert_close(E(x), theirs(x), rtol=0, atol=1e-9)
    ids = torch.tensor([[24000 + 1000 * (r // 20) + c // 50 for c in range(128)]
                        for r in range(64)])
    assert four_numbers(pix2pixhd.instance_average(E(x), ids[None])) == pytest.approx(
        [0.100350096, 0.057445395, 0.156594678, 0.157777223], abs=1e-8)


S, REAL, FAKE = sines(1, 4, 64, 128), sines(1, 3, 64, 128, phase=1.0), sines(1, 3, 64, 128,
                                                                            phase=2.0)


@pytest.mark.parametrize("scales, means, numbers, matching", [
    (2, [0.120650118, 0.055500604], [1.9232031527, 0.2616222350, 1.8997149719],
     [0.6272961654, 1.1448039305]),
    (3, [-0.137676451, 0.142323092, 0.045534747], [3.1228981592, 0.2131672758, 3.1022125446],
     [0.9043935935, 0.8885353901, 0.4699026548])])
@torch.no_grad()
def test_check_values_discriminators_and_losses(tmp_path, scales, means, numbers, matching):
    """Predictions, the GAN losses of both sides and Eq. (3), scale by scale, the finest first.

    One digit is not the fact sheet's: it prints 0.2131672158 for three scales. The layers above,
    written apart from the script, give 0.2131672758, and every other number of that row.
    """
    theirs = filled(ReleasedD(7, 8, scales))
    state = state_of(discriminator=MultiScaleDiscriminator(7, 8, scales))
    D = through_a_file(theirs, state, tmp_path / "latest_net_D.pth").discriminator
    real, fake = D(S, REAL), D(S, FAKE)
    assert [maps[-1].shape[2:] for maps in real] == [(11, 19), (7, 11), (5, 7)][:scales]
    assert [maps[-1].mean().item() for maps in real] == pytest.approx(means, abs=1e-8)
    d_real, d_fake = pix2pixhd.discriminator_loss(real, fake)
    g = pix2pixhd.generator_loss(fake)
    assert [g.item(), 2 * d_fake.item(), 2 * d_real.item()] == pytest.approx(numbers, abs=1e-8)
    per_scale = [pix2pixhd.feature_matching_loss([a], [b]).item() for a, b in zip(real, fake)]
    assert per_scale == pytest.approx(matching, abs=1e-8)
    for own, other in zip(itertools.chain(*real), itertools.chain(*theirs(S, REAL))):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-9)


def test_check_values_pooling():
    """3 x 3 means at stride 2, of what lies inside the image."""
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert pix2pixhd.half(image)[0, 0].tolist() == [[2.5, 4.0], [8.5, 10.0]]
    even = torch.full((1, 2, 5, 8), 0.3)                          # the border is not darker
    torch.testing.assert_close(pix2pixhd.half(even), torch.full((1, 2, 3, 4), 0.3))


# ------------------------------------------------------------------------------ Parameters and cost

def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("arguments, parameters", [
    (dict(c_in=35, enhancers=0), 182_543_619), (dict(c_in=36, enhancers=0), 182_546_755),
    (dict(c_in=39, enhancers=0), 182_556_163), (dict(c_in=3, enhancers=0), 182_443_267),
    (dict(c_in=35), 182_852_355), (dict(), 182_857_059), (dict(c_in=39), 182_871_171),
    (dict(enhancers=2), 182_947_699), (dict(width=32, enhancers=0), 45_672_611),
    (dict(width=16, downs=3, blocks=6, enhancers=0), 1_995_475)])
def test_generator_parameters(arguments, parameters):
    with torch.device("meta"):
        assert count(Generator(**arguments)) == parameters


@pytest.mark.parametrize("c_in, parameters", [(35, 318_147), (36, 319_715), (39, 324_419)])
def test_enhancer_parameters(c_in, parameters):
    """What G2 adds: the enhancer and its own output layer."""
    with torch.device("meta"):
        G = Generator(c_in)
    assert count(G.enhancers) + count(G.output) == parameters


def test_parts_of_the_generator():
    """G1 without its output layer; and G3's two enhancers, the first without one."""
    with torch.device("meta"):
        G2, G3 = Generator(36), Generator(36, enhancers=2)
    assert count(G2.globe) == count(G3.globe) == 182_537_344
    first, second = (count(enhancer) for enhancer in G3.enhancers)
    assert (first, second + count(G3.output)) == (315_008, 95_347)


@pytest.mark.parametrize("c_in, width, numbers", [
    (39, 64, [2_801_601, 5_603_202, 8_404_803]), (38, 64, [2_800_577, 5_601_154, 8_401_731]),
    (6, 64, [2_767_809, 5_535_618, 8_303_427]), (39, 32, [None, None, 2_138_019]),
    (39, 16, [None, None, 552_915])])
def test_discriminator_parameters(c_in, width, numbers):
    for scales, parameters in enumerate(numbers, 1):
        with torch.device("meta"):
            D = MultiScaleDiscriminator(c_in, width, scales)
        assert parameters in (None, count(D))


def test_encoder_and_vgg_parameters():
    with torch.device("meta"):
        assert count(Encoder()) == 788_803
        assert count(common.vgg_trunk(19, 64, "relu5_1")) == 12_944_960


def gflop(net: nn.Module, *shapes: tuple) -> float:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net(*(torch.zeros(1, *shape) for shape in shapes))
    return counter.get_total_flops() / 1e9


@pytest.mark.parametrize("make, shapes, measured", [
    (lambda: Generator(36, enhancers=0), [(36, 512, 1024)], 978.6),
    (lambda: Generator(36, enhancers=0), [(36, 256, 512)], 244.7),
    (lambda: Generator(36), [(36, 1024, 2048)], 1495.9),
    (lambda: Generator(39), [(39, 1024, 2048)], 1525.5),
    (lambda: Generator(36, enhancers=2), [(36, 2048, 4096)], 2259.7),
    (lambda: Generator(36, width=16, downs=3, blocks=6, enhancers=0), [(36, 128, 256)], 4.3),
    (lambda: MultiScaleDiscriminator(39, 64, 1), [(36, 512, 1024), (3, 512, 1024)], 64.1),
    (lambda: MultiScaleDiscriminator(39, 64, 2), [(36, 512, 1024), (3, 512, 1024)], 80.7),
    (lambda: MultiScaleDiscriminator(39, 64, 3), [(36, 512, 1024), (3, 512, 1024)], 85.1),
    (lambda: MultiScaleDiscriminator(39, 64, 3), [(36, 1024, 2048), (3, 1024, 2048)], 333.2),
    (lambda: MultiScaleDiscriminator(39, 16, 3), [(36, 128, 256), (3, 128, 256)], 0.55),
    (lambda: Encoder(), [(3, 512, 1024)], 14.6),
    (lambda: common.vgg_trunk(19, 64, "relu5_1"), [(3, 512, 1024)], 378.7)])
def test_cost_of_a_forward_pass(make, shapes, measured):
    """The cost measured on the authors' networks, a multiply-add counted as 2."""
    with torch.device("meta"):
        net = make()
    assert gflop(net, *shapes) == pytest.approx(measured, rel=0.02 if measured < 5 else 1e-3)


# ------------------------------------------------------------------------------------- Layer tables

def layer_table(net: nn.Module, *shapes: tuple) -> list[tuple]:
    """(in, out, kernel, stride, padding, its mode, output H, output W) of each convolution."""
    rows, kinds = [], (nn.Conv2d, nn.ConvTranspose2d)
    for module in net.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda m, _, y: rows.append(
                (m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.padding[0],
                 m.padding_mode, *y.shape[2:])))
    with torch.device("meta"):
        net(*(torch.zeros(1, *shape) for shape in shapes))
    return rows


def table_of_the_global_network(c_in: int, w: int, blocks: int, h: int = 512, wide: int = 1024):
    """Sec. 3.2 of the fact sheet, downwards and up again, without the last 7 x 7."""
    c = [w, 2 * w, 4 * w, 8 * w, 16 * w]
    rows = [(c_in, w, 7, 1, 3, "reflect", h, wide)]
    rows += [(c[i], c[i + 1], 3, 2, 1, "zeros", h >> i + 1, wide >> i + 1) for i in range(4)]
    rows += [(c[4], c[4], 3, 1, 1, "reflect", h // 16, wide // 16)] * (2 * blocks)
    return rows + [(c[i + 1], c[i], 3, 2, 1, "zeros", h >> i, wide >> i) for i in (3, 2, 1, 0)]


def test_layers_of_the_global_generator():
    with torch.device("meta"):
        G = Generator(36, enhancers=0)
    assert layer_table(G, (36, 512, 1024)) == [
        *table_of_the_global_network(36, 64, 9), (64, 3, 7, 1, 3, "reflect", 512, 1024)]
    assert isinstance(G.output[-1], nn.Tanh)


def test_layers_of_the_enhancer():
    with torch.device("meta"):
        G = Generator(36)
    assert layer_table(G, (36, 1024, 2048)) == [
        *table_of_the_global_network(36, 64, 9),
        (36, 32, 7, 1, 3, "reflect", 1024, 2048), (32, 64, 3, 2, 1, "zeros", 512, 1024),
        *[(64, 64, 3, 1, 1, "reflect", 512, 1024)] * 6, (64, 32, 3, 2, 1, "zeros", 1024, 2048),
        (32, 3, 7, 1, 3, "reflect", 1024, 2048)]


def test_layers_of_the_encoder():
    with torch.device("meta"):
        E = Encoder()
    assert layer_table(E, (3, 512, 1024)) == [
        *table_of_the_global_network(3, 16, 0), (16, 3, 7, 1, 3, "reflect", 512, 1024)]


@pytest.mark.parametrize("size, sides", [
    ((512, 1024), [(257, 513), (129, 257), (65, 129), (66, 130), (67, 131)]),
    ((256, 512), [(129, 257), (65, 129), (33, 65), (34, 66), (35, 67)]),
    ((128, 256), [(65, 129), (33, 65), (17, 33), (18, 34), (19, 35)])])
def test_layers_of_a_discriminator(size, sides):
    """Padding of 2: a map is one larger than a half, and the last two grow by one again."""
    with torch.device("meta"):
        D = MultiScaleDiscriminator(39, 64, 1)
        maps, = D(torch.zeros(1, 36, *size), torch.zeros(1, 3, *size))
    assert [(m.shape[1], *m.shape[2:]) for m in maps] == [
        (c, *side) for c, side in zip((64, 128, 256, 512, 1), sides)]
    kinds = [[type(m).__name__ for m in layer] for layer in D.scales[0].layers]
    assert kinds == [["Conv2d", "LeakyReLU"], *[["Conv2d", "GroupNorm", "LeakyReLU"]] * 3,
                     ["Conv2d"]]
    assert all(m.negative_slope == 0.2 for m in D.modules() if isinstance(m, nn.LeakyReLU))


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


def test_generators_start_alike_whatever_surrounds_them():
    """Fig. 3: G2 adds its own front-end to G1's last features, both after a ReLU, not to images."""
    G = Generator(5, width=4, downs=2, blocks=1, enhancers=1, enhancer_blocks=1)
    seen = {}
    G.globe.register_forward_hook(lambda m, a, y: seen.update(labels=a[0], below=y))
    G.enhancers[0].front.register_forward_hook(lambda m, a, y: seen.update(front=y))
    G.enhancers[0].residual.register_forward_hook(lambda m, a, y: seen.update(sum=a[0]))
    s = torch.rand(2, 5, 16, 24)
    with torch.no_grad():
        image = G(s)
    assert image.shape == (2, 3, 16, 24) and image.abs().max() <= 1
    assert torch.equal(seen["labels"], F.avg_pool2d(s, 3, 2, 1, count_include_pad=False))
    assert seen["below"].min() == 0 and seen["front"].min() == 0
    assert torch.equal(seen["sum"], seen["front"] + seen["below"])


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
    for k, (maps, field) in enumerate(zip(D(s, x), (70, 141, 283))):
        prediction = maps[-1]
        unit = prediction[0, 0, prediction.shape[2] // 2, prediction.shape[3] // 2]
        assert columns_seen(unit, s) == columns_seen(unit, x) == field
        assert pix2pixhd.receptive_field(k) == field


def test_receptive_fields_of_the_hidden_maps():
    """4, 10, 22, 46 pixels: what Eq. (3) compares."""
    D = linear(MultiScaleDiscriminator(2, 1, 1))
    s, x = torch.ones(2, 1, 1, 64, 160, dtype=torch.float64).requires_grad_().unbind()
    maps, = D(s, x)
    assert [columns_seen(m[0, 0, 4, m.shape[3] // 2], x) for m in maps] == [4, 10, 22, 46, 70]


# ----------------------------------------------------------------- Norm, residuals, initial weights

def test_instance_norm_is_pytorchs_in_value_and_gradient():
    ours, theirs = pix2pixhd.instance_norm(6), nn.InstanceNorm2d(6)
    assert not list(ours.parameters()) and not ours.state_dict()
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 6, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    for own, other in zip(torch.autograd.grad(ours(x), x, g), torch.autograd.grad(theirs(x), x, g)):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


def test_instance_norm_from_its_definition():
    """Mean and population variance over the pixels of one channel of one image; eps 1e-5."""
    x = np.random.default_rng(0).normal(2, 0.01, (2, 3, 4, 5))
    y = pix2pixhd.instance_norm(3)(torch.from_numpy(x)).numpy()
    for b, c in itertools.product(range(2), range(3)):
        plane = x[b, c]
        assert y[b, c] == pytest.approx((plane - plane.mean()) / np.sqrt(plane.var() + 1e-5))


@pytest.mark.parametrize("c, h, w", [(6, 5, 7), (64, 8, 16), (1, 9, 4)])
def test_instance_norm_takes_gradients_in_any_memory_order(c, h, w):
    """Contiguous or channels-last, input or incoming gradient: the same gradient."""
    norm, x, g = pix2pixhd.instance_norm(c), torch.randn(2, c, h, w), torch.randn(2, c, h, w)
    expected, = torch.autograd.grad(nn.InstanceNorm2d(c)(x.requires_grad_()), x, g)
    orders = (torch.contiguous_format, torch.channels_last)
    for of_x, of_g in itertools.product(orders, orders):
        own = x.detach().contiguous(memory_format=of_x).requires_grad_()
        gradient, = torch.autograd.grad(norm(own), own, g.contiguous(memory_format=of_g))
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_residual_branch_can_be_negative():
    """No ReLU after the second norm: the branch has mean 0; none after the sum either."""
    block, x = pix2pixhd.ResidualBlock(4), torch.rand(2, 4, 12, 10)
    with torch.no_grad():
        branch, y = block(x) - x, block(0.1 * x)
    assert branch.mean((2, 3)).abs().max() < 1e-5
    assert (branch.std((2, 3), correction=0) - 1).abs().max() < 0.05
    assert y.min() < -0.5


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


def test_optimisers_are_the_papers():
    """Adam, 0.0002, betas 0.5 and 0.999; G and E share one, D has its own."""
    state = pix2pixhd.build(tiny(lr=2e-4), CPU)
    ours = {state.opt_g: (state.generator, state.encoder), state.opt_d: (state.discriminator,)}
    for optimiser, nets in ours.items():
        assert isinstance(optimiser, torch.optim.Adam)
        group, = optimiser.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-4, (0.5, 0.999), 0)
        assert {id(p) for p in group["params"]} == {id(p) for n in nets for p in n.parameters()}


# ---------------------------------------------------------------------------------- Equations 1 - 4

RNG = np.random.default_rng(0)
SHAPES = [[(2, 3, 5, 7), (2, 4, 3, 4), (2, 6, 2, 3), (2, 7, 2, 2), (2, 1, 3, 4)],
          [(2, 3, 3, 4), (2, 4, 2, 2), (2, 6, 1, 2), (2, 7, 2, 1), (2, 1, 2, 2)]]
MAPS = [[[torch.from_numpy(RNG.normal(0.3, 2, shape)) for shape in scale] for scale in SHAPES]
        for _ in "xg"]                             # real and fake, two scales, batch of two


def mean_over(predictions: list[torch.Tensor], term) -> float:
    """Summed over the scales, averaged over batch and patches of each."""
    return sum(sum(term(a) for a in p.flatten().tolist()) / p.numel() for p in predictions)


def test_eq_1_least_squares_d():
    """Half of sum_k mean (D_k(s, x) - 1)^2 and of sum_k mean D_k(s, G(s))^2."""
    real, fake = pix2pixhd.discriminator_loss(*MAPS)
    last = [[maps[-1] for maps in side] for side in MAPS]
    assert real.item() == pytest.approx(mean_over(last[0], lambda a: (a - 1) ** 2) / 2, rel=1e-12)
    assert fake.item() == pytest.approx(mean_over(last[1], lambda a: a ** 2) / 2, rel=1e-12)


def test_eq_1_least_squares_g():
    """sum_k mean (D_k(s, G(s)) - 1)^2, neither halved nor weighted."""
    last = [maps[-1] for maps in MAPS[1]]
    expected = mean_over(last, lambda a: (a - 1) ** 2)
    assert pix2pixhd.generator_loss(MAPS[1]).item() == pytest.approx(expected, rel=1e-12)


def test_eq_1_with_logs():
    """-log D and -log(1 - D) with D = 1 / (1 + exp(-logit)); G maximises log D."""
    real, fake = pix2pixhd.discriminator_loss(*MAPS, "log")
    last = [[maps[-1] for maps in side] for side in MAPS]

    def minus_log(a):
        return -math.log(1 / (1 + math.exp(-a)))

    assert real.item() == pytest.approx(mean_over(last[0], minus_log) / 2, rel=1e-12)
    assert fake.item() == pytest.approx(mean_over(last[1], lambda a: minus_log(-a)) / 2, rel=1e-12)
    g = pix2pixhd.generator_loss(MAPS[1], "log")
    assert g.item() == pytest.approx(mean_over(last[1], minus_log), rel=1e-12)


def test_eq_1_with_logs_does_not_overflow_and_keeps_a_gradient():
    for sure in (-200.0, 200.0):
        maps = [[torch.full((1, 1, 2, 2), sure)]]
        losses = [*pix2pixhd.discriminator_loss(maps, maps, "log"),
                  pix2pixhd.generator_loss(maps, "log")]
        assert all(v.isfinite() for v in losses) and sum(v.item() for v in losses) >= 100
    logit = torch.full((1, 1, 2, 2), -30.0, requires_grad=True)
    pix2pixhd.generator_loss([[logit]], "log").backward()          # log(1 - D) would give it none
    assert logit.grad.sum().item() == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("gan", ["lsgan", "log"])
def test_eq_2_sums_over_the_scales(gan):
    """k discriminators: the sum of what each would cost alone; not the mean."""
    alone = [(*pix2pixhd.discriminator_loss([real], [fake], gan),
              pix2pixhd.generator_loss([fake], gan)) for real, fake in zip(*MAPS)]
    both = (*pix2pixhd.discriminator_loss(*MAPS, gan), pix2pixhd.generator_loss(MAPS[1], gan))
    for parts, whole in zip(zip(*alone), both):
        assert whole.item() == pytest.approx(sum(p.item() for p in parts), rel=1e-12)


def test_eq_3_from_its_definition():
    """Absolute differences of the four hidden maps, each over its N_i, without the prediction."""
    per_scale = []
    for real, fake in zip(*MAPS):
        total = 0.0
        for i in range(4):
            x, g = real[i].numpy(), fake[i].numpy()
            total += sum(abs(x[k] - g[k]) for k in np.ndindex(x.shape)) / x.size
        per_scale.append(total)
    loss = pix2pixhd.feature_matching_loss
    assert loss(*MAPS).item() == pytest.approx(sum(per_scale), rel=1e-12)
    assert loss(*MAPS, mean=True).item() == pytest.approx(sum(per_scale) / 2, rel=1e-12)


def test_eq_3_ignores_the_prediction_and_moves_only_the_fake_side():
    sides = [[[m.clone().requires_grad_() for m in maps] for maps in side] for side in MAPS]
    pix2pixhd.feature_matching_loss(*sides).backward()
    assert all(m.grad is None for maps in sides[0] for m in maps)  # D "does not maximize" it
    for maps in sides[1]:
        assert maps[-1].grad is None
        for m in maps[:-1]:
            assert torch.equal(m.grad.abs(), torch.full_like(m, 1 / m.numel()))


def test_eq_3_is_zero_for_a_perfect_generator():
    assert pix2pixhd.feature_matching_loss(MAPS[0], MAPS[0]).item() == 0


def test_perceptual_loss_from_its_definition():
    """Sec. 4: the mean over M_i elements of each layer, with the released weights 1/32 ... 1."""
    names = ["relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"]
    real, fake = ({n: torch.from_numpy(RNG.normal(0, 1, (2, 2 + i, 4, 3)))
                   for i, n in enumerate(names)} for _ in "xg")
    expected = 0.0
    for name, weight in zip(names, (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1)):
        x, g = real[name].numpy(), fake[name].numpy()
        expected += weight * sum(abs(x[k] - g[k]) for k in np.ndindex(x.shape)) / x.size
    assert pix2pixhd.perceptual_loss(real, fake).item() == pytest.approx(expected, rel=1e-12)


def test_perceptual_layers_are_torchvisions_1_6_11_20_29():
    names = [name for name, _ in common.vgg_trunk(19).named_children()]
    assert [names.index(n) for n in pix2pixhd.VGG_LAYERS] == [1, 6, 11, 20, 29]
    with torch.device("meta"):
        theirs, ours = torchvision.models.vgg19(weights=None).features, common.vgg_trunk(19)
    assert [type(m) for m in ours] == [type(m) for m in theirs]


@pytest.mark.parametrize("normalise", [False, True])
def test_vgg_sees_the_image_as_it_is_unless_asked(normalise):
    """The release feeds [-1, 1]; --vgg-normalise takes ImageNet's mean and deviation first."""
    cfg = tiny(loss="GAN+FM+VGG", vgg="random", vgg_normalise=normalise)
    assert not Config().vgg_normalise
    vgg, x = pix2pixhd.build(cfg, CPU).vgg, torch.rand(1, 3, 16, 16) * 2 - 1
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406),
                                                            (0.229, 0.224, 0.225)))
    seen = ((x + 1) / 2 - mean) / std if normalise else x
    features = vgg(x)
    assert list(features) == ["relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"]
    first = F.conv2d(seen, vgg.trunk[0].weight, vgg.trunk[0].bias, padding=1).relu()
    torch.testing.assert_close(features["relu1_1"], first, rtol=1e-5, atol=1e-5)
    assert [f.shape[1:] for f in features.values()] == [
        (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512, 1, 1)]
    assert not any(p.requires_grad for p in vgg.parameters())


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


def test_eq_4_defaults_are_the_papers():
    cfg = Config()
    assert (cfg.lambda_fm, cfg.lambda_vgg, cfg.loss, cfg.gan) == (10, 10, "GAN+FM+VGG", "lsgan")
    assert (cfg.scales, cfg.fm_mean, cfg.size, cfg.batch_size) == (3, False, (1024, 2048), 1)


def test_eq_4_d_is_asked_once_per_image():
    """One pass of D over the photo and one over x_hat serve both players."""
    cfg = tiny(stage="global")
    state, calls = pix2pixhd.build(cfg, CPU), []
    state.discriminator.register_forward_hook(lambda *a: calls.append(1))
    batch = {k: v.float() if v.is_floating_point() else v for k, v in some_batch(cfg).items()}
    pix2pixhd.train_step(state, batch, cfg)
    assert len(calls) == 2


# ------------------------------------------------------- Gradients reach exactly the right networks

def street_batch(cfg: Config, images: int = 1) -> dict:
    data = common.Dataset("", "test", cfg.size, limit=images)
    batch = torch.utils.data.default_collate([data[i] for i in range(images)])
    return pix2pixhd.make_pair(batch, cfg)


def moved_by_a_step(cfg: Config) -> tuple[set[str], set[str]]:
    """Names of the convolutions' weights that one step changes, and of those it does not."""
    state = pix2pixhd.build(cfg, CPU)
    nets = {k: getattr(state, k) for k in pix2pixhd.NETWORKS}
    before = {f"{k}.{n}": v.clone() for k, net in nets.items() for n, v in net.state_dict().items()
              if v.ndim == 4}
    pix2pixhd.train_step(state, street_batch(cfg), cfg)
    after = {f"{k}.{n}": v for k, net in nets.items() for n, v in net.state_dict().items()}
    changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
    return changed, before.keys() - changed


@pytest.mark.parametrize("enhancers, stage, rests", [
    (0, "global", ()), (1, "joint", ()), (2, "joint", ()),
    (1, "enhancer", ("generator.globe", "encoder")),
    (2, "enhancer", ("generator.globe", "generator.enhancers.0", "encoder"))])
def test_a_stage_moves_exactly_its_networks(enhancers, stage, rests):
    """Sec. 3.2: the enhancer alone, with D; what was trained before rests, E included."""
    moved, still = moved_by_a_step(tiny(enhancers=enhancers, stage=stage, scales=2))
    assert all(name.startswith(rests) for name in still), still
    assert not rests or not any(name.startswith(rests) for name in moved)
    kinds = {name.split(".")[0] for name in moved}
    assert kinds >= {"generator", "discriminator"} and ("encoder" in kinds) != bool(rests)
    assert any(name.startswith("generator.output") for name in moved)


def test_stored_features_let_e_rest_with_enhancers():
    moved, still = moved_by_a_step(tiny(enhancers=1, stage="joint", stored_features=True))
    assert still and all(name.startswith("encoder") for name in still)
    assert not any(name.startswith("encoder") for name in moved)
    moved, still = moved_by_a_step(tiny(enhancers=0, stage="global", stored_features=True))
    assert any(name.startswith("encoder") for name in moved) and not still


def test_stored_features_are_half_sized_and_of_8_bits():
    """The release's file: E's map at half size, as an 8-bit picture, doubled by repetition."""
    E, x = Encoder(3, 2, 2), torch.rand(1, 3, 32, 64) * 2 - 1
    region = torch.tensor([[[(r + 1) // 9 + 10 * ((c + 1) // 16) for c in range(64)]
                            for r in range(32)]])                  # odd borders: which pixel counts
    with torch.no_grad():
        z = pix2pixhd.style_of_photo(E, x, region, stored=True)
        small = loops_average(E(F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
                              region[:, ::2, ::2])
    bits = np.round((small.double().numpy() + 1) * 127.5)
    expected = np.repeat(np.repeat(bits, 2, 2), 2, 3) / 127.5 - 1
    assert np.abs(z.numpy() - expected).max() < 1e-6
    whole = pix2pixhd.style_of_photo(E, x, region)
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

def test_boundary_map_of_the_sheet():
    ids = torch.tensor([[[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 3, 2], [3, 3, 3, 3]]])
    assert pix2pixhd.boundary_map(ids)[0, 0].int().tolist() == [
        [0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]]


def test_boundary_map_of_16_bit_ids():
    """33000 and 33001 touch: neither equal nor negative. All of one id: no boundary at all."""
    ids = torch.full((1, 3, 6), 33000)
    assert not pix2pixhd.boundary_map(ids).any()
    ids[:, :, 3:] = 33001
    assert pix2pixhd.boundary_map(ids)[0, 0].tolist() == [[0, 0, 1, 1, 0, 0]] * 3


def test_boundary_map_from_its_definition():
    """Any of the four neighbours in the image, of the same image of the batch."""
    ids = torch.randint(0, 3, (3, 6, 7)) + 65530
    edges = pix2pixhd.boundary_map(ids)
    assert edges.shape == (3, 1, 6, 7) and edges.dtype == torch.float32
    for b, i, j in itertools.product(range(3), range(6), range(7)):
        around_it = [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
        differs = any(ids[b, r, c] != ids[b, i, j] for r, c in around_it
                      if 0 <= r < 6 and 0 <= c < 7)
        assert edges[b, 0, i, j] == differs


def naive_average(z: np.ndarray, region: np.ndarray) -> np.ndarray:
    out = np.zeros_like(z)
    for b, c in itertools.product(range(z.shape[0]), range(z.shape[1])):
        for number in set(region[b].ravel().tolist()):
            pixels = [k for k in np.ndindex(region[b].shape) if region[b][k] == number]
            mean = sum(z[b, c][k] for k in pixels) / len(pixels)
            for k in pixels:
                out[b, c][k] = mean
    return out


def test_instance_average_from_its_definition():
    """Batch items with equal ids do not mix, and ids may be large and far apart."""
    z = RNG.normal(0, 1, (3, 2, 6, 7))
    region = np.array([0, 1, 26000, 65535])[RNG.integers(0, 4, (3, 6, 7))]
    ours = pix2pixhd.instance_average(torch.from_numpy(z), torch.from_numpy(region))
    assert ours.numpy() == pytest.approx(naive_average(z, region), abs=1e-12)


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


def test_instance_average_does_not_see_the_numbers():
    z, region = torch.rand(2, 3, 8, 9), torch.randint(0, 5, (2, 8, 9))
    renumbered = torch.tensor([40000, 7, 123, 65535, 0])[region]
    expected = pix2pixhd.instance_average(z, region)
    torch.testing.assert_close(pix2pixhd.instance_average(z, renumbered), expected)
    alone = torch.cat([pix2pixhd.instance_average(z[b:b + 1], region[b:b + 1]) for b in range(2)])
    torch.testing.assert_close(alone, expected)


def test_instance_average_gradient():
    """Of a mean: what reaches the pixels of an object, averaged over it; so of the loop's form."""
    z = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    region, g = torch.randint(0, 4, (2, 6, 7)), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    ours, = torch.autograd.grad(pix2pixhd.instance_average(z, region), z, g)
    loops, = torch.autograd.grad(loops_average(z, region), z, g)
    torch.testing.assert_close(ours, loops, rtol=1e-12, atol=1e-12)
    assert ours.numpy() == pytest.approx(naive_average(g.numpy(), region.numpy()), abs=1e-12)


def test_instance_average_of_a_large_region_is_exact():
    """A road of half a million pixels: a sum in float32 would be off in the fourth digit."""
    z, region = torch.full((1, 1, 512, 1024), 0.1), torch.full((1, 512, 1024), 7)
    z[:, :, :, 512:] = -0.7
    mean = pix2pixhd.instance_average(z, region)
    assert (mean + 0.3).abs().max() < 2e-7
    assert (pix2pixhd.instance_average(torch.full_like(z, 0.1), region) - 0.1).abs().max() < 2e-7


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
    pix2pixhd.check_config(cfg)
    assert stages_of(cfg) == expected
    assert cfg.features == (3 if "features" in preset else 0)
    assert [s.cfg.stage for s in pix2pixhd.plan(cfg)] == [row[0] for row in expected]


def test_plan_of_g3():
    """4096 x 2048: G1, then G2 alone and with G1, then G3 likewise; windows shrink as well."""
    cfg = Config(classes="cityscapes", enhancers=2, size=(2048, 4096), scales=4, crop=(1024, 2048))
    assert stages_of(cfg) == [
        ("global", (512, 1024), (0, 0), 0, 2, 0, 200),
        ("enhancer", (1024, 2048), (512, 1024), 1, 3, 200, 10),
        ("joint", (1024, 2048), (512, 1024), 1, 3, 210, 90),
        ("enhancer", (2048, 4096), (1024, 2048), 2, 4, 300, 10),
        ("joint", (2048, 4096), (1024, 2048), 2, 4, 310, 90)]
    widths = []
    for stage in pix2pixhd.plan(cfg):
        with torch.device("meta"):
            G = pix2pixhd.networks(stage.cfg)[0]
        widths.append([G.globe.front[0].out_channels,
                       *(enhancer.front[0].out_channels for enhancer in G.enhancers)])
    assert widths == [[64], [64, 32], [64, 32], [64, 32, 16], [64, 32, 16]]


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
    return {f"{k}.{n}": v.clone() for k in pix2pixhd.NETWORKS
            for n, v in getattr(state, k).state_dict().items()}


def test_grow_keeps_what_is_trained_and_starts_the_rest_afresh():
    """G1, E and the coarse D_k by their resolution; enhancer, output and the finest D_k are new."""
    cfg = tiny(enhancers=2, scales=3)
    stages = pix2pixhd.plan(cfg)
    state = pix2pixhd.build(stages[0].cfg, CPU)
    for number, stage in enumerate(stages[1:], 1):
        for p in itertools.chain(*(getattr(state, k).parameters() for k in pix2pixhd.NETWORKS)):
            nn.init.uniform_(p, 5, 6)                              # marked as trained
        state.step, state.epoch, state.seen = 10 * number, number, 3
        old = weights_of(state)
        state = pix2pixhd.grow(state, stage.cfg, CPU)
        new = weights_of(state)
        assert (state.stage, state.step, state.epoch) == (number, 10 * number, number)
        assert state.seen == 3
        assert not state.opt_g.state and not state.opt_d.state      # Adam starts again
        k = stage.cfg.enhancers - 1
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


def test_grow_keeps_the_whole_encoder():
    """Sec. 3.4: E rests while the enhancer trains alone, so all of E must be the trained one."""
    first, second, _ = pix2pixhd.plan(tiny(enhancers=1))
    state = pix2pixhd.build(first.cfg, CPU)
    nn.init.constant_(state.encoder.output[0].weight, 0.25)
    grown, x = pix2pixhd.grow(state, second.cfg, CPU), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(grown.encoder(x), state.encoder(x))


def test_grow_without_a_stage_of_the_enhancer_alone():
    """--enhancer-epochs 0: from G1 straight to the joint stage, whose enhancer is new, too."""
    cfg = tiny(enhancers=1, enhancer_epochs=0)
    first, second = pix2pixhd.plan(cfg)
    state = pix2pixhd.build(first.cfg, CPU)
    nn.init.constant_(state.generator.globe.front[0].weight, 5.0)
    grown = pix2pixhd.grow(state, second.cfg, CPU)
    assert (grown.generator.globe.front[0].weight == 5).all()
    assert len(grown.generator.enhancers) == 1 and len(grown.discriminator.scales) == 2


def test_a_finer_stage_starts_from_the_coarse_ones_features():
    """Right after growing, G2 feeds on the very features that G1 made its image from."""
    cfg = tiny(enhancers=1, features=0)
    first, second, _ = pix2pixhd.plan(cfg)
    coarse = pix2pixhd.build(first.cfg, CPU)
    fine = pix2pixhd.grow(coarse, second.cfg, CPU)
    seen = []
    for net in (coarse.generator, fine.generator):
        net.globe.register_forward_hook(lambda m, a, y: seen.append(y))
    s = torch.rand(1, 13, 32, 64)
    with torch.no_grad():
        fine.generator(s)
        coarse.generator(F.avg_pool2d(s, 3, 2, 1, count_include_pad=False))
    assert torch.equal(*seen)


def test_build_hangs_on_the_seed_alone():
    a, b, c = (weights_of(pix2pixhd.build(tiny(seed=seed), CPU)) for seed in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["generator.output.0.weight"], c["generator.output.0.weight"])


# ----------------------------------------------------------------------------- Released checkpoints

def conv(key: str, c_out: int, c_in: int, kernel: int, transposed: bool = False) -> dict:
    shape = (c_in, c_out, kernel, kernel) if transposed else (c_out, c_in, kernel, kernel)
    return {key + ".weight": shape, key + ".bias": (c_out,)}


def printed_keys(kind: str, c: int = 36) -> dict[str, tuple]:
    """Section 10 of the fact sheet, typed off: key -> shape, in the order of the file."""
    blocks = {f"model.{i}.conv_block.{j}": 1024 for i in range(16, 25) for j in (1, 5)}
    g1 = (conv("model.1", 64, c, 7) | conv("model.4", 128, 64, 3) | conv("model.7", 256, 128, 3)
          | conv("model.10", 512, 256, 3) | conv("model.13", 1024, 512, 3))
    for key in blocks:
        g1 |= conv(key, 1024, 1024, 3)
    g1 |= (conv("model.25", 512, 1024, 3, True) | conv("model.28", 256, 512, 3, True)
           | conv("model.31", 128, 256, 3, True) | conv("model.34", 64, 128, 3, True))

    def enhancer(n, w):
        keys = conv(f"model{n}_1.1", w, c, 7) | conv(f"model{n}_1.4", 2 * w, w, 3)
        for i, j in itertools.product(range(3), (1, 5)):
            keys |= conv(f"model{n}_2.{i}.conv_block.{j}", 2 * w, 2 * w, 3)
        return keys | conv(f"model{n}_2.3", w, 2 * w, 3, True)

    if kind == "G1":
        return g1 | conv("model.38", 3, 64, 7)
    if kind == "G1+G2":
        return g1 | enhancer(1, 32) | conv("model1_2.7", 3, 32, 7)
    if kind == "G1+G2+G3":
        return g1 | enhancer(1, 32) | enhancer(2, 16) | conv("model2_2.7", 3, 16, 7)
    if kind.startswith("D"):
        widths, keys = [39, 64, 128, 256, 512, 1], {}
        for i, j in itertools.product(range(3), range(5)):
            key = f"scale{i}_layer{j}.0" if kind == "D" else f"layer{i}.{(0, 2, 5, 8, 11)[j]}"
            keys |= conv(key, widths[j + 1], widths[j], 4)
        return keys
    keys = conv("model.1", 16, 3, 7)
    for i, w in zip((4, 7, 10, 13), (16, 32, 64, 128)):
        keys |= conv(f"model.{i}", 2 * w, w, 3)
    for i, w in zip((16, 19, 22, 25), (256, 128, 64, 32)):
        keys |= conv(f"model.{i}", w // 2, w, 3, True)
    return keys | conv("model.29" if kind == "E" else "model.28", 3, 16, 7)


RELEASED = {
    "G1": (lambda: ReleasedG(36, 64, 0), "generator", lambda: Generator(36, enhancers=0)),
    "G1+G2": (lambda: ReleasedG(36, 32, 1), "generator", lambda: Generator(36)),
    "G1+G2+G3": (lambda: ReleasedG(36, 16, 2), "generator", lambda: Generator(36, enhancers=2)),
    "D": (lambda: ReleasedD(39, 64, 3), "discriminator", lambda: MultiScaleDiscriminator(39)),
    "D, no FM": (lambda: ReleasedD(39, 64, 3, False), "discriminator",
                 lambda: MultiScaleDiscriminator(39)),
    "E": (lambda: ReleasedE(16), "encoder", lambda: Encoder()),
    "early E": (lambda: ReleasedE(16, early=True), "encoder", lambda: Encoder())}


@pytest.mark.parametrize("kind", RELEASED)
def test_released_names_and_shapes_at_full_width(tmp_path, kind):
    """The printed keys are those of the oracle's networks, and each finds its place in ours."""
    theirs, name, ours = RELEASED[kind]
    printed = printed_keys(kind)
    with torch.device("meta"):
        stored, own = theirs().state_dict(), ours().state_dict()
    assert {k: tuple(v.shape) for k, v in stored.items()} == printed
    renamed = pix2pixhd.rename_released(dict(stored), tmp_path / "x.pth")
    assert renamed.keys() == {name}
    assert {k: v.shape for k, v in renamed[name].items()} == {k: v.shape for k, v in own.items()}


@pytest.mark.parametrize("enhancers, downs, blocks", [(0, 4, 9), (0, 2, 3), (1, 3, 2), (2, 2, 1)])
@torch.no_grad()
def test_released_generators_give_the_same_image(tmp_path, enhancers, downs, blocks):
    """Random weights, behind "module." and with the statistics of an old file."""
    theirs = ReleasedG(5, 2, enhancers, downs, blocks)
    large_weights(theirs)
    state = state_of(Generator(5, width=2 * 2 ** enhancers, downs=downs, blocks=blocks,
                               enhancers=enhancers))
    through_a_file(theirs, state, tmp_path / "latest_net_G.pth", prefix="module.", old=True)
    s = torch.rand(2, 5, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(state.generator(s), theirs(s), rtol=0, atol=1e-7)


@pytest.mark.parametrize("matching", [True, False])
@torch.no_grad()
def test_released_discriminators_give_the_same_predictions(tmp_path, matching):
    """With and without the keys of feature matching; scale0 is the coarsest in both."""
    theirs = ReleasedD(5, 2, 3, matching)
    large_weights(theirs)
    state = state_of(discriminator=MultiScaleDiscriminator(5, 2, 3))
    through_a_file(theirs, state, tmp_path / "latest_net_D.pth", prefix="module.", old=True)
    s, x = torch.rand(1, 2, 64, 64).double(), torch.rand(1, 3, 64, 64).double()
    for own, other in zip(state.discriminator(s, x), theirs(s, x)):
        torch.testing.assert_close(own[-1], other[-1], rtol=0, atol=1e-9)


@torch.no_grad()
def test_released_encoders(tmp_path, capsys):
    """The early kind padded its last layer with zeros: only the inside is equal; a notice."""
    x, inside = torch.rand(1, 3, 32, 48, dtype=torch.float64), (..., slice(3, -3), slice(3, -3))
    for early in (False, True):
        theirs = ReleasedE(3, early)
        large_weights(theirs)
        state = state_of(encoder=Encoder(3, 3))
        E = through_a_file(theirs, state, tmp_path / "E.pth", prefix="module.", old=True).encoder
        torch.testing.assert_close(E(x)[inside], theirs(x)[inside], rtol=0, atol=1e-8)
        assert torch.allclose(E(x), theirs(x), rtol=0, atol=1e-8) != early
        assert ("early encoder" in capsys.readouterr().out) == early


def test_released_files_of_other_shapes_are_refused(tmp_path):
    save_released(ReleasedG(5, 2, 0, 2, 1), tmp_path / "G.pth")
    with refused("G.pth", "another generator"):
        pix2pixhd.load_networks(state_of(Generator(6, width=2, downs=2, blocks=1, enhancers=0)),
                                tmp_path / "G.pth")
    with refused("G.pth", "generator", "uses nothing"):
        pix2pixhd.load_networks(state_of(encoder=Encoder(3, 2)), tmp_path / "G.pth")
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "fc.pth")
    with refused("fc.pth", "no released G, D or E"):
        pix2pixhd.load_networks(state_of(encoder=Encoder(3, 2)), tmp_path / "fc.pth")


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


def test_stored_features_of_an_object_are_its_own():
    """Blocks of 2 x 2 pixels reach over the borders of odd places; an object's style must not."""
    cfg = tiny(enhancers=1, stage="joint", stored_features=True)
    state = pix2pixhd.build(cfg, CPU)
    large_weights(state.encoder)
    state.encoder.float()
    region = torch.zeros(1, 32, 64).long()
    region[:, 9:24, 21:31], region[:, 7:24, 31:45] = 10000, 10001      # odd borders at the left
    region[:, 23, 22:45] = 0                                           # one pixel at the bottom
    x = torch.rand(1, 3, 32, 64) * 2 - 1
    with torch.no_grad():
        z = pix2pixhd.encode_photo(state, x, region, cfg)[0]
        small = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        means = loops_average(state.encoder(small), region[:, ::2, ::2])[0]
    for _, number, _, value in pix2pixhd.objects_of(z, region[0], region[0]):
        mean = means[:, region[0, ::2, ::2] == number][:, 0]
        assert value.tolist() == pytest.approx(mean.tolist(), abs=1 / 255 + 1e-5), number


def blobs(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.tensor([[-0.8, -0.8, 0.0], [0.8, -0.5, 0.1], [0.0, 0.9, -0.9], [0.5, 0.5, 0.9]])
    return centres, (centres[:, None] + 0.02 * torch.randn(4, n, 3)).flatten(0, 1)


def test_kmeans_recovers_separated_clusters():
    """Each centre is the mean of its own points: no cluster split, none shared."""
    centres, points = blobs()
    found = pix2pixhd.kmeans(points[torch.randperm(160)], 4)
    assert found.shape == (4, 3) and found.dtype == torch.float32
    owner = torch.cdist(centres, found).argmin(1)
    assert sorted(owner.tolist()) == [0, 1, 2, 3]
    means = points.view(4, 40, 3).mean(1)
    torch.testing.assert_close(found[owner], means, rtol=0, atol=1e-5)


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


def test_kmeans_hangs_on_its_seed_alone():
    points = torch.rand(50, 3)
    first = pix2pixhd.kmeans(points, 5, seed=3, restarts=1)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(pix2pixhd.kmeans(points, 5, seed=3, restarts=1), first)
    assert torch.equal(torch.get_rng_state(), before)               # nobody else's draws move
    others = [pix2pixhd.kmeans(points, 5, seed=s, restarts=1) for s in range(4, 10)]
    assert not all(torch.equal(other, first) for other in others)


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


def test_kmeans_with_points_a_rounding_apart():
    """A collapsed E: two styles that differ in one last bit still are two, and no start fails."""
    for seed in range(40):
        torch.manual_seed(seed)
        a = torch.rand(3) * 2 - 1
        b = a.clone()
        b[0] = torch.nextafter(a[0], torch.tensor(2.0))
        centres = pix2pixhd.kmeans(torch.stack([a] * 40 + [b]), 10, seed)
        assert {tuple(c) for c in centres.tolist()} == {tuple(a.tolist()), tuple(b.tolist())}


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


def test_read_clusters_refuses_what_is_no_clusters_file(tmp_path):
    np.save(tmp_path / "good.npy", CLUSTERS)
    whole = (tmp_path / "good.npy").read_bytes()
    with refused("none.npy", "no such file"):
        pix2pixhd.read_clusters(tmp_path / "none.npy")
    for n in (0, 5, 100, 200, len(whole) - 40):
        (tmp_path / "cut.npy").write_bytes(whole[:n])
        with refused("cut.npy", "not a clusters file"):
            pix2pixhd.read_clusters(tmp_path / "cut.npy")
    np.save(tmp_path / "list.npy", np.array([None, 1, "two"], dtype=object))
    np.save(tmp_path / "words.npy", {"car": np.zeros((2, 3))})
    np.save(tmp_path / "numbers.npy", np.zeros((2, 3)))
    (tmp_path / "text.npy").write_text("not numpy\n" * 40)
    for name in ("list", "words", "numbers", "text"):
        with refused(name + ".npy", "not a clusters file"):
            pix2pixhd.read_clusters(tmp_path / f"{name}.npy")


def styled(k: int = 4) -> State:
    """A state that only has styles: k centres per class, each with the class's number first."""
    styles = {kind: torch.tensor([[kind, i, -i] for i in range(k)]).float() for kind in range(12)}
    return State(None, None, None, None, None, None, styles=styles)


def many_objects(n: int = 2000, kind: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    region = torch.arange(n).view(1, 40, -1) + 1000 * kind
    return torch.full_like(region, kind), region


def test_draw_styles_is_uniform_over_the_centres():
    """2000 objects, four centres, about 500 each; objects next by number do not go together."""
    label, region = many_objects()
    draws = pix2pixhd.draw_styles(styled(), label, region, 0)[0, 1].flatten().int()
    counts = torch.bincount(draws, minlength=4)
    assert counts.sum() == 2000 and ((counts - 500).square() / 500).sum() < 21   # chi^2, p = 1e-4
    pairs = torch.bincount(4 * draws[:-1] + draws[1:], minlength=16)
    assert ((pairs - 125).square() / 125).sum() < 50
    seeds = [pix2pixhd.draw_styles(styled(), label[:, :1, :2], region[:, :1, :2], seed)[0, 1, 0]
             for seed in range(200)]
    first = torch.bincount(torch.stack(seeds)[:, 0].int(), minlength=4)
    assert ((first - 50).square() / 50).sum() < 21


def test_draw_styles_gives_each_object_one_centre_of_its_class():
    label, region = torch.zeros(1, 8, 8).long(), torch.zeros(1, 8, 8).long()
    label[:, 4:], region[:, 4:, :4], region[:, 4:, 4:] = 10, 10000, 10001
    z = pix2pixhd.draw_styles(styled(), label, region, 5)
    assert z.shape == (1, 3, 8, 8) and torch.equal(z[:, 0], label.float())
    for number in (0, 10000, 10001):
        assert z[0][:, region[0] == number].unique(dim=1).shape == (3, 1)


def test_draw_styles_hangs_on_seed_and_object_alone():
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


def test_draw_styles_differ_between_any_two_seeds():
    """Also 256 apart, where a generator that reads 32 bits of seed * 2^24 would begin again."""
    label, region = many_objects(400)
    draws = [pix2pixhd.draw_styles(styled(), label, region, seed) for seed in (0, 1, 256, 512, 257)]
    for a, b in itertools.combinations(draws, 2):
        assert not torch.equal(a, b)


def test_draw_styles_varies_only_the_classes_named():
    label, region = many_objects(400)
    label[:, :20], region[:, :20] = 11, region[:, :20] + 5000
    base = pix2pixhd.draw_styles(styled(), label, region, 0)
    varied = pix2pixhd.draw_styles(styled(), label, region, 9, vary=(11,))
    assert torch.equal(varied[:, :, 20:], base[:, :, 20:])
    everything = pix2pixhd.draw_styles(styled(), label, region, 9)
    assert torch.equal(varied[:, :, :20], everything[:, :, :20])
    assert not torch.equal(varied[:, :, :20], base[:, :, :20])


def test_draw_styles_falls_back_to_the_mean_then_to_zero(capsys):
    """A class without a large object: its mean. One never seen: zeros, not unset memory."""
    label = torch.tensor([[[0, 1, 2]]])
    state = styled()
    state.styles, state.means = {0: torch.ones(1, 3)}, {1: torch.tensor([1.0, 2.0, 3.0])}
    z = pix2pixhd.draw_styles(state, label, label, 0)
    assert z[0, :, 0].T.tolist() == [[1, 1, 1], [1, 2, 3], [0, 0, 0]]
    printed = capsys.readouterr().out
    assert "class 1: no style" in printed and "mean" in printed and "never seen" in printed


def test_styles_of_a_reference_are_its_classes_means():
    cfg = tiny()
    state = pix2pixhd.build(cfg, CPU)
    state.styles = styled().styles
    pair = street_batch(cfg)
    present = set(pair["label"].unique().tolist())
    label = torch.tensor([[[min(present), 11 if 11 not in present else 8, max(present)]]])
    with torch.no_grad():
        z = pix2pixhd.styles_of_reference(state, pair, label, cfg)[0, :, 0]
        photo = state.encoder(pair["image"])[0]
    for column, kind in ((0, min(present)), (2, max(present))):
        mean = photo[:, pair["label"][0] == kind].double().mean(1)
        assert z[:, column].tolist() == pytest.approx(mean.tolist(), abs=1e-5)
    assert torch.equal(z[:, 1], state.styles[int(label[0, 0, 1])][0])


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


# ---------------------------------------------------------------------------------------- Translate

@pytest.mark.parametrize("h, w", [(37, 53), (1, 1), (1, 40), (100, 70)])
def test_translate_gives_the_size_of_its_input(h, w):
    G = Generator(2, width=4, downs=2, blocks=1, enhancers=1, enhancer_blocks=1)
    out = pix2pixhd.translate(G, torch.rand(2, 2, h, w))
    assert out.shape == (2, 3, h, w) and out.isfinite().all() and not out.requires_grad


def test_translate_is_g_itself_at_a_multiple():
    """Neither noise nor dropout nor running averages: two calls agree, image by image."""
    G = Generator(2, width=4, downs=2, blocks=1, enhancers=1, enhancer_blocks=1)
    s = torch.rand(2, 2, 40, 24)
    with torch.no_grad():
        torch.testing.assert_close(pix2pixhd.translate(G, s), G(s), rtol=0, atol=1e-5)
        assert torch.equal(pix2pixhd.translate(G, s), pix2pixhd.translate(G.eval(), s))


@pytest.mark.parametrize("h, w", [(37, 53), (32, 9), (2, 3), (1, 33)])
def test_translate_pads_by_reflection(h, w):
    """numpy's reflection, repeated where the image is smaller; at least twice G's multiple."""
    class Recorder(nn.Module):
        multiple = 8

        def forward(self, s):
            self.seen = s
            return s

    s, G = torch.rand(1, 1, h, w), Recorder()
    out = pix2pixhd.translate(G, s)
    more = [max(-side % 8, 16 - side) for side in (h, w)]
    expected = np.pad(s[0, 0].numpy(), ((0, more[0]), (0, more[1])), "reflect")
    assert np.array_equal(G.seen[0, 0].numpy(), expected) and torch.equal(out, s)


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


def test_fig_1_without_a_photo_styles_are_drawn():
    cfg = tiny()
    state = pix2pixhd.build(cfg, CPU)
    state.styles = {k: torch.rand(4, 3) * 2 - 1 for k in range(12)}
    item = {k: v for k, v in common.Dataset("", "test", (32, 64))[0].items() if k != "image"}
    a, b, c = (pix2pixhd.Editor(state, cfg, item, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.z, b.z) and not torch.equal(a.z, c.z)
    expected = pix2pixhd.draw_styles(state, item["label"][None], item["instance"][None], 1)[0]
    assert torch.equal(a.z, expected)
    in_step(a)


def test_set_class_to_stuff_joins_it(editor):
    """A car becomes road: the road's id and style, so no border is left between them."""
    before, mask = scene(editor), editor.instance == 10002
    road = editor.z[:, editor.label == 3][:, 0]
    assert editor.set_class(10002, "road") is editor
    in_step(editor)
    assert (editor.label[mask] == 3).all() and (editor.instance[mask] == 3).all()
    assert (editor.z[:, mask] == road[:, None]).all() and changed_only(before, editor, mask)
    with refused("object 10002", "not in this scene"):
        editor.set_class(10002, "road")


def test_set_class_to_a_thing_makes_a_new_object(editor):
    """A new id of class * 1000 + k, never one in use; the style of its class, in the scene or of
    the clusters."""
    before, mask = scene(editor), editor.instance == 9000
    car = editor.z[:, editor.label == 10][:, 0]
    editor.set_class(9000, "car")
    in_step(editor)
    assert editor.instance[mask].unique().tolist() == [10003] and (editor.label[mask] == 10).all()
    cars = editor.z[:, (editor.label == 10) & ~mask].T
    assert any(torch.equal(editor.z[:, mask][:, 0], style) for style in cars), car
    assert changed_only(before, editor, mask)
    for number, new in ((10000, 11000), (10001, 11001)):           # no truck yet, then one
        where = editor.instance == number
        editor.set_class(number, 11)
        assert editor.instance[where].unique().tolist() == [new]
        assert torch.equal(editor.z[:, where][:, 0], editor.state.styles[11][0])
    in_step(editor)


def test_set_style_is_the_kth_centre_of_the_class(editor):
    before, mask, image = scene(editor), editor.instance == 10001, editor.render()
    editor.set_style(10001, 3)
    in_step(editor)
    assert torch.equal(editor.z[:, mask].unique(dim=1)[:, 0], editor.state.styles[10][3])
    assert changed_only(before, editor, mask)
    assert torch.equal(editor.label, before[0]) and torch.equal(editor.instance, before[1])
    assert not torch.equal(editor.render(), image)                  # and it is seen


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


def test_remove_into_a_class_and_of_everything(editor):
    mask = editor.instance == 10002
    editor.remove(10002, "vegetation")
    in_step(editor)
    assert (editor.label[mask] == 2).all() and (editor.instance[mask] == 2).all()
    editor.paint(0, 0, 32, 64, "sky")
    with refused("object 0", "fills the image"):
        editor.remove(0)


@pytest.mark.parametrize("down, right", [(-6, 4), (1, 2), (0, -30), (20, 0)])
def test_paste_adds_a_copy(editor, down, right):
    """The mask, moved and cut at the image's edge: a new object of the same class and style."""
    before, mask = scene(editor), editor.instance == 10002
    target = torch.zeros_like(mask)
    for r, c in mask.nonzero().tolist():
        if 0 <= r + down < 32 and 0 <= c + right < 64:
            target[r + down, c + right] = True
    if not target.any():
        with refused("--paste", "outside"):
            editor.paste(10002, down, right)
        assert same(before, scene(editor))
        return
    editor.paste(10002, down, right)
    in_step(editor)
    assert torch.equal(editor.instance == 10003, target) and (editor.label[target] == 10).all()
    assert torch.equal(editor.z[:, target][:, 0], before[2][:, mask][:, 0])
    assert changed_only(before, editor, target)


def test_paint_fills_a_rectangle(editor):
    """As its stuff, or as one new object; the last row and column are not part of it."""
    for name, kind, number in (("sky", 0, 0), ("truck", 11, 11000), ("truck", 11, 11001),
                               ("building", 1, 1)):
        before, mask = scene(editor), torch.zeros(32, 64, dtype=torch.bool)
        top = 2 + kind
        mask[top:top + 9, 3:20] = True
        editor.paint(top, 3, top + 9, 20, name)
        in_step(editor)
        assert (editor.label[mask] == kind).all() and (editor.instance[mask] == number).all()
        assert changed_only(before, editor, mask)


def test_undo_and_reset_restore_exactly(editor):
    changes = [("set_style", 10000, 2), ("set_class", 10001, "building"), ("remove", 10002),
               ("paint", 0, 0, 9, 9, "car"), ("paste", 9000, 3, 3), ("remove", 9000, "terrain"),
               ("set_class", 3, "truck")]
    scenes = [scene(editor)]
    for name, *arguments in changes:
        getattr(editor, name)(*arguments)
        in_step(editor)
        scenes.append(scene(editor))
        assert not same(scenes[-1], scenes[-2]), name
    for expected in scenes[-2:-4:-1]:
        editor.undo()
        assert same(scene(editor), expected)
    editor.reset()
    assert same(scene(editor), scenes[0])
    with refused("undo", "nothing was changed"):
        editor.undo()
    assert same(scene(editor.reset()), scenes[0])


def test_wrong_edits_are_refused_and_change_nothing(editor):
    before = scene(editor)
    for name, *arguments, words in (
            ("set_class", 12345, "road", ("object 12345", "10000")),
            ("set_class", 10000, "zebra", ("class zebra", "car")),
            ("set_class", 10000, 12, ("class 12",)), ("set_class", 10000, -1, ("class -1",)),
            ("set_style", 10000, 4, ("--style 10000=4", "car has styles 0 to 3")),
            ("set_style", 10000, -1, ("--style 10000=-1",)), ("set_style", 77, 0, ("object 77",)),
            ("remove", 77, ("object 77",)), ("remove", 10000, "zebra", ("class zebra",)),
            ("paste", 77, 0, 0, ("object 77",)), ("paste", 10000, 40, 0, ("outside",)),
            ("paste", 10000, 0, -70, ("outside",)),
            ("paint", 0, 0, 33, 5, "sky", ("32 x 64",)), ("paint", 5, 0, 5, 5, "sky", ("--paint",)),
            ("paint", 0, -1, 5, 5, "sky", ("--paint",)), ("paint", 0, 0, 5, 65, "sky", ("64",)),
            ("paint", 0, 0, 5, 5, "zebra", ("class zebra",))):
        with refused(*words):
            getattr(editor, name)(*arguments)
        assert same(before, scene(editor)) and not editor.history, (name, arguments)


def test_editor_without_an_encoder():
    """Labels can be edited, styles cannot."""
    cfg = tiny(features=0)
    item = common.Dataset("", "test", (32, 64))[0]
    editor = pix2pixhd.Editor(pix2pixhd.build(cfg, CPU), cfg, item)
    first = editor.render()
    editor.set_class(10000, "road").remove(10001).paste(10002, -3, 0).paint(0, 0, 5, 5, "truck")
    assert editor.z is None and not torch.equal(editor.render(), first)
    with refused("--style", "no encoder"):
        editor.set_style(10002, 0)
    editor.reset()
    assert torch.equal(editor.render(), first) and len(editor.objects()) > 10
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


# ---------------------------------------------------------------------------------- Map and wording

def test_paper_map_lists_every_equation_table_and_figure():
    listed = set()
    for entry in paper_map(pix2pixhd):
        for kind, first, last in re.findall(r"(Eq\.|Table|Fig\.) \(?(\d+)\)?(?:-(\d+))?", entry):
            listed |= {(kind, n) for n in range(int(first), int(last or first) + 1)}
    assert listed >= ({("Eq.", n) for n in range(1, 5)} | {("Table", n) for n in (1, 2)}
                      | {("Fig.", n) for n in range(1, 12)})
    sections = " ".join(paper_map(pix2pixhd))
    assert all(f"Sec. {name} " in sections for name in ("3.2", "3.3", "3.4", "4"))


def test_paper_map_points_at_what_exists():
    """Every name in it is one of the script's or a preset, every --flag a flag."""
    flags = {s for action in pix2pixhd.parser()._actions for s in action.option_strings}
    for entry, place in paper_map(pix2pixhd).items():
        assert all(f in flags for f in re.findall(r"--[a-z-]+", place)), (entry, place)
        if place.startswith("needs people"):
            continue
        words = re.findall(r"\w+", re.sub(r"--[a-z-]+", "", place))
        known = [w for w in words if hasattr(pix2pixhd, w) or w in pix2pixhd.PRESETS]
        assert any(callable(getattr(pix2pixhd, w, None)) or w == "PRESETS" for w in known), entry
        looks_like_code = [w for w in words if "_" in w or re.search(r"[a-z][A-Z]|[A-Z]{3}", w)]
        assert set(looks_like_code) <= set(known), (entry, place)
        for item in place.split(", "):
            if re.fullmatch(r"\w+", item):
                assert item in known, (entry, item)


def test_every_equation_is_tagged_at_its_function():
    for function, tag in ((pix2pixhd.discriminator_loss, "Eq. (1)"),
                          (pix2pixhd.discriminator_loss, "Eq. (2)"),
                          (pix2pixhd.generator_loss, "Eq. (2)"),
                          (pix2pixhd.feature_matching_loss, "Eq. (3)"),
                          (pix2pixhd.train_step, "Eq. (4)"), (pix2pixhd.perceptual_loss, "Sec. 4"),
                          (pix2pixhd.boundary_map, "Sec. 3.3"), (Encoder, "Sec. 3.4")):
        assert tag in function.__doc__, (function.__name__, tag)
