// gpu_model.c: how fast llava.c runs on the CUDA back-end, with and without compression, at the shapes of LLaVA-1.5. Its own
// forward pass, cache and policies; random f16 weights made here, so that no model file is read. tests/gpu.sh builds and runs it:
//
//     gpu_model 7B|13B COPY_GBS MATRIX_TFLOPS    both rates as gpu_bench measured them in the same run
//     gpu_model dry                              toy sizes: the numbers mean nothing, but every line of this file has run
//
// Times are wall-clock around forward(), which ends when the logits are on the host: medians after a warm-up. For compress() they
// end when the cache has its new size.

#define NO_MAIN
// No picture is read here, so stb_image.h, which a bare machine with a GPU does not have, is not needed: these stand in for image.h.
#define IMAGE_H
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include "error.h"
enum { IMAGE_CROP, IMAGE_PAD };
typedef struct { int w, h; uint8_t *rgb; } Image;
static Image image_load(const char *path) { die(NULL, "%s: no picture is read here", path); }
static Image image_square(Image in, int size, int mode) { (void)size; (void)mode; return in; }
static void image_normalize(float *out, Image in, const float *mean, const float *std) { (void)out; (void)in; (void)mean; (void)std; }
static void image_patches(float *out, const float *chw, int size, int patch) { (void)out; (void)chw; (void)size; (void)patch; }
#include "../llava.c"

#ifdef EMULATED
const Kernels *cuda_on_cpu(void);
#define cuda cuda_on_cpu
#endif

const Kernels *K;

enum { CONTEXT = 650, IMAGE_AT = 35, MAX_B = 16 };
static const double RATIO = 0.8;
static bool dry;
static double bandwidth, matrix_rate;            // bytes/s, FLOP/s

static const char *size;                         // "7B"
static struct { char what[80]; double is, should; bool at_most; } aim[8];
static int n_aims;
static void aim_for(const char *what, int rows, double is, double should, bool at_most) {
    aim[n_aims].is = is; aim[n_aims].should = should; aim[n_aims].at_most = at_most;
    snprintf(aim[n_aims++].what, sizeof aim->what, what, rows);
}

// ----------------------------------------------------------------------------
// a model of random numbers: one block of them on the host, from which every matrix is copied

static uint16_t *h_random;
static float *h_ones;

static void make_random(size_t n) {
    h_random = need(n, sizeof *h_random);
    #pragma omp parallel for
    for (size_t i = 0; i < n; i++) {
        uint32_t x = (uint32_t)i * 2654435761u;
        x ^= x >> 16; x *= 0x85ebca6bu; x ^= x >> 13; x *= 0xc2b2ae35u; x ^= x >> 16;
        h_random[i] = (uint16_t)((x & 0x8000) | (0x2000 + (x & 0x7fff) % 0x600));     // sign, and 2^-7 to 1.5 * 2^-6: about 1 / sqrt(cols)
    }
    h_ones = need(1 << 16, sizeof *h_ones);
    for (int i = 0; i < 1 << 16; i++) h_ones[i] = 1;
}
static Mat random_mat(int rows, int cols) { return K->weight(F16, rows, cols, h_random, NULL); }
static const float *ones(int n) {
    float *p = K->alloc(n * sizeof *p);
    K->put(p, h_ones, n * sizeof *p);
    return p;
}

static Model *random_llava(const Config *shape) {
    Model *m = need(1, sizeof *m);
    Config *c = &m->config;
    *c = *shape;
    int vd = c->vision_dim, rows = 3 * c->dim;
    if (rows < c->vocab_size) rows = c->vocab_size;
    if (rows < 2 * c->hidden_dim) rows = 2 * c->hidden_dim;
    make_random(rows * row_bytes(F16, c->dim) / 2);               // the largest matrix of all
    m->tok_emb = random_mat(c->vocab_size, c->dim);
    m->head = random_mat(c->vocab_size, c->dim);
    m->norm = ones(c->dim);
    m->layers = need(c->n_layers, sizeof *m->layers);
    for (int l = 0; l < c->n_layers; l++)
        m->layers[l] = (Layer){ .wqkv = random_mat(3 * c->dim, c->dim), .wo = random_mat(c->dim, c->dim), .w13 = random_mat(2 * c->hidden_dim, c->dim),
                                .w2 = random_mat(c->dim, c->hidden_dim), .att_norm = ones(c->dim), .ffn_norm = ones(c->dim) };
    m->patch = random_mat(vd, 3 * c->patch_size * c->patch_size);
    m->vision_pos = K->alloc((size_t)(1 + c->n_patches) * vd * sizeof(float));
    m->pre_norm_w = ones(vd); m->pre_norm_b = ones(vd);
    m->vision = need(c->vision_layers, sizeof *m->vision);
    for (int l = 0; l < c->vision_layers; l++)
        m->vision[l] = (VisionLayer){ .wqkv = random_mat(3 * vd, vd), .bqkv = ones(3 * vd), .wo = random_mat(vd, vd), .bo = ones(vd),
                                      .w1 = random_mat(c->vision_hidden_dim, vd), .b1 = ones(c->vision_hidden_dim),
                                      .w2 = random_mat(vd, c->vision_hidden_dim), .b2 = ones(vd),
                                      .norm1_w = ones(vd), .norm1_b = ones(vd), .norm2_w = ones(vd), .norm2_b = ones(vd) };
    m->proj1 = random_mat(c->dim, vd); m->proj2 = random_mat(c->dim, c->dim);
    m->proj1_b = ones(c->dim); m->proj2_b = ones(c->dim);
    info_fill(m);
    m->image = need(1, sizeof *m->image);
    m->image[0] = K->alloc((size_t)c->n_patches * c->dim * sizeof(float));
    m->n_images = 1;
    free(h_random);
    free(h_ones);
    return m;
}

