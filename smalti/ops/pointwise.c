/* Passes over tokens that do little arithmetic, for CPUs: GELU, norm with shift and scale, gated sum, and their
 * gradients. Each reads its inputs once and writes its outputs once.
 *
 * Numbers are float or bfloat16 in memory and float in between. Work is cut into blocks whose size does not depend on
 * the number of threads, and each sum over tokens is made block by block in one order: results are the same with any
 * number of threads, and those of one batch item do not depend on its neighbours.
 */
#include <math.h>
#include <stdint.h>

/* On processors that have them, whole vectors: compilers take half ones for fear of lower clocks. */
#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif

/* Elements never depend on each other, whatever the pointers look like to the compiler. */
#define EACH(i, n) _Pragma("omp simd") for (int64_t i = 0; i < (n); i++)
#define INLINE static inline __attribute__((always_inline))
#define ELEMENTS 4096 /* of a block without rows */
#define ROWS 32       /* tokens of a block, all of one batch item */
#define ALONE 32768   /* elements that one thread finishes before others have started */

/* Element types; keep in step with pointwise.py. */
enum { FLOAT = 0, BFLOAT16 = 1 };

INLINE float load(int kind, const void *tensor, int64_t i) {
    if (kind == FLOAT) return ((const float *)tensor)[i];
    union { uint32_t bits; float number; } u = {(uint32_t)((const uint16_t *)tensor)[i] << 16};
    return u.number;
}

/* The bits of a float whose upper half is the nearest bfloat16, ties to even. A NaN must not be rounded into an
 * infinity. */
INLINE uint32_t rounded(float x) {
    union { float number; uint32_t bits; } u = {x};
    uint32_t bits = u.bits + 0x7fffu + ((u.bits >> 16) & 1u);
    return x == x ? bits : 0x7fc00000u;
}

INLINE void store(int kind, void *tensor, int64_t i, float x) {
    if (kind == FLOAT) ((float *)tensor)[i] = x;
    else ((uint16_t *)tensor)[i] = (uint16_t)(rounded(x) >> 16);
}

/* 2^x for |x| <= 126, to 1 ulp; a NaN stays one. Written out, because not every libm has a vector form. */
INLINE float power_of_two(float x) {
    float shifted = x + 12582912.0f;
    float f = x - (shifted - 12582912.0f); /* a minimax fit over |f| <= 1/2, relative error 1e-7 */
    float p = 0.0013264724984765053f;
    p = p * f + 0.009671512991189957f;
    p = p * f + 0.05550733581185341f;
    p = p * f + 0.24022242426872253f;
    p = p * f + 0.6931470036506653f;
    p = p * f + 1.0f;
    union { float number; uint32_t bits; } scale = {shifted};
    scale.bits = (scale.bits + 127u) << 23;
    return p * scale.number;
}

INLINE int64_t bytes_of(int kind) { return kind == FLOAT ? 4 : 2; }

INLINE int team(int threads, int64_t elements) { return elements < ALONE ? 1 : threads; }

/* ------------------------------------------------------------------------------------------------------ GELU */

/* The larger and the smaller of two; a NaN in x stays one. */
INLINE float at_least(float bound, float x) { return bound > x ? bound : x; }
INLINE float at_most(float bound, float x) { return bound < x ? bound : x; }

/* x P(X < x) for a standard normal X; `slope` 1 = its derivative. From 13.2 on the tail is below what a float holds:
 * values beyond count as if they stood there, so that infinities give no NaN. */
INLINE float gelu_erf(int slope, float x) {
    float z = at_most(13.2f, fabsf(x)), bell = power_of_two(-0.7213475204f * (z * z)); /* e^{-z^2/2} */
    /* P(X > z) = e^{-z^2/2} t poly(t), relative error 3e-8: a minimax fit over 0 <= z <= 13.2. */
    float t = 1.0f / (1.0f + 0.34f * z);
    float p = -0.02649758756160736f;
    p = p * t + 0.14127101004123688f;
    p = p * t - 0.27665501832962036f;
    p = p * t + 0.20604227483272552f;
    p = p * t - 0.04725949093699455f;
    p = p * t + 0.1163850799202919f;
    p = p * t + 0.11495036631822586f;
    p = p * t + 0.13614465296268463f;
    p = p * t + 0.13561873137950897f;
    float tail = bell * (p * t);
    if (slope) return (x < 0.0f ? tail : 1.0f - tail) + copysignf(z, x) * (0.3989422804f * bell);
    /* max(x, 0) - z tail has no cancellation on either side. */
    return at_least(0.0f, x) - z * tail;
}

