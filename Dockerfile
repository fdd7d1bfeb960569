# One image for coordinator, servers and workers; docker-compose.yml says how it is used.
#
# The package index gives Linux a torch with gigabytes of CUDA; give the build another one that has the CPU builds (the address is
# on pytorch.org under "Get started") and pip takes that:
#
#   PIP_EXTRA_INDEX_URL=ADDRESS docker-compose build

# A server, a worker with a script of yours and a coordinator need no extra. The built-in example needs its data: EXTRA=explore.

# What has to be installed, on its own: the layers below depend on this list and not on the rest of pyproject.toml.
FROM python:3.11-slim AS requirements
ARG EXTRA=""
COPY pyproject.toml ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*sorted(project['dependencies'] + project['optional-dependencies'].get('$EXTRA', [])), sep='\n')" > /requirements.txt

FROM python:3.11-slim
RUN useradd --create-home trainer && mkdir /runs && chown trainer /runs
WORKDIR /app
ARG PIP_EXTRA_INDEX_URL
COPY --from=requirements /requirements.txt ./
COPY constraints.txt ./
RUN pip install --no-cache-dir --disable-pip-version-check -c constraints.txt -r requirements.txt

COPY pyproject.toml README.md LICENSE /source/
COPY roundtable /source/roundtable
COPY common /source/common
COPY ps /source/ps
COPY worker /source/worker
COPY cluster /source/cluster
COPY explore /source/explore
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps /source && rm -r /source
USER trainer
ENV PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
ENTRYPOINT ["roundtable"]
