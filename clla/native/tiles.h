/* Products of bf16 matrices in tiles, by Intel's AMX: sums in fp32, sixteen times as many a cycle as vectors give.

   A tile has 16 rows of 64 bytes. Of A [rows, depth] that are 32 components of 16 rows as they lie in memory; of
   B [depth, columns] two rows stand beside one another, number by number: [depth / 2][columns][2] ("paired" below). */

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__AVX512BF16__) && defined(__AVX512VL__) &&              \
    defined(__linux__)
#define TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Whether Linux lets this process use tiles, which it must be asked for. */
static int tiles_allowed(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}

typedef struct {
    uint8_t palette, start_row, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TileConfig;

/* All tiles of this thread are 16 rows of 64 bytes from now on; `before` is what another library may have set. */
static void tiles_begin(TileConfig *before) {
    TileConfig config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = 16;
    }
    _tile_storeconfig(before);
    _tile_loadconfig(&config);
}

static void tiles_end(const TileConfig *before) {
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

/* C [rows, columns] (+)= A [rows, depth] B, rows and columns multiples of 16, depth of 32; strides count numbers, that
   of B pairs. */
static void tiles_product(int64_t rows, int64_t columns, int64_t depth, const uint16_t *a, int64_t lda,
                          const uint32_t *b, int64_t ldb, float *c, int64_t ldc, int add) {
    for (int64_t i = 0; i < rows; i += 32) {
        const int two = i + 16 < rows;
        for (int64_t j = 0; j < columns; j += 16) {
            float *to = c + i * ldc + j;
            if (add) {
                _tile_loadd(0, to, ldc * 4);
                if (two) _tile_loadd(1, to + 16 * ldc, ldc * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
            }
            for (int64_t k = 0; k < depth; k += 32) {
                _tile_loadd(4, b + k / 2 * ldb + j, ldb * 4);
                _tile_loadd(2, a + i * lda + k, lda * 2);
                _tile_dpbf16ps(0, 2, 4);
                if (two) {
                    _tile_loadd(3, a + (i + 16) * lda + k, lda * 2);
                    _tile_dpbf16ps(1, 3, 4);
                }
            }
            _tile_stored(0, to, ldc * 4);
            if (two) _tile_stored(1, to + 16 * ldc, ldc * 4);
        }
    }
}

/* Numbers of two rows side by side; `b` NULL for zeros. */
static void paired(const uint16_t *a, const uint16_t *b, int64_t count, uint32_t *to) {
    uint16_t low[32], high[32];
    for (int i = 0; i < 32; i++) {
        low[i] = (uint16_t)(i / 2 + i % 2 * 32);
        high[i] = (uint16_t)(16 + i / 2 + i % 2 * 32);
    }
    const __m512i first = _mm512_loadu_si512(low), second = _mm512_loadu_si512(high);
    for (int64_t i = 0; i < count; i += 32, to += 32) {
        const int64_t left = count - i;
        const __mmask32 some = left < 32 ? (1u << left) - 1 : ~0u;
        const __m512i x = _mm512_maskz_loadu_epi16(some, a + i);
        const __m512i y = b ? _mm512_maskz_loadu_epi16(some, b + i) : _mm512_setzero_si512();
        const __mmask16 near = (__mmask16)some, far = (__mmask16)(some >> 16);
        _mm512_mask_storeu_epi32(to, near, _mm512_permutex2var_epi16(x, first, y));
        _mm512_mask_storeu_epi32(to + 16, far, _mm512_permutex2var_epi16(x, second, y));
    }
}

/* 16 x 16 numbers of 32 bits, rows and columns exchanged. */
static void transposed(const void *from, int64_t stride, void *to, int64_t to_stride) {
    __m512i x[16], y[16];
    for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512((const uint32_t *)from + i * stride);
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + 2 + j]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) { /* x[4 q + i] has columns i, 4 + i, 8 + i and 12 + i of rows 4 q to 4 q + 3 */
        y[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
        y[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
        y[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
        y[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
    }
    uint32_t *out = to;
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(out + i * to_stride, _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88));
        _mm512_storeu_si512(out + (8 + i) * to_stride, _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd));
        _mm512_storeu_si512(out + (4 + i) * to_stride, _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0x88));
        _mm512_storeu_si512(out + (12 + i) * to_stride, _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0xdd));
    }
}

static void narrowed(const float *x, int64_t count, uint16_t *to) {
    for (int64_t i = 0; i < count; i += 16) {
        const int64_t left = count - i;
        const __mmask16 some = left < 16 ? (__mmask16)((1u << left) - 1) : (__mmask16)~0u;
        _mm256_mask_storeu_epi16(to + i, some, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, x + i)));
    }
}
#else
#define TILES 0
#endif
