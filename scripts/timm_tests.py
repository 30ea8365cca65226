#!/usr/bin/env python3
"""Run timm's own test-suite over every model name that this package registers.

    scripts/timm_tests.py [--names 'awm_*20*'] [--tests DIR] [pytest arguments, such as -n 2 or -k forward]

The suite is that of the installed timm's source distribution, fetched with pip into `.cache/` once (`--tests` takes an
unpacked copy instead). timm picks some of its tests by module name; those run on our modules too. Tests that download
checkpoints are left out.
"""

import argparse
import fnmatch
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

import timm_weighted_skip  # noqa: F401  registers the models

CACHE = Path(__file__).resolve().parent.parent / '.cache'
PACKAGE = 'timm_weighted_skip.'
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


class OurModels:
    """Keeps the tests of our names, and has timm's choices by module take our modules in."""

    def __init__(self, pattern: str) -> None:
        entrypoints = {name: timm.models.model_entrypoint(name) for name in timm.list_models()}
        ours = {name: fn.__module__ for name, fn in entrypoints.items() if fn.__module__.startswith(PACKAGE)}
        self.names = set(fnmatch.filter(ours, pattern))
        modules = sorted({module.rsplit('.', 1)[1] for module in ours.values()})
        list_models = timm.list_models

        def list_models_with_ours(filter='', module='', **kwargs):
            # timm's tests give a list of modules; a single name is a user's choice.
            return list_models(filter, module=[*module, *modules] if isinstance(module, list) else module, **kwargs)

        timm.list_models = list_models_with_ours  # type: ignore[assignment]

    def pytest_collection_modifyitems(self, config, items) -> None:
        def wanted(item) -> bool:
            name = item.callspec.params.get('model_name', '') if hasattr(item, 'callspec') else ''
            return name.split('.')[0] in self.names and item.originalname not in NEEDS_NETWORK

        kept = [item for item in items if wanted(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--names', default='*', metavar='PATTERN', help='only the models that match')
    parser.add_argument('--tests', type=Path, metavar='DIR', help="timm's tests folder")
    args, pytest_args = parser.parse_known_args()
    tests = args.tests or fetch_tests()
    common = [str(tests / 'test_models.py'), f'--rootdir={tests.parent}', '-p', 'no:cacheprovider']
    return pytest.main([*common, *pytest_args], plugins=[OurModels(args.names)])


if __name__ == '__main__':
    sys.exit(main())
