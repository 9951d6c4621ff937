"""From images to a finished store: every process its shards, then one manifest."""

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpdit_jax.data.image_sets import ImageSet, key_bytes_of
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
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.errors import DataError, InputError, MPDiTError, ProcessError
from mpdit_jax.io.files import atomic_write
from mpdit_jax.prepare.claiming import claim, flat
from mpdit_jax.prepare.shards import Encode, Report, Stopped, Work, read_report, report_path, write_shard
from mpdit_jax.runtime.progress import WorkBar
from mpdit_jax.runtime.signals import PreemptionHandler
from mpdit_jax.vae import VAE

FLIPS = ("none", "both")
_MOST_REJECTED = 0.01  # of all images


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be made.

    Attributes:
        images: their set.
        source: what to call it in the manifest.
        class_names: one a class, in label order.
        vae: what encodes.
        image_size: pixels a side.
        flip: "none", or "both" to store the moments of the mirror images as well.
        shard_size: images a shard.
        batch_size: images at a time; a multiple of this process's devices.
        threads: that read images.
    """

    images: ImageSet
    source: str
    class_names: tuple[str, ...]
    vae: VAE
    image_size: int
    flip: str
    shard_size: int
    batch_size: int
    threads: int

    def __post_init__(self) -> None:
        factor = self.vae.downsample_factor
        if self.image_size < 1 or self.image_size % factor:
            raise InputError(
                f"--image_size={self.image_size}: expected a multiple of the VAE's downsample factor {factor}."
            )
        if self.vae.config.in_channels not in (1, 3):
            raise InputError(f"the VAE reads {self.vae.config.in_channels} channels: expected 1 (grey) or 3 (RGB).")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C)."""
        side = self.image_size // self.vae.downsample_factor
        return side, side, self.vae.latent_channels

    @property
    def key_bytes(self) -> int:
        """Length of the longest key."""
        return max(len(key_bytes_of(key)) for key in self.images.keys)

    def settings(self) -> dict[str, Any]:
        """What decides every byte of the shards."""
        return {
            "image_size": self.image_size,
            "flip": self.flip,
            "shard_size": self.shard_size,
            "dtype": self.vae.dtype,
            "vae_tile": self.vae.tiling.size if self.vae.tiling is not None else 0,
            "vae_fingerprint": self.vae.fingerprint,
            "number of images": len(self.images.keys),
            "images": self.images.identity,
            "class_names": list(self.class_names),
        }

    def shard_names(self) -> list[str]:
        """The files, in order."""
        count = -(-len(self.images.keys) // self.shard_size)
        return [f"shard-{number:05d}-of-{count:05d}.array_record" for number in range(count)]

    def rows(self, number: int) -> range:
        """The images of a shard."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, len(self.images.keys)))


def prepare(plan: Plan, out: Path) -> Manifest | None:
    """Make the store, or finish one that was interrupted or has lost files; shards that are there are left alone.

    Args:
        plan: what to make.
        out: its folder.

    Returns:
        The manifest, or None if asked to stop by SIGINT or SIGTERM.

    Raises:
        ProcessError: another process would encode with another VAE, or otherwise.
        InputError: the folder holds latents of other settings, is being written to, or cannot be written.
        DataError: more than 1 % of the images were rejected.
    """
    settings = plan.settings()
    # What is under a path may differ from one machine to the next, and two VAEs in one store nobody would notice.
    assert_equal_across_processes({name: str(value) for name, value in flat(settings).items()})
    with PreemptionHandler() as stop, claim(out, settings):
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
    """This process's shards; whether it was asked to stop before the last of them."""
    names = plan.shard_names()
    mine = range(jax.process_index(), len(names), jax.process_count())
    todo = [number for number in mine if read_report(out / names[number]) is None]
    total = sum(len(plan.rows(number)) for number in mine)
    done = total - sum(len(plan.rows(number)) for number in todo)
    work = Work(
        images=plan.images,
        encode=_encoder(plan),
        image_size=plan.image_size,
        channels=plan.vae.config.in_channels,
        latent_channels=plan.vae.latent_channels,
        batch_size=plan.batch_size,
        key_bytes=plan.key_bytes,
        classes=len(plan.class_names),
    )
    with WorkBar("encoding", "images", total, done) as bar, ThreadPoolExecutor(plan.threads) as pool:
        if done:
            bar.say(f"{done} of {total} images are there already, in {out}")

        def advance(count: int) -> None:
            bar.advance(count)
            if stop.name is not None:
                raise Stopped

        for number in todo:
            try:
                write_shard(out / names[number], plan.rows(number), work, pool, advance)
            except Stopped:
                pool.shutdown(cancel_futures=True)
                bar.say(f"{stop.name}: the shards that are finished stay in {out}")
                return True
            except OSError as error:
                raise InputError(f"cannot write {out / names[number]}: {error.strerror or error}.") from error
    return False


def _encoder(plan: Plan) -> Encode:
    def encode(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        views = [images, images[:, :, ::-1]] if plan.flip == "both" else [images]
        moments = [plan.vae.encode(view) for view in views]
        mean, std = (np.stack([np.asarray(part) for part in parts], axis=1) for parts in zip(*moments, strict=True))
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes Inf and is rejected
            return mean.astype(np.float16), std.astype(np.float16)

    return encode


def _finish(plan: Plan, out: Path) -> None:
    """Gather the reports into labels and manifest, after which the store counts as finished."""
    paths = [out / name for name in plan.shard_names()]
    reports = [read_report(path) for path in paths]
    if any(report is None for report in reports):
        missing = next(path for path, report in zip(paths, reports, strict=True) if report is None)
        raise DataError(f"{missing} is missing: does every process see the same {out}? Repeat the command.")
    finished = [report for report in reports if report is not None]
    rejected = [{"key": key, "reason": reason} for report in finished for key, reason in report.rejected]
    with atomic_write(out / REJECTED) as file:
        file.write("".join(json.dumps(line) + "\n" for line in rejected).encode())
    count = len(plan.images.keys)
    if len(rejected) > _MOST_REJECTED * count:
        for path, report in zip(paths, finished, strict=True):
            if report.rejected:
                report_path(path).unlink()  # repaired images get another chance
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
    """Whether something is missing of a finished store, which then counts as unfinished."""
    read_manifest(out)
    try:
        LatentStore(out)
    except DataError as error:
        print(f"repairing {out}, since {str(error).partition(':')[0]}", flush=True)
        (out / MANIFEST).unlink()
        return True
    return False


def _statistics(reports: Sequence[Report]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of samples from the posteriors: Var z = E[μ² + σ²] − E[μ]²."""
    positions = sum(report.positions for report in reports)
    mean = np.sum([report.total for report in reports], axis=0) / positions
    square = np.sum([report.total_square for report in reports], axis=0) / positions
    return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(square - mean**2, 0)).tolist())


def round_up(batch_size: int) -> int:
    """To a multiple of this process's devices."""
    devices = make_mesh(devices=jax.local_devices()).size
    return -(-batch_size // devices) * devices
