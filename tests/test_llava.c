// test_llava.c: the whole model against numbers that Hugging Face computed in float32 (P-LLaVA: a small random LLaVA whose weights come
// from a formula), greedy decoding, compression that is off, batches against single runs. Needs no file.
//
//     make build/test_llava && build/test_llava            build/test_llava FILE.bin: the same weights from an exported file, compared byte by byte

#define NO_MAIN
#include "../llava.c"
#include "test.h"

// ----------------------------------------------------------------------------
// weights from a formula: FNV-1a of the tensor's Hugging Face name seeds a hash of the element's index

static float formula(uint32_t seed, uint32_t k, double a, double b) {
    uint32_t x = seed + k * 0x9E3779B9u;
    x ^= x >> 16; x *= 0x85ebca6b; x ^= x >> 13; x *= 0xc2b2ae35; x ^= x >> 16;
    return (float)((2 * (double)(x >> 8) / 16777216 - 1) * a + b);
}

static uint32_t fnv(const char *s) {
    uint32_t h = 2166136261u;
    for (; *s; s++) h = (h ^ (uint8_t)*s) * 16777619u;
    return h;
}

// rows x cols values of tensor `name`, written at row `at` of a padded matrix that starts at `to`
static void fill(char *to, int at, const char *name, int rows, int cols, bool matrix) {
    bool norm = !matrix && strstr(name, "weight") && (strstr(name, "norm") || strstr(name, "layrnorm"));
    uint32_t seed = fnv(name);
    for (int r = 0; r < rows; r++) {
        float *row = (float *)(to + (size_t)(at + r) * row_bytes(F32, cols));
        for (int i = 0; i < cols; i++) row[i] = formula(seed, (uint32_t)(r * cols + i), matrix ? 0.12 : norm ? 0.2 : 0.1, norm ? 1 : 0);
    }
}

static void *keep[4096];
static int n_keep;

// A matrix stacked from up to three tensors of the same width.
static Mat stack(int cols, int n, const int *rows, char names[3][128]) {
    int all = 0, at = 0;
    for (int i = 0; i < n; i++) all += rows[i];
    char *data = keep[n_keep++] = aligned_alloc(64, all * row_bytes(F32, cols));
    memset(data, 0, all * row_bytes(F32, cols));
    for (int i = 0; i < n; i++) { fill(data, at, names[i], rows[i], cols, true); at += rows[i]; }
    return K->weight(F32, all, cols, data, NULL);
}
__attribute__((format(printf, 3, 4)))
static Mat mat(int rows, int cols, const char *format, ...) {
    char name[3][128];
    va_list args;
    va_start(args, format);
    vsnprintf(name[0], 128, format, args);
    va_end(args);
    return stack(cols, 1, &rows, name);
}
__attribute__((format(printf, 2, 3)))
static const float *vec(int n, const char *format, ...) {
    char name[128];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    char *data = keep[n_keep++] = aligned_alloc(64, row_bytes(F32, n));
    fill(data, 0, name, 1, n, false);
    return K->weight(F32, 1, n, data, NULL).data;
}

