"""Quality of drawn images: distances in a classifier's features, and the accuracy of an independent classifier."""

import dataclasses

import numpy as np
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import SVC

from mpdit_jax.data.sources import load_source
from mpdit_jax.evaluate.classifier_training import train_classifier
from mpdit_jax.evaluate.extractors import Extractor, build_classifier
from mpdit_jax.evaluate.metrics import frechet_distance, precision_recall
from mpdit_jax.io.pictures import to_uint8

_MOST_REAL = 10_000  # images of each split


@dataclasses.dataclass(frozen=True)
class Judge:
    """The networks and the real features of one data set."""

    extractor: Extractor  # trained on the training images, against which it compares
    real: np.ndarray  # features (N, d) of the training images
    classifier: Pipeline  # fitted to the test images, which no model and no extractor sees

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Compare images (n, H, W, C) in [-1, 1] of labels (n,) with the training images.

        Returns:
            `fd`, `precision` and `recall` in the extractor's features, and `accuracy`, the share of the images that the
            independent classifier assigns to their label.
        """
        pictures = to_uint8(images)
        drawn = self.extractor(pictures)["pool"]
        fd = frechet_distance(*_moments(self.real), *_moments(drawn))
        precision, recall = precision_recall(self.real, drawn)
        accuracy = self.classifier.score(_vectors(pictures), labels)
        values = {"fd": fd, "precision": precision, "recall": recall, "accuracy": accuracy}
        return {name: round(float(value), 4) for name, value in values.items()}


def make_judge(data: str, path: str, steps: int = 500) -> Judge:
    """Train the extractor for `steps`, and fit the independent classifier to the other split of the data."""
    train, test = (
        load_source(data, path, split, max_examples=_limit(data, path, split)) for split in ("train", "test")
    )
    classes = len(train.class_names)
    model, _ = train_classifier(lambda rows: train.batch(rows)["x"], train.labels, classes, steps=steps, quiet=True)
    extractor = build_classifier(model)
    real, unseen = train.batch(np.arange(len(train))), test.batch(np.arange(len(test)))
    classifier = make_pipeline(PCA(50, random_state=0), SVC(C=10)).fit(_vectors(to_uint8(unseen["x"])), unseen["y"])
    return Judge(extractor, extractor(to_uint8(real["x"]))["pool"], classifier)


def _limit(data: str, path: str, split: str) -> int:
    """Return `_MOST_REAL`, or 0 for a split that has fewer."""
    return _MOST_REAL if len(load_source(data, path, split)) > _MOST_REAL else 0


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.astype(np.float64).mean(axis=0), np.cov(features.astype(np.float64), rowvar=False)


def _vectors(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(len(pictures), -1) / 255
