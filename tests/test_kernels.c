// test_kernels.c: every operation of kernels.c against reference.h, at sizes 1, 33, odd and real, then the cache against a model
// of it kept in arrays, some thousand operations long. Tolerances: float sums of n terms of size 1 are off by about
// 6e-8 sqrt(n) terms, and up to a few times that in the worst of many; where a number is larger, the reason stands beside it.

#include <malloc.h>
#include <omp.h>
#include <sys/wait.h>
#include <unistd.h>
#include "kernels.h"
#include "reference.h"
#include "test.h"

// The same file once more with the plain-C lines for f16, as another back-end: `plain`.
#define PLAIN_F16
#define cpu plain
#define cuda plain_cuda
#include "../kernels.c"
#undef cpu
#undef cuda
extern const Kernels cpu;

const Kernels *K = &cpu;
static uint64_t seed = 1;

static float *floats(size_t n, double size) {
    float *x = K->alloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = (float)(size * rnd_normal(&seed));
    return x;
}
static double *doubles(size_t n) { return need(n, sizeof(double)); }
static bool same(const void *a, const void *b, size_t bytes) { return memcmp(a, b, bytes) == 0; }

// A random matrix of any type; its padding holds NaN: nobody may read it.
static Mat random_mat(Type type, int rows, int cols) {
    size_t rb = row_bytes(type, cols), sb = scale_row_bytes(cols);
    char *data = K->alloc(rows * rb);
    uint16_t *scale = type == Q8_0 ? K->alloc(rows * sb) : NULL;
    memset(data, type == Q8_0 ? 0x80 : 0xff, rows * rb);
    for (int o = 0; o < rows; o++) {
        for (int i = 0; i < cols; i++) {
            float x = (float)(rnd_normal(&seed) / sqrt(cols));
            if (type == F32) ((float *)(data + o * rb))[i] = x;
            else if (type == F16) ((uint16_t *)(data + o * rb))[i] = f16_from_ref(x);
            else if (type == BF16) ((uint16_t *)(data + o * rb))[i] = bf16_from_ref(x);
            else ((int8_t *)(data + o * rb))[i] = (int8_t)(rnd_int(&seed, 255) - 127);
        }
        for (int i = 0; scale && i < cols / 32; i++) scale[o * sb / 2 + i] = f16_from_ref((0.5 + rnd(&seed)) / 73 / sqrt(cols));
    }
    return K->weight(type, rows, cols, data, scale);
}
static void free_mat(Mat w) { K->release((void *)w.data); K->release((void *)w.scale); }

// ----------------------------------------------------------------------------
// memory, and how the program ends where it must. Each such end is tried in a child process, before any thread was started.

static void grow_nothing(void) { K->alloc((size_t)1 << 60); }
static void wrong_type(void) { K->kv_new(1, 1, 16, 1, BF16); }
static void append_rows(KV *kv, int seq, int T) {             // T rows of zeros, from position 0 on
    int *id = need(T, 4), *s = need(T, 4), *pos = need(T, 4);
    float *qkv = need((size_t)T * 3 * 16, 4);
    for (int t = 0; t < T; t++) { pos[t] = t; s[t] = seq; }
    K->kv_append(kv, 0, qkv, &(Rows){ T, 1, id, s, pos, pos }, 1);
    free(id); free(s); free(pos); free(qkv);
}
static void append_unreserved(void) { append_rows(K->kv_new(1, 1, 16, 2, F32), 1, 1); }
static void append_too_many(void) {
    KV *kv = K->kv_new(1, 1, 16, 2, F16);
    K->kv_reserve(kv, 1, 5);
    append_rows(kv, 1, 6);
}
static void append_to_cleared(void) {
    KV *kv = K->kv_new(1, 1, 16, 2, F16);
    K->kv_reserve(kv, 0, 5);
    append_rows(kv, 0, 2);
    K->kv_clear(kv, 0);
    append_rows(kv, 0, 1);
}
static void append_just_enough(void) {
    KV *kv = K->kv_new(1, 1, 16, 2, F16);
    K->kv_reserve(kv, 1, 5);
    append_rows(kv, 1, 5);
    exit(7);
}

static int end_of(void (*f)(void), char *said, int room) {      // exit status of a child that runs f, and its standard error
    int fd[2], status = 0, n = 0, got;
    if (pipe(fd)) return -1;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        omp_set_num_threads(1);
        dup2(fd[1], 2);
        close(fd[0]);
        f();
        _exit(0);
    }
    close(fd[1]);
    while (n < room - 1 && (got = (int)read(fd[0], said + n, room - 1 - n)) > 0) n += got;
    said[n] = 0;
    close(fd[0]);
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void test_ends(void) {
    char said[4000];
    struct { const char *name, *word; void (*f)(void); } must[] = {
        { "appending with no reservation", "full", append_unreserved }, { "appending one row too many", "full", append_too_many },
        { "appending after clear", "full", append_to_cleared }, { "a bf16 cache", "cache type", wrong_type },
    };
    for (int i = 0; i < 4; i++) {
        int status = end_of(must[i].f, said, sizeof said);
        check(status == 1 && strncmp(said, "error: ", 7) == 0 && strstr(said, must[i].word), "%s: status %d, said \"%s\"", must[i].name, status, said);
    }
    int status = end_of(append_just_enough, said, sizeof said);
    check(status == 7 && !*said, "appending just enough: status %d, said \"%s\"", status, said);
    status = end_of(grow_nothing, said, sizeof said);            // a sanitizer's allocator ends the program in its own way
    check(status != 0 && strcasestr(said, "error"), "an impossible allocation: status %d, said \"%s\"", status, said);
}

static void test_memory(void) {
    for (size_t n = 1; n < 1 << 20; n = n * 3 + 1) {
        char *p = K->alloc(n), *q = need(n, 1);
        bool zero = true;
        for (size_t i = 0; i < n; i++) { zero &= !p[i]; q[i] = (char)i; }
        check(zero && (uintptr_t)p % 64 == 0, "alloc of %zu bytes: zeroed, at a multiple of 64", n);
        K->put(p, q, n);
        memset(q, 0, n);
        K->get(q, p, n);
        bool back = true;
        for (size_t i = 0; i < n; i++) back &= q[i] == (char)i;
        check(back, "put and get of %zu bytes", n);
        memset(p, 0xff, n);
        K->release(p);
        free(q);
    }
    K->release(NULL);
    uint16_t scale = 0, data = 0;
    Mat w = K->weight(Q8_0, 3, 96, &data, &scale);
    check(w.type == Q8_0 && w.rows == 3 && w.cols == 96 && w.row_bytes == 128 && w.data == &data && w.scale == &scale, "weight: q8_0 3 x 96");
    w = K->weight(F16, 5, 33, &data, NULL);
    check(w.type == F16 && w.rows == 5 && w.cols == 33 && w.row_bytes == 128 && w.data == &data && !w.scale, "weight: f16 5 x 33");
    K->record(5);
    K->stop();
    check(!K->replay(5), "replay: the CPU has no graphs");
}

// ----------------------------------------------------------------------------
// f16: all 65,536 of them in, and numbers that need rounding out, by the fast line and by the plain one