// The numbers of LLaVA-1.5 (arXiv:2310.03744): CLIP ViT-L/14-336 and Vicuna.
static Config shape(int dim, int hidden_dim, int n_layers, int n_heads) {
    Config c = { .dim = dim, .hidden_dim = hidden_dim, .n_layers = n_layers, .n_heads = n_heads, .n_kv_heads = n_heads, .head_dim = 128,
                 .vocab_size = 32064, .n_pieces = 32000, .max_positions = 4096, .norm_eps = 1e-5f, .rope_theta = 10000, .bos_id = 1, .eos_id = 2,
                 .image_id = 32000, .vision_dim = 1024, .vision_hidden_dim = 4096, .vision_layers = 23, .vision_heads = 16, .image_size = 336,
                 .patch_size = 14, .n_patches = 576, .vision_act = ACT_QUICK_GELU, .vision_eps = 1e-5f };
    if (dry) {
        c.dim = 128; c.hidden_dim = 160; c.n_layers = 3; c.n_heads = c.n_kv_heads = 1; c.vocab_size = 96; c.n_pieces = 90;
        c.vision_dim = 64; c.vision_hidden_dim = 96; c.vision_layers = 1; c.vision_heads = 1; c.image_size = 56; c.n_patches = 16;
    }
    return c;
}

static double decoder_bytes(const Config *c) {   // weights that a decode step reads
    return 2.0 * (c->n_layers * (4.0 * c->dim * c->dim + 3.0 * c->dim * c->hidden_dim) + (double)c->vocab_size * c->dim);
}

// ----------------------------------------------------------------------------
// runs

static int by_size(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }
static double median(double *x, int n) { qsort(x, n, sizeof *x, by_size); return x[n / 2]; }

static Runs *runs_for(Model *m, const Chain *chain, int n_seqs, int ctx) {
    const Config *c = &m->config;
    room(m, ctx > n_seqs ? ctx : n_seqs, n_seqs, ctx);
    return runs_new(chain, c->n_layers, c->n_heads, c->n_kv_heads, c->head_dim, c->dim, n_seqs, ctx, F16,
                    (chain->flags & SLOT_POS) != 0, 1, m->cos_sin, m->tok_emb);
}

// T rows: text, one picture, the question.
static Prompt rows_of(const Model *m, int T) {
    Prompt p = { 0 };
    int at = IMAGE_AT < T - m->config.n_patches ? IMAGE_AT : 0;
    for (int t = 0; t < T; t++) {
        bool image = t >= at && t < at + m->config.n_patches;
        push_row(&p, image ? -1 : 3 + t % 80, image ? IMAGE : t < at ? TEMPLATE : TEXT);
    }
    p.n_images = 1;
    p.image_at = need(1, sizeof *p.image_at);
    p.image_at[0] = at;
    return p;
}
static void free_rows(Prompt *p) { free(p->id); free(p->kind); free(p->image_at); }

// One prompt of sequence 0; ms of its pass, and of what the policy does after it.
static void run_prompt(Model *m, Runs *r, const Prompt *p, int to_come, float *logits, double *pass_ms, double *cut_ms) {
    float done;
    runs_clear(r, 0);
    pass_prompt(r, 0, p->id, p->kind, p->n);
    K->get(&done, m->cos_sin, sizeof done);
    double t0 = now_ms();
    forward(m, r, p, NULL, 1, logits);
    double t1 = now_ms();
    compress(r, to_come);
    K->get(&done, m->cos_sin, sizeof done);
    *pass_ms = t1 - t0;
    *cut_ms = now_ms() - t1;
}

static void step(Model *m, Runs *r, int B, float *logits) {
    int id[MAX_B];
    for (int b = 0; b < B; b++) id[b] = 5 + b;
    pass_tokens(r, NULL, id, B);
    forward(m, r, NULL, NULL, B, logits);
    compress(r, -1);
}

