# syntax=docker/dockerfile:1
# Two images: `--target converter` (ckpt2pt) and `--target operator` (ckpt2pt-operator).
#
#   docker buildx build --target converter --platform linux/amd64,linux/arm64 --tag REGISTRY/ckpt2pt:VERSION --push .
#
# The base needs python3 (3.11 or newer) with venv.  To pin it for good, give its digest:
#   --build-arg BASE_IMAGE=docker.io/library/python:3.12.11-slim-bookworm@sha256:...   (docker buildx imagetools inspect IMAGE)
# A base without venv, as a distroless python, takes a BUILD_IMAGE beside it with the same python3 at the same path.
# A mirror of the package index, or a certificate: --secret id=pip.conf,src=FILE --secret id=ca.crt,src=FILE
ARG BASE_IMAGE=docker.io/library/python:3.12.11-slim-bookworm
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM ${BUILD_IMAGE} AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
COPY requirements/ requirements/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt,target=/run/ca.crt \
    python3 -m venv /opt/build && \
    /opt/build/bin/pip install --quiet --require-hashes -r requirements/bootstrap.txt
COPY pyproject.toml README.md LICENSE ./
COPY converter/ converter/
COPY operator/ operator/
COPY crds/ crds/
RUN /opt/build/bin/python -m hatchling build -t wheel -d /wheel

# pip compiles what it installs, so that nothing is compiled when a pod starts.
FROM build AS build-converter
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt,target=/run/ca.crt \
    python3 -m venv --without-pip /opt/ckpt2pt && \
    /opt/build/bin/pip --python /opt/ckpt2pt/bin/python3 install --quiet --compile --require-hashes --no-deps -r requirements/core.txt && \
    /opt/build/bin/pip --python /opt/ckpt2pt/bin/python3 install --quiet --compile --no-index --no-deps /wheel/*.whl

FROM build AS build-operator
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt,target=/run/ca.crt \
    python3 -m venv --without-pip /opt/ckpt2pt && \
    /opt/build/bin/pip --python /opt/ckpt2pt/bin/python3 install --quiet --compile --require-hashes --no-deps -r requirements/operator.txt && \
    /opt/build/bin/pip --python /opt/ckpt2pt/bin/python3 install --quiet --compile --no-index --no-deps /wheel/*.whl

# From here on nothing is run, so the base needs no shell.
FROM ${BASE_IMAGE} AS base
ENV PATH=/opt/ckpt2pt/bin:/usr/local/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
WORKDIR /tmp
USER 65532:65532
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.revision=${REVISION}

FROM base AS operator
LABEL org.opencontainers.image.title=ckpt2pt-operator \
      org.opencontainers.image.description="Carries out CheckpointConversions on a Kubernetes cluster"
COPY --from=build-operator /opt/ckpt2pt /opt/ckpt2pt
ENTRYPOINT ["ckpt2pt-operator"]

FROM base AS converter
LABEL org.opencontainers.image.title=ckpt2pt \
      org.opencontainers.image.description="Converts MindSpore training checkpoints into Megatron-LM checkpoints"
COPY --from=build-converter /opt/ckpt2pt /opt/ckpt2pt
ENTRYPOINT ["ckpt2pt"]
