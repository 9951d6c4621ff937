"""Inception's weights: the files people have, where they are looked for, and a safetensors of them."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from flax import nnx

from mpdit_jax.errors import WeightsError
from mpdit_jax.evaluate.inception import Inception
from mpdit_jax.evaluate.layers import assign, entry, fold
from mpdit_jax.interop.files import read_state_dict
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.paths import expand

VARIABLE = "MPDIT_JAX_INCEPTION"
CACHE = Path("~/.cache/mpdit_jax")
NAMES = (
    "inception-2015-12-05.safetensors",
    "pt_inception-2015-12-05-6726825d.pth",  # as pytorch-fid publishes it
    "weights-inception-2015-12-05-6726825d.pth",  # as torch-fidelity does
)
_PAGE = "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"
_SETTING = "--inception"  # of `evaluate`; while training it is config.eval.inception
_EPSILON = 1e-3
# Published names of the first convolutions; those of the mixed blocks are ours with a capital letter.
_STEM = {
    "conv_1a": "Conv2d_1a_3x3",
    "conv_2a": "Conv2d_2a_3x3",
    "conv_2b": "Conv2d_2b_3x3",
    "conv_3b": "Conv2d_3b_1x1",
    "conv_4a": "Conv2d_4a_3x3",
}
_IGNORED = re.compile(r"AuxLogits\..*|.*\.num_batches_tracked")


def locate_inception(path: str = "", *, setting: str = _SETTING) -> Path:
    """The weights file: the given path, else the one MPDIT_JAX_INCEPTION names, else one in ~/.cache/mpdit_jax.

    Args:
        path: as the user has given it, or "".
        setting: the flag or field that gives it, for the sentences.

    Raises:
        WeightsError: none of them is there; the sentence says what to download and where to put it.
    """
    named = path or os.environ.get(VARIABLE, "")
    if named:
        found = expand(named)
        if found.is_file():
            return found
        origin = f"{setting}={path}" if path else f"{VARIABLE}={named}"
        raise WeightsError(f"{origin}: no such file; {_remedy(setting)}")
    folder = expand(CACHE)
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"there are no Inception weights in {folder}: {_remedy(setting)}")


def load_inception(path: str | Path, *, setting: str = _SETTING) -> Inception:
    """The network with the weights of a file.

    Args:
        path: `.pth` of pytorch-fid or torch-fidelity (read weights-only, extra [torch]), or a safetensors with the
            same names.
        setting: as of `locate_inception`.

    Raises:
        WeightsError: no such file, damaged, or the weights of another network.
        MissingExtraError: a `.pth` without PyTorch installed.
    """
    return from_torch(read_state_dict(path), str(path), setting=setting)


def convert_inception(source: str | Path, target: str | Path) -> None:
    """Write a safetensors of a weights file, which then needs no PyTorch to be read.

    Raises:
        WeightsError: it does not hold the weights of Inception.
        InputError: the target cannot be written.
    """
    state = read_state_dict(source)
    from_torch(state, str(source))
    kept = {name: np.ascontiguousarray(array) for name, array in state.items() if not _IGNORED.fullmatch(name)}
    with atomic_write(target) as file:
        file.write(safetensors.numpy.save(kept, metadata={"format": "pt"}))


def from_torch(state: Mapping[str, np.ndarray], source: str, *, setting: str = _SETTING) -> Inception:
    """The network with the weights of a state dict under their published names.

    Args:
        state: what a file holds.
        source: that file, for the sentences.
        setting: as of `locate_inception`.

    Raises:
        WeightsError: entries are missing, extra, misshapen or not finite; the message names one.
    """
    if "fc.weight" in state and np.shape(state["fc.weight"])[0] == 1000:
        raise WeightsError(
            f"{source} is torchvision's Inception v3 of 1,000 classes, which is not the network of FID: "
            f"{_remedy(setting)}"
        )
    arrays: dict[str, np.ndarray] = {}
    left = {name for name in state if not _IGNORED.fullmatch(name)}
    model = Inception()
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *parts, kind = map(str, path)
        if kind != "kernel" or parts == ["fc"]:
            continue
        name = published_name(parts)
        kernel, bias = fold(state, f"{name}.conv", f"{name}.bn", _EPSILON, source)
        arrays |= {f"{'.'.join(parts)}.kernel": kernel, f"{'.'.join(parts)}.bias": bias}
        left -= {f"{name}.conv.weight", *(f"{name}.bn.{n}" for n in ("weight", "bias", "running_mean", "running_var"))}
    arrays["fc.kernel"] = entry(state, "fc.weight", source, 2).T[None, None]
    arrays["fc.bias"] = entry(state, "fc.bias", source, 1)
    if left := left - {"fc.weight", "fc.bias"}:
        raise WeightsError(
            f"{source}: entry {min(left)} has no place in the Inception network of FID; {_remedy(setting)}"
        )
    assign(model, arrays, source)
    return model


def published_name(path: Sequence[str]) -> str:
    """What a convolution of ours is called in published files, such as Mixed_5b.branch1x1."""
    return ".".join([_STEM.get(path[0], path[0].capitalize()), *path[1:]])


def _remedy(setting: str) -> str:
    features = setting.removesuffix("inception") + "features"
    return (
        f"download {NAMES[1]} (pytorch-fid, {_PAGE}) to {CACHE}/, or give its path by {setting}=FILE or "
        f"{VARIABLE}=FILE; FD(efficientnet_lite0) needs no download ({features}=efficientnet_lite0)."
    )
