"""The judgement of a soak on made-up samples; the hour-long soak itself is not part of the tests."""

import pytest

from mpdit_jax.errors import InputError
from studies.soak import Sample, SoakError, main, measure_drifts


def samples(growth):
    """Samples of a minute of start-up, and of 400 seconds in which memory grows by the share `growth`."""
    start = [Sample(second, second * 2**20, 5, trains=False) for second in range(60)]
    return start + [
        Sample(60 + second, int(2**30 * (1 + growth * second / 400)), 9, trains=True) for second in range(400)
    ]


def test_what_is_flat_passes():
    memory, files, step = measure_drifts(samples(0.0), [0.02] * 40)
    assert (memory.passed, files.passed, step.passed) == (True, True, True)
    assert (memory.share, files.share, step.share) == pytest.approx((0, 0, 0), abs=1e-9)


def test_what_grows_does_not():
    memory, _, step = measure_drifts(samples(0.2), [0.5, *[0.02] * 20, *[0.0215] * 19])
    assert memory.share == pytest.approx(0.1 / 1.1, abs=0.001)  # memory grows from 1.1 to 1.2 times its first value
    assert not memory.passed
    assert step.share == pytest.approx(0.075)
    assert not step.passed


def test_too_short_to_judge():
    with pytest.raises(SoakError, match="over too soon"):
        measure_drifts(samples(0.0)[:62], [0.02] * 40)


def test_a_soak_begins_with_a_new_run(tmp_path):
    with pytest.raises(InputError, match="a soak begins with a new run"):
        main([f"--workdir={tmp_path}", "--report=x.md"])
    with pytest.raises(InputError, match="steps=10: expected 400 or more"):
        main([f"--workdir={tmp_path / 'new'}", "--steps=10", f"--report={tmp_path / 'x.md'}"])
    with pytest.raises(InputError, match=r"x\.json cannot be read .*--again needs the samples"):
        main([f"--workdir={tmp_path}", "--again", f"--report={tmp_path / 'x.md'}"])
