"""csrc/philox.h and csrc/dtypes.h once more, for Triton: words, normals and stochastic rounding.

The same bits as there, if the kernel is launched with ``enable_fp_fusion=False``, so that fma is
fused exactly where it is written. (Triton's interpreter may differ by 4 ulp: before version 3.8 it
rounds twice in an fma.) Arguments that are scalars stay scalars through the rounds of the generator
for as long as no block index reaches them, which saves a tenth of its arithmetic.
"""

import triton
import triton.language as tl


@triton.jit
def noise_source(rng, stream, query):
    """(key0, key1, stream, draw) of query ``query``, uint32: all but the block."""
    seed = tl.load(rng)
    draw = tl.load(rng + 1) + query
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32), stream.to(tl.uint32), draw.to(tl.uint32)


@triton.jit
def rounding_stream(stream):
    return (stream.to(tl.uint32) & 0x0FFFFFFF) | 0x40000000


@triton.jit
def philox4x32_10(c0, c1, c2, c3, key0, key1):
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = p0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def block_words(key0, key1, stream, draw, block):
    """The four words of each block, an int64."""
    high = (block >> 32).to(tl.uint32)
    return philox4x32_10(block.to(tl.uint32), high, stream, draw, key0, key1)


@triton.jit
def run_words(key0, key1, stream, draw, first, offset):
    """The words of blocks first + offset: an int64 scalar and a block of int32.

    ``first`` must be a multiple of a power of two that is above every offset: the sum of the low
    words then never carries, and the high word is a scalar.
    """
    low = first.to(tl.uint32) + offset.to(tl.uint32)
    high = (first >> 32).to(tl.uint32)
    return philox4x32_10(low, high, stream, draw, key0, key1)


# ---- elementary functions: csrc/philox.h says how, csrc/fit_polynomials.py made the coefficients


@triton.jit
def ln(u):
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    n = e.to(tl.float32)
    f2 = f * f
    p = tl.fma(f, -0.07634496688842773, 0.1276157647371292)
    p = tl.fma(p, f, -0.13160182535648346)
    p = tl.fma(p, f, 0.14201757311820984)
    p = tl.fma(p, f, -0.16623356938362122)
    p = tl.fma(p, f, 0.20001226663589478)
    p = tl.fma(p, f, -0.2500081956386566)
    p = tl.fma(p, f, 0.3333333134651184)
    tail = tl.fma(n, -1.9046542121259336e-09, p * (f2 * f))
    tail = tl.fma(f2, -0.5, tail)
    return tl.fma(n, 0.6931471824645996, f + tail)


@triton.jit
def radius(word):
    """sqrt(-2 ln u) of the uniform u in (0, 1] of a word."""
    whole = (word >> 8).to(tl.int32).to(tl.float32)
    u = tl.fma(whole, 5.9604644775390625e-08, 2.98023223876953125e-08)
    return tl.sqrt_rn(-2.0 * ln(u))


@triton.jit
def sincos_turns(word):
    """sin and cos of 2 pi t, t = (word >> 8) 2^-24 turns, reduced exactly by quadrants."""
    turns = (word >> 8).to(tl.int32)
    quadrant = (turns + (1 << 21)) >> 22
    f = (turns - (quadrant << 22)).to(tl.float32) * 5.9604644775390625e-08
    x = f * f
    s = tl.fma(x, -75.45339965820312, 81.59394073486328)
    s = tl.fma(s, x, -41.3416748046875)
    s = tl.fma(s, x, -1.7484555314695172e-07)
    s = tl.fma(f, 6.2831854820251465, f * s)
    c = tl.fma(x, 59.24596405029297, -85.44374084472656)
    c = tl.fma(c, x, 64.93932342529297)
    c = tl.fma(c, x, -19.739208221435547)
    c = tl.fma(c, x, 1.0)
    odd = (quadrant & 1) != 0
    sine = tl.where(odd, c, s).to(tl.int32, bitcast=True) ^ ((quadrant & 2) << 30)
    cosine = tl.where(odd, s, c).to(tl.int32, bitcast=True) ^ (((quadrant + 1) & 2) << 30)
    return sine.to(tl.float32, bitcast=True), cosine.to(tl.float32, bitcast=True)


# ---- normals


@triton.jit
def normals_of_words(w0, w1, w2, w3):
    r0 = radius(w0)
    r1 = radius(w2)
    s0, c0 = sincos_turns(w1)
    s1, c1 = sincos_turns(w3)
    return r0 * c0, r0 * s0, r1 * c1, r1 * s1


@triton.jit
def normal_of_element(key0, key1, stream, draw, element):
    """One normal for each element, an int64: its block's words are made for it alone."""
    w0, w1, w2, w3 = block_words(key0, key1, stream, draw, element >> 2)
    low = (element & 2) == 0
    s, c = sincos_turns(tl.where(low, w1, w3))
    return radius(tl.where(low, w0, w2)) * tl.where((element & 1) == 0, c, s)


