"""Training: `mpdit_jax.train(config, workdir)` trains, `python -m mpdit_jax.train` is the command."""

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ml_collections import ConfigDict, FrozenConfigDict

    from mpdit_jax.train.state import TrainState


class _CallablePackage(ModuleType):
    """This package as a function, since importing any module of it sets `mpdit_jax.train` to the package."""

    def __call__(self, config: "ConfigDict | FrozenConfigDict", workdir: "str | Path") -> "TrainState":
        """Train until `config.steps`, or until asked to stop; see `mpdit_jax.train.loop.train`."""
        from mpdit_jax.train.loop import train

        return train(config, workdir)


sys.modules[__name__].__class__ = _CallablePackage
