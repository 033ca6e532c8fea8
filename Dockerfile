# One image for the server, the worker and the migrations, selected by the command: zeta server, zeta worker, zeta migrate.
#
#   docker build -t zeta .                                               # with CUDA, for GPU hosts
#   docker build -t zeta --build-arg TORCH_INDEX=URL .                   # without, several GB smaller; URL: the CPU index from pytorch.org/get-started
#   docker build -t zeta-server --build-arg EXTRAS=server,postgres .     # the server alone, without torch
#
# With `deepspeed` in EXTRAS, the image contains a C++ compiler, because DeepSpeed compiles at its first use.
# docker-compose.yml has the same default.
ARG PYTHON_IMAGE=python:3.11.16-slim@sha256:9c900dea9e8fb7e16277c179b555cc72d29a352dbc33cff48ad5a0412fd5bfc7

FROM ${PYTHON_IMAGE} AS build
ARG EXTRAS=train,quantize,server,worker,postgres,s3
ARG TORCH_INDEX=
# The cache is a mount on another file system, so uv copies files instead of linking them. The account of the service
# can't write bytecode, so it is compiled here; otherwise, each process would compile what it imports.
ENV VIRTUAL_ENV=/opt/zeta UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
WORKDIR /source
RUN case ",$EXTRAS," in *,deepspeed,*) \
        apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* ;; esac
COPY constraints.txt pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache \
    pip install --disable-pip-version-check --no-input --constraint constraints.txt uv \
    && python -m venv --without-pip /opt/zeta \
    && uv pip install --constraint constraints.txt --group build
# torch is by far the largest dependency and changes rarely, so it has its own layer.
RUN --mount=type=cache,target=/root/.cache \
    case ",$EXTRAS," in *,train,*|*,deepspeed,*|*,all,*) \
        uv pip install --constraint constraints.txt ${TORCH_INDEX:+--no-deps --index-url "$TORCH_INDEX"} torch ;; esac
COPY . .
RUN --mount=type=cache,target=/root/.cache \
    PATH=/opt/zeta/bin:$PATH uv pip install --constraint constraints.txt --no-build-isolation ".[$EXTRAS]"

FROM ${PYTHON_IMAGE}
ARG EXTRAS=train,quantize,server,worker,postgres,s3
RUN case ",$EXTRAS," in *,deepspeed,*) compiler=g++ ;; *) compiler= ;; esac \
    && apt-get update && apt-get install --yes --no-install-recommends tini $compiler && rm -rf /var/lib/apt/lists/*
# Named volumes inherit the owner of the folder on which they are first mounted.
RUN useradd --system --uid 10001 --home-dir /var/lib/zeta --shell /usr/sbin/nologin zeta \
    && install --directory --owner=zeta --group=zeta --mode=0750 /var/lib/zeta /artifacts \
    && install --directory --mode=0755 /data
COPY --from=build /opt/zeta /opt/zeta
# The container's address is reachable only where its port is published: on loopback, or through a proxy with TLS.
ENV PATH=/opt/zeta/bin:$PATH \
    HOME=/var/lib/zeta \
    PYTHONUNBUFFERED=1 \
    ZETA_HOME=/var/lib/zeta \
    ZETA_HOST=0.0.0.0 \
    ZETA_PORT=8400 \
    ZETA_BEHIND_PROXY=yes \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER zeta
WORKDIR /var/lib/zeta
EXPOSE 8400
# For the server. A worker has no port; GET /v1/workers shows its heartbeat.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"ZETA_PORT\"]}/readyz', timeout=4)"]
# Removes the processes whose parents have exited, such as the guards of runs; -s: also if it isn't the first process.
ENTRYPOINT ["tini", "-s", "--"]
CMD ["zeta", "server"]
