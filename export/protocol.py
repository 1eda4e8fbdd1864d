"""How latency is measured: the project's own protocol, and two of others for people who must compare."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from .laps import PROTOCOL_ID, Quantiles, early_stopping_quantile, ranked_quantile, summarise

Kind = Literal["chip-deploy", "mlperf-like", "trtexec"]
ProtocolId = Literal["chip-deploy.latency/1", "mlperf-like/1", "trtexec-10/1"]

# Fewest pairs of blocks, however fast the network: a percentile bootstrap over fewer is too narrow.
PAIRS = 20
IDS: dict[str, ProtocolId] = {
    "chip-deploy": PROTOCOL_ID,
    "mlperf-like": "mlperf-like/1",
    "trtexec": "trtexec-10/1",
}
# What may be chosen of a protocol that others defined: the network's business, not the definition's.
FREE = ("batch", "threads", "seed", "resamples")


class LatencyProtocol(BaseModel):
    """How a latency was measured; a number without it means nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Kind = "chip-deploy"
    id: ProtocolId = PROTOCOL_ID
    """The kind with the version of its definition; set from the kind."""
    warmup_ms: float = Field(default=200.0, ge=0)
    """Each side runs at least so long before anything counts, and until two windows agree."""
    window_tolerance: float = Field(default=0.03, gt=0)
    """Medians of two consecutive windows of the warm-up agree when they differ by at most this part."""
    seconds: float = Field(default=3.0, gt=0)
    """Timed laps of each side add up to at least this."""
    laps: int = Field(default=200, ge=1)
    """Fewest laps of each side."""
    openings: int = Field(default=6, ge=1)
    """Every session is opened anew so often, because its latency depends on where its memory comes to lie. Six lets
    dense, control and pruned come in each of their six orders once."""
    block_ms: float = Field(default=50.0, gt=0)
    """About how long one side runs before it is the other's turn, and how long a window of the warm-up is."""
    batch: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    resamples: int = Field(default=2000, ge=100)
    """Of the bootstrap."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, values: Any, info: ValidationInfo) -> Any:
        """The id of the kind; and one opening in a record from before sessions were opened more than once."""
        if not isinstance(values, dict):
            return values
        old = {"openings": 1} if info.mode == "json" else {}
        known = {"id": IDS[values["kind"]]} if values.get("kind") in IDS else {}
        return {**old, **known, **values}

    @model_validator(mode="after")
    def _named_truly(self) -> LatencyProtocol:
        if self.id != IDS[self.kind]:
            raise ValueError(f"protocol kind '{self.kind}' has the id '{IDS[self.kind]}', not '{self.id}'")
        return self

    @property
    def turn_ms(self) -> float:
        """`block_ms`, or less where `seconds` would not make enough blocks."""
        return min(self.block_ms, 1e3 * self.seconds / PAIRS)

    @property
    def settles(self) -> bool:
        """Whether the warm-up goes on until two windows agree; trtexec's lasts its time and no longer."""
        return self.kind != "trtexec"

    @property
    def with_transfers(self) -> bool:
        """Whether a lap brings inputs to the device and outputs back, where there is a device apart: trtexec's does."""
        return self.kind == "trtexec"

    def summarise(self, laps_ms: list[float]) -> Quantiles:
        """Laps in a few numbers as this protocol defines them. Raises: ValueError without laps."""
        plain = summarise(laps_ms, batch=self.batch)
        if self.kind == "mlperf-like":
            return plain.model_copy(update={"early_stopping_p90": early_stopping_quantile(laps_ms, 0.9)})
        if self.kind == "trtexec":
            ranked = {name: ranked_quantile(laps_ms, q) for name, q in (("p90", 0.9), ("p99", 0.99))}
            told = {name: value for name, value in ranked.items() if getattr(plain, name) is not None}
            return plain.model_copy(update=told)
        return plain


# By kind. MLPerf's SingleStream lasts 600 s and needs 64 queries for its estimate of p90. trtexec 10 warms up for
# 200 ms and then measures 3 s and 10 iterations, transfers included. Both measure one network in one process; here they
# take turns with the dense one all the same, because a verdict needs that.
PROTOCOLS: dict[str, LatencyProtocol] = {
    "chip-deploy": LatencyProtocol(),
    "mlperf-like": LatencyProtocol(kind="mlperf-like", id="mlperf-like/1", seconds=600.0, laps=64),
    "trtexec": LatencyProtocol(kind="trtexec", id="trtexec-10/1", seconds=3.0, laps=10, openings=1),
}


def protocol_named(name: str, **settings: Any) -> LatencyProtocol:
    """The protocol of that kind; those of others take batch, threads, seed and resamples only.

    >>> protocol_named("trtexec", batch=8).id
    'trtexec-10/1'

    Raises: ValueError for an unknown name, or a setting that the definition fixes.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}. Available: {', '.join(PROTOCOLS)}.")
    fixed = [key for key in settings if key not in FREE]
    if name != "chip-deploy" and fixed:
        raise ValueError(
            f"protocol '{name}' fixes {', '.join(fixed)}. Leave it out, or use --protocol chip-deploy, which is ours."
        )
    return LatencyProtocol.model_validate(PROTOCOLS[name].model_dump() | settings)
