"""What the pix2pix paper claims, tested on pix2pix.py.

The oracles share no code with the script: numpy in float64, printed numbers, gradients, limits. The
check values come from the authors' own PyTorch networks, filled with sines and run in float64.
"""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    TINY, four_numbers, grey_levels, parameters, picture, size_of, works)
from PIL import Image
from torch import nn
from torch.nn import functional as F

import common
import pix2pix
from pix2pix import Config, Generator, PatchDiscriminator

CPU, PIX2PIX = torch.device("cpu"), TINY["pix2pix"]
pytestmark = pytest.mark.usefixtures("draw_each_street_once", "no_plots")


# ------------------------------------------------------------------- The released networks' numbers

class Block(nn.Module):
    """A level of the authors' U-Net, as their PyTorch file describes it."""

    def __init__(self, outer: int, inner: int, sub=None, c_in: int = 0, dropout: bool = False):
        super().__init__()
        self.outermost = c_in > 0
        down = nn.Conv2d(c_in or outer, inner, 4, 2, 1, bias=False)
        up = nn.ConvTranspose2d(2 * inner if sub else inner, outer, 4, 2, 1, bias=self.outermost)
        if self.outermost:
            layers = [down, sub, nn.ReLU(True), up, nn.Tanh()]
        elif sub is None:
            layers = [nn.LeakyReLU(0.2, True), down, nn.ReLU(True), up, nn.BatchNorm2d(outer)]
        else:
            layers = [nn.LeakyReLU(0.2, True), down, nn.BatchNorm2d(inner), sub, nn.ReLU(True), up,
                      nn.BatchNorm2d(outer)] + [nn.Dropout(0.5)] * dropout
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


def released_generator(halvings: int, w: int) -> nn.Module:
    """unet_128 has 7 halvings, unet_256 8; the dropout is in all levels from 8 w to 8 w."""
    block = Block(8 * w, 8 * w)
    for _ in range(halvings - 5):
        block = Block(8 * w, 8 * w, block, dropout=True)
    for c in (4 * w, 2 * w, w):
        block = Block(c, 2 * c, block)
    net = nn.Module()
    net.model = Block(3, w, block, c_in=3)
    return net


def released_discriminator(field: int, w: int = 8) -> nn.Module:
    """The layers of the authors' PatchGANs and PixelGAN, for their shapes and order alone."""
    c = {1: (1, 2), 16: (1, 2), 70: (1, 2, 4, 8), 286: (1, 2, 4, 8, 8, 8)}[field]
    kernel = 1 if field == 1 else 4
    layers = [nn.Conv2d(6, w, kernel)]
    for a, b in zip(c, c[1:]):
        layers += [nn.LeakyReLU(), nn.Conv2d(a * w, b * w, kernel, bias=False),
                   nn.BatchNorm2d(b * w)]
    return nn.Sequential(*layers, nn.LeakyReLU(), nn.Conv2d(c[-1] * w, 1, kernel, bias=field > 1))


def filled(net: nn.Module) -> dict[str, torch.Tensor]:
    """The fill rule of the check values: sin(0.5 + 1.7 i + 0.37 j), scaled by the tensor's kind."""
    stored, i = {}, 0
    for key, shape in ((key, tuple(v.shape)) for key, v in net.state_dict().items()):
        if key.endswith("num_batches_tracked"):
            stored[key] = torch.tensor(0)
        elif key.endswith(("running_mean", "running_var")):
            stored[key] = torch.full(shape, float(key.endswith("var")), dtype=torch.float64)
        else:
            s = np.sin(0.5 + 1.7 * i + 0.37 * np.arange(math.prod(shape))).reshape(shape)
            scale = 0.05 * s if len(shape) == 4 else 0.1 * s + key.endswith("weight")
            stored[key], i = torch.from_numpy(scale), i + 1
    return stored


def sines(phase: float) -> torch.Tensor:
    return torch.from_numpy(np.sin(0.3 * np.arange(3 * 256 ** 2) + phase).reshape(1, 3, 256, 256))


A, B, C = sines(0.2), sines(1.0), sines(2.0)


def without_noise(G: Generator) -> Generator:
    for block in G.decoder:
        block.dropout = False
    return G


