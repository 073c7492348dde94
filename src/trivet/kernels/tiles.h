/* Products by AMX: a tile is a register of 16 rows of 64 bytes, TILE float32 numbers or DEPTH of 16 bits. The right side of a
 * product is packed: of two rows that follow each other the numbers lie in turns, and TILE columns of DEPTH rows are a tile.
 */

#ifndef TRIVET_TILES_H
#define TRIVET_TILES_H

#if defined(__linux__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_TILES
#include "numbers.h"

#define ALIGNED __attribute__((aligned(64)))

enum { TILE = 16, DEPTH = 32, PACKED = TILE * DEPTH };
typedef uint16_t bf16;

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} configuration;

/* Tiles 0, 1 and 4 have so many rows, 2, 3 and 5 so many, and 6 and 7, the packed ones, all. */
static inline void configure(int64_t upper, int64_t lower) {
    configuration c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.bytes[i] = 64;
        c.rows[i] = i < 2 || i == 4 ? upper : i < 6 ? lower : TILE;
    }
    __asm__ volatile("" ::"r"(&c) : "memory");
    _tile_loadconfig(&c);
}

static inline __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

/* As `power` of numbers.h; compilers make halves of such vectors. */
static inline __m512 powers(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(80), _mm512_max_ps(_mm512_set1_ps(-88), x)); /* NaN stays */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    f = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), f);
    const float terms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    for (int i = 0; i < 5; i++) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(terms[i]));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, f), f, _mm512_add_ps(f, _mm512_set1_ps(1)));
    return _mm512_scalef_ps(p, n);
}

/* Numbers of two rows in turns: of their first sixteen ones, of their last. */
static inline __m512i paired(__m512i first, __m512i second, int last) {
    static const uint16_t turns[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    __m512i from = _mm512_add_epi16(_mm512_loadu_si512(turns), _mm512_set1_epi16(last ? 16 : 0));
    return _mm512_permutex2var_epi16(first, from, second);
}

/* How a matrix of `wide` columns lies in memory: from one row to the next of DEPTH rows, and one DEPTH columns to the next.
 * Each DEPTH rows are in one piece: row after row, or in blocks of DEPTH columns, which are read and written as one stream
 * where rows are as many streams as there are, too many for the processor to foresee. */
typedef struct {
    int64_t wide, down, along;
} order;

static inline order in_rows(int64_t wide) { return (order){wide, wide, DEPTH}; }

static inline order in_blocks(int64_t wide, int64_t blocks) {
    return blocks ? (order){wide, DEPTH, DEPTH * DEPTH} : in_rows(wide);
}

/* The place of a row and a column, of which the latter is a multiple of DEPTH. */
static inline int64_t place_of(order l, int64_t row, int64_t column) {
    return row / DEPTH * DEPTH * l.wide + row % DEPTH * l.down + column / DEPTH * l.along;
}

/* `wide` columns of `count` rows, packed: `across` tiles for each DEPTH rows, 0 behind `count`. */
static inline void pack_rows(const bf16 *x, order l, int64_t count, int64_t wide, bf16 *to, int64_t across) {
    for (int64_t row = 0; row < rounded_to(count, DEPTH); row += 2)
        for (int64_t j = 0; j < wide; j += DEPTH) {
            const bf16 *from = x + place_of(l, row, j);
            __m512i first = row < count ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
            __m512i second = row + 1 < count ? _mm512_loadu_si512(from + l.down) : _mm512_setzero_si512();
            bf16 *tile = to + (row / DEPTH * across + j / TILE) * PACKED + row % DEPTH / 2 * DEPTH;
            _mm512_store_si512(tile, paired(first, second, 0));
            _mm512_store_si512(tile + PACKED, paired(first, second, 1));
        }
}

/* y = the transpose of x: 16 x 16 numbers of 32 bits, or pairs of 16 bits, in rows so many bytes apart. */
static inline void transpose(const void *x, int64_t ldx, void *y, int64_t ldy) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512((const char *)x + i * ldx);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512((char *)y + i * ldy, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512((char *)y + (i + 4) * ldy, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512((char *)y + (i + 8) * ldy, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512((char *)y + (i + 12) * ldy, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}

/* What is found of each row of logits, which are less the row's `shift`. Of a product, column 0 is the vocabulary's `first`, and
 * `count` columns are some of it. `most` and `sum` have the largest and the sum of e^logit, of the columns that a thread has
 * seen and of each sixteenth one, for each row of each thread; `chosen` the target's, which one thread sees. */
typedef struct {
    const int64_t *targets;
    const float *shift;
    int64_t rows, first, count;
    float scale, cap, *most, *sum, *chosen;
} likelihood;

/* What a product's sums become, beside y = sums. With `plus`: y = sums + plus, which may be y. With `gate`: gated = SiLU(gate) y
 * too. With `up` as well: the sums are gated's gradient; in_gate, in_up and gated are written, and y is not. All lie as y does.
 * With `head`: y = e^logit times the logit's slope by scale * sum, 0 for the target. */
typedef struct {
    const bf16 *plus, *gate, *up;
    bf16 *gated, *in_gate, *in_up;
    const likelihood *head;
} after;

/* y (n x m) = x (n x k) w + thin (n x room) f + bias, which may be NULL. x and y lie as `in` and `out` say, w as
 * (k x m), or `turned` as (m x k); f is packed. `thin` has as many rows as n rounded up to DEPTH, and `room`, which may be 0,
 * is a multiple of DEPTH. The sums come in `pieces` of their terms, and `most` panels of DEPTH columns at a time: `scratch` has room for what each
 * thread packs of them, and if there are several pieces, for the panels' sums in float32. */
typedef struct {
    bf16 *y;
    order out;
    const bf16 *x;
    order in;
    const bf16 *w;
    int64_t turned;
    bf16 *scratch;
    int64_t most, pieces;
    const bf16 *bias, *thin, *f;
    int64_t room, n, k, m;
    after then;
} product;

/* Tiles 0 to 3 += x w of DEPTH rows (`below`: where the second half of them begins), w packed, with one tile to the next. */
static inline void add_tiles(const bf16 *x, const bf16 *below, order in, int64_t k, const bf16 *w, const bf16 *right,
                             int64_t next) {
    for (int64_t i = 0; i < k; i += DEPTH, x += in.along, below += in.along, w += next, right += next) {
        _tile_loadd(4, x, in.down * 2);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, below, in.down * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

static inline void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static inline void load_sums(const float (*sums)[DEPTH]) {
    _tile_loadd(0, sums[0], 128);
    _tile_loadd(1, sums[0] + TILE, 128);
    _tile_loadd(2, sums[TILE], 128);
    _tile_loadd(3, sums[TILE] + TILE, 128);
}

static inline void store_sums(float (*sums)[DEPTH]) {
    _tile_stored(0, sums[0], 128);
    _tile_stored(1, sums[0] + TILE, 128);
    _tile_stored(2, sums[TILE], 128);
    _tile_stored(3, sums[TILE] + TILE, 128);
}

/* A block of DEPTH rows, or of the `count` that are left. */
static inline void fit(int64_t count) {
    if (count < DEPTH) configure(MIN(TILE, count), MAX(1, count - TILE));
}

/* Of `all`, where the share of one of `count` begins. */
static inline int64_t share(int64_t all, int64_t one, int64_t count) { return all * one / count; }

/* Computes it; all threads of a team call this (`tile_product.c`), and each leaves its tiles set up. */
void multiply_frozen(product p);

#endif
#endif
