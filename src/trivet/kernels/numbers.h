/* What the C functions for CPUs share: numbers of 16 bits, e^x, logits, and what dropout drops. */

#ifndef TRIVET_NUMBERS_H
#define TRIVET_NUMBERS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#define THREADS omp_get_num_threads()
#else
#define THREAD 0
#define THREADS 1
#endif

enum { FLOAT32, BFLOAT16 };
enum { PIECE = 1024, VECTOR = 16 };
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

static inline int64_t rounded_to(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static inline float wide(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

/* Rounded to the nearest, to even in between; NaN stays NaN. */
static inline uint16_t narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

/* n numbers from place i on as float32: where they are, or in `piece`. */
static inline const float *read(int type, const void *x, int64_t i, int64_t n, float *restrict piece) {
    if (type == FLOAT32) return (const float *)x + i;
    const uint16_t *restrict from = (const uint16_t *)x + i;
    for (int64_t j = 0; j < n; j++) piece[j] = wide(from[j]);
    return piece;
}

/* Where n results for place i on are to be put: in their place, or in `piece`, from where `put` takes them. */
static inline float *place(int type, void *y, int64_t i, float *restrict piece) {
    return type == FLOAT32 ? (float *)y + i : piece;
}

static inline void put(int type, void *y, int64_t i, int64_t n, const float *restrict piece) {
    if (type == FLOAT32) return;
    uint16_t *restrict to = (uint16_t *)y + i;
    int64_t j = 0;
#ifdef __AVX512BF16__ /* compilers don't find this instruction by themselves */
    for (; j + 16 <= n; j += 16) {
        __m256bh sixteen = _mm512_cvtneps_pbh(_mm512_loadu_ps(piece + j));
        memcpy(to + j, &sixteen, 32);
    }
#endif
    for (; j < n; j++) to[j] = narrow(piece[j]);
}

/* e^x within 2 units in the last place, of x up to 80: 0 below -88, NaN of NaN. Cody and Waite's reduction by log 2,
 * without a branch, so that compilers make vectors of it. */
static inline float power(float x) {
    x = -88.0f > x ? -88.0f : x;
    x = 80.0f < x ? 80.0f : x;
    float n = rintf(x * 1.44269504f);
    float f = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

/* 1 / d, by Newton's method from a guess in whole numbers: processors divide slowly. */
static inline float reciprocal(float d) {
    uint32_t bits;
    memcpy(&bits, &d, 4);
    bits = 0x7ef311c3 - bits;
    float y;
    memcpy(&y, &bits, 4);
    y *= 2.0f - d * y;
    y *= 2.0f - d * y;
    return y + y * (1.0f - d * y);
}

static inline float sigmoid(float x) { return reciprocal(1.0f + power(-x)); }

/* y = SiLU(gate) up. */
static inline void opened(const float *restrict gate, const float *restrict up, float *restrict y, int64_t n) {
    for (int64_t j = 0; j < n; j++) y[j] = gate[j] * up[j] * sigmoid(gate[j]);
}

/* The gradients of both, of y's; and y. */
static inline void opened_backward(const float *restrict grad, const float *restrict gate, const float *restrict up,
                                   float *restrict in_gate, float *restrict in_up, float *restrict y, int64_t n) {
    for (int64_t j = 0; j < n; j++) {
        float share = sigmoid(gate[j]), open = gate[j] * share;
        in_gate[j] = grad[j] * up[j] * share * (1.0f + gate[j] * (1.0f - share));
        in_up[j] = grad[j] * open;
        y[j] = up[j] * open;
    }
}

/* The largest of n numbers and `most`, NaN if one is: as whole numbers in their order, which compilers make vectors of. */
static inline float largest(const float *x, int64_t n, float most) {
    int32_t found, bits;
    memcpy(&found, &most, 4);
    found ^= (found >> 31) & 0x7fffffff;
    for (int64_t j = 0; j < n; j++) {
        memcpy(&bits, x + j, 4);
        bits ^= (bits >> 31) & 0x7fffffff;
        found = MAX(bits, found);
    }
    found ^= (found >> 31) & 0x7fffffff;
    memcpy(&most, &found, 4);
    return most;
}

/* A logit: cap tanh(scale * product / cap), without cap where it is 0. */
static inline float logit(float product, float scale, float cap) {
    product *= scale;
    return cap == 0 ? product : cap * (2.0f / (1.0f + power(-2.0f * product / cap)) - 1.0f);
}

static inline uint32_t mixed(uint32_t x) { /* MurmurHash3's last step */
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

/* What the numbers at one place begin their hashes with. */
static inline uint32_t begun_at(int64_t seed, uint32_t place) {
    return (uint32_t)seed ^ mixed((uint32_t)(seed >> 32) ^ place);
}

/* y = x times `kept`, or 0 for a share of dropped / 2^32. */
static inline void drop(uint32_t start, int64_t dropped, float kept, const float *x, float *y, int64_t n) {
    uint32_t limit = (uint32_t)dropped;
    for (int64_t j = 0; j < n; j++) y[j] = mixed(start + (uint32_t)j * 0x9e3779b9u) >= limit ? x[j] * kept : 0.0f;
}


#endif
