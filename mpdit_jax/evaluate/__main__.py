"""`python -m mpdit_jax.evaluate`: compare generated images with real ones."""

import argparse
import dataclasses
import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

from mpdit_jax.config.evaluation import PREPROCESSINGS, choose_metrics, metric_names
from mpdit_jax.distributed.collectives import run_on_process_0
from mpdit_jax.distributed.startup import add_flags, join, own_flags
from mpdit_jax.errors import InputError
from mpdit_jax.io.paths import expand
from mpdit_jax.runtime.cli import Parser, make_parser, run
from mpdit_jax.validation import check_image_size, check_seed

_EXAMPLES = """\
  python -m mpdit_jax.evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz
  python -m mpdit_jax.evaluate --samples=samples.npz --reference=stats.npz --metrics=fid,is --inception=weights.pth
  python -m mpdit_jax.evaluate --samples=photos/ --image_size=256 --save_stats=photos_stats.npz
  python -m mpdit_jax.evaluate --samples=samples.npz --reference=data:digits --features=classifier:digits.safetensors
  python -m mpdit_jax.evaluate --workdir=runs/xl --vae=vae/ --num_samples=50000 --guidance_scale=1.5,1.0 --steps=250
"""
T = TypeVar("T")


def make_evaluate_parser() -> Parser:
    """Return the command's parser."""
    from mpdit_jax.sample.options import add_drawing_options, add_model_options

    parser = make_parser(
        "evaluate",
        "Compare images with a reference: FID, sFID, Inception Score, precision, recall, KID. Give --samples, or "
        "--workdir to draw them from a run, once for every combination of --guidance_scale, --steps and --solver. FID "
        "needs Inception's weights; other networks give an FD(NAME), which compares with no other. Finished features "
        "are kept beside --out until the end: after any interruption the same command continues.",
        _EXAMPLES,
    )
    parser.add_argument(
        "--samples", default="", metavar="SET", help="an .npz with arr_0, a folder, or {data|idx|tfds}:NAME[:SPLIT]"
    )
    parser.add_argument(
        "--reference",
        default="",
        metavar="SET",
        help="the same, an ADM batch, or saved statistics (default with --workdir: its data, 50,000 images at most)",
    )
    parser.add_argument("--metrics", default="", help="fid,sfid,is,precision,recall,kid; fd for another network")
    parser.add_argument("--out", default="", metavar="FILE.json", help="numbers and settings (default: beside the set)")
    parser.add_argument("--save_stats", default="", metavar="FILE.npz", help="save the samples' mean and covariance")
    parser.add_argument("--save_features", action="store_true", help="and their features, for precision and recall")
    parser.add_argument("--num_samples", type=int, help="spread over the set (default: all; of a run, 8 a class)")
    parser.add_argument(
        "--image_size",
        type=int,
        default=0,
        metavar="PIXELS",
        help="cut a reference's folder, or with --save_stats alone the samples', to squares of this size",
    )
    parser.add_argument("--seed", type=int, default=0, help="of samples and KID's subsets (default: 0)")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default: %(default)s)")
    group = parser.add_argument_group("extractor")
    group.add_argument("--features", default="", help="inception | efficientnet_lite0 | classifier:FILE")
    group.add_argument(
        "--inception",
        default="",
        metavar="FILE",
        help="weights of pytorch-fid or torch-fidelity (default: MPDIT_JAX_INCEPTION, then ~/.cache/mpdit_jax)",
    )
    group.add_argument("--save_inception", default="", metavar="FILE.safetensors", help="convert them and exit")
    group.add_argument(
        "--preprocessing", choices=PREPROCESSINGS, help="Inception's input (default: tensorflow, as ADM)"
    )
    group.add_argument("--feature_size", type=int, default=0, metavar="PIXELS", help="efficientnet_lite0's input (224)")
    group.add_argument("--k", type=int, default=3, help="neighbour of precision and recall (default: %(default)s)")
    group.add_argument("--splits", type=int, default=10, help="of the Inception Score (default: %(default)s)")
    add_model_options(parser, required=False)
    add_drawing_options(parser)
    # These three take several values here, in place of the sampler's own flags.
    parser.conflict_handler = "resolve"
    group = parser.add_argument_group("sampler, several values at once")
    group.add_argument("--guidance_scale", type=_list_of(float), default=[1.0], metavar="W,...", help="(default: 1.0)")
    group.add_argument("--steps", type=_list_of(int), metavar="N,...", help="velocity evaluations (default: 250)")
    group.add_argument("--solver", type=_list_of(str), default=["euler"], metavar="NAME,...", help="(default: euler)")
    add_flags(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Evaluate as the arguments say and return the exit status."""
    options = make_evaluate_parser().parse_args(arguments)
    _check_files(options)
    if options.save_inception:
        from mpdit_jax.evaluate.inception_weights import convert_inception, locate_inception

        source = locate_inception(options.inception)
        _check_other("save_inception", options.save_inception, "inception", str(source))
        convert_inception(source, options.save_inception)
        print(f"Inception's weights in {options.save_inception}")
        return 0
    check_flags(options, arguments)
    join(options, own_flags(options))

    import jax

    from mpdit_jax.checkpoint.load import load_config
    from mpdit_jax.distributed.collectives import barrier
    from mpdit_jax.evaluate import command
    from mpdit_jax.evaluate.report import table, write_json
    from mpdit_jax.evaluate.scratch import lock_scratch
    from mpdit_jax.evaluate.statistics import check_count, check_metrics
    from mpdit_jax.evaluate.stored_statistics import save_statistics
    from mpdit_jax.io.atomic import check_writable

    if options.workdir:
        load_config(options.workdir)  # before any weights: there may be no run
    features = command.choose_features(options.features, options.metrics, options.inception, options.reference)
    wanted = options.reference or options.workdir or options.metrics
    metrics = choose_metrics(options.metrics, features) if wanted else ()
    out = _place(options)
    check_writable(out)
    if options.save_stats:
        check_writable(options.save_stats)
    if options.num_samples is not None:
        check_count(options.num_samples, metrics, options.k, "samples")
    extractor = command.prepare_extractor(options, features)
    check_metrics(metrics, extractor)
    scratch = out.with_name(f"{out.name}.unfinished")
    written = [out, *([Path(options.save_stats)] if options.save_stats else [])]
    with run_on_process_0(partial(lock_scratch, scratch, written)) or nullcontext() as held:
        if options.workdir:
            from mpdit_jax.evaluate.runs import evaluate_run, prepare_run

            drawing = prepare_run(options, extractor, metrics)
            reference = command.reference_statistics(options, extractor, metrics, scratch, drawing.shape)
            results = evaluate_run(options, drawing, extractor, metrics, reference, scratch)
        else:
            statistics, result = command.evaluate_set(options, extractor, metrics, scratch)
            results = [] if result is None else [result]
            if options.save_stats and jax.process_index() == 0:
                save_statistics(options.save_stats, statistics, features=options.save_features)
                print(f"statistics of {statistics.count} images in {options.save_stats}")
        barrier("the scratch folder is read")
        if held is None:  # not process 0
            return 0
        if results:
            write_json(out, {"results": [dataclasses.asdict(row) for row in results]})
            print(f"{table(results)}\nwith their settings in {out}")
        held.remove()
    return 0


def check_flags(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Raise InputError for flags that do not fit together or have no effect."""
    if bool(options.samples) == bool(options.workdir):
        raise InputError("give either --samples=SET or --workdir=FOLDER, the images to evaluate.")
    if options.samples and (expand(options.samples) / "checkpoints").is_dir():
        raise InputError(f"--samples={options.samples} is a run: give --workdir={options.samples} to draw from it.")
    asked = set(metric_names(options.metrics))
    if options.samples and not options.reference and asked != {"is"} and (asked or not options.save_stats):
        raise InputError("--reference is missing: expected a set to compare with (or --save_stats=FILE.npz alone).")
    if options.save_features and not options.save_stats:
        raise InputError("--save_features goes with --save_stats=FILE.npz, which keeps the features.")
    if options.workdir and options.save_stats:
        raise InputError(
            "--save_stats needs --samples: draw them first by `python -m mpdit_jax.sample "
            f"--workdir={shlex.quote(options.workdir)} --num_samples=50000 --out=samples.npz`."
        )
    for name in ("batch_size", "k", "splits"):
        if vars(options)[name] < 1:
            raise InputError(f"--{name}={vars(options)[name]}: expected 1 or more.")
    check_seed(options.seed, "--seed")
    if options.image_size:
        check_image_size(options.image_size, "--image_size")
    _reject_unused_flags(options, arguments)


def _reject_unused_flags(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Raise InputError for a flag of drawing beside --samples, or for --image_size where no folder is cut."""
    from mpdit_jax.sample.options import add_drawing_options, add_model_options

    parser = argparse.ArgumentParser(add_help=False)
    add_model_options(parser, required=False)
    add_drawing_options(parser)
    drawing = vars(parser.parse_args([])).keys() - {"workdir", "vae", "vae_dtype", "vae_tile"}
    for argument in arguments if options.samples else ():
        if argument.partition("=")[0].removeprefix("--") in drawing:
            raise InputError(
                f"{argument} is for drawing from --workdir, and --samples={options.samples} is drawn already: leave it "
                "out, or give --workdir=FOLDER in place of --samples."
            )
    if options.workdir and options.image_size and not _may_be_photographs(options.reference):
        raise InputError(
            f"--image_size={options.image_size} cuts the images of a reference's folder, and "
            f"{f'--reference={options.reference}' if options.reference else 'the data of the run'} is none: leave it "
            "out, or give --reference=FOLDER."
        )


def _may_be_photographs(place: str) -> bool:
    """Return whether a reference may be a folder of images; a missing one is refused later."""
    from mpdit_jax.data.latent_store import MANIFEST

    if not place or place.startswith("data:"):
        return False
    path = expand(place)
    return not path.is_file() and not (path / MANIFEST).is_file()


def _check_files(options: argparse.Namespace) -> None:
    for written, ending in (("out", ".json"), ("save_stats", ".npz"), ("save_inception", ".safetensors")):
        to = vars(options)[written]
        if to and not to.endswith(ending):
            raise InputError(f"--{written}={to}: expected a name that ends in {ending}.")
        for read in ("samples", "reference", "inception"):
            _check_other(written, to, read, vars(options)[read])


def _check_other(written: str, to: str, read: str, of: str) -> None:
    """Raise InputError if what is written would replace what is read."""
    if to and of and Path(to).resolve() == Path(of).resolve():
        raise InputError(f"--{written}={to} is what --{read} reads: give another name, or the file would be lost.")


def _place(options: argparse.Namespace) -> Path:
    if options.out:
        return Path(options.out)
    if options.workdir:
        return Path(options.workdir) / "evaluation" / "results.json"
    named = options.samples.startswith(("data:", "idx:", "tfds:"))
    beside = re.sub("[:/]+", "_", options.samples) if named else options.samples.rstrip("/")
    return Path(f"{beside}.metrics.json")


def _list_of(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    def parse(text: str) -> list[T]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: expected values with commas between them") from error

    return parse


if __name__ == "__main__":
    run(main)
