"""Which cluster a process is part of.

It is taken from the first that says anything of one: the command's flags (see `processes.join`), the environment
variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, SLURM, GKE's TPU variables, and on a machine
with TPU chips Google Cloud's metadata server. Otherwise a process is alone.
"""

import dataclasses
import importlib.util
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from mpdit_jax.errors import ConfigError, MPDiTError

_JAX_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_TPU_PORT = 8482  # JAX's own; libtpu uses others near it
_METADATA_TIMEOUT = 10.0  # seconds
_MOST_TRIES, _TRY_AGAIN = 6, 0.5  # seconds; it may be busy
_SLICES = ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """`count` processes, of which this is number `index`; number 0 listens at `coordinator`, "host:port"."""

    coordinator: str
    count: int
    index: int

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65535:
            raise ConfigError(f"coordinator_address={self.coordinator!r}: expected host:port, such as 10.0.0.2:12345.")
        if self.count < 1:
            raise ConfigError(f"num_processes={self.count}: expected 1 or more.")
        if not 0 <= self.index < self.count:
            raise ConfigError(f"process_id={self.index}: expected 0 to {self.count - 1}, a different one each.")


def find_cluster(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that environment variables describe, or None.

    Raises:
        ConfigError: variables that contradict each other or cannot be read, or some of JAX's three without the others.
    """
    from_tpu = partial(_from_tpu_variables, slices=environment)
    known: list[tuple[tuple[str, ...], Callable[..., Cluster]]] = [
        (_JAX_VARIABLES, _from_jax_variables),
        (("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"), _from_slurm),
    ]
    if _uses_tpus(environment):
        known += [((name, "TPU_WORKER_ID"), from_tpu) for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")]
    for names, make in known:
        if all(environment.get(name) for name in names):
            values = [environment[name] for name in names]
            try:
                return make(*values)
            except ValueError as error:
                if isinstance(error, MPDiTError):
                    raise
                listed = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
                raise ConfigError(f"{listed}: these describe no cluster ({error}).") from error
    given = [name for name in _JAX_VARIABLES if environment.get(name)]
    if given:
        missing = [name for name in _JAX_VARIABLES if name not in given]
        raise ConfigError(f"{', '.join(given)} set without {' and '.join(missing)}: set all three, or none.")
    return None


def on_cloud_tpu(environment: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether this machine has TPU chips and the library that drives them, and JAX is not told to leave them alone."""
    chips = [*devices.glob("accel*"), *devices.glob("vfio/[0-9]*")]
    library = environment.get("TPU_LIBRARY_PATH") or importlib.util.find_spec("libtpu") is not None
    return bool(chips and library) and _uses_tpus(environment)


def _uses_tpus(environment: Mapping[str, str]) -> bool:
    """Whether JAX would: one machine of a pod may well work for itself, on its CPU."""
    platforms = environment.get("JAX_PLATFORMS", "")
    return not platforms or "tpu" in platforms


def _from_jax_variables(coordinator: str, count: str, index: str) -> Cluster:
    return Cluster(coordinator, int(count), int(index))


def _from_slurm(job: str, count: str, index: str, nodes: str) -> Cluster:
    # A port that jobs on one node do not share: process 0's roll call takes the odd one after it.
    return Cluster(f"{first_host(nodes)}:{49152 + 2 * (int(job) % 8000)}", int(count), int(index))


def _from_tpu_variables(hosts: str, index: str, slices: Mapping[str, str]) -> Cluster:
    """Of the hosts of one slice, and of several slices where their variables say so: slice by slice, as JAX counts."""
    names = hosts.split(",")
    count, number = int(slices.get("MEGASCALE_NUM_SLICES") or 1), int(slices.get("MEGASCALE_SLICE_ID") or 0)
    first = (slices.get("MEGASCALE_COORDINATOR_ADDRESS") or names[0]).partition(":")[0]
    return Cluster(f"{first}:{_TPU_PORT}", count * len(names), number * len(names) + int(index))


def find_pod(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster of a Cloud TPU, as Google Cloud's metadata server describes it; None where there is no such server.

    The server is asked what JAX asks it. GCE_METADATA_IP is its address if it has another one, and TPU_SKIP_MDS_QUERY
    keeps anybody from asking, as they do for JAX.

    Raises:
        ConfigError: it does not answer, or its answers describe no cluster.
    """
    server = environment.get("GCE_METADATA_IP") or "metadata.google.internal"
    if environment.get("TPU_SKIP_MDS_QUERY"):
        return None
    try:
        workers, index, more = (
            _ask(server, name) for name in ("worker-network-endpoints", "agent-worker-number", "tpu-env")
        )
    except OSError as error:
        if _nobody_has_that_name(error):
            return None  # this is not Google's cloud
        raise ConfigError(
            f"this machine has TPU chips, and {server} does not say which others belong to it ({error}): repeat the "
            "command, give --coordinator_address, --num_processes and --process_id, or set TPU_SKIP_MDS_QUERY=1 where "
            "there are no others."
        ) from error
    if not workers or not index:
        return None
    try:
        # Names, or triples of name, number and address.
        hosts = ",".join(worker.split(":")[-1] for worker in workers.split(","))
        pairs = (line.partition(":") for line in more.splitlines())
        slices = {name.strip(): value.strip().strip("'") for name, _, value in pairs}
        return _from_tpu_variables(hosts, index, slices | {k: v for k, v in environment.items() if k in _SLICES})
    except ValueError as error:
        raise ConfigError(
            f"{server} says worker-network-endpoints={workers!r}, agent-worker-number={index!r}: these describe no "
            f"cluster ({error}); give --coordinator_address, --num_processes and --process_id."
        ) from error


def _ask(server: str, name: str) -> str:
    """A value from the metadata server, "" if it has none; OSError if it does not answer."""
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{name}", headers={"Metadata-Flavor": "Google"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    tries = 0
    while True:
        try:
            with direct.open(request, timeout=_METADATA_TIMEOUT) as reply:
                return str(reply.read().decode())
        except OSError as error:  # refused, timed out, or answered otherwise
            if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                return ""
            tries += 1
            if tries == _MOST_TRIES or _nobody_has_that_name(error):
                raise
            time.sleep(_TRY_AGAIN)


def _nobody_has_that_name(error: OSError) -> bool:
    return isinstance(error, urllib.error.URLError) and isinstance(error.reason, socket.gaierror)


def first_host(nodes: str) -> str:
    """First name of a SLURM list: "gpu[03-07,11],login" starts with gpu03."""
    match = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes!r}: expected names of hosts.")
    return "".join(part or "" for part in match.groups())
