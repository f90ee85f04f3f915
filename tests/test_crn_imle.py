"""What the conditional IMLE paper (and CRN) claims, tested on crn_imle.py.

The oracles share no code with the script: numpy in float64 with loops, printed numbers, limits.
What all scripts owe their users (resuming, signals, damage, ...) is in test_contract.py.
"""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    TINY as LINES, as_user, assert_same, label_map, parameters, place, refused, save as write,
    size_of, stored, torchrun, works)
from torch import nn
from torch.nn import functional as F

import common
import crn_imle
from crn_imle import Config, Generator, NoiseEncoder

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("draw_each_street_once", "no_plots")
TINY = Config(size=(32, 32), width=6, noise_channels=3, encoder_width=5, layers=("conv1_1",),
              classes="streets", pool=6, candidates=4, inner_steps=3, vgg="random", limit=12,
              lr=1e-3, gpu=-1)
LINE = LINES["crn_imle"]
TWELVE = F.one_hot(torch.randint(0, 12, (1, 32, 32)), 12).movedim(-1, 1).float()


def state_of(cfg: Config, search: bool = False):
    """A state as train has it before its first search, and the loader; and after the search, with
    the distances that it has found."""
    state, train_set = crn_imle.build(cfg, CPU), crn_imle.dataset(cfg, "train")
    photos = state.photos = crn_imle.Photos(len(train_set), cfg)
    colours, photos.areas = crn_imle.survey(train_set, cfg)
    photos.rarity = crn_imle.rarity_scores(colours)
    photos.chosen[:, 0] = crn_imle.populate(photos.rarity, photos.areas, cfg, 0)
    loader = crn_imle.Batches(train_set, cfg, CPU, photos)
    if search:
        return state, loader, crn_imle.search(state, train_set, cfg, 0)
    return state, loader


def a_run() -> SimpleNamespace:
    """What begin_epoch needs of a run; it keeps what is printed."""
    told = []
    return SimpleNamespace(told=told, bar=SimpleNamespace(write=told.append))


def save(state, cfg, path) -> str:
    common.save_file({"script": "crn_imle", "config": asdict(cfg), "balance": state.balance
                      .state_dict(), "generator": state.generator.state_dict()}, Path(path))
    return str(path)


def batches_of(state, loader, cfg) -> list[dict]:
    """The rest of an epoch, as train_step takes it."""
    return [crn_imle.make_pair(batch, cfg, state.photos) for batch in loader]


# --------------------------------------------------------------------------------------- Networks

def test_parameter_counts_to_the_unit():
    """The released checkpoints' sizes: CRN with one and nine outputs, 512p and 1024p, and IMLE."""
    with torch.device("meta"):
        for n, net in {97_863_171: Generator(20), 97_875_483: Generator(20, 9),
                       98_622_851: Generator(20, modules=8), 98_674_531: Generator(20, modules=9),
                       98_534_541: Generator(20, noise_channels=10),
                       118_410: NoiseEncoder(20, 10)}.items():
            assert parameters(net) == n


