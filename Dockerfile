# syntax=docker/dockerfile:1
# Any Debian or Ubuntu with Python 3.11 or newer; torch's wheels bring CUDA's libraries along, the host the driver.
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}

# gcc and Python's headers are what torch.compile needs. Debian keeps only the newest build of a package: no pins.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 worker \
    && install -d -o worker /app/outputs \
    && python3 -m venv /opt/venv

ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/home/worker \
    HF_HOME=/home/worker/huggingface \
    DIFFUSERS_VERBOSITY=error \
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /app
# Each package is held against its hashes, and none is built here.
COPY locked/torch.txt locked/cuda.txt locked/runtime.txt locked/quantization.txt locked/
RUN pip install --no-cache-dir --no-deps --only-binary :all: --require-hashes \
        -r locked/torch.txt -r locked/cuda.txt -r locked/runtime.txt -r locked/quantization.txt \
    && pip check

# BAKE_MODEL=true puts the weights into the image (a hub id as MODEL_NAME):
#   docker build --build-arg BAKE_MODEL=true --secret id=HF_TOKEN,env=HF_TOKEN -t flux2-endpoint .
USER 10001
ARG MODEL_NAME=black-forest-labs/FLUX.1-dev
ARG BAKE_MODEL=false
ENV MODEL_NAME=${MODEL_NAME}
RUN --mount=type=secret,id=HF_TOKEN,mode=0444 \
    if [ "${BAKE_MODEL}" = true ]; then \
        if [ -f /run/secrets/HF_TOKEN ]; then HF_TOKEN="$(cat /run/secrets/HF_TOKEN)"; export HF_TOKEN; fi; \
        hf download "${MODEL_NAME}" --include "*.json" --include "*/*.json" --include "*/*.txt" \
            --include "*/*.model" --include "*/*.jinja" --include "*/*.safetensors"; \
    fi

COPY models models
COPY src src
COPY handler.py local_test.py test_input.json ./
CMD ["python", "-u", "handler.py"]
