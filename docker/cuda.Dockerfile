# NVIDIA GPUs: the CUDA libraries come with JAX's wheels, so the host needs a driver and the NVIDIA
# container toolkit alone. From a checkout:
#
#   docker build -f docker/cuda.Dockerfile -t repvgg-jax:cuda .
#   docker run --gpus all --ipc=host -v /data:/data -v "$PWD/runs:/work/runs" repvgg-jax:cuda \
#     repvgg-train --config b1 --workdir runs/b1 --config.data.source=folder:/data/imagenet
FROM python:3.12.11-slim-bookworm

ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all \
    PYTHONUNBUFFERED=1

WORKDIR /opt/repvgg_jax
COPY pyproject.toml setup.py README.md LICENSE ./
COPY requirements*.txt ./
COPY configs configs
COPY repvgg_jax repvgg_jax
RUN pip install --no-cache-dir ".[train,export,cuda]" \
    && useradd --create-home --uid 1000 repvgg \
    && mkdir /work && chown repvgg /work

WORKDIR /work
USER repvgg
CMD ["repvgg-train", "--help"]
