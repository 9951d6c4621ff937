"""The folder beside an evaluation's output that stores unfinished features."""

import glob
from collections.abc import Sequence
from pathlib import Path

from mpdit_jax.io.atomic import remove_stale_tmp
from mpdit_jax.io.locked_folder import Job, LockedFolder

_JOB = Job("evaluation", "using", "choose another --out", temporary=True)


def lock_scratch(scratch: Path, written: Sequence[Path]) -> LockedFolder:
    """Lock the folder and delete stale temporaries of the files `written`; raises InputError if it is locked."""
    folder = LockedFolder(scratch, _JOB)
    for path in written:
        remove_stale_tmp(path.parent, glob.escape(path.name))
    return folder
