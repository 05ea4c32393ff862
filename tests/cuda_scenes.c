// cuda_scenes.c: the shipped model on both back-ends, for every policy: the same logits, the same slots kept, at every step.
// kernels.cu runs on the CPU through cuda_on_cpu.h (-DEMULATED, linked with kernels_emulated.o) or on a GPU.
//
//     cuda_scenes [POLICY…]                     without arguments: all of them
//
// The cache is f32 on both, and every caption token is forced, so that one early difference does not hide the rest. Where the
// two keep other slots, the scores by which they chose must be as good as equal: both sets are then followed no further.

#define NO_MAIN
#include "../llava.c"
#include "test.h"

#ifdef EMULATED
const Kernels *cuda_on_cpu(void);
#define cuda cuda_on_cpu
enum { EMULATION = 1 };
#else
enum { EMULATION = 0 };
#endif

const Kernels *K;

enum { STEPS = 6, CTX = 160, MAX_SLOTS = 64 * CTX };
typedef struct { int n, len[64], pos[MAX_SLOTS]; float score[MAX_SLOTS]; float *logits; } Kept;   // after a step; scores before it chose

static void look(const Runs *r, Kept *s) {      // the cache as it is
    K->kv_lens(r->kv, 0, s->len);
    s->n = 0;
    for (int i = 0; i < r->n_layers * r->n_kv_heads; i++) s->n += s->len[i];
    if (s->n > MAX_SLOTS) die(NULL, "more slots than this test has room for");
    K->kv_read(r->kv, 0, s->pos, NULL, s->score, NULL, NULL);
}

static Runs *run(Model *m, const Chain *chain, const char *image, const char *text, const char *answer, Kept *before, Kept *after) {
    const Config *c = &m->config;
    double image_ms, vision_ms;
    Runs *r = runs_new(chain, c->n_layers, c->n_heads, c->n_kv_heads, c->head_dim, c->dim, 1, CTX, F32, (chain->flags & SLOT_POS) != 0, 1, m->cos_sin, m->tok_emb);
    Turn turn = { .template = m->info.template, .text = text, .len = strlen(text), .n_images = 1, .first = true, .last_id = -1 };
    Prompt p = { 0 };
    int id[CTX];
    see(m, image, IMAGE_CROP, &image_ms, &vision_ms);
    prompt(m, &p, &turn);
    pass_prompt(r, 0, p.id, p.kind, p.n);
    forward(m, r, &p, NULL, 1, after[0].logits);
    look(r, &before[0]);
    compress(r, STEPS);
    look(r, &after[0]);
    int n = tokenizer_encode(m->info.tok, answer, strlen(answer), true, id, CTX);
    for (int t = 1; t < STEPS; t++) {
        int seq = 0, token = id[(t - 1) % n];
        pass_tokens(r, &seq, &token, 1);
        forward(m, r, NULL, NULL, 1, after[t].logits);
        look(r, &before[t]);
        compress(r, -1);
        look(r, &after[t]);
    }
    free(p.id); free(p.kind); free(p.image_at);
    return r;
}

// How far apart, by the CPU's scores, are the slots that one back-end kept and the other did not: 0 if there are none.
static double gap(const Kept *before, const Kept *a, const Kept *b, int n_heads) {
    double worst = 0;
    int at = 0, at_a = 0, at_b = 0;
    for (int h = 0; h < n_heads; h++) {
        double lo = INFINITY, hi = -INFINITY;
        for (int i = 0, j = 0, k = 0; i < before->len[h]; i++) {
            bool in_a = j < a->len[h] && a->pos[at_a + j] == before->pos[at + i], in_b = k < b->len[h] && b->pos[at_b + k] == before->pos[at + i];
            j += in_a; k += in_b;
            if (in_a == in_b) continue;
            if (before->score[at + i] < lo) lo = before->score[at + i];
            if (before->score[at + i] > hi) hi = before->score[at + i];
        }
        if (hi - lo > worst) worst = hi - lo;
        at += before->len[h]; at_a += a->len[h]; at_b += b->len[h];
    }
    return worst;
}

