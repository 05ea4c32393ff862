// test_scenes.c: the shipped model and compression together: perplexity of captions, with the picture, with a wrong one, and with the
// cache compressed after the prompt. The orderings hold with room to spare; a policy or a cache that is broken fails them.
//
//     make build/test_scenes && build/test_scenes [POLICY RATIO …]      with arguments: prints the perplexity of those instead

#define NO_MAIN
#include "../llava.c"
#include "test.h"

const Kernels *K = &cpu;

enum { N_CAPTIONS = 100, BATCH = 25, CTX = 320 };
typedef struct { char image[256], instruction[128]; char *caption; int *id, n; } Caption;
static Caption caption[N_CAPTIONS];
static float *rows[N_CAPTIONS];                   // image rows of each caption's picture

static void read_captions(Model *m, const char *folder) {
    char path[512], line[8192];
    snprintf(path, sizeof path, "%s/captions.tsv", folder);
    FILE *f = fopen(path, "r");
    if (!f) die("run from the repository's root", "%s: %s", path, strerror(errno));
    int n = 0;
    while (n < N_CAPTIONS && fgets(line, sizeof line, f)) {
        char *image = strtok(line, "\t"), *instruction = strtok(NULL, "\t"), *text = strtok(NULL, "\n");
        if (!text) die(NULL, "%s: line %d is not image, instruction, caption", path, n + 1);
        Caption *c = &caption[n];
        snprintf(c->image, sizeof c->image, "%s/%s", folder, image);
        snprintf(c->instruction, sizeof c->instruction, "%s", instruction);
        c->caption = strdup(text);
        c->n = tokenizer_encode(m->info.tok, text, strlen(text), true, NULL, 0) + 1;
        c->id = need(c->n, sizeof *c->id);
        tokenizer_encode(m->info.tok, text, strlen(text), true, c->id, c->n);
        c->id[c->n - 1] = m->config.eos_id;
        n++;
    }
    fclose(f);
    check(n == N_CAPTIONS, "%d captions", n);
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < i && !rows[i]; j++) if (!strcmp(caption[i].image, caption[j].image)) rows[i] = rows[j];
        if (rows[i]) continue;
        double image_ms, vision_ms;
        see(m, caption[i].image, IMAGE_CROP, &image_ms, &vision_ms);
        rows[i] = m->image[m->n_images - 1];
    }
}

static double nll(const float *logits, int n, int id) {
    double most = logits[0], sum = 0;
    for (int i = 1; i < n; i++) if (logits[i] > most) most = logits[i];
    for (int i = 0; i < n; i++) sum += exp(logits[i] - most);
    return log(sum) + most - logits[id];
}

// exp of the mean over all tokens of all captions, </s> included; shift: caption i is read with the picture of caption i + shift.
static double perplexity(Model *m, const char *policy, double ratio, int shift) {
    Chain chain = policy_parse(policy, ratio, m->config.n_layers);
    const Config *c = &m->config;
    int n = c->n_pieces, vocab = c->vocab_size;
    float *logits = need((size_t)BATCH * vocab, sizeof *logits), **seen = m->image;
    double sum = 0;
    size_t tokens = 0;
    room(m, CTX, BATCH, CTX);
    for (int first = 0; first < N_CAPTIONS; first += BATCH) {
        Runs *r = runs_new(&chain, c->n_layers, c->n_heads, c->n_kv_heads, c->head_dim, c->dim, BATCH, CTX, F32,
                           (chain.flags & SLOT_POS) != 0, 1, m->cos_sin, m->tok_emb);
        for (int s = 0; s < BATCH; s++) {
            const Caption *a = &caption[first + s];
            Turn turn = { .template = m->info.template, .text = a->instruction, .len = strlen(a->instruction), .n_images = 1, .first = true, .last_id = -1 };
            Prompt p = { 0 };
            prompt(m, &p, &turn);
            float *one = rows[(first + s + shift) % N_CAPTIONS];
            r->seq[s].seed = first + s;           // a choice by lot for each caption
            m->image = &one;
            pass_prompt(r, s, p.id, p.kind, p.n);
            forward(m, r, &p, NULL, 1, logits);
            compress(r, a->n);
            m->image = seen;
            sum += nll(logits, n, a->id[0]);
            tokens++;
            free(p.id); free(p.kind); free(p.image_at);
        }
        for (int t = 1;; t++) {                   // feeds token t - 1, is asked for token t
            int seq[BATCH], id[BATCH], B = 0;
            for (int s = 0; s < BATCH; s++) if (t < caption[first + s].n) { seq[B] = s; id[B++] = caption[first + s].id[t - 1]; }
            if (!B) break;
            pass_tokens(r, seq, id, B);
            forward(m, r, NULL, NULL, B, logits);
            compress(r, -1);
            for (int b = 0; b < B; b++) sum += nll(logits + (size_t)b * vocab, n, caption[first + seq[b]].id[t]);
            tokens += B;
        }
        runs_free(r);
    }
    free(logits);
    policy_free(&chain);
    return exp(sum / tokens);
}

int main(int argc, char **argv) {
    calm_threads(argv);
    quiet = true;
    ModelFile f = model_open("models/scenes-llava.bin");
    Model *m = open_llava(&f);
    read_captions(m, "models/scenes");
    if (argc > 1) {
        for (int i = 1; i + 1 < argc; i += 2) printf("%s -r %s: %.4f\n", argv[i], argv[i + 1], perplexity(m, argv[i], atof(argv[i + 1]), 0));
        return 0;
    }
    static const char *const name[] = { "random:rows", "fastv:k=2", "fastv:k=2,score=all" };
    double full = perplexity(m, "full", NAN, 0), wrong = perplexity(m, "full", NAN, 3), half[3], quarter[3];
    printf("perplexity of %d captions: full %.4f, with a wrong picture %.2f\n", N_CAPTIONS, full, wrong);
    check(full <= 1.06, "captions: %.4f", full);
    check(full >= 1.036, "better than the captions' own entropy: %.4f", full);
    check(wrong >= 8, "with a wrong picture: %.4f", wrong);
    for (int i = 0; i < 3; i++) {
        half[i] = perplexity(m, name[i], 0.5, 0);
        quarter[i] = perplexity(m, name[i], 0.75, 0);
        printf("%s: half of the image rows %.4f, a quarter %.4f\n", name[i], half[i], quarter[i]);
        check(full <= half[i] && half[i] <= quarter[i], "%s is not monotone in its budget: %.4f, %.4f, %.4f", name[i], full, half[i], quarter[i]);
    }
    for (int i = 1; i < 3; i++)
        check(half[i] < half[0] && quarter[i] < quarter[0], "%s is no better than random: %.4f, %.4f", name[i], half[i], quarter[i]);
    check(perplexity(m, "h2o", 0, 0) == full, "h2o -r 0 is not the full cache");
    close_llava(m);
    model_close(&f);
    for (int i = 0; i < N_CAPTIONS; i++) { free(caption[i].caption); free(caption[i].id); }
    return finish();
}
