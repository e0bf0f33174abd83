/* Passes over tokens inside mixers, for CPUs: neighbours mixed in, heads split off, squared ReLU, sigmoid gates, and
 * their gradients. Each reads its inputs once and writes its outputs once.
 *
 * Numbers are float or bfloat16 in memory and float in between. Work is cut into pieces that do not depend on the number
 * of threads, and each sum over tokens is made piece by piece in one order: results are the same with any number of
 * threads, and those of one batch item do not depend on its neighbours.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Elements never depend on each other, whatever the pointers look like to the compiler. */
#define EACH(i, n) _Pragma("omp simd") for (int64_t i = 0; i < (n); i++)
#define INLINE static inline __attribute__((always_inline))
#define ELEMENTS 4096 /* of a piece without rows */
#define ALONE 32768   /* elements that one thread finishes before others have started */
#define MAX_MIXTURES 8

/* Element types; keep in step with in_memory.py. */
enum { FLOAT = 0, BFLOAT16 = 1 };

INLINE float load(int kind, const void *tensor, int64_t i) {
    if (kind == FLOAT) return ((const float *)tensor)[i];
    union { uint32_t bits; float number; } u = {(uint32_t)((const uint16_t *)tensor)[i] << 16};
    return u.number;
}

INLINE void store(int kind, void *tensor, int64_t i, float x) {
    if (kind == FLOAT) {
        ((float *)tensor)[i] = x;
    } else {
        union { float number; uint32_t bits; } u = {x};
        /* Round to nearest, ties to even; a NaN must not be rounded into an infinity. */
        uint32_t rounded = (u.bits + 0x7fffu + ((u.bits >> 16) & 1u)) >> 16;
        ((uint16_t *)tensor)[i] = (uint16_t)(x == x ? rounded : 0x7fc0u);
    }
}

/* e^x for x <= 0, to 1 ulp; below -87 it stays e^-87. Written out, because not every libm has a vector form. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x; /* this way round a NaN stays one */
    float shifted = x * 1.44269504f + 12582912.0f;
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r;
    union { float number; uint32_t bits; } scale = {shifted};
    scale.bits = (scale.bits + 127u) << 23;
    return p * scale.number + scale.number;
}

INLINE int64_t bytes_of(int kind) { return kind == FLOAT ? 4 : 2; }
INLINE void *at(int kind, const void *tensor, int64_t i) { return (char *)tensor + bytes_of(kind) * i; }
INLINE int team(int threads, int64_t elements) { return elements < ALONE ? 1 : threads; }

/* Parallel regions stand in the exported functions and choose the types inside: a region is compiled once, as a function
 * of its own, and types that are constants outside would be variables in it. */

/* ------------------------------------------------------------------------------------------------ elementwise */

/* `above` NULL: y = max(x, 0)^2. Else y = above times its derivative. A NaN stays one. */
INLINE void squared_relu_piece(int kind, int64_t n, const void *x, const void *above, void *y) {
    if (above) {
        EACH(i, n) {
            float z = load(kind, x, i), kept = z < 0.0f ? 0.0f : z;
            store(kind, y, i, 2.0f * kept * load(kind, above, i));
        }
    } else {
        EACH(i, n) {
            float z = load(kind, x, i), kept = z < 0.0f ? 0.0f : z;
            store(kind, y, i, kept * kept);
        }
    }
}

void squared_relu(int kind, int64_t n, const void *x, const void *above, void *y, int threads) {
    #pragma omp parallel for num_threads(team(threads, n)) schedule(static)
    for (int64_t begin = 0; begin < n; begin += ELEMENTS) {
        const int64_t size = begin + ELEMENTS < n ? ELEMENTS : n - begin;
        const void *in = at(kind, x, begin), *g = above ? at(kind, above, begin) : 0;
        if (kind == FLOAT) squared_relu_piece(FLOAT, size, in, g, at(FLOAT, y, begin));
        else squared_relu_piece(BFLOAT16, size, in, g, at(BFLOAT16, y, begin));
    }
}

INLINE float sigmoid(float x) {
    float e = exponential(x < 0.0f ? x : -x), small = e / (1.0f + e);
    return x < 0.0f ? small : 1.0f / (1.0f + e);
}

INLINE void gate_piece(int kind, int64_t n, const void *gate, const void *x, void *y) {
    EACH(i, n) store(kind, y, i, sigmoid(load(kind, gate, i)) * load(kind, x, i));
}

