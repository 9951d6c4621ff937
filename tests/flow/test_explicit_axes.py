"""Arrays on a mesh of Explicit axes, JAX's default: accepted by models, loss and samplers, wherever they are called."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT, environment

# A process of eight virtual devices: `model` and `loaded` lie on one device and on a mesh of our own.
BEFORE = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
import mpdit_jax as mp
from tests.flow.toys import tiny_model
mesh, key = jax.make_mesh((4, 2), ("d", "e")), jax.random.key(0)
assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit} and len(jax.devices()) == 8
model, loaded = tiny_model(), mp.load_checkpoint("RUN")
whole = nnx.merge(nnx.graphdef(model), jax.device_put(nnx.state(model), NamedSharding(mesh, P())))
def parts(leaf):
    axes = [*[None] * (leaf.ndim - 1), "e"] if leaf.ndim > 1 and leaf.shape[-1] % 2 == 0 else []
    return jax.device_put(leaf, NamedSharding(mesh, P(*axes)))
divided = nnx.merge(nnx.graphdef(model), jax.tree.map(parts, nnx.state(model)))
sampler = mp.make_sampler(steps=2, guidance_scale=2.0)
y, t = np.arange(8, dtype=np.int32), np.linspace(0.1, 0.9, 8, dtype=np.float32)
x = np.random.default_rng(0).standard_normal((8, 8, 8, 1), np.float32)
split = NamedSharding(mesh, P(("d", "e")))
dx, dt, dy = (jax.device_put(array, split) for array in (x, t, y))
def check(found, expected, spec):
    assert jax.typeof(found).sharding.spec[:1] == (spec,), jax.typeof(found)
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
rows = ("d", "e")
"""
CASES = {
    "calls": """
for one in (model, loaded, whole, divided):
    check(one(dx, dt, dy), one(x, t, y) if one is loaded else model(x, t, y), rows)
    expected = mp.flow_matching_loss(loaded if one is loaded else model, x, y, key=key)
    loss, each = mp.flow_matching_loss(one, dx, dy, key=key)
    check(each, expected[1], rows)
    assert abs(float(loss) - float(expected[0])) < 1e-5 * float(expected[0])
    check(sampler(one, dy, key), sampler(loaded if one is loaded else model, y, key), rows)
""",
    "under_set_mesh": """
expected, loss = sampler(model, y, key), mp.flow_matching_loss(model, x, y, key=key)[1]
same = sampler(loaded, y, key)
with jax.set_mesh(mesh):
    for one in (model, whole, divided):
        check(sampler(one, dy, key), expected, rows)
        check(sampler(one, y, key), expected, None)
        check(mp.flow_matching_loss(one, dx, dy, key=key)[1], loss, rows)
    check(sampler(mp.load_checkpoint("RUN"), dy, key), same, rows)
    negatives = {"negative_labels": {1: 2}}
    check(sampler(loaded, dy, key, **negatives), sampler(loaded, y, key, **negatives), rows)
""",
    "inside_jit": """
expected, same = sampler(model, y, key), sampler(loaded, y, key)
check(jax.jit(lambda y: sampler(loaded, y, key))(dy), same, rows)
structure, state = nnx.split(whole)
check(jax.jit(lambda state, y: sampler(nnx.merge(structure, state), y, key))(state, dy), expected, rows)
loss = lambda state, x, y: mp.flow_matching_loss(nnx.merge(structure, state), x, y, key=key)[0]
wanted = jax.grad(loss)(nnx.state(model), x, y)
found = jax.jit(jax.grad(loss))(state, dx, dy)
for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert np.abs(np.asarray(one) - np.asarray(other)).max() <= 1e-4 * np.abs(np.asarray(other)).max() + 1e-7
""",
    "inside_shard_map": """
structure, state = nnx.split(whole)
draw = jax.shard_map(
    lambda state, y, indices: sampler(nnx.merge(structure, state), y, key, indices=indices),
    mesh=mesh, in_specs=(P(), P(rows), P(rows)), out_specs=P(rows),
)
check(jax.jit(draw)(state, dy, jax.device_put(y, split)), sampler(model, y, key), rows)
""",
    "inside_vmap": """
several = np.stack([y, y[::-1]])
expected = np.stack([sampler(model, row, key) for row in several])
with jax.set_mesh(mesh):
    for columns in (P(), P("e")):
        labels = jax.device_put(several, NamedSharding(mesh, columns))
        check(jax.vmap(lambda y: sampler(model, y, key))(labels), expected, *(columns or (None,)))
""",
}


AFTER = """
import json, traceback
for case, script in json.loads(CASES).items():
    try:
        exec(script, dict(globals()))
        print(json.dumps({case: ""}))
    except Exception:
        print(json.dumps({case: traceback.format_exc()}))
"""


@pytest.fixture(scope="module")
def errors():
    """Run every case in one process, and return what each raised."""
    run = Path(__file__).parents[1] / "compatibility/written_by_0_1_0/run"
    script = (BEFORE + AFTER.replace("CASES", repr(json.dumps(CASES)))).replace("RUN", str(run))
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(8), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {case: error for line in done.stdout.splitlines() for case, error in json.loads(line).items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_on_eight_devices(errors, case):
    assert errors[case] == ""