static double cache_bytes(Model *m, const Runs *r, int B) {  // keys and values that a decode step reads
    const Config *c = &m->config;
    int *len = need(c->n_layers * c->n_kv_heads, sizeof *len);
    double n = 0;
    for (int s = 0; s < B; s++) {
        K->kv_lens(r->kv, s, len);
        for (int i = 0; i < c->n_layers * c->n_kv_heads; i++) n += len[i];
    }
    free(len);
    return n * c->head_dim * 4;
}

// ----------------------------------------------------------------------------

static void bench_vision(Model *m) {
    const Config *c = &m->config;
    size_t n = (size_t)c->n_patches * 3 * c->patch_size * c->patch_size;
    float *patches = need(n, sizeof *patches), done;
    double ms[9];
    int n_runs = dry ? 1 : 9;
    for (int i = dry ? -1 : -2; i < n_runs; i++) {
        double t = now_ms();
        vision_tower(m, m->image[0], patches, NULL, NULL);
        K->get(&done, m->image[0], sizeof done);
        if (i >= 0) ms[i] = now_ms() - t;
    }
    double T = 1 + c->n_patches, D = c->vision_dim, H = c->vision_hidden_dim, L = c->vision_layers, t = median(ms, n_runs);
    double flops = 2 * T * L * (4 * D * D + 2 * D * H) + 4 * L * T * T * D + 2.0 * c->n_patches * (588 * D + D * c->dim + (double)c->dim * c->dim);
    printf("| vision tower and projector, one picture | ms | TFLOP/s | of matrix rate |\n|---|---|---|---|\n| CLIP ViT-L/14-336 | %.2f | %.0f | %.2f |\n\n",
           t, flops / t / 1e9, flops / t * 1e3 / matrix_rate);
    fflush(stdout);
    free(patches);
}

static void bench_decode(Model *m, float *logits) {
    Chain full = policy_parse("full", NAN, m->config.n_layers);
    int context = dry ? 40 : CONTEXT, steps = dry ? 1 : 30;
    printf("| decode, %s, f16, context %d | tokens/s | ms a step | of copy bandwidth |\n|---|---|---|---|\n", size, context);
    for (int B = 1; B <= MAX_B; B = B == 1 ? 8 : 2 * B) {
        Runs *r = runs_for(m, &full, B, context + steps + 8);
        Prompt p = rows_of(m, context);
        double pass, cut, ms[64];
        run_prompt(m, r, &p, steps + 8, logits, &pass, &cut);
        for (int s = 1; s < B; s++) runs_copy(r, s, 0);
        for (int i = -4; i < steps; i++) {
            double t = now_ms();
            step(m, r, B, logits);
            if (i >= 0) ms[i] = now_ms() - t;
        }
        double t = median(ms, steps), of_copy = (decoder_bytes(&m->config) + cache_bytes(m, r, B)) / t * 1e3 / bandwidth;
        printf("| batch %d | %.1f | %.3f | %.2f |\n", B, B / t * 1e3, t, of_copy);
        fflush(stdout);
        if (B == 1) aim_for("decode at batch %d: share of the copy bandwidth", B, of_copy, 0.6, false);
        free_rows(&p);
        runs_free(r);
    }
    printf("\n");
    policy_free(&full);
}

// The prompt alone, then with each policy: what its scores add to the pass, and what deciding and compaction take after it.
static void bench_prompt(Model *m, float *logits) {
    static const char *const policy[] = { "full", "h2o", "snapkv", "elastic", "prefixkv:online", "streaming", "lookm", "fastv:k=2" };
    const Config *c = &m->config;
    for (int k = 0; k < 2; k++) {
        int T = dry ? (k ? 70 : 30) : k ? 2048 : 620, n = dry ? 1 : 5;
        double weights = c->n_layers * (4.0 * c->dim * c->dim + 3.0 * c->dim * c->hidden_dim), attention = (double)c->n_layers * T * T * c->dim;
        double flops = 2 * (T * weights + attention), plain = 0;
        printf("| prompt of %d rows, %s, f16, -r %.1f | ms | TFLOP/s | of matrix rate | pass | after it: scores to the host, choice, merging, "
               "compaction |\n|---|---|---|---|---|---|\n", T, size, RATIO);
        Prompt p = rows_of(m, T);
        for (size_t i = 0; i < sizeof policy / sizeof *policy; i++) {
            Chain chain = policy_parse(policy[i], RATIO, c->n_layers);
            Runs *r = runs_for(m, &chain, 1, T + 16);
            double pass[8], cut[8];
            for (int j = dry ? 0 : -2; j < n; j++) run_prompt(m, r, &p, 16, logits, &pass[j < 0 ? 0 : j], &cut[j < 0 ? 0 : j]);
            double a = median(pass, n), b = median(cut, n);
            if (i == 0) {
                plain = a;
                printf("| %s | %.2f | %.0f | %.2f | | +%.1f %% |\n", policy[i], a, flops / a / 1e9, flops / a * 1e3 / matrix_rate, 100 * b / plain);
                aim_for("prompt of %d rows: share of the matrix rate", T, flops / a * 1e3 / matrix_rate, 0.25, false);
            } else printf("| %s | %.2f | | | %+.1f %% | +%.1f %% |\n", policy[i], a + b, 100 * (a / plain - 1), 100 * b / plain);
            if (i == 1) aim_for("scores of all queries, %d rows: share of the prompt", T, a / plain - 1, 0.05, true);
            fflush(stdout);
            runs_free(r);
            policy_free(&chain);
        }
        printf("\n");
        free_rows(&p);
    }
}

