"""Explanation of why `torch.load(..., weights_only=True)` refuses a file.

The names that its pickle would import are read from the opcodes; nothing is unpickled.
"""

import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mpdit_jax.errors import WeightsError

# Names in a pickle of tensors. They affect the error message, not what is loaded.
_TENSORS = re.compile(
    r"torch(\._utils|\._tensor)?\._rebuild_\w+|torch(\.storage)?\.\w*Storage|torch\.(Size|device|[a-z]+\d+\w*)"
    r"|collections\.OrderedDict|argparse\.Namespace"
)
_LEGACY_PICKLES = 5  # consecutive pickles at the start of a file in PyTorch's legacy format


def explain_refusal(path: Path, error: Exception) -> WeightsError:
    """Return the WeightsError for a file on which `torch.load(..., weights_only=True)` raised `error`."""
    try:
        is_program, names, complete = _inspect(path)
    except Exception:  # a damaged archive can raise any exception
        is_program, names, complete = False, [], False
    if is_program:
        return WeightsError(
            f"{path} is a TorchScript archive, which carries code, and was not loaded: if you trust it, save its "
            "weights alone, as in torch.save(torch.jit.load(path).state_dict(), 'weights.pt')."
        )
    other = [name for name in names if not _TENSORS.fullmatch(name)]
    if not other and (match := re.search(r"GLOBAL ([\w.]+)", str(error))):
        other = [match[1]]
    if other:
        return WeightsError(
            f"{path} holds more than tensors ({other[0]}) and was not loaded, since it could run code: if you trust "
            "it, save its weights alone, as in torch.save(checkpoint['ema'], 'weights.pt')."
        )
    if complete and isinstance(error, pickle.UnpicklingError):
        return WeightsError(
            f"{path} is a pickle, but not as torch.save writes it: save its weights again by torch.save(weights, "
            "'weights.pt'), with its default protocol."
        )
    reason = str(error).split(". ")[0].strip() if isinstance(error, RuntimeError) else ""
    reason = reason or "it is cut short, or no pickle"
    return WeightsError(f"{path} is not a readable PyTorch file ({reason}); download it again.")


def imported_names(file: IO[bytes]) -> Iterator[str]:
    """Yield the names that a pickle would import, in order: "module.name", or "name" of a builtin."""
    strings: list[Any] = [None, None]  # strings pushed on the stack, of which STACK_GLOBAL takes the last two
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            yield _qualified(*str(argument).split(" ", 1))
        elif name == "STACK_GLOBAL":
            yield _qualified(str(strings[-2]), str(strings[-1]))
        elif name.startswith("EXT"):
            yield f"extension {argument}"
        elif name == "MEMOIZE":
            memo[len(memo)] = strings[-1]
        elif "PUT" in name:
            memo[argument] = strings[-1]
        elif "GET" in name:
            strings.append(memo.get(argument))
        elif name != "FRAME" and opcode.stack_after:
            strings.append(argument if isinstance(argument, str) else None)


def _inspect(path: Path) -> tuple[bool, list[str], bool]:
    """Return whether a file is a TorchScript program, the names it imports, and whether its pickle is complete."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return False, *_read_names(file, _LEGACY_PICKLES)
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
        if any(member.endswith("/constants.pkl") or "/code/" in member for member in members):
            return True, [], True
        (data,) = [member for member in members if member.split("/")[1:] == ["data.pkl"]]
        with archive.open(data) as file:
            return False, *_read_names(file, 1)


def _read_names(file: IO[bytes], pickles: int) -> tuple[list[str], bool]:
    """Return the names that consecutive pickles import, and whether the first pickle is complete."""
    names: list[str] = []
    for index in range(pickles):
        try:
            for name in imported_names(file):
                names.append(name)
        except Exception:  # arbitrary bytes can raise any exception
            return names, index > 0
    return names, True


def _qualified(module: str, name: str = "") -> str:
    return name if module in ("builtins", "__builtin__") else f"{module}.{name}"
