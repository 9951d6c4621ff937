"""`python -m studies.soak`: train for a long time and check that nothing grows.

A training process runs, and its resident memory and open files are sampled every few seconds; step times come from its
log. Over the last half of the run, memory and open files may grow by 2 % at most; from the first half to the second,
the time of a step may grow by 5 % at most.
"""

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import linear_regression, median

from mpdit_jax.checkpoint.reader import list_steps
from mpdit_jax.config.flags import split_config_words
from mpdit_jax.errors import InputError, MPDiTError
from mpdit_jax.io.atomic import atomic_write, check_writable
from mpdit_jax.runtime.cli import make_parser, run

_EXAMPLES = """\
  python -m studies.soak --workdir=runs/soak --report=docs/soak.md
  python -m studies.soak --workdir=runs/short --steps=400 --every=20 --report=/tmp/soak.md
"""
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MAX_GROWTH, _MAX_SLOWDOWN = 0.02, 0.05
_LOG_EVERY = 50  # steps per logged step time
_WARM_UP = 0.1  # fraction of the step times that the first half leaves out


class SoakError(MPDiTError):
    """The training process failed or was too short."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sample of the training process."""

    seconds: float  # since the start
    resident: int  # bytes
    files: int  # open descriptors
    trains: bool  # whether the first checkpoint is saved, so that everything is compiled


@dataclasses.dataclass(frozen=True)
class Drift:
    """The change of one quantity between two parts of the run."""

    name: str
    unit: str
    before: float
    after: float
    allowed: float  # largest relative growth

    @property
    def share(self) -> float:
        """Relative change; growth is positive."""
        return self.after / self.before - 1

    @property
    def passed(self) -> bool:
        """Whether the growth is within the allowed limit."""
        return self.share < self.allowed


def main(arguments: Sequence[str]) -> int:
    """Train, sample the process and write the report; return exit status 0 if nothing grows."""
    parser = make_parser("soak", __doc__.partition("\n\n")[2].replace("\n", " "), _EXAMPLES, package="studies")
    parser.add_argument("--workdir", required=True, help="workdir of the training; must not exist")
    parser.add_argument("--report", required=True, metavar="FILE.md", help="Markdown; the samples go to FILE.json")
    parser.add_argument("--config", default="digits", help="config to train (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20_000, help="updates (default: %(default)s)")
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between samples (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="do not train; evaluate the samples of an earlier soak")
    parser.usage = f"{parser.prog} --workdir=FOLDER --report=FILE.md [--config.FIELD=VALUE ...]"
    options, words = parser.parse_known_args(arguments)
    fields = [f"--config.{path}={text}" for path, text in split_config_words(parser, words)[1].items()]
    workdir, report = Path(options.workdir), Path(options.report)
    if workdir.exists() and not options.again:
        raise InputError(f"--workdir={workdir} exists: a soak begins with a new run; give another folder.")
    if options.steps < 8 * _LOG_EVERY:
        raise InputError(f"--steps={options.steps}: expected {8 * _LOG_EVERY} or more, to compare halves of the run.")
    check_writable(report)
    command = _command(options, fields)
    if options.again:
        samples = _read(report.with_suffix(".json"))
    else:
        samples = watch(command, options.interval, lambda: bool(list_steps(workdir)))
        _write(report.with_suffix(".json"), json.dumps([dataclasses.astuple(sample) for sample in samples]) + "\n")
    drifts = measure_drifts(samples, step_times(workdir))
    text = describe(arguments, command, samples, drifts, list_steps(workdir))
    _write(report, text)
    print(text)
    return 0 if all(drift.passed for drift in drifts) else 1


def _command(options: argparse.Namespace, fields: Sequence[str]) -> list[str]:
    return [
        sys.executable, "-m", "mpdit_jax.train", f"--config={options.config}", f"--workdir={options.workdir}",
        f"--config.steps={options.steps}", f"--config.checkpoint.every={options.every}",
        f"--config.log.every={_LOG_EVERY}", f"--config.sample.every={options.steps}", *fields,
    ]  # fmt: skip


def watch(command: Sequence[str], interval: float, trains: Callable[[], bool]) -> list[Sample]:
    """Run a command to its end and sample the process every `interval` seconds.

    Args:
        command: the command.
        interval: seconds between samples.
        trains: returns whether startup and compilation are over.

    Raises:
        SoakError: the command fails, or ends before eight samples.
    """
    samples, start = list[Sample](), time.monotonic()
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            time.sleep(interval)
            folder = Path("/proc") / str(process.pid)
            try:
                resident = int((folder / "statm").read_text().split()[1]) * _PAGE
                files = len(list((folder / "fd").iterdir()))
            except (OSError, IndexError, ValueError):
                continue  # the process has ended
            if resident:  # 0 while the process ends
                samples.append(Sample(time.monotonic() - start, resident, files, trains()))
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode:
        raise SoakError(f"the training ended with status {process.returncode}: see its output above.")
    if len(samples) < 8:
        raise SoakError(
            f"the training was over after {len(samples)} samples: give more --steps or a shorter --interval."
        )
    return samples


def _read(path: Path) -> list[Sample]:
    try:
        return [Sample(*row) for row in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}): --again needs the samples of an earlier soak.") from error