/* y = sigmoid(gate) x */
void sigmoid_gate(int kind, int64_t n, const void *gate, const void *x, void *y, int threads) {
    #pragma omp parallel for num_threads(team(threads, n)) schedule(static)
    for (int64_t begin = 0; begin < n; begin += ELEMENTS) {
        const int64_t size = begin + ELEMENTS < n ? ELEMENTS : n - begin;
        const void *g = at(kind, gate, begin), *in = at(kind, x, begin);
        if (kind == FLOAT) gate_piece(FLOAT, size, g, in, at(FLOAT, y, begin));
        else gate_piece(BFLOAT16, size, g, in, at(BFLOAT16, y, begin));
    }
}

INLINE void gate_piece_back(int kind, int64_t n, const void *gate, const void *x, const void *above, void *by_gate,
                            void *by_x) {
    EACH(i, n) {
        float open = sigmoid(load(kind, gate, i)), shut = sigmoid(-load(kind, gate, i)), g = load(kind, above, i);
        store(kind, by_x, i, g * open);
        store(kind, by_gate, i, g * load(kind, x, i) * (open * shut));
    }
}

void sigmoid_gate_back(int kind, int64_t n, const void *gate, const void *x, const void *above, void *by_gate,
                       void *by_x, int threads) {
    #pragma omp parallel for num_threads(team(threads, n)) schedule(static)
    for (int64_t begin = 0; begin < n; begin += ELEMENTS) {
        const int64_t size = begin + ELEMENTS < n ? ELEMENTS : n - begin;
        const void *s = at(kind, gate, begin), *in = at(kind, x, begin), *g = at(kind, above, begin);
        void *by_s = at(kind, by_gate, begin), *by_in = at(kind, by_x, begin);
        if (kind == FLOAT) gate_piece_back(FLOAT, size, s, in, g, by_s, by_in);
        else gate_piece_back(BFLOAT16, size, s, in, g, by_s, by_in);
    }
}

/* --------------------------------------------------------------------------------------------- neighbours */

/* Tokens (batch, rows, columns, channels); group k of channels ends before ends[k], and those behind the last group come
 * from the token itself. Mixture i of batch item b begins `item` b + `mixture` i elements into the mixtures. */
typedef struct {
    int64_t batch, rows, columns, channels, mixtures, shift, ends[4], item, mixture;
} Grid;

/* Elements from a token to the one that group k takes its channels from (`way` 1) or gives them to (`way` -1), or -1
 * where the grid ends; as an absolute token number within the batch item. */
INLINE int64_t neighbour(const Grid *g, int64_t row, int64_t column, int k, int64_t way) {
    if (k < 2) column -= way * (k == 0 ? g->shift : -g->shift);
    else if (k < 4) row -= way * (k == 2 ? g->shift : -g->shift);
    if (row < 0 || row >= g->rows || column < 0 || column >= g->columns) return -1;
    return row * g->columns + column;
}

INLINE int64_t begin_of(const Grid *g, int k) { return k ? g->ends[k - 1] : 0; }
INLINE int64_t end_of(const Grid *g, int k) { return k < 4 ? g->ends[k] : g->channels; }

/* The channels that the shift brings to one token. */
INLINE void brought(int kind, const Grid *g, const void *x, int64_t b, int64_t row, int64_t column, float *to) {
    const int64_t tokens = g->rows * g->columns, d = g->channels;
    for (int k = 0; k < 5; k++) {
        const int64_t from = neighbour(g, row, column, k, 1), begin = begin_of(g, k), size = end_of(g, k) - begin;
        float *part = to + begin;
        if (from < 0) {
            EACH(c, size) part[c] = 0.0f;
        } else {
            const void *source = at(kind, x, (b * tokens + from) * d + begin);
            EACH(c, size) part[c] = load(kind, source, c);
        }
    }
}

INLINE void mix_row(int kind, int out_kind, const Grid *g, int64_t b, int64_t row, const void *x, const float *shares,
                    void *y, float *shifted) {
    const int64_t d = g->channels;
    for (int64_t column = 0; column < g->columns; column++) {
        const int64_t token = row * g->columns + column;
        const void *own = at(kind, x, (b * g->rows * g->columns + token) * d);
        brought(kind, g, x, b, row, column, shifted);
        for (int64_t i = 0; i < g->mixtures; i++) {
            const float *share = shares + i * d;
            void *out = at(out_kind, y, g->item * b + g->mixture * i + token * d);
            EACH(c, d) store(out_kind, out, c, shifted[c] + share[c] * (load(kind, own, c) - shifted[c]));
        }
    }
}

