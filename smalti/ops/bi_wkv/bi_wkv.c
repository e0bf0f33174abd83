/* Bi-WKV for CPUs, forward and backward: two first-order recurrences over the tokens, one per direction.
 *
 * With x = e^key (value, 1), the past of token n is  past_n = sum over i < n of e^{-(n-1-i) decay} x_i,  so
 * past_{n+1} = e^{-decay} past_n + x_n; the future likewise; and the mean is
 * (past + future + e^bonus x_n) [values] / (the same) [ones].
 *
 * The work is cut into blocks of one batch item and up to 128 channels, which lie next to each other in memory and
 * are the lanes of the inner loops. Two forms share the interface, chosen per block from decay and bonus alone, so
 * that the backward pass makes the same choice as the forward pass:
 *
 * - plain, in float: keys relative to their maximum over the tokens, and the recurrence carries e^{-decay} - 1, not
 *   e^{-decay}, whose rounding would add up over the tokens. Sums stay in range while |decay| N and |bonus| are at
 *   most PLAIN_RANGE: denominators are then at least e^-50, and keys 87 below the maximum no longer count.
 * - ranged, in double: every sum carries its own exponent, so no decay and no key overflows or vanishes. For strong
 *   decays and for double inputs.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* On processors that have them, whole vectors: compilers take half ones for fear of lower clocks. */
#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif

/* Lanes never depend on each other, whatever the pointers look like to the compiler. */
#define EACH_LANE _Pragma("omp simd") for (int c = 0; c < lanes; c++)
#define INLINE static inline __attribute__((always_inline))
#define MAX_LANES 128
/* Tokens whose states are kept at a time, three rows of floats each forward and five backward, so that they stay in a
 * core's own cache. A second pass over the other chunks is cheaper than states that leave it. */
#define FORWARD_CHUNK 256
#define BACKWARD_CHUNK 128
#define PLAIN_RANGE 50.0

/* Element types of the token tensors; keep in step with c.py. */
enum { FLOAT = 0, BFLOAT16 = 1, DOUBLE = 2 };

INLINE double load(int kind, const void *tensor, int64_t i) {
    if (kind == FLOAT) return ((const float *)tensor)[i];
    if (kind == DOUBLE) return ((const double *)tensor)[i];
    union { uint32_t bits; float number; } u = {(uint32_t)((const uint16_t *)tensor)[i] << 16};
    return u.number;
}

INLINE void store(int kind, void *tensor, int64_t i, double x) {
    if (kind == FLOAT) {
        ((float *)tensor)[i] = (float)x;
    } else if (kind == DOUBLE) {
        ((double *)tensor)[i] = x;
    } else {
        union { float number; uint32_t bits; } u = {(float)x};
        /* Round to nearest, ties to even; a NaN must not be rounded into an infinity. */
        uint32_t rounded = (u.bits + 0x7fffu + ((u.bits >> 16) & 1u)) >> 16;
        ((uint16_t *)tensor)[i] = (uint16_t)(u.number == u.number ? rounded : 0x7fc0u);
    }
}

INLINE float loadf(int kind, const void *tensor, int64_t i) {
    if (kind == FLOAT) return ((const float *)tensor)[i];
    union { uint32_t bits; float number; } u = {(uint32_t)((const uint16_t *)tensor)[i] << 16};
    return u.number;
}

INLINE void storef(int kind, void *tensor, int64_t i, float x) {
    if (kind == FLOAT) ((float *)tensor)[i] = x;
    else store(BFLOAT16, tensor, i, x);
}

/* Rows of a block are `channels` elements apart, further than what a processor fetches ahead by itself. */
#define AHEAD 8
INLINE void fetch(int kind, int lanes, const void *tensor, int64_t i) {
    const int64_t bytes = kind == DOUBLE ? 8 : kind == FLOAT ? 4 : 2;
    const uintptr_t from = (uintptr_t)tensor + (uintptr_t)(i * bytes);
    for (int64_t line = 0; line < lanes * bytes; line += 64) __builtin_prefetch((const void *)(from + (uintptr_t)line), 0, 3);
}

