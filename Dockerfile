FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PATH=/opt/libration/bin:$PATH
RUN python -m venv /opt/libration /opt/build
# The CPU build of torch has an index of its own; all that it depends on is in the lock.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN pip install --no-deps --index-url "$TORCH_INDEX_URL" torch==2.13.0
WORKDIR /src
COPY deploy/locks ./locks
RUN pip install --no-deps --only-binary :all: --require-hashes -r locks/serving.lock \
    && /opt/build/bin/pip install --no-deps --only-binary :all: --require-hashes -r locks/build.lock
COPY pyproject.toml README.md LICENSE ./
COPY keystore ./keystore
COPY model ./model
COPY server ./server
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
    && pip install --no-deps dist/*.whl
WORKDIR /
# For the processor of the machine that builds; another one compiles in memory at every start.
RUN python -m model.native

FROM python:3.11-slim-bookworm
COPY --from=build /opt/libration /opt/libration
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin libration \
    && install -d -o libration -g libration /var/lib/libration
ENV PATH=/opt/libration/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    LIBRATION_DATA_DIR=/var/lib/libration
USER 10001:10001
WORKDIR /var/lib/libration
EXPOSE 8000 9100
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health/live', timeout=4)"]
ENTRYPOINT ["libration"]
CMD ["serve"]