static Model *p_llava(void) {
    Model *m = need(1, sizeof *m);
    Config *c = &m->config;
    *c = (Config){ .dim = 96, .hidden_dim = 272, .n_layers = 3, .n_heads = 3, .n_kv_heads = 3, .head_dim = 32, .vocab_size = 512, .n_pieces = 500,
                   .max_positions = 512, .norm_eps = 1e-5f, .rope_theta = 10000, .bos_id = 1, .eos_id = 2, .image_id = 500, .vision_dim = 64,
                   .vision_hidden_dim = 256, .vision_layers = 3, .vision_heads = 4, .image_size = 56, .patch_size = 14, .n_patches = 16,
                   .vision_act = ACT_QUICK_GELU, .vision_eps = 1e-5f, .std = { 1, 1, 1 } };
    m->tok_emb = mat(512, 96, "language_model.model.embed_tokens.weight");
    m->head = mat(512, 96, "language_model.lm_head.weight");
    m->norm = vec(96, "language_model.model.norm.weight");
    m->layers = need(c->n_layers, sizeof *m->layers);
    for (int l = 0; l < c->n_layers; l++) {
        Layer *w = &m->layers[l];
        char n[3][128];
        static const char *const part[] = { "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj" };
        for (int i = 0; i < 3; i++) snprintf(n[i], 128, "language_model.model.layers.%d.%s.weight", l, part[i]);
        w->wqkv = stack(96, 3, (int[]){ 96, 96, 96 }, n);
        for (int i = 0; i < 2; i++) snprintf(n[i], 128, "language_model.model.layers.%d.%s.weight", l, part[3 + i]);
        w->w13 = stack(96, 2, (int[]){ 272, 272 }, n);
        w->wo = mat(96, 96, "language_model.model.layers.%d.self_attn.o_proj.weight", l);
        w->w2 = mat(96, 272, "language_model.model.layers.%d.mlp.down_proj.weight", l);
        w->att_norm = vec(96, "language_model.model.layers.%d.input_layernorm.weight", l);
        w->ffn_norm = vec(96, "language_model.model.layers.%d.post_attention_layernorm.weight", l);
    }
#define V "vision_tower.vision_model."
    m->patch = mat(64, 588, V "embeddings.patch_embedding.weight");
    fold_class(m, mat(17, 64, V "embeddings.position_embedding.weight").data, vec(64, V "embeddings.class_embedding"));
    m->pre_norm_w = vec(64, V "pre_layrnorm.weight");
    m->pre_norm_b = vec(64, V "pre_layrnorm.bias");
    m->vision = need(c->vision_layers, sizeof *m->vision);
    for (int l = 0; l < c->vision_layers; l++) {
        VisionLayer *w = &m->vision[l];
        char n[3][128];
        float *b = keep[n_keep++] = aligned_alloc(64, 768);
        for (int i = 0; i < 3; i++) {
            snprintf(n[i], 128, V "encoder.layers.%d.self_attn.%c_proj.bias", l, "qkv"[i]);
            fill((char *)b + i * 256, 0, n[i], 1, 64, false);
            snprintf(n[i], 128, V "encoder.layers.%d.self_attn.%c_proj.weight", l, "qkv"[i]);
        }
        w->wqkv = stack(64, 3, (int[]){ 64, 64, 64 }, n);
        w->bqkv = K->weight(F32, 1, 192, b, NULL).data;
#define VL V "encoder.layers.%d."
        w->wo = mat(64, 64, VL "self_attn.out_proj.weight", l); w->bo = vec(64, VL "self_attn.out_proj.bias", l);
        w->w1 = mat(256, 64, VL "mlp.fc1.weight", l); w->b1 = vec(256, VL "mlp.fc1.bias", l);
        w->w2 = mat(64, 256, VL "mlp.fc2.weight", l); w->b2 = vec(64, VL "mlp.fc2.bias", l);
        w->norm1_w = vec(64, VL "layer_norm1.weight", l); w->norm1_b = vec(64, VL "layer_norm1.bias", l);
        w->norm2_w = vec(64, VL "layer_norm2.weight", l); w->norm2_b = vec(64, VL "layer_norm2.bias", l);
    }
    m->proj1 = mat(96, 64, "multi_modal_projector.linear_1.weight"); m->proj1_b = vec(96, "multi_modal_projector.linear_1.bias");
    m->proj2 = mat(96, 96, "multi_modal_projector.linear_2.weight"); m->proj2_b = vec(96, "multi_modal_projector.linear_2.bias");
    info_fill(m);
    return m;
}

// ----------------------------------------------------------------------------
// against Hugging Face's numbers

// 2e-5: float32 sums in another order than the reference's; an independent double version is within 2.4e-6 of it.
static void near_by(const char *what, const float *got, const double *want, int n) {
    for (int i = 0; i < n; i++) check(fabs(got[i] - want[i]) <= 2e-5, "%s [%d]: %.6f, not %.6f", what, i, got[i], want[i]);
}
#define NEAR(what, got, ...) do { double want_[] = { __VA_ARGS__ }; near_by(what, got, want_, sizeof want_ / sizeof *want_); } while (0)

static const Chain full;

static Runs *new_runs(Model *m, int n_seqs, int ctx) {
    const Config *c = &m->config;
    room(m, ctx, ctx, ctx);
    return runs_new(&full, c->n_layers, c->n_heads, c->n_kv_heads, c->head_dim, c->dim, n_seqs, ctx, F32, false, 1, m->cos_sin, m->tok_emb);
}

