"""Where a run's outputs go: checked before anything is drawn, cleared of what a killed start has left."""

import argparse
import dataclasses
import glob
from pathlib import Path

from mpdit_jax.errors import InputError
from mpdit_jax.io.atomic import check_writable, remove_stale_tmp
from mpdit_jax.sample.outputs import SINGLE


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the outputs go; None for what is not asked for."""

    out: Path
    sheet: Path | None  # may be `out`, whose place it then takes
    film: Path | None  # the GIF
    singles: Path | None  # a folder

    @property
    def strip(self) -> Path | None:
        """The film strip, beside the GIF."""
        return None if self.film is None else self.film.with_suffix(".png")

    def files(self) -> list[Path]:
        """Every file that process 0 writes."""
        return [path for path in (self.out, self.sheet, self.film, self.strip) if path is not None]

    def check(self) -> None:
        """Raise InputError if one output would overwrite another, or cannot be written."""
        if self.strip is not None and self.strip.resolve() in {
            path.resolve() for path in (self.out, self.sheet) if path
        }:
            raise InputError(
                f"--trajectory={self.film} has its film strip in {self.strip}, where another output goes: give the GIF "
                "another name."
            )
        for path in self.files():
            if self.singles is not None and path.parent.resolve() == self.singles.resolve() and path.match(SINGLE):
                raise InputError(f"{path} has the name of a single image in --png_folder={self.singles}: give another.")
        for path in (*self.files(), *([self.singles / "_"] if self.singles is not None else [])):
            check_writable(path)

    def check_fresh(self) -> None:
        """Raise InputError if the folder of single images, of a run that starts afresh, holds those of another one."""
        found = next(self.singles.glob(SINGLE), None) if self.singles is not None else None
        if found is not None:
            raise InputError(
                f"--png_folder={self.singles} holds single images already, such as {found.name}: give an empty folder, "
                "or move them away."
            )

    def remove_stale_tmp(self) -> None:
        """Of an earlier start that was killed while it wrote."""
        for path in self.files():
            remove_stale_tmp(path.parent, glob.escape(path.name))
        if self.singles is not None:
            remove_stale_tmp(self.singles, SINGLE)


def places_of(options: argparse.Namespace, out: Path) -> Places:
    """Where the command's arguments say."""
    return Places(
        out,
        _place(options.grid, out.with_suffix(".png")),
        _place(options.trajectory, out.with_name(f"{out.stem}_trajectory.gif")),
        Path(options.png_folder) if options.png_folder else None,
    )


def _place(value: str, beside: Path) -> Path | None:
    return None if not value else beside if value == "beside" else Path(value)
