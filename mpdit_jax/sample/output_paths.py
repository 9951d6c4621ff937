"""Output paths of a run: checks before anything is drawn, and removal of a killed run's temporaries."""

import argparse
import dataclasses
import glob
from pathlib import Path

from mpdit_jax.errors import InputError
from mpdit_jax.io.atomic import check_writable, remove_stale_tmp
from mpdit_jax.sample.outputs import SINGLE


@dataclasses.dataclass(frozen=True)
class OutputPaths:
    """A path for each output, None if not asked for."""

    out: Path
    sheet: Path | None  # the contact sheet; replaces `out` if both are one path
    gif: Path | None
    singles: Path | None  # a folder

    @property
    def strip(self) -> Path | None:
        """The film strip, beside the GIF."""
        return None if self.gif is None else self.gif.with_suffix(".png")

    def files(self) -> list[Path]:
        """Return every file that process 0 writes."""
        return [path for path in (self.out, self.sheet, self.gif, self.strip) if path is not None]

    def check(self) -> None:
        """Raise InputError if one output would overwrite another, or cannot be written."""
        others = {path.resolve() for path in (self.out, self.sheet) if path is not None}
        if self.strip is not None and self.strip.resolve() in others:
            raise InputError(
                f"--trajectory={self.gif} has its film strip in {self.strip}, where another output goes: give the GIF "
                "another name."
            )
        for path in self.files():
            if self.singles is not None and path.parent.resolve() == self.singles.resolve() and path.match(SINGLE):
                raise InputError(f"{path} has the name of a single image in --png_folder={self.singles}: give another.")
        for path in (*self.files(), *([self.singles / "_"] if self.singles is not None else [])):
            check_writable(path)

    def check_fresh(self) -> None:
        """Raise InputError if the folder of a fresh run already holds single images."""
        found = next(self.singles.glob(SINGLE), None) if self.singles is not None else None
        if found is not None:
            raise InputError(
                f"--png_folder={self.singles} holds single images already, such as {found.name}: give an empty folder, "
                "or move them away."
            )

    def remove_stale_tmp(self) -> None:
        """Delete temporaries of a killed run beside the outputs."""
        for path in self.files():
            remove_stale_tmp(path.parent, glob.escape(path.name))
        if self.singles is not None:
            remove_stale_tmp(self.singles, SINGLE)


def output_paths(options: argparse.Namespace, out: Path) -> OutputPaths:
    """Return the paths that the command's arguments name."""

    def place(value: str, beside: Path) -> Path | None:
        return None if not value else beside if value == "beside" else Path(value)

    sheet = place(options.grid, out.with_suffix(".png"))
    gif = place(options.trajectory, out.with_name(f"{out.stem}_trajectory.gif"))
    return OutputPaths(out, sheet, gif, Path(options.png_folder) if options.png_folder else None)
