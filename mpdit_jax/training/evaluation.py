"""Metrics of a run on its way: samples of the moving average, compared with real images (`config.eval`).

Every process draws and looks at its share of the samples on its own devices; moments are merged, and what a run
computes is the same after a restart. Evaluations have lines of their own in `metrics.jsonl`, so that one that was cut
off is made up for when the run continues.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import FrozenConfigDict

from mpdit_jax.config import what_is_read
from mpdit_jax.data.sources import Source, limited
from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.evaluation.classifier import load_classifier, save_classifier
from mpdit_jax.evaluation.classifier_training import train_classifier
from mpdit_jax.evaluation.decoding import find_decode
from mpdit_jax.evaluation.extractors import Extractor, build_classifier, make_extractor
from mpdit_jax.evaluation.moments import Moments, gather_rows, merge_processes
from mpdit_jax.evaluation.sets import FindDecode, SourceImages, check_store, open_set
from mpdit_jax.evaluation.settings import choose_metrics
from mpdit_jax.evaluation.statistics import (
    Statistics,
    check_metrics,
    collect,
    compare,
    from_moments,
    holds_statistics,
    load_statistics,
    save_statistics,
)
from mpdit_jax.flow.sampler import Sampler, make_sampler
from mpdit_jax.mesh import batch_sharding, make_mesh
from mpdit_jax.model.parameters import Parameters, Structure, merge
from mpdit_jax.processes import any_process, first_does
from mpdit_jax.sampling.decoding import Decode
from mpdit_jax.sampling.run import finish
from mpdit_jax.training.writers import METRICS_FILE

_MOST_REAL = 50_000  # images of the data set that are looked at, evenly spread over it
_OF_SINGLE_IMAGES = {"precision", "recall", "kid"}
PREFIX = "eval/"


class Evaluator:
    """Evaluates the moving average of a run. Nothing is loaded or computed before it is first needed."""

    def __init__(
        self,
        config: FrozenConfigDict,
        workdir: Path,
        source: Source,
        structure: Structure,
        decode: Decode | None,
        stopped: Callable[[], bool],
    ) -> None:
        """Check what can be checked at once.

        Args:
            config: of the run, resolved.
            workdir: of the run; the classifier and the statistics of the real images go to its `evaluation/`.
            source: the run's data.
            structure: the model's.
            decode: from latents to images, for a run on latents.
            stopped: whether this process was asked to stop, which ends an evaluation early.

        Raises:
            ConfigError: settings that cannot be, or do not fit the data.
            WeightsError, MissingExtraError, InputError: an extractor or a reference that is not there.
        """
        self._config, self._source, self._structure = config, source, structure
        self._folder, self._metrics_file = workdir / "evaluation", workdir / METRICS_FILE
        self._decode, self._stopped = decode, stopped
        self._metrics = choose_metrics(config.eval.metrics, config.eval.features)
        # What a process does by itself must not touch the others' devices, and what all do together must not lie on
        # its own: the mesh of its devices is entered for the first and left for the second.
        alone = jax.process_count() == 1
        self._mesh = jax.sharding.get_mesh() if alone else make_mesh(devices=jax.local_devices())
        self._extractor: Extractor | None = None
        self._real: Statistics | None = None
        if config.eval.every and source.latents is not None:
            if decode is None:
                raise ConfigError(
                    "config.eval.every of a run on latents: set config.sample.vae, which decodes samples."
                )
            if config.eval.features == "classifier":
                raise ConfigError("config.eval.features='classifier' is of images: give classifier:FILE, or another.")
        if config.eval.every:  # before hours of training
            check_store(config.eval.reference, self._find_decode())
        if config.eval.every and config.eval.features != "classifier":
            self._extractor = self._make_extractor()
            check_metrics(self._metrics, self._extractor)

    def due(self, step: int) -> bool:
        """Whether a run is evaluated after that step."""
        every, last = self._config.eval.every, step == self._config.steps
        return bool(every) and step > 0 and (step % every == 0 or last)

    def pending(self, step: int) -> bool:
        """Whether the evaluation of that step is due and was cut off; the same on every process."""
        return self.due(step) and any_process(jax.process_index() == 0 and not self._has_line(step))

    def __call__(self, ema_parameters: Parameters) -> dict[str, float]:
        """The metrics of every guidance scale, by names such as "eval/FD(classifier)/guidance_1.5".

        Nothing where the run was asked to stop meanwhile, or where the samples are too broken to compare.

        Raises:
            InputError, DataError: a reference that cannot be read.
        """
        extractor, real = self._prepared()
        parameters: Any = ema_parameters
        if jax.process_count() > 1:
            parameters = multihost_utils.process_allgather(ema_parameters, tiled=True)
        with jax.set_mesh(self._mesh):
            model = merge(self._structure, parameters)
        found: dict[str, float] = {}
        for scale in self._config.eval.guidance_scales:
            sampler = make_sampler(self._config.eval.solver, self._config.eval.steps, float(scale))
            fake = self._look(extractor, sampler, model)
            if fake is None:
                return {}
            with jax.set_mesh(self._mesh):
                values = compare(real, fake, self._metrics)
            found |= {f"{PREFIX}{name}/guidance_{scale:g}": value for name, value in values.items()}
        return found

    def _look(self, extractor: Extractor, sampler: Sampler, model: Any) -> Statistics | None:
        """The statistics of fresh samples; None if asked to stop, or if fewer than two of them are finite."""
        settings, mesh = self._config.eval, self._mesh
        labels = np.resize(np.arange(self._config.model.num_classes), settings.num_samples).astype(np.int32)
        width = -(-settings.batch_size // mesh.size) * mesh.size
        shares, index = jax.process_count(), jax.process_index()
        with jax.set_mesh(mesh):
            key = jax.random.key(self._config.seed)
        moments: dict[str, Moments] = {}
        kept: dict[str, list[np.ndarray]] = {name: [] for name in ("pool", "probs")}
        numbers: list[np.ndarray] = []
        for start in range(0, len(labels), width * shares):
            if any_process(self._stopped()):
                return None
            rows = np.arange(start + index * width, min(start + (index + 1) * width, len(labels)))
            if not len(rows):
                continue
            filled = np.resize(rows, width)
            with jax.set_mesh(mesh):
                placed, indices = jax.device_put((labels[filled], filled), batch_sharding(mesh))
                latents = sampler(model, placed, key, indices=indices)
                pictures = np.asarray(latents if self._decode is None else self._decode(latents))[: len(rows)]
                block = finish(pictures, labels[rows], rows)
                if not block.finite.any():
                    continue
                features = extractor(block.images[block.finite])
            for name in ("pool", "spatial"):
                if name in features:
                    seen = moments.get(name, Moments.empty(extractor.outputs[name]))
                    moments[name] = seen.update(features[name])
            for name, arrays in kept.items():
                if name in features:
                    arrays.append(features[name])
            numbers.append(rows[block.finite])
        for name in {"pool", "spatial"} & extractor.outputs.keys():
            moments[name] = merge_processes(moments.get(name, Moments.empty(extractor.outputs[name])))
        if moments["pool"].count < 2:
            return None
        order = np.concatenate([np.zeros(0, int), *numbers])
        whole = {
            name: gather_rows(np.concatenate([np.zeros((0, extractor.outputs[name]), np.float32), *arrays]), order)
            for name, arrays in kept.items()
            if name in extractor.outputs
        }
        about = {"path": "samples of the run", "count": moments["pool"].count}
        return from_moments(extractor, moments, whole["pool"], whole.get("probs"), about)

    def _prepared(self) -> tuple[Extractor, Statistics]:
        if self._extractor is None:
            self._extractor = self._make_extractor()
            check_metrics(self._metrics, self._extractor)
        if self._real is None:
            self._real = self._real_statistics(self._extractor)
        return self._extractor, self._real

    def _make_extractor(self) -> Extractor:
        settings = self._config.eval
        path, size = self._folder / "classifier.safetensors", settings.batch_size
        if settings.features == "classifier":
            first_does(partial(self._train_classifier, path))
        with jax.set_mesh(self._mesh):
            if settings.features == "classifier":
                return build_classifier(load_classifier(path), batch_size=size)
            return make_extractor(settings.features, inception_path=settings.inception, batch_size=size)

    def _train_classifier(self, path: Path) -> None:
        if path.is_file():
            return
        with jax.set_mesh(self._mesh):
            model, accuracy = train_classifier(
                lambda rows: self._source.batch(rows)["x"],
                self._source.labels,
                len(self._source.class_names),
                steps=self._config.eval.classifier_steps,
                seed=self._config.seed,
                quiet=True,
            )
            save_classifier(path, model)
            print(f"a classifier to look through, right about {accuracy:.1%} of the images held out, in {path}")

    def _real_statistics(self, extractor: Extractor) -> Statistics:
        place = self._config.eval.reference
        single = bool(_OF_SINGLE_IMAGES & set(self._metrics))
        if place and holds_statistics(Path(place)):
            stored = load_statistics(place, extractor)
            if single and stored.features is None:
                raise InputError(
                    f"config.eval.reference={place} has moments only, and config.eval.metrics compare single images: "
                    "give statistics written with --save_features, or images."
                )
            return stored
        path, data = self._folder / "real.npz", what_is_read(self._config.data)
        about = {"path": place or "the data of the run", "most": _MOST_REAL, "data": {} if place else data}
        earlier = load_statistics(path, extractor) if path.is_file() else None
        if earlier is not None:
            fits = earlier.about == json.loads(json.dumps(about)) and not (single and earlier.features is None)
            earlier = earlier if fits else None
        # Decided together, before the first process can write what the others look for.
        if not any_process(earlier is None) and earlier is not None:
            return earlier
        if place:
            images = open_set(place, channels=extractor.channels, find=self._find_decode())
        else:
            images = SourceImages(limited(_Decoded(self._source, self._decode), _MOST_REAL), about)
        size = extractor.batch_size
        parts = (
            extractor(images.read(np.arange(start, min(start + size, len(images)))))
            for start in range(0, len(images), size)
        )
        with jax.set_mesh(self._mesh):
            found = collect(extractor, parts, about)
        first_does(lambda: save_statistics(path, found, features=single))
        return found

    def _find_decode(self) -> FindDecode:
        """For a reference that is a store, by the VAE of the run: loaded anew, and let go of with what it decodes."""
        return find_decode(self._config.sample.vae, name="config.sample.vae")

    def _has_line(self, step: int) -> bool:
        if not self._metrics_file.is_file():
            return False
        for text in self._metrics_file.read_text().splitlines():
            try:
                line: Mapping[str, Any] = json.loads(text)
            except json.JSONDecodeError:
                return False  # a line cut short by a crash is the last one
            if line.get("step") == step and any(name.startswith(PREFIX) for name in line):
                return True
        return False


class _Decoded:
    """A source whose examples are images: its own, or what the VAE makes of its latents' means."""

    def __init__(self, source: Source, decode: Decode | None) -> None:
        self._source, self._decode = source, decode
        self.class_names, self.labels, self.latents = source.class_names, source.labels, None
        self.shape = source.shape if source.latents is None else self.batch(np.arange(1))["x"].shape[1:]

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """`x` float32 (n, H, W, C) in [-1, 1] of the examples at `indices`."""
        batch, space = self._source.batch(indices), self._source.latents
        if space is None or self._decode is None:
            return {"x": batch["x"]}
        mean, std = np.array(space.mean, np.float32), np.array(space.std, np.float32)
        latents = (batch["mean"][:, 0].astype(np.float32) - mean) / std  # (n, h, w, C)
        return {"x": np.clip(np.asarray(self._decode(jax.numpy.asarray(latents))), -1, 1)}
