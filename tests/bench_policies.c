// bench_policies.c: how long deciding takes: 1,024 heads (32 layers of 32) of 640 slots, 576 of them a picture's. Times are of the policy
// alone: scores lie on the host, the plan is not carried out. LOOK-M's search for the nearest key comes on top and has its own line.
//
//     make bench, or build/bench_policies [THREADS]        default 2 threads; wall time: the best of 9; CPU time: of the same run

#ifdef _OPENMP
#include <omp.h>
#else
static void omp_set_num_threads(int n) { (void)n; }
static int omp_get_max_threads(void) { return 1; }
#endif
#include <sys/resource.h>
#include "progress.h"
#include "given.h"

enum { L = 32, H = 32, LEN = 640, IMAGES = 576, FIRST = 35, WORDS = 24, D = 128 };

static uint64_t lots = 1;
static void some_votes(Run *r, int layer, int n, float *out) {
    (void)layer; (void)n;
    for (int j = 0; j < r->n_seen; j++) out[j] = (float)rnd(&lots);
}
static void some_cosines(Run *r, float *out) { for (int i = 0; i < IMAGES * r->n_text; i++) out[i] = (float)rnd(&lots); }
static void some_key(Run *r, int layer) {
    for (int h = 0; h < H; h++) {
        Head *c = &r->head[layer * H + h];
        for (int j = 0; j < c->len; j++) if (!c->keep[j]) { c->into[j] = LEN - 1; c->w[j] = 0.5f; }
    }
}
static void some_drop(Run *r, int lo, const int *from_end) { (void)r; (void)lo; (void)from_end; }
static const Verbs verbs = { some_votes, some_cosines, some_key, some_drop };

static double cpu_ms(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1e3 + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1e-3;
}

static Head heads[L * H];
static float *votes_kept, *score, *w;
static bool *keep;
static int *into, *pos;

static void lay_out(Run *r, int step) {
    int len = LEN + step;
    size_t n = (size_t)L * H * (LEN + 1);
    memcpy(score, votes_kept, n * sizeof *score);
    memset(keep, true, n);
    for (size_t i = 0; i < n; i++) { into[i] = -1; w[i] = 1; pos[i] = (int)(i % (LEN + 1)); }
    for (int i = 0; i < L * H; i++) {
        size_t at = (size_t)i * (LEN + 1);
        heads[i] = (Head){ len, len, pos + at, score + at, keep + at, into + at, w + at };
    }
    r->head = heads;
    r->step = step;
    r->n_seen = len;
}

static void bench(const Policy *p) {
    char spec[64];
    snprintf(spec, sizeof spec, "%s", p->name);
    Chain chain = policy_parse(spec, 0.5, L);
    int row[LEN], threads = omp_get_max_threads();
    bool row_keep[LEN];
    uint8_t kind[LEN + 1], visible[LEN + 1];
    for (int j = 0; j <= LEN; j++) kind[j] = j >= FIRST && j < FIRST + IMAGES ? IMAGE : TEXT;
    Run r = { .n_layers = L, .n_kv_heads = H, .ctx = 2 * LEN, .n_prompt = LEN, .ratio = chain.part[0].ratio, .seed = 1, .kind = kind, .visible = visible,
              .n_text = WORDS, .opts = &chain.part[0], .verbs = &verbs, .n_rows = LEN, .row = row, .row_keep = row_keep,
              .mem = need(p->mem_layer * L + p->mem_token * 2 * LEN, 1) };
    double best[2] = { 1e9, 1e9 }, cpu[2] = { 0 };
    for (int t = 0; t < LEN; t++) row[t] = t;
    for (int i = 0; i < 9; i++)
        for (int step = 0; step < 2; step++) {
            if (step && !(p->flags & EVERY_TOKEN)) continue;
            lay_out(&r, step);
            memset(row_keep, true, LEN);
            memset(visible, 1, LEN + 1);
            double start = now_ms(), used = cpu_ms();
            for (int l = 0; p->admit && l < L; l++) p->admit(&r, l);
            if (p->compress) p->compress(&r);
            double wall = now_ms() - start;
            if (wall < best[step]) { best[step] = wall; cpu[step] = cpu_ms() - used; }
        }
    printf("%-24s prompt %7.2f ms (CPU %6.2f)", p->name, best[0], cpu[0]);
    if (p->flags & EVERY_TOKEN) printf("   token %6.3f ms", best[1]);
    printf("%s\n", best[0] > 15 && threads > 1 ? "   more than 15 ms" : "");
    free(r.mem);
    policy_free(&chain);
}

static void bench_nearest(void) {              // half the slots leave
    K = &cpu;
    KV *kv = K->kv_new(1, H, D, 1, F32);
    int zero[LEN] = { 0 }, at[LEN];
    for (int j = 0; j < LEN; j++) at[j] = j;
    float *qkv = need((size_t)LEN * 3 * H * D, sizeof *qkv);
    for (size_t i = 0; i < (size_t)LEN * 3 * H * D; i++) qkv[i] = (float)rnd(&lots) - 0.5f;
    K->kv_reserve(kv, 0, LEN);
    K->kv_append(kv, 0, qkv, &(Rows){ LEN, 1, zero, zero, at, at }, H);
    double best = 1e9, multiplications = (double)H * (LEN / 2) * (LEN / 2) * D;
    for (int i = 0; i < H * LEN; i++) keep[i] = i % 2;
    for (int i = 0; i < 9; i++) {
        double start = now_ms();
        K->kv_nearest(into, w, kv, 0, 0, keep);
        best = fmin(best, now_ms() - start);
    }
    printf("%-24s %.2f ms a layer, %.1f GFLOP/s\n", "nearest_key (cpu)", best, 2 * multiplications / best / 1e6);
    K->kv_free(kv);
    free(qkv);
}

int main(int argc, char **argv) {
    size_t n = (size_t)L * H * (LEN + 1);
    omp_set_num_threads(argc > 1 ? atoi(argv[1]) : 2);
    votes_kept = need(n, sizeof *score); score = need(n, sizeof *score); w = need(n, sizeof *w); keep = need(n, 1); into = need(n, 4); pos = need(n, 4);
    for (size_t i = 0; i < n; i++) votes_kept[i] = (float)rnd(&lots);
    printf("deciding for %d heads of %d slots, half dropped, %d threads\n", L * H, LEN, omp_get_max_threads());
    for (const Policy *p = policies; p->name; p++) if (p->admit || p->compress) bench(p);
    bench_nearest();
    return 0;
}
