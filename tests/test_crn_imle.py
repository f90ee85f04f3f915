"""What the conditional IMLE paper (and CRN) claims, tested on crn_imle.py.

The oracles share no code with the script: numpy in float64 with loops, printed numbers, limits.
"""

import colorsys
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import paper_map, refused
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import common
import crn_imle
from crn_imle import Config, Generator, NoiseEncoder, Street

CPU = torch.device("cpu")
TINY = Config(size=(32, 32), width=6, noise_channels=3, encoder_width=5, layers=("conv1_1",),
              classes="streets", pool=6, candidates=4, inner_steps=3, vgg="random", limit=12,
              lr=1e-3, gpu=-1)


def state_of(cfg: Config) -> crn_imle.State:
    """A state with the rarity of the first streets, as train makes it."""
    state, train_set = crn_imle.build(cfg, CPU), crn_imle.dataset(cfg, "train")
    colours, state.areas = crn_imle.survey(train_set, cfg, CPU)
    state.rarity = crn_imle.rarity_scores(colours)
    return state


def parameters(*net: nn.Module) -> int:
    return sum(p.numel() for each in net for p in each.parameters())


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


def test_same_noise_same_image_other_noise_other_image():
    cfg = TINY
    net = Generator(12, width=6, modules=4, noise_channels=3, encoder_width=5)
    label = torch.rand(1, 12, 32, 32)
    a, b, c = (net(label, crn_imle.draw_noise(s, cfg, (32, 32), CPU)[None]) for s in (1, 1, 2))
    assert torch.equal(a, b) and (a - c).abs().mean() > 1e-3


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
def test_diversity_loss_against_loops(per_image):
    real, fake, label, w = crn_inputs(3)
    total = 0
    for n in range(2):
        parts = np.zeros((3, 4))
        for x, y, lam in zip(real, fake, w):
            size = x.shape[-1]
            step = 8 // size
            for u in range(3):
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


def test_diversity_loss_of_one_output_is_the_plain_distance():
    real, fake, label, w = crn_inputs(1)
    plain = np.mean([sum(lam * np.abs(x[n] - y[n, 0]).mean() for x, y, lam in zip(real, fake, w))
                     for n in range(2)])
    for per_image in (False, True):
        assert crn_loss(real, fake, label, w, per_image) == pytest.approx(plain, rel=1e-5)


def test_diversity_loss_does_not_care_for_the_order_of_outputs():
    real, fake, label, w = crn_inputs(4)
    other = [x[:, [2, 0, 3, 1]] for x in fake]
    assert crn_loss(real, fake, label, w) == pytest.approx(crn_loss(real, other, label, w))
    assert crn_loss(real, fake, label, w) <= crn_loss(real, fake, label, w, True) + 1e-9


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


# -------------------------------------------------------------------------------------- Rebalancing

def test_kde_is_a_direct_sum_with_scotts_factor():
    x = np.random.default_rng(0).normal(size=(23, 3)) * (20, 5, 60) + (100, 0, 30)
    h = 23 ** (-2 / 7) * (np.cov(x.T) + np.eye(3))
    inverse, norm = np.linalg.inv(h), math.sqrt((2 * math.pi) ** 3 * np.linalg.det(h))
    want = [sum(math.exp(-(a - b) @ inverse @ (a - b) / 2) for b in x) / 23 / norm for a in x]
    np.testing.assert_allclose(crn_imle.gaussian_kde(torch.from_numpy(x)).exp(), want, rtol=1e-9)


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