static void test_f16(const Kernels *k) {
    enum { N = 65536 };
    uint16_t *table = k->alloc(N * 2);
    float *y = k->alloc(N * 4);
    for (int i = 0; i < N; i++) table[i] = (uint16_t)i;
    k->embed(y, k->weight(F16, 1, N, table, NULL), (int[]){ 0 }, 1);
    int wrong = 0;
    for (int i = 0; i < N; i++) wrong += isnan(f16_ref((uint16_t)i)) ? !isnan(y[i]) : y[i] != (float)f16_ref((uint16_t)i);
    check(wrong == 0, "%s: %d of 65536 f16 were read wrongly", k == &cpu ? "fast" : "plain", wrong);

    int d = 4096;                                   // written: through a cache of f16
    float *qkv = k->alloc(3 * d * 4), *back = k->alloc(d * 4);
    for (int i = 0; i < d; i++) {
        double x = f16_ref((uint16_t)rnd_int(&seed, 0x7c00)), up = f16_ref((uint16_t)(f16_from_ref(x) + 1));
        qkv[d + i] = (float)(i % 4 == 0 ? x : i % 4 == 1 && up < 65504 ? (x + up) / 2 : i % 4 == 2 ? x * (1 + 1e-4) : rnd_normal(&seed) * exp(12 * rnd_normal(&seed)));
        if (i % 8 > 3) qkv[d + i] *= -1;
    }
    KV *kv = k->kv_new(1, 1, d, 1, F16);
    int zero = 0;
    k->kv_reserve(kv, 0, 1);
    k->kv_append(kv, 0, qkv, &(Rows){ 1, 1, &zero, &zero, &zero, &zero }, 1);
    k->kv_read(kv, 0, NULL, NULL, NULL, back, NULL);
    wrong = 0;
    for (int i = 0; i < d; i++) wrong += back[i] != (float)f16_ref(f16_from_ref(qkv[d + i]));
    check(wrong == 0, "%s: %d of %d floats were rounded to f16 wrongly", k == &cpu ? "fast" : "plain", wrong, d);
    k->kv_free(kv);
    k->release(table); k->release(y); k->release(qkv); k->release(back);
}

// Single weights through matmul, which reads them in its own ways: x has a single 1 in each row, y is a column of w for each. All
// finite f16 and bf16, all int8 with scales from subnormal to large; as many rows at once as go past either kind of matmul, and one.
static void test_weights(const Kernels *k) {
    enum { N = 65536, T = 96 };
    uint16_t *half = k->alloc(N * 2), *brain = k->alloc(N * 2), *scale = k->alloc(1024 * 64);
    int8_t *q = k->alloc(1024 * 64);
    float *x = k->alloc(T * 32 * 4), *y = k->alloc((size_t)T * (N / 32) * 4);
    for (int t = 0; t < T; t++) x[t * 32 + t % 32] = 1;
    for (int i = 0; i < N; i++) {
        half[i] = (uint16_t)((i >> 10 & 31) == 31 ? 0x3c00 : i);       // no infinity: it would meet zeros
        brain[i] = (uint16_t)((i >> 7 & 255) == 255 ? 0x3f80 : i);
    }
    for (int o = 0; o < 1024; o++) {
        scale[o * 32] = (uint16_t)(o * 31);
        for (int c = 0; c < 32; c++) q[o * 64 + c] = (int8_t)(o * 32 + c);
    }
    Mat w[] = { k->weight(F16, N / 32, 32, half, NULL), k->weight(BF16, N / 32, 32, brain, NULL), k->weight(Q8_0, 1024, 32, q, scale) };
    int Ts[] = { T, 32, 1 };
    for (int i = 0; i < 9; i++) {
        Mat m = w[i / 3];
        int n = Ts[i % 3], wrong = 0;
        for (int t0 = 0; t0 < 32; t0 += n) {
            k->matmul(y, x + t0 * 32, m, NULL, ACT_NONE, false, n);
            for (int t = 0; t < n; t++) for (int o = 0; o < m.rows; o++) wrong += y[(size_t)t * m.rows + o] != (float)weight_ref(m, o, (t0 + t) % 32);
        }
        check(wrong == 0, "%s: matmul of %d rows read %d weights of type %d wrongly", k == &cpu ? "fast" : "plain", n, wrong, m.type);
    }
    k->release(half); k->release(brain); k->release(scale); k->release(q); k->release(x); k->release(y);
}

// ----------------------------------------------------------------------------
// rows

static void test_rows(int T, int dim) {
    float *x = floats((size_t)T * 2 * dim, 2), *w = floats(dim, 1), *b = floats(dim, 1), *y = K->alloc((size_t)T * dim * 4);
    double *want = doubles((size_t)T * dim);
    size_t n = (size_t)T * dim;
    rmsnorm_ref(want, x, w, T, dim, 1e-5f);
    K->rmsnorm(y, x, w, T, dim, 1e-5f);
    check_close("rmsnorm", y, want, n, 2e-6);
    layernorm_ref(want, x, w, b, T, dim, 1e-5f);
    K->layernorm(y, x, w, b, T, dim, 1e-5f);
    check_close("layernorm", y, want, n, dim == 1 ? 1e-6 : 4e-6);
    x[0] = -200; x[n - 1] = 100;                    // exp overflows, exp vanishes
    silu_mul_ref(want, x, T, dim);
    K->silu_mul(y, x, T, dim);
    check_close("silu_mul", y, want, n, 1e-6);
    int row[64];
    for (int i = 0; i < 64; i++) row[i] = rnd_int(&seed, T);
    float *z = K->alloc((size_t)64 * dim * 4);
    K->rows_copy(z, x, row, 64, dim);
    bool ok = true;
    for (int i = 0; i < 64; i++) ok &= same(z + (size_t)i * dim, x + (size_t)row[i] * dim, dim * 4);
    K->rows_copy(y, x, NULL, T, dim);
    check(ok && same(y, x, n * 4), "rows_copy %d x %d", T, dim);
    rmsnorm_ref(want, x, w, T, dim, 1e-5f);
    K->rmsnorm(y, y, w, T, dim, 1e-5f);
    check_close("rmsnorm in place", y, want, n, 2e-6);
    K->release(x); K->release(w); K->release(b); K->release(y); K->release(z);
    free(want);
}

static void test_embed(Type type, int cols) {
    Mat table = random_mat(type, 20, cols);
    int id[40];
    float *y = floats((size_t)40 * cols, 1);
    double *want = doubles((size_t)40 * cols);
    for (int t = 0; t < 40; t++) id[t] = rnd_int(&seed, 21) - 1;
    for (int i = 0; i < 40 * cols; i++) want[i] = y[i];          // rows with id -1 stay
    embed_ref(want, table, id, 40);
    K->embed(y, table, id, 40);
    check_close("embed", y, want, (size_t)40 * cols, 0);         // exact in every type
    K->release(y);
    free(want);
    free_mat(table);
}

// ----------------------------------------------------------------------------
// matmul

static void test_matmul(Type type, int rows, int cols, bool brief) {
    enum { N = 130 };
    static const int Ts[] = { 1, 2, 15, 16, 17, 33, 64, 65, 130 };
    Mat w = random_mat(type, rows, cols);
    float *x = floats((size_t)N * cols, 1), *bias = floats(rows, 1), *y0 = floats((size_t)N * rows, 1);
    float *y = K->alloc((size_t)N * rows * 4), *few = K->alloc((size_t)N * rows * 4), *many = K->alloc((size_t)N * rows * 4);
    double *want = doubles((size_t)N * rows), *full = doubles((size_t)N * rows);
    double tol = cols > 1000 ? 1.5e-5 : 3e-6;                   // chains of up to 512 sums of size 1, and a dozen such blocks
    matmul_ref(full, NULL, x, w, NULL, ACT_NONE, N);
    for (int i = 0; i < 9; i++) {
        int T = Ts[i];
        if (brief && i % 4) continue;
        K->matmul(y, x, w, NULL, ACT_NONE, false, T);
        check_close("matmul", y, full, (size_t)T * rows, tol);
        if (T == 64) memcpy(few, y, (size_t)T * rows * 4);
        if (T == 130) memcpy(many, y, (size_t)T * rows * 4);
    }
    K->matmul(few, x, w, NULL, ACT_NONE, false, 64);
    K->matmul(many, x, w, NULL, ACT_NONE, false, 130);
    for (int i = 0; i < 9; i++) {                                // a row's bits: neighbours and threads do not matter
        int T = Ts[i], at = T > 64 ? 0 : rnd_int(&seed, 65 - T);
        omp_set_num_threads(1 + i % 3);
        K->matmul(y, x + (size_t)at * cols, w, NULL, ACT_NONE, false, T);
        check(same(y, (T > 64 ? many : few) + (size_t)at * rows, (size_t)T * rows * 4), "matmul type %d, %d x %d: rows %d … of %d alone have other bits", type, rows, cols, at, T);
    }
    omp_set_num_threads(2);
    for (int i = 0; i < 6; i++) {                                // the fused ends
        int T = i % 2 ? 66 : 5;
        Act act = (Act)(i / 2);
        matmul_ref(want, i == 0 ? NULL : y0, x, w, i == 1 ? NULL : bias, act, T);
        memcpy(y, y0, (size_t)T * rows * 4);
        K->matmul(y, x, w, i == 1 ? NULL : bias, act, i != 0, T);
        check_close("matmul with bias, act, add", y, want, (size_t)T * rows, tol);
    }
    K->release(x); K->release(bias); K->release(y0); K->release(y); K->release(few); K->release(many);
    free(want);
    free(full);
    free_mat(w);
}

