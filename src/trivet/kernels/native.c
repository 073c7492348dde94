/* The CPU's counterpart of fused.py: norms, activations, rotary positions, softmax, dropout and cross-entropy, each
 * in one pass over memory; and attention within rows. Numbers are float32 or bfloat16 in memory and float32 in between.
 * `native.py` says what each function computes.
 *
 * Rows are read in pieces of PIECE numbers that stay in the first cache, so that one code serves both types. NaN and
 * infinities go through as in torch: the flags that compiled.py sets leave them alone.
 */

#include "rows.h"

/* -- RMS norm ------------------------------------------------------------------------------------------------- */

void rms_norm(int type, const void *x, const void *weight, void *y, float *inverse, int64_t rows, int64_t width,
              float eps, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        float a[PIECE], b[PIECE], c[PIECE];
        double sum = 0;
        for (int64_t i = 0; i < width; i += PIECE) {
            int64_t n = MIN(PIECE, width - i);
            const float *restrict v = read(type, x, row * width + i, n, a);
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < n; j++) sum += v[j] * v[j];
        }
        float factor = (float)(1.0 / sqrt(sum / width + eps));
        inverse[row] = factor;
        for (int64_t i = 0; i < width; i += PIECE) {
            int64_t n = MIN(PIECE, width - i), at = row * width + i;
            const float *restrict v = read(type, x, at, n, a), *restrict w = read(type, weight, i, n, b);
            float *restrict out = place(type, y, at, c);
            for (int64_t j = 0; j < n; j++) out[j] = v[j] * factor * w[j];
            put(type, y, at, n, out);
        }
    }
}

/* dx = what `grad` says of x, + `plus`, which may be NULL. */
void rms_norm_backward(int type, const void *grad, const void *x, const void *weight, const float *inverse,
                       const void *plus, void *dx, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        float a[PIECE], b[PIECE], c[PIECE], d[PIECE], e[PIECE], factor = inverse[row];
        double sum = 0;
        for (int64_t i = 0; i < width; i += PIECE) {
            int64_t n = MIN(PIECE, width - i), at = row * width + i;
            const float *restrict g = read(type, grad, at, n, a), *restrict v = read(type, x, at, n, b);
            const float *restrict w = read(type, weight, i, n, c);
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < n; j++) sum += g[j] * w[j] * v[j];
        }
        float along = (float)(sum * factor * factor / width);
        for (int64_t i = 0; i < width; i += PIECE) {
            int64_t n = MIN(PIECE, width - i), at = row * width + i;
            const float *restrict g = read(type, grad, at, n, a), *restrict v = read(type, x, at, n, b);
            const float *restrict w = read(type, weight, i, n, c);
            float *restrict out = place(type, dx, at, d);
            for (int64_t j = 0; j < n; j++) out[j] = (g[j] * w[j] - v[j] * along) * factor;
            const float *restrict more = plus ? read(type, plus, at, n, e) : NULL;
            for (int64_t j = 0; j < n && more; j++) out[j] += more[j];
            put(type, dx, at, n, out);
        }
    }
}

/* -- GELU by tanh, which is x times a sigmoid ------------------------------------------------------------------- */

/* The sigmoid, and its slope times x. */
static inline float gelu_share(float x, float *slope) {
    float from = 1.59576912f * x * (1.0f + 0.044715f * x * x);
    float e = power(from < 0 ? from : -from), r = reciprocal(1.0f + e);
    *slope = 1.59576912f * x * e * r * r * (1.0f + 0.134145f * x * x);
    return from < 0 ? e * r : r;
}

void gelu(int type, const void *x, void *y, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += PIECE) {
        float a[PIECE], b[PIECE], slope;
        int64_t n = MIN(PIECE, count - i);
        const float *restrict v = read(type, x, i, n, a);
        float *restrict out = place(type, y, i, b);
        for (int64_t j = 0; j < n; j++) out[j] = v[j] * gelu_share(v[j], &slope);
        put(type, y, i, n, out);
    }
}

