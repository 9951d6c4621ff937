"""`python -m mpdit_jax.tables`: what every model of the paper's tables costs, beside what the paper prints."""

import json
import math
from collections.abc import Sequence
from typing import Any

from mpdit_jax.runtime.cli import make_parser, run

_EXAMPLES = """\
  python -m mpdit_jax.tables
  python -m mpdit_jax.tables --format=json > tables.json
"""
_COLUMNS = (
    "model",
    "parameters (M)",
    "printed",
    "GMACs, paper's count",
    "printed",
    "GMACs, true",
    "training",
    "FID, paper",
    "remark",
)
_LEGEND = """
Parameters count the frozen position tables, as PyTorch does. GMACs are multiply-adds of one forward pass of one image:
"true" are those of every matrix product at the length each block sees. "Paper's count" is what it prints as GFLOPs, a
convention worked out from its figures, since the paper does not state it: attention in every block as of 256 tokens,
and one operation for each element that a norm or GELU puts out (without these last, two of its twelve figures at 256
pixels differ in their last digit: mpdit_xl_k4 and dit_xl_2). Where the printed figure is ours, rounded or cut at its
last digit, there is no remark; where not, the remark is ours minus the paper's. "Training" is a forward pass of masked
training. FID is the paper's claim (80 epochs, unguided, unless remarked), not ours. `python -m mpdit_jax.train
--config=ablation:NAME` trains a row; those of 512x512 pixels are --config=NAME.
"""


def main(arguments: Sequence[str]) -> int:
    """Print the tables; exit status."""
    parser = make_parser(
        "tables",
        "Parameters and multiply-adds of every model of the paper's tables, counted from its config, beside the "
        "figures that the paper prints.",
        _EXAMPLES,
    )
    parser.add_argument("--format", choices=("markdown", "json"), default="markdown", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    found = rows()
    print(json.dumps(found, indent=2) if options.format == "json" else as_markdown(found), end="\n")
    return 0


def rows() -> list[dict[str, Any]]:
    """Every row as plain numbers and strings: what we count, what the paper prints, and how far they are apart."""
    from mpdit_jax.config.ablation import ROWS
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
                "changes": {
                    key: list(value) if isinstance(value, tuple) else value for key, value in row.fields.items()
                },
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
    """Ours minus the printed figure; None where nothing is printed, or where ours, rounded or cut, prints the same."""
    if not printed:
        return None
    digits = len(printed.partition(".")[2])
    cut = math.floor(value * 10**digits) / 10**digits
    if printed in (f"{value:.{digits}f}", f"{cut:.{digits}f}"):
        return None
    return round(value - float(printed), digits + 1)


def as_markdown(found: list[dict[str, Any]]) -> str:
    """One table for each of the paper's, and what its columns are."""
    lines: list[str] = []
    for table in dict.fromkeys(row["table"] for row in found):
        lines += ["", f"### {table[0].upper()}{table[1:]}", ""]
        lines += [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        for row in (row for row in found if row["table"] == table):
            training = row["gmacs_training"] if row["gmacs_training"] != row["gmacs_true"] else ""
            cells = [
                f"`{row['name']}`",
                f"{row['parameters_millions']:.3f}",
                row["parameters_paper"] or "",
                f"{row['gmacs_paper_count']:.3f}",
                row["gmacs_paper"] or "",
                f"{row['gmacs_true']:.3f}",
                f"{training:.3f}" if training else "",
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
