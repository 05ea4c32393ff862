// kernels.c: every loop over weights, activations or cached keys, for the CPU, in the order of include/kernels.h (which has
// the equations and shapes). Leaves out: models, policies, files. How fast it is: `make build/bench && build/bench`.
//
// Three loops carry nearly all the time:
//   dots        few rows (decoding): lanes along the inner dimension, weights stream through once           -> bound by memory
//   tile        many rows (prompt, vision tower, attention, nearest keys): a register tile over panels    -> by FMA
//   attend_row: a decode step's query against its cache                                                   -> by memory
//
// Each operation is one parallel region at most, its work claimed in pieces. Set OMP_WAIT_POLICY=passive (before the program
// starts): GNU's threads spin at the end of a region, and beside any other program that costs decoding much of its speed.

#include <math.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
#endif
#ifdef __F16C__
#include <immintrin.h>
#endif
#include "error.h"
#include "kernels.h"

// ----------------------------------------------------------------------------
// memory

static void *mem_alloc(size_t bytes) {
    void *p = aligned_alloc(64, pad64(bytes ? bytes : 1));
    if (!p) die("close other programs, or take a smaller model, image or --ctx", "out of memory for %zu bytes", bytes);
    return memset(p, 0, pad64(bytes));
}
static void mem_release(void *p) { free(p); }
static void put(void *dst, const void *h_src, size_t bytes) { memcpy(dst, h_src, bytes); }
static void get(void *h_dst, const void *src, size_t bytes) { memcpy(h_dst, src, bytes); }

static Mat weight(Type type, int rows, int cols, const void *mapped, const void *scale) {
    return (Mat){ .type = type, .rows = rows, .cols = cols, .row_bytes = row_bytes(type, cols), .data = mapped, .scale = scale };
}

// Scratch that lives as long as the program: each part grows to the largest pass it has seen, so that nothing is allocated
// while decoding. What it held is lost when it grows.
enum { S_X,          // matmul: x in panels, at most X_ROWS rows
       S_THREAD,     // what each thread needs for itself: panels, sums, logits
       S_SUMS,       // kv_vote, kv_column_sums: (n_heads, slots)
       N_SCRATCH };
static void *scratch(int which, size_t bytes) {
    static void *p[N_SCRATCH];
    static size_t room[N_SCRATCH];
    if (bytes > room[which]) {
        free(p[which]);
        p[which] = mem_alloc(bytes);
        room[which] = bytes;
    }
    return p[which];
}
// Every thread's own part of S_THREAD: call it before a parallel region, take `+ thread() * bytes` inside.
static inline char *thread_scratch(size_t bytes) { return scratch(S_THREAD, omp_get_max_threads() * pad64(bytes)); }
// A parallel region is not worth its start for less than this many multiply-adds (some 10 us of one core).
enum { SMALL = 100000 };
static inline float *mine(char *all, size_t bytes) { return (float *)(all + omp_get_thread_num() * pad64(bytes)); }

// ----------------------------------------------------------------------------
// sixteen floats: one AVX-512 register; what the compiler makes of it elsewhere (two AVX, four SSE or NEON)

typedef float V __attribute__((vector_size(64)));
typedef int32_t Vi __attribute__((vector_size(64)));
#define INLINE static inline __attribute__((always_inline))
#pragma GCC diagnostic ignored "-Wpsabi"    // how a V is passed differs with and without AVX-512; none leaves this file

INLINE V load(const float *p) { V v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, V v) { memcpy(p, &v, sizeof v); }
INLINE V load_n(const float *p, int n) { V v = {0}; memcpy(&v, p, n < 16 ? n * sizeof *p : sizeof v); return v; }
INLINE void store_n(float *p, V v, int n) { memcpy(p, &v, n < 16 ? n * sizeof *p : sizeof v); }
INLINE V all(float x) { return x - (V){0}; }
INLINE V pick(Vi mask, V a, V b) { return (V)(((Vi)a & mask) | ((Vi)b & ~mask)); }    // a where the mask is -1, b where it is 0
INLINE V max_v(V a, V b) { return pick(a > b, a, b); }

// The sum of the lanes, always in this order.
INLINE float sum_v(V x) {
    float v[16], a[8], b[4];
    memcpy(v, &x, sizeof v);
    for (int i = 0; i < 8; i++) a[i] = v[i] + v[i + 8];
    for (int i = 0; i < 4; i++) b[i] = a[i] + a[i + 4];
    return (b[0] + b[2]) + (b[1] + b[3]);
}

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2; exp(r) by its series to r^7.
// Within 1.2e-7 of exp, relative; 0 below -104, inf above 88.73, NaN stays NaN.
INLINE V exp_v(V x) {
    x = pick(x < -110.0f, all(-110), x);
    x = pick(x > 90.0f, all(90), x);
    V n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;                // 1.5 * 2^23: adding it rounds to a whole number
    V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;                  // ln 2 in two parts, the first one exact in n
    V p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    Vi e = __builtin_convertvector(n, Vi), half = e >> 1;               // 2^n in two factors: one alone would leave the exponent's range
    return p * (V)((half + 127) << 23) * (V)((e - half + 127) << 23);
}

// erf(x): an odd polynomial below 0.925, 1 - exp(-polynomial) beyond; fitted by weighted least squares. Within 1.5e-7, relative.
INLINE V erf_v(V x) {
    V t = pick(x < 0.0f, -x, x), s = x * x;
    V a = s * 8.32748661e-05f - 0.000813321528f;
    a = a * s + 0.00520026069f;
    a = a * s - 0.02685912f;
    a = a * s + 0.112836912f;
    a = a * s - 0.376126335f;
    a = (a * s + 1.12837917f) * x;
    V u = pick(t > 4.0f, all(4), t);                                    // 1 in float from there on
    V b = u * 5.22324244e-07f + 1.43055264e-05f;
    b = b * u - 0.000396674279f;
    b = b * u + 0.00405339604f;
    b = b * u - 0.0248951085f;
    b = b * u + 0.108011834f;
    b = b * u + 0.633543555f;
    b = b * u + 1.12943408f;
    b = 1.0f - exp_v(0.000160398134f - b * u);
    return pick(t < 0.925f, a, pick(x < 0.0f, -b, b));
}

// ----------------------------------------------------------------------------
// types: f16 and bf16 are uint16_t; everything is float as soon as it is loaded

typedef uint16_t Vh __attribute__((vector_size(32)));
typedef uint32_t Vu __attribute__((vector_size(64)));
typedef int8_t Vb __attribute__((vector_size(16)));
typedef int16_t Vs __attribute__((vector_size(32)));

__attribute__((unused)) static inline float f16_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023;
    union { uint32_t u; float f; } x;
    if (e == 31) x.u = sign | 0x7f800000u | m << 13;
    else if (e)  x.u = sign | (e + 112) << 23 | m << 13;
    else { x.f = (float)m * 0x1p-24f; x.u |= sign; }
    return x.f;
}
__attribute__((unused)) static inline uint16_t float_f16(float f) {     // nearest, ties to even
    union { float f; uint32_t u; } x = { f };
    uint32_t sign = x.u >> 16 & 0x8000;
    x.u &= 0x7fffffffu;
    if (x.u > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (x.u >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
    if (x.u < 0x38800000u) { x.f += 0.5f; return (uint16_t)(sign | (x.u - 0x3f000000u)); }    // subnormal: the sum rounds at 2^-24
    x.u += 0xfff + (x.u >> 13 & 1);
    return (uint16_t)(sign | (x.u - 0x38000000u) >> 13);
}

INLINE V f16_load(const uint16_t *p) {
#if defined __AVX512F__ && !defined PLAIN_F16
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined __F16C__ && !defined PLAIN_F16
    union { __m256 half[2]; V v; } u = {{ _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1)) }};
    return u.v;
#else
    V v;
    for (int i = 0; i < 16; i++) v[i] = f16_float(p[i]);
    return v;
#endif
}
INLINE V f16_all(uint16_t h) {
#if defined __AVX512F__ && !defined PLAIN_F16
    return (V)_mm512_cvtph_ps(_mm256_set1_epi16((short)h));
#else
    return all(f16_float(h));
#endif
}
INLINE void f16_store(uint16_t *p, V v) {
#if defined __AVX512F__ && !defined PLAIN_F16
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < 16; i++) p[i] = float_f16(v[i]);
#endif
}
INLINE V bf16_load(const uint16_t *p) {
#ifdef __AVX512F__
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
    Vh h;
    memcpy(&h, p, sizeof h);
    return (V)(__builtin_convertvector(h, Vu) << 16);
#endif
}
INLINE V i8_load(const int8_t *p) {             // GCC 12 makes five instructions and more of the plain line where one would do
#ifdef __AVX512F__
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#else
    Vb b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(b, Vs), Vi), V);
