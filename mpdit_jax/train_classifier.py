"""`python -m mpdit_jax.train_classifier`: train a small classifier, whose features compare images of one data set."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mpdit_jax.errors import InputError
from mpdit_jax.runtime.cli import make_parser, run
from mpdit_jax.validation import check_image_size, check_seed

_EXAMPLES = """\
  python -m mpdit_jax.train_classifier --data=digits --out=digits.safetensors
  python -m mpdit_jax.train_classifier --data=fashion_mnist --steps=2000 --out=fashion.safetensors
  python -m mpdit_jax.train_classifier --images=photos/ --image_size=64 --out=photos.safetensors
  python -m mpdit_jax.evaluate --samples=samples.npz --reference=data:digits --features=classifier:digits.safetensors
"""


def main(arguments: Sequence[str]) -> int:
    """Train as the arguments say; exit status."""
    parser = make_parser(
        "train_classifier",
        "Train a small classifier on labelled images for `evaluate --features=classifier:FILE`. It takes seconds to "
        "minutes on a CPU, and the same command gives the same file.",
        _EXAMPLES,
    )
    parser.add_argument("--data", default="", help="digits | fashion_mnist | arrays")
    parser.add_argument("--data_path", default="", metavar="PATH", help="of the data set; arrays: an .npz")
    parser.add_argument("--split", default="", help="of the data set (default: all of digits, else train)")
    parser.add_argument("--images", default="", help="in place of --data: as --images of prepare, such as a folder")
    parser.add_argument("--image_size", type=int, default=0, metavar="PIXELS", help="squares cut from --images")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="of --images (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="FILE.safetensors", help="weights and architecture")
    parser.add_argument("--steps", type=int, default=500, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if bool(options.data) == bool(options.images):
        raise InputError("give either --data=NAME or --images=FOLDER to train on.")
    if not options.out.endswith(".safetensors"):
        raise InputError(f"--out={options.out}: expected a name that ends in .safetensors.")
    if not options.learning_rate > 0:
        raise InputError(f"--learning_rate={options.learning_rate}: expected a positive number.")
    check_seed(options.seed, "--seed")

    from mpdit_jax.data.image_sets import open_images
    from mpdit_jax.data.sources import SOURCES, Batched, load_source
    from mpdit_jax.evaluate.classifier import save_classifier
    from mpdit_jax.evaluate.classifier_training import train_classifier
    from mpdit_jax.io.atomic import check_writable

    check_writable(options.out)
    pictures: Batched
    if options.data:
        if options.data not in SOURCES:
            raise InputError(f"--data={options.data}: expected one of {', '.join(SOURCES)}; latents are no images.")
        split = options.split or ("all" if options.data == "digits" else "train")
        source = load_source(options.data, options.data_path, split)
        pictures, labels, names = source, source.labels, source.class_names
    else:
        found = open_images(options.images, options.split or "train")
        if found.labels is None:
            raise InputError(
                f"--images={options.images}: expected a folder or idx:FOLDER, where every image has a label."
            )
        check_image_size(options.image_size, "--image_size", least=8)
        pictures = replace(found, image_size=options.image_size, channels=options.channels)
        labels, names = found.labels, found.class_names
    model, accuracy = train_classifier(
        lambda rows: pictures.batch(rows)["x"],
        labels,
        len(names),
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    save_classifier(Path(options.out), model)
    print(f"{options.out}: accuracy {accuracy:.1%} on held-out images; compare images with")
    words = [f"--features=classifier:{options.out}", "--samples=SAMPLES.npz"]
    if options.images and ":" not in options.images:
        words += [f"--reference={options.images}", f"--image_size={options.image_size}"]
    else:
        words.append(f"--reference={'SET' if options.data in ('', 'arrays') else f'data:{options.data}'}")
    print(f"  python -m mpdit_jax.evaluate {shlex.join(words)}")
    return 0


if __name__ == "__main__":
    run(main)
