/* Sums of powers for CPUs, and their gradients: K_l = Re sum over n of w_n e^{l z_n} for l = 0 .. L - 1, row by row.
 *
 * With l = P q + j, e^{l z} = e^{P q z} e^{j z}: P + L / P powers of each number instead of L, made by multiplication in
 * double and rounded once, and a small matrix product in float for each row. The gradients of w and z are sums of
 * g_l e^{l z} and l g_l e^{l z}, in the same two levels.
 */
#include <math.h>
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
#define FINE 32 /* P: a multiple of every LANES, near the square root of usual lengths */
#define INLINE static inline __attribute__((always_inline))

typedef float V __attribute__((vector_size(BYTES)));

/* One row's tables; `wide` is the number of states, filled up with zeros to whole vectors. */
typedef struct {
    int64_t states, wide, coarse;
    double *step, *power;    /* (2, wide): real and imaginary parts, e^z or e^{P z}, and a power of it */
    float *near, *far, *col; /* (P, 2, wide), (L / P, 2, wide), (wide, 2, P): near again, turned */
    float *padded;           /* (L / P, P): a row filled up with zeros */
} Room;

static int64_t bytes_of(const Room *r) {
    const int64_t floats = r->wide * (4 * FINE + 2 * r->coarse) + r->coarse * FINE;
    return (r->wide * 4 * (int64_t)sizeof(double) + floats * (int64_t)sizeof(float) + 63) / 64 * 64;
}

static Room room_for(int64_t states, int64_t length) {
    Room r = {states, (states + LANES - 1) / LANES * LANES, (length + FINE - 1) / FINE, 0, 0, 0, 0, 0, 0};
    char *memory = aligned_alloc(64, (size_t)bytes_of(&r));
    if (!memory) return r;
    memset(memory, 0, (size_t)bytes_of(&r));
    r.step = (double *)memory;
    r.power = r.step + 2 * r.wide;
    r.near = (float *)(r.power + 2 * r.wide);
    r.col = r.near + 2 * FINE * r.wide;
    r.far = r.col + 2 * FINE * r.wide;
    r.padded = r.far + 2 * r.coarse * r.wide;
    return r;
}

/* table[t] = step^t for t < count; leaves the next power in `power`. */
INLINE void powers(const Room *r, int64_t count, float *table) {
    const int64_t wide = r->wide;
    double *re = r->power, *im = re + wide, *sre = r->step, *sim = sre + wide;
    for (int64_t n = 0; n < wide; n++) re[n] = 1.0, im[n] = 0.0;
    for (int64_t t = 0; t < count; t++) {
        float *out = table + 2 * wide * t;
        _Pragma("omp simd") for (int64_t n = 0; n < wide; n++) {
            out[n] = (float)re[n];
            out[wide + n] = (float)im[n];
            const double next = re[n] * sre[n] - im[n] * sim[n];
            im[n] = re[n] * sim[n] + im[n] * sre[n];
            re[n] = next;
        }
    }
}

static void fill(const Room *r, const float *re, const float *im) {
    for (int64_t n = 0; n < r->states; n++) {
        const double size = exp(re[n]);
        r->step[n] = size * cos(im[n]);
        r->step[r->wide + n] = size * sin(im[n]);
    }
    powers(r, FINE, r->near);
    memcpy(r->step, r->power, (size_t)(2 * r->wide) * sizeof(double));
    powers(r, r->coarse, r->far);
}

INLINE void lags(int width, const Room *r, const float *w_re, const float *w_im, int64_t q, float *out) {
    V sum[4][FINE / LANES] = {{{0}}};
    for (int64_t n = 0; n < r->states; n++) {
        const V *col = (const V *)(r->col + 2 * FINE * n);
        for (int i = 0; i < width; i++) {
            const float *far = r->far + 2 * r->wide * (q + i);
            const float re = w_re[n] * far[n] - w_im[n] * far[r->wide + n];
            const float im = w_re[n] * far[r->wide + n] + w_im[n] * far[n];
            for (int v = 0; v < FINE / LANES; v++) sum[i][v] += re * col[v] - im * col[FINE / LANES + v];
        }
    }
    for (int i = 0; i < width; i++) memcpy(out + FINE * (q + i), sum[i], sizeof sum[i]);
}

