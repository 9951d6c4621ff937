"""What a run records about its data, and that it continues with the same data only."""

import json

import numpy as np
import pytest

from mpdit_jax.data.info import read_dataset_info, record_dataset, unseen_by
from mpdit_jax.data.sources import array_source
from mpdit_jax.errors import CheckpointError


def source(labels):
    return array_source(np.zeros((len(labels), 2, 2, 1), np.uint8), np.array(labels, np.int32), ("a", "b", "c"))


def test_other_examples_are_refused_once_something_is_trained(tmp_path):
    record_dataset(tmp_path, source([0, 1, 2]), trained=False)
    stored = (tmp_path / "data.json").read_bytes()
    record_dataset(tmp_path, source([0, 1, 2]), trained=True)
    for other in ([0, 1], [0, 2, 1]):
        with pytest.raises(CheckpointError, match=r"on other examples .*3 \w+\) than those .*use another --workdir"):
            record_dataset(tmp_path, source(other), trained=True)
    assert (tmp_path / "data.json").read_bytes() == stored
    record_dataset(tmp_path, source([0, 1]), trained=False)  # nothing is bound yet
    assert read_dataset_info(tmp_path).labels.startswith("2 ")


def test_classes_without_examples_are_recorded(tmp_path):
    record_dataset(tmp_path, source([0, 2]), trained=False)
    assert unseen_by(read_dataset_info(tmp_path), 5) == (1, 3, 4)
    of_0_1_0 = json.loads((tmp_path / "data.json").read_text())
    del of_0_1_0["unseen"]
    (tmp_path / "data.json").write_text(json.dumps(of_0_1_0))
    assert unseen_by(read_dataset_info(tmp_path), 5) == (3, 4)
