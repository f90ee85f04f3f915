"""Fixtures that every test file may use. The scripts stand one folder up, beside this one.

    python -m pytest          what a change may break, in minutes
    python -m pytest --all    everything: notebooks executed, kills, torchrun, compilation
"""

import ast
import contextlib
import csv
import functools
import importlib
import io
import multiprocessing.forkserver
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
import tokenize
import zlib
from pathlib import Path
from types import CodeType, SimpleNamespace
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
BASE = "--limit 5 --batch-size 2 --epochs 2000 --gpu -1"
TINY = {
    "crn_imle": "--size 32 32 --width 4 --encoder-width 8 --layers conv1_1 --pool 4 --candidates 2 "
                f"--inner-steps 2 --rebalance both --vgg random --lr 0.001 {BASE}",
    "lab2pix": "--size 64 64 --width 2 --first noise --ups 4 --T 1 --discriminator patch "
               f"--no-dgnorm --lambda-5 0 --vgg random --lr 0.0002 {BASE}",
    "lab2pix-full": "--size 64 64 --width 2 --first noise --ups 4 --vgg random --lr 0.0002 "
                    f"{BASE}",
    "lab2pix-V1": "--version V1 --size 64 64 --width 2 --ups 5 --vgg random --lr 0.0002 "
                  f"{BASE}",
    "pix2pix": f"--size 32 32 --width 4 --patch 16 --lr 0.0002 {BASE}",
    "pix2pixhd": "--size 32 32 --enhancers 0 --width 4 --layers 2 1 1 --scales 1 --d-width 4 "
                 f"--features 2 --loss GAN+FM --vgg random --lr 0.0002 {BASE}"}
NAMES = ("crn_imle", "lab2pix", "pix2pix", "pix2pixhd")
SCORER = "--vgg random"                                    # with the fixture small_scorer
ROWS = [pytest.param(row, marks=[pytest.mark.slow] * ("-" in row))      # slow: the larger versions
        for row in TINY if row.partition("-")[0] in NAMES]
# What `sample --input` asks for besides: these networks see the boundaries of objects.
INSTANCES = dict.fromkeys(("lab2pix", "lab2pix-full", "pix2pixhd"), "--instances {}")


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


@pytest.fixture(scope="module")
def small_scorer():
    """evaluate trains its FCN-8s for two steps instead of a thousand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "fcn_scorer", functools.partial(common.fcn_scorer, width=2, steps=2))
        yield


@pytest.fixture(scope="module")
def steps_take_a_second():
    """For the scripts a step takes one second, and all else no time. So a run saves at the end of
    every epoch; by a real clock it would on an idle machine, and not on a busy one."""
    clock = SimpleNamespace(now=0.0)
    with pytest.MonkeyPatch.context() as patch:
        for script in map(importlib.import_module, NAMES):
            patch.setattr(script, "time", SimpleNamespace(**vars(time) | {
                "perf_counter": lambda: clock.now}))

            def told(run, losses, done=script.Run.done):
                clock.now += 1
                return done(run, losses)

            patch.setattr(script.Run, "done", told)
        yield clock


# ------------------------------------------------------------------------------ Running a script

class Ended(NamedTuple):
    """How a call or a process ended: its exit code, minus the signal, or what a user would see as a
    traceback; what was said."""
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


def script_of(row: str):
    """Of "lab2pix-V1" the script is lab2pix."""
    return importlib.import_module(row.partition("-")[0])


def sample_line(row: str, run: Path | str, source: str = "a.png", more: str = "") -> str:
    """`sample` of a run, for a file or folder with label maps: one image of each, unless said."""
    instances = INSTANCES.get(row, "").format(source)
    return (f"sample --checkpoint {run}/checkpoint.pt --input {source} {instances} --samples 1 "
            f"{more}")


def fails(name: str, line: str, *words) -> str:
    """The call must end as a user's mistake: exit code 2 and one line that has these words."""
    said = mistake(as_user(name, line), name, line)
    for word in words:
        assert str(word) in said, f"{line}: {word!r} is not in: {said}"
    return said


def mistake(ended: Ended, name: str, line: str) -> str:
    script, lines = name.partition("-")[0], ended.err.splitlines()
    assert ended.code == 2, f"{line}: exit code or error {ended.code}"
    assert len(lines) == 1, f"{line}: {len(lines)} lines on stderr, the last {lines[-1:]}"
    assert ended.err.startswith(f"{script}.py: error: "), ended.err
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


def lives(name: str, line: str, act=None, *arguments, env: dict | None = None, wait: bool = True):
    """The script in a process of its own, forked from one that has imported it already and trained
    nothing. act(script, *arguments) is called there first. Without `wait`, the process."""
    process = fork_server().Process(target=live, args=(
        name.partition("-")[0], line, os.getcwd(), env or {}, act, arguments))
    process.start()
    return ended(process) if wait else process


@functools.cache
def fork_server():
    """Where lives begin. It must find what it is to import by PYTHONPATH."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["conftest", *NAMES])
        multiprocessing.forkserver.ensure_running()
    return server


def live(name: str, line: str, folder: str, env: dict, act, arguments: tuple) -> None:
    os.chdir(folder)
    os.environ.update(env)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, [signal.SIG_DFL, signal.default_int_handler][number == signal.SIGINT])
    for number, file in ((1, "said"), (2, "wrong")):
        stream = open(f"{file}{env.get('RANK', '')}.txt", "w")
        os.dup2(stream.fileno(), number)
        setattr(sys, ("stdout", "stderr")[number - 1], stream)
    script = importlib.import_module(name)
    matplotlib.figure.Figure.savefig = lambda *_, **more: None       # slower than the training
    sys.argv = [f"{name}.py", *shlex.split(line)]
    if act:
        act(script, *arguments)
    exec(last_lines(name), vars(script) | {"__name__": "__main__"})


def ended(process, rank: str = "") -> Ended:
    process.join(300)
    process.kill()
    said = (Path(f"{file}{rank}.txt").read_text() for file in ("said", "wrong"))
    return Ended(process.exitcode, *said)


# ---------------------------------------------------------------------------------------- Files

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


# ---------------------------------------------------------------------------------- Source texts

def source(name: str) -> str:
    return (SCRIPTS / f"{name}.py").read_text("utf-8")


@functools.cache
def count(name: str) -> tuple[set[int], set[int], ast.Module]:
    """Line numbers of code, and of comments and docstrings, without blank lines; the tree."""
    text, doc, code, comments = source(name), set(), set(), set()
    tree = ast.parse(text)
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node):
            doc |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        lines = set(range(token.start[0], token.end[0] + 1))
        if token.type == tokenize.COMMENT:
            comments |= lines
        elif token.string.strip() and token.type != tokenize.ENDMARKER:
            code |= lines
    full = {i for i, line in enumerate(text.splitlines(), 1) if line.strip()}
    return (code - doc) & full, (comments | doc) & full, tree


def rooms(name: str) -> dict[str, int]:
    """Banner -> its line number."""
    return {m[1]: i for i, line in enumerate(source(name).splitlines(), 1)
            if (m := re.match(r"# -{20,} (\d.*)$", line))}


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