// gelu and quick_gelu over their whole range, through a 1 x 1 matrix
static void test_acts(void) {
    enum { N = 4000 };
    float *x = K->alloc(N * 4), *y = K->alloc(N * 4), *one = K->alloc(64);
    double *want = doubles(N);
    *one = 1;
    for (int i = 0; i < N; i++) x[i] = (i - N / 2) * 0.0073f;
    for (Act act = ACT_GELU; act <= ACT_QUICK_GELU; act++) {
        matmul_ref(want, NULL, x, K->weight(F32, 1, 1, one, NULL), NULL, act, N);
        K->matmul(y, x, K->weight(F32, 1, 1, one, NULL), NULL, act, false, N);
        check_close(act == ACT_GELU ? "gelu" : "quick gelu", y, want, N, 3e-7);
    }
    K->release(x); K->release(y); K->release(one);
    free(want);
}

// ----------------------------------------------------------------------------
// rope, attend, cosine

static float *table_of(int n, int head_dim) {
    float *cs = K->alloc((size_t)n * head_dim * 4);
    for (int t = 0; t < n; t++)
        for (int i = 0; i < head_dim / 2; i++) {
            cs[(size_t)t * head_dim + 2 * i] = (float)cos(t * pow(10000, -2.0 * i / head_dim));
            cs[(size_t)t * head_dim + 2 * i + 1] = (float)sin(t * pow(10000, -2.0 * i / head_dim));
        }
    return cs;
}

static void test_rope(int T, int n_heads, int n_kv_heads, int head_dim) {
    size_t n = (size_t)T * (n_heads + 2 * n_kv_heads) * head_dim;
    float *qkv = floats(n, 1), *cs = table_of(100, head_dim), *q_scale = floats(100, 1);
    double *want = doubles(n);
    int *id = need(T, 4), *pos = need(T, 4), *rot = need(T, 4);
    for (int t = 0; t < T; t++) { pos[t] = rnd_int(&seed, 100); rot[t] = rnd_int(&seed, 100); }
    Rows rows = { T, 1, id, id, pos, rot };
    for (int i = 0; i < 2; i++) {
        rope_ref(want, qkv, cs, i ? q_scale : NULL, &rows, n_heads, n_kv_heads, head_dim);
        K->rope(qkv, cs, i ? q_scale : NULL, &rows, n_heads, n_kv_heads, head_dim);
        check_close("rope", qkv, want, n, 1e-6);
    }
    K->release(qkv); K->release(cs); K->release(q_scale);
    free(want); free(id); free(pos); free(rot);
}

static void test_attend(int Tq, int Tk, int n_heads, int head_dim) {
    int qs = n_heads * head_dim, ks = 3 * qs;
    float *q = floats((size_t)Tq * qs, 1), *qkv = floats((size_t)Tk * ks, 1), *o = K->alloc((size_t)Tq * qs * 4), *again = K->alloc((size_t)Tq * qs * 4);
    double *want = doubles((size_t)Tq * qs);
    attend_ref(want, q, qs, qkv + qs, qkv + 2 * qs, ks, Tq, Tk, n_heads, head_dim);
    K->attend(o, q, qs, qkv + qs, qkv + 2 * qs, ks, Tq, Tk, n_heads, head_dim);
    check_close("attend", o, want, (size_t)Tq * qs, 3e-6);
    omp_set_num_threads(1);
    K->attend(again, q, qs, qkv + qs, qkv + 2 * qs, ks, Tq, Tk, n_heads, head_dim);
    omp_set_num_threads(2);
    check(same(o, again, (size_t)Tq * qs * 4), "attend: other bits with one thread");
    K->release(q); K->release(qkv); K->release(o); K->release(again);
    free(want);
}

static void test_cosine(int n, int m, int dim) {
    float *a = floats((size_t)n * dim, 1), *b = floats((size_t)m * dim, 3), *c = K->alloc((size_t)n * m * 4);
    double *want = doubles((size_t)n * m);
    memset(a, 0, dim * 4);
    for (int i = 0; i < n; i++) for (int j = 0; j < m; j++) want[i * m + j] = cosine_ref(a + (size_t)i * dim, b + (size_t)j * dim, dim);
    K->cosine(c, a, n, b, m, dim);
    check_close("cosine", c, want, (size_t)n * m, 1e-6);
    K->release(a); K->release(b); K->release(c);
    free(want);
}

// ----------------------------------------------------------------------------
// the cache against its model

enum { MAX_POS = 400, MAX_T = 150 };

typedef struct {
    KV *kv;
    RefKV ref;
    int n_heads, next[8];                // tokens that each sequence has seen
    uint8_t *visible[8];
    float *cos_sin, *qkv, *o, *lse;
    double *want_o, *want_lse;
    int id[MAX_T], seq[MAX_T], pos[MAX_T], rot[MAX_T];
    size_t n_ops;
} World;

static int all_heads(const World *w) { return w->ref.n_layers * w->ref.n_kv_heads; }
static size_t slots_held(const World *w, int seq) {
    size_t n = 0;
    for (int i = 0; i < all_heads(w); i++) n += ref_head(&w->ref, seq, 0, 0)[i].len;
    return n;
}

// Lengths, bytes, tokens, scores and contents of a sequence. `loose` (packed, NULL: none): slots whose content was computed anew:
// these may differ by a rounding of the cache's type, all others not at all. `turned`: keys whose rot changed are loose too.
// Afterwards the model takes over the back-end's numbers, so that roundings do not add up.
static void compare(World *w, int seq, const bool *loose, const char *what) {
    int d = w->ref.head_dim, wrong_len = 0, wrong_pos = 0, wrong_bits = 0;
    size_t n = slots_held(w, seq), at = 0;
    double off = 0, score_off = 0, tol = w->ref.type == F16 ? 2e-3 : 3e-6;      // two roundings of f16, some of float
    int *len = need(all_heads(w), 4), *pos = need(n, 4), *rot = need(n, 4);
    float *score = need(n, 4), *k = need(n * d, 4), *v = need(n * d, 4);
    K->kv_lens(w->kv, seq, len);
    for (int i = 0; i < all_heads(w); i++) wrong_len += len[i] != ref_head(&w->ref, seq, 0, 0)[i].len;
    check(wrong_len == 0, "%s: %d heads have another length (operation %zu)", what, wrong_len, w->n_ops);
    check(K->kv_bytes(w->kv) == ref_bytes(&w->ref), "%s: %zu bytes, expected %zu (operation %zu)", what, K->kv_bytes(w->kv), ref_bytes(&w->ref), w->n_ops);
    if (wrong_len) exit(finish());
    K->kv_read(w->kv, seq, pos, rot, score, k, v);
    for (int i = 0; i < all_heads(w); i++) {
        RefHead *c = ref_head(&w->ref, seq, 0, 0) + i;
        for (int j = 0; j < c->len; j++, at++) {
            RefSlot *s = &c->slot[j];
            wrong_pos += s->pos != pos[at] || s->rot != rot[at];
            score_off = fmax(score_off, fabs(s->score - score[at]) / (1 + fabs(s->score)));
            for (int e = 0; e < d; e++) {
                double dk = fabs(k[at * d + e] - s->kv[e]) / (1 + fabs(s->kv[e])), dv = fabs(v[at * d + e] - s->kv[d + e]) / (1 + fabs(s->kv[d + e]));
                if (!(loose && loose[at]) && (dk != 0 || dv != 0)) wrong_bits++;
                off = fmax(off, fmax(dk, dv));
            }
            s->score = score[at];
            memcpy(s->kv, k + at * d, d * 4);
            memcpy(s->kv + d, v + at * d, d * 4);
        }
    }
    check(wrong_pos == 0, "%s: %d slots hold another token (operation %zu)", what, wrong_pos, w->n_ops);
    check(wrong_bits == 0, "%s: %d numbers changed that should not (operation %zu)", what, wrong_bits, w->n_ops);
    check(off <= tol, "%s: keys or values off by %g (operation %zu)", what, off, w->n_ops);
    check(score_off <= 1e-5, "%s: scores off by %g (operation %zu)", what, score_off, w->n_ops);
    free(len); free(pos); free(rot); free(score); free(k); free(v);
}

