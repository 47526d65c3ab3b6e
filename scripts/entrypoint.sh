#!/bin/sh
# What tini starts in the container. As root it makes the folders where things are kept, on a volume say, and goes on as
# user 10001, or as the user of the host's whose folder is mounted for the pictures; as anybody else (docker run --user)
# it goes on as it is.
set -eu
umask 002 # what is kept belongs to the group 10001, whoever wrote it
worker=10001
api="python -u handler.py --rp_serve_api --rp_api_host 0.0.0.0"

if [ "$*" = "python -u handler.py" ] && [ -z "${RUNPOD_WEBHOOK_GET_JOB:-}${RUNPOD_REALTIME_PORT:-}" ]; then
    if [ -n "${RUNPOD_POD_ID:-}" ]; then
        echo "This is a pod of RunPod's and no endpoint, so no jobs come: it serves the API on port 8000, POST /runsync."
        # shellcheck disable=SC2086 # several words
        set -- $api
    else
        [ -e /dev/nvidiactl ] && card=" --gpus all" || card=""
        options="docker run$card --rm -e MODEL_NAME=$MODEL_NAME${HF_TOKEN:+ -e HF_TOKEN=your_token}"
        kept="-v huggingface:/home/worker/huggingface"
        cat <<END
This is a FLUX worker for RunPod, and RunPod is not here: it draws test_input.json into /app/outputs and ends.
A picture in a folder of yours, and downloads that are kept:
  $options -v "\$PWD/outputs:/app/outputs" $kept flux2-endpoint python local_test.py --prompt "a fox"
An API on port 8000, POST /runsync:
  $options -p 8000:8000 $kept flux2-endpoint $api
END
        set -- python -u local_test.py
    fi
fi

if [ "$(id -u)" = 0 ]; then
    user=$worker group=$worker
    owner=$(stat -c %u /app/outputs 2>/dev/null || echo 0)
    if [ "$owner" != 0 ] && [ "$owner" != "$worker" ]; then # so the pictures are theirs who mounted it
        user=$owner group=$(stat -c %g /app/outputs)
        chown "$user" /home/worker 2>/dev/null || true
    fi
    mkdir -p "$HF_HOME" 2>/dev/null || true
    for folder in "$HF_HOME" /app/outputs "${LORA_CACHE_DIR:-/tmp/loras}" \
        "${QUANTIZED_DIR:-/runpod-volume/quantized}" "${COMPILE_CACHE_DIR:-/runpod-volume/compile-cache}"; do
        mkdir "$folder" 2>/dev/null || true # on a volume that is there, that is: not its parents
        if [ ! -d "$folder" ] || [ "$(stat -c %u "$folder")" = "$user" ]; then
            continue
        fi
        # Else only what is new or empty: to give away all that a volume holds may take minutes.
        if [ "$folder" = /app/outputs ] || [ -z "$(ls -A "$folder")" ]; then
            { chown "$user:$worker" "$folder" && chmod 2775 "$folder"; } 2>/dev/null || true
        fi
    done
    become="setpriv --reuid $user --regid $group --groups $worker --no-new-privs --"
    if $become true 2>/dev/null; then
        # shellcheck disable=SC2086 # several words
        set -- $become "$@"
    else
        echo "WARNING: the worker stays root: this container may not change its user (--cap-drop); give --user $worker" >&2
    fi
fi
exec "$@"
