"""Conversion of AutoencoderKL weights from and to diffusers' folders, names and layouts.

A folder has `config.json` and one of WEIGHTS_FILES; `.bin` needs the extra [torch]. Our parameters are a flat dict from
dotted path to float32 array, `{"encoder.conv_in.kernel": array, ...}`.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from mpdit_jax.errors import WeightsError
from mpdit_jax.interop.files import describe_misfit, read_state_dict
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.model.parameters import Parameters, split
from mpdit_jax.vae.autoencoder import Autoencoder
from mpdit_jax.vae.config import AutoencoderConfig, config_to_diffusers, read_config

StateDict: TypeAlias = dict[str, np.ndarray]

CONFIG_FILE = "config.json"
# Names of the weights, the best first. An index lists the files of weights that are split.
WEIGHTS_FILES = tuple(
    f"diffusion_pytorch_model{ending}"
    for ending in (
        ".safetensors",
        ".bin",
        ".safetensors.index.json",
        ".bin.index.json",
        ".fp16.safetensors",
        ".fp16.bin",
        ".safetensors.index.fp16.json",
        ".bin.index.fp16.json",
    )
)

# (our part, diffusers' part) of names, where they differ; the last parts are handled separately.
_RENAMES = (
    (".attention.", ".attentions.0."),
    (".to_out.", ".to_out.0."),
    (".downsample.", ".downsamplers.0.conv."),
    (".upsample.", ".upsamplers.0.conv."),
)
# Names of the parts of an attention block before diffusers 0.18.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_NAME = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")


def abstract(
    config: AutoencoderConfig, dtype: str = "float32"
) -> tuple[nnx.GraphDef[Autoencoder], dict[str, jax.ShapeDtypeStruct]]:
    """Return the structure and parameter shapes of an autoencoder that computes in `dtype`, without allocating it."""
    structure, shapes = split(nnx.eval_shape(lambda: Autoencoder(config, dtype=dtype, rngs=nnx.Rngs(0))))
    return structure, {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}


def load_folder(folder: str | Path) -> tuple[AutoencoderConfig, Parameters]:
    """Read a diffusers folder.

    Raises:
        WeightsError: a file is missing or damaged, or entries are missing, extra, misshapen or not finite; the message
            names all of them.
        ConfigError: `config.json` is not supported.
        MissingExtraError: the weights are a `.bin` and PyTorch is not installed.
    """
    folder = Path(folder)
    weights = next(filter(Path.is_file, (folder / name for name in WEIGHTS_FILES)), None)
    missing = [] if (folder / CONFIG_FILE).is_file() else [CONFIG_FILE]
    missing += [] if weights else [" or ".join(WEIGHTS_FILES[:2])]
    if weights is None or missing:
        raise WeightsError(f"{folder}: missing {' and '.join(missing)}; {_describe_folder(folder, not weights)}.")
    config = read_config(folder / CONFIG_FILE)
    state = _read_shards(weights) if weights.suffix == ".json" else read_state_dict(weights)
    return config, from_diffusers(state, config, str(weights))


def save_folder(folder: str | Path, config: AutoencoderConfig, parameters: Mapping[str, Any]) -> None:
    """Write a diffusers folder, which `load_folder` reads back bit for bit; its two files are replaced.

    Raises:
        InputError: the folder cannot be written.
        WeightsError: the parameters do not fit the config.
    """
    state = to_diffusers(parameters)
    _check_entries(state, config, "parameters")
    with atomic_write(Path(folder) / WEIGHTS_FILES[0]) as file:
        file.write(safetensors.numpy.save(state, metadata={"format": "pt"}))
    # The config is written last, so that a folder with a config has weights.
    with atomic_write(Path(folder) / CONFIG_FILE) as file:
        file.write((json.dumps(config_to_diffusers(config), indent=2, sort_keys=True) + "\n").encode())


def from_diffusers(state: Mapping[str, np.ndarray], config: AutoencoderConfig, source: str) -> Parameters:
    """Convert a diffusers state dict, with old or new attention names, to parameters.

    Raise WeightsError, which calls the state dict `source`, if entries are missing, extra, misshapen or not finite.
    """
    renamed = _with_new_attention_names(state, source)
    _check_entries(renamed, config, source)
    del state
    # pop() frees each array after its conversion. jnp.array copies, where jnp.asarray may share memory with numpy.
    return {path: jnp.array(_to_jax(renamed.pop(_diffusers_name(path))), jnp.float32) for path in abstract(config)[1]}


def to_diffusers(parameters: Mapping[str, Any]) -> StateDict:
    """Convert parameters to a diffusers state dict with the new attention names; the inverse of `from_diffusers`."""
    return {_diffusers_name(path): _to_torch(np.asarray(array)) for path, array in parameters.items()}


def fingerprint(parameters: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hexadecimal) of name, shape and float32 bytes of every weight, sorted by diffusers' names.

    It does not depend on the file format or on old or new attention names.
    """
    digest = hashlib.sha256()
    for name, array in sorted(to_diffusers(parameters).items()):
        digest.update(f"{name} {array.shape}\n".encode())
        digest.update(array.astype("<f4").tobytes())
    return digest.hexdigest()


