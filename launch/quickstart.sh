#!/usr/bin/env bash
# From nothing to a comparison of Muon and AdamW in under six minutes on two CPU cores:
#
#     bash launch/quickstart.sh
#
# Makes .venv, trains a small byte-level Llama twice on the text of Python's own standard library with two processes
# (gloo; NCCL where each has a GPU), and writes runs/quickstart/loss.png and runs/quickstart/summary.md.
# NPROC=1 for one process. Arguments go to both runs (--train.steps 50). May be run again: what is installed stays.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

NPROC="${NPROC:-2}"
OUT=runs/quickstart

install_extras recipes
if (($(python -c 'import torch; print(torch.cuda.device_count())') < NPROC)); then
    export CUDA_VISIBLE_DEVICES=""
fi

pretrain() {  # NAME ARGUMENTS...: one run into $OUT/NAME
    local name="$1"
    shift
    python -m launch.torchrun --nproc_per_node="$NPROC" -m launch.pretrain \
        --config configs/quickstart.yaml --log.dir "$OUT/$name" "$@"
}

stage "1/3 train with Muon"
pretrain muon "$@"
stage "2/3 train with AdamW, over the same shards"
pretrain adamw --optimizer.name adamw --optimizer.lr 1e-3 "$@"
stage "3/3 compare"
python -m launch.compare "$OUT/muon" "$OUT/adamw" --out "$OUT"
stage "done in $SECONDS s: $OUT/loss.png, $OUT/summary.md"
