#!/bin/sh
# The table of docs/performance.md in two runs of at most ten minutes each, on a machine with a card:
#   sh benchmarks/ten_minutes.sh 1 [FILE]     FLUX.1-dev
#   sh benchmarks/ten_minutes.sh 2 [FILE]     FLUX.1-schnell, FLUX.2-klein-4B and where the time of a step goes
# Both write into FILE, after every row. Run again, ways that have no row yet come first.
set -eu
cd "$(dirname "$0")/.."
output=${2:-benchmarks/results/gpu.json}
case "${1:-}" in
    1) set -- --models FLUX.1-dev ;;
    2) set -- --models FLUX.1-schnell FLUX.2-klein-4B --profile ;;
    *) echo "which run: 1 or 2?" >&2; exit 2 ;;
esac
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
# 9.5 minutes in which ways begin; timeout ends one that takes longer than anybody expected.
exec timeout --signal=INT --kill-after=5 590 "$python" -m benchmarks.gpu --minutes "${MINUTES:-9.5}" --output "$output" "$@"
