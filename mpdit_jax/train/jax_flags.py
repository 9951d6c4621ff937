"""JAX's flags that change numbers: a run stores them, and continues under the same flags only.

JAX's version and XLA's flags may change the rounding. They are stored as well, and a change of them is printed.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax

from mpdit_jax.errors import CheckpointError
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.json_files import parse_json

FLAGS_FILE = "jax_flags.json"


def number_flags() -> dict[str, Any]:
    """Return the present values of the flags, by name."""
    config: Any = jax.config  # has these attributes at run time only
    return {
        "jax_enable_x64": config.jax_enable_x64,
        "jax_default_matmul_precision": config.jax_default_matmul_precision,
        "jax_default_prng_impl": config.jax_default_prng_impl,
        "jax_threefry_partitionable": config.jax_threefry_partitionable,
        "jax_random_seed_offset": config.jax_random_seed_offset,
    }


def rounding_settings() -> dict[str, str]:
    """Return what may change the rounding of results, and nothing else: JAX's version and XLA's flags, by name."""
    variables = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "NVIDIA_TF32_OVERRIDE")}
    return {"JAX's version": jax.__version__, **variables}


def record_flags(workdir: Path, *, trained: bool) -> None:
    """Store the flags in a run's workdir. If it has `trained`, check first that they equal the stored ones.

    A run without the record, of an older version, is accepted. A change in `rounding_settings` is printed.

    Raises:
        CheckpointError: a flag has another value than in the run, or the record is damaged.
    """
    path, now = workdir / FLAGS_FILE, number_flags()
    try:
        stored = dict(parse_json(path.read_text())) if trained and path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it and repeat the training command.") from error
    changed = [name for name in now if stored.get(name, now[name]) != now[name]]
    if changed:
        values = ", ".join(f"{name}={stored[name]} and not {now[name]}" for name in changed)
        how = ", ".join(
            f"{name.upper()}={stored[name]}" if stored[name] is not None else f"no {name.upper()}" for name in changed
        )
        raise CheckpointError(
            f"{workdir} was trained with {values}, which changes its numbers: continue it with {how} in the "
            "environment, or use another --workdir."
        )
    rounding = rounding_settings()
    for name, value in rounding.items():
        if stored.get(name, value) != value:
            now_and_then = f"{value or 'not set'} now and was {stored[name] or 'not set'}"
            print(f"{name} is {now_and_then}: results may differ in rounding")
    with atomic_write(path) as file:
        file.write((json.dumps(stored | now | rounding, indent=1) + "\n").encode())
