/* Long convolutions in both directions for CPUs, and their gradients: token-major in, token-major out.
 *
 * Each channel of a layer has one circular kernel of 2 M >= 2 N lags, and is convolved by cutting polynomials into
 * remainders (Bernstein's "multidigit multiplication", real-valued form):
 *
 *   z^2M - 1 = (z^M - 1) (z^M + 1)      and so on down the left factor, to z^2c - 1;
 *   z^2s + 1 holds real polynomials of 2 s terms, of which the remainder modulo z^s - i says all: first half plus i
 *            times second half, which costs nothing;
 *   z^s - t  = (z^s/2 - r) (z^s/2 + r) with r r = t: one complex multiplication by a constant for each pair of terms.
 *
 * At the leaves stand complex polynomials of c terms (M = c 2^n, c odd and small) that are multiplied as in school.
 * Every cut is a rotation but for a factor: the way back, and that of gradients, is the way there with conjugate
 * constants, and one factor for all of it lies in the spectrum. Nothing is reordered, inputs need no padding in memory,
 * and small remainders are cut, multiplied and joined before the next ones are touched.
 *
 * A vector holds one term of LANES channels, which lie next to each other in memory; channels never meet. Numbers are
 * float or bfloat16 in memory and float in between. No result depends on the number of threads.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define LANES (BYTES / 4)
#define INLINE static inline __attribute__((always_inline))
#define MAX_LEAF 7

typedef float V __attribute__((vector_size(BYTES)));
typedef uint32_t U __attribute__((vector_size(BYTES)));
typedef uint16_t H __attribute__((vector_size(BYTES / 2)));

/* Element types of the token tensors; keep in step with in_memory.py. */
enum { FLOAT = 0, BFLOAT16 = 1 };

/* M, c, and for each node k of the tree the constant r = e^{i angle(k) / 2}, real and imaginary part, where
 * angle(0) = 0, angle(2 k) = angle(k) / 2, angle(2 k + 1) = angle(k) / 2 + pi: the same on every level. */
typedef struct {
    int64_t size, leaf;
    const float *turns;
} Plan;

/* What one walk through the tree does. All arrays have 2 M vectors: M of the remainder modulo z^M + 1, M of the other.
 *   CUT       `x` into its spectrum
 *   CONVOLVE  `x` with the kernel of spectrum `k`
 *   GRADIENT  gradients `g` of outputs into those of inputs; `sum` adds up those of the spectrum, from inputs `x`
 *   JOIN      a gradient `x` of a spectrum into that of what was cut */
enum { CUT, CONVOLVE, GRADIENT, JOIN };
typedef struct {
    const Plan *plan;
    int what;
    V *x, *g, *sum;
    const V *k;
} Walk;

/* ------------------------------------------------------------------------------------------- cuts and joins */

typedef struct { V re, im; } Z;

