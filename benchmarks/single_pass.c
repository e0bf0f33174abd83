/* The yardstick of optimizer and average: a plain loop over the same arrays that reads five and writes four, 36 bytes
 * for each element, and computes next to nothing. */
#include <stdint.h>

#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif

/* Addresses: all weights, all gradients, all first moments, all second moments, all averages. A scale of 0, which the
 * compiler does not know of, leaves everything as it is. */
void single_pass(int64_t count, const int64_t *sizes, const int64_t *addresses, float scale, int threads) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
    for (int64_t k = 0; k < count; k++) {
        float *weight = (float *)(uintptr_t)addresses[k];
        const float *gradient = (const float *)(uintptr_t)addresses[count + k];
        float *moment = (float *)(uintptr_t)addresses[2 * count + k];
        float *square = (float *)(uintptr_t)addresses[3 * count + k];
        float *average = (float *)(uintptr_t)addresses[4 * count + k];
#ifdef _OPENMP
#pragma omp for simd schedule(static) nowait
#endif
        for (int64_t i = 0; i < sizes[k]; i++) {
            const float change = scale * gradient[i];
            weight[i] += change;
            moment[i] += change;
            square[i] += change;
            average[i] += change;
        }
    }
}