/* y_i = share_i x + (1 - share_i) shifted x. Returns 1 when there was no memory. */
int shift_mix(int kind, int out_kind, int64_t batch, int64_t rows, int64_t columns, int64_t channels, int64_t mixtures,
              int64_t shift, int64_t end1, int64_t end2, int64_t end3, int64_t end4, int64_t item, int64_t mixture,
              const void *x, const float *shares, void *y, int threads) {
    const Grid g = {batch, rows, columns, channels, mixtures, shift, {end1, end2, end3, end4}, item, mixture};
    int failed = 0;
    #pragma omp parallel num_threads(team(threads, batch * rows * columns * channels))
    {
        float *shifted = malloc(sizeof(float) * (size_t)(channels + 1));
        if (!shifted) {
            #pragma omp atomic write
            failed = 1;
        }
        #pragma omp for schedule(static)
        for (int64_t k = 0; k < batch * rows; k++) {
            if (!shifted) continue;
            if (kind == BFLOAT16) mix_row(BFLOAT16, BFLOAT16, &g, k / rows, k % rows, x, shares, y, shifted);
            else if (out_kind == FLOAT) mix_row(FLOAT, FLOAT, &g, k / rows, k % rows, x, shares, y, shifted);
            else mix_row(FLOAT, BFLOAT16, &g, k / rows, k % rows, x, shares, y, shifted);
        }
        free(shifted);
    }
    return failed;
}

/* `sums` (mixtures, D) gets this row's part of the gradient of the shares; `room` is for two rows of floats. */
INLINE void mix_row_back(int kind, int out_kind, const Grid *g, int64_t b, int64_t row, const void *x,
                         const float *shares, const void *above, void *by_x, float *sums, float *room) {
    const int64_t d = g->channels, mixtures = g->mixtures;
    float *gradient = room, *shifted = room + d;
    EACH(c, mixtures * d) sums[c] = 0.0f;
    for (int64_t column = 0; column < g->columns; column++) {
        const int64_t token = row * g->columns + column, mine = (b * g->rows * g->columns + token) * d;
        const void *own = at(kind, x, mine);
        brought(kind, g, x, b, row, column, shifted);
        EACH(c, d) gradient[c] = 0.0f;
        for (int64_t i = 0; i < mixtures; i++) {
            const float *share = shares + i * d;
            const void *from = at(out_kind, above, g->item * b + g->mixture * i + token * d);
            float *sum = sums + i * d;
            EACH(c, d) {
                float h = load(out_kind, from, c);
                gradient[c] += share[c] * h;
                sum[c] += h * (load(kind, own, c) - shifted[c]);
            }
            for (int k = 0; k < 5; k++) {
                const int64_t there = neighbour(g, row, column, k, -1), begin = begin_of(g, k);
                if (there < 0) continue;
                const void *far = at(out_kind, above, g->item * b + g->mixture * i + there * d + begin);
                const float *rest = share + begin;
                float *part = gradient + begin;
                EACH(c, end_of(g, k) - begin) part[c] += (1.0f - rest[c]) * load(out_kind, far, c);
            }
        }
        void *to = at(kind, by_x, mine);
        EACH(c, d) store(kind, to, c, gradient[c]);
    }
}

