#!/usr/bin/env bash
# Everything a fresh Debian or Ubuntu machine needs: a virtual environment in .venv, the packages, OpenGL for the simulator.
# Safe to run again; it does nothing that is done already.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "error: Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" --version); set PYTHON=python3.11" >&2; exit 1; }
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv ||
  { echo "error: no virtual environment could be made; run: apt-get install -y python3-venv" >&2; exit 1; }
if ! cat requirements.txt requirements-libero.txt | cmp -s - .venv/installed.txt; then
  .venv/bin/python -m pip install --quiet -r requirements.txt
  .venv/bin/python -m pip install --quiet --no-deps -r requirements-libero.txt
  cat requirements.txt requirements-libero.txt > .venv/installed.txt
fi
renders() { .venv/bin/python -c 'from robots.tabletop import Tabletop; Tabletop().reset()' 2>&1; }
if [ "$(uname)" = Linux ] && ! renders >/dev/null; then
  if [ "${MUJOCO_GL:-egl}" = osmesa ]; then packages=libosmesa6; else packages="libegl1 libgl1-mesa-dri libopengl0"; fi
  echo "OpenGL is missing, installing: $packages"
  if [ "$(id -u)" = 0 ]; then sudo=; else sudo=sudo; fi
  $sudo apt-get update -qq && $sudo apt-get install -y -qq --no-install-recommends $packages ||
    { echo "error: install OpenGL yourself: apt-get install -y --no-install-recommends $packages" >&2; exit 1; }
  said=$(renders) || { echo "error: ${said##*$'\n'}" >&2; exit 1; }
fi
