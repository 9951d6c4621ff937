"""The pictures of docs/architecture.md: the package's folders, and the way of one batch through them.

python docs/plots/house.py
"""

from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1] / "images"

# Rows from top to bottom. A folder imports from its own row and from rows below, never from above.
HOUSE: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "commands",
        {
            "train": "state, step, loop",
            "evaluate": "FID and related",
            "sample": "images from a run",
            "prepare": "images to latents",
            "compile": "for absent TPUs",
            "benchmark": "measure speed",
            "convert": "weight formats",
            "export": "sampler as a file",
            "tables": "the paper's models",
            "train_vae": "a small VAE",
            "train_classifier": "for evaluation",
        },
    ),
    ("run", {"config": "fields, checks, flags", "checkpoint": "save, verify, restore"}),
    (
        "method",
        {
            "model": "MPDiT, DiT",
            "flow": "loss, solvers",
            "data": "sets, batches",
            "vae": "autoencoder",
            "interop": "other weights",
        },
    ),
    (
        "machine",
        {"distributed": "mesh, processes", "runtime": "signals, progress", "io": "files, pictures"},
    ),
    ("shared", {"errors": "", "validation": "", "version": ""}),
)

# The way of a batch: name, file, what it hands on.
BATCH = (
    ("source", "data/sources.py", "single examples"),
    ("pipeline", "data/pipeline.py", "the batch of a step"),
    ("Prefetcher", "train/prefetcher.py", "the placed batch"),
    ("step", "train/step.py", "the next state"),
    ("RunLogger", "train/logger.py", "curves, grids"),
    ("Checkpoints", "checkpoint/manager.py", "the saved state"),
    ("Sampler", "flow/sampler.py", "images"),
)
WIDTH, MARGIN, GAP, LABEL = 760, 14, 10, 92
PER_LINE = 4  # boxes
COLORS = ("#3f51b5", "#5e6fc4", "#00796b", "#6d4c41", "#546e7a")


def text(x: float, y: float, words: str, size: int, color: str, *, bold: bool = False, anchor: str = "middle") -> str:
    """A line of text."""
    style = f'font-size="{size}" font-weight="{600 if bold else 400}" fill="{color}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, color: str) -> str:
    """A rounded rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{color}"/>'


def svg(height: float, title: str, parts: list[str]) -> str:
    """A whole picture, on white, so that it is readable on a dark page too."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" font-family="sans-serif">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>',
        *parts,
        "</svg>",
        "",
    ])  # fmt: skip


def house() -> str:
    """The folders in rows, each row on those that it imports from."""
    parts, y = list[str](), float(MARGIN)
    for (label, rooms), color in zip(HOUSE, COLORS, strict=True):
        names = list(rooms)
        count = -(-len(names) // PER_LINE) if len(names) > PER_LINE + 1 else 1  # of lines
        lines = [names[index * PER_LINE : (index + 1) * PER_LINE] for index in range(count)] if count > 1 else [names]
        height = 52 if any(rooms.values()) else 32
        parts.append(text(MARGIN, y + (count * (height + GAP) - GAP) / 2 + 5, label, 15, "#37474f", anchor="start"))
        for line in lines:
            width = (WIDTH - 2 * MARGIN - LABEL - GAP * (len(line) - 1)) / len(line)
            for index, name in enumerate(line):
                x = MARGIN + LABEL + index * (width + GAP)
                parts.append(box(x, y, width, height, color))
                parts.append(text(x + width / 2, y + 21, name, 16, "#ffffff", bold=True))
                if rooms[name]:
                    parts.append(text(x + width / 2, y + 41, rooms[name], 13, "#ffffff"))
            y += height + GAP
        y += GAP
    return svg(y - 2 * GAP + MARGIN, "The folders of mpdit_jax; imports point down", parts)


def batch() -> str:
    """The way of one batch, in numbered boxes."""
    parts, arrow, height, step = list[str](), 22, 86, 104
    width = (WIDTH - 2 * MARGIN - arrow * (PER_LINE - 1)) / PER_LINE
    for index, (name, file, result) in enumerate(BATCH):
        line, column = divmod(index, PER_LINE)
        x, y = MARGIN + column * (width + arrow), MARGIN + line * step
        color = COLORS[0] if file.startswith("train/") else COLORS[1] if file.startswith("checkpoint/") else COLORS[2]
        parts.append(box(x, y, width, height, color))
        parts.append(text(x + width / 2, y + 25, f"{index + 1}  {name}", 16, "#ffffff", bold=True))
        parts.append(text(x + width / 2, y + 48, file, 13, "#ffffff"))
        parts.append(text(x + width / 2, y + 70, f"gives {result}", 13, "#ffffff"))
        if column:
            parts.append(f'<path d="M{x - arrow + 5:g} {y + height / 2 - 8:g} l12 8 l-12 8 z" fill="#37474f"/>')
    lines = -(-len(BATCH) // PER_LINE)
    return svg(2 * MARGIN + (lines - 1) * step + height, "The way of one batch", parts)


def main() -> None:
    """Draw both."""
    (IMAGES / "house.svg").write_text(house())
    (IMAGES / "batch.svg").write_text(batch())


if __name__ == "__main__":
    main()
