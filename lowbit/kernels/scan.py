"""A Mamba2 mixer between its projections, in int8: the convolution, the scan of many tokens, and that of one more.

The state is rounded at the end of every run of `ssm.CHUNK` tokens only, so rounding makes runs depend on one another: a program
of the scan has some channels of a head, walks over runs, and has their state as codes in memory. Within a run all is products
(the quadratic form of 2405.21060, section 6); those of C and B are of int8, and exact.

A step reads the state of the last boundary and x, B and dt of the tokens since, to which it adds its own; it writes a state
only when these fill a run. Reading half a run on average costs a quarter of writing every state would, at a state size of 128.
How many tokens there are is read from memory, so that a CUDA graph of a step serves all steps. Programs write only what no
other program reads; nothing is added atomically.
"""

import triton
import triton.language as tl
from torch import Tensor

from lowbit.formats import FORMATS
from lowbit.kernels.reference import Scan
from lowbit.kernels.weight_only import processors
from lowbit.ssm import CHUNK

_ROUNDS = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away, it rounds to whole numbers, half to even
_LOW, _HIGH = tl.constexpr(FORMATS["int8"].min), tl.constexpr(FORMATS["int8"].max)
_RUN = tl.constexpr(CHUNK)


@triton.jit
def _coded(v, scale):
    """v / scale as whole numbers of int8, still floats. scale: float32, in the shape of v or less."""
    v = tl.div_rn(v, tl.broadcast_to(scale, v.shape))
    return tl.minimum(tl.maximum(v, _LOW), _HIGH) + _ROUNDS - _ROUNDS


@triton.jit
def _known(v, scale):
    """v, rounded to int8 where there is a scale."""
    if scale > 0:
        v = _coded(v, tl.full(v.shape, 0.0, tl.float32) + scale) * scale
    return v


@triton.jit
def _time_step(dt, bias, scale, low, high):
    """softplus(dt + bias), within its limits."""
    v = _known(dt, scale) + bias
    e = tl.exp(-tl.abs(v))
    small = e * (1.0 - e * (0.5 - e * (0.3333333333 - e * 0.25)))
    v = tl.maximum(v, 0.0) + tl.where(e < 0.03, small, tl.log(1.0 + e))  # log(1 + e) loses what e has of digits
    return tl.minimum(tl.maximum(v, low), high)


# ---------------------------------------------------------------------------------------------------- the convolution