#endif
}

// The scale of the block that element i of a row is in; no other type has one.
INLINE V scale_load(const uint16_t *scale, Type type, int i) { return type == Q8_0 ? f16_all(scale[(unsigned)i / 32]) : (V){0}; }

// 16 elements of any type from element i of a row, which must all be there.
INLINE V row_load(const char *row, V scale, Type type, int i) {
    switch (type) {
        case F16:  return f16_load((const uint16_t *)row + i);
        case BF16: return bf16_load((const uint16_t *)row + i);
        case Q8_0: return i8_load((const int8_t *)row + i) * scale;           // exact: 7 and 11 bits
        default:   return load((const float *)row + i);
    }
}
// The same where only n of them may be there: zeros behind the end. (Q8_0 rows are whole blocks.)
INLINE V row_load_end(const char *row, V scale, Type type, int i, int n) {
    if (n >= 16) return row_load(row, scale, type, i);
    char end[64] = {0};
    memcpy(end, row + i * type_bytes[type], n * type_bytes[type]);
    return row_load(end, scale, type, 0);
}
INLINE void row_to_float_of(float *y, const char *row, const uint16_t *scale, Type type, int n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) store(y + i, row_load(row, scale_load(scale, type, i), type, i));
    if (i < n) store_n(y + i, row_load_end(row, scale_load(scale, type, i), type, i, n - i), n - i);
}
static void row_to_float(float *y, const char *row, const uint16_t *scale, Type type, int n) {
    switch (type) {                             // a loop for each type, instead of a choice at every step
        case F16:  row_to_float_of(y, row, scale, F16, n); break;
        case BF16: row_to_float_of(y, row, scale, BF16, n); break;
        case Q8_0: row_to_float_of(y, row, scale, Q8_0, n); break;
        default:   memcpy(y, row, n * sizeof *y);
    }
}
static void row_from_float(char *row, const float *x, Type type, int n) {
    for (int i = 0; i < n; i += 16) {
        if (type == F32) { store_n((float *)row + i, load_n(x + i, n - i), n - i); continue; }
        uint16_t h[16];
        f16_store(h, load_n(x + i, n - i));
        memcpy((uint16_t *)row + i, h, n - i < 16 ? (n - i) * 2 : 32);
    }
}

static inline const char *weight_row(Mat w, int row) { return (const char *)w.data + row * w.row_bytes; }
static inline const uint16_t *scale_row(Mat w, int row) {
    return w.type == Q8_0 ? (const uint16_t *)((const char *)w.scale + row * scale_row_bytes(w.cols)) : NULL;
}

// ----------------------------------------------------------------------------
// rows

static float dot(const float *a, const float *b, int n) {
    V s = {0};
    int i = 0;
    for (; i + 16 <= n; i += 16) s += load(a + i) * load(b + i);
    if (i < n) s += load_n(a + i, n - i) * load_n(b + i, n - i);
    return sum_v(s);
}

static void embed(float *y, Mat table, const int *id, int T) {
    #pragma omp parallel for if ((double)T * table.cols > SMALL)
    for (int t = 0; t < T; t++)
        if (id[t] >= 0) row_to_float(y + (size_t)t * table.cols, weight_row(table, id[t]), scale_row(table, id[t]), table.type, table.cols);
}

static void rows_copy(float *y, const float *x, const int *h_row, int n, int dim) {
    if (!h_row && y == x) return;
    #pragma omp parallel for if ((double)n * dim > SMALL)
    for (int i = 0; i < n; i++) memcpy(y + (size_t)i * dim, x + (size_t)(h_row ? h_row[i] : i) * dim, (size_t)dim * sizeof *y);
}

static void rmsnorm(float *y, const float *x, const float *w, int T, int dim, float eps) {
    #pragma omp parallel for if ((double)T * dim > SMALL)
    for (int t = 0; t < T; t++) {
        const float *xt = x + (size_t)t * dim;
        float *yt = y + (size_t)t * dim, scale = 1 / sqrtf(dot(xt, xt, dim) / dim + eps);
        for (int i = 0; i < dim; i += 16) store_n(yt + i, load_n(w + i, dim - i) * load_n(xt + i, dim - i) * scale, dim - i);
    }
}

static void layernorm(float *y, const float *x, const float *w, const float *b, int T, int dim, float eps) {
    #pragma omp parallel for if ((double)T * dim > SMALL)
    for (int t = 0; t < T; t++) {
        const float *xt = x + (size_t)t * dim;
        float *yt = y + (size_t)t * dim;
        V sum = {0};
        for (int i = 0; i < dim; i += 16) sum += load_n(xt + i, dim - i);
        V mean = all(sum_v(sum) / dim);
        for (int i = 0; i < dim; i += 16) store_n(yt + i, load_n(xt + i, dim - i) - mean, dim - i);
        float scale = 1 / sqrtf(dot(yt, yt, dim) / dim + eps);
        for (int i = 0; i < dim; i += 16)
            store_n(yt + i, load_n(w + i, dim - i) * load_n(yt + i, dim - i) * scale + load_n(b + i, dim - i), dim - i);
    }
}

static void silu_mul(float *y, const float *w13x, int T, int hidden_dim) {
    #pragma omp parallel for if (10.0 * T * hidden_dim > SMALL)
    for (int t = 0; t < T; t++) {
        const float *g = w13x + (size_t)t * 2 * hidden_dim, *u = g + hidden_dim;
        for (int i = 0; i < hidden_dim; i += 16) {
            int n = hidden_dim - i;
            V a = load_n(g + i, n);
            store_n(y + (size_t)t * hidden_dim + i, a / (1.0f + exp_v(-a)) * load_n(u + i, n), n);
        }
    }
}

// ----------------------------------------------------------------------------
// matmul, the end of both paths: y (n wide, ldy apart) = or += act(sums (lds apart) + bias) for rows 0 … T-1

static void finish_sums(float *y, size_t ldy, const float *sums, size_t lds, const float *bias, Act act, bool add, int n, int T) {
    for (int t = 0; t < T; t++)
        for (int i = 0; i < n; i += 16) {
            float *at = y + t * ldy + i;
            V u = load_n(sums + t * lds + i, n - i);
            if (bias) u += load_n(bias + i, n - i);
            if (act == ACT_GELU) u = u * (1.0f + erf_v(u * 0.70710678f)) * 0.5f;
            else if (act == ACT_QUICK_GELU) u = u / (1.0f + exp_v(u * -1.702f));
            if (add) u += load_n(at, n - i);
            store_n(at, u, n - i);
        }
}

// ----------------------------------------------------------------------------
// matmul, few rows: R weight rows at once against C rows of x, lanes along the inner dimension, one chain of sums for each pair.
// A pair's chain is the same for every C: a row's bits do not depend on its neighbours.

enum { R = 4, C_MAX = 6,       // R * C_MAX sums, R weights and an x stay in the 32 registers
       FEW = 64,               // rows that go this way
       CHUNK = 64,             // outputs that a thread claims at a time: R streams through memory, CHUNK / R rows long each
       AHEAD = 2048 };         // bytes that a stream is asked for ahead of its use

// sums[c][r * stride] = row[r] . x[c]     ahead: what is wanted next of each stream, ahead_bytes for each element passed here
INLINE void dots_of(float *sums, int stride, const char *const *row, const uint16_t *const *scale, Type type,
                    const char *const *ahead, int ahead_bytes, const float *x, int cols, const int C) {
    V s[R][C_MAX] = {0};
    int i = 0;
    for (; i + 32 <= cols; i += 32) {
        V f[R];
        for (int r = 0; r < R; r++) f[r] = scale_load(scale[r], type, i);
        for (int half = 0; half < 32; half += 16) {
            V w[R];
            for (int r = 0; r < R; r++) w[r] = row_load(row[r], f[r], type, i + half);
            for (int c = 0; c < C; c++) {
                V xc = load(x + (size_t)c * cols + i + half);
                for (int r = 0; r < R; r++) s[r][c] += w[r] * xc;
            }
        }
        for (int r = 0; r < R; r++)
            for (int b = 0; b < 32 * ahead_bytes; b += 64) __builtin_prefetch(ahead[r] + (size_t)i * ahead_bytes + b, 0, 2);
    }
    for (; i < cols; i += 16)
        for (int r = 0; r < R; r++) {
            V w = row_load_end(row[r], scale_load(scale[r], type, i), type, i, cols - i);
            for (int c = 0; c < C; c++) s[r][c] += w * load_n(x + (size_t)c * cols + i, cols - i);
        }
    for (int c = 0; c < C; c++)
        for (int r = 0; r < R; r++) sums[c * CHUNK + r * stride] = sum_v(s[r][c]);
}

