"""A Mamba2 mixer between its projections, in int8: convolution and scan of many tokens, and both in one kernel for one more.

The state is rounded at the end of every run of `ssm.CHUNK` tokens only, so rounding makes runs depend on one another: a program
of the scan has some channels of a head, walks over runs, and has their state as codes in memory. Within a run all is products
(the quadratic form of 2405.21060, section 6); those of C and B are of int8, and exact.

A step reads the state of the last boundary and x, B and dt of the tokens since, to which it adds its own; it writes a state
only when these fill a run. Reading half a run on average costs a quarter of writing every state would, at a state size of 128.
How many tokens there are is read from memory, so that a CUDA graph of a step serves all steps. A step of one sequence is bound
by the time that reads take, one after another, so no read of it but that of the state's scales waits for another, and every
program convolves its own x and the B and C of its group. That needs no order among programs: what one of them writes, no other
one uses in that step. Nothing is added atomically.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.formats import FORMATS
from lowbit.kernels.reference import Scan
from lowbit.kernels.weight_only import INTERPRETED, processors
from lowbit.ssm import CHUNK

_ROUNDS = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away, it rounds to whole numbers, half to even
_LOW, _HIGH = tl.constexpr(FORMATS["int8"].min), tl.constexpr(FORMATS["int8"].max)
_RUN = tl.constexpr(CHUNK)
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # all slots of a channel


@triton.jit
def _coded(v, scale):
    """v / scale as whole numbers of int8, still floats. scale: float32, in the shape of v or less."""
    return tl.minimum(tl.maximum(v / scale, _LOW), _HIGH) + _ROUNDS - _ROUNDS


@triton.jit
def _known(v, scale):
    """v, rounded to int8 where there is a scale; no branch, which would keep apart what can be computed at once."""
    return tl.where(scale > 0, _coded(v, tl.where(scale > 0, scale, 1.0)) * scale, v)


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
    x, past, weight, bias, scales, out, length, width, held, row_stride, token_stride, in_scale,
    TAPS: tl.constexpr, SLOTS: tl.constexpr, CODED: tl.constexpr, BIASED: tl.constexpr, REPLACES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [batch, length, width]; programs: channels, tokens, rows. REPLACES: the only program of its channels and row puts
    the last tokens into past [batch, width, SLOTS]."""
    row = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = c < width
    both = (t < length)[:, None] & inside[None, :]
    ring = past + (row * width + c)[None, :] * SLOTS
    x += row * row_stride
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for tap in tl.static_range(TAPS):
        at = t + (tap - (TAPS - 1))
        is_new = (at >= 0)[:, None] & both
        v = tl.load(x + at.to(tl.int64)[:, None] * token_stride + c[None, :], mask=is_new, other=0.0).to(tl.float32)
        if not CODED:
            v = _coded(v, in_scale)
        if tap < TAPS - 1:
            v += tl.load(ring + ((held + at) & (SLOTS - 1))[:, None], mask=(at < 0)[:, None] & both, other=0).to(tl.float32)
        acc += v * in_scale * tl.load(weight + c * TAPS + tap, mask=inside, other=0.0)[None, :]
    if BIASED:
        acc += tl.load(bias + c, mask=inside, other=0.0)[None, :]
    acc = acc * tl.sigmoid(acc)
    codes = _coded(acc, tl.load(scales + c, mask=inside, other=1.0)[None, :])
    tl.store(out + (row * length + t)[:, None] * width + c[None, :], codes.to(tl.int8), mask=both)
    if REPLACES:
        tl.debug_barrier()  # all of past has been read
        tl.store(ring + ((held + t) & (SLOTS - 1))[:, None], v.to(tl.int8), mask=both & (t >= length - SLOTS)[:, None])


