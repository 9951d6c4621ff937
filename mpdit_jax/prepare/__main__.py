"""`python -m mpdit_jax.prepare`: encode images once, to train on their latents."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mpdit_jax.distributed.startup import add_flags, join, own_flags
from mpdit_jax.errors import InputError
from mpdit_jax.runtime.cli import Parser, add_tile_option, make_parser, run
from mpdit_jax.runtime.signals import stopped_status
from mpdit_jax.validation import check_image_size

_EXAMPLES = """\
  python -m mpdit_jax.prepare --images=imagenet/train --vae=sd-vae-ft-ema --image_size=256 --flip=both --out=latents/imagenet256
  python -m mpdit_jax.prepare --images=idx:/usr/share/datasets/fashion-mnist --vae=runs/vae/vae --image_size=32 --out=latents/fashion
  python -m mpdit_jax.prepare --images=tfds:imagenet2012 --vae=sd-vae-ft-ema --image_size=256 --out=latents/imagenet256
  python -m mpdit_jax.prepare --verify --out=latents/imagenet256
"""  # noqa: E501


def make_prepare_parser() -> Parser:
    """Return the command's arguments."""
    parser = make_parser(
        "prepare",
        "Encode images with a VAE into a store of latents: ArrayRecord shards and a manifest. Images are cropped to "
        "their central square. Finished shards are kept: the same command continues after an interruption of any kind, "
        "and does nothing once all is done.",
        _EXAMPLES,
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the latents go")
    parser.add_argument(
        "--images",
        metavar="IMAGES",
        help="a folder with a subfolder for each class | an .npz with images and labels | idx:FOLDER of IDX files, as "
        "MNIST's | tfds:NAME | data:NAME, as data:digits",
    )
    parser.add_argument("--split", default="", help="of idx:, tfds: and data:, also given as idx:FOLDER:SPLIT (train)")
    parser.add_argument("--vae", help="a folder as diffusers writes it, a name on the hub, or none: store pixels")
    parser.add_argument("--image_size", type=int, help="pixels along each side of the square")
    parser.add_argument(
        "--flip", choices=("none", "both"), default="none", help="store mirror images as well (default: %(default)s)"
    )
    parser.add_argument("--class_names", default="", metavar="FILE", help="one name a line, in label order")
    parser.add_argument("--batch_size", type=int, default=32, help="images encoded at a time (default: %(default)s)")
    parser.add_argument("--shard_size", type=int, default=4096, help="images a shard (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="reading threads (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="in which the VAE computes (default: %(default)s)",
    )
    add_tile_option(parser)
    parser.add_argument("--verify", action="store_true", help="read --out again and compare all of it to its manifest")
    add_flags(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Prepare or verify as the arguments say; exit status."""
    parser = make_prepare_parser()
    options = parser.parse_args(arguments)
    out = Path(options.out)
    if options.verify:
        return _verify(out)
    for name in ("images", "vae", "image_size"):
        if vars(options)[name] in (None, ""):
            parser.error(f"--{name} is needed")
    check_image_size(options.image_size, "--image_size")
    for name in ("batch_size", "shard_size", "threads"):
        if vars(options)[name] < 1:
            raise InputError(f"--{name}={vars(options)[name]}: expected 1 or more.")
    return _prepare(options, out)


def _prepare(options: argparse.Namespace, out: Path) -> int:
    from mpdit_jax.data.image_sets import open_images
    from mpdit_jax.data.sources import warn_of_unseen
    from mpdit_jax.prepare.store import prepare, read_rejected

    images = open_images(options.images, options.split, rejected=read_rejected(out))
    names = _names(options.class_names, images.class_names)
    if images.labels is not None:
        warn_of_unseen(images.labels, names, len(names), images.place)
    shared = own_flags(options, but=("images", "vae", "threads"))
    join(options, {**shared, "the images": images.identity})

    import jax

    from mpdit_jax.distributed.mesh import make_mesh
    from mpdit_jax.prepare.plan import Plan
    from mpdit_jax.vae import load_vae, tiles

    mesh = make_mesh(devices=jax.local_devices())
    vae = load_vae(options.vae, dtype=options.dtype, mesh=mesh, tiling=tiles(options.vae_tile))
    plan = Plan(
        images=replace(images, image_size=options.image_size, channels=vae.config.in_channels),
        source=images.place,
        class_names=names,
        vae=vae,
        image_size=options.image_size,
        flip=options.flip,
        shard_size=options.shard_size,
        batch_size=-(-options.batch_size // mesh.size) * mesh.size,
        threads=options.threads,
    )
    is_primary = jax.process_index() == 0
    if is_primary:
        count = len(images) - len(images.removed)
        print(f"{count:,} images of {len(names)} classes; interrupt at any time: the same command continues")
    manifest = prepare(plan, out)
    if manifest is None:
        if is_primary:
            print("stopped; the same command continues")
        return stopped_status()
    if is_primary:
        sizes = "x".join(map(str, manifest.latent_shape))
        rejected = f", {manifest.rejected} rejected (see {out / 'rejected.jsonl'})" if manifest.rejected else ""
        print(
            f"done: {manifest.examples:,} latents {sizes} in {out}{rejected}; channel means "
            f"{_rounded(manifest.latent_mean)}, standard deviations {_rounded(manifest.latent_std)}"
        )
    return 0


def _verify(out: Path) -> int:
    from mpdit_jax.data.latent_store import read_manifest
    from mpdit_jax.data.verify import verify
    from mpdit_jax.runtime.progress import WorkBar

    examples, before = read_manifest(out).examples, 0
    with WorkBar("verifying", "latents", examples) as bar:
        for done in verify(out):
            bar.advance(done - before)
            before = done
    print(f"{out} is as its manifest says: {examples:,} latents")
    return 0


def _names(path: str, found: tuple[str, ...]) -> tuple[str, ...]:
    if not path:
        return found
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--class_names={path} cannot be read: expected a text file with one name a line.") from error
    if len(lines) < len(found):
        raise InputError(f"--class_names={path} has {len(lines)} names: the images have {len(found)} classes.")
    return tuple(lines)


def _rounded(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


if __name__ == "__main__":
    run(main, resumable=True)
