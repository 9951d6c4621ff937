"""An exported sampler runs where this package is not."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import mpdit_jax as mp
from mpdit_jax.errors import InputError
from mpdit_jax.export import main
from tests.conftest import relative_error
from tests.tiny import environment

RUN = """
import sys

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mpdit_jax", "flax", "diffrax"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Guard())
import jax, jax.numpy as jnp, numpy as np
from jax import export
path, out, count, *scale = sys.argv[1:]
sampler = export.deserialize(bytearray(open(path, "rb").read()))
labels = jnp.arange(int(count), dtype=jnp.int32)
np.save(out, sampler.call(labels, jnp.uint32(7), *map(jnp.float32, map(float, scale))))
assert not [name for name in sys.modules if name.startswith(("mpdit_jax", "flax"))]
"""


def run_elsewhere(tmp_path, file, count, *scale):
    command = [sys.executable, "-c", RUN, file, tmp_path / "found.npy", count, *scale]
    subprocess.run(list(map(str, command)), env=environment(), cwd=tmp_path, check=True)
    return np.load(tmp_path / "found.npy", allow_pickle=False)


def export(workdir, path, *arguments):
    assert main([f"--workdir={workdir}", f"--out={path}", "--steps=4", *arguments]) == 0
    return path


def test_any_batch(workdir, tmp_path, capsys):
    file = export(workdir, tmp_path / "sampler.bin", "--guidance_scale=2")
    assert "export.deserialize" in capsys.readouterr().out
    model, key = mp.load_checkpoint(workdir), jax.random.key(7)
    for count, scale in ((3, 2.0), (5, 3.5)):
        expected = mp.make_sampler(steps=4, guidance_scale=scale)(model, np.arange(count), key)
        assert relative_error(run_elsewhere(tmp_path, file, count, scale), expected) < 1e-5


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
    (["--guide=runs/other"], "--guide=runs/other: a file holds one model"),
])  # fmt: skip
def test_bad_input_is_refused(workdir, tmp_path, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        export(workdir, tmp_path / "sampler.bin", *arguments)
