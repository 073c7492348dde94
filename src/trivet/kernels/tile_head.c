/* Cross-entropy of a frozen head by AMX: `tile_head.py` says what it is.
 *
 * Some words at a time: e^logit of all rows, less the target's logit, so that no largest one has to be known before; and as
 * soon as it is there its product with the head, while both are in cache. What a row's sum says comes last. A target's own
 * part of the gradient is added in float32, as it almost cancels where a word is likely.
 */

#include "tiles.h"
#ifdef HAS_TILES

/* Above that, numbers are near what e^x can be of. */
static const float HIGHEST = 70;

typedef struct {
    const bf16 *x, *w, *bias;
    const int64_t *targets;
    bf16 *weights, *packed; /* e^logit of the words at hand; what threads pack */
    float *sums;            /* e^logit times the head, in blocks of DEPTH x DEPTH */
    likelihood found;
    int64_t n, k, vocabulary, most_words;
} head;

/* The target's logit: a near one will do. */
static float near_target(head h, int64_t row) {
    int64_t target = h.targets[row];
    if (target < 0 || target >= h.vocabulary) return 0;
    const bf16 *x = h.x + row * h.k, *w = h.w + target * h.k;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < h.k; i++) sum += wide(x[i]) * wide(w[i]);
    return logit(sum + (h.bias ? wide(h.bias[target]) : 0), h.found.scale, h.found.cap);
}

/* sums += weights (n x words) times the head's rows from `from` on; a thread has some of the columns. */
static void add_to_sums(head h, const bf16 *from, int64_t words) {
    int64_t panels = h.k / DEPTH, first = share(panels, THREAD, THREADS), end = share(panels, THREAD + 1, THREADS);
    order in = in_blocks(words, 1);
    bf16 *packed = h.packed;
    for (int64_t start = first; start < end; start += h.most_words) {
        int64_t stop = MIN(end, start + h.most_words);
        for (int64_t panel = start; panel < stop; panel++)
            pack_rows(from + panel * DEPTH, in_rows(h.k), words, DEPTH, packed + (panel - start) * words * DEPTH, 2);
        configure(TILE, TILE);
        for (int64_t i = 0; i < h.n; i += DEPTH) {
            int64_t count = MIN(DEPTH, h.n - i), below = i + MIN(TILE, count - 1);
            fit(count);
            for (int64_t panel = start; panel < stop; panel++) {
                float(*sums)[DEPTH] = (float(*)[DEPTH])(h.sums + (i * panels + panel * DEPTH) * DEPTH);
                const bf16 *w = packed + (panel - start) * words * DEPTH;
                load_sums(sums);
                add_tiles(h.weights + place_of(in, i, 0), h.weights + place_of(in, below, 0), in, words, w, w + PACKED,
                          2 * PACKED);
                store_sums(sums);
            }
        }
    }
}

static float most_of(likelihood f, int64_t row) {
    float most = -INFINITY;
    for (int64_t thread = 0; thread < THREADS; thread++) most = largest(f.most + (thread * f.rows + row) * TILE, TILE, most);
    return most;
}

/* What a row's sums say, and its gradient. */
static void finish(head h, int64_t row, float z_loss, float *loss, uint8_t *right, bf16 *grad) {
    likelihood f = h.found;
    int64_t target = h.targets[row], panels = h.k / DEPTH, known = target >= 0 && target < h.vocabulary;
    double sum = 0;
    for (int64_t thread = 0; thread < THREADS; thread++)
        for (int64_t i = 0; i < TILE; i++) sum += f.sum[(thread * f.rows + row) * TILE + i];
    float chosen = known ? f.chosen[row] : NAN, least = (float)log(sum), log_z = least + f.shift[row];
    *loss = least - chosen + z_loss * log_z * log_z;
    *right = chosen >= most_of(f, row);
    const bf16 *w = h.w + (known ? target : 0) * h.k;
    float factor = (float)((1.0f + 2.0f * z_loss * log_z) / sum);
    float squashed = f.cap == 0 ? 0 : (chosen + f.shift[row]) / f.cap;
    float own = (power(chosen) * factor - 1.0f) * f.scale * (1.0f - squashed * squashed);
    for (int64_t panel = 0; panel < panels; panel++) {
        const float *sums = h.sums + (row / DEPTH * DEPTH * panels + panel * DEPTH) * DEPTH + row % DEPTH * DEPTH;
        float out[DEPTH];
        for (int64_t j = 0; j < DEPTH; j++) out[j] = sums[j] * factor * f.scale + own * wide(w[panel * DEPTH + j]);
        put(BFLOAT16, grad, row * h.k + panel * DEPTH, DEPTH, out);
    }
}

