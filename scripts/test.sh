#!/usr/bin/env bash
# Install into .venv and run the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh test
export PYTHONWARNDEFAULTENCODING=1  # our own files are UTF-8, whatever the locale; a warning is an error, see pyproject.toml
exec .venv/bin/python -m pytest "$@"
