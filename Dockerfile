# Two images from one file: the API, without torch, and the engine.
#
#   docker build --target api --tag glimmer-api .
#   docker build --target engine --tag glimmer-engine .
#   docker build --target engine --tag glimmer-engine:cpu --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu .
#
# On x86-64 PyPI's torch includes CUDA (several GB); the last line builds an engine for machines without a GPU.

FROM python:3.12-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Exact versions with hashes; `make lock` writes these files.
COPY deploy/requirements /requirements
# The environment has no pip: nothing in the images needs one.
RUN python -m venv --without-pip /opt/venv \
    && pip install --no-deps --require-hashes --requirement /requirements/build.txt
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./

# Dependencies before code, so that a code change rebuilds only the last layers.
FROM build AS build-api
RUN pip --python /opt/venv install --no-deps --require-hashes --requirement /requirements/api.txt
COPY server ./server
COPY engine ./engine
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip --python /opt/venv install --no-deps --no-index /wheels/*.whl \
    && pip --python /opt/venv check

FROM build AS build-engine
# Empty: torch with CUDA from PyPI. Otherwise an index with another build of the same version.
ARG TORCH_INDEX_URL=""
RUN if [ -n "$TORCH_INDEX_URL" ]; then \
        pip --python /opt/venv install --no-deps --index-url "$TORCH_INDEX_URL" \
            "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' /requirements/torch.txt)"; \
    else \
        pip --python /opt/venv install --no-deps --require-hashes --requirement /requirements/torch.txt; \
    fi \
    && pip --python /opt/venv install --no-deps --require-hashes --requirement /requirements/engine.txt
COPY server ./server
COPY engine ./engine
COPY models ./models
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip --python /opt/venv install --no-deps --no-index /wheels/*.whl \
    && pip --python /opt/venv check

FROM python:3.12-slim-bookworm AS runtime
LABEL org.opencontainers.image.title="Glimmer" \
      org.opencontainers.image.description="A high-throughput inference server for GLM-Image" \
      org.opencontainers.image.licenses="Apache-2.0"
# A numeric user lets an orchestrator check that it is not root. Its home is the only folder that it can write to.
RUN groupadd --gid 10001 glimmer \
    && useradd --uid 10001 --gid 10001 --home-dir /var/cache/glimmer --create-home --shell /usr/sbin/nologin glimmer
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /var/cache/glimmer
USER 10001:10001
ENTRYPOINT ["glimmer"]

FROM runtime AS engine
COPY --from=build-engine /opt/venv /opt/venv
# Triton, which torch for CUDA brings, compiles its launcher in C when an engine starts first.
USER 0:0
# hadolint ignore=DL3008
RUN if [ -d /opt/venv/lib/python3.12/site-packages/triton ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
USER 10001:10001
# Checkpoints from the hub and compiled kernels; mount a volume here to keep them. The small default checkpoint is part
# of the package.
ENV HF_HOME=/var/cache/glimmer/huggingface
VOLUME /var/cache/glimmer
# Looks at a file in /tmp that the engine writes every second, whatever the state of Redis. Loading a checkpoint counts
# as healthy, a hanging device does not.
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 \
    CMD ["glimmer", "health", "--engine"]
CMD ["engine"]

FROM runtime AS api
COPY --from=build-api /opt/venv /opt/venv
ENV GLIMMER_HOST=0.0.0.0 GLIMMER_PORT=8000
EXPOSE 8000
# Whether this process answers (GET /live). Load balancers ask GET /health: whether a request would be served.
HEALTHCHECK --interval=5s --timeout=5s --start-period=20s --retries=3 \
    CMD ["glimmer", "health"]
CMD ["api"]