/* The tanh form, x (1 + tanh u) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3), is x / (1 + e^{-2u}): no cancellation for
 * negative x. At 9.99 the exponential is almost as large as a float can be; beyond, as above. */
INLINE float gelu_tanh(int slope, float x) {
    float above = at_least(-9.99f, x), near = slope ? at_most(9.99f, above) : above, square = near * near;
    float exponent = -near * (2.302208198f + 0.1029432396f * square); /* -2u log2(e) */
    float e = power_of_two(slope ? exponent : at_least(-126.0f, exponent)), s = 1.0f / (1.0f + e);
    return slope ? s + near * (1.5957691216f + 0.2140644488f * square) * ((e * s) * s) : above * s;
}

INLINE float gelu_of(int tanh_form, int slope, float x) {
    return tanh_form ? gelu_tanh(slope, x) : gelu_erf(slope, x);
}

/* Two bfloat16 numbers in one word: on vectors cheaper than to spread and to pack them. Which of the two is the first
 * does not matter here. */
INLINE float lower(uint32_t pair) {
    union { uint32_t bits; float number; } u = {pair << 16};
    return u.number;
}

INLINE float upper(uint32_t pair) {
    union { uint32_t bits; float number; } u = {pair & 0xffff0000u};
    return u.number;
}

/* NaNs come here from bfloat16 numbers or are the processor's own: the lower halves of both are 0, from which nothing
 * carries over. So they need no look of their own. */
INLINE uint32_t rounded_in_pair(float x) {
    union { float number; uint32_t bits; } u = {x};
    return u.bits + 0x7fffu + ((u.bits >> 16) & 1u);
}

INLINE uint32_t paired(float lower, float upper) {
    return rounded_in_pair(lower) >> 16 | (rounded_in_pair(upper) & 0xffff0000u);
}

typedef uint32_t __attribute__((may_alias, aligned(2))) Pair;

INLINE void gelu_block(int kind, int tanh_form, int64_t n, const void *x, const void *above, void *y) {
    const int64_t pairs = kind == BFLOAT16 ? n / 2 : 0;
    const Pair *x2 = x, *above2 = above;
    Pair *y2 = y;
    if (above) {
        EACH(i, pairs) {
            float first = lower(above2[i]) * gelu_of(tanh_form, 1, lower(x2[i]));
            y2[i] = paired(first, upper(above2[i]) * gelu_of(tanh_form, 1, upper(x2[i])));
        }
        EACH(i, n - 2 * pairs) {
            float slope = gelu_of(tanh_form, 1, load(kind, x, 2 * pairs + i));
            store(kind, y, 2 * pairs + i, load(kind, above, 2 * pairs + i) * slope);
        }
    } else {
        EACH(i, pairs) y2[i] = paired(gelu_of(tanh_form, 0, lower(x2[i])), gelu_of(tanh_form, 0, upper(x2[i])));
        EACH(i, n - 2 * pairs) store(kind, y, 2 * pairs + i, gelu_of(tanh_form, 0, load(kind, x, 2 * pairs + i)));
    }
}

/* `above` NULL: y = gelu(x). Else y = above gelu'(x). */
void gelu(int kind, int tanh_form, int64_t n, const void *x, const void *above, void *y, int threads) {
    const int64_t bytes = bytes_of(kind);
    #pragma omp parallel for num_threads(team(threads, n)) schedule(static)
    for (int64_t begin = 0; begin < n; begin += ELEMENTS) {
        const int64_t size = begin + ELEMENTS < n ? ELEMENTS : n - begin;
        const void *in = (const char *)x + bytes * begin, *g = above ? (const char *)above + bytes * begin : 0;
        void *out = (char *)y + bytes * begin;
        if (kind == FLOAT && tanh_form) gelu_block(FLOAT, 1, size, in, g, out);
        else if (kind == FLOAT) gelu_block(FLOAT, 0, size, in, g, out);
        else if (tanh_form) gelu_block(BFLOAT16, 1, size, in, g, out);
        else gelu_block(BFLOAT16, 0, size, in, g, out);
    }
}

/* gelu(a) gelu(b); and, with g the gradient of that, the gradient of a. */
INLINE float product(float a, float b) { return gelu_of(0, 0, a) * gelu_of(0, 0, b); }
INLINE float product_slope(float g, float a, float b) { return g * gelu_of(0, 1, a) * gelu_of(0, 0, b); }

