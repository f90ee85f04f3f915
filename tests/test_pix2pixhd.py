"""What the pix2pixHD paper claims and what its user is promised, tested on pix2pixhd.py.

The oracles share no code with the script: the authors' layers under their own names, numpy in
float64 with loops, printed numbers, gradients, limits. The check values come from the authors' own
PyTorch networks, filled with sines and run in float64. What all four scripts owe their users is
tested in test_contract.py.
"""

import copy
import functools
import itertools
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    assert_same, edges_of, fails, four_numbers, grey_levels, parameters, picture, place, save,
    size_of, stored, works)
from PIL import Image
from torch import nn
from torch.nn import functional as F

import common
import pix2pixhd
from pix2pixhd import Config, Encoder, Generator, MultiScaleDiscriminator, State

CPU = torch.device("cpu")
NETS = ("generator", "discriminator", "encoder")
call = functools.partial(works, "pix2pixhd")
pytestmark = pytest.mark.usefixtures("draw_each_street_once", "no_plots")


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


def ReleasedE(w: int, c_out: int = 3) -> nn.Module:
    net = nn.Sequential()
    net.add_module("model", nn.Sequential(*released_global(3, w, 4, 0, c_out)))
    return net


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
    weights, = pix2pixhd.read_weights(path).values()
    own.double().load_state_dict(weights)
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


@torch.no_grad()
def test_check_values_discriminators_and_losses():
    """Predictions, the GAN losses of both sides and Eq. (3), scale by scale, the finest first.

    In the authors' file the coarsest D comes first, as in ours."""
    D = filled(MultiScaleDiscriminator(7, 8, 3))
    real, fake = D(S, REAL), D(S, FAKE)
    assert [maps[-1].shape[2:] for maps in real] == [(11, 19), (7, 11), (5, 7)]
    (d_real, d_fake), g = pix2pixhd.discriminator_loss(real, fake), pix2pixhd.generator_loss(fake)
    per_scale = [pix2pixhd.feature_matching_loss([a], [b]) for a, b in zip(real, fake)]
    values = [*(maps[-1].mean() for maps in real), g, 2 * d_fake, 2 * d_real, *per_scale]
    assert [value.item() for value in values] == pytest.approx([
        -0.137676451, 0.142323092, 0.045534747, 3.1228981592, 0.2131672758, 3.1022125446,
        0.9043935935, 0.8885353901, 0.4699026548], rel=1e-6)


# ------------------------------------------------------------------------------- Inputs and outputs

@pytest.mark.parametrize("make, number", [
    (lambda: Generator(35, enhancers=0), 182_543_619), (lambda: Generator(39), 182_871_171),
    (lambda: Generator(enhancers=2), 182_947_699), (lambda: Encoder(), 788_803),
    (lambda: Generator(width=16, downs=3, blocks=6, enhancers=0), 1_995_475),
    (lambda: MultiScaleDiscriminator(39), 8_404_803),
    (lambda: MultiScaleDiscriminator(6, 64, 2), 5_535_618)])
def test_parameters(make, number):
    with torch.device("meta"):
        assert parameters(make()) == number


def test_table_of_input_channels():
    """Labels, boundary, features: the features are for G alone, never for D."""
    for options, g, d in (
            (dict(boundary=False), 35, 38), (dict(), 36, 39), (dict(features=3), 39, 39),
            (dict(classes="", boundary=False), 3, 6)):
        cfg = Config(**{"classes": "cityscapes"} | options)
        with torch.device("meta"):
            G, D, E = pix2pixhd.networks(cfg)
        assert pix2pixhd.channels(cfg) == d - 3
        assert G.globe.front[0].in_channels == G.enhancers[0].front[0].in_channels == g
        assert [scale.layers[0][0].in_channels for scale in D.scales] == [d] * 3
        assert (E is None) == (g != 39)


