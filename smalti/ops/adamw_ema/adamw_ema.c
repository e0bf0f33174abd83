/* AdamW and the moving average of the weights in one pass: reads weight, gradient, both moments and average, writes all
 * but the gradient, 36 bytes for each parameter. The two calls that it replaces move 28 and 12.
 *
 * The arithmetic is that of PyTorch's fused AdamW for CPUs and of its lerp, rounding by rounding: the same bits on
 * processors with AVX2 (torch 2.13). Hence every fused multiply-add is written out and no other is allowed. Elements
 * do not depend on each other, so the number of threads changes no bit.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

/* On processors that have them, whole vectors: compilers take half ones for fear of lower clocks. */
#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#define INLINE static inline __attribute__((always_inline))
#define CHUNK 32768 /* elements of a piece of work; a multiple of TAIL */
#define ALONE 65536 /* elements that one thread finishes before others have started */
/* PyTorch works in vectors of this many floats, and rounds what is left over at the end of a tensor otherwise. */
#define TAIL 8

/* Where the processor has no such instruction, the one of the library takes longer than all the rest. */
#ifdef __FP_FAST_FMAF
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

/* What all elements of a tensor share. A step from `own` towards `other` by a weight of at least a half is taken
 * backwards, from `other`, as lerp does. */
typedef struct {
    int64_t first_chunk;
    float keep, rate, root, epsilon, second, second_fresh, first, first_forward, average, average_forward;
} Task;

typedef struct {
    float *weight;
    const float *gradient;
    float *moment, *square, *average;
} Arrays;

INLINE float towards(float own, float other, float weight, float forward) {
    return MULTIPLY_ADD(weight, other - own, forward != 0 ? own : other);
}

/* Five rows at once, with roots and divisions between them, are more than a processor fetches ahead by itself. */
#define AHEAD 512
#define BLOCK 64
INLINE void fetch(Arrays a, int64_t at) {
    const uintptr_t rows[] = {(uintptr_t)a.weight, (uintptr_t)a.gradient, (uintptr_t)a.moment, (uintptr_t)a.square,
                              (uintptr_t)a.average};
    for (int k = 0; k < 5; k++)
        for (int64_t line = 0; line < BLOCK * 4; line += 64)
            __builtin_prefetch((const void *)(rows[k] + (uintptr_t)(at * 4 + line)), k != 1, 3);
}

INLINE void update(int tail, const Task *task, Arrays a, int64_t begin, int64_t end) {
    const Task t = *task;
    for (int64_t block = begin; block < end; block += BLOCK) {
        const int64_t stop = block + BLOCK < end ? block + BLOCK : end;
        fetch(a, block + AHEAD);
#pragma omp simd
        for (int64_t i = block; i < stop; i++) {
            float g = a.gradient[i], weight = a.weight[i] * t.keep;
            float moment = towards(a.moment[i], g, t.first, t.first_forward);
            float scaled = t.second_fresh * g, square = a.square[i];
            square = tail ? MULTIPLY_ADD(square, t.second, scaled * g) : MULTIPLY_ADD(scaled, g, square * t.second);
            weight = weight + t.rate * moment / (sqrtf(square) / t.root + t.epsilon);
            a.average[i] = towards(a.average[i], weight, t.average, t.average_forward);
            a.weight[i] = weight;
            a.moment[i] = moment;
            a.square[i] = square;
        }
    }
}

/* Which tensor a chunk belongs to: the last one that starts no later. Empty tensors have no chunk. */
INLINE int64_t owner(const Task *tasks, int64_t count, int64_t chunk) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (tasks[middle].first_chunk <= chunk) low = middle;
        else high = middle;
    }
    return low;
}

/* One step of `count` tensors of one group. Addresses: all weights, then all gradients, first moments, second moments,
 * averages, and counters of steps, which are counted up here. Returns 0, or 1 when there was no memory, with nothing
 * changed. */
int adamw_ema(int64_t count, const int64_t *sizes, const int64_t *addresses, double rate, double beta1, double beta2,
              double epsilon, double weight_decay, double average, int threads) {
    Task *tasks = malloc((size_t)count * sizeof(Task));
    if (!tasks) return 1;
    int64_t chunks = 0, elements = 0;
    for (int64_t i = 0; i < count; i++) {
        float *step = (float *)(uintptr_t)addresses[5 * count + i];
        *step += 1;
        const float first = (float)(1 - beta1), blend = (float)average;
        const int first_forward = fabsf(first) < 0.5f, forward = fabsf(blend) < 0.5f;
        tasks[i] = (Task){
            .first_chunk = chunks,
            .keep = (float)(1 - rate * weight_decay),
            .rate = (float)-(rate / (1 - pow(beta1, *step))),
            .root = (float)sqrt(1 - pow(beta2, *step)),
            .epsilon = (float)epsilon,
            .second = (float)beta2,
            .second_fresh = (float)(1 - beta2),
            .first = first_forward ? first : first - 1,
            .first_forward = (float)first_forward,
            .average = forward ? blend : blend - 1,
            .average_forward = (float)forward,
        };
        chunks += (sizes[i] + CHUNK - 1) / CHUNK;
        elements += sizes[i];
    }
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && elements > ALONE)
#endif
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t i = owner(tasks, count, chunk), size = sizes[i], whole = size - size % TAIL;
        const int64_t begin = (chunk - tasks[i].first_chunk) * CHUNK;
        const int64_t end = begin + CHUNK < size ? begin + CHUNK : size;
        const int64_t *at = addresses + i;
        const Arrays arrays = {
            (float *)(uintptr_t)at[0],         (const float *)(uintptr_t)at[count], (float *)(uintptr_t)at[2 * count],
            (float *)(uintptr_t)at[3 * count], (float *)(uintptr_t)at[4 * count],
        };
        update(0, tasks + i, arrays, begin, end < whole ? end : whole);
        if (end > whole) update(1, tasks + i, arrays, whole, end);
    }
    free(tasks);
    return 0;
}
