"""common.py, rooms 6 and 7: VGG features, the FCN-8s scorer, its scores, and files of weights.

The oracles: torchvision's own VGG, numpy loops, and the rank of an upsampled map.
"""

import math
import os
import pickle
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.models.vgg import cfgs, make_layers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from conftest import refused  # noqa: E402
from common import FCN8s, VGGFeatures, class_table, load_file, save_file  # noqa: E402

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
        # the real files hold a classifier too
        state |= {"classifier.0.weight": torch.zeros(2, 2)}
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
    (16, ("relu1_2", "conv3_3", "relu5_3", "pool4", "pool5"))])
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


def test_normalise_false_feeds_the_image_as_it_is(vgg):
    net, path = vgg[19]
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    got = VGGFeatures(("relu2_1",), 19, path, normalise=False)(image)["relu2_1"]
    with torch.no_grad():
        torch.testing.assert_close(got, net[:7](image), rtol=1e-4, atol=1e-5)


def test_average_pool_replaces_every_maximum(vgg):
    net, path = vgg[19]
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    got = VGGFeatures(("conv3_2",), 19, path, normalise=False, average_pool=True)(x)["conv3_2"]
    with torch.no_grad():
        for layer in net[:index_of(19, "conv3_2") + 1]:
            if isinstance(layer, torch.nn.MaxPool2d):
                x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + \
                     x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
            else:
                x = layer(x)
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last, count", [("relu5_1", 12_944_960), ("conv5_2", 15_304_768)])
def test_parameter_counts_of_vgg_19(last, count):
    """9 (c_in c_out) + c_out, summed over the 13 or 14 convolutions that are needed."""
    with torch.device("meta"):
        trunk = common.vgg_trunk(19, 64, last.replace("conv", "relu"))
    assert sum(p.numel() for p in trunk.parameters()) == count


def test_features_stop_where_they_are_no_longer_needed(vgg):
    features = VGGFeatures(("relu2_1",), 19, vgg[19][1])
    assert sum(p.numel() for p in features.parameters()) == 9 * (3 * 64 + 64 * 64 + 64 * 128) + 256


def test_gradient_reaches_the_image_and_no_weight(vgg):
    features = VGGFeatures(("relu1_1", "relu3_1"), 19, vgg[19][1])
    image = torch.zeros(1, 3, 16, 16, requires_grad=True)
    sum(f.square().sum() for f in features(image).values()).backward()
    assert image.grad.abs().sum() > 0
    assert list(features.parameters())
    assert all(p.grad is None and not p.requires_grad for p in features.parameters())


def test_a_checkpoint_of_the_features_holds_no_constants():
    keys = VGGFeatures(("relu1_1",), 19, "random").state_dict()
    assert not [k for k in keys if "mean" in k or "std" in k]


def test_both_names_of_one_layer_may_be_asked_for(vgg):
    features = VGGFeatures(("conv1_2", "relu1_2"), 19, vgg[19][1])(torch.zeros(1, 3, 8, 8))
    assert set(features) == {"conv1_2", "relu1_2"}
    assert torch.equal(features["conv1_2"], features["relu1_2"])


def test_frozen_features_are_not_saved():
    """What --vgg names again needs no place in a checkpoint, and restoring leaves it alone."""
    vgg = VGGFeatures(("relu1_1",), 19, "random")
    before = vgg.trunk[0].weight.clone()
    assert vgg.state_dict() == {}
    vgg.load_state_dict({})
    assert torch.equal(vgg.trunk[0].weight, before)


def test_random_weights_are_the_same_each_time():
    torch.manual_seed(1)
    first = dict(VGGFeatures(("relu2_2",), 19, "random").named_parameters())
    torch.manual_seed(2)
    torch.rand(5)
    second = dict(VGGFeatures(("relu2_2",), 19, "random").named_parameters())
    assert first and all(torch.equal(first[k], second[k]) for k in first)


def test_random_weights_keep_the_scale_through_16_layers():
    x = torch.randn(1, 3, 64, 64, generator=torch.manual_seed(3)).clamp(-1, 1)
    features = VGGFeatures(("relu1_1", "relu5_4"), 19, "random", normalise=False)(x)
    shallow, deep = (features[k].square().mean().sqrt() for k in ("relu1_1", "relu5_4"))
    assert .1 < deep / shallow < 10