static const int ids[] = { 1, 17, 18, 500, 19, 20, 13, 500, 77, 78 };

static Prompt two_images(void) {
    Prompt p = { 0 };
    for (int i = 0; i < 10; i++) {
        if (ids[i] != 500) { push_row(&p, ids[i], TEXT); continue; }
        p.image_at = realloc(p.image_at, (p.n_images + 1) * sizeof *p.image_at);
        p.image_at[p.n_images++] = p.n;
        for (int j = 0; j < 16; j++) push_row(&p, -1, IMAGE);
    }
    return p;
}

static int argmax(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) if (x[i] > x[best]) best = i;
    return best;
}

static void test_vision(Model *m) {
    static float chw[3 * 56 * 56], patches[16 * 588], x0[17 * 64], tap[17 * 64], rows[16 * 96];
    uint32_t seed = fnv("pixel_values");
    for (int image = 0; image < 2; image++) {
        for (int i = 0; i < 3 * 56 * 56; i++) chw[i] = formula(seed, (uint32_t)(image * 3 * 56 * 56 + i), 2, 0);
        if (!image) NEAR("pixel_values", chw, -1.1089606, 1.2344193, -0.2848611, -0.14642787);
        see_pixels(m, chw);
        image_patches(patches, chw, 56, 14);
        float *y = K->alloc(sizeof rows);
        vision_tower(m, y, patches, x0, tap);
        K->get(rows, y, sizeof rows);
        K->release(y);
        if (image == 0) {
            NEAR("hidden state 0, token 0", x0, -1.211525, -1.316601, 0.875305, 1.705788);
            NEAR("hidden state 0, token 1", x0 + 64, 1.199108, -1.354271, 0.852785, -1.045362);
            NEAR("hidden state -2, token 1", tap + 64, 1.040276, -0.612529, 0.699105, -1.018891);
            NEAR("projector, patch 0", rows, 0.248624, 0.051607, -0.046355, -0.487860);
        } else {
            NEAR("hidden state -2, image 1, token 16", tap + 16 * 64, -0.191177, -2.410411, -0.089132, 0.346708);
            NEAR("projector, image 1, patch 15", rows + 15 * 96, 0.327222, -0.112588, -0.237939, 0.197054);
        }
    }
}

static void test_decoder(Model *m) {
    Runs *r = new_runs(m, 1, 64);
    Prompt p = two_images();
    static float logits[4 * 512];
    check(p.n == 40, "%d rows", p.n);
    pass_prompt(r, 0, p.id, p.kind, p.n);
    forward(m, r, &p, (int[]){ 0, 3, 20, 39 }, 4, logits);
    NEAR("logits, row 0", logits, 0.202409, -0.428120, 0.592559, -0.317643, 0.137929, -1.212126);
    NEAR("logits, row 3", logits + 512, 0.722263, 0.151597, -1.307836, -0.075557, 0.179482, -0.789163);
    NEAR("logits, row 20", logits + 1024, 0.171466, 0.660395, -0.408281, 0.147607, 0.912584, 0.402143);
    NEAR("logits, row 39", logits + 1536, 0.211750, 0.776589, -0.164312, -0.752620, 0.901337, 0.525735);
    static const int best[] = { 221, 125, 10, 153 };
    static const double most[] = { 1.925405, 1.692585, 2.053098, 1.955037 }, norm[] = { 14.645587, 14.754162, 15.638974, 15.474504 };
    for (int i = 0; i < 4; i++) {
        double l2 = 0;
        for (int j = 0; j < 512; j++) l2 += (double)logits[i * 512 + j] * logits[i * 512 + j];
        check(argmax(logits + i * 512, 512) == best[i], "row %d: argmax %d", i, argmax(logits + i * 512, 512));
        check(fabs(logits[i * 512 + best[i]] - most[i]) <= 2e-5, "row %d: largest %f", i, logits[i * 512 + best[i]]);
        check(fabs(sqrt(l2) - norm[i]) <= 2e-5, "row %d: norm %f", i, sqrt(l2));
    }
    compress(r, 8);
    static float k[3 * 3 * 40 * 32], v[3 * 3 * 40 * 32];
    K->kv_read(r->kv, 0, NULL, NULL, NULL, k, v);
    NEAR("cached key", k + 39 * 32, -0.256448, -0.141350, -0.803957, -0.139347);
    NEAR("cached value", v + 39 * 32, -1.107950, 0.414961, -1.053864, -0.443654);

    static const int greedy[] = { 153, 10, 10, 10, 10, 10 };
    static const double first[] = { 1.95504, 1.85495, 2.28825, 2.23667, 2.17618, 2.05946 }, second[] = { 1.93105, 1.70717, 1.79539, 1.81730, 1.70189, 1.62416 };
    float *row = logits + 1536;
    for (int i = 0; i < 6; i++) {
        int id = argmax(row, 512);
        float top = row[id];
        check(id == greedy[i], "greedy token %d is %d, not %d", i, id, greedy[i]);
        check(fabs(top - first[i]) <= 2.5e-5, "greedy token %d: logit %f, not %f", i, top, first[i]);      // printed to five decimals
        row[id] = -1e9f;
        check(fabs(row[argmax(row, 512)] - second[i]) <= 2.5e-5, "greedy token %d: runner-up %f, not %f", i, row[argmax(row, 512)], second[i]);
        pass_tokens(r, NULL, &id, 1);
        forward(m, r, NULL, NULL, 1, row);
        compress(r, -1);
    }
    check(r->seq[0].head[0].len == 46 && r->seq[0].n_seen == 46, "%d slots", r->seq[0].head[0].len);
    runs_free(r);
    free(p.id); free(p.kind); free(p.image_at);
}

