"""What a workdir holds: checkpoints, the config of the run, and the model in them."""

from mpdit_jax.checkpoint.load import load_checkpoint, load_config
from mpdit_jax.checkpoint.manager import Checkpoints
from mpdit_jax.checkpoint.reader import list_steps

__all__ = ["Checkpoints", "list_steps", "load_checkpoint", "load_config"]