def test_input_is_one_hot_labels_then_the_boundary():
    label, instance = torch.randint(0, 12, (2, 6, 5)), torch.randint(0, 3, (2, 6, 5)) + 40000
    batch = {"label": label, "instance": instance}
    pair = pix2pixhd.make_pair(batch, Config(classes="streets", pool="label"))
    assert torch.equal(pair["input"][:, :12], F.one_hot(label, 12).movedim(-1, 1).float())
    assert torch.equal(pair["input"][:, 12:], pix2pixhd.boundary_map(instance))
    assert torch.equal(pair["region"], label)                       # Fig. 11: pooled by label
    without = pix2pixhd.make_pair(batch, Config(classes="streets", boundary=False))
    assert torch.equal(without["region"], instance)
    assert torch.equal(without["input"], pair["input"][:, :12])


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
    """How many columns of x a number depends on."""
    gradient, = torch.autograd.grad(unit, x, retain_graph=True)
    return len(gradient[0].abs().sum((0, 1)).nonzero())


def test_receptive_fields_of_the_three_discriminators_and_e():
    """Sec. 3.2: the coarsest sees the largest field; labels and image alike. E's is the largest of
    all phases of its four doublings."""
    D = linear(MultiScaleDiscriminator(2, 1, 3))
    s, x = torch.ones(2, 1, 1, 64, 640, dtype=torch.float64).requires_grad_().unbind()
    for maps, field in zip(D(s, x), (70, 141, 283)):
        prediction = maps[-1]
        unit = prediction[0, 0, prediction.shape[2] // 2, prediction.shape[3] // 2]
        assert columns_seen(unit, s) == columns_seen(unit, x) == field
    x = torch.ones(1, 3, 32, 160, dtype=torch.float64, requires_grad=True)
    z = linear(Encoder(1, 1))(x)
    assert max(columns_seen(z[0, 0, 16, 80 + k], x) for k in range(16)) == 69


def test_initialisation():
    """Weights from N(0, 0.02); biases by PyTorch's default, uniform up to 1 / sqrt(fan in)."""
    G, D, E = pix2pixhd.networks(Config(classes="streets", width=16, layers=(3, 2, 3), d_width=16,
                                        features=3))
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

def gan(scales: list, truth: int, log: bool) -> torch.Tensor:
    """Eq. (1) and (2): summed over the scales, averaged over batch and patches of each."""
    loss = F.binary_cross_entropy_with_logits if log else F.mse_loss
    return sum(loss(a, torch.full_like(a, truth)) for *_, a in scales)


def test_vgg_sees_the_image_as_it_is():
    """The release feeds [-1, 1], without ImageNet's mean and deviation."""
    vgg = pix2pixhd.build(tiny(loss="GAN+FM+VGG", vgg="random"), CPU).vgg
    assert not vgg.normalise and not [p for p in vgg.parameters() if p.requires_grad]


def tiny(**changes) -> Config:
    """The streets at 32 x 64, with networks of a few hundred weights."""
    small = dict(classes="streets", size=(32, 64), width=4, layers=(2, 1, 1), enhancers=0, scales=2,
                 d_width=2, features=3, loss="GAN+FM", epochs=4, enhancer_epochs=(1, 3))
    return Config(**small | changes)


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
    log = "log" in cfg.loss
    values = {"d_real": gan(real, 1, log) / 2, "d_fake": gan(apart, 0, log) / 2,
              "g_gan": gan(fake, 1, log)}
    objective = values["g_gan"]
    if "FM" in cfg.loss:
        values["g_fm"] = sum((real[k][i].detach() - fake[k][i]).abs().mean()
                             for k in range(len(fake)) for i in range(4))
        values["g_fm"] = values["g_fm"] / (len(fake) if cfg.released else 1)
        objective = objective + cfg.lambda_fm * values["g_fm"]
    if "VGG" in cfg.loss:
        theirs, ours = vgg(x.detach()), vgg(x_hat)
        values["g_vgg"] = sum((theirs[f"relu{i}_1"] - ours[f"relu{i}_1"]).abs().mean() * 2.0 ** k
                              for i, k in zip(range(1, 6)[::-1 if cfg.vgg == "random" else 1],
                                              (-5, -4, -3, -2, 0)))
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
    dict(loss="GAN"), dict(loss="GAN+FM", features=0, lambda_fm=3.0),
    dict(loss="GAN+FM", released=True), dict(loss="logGAN+FM"),
    dict(loss="GAN+FM+VGG", lambda_vgg=7.0), dict(loss="GAN+FM+VGG", vgg="random"),
    dict(enhancers=1, scales=3), dict(enhancers=2, scales=3, enhancer_epochs=(1, 0)),
    dict(channels_last=True)],
    ids=lambda changes: "-".join(map(str, changes.values())))
