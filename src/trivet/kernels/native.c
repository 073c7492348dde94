/* The CPU's counterpart of fused.py: norms, gated activations, rotary positions, softmax and cross-entropy, each in one
 * pass over memory. Numbers are float32 or bfloat16 in memory and float32 in between; `native.py` compiles this file
 * and says what each function computes.
 *
 * Rows are read in pieces of PIECE numbers that stay in the first cache, so that one code serves both types. NaN and
 * infinities go through as in torch: the flags that native.py sets leave them alone.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

enum { FLOAT32, BFLOAT16 };
enum { PIECE = 1024, VECTOR = 16 };
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

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

/* 1 / (1 + e^-x), by Newton's method from a guess in whole numbers: processors divide slowly. */
static inline float sigmoid(float x) {
    float d = 1.0f + power(-x);
    uint32_t bits;
    memcpy(&bits, &d, 4);
    bits = 0x7ef311c3 - bits;
    float y;
    memcpy(&y, &bits, 4);
    y *= 2.0f - d * y;
    y *= 2.0f - d * y;
    return y + y * (1.0f - d * y);
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

void rms_norm_backward(int type, const void *grad, const void *x, const void *weight, const float *inverse, void *dx,
                       int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        float a[PIECE], b[PIECE], c[PIECE], d[PIECE], factor = inverse[row];
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
            put(type, dx, at, n, out);
        }
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
        for (int64_t j = 0; j < n; j++) out[j] = g[j] * u[j] * sigmoid(g[j]);
        put(type, y, i, n, out);
    }
}

void silu_gate_backward(int type, const void *grad, const void *gate, const void *up, void *dgate, void *dup,
                        int64_t count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += PIECE) {
        float a[PIECE], b[PIECE], c[PIECE], d[PIECE], e[PIECE];
        int64_t n = MIN(PIECE, count - i);
        const float *restrict t = read(type, grad, i, n, a), *restrict g = read(type, gate, i, n, b);
        const float *restrict u = read(type, up, i, n, c);
        float *restrict in_gate = place(type, dgate, i, d), *restrict in_up = place(type, dup, i, e);
        for (int64_t j = 0; j < n; j++) {
            float opened = sigmoid(g[j]);
            in_gate[j] = t[j] * u[j] * opened * (1.0f + g[j] * (1.0f - opened));
            in_up[j] = t[j] * g[j] * opened;
        }
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

static inline float logit(float product, float scale, float cap) {
    product *= scale;
    return cap == 0 ? product : cap * (2.0f / (1.0f + power(-2.0f * product / cap)) - 1.0f);
}

/* Logits cap tanh(scale * product / cap), without cap where it is 0; their gradients take the products' place. */
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