/* `partial` is room for the sums of each row, (B, rows, mixtures, D); `sums` gets the gradient of the shares. */
int shift_mix_back(int kind, int out_kind, int64_t batch, int64_t rows, int64_t columns, int64_t channels,
                   int64_t mixtures, int64_t shift, int64_t end1, int64_t end2, int64_t end3, int64_t end4, int64_t item,
                   int64_t mixture, const void *x, const float *shares, const void *above, void *by_x, float *partial,
                   float *sums, int threads) {
    const Grid g = {batch, rows, columns, channels, mixtures, shift, {end1, end2, end3, end4}, item, mixture};
    const int64_t width = mixtures * channels;
    int failed = 0;
    #pragma omp parallel num_threads(team(threads, batch * rows * columns * channels))
    {
        float *room = malloc(sizeof(float) * (size_t)(2 * channels + 1));
        if (!room) {
            #pragma omp atomic write
            failed = 1;
        }
        #pragma omp for schedule(static)
        for (int64_t k = 0; k < batch * rows; k++) {
            const int64_t b = k / rows, row = k % rows;
            float *own = partial + k * width;
            if (!room) continue;
            if (kind == BFLOAT16) mix_row_back(BFLOAT16, BFLOAT16, &g, b, row, x, shares, above, by_x, own, room);
            else if (out_kind == FLOAT) mix_row_back(FLOAT, FLOAT, &g, b, row, x, shares, above, by_x, own, room);
            else mix_row_back(FLOAT, BFLOAT16, &g, b, row, x, shares, above, by_x, own, room);
        }
        free(room);
    }
    EACH(c, width) sums[c] = 0.0f;
    for (int64_t k = 0; k < batch * rows; k++) EACH(c, width) sums[c] += partial[k * width + c];
    return failed;
}

/* -------------------------------------------------------------------------------------------------- heads */

/* qkv (parts, tokens, 3, heads, size) to (3, parts, heads, tokens, size): queries and keys turned by the angle of their
 * token and made of length `lengths` (2, heads), values as they are. The largest size of a head: */
#define MAX_SIZE 512
#define SHORTEST 1e-12f

/* Heads are short: eight channels at a time leave no rest in most. The compiler cuts these into what there is. */
#define LANES 8
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
#ifdef __clang__
#define SWAPPED(x) __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6)
#else
#define SWAPPED(x) __builtin_shuffle(x, (Mask){1, 0, 3, 2, 5, 4, 7, 6})
#endif

/* The first n of eight channels; the others are zero. */
INLINE Vector load_some(int kind, const void *tensor, int64_t i, int64_t n) {
    const void *from = at(kind, tensor, i);
    if (kind == FLOAT) {
        Vector x = {0};
        if (n >= LANES) memcpy(&x, from, sizeof x);
        else memcpy(&x, from, 4 * (size_t)n);
        return x;
    }
    Halves halves = {0};
    if (n >= LANES) memcpy(&halves, from, sizeof halves);
    else memcpy(&halves, from, 2 * (size_t)n);
    return (Vector)(__builtin_convertvector(halves, Bits) << 16);
}

INLINE void store_some(int kind, void *tensor, int64_t i, int64_t n, Vector x) {
    void *to = at(kind, tensor, i);
    if (kind == FLOAT) {
        if (n >= LANES) memcpy(to, &x, sizeof x);
        else memcpy(to, &x, 4 * (size_t)n);
        return;
    }
    Bits bits = (Bits)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, number = (Bits)(Mask)(x == x);
    Halves halves = __builtin_convertvector((rounded & number) | (0x7fc0u & ~number), Halves);
    if (n >= LANES) memcpy(to, &halves, sizeof halves);
    else memcpy(to, &halves, 2 * (size_t)n);
}

INLINE float sum_of(Vector x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }

/* Tables hold one number per channel: its cosine; its sine, negative for the first of a pair. Returns 1 / length. */
INLINE float turn(int kind, int64_t size, const void *x, const float *cosine, const float *sine, Vector *to) {
    Vector squares = {0};
    for (int64_t e = 0; e < size; e += LANES) {
        Vector v = load_some(kind, x, e, size - e);
        Vector u = v * load_some(FLOAT, cosine, e, size - e) + SWAPPED(v) * load_some(FLOAT, sine, e, size - e);
        to[e / LANES] = u;
        squares += u * u;
    }
    float length = sqrtf(sum_of(squares));
    return 1.0f / (length < SHORTEST ? SHORTEST : length);
}

INLINE void heads_token(int kind, int64_t parts, int64_t tokens, int64_t heads, int64_t size, int64_t p, int64_t t,
                        const void *qkv, const float *cosine, const float *sine, const float *lengths, void *y) {
    for (int64_t s = 0; s < 3; s++)
        for (int64_t h = 0; h < heads; h++) {
            const void *in = at(kind, qkv, (((p * tokens + t) * 3 + s) * heads + h) * size);
            void *out = at(kind, y, (((s * parts + p) * heads + h) * tokens + t) * size);
            if (s == 2) {
                memcpy(out, in, (size_t)(bytes_of(kind) * size));
                continue;
            }
            Vector turned[MAX_SIZE / LANES];
            const float rate = turn(kind, size, in, cosine, sine, turned) * lengths[s * heads + h];
            for (int64_t e = 0; e < size; e += LANES) store_some(kind, out, e, size - e, turned[e / LANES] * rate);
        }
}

