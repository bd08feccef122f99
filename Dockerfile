# syntax=docker/dockerfile:1
# Two images: `--target converter` (ckpt2pt) and `--target operator` (ckpt2pt-operator).
#
# `docker buildx bake --push` (docker-bake.hcl) and `make push` (buildah) build both for amd64 and arm64.  Programs run in stages
# of the builder's own architecture only, so no emulation is needed.
#
# The base needs python3 (3.11 or newer) with venv.  To pin it for good, give its digest as well:
#   BASE_IMAGE=docker.io/library/python:3.12.11-slim-bookworm@sha256:...   (docker buildx imagetools inspect IMAGE)
# A base without venv or a shell, as a distroless python, takes a BUILD_IMAGE beside it that has the same python3 at the
# same path.  A mirror of the package index, a certificate: --secret id=pip.conf,src=FILE --secret id=ca.crt,src=FILE;
# pip.conf finds the certificate at /run/ca.crt.
ARG BASE_IMAGE=docker.io/library/python:3.12.11-slim-bookworm
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM --platform=${BUILDPLATFORM} ${BUILD_IMAGE} AS tools
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

# The tags of wheels that the base's libc can load, for the image's architecture in place of the builder's.
FROM tools AS target
ARG TARGETARCH
RUN /opt/tools/bin/python -c 'import platform, sys; from packaging.tags import platform_tags; \
    machine = {"amd64": "x86_64", "arm64": "aarch64"}[sys.argv[1]]; \
    print(*(f"--platform={tag.replace(platform.machine(), machine)}" for tag in platform_tags()))' ${TARGETARCH} > /opt/tools/platform && \
    /opt/ckpt2pt/bin/python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > /opt/tools/site-packages

# Dependencies before our own code, which changes more often.  Everything is compiled, so that nothing has to be compiled when a
# pod starts.
FROM target AS converter-installed
COPY requirements/core.txt requirements/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt,target=/run/ca.crt \
    /opt/tools/bin/pip --python /opt/ckpt2pt/bin/python3 install --require-hashes --no-deps --only-binary=:all: --no-compile \
    $(cat /opt/tools/platform) --target $(cat /opt/tools/site-packages) -r requirements/core.txt && \
    rm -r $(cat /opt/tools/site-packages)/bin && /opt/ckpt2pt/bin/python3 -m compileall -q /opt/ckpt2pt
COPY --from=wheel /wheel /wheel
RUN /opt/tools/bin/pip --python /opt/ckpt2pt/bin/python3 install --compile --no-index --no-deps /wheel/*.whl

FROM target AS operator-installed
COPY requirements/operator.txt requirements/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt,target=/run/ca.crt \
    /opt/tools/bin/pip --python /opt/ckpt2pt/bin/python3 install --require-hashes --no-deps --only-binary=:all: --no-compile \
    $(cat /opt/tools/platform) --target $(cat /opt/tools/site-packages) -r requirements/operator.txt && \
    rm -r $(cat /opt/tools/site-packages)/bin && /opt/ckpt2pt/bin/python3 -m compileall -q /opt/ckpt2pt
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
