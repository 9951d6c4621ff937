"""Evaluations while a run trains: the moving average's samples, compared with real images (`config.eval`).

Every evaluation writes a line to `metrics.jsonl`. An evaluation that was cut off has none, and is repeated when the run
continues. Its numbers are the same after a restart.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.config.base import data_identity
from mpdit_jax.config.evaluation import choose_metrics, fewest_images
from mpdit_jax.data.image_sets import ImageSet
from mpdit_jax.data.sources import Source
from mpdit_jax.distributed.collectives import any_process, assert_equal_across_processes, run_on_process_0
from mpdit_jax.distributed.mesh import make_mesh, replicated
from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.evaluate.bias import describe_bias, few_images
from mpdit_jax.evaluate.classifier import load_classifier, save_classifier
from mpdit_jax.evaluate.classifier_training import check_trainable, train_classifier
from mpdit_jax.evaluate.compute import StopRequested, compute_statistics, kept, needed
from mpdit_jax.evaluate.decoding import find_decode
from mpdit_jax.evaluate.drawn_images import DrawnImages
from mpdit_jax.evaluate.extractors import Extractor, build_classifier, make_extractor
from mpdit_jax.evaluate.reference import Reference, own_images
from mpdit_jax.evaluate.shared_values import name_from_process_0, portable
from mpdit_jax.evaluate.statistics import Statistics, check_metrics, compare
from mpdit_jax.evaluate.stored_statistics import load_statistics, save_statistics
from mpdit_jax.flow.sampler import make_sampler
from mpdit_jax.io.json_files import digest_of, parse_json
from mpdit_jax.model.parameters import Parameters, Structure, merge
from mpdit_jax.sample.drawing import Decode, Drawing
from mpdit_jax.sample.labels import balanced_labels
from mpdit_jax.train.eval_settings import note_settings
from mpdit_jax.train.writers import METRICS_FILE
from mpdit_jax.version import __version__

PREFIX = "eval/"


class Evaluator:
    """Evaluates the moving average of a run. Networks and statistics are loaded or computed when first needed."""

    def __init__(
        self,
        config: FrozenConfigDict,
        workdir: Path,
        source: Source,
        structure: Structure,
        decode: Decode | None,
        stopped: Callable[[], bool],
    ) -> None:
        """Check the settings, before hours of training. Collective.

        Args:
            config: of the run, resolved.
            workdir: of the run; the classifier and the statistics of the real images go to its `evaluation/`.
            source: the run's data.
            structure: the model's.
            decode: from latents to images, for a run on latents.
            stopped: whether this process was asked to stop, which ends an evaluation early.

        Raises:
            ConfigError: settings that cannot be, or do not fit the data.
            WeightsError, MissingExtraError, InputError: an extractor or a reference that is missing or does not fit.
            ProcessError: the processes find different extractors or references.
        """
        settings = config.eval
        self._config, self._source, self._structure, self._decode = config, source, structure, decode
        self._folder, self._metrics_file = workdir / "evaluation", workdir / METRICS_FILE
        self._metrics = choose_metrics(settings.metrics, settings.features)
        # Every process draws and extracts features on its own devices, under this mesh. Collectives run outside it.
        alone = jax.process_count() == 1
        self._mesh = jax.sharding.get_mesh() if alone else make_mesh(devices=jax.local_devices())
        self._compute = partial(compute_statistics, batch_size=settings.batch_size, stopped=stopped, mesh=self._mesh)
        find = find_decode(config.sample.vae, name="config.sample.vae")
        self._reference = Reference(
            settings.reference, self._metrics, find, self._own_images, "config.eval.", mesh=self._mesh
        )
        self._extractor: Extractor | None = None
        self._real: Statistics | None = None
        self._shape = source.shape
        if settings.every:
            self._check()

    def due(self, step: int) -> bool:
        """Return whether a run is evaluated after that step."""
        return _due(self._config, step)

    def pending(self, step: int) -> bool:
        """Return whether the evaluation of that step is due and was cut off. Collective."""
        return is_missing(self._config, self._metrics_file.parent, step)

    def __call__(self, step: int, ema_parameters: Parameters, say: Callable[[str], None]) -> dict[str, float]:
        """Metrics for every guidance scale, by names such as "eval/FD(classifier)/guidance_1.5". Collective.

        Samples with NaN or Inf are left out and counted as "eval/not_finite/guidance_1.5"; metrics that have too few
        samples left are missing. The result is empty if a process was asked to stop meanwhile.

        Args:
            step: the parameters' step.
            ema_parameters: the moving average.
            say: tells the user that the settings differ from those of earlier evaluations.

        Raises:
            InputError, DataError: a reference that cannot be read.
        """
        try:
            extractor, real = self._prepare()
            model = self._load_model(ema_parameters)
            found: dict[str, float] = {}
            for scale in self._config.eval.guidance_scales:
                values = self._evaluate(extractor, real, model, float(scale))
                found |= {f"{PREFIX}{name}/guidance_{scale:g}": value for name, value in values.items()}
        except StopRequested:
            return {}
        settings = self._deciding_settings(extractor, real)
        note = run_on_process_0(partial(note_settings, self._folder / "settings.json", step, settings))
        if note:
            say(note)
        return found

    def _evaluate(self, extractor: Extractor, real: Statistics, model: Any, scale: float) -> dict[str, float]:
        """Draw samples and return their metrics, as far as enough of the samples are finite."""
        settings = self._config.eval
        labels = balanced_labels(np.unique(self._source.labels), settings.num_samples)
        sampler = make_sampler(settings.solver, settings.steps, scale)
        drawing = Drawing(sampler, model, labels, self._config.seed, settings.batch_size, self._decode, mesh=self._mesh)
        samples = DrawnImages(drawing, self._shape, {"path": "samples of the run"}, leave_out=True)
        outputs, keep = needed(self._metrics), kept(self._metrics)
        fake = self._compute(extractor, samples, outputs, keep, "drawing samples to evaluate:")
        enough = [name for name in self._metrics if fake.count >= fewest_images([name])]
        with jax.set_mesh(self._mesh):
            values = compare(real, fake, enough)
        if left_out := settings.num_samples - fake.count:
            values["not_finite"] = left_out
        return values

    def _load_model(self, parameters: Any) -> Any:
        several = jax.process_count() > 1
        if several:
            parameters = multihost_utils.process_allgather(parameters, tiled=True)
        with jax.set_mesh(self._mesh):
            if several:  # they are NumPy arrays, which every batch would send to the devices again
                parameters = jax.device_put(parameters, replicated(self._mesh))
            return merge(self._structure, parameters)

    def _deciding_settings(self, extractor: Extractor, real: Statistics) -> dict[str, str | int]:
        """Return the settings that change the metrics and are not part of their names."""
        settings = self._config.eval
        return {
            "extractor": f"{extractor.name} {extractor.fingerprint[:12]}",
            "reference": digest_of([portable(real.about), real.file.get("sha256")]),
            "num_samples": settings.num_samples,
            "solver": settings.solver,
            "steps": settings.steps,
            "version": __version__,
        }

    def _check(self) -> None:
        settings, source = self._config.eval, self._source
        trained_here = settings.features == "classifier"
        if not self._config.model.null_class and set(settings.guidance_scales) != {1}:
            raise ConfigError(
                f"config.eval.guidance_scales={settings.guidance_scales}: expected 1.0 with config.label_dropout=0, "
                "which trains no null class to guide by."
            )
        if source.latents is not None:
            if self._decode is None:
                raise ConfigError(
                    "config.eval.every of a run on latents: set config.sample.vae, which decodes samples."
                )
            if trained_here:
                raise ConfigError(
                    "config.eval.features='classifier' needs images, not latents: give classifier:FILE, or another."
                )
            with jax.set_mesh(self._mesh):
                self._shape = self._own_images().shape
        if trained_here:
            try:
                check_trainable(len(source.labels), len(source.class_names))
            except InputError as error:
                raise ConfigError(f"config.eval.features='classifier': {error}") from error
        else:
            self._extractor = self._make_extractor()
        make_sampler(settings.solver, settings.steps)
        if self._shape[2] not in (1, 3):
            raise ConfigError(
                f"config.eval.every={settings.every}: this run draws images of {self._shape[2]} channels, and "
                f"{settings.features} expects 1 or 3; set config.eval.every=0."
            )
        if self._extractor is not None and self._extractor.image_shape not in (None, self._shape):
            raise ConfigError(
                f"config.eval.features={settings.features} was trained on images {self._extractor.image_shape} "
                f"(height, width, channels) and this run draws {self._shape}: train one on images of that size."
            )
        self._reference.check(self._extractor, self._shape)

    def _prepare(self) -> tuple[Extractor, Statistics]:
        """Return the extractor and the real images' statistics under it, made when first asked for."""
        if self._extractor is None:
            self._extractor = self._make_extractor()
        if self._real is None:
            compute = partial(self._real_statistics, self._extractor)
            self._real = self._reference.statistics(self._extractor, self._shape, compute)
            for note in describe_bias(self._real, self._config.eval.num_samples, self._metrics)[0]:
                _print_once(note)
        return self._extractor, self._real

    def _real_statistics(
        self, extractor: Extractor, images: ImageSet, outputs: Sequence[str], keep: Sequence[str], verb: str
    ) -> Statistics:
        """Statistics of real images, which are kept in a file for later starts of the run. Collective."""
        # Named after everything that decides them: another classifier or data set has another file.
        decides = [extractor.fingerprint, images.about, outputs, bool(keep)]
        path = self._folder / f"real_{name_from_process_0(digest_of(decides))}.npz"
        earlier = _read_statistics(path, extractor)
        # Decided together, before the first process can write the file that the others look for.
        if not any_process(earlier is None) and earlier is not None:
            return earlier
        found = self._compute(extractor, images, outputs, keep, verb)
        run_on_process_0(partial(self._save_statistics, path, found, features=bool(keep)))
        return found

    def _save_statistics(self, path: Path, found: Statistics, *, features: bool) -> None:
        save_statistics(path, found, features=features)
        for other in self._folder.glob(f"real_{'?' * 16}.npz"):
            if other != path:
                other.unlink()  # of an earlier reference or extractor

    def _own_images(self) -> ImageSet:
        """Return the run's own data, decoded by the VAE that decodes its samples."""

        def find(store: Path, fingerprint: str) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
            space, decode = self._source.latents, self._decode
            assert space is not None
            assert decode is not None
            mean, std = np.array(space.mean, np.float32), np.array(space.std, np.float32)
            return lambda means: np.asarray(decode(jax.numpy.asarray((means - mean) / std))), {}

        return own_images("the data of the run", self._source, self._config.data, find)

    def _make_extractor(self) -> Extractor:
        settings, size = self._config.eval, self._config.eval.batch_size
        if settings.features == "classifier":
            # The file is named by a digest of data and settings, so that a change of either trains a new classifier.
            data = [data_identity(self._config.data), self._source.contents]
            decides = [*data, settings.classifier_steps, self._config.seed]
            path = self._folder / f"classifier_{name_from_process_0(digest_of(decides))}.safetensors"
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
                    prefix="config.eval.",
                )
        assert_equal_across_processes({"extractor": extractor.fingerprint})
        check_metrics(self._metrics, extractor)
        count = settings.num_samples
        whose = f"config.eval.num_samples={count}"
        for note in few_images(self._metrics, extractor.name, extractor.outputs, count, whose):
            _print_once(note)
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
            print(f"trained the classifier of the evaluations: {accuracy:.1%} right on held-out images, in {path}")


def is_missing(config: ConfigDict | FrozenConfigDict, workdir: Path, step: int) -> bool:
    """Return whether the evaluation of that step is due and not in the run's log. Collective."""
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


def _read_statistics(path: Path, extractor: Extractor) -> Statistics | None:
    """Stored statistics of images; None where the file is missing or damaged, since it can be made again."""
    try:
        return dataclasses.replace(load_statistics(path, extractor), file={}) if path.is_file() else None
    except InputError:
        return None


def _print_once(note: str) -> None:
    if jax.process_index() == 0:
        print(note)