INLINE void product_block(int kind, int64_t n, const void *a, const void *b, void *y) {
    const int64_t pairs = kind == BFLOAT16 ? n / 2 : 0;
    const Pair *a2 = a, *b2 = b;
    Pair *y2 = y;
    EACH(i, pairs) y2[i] = paired(product(lower(a2[i]), lower(b2[i])), product(upper(a2[i]), upper(b2[i])));
    EACH(i, n - 2 * pairs)
        store(kind, y, 2 * pairs + i, product(load(kind, a, 2 * pairs + i), load(kind, b, 2 * pairs + i)));
}

INLINE void product_block_back(int kind, int64_t n, const void *a, const void *b, const void *above, void *by_a,
                               void *by_b) {
    const int64_t pairs = kind == BFLOAT16 ? n / 2 : 0;
    const Pair *a2 = a, *b2 = b, *above2 = above;
    Pair *by_a2 = by_a, *by_b2 = by_b;
    EACH(i, pairs) {
        const float al = lower(a2[i]), bl = lower(b2[i]), gl = lower(above2[i]);
        const float au = upper(a2[i]), bu = upper(b2[i]), gu = upper(above2[i]);
        by_a2[i] = paired(product_slope(gl, al, bl), product_slope(gu, au, bu));
        by_b2[i] = paired(product_slope(gl, bl, al), product_slope(gu, bu, au));
    }
    EACH(i, n - 2 * pairs) {
        const int64_t at = 2 * pairs + i;
        const float x = load(kind, a, at), y = load(kind, b, at), g = load(kind, above, at);
        store(kind, by_a, at, product_slope(g, x, y));
        store(kind, by_b, at, product_slope(g, y, x));
    }
}

/* y = gelu(a) gelu(b) */
void gelu_product(int kind, int64_t n, const void *a, const void *b, void *y, int threads) {
    const int64_t bytes = bytes_of(kind);
    #pragma omp parallel for num_threads(team(threads, n)) schedule(static)
    for (int64_t begin = 0; begin < n; begin += ELEMENTS) {
        const int64_t size = begin + ELEMENTS < n ? ELEMENTS : n - begin, at = bytes * begin;
        const void *first = (const char *)a + at, *second = (const char *)b + at;
        if (kind == FLOAT) product_block(FLOAT, size, first, second, (char *)y + at);
        else product_block(BFLOAT16, size, first, second, (char *)y + at);
    }
}

void gelu_product_back(int kind, int64_t n, const void *a, const void *b, const void *above, void *by_a, void *by_b,
                       int threads) {
    const int64_t bytes = bytes_of(kind);
    #pragma omp parallel for num_threads(team(threads, n)) schedule(static)
    for (int64_t begin = 0; begin < n; begin += ELEMENTS) {
        const int64_t size = begin + ELEMENTS < n ? ELEMENTS : n - begin, at = bytes * begin;
        const void *first = (const char *)a + at, *second = (const char *)b + at, *g = (const char *)above + at;
        void *by_first = (char *)by_a + at, *by_second = (char *)by_b + at;
        if (kind == FLOAT) product_block_back(FLOAT, size, first, second, g, by_first, by_second);
        else product_block_back(BFLOAT16, size, first, second, g, by_first, by_second);
    }
}

/* ------------------------------------------------------------------------------------- rows with a modulation */

/* Parallel regions stand in the exported functions and choose the types inside: a region is compiled once, as a function
 * of its own, and types that are constants outside would be variables in it. */

/* Sizes of tokens (batch, tokens, channels), and how far apart the modulations of two batch items are: 0 for one that
 * all share. */
typedef struct {
    int64_t batch, tokens, channels, stride;
} Sizes;

INLINE int64_t blocks_of(const Sizes *s) { return (s->tokens + ROWS - 1) / ROWS; }

/* The tokens of block k, counted through the whole batch: first, and one behind the last. */
INLINE int64_t begin_of(const Sizes *s, int64_t k) {
    return k / blocks_of(s) * s->tokens + k % blocks_of(s) * ROWS;
}

INLINE int64_t end_of(const Sizes *s, int64_t k) {
    const int64_t end = begin_of(s, k) + ROWS, whole = (k / blocks_of(s) + 1) * s->tokens;
    return end < whole ? end : whole;
}

/* Its shift, scale or gate. */
INLINE const float *of_block(const Sizes *s, int64_t k, const float *rows) { return rows + k / blocks_of(s) * s->stride; }

#define EACH_BLOCK(k, s)                                                                        \
    _Pragma("omp parallel for num_threads(team(threads, s.batch * s.tokens * s.channels)) schedule(static)") \
    for (int64_t k = 0; k < s.batch * blocks_of(&s); k++)