def load_generator(change=lambda stored: stored) -> Generator:
    """Width 8, in float64, from a released file through the script's loader, without dropout."""
    torch.save(change(filled(released_generator(8, 8))), "latest_net_G.pth")
    state = pix2pix.State(Generator(width=8).double(), None, None, None)
    pix2pix.load(state, pix2pix.read_weights("latest_net_G.pth"), "latest_net_G.pth")
    return without_noise(state.generator)


def load_discriminator(patch: int) -> PatchDiscriminator:
    D = PatchDiscriminator(width=8, patch=patch).double()
    D.layers.load_state_dict(filled(released_discriminator(patch)))
    return D


@pytest.mark.parametrize("prefix, left_out", [("", ()), ("module.", ("num_batches_tracked",))])
def test_check_values_u_net(prefix, left_out):
    """The U-Net is the authors': same keys, same order of skips, same numbers. Old files lack
    num_batches_tracked; files of DataParallel carry "module." before each key."""
    G = load_generator(lambda stored: {prefix + k: v for k, v in stored.items()
                                       if k.rpartition(".")[2] not in left_out})
    with torch.no_grad():
        assert four_numbers(G(A)) == pytest.approx(
            [0.002880129, 0.230136235, 0.110957791, -0.328599492], abs=1e-6)


@pytest.mark.parametrize("patch, numbers", [
    (70, [0.138548540, 0.223206174, 0.518110658, 0.254741001]),
    (16, [-0.109410410, 0.179467689, 0.250285906, -0.189697948]),
    (286, [-0.037862188, 0.203930455, -0.147898866, 0.137658605]),
    (1, [-0.013218821, 0.041987541, 0.031683978, -0.022145015])])
def test_check_values_discriminators(patch, numbers):
    D = load_discriminator(patch)
    with torch.no_grad():
        assert four_numbers(D(A, B)) == pytest.approx(numbers, rel=1e-6, abs=1e-7)


def test_check_values_losses():
    """L_D with its half, G's part of the GAN loss without, and 100 times the mean L1."""
    D = load_discriminator(70)
    with torch.no_grad():
        real, fake = pix2pix.discriminator_loss(D(A, B), D(A, C))
        assert (real + fake).item() == pytest.approx(0.7181038871, rel=1e-6)
        assert pix2pix.generator_loss(D(A, C)).item() == pytest.approx(0.6115459150, rel=1e-6)
        assert 100 * pix2pix.l1_loss(C, B).item() == pytest.approx(61.0423613097, rel=1e-6)


@pytest.mark.parametrize("halvings, h, w", [(7, 128, 256), (8, 256, 256)])
def test_released_files_give_the_authors_picture(halvings, h, w):
    """Run as a user does, beside plain modules in training mode, which is how the authors test."""
    net = released_generator(halvings, 4)
    for p in net.parameters():
        nn.init.normal_(p, 0, 0.1) if p.dim() == 4 else nn.init.normal_(p, 0.5, 0.5)
    torch.save({k: v for k, v in net.state_dict().items()}, "latest_net_G.pth")
    x = np.asarray(Image.open(picture("p.png", h, w))).copy()
    torch.manual_seed(common.draw_seed(5, "p"))
    with torch.no_grad():
        y = net.model((torch.from_numpy(x).float() / 127.5 - 1).movedim(-1, 0)[None])[0]
    works("pix2pix", "sample --checkpoint latest_net_G.pth --input p.png --output o.png --seed 5 "
                     "--gpu -1 --direction AtoB --task pairs")
    assert grey_levels("o.png", y) <= 1


# ---------------------------------------------------------------- Parameters and receptive fields

@pytest.mark.parametrize("arguments, number", [
    (dict(), 54_413_955), (dict(c_x=1, c_y=2), 54_409_858),
    (dict(bottleneck_norm=True), 54_414_979),
    (dict(c_x=1, c_y=2, bottleneck_norm=True), 54_410_882),
    (dict(skips=False), 39_075_459), (dict(c_x=1, c_y=2, skips=False), 39_072_386),
    (dict(levels=7), 41_828_995)])
def test_generator_parameters(arguments, number):
    with torch.device("meta"):
        assert parameters(Generator(**arguments)) == number