static void dots(float *sums, int stride, const char *const *row, const uint16_t *const *scale, Type type,
                 const char *const *ahead, int ahead_bytes, const float *x, int cols, int C) {
    #define CASE(TYPE, BYTES, N) case TYPE * 8 + N: dots_of(sums, stride, row, scale, TYPE, ahead, BYTES, x, cols, N); break;
    #define CASES(TYPE, BYTES) CASE(TYPE, BYTES, 1) CASE(TYPE, BYTES, 2) CASE(TYPE, BYTES, 3) CASE(TYPE, BYTES, 4) CASE(TYPE, BYTES, 5) CASE(TYPE, BYTES, 6)
    switch (type * 8 + C) { CASES(F32, ahead_bytes) CASES(F16, 2) CASES(BF16, 2) CASES(Q8_0, 1) }
    #undef CASES
    #undef CASE
}

static void matmul_few(float *y, const float *x, Mat w, const float *bias, Act act, bool add, int T) {
    int wide = (w.cols + 15) & ~15;
    size_t bytes = ((size_t)R * wide + (size_t)T * CHUNK) * sizeof(float);
    char *own = thread_scratch(bytes);
    #pragma omp parallel for schedule(dynamic) if ((double)T * w.rows * w.cols > SMALL)
    for (int o = 0; o < w.rows; o += CHUNK) {
        float *as_float = mine(own, bytes), *sums = as_float + (size_t)R * wide;
        int n = w.rows - o < CHUNK ? w.rows - o : CHUNK, stride = (n + R - 1) / R;
        for (int i = 0; i < stride; i++) {
            const char *row[R], *ahead[R];
            const uint16_t *scale[R];
            for (int r = 0; r < R; r++) {
                int at = o + r * stride + i < w.rows ? o + r * stride + i : w.rows - 1;     // one row too many: its sum is not used
                row[r] = weight_row(w, at);
                scale[r] = scale_row(w, at);
                ahead[r] = row[r] + (T <= C_MAX ? AHEAD : w.row_bytes);
            }
            Type type = w.type;
            if (T > C_MAX && type != F32) {                                               // read by several dots: made float once
                for (int r = 0; r < R; r++) {
                    row_to_float(as_float + (size_t)r * wide, row[r], scale[r], type, w.cols);
                    row[r] = (char *)(as_float + (size_t)r * wide);
                }
                type = F32;
            }
            for (int t = 0; t < T; t += C_MAX)
                dots(sums + t * CHUNK + i, stride, row, scale, type, ahead, type_bytes[w.type], x + (size_t)t * w.cols, w.cols, T - t < C_MAX ? T - t : C_MAX);
        }
        finish_sums(y + o, w.rows, sums, CHUNK, bias ? bias + o : NULL, act, add, n, T);
    }
}

// ----------------------------------------------------------------------------
// panels and tiles: a panel is 16 rows, made float and interleaved, (k, 16); a tile multiplies one panel with two others

// 16 x 16 transposed in place. A round deals the rows of both halves out like cards, which turns the bits of (row, column) by one.
INLINE void transpose(V a[16]) {
    for (int round = 0; round < 4; round++) {
        V b[16];
        for (int i = 0; i < 8; i++) {
            b[2 * i] = __builtin_shufflevector(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        for (int i = 0; i < 16; i++) a[i] = b[i];
    }
}

// panel[k - k0][r] = factor * row[r][k], k0 <= k < k1; room for k1 - k0 rounded up to 16
INLINE void pack_of(float *panel, const char *const *row, const uint16_t *const *scale, Type type, float factor, int k0, int k1) {
    for (int k = k0; k < k1; k += 16, panel += 256) {
        V a[16];
        if (k + 16 <= k1) for (int r = 0; r < 16; r++) a[r] = row_load(row[r], scale_load(scale[r], type, k), type, k) * factor;
        else for (int r = 0; r < 16; r++) a[r] = row_load_end(row[r], scale_load(scale[r], type, k), type, k, k1 - k) * factor;
        transpose(a);
        for (int i = 0; i < 16; i++) store(panel + i * 16, a[i]);
    }
}
static void pack(float *panel, const char *const *row, const uint16_t *const *scale, Type type, float factor, int k0, int k1) {
    switch (type) {
        case F16:  pack_of(panel, row, scale, F16, factor, k0, k1); break;
        case BF16: pack_of(panel, row, scale, BF16, factor, k0, k1); break;
        case Q8_0: pack_of(panel, row, scale, Q8_0, factor, k0, k1); break;
        default:   pack_of(panel, row, scale, F32, factor, k0, k1);
    }
}

// Rows t, t + 1, … of float rows as a panel; past the last one (n of them) the last one again: lanes that nobody reads.
static void pack_rows(float *panel, const float *x, size_t ld, int n, float factor, int k0, int k1) {
    const char *row[16];
    const uint16_t *scale[16] = {0};
    for (int r = 0; r < 16; r++) row[r] = (const char *)(x + (r < n ? r : n - 1) * ld);
    pack(panel, row, scale, F32, factor, k0, k1);
}

enum { M_MAX = 14, N_TILE = 32 };     // M_MAX * 2 sums, two w and an x are 31 registers

// y[m][0 … 31] = or += sum_k x[k * xk + m] {w0[k * wk + 0 … 15], w1[k * wk + 0 … 15]},  m < M
INLINE void tile_of(float *y, size_t ldy, const float *x, size_t xk, const float *w0, const float *w1, size_t wk, int K, bool add, const int M) {
    V s[M_MAX][2] = {0};
    if (add) for (int m = 0; m < M; m++) { s[m][0] = load(y + m * ldy); s[m][1] = load(y + m * ldy + 16); }
    for (int k = 0; k < K; k++, x += xk, w0 += wk, w1 += wk) {
        V a = load(w0), b = load(w1);
        __builtin_prefetch(x + 24 * xk);          // hardware stops at the end of a page
        __builtin_prefetch(w0 + 16 * wk);
        __builtin_prefetch(w1 + 16 * wk);
        for (int m = 0; m < M; m++) { s[m][0] += a * x[m]; s[m][1] += b * x[m]; }
    }
    for (int m = 0; m < M; m++) { store(y + m * ldy, s[m][0]); store(y + m * ldy + 16, s[m][1]); }
}
static void tile(float *y, size_t ldy, const float *x, size_t xk, const float *w0, const float *w1, size_t wk, int K, bool add, int M) {
    #define CASE(N) case N: tile_of(y, ldy, x, xk, w0, w1, wk, K, add, N); break;
    switch (M) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) }
    #undef CASE
}

// n rows in the fewest groups of at most M_MAX, as even as can be: where group i of them begins
static inline int n_groups(int n) { return (n + M_MAX - 1) / M_MAX; }
static inline int group_at(int n, int i) { return (int)((long)n * i / n_groups(n)); }

// ----------------------------------------------------------------------------
// matmul, many rows: x is packed once; a thread claims some outputs, packs their weights K_BLOCK deep and sends all of x past them

enum { X_ROWS = 45 * M_MAX,    // rows of x that are packed at a time
       K_BLOCK = 512, N_BLOCK = 256 };    // a thread's panels: 512 KB, half of a second-level cache