static void random_qkv(World *w, int T) {
    size_t n = (size_t)T * (w->n_heads + 2 * w->ref.n_kv_heads) * w->ref.head_dim;
    for (size_t i = 0; i < n; i++) w->qkv[i] = (float)rnd_normal(&seed);
}

static void check_attention(World *w, int layer, const Rows *rows, const uint8_t *const *visible, bool vote, const char *what) {
    size_t n = (size_t)rows->T * w->n_heads;
    K->kv_attend(w->o, w->lse, w->kv, layer, w->qkv, rows, w->n_heads, visible, vote);
    ref_attend(w->want_o, w->want_lse, &w->ref, layer, w->qkv, rows, w->n_heads, visible, vote);
    check_close(what, w->o, w->want_o, n * w->ref.head_dim, 3e-6);
    int wrong = 0;                                       // -inf where a row sees nothing
    for (size_t i = 0; i < n; i++) wrong += isinf(w->want_lse[i]) ? w->lse[i] != -INFINITY : !(fabs(w->lse[i] - w->want_lse[i]) < 3e-6 * (1 + fabs(w->want_lse[i])));
    check(wrong == 0, "%s: %d lse are wrong (operation %zu)", what, wrong, w->n_ops);
}

// A prompt of T rows; layer l may take fewer of them. Its last n queries vote.
static void op_prompt(World *w, int s, int T, bool hide, bool fewer) {
    int n = 1 + rnd_int(&seed, T), *keep = need(T, 4);
    for (int t = 0; t < T; t++) keep[t] = t;
    K->kv_reserve(w->kv, s, T + 3);
    ref_reserve(&w->ref, s, T + 3);
    for (int i = 0; i < w->next[s] + T; i++) w->visible[s][i] = !hide || rnd(&seed) < 0.8;
    for (int l = 0; l < w->ref.n_layers; l++) {
        if (fewer && l) { int m = 0; for (int t = 0; t < T; t++) if (t == T - 1 || rnd(&seed) < 0.7) keep[m++] = keep[t]; T = m; }
        for (int t = 0; t < T; t++) { w->seq[t] = s; w->pos[t] = w->next[s] + keep[t]; w->rot[t] = w->pos[t] % 97; }
        Rows rows = { T, 1, w->id, w->seq, w->pos, w->rot };
        const uint8_t *const *visible = hide ? (const uint8_t *const *)w->visible : NULL;
        random_qkv(w, T);
        K->kv_append(w->kv, l, w->qkv, &rows, w->n_heads);
        ref_append(&w->ref, l, w->qkv, &rows, w->n_heads);
        check_attention(w, l, &rows, visible, false, "prompt attention");
        if (n > T) n = T;
        K->kv_vote(w->kv, l, w->qkv, w->lse, &rows, w->n_heads, visible, n);
        ref_vote(&w->ref, l, w->qkv, w->want_lse, &rows, w->n_heads, visible, n);
        int len = ref_head(&w->ref, s, l, 0)->len;
        double *want = doubles((size_t)T * len + 1), *sums = doubles(len + 1);
        float *map = need((size_t)T * len + 1, 4), *got = need(len + 1, 4);
        ref_map(want, &w->ref, l, w->qkv, w->want_lse, &rows, w->n_heads, visible);
        K->kv_map(map, w->kv, l, w->qkv, w->lse, &rows, w->n_heads, visible);
        check_close("attention map", map, want, (size_t)T * len, 2e-6);
        for (int t = T - n; t < T; t++) for (int j = 0; j < len; j++) sums[j] += want[(size_t)t * len + j];
        K->kv_column_sums(got, w->kv, l, w->qkv, w->lse, &rows, w->n_heads, visible, n);
        check_close("column sums", got, sums, len, 1e-5);       // sums of up to 150 probabilities, each with lse's rounding
        free(want); free(sums); free(map); free(got);
    }
    w->next[s] = w->pos[T - 1] + 1;
    free(keep);
    compare(w, s, NULL, "prompt");
}

// One token for every sequence that has room everywhere; then the same rows one at a time must have the same bits.
static void op_tokens(World *w) {
    int B = 0, G = w->ref.n_kv_heads;
    for (int s = 0; s < w->ref.n_seqs; s++) {
        bool room = w->next[s] < MAX_POS;
        for (int i = 0; i < all_heads(w); i++) { RefHead *c = ref_head(&w->ref, s, 0, 0) + i; room &= c->len < c->cap; }
        if (!room) continue;
        w->seq[B] = s;
        w->pos[B] = w->next[s]++;
        w->rot[B] = w->pos[B] % 97;
        w->visible[s][w->pos[B]] = 1;
        B++;
    }
    if (!B) return;
    Rows rows = { B, B, w->id, w->seq, w->pos, w->rot };
    const uint8_t *const *visible = rnd_int(&seed, 2) ? (const uint8_t *const *)w->visible : NULL;
    for (int l = 0; l < w->ref.n_layers; l++) {
        random_qkv(w, B);
        K->kv_append(w->kv, l, w->qkv, &rows, w->n_heads);
        ref_append(&w->ref, l, w->qkv, &rows, w->n_heads);
        check_attention(w, l, &rows, visible, true, "token attention");
        size_t wide = (size_t)w->n_heads * w->ref.head_dim;
        float *o = need(wide, 4), *lse = need(w->n_heads, 4);
        omp_set_num_threads(1 + rnd_int(&seed, 3));
        for (int b = 0; b < B; b++) {
            Rows one = { 1, 1, w->id + b, w->seq + b, w->pos + b, w->rot + b };
            K->kv_attend(o, lse, w->kv, l, w->qkv + b * (wide + (size_t)2 * G * w->ref.head_dim), &one, w->n_heads, visible, false);
            check(same(o, w->o + b * wide, wide * 4) && same(lse, w->lse + b * w->n_heads, w->n_heads * 4), "a token's attention has other bits alone (operation %zu)", w->n_ops);
        }
        omp_set_num_threads(2);
        free(o); free(lse);
    }
    for (int b = 0; b < B; b++) compare(w, w->seq[b], NULL, "token");
}

static void op_drop(World *w, int s) {
    int *slot = need(all_heads(w), 4);
    for (int i = 0; i < all_heads(w); i++) {
        RefHead *c = ref_head(&w->ref, s, 0, 0) + i;
        slot[i] = c->len && rnd_int(&seed, 4) ? rnd_int(&seed, c->len) : -1;
        if (slot[i] >= 0) ref_remove(c, slot[i]);
    }
    K->kv_drop(w->kv, s, slot);
    free(slot);
    compare(w, s, NULL, "drop");
}

static void op_drop_lowest(World *w, int s) {
    int lo = rnd_int(&seed, 6), from_end = rnd_int(&seed, 6);
    K->kv_drop_lowest(w->kv, s, lo, from_end);
    for (int i = 0; i < all_heads(w); i++) {
        RefHead *c = ref_head(&w->ref, s, 0, 0) + i;
        int least = ref_lowest(c, lo, from_end);
        if (least >= 0) ref_remove(c, least);
    }
    compare(w, s, NULL, "drop_lowest");
}

