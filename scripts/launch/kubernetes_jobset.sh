#!/usr/bin/env bash
# Trains on several nodes of a Kubernetes cluster as a JobSet (jobset.sigs.k8s.io), one pod per node.
#   NAME=crpo HOSTS=2 IMAGE=registry/crpo_jax:1 CLAIM=shared scripts/launch/kubernetes_jobset.sh --mesh 16x1 model.path=/share/Qwen2.5-3B-Instruct
# IMAGE has this package installed. CLAIM is a volume that all pods mount at /share (ReadWriteMany), for the workdir.
# DEVICE and DEVICES are the resources of a pod: nvidia.com/gpu 8, or on GKE google.com/tpu 4, with
# SELECTOR='cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice, cloud.google.com/gke-tpu-topology: 4x4'.
# When a pod dies, the others end too; all restart from the last checkpoint, up to RESTARTS times.
# --dry-run as the first argument prints the manifest instead of applying it.
set -euo pipefail
apply() { kubectl apply -f -; }
[ "${1:-}" = --dry-run ] && shift && apply() { cat; }
: "${NAME:?name of the job}" "${HOSTS:?number of pods}" "${IMAGE:?image with crpo_jax installed}" "${CLAIM:?volume claim shared by all pods}"

command=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' python -m crpo_jax.train --workdir "/share/runs/$NAME" "$@")
apply <<JOBSET
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-20}
  replicatedJobs:
    - name: host
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: $HOSTS
          parallelism: $HOSTS
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 600 # finish the step, save, stop
              nodeSelector: {${SELECTOR:-}}
              containers:
                - name: train
                  image: $IMAGE
                  command: $command
                  env:
                    - name: JAX_COORDINATOR_ADDRESS
                      value: $NAME-host-0-0.$NAME:8476
                    - name: JAX_NUM_PROCESSES
                      value: "$HOSTS"
                    - name: JAX_PROCESS_ID
                      valueFrom:
                        fieldRef:
                          fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
                  resources:
                    limits:
                      ${DEVICE:-nvidia.com/gpu}: ${DEVICES:-8}
                  volumeMounts:
                    - {name: share, mountPath: /share}
                    - {name: shm, mountPath: /dev/shm} # NCCL's, larger than the 64 MB that a container has
              volumes:
                - name: share
                  persistentVolumeClaim: {claimName: $CLAIM}
                - name: shm
                  emptyDir: {medium: Memory}
JOBSET
