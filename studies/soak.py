"""`python -m studies.soak`: train for a long time and see whether anything grows.

A real training process runs; from outside, its resident memory and open files are read every few seconds. Afterwards
its own log of step times is read. Memory and files must not drift by more than 2 % over the last half of the run, nor
the time of a step by more than 5 % between its halves.
"""

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mpdit_jax.checkpoint.reader import list_steps
from mpdit_jax.errors import InputError, MPDiTError
from mpdit_jax.io.files import atomic_write, check_writable
from mpdit_jax.runtime.cli import make_parser, run

_EXAMPLES = """\
  python -m studies.soak --workdir=runs/soak --report=docs/soak.md
  python -m studies.soak --workdir=runs/short --steps=400 --every=20 --report=/tmp/soak.md
"""
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MOST_GROWTH, _MOST_SLOWDOWN = 0.02, 0.05
_LOGGED = 50  # steps a window of step times
_WARM_UP = 0.1  # of the run, left out of the first half of the step times


class SoakError(MPDiTError):
    """The training under observation did not end well."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """The process at one moment."""

    seconds: float  # since the start
    resident: int  # bytes
    files: int  # open descriptors
    trains: bool  # it has saved its first checkpoint, so that everything is compiled


@dataclasses.dataclass(frozen=True)
class Drift:
    """How one quantity has moved: medians of two parts of the run."""

    name: str
    unit: str
    before: float
    after: float
    allowed: float  # share

    @property
    def share(self) -> float:
        """Relative change; growth is positive."""
        return self.after / self.before - 1

    @property
    def passed(self) -> bool:
        """Whether it stayed within what is allowed. Shrinking is no leak."""
        return self.share < self.allowed


def main(arguments: Sequence[str]) -> int:
    """Soak as the arguments say; exit status 0 if nothing drifts."""
    parser = make_parser("soak", __doc__.partition("\n\n")[2].replace("\n", " "), _EXAMPLES, package="studies")
    parser.add_argument("--workdir", required=True, help="of the training; must not exist yet")
    parser.add_argument("--report", required=True, metavar="FILE.md", help="Markdown; the samples go to FILE.json")
    parser.add_argument("--config", default="configs/digits.py", help="what is trained (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20_000, help="updates (default: %(default)s)")
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between samples (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="train nothing: judge what an earlier soak has left")
    parser.usage = f"{parser.prog} --workdir=FOLDER --report=FILE.md [--config.FIELD=VALUE ...]"
    options, fields = parser.parse_known_args(arguments)
    if unknown := [word for word in fields if not word.startswith("--config.")]:
        parser.error(f"unknown argument {unknown[0]!r}")
    workdir, report = Path(options.workdir), Path(options.report)
    if workdir.exists() and not options.again:
        raise InputError(f"--workdir={workdir} exists: a soak begins with a new run; give another folder.")
    if options.steps < 8 * _LOGGED:
        raise InputError(f"--steps={options.steps}: expected {8 * _LOGGED} or more, of which halves can be compared.")
    check_writable(report)
    command = _command(options, fields)
    if options.again:
        samples = _read(report.with_suffix(".json"))
    else:
        samples = watch(command, options.interval, lambda: bool(list_steps(workdir)))
        _write(report.with_suffix(".json"), json.dumps([dataclasses.astuple(sample) for sample in samples]) + "\n")
    drifts = judge(samples, step_times(workdir))
    text = describe(arguments, command, samples, drifts, list_steps(workdir))
    _write(report, text)
    print(text)
    return 0 if all(drift.passed for drift in drifts) else 1


def _command(options: argparse.Namespace, fields: Sequence[str]) -> list[str]:
    return [
        sys.executable, "-m", "mpdit_jax.train", f"--config={options.config}", f"--workdir={options.workdir}",
        f"--config.steps={options.steps}", f"--config.checkpoint.every={options.every}",
        f"--config.log.every={_LOGGED}", f"--config.sample.every={options.steps}", *fields,
    ]  # fmt: skip


def watch(command: Sequence[str], interval: float, trains: Callable[[], bool]) -> list[Sample]:
    """Run a command to its end, with samples from /proc every `interval` seconds.

    Args:
        command: what to run.
        interval: in seconds.
        trains: whether it is through with what it does once.

    Raises:
        SoakError: it fails, or trains for fewer than eight samples.
    """
    samples, begun = list[Sample](), time.monotonic()
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            time.sleep(interval)
            folder = Path("/proc") / str(process.pid)
            try:
                resident = int((folder / "statm").read_text().split()[1]) * _PAGE
                files = len(list((folder / "fd").iterdir()))
            except (OSError, IndexError, ValueError):
                continue  # it has just ended
            if not resident:
                continue  # it is about to
            samples.append(Sample(time.monotonic() - begun, resident, files, trains()))
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
        raise InputError(f"{path} cannot be read ({error}): --again needs the samples that a soak has left.") from error


def step_times(workdir: Path) -> list[float]:
    """Seconds a step of every window of the log, without checkpoints and pictures, from TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    step, other = ([event.value for event in events.Scalars(name)] for name in ("seconds_step", "seconds_other"))
    return [whole - part for whole, part in zip(step, other, strict=True)]