@pytest.mark.parametrize("arguments, number, side", [
    (dict(patch=1), 9_024, 256), (dict(patch=16), 139_585, 126), (dict(patch=34), 666_433, 62),
    (dict(patch=70), 2_768_705, 30), (dict(patch=142), 6_964_033, 14),
    (dict(patch=286), 11_159_361, 6), (dict(conditional=False), 2_765_633, 30),
    (dict(c_x=1, c_y=2), 2_765_633, 30)])
def test_discriminator_parameters_and_map(arguments, number, side):
    """Parameters of the authors' networks, and the side of the map of verdicts for 256 x 256."""
    with torch.device("meta"):
        D = PatchDiscriminator(**arguments)
        x = torch.zeros(1, arguments.get("c_x", 3), 256, 256)
        y = torch.zeros(1, arguments.get("c_y", 3), 256, 256)
        assert parameters(D) == number
        assert D(x, y).shape == (1, 1, side, side)


@pytest.mark.parametrize("patch", [1, 16, 34, 70, 142, 286])
def test_table_3_receptive_fields(patch):
    """Measured: which input pixels does one verdict depend on? Rows and columns, x and y alike."""
    D = PatchDiscriminator(width=2, patch=patch)
    for parent in list(D.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):          # its statistics would couple all pixels
                setattr(parent, name, nn.Identity())
    x = torch.randn(1, 3, 448, 448, requires_grad=True)
    y = torch.randn(1, 3, 448, 448, requires_grad=True)
    logits = D(x, y)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    for grad in (x.grad, y.grad):
        for places in grad[0].abs().sum(0).nonzero().T:
            assert len(places.unique()) == places.max() - places.min() + 1 == patch


# --------------------------------------------------------------------------------- Equations 1 - 4

def test_eq_1_generator_learns_while_d_is_winning():
    """Where D is sure, log(1 - D) has no gradient left, and G's loss has one of -1. From logits: no
    log(0), where a sigmoid and a log give infinity in float32."""
    d_fake = torch.full((1, 1, 2, 2), -200.0, requires_grad=True)
    pix2pix.generator_loss(d_fake).backward()
    assert d_fake.grad.sum().item() == pytest.approx(-1, rel=1e-6)
    for d in (d_fake.detach(), -d_fake.detach()):
        losses = [*pix2pix.discriminator_loss(d, d), pix2pix.generator_loss(d)]
        assert all(math.isfinite(v) for v in losses) and sum(v.item() for v in losses) >= 100


def textbook_step(G, D, x, y, loss: str, weight: float, lr: float) -> dict[str, float]:
    """Sec. 3.3 by hand, with plain gradient descent, so that every factor shows."""
    def bce(logits, truth):
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth))

    def descend(net, objective):
        gradients = torch.autograd.grad(objective, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients):
                p -= lr * g

    y_hat, values, objective = G(x), {}, 0
    if "GAN" in loss:
        with torch.no_grad():
            constant = y_hat.clone()
        real, fake = 0.5 * bce(D(x, y), 1.0), 0.5 * bce(D(x, constant), 0.0)
        descend(D, real + fake)
        objective = bce(D(x, y_hat), 1.0)                  # the updated D judges
        values = {"d_real": real.item(), "d_fake": fake.item(), "g_gan": objective.item()}
    l1 = (y_hat - y).abs().sum() / y.numel()
    descend(G, objective + weight * l1 if "L1" in loss else objective)
    return values | {"g_l1": l1.item()}


def small_state(cfg: Config, optimiser=torch.optim.SGD, **options) -> pix2pix.State:
    """Networks in float64 without dropout; weights large enough for gradients worth comparing."""
    torch.manual_seed(3)
    G, D = pix2pix.networks(cfg)
    without_noise(G)
    for net in filter(None, (G, D)):
        net.double()
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, 0, 0.2)
    return pix2pix.State(G, D, optimiser(G.parameters(), **options),
                         optimiser(D.parameters(), **options) if D is not None else None)


@pytest.mark.parametrize("loss, weight", [
    ("L1+cGAN", 100.0), ("L1+cGAN", 7.0), ("L1+cGAN", 0.0), ("L1+GAN", 100.0), ("cGAN", 100.0),
    ("GAN", 100.0), ("L1", 100.0)])
