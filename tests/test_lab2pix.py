"""What the Lab2Pix paper claims, tested on lab2pix.py.

The oracles share no code with the script: numpy in float64, printed numbers, gradients, limits, and
for released files networks of plain torch modules, written here as the authors name their parts.
"""

import copy
import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCORER, edges_of, fails, grey_levels, label_map, picture, save, size_of, works
from conftest import TINY as LINES
from PIL import Image
from torch import nn
from torch.nn import functional as F

import common
import lab2pix
from lab2pix import Config, GeneratorV1, GeneratorV2, UserError, configure

CPU = torch.device("cpu")
TINY = dict(size=(64, 64), width=4, ups=4, noise=8, d_width=2, vgg="random", vgg_width=2,
            batch_size=2, classes="streets")
TINY_V1 = TINY | dict(version="V1", ups=5, s_width=2, s_size=64)
LINE, LINE_V1 = LINES["lab2pix-full"], LINES["lab2pix-V1"]


def batch_of(cfg: Config, n: int = 2, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    h, w = cfg.size
    item = {"label": torch.randint(0, 12, (n, h // 16, w // 16)).repeat_interleave(16, 1)
            .repeat_interleave(16, 2), "image": torch.rand(n, 3, h, w) * 2 - 1}
    item["instance"] = item["label"]
    return lab2pix.make_pair(item, cfg)


def numbers(net: nn.Module) -> int:
    """Parameters, without batch norm's gain and bias, which the authors' networks do not have."""
    affine = sum(2 * m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    return sum(p.numel() for p in net.parameters()) - affine


# --------------------------------------------------------------------------- Sizes, as measured

@pytest.fixture
def no_spectral_norm(monkeypatch):
    """It adds no parameter, but takes seconds per network on the meta device."""
    monkeypatch.setattr(lab2pix, "spectral_norm", lambda module: module)


AT = {5: (256, 256), 6: (256, 512), 7: (512, 1024)}


@pytest.mark.parametrize("n, ups, first, dgnorm, count", [
    (36, 6, "label", True, 105_827_075), (36, 7, "label", True, 109_299_491),
    (151, 5, "label", True, 106_388_035), (184, 5, "label", True, 107_395_459),
    (13, 5, "label", True, 102_175_171), (36, 6, "noise", True, 109_721_347),
    (36, 7, "noise", True, 113_193_763), (151, 5, "noise", True, 113_449_539),
    (184, 5, "noise", True, 114_152_835), (36, 6, "label", False, 93_048_003),
    (36, 7, "label", False, 93_570_659), (151, 5, "label", False, 96_492_483),
    (184, 5, "label", False, 97_480_899), (13, 5, "label", False, 92_359_107),
    (36, 6, "noise", False, 96_942_275)])
def test_parameters_of_v2_and_spade(n, ups, first, dgnorm, count, no_spectral_norm):
    with torch.device("meta"):
        assert numbers(GeneratorV2(n, AT[ups], 64, ups, 128, first, dgnorm)) == count


@pytest.mark.parametrize("options, count", [
    (dict(n=35), 110_457_661), (dict(n=35, dgnorm=False), 95_319_357),
    (dict(n=35, dgnorm=False, form="v1code"), 101_035_532),
    # The released sketch generator has a layer for z besides, whose result it does not use.
    (dict(n=1, size=(256, 256), ups=5, sketch=True, dgnorm=False, form="v1code"),
     68_170_380 - 128 * 4096 - 4096)])
def test_parameters_of_v1(options, count, no_spectral_norm):
    with torch.device("meta"):
        assert numbers(GeneratorV1(**options)) == count


def test_parameters_of_the_discriminators(no_spectral_norm):
    with torch.device("meta"):
        for norm, c_in, counts in (("instance", 3, (27_942_019, 15_342_722, 2_743_425)),
                                   ("both", 39, (40_340_995, 23_026_690, 5_712_385))):
            both = lab2pix.Discriminators(c_in, 3, norm=norm)
            assert tuple(numbers(d) for d in both.scales) == counts
        assert numbers(lab2pix.Discriminators(39, 2, kind="patch")) == 5_601_410
        assert numbers(lab2pix.Discriminators(39, 3, kind="patch")) == 8_402_115


@pytest.mark.parametrize("part, arguments, counts", [
    (lab2pix.GenResBlk, [(1024, 1024, 36), (1024, 512, 36), (512, 256, 36), (256, 128, 36),
                         (128, 64, 36), (64, 32, 36)],
     [23_682_304, 13_631_360, 4_977_536, 2_076_032, 981_632, 523_520]),
    (lab2pix.GlobalEncoder, [(36, 64, 7, 7), (36, 64, 8, 8), (151, 64, 6, 6), (184, 64, 6, 6)],
     [12_779_072, 15_728_832, 9_895_552, 9_914_560])])
def test_parameters_of_the_parts_of_a_generator(part, arguments, counts, no_spectral_norm):
    with torch.device("meta"):
        assert [numbers(part(*some)) for some in arguments] == counts


@pytest.mark.parametrize("classes, count", [(35, 6_837_353), (2, 6_718_982), (1, 6_715_395)])
def test_parameters_of_the_segmentation_network(classes, count):
    """ICNet's; 386 per class are of the two outputs that enter no loss and are left out."""
    with torch.device("meta"):
        net = lab2pix.ICNet(classes)
    assert sum(p.numel() for p in net.parameters()) == count - 386 * classes


def test_what_each_norm_of_the_discriminator_cannot_see():
    """Instance norm is blind to brightness and contrast; spectral norm alone is not."""
    x = torch.rand(1, 3, 64, 64)
    for norm, blind in (("instance", True), ("both", True), ("spectral", False)):
        layer = nn.Sequential(*lab2pix.unit(3, 8, 3, 2, norm))
        layer[0].padding = (0, 0)                # zeros around the image would stay as dark
        assert torch.allclose(layer(x), layer(0.3 * x + 0.4), atol=0.02) == blind


def test_loud_weights_show_the_label_and_keep_z_weak():
    """Another label changes X more than another z does, also after an update; usually reversed."""
    m = F.one_hot(torch.randint(0, 12, (8, 8, 8)), 12).movedim(-1, 1).float()
    m = m.repeat_interleave(8, 2).repeat_interleave(8, 3)
    for loud in (False, True):
        wide = TINY_V1 | dict(width=8, noise=32)
        cfg = replace(configure("toy", version="V1", loud=loud), **wide)
        state = lab2pix.build(cfg, CPU)
        assert all((s.out.weight == 0).all() == loud for s in state.segmenter.scales)
        for step in range(2):
            z, G = torch.randn(8, cfg.noise), state.generator
            with torch.no_grad():
                of_z, of_label = G(z, m[:1].repeat(8, 1, 1, 1))[0], G(z[:1].repeat(8, 1), m)[0]
            ratio = (of_label.std(0).mean() / of_z.std(0).mean()).item()
            assert ratio > 2 if loud else ratio < 1, (loud, step, ratio)
            lab2pix.train_step(state, batch_of(cfg, seed=step), cfg)


def test_sizes_of_the_three_images_and_of_all_verdicts(no_spectral_norm):
    """Sec. 3.3 and 3.4 of the fact sheet, at 256 x 512, without computing anything."""
    with torch.device("meta"):
        m, z = torch.zeros(1, 35, 256, 512), torch.zeros(1, 128)
        images = GeneratorV1(35)(z, m)
        assert [tuple(x.shape[2:]) for x in images] == [(256, 512), (128, 256), (64, 128)]
        assert [x.shape for x in GeneratorV2(35)(z, m)] == [(1, 3, 256, 512)]
        vgg = [{f"pool{k}": torch.zeros(1, c, x.shape[2] >> k, x.shape[3] >> k)
                for k, c in ((3, 256), (4, 512), (5, 512))} for x in images]
        verdicts = lab2pix.Discriminators(3, norm="instance")(images, vgg)
        found = [[tuple(level.shape[1:]) for level in levels] for levels, _ in verdicts]
        assert found == [[(1, 32, 64), (1, 16, 32), (1, 8, 16)], [(1, 16, 32), (1, 8, 16)],
                         [(1, 8, 16)]]
        assert [len(features) for _, features in verdicts] == [8, 6, 4]
        patch = lab2pix.Discriminators(39, 2, kind="patch")
        wide = [torch.zeros(1, 39, 256, 512), torch.zeros(1, 39, 128, 256)]
        levels, features = patch(wide, [{}, {}])[0]
        sizes = [tuple(f.shape[2:]) for f in features + levels]
        assert sizes == [(129, 257), (65, 129), (33, 65), (34, 66), (35, 67)]
        assert lab2pix.ICNet(35)(torch.zeros(1, 3, 64, 128)).shape == (1, 35, 256, 256)
        sketch = GeneratorV1(1, (256, 256), ups=5, sketch=True)
        assert sketch.blocks[0].conv_0.weight.shape[1] == 1088           # 1024 and z's 64
        images = sketch(z, torch.zeros(1, 1, 256, 256))
        assert [x.shape[-1] for x in images] == [256, 128, 64]


@pytest.mark.parametrize("ups, sides", [
    (4, [4, 4, 4, 8, 16, 32, 64]), (5, [2, 4, 4, 8, 16, 32, 64]), (6, [1, 2, 4, 8, 16, 32, 64])])
def test_v2_blocks_run_at_the_sizes_of_the_release(ups, sides):
    """At 256 x 256, five doublings: 8, 16, 16, 32 ..: none before the second middle block."""
    G, seen = GeneratorV2(5, (64, 64), 2, ups, 4), []
    for block in G.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
    G(torch.randn(2, 4), torch.rand(2, 5, 64, 64))
    assert seen == sides


# ------------------------------------------------------------------------------------ Generator

def conv2d(x: np.ndarray, w: np.ndarray, b: np.ndarray | None, stride: int = 1) -> np.ndarray:
    """(C, H, W) by loops, padding that keeps the size."""
    k, (_, h, wide) = w.shape[2], x.shape
    p = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    out = np.zeros((len(w), -(-h // stride), -(-wide // stride)))
    for o in range(len(w)):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                window = p[:, i * stride: i * stride + k, j * stride: j * stride + k]
                out[o, i, j] = (window * w[o]).sum() + (0 if b is None else b[o])
    return out


def arrays(*values) -> list[np.ndarray]:
    return [v.detach().double().numpy() for v in values]


@pytest.mark.parametrize("form", ["paper", "eq5", "v1code"])
@pytest.mark.parametrize("with_h", [False, True])
def test_eq_3_to_5_dg_norm(form, with_h):
    """By loops: statistics over the batch and all pixels, sqrt(mean of squares - mu^2)."""
    torch.manual_seed(0)
    net = lab2pix.DGNorm(2, 3, hidden=4, form=form).double()
    if form != "v1code":
        nn.init.normal_(net.norm.weight)
        nn.init.normal_(net.norm.bias)
    e, m, h = torch.randn(2, 2, 4, 5), torch.randn(2, 3, 4, 5), torch.rand(2, 4, 4, 5)
    e, m, h = e.double(), m.double(), h.double() if with_h else None
    expected, (E, M) = np.zeros((2, 2, 4, 5)), arrays(e, m)
    w1, b1, w2, b2 = arrays(net.shared.weight, net.shared.bias, net.gamma_beta.weight,
                            net.gamma_beta.bias)
    for n in range(2):
        guide = np.maximum(conv2d(M[n], w1, b1), 0) + (h[n].numpy() if with_h else 0)
        both = conv2d(guide, w2, b2)
        for c in range(2):
            values = E[n, c] if form == "v1code" else E[:, c]
            mu = values.mean()
            sigma = np.sqrt((values ** 2).mean() - mu ** 2 + 1e-5)
            bn = (E[n, c] - mu) / sigma
            if form != "v1code":
                bn = net.norm.weight[c].item() * bn + net.norm.bias[c].item()
            gamma, beta = both[c], both[2 + c]
            expected[n, c] = {"paper": (1 + gamma) * bn + beta, "v1code": gamma * bn + beta,
                              "eq5": gamma * (bn + 1) + beta}[form]
    assert net(e, m, h).detach().numpy() == pytest.approx(expected, abs=1e-9)


def test_eq_5_dg_norm_tells_pixels_of_one_class_apart_only_with_h():
    """Fig. 4: with one class everywhere, gamma and beta are constant; H tells pixels apart."""
    net = lab2pix.DGNorm(2, 3, hidden=4)
    m = torch.zeros(1, 3, 8, 8)
    m[:, 1] = 1
    inside = (..., slice(2, 6), slice(2, 6))

    def spread(h) -> float:
        guide = F.relu(net.shared(m)) + (0 if h is None else h)
        return net.gamma_beta(guide)[inside].flatten(2).std(-1).max().item()

    assert spread(None) < 1e-6 < 1e-3 < spread(torch.rand(1, 4, 8, 8))


def test_eq_1_and_6_residual_block():
    """Out = shortcut(norm_s(d, M)) + main(d, M, H); H reaches the main branch alone."""
    torch.manual_seed(0)
    block = lab2pix.GenResBlk(4, 2, 3, hidden=4).eval()
    d, m, h = torch.randn(2, 4, 6, 6), torch.rand(2, 3, 6, 6), torch.rand(2, 4, 6, 6)
    main = block.conv_0(F.leaky_relu(block.norm_0(d, m, h), 0.2))
    main = block.conv_1(F.leaky_relu(block.norm_1(main, m, h), 0.2))
    torch.testing.assert_close(block(d, m, h), main + block.conv_s(block.norm_s(d, m)))
    block = lab2pix.GenResBlk(4, 4, 3, hidden=4)
    for name in ("conv_0", "conv_1"):           # spectral norm: the largest singular value is 1
        for _ in range(30):
            block(d, m)
        weight = getattr(block, name).weight.detach().flatten(1)
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, abs=0.02)
    nn.init.zeros_(block.conv_1.bias)
    block.conv_1.parametrizations.weight.original.data.mul_(0)
    assert torch.equal(block.eval()(d, m), d) or block(d, m).isnan().any()


@pytest.mark.parametrize("s", [1, 2, 3, 4, 5, 8, 16])
def test_eq_2_enlarged_convolution_is_exact(s):
    """conv(up(x)) and its gradients, from a ninth of the pixels."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 2, 3, 1, 1).double(), torch.randn(2, 3, 3, 4).double()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast = lab2pix.convolve_enlarged(a, conv, s)
    plain = conv(F.interpolate(b, scale_factor=float(s), mode="nearest"))
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)
    weight = torch.randn_like(plain)
    (fast * weight).sum().backward()
    (plain * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-11)


def test_eq_2_global_encoder():
    """One small map of the whole label, enlarged to the size of each block; after a ReLU."""
    net = lab2pix.GlobalEncoder(3, 4, 5, 5)
    m = torch.rand(1, 3, 64, 128)
    maps = net(m)
    assert [tuple(h.shape) for h in maps] == [(1, 8, 4 << j, 8 << j) for j in range(5)]
    assert all((h >= 0).all() and (h > 0).any() for h in maps)
    m.requires_grad_()
    net(m)[-1][0, :, 32, 64].sum().backward()
    reach = m.grad[0].abs().sum(0).nonzero()
    assert (reach.max(0).values - reach.min(0).values).min() > 40          # beyond a 3 x 3


def test_smooth_enlarges_all_features_bilinearly():
    """Ours. A step of one pixel in H or in a feature becomes a ramp; the weights stay the same."""
    ramp = lab2pix.up(torch.tensor([[[[0.0, 1.0]]]]), 2, "bilinear")
    assert ramp[0, 0].tolist() == [[0, 0.25, 0.75, 1]] * 2
    for build in (lambda s: GeneratorV1(5, (64, 64), 2, 5, 4, smooth=s),
                  lambda s: GeneratorV2(5, (64, 64), 2, 4, 4, smooth=s)):
        nets = [build(s).eval() for s in (False, True)]
        nets[1].load_state_dict(nets[0].state_dict())
        z, m = torch.randn(1, 4), torch.rand(1, 5, 64, 64)
        coarse, fine = (G.globe(m)[3][0] for G in nets)    # (4, h, w): cells of 8 x 8 pixels
        jumps = [(h[:, :, 1:] - h[:, :, :-1]).abs().max() for h in (coarse, fine)]
        assert 0 < jumps[1] < 0.3 * jumps[0]
        images = [G(z, m)[0] for G in nets]
        assert not torch.allclose(*images, atol=1e-3)


def test_eq_7_co_attention():
    """A_m of one channel, in (0, 1), mixes h' and f; by loops."""
    torch.manual_seed(0)
    net = lab2pix.LSCA(3, 2, 4).double()
    h, f, m = torch.randn(1, 3, 3, 3), torch.randn(1, 2, 6, 6), torch.rand(1, 4, 6, 6)
    h, f, m = h.double(), f.double(), m.double()
    H, Fk, M = arrays(h[0], f[0], m[0])
    H = conv2d(H.repeat(2, 1).repeat(2, 2), *arrays(net.merge.weight, net.merge.bias))
    A = conv2d(np.concatenate([H, Fk, M]), *arrays(net.mask.weight, net.mask.bias))
    A = 1 / (1 + np.exp(-A))
    assert A.shape[0] == 1
    assert net(h, f, m)[0].detach().numpy() == pytest.approx(H * A + Fk * (1 - A), abs=1e-9)


def test_labels_are_resized_by_nearest_sketches_by_average():
    ids = torch.randint(0, 5, (2, 8, 8))
    m = F.one_hot(ids, 5).movedim(-1, 1).float()
    assert torch.equal(lab2pix.resize_label(m, (4, 4)).argmax(1), ids[:, ::2, ::2])
    largest = lab2pix.resize_label(m, (4, 4), "v1code").argmax(1)
    assert torch.equal(largest, ids.unfold(1, 2, 2).unfold(2, 2, 2).amax((-1, -2)))
    sketch = torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(lab2pix.resize_label(sketch, (4, 4)), F.avg_pool2d(sketch, 2))


@pytest.mark.parametrize("make", [
    lambda: GeneratorV1(5, (64, 64), 2, 5, 4), lambda: GeneratorV2(5, (64, 64), 2, 4, 4),
    lambda: GeneratorV1(1, (64, 64), 2, 5, 4, sketch=True)])
def test_eq_17_and_21_images_depend_on_noise_and_label(make):
    torch.manual_seed(0)
    G = make().eval()
    n = G.blocks[0].norm_0.shared.in_channels
    m, z = torch.rand(1, n, 64, 64), torch.randn(1, 4)
    first = G(z, m)
    assert all((x.abs() <= 1).all() for x in first)
    for other in (G(torch.randn(1, 4), m), G(z, torch.rand(1, n, 64, 64))):
        assert all((a - b).abs().max() > 1e-6 for a, b in zip(first, other))


def test_first_feature_from_the_label_has_no_noise():
    G = GeneratorV2(5, (64, 64), 2, 4, 4, first="label").eval()
    m = torch.rand(1, 5, 64, 64)
    assert torch.equal(G(torch.randn(1, 4), m)[0], G(torch.randn(1, 4), m)[0])


def test_progressive_images_come_from_features_of_three_sizes():
    """X_1 does not know what later blocks do: their weights get no gradient from it."""
    G = GeneratorV1(5, (64, 64), 2, 5, 4)
    G(torch.randn(1, 4), torch.rand(1, 5, 64, 64))[2].sum().backward()
    touched = [any(p.grad is not None and p.grad.any() for p in block.parameters())
               for block in G.blocks]
    assert touched == [True, True, True, False, False]
    assert len(GeneratorV1(5, (64, 64), 2, 5, 4, pg=False, lsca=False).heads) == 1


# -------------------------------------------------------------------------------- Discriminators

def test_eq_8_and_23_levels_and_mini_inception():
    D = lab2pix.Discriminators(7, 3, 4, vgg_width=2)
    sizes = (128, 64, 32)
    vgg = [{f"pool{k}": torch.rand(1, c, s >> k, s >> k) for k, c in ((3, 8), (4, 16), (5, 16))}
           for s in sizes]
    verdicts = D([torch.rand(1, 7, s, s) for s in sizes], vgg)
    assert [len(levels) for levels, _ in verdicts] == [3, 2, 1]
    block, x = lab2pix.MiniInception(4), torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(block.eval()(x), block.pool(x) + block.three(x) + block.five(x))
    kernels = [[m.kernel_size[0] for m in branch if isinstance(m, nn.Conv2d)]
               for branch in (block.pool, block.three, block.five)]
    assert kernels == [[1], [1, 3], [1, 3, 3]]


def test_the_perceptual_branch_matters_at_every_level_and_its_gradient_reaches_the_image():
    cfg = replace(configure("toy"), **TINY)
    state = lab2pix.build(cfg, CPU)
    D = state.discriminator.scales[0].eval()
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    m = torch.zeros(1, 13, 64, 64)
    levels, _ = D(torch.cat([m, x.detach()], 1), lab2pix.perceive(state.vgg16, [x])[0])
    for level in levels:
        gradient, = torch.autograd.grad(level.sum(), x, retain_graph=True)
        assert gradient.abs().max() > 0          # through the VGG alone: D saw x detached
    assert not any(p.requires_grad for p in state.vgg16.parameters())


# ------------------------------------------------------------------------------------- Losses

def verdicts(seed: int, n: int = 2) -> list:
    """Verdicts of three discriminators with 3, 2, 1 levels, and features."""
    g = torch.Generator().manual_seed(seed)

    def some(*shape):
        return 2 * torch.randn(shape, generator=g, dtype=torch.float64)

    return [[[some(n, 1, 8 >> (k + l), 8 >> (k + l)) for l in range(3 - k)],
             [some(n, 3, 4, 4) for _ in range(8 - 2 * k)]] for k in range(3)]


def weighted(v: list, q, mask: np.ndarray | None = None) -> float:
    """Eq. (10) by loops: level weights 1, 1/2, 1/4 over their sum, discriminators added."""
    total = 0.0
    for levels, _ in v:
        sums, weights = 0.0, 0.0
        for l, d in enumerate(levels):
            values, lam = q(d.numpy()), 1 / 2 ** l
            if mask is not None:
                k = mask.shape[-1] // values.shape[-1]
                w = np.zeros_like(values)
                for n in range(len(values)):
                    for i in range(values.shape[2]):
                        for j in range(values.shape[3]):
                            w[n, 0, i, j] = mask[n, 0, i * k:(i + 1) * k, j * k:(j + 1) * k].mean()
                values = values * w
            sums, weights = sums + lam * values.mean(), weights + lam
        total += sums / weights
    return total


def sigmoid(d):
    return 1 / (1 + np.exp(-d))


TERMS = {("vanilla", "g"): lambda d: -np.log(sigmoid(d)), ("hinge", "g"): lambda d: -d,
         ("vanilla", "fake"): lambda d: -np.log(1 - sigmoid(d)),
         ("hinge", "fake"): lambda d: np.maximum(0, 1 + d),
         ("vanilla", "real"): lambda d: -np.log(sigmoid(d)),
         ("hinge", "real"): lambda d: np.maximum(0, 1 - d)}


@pytest.mark.parametrize("gan", ["vanilla", "hinge"])
@pytest.mark.parametrize("masked", [False, True])
def test_eq_10_to_16_adversarial_losses(gan, masked):
    v = verdicts(1)
    mask = torch.rand(2, 1, 64, 64, dtype=torch.float64) if masked else None
    w = None if mask is None else mask.numpy()
    g, fake, real = (f(v, gan, mask).item() for f in (
        lab2pix.generator_loss, lab2pix.fake_loss, lab2pix.real_loss))
    assert g == pytest.approx(weighted(v, TERMS[gan, "g"], w), rel=1e-9)
    assert fake == pytest.approx(weighted(v, TERMS[gan, "fake"], w), rel=1e-9)
    assert real == pytest.approx(weighted(v, TERMS[gan, "real"], w), rel=1e-9)
    assert lab2pix.discriminator_loss(real, fake) == pytest.approx((real + fake) / 2)
    assert lab2pix.sharpness_loss(real, fake) == pytest.approx((real + fake) / 2)


def test_eq_10_vanilla_does_not_overflow_and_teaches_while_d_wins():
    d = torch.full((1, 1, 2, 2), -200.0, requires_grad=True)
    loss = lab2pix.generator_loss([[[d], []]], "vanilla")
    loss.backward()
    assert loss.isfinite() and d.grad.sum().item() == pytest.approx(-1)


@pytest.mark.parametrize("T, value", [(2.0, 0.842105), (5.0, 0.571429)])
def test_eq_9_foreground_mask(T, value):
    """A = 3 pixels of foreground, B = 13 of background; the mean is 1."""
    label = torch.full((1, 4, 4), common.CLASS_ID["road"])
    label[0, 0, :3] = common.CLASS_ID["car"]
    mask = lab2pix.foreground_mask(label, "streets", T)
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0, 3].numpy() == pytest.approx(value, abs=1e-6)
    assert mask[0, 0, 0, :3].numpy() == pytest.approx(T * value, abs=1e-5)
    assert mask.mean().item() == pytest.approx(1, abs=1e-6)


def test_eq_9_mean_is_1_for_every_image_and_at_every_level():
    label = torch.randint(0, 12, (3, 64, 64))
    label[1], label[2] = common.CLASS_ID["car"], common.CLASS_ID["sky"]       # B = 0, A = 0
    mask = lab2pix.foreground_mask(label, "streets", 5.0)
    assert mask.mean((1, 2, 3)).numpy() == pytest.approx(1, abs=1e-5)
    assert mask[1].numpy() == pytest.approx(1) and mask[2].numpy() == pytest.approx(1)
    for side in (32, 8, 4):
        ones = torch.ones(3, 1, side, side)
        assert lab2pix.expectation(ones, mask).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("classes, front, back", [
    ("cityscapes", "pole traffic_sign person car terrain", "sky road building vegetation"),
    ("ade20k", "chair car animal", "wall sky floor ceiling sea"),
    ("coco_stuff", "person car dog", "sky-other road sea wall-brick floor-wood"),
    ("streets", "pole person car truck", "sky building road"),
    ("camvid", "car pedestrian pole", "sky road building")])
def test_foreground_by_name(classes, front, back):
    names = common.class_table(classes).names
    chosen = {names[k] for k in lab2pix.foreground_classes(classes)}
    assert {n.replace("_", " ") for n in front.split()} <= chosen
    assert not {n.replace("_", " ") for n in back.split()} & chosen


def test_foreground_unknown_pixels_are_background():
    label = torch.tensor([[[11, 8], [11, 11]]])               # CamVid: unknown, car
    mask = lab2pix.foreground_mask(label, "camvid", 2.0)
    assert mask[0, 0, 0, 1] == 2 * mask[0, 0, 0, 0]


def test_eq_16_blur_halves_and_doubles():
    y = torch.rand(1, 3, 6, 8)
    blurred = lab2pix.blur(y)
    for i in range(6):
        for j in range(8):
            a, b = i // 2 * 2, j // 2 * 2
            torch.testing.assert_close(blurred[..., i, j], y[..., a:a + 2, b:b + 2].mean((2, 3)))


def features(layers, seed: int) -> list[dict]:
    g = torch.Generator().manual_seed(seed)
    return [{k: torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64) for k in layers}
            for _ in range(2)]


def test_eq_18_consistency_is_a_norm_per_image():
    layers = ("conv1_2", "conv2_2", "conv3_2", "conv4_2", "conv5_2")
    a, b = features(layers, 0), features(layers, 1)
    expected = sum(np.mean([np.sqrt(((x[k][n] - y[k][n]).numpy() ** 2).sum()) for n in range(2)])
                   for x, y in zip(a, b) for k in layers)
    assert lab2pix.consistency_loss(a, b).item() == pytest.approx(expected, rel=1e-12)


def test_eq_19_cycle_segmentation():
    """Cross-entropy by loops: nearest enlargement, mean over pixels, sum over the three S_i."""
    torch.manual_seed(0)
    label = torch.randint(0, 3, (2, 8, 8))
    logits = [torch.randn(2, 3, s, s, dtype=torch.float64) for s in (8, 4, 2)]
    total = 0.0
    for s in logits:
        k, values = 8 // s.shape[-1], []
        for n in range(2):
            for i in range(8):
                for j in range(8):
                    e = np.exp(s[n, :, i // k, j // k].numpy())
                    values.append(-np.log(e[label[n, i, j]] / e.sum()))
        total += np.mean(values)
    assert lab2pix.cycle_segmentation_loss(logits, label).item() == pytest.approx(total, rel=1e-9)


def test_eq_28_perceptual_loss():
    layers = dict(relu1_1=1 / 32, relu2_1=1 / 16, relu3_1=1 / 8, relu4_1=1 / 4, relu5_1=1)
    a, b = features(layers, 2), features(layers, 3)
    expected = sum(w * np.abs((x[k] - y[k]).numpy()).mean() for x, y in zip(a, b)
                   for k, w in layers.items())
    assert lab2pix.perceptual_loss(a, b).item() == pytest.approx(expected, rel=1e-12)


def test_eq_29_feature_matching():
    a, b = verdicts(4), verdicts(5)
    terms = [[np.abs((x - y).numpy()).mean() for x, y in zip(f, g)]
             for (_, f), (_, g) in zip(a, b)]
    assert lab2pix.feature_matching_loss(a, b).item() == pytest.approx(
        sum(np.mean(t) for t in terms), rel=1e-12)
    assert lab2pix.feature_matching_loss(a, b, released=True).item() == pytest.approx(
        np.mean([sum(t) for t in terms]), rel=1e-12)


def test_pyramids():
    """V1 averages 2 x 2; V2 3 x 3 with stride 2, the border's missing pixels not counted."""
    x = torch.rand(1, 2, 8, 8)
    one, two = (lab2pix.pyramid(x, 3, configure(version=v)) for v in ("V1", "V2"))
    assert [p.shape[-1] for p in one] == [p.shape[-1] for p in two] == [8, 4, 2]
    torch.testing.assert_close(one[1][..., 1, 1], x[..., 2:4, 2:4].mean((2, 3)))
    torch.testing.assert_close(two[1][..., 0, 0], x[..., :2, :2].mean((2, 3)))
    torch.testing.assert_close(two[1][..., 1, 2], x[..., 1:4, 3:6].mean((2, 3)))
    torch.testing.assert_close(two[2], lab2pix.pyramid(two[1], 2, Config())[1])


# ------------------------------------------------------------------------------------ Training

def level_sum(judged, loss, mask=None):
    """Eq. (10): levels weigh 1, 1/2, 1/4 over their sum; discriminators are added."""
    total = 0
    for levels, _ in judged:
        lam = [1, 0.5, 0.25][:len(levels)]
        for k, q in zip(lam, levels):
            value = loss(q) if mask is None else loss(q) * F.avg_pool2d(
                mask, mask.shape[-1] // q.shape[-1])
            total = total + k * value.mean() / sum(lam)
    return total


def same_gradients(parameters, grads) -> None:
    scale = max(g.abs().max().item() for g in grads)                  # biases before a norm: 0
    for p, g in zip(parameters, grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-2, atol=1e-4 * scale)


def first_adam_step(before: dict, net: nn.Module, lr: float) -> None:
    """From nothing, Adam moves a weight by lr g / (|g| + 1e-8): by its gradient, at that rate."""
    for name, p in net.named_parameters():
        expected = before[name] - lr * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-3 * lr)


@pytest.mark.parametrize("d_norm", ["instance", "spectral"])
def test_eq_15_and_20_step_v1_is_the_textbook_step(d_norm):
    """D twice on the same images, once detached, each player's own backward pass."""
    cfg = replace(configure(version="V1"), **TINY_V1, lambda_3=1e-3, lambda_2=0.5, gain=1.0,
                  d_norm=d_norm)
    batch = batch_of(cfg)
    state, other = (lab2pix.build(cfg, CPU) for _ in "12")
    torch.manual_seed(5)
    losses = lab2pix.train_step(state, batch, cfg)
    torch.manual_seed(5)
    G, D, S, vgg = other.generator, other.discriminator, other.segmenter, other.vgg16
    m, y, w = batch["input"], batch["image"], batch["mask"]
    x = G(torch.randn(len(m), cfg.noise), m)
    ys = [y, F.avg_pool2d(y, 2), F.avg_pool2d(y, 4)]

    def judge(images):
        return D(images, [vgg(i) for i in images])

    def real_term(q):
        return -F.logsigmoid(q)

    def fake_term(q):
        return -F.logsigmoid(-q)

    con = 0
    for fine, coarse in ((x[1], x[2]), (x[0], x[1])):
        a, b = vgg(F.avg_pool2d(fine, 2)), vgg(coarse)
        con = con + sum((a[k] - b[k]).square().flatten(1).sum(1).sqrt().mean()
                        for k in lab2pix.CONSISTENCY_LAYERS)
    seg = sum(F.cross_entropy(F.interpolate(s, cfg.size), batch["label"]) for s in S(x))
    grads = torch.autograd.grad(level_sum(judge(x), real_term, w) + 1e-3 * con + 10 * seg,
                                [*G.parameters(), *S.parameters()])
    D.eval()                                    # spectral norm: this pass must not step its vectors
    fake = level_sum(judge([each.detach() for each in x]), fake_term, w)
    D.train()                                   # the photos' pass does, once
    real = level_sum(judge(ys), real_term)
    D.eval()
    blurred = level_sum(judge([F.interpolate(F.avg_pool2d(each, 2), scale_factor=2.0)
                               for each in ys]), fake_term)
    for name, value in (("g_con", con), ("g_seg", seg), ("d_real", real), ("d_fake", fake),
                        ("d_blur", blurred)):
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-4), name
    same_gradients([*state.generator.parameters(), *state.segmenter.parameters()], grads)
    loss_d = (real + fake) / 2 + 0.5 * (real + blurred) / 2
    same_gradients(state.discriminator.parameters(), torch.autograd.grad(loss_d, [*D.parameters()]))
    for name in lab2pix.NETWORKS:
        before = dict(getattr(lab2pix.build(cfg, CPU), name).named_parameters())
        first_adam_step(before, getattr(state, name), cfg.lr)


def textbook_v2(cfg: Config) -> None:
    """step_v2 against separate passes over real, generated and blurred photos."""
    batch = batch_of(cfg)
    state, other = (lab2pix.build(cfg, CPU) for _ in "12")
    torch.manual_seed(5)
    losses = lab2pix.train_step(state, batch, cfg)
    torch.manual_seed(5)
    G, D = other.generator, other.discriminator
    m, y, w = batch["input"], batch["image"], batch["mask"]
    z = torch.randn(len(m), cfg.noise)

    def half(t):
        return F.avg_pool2d(t, 3, 2, 1, count_include_pad=False)

    def judge(image, small):
        pair = [torch.cat([m, image], 1), torch.cat([half(m), small], 1)]
        return D(pair, [other.vgg16(i) for i in (image, small)])

    x = G(z, m)[0]
    adv, features = level_sum(fake := judge(x, half(x)), lambda q: -q, w), 0
    weights = (1, 1 / 4, 1 / 8, 1 / 16, 1 / 32)                           # reversed: a random VGG
    vgg = sum(weight * (other.vgg19(a)[k] - other.vgg19(b)[k]).abs().mean()
              for a, b in ((x, y), (half(x), half(y))) for k, weight in
              zip(("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"), weights)
              if cfg.lambda_5)
    if cfg.lambda_6:
        features = sum(sum((a - b.detach()).abs().mean() for a, b in zip(f, g)) / len(f)
                       for (_, f), (_, g) in zip(fake, judge(y, half(y))))
        assert losses["g_fm"].item() == pytest.approx(features.item(), rel=1e-4)
    grads = torch.autograd.grad(adv + cfg.lambda_5 * vgg + cfg.lambda_6 * features,
                                [*G.parameters()])
    assert losses["g_adv"].item() == pytest.approx(adv.item(), rel=1e-4)
    same_gradients(state.generator.parameters(), grads)
    for p, ours in zip(G.parameters(), state.generator.parameters()):
        p.data = ours.data                                                # the updated G
    with torch.no_grad():
        x = G(z, m)[0]
    real = level_sum(judge(y, half(y)), lambda q: F.relu(1 - q), w)       # one step of D's vectors
    D.eval()
    fake = level_sum(judge(x, half(x)), lambda q: F.relu(1 + q), w)
    soft = [F.interpolate(F.avg_pool2d(t, 2), scale_factor=2.0) for t in (y, half(y))]
    blurred = level_sum(judge(*soft), lambda q: F.relu(1 + q), w)
    for name, value in (("d_real", real), ("d_fake", fake), ("d_blur", blurred)):
        assert name not in losses or losses[name].item() == pytest.approx(value.item(), rel=1e-4)
    loss = (real + fake) / 2 + cfg.lambda_2 * (real + blurred) / 2
    same_gradients(state.discriminator.parameters(), torch.autograd.grad(loss, [*D.parameters()]))
    fresh = lab2pix.build(cfg, CPU)
    for name in lab2pix.NETWORKS[:2]:
        first_adam_step(dict(getattr(fresh, name).named_parameters()), getattr(state, name), cfg.lr)


@pytest.mark.parametrize("d_norm", ["both", "spectral"])
def test_eq_31_step_v2_is_the_textbook_step(d_norm):
    """Also with toy's spectral norm alone, whose vectors move as D judges."""
    textbook_v2(replace(configure("toy"), **TINY, d_norm=d_norm))


def test_eq_32_each_player_minimises_its_own_part():
    """Without lambdas L_v2 is Eq. (32): G's gradient is Eq. (24)'s, D's is Eq. (25)'s."""
    textbook_v2(replace(configure("toy"), **TINY, lambda_2=0.0, lambda_5=0.0, lambda_6=0.0))


def test_eq_22_and_24_to_27_and_30_are_of_images_with_their_labels():
    """What D is given in step_v2, and the losses by loops from what D made of it."""
    cfg = replace(configure("toy"), **TINY)
    state, batch, calls = lab2pix.build(cfg, CPU), batch_of(cfg), []
    state.discriminator.register_forward_hook(lambda net, args, out: calls.append(
        ([x.detach() for x in args[0]], [[[t.detach() for t in kind] for kind in d] for d in out])))
    losses = lab2pix.train_step(state, batch, cfg)
    m, w = batch["input"], batch["mask"].double().numpy()
    half = F.avg_pool2d(m, 3, 2, 1, count_include_pad=False)
    assert len(calls) == 5                       # G: fake, real; D: real, fake, blurred
    for (x, small), _ in calls:                                           # Eq. (22)
        assert torch.equal(x[:, :-3], m) and torch.equal(small[:, :-3], half)
    assert torch.equal(calls[2][0][0][:, -3:], batch["image"])
    assert torch.equal(calls[1][0][0], calls[2][0][0])
    assert not torch.equal(calls[0][0][0], calls[3][0][0])                # by the updated G
    # Eq. (24), (27), (26), (30)
    for name, k, term in (("g_adv", 0, "g"), ("d_real", 2, "real"), ("d_fake", 3, "fake"),
                          ("d_blur", 4, "fake")):
        expected = weighted(calls[k][1], TERMS["hinge", term], w)
        assert losses[name].item() == pytest.approx(expected, rel=1e-5), name
    assert lab2pix.discriminator_loss(losses["d_real"], losses["d_fake"]) == (    # Eq. (25)
        losses["d_real"] + losses["d_fake"]) / 2


@pytest.mark.parametrize("row", list(lab2pix.ABLATIONS))
def test_table_1_and_2_every_row_is_built_and_steps(row):
    v1 = row.endswith("u")
    cfg = replace(configure("toy", ablation=row), **TINY_V1 if v1 else TINY)
    place = row[0]
    state = lab2pix.build(cfg, CPU)
    G, D = state.generator, state.discriminator.scales
    assert (G.globe is not None) == (row in ("H_u", "E_s"))
    hpd = place >= "E" if v1 else place >= "B"
    assert isinstance(D[0], lab2pix.PerceptualDiscriminator) == hpd
    assert cfg.T == ((2 if place >= "F" else 1) if v1 else (5 if place >= "C" else 1))
    assert cfg.lambda_2 == float(place >= "G" if v1 else place >= "D")
    if v1:
        assert (len(G.heads), len(G.lsca), len(state.segmenter.scales)) == (
            3 if place >= "B" else 1, 3 if place >= "C" else 0, 3 if place >= "B" else 1)
        assert cfg.lambda_3 == (5e-6 if place >= "D" else 0)
        assert len(D) == (2 if row == "A_u" else 3)
        paper = configure(ablation=row)
        assert paper.lambda_4 == 10 and paper.gan == "vanilla"
    else:
        assert len(D) == 2 and cfg.gan == "hinge" and cfg.lambda_5 == cfg.lambda_6 == 10
    losses = lab2pix.train_step(state, batch_of(cfg), cfg)
    assert all(v.isfinite() for v in losses.values())
    assert ("d_blur" in losses) == (cfg.lambda_2 > 0) and ("g_con" in losses) == (cfg.lambda_3 > 0)


def test_last_rows_of_the_tables_are_the_versions():
    for row, version in (("H_u", "V1"), ("E_s", "V2")):
        assert replace(configure(ablation=row), ablation="") == configure(version=version)


def test_versions_are_the_papers():
    """Sec. 5.2, line by line."""
    v1, v2, hd = (configure(version=v) for v in ("V1", "V2", "V2-H"))
    assert (v1.size, v1.batch_size, v1.epochs, v1.T) == ((256, 512), 1, 100, 2)
    assert v1.betas == (0.5, 0.999)
    assert (v1.ramp, v1.lambda_3, v1.lambda_4, v1.gan, v1.scales) == (True, 5e-6, 10, "vanilla", 3)
    assert (v2.size, v2.batch_size, v2.epochs, v2.betas, v2.T) == ((256, 512), 20, 200, (0, .9), 5)
    assert (v2.lambda_2, v2.lambda_5, v2.lambda_6, v2.gan, v2.scales) == (1, 10, 10, "hinge", 2)
    assert (hd.size, hd.batch_size, hd.epochs, hd.scales, hd.ups) == ((512, 1024), 8, 200, 3, 7)
    assert v2 == Config()
    shoes = configure("V1-edges2shoes")
    assert (shoes.batch_size, shoes.epochs, shoes.decay, shoes.ramp, shoes.T) == (4, 10, False,
                                                                                  False, 1)
    for name in ("V2-coco", "V2-ade20k"):
        cfg = configure(name)
        assert (cfg.size, cfg.batch_size, cfg.epochs, cfg.ups) == ((256, 256), 40, 100, 5)
    theirs = [p for p in lab2pix.PRESETS if not p.startswith(("toy", "streets"))]
    assert all(configure(p).lr == 2e-4 for p in theirs)
    for name in lab2pix.PRESETS:
        lab2pix.check_size(configure(name))


def test_learning_rates_and_ramp():
    cfg = Config(epochs=100)
    rates = [lab2pix.learning_rates(cfg, e)[0] / 2e-4 for e in range(100)]
    assert rates[:51] == [1] * 51 and np.diff(rates[50:]) == pytest.approx(-1 / 50)
    assert rates[-1] == pytest.approx(1 / 50)                             # not yet 0
    assert lab2pix.learning_rates(Config(ttur=True), 0) == pytest.approx((1e-4, 4e-4))
    assert set(lab2pix.learning_rates(Config(decay=False), 199)) == {2e-4}
    ramp = configure(version="V1")
    assert [lab2pix.lambda_2(ramp, e) for e in (0, 99)] == [0, 1]
    assert lab2pix.lambda_2(Config(), 0) == 1


def test_one_batch_can_be_overfitted():
    """V2: in 12 steps on two photos the perceptual loss falls by a third."""
    cfg = replace(configure("toy"), **TINY | dict(lr=4e-3, gain=1.0), d_norm="both")
    data = common.Dataset("", "train", cfg.size, limit=2)
    batch = lab2pix.make_pair(torch.utils.data.default_collate([data[0], data[1]]), cfg)
    state = lab2pix.build(cfg, CPU)
    torch.manual_seed(0)
    seen = [lab2pix.train_step(state, batch, cfg)["g_vgg"].item() for _ in range(12)]
    assert np.mean(seen[-3:]) < 0.67 * seen[0], seen


def test_initialisation():
    """N(0, 0.02) in V1, Xavier with gain 0.02 in V2; under spectral norm as well."""
    for cfg, deviation in ((configure(version="V1", width=8, d_width=8, classes="streets"), 0.02),
                           (configure(width=8, d_width=8, classes="streets"), None)):
        G = lab2pix.networks(cfg)[0]
        weight = G.blocks[0].conv_0.parametrizations.weight.original
        expected = deviation or 0.02 * math.sqrt(2 / (9 * (weight.shape[0] + weight.shape[1])))
        assert weight.std().item() == pytest.approx(expected, rel=0.02)
        assert not G.blocks[0].conv_0.bias.any() and (G.blocks[0].norm_0.norm.weight == 1).all()


# ------------------------------------------------------------------------------- Unpaired data

def unpaired(**options) -> lab2pix.Unpaired:
    return lab2pix.Unpaired(**dict(split="train", size=(32, 32), instances=False) | options)


def test_no_photo_is_ever_served_with_its_own_label():
    """For every epoch: the photos are a permutation without fixed points."""
    source, data = common.Dataset("", "train", (32, 32), limit=7), unpaired(limit=7)
    own, orders = [source[i] for i in range(7)], set()
    for epoch in range(12):
        data.epoch = epoch
        order = [data.partner(i, epoch) for i in range(7)]
        orders.add(tuple(order))
        assert sorted(order) == list(range(7)) and all(k != i for i, k in enumerate(order))
        for i in (0, 3):
            item = data[i]
            assert torch.equal(data[epoch, i]["image"], item["image"])
            assert torch.equal(item["label"], own[i]["label"])
            assert torch.equal(item["image"], own[order[i]]["image"])
            assert not torch.equal(item["image"], own[i]["image"])
    assert len(orders) > 8                                 # another cycle in each epoch


def test_two_examples_are_the_least_that_can_be_unpaired():
    with pytest.raises(UserError, match="two"):
        unpaired(limit=1)


def test_labels_and_photos_of_a_paired_layout_are_shuffled_apart():
    """From label and photo folders: the label side does not even know where the photos are."""
    for split in ("train", "test"):
        for i in range(3):
            label_map(Path(f"data/{split}_label/{i}.png"), 130, 140)
            picture(Path(f"data/{split}_img/{i}.png"), 130, 140, i)
    data = unpaired(data="data", unpaired=True)
    assert [set(files) for files in data.labels.files] == [{"label"}] * 3
    assert [set(files) for files in data.photos.files] == [{"image"}] * 3
    works("lab2pix", f"{LINE_V1} --data data --limit 0 --batch-size 1 --steps 1 --out r")
    works("lab2pix", "sample --out r --output o")
    assert len(list(Path("o").iterdir())) == 3


def test_training_and_sampling_on_two_lists():
    """V1 from sketches: trainA and trainB have neither names nor sizes nor numbers in common."""
    for i in range(3):
        picture(f"data/trainA/sketch{i}.png", 140, 150, i)
        picture(f"data/testA/drawing{i}.png", 130, 60, i)
        picture(f"data/trainB/photo{i % 2}.png", 128, 200, i % 2)
    picture("data/testB/photo9.png", 99, 99)
    line = f"{LINE_V1} --data data --limit 0 --steps 2 --out r"
    fails("lab2pix", line, "--task")
    works("lab2pix", f"{line} --task sketch")
    picture("drawing.jpg", 41, 29)
    works("lab2pix", "sample --out r --input drawing.jpg --output o.png")
    assert size_of("o.png") == (29, 41)
    text = works("lab2pix", "evaluate --out r")
    metrics = json.loads(Path("r/metrics.json").read_text())
    assert metrics["images"] == 3 and metrics["VGG distance"] > 0 and "PSNR" not in metrics
    assert "Table 4" in text


def test_sketches_made_from_photos_are_edges():
    image = -torch.ones(1, 3, 32, 32)
    image[..., 16:] = 1
    sketch = lab2pix.sketch_of(image)
    assert sketch.shape == (1, 1, 32, 32) and set(sketch.unique().tolist()) == {-1, 1}
    columns = (sketch[0, 0] < 0).any(0).nonzero().flatten().tolist()
    assert columns and set(columns) <= set(range(13, 19))
    pair = lab2pix.make_pair({"image": image}, configure("toy-V1", task="edges"))
    assert torch.equal(pair["label"][:, None] == 1, sketch < 0)


# -------------------------------------------------------------------------- Sampling, evaluation

@pytest.mark.parametrize("h, w", [(64, 64), (50, 70), (16, 100), (65, 128)])
def test_translate_gives_the_size_of_its_input(h, w):
    G = GeneratorV2(5, (64, 64), 2, 4, 4).eval()
    m, z = torch.rand(2, 5, h, w), torch.randn(2, 4)
    x = lab2pix.translate(G, z, m)
    assert x.shape == (2, 3, h, w)
    rows, columns = (np.pad(np.arange(n), (0, max(-n % 16, 32 - n)), "reflect") for n in (h, w))
    padded = m[..., torch.from_numpy(rows), :][..., torch.from_numpy(columns)]
    torch.testing.assert_close(x, G(z, padded)[0][..., :h, :w])
    torch.testing.assert_close(x[1:], lab2pix.translate(G, z[1:], m[1:]))


def test_batch_norm_at_test_time():
    """V2: averages of training. V1: the image's own statistics, as in training on one image."""
    for version, tiny in (("V1", TINY_V1), ("V2", TINY)):
        cfg = replace(configure("toy", version=version), **tiny)
        assert configure(version=version).test_norm == {"V1": "image", "V2": "running"}[version]
        state, batch = lab2pix.build(cfg, CPU), batch_of(cfg)
        lab2pix.train_step(state, batch, cfg)
        one, z = batch["input"][:1], torch.randn(1, cfg.noise)
        for norm in ("image", "running"):
            G = lab2pix.test_time(state, replace(cfg, test_norm=norm))
            x = lab2pix.translate(G, z, one)
            source = copy.deepcopy(state.generator)
            for module in source.modules():      # spectral norm's vectors stay
                module.training = norm == "image" and isinstance(module, nn.BatchNorm2d)
            torch.testing.assert_close(x, source(z, one)[0].detach(), rtol=1e-4, atol=1e-5)
        assert state.generator.training and all(
            v.isfinite().all() for v in state.generator.state_dict().values())


def test_table_3_psnr_and_ssim():
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 16, 18).double() * 2 - 1, torch.rand(2, 3, 16, 18).double() * 2 - 1
    a, b = ((t.numpy() + 1) / 2 for t in (x, y))
    expected = [10 * np.log10(1 / ((a[n] - b[n]) ** 2).mean()) for n in range(2)]
    assert lab2pix.psnr(x, y).numpy() == pytest.approx(expected, rel=1e-9)
    line = np.exp(-(np.arange(11) - 5) ** 2 / 4.5)
    window = np.outer(line, line) / line.sum() ** 2
    scores = []
    for c in range(3):
        for i in range(6):
            for j in range(8):
                p, q = (t[0, c, i:i + 11, j:j + 11] for t in (a, b))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * p * p).sum() - mp ** 2, (window * q * q).sum() - mq ** 2
                cov = (window * p * q).sum() - mp * mq
                scores.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
                              / ((mp ** 2 + mq ** 2 + 1e-4) * (vp + vq + 9e-4)))
    assert lab2pix.ssim(x, y)[0].item() == pytest.approx(np.mean(scores), rel=1e-5)
    assert lab2pix.ssim(x, x)[0].item() == pytest.approx(1)


def test_frechet_distance():
    """Against the formula with a matrix root, and 0 of a set with itself."""
    g = np.random.default_rng(0)
    p, q = g.standard_normal((40, 5)), 2 * g.standard_normal((30, 5)) + 1
    cp, cq = np.cov(p.T), np.cov(q.T)
    root = np.sqrt(np.linalg.eigvals(cp @ cq).real).sum()
    expected = ((p.mean(0) - q.mean(0)) ** 2).sum() + np.trace(cp + cq) - 2 * root
    assert lab2pix.frechet_distance(torch.tensor(p), torch.tensor(q)) == pytest.approx(expected)
    assert lab2pix.frechet_distance(torch.tensor(p), torch.tensor(p)) == pytest.approx(0, abs=1e-9)


# --------------------------------------------------------------------------- Runs, by command line

@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shared") / "run"
    works("lab2pix", f"{LINE} --steps 3 --out {out}")
    return out


def test_truncation_is_the_deviation_of_z(run):
    label_map("a.png")
    line = f"sample --out {run} --input a.png --instances a.png --output"
    for k, more in enumerate(("", "--truncation 0", "--truncation 0 --seed 7", "--seed 7")):
        works("lab2pix", f"{line} {k}.png {more}")
    a, b, c, d = (Path(f"{k}.png").read_bytes() for k in range(4))
    assert b == c and len({a, b, d}) == 3
    z = torch.cat([lab2pix.draw(Config(truncation=0.5, noise=4000), 1, CPU)])
    assert z.std().item() == pytest.approx(0.5, rel=0.05)


def test_evaluate_writes_the_papers_metrics(run):
    text = works("lab2pix", f"evaluate --out {run} {SCORER} --limit 3")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["images"] == 3 and metrics["PSNR"] > 0 and -1 <= metrics["SSIM"] <= 1
    assert metrics["VGG distance"] > 0 and "FID (torchvision)" not in metrics
    for row in ("output", "truth"):
        assert set(metrics[row]) == {"per-pixel acc", "per-class acc", "class IOU"}
    assert len(metrics["worst classes"]) == 5
    text = " ".join(text.split())
    assert "0.936 0.738 0.646 45.500" in text and "Table 5, SPADE" in text
    fails("lab2pix", f"evaluate --out {run} {SCORER} --inception {run / 'checkpoint.pt'}",
          "Inception")


@pytest.mark.parametrize("flags, words", [
    ("--size 60 40", ["60 40", "64"]), ("--gain -1", ["--gain -1"]), ("--ups 3", ["--ups 3", "4"]),
    ("--T 0.5", ["--T 0.5"]), ("--scales 4", ["4", "3"]), ("--s-size 65", ["65", "32"]),
    ("--task edges", ["--task edges", "V1"]), ("--pg", ["--pg"]), ("--lsca", ["--lsca"]),
    ("--lambda-4 10", ["--lambda-4", "V1"]), ("--discriminator patch", ["--T"]),
    ("--discriminator none", ["none"]), ("--ablation X_u", ["X_u", "A_u"]),
    ("--ablation H_u --version V2", ["--ablation H_u", "V1", "V2"]), ("--version V3", ["V3"]),
    ("--version V1 --ups 5 --lambda-5 10", ["--lambda-5", "V1"]),
    ("--version V1 --ups 5 --edges", ["--edges"]), ("--loud", ["--loud", "V1"]),
    ("--version V1 --ups 5 --first label", ["label"]),
    ("--version V1 --ups 5 --task edges --T 2", ["--T 2"]),
    ("--version V1 --ups 7 --size 128 128 --batch-size 1", ["one pixel"]),
    ("--form v1code", ["v1code"]), ("--batch-size 6", ["--batch-size 6", "5"])])
def test_contradictions_are_refused_in_one_line(flags, words):
    given = [t for t in flags.split() if t.startswith("--")]
    base = [t for t in re.split(r" (?=--)", LINE) if t.split()[0] not in given]
    fails("lab2pix", " ".join(base) + f" --steps 2 --out r {flags}", *words)
    assert not Path("r/checkpoint.pt").exists()


def test_the_presets_batch_shrinks_to_the_data_but_a_given_one_is_refused():
    """Row 29: two photos, and the paper's 20; then the broken file is what is complained of."""
    for name in ("a", "b"):
        label_map(f"data/train_label/{name}.png", 64, 64)
        picture(f"data/train_img/{name}.png", 64, 64)
    line = (LINE + " --data data --steps 1").replace("--batch-size 2", "")
    text = works("lab2pix", f"{line} --out r")
    assert "2 images" in text and json.loads(Path("r/config.json").read_text())["batch_size"] == 2
    fails("lab2pix", f"{line} --out q --batch-size 3", "--batch-size 3")
    Path("data/train_img/b.png").write_bytes(Path("data/train_img/b.png").read_bytes()[:300])
    fails("lab2pix", f"{line} --out q", "b.png")


@pytest.mark.parametrize("preset", ("", "--preset toy", "--preset streets"))
def test_a_preset_of_ours_says_how_it_is_not_the_papers(preset):
    text = works("lab2pix", f"{LINE_V1} {preset} --steps 1 --out r")
    for setting in ("--gan hinge", "--d-norm spectral", "--lambda-4 3.0", "--s-size 64", "--loud"):
        assert setting in text.splitlines()[0], setting


def test_each_vgg_has_its_own_way_of_reading_images():
    """Released V2: VGG-16 normalised, VGG-19 as it is."""
    cfg = replace(configure("toy"), **TINY)
    for raw16, raw19 in ((False, False), (False, True), (True, False)):
        state = lab2pix.build(replace(cfg, vgg16_raw=raw16, vgg19_raw=raw19), CPU)
        assert (state.vgg16.normalise, state.vgg19.normalise) == (not raw16, not raw19)


# ------------------------------------------------------------------------------- Released files
# The authors' generators of plain modules, as their files describe and name them.

def old_spectral_norm(conv: nn.Module) -> nn.Module:
    """The hook of the authors' time: weight_orig, weight_u, weight_v."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.spectral_norm(conv)


class TheirNorm(nn.Module):
    def __init__(self, c: int, n: int, hidden: int):
        super().__init__()
        self.param_free_norm = nn.BatchNorm2d(c, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(n, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma, self.mlp_beta = (nn.Conv2d(hidden, c, 3, padding=1) for _ in "12")

    def forward(self, x, seg, h=None):
        guide = self.mlp_shared(F.interpolate(seg, x.shape[2:], mode="nearest"))
        guide = guide if h is None else guide + h
        return self.param_free_norm(x) * (1 + self.mlp_gamma(guide)) + self.mlp_beta(guide)


class TheirBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, n: int, hidden: int):
        super().__init__()
        c = min(c_in, c_out)
        self.conv_0 = old_spectral_norm(nn.Conv2d(c_in, c, 3, padding=1))
        self.conv_1 = old_spectral_norm(nn.Conv2d(c, c_out, 3, padding=1))
        self.norm_0, self.norm_1 = TheirNorm(c_in, n, hidden), TheirNorm(c, n, hidden)
        if c_in != c_out:
            self.conv_s = old_spectral_norm(nn.Conv2d(c_in, c_out, 1, bias=False))
            self.norm_s = TheirNorm(c_in, n, hidden)

    def forward(self, x, seg, h=None):
        short = self.conv_s(self.norm_s(x, seg)) if hasattr(self, "conv_s") else x
        x = self.conv_0(F.leaky_relu(self.norm_0(x, seg, h), 0.2))
        return short + self.conv_1(F.leaky_relu(self.norm_1(x, seg, h), 0.2))


class TheirEncoder(nn.Module):
    """Lab2Pix-V2's: heads in the order of their factors, the largest first."""

    def __init__(self, n: int, width: int, count: int):
        super().__init__()
        c = [width, 2 * width, 4 * width] + [8 * width] * count
        down = [old_spectral_norm(nn.Conv2d(n, c[0], 3, padding=1)), nn.LeakyReLU(0.2)]
        for i in range(count - 1):
            down += [old_spectral_norm(nn.Conv2d(c[i], c[i + 1], 3, 2, 1)), nn.LeakyReLU(0.2)]
        self.model_down = nn.Sequential(*down)
        self.model_up = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2 ** j), nn.Conv2d(c[count - 1], 2 * width, 3,
                                                                      padding=1), nn.ReLU())
            for j in reversed(range(count)))