def test_eq_4_train_step_is_the_releases_step(changes):
    """Two steps of Adam: the same losses, gradients and weights, with and without E. D's two terms
    are halved, G's is not; D "does not maximize" Eq. (3)."""
    cfg = tiny(lr=0.01, **changes)
    vgg = common.VGGFeatures(tuple(pix2pixhd.VGG_LAYERS), 19, "random", normalise=False,
                             width=2).double() if "VGG" in cfg.loss else None
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


def test_stored_features_are_half_sized_and_of_8_bits():
    """The release's file: E's map at half size, as an 8-bit picture, doubled by repetition."""
    E, x = Encoder(3, 2, 2), torch.rand(1, 3, 32, 64) * 2 - 1
    region = torch.tensor([[[(r + 1) // 9 + 10 * ((c + 1) // 16) for c in range(64)]
                            for r in range(32)]])                  # odd borders: which pixel counts
    with torch.no_grad():
        z = pix2pixhd.style_of_photo(E, x, region, Config(features=3, released=True))
        small = loops_average(E(F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
                              region[:, ::2, ::2])
    bits = np.round((small.double().numpy() + 1) * 127.5)
    expected = np.repeat(np.repeat(bits, 2, 2), 2, 3) / 127.5 - 1
    assert np.abs(z.numpy() - expected).max() < 1e-6
    whole = pix2pixhd.style_of_photo(E, x, region, Config(features=3))
    torch.testing.assert_close(whole, loops_average(E(x), region), rtol=1e-5, atol=1e-6)


def test_boundary_map_from_its_definition():
    """Any of the four neighbours in the image, of the same image of the batch."""
    ids = torch.randint(0, 3, (3, 6, 7)) + 65530
    edges = pix2pixhd.boundary_map(ids)
    assert edges.shape == (3, 1, 6, 7) and edges.dtype == torch.float32
    assert np.array_equal(edges[:, 0], [edges_of(each) for each in ids.numpy()])


def test_instance_average_from_its_definition():
    """Batch items with equal ids do not mix, and ids may be large and far apart. The gradient of a
    mean: what reaches the pixels of an object, averaged over it."""
    z, g = torch.randn(2, 3, 2, 6, 7, dtype=torch.float64)
    region = torch.tensor([0, 1, 26000, 65535])[torch.randint(0, 4, (3, 6, 7))]
    ours = pix2pixhd.instance_average(z.requires_grad_(), region)
    torch.testing.assert_close(ours, loops_average(z, region), rtol=0, atol=1e-12)
    gradient, = torch.autograd.grad(ours, z, g)
    torch.testing.assert_close(gradient, loops_average(g, region), rtol=0, atol=1e-12)
    road = torch.full((1, 1, 512, 1024), 0.1)              # float32 would be off in the 4th digit
    assert (pix2pixhd.instance_average(road, road.long()) - 0.1).abs().max() < 2e-7


# ------------------------------------------------------------------------- Sec. 3.2, coarse to fine

def stages_of(cfg: Config) -> list[tuple]:
    found = []
    for stage in pix2pixhd.plan(cfg):
        here = pix2pixhd.at_level(cfg, stage.level)
        found.append((stage.name, here.size, here.crop, here.enhancers, here.scales, stage.epochs))
    return found


FULL, HALF = (1024, 2048), (512, 1024)


@pytest.mark.parametrize("preset, expected", [
    ("512p", [("global", HALF, (0, 0), 0, 3, 200)]),
    ("1024p", [("global", HALF, (0, 0), 0, 2, 200), ("enhancer", FULL, (0, 0), 1, 3, 10),
               ("joint", FULL, (0, 0), 1, 3, 90)]),
    ("1024p-features-12GB", [
        ("global", HALF, (0, 0), 0, 2, 200), ("enhancer", FULL, (896, 896), 1, 3, 20),
        ("joint", FULL, (896, 896), 1, 3, 180)])])
def test_plan_of_the_presets(preset, expected):
    """Sizes, crops, discriminators and epochs of the released scripts, G1 first."""
    assert stages_of(Config(**pix2pixhd.PRESETS[preset], classes="cityscapes")) == expected


def test_plan_of_few_stages_or_few_scales():
    cfg = Config(classes="cityscapes", scales=1)
    assert [row[4] for row in stages_of(cfg)] == [1, 1, 1]         # never without a discriminator
    for epochs, names in (((200, 0, 0), ["global"]), ((0, 10, 0), ["enhancer"]),
                          ((0, 0, 90), ["joint"]), ((9, 0, 9), ["global", "joint"])):
        stages = pix2pixhd.plan(replace(cfg, epochs=epochs[0], enhancer_epochs=epochs[1:]))
        assert [stage.name for stage in stages] == names


@pytest.mark.parametrize("options", [
    dict(), dict(epochs=5, enhancer_epochs=(2, 5)), dict(enhancers=2, enhancer_epochs=(150, 50)),
    dict(epochs=1, enhancer_epochs=(1, 1))])
def test_learning_rate_is_the_sheets_rule(options):
    """Full to epoch n + 1, then lr (1 - (e - n - 1) / m); enhancer and joint share a schedule."""
    cfg, runs = Config(**options), {}
    stages = pix2pixhd.plan(cfg)
    for epoch in range(sum(stage.epochs for stage in stages)):
        stage = stages[pix2pixhd.stage_at(stages, epoch)]
        runs.setdefault(stage.level, []).append(pix2pixhd.learning_rate(cfg, stage, epoch))
    for level, rates in runs.items():
        total = sum(cfg.enhancer_epochs) if level else cfg.epochs
        n, m = total - total // 2, total // 2
        rule = [2e-4 * (1 if e <= n + 1 else 1 - (e - n - 1) / m) for e in range(1, total + 1)]
        assert rates == pytest.approx(rule, rel=1e-12)
    if not options:                             # the worked example: the 41st and 42nd joint epoch
        assert runs[1][50:52] == [2e-4, pytest.approx(2e-4 * 49 / 50)]


@pytest.mark.parametrize("released", [False, True])
def test_enter_trains_more_and_more_of_the_same_networks(released):
    """G1, E and the coarse D_k go on; an enhancer, its output layer and a finer D_k come into use.
    D's Adam goes on to the joint stage, all else begins anew. --released keeps E as it is, but only
    where there are enhancers."""
    cfg = tiny(size=(128, 128), enhancers=2, scales=3, released=released)
    state = pix2pixhd.build(cfg, CPU)
    for k, stage in enumerate(pix2pixhd.plan(cfg)):
        old_g, old_d = state.opt_g, state.opt_d
        pix2pixhd.enter(state, cfg, k)
        G, D = state.generator, state.discriminator
        assert (state.stage, G.level, D.used) == (k, stage.level, 1 + stage.level)
        assert state.opt_g is not old_g and (state.opt_d is old_d) == (stage.name == "joint")
        last = G.output if stage.level == 2 else G.early_outputs[stage.level]
        parts = {"global": [G.globe], "enhancer": [*G.enhancers[:stage.level][-1:]],
                 "joint": [G.globe, *G.enhancers[:stage.level]]}[stage.name]
        parts += [last] if released and stage.level else [last, state.encoder]
        expected = {id(p) for net in parts for p in net.parameters()}
        assert {id(p) for p in state.opt_g.param_groups[0]["params"]} == expected
        assert {id(p) for p in state.opt_d.param_groups[0]["params"]} == {
            id(p) for each in D.scales[:D.used] for p in each.parameters()}
        x = torch.rand(1, 16, *(side >> 2 - stage.level for side in cfg.size))
        assert G(x).shape[2:] == x.shape[2:] and len(D(x[:, :13], x[:, :3])) == D.used


def test_init_puts_an_enhancer_around_a_trained_g1(capsys):
    """G1's run of one scale less: each D judges images of the size that it knows, the finest is
    new. G1's output layer is that of G1 here, too."""
    small = tiny(size=(64, 128), scales=2)
    first = pix2pixhd.build(small, CPU)
    for name in NETS:                           # as if trained: weights from 5 to 6
        for p in getattr(first, name).parameters():
            nn.init.uniform_(p, 5, 6)
    content = {name: getattr(first, name).state_dict() for name in NETS}
    torch.save(content | {"script": "pix2pixhd", "config": vars(small), "stage": 0}, "c.pt")
    cfg = tiny(size=(128, 256), enhancers=1, scales=3, epochs=0, init=("c.pt",))
    state = pix2pixhd.build(cfg, CPU)
    G, scales, said = state.generator, state.discriminator.scales, capsys.readouterr().out
    assert_same(scales[:2].state_dict(), first.discriminator.scales.state_dict())
    assert_same(state.encoder.state_dict(), first.encoder.state_dict())
    assert G.globe.front[0].weight.min() >= 5 <= G.early_outputs[0][0].weight.min()
    assert G.output[0].weight.max() < 1 > scales[2].layers[0][0].weight.max()
    for part in ("generator.enhancers.0", "generator.output", "discriminator.scales.2"):
        assert part in said, said
    content = {name: getattr(state, name).state_dict() for name in NETS}      # and with one less
    torch.save(content | {"script": "pix2pixhd", "config": vars(cfg), "stage": 0}, "d.pt")
    back = pix2pixhd.build(replace(small, init=("d.pt",)), CPU).generator
    assert_same(back.output.state_dict(), G.early_outputs[0].state_dict())


def test_released_files_paint_the_authors_pictures(shared, city):
    """Files as the authors publish them, from networks as their code describes them, through the
    command line: labels alone; with boundaries; with E and the styles of a photo."""
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
            "GE": ReleasedG(39, 4, 1, 2, 2), "E": ReleasedE(2), "RGB": ReleasedG(3, 4, 0, 2, 2)}
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


# --------------------------------------------------------------------------------- Sec. 3.4, styles

def test_objects_in_from_its_definition():
    """Every id once: the class of most of its pixels, its share, its pixels."""
    region, label = torch.randint(0, 6, (9, 11)) * 7000 + 3, torch.randint(0, 4, (9, 11))
    found = pix2pixhd.objects_in(label, region)
    assert [o[1] for o in found] == sorted(set(region.flatten().tolist()))
    for kind, number, share, mask in found:
        assert torch.equal(mask, region == number) and share == mask.double().mean().item()
        votes = [int((label[mask] == k).sum()) for k in range(4)]
        assert votes[kind] == max(votes)


def test_kmeans():
    """Each centre is the mean of the points nearest to it; of few points, or many equal ones, there
    are min(k, distinct points) centres, and then they are the points themselves."""
    points = torch.rand(60, 3)
    centres = pix2pixhd.kmeans(points, 7)
    owner = torch.cdist(points, centres).argmin(1)
    for k in range(7):
        torch.testing.assert_close(centres[k], points[owner == k].mean(0), rtol=0, atol=1e-5)
    for points, k in (([[1.0, 2.0]], 10), ([[0.0, 0.0], [1.0, 1.0], [2.0, 5.0]], 10),
                      ([[0.5, 0.5]] * 30, 4), ([[0.0, 0.0]] * 99 + [[1.0, 0.0], [1.0, 1e-3]], 3)):
        for seed in range(5):
            centres = pix2pixhd.kmeans(torch.tensor(points), k, seed)
            assert torch.equal(centres.unique(dim=0), torch.tensor(points).unique(dim=0))


def drawn(label: torch.Tensor, region: torch.Tensor, k: int = 0, name: str = "a", seed: int = 0,
          vary: tuple = ()) -> torch.Tensor:
    """Which of the four styles each pixel has: (H, W). Class 2 has none."""
    styles = {kind: torch.tensor([[kind, i, -i] for i in range(4)]).float() for kind in range(12)}
    del styles[2]
    state = State(None, None, None, None, None, None, styles=styles)
    pair = {"label": label[None], "region": region[None], "name": name}
    cfg = Config(classes="streets", features=3, seed=seed)
    return pix2pixhd.draw_styles(state, pair, cfg, k, vary)[0, 1]


def test_draw_styles_depends_on_seed_image_object_and_k_alone(capsys):
    """Each of the four changes three quarters of 400 draws; an object gone, the rest unmoved. A
    class that training never saw has zeros, not unset memory, as in the release."""
    region = torch.arange(400).view(20, 20) + 10000
    label = torch.full_like(region, 10)
    first = drawn(label, region)
    for other in (drawn(label, region, seed=1), drawn(label, region, name="b"),
                  drawn(label, region, k=1), drawn(label, region + 500)):
        assert 0.65 < (other != first).float().mean() < 0.85
    assert (first.flatten()[:-1] == first.flatten()[1:]).float().mean() < 0.35
    gone = region == 10123
    fewer = drawn(label.masked_fill(gone, 0), region.masked_fill(gone, 0))
    assert torch.equal(fewer[~gone], first[~gone])
    assert torch.equal(drawn(label, region, k=1, vary=(9,)), first)         # no person is here
    assert torch.equal(drawn(label, region, k=1, vary=(10,)), drawn(label, region, k=1))
    assert not drawn(label * 0 + 2, region).any()
    assert "class 2: was never seen" in capsys.readouterr().out


@pytest.mark.parametrize("released", [False, True])
def test_encode_clusters_the_objects_of_each_class(released):
    """Sec. 3.4: all objects; the release takes those above 1/64 of the image. A class that has none
    so large is clustered all the same."""
    cfg, found = tiny(limit=3, released=released), {}
    state = pix2pixhd.build(cfg, CPU)
    pix2pixhd.encode(cfg, state)
    for item in (common.Dataset("", "train", cfg.size, limit=3)[i] for i in range(3)):
        with torch.no_grad():
            z = state.encoder(item["image"][None])[0]
        for number in item["instance"].unique():
            mask = item["instance"] == number
            kind = int(item["label"][mask][0])
            found.setdefault(kind, []).append((mask.float().mean().item(), z[:, mask].mean(1)))
    assert state.styles.keys() == found.keys()
    for kind, objects in found.items():
        large = [value for share, value in objects if share > 1 / 64]
        values = large if released and large else [value for _, value in objects]
        assert len(state.styles[kind]) == min(len(values), 10)
        if len(values) <= 10:                                       # then they are the centres
            ours, theirs = state.styles[kind], torch.stack(values)
            assert torch.cdist(ours, theirs).amin(0).max() < 1e-4


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
    assert {o[1] for o in found} >= {10000, 10001, 10002, 9000, 0, 1}
    item = common.Dataset("", "test", (32, 64))[0]
    with torch.no_grad():                                           # the photo's own styles
        z = loops_average(editor.state.encoder(item["image"][None]), item["instance"][None])[0]
        torch.testing.assert_close(editor.z, z, rtol=0, atol=1e-5)
        s = torch.cat([editor.pair()["input"], editor.z[None]], 1)
        expected = editor.state.generator(s)[0]
    torch.testing.assert_close(editor.render(), expected, rtol=0, atol=1e-5)
    edge = pix2pixhd.boundary_map(editor.instance[None])[0, 0] > 0
    assert (editor.picture()[:, edge] == -1).all()                  # borders in black
    colour = editor.picture()[:, (editor.label == 0) & ~edge].unique(dim=1)[:, 0]
    torch.testing.assert_close(colour, torch.tensor([70, 130, 180]) / 127.5 - 1)


def test_remove_fills_the_hole_from_around_it(editor):
    """No pixel of the object is left; each takes class, id and style of a pixel beside it."""
    before, mask = scene(editor), editor.instance == 10002
    editor.remove(10002)
    in_step(editor)
    assert not (editor.instance == 10002).any() and changed_only(before, editor, mask)
    for r, c in mask.nonzero().tolist():
        beside = editor.instance[max(r - 1, 0):r + 2, max(c - 1, 0):c + 2]
        assert (beside == editor.instance[r, c]).sum() > 1
    around = F.max_pool2d(mask[None].float(), 3, 1, 1)[0] > 0
    assert set(editor.instance[mask].tolist()) <= set(before[1][around & ~mask].tolist())


def test_edits_change_exactly_their_pixels_and_are_undone(editor):
    """A new object's id is class * 1000 + k, never one in use; that of another class has the first
    of its styles, a copy its own. A copy is cut at the image's edge. Undo goes all the way."""
    right = 66 - int((editor.instance == 10002).nonzero()[:, 1].max())     # two columns too far
    scenes, image, styles = [scene(editor)], editor.render(), editor.state.styles
    for name, *arguments, kind in (
            ("set_class", 9000, "car", 10), ("set_class", 10000, 11, 11),
            ("set_style", 10002, 3, 10), ("paste", 10002, -6, 4, 10),
            ("paste", 10002, 0, right, 10),
            ("set_class", 3, "building", 1)):
        label, instance, z = before = scenes[-1]
        mask = source = instance == arguments[0]
        expected = styles[kind][3 if name == "set_style" else 0]
        if name == "paste":
            mask, expected = torch.zeros_like(mask), z[:, source][:, 0]
            for r, c in source.nonzero().tolist():
                if 0 <= r + arguments[1] < 32 and 0 <= c + arguments[2] < 64:
                    mask[r + arguments[1], c + arguments[2]] = True
        getattr(editor, name)(*arguments)
        in_step(editor)
        assert changed_only(before, editor, mask) and (editor.label[mask] == kind).all()
        number, = editor.instance[mask].unique().tolist()
        assert number // 1000 == kind           # a building that was a car is no part of the houses
        assert number not in instance or name == "set_style"
        assert torch.equal(editor.z[:, mask][:, 0], expected), (name, arguments)
        scenes.append(scene(editor))
    assert not torch.equal(editor.render(), image)         # and it is seen
    for expected in scenes[-2::-1]:
        editor.undo()
        assert_same(scene(editor), expected)


# ----------------------------------------------------------------------- As a user calls it: stages

# Two steps an epoch (five images, batches of two): the global stage is steps 1 to 4, the enhancer's
# 5 and 6, the joint one 7 to 10. Step 3 is in mid-epoch.
TINY = ("--size 64 64 --width 4 --layers 2 1 1 --scales 2 --d-width 4 --features 2 --batch-size 2 "
        "--epochs 2 --enhancer-epochs 1 2 --limit 5 --loss GAN+FM --vgg random --no-smooth "
        "--lr 0.0002 --gpu -1")
CITY = ("{}_gtFine_labelIds.png", "{}_gtFine_instanceIds.png", "{}_leftImg8bit.png")
STEPS = 10
TRAINED = NETS + ("opt_g", "opt_d", "stage", "styles")


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
    """The same run, stopped inside the global and the joint stage and at a border, and gone on
    with: a copy of each stop."""
    out, copies = shared / "legs", {}
    for step in (3, 6, 9, STEPS):
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


def test_one_command_prints_and_trains_the_schedule(run, legs):
    text = (run.parent / "said.txt").read_text()
    for part in ("global: 2 of 5 epochs, at (32, 32), with 1 discriminator",
                 "enhancer: 1 of 5 epochs, at (64, 64), with 2 discriminator",
                 "joint: 2 of 5 epochs, at (64, 64), with 2 discriminator", "10 steps of 2 image"):
        assert part in text, text
    # Five test streets as input | output | truth, two of them side by side; half as large at first.
    assert size_of(legs[3] / "samples" / "0000003.png") == (6 * 34 + 2, 3 * 34 + 2)
    assert size_of(run / "samples" / "0000010.png") == (6 * 66 + 2, 3 * 66 + 2)
    content = stored(run)
    assert (content["stage"], place(run)) == (2, (STEPS, 4, 4))
    assert content["opt_g"]["state"][0]["step"] == 4        # G's Adam starts afresh in each stage,
    assert content["opt_d"]["state"][0]["step"] == 6        # D's with each new D
    assert set(content["styles"]) == set(range(12))
    assert all(v.shape[1] == 2 and len(v) <= 10 for v in content["styles"].values())


def test_a_run_in_legs_equals_the_whole_run(run, legs):
    """Bit for bit: weights, moments, styles."""
    assert_same({k: stored(legs[STEPS])[k] for k in TRAINED}, {k: stored(run)[k] for k in TRAINED})


def test_more_epochs_than_planned(legs, run):
    """A stage whose end is still ahead may grow."""
    shutil.copytree(legs[3], "r")
    call("--resume --out r --epochs 3 --steps 6")          # still in the global stage
    assert (stored("r")["stage"], place("r")) == (0, (6, 2, 4))
    shutil.copytree(run, "s")
    call("--resume --out s --enhancer-epochs 1 3 --steps 0")
    assert (stored("s")["stage"], place("s")[0]) == (2, STEPS + 2)


def test_mirror_flips_training_photos_alone():
    """--no-mirror: some data must not be flipped, as where signs are to be read."""
    for mirror, split in ((True, "train"), (True, "test"), (False, "train")):
        data = pix2pixhd.dataset(tiny(mirror=mirror, limit=1), split)
        looks = {data[epoch, 0]["image"].numpy().tobytes() for epoch in range(8)}
        assert len(looks) == 1 + (mirror and split == "train")


def test_without_instance_maps_the_labels_do():
    """Told once, remembered by the checkpoint, and nobody is asked for instances again."""
    data = scenes(Path("data"), instances=())
    text = call(f"{TINY} --enhancers 0 --data {data} --classes 34 --steps 2 --out r")
    assert "no boundary" in text and "averaged over labels" in text
    config = stored("r")["config"]
    assert (config["boundary"], config["pool"]) == (False, "label")
    assert set(stored("r")["styles"]) == {7, 23, 26, 33}
    call("sample --out r --input data/test_label/1.png --output o.png")
    text = call("edit --out r --style 26=1 --output e.png")         # both cars are one region
    assert re.search(r"^ +26 +class 26 ", text, re.MULTILINE)


def test_edges_to_photos():
    """Pairs of images, through all three stages: no labels, no styles."""
    for split, side, i in itertools.product(("train", "test"), "AB", range(3)):
        picture(Path(f"data/{split}_{side}/{i}.png"), 64, 64, i + 9 * (side == "B"))
    call(f"{TINY} --preset edges2photo --data data --features 0 --steps 7 --out r")
    assert stored("r")["config"]["classes"] == "" and stored("r")["stage"] == 2
    call(f"sample --out r --output o --input {picture(Path('e.jpg'), 33, 47)}")
    assert size_of("o/e.png") == (47, 33)
    for mode in ("evaluate", "edit"):
        fails("pix2pixhd", f"{mode} --out r", "label")


def test_a_test_split_without_photos():
    """Cityscapes as the authors ship it: labels and instances to test with, and no truth."""
    data = scenes(Path("data"), CITY, photos=("train",))
    call(f"{TINY} --enhancers 0 --data {data} --steps 2 --out r")
    assert size_of("r/samples/0000002.png") == (4 * 66 + 2, 2 * 66 + 2)      # input | output
    call("sample --out r --samples 2")
    assert len(list(Path("r/test").iterdir())) == 6
    fails("pix2pixhd", "evaluate --out r --vgg random", "test split", "image files")
    assert not list(Path(".").rglob("fcn8s*"))              # said before a scorer is trained
    for _ in range(2):                                      # pictures of edits replace their like
        call("edit --out r --item 2 --style 26000=1")
    assert [p.name for p in Path("r/edits").iterdir()] == ["2.png"]


def test_encode_completes_an_interrupted_run(run):
    """It fills in the styles and leaves all else in the checkpoint as it was."""
    Path("r").mkdir()
    before = stored(run) | {"styles": {}}
    torch.save(before, "r/checkpoint.pt")
    assert "no styles in the checkpoint yet" in call("sample --out r --limit 1 --output o")
    call("encode --checkpoint r/checkpoint.pt")
    after = stored("r")
    assert_same(after.pop("styles"), stored(run)["styles"])
    assert_same(after, {k: v for k, v in before.items() if k != "styles"})


def objects_of(text: str) -> dict[int, str]:
    """The list that the mode edit prints: {id: class}."""
    return {int(k): v for k, v in re.findall(r"^ +(\d+)  (\w.*?) +[\d.]+%", text, re.MULTILINE)}


CARS = {7: "road", 23: "sky", 26000: "car", 26001: "car", 33001: "bicycle"}


@pytest.mark.parametrize("flags, expected", [
    ("", CARS), ("--set 26000=25 --set 25000=26", CARS),
    ("--set 33001=person --remove 26001 --paste 26000@-6,25 --undo --style 26000=0",
     {7: "road", 23: "sky", 24000: "person", 26000: "car"}),
    ("--paste 26000@-6,25 --remove 26002 --remove 26001",
     {7: "road", 23: "sky", 26000: "car", 33001: "bicycle"})])
def test_edits_happen_in_the_order_given(city, flags, expected):
    assert objects_of(call(f"edit --out {city} --output e.png {flags}")) == expected
    assert size_of("e.png") == (2 * 66 + 2, 2 * 66 + 2)
    with Image.open("e.png") as image:
        pixels = np.asarray(image)
    before, after = pixels[2:66, 68:132], pixels[68:132, 68:132]
    assert (before == after).all() == (flags == "")
