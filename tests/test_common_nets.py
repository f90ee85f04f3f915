"""common.py, rooms 7 to 9: VGG features, the FCN-8s scorer, its scores, and files of weights.

The oracles: torchvision's own VGG, numpy loops, and the rank of an upsampled map.
"""

import contextlib
import os
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import refused, save
from torchvision.models.vgg import cfgs, make_layers

import common
from common import FCN8s, VGGFeatures, class_table, save_file

CPU = torch.device("cpu")
LETTER = {16: "D", 19: "E"}                          # Simonyan & Zisserman's columns
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """{depth: (torchvision's layers, a file of their weights as torchvision names them)}."""
    nets = {}
    for depth in (16, 19):
        torch.manual_seed(depth)
        layers = make_layers(cfgs[LETTER[depth]], batch_norm=False).eval()
        state = {f"features.{k}": v for k, v in layers.state_dict().items()}
        state |= {"classifier.0.weight": torch.zeros(2, 2)}        # as the real files have one
        path = tmp_path_factory.mktemp("vgg") / f"vgg{depth}.pth"
        torch.save(state, path)
        nets[depth] = layers, str(path)
    return nets


def index_of(depth: int, name: str) -> int:
    """Position of conv3_1, relu3_1 or pool3 in torchvision's Sequential, counted by hand."""
    per_block = {16: [2, 2, 3, 3, 3], 19: [2, 2, 4, 4, 4]}[depth]
    if name.startswith("pool"):
        block = int(name[4:])
        return sum(2 * n + 1 for n in per_block[:block]) - 1
    block, i = (int(x) for x in name[4:].split("_"))
    start = sum(2 * n + 1 for n in per_block[:block - 1])
    return start + 2 * (i - 1) + 1                   # conv and relu both mean the activation


# ---------------------------------------------------------------------------------------- VGG

@pytest.mark.parametrize("depth, layers", [
    (19, ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")),            # pix2pixHD
    (19, ("conv1_2", "conv2_2", "conv3_2", "conv4_2", "conv5_2")),            # CRN
    (19, ("pool5", "conv3_4", "conv5_4")),
    (16, ("relu1_2", "conv1_2", "relu5_3", "pool4", "pool5"))])               # two are the same
def test_features_equal_torchvisions(depth, layers, vgg):
    net, path = vgg[depth]
    image = torch.rand(2, 3, 48, 64, generator=torch.manual_seed(1)) * 2 - 1
    features = VGGFeatures(layers, depth, path)(image)
    assert set(features) == set(layers)
    x = ((image + 1) / 2 - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
    with torch.no_grad():
        for name in layers:
            want = net[:index_of(depth, name) + 1](x)
            torch.testing.assert_close(features[name], want, rtol=1e-4, atol=1e-5)
            block = int(name[4])
            stride = 2 ** (block if name.startswith("pool") else block - 1)
            assert features[name].shape == (
                2, min(64 * 2 ** (block - 1), 512), 48 // stride, 64 // stride)


@pytest.mark.parametrize("average", [False, True])
def test_the_image_as_it_is_and_pooling_by_average(average, vgg):
    net, path = vgg[19]
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    got = VGGFeatures(("conv3_2",), 19, path, normalise=False, average_pool=average)(x)["conv3_2"]
    with torch.no_grad():
        for layer in net[:index_of(19, "conv3_2") + 1]:
            pool = average and isinstance(layer, torch.nn.MaxPool2d)
            x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5)) if pool else layer(x)
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)


