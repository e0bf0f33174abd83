/* Depthwise convolution for CPUs, forward and backward, of tokens that lie channels-last on their grid.
 *
 * Numbers are float or bfloat16 in memory and float in between. One piece of work is one batch item and some groups of
 * LANES channels. It walks down the rows and keeps the last k of them as floats, group by group and with zeros on both
 * sides, so that the inner loops know no types and no borders. Channels and batch items never meet, and sums over the
 * batch are made in its order: results do not depend on the number of threads.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#define LANES 16
#define MAX_GROUPS 8
#define ALONE 32768 /* numbers that one thread finishes before others have started */

/* Element types; keep in step with in_memory.py. */
enum { FLOAT = 0, BFLOAT16 = 1 };

/* The compiler cuts these into what the processor has. */
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

typedef struct {
    int64_t batch, rows, columns, channels;
} Sizes;

INLINE int64_t bytes_of(int kind) { return kind == FLOAT ? 4 : 2; }

/* `n` < LANES only where the tensor has no LANES channels; the rest is zero. */
INLINE Vector load(int kind, const void *tensor, int64_t i, int n) {
    const char *from = (const char *)tensor + bytes_of(kind) * i;
    if (kind == FLOAT) {
        Vector x = {0};
        if (n == LANES) memcpy(&x, from, sizeof x);
        else memcpy(&x, from, 4 * (size_t)n);
        return x;
    }
    Halves halves = {0};
    if (n == LANES) memcpy(&halves, from, sizeof halves);
    else memcpy(&halves, from, 2 * (size_t)n);
    return (Vector)(__builtin_convertvector(halves, Bits) << 16);
}

INLINE void store(int kind, void *tensor, int64_t i, int n, Vector x) {
    char *to = (char *)tensor + bytes_of(kind) * i;
    if (kind == FLOAT) {
        if (n == LANES) memcpy(to, &x, sizeof x);
        else memcpy(to, &x, 4 * (size_t)n);
        return;
    }
    /* Round to nearest, ties to even; a NaN must not be rounded into an infinity. */
    Bits bits = (Bits)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, number = (Bits)(Mask)(x == x);
    Halves halves = __builtin_convertvector((rounded & number) | (0x7fc0u & ~number), Halves);
    if (n == LANES) memcpy(to, &halves, sizeof halves);
    else memcpy(to, &halves, 2 * (size_t)n);
}

/* ------------------------------------------------------------------------------------------- groups and rows */

/* Groups [first, first + count) of channels. The last group of the tensor is moved back to end with it, over channels
 * of the one before, and belongs to the same piece of work; what both compute is the same. */
typedef struct {
    int64_t item, first, count;
    int lanes; /* that exist: fewer than LANES only in a tensor that has fewer channels */
} Piece;

INLINE int64_t channel_of(const Sizes *s, const Piece *p, int64_t v) {
    const int64_t c = (p->first + v) * LANES, last = s->channels - LANES;
    return c <= last ? c : last > 0 ? last : 0;
}

INLINE int64_t whole_groups(const Sizes *s) { return s->channels > LANES ? s->channels / LANES : 1; }

/* Groups of one piece: as many as keep all threads busy. */
INLINE int64_t groups_per_piece(const Sizes *s, int threads) {
    int64_t groups = MAX_GROUPS;
    while (groups > 1 && s->batch * ((whole_groups(s) + groups - 1) / groups) < threads) groups /= 2;
    return groups;
}

INLINE Piece piece_of(const Sizes *s, int64_t groups, int64_t k) {
    const int64_t per_item = (whole_groups(s) + groups - 1) / groups, first = k % per_item * groups;
    int64_t end = first + groups;
    if (end >= whole_groups(s)) end = (s->channels + LANES - 1) / LANES;
    Piece p = {k / per_item, first, end - first, s->channels < LANES ? (int)s->channels : LANES};
    return p;
}

/* Where the floats of a row begin: one group behind the other, `size` / 2 zeros at both ends of each. */
INLINE Vector *row_in(Vector *room, int size, const Sizes *s, const Piece *p, int64_t row, int64_t v) {
    const int64_t slot = (row + size) % size;
    return room + (slot * p->count + v) * (s->columns + size - 1);
}

/* One row of the tensor into the room; zeros above and below the plane. */
INLINE void take_row(int kind, int size, const Sizes *s, const Piece *p, const void *x, int64_t row, Vector *room) {
    const Vector zero = {0};
    const int edge = size / 2;
    if (row >= s->rows) {
        for (int64_t v = 0; v < p->count; v++) {
            Vector *to = row_in(room, size, s, p, row, v) + edge;
            for (int64_t q = 0; q < s->columns; q++) to[q] = zero;
        }
        return;
    }
    const int64_t from = (p->item * s->rows + row) * s->columns * s->channels;
    for (int64_t q = 0; q < s->columns; q++)
        for (int64_t v = 0; v < p->count; v++) {
            const int64_t i = from + q * s->channels + channel_of(s, p, v);
            row_in(room, size, s, p, row, v)[edge + q] =
                p->lanes == LANES ? load(kind, x, i, LANES) : load(kind, x, i, p->lanes);
        }
}