// A plan: a share stays, some of what leaves (and some of what stays) merges into kept slots, keys may turn.
static void op_apply(World *w, int s) {
    size_t n = slots_held(w, s), at = 0, left = 0;
    bool *keep = need(n, 1), *loose = need(n, 1), merges = rnd_int(&seed, 2), turn = rnd_int(&seed, 4) == 0;
    int *into = need(n, 4);
    float *weight_of = need(n, 4), self = rnd_int(&seed, 2) ? 0 : (float)rnd(&seed);
    double share = rnd(&seed);
    for (int i = 0; i < all_heads(w); i++) {
        RefHead *c = ref_head(&w->ref, s, 0, 0) + i;
        int last = -1;
        for (int j = 0; j < c->len; j++) { keep[at + j] = rnd(&seed) < share; if (keep[at + j]) last = j; }
        for (int j = 0; j < c->len; j++) {
            into[at + j] = -1;
            weight_of[at + j] = (float)rnd(&seed);
            if (!merges || last < 0 || rnd(&seed) < 0.3 || (keep[at + j] && rnd(&seed) < 0.8)) continue;
            int to = rnd_int(&seed, last + 1);
            while (!keep[at + to]) to++;
            if (to != j) into[at + j] = to;
        }
        for (int j = 0, kept = 0; j < c->len; j++) {
            if (!keep[at + j]) continue;
            bool touched = false;
            for (int i2 = 0; i2 < c->len; i2++) touched |= into[at + i2] == j;
            loose[left++] = touched || (turn && c->slot[j].rot != kept);
            kept++;
        }
        at += c->len;
    }
    K->kv_apply(w->kv, s, keep, merges ? into : NULL, merges ? weight_of : NULL, self, turn ? w->cos_sin : NULL);
    ref_apply(&w->ref, s, keep, merges ? into : NULL, weight_of, self, turn ? w->cos_sin : NULL);
    compare(w, s, loose, merges ? "apply with merges" : "apply");
    free(keep); free(loose); free(into); free(weight_of);
}

// The nearest kept slot by the cosine of what the cache holds: the model's best, or one that ties with it within a rounding.
static void op_nearest(World *w, int s, int layer) {
    size_t n = 0, at = 0;
    for (int g = 0; g < w->ref.n_kv_heads; g++) n += ref_head(&w->ref, s, layer, g)->len;
    bool *keep = need(n, 1);
    int *into = need(n, 4), wrong = 0;
    float *cosines = need(n, 4);
    for (size_t i = 0; i < n; i++) { keep[i] = rnd(&seed) < 0.5; into[i] = 12345; cosines[i] = 6; }
    K->kv_nearest(into, cosines, w->kv, s, layer, keep);
    for (int g = 0; g < w->ref.n_kv_heads; g++) {
        RefHead *c = ref_head(&w->ref, s, layer, g);
        for (int i = 0; i < c->len; i++) {
            double best = -2;
            for (int j = 0; j < c->len; j++) if (keep[at + j]) best = fmax(best, ref_cosine(&w->ref, &c->slot[i], &c->slot[j]));
            int j = into[at + i];
            if (keep[at + i]) wrong += j != 12345 || cosines[at + i] != 6;
            else if (best == -2) wrong += j != -1;
            else wrong += j < 0 || j >= c->len || !keep[at + j] || ref_cosine(&w->ref, &c->slot[i], &c->slot[j]) < best - 1e-6 || fabs(cosines[at + i] - best) > 1e-6;
        }
        at += c->len;
    }
    check(wrong == 0, "nearest: %d of %zu slots (operation %zu)", wrong, n, w->n_ops);
    free(keep); free(into); free(cosines);
}

static void test_cache(Type type, int n_layers, int n_heads, int n_kv_heads, int head_dim, int n_ops) {
    enum { SEQS = 3 };
    World *w = need(1, sizeof *w);
    size_t width = (size_t)(n_heads + 2 * n_kv_heads) * head_dim;
    w->kv = K->kv_new(n_layers, n_kv_heads, head_dim, SEQS, type);
    w->ref = ref_new(n_layers, n_kv_heads, head_dim, SEQS, type);
    w->n_heads = n_heads;
    w->cos_sin = table_of(MAX_POS, head_dim);
    w->qkv = K->alloc(MAX_T * width * 4); w->o = K->alloc(MAX_T * width * 4); w->lse = K->alloc((size_t)MAX_T * n_heads * 4);
    w->want_o = doubles(MAX_T * width); w->want_lse = doubles((size_t)MAX_T * n_heads);
    for (int s = 0; s < SEQS; s++) w->visible[s] = need(MAX_POS, 1);
    for (w->n_ops = 0; w->n_ops < (size_t)n_ops; w->n_ops++) {
        int s = rnd_int(&seed, SEQS), what = rnd_int(&seed, 100);
        if (w->next[s] > MAX_POS - 60 || what < 2) {
            K->kv_clear(w->kv, s);
            ref_clear(&w->ref, s);
            w->next[s] = 0;
            compare(w, s, NULL, "clear");
        } else if (what < 10) op_prompt(w, s, w->n_ops % 3 ? 1 + rnd_int(&seed, 12) : 20 + rnd_int(&seed, 25), what % 2, what % 3 == 0);
        else if (what < 50) op_tokens(w);
        else if (what < 62) op_drop(w, s);
        else if (what < 76) op_drop_lowest(w, s);
        else if (what < 84) op_apply(w, s);
        else if (what < 88) op_nearest(w, s, rnd_int(&seed, n_layers));
        else if (what < 94) {
            int extra = rnd_int(&seed, 8);
            K->kv_reserve(w->kv, s, extra);
            ref_reserve(&w->ref, s, extra);
            compare(w, s, NULL, "reserve");
        } else if (what < 97) {
            int to = rnd_int(&seed, SEQS);
            K->kv_copy(w->kv, to, s);
            ref_copy(&w->ref, to, s);
            w->next[to] = w->next[s];
            memcpy(w->visible[to], w->visible[s], MAX_POS);
            compare(w, to, NULL, "copy");
            compare(w, s, NULL, "copied from");
        } else {
            K->kv_scores_clear(w->kv, s);
            for (int i = 0; i < all_heads(w); i++) for (int j = 0; j < ref_head(&w->ref, s, 0, 0)[i].len; j++) ref_head(&w->ref, s, 0, 0)[i].slot[j].score = 0;
            compare(w, s, NULL, "scores_clear");
        }
    }
    op_prompt(w, 0, 1, false, false);
    if (w->next[0] < MAX_POS - MAX_T) op_prompt(w, 0, MAX_T - 5, true, false);      // several blocks of queries, keys and values
    K->kv_free(w->kv);
    ref_free(&w->ref);
    K->release(w->cos_sin); K->release(w->qkv); K->release(w->o); K->release(w->lse);
    for (int s = 0; s < SEQS; s++) free(w->visible[s]);
    free(w->want_o); free(w->want_lse); free(w);
}

// Ties, zero keys and threads: what random numbers do not meet.
static void test_nearest_ties(void) {
    enum { N = 70, D = 32 };
    float *qkv = floats((size_t)N * 3 * D, 1);
    int zero[N] = {0}, pos[N], into[N];
    float cosines[N];
    bool keep[N];
    for (int t = 0; t < N; t++) { pos[t] = t; keep[t] = t % 2; }
    for (int t = 0; t < N; t++) {
        float *k = qkv + (size_t)t * 3 * D + D;
        if (t % 10 < 6) memcpy(k, qkv + D, D * 4);                  // six keys in ten are the same one: kept 1, 3, 5, 11, …
        if (t == 8 || t == 19) memset(k, 0, D * 4);                 // no direction: its cosine with all is 0
    }
    KV *kv = K->kv_new(1, 1, D, 1, F32);
    K->kv_reserve(kv, 0, N);
    K->kv_append(kv, 0, qkv, &(Rows){ N, 1, zero, zero, pos, pos }, 1);
    K->kv_nearest(into, cosines, kv, 0, 0, keep);
    bool first = true;
    for (int t = 0; t < N; t += 2) if (t % 10 < 6) first &= into[t] == 1 && fabsf(cosines[t] - 1) < 1e-6f;
    check(first, "nearest: the first of equal keys wins");
    check(into[8] == 1 && cosines[8] == 0, "nearest: a zero key goes to the first kept slot with cosine 0, not %d with %g", into[8], cosines[8]);
    K->kv_free(kv);
    K->release(qkv);
}