def textbook_generator(net: Generator, label: torch.Tensor, noise=None) -> torch.Tensor:
    """Sec. 3.3 with torch's own functions: shares of the layout in each cell, every 2^i-th noise;
    features enlarged with corners aligned; layer norm over C, H, W; outputs colour by colour."""
    p, n, k, x = net.state_dict(), len(net.refine), net.outputs, None

    def two_convolutions(x, name):
        for i in (0, 3):
            weight, gain, shift = (p[f"{name}.layers.{key}"] for key in (
                f"{i}.weight", f"{i + 1}.weight", f"{i + 1}.bias"))
            x = F.conv2d(x, weight, padding=len(weight[0, 0]) // 2)
            x = F.layer_norm(x, x.shape[1:]) * gain[:, None, None] + shift[:, None, None]
            x = F.leaky_relu(x, 0.2)
        return x

    if net.encoder is not None:
        noise = F.conv2d(two_convolutions(torch.cat([label, noise], 1), "encoder"),
                         p["encoder.layers.6.weight"], p["encoder.layers.6.bias"])
    for i in range(n):
        s = 2 ** (n - 1 - i)
        inputs = [label.unflatten(2, (-1, s)).unflatten(4, (-1, s)).mean((3, 5))]
        inputs += [] if noise is None else [noise[..., ::s, ::s]]
        if i:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            inputs = [x, *inputs]
        x = two_convolutions(torch.cat(inputs, 1), f"refine.{i}")
    x = F.conv2d(x, p["head.weight"], p["head.bias"])
    return torch.stack([x[:, [u, k + u, 2 * k + u]] for u in range(k)], 1)


@pytest.mark.parametrize("outputs, noise, encoder", [(1, 0, 0), (9, 0, 0), (1, 2, 0), (1, 2, 5)])
def test_generator_is_the_papers(outputs, noise, encoder):
    net = Generator(4, outputs, 8, 4, noise, encoder).double()
    for p in net.parameters():
        nn.init.normal_(p, 0, 0.5)
    label = F.one_hot(torch.randint(0, 4, (2, 32, 64)), 4).movedim(-1, 1).double()
    z = torch.randn(2, noise, 32, 64).double() if noise else None
    torch.testing.assert_close(net(label, z), textbook_generator(net, label, z))


def test_noise_begins_with_a_deviation_of_1_and_is_of_each_pixel_unless_broadcast():
    z_hat = NoiseEncoder(20, 10)(torch.zeros(1, 20, 64, 128), torch.randn(1, 10, 64, 128))
    assert .8 < z_hat.std() < 1.2                              # so the release's 0.15
    z = crn_imle.draw_noise(3, replace(TINY, noise="broadcast"), (5, 7), CPU)
    assert z.shape == (3, 5, 7) and torch.equal(z, z[:, :1, :1].expand(3, 5, 7))
    assert len(crn_imle.draw_noise(3, TINY, (5, 7), CPU).unique()) == 105


# ----------------------------------------------------------------------------------------- Losses

def test_eq_1_and_the_masked_loss():
    """The mask shrinks to the share of each cell of a layer."""
    shapes = [(2, 3, 8, 8), (2, 4, 8, 8), (2, 5, 2, 4)]
    a, b = ([torch.randn(s) for s in shapes] for _ in range(2))
    mask, w = torch.rand(2, 8, 8), torch.tensor([1.0, .5, 3])
    want = sum(lam * (F.adaptive_avg_pool2d(mask[:, None], x.shape[2:])
                      * (x - y).abs()).mean((1, 2, 3)) for x, y, lam in zip(a, b, w))
    torch.testing.assert_close(crn_imle.distance(a, b, mask, w), want)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("k", [1, 3])                         # of one output: the plain distance
def test_diversity_loss(k, per_image):
    """An image's l_up is a sum over layers: (k, 4), of output u over the pixels of class p."""
    w, total = torch.tensor([1.0, 2.5]), 0
    real = [torch.randn(2, *shape) for shape in ((3, 8, 8), (4, 4, 4))]
    fake = [torch.randn(2, k, *x.shape[1:]) for x in real]
    label = F.one_hot(torch.randint(0, 3, (2, 8, 8)), 4)         # class 3 never occurs
    label = label.movedim(-1, 1).float()
    for n in range(2):
        parts = sum(lam * (F.adaptive_avg_pool2d(label[n], x.shape[2:])
                           * (x[n] - y[n]).abs().mean(1, keepdim=True)).mean((2, 3))
                    for x, y, lam in zip(real, fake, w))
        parts = parts.sum(1, keepdim=True) if per_image else parts
        total += (.999 * parts.amin(0) + .001 * parts.mean(0)).sum()
    flat = [x.flatten(0, 1) for x in fake]
    many = [x.repeat_interleave(k, 0) for x in real]
    got = crn_imle.diversity_loss(many, flat, label, w, per_image)
    torch.testing.assert_close(got, total / 2)


def test_lambda_makes_the_contributions_equal():
    means = torch.tensor([.2, .1, .4, .05])
    torch.testing.assert_close(crn_imle.balanced_weights(means, 1.0) * means, torch.full((4,), .2))
    assert crn_imle.balanced_weights(means, 0.0)[0] == 0       # Eq. (1), literally


def test_vgg_pools_by_average_and_takes_normalised_images():
    vgg = crn_imle.build(replace(TINY, layers=("conv1_2", "conv2_1")), CPU).vgg
    assert vgg.normalise and any(isinstance(m, nn.AvgPool2d) for m in vgg.trunk)
    made = crn_imle.features(vgg, torch.rand(1, 3, 32, 32))
    assert [tuple(f.shape) for f in made] == [(1, 3, 32, 32), (1, 16, 32, 32), (1, 32, 16, 16)]


def test_a_random_vgg_answers_to_edges_and_not_to_brightness(monkeypatch):
    """Photos that differ in brightness alone have equal features away from the padded border; a
    trained VGG is left as it is."""
    cfg = replace(TINY, layers=("conv1_2", "conv3_2"))
    vgg, image = crn_imle.build(cfg, CPU).vgg, torch.rand(1, 3, 64, 64)
    for dark, bright in zip(vgg(image - .5).values(), vgg(image).values()):
        inner = (..., *[slice(bright.shape[-1] // 2 - 2, bright.shape[-1] // 2 + 2)] * 2)
        assert bright[inner].abs().sum() > 0
        torch.testing.assert_close(dark[inner], bright[inner], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(common, "read_vgg", lambda *_: (
        19, [torch.ones(64, 3, 3, 3), torch.ones(64)]))
    vgg = crn_imle.build(replace(TINY, vgg="imagenet"), CPU).vgg
    assert vgg.trunk[0].weight.shape == (64, 3, 3, 3) and vgg.trunk[0].weight.eq(1).all()


# -------------------------------------------------------------------------------------- Rebalancing

def test_survey_measures_mean_colours_and_leaves_blank_images_out(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (2, 32, 32)).astype(np.uint8)
    photos = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
    photos[0] = 77                                             # a blank image
    for i in range(2):
        write(tmp_path / f"train_img/{i}.png", photos[i])
        write(tmp_path / f"train_label/{i}.png", labels[i])
    cfg = replace(TINY, data=str(tmp_path), classes="4", limit=0)
    colours, areas = crn_imle.survey(crn_imle.dataset(cfg, "train"), cfg)
    assert colours.shape == (2, 5, 3) and colours[0].isnan().all()
    for p in range(3):
        want = photos[1][labels[1] == p].mean(0)
        np.testing.assert_allclose(colours[1, p], want, atol=1e-3)
    assert colours[1, 3:].isnan().all()
    np.testing.assert_array_equal(areas, [*((labels[1] == p).sum() for p in range(3)), 0, 0])


def made_up_colours(n: int = 40) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    colours = torch.randn(n, 4, 3, generator=g, dtype=torch.float64) * 10 + 100
    colours[3, 0] = 250.0                                      # one image of a rare appearance
    colours[:, 1] = 60.0                                       # a singular covariance
    colours[5:, 2] = torch.nan                                 # a rare class
    colours[7:9, 3] = torch.nan                                # absent here and there
    return colours


def test_rarity_scores():
    """1 over the density, whose kernels have Scott's factor."""
    colours = made_up_colours()
    scores = crn_imle.rarity_scores(colours)
    assert scores.isfinite().all() and torch.equal(scores > 0, ~colours[..., 0].isnan())
    assert scores[:, 0].argmax() == 3
    valid = [0, 1, 3]
    for k in range(5):                                         # under 10 images: the lowest score
        assert scores[k, 2] == min(scores[k, p] for p in valid)
    for p in (0, 1):
        x = colours[:, p]
        kernels = torch.distributions.MultivariateNormal(
            x, len(x) ** (-2 / 7) * (x.T.cov() + torch.eye(3)))
        density = kernels.log_prob(x[:, None]).exp().mean(1)
        torch.testing.assert_close(scores[:, p], 1 / density, rtol=1e-9, atol=0)
    few = crn_imle.rarity_scores(colours[:4])                  # under ten images: all are equal
    assert torch.equal(few, torch.ones_like(few))


def test_masks_lie_in_0_1_and_follow_the_scores():
    scores = crn_imle.rarity_scores(made_up_colours())[[0, 7]]
    layout = torch.tensor([[[0, 1], [3, 3]], [[0, 0], [1, 1]]])
    mask = crn_imle.paint_masks(layout, scores)
    for made, ids, row in zip(mask, layout, scores):
        torch.testing.assert_close(made.double(), row[ids] / row.max())
    assert mask.max() <= 1 and mask.min() > 0


def test_s_follows_the_scores_of_the_five_largest_classes():
    g = torch.Generator().manual_seed(0)
    rarity = torch.rand(30, 7, generator=g, dtype=torch.float64)
    rarity[11], rarity[:, 6] = 0, 0                            # a blank image; only in such images
    areas = torch.tensor([7.0, 6, 5, 4, 3, 2, 8])
    cfg = replace(TINY, pool=10000, rebalance="both")
    S = crn_imle.populate(rarity, areas, cfg, 0)
    for q in range(5):                                         # slot t belongs to class t mod 5
        share = torch.bincount(S[q::5], minlength=30) / 2000
        want = rarity[:, q] / rarity[:, q].sum()
        assert (share - want).abs().max() < .02
    assert not (S == 11).any()
    assert torch.equal(S, crn_imle.populate(rarity, areas, cfg, 0))
    assert not torch.equal(S, crn_imle.populate(rarity, areas, cfg, 1))
    plain = crn_imle.populate(rarity, areas, replace(cfg, rebalance="mask"), 0)
    share = torch.bincount(plain, minlength=30) / 10000
    assert share[11] == 0 and (share[share > 0] - 1 / 29).abs().max() < .01


# -------------------------------------------------------------------------------------- Algorithm 1

def test_the_search_is_exhaustive_and_leaves_no_trace(monkeypatch):
    """sigma(i) by brute force, one candidate at a time; no graph, no gradient."""
    monkeypatch.setattr(crn_imle, "SEARCH_BATCH", 3)
    cfg = replace(TINY, rebalance="both")
    state, loader, losses = state_of(cfg, search=True)
    assert not losses.requires_grad
    assert all(p.grad is None for p in state.generator.parameters())
    assert losses.shape == (6, 4) and losses.std(1).min() > 0
    for i, (k, seed) in enumerate(state.photos.chosen.tolist()):
        pair = crn_imle.test_pair(loader.examples[k] | {"numbers": [k]}, state, cfg)
        real = crn_imle.features(state.vgg, pair["image"])
        seeds = [hash((cfg.seed, 0, i, j)) % 2 ** 62 for j in range(4)]
        alone = []
        for s in seeds:
            z = crn_imle.draw_noise(s, cfg, (32, 32), CPU)[None]
            fake = crn_imle.features(state.vgg, state.generator(pair["input"], z)[:, 0])
            alone.append(crn_imle.distance(real, fake, pair["mask"], state.balance.weights).item())
        np.testing.assert_allclose(losses[i], alone, rtol=1e-4)
        assert seed == seeds[int(np.argmin(alone))]


def test_an_inner_step_lowers_the_loss_at_the_noise_found():
    """Images are rendered anew: the same batch gives a lower loss after each update."""
    cfg = replace(TINY, rebalance="both")
    state, loader, found = state_of(cfg, search=True)
    member = state.photos.chosen.tolist().index(list(loader.order()[0]))
    batch = batches_of(state, loader, cfg)[0]
    losses = [crn_imle.train_step(state, batch, cfg)["loss"].item() for _ in range(4)]
    assert losses[0] == pytest.approx(found[member].min().item(), rel=1e-4)    # L^, at sigma(i)
    assert losses[0] > losses[1] > losses[3]


def test_batches_carry_the_noise_and_the_mask_of_their_photo():
    cfg = replace(TINY, batch_size=2, rebalance="both")
    state, loader, _ = state_of(cfg, search=True)
    order, photos = loader.order(), state.photos
    assert {k for k, _ in order} <= set(photos.chosen[:, 0].tolist())
    batches = batches_of(state, loader, cfg)
    assert len(batches) == 3 and len(order) == 6 and loader.epoch == 1
    for i, batch in enumerate(batches):
        for b, (k, seed) in enumerate(order[2 * i:2 * i + 2]):
            item = loader.examples[k]
            assert batch["name"][b] == item["name"]
            assert torch.equal(batch["noise"][b], crn_imle.draw_noise(seed, cfg, (32, 32), CPU))
            mask = crn_imle.paint_masks(item["label"][None], photos.rarity[[k]])[0]
            assert torch.equal(batch["mask"][b], mask)


@pytest.mark.parametrize("rebalance, masked, binned", [
    ("none", False, False), ("mask", True, False), ("bins", False, True), ("both", True, True)])
def test_the_four_cells_of_rebalancing(rebalance, masked, binned):
    cfg = replace(TINY, rebalance=rebalance, pool=500)
    state, loader = state_of(cfg)
    pair = crn_imle.test_pair(loader.examples[0] | {"numbers": [0]}, state, cfg)
    assert bool((pair["mask"] != 1).any()) == masked and pair["mask"].max() == 1
    share = torch.bincount(state.photos.chosen[:, 0], minlength=12) / 500
    assert bool((share - 1 / 12).abs().max() > .06) == binned


def test_an_epoch_of_crn_shows_each_photo_once():
    for steps, times in ((0, [1]), (30, [2, 3])):              # 30 of 12: two rounds and a half
        cfg = replace(TINY, model="crn", outputs=2, inner_steps=steps)
        loader = crn_imle.Batches(crn_imle.dataset(cfg, "train"), cfg, CPU,
                                  crn_imle.Photos(0, cfg))
        order = loader.order()
        shown = torch.bincount(torch.tensor(order)[:, 0], minlength=12)
        assert shown.unique().tolist() == times
        assert [k for batch in loader for k in batch["numbers"]] == [k for k, _ in order]


def test_lambda_is_measured_once_between_epochs():
    cfg = replace(TINY, layers=("conv1_1", "conv2_1"), epochs=9)
    state, loader = state_of(cfg)
    for epoch in range(3):
        run = a_run()
        crn_imle.begin_epoch(state, loader, run, cfg)
        assert state.balance.measured == (epoch > 0) and "lambda" in run.told[0]
        before, sums = state.balance.weights.clone(), torch.zeros(3)
        for batch in batches_of(state, loader, cfg):
            losses = crn_imle.train_step(state, batch, cfg)
            sums += torch.stack([losses[k] for k in ("pixel", "conv1_1", "conv2_1")])
        assert torch.equal(state.balance.weights, before)      # never between search and update
        torch.testing.assert_close(state.balance.sums, sums)
        if epoch == 0:
            expected = sums[0] / sums
    torch.testing.assert_close(state.balance.weights, expected)


@pytest.mark.parametrize("released, epoch", [(False, 1), (True, 100)])
def test_crns_lambda_is_that_of_epoch_1_or_as_released_of_epoch_100(released, epoch):
    cfg = replace(TINY, model="crn", released=released, epochs=400)
    state, loader = state_of(cfg)
    for loader.epoch, measured in ((epoch - 1, False), (epoch, True)):
        state.balance.sums.fill_(1)
        crn_imle.begin_epoch(state, loader, a_run(), cfg)
        assert state.balance.measured == measured


def test_the_released_encoder_restart():
    cfg = replace(TINY, lr_drop=1, released=True, epochs=2)
    state, loader = state_of(cfg)
    crn_imle.begin_epoch(state, loader, a_run(), cfg)
    for batch in batches_of(state, loader, cfg):
        crn_imle.train_step(state, batch, cfg)
    before = {k: v.clone() for k, v in state.generator.state_dict().items()}
    crn_imle.begin_epoch(state, loader, a_run(), cfg)
    changed = {k for k, v in state.generator.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith("encoder.") for k in changed) and not state.opt_g.state
    assert crn_imle.learning_rate(cfg, 0) == 1e-3
    assert crn_imle.learning_rate(cfg, 1) == pytest.approx(1e-4)
    assert Config(**crn_imle.PRESETS["imle-released"]).released


# ------------------------------------------------------------------------------------------ --init

def test_warm_start_without_noise_reproduces_crns_output_0():
    """With the new columns at 0 the image is CRN's first, for any z."""
    cfg, label = replace(TINY, model="crn", outputs=4), TWELVE
    crn = crn_imle.build(cfg, CPU)
    warm = crn_imle.build(replace(TINY, init=(save(crn, cfg, "crn.pt"),)), CPU).generator
    columns = [module.layers[0].weight for module in warm.refine]
    for old, new in zip(crn.generator.refine, columns):
        old = old.layers[0].weight
        assert torch.equal(new[:, :-3], old)
        spread = new[:, -3:].std() / (5 * old.square().mean().sqrt())
        assert .8 < spread < 1.2
    a, b = (warm(label, torch.randn(1, 3, 32, 32))[:, 0] for _ in range(2))
    assert (a - b).abs().mean() > .01                          # noise matters from the first step
    with torch.no_grad():
        for weight in columns:
            weight[:, -3:] = 0
    torch.testing.assert_close(warm(label, torch.randn(1, 3, 32, 32))[:, 0],
                               crn.generator(label)[:, 0])


@pytest.mark.parametrize("change, measured, taken", [
    ({}, True, True), ({}, False, False), ({"layers": ("conv1_1",)}, True, False),
    ({"pixel_weight": 0.0}, True, False)])
def test_init_takes_a_measured_lambda_that_fits_and_keeps_it(change, measured, taken, capsys):
    """The release uses CRN's lambda throughout; measured anew it would be that of masked terms."""
    cfg = replace(TINY, model="crn", layers=("conv1_1", "conv2_1"))
    crn, want = crn_imle.build(cfg, CPU), torch.tensor([1.0, 2, 3])
    crn.balance.sums[:] = 6 / want
    if measured:
        crn.balance.weights[:] = want
        crn.balance.measured.fill_(True)
    cfg = replace(TINY, **{"layers": cfg.layers, "init": (save(crn, cfg, "crn.pt"),),
                           "epochs": 9} | change)
    state, loader = state_of(cfg)
    assert ("measured anew" in capsys.readouterr().out) != taken
    assert state.balance.measured == taken and not state.balance.sums.any()
    if taken:
        loader.epoch = 1
        crn_imle.begin_epoch(state, loader, a_run(), cfg)
        torch.testing.assert_close(state.balance.weights, want)
    else:
        assert state.balance.weights[1:].eq(1).all()


# ---------------------------------------------------------------------------------------- Test time

def ready(cfg: Config = TINY) -> tuple[crn_imle.State, dict]:
    state = crn_imle.build(cfg, CPU)
    return state, crn_imle.test_pair(crn_imle.dataset(cfg, "test")[0], state, cfg)


@torch.no_grad()
def test_any_size_by_reflection_and_cropping():
    net, both = ready()[0].generator, (torch.rand(1, 12, 37, 45), torch.randn(1, 3, 37, 45))
    whole = net(*(common.mirror_pad(each, net.multiple) for each in both))[0]
    assert torch.equal(crn_imle.translate(net, *both), whole[..., :37, :45].clamp(-1, 1))


def test_interpolation_ends_at_two_samples_and_keeps_the_variance():
    state, pair = ready()
    cfg = replace(TINY, ends=(2, 5), samples=4, output="o.png")
    rows = crn_imle.interpolate(cfg, state, crn_imle.dataset(cfg, "test"))
    second, fifth = crn_imle.draw(state, pair, cfg, crn_imle.own_seeds(pair, cfg, 5))[[1, 4]]
    for row in rows.values():
        torch.testing.assert_close(row[0], second, atol=1e-4, rtol=0)
        torch.testing.assert_close(row[-1], fifth, atol=1e-4, rtol=0)
    a, b = torch.randn(2, 100_000)
    assert crn_imle.between(a, b, .5).var().item() == pytest.approx(.5, rel=.03)
    assert crn_imle.between(a, b, .5, linear=False).var().item() == pytest.approx(1, rel=.03)
    with common.Image.open("o_linear.gif") as film:
        assert film.n_frames == 6
    crn_imle.interpolate(cfg, state, crn_imle.dataset(cfg, "test"))      # our own is replaced


def test_transfer_shares_a_noise_between_layouts():
    state, _ = ready()
    test_set, cfg = crn_imle.dataset(TINY, "test"), replace(TINY, samples=2, output="o.png")
    made = crn_imle.transfer(cfg, state, test_set)
    for i, pair in enumerate(crn_imle.five(test_set, state, cfg)):
        for j in range(2):
            z = crn_imle.noise_of(TINY.seed + j, pair, TINY)
            assert torch.equal(made[i, j], crn_imle.translate(state.generator, pair["input"], z)[0])


def test_edits_keep_the_noise_of_the_layout():
    state, pair = ready()
    cfg = replace(TINY, set=("car=road", "road=road"), samples=2, output="o.png")
    made = crn_imle.edit(cfg, state, crn_imle.dataset(TINY, "test"))
    assert made.shape == (3, 2, 3, 32, 32)
    assert torch.equal(made[0], crn_imle.draw(state, pair, cfg, crn_imle.own_seeds(pair, cfg, 2)))
    assert torch.equal(made[1], made[2]) and not torch.equal(made[0], made[1])
    table = common.class_table("streets")
    label, want = torch.zeros(2, 8, 9, dtype=torch.int64)
    painted = crn_imle.relabel(label, "1,2,4,8=car", table)
    want[1:4, 2:8] = table.names.index("car")
    assert torch.equal(painted, want) and label.sum() == 0
    assert torch.equal(crn_imle.relabel(painted, "10=3", table), want.clamp(max=3))


def test_fig_9s_car_drives_away_and_back_and_the_noise_moves_on_the_papers_line(monkeypatch):
    """(1 - t) a + t b from the darkest to the brightest; the fixed one is the brightest."""
    cfg, seen = replace(TINY, samples=5, output="o.png"), []
    frames, car = crn_imle.moving_car(cfg), common.TABLES["streets"].names.index("car")
    areas = [(frame["label"] == car).sum().item() for frame in frames]
    assert areas[0] == areas[4] > areas[1] == areas[3] > areas[2]
    state, _ = ready()
    pair = crn_imle.test_pair(frames[0], state, cfg)
    a, b = crn_imle.end_noises(state, pair, cfg)
    thirty = crn_imle.draw(state, pair, cfg, crn_imle.own_seeds(pair, cfg, 30))
    grey = thirty.mean((1, 2, 3))
    dark, bright = (crn_imle.translate(state.generator, pair["input"], z)[0] for z in (a, b))
    assert torch.equal(dark, thirty[grey.argmin()]) and torch.equal(bright, thirty[grey.argmax()])
    make = crn_imle.translate
    monkeypatch.setattr(crn_imle, "translate", lambda net, label, noise: (
        seen.append(noise), make(net, label, noise))[1])
    told = crn_imle.video(cfg, state, frames)
    assert 0 < told["fixed"] < told["moving"]
    for k, (fixed, moving) in enumerate(zip(seen[-10:-5], seen[-5:])):
        torch.testing.assert_close(fixed, b)
        torch.testing.assert_close(moving, (1 - k / 4) * a + k / 4 * b)


# --------------------------------------------------------------------------------------- Evaluation

def test_variance_protocol_against_hand_values():
    layout = torch.tensor([[0, 0], [1, 1]])
    same = torch.rand(1, 3, 2, 2).expand(9, -1, -1, -1)
    assert crn_imle.diversity(same, layout, 3)[:2].abs().max() < 1e-12
    assert crn_imle.diversity(same, layout, 3)[2].isnan()      # an absent class
    two = torch.zeros(9, 3, 2, 2)
    two[:3, :, 0, 0] = 1                                       # 3 of 9 at one of two pixels
    v = crn_imle.diversity(two, layout, 2)
    assert v[0].item() == pytest.approx((1 / 3 * 2 / 3) / 2) and v[1] == 0


def test_table_1_averages_over_layouts():
    v = [torch.tensor([.2, torch.nan, .9]), torch.tensor([.4, .1, .9])]
    areas = [torch.tensor([10, 0, 9]), torch.tensor([5, 5, 9])]
    row = crn_imle.summarise(v, areas, ["sky", "road", "unknown"])
    assert row["sky"] == pytest.approx(.3) and row["road"] == pytest.approx(.05)
    assert row["overall"] == pytest.approx((10 * .2 + 5 * .4 + 5 * .1) / 20)


def test_nine_come_from_nine_clusters():
    centres = torch.rand(9, 3, 1, 1)
    images = centres.repeat(4, 1, 8, 8) + .001 * torch.rand(36, 3, 8, 8)
    picks = crn_imle.spread_nine(images)
    assert len(picks) == 10
    for pick in picks:
        assert sorted(int(i) % 9 for i in pick) == list(range(9))
    assert len({tuple(pick.tolist()) for pick in picks}) > 1
    assert len(crn_imle.spread_nine(torch.zeros(12, 3, 8, 8))[0]) == 1         # one cluster only


def test_gta_has_twenty_classes():
    """19 that are scored, and all else as "other", as in the released code."""
    cfg = replace(TINY, classes="cityscapes")
    names = crn_imle.class_names(cfg)
    assert len(names) == 20 and names[0] == "road" and names[13] == "car" and names[19] == "other"
    ids = crn_imle.layout_of(torch.tensor([[7, 26, 23, 0, 34, 33]]), cfg)
    assert ids.tolist() == [[0, 13, 10, 19, 19, 18]]


@pytest.mark.parametrize("size, n", [((256, 512), 7), ((512, 1024), 8), ((1024, 2048), 9),
                                     ((64, 64), 5), ((96, 192), 5), ((32, 32), 4)])
def test_modules_go_down_to_four_rows(size, n):
    cfg = crn_imle.fit_modules(Config(size=size))
    assert cfg.modules == n and 4 <= size[0] >> (n - 1) < 8


def test_a_search_that_was_broken_off_is_begun_anew(monkeypatch):
    """A second Ctrl-C, in the third epoch's search: what was before is saved, and the run goes on
    as if it had never been stopped."""
    line = f"{LINE} --lr-drop 1 --released --pixel-weight 2"
    plain, calls = crn_imle.distance, []

    def broken_off(*arguments):
        calls.append(arguments)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(crn_imle, "distance", broken_off)
        assert as_user("crn_imle", f"{line} --out r")[0] == 130
    assert place("r")[0] == 4
    works("crn_imle", "--resume --out r --steps 5")
    works("crn_imle", f"{line} --out whole --steps 5")
    assert_same(*({k: v for k, v in stored(run).items() if k not in ("config", "log")}
                  for run in ("r", "whole")))


@pytest.mark.slow
def test_two_processes_share_the_search_and_average_the_gradients():
    """Two processes, a photo each: the same S, z* and lambda, and the steps of batches of two."""
    line = f"{LINE} --steps 5 --lr-drop 1 --released"
    result = torchrun(f"{crn_imle.__file__} {line} --batch-size 1 --out two")
    assert result.returncode == 0, result.stderr[-3000:]
    works("crn_imle", f"{line} --batch-size 2 --out one")
    two, one = stored("two"), stored("one")
    assert torch.equal(two["photos"]["chosen"], one["photos"]["chosen"])
    weights = [run["generator"] | {"lambda": run["balance"]["weights"]} for run in (two, one)]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=2e-5)


# ------------------------------------------------------------------------------ From a shell

@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps on the streets. Tests read it and write elsewhere."""
    out = tmp_path_factory.mktemp("shared") / "imle"
    works("crn_imle", f"{LINE} --steps 2 --out {out}")
    return out


def test_the_papers_figures_have_a_mode_each(run):
    """Fig. 3 to 5 and 7 to 10 on the streets, without any file; and on layouts of one's own."""
    for name in "ab":
        label_map(f"in/{name}.png", 40, 48)
    checkpoint = f"--checkpoint {run / 'checkpoint.pt'} --output"
    works("crn_imle", f"interpolate {checkpoint} own --input in --item b --ends 3 4")
    for mode in ("video", "transfer"):
        works("crn_imle", f"{mode} {checkpoint} own/{mode}.png --input in")
    works("crn_imle", f"sample {checkpoint} s --limit 1 --samples 19")
    assert size_of("s/street_1000000_grid.png") == (5 * 34 + 2, 4 * 34 + 2)
    works("crn_imle", f"interpolate {checkpoint} i --samples 3 --item street_1000002")
    works("crn_imle", f"transfer {checkpoint} t.png --samples 2")
    works("crn_imle", f"edit {checkpoint} e.png --set car=road 0,0,9,9=building --set 3=4")
    said = works("crn_imle", f"video {checkpoint} v.png --samples 3")
    assert "mean change where labels stay" in said
    for path, columns, rows in (("i/interpolate.png", 4, 2), ("t.png", 3, 5), ("e.png", 4, 4),
                                ("v.png", 3, 5)):
        assert size_of(path) == (columns * 34 + 2, rows * 34 + 2)
    assert {p.name for p in Path().rglob("*.gif") if "own" not in p.parts} == {
        "interpolate_linear.gif", "interpolate_variance-preserving.gif", "v_fixed.gif",
        "v_moving.gif"}


def test_a_crns_samples_are_its_outputs():
    crn = Path("crn")
    works("crn_imle", f"{LINE} --model crn --outputs 2 --steps 2 --out {crn}")
    works("crn_imle", f"sample --out {crn} --limit 1 --output o")
    assert len(list(Path("o").iterdir())) == 3                 # both outputs, and the grid
    works("crn_imle", f"edit --out {crn} --set car=road --output e.png")
    works("crn_imle", f"evaluate --out {crn} --limit 2")
    metrics = json.loads((crn / "metrics.json").read_text())
    assert metrics["samples"] == 2 and metrics["layouts"] == 2


def test_evaluate_keeps_table_2s_images(run):
    """For each layout the one of nine samples that is nearest to the photo in l1; they are the
    images that `sample` makes of the same layouts, whichever they are among."""
    works("crn_imle", f"evaluate --out {run} --samples 12 --limit 2")
    metrics = json.loads((run / "metrics.json").read_text())
    works("crn_imle", f"sample --out {run} --limit 3 --output all")
    test_set = common.Dataset("", "test", (32, 32), limit=2)
    for i, name in enumerate(test_set.names):
        errors = [(common.read_image(Path(f"all/{name}_{k}.png")) / 127.5 - 1
                   - test_set[i]["image"]).abs().mean().item() for k in range(1, 10)]
        k = int(np.argmin(errors)) + 1
        assert (run / f"best/{name}.png").read_bytes() == Path(f"all/{name}_{k}.png").read_bytes()
        assert metrics["best-of-n l1"] < max(errors) / 2


def test_other_photos_than_the_run_began_with_are_refused():
    """Rarity and S count the photos: with another number of them they mean other photos."""
    state, _ = state_of(TINY)
    parts = {name: part.state_dict() for name, part in vars(state).items()}
    crn_imle.load(state, parts, "r", everything=True)
    with refused("r", "photos", "rarity"):
        photos = crn_imle.Photos(11, TINY).state_dict()
        crn_imle.load(state, parts | {"photos": photos}, "r", everything=True)


def test_algorithm_1_stands_in_one_piece_and_its_lines_are_named_where_they_are_carried_out():
    block = re.search(r"\nAlgorithm 1.*?\n\n", crn_imle.__doc__, re.DOTALL)[0]
    lines = dict(re.findall(r"^ +(\d+)  .*?  +(\S[\w., ]*)$", block, re.MULTILINE))
    assert list(map(int, lines)) == list(range(1, 13))
    for names in lines.values():
        for name in names.split(", "):
            assert callable(getattr(crn_imle, name.partition(".")[0])), name
    code = Path(crn_imle.__file__).read_text().partition('\n"""\n')[2]
    said = re.findall(r"(?:Alg\. 1, |# )lines? (\d+)(?: (?:to|and) (\d+))?", code)
    named = {n for a, b in said for n in range(int(a), int(b or a) + 1)}
    assert named == set(range(1, 13))