static void matmul_many(float *y, const float *x, Mat w, const float *bias, Act act, bool add, int T) {
    int groups = n_groups(T), wide = (w.cols + 15) & ~15, n_block = N_BLOCK;
    while (n_block > N_TILE && (w.rows + n_block - 1) / n_block < 4 * omp_get_max_threads()) n_block /= 2;
    float *panels = scratch(S_X, (size_t)groups * wide * 16 * sizeof(float));
    size_t bytes = ((size_t)n_block * K_BLOCK + (size_t)T * n_block) * sizeof(float);
    char *own = thread_scratch(bytes);
    #pragma omp parallel if ((double)T * w.rows * w.cols > SMALL)
    {
        #pragma omp for schedule(dynamic)
        for (int g = 0; g < groups; g++) {
            int t = group_at(T, g);
            pack_rows(panels + (size_t)g * wide * 16, x + (size_t)t * w.cols, w.cols, group_at(T, g + 1) - t, 1, 0, w.cols);
        }
        float *weights = mine(own, bytes), *sums = weights + (size_t)n_block * K_BLOCK;
        #pragma omp for schedule(dynamic)
        for (int o = 0; o < w.rows; o += n_block) {
            int n = w.rows - o < n_block ? w.rows - o : n_block;
            for (int k = 0; k < w.cols; k += K_BLOCK) {
                int depth = w.cols - k < K_BLOCK ? w.cols - k : K_BLOCK;
                for (int j = 0; j < n; j += 16) {
                    const char *row[16];
                    const uint16_t *scale[16];
                    for (int r = 0; r < 16; r++) {
                        int at = o + j + r < w.rows ? o + j + r : w.rows - 1;
                        row[r] = weight_row(w, at);
                        scale[r] = scale_row(w, at);
                    }
                    pack(weights + (size_t)j * K_BLOCK, row, scale, w.type, 1, k, k + depth);
                }
                for (int g = 0; g < groups; g++)
                    for (int j = 0; j < n; j += N_TILE) {
                        int t = group_at(T, g);
                        const float *wj = weights + (size_t)j * K_BLOCK;
                        tile(sums + (size_t)t * n_block + j, n_block, panels + ((size_t)g * wide + k) * 16, 16, wj, wj + 16 * K_BLOCK, 16, depth, k > 0, group_at(T, g + 1) - t);
                    }
            }
            finish_sums(y + o, w.rows, sums, n_block, bias ? bias + o : NULL, act, add, n, T);
        }
    }
}

static void matmul(float *y, const float *x, Mat w, const float *bias, Act act, bool add, int T) {
    if (T <= FEW) { matmul_few(y, x, w, bias, act, add, T); return; }
    int parts = (T + X_ROWS - 1) / X_ROWS;
    for (int i = 0; i < parts; i++) {
        size_t t = (size_t)T * i / parts, end = (size_t)T * (i + 1) / parts;
        matmul_many(y + t * w.rows, x + t * w.cols, w, bias, act, add, (int)(end - t));
    }
}

// ----------------------------------------------------------------------------
// rope

static void rope(float *qkv, const float *cos_sin, const float *q_scale, const Rows *rows, int n_heads, int n_kv_heads, int head_dim) {
    int half = head_dim / 2;
    #pragma omp parallel for if ((double)rows->T * (n_heads + n_kv_heads) * head_dim > SMALL)
    for (int t = 0; t < rows->T; t++) {
        const float *cs = cos_sin + (size_t)rows->rot[t] * head_dim;
        for (int h = 0; h < n_heads + n_kv_heads; h++) {
            float *u = qkv + ((size_t)t * (n_heads + 2 * n_kv_heads) + h) * head_dim, s = q_scale && h < n_heads ? q_scale[rows->pos[t]] : 1;
            for (int i = 0; i < half; i++) {
                float a = u[i], b = u[i + half], c = cs[2 * i], d = cs[2 * i + 1];
                u[i] = (a * c - b * d) * s;
                u[i + half] = (b * c + a * d) * s;
            }
        }
    }
}

// ----------------------------------------------------------------------------
// attention over many queries: Q_BLOCK of them are the lanes, so that a softmax runs down the slots without crossing lanes.
// s (slots, Q_BLOCK) = k q^T, then o (Q_BLOCK, head_dim) = s^T v: the same tile both times.

enum { Q_BLOCK = 64, V_BLOCK = 128 };

typedef struct {                 // the keys and values of one head, slot j at (order ? order[j] : j) * stride
    const char *k, *v;
    size_t stride;
    Type type;
    const int *order;
    const int *pos;              // token index by place; NULL: no mask
    const uint8_t *visible;      // by token index; NULL: all
} Slots;

static inline size_t place(const Slots *c, int j) { return c->order ? (size_t)c->order[j] : (size_t)j; }
static inline int up16(int n) { return (n + 15) & ~15; }
static inline int up32(int n) { return (n + 31) & ~31; }

// Queries as panels: q (n rows, ld apart) times factor -> (Q_BLOCK / 16)(head_dim, 16)
static void pack_queries(float *panels, const float *q, size_t ld, int n, int head_dim, float factor) {
    for (int i = 0; i < Q_BLOCK; i += 16)
        pack_rows(panels + (size_t)i * up16(head_dim), q + (i < n ? i : n - 1) * ld, ld, i < n ? n - i : 1, factor, 0, head_dim);
}

// s[j - j0][query] for slots j0 … j1-1, -INFINITY where a query may not look. q_pos: (Q_BLOCK,) token index, padded with the last one
static void logits(float *s, const float *queries, const Slots *c, int j0, int j1, int head_dim, const int *q_pos, float *panel) {
    size_t wide = (size_t)up16(head_dim) * 16;
    const uint16_t *scale[16] = {0};
    for (int g = 0; g < n_groups(j1 - j0); g++) {
        int j = j0 + group_at(j1 - j0, g), end = j0 + group_at(j1 - j0, g + 1);
        const char *row[16];
        for (int r = 0; r < 16; r++) row[r] = c->k + place(c, j + r < end ? j + r : end - 1) * c->stride;
        pack(panel, row, scale, c->type, 1, 0, head_dim);
        for (int i = 0; i < Q_BLOCK; i += N_TILE)
            tile(s + (size_t)(j - j0) * Q_BLOCK + i, Q_BLOCK, panel, 16, queries + i / 16 * wide, queries + (i / 16 + 1) * wide, 16, head_dim, false, end - j);
    }
    for (int j = j0; c->pos && j < j1; j++) {
        int pos = c->pos[place(c, j)];
        bool hidden = c->visible && !c->visible[pos];
        if (!hidden && pos <= q_pos[0]) continue;
        for (int i = 0; i < Q_BLOCK; i += 16) {
            float *at = s + (size_t)(j - j0) * Q_BLOCK + i;
            Vi t;
            memcpy(&t, q_pos + i, sizeof t);
            store(at, pick(hidden ? (Vi){0} == 0 : t < pos, all(-INFINITY), load(at)));
        }
    }
}

// What attend_block needs for itself.
static size_t attend_bytes(int n, int head_dim) {
    return ((size_t)n * Q_BLOCK + (size_t)up16(head_dim) * (Q_BLOCK + 16) + (size_t)up32(head_dim) * (Q_BLOCK + V_BLOCK)) * sizeof(float);
}

// nq <= Q_BLOCK queries (ldq apart) over the first n slots; o rows ldo apart; lse (ldl apart) may be NULL
static void attend_block(float *o, size_t ldo, float *lse, size_t ldl, const float *q, size_t ldq, const int *q_pos, int nq,
                         const Slots *c, int n, int head_dim, float *own) {
    int wide = up32(head_dim);
    float *s = own, *queries = s + (size_t)n * Q_BLOCK, *panel = queries + (size_t)up16(head_dim) * Q_BLOCK;
    float *values = panel + (size_t)up16(head_dim) * 16, *sums = values + (size_t)wide * V_BLOCK, total[Q_BLOCK], top[Q_BLOCK];
    pack_queries(queries, q, ldq, nq, head_dim, 1 / sqrtf((float)head_dim));
    logits(s, queries, c, 0, n, head_dim, q_pos, panel);
    for (int i = 0; i < Q_BLOCK; i += 16) {
        V max = all(-INFINITY), sum = {0};
        for (int j = 0; j < n; j++) max = max_v(load(s + (size_t)j * Q_BLOCK + i), max);
        max = pick(max == -INFINITY, all(0), max);                     // nothing to see: every exp is 0
        for (int j = 0; j < n; j++) {
            float *at = s + (size_t)j * Q_BLOCK + i;
            V e = exp_v(load(at) - max);
            sum += e;
            store(at, e);
        }
        store(total + i, sum);
        store(top + i, max);
    }
    for (int j0 = 0; j0 < n; j0 += V_BLOCK) {
        int j1 = j0 + V_BLOCK < n ? j0 + V_BLOCK : n;
        for (int j = j0; j < j1; j++) row_to_float(values + (size_t)(j - j0) * wide, c->v + place(c, j) * c->stride, NULL, c->type, head_dim);
        for (int g = 0; g < n_groups(nq); g++)
            for (int i = 0; i < wide; i += N_TILE) {
                int t = group_at(nq, g);
                tile(sums + (size_t)t * wide + i, wide, s + (size_t)j0 * Q_BLOCK + t, Q_BLOCK, values + i, values + i + 16, wide, j1 - j0, j0 > 0, group_at(nq, g + 1) - t);
            }
    }
    for (int t = 0; t < nq; t++) {
        float factor = total[t] > 0 ? 1 / total[t] : 0;
        for (int i = 0; i < head_dim; i += 16)
            store_n(o + t * ldo + i, (n ? load_n(sums + (size_t)t * wide + i, head_dim - i) : (V){0}) * factor, head_dim - i);
        if (lse) lse[t * ldl] = top[t] + logf(total[t]);
    }
}

