"""The making of a store: every process encodes its shards, then process 0 writes the manifest."""

import json
from collections.abc import Sequence
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
from mpdit_jax.distributed.collectives import any_process, assert_equal_across_processes, run_on_process_0
from mpdit_jax.errors import DataError, InputError, MPDiTError, ProcessError
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.locked_folder import Job, LockedFolder, flat
from mpdit_jax.prepare.plan import Plan
from mpdit_jax.prepare.shards import Report, Stopped, read_report, report_path, write_shard
from mpdit_jax.runtime.progress import WorkBar
from mpdit_jax.runtime.signals import PreemptionHandler

_MOST_REJECTED = 0.01  # of all images
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
    names = plan.shard_names()
    mine = range(jax.process_index(), len(names), jax.process_count())
    todo = [number for number in mine if read_report(out / names[number]) is None]
    total = sum(len(plan.rows(number)) for number in mine)
    done = total - sum(len(plan.rows(number)) for number in todo)
    with WorkBar("encoding", "images", total, done) as bar, ThreadPoolExecutor(plan.threads) as pool:
        if done:
            bar.say(f"{done} of {total} images are there already, in {out}")

        def advance(count: int) -> None:
            bar.advance(count)
            if stop.name is not None:
                raise Stopped

        for number in todo:
            try:
                write_shard(out / names[number], plan.rows(number), plan, pool, advance)
            except Stopped:
                pool.shutdown(cancel_futures=True)
                bar.say(f"{stop.name}: the shards that are finished stay in {out}")
                return True
            except OSError as error:
                raise InputError(f"cannot write {out / names[number]}: {error.strerror or error}.") from error
    return False


def _finish(plan: Plan, out: Path) -> None:
    """Write labels and manifest from the shards' reports; the manifest marks the store as finished."""
    finished = []
    for path in (out / name for name in plan.shard_names()):
        report = read_report(path)
        if report is None:
            raise DataError(f"{path} is missing: does every process see the same {out}? Repeat the command.")
        finished.append(report)
    rejected = [{"key": key, "reason": reason} for report in finished for key, reason in report.rejected]
    with atomic_write(out / REJECTED) as file:
        file.write("".join(json.dumps(line) + "\n" for line in rejected).encode())
    count = len(plan.images)
    if len(rejected) > _MOST_REJECTED * count:
        for report in finished:
            if report.rejected:
                report_path(out / report.shard.name).unlink()  # the next start tries their images again
        raise DataError(
            f"{len(rejected)} of {count} images were rejected, more than {_MOST_REJECTED:.0%}: see {out / REJECTED} "
            f"for the reasons (the first: {rejected[0]['key']}: {rejected[0]['reason']}); repair or remove them and "
            "repeat the command, with another --out if images were removed."
        )
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
    """Whether a finished store lost files; if so, its manifest is removed and it counts as unfinished."""
    read_manifest(out)
    try:
        LatentStore(out)
    except DataError as error:
        print(f"repairing {out}, since {str(error).partition(':')[0]}", flush=True)
        (out / MANIFEST).unlink()
        return True
    return False


def _statistics(reports: Sequence[Report]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of samples from the posteriors: Var z = E[μ² + σ²] − E[μ]²."""
    positions = sum(report.positions for report in reports)
    mean = np.sum([report.total for report in reports], axis=0) / positions
    square = np.sum([report.total_square for report in reports], axis=0) / positions
    return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(square - mean**2, 0)).tolist())
