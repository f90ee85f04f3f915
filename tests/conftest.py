"""Fixtures that every test file may use. The scripts stand one folder up, beside this one.

    python -m pytest          what a change may break, in minutes
    python -m pytest --all    everything: notebooks executed, kills, torchrun, compilation
"""

import contextlib
import csv
import functools
import importlib
import io
import os
import pkgutil
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import CodeType
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[1]
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(SCRIPTS))

import common  # noqa: E402 (before torch: it says how torch's threads wait)

import matplotlib.figure  # noqa: E402
import torch  # noqa: E402

for number in (signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])):
    if signal.getsignal(number) == signal.SIG_IGN:      # a shell's background job, or nohup: what
        signal.signal(number, signal.SIG_DFL)           # the tests start would not hear it either
torch.set_num_threads(1)                          # tiny networks: threads cost more than they give

# The least training of each script: five images in batches of two, so that an epoch has two steps
# and step 3 is in mid-epoch.
BASE = "--limit 5 --batch-size 2 --epochs 2000 --save-every 3 --gpu -1"
TINY = {
    "crn_imle": f"--size 32 32 --width 4 --layers conv1_1 --pool 4 --candidates 2 --inner-steps 2 "
                f"--rebalance both --vgg random --lr 0.001 {BASE}",
    "lab2pix": "--size 64 64 --width 2 --noise 4 --first noise --d-width 2 --ups 4 --T 1 "
               "--discriminator patch --scales 1 --no-dgnorm --lambda-5 0 --vgg random "
               f"--vgg-width 2 --lr 0.0002 {BASE}",
    "lab2pix-full": "--size 64 64 --width 2 --noise 4 --first noise --d-width 2 --ups 4 "
                    f"--vgg random --vgg-width 2 --lr 0.0002 {BASE}",
    "lab2pix-V1": "--version V1 --size 64 64 --width 2 --noise 4 --d-width 2 --ups 5 --s-width 2 "
                  f"--s-size 64 --vgg random --vgg-width 2 --lr 0.0002 {BASE}",
    "pix2pix": f"--size 32 32 --width 4 --patch 16 --lr 0.0002 {BASE}",
    "pix2pixhd": "--size 32 32 --enhancers 0 --width 4 --downs 2 --blocks 1 --scales 1 --d-width 4 "
                 "--features 2 --e-width 2 --min-area 0 --loss GAN+FM --vgg random --lr 0.0002 "
                 f"{BASE}"}
NAMES = ("crn_imle", "lab2pix", "pix2pix", "pix2pixhd")
SCORER = "--vgg random --scorer-width 2 --scorer-steps 2"


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the tests that are marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with --all alone")


def pytest_collection_modifyitems(config, items):
    """Without --all, slow tests are left out, unless a file or a test is asked for by name."""
    if not config.getoption("--all") and not any("::" in word for word in config.args):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    items.sort(key=lambda item: item.originalname == EXECUTED)          # these come last


EXECUTED = "test_it_runs_from_a_fresh_kernel_and_the_answers_are_right"


@pytest.fixture(scope="session", autouse=True)
def execution(request, tmp_path_factory):
    """The notebooks run beside all other tests, in a process of their own with one thread; each
    that is finished lies in the folder. (folder, process, what lay beside the notebooks before)."""
    paths = [str(item.callspec.params["path"]) for item in request.session.items
             if item.originalname == EXECUTED]
    if not paths:
        yield None
        return
    folder = tmp_path_factory.mktemp("notebooks")
    before = set((SCRIPTS / "notebooks").rglob("*"))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("MPLBACKEND", None)                 # figures belong into the notebook
    command = [sys.executable, str(SCRIPTS / "tests" / "test_notebooks.py"), str(folder), *paths]
    process = subprocess.Popen(command, env=env)
    yield folder, process, before
    process.terminate()
    process.wait()


@pytest.fixture(autouse=True)
def keep_process_clean(tmp_path, monkeypatch):
    """Each test has its own working folder, starts from seed 0, and leaves no trace."""
    monkeypatch.chdir(tmp_path)
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)) if n]
    handlers = {n: signal.getsignal(n) for n in numbers}
    rng = torch.get_rng_state()
    torch.manual_seed(0)
    common.notice.cache_clear()                   # a notice is printed once per process
    yield
    torch.set_rng_state(rng)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def draw_each_street_once():
    """Each call opens the streets anew, and drawing them is what takes longest in tiny runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "street", functools.lru_cache(None)(common.street))
        yield


@pytest.fixture
def no_plots(monkeypatch):
    """losses.png takes longer to draw than all the rest; the log is written all the same."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **options: None)


# ------------------------------------------------------------------------------ Running a script

class Ended(NamedTuple):
    """How a call ended: its exit code, or what a user would see as a traceback; what was said."""
    code: int | str
    out: str
    err: str


@functools.cache
def last_lines(name: str) -> CodeType:
    """What stands below `if __name__ == "__main__"`."""
    head, _, tail = (SCRIPTS / f"{name}.py").read_text().partition("\nif __name__ ==")
    return compile("\n" * (head.count("\n") + 1) + "if __name__ ==" + tail, f"{name}.py", "exec")


