#!/bin/sh
# image.sh [NAME...]: builds the image without CUDA and runs it as its users do, a line for each case (tests/image.py has
# them), or for those whose name holds a NAME. TORCH=cuda in the environment takes the whole image, of which 6 GB are
# downloaded: `TORCH=cuda scripts/image.sh build size`. Ends with 77 and the reason where there is nothing to build with.
set -eu
cd "$(dirname "$0")/.."
skip() {
    echo "skipped: $1"
    exit 77
}

python=.venv/bin/python
[ -x "$python" ] || skip "there is no $python: make test makes it"
export DOCKER_BUILDKIT=1
if [ "$(id -u)" = 0 ] && command -v dockerd >/dev/null && ! docker info >/dev/null 2>&1; then
    log=$(mktemp)
    dockerd >"$log" 2>&1 &
    daemon=$!
    trap 'kill "$daemon"; wait "$daemon" || true; rm -f "$log"' EXIT
    timeout 60 sh -c 'until docker info >/dev/null 2>&1; do sleep 0.5; done' || tail -n 5 "$log"
fi
for tool in docker /usr/bin/docker; do
    # The Dockerfile wants BuildKit: docker with its plugin buildx, or from before that was one.
    "$tool" build --help 2>/dev/null | grep -q -- --secret || continue
    "$tool" info >/dev/null 2>&1 || continue
    "$python" -m tests.image "$tool" "$@" && exit 0 || exit $?
done
skip "no docker with BuildKit works here; on Debian, as root: apt-get install docker.io iptables debootstrap"
