"""The short form of kill.py, and moments so brief that no random kill finds them."""

import sys

import pytest
from conftest import NAMES, SCRIPTS, assert_same_state, place, shell, stored

import pix2pix
import pix2pixhd

SMALL = "--size 32 32 --limit 5 --batch-size 2 --epochs 3 --save-every 2 --gpu -1"
PIX2PIX = f"{SMALL} --width 4 --patch 16"
PIX2PIXHD = (f"{SMALL} --enhancers 0 --width 4 --downs 2 --blocks 1 --scales 1 --d-width 4 "
             "--features 2 --e-width 2 --min-area 0 --loss GAN+FM --vgg random --steps 4")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("name", NAMES)
def test_three_kills_and_a_full_disk(name):
    """As a user would: python tests/kill.py --kills 3."""
    result = shell(f"{SCRIPTS / 'tests' / 'kill.py'} --script {name} --kills 3", timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "bit-equal" in result.stdout and "full disk" in result.stdout


def test_a_kill_after_the_last_step_leaves_nothing_undone(monkeypatch):
    """The styles are clustered when all steps are done and saved; --resume makes up for them."""
    pix2pixhd.main(f"{PIX2PIXHD} --out whole".split())

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pix2pixhd, "encode", killed)
        with pytest.raises(KeyboardInterrupt):
            pix2pixhd.main(f"{PIX2PIXHD} --out killed".split())
    assert place("killed")[0] == 4 and not stored("killed")["styles"]
    pix2pixhd.main("--resume --out killed".split())
    assert_same_state("killed", "whole")


def test_a_run_killed_before_its_first_checkpoint_can_be_started_again(monkeypatch):
    """Its folder holds config.json and no checkpoint: nothing that --resume could go on with."""
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pix2pix, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            pix2pix.main(f"{PIX2PIX} --steps 2 --out r".split())
    pix2pix.main(f"{PIX2PIX} --steps 2 --out r".split())
    assert place("r")[0] == 2
