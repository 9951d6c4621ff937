"""`python -m mpdit_jax.export`: write a sampler as one file that JAX runs without this package."""

from collections.abc import Sequence

from mpdit_jax.errors import InputError
from mpdit_jax.runtime.cli import Parser, make_parser, run

_EXAMPLES = """\
  python -m mpdit_jax.export --workdir=runs/digits --guidance_scale=2.0 --steps=50 --out=sampler.bin
  python -m mpdit_jax.export --workdir=runs/digits --out=sampler.bin --platforms=cpu,cuda,tpu --batch=8
"""


def make_export_parser() -> Parser:
    """Return the command's parser."""
    from mpdit_jax.sample.options import add_model_options, add_sampler_options

    parser = make_parser(
        "export",
        "Write the sampler of a checkpoint, with its weights, as one file for jax.export. Loading it needs JAX and "
        "flatbuffers, not this package.",
        _EXAMPLES,
    )
    add_model_options(parser)
    parser.add_argument("--out", required=True, help="the file, such as sampler.bin")
    parser.add_argument("--platforms", default="cpu,cuda,tpu", help="where it may run (default: %(default)s)")
    parser.add_argument("--batch", default="any", help="labels a call: a number, or any (default: %(default)s)")
    add_sampler_options(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Export as the arguments say and return the exit status."""
    options = make_export_parser().parse_args(arguments)
    platforms = list(dict.fromkeys(platform for platform in options.platforms.split(",") if platform))
    if not platforms or not set(platforms) <= {"cpu", "cuda", "rocm", "tpu"}:
        raise InputError(f"--platforms={options.platforms}: expected some of cpu, cuda, rocm and tpu between commas.")
    if options.batch != "any" and not (options.batch.isdecimal() and int(options.batch)):
        raise InputError(f"--batch={options.batch}: expected a number of labels, 1 or more, or any.")
    if options.guide:
        raise InputError(f"--guide={options.guide}: a file holds one model; export without autoguidance.")

    from mpdit_jax.checkpoint.load import load_checkpoint, load_config
    from mpdit_jax.data.info import read_dataset_info
    from mpdit_jax.io.atomic import atomic_write, check_writable
    from mpdit_jax.sample.classes import read_classes
    from mpdit_jax.sample.exporting import export_sampler
    from mpdit_jax.sample.options import reject_unused_flags, sampler_from
    from mpdit_jax.vae import PIXELS

    sampler = sampler_from(options)
    reject_unused_flags(options)
    check_writable(options.out)
    model = load_checkpoint(options.workdir, options.step, ema=not options.no_ema)
    batch = None if options.batch == "any" else int(options.batch)
    classes = read_classes(options.workdir, load_config(options.workdir))
    negatives = classes.find_pairs(options.negative_labels, "--negative_labels")
    data = export_sampler(sampler, model, platforms, batch, negatives)
    with atomic_write(options.out) as file:
        file.write(data)
    scale = f", jnp.float32({options.guidance_scale:g})" if options.guidance_scale != 1 else ""
    labels = [*range(min(3, model.num_classes))] if batch is None else f"[0] * {batch}"
    info = read_dataset_info(options.workdir)
    space = None if info is None else info.latents
    what = "pictures" if space is None or space.vae_fingerprint == PIXELS else "latents"
    print(
        f"{options.out}: {len(data) / 1e6:.1f} MB for {', '.join(platforms)}, "
        f"{'any number of' if batch is None else batch} labels a call; run it with JAX and flatbuffers alone:\n"
        "  import jax.numpy as jnp; from jax import export\n"
        f"  sampler = export.deserialize(bytearray(open({options.out!r}, 'rb').read()))\n"
        f"  {what} = sampler.call(jnp.array({labels}, jnp.int32), jnp.uint32(0){scale})  # labels, seed"
        f"{', guidance scale' if scale else ''}"
    )
    if space is not None:
        print(
            f"The {what} are normalized; undo that{' before decoding' if what == 'latents' else ', for [-1, 1]'}:\n"
            f"  {what} = {what} * jnp.array({list(space.std)}) + jnp.array({list(space.mean)})"
        )
    return 0


if __name__ == "__main__":
    run(main)
