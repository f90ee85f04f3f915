"""Teach a small VGG-16 to see as a large one does: the eyes of `--vgg small`.

A random VGG takes a blurred photo for a slightly darker one; ImageNet's is slow on a laptop. So a
VGG-16 of a quarter of the width, the student, learns from one of full width, in every layer:

    features     what the teacher sees, through a linear map that is dropped afterwards
    distances    how far an image is from a spoiled one: the relative L1 distance of their features,
                 as a map of where they differ, and the logarithm of its mean
    slopes       which way the pixels of the spoiled image should move to come nearer, finely and
                 coarsely: all that a generator learns from a perceptual loss. A small network with
                 other slopes lets through what the teacher would not: odd colours, rims

Images are photos, streets without end, and what generators made of streets (street_N.png of the
scripts' `sample`, whose photo is street N).

    python tests/distill.py --teacher vgg16.pth --photos camvid/train --outputs samples \
        --minutes 120 --out notebooks/weights/vgg_small.pt
"""
import argparse
import copy
import random
import re
import sys
import time
from itertools import count, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402 (before torch: it says how torch's threads wait)
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

LAYERS = ("conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2", "pool3", "conv4_1",
          "conv4_2", "pool4", "conv5_1", "conv5_2", "conv5_3", "pool5")    # each after its ReLU
SIDES = {64: 9, 96: 4, 128: 2}           # of crops, in pixels: pairs in a batch, for equal cost
WAYS = ((True, nn.MaxPool2d), (False, nn.MaxPool2d), (True, nn.AvgPool2d))    # normalised, pooling
u = random.uniform


def street(number: int, size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(common.street(0, number, size)["image"]).permute(2, 0, 1)


def read(path: Path) -> Tensor:
    """A photo (3, H, W) uint8; of a picture of street N, that street and the picture (6, H, W)."""
    image = common.read_image(path)
    number = re.match(r"street_(\d+)", path.name)
    return torch.cat([street(int(number[1]), image.shape[1:]), image]) if number else image


def crop(pools: list, side: int) -> Tensor:
    """A random square of a random image, shrunk up to three times: (3 or 6, side, side)."""
    x = torch.empty(3, 0, 0)
    while min(x.shape[1:]) < side:
        x = random.choice(random.choice(pools))
    size = int(side * min(3, min(x.shape[1:]) / side) ** random.random())
    i, j = (random.randint(0, n - size) for n in x.shape[1:])
    x = x[None, :, i:i + size, j:j + size].float() / 127.5 - 1
    x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)[0]
    return x.flip(2) if random.random() < .5 else x


def blur(x: Tensor, sigma: float) -> Tensor:
    kernel = torch.softmax(-(torch.arange(-9, 10) / sigma) ** 2 / 2, 0).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(x.view(-1, 3, *x.shape[-2:]), (9, 9, 9, 9), "reflect"), kernel, groups=3)
    return F.conv2d(x, kernel.transpose(2, 3), groups=3).squeeze(0)


