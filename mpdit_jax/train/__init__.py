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
        """Train until `config.steps`, or until asked to stop; continue the run that the workdir holds.

        Args:
            config: an experiment's config, see `mpdit_jax.config.base_config`.
            workdir: folder for config, checkpoints, metrics, TensorBoard logs and sample grids.

        Returns:
            The last state, which is also saved.

        Raises:
            ConfigError, DataError, CheckpointError, InputError: see each class; raised before anything is overwritten.
            DivergedError: too many steps in a row had to be left out, or an update was not finite.
        """
        from mpdit_jax.train.loop import train

        return train(config, workdir)


_package = sys.modules[__name__]
_package.__class__ = _CallablePackage
train = _package.__call__  # for `from mpdit_jax.train import train`
