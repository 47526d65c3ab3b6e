#!/bin/sh
# install.sh BIN NAME...: installs locked/NAME.txt with the pip in BIN, each package held against its hashes; with
# `runtime` torch too, and what its build wants of CUDA's libraries.
#
# torch is fetched by itself: a machine may keep a build without CUDA, which pip looks past as soon as it sees hashes.
set -eu
bin=$1
shift
install="$bin/pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes"

has_torch() { # for which the question $1 in Python is true
    "$bin/python" -c "import importlib.metadata as m; assert $1" 2>/dev/null
}

case " $* " in *" runtime "*)
    torch=$(grep -o '^torch==[^ ]*' locked/torch.txt)
    if ! has_torch "m.version('torch').split('+')[0] == '${torch#torch==}'"; then
        folder=$(mktemp -d)
        trap 'rm -rf "$folder"' EXIT
        "$bin/pip" download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$folder" "$torch"
        $install --no-index --find-links "$folder" -r locked/torch.txt
    fi
    if has_torch "any(r.startswith('nvidia') for r in m.requires('torch'))"; then
        set -- "$@" cuda
    fi
    ;;
esac
for name; do
    shift
    set -- "$@" -r "locked/$name.txt"
done
$install "$@"
"$bin/pip" check --disable-pip-version-check