/* `width` neighbouring outputs of one group. */
INLINE void convolve(int kind, int size, int width, const Piece *p, Vector *const *rows, int64_t q, const Vector *taps,
                     Vector bias, int64_t channels, void *y, int64_t at) {
    Vector sum[8];
    UNROLL for (int t = 0; t < width; t++) sum[t] = bias;
    UNROLL for (int i = 0; i < size; i++) {
        Vector x[8 + 4];
        UNROLL for (int t = 0; t < width + size - 1; t++) x[t] = rows[i][q + t];
        UNROLL for (int j = 0; j < size; j++) {
            const Vector tap = taps[size * i + j];
            UNROLL for (int t = 0; t < width; t++) sum[t] += x[t + j] * tap;
        }
    }
    UNROLL for (int t = 0; t < width; t++) {
        const int64_t i = at + (q + t) * channels;
        if (p->lanes == LANES) store(kind, y, i, LANES, sum[t]);
        else store(kind, y, i, p->lanes, sum[t]);
    }
}

/* One row of outputs from the rows around it. */
INLINE void convolve_row(int kind, int size, const Sizes *s, const Piece *p, Vector *room, const float *taps,
                         const float *bias, int64_t row, void *y) {
    const int64_t d = s->channels, n = s->columns;
    for (int64_t v = 0; v < p->count; v++) {
        const int64_t c = channel_of(s, p, v), at = (p->item * s->rows + row) * n * d + c;
        Vector own[25], *rows[5];
        const Vector zero = {0}, start = bias ? load(FLOAT, bias, c, p->lanes) : zero;
        UNROLL for (int i = 0; i < size * size; i++) own[i] = load(FLOAT, taps, i * d + c, p->lanes);
        UNROLL for (int i = 0; i < size; i++) rows[i] = row_in(room, size, s, p, row + i - size / 2, v);
        int64_t q = 0;
        for (; q + 8 <= n; q += 8) convolve(kind, size, 8, p, rows, q, own, start, d, y, at);
        for (; q + 2 <= n; q += 2) convolve(kind, size, 2, p, rows, q, own, start, d, y, at);
        for (; q < n; q++) convolve(kind, size, 1, p, rows, q, own, start, d, y, at);
    }
}

/* Adds what one row of gradients `above` says about taps and bias to `sums`, size^2 + 1 vectors for each group. */
INLINE void sum_row(int size, const Sizes *s, const Piece *p, Vector *room, Vector *above, int64_t row, Vector *sums) {
    for (int64_t v = 0; v < p->count; v++) {
        Vector sum[25] = {{0}}, plain = {0}, *rows[5], *total = sums + v * (size * size + 1);
        const Vector *g = row_in(above, size, s, p, row, v) + size / 2;
        UNROLL for (int i = 0; i < size; i++) rows[i] = row_in(room, size, s, p, row + i - size / 2, v);
        for (int64_t q = 0; q < s->columns; q++) {
            const Vector here = g[q];
            plain += here;
            UNROLL for (int i = 0; i < size; i++) {
                UNROLL for (int j = 0; j < size; j++) sum[size * i + j] += here * rows[i][q + j];
            }
        }
        UNROLL for (int i = 0; i < size * size; i++) total[i] += sum[i];
        total[size * size] += plain;
    }
}

/* -------------------------------------------------------------------------------------------------- passes */

typedef struct {
    Sizes sizes;
    const void *x, *above;
    const float *taps, *bias; /* (k^2, D), (D) */
    void *y;                  /* forward: the output; backward: the gradient of x */
    float *partial;           /* (B, k^2 + 1, D) */
} Work;

static size_t room_for(const Work *w, int size, int64_t groups, int backward) {
    const int64_t rows = size * (w->sizes.columns + size - 1);
    return sizeof(Vector) * (size_t)((groups + 1) * (backward ? 2 * rows + size * size + 1 : rows));
}

INLINE void forward_piece(int kind, int out_kind, int size, const Work *w, const Piece *p, Vector *room) {
    const Sizes *s = &w->sizes;
    for (int64_t row = 0; row < size / 2; row++) take_row(kind, size, s, p, w->x, row, room);
    for (int64_t row = 0; row < s->rows; row++) {
        take_row(kind, size, s, p, w->x, row + size / 2, room);
        convolve_row(out_kind, size, s, p, room, w->taps, w->bias, row, w->y);
    }
}

