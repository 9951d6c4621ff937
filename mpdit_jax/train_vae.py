"""`python -m mpdit_jax.train_vae`: train a small VAE, for data that Stable Diffusion's does not fit."""

from collections.abc import Sequence
from pathlib import Path

from mpdit_jax.config.flags import make_config_parser, parse_with_config
from mpdit_jax.errors import InputError
from mpdit_jax.runtime.cli import run, stopped_line
from mpdit_jax.runtime.signals import stopped_status
from mpdit_jax.train.vae_config import base_vae_config

_EXAMPLES = """\
  python -m mpdit_jax.train_vae --config=vae_fashion --workdir=runs/vae_fashion
  python -m mpdit_jax.train_vae --config=vae_fashion --workdir=runs/mine --config.data.images=photos
"""


def main(arguments: Sequence[str]) -> int:
    """Train as the arguments say; exit status."""
    parser = make_config_parser(
        "train_vae",
        "Train a small autoencoder on images. The workdir then has vae/, a folder that prepare and sample take as "
        "--vae, and reconstructions.png. The same command continues after an interruption.",
        _EXAMPLES,
        base_vae_config,
    )
    parser.usage = f"{parser.prog} --config=FILE --workdir=FOLDER [--config.FIELD=VALUE ...]"
    parser.add_argument("--workdir", required=True, help="folder of the run")
    options, config = parse_with_config(parser, arguments)
    if not options.workdir:
        raise InputError(f"--workdir={options.workdir}: expected a folder, such as runs/vae.")

    from mpdit_jax.train.vae import train_vae

    workdir = Path(options.workdir)
    step = train_vae(config, workdir)
    if step < config.steps:
        print(stopped_line("train_vae", arguments, step, config.steps))
        return stopped_status()
    print(f"done: the VAE is {workdir / 'vae'}, and {workdir / 'reconstructions.png'} shows what it can do")
    return 0


if __name__ == "__main__":
    run(main, resumable=True)
