"""`python -m mpdit_jax.tables`: print the cost of every model of the paper's tables beside the paper's figures."""

import json
import math
from collections.abc import Sequence
from typing import Any

from mpdit_jax.config.ablation import ROWS, list_rows
from mpdit_jax.runtime.cli import make_parser, run

_EXAMPLES = """\
  python -m mpdit_jax.tables
  python -m mpdit_jax.tables --format=json > tables.json
  python -m mpdit_jax.tables --format=list
"""
_COLUMNS = (
    "model", "parameters (M)", "printed", "GMACs, paper's count", "printed", "GMACs, true", "training", "FID, paper",
    "remark",
)  # fmt: skip
_LEGEND = """
Parameters include the frozen position tables, as PyTorch counts them. GMACs are multiply-adds of one forward pass of
one image. "True" counts every matrix product at the length that each block sees. "Paper's count" reproduces what the
paper prints as GFLOPs; its rule is inferred from its figures: attention in every block at 256 tokens, and one operation
for each output element of a norm or GELU (without these, mpdit_xl_k4 and dit_xl_2 differ in the last digit). If our
figure, rounded or cut to the printed digits, differs from the paper's, a remark has ours minus the paper's. "Training"
is a forward pass of masked training. FID is the paper's (80 epochs, unguided, unless remarked), not ours.
Train a row with `python -m mpdit_jax.train --config=ablation:NAME`, or --config=NAME for those of 512x512 pixels.
"""


def main(arguments: Sequence[str]) -> int:
    """Print the tables and return the exit status."""
    description = "Print parameters and multiply-adds of every model of the paper's tables, beside the paper's figures."
    parser = make_parser("tables", description, _EXAMPLES)
    formats = "list: the rows of --config=ablation:NAME and what each changes (default: %(default)s)"
    parser.add_argument("--format", choices=("markdown", "json", "list"), default="markdown", help=formats)
    options = parser.parse_args(arguments)
    if options.format == "list":
        print(list_rows())
        return 0
    found = rows()
    print(json.dumps(found, indent=2) if options.format == "json" else as_markdown(found), end="\n")
    return 0


def rows() -> list[dict[str, Any]]:
    """Return every row as plain numbers and strings: our counts, the paper's figures, and the differences."""
    from mpdit_jax.model.accounting import count, masked_macs, paper_macs

    found = []
    for name, row in ROWS.items():
        config = row.model
        parameters, macs = count(config)
        millions, giga = parameters / 1e6, paper_macs(config) / 1e9
        found.append(
            {
                "name": name,
                "table": row.table,
                "preset": row.preset,
                "changes": dict(row.fields),
                "parameters": parameters,
                "parameters_millions": round(millions, 3),
                "parameters_paper": row.params or None,
                "parameters_difference": difference(millions, row.params),
                "gmacs_paper_count": round(giga, 3),
                "gmacs_paper": row.gmacs or None,
                "gmacs_difference": difference(giga, row.gmacs),
                "gmacs_true": round(macs / 1e9, 3),
                "gmacs_training": round(masked_macs(config, row.mask_ratio) / 1e9, 3),
                "fid_paper": row.fid or None,
                "note": row.note,
            }
        )
    return found


def difference(value: float, printed: str) -> float | None:
    """Return ours minus the printed figure; None if nothing is printed, or if ours, rounded or cut, prints the same."""
    if not printed:
        return None
    digits = len(printed.partition(".")[2])
    cut = math.floor(value * 10**digits) / 10**digits
    if printed in (f"{value:.{digits}f}", f"{cut:.{digits}f}"):
        return None
    return round(value - float(printed), digits + 1)


def as_markdown(found: list[dict[str, Any]]) -> str:
    """Return a Markdown table for each table of the paper, and a legend."""
    lines: list[str] = []
    for table in dict.fromkeys(row["table"] for row in found):
        lines += ["", f"### {table[0].upper()}{table[1:]}", ""]
        lines += [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        for row in (row for row in found if row["table"] == table):
            training = row["gmacs_training"]
            cells = [
                f"`{row['name']}`",
                f"{row['parameters_millions']:.3f}",
                row["parameters_paper"] or "",
                f"{row['gmacs_paper_count']:.3f}",
                row["gmacs_paper"] or "",
                f"{row['gmacs_true']:.3f}",
                f"{training:.3f}" if training != row["gmacs_true"] else "",
                row["fid_paper"] or "",
                "; ".join(_remarks(row)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines[1:]) + "\n" + _LEGEND.rstrip()


def _remarks(row: dict[str, Any]) -> list[str]:
    remarks = [row["note"]] if row["note"] else []
    for name, unit in (("parameters", "M parameters"), ("gmacs", "GMACs")):
        apart = row[f"{name}_difference"]
        if apart is not None:
            share = apart / float(row[f"{name}_paper"])
            remarks.append(f"not reproduced: {apart:+g} {unit} ({share:+.1%})")
    return remarks


if __name__ == "__main__":
    run(main)
