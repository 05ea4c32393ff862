// bench.c: how fast the kernels are, beside what this machine can do at most. No model file: random weights in the shapes of
// LLaVA-1.5-7B, the operations in the order of its forward pass. A read of memory moves by a factor of 1.6 within minutes on
// shared machines, so every decode figure stands beside a read taken in the same second: the median of five such pairs.
//
//     make build/bench && build/bench            4 layers and the vocabulary head, the whole vision tower, all weight types
//     build/bench --quick                        1 layer, fewer repetitions, 2 layers of vision, f16 and q8_0 alone

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
#endif
#include "error.h"
#include "kernels.h"
#include "test.h"

const Kernels *K = &cpu;

enum { DIM = 4096, HIDDEN = 11008, HEADS = 32, HEAD_DIM = 128, VOCAB = 32064, PROMPT = 620,
       V_DIM = 1024, V_HIDDEN = 4096, V_HEADS = 16, V_ROWS = 577, PATCHES = 576, CONTEXT = 1024 };

// -DCLOCK=CLOCK_PROCESS_CPUTIME_ID and OMP_NUM_THREADS=1: for a machine where other programs run
#ifndef CLOCK
#define CLOCK CLOCK_MONOTONIC
#endif
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static int by_size(const void *a, const void *b) { double x = *(const double *)a, y = *(const double *)b; return (x > y) - (x < y); }
static double median(double *x, int n) { qsort(x, n, sizeof *x, by_size); return x[n / 2]; }

// ----------------------------------------------------------------------------
// the two roofs, every thread at once

typedef float V __attribute__((vector_size(64)));
typedef long long Vl __attribute__((vector_size(64)));
static volatile float sink;

// a += m m. Tests are built without contraction, so that the instruction must be asked for; elsewhere the roof may stand too low.
#ifdef __AVX512F__
#define FMA(a) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+v"(a) : "v"(m))
#else
#define FMA(a) a += m * m
#endif

// Twelve chains of multiply-adds that never leave the registers: GFLOP/s of all threads.
static double peak(long n) {
    double begin = now(), flops = 0;
    #pragma omp parallel reduction(+ : flops)
    {
        V a = {0}, b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a, k = a, l = a, m = a + 1e-3f;
        for (long t = 0; t < n; t++) {
            FMA(a); FMA(b); FMA(c); FMA(d); FMA(e); FMA(f); FMA(g); FMA(h); FMA(i); FMA(j); FMA(k); FMA(l);
        }
        a += b + c + d + e + f + g + h + i + j + k + l;
        sink = a[0];
        flops += (double)n * 12 * 32;
    }
    return flops / (now() - begin) * 1e-9;
}

// Reads `bytes` of memory with every thread, from `streams` places at once: GB/s.
static double read_streams(const char *p, size_t bytes, int streams) {
    double begin = now();
    #pragma omp parallel
    {
        size_t part = bytes / omp_get_max_threads() / streams / 256 * 256;
        const char *at = p + part * streams * omp_get_thread_num();
        Vl a = {0}, b = a, c = a, d = a;
        for (size_t i = 0; i < part; i += 256)
            for (int s = 0; s < streams; s++) {
                const char *x = at + s * part + i;
                const Vl *v = (const Vl *)x;
                a ^= v[0]; b ^= v[1]; c ^= v[2]; d ^= v[3];
            }
        a ^= b ^ c ^ d;
        sink = (float)a[0];
    }
    return (double)bytes / (now() - begin) * 1e-9;
}
// The roof: the best of one, four and eight streams a thread. One leaves misses of the core unused on some machines, eight lose pages on others.
static double read_memory(const char *p, size_t bytes) {
    double best = 0;
    for (int streams = 1; streams <= 8; streams += streams == 1 ? 3 : 4) {
        double rate = read_streams(p, bytes, streams);
        if (rate > best) best = rate;
    }
    return best;
}

// ----------------------------------------------------------------------------
// random weights: one block for all types, filled with small numbers in that type

static char *weights;
static size_t n_weights, used, weight_bytes;      // weight_bytes: what the matrices made so far take

