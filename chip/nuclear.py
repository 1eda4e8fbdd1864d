"""How much of a matrix's nuclear norm each row carries, from one eigendecomposition per image."""

import math
from functools import cache

import torch
from torch import Tensor

# Shape letters: B images, C channels, P pixels, M = min(C, P), K quadrature nodes.

NODES = 48
SMALLEST = 1e-14  # eigenvalues below this share of the largest are noise of the Gram product in float64
_CHUNK_BYTES = 64 * 2**20
_AGM_STEPS = 12  # quadratic convergence: from 1 and 1e-7 the means agree to the last bit after 8


def channel_independence(maps_BCP: Tensor) -> Tensor:
    """How much the nuclear norm of each image's maps falls when one channel is set to zero.

    With G = A A^T and R(t) = (G + t I)^-1, deleting row i multiplies det(G + t I) by R_ii(t); integrating by parts,

        CI_i = (2 / pi) * integral over s from 0 to infinity of  1 - s^2 (R^2)_ii / R_ii ,   t = s^2.

    The integrand needs the eigenvalues and the squared eigenvectors of G only. The nodes are the midpoint rule under
    s = sqrt(m) sc(u | 1 - m), for which the error falls geometrically for every spectrum in [m, 1].

    Shapes: (B, C, P) or (B, C, H, W) floating -> (B, C) float64, on the device of the maps.
    Unit: that of the activations. 0 <= CI_i <= ||row i||; a dead channel gives exactly 0.
    Cost: one symmetric eigendecomposition of min(C, P) per image, then two small products; no loop over channels.
    Raises: ValueError naming the first image and channel that are not finite.
    Source (code): Sui et al., CHIP, NeurIPS 2021, Eq. 3. Their script rounds maps to 4 decimals first; we do not.
    Nodes: Hale, Higham and Trefethen, SIAM J. Numer. Anal. 46 (2008).
    """
    rows_BCP = _rows(maps_BCP)
    image_bytes = 8 * rows_BCP.shape[1] * max(rows_BCP.shape[2], NODES)
    chunks = rows_BCP.split(max(1, _CHUNK_BYTES // max(1, image_bytes)))
    return torch.cat([_independence(chunk.double()) for chunk in chunks])


def channel_independence_svd(maps_BCP: Tensor) -> Tensor:
    """The definition, slowly: CI_i = ||A||_* - ||A with row i set to zero||_*, one float64 SVD per image and channel.

    Shapes: (B, C, P) or (B, C, H, W) floating -> (B, C) float64.
    Unit: that of the activations.
    Raises: ValueError naming the first image and channel that are not finite.
    Source (exact): Sui et al., CHIP, NeurIPS 2021, Eq. 3. Kept as the oracle of `channel_independence`.
    """
    rows_BCP = _rows(maps_BCP).double()
    whole_B = torch.linalg.svdvals(rows_BCP).sum(-1)
    scores_BC = rows_BCP.new_zeros(rows_BCP.shape[:2])
    for channel in range(rows_BCP.shape[1]):
        without = rows_BCP.clone()
        without[:, channel] = 0
        scores_BC[:, channel] = whole_B - torch.linalg.svdvals(without).sum(-1)
    return scores_BC


def _rows(maps: Tensor) -> Tensor:
    if maps.ndim not in (3, 4) or not maps.is_floating_point():
        raise ValueError(
            f"channel independence needs floating maps of shape (B, C, P) or (B, C, H, W); got {maps.dtype} "
            f"{tuple(maps.shape)}."
        )
    rows_BCP = maps.flatten(2).detach()
    finite_BC = torch.isfinite(rows_BCP).all(-1)
    if not bool(finite_BC.all()):
        image, channel = (~finite_BC).nonzero()[0].tolist()
        raise ValueError(f"image {image}, channel {channel} is not finite.")
    return rows_BCP


def _independence(rows_BCP: Tensor) -> Tensor:
    """(B, C, P) float64 -> (B, C). Each image is scaled to a largest entry of 1: no square over- or underflows."""
    scale_B = rows_BCP.abs().amax((1, 2))
    unit_BCP = rows_BCP / torch.where(scale_B > 0, scale_B, 1.0)[:, None, None]
    fractions_BC = _by_channel(unit_BCP) if unit_BCP.shape[1] <= unit_BCP.shape[2] else _by_pixel(unit_BCP)
    norms_BC = torch.linalg.vector_norm(unit_BCP, dim=-1)
    bounded_BC = torch.minimum(fractions_BC.clamp(min=0), norms_BC)
    return torch.where(norms_BC > 0, bounded_BC, 0.0) * scale_B[:, None]


def _by_channel(unit_BCP: Tensor) -> Tensor:
    """CI from the eigenvectors of the C x C Gram matrix: f = [W (lam X^2)] / [W X], W the squared eigenvectors."""
    lam_BM, vectors_BCM = torch.linalg.eigh(unit_BCP @ unit_BCP.mT)
    top_B, lam_BM = _normalised(lam_BM)
    nodes_K, weights_K = _quadrature(unit_BCP.device)
    x_BMK = 1.0 / (lam_BM[:, :, None] + nodes_K)
    squares_BCM = vectors_BCM.square()
    f_BCK = (squares_BCM @ (lam_BM[:, :, None] * x_BMK.square())) / (squares_BCM @ x_BMK)
    return top_B.sqrt()[:, None] * (f_BCK @ weights_K)


def _by_pixel(unit_BCP: Tensor) -> Tensor:
    """The same from the P x P side, Z = (A U)^2 / lam_max: f = t [Z X^2] / (1 - [Z X])."""
    lam_BM, vectors_BPM = torch.linalg.eigh(unit_BCP.mT @ unit_BCP)
    top_B, lam_BM = _normalised(lam_BM)
    nodes_K, weights_K = _quadrature(unit_BCP.device)
    x_BMK = 1.0 / (lam_BM[:, :, None] + nodes_K)
    z_BCM = (unit_BCP @ vectors_BPM).square() / torch.where(top_B > 0, top_B, 1.0)[:, None, None]
    f_BCK = nodes_K * (z_BCM @ x_BMK.square()) / (1.0 - z_BCM @ x_BMK).clamp(min=1e-300)
    return top_B.sqrt()[:, None] * (f_BCK @ weights_K)


def _normalised(lam_BM: Tensor) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue, and all of them as shares of it, never negative."""
    top_B = lam_BM[:, -1].clamp(min=0)
    return top_B, (lam_BM / torch.where(top_B > 0, top_B, 1.0)[:, None]).clamp(min=0)


def _quadrature(device: torch.device) -> tuple[Tensor, Tensor]:
    nodes, weights = _nodes_and_weights()
    return torch.tensor(nodes, dtype=torch.float64, device=device), torch.tensor(
        weights, dtype=torch.float64, device=device
    )


@cache
def _nodes_and_weights() -> tuple[list[float], list[float]]:
    """Nodes t_k = s_k^2 and weights (2 / pi) h ds/du of the midpoint rule on [0, K(1 - m)]."""
    quarter = math.pi / (2 * _agm(1.0, math.sqrt(SMALLEST)))
    step = quarter / NODES
    nodes, weights = [], []
    for k in range(NODES):
        sc = _sc((k + 0.5) * step, quarter)
        slope = math.sqrt(SMALLEST * (1 + SMALLEST * sc * sc) * (1 + sc * sc))
        nodes.append(SMALLEST * sc * sc)
        weights.append(2 / math.pi * step * slope)
    return nodes, weights


def _sc(u: float, quarter: float) -> float:
    """The elliptic function sc(u | 1 - m); near the quarter period by sc(K - u) sc(u) = 1 / sqrt(m)."""
    if u > quarter / 2:
        return 1 / (math.sqrt(SMALLEST) * _sc(quarter - u, quarter))
    a, b = [1.0], [math.sqrt(SMALLEST)]
    ratios = []
    for _ in range(_AGM_STEPS):
        a_last, b_last = a[-1], b[-1]
        a.append((a_last + b_last) / 2)
        b.append(math.sqrt(a_last * b_last))
        ratios.append((a_last - b_last) / 2 / a[-1])
    phi = 2**_AGM_STEPS * a[-1] * u
    for ratio in reversed(ratios):
        phi = (phi + math.asin(ratio * math.sin(phi))) / 2
    return math.tan(phi)


def _agm(a: float, b: float) -> float:
    for _ in range(_AGM_STEPS):
        a, b = (a + b) / 2, math.sqrt(a * b)
    return a