static void attend(float *o, const float *q, int q_stride, const float *k, const float *v, int kv_stride,
                   int Tq, int Tk, int n_heads, int head_dim) {
    size_t bytes = attend_bytes(Tk, head_dim);
    char *own = thread_scratch(bytes);
    #pragma omp parallel for schedule(dynamic) collapse(2) if ((double)Tq * Tk * n_heads * head_dim > SMALL)
    for (int h = 0; h < n_heads; h++)
        for (int t = 0; t < Tq; t += Q_BLOCK) {
            size_t at = (size_t)h * head_dim;
            Slots c = { .k = (const char *)(k + at), .v = (const char *)(v + at), .stride = (size_t)kv_stride * sizeof *k, .type = F32 };
            attend_block(o + (size_t)t * n_heads * head_dim + at, (size_t)n_heads * head_dim, NULL, 0, q + (size_t)t * q_stride + at, q_stride, NULL,
                         Tq - t < Q_BLOCK ? Tq - t : Q_BLOCK, &c, Tk, head_dim, mine(own, bytes));
        }
}

// ----------------------------------------------------------------------------
// the cache. One block a sequence holds every (layer, kv head) of it: keys, values, then pos, rot, score and order by PLACE.
// order is a permutation of the places: the first len are the slots in token order, the rest are free and are filled from
// the front. So a slot that leaves moves no key: its place goes behind the last slot, and the next append takes it.

typedef struct {
    int len, cap;                // slots held; places
    char *k, *v;                 // (cap, head_dim) of kv->type
    int *pos, *rot, *order;      // (cap,)
    float *score;                // (cap,)
} Head;
struct KV {
    int n_layers, n_kv_heads, head_dim, n_seqs;
    Type type;
    size_t slot_bytes;           // of one key or value
    Head *head;                  // (n_seqs, n_layers, n_kv_heads)
    char **block;                // (n_seqs,) NULL: holds nothing and has no room
    size_t *block_bytes;
};

static Head *head_of(const KV *kv, int seq, int layer, int h) { return &kv->head[((size_t)seq * kv->n_layers + layer) * kv->n_kv_heads + h]; }
static int n_heads_of(const KV *kv) { return kv->n_layers * kv->n_kv_heads; }
static char *key_of(const KV *kv, const Head *h, int slot) { return h->k + h->order[slot] * kv->slot_bytes; }
static char *value_of(const KV *kv, const Head *h, int slot) { return h->v + h->order[slot] * kv->slot_bytes; }

static KV *kv_new(int n_layers, int n_kv_heads, int head_dim, int n_seqs, Type type) {
    if (type != F32 && type != F16) die(NULL, "cache type: only f32 and f16");
    KV *kv = need(1, sizeof *kv);
    *kv = (KV){ .n_layers = n_layers, .n_kv_heads = n_kv_heads, .head_dim = head_dim, .n_seqs = n_seqs, .type = type,
                .slot_bytes = (size_t)head_dim * type_bytes[type] };
    kv->head = need((size_t)n_seqs * n_heads_of(kv), sizeof *kv->head);
    kv->block = need(n_seqs, sizeof *kv->block);
    kv->block_bytes = need(n_seqs, sizeof *kv->block_bytes);
    return kv;
}

static void kv_clear(KV *kv, int seq) {
    free(kv->block[seq]);
    kv->block[seq] = NULL;
    kv->block_bytes[seq] = 0;
    memset(head_of(kv, seq, 0, 0), 0, n_heads_of(kv) * sizeof(Head));
}

static void kv_free(KV *kv) {
    if (!kv) return;
    for (int s = 0; s < kv->n_seqs; s++) kv_clear(kv, s);
    free(kv->head);
    free(kv->block);
    free(kv->block_bytes);
    free(kv);
}

// Points a head at its part of a block and returns the bytes of that part; block NULL: only counts.
static size_t head_layout(const KV *kv, Head *h, char *block) {
    size_t rows = pad64(h->cap * kv->slot_bytes), ints = pad64((size_t)h->cap * 4);
    if (block) {
        h->k = block; h->v = block + rows;
        h->pos = (int *)(block + 2 * rows); h->rot = (int *)(block + 2 * rows + ints);
        h->order = (int *)(block + 2 * rows + 2 * ints); h->score = (float *)(block + 2 * rows + 3 * ints);
    }
    return 2 * rows + 4 * ints;
}

static void kv_reserve(KV *kv, int seq, int extra) {
    Head *heads = head_of(kv, seq, 0, 0);
    size_t bytes = 0, at = 0;
    for (int i = 0; i < n_heads_of(kv); i++) bytes += head_layout(kv, &(Head){ .cap = heads[i].len + extra }, NULL);
    char *block = aligned_alloc(64, bytes ? bytes : 64);
    if (!block) die("compress more, or take a smaller image or --ctx", "out of memory for a cache of %zu bytes", bytes);
    for (int i = 0; i < n_heads_of(kv); i++) {
        Head *h = &heads[i], to = { .len = h->len, .cap = h->len + extra };
        at += head_layout(kv, &to, block + at);
        for (int j = 0; j < to.cap; j++) to.order[j] = j;
        for (int j = 0; j < h->len; j++) {
            int p = h->order[j];
            memcpy(to.k + j * kv->slot_bytes, h->k + p * kv->slot_bytes, kv->slot_bytes);
            memcpy(to.v + j * kv->slot_bytes, h->v + p * kv->slot_bytes, kv->slot_bytes);
            to.pos[j] = h->pos[p]; to.rot[j] = h->rot[p]; to.score[j] = h->score[p];
        }
        *h = to;
    }
    free(kv->block[seq]);
    kv->block[seq] = block;
    kv->block_bytes[seq] = bytes;
}

static void kv_copy(KV *kv, int to, int from) {
    if (to == from) return;
    kv_clear(kv, to);
    if (!kv->block[from]) return;
    size_t bytes = kv->block_bytes[from], at = 0;
    char *block = aligned_alloc(64, bytes ? bytes : 64);
    if (!block) die("run fewer sequences", "out of memory for a cache of %zu bytes", bytes);
    memcpy(block, kv->block[from], bytes);
    for (int i = 0; i < n_heads_of(kv); i++) {
        Head *h = head_of(kv, to, 0, 0) + i;
        *h = head_of(kv, from, 0, 0)[i];
        at += head_layout(kv, h, block + at);
    }
    kv->block[to] = block;
    kv->block_bytes[to] = bytes;
}

static size_t kv_bytes(const KV *kv) {
    size_t places = 0;
    for (int i = 0; i < kv->n_seqs * n_heads_of(kv); i++) places += kv->head[i].cap;
    return 2 * places * kv->slot_bytes;
}

static void kv_lens(const KV *kv, int seq, int *h_len) {
    for (int i = 0; i < n_heads_of(kv); i++) h_len[i] = head_of(kv, seq, 0, 0)[i].len;
}

static void kv_read(const KV *kv, int seq, int *h_pos, int *h_rot, float *h_score, float *h_k, float *h_v) {
    size_t at = 0;
    for (int i = 0; i < n_heads_of(kv); i++) {
        const Head *h = head_of(kv, seq, 0, 0) + i;
        for (int j = 0; j < h->len; j++, at++) {
            if (h_pos) h_pos[at] = h->pos[h->order[j]];
            if (h_rot) h_rot[at] = h->rot[h->order[j]];
            if (h_score) h_score[at] = h->score[h->order[j]];
            if (h_k) row_to_float(h_k + at * kv->head_dim, key_of(kv, h, j), NULL, kv->type, kv->head_dim);
            if (h_v) row_to_float(h_v + at * kv->head_dim, value_of(kv, h, j), NULL, kv->type, kv->head_dim);
        }
    }
}

