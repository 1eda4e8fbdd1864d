"""How much of a matrix's nuclear norm each row carries, without one SVD per row."""

import importlib
import math
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import NoReturn

import torch
from torch import Tensor

# Shape letters: B images, C channels, P pixels, M = min(C, P), K quadrature nodes.

NODES = 40
SMALLEST = 1e-14  # eigenvalues below this share of their sum are noise of the Gram product in float64
# By so much rounding may leave an eigenvalue of a Gram matrix of trace 1 below zero; a matrix product of constant maps
# was seen to take 1.1e-15 (MKL on an AMD EPYC). Its square root is far below that of SMALLEST.
ROUNDING = 8 * torch.finfo(torch.float64).eps
_CHUNK_BYTES = 64 * 2**20
_AGM_STEPS = 12  # quadratic convergence: from 1 and 1e-7 the means agree to the last bit after 8
_TINY = 1e-300


def channel_independence(maps_BCP: Tensor) -> Tensor:
    """How much the nuclear norm of each image's maps falls when one channel is set to zero.

    With G = A A^T and R(t) = (G + t I)^-1, deleting row i multiplies det(G + t I) by R_ii(t), so that

        CI_i = sqrt(a) - (1 / pi) * integral over s from 0 to infinity of  log((t + a) R_ii(t)) ,   t = s^2,

    for any a >= 0. With a = 1 / R_ii(0), what row i has that the other rows have not, the integrand has no singularity
    at s = 0; the smallest node tells a. The nodes are the midpoint rule under s = sqrt(m) sc(u | 1 - m), for which the
    error falls geometrically for every spectrum in [m, 1].

    Shapes: (B, C, P) or (B, C, H, W) floating -> (B, C) float64, on the device of the maps.
    Unit: that of the activations. 0 <= CI_i <= ||row i||; a dead channel gives exactly 0.
    Cost: half a Gram product and a tridiagonal form of M x M per image where numba is installed (`compiled`), an
    eigendecomposition without it, a Cholesky factor per node on a GPU; no loop over channels.
    Raises: ValueError naming the first image and channel that are not finite.
    Source (code): Sui et al., CHIP, NeurIPS 2021, Eq. 3. Their script rounds maps to 4 decimals first; we do not.
    Nodes: Hale, Higham and Trefethen, SIAM J. Numer. Anal. 46 (2008).
    """
    scores_BC = independence_or_nan(maps_BCP)
    if bool(scores_BC.isnan().any()):
        _refuse(maps_BCP.detach().flatten(2))
    return scores_BC


