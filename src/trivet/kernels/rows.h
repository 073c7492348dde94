/* What both ways of attention within rows share: native.c's in float32 vectors, tile_attention.c's in tiles of 16 bits. */

#ifndef TRIVET_ROWS_H
#define TRIVET_ROWS_H

#include "numbers.h"

/* A tensor (batch, heads, tokens, width) with the strides of all but the last axis, which is in one piece. */
typedef struct {
    int type;
    void *data;
    const int64_t *strides;
} tensor;

static inline int64_t at(tensor x, int64_t batch, int64_t head, int64_t token) {
    return batch * x.strides[0] + head * x.strides[1] + token * x.strides[2];
}

/* A row's `length` queries lie from `first` on. Its keys are the batch's first ones, so many as are `before`, and where it
 * has `own` keys, as many as queries and in their places, a query sees these up to its own, too (causal rows). */
typedef struct {
    int64_t batch, first, length, before, own;
} span;

/* `scratch` has `each` numbers a thread; `keys` and `room` are the most keys and the width, rounded up. What
 * is dropped of the weights, a share of dropped / 2^32, is drawn from the seed and the weight's place. */
typedef struct {
    int64_t count, heads, key_heads, width, keys, room, each, key_tokens, dropped, seed;
    float scale, kept;
} layout;

/* sizes: rows, heads, key heads, width, most keys, most before, numbers of a thread's scratch, tokens that have keys, what
 * is dropped of 2^32, the seed. */
static layout laid_out(const int64_t *sizes, float scale, int64_t columns) {
    return (layout){.count = sizes[0], .heads = sizes[1], .key_heads = sizes[2], .width = sizes[3],
                    .keys = rounded_to(sizes[4], columns), .room = rounded_to(sizes[3], columns), .each = sizes[6],
                    .key_tokens = sizes[7], .dropped = sizes[8], .seed = sizes[9], .scale = scale,
                    .kept = (float)(1.0 / (1.0 - sizes[8] / 4294967296.0))};
}

/* The gradients of scores, in the place of those of `count` queries' weights. */
static void slope(const float *weights, float *grads, int64_t room, int64_t count, int64_t keys) {
    for (int64_t i = 0; i < count; i++, weights += room, grads += room) {
        float mean = 0;
#pragma omp simd reduction(+ : mean)
        for (int64_t j = 0; j < keys; j++) mean += weights[j] * grads[j];
        for (int64_t j = 0; j < keys; j++) grads[j] = weights[j] * (grads[j] - mean);
    }
}

/* Dropout of `count` queries' weights. */
static void drop_weights(layout s, int64_t batch, int64_t head, int64_t query, const float *x, float *y, int64_t room,
                         int64_t count, int64_t keys) {
    for (int64_t i = 0; i < count; i++, x += room, y += room) {
        uint32_t here = mixed((uint32_t)(query + i) ^ mixed((uint32_t)(batch * s.heads + head)));
        drop(begun_at(s.seed, here), s.dropped, s.kept, x, y, keys);
    }
}

#endif