// Batch 16: one prompt of 1,024 rows, its compressed cache copied to every sequence, then 512 tokens, the policy acting as it does.
// The ceiling: what the copy bandwidth allows if a step reads the weights and the slots that are there, and nothing else.
static void bench_batch(Model *m, float *logits) {
    static const char *const policy[] = { "full", "elastic", "h2o", "streaming", "prefixkv:online", "lookm", "snapkv" };
    int rows = dry ? 40 : 1024, tokens = dry ? 1 : 512, B = MAX_B;
    double full = 0;
    printf("| batch %d, %s, %d + %d tokens, -r %.1f | tokens/s | x full | ceiling by bytes | of the ceiling | cache, MiB a sequence | prompt, ms "
           "| cut, ms |\n|---|---|---|---|---|---|---|---|\n", B, size, rows, tokens, RATIO);
    for (size_t i = 0; i < sizeof policy / sizeof *policy; i++) {
        Chain chain = policy_parse(policy[i], i ? RATIO : NAN, m->config.n_layers);
        Runs *r = runs_for(m, &chain, B, rows + tokens + 8);
        Prompt p = rows_of(m, rows);
        double pass, cut, bytes;
        for (int j = dry; j < 2; j++) run_prompt(m, r, &p, tokens + 4, logits, &pass, &cut);
        for (int s = 1; s < B; s++) runs_copy(r, s, 0);
        for (int j = 0; j < 3; j++) step(m, r, B, logits);
        bytes = cache_bytes(m, r, B);
        double t = now_ms();
        for (int j = 0; j < tokens; j++) step(m, r, B, logits);
        t = (now_ms() - t) / tokens;
        bytes = (bytes + cache_bytes(m, r, B)) / 2 + decoder_bytes(&m->config);
        double speed = B / t * 1e3, ceiling = B * bandwidth / bytes;
        if (!full) full = speed;
        printf("| %s | %.0f | %.2f | %.0f | %.2f | %.1f | %.1f | %.1f |\n", policy[i], speed, speed / full, ceiling, speed / ceiling,
               K->kv_bytes(r->kv) / 1048576.0 / B, pass, cut);
        fflush(stdout);
        free_rows(&p);
        runs_free(r);
        policy_free(&chain);
    }
    printf("\n");
}

int main(int argc, char **argv) {
    calm_threads(argv);
    quiet = true;
    dry = argc == 2 && !strcmp(argv[1], "dry");
    bool big = argc == 4 && !strcmp(argv[1], "13B");
    if (!dry && (argc != 4 || (!big && strcmp(argv[1], "7B")) || !(atof(argv[2]) > 0) || !(atof(argv[3]) > 0)))
        die("gpu_bench prints the rates", "usage: gpu_model 7B|13B COPY_GBS MATRIX_TFLOPS, or gpu_model dry");
    size = argv[1];
    bandwidth = dry ? 1e9 : atof(argv[2]) * 1e9;
    matrix_rate = dry ? 1e12 : atof(argv[3]) * 1e12;
    K = cuda();
    if (!K) return 1;
    Config c = big ? shape(5120, 13824, 40, 40) : shape(4096, 11008, 32, 32);
    Model *m = random_llava(&c);
    float *logits = need((size_t)MAX_B * c.vocab_size, sizeof *logits);
    if (!big) bench_vision(m);
    bench_decode(m, logits);
    bench_prompt(m, logits);
    if (!big) bench_batch(m, logits);
    printf("| %s: aim | measured | aimed at | |\n|---|---|---|---|\n", size);
    for (int i = 0; i < n_aims; i++)
        printf("| %s | %.3f | %s %.2f | %s |\n", aim[i].what, aim[i].is, aim[i].at_most ? "at most" : "at least", aim[i].should,
               (aim[i].at_most ? aim[i].is <= aim[i].should : aim[i].is >= aim[i].should) ? "met" : "**missed**");
    printf("\n");
    free(logits);
    close_llava(m);
    return 0;
}
