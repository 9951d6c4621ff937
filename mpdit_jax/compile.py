"""`python -m mpdit_jax.compile`: will it fit, and what will it move, on machines that are not here."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from mpdit_jax.cli import make_parser, run
from mpdit_jax.compiling.environment import prepare
from mpdit_jax.config_arguments import parse_with_config
from mpdit_jax.errors import ConfigError, InputError

_EXAMPLES = """\
  python -m mpdit_jax.compile --config=configs/mpdit_xl_256.py --topology=v5e:16x16
  python -m mpdit_jax.compile --config=configs/mpdit_xl_256.py --topology=v4:4x4x4 --config.mesh.fsdp=16
  python -m mpdit_jax.compile --config=configs/mpdit_b_256.py --devices=8 --format=json
"""


def main(arguments: Sequence[str]) -> int:
    """Compile as the arguments say and print; exit status 1 if it does not fit."""
    parser = make_parser(
        "compile",
        "Compile a config's train step and sampler for a TPU topology (extra [tpu]; no TPU is needed) or for virtual "
        "CPU devices, and print what each chip needs: memory, traffic, a bound on the time. Where it does not fit, "
        "settings with less memory are tried in turn.",
        _EXAMPLES,
        config=True,
    )
    parser.usage = f"{parser.prog} --config=FILE (--topology=CHIP:SIZE | --devices=N) [--config.FIELD=VALUE ...]"
    parser.add_argument("--topology", default="", help="of v4, v5e, v5p or v6e, such as v5e:16x16 or v4:4x4x4")
    parser.add_argument("--devices", type=int, default=0, help="virtual CPU devices, for meshes as of GPUs")
    parser.add_argument("--sample_batch", type=int, default=0, help="images the sampler draws (default: 8 a chip)")
    parser.add_argument("--no_sampler", action="store_true", help="the train step alone")
    parser.add_argument("--no_search", action="store_true", help="do not look for a setting that fits")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="(default: %(default)s)")
    options, config = parse_with_config(parser, arguments)
    if bool(options.topology) == bool(options.devices):
        parser.error("give either --topology or --devices")
    if options.devices < 0 or options.sample_batch < 0:
        raise InputError(f"--devices={options.devices}, --sample_batch={options.sample_batch}: expected 1 or more.")
    prepare(options.devices)
    report = measure(options, config)
    if options.format == "json":
        print(json.dumps(report, indent=2))
    fit = (report[program].get("fits", True) for program in ("step", "sampler") if program in report)
    return 0 if all(fit) else 1


def measure(options: argparse.Namespace, config: Any) -> dict[str, Any]:
    """Compile and tell; the report as plain numbers and strings.

    Raises:
        ConfigError: an unknown topology, a mesh or batch that does not fit it.
        MissingExtraError: libtpu is not installed.
    """
    from mpdit_jax.chips import chip_of

    chip = chip_of(options.topology) if options.topology else None

    import jax

    from mpdit_jax.compiling.programs import compile_sampler, compile_step, topology_devices
    from mpdit_jax.compiling.report import as_text, describe, sampler_flops, smaller, step_flops
    from mpdit_jax.config import resolve
    from mpdit_jax.mesh import check_batch, make_mesh

    resolved = resolve(config)
    devices = topology_devices(options.topology) if options.topology else jax.devices()
    if options.devices and len(devices) != options.devices:
        raise ConfigError(f"--devices={options.devices}: JAX has {len(devices)}; unset XLA_FLAGS and JAX_PLATFORMS.")
    if resolved.model.attention == "cudnn":
        raise ConfigError("config.model.attention='cudnn' is compiled on an NVIDIA GPU alone: use 'xla'.")
    mesh = make_mesh(**resolved.mesh, devices=devices)
    sample_batch = options.sample_batch or 8 * mesh.size
    check_batch(sample_batch, mesh, name="--sample_batch")  # before minutes of compilation
    where = options.topology or f"{options.devices} virtual CPU devices"
    shape = f"data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']}"
    report: dict[str, Any] = {"where": where, "chips": mesh.size, "mesh": shape, "batch_size": resolved.batch_size}
    say = print if options.format == "text" else lambda text: print(text, file=sys.stderr)
    say(f"{where}: {mesh.size} chips as {shape}, batches of {resolved.batch_size}, remat {resolved.model.remat}")
    step = describe(compile_step(resolved, mesh), step_flops(resolved), mesh.size, chip)
    report["step"] = step
    say(as_text("train step", step))
    if not step.get("fits", True) and not options.no_search:
        for flags, candidate in smaller(resolved, mesh.size):
            say(f"trying {flags} ...")
            other_mesh = make_mesh(**candidate.mesh, devices=devices)
            other = describe(compile_step(candidate, other_mesh), step_flops(candidate), mesh.size, chip)
            if other["fits"]:
                report["nearest_fit"] = {"flags": flags, **other}
                say(as_text(f"nearest setting that would fit: {flags}; train step", other))
                break
        else:
            say("nothing tried fits: take more chips or a smaller batch_size.")
    if not options.no_sampler:
        program, flops = compile_sampler(resolved, mesh, sample_batch), sampler_flops(resolved, sample_batch)
        sampler = describe(program, flops, mesh.size, chip)
        report["sampler"] = {"batch_size": sample_batch, **sampler}
        say(as_text(f"sampler of {sample_batch} images, {resolved.sample.steps} steps", sampler))
        if not sampler.get("fits", True):
            say(f"give a smaller --sample_batch, a multiple of {mesh.size}.")
    return report


if __name__ == "__main__":
    run(main)
