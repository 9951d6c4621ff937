import json
import sys
import types

import pytest

from mpdit_jax.errors import MissingExtraError, WeightsError
from mpdit_jax.vae import load_vae
from mpdit_jax.vae.hub import locate

NAME = "stabilityai/sd-vae-ft-ema"


class EntryNotFoundError(Exception):
    pass


class LocalEntryNotFoundError(EntryNotFoundError):
    pass


class HfHubHTTPError(Exception):
    pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fake huggingface_hub that has the files in `hub.files` or, if `hub.error` is set, raises it."""
    state = types.SimpleNamespace(files=set(), error=None, asked=[])

    def hf_hub_download(repo_id, filename, subfolder=None):
        state.asked.append((repo_id, filename, subfolder))
        if state.error:
            raise state.error
        if filename not in state.files:
            raise EntryNotFoundError(f"404 {filename}")
        path = tmp_path / "snapshot" / (subfolder or "") / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(state.files[filename] if isinstance(state.files, dict) else "")
        return str(path)

    package, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
    package.hf_hub_download = hf_hub_download
    errors.EntryNotFoundError, errors.HfHubHTTPError = EntryNotFoundError, HfHubHTTPError
    errors.LocalEntryNotFoundError = LocalEntryNotFoundError
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return state


def test_fetches_config_and_weights(hub):
    hub.files = {"config.json", "diffusion_pytorch_model.safetensors"}
    folder = locate(NAME)
    assert sorted(path.name for path in folder.iterdir()) == sorted(hub.files)
    assert {repo for repo, _, _ in hub.asked} == {NAME}


@pytest.mark.parametrize("ending", [".bin", ".fp16.safetensors"])
def test_takes_other_weights_where_there_is_no_safetensors_and_a_folder_inside(hub, ending):
    hub.files = {"config.json", f"diffusion_pytorch_model{ending}"}
    folder = locate("owner/pipeline/vae")
    assert sorted(path.name for path in folder.iterdir()) == sorted(hub.files)
    assert {(repo, inside) for repo, _, inside in hub.asked} == {("owner/pipeline", "vae")}


@pytest.mark.parametrize("ending", [".safetensors.index.json", ".safetensors.index.fp16.json"])
def test_fetches_the_files_that_an_index_lists(hub, ending):
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.dumps({"weight_map": dict(zip(("a", "b"), shards, strict=True))})
    hub.files = {"config.json": "{}", f"diffusion_pytorch_model{ending}": index, **dict.fromkeys(shards, "")}
    assert sorted(path.name for path in locate(NAME).iterdir()) == sorted(hub.files)


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no connection"), HfHubHTTPError("401"), OSError("reset")])
def test_offline_says_which_files_to_put_where(hub, error):
    hub.error = error
    with pytest.raises(WeightsError) as caught:
        load_vae(NAME)
    for words in (
        str(error),
        "config.json and diffusion_pytorch_model.safetensors",
        f"https://huggingface.co/{NAME}/tree/main",
        "into a folder and pass its path",
    ):
        assert words in str(caught.value)


def test_without_huggingface_hub_names_the_extra_and_the_files(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"extra \[hub\].*config\.json and diffusion_pytorch_model"):
        load_vae(NAME)


def test_an_existing_folder_wins(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    assert locate(NAME).is_dir()
    assert not hub.asked


@pytest.mark.parametrize("source", ["no_such_folder", "/no/such/folder", "./a/b", "../a/b", "~/no_such/folder"])
def test_a_path_that_is_not_there_is_no_hub_name(hub, source):
    with pytest.raises(WeightsError, match="no such folder"):
        locate(source)
    assert not hub.asked


def test_a_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(WeightsError, match="is a file"):
        locate(file)