// Three sequences of different lengths decode beside each other: the same bits as each by itself.
static void test_batch(Model *m) {
    static float one[3][4][512], many[3][4][512], first[512];
    static const int len[] = { 3, 9, 5 };
    for (int batch = 0; batch < 2; batch++) {
        Runs *r = new_runs(m, 3, 64);
        for (int s = 0; s < 3; s++) {
            Prompt p = { 0 };
            for (int i = 0; i < len[s]; i++) push_row(&p, 10 + 7 * s + i, TEXT);
            pass_prompt(r, s, p.id, p.kind, p.n);
            forward(m, r, &p, NULL, 1, first);
            compress(r, 8);
            free(p.id); free(p.kind);
        }
        for (int i = 0; i < 4; i++) {
            int id[] = { 30 + i, 40 + i, 50 + i };
            if (batch) {
                static float all[3 * 512];
                pass_tokens(r, NULL, id, 3);
                forward(m, r, NULL, NULL, 3, all);
                compress(r, -1);
                for (int s = 0; s < 3; s++) memcpy(many[s][i], all + s * 512, sizeof many[s][i]);
            } else for (int s = 0; s < 3; s++) {
                pass_tokens(r, &s, &id[s], 1);
                forward(m, r, NULL, NULL, 1, one[s][i]);
                compress(r, -1);
            }
        }
        runs_free(r);
    }
    check(!memcmp(one, many, sizeof one), "a batch's bits differ from single runs'");
}

