# TPU VMs: libtpu comes with JAX's wheels. On every host of the slice, from a checkout:
#
#   docker build -f docker/tpu.Dockerfile -t repvgg-jax:tpu .
#   docker run --privileged --net=host -v /data:/data -v "$PWD/runs:/work/runs" repvgg-jax:tpu \
#     repvgg-train --config b1 --workdir runs/b1 --config.data.source=records:/data/imagenet
#
# The container needs the devices (--privileged) and the host's network, through which the hosts of a
# slice find each other. The run directory must be one that all hosts share.
FROM python:3.12.11-slim-bookworm

ENV PYTHONUNBUFFERED=1

WORKDIR /opt/repvgg_jax
COPY pyproject.toml setup.py README.md LICENSE ./
COPY requirements*.txt ./
COPY configs configs
COPY repvgg_jax repvgg_jax
RUN pip install --no-cache-dir ".[train,export,tpu]" \
    && useradd --create-home --uid 1000 repvgg \
    && mkdir /work && chown repvgg /work

WORKDIR /work
USER repvgg
CMD ["repvgg-train", "--help"]
