#!/usr/bin/env bash
# Every criterion by two allocations at 70, 50 and 30 % of ResNet-56's MACs, three seeds, nothing tuned: 216 cells, about
# an hour and a half of one core. Ctrl-C at any time; the same command goes on.
#   benchmarks/criteria_resnet56.sh WEIGHTS DATA OUT      e.g. resnet56.safetensors imagefolder:cifar10 runs/criteria
set -euo pipefail
OMP_NUM_THREADS=1 chip-deploy compare-criteria --model resnet56 --weights "$1" --data "$2" --macs 0.7,0.5,0.3 \
    --allocation uniform,interaction --seeds 0,1,2 --target ort-cpu --set data.eval_images=2500 \
    --set prune.round_to=1 --set score.device=cpu --out "$3" --resume