@triton.jit
def word_of_element(key0, key1, stream, draw, element):
    w0, w1, w2, w3 = block_words(key0, key1, stream, draw, element >> 2)
    even = (element & 1) == 0
    return tl.where((element & 2) == 0, tl.where(even, w0, w1), tl.where(even, w2, w3))


# ---- runs of elements
#
# A thread of a memory-bound kernel holds 16 bytes: one quad of fp32, two quads ("even" and "odd")
# of 16-bit numbers. Blocks (n,) of each quad's first, second, third and fourth element become one
# (4 n,) or (8 n,) by joins that move nothing between threads.


@triton.jit
def interleave_rows(x0, x1, x2, x3):
    """Blocks (m, n) of each quad's elements as one (m, 4 n)."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(x0.shape[0], 4 * x0.shape[1])


@triton.jit
def interleave(x0, x1, x2, x3):
    return tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(4 * x0.shape[0])


@triton.jit
def interleave_pairs(x0, x1, x2, x3, y0, y1, y2, y3):
    """Even quads x and odd quads y."""
    first = tl.join(tl.join(x0, y0), tl.join(x2, y2))
    second = tl.join(tl.join(x1, y1), tl.join(x3, y3))
    return tl.join(first, second).reshape(8 * x0.shape[0])


@triton.jit
def run_normals(key0, key1, stream, draw, quad, N: tl.constexpr, VEC: tl.constexpr):
    """Normals (VEC N,) from the beginning of block ``quad``, a multiple of N VEC / 4."""
    if VEC == 4:
        w0, w1, w2, w3 = run_words(key0, key1, stream, draw, quad, tl.arange(0, N))
        z0, z1, z2, z3 = normals_of_words(w0, w1, w2, w3)
        return interleave(z0, z1, z2, z3)
    else:
        w0, w1, w2, w3 = run_words(key0, key1, stream, draw, quad, 2 * tl.arange(0, N))
        z0, z1, z2, z3 = normals_of_words(w0, w1, w2, w3)
        w0, w1, w2, w3 = run_words(key0, key1, stream, draw, quad, 2 * tl.arange(0, N) + 1)
        y0, y1, y2, y3 = normals_of_words(w0, w1, w2, w3)
        return interleave_pairs(z0, z1, z2, z3, y0, y1, y2, y3)


@triton.jit
def run_all_words(key0, key1, stream, draw, quad, N: tl.constexpr, VEC: tl.constexpr):
    """The words that run_normals are made of."""
    w0, w1, w2, w3 = run_words(key0, key1, stream, draw, quad, VEC // 4 * tl.arange(0, N))
    if VEC == 4:
        return interleave(w0, w1, w2, w3)
    else:
        x0, x1, x2, x3 = run_words(key0, key1, stream, draw, quad, 2 * tl.arange(0, N) + 1)
        return interleave_pairs(w0, w1, w2, w3, x0, x1, x2, x3)


# ---- storage


@triton.jit
def _round_stochastic_bf16(x, word):
    """Away from zero iff word >> 16 < the lower half of x: as a carry out of that half."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # No fp32 number lies between the largest finite bf16 and that number's lower half full.
    finite = tl.minimum(size + ((word >> 16) ^ 0xFFFF), 0x7F7FFFFF)
    special = tl.where(size > 0x7F800000, size | 0x00400000, size)
    rounded = tl.where(size < 0x7F800000, finite, special) | (bits & 0x80000000)
    return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _round_stochastic_f16(x, word):
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    rebiased = size - 0x38000000  # exponent bias 127 to 15
    up = (word >> 8) < ((rebiased & 0x1FFF) << 11)
    normal = tl.minimum((rebiased >> 13) + up.to(tl.uint32), 0x7BFF)
    # Below 2^-14: in units of the gap 2^-24, exact in fp32.
    steps = tl.where(size < 0x38800000, size, 0).to(tl.float32, bitcast=True) * 16777216.0
    low = steps.to(tl.int32)
    uniform = (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    more = uniform < steps - low.to(tl.float32)
    subnormal = low.to(tl.uint32) + more.to(tl.uint32)
    finite = tl.where(size < 0x38800000, subnormal, normal)
    special = tl.where(size > 0x7F800000, 0x7E00, 0x7C00).to(tl.uint32)
    rounded = tl.where(size < 0x7F800000, finite, special) | ((bits >> 16) & 0x8000)
    return rounded.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def round_stochastic(x, word, dtype: tl.constexpr):
    """fp32 to ``dtype``; fp32 itself is returned as it is."""
    if dtype == tl.bfloat16:
        return _round_stochastic_bf16(x, word)
    elif dtype == tl.float16:
        return _round_stochastic_f16(x, word)
    else:
        return x