def test_eq_4_train_step_is_the_textbook_step(loss, weight):
    """D by half its loss, then G against the new D by the non-saturating one, L1, the mean over all
    elements, by lambda; each gradient to one network."""
    cfg = Config(size=(32, 32), levels=5, width=2, patch=16, loss=loss, lambda_l1=weight)
    state = small_state(cfg, lr=0.01)
    G, D = copy.deepcopy(state.generator), copy.deepcopy(state.discriminator)
    x, y = torch.rand(2, 2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    for _ in range(2):
        before = copy.deepcopy([net for net in (state.generator, state.discriminator) if net])
        expected = textbook_step(G, D, x, y, loss, weight, lr=0.01)
        values = pix2pix.train_step(state, {"input": x, "image": y}, cfg)
        for old, net in zip(before, (state.generator, state.discriminator)):
            for p, q in zip(old.parameters(), net.parameters()):      # no other loss's gradient
                torch.testing.assert_close(q.grad, (p - q) / 0.01, rtol=1e-6, atol=1e-8)
        assert {k: v.item() for k, v in values.items()} == pytest.approx(expected, rel=1e-6)
        assert not any(v.requires_grad for v in values.values())
        assert (D is None) == (loss == "L1")
        assert D is None or D.layers[0].in_channels == (6 if "cGAN" in loss else 3)       # Eq. (2)
    for net, copied in ((state.generator, G), (state.discriminator, D)):
        for p, q in zip(net.parameters() if net else (), copied.parameters() if net else ()):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
            assert p.requires_grad


def test_optimisers_are_the_papers():
    """Sec. 3.3: Adam, learning rate 0.0002, betas 0.5 and 0.999, for both networks."""
    state = pix2pix.build(Config(size=(32, 32), levels=5, width=2), CPU)
    for optimiser, net in ((state.opt_g, state.generator), (state.opt_d, state.discriminator)):
        assert isinstance(optimiser, torch.optim.Adam)
        group, = optimiser.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-4, (0.5, 0.999), 0)
        assert {id(p) for p in group["params"]} == {id(p) for p in net.parameters()}


def test_initialisation():
    """Sec. 6.2: weights from N(0, 0.02). BatchNorm gains from N(1, 0.02), biases zero."""
    state = pix2pix.build(Config(size=(128, 128), width=16), CPU)
    for net in (state.generator, state.discriminator):
        named = dict(net.named_parameters())
        weights = torch.cat([p.flatten() for p in named.values() if p.ndim == 4])
        gains = torch.cat([p.flatten() for k, p in named.items()
                           if p.ndim == 1 and k.endswith("weight")])
        biases = torch.cat([p.flatten() for k, p in named.items() if k.endswith("bias")])
        assert abs(weights.mean()) < 1e-3 and weights.std().item() == pytest.approx(0.02, rel=0.03)
        assert gains.mean().item() == pytest.approx(1, abs=0.01)
        assert gains.std().item() == pytest.approx(0.02, rel=0.3)
        assert not biases.any()


# ---------------------------------------------------------------------------- Generator, Sec. 6.1

@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_in_three_blocks_and_on_at_test_time(first, training):
    """Half of the values of blocks 1-3 are dropped, in eval() as in train(); z is that. The release
    has levels - 5 such blocks, from its second on."""
    G = Generator(width=8, levels=7, first_dropout=first).train(training)
    x, dropped = torch.randn(2, 3, 128, 128), []
    for block in G.decoder:
        block.register_forward_hook(lambda *a: dropped.append((a[2] == 0).float().mean().item()))
    with torch.no_grad():
        assert not torch.equal(G(x), G(x))
    for i, share in enumerate(dropped[:len(G.decoder)], 1):
        assert (0.3 < share < 0.7) if first <= i <= 3 else share < 0.01, (i, share)


