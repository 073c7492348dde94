/* Products with frozen weights, by AMX: `tile_product.py` says what they are.
 *
 * A thread has some columns of the result. It packs their weights, so many at a time as its second cache holds, and
 * goes through the rows: DEPTH rows of x stay in the first cache while all that is packed passes by. What an adapter adds
 * is a further term of the same sums (`low_rank.c`), so that the result is written once, and rounded once.
 */

#include "tiles.h"
#ifdef HAS_TILES

/* Panels, of DEPTH columns, for which it is worth to divide the columns among threads, and not the rows. */
enum { LEAST = 3 };

/* DEPTH columns of some of w's rows, packed: two tiles for each DEPTH rows. */
static void pack_panel(product p, int64_t column, int64_t row, int64_t rows, bf16 *to) {
    if (!p.turned) {
        pack_rows(p.w + row * p.m + column, in_rows(p.m), rows, DEPTH, to, 2);
        return;
    }
    for (int64_t i = 0; i < rows; i += DEPTH)
        for (int half = 0; half < 2; half++)
            transpose(p.w + (column + half * TILE) * p.k + row + i, p.k * 2, to + (2 * (i / DEPTH) + half) * PACKED, 64);
}

static inline __m512 first_half(__m512i x) { return widened(_mm512_castsi512_si256(x)); }

static inline __m512 second_half(__m512i x) { return widened(_mm512_extracti64x4_epi64(x, 1)); }

/* Asks for a block of x, or nothing of NULL: its rows are far from each other, and no processor foresees them. */
static inline void fetch(const bf16 *x, int64_t at, int64_t down, int64_t count) {
    for (int64_t r = 0; r < count && x; r++) __builtin_prefetch(x + at + r * down, 1);
}

/* y = sums + bias + plus. */
static inline void write_sums(product p, float (*sums)[DEPTH], int64_t column, int64_t at, int64_t count) {
    __m512i bias = p.bias ? _mm512_loadu_si512(p.bias + column) : _mm512_setzero_si512();
    __m512 left = first_half(bias), right = second_half(bias);
    for (int64_t r = 0; r < count; r++, at += p.out.down) {
        __m512 first = _mm512_add_ps(_mm512_load_ps(sums[r]), left);
        __m512 second = _mm512_add_ps(_mm512_load_ps(sums[r] + TILE), right);
        if (p.then.plus) {
            __m512i plus = _mm512_loadu_si512(p.then.plus + at);
            first = _mm512_add_ps(first, first_half(plus));
            second = _mm512_add_ps(second, second_half(plus));
        }
        __m512bh both = _mm512_cvtne2ps_pbh(second, first);
        memcpy(p.y + at, &both, 64);
    }
}

/* What else they become, where there is a gate. */
static inline void write_gated(product p, float (*sums)[DEPTH], int64_t at, int64_t count) {
    float gate[DEPTH], up[DEPTH], gated[DEPTH], in_gate[DEPTH], in_up[DEPTH];
    for (int64_t r = 0; r < count; r++, at += p.out.down) {
        read(BFLOAT16, p.then.gate, at, DEPTH, gate);
        read(BFLOAT16, p.then.up ? p.then.up : p.y, at, DEPTH, up);
        if (p.then.up) {
            opened_backward(sums[r], gate, up, in_gate, in_up, gated, DEPTH);
            put(BFLOAT16, p.then.in_gate, at, DEPTH, in_gate);
            put(BFLOAT16, p.then.in_up, at, DEPTH, in_up);
        } else {
            opened(gate, up, gated, DEPTH);
        }
        put(BFLOAT16, p.then.gated, at, DEPTH, gated);
    }
}

/* cap tanh(z / cap), and its slope. */
static inline __m512 capped(__m512 z, float cap, __m512 *slope) {
    __m512 one = _mm512_set1_ps(1), two = _mm512_set1_ps(2);
    __m512 turned = _mm512_add_ps(one, powers(_mm512_mul_ps(z, _mm512_set1_ps(-2 / cap))));
    __m512 share = _mm512_sub_ps(_mm512_div_ps(two, turned), one);
    *slope = _mm512_fnmadd_ps(share, share, one);
    return _mm512_mul_ps(share, _mm512_set1_ps(cap));
}