/* losses and right (n), and grad (n x k), of x (n x k) and the head's w (vocabulary x k), with `tail` its last rows behind
 * whole multiples of DEPTH, 0 up to DEPTH; bias and tail_bias may be NULL. So many `words` at a time. `most` and `pieces`
 * are the logits' product's, and most_words how many panels of columns are packed for the second one; `packed` has room for
 * what each thread packs. `weights` has room for n rounded up to DEPTH times `words`, `sums` for that times k, `rows` for
 * (2 + 32 threads) n float32 numbers. */
void head_cross_entropy(int type, const bf16 *x, const bf16 *w, const bf16 *tail, const bf16 *bias, const bf16 *tail_bias,
                        const int64_t *targets, float *losses, uint8_t *right, bf16 *grad, bf16 *weights, float *sums,
                        float *rows, bf16 *packed, int64_t most, int64_t pieces, int64_t most_words,
                        int64_t room, int64_t n, int64_t k, int64_t vocabulary, int64_t words, float scale, float cap,
                        float z_loss, int threads) {
    int64_t whole = vocabulary / DEPTH * DEPTH;
    int again = 1;
    (void)type;
#pragma omp parallel num_threads(threads)
    {
        configuration others;
        _tile_storeconfig(&others);
        float *chosen = rows + 32 * THREADS * n, *shift = chosen + n;
        likelihood found = {targets, shift, n, 0, 0, scale, cap, rows, rows + TILE * THREADS * n, chosen};
        head h = {x, w, bias, targets, weights, packed + THREAD * room, sums, found, n, k, vocabulary, most_words};
#pragma omp for
        for (int64_t row = 0; row < n; row++) shift[row] = near_target(h, row);
        for (int attempt = 0; attempt < 2 && again; attempt++) {
            for (int64_t i = THREAD * n * TILE; i < (THREAD + 1) * n * TILE; i++) {
                found.most[i] = -INFINITY;
                found.sum[i] = 0;
            }
#pragma omp barrier
#pragma omp single
            again = 0;
#pragma omp for
            for (int64_t block = 0; block < rounded_to(n, DEPTH) / DEPTH; block++)
                memset(sums + block * DEPTH * k, 0, DEPTH * k * sizeof(float));
            for (int64_t from = 0; from < vocabulary; from += words) {
                int64_t until = from < whole ? MIN(whole, from + words) : vocabulary, at_hand = rounded_to(until - from, DEPTH);
                likelihood part = found;
                part.first = from;
                part.count = until - from;
                const bf16 *these = from < whole ? w + from * k : tail, *own = bias ? bias + from : NULL;
                if (from >= whole) own = tail_bias;
                after then = {.head = &part};
                multiply_frozen((product){weights, in_blocks(at_hand, 1), x, in_rows(k), these, 1, packed, most, pieces, own, NULL,
                                          NULL, 0, n, k, at_hand, then});
#pragma omp barrier
                add_to_sums(h, these, at_hand);
#pragma omp barrier
                if (from < whole && until == whole) from = whole - words; /* the tail is next */
            }
#pragma omp for
            for (int64_t row = 0; row < n; row++) {
                float highest = most_of(found, row);
                if (attempt || !(highest > HIGHEST) || highest == INFINITY) continue;
                shift[row] += highest; /* e^logit was too large */
#pragma omp atomic write
                again = 1;
            }
        }
#pragma omp for
        for (int64_t row = 0; row < n; row++) finish(h, row, z_loss, losses + row, right + row, grad);
        _tile_loadconfig(&others);
    }
}

#endif