def as_user(name: str, line: str) -> Ended:
    """The script as it runs from a shell, in this process.

    What main raises goes through the script's own last lines; what they let through would be a
    traceback. Of "lab2pix-V1" the script is lab2pix.
    """
    name = name.partition("-")[0]
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")          # as strict as a terminal
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    code, before = 0, sys.argv
    sys.argv = [f"{name}.py", *shlex.split(line)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            exec(last_lines(name), vars(importlib.import_module(name)) | {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code or 0
    except Exception as error:
        code = f"a traceback: {type(error).__name__}: {error}"
    finally:
        sys.argv = before
    texts = []
    for stream in (out, err):
        stream.seek(0)
        texts.append(stream.read())
    return Ended(code, *texts)


def works(name: str, line: str) -> str:
    """The call must succeed, with nothing on stderr; returns what it printed."""
    ended = as_user(name, line)
    assert (ended.code, ended.err) == (0, ""), f"{line}: {ended.code} {ended.err}"
    return ended.out


def fails(name: str, line: str, *words) -> str:
    """The call must end as a user's mistake: exit code 2 and one line that has these words."""
    ended, script = as_user(name, line), name.partition("-")[0]
    assert ended.code == 2, f"{line}: exit code or error {ended.code}"
    lines = ended.err.splitlines()
    assert len(lines) == 1, f"{line}: {len(lines)} lines on stderr, the last {lines[-1:]}"
    assert ended.err.startswith(f"{script}.py: error: "), ended.err
    for word in words:
        assert str(word) in ended.err, f"{line}: {word!r} is not in: {ended.err}"
    return ended.err


@contextlib.contextmanager
def refused(*words):
    """A UserError of one line that contains all words."""
    with pytest.raises(common.UserError) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, f"{word!r} is not in: {text}"


def shell(line: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *shlex.split(line)], capture_output=True, text=True,
                          env=environment(), **{"timeout": 300} | options)


def environment() -> dict[str, str]:
    path = os.pathsep.join((str(SCRIPTS), str(SCRIPTS / "tests")))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(line: str, **options) -> subprocess.CompletedProcess:
    """Two processes, on a port that nobody uses."""
    return shell("-m torch.distributed.run --nproc_per_node=2 "
                 f"--master_port {free_port()} {line}", **options)


# ---------------------------------------------------------------------------------------- Files

def fill_the_disk(patch, name: str) -> None:
    """torch.save, os.fsync or os.replace fail as on a full disk."""
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    assert callable(pkgutil.resolve_name(name))
    patch.setattr(name, full)


class Trap:
    """What unpickles to a file named "sprung", if somebody does unpickle it."""

    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


def save(path: Path | str, image: np.ndarray | Image.Image, **options) -> Path:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return Path(path)


def picture(path: Path | str, h: int = 40, w: int = 50, seed: int = 0) -> Path:
    return save(path, np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8))


def label_map(path: Path | str, h: int = 37, w: int = 53) -> Path:
    """Blocks of twelve ids."""
    blocks = np.arange(12, dtype=np.uint8).reshape(3, 4)
    return save(path, blocks[np.arange(h)[:, None] * 3 // h, np.arange(w) * 4 // w])


def png(h: int, w: int, depth: int, colour: int, lines: bytes) -> bytes:
    """A file that Pillow would not write: `lines` is what is said to be its pixels."""
    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    header = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


def edges_of(ids: np.ndarray) -> np.ndarray:
    """Which pixels of (H, W) have a neighbour of another id: above, below, to the left or right."""
    p = np.pad(ids, 1, "edge")
    beside = p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]
    return np.any([ids != other for other in beside], 0)


def size_of(path: Path | str) -> tuple[int, int]:
    """(width, height), as Pillow says it."""
    with Image.open(path) as image:
        return image.size


def stored(run: Path | str) -> dict:
    return torch.load(Path(run) / "checkpoint.pt", weights_only=True)


def place(run: Path | str) -> tuple[int, int, int]:
    """How far a run has got: updates, epochs, images of this epoch."""
    return tuple(stored(run)["place"][k] for k in ("step", "epoch", "seen"))


def losses_of(run: Path | str) -> list[dict]:
    with open(Path(run) / "log.csv") as file:
        return [without_speed(row) for row in csv.DictReader(file)]


def without_speed(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in ("images/s", "wait")}


# ------------------------------------------------------------------------- Networks and pictures

def parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def four_numbers(t: torch.Tensor) -> list[float]:
    """The check values of an output: mean, deviation, the first number, one inside the last map."""
    h, w = t.shape[-2:]
    return [t.mean().item(), t.std(correction=0).item(), t[0, 0, 0, 0].item(),
            t[-1, -1, h // 2, w // 3].item()]


def grey_levels(path: Path | str, y: torch.Tensor) -> int:
    """The largest difference of a file from an image (3, H, W) in [-1, 1] as the authors write it:
    cut down to 8 bits."""
    theirs = ((y.detach().movedim(0, -1).numpy() + 1) / 2 * 255).clip(0, 255).astype(np.uint8)
    assert theirs.std() > 5                                # a picture, not one colour
    with Image.open(path) as image:
        return int(np.abs(np.asarray(image).astype(int) - theirs).max())


# ------------------------------------------------------------------------------------- Comparing

def assert_same(a, b, where: str = "checkpoint") -> None:
    """Bit for bit, down to the last moment of Adam."""
    if torch.is_tensor(a):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], f"{where}[{k}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_state(run_a: Path | str, run_b: Path | str, log: bool = True) -> None:
    """Everything in two checkpoints but the config and how fast it went; the log has a row per
    save, too, so that two ways to one place may have other rows."""
    a, b = ({k: [without_speed(row) for row in v] if k == "log" else v
             for k, v in stored(run).items() if k != "config" and (log or k != "log")}
            for run in (run_a, run_b))
    assert_same(a, b)


def paper_map(script) -> dict[str, str]:
    """First column -> last column of the docstring's map."""
    block = re.search(r"Paper map.*?\n(.*?)\n\n", script.__doc__, re.DOTALL).group(1)
    cells = [re.split(r"\s{2,}", line.strip()) for line in block.splitlines()]
    assert all(len(row) == 3 for row in cells), [row for row in cells if len(row) != 3]
    return {f"{row[0]} {row[1]}": row[2] for row in cells}
