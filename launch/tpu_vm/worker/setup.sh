#!/usr/bin/env bash
# Installs the repository that it is in; on a worker.
set -euo pipefail

cd "$(dirname "$0")/../../.."
# The images have Python 3.10; uv brings one of its own.
python3 -m pip install --quiet --user --upgrade uv
python3 -m uv venv --quiet --allow-existing --python 3.12 "$HOME/grit_jax_env"
python3 -m uv pip install --quiet --python "$HOME/grit_jax_env" -e '.[tpu]'
