"""`python -m studies.fno_width`: the effect of the FNO time embedding's width under both initializations.

docs/fno_width.md discusses the results.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from mpdit_jax.config import base_config
from mpdit_jax.errors import InputError
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.model.config import FNO_INITS, ModelConfig
from mpdit_jax.model.fno import FNOTime
from mpdit_jax.runtime.cli import make_parser, run
from mpdit_jax.train.metric_window import empty_window, window_means
from studies.records import Record, Records, pyplot
from studies.trainer import Trainer

WIDTHS = (16, 32, 64, 128, 256)
TRAINED_WIDTHS = (32, 128)
SEEDS = 3
_TIMES = 16
_AVERAGED_STEPS = 10  # steps over which losses and gradient norms are averaged
_EXAMPLES = "  python -m studies.fno_width --out=docs/results/fno_width.jsonl --plot=docs/images/fno_width.png\n"


def main(arguments: Sequence[str]) -> int:
    """Measure, train, plot and print; return the exit status."""
    parser = make_parser(
        "fno_width",
        "Output and gradient of the FNO time embedding at initialization, at widths 16 to 256, and short training runs "
        "on digits. Finished runs are kept in --out: the same command continues after an interruption.",
        _EXAMPLES,
        package="studies",
    )
    parser.add_argument("--out", default="docs/results/fno_width.jsonl", help="(default: %(default)s)")
    parser.add_argument("--plot", default="docs/images/fno_width.png", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each training run (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < _AVERAGED_STEPS:
        raise InputError(
            f"--steps={options.steps}: expected {_AVERAGED_STEPS} or more, over which losses are averaged."
        )
    pyplot()  # fail before the runs if matplotlib is missing
    records = Records(Path(options.out))
    measurements = [
        # Narrow embeddings vary more between seeds.
        {"kind": "start", "init": init, "width": width, "seeds": max(8, 1024 // width)}
        for init in FNO_INITS
        for width in WIDTHS
    ]
    initial = records.run("measuring", measurements, _measure_start)
    runs = [
        {"kind": "training", "init": init, "width": width, "steps": options.steps, "seed": seed}
        for init in FNO_INITS
        for width in TRAINED_WIDTHS
        for seed in range(SEEDS)
    ]
    trained = records.run("training", runs, _measure_training)
    draw(initial, trained, Path(options.plot))
    print(as_tables(initial, trained))
    print(f"\nresults in {options.out}, plot in {options.plot}")
    return 0


def initial_sizes(init: str, width: int, seeds: int, hidden_size: int = 768) -> np.ndarray:
    """Measure the root mean square of the embedding's output and the norm of its gradient for each seed: (seeds, 2).

    The gradient is that of the output's inner product with a random direction of length 1. Its root mean square is the
    Frobenius norm of the Jacobian over the square root of the output's size.
    """
    config = ModelConfig(hidden_size=hidden_size, num_heads=1, fno_width=width, fno_init=init)
    structure = nnx.graphdef(nnx.eval_shape(lambda: FNOTime(config, nnx.Rngs(params=0))))
    t = jnp.linspace(0, 1, _TIMES)

    def sizes(key: jax.Array) -> jax.Array:
        initial_key, direction_key = jax.random.split(key)
        state = nnx.state(FNOTime(config, nnx.Rngs(params=initial_key)))
        output, pull_back = jax.vjp(lambda state: nnx.merge(structure, state)(t), state)
        direction = jax.random.normal(direction_key, output.shape)
        (gradients,) = pull_back(direction / jnp.linalg.norm(direction))
        return jnp.stack([jnp.sqrt(jnp.square(output).mean()), _norm(gradients)])

    return np.asarray(jax.jit(lambda keys: jax.lax.map(sizes, keys))(jax.random.split(jax.random.key(0), seeds)))


def first_modulation(output_rms: float, hidden_size: int = 768, learning_rate: float = 2e-4) -> float:
    """Return an upper bound on a modulation after Adam's first step, for an embedding with Gaussian entries.

    The modulation is a linear map, initially zero, of SiLU of the embedding. Adam's first step changes every weight by
    the learning rate, so the modulation is at most learning_rate * hidden_size * E|SiLU|.
    """
    z = np.linspace(-8, 8, 4001)
    density = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    entries = z * output_rms
    sigmoid = np.exp(-np.logaddexp(0, -entries))
    return float(learning_rate * hidden_size * (density * np.abs(entries * sigmoid)).sum())


def training_config(init: str, width: int, steps: int) -> ConfigDict:
    """Build the config of a run on the digits of configs/digits.py."""
    config = base_config()
    config.batch_size, config.steps, config.ema_decay = 64, steps, 0.995
    config.ema.warmup = False
    config.model.patch_sizes, config.model.depths = (2, 1), (3, 1)
    config.model.hidden_size, config.model.num_heads = 64, 2
    config.model.input_size, config.model.in_channels, config.model.num_classes = (8, 8), 1, 10
    config.model.class_tokens, config.model.fno_init, config.model.fno_width = 2, init, width
    config.data.name, config.data.split = "digits", "all"
    config.optimizer.learning_rate = 1e-3
    return config


def draw(initial: list[Record], trained: list[Record], path: Path) -> None:
    """Plot the initial output and gradient over the width, and the training loss over the steps."""
    plots = pyplot()
    figure, (outputs, gradients, losses) = plots.subplots(1, 3, figsize=(13, 4.2))
    for init, colour in zip(FNO_INITS, ("tab:red", "tab:blue"), strict=True):
        rows = [record for record in initial if record["init"] == init]
        for axes, name in ((outputs, "output_rms"), (gradients, "gradient_norm")):
            axes.errorbar(
                [row["width"] for row in rows],
                [row[name] for row in rows],
                yerr=[row[f"{name}_std"] for row in rows],
                color=colour,
                marker="o",
                label=init,
            )
        for width, style in zip(TRAINED_WIDTHS, ("-", "--"), strict=True):
            curves = np.array([r["losses"] for r in trained if (r["init"], r["width"]) == (init, width)])
            steps = (np.arange(curves.shape[1]) + 1) * _AVERAGED_STEPS
            losses.plot(steps, curves.mean(axis=0), style, color=colour, label=f"{init}, width {width}")
            losses.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.15)
    for axes, title in ((outputs, "output RMS at the start"), (gradients, "gradient norm at the start")):
        axes.set(xscale="log", yscale="log", xlabel="fno_width", title=title)
        axes.set_xticks(WIDTHS, map(str, WIDTHS))
        axes.minorticks_off()
        axes.legend()
    losses.set(xlabel="step", title=f"digits: training loss\n(mean and range of {SEEDS} seeds)")
    losses.legend()
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def as_tables(initial: list[Record], trained: list[Record]) -> str:
    """Format both results as Markdown: mean ± standard deviation over seeds (n - 1)."""
    lines = ["| fno_init | fno_width | seeds | output RMS | gradient norm | first modulation |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [
        f"| {r['init']} | {r['width']} | {r['seeds']} | {r['output_rms']:.2f} ± {r['output_rms_std']:.2f} | "
        f"{r['gradient_norm']:.2f} ± {r['gradient_norm_std']:.2f} | {first_modulation(r['output_rms']):.2f} |"
        for r in initial
    ]
    columns = f"loss, first {_AVERAGED_STEPS} steps | last {_AVERAGED_STEPS} | largest gradient norm | steps left out"
    lines += ["", f"| fno_init | fno_width | {columns} |"]
    lines += ["|---|---|---|---|---|---|"]
    for init in FNO_INITS:
        for width in TRAINED_WIDTHS:
            runs = [record for record in trained if (record["init"], record["width"]) == (init, width)]
            first, last = (np.array([run["losses"][at] for run in runs]) for at in (0, -1))
            # fmax ignores NaN, the mean of ten skipped steps.
            largest = np.array([np.fmax.reduce(run["gradient_norms"]) for run in runs])
            cells = [f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" for values in (first, last, largest)]
            lines.append(f"| {init} | {width} | {' | '.join(cells)} | {sum(run['skipped'] for run in runs):.0f} |")
    return "\n".join(lines)


def _measure_start(settings: Record) -> Record:
    sizes = initial_sizes(settings["init"], settings["width"], settings["seeds"])
    (output, gradient), (output_std, gradient_std) = sizes.mean(axis=0).tolist(), sizes.std(axis=0, ddof=1).tolist()
    return {
        "output_rms": output,
        "output_rms_std": output_std,
        "gradient_norm": gradient,
        "gradient_norm_std": gradient_std,
    }


def _measure_training(settings: Record) -> Record:
    trainer = _trainer(settings["init"], settings["width"], settings["steps"])
    losses, gradient_norms, skipped = [], [], 0.0
    previous = jax.device_get(empty_window())
    for step, state in enumerate(trainer.states(settings["seed"]), start=1):
        if step % _AVERAGED_STEPS == 0:
            window = jax.device_get(state.window)  # sums since the start of the run
            means = window_means({name: window[name] - previous[name] for name in window})
            previous, skipped = window, float(window["skipped"])
            losses.append(round(means.get("loss", math.nan), 5))  # NaN if all steps were skipped
            gradient_norms.append(round(means.get("gradient_norm", math.nan), 5))
    return {"losses": losses, "gradient_norms": gradient_norms, "skipped": skipped}


@lru_cache(maxsize=1)
def _trainer(init: str, width: int, steps: int) -> Trainer:
    return Trainer(training_config(init, width, steps))


def _norm(tree: nnx.State) -> jax.Array:
    return jnp.sqrt(sum((jnp.square(leaf).sum() for leaf in jax.tree.leaves(tree)), jnp.float32(0)))


if __name__ == "__main__":
    run(main)
