#!/bin/sh
# install.sh BIN NAME...: installs locked/NAME.txt with the pip in BIN, each package held against its hashes; with
# `runtime` torch too, and what its build wants of CUDA's libraries.
#
# torch is fetched by itself: a machine may keep a build of its own, without CUDA say, which pip looks past as soon as it
# sees hashes. No registry takes such a build (2.13.0+cpu), so no hash of it is locked, and it is said that it was taken.
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
        case "$(ls "$folder")" in
            *+*)
                echo "$(ls "$folder") is this machine's own build: it is held against no hash"
                "$bin/pip" install --quiet --disable-pip-version-check --no-deps --no-index "$folder"/*.whl
                ;;
            *) $install --no-index --find-links "$folder" -r locked/torch.txt ;;
        esac
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