// A real size, once with one thread and once with three: prompt attention, votes, nearest keys, all bit for bit.
static void test_threads(Type type, int T, int n_heads, int n_kv_heads, int head_dim) {
    size_t width = (size_t)(n_heads + 2 * n_kv_heads) * head_dim, n = (size_t)T * n_heads, slots = (size_t)T * n_kv_heads;
    float *qkv = floats(T * width, 1), *out[2][5];
    int *zero = need(T, 4), *pos = need(T, 4), *into[2];
    bool *keep = need(slots, 1);
    for (int t = 0; t < T; t++) pos[t] = t;
    for (size_t i = 0; i < slots; i++) keep[i] = rnd(&seed) < 0.4;
    Rows rows = { T, 1, zero, zero, pos, pos };
    for (int i = 0; i < 2; i++) {
        omp_set_num_threads(i ? 3 : 1);
        size_t size[5] = { n * head_dim, n, slots, slots, T };
        for (int j = 0; j < 5; j++) out[i][j] = need(size[j], 4);
        into[i] = need(slots, 4);
        KV *kv = K->kv_new(1, n_kv_heads, head_dim, 1, type);
        K->kv_reserve(kv, 0, T);
        K->kv_append(kv, 0, qkv, &rows, n_heads);
        K->kv_attend(out[i][0], out[i][1], kv, 0, qkv, &rows, n_heads, NULL, false);
        K->kv_vote(kv, 0, qkv, out[i][1], &rows, n_heads, NULL, T / 2);
        K->kv_read(kv, 0, NULL, NULL, out[i][2], NULL, NULL);
        K->kv_nearest(into[i], out[i][3], kv, 0, 0, keep);
        K->kv_column_sums(out[i][4], kv, 0, qkv, out[i][1], &rows, n_heads, NULL, T);
        K->kv_free(kv);
        if (!i) continue;
        for (int j = 0; j < 5; j++) check(same(out[0][j], out[1][j], size[j] * 4), "threads: result %d has other bits with three", j);
        check(same(into[0], into[1], slots * 4), "threads: nearest");
    }
    omp_set_num_threads(2);
    double total = 0;
    for (int t = 0; t < T; t++) total += out[0][4][t];
    check(fabs(total - T) < 1e-4 * T, "every row gives 1: %g of %d", total, T);
    for (int i = 0; i < 2; i++) { for (int j = 0; j < 5; j++) free(out[i][j]); free(into[i]); }
    K->release(qkv);
    free(zero); free(pos); free(keep);
}

// ----------------------------------------------------------------------------
// what random numbers do not meet: rows of zeros, magnitudes, odd addresses, rows alone, fences behind an output

// Norms of a row of zeros, of rows near eps and of large ones; in place; a row alone. silu where exp overflows or vanishes.
static void test_edges(int dim) {
    enum { T = 4 };
    float *x = floats((size_t)2 * T * dim, 1), *w = floats(dim, 1), *b = floats(dim, 1), *y = K->alloc((size_t)(T * dim + 1) * 4), *z = K->alloc((size_t)T * dim * 4);
    double *want = doubles((size_t)T * dim);
    size_t n = (size_t)T * dim;
    const float g[] = { 0, -0.0f, 20, -20, 87, -87, 88.5f, -88.5f, 89, -89, 104, -104, 1000, -1000, 3e38f, -3e38f, 1e-30f, -1e-30f };
    for (int i = 0; i < dim; i++) { x[i] = 0; x[dim + i] *= 1e-4f; x[2 * dim + i] *= 1e6f; }
    for (int layer = 0; layer < 2; layer++) {
        bool alone = true;
        y[n] = 7;
        if (layer) { layernorm_ref(want, x, w, b, T, dim, 1e-5f); K->layernorm(y, x, w, b, T, dim, 1e-5f); }
        else       { rmsnorm_ref(want, x, w, T, dim, 1e-5f);      K->rmsnorm(y, x, w, T, dim, 1e-5f); }
        check_close(layer ? "layernorm at the edges" : "rmsnorm at the edges", y, want, n, 5e-6);
        check(y[n] == 7, "norm of %d: wrote past its output", dim);
        for (int t = 0; t < T; t++) {
            memcpy(z, x + (size_t)t * dim, dim * 4);                                   // in place and alone at once
            if (layer) K->layernorm(z, z, w, b, 1, dim, 1e-5f); else K->rmsnorm(z, z, w, 1, dim, 1e-5f);
            alone &= same(z, y + (size_t)t * dim, dim * 4);
        }
        check(alone, "norm of %d: other bits in place and alone", dim);
    }
    for (int i = 0; i < 18 && i < dim; i++) { x[i] = g[i]; x[dim + i] = 0.5f; }        // 0.5: 3e38 must not overflow
    silu_mul_ref(want, x, T, dim);
    K->silu_mul(y, x, T, dim);
    check_close("silu_mul at the edges", y, want, n, 1e-6);
    K->release(x); K->release(w); K->release(b); K->release(y); K->release(z);
    free(want);
}

// Every act with and without bias and add; odd addresses; nothing before or behind the output is touched.
static void test_matmul_ends(Type type, int rows, int cols) {
    Mat w = random_mat(type, rows, cols);
    float *x = floats((size_t)66 * cols + 1, 1), *bias = floats(rows + 1, 1), *y0 = floats((size_t)66 * rows, 1), *y = K->alloc((size_t)(66 * rows + 2) * 4);
    double *want = doubles((size_t)66 * rows);
    for (int i = 0; i < 36; i++) {
        int T = i / 12 == 0 ? 1 : i / 12 == 1 ? 17 : 66;
        Act act = (Act)(i % 3);
        const float *b = i / 3 % 2 ? bias + 1 : NULL;
        bool add = i / 6 % 2;
        matmul_ref(want, add ? y0 : NULL, x + 1, w, b, act, T);
        y[0] = y[T * rows + 1] = 7;
        memcpy(y + 1, y0, (size_t)T * rows * 4);
        K->matmul(y + 1, x + 1, w, b, act, add, T);
        char name[100];
        snprintf(name, sizeof name, "matmul type %d, %d x %d, T %d, act %d, bias %d, add %d", type, rows, cols, T, act, b != NULL, add);
        check_close(name, y + 1, want, (size_t)T * rows, 3e-6);
        check(y[0] == 7 && y[T * rows + 1] == 7, "%s: wrote beside its output", name);
    }
    K->release(x); K->release(bias); K->release(y0); K->release(y);
    free(want);
    free_mat(w);
}

// Rows that lie apart and at odd addresses; logits of hundreds (an error of a logit is a relative error of its weight); a query alone.
static void test_attend_apart(int Tq, int Tk, int n_heads, int head_dim, double size) {
    int dim = n_heads * head_dim, qs = dim + 3, ks = 2 * dim + 5;
    float *q = floats((size_t)Tq * qs + 1, size), *kv = floats((size_t)Tk * ks + 1, 1), *o = K->alloc((size_t)(Tq * dim + 1) * 4), *one = K->alloc(dim * 4);
    double *want = doubles((size_t)Tq * dim);
    bool alone = true;
    o[Tq * dim] = 7;
    attend_ref(want, q + 1, qs, kv + 1, kv + 1 + dim, ks, Tq, Tk, n_heads, head_dim);
    K->attend(o, q + 1, qs, kv + 1, kv + 1 + dim, ks, Tq, Tk, n_heads, head_dim);
    check_close("attend, rows apart", o, want, (size_t)Tq * dim, 3e-6 * size);
    for (int t = 0; t < Tq; t++) {
        K->attend(one, q + 1 + (size_t)t * qs, qs, kv + 1, kv + 1 + dim, ks, 1, Tk, n_heads, head_dim);
        alone &= same(one, o + (size_t)t * dim, dim * 4);
    }
    check(alone && o[Tq * dim] == 7, "attend %d x %d: a query alone has other bits, or something was written past the output", Tq, Tk);
    K->release(q); K->release(kv); K->release(o); K->release(one);
    free(want);
}

