#!/bin/sh
# venv.sh PYTHON FOLDER: a virtual environment with pip. Debian and Ubuntu keep part of Python's own venv module
# in a package of its own; where it is missing it is installed, or the reader is told how.
set -eu
python=$1
folder=$2

if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if ! command -v apt-get >/dev/null; then
        echo "this Python has no venv module: install it and try again" >&2
        exit 1
    fi
    as_root=
    [ "$(id -u)" = 0 ] || as_root=sudo
    echo "installing python$version-venv"
    $as_root apt-get update -qq
    $as_root apt-get install -y -qq --no-install-recommends "python$version-venv" ca-certificates >/dev/null
fi
rm -rf "$folder"
"$python" -m venv "$folder"
