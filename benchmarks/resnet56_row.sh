#!/bin/sh
# ResNet-56 at CHIP's 47.4 % row: top-1 right after the cut, after batch-norm recalibration, and after EPOCHS of tuning.
# usage: benchmarks/resnet56_row.sh WEIGHTS.safetensors CIFAR10_FOLDER EPOCHS OUT
# CIFAR10_FOLDER holds train/ and test/ with a folder for each class. The authors tune for 400 epochs; a short run
# does without their warm-up and with a smaller weight decay.
set -eu
weights=$1 data=$2 epochs=$3 out=$4
"${CHIP_DEPLOY:-chip-deploy}" prune "$(dirname "$0")/../recipes/chip-resnet56-47.4.toml" \
    --weights "$weights" --data "imagefolder:$data" --out "$out" --resume \
    --set "tune.epochs=$epochs" --set tune.warmup_epochs=0 --set tune.batch=128 --set tune.weight_decay=0.0005
