"""Fixtures that every test file may use. The scripts stand one folder up, beside this one."""

import contextlib
import csv
import functools
import os
import pkgutil
import re
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("MPLBACKEND", "Agg")
SCRIPTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SCRIPTS))

import torch  # noqa: E402

import common  # noqa: E402

torch.set_num_threads(1)                          # tiny networks: threads cost more than they give


def pytest_configure(config):
    config.addinivalue_line("markers", "notebooks: executes a notebook, some minutes each")


@pytest.fixture(autouse=True)
def keep_process_clean(tmp_path, monkeypatch):
    """Each test has its own working folder, starts from seed 0, and leaves no trace."""
    monkeypatch.chdir(tmp_path)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
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


@contextlib.contextmanager
def refused(*words):
    """A UserError of one line that contains all words."""
    with pytest.raises(common.UserError) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, f"{word!r} is not in: {text}"


def refuses(call, capsys, line: str, *words: str) -> str:
    """The call must end as a user's mistake: one line that has these words in it."""
    with pytest.raises((common.UserError, SystemExit)) as caught:
        call(line)
    if isinstance(caught.value, SystemExit):               # argparse has printed its own line
        assert caught.value.code == 2
        text = capsys.readouterr().err.strip().splitlines()[-1]
    else:
        text = str(caught.value)
    assert "\n" not in text, text
    for word in words:
        assert word in text, text
    return text


def as_script(name: str, line: str, monkeypatch) -> int:
    """The script as __main__, in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *line.split()])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    return caught.value.code


def shell(line: str, **options) -> subprocess.CompletedProcess:
    path = os.pathsep.join((str(SCRIPTS), str(SCRIPTS / "tests")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run([sys.executable, *line.split()], capture_output=True, text=True,
                          env=environment, **{"timeout": 120} | options)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(line: str, **options) -> subprocess.CompletedProcess:
    """Two processes, on a port that nobody uses."""
    return shell("-m torch.distributed.run --nproc_per_node=2 "
                 f"--master_port {free_port()} {line}", **options)


def fill_the_disk(patch, name: str) -> None:
    """torch.save, os.fsync or os.replace fail as on a full disk; not so for the log, which is
    tidied before."""
    real = pkgutil.resolve_name(name)

    def full(*arguments, **options):
        if isinstance(arguments[0], Path) and arguments[0].name == "log.tmp":
            return real(*arguments, **options)
        raise OSError(28, "No space left on device")

    patch.setattr(name, full)


class Trap:
    """What unpickles to a file named "sprung", if somebody does unpickle it."""

    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


def picture(path: Path, h: int = 40, w: int = 50, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def label_map(path: Path, h: int = 37, w: int = 53) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 12, (h, w), np.uint8)).save(path)
    return path


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


def assert_same_state(run_a, run_b) -> None:
    a, b = stored(run_a), stored(run_b)
    assert_same({k: v for k, v in a.items() if k != "config"},
                {k: v for k, v in b.items() if k != "config"})


def losses_of(run: Path | str) -> list[dict]:
    with open(Path(run) / "log.csv") as file:
        return [{k: v for k, v in row.items() if k not in ("images/s", "wait")}
                for row in csv.DictReader(file)]


def stored(run: Path | str) -> dict:
    return torch.load(Path(run) / "checkpoint.pt", weights_only=True)


def paper_map(script) -> dict[str, str]:
    """First column -> last column of the docstring's map."""
    block = re.search(r"Paper map.*?\n(.*?)\n\n", script.__doc__, re.DOTALL).group(1)
    cells = [re.split(r"\s{2,}", line.strip()) for line in block.splitlines()]
    assert all(len(row) == 3 for row in cells), [row for row in cells if len(row) != 3]
    return {f"{row[0]} {row[1]}": row[2] for row in cells}
