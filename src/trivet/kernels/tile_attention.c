/* Attention within rows of 16-bit numbers by AMX: the counterpart of native.c's, with its arguments.
 *
 * Queries are taken in blocks of DEPTH. Scores are float32; weights, and the gradients of scores, are rounded to 16 bits for
 * the products with values, keys and queries. What a segment of queries gives to the gradients of keys and values is one
 * product, transposed: (width x queries) (queries x keys).
 */

#include "tiles.h"
#ifdef HAS_TILES
#include "rows.h"

/* Queries whose weights are kept until their part of the gradients of keys and values is found. */
enum { SEGMENT = 128 };

/* c (DEPTH x DEPTH) = the sum of `terms` products of two tiles of a, `down` apart, with two of b, `right` apart; or +=. */
static inline void multiply(float *c, int64_t ldc, int more, const bf16 *a, int64_t lda, int64_t down, int64_t next_a,
                            const bf16 *b, int64_t right, int64_t next_b, int64_t terms) {
    float *low = c + TILE * ldc;
    if (more) {
        _tile_loadd(0, c, ldc * 4);
        _tile_loadd(1, c + TILE, ldc * 4);
        _tile_loadd(2, low, ldc * 4);
        _tile_loadd(3, low + TILE, ldc * 4);
    } else {
        zero_sums();
    }
    for (int64_t t = 0; t < terms; t++, a += next_a, b += next_b) {
        _tile_loadd(4, a, lda * 2);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + right, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + down, lda * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + TILE, ldc * 4);
    _tile_stored(2, low, ldc * 4);
    _tile_stored(3, low + TILE, ldc * 4);
}

/* A thread's memory, in pieces that are whole cache lines. */
static inline void *carve(char **scratch, int64_t bytes) {
    void *found = *scratch;
    *scratch += rounded_to(bytes, 64);
    return found;
}

static void take(tensor x, int64_t batch, int64_t head, int64_t token, int64_t count, int64_t width, bf16 *y) {
    const bf16 *from = (const bf16 *)x.data + at(x, batch, head, token);
    for (int64_t i = 0; i < count; i++) memcpy(y + i * width, from + i * x.strides[2], width * sizeof(bf16));
}

/* The keys that a row sees, 0 behind them up to `keys`. */
static void take_keys(layout s, span row, int64_t head, tensor x, bf16 *y, int64_t keys) {
    int64_t seen = row.before + row.own;
    take(x, row.batch, head, 0, row.before, s.width, y);
    take(x, row.batch, head, row.first, row.own, s.width, y + row.before * s.width);
    memset(y + seen * s.width, 0, (keys - seen) * s.width * sizeof(bf16));
}

/* DEPTH tokens of one head, 0 behind `count`. */
static void take_block(layout s, span row, int64_t head, tensor x, int64_t i, int64_t count, bf16 *y) {
    take(x, row.batch, head, row.first + i, count, s.width, y);
    memset(y + count * s.width, 0, (DEPTH - count) * s.width * sizeof(bf16));
}

static void give(tensor x, int64_t batch, int64_t head, int64_t token, int64_t count, int64_t width, float scale,
                 const float *y, int64_t ldy) {
    bf16 *to = (bf16 *)x.data + at(x, batch, head, token);
    for (int64_t i = 0; i < count; i++, y += ldy, to += x.strides[2])
        for (int64_t j = 0; j < width; j += DEPTH) {
            __m512 factor = _mm512_set1_ps(scale);
            __m512 first = _mm512_mul_ps(_mm512_loadu_ps(y + j), factor);
            __m512 second = _mm512_mul_ps(_mm512_loadu_ps(y + j + TILE), factor);
            __m512bh pair = _mm512_cvtne2ps_pbh(second, first);
            memcpy(to + j, &pair, 64);
        }
}

/* For products with xT: tiles by (keys, width). */
static void pack_turned(const bf16 *x, int64_t keys, int64_t width, bf16 *to) {
    for (int64_t key = 0; key < keys; key += TILE)
        for (int64_t j = 0; j < width; j += DEPTH, to += PACKED) transpose(x + key * width + j, width * 2, to, 64);
}

/* A block's transpose, for products from the left: tiles by width. */
static void turn_block(const bf16 *x, int64_t width, bf16 *to) {
    bf16 packed[2 * PACKED] ALIGNED;
    for (int64_t j = 0; j < width; j += DEPTH, to += 2 * PACKED) {
        pack_rows(x + j, in_rows(width), DEPTH, DEPTH, packed, 2);
        transpose(packed, 64, to, 64);
        transpose(packed + PACKED, 64, to + PACKED, 64);
    }
}