@triton.jit
def _conv_kernel(
    x, past, weight, bias, scales, out, length, width, row_stride, token_stride, in_scale,
    TAPS: tl.constexpr, CODED: tl.constexpr, BIASED: tl.constexpr, REPLACES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [batch, length, width]; programs: channels, tokens, rows. REPLACES: the only program of its channels and row puts
    the last tokens into past [batch, TAPS - 1, width]."""
    row = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = c < width
    before = past + row * (TAPS - 1) * width + c
    x += row * row_stride
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for tap in tl.static_range(TAPS):
        at = t + (tap - (TAPS - 1))
        is_new = ((at >= 0) & (t < length))[:, None] & inside[None, :]
        is_old = ((at < 0) & (t < length))[:, None] & inside[None, :]
        v = tl.load(x + at.to(tl.int64)[:, None] * token_stride + c[None, :], mask=is_new, other=0.0).to(tl.float32)
        if not CODED:
            v = _coded(v, tl.full(v.shape, 0.0, tl.float32) + in_scale)
        v += tl.load(before[None, :] + (at + (TAPS - 1))[:, None] * width, mask=is_old, other=0).to(tl.float32)
        acc += v * in_scale * tl.load(weight + c * TAPS + tap, mask=inside, other=0.0)[None, :]
    if BIASED:
        acc += tl.load(bias + c, mask=inside, other=0.0)[None, :]
    acc = acc * tl.sigmoid(acc)
    codes = _coded(acc, tl.load(scales + c, mask=inside, other=1.0)[None, :])
    place = (row * length + t)[:, None] * width + c[None, :]
    tl.store(out + place, codes.to(tl.int8), mask=(t < length)[:, None] & inside[None, :])
    if REPLACES:
        tl.debug_barrier()  # all of past has been read
        for slot in tl.static_range(TAPS - 1):  # in order: a slot takes what stands in a later one
            at = tl.zeros((BLOCK_C,), tl.int32) + length - (TAPS - 1) + slot
            is_new = inside & (at >= 0)
            v = tl.load(x + at * token_stride + c, mask=is_new, other=0.0).to(tl.float32)
            if not CODED:
                v = _coded(v, tl.full(v.shape, 0.0, tl.float32) + in_scale)
            v += tl.load(before + (at + (TAPS - 1)) * width, mask=inside & (at < 0), other=0).to(tl.float32)
            tl.debug_barrier()
            tl.store(before + slot * width, v.to(tl.int8), mask=inside)


def conv(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor | None, in_scale: float, scales: Tensor, out: Tensor) -> None:
    """Fill `out` and renew `past`; see `reference.conv`. Rows and tokens of x may lie any distance apart, channels do not."""
    batch, length, width = x.shape
    if not x.numel():
        return
    block_t = 1 if length == 1 else 16
    replaces = length <= block_t
    block_c = 256 if length == 1 else 128
    _conv_kernel[(triton.cdiv(width, block_c), triton.cdiv(length, block_t), batch)](
        *(x, past, weight, bias, scales, out, length, width, x.stride(0), x.stride(1), in_scale),
        TAPS=weight.shape[1],
        CODED=not x.dtype.is_floating_point,
        BIASED=bias is not None,
        REPLACES=replaces,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        num_warps=2 if length == 1 else 4,
    )
    if not replaces:
        last = x[:, 1 - weight.shape[1] :]
        if x.dtype.is_floating_point:
            last = (last.float() / in_scale).round_().clamp_(FORMATS["int8"].min, FORMATS["int8"].max)
        past.copy_(last)


# ----------------------------------------------------------------------------------------------------------- the scans


@triton.jit
def _scan_kernel(
    codes, dt, z, A, D, dt_bias, scales, state_scale, labels, state, out,
    length, heads, groups, p, n, low, high, z_scale, dt_scale, row_stride, token_stride,
    dt_row_stride, dt_token_stride, z_row_stride, z_token_stride,
    GATED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [batch, length, channels], state [batch, channels, n]; programs: blocks of a head's channels, heads, rows."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (heads // groups)
    channels = heads * p
    within = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = within < p
    c = head * p + within
    own = state + (row * channels + c)[:, None] * n
    state_scale += tl.load(labels + c, mask=inside, other=0)[:, None] * n
    a, skip, bias = tl.load(A + head), tl.load(D + head), tl.load(dt_bias + head)
    x_scale = tl.load(scales + c, mask=inside, other=0.0)
    b_at = channels + group * n
    c_at = b_at + groups * n
    b_scale, c_scale = tl.load(scales + b_at), tl.load(scales + c_at)
    i = tl.arange(0, _RUN)
    past = i[:, None] >= i[None, :]
    for start in range(0, length, _RUN):
        t = (start + i).to(tl.int64)
        new = t < length
        both = new[:, None] & inside[None, :]
        token = codes + row * row_stride + t[:, None] * token_stride
        scores = tl.zeros((_RUN, _RUN), tl.int32)
        carried = tl.zeros((_RUN, BLOCK_P), tl.float32)
        for n0 in range(0, n, BLOCK_N):
            j = n0 + tl.arange(0, BLOCK_N)[None, :]
            b_codes = tl.load(token + b_at + j, mask=new[:, None] & (j < n), other=0)
            c_codes = tl.load(token + c_at + j, mask=new[:, None] & (j < n), other=0)
            scores = tl.dot(c_codes, tl.trans(b_codes), scores, out_dtype=tl.int32)
            h = tl.load(own + j, mask=inside[:, None] & (j < n), other=0).to(tl.float32)
            h *= tl.load(state_scale + j, mask=inside[:, None] & (j < n), other=1.0)
            carried = tl.dot(c_codes.to(tl.float32), tl.trans(h), carried, input_precision="tf32")
        raw = tl.load(dt + row * dt_row_stride + t * dt_token_stride + head, mask=new, other=0.0).to(tl.float32)
        step = tl.where(new, _time_step(raw, bias, dt_scale, low, high), 0.0)
        decay = tl.cumsum(step * a, 0)
        total = tl.sum(step * a, 0)
        x = tl.load(token + c[None, :], mask=both, other=0).to(tl.float32) * x_scale[None, :]
        between = tl.where(past, decay[:, None] - decay[None, :], float("-inf"))
        weights = scores.to(tl.float32) * (b_scale * c_scale) * tl.exp(between) * step[None, :]
        y = tl.dot(weights, x, input_precision="tf32") + carried * (tl.exp(decay) * c_scale)[:, None] + x * skip
        if GATED:
            gate = z + row * z_row_stride + t[:, None] * z_token_stride + c[None, :]
            g = _known(tl.load(gate, mask=both, other=0.0).to(tl.float32), z_scale)
            y *= g * tl.sigmoid(g)
        tl.store(out + (row * length + t)[:, None] * channels + c[None, :], y.to(out.dtype.element_ty), mask=both)
        if start + _RUN <= length:
            grows = tl.trans(x * (step * tl.exp(total - decay) * b_scale)[:, None])
            for n0 in range(0, n, BLOCK_N):
                j = n0 + tl.arange(0, BLOCK_N)[None, :]
                b_codes = tl.load(token + b_at + j, mask=new[:, None] & (j < n), other=0)
                step_of_state = tl.load(state_scale + j, mask=inside[:, None] & (j < n), other=1.0)
                h = tl.load(own + j, mask=inside[:, None] & (j < n), other=0).to(tl.float32) * step_of_state * tl.exp(total)
                h += tl.dot(grows, b_codes.to(tl.float32), input_precision="tf32x3")
                tl.debug_barrier()  # all of this state has been read
                tl.store(own + j, _coded(h, step_of_state).to(tl.int8), mask=inside[:, None] & (j < n))
            tl.debug_barrier()  # it has been written, and may be read


def scan(codes: Tensor, dt: Tensor, z: Tensor | None, state: Tensor, of: Scan, out: Tensor) -> None:
    """Fill `out` and renew `state`; see `reference.scan`. Rows and tokens may lie any distance apart, features do not."""
    batch, length, _ = codes.shape
    heads, n = len(of.A), state.shape[2]
    p = state.shape[1] // heads
    block_p = min(32, max(16, triton.next_power_of_2(p)))
    z_strides = (0, 0) if z is None else z.stride()[:2]
    _scan_kernel[(triton.cdiv(p, block_p), heads, batch)](
        *(codes, dt, z, of.A, of.D, of.dt_bias, of.scales, of.state_scale, of.labels, state, out),
        *(length, heads, of.groups, p, n, *of.limits, of.z_scale, of.dt_scale),
        *(*codes.stride()[:2], *dt.stride()[:2], *z_strides),
        GATED=z is not None,
        BLOCK_P=block_p,
        BLOCK_N=32 if n <= 32 else 64,
        num_warps=4,
        num_stages=1,
    )


@triton.jit
def _step_kernel(
    codes, dt, z, A, D, dt_bias, scales, state_scale, labels, state, tokens, steps, held, out,
    heads, groups, p, n, low, high, z_scale, dt_scale, row_stride, dt_stride, z_stride,
    GATED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [batch, channels]; state, tokens, steps as in `reference.step`. Programs as above."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    each = heads // groups
    group = head // each
    channels = heads * p
    kept = channels + groups * n
    within, j, i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, _RUN)
    inside, there = within < p, j < n
    c = head * p + within
    both = inside[:, None] & there[None, :]
    count = tl.load(held + row)
    old = i < count
    latest = i == count
    codes += row * row_stride
    tokens += row * _RUN * kept
    steps += row * _RUN * heads + head
    b_at = channels + group * n
    c_at = b_at + groups * n

    label = tl.load(labels + c, mask=inside, other=0)
    steps_of_state = state_scale + label[:, None] * n + j[None, :]
    place = state + (row * channels + c)[:, None] * n + j[None, :]
    h = tl.load(place, mask=both, other=0).to(tl.float32) * tl.load(steps_of_state, mask=both, other=1.0)
    x_new = tl.load(codes + c, mask=inside, other=0)
    b_new = tl.load(codes + b_at + j, mask=there, other=0)
    c_new = tl.load(codes + c_at + j, mask=there, other=0).to(tl.float32)
    dt_new = tl.load(dt + row * dt_stride + head).to(tl.float32)
    x = tl.load(tokens + i[:, None] * kept + c[None, :], mask=old[:, None] & inside[None, :], other=0)
    b = tl.load(tokens + i[:, None] * kept + (b_at + j)[None, :], mask=old[:, None] & there[None, :], other=0)
    raw = tl.load(steps + i * heads, mask=old, other=0.0)
    x = tl.where(latest[:, None], x_new[None, :], x).to(tl.float32)
    b = tl.where(latest[:, None], b_new[None, :], b).to(tl.float32)
    raw = tl.where(latest, dt_new, raw)
    tl.store(tokens + count * kept + c, x_new, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(steps + count * heads, dt_new)
        if head % each == 0:
            tl.store(tokens + count * kept + b_at + j, b_new, mask=there)

    x_scale = tl.load(scales + c, mask=inside, other=0.0)
    b_scale, c_scale = tl.load(scales + b_at), tl.load(scales + c_at)
    a, skip, bias = tl.load(A + head), tl.load(D + head), tl.load(dt_bias + head)
    step = tl.where(i <= count, _time_step(raw, bias, dt_scale, low, high), 0.0)
    decay = tl.cumsum(step * a, 0)
    total = tl.sum(step * a, 0)
    share = step * tl.exp(total - decay) * b_scale  # of a token in the state now
    scores = tl.sum(b * c_new[None, :], 1) * share
    y = tl.sum(h * c_new[None, :], 1) * tl.exp(total) + tl.sum(x * scores[:, None], 0) * x_scale
    y = y * c_scale + x_new.to(tl.float32) * x_scale * skip
    if GATED:
        g = _known(tl.load(z + row * z_stride + c, mask=inside, other=0.0).to(tl.float32), z_scale)
        y *= g * tl.sigmoid(g)
    tl.store(out + row * channels + c, y.to(out.dtype.element_ty), mask=inside)
    if count + 1 == _RUN:  # rare; what it needs is read again, so that registers need not hold it
        step_of_state = tl.load(steps_of_state, mask=both, other=1.0)
        h = tl.load(place, mask=both, other=0).to(tl.float32) * step_of_state * tl.exp(total)
        h += (x_new.to(tl.float32) * x_scale * tl.sum(tl.where(latest, share, 0.0), 0))[:, None] * b_new.to(tl.float32)[None, :]
        for s in range(count):
            x_of = tl.load(tokens + s * kept + c, mask=inside, other=0).to(tl.float32) * x_scale
            b_of = tl.load(tokens + s * kept + b_at + j, mask=there, other=0).to(tl.float32)
            h += (x_of * tl.sum(tl.where(i == s, share, 0.0), 0))[:, None] * b_of[None, :]
        tl.debug_barrier()  # all of the state has been read
        tl.store(place, _coded(h, step_of_state).to(tl.int8), mask=both)


def step(
    codes: Tensor, dt: Tensor, z: Tensor | None, cache: tuple[Tensor, Tensor, Tensor], held: Tensor, of: Scan, out: Tensor
) -> None:
    """Fill `out` and renew the cache; see `reference.step`. Rows may lie any distance apart."""
    batch, heads, n = len(codes), len(of.A), of.state_scale.shape[1]
    p = len(of.labels) // heads
    block_p = min(64, max(16, triton.next_power_of_2(p)))
    while block_p > 16 and batch * heads * triton.cdiv(p, block_p) < 2 * processors(codes.device):
        block_p //= 2
    _step_kernel[(triton.cdiv(p, block_p), heads, batch)](
        *(codes, dt, z, of.A, of.D, of.dt_bias, of.scales, of.state_scale, of.labels, *cache, held, out),
        *(heads, of.groups, p, n, *of.limits, of.z_scale, of.dt_scale),
        *(codes.stride(0), dt.stride(0), 0 if z is None else z.stride(0)),
        GATED=z is not None,
        BLOCK_P=block_p,
        BLOCK_N=max(16, triton.next_power_of_2(n)),
        num_warps=4 if block_p == 16 else 8,
    )