def test_features_are_as_few_as_are_needed_frozen_and_not_saved():
    """The gradient reaches the image alone. What --vgg names again needs no place in a checkpoint,
    and restoring leaves it alone."""
    vgg = VGGFeatures(("relu1_1", "relu3_1"), 19, "random")
    assert sum(p.numel() for p in vgg.parameters()) == 640 + 9 * (        # 9 (c_in c_out) + c_out
        3 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256)
    before = vgg.trunk[0].weight.clone()
    image = torch.zeros(1, 3, 16, 16, requires_grad=True)
    sum(f.square().sum() for f in vgg(image).values()).backward()
    assert image.grad.abs().sum() > 0 and not any(p.requires_grad for p in vgg.parameters())
    assert vgg.state_dict() == {}
    vgg.load_state_dict({})
    assert torch.equal(vgg.trunk[0].weight, before)


def test_random_weights_are_the_same_each_time_and_keep_the_scale_through_16_layers():
    """And leave the generator of random numbers alone."""
    x, found = torch.randn(1, 3, 64, 64, generator=torch.manual_seed(3)).clamp(-1, 1), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(VGGFeatures(("relu1_1", "relu5_4"), 19, "random", normalise=False)(x))
        assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    shallow, deep = (value.square().mean().sqrt() for value in found[0].values())
    assert .1 < deep / shallow < 10


def test_vgg_of_images_too_small_to_be_halved_five_times():
    """A plane of one pixel stays as it is."""
    features = VGGFeatures(("relu5_3", "pool5"), 16, "random", width=2)(torch.rand(1, 3, 16, 40))
    assert features["pool5"].shape == (1, 16, 1, 2)
    assert torch.equal(features["pool5"], features["relu5_3"])


@pytest.mark.parametrize("make", [                   # what a file holds, given VGG-16's weights
    lambda s: [torch.zeros(3)], lambda s: {}, lambda s: {"features.0.weight": torch.zeros(3)},
    lambda s: s | {"features.24.bias": torch.full((512,), torch.nan)},
    lambda s: {f"features.{k}": v for k, v in make_layers(
        cfgs["D"][:5], batch_norm=True).state_dict().items()}])
def test_vgg_file_of_another_kind(make, tmp_path, vgg):
    torch.save(make(torch.load(vgg[16][1], weights_only=True)), tmp_path / "vgg.pth")
    with refused("--vgg FILE", "--vgg random", tmp_path / "vgg.pth"):
        VGGFeatures(("relu5_1",), 16, str(tmp_path / "vgg.pth"))


def test_vgg_16_stands_in_for_vgg_19_and_says_so(vgg, capsys):
    """All layers that the papers name are in both: conv1_2 .. conv5_2, relu1_1 .. relu5_1."""
    names = [f"{kind}{block}_{k}" for kind, k in (("conv", 2), ("relu", 1))
             for block in range(1, 6)]
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    other = VGGFeatures(names, 19, vgg[16][1])(image)
    assert "VGG-16" in capsys.readouterr().out
    own = VGGFeatures(names, 16, vgg[16][1])(image)
    assert capsys.readouterr().out == "" and all(torch.equal(other[k], own[k]) for k in names)


@pytest.mark.parametrize("error", [
    urllib.error.URLError("no route to host"), TimeoutError("timed out"),
    RuntimeError("invalid hash value"), ConnectionResetError("reset"),
    EOFError("Ran out of input"), pickle.UnpicklingError("bad"), None])
def test_a_download_is_used_or_its_error_names_the_three_ways(error, monkeypatch, vgg):
    """EOFError and UnpicklingError are what a damaged file in torch's cache gives."""
    def download(self, *args, **kwargs):
        if error:
            raise error
        return torch.load(vgg[19][1], weights_only=True)

    monkeypatch.setattr(torchvision.models.VGG19_Weights, "get_state_dict", download)
    ways = ("--vgg FILE", "--vgg random", "imagenet", "https://", str(error and error.args[0]))
    with refused(*ways) if error else contextlib.nullcontext():
        got = VGGFeatures(("relu1_1",), 19, "imagenet").trunk.conv1_1.weight
        assert torch.equal(got, vgg[19][0][0].weight)


# ------------------------------------------------------------------------------------- FCN-8s

