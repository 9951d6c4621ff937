"""Start and end of the processes of one command, on top of `jax.distributed`.

JAX notices by missed heartbeats that a process is lost. It then ends the others with status 134 and names the lost one.
"""

import argparse
import contextlib
import hashlib
import os
import re
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import jaxlib
from jax.experimental.compilation_cache import compilation_cache

from mpdit_jax.distributed.collectives import SharedValues, assert_equal_across_processes, run_interruptibly
from mpdit_jax.errors import ConfigError, ProcessError, first_line
from mpdit_jax.version import __version__

_LONGEST = 10**6  # seconds
_OWN_END = 5.0  # seconds that a failed process waits for others with the same error
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a command that several processes can run together; JAX's variables are their defaults."""
    group = parser.add_argument_group("several processes", "found by themselves under SLURM, Open MPI and on TPU pods")
    address, count, index = (
        os.environ.get(name) or None for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    )
    group.add_argument("--coordinator_address", default=address, metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", default=count, type=int, metavar="N", help="how many there are")
    group.add_argument("--process_id", default=index, type=int, metavar="I", help="which one this is, from 0")
    group.add_argument(
        "--initialization_timeout", default=300, type=int, metavar="SECONDS", help="to wait for the others (300)"
    )
    group.add_argument(
        "--heartbeat_timeout", default=100, type=int, metavar="SECONDS", help="of silence: a process is lost (100)"
    )


def own_flags(options: argparse.Namespace, but: Collection[str] = ()) -> SharedValues:
    """Return the values of a command's flags that must match on every process: all except those of `add_flags`.

    `but` names flags of the command that may differ.
    """
    parser = argparse.ArgumentParser()
    add_flags(parser)
    differ = {*vars(parser.parse_args([])), *but}
    return {f"--{name}": str(value) for name, value in vars(options).items() if name not in differ}


def join(options: argparse.Namespace, shared_values: SharedValues) -> None:
    """Connect this process with the others of the command, if there are any; call it before JAX is used.

    Values that must match are then compared: `shared_values` and the versions of this package and of JAX.

    Args:
        options: parsed flags, see `add_flags`.
        shared_values: the command's own values that must match, by name.

    Raises:
        ConfigError: flags or variables that describe no cluster.
        ProcessError: the processes cannot find each other, or differ; the message names who, in what.
    """
    for name in ("initialization_timeout", "heartbeat_timeout"):
        if not 1 <= vars(options)[name] <= _LONGEST:
            raise ConfigError(f"{name}={vars(options)[name]}: expected seconds, at least 1 and at most {_LONGEST}.")
    # JAX's preemption service would catch SIGTERM and not end the process; our own handler does.
    jax.config.update("jax_enable_preemption_service", False)
    names = ("coordinator_address", "num_processes", "process_id")
    given = {name: vars(options)[name] for name in names if vars(options)[name] not in ("", None)}
    if len(given) == len(names):
        _check(**given)
        if options.num_processes > 1:
            with _apart_from_other_runs(options):
                _connect(options, **given, cluster_detection_method="deactivate")
    elif _is_launched(os.environ):
        _connect(options, **given, local_device_ids=_local_device_ids(os.environ))
    elif given:
        raise ConfigError("--coordinator_address, --num_processes and --process_id: give all three, or none.")
    elif "tpu" in str(jax.config.values.get("jax_platforms")):  # JAX itself adds it on a machine of Cloud TPU
        _connect(options)
    if jax.distributed.is_initialized():
        versions = {"version": __version__, "code": code_fingerprint()}
        versions |= {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
        assert_equal_across_processes({**shared_values, **versions})
        compilation_cache.reset_cache()  # else JAX ignores a cache folder that is set after this comparison


def _check(coordinator_address: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise ConfigError(f"coordinator_address={coordinator_address!r}: expected host:port, such as 10.0.0.2:12345.")
    if num_processes < 1:
        raise ConfigError(f"num_processes={num_processes}: expected 1 or more.")
    if not 0 <= process_id < num_processes:
        raise ConfigError(f"process_id={process_id}: expected 0 to {num_processes - 1}, a different one each.")


def _is_launched(environment: Mapping[str, str]) -> bool:
    """Return whether SLURM or Open MPI has started more than this process."""
    step = all(environment.get(name) for name in _SLURM_STEP) and environment["SLURM_NTASKS"] != "1"
    return step or environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1"


def _local_device_ids(environment: Mapping[str, str]) -> list[int] | None:
    """Return the local GPUs for JAX: [] (all) for the only process of a node, None (one each) for several."""
    a_task_a_node = environment.get("SLURM_NTASKS") == environment.get("SLURM_STEP_NUM_NODES", "")
    return [] if a_task_a_node or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" else None


def _connect(options: argparse.Namespace, **cluster: Any) -> None:
    """Call `jax.distributed.initialize`; raise ProcessError where it fails or takes too long."""
    limit = options.initialization_timeout
    try:
        connected = run_interruptibly(
            lambda: jax.distributed.initialize(
                **cluster,
                initialization_timeout=limit + 60,  # longer than our own: JAX's would abort the process
                heartbeat_timeout_seconds=options.heartbeat_timeout,
                shutdown_timeout_seconds=options.heartbeat_timeout + 10,  # see `end_failed`
            ),
            limit,
        )
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, ValueError) and not cluster:
            return  # JAX found no cluster: a TPU by itself
        raise ProcessError(
            f"JAX cannot connect the processes ({first_line(error)}): give --coordinator_address, --num_processes and "
            "--process_id, or set TPU_SKIP_MDS_QUERY=1 on a TPU by itself."
        ) from error
    if not connected:
        raise ProcessError(
            f"not all processes joined within {limit} s (--initialization_timeout): see the logs of the others, and "
            "whether their hosts reach process 0's; then start the same command on all machines again."
        )


@contextlib.contextmanager
def _apart_from_other_runs(options: argparse.Namespace) -> Iterator[None]:
    """Inside, the processes of this run connect, and those of another run with the same address cannot.

    JAX lets two runs listen on one port. Processes of the second run may then reach process 0 of the first, which ends
    the first run. So process 0 refuses a port that is in use, and holds a socket on the next port while its run
    connects; the other processes call JAX only when that socket answers them.
    """
    host, _, port = options.coordinator_address.rpartition(":")
    if options.process_id == 0:
        _listen(int(port), 1).close()
        with _listen(int(port) + 1, options.num_processes):
            yield
        return
    end = time.monotonic() + options.initialization_timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port) + 1), max(end - time.monotonic(), 0.1)).close()
            break
        except OSError as error:
            if time.monotonic() > end:
                raise ProcessError(
                    f"process 0 at {options.coordinator_address} did not answer process {options.process_id} within "
                    f"{options.initialization_timeout} s: see its log, whether this host reaches it (and the port "
                    "after it), and whether another run has that address."
                ) from error
            time.sleep(0.2)  # it may not be listening yet
    yield


