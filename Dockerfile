# The server, for the CPU by default; docs/serving.md has the commands, those for GPUs too.

# Any image of Debian or Ubuntu, with Python 3.11 or newer or without Python.
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
# hadolint ignore=DL3008
RUN python3 -c "import ensurepip, venv" || \
    { apt-get update && apt-get install -y --no-install-recommends python3-venv; }
WORKDIR /source
COPY requirements.lock ./
# What pip installs for PyTorch: a build without CUDA takes gigabytes less.
ARG TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
# hadolint ignore=DL3013,SC2086
RUN python3 -m venv /opt/gptsmith && \
    /opt/gptsmith/bin/pip install --no-cache-dir -c requirements.lock ${TORCH}
COPY LICENSE README.md pyproject.toml ./
COPY gptsmith gptsmith
RUN /opt/gptsmith/bin/pip wheel --no-cache-dir --no-deps --wheel-dir dist . && \
    /opt/gptsmith/bin/pip install --no-cache-dir -c requirements.lock "$(echo dist/*.whl)[serve]"

FROM ${BASE}
# With the compiler, which makes code for the processor that the server runs on, text is generated
# faster on a CPU.
ARG PACKAGES=g++
# hadolint ignore=DL3008,SC2086
RUN python3 --version || missing=python3; \
    apt-get update && apt-get install -y --no-install-recommends ${PACKAGES} ${missing} && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --uid 10001 --create-home gptsmith
COPY --from=build /opt/gptsmith /opt/gptsmith
ENV PATH=/opt/gptsmith/bin:$PATH
USER 10001
WORKDIR /home/gptsmith
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s CMD ["python", "-c", "from http.client import HTTPConnection; server = HTTPConnection('127.0.0.1', 8000, timeout=4); server.request('GET', '/health'); assert server.getresponse().status == 200"]
ENTRYPOINT ["gptsmith"]
CMD ["serve", "/model", "--host", "0.0.0.0"]
