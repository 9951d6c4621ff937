"""The code and the commands of docs/weights.md run."""

import re
import shlex

import numpy as np
import pytest

import mpdit_jax as mp
from mpdit_jax.convert import __main__ as convert
from mpdit_jax.vae.weights import save_folder
from tests.conftest import Golden
from tests.tiny import ROOT
from tests.vae.conftest import TINY, random_parameters

PAGE = (ROOT / "docs/weights.md").read_text()


@pytest.mark.slow
def test_a_sit_becomes_pictures(monkeypatch, tmp_path):
    """Run the page's code on a small SiT and a small VAE, with other labels and steps."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    state, load = Golden("dit_isotropic").group("state/"), mp.load_torch
    monkeypatch.setattr(mp, "load_torch", lambda file, **options: load(state, num_heads=4, **options), raising=False)
    monkeypatch.chdir(tmp_path)
    save_folder("sd-vae-ft-ema", TINY, random_parameters(TINY))
    names = {}
    exec(code.replace("[207, 360]", "[3, 7]").replace("steps=50", "steps=2"), names)
    images = np.asarray(names["images"])
    factor = names["vae"].downsample_factor
    assert images.shape == (2, 8 * factor, 8 * factor, 3)
    assert np.isfinite(images).all()
    assert [picture.size for picture in names["pictures"]] == [(8 * factor, 8 * factor)] * 2


def test_commands_are_those_of_the_parser(tmp_path, monkeypatch):
    """Each command is parsed and then fails because its source is missing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = re.findall(r"^python -m mpdit_jax\.convert (.*)$", PAGE, re.M)
    assert len(commands) == 4
    for command in commands:
        with pytest.raises(mp.MPDiTError, match="no such file"):
            convert.main(shlex.split(command))
