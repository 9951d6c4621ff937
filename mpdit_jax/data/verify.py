"""The check of a whole store against its manifest."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mpdit_jax.data.latent_store import LABELS, MANIFEST, REJECTED, LatentStore, sha256
from mpdit_jax.errors import DataError


def verify(folder: str | Path) -> Iterator[int]:
    """Read a store and compare all of it with its manifest; yields the number of examples read after every shard.

    Raises:
        DataError: the first thing that differs, by name.
    """
    store = LatentStore(folder)
    if sha256(store.folder / LABELS) != store.manifest.labels_sha256:
        raise DataError(f"{store.folder / LABELS} is not what was written (SHA-256 differs); prepare again.")
    rejected = store.folder / REJECTED
    if not rejected.is_file() or len(rejected.read_text().splitlines()) != store.manifest.rejected:
        raise DataError(f"{rejected} does not name {store.manifest.rejected} images; copy it again.")
    channels, done = store.manifest.latent_shape[2], 0
    total, square = np.zeros(channels), np.zeros(channels)
    for shard in store.manifest.shards:
        path = store.folder / shard.name
        if sha256(path) != shard.sha256:
            raise DataError(
                f"{path} is not what was written (SHA-256 differs): copy it again, or delete it and repeat the prepare "
                "command."
            )
        for start in range(done, done + shard.examples, 256):
            rows = np.arange(start, min(start + 256, done + shard.examples))
            records = store.read(rows)
            finite = np.isfinite(records["mean"]) & np.isfinite(records["std"])
            bad = np.flatnonzero(~finite.reshape(len(rows), -1).all(axis=1) | (records["label"] != store.labels[rows]))
            if len(bad):
                key = records["key"][bad[0]].decode(errors="replace")
                raise DataError(
                    f"{path}: example {rows[bad[0]]} ({key}) is not finite, or its label is not the one in {LABELS}; "
                    "prepare again."
                )
            mean, std = records["mean"].astype(np.float64), records["std"].astype(np.float64)
            total += mean.sum(axis=(0, 1, 2, 3))
            square += (mean**2 + std**2).sum(axis=(0, 1, 2, 3))
        done += shard.examples
        yield done
    positions = done * store.manifest.views * int(np.prod(store.manifest.latent_shape[:2]))
    mean, variance = total / positions, square / positions - (total / positions) ** 2
    found = np.stack([mean, np.sqrt(np.maximum(variance, 0))])
    stated = np.array([store.manifest.latent_mean, store.manifest.latent_std])
    if not np.allclose(found, stated, rtol=1e-5, atol=1e-5 * np.abs(stated).max()):
        raise DataError(
            f"{store.folder / MANIFEST} states latent means and standard deviations {stated.tolist()} and they are "
            f"{found.tolist()}: copy it again, or delete it and repeat the prepare command."
        )
