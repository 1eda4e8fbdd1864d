"""What stages leave for one another: the plan, the pruned network, and weights as safetensors takes them."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from ..chip.plan import PrunePlan
from ..chip.surgery import apply_plan
from .journal import StageResult
from .prepared import Prepared, build_network


def read_plan(plan: StageResult) -> PrunePlan:
    """The plan that its stage wrote."""
    return PrunePlan.model_validate_json(plan.file("plan.json").read_text(encoding="utf-8"))


def read_pruned(ready: Prepared, plan: StageResult, weights: Path) -> nn.Module:
    """The network as the plan cuts it, with those weights, in evaluation mode."""
    model = apply_plan(build_network(ready.recipe, ready.data).module, read_plan(plan), ready.example, weights=False)
    model.load_state_dict(load_file(weights))
    return model.eval()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every tensor in memory of its own, as safetensors wants it."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