def shard_names(index: Path) -> list[str]:
    """Return the names of the files that an index lists; raises WeightsError if one is of another folder."""
    try:
        names = sorted({str(name) for name in parse_json(index.read_text(encoding="utf-8-sig"))["weight_map"].values()})
        if not all(Path(name).name == name for name in names):
            raise ValueError("it lists files of other folders")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise WeightsError(f"{index} is no readable index of weights ({error}); download it again.") from error
    return names


def _read_shards(index: Path) -> StateDict:
    return {name: array for file in shard_names(index) for name, array in read_state_dict(index.parent / file).items()}


def _diffusers_name(path: str) -> str:
    name, kind = path.rsplit(".", 1)
    name += "."
    for part, diffusers_part in _RENAMES:
        name = name.replace(part, diffusers_part)
    return name + ("bias" if kind == "bias" else "weight")


# PyTorch's kernels are (out, in, height, width) and (out, in); ours are (height, width, in, out) and (in, out).
def _to_jax(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T)


def _to_torch(array: np.ndarray) -> np.ndarray:
    return np.array(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T, order="C")


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _with_new_attention_names(state: Mapping[str, np.ndarray], source: str) -> StateDict:
    renamed: StateDict = {}
    for old, value in state.items():
        match = _OLD_ATTENTION_NAME.fullmatch(old)
        name = f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}" if match else old
        if name in renamed or (match and name in state):
            raise WeightsError(f"{source}: both {old} and {name} are there; keep one of the two namings.")
        # Some files store the attention's linear maps as 1x1 convolutions.
        is_pointwise = ".attentions." in name and value.ndim == 4 and value.shape[2:] == (1, 1)
        renamed[name] = value[:, :, 0, 0] if is_pointwise else value
    return renamed


def _check_entries(state: Mapping[str, np.ndarray], config: AutoencoderConfig, source: str) -> None:
    shapes = {_diffusers_name(path): _torch_shape(leaf.shape) for path, leaf in abstract(config)[1].items()}
    if listed := describe_misfit(state, shapes):
        raise WeightsError(
            f"{source} does not fit the architecture (block_out_channels {config.block_out_channels}, latent_channels "
            f"{config.latent_channels}) of its config.json: {listed}."
        )


def _describe_folder(folder: Path, without_weights: bool) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    if (folder / "vae" / CONFIG_FILE).is_file():
        return f"this looks like a whole pipeline, so pass {folder / 'vae'}"
    names = sorted(path.name for path in folder.iterdir())
    held = f"the folder holds {', '.join(names[:8]) or 'nothing'}{' and more' if len(names) > 8 else ''}"
    others = [name for name in names if name.endswith((".safetensors", ".bin"))] if without_weights else []
    if len(others) == 1:
        held += f"; if {others[0]} has the weights, rename it to diffusion_pytorch_model{Path(others[0]).suffix}"
    return held
