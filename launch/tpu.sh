#!/usr/bin/env bash
# Every host of a Cloud TPU slice runs the same command; what makes them one run, they learn from
# the TPU itself. With Google's gcloud, for the slice NAME in ZONE:
#
#     launch/tpu.sh NAME ZONE --config configs/synthetic.py --workdir gs://BUCKET/runs/synthetic
#
# --workdir is in a bucket, or on a file system that all hosts share, such as a Filestore share. The
# code is at ~/cnn_jax on every host, installed with: pip install -e ".[tpu,gs]"
set -euo pipefail
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd ~/cnn_jax && python train.py $(printf '%q ' "$@")"
