"""Kill -9 at random moments of a run, also while it saves, and a full disk: nothing may be lost.

    python tests/kill.py [--script NAME] [--kills 100] [--seed 0]

For each script a small run is trained to its end without interruption. Then the same command is
started anew, killed at a random moment, gone on with by --resume, killed again, and so on; after
the last kill it may end. After each kill checkpoint.pt must load and must not have gone back. In
the end the two checkpoints must be equal bit for bit, and the logs but for the columns of speed.
Then a save meets a disk that is full half way: one line, exit code 2, and the old checkpoint stays.

Each life is a fork of this process, which has imported already what takes seconds to import. It
has trained nothing itself, so that it has no threads, which a fork would lose. Not for Windows.
"""

import argparse
import importlib
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from conftest import SCRIPTS, assert_same_state, losses_of, place, save  # before torch: threads

import matplotlib.figure
import numpy as np
import torch

import common

BASE = "--data data --batch-size 2 --save-every 2 --lr 0.0002 --gpu -1"
# With five examples, a pass is two steps. {n} steps in all; pix2pixhd goes through its three stages
# and clusters its styles in the end.
LINES = {
    "crn_imle": f"{BASE} --size 32 32 --width 4 --layers conv1_1 --pool 4 --candidates 2 "
                "--inner-steps 5 --vgg random --epochs {n} --steps {n}",
    "lab2pix": f"{BASE} --size 64 64 --width 2 --noise 4 --d-width 2 --vgg random --vgg-width 2 "
               "--ups 4 --discriminator patch --scales 1 --T 1 --no-dgnorm --lambda-5 0 "
               "--epochs {n} --steps {n}",
    "pix2pix": f"{BASE} --size 32 32 --width 4 --patch 16 --epochs {{n}} --steps {{n}}",
    "pix2pixhd": f"{BASE} --size 64 64 --width 4 --downs 2 --blocks 1 --enhancer-blocks 1 "
                 "--scales 2 --d-width 4 --features 2 --e-width 2 --min-area 0 --loss GAN+FM "
                 "--epochs {a} --fine-epochs {b} --enhancer-epochs {c}"}


