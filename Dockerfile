# Terrace as an unprivileged user. Two images:
#   docker build -t terrace .                                  # for a CPU, the default
#   docker build -t terrace:cuda --target cuda .               # with CUDA libraries, for machines with an NVIDIA GPU
#   docker run --rm -p 127.0.0.1:8000:8000 terrace             # the demo model
#   docker run --rm -p 127.0.0.1:8000:8000 -v terrace:/var/lib/terrace terrace serve <hub id>
# TORCH_INDEX: a package index for torch alone; PyTorch's of CPU wheels saves the CPU image several GB of CUDA libraries.

FROM python:3.12-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/terrace/bin:$PATH
# A compiler for the native CPU kernels; it does not reach the images.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
 && python -m venv /opt/terrace
WORKDIR /src

# torch first: the largest layer, and the one that changes least.
FROM build AS build-cpu
ARG TORCH_INDEX=""
RUN ${TORCH_INDEX:+env PIP_INDEX_URL="$TORCH_INDEX"} pip install 'torch>=2.11,<2.14'
COPY pyproject.toml setup.py README.md LICENSE ./
COPY server server
COPY loadgen loadgen
# hadolint ignore=DL3013  # it is this tree, and pyproject.toml bounds what it needs
RUN pip install '.[otel]'

FROM build AS build-cuda
RUN pip install 'torch>=2.11,<2.14'
COPY pyproject.toml setup.py README.md LICENSE ./
COPY server server
COPY loadgen loadgen
# hadolint ignore=DL3013  # the same
RUN pip install '.[cuda,otel]'

FROM python:3.12-slim-bookworm AS runtime
# An entry in passwd: some libraries ask for the user's name. A number below, so that Kubernetes sees that it is not root.
RUN groupadd --gid 10001 terrace \
 && useradd --uid 10001 --gid 10001 --home-dir /var/lib/terrace --create-home --shell /usr/sbin/nologin terrace
ENV PATH=/opt/terrace/bin:$PATH PYTHONUNBUFFERED=1 HOME=/var/lib/terrace USER=terrace \
    HF_HOME=/var/lib/terrace/huggingface TERRACE_SERVER__HOST=0.0.0.0 TERRACE_SERVER__PORT=8000
USER 10001:10001
WORKDIR /var/lib/terrace
VOLUME /var/lib/terrace
EXPOSE 8000
# /livez, not /readyz: a container that loads weights or drains is alive and must not be killed for it. The start period
# is for the seconds until the port answers, on a slow machine.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD ["python", "-c", \
  "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['TERRACE_SERVER__PORT'] + '/livez', timeout=4)"]
ENTRYPOINT ["terrace"]
CMD ["serve", "demo"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/terrace /opt/terrace

FROM runtime AS cpu
COPY --from=build-cpu /opt/terrace /opt/terrace