void gelu_backward(int type, const void *grad, const void *x, void *dx, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += PIECE) {
        float a[PIECE], b[PIECE], c[PIECE], slope;
        int64_t n = MIN(PIECE, count - i);
        const float *restrict g = read(type, grad, i, n, a), *restrict v = read(type, x, i, n, b);
        float *restrict out = place(type, dx, i, c);
        for (int64_t j = 0; j < n; j++) {
            float share = gelu_share(v[j], &slope);
            out[j] = g[j] * (share + slope);
        }
        put(type, dx, i, n, out);
    }
}

/* -- SiLU(gate) * up ------------------------------------------------------------------------------------------- */

void silu_gate(int type, const void *gate, const void *up, void *y, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += PIECE) {
        float a[PIECE], b[PIECE], c[PIECE];
        int64_t n = MIN(PIECE, count - i);
        const float *restrict g = read(type, gate, i, n, a), *restrict u = read(type, up, i, n, b);
        float *restrict out = place(type, y, i, c);
        opened(g, u, out, n);
        put(type, y, i, n, out);
    }
}

void silu_gate_backward(int type, const void *grad, const void *gate, const void *up, void *dgate, void *dup,
                        int64_t count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += PIECE) {
        float a[PIECE], b[PIECE], c[PIECE], d[PIECE], e[PIECE], unused[PIECE];
        int64_t n = MIN(PIECE, count - i);
        const float *restrict t = read(type, grad, i, n, a), *restrict g = read(type, gate, i, n, b);
        const float *restrict u = read(type, up, i, n, c);
        float *restrict in_gate = place(type, dgate, i, d), *restrict in_up = place(type, dup, i, e);
        opened_backward(t, g, u, in_gate, in_up, unused, n);
        put(type, dgate, i, n, in_gate);
        put(type, dup, i, n, in_up);
    }
}

/* -- rotary positions ------------------------------------------------------------------------------------------ */

/* from, to: strides by batch, head and place; the last axis is in one piece. sign: -1 turns back. */
void rotate(int type, const void *x, const void *cosine, const void *sine, void *y, int64_t batch, int64_t heads,
            int64_t length, int64_t width, const int64_t *from, const int64_t *to, int64_t each, float sign,
            int threads) {
    int64_t half = width / 2;
#pragma omp parallel for num_threads(threads) collapse(2)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t l = 0; l < length; l++) {
            float ca[PIECE], sa[PIECE], ua[PIECE], va[PIECE], fa[PIECE], ga[PIECE];
            for (int64_t i = 0; i < half; i += PIECE) {
                int64_t n = MIN(PIECE, half - i), angle = b * each + l * width + i;
                const float *restrict c = read(type, cosine, angle, n, ca), *restrict s = read(type, sine, angle, n, sa);
                for (int64_t h = 0; h < heads; h++) {
                    int64_t in = b * from[0] + h * from[1] + l * from[2] + i;
                    int64_t out = b * to[0] + h * to[1] + l * to[2] + i;
                    const float *restrict u = read(type, x, in, n, ua), *restrict v = read(type, x, in + half, n, va);
                    float *restrict first = place(type, y, out, fa), *restrict second = place(type, y, out + half, ga);
                    for (int64_t j = 0; j < n; j++) {
                        first[j] = u[j] * c[j] - v[j] * s[j] * sign;
                        second[j] = v[j] * c[j] + u[j] * s[j] * sign;
                    }
                    put(type, y, out, n, first);
                    put(type, y, out + half, n, second);
                }
            }
        }
}

/* -- softmax --------------------------------------------------------------------------------------------------- */

/* n scores from place i on, in `piece`; from `visible` on minus infinity. */
static inline void seen(const uint16_t *x, int64_t i, int64_t n, int64_t visible, float *restrict piece) {
    read(BFLOAT16, x, i, n, piece);
    for (int64_t j = MAX(visible, 0); j < n; j++) piece[j] = -INFINITY;
}

/* In place, over the first `before + row % queries + 1` of a row's `keys` entries, and 0 behind; over all where queries is
 * 0. Whole vectors are read: what a query does not see is 0 by itself there. */
