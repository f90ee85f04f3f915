"""What the conditional IMLE paper (and CRN) claims, tested on crn_imle.py.

The oracles share no code with the script: numpy in float64 with loops, printed numbers, limits.
What all scripts owe their users (resuming, signals, damage, ...) is in test_contract.py.
"""

import itertools
import json
import math
import re
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    TINY as LINE, as_user, assert_same, fails, label_map, parameters, picture, place,
    refused, size_of, stored, torchrun, works)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import common
import crn_imle
from crn_imle import Config, Generator, NoiseEncoder

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("draw_each_street_once", "no_plots")
TINY = Config(size=(32, 32), width=6, noise_channels=3, encoder_width=5, layers=("conv1_1",),
              classes="streets", pool=6, candidates=4, inner_steps=3, vgg="random", limit=12,
              lr=1e-3, gpu=-1)


LINE = LINE["crn_imle"]


def state_of(cfg: Config, search: bool = False):
    """A state with the rarity of the first streets as train makes it, the streets, the loader; and
    with the distances of the first epoch's search."""
    state, train_set = crn_imle.build(cfg, CPU), crn_imle.dataset(cfg, "train")
    photos = state.photos = crn_imle.Photos(len(train_set), cfg)
    colours, photos.areas = crn_imle.survey(train_set, cfg, CPU)
    photos.rarity = crn_imle.rarity_scores(colours)
    photos.chosen[:, 0] = crn_imle.populate(photos.rarity, photos.areas, cfg, 0)
    loader = crn_imle.Batches(train_set, cfg, CPU, photos)
    if search:
        return state, loader, crn_imle.search(state, train_set, cfg, 0)
    return state, loader


def batches_of(state, loader, cfg) -> list[dict]:
    """The rest of an epoch, as train_step takes it."""
    return [crn_imle.recall(crn_imle.make_pair(batch, cfg), state, cfg) for batch in loader]


def photo(state, loader, k: int, cfg) -> dict:
    """Training image k as a batch of one, with its mask."""
    pair = crn_imle.test_pair(loader.examples[k] | {"drawn": [(k, 0)]}, state, cfg)
    return crn_imle.recall(pair, state, cfg)


def a_run() -> SimpleNamespace:
    """What begin_epoch needs of a run: nobody stops it, and it keeps what is printed."""
    told = []
    return SimpleNamespace(asked=0, stopped=lambda now=False: False, told=told,
                           bar=SimpleNamespace(write=told.append))


def save(state, cfg, path) -> str:
    common.save_file({"script": "crn_imle", "config": asdict(cfg), "balance": state.balance
                      .state_dict(), "generator": state.generator.state_dict()}, Path(path))
    return str(path)


# --------------------------------------------------------------------------------------- Networks

def test_parameter_counts_to_the_unit():
    """The released checkpoints' sizes: CRN with one and nine outputs, 512p and 1024p, and IMLE."""
    with torch.device("meta"):
        for n, net in {97_863_171: Generator(20), 97_875_483: Generator(20, 9),
                       98_622_851: Generator(20, modules=8), 98_674_531: Generator(20, modules=9),
                       98_534_541: Generator(20, noise_channels=10),
                       118_410: NoiseEncoder(20, 10)}.items():
            assert parameters(net) == n
        refine = Generator(20, noise_channels=10).refine
        assert [parameters(m) for m in refine] == [
            9_717_760, *[19_154_944] * 4, 7_218_176, 4_858_880]


def test_a_forward_pass_costs_what_was_counted_by_hand():
    """GFLOP at 256 x 512, one multiplication and addition being two: CRN, and IMLE."""
    for d, gflop in ((0, 2146.7), (10, 2194.8)):
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as count:
            noise = torch.zeros(1, d, 256, 512) if d else None
            Generator(20, noise_channels=d)(torch.zeros(1, 20, 256, 512), noise)
        assert count.get_total_flops() / 1e9 == pytest.approx(gflop, abs=.1)


def test_module_sizes_are_those_of_sec_3_3_1():
    """M_i works at 2^(i+2) x 2^(i+3)."""
    net, sizes = Generator(4, 2, width=4, noise_channels=2, encoder_width=3), []
    for module in net.refine:
        module.register_forward_hook(lambda m, x, y: sizes.append(tuple(y.shape[2:])))
    label, noise = torch.zeros(1, 4, 256, 512), torch.randn(1, 2, 256, 512)
    with torch.no_grad():
        assert net(label, noise).shape == (1, 2, 3, 256, 512)
    assert sizes == [(2 ** (i + 2), 2 ** (i + 3)) for i in range(7)]


def test_layer_norm_is_over_c_h_w_with_gains_per_channel():
    norm = crn_imle.RefinementModule(3, 4).layers[1]
    with torch.no_grad():
        norm.weight.copy_(torch.randn(4))
        norm.bias.copy_(torch.randn(4))
    x = torch.randn(2, 4, 5, 6) * 3 + 1
    v = x.double().numpy()
    for b in range(2):
        mean = sum(v[b].ravel()) / v[b].size
        variance = sum((v[b].ravel() - mean) ** 2) / v[b].size
        want = (v[b] - mean) / np.sqrt(variance + 1e-5)
        want = want * norm.weight.detach().numpy()[:, None, None] \
            + norm.bias.detach().numpy()[:, None, None]
        np.testing.assert_allclose(norm(x)[b].detach().numpy(), want, atol=2e-5)
    assert norm.weight.shape == (4,)


def test_label_pyramid_holds_shares_and_noise_pyramid_strides():
    layout = torch.randint(0, 5, (1, 64, 128))
    labels = crn_imle.label_pyramid(nn.functional.one_hot(layout, 5).movedim(-1, 1).float(), 5)
    assert [tuple(x.shape[2:]) for x in labels] == [(64 >> i, 128 >> i) for i in range(5)]
    for x in labels:
        torch.testing.assert_close(x.sum(1), torch.ones_like(x[:, 0]))
    assert labels[3][0, 2, 1, 3] == (layout[0, 8:16, 24:32] == 2).float().mean()
    noise = torch.randn(1, 10, 256, 512)
    coarse = crn_imle.noise_pyramid(noise, 7)[6]
    assert coarse.shape == (1, 10, 4, 8) and torch.equal(coarse, noise[..., ::64, ::64])
    assert abs(coarse.std() - 1) < 0.2                         # averaging would leave 1/64


