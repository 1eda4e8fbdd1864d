"""Channel independence of small and middle-sized maps by compiled code; loads only where numba and scipy are installed.

LAPACK spends most of its time on overhead where matrices are small, and on eigenvectors that are never looked at where
they are large. Here G = A A^T is brought to a tridiagonal T = Q^T G Q only, and the diagonal of (G + t I)^-1 follows at
every node t from one forward substitution with each row of Q: no iteration, no eigenvector.

The kernels work on packs of eight float64, which LLVM turns into whatever vector registers the CPU has.
"""

import importlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

# Shape letters: B images, C channels, P pixels, M = min(C, P), S = M rounded up to whole packs.

LANES = 8
NODES, SMALLEST = 40, 1e-14  # as in `nuclear`; here too, because numba's cache notices changes of this file only
WIDEST = 128
"""Above this M LAPACK's blocked reduction is the faster one."""
_NOTHING = 1e-60  # far below what rounding leaves of rows that depend on others; tau squared must not overflow
_TILE = 4096  # float64 values of the maps that stay in the first-level cache while the Gram matrix is formed


def _can_cache() -> bool:
    """Whether numba finds a folder that it may write compiled code to."""
    try:
        njit(cache=True)(_can_cache)
    except RuntimeError:
        return False
    return True


_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": _can_cache(),  # one file for everything: numba looks at the file of the compiled function only
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz"},  # NaN must stay NaN
}
# All in one: else code that was just compiled calls kernels compiled apart, which add up in another order than the
# copies that numba's cache brings, and the first run of an installation has other last bits than every later one.
_kernel: Any = njit(forceinline=True, **_OPTIONS)
_lapack: Any = importlib.import_module("scipy.linalg.lapack")  # made at run time: no type checker sees its functions


def independence(maps_BCP: np.ndarray, nodes_K: np.ndarray, weights_K: np.ndarray, *, threads: int) -> np.ndarray:
    """Channel independence of each image, as `nuclear.channel_independence` defines it.

    Shapes: (B, C, P) float32 or float64, contiguous -> (B, C) float64; an image that is not finite is NaN throughout.
    Unit: that of the activations; float64 maps must be scaled so that no square overflows.
    Cost: half a Gram product, 8/3 M^3 for the tridiagonal form, 120 C M for the nodes; images go to `threads` threads.
    """
    images, channels, pixels = maps_BCP.shape
    scores_BC = np.empty((images, channels))
    work = _small if min(channels, pixels) <= WIDEST and channels <= pixels else _large
    bounds = np.linspace(0, images, max(1, min(threads, images)) + 1).astype(int)
    spans = [slice(first, last) for first, last in pairwise(bounds)]
    if len(spans) == 1:
        work(maps_BCP, nodes_K, weights_K, scores_BC)
    else:
        with ThreadPoolExecutor(len(spans)) as pool:
            list(pool.map(lambda span: work(maps_BCP[span], nodes_K, weights_K, scores_BC[span]), spans))
    return scores_BC


def _large(maps_BCP: np.ndarray, nodes_K: np.ndarray, weights_K: np.ndarray, scores_BC: np.ndarray) -> None:
    """Image by image, the matrix products and the reduction by BLAS and LAPACK, on the smaller side of the maps."""
    by_channel = maps_BCP.shape[1] <= maps_BCP.shape[2]
    low, inverse = (_aligned(min(maps_BCP.shape[1:]) * NODES) for _ in range(2))
    for maps_CP, scores_C in zip(maps_BCP, scores_BC, strict=True):
        rows_CP = maps_CP.astype(np.float64)
        gram_MM = rows_CP @ rows_CP.T if by_channel else rows_CP.T @ rows_CP
        top = float(np.trace(gram_MM))
        if not 0 < top < np.inf:
            scores_C[:] = 0.0 if top == 0 else np.nan
            continue
        diagonal_M, beside_M, q_MM = _tridiagonal(gram_MM)
        rows_CM = q_MM if by_channel else rows_CP @ q_MM
        if by_channel:
            squares_C = np.diagonal(gram_MM).copy()
        else:
            squares_C = np.einsum("cp,cp->c", rows_CP, rows_CP)
            rows_CM /= math.sqrt(top)
        _shares(
            diagonal_M,
            beside_M,
            top,
            nodes_K,
            weights_K,
            low,
            inverse,
            np.ascontiguousarray(rows_CM),
            by_channel,
            scores_C,
        )
        _bound(scores_C, squares_C, top)


