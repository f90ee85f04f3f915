"""What all five notebooks need: listings, pictures, tables, and checks of what a student typed.

Nothing in here belongs to a paper. The last part knows what each built-in street can look like, so
that a model's outputs can be compared with the true distribution. `start()` makes a notebook's
outputs the same on every run of one machine: one thread, one seed.

    python notebooks/helpers.py [NOTEBOOK ...]      execute them (all) in place

An executed notebook's metadata hold checksums of all that its outputs were made from; a test
compares them with the files.
"""

import contextlib
import hashlib
import inspect
import io
import itertools
import math
import re
import sys
import textwrap
import time
import tokenize
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: F401 (before torch: it says how torch's threads wait)
import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML, Image as Picture, Markdown, display
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from common import (
    COLOR_LAW, PALETTES, STREET_GRAIN, TIMES, WEATHERS, Style, draw_style, modes, paint, render,
    street_scene)

CPU = torch.device("cpu")
TABLES = Path(__file__).resolve().parents[1] / "tests" / "tables.txt"
WEIGHTS = Path(__file__).resolve().parent / "weights"      # trained beforehand; see its README


def start(seed: int = 0) -> None:
    """One thread, the seed, and the look of all plots."""
    torch.set_num_threads(1)       # with networks this small, more would wait for each other
    torch.manual_seed(seed)
    plt.rcParams.update({"figure.dpi": 100, "font.size": 9, "axes.spines.top": False,
                         "axes.spines.right": False})
    # In an exported page, listings would have the font of the text.
    display(HTML("<style>div.highlight pre { font-family: monospace }</style>"))


def source(*things) -> None:
    """Show functions or classes of a script, as they stand there."""
    for thing in things:
        display(Markdown(f"```python\n{textwrap.dedent(inspect.getsource(thing))}```"))


def trained(script, name: str, **changes):
    """The weights `weights/NAME.pt` in their script's networks: (config, state), on the CPU.

    The same as `sample --checkpoint weights/NAME.pt` does; `changes` are flags of that call.
    """
    path = WEIGHTS / f"{name}.pt"
    stored = script.read_weights(path)
    cfg = script.stored_config(stored, f"weights/{name}.pt", {"gpu": -1} | changes, testing=True)
    state = script.build(script.for_testing(cfg), CPU)
    script.load(state, stored, path)
    return cfg, state


# ------------------------------------------------------------------------------------ Pictures

def picture(image: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) in [0, 1]."""
    return ((image.detach().float() + 1) / 2).clamp(0, 1).movedim(0, -1).numpy()


def publish(figure, quality: int = 80) -> None:
    """Show a figure as JPEG, which is a third of a PNG's size, and close it."""
    data = io.BytesIO()
    figure.savefig(data, format="jpeg", pil_kwargs={"quality": quality})
    plt.close(figure)
    display(Picture(data.getvalue(), format="jpeg"))


def show(rows, titles=(), names=(), width: float = 8.8) -> None:
    """Rows of images (3, H, W), all of one size; titles above, names at the left."""
    columns = max(len(row) for row in rows)
    h, w = rows[0][0].shape[-2:]
    figure, axes = plt.subplots(
        len(rows), columns, squeeze=False, layout="constrained",
        figsize=(width, width / columns * h / w * len(rows) + 0.3 * bool(titles)))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for row, line in zip(rows, axes):
        for image, axis in zip(row, line):
            axis.imshow(picture(image), interpolation="nearest")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    for axis, name in zip(axes[:, 0], names):
        axis.set_ylabel(name, fontsize=8)
    publish(figure)


def grey(x: Tensor, low: float = 0.0, high: float = 1.0, size: int = 64) -> Tensor:
    """A map (h, w) as an image (3, size, size): `low` is black, `high` white, no smoothing."""
    x = (x.detach().float() - low) / (high - low) * 2 - 1
    return torch.nn.functional.interpolate(x[None, None], size, mode="nearest")[0].expand(3, -1, -1)


def encoded(image: Tensor, zoom: int = 5, kind: str = "jpeg") -> bytes:
    """(3, H, W) in [-1, 1] -> the bytes of an enlarged JPEG or PNG, for a widget."""
    data, pixels = io.BytesIO(), Image.fromarray((picture(image) * 255).round().astype(np.uint8))
    pixels = pixels.resize((zoom * pixels.width, zoom * pixels.height), Image.BICUBIC)
    pixels.save(data, kind, **({"quality": 88} if kind == "jpeg" else {}))
    return data.getvalue()


# -------------------------------------------------------------------------------------- Panels

def live(widget) -> None:
    """Show a widget; a page without a running notebook shows one line in its place."""
    word = "[A panel to use with the mouse: it needs a running notebook.]"
    display(widget._repr_mimebundle_() | {"text/plain": word}, raw=True)


class ClickMap:
    """A picture that answers clicks: `click(value)` gets the value of the tile that was hit.

    A picture cannot be clicked, but a transparent button that lies on it can. `unit` is the side of
    the smallest tile on the screen, in pixels.
    """

    def __init__(self, rows: int, columns: int, unit: int, click):
        self.click, self.buttons = click, {}
        self.view = ipywidgets.Image(format="jpeg", layout=dict(
            margin="0", width=f"{columns * unit}px", height=f"{rows * unit}px",
            max_width="none", grid_area="1 / 1 / -1 / -1"))
        self.box = ipywidgets.GridBox([self.view], layout=dict(
            width=f"{columns * unit}px", height=f"{rows * unit}px", flex="none", overflow="hidden",
            grid_template_rows=f"repeat({rows}, {unit}px)", grid_gap="0",
            grid_template_columns=f"repeat({columns}, {unit}px)"))

    def cover(self, tiles: dict) -> None:
        """A button on each tile {(top, left, bottom, right) in units: value}; those that fit stay.
        """
        old, self.buttons = self.buttons, {}
        for edges, value in tiles.items():
            button = old.pop(edges, None)
            if button is None:
                area = " / ".join(str(edge + 1) for edge in edges)
                button = ipywidgets.Button(style={"button_color": "transparent"}, layout=dict(
                    margin="0", padding="0", width="100%", height="100%", grid_area=area))
                button.on_click(lambda pressed: self.click(pressed.value_of_tile))
            button.value_of_tile, self.buttons[edges] = value, button
        self.box.children = [self.view, *self.buttons.values()]
        for button in old.values():
            button.close()

    def hit(self, row: int, column: int) -> None:
        """Press the button on a place, in units, as the mouse would do."""
        next(button for (top, left, bottom, right), button in self.buttons.items()
             if top <= row < bottom and left <= column < right).click()


def rectangles(ids: Tensor) -> dict:
    """Cut a map (H, W) into rectangles of one value each: {(top, left, bottom, right): value}."""
    growing, done = {}, {}
    for row, line in enumerate([*ids.tolist(), []]):
        cuts = [0, *(k for k in range(1, len(line)) if line[k] != line[k - 1]), len(line)]
        runs = {(a, b, line[a]) for a, b in zip(cuts, cuts[1:]) if a < b}
        for run in growing.keys() - runs:           # a run that does not go on in this row
            done[growing.pop(run), run[0], row, run[1]] = run[2]
        growing |= {run: row for run in runs - growing.keys()}
    return dict(sorted(done.items()))


def coloured_button(word: str, colour, press, **layout) -> ipywidgets.Button:
    """A button in a colour (3 numbers in [0, 1]), its word in black or white."""
    button = ipywidgets.Button(description=word, layout=dict(width="auto", margin="1px") | layout)
    button.on_click(press)
    recolour(button, colour)
    return button


def recolour(button, colour) -> None:
    values = [round(255 * min(max(float(v), 0), 1)) for v in colour]
    button.style.button_color = "#%02x%02x%02x" % tuple(values)
    button.style.text_color = "black" if sum(values) > 330 else "white"


# ------------------------------------------------------------------------- Tables and verdicts

def table(head, rows) -> None:
    """A table in Markdown; numbers with three digits."""
    cell = lambda v: f"{v:.3g}" if isinstance(v, float) else str(v)
    lines = [head, ["---"] * len(head), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)))