def a_scorer(classes=3, width=2) -> FCN8s:
    """With all weights drawn: the score layers are zero when built."""
    torch.manual_seed(0)
    net = FCN8s(classes, width).eval()
    for name, p in net.named_parameters():
        torch.nn.init.normal_(p, 0, 1 if name.startswith("score") else (2 / p[0].numel()) ** .5)
    return net


@pytest.mark.parametrize("h, w", [(37, 53), (32, 32), (128, 256), (8, 200), (1, 1)])
def test_fcn_output_has_the_size_of_its_input(h, w):
    out = a_scorer()(torch.rand(1, 3, h, w) * 2 - 1)
    assert out.shape == (1, 3, h, w) and out.isfinite().all()


@pytest.mark.parametrize("source, stride", [("fc", 32), ("pool4", 16), ("pool3", 8)])
def test_fcn_skip_connections_have_strides_32_16_and_8(source, stride):
    """A map of n x n cells, enlarged row by row and column by column, has rank n at most."""
    net, side = a_scorer(1, 8), 96
    for name, conv in net.score.items():
        if name != source:
            torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    image = torch.rand(1, 3, side, side, generator=torch.manual_seed(4)) * 2 - 1
    with torch.no_grad():
        out = net(image)[0, 0].double()
    values = torch.linalg.svdvals(out)
    assert int((values > 1e-5 * values[0]).sum()) == side // stride


def test_fcn_width_64_is_vgg_16_with_4096_channels():
    """Simonyan & Zisserman: 14,714,688 weights in the trunk; 4096 channels in fc6 and fc7."""
    with torch.device("meta"):
        net = FCN8s(19)
    assert sum(p.numel() for p in net.trunk.parameters()) == 14_714_688
    fc6, fc7 = 49 * 512 * 4096 + 4096, 4096 * 4096 + 4096
    assert sum(p.numel() for p in net.fc.parameters()) == fc6 + fc7
    assert sum(p.numel() for p in net.score.parameters()) == 19 * (4096 + 512 + 256 + 3)


def test_fcn_trunk_serves_as_vgg_file(tmp_path, vgg):
    """The scorer's file under its own key names, with the weights of torchvision's VGG-16."""
    net, _ = vgg[16]
    own = [k for k in FCN8s(2, 2).state_dict() if k.startswith("trunk.")]
    scorer = dict(zip(own, net.state_dict().values())) | {"fc.0.weight": torch.zeros(1)}
    save_file({"made": {"n": 1}, "scorer": scorer}, tmp_path / "fcn.pt")
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    got = VGGFeatures(("pool2",), 16, str(tmp_path / "fcn.pt"), normalise=False)(image)["pool2"]
    with torch.no_grad():
        torch.testing.assert_close(got, net[:10](image), rtol=1e-4, atol=1e-5)


class Flat(common.Dataset):
    """Red is class 0, blue class 1, behind a border that moves; counts how often it is read."""
    reads = 0

    def __getitem__(self, i):
        type(self).reads += 1
        return super().__getitem__(i)


def write_flat(folder: Path, k: int, border: int) -> None:
    label = (np.arange(32)[None].repeat(32, 0) >= border).astype(np.uint8)
    label = label.T if k % 2 else label
    save(folder / f"train_label/{k}.png", np.ascontiguousarray(label))
    save(folder / f"train_img/{k}.png", np.uint8([(200, 30, 30), (30, 30, 200)])[label])


@pytest.fixture
def flat(tmp_path):
    for k in range(6):
        write_flat(tmp_path / "d", k, 6 + 4 * k)
    Flat.reads = 0
    return Flat(str(tmp_path / "d"), size=(32, 32), classes="2")