def judge(samples: Sequence[Sample], times: Sequence[float]) -> list[Drift]:
    """The drifts of memory and files over the last half of the run, and of step times from half to half.

    Memory goes up and down with every evaluation: a straight line is drawn through the half, and its ends compared. Of
    files, whose number jumps for the moment of a save, the medians of the half's halves.

    Raises:
        SoakError: the run was over before there was anything to compare.
    """
    samples = [sample for sample in samples if sample.trains]
    last, middle = samples[len(samples) // 2 :], len(times) // 2
    if len(last) < 4 or middle < 2:
        raise SoakError("the training was over too soon: give more --steps, fewer between checkpoints, or --interval.")

    at = [sample.seconds for sample in last]
    slope, start = statistics.linear_regression(at, [sample.resident / 2**20 for sample in last])
    return [
        Drift("resident memory", "MiB", start + slope * at[0], start + slope * at[-1], _MOST_GROWTH),
        Drift(
            "open files",
            "",
            statistics.median(sample.files for sample in last[: len(last) // 2]),
            statistics.median(sample.files for sample in last[len(last) // 2 :]),
            _MOST_GROWTH,
        ),
        Drift(
            "time of a step",
            "ms",
            1e3 * statistics.median(times[int(_WARM_UP * len(times)) : middle]),
            1e3 * statistics.median(times[middle:]),
            _MOST_SLOWDOWN,
        ),
    ]


def describe(
    arguments: Sequence[str],
    command: Sequence[str],
    samples: Sequence[Sample],
    drifts: Sequence[Drift],
    kept: list[int],
) -> str:
    """The report, in Markdown."""
    rows = [
        f"| {drift.name} | {drift.before:,.4g} {drift.unit} | {drift.after:,.4g} {drift.unit} | {drift.share:+.2%} | "
        f"{drift.allowed:.0%} | {'yes' if drift.passed else '**no**'} |"
        for drift in drifts
    ]
    return "\n".join([
        "# Soak",
        "",
        "This page shows that a long run neither leaks memory or files nor slows down.",
        "",
        f"`mpdit_jax.train {' '.join(command[3:])}`: {samples[-1].seconds / 60:.1f} minutes on {_machine()}, "
        f"{len(samples):,} samples. Checkpoints kept at the end: {', '.join(map(str, kept))}.",
        "",
        "| | before | after | drift | allowed | passed |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "Memory: the ends of a straight line through the last half of the run. Files: medians of that half's halves.",
        "Time of a step: the medians of the run's halves, the first tenth left out. Made by",
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
