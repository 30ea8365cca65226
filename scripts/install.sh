#!/usr/bin/env bash
# Make .venv with this checkout and one of its extras in it: scripts/install.sh EXTRA
# Runs again only when pyproject.toml has changed since. $PYTHON names another interpreter than python3.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:?usage: scripts/install.sh EXTRA}
stamp=.venv/installed-$extra
if [ ! "$stamp" -nt pyproject.toml ]; then
    echo "installing timm-weighted-skip[$extra] into .venv (torch is large: this can take minutes)" >&2
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extra]"
    touch "$stamp"
fi
