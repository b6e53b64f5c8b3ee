# Quire's images: one file, one target each.
#
#   docker build --target operator   -t quire/operator   .
#   docker build --target gateway    -t quire/gateway    .
#   docker build --target server-cpu -t quire/server-cpu .
#   docker build --target server-cuda -t quire/server-cuda .
#
# BASE_IMAGE       any Debian-like image with python3 ≥ 3.11 and its venv module
# TORCH_INDEX_URL  a further package index for torch: PyTorch's own with CPU builds, which its installation page names,
#                  keeps server-cpu under a gigabyte; without it the default index's build comes, with CUDA
# KERNELS          how the CPU kernels come: `build` compiles them, `prebuilt` takes kernels/quire_kernels/_cpu/lib as it is
# PIP_INDEX_URL    another package index; certificates and a pip.conf can be mounted (-v) and never enter an image
# VERSION, REVISION   for the labels
#
# Wheels from a folder, tried before any index:   --build-context wheels=FOLDER
# (a constraints.txt in it holds)
#
# Every image: numeric user, any user of any group works; nothing outside /tmp and mounts is written; no compiler, no pip.

ARG BASE_IMAGE=python:3.12-slim

FROM scratch AS wheels

FROM ${BASE_IMAGE} AS base
ENV PATH=/opt/quire/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    LOGNAME=quire
# LOGNAME: a user that /etc/passwd does not know still has a name, which some libraries ask for.

# --- Building -------------------------------------------------------------------------------------------------------

FROM base AS builder
ARG PIP_INDEX_URL
RUN python3 -m venv /opt/build && /opt/build/bin/pip install --quiet --no-cache-dir 'hatchling>=1.27' \
    && python3 -m venv --without-pip /opt/quire
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
WORKDIR /src
COPY deploy/image deploy/image

# The wheel, which all images share.
FROM builder AS wheel
ARG KERNELS=build
RUN if [ "$KERNELS" = build ] && ! command -v g++ >/dev/null; then \
      apt-get update -q && apt-get install -q -y --no-install-recommends g++; \
    fi
COPY kernels kernels
RUN case "$KERNELS" in \
      build) python3 deploy/image/kernels.py ;; \
      prebuilt) ls kernels/quire_kernels/_cpu/lib/*.so ;; \
      *) echo "KERNELS is '$KERNELS'; it must be build or prebuilt"; exit 1 ;; \
    esac
COPY pyproject.toml README.md LICENSE ./
COPY contract contract
COPY kube kube
COPY crds crds
COPY operator operator
COPY gateway gateway
COPY server server
COPY cli cli
RUN /opt/build/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /dist .

# Only Quire itself, laid out so that it can be copied over any of the environments below.
FROM builder AS quire
COPY --from=wheel /dist /dist
RUN /opt/build/bin/pip --python /opt/quire/bin/python install --quiet --no-deps /dist/*.whl \
    && python3 deploy/image/venv.py finish \
    && mkdir -p /overlay/bin /overlay/lib && cp /opt/quire/bin/quire /overlay/bin/ && cp -r /opt/quire/lib/. /overlay/lib/

FROM builder AS pyproject
COPY pyproject.toml ./

# One environment for each image. A change of the sources leaves these as they are.
FROM pyproject AS operator-environment
ARG PIP_INDEX_URL
RUN --mount=type=bind,from=wheels,source=/,target=/wheels \
    python3 deploy/image/venv.py install --pip /opt/build/bin/pip --wheels /wheels operator

FROM pyproject AS gateway-environment
ARG PIP_INDEX_URL
RUN --mount=type=bind,from=wheels,source=/,target=/wheels \
    python3 deploy/image/venv.py install --pip /opt/build/bin/pip --wheels /wheels gateway

FROM pyproject AS server-cpu-environment
ARG PIP_INDEX_URL
ARG TORCH_INDEX_URL=
RUN --mount=type=bind,from=wheels,source=/,target=/wheels \
    python3 deploy/image/venv.py install --pip /opt/build/bin/pip --wheels /wheels --index "$TORCH_INDEX_URL" server download

FROM pyproject AS server-cuda-environment
ARG PIP_INDEX_URL
ARG TORCH_INDEX_URL=
RUN --mount=type=bind,from=wheels,source=/,target=/wheels \
    python3 deploy/image/venv.py install --pip /opt/build/bin/pip --wheels /wheels --index "$TORCH_INDEX_URL" server download cuda

# --- Images ---------------------------------------------------------------------------------------------------------

FROM base AS image
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
WORKDIR /tmp
USER 65532:65532
ENTRYPOINT ["quire"]

FROM image AS operator
LABEL org.opencontainers.image.title="Quire operator"
COPY --from=operator-environment /opt/quire /opt/quire
COPY --from=quire /overlay /opt/quire
EXPOSE 8080 9090
CMD ["operator"]

FROM image AS gateway
LABEL org.opencontainers.image.title="Quire gateway"
COPY --from=gateway-environment /opt/quire /opt/quire
COPY --from=quire /overlay /opt/quire
EXPOSE 8080
CMD ["gateway", "--config", "/etc/quire/gateway.yaml"]

# Triton compiles small C modules with $CC, gcc or clang and Python's headers when its first kernel starts. This image has
# no compiler: it serves with torch's own kernels, and a kernel of Triton's needs an image built on top that adds gcc.
FROM image AS server-cuda
LABEL org.opencontainers.image.title="Quire server for NVIDIA GPUs"
COPY --from=server-cuda-environment /opt/quire /opt/quire
COPY --from=quire /overlay /opt/quire
EXPOSE 8000
CMD ["serve", "--help"]

FROM image AS server-cpu
LABEL org.opencontainers.image.title="Quire server for CPUs"
COPY --from=server-cpu-environment /opt/quire /opt/quire
COPY --from=quire /overlay /opt/quire
EXPOSE 8000
CMD ["serve", "--help"]