def _tridiagonal(gram_MM: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d, e and Q with G = Q T Q^T; e[k] stands between d[k - 1] and d[k], e[0] is not used."""
    width = len(gram_MM)
    beside_M = np.zeros(width)
    if width == 1:
        return gram_MM[0].copy(), beside_M, np.ones((1, 1))
    reflectors, diagonal_M, beside_M[1:], tau, _ = _lapack.dsytrd(gram_MM.T, lower=1, lwork=32 * width)
    q_MM = np.zeros((width, width))
    q_MM[0, 0] = 1.0
    q_MM[1:, 1:] = _lapack.dorgqr(reflectors[1:, :-1], tau, lwork=32 * width)[0]
    return diagonal_M, beside_M, q_MM


# -- packs: eight float64 in a vector register -------------------------------------------------------------------------

_DOUBLE, _INT32 = ir.DoubleType(), ir.IntType(32)
_DOUBLES, _SINGLES = ir.VectorType(_DOUBLE, LANES), ir.VectorType(ir.FloatType(), LANES)
_INTEGERS = ir.VectorType(ir.IntType(64), LANES)
_ROOT_HALF = 0x3FE6A09E667F3BCD  # the bits of sqrt(1/2)
_FUSED = ("contract",)  # a product and a sum become one instruction where the CPU has it


class _PackType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="chip_deploy_pack")


pack = _PackType()


@register_model(_PackType)
class _PackModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _DOUBLES)


def _operation(arguments: int, build: Callable[..., Any], result: Any = pack, *, operand: Any = pack) -> Any:
    """A numba function of `arguments` operands that `build(builder, *values)` writes as LLVM instructions."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return build(builder, *values)

    signature = result(*[operand] * arguments)
    match arguments:
        case 1:
            return intrinsic(lambda _typing, a: (signature, generate))
        case 2:
            return intrinsic(lambda _typing, a, b: (signature, generate))
        case _:
            return intrinsic(lambda _typing, a, b, c: (signature, generate))


def _whole(value: int) -> Any:
    return ir.Constant(_INTEGERS, [value] * LANES)


def _same(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_DOUBLES, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES))


def _sum(builder: Any, a: Any) -> Any:
    kind = ir.FunctionType(_DOUBLE, [_DOUBLE, _DOUBLES])
    add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f64")
    return builder.call(add, [ir.Constant(_DOUBLE, 0.0), a], fastmath=("reassoc",))


def _whole_exponent(builder: Any, a: Any) -> Any:
    return builder.ashr(builder.sub(builder.bitcast(a, _INTEGERS), _whole(_ROOT_HALF)), _whole(52))


def _without_exponent(builder: Any, a: Any) -> Any:
    bits = builder.bitcast(a, _INTEGERS)
    return builder.bitcast(builder.sub(bits, builder.shl(_whole_exponent(builder, a), _whole(52))), _DOUBLES)


