# Two images from one file: the API, which carries no torch, and the engine, which does the work.
#
#   docker build --target api --tag glimmer-api .
#   docker build --target engine --tag glimmer-engine .
#   docker build --target engine --tag glimmer-engine:cpu --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu .
#
# On x86-64 the torch of PyPI brings CUDA along (several GB); the last line builds an engine for machines without a GPU.

FROM python:3.12-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# The environment has no pip of its own: nothing in the images needs one.
RUN python -m venv --without-pip /opt/venv
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./

# Dependencies come before the code, so that a change of code rebuilds only the last layer: without the packages beside
# it, pyproject.toml installs what it depends on and an empty Glimmer, which the last step replaces.
FROM build AS build-api
RUN pip --python /opt/venv install "./[otel]"
COPY server ./server
COPY engine ./engine
RUN pip --python /opt/venv install --no-deps --force-reinstall .

FROM build AS build-engine
# Looked at beside PyPI, if given. Its builds have a local version, such as 2.13.0+cpu, which pip takes for newer.
ARG TORCH_INDEX_URL=""
ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX_URL}
RUN pip --python /opt/venv install "./[engine,otel]"
COPY server ./server
COPY engine ./engine
COPY models ./models
RUN pip --python /opt/venv install --no-deps --force-reinstall .

FROM python:3.12-slim-bookworm AS runtime
LABEL org.opencontainers.image.title="Glimmer" \
      org.opencontainers.image.description="A high-throughput inference server for GLM-Image" \
      org.opencontainers.image.licenses="Apache-2.0"
# A number, so that an orchestrator can see that it is not root. Its home is the one folder that it may write to.
RUN groupadd --gid 10001 glimmer \
    && useradd --uid 10001 --gid 10001 --home-dir /var/cache/glimmer --create-home --shell /usr/sbin/nologin glimmer
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /var/cache/glimmer
USER 10001:10001
ENTRYPOINT ["glimmer"]

FROM runtime AS engine
COPY --from=build-engine /opt/venv /opt/venv
# Checkpoints from the hub; mount a volume here to keep them. The small default one is part of the installation.
ENV HF_HOME=/var/cache/glimmer/huggingface
VOLUME /var/cache/glimmer
# Looks for the engine's heartbeat in Redis. An engine that loads its checkpoint is healthy, one whose device hangs is not.
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
