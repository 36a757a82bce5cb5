#!/usr/bin/env bash
# Sets up a virtual environment and runs scripts/quickstart.py in it, with the arguments given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
exec "$PYTHON" scripts/quickstart.py "$@"