/* `keys` columns of a block, packed: tiles by keys. */
static void pack_block(const float *x, int64_t ldx, int64_t keys, bf16 *to) {
    for (int64_t row = 0; row < DEPTH; row += 2)
        for (int64_t j = 0; j < keys; j += TILE) {
            const float *from = x + row * ldx + j;
            __m512bh two = _mm512_cvtne2ps_pbh(_mm512_load_ps(from + ldx), _mm512_load_ps(from));
            __m512i both;
            memcpy(&both, &two, 64);
            __m512i second = _mm512_castsi256_si512(_mm512_extracti64x4_epi64(both, 1));
            _mm512_store_si512(to + j / TILE * PACKED + row / 2 * DEPTH, paired(both, second, 0));
        }
}

/* A block's rows in 16 bits. */
static void round_block(const float *x, int64_t ldx, int64_t keys, bf16 *to) {
    for (int64_t row = 0; row < DEPTH; row++)
        for (int64_t j = 0; j < keys; j += DEPTH) {
            const float *from = x + row * ldx + j;
            __m512bh two = _mm512_cvtne2ps_pbh(_mm512_load_ps(from + TILE), _mm512_load_ps(from));
            memcpy(to + row * ldx + j, &two, 64);
        }
}

/* A block's products (DEPTH x end) with packed keys or values. */
static void score(layout s, const bf16 *block, const bf16 *turned, int64_t end, float *to, int64_t keys) {
    int64_t deep = s.width / DEPTH;
    for (int64_t key = 0; key < end; key += DEPTH, turned += 2 * deep * PACKED)
        multiply(to + key, keys, 0, block, s.width, TILE * s.width, DEPTH, turned, deep * PACKED, PACKED, deep);
}

/* (DEPTH x width) = a block's weights of keys, times these keys' values. */
static void gather(layout s, const bf16 *weights, int64_t keys, int64_t end, const bf16 *packed, float *to) {
    for (int64_t j = 0; j < s.width; j += DEPTH)
        multiply(to + j, s.width, 0, weights, keys, TILE * keys, DEPTH, packed + j / TILE * PACKED, PACKED,
                 s.width / TILE * PACKED, end / DEPTH);
}

/* softmax of scale times the first `visible` scores of a query, in their place; 0 behind them up to `end`, whole tiles. */
static inline void soften(float *scores, int64_t visible, int64_t end, float scale) {
    int64_t whole = visible / TILE * TILE;
    __mmask16 rest = (__mmask16)((1u << (visible - whole)) - 1);
    __m512 factor = _mm512_set1_ps(scale), most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < whole; j += TILE) most = _mm512_max_ps(most, _mm512_mul_ps(_mm512_load_ps(scores + j), factor));
    if (rest) most = _mm512_mask_max_ps(most, rest, most, _mm512_mul_ps(_mm512_load_ps(scores + whole), factor));
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t j = 0; j < whole; j += TILE) {
        __m512 e = powers(_mm512_fmsub_ps(_mm512_load_ps(scores + j), factor, most));
        _mm512_store_ps(scores + j, e);
        sum = _mm512_add_ps(sum, e);
    }
    if (rest) {
        __m512 e = _mm512_maskz_mov_ps(rest, powers(_mm512_fmsub_ps(_mm512_load_ps(scores + whole), factor, most)));
        _mm512_store_ps(scores + whole, e);
        sum = _mm512_add_ps(sum, e);
    }
    __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
    int64_t j = 0;
    for (; j < visible; j += TILE) _mm512_store_ps(scores + j, _mm512_mul_ps(_mm512_load_ps(scores + j), share));
    for (; j < end; j += TILE) _mm512_store_ps(scores + j, _mm512_setzero_ps());
}

/* The weights p of `count` queries from place i of the row on, 0 where nothing is seen; before dropout. Returns how many
 * keys are written, whole tiles. */
static int64_t weights_of(layout s, span row, int64_t i, int64_t count, const bf16 *block, const bf16 *key_turned,
                          int64_t keys, float *p) {
    int64_t causal = row.own > 0, end = rounded_to(row.before + (causal ? i + count : 0), DEPTH);
    score(s, block, key_turned, end, p, keys);
    for (int64_t r = 0; r < count; r++) soften(p + r * keys, row.before + (causal ? i + r + 1 : 0), end, s.scale);
    for (int64_t r = count; r < DEPTH; r++) memset(p + r * keys, 0, end * sizeof(float));
    return end;
}

