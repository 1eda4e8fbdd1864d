#!/usr/bin/env bash
# What only a machine with an NVIDIA GPU can show, in one go: what the doctor finds, the GPU tests, and half the MACs of
# each network in every precision, built and measured by torch (three ways), onnxruntime, TensorRT and TensorRT-RTX.
#   benchmarks/on_a_gpu.sh OUT [NETWORK...]      ResNet-18, ResNet-50 and MobileNetV2 where none is named
# The networks learn handwritten digits at 224 pixels for one epoch: enough to calibrate int8 on real images, not enough
# for accuracies to mean anything. A target that cannot be used gives its reason in OUT/*.txt, and the others go on; OUT
# holds the bundles in the end, each with its report. The same command goes on where it was interrupted.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
out=$1
shift
networks=("$@")
[ ${#networks[@]} -gt 0 ] || networks=(resnet18 resnet50 mobilenet_v2)
mkdir -p "$out"
chip-deploy doctor --json >"$out/doctor.json"
chip-deploy doctor | tee "$out/doctor.txt"
python -m pytest deploy_tests/gpu -rsP 2>&1 | tee "$out/tests.txt"
for network in "${networks[@]}"; do
    bundle=$out/$network
    chip-deploy prune --model "$network" --data digits --macs 0.5 --precision fp32,fp16,bf16,int8 \
        --target torch --target ort-cpu --set data.size=224 --set dense.epochs=1 --set tune.epochs=1 \
        --set score.images=32 --set data.eval_images=256 --out "$bundle" --resume 2>&1 | tee "$out/$network.txt"
    for target in torch:compiled torch:cuda-graph ort-cuda trt trt-rtx; do
        echo "-- $network, $target"
        chip-deploy build "$bundle" --target "$target" && chip-deploy measure "$bundle" --target "$target"
    done 2>&1 | tee -a "$out/$network.txt"
done