def independence_or_nan(maps_BCP: Tensor) -> Tensor:
    """`channel_independence` that never waits for the device: an image that is not finite has NaN for every channel."""
    rows_BCP = _rows(maps_BCP)
    if rows_BCP.numel() == 0:
        return rows_BCP.new_zeros(rows_BCP.shape[:2], dtype=torch.float64)
    compiled = _compiled() if rows_BCP.device.type == "cpu" else None
    if compiled is not None:
        return _by_compiled_code(rows_BCP, compiled)
    by_nodes = _by_cholesky if rows_BCP.device.type == "cuda" else _by_eigenvectors
    image_bytes = 8 * max(math.prod(rows_BCP.shape[1:]), NODES * max(rows_BCP.shape[1:]), min(rows_BCP.shape[1:]) ** 2)
    chunks = rows_BCP.split(max(1, _CHUNK_BYTES // image_bytes))
    return torch.cat([_bounded(chunk.double(), by_nodes) for chunk in chunks])


def channel_independence_svd(maps_BCP: Tensor) -> Tensor:
    """The definition, slowly: CI_i = ||A||_* - ||A with row i set to zero||_*, one float64 SVD per image and channel.

    Shapes: (B, C, P) or (B, C, H, W) floating -> (B, C) float64.
    Unit: that of the activations.
    Raises: ValueError naming the first image and channel that are not finite.
    Source (exact): Sui et al., CHIP, NeurIPS 2021, Eq. 3. Kept as the oracle of `channel_independence`.
    """
    rows_BCP = _rows(maps_BCP).double()
    if not bool(torch.isfinite(rows_BCP).all()):
        _refuse(rows_BCP)
    whole_B = torch.linalg.svdvals(rows_BCP).sum(-1)
    scores_BC = rows_BCP.new_zeros(rows_BCP.shape[:2])
    for channel in range(rows_BCP.shape[1]):
        without = rows_BCP.clone()
        without[:, channel] = 0
        scores_BC[:, channel] = whole_B - torch.linalg.svdvals(without).sum(-1)
    return scores_BC


@cache
def quadrature(device: torch.device, *, nodes: int = NODES) -> tuple[Tensor, Tensor]:
    """Nodes t and weights, (2 / pi) ds among them, of an integral over s in (0, infinity) for spectra in [SMALLEST, 1].

    Shapes: -> (K,) and (K,) float64 in ascending order of the nodes; made once for each device, and not to be changed.
    """
    found = _nodes_and_weights(nodes)
    return torch.tensor(found[0], dtype=torch.float64, device=device), torch.tensor(
        found[1], dtype=torch.float64, device=device
    )


@cache
def _compiled() -> ModuleType | None:
    """The compiled kernels, or None where numba or scipy cannot be imported."""
    try:
        for package in ("numba", "scipy.linalg.lapack"):
            importlib.import_module(package)
    except ImportError:  # not there, or not with this numpy
        return None
    compiled = importlib.import_module(".compiled", __package__)
    assert (compiled.NODES, compiled.SMALLEST) == (NODES, SMALLEST), "the kernels are compiled for other nodes"
    return compiled


def _rows(maps: Tensor) -> Tensor:
    if maps.ndim not in (3, 4) or not maps.is_floating_point():
        raise ValueError(
            f"channel independence needs floating maps of shape (B, C, P) or (B, C, H, W); got {maps.dtype} "
            f"{tuple(maps.shape)}."
        )
    return maps.detach().flatten(2)


def _refuse(rows_BCP: Tensor) -> NoReturn:
    image, channel = (~torch.isfinite(rows_BCP).all(-1)).nonzero()[0].tolist()
    raise ValueError(f"image {image}, channel {channel} is not finite.")


def _by_compiled_code(rows_BCP: Tensor, compiled: ModuleType) -> Tensor:
    """On the CPU; squares of float32 maps are normal numbers of float64 as they are, float64 maps are scaled first."""
    rows_BCP = rows_BCP if rows_BCP.dtype in (torch.float32, torch.float64) else rows_BCP.float()
    scale_B = None
    if rows_BCP.dtype == torch.float64:
        scale_B, rows_BCP = _scaled(rows_BCP)
    nodes_K, weights_K = (values.numpy() for values in quadrature(rows_BCP.device))
    scores_BC = torch.from_numpy(
        compiled.independence(rows_BCP.contiguous().numpy(), nodes_K, weights_K, threads=torch.get_num_threads())
    )
    return scores_BC if scale_B is None else scores_BC * scale_B[:, None]


def _bounded(rows_BCP: Tensor, by_nodes: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(B, C, P) float64 -> (B, C), between 0 and the norm of the row; `by_nodes` gives shares of sqrt(top)."""
    scale_B, unit_BCP = _scaled(rows_BCP)
    finite_B = torch.isfinite(scale_B)
    unit_BCP = torch.where(finite_B[:, None, None], unit_BCP, 0.0)
    squares_BC = unit_BCP.square().sum(-1)
    top_B = squares_BC.sum(-1)
    shares_BC = by_nodes(unit_BCP, torch.where(top_B > 0, top_B, 1.0))
    bounded_BC = torch.minimum((shares_BC * top_B.sqrt()[:, None]).clamp(min=0), squares_BC.sqrt())
    scores_BC = torch.where(squares_BC > 0, bounded_BC, 0.0) * scale_B[:, None]
    return torch.where(finite_B[:, None], scores_BC, torch.nan)


def _scaled(rows_BCP: Tensor) -> tuple[Tensor, Tensor]:
    """A power of two near the largest entry of each image (1 for an empty one), and the maps in that unit.

    So no square over- or underflows, and no digit changes. Where an entry is not finite, neither is the scale.
    """
    largest_B = rows_BCP.abs().amax((1, 2))
    power_B = torch.ldexp(torch.ones_like(largest_B), torch.frexp(largest_B).exponent - 1)
    scale_B = torch.where(largest_B > 0, power_B, 1.0)
    scale_B = torch.where(torch.isfinite(largest_B), scale_B, largest_B)
    return scale_B, rows_BCP / scale_B[:, None, None]


def _by_eigenvectors(unit_BCP: Tensor, top_B: Tensor) -> Tensor:
    """One eigendecomposition of the smaller side, then one product with the resolvent's values at all nodes."""
    nodes_K, _ = quadrature(unit_BCP.device)
    by_channel = unit_BCP.shape[1] <= unit_BCP.shape[2]
    gram_BMM = unit_BCP @ unit_BCP.mT if by_channel else unit_BCP.mT @ unit_BCP
    lam_BM, vectors_BMM = torch.linalg.eigh(gram_BMM)
    x_BMK = 1.0 / ((lam_BM / top_B[:, None]).clamp(min=0)[:, :, None] + nodes_K)
    if by_channel:
        return _integral(vectors_BMM.square() @ x_BMK)
    z_BCM = (unit_BCP @ vectors_BMM).square() / top_B[:, None, None]
    return _integral((1.0 - z_BCM @ x_BMK).clamp(min=_TINY) / nodes_K)


def _by_cholesky(unit_BCP: Tensor, top_B: Tensor) -> Tensor:
    """One Cholesky factor per node and image, batched: no iteration, and nothing that waits for the device.

    R_ii = ||L^-1 e_i||^2 on the side of the channels; 1 - t R_ii = ||L^-1 a_i||^2 on the side of the pixels.
    """
    nodes_K, _ = quadrature(unit_BCP.device)
    images, channels, pixels = unit_BCP.shape
    by_channel = channels <= pixels
    gram_BMM = (unit_BCP @ unit_BCP.mT if by_channel else unit_BCP.mT @ unit_BCP) / top_B[:, None, None]
    eye_MM = torch.eye(gram_BMM.shape[-1], dtype=gram_BMM.dtype, device=gram_BMM.device)
    right_BMC = eye_MM.expand(images, -1, -1) if by_channel else unit_BCP.mT / top_B.sqrt()[:, None, None]
    forms = []
    for node in range(NODES):
        shift = nodes_K[node] + ROUNDING
        factor_BMM, _ = torch.linalg.cholesky_ex(gram_BMM + shift * eye_MM)
        forms.append(torch.linalg.solve_triangular(factor_BMM, right_BMC, upper=False).square().sum(-2))
    form_BCK = torch.stack(forms, -1)
    return _integral(form_BCK if by_channel else (1.0 - form_BCK).clamp(min=_TINY) / nodes_K)


def _integral(r_BCK: Tensor) -> Tensor:
    """Channel independence as a share of sqrt(top), from R_ii at the nodes. Shapes: (B, C, K) -> (B, C)."""
    nodes_K, weights_K = quadrature(r_BCK.device)
    own_BC = (1.0 / r_BCK[..., 0] - nodes_K[0]).clamp(max=1.0)
    own_BC = torch.where(own_BC > SMALLEST, own_BC, 0.0)
    logs_BCK = ((nodes_K + own_BC[..., None]) * r_BCK).clamp(min=_TINY).log()
    return own_BC.sqrt() - 0.5 * (logs_BCK @ weights_K)


@cache
def _nodes_and_weights(count: int = NODES) -> tuple[list[float], list[float]]:
    """Nodes t_k = s_k^2 and weights (2 / pi) h ds/du of the midpoint rule on [0, K(1 - m)]."""
    quarter = math.pi / (2 * _agm(1.0, math.sqrt(SMALLEST)))
    step = quarter / count
    nodes, weights = [], []
    for k in range(count):
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
