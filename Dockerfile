# syntax=docker/dockerfile:1
# Two images: `--target converter` (ckpt2pt) and `--target operator` (ckpt2pt-operator).
#
#   docker buildx build --target converter --platform linux/amd64,linux/arm64 --tag REGISTRY/ckpt2pt:VERSION --push .
#
# The base needs python3 (3.11 or newer) with venv.  To pin it for good, give its digest as well:
#   --build-arg BASE_IMAGE=docker.io/library/python:3.12.11-slim-bookworm@sha256:...   (docker buildx imagetools inspect IMAGE)
# A base without venv or a shell, as a distroless python, takes a BUILD_IMAGE beside it that has the same python3 at the
# same path.  A mirror of the package index, a certificate: --secret id=pip.conf,src=FILE --secret id=ca.crt,src=FILE;
# pip.conf finds the certificate at /run/ca.crt.
ARG BASE_IMAGE=docker.io/library/python:3.12.11-slim-bookworm
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM ${BUILD_IMAGE} AS tools
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_QUIET=1
COPY requirements/bootstrap.txt requirements/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt,target=/run/ca.crt \
    python3 -m venv /opt/tools && \
    python3 -m venv --without-pip /opt/ckpt2pt && \
    /opt/tools/bin/pip install --require-hashes -r requirements/bootstrap.txt

FROM tools AS wheel
COPY pyproject.toml README.md LICENSE ./
COPY converter/ converter/
COPY operator/ operator/
COPY crds/ crds/
RUN /opt/tools/bin/python -m hatchling build -t wheel -d /wheel

# Dependencies before our own code, which changes more often.  pip compiles what it installs, so that nothing has to be
# compiled when a pod starts.
FROM tools AS converter-installed
COPY requirements/core.txt requirements/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt,target=/run/ca.crt \
    /opt/tools/bin/pip --python /opt/ckpt2pt/bin/python3 install --compile --require-hashes --no-deps -r requirements/core.txt
COPY --from=wheel /wheel /wheel
RUN /opt/tools/bin/pip --python /opt/ckpt2pt/bin/python3 install --compile --no-index --no-deps /wheel/*.whl

FROM tools AS operator-installed
COPY requirements/operator.txt requirements/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt,target=/run/ca.crt \
    /opt/tools/bin/pip --python /opt/ckpt2pt/bin/python3 install --compile --require-hashes --no-deps -r requirements/operator.txt
COPY --from=wheel /wheel /wheel
RUN /opt/tools/bin/pip --python /opt/ckpt2pt/bin/python3 install --compile --no-index --no-deps /wheel/*.whl

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
COPY --from=operator-installed /opt/ckpt2pt /opt/ckpt2pt
ENTRYPOINT ["ckpt2pt-operator"]

# Last, so that it is what a build without --target makes.
FROM base AS converter
LABEL org.opencontainers.image.title=ckpt2pt \
      org.opencontainers.image.description="Converts MindSpore training checkpoints into Megatron-LM checkpoints"
COPY --from=converter-installed /opt/ckpt2pt /opt/ckpt2pt
ENTRYPOINT ["ckpt2pt"]
