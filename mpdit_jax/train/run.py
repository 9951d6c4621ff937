"""What surrounds a training loop: the locked workdir, signals, checkpoints, logs and timings of one run."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from mpdit_jax.checkpoint.manager import Checkpoints
from mpdit_jax.checkpoint.reader import newest_in_words
from mpdit_jax.checkpoint.workdir import LockedWorkdir
from mpdit_jax.distributed.collectives import StopVote, any_process, barrier, run_on_process_0
from mpdit_jax.errors import DataError
from mpdit_jax.runtime.memory import return_freed
from mpdit_jax.runtime.signals import PreemptionHandler
from mpdit_jax.train.jax_flags import record_flags
from mpdit_jax.train.logger import RunLogger
from mpdit_jax.train.prefetcher import Prefetcher
from mpdit_jax.train.profiling import Profiler
from mpdit_jax.train.stopwatch import Stopwatch
from mpdit_jax.train.writers import check_wandb

if TYPE_CHECKING:
    from mpdit_jax.train.evaluator import Evaluator
    from mpdit_jax.train.state import TrainState

S = TypeVar("S")


@dataclass(frozen=True)
class Policy(Generic[S]):
    """How the states of a training, pytrees with a `step`, are saved, logged and checked."""

    to_items: Callable[[S], dict[str, Any]]  # the named parts of a checkpoint
    from_items: Callable[[dict[str, Any]], S]  # the inverse
    metrics: Callable[[int, S], tuple[dict[str, float], list[int]]]  # values to log, first steps skipped since
    reset_metrics: Callable[[S], S]  # the state to continue with after they were logged
    check: Callable[[int, S, Callable[[], str]], int]
    """Called as check(step, state, newest); returns how many steps in a row, up to this one, were skipped. Ends the run
    by a DivergedError, whose message has `newest()`, the newest checkpoint in words."""


class Run(Generic[S]):
    """One training run; a context manager that holds the workdir, handles signals and opens the checkpoints.

    Every process calls the methods in the order of the training loop. A method does its work only where it is due after
    a step. Before it writes, it checks that the workdir still belongs to the run and that the policy accepts the state.
    `step` is always the number of finished steps.

    Args:
        config: resolved, with `steps`, `batch_size` and the groups `checkpoint`, `log` and `profile`.
        workdir: folder of the run.
        lock: holds the workdir while entered.
        policy: how states are saved, logged and checked.
    """

    def __init__(
        self, config: FrozenConfigDict, workdir: Path, lock: AbstractContextManager[LockedWorkdir], policy: Policy[S]
    ) -> None:
        check_wandb(config.log.wandb_project)
        self._config, self._workdir, self._lock, self._policy = config, workdir, lock, policy
        self._vote, self._copy = StopVote(), jax.jit(jnp.copy)

    def __enter__(self) -> "Run[S]":
        checkpoint = self._config.checkpoint
        stop = PreemptionHandler(checkpoint.grace, partial(newest_in_words, self._workdir))
        with ExitStack() as stack:
            self._stop = stack.enter_context(stop)  # first, as a signal must not cut off the last save
            self._locked = stack.enter_context(self._lock)
            checkpoints = Checkpoints(self._workdir, checkpoint.keep, checkpoint.keep_every)
            self._checkpoints = stack.enter_context(checkpoints)
            self._open = stack.pop_all()
        self._stop.nothing_to_save = jax.process_count() == 1
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def restore(self, target: S) -> tuple[int, S] | None:
        """Return the newest whole checkpoint as (step, state), laid out like `target`; None if there is none."""
        restored = self._checkpoints.restore_newest(self._policy.to_items(target))
        for note in (self._locked.note, *(restored.notes if restored is not None else ())):
            if note and jax.process_index() == 0:
                print(f"{note}.", flush=True)
        return None if restored is None else (restored.step, self._policy.from_items(restored.items))

    def start(self, step: int, watch: Stopwatch) -> None:
        """Open the logs of a run that continues at `step`, under the JAX flags that it was started with.

        Raises:
            CheckpointError: a flag has another value.
        """
        run_on_process_0(partial(record_flags, self._workdir, trained=step > 0))
        config, is_primary, folder = self._config, jax.process_index() == 0, self._workdir / "tensorboard"
        profiler = Profiler(folder, config.profile.start, config.profile.steps if is_primary else 0)
        self._logger = self._open.enter_context(RunLogger(self._workdir, config, step, is_primary=is_primary))
        self._watch = self._open.enter_context(watch)
        self._profiler = self._open.enter_context(profiler)

    def stopped(self) -> bool:
        """Return whether this process was asked to stop, without communication with the others."""
        return self._stop.name is not None

    def should_stop(self, step: int) -> bool:
        """Return whether any process was asked to stop. All get True before the same step. Collective."""
        return self._vote.asked(self.stopped(), step)

    def take(self, data: Prefetcher, step: int, state: S) -> dict[str, jax.Array]:
        """Return the next batch. If it cannot be read, save the state before the DataError ends the run."""
        with self._watch.of("data_wait"):
            try:
                return data.take()
            except DataError:
                if step and jax.process_count() == 1:  # saving is collective, and other processes have their batch
                    self._save_now(step, state)
                raise

    @contextmanager
    def dispatch(self, step: int) -> Iterator[None]:
        """Surround the call of the train step after `step`: it is profiled if asked, and implicit copies are errors."""
        with self._profiler.step(step), jax.transfer_guard("disallow"):
            yield
        self._stop.nothing_to_save = False

    def advance(self, step: int, state: Any, data: Prefetcher) -> None:
        """Place the next batch while the devices work on the step that was dispatched, and show progress."""
        self._watch.step(self._copy(state.step))  # the next step takes over the state's own buffers
        if step < self._config.steps:
            with self._watch.of("data_wait"):
                data.prefetch()
        if self._profiler.ends_at(step):
            jax.block_until_ready(state)
            with self._watch.of("other"):
                self._profiler.finish()
            steps, folder = self._config.profile.steps, self._workdir / "tensorboard"
            self._logger.say(f"profile of {steps} steps written to {folder}")
        self._logger.advance(step)

    def log(self, step: int, state: S) -> S:
        """Write a line of metrics every `config.log.every` steps; the state to continue with."""
        if not self._is_due(self._config.log.every, step):
            return state
        self._locked.check()
        values, skipped = self._policy.metrics(step, state)
        self._logger.metrics(step, values, skipped, self._watch.lap())
        self._policy.check(step, state, self._newest)
        return self._policy.reset_metrics(state)

    def save(self, step: int, state: S) -> None:
        """Save a checkpoint every `config.checkpoint.every` steps, and after the last.

        Before the last, nothing is saved while steps are skipped: the cause may lie in the parameters, and older
        checkpoints are good.
        """
        if self._is_due(self._config.checkpoint.every, step):
            skipped = self.check(step, state)
            if not skipped or step == self._config.steps:
                with self._watch.of("other"):
                    final = step == self._config.steps
                    self._checkpoints.save(step, self._policy.to_items(state), final=final)

    def show(self: "Run[TrainState]", step: int, state: "TrainState", draw: Callable[..., np.ndarray | None]) -> None:
        """Write a grid of samples every `config.sample.every` steps; see `grid.draw_grid`."""
        last = step == self._config.steps
        if not self._is_due(self._config.sample.every, step):
            return
        if not last and any_process(self.stopped()):  # there may be little time to save
            return
        self.check(step, state)
        with self._watch.of("other"):
            picture = draw(state.ema_parameters, lambda: not last and self.stopped())
            if picture is not None:
                self._logger.picture(step, picture)
            barrier("the grid is drawn")  # by process 0 alone

    def record(self: "Run[TrainState]", step: int, state: "TrainState", evaluator: "Evaluator") -> None:
        """Evaluate samples if an evaluation is due.

        Call it after `save`, since an evaluation that is cut off is repeated from that checkpoint.
        """
        if not evaluator.due(step):
            return
        self.check(step, state)
        with self._watch.of("other"):
            found = evaluator(step, state.ema_parameters, self._logger.say)
            self._logger.evaluation(step, found)
            if not found:
                self._logger.say(f"the evaluation of step {step} was interrupted: the same command repeats it")
            return_freed()

    def save_on_stop(self, step: int, state: S) -> None:
        """Save a run that ends before its last step."""
        if 0 < step < self._config.steps:
            self._stop.begin_grace()
            self._logger.say(f"{self._stop.name or 'another process was asked to stop'}: saving step {step}")
            self._save_now(step, state)

    def check(self, step: int, state: S) -> int:
        """Return the number of steps skipped in a row up to this one.

        Raises:
            CheckpointError: the workdir was deleted or replaced.
            DivergedError: see the policy.
        """
        self._locked.check()
        return self._policy.check(step, state, self._newest)

    def _save_now(self, step: int, state: S) -> None:
        """Save although no checkpoint is due; while steps are skipped, without deleting an older checkpoint."""
        skipped = self.check(step, state)
        self._checkpoints.save(step, self._policy.to_items(state), keep_older=bool(skipped))

    def _is_due(self, every: int, step: int) -> bool:
        return bool(every) and (step % every == 0 or step == self._config.steps)

    def _newest(self) -> str:
        self._checkpoints.wait()
        kept = self._checkpoints.latest_step()
        return "there is no checkpoint" if kept is None else f"the newest checkpoint is of step {kept}"