class TheirG(nn.Module):
    """SPADE's generator, and with an encoder Lab2Pix-V2's; `ups` 5, 6 or 7 doublings."""

    def __init__(self, n: int, width: int, ups: int, encoder: bool):
        super().__init__()
        w, hidden = width, 2 * width
        self.ups, self.fc = ups, nn.Conv2d(n, 16 * w, 3, padding=1)
        if encoder:
            self.fpencoder = TheirEncoder(n, w, ups + 1)
        self.head_0, self.G_middle_0, self.G_middle_1 = (
            TheirBlock(16 * w, 16 * w, n, hidden) for _ in "123")
        for k in range(5 if ups == 7 else 4):
            self.add_module(f"up_{k}", TheirBlock(16 * w >> k, 8 * w >> k, n, hidden))
        self.conv_img = nn.Conv2d(w // 2 if ups == 7 else w, 3, 3, padding=1)

    def forward(self, seg):
        x = self.fc(F.interpolate(seg, [s >> self.ups for s in seg.shape[2:]], mode="nearest"))
        maps = {}
        if hasattr(self, "fpencoder"):
            small = self.fpencoder.model_down(seg)
            maps = {h.shape: h for h in (m(small) for m in self.fpencoder.model_up)}

        def block(name, x):
            size = next((s for s in maps if s[2:] == x.shape[2:]), None)
            return getattr(self, name)(x, seg, maps.get(size))

        x = block("G_middle_0", F.interpolate(block("head_0", x), scale_factor=2))
        x = block("G_middle_1", F.interpolate(x, scale_factor=2) if self.ups > 5 else x)
        for k in range(5 if self.ups == 7 else 4):
            x = block(f"up_{k}", F.interpolate(x, scale_factor=2))
        return self.conv_img(F.leaky_relu(x, 0.2)).tanh()


def shake(net: nn.Module) -> nn.Module:
    """Weights that show in the picture, and statistics as training would have left them."""
    torch.manual_seed(0)
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if "running" in name:
            value.uniform_(0.5, 1.5)
        elif value.ndim > 1:
            nn.init.normal_(value, 0, value[0].numel() ** -0.5)
    for module in net.modules():                 # several power iterations, for weight_u, weight_v
        if hasattr(module, "weight_orig"):
            for _ in range(5):
                for hook in module._forward_pre_hooks.values():
                    hook(module, None)
    return net.eval()


@pytest.mark.parametrize("data, n, ups, encoder, size", [
    ("cityscapes", 36, 6, True, (128, 256)), ("cityscapes", 36, 7, False, (256, 256)),
    ("cityscapes", 35, 6, False, (128, 192)), ("coco_stuff", 184, 5, False, (96, 64)),
    ("coco_stuff", 184, 5, True, (64, 64)), ("ade20k", 151, 5, False, (64, 96)),
    ("ade20k", 151, 5, True, (64, 64))])
def test_released_spade_and_v2_generators_paint_the_authors_picture(data, n, ups, encoder, size):
    G = shake(TheirG(n, 2, ups, encoder))
    torch.save(G.state_dict(), "latest_net_G.pth")
    assert {"head_0.norm_0.mlp_gamma.weight", "up_0.conv_s.weight_orig", "conv_img.bias",
            "up_1.norm_s.param_free_norm.running_var"} <= G.state_dict().keys()
    ids = np.random.default_rng(1).integers(0, {"ade20k": 151}.get(data, 35), (size[0] // 8,
                                                                            size[1] // 8))
    ids = ids.repeat(8, 0).repeat(8, 1).astype(np.uint8)
    if data == "coco_stuff":
        ids[:8] = 255                            # unknown, their channel 182
    save("a.png", ids)
    channels = np.where(ids == 255, 182, ids)    # ADE20K: theirs are the file's own numbers
    seg = F.one_hot(torch.tensor(channels).long(), n - (n % 2 == 0)).movedim(-1, 0)[None].float()
    if n % 2 == 0:                               # and the edges of instances
        seg = torch.cat([seg, torch.tensor(edges_of(ids))[None, None].float()], 1)
    fails("lab2pix", "sample --checkpoint latest_net_G.pth --gpu -1", "--input")
    works("lab2pix", "sample --checkpoint latest_net_G.pth --gpu -1 --input a.png --output o.png"
          + " --instances a.png" * (n % 2 == 0))
    assert grey_levels("o.png", G(seg)[0]) <= 1


class TheirV1Norm(nn.Module):
    def __init__(self, c: int, n: int, hidden: int):
        super().__init__()
        self.common_conv = nn.Sequential(nn.Conv2d(n, hidden, 3, padding=1), nn.ReLU())
        self.mul_conv, self.add_conv = (nn.Conv2d(hidden, c, 3, padding=1) for _ in "12")

    def forward(self, x, label):
        guide = self.common_conv(label)
        return F.instance_norm(x) * self.mul_conv(guide) + self.add_conv(guide)


class TheirV1Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, n: int, hidden: int):
        super().__init__()
        def conv(c):
            return nn.Sequential(nn.ReLU(), nn.Conv2d(c, c_out, 3, padding=1))

        self.SPADE_1, self.SPADE_1_ = TheirV1Norm(c_in, n, hidden), conv(c_in)
        self.SPADE_2, self.SPADE_2_ = TheirV1Norm(c_out, n, hidden), conv(c_out)
        if c_in != c_out:
            self.SPADE_res, self.SPADE_res_ = TheirV1Norm(c_in, n, hidden), conv(c_in)

    def forward(self, x, label):
        out = self.SPADE_2_(self.SPADE_2(self.SPADE_1_(self.SPADE_1(x, label)), label))
        learned = hasattr(self, "SPADE_res")
        return out + self.SPADE_res_(self.SPADE_res(x, label)) if learned else out


class TheirFusion(nn.Module):
    def __init__(self, c_before: int, c: int, n: int):
        super().__init__()
        self.input1 = nn.Sequential(nn.Conv2d(c_before, c, 3, padding=1), nn.ReLU())
        self.seg_process = nn.Sequential(nn.Conv2d(n, c, 3, padding=1), nn.ReLU())
        self.mask = nn.Sequential(nn.Conv2d(3 * c, 1, 3, padding=1), nn.Sigmoid())

    def forward(self, before, f, label):
        before = self.input1(F.interpolate(before, scale_factor=2))
        a = self.mask(torch.cat([F.instance_norm(t) for t in (before, f,
                                                              self.seg_process(label))], 1))
        return before * a + f * (1 - a)


class TheirV1(nn.Module):
    """Lab2Pix-V1: blocks 1 to 7 from labels, 3 to 7 from a sketch, whose z has no effect."""

    def __init__(self, n: int, width: int, noise: int, cells: tuple[int, int]):
        super().__init__()
        w, self.cells, self.sketch = width, cells, n == 1
        self.noise_process = nn.Linear(noise, 16 * w * cells[0] * cells[1])
        c = [16 * w, 16 * w, 16 * w, 16 * w, 8 * w, 4 * w, 2 * w, w]
        if self.sketch:
            sizes = [w, 2 * w, 4 * w, 8 * w, 16 * w, 16 * w]
            layers = [nn.Conv2d(1, w, 5, padding=2), nn.InstanceNorm2d(w), nn.ReLU()]
            for a, b in zip(sizes, sizes[1:]):
                layers += [nn.Conv2d(a, b, 3, 2, 1), nn.InstanceNorm2d(b), nn.ReLU()]
            self.encoder = nn.Module()
            self.encoder.model = nn.Sequential(*layers)
        self.numbers = range(3 if self.sketch else 1, 8)
        for k in self.numbers:
            self.add_module(f"SPADEResBlock_{k}", TheirV1Block(c[k - 1], c[k], n, 2 * w))
        for k in (5, 6, 7):
            self.add_module(f"SPADEResBlock_{k}_fusion", TheirFusion(c[k - 1], c[k], n))
            self.add_module(f"out_{k}", nn.Sequential(nn.Conv2d(c[k], 3, 3, padding=1), nn.Tanh()))

    def forward(self, z, m):
        def sized(x):
            if self.sketch:
                return F.adaptive_avg_pool2d(m, x.shape[2:])
            ids = F.adaptive_max_pool2d(m.argmax(1, True).float(), x.shape[2:])[:, 0].long()
            return F.one_hot(ids, m.shape[1]).movedim(-1, 1).float()

        x = self.encoder.model(m) if self.sketch else (
            self.noise_process(z).view(1, -1, *self.cells))
        for k in self.numbers:
            before = x
            x = F.interpolate(getattr(self, f"SPADEResBlock_{k}")(x, sized(x)), scale_factor=2)
            if k > 4:
                x = getattr(self, f"SPADEResBlock_{k}_fusion")(before, x, sized(x))
        return self.out_7(x)


@pytest.mark.parametrize("cells", [(2, 4), (2, 2)])
def test_released_v1_generator_paints_the_authors_picture(cells):
    G = shake(TheirV1(35, 2, 16, cells))
    torch.save(G.state_dict(), "G.pth")
    size = tuple(128 * side for side in cells)
    ids = np.random.default_rng(2).integers(0, 35, (size[0] // 16, size[1] // 16), np.uint8)
    save("a.png", ids.repeat(16, 0).repeat(16, 1))
    m = F.one_hot(torch.tensor(np.asarray(Image.open("a.png"))).long(), 35).movedim(-1, 0)[None]
    works("lab2pix", "sample --checkpoint G.pth --gpu -1 --input a.png --output o.png --seed 3")
    z = torch.randn(1, 16, generator=torch.Generator().manual_seed(3))
    assert grey_levels("o.png", G(z, m.float())[0]) <= 1


def test_released_v1_sketch_generator_paints_the_authors_picture():
    G = shake(TheirV1(1, 2, 16, (2, 2)))
    torch.save(G.state_dict(), "G.pth")
    grey = np.random.default_rng(2).integers(0, 256, (96, 64), np.uint8)
    save("a.png", grey)
    works("lab2pix", "sample --checkpoint G.pth --gpu -1 --input a.png --output o.png")
    assert grey_levels("o.png", G(None, torch.tensor(grey / 127.5 - 1).float()[None, None])[0]) <= 1


def test_released_discriminators_are_named_as_such():
    torch.save({"discriminator_0.common.0.0.weight": torch.zeros(1)}, "net_D.pth")
    fails("lab2pix", "sample --checkpoint net_D.pth --gpu -1 --input a.png", "generator")
