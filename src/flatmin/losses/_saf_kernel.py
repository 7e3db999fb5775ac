"""A step of SAF as one Triton kernel: compare each row with its past, and write the new one in its place.

One program a row. It reads the past of its sample, computes the loss and its gradient, and writes what is recorded, so
no two programs touch the same row of the history: where a sample occurs twice, its first occurrence compares itself and
records the last one. A row of any length is read in blocks of classes, several times where it takes that.

`_fused` decides when it runs. The plain operations (`History.exchange`, the codecs, `trajectory_loss`) are its oracle.
"""

import triton
import triton.language as tl

from ..history._rows import OUT_OF_RANGE, RANGE
from ._trajectory import BOUND as SOFTEST

NO_EPOCH = tl.constexpr(-1)
WIDEST = tl.constexpr(RANGE)
LOST = tl.constexpr(-OUT_OF_RANGE)
LEAST_HALF = tl.constexpr(-65504.0)
BOUND = tl.constexpr(SOFTEST)
ROUNDING = tl.constexpr(1.5 * 2**23)  # added and subtracted again, it leaves a float32 rounded, halves to even


@triton.jit
def _load(row, stride, column, num_classes, fill, filling):
    """Logits in float32, -inf beyond the last class; masked classes are filled where ``fill``."""
    there = column < num_classes
    value = tl.load(row + column.to(tl.int64) * stride, mask=there, other=-float("inf")).to(tl.float32)
    return tl.where(fill & there & (value == -float("inf")), filling, value)


@triton.jit
def _extent(row, stride, num_classes, filling, BLOCK: tl.constexpr):  # noqa: N803
    """The largest logit of a row, masked classes filled, and whether all are finite then."""
    top = -float("inf")
    wrong = 0
    masked = 0
    for start in range(0, num_classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(row + column.to(tl.int64) * stride, mask=column < num_classes, other=0.0).to(tl.float32)
        known = (value == value) & (column < num_classes)
        top = tl.maximum(top, tl.max(tl.where(known, value, -float("inf")), 0))
        wrong += tl.sum((value != value).to(tl.int32), 0)
        masked += tl.sum((value == -float("inf")).to(tl.int32), 0)
    finite = (wrong == 0) & (top > -float("inf")) & (top < float("inf"))
    return tl.where(finite & (masked > 0), tl.maximum(top, filling), top), finite


@triton.jit
def _softened(logits, temperature):
    """Divided by the temperature and clamped; NaN stays."""
    soft = logits / temperature
    return tl.where(soft > BOUND, BOUND, tl.where(soft < -BOUND, -BOUND, soft))


@triton.jit
def _half_at(row):
    """Two bytes as a float16."""
    low, high = tl.load(row).to(tl.uint16), tl.load(row + 1).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True)


@triton.jit
def _past(row, column, num_classes, size, step, BITS: tl.constexpr):  # noqa: N803
    """What a row of the history says of some classes, in float32, up to a constant of the row."""
    there = column < num_classes
    if BITS == 0:
        value = tl.load(row + column, mask=there, other=0.0).to(tl.float32)
    else:  # a return above would not keep the compiler from what follows
        bit = column * BITS
        byte, shift = bit // 8, bit % 8
        low = tl.load(row + byte, mask=there, other=0).to(tl.int32)
        high = tl.load(row + byte + 1, mask=there & (byte + 1 < size), other=0).to(tl.int32)
        most: tl.constexpr = 2**BITS - 1
        code = ((low >> shift) | (high << (8 - shift))) & most
        lost = tl.where(code == most, step, 0.0) >= WIDEST / most * (1 - 2.0**-11)
        value = tl.where(lost, LOST, code.to(tl.float32) * -step)
    return value


@triton.jit
def _code(row, stride, column, num_classes, finite, filling, top, step, BITS: tl.constexpr):  # noqa: N803
    """The codes of some classes; 0 beyond the last one, and in a row that is not finite."""
    below = top - _load(row, stride, column, num_classes, finite, filling)
    code = tl.div_rn(tl.minimum(below, WIDEST), step) + ROUNDING - ROUNDING
    code = tl.minimum(tl.maximum(code, 0.0), 2.0**BITS - 1)
    return tl.where(finite & (column < num_classes), code, 0.0).to(tl.int32)


