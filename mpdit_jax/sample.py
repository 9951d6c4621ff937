"""`python -m mpdit_jax.sample`: draw images from a trained model."""

from collections.abc import Sequence

from mpdit_jax.cli import Parser, make_parser, run
from mpdit_jax.errors import InputError

_EXAMPLES = """\
  python -m mpdit_jax.sample --workdir=runs/digits --out=samples.png
  python -m mpdit_jax.sample --workdir=runs/digits --labels=3,5 --num_samples=16 --guidance_scale=2.0 --out=grid.png
  python -m mpdit_jax.sample --workdir=runs/digits --num_samples=1000 --out=samples.npz
"""


def make_sample_parser() -> Parser:
    """The command's arguments."""
    parser = make_parser(
        "sample",
        "Draw images from the newest checkpoint of a run. Samples go round the labels in turn; the picture has one "
        "row a label.",
        _EXAMPLES,
    )
    parser.add_argument("--workdir", required=True, help="folder of a run made by mpdit_jax.train")
    parser.add_argument("--out", required=True, help=".png for a grid; .npz for arr_0 (uint8 NHWC) and labels")
    parser.add_argument("--labels", default="", help="classes, such as 3,5 (default: all of them)")
    parser.add_argument("--num_samples", type=int, help="images in all (default: 8 a label)")
    parser.add_argument("--steps", type=int, default=250, help="velocity evaluations (default: %(default)s)")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="1.0 for none (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on seed, i and its label (default: 0)")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--no_ema", action="store_true", help="use the raw parameters, not their moving average")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default: %(default)s)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Draw as the arguments say; exit status."""
    options = make_sample_parser().parse_args(arguments)
    if not options.out.endswith((".png", ".npz")):
        raise InputError(f"--out={options.out}: expected a name that ends in .png or .npz.")

    import jax
    import numpy as np

    from mpdit_jax import images
    from mpdit_jax.checkpoint import load_checkpoint
    from mpdit_jax.files import check_writable
    from mpdit_jax.flow.generate import generate_latents
    from mpdit_jax.flow.sampler import make_sampler

    sampler = make_sampler(steps=options.steps, guidance_scale=options.guidance_scale)
    chosen = _parse_labels(options.labels)
    check_writable(options.out)
    model = load_checkpoint(options.workdir, options.step, ema=not options.no_ema)
    chosen = chosen or list(range(model.num_classes))
    count = 8 * len(chosen) if options.num_samples is None else options.num_samples
    if count < 1 or options.batch_size < 1:
        raise InputError(f"--num_samples={count}, --batch_size={options.batch_size}: expected 1 or more of each.")
    labels = np.resize(np.asarray(chosen), count)
    latents = generate_latents(sampler, model, labels, jax.random.key(options.seed), options.batch_size)
    pictures = images.to_uint8(latents)
    if options.out.endswith(".npz"):
        images.save_npz(options.out, pictures, labels)
    else:
        order = np.argsort(np.arange(count) % len(chosen), kind="stable")  # one row a label
        images.save_png(options.out, images.grid(pictures[order], -(-count // len(chosen))))
    print(f"{count} images in {options.out}")
    return 0


def _parse_labels(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise InputError(f"--labels={text}: expected whole numbers between commas, such as 3,5.") from error


if __name__ == "__main__":
    run(main)