INLINE Z at(const V *b, int64_t re, int64_t im) { return (Z){b[re], b[im]}; }
INLINE void put(V *b, int64_t re, int64_t im, Z z) { b[re] = z.re, b[im] = z.im; }
INLINE Z plus(Z a, Z b) { return (Z){a.re + b.re, a.im + b.im}; }
INLINE Z minus(Z a, Z b) { return (Z){a.re - b.re, a.im - b.im}; }
INLINE Z times(Z a, Z b) { return (Z){a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
INLINE Z over(Z a, Z b) { return (Z){a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im}; } /* a conj(b) */
INLINE Z turned(Z a, const float *t) { return (Z){a.re * t[0] - a.im * t[1], a.re * t[1] + a.im * t[0]}; }
INLINE Z back(Z a, const float *t) { return (Z){a.re * t[0] + a.im * t[1], a.im * t[0] - a.re * t[1]}; }

INLINE void cut2(const Plan *p, int64_t node, Z *a) {
    const Z low = a[0], high = turned(a[1], p->turns + 2 * node);
    a[0] = plus(low, high);
    a[1] = minus(low, high);
}

INLINE void join2(const Plan *p, int64_t node, Z *a) {
    const Z low = a[0], high = a[1];
    a[0] = plus(low, high);
    a[1] = back(minus(low, high), p->turns + 2 * node);
}

/* Two levels at once. The constants of a node's children are s and i s. */
INLINE void cut4(const Plan *p, int64_t node, Z *a) {
    const float *r = p->turns + 2 * node, *s = p->turns + 4 * node;
    const float both[2] = {r[0] * s[0] - r[1] * s[1], r[0] * s[1] + r[1] * s[0]};
    const Z a1 = turned(a[1], s), a2 = turned(a[2], r), a3 = turned(a[3], both);
    const Z b0 = plus(a[0], a2), b2 = minus(a[0], a2), b1 = plus(a1, a3), b3 = minus(a1, a3), ib3 = {-b3.im, b3.re};
    a[0] = plus(b0, b1);
    a[1] = minus(b0, b1);
    a[2] = plus(b2, ib3);
    a[3] = minus(b2, ib3);
}

INLINE void join4(const Plan *p, int64_t node, Z *a) {
    const float *r = p->turns + 2 * node, *s = p->turns + 4 * node;
    const float both[2] = {r[0] * s[0] - r[1] * s[1], r[0] * s[1] + r[1] * s[0]};
    const Z b0 = plus(a[0], a[1]), b1 = minus(a[0], a[1]), b2 = plus(a[2], a[3]), ib3 = minus(a[2], a[3]);
    const Z b3 = {ib3.im, -ib3.re};
    a[0] = plus(b0, b2);
    a[2] = back(minus(b0, b2), r);
    a[1] = back(plus(b1, b3), s);
    a[3] = back(minus(b1, b3), both);
}

INLINE void step(void (*change)(const Plan *, int64_t, Z *), const Plan *p, int ways, int64_t node, V *b, int64_t re,
                 int64_t im, int64_t part) {
    for (int64_t j = 0; j < part; j++) {
        Z a[4];
        for (int i = 0; i < ways; i++) a[i] = at(b, re + i * part + j, im + i * part + j);
        change(p, node, a);
        for (int i = 0; i < ways; i++) put(b, re + i * part + j, im + i * part + j, a[i]);
    }
}

/* --------------------------------------------------------------------------------------------------- leaves */

/* out = a b modulo z^n - t. */
INLINE void multiply(int n, Z t, const Z *a, const Z *b, Z *out) {
    for (int i = 0; i < n; i++) {
        Z sum = times(a[0], b[i]), wrapped = {{0}, {0}};
        for (int j = 1; j <= i; j++) sum = plus(sum, times(a[j], b[i - j]));
        for (int j = i + 1; j < n; j++) wrapped = plus(wrapped, times(a[j], b[n + i - j]));
        out[i] = n > 1 ? plus(sum, times(wrapped, t)) : sum;
    }
}

/* The adjoint of that in b: gradient of b from gradient g of the product. */
INLINE void multiply_back(int n, Z t, const Z *a, const Z *g, Z *out) {
    for (int j = 0; j < n; j++) {
        Z sum = over(g[j], a[0]), wrapped = {{0}, {0}};
        for (int i = j + 1; i < n; i++) sum = plus(sum, over(g[i], a[i - j]));
        for (int i = 0; i < j; i++) wrapped = plus(wrapped, over(g[i], a[n + i - j]));
        out[j] = n > 1 ? plus(sum, over(wrapped, t)) : sum;
    }
}

INLINE void leaf_of(const Walk *w, int n, int64_t re, int64_t im, int64_t node) {
    if (w->what == CUT || w->what == JOIN) return;
    const float *t = w->plan->turns + node / 2 * 2, sign = node % 2 ? -1.0f : 1.0f;
    const Z turn = {sign * t[0] + (V){0}, sign * t[1] + (V){0}};
    Z x[MAX_LEAF], k[MAX_LEAF], g[MAX_LEAF], out[MAX_LEAF];
    for (int i = 0; i < n; i++) x[i] = at(w->x, re + i, im + i), k[i] = at(w->k, re + i, im + i);
    if (w->what == CONVOLVE) {
        multiply(n, turn, x, k, out);
        for (int i = 0; i < n; i++) put(w->x, re + i, im + i, out[i]);
    } else {
        for (int i = 0; i < n; i++) g[i] = at(w->g, re + i, im + i);
        multiply_back(n, turn, k, g, out);
        for (int i = 0; i < n; i++) put(w->g, re + i, im + i, out[i]);
        multiply_back(n, turn, x, g, out);
        for (int i = 0; i < n; i++) put(w->sum, re + i, im + i, plus(at(w->sum, re + i, im + i), out[i]));
    }
}

static void leaf(const Walk *w, int64_t re, int64_t im, int64_t node) {
    switch (w->plan->leaf) {
    case 1: leaf_of(w, 1, re, im, node); return;
    case 3: leaf_of(w, 3, re, im, node); return;
    case 5: leaf_of(w, 5, re, im, node); return;
    default: leaf_of(w, 7, re, im, node);
    }
}

/* The last `ways` remainders of one term each, kept in registers. */
INLINE void bush(const Walk *w, int ways, void (*cut)(const Plan *, int64_t, Z *),
                 void (*join)(const Plan *, int64_t, Z *), int64_t re, int64_t im, int64_t node) {
    Z x[4], g[4];
    for (int i = 0; i < ways; i++) x[i] = at(w->x, re + i, im + i);
    cut(w->plan, node, x);
    if (w->what == CONVOLVE) {
        for (int i = 0; i < ways; i++) x[i] = times(x[i], at(w->k, re + i, im + i));
        join(w->plan, node, x);
        for (int i = 0; i < ways; i++) put(w->x, re + i, im + i, x[i]);
    } else {
        for (int i = 0; i < ways; i++) g[i] = at(w->g, re + i, im + i);
        cut(w->plan, node, g);
        for (int i = 0; i < ways; i++) {
            put(w->sum, re + i, im + i, plus(at(w->sum, re + i, im + i), over(g[i], x[i])));
            g[i] = over(g[i], at(w->k, re + i, im + i));
        }
        join(w->plan, node, g);
        for (int i = 0; i < ways; i++) put(w->g, re + i, im + i, g[i]);
    }
}

/* Circular, 2 c real terms. */
static void real_leaf(const Walk *w) {
    if (w->what == CUT || w->what == JOIN) return;
    const int64_t n = 2 * w->plan->leaf, first = w->plan->size;
    V x[2 * MAX_LEAF], *g = w->what == GRADIENT ? w->g : w->x;
    V out[2 * MAX_LEAF] = {{0}};
    for (int64_t i = 0; i < n; i++) x[i] = g[first + i];
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) {
            const V k = w->k[first + (w->what == CONVOLVE ? i - j + n : j - i + n) % n];
            out[i] += x[j] * k;
            if (w->what == GRADIENT) w->sum[first + i] += x[j] * w->x[first + (j - i + n) % n];
        }
    for (int64_t i = 0; i < n; i++) g[first + i] = out[i];
}

/* --------------------------------------------------------------------------------------------------- the tree */

static void complex_node(const Walk *w, int64_t re, int64_t im, int64_t s, int64_t node) {
    const Plan *p = w->plan;
    const int there = w->what != JOIN, here = w->what != CUT;
    if (s == p->leaf) {
        leaf(w, re, im, node);
        return;
    }
    if (p->leaf == 1 && there && here && s <= 4) {
        if (s == 4) bush(w, 4, cut4, join4, re, im, node);
        else bush(w, 2, cut2, join2, re, im, node);
        return;
    }
    V *changed = w->what == GRADIENT ? w->g : w->x;
    if (s == 2 * p->leaf) {
        if (there) step(cut2, p, 2, node, w->x, re, im, s / 2);
        if (w->what == GRADIENT) step(cut2, p, 2, node, w->g, re, im, s / 2);
        for (int i = 0; i < 2; i++) leaf(w, re + i * (s / 2), im + i * (s / 2), 2 * node + i);
        if (here) step(join2, p, 2, node, changed, re, im, s / 2);
    } else {
        if (there) step(cut4, p, 4, node, w->x, re, im, s / 4);
        if (w->what == GRADIENT) step(cut4, p, 4, node, w->g, re, im, s / 4);
        for (int i = 0; i < 4; i++) complex_node(w, re + i * (s / 4), im + i * (s / 4), s / 4, 4 * node + i);
        if (here) step(join4, p, 4, node, changed, re, im, s / 4);
    }
}

/* Sum and difference are cut and joined alike. */
INLINE void real_step(V *b, int64_t half) {
    for (int64_t j = 0; j < half; j++) {
        const V low = b[j], high = b[j + half];
        b[j] = low + high;
        b[j + half] = low - high;
    }
}

static void real_node(const Walk *w, int64_t s) {
    const int64_t first = w->plan->size, half = s / 2;
    if (s == 2 * w->plan->leaf) {
        real_leaf(w);
        return;
    }
    if (w->what != JOIN) real_step(w->x + first, half);
    if (w->what == GRADIENT) real_step(w->g + first, half);
    complex_node(w, first + half, first + half + half / 2, half / 2, 2);
    real_node(w, half);
    if (w->what != CUT) real_step((w->what == GRADIENT ? w->g : w->x) + first, half);
}

static void walk(const Walk *w) {
    const int64_t half = w->plan->size / 2;
    complex_node(w, 0, half, half, 2);
    real_node(w, w->plan->size);
}

/* -------------------------------------------------------------------------------------------- tokens in and out */

INLINE V load(int kind, int lanes, const void *tensor, int64_t i) {
    if (kind == FLOAT) {
        V v = {0};
        memcpy(&v, (const float *)tensor + i, lanes * sizeof(float));
        return v;
    }
    H h = {0};
    memcpy(&h, (const uint16_t *)tensor + i, lanes * sizeof(uint16_t));
    const U bits = __builtin_convertvector(h, U) << 16;
    V v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

INLINE void store(int kind, int lanes, void *tensor, int64_t i, V v) {
    if (kind == FLOAT) {
        memcpy((float *)tensor + i, &v, lanes * sizeof(float));
        return;
    }
    U bits, nan = (U)(v != v);
    memcpy(&bits, &v, sizeof bits);
    /* Round to nearest, ties to even; a NaN must not be rounded into an infinity. */
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const H h = __builtin_convertvector((bits & ~nan) | (nan & 0x7fc0u), H);
    memcpy((uint16_t *)tensor + i, &h, lanes * sizeof(uint16_t));
}

typedef struct {
    int64_t batch, tokens, channels;
} Sizes;

/* Tokens have at most M terms: both remainders are the tokens themselves. */
INLINE void read_tokens(int kind, int lanes, const Plan *p, const Sizes *s, const void *x, int64_t b, int64_t c, V *out) {
    const int64_t begin = b * s->tokens * s->channels + c;
    for (int64_t n = 0; n < s->tokens; n++) out[n] = out[p->size + n] = load(kind, lanes, x, begin + n * s->channels);
    for (int64_t n = s->tokens; n < p->size; n++) out[n] = out[p->size + n] = (V){0};
}

INLINE void write_tokens(int kind, int lanes, const Plan *p, const Sizes *s, const V *in, int64_t b, int64_t c, void *y) {
    const int64_t begin = b * s->tokens * s->channels + c;
    for (int64_t n = 0; n < s->tokens; n++) store(kind, lanes, y, begin + n * s->channels, in[n] + in[p->size + n]);
}

static void get_tokens(int kind, const Plan *p, const Sizes *s, const void *x, int64_t b, int64_t c, V *out) {
    const int64_t lanes = s->channels - c;
    if (lanes < LANES && kind == FLOAT) read_tokens(FLOAT, (int)lanes, p, s, x, b, c, out);
    else if (lanes < LANES) read_tokens(BFLOAT16, (int)lanes, p, s, x, b, c, out);
    else if (kind == FLOAT) read_tokens(FLOAT, LANES, p, s, x, b, c, out);
    else read_tokens(BFLOAT16, LANES, p, s, x, b, c, out);
}

static void put_tokens(int kind, const Plan *p, const Sizes *s, const V *in, int64_t b, int64_t c, void *y) {
    const int64_t lanes = s->channels - c;
    if (lanes < LANES && kind == FLOAT) write_tokens(FLOAT, (int)lanes, p, s, in, b, c, y);
    else if (lanes < LANES) write_tokens(BFLOAT16, (int)lanes, p, s, in, b, c, y);
    else if (kind == FLOAT) write_tokens(FLOAT, LANES, p, s, in, b, c, y);
    else write_tokens(BFLOAT16, LANES, p, s, in, b, c, y);
}

/* ------------------------------------------------------------------------------------------------- functions */

/* Channels of one block of a spectrum, which holds 2 M vectors for each block. */
int s4d_lanes(void) { return LANES; }

/* Kernels (C, N) in both directions and skip (C) as one spectrum; returns 0. */
int s4d_spectrum(int64_t size, int64_t leaf, const float *turns, int64_t channels, int64_t tokens, const float *forward,
                 const float *backward, const float *skip, float *spectrum, int threads) {
    const Plan plan = {size, leaf, turns};
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c0 = 0; c0 < channels; c0 += LANES) {
        float *out = spectrum + c0 * 2 * size;
        const float factor = (float)leaf / (float)size;
        memset(out, 0, (size_t)(2 * size) * sizeof(V));
        for (int64_t c = c0; c < c0 + LANES && c < channels; c++) {
            float *lane = out + (c - c0), *other = lane + size * LANES;
            for (int64_t n = 0; n < tokens; n++) {
                const float f = factor * (forward[c * tokens + n] + (n ? 0.0f : skip[c]));
                lane[n * LANES] += f;
                other[n * LANES] += f;
                const float g = factor * backward[c * tokens + n];
                lane[(size - 1 - n) * LANES] -= g;
                other[(size - 1 - n) * LANES] += g;
            }
        }
        const Walk w = {&plan, CUT, (V *)out, 0, 0, 0};
        walk(&w);
    }
    return 0;
}

/* Both return 0, or 1 when there was no memory for their sums. `spectrum` and x are as `s4d_spectrum` and the tokens
 * (B, N, C) leave them. */
int s4d_convolve(int kind, int64_t size, int64_t leaf, const float *turns, int64_t batch, int64_t tokens,
                 int64_t channels, const float *spectrum, const void *x, void *y, int threads) {
    const Plan plan = {size, leaf, turns};
    const Sizes s = {batch, tokens, channels};
    const int64_t blocks = (channels + LANES - 1) / LANES;
    int failed = 0;
    #pragma omp parallel num_threads(threads)
    {
        V *room = aligned_alloc(sizeof(V), (size_t)(2 * size) * sizeof(V));
        if (!room) {
            #pragma omp atomic write
            failed = 1;
        }
        #pragma omp for schedule(static)
        for (int64_t job = 0; job < blocks * batch; job++) {
            if (!room) continue;
            const int64_t block = job / batch, b = job % batch;
            const Walk w = {&plan, CONVOLVE, room, 0, 0, (const V *)spectrum + block * 2 * size};
            get_tokens(kind, &plan, &s, x, b, block * LANES, room);
            walk(&w);
            put_tokens(kind, &plan, &s, room, b, block * LANES, y);
        }
        free(room);
    }
    return failed;
}

/* Gradients of x, of both kernels (C, N) and of skip (C). */
int s4d_convolve_back(int kind, int64_t size, int64_t leaf, const float *turns, int64_t batch, int64_t tokens,
                      int64_t channels, const float *spectrum, const void *x, const void *above, void *by_x,
                      float *by_forward, float *by_backward, float *by_skip, int threads) {
    const Plan plan = {size, leaf, turns};
    const Sizes s = {batch, tokens, channels};
    int failed = 0;
    #pragma omp parallel num_threads(threads)
    {
        V *room = aligned_alloc(sizeof(V), (size_t)(6 * size) * sizeof(V));
        if (!room) {
            #pragma omp atomic write
            failed = 1;
        }
        #pragma omp for schedule(static)
        for (int64_t c0 = 0; c0 < channels; c0 += LANES) {
            if (!room) continue;
            V *sum = room + 4 * size;
            memset(sum, 0, (size_t)(2 * size) * sizeof(V));
            const Walk w = {&plan, GRADIENT, room, room + 2 * size, sum, (const V *)spectrum + c0 / LANES * 2 * size};
            for (int64_t b = 0; b < batch; b++) {
                get_tokens(kind, &plan, &s, x, b, c0, w.x);
                get_tokens(kind, &plan, &s, above, b, c0, w.g);
                walk(&w);
                put_tokens(kind, &plan, &s, w.g, b, c0, by_x);
            }
            const Walk last = {&plan, JOIN, sum, 0, 0, 0};
            walk(&last);
            const float factor = (float)leaf / (float)size;
            for (int64_t c = c0; c < c0 + LANES && c < channels; c++) {
                const float *lane = (const float *)sum + (c - c0), *other = lane + size * LANES;
                by_skip[c] = factor * (lane[0] + other[0]);
                for (int64_t n = 0; n < tokens; n++) {
                    const int64_t m = size - 1 - n;
                    by_forward[c * tokens + n] = factor * (other[n * LANES] + lane[n * LANES]);
                    by_backward[c * tokens + n] = factor * (other[m * LANES] - lane[m * LANES]);
                }
            }
        }
        free(room);
    }
    return failed;
}
