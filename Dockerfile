# One image for server and worker; compose.yaml says which is which. For NVIDIA GPUs, torch from PyPI:
#   docker build --build-arg TORCH_INDEX=https://pypi.org/simple --build-arg EXTRAS=s3,dask,gpu -t tribunal .
FROM docker.io/library/python:3.11-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=s3,dask

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    HOME=/var/lib/tribunal \
    HF_HOME=/var/lib/tribunal/huggingface \
    PREFECT_HOME=/var/lib/tribunal/prefect \
    TRIBUNAL_STORE=/var/lib/tribunal/store \
    TRIBUNAL_ROOT=/app \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=1

RUN groupadd --gid 10001 tribunal \
 && useradd --uid 10001 --gid tribunal --home-dir /var/lib/tribunal --no-log-init tribunal \
 && install --directory --owner tribunal --group tribunal --mode 0750 /var/lib/tribunal

WORKDIR /app

# torch, then all other packages, then the code: what changes most often comes last
RUN pip install --index-url "${TORCH_INDEX}" "torch==2.13.0"

COPY pyproject.toml ./
COPY deploy/constraints.txt deploy/
RUN touch README.md LICENSE \
 && pip install --constraint deploy/constraints.txt ".[${EXTRAS}]" \
 && pip uninstall --yes tribunal \
 && rm -rf build tribunal.egg-info

COPY README.md LICENSE prefect.yaml ./
COPY artifacts/ artifacts/
COPY tasks/ tasks/
COPY flows/ flows/
COPY deploy/ deploy/
RUN pip install --no-deps --editable .

USER 10001:10001
EXPOSE 4200
CMD ["tribunal", "worker"]