INLINE void backward_piece(int kind, int out_kind, int size, const Work *w, const Piece *p, Vector *room) {
    const Sizes *s = &w->sizes;
    const int64_t tall = size * size + 1;
    Vector *above = room + size * p->count * (s->columns + size - 1);
    Vector *sums = above + size * p->count * (s->columns + size - 1);
    for (int64_t row = 0; row < size / 2; row++) {
        take_row(kind, size, s, p, w->x, row, room);
        take_row(out_kind, size, s, p, w->above, row, above);
    }
    for (int64_t row = 0; row < s->rows; row++) {
        take_row(kind, size, s, p, w->x, row + size / 2, room);
        take_row(out_kind, size, s, p, w->above, row + size / 2, above);
        sum_row(size, s, p, room, above, row, sums);
        convolve_row(kind, size, s, p, above, w->taps, 0, row, w->y);
    }
    for (int64_t v = 0; v < p->count; v++)
        for (int64_t i = 0; i < tall; i++)
            store(FLOAT, w->partial, (p->item * tall + i) * s->channels + channel_of(s, p, v), p->lanes,
                  sums[v * tall + i]);
}

/* Types and size are constants in each of these; a parallel region would make them variables. */
#define VARIANT(name, kind, out_kind, size)                                                              \
    __attribute__((noinline)) static void forward_##name(const Work *w, const Piece *p, Vector *room) {  \
        forward_piece(kind, out_kind, size, w, p, room);                                                 \
    }                                                                                                    \
    __attribute__((noinline)) static void backward_##name(const Work *w, const Piece *p, Vector *room) { \
        backward_piece(kind, out_kind, size, w, p, room);                                                \
    }
#define VARIANTS(size)                           \
    VARIANT(float_##size, FLOAT, FLOAT, size)    \
    VARIANT(mixed_##size, FLOAT, BFLOAT16, size) \
    VARIANT(half_##size, BFLOAT16, BFLOAT16, size)
VARIANTS(1)
VARIANTS(3)
VARIANTS(5)

typedef void Pass(const Work *w, const Piece *p, Vector *room);
static Pass *const FORWARD[3][3] = {{forward_float_1, forward_mixed_1, forward_half_1},
                                    {forward_float_3, forward_mixed_3, forward_half_3},
                                    {forward_float_5, forward_mixed_5, forward_half_5}};
static Pass *const BACKWARD[3][3] = {{backward_float_1, backward_mixed_1, backward_half_1},
                                     {backward_float_3, backward_mixed_3, backward_half_3},
                                     {backward_float_5, backward_mixed_5, backward_half_5}};

static int run(Pass *pass, int size, const Work *w, int threads, int backward) {
    const Sizes *s = &w->sizes;
    if (s->batch * s->rows * s->columns * s->channels < ALONE) threads = 1;
    const int64_t groups = groups_per_piece(s, threads);
    const int64_t pieces = s->batch * ((whole_groups(s) + groups - 1) / groups);
    const size_t bytes = room_for(w, size, groups, backward);
    int failed = 0;
    #pragma omp parallel num_threads(threads) if (threads > 1 && pieces > 1)
    {
        Vector *room = aligned_alloc(sizeof(Vector), bytes);
        if (!room) {
            #pragma omp atomic write
            failed = 1;
        }
        #pragma omp for schedule(dynamic)
        for (int64_t k = 0; k < pieces; k++) {
            if (!room) continue;
            memset(room, 0, bytes);
            const Piece p = piece_of(s, groups, k);
            pass(w, &p, room);
        }
        free(room);
    }
    return failed;
}

/* Types: `kind` of x and its gradient, `out_kind` of the output and its gradient, bfloat16 wherever x is. `size` is 1, 3
 * or 5. Both return 0, or 1 when there was no memory for the rows. */
int depthwise(int kind, int out_kind, int size, int64_t batch, int64_t rows, int64_t columns, int64_t channels,
              const void *x, const float *taps, const float *bias, void *y, int threads) {
    const Work w = {{batch, rows, columns, channels}, x, 0, taps, bias, y, 0};
    return run(FORWARD[size / 2][kind + out_kind], size, &w, threads, 0);
}

/* `taps` turned round, as the gradient of x needs them. `sums` (k^2 + 1, D) gets the gradients of taps and bias; `partial`
 * is room for those of each batch item. */
int depthwise_back(int kind, int out_kind, int size, int64_t batch, int64_t rows, int64_t columns, int64_t channels,
                   const void *x, const float *taps, const void *above, void *by_x, float *partial, float *sums,
                   int threads) {
    const Work w = {{batch, rows, columns, channels}, x, above, taps, 0, by_x, partial};
    if (run(BACKWARD[size / 2][kind + out_kind], size, &w, threads, 1)) return 1;
    const int64_t width = (size * size + 1) * channels;
    memset(sums, 0, sizeof(float) * (size_t)width);
    for (int64_t b = 0; b < batch; b++) {
        const float *part = partial + b * width;
        for (int64_t i = 0; i < width; i++) sums[i] += part[i];
    }
    return 0;
}