static void kv_append(KV *kv, int layer, const float *qkv, const Rows *rows, int n_heads) {
    int d = kv->head_dim, G = kv->n_kv_heads;
    #pragma omp parallel for if ((double)rows->T * G * d > SMALL)
    for (int g = 0; g < G; g++)
        for (int t = 0; t < rows->T; t++) {
            Head *h = head_of(kv, rows->seq[t], layer, g);
            if (h->len == h->cap) die("reserve more before the pass", "cache: layer %d, sequence %d, head %d is full at %d slots", layer, rows->seq[t], g, h->cap);
            const float *k = qkv + ((size_t)t * (n_heads + 2 * G) + n_heads + g) * d;
            int p = h->order[h->len++];
            row_from_float(h->k + p * kv->slot_bytes, k, kv->type, d);
            row_from_float(h->v + p * kv->slot_bytes, k + (size_t)G * d, kv->type, d);
            h->pos[p] = rows->pos[t]; h->rot[p] = rows->rot[t]; h->score[p] = 0;
        }
}

static Slots slots_of(const KV *kv, const Head *h, const uint8_t *const *h_visible, int seq) {
    return (Slots){ .k = h->k, .v = h->v, .stride = kv->slot_bytes, .type = kv->type, .order = h->order, .pos = h->pos,
                    .visible = h_visible ? h_visible[seq] : NULL };
}
// How many slots, from the first, a query at pos may look at: those with a later token are behind.
static int n_until(const Head *h, int pos) {
    int n = h->len;
    while (n > 0 && h->pos[h->order[n - 1]] > pos) n--;
    return n;
}
static int longest(const KV *kv, int seq, int layer) {
    int most = 0;
    for (int g = 0; g < kv->n_kv_heads; g++) if (head_of(kv, seq, layer, g)->len > most) most = head_of(kv, seq, layer, g)->len;
    return most;
}
static inline size_t qkv_width(const KV *kv, int n_heads) { return (size_t)(n_heads + 2 * kv->n_kv_heads) * kv->head_dim; }

// A row as float: where it lies, or converted into `row`.
static inline const float *float_row(float *row, const char *data, Type type, int n) {
    if (type == F32) return (const float *)data;
    row_to_float(row, data, NULL, type, n);
    return row;
}

// One query row of one group against its cache, slot by slot in token order: n query heads read each key and value once.
// p: (n, slots) scratch
static void attend_row(float *o, float *lse, const float *q, int n, const KV *kv, Head *c, const Slots *s, int pos, bool vote, float *p) {
    int d = kv->head_dim, len = n_until(c, pos);
    float row[d], scale = 1 / sqrtf((float)d);
    for (int j = 0; j < len; j++) {
        bool hidden = s->visible && !s->visible[c->pos[c->order[j]]];
        const float *k = float_row(row, key_of(kv, c, j), kv->type, d);
        for (int h = 0; h < n; h++) p[(size_t)h * len + j] = hidden ? -INFINITY : scale * dot(q + (size_t)h * d, k, d);
    }
    for (int h = 0; h < n; h++) {
        float *ph = p + (size_t)h * len;
        V max = all(-INFINITY), sum = {0};
        for (int j = 0; j < len; j += 16) max = max_v(len - j < 16 ? pick((Vi)load_n(ph + j, len - j) == 0, max, load_n(ph + j, len - j)) : load(ph + j), max);
        float top = -INFINITY, total;
        for (int i = 0; i < 16; i++) top = max[i] > top ? max[i] : top;
        for (int j = 0; j < len; j++) top = ph[j] > top ? ph[j] : top;
        if (top == -INFINITY) top = 0;
        for (int j = 0; j < len; j += 16) {
            V e = exp_v(load_n(ph + j, len - j) - top);
            store_n(ph + j, e, len - j);
            sum += load_n(ph + j, len - j);                            // lanes past the end are 0 again
        }
        total = sum_v(sum);
        lse[h] = top + logf(total);
        V factor = all(total > 0 ? 1 / total : 0);
        for (int j = 0; j < len; j += 16) store_n(ph + j, load_n(ph + j, len - j) * factor, len - j);
    }
    memset(o, 0, (size_t)n * d * sizeof *o);
    for (int j = 0; j < len; j++) {
        const float *v = float_row(row, value_of(kv, c, j), kv->type, d);
        float given = 0;
        for (int h = 0; h < n; h++) {
            float ph = p[(size_t)h * len + j], *oh = o + (size_t)h * d;
            given += ph;
            for (int i = 0; i < d; i += 16) store_n(oh + i, load_n(oh + i, d - i) + load_n(v + i, d - i) * ph, d - i);
        }
        if (vote) c->score[c->order[j]] += given / n;
    }
}

static void kv_attend(float *o, float *lse, KV *kv, int layer, const float *qkv, const Rows *rows, int n_heads,
                      const uint8_t *const *h_visible, bool vote) {
    int d = kv->head_dim, G = kv->n_kv_heads, group = n_heads / G, T = rows->T, most = 0;
    size_t width = qkv_width(kv, n_heads);
    if (T == rows->B) {                                                // a decode step: a row, its sequence, its heads
        for (int t = 0; t < T; t++) { int n = longest(kv, rows->seq[t], layer); most = n > most ? n : most; }
        size_t bytes = (size_t)group * most * sizeof(float);
        char *own = thread_scratch(bytes);
        #pragma omp parallel for schedule(dynamic) collapse(2) if ((double)T * n_heads * most * d > SMALL)
        for (int t = 0; t < T; t++)
            for (int g = 0; g < G; g++) {
                Head *c = head_of(kv, rows->seq[t], layer, g);
                Slots s = slots_of(kv, c, h_visible, rows->seq[t]);
                size_t h = (size_t)t * n_heads + g * group;
                attend_row(o + h * d, lse + h, qkv + t * width + (size_t)g * group * d, group, kv, c, &s, rows->pos[t], vote, mine(own, bytes));
            }
        return;
    }
    most = longest(kv, rows->seq[0], layer);                           // a prompt: a head, a block of queries
    size_t bytes = attend_bytes(most, d);
    char *own = thread_scratch(bytes);
    #pragma omp parallel for schedule(dynamic) collapse(2) if ((double)T * n_heads * most * d > SMALL)
    for (int h = 0; h < n_heads; h++)
        for (int t = 0; t < T; t += Q_BLOCK) {
            const Head *c = head_of(kv, rows->seq[0], layer, h / group);
            Slots s = slots_of(kv, c, h_visible, rows->seq[0]);
            int n = T - t < Q_BLOCK ? T - t : Q_BLOCK, q_pos[Q_BLOCK];
            for (int i = 0; i < Q_BLOCK; i++) q_pos[i] = rows->pos[t + (i < n ? i : n - 1)];
            attend_block(o + ((size_t)t * n_heads + h) * d, (size_t)n_heads * d, lse + (size_t)t * n_heads + h, n_heads, qkv + t * width + (size_t)h * d, width,
                         q_pos, n, &s, n_until(c, q_pos[n - 1]), d, mine(own, bytes));
        }
}

// p[j - j0][query] = exp(logit - lse) of query head h for slots j0 … j1-1 and rows t … t+n-1 of a pass; 0 in the lanes past n.
static void probabilities(float *p, const KV *kv, const Slots *s, int j0, int j1, const float *qkv, const float *lse, const Rows *rows,
                          int n_heads, int h, int t, int n, float *own) {
    int d = kv->head_dim, q_pos[Q_BLOCK];
    float *queries = own, *panel = own + (size_t)up16(d) * Q_BLOCK, l[Q_BLOCK];
    for (int i = 0; i < Q_BLOCK; i++) {
        q_pos[i] = rows->pos[t + (i < n ? i : n - 1)];
        l[i] = i < n ? lse[(size_t)(t + i) * n_heads + h] : INFINITY;
        if (l[i] == -INFINITY) l[i] = 0;                               // it saw nothing: all its logits are -INFINITY
    }
    pack_queries(queries, qkv + t * qkv_width(kv, n_heads) + (size_t)h * d, qkv_width(kv, n_heads), n, d, 1 / sqrtf((float)d));
    logits(p, queries, s, j0, j1, d, q_pos, panel);
    for (int j = 0; j < j1 - j0; j++)
        for (int i = 0; i < Q_BLOCK; i += 16) store(p + (size_t)j * Q_BLOCK + i, exp_v(load(p + (size_t)j * Q_BLOCK + i) - load(l + i)));
}
enum { J_BLOCK = 8 * M_MAX };    // slots of a task
static size_t probabilities_bytes(int head_dim) { return ((size_t)up16(head_dim) * (Q_BLOCK + 16) + J_BLOCK * Q_BLOCK) * sizeof(float); }