def test_the_head_lays_outputs_out_colour_by_colour():
    """Output u is channels u, 9 + u and 18 + u."""
    net = Generator(3, 9, width=4, modules=3)
    label = nn.functional.one_hot(torch.randint(0, 3, (1, 16, 16)), 3).movedim(-1, 1).float()
    raw = {}
    net.head.register_forward_hook(lambda m, x, y: raw.update(y=y))
    made = net(label)
    for u in (0, 4, 8):
        assert torch.equal(made[0, u], raw["y"][0, [u, 9 + u, 18 + u]])


def test_features_are_enlarged_with_corners_aligned():
    """A corner pixel of the coarse features stays in the corner."""
    net, seen = Generator(2, width=3, modules=2), {}
    net.refine[0].register_forward_hook(lambda m, x, y: seen.update(coarse=y))
    net.refine[1].register_forward_pre_hook(lambda m, x: seen.update(fine=x[0]))
    net(torch.rand(1, 2, 8, 8))
    fine = seen["fine"][:, :3]                                 # features first, then the label
    for i, j in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(fine[..., i, j], seen["coarse"][..., i, j])


def test_broadcast_noise_is_one_vector():
    z = crn_imle.draw_noise(3, replace(TINY, noise="broadcast"), (5, 7), CPU)
    assert z.shape == (3, 5, 7) and torch.equal(z, z[:, :1, :1].expand(3, 5, 7))
    assert len(crn_imle.draw_noise(3, TINY, (5, 7), CPU).unique()) == 105


def test_noise_reaches_every_pixel_and_every_module():
    net = Generator(2, width=4, modules=4, noise_channels=2, encoder_width=0)
    for i, module in enumerate(net.refine):
        weight = module.layers[0].weight
        assert weight.shape[1] == (4 if i else 0) + 2 + 2
    noise = torch.randn(1, 2, 32, 32, requires_grad=True)
    net(torch.rand(1, 2, 32, 32), noise).square().sum().backward()
    assert noise.grad.abs().sum(1).gt(0).all()


# ----------------------------------------------------------------------------------------- Losses