// Lengths of 0 and below 1e-12, which the definition replaces by 1e-12
static void test_cosine_edges(void) {
    enum { D = 33, N = 3 };
    float *a = floats(N * D, 1), *b = floats(N * D, 1), c[N * N];
    double want[N * N];
    for (int i = 0; i < D; i++) { a[i] = 0; a[D + i] *= 1e-15f; b[i] *= 1e15f; b[D + i] = 1e-3f * a[2 * D + i]; }
    for (int i = 0; i < N * N; i++) want[i] = cosine_ref(a + i / N * D, b + i % N * D, D);
    K->cosine(c, a, N, b, N, D);
    check_close("cosine at the edges", c, want, N * N, 1e-6);
    K->release(a); K->release(b);
}

// A prompt in parts of two rows and more has the bits of the whole. (One row alone goes the way of a decode step.) Logits of
// hundreds, which exp would not survive without the largest taken off. And the rows that n queries voted for, NULL where not asked.
static void test_prompt_parts(Type type, int n_heads, int n_kv_heads, int head_dim, double size) {
    enum { T = 150 };
    size_t width = (size_t)(n_heads + 2 * n_kv_heads) * head_dim, wide = (size_t)n_heads * head_dim;
    float *qkv = floats(T * width, 1), *o = K->alloc(T * wide * 4), *lse = K->alloc((size_t)T * n_heads * 4), *o2 = K->alloc(T * wide * 4), *lse2 = K->alloc((size_t)T * n_heads * 4);
    double *want = doubles(T * wide), *want_lse = doubles((size_t)T * n_heads);
    int zero[T] = {0}, pos[T];
    for (int t = 0; t < T; t++) { pos[t] = t; for (size_t i = 0; i < wide; i++) qkv[t * width + i] *= (float)size; }
    Rows rows = { T, 1, zero, zero, pos, pos };
    KV *kv = K->kv_new(1, n_kv_heads, head_dim, 1, type);
    RefKV ref = ref_new(1, n_kv_heads, head_dim, 1, type);
    K->kv_reserve(kv, 0, T);
    ref_reserve(&ref, 0, T);
    K->kv_append(kv, 0, qkv, &rows, n_heads);
    ref_append(&ref, 0, qkv, &rows, n_heads);
    K->kv_attend(o, lse, kv, 0, qkv, &rows, n_heads, NULL, true);                  // vote: decode rows alone do
    ref_attend(want, want_lse, &ref, 0, qkv, &rows, n_heads, NULL, false);
    check_close("prompt attention, large logits", o, want, T * wide, 3e-6 * size);
    check_close("lse, large logits", lse, want_lse, (size_t)T * n_heads, 3e-6 * size);
    for (int t = 0, n; t < T; t += n) {
        n = T - t < 4 ? T - t : 2 + rnd_int(&seed, (T - t < 90 ? T - t : 90) - 3);
        Rows part = { n, 1, zero, zero, pos + t, pos + t };
        K->kv_attend(o2 + t * wide, lse2 + (size_t)t * n_heads, kv, 0, qkv + t * width, &part, n_heads, NULL, false);
    }
    check(same(o, o2, T * wide * 4) && same(lse, lse2, (size_t)T * n_heads * 4), "prompt attention, head size %d: other bits in parts", head_dim);
    size_t slots = (size_t)T * n_kv_heads;
    float *score = floats(slots, 1), *k = floats(slots * head_dim, 1), *v = floats(slots * head_dim, 1);
    int *rot = need(slots, 4), wrong = 0;
    K->kv_read(kv, 0, NULL, NULL, score, NULL, NULL);
    K->kv_read(kv, 0, NULL, rot, NULL, NULL, v);
    K->kv_read(kv, 0, NULL, NULL, NULL, k, NULL);
    for (size_t i = 0; i < slots; i++) {
        const RefSlot *s = &ref_head(&ref, 0, 0, (int)(i / T))->slot[i % T];
        wrong += score[i] != 0 || rot[i] != s->rot || !same(k + i * head_dim, s->kv, head_dim * 4) || !same(v + i * head_dim, s->kv + head_dim, head_dim * 4);
    }
    check(wrong == 0, "kv_read in parts, and a prompt's scores: %d of %zu slots", wrong, slots);
    K->kv_free(kv);
    ref_free(&ref);
    K->release(qkv); K->release(o); K->release(lse); K->release(o2); K->release(lse2); K->release(score); K->release(k); K->release(v);
    free(want); free(want_lse); free(rot);
}

// A plan's fine print: a target that leaves takes nothing, a weight without a target is not read, a slot may be its own source.
static void test_fine_print(Type type) {
    enum { N = 4, D = 16 };
    KV *kv = K->kv_new(1, 1, D, 1, type);
    float qkv[N * 3 * D], k[N * D], v[N * D], w[N] = { 0.5f, NAN, 2, 1 };
    int zero[N] = {0}, pos[N] = { 0, 1, 2, 3 }, into[N] = { 1, -1, 3, 3 };             // 0 -> 1 (leaves), 2 -> 3, 3 -> itself
    bool keep[N] = { true, false, false, true };
    for (int t = 0; t < N; t++) for (int i = 0; i < 3 * D; i++) qkv[t * 3 * D + i] = (float)(1 << t);
    K->kv_reserve(kv, 0, N);
    K->kv_append(kv, 0, qkv, &(Rows){ N, 1, zero, zero, pos, pos }, 1);
    K->kv_apply(kv, 0, keep, into, w, 0.25f, NULL);
    K->kv_read(kv, 0, pos, NULL, NULL, k, v);
    float merged = (8 + (2 * 4 + 0.25f * 8) + (1 * 8 + 0.25f * 8)) / 3;                // (X[3] + two sources, each with self X[3]) / (1 + 2)
    if (type == F16) merged = (float)f16_ref(f16_from_ref(merged));
    check(pos[0] == 0 && pos[1] == 3 && k[0] == 1 && v[D - 1] == 1 && k[D] == merged && v[2 * D - 1] == merged,
          "a plan's fine print: slots %d %d hold %g %g, not 1 %g", pos[0], pos[1], k[0], k[D], merged);
    K->kv_free(kv);
}

// All kept keys look away from those that leave: the least of it is the nearest, and no direction is nearer than away.
static void test_nearest_away(Type type, int n, int head_dim) {
    float *qkv = floats((size_t)n * 3 * head_dim, 1), *w = floats(n, 1);
    int *zero = need(n, 4), *pos = need(n, 4), *into = need(n, 4), wrong = 0;
    bool *keep = need(n, 1);
    for (int t = 0; t < n; t++) {
        pos[t] = t;
        keep[t] = t % 3 != 1;
        for (int i = 0; i < head_dim; i++) qkv[((size_t)t * 3 + 1) * head_dim + i] = (keep[t] ? -1.0f : 1.0f) * (1 + (i + t) % 4);
    }
    for (int round = 0; round < 2; round++) {
        if (round) memset(qkv + ((size_t)2 * 3 + 1) * head_dim, 0, head_dim * 4);      // slot 2 has no direction
        KV *kv = K->kv_new(1, 1, head_dim, 1, type);
        K->kv_reserve(kv, 0, n);
        K->kv_append(kv, 0, qkv, &(Rows){ n, 1, zero, zero, pos, pos }, 1);
        K->kv_nearest(into, w, kv, 0, 0, keep);
        for (int t = 1; t < n; t += 3) wrong += round ? into[t] != 2 || w[t] != 0 : into[t] < 0 || !keep[into[t]] || !(w[t] < -0.5f);
        K->kv_free(kv);
    }
    check(wrong == 0, "nearest of %d keys of %d that look away: %d", n, head_dim, wrong);
    K->release(qkv); K->release(w);
    free(zero); free(pos); free(into); free(keep);
}