def test_rarity_scores():
    colours = made_up_colours()
    scores = crn_imle.rarity_scores(colours)
    assert scores.isfinite().all() and torch.equal(scores > 0, ~colours[..., 0].isnan())
    assert scores[:, 0].argmax() == 3
    valid = [0, 1, 3]
    for k in range(5):                                         # under 10 images: the lowest score
        assert scores[k, 2] == min(scores[k, p] for p in valid)
    x = colours[:, 0].numpy()
    h = 40 ** (-2 / 7) * (np.cov(x.T) + np.eye(3))
    density = sum(math.exp(-(x[3] - b) @ np.linalg.inv(h) @ (x[3] - b) / 2) for b in x) / 40
    density /= math.sqrt((2 * math.pi) ** 3 * np.linalg.det(h))
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
    state, train_set = state_of(cfg), crn_imle.dataset(cfg, "train")
    chosen, losses = crn_imle.search(state, train_set, cfg, {})
    assert not losses.requires_grad
    assert all(p.grad is None for p in state.generator.parameters())
    assert losses.shape == (6, 4) and losses.std(1).min() > 0
    for i, (k, seed) in enumerate(chosen.tolist()):
        pair = crn_imle.photo(state, train_set, k, cfg)
        real = crn_imle.features(state.vgg, pair["image"])
        seeds = [hash((cfg.seed, 0, i, j)) % 2 ** 62 for j in range(4)]
        alone = []
        for s in seeds:
            z = crn_imle.draw_noise(s, cfg, (32, 32), CPU)[None]
            fake = crn_imle.features(state.vgg, state.generator(pair["input"], z)[:, 0])
            alone.append(crn_imle.distance(real, fake, pair["mask"], state.weights).item())
        np.testing.assert_allclose(losses[i], alone, rtol=1e-4)
        assert seed == seeds[int(np.argmin(alone))]
        assert min(alone) == pytest.approx(losses[i].min().item(), rel=1e-4)


def test_search_batches_and_kept_features_change_nothing():
    cfg = TINY
    state, train_set = state_of(cfg), crn_imle.dataset(cfg, "train")
    a, b, c = (crn_imle.search(state, train_set, replace(cfg, search_batch=n, keep_features=keep),
                               {}) for n, keep in ((1, 0), (4, 0), (4, 9)))
    assert torch.equal(a[0], b[0]) and torch.equal(b[0], c[0])
    torch.testing.assert_close(a[1], b[1], rtol=1e-4, atol=1e-6)


def pairs_of(train_set, cfg, state):
    """The rest of a pass, as train_step takes it."""
    loader = crn_imle.open_loader(train_set, cfg, CPU)
    for batch in crn_imle.epoch_batches(loader, cfg, state):
        yield crn_imle.to_pair(batch, cfg, state, {})


def test_an_inner_step_lowers_the_loss_at_the_noise_found():
    """Images are rendered anew: the same batch gives a lower loss after each update."""
    cfg = replace(TINY, rebalance="both")
    state, train_set = state_of(cfg), crn_imle.dataset(cfg, "train")
    state.chosen, found = crn_imle.search(state, train_set, cfg, {})
    batch = next(pairs_of(train_set, cfg, state))
    slot = crn_imle.epoch_order(state, cfg, 12)[0, 0, 0]
    losses = [crn_imle.train_step(state, batch, cfg)["loss"].item() for _ in range(4)]
    assert losses[0] == pytest.approx(found[slot].min().item(), rel=1e-4)      # L^, at sigma(i)
    assert losses[0] > losses[1] > losses[3]


def test_batches_carry_the_noise_and_the_mask_of_their_photo():
    cfg = replace(TINY, batch_size=2, keep_features=5, rebalance="both")
    state, train_set = state_of(cfg), crn_imle.dataset(cfg, "train")
    state.chosen, _ = crn_imle.search(state, train_set, cfg, {})
    order = crn_imle.epoch_order(state, cfg, 12)
    assert order.shape == (3, 1, 2)
    batches = list(pairs_of(train_set, cfg, state))
    assert len(batches) == 3
    for row, batch in zip(order[:, 0], batches):
        for b, (k, seed) in enumerate(state.chosen[row].tolist()):
            assert batch["name"][b] == train_set.names[k]
            assert torch.equal(batch["noise"][b], crn_imle.draw_noise(seed, cfg, (32, 32), CPU))
            item = train_set[k]
            mask = crn_imle.paint_masks(item["label"][None], state.rarity[[k]])[0]
            assert torch.equal(batch["mask"][b], mask)
            real = crn_imle.features(state.vgg, item["image"][None])
            for got, want in zip(batch["real"], real):
                torch.testing.assert_close(got[b], want[0], rtol=1e-4, atol=1e-5)
    state.seen = 2                                             # the rest of the pass
    rest = list(pairs_of(train_set, cfg, state))
    assert [b["name"] for b in rest] == [b["name"] for b in batches[1:]]


@pytest.mark.parametrize("rebalance, masked, binned", [
    ("none", False, False), ("mask", True, False), ("bins", False, True), ("both", True, True)])
