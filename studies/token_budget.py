"""`python -m studies.token_budget`: the paper's main claim at laptop size.

Five models with the same number of parameters are trained on Fashion-MNIST for the same multiply-adds: isotropic on
fine tokens, isotropic on coarse tokens, two levels, three levels, and masked training with 75 % of the fine tokens
hidden. docs/token_budget.md discusses the results.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import SVC

from mpdit_jax.config import base_config
from mpdit_jax.data.sources import load_source
from mpdit_jax.errors import DivergedError, InputError
from mpdit_jax.flow.objective import flow_matching_loss
from mpdit_jax.flow.sampler import make_sampler
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.pictures import to_uint8
from mpdit_jax.model.accounting import count_macs, count_trained, masked_macs
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.parameters import Parameters, merge
from mpdit_jax.runtime.cli import make_parser, run
from studies.records import Record, Records, pyplot
from studies.trainer import Trainer

MODELS: dict[str, dict[str, Any]] = {
    "fine": {"patch_sizes": (4,), "depths": (6,)},
    "coarse": {"patch_sizes": (8,), "depths": (6,)},
    "two_level": {"patch_sizes": (8, 4), "depths": (4, 2)},
    "three_level": {"patch_sizes": (16, 8, 4), "depths": (2, 2, 2)},
    "masked_75": {"patch_sizes": (4,), "depths": (6,), "decoder_depth": 2},
}
MASK_RATIOS = {"masked_75": 0.75}
SEEDS = 3
FRACTIONS = (0.25, 0.5, 1.0)  # fractions of the budget at which a run is measured
BATCH_SIZE = 32
_COMMON: dict[str, Any] = {
    "hidden_size": 64, "num_heads": 2, "input_size": (32, 32), "in_channels": 1, "num_classes": 10, "class_tokens": 4,
}  # fmt: skip
_CLASSIFIER_DATA = (("test", 10_000), ("train", 2_000))  # splits that the classifier is fitted to and scored on
_EXAMPLES = """\
  python -m studies.token_budget
  python -m studies.token_budget --budget=20000 --out=long.jsonl --plot=long.png
"""


def main(arguments: Sequence[str]) -> int:
    """Train, plot and print; return the exit status."""
    parser = make_parser(
        "token_budget",
        "Loss and classifier accuracy of samples over the multiply-adds of training, for five models with the same "
        "budget on Fashion-MNIST. Finished runs are kept in --out: the same command continues after an interruption.",
        _EXAMPLES,
        package="studies",
    )
    parser.add_argument("--out", default="docs/results/token_budget.jsonl", help="(default: %(default)s)")
    parser.add_argument("--plot", default="docs/images/token_budget.png", help="(default: %(default)s)")
    parser.add_argument(
        "--budget", type=int, default=2000, help="GMACs of training, forward and backward (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each model (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=200, help="images to classify (default: %(default)s)")
    parser.add_argument("--path", default="", help="folder of Fashion-MNIST's files (default: Debian's)")
    options = parser.parse_args(arguments)
    if min(options.budget, options.seeds, options.samples) < 1:
        raise InputError(
            f"--budget={options.budget}, --seeds={options.seeds}, --samples={options.samples}: expected 1 or more."
        )
    pyplot()  # fail before the runs if matplotlib is missing
    runs = [
        {
            "model": name,
            "budget": options.budget,
            "samples": options.samples,
            "recipe": recipe(name, options.budget),
            "seed": seed,
        }
        for name in MODELS
        for seed in range(options.seeds)
    ]
    records = Records(Path(options.out)).run("training", runs, lambda settings: measure(settings, options.path))
    draw(records, Path(options.plot))
    print(as_table(records))
    print(f"\nthe classifier's accuracy on real images: {fit_classifier(options.path)[1]:.3f}")
    print(f"results in {options.out}, plot in {options.plot}")
    return 0


def matched_config(name: str) -> ModelConfig:
    """Return the model with the MLP width that best matches the parameter count of three levels with MLP ratio 4."""
    target = count_trained(ModelConfig(**_COMMON, **MODELS["three_level"]))
    candidates = [
        ModelConfig(**_COMMON, **MODELS[name], mlp_ratio=size / _COMMON["hidden_size"]) for size in range(192, 512)
    ]
    return min(candidates, key=lambda config: abs(count_trained(config) - target))


def training_macs(name: str) -> int:
    """Count the multiply-adds of training on one image: three times those of a forward pass."""
    return 3 * masked_macs(matched_config(name), MASK_RATIOS.get(name, 0.0))


def training_config(name: str, budget: int, path: str) -> ConfigDict:
    """Build the config of a model's run of `budget` GMACs."""
    config = base_config()
    # The EMA spans about 20 steps, few enough that no measurement includes initial weights.
    config.batch_size, config.ema_decay, config.ema.warmup = BATCH_SIZE, 0.95, False
    config.steps = max(len(FRACTIONS), round(budget * 1e9 / training_macs(name) / BATCH_SIZE))
    config.model.update(dataclasses.asdict(matched_config(name)))
    config.mask_ratio = MASK_RATIOS.get(name, 0.0)
    config.data.name, config.data.path = "fashion_mnist", path
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = config.steps // 20
    return config


