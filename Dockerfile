# The service's image: a slim Python, the locked packages, the service. What builds and tests it stays outside.
#
#   docker build --build-arg BASE=docker.io/library/python:3.13-slim-trixie@sha256:… --build-arg REVISION="$(git rev-parse HEAD)" .
#
# Whoever builds gives the base by its digest, so that one commit has one image. It must be Debian 13 or later: its restic
# (0.18) is the first that Inspect's checkpoints accept, its bubblewrap (0.11) has what the sandbox asks for.
ARG BASE=docker.io/library/python:3.13-slim-trixie

FROM ${BASE} AS build
WORKDIR /build
COPY requirements.lock pyproject.toml .ci/locked.py ./
# Wheels only: nothing is compiled, so no compiler is needed, here neither. --no-deps: the lock is complete (`pip check`
# says so), and pip may not look past it.
RUN python3 -m venv --without-pip /opt/venv \
 && python3 -m venv --without-pip /opt/backend \
 && python3 locked.py '[google]' > service.lock \
 && python3 locked.py hatchling > backend.lock \
 && python3 -m pip --python /opt/venv/bin/python3 install --no-cache-dir --no-compile --root-user-action ignore \
      --only-binary :all: --no-deps --require-hashes -r service.lock \
 && python3 -m pip --python /opt/backend/bin/python3 install --no-cache-dir --no-compile --root-user-action ignore \
      --only-binary :all: --no-deps --require-hashes -r backend.lock
COPY . .
# Bytecode is made once, here, since the service may not write it. It is never compared with its source (unchecked-hash):
# nothing changes in an image, and builders may well change the times of files.
RUN python3 -m pip --python /opt/backend/bin/python3 wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
 && python3 -m pip --python /opt/venv/bin/python3 install --no-cache-dir --no-compile --root-user-action ignore \
      --no-deps dist/*.whl \
 && python3 -m pip --python /opt/venv/bin/python3 check \
 && /opt/venv/bin/python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib

FROM ${BASE}
# /workspace and /opt/pytest are where Cloud Run's own sandbox mounts a sample's files: it may not make them.
# Python's own library too: the official images come without its bytecode, which each start would make again.
# hadolint ignore=DL3008  # Debian 13 has one version of each, and security fixes are wanted
RUN apt-get update \
 && apt-get install --yes --no-install-recommends bubblewrap mount restic util-linux \
 && rm -rf /var/lib/apt/lists/* \
 && mkdir --parents /workspace /opt/pytest \
 && useradd --uid 10001 --no-log-init --create-home proctor \
 && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash -x '/(test|idlelib|site-packages|dist-packages)/' \
      "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
COPY --from=build /opt/venv /opt/venv
ARG REVISION=unknown
LABEL org.opencontainers.image.title="proctor" \
      org.opencontainers.image.revision="${REVISION}"
ENV HOME=/home/proctor \
    PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PROCTOR_HOST=0.0.0.0 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /home/proctor
# By number, so that whoever runs it can tell that it is not root.
USER 10001:10001
EXPOSE 8080
# One process serves; evaluations run in its children. The same image migrates, as a job: `proctor migrate`.
CMD ["proctor", "serve"]
