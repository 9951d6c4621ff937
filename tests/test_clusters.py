"""How a process learns which cluster it is part of."""

import http.server
import threading

import pytest

from mpdit_jax.distributed.clusters import Cluster, find_cluster, find_pod, first_host, on_cloud_tpu
from mpdit_jax.errors import ConfigError


def test_alone_unless_something_says_otherwise():
    assert find_cluster({}) is None
    assert find_cluster({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}) is None  # an allocation without a step


def test_slurm():
    step = {"SLURM_NTASKS": "16", "SLURM_PROCID": "5", "SLURM_STEP_NODELIST": "gpu[03-04]"}
    assert find_cluster({"SLURM_JOB_ID": "123456", **step}) == Cluster("gpu03:56064", 16, 5)


@pytest.mark.parametrize(("nodes", "host"), [
    ("node1", "node1"),
    ("node1,node2", "node1"),
    ("gpu[03-07,11],login", "gpu03"),
    ("rack[2,9]-n", "rack2-n"),
])  # fmt: skip
def test_first_host(nodes, host):
    assert first_host(nodes) == host


def test_variables():
    assert find_cluster({"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "2"}) == Cluster("t0:8482", 4, 2)
    ours = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert find_cluster(ours) == Cluster("10.0.0.2:1234", 2, 1)
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES=two"):
        find_cluster(ours | {"JAX_NUM_PROCESSES": "two"})
    with pytest.raises(ConfigError, match="process_id=2: expected 0 to 1"):
        find_cluster(ours | {"JAX_PROCESS_ID": "2"})


def test_some_of_three_variables_are_refused():
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES set without JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID"):
        find_cluster({"JAX_NUM_PROCESSES": "2"})


def test_one_machine_of_a_pod_may_work_for_itself():
    pod = {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}
    assert find_cluster(pod | {"JAX_PLATFORMS": "tpu,cpu"}) == Cluster("t0:8482", 2, 1)
    assert find_cluster(pod | {"JAX_PLATFORMS": "cpu"}) is None
    assert find_cluster(pod | {"TPU_PROCESS_ADDRESSES": "a:8471,b:8471,c:8471"}) == Cluster("a:8482", 3, 1)


def test_a_cloud_tpu_has_chips_and_their_library(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert not on_cloud_tpu({}, tmp_path)
    (tmp_path / "accel0").touch()
    assert on_cloud_tpu({}, tmp_path)
    assert not on_cloud_tpu({"JAX_PLATFORMS": "cpu"}, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not on_cloud_tpu({}, tmp_path)
    assert on_cloud_tpu({"TPU_LIBRARY_PATH": "/opt/libtpu.so"}, tmp_path)


def test_several_slices_count_slice_by_slice():
    worker = {"TPU_WORKER_HOSTNAMES": "b0,b1", "TPU_WORKER_ID": "1"}
    slices = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a0:8080"}
    assert find_cluster(worker | slices) == Cluster("a0:8482", 6, 3)


@pytest.fixture
def metadata():
    """Google Cloud's metadata server, as far as a TPU's machine asks it: its environment, and what it answers."""
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            known = self.headers["Metadata-Flavor"] == "Google" and name in answers
            text = answers.get(name, "")
            self.send_response(int(text) if text.isdigit() and int(text) > 399 else 200 if known else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    yield {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}, answers
    server.shutdown()
    server.server_close()


def test_a_pod_by_its_metadata(metadata, monkeypatch):
    environment, answers = metadata
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # the server is never behind one
    assert find_pod(environment) is None  # a machine of Google's that is part of no pod
    answers |= {"agent-worker-number": "2", "worker-network-endpoints": "x:0:10.0.0.4,x:1:10.0.0.5,x:2:10.0.0.6"}
    assert find_pod(environment) == Cluster("10.0.0.4:8482", 3, 2)
    answers["worker-network-endpoints"] = "t0,t1,t2"
    assert find_pod(environment) == Cluster("t0:8482", 3, 2)
    answers["tpu-env"] = "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nnot a pair"
    assert find_pod(environment | {"MEGASCALE_COORDINATOR_ADDRESS": "s0"}) == Cluster("s0:8482", 6, 5)
    assert find_pod(environment | {"TPU_SKIP_MDS_QUERY": "1"}) is None


def test_a_pod_whose_metadata_describe_none(metadata, monkeypatch):
    environment, answers = metadata
    monkeypatch.setattr("mpdit_jax.distributed.clusters._TRY_AGAIN", 0.0)
    answers |= {"agent-worker-number": "7", "worker-network-endpoints": "t0,t1"}
    with pytest.raises(ConfigError, match=r"worker-network-endpoints='t0,t1', agent-worker-number='7': .*expected 0"):
        find_pod(environment)
    answers["agent-worker-number"] = "503"  # it stays busy
    with pytest.raises(ConfigError, match=r"does not say which others belong to it \(HTTP Error 503"):
        find_pod(environment)
    with pytest.raises(ConfigError, match=r"Connection refused.*set TPU_SKIP_MDS_QUERY=1 where there are no others"):
        find_pod({"GCE_METADATA_IP": "127.0.0.1:1"})
    assert find_pod({"GCE_METADATA_IP": "nobody.invalid"}) is None  # not Google's cloud