def test_eq_1_and_the_masked_loss_against_loops():
    rng = np.random.default_rng(0)
    shapes = [(2, 3, 8, 8), (2, 4, 8, 8), (2, 5, 2, 4)]
    a, b = ([rng.normal(size=s) for s in shapes] for _ in range(2))
    mask, w = rng.uniform(.1, 1, (2, 8, 8)), [1.0, .5, 3.0]
    want = np.zeros(2)
    for n in range(2):
        for (x, y), lam in zip(zip(a, b), w):
            _, c, h, v = x.shape
            for i in range(h):
                for j in range(v):
                    cell = mask[n, i * 8 // h:(i + 1) * 8 // h, j * 8 // v:(j + 1) * 8 // v].mean()
                    want[n] += lam * cell * np.abs(x[n, :, i, j] - y[n, :, i, j]).sum() / (
                        c * h * v)
    tensors = [[torch.from_numpy(x).float() for x in some] for some in (a, b)]
    got = crn_imle.distance(*tensors, torch.from_numpy(mask).float(), torch.tensor(w))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def crn_inputs(k: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = [(3, 8, 8), (4, 4, 4)]
    real = [rng.normal(size=(2, *s)) for s in shapes]
    fake = [rng.normal(size=(2, k, *s)) for s in shapes]
    layout = rng.integers(0, 3, (2, 8, 8))                     # class 3 never occurs
    return real, fake, np.eye(4)[layout].transpose(0, 3, 1, 2), np.array([1.0, 2.5])


def crn_loss(real, fake, label, w, per_image=False):
    k = fake[0].shape[1]
    flat = [torch.from_numpy(x).float().flatten(0, 1) for x in fake]
    many = [torch.from_numpy(x).float().repeat_interleave(k, 0) for x in real]
    return crn_imle.diversity_loss(many, flat, torch.from_numpy(label).float(),
                                   torch.from_numpy(w).float(), per_image).item()


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("k", [1, 3])                         # of one output: the plain distance
def test_diversity_loss_against_loops(k, per_image):
    real, fake, label, w = crn_inputs(k)
    total = 0
    for n in range(2):
        parts = np.zeros((k, 4))
        for x, y, lam in zip(real, fake, w):
            size = x.shape[-1]
            step = 8 // size
            for u in range(k):
                for i in range(size):
                    for j in range(size):
                        error = np.abs(x[n, :, i, j] - y[n, u, :, i, j]).mean()
                        for p in range(4):
                            share = label[n, p, i * step:(i + 1) * step,
                                          j * step:(j + 1) * step].mean()
                            parts[u, p] += lam * share * error / size ** 2
        assert (parts[:, 3] == 0).all()                        # an absent class adds exactly 0
        parts = parts.sum(1, keepdims=True) if per_image else parts
        total += sum(.999 * min(parts[:, p]) + .001 * parts[:, p].mean()
                     for p in range(parts.shape[1]))
    assert crn_loss(real, fake, label, w, per_image) == pytest.approx(total / 2, rel=1e-5)


def test_per_class_min_lets_each_class_have_another_winner():
    """The flaw that per-image repairs: two half-right outputs count as one right image."""
    label = np.zeros((1, 2, 8, 8))
    label[:, 0, :4], label[:, 1, 4:] = 1, 1
    real, fake = [np.zeros((1, 3, 8, 8))], [np.ones((1, 2, 3, 8, 8))]
    fake[0][0, 0, :, :4] = 0
    fake[0][0, 1, :, 4:] = 0
    w = np.array([1.0])
    assert crn_loss(real, fake, label, w) == pytest.approx(.001 * .5)
    assert crn_loss(real, fake, label, w, True) == pytest.approx(.5)


def test_lambda_makes_the_contributions_equal():
    means = torch.tensor([.2, .1, .4, .05])
    w = crn_imle.balanced_weights(means, 1.0)
    torch.testing.assert_close(w * means, torch.full((4,), .2))
    literal = crn_imle.balanced_weights(means, 0.0)
    assert literal[0] == 0 and torch.equal(literal[1:], w[1:])
    released = list(crn_imle.RELEASED_WEIGHTS.values())
    np.testing.assert_allclose(released, [.714, .556, .769, .455, 16.13], rtol=2e-3)


def test_vgg_pools_by_average_and_takes_normalised_images():
    vgg = crn_imle.build(replace(TINY, layers=("conv1_2", "conv2_1")), CPU).vgg
    assert vgg.normalise and any(isinstance(m, nn.AvgPool2d) for m in vgg.trunk)
    made = crn_imle.features(vgg, torch.rand(1, 3, 32, 32))
    assert [tuple(f.shape) for f in made] == [(1, 3, 32, 32), (1, 64, 32, 32), (1, 128, 16, 16)]


def test_a_random_vgg_answers_to_edges_and_not_to_brightness(tmp_path):
    """Photos that differ in brightness alone have equal features away from the padded border; a
    trained VGG is left as it is."""
    cfg = replace(TINY, layers=("conv1_2", "conv3_2"), vgg_width=4)
    vgg, image = crn_imle.build(cfg, CPU).vgg, torch.rand(1, 3, 64, 64)
    for dark, bright in zip(vgg(image - .5).values(), vgg(image).values()):
        inner = (..., *[slice(bright.shape[-1] // 2 - 2, bright.shape[-1] // 2 + 2)] * 2)
        assert bright[inner].abs().sum() > 0
        torch.testing.assert_close(dark[inner], bright[inner], rtol=1e-4, atol=1e-5)
    trained = common.vgg_trunk(19, 4)
    torch.save({f"features.{k}": v for k, v in trained.state_dict().items()}, tmp_path / "vgg.pt")
    vgg = crn_imle.build(replace(cfg, vgg=str(tmp_path / "vgg.pt")), CPU).vgg
    assert torch.equal(vgg.trunk[0].weight, trained[0].weight)


# -------------------------------------------------------------------------------------- Rebalancing

def test_survey_measures_mean_colours_and_leaves_blank_images_out(tmp_path):
    for folder in ("train_img", "train_label"):
        (tmp_path / folder).mkdir()
    rng, photos = np.random.default_rng(0), []
    labels = rng.integers(0, 3, (2, 32, 32)).astype(np.uint8)
    for i in range(2):
        photos.append(rng.integers(0, 256, (32, 32, 3), np.uint8) if i else
                      np.full((32, 32, 3), 77, np.uint8))
        common.Image.fromarray(photos[i]).save(tmp_path / f"train_img/{i}.png")
        common.Image.fromarray(labels[i]).save(tmp_path / f"train_label/{i}.png")
    cfg = replace(TINY, data=str(tmp_path), classes="4", limit=0)
    colours, areas = crn_imle.survey(crn_imle.dataset(cfg, "train"), cfg, CPU)
    assert colours.shape == (2, 5, 3) and colours[0].isnan().all()            # a blank image
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


def numpy_kde(x: np.ndarray) -> list[float]:
    """A direct sum, with Scott's factor."""
    h = len(x) ** (-2 / 7) * (np.cov(x.T) + np.eye(3))
    inverse, norm = np.linalg.inv(h), math.sqrt((2 * math.pi) ** 3 * np.linalg.det(h))
    return [sum(math.exp(-(a - b) @ inverse @ (a - b) / 2) for b in x) / len(x) / norm for a in x]


def test_kde_is_a_direct_sum_with_scotts_factor():
    x = np.random.default_rng(0).normal(size=(23, 3)) * (20, 5, 60) + (100, 0, 30)
    density = crn_imle.gaussian_kde(torch.from_numpy(x)).exp()
    np.testing.assert_allclose(density, numpy_kde(x), rtol=1e-9)


def test_rarity_scores():
    colours = made_up_colours()
    scores = crn_imle.rarity_scores(colours)
    assert scores.isfinite().all() and torch.equal(scores > 0, ~colours[..., 0].isnan())
    assert scores[:, 0].argmax() == 3
    valid = [0, 1, 3]
    for k in range(5):                                         # under 10 images: the lowest score
        assert scores[k, 2] == min(scores[k, p] for p in valid)
    density = numpy_kde(colours[:, 0].numpy())[3]
    assert scores[3, 0].item() == pytest.approx(1 / density, rel=1e-9)
    few = crn_imle.rarity_scores(colours[:4])                  # under ten images: all are equal
    assert torch.equal(few, torch.ones_like(few))


def test_masks_lie_in_0_1_and_follow_the_scores():
    scores = crn_imle.rarity_scores(made_up_colours())
    layout = torch.tensor([[[0, 1], [3, 3]], [[0, 0], [1, 1]]])
    mask = crn_imle.paint_masks(layout, scores[[0, 7]])
    for b, k in enumerate((0, 7)):
        for i in range(2):
            for j in range(2):
                want = scores[k, layout[b, i, j]] / max(scores[k])
                assert mask[b, i, j].item() == pytest.approx(want.item(), rel=1e-5)
    assert mask.max() <= 1 and mask.min() > 0


def test_s_follows_the_scores_of_the_five_largest_classes():
    g = torch.Generator().manual_seed(0)
    rarity = torch.rand(30, 7, generator=g, dtype=torch.float64)
    rarity[11] = 0                                             # a blank image
    areas = torch.tensor([7.0, 6, 5, 4, 3, 2, 1])
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


def test_largest_classes_are_those_of_the_largest_area():
    rarity = torch.ones(3, 8, dtype=torch.float64)
    rarity[:, 6] = 0                                           # only in blank images: no scores
    areas = torch.tensor([5.0, 1, 9, 2, 8, 3, 100, 4])
    assert crn_imle.largest_classes(rarity, areas).tolist() == [2, 4, 0, 7, 5]
    assert len(crn_imle.largest_classes(rarity[:, :2], areas[:2])) == 2


# -------------------------------------------------------------------------------------- Algorithm 1

def test_the_search_is_exhaustive_and_leaves_no_trace():
    """sigma(i) by brute force, one candidate at a time; no graph, no gradient."""
    cfg = replace(TINY, search_batch=3, rebalance="both")
    state, loader, losses = state_of(cfg, search=True)
    assert not losses.requires_grad
    assert all(p.grad is None for p in state.generator.parameters())
    assert losses.shape == (6, 4) and losses.std(1).min() > 0
    for i, (k, seed) in enumerate(state.photos.chosen.tolist()):
        pair = photo(state, loader, k, cfg)
        real = crn_imle.features(state.vgg, pair["image"])
        seeds = [hash((cfg.seed, 0, i, j)) % 2 ** 62 for j in range(4)]
        alone = []
        for s in seeds:
            z = crn_imle.draw_noise(s, cfg, (32, 32), CPU)[None]
            fake = crn_imle.features(state.vgg, state.generator(pair["input"], z)[:, 0])
            alone.append(crn_imle.distance(real, fake, pair["mask"], state.balance.weights).item())
        np.testing.assert_allclose(losses[i], alone, rtol=1e-4)
        assert seed == seeds[int(np.argmin(alone))]
        assert min(alone) == pytest.approx(losses[i].min().item(), rel=1e-4)


def test_search_batches_and_kept_features_change_nothing():
    found = [state_of(replace(TINY, search_batch=n, keep_features=keep), search=True)
             for n, keep in ((1, 0), (4, 0), (4, 9))]
    for state, _, losses in found[1:]:
        assert torch.equal(state.photos.chosen, found[0][0].photos.chosen)
        torch.testing.assert_close(losses, found[0][2], rtol=1e-4, atol=1e-6)


def test_an_inner_step_lowers_the_loss_at_the_noise_found():
    """Images are rendered anew: the same batch gives a lower loss after each update."""
    cfg = replace(TINY, rebalance="both")
    state, loader, found = state_of(cfg, search=True)
    slot, batch = loader.slots()[0], batches_of(state, loader, cfg)[0]
    losses = [crn_imle.train_step(state, batch, cfg)["loss"].item() for _ in range(4)]
    assert losses[0] == pytest.approx(found[slot].min().item(), rel=1e-4)      # L^, at sigma(i)
    assert losses[0] > losses[1] > losses[3]


def test_batches_carry_the_noise_and_the_mask_of_their_photo():
    cfg = replace(TINY, batch_size=2, keep_features=5, rebalance="both")
    state, loader, _ = state_of(cfg, search=True)
    slots, photos = loader.slots(), state.photos
    batches = batches_of(state, loader, cfg)
    assert len(batches) == 3 and len(slots) == 6 and loader.epoch == 1
    for row, batch in zip(np.array(slots).reshape(3, 2), batches):
        for b, (k, seed) in enumerate(photos.chosen[row].tolist()):
            item = loader.examples[k]
            assert batch["name"][b] == item["name"]
            assert torch.equal(batch["noise"][b], crn_imle.draw_noise(seed, cfg, (32, 32), CPU))
            mask = crn_imle.paint_masks(item["label"][None], photos.rarity[[k]])[0]
            assert torch.equal(batch["mask"][b], mask)
            real = crn_imle.features(state.vgg, item["image"][None])
            for got, want in zip(crn_imle.real_features(batch, state), real):
                torch.testing.assert_close(got[b], want[0], rtol=1e-4, atol=1e-5)
    loader.epoch, loader.seen, loader.step, loader.over = 0, 2, 1, False       # the epoch's rest
    rest = batches_of(state, loader, cfg)
    assert [b["name"] for b in rest] == [b["name"] for b in batches[1:]]


@pytest.mark.parametrize("rebalance, masked, binned", [
    ("none", False, False), ("mask", True, False), ("bins", False, True), ("both", True, True)])
def test_the_four_cells_of_rebalancing(rebalance, masked, binned):
    cfg = replace(TINY, rebalance=rebalance, pool=500)
    state, loader = state_of(cfg)
    pair = photo(state, loader, 0, cfg)
    assert bool((pair["mask"] != 1).any()) == masked and pair["mask"].max() == 1
    share = torch.bincount(state.photos.chosen[:, 0], minlength=12) / 500
    assert bool((share - 1 / 12).abs().max() > .06) == binned


def test_an_epoch_of_crn_shows_each_photo_once():
    for steps, times in ((0, [1]), (30, [2, 3])):              # 30 of 12: two rounds and a half
        cfg = replace(TINY, model="crn", outputs=2, inner_steps=steps)
        loader = crn_imle.Batches(crn_imle.dataset(cfg, "train"), cfg, CPU,
                                  crn_imle.Photos(0, cfg))
        slots = torch.tensor(loader.slots())
        assert torch.bincount(slots, minlength=12).unique().tolist() == times
        assert [k for batch in loader for k, _ in batch["drawn"]] == slots.tolist()


def test_lambda_is_measured_once_between_epochs():
    cfg = replace(TINY, calibrate=2, layers=("conv1_1", "conv2_1"), epochs=9)
    state, loader = state_of(cfg)
    for epoch in range(4):
        run = a_run()
        assert crn_imle.begin_epoch(state, loader, run, cfg)
        assert any("lambda" in line for line in run.told) == (epoch == 2)
        before, sums = state.balance.weights.clone(), torch.zeros(3)
        for batch in batches_of(state, loader, cfg):
            losses = crn_imle.train_step(state, batch, cfg)
            sums += torch.stack([losses[k] for k in ("pixel", "conv1_1", "conv2_1")])
        assert torch.equal(state.balance.weights, before)      # never between search and update
        torch.testing.assert_close(state.balance.sums, sums)
        if epoch == 1:
            expected = sums[0] / sums
    torch.testing.assert_close(state.balance.weights, expected)


def test_the_released_encoder_restart():
    cfg = replace(TINY, lr_drop=1, renew_encoder=True, epochs=2)
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


def test_one_batch_can_be_overfitted():
    cfg = replace(TINY, width=12, lr=3e-3)
    state, _ = ready(cfg)
    pair = crn_imle.test_pair(crn_imle.dataset(cfg, "train")[0], state, cfg)
    pair["noise"] = crn_imle.noise_of(0, pair, cfg)
    losses = [crn_imle.train_step(state, pair, cfg)["loss"].item() for _ in range(60)]
    assert losses[-1] < .4 * losses[0]


def test_gradients_reach_the_generator_and_nothing_else():
    for cfg in (TINY, replace(TINY, model="crn", outputs=3)):
        state, train_set = crn_imle.build(cfg, CPU), crn_imle.dataset(cfg, "train")
        batch = crn_imle.make_pair({k: v[None] if torch.is_tensor(v) else v
                                    for k, v in train_set[0].items()}, cfg)
        crn_imle.train_step(state, batch, cfg)
        assert all(p.grad is not None and p.grad.abs().sum() > 0
                   for p in state.generator.parameters())
        assert all(p.grad is None for p in state.vgg.parameters())


# ------------------------------------------------------------------------------------------ --init

def test_warm_start_without_noise_reproduces_crns_output_0():
    """With the new columns at 0 the image is CRN's first, for any z."""
    crn_cfg = replace(TINY, model="crn", outputs=4)
    crn = crn_imle.build(crn_cfg, CPU)
    path = save(crn, crn_cfg, "crn.pt")
    label = nn.functional.one_hot(torch.randint(0, 12, (1, 32, 32)), 12).movedim(-1, 1).float()
    want = crn.generator(label)[:, 0]
    warm = crn_imle.build(replace(TINY, init=(path,)), CPU).generator
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
    torch.testing.assert_close(warm(label, torch.randn(1, 3, 32, 32))[:, 0], want)


@pytest.mark.parametrize("change, measured, taken", [
    ({}, True, True), ({}, False, False), ({"layers": ("conv1_1",)}, True, False),
    ({"pixel_weight": 0.0}, True, False)])
def test_init_takes_a_measured_lambda_that_fits_and_keeps_it(change, measured, taken, capsys):
    """The release uses CRN's lambda throughout; measured anew it would be that of masked terms."""
    cfg = replace(TINY, model="crn", layers=("conv1_1", "conv2_1"))
    crn, want = crn_imle.build(cfg, CPU), torch.tensor([1.0, 2, 3])
    crn.balance.sums[:] = 6 / want
    if measured:
        crn.balance.measure()
        torch.testing.assert_close(crn.balance.weights, want)
    cfg = replace(TINY, **{"layers": cfg.layers, "init": (save(crn, cfg, "crn.pt"),),
                           "epochs": 9} | change)
    state, loader = state_of(cfg)
    assert ("measured anew" in capsys.readouterr().out) != taken
    if not taken:
        assert not state.balance.measured and state.balance.weights[1:].eq(1).all()
        return
    for epoch in range(3):
        run = a_run()
        crn_imle.begin_epoch(state, loader, run, cfg)
        torch.testing.assert_close(state.balance.weights, want)
        assert not any("lambda" in line for line in run.told)
        for batch in batches_of(state, loader, cfg):
            crn_imle.train_step(state, batch, cfg)


def test_imle_starts_from_a_crn_but_not_the_other_way():
    crn_cfg = replace(TINY, model="crn", outputs=4)
    files = {cfg.model: save(crn_imle.build(cfg, CPU), cfg, f"{cfg.model}.pt")
             for cfg in (crn_cfg, TINY)}
    with refused("imle.pt", "generator"):
        crn_imle.build(replace(crn_cfg, init=(files["imle"],)), CPU)
    with refused("crn.pt", "generator", "size mismatch"):
        crn_imle.build(replace(TINY, width=8, init=(files["crn"],)), CPU)
    works("crn_imle", f"{LINE} --model crn --outputs 2 --steps 2 --out crn")
    works("crn_imle", f"{LINE} --steps 3 --out warm --init crn/checkpoint.pt")
    assert place("warm")[0] == 3


# ---------------------------------------------------------------------------------------- Test time

def ready(cfg: Config = TINY) -> tuple[crn_imle.State, dict]:
    state = crn_imle.build(cfg, CPU)
    return state, crn_imle.test_pair(crn_imle.dataset(cfg, "test")[0], state, cfg)


def test_any_size_by_reflection_and_cropping():
    """What is cropped away was mirrored: the visible part is that of the mirrored whole."""
    state, _ = ready()
    net, h, w = state.generator, 37, 45
    layout = torch.randint(0, 12, (1, h, w))
    label = nn.functional.one_hot(layout, 12).movedim(-1, 1).float()
    noise = torch.randn(1, 3, h, w)
    made = crn_imle.translate(net, label, noise)
    assert made.shape == (1, 3, h, w)
    tall, wide = -h % net.multiple, -w % net.multiple
    pad = nn.ReflectionPad2d((0, wide, 0, tall))
    with torch.no_grad():
        whole = net(pad(label), pad(noise))[0]
    assert torch.equal(made, whole[..., :h, :w].clamp(-1, 1))


def test_draws_follow_the_seed_and_crn_has_its_outputs():
    state, pair = ready()
    a, b = crn_imle.draw(state, pair, TINY, 3), crn_imle.draw(state, pair, replace(TINY, seed=1), 2)
    assert torch.equal(a[1:], b) and a.abs().max() <= 1
    cfg = replace(TINY, model="crn", outputs=3)
    state, pair = ready(cfg)
    assert crn_imle.draw(state, pair, cfg, 2).shape == (2, 3, 32, 32)
    with refused("--samples 4", "3"):
        crn_imle.draw(state, pair, cfg, 4)


def test_interpolation_ends_at_its_ends_and_keeps_the_variance():
    state, pair = ready()
    rows = crn_imle.interpolate(replace(TINY, ends=(5, 9), frames=4, output="o"), state, pair)
    noise = [crn_imle.noise_of(s, pair, TINY) for s in (5, 9)]
    for row in rows.values():
        for frame, z in zip((row[0], row[-1]), noise):
            torch.testing.assert_close(frame, crn_imle.translate(state.generator, pair["input"],
                                                                 z)[0], atol=1e-4, rtol=0)
    a, b = torch.randn(2, 100_000)
    assert crn_imle.between(a, b, .5).var().item() == pytest.approx(.5, rel=.03)
    assert crn_imle.between(a, b, .5, linear=False).var().item() == pytest.approx(1, rel=.03)
    assert torch.equal(crn_imle.between(a, b, .25), .75 * a + .25 * b)
    with common.Image.open("o/linear.gif") as film:
        assert film.n_frames == 6


def test_transfer_uses_one_noise_on_many_layouts():
    state, _ = ready()
    test_set = crn_imle.dataset(TINY, "test")
    pairs = [crn_imle.test_pair(test_set[i], state, TINY) for i in range(3)]
    made = crn_imle.transfer(replace(TINY, samples=2, output="o.png"), state, pairs)
    for i, pair in enumerate(pairs):
        for j in range(2):
            z = crn_imle.noise_of(TINY.seed + j, pair, TINY)
            assert torch.equal(made[j, i], crn_imle.translate(state.generator, pair["input"], z)[0])


def test_edits_keep_the_noise():
    state, _ = ready()
    item = crn_imle.dataset(TINY, "test")[0]
    cfg = replace(TINY, set=("car=road", "road=road"), samples=2, output="o.png")
    made = crn_imle.edit(cfg, state, item)
    assert made.shape == (3, 2, 3, 32, 32)
    assert torch.equal(made[1], made[2]) and not torch.equal(made[0], made[1])
    table = common.class_table("streets")
    label = torch.zeros(8, 9, dtype=torch.int64)
    painted = crn_imle.relabel(label, "1,2,4,8=car", table)
    want = torch.zeros(8, 9, dtype=torch.int64)
    want[1:4, 2:8] = table.names.index("car")
    assert torch.equal(painted, want) and label.sum() == 0
    assert torch.equal(crn_imle.relabel(painted, "10=3", table), want.clamp(max=3))


def test_the_car_drives_away_and_comes_back():
    cfg = replace(TINY, frames=5, output="o")
    frames, car = crn_imle.moving_car(cfg), common.TABLES["streets"].names.index("car")
    areas = [(frame["label"] == car).sum().item() for frame in frames]
    assert areas[0] == areas[4] > areas[1] == areas[3] > areas[2]
    state, _ = ready()
    told = crn_imle.video(cfg, state, frames)
    assert 0 < told["fixed"] < told["moving"]


def test_fig_9_moves_the_noise_on_the_papers_line(monkeypatch):
    """(1 - t) a + t b from the darkest to the brightest; the fixed one is the brightest."""
    cfg, seen = replace(TINY, frames=5, output="o"), []
    state, _ = ready()
    pairs = [crn_imle.test_pair(frame, state, cfg) for frame in crn_imle.moving_car(cfg)]
    a, b = (crn_imle.noise_of(seed, pairs[0], cfg)
            for seed in crn_imle.dark_and_bright(state, pairs[0], cfg))
    make = crn_imle.translate
    monkeypatch.setattr(crn_imle, "translate", lambda net, label, noise: (
        seen.append(noise), make(net, label, noise))[1])
    crn_imle.video(cfg, state, crn_imle.moving_car(cfg))
    fixed, moving = seen[-10:-5], seen[-5:]
    for k in range(5):
        torch.testing.assert_close(fixed[k], b)
        torch.testing.assert_close(moving[k], (1 - k / 4) * a + k / 4 * b)


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


def test_table_1_averages_over_layouts_and_counts_absent_classes_both_ways():
    rows = crn_imle.summarise({
        "row": [torch.tensor([[.2, torch.nan]]), torch.tensor([[.4, .1]])],
        "area": [torch.tensor([10, 0]), torch.tensor([5, 5])]}, ["sky", "road"])["row"]
    assert rows["sky"]["variance"] == pytest.approx(.3)
    assert rows["road"]["variance"] == pytest.approx(.1)
    assert rows["road"]["absent as 0"] == pytest.approx(.05)
    assert rows["overall"]["variance"] == pytest.approx((10 * .2 + 5 * .4 + 5 * .1) / 20)


def test_nine_come_from_nine_clusters():
    centres = torch.rand(9, 3, 1, 1)
    images = centres.repeat(4, 1, 8, 8) + .001 * torch.rand(36, 3, 8, 8)
    picks = crn_imle.spread_nine(images)
    assert len(picks) == 10
    for pick in picks:
        assert sorted(int(i) % 9 for i in pick) == list(range(9))
    assert len({tuple(pick.tolist()) for pick in picks}) > 1
    assert len(crn_imle.spread_nine(torch.zeros(12, 3, 8, 8))[0]) == 9         # one cluster only


def test_best_of_is_the_nearest_in_l1():
    images, truth = torch.rand(5, 3, 4, 4) * 2 - 1, torch.rand(1, 3, 4, 4) * 2 - 1
    errors = [(image - truth[0]).abs().mean().item() / 2 for image in images]
    best = crn_imle.best_of(images, truth)
    assert best == (int(np.argmin(errors)), pytest.approx(min(errors), rel=1e-5))


# -------------------------------------------------------------------------------- Classes and sizes

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
    with refused("--size 100 200", "96 192"):                  # one that does halve
        crn_imle.fit_modules(Config(size=(100, 200)))


# ------------------------------------------------------------------------------ Stopping the search

def same(*runs: str) -> None:
    """All but the rows of the log, which also stand where a run was ended."""
    assert_same(*({k: v for k, v in stored(run).items() if k not in ("config", "log")}
                  for run in runs))


def interrupt_at(patch, function: str, when: int, number=signal.SIGINT) -> list[float]:
    """Raise a signal in call number `when` of a function of the script; when that was."""
    plain, times = getattr(crn_imle, function), []

    def told(*arguments):
        times.append(time.time())
        if len(times) == when:
            signal.raise_signal(number)
        return plain(*arguments)

    patch.setattr(crn_imle, function, told)
    return times


@pytest.mark.parametrize("function, when, number, step", [
    ("layout_of", 3, signal.SIGTERM, 0), ("distance", 1, signal.SIGINT, 0),
    ("distance", 11, signal.SIGINT, 2), ("distance", 19, signal.SIGTERM, 4)])
def test_a_stopped_search_is_saved_and_gone_on_with(function, when, number, step, monkeypatch):
    """In the survey and in three epochs' searches: saved, and then as if never stopped."""
    line = f"{LINE} --candidates 4 --search-batch 2 --calibrate 1 --lr-drop 1 --renew-encoder"
    signal.signal(number, lambda *_: None)                     # else it might end pytest
    with monkeypatch.context() as patch:
        times = interrupt_at(patch, function, when, number)
        code, out, err = as_user("crn_imle", f"{line} --out r")
    assert (code, err) == (128 + number, "") and "--resume --out r" in out
    assert len(times) <= when + 1 and place("r")[0] == step
    works("crn_imle", "--resume --out r --steps 5")
    works("crn_imle", f"{line} --out whole --steps 5")
    same("r", "whole")


def test_a_search_is_no_larger_than_the_steps_that_are_left(monkeypatch):
    """--steps 2 of 30 photos in S: two are searched; a larger --steps finds what is missing."""
    line = (f"{LINE} --batch-size 1 --pool 30 --inner-steps 12 --candidates 3 --search-batch 3 "
            "--save-every 99")
    with monkeypatch.context() as patch:
        times = interrupt_at(patch, "distance", -1)
        works("crn_imle", f"{line} --steps 2 --out r")
        assert len(times) <= 2
        assert (stored("r")["photos"]["chosen"][:, 1] >= 0).sum() <= 2
        works("crn_imle", "--resume --out r --steps 5")
        assert len(times) <= 5
    for steps in (14, 45):                                     # in the second epoch, in the fourth
        works("crn_imle", f"--resume --out r --steps {steps}")
        works("crn_imle", f"{line} --out whole{steps} --steps {steps}")
        same("r", f"whole{steps}")


WORKER = """
import dataclasses, torch, crn_imle
from test_crn_imle import TINY, a_run, batches_of, save, state_of
cfg = dataclasses.replace(TINY, seed=5, rebalance="both", calibrate=1, epochs=3, inner_steps=2)
device = crn_imle.pick_device(cfg)
state, loader = state_of(cfg)
for epoch in range(2):
    crn_imle.begin_epoch(state, loader, a_run(), cfg)
    for batch in batches_of(state, loader, cfg):
        crn_imle.train_step(state, batch, cfg)
torch.save({name: getattr(state, name).state_dict() for name in ("generator", "balance", "photos")},
           f"{torch.distributed.get_rank()}.pt")
"""


@pytest.mark.slow
def test_two_processes_share_the_search_and_average_the_gradients():
    """Two processes, a photo each: the same S, z* and lambda, and the steps of batches of two."""
    Path("worker.py").write_text(WORKER)
    result = torchrun("worker.py")
    assert result.returncode == 0, result.stderr[-3000:]
    cfg = replace(TINY, seed=5, batch_size=2, rebalance="both", epochs=3, inner_steps=2)
    state, loader = state_of(cfg)
    for _ in range(2):
        crn_imle.begin_epoch(state, loader, a_run(), cfg)
        for batch in batches_of(state, loader, cfg):
            crn_imle.train_step(state, batch, cfg)
    both = [torch.load(f"{rank}.pt") for rank in (0, 1)]
    assert_same(*both)
    assert torch.equal(both[0]["photos"]["chosen"], state.photos.chosen)
    for key, value in state.generator.state_dict().items():
        torch.testing.assert_close(both[0]["generator"][key], value, rtol=0, atol=2e-5)
    torch.testing.assert_close(both[0]["balance"]["weights"], state.balance.weights, rtol=1e-4,
                               atol=1e-5)


# ------------------------------------------------------------------------------ From a shell

@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps on the streets. Tests read it and write elsewhere."""
    out = tmp_path_factory.mktemp("shared") / "imle"
    works("crn_imle", f"{LINE} --steps 2 --out {out}")
    return out


@pytest.fixture(scope="module")
def crn(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shared") / "crn"
    works("crn_imle", f"{LINE} --model crn --outputs 2 --steps 2 --out {out}")
    return out


def test_a_checkpoint_holds_seeds_no_noise_and_no_images(run):
    content = stored(run)
    assert content["photos"]["chosen"].shape == (4, 2) and content["vgg"] == {}
    assert content["photos"]["rarity"].shape == (5, 12)


def test_the_papers_figures_have_a_mode_each(run):
    """Fig. 3 to 5 and 7 to 10 on the streets, without any file."""
    checkpoint = f"--checkpoint {run / 'checkpoint.pt'}"
    said = works("crn_imle", f"sample {checkpoint} --limit 1 --samples 19 --output s")
    assert size_of("s/street_1000000_grid.png") == (5 * 34 + 2, 4 * 34 + 2) and "differ by" in said
    works("crn_imle", f"interpolate {checkpoint} --output i --frames 3 --item street_1000002")
    assert {p.name for p in Path("i").iterdir()} == {
        "strip.png", "linear.gif", "variance-preserving.gif"}
    assert size_of("i/strip.png") == (4 * 34 + 2, 2 * 34 + 2)
    works("crn_imle", f"transfer {checkpoint} --output t.png --samples 2")
    assert size_of("t.png") == (5 * 34 + 2, 3 * 34 + 2)
    said = works("crn_imle", f"edit {checkpoint} --output e.png --set car=road 0,0,9,9=building "
                             "--set 3=4")
    assert size_of("e.png") == (4 * 34 + 2, 4 * 34 + 2)
    assert re.findall(r"--set (\S+):", said) == ["car=road", "0,0,9,9=building", "3=4"]
    said = works("crn_imle", f"video {checkpoint} --output v --frames 3")
    assert {p.name for p in Path("v").iterdir()} == {"strip.png", "fixed.gif", "moving.gif"}
    assert "mean change where labels stay" in said


def test_the_papers_figures_on_own_layouts(run):
    for name in "abc":
        label_map(f"in/{name}.png", 40, 48)
    checkpoint = f"--checkpoint {run / 'checkpoint.pt'}"
    works("crn_imle", f"video {checkpoint} --input in --output v")
    works("crn_imle", f"transfer {checkpoint} --input in --output t.png")
    works("crn_imle", f"interpolate {checkpoint} --input in --item b --output i --ends 3 4")
    works("crn_imle", f"edit {checkpoint} --input in/a.png --output e.png --set 3=4")
    label_map("in/d.png", 50, 50)
    fails("crn_imle", f"transfer {checkpoint} --input in --output t.png", "one size")
    fails("crn_imle", f"video {checkpoint} --input in --output v", "one size")


def test_a_crn_has_no_noise(crn):
    for mode in ("interpolate", "transfer", "video"):
        fails("crn_imle", f"{mode} --out {crn}", mode, "noise")
    fails("crn_imle", f"sample --out {crn} --samples 3 --limit 1", "--samples 3", "2 output")
    works("crn_imle", f"sample --out {crn} --limit 1 --output o")
    assert len(list(Path("o").iterdir())) == 3                 # both outputs, and the grid
    works("crn_imle", f"edit --out {crn} --set car=road --output e.png")


def test_evaluate_writes_the_measures_beside_the_papers(run):
    said = works("crn_imle", f"evaluate --out {run} --eval-samples 12 --limit 2")
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["Table 1"]) == {"first nine", "one of each cluster", "true sampler, nine"}
    assert set(metrics["exact"]) == {f"{row}, n={n}" for row in ("this run", "true sampler")
                                     for n in (9, 12)}
    assert metrics["exact"]["true sampler, n=12"]["joint precision"] > .95
    assert set(common.MEASURES) <= set(metrics["exact"]["true sampler, n=9"])
    best = metrics["best-of-n l1"]
    assert best["this run, n=12"] <= best["this run, n=9"]
    text = " ".join(said.split())
    assert "8.804 7.725" in text and "3.415 2.87" in text


def test_table_2s_images_are_kept(run):
    """For each layout the one of nine samples that is nearest to the photo in l1."""
    works("crn_imle", f"evaluate --out {run} --eval-samples 9 --limit 2")
    metrics = json.loads((run / "metrics.json").read_text())
    works("crn_imle", f"sample --out {run} --limit 2 --output all")
    test_set = common.Dataset("", "test", (32, 32), limit=2)
    for i, name in enumerate(test_set.names):
        errors = [(common.read_image(Path(f"all/{name}_{k}.png")) / 127.5 - 1
                   - test_set[i]["image"]).abs().mean().item() for k in range(1, 10)]
        k = int(np.argmin(errors))
        assert metrics["best"][name] == k
        kept, sampled = run / f"best/{name}.png", Path(f"all/{name}_{k + 1}.png")
        assert kept.read_bytes() == sampled.read_bytes()


def test_evaluate_takes_a_crn_as_it_is(crn):
    works("crn_imle", f"evaluate --out {crn} --limit 2")
    metrics = json.loads((crn / "metrics.json").read_text())
    assert set(metrics["Table 1"]) == {"first nine", "true sampler, nine"}
    assert set(metrics["exact"]) == {"this run, n=2", "true sampler, n=2"}


def test_evaluate_scores_the_images_of_another_model():
    """Here the other model is the truth itself, under names as `sample` gives them."""
    for index in range(2):
        street = common.Street(1_000_000 + index, (64, 64))
        for k, image in enumerate(street.sample(4, 0), 1):
            crn_imle.save_images(image[None], Path(f"theirs/street_100000{index}_{k}.png"))
    works("crn_imle", "evaluate --images theirs --limit 2 --out o")
    exact = json.loads(Path("o/metrics.json").read_text())["exact"]
    assert exact["this run, n=4"]["joint precision"] == 1
    fails("crn_imle", "evaluate --images theirs --limit 3 --out o", "street_1000002", "0 image(s)")
    fails("crn_imle", "evaluate --images theirs --limit 2 --out o --size 32 32", "--size")


def test_a_photo_that_was_removed_is_one_line_when_going_on():
    """Rarity and S count the photos: with another number of them they mean other photos."""
    data = Path("data")
    for split, i in itertools.product(("train", "test"), range(4)):
        label_map(data / f"{split}_label/{i}.png", 40, 48)
        picture(data / f"{split}_img/{i}.png", 40, 48, i)
    line = f"{LINE} --data {data} --classes 12 --limit 0"
    works("crn_imle", f"{line} --steps 3 --out r")
    works("crn_imle", "evaluate --out r --eval-samples 10")
    metrics = json.loads(Path("r/metrics.json").read_text())   # no truth is known here
    assert "exact" not in metrics and len(metrics["Table 1"]) == 2
    for folder in ("train_img", "train_label"):
        (data / folder / "3.png").unlink()
    fails("crn_imle", "--resume --steps 6 --out r", "4 photos", "3", "--init")
    works("crn_imle", f"{line} --steps 1 --out new --init r/checkpoint.pt")
    path = data / "train_img/1.png"                            # a data process reads it first
    path.write_bytes(path.read_bytes()[:-400])
    fails("crn_imle", f"{line} --steps 3 --workers 1 --out x", path)


@pytest.mark.parametrize("flags, words", [
    ("--size 30 40", ["30 40"]), ("--size 33 64", ["33 64", "32 64"]), ("--model gan", ["gan"]),
    ("--outputs 0 --model crn", ["--outputs 0"]), ("--pool 0", ["--pool 0"]),
    ("--candidates 0", ["--candidates 0"]), ("--inner-steps 0", ["--inner-steps 0"]),
    ("--noise-channels 0", ["--noise-channels 0"]), ("--modules 10", ["10", "9"]),
    ("--modules 7", ["32 32"]), ("--layers conv9_9", ["conv9_9"]), ("--calibrate 0", ["0"]),
    ("--layers conv1_1 conv1_1", ["--layers", "once"]), ("--pixel-weight -1", ["-1"]),
    ("--renew-encoder --lr-drop 0", ["--lr-drop"]), ("--noise pink", ["pink"]),
    ("--batch-size 6 --model crn --inner-steps 0", ["--batch-size 6", "5"]),
    ("--vgg nofile.pth", ["nofile.pth"])])
def test_absurd_values_are_refused_in_one_line(flags, words):
    given = [t for t in flags.split() if t.startswith("--")]
    base = [t for t in re.split(r" (?=--)", LINE) if t.split()[0] not in given]
    fails("crn_imle", " ".join(base) + f" --steps 2 --out r {flags}", *words)
    assert not Path("r").exists()


@pytest.mark.parametrize("line, words", [
    ("edit --set car", ["--set car", "CLASS=CLASS"]), ("edit --set car=cat", ["cat"]),
    ("edit --set 0,0,40,4=car", ["0,0,40,4", "32 x 32"]), ("edit --item x", ["--item x"]),
    ("edit --set 0,0,4=car", ["TOP,LEFT"]), ("interpolate --frames 1", ["--frames 1"]),
    ("interpolate --ends 99999999999999999999 1", ["--ends", "99999999999999999999"]),
    ("interpolate --ends -1 1", ["--ends", "-1"]), ("transfer --samples 0", ["--samples 0"]),
    ("sample --samples 0", ["--samples 0"]), ("sample --set car=road", ["--set", "edit"])])
def test_mistakes_at_test_time(run, line, words):
    fails("crn_imle", f"{line} --checkpoint {run / 'checkpoint.pt'}", *words)


# ---------------------------------------------------------------------------------- Map and wording

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
