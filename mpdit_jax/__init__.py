"""MPDiT in JAX: the multi-patch diffusion transformer, its training and its sampling.

Names are imported when first used, so `import mpdit_jax` itself is fast.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from mpdit_jax.runtime.memory import keep_few_arenas
from mpdit_jax.runtime.signals import guard_imports
from mpdit_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from mpdit_jax.checkpoint.load import load_checkpoint as load_checkpoint
    from mpdit_jax.errors import MPDiTError as MPDiTError
    from mpdit_jax.flow.conventions import as_velocity as as_velocity
    from mpdit_jax.flow.objective import flow_matching_loss as flow_matching_loss
    from mpdit_jax.flow.sampler import make_sampler as make_sampler
    from mpdit_jax.interop.torch_weights import load_torch as load_torch
    from mpdit_jax.interop.torch_weights import to_torch as to_torch
    from mpdit_jax.model.accounting import count as count
    from mpdit_jax.model.presets import create_model as create_model
    from mpdit_jax.model.presets import presets as presets
    from mpdit_jax.sample.generate import generate as generate
    from mpdit_jax.train.loop import train as train
    from mpdit_jax.vae.vae import load_vae as load_vae

# Under `python -m mpdit_jax.COMMAND`, before the command's own module is imported.
if sys.argv[:1] == ["-m"] and "mpdit_jax." in sys.orig_argv[-len(sys.argv)]:
    guard_imports()
    keep_few_arenas()

_HOME = {
    "MPDiTError": "mpdit_jax.errors",
    "count": "mpdit_jax.model.accounting",
    "create_model": "mpdit_jax.model.presets",
    "flow_matching_loss": "mpdit_jax.flow.objective",
    "generate": "mpdit_jax.sample.generate",
    "load_checkpoint": "mpdit_jax.checkpoint",
    "as_velocity": "mpdit_jax.flow.conventions",
    "load_torch": "mpdit_jax.interop.torch_weights",
    "load_vae": "mpdit_jax.vae.vae",
    "make_sampler": "mpdit_jax.flow.sampler",
    "presets": "mpdit_jax.model.presets",
    "to_torch": "mpdit_jax.interop.torch_weights",
    "train": "mpdit_jax.train",
}

__all__ = [
    "MPDiTError",
    "as_velocity",
    "count",
    "create_model",
    "flow_matching_loss",
    "generate",
    "load_checkpoint",
    "load_torch",
    "load_vae",
    "make_sampler",
    "presets",
    "to_torch",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_HOME)}")
    home = import_module(_HOME[name])
    return home if name == "train" else vars(home)[name]  # that package is itself callable


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