// What a compressed cache gives back, by its own count and by that of the C library (0 where that is not glibc's, or a sanitizer's).
static size_t heap(void) {
#if defined __GLIBC__ && (__GLIBC__ > 2 || __GLIBC_MINOR__ >= 33)
    struct mallinfo2 m = mallinfo2();
    return m.uordblks + m.hblkhd;
#else
    return 0;
#endif
}

static void test_bytes(void) {
    enum { L = 4, G = 4, D = 64, N = 2000 };
    float *qkv = floats((size_t)N * 3 * G * D, 1);
    int *seq = need(N, 4), *pos = need(N, 4);
    for (int t = 0; t < N; t++) { seq[t] = 1; pos[t] = t; }
    bool *keep = need((size_t)L * G * N, sizeof *keep);
    for (int i = 0; i < L * G * N; i++) keep[i] = i % 10 == 0;
    size_t bytes[N_TYPES];
    for (int i = 0; i < 3; i++) {                                // the first time the back-end's scratch memory grows too
        int type = i == 2 ? F16 : F32;
        size_t slot = 2 * D * (size_t)type_bytes[type] * L * G;
        KV *kv = K->kv_new(L, G, D, 2, (Type)type);
        check(K->kv_bytes(kv) == 0, "kv_bytes: %zu for an empty cache", K->kv_bytes(kv));
        size_t before = heap();
        K->kv_reserve(kv, 1, N);
        bytes[type] = K->kv_bytes(kv);
        check(bytes[type] == slot * N, "kv_bytes: %zu for %d slots", bytes[type], N);
        size_t full = heap() - before;
        for (int l = 0; l < L; l++) K->kv_append(kv, l, qkv, &(Rows){ N, 1, seq, seq, pos, pos }, G);
        K->kv_apply(kv, 1, keep, NULL, NULL, 0, NULL);
        check(K->kv_bytes(kv) == slot * N, "kv_bytes: %zu before the cache was shrunk", K->kv_bytes(kv));
        K->kv_reserve(kv, 1, 7);
        check(K->kv_bytes(kv) == slot * (N / 10 + 7), "kv_bytes: %zu after the cache was shrunk", K->kv_bytes(kv));
        size_t small = heap() - before;
        // keys and values, and 16 bytes a slot (pos, rot, score, order) beside them
        if (i && full >= slot * N) check(small < full / 8, "%s: %zu of %zu bytes are left on the heap after a tenth was kept", type == F16 ? "f16" : "f32", small, full);
        K->kv_copy(kv, 0, 1);
        check(K->kv_bytes(kv) == 2 * slot * (N / 10 + 7), "kv_bytes: %zu for two sequences", K->kv_bytes(kv));
        K->kv_clear(kv, 1);
        K->kv_clear(kv, 0);
        check(K->kv_bytes(kv) == 0, "kv_bytes: %zu after clear", K->kv_bytes(kv));
        if (i && full >= slot * N) check(heap() <= before + 4096, "%s: clear leaves %zu bytes on the heap", type == F16 ? "f16" : "f32", heap() - before);
        K->kv_free(kv);
    }
    check(bytes[F32] == 2 * bytes[F16], "kv_bytes: f32 %zu, f16 %zu", bytes[F32], bytes[F16]);
    K->release(qkv);
    free(seq); free(pos); free(keep);
}

// A row to which every slot is hidden gives and takes nothing.
static void test_blind(void) {
    enum { D = 16, T = 3 };
    float *qkv = floats(T * 3 * D, 1), *o = floats(T * D, 1), *lse = floats(T, 0), *score = floats(T, 0);
    int zero[T] = { 0 }, pos[T] = { 0, 1, 2 };
    const uint8_t hidden[T] = { 0, 1, 1 }, *visible[] = { hidden };      // row 0 sees itself alone, if at all
    KV *kv = K->kv_new(1, 1, D, 1, F32);
    Rows rows = { T, 1, zero, zero, pos, pos };
    K->kv_reserve(kv, 0, T);
    K->kv_append(kv, 0, qkv, &rows, 1);
    K->kv_attend(o, lse, kv, 0, qkv, &rows, 1, visible, false);
    K->kv_vote(kv, 0, qkv, lse, &rows, 1, visible, T);
    K->kv_read(kv, 0, NULL, NULL, score, NULL, NULL);
    bool nothing = lse[0] == -INFINITY;
    for (int i = 0; i < D; i++) nothing &= o[i] == 0;
    check(nothing, "a row that sees nothing: o is not 0, or lse %g", lse[0]);
    check(score[0] == 0 && fabsf(score[1] + score[2] - 2) < 1e-6f, "a row that sees nothing: scores %g %g %g, not 0 and a sum of 2", score[0], score[1], score[2]);
    K->kv_free(kv);
    K->release(qkv); K->release(o); K->release(lse); K->release(score);
}

int main(int argc, char **argv) {
    if (argc == 1 && !getenv("OMP_WAIT_POLICY")) {       // threads that spin while another program holds a core: 95 % of the time
        setenv("OMP_WAIT_POLICY", "passive", 1);
        execv("/proc/self/exe", argv);                   // elsewhere it fails, and only time is lost
    }
    test_ends();                                         // first: a forked child must not inherit threads
    omp_set_num_threads(2);
    test_memory();
    test_f16(&cpu);
    test_f16(&plain);
    test_weights(&cpu);
    test_weights(&plain);
    int dims[] = { 1, 33, 172, 588, 4096 };
    for (int i = 0; i < 5; i++) { test_rows(1, dims[i]); test_rows(33, dims[i]); }
    for (Type type = F32; type < N_TYPES; type++) {
        test_embed(type, 64);
        test_matmul(type, 33, 4096, true);
        test_matmul(type, 272, 64, false);
        if (type == Q8_0) { test_matmul(type, 1, 32, false); test_matmul(type, 67, 1568, false); continue; }
        test_embed(type, 33);
        test_matmul(type, 1, 1, false);
        test_matmul(type, 33, 33, false);
        test_matmul(type, 172, 272, false);
        test_matmul(type, 64, 588, false);
        test_matmul(type, 588, 172, false);
    }
    test_matmul(F16, 9, 11008, true);
    test_acts();
    int head_dims[] = { 16, 32, 64, 104, 128, 6 };
    for (int i = 0; i < 6; i++) {
        test_rope(i ? 33 : 1, 4, 2, head_dims[i]);
        test_attend(1, 1, 2, head_dims[i]);
        test_attend(65, 33, 3, head_dims[i]);
        test_attend(33, 290, 2, head_dims[i]);
    }
    test_attend(577, 577, 2, 64);
    test_cosine(1, 1, 1);
    test_cosine(33, 17, 588);
    test_cache(F32, 2, 4, 2, 16, 1000);
    test_cache(F16, 2, 3, 3, 32, 800);
    test_cache(F32, 1, 8, 2, 64, 500);
    test_cache(F16, 1, 2, 1, 104, 500);
    test_cache(F16, 2, 2, 2, 128, 500);
    test_cache(F32, 1, 3, 1, 6, 500);
    test_nearest_ties();
    test_threads(F16, 300, 4, 2, 128);
    test_threads(F32, 130, 2, 2, 104);

    for (int i = 0; i < 5; i++) test_edges(dims[i]);
    for (Type type = F32; type < N_TYPES; type++) {
        test_matmul_ends(type, 33, type == Q8_0 ? 96 : 33);
        test_matmul_ends(type, 65, type == Q8_0 ? 160 : 172);
        for (int T = 1; T < 200; T = T * 2 + 1) test_attend_apart(T, 200 - T, 1 + T % 3, head_dims[type + T % 3], T % 4 == 1 ? 1 : 30);
    }
    test_cosine_edges();
    for (Type type = F32; type <= F16; type++) {
        test_fine_print(type);
        for (int i = 0; i < 6; i++) {
            test_prompt_parts(type, i < 3 ? 4 : 2, 1 + i % 2, head_dims[i], i % 2 ? 30 : 1);
            test_nearest_away(type, 3 + 47 * i, head_dims[i]);
        }
    }
    test_bytes();
    test_blind();
    return finish();
}