void cosine_heads(int kind, int64_t parts, int64_t tokens, int64_t heads, int64_t size, const void *qkv,
                  const float *cosine, const float *sine, const float *lengths, void *y, int threads) {
    #pragma omp parallel for num_threads(team(threads, parts * tokens * heads * size)) schedule(static)
    for (int64_t k = 0; k < parts * tokens; k++) {
        const int64_t p = k / tokens, t = k % tokens;
        const float *c = cosine + t * size, *s = sine + t * size;
        if (kind == FLOAT) heads_token(FLOAT, parts, tokens, heads, size, p, t, qkv, c, s, lengths, y);
        else heads_token(BFLOAT16, parts, tokens, heads, size, p, t, qkv, c, s, lengths, y);
    }
}

/* With u the turned vector, n = u / |u|, y = length n: the gradient of u is length / |u| (g - n (n.g)), and that of
 * `length` is n.g. `sums` (2, heads) gets what this token says of the lengths. */
INLINE void heads_token_back(int kind, int64_t parts, int64_t tokens, int64_t heads, int64_t size, int64_t p, int64_t t,
                             const void *qkv, const float *cosine, const float *sine, const float *lengths,
                             const void *above, void *by_qkv, float *sums) {
    (void)parts;
    for (int64_t s = 0; s < 3; s++)
        for (int64_t h = 0; h < heads; h++) {
            const int64_t mine = (((p * tokens + t) * 3 + s) * heads + h) * size;
            const void *g = at(kind, above, (((p * 3 + s) * heads + h) * tokens + t) * size);
            void *out = at(kind, by_qkv, mine);
            if (s == 2) {
                memcpy(out, g, (size_t)(bytes_of(kind) * size));
                continue;
            }
            Vector turned[MAX_SIZE / LANES], products = {0};
            const float rate = turn(kind, size, at(kind, qkv, mine), cosine, sine, turned);
            for (int64_t e = 0; e < size; e += LANES) products += turned[e / LANES] * load_some(kind, g, e, size - e);
            const float along = sum_of(products) * rate, length = lengths[s * heads + h] * rate;
            sums[s * heads + h] += along;
            /* What is shorter than the shortest is divided by a constant. */
            const float pull = rate < 1.0f / SHORTEST ? along * rate : 0.0f;
            for (int64_t e = 0; e < size; e += LANES) {
                Vector u = length * (load_some(kind, g, e, size - e) - turned[e / LANES] * pull);
                Vector cosines = load_some(FLOAT, cosine, e, size - e), sines = load_some(FLOAT, sine, e, size - e);
                store_some(kind, out, e, size - e, u * cosines - SWAPPED(u) * sines);
            }
        }
}

/* `above` is (parts, 3, heads, tokens, size); `partial` (parts, 2, heads) is room, `sums` (2, heads) gets the gradient of
 * the lengths. */
void cosine_heads_back(int kind, int64_t parts, int64_t tokens, int64_t heads, int64_t size, const void *qkv,
                       const float *cosine, const float *sine, const float *lengths, const void *above, void *by_qkv,
                       float *partial, float *sums, int threads) {
    #pragma omp parallel for num_threads(team(threads, parts * tokens * heads * size)) schedule(static)
    for (int64_t p = 0; p < parts; p++) {
        float *own = partial + p * 2 * heads;
        for (int64_t h = 0; h < 2 * heads; h++) own[h] = 0.0f;
        for (int64_t t = 0; t < tokens; t++) {
            const float *c = cosine + t * size, *s = sine + t * size;
            if (kind == FLOAT)
                heads_token_back(FLOAT, parts, tokens, heads, size, p, t, qkv, c, s, lengths, above, by_qkv, own);
            else heads_token_back(BFLOAT16, parts, tokens, heads, size, p, t, qkv, c, s, lengths, above, by_qkv, own);
        }
    }
    for (int64_t h = 0; h < 2 * heads; h++) {
        sums[h] = 0.0f;
        for (int64_t p = 0; p < parts; p++) sums[h] += partial[p * 2 * heads + h];
    }
}
