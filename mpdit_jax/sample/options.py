"""Flags shared by the commands that draw."""

import argparse
from typing import Any

import numpy as np

from mpdit_jax.errors import InputError
from mpdit_jax.flow.adaptive import METHODS
from mpdit_jax.flow.sampler import Sampler, make_sampler
from mpdit_jax.flow.times import ShiftedGrid
from mpdit_jax.runtime.cli import add_tile_option

_SOLVER_OPTIONS = {"rtol": "rtol", "atol": "atol", "churn": "churn", "diffusion": "diffusion", "diffusion_norm": "norm"}


def add_model_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add `--workdir`, `--step` and `--no_ema`."""
    parser.add_argument("--workdir", required=required, default="", help="folder of a run made by mpdit_jax.train")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--no_ema", action="store_true", help="use the raw parameters, not their moving average")


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Add `--labels`, the VAE's flags and the sampler's."""
    parser.add_argument(
        "--labels",
        default="balanced",
        metavar="CLASSES",
        help="balanced (default) | random | classes by index, range or name, such as 3,5 or 0-3 | null, no class",
    )
    parser.add_argument("--class_names", default="", metavar="FILE", help="one name a line (default: the data's)")
    parser.add_argument("--vae", default="", help="for latents, drawn or stored: folder or hub name of their VAE")
    parser.add_argument("--vae_dtype", choices=("float32", "bfloat16"), default="float32", help="its compute dtype")
    add_tile_option(parser)
    add_sampler_options(parser)


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """Add every setting of the sampler."""
    group = parser.add_argument_group("sampler")
    group.add_argument(
        "--solver",
        default="euler",
        help="euler | heun | midpoint | dpmpp_2m | flow_map | euler_maruyama | dopri5 | tsit5 (default: %(default)s)",
    )
    group.add_argument("--steps", type=int, help="velocity evaluations (default: 250; adaptive solvers choose)")
    group.add_argument("--time_grid", default="uniform", help="uniform | shifted | quadratic (default: %(default)s)")
    group.add_argument("--time_shift", type=float, help="--time_grid=shifted: more steps near noise (default: 3)")
    group.add_argument("--guidance_scale", type=float, default=1.0, help="1.0 for none (default: %(default)s)")
    group.add_argument(
        "--guidance_interval",
        type=_numbers,
        default=(0.0, 1.0),
        metavar="LOW,HIGH",
        help="guide at these times only, from 0 (data) to 1 (noise) (default: 0,1)",
    )
    group.add_argument(
        "--negative_labels", type=_pairs, default={}, metavar="A:B,...", help="guide class A away from B, not from null"
    )
    group.add_argument(
        "--guide",
        default="",
        metavar="WORKDIR|tail",
        help="guide away from this weaker run, or the tail (config.trunk_drop)",
    )
    group.add_argument("--rtol", type=float, help="dopri5, tsit5: relative error a step (default: 1e-5)")
    group.add_argument("--atol", type=float, help="dopri5, tsit5: absolute error a step (default: 1e-5)")
    group.add_argument(
        "--diffusion",
        help="euler_maruyama: constant | SBDM | sigma | decreasing | increasing-decreasing (default: sigma)",
    )
    group.add_argument("--churn", type=float, help="flow_map: share of fresh noise after each jump (default: 0)")
    group.add_argument(
        "--diffusion_norm", type=float, help="euler_maruyama: norm of the diffusion coefficient w(t) (default: 1)"
    )
    group.add_argument("--precision", help="float32 | bfloat16 (default: what the model was trained in)")


def sampler_from(options: argparse.Namespace) -> Sampler:
    """Build the sampler of the flags; raises ConfigError or InputError for a bad value or a flag without use."""
    given = {name: vars(options)[flag] for flag, name in _SOLVER_OPTIONS.items() if vars(options)[flag] is not None}
    if options.time_shift is not None and options.time_grid != "shifted":
        raise InputError(f"--time_shift={options.time_shift}: only --time_grid=shifted has a shift.")
    grid: Any = options.time_grid if options.time_shift is None else ShiftedGrid(options.time_shift)
    return make_sampler(
        options.solver,
        250 if options.steps is None else options.steps,
        options.guidance_scale,
        guidance_interval=options.guidance_interval,
        time_grid=grid,
        precision=options.precision,
        **given,
    )


def reject_unused_flags(options: argparse.Namespace) -> None:
    """Raise InputError for a flag that none of the command's guidance scales or solvers uses."""
    scales, solvers = np.atleast_1d(options.guidance_scale), np.atleast_1d(options.solver)
    given = {
        "guide": bool(options.guide),
        "negative_labels": bool(options.negative_labels),
        "guidance_interval": tuple(options.guidance_interval) != (0.0, 1.0),
    }
    for name, is_given in given.items():
        if is_given and (scales == 1).all():
            raise InputError(f"--{name} is given and nothing is guided at --guidance_scale=1: give another scale.")
    if np.isin(solvers, [*METHODS]).all():
        if options.steps is not None:
            raise InputError(f"--steps={options.steps}: {solvers[0]} chooses its own; set --rtol and --atol instead.")
        if options.time_grid != "uniform":
            raise InputError(f"--time_grid={options.time_grid}: {solvers[0]} chooses its own times; leave it out.")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected two numbers, such as 0.2,0.8") from error


def _pairs(text: str) -> dict[str, str]:
    try:
        return dict(part.split(":") for part in text.split(",") if part)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected pairs of classes, such as 3:8,5:6") from error