def recipe(name: str, budget: int) -> str:
    """Return a digest of the run's config, so that results of another config are not reused."""
    return hashlib.sha256(training_config(name, budget, "").to_json(sort_keys=True).encode()).hexdigest()[:12]


def measure(settings: Record, path: str) -> Record:
    """Train one model; return its cost, and its loss and accuracy at every fraction of the budget.

    Raises:
        DivergedError: steps were skipped, so the budget was not spent.
    """
    name, budget = settings["model"], settings["budget"]
    trainer = _trainer(name, budget, path)
    steps = trainer.config.steps
    measured_steps = {max(1, round(fraction * steps)) for fraction in FRACTIONS}
    points = []
    for step, state in enumerate(trainer.states(settings["seed"]), start=1):
        if step in measured_steps:
            if skipped := int(state.window["skipped"]):
                raise DivergedError(
                    f"{name}, seed {settings['seed']}: {skipped} of the first {step} of {steps} steps were left out, "
                    "since loss or gradient was not finite: the budget was not spent; lower the learning rate in "
                    "`training_config`, for all models."
                )
            points.append(
                {
                    "gmacs": round(step * BATCH_SIZE * training_macs(name) / 1e9, 2),
                    "test_loss": held_out_loss(trainer, state.ema_parameters, path),
                    "accuracy": accuracy(trainer, state.ema_parameters, settings["samples"], settings["seed"], path),
                }
            )
    macs = round(count_macs(trainer.model) / 1e6, 2)
    return {"parameters": count_trained(trainer.model), "forward_mmacs": macs, "steps": steps, "points": points}


def held_out_loss(trainer: Trainer, parameters: Parameters, path: str, examples: int = 1024) -> float:
    """Compute the flow-matching loss on test images, without masking, at the same times and noise for all models."""
    source = load_source("fashion_mnist", path, "test", max_examples=examples)
    batch = source.batch(np.arange(len(source)))
    total = 0.0
    for start in range(0, len(source), 256):
        rows = slice(start, start + 256)
        total += float(_loss(trainer, parameters, batch["x"][rows], batch["y"][rows], start)) * len(batch["y"][rows])
    return round(total / len(source), 5)


def accuracy(trainer: Trainer, parameters: Parameters, samples: int, seed: int, path: str) -> float:
    """Return the fraction of guided samples that the classifier assigns to the requested class."""
    labels = np.arange(samples) % trainer.model.num_classes
    sampler = make_sampler(steps=25, guidance_scale=1.5)
    images = sampler(merge(trainer.structure, parameters), labels, jax.random.key(seed))
    return round(float(fit_classifier(path)[0].score(_features(np.asarray(images)), labels)), 4)