static void attend(layout s, span row, int64_t head, tensor q, tensor k, tensor v, tensor out, char *scratch) {
    int64_t keys = rounded_to(row.before + row.own, DEPTH), shared = s.heads / s.key_heads, all = keys * s.width * 2;
    bf16 *lines = carve(&scratch, all), *key_turned = carve(&scratch, all), *values = carve(&scratch, all);
    bf16 *block = carve(&scratch, DEPTH * s.width * 2), *weights = carve(&scratch, DEPTH * keys * 2);
    float *p = carve(&scratch, DEPTH * keys * 4), *y = carve(&scratch, DEPTH * s.width * 4);
    take_keys(s, row, head, k, lines, keys);
    pack_turned(lines, keys, s.width, key_turned);
    take_keys(s, row, head, v, lines, keys);
    pack_rows(lines, in_rows(s.width), keys, s.width, values, s.width / TILE);
    for (int64_t h = head * shared; h < (head + 1) * shared; h++)
        for (int64_t i = 0; i < row.length; i += DEPTH) {
            int64_t count = MIN(DEPTH, row.length - i);
            take_block(s, row, h, q, i, count, block);
            int64_t end = weights_of(s, row, i, count, block, key_turned, keys, p);
            if (s.dropped) drop_weights(s, row.batch, h, row.first + i, p, p, keys, count, end);
            round_block(p, keys, end, weights);
            gather(s, weights, keys, end, values, y);
            give(out, row.batch, h, row.first + i, count, s.width, 1, y, s.width);
        }
}

/* The gradient of `count` keys from place `from` on, of turned (width x keys), into the tensor's rows from `token` on. */
static void give_turned(layout s, tensor x, int64_t batch, int64_t head, int64_t token, int64_t from, int64_t count,
                        float scale, const float *turned, int64_t keys) {
    float lines[TILE][s.width] ALIGNED;
    for (int64_t key = 0; key < count; key += TILE) {
        for (int64_t j = 0; j < s.width; j += TILE)
            if (from + key + TILE <= keys)
                transpose(turned + j * keys + from + key, keys * 4, lines[0] + j, s.width * 4);
            else
                for (int64_t a = 0; a < TILE; a++)
                    for (int64_t b = 0; b < MIN(TILE, count - key); b++)
                        lines[b][j + a] = turned[(j + a) * keys + from + key + b];
        give(x, batch, head, token + key, MIN(TILE, count - key), s.width, scale, lines[0], s.width);
    }
}

static void attend_backward(layout s, span row, int64_t head, tensor g, tensor q, tensor k, tensor v, tensor dq,
                            tensor dk, tensor dv, float *begun, int64_t most_before, char *scratch) {
    int64_t keys = rounded_to(row.before + row.own, DEPTH), shared = s.heads / s.key_heads, all = keys * s.width * 2;
    bf16 *lines = carve(&scratch, all), *key_turned = carve(&scratch, all), *key_packed = carve(&scratch, all);
    bf16 *value_turned = carve(&scratch, all);
    float *in_key = carve(&scratch, 2 * all), *in_value = carve(&scratch, 2 * all); /* (width x keys) */
    bf16 *queries = carve(&scratch, DEPTH * s.width * 2), *grads = carve(&scratch, DEPTH * s.width * 2);
    bf16 *queries_turned = carve(&scratch, SEGMENT * s.width * 2), *grads_turned = carve(&scratch, SEGMENT * s.width * 2);
    bf16 *weights = carve(&scratch, SEGMENT * keys * 2), *slopes = carve(&scratch, SEGMENT * keys * 2);
    bf16 *rounded = carve(&scratch, DEPTH * keys * 2);
    float *p = carve(&scratch, DEPTH * keys * 4), *dp = carve(&scratch, DEPTH * keys * 4);
    float *y = carve(&scratch, DEPTH * s.width * 4);
    int64_t across = keys / TILE, deep = s.width / TILE;
    take_keys(s, row, head, v, lines, keys);
    pack_turned(lines, keys, s.width, value_turned);
    take_keys(s, row, head, k, lines, keys);
    pack_turned(lines, keys, s.width, key_turned);
    pack_rows(lines, in_rows(s.width), keys, s.width, key_packed, deep);
    memset(in_key, 0, 2 * all);
    memset(in_value, 0, 2 * all);
    for (int64_t h = head * shared; h < (head + 1) * shared; h++)
        for (int64_t start = 0; start < row.length; start += SEGMENT) {
            int64_t stop = MIN(row.length, start + SEGMENT), blocks = rounded_to(stop - start, DEPTH) / DEPTH;
            int64_t ends[SEGMENT / DEPTH], end = 0;
            for (int64_t b = 0; b < blocks; b++) {
                int64_t i = start + b * DEPTH, count = MIN(DEPTH, stop - i);
                take_block(s, row, h, q, i, count, queries);
                take_block(s, row, h, g, i, count, grads);
                turn_block(queries, s.width, queries_turned + b * deep * PACKED);
                turn_block(grads, s.width, grads_turned + b * deep * PACKED);
                end = ends[b] = weights_of(s, row, i, count, queries, key_turned, keys, p);
                if (s.dropped) { /* dp's room is free until below */
                    drop_weights(s, row.batch, h, row.first + i, p, dp, keys, count, end);
                    for (int64_t r = count; r < DEPTH; r++) memset(dp + r * keys, 0, end * sizeof(float));
                }
                pack_block(s.dropped ? dp : p, keys, end, weights + b * across * PACKED);
                score(s, grads, value_turned, end, dp, keys);
                if (s.dropped) drop_weights(s, row.batch, h, row.first + i, dp, dp, keys, count, end);
                slope(p, dp, keys, DEPTH, end); /* 0 behind `count`, as p and the gradients are */
                pack_block(dp, keys, end, slopes + b * across * PACKED);
                round_block(dp, keys, end, rounded);
                gather(s, rounded, keys, end, key_packed, y);
                give(dq, row.batch, h, row.first + i, count, s.width, s.scale, y, s.width);
            }
            for (int64_t key = 0; key < end; key += DEPTH) {
                int64_t b = 0;
                while (ends[b] <= key) b++; /* blocks that see none of these keys */
                int64_t tiles = (b * across + key / TILE) * PACKED;
                for (int64_t j = 0; j < s.width; j += DEPTH) {
                    int64_t here = j * keys + key, turned = (b * deep + j / TILE) * PACKED;
                    multiply(in_value + here, keys, 1, grads_turned + turned, DEPTH, PACKED, deep * PACKED,
                             weights + tiles, PACKED, across * PACKED, blocks - b);
                    multiply(in_key + here, keys, 1, queries_turned + turned, DEPTH, PACKED, deep * PACKED,
                             slopes + tiles, PACKED, across * PACKED, blocks - b);
                }
            }
        }
    if (row.own) {
        give_turned(s, dk, row.batch, head, row.first, row.before, row.length, s.scale, in_key, keys);
        give_turned(s, dv, row.batch, head, row.first, row.before, row.length, 1, in_value, keys);
        for (int64_t i = 0; i < row.before; i++)
            for (int64_t j = 0; j < s.width; j++) {
                begun[i * s.width + j] = in_key[j * keys + i] * s.scale;
                begun[(most_before + i) * s.width + j] = in_value[j * keys + i];
            }
    } else { /* no other row sees these keys, and nobody those behind them */
        give_turned(s, dk, row.batch, head, 0, 0, row.before, s.scale, in_key, keys);
        give_turned(s, dv, row.batch, head, 0, 0, row.before, 1, in_value, keys);
        memset(y, 0, s.width * sizeof(float));
        for (int64_t i = row.before; i < s.key_tokens; i++) {
            give(dk, row.batch, head, i, 1, s.width, 1, y, s.width);
            give(dv, row.batch, head, i, 1, s.width, 1, y, s.width);
        }
    }
}