def test_building_vgg_leaves_the_global_generator_alone():
    torch.manual_seed(11)
    state = torch.get_rng_state()
    VGGFeatures(("relu1_2",), 19, "random")
    assert torch.equal(state, torch.get_rng_state())


def refused_vgg(weights, *words, depth=19, layers=("relu5_1",)):
    """A UserError that names all three ways to come by weights."""
    with refused("--vgg FILE", "--vgg random", *words):
        VGGFeatures(layers, depth, str(weights))


def test_vgg_of_images_too_small_to_be_halved_five_times():
    """A plane of one pixel stays as it is."""
    features = VGGFeatures(("relu5_3", "pool5"), 16, "random", width=2)(torch.rand(1, 3, 16, 40))
    assert features["pool5"].shape == (1, 16, 1, 2)
    assert torch.equal(features["pool5"], features["relu5_3"])


def test_vgg_file_missing(tmp_path):
    refused_vgg(tmp_path / "gone.pth", "gone.pth", "no such file")


def test_vgg_file_of_another_kind(tmp_path):
    (tmp_path / "a.pth").write_text("not weights")
    refused_vgg(tmp_path / "a.pth", "a.pth")
    torch.save([torch.zeros(3)], tmp_path / "b.pth")
    refused_vgg(tmp_path / "b.pth", "b.pth", "list")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "c.pth")
    refused_vgg(tmp_path / "c.pth", "c.pth", "VGG-19")
    torch.save({}, tmp_path / "d.pth")
    refused_vgg(tmp_path / "d.pth", "d.pth")
    torch.save({"features.0.weight": 3.0, "scorer": 1}, tmp_path / "e.pth")
    refused_vgg(tmp_path / "e.pth", "e.pth")
    refused_vgg(tmp_path, tmp_path)                  # a folder


def test_vgg_file_cut_off(tmp_path, vgg):
    whole = Path(vgg[16][1]).read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[:len(whole) // 2])
    refused_vgg(tmp_path / "half.pth", "half.pth", depth=16)


@pytest.mark.parametrize("layers", [("relu5_1",), ("relu3_1",)])
def test_vgg_16_weights_do_not_pass_for_vgg_19(layers, vgg):
    """Up to conv3_3 the shapes are the same; only the number of layers tells them apart."""
    refused_vgg(vgg[16][1], "VGG-19", layers=layers)


def test_vgg_with_batch_norm_is_refused(tmp_path):
    state = make_layers(cfgs["D"][:5], batch_norm=True).state_dict()
    torch.save({f"features.{k}": v for k, v in state.items()}, tmp_path / "bn.pth")
    refused_vgg(tmp_path / "bn.pth", "bn.pth", depth=16, layers=("relu2_1",))


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    mark = str(tmp_path / "owned")
    torch.save({"features.0.weight": Evil(mark)}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"a": Evil(mark)}))
    for name in ("evil.pth", "evil.pkl"):
        refused_vgg(tmp_path / name, name)
        with refused(name, "cure"):
            load_file(tmp_path / name, "cure")
    assert not Path(mark).exists()


@pytest.mark.parametrize("error", [urllib.error.URLError("no route to host"),
                                   TimeoutError("timed out"),
                                   RuntimeError(
                                       "invalid hash value"), ConnectionResetError("reset"),
                                   EOFError("Ran out of input"), pickle.UnpicklingError("bad")])
def test_a_failed_download_names_the_three_ways(error, monkeypatch):
    """The last two are what a damaged file in torch's cache gives."""
    def fail(self, *args, **kwargs):
        raise error
    monkeypatch.setattr(torchvision.models.VGG19_Weights, "get_state_dict", fail)
    refused_vgg("imagenet", "imagenet", "https://", str(error.args[0]))


def test_a_download_that_works_is_used(monkeypatch, vgg):
    net, path = vgg[19]
    monkeypatch.setattr(torchvision.models.VGG19_Weights, "get_state_dict",
                        lambda self, *args, **kwargs: torch.load(path, weights_only=True))
    got = VGGFeatures(("relu1_1",), 19, "imagenet").trunk.conv1_1.weight
    assert torch.equal(got, net[0].weight)


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
    with torch.no_grad():
        out = net(torch.rand(1, 3, side, side, generator=torch.manual_seed(4))
                  * 2 - 1)[0, 0].double()
    values = torch.linalg.svdvals(out)
    assert int((values > 1e-5 * values[0]).sum()) == side // stride