void softmax(int type, uint16_t *x, int64_t rows, int64_t keys, int64_t queries, int64_t before, int threads) {
    (void)type; /* native.py takes bfloat16 alone: torch's own is as fast in float32 */
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        float a[PIECE], most = -INFINITY, sum = 0;
        int64_t start = row * keys, visible = queries ? MIN(keys, before + row % queries + 1) : keys;
        int64_t end = MIN(keys, (visible + VECTOR - 1) / VECTOR * VECTOR);
        for (int64_t i = 0; i < end; i += PIECE) {
            int64_t n = MIN(PIECE, end - i);
            seen(x, start + i, n, visible - i, a);
            most = largest(a, n, most);
        }
        for (int64_t i = 0; i < end; i += PIECE) {
            int64_t n = MIN(PIECE, end - i);
            if (end > PIECE) seen(x, start + i, n, visible - i, a); /* else it still is what was read */
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < n; j++) {
                a[j] = power(a[j] - most);
                sum += a[j];
            }
        }
        float share = 1.0f / sum;
        for (int64_t i = 0; i < end; i += PIECE) {
            int64_t n = MIN(PIECE, end - i);
            if (end > PIECE) {
                seen(x, start + i, n, visible - i, a);
                for (int64_t j = 0; j < n; j++) a[j] = power(a[j] - most);
            }
            for (int64_t j = 0; j < n; j++) a[j] *= share;
            put(BFLOAT16, x, start + i, n, a);
        }
        memset(x + start + end, 0, (keys - end) * sizeof(uint16_t));
    }
}

/* -- cross-entropy --------------------------------------------------------------------------------------------- */

/* The gradients of logits take the products' place. */
void cross_entropy(int type, void *products, const int64_t *targets, float *losses, uint8_t *right, int64_t rows,
                   int64_t vocabulary, float scale, float cap, float z_loss, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        float a[PIECE], b[PIECE], most = -INFINITY;
        double sum = 0; /* one likely word and thousands of unlikely ones */
        int64_t start = row * vocabulary, target = targets[row];
        for (int64_t i = 0; i < vocabulary; i += PIECE) {
            int64_t n = MIN(PIECE, vocabulary - i);
            const float *restrict v = read(type, products, start + i, n, a);
            float before = most;
            double part = 0;
            if (cap == 0)
                for (int64_t j = 0; j < n; j++) b[j] = v[j] * scale;
            else
                for (int64_t j = 0; j < n; j++) b[j] = logit(v[j], scale, cap);
            most = largest(b, n, most);
            float safe = most == -INFINITY ? 0 : most; /* a piece may hold nothing finite */
#pragma omp simd reduction(+ : part)
            for (int64_t j = 0; j < n; j++) part += power(b[j] - safe);
            sum = sum * power(before - safe) + part;
        }
        if (target < 0 || target >= vocabulary) {
            losses[row] = NAN;
            right[row] = 0;
            continue;
        }
        float one, log_z = most + (float)log(sum);
        float chosen = logit(*read(type, products, start + target, 1, &one), scale, cap);
        losses[row] = log_z - chosen + z_loss * log_z * log_z;
        right[row] = chosen >= most;
        float share = (float)((1.0f + 2.0f * z_loss * log_z) / sum); /* log_z in the power would bring its rounding */
        float squashed = cap == 0 ? 0 : chosen / cap;
        float exact = (power(chosen - most) * share - 1.0f) * scale * (1.0f - squashed * squashed);
        for (int64_t i = 0; i < vocabulary; i += PIECE) {
            int64_t n = MIN(PIECE, vocabulary - i);
            const float *v = read(type, products, start + i, n, a);
            float *out = place(type, products, start + i, b);
            int64_t here = target - i;
            if (cap == 0)
                for (int64_t j = 0; j < n; j++) out[j] = power(v[j] * scale - most) * share * scale;
            else
                for (int64_t j = 0; j < n; j++) {
                    float z = logit(v[j], scale, cap), s = z / cap;
                    out[j] = power(z - most) * share * scale * (1.0f - s * s);
                }
            if (here >= 0 && here < n) out[here] = exact;
            put(type, products, start + i, n, out);
        }
    }
}

/* -- dropout ---------------------------------------------------------------------------------------------------- */

void dropout(int type, const void *x, void *y, int64_t count, int64_t dropped, int64_t seed, float kept, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += PIECE) {
        float a[PIECE], b[PIECE];
        int64_t n = MIN(PIECE, count - i);
        uint64_t piece = (uint64_t)i / PIECE;
        uint32_t here = mixed((uint32_t)piece ^ mixed((uint32_t)(piece >> 32)));
        float *out = place(type, y, i, b);
        drop(begun_at(seed, here), dropped, kept, read(type, x, i, n, a), out, n);
        put(type, y, i, n, out);
    }
}