def spoil(x: Tensor, other: Tensor) -> Tensor:
    """One of eleven faults, at any strength."""
    side, colour = x.shape[1], torch.randn(3, 1, 1)
    noise = torch.randn(1, 3, *2 * [side // random.choice((1, 1, 2, 4, 8, 16))])
    t = torch.arange(side) // random.randint(1, 8)
    board = (t[:, None] * random.randint(0, 1) + t) % 2 * 2 - 1                 # or stripes
    match random.randrange(11):
        case 0: return blur(x, u(.4, 3.5))
        case 1: return x * u(.4, 1.2) + u(-.4, .4)                              # light
        case 2: return x.roll((random.randint(-4, 4), random.randint(-4, 4)), (1, 2))
        case 3: return x.lerp(other, u(.1, .9))                                 # two photos
        case 4: return x + (x * torch.randn(3, 1, 1) + colour) * u(0, .3)       # tint
        case 5: return (torch.eye(3).lerp(torch.rand(3, 3), u(0, .7)) @ x.flatten(1)).view_as(x)
        case 6: return x.mean(0, keepdim=True).lerp(x, u(-.5, .8))              # grey, or beyond
        case 7: return x + u(1, 4) * colour * (x - blur(x, u(.5, 2))).abs().mean(0)         # rims
        case 8: return x + u(.02, .4) * F.interpolate(noise, (side, side))[0]   # down to blotches
        case 9: return x + u(.05, .4) * colour * board
        case 10: return torch.stack([c.roll((random.randint(-2, 2), random.randint(-2, 2)), (0, 1))
                                     for c in x])                               # fringes


def pair(pools: list, side: int) -> Tensor:
    """An image and what became of it, (2, 3, side, side) in [-1, 1]."""
    x, other = crop(pools, side), crop(pools, side)[:3]
    x, y = x.chunk(2) if len(x) == 6 else (x, spoil(x, other))
    y = spoil(y, other) if random.random() < .3 else y
    return torch.stack([x, x.lerp(y, u(.05, 1)) if random.random() < .4 else y]).clamp(-1, 1)


def apart(x: list[Tensor], y: list[Tensor]) -> list[Tensor]:
    """Of each layer a map (B, h, w), whose mean is the relative L1 distance of its features."""
    return [(a - b).abs().mean(1) / a.mean((1, 2, 3)).clamp(min=1e-3)[:, None, None]
            for a, b in zip(x, y)]


def three_distances(features: list[Tensor]) -> list[Tensor]:
    """Of a batch x, y: between x and y, x and another x, y and that other."""
    x, y = zip(*(f.float().chunk(2) for f in features))
    other = [f.roll(1, 0) for f in x]
    return [*apart(x, y), *apart(x, other), *apart(y, other)]


def slopes(x: list[Tensor], y: list[Tensor], image: Tensor, weights: Tensor,
           graph: bool) -> list[Tensor]:
    """The gradient of the distance from x to y at the pixels of y's image, and its local means."""
    far = sum(w * m.mean((1, 2)).sum() for w, m in zip(weights, apart(x, y)))
    way = torch.autograd.grad(far, image, create_graph=graph)[0]
    return [F.avg_pool2d(way, k).flatten(1) for k in (1, 4, 16)]


@torch.no_grad()
def save(net: common.VGGFeatures, image: Tensor, path: Path) -> None:
    """torchvision's names, half precision; each layer is divided by its mean activation, so that it
    is 1, as the teacher's, and the next layer multiplied by it."""
    net, before, x = copy.deepcopy(net), 1.0, ((image + 1) / 2 - net.mean) / net.std
    for layer in net.trunk:
        x, conv = layer(x), layer if isinstance(layer, nn.Conv2d) else conv
        if isinstance(layer, nn.ReLU):
            conv.weight *= before / x.mean()
            conv.bias /= x.mean()
            before = x.mean()
    torch.save({f"features.{i}.{name}": p.half() for i, layer in enumerate(net.trunk)
                for name, p in layer.named_parameters()}, path)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--teacher", required=True, help="weights of torchvision's VGG-16")
    p.add_argument("--photos", type=Path, nargs="+", required=True, help="folders of photos")
    p.add_argument("--outputs", type=Path, nargs="*", default=[], help="folders of street_N*.png")
    p.add_argument("--start", type=Path, help="a student to go on from (a random one)")
    p.add_argument("--out", type=Path, required=True, help="file of the student")
    p.add_argument("--width", type=int, default=16, help="channels of its first layer (16)")
    p.add_argument("--lr", type=float, default=1e-3, help="its rate, which falls to 0 (0.001)")
    p.add_argument("--minutes", type=float, default=120, help="when to stop (120)")
    p.add_argument("--steps", type=int, default=10 ** 9, help="when to stop, if that is earlier")
    a = p.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    photos, outputs = ([read(f) for d in folders for f in sorted(d.rglob("*.[jp][pn]g"))
                        if "grid" not in f.name] for folders in (a.photos, a.outputs))
    drawn = (street(n, (h := random.randint(64, 192), 2 * h)) for n in count(3_000_000))
    streets = [*islice(drawn, 200)]             # of numbers that no script uses
    pools = [pool for pool in (photos, photos, outputs, streets) if pool]
    some = torch.stack([crop([photos, streets], 128) for _ in range(100)])
    teacher = common.VGGFeatures(LAYERS, 16, a.teacher)
    student = common.VGGFeatures(LAYERS, 16, "random", width=a.width)
    with torch.no_grad():
        for own, value in zip(student.parameters(), common.load_file(a.start, "").values()
                              if a.start else ()):
            own.copy_(value)
        maps = nn.ModuleList(nn.Conv2d(x.shape[1], y.shape[1], 1) for x, y in zip(
            student(some[:1]).values(), teacher(some[:1]).values()))
    average = copy.deepcopy(student)            # of its last 200 steps or so
    student.requires_grad_(True)
    adam = torch.optim.Adam([*student.parameters(), *maps.parameters()], fused=True)
    start, step = time.time(), 0
    while (done := max((time.time() - start) / 60 / a.minutes, step / a.steps)) < 1:
        way, side = random.choice(WAYS), random.choice(list(SIDES))
        for net in (teacher, student):          # the scripts look through a VGG in all these ways
            net.normalise = way[0]
            for block in range(1, 6):
                setattr(net.trunk, f"pool{block}", way[1](2))
        streets[step % len(streets)] = next(drawn)
        batch = torch.stack([pair(pools, side) for _ in range(SIDES[side])])       # (B, 2, 3, H, W)
        x, y = batch.unbind(1)
        y.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                real_x = [f.float() for f in teacher(x).values()]
            real_y, own_x, own_y = ([f.float() for f in net(v).values()] for net, v in
                                    ((teacher, y), (student, x), (student, y)))
            weights = torch.rand(len(LAYERS)) ** 4                      # a few layers at a time
            ways = [*zip(slopes(own_x, own_y, y, weights, True),
                         slopes(real_x, real_y, y, weights, False))]
            real = [torch.cat([f, g.detach()]) for f, g in zip(real_x, real_y)]
            own = [torch.cat([f, g]) for f, g in zip(own_x, own_y)]
            guess = [linear(f[::2]) for linear, f in zip(maps, own)]    # of every other, for speed
        pairs = [*zip(three_distances(own), three_distances(real))]
        features = sum((g - f[::2]).float().square().mean() / f[::2].float().var()
                       for g, f in zip(guess, real)) / len(LAYERS)
        where = sum((d - t).abs().mean() / t.mean() for d, t in pairs) / len(pairs)
        mean = sum(((d.mean((1, 2)) + .02) / (t.mean((1, 2)) + .02)).log().square().mean()
                   for d, t in pairs) / len(pairs)
        turn = sum(1 - F.cosine_similarity(g, t.detach()).mean() for g, t in ways) / len(ways)
        adam.param_groups[0]["lr"] = a.lr * min(1, step / 100) * (1 - done)
        adam.zero_grad(set_to_none=True)
        strict = 3 if done > .8 else 1          # in the end distances count more, features less
        (features / strict + where + 10 * strict * mean + 2 * turn).backward()
        adam.step()
        for slow, fast in zip(average.parameters(), student.parameters()):
            slow.lerp_(fast.detach(), .005)
        step += 1
        if step % 200 == 0:
            print(f"{step} steps, {(time.time() - start) / 60:.1f} minutes: features {features:.3f}"
                  f", maps {where:.3f}, distances {mean:.4f}, slopes {turn:.3f}", flush=True)
            save(average, some, a.out)
    save(average, some, a.out)


if __name__ == "__main__":
    main()
