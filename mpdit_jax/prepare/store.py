"""The making of a store: every process encodes its shards, then process 0 writes the manifest."""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
import numpy as np

from mpdit_jax.data.latent_store import (
    LABELS,
    MANIFEST,
    REJECTED,
    LatentStore,
    Manifest,
    manifest_to_json,
    read_manifest,
    sha256,
)
from mpdit_jax.data.picture_sets import file_sizes
from mpdit_jax.distributed.collectives import any_process, assert_equal_across_processes, run_on_process_0
from mpdit_jax.errors import DataError, InputError, MPDiTError, ProcessError
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.io.locked_folder import Job, LockedFolder, flat
from mpdit_jax.prepare.plan import Plan
from mpdit_jax.prepare.shards import Report, Stopped, read_report, write_shard
from mpdit_jax.runtime.progress import WorkBar
from mpdit_jax.runtime.signals import PreemptionHandler

_MOST_REJECTED = 0.01  # of all images
_JUDGED_EARLY = 100  # rejected images; a set with fewer is encoded whole, so that all of them are named at once
_FAILED = ".rejected.json"  # images that made an earlier start fail; they keep their positions if their files change
JOB = Job("prepare", "writing to", "use another --out", settings="prepare.json", holds="latents", outputs=MANIFEST)


def prepare(plan: Plan, out: Path) -> Manifest | None:
    """Make the store in the folder `out`, or finish one that was interrupted or lost files; whole shards stay.

    Returns:
        The manifest, or None if asked to stop by SIGINT or SIGTERM.

    Raises:
        ProcessError: another process has other settings.
        InputError: the folder holds latents of other settings, is being written to, or cannot be written.
        DataError: more than 1 % of the images were rejected.
    """
    settings = plan.settings()
    # One path may name different VAEs on two machines, and nobody would notice both in one store.
    assert_equal_across_processes({name: str(value) for name, value in flat(settings).items()})
    with PreemptionHandler() as stop, run_on_process_0(partial(LockedFolder, out, JOB, settings)) or nullcontext():
        if (out / MANIFEST).is_file() and not any_process(bool(run_on_process_0(partial(_needs_repair, out)))):
            return read_manifest(out)
        failure: MPDiTError | None = None
        try:
            stopped = _encode_all(plan, out, stop)
        except MPDiTError as error:
            failure, stopped = error, False
        if any_process(failure is not None):
            raise failure or ProcessError("another process failed: see its log; the same command continues.")
        if any_process(stopped):
            return None
        run_on_process_0(partial(_finish, plan, out))
        return read_manifest(out)


def _encode_all(plan: Plan, out: Path, stop: PreemptionHandler) -> bool:
    """Encode this process's shards; True if it was asked to stop before the last of them."""
    names, repaired = plan.shard_names(), plan.images.repaired
    mine = range(jax.process_index(), len(names), jax.process_count())
    found = {number: read_report(out / names[number]) for number in mine}
    kept = {n: one for n, one in found.items() if one is not None and not repaired.intersection(dict(one.rejected))}
    rejected = _rejected(plan, kept.values())
    total, done = (sum(len(plan.rows(number)) for number in numbers) for numbers in (mine, kept))
    with WorkBar("encoding", "images", total, done) as bar, ThreadPoolExecutor(plan.threads) as pool:
        if done:
            bar.say(f"{done} of {total} images are there already, in {out}")

        def advance(count: int, of_shard: list[tuple[str, str]]) -> None:
            bar.advance(count)
            if stop.name is not None:
                raise Stopped
            if len(rejected) + len(of_shard) > _JUDGED_EARLY:
                _check_rejected(plan, out, [*rejected, *of_shard])

        if len(rejected) > _JUDGED_EARLY:
            _check_rejected(plan, out, rejected)
        for number in (number for number in mine if number not in kept):
            try:
                report = write_shard(out / names[number], plan.rows(number), plan, pool, advance)
            except Stopped:
                pool.shutdown(cancel_futures=True)
                bar.say(f"{stop.name}: the shards that are finished stay in {out}")
                return True
            except OSError as error:
                raise InputError(f"cannot write {out / names[number]}: {error.strerror or error}.") from error
            rejected += _rejected(plan, [report])
    return False


