"""The report of a run, out of what its stages found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from ..chip.criterion import Grade
from ..chip.plan import PrunePlan
from ..chip.scores import ChannelScores
from ..export.agree import LIMITS, Agreement
from ..export.machine import read_machine
from . import report as reports
from .journal import Journal, StageResult
from .prepared import Prepared
from .provenance import versions
from .recipe_values import BY_SCORES, budget_of
from .report_precision import doubts, judged_by
from .stage_files import read_plan

ALARM = 0.02  # a loss of accuracy above two points is said aloud
GRADES: dict[Grade, str] = {
    "code": "follows the code of its authors",
    "after the abstract": "is built after the abstract of its paper, and the rest is this project's choice",
    "baseline": "is a baseline that the papers compare with",
}


def make_report(
    ready: Prepared, journal: Journal, stages: Mapping[str, StageResult], lineage: Mapping[str, str]
) -> reports.Report:
    """Everything that the run found, with its warnings first among the notes."""
    recipe, plan = ready.recipe, read_plan(stages["plan"])
    facts = {name: stage.facts for name, stage in stages.items()}
    accuracies = {
        "dense": facts["dense"]["accuracy"],
        "pruned": facts["cut"]["accuracy"],
        "recalibrated": facts["tune"]["recalibrated"],
        "recovered": facts["tune"]["recovered"],
        "tuned": facts["tune"]["accuracy"],
        "onnx": facts["agree"]["accuracy"],
    }
    accuracy = reports.Accuracy(n=len(ready.test) if ready.data.has_accuracy else 0, **accuracies)
    report = reports.Report(
        title=f"{recipe.model.name} on {recipe.data.name}",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=recipe.model.name,
        data=recipe.data.name,
        criterion=facts["score"]["criterion"],
        budget=_budget_sentence(ready),
        input_shape=plan.input_shape,
        classes=ready.built.num_classes,
        accuracy=accuracy,
        cost=reports.Cost(
            dense=reports.NetworkCost(
                macs=plan.macs_before, params=plan.params_before, onnx_bytes=facts["export"]["dense_onnx_bytes"]
            ),
            pruned=reports.NetworkCost(
                macs=plan.macs_after, params=plan.params_after, onnx_bytes=facts["export"]["onnx_bytes"]
            ),
        ),
        agreement=Agreement.model_validate(facts["agree"]["agreement"]),
        precisions=[reports.PrecisionRow.model_validate(row) for row in _precision_rows(facts)],
        engines=[reports.EngineRow.model_validate(row) for row in facts["measure"]["engines"]],
        groups=_group_reports(stages, plan),
        score_images=facts["score"]["images"] or None,
        dense_training=_curve(facts["dense"]["training"]),
        tuning=_curve(facts["tune"]["training"]),
        stages_s=journal.seconds,
        machine=read_machine(),
        versions=versions(),
        recipe=recipe.model_dump(mode="json"),
        digests={name.removesuffix("_sha256").replace("_", " "): digest for name, digest in lineage.items() if digest},
    )
    warnings = [
        *collapse_warnings(accuracy),
        *precision_warnings(_precision_rows(facts), accuracy.onnx),
        *(doubt for engine in report.engines for doubt in doubts(report, engine)),
    ]
    return report.model_copy(update={"notes": [*warnings, *_notes(ready, facts, plan)]})


def collapse_warnings(accuracy: reports.Accuracy) -> list[str]:
    """A warning where the pruned network lost more accuracy than anybody would ship without looking."""
    if accuracy.dense is None or accuracy.onnx is None or accuracy.dense - accuracy.onnx <= ALARM:
        return []
    warning = (
        f"WARNING: top-1 fell from {accuracy.dense:.1%} to {accuracy.onnx:.1%}. Tune longer (--set tune.epochs=...), "
        "distil from the dense network (--set tune.distill=0.5), or keep more channels."
    )
    return [warning]


def precision_warnings(rows: Sequence[Mapping[str, Any]], before: float | None) -> list[str]:
    """A warning for each precision in which the network lost more accuracy than anybody would ship without looking, and
    for each whose roundings it magnifies: its file is right, and its outputs tell little."""
    warnings = []
    for row in rows:
        after, agreement = row["accuracy"], Agreement.model_validate(row["agreement"])
        if not LIMITS[row["precision"]].keeps(agreement):
            warnings.append(
                f"WARNING: this network magnifies rounding in {row['precision']} ({agreement}). Without its roundings "
                "the ONNX file gives the outputs of FP32: it is right. Whether it is good enough the outputs do not "
                f"tell: {judged_by(before, after)}, or take another precision."
            )
        if before is None or after is None or before - after <= ALARM:
            continue
        bound = " or leave the layers out that cost most (--max-drop 0.5)" if row["sensitivities"] else ""
        fell = f"top-1 fell from {before:.1%} to {after:.1%}"
        warnings.append(f"WARNING: in {row['precision']} {fell}. Take another precision{bound}.")
    return warnings


def _group_reports(stages: Mapping[str, StageResult], plan: PrunePlan) -> list[reports.GroupReport]:
    scored = ChannelScores.from_file(str(stages["score"].file("scores.safetensors")))
    seconds = stages["score"].facts["seconds"]
    found = []
    for cut in plan.groups:
        rests_on = scored.layers.get(cut.layer)
        place = {channel: n for n, channel in enumerate(cut.channels or range(cut.width_before))}
        found.append(
            reports.GroupReport(
                layer=cut.layer,
                coupled=cut.coupled,
                width_before=cut.width_before,
                width_after=cut.width_after,
                scores=scored.scores[cut.layer].tolist(),
                kept=[place[channel] for channel in cut.kept],
                images=(rests_on.images or None) if rests_on else None,
                stability=rests_on.stability if rests_on else None,
                settled=rests_on.settled if rests_on and rests_on.stability is not None else None,
                score_seconds=seconds.get(cut.layer),
            )
        )
    return found


def _notes(ready: Prepared, facts: Mapping[str, Mapping[str, Any]], plan: PrunePlan) -> list[str]:
    flops = facts["cut"]["paper_flops"]
    protected = [f"{group.layer} ({group.protected})" for group in ready.groups if group.protected]
    return [
        *ready.left_out,
        *facts["dense"]["notes"],
        (
            f"the cut was proved in float64: largest relative gap to the dense network with the same channels silenced "
            f"{facts['cut']['gap']:.1e}."
        ),
        (
            f"MACs fall by {1 - plan.macs_after / plan.macs_before:.2%}; counted as CHIP's authors print FLOPs (batch "
            f"norms and convolution biases on the pruned side only), by {1 - flops / plan.macs_before:.2%}."
        ),
        *_sources(ready),
        f"kept widths are multiples of {plan.round_to} where the dense width allows it, never below {plan.min_width}.",
        *([f"left as they are: {'; '.join(protected)}."] if protected else []),
        *_recovery_notes(facts["tune"]["recovery"]),
        *((facts["tune"]["training"] or {}).get("notes") or []),
    ]


def _sources(ready: Prepared) -> list[str]:
    """How near what decided about channels is to the paper that it is named after."""
    recipe, after_the_abstract = ready.recipe, GRADES["after the abstract"]
    found = [f"the criterion '{recipe.score.criterion}' {GRADES[ready.criteria[0].grade]}."]
    if recipe.score.joint:
        found.append("channels left one at a time (score.joint), which is this project's choice.")
    if recipe.prune.allocation == "interaction":
        found.append(f"the allocation by interaction {after_the_abstract}.")
    if recipe.tune.recover:
        found.append(f"the recovery by interactions {after_the_abstract}.")
    return found


def _recovery_notes(recovery: Mapping[str, Any] | None) -> list[str]:
    if not recovery or not recovery["steps"]:
        return []
    note = (
        f"recovery took {recovery['steps']} steps on {recovery['images']} images: how channels act together was off "
        f"by {recovery['gap_before']:.2f} of the dense mean square before, by {recovery['gap_after']:.2f} after."
    )
    return [note]


def _precision_rows(facts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return facts["convert"]["precisions"] if "convert" in facts else []


def _budget_sentence(ready: Prepared) -> str:
    asked, rules, criterion = ready.recipe.prune, ready.rules, ready.criteria[0]
    floor = f"no group below {rules.min_width}"
    share = f" or {1 - rules.most_removed:.0%} of its channels" if rules.most_removed < 1 else ""
    named = f"criterion {ready.recipe.score.label} ({criterion.grade})"
    rest = f"widths rounded to {rules.round_to}, {floor}{share}; {named}"
    if asked.layer_ratios:
        return f"ratios given for {len(asked.layer_ratios)} layers; {rest}"
    budget = budget_of(ready.recipe)
    if budget.kind == "ratio":
        whose = "all channels" if asked.allocation in BY_SCORES else "the channels of every group"
        return f"remove {budget.value:.0%} of {whose}, {asked.allocation} allocation; {rest}"
    counted = "MACs" if budget.kind == "macs" else "parameters"
    return f"keep at most {budget.value:.0%} of the {counted}, {asked.allocation} allocation; {rest}"


def _curve(record: Mapping[str, Any] | None) -> reports.TrainCurve | None:
    if not record or not record["epochs"]:
        return None
    return reports.TrainCurve(**{name: record[name] for name in ("epochs", "seconds", "loss", "lr")})
