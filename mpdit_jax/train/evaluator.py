"""Metrics of a run on its way: samples of the moving average, compared with real images (`config.eval`).

Every process draws and looks at its share of the samples on its own devices; moments are merged, and what a run
computes is the same after a restart. Evaluations have lines of their own in `metrics.jsonl`, so that one that was cut
off is made up for when the run continues.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.config.base import data_identity
from mpdit_jax.config.evaluation import choose_metrics, fewest_images
from mpdit_jax.data.sources import Source
from mpdit_jax.distributed.collectives import any_process, run_on_process_0
from mpdit_jax.distributed.mesh import batch_sharding, make_mesh, replicated
from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.evaluate.agreement import agree, name_of_first, portable
from mpdit_jax.evaluate.bias import perfect_distance
from mpdit_jax.evaluate.classifier import load_classifier, save_classifier
from mpdit_jax.evaluate.classifier_training import check_trainable, train_classifier
from mpdit_jax.evaluate.extractors import Extractor, build_classifier, make_extractor, metric_label
from mpdit_jax.evaluate.statistics import MOMENTS, Statistics, check_metrics, compare
from mpdit_jax.flow.randomness import seed_key
from mpdit_jax.flow.sampler import Sampler, make_sampler
from mpdit_jax.io.files import digest_of, parse_json
from mpdit_jax.model.parameters import Parameters, Structure, merge
from mpdit_jax.sample.decoding import Decode
from mpdit_jax.sample.labels import balanced_labels
from mpdit_jax.sample.run import finish
from mpdit_jax.train.eval_settings import note_settings
from mpdit_jax.train.partial_statistics import PartialStatistics, partial_statistics
from mpdit_jax.train.reference import Reference
from mpdit_jax.train.writers import METRICS_FILE
from mpdit_jax.version import __version__

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
            ProcessError: the processes find extractors or references that differ.
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
        if config.eval.every and config.eval.features == "classifier":
            try:
                check_trainable(len(source.labels), len(source.class_names))
            except InputError as error:
                raise ConfigError(f"config.eval.features='classifier': {error}") from error
        self._reference = Reference(config, self._folder, source, decode, self._metrics, stopped)
        if config.eval.every and config.eval.features != "classifier":
            self._extractor = self._make_extractor()
            self._check(self._extractor)
        if config.eval.every:  # before hours of training
            make_sampler(config.eval.solver, config.eval.steps)
            with jax.set_mesh(self._mesh):
                facts = self._reference.check(self._extractor)
            agree(facts)

    def due(self, step: int) -> bool:
        """Whether a run is evaluated after that step."""
        return _due(self._config, step)

    def pending(self, step: int) -> bool:
        """Whether the evaluation of that step is due and was cut off; the same on every process."""
        return is_missing(self._config, self._metrics_file.parent, step)

    def __call__(self, step: int, ema_parameters: Parameters, say: Callable[[str], None]) -> dict[str, float]:
        """The metrics of every guidance scale, by names such as "eval/FD(classifier)/guidance_1.5".

        Nothing where the run was asked to stop meanwhile; samples with NaN or Inf are left out and counted as
        "eval/not_finite/guidance_1.5", and what is left may be too little for some metrics, or for all.

        Args:
            step: of the parameters.
            ema_parameters: the moving average.
            say: what tells the user that the settings are others than those of the evaluations before.

        Raises:
            InputError, DataError: a reference that cannot be read.
        """
        prepared = self._prepared()
        if prepared is None:
            return {}
        extractor, real = prepared
        parameters: Any = ema_parameters
        several = jax.process_count() > 1
        if several:
            parameters = multihost_utils.process_allgather(ema_parameters, tiled=True)
        with jax.set_mesh(self._mesh):
            if several:  # they are NumPy arrays, which every batch would send to the devices again
                parameters = jax.device_put(parameters, replicated(self._mesh))
            model = merge(self._structure, parameters)
        found: dict[str, float] = {}
        for scale in self._config.eval.guidance_scales:
            sampler = make_sampler(self._config.eval.solver, self._config.eval.steps, float(scale))
            looked = self._look(extractor, sampler, model)
            if looked is None:
                return {}
            fake, count = looked
            # Of a model that has begun to diverge few samples may be finite, or none.
            values: dict[str, float] = {}
            if fake is not None:
                enough = [name for name in self._metrics if count >= fewest_images([name])]
                with jax.set_mesh(self._mesh):
                    values = compare(real, fake, enough)
            if left_out := self._config.eval.num_samples - count:
                values["not_finite"] = left_out
            found |= {f"{PREFIX}{name}/guidance_{scale:g}": value for name, value in values.items()}
        settings = self._what_decides(extractor, real)
        note = run_on_process_0(partial(note_settings, self._folder / "settings.json", step, settings))
        if note:
            say(note)
        return found

    def _what_decides(self, extractor: Extractor, real: Statistics) -> dict[str, str | int]:
        """What the numbers depend on beside the parameters and what their names say."""
        settings = self._config.eval
        return {
            "extractor": f"{extractor.name} {extractor.fingerprint[:12]}",
            "reference": digest_of([portable(real.about), real.file.get("sha256")]),
            "num_samples": settings.num_samples,
            "solver": settings.solver,
            "steps": settings.steps,
            "version": __version__,
        }

    def _look(self, extractor: Extractor, sampler: Sampler, model: Any) -> tuple[Statistics | None, int] | None:
        """The statistics of fresh samples if two or more are finite, and how many are; None if asked to stop."""
        settings, mesh = self._config.eval, self._mesh
        labels = balanced_labels(self._config.model.num_classes, settings.num_samples)
        width = -(-settings.batch_size // mesh.size) * mesh.size
        with jax.set_mesh(mesh):
            key = seed_key(self._config.seed)
        seen = PartialStatistics(extractor, self._metrics)
        for rows in partial_statistics(len(labels), width, "drawing samples to evaluate:", "images", self._stopped):
            if rows is None:
                return None
            if not len(rows):
                continue
            filled = np.resize(rows, width)
            with jax.set_mesh(mesh):
                placed, indices = jax.device_put((labels[filled], filled), batch_sharding(mesh))
                latents = sampler(model, placed, key, indices=indices)
                pictures = np.asarray(latents if self._decode is None else self._decode(latents))[: len(rows)]
                block = finish(pictures, labels[rows], rows)
                if block.finite.any():
                    seen.add(block.images[block.finite], rows[block.finite])
        statistics = seen.together({"path": "samples of the run"})
        return statistics, seen.count

    def _prepared(self) -> tuple[Extractor, Statistics] | None:
        """What both sides of the comparison are seen through, and the real side; None if asked to stop meanwhile."""
        if self._extractor is None:
            self._extractor = self._make_extractor()
            self._check(self._extractor)
        if self._real is None:
            self._real = self._reference.statistics(self._extractor, self._mesh)
            if self._real is not None:
                self._tell_bias(self._real)
        return None if self._real is None else (self._extractor, self._real)

    def _check(self, extractor: Extractor) -> None:
        check_metrics(self._metrics, extractor)
        for name, output in MOMENTS.items():
            count, features = self._config.eval.num_samples, extractor.outputs.get(output, 0)
            if name in self._metrics and count < features and jax.process_index() == 0:
                print(
                    f"config.eval.num_samples={count} are fewer than the {features} features of {extractor.name}: "
                    f"{metric_label(name, extractor.name)} comes out too high; compare it with that of equally many "
                    "only."
                )

    def _tell_bias(self, real: Statistics) -> None:
        """By how much, once there is something to compare with; and of a reference that is itself too small."""
        for name, output in MOMENTS.items():
            if name not in self._metrics or jax.process_index() > 0:
                continue
            count, features = self._config.eval.num_samples, len(real.gaussian(output).mean)
            label = metric_label(name, real.extractor)
            if 0 < real.count < features:
                print(
                    f"the {real.count} real images are fewer than the {features} features of {real.extractor}: {label} "
                    "comes out too high; give more of them by config.eval.reference."
                )
            if count < features:
                value = perfect_distance(real, count, output)
                print(f"a perfect model would have {label} {value:.3g} with {count} samples")

    def _make_extractor(self) -> Extractor:
        settings, size = self._config.eval, self._config.eval.batch_size
        if settings.features == "classifier":
            # Named after what it is trained by, so that other settings or other images train another.
            data = [data_identity(self._config.data), self._source.contents]
            decides = [*data, settings.classifier_steps, self._config.seed]
            path = self._folder / f"classifier_{name_of_first(digest_of(decides))}.safetensors"
            run_on_process_0(partial(self._train_classifier, path))
        with jax.set_mesh(self._mesh):
            if settings.features == "classifier":
                extractor = build_classifier(load_classifier(path), batch_size=size)
            else:
                extractor = make_extractor(
                    settings.features,
                    inception_path=settings.inception,
                    preprocessing=settings.preprocessing,
                    batch_size=size,
                    inception_setting="config.eval.inception",
                )
        agree({"extractor": extractor.fingerprint})
        return extractor

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


def is_missing(config: ConfigDict | FrozenConfigDict, workdir: Path, step: int) -> bool:
    """Whether the evaluation of that step is due and not in the run's log; all must ask, and hear the same."""
    return _due(config, step) and any_process(jax.process_index() == 0 and not _has_line(workdir / METRICS_FILE, step))


def _due(config: ConfigDict | FrozenConfigDict, step: int) -> bool:
    every = config.eval.every
    return bool(every) and step > 0 and (step % every == 0 or step == config.steps)


def _has_line(metrics: Path, step: int) -> bool:
    if not metrics.is_file():
        return False
    for text in metrics.read_bytes().splitlines():
        try:
            line: Mapping[str, Any] = parse_json(text)
        except ValueError:
            continue  # cut short by a crash, or damaged by the disk
        if line.get("step") == step and any(name.startswith(PREFIX) for name in line):
            return True
    return False
