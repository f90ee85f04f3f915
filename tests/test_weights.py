"""The weights that the notebooks ship: each is small, is listed, and makes streets."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, works
from PIL import Image

WEIGHTS = sorted((SCRIPTS / "notebooks" / "weights").glob("*.pt"))
LISTED = (SCRIPTS / "notebooks" / "weights" / "README.md").read_text()
MODES = {"crn": ["sample"], "imle": ["sample --samples 2", "interpolate --samples 2", "transfer",
                                     "video --samples 2", "edit --set car=road"],
         "pix2pixhd": ["sample", "edit --item street_1000000"]}


def test_they_are_few_and_small():
    assert len(WEIGHTS) >= 6
    assert all(path.stat().st_size <= 4e6 for path in WEIGHTS)
    assert sum(path.stat().st_size for path in WEIGHTS) <= 16e6


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_a_file_is_listed_holds_plain_weights_and_makes_streets(path):
    """Half precision, no optimiser, no path of ours; every mode takes it with no training."""
    stored = torch.load(path, weights_only=True)
    assert stored.keys() <= {"script", "config", "stage", "generator", "encoder", "styles", "means"}
    networks = [stored[name] for name in ("generator", "encoder") if stored.get(name)]
    numbers = [v for network in networks for v in network.values() if v.is_floating_point()]
    assert all(v.dtype == torch.half or v.max() > torch.finfo(torch.half).max for v in numbers)
    assert not re.search(r"/\w", str({k: v for k, v in stored["config"].items() if v}))
    line, = re.findall(rf"^\| `{path.name}` \|.*$", LISTED, re.MULTILINE)
    assert f"python {stored['script']}.py --preset streets" in line
    for n, mode in enumerate(MODES.get(path.stem, ["sample"])):
        works(stored["script"], f"{mode} --checkpoint {path} --limit 1 --gpu -1 --out {n}")
        pictures = [np.asarray(Image.open(file).convert("RGB"), float) for kind in ("png", "gif")
                    for file in Path(str(n)).glob(f"**/*.{kind}")]
        assert pictures and all(p.std() > 10 for p in pictures)      # a street is not one colour
