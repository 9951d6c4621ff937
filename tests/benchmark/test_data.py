import json

import pytest

from mpdit_jax.benchmark import __main__ as benchmark
from mpdit_jax.errors import InputError


@pytest.mark.slow
def test_reports_both_rates_and_the_first_batch(capsys):
    small = ["data", "--examples=64", "--many=5000", "--batch_size=16", "--repeats=1"]
    assert benchmark.main([*small, "--format=json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["store_latents_per_s"] > 0
    assert report["files_latents_per_s"] > 0
    assert report["store_over_files"] == pytest.approx(report["store_latents_per_s"] / report["files_latents_per_s"])
    assert 0 < report["seconds_to_first_batch"] < 30
    assert report["many_examples"] == 5000


def test_refuses_a_batch_larger_than_the_data():
    with pytest.raises(InputError, match="--batch_size=65: expected at most --examples=64"):
        benchmark.main(["data", "--examples=64", "--batch_size=65"])