// Sign and mantissa at random, the exponent that of 2^-7; Q8_0: any byte.
static void fill(Type type) {
    static const uint32_t exponent[N_TYPES] = { 0x3c000000, 0x20002000, 0x3c003c00, 0 }, any[N_TYPES] = { 0x807fffff, 0x83ff83ff, 0x807f807f, 0xffffffff };
    #pragma omp parallel for
    for (size_t i = 0; i < n_weights / 4; i++) {
        uint32_t r = (uint32_t)i * 2654435761u;
        ((uint32_t *)weights)[i] = exponent[type] | ((r ^ r >> 15) & any[type]);
    }
    used = 0;
}
static Mat matrix(Type type, int rows, int cols) {
    static uint16_t *scale;
    if (!scale) {
        scale = K->alloc((size_t)VOCAB * scale_row_bytes(HIDDEN));
        for (size_t i = 0; i < (size_t)VOCAB * scale_row_bytes(HIDDEN) / 2; i++) scale[i] = 0x0c00;      // 2^-12
    }
    size_t bytes = rows * row_bytes(type, cols);
    if (used + bytes > n_weights) used = 0;
    Mat w = K->weight(type, rows, cols, weights + used, type == Q8_0 ? scale : NULL);
    used += bytes;
    weight_bytes += (size_t)((double)rows * cols * (type == Q8_0 ? 1 + 2 / 32.0 : type_bytes[type]));
    return w;
}

// ----------------------------------------------------------------------------
// a language model's layers, as forward() calls them

typedef struct { Mat wqkv, wo, w13, w2; } Layer;
typedef struct { Layer layer[4]; Mat head; int n_layers; size_t bytes; } Llama;
typedef struct { float *x, *xb, *qkv, *lse, *w13x, *hidden, *logits, *ones, *cos_sin; int *zero, *pos; } State;

static Llama llama(Type type, int n_layers) {
    Llama m = { .n_layers = n_layers };
    fill(type);
    weight_bytes = 0;
    for (int l = 0; l < n_layers; l++)
        m.layer[l] = (Layer){ matrix(type, 3 * DIM, DIM), matrix(type, DIM, DIM), matrix(type, 2 * HIDDEN, DIM), matrix(type, DIM, HIDDEN) };
    m.head = matrix(type, VOCAB, DIM);
    m.bytes = weight_bytes;
    return m;
}

static void forward(const Llama *m, const State *s, KV *kv, int pos, int T) {
    Rows rows = { T, 1, s->zero, s->zero, s->pos + pos, s->pos + pos };
    for (int l = 0; l < m->n_layers; l++) {
        const Layer *w = &m->layer[l];
        K->rmsnorm(s->xb, s->x, s->ones, T, DIM, 1e-5f);
        K->matmul(s->qkv, s->xb, w->wqkv, NULL, ACT_NONE, false, T);
        K->rope(s->qkv, s->cos_sin, NULL, &rows, HEADS, HEADS, HEAD_DIM);
        K->kv_append(kv, l, s->qkv, &rows, HEADS);
        K->kv_attend(s->xb, s->lse, kv, l, s->qkv, &rows, HEADS, NULL, false);
        K->matmul(s->x, s->xb, w->wo, NULL, ACT_NONE, true, T);
        K->rmsnorm(s->xb, s->x, s->ones, T, DIM, 1e-5f);
        K->matmul(s->w13x, s->xb, w->w13, NULL, ACT_NONE, false, T);
        K->silu_mul(s->hidden, s->w13x, T, HIDDEN);
        K->matmul(s->x, s->hidden, w->w2, NULL, ACT_NONE, true, T);
    }
    K->rmsnorm(s->xb, s->x + (size_t)(T - 1) * DIM, s->ones, 1, DIM, 1e-5f);
    K->matmul(s->logits, s->xb, m->head, NULL, ACT_NONE, false, 1);
}

static void fresh_x(const State *s) {
    uint64_t seed = 2;
    for (int i = 0; i < PROMPT * DIM; i++) s->x[i] = (float)(rnd(&seed) - 0.5);
}

