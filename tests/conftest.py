"""Fixtures that every test file may use. The scripts stand one folder up, beside this one."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import common  # noqa: E402

torch.set_num_threads(1)                          # tiny networks: threads cost more than they give


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


@contextlib.contextmanager
def refused(*words):
    """A UserError of one line that contains all words."""
    with pytest.raises(common.UserError) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, f"{word!r} is not in: {text}"