def small_dataset(root: Path) -> None:
    """Five pairs to train on and two to test, with instance maps, in pix2pixHD's layout."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 5), ("test", 2)):
        for i in range(n):
            ids = np.kron(rng.integers(0, 12, (4, 4)), np.ones((16, 16))).astype(np.uint8)
            for kind, image in (("label", ids), ("inst", ids.astype(np.uint16) + 1000),
                                ("img", rng.integers(0, 256, (64, 64, 3), np.uint8))):
                save(root / f"{split}_{kind}" / f"{i}.png", image)


# ----------------------------------------------------------------------------------------- A life

def hook(owner, name: str, report: int, before: bytes, after: bytes = b"") -> None:
    """Call a function as ever, and tell the pipe `report` when it begins and ends."""
    function = getattr(owner, name)

    def told(*arguments):
        os.write(report, before)
        result = function(*arguments)
        os.write(report, after)
        return result

    setattr(owner, name, told)


def begin(name: str, line: str, room: int = 0) -> tuple[int, int]:
    """The script in a process of its own: its id, and a pipe that tells what it is doing.

    In the pipe: s, a step begins; ( and ), a save begins and has ended. What the script prints goes
    to said.txt and error.txt. With `room`, no file may grow beyond so many bytes.
    """
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    code = 1
    try:
        for number, file in ((1, "said.txt"), (2, "error.txt")):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        script = importlib.import_module(name)
        matplotlib.figure.Figure.savefig = lambda *_, **more: None     # slower than the training
        hook(script, "train_step", write, b"s")
        hook(common, "save_file", write, b"(", b")")
        if room:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            sys.argv = [f"{name}.py", *line.split()]
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        else:
            script.main(line.split())
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except common.UserError as error:
        print(error, file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def follow(pipe: int, event: bytes = b"", n: int = 0) -> bytes:
    """What the pipe tells until the event has come n times; without one, until the process ends."""
    told = b""
    while not event or told.count(event) < n:
        byte = os.read(pipe, 1)
        if not byte:
            break
        told += byte
    return told


def end(child: int, pipe: int) -> int:
    """Wait for a process: its exit code, or minus the signal that ended it."""
    os.close(pipe)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def undisturbed(name: str, line: str) -> dict[str, float]:
    """A run from start to end; returns how long its start, a step and a save take, in seconds."""
    clock = time.time()
    child, pipe = begin(name, line)
    told, at = b"", []
    while byte := os.read(pipe, 1):
        told += byte
        at.append(time.time())
    code = end(child, pipe)
    assert code == 0, f"ended with {code}: {Path('error.txt').read_text()[-500:]}"
    saves = [at[i + 1] - at[i] for i in range(len(at) - 1) if told[i:i + 2] == b"()"]
    return {"start": at[0] - clock, "save": sum(saves) / len(saves),
            "step": (at[-1] - at[0]) / told.count(b"s")}


def killed(name: str, line: str, steps: float, takes: dict, rng: random.Random) -> tuple[bool, int]:
    """A life with about so many steps, ended by kill -9: was it in a save; its exit code.

    A third of the lives end at any time, also while the script starts; a third in a step, a third
    in a save.
    """
    child, pipe = begin(name, line)
    seen, where = rng.randint(0, round(steps)), rng.choice(("any", "step", "save"))
    told = b""
    if where == "any":
        time.sleep(rng.uniform(0, takes["start"] + seen * takes["step"]))
    elif where == "step":
        told = follow(pipe, b"s", seen + 1)
        time.sleep(rng.uniform(0, takes["step"]))
    else:
        told = follow(pipe, b"(", seen // 2 + 1)
        time.sleep(rng.uniform(0, takes["save"]))
    os.kill(child, signal.SIGKILL)
    told += follow(pipe)
    return told.count(b"(") > told.count(b")"), end(child, pipe)


# ------------------------------------------------------------------------------------ The judgement

def step_of(run: str) -> int:
    """How far a run has got; its checkpoint must load. 0 before the first one."""
    return place(run)[0] if Path(run, "checkpoint.pt").exists() else 0


def kill_often(name: str, line: str, total: int, kills: int, rng: random.Random,
               takes: dict) -> dict[str, int]:
    """Start, kill and go on, until all kills are spent; then let it end."""
    count = {"saves": 0, "resumes": 0, "starts": 0}
    reached, left = 0, kills
    while True:
        if reached == 0:                        # nothing is saved yet: start anew
            shutil.rmtree("killed", ignore_errors=True)
        count["resumes" if reached else "starts"] += 1
        command = "--resume --out killed" if reached else f"{line} --out killed"
        if left and reached < total:
            steps = (total - reached) * min(1.0, 1.5 / left)
            in_save, code = killed(name, command, steps, takes, rng)
            if code == -signal.SIGKILL:
                left -= 1
                count["saves"] += in_save
        else:
            child, pipe = begin(name, command)
            follow(pipe)
            code = end(child, pipe)
        now = step_of("killed")
        assert now >= reached, f"the checkpoint went back from step {reached} to {now}"
        if now and not Path("early").exists():
            shutil.copytree("killed", "early")
        reached = now
        if code != -signal.SIGKILL:
            finished = code == 2 and reached == total      # killed after the last save
            assert code == 0 or finished, Path("error.txt").read_text()[-500:]
            return count | {"kills": kills - left}


def full_disk(name: str) -> str:
    """Go on where there is room for half a checkpoint; returns what the script said."""
    before, step = Path("early/checkpoint.pt").read_bytes(), step_of("early")
    child, pipe = begin(name, "--resume --out early", room=len(before) // 2)
    follow(pipe)
    code, said = end(child, pipe), Path("error.txt").read_text()
    assert code == 2, f"a full disk: exit code {code}: {said[-500:]}"
    assert len(said.splitlines()) == 1, f"a full disk: {len(said.splitlines())} lines: {said[:500]}"
    assert Path("early/checkpoint.pt").read_bytes() == before, "a full disk: the checkpoint changed"
    assert not Path("early/checkpoint.pt.tmp").exists(), "a full disk: half a file was left"
    child, pipe = begin(name, f"--resume --out early --steps {step + 2}")
    follow(pipe)
    assert end(child, pipe) == 0 and step_of("early") == step + 2, "no going on after a full disk"
    return said.strip()


def judge(name: str, kills: int, seed: int) -> str:
    """All of it for one script, in the working folder; returns the line of the report."""
    clock, rng = time.time(), random.Random(seed)
    total = 12 * max(1, -(-kills // 12))
    line = LINES[name].format(n=total, a=total // 6, b=total // 3, c=total // 12)
    small_dataset(Path("data"))
    takes = undisturbed(name, f"{line} --out whole")
    assert step_of("whole") == total
    count = kill_often(name, line, total, kills, rng, takes)
    assert_same_state("killed", "whole")
    assert losses_of("killed") == losses_of("whole"), "the logs differ"
    said = full_disk(name)
    return ("{}: {kills} kills, {saves} of them inside a save; {starts} starts, {resumes} resumes; "
            "after {} steps bit-equal to the uninterrupted run, its log too ({:.0f} s)\n"
            "    full disk: {}").format(name, total, time.time() - clock, said, **count)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--script", choices=LINES, help="one of them (all)")
    p.add_argument("--kills", type=int, default=100, metavar="N", help="per script (100)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (0)")
    given = p.parse_args()
    failed = 0
    for name in [given.script] if given.script else LINES:
        importlib.import_module(name)
        folder = tempfile.mkdtemp(prefix=f"kill-{name}-")
        os.chdir(folder)
        try:
            print(judge(name, given.kills, given.seed), flush=True)
            shutil.rmtree(folder)
        except (AssertionError, common.UserError) as error:
            failed += 1
            print(f"{name}: FAILED: {error}; what is left is in {folder}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