def three_seeds(name: str) -> None:
    """A table of tests/tables.txt: the paper's rows, each trained with three seeds, for longer than
    a class has time for; and the command that trains one row of it at home."""
    part = re.search(rf"^{name}, .*?(?=\n\n|\Z)", TABLES.read_text(), re.DOTALL | re.MULTILINE)
    head, *lines = [line for line in part.group(0).splitlines()[1:]
                    if line.startswith(" " * 24) or not line.startswith(" ")]
    head, *cells = [re.split(r"\s{2,}", line.strip()) for line in (head, *lines)]
    table(["three seeds", *head], cells)
    display(Markdown(f"`python tests/tables.py {name}` trains this table."))


def spread(values) -> str:
    """Mean and standard deviation of a few seeds: "0.512 ± 0.013"; of one, "0.512"."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def verdict(a, b, larger: bool = True) -> str:
    """Whether a lies above b (below, with larger=False) on several seeds: holds, falls, or neither.

    "within the spread": the means differ by no more than the larger of the two standard deviations,
    which are 0 where there is one seed.
    """
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b))
    gap = (a.mean() - b.mean()) * (1 if larger else -1)
    if gap.abs() <= max(x.std() if len(x) > 1 else 0 for x in (a, b)):
        return "within the spread"
    return "holds" if gap > 0 else "falls"


def quiet(function, *args, **more):
    """A function of a script without its printing."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args, **more)