def _listen(port: int, count: int) -> socket.socket:
    """Listen on every address of this host, as JAX does."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=count)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise ProcessError(
            f"process 0 cannot listen on port {port} ({why}), perhaps because another run does: choose another port "
            "for the coordinator's address; the one after it is needed as well."
        ) from error


def may_be_lost(error: BaseException) -> bool:
    """Return whether an error looks like one that collectives and barriers raise when a process is lost."""
    return re.search("Gloo|NCCL|Barrier|coordination service", str(error)) is not None


def end_failed(error: BaseException, status: int) -> NoReturn:
    """End this process, one of several, after an error.

    JAX's shutdown waits for all processes. Processes with the same error get there within seconds, so this one waits a
    few seconds. The others may be waiting for what failed here; they end when this process's heartbeats stop. If a lost
    process may be the cause, this one waits without a limit: JAX will end it and name the lost process.
    """
    with contextlib.suppress(BaseException):
        run_interruptibly(jax.distributed.shutdown, None if may_be_lost(error) else _OWN_END)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def code_fingerprint() -> str:
    """Return the first digits of a SHA-256 over this package's source files, to tell two installations apart.

    Configs are left out: a wheel has them inside the package, a checkout beside it.
    """
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted({*root.rglob("*.py")} - {*root.glob("configs/*")}):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