@triton.jit
def saf_kernel(
    logits,
    row_stride,
    column_stride,
    rows,
    tags,
    index,
    recorded,
    clock,
    gradients,
    losses,
    compared,
    num_classes,
    num_samples,
    width,
    lag,
    begin,
    temperature,
    scale,
    filling,
    BITS: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    REPEATED: tl.constexpr,  # noqa: N803
    COMPARE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Compares and records one row of a batch.

    Args:
        logits: float32, float16 or bfloat16, shape (B, C).
        row_stride: Elements from a row of logits to the next.
        column_stride: Elements from a class to the next.
        rows: The history, shape (lag, N, width): numbers, or bytes if BITS is not 0.
        tags: The epoch of each row, int32, shape (lag, N).
        index: Sample indices, int64, shape (B,).
        recorded: Which row of logits each program records, int64, shape (B,); -1 for a sample that came before. Read
            if REPEATED, otherwise each its own.
        clock: The current epoch, int32.
        gradients: Of the loss after the logits, float32, shape (B, C).
        losses: Of each row, float32, shape (B,).
        compared: Whether each row had a past, int8, shape (B,).
        num_classes: ``C``.
        num_samples: ``N``.
        width: Elements of a row of the history.
        lag: In epochs, as many as there are slots.
        begin: The first epoch that compares.
        temperature: ``T``.
        scale: Of the loss: ``coefficient * T**2 / B``.
        filling: What a masked class gets, see `losses._masked`.
        BITS: Of a code; 0 for numbers.
        HALF: Whether the numbers are float16, which have the row's largest at 0.
        REPEATED: Whether samples may occur twice.
        COMPARE: Whether to compare at all.
        BLOCK: Classes that are read at a time, a power of two.
    """
    b = tl.program_id(0).to(tl.int64)
    sample = tl.load(index + b)
    mine = b
    if REPEATED:
        mine = tl.load(recorded + b)
    epoch = tl.load(clock)
    wanted = (mine >= 0) & (sample >= 0) & (sample < num_samples)
    place = (epoch % lag).to(tl.int64) * num_samples + sample
    history = rows + place * width
    size = width - 2  # bytes of codes, before those of the step

    if COMPARE:
        row = logits + b * row_stride
        gradient = gradients + b * num_classes
        tag = tl.load(tags + place, mask=wanted, other=NO_EPOCH)
        there = wanted & (epoch >= begin) & (epoch >= lag) & (tag == epoch - lag)
        loss = 0.0
        if there:
            top, finite = _extent(row, column_stride, num_classes, filling, BLOCK)
            step = 1.0
            if BITS > 0:
                step = _half_at(history + size).to(tl.float32)
            past_top = -float("inf")
            for start in range(0, num_classes, BLOCK):
                column = start + tl.arange(0, BLOCK)
                past = _past(history, column, num_classes, size, step, BITS)
                past_top = tl.maximum(past_top, tl.max(tl.where(column < num_classes, past, -float("inf")), 0))
            top, past_top = _softened(top, temperature), _softened(past_top, temperature)
            total = 0.0
            past_total = 0.0
            for start in range(0, num_classes, BLOCK):
                column = start + tl.arange(0, BLOCK)
                known = column < num_classes
                now = _softened(_load(row, column_stride, column, num_classes, finite, filling), temperature)
                past = _softened(_past(history, column, num_classes, size, step, BITS), temperature)
                total += tl.sum(tl.where(known, tl.exp(now - top), 0.0), 0)
                past_total += tl.sum(tl.where(known, tl.exp(past - past_top), 0.0), 0)
            total, past_total = tl.log(total), tl.log(past_total)
            for start in range(0, num_classes, BLOCK):
                column = start + tl.arange(0, BLOCK)
                known = column < num_classes
                value = _load(row, column_stride, column, num_classes, finite, filling)
                now = _softened(value, temperature) - top - total
                past = _softened(_past(history, column, num_classes, size, step, BITS), temperature)
                past = past - past_top - past_total
                share = tl.exp(past)
                loss += tl.sum(tl.where(known, share * (past - now), 0.0), 0)
                slope = (tl.exp(now) - share) * (scale / temperature)
                raw = tl.load(row + column.to(tl.int64) * column_stride, mask=known, other=0.0).to(tl.float32)
                free = (raw > -float("inf")) & (tl.abs(value / temperature) <= BOUND)
                tl.store(gradient + column, tl.where(free, slope, 0.0), mask=known)
        else:
            for start in range(0, num_classes, BLOCK):
                column = start + tl.arange(0, BLOCK)
                tl.store(gradient + column, tl.full([BLOCK], 0.0, tl.float32), mask=column < num_classes)
        tl.store(losses + b, loss * scale)
        tl.store(compared + b, there.to(tl.int8))

    tl.debug_barrier()  # all threads have read the row before any writes it
    if wanted:
        row = logits + mine * row_stride
        top, finite = _extent(row, column_stride, num_classes, filling, BLOCK)
        if BITS == 0:
            for start in range(0, num_classes, BLOCK):
                column = start + tl.arange(0, BLOCK)
                value = _load(row, column_stride, column, num_classes, finite, filling)
                if HALF:
                    value = tl.maximum(value - top, LEAST_HALF)
                value = tl.where(finite, value, 0.0).to(rows.dtype.element_ty)
                tl.store(history + column, value, mask=column < num_classes)
        else:
            most: tl.constexpr = 2**BITS - 1
            deepest = 0.0
            for start in range(0, num_classes, BLOCK):
                column = start + tl.arange(0, BLOCK)
                below = top - _load(row, column_stride, column, num_classes, finite, filling)
                below = tl.where(column < num_classes, tl.minimum(below, WIDEST), 0.0)
                deepest = tl.maximum(deepest, tl.max(below, 0))
            half = tl.div_rn(tl.where(finite, deepest, 0.0), 1.0 * most).to(tl.float16)
            step = half.to(tl.float32)
            step = tl.where(step > 0, step, 1.0)
            for start in range(0, size, BLOCK):
                byte = start + tl.arange(0, BLOCK)
                column = byte * 8 // BITS
                shift = byte * 8 - column * BITS
                low = _code(row, column_stride, column, num_classes, finite, filling, top, step, BITS)
                high = _code(row, column_stride, column + 1, num_classes, finite, filling, top, step, BITS)
                packed = ((low >> shift) | (high << (BITS - shift))) & 255
                tl.store(history + byte, packed.to(tl.uint8), mask=byte < size)
            bits = half.to(tl.uint16, bitcast=True)
            tl.store(history + size, (bits & 255).to(tl.uint8))
            tl.store(history + size + 1, (bits >> 8).to(tl.uint8))
        tl.store(tags + place, tl.where(finite, epoch, NO_EPOCH))