void tile_attention(int type, void *q, const int64_t *q_strides, void *k, const int64_t *k_strides, void *v,
                    const int64_t *v_strides, void *y, const int64_t *y_strides, const span *rows, const int64_t *sizes,
                    char *scratch, float scale, int threads) {
    layout s = laid_out(sizes, scale, DEPTH);
#pragma omp parallel num_threads(threads)
    {
        configuration others;
        _tile_storeconfig(&others);
        configure(TILE, TILE);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.count * s.key_heads; task++)
            attend(s, rows[task / s.key_heads], task % s.key_heads, (tensor){type, q, q_strides},
                   (tensor){type, k, k_strides}, (tensor){type, v, v_strides}, (tensor){type, y, y_strides},
                   scratch + THREAD * s.each * 4);
        _tile_loadconfig(&others);
    }
}

void tile_attention_backward(int type, void *g, const int64_t *g_strides, void *q, const int64_t *q_strides, void *k,
                             const int64_t *k_strides, void *v, const int64_t *v_strides, void *dq,
                             const int64_t *dq_strides, void *dk, const int64_t *dk_strides, void *dv,
                             const int64_t *dv_strides, const span *rows, const int64_t *sizes, float *begun,
                             char *scratch, float scale, int threads) {
    layout s = laid_out(sizes, scale, DEPTH);
#pragma omp parallel num_threads(threads)
    {
        configuration others;
        _tile_storeconfig(&others);
        configure(TILE, TILE);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.count * s.key_heads; task++)
            attend_backward(s, rows[task / s.key_heads], task % s.key_heads, (tensor){type, g, g_strides},
                            (tensor){type, q, q_strides}, (tensor){type, k, k_strides}, (tensor){type, v, v_strides},
                            (tensor){type, dq, dq_strides}, (tensor){type, dk, dk_strides}, (tensor){type, dv, dv_strides},
                            begun + task * 2 * sizes[5] * s.width, sizes[5], scratch + THREAD * s.each * 4);
        _tile_loadconfig(&others);
    }
}
#endif