def test_translate_takes_each_image_alone():
    """One image at a time: a batch equals its members one by one, which a plain pass does not. Nor
    does it move the running averages."""
    cfg = Config(size=(32, 32), levels=5, width=4)
    G = without_noise(pix2pix.test_time(pix2pix.build(cfg, CPU), cfg))
    x = torch.randn(3, 3, 64, 64) * torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1, 1)
    before = copy.deepcopy(G.state_dict())
    alone = torch.cat([pix2pix.translate(G, one[None]) for one in x])
    assert torch.equal(pix2pix.translate(G, x), alone)
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items())
    with torch.no_grad():
        assert (G(x) - alone).abs().max() > 1e-3


def test_erratum_bottleneck_norm_is_constant_for_one_image():
    """Sec. 6.3: BatchNorm on a 1 x 1 map at batch 1 leaves its beta; the map carries nothing."""
    G, maps = without_noise(Generator(width=4, levels=5, bottleneck_norm=True)), []
    beta = nn.init.normal_(G.encoder[-1].norm.bias)
    G.encoder[-1].register_forward_hook(lambda *a: maps.append(a[2]))
    out = G(torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(maps[-1].flatten(), beta)
    gradient, = torch.autograd.grad(out.sum(), G.encoder[-1].conv.weight)
    assert not gradient.any()
    G(torch.randn(2, 3, 32, 32))                           # two images: Table 2's remedy
    assert (maps[-1][0] - maps[-1][1]).abs().max() > 1e-2
    assert isinstance(Generator(width=4, levels=5).encoder[-1].norm, nn.Identity)


def test_encoder_decoder_has_no_way_around_the_bottleneck():
    """Fig. 3: with the innermost map silenced, only the U-Net still sees its input."""
    for skips in (True, False):
        G = without_noise(Generator(width=4, levels=5, skips=skips))
        nn.init.zeros_(G.encoder[-1].conv.weight)
        x = torch.randn(2, 3, 64, 64, requires_grad=True)
        gradient, = torch.autograd.grad(G(x).square().sum(), x)
        assert (gradient.abs().max() > 0) == skips


@pytest.mark.parametrize("size, levels", [
    ((256, 256), 8), ((128, 128), 7), ((512, 512), 8), ((96, 64), 5)])
def test_levels_follow_the_size(size, levels):
    """256 x 256 gives the paper's 8 levels, and the 1 x 1 bottleneck; 128 gives the release's 7.
    A notebook that builds from a bare Config can go on with it to test time."""
    cfg = Config(size=size, width=1)
    state = pix2pix.build(cfg, CPU)
    for G in (state.generator, pix2pix.test_time(state, cfg), pix2pix.networks(cfg)[0]):
        assert len(G.encoder) == len(G.decoder) == levels and G.multiple == 2 ** levels


# ------------------------------------------------------------------------ Colours, labels, masks

def numpy_lab(rgb: np.ndarray) -> np.ndarray:
    """(n, 3) in [0, 1] -> (n, 3), written from the CIE's definition."""
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    matrix = np.array([[.4124564, .3575761, .1804375], [.2126729, .7151522, .0721750],
                       [.0193339, .1191920, .9503041]])
    t = linear @ matrix.T / (0.95047, 1, 1.08883)
    f = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def test_figure_7_histograms_and_their_intersection():
    """Marginal counts of L, a and b in bins of one unit, from -110 to 110. 1 for equal
    distributions, whatever their totals; 0 for disjoint; sum_i min(p_i, q_i)."""
    image = torch.rand(1, 3, 24, 32) * 2 - 1
    counts = pix2pix.colour_histograms(image)
    for found, channel in zip(counts, pix2pix.rgb_to_lab(image)[0]):
        assert found.sum() == 24 * 32
        assert (found - channel.histc(220, -110, 110)).abs().sum() <= 2      # at the edge of a bin
    white = pix2pix.colour_histograms(torch.ones(1, 3, 4, 4))
    assert white.sum(1).tolist() == [16, 16, 16] and white[0, 210] == 16    # L = 100 is not lost
    p = torch.tensor([[1.0, 3.0, 0.0, 0.0], [2.0, 0.0, 2.0, 0.0]])
    q = torch.tensor([[0.0, 0.0, 5.0, 5.0], [1.0, 1.0, 1.0, 1.0]])
    assert pix2pix.histogram_intersection(p, 7 * p).tolist() == pytest.approx([1, 1])
    assert pix2pix.histogram_intersection(p, q).tolist() == pytest.approx([0, 0.5])


def test_table_6_nearest_colour():
    """Each pixel gets the class whose colour is nearest; exact colours return their ids."""
    table = common.class_table("camvid")
    palette = table.palette[:len(table.names)].astype(float)   # unknown is no answer
    label = torch.arange(len(palette)).view(1, 1, -1)
    exact = torch.from_numpy(palette / 127.5 - 1).float().T[None, :, None]
    assert torch.equal(pix2pix.nearest_colour(exact, table), label)
    image = torch.rand(2, 3, 5, 7, dtype=torch.float64) * 2 - 1
    distance = torch.cdist((image.movedim(1, -1) + 1) * 127.5, torch.from_numpy(palette)[None])
    assert torch.equal(pix2pix.nearest_colour(image.float(), table), distance.argmin(-1))


def test_colorization_pair_is_l_to_ab():
    """Sec. 6.1.1: one channel in, two out. x = L / 50 - 1, y = (a, b) / 110; and back."""
    image = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1
    image[0] = image[0] * 0.04 - 0.96                      # the dark end, where sRGB is linear
    cfg = Config(task="colorization", size=(32, 32), levels=5, width=2)
    pair = pix2pix.make_pair({"image": image}, cfg)
    lab = numpy_lab(((image.movedim(1, -1).reshape(-1, 3) + 1) / 2).numpy())
    lab = np.moveaxis(lab.reshape(2, 8, 8, 3), -1, 1)
    assert pair["input"].numpy() == pytest.approx(lab[:, :1] / 50 - 1, abs=1e-6)
    assert pair["image"].numpy() == pytest.approx(lab[:, 1:] / 110, abs=1e-6)
    assert (pix2pix.to_rgb(pair["image"], pair, cfg) - image).abs().max() < 1e-4
    assert pix2pix.lab_to_rgb(torch.tensor([50.0, 110, -110]).view(1, 3, 1, 1)).abs().max() <= 1
    G, D = pix2pix.networks(cfg)
    assert G(pair["input"].float().repeat(1, 1, 4, 4)).shape == (2, 2, 32, 32)
    assert D.layers[0].in_channels == 3


def test_inpainting_whitens_the_central_square():
    """The central square of half the side: 128 of 256, from 64; the truth stays whole."""
    image = torch.rand(2, 3, 256, 256) * 1.8 - 0.9
    pair = pix2pix.make_pair({"image": image}, Config(task="inpainting"))
    expected = image.clone()
    expected[:, :, 64:192, 64:192] = 1.0
    assert torch.equal(pair["input"], expected) and torch.equal(pair["image"], image)


def test_label_maps_as_colours_and_as_output():
    label = torch.randint(0, 12, (2, 6, 5))
    photo = torch.rand(2, 3, 6, 5)
    colours = common.class_table("streets").palette[label.numpy()] / 127.5 - 1     # (2, 6, 5, 3)
    batch = {"label": label, "image": photo}
    pair = pix2pix.make_pair(batch, Config(classes="streets"))
    assert pair["input"].numpy() == pytest.approx(np.moveaxis(colours, -1, 1), abs=1e-6)
    assert torch.equal(pair["image"], photo)
    pair = pix2pix.make_pair(batch, Config(classes="streets", task="photo2labels"))
    assert torch.equal(pair["input"], photo)
    assert pair["image"].numpy() == pytest.approx(np.moveaxis(colours, -1, 1), abs=1e-6)


# --------------------------------------------------------------------------- Sec. 6.2, the recipe

@pytest.mark.parametrize("preset, epochs, batch, augment, direction, task", [
    ("cityscapes", 200, 1, "jitter", "BtoA", "labels2photo"),
    ("cityscapes-batch10", 200, 10, "jitter", "BtoA", "labels2photo"),       # all layers normalised
    ("cityscapes-photo2labels", 200, 1, "jitter", "AtoB", "photo2labels"),
    ("facades", 200, 1, "jitter", "BtoA", "labels2photo"),
    ("map2aerial", 200, 1, "jitter", "BtoA", "pairs"),
    ("aerial2map", 200, 1, "jitter", "AtoB", "pairs"),
    ("colorization", 6, 4, "mirror", None, "colorization"),
    ("edges2shoes", 15, 4, "jitter", "AtoB", "pairs"),
    ("edges2handbags", 15, 4, "jitter", "AtoB", "pairs"),
    ("day2night", 17, 4, "jitter", "BtoA", "pairs"),
    ("thermal2color", 10, 4, "jitter", None, "pairs"),
    ("inpainting", 25, 4, "jitter", None, "inpainting")])
def test_presets_are_the_lines_of_section_6_2(preset, epochs, batch, augment, direction, task):
    cfg = Config(**pix2pix.PRESETS[preset])
    assert (cfg.epochs, cfg.batch_size, cfg.augment) == (epochs, batch, augment)
    assert cfg.task == task and cfg.direction == (direction or cfg.direction)
    assert (cfg.size, cfg.width, cfg.lr, cfg.decay) == ((256, 256), 64, 2e-4, False)
    assert (cfg.loss, cfg.lambda_l1, cfg.patch, cfg.generator) == ("L1+cGAN", 100, 70, "unet")
    assert cfg.bottleneck_norm == (preset == "cityscapes-batch10")     # Sec. 6.3, the errata


def test_jitter_is_286_to_256():
    """Sec. 6.2: resize to 286 x 286, crop 256 x 256 at random."""
    assert pix2pix.dataset(Config(limit=1), "train").load_size == (286, 286)
    assert pix2pix.dataset(Config(limit=1), "test").load_size == (256, 256)


def test_learning_rate_is_constant_and_decay_is_the_releases():
    """Full for half the epochs, then down in equal steps; the last epoch still trains."""
    assert {pix2pix.learning_rate(Config(), e) for e in range(200)} == {2e-4}
    for n in (2, 3, 8, 200):
        rates = [pix2pix.learning_rate(Config(decay=True, epochs=n), e) / 2e-4 for e in range(n)]
        assert rates == [pix2pix.learning_rate(Config(released=True, epochs=n), e) / 2e-4
                         for e in range(n)]
        assert rates[:n // 2] == [1] * (n // 2) and rates[-1] > 0
        steps = np.diff([1, *rates[n // 2:], 0])
        assert steps == pytest.approx(-1 / len(steps), rel=1e-6)
    assert rates[100] == pytest.approx(100 / 101, rel=1e-6)            # the release's, epoch 101


# ------------------------------------------------------------------------------------ As a program

@pytest.mark.parametrize("task", ["colorization", "inpainting", "pairs"])
def test_training_and_sampling_on_files(task):
    """Photos for tasks that make their own input, side-by-side files for pairs; --input a photo.
    And Fig. 7's histograms."""
    for split in ("train", "test"):
        for i in range(3):
            picture(f"data/{split}/{i}.png", 32, 64, i)
    works("pix2pix", f"{PIX2PIX} --data data --steps 1 --task {task} --out r")
    picture("photo.jpg", 41, 29)
    works("pix2pix", "sample --out r --input photo.jpg --output o.png")
    assert size_of("o.png") == (29, 41)
    assert "Segmentation" not in works("pix2pix", "evaluate --out r")     # no label maps
    metrics = json.loads(Path("r/metrics.json").read_text())
    assert metrics["images"] == 3 and 0 < metrics["L1"] < 2 and Path("r/worst.png").exists()
    assert all(0 <= v <= 1.001 for v in metrics["histogram intersection"])


def test_table_6_photo_to_labels_by_nearest_colour():
    """No scorer; the true label maps score 1. A sample's ids can be read again."""
    works("pix2pix", f"{PIX2PIX} --steps 1 --task photo2labels --loss L1 --out r")
    text = " ".join(works("pix2pix", "evaluate --out r --limit 2").split())
    metrics = json.loads(Path("r/metrics.json").read_text())
    assert all(v == 1 for v in metrics["truth"].values())
    assert metrics["output"]["per-pixel acc"] < 1 and "Table 6 L1 .86 .42 .35" in text
    picture("p.png", 32, 40)
    works("pix2pix", "sample --out r --input p.png --output o.png")
    ids = common.read_label(Path("ids/o.png"), common.class_table("streets"))
    assert ids.shape == (32, 40) and 0 <= ids.min() and ids.max() < 12
