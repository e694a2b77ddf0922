#!/usr/bin/env bash
# Trains on all hosts of a TPU VM slice: creates the slice if necessary, installs this repository on every host and runs
# the same command on each; JAX finds the other hosts. Run it again, for example after a preemption, to resume.
#   NAME=crpo ZONE=us-west4-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite SHARE=10.0.0.2:/share \
#     scripts/launch/tpu_slice.sh --mesh 16x1 model.path=/share/Qwen2.5-3B-Instruct data.path=/share/medqa
# SHARE is an NFS export (such as Filestore's) that every host mounts at /share, for the workdir.
# The slice is billed until: gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE"
# --dry-run as the first argument prints the commands instead of running them.
set -euo pipefail
run() { "$@"; }
state() { gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --format='value(state)' 2>/dev/null || true; }
[ "${1:-}" = --dry-run ] && shift && run() { printf '%q ' "$@" && echo; } && state() { :; }
: "${NAME:?name of the slice}" "${ZONE:?its zone}" "${TYPE:?its accelerator type}" "${VERSION:?its runtime version}" "${SHARE:?HOST:/PATH of an NFS export}"

cd "$(dirname "$0")/../.."
on_all_hosts() { run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

case "$(state)" in PREEMPTED | TERMINATED) run gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet ;; esac
[ -n "$(state)" ] || run gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION"
run git archive --prefix=crpo_jax/ --output=crpo_jax.tar HEAD
run gcloud compute tpus tpu-vm scp crpo_jax.tar "$NAME": --zone="$ZONE" --worker=all
on_all_hosts "sudo mkdir -p /share && (mountpoint -q /share || (sudo apt-get -qq install -y nfs-common && sudo mount -t nfs $SHARE /share))"
on_all_hosts "tar xf crpo_jax.tar && cd crpo_jax && python3 -m pip install -q uv && python3 -m uv venv -q --allow-existing --python 3.12 && python3 -m uv pip install -q -e '.[tpu]'"
on_all_hosts "cd crpo_jax && .venv/bin/$(printf '%q ' python -m crpo_jax.train --workdir "/share/runs/$NAME" "$@")"
