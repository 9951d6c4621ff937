"""JSON that somebody else may have written, and digests of plain values."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of any origin.

    Raises:
        ValueError: not JSON, or nested too deeply for the parser.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("too many levels of brackets") from error


def is_json_with(path: Path, names: Collection[str]) -> bool:
    """Return whether a file is a JSON object with these fields, unlike one of another project with the same name."""
    try:
        return set(parse_json(path.read_text())) >= set(names)
    except (OSError, ValueError, TypeError):
        return False


def digest_of(content: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a plain value's JSON, for the names of derived files."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
