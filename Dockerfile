# Any Debian or Ubuntu with Python 3.11 or newer; torch's wheels bring CUDA's libraries along, the host the driver.
ARG BASE_IMAGE=debian:bookworm-slim@sha256:7c7b2c966bc9ee8cedfeef67e0e279108992c77681fa595db4a9d65c06ccc587
FROM ${BASE_IMAGE} AS base

# gcc and Python's headers are what torch.compile needs. Debian keeps only the newest build of a package: no pins.
# The folders are there so that new volumes take their owner from them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev python3 python3-dev python3-venv tini \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 worker \
    && install -d -m 2775 -o worker -g worker /app/outputs /home/worker/huggingface \
    && python3 -m venv --without-pip /opt/venv
WORKDIR /app

FROM base AS installer
COPY locked/build.txt locked/
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir --no-deps --only-binary :all: --require-hashes -r locked/build.txt

FROM base AS packages
ENV PATH=/opt/venv/bin:${PATH} \
    VIRTUAL_ENV=/opt/venv \
    UV_LINK_MODE=copy \
    UV_COMPILE_BYTECODE=1 \
    HOME=/home/worker \
    USER=worker \
    HF_HOME=/home/worker/huggingface \
    DIFFUSERS_VERBOSITY=error \
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Each package is held against its hashes, and none is built here. torch is a layer of its own: 5 of the image's 6 GB.
# TORCH=cpu takes its build without CUDA, for machines without a card; no registry has a hash of that one.
ARG TORCH=cuda
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
COPY locked/torch.txt locked/cuda.txt locked/
RUN --mount=type=bind,from=installer,source=/opt/uv/bin,target=/opt/uv/bin \
    --mount=type=cache,target=/var/cache/uv \
    case "${TORCH}" in \
        cuda) set -- --require-hashes -r locked/torch.txt -r locked/cuda.txt ;; \
        cpu) set -- --default-index "${TORCH_CPU_INDEX}" "$(grep -o '^torch==[^ ]*' locked/torch.txt)" ;; \
        *) echo "TORCH=${TORCH}: must be cuda or cpu" >&2; exit 1 ;; \
    esac \
    && /opt/uv/bin/uv pip install --cache-dir /var/cache/uv --no-deps --no-build "$@"

# What quantizes is off the import path (src/settings.py puts it there): diffusers imports it wherever it is.
COPY locked/runtime.txt locked/quantization.txt locked/
RUN --mount=type=bind,from=installer,source=/opt/uv/bin,target=/opt/uv/bin \
    --mount=type=cache,target=/var/cache/uv \
    /opt/uv/bin/uv pip install --cache-dir /var/cache/uv --no-deps --no-build --require-hashes -r locked/runtime.txt \
    && /opt/uv/bin/uv pip install --cache-dir /var/cache/uv --no-deps --no-build --require-hashes \
        -r locked/quantization.txt --target /opt/quantization \
    && /opt/uv/bin/uv pip check

# BAKE_MODEL=true puts the files of MODEL_NAME, BASE_MODEL and PROMPT_UPSAMPLER into the image, and the worker then asks
# nobody for them:
#   docker build --build-arg BAKE_MODEL=true --secret id=HF_TOKEN,env=HF_TOKEN -t flux2-endpoint .
# A stage of its own: what is copied out of it stays the same layer while the files do. What was downloaded is kept by the
# builder (`docker builder prune` frees it), so that a build after a change downloads what the hub has anew alone.
FROM packages AS weights
ARG MODEL_NAME=FLUX.1-dev
ARG MODEL_REVISION
ARG BASE_MODEL
ARG PROMPT_UPSAMPLER
ARG BAKE_MODEL=false
ARG HF_ENDPOINT
COPY models models
COPY src/*.py src/
COPY src/request src/request
COPY src/weights src/weights
RUN --mount=type=secret,id=HF_TOKEN \
    --mount=type=secret,id=CIVITAI_TOKEN \
    --mount=type=cache,target=/var/cache/huggingface \
    if [ -f /run/secrets/HF_TOKEN ]; then HF_TOKEN="$(cat /run/secrets/HF_TOKEN)"; export HF_TOKEN; fi; \
    if [ -f /run/secrets/CIVITAI_TOKEN ]; then CIVITAI_TOKEN="$(cat /run/secrets/CIVITAI_TOKEN)"; export CIVITAI_TOKEN; fi; \
    python -m src.weights.bake "${BAKE_MODEL}"

FROM packages
COPY models models
COPY --from=weights /app/weights weights
COPY scripts/entrypoint.sh handler.py local_test.py web.py test_input.json ./
COPY client client
COPY src src
ARG MODEL_NAME=FLUX.1-dev
ARG MODEL_REVISION
ARG BASE_MODEL
ARG PROMPT_UPSAMPLER
ENV MODEL_NAME=${MODEL_NAME} \
    MODEL_REVISION=${MODEL_REVISION} \
    BASE_MODEL=${BASE_MODEL} \
    PROMPT_UPSAMPLER=${PROMPT_UPSAMPLER}
ARG VERSION=1.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="flux-worker" \
      org.opencontainers.image.description="A RunPod serverless worker for FLUX" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# The entry point starts as root and drops to user 10001. tini passes signals on from the first moment; 143 is an end by
# SIGTERM before Python has its own way to end. -s: also where docker's --init stands before it.
ENTRYPOINT ["tini", "-s", "-e", "143", "--", "/app/entrypoint.sh"]
CMD ["python", "-u", "handler.py"]
