"""`python -m studies.beside_torch`: speed of one network beside PyTorch's, in the same run."""

from collections.abc import Sequence

from mpdit_jax.runtime.cli import make_parser, run
from mpdit_jax.runtime.hugepages import restart_with_huge_pages
from studies.beside_torch import evaluate, vae

_EXAMPLES = """\
  python -m studies.beside_torch evaluate --neighbours=10000
  python -m studies.beside_torch vae --image_size=256 --batch_size=2
"""


def main(arguments: Sequence[str]) -> int:
    """Run the comparison that the first argument names with the arguments after it; exit status."""
    parser = make_parser("beside_torch", "Measure one network beside PyTorch's.", _EXAMPLES, package="studies")
    parser.add_argument("what", choices=("evaluate", "vae"), help="what to measure; `WHAT --help` lists its options")
    what = parser.parse_args(arguments[:1]).what
    return (evaluate if what == "evaluate" else vae).main(arguments[1:])


if __name__ == "__main__":
    restart_with_huge_pages()  # as launch/environment.sh does for training
    run(main)
