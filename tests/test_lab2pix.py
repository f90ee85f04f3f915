"""What the Lab2Pix paper claims, tested on lab2pix.py.

The oracles share no code with the script: numpy in float64, printed numbers, gradients, limits, and
for released files networks of plain torch modules, written here as the authors name their parts.
"""

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    TINY as LINES, edges_of, grey_levels, label_map, parameters, picture, save, size_of, works)
from PIL import Image
from torch import nn
from torch.nn import functional as F

import common
import lab2pix
from lab2pix import (
    Config, Discriminators, GeneratorV1, GeneratorV2, Judged, ReleasedV1, configure)

CPU = torch.device("cpu")
TINY = dict(size=(64, 64), width=4, ups=4, vgg="random", batch_size=2, classes="streets")
TINY_V1 = TINY | dict(version="V1", ups=5)


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
    return parameters(net) - affine


# --------------------------------------------------------------------------- Sizes, as measured

@pytest.fixture
def no_spectral_norm(monkeypatch):
    """It adds no parameter, but takes seconds per network on the meta device."""
    monkeypatch.setattr(lab2pix, "spectral_norm", lambda module: module)


AT = {5: (256, 256), 6: (256, 512), 7: (512, 1024)}


@pytest.mark.parametrize("make, options, count", [
    *((GeneratorV2, dict(n=n, size=AT[ups], ups=ups, first=first, dgnorm=dgnorm), count)
      for n, ups, first, dgnorm, count in (
        (36, 6, "label", True, 105_827_075), (36, 7, "label", True, 109_299_491),
        (151, 5, "label", True, 106_388_035), (36, 6, "noise", True, 109_721_347),
        (184, 5, "noise", True, 114_152_835), (36, 6, "label", False, 93_048_003),
        (36, 7, "label", False, 93_570_659), (13, 5, "label", False, 92_359_107),
        (36, 6, "noise", False, 96_942_275))),
    (GeneratorV1, dict(n=35), 110_457_661), (GeneratorV1, dict(n=35, dgnorm=False), 95_319_357),
    (ReleasedV1, dict(n=35, dgnorm=False), 101_035_532),
    (ReleasedV1, dict(n=1, size=AT[5], ups=5, sketch=True, dgnorm=False), 68_170_380),
    (Discriminators, dict(c_in=3, scales=3, norm="instance"), 27_942_019 + 15_342_722 + 2_743_425),
    (Discriminators, dict(c_in=39, scales=3, norm="both"), 40_340_995 + 23_026_690 + 5_712_385),
    (Discriminators, dict(c_in=39, scales=2, kind="patch"), 5_601_410),
    (Discriminators, dict(c_in=39, scales=3, kind="patch"), 8_402_115)])
def test_parameters(make, options, count, no_spectral_norm):
    with torch.device("meta"):
        assert numbers(make(**options)) == count


@pytest.mark.parametrize("classes, count", [(35, 6_837_353), (2, 6_718_982), (1, 6_715_395)])
def test_parameters_of_the_segmentation_network(classes, count):
    """ICNet's; 386 per class are of the two outputs that enter no loss and are left out."""
    with torch.device("meta"):
        net = lab2pix.ICNet(classes)
    assert parameters(net) == count - 386 * classes


def test_eq_8_17_and_23_sizes_of_the_three_images_and_of_all_verdicts(no_spectral_norm):
    """Sec. 3.3 and 3.4 of the fact sheet, at 256 x 512, without computing anything."""
    with torch.device("meta"):
        m, z = torch.zeros(1, 35, 256, 512), torch.zeros(1, 128)
        images = GeneratorV1(35)(z, m)
        assert [tuple(x.shape[2:]) for x in images] == [(256, 512), (128, 256), (64, 128)]
        assert [x.shape for x in GeneratorV2(35)(z, m)] == [(1, 3, 256, 512)]
        vgg = [{f"pool{k}": torch.zeros(1, c, x.shape[2] >> k, x.shape[3] >> k)
                for k, c in ((3, 256), (4, 512), (5, 512))} for x in images]
        verdicts = Discriminators(3, norm="instance")(images, vgg)
        found = [[tuple(level.shape[1:]) for level in d.verdicts] for d in verdicts]
        assert found == [[(1, 32, 64), (1, 16, 32), (1, 8, 16)], [(1, 16, 32), (1, 8, 16)],
                         [(1, 8, 16)]]
        assert [len(d.features) for d in verdicts] == [8, 6, 4]
        patch = Discriminators(39, 2, kind="patch")
        wide = [torch.zeros(1, 39, 256, 512), torch.zeros(1, 39, 128, 256)]
        levels, features = patch(wide, [{}, {}])[0]
        sizes = [tuple(f.shape[2:]) for f in features + levels]
        assert sizes == [(129, 257), (65, 129), (33, 65), (34, 66), (35, 67)]
        assert lab2pix.ICNet(35)(torch.zeros(1, 3, 64, 128)).shape == (1, 35, 256, 256)
        sketch = GeneratorV1(1, (256, 256), ups=5, sketch=True)
        assert sketch.blocks[0].conv_0.weight.shape[1] == 1088           # 1024 and z's 64
        images = sketch(z, torch.zeros(1, 1, 256, 256))
        assert [x.shape[-1] for x in images] == [256, 128, 64]


