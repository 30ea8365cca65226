"""`python -m timm_weighted_skip.train [options] <arguments of timm's train.py>`: that script, with our nets and phases.

timm's scripts are not in its wheel. They are taken from `--train-script`, `$TIMM_TRAIN_SCRIPT`, the user's cache, or
fetched into that once, pinned to a release by their hashes.
"""

import argparse
import hashlib
import importlib.util
import os
import re
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

import timm

from timm_weighted_skip.files import write_file
from timm_weighted_skip.train.hook import add_arguments, install
from timm_weighted_skip.train.recipe import recipe_path

__all__ = ['TIMM_TAG', 'find_script', 'load_script', 'main']

TIMM_TAG = 'v1.0.28'  # its scripts run with every timm that the package takes
URL = f'https://raw.githubusercontent.com/huggingface/pytorch-image-models/{TIMM_TAG}'
SHA256 = {
    'train': '1fb02d26fe16536bc7de2c987980644353117c2b2b8046532261464093cd1ac6',
    'validate': '1ff87867c808997ce443eb8ff8b2c7324519cdd0ec9dafbc3d5e666f89436749',
    'benchmark': 'c2257b70ef9cd6e1dbc19a86cc5d0daea0505649a82352add58013d0382ed1ba',
    'inference': 'fc36c81ae3372b60fb7dc3a2b8676fd3de84afb79152134073109ac0333c95d4',
    'onnx_export': 'f685366d0f814c3764445b3d2edb2966f0e3194b19511a280d9e3cbb72c82418',
}


def cache_folder() -> Path:
    """Where fetched scripts are kept."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_weighted_skip' / TIMM_TAG


def _matches(content: bytes, name: str) -> bool:
    return hashlib.sha256(content).hexdigest() == SHA256[name]


def find_script(name: str = 'train', given: Optional[str] = None) -> Path:
    """The path of one of timm's scripts.

    Args:
        name: Of `SHA256`.
        given: The user's own copy of it, or of train.py, beside which the others are looked for; else
            `$TIMM_TRAIN_SCRIPT`.

    Raises:
        OSError: It is not where it was said to be, or is nowhere and can't be fetched.
    """
    beside = name != 'train' and not given  # the variable names train.py, whatever that is called
    given = given or os.environ.get('TIMM_TRAIN_SCRIPT')
    if given:
        path = Path(given)
        if path.is_dir() or path.stem in SHA256 or beside:
            path = (path if path.is_dir() else path.parent) / f'{name}.py'
        if not path.is_file():
            raise OSError(
                f'{path} is not there; --train-script and $TIMM_TRAIN_SCRIPT name train.py in a clone of timm'
            )
        return path
    path = cache_folder() / f'{name}.py'
    if path.is_file() and _matches(path.read_bytes(), name):
        return path
    url = f'{URL}/{name}.py'
    ways = (
        f'give --train-script PATH of a clone of timm, or set TIMM_TRAIN_SCRIPT to it, or put {url} at {path} yourself'
    )
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
    except OSError as error:
        raise OSError(f'{url} could not be fetched ({error}); {ways}') from None
    if not _matches(content, name):
        raise OSError(f'{url} is not the file it was (SHA-256 {hashlib.sha256(content).hexdigest()}); {ways}')
    write_file(path, content)
    return path


def load_script(path: Path) -> ModuleType:
    """Load a script as a module of its name, as a process of its data loader would find it.

    Raises:
        ImportError: It does not fit the installed timm, needs another package, or is no script.
    """
    sys.path.append(str(path.parent.resolve()))  # at the end, as a clone has a timm of its own
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f'{path} is not a Python script')
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        package = (error.name or '').partition('.')[0] if isinstance(error, ModuleNotFoundError) else 'timm'
        if package != 'timm':
            raise ImportError(
                f'{path} needs {package}, which is not here; install it with: pip install {package}'
            ) from None
        raise ImportError(
            f'{path} does not run with timm {timm.__version__} ({error}); give --train-script of a clone at tag '
            f'v{timm.__version__}'
        ) from None
    if not hasattr(module, 'parser'):
        raise ImportError(f"{path} is none of timm's scripts; give --train-script of train.py in a clone of timm")
    return module


def _name_recipe(arguments: list[str]) -> list[str]:
    """Put the path of the package's recipe in the place of its name after -c.

    Raises:
        ValueError: There is neither such a recipe nor such a file.
    """
    replaced = list(arguments)
    for i, argument in enumerate(arguments):
        if attached := re.fullmatch(r'(--config=|-c=|-c(?!=))(.+)', argument):
            where, (option, name) = i, attached.groups()
        elif argument in ('-c', '--config'):
            where, option, name = i + 1, '', ''.join(arguments[i + 1 : i + 2])
        else:
            continue
        if name and not Path(name).is_file():
            replaced[where] = f'{option}{recipe_path(name)}'
    return replaced


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run one of timm's scripts; returns the exit status."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument('--train-script')
    options.add_argument('--script', default='train', choices=SHA256)
    own, rest = options.parse_known_args(arguments)
    try:
        script: Any = load_script(find_script(own.script, own.train_script))
        script.parser.prog = 'python -m timm_weighted_skip.train'
        if own.script != 'train':
            sys.argv = [script.__file__, *rest]
        else:
            sys.argv = [script.__file__, *_name_recipe(rest)]
            add_arguments(script.parser)
            install(script, script._parse_args()[0])
    except (ValueError, OSError, ImportError) as error:
        print(f'timm_weighted_skip.train: {error}', file=sys.stderr)
        return 1
    script.main()
    return 0