/* All tensors (rows, states); `out` (rows, length). Returns 0, or 1 when there was no memory for tables. */
int s4d_powers(int64_t rows, int64_t states, int64_t length, const float *re, const float *im, const float *w_re,
               const float *w_im, float *out, int threads) {
    int failed = 0;
    #pragma omp parallel num_threads(threads)
    {
        Room r = room_for(states, length);
        if (!r.step) {
            #pragma omp atomic write
            failed = 1;
        }
        #pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            if (!r.step) continue;
            const int64_t at = row * states;
            fill(&r, re + at, im + at);
            for (int64_t n = 0; n < states; n++)
                for (int64_t j = 0; j < FINE; j++) {
                    r.col[2 * FINE * n + j] = r.near[2 * r.wide * j + n];
                    r.col[2 * FINE * n + FINE + j] = r.near[2 * r.wide * j + r.wide + n];
                }
            int64_t q = 0;
            for (; q + 4 <= r.coarse; q += 4) lags(4, &r, w_re + at, w_im + at, q, r.padded);
            for (; q < r.coarse; q++) lags(1, &r, w_re + at, w_im + at, q, r.padded);
            memcpy(out + row * length, r.padded, (size_t)length * sizeof(float));
        }
        free(r.step);
    }
    return failed;
}

/* Sums of g_l e^{l z} and of l g_l e^{l z} for one vector of states. */
INLINE void moments(const Room *r, int64_t n, V *plain, V *weighted) {
    V plain_re = {0}, plain_im = {0}, weighted_re = {0}, weighted_im = {0};
    for (int64_t q = 0; q < r->coarse; q++) {
        const float *g = r->padded + FINE * q, first = (float)(FINE * q);
        V a_re = {0}, a_im = {0}, b_re = {0}, b_im = {0};
        for (int64_t j = 0; j < FINE; j++) {
            const V re = *(const V *)(r->near + 2 * r->wide * j + n);
            const V im = *(const V *)(r->near + 2 * r->wide * j + r->wide + n);
            const float here = g[j], moment = (float)j * g[j];
            a_re += here * re;
            a_im += here * im;
            b_re += moment * re;
            b_im += moment * im;
        }
        b_re += first * a_re;
        b_im += first * a_im;
        const V re = *(const V *)(r->far + 2 * r->wide * q + n), im = *(const V *)(r->far + 2 * r->wide * q + r->wide + n);
        plain_re += a_re * re - a_im * im;
        plain_im += a_re * im + a_im * re;
        weighted_re += b_re * re - b_im * im;
        weighted_im += b_re * im + b_im * re;
    }
    plain[0] = plain_re, plain[1] = plain_im, weighted[0] = weighted_re, weighted[1] = weighted_im;
}

/* `above` is the gradient of `out`. */
int s4d_powers_back(int64_t rows, int64_t states, int64_t length, const float *re, const float *im, const float *w_re,
                    const float *w_im, const float *above, float *by_re, float *by_im, float *by_w_re, float *by_w_im,
                    int threads) {
    int failed = 0;
    #pragma omp parallel num_threads(threads)
    {
        Room r = room_for(states, length);
        if (!r.step) {
            #pragma omp atomic write
            failed = 1;
        }
        #pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            if (!r.step) continue;
            const int64_t at = row * states;
            fill(&r, re + at, im + at);
            memcpy(r.padded, above + row * length, (size_t)length * sizeof(float));
            for (int64_t n = 0; n < states; n += LANES) {
                V plain[2], weighted[2];
                moments(&r, n, plain, weighted);
                for (int64_t i = n; i < n + LANES && i < states; i++) {
                    const float a = weighted[0][i - n], b = weighted[1][i - n];
                    by_w_re[at + i] = plain[0][i - n];
                    by_w_im[at + i] = -plain[1][i - n];
                    by_re[at + i] = w_re[at + i] * a - w_im[at + i] * b;
                    by_im[at + i] = -(w_re[at + i] * b + w_im[at + i] * a);
                }
            }
        }
        free(r.step);
    }
    return failed;
}