# ------------------------------------------------------------------------- Generator and losses

@pytest.mark.parametrize("eq5, with_h", [(False, False), (False, True), (True, True)])
def test_eq_3_to_5_dg_norm(eq5, with_h):
    """Statistics over the batch and all pixels; the guide is of the label and of H."""
    net = lab2pix.DGNorm(2, 3, 4, eq5).double()
    nn.init.normal_(net.norm.weight)
    nn.init.normal_(net.norm.bias)
    e, m = torch.randn(2, 2, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    h = torch.rand(2, 4, 4, 5).double() if with_h else None
    bn = F.batch_norm(e, None, None, net.norm.weight, net.norm.bias, training=True)
    guide = net.shared(m).relu() + (h if with_h else 0)
    gamma, beta = net.gamma_beta(guide).chunk(2, 1)
    expected = gamma * (bn + 1) + beta if eq5 else (1 + gamma) * bn + beta
    torch.testing.assert_close(net(e, m, h), expected)


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


def test_eq_7_co_attention():
    """A_m of one channel, in (0, 1), mixes h' and f. A hook on `mask` shows it."""
    net, maps = lab2pix.LSCA(3, 2, 4).double(), []
    h, f, m = (torch.randn(1, c, side, side).double() for c, side in ((3, 3), (2, 6), (4, 6)))
    coarse = net.merge(F.interpolate(h, scale_factor=2))
    a = net.mask(torch.cat([coarse, f, m], 1)).sigmoid()
    net.mask.register_forward_hook(lambda mask, x, y: maps.append(torch.sigmoid(y)))
    torch.testing.assert_close(net(h, f, m), coarse * a + f * (1 - a))
    assert a.shape == (1, 1, 6, 6)
    torch.testing.assert_close(maps[0], a)


def level_sum(judged, loss, mask=None):
    """Eq. (10) to (16): levels weigh 1, 1/2, 1/4 over their sum; discriminators are added."""
    total = 0
    for levels, _ in judged:
        lam = [1, 0.5, 0.25][:len(levels)]
        for k, q in zip(lam, levels):
            value = loss(q) if mask is None else loss(q) * F.avg_pool2d(
                mask, mask.shape[-1] // q.shape[-1])
            total = total + k * value.mean() / sum(lam)
    return total


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


def test_eq_29_as_released_is_a_mean_over_discriminators():
    a, b = ([Judged([], list(torch.randn(n, 2, 3, 4, 4))) for n in (8, 6, 4)] for _ in "ab")
    expected = sum((x - y).abs().mean() for (_, f), (_, g) in zip(a, b) for x, y in zip(f, g)) / 3
    torch.testing.assert_close(lab2pix.feature_matching_loss(a, b, released=True), expected)


# ------------------------------------------------------------------------------------ Training

def same_gradients(parameters, grads) -> None:
    scale = max(g.abs().max().item() for g in grads)                  # biases before a norm: 0
    for p, g in zip(parameters, grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-2, atol=1e-4 * scale)


def test_eq_15_and_20_step_v1_is_the_textbook_step():
    """D twice on the same images, once detached, each player's own backward pass; with spectral
    norm, as in toy, whose vectors move as D judges."""
    cfg = replace(configure(version="V1"), **TINY_V1, lambda_3=0.1, lambda_2=0.5, gain=1.0,
                  d_norm="spectral")
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
    grads = torch.autograd.grad(level_sum(judge(x), real_term, w) + 0.1 * con + 10 * seg,
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
    weights = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1)[::-1 if cfg.vgg == "random" else 1]
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


@pytest.mark.parametrize("vgg", ["random", "small"])
def test_eq_22_to_31_step_v2_is_the_textbook_step(vgg):
    """Of a trained VGG the last layer weighs most, of a random one the first."""
    textbook_v2(replace(configure("toy"), **TINY | dict(vgg=vgg), d_norm="both"))


def test_eq_32_each_player_minimises_its_own_part():
    """Without lambdas L_v2 is Eq. (32): G's gradient is Eq. (24)'s, D's is Eq. (25)'s."""
    textbook_v2(replace(configure("toy"), **TINY, lambda_2=0.0, lambda_5=0.0, lambda_6=0.0))


@pytest.mark.parametrize("row", list(lab2pix.ABLATIONS))
def test_table_1_and_2_every_row_is_built_and_steps(row):
    v1, place = row.endswith("u"), row[0]
    cfg = replace(configure("toy", ablation=row), **TINY_V1 if v1 else TINY)
    state = lab2pix.build(cfg, CPU)
    G, D = state.generator, state.discriminator.scales
    assert (G.globe is not None) == (row in ("H_u", "E_s"))
    hpd = place >= "E" if v1 else place >= "B"
    assert isinstance(D[0], lab2pix.PerceptualDiscriminator) == hpd
    assert cfg.T == ((2 if place >= "F" else 1) if v1 else (5 if place >= "C" else 1))
    assert cfg.lambda_2 == float(place >= "G" if v1 else place >= "D")
    if v1:
        images = 3 if place >= "B" else 1
        assert (len(G.heads), len(state.segmenter.scales)) == (images, images)
        assert (len(G.lsca), len(D)) == (3 if place >= "C" else 0, 3 if place >= "B" else 2)
        assert cfg.lambda_3 == (5e-6 if place >= "D" else 0)
        assert (configure(ablation=row).lambda_4, configure(ablation=row).gan) == (10, "vanilla")
    else:
        assert len(D) == 2 and cfg.gan == "hinge" and cfg.lambda_5 == cfg.lambda_6 == 10
    if row in ("A_u", "D_u", "H_u", "A_s"):
        losses = lab2pix.train_step(state, batch_of(cfg), cfg)
        assert all(v.isfinite() for v in losses.values())
        assert ("d_blur" in losses, "g_con" in losses) == (cfg.lambda_2 > 0, cfg.lambda_3 > 0)


def test_versions_are_the_papers():
    """Sec. 5.2, line by line."""
    v1, v2, hd = (configure(version=v) for v in ("V1", "V2", "V2-H"))
    assert (v1.size, v1.batch_size, v1.epochs, v1.T) == ((256, 512), 1, 100, 2)
    net = torch.nn.Linear(1, 1)
    betas = [lab2pix.adam(cfg, net).defaults["betas"] for cfg in (v1, v2, hd)]
    assert betas == [(0.5, 0.999), (0, 0.9), (0, 0.9)]
    assert (v1.ramp, v1.lambda_3, v1.lambda_4, v1.gan, v1.scales) == (True, 5e-6, 10, "vanilla", 3)
    assert (v2.size, v2.batch_size, v2.epochs, v2.T) == ((256, 512), 20, 200, 5)
    assert (v2.lambda_2, v2.lambda_5, v2.lambda_6, v2.gan, v2.scales) == (1, 10, 10, "hinge", 2)
    assert (hd.size, hd.batch_size, hd.epochs, hd.scales, hd.ups) == ((512, 1024), 8, 200, 3, 7)
    assert replace(configure(ablation="H_u"), ablation="") == v1          # the tables' last rows
    assert replace(configure(ablation="E_s"), ablation="") == v2 == Config()
    shoes = configure("V1-edges2shoes")
    assert (shoes.batch_size, shoes.epochs, shoes.ramp, shoes.T) == (4, 10, False, 1)
    assert all(cfg.noise == 128 for cfg in (v1, v2, hd, shoes))
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
    assert lab2pix.learning_rates(Config(released=True), 0) == pytest.approx((1e-4, 4e-4))
    assert set(lab2pix.learning_rates(configure("V1-edges2shoes"), 9)) == {2e-4}
    ramp = configure(version="V1")
    assert [lab2pix.lambda_2(ramp, e) for e in (0, 99)] == [0, 1]
    assert lab2pix.lambda_2(Config(), 0) == 1


def test_speak_up_shows_the_label_from_the_start():
    """Ours, in V1's toy: untrained, G's images show the label and hardly z; S knows nothing."""
    seen = []
    for short in (False, True):
        cfg = replace(configure("toy", version="V1", short=short), **TINY_V1)
        torch.manual_seed(0)
        G, _, S = lab2pix.networks(cfg)
        m, z = batch_of(cfg)["input"], torch.randn(2, cfg.noise)
        by_label, by_noise = (G(z[a], m[b])[0].diff(dim=0).abs().mean()
                              for a, b in (([0, 0], [0, 1]), ([0, 1], [0, 0])))
        seen.append(by_label / by_noise.clamp(min=1e-9))
    assert seen[1] > 2 * seen[0]
    assert not S(G(z, m))[0].diff(dim=1).any()


# ------------------------------------------------------------------------------- Unpaired data

def unpaired(**changes) -> lab2pix.Unpaired:
    return lab2pix.open_data(configure("toy", version="V1", size=(64, 64), **changes))[1]


def test_no_photo_is_ever_served_with_its_own_label():
    """For every epoch: each photo once, as a shift, and never the label's own."""
    source, data = common.Dataset("", "train", (64, 64), limit=5), unpaired(limit=5, augment="none")
    own, shifts = [source[i] for i in range(5)], set()
    for epoch in range(12):
        order = [data.partner(i, epoch) for i in range(5)]
        shifts.add(order[0])
        assert sorted(order) == list(range(5)) and all(k != i for i, k in enumerate(order))
        item = data[epoch, epoch % 5]
        assert torch.equal(item["label"], own[epoch % 5]["label"])
        assert torch.equal(item["image"], own[order[epoch % 5]]["image"])
    assert len(shifts) > 2                       # another one in each epoch


def test_labels_and_photos_of_a_paired_layout_are_read_apart():
    """Neither side opens the other's files; a missing photo shifts the lists against each other,
    and still no photo meets its own label."""
    for split in ("train", "test"):
        for i in range(4):
            label_map(Path(f"data/{split}_label/{i}.png"), 130, 140)
            picture(Path(f"data/{split}_img/{i}.png"), 130, 140, i)
    Path("data/train_img/1.png").unlink()
    data = unpaired(data="data", limit=0)
    assert (data.names, data.photos.names) == (list("0123"), list("023"))
    assert [set(files) for files in data.files] == [{"label"}] * 4
    assert [set(files) for files in data.photos.files] == [{"image"}] * 3
    for epoch in range(8):
        for i in range(4):
            assert data.photos.names[data.partner(i, epoch)] != data.names[i]


def test_training_and_sampling_on_two_lists():
    """V1 from sketches: trainA and trainB have neither names nor sizes nor numbers in common."""
    for i in range(3):
        picture(f"data/trainA/sketch{i}.png", 140, 150, i)
        picture(f"data/testA/drawing{i}.png", 130, 60, i)
        picture(f"data/trainB/photo{i % 2}.png", 128, 200, i % 2)
    picture("data/testB/photo9.png", 99, 99)
    works("lab2pix", f"{LINES['lab2pix-V1']} --data data --steps 2 --out r --task sketch")
    picture("drawing.jpg", 41, 29)
    works("lab2pix", "sample --out r --input drawing.jpg --output o.png")
    assert size_of("o.png") == (29, 41)
    works("lab2pix", "evaluate --out r")
    metrics = json.loads(Path("r/metrics.json").read_text())
    assert metrics["images"] == 3 and metrics["VGG distance"] > 0 and "PSNR" not in metrics


# -------------------------------------------------------------------------- Sampling, evaluation

def test_translate_gives_the_size_of_its_input():
    G, m, z = GeneratorV2(5, (64, 64), 2, 4, 4).eval(), torch.rand(1, 5, 50, 70), torch.randn(1, 4)
    whole = G(z, common.mirror_pad(m, 16, 32))[0]
    torch.testing.assert_close(lab2pix.translate(G, z, m), whole[..., :50, :70])


def test_batch_norm_at_test_time():
    """V2: averages of training. V1: the image's own statistics, as in training on one image."""
    assert (configure(version="V1").test_norm, Config().test_norm) == ("image", "running")
    cfg = replace(configure("toy", version="V1"), **TINY_V1)
    state, batch = lab2pix.build(cfg, CPU), batch_of(cfg)
    lab2pix.train_step(state, batch, cfg)
    one, z = batch["input"][:1], torch.randn(1, cfg.noise)
    for norm in ("image", "running"):
        x = lab2pix.translate(lab2pix.test_time(state, replace(cfg, test_norm=norm)), z, one)
        source = copy.deepcopy(state.generator)
        for module in source.modules():          # spectral norm's vectors stay
            module.training = norm == "image" and isinstance(module, nn.BatchNorm2d)
        torch.testing.assert_close(x, source(z, one)[0].detach(), rtol=1e-4, atol=1e-5)
    assert state.generator.training


def test_table_3_psnr_and_ssim():
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 16, 18).double() * 2 - 1, torch.rand(2, 3, 16, 18).double() * 2 - 1
    a, b = ((t.numpy() + 1) / 2 for t in (x, y))
    expected = [10 * np.log10(1 / ((a[n] - b[n]) ** 2).mean()) for n in range(2)]
    assert lab2pix.psnr(x, y).numpy() == pytest.approx(expected, rel=1e-9)
    line = np.exp(-(np.arange(11) - 5) ** 2 / 4.5)
    window = torch.from_numpy(np.outer(line, line) / line.sum() ** 2)[None, None]
    p, q = ((t[0][:, None] + 1) / 2 for t in (x, y))
    mp, mq, pp, qq, pq = (F.conv2d(t, window) for t in (p, q, p * p, q * q, p * q))
    vp, vq, cov = pp - mp ** 2, qq - mq ** 2, pq - mp * mq
    scores = ((2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
              / ((mp ** 2 + mq ** 2 + 1e-4) * (vp + vq + 9e-4)))
    assert lab2pix.ssim(x, y)[0].item() == pytest.approx(scores.mean().item(), rel=1e-5)


def test_frechet_distance():
    """Against the formula with a matrix root, and 0 of a set with itself."""
    g = np.random.default_rng(0)
    p, q = g.standard_normal((40, 5)), 2 * g.standard_normal((30, 5)) + 1
    cp, cq = np.cov(p.T), np.cov(q.T)
    root = np.sqrt(np.linalg.eigvals(cp @ cq).real).sum()
    expected = ((p.mean(0) - q.mean(0)) ** 2).sum() + np.trace(cp + cq) - 2 * root
    assert lab2pix.frechet_distance(torch.tensor(p), torch.tensor(q)) == pytest.approx(expected)
    assert lab2pix.frechet_distance(torch.tensor(p), torch.tensor(p)) == pytest.approx(0, abs=1e-9)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shared") / "run"
    works("lab2pix", f"{LINES['lab2pix-full']} --steps 3 --out {out}")
    return out


def test_released_is_the_middle_column_of_the_table():
    """V2: VGG-16 normalised, VGG-19 not, z unused, other sums and rates; V1: its own blocks."""
    for version, tiny, raw in (("V1", TINY_V1, (True, None)), ("V2", TINY, (False, True))):
        cfg = replace(configure(version=version, released=True), **tiny)
        state, paper = lab2pix.build(cfg, CPU), replace(configure(version=version), **tiny)
        found = [vgg and not vgg.normalise for vgg in (state.vgg16, state.vgg19)]
        assert found == [*raw]
        assert lab2pix.build(paper, CPU).vgg16.normalise
        assert isinstance(state.generator, ReleasedV1) == (version == "V1")
        losses = lab2pix.train_step(state, batch_of(cfg), cfg)
        assert all(value.isfinite() for value in losses.values())
    assert cfg.first == "label" and lab2pix.learning_rates(cfg, 0) == pytest.approx((1e-4, 4e-4))
    assert not configure(version="V1", released=True).ramp


# ------------------------------------------------------------------------------- Released files
# The authors' generators of plain modules, as their files describe and name them.

def old_spectral_norm(conv: nn.Module) -> nn.Module:
    """The hook of the authors' time: weight_orig, weight_u, weight_v."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.spectral_norm(conv)


def conv3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, 1)


class TheirNorm(nn.Module):
    def __init__(self, c: int, n: int, hidden: int):
        super().__init__()
        self.param_free_norm = nn.BatchNorm2d(c, affine=False)
        self.mlp_shared = nn.Sequential(conv3(n, hidden), nn.ReLU())
        self.mlp_gamma, self.mlp_beta = (conv3(hidden, c) for _ in "12")

    def forward(self, x, seg, h=None):
        guide = self.mlp_shared(F.interpolate(seg, x.shape[2:], mode="nearest"))
        guide = guide if h is None else guide + h
        return self.param_free_norm(x) * (1 + self.mlp_gamma(guide)) + self.mlp_beta(guide)


class TheirBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, n: int, hidden: int):
        super().__init__()
        c = min(c_in, c_out)
        self.conv_0 = old_spectral_norm(conv3(c_in, c))
        self.conv_1 = old_spectral_norm(conv3(c, c_out))
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
        down = [old_spectral_norm(conv3(n, c[0])), nn.LeakyReLU(0.2)]
        for i in range(count - 1):
            down += [old_spectral_norm(conv3(c[i], c[i + 1], 2)), nn.LeakyReLU(0.2)]
        self.model_down = nn.Sequential(*down)
        self.model_up = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2 ** j), conv3(c[-2], 2 * width), nn.ReLU())
            for j in reversed(range(count)))


class TheirG(nn.Module):
    """SPADE's generator, and with an encoder Lab2Pix-V2's; `ups` 5, 6 or 7 doublings."""

    def __init__(self, n: int, width: int, ups: int, encoder: bool):
        super().__init__()
        w, hidden = width, 2 * width
        self.ups, self.fc = ups, conv3(n, 16 * w)
        if encoder:
            self.fpencoder = TheirEncoder(n, w, ups + 1)
        self.head_0, self.G_middle_0, self.G_middle_1 = (
            TheirBlock(16 * w, 16 * w, n, hidden) for _ in "123")
        for k in range(5 if ups == 7 else 4):
            self.add_module(f"up_{k}", TheirBlock(16 * w >> k, 8 * w >> k, n, hidden))
        self.conv_img = conv3(w // 2 if ups == 7 else w, 3)

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
    ("cityscapes", 36, 7, False, (256, 256)), ("cityscapes", 35, 6, False, (128, 192)),
    ("coco_stuff", 184, 5, True, (96, 64)), ("ade20k", 151, 5, True, (64, 64))])
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
    works("lab2pix", "sample --checkpoint latest_net_G.pth --gpu -1 --input a.png --output o.png"
          + " --instances a.png" * (n % 2 == 0))
    assert grey_levels("o.png", G(seg)[0]) <= 1


class TheirV1Norm(nn.Module):
    def __init__(self, c: int, n: int, hidden: int):
        super().__init__()
        self.common_conv = nn.Sequential(conv3(n, hidden), nn.ReLU())
        self.mul_conv, self.add_conv = (conv3(hidden, c) for _ in "12")

    def forward(self, x, label):
        guide = self.common_conv(label)
        return F.instance_norm(x) * self.mul_conv(guide) + self.add_conv(guide)


class TheirV1Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, n: int, hidden: int):
        super().__init__()
        def conv(c):
            return nn.Sequential(nn.ReLU(), conv3(c, c_out))

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
        self.input1 = nn.Sequential(conv3(c_before, c), nn.ReLU())
        self.seg_process = nn.Sequential(conv3(n, c), nn.ReLU())
        self.mask = nn.Sequential(conv3(3 * c, 1), nn.Sigmoid())

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
            self.add_module(f"out_{k}", nn.Sequential(conv3(c[k], 3), nn.Tanh()))

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


def test_released_v1_generator_paints_the_authors_picture():
    """z is theirs, too: the mean of ten draws."""
    G = shake(TheirV1(35, 2, 32, (2, 4)))
    torch.save(G.state_dict(), "G.pth")
    ids = np.random.default_rng(2).integers(0, 35, (16, 32), np.uint8)
    save("a.png", ids.repeat(16, 0).repeat(16, 1))
    m = F.one_hot(torch.tensor(np.asarray(Image.open("a.png"))).long(), 35).movedim(-1, 0)[None]
    works("lab2pix", "sample --checkpoint G.pth --gpu -1 --input a.png --output o.png --seed 3")
    chance = torch.Generator().manual_seed(common.draw_seed(3, "a"))
    z = torch.randn(1, 32, generator=chance) * 10 ** -0.5
    assert grey_levels("o.png", G(z, m.float())[0]) <= 1


def test_released_v1_sketch_generator_paints_the_authors_picture():
    G = shake(TheirV1(1, 2, 32, (2, 2)))
    torch.save(G.state_dict(), "G.pth")
    grey = np.random.default_rng(2).integers(0, 256, (96, 64), np.uint8)
    save("a.png", grey)
    works("lab2pix", "sample --checkpoint G.pth --gpu -1 --input a.png --output o.png")
    assert grey_levels("o.png", G(None, torch.tensor(grey / 127.5 - 1).float()[None, None])[0]) <= 1
