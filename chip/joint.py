"""Channel independence in joint mode: channels leave one at a time, and each leave changes what the others carry."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .nuclear import quadrature

# Shape letters: B images, C channels, P pixels, M = min(C, P), K quadrature nodes, N = 2 K (see `_Shrinking`).

TIE = 1e-9  # values this close, in shares of an average channel, are equal: rounding must not choose between twins
NODES = 56  # spectra down to 1e-14 are then off by less than 1e-11; D / T needs more than the logarithm in `nuclear`
_EPS = sys.float_info.epsilon
_TINY = sys.float_info.min
_MOST_LOST = 1e-10  # of an image's largest singular value: what rounding in the downdates may cost before it is undone
_CHUNK_BYTES = 64 * 2**20
_DOWNDATE_BYTES = 192 * 2**20  # of all consumers together
_BLOCK = (8, 32)  # fewest and most downdates between exact decompositions, where the bytes allow


class Reader(NamedTuple):
    """One consumer of the group's channels: the maps that it reads, and which of the channels they are.

    Shapes: rows_BCP (B, C, P) floating; covered has C entries, each a place in the group (0..width-1).
    """

    rows_BCP: Tensor
    covered: Sequence[int]


def joint_scores(readers: Sequence[Reader], *, width: int, progress: Callable[[int], None] | None = None) -> Tensor:
    """Scores under which the k best channels are, for every k, those that greedy removal leaves.

    The value of a channel is its channel independence given the channels that remain, averaged over a consumer's
    images, divided by that consumer's average channel before any was removed, and averaged over the consumers that
    cover the channel. The channel of smallest value goes, until one is left; of two identical channels the second
    to go is worth its full share once the first has gone. The score is the running maximum of the values at removal,
    raised by the smallest representable step where it would stand still. Values within `TIE` of the smallest are
    equal; of those the largest index goes, so the smallest stays.

    With G the Gram matrix over its largest eigenvalue, T = t (G + t I)^-1 and D = T - T T at the nodes t_k,

        CI_i = sigma_max * sum_k h_k D_ii / T_ii ,

    and deleting channel j turns T and D, with u = T_:j / T_jj and v = D_:j, into

        T - T_jj u u'     and     D - u v' - v u' + D_jj u u' .

    Only diagonals are kept, and the columns that were taken off; a column is made when its channel goes, from the
    singular vectors of the maps. After a block of removals, or as soon as cancellation may have cost more than 1e-10
    of sigma_max, an image is decomposed anew, so rounding does not add up. The singular values come from the maps, not
    from their Gram matrix: twins, rank-deficient and scaled maps keep their digits. No layer is too wide for this: wide
    ones only have shorter blocks.

    Shapes: see `Reader` -> (width,) float64, on the device of the first reader's maps.
    Unit: none; 1 is an average channel. Channels that are dead for every consumer, or read by none, score exactly 0.
    Cost: per removal, consumer and image, a (C x M) by (M x 2 K) product and a share of one M x M singular value
        decomposition; all of it shrinks with the channels. Memory: about 8 B C (3 M + 8 K) bytes per consumer, and at
        most 192 MiB of downdates (16 B C K bytes each, one per consumer at the least).
    Raises: ValueError naming the reader whose maps or channels are not as above, or whose maps are not finite.
    Source (exact): the value is Sui et al., CHIP, NeurIPS 2021, Eq. 3; the greedy order and the downdate are ours.
    """
    for number, reader in enumerate(readers):
        _check(reader, number, width)
    if not readers:
        return torch.zeros(width, dtype=torch.float64)
    states = [_Shrinking(reader, _DOWNDATE_BYTES // len(readers)) for reader in readers]
    device = states[0].device
    alive = torch.stack([state.spread(state.lively_C, width).to(device) for state in states]).any(0)
    covers = torch.stack([state.spread(torch.ones_like(state.lively_C), width).to(device) for state in states]).sum(0)
    scores_C, last = torch.zeros(width, dtype=torch.float64, device=device), 0.0
    for removed in range(int(alive.sum())):
        shares = torch.stack([state.spread(state.values_C(), width).to(device) for state in states])
        values_C = shares.sum(0) / covers.clamp(min=1)
        channel = _least(values_C, alive)
        last = max(float(values_C[channel]), _next_above(last))
        scores_C[channel] = last
        alive[channel] = False
        for state in states:
            state.remove(channel)
        if progress is not None:
            progress(removed + 1)
    return scores_C


class _Shrinking:
    """One consumer's maps as channels leave: the last exact decomposition of every image, and the downdates since.

    T and D are carried side by side on the last axis, N = 2 K. In singular vectors U and values sigma of the maps, with
    y = lam / (lam + t) and lam = (sigma / sigma_max)^2, T = I - U y U' and D = U (y - y^2) U'.
    """

    def __init__(self, reader: Reader, downdate_bytes: int) -> None:
        rows_BCM, self.scale_B = _reduced(reader.rows_BCP)
        self.device = rows_BCM.device
        self.nodes_K, self.weights_K = quadrature(self.device, nodes=NODES)
        images, channels = rows_BCM.shape[:2]
        per_downdate = 16 * images * channels * len(self.nodes_K)
        self.block = max(
            1, min(max(_BLOCK[0], min(_BLOCK[1], rows_BCM.shape[2] // 16)), downdate_bytes // per_downdate)
        )
        self.channels = torch.tensor(list(reader.covered), device=self.device)
        self._decompose(rows_BCM)
        self.lively_C = (self.norms_BC > 0).any(0)
        mean = float(self._independence_C().mean())
        self.average = mean if mean > 0 else 1.0

    def spread(self, local_C: Tensor, width: int) -> Tensor:
        """Values of the rows that are left, at their places in the group; 0 elsewhere."""
        spread = torch.zeros(width, dtype=torch.float64, device=self.device)
        spread[self.channels[self.left_C]] = local_C.double()[self.left_C]
        return spread

    def values_C(self) -> Tensor:
        """The mean over images of every channel's independence, in shares of the initial average channel."""
        return self._independence_C() / self.average

    def remove(self, channel: int) -> None:
        """Take a channel out of every image."""
        places = ((self.channels == channel) & self.left_C).nonzero().flatten().tolist()
        if not places:
            return
        self._downdate(places[0])
        self.left_C[places[0]] = False
        if not bool(self.left_C.any()):
            return
        if len(self.downdates) >= self.block:
            self._restart()
            return
        stale = (self._lost_B() > _MOST_LOST).nonzero().flatten()
        if len(stale):
            self._renew(stale)

    def _independence_C(self) -> Tensor:
        t_BCK, d_BCK = self.diagonal_BCN.chunk(2, -1)
        shares_BCK = torch.minimum((d_BCK / t_BCK.clamp(min=_TINY)).clamp(min=0), 1 / (1 + self.nodes_K))
        found_BC = (self.sigma_BM[:, :1] * (shares_BCK @ self.weights_K)).minimum(self.norms_BC)
        return (torch.where(self.norms_BC > 0, found_BC, 0.0) * self.scale_B[:, None]).mean(0)

    def _downdate(self, place: int) -> None:
        t_BCK, d_BCK = self._column(place).chunk(2, -1)
        pivot_B1K, d_pivot_B1K = self.diagonal_BCN[:, place : place + 1].chunk(2, -1)
        root_B1K = pivot_B1K.clamp(min=_TINY).sqrt()
        a_BCK = t_BCK / root_B1K
        b_BCK = (d_BCK - a_BCK * (d_pivot_B1K / root_B1K / 2)) / root_B1K
        t_diagonal_BCK, d_diagonal_BCK = self.diagonal_BCN.chunk(2, -1)
        t_diagonal_BCK.addcmul_(a_BCK, a_BCK, value=-1)
        d_diagonal_BCK.addcmul_(a_BCK, b_BCK, value=-2)
        self.downdates.append((a_BCK, b_BCK))

    def _column(self, place: int) -> Tensor:
        """Column `place` of T and D as they are now, from the singular vectors less the downdates since."""
        row_BM = self.vectors_BCM[:, place]
        column_BCN = self.vectors_BCM @ (self.filters_BMN * row_BM[:, :, None])
        outside_BC = -(self.vectors_BCM @ row_BM[:, :, None])[:, :, 0]
        outside_BC[:, place] += 1
        t_BCK, d_BCK = column_BCN.chunk(2, -1)
        t_BCK += (outside_BC * self.tall_B[:, None])[:, :, None]
        for a_BCK, b_BCK in self.downdates:
            t_BCK.addcmul_(a_BCK, a_BCK[:, place : place + 1], value=-1)
            d_BCK.addcmul_(a_BCK, b_BCK[:, place : place + 1], value=-1)
            d_BCK.addcmul_(b_BCK, a_BCK[:, place : place + 1], value=-1)
        return column_BCN

    def _lost_B(self) -> Tensor:
        """A bound on the rounding of the downdates, in shares of sigma_max: D / T <= 1 / (1 + t), off by eps T0 / T."""
        t_BCK = self.diagonal_BCN.chunk(2, -1)[0].clamp(min=_TINY)
        off_BCK = (4 * _EPS * self.before_BCK / t_BCK).clamp(max=1)
        return (off_BCK @ (self.weights_K / (1 + self.nodes_K)))[:, self.left_C].amax(1)

    def _restart(self) -> None:
        """Decompose every image anew, without the rows of the channels that went."""
        rows_BCM = (self.vectors_BCM * self.sigma_BM[:, None])[:, self.left_C]
        self.channels = self.channels[self.left_C]
        self._decompose(rows_BCM)

    def _decompose(self, rows_BCM: Tensor) -> None:
        self.norms_BC = torch.linalg.vector_norm(rows_BCM, dim=-1)
        self.left_C = torch.ones(rows_BCM.shape[1], dtype=torch.bool, device=self.device)
        self.downdates: list[tuple[Tensor, Tensor]] = []
        self.vectors_BCM, self.sigma_BM, _ = torch.linalg.svd(rows_BCM, full_matrices=False)
        self.tall_B = self.sigma_BM.new_full((len(rows_BCM),), float(rows_BCM.shape[1] > rows_BCM.shape[2]))
        self.filters_BMN = self._filters(self.sigma_BM)
        self.diagonal_BCN = _diagonal(self.vectors_BCM, self.filters_BMN, self.tall_B)
        self.before_BCK = self.diagonal_BCN.chunk(2, -1)[0].clone()

    def _renew(self, images: Tensor) -> None:
        """Decompose some images anew, in place; the channels that went are rows of zeros there."""
        rows_BCM = (self.vectors_BCM[images] * self.sigma_BM[images][:, None])[:, self.left_C]
        vectors_BCM, sigma_BM, _ = torch.linalg.svd(rows_BCM, full_matrices=False)
        columns = sigma_BM.shape[1]
        wide_BCM = self.vectors_BCM.new_zeros(len(images), *self.vectors_BCM.shape[1:])
        wide_BCM[:, self.left_C, :columns] = vectors_BCM
        self.vectors_BCM[images] = wide_BCM
        self.sigma_BM[images] = torch.nn.functional.pad(sigma_BM, (0, self.sigma_BM.shape[1] - columns))
        self.tall_B[images] = float(rows_BCM.shape[1] > rows_BCM.shape[2])
        self.filters_BMN[images] = self._filters(self.sigma_BM[images])
        self.diagonal_BCN[images] = _diagonal(wide_BCM, self.filters_BMN[images], self.tall_B[images])
        self.before_BCK[images] = self.diagonal_BCN[images].chunk(2, -1)[0]
        for a_BCK, b_BCK in self.downdates:
            a_BCK[images], b_BCK[images] = 0.0, 0.0

    def _filters(self, sigma_BM: Tensor) -> Tensor:
        """1 - y and y - y^2 at every node."""
        top_B1 = torch.where(sigma_BM[:, :1] > 0, sigma_BM[:, :1], 1.0)
        lam_BM1 = (sigma_BM / top_B1).square()[:, :, None]
        rest_BMK = self.nodes_K / (lam_BM1 + self.nodes_K)
        return torch.cat([rest_BMK, rest_BMK * (lam_BM1 / (lam_BM1 + self.nodes_K))], -1)


