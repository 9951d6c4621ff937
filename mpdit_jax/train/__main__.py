"""`python -m mpdit_jax.train`: train a model, or continue a run."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from mpdit_jax.config.base import shared_values
from mpdit_jax.config.flags import make_config_parser, parse_with_config
from mpdit_jax.distributed.startup import add_flags, join
from mpdit_jax.errors import DivergedError
from mpdit_jax.runtime.cli import run, stopped_line
from mpdit_jax.runtime.signals import stopped_status

_CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # whoever sets it has a place for compiled programs already

_EXAMPLES = """\
  python -m mpdit_jax.train --config=digits --workdir=runs/digits
  python -m mpdit_jax.train --config=digits --workdir=runs/mine --config.optimizer.learning_rate=3e-4
"""


def main(arguments: Sequence[str]) -> int:
    """Train as the arguments say; exit status."""
    parser = make_config_parser(
        "train",
        "Train the model of a config. A workdir that holds a run of the same config is continued from its newest "
        "checkpoint; one that holds another run is refused. Ctrl-C or SIGTERM finishes the step, saves and exits.",
        _EXAMPLES,
    )
    parser.usage = f"{parser.prog} --config=FILE --workdir=FOLDER [--config.FIELD=VALUE ...]"
    parser.add_argument("--workdir", required=True, help="folder of the run: config, checkpoints, metrics, logs, grids")
    parser.add_argument(
        "--replay_step",
        type=int,
        metavar="N",
        help="repeat step N from the checkpoint before it and report values that are not finite; writes nothing, and "
        "exits with status 3 if the step is skipped or diverges",
    )
    parser.add_argument("--parameter_table", action="store_true", help="print a table of every parameter first")
    add_flags(parser)
    options, config = parse_with_config(parser, arguments)
    if not options.workdir:
        parser.error("--workdir is empty: expected a folder, such as runs/mine")
    workdir = Path(options.workdir)
    join(options, shared_values(config) | {"workdir": str(workdir.resolve())})

    import jax

    from mpdit_jax.train.evaluator import is_missing
    from mpdit_jax.train.loop import train
    from mpdit_jax.train.replay import replay
    from mpdit_jax.train.startup import parameter_table

    if options.replay_step is not None:
        found = replay(config, workdir, options.replay_step)
        print("\n".join(found.lines))
        return 0 if found.sound else DivergedError.exit_status

    if _CACHE_VARIABLE not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compilation_cache"))
    if options.parameter_table and jax.process_index() == 0:
        print(parameter_table(config))
    state = train(config, workdir)
    step = int(state.step)
    stopped = step < config.steps or is_missing(config, workdir, step)  # or in its last evaluation
    if jax.process_index() == 0 and stopped:
        print(stopped_line("train", arguments, step, config.steps))
    elif jax.process_index() == 0:
        print(
            f"done: checkpoints in {workdir / 'checkpoints'}, logs in {workdir / 'tensorboard'}{how_to_draw(workdir)}"
        )
    return stopped_status() if stopped else 0


def how_to_draw(workdir: Path) -> str:
    """Return the command that draws from a run, with the VAE of latents, and with a few labels of many classes."""
    from mpdit_jax.checkpoint.load import load_config
    from mpdit_jax.data.info import read_dataset_info
    from mpdit_jax.sample.outputs import ROWS
    from mpdit_jax.vae import PIXELS

    config, info = load_config(workdir), read_dataset_info(workdir)
    words = [f"--workdir={workdir}"]
    if info is not None and info.latents is not None and info.latents.vae_fingerprint != PIXELS:
        words.append(f"--vae={config.sample.vae or 'FOLDER'}")
    elif config.data.name != "latents" and config.model.in_channels not in (1, 3):
        return ""
    words += ["--solver=flow_map", "--steps=4"] if config.model.flow_map else []
    words += ["--labels=0,1,2,3,4,5,6,7"] if config.model.num_classes > ROWS else []
    return f"; draw with:\n  python -m mpdit_jax.sample {shlex.join(words)} --out=samples.png"


if __name__ == "__main__":
    run(main, resumable=True)
