"""`python -m mpdit_jax.sample`: draw images from a trained model."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mpdit_jax.distributed.startup import add_flags, join, own_flags
from mpdit_jax.errors import InputError
from mpdit_jax.runtime.cli import Parser, make_parser, run
from mpdit_jax.validation import check_seed

_EXAMPLES = """\
  python -m mpdit_jax.sample --workdir=runs/digits --out=samples.png
  python -m mpdit_jax.sample --workdir=runs/digits --labels=3,5 --num_samples=16 --guidance_scale=2.0 --out=grid.png
  python -m mpdit_jax.sample --workdir=runs/digits --solver=heun --steps=40 --out=sheet.png --grid --trajectory
  python -m mpdit_jax.sample --workdir=runs/digits --num_samples=50000 --labels=balanced --out=samples.npz
"""


def make_sample_parser() -> Parser:
    """Return the command's parser."""
    from mpdit_jax.sample.options import add_drawing_options, add_model_options

    parser = make_parser(
        "sample",
        "Draw images from a checkpoint of a run. Labels are used in turn; a .png has one row per label. "
        "Finished blocks are kept in a folder beside --out until all are done: after any interruption the same command "
        "continues.",
        _EXAMPLES,
    )
    add_model_options(parser)
    add_flags(parser)
    parser.add_argument(
        "--out", required=True, help=".png for a grid of up to 100 classes; .npz for arr_0 (uint8 NHWC) and labels"
    )
    parser.add_argument("--num_samples", type=int, help="images in all (default: 8 a label)")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on seed, i and its label (default: 0)")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images drawn at a time, one block (default: %(default)s)"
    )
    parser.add_argument("--png_folder", default="", metavar="FOLDER", help="write each image as FOLDER/INDEX_LABEL.png")
    parser.add_argument(
        "--grid",
        nargs="?",
        const="beside",
        default="",
        metavar="FILE.png",
        help="a contact sheet with class names, 8 images each of up to 100 classes (default: --out with .png)",
    )
    parser.add_argument(
        "--trajectory",
        nargs="?",
        const="beside",
        default="",
        metavar="FILE.gif",
        help="film of the denoising of up to 8 labels, and its strip as .png (default: --out with _trajectory.gif)",
    )
    add_drawing_options(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Draw as the arguments say and return the exit status."""
    options = make_sample_parser().parse_args(arguments)
    out = _checked_out(options)
    join(options, own_flags(options))

    import jax

    from mpdit_jax.io.atomic import check_writable
    from mpdit_jax.sample import command
    from mpdit_jax.sample.options import reject_unused_flags, sampler_from

    sampler = sampler_from(options)
    reject_unused_flags(options)
    check_writable(out)
    drawing = command.load_drawing(options, sampler)
    missing = command.draw(options, drawing, out)
    if jax.process_index() == 0:
        for index in missing[:20]:
            print(f"error: image {index} (label {drawing.labels[index]}) holds NaN or Inf; left out.", file=sys.stderr)
        if len(missing) > 20:
            print(f"error: and {len(missing) - 20} more.", file=sys.stderr)
    return 1 if len(missing) else 0


def _checked_out(options: argparse.Namespace) -> Path:
    if not options.out.endswith((".png", ".npz")):
        raise InputError(f"--out={options.out}: expected a name that ends in .png or .npz.")
    for name, value, ending in (("grid", options.grid, ".png"), ("trajectory", options.trajectory, ".gif")):
        if value not in ("", "beside") and not value.endswith(ending):
            raise InputError(f"--{name}={value}: expected a name that ends in {ending}.")
    if not options.workdir:
        raise InputError("--workdir is empty: expected the folder of a run, such as runs/digits.")
    if options.batch_size < 1:
        raise InputError(f"--batch_size={options.batch_size}: expected 1 or more.")
    check_seed(options.seed, "--seed")
    return Path(options.out)


if __name__ == "__main__":
    run(main)
