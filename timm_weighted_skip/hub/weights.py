"""safetensors files with a digest of all that they hold, header included, so that a flipped bit shows."""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from timm_weighted_skip.files import write_file

__all__ = ['read_weights', 'write_weights']

DIGEST = 'sha256'
PICKLE_STARTS = (b'\x80', b'PK\x03\x04')  # a bare pickle, and the zip archive of torch.save


def is_pickle(file: Path) -> bool:
    """Whether `file` is a pickle by its first bytes or its name, whatever it claims to be."""
    with file.open('rb') as stream:
        start = stream.read(10)
    # The length of a small safetensors header may begin with 0x80 too; its JSON begins at byte 8.
    by_content = start.startswith(PICKLE_STARTS) and start[8:9] != b'{'
    return by_content or file.suffix in ('.pkl', '.pickle', '.pt', '.pth', '.bin', '.ckpt', '.tar')


def _split(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """Header and tensor bytes of a whole safetensors file."""
    length = int.from_bytes(data[:8], 'little')
    return json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]


def _digest(header: dict[str, Any], tensors: memoryview) -> str:
    """SHA-256 of the tensors' bytes and of the header without its digest."""
    metadata = {k: v for k, v in header.get('__metadata__', {}).items() if k != DIGEST}
    text = json.dumps({**header, '__metadata__': metadata}, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    digest.update(tensors)
    return digest.hexdigest()


def write_weights(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write `tensors` with `metadata` and a digest."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = _digest(*_split(safetensors.torch.save(tensors, metadata)))
    write_file(file, safetensors.torch.save(tensors, {**metadata, DIGEST: digest}))


def read_weights(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file of `write_weights`; nothing in the file is executed.

    Raises:
        ValueError: The file is a pickle, truncated, damaged or not from `write_weights`, or a tensor has NaN or Inf.
    """
    if is_pickle(file):
        raise ValueError(f'{file} is a pickle, which can run any code when it is loaded; it was not opened')
    size = file.stat().st_size
    with file.open('rb') as stream:
        length = int.from_bytes(stream.read(8), 'little')
    if size < 8 or length > size - 8:
        raise ValueError(f'{file} has {size:,} bytes but claims a header of {length:,}: it is truncated or damaged')
    data = file.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
        header, body = _split(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f'{file} is not a whole safetensors file, it is truncated or damaged: {error}') from None
    metadata = header.get('__metadata__', {})
    if DIGEST not in metadata:
        raise ValueError(f'{file} has no digest to check it by; write it with `weighted-skip save`')
    if metadata[DIGEST] != _digest(header, body):
        raise ValueError(f'{file} is damaged: its content does not have the digest that it names')
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f'{file}: {name} holds NaN or Inf')
    return tensors, metadata
