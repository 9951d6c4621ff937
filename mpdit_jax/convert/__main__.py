"""`python -m mpdit_jax.convert`: convert a model between a workdir, a PyTorch file and a safetensors file."""

from collections.abc import Sequence
from pathlib import Path

from mpdit_jax.config.flags import make_config_parser, parse_with_config
from mpdit_jax.runtime.cli import run

_EXAMPLES = """\
  python -m mpdit_jax.convert --source=runs/digits --out=digits.safetensors
  python -m mpdit_jax.convert --source=runs/digits --out=digits.pt
  python -m mpdit_jax.convert --source=mpdit_b.pt --out=runs/mpdit_b --config=mpdit_b_256
  python -m mpdit_jax.convert --source=SiT-XL-2-256.pt --convention=sit --out=sit_xl_2.safetensors
"""


def main(arguments: Sequence[str]) -> int:
    """Convert as the arguments say and return the exit status."""
    parser = make_config_parser(
        "convert",
        "Read a model from a workdir (its moving average), a PyTorch file or a safetensors file and write it as "
        "another of these; the ending of --out says which, and a name without an ending is a workdir, for sampling and "
        "further training. Nothing in a file is executed, and nothing is overwritten.",
        _EXAMPLES,
    )
    parser.usage = f"{parser.prog} --source=FILE|FOLDER --out=FILE|FOLDER [--config=FILE]"
    parser.add_argument("--source", required=True, help="workdir, .pt, .pth or .safetensors")
    parser.add_argument("--out", required=True, help=".safetensors, .pt or .pth, or a new workdir")
    parser.add_argument("--step", type=int, help="checkpoint of a workdir (default: the newest)")
    parser.add_argument("--num_heads", type=int, help="attention heads of a PyTorch file, if no preset has its width")
    parser.add_argument("--num_classes", type=int, help="classes of a PyTorch file whose table may lack the null class")
    parser.add_argument("--key", help="selects one of several state dicts in a file (default: the moving average)")
    parser.add_argument("--convention", help="velocity, dit or sit, for a DiT's file that does not record it")
    if any(argument.startswith("--config") for argument in arguments):
        options, config = parse_with_config(parser, arguments)
    else:
        options, config = parser.parse_args(arguments), None

    from mpdit_jax.convert.checksum import checksum
    from mpdit_jax.convert.forms import check_target, read, write

    source, out = Path(options.source), Path(options.out)
    check_target(out, config)
    given = {name: vars(options)[name] for name in ("num_heads", "convention", "num_classes", "key", "step")}
    found = read(source, **given)
    before = checksum(found.model)
    print(f"read {found.description}\n  {_describe(found.model)}\n  {before}", flush=True)
    written, after = write(out, found, config, before)
    print(f"wrote {written}\n  {after}")
    return 0


def _describe(model: object) -> str:
    from mpdit_jax.model.accounting import count
    from mpdit_jax.model.mpdit import MPDiT

    assert isinstance(model, MPDiT)
    config = model.config
    parameters, macs = count(config)
    return (
        f"patch sizes {config.patch_sizes}, depths {config.depths}, width {config.hidden_size}, {config.num_heads} "
        f"heads, convention {config.convention}: {parameters / 1e6:.2f} M parameters, {macs / 1e9:.3f} GMACs"
    )


if __name__ == "__main__":
    run(main)