def conv(
    x: Tensor, past: Tensor, weight: Tensor, bias: Tensor | None, in_scale: float, scales: Tensor, held: int, out: Tensor
) -> None:
    """Fill `out` and renew `past`; see `reference.conv`. Rows and tokens of x may lie any distance apart, channels do not."""
    batch, length, width = x.shape
    if not x.numel():
        return
    slots = past.shape[2]
    block_t, block_c = 16, 128
    replaces = length <= block_t
    _conv_kernel[(triton.cdiv(width, block_c), triton.cdiv(length, block_t), batch)](
        *(x, past, weight, bias, scales, out, length, width, held, x.stride(0), x.stride(1), in_scale),
        TAPS=weight.shape[1],
        SLOTS=slots,
        CODED=not x.dtype.is_floating_point,
        BIASED=bias is not None,
        REPLACES=replaces,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        num_warps=4,
    )
    if not replaces:
        last = x[:, -slots:]
        if x.dtype.is_floating_point:
            last = FORMATS["int8"].round(last.float() / in_scale)
        past.copy_(last.mT.roll((held + length) % slots, -1))


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
def _parts_of(x, past, weight, bias, scales, f, there, TAPS: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr):
    """Of the features f of a token: inputs, those before them in one word of bytes each, taps [f, SLOTS], bias, scale."""
    tap = tl.arange(0, SLOTS)
    taps = tl.load(weight + f[:, None] * TAPS + tap[None, :], mask=there[:, None] & (tap < TAPS)[None, :], other=0.0)
    offset = tl.load(bias + f, mask=there, other=0.0) if BIASED else tl.zeros(f.shape, tl.float32)
    scale = tl.load(scales + f, mask=there, other=1.0)
    return tl.load(x + f, mask=there, other=0.0), tl.load(past + f, mask=there, other=0), taps, offset, scale


@triton.jit
def _convolved(parts, count, in_scale, TAPS: tl.constexpr, SLOTS: tl.constexpr):
    """Codes of the inputs of `_parts_of` and of what the convolution makes of them, all floats [f]."""
    x, past, taps, offset, scale = parts
    tap = tl.arange(0, SLOTS)
    new = x.to(tl.float32)
    if x.dtype.is_floating():
        new = _coded(new, in_scale)
    up = ((count + 1 - TAPS + tap) & (SLOTS - 1)) * 8
    before = (past[:, None] >> up[None, :].to(past.dtype)).to(tl.int8).to(tl.float32)
    acc = tl.sum(tl.where((tap == TAPS - 1)[None, :], new[:, None], before) * taps, 1) * in_scale + offset
    return new.to(tl.int8), _coded(acc * tl.sigmoid(acc), scale)