def _plus_product(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(c, builder.fmul(a, b, flags=_FUSED), flags=_FUSED)


def _minus_product(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fsub(c, builder.fmul(a, b, flags=_FUSED), flags=_FUSED)


splat = _operation(1, _same, operand=types.float64)
first_lane = _operation(1, lambda b, a: b.extract_element(a, ir.Constant(_INT32, 0)), types.float64)
total = _operation(1, _sum, types.float64)
exponent = _operation(1, lambda b, a: b.sitofp(_whole_exponent(b, a), _DOUBLES))
mantissa = _operation(1, _without_exponent)
add = _operation(2, lambda b, x, y: b.fadd(x, y))
subtract = _operation(2, lambda b, x, y: b.fsub(x, y))
multiply = _operation(2, lambda b, x, y: b.fmul(x, y))
divide = _operation(2, lambda b, x, y: b.fdiv(x, y))
larger = _operation(2, lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
plus_product = _operation(3, _plus_product)  # c + a b
minus_product = _operation(3, _minus_product)  # c - a b


def _address(context: Any, builder: Any, signature: Any, values: Any, kind: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, values[0])
    return builder.bitcast(builder.gep(array.data, [values[1]]), kind.as_pointer())


def _load(_typing: Any, array: Any, at: Any) -> Any:
    """Eight values of a contiguous float32 or float64 array from the flat position `at` on."""
    single = array.dtype == types.float32

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if not single:
            return builder.load(_address(context, builder, signature, values, _DOUBLES), align=8)
        return builder.fpext(builder.load(_address(context, builder, signature, values, _SINGLES), align=4), _DOUBLES)

    return pack(array, types.intp), generate


load: Any = intrinsic(_load)


def _store(_typing: Any, array: Any, at: Any, value: Any) -> Any:
    """Write a pack into a contiguous float64 array."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[2], _address(context, builder, signature, values, _DOUBLES), align=8)
        return context.get_dummy_value()

    return types.void(array, types.intp, pack), generate


store: Any = intrinsic(_store)


@_kernel
def _log(x):
    """The natural logarithm of positive normal numbers: 2 artanh((m - 1) / (m + 1)) + e ln 2 for x = m 2^e.

    With m in [sqrt(1/2), sqrt(2)) the ten terms of the series leave less than 1e-16.
    """
    less = subtract(mantissa(x), splat(1.0))
    s = divide(less, add(less, splat(2.0)))
    z = multiply(s, s)
    y = plus_product(z, splat(1 / 21), splat(1 / 19))
    y = plus_product(z, y, splat(1 / 17))
    y = plus_product(z, y, splat(1 / 15))
    y = plus_product(z, y, splat(1 / 13))
    y = plus_product(z, y, splat(1 / 11))
    y = plus_product(z, y, splat(1 / 9))
    y = plus_product(z, y, splat(1 / 7))
    y = plus_product(z, y, splat(1 / 5))
    y = plus_product(z, y, splat(1 / 3))
    y = plus_product(multiply(z, s), y, s)
    return plus_product(exponent(x), splat(math.log(2)), add(y, y))


# -- the kernels -------------------------------------------------------------------------------------------------------


@_kernel
def _small(maps, nodes, weights, scores):
    """Image by image, all of it here: maps (B, C, P) with C <= P -> scores (B, C)."""
    images, c, p = maps.shape
    s = (c + LANES - 1) // LANES * LANES
    g, q, w = _aligned(s * s).reshape((s, s)), _aligned(s * s).reshape((s, s)), _aligned(s)
    d, e, tau, squares = np.zeros(c), np.zeros(c), np.zeros(c), np.empty(c)
    blocks = (c + 3) // 4
    step = max(LANES, min(_TILE // (4 * blocks) // LANES * LANES, (p + LANES - 1) // LANES * LANES))
    tile, sums = _aligned(4 * blocks * step), _aligned(blocks * (blocks + 1) // 2 * 16 * LANES)
    low, inverse = _aligned(c * NODES), _aligned(c * NODES)
    for image in range(images):
        _gram(maps[image], g, tile, sums, step)
        top = 0.0
        for i in range(c):
            squares[i] = g[i, i]
            top += g[i, i]
        if not 0.0 < top < np.inf:
            scores[image, :] = 0.0 if top == 0.0 else np.nan
            continue
        for at in range(0, s * s, LANES):
            store(g, at, multiply(splat(1.0 / top), load(g, at)))  # the reduction takes fourth powers of the maps
        _reduce(g, d, e, tau, w)
        _accumulate(g, tau, w, q)
        _shares(d, e, 1.0, nodes, weights, low, inverse, q, c <= p, scores[image])
        _bound(scores[image], squares, top)


@_kernel
def _aligned(count):
    """Zeros that begin at a cache line: a pack that crosses two lines costs twice."""
    spare = np.zeros(count + LANES)
    start = (64 - spare.ctypes.data % 64) % 64 // 8
    return spare[start : start + count]


@_kernel
def _bound(scores, squares, top):
    """From shares of sqrt(top) to the unit of the maps, between 0 and the norm of the row."""
    for i in range(len(scores)):
        scores[i] = min(max(scores[i] * math.sqrt(top), 0.0), math.sqrt(squares[i]))


@_kernel
def _gram(a, g, tile, sums, step):
    """a (C, P) -> g (S, S) = a a^T, both halves; in tiles of pixels, four rows against four."""
    c, p = a.shape
    blocks = (c + 3) // 4
    for at in range(0, len(sums), LANES):
        store(sums, at, splat(0.0))
    for start in range(0, p, step):
        length = _fill(tile, a, start, min(p, start + step), step)
        at = 0
        for i in range(blocks):
            for j in range(i + 1):
                if i == j:
                    _triangle(tile, 4 * i * step, step, length, sums, at)
                else:
                    _four_by_four(tile, 4 * i * step, 4 * j * step, step, length, sums, at)
                at += 16 * LANES
    at = 0
    for i in range(blocks):
        for j in range(i + 1):
            for row in range(4 * i, 4 * i + 4):
                for column in range(4 * j, 4 * j + 4):
                    if column <= row < c:
                        g[row, column] = g[column, row] = total(load(sums, at))
                    at += LANES


@_kernel
def _fill(tile, a, start, stop, step):
    """Copy the pixels from start to stop as float64, zeros behind them up to a whole pack; returns their number."""
    c, p = a.shape
    count = stop - start
    whole, padded = count // LANES * LANES, (count + LANES - 1) // LANES * LANES
    for row in range(c):
        for x in range(0, whole, LANES):
            store(tile, row * step + x, load(a, row * p + start + x))
        for x in range(whole, padded):
            tile[row * step + x] = a[row, start + x] if x < count else 0.0
    return padded


@_kernel
def _four_by_four(tile, i, j, step, length, sums, at):
    """Add the products of four rows from i with four rows from j, pack by pack, to the sixteen sums at `at`."""
    s00, s01, s02, s03 = _four(sums, at)
    s10, s11, s12, s13 = _four(sums, at + 4 * LANES)
    s20, s21, s22, s23 = _four(sums, at + 8 * LANES)
    s30, s31, s32, s33 = _four(sums, at + 12 * LANES)
    for x in range(0, length, LANES):
        v0, v1 = load(tile, j + x), load(tile, j + step + x)
        v2, v3 = load(tile, j + 2 * step + x), load(tile, j + 3 * step + x)
        u = load(tile, i + x)
        s00, s01 = plus_product(u, v0, s00), plus_product(u, v1, s01)
        s02, s03 = plus_product(u, v2, s02), plus_product(u, v3, s03)
        u = load(tile, i + step + x)
        s10, s11 = plus_product(u, v0, s10), plus_product(u, v1, s11)
        s12, s13 = plus_product(u, v2, s12), plus_product(u, v3, s13)
        u = load(tile, i + 2 * step + x)
        s20, s21 = plus_product(u, v0, s20), plus_product(u, v1, s21)
        s22, s23 = plus_product(u, v2, s22), plus_product(u, v3, s23)
        u = load(tile, i + 3 * step + x)
        s30, s31 = plus_product(u, v0, s30), plus_product(u, v1, s31)
        s32, s33 = plus_product(u, v2, s32), plus_product(u, v3, s33)
    _put_four(sums, at, s00, s01, s02, s03)
    _put_four(sums, at + 4 * LANES, s10, s11, s12, s13)
    _put_four(sums, at + 8 * LANES, s20, s21, s22, s23)
    _put_four(sums, at + 12 * LANES, s30, s31, s32, s33)


@_kernel
def _triangle(tile, i, step, length, sums, at):
    """The same for four rows against themselves, where ten sums of the sixteen are enough."""
    s00, s10, s11 = load(sums, at), load(sums, at + 4 * LANES), load(sums, at + 5 * LANES)
    s20, s21, s22, _ = _four(sums, at + 8 * LANES)
    s30, s31, s32, s33 = _four(sums, at + 12 * LANES)
    for x in range(i, i + length, LANES):
        v0, v1, v2, v3 = load(tile, x), load(tile, x + step), load(tile, x + 2 * step), load(tile, x + 3 * step)
        s00, s10, s11 = plus_product(v0, v0, s00), plus_product(v1, v0, s10), plus_product(v1, v1, s11)
        s20, s21, s22 = plus_product(v2, v0, s20), plus_product(v2, v1, s21), plus_product(v2, v2, s22)
        s30, s31 = plus_product(v3, v0, s30), plus_product(v3, v1, s31)
        s32, s33 = plus_product(v3, v2, s32), plus_product(v3, v3, s33)
    store(sums, at, s00)
    store(sums, at + 4 * LANES, s10)
    store(sums, at + 5 * LANES, s11)
    _put_four(sums, at + 8 * LANES, s20, s21, s22, s22)
    _put_four(sums, at + 12 * LANES, s30, s31, s32, s33)


@_kernel
def _four(sums, at):
    return load(sums, at), load(sums, at + LANES), load(sums, at + 2 * LANES), load(sums, at + 3 * LANES)


@_kernel
def _put_four(sums, at, a, b, c, d):
    store(sums, at, a)
    store(sums, at + LANES, b)
    store(sums, at + 2 * LANES, c)
    store(sums, at + 3 * LANES, d)


@_kernel
def _reduce(g, d, e, tau, w):
    """g (S, S), symmetric, of trace 1, to tridiagonal form from the last row up, by reflections I - tau v v^T.

    Leaves the diagonal in d, what stands beside it in e (e[k] between k - 1 and k), and v of step k in g[k, :k].
    """
    s, c = g.shape[1], len(d)
    for k in range(c - 1, 1, -1):
        d[k], beside = g[k, k], g[k, k - 1]
        stop = (k + LANES - 1) // LANES * LANES
        g[k, k - 1] = 0.0
        for j in range(k, stop):
            g[k, j] = 0.0  # packs reach behind v, where nothing may stand
        tail = _dot(g, k * s, g, k * s, stop)
        if tail < _NOTHING:
            e[k], tau[k] = beside, 0.0
            continue
        norm = math.sqrt(beside * beside + tail)
        e[k] = -norm if beside > 0 else norm
        tau[k] = 1.0 / (norm * (norm + abs(beside)))
        g[k, k - 1] = beside - e[k]
        _combine(g, k, g, w, stop)
        minus = splat(-0.5 * tau[k] * tau[k] * _dot(w, 0, g, k * s, stop))
        for j in range(0, stop, LANES):
            store(w, j, plus_product(minus, load(g, k * s + j), multiply(splat(tau[k]), load(w, j))))
        for j in range(k, stop):
            w[j] = 0.0
        _subtract_both(g, k, w, stop)
    d[0], e[0], tau[0] = g[0, 0], 0.0, 0.0
    if c > 1:
        d[1], e[1], tau[1] = g[1, 1], g[1, 0], 0.0


@_kernel
def _accumulate(g, tau, w, q):
    """The product of the reflections that `_reduce` left, q (S, S): its row i belongs to channel i."""
    s, c = g.shape[1], len(tau)
    for at in range(0, s * s, LANES):
        store(q, at, splat(0.0))
    for i in range(c):
        q[i, i] = 1.0
    for k in range(2, c):
        if tau[k] == 0.0:
            continue
        stop = (k + LANES - 1) // LANES * LANES
        _combine(g, k, q, w, stop)
        for j in range(0, stop, LANES):
            store(w, j, multiply(splat(tau[k]), load(w, j)))
        for j in range(k, stop):
            w[j] = 0.0
        _subtract(g, k, w, q, stop)


@_kernel
def _dot(a, i, b, j, count):
    sums = splat(0.0)
    for x in range(0, count, LANES):
        sums = plus_product(load(a, i + x), load(b, j + x), sums)
    return total(sums)


@_kernel
def _combine(g, k, rows, w, stop):
    """w = sum over i < k of g[k, i] times row i of `rows`; four rows at a time, so that w is read less often."""
    s, fours = g.shape[1], k // 4 * 4
    for j in range(0, stop, LANES):
        store(w, j, splat(0.0))
    for i in range(0, fours, 4):
        v0, v1, v2, v3 = splat(g[k, i]), splat(g[k, i + 1]), splat(g[k, i + 2]), splat(g[k, i + 3])
        for j in range(i * s, i * s + stop, LANES):
            even = plus_product(v0, load(rows, j), load(w, j - i * s))
            odd = multiply(v1, load(rows, j + s))
            even, odd = plus_product(v2, load(rows, j + 2 * s), even), plus_product(v3, load(rows, j + 3 * s), odd)
            store(w, j - i * s, add(even, odd))
    for i in range(fours, k):
        v0 = splat(g[k, i])
        for j in range(0, stop, LANES):
            store(w, j, plus_product(v0, load(rows, i * s + j), load(w, j)))


@_kernel
def _subtract(g, k, w, rows, stop):
    """Row i of `rows` loses g[k, i] w, for i < k."""
    s, fours = g.shape[1], k // 4 * 4
    for i in range(0, fours, 4):
        v0, v1, v2, v3 = splat(g[k, i]), splat(g[k, i + 1]), splat(g[k, i + 2]), splat(g[k, i + 3])
        for j in range(i * s, i * s + stop, LANES):
            x = load(w, j - i * s)
            store(rows, j, minus_product(v0, x, load(rows, j)))
            store(rows, j + s, minus_product(v1, x, load(rows, j + s)))
            store(rows, j + 2 * s, minus_product(v2, x, load(rows, j + 2 * s)))
            store(rows, j + 3 * s, minus_product(v3, x, load(rows, j + 3 * s)))
    for i in range(fours, k):
        v0 = splat(g[k, i])
        for j in range(0, stop, LANES):
            store(rows, i * s + j, minus_product(v0, load(w, j), load(rows, i * s + j)))


@_kernel
def _subtract_both(g, k, w, stop):
    """g loses v w^T + w v^T, v being its row k, for the rows and columns before k."""
    s, fours = g.shape[1], k // 4 * 4
    for i in range(0, fours, 4):
        v0, v1, v2, v3 = splat(g[k, i]), splat(g[k, i + 1]), splat(g[k, i + 2]), splat(g[k, i + 3])
        w0, w1, w2, w3 = splat(w[i]), splat(w[i + 1]), splat(w[i + 2]), splat(w[i + 3])
        for j in range(i * s, i * s + stop, LANES):
            v, x = load(g, k * s + j - i * s), load(w, j - i * s)
            store(g, j, minus_product(w0, v, minus_product(v0, x, load(g, j))))
            store(g, j + s, minus_product(w1, v, minus_product(v1, x, load(g, j + s))))
            store(g, j + 2 * s, minus_product(w2, v, minus_product(v2, x, load(g, j + 2 * s))))
            store(g, j + 3 * s, minus_product(w3, v, minus_product(v3, x, load(g, j + 3 * s))))
    for i in range(fours, k):
        v0, w0 = splat(g[k, i]), splat(w[i])
        for j in range(0, stop, LANES):
            v, x = load(g, k * s + j), load(w, j)
            store(g, i * s + j, minus_product(w0, v, minus_product(v0, x, load(g, i * s + j))))


@_kernel
def _shares(d, e, top, nodes, weights, low, inverse, rows, by_channel, shares):
    """Channel independence as a share of sqrt(top), from T = (d, e) and one row (M) a channel; two channels at a time.

    T / top + t I = L D L^T; z = L^-1 row, and sum(z^2 / D) is the quadratic form of the row with the inverse.
    """
    m, channels = len(d), len(shares)
    for n in range(0, NODES, LANES):
        _factorise(d, e, top, nodes, n, low, inverse)
    zero = splat(0.0)
    for i in range(0, channels, 2):
        second = min(i + 1, channels - 1)
        x0 = x1 = x2 = x3 = x4 = y0 = y1 = y2 = y3 = y4 = zero
        a0 = a1 = a2 = a3 = a4 = b0 = b1 = b2 = b3 = b4 = zero
        for k in range(m):
            u, v, at = splat(rows[i, k]), splat(rows[second, k]), k * NODES
            x0, y0, a0, b0 = _forward(low, inverse, at, u, v, x0, y0, a0, b0)
            x1, y1, a1, b1 = _forward(low, inverse, at + LANES, u, v, x1, y1, a1, b1)
            x2, y2, a2, b2 = _forward(low, inverse, at + 2 * LANES, u, v, x2, y2, a2, b2)
            x3, y3, a3, b3 = _forward(low, inverse, at + 3 * LANES, u, v, x3, y3, a3, b3)
            x4, y4, a4, b4 = _forward(low, inverse, at + 4 * LANES, u, v, x4, y4, a4, b4)
        shares[i] = _integral(a0, a1, a2, a3, a4, nodes, weights, by_channel)
        shares[second] = _integral(b0, b1, b2, b3, b4, nodes, weights, by_channel)


@_kernel
def _forward(low, inverse, at, u, v, x, y, a, b):
    """One step of the forward substitution of two rows for eight nodes, and of the sums of squares over D."""
    step, weight = load(low, at), load(inverse, at)
    x, y = minus_product(step, x, u), minus_product(step, y, v)
    return x, y, plus_product(multiply(x, x), weight, a), plus_product(multiply(y, y), weight, b)


@_kernel
def _factorise(d, e, top, nodes, n, low, inverse):
    """L and 1 / D of T / top + t I for eight nodes; D of a positive semidefinite T is t at least, but for rounding."""
    t, one = load(nodes, n), splat(1.0)
    y = divide(one, larger(add(splat(d[0] / top), t), t))
    store(inverse, n, y)
    for k in range(1, len(d)):
        beside = splat(e[k] / top)
        step = multiply(beside, y)
        store(low, k * NODES + n, step)
        y = divide(one, larger(minus_product(step, beside, add(splat(d[k] / top), t)), t))
        store(inverse, k * NODES + n, y)


@_kernel
def _integral(r0, r1, r2, r3, r4, nodes, weights, by_channel):
    """sqrt(a) - sum over the nodes of weight / 2 log((t + a) R), with R from the quadratic forms; see nuclear.py."""
    if not by_channel:
        r0, r1, r2 = _across(r0, nodes, 0), _across(r1, nodes, LANES), _across(r2, nodes, 2 * LANES)
        r3, r4 = _across(r3, nodes, 3 * LANES), _across(r4, nodes, 4 * LANES)
    smallest = first_lane(r0)
    shift = min(1.0 / smallest - nodes[0], 1.0) if smallest > 0.0 else 0.0
    if not shift > SMALLEST:
        shift = 0.0
    a = splat(shift)
    y = multiply(load(weights, 0), _log_at(r0, a, nodes, 0))
    y = plus_product(load(weights, LANES), _log_at(r1, a, nodes, LANES), y)
    y = plus_product(load(weights, 2 * LANES), _log_at(r2, a, nodes, 2 * LANES), y)
    y = plus_product(load(weights, 3 * LANES), _log_at(r3, a, nodes, 3 * LANES), y)
    y = plus_product(load(weights, 4 * LANES), _log_at(r4, a, nodes, 4 * LANES), y)
    return math.sqrt(shift) - 0.5 * total(y)


@_kernel
def _across(r, nodes, at):
    """R = (1 - r) / t, where r is the quadratic form on the pixel side."""
    return divide(larger(subtract(splat(1.0), r), splat(1e-300)), load(nodes, at))


@_kernel
def _log_at(r, a, nodes, at):
    return _log(larger(multiply(r, add(load(nodes, at), a)), splat(1e-300)))
