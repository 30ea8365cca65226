"""Checkpoints that a kill, a full disk or a foreign file can't spoil.

A checkpoint is a pair of files: `checkpoint-<updates>.safetensors`, the weights, and `checkpoint-<updates>.pth.tar`,
what else a run needs to go on (optimizer, random state, epoch), which `torch.load(weights_only=True)` reads. Each is
written beside its place and moved there; the weights come first, so where the second file is, the checkpoint is whole.
"""

import io
import os
import re
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from timm_weighted_skip.files import first_sentence, replacing, write_file

__all__ = ['has_checkpoint', 'link', 'read_checkpoint', 'save_checkpoint', 'weights_file']

WEIGHTS, STATE = '.safetensors', '.pth.tar'


def link(source: Path, name: str) -> None:
    """Give `source` a second name in its folder, in the place of the file that has it."""
    with replacing(source.with_name(name)) as part:
        try:
            os.link(source, part)
        except OSError:  # a file system without links
            part.write_bytes(source.read_bytes())


def weights_file(folder: Path, updates: int, name: str = '') -> Path:
    """Where the checkpoint of so many updates has its weights of that name."""
    return folder / f'checkpoint-{updates}{f".{name}" if name else ""}{WEIGHTS}'


def _stems(folder: Path) -> list[tuple[int, Path]]:
    """(updates, path without ending) of the folder's whole checkpoints, oldest first."""
    found = [
        (re.fullmatch(r'checkpoint-(\d+)', path.name.removesuffix(STATE)), path) for path in folder.glob('*' + STATE)
    ]
    return sorted((int(m[1]), path.with_name(m[0])) for m, path in found if m)


def has_checkpoint(folder: Path) -> bool:
    """Whether `read_checkpoint` has one to read."""
    return bool(_stems(folder))


def save_checkpoint(
    folder: Path,
    weights: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    metadata: dict[str, str],
) -> None:
    """Write the checkpoint of `state['updates']` updates, then remove the older ones.

    Args:
        folder: The run's.
        weights: '' -> the net's state dict; further ones by name, such as 'ema'.
        state: Tensors, numbers, strings, and lists and dicts of them.
        metadata: What the weights say of themselves.
    """
    for name, tensors in weights.items():
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        write_file(weights_file(folder, state['updates'], name), to_safetensors(tensors, {'format': 'pt', **metadata}))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(folder / f'checkpoint-{state["updates"]}{STATE}', buffer.getvalue())
    # Beside older checkpoints what a run that was killed has left of one.
    found = [(re.match(r'\.?checkpoint-(\d+)\.', path.name), path) for path in folder.iterdir()]
    older = [path for m, path in found if m and int(m[1]) < state['updates']]
    # States go before all weights: what is left is no checkpoint.
    for path in sorted(older, key=lambda path: not path.name.endswith(STATE)):
        path.unlink()


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file's state dict.

    Raises:
        ValueError: It is not whole, or another kind of file.
        OSError: It is not there.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f'{path} is not a whole safetensors file ({error})') from None


def read_checkpoint(
    folder: Path, names: list[str]
) -> Optional[tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]]:
    """The newest checkpoint of `folder`: weights by name and state, as given to `save_checkpoint`; None without one.

    Raises:
        ValueError: A file of it is truncated or another kind of file.
        OSError: A file of it is missing.
    """
    stems = _stems(folder)
    if not stems:
        return None
    updates, stem = stems[-1]
    weights = {name: _read_weights(weights_file(folder, updates, name)) for name in names}
    path = stem.with_name(stem.name + STATE)
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(state, dict) or 'updates' not in state:
            raise ValueError('it holds no training state')
    except OSError:
        raise
    except Exception as error:  # torch raises whatever the broken part of the file leads to
        raise ValueError(f'{path} is not a whole checkpoint of this trainer ({first_sentence(error)})') from None
    return weights, state