static void bench_llama(Type type, const char *name, const State *s, int n_layers, int pairs) {
    Llama m = llama(type, n_layers);
    KV *kv = K->kv_new(n_layers, HEADS, HEAD_DIM, 1, F16);
    double part[9], rate[9], flops = 2.0 * PROMPT * n_layers * (4.0 * DIM * DIM + 3.0 * DIM * HIDDEN) + 2.0 * DIM * VOCAB + 2.0 * n_layers * PROMPT * (PROMPT + 1.0) * DIM;
    for (int i = 0; i < pairs; i++) {
        fresh_x(s);
        K->kv_clear(kv, 0);
        K->kv_reserve(kv, 0, CONTEXT);
        double roof = peak(10000000), begin = now();
        forward(&m, s, kv, 0, PROMPT);
        rate[i] = flops / (now() - begin) * 1e-9;
        part[i] = rate[i] / roof;
    }
    printf("  %-6s prompt, %d rows     %7.1f GFLOP/s  %5.1f %% of FMA\n", name, PROMPT, median(rate, pairs), 100 * median(part, pairs));
    int steps = pairs > 1 ? 4 : 2;
    double per_step = (double)m.bytes + 2.0 * n_layers * (PROMPT + pairs * steps / 2) * DIM * 2;             // the cache is read too
    fresh_x(s);
    forward(&m, s, kv, PROMPT, 1);
    for (int i = 0, pos = PROMPT + 1; i < 5; i++) {
        double roof = read_memory(weights, n_weights < 1u << 30 ? n_weights : 1u << 30), begin = now();
        for (int t = 0; t < steps; t++) forward(&m, s, kv, pos++, 1);
        rate[i] = per_step * steps / (now() - begin) * 1e-9;
        part[i] = rate[i] / roof;
    }
    printf("  %-6s decode              %7.1f GB/s     %5.1f %% of a read beside it\n", name, median(rate, 5), 100 * median(part, 5));
    fflush(stdout);
    K->kv_free(kv);
}

// ----------------------------------------------------------------------------
// the vision tower (ViT-L/14 at 336 pixels) and its projector

static void bench_vision(Type type, const char *name, const State *s, int n_layers, int reps) {
    fill(type);
    Mat wqkv = matrix(type, 3 * V_DIM, V_DIM), wo = matrix(type, V_DIM, V_DIM), w1 = matrix(type, V_HIDDEN, V_DIM), w2 = matrix(type, V_DIM, V_HIDDEN);
    Mat proj1 = matrix(type, DIM, V_DIM), proj2 = matrix(type, DIM, DIM);
    double rate[9], part[9], T = V_ROWS;
    double flops = n_layers * (2 * T * (4.0 * V_DIM * V_DIM + 2.0 * V_DIM * V_HIDDEN) + 4 * T * T * V_DIM) + 2.0 * PATCHES * (V_DIM * (double)DIM + (double)DIM * DIM);
    for (int i = 0; i < reps; i++) {
        fresh_x(s);
        double roof = peak(10000000), begin = now();
        for (int l = 0; l < n_layers; l++) {
            K->layernorm(s->xb, s->x, s->ones, s->ones, V_ROWS, V_DIM, 1e-5f);
            K->matmul(s->qkv, s->xb, wqkv, s->ones, ACT_NONE, false, V_ROWS);
            K->attend(s->xb, s->qkv, 3 * V_DIM, s->qkv + V_DIM, s->qkv + 2 * V_DIM, 3 * V_DIM, V_ROWS, V_ROWS, V_HEADS, V_DIM / V_HEADS);
            K->matmul(s->x, s->xb, wo, s->ones, ACT_NONE, true, V_ROWS);
            K->layernorm(s->xb, s->x, s->ones, s->ones, V_ROWS, V_DIM, 1e-5f);
            K->matmul(s->w13x, s->xb, w1, s->ones, ACT_QUICK_GELU, false, V_ROWS);
            K->matmul(s->x, s->w13x, w2, s->ones, ACT_NONE, true, V_ROWS);
        }
        K->matmul(s->qkv, s->x + V_DIM, proj1, s->ones, ACT_GELU, false, PATCHES);
        K->matmul(s->w13x, s->qkv, proj2, s->ones, ACT_NONE, false, PATCHES);
        rate[i] = flops / (now() - begin) * 1e-9;
        part[i] = rate[i] / roof;
    }
    printf("  %-6s vision, %2d layers    %7.1f GFLOP/s  %5.1f %% of FMA\n", name, n_layers, median(rate, reps), 100 * median(part, reps));
    fflush(stdout);
}