def test_the_four_cells_of_rebalancing(rebalance, masked, binned):
    cfg = replace(TINY, rebalance=rebalance, pool=500)
    state, train_set = state_of(cfg), crn_imle.dataset(cfg, "train")
    pair = crn_imle.photo(state, train_set, 0, cfg)
    assert bool((pair["mask"] != 1).any()) == masked and pair["mask"].max() == 1
    share = torch.bincount(crn_imle.populate(state.rarity, state.areas, cfg, 0), minlength=12) / 500
    assert bool((share - 1 / 12).abs().max() > .06) == binned


def test_a_pass_of_crn_shows_each_image_once():
    cfg = replace(TINY, model="crn", outputs=2, inner_steps=0)
    state = crn_imle.build(cfg, CPU)
    order = crn_imle.epoch_order(state, cfg, 12)
    assert sorted(order.flatten().tolist()) == list(range(12))
    longer = crn_imle.epoch_order(state, replace(cfg, inner_steps=30), 12).flatten()
    assert torch.bincount(longer).unique().tolist() == [2, 3]  # 30 of 12: two rounds and a half


def test_lambda_is_set_once_between_passes():
    cfg = replace(TINY, calibrate=2, layers=("conv1_1", "conv2_1"))
    state, train_set = state_of(cfg), crn_imle.dataset(cfg, "train")
    for epoch in range(4):
        state.epoch = epoch
        told = crn_imle.begin_epoch(state, train_set, cfg, {})
        assert ("lambda" in told) == (epoch == 2)
        before, sums = state.weights.clone(), torch.zeros(3)
        for batch in pairs_of(train_set, cfg, state):
            losses = crn_imle.train_step(state, batch, cfg)
            sums += torch.stack([losses[k] for k in ("pixel", "conv1_1", "conv2_1")])
        assert torch.equal(state.weights, before)              # never between search and descent
        torch.testing.assert_close(state.sums, sums)
        if epoch == 1:
            expected = sums[0] / sums
    torch.testing.assert_close(state.weights, expected)


def test_the_released_encoder_restart():
    cfg = replace(TINY, lr_drop=1, renew_encoder=True)
    state, train_set = state_of(cfg), crn_imle.dataset(cfg, "train")
    crn_imle.begin_epoch(state, train_set, cfg, {})
    for batch in pairs_of(train_set, cfg, state):
        crn_imle.train_step(state, batch, cfg)
    before = {k: v.clone() for k, v in state.generator.state_dict().items()}
    state.epoch = 1
    crn_imle.begin_epoch(state, train_set, cfg, {})
    changed = {k for k, v in state.generator.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith("encoder.") for k in changed) and not state.opt_g.state
    assert crn_imle.learning_rate(cfg, 0) == 1e-3
    assert crn_imle.learning_rate(cfg, 1) == pytest.approx(1e-4)


def test_one_batch_can_be_overfitted():
    cfg = replace(TINY, width=12, lr=3e-3)
    state, train_set = crn_imle.build(cfg, CPU), crn_imle.dataset(cfg, "train")
    torch.manual_seed(1)
    pair = crn_imle.pair_of(train_set[0], cfg, CPU)
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


# --------------------------------------------------------------------------------------- Warm start

def test_warm_start_without_noise_reproduces_crns_output_0(tmp_path):
    """With the new columns at 0 the image is CRN's first, for any z."""
    crn_cfg = replace(TINY, model="crn", outputs=4, out=str(tmp_path))
    crn = crn_imle.build(crn_cfg, CPU)
    crn_imle.save_checkpoint(crn, crn_cfg)
    path = str(tmp_path / "checkpoint.pt")
    label = nn.functional.one_hot(torch.randint(0, 12, (1, 32, 32)), 12).movedim(-1, 1).float()
    want = crn.generator(label)[:, 0]
    warm = crn_imle.build(replace(TINY, init=path), CPU).generator
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


def test_warm_start_from_another_shape_is_refused(tmp_path):
    cfg = replace(TINY, model="crn", outputs=4, out=str(tmp_path), width=8)
    crn_imle.save_checkpoint(crn_imle.build(cfg, CPU), cfg)
    with refused("checkpoint.pt", "generator", "head.weight"):
        crn_imle.build(replace(TINY, init=str(tmp_path / "checkpoint.pt")), CPU)


# ---------------------------------------------------------------------------------------- Test time