int main(int argc, char **argv) {
    static const char *const all[] = {
        "full", "random", "random:rows", "stride", "stride:rows", "streaming", "streaming:released", "h2o", "h2o:released", "h2o:lookm", "roco",
        "snapkv", "snapkv:lookm", "elastic", "elastic:released", "prefixkv:online", "lookm", "lookm:merge=weighted", "lookm:released",
        "fastv", "fastv:lmms", "fastv:mask", "simignore", "fastv:k=2,r=0.5+h2o:r=0.4" };
    static const char *const images[] = { "models/scenes/1000.png", "models/scenes/1003.png" };
    const char *text = "Describe the image in detail.", *answer = "A small brown cross and a large red square";
    const Kernels *back_end[2] = { &cpu, cuda() };
    if (!back_end[1]) return 1;
    quiet = true;
    ModelFile f = model_open("models/scenes-llava.bin");
    Model *m[2];
    Kept *before[2], *after[2];
    for (int b = 0; b < 2; b++) {
        K = back_end[b];
        m[b] = open_llava(&f);
        room(m[b], CTX, 1, CTX);
        before[b] = need(STEPS, sizeof(Kept));
        after[b] = need(STEPS, sizeof(Kept));
        for (int t = 0; t < STEPS; t++) after[b][t].logits = need(m[b]->config.vocab_size, sizeof(float));
    }
    int n_heads = m[0]->config.n_layers * m[0]->config.n_kv_heads, vocab = m[0]->config.vocab_size, n_policies = argc > 1 ? argc - 1 : (int)(sizeof all / sizeof *all);
    if (n_heads > 64) die(NULL, "more heads than this test has room for");
    for (int i = 0; i < n_policies; i++) {
        const char *policy = argc > 1 ? argv[i + 1] : all[i];
        double worst = 0, worst_gap = 0;
        int same = 0, steps = 0;
        for (int k = 0; k < (EMULATION ? 1 : 2); k++) {
            for (int b = 0; b < 2; b++) {
                K = back_end[b];
                Chain chain = policy_parse(policy, strstr(policy, "r=") ? NAN : 0.5, m[b]->config.n_layers);
                runs_free(run(m[b], &chain, images[k], text, answer, before[b], after[b]));
                K->release(m[b]->image[--m[b]->n_images]);
                policy_free(&chain);
            }
            for (int t = 0; t < STEPS; t++) {
                Kept *x = &after[0][t], *y = &after[1][t];
                for (int j = 0; j < vocab; j++) {
                    double e = fabs(x->logits[j] - y->logits[j]) / (1 + fabs(x->logits[j]));
                    if (!(e <= worst)) worst = e;
                }
                steps++;
                bool equal = x->n == y->n && !memcmp(x->len, y->len, n_heads * sizeof(int)) && !memcmp(x->pos, y->pos, x->n * sizeof(int));
                same += equal;
                if (equal) continue;
                double g = gap(&before[0][t], x, y, n_heads);
                if (g > worst_gap) worst_gap = g;
                break;
            }
        }
        printf("%-28s logits within %.1e; the same slots after %d of %d steps", policy, worst, same, steps);
        if (worst_gap > 0) printf(", scores within %.1e where not", worst_gap);
        printf("\n");
        check(worst < 1e-4, "%s: logits differ by %g", policy, worst);       // sums in another order, 4 layers deep: 6e-6 was seen
        check(worst_gap < 1e-5, "%s: other slots were kept, although their scores differ by %g", policy, worst_gap);
    }
    for (int b = 0; b < 2; b++) {
        K = back_end[b];
        close_llava(m[b]);
        for (int t = 0; t < STEPS; t++) free(after[b][t].logits);
        free(before[b]);
        free(after[b]);
    }
    model_close(&f);
    return finish();
}
