#!/bin/sh
# What tini starts in the container. As root it makes the folders where things are kept, on a volume say, and goes on as
# user 10001; as anybody else (docker run --user) it goes on as it is.
set -eu
worker=10001

if [ "$*" = "python -u handler.py" ] && [ -z "${RUNPOD_WEBHOOK_GET_JOB:-}${RUNPOD_REALTIME_PORT:-}" ]; then
    cat <<'END'
This is a FLUX worker for RunPod, and RunPod is not here: it draws test_input.json into /app/outputs and ends.
Into a folder of yours:  docker run -v "$PWD/outputs:/app/outputs" ... python local_test.py --prompt "a fox"
As an API on port 8000:  docker run -p 8000:8000 ... python -u handler.py --rp_serve_api --rp_api_host 0.0.0.0
END
    set -- python -u local_test.py
fi

if [ "$(id -u)" = 0 ]; then
    mkdir -p "$HF_HOME" 2>/dev/null || true
    for folder in "$HF_HOME" /app/outputs "${LORA_CACHE_DIR:-/tmp/loras}" \
        "${QUANTIZED_DIR:-/runpod-volume/quantized}" "${COMPILE_CACHE_DIR:-/runpod-volume/compile-cache}"; do
        mkdir "$folder" 2>/dev/null || true # on a volume that is there, that is: not its parents
        # Only what is new or empty: to give away all that a volume holds may take minutes.
        if [ -d "$folder" ] && [ -z "$(ls -A "$folder")" ]; then
            chown "$worker:$worker" "$folder" 2>/dev/null || true
        fi
    done
    become="setpriv --reuid $worker --regid $worker --clear-groups --no-new-privs --"
    if $become true 2>/dev/null; then
        # shellcheck disable=SC2086 # several words
        set -- $become "$@"
    else
        echo "WARNING: the worker stays root: this container may not change its user (--cap-drop); give --user $worker" >&2
    fi
fi
exec "$@"
