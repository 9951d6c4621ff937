"""The claim of one prepare on its folder: a lock, and settings that fit what is there."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mpdit_jax.data.latent_store import MANIFEST
from mpdit_jax.distributed.collectives import run_on_process_0
from mpdit_jax.errors import InputError
from mpdit_jax.io.files import Lock, atomic_write, check_writable, parse_json, remove_stale_tmp, take_lock

_SETTINGS, _LOCK = "prepare.json", ".lock"
_MOST_SHOWN = 5  # settings that differ


@contextmanager
def claim(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Hold the folder for one run of a plan with these settings; all processes must ask.

    Raises:
        InputError: it holds latents of other settings, is being written to, or cannot be written.
    """
    lock = run_on_process_0(partial(_take, out, settings))
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _take(out: Path, settings: dict[str, Any]) -> Lock:
    check_writable(out / _SETTINGS)
    lock = take_lock(out / _LOCK)
    if isinstance(lock, str):
        raise InputError(f"another prepare is writing to {out} ({lock}): wait for it to end, or use another --out.")
    try:
        remove_stale_tmp(out)
        _claim_settings(out, settings)
    except BaseException:
        lock.close()
        raise
    return lock


def _claim_settings(out: Path, settings: dict[str, Any]) -> None:
    path = out / _SETTINGS
    if not path.is_file():
        if (out / MANIFEST).is_file():
            raise InputError(f"{out} holds finished latents, and no {_SETTINGS} says of what: use another --out.")
        with atomic_write(path) as file:
            file.write((json.dumps(settings, indent=1) + "\n").encode())
        return
    try:
        stored = dict(parse_json(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: use another --out.") from error
    there, now = flat(stored), flat(settings)
    changed = [
        f"{name}: {there.get(name)} there, {now.get(name)} now"
        for name in now | there
        if there.get(name) != now.get(name)
    ]
    if changed:
        raise InputError(
            f"{out} holds latents of other settings ({'; '.join(changed[:_MOST_SHOWN])}): use another --out, or those "
            "settings."
        )


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Lists as an entry for each value, so that only those that differ are named."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, list):
            found |= {f"{name}[{place}]": one for place, one in enumerate(value)}
        else:
            found[name] = value
    return found
