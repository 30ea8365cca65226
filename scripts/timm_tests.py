#!/usr/bin/env python3
"""Run timm's own tests of models over every model name that this package registers.

    scripts/timm_tests.py [--names 'awm_*20*'] [--tests DIR] [pytest arguments, such as -n 2 or -k forward]

They are those of the installed timm's source distribution, fetched with pip into `.cache/` once (`--tests` takes an
unpacked copy instead). timm picks some of its tests by module name; those run on our modules too. Tests that download
checkpoints are left out.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

from timm_weighted_skip.models.names import model_names

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / '.cache'
NEEDS_NETWORK = ('test_model_load_pretrained', 'test_model_features_pretrained', 'test_model_inference')


def fetch_tests() -> Path:
    """The `tests` folder of the installed timm's source distribution."""
    folder = CACHE / f'timm-{timm.__version__}'
    if not folder.exists():
        CACHE.mkdir(exist_ok=True)
        command = ['pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm', '--dest', str(CACHE)]
        subprocess.run([sys.executable, '-m', *command, f'timm=={timm.__version__}'], check=True)
        with tarfile.open(f'{folder}.tar.gz') as archive:
            archive.extractall(CACHE, filter='data')
    return folder / 'tests'


# This file is also the pytest plugin that picks the tests, so that the workers of `-n` load it by its name.


def pytest_addoption(parser) -> None:
    parser.addoption('--names', default='*', help='only the models that match')


def pytest_configure(config) -> None:
    """Have timm's choices by module take our modules in."""
    modules = sorted({timm.models.model_entrypoint(name).__module__.rpartition('.')[2] for name in model_names()})
    list_models = timm.list_models

    def list_models_with_ours(filter='', module='', **kwargs):
        # timm's tests give a list of modules; a single name is a user's choice.
        return list_models(filter, module=[*module, *modules] if isinstance(module, list) else module, **kwargs)

    timm.list_models = list_models_with_ours  # type: ignore[assignment]


def pytest_collection_modifyitems(config, items) -> None:
    """Keep the tests of our names."""
    names = set(model_names(config.getoption('names')))

    def wanted(item) -> bool:
        name = item.callspec.params.get('model_name', '') if hasattr(item, 'callspec') else ''
        return name.split('.')[0] in names and item.originalname not in NEEDS_NETWORK

    kept = list(filter(wanted, items))
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--names', default='*', metavar='PATTERN', help='only the models that match')
    parser.add_argument('--tests', type=Path, metavar='DIR', help="timm's tests folder")
    args, pytest_args = parser.parse_known_args()
    tests = args.tests or fetch_tests()
    sys.path.insert(0, str(HERE))
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(HERE), os.environ.get('PYTHONPATH')]))
    common = [str(tests / 'test_models.py'), f'--rootdir={tests.parent}', '-p', 'no:cacheprovider', '-p', 'timm_tests']
    return pytest.main([*common, '--names', args.names, *pytest_args])


if __name__ == '__main__':
    sys.exit(main())
