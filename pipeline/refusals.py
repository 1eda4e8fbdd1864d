"""What is refused before any work: recipes that their own images, network or targets cannot serve."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ..chip.criterion import Criterion
from ..export.bundle import onnx_name
from ..export.errors import TargetUnavailable
from ..export.onnx_export import INPUT, export_onnx
from ..export.precision import QUANTISED, require_quantisable
from ..export.shapes import profile_holding, profiles_for
from ..export.target import Target, require_precision
from .data import DataSet
from .device import TENSORRT
from .recipe import Recipe
from .recipe_values import rest_of

SMALL_SET = 20_000  # a data set with at most so many training images may train its own dense model


def require_precisions(targets: Sequence[Target], precisions: Sequence[str]) -> None:
    """Nothing, if each target takes one of the precisions at least, and each precision is taken by a target.

    Raises: TargetUnavailable with the reason.
    """
    refused = [(target, precision) for target in targets for precision in precisions if target.refuses(precision)]
    for target, precision in refused:
        others = any((target, other) not in refused for other in precisions)
        if not others or all((each, precision) in refused for each in targets):
            require_precision(target, precision)


def require_shapes(recipe: Recipe, targets: Sequence[Target], example: Tensor) -> None:
    """Raises: ValueError where an engine cannot be built for build.shapes, or does not run batches of measure.batch."""
    if not any("shapes" in target.takes for target in targets):
        return
    image = tuple(example.shape[1:])
    profiles = profiles_for(recipe.build.shapes, {INPUT: (-1 if recipe.export.dynamic_batch else 1, *image)})
    batch = recipe.measure.batch
    if profiles and profile_holding(profiles, {INPUT: (batch, *image)}) is None:
        held = " or ".join(str(profile[INPUT]) for profile in profiles)
        size = "x".join(map(str, image))
        raise ValueError(
            f"measure.batch is {batch}, but the engines are built for {held} only. Give the batch a shape, as in "
            f"--set 'build.shapes=[\"{INPUT}:{batch}x{size}\"]', or measure another batch."
        )


def require_free_batch(recipe: Recipe) -> None:
    """Raises: ValueError where batches are to be measured on a network that takes one image."""
    if recipe.measure.batch > 1 and not recipe.export.dynamic_batch:
        raise ValueError(
            f"measure.batch is {recipe.measure.batch}, but the exported network takes one image. "
            "Add --set export.dynamic_batch=true."
        )


def require_labels(recipe: Recipe, criteria: Sequence[Criterion], data: DataSet) -> None:
    """Raises: ValueError where the images have no labels, and a criterion or the recovery needs them."""
    if data.has_accuracy:
        return
    if recipe.tune.recover:
        raise ValueError(
            f"tune.recover = '{recipe.tune.recover}' needs labels, and the images of '{recipe.data.name}' have none. "
            "Give labelled --data, or leave it out."
        )
    if recipe.score.file is not None:
        return
    for criterion in criteria:
        if needs_labels(criterion):
            asked = (
                "" if criterion is criteria[0] else f", which prune.allocation = '{recipe.prune.allocation}' goes by,"
            )
            other = "criterion" if criterion is criteria[0] else "allocation"
            raise ValueError(
                f"criterion '{criterion.name}'{asked} needs labels, and the images of '{recipe.data.name}' have none. "
                f"Give labelled --data, or choose another {other}."
            )


def needs_labels(criterion: Criterion) -> bool:
    """Whether that criterion can score only on images whose classes are known."""
    return bool(criterion.needs & {"labels", "gradients", "masked runs"})


def require_weights(recipe: Recipe, data: DataSet) -> None:
    """Raises: ValueError where a data set is too large to train the dense model on, and no weights were given."""
    if recipe.model.weights is None and data.has_accuracy and len(data.train) > SMALL_SET:
        raise ValueError(
            f"no weights were given for '{recipe.model.name}', and {recipe.data.name} has {len(data.train):,} training "
            f"images; only sets of up to {SMALL_SET:,} train their own dense model. Give trained --weights."
        )


def require_data_for_8_bits(recipe: Recipe, targets: list[Target], data: DataSet) -> None:
    """Raises: ValueError where 8 bits are asked for without real images; TargetUnavailable for a type of the rest that
    a target gets wrong."""
    asked = [precision for precision in recipe.export.precision if precision in QUANTISED]
    if not asked:
        return
    if not data.has_accuracy:
        raise ValueError(
            f"{asked[0].upper()} asked without data: its ranges come from real images, and '{recipe.data.name}' draws "
            f"random ones. Give real --data, or leave {asked[0]} out of --precision."
        )
    for target in targets:
        if recipe.quantize.rest == "fp16" and target.spec.name not in TENSORRT:
            raise TargetUnavailable(
                f"target '{target.spec}' takes no {asked[0]} with quantize.rest = 'fp16': onnxruntime makes int32 "
                "biases of the FP16 ones, with scales that FP16 cannot hold. Set quantize.rest=auto."
            )


def require_left_out(recipe: Recipe, model: nn.Module, example: Tensor) -> None:
    """The dense network is exported to see its layers: an addition has a name in the ONNX file alone.

    Raises: ValueError for a layer to be left out of 8 bits that there is not, or where none would be left.
    """
    asked = recipe.quantize
    if not any(precision in QUANTISED for precision in recipe.export.precision):
        return
    if not asked.exclude and not asked.first_last:
        return
    with tempfile.TemporaryDirectory(prefix="chip-deploy-") as folder:
        source = Path(folder) / onnx_name("dense", "fp32")
        export_onnx(model, example, source, dynamic_batch=recipe.export.dynamic_batch)
        require_quantisable(source, asked)


def require_no_turing_products(recipe: Recipe, targets: list[Target], model: nn.Module) -> None:
    """TensorRT-RTX 1.7 builds no FP32 matrix product for Turing, and says so only after everything else is done."""
    in_fp32 = {"fp32"} if rest_of(recipe) == "fp16" else {"fp32", *QUANTISED}
    precision = next((name for name in recipe.export.precision if name in in_fp32), None)
    linear = next((name for name, module in model.named_modules() if isinstance(module, nn.Linear)), None)
    for target in targets:
        if linear is not None and precision is not None and "sm75" in target.spec.capabilities:
            raise TargetUnavailable(
                f"target '{target.spec}' cannot be used here: TensorRT-RTX has no FP32 matrix product for sm75, and "
                f"'{linear}' is one in {precision}. Leave sm75 out, use --precision fp16, or use --target trt on the "
                "device."
            )