/* Sums over tokens: `partial` holds `rows` rows for each block, the blocks of one batch item behind each other. Into
 * `total`, `rows` rows for each modulation. */
static void add_up(const Sizes *s, int rows, const float *partial, float *total, int threads) {
    const int64_t modulations = s->stride || s->batch == 0 ? s->batch : 1, width = rows * s->channels;
    const int64_t parts = modulations ? s->batch / modulations * blocks_of(s) : 0;
    #pragma omp parallel for num_threads(team(threads, modulations * parts * width)) schedule(static)
    for (int64_t m = 0; m < modulations; m++) {
        float *sum = total + m * width;
        EACH(c, width) sum[c] = 0.0f;
        for (int64_t q = 0; q < parts; q++) {
            const float *part = partial + (m * parts + q) * width;
            EACH(c, width) sum[c] += part[c];
        }
    }
}

/* ----------------------------------------------------------------------------------------------------- adaLN */

/* y = (x - mean) / sqrt(variance + eps) (1 + scale) + shift; `kept` gets mean and 1 / sqrt of each token. */
INLINE void norm_row(int kind, int out_kind, int64_t n, const void *x, const float *shift, const float *scale,
                     float eps, void *y, float *kept) {
    float sum = 0.0f, squares = 0.0f, left = 0.0f;
    _Pragma("omp simd reduction(+ : sum)") for (int64_t c = 0; c < n; c++) sum += load(kind, x, c);
    const float mean = sum / (float)n;
    _Pragma("omp simd reduction(+ : squares, left)") for (int64_t c = 0; c < n; c++) {
        float d = load(kind, x, c) - mean;
        squares += d * d;
        left += d;
    }
    left /= (float)n; /* what rounding has left of the mean: much, where all numbers of a token are large */
    const float rate = 1.0f / sqrtf(at_least(0.0f, squares / (float)n - left * left) + eps);
    EACH(c, n) store(out_kind, y, c, ((load(kind, x, c) - mean) - left) * rate * (1.0f + scale[c]) + shift[c]);
    if (kept) {
        kept[0] = mean + left;
        kept[1] = rate;
    }
}

INLINE void norm_block(int kind, int out_kind, const Sizes *s, int64_t k, const void *x, const float *shift,
                       const float *scale, float eps, void *y, float *kept) {
    const int64_t d = s->channels;
    for (int64_t t = begin_of(s, k); t < end_of(s, k); t++)
        norm_row(kind, out_kind, d, (const char *)x + bytes_of(kind) * d * t, of_block(s, k, shift),
                 of_block(s, k, scale), eps, (char *)y + bytes_of(out_kind) * d * t, kept ? kept + 2 * t : 0);
}

void adaln(int kind, int out_kind, int64_t batch, int64_t tokens, int64_t channels, int64_t stride, const void *x,
           const float *shift, const float *scale, float eps, void *y, float *kept, int threads) {
    const Sizes s = {batch, tokens, channels, stride};
    EACH_BLOCK(k, s) {
        if (kind == BFLOAT16) norm_block(BFLOAT16, BFLOAT16, &s, k, x, shift, scale, eps, y, kept);
        else if (out_kind == FLOAT) norm_block(FLOAT, FLOAT, &s, k, x, shift, scale, eps, y, kept);
        else norm_block(FLOAT, BFLOAT16, &s, k, x, shift, scale, eps, y, kept);
    }
}

/* With n = (x - mean) rate, h = above (1 + scale): the gradient of x is rate (h - mean h - n mean(h n)). `sums` are
 * those of above and of above n over the tokens of the block, one behind the other. */
INLINE void norm_row_back(int kind, int out_kind, int64_t n, const void *x, const float *scale, const float *kept,
                          const void *above, void *by_x, float *sums) {
    const float mean = kept[0], rate = kept[1];
    float *by_shift = sums, *by_scale = sums + n, plain = 0.0f, along = 0.0f;
    _Pragma("omp simd reduction(+ : plain, along)") for (int64_t c = 0; c < n; c++) {
        float normed = (load(kind, x, c) - mean) * rate, g = load(out_kind, above, c), h = g * (1.0f + scale[c]);
        plain += h;
        along += h * normed;
        by_shift[c] += g;
        by_scale[c] += g * normed;
    }
    plain /= (float)n;
    along /= (float)n;
    EACH(c, n) {
        float normed = (load(kind, x, c) - mean) * rate, h = load(out_kind, above, c) * (1.0f + scale[c]);
        store(kind, by_x, c, rate * ((h - plain) - normed * along));
    }
}