// A prompt read in two turns gives what it gives in one; so does reading it row by row. 2e-5: prompts and decode rows may be summed in another order.
static void test_turns(Model *m) {
    static float whole[512], turns[512], single[512];
    Prompt p = two_images();
    Runs *r = new_runs(m, 1, 64);
    pass_prompt(r, 0, p.id, p.kind, p.n);
    forward(m, r, &p, NULL, 1, whole);
    compress(r, 0);
    runs_clear(r, 0);
    int cut = 22;                                             // after the first picture's rows and the text behind it
    Prompt a = p, b = { .n = p.n - cut, .id = p.id + cut, .kind = p.kind + cut };
    a.n = cut;
    a.n_images = 1;
    pass_prompt(r, 0, a.id, a.kind, a.n);
    forward(m, r, &a, NULL, 1, turns);
    compress(r, 20);
    float *second = m->image[0];
    m->image[0] = m->image[1];                                // a turn's pictures are the model's first ones
    b.n_images = 1;
    b.image_at = (int[]){ p.image_at[1] - cut };
    pass_prompt(r, 0, b.id, b.kind, b.n);
    forward(m, r, &b, NULL, 1, turns);
    compress(r, 0);
    m->image[0] = second;
    for (int i = 0; i < 512; i++) check(fabs(turns[i] - whole[i]) <= 2e-5, "two turns: logit %d is %f, not %f", i, turns[i], whole[i]);

    runs_clear(r, 0);
    int text[] = { 1, 17, 18, 19, 20 };
    uint8_t kind[5] = { TEXT, TEXT, TEXT, TEXT, TEXT };
    Prompt q = { .n = 5, .id = text, .kind = kind };
    pass_prompt(r, 0, q.id, q.kind, 5);
    forward(m, r, &q, NULL, 1, whole);
    compress(r, 0);
    runs_clear(r, 0);
    q.n = 1;
    pass_prompt(r, 0, q.id, q.kind, 1);
    forward(m, r, &q, NULL, 1, single);
    compress(r, 4);
    for (int i = 1; i < 5; i++) {
        pass_tokens(r, NULL, &text[i], 1);
        forward(m, r, NULL, NULL, 1, single);
        compress(r, -1);
    }
    for (int i = 0; i < 512; i++) check(fabs(single[i] - whole[i]) <= 2e-5, "row by row: logit %d is %f, not %f", i, single[i], whole[i]);
    runs_free(r);
    free(p.id); free(p.kind); free(p.image_at);
}

// An exported file holds the same bytes as the weights from the formula.
static void same_mat(const char *name, Mat a, Mat b) {
    check(a.type == b.type && a.rows == b.rows && a.cols == b.cols && !memcmp(a.data, b.data, a.rows * a.row_bytes), "%s differs", name);
}
static void test_file(const Model *m, const char *path) {
    ModelFile f = model_open(path);
    Model *e = open_llava(&f);
    const Config *c = &m->config;
    same_mat("tok_emb", m->tok_emb, e->tok_emb);
    same_mat("head", m->head, e->head);
    same_mat("patch", m->patch, e->patch);
    same_mat("proj1", m->proj1, e->proj1);
    same_mat("proj2", m->proj2, e->proj2);
    for (int l = 0; l < c->n_layers; l++) {
        same_mat("wqkv", m->layers[l].wqkv, e->layers[l].wqkv);
        same_mat("wo", m->layers[l].wo, e->layers[l].wo);
        same_mat("w13", m->layers[l].w13, e->layers[l].w13);
        same_mat("w2", m->layers[l].w2, e->layers[l].w2);
        check(!memcmp(m->layers[l].att_norm, e->layers[l].att_norm, 96 * 4) && !memcmp(m->layers[l].ffn_norm, e->layers[l].ffn_norm, 96 * 4), "norms of layer %d differ", l);
    }
    for (int l = 0; l < c->vision_layers; l++) {
        const VisionLayer *a = &m->vision[l], *b = &e->vision[l];
        same_mat("vision wqkv", a->wqkv, b->wqkv);
        same_mat("vision wo", a->wo, b->wo);
        same_mat("vision w1", a->w1, b->w1);
        same_mat("vision w2", a->w2, b->w2);
        check(!memcmp(a->bqkv, b->bqkv, 768) && !memcmp(a->bo, b->bo, 256) && !memcmp(a->b1, b->b1, 1024) && !memcmp(a->b2, b->b2, 256)
              && !memcmp(a->norm1_w, b->norm1_w, 256) && !memcmp(a->norm2_b, b->norm2_b, 256), "vectors of vision layer %d differ", l);
    }
    check(!memcmp(m->vision_pos, e->vision_pos, 17 * 64 * 4), "positions differ");
    check(e->config.vision_layers == 3 && e->config.norm_eps == 1e-5f && e->config.image_id == 500, "config differs");
    close_llava(e);
    model_close(&f);
}

const Kernels *K = &cpu;

int main(int argc, char **argv) {
    quiet = true;
    Model *m = p_llava();
    check(fnv("lm_head.weight") == 0xae5ab6ed, "the formula's seed");
    if (argc > 1) test_file(m, argv[1]);
    test_vision(m);
    test_decoder(m);
    test_batch(m);
    test_turns(m);
    close_llava(m);
    for (int i = 0; i < n_keep; i++) free(keep[i]);
    return finish();
}
