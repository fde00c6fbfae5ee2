# docker build -t cnn_jax .                      for NVIDIA GPUs, with the CUDA that JAX brings
# docker build -t cnn_jax --build-arg EXTRA=tpu . for TPUs
# docker build -t cnn_jax --build-arg EXTRA=cuda12,gs . with runs on gs://; s3 likewise
# docker build -t cnn_jax-serve --build-arg EXTRA=cuda12,serve . to serve: docs/production.md
# docker run --gpus all --shm-size=1g -v $PWD/runs:/app/runs cnn_jax --config configs/quickstart.py
FROM python:3.12-slim

ARG EXTRA=cuda12
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY cnn_jax cnn_jax
RUN pip install --no-cache-dir -e ".[$EXTRA]"
COPY configs configs
COPY train.py ./
# Huge pages for large arrays on the host (docs/performance.md, "Memory of steps on a CPU").
ENV GLIBC_TUNABLES=glibc.malloc.hugetlb=1

ENTRYPOINT ["python", "train.py"]