/* e^x for x <= 0, to 1 ulp; below -87 it stays e^-87. Written out, because not every libm has a vector form. */
INLINE float expf_negative(float x) {
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

/* e^x = (1 + tail) scale for |x| <= 708, with scale a power of two and the tail small. */
INLINE double exp_parts(double x, double *scale) {
    double shifted = x * 1.4426950408889634 + 6755399441055744.0;
    double n = shifted - 6755399441055744.0;
    double r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
    double p = 1.6059043836821613e-10; /* 1/13! and on: |r| <= 0.35 leaves 4e-18 */
    p = p * r + 2.08767569878681e-09;
    p = p * r + 2.505210838544172e-08;
    p = p * r + 2.7557319223985893e-07;
    p = p * r + 2.7557319223985893e-06;
    p = p * r + 2.48015873015873e-05;
    p = p * r + 0.0001984126984126984;
    p = p * r + 0.001388888888888889;
    p = p * r + 0.008333333333333333;
    p = p * r + 0.041666666666666664;
    p = p * r + 0.16666666666666666;
    p = p * r + 0.5;
    union { double number; uint64_t bits; } power = {shifted};
    power.bits = (power.bits + 1023u) << 52;
    *scale = power.number;
    return (p * r) * r + r;
}

/* e^x for x <= 0, to 2 ulp; below -708 it is 0. */
INLINE double exp_negative(double x) {
    double scale, tail = exp_parts(x < -708.0 ? -708.0 : x, &scale);
    double y = tail * scale + scale;
    return x < -708.0 ? 0.0 : y;
}

typedef struct {
    int64_t tokens, channels; /* of the tensors; a token is `channels` elements after the one before */
    const void *key, *value;
    const double *decay, *bonus; /* (C) */
    void *output; /* forward only; the rest backward only */
    const void *above;
    void *key_gradient, *value_gradient;
    double *decay_gradient, *bonus_gradient; /* (B, C) */
} Work;

/* ------------------------------------------------------------------------------------------------ plain form */

INLINE void largest_keys(int kind, int lanes, const Work *w, int64_t at, float *largest) {
    EACH_LANE largest[c] = -INFINITY;
    for (int64_t t = 0; t < w->tokens; t++) {
        const int64_t row = at + t * w->channels;
        fetch(kind, lanes, w->key, row + AHEAD * w->channels);
        EACH_LANE {
            float k = loadf(kind, w->key, row + c);
            largest[c] = k > largest[c] ? k : largest[c];
        }
    }
}

/* The mean of the values with weights e^key. */
INLINE void mean_values(int kind, int lanes, const Work *w, int64_t at, const float *largest, float *mean) {
    float sum[MAX_LANES] = {0};
    EACH_LANE mean[c] = 0;
    for (int64_t t = 0; t < w->tokens; t++) {
        const int64_t row = at + t * w->channels;
        fetch(kind, lanes, w->value, row + AHEAD * w->channels);
        EACH_LANE {
            float e = expf_negative(loadf(kind, w->key, row + c) - largest[c]);
            mean[c] += e * loadf(kind, w->value, row + c);
            sum[c] += e;
        }
    }
    EACH_LANE mean[c] /= sum[c];
}

/* Future sums of values and ones, one token further back; `kept` (e, values, ones) gets them as they were before. */
INLINE void step_back(int kind, int lanes, const Work *w, int64_t row, const float *largest, const float *centre,
                      const float *rate, float *values, float *ones, float *kept) {
    fetch(kind, lanes, w->key, row - AHEAD * w->channels);
    fetch(kind, lanes, w->value, row - AHEAD * w->channels);
    EACH_LANE {
        float e = expf_negative(loadf(kind, w->key, row + c) - largest[c]);
        float v = loadf(kind, w->value, row + c) - centre[c];
        float a = values[c], d = ones[c];
        if (kept) {
            kept[c] = e;
            kept[lanes + c] = a;
            kept[2 * lanes + c] = d;
        }
        values[c] = a + (a * rate[c] + e * v);
        ones[c] = d + (d * rate[c] + e);
    }
}

/* Writes the output; or, for the backward pass, the outputs for values less `centre`, and the denominators. */
INLINE void forward_plain(int kind, int lanes, const Work *w, int64_t at, const float *largest, const float *centre,
                          const float *rate, const float *own, float *room, float *centred, float *denominators) {
    float fa[MAX_LANES] = {0}, fd[MAX_LANES] = {0}, pa[MAX_LANES] = {0}, pd[MAX_LANES] = {0};
    const int64_t n = w->tokens, chunks = (n + FORWARD_CHUNK - 1) / FORWARD_CHUNK;
    float *border = room, *kept = room + 2 * lanes * chunks;
    for (int64_t q = chunks - 1; q > 0; q--) {
        const int64_t begin = q * FORWARD_CHUNK, end = begin + FORWARD_CHUNK < n ? begin + FORWARD_CHUNK : n;
        memcpy(border + 2 * lanes * q, fa, lanes * sizeof(float));
        memcpy(border + 2 * lanes * q + lanes, fd, lanes * sizeof(float));
        for (int64_t t = end - 1; t >= begin; t--)
            step_back(kind, lanes, w, at + t * w->channels, largest, centre, rate, fa, fd, 0);
    }
    for (int64_t q = 0; q < chunks; q++) {
        const int64_t begin = q * FORWARD_CHUNK, end = begin + FORWARD_CHUNK < n ? begin + FORWARD_CHUNK : n;
        if (q > 0) {
            memcpy(fa, border + 2 * lanes * q, lanes * sizeof(float));
            memcpy(fd, border + 2 * lanes * q + lanes, lanes * sizeof(float));
        }
        for (int64_t t = end - 1; t >= begin; t--)
            step_back(kind, lanes, w, at + t * w->channels, largest, centre, rate, fa, fd,
                      kept + 3 * lanes * (t - begin));
        for (int64_t t = begin; t < end; t++) {
            const float *e = kept + 3 * lanes * (t - begin), *a = e + lanes, *d = a + lanes;
            const int64_t row = at + t * w->channels;
            if (!centred) fetch(kind, lanes, w->output, row + AHEAD * w->channels);
            EACH_LANE {
                float ev = e[c] * (loadf(kind, w->value, row + c) - centre[c]);
                float bottom = (pd[c] + d[c]) + own[c] * e[c];
                float y = ((pa[c] + a[c]) + own[c] * ev) / bottom;
                if (centred) {
                    centred[lanes * t + c] = y;
                    denominators[lanes * t + c] = bottom;
                } else {
                    storef(kind, w->output, row + c, y);
                }
                pa[c] = pa[c] + (pa[c] * rate[c] + ev);
                pd[c] = pd[c] + (pd[c] * rate[c] + e[c]);
            }
        }
    }
}

INLINE void rates(int lanes, const Work *w, int c0, float *rate, float *own) {
    const double *decay = w->decay + c0, *bonus = w->bonus + c0; /* at most PLAIN_RANGE */
    EACH_LANE {
        double scale, tail = exp_parts(-decay[c], &scale);
        rate[c] = (float)(tail * scale + (scale - 1.0));
        tail = exp_parts(bonus[c], &scale);
        own[c] = (float)(tail * scale + scale);
    }
}

INLINE void output_plain(int kind, int lanes, const Work *w, int64_t at, int c0, float *room) {
    float largest[MAX_LANES], rate[MAX_LANES], own[MAX_LANES], nothing[MAX_LANES] = {0};
    rates(lanes, w, c0, rate, own);
    largest_keys(kind, lanes, w, at, largest);
    forward_plain(kind, lanes, w, at, largest, nothing, rate, own, room, 0, 0);
}

/* One token of a two-sided sum of (g, h) and of the same weighted with the distance, which is what decay's needs:
 * sum of (d-1) r^(d-1) x  goes on as  r (itself + the plain sum). */
INLINE void advance(float *g, float *h, float *gd, float *hd, float rate, float new_g, float new_h) {
    float sg = *gd + *g, sh = *hd + *h;
    *gd = sg + sg * rate;
    *hd = sh + sh * rate;
    *g = *g + (*g * rate + new_g);
    *h = *h + (*h * rate + new_h);
}

/* Gradients live on differences between values and outputs. Where few tokens have nearly all the weight these are small,
 * so values count from their mean by weight, and the outputs are made again, counting from there too. */
INLINE void backward_plain(int kind, int lanes, const Work *w, int64_t b, int64_t at, int c0, float *room) {
    float largest[MAX_LANES], centre[MAX_LANES], rate[MAX_LANES], own[MAX_LANES];
    float by_decay[MAX_LANES], by_bonus[MAX_LANES];
    float fg[MAX_LANES] = {0}, fh[MAX_LANES] = {0}, fgd[MAX_LANES] = {0}, fhd[MAX_LANES] = {0};
    float pg[MAX_LANES] = {0}, ph[MAX_LANES] = {0}, pgd[MAX_LANES] = {0}, phd[MAX_LANES] = {0};
    double sum_decay[MAX_LANES] = {0}, sum_bonus[MAX_LANES] = {0};
    const int64_t n = w->tokens, chunks = (n + BACKWARD_CHUNK - 1) / BACKWARD_CHUNK;
    float *centred = room, *denominators = centred + lanes * n;
    float *border = denominators + lanes * n, *kept = border + 4 * lanes * chunks;
    rates(lanes, w, c0, rate, own);
    largest_keys(kind, lanes, w, at, largest);
    mean_values(kind, lanes, w, at, largest, centre);
    forward_plain(kind, lanes, w, at, largest, centre, rate, own, border, centred, denominators);
    for (int64_t q = chunks - 1; q > 0; q--) {
        float *mark = border + 4 * lanes * q;
        memcpy(mark, fg, lanes * sizeof(float));
        memcpy(mark + lanes, fh, lanes * sizeof(float));
        memcpy(mark + 2 * lanes, fgd, lanes * sizeof(float));
        memcpy(mark + 3 * lanes, fhd, lanes * sizeof(float));
        for (int64_t t = (q + 1) * BACKWARD_CHUNK < n ? (q + 1) * BACKWARD_CHUNK - 1 : n - 1; t >= q * BACKWARD_CHUNK; t--) {
            const int64_t row = at + t * w->channels;
            fetch(kind, lanes, w->above, row - AHEAD * w->channels);
            EACH_LANE {
                float g = loadf(kind, w->above, row + c) / denominators[lanes * t + c];
                float h = -g * centred[lanes * t + c];
                advance(fg + c, fh + c, fgd + c, fhd + c, rate[c], g, h);
            }
        }
    }
    for (int64_t q = 0; q < chunks; q++) {
        const int64_t begin = q * BACKWARD_CHUNK, end = begin + BACKWARD_CHUNK < n ? begin + BACKWARD_CHUNK : n;
        if (q > 0) {
            const float *mark = border + 4 * lanes * q;
            memcpy(fg, mark, lanes * sizeof(float));
            memcpy(fh, mark + lanes, lanes * sizeof(float));
            memcpy(fgd, mark + 2 * lanes, lanes * sizeof(float));
            memcpy(fhd, mark + 3 * lanes, lanes * sizeof(float));
        }
        EACH_LANE by_decay[c] = by_bonus[c] = 0;
        for (int64_t t = end - 1; t >= begin; t--) {
            const int64_t row = at + t * w->channels;
            float *now = kept + 5 * lanes * (t - begin);
            fetch(kind, lanes, w->above, row - AHEAD * w->channels);
            EACH_LANE {
                float e = expf_negative(loadf(kind, w->key, row + c) - largest[c]);
                float g = loadf(kind, w->above, row + c) / denominators[lanes * t + c];
                float h = -g * centred[lanes * t + c];
                by_decay[c] -= e * ((loadf(kind, w->value, row + c) - centre[c]) * fgd[c] + fhd[c]);
                now[c] = e;
                now[lanes + c] = g;
                now[2 * lanes + c] = h;
                now[3 * lanes + c] = fg[c] + own[c] * g;
                now[4 * lanes + c] = fh[c] + own[c] * h;
                advance(fg + c, fh + c, fgd + c, fhd + c, rate[c], g, h);
            }
        }
        for (int64_t t = begin; t < end; t++) {
            const int64_t row = at + t * w->channels;
            const float *e = kept + 5 * lanes * (t - begin), *g = e + lanes, *h = g + lanes;
            const float *sg = h + lanes, *sh = sg + lanes;
            fetch(kind, lanes, w->key_gradient, row + AHEAD * w->channels);
            fetch(kind, lanes, w->value_gradient, row + AHEAD * w->channels);
            EACH_LANE {
                float v = loadf(kind, w->value, row + c) - centre[c];
                float all_g = pg[c] + sg[c], all_h = ph[c] + sh[c];
                storef(kind, w->value_gradient, row + c, e[c] * all_g);
                storef(kind, w->key_gradient, row + c, e[c] * (v * all_g + all_h));
                by_bonus[c] += e[c] * (v * g[c] + h[c]);
                by_decay[c] -= e[c] * (v * pgd[c] + phd[c]);
                advance(pg + c, ph + c, pgd + c, phd + c, rate[c], g[c], h[c]);
            }
        }
        EACH_LANE {
            sum_decay[c] += by_decay[c];
            sum_bonus[c] += (double)own[c] * by_bonus[c];
        }
    }
    EACH_LANE {
        w->decay_gradient[b * w->channels + c0 + c] = sum_decay[c];
        w->bonus_gradient[b * w->channels + c0 + c] = sum_bonus[c];
    }
}

/* ----------------------------------------------------------------------------------------------- ranged form */

#define NOTHING -1e300 /* exponent of an empty sum: finite, so that differences of two are no NaN */

INLINE double larger(double a, double b) { return a > b ? a : b; }

/* Writes the output; or, for the backward pass, outputs in double and denominators e^exponent bottom. */
INLINE void forward_ranged(int kind, int lanes, const Work *w, int64_t at, int c0, double *room, double *outputs,
                           double *exponents, double *bottoms) {
    double p[MAX_LANES], a[MAX_LANES], d[MAX_LANES];
    const double *decay = w->decay + c0, *bonus = w->bonus + c0;
    EACH_LANE p[c] = NOTHING, a[c] = d[c] = 0;
    for (int64_t t = w->tokens - 1; t >= 0; t--) {
        double *kept = room + 3 * lanes * t;
        const int64_t row = at + t * w->channels;
        EACH_LANE {
            double k = load(kind, w->key, row + c), v = load(kind, w->value, row + c);
            double older = p[c] - decay[c], top = larger(older, k);
            double fade = exp_negative(older - top), e = exp_negative(k - top);
            kept[c] = p[c];
            kept[lanes + c] = a[c];
            kept[2 * lanes + c] = d[c];
            p[c] = top;
            a[c] = a[c] * fade + e * v;
            d[c] = d[c] * fade + e;
        }
    }
    EACH_LANE p[c] = NOTHING, a[c] = d[c] = 0;
    for (int64_t t = 0; t < w->tokens; t++) {
        const double *kept = room + 3 * lanes * t;
        const int64_t row = at + t * w->channels;
        EACH_LANE {
            double k = load(kind, w->key, row + c), v = load(kind, w->value, row + c);
            double q = larger(larger(p[c], kept[c]), k + bonus[c]);
            double past = exp_negative(p[c] - q), future = exp_negative(kept[c] - q);
            double own = exp_negative(k + bonus[c] - q);
            double bottom = past * d[c] + future * kept[2 * lanes + c] + own;
            double y = (past * a[c] + future * kept[lanes + c] + own * v) / bottom;
            if (outputs) {
                outputs[lanes * t + c] = y;
                exponents[lanes * t + c] = q;
                bottoms[lanes * t + c] = bottom;
            } else {
                store(kind, w->output, row + c, y);
            }
            double older = p[c] - decay[c], top = larger(older, k);
            double fade = exp_negative(older - top), e = exp_negative(k - top);
            p[c] = top;
            a[c] = a[c] * fade + e * v;
            d[c] = d[c] * fade + e;
        }
    }
}

INLINE void backward_ranged(int kind, int lanes, const Work *w, int64_t b, int64_t at, int c0, double *room) {
    double p[MAX_LANES], g[MAX_LANES], h[MAX_LANES], gd[MAX_LANES], hd[MAX_LANES];
    double sum_decay[MAX_LANES] = {0}, sum_bonus[MAX_LANES] = {0};
    const double *decay = w->decay + c0, *bonus = w->bonus + c0;
    const int64_t size = lanes * w->tokens;
    double *outputs = room, *exponents = outputs + size, *bottoms = exponents + size, *states = bottoms + size;
    forward_ranged(kind, lanes, w, at, c0, states, outputs, exponents, bottoms);
    for (int direction = 0; direction < 2; direction++) {
        EACH_LANE p[c] = NOTHING, g[c] = h[c] = gd[c] = hd[c] = 0;
        for (int64_t step = 0; step < w->tokens; step++) {
            const int64_t t = direction == 0 ? w->tokens - 1 - step : step;
            double *kept = states + 3 * lanes * t;
            const int64_t row = at + t * w->channels;
            EACH_LANE {
                double k = load(kind, w->key, row + c), v = load(kind, w->value, row + c), q = exponents[lanes * t + c];
                double new_g = load(kind, w->above, row + c) / bottoms[lanes * t + c];
                double new_h = -new_g * outputs[lanes * t + c];
                /* No weight exceeds its denominator, so this exponent is at most 0. */
                double e = exp_negative(k + p[c]);
                sum_decay[c] -= e * (v * gd[c] + hd[c]);
                if (direction == 0) {
                    kept[c] = p[c];
                    kept[lanes + c] = g[c];
                    kept[2 * lanes + c] = h[c];
                } else {
                    double future = exp_negative(k + kept[c]), own = exp_negative(k + bonus[c] - q);
                    double all_g = e * g[c] + future * kept[lanes + c] + own * new_g;
                    double all_h = e * h[c] + future * kept[2 * lanes + c] + own * new_h;
                    store(kind, w->value_gradient, row + c, all_g);
                    store(kind, w->key_gradient, row + c, v * all_g + all_h);
                    sum_bonus[c] += own * (v * new_g + new_h);
                }
                double older = p[c] - decay[c], top = larger(older, -q);
                double fade = exp_negative(older - top), fresh = exp_negative(-q - top);
                p[c] = top;
                gd[c] = (gd[c] + g[c]) * fade;
                hd[c] = (hd[c] + h[c]) * fade;
                g[c] = g[c] * fade + fresh * new_g;
                h[c] = h[c] * fade + fresh * new_h;
            }
        }
    }
    EACH_LANE {
        w->decay_gradient[b * w->channels + c0 + c] = sum_decay[c];
        w->bonus_gradient[b * w->channels + c0 + c] = sum_bonus[c];
    }
}

/* ---------------------------------------------------------------------------------------------------- blocks */

INLINE int is_plain(int kind, const Work *w, int c0, int lanes) {
    if (kind == DOUBLE) return 0;
    for (int c = c0; c < c0 + lanes; c++)
        if (!(fabs(w->decay[c]) * (double)w->tokens <= PLAIN_RANGE && fabs(w->bonus[c]) <= PLAIN_RANGE)) return 0;
    return 1;
}

INLINE void forward_block(int kind, int lanes, const Work *w, int64_t at, int c0, void *room) {
    if (is_plain(kind, w, c0, lanes)) output_plain(kind, lanes, w, at, c0, room);
    else forward_ranged(kind, lanes, w, at, c0, room, 0, 0, 0);
}

INLINE void backward_block(int kind, int lanes, const Work *w, int64_t b, int64_t at, int c0, void *room) {
    if (is_plain(kind, w, c0, lanes)) backward_plain(kind, lanes, w, b, at, c0, room);
    else backward_ranged(kind, lanes, w, b, at, c0, room);
}

/* A known element type and a known width let the compiler unroll; the last block of a row may be narrower. */
__attribute__((noinline)) static void forward_float(int lanes, const Work *w, int64_t at, int c0, void *room) {
    if (lanes == MAX_LANES) forward_block(FLOAT, MAX_LANES, w, at, c0, room);
    else forward_block(FLOAT, lanes, w, at, c0, room);
}
__attribute__((noinline)) static void forward_bfloat16(int lanes, const Work *w, int64_t at, int c0, void *room) {
    if (lanes == MAX_LANES) forward_block(BFLOAT16, MAX_LANES, w, at, c0, room);
    else forward_block(BFLOAT16, lanes, w, at, c0, room);
}
__attribute__((noinline)) static void forward_double(int lanes, const Work *w, int64_t at, int c0, void *room) {
    forward_block(DOUBLE, lanes, w, at, c0, room);
}
__attribute__((noinline)) static void backward_float(int lanes, const Work *w, int64_t b, int64_t at, int c0, void *room) {
    if (lanes == MAX_LANES) backward_block(FLOAT, MAX_LANES, w, b, at, c0, room);
    else backward_block(FLOAT, lanes, w, b, at, c0, room);
}
__attribute__((noinline)) static void backward_bfloat16(int lanes, const Work *w, int64_t b, int64_t at, int c0, void *room) {
    if (lanes == MAX_LANES) backward_block(BFLOAT16, MAX_LANES, w, b, at, c0, room);
    else backward_block(BFLOAT16, lanes, w, b, at, c0, room);
}
__attribute__((noinline)) static void backward_double(int lanes, const Work *w, int64_t b, int64_t at, int c0, void *room) {
    backward_block(DOUBLE, lanes, w, b, at, c0, room);
}

static int run(int kind, int64_t batch, const Work *w, int threads, int backward) {
    int lanes = MAX_LANES;
    while (lanes > 32 && batch * ((w->channels + lanes - 1) / lanes) < threads) lanes /= 2;
    const int64_t per_item = (w->channels + lanes - 1) / lanes, blocks = batch * per_item;
    const int64_t forward_rows = 2 * (w->tokens / FORWARD_CHUNK + 1) + 3 * FORWARD_CHUNK;
    const int64_t backward_rows = 4 * (w->tokens / BACKWARD_CHUNK + 1) + 5 * BACKWARD_CHUNK;
    const int64_t rows = !backward ? forward_rows
                                   : 2 * w->tokens + (forward_rows > backward_rows ? forward_rows : backward_rows);
    const size_t plain = (size_t)lanes * sizeof(float) * (size_t)rows;
    size_t ranged = 0;
    for (int c = 0; c < w->channels; c += lanes)
        if (!is_plain(kind, w, c, c + lanes < w->channels ? lanes : (int)w->channels - c))
            ranged = (size_t)lanes * sizeof(double) * (backward ? 6 : 3) * (size_t)w->tokens;
    const size_t size = plain > ranged ? plain : ranged;
    int failed = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1 && blocks > 1)
#endif
    {
        void *room = malloc(size);
        if (!room) {
#ifdef _OPENMP
#pragma omp atomic write
#endif
            failed = 1;
        }
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
        for (int64_t block = 0; block < blocks; block++) {
            if (!room) continue;
            const int64_t b = block / per_item, c0 = block % per_item * lanes;
            const int64_t at = b * w->tokens * w->channels + c0;
            const int width = c0 + lanes < w->channels ? lanes : (int)(w->channels - c0);
            if (backward) {
                if (kind == FLOAT) backward_float(width, w, b, at, (int)c0, room);
                else if (kind == BFLOAT16) backward_bfloat16(width, w, b, at, (int)c0, room);
                else backward_double(width, w, b, at, (int)c0, room);
            } else {
                if (kind == FLOAT) forward_float(width, w, at, (int)c0, room);
                else if (kind == BFLOAT16) forward_bfloat16(width, w, at, (int)c0, room);
                else forward_double(width, w, at, (int)c0, room);
            }
        }
        free(room);
    }
    return failed;
}

/* Both return 0, or 1 when there was no memory for the states. */
int bi_wkv_forward(int kind, int64_t batch, int64_t tokens, int64_t channels, const double *decay, const double *bonus,
                   const void *key, const void *value, void *output, int threads) {
    Work w = {tokens, channels, key, value, decay, bonus, output, 0, 0, 0, 0, 0};
    return run(kind, batch, &w, threads, 0);
}

int bi_wkv_backward(int kind, int64_t batch, int64_t tokens, int64_t channels, const double *decay, const double *bonus,
                    const void *key, const void *value, const void *above, void *key_gradient, void *value_gradient,
                    double *decay_gradient, double *bonus_gradient, int threads) {
    Work w = {tokens, channels,     key,            value,          decay,         bonus,
              0,      above,        key_gradient,   value_gradient, decay_gradient, bonus_gradient};
    return run(kind, batch, &w, threads, 1);
}
