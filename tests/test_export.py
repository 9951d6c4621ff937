"""An exported sampler runs without this package."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mpdit_jax as mp
from mpdit_jax.errors import InputError
from mpdit_jax.export import main
from mpdit_jax.model.parameters import split
from mpdit_jax.sample.exporting import export_sampler
from tests.conftest import relative_error
from tests.flow.toys import tiny_model
from tests.sample.conftest import make_workdir

RUN = """
import importlib.util, sys
import jax, jax.numpy as jnp, numpy as np
from jax import export
assert not [name for name in ("mpdit_jax", "flax", "diffrax", "equinox") if importlib.util.find_spec(name)]
path, out, count, *scale = sys.argv[1:]
sampler = export.deserialize(bytearray(open(path, "rb").read()))
labels = jnp.arange(int(count), dtype=jnp.int32)
np.save(out, sampler.call(labels, jnp.uint32(7), *map(jnp.float32, map(float, scale))))
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def jax_alone(tmp_path_factory):
    """Return the Python of a virtual environment with what `pip install jax flatbuffers` installs.

    pip would need the network; instead the files of those distributions, and of all that they require, are linked from
    the environment of the tests, which its metadata lists. `import mpdit_jax` finds nothing there.
    """
    folder = tmp_path_factory.mktemp("jax_alone")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    asked = [python, "-Ic", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    for distribution in needed_by("jax", "flatbuffers"):
        entries = {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}
        for entry in entries:
            (site / entry).symlink_to(distribution.locate_file(entry))
    return python


def needed_by(*names):
    """Installed distributions of these names and of everything that they require, extras left out."""
    found, names = {}, [*names]
    while names:
        name = canonicalize_name(names.pop())
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            requirements = map(Requirement, found[name].requires or [])
            names += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found.values()


def run_elsewhere(python, tmp_path, file, count, *scale):
    command = [python, "-Ic", RUN, file, tmp_path / "found.npy", count, *scale]
    subprocess.run(list(map(str, command)), env={"JAX_PLATFORMS": "cpu"}, cwd=tmp_path, check=True)
    return np.load(tmp_path / "found.npy", allow_pickle=False)


def export(workdir, path, *arguments, steps=("--steps=4",)):
    assert main([f"--workdir={workdir}", f"--out={path}", *steps, *arguments]) == 0
    return path


@pytest.mark.slow
def test_any_batch(workdir, tmp_path, capsys, jax_alone):
    file = export(workdir, tmp_path / "sampler.bin", "--guidance_scale=2")
    assert "export.deserialize" in capsys.readouterr().out
    model, key = mp.load_checkpoint(workdir), jax.random.key(7)
    for count, scale in ((3, 2.0), (5, 3.5)):
        expected = mp.make_sampler(steps=4, guidance_scale=scale)(model, np.arange(count), key)
        assert relative_error(run_elsewhere(jax_alone, tmp_path, file, count, scale), expected) < 1e-5


@pytest.mark.slow
def test_an_adaptive_solver(workdir, tmp_path, jax_alone):
    """The program runs without diffrax."""
    solver = ["--solver=tsit5", "--rtol=1e-3", "--atol=1e-3", "--platforms=cpu,tpu"]
    file = export(workdir, tmp_path / "sampler.bin", *solver, steps=())
    sampler = mp.make_sampler("tsit5", rtol=1e-3, atol=1e-3)
    expected = sampler(mp.load_checkpoint(workdir), np.arange(3), jax.random.key(7))
    assert relative_error(run_elsewhere(jax_alone, tmp_path, file, 3), expected) < 1e-3


def test_the_weights_are_in_the_file_once():
    model = tiny_model(hidden_size=128)
    data = export_sampler(mp.make_sampler(steps=2), model, ("cpu", "cuda", "tpu"), 1)
    weights = sum(leaf.nbytes for leaf in split(model)[1].values())
    assert weights < len(data) < 1.5 * weights


@pytest.mark.parametrize("arguments", [
    ["--solver=heun", "--guidance_interval=0.2,0.8", "--guidance_scale=2", "--precision=bfloat16"],
    ["--solver=euler_maruyama"],
    ["--solver=dpmpp_2m", "--time_grid=shifted", "--time_shift=2"],
])  # fmt: skip
def test_fixed_batch_for_every_platform(workdir, tmp_path, arguments):
    file = export(workdir, tmp_path / "sampler.bin", "--platforms=cpu,cuda,tpu", "--batch=2", *arguments)
    exported = jax.export.deserialize(bytearray(file.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert exported.in_avals[0].shape == (2,)
    assert exported.out_avals[0].shape == (2, 8, 8, 1)
    scale = [2.0] if "--guidance_scale=2" in arguments else []
    z = exported.call(np.arange(2, dtype=np.int32), np.uint32(7), *map(np.float32, scale))
    assert np.isfinite(z).all()


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--platforms=cpu,gpu"], "--platforms=cpu,gpu: expected some of cpu, cuda, rocm and tpu"),
    (["--batch=0"], "--batch=0: expected a number of labels"),
    (["--batch=many"], "--batch=many"),
    (["--batch=²"], "--batch=²"),
    (["--negative_labels=3:8"], "--negative_labels is given and nothing is guided at --guidance_scale=1"),
    (["--guide=runs/other"], "--guide=runs/other: a file holds one model"),
])  # fmt: skip
def test_bad_input_is_refused(workdir, tmp_path, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        export(workdir, tmp_path / "sampler.bin", *arguments)


def test_a_file_takes_one_scale():
    with pytest.raises(InputError, match=r"guidance_scale of shape \(2,\): a file takes one scale a call"):
        export_sampler(mp.make_sampler(guidance_scale=[1.5, 2.0]), tiny_model(), ("cpu",))


@pytest.mark.parametrize(("fingerprint", "what"), [("ab" * 32, "latents"), ("pixels", "pictures"), ("", "pictures")])
def test_the_printed_lines_run(tmp_path, capsys, fingerprint, what):
    """They also undo the normalization of a run on a store."""
    workdir, file = make_workdir(tmp_path / "run"), tmp_path / "it's a sampler.bin"
    space = {"mean": [0.5], "std": [0.25], "vae_fingerprint": fingerprint} if fingerprint else None
    record = {"class_names": list("0123456789"), "latents": space, "labels": None}
    (workdir / "data.json").write_text(json.dumps(record))
    export(workdir, file, "--platforms=cpu,cpu", "--batch=1", "--guidance_scale=2", steps=["--steps=1"])
    assert jax.export.deserialize(bytearray(file.read_bytes())).platforms == ("cpu",)
    printed = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    names = {}
    exec("\n".join(printed), names)
    drawn = mp.make_sampler(steps=1, guidance_scale=2.0)(mp.load_checkpoint(workdir), [0], jax.random.key(0))
    expected = drawn * 0.25 + 0.5 if space else drawn
    np.testing.assert_allclose(names[what], expected, rtol=1e-5, atol=1e-6)