def test_fcn_scorer_learns_two_colours_and_is_kept(flat, tmp_path):
    folder, settings = tmp_path / "runs", dict(weights="random", width=4, steps=40, batch_size=3,
                                               lr=1e-3)
    torch.manual_seed(21)
    state, flat.epoch = torch.get_rng_state(), 17
    net = common.fcn_scorer(flat, folder, CPU, **settings)
    cache, = folder.iterdir()
    assert torch.equal(state, torch.get_rng_state()), "the run's random numbers are disturbed"
    assert not net.training and Flat.reads == 120 and flat.epoch == 17
    with torch.no_grad():
        right = [(net(flat[i]["image"][None]).argmax(1)[0] == flat[i]["label"]).float().mean()
                 for i in range(6)]
    assert np.mean(right) > .93, right

    Flat.reads = 0
    again = common.fcn_scorer(flat, folder, CPU, **settings)
    assert Flat.reads == 0 and not again.training and torch.equal(state, torch.get_rng_state())
    same = lambda other: all(map(torch.equal, net.state_dict().values(), other.values()))
    assert same(again.state_dict())
    torch.manual_seed(5)                             # whatever was drawn before
    assert same(common.fcn_scorer(flat, tmp_path / "b", CPU, **settings).state_dict())

    Flat.reads = 0
    common.fcn_scorer(flat, folder, CPU, **settings | {"steps": 2})
    assert Flat.reads == 6 and len(list(folder.iterdir())) == 2, "another scorer, another file"
    cache.write_bytes(cache.read_bytes()[:3000])
    with refused(cache, "delete it"):
        common.fcn_scorer(flat, folder, CPU, **settings)


def numpy_scores(predicted, label, table):
    """Loops over pixels: accuracy, mean of per-class accuracies, mean IoU over the classes seen."""
    scored = list(table.scored) or list(range(len(table.names)))
    pairs = zip(label.flatten().tolist(), predicted.flatten().tolist())
    pairs = [(t, p) for t, p in pairs if t in scored]
    accuracies, ious = [], []
    for c in scored:
        truth = sum(t == c for t, p in pairs)
        if truth:
            both = sum(t == c and p == c for t, p in pairs)
            accuracies.append(both / truth)
            ious.append(both / sum(t == c or p == c for t, p in pairs))
    return np.mean([t == p for t, p in pairs]), np.mean(accuracies), np.mean(ious)


@pytest.mark.parametrize("name", ["camvid", "cityscapes", "coco_stuff", "5"])
def test_scores_equal_a_numpy_loop(name):
    table, rng = class_table(name), np.random.default_rng(0)
    n = len(table.names)
    label = torch.from_numpy(rng.integers(0, table.channels, (2, 20, 30)))   # some unknown
    label[:, :, :9] = 7 % n
    predicted = torch.where(torch.from_numpy(rng.random((2, 20, 30)) < .6), label.clamp(max=n - 1),
                            torch.from_numpy(rng.integers(0, n, (2, 20, 30))))
    confusion = common.confusion_matrix(predicted, label, table)
    assert confusion.shape == (n, n) and confusion.dtype == torch.int64
    scores = common.segmentation_scores(confusion)
    got = scores["per-pixel acc"], scores["per-class acc"], scores["class IOU"]
    assert got == pytest.approx(numpy_scores(predicted, label, table), rel=1e-6)


def test_scored_target_keeps_19_of_cityscapes_35():
    table = class_table("cityscapes")
    target = common.scored_target(torch.arange(35), table)
    assert [k for k in range(35) if target[k] != 255] == [
        7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert all(target[k] == k for k in table.scored) and target.dtype == torch.int64
    coco = common.scored_target(torch.tensor([[0, 181, 182]]), class_table("coco_stuff"))
    assert coco.tolist() == [[0, 181, 255]]


# ---------------------------------------------------------------------------- files of weights

def test_the_new_file_is_on_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    calls = []
    real = {"fsync": os.fsync, "replace": os.replace}
    for name in real:
        monkeypatch.setattr(os, name, lambda *a, name=name: calls.append(name) or real[name](*a))
    save_file({"step": 1}, tmp_path / "x.pt")
    assert calls[:2] == ["fsync", "replace"]
