# Terrace on a CPU, as an unprivileged user:
#   docker build -t terrace .
#   docker run --rm -p 127.0.0.1:8000:8000 terrace                      # the demo model
#   docker run --rm -p 127.0.0.1:8000:8000 -v terrace:/var/lib/terrace terrace serve <hub id>
FROM python:3.12-slim

# Package index for torch alone; PyTorch's index of CPU wheels saves several GB of CUDA libraries.
ARG TORCH_INDEX=""

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN ${TORCH_INDEX:+env PIP_INDEX_URL="$TORCH_INDEX"} pip install 'torch>=2.11,<2.14'

WORKDIR /opt/terrace
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY loadgen loadgen
RUN pip install . \
 && useradd --system --uid 10001 --home-dir /var/lib/terrace --create-home terrace

USER terrace
WORKDIR /var/lib/terrace
VOLUME /var/lib/terrace
ENV HF_HOME=/var/lib/terrace/huggingface TERRACE_SERVER__HOST=0.0.0.0 TERRACE_SERVER__PORT=8000
EXPOSE 8000

# /livez, not /readyz: a container that loads weights or drains is alive and must not be killed for it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", \
  "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['TERRACE_SERVER__PORT'] + '/livez', timeout=4)"]

ENTRYPOINT ["terrace"]
CMD ["serve", "demo"]
