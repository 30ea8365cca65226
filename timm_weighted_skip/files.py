"""Files that are written as a whole or, after a failure, are as they were; and JSON that is read with care."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Union

__all__ = ['check_folder', 'first_sentence', 'read_json', 'replacing', 'write_file']

MAX_JSON_BYTES = 10_000_000


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new path beside `path` to write a file to, which at the end takes the place of `path`, or of what it links to.

    Its name is its own: of two processes that write one file, each writes it as a whole.

    Raises:
        OSError: It could not be written, or is a folder, a device or a pipe; what was there still is.
    """
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder; give the name of a file')
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise OSError(f'{path} is a device or a pipe; give the name of a file')
    part = target.with_name(f'.{target.name}.{secrets.token_hex(4)}.part')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open('rb+') as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f'{path} could not be written ({reason}); the files that were there are whole') from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_file(path: Path, content: Union[str, bytes]) -> None:
    """Write `content` to `path` as a whole or not at all, see `replacing`."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def check_folder(path: Union[str, Path]) -> None:
    """Refuse the name of a folder to write to where there is something else.

    Raises:
        ValueError: There is.
    """
    if Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f'{path} is a file; give the name of a folder')


def first_sentence(error: Exception) -> str:
    """What is wrong, without what torch adds: advice to load files that may run code, a list of all its devices."""
    return str(error).partition('\n')[0].partition('. ')[0] or type(error).__name__


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        ValueError: It is not one, or is beyond all measure.
    """
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f'{file} has {file.stat().st_size:,} bytes; a config has at most {MAX_JSON_BYTES:,}')
    try:
        value = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{file} is not JSON: {error}') from None
    if not isinstance(value, dict):
        raise ValueError(f'{file} holds a {type(value).__name__}, not an object')
    return value
