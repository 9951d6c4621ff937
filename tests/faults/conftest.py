import pytest

from mpdit_jax.train.__main__ import main
from tests.faults.fork_server import ForkServer
from tests.tiny import train_arguments


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The workdir of a tiny run with checkpoints of steps 4 and 8; copy it before touching it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert main(train_arguments(workdir)) == 0
    return workdir


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    with ForkServer(tmp_path_factory.mktemp("fork_server")) as fork_server:
        yield fork_server
