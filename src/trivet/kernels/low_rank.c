/* The products of an adapted layer, by AMX: `low_rank.py` says what they are.
 *
 * `thin` has a column for each rank. With a factor f (rank x k), thin = x fT; y has thin f as a further term of the layer's
 * own product (`tile_product.c`); and f's gradient is thinT x. Tensors are read as they lie in memory. A thread has some
 * of the rows and goes through them in chunks that stay in its second cache, all thin products of a chunk one after the
 * other.
 */

#include "tiles.h"
#ifdef HAS_TILES
#include <sys/syscall.h>

long syscall(long number, ...); /* unistd.h has a `read` of its own, beside numbers.h's */

/* Rows that a thread reads twice, and columns of a gradient that are found at a time. */
enum { CHUNK = 128, STRIP = 64 };

/* Linux has to be asked for the tiles' registers, once a process (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA). */
int tiles_ready(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

/* `rank` rows of k float32 numbers, which lie `down` and `along` apart, times `scale`. */
typedef struct {
    const float *data;
    int64_t down, along, rank, k;
    float scale;
} factor;

static inline bf16 taken(factor f, int64_t rank, int64_t i) { return narrow(f.scale * f.data[rank * f.down + i * f.along]); }

/* For thin = x fT: tiles by (ranks, numbers). Threads share the work. */
static void pack_for_thin(factor f, bf16 *to) {
    int64_t along = f.k / DEPTH, count = rounded_to(f.rank, TILE) / TILE * along;
#pragma omp for nowait
    for (int64_t at = 0; at < count; at++) {
        int64_t rank = at / along * TILE, i = at % along * DEPTH;
        bf16 *tile = to + at * PACKED;
        memset(tile, 0, PACKED * sizeof(bf16));
        for (int64_t r = 0; r < MIN(TILE, f.rank - rank); r++)
            for (int64_t j = 0; j < DEPTH; j++) tile[j / 2 * DEPTH + r * 2 + j % 2] = taken(f, rank + r, i + j);
    }
}

/* For y += thin f: tiles by (numbers, ranks). */
static void pack_for_sum(factor f, bf16 *to) {
    int64_t down = rounded_to(f.rank, DEPTH) / DEPTH, count = f.k / TILE * down;
#pragma omp for nowait
    for (int64_t at = 0; at < count; at++) {
        int64_t rank = at % down * DEPTH, i = at / down * TILE;
        bf16 *tile = to + at * PACKED;
        memset(tile, 0, PACKED * sizeof(bf16));
        for (int64_t r = 0; r < MIN(DEPTH, f.rank - rank); r++)
            for (int64_t j = 0; j < TILE; j++) tile[r / 2 * DEPTH + j * 2 + r % 2] = taken(f, rank + r, i + j);
    }
}

/* thin = x fT of `count` rows (DEPTH at most): rows of `room` numbers, and turned, 0 behind `count`, with columns `ld` apart. */
static void find_thin(const bf16 *x, order in, int64_t count, const bf16 *f, int64_t rank, bf16 *thin, int64_t room,
                      bf16 *turned, int64_t ld) {
    float sums[4][TILE][TILE] ALIGNED; /* two for each half of the rows: each second one can begin before the first ends */
    int64_t k = in.wide, lower = MIN(TILE, count - 1) * in.down; /* one that is there, if nobody's */
    for (int64_t i = 0; i < rank; i += TILE) {
        zero_sums();
        const bf16 *at = x;
        for (int64_t j = 0; j < k; j += 2 * DEPTH, at += 2 * in.along) {
            _tile_loadd(6, f, 64);
            _tile_loadd(4, at, in.down * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, at + lower, in.down * 2);
            _tile_dpbf16ps(2, 5, 6);
            f += PACKED;
            if (j + DEPTH == k) break;
            _tile_loadd(7, f, 64);
            _tile_loadd(4, at + in.along, in.down * 2);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, at + in.along + lower, in.down * 2);
            _tile_dpbf16ps(3, 5, 7);
            f += PACKED;
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        for (int64_t row = 0; row < count; row++) {
            const float *first = sums[row / TILE * 2][row % TILE], *second = first + TILE * TILE;
            __m256bh sum = _mm512_cvtneps_pbh(_mm512_add_ps(_mm512_load_ps(first), _mm512_load_ps(second)));
            memcpy(thin + row * room + i, &sum, 32);
        }
        for (int64_t r = 0; r < TILE; r++)
            for (int64_t row = 0; row < DEPTH; row++)
                turned[(i + r) * ld + row] = row < count ? thin[row * room + i + r] : 0;
    }
}

/* found (rank x k) = thinT x of `count` rows (CHUNK at most), or += where `more`. `turned` is thinT, 0 behind `count`. */
static void find_gradient(const bf16 *x, order in, int64_t count, const bf16 *turned, int64_t ld, int64_t rank,
                          float *found, int64_t ldf, int more) {
    enum { ACROSS = STRIP / TILE };
    bf16 packed[CHUNK / DEPTH * ACROSS * PACKED] ALIGNED;
    for (int64_t j = 0; j < in.wide; j += STRIP) {
        int64_t all = in.wide - j > DEPTH; /* else the half of a strip */
        pack_rows(x + place_of(in, 0, j), in, count, MIN(STRIP, in.wide - j), packed, ACROSS);
        for (int64_t r = 0; r < rank; r += TILE) {
            float *to = found + r * ldf + j;
            zero_sums();
            if (more) {
                _tile_loadd(0, to, ldf * 4);
                _tile_loadd(1, to + TILE, ldf * 4);
            }
            if (more && all) {
                _tile_loadd(2, to + 2 * TILE, ldf * 4);
                _tile_loadd(3, to + 3 * TILE, ldf * 4);
            }
            for (int64_t row = 0; row < count; row += DEPTH) {
                const bf16 *tiles = packed + row / DEPTH * ACROSS * PACKED;
                _tile_loadd(4, turned + r * ld + row, ld * 2);
                _tile_loadd(6, tiles, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, tiles + PACKED, 64);
                _tile_dpbf16ps(1, 4, 7);
                if (all) {
                    _tile_loadd(6, tiles + 2 * PACKED, 64);
                    _tile_dpbf16ps(2, 4, 6);
                    _tile_loadd(7, tiles + 3 * PACKED, 64);
                    _tile_dpbf16ps(3, 4, 7);
                }
            }
            _tile_stored(0, to, ldf * 4);
            _tile_stored(1, to + TILE, ldf * 4);
            if (all) {
                _tile_stored(2, to + 2 * TILE, ldf * 4);
                _tile_stored(3, to + 3 * TILE, ldf * 4);
            }
        }
    }
}

/* The rows that a thread has: whole blocks of DEPTH, but for the last ones. */
typedef struct {
    int64_t start, end;
} span;

static span rows_of(int64_t n) {
    int64_t each = rounded_to((n + THREADS - 1) / THREADS, DEPTH), start = MIN(n, THREAD * each);
    return (span){start, MIN(n, start + each)};
}

/* thin = x fT of the rows from `start` to `end`, and turned; 0 in thin's columns behind the ranks. */
static void find_thin_rows(const bf16 *x, order in, int64_t start, int64_t end, const bf16 *f, int64_t rank, bf16 *thin,
                           int64_t room, bf16 *turned, int64_t ld) {
    memset(thin + start * room, 0, (end - start) * room * sizeof(bf16));
    configure(TILE, TILE);
    for (int64_t i = start; i < end; i += DEPTH) {
        int64_t count = MIN(DEPTH, end - i);
        fit(count);
        find_thin(x + i * in.wide, in, count, f, rank, thin + i * room, room, turned + i, ld);
    }
}

/* y (n x m) = x (n x k) w + scale (low aT) bT + bias, with low (n x k), a (rank x k) and b (m x rank); w, `most` and `pieces` as
 * in `product`, and `plus`, `gate` and `gated` as in `after`, or NULL. `turned` (rank rounded up to TILE x n rounded up to DEPTH)
 * becomes (low aT)T. `thin` has room for twice n rounded up to DEPTH, k and m numbers, each times the rank rounded up to
 * DEPTH, and behind them for the product's `scratch`. */
void adapted_product(int type, bf16 *y, int64_t y_blocks, const bf16 *x, const bf16 *low, int64_t x_blocks, const bf16 *w,
                     int64_t by_column, const float *a, const float *b, const bf16 *bias, const bf16 *plus, const bf16 *gate,
                     bf16 *gated, bf16 *turned, bf16 *thin, int64_t most, int64_t pieces, int64_t n, int64_t k,
                     int64_t m, int64_t rank, float scale, int threads) {
    int64_t room = rounded_to(rank, DEPTH), ld = rounded_to(n, DEPTH);
    bf16 *for_thin = thin + room * ld, *for_sum = for_thin + room * k, *scratch = for_sum + room * m;
    after then = {.plus = plus, .gate = gate, .gated = gated};
    product p = {y, in_blocks(m, y_blocks), x, in_blocks(k, x_blocks), w, by_column, scratch, most, pieces, bias, thin, for_sum,
                 room, n, k, m, then};
    (void)type;
#pragma omp parallel num_threads(threads)
    {
        configuration others;
        _tile_storeconfig(&others); /* torch's products leave theirs in place, and may look for it */
        pack_for_thin((factor){a, k, 1, rank, k, 1}, for_thin);
        pack_for_sum((factor){b, 1, rank, rank, m, scale}, for_sum);
#pragma omp barrier
        span mine = rows_of(n);
        find_thin_rows(low, p.in, mine.start, mine.end, for_thin, rank, thin, room, turned, ld);
#pragma omp barrier
        multiply_frozen(p);
        _tile_loadconfig(&others);
    }
}

/* With g (n x m), y's gradient: da = scale (g b)T low, db = scale gT (low aT), and the gradient of x and of low together,
 * dx = g wT + scale (g b) a, or where there is dlow, of each alone. What is NULL is not computed; the rest as above, and
 * dx has `plus` added. With `gate` and `up`, x and low were `gated`: it is written again, and their gradients are, of
 * that which would be dx. `parts` has room for rank (rounded up to TILE) x (k + m) numbers of each thread. */
void adapted_product_backward(int type, const bf16 *g, int64_t g_blocks, const bf16 *low, int64_t low_blocks,
                              const bf16 *w, int64_t by_column, const bf16 *turned, const float *a, const float *b, bf16 *dx,
                              bf16 *dlow, const bf16 *plus,
                              const bf16 *gate, const bf16 *up, bf16 *gated, bf16 *in_gate, bf16 *in_up, float *da,
                              float *db, bf16 *thin, int64_t most, int64_t pieces, float *parts, int64_t n,
                              int64_t k, int64_t m, int64_t rank, float scale, int threads) {
    int64_t room = rounded_to(rank, DEPTH), ranks = rounded_to(rank, TILE), ld = rounded_to(n, DEPTH), wide = k + m;
    bf16 *turned_thin = thin + room * ld, *for_thin = turned_thin + ranks * ld, *for_sum = for_thin + room * m;
    bf16 *scratch = for_sum + room * k;
    after then = {plus, gate, up, gated, in_gate, in_up};
    order in = in_blocks(m, g_blocks), out = in_blocks(k, low_blocks);
    (void)type;
#pragma omp parallel num_threads(threads)
    {
        configuration others;
        _tile_storeconfig(&others);
        pack_for_thin((factor){b, 1, rank, rank, m, scale}, for_thin);
        if (dx || gate) pack_for_sum((factor){a, k, 1, rank, k, 1}, for_sum);
#pragma omp barrier
        span mine = rows_of(n);
        float *found = parts + THREAD * ranks * wide;
        if (mine.start == mine.end) memset(found, 0, ranks * wide * sizeof(float));
        for (int64_t i = mine.start; i < mine.end; i += CHUNK) {
            int64_t chunk = MIN(CHUNK, mine.end - i);
            find_thin_rows(g, in, i, i + chunk, for_thin, rank, thin, room, turned_thin, ld);
            configure(TILE, TILE);
            if (db) find_gradient(g + i * m, in, chunk, turned + i, ld, rank, found + k, wide, i > mine.start);
        }
#pragma omp barrier
        if (dlow) {
            multiply_frozen((product){dx, in_rows(k), g, in, w, !by_column, scratch, most, pieces, NULL, NULL, NULL, 0, n, m, k,
                                      then});
            multiply_frozen((product){dlow, in_rows(k), NULL, in, NULL, 0, scratch, k / DEPTH, 1, NULL, thin, for_sum, room, n, 0,
                                      k, {0}});
        } else if (dx || gate) {
            multiply_frozen((product){dx, gate ? out : in_rows(k), g, in, w, !by_column, scratch, most, pieces, NULL, thin,
                                      for_sum, room, n, m, k, then});
        }
        if (gate) {
#pragma omp barrier
        }
        configure(TILE, TILE);
        for (int64_t i = mine.start; da && i < mine.end; i += CHUNK) {
            int64_t chunk = MIN(CHUNK, mine.end - i);
            find_gradient(low + i * k, out, chunk, turned_thin + i, ld, rank, found, wide, i > mine.start);
        }
        _tile_loadconfig(&others);
#pragma omp barrier
        int64_t from = da ? 0 : k, to = db ? wide : k, count = THREADS;
#pragma omp for
        for (int64_t part = from; part < to; part += STRIP)
            for (int64_t r = 0; r < rank; r++)
                for (int64_t i = part; i < MIN(part + STRIP, to); i++) {
                    float sum = 0;
                    for (int64_t thread = 0; thread < count; thread++) sum += parts[(thread * ranks + r) * wide + i];
                    if (i < k)
                        da[r * k + i] = sum;
                    else
                        db[(i - k) * rank + r] = sum * scale;
                }
    }
}

#else
int tiles_ready(void) { return 0; }
#endif