/* -- attention within rows ------------------------------------------------------------------------------------ */

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
enum { COLUMNS = 2 * LANES, QUERIES = 32 };
typedef float lanes __attribute__((vector_size(LANES * 4)));

static inline lanes load(const float *x) {
    lanes y;
    memcpy(&y, x, sizeof y);
    return y;
}

/* COLUMNS of `rows` rows (4 at most, a constant) of c = a b, or c += a b. */
static inline __attribute__((always_inline)) void tile(const int rows, float *c, int64_t ldc, const float *a,
                                                       int64_t down, int64_t along, const float *b, int64_t ldb,
                                                       int64_t terms, int more) {
    lanes x[4] = {0}, y[4] = {0};
    for (int r = 0; more && r < rows; r++) {
        x[r] = load(c + r * ldc);
        y[r] = load(c + r * ldc + LANES);
    }
    for (int64_t t = 0; t < terms; t++) {
        lanes u = load(b + t * ldb), v = load(b + t * ldb + LANES);
        for (int r = 0; r < rows; r++) {
            float factor = a[r * down + t * along];
            x[r] += factor * u;
            y[r] += factor * v;
        }
    }
    for (int r = 0; r < rows; r++) {
        memcpy(c + r * ldc, x + r, sizeof x[r]);
        memcpy(c + r * ldc + LANES, y + r, sizeof y[r]);
    }
}

/* c (rows x columns) = a b, or += where `more`; a's entries lie `down` and `along` apart. Whole COLUMNS are written. */
static void product(float *c, int64_t ldc, const float *a, int64_t down, int64_t along, const float *b, int64_t ldb,
                    int64_t rows, int64_t columns, int64_t terms, int more) {
    for (int64_t j = 0; j < columns; j += COLUMNS)
        for (int64_t i = 0; i < rows; i += 4) {
            float *to = c + i * ldc + j;
            const float *from = a + i * down;
            switch (rows - i) {
            case 1: tile(1, to, ldc, from, down, along, b + j, ldb, terms, more); break;
            case 2: tile(2, to, ldc, from, down, along, b + j, ldb, terms, more); break;
            case 3: tile(3, to, ldc, from, down, along, b + j, ldb, terms, more); break;
            default: tile(4, to, ldc, from, down, along, b + j, ldb, terms, more);
            }
        }
}

/* `count` tokens of one head, times `factor`, as the rows of y, which are `room` long and 0 behind. */
static void take(tensor x, int64_t batch, int64_t head, int64_t token, int64_t count, int64_t width, float factor,
                 float *y, int64_t room) {
    for (int64_t i = 0; i < count; i++, y += room) {
        const float *v = read(x.type, x.data, at(x, batch, head, token + i), width, y);
        for (int64_t j = 0; j < width; j++) y[j] = v[j] * factor;
        memset(y + width, 0, (room - width) * sizeof(float));
    }
}

static void give(tensor x, int64_t batch, int64_t head, int64_t token, int64_t count, int64_t width, float factor,
                 const float *y, int64_t room) {
    for (int64_t i = 0; i < count; i++, y += room) {
        float piece[PIECE];
        int64_t here = at(x, batch, head, token + i);
        float *to = place(x.type, x.data, here, piece);
        for (int64_t j = 0; j < width; j++) to[j] = y[j] * factor;
        put(x.type, x.data, here, width, to);
    }
}

/* y (width x room) = the transpose of x (count x ldx); 0 behind `count`. */
static void turn(const float *x, int64_t ldx, int64_t count, int64_t width, float *y, int64_t room) {
    for (int64_t i = 0; i < width; i += LANES)
        for (int64_t j = 0; j < count; j += LANES)
            for (int64_t k = i; k < MIN(i + LANES, width); k++)
                for (int64_t l = j; l < MIN(j + LANES, count); l++) y[k * room + l] = x[l * ldx + k];
    for (int64_t k = 0; k < width; k++) memset(y + k * room + count, 0, (room - count) * sizeof(float));
}

static inline float *carve(float **scratch, int64_t count) {
    float *found = *scratch;
    *scratch += count;
    return found;
}