def test_fcn_parts_add_up():
    """Scores are linear in the three score layers: the whole is the sum of its parts."""
    image, net = torch.rand(1, 3, 64, 64) * 2 - 1, a_scorer()
    parts = []
    with torch.no_grad():
        whole = net(image)
        for source in ("fc", "pool4", "pool3"):
            part = a_scorer()
            for name, conv in part.score.items():
                if name != source:
                    torch.nn.init.zeros_(conv.weight), torch.nn.init.zeros_(conv.bias)
            parts.append(part(image))
    assert all(p.abs().max() > 1e-3 for p in parts)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-4)


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


@pytest.fixture
def flat(tmp_path):
    for k in range(6):
        label = (np.arange(32)[None].repeat(32, 0) >= 6 + 4 * k).astype(np.uint8)
        label = label.T if k % 2 else label
        image = np.where(label[..., None] == 0, (200, 30, 30), (30, 30, 200)).astype(np.uint8)
        for folder, array in (("train_label", label), ("train_img", image)):
            (tmp_path / "d" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / "d" / folder / f"{k}.png")
    Flat.reads = 0
    return Flat(str(tmp_path / "d"), size=(32, 32), classes="2")


CPU = torch.device("cpu")


def test_fcn_scorer_learns_two_colours_and_is_kept(flat, tmp_path, capsys):
    cache = tmp_path / "runs" / "fcn.pt"
    settings = dict(weights="random", width=4, steps=40, batch_size=3, lr=1e-3)
    torch.manual_seed(21)
    state = torch.get_rng_state()
    net = common.fcn_scorer(flat, cache, CPU, **settings)
    assert torch.equal(state, torch.get_rng_state()), "the run's random numbers are disturbed"
    assert not net.training and cache.is_file() and Flat.reads == 120
    with torch.no_grad():
        right = [(net(flat[i]["image"][None]).argmax(1)[0] == flat[i]["label"]).float().mean()
                 for i in range(6)]
    assert np.mean(right) > .93, right

    Flat.reads, capsys = 0, capsys
    again = common.fcn_scorer(flat, cache, CPU, **settings)
    assert Flat.reads == 0 and not again.training
    assert torch.equal(state, torch.get_rng_state()
                       ), "reading the cache disturbs the random numbers"
    assert all(
    torch.equal(
        a, b) for a, b in zip(
            net.state_dict().values(), again.state_dict().values()))

    capsys.readouterr()
    common.fcn_scorer(flat, cache, CPU, **settings | {"steps": 2})
    assert Flat.reads == 6 and "note:" in capsys.readouterr().out
    cache.write_bytes(cache.read_bytes()[:3000])
    with refused(cache, "delete it"):
        common.fcn_scorer(flat, cache, CPU, **settings | {"steps": 2})


def test_fcn_scorer_is_the_same_whatever_was_drawn_before(flat, tmp_path):
    nets = []
    for k in range(2):
        torch.manual_seed(k)
        nets.append(
    common.fcn_scorer(
        flat,
        tmp_path /
        f"{k}.pt",
        CPU,
        "random",
        2,
        2,
         3).state_dict())
    assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])


def test_fcn_scorer_leaves_the_datasets_epoch_alone(flat, tmp_path):
    flat.epoch = 17
    common.fcn_scorer(flat, tmp_path / "a.pt", CPU, "random", 2, 3, 3)
    assert flat.epoch == 17


def test_fcn_scorer_of_another_width_has_no_imagenet_weights(flat, tmp_path):
    with refused("--scorer-width 4", "64", "random"):
        common.fcn_scorer(flat, tmp_path / "a.pt", CPU, "imagenet", width=4, steps=1)


# -------------------------------------------------------------------------------------- scores

