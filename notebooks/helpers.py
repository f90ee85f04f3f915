"""What all five notebooks need: listings, pictures, tables, and checks of what a student typed.

Nothing in here belongs to a paper. `start()` makes a notebook's outputs the same on every run of
one machine: one thread, one seed.
"""

import contextlib
import inspect
import io
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common                      # before torch: it says how torch's threads wait
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML, Image as Picture, Markdown, display
from PIL import Image
from torch import Tensor

CPU = torch.device("cpu")
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
    given, where = {"gpu": -1} | changes, f"weights/{name}.pt"
    stored = script.read(WEIGHTS / f"{name}.pt")
    cfg = script.stored_config(stored, where, given, script.FREE_AT_TEST)
    if hasattr(script, "at_stage"):                         # pix2pixHD: which networks there are
        cfg = script.at_stage(cfg, given, stored, where)
    state = script.build(replace(cfg, **script.ALONE), CPU)
    script.load(state, stored, where)
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


def live(widget) -> None:
    """Show a widget; a page without a running notebook shows one line in its place."""
    word = "[A panel to use with the mouse: it needs a running notebook.]"
    display(widget._repr_mimebundle_() | {"text/plain": word}, raw=True)


# ------------------------------------------------------------------------- Tables and verdicts

def table(head, rows) -> None:
    """A table in Markdown; numbers with three digits."""
    cell = lambda v: f"{v:.3g}" if isinstance(v, float) else str(v)
    lines = [head, ["---"] * len(head), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)))


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
    """An assertion that says what it expected and what it got.

    Numbers may differ by `within` of the wanted size: a student types 0.69, not 0.6931. Tensors and
    arrays must agree in shape, and to `within` of the largest value.
    """
    if isinstance(wanted, (bool, str)) or wanted is None:
        assert got == wanted, f"{what}: expected {wanted!r}, got {got!r}"
        return
    try:
        a = torch.as_tensor(got, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        raise AssertionError(f"{what}: expected {say(wanted)}, got {got!r}") from None
    b = torch.as_tensor(wanted, dtype=torch.float64).detach()
    assert a.shape == b.shape, f"{what}: expected shape {tuple(b.shape)}, got {tuple(a.shape)}"
    close = (a - b).abs().max() <= within * b.abs().max().clamp(min=1e-6) if b.numel() else True
    assert close, f"{what}: expected about {say(wanted)}, got {say(got)}"


def say(value) -> str:
    """A number with three digits, or a whole one; of a tensor, its first four values."""
    flat = torch.as_tensor(value, dtype=torch.float64).detach().flatten()
    text = ", ".join(f"{v:.0f}" if v == round(v) else f"{v:.3g}" for v in flat[:4].tolist())
    return text if flat.numel() == 1 else f"[{text}{', ...' if flat.numel() > 4 else ''}]"
