"""PyTorch files with code are refused; the error names the code and does not repeat PyTorch's advice to run it."""

import builtins
import io
import pickle

import pytest

import mpdit_jax as mp
from mpdit_jax.errors import WeightsError
from mpdit_jax.interop.pickles import imported_names

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


class Bomb:
    def __reduce__(self):
        return builtins.eval, ("open('executed', 'w')",)


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "executed").exists()


def message(content):
    path = io.BytesIO()
    if not isinstance(content, bytes):
        torch.save(content, path)
        content = path.getvalue()
    with open("weights.pt", "wb") as file:
        file.write(content)
    with pytest.raises(WeightsError) as error:
        mp.load_torch("weights.pt")
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


HAND_MADE = {
    "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
    "from the memo": b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x8c\x01x\x8c\x01yh\x00h\x01\x93.",
    "GLOBAL": b"cposix\nsystem\n.",
    "INST": b"(iposix\nsystem\n.",
}


@pytest.mark.parametrize("how", [*range(6), "old kind", *HAND_MADE])
def test_code_is_refused_by_name(how):
    if how in HAND_MADE:
        assert "weights.pt holds more than tensors (posix.system) and was not loaded" in message(HAND_MADE[how])
        return
    if how == "old kind":
        stream = io.BytesIO()
        torch.save({"x": torch.zeros(2), "y": Bomb()}, stream, _use_new_zipfile_serialization=False)
        content = stream.getvalue()
    else:
        content = pickle.dumps({"x": 1, "y": Bomb()}, protocol=how)
    assert "weights.pt holds more than tensors (eval) and was not loaded" in message(content)


def test_a_torchscript_archive_is_refused():
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), stream)
    assert "weights.pt is a TorchScript archive, which carries code" in message(stream.getvalue())


def test_a_truncated_file_is_not_taken_for_code():
    whole = pickle.dumps({"x": [1.0] * 9}, protocol=4)
    for content in (whole[:-5], b"", b"junk"):
        assert "is not a readable PyTorch file (it is cut short, or no pickle)" in message(content)
    stream = io.BytesIO()
    torch.save({"x": torch.zeros(9)}, stream)
    assert "is not a readable PyTorch file (PytorchStreamReader failed" in message(stream.getvalue()[:-200])
    assert "is a pickle, but not as torch.save writes it" in message(whole)


def test_sparse_and_meta_tensors_are_refused():
    assert "entry 'w' is a tensor of layout torch.sparse_coo" in message({"w": torch.eye(3).to_sparse()})
    assert "entry 'w' is a meta tensor" in message({"w": torch.zeros(3, device="meta")})
    assert "entry 'w' is Tensor, not an array" in message({"w": torch.eye(3, dtype=torch.int32).to_sparse()})


def test_names_are_read_in_order():
    stream = io.BytesIO(pickle.dumps([Bomb(), io.StringIO], protocol=2))
    assert list(imported_names(stream)) == ["eval", "_io.StringIO"]
