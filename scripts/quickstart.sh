#!/usr/bin/env bash
# Install into .venv and run the quickstart; arguments go to `weighted-skip quickstart`.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh analysis
exec .venv/bin/weighted-skip quickstart "$@"