def numpy_scores(predicted, label, table):
    """Loops over pixels: accuracy, mean of per-class accuracies, mean IoU over the classes seen."""
    scored = list(table.scored) or list(range(len(table.names)))
    pairs = [(t, p) for t, p in zip(label.flatten().tolist(),
              predicted.flatten().tolist()) if t in scored]
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
    label = torch.from_numpy(rng.integers(0, table.channels, (2, 20, 30))
                             )       # unknown among them
    label[:, :, :9] = 7 % n
    predicted = torch.where(torch.from_numpy(rng.random((2, 20, 30)) < .6), label.clamp(max=n - 1),
                            torch.from_numpy(rng.integers(0, n, (2, 20, 30))))
    confusion = common.confusion_matrix(predicted, label, table)
    assert confusion.shape == (n, n) and confusion.dtype == torch.int64
    want = np.zeros((n, n), int)
    for t, p in zip(label.flatten().tolist(), predicted.flatten().tolist()):
        if t < n and (not table.scored or t in table.scored):
            want[t, p] += 1
    assert np.array_equal(confusion, want)
    scores = common.segmentation_scores(confusion)
    got = scores["per-pixel acc"], scores["per-class acc"], scores["class IOU"]
    assert got == pytest.approx(numpy_scores(predicted, label, table), abs=1e-12)


def test_perfect_and_worst_scores():
    table = class_table("camvid")
    label = torch.arange(11).repeat(3, 4)[None]
    perfect = common.segmentation_scores(common.confusion_matrix(label, label, table))
    worst = common.segmentation_scores(common.confusion_matrix((label + 1) % 11, label, table))
    assert set(perfect.values()) == {1.0} and set(worst.values()) == {0.0}


def test_scores_of_nothing_known_are_no_crash():
    table = class_table("camvid")
    label = torch.full((1, 4, 4), 11)
    scores = common.segmentation_scores(common.confusion_matrix(label * 0, label, table))
    assert all(math.isnan(v) or v == 0 for v in scores.values())


def test_scored_target_keeps_19_of_cityscapes_35():
    table = class_table("cityscapes")
    target = common.scored_target(torch.arange(35), table)
    assert [k for k in range(35) if target[k] != 255] == [
        7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert all(target[k] == k for k in table.scored) and target.dtype == torch.int64
    coco = common.scored_target(torch.tensor([[0, 181, 182]]), class_table("coco_stuff"))
    assert coco.tolist() == [
        [0, 181, 255]]


# ---------------------------------------------------------------------------- files of weights

def test_save_and_load(tmp_path):
    content = {"a": torch.arange(5), "n": 3, "nested": {"s": "x", "list": [1, 2.5, None]}}
    save_file(content, tmp_path / "new" / "folder" / "x.pt")
    got = load_file(tmp_path / "new" / "folder" / "x.pt", "")
    assert torch.equal(got.pop("a"), content.pop("a")) and got == content


@pytest.mark.parametrize("where, error", [
    ("os.fsync", OSError(28, "No space left on device")),
    ("torch.save", OSError(28, "No space left")),
    ("torch.save", RuntimeError("PytorchStreamWriter failed writing file")),
    ("os.replace", OSError(5, "Input/output error"))])
def test_a_full_disk_leaves_the_old_file_whole(where, error, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_file({"step": 1}, path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise error
    module, name = where.split(".")
    monkeypatch.setattr({"os": os, "torch": torch}[module], name, fail)
    with refused(path, error.args[-1]):
        save_file({"step": 2}, path)
    monkeypatch.undo()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_the_new_file_is_on_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    calls = []
    real = {"fsync": os.fsync, "replace": os.replace}
    for name in real:
        monkeypatch.setattr(os, name, lambda *a, name=name: calls.append(name) or real[name](*a))
    save_file({"step": 1}, tmp_path / "x.pt")
    assert calls[:2] == ["fsync", "replace"]


def test_interrupting_a_save_leaves_the_old_file(tmp_path, monkeypatch):
    """Ctrl-C in the middle of torch.save."""
    path = tmp_path / "x.pt"
    save_file({"step": 1}, path)

    def interrupt(content, file):
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_file({"step": 2}, path)
    assert load_file(path, "") == {"step": 1}


def test_save_below_a_file_is_a_user_error(tmp_path):
    (tmp_path / "plain").write_text("a file, no folder")
    with refused("plain"):
        save_file({}, tmp_path / "plain" / "x.pt")


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], 7])
def test_load_refuses_what_is_no_dict(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with refused("x.pt", type(content).__name__, "the cure"):
        load_file(tmp_path / "x.pt", "the cure")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("data", [b"", b"text", b"PK\x03\x04" + bytes(50), b"\x80\x04."])
def test_load_refuses_damaged_files(data, tmp_path):
    (tmp_path / "x.pt").write_bytes(data)
    with refused("x.pt", "the cure"):
        load_file(tmp_path / "x.pt", "the cure")