def step_times(workdir: Path) -> list[float]:
    """Read the logged seconds per step, without checkpoints and pictures, from the TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    step, other = ([event.value for event in events.Scalars(name)] for name in ("seconds_step", "seconds_other"))
    return [whole - part for whole, part in zip(step, other, strict=True)]


def measure_drifts(samples: Sequence[Sample], times: Sequence[float]) -> list[Drift]:
    """Return the drifts of memory and open files over the last half of the run, and of step times between the halves.

    Memory, which fluctuates with every evaluation, is compared at the ends of a straight line fitted to the last half.
    Open files, whose number jumps during a save, are compared as medians of the last half's halves.

    Raises:
        SoakError: the run is too short.
    """
    samples = [sample for sample in samples if sample.trains]
    last, middle = samples[len(samples) // 2 :], len(times) // 2
    if len(last) < 4 or middle < 2:
        raise SoakError("the training was over too soon: give more --steps, fewer between checkpoints, or --interval.")

    seconds = [sample.seconds for sample in last]
    slope, start = linear_regression(seconds, [sample.resident / 2**20 for sample in last])
    memory = (start + slope * seconds[0], start + slope * seconds[-1])
    files = [sample.files for sample in last]
    warm, quarter = int(_WARM_UP * len(times)), len(files) // 2
    return [
        Drift("resident memory", "MiB", *memory, _MAX_GROWTH),
        Drift("open files", "", median(files[:quarter]), median(files[quarter:]), _MAX_GROWTH),
        Drift("time of a step", "ms", 1e3 * median(times[warm:middle]), 1e3 * median(times[middle:]), _MAX_SLOWDOWN),
    ]


def describe(
    arguments: Sequence[str],
    command: Sequence[str],
    samples: Sequence[Sample],
    drifts: Sequence[Drift],
    kept: list[int],
) -> str:
    """Format the report as Markdown."""
    rows = [
        f"| {drift.name} | {drift.before:,.4g} {drift.unit} | {drift.after:,.4g} {drift.unit} | {drift.share:+.2%} | "
        f"{drift.allowed:.0%} | {'yes' if drift.passed else '**no**'} |"
        for drift in drifts
    ]
    return "\n".join([
        "# Soak",
        "",
        "This page reports whether a long run leaks memory or files, or slows down.",
        "",
        f"`mpdit_jax.train {' '.join(command[3:])}`: {samples[-1].seconds / 60:.1f} minutes on {_machine()}, "
        f"{len(samples):,} samples. Checkpoints kept at the end: {', '.join(map(str, kept))}.",
        "",
        "| | before | after | drift | allowed | passed |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "Memory is compared at the ends of a straight line fitted to the last half of the run, open files as medians",
        "of that half's halves, the time of a step as medians of the run's halves without its first tenth. Written by",
        "",
        f"    python -m studies.soak {shlex.join(word for word in arguments if word != '--again')}",
        "",
    ])  # fmt: skip


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} CPU cores ({models[0] if models else 'unknown'})"


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


if __name__ == "__main__":
    run(main)