@triton.jit
def _step_kernel(
    conv_in, dt, z, past, weight, bias, A, D, dt_bias, scales, state_scale, labels, state, tokens, steps, held, out,
    in_scale, low, high, z_scale, dt_scale, row_stride, dt_stride, z_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr, SLOTS: tl.constexpr,
    BIASED: tl.constexpr, GATED: tl.constexpr, ALL: tl.constexpr, AS_IS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [batch, channels]; past: words [batch, width]; the rest of the cache as in `reference.step`. Programs as above, which
    convolve B and C each for itself. ALL: tokens are read before it is known how many are held. AS_IS: of assembly, what copies
    a register; None in the interpreter."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (HEADS // GROUPS)
    channels: tl.constexpr = HEADS * P
    kept: tl.constexpr = channels + GROUPS * N
    width: tl.constexpr = kept + GROUPS * N
    within, j, i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, _RUN)
    inside, there = (within < P) | (P % BLOCK_P == 0), j < N
    c = head * P + within
    b_at = channels + group * N
    both = inside[:, None] & there[None, :]
    conv_in += row * row_stride
    past += row * width
    tokens += row * _RUN * kept
    steps += (row * HEADS + head) * _RUN
    place = state + (row * channels + c)[:, None] * N + j[None, :]
    # Of x a thread has four channels, in several tokens, which it adds up by itself; how these are counted says so.
    q = tl.arange(0, BLOCK_P)
    fours = tl.program_id(0) * BLOCK_P + q // 4 * 4 + q % 4
    x_places = tokens + i[:, None] * kept + (head * P + fours)[None, :]
    b_places = tokens + i[:, None] * kept + (b_at + j)[None, :]

    # All is read before anything is computed: nothing but the scales of the state waits for another read, and these are needed
    # last. No read moves past the barrier, and no computation out of the condition, which always holds; compilers would have
    # some of it wait for the first reads before the last ones start.
    count = tl.load(held + row)
    label = tl.load(labels + c, mask=inside, other=0)
    of_c = _parts_of(conv_in, past, weight, bias, scales, kept + group * N + j, there, TAPS, SLOTS, BIASED)
    of_b = _parts_of(conv_in, past, weight, bias, scales, b_at + j, there, TAPS, SLOTS, BIASED)
    of_x = _parts_of(conv_in, past, weight, bias, scales, c, inside, TAPS, SLOTS, BIASED)
    dt_new = tl.load(dt + row * dt_stride + head).to(tl.float32)
    a, skip, offset = tl.load(A + head), tl.load(D + head), tl.load(dt_bias + head)
    b_scale, c_scale = tl.load(scales + b_at), tl.load(scales + kept + group * N)
    if GATED:
        gate = tl.load(z + row * z_stride + c, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(place, mask=both, other=0)
    old = tl.full((_RUN,), True, tl.int1) if ALL else i < count
    b = tl.load(b_places, mask=old[:, None] & there[None, :], other=0)
    raw = tl.load(steps + i, mask=old, other=0.0)
    x = tl.load(x_places, mask=old[:, None] & inside[None, :], other=0)
    tl.debug_barrier()
    if count < _RUN:
        step_of_state = tl.load(state_scale + label[:, None] * N + j[None, :], mask=both, other=1.0)
        if AS_IS is not None:  # else B would go on to shared memory, which waits for it, right behind its read
            b = tl.inline_asm_elementwise(AS_IS, "=r,r", [b], dtype=tl.int8, is_pure=False, pack=4)

        c_in, c_new = _convolved(of_c, count, in_scale, TAPS, SLOTS)
        b_in, b_new = _convolved(of_b, count, in_scale, TAPS, SLOTS)
        x_in, x_new = _convolved(of_x, count, in_scale, TAPS, SLOTS)
        step = tl.where(i < count, _time_step(raw, offset, dt_scale, low, high), 0.0)
        step_new = _time_step(dt_new, offset, dt_scale, low, high)
        decay = tl.cumsum(step * a, 0)
        before = tl.sum(step * a, 0)
        share = step * tl.exp(before - decay + step_new * a) * b_scale  # of a token in the state now
        share_new = step_new * b_scale
        fades = tl.exp(before + step_new * a)

        same = tl.broadcast_to(c_new.to(tl.int8)[None, :], (16, BLOCK_N))  # the fewest rows of a tensor core
        scores = tl.max(tl.dot(same, tl.trans(b), out_dtype=tl.int32), 0).to(tl.float32)
        y = tl.sum(x.to(tl.float32) * (scores * share)[:, None], 0)
        of_new = x_new * (tl.sum(b_new * c_new, 0) * share_new * c_scale + skip)
        y = (y * c_scale + of_new) * of_x[4]
        y += tl.sum(h.to(tl.float32) * (step_of_state * c_new[None, :]), 1) * (fades * c_scale)
        if GATED:
            g = _known(gate, z_scale)
            y *= g * tl.sigmoid(g)
        tl.store(out + row * channels + c, y.to(out.dtype.element_ty), mask=inside)
        ring = past.to(tl.pointer_type(tl.int8)) + (count & (SLOTS - 1))  # no program needs what is in this slot
        tl.store(tokens + count * kept + c, x_new.to(tl.int8), mask=inside)
        tl.store(ring + c * SLOTS, x_in, mask=inside)
        if tl.program_id(0) == 0:
            tl.store(steps + count, dt_new)
            if head % (HEADS // GROUPS) == 0:
                tl.store(tokens + count * kept + b_at + j, b_new.to(tl.int8), mask=there)
                tl.store(ring + (b_at + j) * SLOTS, b_in, mask=there)
                tl.store(ring + (kept + group * N + j) * SLOTS, c_in, mask=there)
        if count + 1 == _RUN:  # rare; what it needs is read again, so that registers need not hold it
            tl.store(tokens + count * kept + b_at + j, b_new.to(tl.int8), mask=there)  # by every program, which then reads it
            tl.debug_barrier()
            x_codes = tl.load(x_places, mask=inside[None, :], other=0).to(tl.float32)
            share = tl.where(i == count, share_new, share)
            most = tl.maximum(tl.max(share, 0), 1e-30)
            grows = tl.trans(x_codes * (share / most)[:, None])  # up to 128, and into two float16, as float32 takes registers
            upper = grows.to(tl.float16)
            lower = (grows - upper.to(tl.float32)).to(tl.float16)
            for n0 in range(0, N, 32):
                of_tile = n0 + tl.arange(0, 32)
                k = of_tile[None, :]
                b_place = tokens + i[None, :] * kept + b_at + of_tile[:, None]
                here = inside[:, None] & (k < N)
                own = state + (row * channels + c)[:, None] * N + k
                b_codes = tl.trans(tl.load(b_place, mask=(of_tile < N)[:, None], other=0).to(tl.float16))
                unit = tl.load(state_scale + label[:, None] * N + k, mask=here, other=1.0)
                end = tl.load(own, mask=here, other=0).to(tl.float32) * unit * fades
                end += tl.dot(lower, b_codes, tl.dot(upper, b_codes)) * (of_x[4] * most)[:, None]
                tl.debug_barrier()  # all of this state has been read
                tl.store(own, _coded(end, unit).to(tl.int8), mask=here)


def step(
    conv_in: Tensor, dt: Tensor, z: Tensor | None, cache: tuple[Tensor, Tensor, Tensor, Tensor], weight: Tensor,
    bias: Tensor | None, in_scale: float, held: Tensor, of: Scan, out: Tensor,
) -> None:  # fmt: skip
    """Fill `out` and renew the cache; see `reference.step`. Rows may lie any distance apart."""
    batch, heads, n = len(conv_in), len(of.A), of.state_scale.shape[1]
    p = len(of.labels) // heads
    past, *others = cache
    slots = past.shape[2]
    block_p = min(64, max(16, triton.next_power_of_2(p)))
    while block_p > 16 and batch * heads * triton.cdiv(p, block_p) < processors(conv_in.device):
        block_p //= 2
    programs = triton.cdiv(p, block_p), heads, batch
    _step_kernel[programs](
        *(conv_in, dt, z, past.view(_WORDS[slots]), weight, bias, of.A, of.D, of.dt_bias, of.scales, of.state_scale),
        *(of.labels, *others, held, out, in_scale, *of.limits, of.z_scale, of.dt_scale),
        *(conv_in.stride(0), dt.stride(0), 0 if z is None else z.stride(0)),
        HEADS=heads,
        GROUPS=of.groups,
        P=p,
        N=n,
        TAPS=weight.shape[1],
        SLOTS=slots,
        BIASED=bias is not None,
        GATED=z is not None,
        ALL=prod(programs) < 4 * processors(conv_in.device),
        AS_IS=None if INTERPRETED else "mov.b32 $0, $1;",
        BLOCK_P=block_p,
        BLOCK_N=max(32, triton.next_power_of_2(n)),
        num_warps=8 if block_p == 64 else 4,
        maxnreg=128,  # two programs of 8 warps at once
    )
