#!/usr/bin/env bash
# Half the MACs on onnxruntime's CPU provider: how much faster ResNet-18, ResNet-50, MobileNetV2 (224 pixels, drawn
# weights: structure and latency only) and ResNet-56 (32 pixels) become, beside what their MACs promise.
#   benchmarks/half_the_macs.sh OUT [NETWORK...]
# OUT holds the bundles in the end, and half-the-macs.json with the figures, the machine and the versions.
set -euo pipefail
out=$1
shift
networks=("$@")
[ ${#networks[@]} -gt 0 ] || networks=(resnet18 resnet50 mobilenet_v2 resnet56)
mkdir -p "$out"
for network in "${networks[@]}"; do
    chip-deploy prune --model "$network" --data random:64 --macs 0.5 --target ort-cpu \
        --set score.images=32 --set tune.epochs=0 --set tune.recalibrate_images=0 --set data.eval_images=8 \
        --out "$out/$network" --resume >"$out/$network.txt"
done
python - "$out" "${networks[@]}" <<'PYTHON'
import json
import sys
from pathlib import Path

out, rows = Path(sys.argv[1]), []
for network in sys.argv[2:]:
    report = json.loads((out / network / "report.json").read_text())
    row, cost = report["engines"][0], report["cost"]
    speedup, promised = row["speedup"], cost["dense"]["macs"] / cost["pruned"]["macs"]
    print(
        f"{network:14} p50 {row['dense_latency_ms']['p50']:8.3f} -> {row['latency_ms']['p50']:8.3f} ms   "
        f"{speedup['estimate']:.3f}x ({speedup['low']:.3f} to {speedup['high']:.3f})   MACs / {promised:.2f}   "
        f"efficiency {speedup['estimate'] / promised:.0%}   {row['verdict']}"
    )
    sentences = row["layers"]["sentences"] if row["layers"] else []
    for sentence in sentences:
        print(f"    {sentence}")
    rows.append(
        {
            "network": network,
            "input": report["input_shape"],
            "macs": [cost["dense"]["macs"], cost["pruned"]["macs"]],
            "dense_ms": row["dense_latency_ms"],
            "pruned_ms": row["latency_ms"],
            "speedup": speedup,
            "macs_reduction": promised,
            "efficiency": speedup["estimate"] / promised,
            "verdict": row["verdict"],
            "noise": row["control"]["noise"] if row["control"] else None,
            "protocol": row["protocol"],
            "sentences": sentences,
        }
    )
figures = {
    "schema": "chip-deploy.benchmark/1",
    "command": f"benchmarks/half_the_macs.sh OUT {' '.join(sys.argv[2:])}",
    "created": report["created"],
    "machine": report["machine"],
    "versions": report["versions"],
    "rows": rows,
}
(out / "half-the-macs.json").write_text(json.dumps(figures, indent=1) + "\n")
PYTHON