static int64_t rounded(int64_t n) { return rounded_to(n, COLUMNS); }

static void take_keys(layout s, span row, int64_t head, tensor x, float *y) {
    take(x, row.batch, head, 0, row.before, s.width, 1, y, s.room);
    take(x, row.batch, head, row.first, row.own, s.width, 1, y + row.before * s.room, s.room);
}

/* softmax of `count` rows of scores, the first of which sees `visible` and each next one `more` more; 0 up to `keys`. */
static void weigh(float *scores, int64_t room, int64_t count, int64_t visible, int64_t more, int64_t keys) {
    for (int64_t i = 0; i < count; i++, scores += room, visible += more) {
        int64_t end = (visible + VECTOR - 1) / VECTOR * VECTOR; /* whole vectors, of what is 0 by itself behind */
        for (int64_t j = visible; j < end; j++) scores[j] = -INFINITY;
        float most = largest(scores, end, -INFINITY), sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < end; j++) {
            scores[j] = power(scores[j] - most);
            sum += scores[j];
        }
        float share = 1.0f / sum;
        for (int64_t j = 0; j < end; j++) scores[j] *= share;
        memset(scores + end, 0, (keys - end) * sizeof(float));
    }
}

/* `count` queries from place i of the row on, scaled, and their weights p before dropout. Returns how many keys are seen. */
static int64_t weights_of(layout s, span row, int64_t head, int64_t i, int64_t count, tensor q, const float *key_turned,
                          int64_t keys, float *queries, float *p) {
    int64_t causal = row.own > 0, end = row.before + (causal ? i + count : 0);
    take(q, row.batch, head, row.first + i, count, s.width, s.scale, queries, s.room);
    product(p, keys, queries, s.room, 1, key_turned, keys, count, rounded(end), s.width, 0);
    weigh(p, keys, count, row.before + (causal ? i + 1 : 0), causal, rounded(end));
    return end;
}

static void attend(layout s, span row, int64_t head, tensor q, tensor k, tensor v, tensor out, float *scratch) {
    int64_t seen = row.before + row.own, keys = rounded(seen), shared = s.heads / s.key_heads;
    float *values = carve(&scratch, s.keys * s.room), *turned = carve(&scratch, s.keys * s.room);
    float *queries = carve(&scratch, QUERIES * s.room), *y = carve(&scratch, QUERIES * s.room);
    float *scores = carve(&scratch, QUERIES * s.keys);
    take_keys(s, row, head, k, values);
    turn(values, s.room, seen, s.width, turned, keys);
    take_keys(s, row, head, v, values);
    for (int64_t h = head * shared; h < (head + 1) * shared; h++)
        for (int64_t i = 0; i < row.length; i += QUERIES) {
            int64_t count = MIN(QUERIES, row.length - i);
            int64_t end = weights_of(s, row, h, i, count, q, turned, keys, queries, scores);
            if (s.dropped) drop_weights(s, row.batch, h, row.first + i, scores, scores, keys, count, end);
            product(y, s.room, scores, keys, 1, values, s.room, count, s.width, end, 0);
            give(out, row.batch, h, row.first + i, count, s.width, 1, y, s.room);
        }
}

