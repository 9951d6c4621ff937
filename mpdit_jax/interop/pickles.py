"""Why PyTorch's weights-only reader refuses a file: what its pickle would import, read without running any of it."""

import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mpdit_jax.errors import WeightsError

# What tensors are pickled with. Only what an error says depends on it: nothing here decides what is loaded.
_TENSORS = re.compile(
    r"torch(\._utils|\._tensor)?\._rebuild_\w+|torch(\.storage)?\.\w*Storage|torch\.(Size|device|[a-z]+\d+\w*)"
    r"|collections\.OrderedDict|argparse\.Namespace"
)
_PARTS = 5  # pickles in a row at the start of a PyTorch file of the old kind


def refusal(path: Path, error: Exception) -> WeightsError:
    """The sentence about a file that `torch.load(..., weights_only=True)` has not read, with this error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in texts that are none
            code, names, whole = _inspect(path)
    except Exception:  # a damaged archive fails its reader in any way it likes
        code, names, whole = False, [], False
    if code:
        return WeightsError(
            f"{path} is a TorchScript archive, which carries code, and was not loaded: where you trust it, save its "
            "weights alone, as in torch.save(torch.jit.load(path).state_dict(), 'weights.pt')."
        )
    named = [name for name in names if not _TENSORS.fullmatch(name)]
    if not named and (found := re.search(r"GLOBAL ([\w.]+)", str(error))):
        named = [found[1]]
    if named:
        return WeightsError(
            f"{path} holds more than tensors ({named[0]}) and was not loaded, since it could run code: where you trust "
            "it, save its weights alone, as in torch.save(checkpoint['ema'], 'weights.pt')."
        )
    if whole and isinstance(error, pickle.UnpicklingError):
        return WeightsError(
            f"{path} is a pickle, but not as torch.save writes it: save its weights again by torch.save(weights, "
            "'weights.pt'), with its default protocol."
        )
    told = str(error).split(". ")[0].strip() if isinstance(error, RuntimeError) else ""
    reason = told or "it is cut short, or no pickle"
    return WeightsError(f"{path} is not a readable PyTorch file ({reason}); download it again.")


def imported_names(file: IO[bytes]) -> Iterator[str]:
    """What one pickle refers to outside itself, in its order: "module.name", or "name" of a builtin.

    Raises:
        ValueError: the pickle is cut short, or none.
    """
    last: list[Any] = [None, None]  # the texts put on the stack, of which STACK_GLOBAL takes two
    kept: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            yield _plain(*str(argument).split(" ", 1))
        elif name == "STACK_GLOBAL":
            yield _plain(str(last[-2]), str(last[-1]))
        elif name.startswith("EXT"):
            yield f"extension {argument}"
        elif name == "MEMOIZE":
            kept[len(kept)] = last[-1]
        elif "PUT" in name:
            kept[argument] = last[-1]
        elif "GET" in name:
            last.append(kept.get(argument))
        elif name != "FRAME" and opcode.stack_after:
            last.append(argument if isinstance(argument, str) else None)


def _inspect(path: Path) -> tuple[bool, list[str], bool]:
    """Whether a file is a program, what it refers to, and whether its pickle has an end."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return False, *_collect(file, _PARTS)
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
        if any(member.endswith("/constants.pkl") or "/code/" in member for member in members):
            return True, [], True
        (inside,) = [member for member in members if member.split("/")[1:] == ["data.pkl"]]
        with archive.open(inside) as file:
            return False, *_collect(file, 1)


def _collect(file: IO[bytes], parts: int) -> tuple[list[str], bool]:
    names: list[str] = []
    for part in range(parts):
        try:
            for name in imported_names(file):
                names.append(name)
        except Exception:  # bytes that are no pickle fail its reader in any way they like
            return names, part > 0
    return names, True


def _plain(module: str, name: str = "") -> str:
    return name if module in ("builtins", "__builtin__") else f"{module}.{name}"
