"""The code in README, docs/sampling.md and docs/training.md runs, and their numbers come from it."""

import re

import numpy as np

import mpdit_jax as mp
from mpdit_jax import export
from mpdit_jax.model.presets import preset_config
from tests.sample.conftest import make_workdir
from tests.tiny import ROOT

README = (ROOT / "README.md").read_text()
SAMPLING = (ROOT / "docs/sampling.md").read_text()
TRAINING = (ROOT / "docs/training.md").read_text()


def test_it_is_short():
    assert len(README.splitlines()) <= 120


def test_preset_table():
    rows = re.findall(
        r"^\| `(\w+)` \| (.+?) \| (.+?) \| (\d+) \| (\d+) \| (\d+)² \| ([\d.]+) \| ([\d.]+) \|$", TRAINING, re.M
    )
    assert [row[0] for row in rows] == [name for name in mp.presets() if name.startswith("mpdit") or name == "dit_xl_2"]
    for name, *cells in rows:
        config = preset_config(name)
        parameters, macs = mp.count(config)
        patches, depths = (", ".join(map(str, values)) for values in (config.patch_sizes, config.depths))
        size = str(config.input_size[0])
        widths = [str(config.hidden_size), str(config.num_heads), size]
        assert cells == [patches, depths, *widths, f"{parameters / 1e6:.2f}", f"{macs / 1e9:.2f}"]


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def python_block(text, containing):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if containing in block]
    return code


def test_python_example(monkeypatch, tmp_path):
    """README's Python runs in a folder with the two files that it mentions; only depth and steps are reduced."""
    import safetensors.numpy

    code = python_block(README, "create_model")
    small = {"depths": (1, 1)}
    create = mp.create_model
    monkeypatch.setattr(mp, "create_model", lambda name, **options: create(name, **options, **small), raising=False)
    monkeypatch.chdir(tmp_path)
    make_workdir(tmp_path / "runs/digits")
    safetensors.numpy.save_file(mp.to_torch(create("mpdit_b", **small)), "mpdit_b.safetensors")
    names = {}
    exec(code.replace("steps=250", "steps=2"), names)
    assert names["latents"].shape == (2, 32, 32, 4)
    assert np.isfinite(names["latents"]).all()
    assert names["loss"].shape == ()
    assert names["trained"].input_shape == (8, 8, 1)


def test_export_example(monkeypatch, tmp_path):
    """The Python that runs an exported sampler works on a file with fewer steps, written for CPUs."""
    (command,) = re.findall(r"^python -m mpdit_jax\.export (.*)$", SAMPLING, re.M)
    assert re.findall(r"^python -m mpdit_jax\.export (.*)$", README, re.M) == [command]
    monkeypatch.chdir(tmp_path)
    make_workdir(tmp_path / "runs/digits")
    assert export.main([*command.replace("--steps=50", "--steps=2").split(), "--platforms=cpu"]) == 0
    names = {}
    exec(python_block(SAMPLING, "deserialize"), names)
    assert names["latents"].shape == (3, 8, 8, 1)
    assert np.isfinite(names["latents"]).all()
