FROM python:3.11-slim

WORKDIR /app
COPY constraints.txt pyproject.toml ./
# the dependencies have a layer of their own, so that a change of the code does not fetch them again
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install --no-cache-dir -c constraints.txt -r requirements.txt

COPY launch.py ./
COPY common common
COPY ps ps
COPY worker worker
COPY cluster cluster
RUN useradd --create-home trainer && mkdir /runs && chown trainer /runs
USER trainer
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
ENTRYPOINT ["python", "launch.py"]
