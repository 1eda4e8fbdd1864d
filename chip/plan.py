"""The prune plan: which channels stay, as data that can be replayed on the dense model."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from .cost import Cost, CostModel, removed_by
from .groups import ChannelGroup
from .order import aligned_order

Position = Annotated[int, Field(ge=0)]


class GroupCut(BaseModel):
    """What happens to one channel group.

    kept: positions of the root layer's output in the ORIGINAL numbering, in their new order.
    channels: the root's positions that make up the group; empty when it is all of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: str
    coupled: list[str]
    width_before: int
    width_after: int
    kept: list[Position]
    channels: list[Position] = []

    @property
    def removed(self) -> list[int]:
        """The positions that go, ascending."""
        stay = set(self.kept)
        return [c for c in (self.channels or range(self.width_before)) if c not in stay]


class PrunePlan(BaseModel):
    """Everything needed to cut the dense model again, and to know whether it is the right one.

    structure_sha256: digest of the dense model's layer names and shapes; weights_sha256: of its tensors as well.
    macs and params: dense and pruned, for one image of `input_shape`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["chip-deploy.plan/1"] = Field(default="chip-deploy.plan/1", alias="schema")
    model: str
    num_classes: int
    input_shape: list[int]
    structure_sha256: str
    weights_sha256: str
    criterion: str
    round_to: int
    min_width: int
    groups: list[GroupCut]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int

    @property
    def kept(self) -> dict[str, list[int]]:
        """Group -> its kept channels."""
        return {cut.layer: cut.kept for cut in self.groups}

    def require_model(self, model: nn.Module, *, weights: bool = True) -> None:
        """Raises: ValueError when the plan was made for another model, or (weights=True) for other weights."""
        if structure_digest(model) != self.structure_sha256:
            raise ValueError(
                f"this plan was made for '{self.model}' with {self.num_classes} outputs; the model given has other "
                "layers or shapes. Give the dense model that the plan names."
            )
        if weights and weights_digest(model) != self.weights_sha256:
            raise ValueError(
                f"this plan was made for other weights of '{self.model}' (sha256 {self.weights_sha256[:12]}...). "
                "Give the dense weights it was made from, or make a new plan."
            )


def make_plan(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    kept: Mapping[str, Sequence[int]],
    *,
    cost: CostModel,
    name: str,
    num_classes: int,
    input_shape: Sequence[int],
    criterion: str,
    round_to: int,
    min_width: int,
) -> PrunePlan:
    """The plan that keeps these channels of these groups; groups that lose nothing are listed too."""
    ordered = aligned_order(model, groups, kept)
    after: Cost = cost.after(removed_by(groups, kept))
    return PrunePlan(
        model=name,
        num_classes=num_classes,
        input_shape=list(input_shape),
        structure_sha256=structure_digest(model),
        weights_sha256=weights_digest(model),
        criterion=criterion,
        round_to=round_to,
        min_width=min_width,
        groups=[_cut(model, group, ordered) for group in groups if group.layer in kept],
        macs_before=cost.dense.macs,
        macs_after=after.macs,
        params_before=cost.dense.params,
        params_after=after.params,
    )


def structure_digest(model: nn.Module) -> str:
    """sha256 over the names, shapes and dtypes of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    return digest.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """sha256 over the names, shapes, dtypes and bytes of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _cut(model: nn.Module, group: ChannelGroup, ordered: Mapping[str, Sequence[int]]) -> GroupCut:
    root = model.get_submodule(group.layer)
    width = root.out_features if isinstance(root, nn.Linear) else root.out_channels
    kept = list(ordered[group.layer])
    return GroupCut(
        layer=group.layer,
        coupled=group.coupled,
        width_before=group.width,
        width_after=len(kept),
        kept=kept,
        channels=[] if group.width == width else list(group.channels),
    )