def ready(cfg: Config = TINY) -> tuple[crn_imle.State, dict]:
    state = crn_imle.build(cfg, CPU)
    return state, crn_imle.pair_of(crn_imle.dataset(cfg, "test")[0], cfg, CPU)


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
    a, b = crn_imle.draw(state, pair, TINY, 3), crn_imle.draw(state, pair, TINY, 2, first=1)
    assert torch.equal(a[1:], b) and a.abs().max() <= 1
    cfg = replace(TINY, model="crn", outputs=3)
    state, pair = ready(cfg)
    assert crn_imle.draw(state, pair, cfg, 2).shape == (2, 3, 32, 32)
    with refused("--samples 4", "3"):
        crn_imle.draw(state, pair, cfg, 4)


def test_interpolation_ends_at_its_ends_and_keeps_the_variance():
    state, pair = ready()
    rows = crn_imle.interpolate(TINY, state, pair, ends=(5, 9), frames=4, output="o")
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
    pairs = [crn_imle.pair_of(test_set[i], TINY, CPU) for i in range(3)]
    made = crn_imle.transfer(TINY, state, pairs, rows=2, output="o.png")
    for i, pair in enumerate(pairs):
        for j in range(2):
            z = crn_imle.noise_of(TINY.seed + j, pair, TINY)
            assert torch.equal(made[j, i], crn_imle.translate(state.generator, pair["input"], z)[0])


def test_edits_keep_the_noise():
    state, _ = ready()
    item = crn_imle.dataset(TINY, "test")[0]
    made = crn_imle.edit(TINY, state, item, [("set", "car=road"), ("set", "road=road")], 2, "o.png")
    assert made.shape == (3, 2, 3, 32, 32)
    assert torch.equal(made[1], made[2]) and not torch.equal(made[0], made[1])
    table = common.class_table("streets")
    label = torch.zeros(8, 9, dtype=torch.int64)
    painted = crn_imle.relabel(label, "paint", "1,2,4,8=car", table)
    want = torch.zeros(8, 9, dtype=torch.int64)
    want[1:4, 2:8] = table.names.index("car")
    assert torch.equal(painted, want) and label.sum() == 0
    assert torch.equal(crn_imle.relabel(painted, "set", "10=3", table), want.clamp(max=3))


def test_the_car_drives_away_and_comes_back():
    frames = crn_imle.moving_car(TINY, 5)
    car = common.CLASS_ID["car"]
    areas = [(frame["label"] == car).sum().item() for frame in frames]
    assert areas[0] == areas[4] > areas[1] == areas[3] > areas[2]
    state, _ = ready()
    told = crn_imle.video(TINY, state, frames, "o")
    assert 0 < told["fixed"] < told["moving"]


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
    images, truth = torch.rand(5, 3, 4, 4), torch.rand(1, 3, 4, 4)
    errors = [(image - truth[0]).abs().mean().item() for image in images]
    best = crn_imle.best_of(images, truth)
    assert best == (int(np.argmin(errors)), pytest.approx(min(errors)))


@pytest.fixture(scope="module")
def street():
    return Street(3, (64, 64))


def test_the_true_sampler_is_precise_and_reaches_the_ideal_recall():
    for index in range(3):
        street = Street(index, (64, 64))
        got = street.measure(street.read(street.sample(100, index)))
        assert got["joint precision"] > .99 and got["class validity"] > .99
        assert got["T-agreement"] > .95 and got["T-majority"] > .99
        assert got["recall"] == pytest.approx(got["ideal recall"], abs=.06)
        assert got["time TV"] < .15


def test_the_probabilities_of_a_street_are_its_laws(street):
    laws = dict(common.modes(street.layout))
    assert street.p.numel() == len(laws) and street.p.sum().item() == pytest.approx(1)
    seen = street.read(street.sample(30, 0))["mode"]
    for row in seen[:5].tolist():
        names = [list(common.COLOR_LAW[kind])[c]
                 for c, (_, kind) in zip(row[1:], street.layout.vehicles)]
        style = common.Style(*street.airs[row[0]], tuple(names))
        assert street.p[tuple(row)].item() == pytest.approx(laws[style])


