"""`python -m mpdit_jax.benchmark`: how fast, how much memory, beside the usual PyTorch where it is installed."""

from collections.abc import Callable, Sequence

from mpdit_jax.runtime.cli import make_parser, run
from mpdit_jax.runtime.hugepages import restart_with_huge_pages

_EXAMPLES = """\
  python -m mpdit_jax.benchmark data
  python -m mpdit_jax.benchmark evaluate --neighbours=10000
  python -m mpdit_jax.benchmark sample --help
  python -m mpdit_jax.benchmark sample --preset=mpdit_b --batch=4 --steps=10 --guidance_scale=1.5
  python -m mpdit_jax.benchmark train --preset=mpdit_b --batch=8
  python -m mpdit_jax.benchmark vae --help
  python -m mpdit_jax.benchmark vae --image_size=256 --batch_size=2
"""


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that the first argument names with the arguments after it; exit status."""
    parser = make_parser("benchmark", "Measure one part of the system on this machine.", _EXAMPLES)
    parser.add_argument("what", choices=list(_BENCHMARKS), help="what to measure; `WHAT --help` tells its options")
    chosen = parser.parse_args(arguments[:1])
    return _BENCHMARKS[chosen.what](arguments[1:])


def _data(arguments: Sequence[str]) -> int:
    from mpdit_jax.benchmark.data import main as measure

    return measure(arguments)


def _evaluate(arguments: Sequence[str]) -> int:
    from mpdit_jax.benchmark.evaluate import main as measure

    return measure(arguments)


def _sample(arguments: Sequence[str]) -> int:
    from mpdit_jax.benchmark.sample import main as measure

    return measure(arguments)


def _train(arguments: Sequence[str]) -> int:
    from mpdit_jax.benchmark.train import main as measure

    return measure(arguments)


def _vae(arguments: Sequence[str]) -> int:
    from mpdit_jax.benchmark.vae import main as measure

    return measure(arguments)


_BENCHMARKS: dict[str, Callable[[Sequence[str]], int]] = {
    "data": _data,
    "evaluate": _evaluate,
    "sample": _sample,
    "train": _train,
    "vae": _vae,
}

if __name__ == "__main__":
    restart_with_huge_pages()  # as launch/environment.sh does for training
    run(main)