// LOOK-M's merge at its real size: 32 layers of 32 heads of 640 slots, a fifth of which stay
static void bench_nearest(const State *s, int n_layers, int reps) {
    enum { SLOTS = 640, N = HEADS * SLOTS };
    KV *kv = K->kv_new(1, HEADS, HEAD_DIM, 1, F16);
    bool *keep = need(N, 1);
    int *into = need(N, sizeof *into);
    float *w = need(N, sizeof *w);
    uint64_t seed = 3;
    for (int i = 0; i < 3 * DIM * PROMPT; i++) s->qkv[i] = (float)(rnd(&seed) - 0.5);
    K->kv_reserve(kv, 0, SLOTS);
    K->kv_append(kv, 0, s->qkv, &(Rows){ PROMPT, 1, s->zero, s->zero, s->pos, s->pos }, HEADS);
    K->kv_append(kv, 0, s->qkv, &(Rows){ SLOTS - PROMPT, 1, s->zero, s->zero, s->pos + PROMPT, s->pos + PROMPT }, HEADS);
    for (int i = 0; i < N; i++) keep[i] = i % 5 == 0;
    double rate[9], part[9], flops = 2.0 * n_layers * HEADS * (SLOTS / 5) * (SLOTS - SLOTS / 5) * HEAD_DIM;
    for (int i = 0; i < reps; i++) {
        double roof = peak(10000000), begin = now();
        for (int l = 0; l < n_layers; l++) K->kv_nearest(into, w, kv, 0, 0, keep);
        rate[i] = flops / (now() - begin) * 1e-9;
        part[i] = rate[i] / roof;
    }
    printf("  kv_nearest, %4d heads      %7.1f GFLOP/s  %5.1f %% of FMA\n", n_layers * HEADS, median(rate, reps), 100 * median(part, reps));
    K->kv_free(kv);
    free(keep);
    free(into);
    free(w);
}

static void print_cpu(void) {
    char line[256], name[256] = "unknown CPU";
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "model name : %255[^\n]", name) == 1) break;
    if (f) fclose(f);
    printf("%s, %d threads\n", name, omp_get_max_threads());
}

int main(int argc, char **argv) {
    if (!getenv("OMP_WAIT_POLICY")) {                    // threads that spin halve what decoding reaches beside any other program
        setenv("OMP_WAIT_POLICY", "passive", 1);
        execv("/proc/self/exe", argv);                   // elsewhere it fails: measured as the library likes to wait
    }
    bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    if (argc > 1 && !quick) die("build/bench [--quick]", "%s: unknown option", argv[1]);
    static const char *const names[N_TYPES] = { "f32", "f16", "bf16", "q8_0" };
    int n_layers = quick ? 1 : 4, reps = quick ? 1 : 3;
    n_weights = (size_t)n_layers * (4ul * DIM * DIM + 3ul * DIM * HIDDEN) * 4 + (size_t)VOCAB * DIM * 4;
    weights = K->alloc(n_weights + 4096);
    State s = { .x = K->alloc(PROMPT * DIM * 4), .xb = K->alloc(PROMPT * DIM * 4), .qkv = K->alloc(PROMPT * 3 * DIM * 4ul), .lse = K->alloc(PROMPT * HEADS * 4),
                .w13x = K->alloc(PROMPT * 2 * HIDDEN * 4ul), .hidden = K->alloc(PROMPT * HIDDEN * 4ul), .logits = K->alloc(VOCAB * 4), .ones = K->alloc(HIDDEN * 4),
                .cos_sin = K->alloc(CONTEXT * HEAD_DIM * 4), .zero = K->alloc(CONTEXT * 4), .pos = K->alloc(CONTEXT * 4) };
    for (int i = 0; i < HIDDEN; i++) s.ones[i] = 1;
    for (int i = 0; i < CONTEXT * HEAD_DIM; i++) s.cos_sin[i] = i % 2 ? 0 : 1;
    for (int i = 0; i < CONTEXT; i++) s.pos[i] = i;

    print_cpu();
    fill(F32);
    double fma[5], bw[5];
    for (int i = 0; i < 5; i++) { fma[i] = peak(20000000); bw[i] = read_memory(weights, n_weights); }
    double fma_median = median(fma, 5), bw_median = median(bw, 5);
    printf("  fp32 FMA                   %7.1f GFLOP/s\n  read                       %7.1f GB/s (%.1f to %.1f)\n", fma_median, bw_median, bw[0], bw[4]);
    printf("%d layers of Llama-2-7B and its head; the cache is f16\n", n_layers);
    for (Type type = F32; type < N_TYPES; type++) {
        if (quick && type != F16 && type != Q8_0) continue;
        bench_llama(type, names[type], &s, n_layers, reps);
        bench_vision(type, names[type], &s, quick ? 2 : 23, reps);
    }
    bench_nearest(&s, quick ? 4 : 32, reps);
    return 0;
}
