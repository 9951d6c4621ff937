"""`python -m mpdit_jax.compile`: memory and traffic of a config's programs on devices that this machine lacks."""

import json
import sys
from collections.abc import Sequence

from mpdit_jax.compile.environment import prepare
from mpdit_jax.compile.gpus import parse_cluster
from mpdit_jax.config.flags import make_config_parser, parse_with_config
from mpdit_jax.errors import InputError
from mpdit_jax.runtime.cli import run

_EXAMPLES = """\
  python -m mpdit_jax.compile --config=mpdit_xl_256 --topology=v5e:16x16
  python -m mpdit_jax.compile --config=mpdit_xl_256 --topology=v4:4x4x4 --config.mesh.fsdp=16
  python -m mpdit_jax.compile --config=mpdit_xl_256 --topology=v5e:8x8 --slices=2 --config.mesh.fsdp=16
  python -m mpdit_jax.compile --config=mpdit_xl_256 --topology=a100-40gb:8 --config.mesh.fsdp=8
  python -m mpdit_jax.compile --config=mpdit_b_256 --topology=h100:8x8 --format=json
"""


def main(arguments: Sequence[str]) -> int:
    """Compile and print the report; return exit status 1 if a program does not fit."""
    parser = make_config_parser(
        "compile",
        "Compile a config's train step and sampler for a TPU topology (extra [tpu]; no TPU is needed), for NVIDIA GPUs "
        "(extra [gpu-compile]; no GPU is needed) or for virtual CPU devices, and print the memory, the traffic and a "
        "lower bound on the time of each device. If a program does not fit, settings that need less memory are tried "
        "in turn.",
        _EXAMPLES,
    )
    parser.usage = f"{parser.prog} --config=FILE (--topology=KIND:SIZE | --devices=N) [--config.FIELD=VALUE ...]"
    parser.add_argument(
        "--topology",
        default="",
        help="v4, v5e, v5p, v6e chips, such as v5e:16x16, or a100, a100-40gb, h100, h200, b200 GPUs, such as a100:8 "
        "or h100:2x4 (hosts x GPUs)",
    )
    parser.add_argument("--slices", type=int, default=1, help="number of slices of TPU chips, linked by a network (1)")
    parser.add_argument("--devices", type=int, default=0, help="number of virtual CPU devices")
    parser.add_argument("--sample_batch", type=int, default=0, help="images the sampler draws (default: 8 per device)")
    parser.add_argument("--no_sampler", action="store_true", help="compile the train step alone")
    parser.add_argument("--no_search", action="store_true", help="do not search for a setting that fits")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="(default: %(default)s)")
    options, config = parse_with_config(parser, arguments)
    if bool(options.topology) == bool(options.devices):
        parser.error("give either --topology or --devices")
    if options.devices < 0 or options.sample_batch < 0:
        raise InputError(f"--devices={options.devices}, --sample_batch={options.sample_batch}: expected 1 or more.")
    prepare(options.devices, gpus=parse_cluster(options.topology) is not None)
    from mpdit_jax.compile.measure import measure

    report = measure(
        config,
        topology=options.topology,
        slices=options.slices,
        devices=options.devices,
        sample_batch=options.sample_batch,
        sampler=not options.no_sampler,
        search=not options.no_search,
        log=print if options.format == "text" else lambda text: print(text, file=sys.stderr),
    )
    if options.format == "json":
        print(json.dumps(report, indent=2))
    fit = (report[program].get("fits", True) for program in ("step", "sampler") if program in report)
    return 0 if all(fit) else 1


if __name__ == "__main__":
    run(main)