// (n_heads, most): what rows t0 … T-1 gave to every slot, head by head; valid until the next call
static float *given_by_heads(const KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads,
                             const uint8_t *const *h_visible, int t0, int most) {
    float *sums = scratch(S_SUMS, (size_t)n_heads * most * sizeof *sums);
    size_t bytes = probabilities_bytes(kv->head_dim);
    char *own = thread_scratch(bytes);
    #pragma omp parallel for schedule(dynamic) collapse(2) if ((double)(rows->T - t0) * n_heads * most * kv->head_dim > SMALL)
    for (int h = 0; h < n_heads; h++)
        for (int j0 = 0; j0 < most; j0 += J_BLOCK) {
            const Head *c = head_of(kv, rows->seq[0], layer, h / (n_heads / kv->n_kv_heads));
            Slots s = slots_of(kv, c, h_visible, rows->seq[0]);
            int j1 = j0 + J_BLOCK < c->len ? j0 + J_BLOCK : c->len;
            float *p = mine(own, bytes);
            V sum[J_BLOCK] = {0};
            for (int t = t0; t < rows->T; t += Q_BLOCK) {
                int n = rows->T - t < Q_BLOCK ? rows->T - t : Q_BLOCK;
                if (j0 >= j1 || rows->pos[t + n - 1] < c->pos[c->order[j0]]) continue;
                probabilities(p, kv, &s, j0, j1, qkv, lse, rows, n_heads, h, t, n, p + J_BLOCK * Q_BLOCK);
                for (int j = 0; j < j1 - j0; j++)
                    for (int i = 0; i < Q_BLOCK; i += 16) sum[j] += load(p + j * Q_BLOCK + i);
            }
            for (int j = j0; j < j1; j++) sums[(size_t)h * most + j] = sum_v(sum[j - j0]);
        }
    return sums;
}

static void kv_vote(KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads,
                    const uint8_t *const *h_visible, int n) {
    if (n <= 0) return;
    int group = n_heads / kv->n_kv_heads, most = longest(kv, rows->seq[0], layer);
    float *sums = given_by_heads(kv, layer, qkv, lse, rows, n_heads, h_visible, rows->T - n, most);
    for (int g = 0; g < kv->n_kv_heads; g++) {
        Head *c = head_of(kv, rows->seq[0], layer, g);
        for (int j = 0; j < c->len; j++) {
            float sum = 0;
            for (int h = g * group; h < (g + 1) * group; h++) sum += sums[(size_t)h * most + j];
            c->score[c->order[j]] += sum / group;
        }
    }
}

// Slot j of head 0 is slot match[j] of head c, the one of the same token; -1: c does not hold it
static void match_slots(int *match, const Head *first, const Head *c) {
    for (int i = 0, j = 0; j < first->len; j++) {
        while (i < c->len && c->pos[c->order[i]] < first->pos[first->order[j]]) i++;
        match[j] = i < c->len && c->pos[c->order[i]] == first->pos[first->order[j]] ? i : -1;
    }
}

static void kv_column_sums(float *h_out, const KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads,
                           const uint8_t *const *h_visible, int n) {
    int group = n_heads / kv->n_kv_heads, most = longest(kv, rows->seq[0], layer);
    const Head *first = head_of(kv, rows->seq[0], layer, 0);
    float *sums = given_by_heads(kv, layer, qkv, lse, rows, n_heads, h_visible, rows->T - n, most);
    int match[first->len + 1];
    memset(h_out, 0, (size_t)first->len * sizeof *h_out);
    for (int h = 0; h < n_heads; h++) {
        if (h % group == 0) match_slots(match, first, first + h / group);
        for (int j = 0; j < first->len; j++) if (match[j] >= 0) h_out[j] += sums[(size_t)h * most + match[j]];
    }
    for (int j = 0; j < first->len; j++) h_out[j] /= n_heads;
}

static void kv_map(float *h_out, const KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads,
                   const uint8_t *const *h_visible) {
    int group = n_heads / kv->n_kv_heads, most = longest(kv, rows->seq[0], layer);
    const Head *first = head_of(kv, rows->seq[0], layer, 0);
    size_t bytes = probabilities_bytes(kv->head_dim) + (size_t)most * Q_BLOCK * sizeof(float);
    char *own = thread_scratch(bytes);
    memset(h_out, 0, (size_t)rows->T * first->len * sizeof *h_out);
    #pragma omp parallel for schedule(dynamic) if ((double)rows->T * n_heads * most * kv->head_dim > SMALL)
    for (int t = 0; t < rows->T; t += Q_BLOCK) {
        int n = rows->T - t < Q_BLOCK ? rows->T - t : Q_BLOCK, match[first->len + 1];
        float *p = mine(own, bytes);
        for (int h = 0; h < n_heads; h++) {
            const Head *c = first + h / group;
            Slots s = slots_of(kv, c, h_visible, rows->seq[0]);
            match_slots(match, first, c);
            probabilities(p, kv, &s, 0, c->len, qkv, lse, rows, n_heads, h, t, n, p + (size_t)most * Q_BLOCK);
            for (int i = 0; i < n; i++)
                for (int j = 0; j < first->len; j++)
                    if (match[j] >= 0) h_out[(size_t)(t + i) * first->len + j] += p[(size_t)match[j] * Q_BLOCK + i] / n_heads;
        }
    }
}

static void kv_scores_clear(KV *kv, int seq) {
    for (int i = 0; i < n_heads_of(kv); i++) {
        Head *h = head_of(kv, seq, 0, 0) + i;
        if (h->cap) memset(h->score, 0, (size_t)h->cap * sizeof *h->score);
    }
}

// The best kept slot for each leaving slot of one head. unit: (len, head_dim) keys of length 1, slot[0 … n_keep-1] those that
// are kept, behind them those that leave; own: panels of the kept ones and one of leaving ones
static void nearest_of(int *into, float *w, const float *unit, const int *slot, int n_keep, int n_leave, int d, float *own) {
    size_t wide = (size_t)up16(d) * 16;
    float *panel = own + up32(n_keep) / 16 * wide, cosines[M_MAX * N_TILE];
    const float *row[16];
    const uint16_t *scale[16] = {0};
    for (int j = 0; j < up32(n_keep); j += 16) {
        for (int r = 0; r < 16; r++) row[r] = unit + (size_t)slot[j + r < n_keep ? j + r : n_keep - 1] * d;
        pack(own + j / 16 * wide, (const char *const *)row, scale, F32, 1, 0, d);
    }
    Vi lane = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 };
    for (int g = 0; g < n_groups(n_leave); g++) {
        int i0 = group_at(n_leave, g), n = group_at(n_leave, g + 1) - i0;
        const int *leave = slot + n_keep + i0;
        V best[M_MAX][2];
        Vi at[M_MAX][2];
        for (int m = 0; m < M_MAX; m++) for (int x = 0; x < 2; x++) { best[m][x] = all(-INFINITY); at[m][x] = lane + 16 * x; }
        for (int r = 0; r < 16; r++) row[r] = unit + (size_t)leave[r < n ? r : n - 1] * d;
        pack(panel, (const char *const *)row, scale, F32, 1, 0, d);
        for (int j = 0; j < n_keep; j += N_TILE) {
            tile(cosines, N_TILE, panel, 16, own + j / 16 * wide, own + (j / 16 + 1) * wide, 16, d, false, n);
            for (int m = 0; m < n; m++)
                for (int x = 0; x < 2; x++) {
                    V c = load(cosines + m * N_TILE + 16 * x);
                    Vi better = c > best[m][x];
                    best[m][x] = pick(better, c, best[m][x]);
                    at[m][x] = ((lane + (j + 16 * x)) & better) | (at[m][x] & ~better);
                }
        }
        for (int m = 0; m < n; m++) {
            int arg = 0;
            float top = -INFINITY;
            for (int i = 0; i < 32; i++) {
                float c = best[m][i / 16][i % 16];
                int j = at[m][i / 16][i % 16];
                if (c > top || (c == top && j < arg)) { top = c; arg = j; }
            }
            into[leave[m]] = slot[arg];
            w[leave[m]] = top;
        }
    }
}

