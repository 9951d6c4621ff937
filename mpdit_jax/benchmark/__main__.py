"""`python -m mpdit_jax.benchmark`: measure speed on this machine (`studies.beside_torch` compares with PyTorch)."""

from collections.abc import Sequence

from mpdit_jax.runtime.cli import make_parser, run
from mpdit_jax.runtime.hugepages import restart_with_huge_pages

_EXAMPLES = """\
  python -m mpdit_jax.benchmark data
  python -m mpdit_jax.benchmark sample --help
  python -m mpdit_jax.benchmark sample --preset=mpdit_b --batch=4 --steps=10 --guidance_scale=1.5
  python -m mpdit_jax.benchmark train --preset=mpdit_b --batch=8
"""


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark named by the first argument with the other arguments; return the exit status."""
    parser = make_parser("benchmark", "Measure one part of the system on this machine.", _EXAMPLES)
    names = ("data", "sample", "train")
    parser.add_argument("what", choices=names, help="what to measure; `WHAT --help` lists its options")
    what = parser.parse_args(arguments[:1]).what
    if what == "data":
        from mpdit_jax.benchmark.data import main as measure
    elif what == "sample":
        from mpdit_jax.benchmark.sample import main as measure
    else:
        from mpdit_jax.benchmark.train import main as measure
    return measure(arguments[1:])


if __name__ == "__main__":
    restart_with_huge_pages()  # as launch/environment.sh does for training
    run(main)