INLINE void norm_block_back(int kind, int out_kind, const Sizes *s, int64_t k, const void *x, const float *scale,
                            const float *kept, const void *above, void *by_x, float *partial) {
    const int64_t d = s->channels;
    float *sums = partial + k * 2 * d;
    EACH(c, 2 * d) sums[c] = 0.0f;
    for (int64_t t = begin_of(s, k); t < end_of(s, k); t++)
        norm_row_back(kind, out_kind, d, (const char *)x + bytes_of(kind) * d * t, of_block(s, k, scale), kept + 2 * t,
                      (const char *)above + bytes_of(out_kind) * d * t, (char *)by_x + bytes_of(kind) * d * t, sums);
}

/* `sums` gets the gradients of shift and scale, one behind the other for each modulation; `partial` is room for the
 * same per block. */
void adaln_back(int kind, int out_kind, int64_t batch, int64_t tokens, int64_t channels, int64_t stride, const void *x,
                const float *scale, const float *kept, const void *above, void *by_x, float *partial, float *sums,
                int threads) {
    const Sizes s = {batch, tokens, channels, stride};
    EACH_BLOCK(k, s) {
        if (kind == BFLOAT16) norm_block_back(BFLOAT16, BFLOAT16, &s, k, x, scale, kept, above, by_x, partial);
        else if (out_kind == FLOAT) norm_block_back(FLOAT, FLOAT, &s, k, x, scale, kept, above, by_x, partial);
        else norm_block_back(FLOAT, BFLOAT16, &s, k, x, scale, kept, above, by_x, partial);
    }
    add_up(&s, 2, partial, sums, threads);
}

/* ------------------------------------------------------------------------------------------------- gated sum */

INLINE void gate_block(int kind, int branch_kind, const Sizes *s, int64_t k, const void *x, const float *gate,
                       const void *branch, void *y) {
    const int64_t d = s->channels;
    const float *own_gate = of_block(s, k, gate);
    for (int64_t t = begin_of(s, k); t < end_of(s, k); t++)
        EACH(c, d) {
            float added = own_gate[c] * load(branch_kind, branch, d * t + c);
            store(kind, y, d * t + c, load(kind, x, d * t + c) + added);
        }
}

void gated_add(int kind, int branch_kind, int64_t batch, int64_t tokens, int64_t channels, int64_t stride,
               const void *x, const float *gate, const void *branch, void *y, int threads) {
    const Sizes s = {batch, tokens, channels, stride};
    EACH_BLOCK(k, s) {
        if (kind == BFLOAT16) gate_block(BFLOAT16, BFLOAT16, &s, k, x, gate, branch, y);
        else if (branch_kind == FLOAT) gate_block(FLOAT, FLOAT, &s, k, x, gate, branch, y);
        else gate_block(FLOAT, BFLOAT16, &s, k, x, gate, branch, y);
    }
}

INLINE void gate_block_back(int kind, int branch_kind, const Sizes *s, int64_t k, const float *gate,
                            const void *branch, const void *above, void *by_branch, float *partial) {
    const int64_t d = s->channels;
    const float *own_gate = of_block(s, k, gate);
    float *sum = partial + k * d;
    EACH(c, d) sum[c] = 0.0f;
    for (int64_t t = begin_of(s, k); t < end_of(s, k); t++)
        EACH(c, d) {
            float g = load(kind, above, d * t + c);
            sum[c] += g * load(branch_kind, branch, d * t + c);
            store(branch_kind, by_branch, d * t + c, g * own_gate[c]);
        }
}

/* `sum` gets the gradient of the gate; that of x is `above` itself. */
void gated_add_back(int kind, int branch_kind, int64_t batch, int64_t tokens, int64_t channels, int64_t stride,
                    const float *gate, const void *branch, const void *above, void *by_branch, float *partial,
                    float *sum, int threads) {
    const Sizes s = {batch, tokens, channels, stride};
    EACH_BLOCK(k, s) {
        if (kind == BFLOAT16) gate_block_back(BFLOAT16, BFLOAT16, &s, k, gate, branch, above, by_branch, partial);
        else if (branch_kind == FLOAT) gate_block_back(FLOAT, FLOAT, &s, k, gate, branch, above, by_branch, partial);
        else gate_block_back(FLOAT, BFLOAT16, &s, k, gate, branch, above, by_branch, partial);
    }
    add_up(&s, 1, partial, sum, threads);
}
