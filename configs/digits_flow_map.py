"""The digits' model fine-tuned as a flow map, which draws in one evaluation instead of 50 (docs/flow_map.md).

    bash launch/quickstart.sh   # or: python -m mpdit_jax.train --config=digits --workdir=runs/digits
    python -m mpdit_jax.train --config=digits_flow_map --workdir=runs/digits_flow_map
    python -m mpdit_jax.sample --workdir=runs/digits_flow_map --solver=flow_map --steps=1 --out=samples.png

200 steps from the moving average of runs/digits, with the same model, optimizer and data.
"""

from digits import get_config as digits_config
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = digits_config()
    config.objective = "flow_map"
    config.init_from = "runs/digits"
    config.steps = 200
    config.sample.every = 100
    config.sample.solver = "flow_map"
    config.sample.steps = 1
    config.sample.guidance_scale = 1.0
    config.eval.every = 100
    config.eval.guidance_scales = (1.0,)
    config.eval.solver = "flow_map"
    config.eval.steps = 1
    return config