@lru_cache(maxsize=1)
def fit_classifier(path: str) -> tuple[Pipeline, float]:
    """Fit a classifier to the test images, which no model sees, and return it with its accuracy on training images."""
    test, train = (load_source("fashion_mnist", path, split, max_examples=n) for split, n in _CLASSIFIER_DATA)
    test_batch, train_batch = test.batch(np.arange(len(test))), train.batch(np.arange(len(train)))
    classifier = make_pipeline(PCA(50, random_state=0), SVC(C=10)).fit(_features(test_batch["x"]), test_batch["y"])
    return classifier, float(classifier.score(_features(train_batch["x"]), train_batch["y"]))


def draw(records: list[Record], path: Path) -> None:
    """Plot held-out loss and accuracy over the multiply-adds of training."""
    plots = pyplot()
    figure, panels = plots.subplots(1, 2, figsize=(11, 4.2))
    for name in dict.fromkeys(record["model"] for record in records):
        for axes, value in zip(panels, ("test_loss", "accuracy"), strict=True):
            macs, mean, std = _over_seeds(records, name, value)
            axes.errorbar(macs, mean, yerr=std, marker="o", capsize=3, label=name)
    for axes, title in zip(panels, ("loss on test images", "classifier's accuracy on samples"), strict=True):
        axes.set(xscale="log", xlabel="GMACs of training", title=f"{title} (bars: std of seeds)")
        axes.set_xticks(macs, [f"{value:,.0f}" for value in macs])
        axes.minorticks_off()
    panels[0].legend()
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def as_table(records: list[Record]) -> str:
    """Format the results at the end of the budget as Markdown: mean ± standard deviation over the seeds (n - 1)."""
    lines = ["| model | trained parameters | MMACs a forward pass | steps | GMACs of training | loss | accuracy |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(record["model"] for record in records):
        first = next(record for record in records if record["model"] == name)
        cells = [f"`{name}`", f"{first['parameters']:,}", f"{first['forward_mmacs']}", f"{first['steps']:,}"]
        macs, loss, loss_std = _over_seeds(records, name, "test_loss")
        _, share, share_std = _over_seeds(records, name, "accuracy")
        cells += [f"{macs[-1]:,.0f}", f"{loss[-1]:.4f} ± {loss_std[-1]:.4f}", f"{share[-1]:.3f} ± {share_std[-1]:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _over_seeds(records: list[Record], name: str, value: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the GMACs at each fraction of the budget, and mean and standard deviation of a value over the seeds."""
    points = [record["points"] for record in records if record["model"] == name]
    values = np.array([[point[value] for point in run] for run in points])  # (seeds, fractions)
    std = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
    return np.array([point["gmacs"] for point in points[0]]), values.mean(axis=0), std


def _features(images: np.ndarray) -> np.ndarray:
    """Flatten images (n, 32, 32, 1) in [-1, 1] to vectors in [0, 1] with the rounding of saved pictures."""
    return to_uint8(images).reshape(len(images), -1) / 255


@lru_cache(maxsize=1)
def _trainer(name: str, budget: int, path: str) -> Trainer:
    return Trainer(training_config(name, budget, path))


def _loss(trainer: Trainer, parameters: Parameters, x: np.ndarray, y: np.ndarray, seed: int) -> jax.Array:
    return _compiled_loss(trainer)(parameters, jnp.asarray(x), jnp.asarray(y), jax.random.key(seed))


@lru_cache(maxsize=1)
def _compiled_loss(trainer: Trainer) -> Any:
    def loss(parameters: Parameters, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        return flow_matching_loss(merge(trainer.structure, parameters), x, y, key=key)[0]

    return jax.jit(loss)


if __name__ == "__main__":
    run(main)