/* Of logits, what is found of each row, and e^logit. */
static inline void write_likelihood(product p, float (*sums)[DEPTH], int64_t column, int64_t at, int64_t row, int64_t count) {
    const likelihood *h = p.then.head;
    float *most = h->most + (THREAD * h->rows + row) * TILE, *sum = h->sum + (THREAD * h->rows + row) * TILE;
    __m512i both = p.bias ? _mm512_loadu_si512(p.bias + column) : _mm512_setzero_si512();
    __m512 bias[] = {first_half(both), second_half(both)}, scale = _mm512_set1_ps(h->scale);
    __m512 one = _mm512_set1_ps(1), z[2], slope[] = {one, one};
    int64_t left = h->count - column;
    __mmask32 seen = left < DEPTH ? (1u << left) - 1 : 0xffffffff;
    for (int64_t r = 0; r < count; r++, at += p.out.down, most += TILE, sum += TILE) {
        int64_t target = h->targets[row + r] - h->first - column;
        __mmask32 others = 0xffffffff;
        for (int i = 0; i < 2; i++) {
            z[i] = _mm512_mul_ps(_mm512_add_ps(_mm512_load_ps(sums[r] + i * TILE), bias[i]), scale);
            if (h->cap != 0) z[i] = capped(z[i], h->cap, slope + i);
            z[i] = _mm512_sub_ps(z[i], _mm512_set1_ps(h->shift[row + r]));
            z[i] = _mm512_mask_blend_ps((__mmask16)(seen >> i * TILE), _mm512_set1_ps(-INFINITY), z[i]);
            _mm512_store_ps(most, _mm512_max_ps(_mm512_load_ps(most), z[i]));
        }
        if (target >= 0 && target < DEPTH) {
            float here[TILE];
            _mm512_storeu_ps(here, z[target / TILE]);
            h->chosen[row + r] = here[target % TILE];
            others = ~(1u << target);
        }
        for (int i = 0; i < 2; i++) {
            z[i] = powers(z[i]);
            _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), z[i]));
            z[i] = _mm512_maskz_mov_ps((__mmask16)(others >> i * TILE), z[i]);
            if (h->cap != 0) z[i] = _mm512_mul_ps(z[i], slope[i]);
        }
        __m512bh narrow_ones = _mm512_cvtne2ps_pbh(z[1], z[0]);
        memcpy(p.y + at, &narrow_ones, 64);
    }
}

void multiply_frozen(product p) {
    int64_t panels = p.m / DEPTH, across = THREADS;
    while (across > 1 && (THREADS % across || panels < LEAST * across)) across--;
    int64_t down = THREADS / across, column = THREAD % across, row = THREAD / across, blocks = rounded_to(p.n, DEPTH) / DEPTH;
    int64_t top = share(blocks, row, down) * DEPTH, bottom = MIN(p.n, share(blocks, row + 1, down) * DEPTH);
    int64_t first = share(panels, column, across), mine = share(panels, column + 1, across) - first;
    int64_t parts = (mine + p.most - 1) / p.most, terms = p.k / DEPTH, deep = (terms + p.pieces - 1) / p.pieces * DEPTH;
    bf16 *packed = p.scratch + THREAD * p.most * DEPTH * (deep + (p.pieces > 1 ? 2 * blocks * DEPTH : 0));
    float(*all)[DEPTH] = (float(*)[DEPTH])(packed + p.most * DEPTH * deep), one[DEPTH][DEPTH] ALIGNED;
    const bf16 *touched[] = {p.then.up ? NULL : p.y, p.then.plus,  p.then.gate, p.then.up,
                             p.then.gated,           p.then.in_gate, p.then.in_up};
    for (int64_t part = 0; part < parts; part++) {
        int64_t from = first + share(mine, part, parts), to = first + share(mine, part + 1, parts);
        for (int64_t piece = 0; piece < p.pieces; piece++) {
            int64_t term = share(terms, piece, p.pieces) * DEPTH, k = share(terms, piece + 1, p.pieces) * DEPTH - term;
            int last = piece == p.pieces - 1;
            for (int64_t panel = from; panel < to; panel++)
                pack_panel(p, panel * DEPTH, term, k, packed + (panel - from) * k * DEPTH);
            configure(TILE, TILE);
            for (int64_t i = top; i < bottom; i += DEPTH) {
                int64_t count = MIN(DEPTH, bottom - i), below = i + MIN(TILE, count - 1);
                fit(count);
                for (int64_t panel = from; panel < to; panel++) {
                    float(*sums)[DEPTH] = p.pieces == 1 ? one : all + (i - top) * (to - from) + (panel - from) * DEPTH;
                    int64_t at = place_of(p.out, i, panel * DEPTH);
                    for (int each = 0; each < 7 && last; each++) fetch(touched[each], at, p.out.down, count);
                    if (piece)
                        load_sums(sums);
                    else
                        zero_sums();
                    const bf16 *w = packed + (panel - from) * k * DEPTH, *f = p.f + 2 * panel * p.room * TILE;
                    add_tiles(p.x + place_of(p.in, i, term), p.x + place_of(p.in, below, term), p.in, k, w, w + PACKED,
                              2 * PACKED);
                    if (last)
                        add_tiles(p.thin + i * p.room, p.thin + below * p.room, in_rows(p.room), p.room, f, f + p.room * TILE,
                                  PACKED);
                    store_sums(sums);
                    if (last && p.then.head) write_likelihood(p, sums, panel * DEPTH, at, i, count);
                    if (last && !p.then.head && !p.then.up) write_sums(p, sums, panel * DEPTH, at, count);
                    if (last && p.then.gate) write_gated(p, sums, at, count);
                }
            }
        }
    }
}

/* y (n x m) = x (n x k) w + bias, which may be NULL; the others as in `product`. */
void tile_product(int type, bf16 *y, const bf16 *x, const bf16 *w, int64_t turned, const bf16 *bias, bf16 *scratch,
                  int64_t most, int64_t pieces, int64_t n, int64_t k, int64_t m, int threads) {
    (void)type;
#pragma omp parallel num_threads(threads)
    {
        configuration others;
        _tile_storeconfig(&others);
        multiply_frozen((product){y, in_rows(m), x, in_rows(k), w, turned, scratch, most, pieces, bias, NULL, NULL, 0, n, k, m,
                                  {0}});
        _tile_loadconfig(&others);
    }
}

#endif