def test_the_style_drawn_is_the_mode_read(street):
    rng = np.random.default_rng(5)
    for _ in range(10):
        style = common.draw_style(street.layout, rng)
        photo = torch.from_numpy(common.render(street.layout, style)).permute(2, 0, 1)[None]
        seen = street.read(photo * 2 - 1)
        row = seen["mode"][0].tolist()
        names = [list(common.COLOR_LAW[kind])[c]
                 for c, (_, kind) in zip(row[1:], street.layout.vehicles)]
        assert common.Style(*street.airs[row[0]], tuple(names)) == style
        assert seen["valid"][0] == 1 and street.times(seen["mode"]) == [style.time]


def test_a_constant_generator_and_a_mixed_image_are_found_out(street):
    """One mode at most; and day's sky over night's road: each region fits, the image does not."""
    one = street.sample(1, 0)
    got = street.measure(street.read(one.expand(20, -1, -1, -1)))
    assert got["recall"] == pytest.approx(1 / street.p.numel())
    assert got["TV"] == pytest.approx(1 - street.p[tuple(street.read(one)["mode"][0])].item())
    photos = [torch.from_numpy(common.render(street.layout, common.Style(
        time, "clear", "brick", ("white",) * len(street.layout.vehicles)))).permute(2, 0, 1)
        for time in ("day", "night")]
    sky = torch.from_numpy(street.layout.label == common.CLASS_ID["sky"])
    mixed = torch.where(sky, photos[0], photos[1])[None] * 2 - 1
    seen = street.read(mixed)
    assert seen["fits"].mean() > .99 and seen["valid"][0] == 0 and seen["agree"][0] == 0
    grey = street.measure(street.read(torch.zeros(4, 3, 64, 64) + .9))
    assert grey["joint precision"] == 0 and math.isnan(grey["TV"]) and grey["recall"] == 0


def test_switches_and_agreement():
    modes = torch.tensor([[1, 2], [1, 2], [1, 3], [0, 3], [0, 3]])
    assert crn_imle.switches(modes) == 2
    assert crn_imle.agreement([["day", "night"], ["day", "day"], ["dusk", "night"]]) \
        == pytest.approx(2 / 6)


def test_hues():
    pure = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [0, 0, 0.0]]).T.view(3, 1, 4)
    counts = crn_imle.hue_histogram(pure, 6)
    assert counts.tolist() == [1, 0, 1, 0, 1, 0]               # red, green, blue; grey has none
    for rgb in np.random.default_rng(0).uniform(0, 1, (20, 3)):
        h = colorsys.rgb_to_hsv(*rgb)[0]
        one = crn_imle.hue_histogram(torch.from_numpy(rgb).view(3, 1, 1) * 2 - 1, 36)
        assert one.argmax() == int(h * 36)


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


def test_sizes_that_do_not_halve_are_refused_with_one_that_does():
    with refused("--size 100 200", "96 192"):
        crn_imle.fit_modules(Config(size=(100, 200)))
    assert crn_imle.fit_modules(Config(size=(96, 192))).modules == 5


# ---------------------------------------------------------------------------------- Map and wording

def test_paper_map_lists_every_equation_table_and_figure():
    listed = set()
    for entry in paper_map(crn_imle):
        for kind, first, last in re.findall(r"(Eq\.|Table|Fig\.|Alg\.) \(?(\d+)\)?(?:-(\d+))?",
                                            entry):
            listed |= {(kind, n) for n in range(int(first), int(last or first) + 1)}
    assert listed == ({("Eq.", 1), ("Alg.", 1), ("Table", 1), ("Table", 2)}
                      | {("Fig.", n) for n in range(1, 13)})


def test_paper_map_points_at_what_exists():
    flags = {s for action in crn_imle.parser()._actions for s in action.option_strings}
    for entry, place in paper_map(crn_imle).items():
        assert all(f in flags for f in re.findall(r"--[a-z-]+", place)), (entry, place)
        words = re.sub(r"needs people; |with --[a-z-]+ \d+|picks the images", "", place)
        for word in re.findall(r"\w+", words):
            assert callable(getattr(crn_imle, word, None)) or word == "PRESETS", (entry, word)


def test_equations_are_tagged_at_their_functions():
    for function, tag in ((crn_imle.distance, "Eq. (1)"), (crn_imle.layer_terms, "Eq. (1)"),
                          (crn_imle.search, "Algorithm 1"), (crn_imle.train_step, "Algorithm 1"),
                          (crn_imle.populate, "Sec. 3.4"), (NoiseEncoder, "Sec. 3.3.2")):
        assert tag in function.__doc__, (function.__name__, tag)