/* begun: (rows, key heads, 2, most before, width), what a causal row adds to the gradients of what is before it. */
static void attend_backward(layout s, span row, int64_t head, tensor g, tensor q, tensor k, tensor v, tensor dq,
                            tensor dk, tensor dv, float *begun, int64_t most_before, float *scratch) {
    int64_t seen = row.before + row.own, keys = rounded(seen), shared = s.heads / s.key_heads;
    float *key = carve(&scratch, s.keys * s.room), *key_turned = carve(&scratch, s.keys * s.room);
    float *value_turned = carve(&scratch, s.keys * s.room);
    float *in_key = carve(&scratch, s.keys * s.room), *in_value = carve(&scratch, s.keys * s.room);
    float *queries = carve(&scratch, QUERIES * s.room), *grads = carve(&scratch, QUERIES * s.room);
    float *y = carve(&scratch, QUERIES * s.room);
    float *p = carve(&scratch, QUERIES * s.keys), *dp = carve(&scratch, QUERIES * s.keys);
    take_keys(s, row, head, v, key);
    turn(key, s.room, seen, s.width, value_turned, keys);
    take_keys(s, row, head, k, key);
    turn(key, s.room, seen, s.width, key_turned, keys);
    memset(in_key, 0, seen * s.room * sizeof(float));
    memset(in_value, 0, seen * s.room * sizeof(float));
    for (int64_t h = head * shared; h < (head + 1) * shared; h++)
        for (int64_t i = 0; i < row.length; i += QUERIES) {
            int64_t count = MIN(QUERIES, row.length - i);
            int64_t end = weights_of(s, row, h, i, count, q, key_turned, keys, queries, p);
            take(g, row.batch, h, row.first + i, count, s.width, 1, grads, s.room);
            if (s.dropped) drop_weights(s, row.batch, h, row.first + i, p, dp, keys, count, end); /* dp's room is free until below */
            product(in_value, s.room, s.dropped ? dp : p, 1, keys, grads, s.room, end, s.width, count, 1);
            product(dp, keys, grads, s.room, 1, value_turned, keys, count, rounded(end), s.width, 0);
            if (s.dropped) drop_weights(s, row.batch, h, row.first + i, dp, dp, keys, count, end);
            slope(p, dp, keys, count, end);
            product(in_key, s.room, dp, 1, keys, queries, s.room, end, s.width, count, 1);
            product(y, s.room, dp, keys, 1, key, s.room, count, s.width, end, 0);
            give(dq, row.batch, h, row.first + i, count, s.width, s.scale, y, s.room);
        }
    if (row.own) {
        give(dk, row.batch, head, row.first, row.length, s.width, 1, in_key + row.before * s.room, s.room);
        give(dv, row.batch, head, row.first, row.length, s.width, 1, in_value + row.before * s.room, s.room);
        for (int64_t i = 0; i < row.before; i++) {
            memcpy(begun + i * s.width, in_key + i * s.room, s.width * sizeof(float));
            memcpy(begun + (most_before + i) * s.width, in_value + i * s.room, s.width * sizeof(float));
        }
    } else { /* no other row sees these keys, and nobody those behind them */
        give(dk, row.batch, head, 0, row.before, s.width, 1, in_key, s.room);
        give(dv, row.batch, head, 0, row.before, s.width, 1, in_value, s.room);
        memset(y, 0, s.width * sizeof(float));
        for (int64_t i = row.before; i < s.key_tokens; i++) {
            give(dk, row.batch, head, i, 1, s.width, 1, y, s.room);
            give(dv, row.batch, head, i, 1, s.width, 1, y, s.room);
        }
    }
}

void row_attention(int type, void *q, const int64_t *q_strides, void *k, const int64_t *k_strides, void *v,
                   const int64_t *v_strides, void *y, const int64_t *y_strides, const span *rows,
                   const int64_t *sizes, float *scratch, float scale, int threads) {
    layout s = laid_out(sizes, scale, COLUMNS);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < s.count * s.key_heads; task++)
        attend(s, rows[task / s.key_heads], task % s.key_heads, (tensor){type, q, q_strides},
               (tensor){type, k, k_strides}, (tensor){type, v, v_strides}, (tensor){type, y, y_strides},
               scratch + THREAD * s.each);
}

void row_attention_backward(int type, void *g, const int64_t *g_strides, void *q, const int64_t *q_strides, void *k,
                            const int64_t *k_strides, void *v, const int64_t *v_strides, void *dq,
                            const int64_t *dq_strides, void *dk, const int64_t *dk_strides, void *dv,
                            const int64_t *dv_strides, const span *rows, const int64_t *sizes, float *begun,
                            float *scratch, float scale, int threads) {
    layout s = laid_out(sizes, scale, COLUMNS);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < s.count * s.key_heads; task++)
        attend_backward(s, rows[task / s.key_heads], task % s.key_heads, (tensor){type, g, g_strides},
                        (tensor){type, q, q_strides}, (tensor){type, k, k_strides}, (tensor){type, v, v_strides},
                        (tensor){type, dq, dq_strides}, (tensor){type, dk, dk_strides}, (tensor){type, dv, dv_strides},
                        begun + task * 2 * sizes[5] * s.width, sizes[5], scratch + THREAD * s.each);
}