# ----------------------------------------------------------------------------------- Exercises

def filled(value) -> bool:
    """False, with a note, as long as the gap of an exercise is open."""
    if value is None or value is ...:
        print("not filled in yet")
        return False
    return True


def expect(got, wanted, what: str = "your answer", within: float = 1e-2) -> None:
    """An assertion that says what is wrong, and not what would be right.

    Numbers may differ by `within` of the wanted size: a student types 0.69, not 0.6931. Tensors and
    arrays must agree in shape, and to `within` of the largest value.
    """
    if isinstance(wanted, (bool, str)) or wanted is None:
        assert got == wanted, f"{what}: it is not {got!r}"
        return
    try:
        a = torch.as_tensor(got, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        raise AssertionError(f"{what}: {got!r} is no number or tensor") from None
    b = torch.as_tensor(wanted, dtype=torch.float64).detach()
    assert a.shape == b.shape, f"{what}: expected shape {tuple(b.shape)}, got {tuple(a.shape)}"
    if not b.numel():
        return
    far = (a - b).abs() / b.abs().max().clamp(min=1e-6)
    if b.numel() == 1:
        how = f"{say(a)} is too {'large' if a > b else 'small'}"
    else:
        how = f"{int((far > within).sum())} of {b.numel()} values are wrong, yours begin {say(a)}"
    assert far.max() <= within, f"{what}: {how}"


def say(value) -> str:
    """A number with three digits, or a whole one; of a tensor, its first four values."""
    flat = torch.as_tensor(value, dtype=torch.float64).detach().flatten()
    text = ", ".join(f"{v:.0f}" if v == round(v) else f"{v:.3g}" for v in flat[:4].tolist())
    return text if flat.numel() == 1 else f"[{text}{', ...' if flat.numel() > 4 else ''}]"


# ------------------------------------------------------- What one street can look like, exactly

class Street:
    """The oracle of one built-in street: all its modes, their probabilities, and how to tell them.

    A mode is an "air" (time, weather, palette) and a colour per vehicle. A region is a vehicle,
    another object, or the stuff of one class, from 1 % of the image on (vehicles: always). Regions
    are compared by mean colours on [0, 1]. A vehicle's paint is taken to change its own region
    alone (a test measures that), so that 27 x 4 renderings stand for all modes.
    """

    def __init__(self, index: int, size: tuple[int, int]):
        self.layout = paint(street_scene(0, index), size)
        laws = [COLOR_LAW[name] for _, name in self.layout.vehicles]
        self.airs = list(itertools.product(TIMES, WEATHERS, PALETTES))
        self.time = torch.tensor([list(TIMES).index(time) for time, _, _ in self.airs])
        p = torch.tensor([p for _, p in modes(self.layout)], dtype=torch.float64)
        self.p = p.view(len(self.airs), *map(len, laws))           # (27, n_1, n_2, ...)
        ids, regions = np.unique(self.layout.instance, return_inverse=True)
        self.regions = torch.from_numpy(regions.reshape(-1))
        self.area = torch.bincount(self.regions)
        self.own = own = [int(np.flatnonzero(ids == k)[0]) for k, _ in self.layout.vehicles]
        self.rest = [r for r in range(len(ids)) if r not in own
                     and self.area[r] >= 0.01 * len(self.regions)]
        self.stuff = torch.empty(len(self.airs), len(self.rest), 3)
        self.paint = torch.full((len(self.airs), len(own), 4, 3), torch.inf)
        for (a, air), c in itertools.product(enumerate(self.airs), range(4)):
            style = Style(*air, tuple(list(law)[c % len(law)] for law in laws))
            photo = torch.from_numpy(render(self.layout, style)).permute(2, 0, 1)
            means = self.means(photo[None] * 2 - 1)[0]
            if c == 0:
                self.stuff[a] = means[self.rest]
            for v, law in enumerate(laws):
                self.paint[a, v, c % len(law)] = means[own[v]]
        gaps = [(a - b).abs().max() for a, b in itertools.combinations(self.stuff, 2)]
        for v, law in enumerate(laws):
            colours = self.paint[:, v, :len(law)].unbind(1)
            gaps += [(a - b).abs().amax(1).min() for a, b in itertools.combinations(colours, 2)]
        self.tau = min(gaps).item() / 2         # half the way to the nearest other mode

    def means(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [-1, 1] -> mean colours of all regions (n, regions, 3) on [0, 1]."""
        values = (images.clamp(-1, 1).float().flatten(2).movedim(2, 0) + 1) / 2    # (H * W, n, 3)
        sums = torch.zeros(len(self.area), *values.shape[1:]).index_add_(0, self.regions, values)
        return (sums / self.area[:, None, None]).transpose(0, 1)

    def read(self, images: Tensor) -> dict[str, Tensor]:
        """The nearest mode of each image (n, 1 + vehicles), and whether it is that mode.

        valid (n,): all regions within tau of it. fits (n, R): the region alone fits some mode.
        agree (n,): every region, taken alone, votes for the same time of day. majority (n,): the
        share of the regions' area whose vote is the most frequent one.
        """
        means, rows = self.means(images), torch.arange(len(images))
        stuff = (means[:, None, self.rest] - self.stuff).abs()                # (n, 27, R, 3)
        paint = (means[:, None, self.own, None] - self.paint).abs()           # (n, 27, V, 4, 3)
        cost, colour = paint.sum(4).min(3)                                    # (n, 27, V)
        air = (stuff.sum((2, 3)) + cost.sum(2)).argmin(1)
        colour = colour[rows, air]                                            # (n, V)
        worst = stuff[rows, air].amax((1, 2))
        for v in range(len(self.own)):
            worst = torch.maximum(worst, paint[rows, air, v, colour[:, v]].amax(1))
        alone = torch.cat([stuff.amax(3), paint.amax(4).amin(3)], 2)          # (n, 27, R + V)
        votes = self.time[torch.cat([stuff.sum(3), cost], 2).argmin(1)]       # (n, R + V)
        area = self.area[self.rest + self.own] / self.area[self.rest + self.own].sum()
        most = (F.one_hot(votes, len(TIMES)) * area[:, None]).sum(1)          # (n, times)
        return {"mode": torch.cat([air[:, None], colour], 1), "valid": (worst < self.tau).float(),
                "fits": (alone.amin(1) < self.tau).float(),
                "agree": (votes == votes[:, :1]).all(1).float(), "majority": most.amax(1)}

    def times(self, modes: Tensor) -> list[str]:
        """The times of day of modes as `read` gives them."""
        return [self.airs[a][0] for a in modes[:, 0]]

    def sample(self, n: int, seed: int) -> Tensor:
        """The true sampler: n photos (n, 3, H, W) in [-1, 1] of this layout."""
        rng = np.random.default_rng([seed, 7])
        photos = [render(self.layout, draw_style(self.layout, rng)) for _ in range(n)]
        photos = np.stack([photo + STREET_GRAIN * rng.standard_normal(photo.shape)
                           for photo in photos])
        return torch.from_numpy(photos).float().clamp(0, 1).permute(0, 3, 1, 2) * 2 - 1

    def measure(self, seen: dict[str, Tensor]) -> dict[str, float]:
        """MEASURES of what `read` saw in n samples. TV is NaN where none is valid."""
        n, p = len(seen["mode"]), self.p.flatten()
        strides = torch.tensor([math.prod(self.p.shape[i + 1:]) for i in range(self.p.ndim)])
        valid = (seen["mode"] * strides).sum(1)[seen["valid"] > 0]
        count = torch.bincount(valid, minlength=len(p))
        hit, rare, tv = (count > 0).double(), p < 0.05, (count / max(len(valid), 1) - p).abs().sum()
        times = torch.bincount(self.time[seen["mode"][:, 0]], minlength=3) / n
        values = [*(seen[k].mean() for k in ("valid", "fits", "agree", "majority")),
                  hit.mean(), p[hit > 0].sum(), hit[rare].mean(),
                  tv / 2 if len(valid) else torch.tensor(math.nan),
                  (times - torch.tensor(list(TIMES.values()))).abs().sum() / 2,
                  (1 - (1 - p) ** n).mean()]
        return {name: value.item() for name, value in zip(MEASURES, values, strict=True)}


MEASURES = {  # what no real dataset allows; the row of the true sampler says what can be reached
    "joint precision": "share of samples with all regions within tau of one mode",
    "class validity": "share of regions that alone fit some mode",
    "T-agreement": "share of samples whose regions all vote for one time of day",
    "T-majority": "share of a sample's area that votes for its most voted time of day",
    "recall": "share of modes that a valid sample hits", "mass recall": "their probability",
    "rare recall": "recall of modes below 5 %",
    "TV": "total variation of the valid samples' modes from the truth",
    "time TV": "the same of the times of day of all samples' nearest modes",
    "ideal recall": "recall that n draws from the truth have on average"}


def street_of(pair: dict) -> Street | None:
    """The oracle of a batch of one of the built-in streets, unless its layout was edited."""
    label = pair["label"][0].cpu().numpy()                         # (H, W)
    oracle = Street(int(pair["name"].removeprefix("street_")), label.shape)
    return oracle if np.array_equal(oracle.layout.label, label) else None


def switches(modes: Tensor) -> int:
    """How often the mode changes along a path (n, 1 + vehicles)."""
    return int((modes[1:] != modes[:-1]).any(1).sum())


def agreement(times: list[list]) -> float:
    """P[two layouts show the same time of day for one noise]: times[layout][noise]."""
    pairs = [a == b for i, x in enumerate(times) for y in times[:i] for a, b in zip(x, y)]
    return sum(pairs) / max(len(pairs), 1)


# ------------------------------------------------------------- From which state outputs were made

def code_of(text: str) -> str:
    """The code of a Python text: no comments, no docstrings, no spaces and line breaks."""
    parts, begins = [], True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            begins = True                           # a string that stands alone says nothing
        elif token.type not in (tokenize.NL, tokenize.COMMENT):
            if not (begins and token.type == tokenize.STRING):
                parts.append(token.string)
            begins = False
    return re.sub(r"[\s{}]", "", "".join(parts))    # Python 3.12 cuts f-strings, and their braces


def made_from(notebook) -> dict[str, str]:
    """Checksums of what a notebook's outputs come from: its cells' code, the scripts that it
    imports and what these import, and the weights and tables that it names."""
    root = Path(__file__).resolve().parents[1]
    cells = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    named = set(re.findall(r"\w+", cells))
    files = [root / "common.py", Path(__file__)]
    files += [path for path in sorted(root.glob("*.py")) if path.stem in named - {"common"}]
    found = {path.name: code_of(path.read_text()).encode() for path in files}
    quoted = set(re.findall(r"\"(\w+)(?:\.pt)?\"", cells))
    found |= {path.name: path.read_bytes() for path in sorted(WEIGHTS.glob("*.pt"))
              if path.stem in quoted}
    if "three_seeds" in named:
        found[TABLES.name] = TABLES.read_bytes()
    found["cells"] = code_of(cells).encode()
    return {name: hashlib.sha256(data).hexdigest()[:16] for name, data in found.items()}


def execute(path: Path) -> float:
    """Execute a notebook in place, and note what its outputs were made from; the seconds taken."""
    import nbformat
    from nbclient import NotebookClient

    clock, notebook = time.perf_counter(), nbformat.read(path, as_version=4)
    made = made_from(notebook)
    NotebookClient(notebook, timeout=3000, kernel_name="python3",
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:                     # times of the run, and states of widgets
        cell.metadata.pop("execution", None)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["made_from"] = made
    nbformat.write(notebook, path)
    return time.perf_counter() - clock


if __name__ == "__main__":
    chosen = sys.argv[1:] or sorted(Path(__file__).resolve().parent.glob("*.ipynb"))
    for path in map(Path, chosen):
        print(f"{path.name}: {execute(path.resolve()):.0f} s")
