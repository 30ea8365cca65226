#!/usr/bin/env bash
# Install into .venv and run the quickstart; arguments go to `weighted-skip quickstart`.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
"$root/scripts/install.sh" analysis
exec "$root/.venv/bin/weighted-skip" quickstart "$@"
