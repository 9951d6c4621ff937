"""The models of `studies.flow_map`: how each is trained, what that costs, and where its parameters are kept."""

import dataclasses
import hashlib
import runpy
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mpdit_jax.errors import DivergedError
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.npz import npz_names, read_npz
from mpdit_jax.model.accounting import count_macs
from mpdit_jax.model.conditioning import ClassEmbedding, TrunkTail
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import merge
from studies.trainer import Trainer

CONFIGS = Path(__file__).parents[1] / "configs"
DATA = {"digits": "digits", "fashion_mnist": "fashion_mnist"}  # name of the data and of its config


class FinalOnly(MPDiT):
    """A map whose final layer alone sees the time of arrival."""

    def velocity(self, x: jax.Array, modulation: Any, class_embedding: ClassEmbedding) -> jax.Array:
        """Run every block with the modulation of t, and the final layer with that of r."""
        condition, tokens = self.condition(modulation, class_embedding), class_embedding.tokens
        if not isinstance(condition, TrunkTail):
            return super().velocity(x, modulation, class_embedding)
        x, trunk = x.astype(tokens.dtype), TrunkTail(condition.trunk, condition.trunk)
        for level in self.levels:
            tokens = level(tokens, x, trunk, level.depth)
        return self.final_layer(tokens, condition.tail)


class Mean(MPDiT):
    """A map in which every block and the final layer see the mean of both modulations."""

    def jump_modulation(self, start: Any, end: Any) -> Any:
        """Return the mean of the modulations of t and r."""
        return jax.tree.map(lambda first, second: (first + second) / 2, start, end)


KINDS: dict[str, type[MPDiT]] = {"boundary": MPDiT, "final_layer": FinalOnly, "mean": Mean}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One trained model."""

    data: str  # a name of DATA
    steps: int
    start: "Recipe | None" = None  # the model whose moving average it starts from; None for a fresh one
    changes: tuple[tuple[str, Any], ...] = ()  # of the config, by path
    kind: str = "boundary"  # where r enters, a name of KINDS

    def config(self, path: str) -> ConfigDict:
        """Build the config of the run, on the training split."""
        config: ConfigDict = runpy.run_path(str(CONFIGS / f"{DATA[self.data]}.py"))["get_config"]()
        config.steps, config.data.split, config.data.path = self.steps, "train", path
        for name, value in self.changes:
            *groups, field = name.split(".")
            group = config
            for part in groups:
                group = group[part]
            group[field] = value
        return config

    def digest(self) -> str:
        """Return a name that differs for every recipe and for every config that it stands for."""
        text = self.config("").to_json(sort_keys=True) + self.kind + (self.start.digest() if self.start else "")
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def training_gmacs(self, path: str) -> float:
        """Count the multiply-adds of training, those of the model it starts from included, in units of 1e9."""
        trainer = make_trainer(self, path)
        passes = passes_per_step(trainer.config.objective, _is_guided(trainer))
        own = passes * count_macs(trainer.model) * trainer.config.batch_size * self.steps / 1e9
        return own + (self.start.training_gmacs(path) if self.start else 0.0)


@lru_cache(maxsize=8)
def make_trainer(recipe: Recipe, path: str) -> Trainer:
    """Build the trainer of a recipe, compiled once for all seeds."""
    return Trainer(recipe.config(path), KINDS[recipe.kind])


@dataclasses.dataclass(frozen=True)
class Zoo:
    """Trained models, kept in a folder, so that a study that was interrupted trains none twice."""

    folder: Path
    path: str  # of the data

    def parameters(self, recipe: Recipe, seed: int) -> dict[str, np.ndarray]:
        """Return the moving average of a recipe's parameters, trained now if the folder lacks them.

        Raises:
            DivergedError: a step was skipped.
        """
        file = self.folder / f"{recipe.digest()}_{seed}.npz"
        if file.is_file():
            names = sorted(npz_names(file))
            return dict(zip(names, read_npz(file, names), strict=True))
        start = self.parameters(recipe.start, seed) if recipe.start else None
        *_, state = make_trainer(recipe, self.path).states(seed, start)
        if skipped := int(state.window["skipped"]):
            raise DivergedError(f"{recipe}, seed {seed}: {skipped} steps were skipped: lower the learning rate.")
        found: dict[str, Any] = {name: np.asarray(array) for name, array in state.ema_parameters.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as target:
            np.savez(target, **found)
        return found

    def model(self, recipe: Recipe, seed: int) -> MPDiT:
        """Return the trained model."""
        return merge(make_trainer(recipe, self.path).structure, self.parameters(recipe, seed))


def passes_per_step(objective: str, guided: bool = False) -> float:
    """Count the forward passes' worth of one training step on one example.

    A backward pass costs two. Half of a flow map's examples have a forward derivative, which costs one more. Guidance
    adds a pass with the class and one without.
    """
    return 3.0 if objective == "flow_matching" else 3.5 + 2 * guided


def _is_guided(trainer: Trainer) -> bool:
    model: ModelConfig = trainer.model
    return bool(trainer.config.flow_map.guidance) or model.guidance_max > 1