static void kv_nearest(int *h_into, float *h_w, const KV *kv, int seq, int layer, const bool *h_keep) {
    int d = kv->head_dim, most = longest(kv, seq, layer);
    Head *heads = head_of(kv, seq, layer, 0);
    size_t bytes = ((size_t)most * (d + 1) + (size_t)(up32(most) + 16) * up16(d)) * sizeof(float);
    char *own = thread_scratch(bytes);
    #pragma omp parallel for schedule(dynamic) if ((double)most * most * d * kv->n_kv_heads > SMALL)
    for (int g = 0; g < kv->n_kv_heads; g++) {
        const Head *h = &heads[g];
        size_t at = 0;
        for (int i = 0; i < g; i++) at += heads[i].len;
        float *panels = mine(own, bytes), *unit = panels + (size_t)(up32(most) + 16) * up16(d);
        int *slot = (int *)(unit + (size_t)most * d), n_keep = 0, n = 0;
        for (int j = 0; j < h->len; j++) {
            float *u = unit + (size_t)j * d, norm;
            row_to_float(u, key_of(kv, h, j), NULL, kv->type, d);
            norm = sqrtf(dot(u, u, d));
            for (int i = 0; i < d; i++) u[i] *= norm > 0 ? 1 / norm : 0;
            if (h_keep[at + j]) slot[n_keep++] = j;
        }
        for (int j = 0; j < h->len; j++) if (!h_keep[at + j]) slot[n_keep + n++] = j;
        if (n_keep) nearest_of(h_into + at, h_w + at, unit, slot, n_keep, n, d, panels);
        else for (int j = 0; j < h->len; j++) { h_into[at + j] = -1; h_w[at + j] = 0; }
    }
}

// Keeps the slots with keep true: order becomes the kept slots, then the places of those that left, then those that were free.
static void head_keep(Head *h, const bool *keep, int *tmp) {
    int n = 0, gone = 0;
    for (int j = 0; j < h->len; j++)
        if (keep[j]) h->order[n++] = h->order[j];
        else tmp[gone++] = h->order[j];
    if (gone) memcpy(h->order + n, tmp, gone * sizeof *tmp);
    h->len = n;
}

// The merges of one head: sums are built beside the cache, so that every source is read unmerged.
// sums: (targets, head_dim)   at: (len,) row of a slot's sum, -1: nothing joins it   n: (len,) how many do
static void head_merge(const KV *kv, Head *h, const bool *keep, const int *into, const float *w, float self, float *sums, int *at, int *n) {
    int d = kv->head_dim;
    float source[d], target[d];
    for (int x = 0; x < 2; x++) {                                      // keys, then values
        char *(*data)(const KV *, const Head *, int) = x ? value_of : key_of;
        int targets = 0;
        for (int j = 0; j < h->len; j++) { at[j] = -1; n[j] = 0; }
        for (int i = 0; i < h->len; i++) {
            int j = into[i];
            if (j < 0 || !keep[j]) continue;
            row_to_float(source, data(kv, h, i), NULL, kv->type, d);
            row_to_float(target, data(kv, h, j), NULL, kv->type, d);
            if (at[j] < 0) memcpy(sums + (size_t)(at[j] = targets++) * d, target, d * sizeof *target);
            float *sum = sums + (size_t)at[j] * d;
            for (int e = 0; e < d; e++) sum[e] += w[i] * source[e] + self * target[e];
            n[j]++;
        }
        for (int j = 0; j < h->len; j++) {
            if (at[j] < 0) continue;
            float *sum = sums + (size_t)at[j] * d;
            for (int e = 0; e < d; e++) sum[e] /= (float)(1 + n[j]);
            row_from_float(data(kv, h, j), sum, kv->type, d);
        }
    }
}

// Turns every key from its rotary position to its slot: by the angle of d = slot - rot, row |d| of the table, sin with d's sign.
static void head_renumber(const KV *kv, Head *h, const float *cos_sin) {
    int half = kv->head_dim / 2;
    float u[kv->head_dim];
    for (int j = 0; j < h->len; j++) {
        int d = j - h->rot[h->order[j]];
        if (!d) continue;
        const float *cs = cos_sin + (size_t)abs(d) * kv->head_dim;
        row_to_float(u, key_of(kv, h, j), NULL, kv->type, kv->head_dim);
        for (int i = 0; i < half; i++) {
            float a = u[i], b = u[i + half], c = cs[2 * i], s = d < 0 ? -cs[2 * i + 1] : cs[2 * i + 1];
            u[i] = a * c - b * s;
            u[i + half] = b * c + a * s;
        }
        row_from_float(key_of(kv, h, j), u, kv->type, kv->head_dim);
        h->rot[h->order[j]] = j;
    }
}

static void kv_apply(KV *kv, int seq, const bool *h_keep, const int *h_into, const float *h_w, float self, const float *cos_sin) {
    Head *heads = head_of(kv, seq, 0, 0);
    int most = 0, n_heads = n_heads_of(kv);
    size_t at[n_heads + 1];
    at[0] = 0;
    for (int i = 0; i < n_heads; i++) {
        at[i + 1] = at[i] + heads[i].len;
        most = heads[i].len > most ? heads[i].len : most;
    }
    size_t bytes = (size_t)most * (kv->head_dim + 2) * sizeof(float);
    char *own = thread_scratch(bytes);
    #pragma omp parallel for schedule(dynamic, 4) if ((double)at[n_heads] * kv->head_dim > SMALL)
    for (int i = 0; i < n_heads; i++) {
        float *sums = mine(own, bytes);
        int *tmp = (int *)(sums + (size_t)most * kv->head_dim);
        if (h_into) head_merge(kv, &heads[i], h_keep + at[i], h_into + at[i], h_w + at[i], self, sums, tmp, tmp + most);
        head_keep(&heads[i], h_keep + at[i], tmp);
        if (cos_sin) head_renumber(kv, &heads[i], cos_sin);
    }
}

static void head_drop(Head *h, int slot) {
    int p = h->order[slot];
    memmove(h->order + slot, h->order + slot + 1, (h->len - slot - 1) * sizeof *h->order);
    h->order[--h->len] = p;
}

static void kv_drop(KV *kv, int seq, const int *h_slot) {
    for (int i = 0; i < n_heads_of(kv); i++) if (h_slot[i] >= 0) head_drop(head_of(kv, seq, 0, 0) + i, h_slot[i]);
}

static void kv_drop_lowest(KV *kv, int seq, int lo, int from_end) {
    #pragma omp parallel for if (n_heads_of(kv) > 64)
    for (int i = 0; i < n_heads_of(kv); i++) {
        Head *h = head_of(kv, seq, 0, 0) + i;
        int least = -1;
        for (int j = lo; j < h->len - from_end; j++)
            if (least < 0 || h->score[h->order[j]] < h->score[h->order[least]]) least = j;
        if (least >= 0) head_drop(h, least);
    }
}

static void cosine(float *h_out, const float *a, int n, const float *b, int m, int dim) {
    #pragma omp parallel for if ((double)n * m * dim > SMALL)
    for (int i = 0; i < n; i++)
        for (int c = 0; c < m; c++) {
            const float *x = a + (size_t)i * dim, *y = b + (size_t)c * dim;
            h_out[(size_t)i * m + c] = dot(x, y, dim) / (fmaxf(sqrtf(dot(x, x, dim)), 1e-12f) * fmaxf(sqrtf(dot(y, y, dim)), 1e-12f));
        }
}

// ----------------------------------------------------------------------------
// the table

static bool replay(uint64_t key) { (void)key; return false; }
static void record(uint64_t key) { (void)key; }
static void stop(void) {}

const Kernels cpu = {
    .name = "cpu",
    .alloc = mem_alloc, .release = mem_release, .weight = weight, .put = put, .get = get,
    .embed = embed, .rows_copy = rows_copy, .rmsnorm = rmsnorm, .layernorm = layernorm, .silu_mul = silu_mul,
    .matmul = matmul, .rope = rope, .attend = attend,
    .kv_new = kv_new, .kv_free = kv_free, .kv_reserve = kv_reserve, .kv_clear = kv_clear, .kv_copy = kv_copy, .kv_bytes = kv_bytes,
    .kv_lens = kv_lens, .kv_read = kv_read, .kv_append = kv_append, .kv_attend = kv_attend, .kv_vote = kv_vote,
    .kv_column_sums = kv_column_sums, .kv_map = kv_map, .kv_scores_clear = kv_scores_clear, .kv_nearest = kv_nearest,
    .kv_apply = kv_apply, .kv_drop = kv_drop, .kv_drop_lowest = kv_drop_lowest, .cosine = cosine,
    .replay = replay, .record = record, .stop = stop,
};

#ifndef HAVE_CUDA
const Kernels *cuda(void) {
    fprintf(stderr, "cuda: not built in (make found no nvcc)\n");
    return NULL;
}
#endif
