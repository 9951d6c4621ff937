"""What a run reports: where its time went, a profile, Weights & Biases."""

import errno
import itertools
import json
import subprocess
import time
from types import SimpleNamespace

import jax
import pytest
from jax.profiler import ProfileData
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.errors import DataWarning, MissingExtraError
from mpdit_jax.runtime.hardware import peak_flops, published_flops
from mpdit_jax.train import stopwatch
from mpdit_jax.train.__main__ import main
from mpdit_jax.train.logger import RunLogger
from mpdit_jax.train.prefetcher import Prefetcher
from mpdit_jax.train.stopwatch import Stopwatch
from mpdit_jax.train.writers import TensorBoard, check_wandb
from tests.tiny import run, start, train_arguments

PARTS = ("seconds_data_wait", "seconds_other", "seconds_device")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Run the tiny training with everything switched on and Weights & Biases offline, in two parts."""
    workdir = tmp_path_factory.mktemp("told") / "run"
    options = ["--config.profile.start=3", "--config.profile.steps=2", "--config.sample.every=4"]
    options += ["--config.sample.steps=2", "--config.log.wandb_project=tiny"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        for steps in (5, 8):
            status, stdout, stderr = run("train", train_arguments(workdir, *options, f"--config.steps={steps}"))
            assert status == 0, stderr
            assert ("profile of 2 steps written to" in stdout) == (steps == 5)
    return workdir


@pytest.mark.slow
def test_the_time_of_a_step_is_told_apart(told):
    events = EventAccumulator(str(told / "tensorboard")).Reload()
    curves = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert {"loss", "gradient_norm", "loss_t0.00_0.25", "images_per_second", "mfu", "seconds_step"} <= curves.keys()
    for index, point in enumerate(curves["seconds_step"]):
        parts = [curves[part][index].value for part in PARTS]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(point.value, rel=1e-4)
    assert all(0 < point.value < 1 for point in curves["mfu"])
    # What no second run repeats stays out of the file that must be the same.
    lines = [json.loads(line) for line in (told / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 5, 6, 8]
    assert not {*PARTS, "seconds_step", "images_per_second", "mfu"} & {key for line in lines for key in line}


def test_the_profile_holds_the_steps_asked_for(told):
    (recording,) = (told / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb")
    planes = ProfileData.from_file(str(recording)).planes
    steps = [
        dict(event.stats)["step_num"]
        for plane in planes
        for line in plane.lines
        for event in line.events
        if event.name == "train" and "step_num" in dict(event.stats)
    ]
    assert sorted(steps) == [3, 4]


def test_weights_and_biases_continues_its_run(told):
    name = (told / "wandb_id.txt").read_text().strip()
    runs = list((told / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all(folder.name.endswith(name) for folder in runs)
    assert any(folder.glob("files/media/images/samples*.png") for folder in runs)
    assert all(b"gradient_norm" in (folder / f"run-{name}.wandb").read_bytes() for folder in runs)


def test_weights_and_biases_not_installed_is_one_sentence(monkeypatch):
    check_wandb("")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_wandb("")
    with pytest.raises(MissingExtraError, match=r"wandb_project='mine' needs .* pip install -e '\.\[wandb\]'"):
        check_wandb("mine")


@pytest.mark.slow
def test_weights_and_biases_without_a_login_is_one_sentence(tmp_path):
    nobody = {"HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")}
    arguments = train_arguments(tmp_path / "run", "--config.log.wandb_project=mine")
    process = start("train", arguments, extra=nobody, stdin=subprocess.DEVNULL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: config.log.wandb_project='mine': Weights & Biases takes no run (" in stderr
    assert "Traceback" not in stderr


def test_a_lap_adds_up(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    watch = Stopwatch(batch_size=8, flops_per_image=10.0, peak_flops=100.0)

    def step():
        """Count a step that the device finishes at once."""
        watch.step(None)
        if watch._idle_since is not None:
            assert watch._idle_since.result() == now[0]

    assert watch.lap() == {}
    now[0] += 50.0  # the first step, which compiles
    step()
    for wait in (1.0, 3.0):
        with watch.of("data_wait"):
            now[0] += wait
        now[0] += 4.0
        step()
    with watch.of("other"):
        now[0] += 8.0
    values = watch.lap()
    assert values["seconds_step"] == 10.0
    assert [values[part] for part in PARTS] == [2.0, 4.0, 4.0]
    assert values["images_per_second"] == pytest.approx(8 / 6)
    assert values["mfu"] == pytest.approx(8 / 6 * 10 / 100)
    now[0] += 5.0
    step()
    assert watch.lap()["seconds_device"] == 5.0  # nothing is left of the window before


def test_the_fullest_device_is_told_of(monkeypatch):
    """CPUs do not report memory, so that the devices are stand-ins."""

    class Device:
        def __init__(self, most):
            self._most = most

        def memory_stats(self):
            return None if self._most is None else {"peak_bytes_in_use": self._most}

    watch = Stopwatch(batch_size=8)
    watch.step(None)
    for most, told in (((2**30, 3 * 2**30), 3.0), ((None, None), None)):
        monkeypatch.setattr(stopwatch.jax, "local_devices", lambda most=most: [Device(one) for one in most])
        watch.step(None)
        assert watch.lap().get("device_memory_gib") == told


class Slow:
    """The result of a step, ready after `seconds`."""

    def __init__(self, seconds):
        self._end = time.perf_counter() + seconds

    def block_until_ready(self):
        time.sleep(max(self._end - time.perf_counter(), 0))
        return self


def test_only_a_device_that_is_done_waits_for_data():
    """With steps of 0.4 s, batches that take 0.2 s cost nothing, and batches that take 0.6 s cost 0.2 s."""
    watch = Stopwatch(batch_size=8)
    watch.step(None)
    for loading, waited in ((0.2, 0.0), (0.6, 0.2)):
        for _ in range(2):
            result = Slow(0.4)
            watch.step(result)
            with watch.of("data_wait"):
                time.sleep(loading)
            result.block_until_ready()
        assert watch.lap()["seconds_data_wait"] == pytest.approx(waited, abs=0.1)


@pytest.mark.slow
def test_the_next_batch_is_waited_for_beside_the_step(tmp_path, monkeypatch):
    """Otherwise the time of a working device would count as waiting."""
    calls = []
    for kind, name in ((Stopwatch, "step"), (Prefetcher, "prefetch"), (RunLogger, "advance")):
        method = vars(kind)[name]
        monkeypatch.setattr(
            kind, name, lambda *arguments, method=method, name=name: calls.append(name) or method(*arguments)
        )
    assert main(train_arguments(tmp_path / "run", "--config.steps=3")) == 0
    # `take` asks for the batch as well; after the last step there is none to ask for.
    beside = ["prefetch", "step", "prefetch", "advance"]
    assert calls == beside * 2 + ["prefetch", "step", "advance"]


def test_published_peaks_by_the_names_jax_gives():
    assert published_flops("TPU v5 lite") == 197e12
    assert published_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert published_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert published_flops("NVIDIA H100 PCIe") == 756e12
    assert published_flops("cpu") is None
    measured = peak_flops(make_mesh(devices=jax.devices()[:1]), "float32")
    assert measured is not None
    assert 1e9 < measured < 1e14


def test_a_cpus_peak_counts_once_a_machine(monkeypatch):
    """The peak of a machine is divided among its devices and processes; the clock of the test ticks once a second."""
    clock = itertools.count()
    monkeypatch.setattr("mpdit_jax.runtime.hardware.matrix_product", lambda *_: (lambda: None, 10.0))
    monkeypatch.setattr("mpdit_jax.runtime.hardware.time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    mesh = SimpleNamespace(local_devices=jax.devices()[:1] * 2, size=8)
    assert [peak_flops(mesh, "float32", machines) for machines in (1, 2)] == [10.0, 20.0]


@pytest.mark.slow
def test_a_continued_run_finds_its_programs_compiled_and_survives_their_damage(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    workdir, cache = tmp_path / "run", tmp_path / "run" / "compilation_cache"
    for steps, damage in ((4, False), (6, False), (8, True)):
        if damage:
            for path in cache.glob("*-cache"):
                path.write_bytes(b"not a program")
        status, _, stderr = run("train", train_arguments(workdir, f"--config.steps={steps}"))
        assert status == 0, stderr
        assert len(list(cache.glob("jit_step-*-cache"))) == 1  # the second run found the first one's
    lines = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1] == 8


def test_last_lines_of_tensorboard_that_the_disk_refuses(tmp_path, monkeypatch):
    def refuse():
        raise OSError(errno.ENOSPC, "No space left on device")

    board = TensorBoard(tmp_path, 0)
    monkeypatch.setattr(board._writer, "close", refuse)
    with pytest.warns(DataWarning, match="TensorBoard's files lack their last lines .*No space left on device"):
        board.close()