def _rejected(plan: Plan, reports: Iterable[Report]) -> list[tuple[str, str]]:
    """Key and reason of the images that were rejected and are still there."""
    return [pair for report in reports for pair in report.rejected if pair[0] not in plan.images.removed]


def read_rejected(out: Path) -> dict[str, int]:
    """Read the keys of images for which earlier starts failed, with the bytes of each; raises DataError if damaged."""
    path = out / _FAILED
    try:
        return {str(key): int(size) for key, size in parse_json(path.read_text()).items()} if path.is_file() else {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}): prepare into another --out.") from error


def _check_rejected(plan: Plan, out: Path, rejected: list[tuple[str, str]]) -> None:
    """Raise DataError, with the rejected images on disk, if they are too many of all."""
    count = len(plan.images)
    if len(rejected) <= _MOST_REJECTED * count:
        return
    _write_rejected(out, rejected)
    sizes = file_sizes(Path(plan.images.place), dict(rejected))
    with atomic_write(out / _FAILED) as file:
        file.write(json.dumps(sizes | read_rejected(out)).encode())
    key, reason = rejected[0]
    raise DataError(
        f"{len(rejected)} of {count} images were rejected, more than {_MOST_REJECTED:.0%}: see {out / REJECTED} for "
        f"the reasons (the first: {key}: {reason}); remove or repair them and repeat the command, which continues."
    )


def _write_rejected(out: Path, rejected: list[tuple[str, str]]) -> None:
    with atomic_write(out / REJECTED) as file:
        file.write("".join(json.dumps({"key": key, "reason": why}) + "\n" for key, why in rejected).encode())


def _finish(plan: Plan, out: Path) -> None:
    """Write labels and manifest from the shards' reports; the manifest marks the store as finished."""
    finished = []
    for path in (out / name for name in plan.shard_names()):
        report = read_report(path)
        if report is None:
            raise DataError(f"{path} is missing: does every process see the same {out}? Repeat the command.")
        finished.append(report)
    rejected = _rejected(plan, finished)
    _check_rejected(plan, out, rejected)
    _write_rejected(out, rejected)
    labels = np.array([label for report in finished for label in report.labels], np.int32)
    with atomic_write(out / LABELS) as file:
        np.save(file, labels, allow_pickle=False)
    mean, std = _statistics(finished)
    manifest = Manifest(
        latent_shape=plan.latent_shape,
        views=1 + (plan.flip == "both"),
        key_bytes=plan.key_bytes,
        image_size=plan.image_size,
        vae_fingerprint=plan.vae.fingerprint,
        class_names=plan.class_names,
        scaling_factor=plan.vae.scaling_factor,
        shift_factor=plan.vae.shift_factor,
        class_counts=tuple(np.bincount(labels, minlength=len(plan.class_names)).tolist()),
        latent_mean=mean,
        latent_std=std,
        rejected=len(rejected),
        source=plan.source,
        labels_sha256=sha256(out / LABELS),
        shards=tuple(report.shard for report in finished),
    )
    with atomic_write(out / MANIFEST) as file:
        file.write(manifest_to_json(manifest).encode())


def _needs_repair(out: Path) -> bool:
    """Return whether a finished store lost files; if so, its manifest is removed and it counts as unfinished."""
    read_manifest(out)
    try:
        LatentStore(out)
    except DataError as error:
        print(f"repairing {out}, since {str(error).partition(':')[0]}", flush=True)
        (out / MANIFEST).unlink()
        return True
    return False


def _statistics(reports: Sequence[Report]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of posterior samples: Var z = E[μ² + σ²] − E[μ]²."""
    positions = sum(report.positions for report in reports)
    mean = np.sum([report.total for report in reports], axis=0) / positions
    square = np.sum([report.total_square for report in reports], axis=0) / positions
    return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(square - mean**2, 0)).tolist())
