#!/bin/bash
# difftune on the GPUs of one machine or of several, without a scheduler, in the image of docker/Dockerfile.
#
#   docker/torchrun.sh recipes/math_stage1.yaml model.path=DIR
#   NODES=2 RANK=0 FIRST=gpu-a docker/torchrun.sh recipes/math_stage1.yaml model.path=DIR    (on gpu-a)
#   NODES=2 RANK=1 FIRST=gpu-a docker/torchrun.sh recipes/math_stage1.yaml model.path=DIR    (on the other)
#
# GPUS a machine (8), NODES (1), RANK of this machine from 0 (0), FIRST machine's name (localhost), IMAGE (difftune).
# runs/, models/ and data/ of the current folder are the container's; with several machines on a disk that they share.
set -euo pipefail

recipe=${1:?the recipe comes first, then KEY=VALUE settings}
shift
GPUS=${GPUS:-8} NODES=${NODES:-1} RANK=${RANK:-0} FIRST=${FIRST:-localhost} IMAGE=${IMAGE:-difftune}

# NCCL and the workers pass data through shared memory, of which a container has 64 MiB by default: --ipc host.
exec docker run --rm --gpus all --ipc host --network host --ulimit memlock=-1 \
    -v "$PWD/runs:/difftune/runs" -v "$PWD/models:/difftune/models" -v "$PWD/data:/difftune/data" \
    --entrypoint torchrun "$IMAGE" \
    --nnodes="$NODES" --nproc-per-node="$GPUS" --node-rank="$RANK" \
    --master-addr="$FIRST" --master-port=29500 \
    cli.py fit --config "$recipe" "$@" trainer.devices="$GPUS" trainer.num_nodes="$NODES"