def _diagonal(vectors_BCM: Tensor, filters_BMN: Tensor, tall_B: Tensor) -> Tensor:
    """The diagonals of T and D; what of a row lies outside all singular vectors (more rows than columns) is all T."""
    squares_BCM = vectors_BCM.square()
    diagonal_BCN = squares_BCM @ filters_BMN
    outside_BC = (1 - squares_BCM.sum(-1)).clamp(min=0) * tall_B[:, None]
    diagonal_BCN.chunk(2, -1)[0].add_(outside_BC[:, :, None])
    return diagonal_BCN


def _reduced(rows_BCP: Tensor) -> tuple[Tensor, Tensor]:
    """The maps over their largest entry, turned into min(C, P) columns of the same Gram matrix, and that entry."""
    channels, pixels = rows_BCP.shape[1:]
    reduced, scales = [], []
    for chunk in rows_BCP.detach().split(max(1, _CHUNK_BYTES // (8 * channels * pixels))):
        scale_B = chunk.abs().amax((1, 2)).double()
        unit_BCP = chunk.double() / torch.where(scale_B > 0, scale_B, 1.0)[:, None, None]
        reduced.append(unit_BCP if pixels <= channels else torch.linalg.qr(unit_BCP.mT, mode="r").R.mT)
        scales.append(scale_B)
    return torch.cat(reduced), torch.cat(scales)


def _least(values_C: Tensor, alive: Tensor) -> int:
    """The largest index among the living channels whose value is the smallest, up to `TIE`."""
    living = torch.where(alive, values_C, torch.inf)
    return int((living <= living.min() + TIE).nonzero()[-1])


def _next_above(value: float) -> float:
    """The next float64, and above 0 the first that no device rounds to 0."""
    return max(math.nextafter(value, math.inf), _TINY)


def _check(reader: Reader, number: int, width: int) -> None:
    rows, covered = reader.rows_BCP, list(reader.covered)
    if rows.ndim != 3 or not rows.is_floating_point() or 0 in rows.shape:
        raise ValueError(
            f"reader {number} of a channel group needs floating maps of shape (B, C, P), none of them 0; got "
            f"{rows.dtype} {tuple(rows.shape)}."
        )
    if len(covered) != rows.shape[1] or len(set(covered)) != len(covered) or not set(covered) <= set(range(width)):
        raise ValueError(
            f"reader {number} of a channel group covers {covered} with {rows.shape[1]} rows; expected one place in "
            f"0..{width - 1} a row, each once."
        )
    finite_BC = torch.isfinite(rows).all(-1)
    if not bool(finite_BC.all()):
        image, place = (~finite_BC).nonzero()[0].tolist()
        raise ValueError(f"reader {number} of a channel group: image {image}, channel {covered[place]} is not finite.")
