// llava.c: LLaVA-1.5 whole: weights, vision tower, projector, prompt, forward pass.
//
// A picture becomes 576 rows (CLIP ViT-L/14-336, second-to-last layer, then a two-layer projector); they stand among the
// question's token embeddings, and a LLaMA decoder reads all of them and answers. What is NOT here: loops over weights or keys
// (kernels.c, kernels.cu), compression (policies.c; the five calls into include/run.h), sampling and options (include/generate.h, cli.h).
//
//     make llava && ./llava models/scenes-llava.bin models/scenes/1001.png
//
// Papers: LLaVA-1.5, Liu et al. 2023, arXiv:2310.03744; CLIP, Radford et al. 2021, arXiv:2103.00020; LLaMA, Touvron et al. 2023,
// arXiv:2302.13971.

#include "image.h"
#include "model.h"
#include "progress.h"
#include "run.h"
#include "tokenizer.h"

// ----------------------------------------------------------------------------
// config, weights, state

typedef struct {
    int dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim;   // the decoder
    int vocab_size, n_pieces, max_positions;
    float norm_eps, rope_theta;
    int bos_id, eos_id, image_id;
    bool prefix_after_special;                                      // text after </s> gets SentencePiece's leading space
    int vision_dim, vision_hidden_dim, vision_layers, vision_heads; // layers that run: one fewer than CLIP has
    int image_size, patch_size, n_patches;
    Act vision_act;
    float vision_eps, mean[3], std[3];
} Config;

typedef struct {                // one decoder layer
    Mat wqkv;                   // ((n_heads + 2 n_kv_heads) head_dim, dim)
    Mat wo;                     // (dim, n_heads head_dim)
    Mat w13, w2;                // (2 hidden_dim, dim): gate, then up; (dim, hidden_dim)
    const float *att_norm, *ffn_norm; // (dim,)
} Layer;

typedef struct {                // one layer of the vision tower
    Mat wqkv, wo;               // (3 vision_dim, vision_dim), (vision_dim, vision_dim)
    Mat w1, w2;                 // (vision_hidden_dim, vision_dim), (vision_dim, vision_hidden_dim)
    const float *bqkv, *bo, *b1, *b2;
    const float *norm1_w, *norm1_b, *norm2_w, *norm2_b; // (vision_dim,)
} VisionLayer;

typedef struct {                // activations of a pass of up to `rows` rows; one allocation
    int rows, want;
    float *memory;
    float *x;                   // (rows, dim) the residual stream
    float *xb;                  // (rows, dim) or (rows, n_heads head_dim), what a half of a layer works on
    float *qkv;                 // (rows, (n_heads + 2 n_kv_heads) head_dim)
    float *lse;                 // (rows, n_heads)
    float *w13x, *hidden;       // (rows, 2 hidden_dim), (rows, hidden_dim)
    float *logits;              // (want, vocab_size)
} State;

struct Model {
    Config config;
    Info info;
    Mat tok_emb, head;          // (vocab_size, dim)
    Layer *layers;
    const float *norm;          // (dim,)
    Mat patch;                  // (vision_dim, 3 patch_size^2)
    float *vision_pos;          // (1 + n_patches, vision_dim), the class embedding added to row 0; back-end memory
    const float *pre_norm_w, *pre_norm_b;
    VisionLayer *vision;
    Mat proj1, proj2;           // (dim, vision_dim), (dim, dim)
    const float *proj1_b, *proj2_b;
    State s;
    float *cos_sin;             // (positions, head_dim / 2, 2)
    int positions;
    float **image;              // (n_images)(n_patches, dim) rows of the pictures seen so far; back-end memory
    int n_images;
};

static void config_read(Config *c, const ModelFile *f) {
    const int big = 1 << 20;
    c->dim = model_int(f, "dim", 1, big);
    c->hidden_dim = model_int(f, "hidden_dim", 1, big);
    c->n_layers = model_int(f, "n_layers", 1, 1000);
    c->n_heads = model_int(f, "n_heads", 1, 4096);
    c->n_kv_heads = model_int(f, "n_kv_heads", 1, c->n_heads);
    c->head_dim = model_int(f, "head_dim", 2, 1024);
    c->vocab_size = model_int(f, "vocab_size", 1, big);
    c->n_pieces = model_int(f, "n_pieces", 1, c->vocab_size);
    c->max_positions = model_int(f, "max_positions", 1, big);
    c->norm_eps = (float)model_float(f, "norm_eps", 0, 1);
    c->rope_theta = (float)model_float(f, "rope_theta", 1, 1e12);
    c->bos_id = model_int(f, "bos_id", 0, c->vocab_size - 1);
    c->eos_id = model_int(f, "eos_id", 0, c->vocab_size - 1);
    c->image_id = model_int(f, "image_id", -1, c->vocab_size - 1);
    c->prefix_after_special = model_int(f, "prefix_after_special", 0, 1);
    c->vision_dim = model_int(f, "vision_dim", 1, big);
    c->vision_hidden_dim = model_int(f, "vision_hidden_dim", 1, big);
    c->vision_layers = model_int(f, "vision_layers", 0, 1000);
    c->vision_heads = model_int(f, "vision_heads", 1, 4096);
    c->image_size = model_int(f, "image_size", 1, 8192);
    c->patch_size = model_int(f, "patch_size", 1, c->image_size);
    c->vision_eps = (float)model_float(f, "vision_eps", 0, 1);
    c->vision_act = model_int(f, "vision_act", 0, 1) ? ACT_QUICK_GELU : ACT_GELU;
    for (int i = 0; i < 3; i++) {
        char name[32];
        snprintf(name, sizeof name, "image_mean_%d", i);
        c->mean[i] = (float)model_float(f, name, -10, 10);
        snprintf(name, sizeof name, "image_std_%d", i);
        c->std[i] = (float)model_float(f, name, 1e-6, 10);
    }
    if (c->n_heads % c->n_kv_heads) die(MODEL_HINT, "%s: n_heads %d is no multiple of n_kv_heads %d", f->path, c->n_heads, c->n_kv_heads);
    if (c->head_dim % 2) die(MODEL_HINT, "%s: head_dim %d is odd: rotary embedding needs pairs", f->path, c->head_dim);
    if (c->vision_dim % c->vision_heads) die(MODEL_HINT, "%s: vision_dim %d is no multiple of vision_heads %d", f->path, c->vision_dim, c->vision_heads);
    if (c->image_size % c->patch_size) die(MODEL_HINT, "%s: image_size %d is no multiple of patch_size %d", f->path, c->image_size, c->patch_size);
    if ((int64_t)c->n_heads * c->head_dim > big || (int64_t)(c->image_size / c->patch_size) * (c->image_size / c->patch_size) > big)
        die(MODEL_HINT, "%s: heads or patches are too many", f->path);
    c->n_patches = (c->image_size / c->patch_size) * (c->image_size / c->patch_size);
}

// CLIP adds the class embedding to nothing but its own row: it is folded into row 0 of the position table.
static void fold_class(Model *m, const float *h_pos, const float *h_class) {
    const Config *c = &m->config;
    size_t n = (size_t)(1 + c->n_patches) * c->vision_dim, row = row_bytes(F32, c->vision_dim) / sizeof(float);
    float *h = need(n, sizeof *h);
    for (int t = 0; t <= c->n_patches; t++) memcpy(h + (size_t)t * c->vision_dim, h_pos + t * row, c->vision_dim * sizeof *h);
    for (int i = 0; i < c->vision_dim; i++) h[i] += h_class[i];
    m->vision_pos = K->alloc(n * sizeof *h);
    K->put(m->vision_pos, h, n * sizeof *h);
    free(h);
}

static void info_fill(Model *m) {
    const Config *c = &m->config;
    m->info = (Info){ .dim = c->dim, .n_layers = c->n_layers, .n_heads = c->n_heads, .n_kv_heads = c->n_kv_heads, .head_dim = c->head_dim,
                      .vocab_size = c->vocab_size, .n_pieces = c->n_pieces, .max_positions = c->max_positions, .bos_id = c->bos_id,
                      .n_stop = 1, .stop_id = { c->eos_id }, .image_id = c->image_id, .image_rows = c->n_patches, .image_size = c->image_size, .template = m->info.template,
                      .image_mode = m->info.image_mode, .tok = m->info.tok, .tok_emb = m->tok_emb };
}

static Model *open_llava(const ModelFile *f) {
    Model *m = need(1, sizeof *m);
    Config *c = &m->config;
    config_read(c, f);
    m->info.template = model_int(f, "template", 0, N_TEMPLATES - 1);
    m->info.image_mode = model_int(f, "image_mode", IMAGE_CROP, IMAGE_PAD);
    m->info.tok = tokenizer_open(f->data + f->header->tok_offset, f->header->tok_bytes, f->path);
    if (tokenizer_size(m->info.tok) < c->n_pieces)
        die(MODEL_HINT, "%s: the tokenizer has %d pieces, the model needs %d", f->path, tokenizer_size(m->info.tok), c->n_pieces);

    int q_rows = c->n_heads * c->head_dim, kv_rows = c->n_kv_heads * c->head_dim, vd = c->vision_dim;
    m->tok_emb = model_mat(f, c->vocab_size, c->dim, "tok_emb");
    m->head = model_mat(f, c->vocab_size, c->dim, "head");
    m->norm = model_vec(f, c->dim, "norm");
    m->layers = need(c->n_layers, sizeof *m->layers);
    for (int l = 0; l < c->n_layers; l++)
        m->layers[l] = (Layer){
            .wqkv = model_mat(f, q_rows + 2 * kv_rows, c->dim, "layers.%d.wqkv", l),
            .wo = model_mat(f, c->dim, q_rows, "layers.%d.wo", l),
            .w13 = model_mat(f, 2 * c->hidden_dim, c->dim, "layers.%d.w13", l),
            .w2 = model_mat(f, c->dim, c->hidden_dim, "layers.%d.w2", l),
            .att_norm = model_vec(f, c->dim, "layers.%d.att_norm", l),
            .ffn_norm = model_vec(f, c->dim, "layers.%d.ffn_norm", l) };

    m->patch = model_mat(f, vd, 3 * c->patch_size * c->patch_size, "vision.patch");
    const Tensor *pos = model_tensor(f, "vision.pos", 1 + c->n_patches, vd), *class = model_tensor(f, "vision.class", 1, vd);
    if (pos->type != F32 || class->type != F32) die(MODEL_HINT, "%s: vision.pos and vision.class must be f32", f->path);
    fold_class(m, (const float *)(f->data + pos->offset), (const float *)(f->data + class->offset));
    m->pre_norm_w = model_vec(f, vd, "vision.pre_norm_w");
    m->pre_norm_b = model_vec(f, vd, "vision.pre_norm_b");
    m->vision = need(c->vision_layers, sizeof *m->vision);
    for (int l = 0; l < c->vision_layers; l++)
        m->vision[l] = (VisionLayer){
            .wqkv = model_mat(f, 3 * vd, vd, "vision.layers.%d.wqkv", l), .bqkv = model_vec(f, 3 * vd, "vision.layers.%d.bqkv", l),
            .wo = model_mat(f, vd, vd, "vision.layers.%d.wo", l), .bo = model_vec(f, vd, "vision.layers.%d.bo", l),
            .w1 = model_mat(f, c->vision_hidden_dim, vd, "vision.layers.%d.w1", l), .b1 = model_vec(f, c->vision_hidden_dim, "vision.layers.%d.b1", l),
            .w2 = model_mat(f, vd, c->vision_hidden_dim, "vision.layers.%d.w2", l), .b2 = model_vec(f, vd, "vision.layers.%d.b2", l),
            .norm1_w = model_vec(f, vd, "vision.layers.%d.norm1_w", l), .norm1_b = model_vec(f, vd, "vision.layers.%d.norm1_b", l),
            .norm2_w = model_vec(f, vd, "vision.layers.%d.norm2_w", l), .norm2_b = model_vec(f, vd, "vision.layers.%d.norm2_b", l) };
    m->proj1 = model_mat(f, c->dim, vd, "projector.w1");
    m->proj2 = model_mat(f, c->dim, c->dim, "projector.w2");
    m->proj1_b = model_vec(f, c->dim, "projector.b1");
    m->proj2_b = model_vec(f, c->dim, "projector.b2");
    info_fill(m);
    return m;
}

static void close_llava(Model *m) {
    for (int i = 0; i < m->n_images; i++) K->release(m->image[i]);
    K->release(m->s.memory);
    K->release(m->cos_sin);
    K->release(m->vision_pos);
    if (m->info.tok) tokenizer_close(m->info.tok);
    free(m->image);
    free(m->layers);
    free(m->vision);
    free(m);
}

static const Info *info_llava(const Model *m) { return &m->info; }

// cos and sin of every rotary angle. Hugging Face rounds theta_i and the product pos theta_i to float: at position 2000 that
// moves an angle by 1e-4, so a more exact table would be further from the reference.
static void rope_table(Model *m, int positions) {
    const Config *c = &m->config;
    int half = c->head_dim / 2;
    float *h = need((size_t)positions * half * 2, sizeof *h);
    for (int i = 0; i < half; i++) {
        float freq = 1.0f / powf(c->rope_theta, (float)(2 * i) / (float)c->head_dim);
        for (int p = 0; p < positions; p++) {
            float angle = (float)p * freq;
            h[((size_t)p * half + i) * 2] = (float)cos((double)angle);
            h[((size_t)p * half + i) * 2 + 1] = (float)sin((double)angle);
        }
    }
    K->release(m->cos_sin);
    m->cos_sin = K->alloc((size_t)positions * half * 2 * sizeof *h);
    K->put(m->cos_sin, h, (size_t)positions * half * 2 * sizeof *h);
    m->positions = positions;
    m->info.cos_sin = m->cos_sin;
    free(h);
}

static void room(Model *m, int rows, int want, int positions) {
    const Config *c = &m->config;
    State *s = &m->s;
    if (positions > m->positions) rope_table(m, positions);
    if (rows <= s->rows && want <= s->want) return;
    s->rows = rows > s->rows ? rows : s->rows;
    s->want = want > s->want ? want : s->want;
    int q_dim = c->n_heads * c->head_dim, xb_dim = q_dim > c->dim ? q_dim : c->dim, wide = c->hidden_dim > c->dim ? c->hidden_dim : c->dim;
    struct { float **p; size_t n; } part[] = {
        { &s->x, (size_t)s->rows * c->dim }, { &s->xb, (size_t)s->rows * xb_dim },
        { &s->qkv, (size_t)s->rows * (c->n_heads + 2 * c->n_kv_heads) * c->head_dim }, { &s->lse, (size_t)s->rows * c->n_heads },
        { &s->w13x, (size_t)s->rows * 2 * wide }, { &s->hidden, (size_t)s->rows * wide },
        { &s->logits, (size_t)s->want * c->vocab_size } };
    size_t bytes = 0;
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) bytes += pad64(part[i].n * sizeof(float));
    K->release(s->memory);
    s->memory = K->alloc(bytes);
    char *at = (char *)s->memory;
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) {
        *part[i].p = (float *)at;
        at += pad64(part[i].n * sizeof(float));
    }
}

// ----------------------------------------------------------------------------
// the vision tower: CLIP's layers but the last, of which LLaVA reads the patch rows; then the projector

// y (n_patches, dim) from h_patches (n_patches, 3 patch_size^2), host memory. x0: hidden state 0 goes there too, for tests; NULL: not.
static void vision_tower(Model *m, float *y, const float *h_patches, float *x0, float *tap) {
    const Config *c = &m->config;
    int T = 1 + c->n_patches, vd = c->vision_dim, hd = vd / c->vision_heads, width = 3 * c->patch_size * c->patch_size;
    int mid = c->vision_hidden_dim > c->dim ? c->vision_hidden_dim : c->dim;
    size_t n_x = pad64((size_t)T * vd * sizeof(float)), n_qkv = 3 * n_x, n_mid = pad64((size_t)T * mid * sizeof(float));
    size_t n_patch = pad64((size_t)c->n_patches * width * sizeof(float));
    char *memory = K->alloc(2 * n_x + n_qkv + n_mid + n_patch);
    float *x = (float *)memory, *xb = (float *)(memory + n_x), *qkv = (float *)(memory + 2 * n_x);
    float *h = (float *)(memory + 2 * n_x + n_qkv), *patches = (float *)(memory + 2 * n_x + n_qkv + n_mid);
    double start = now_ms();

    K->put(patches, h_patches, (size_t)c->n_patches * width * sizeof(float));
    K->rows_copy(x, m->vision_pos, NULL, T, vd);                                            // positions, the class token's row done
    K->matmul(x + vd, patches, m->patch, NULL, ACT_NONE, true, c->n_patches);
    K->layernorm(x, x, m->pre_norm_w, m->pre_norm_b, T, vd, c->vision_eps);
    if (x0) K->get(x0, x, (size_t)T * vd * sizeof(float));
    for (int l = 0; l < c->vision_layers; l++) {
        const VisionLayer *w = &m->vision[l];
        progress("vision tower, layer", l, c->vision_layers, start);
        K->layernorm(xb, x, w->norm1_w, w->norm1_b, T, vd, c->vision_eps);
        K->matmul(qkv, xb, w->wqkv, w->bqkv, ACT_NONE, false, T);
        K->attend(xb, qkv, 3 * vd, qkv + vd, qkv + 2 * vd, 3 * vd, T, T, c->vision_heads, hd);
        K->matmul(x, xb, w->wo, w->bo, ACT_NONE, true, T);
        K->layernorm(xb, x, w->norm2_w, w->norm2_b, T, vd, c->vision_eps);
        K->matmul(h, xb, w->w1, w->b1, c->vision_act, false, T);
        K->matmul(x, h, w->w2, w->b2, ACT_NONE, true, T);
    }
    if (tap) K->get(tap, x, (size_t)T * vd * sizeof(float));
    K->matmul(h, x + vd, m->proj1, m->proj1_b, ACT_GELU, false, c->n_patches);              // the class row ends here
    K->matmul(y, h, m->proj2, m->proj2_b, ACT_NONE, false, c->n_patches);
    K->release(memory);
}

// Pixels (3, image_size, image_size), normalised, host memory -> the next picture's rows.
static void see_pixels(Model *m, const float *chw) {
    const Config *c = &m->config;
    float *patches = need((size_t)c->n_patches * 3 * c->patch_size * c->patch_size, sizeof *patches);
    image_patches(patches, chw, c->image_size, c->patch_size);
    m->image = realloc(m->image, (m->n_images + 1) * sizeof *m->image);
    if (!m->image) die(NULL, "out of memory");
    m->image[m->n_images] = K->alloc((size_t)c->n_patches * c->dim * sizeof(float));
    vision_tower(m, m->image[m->n_images], patches, NULL, NULL);
    m->n_images++;
    free(patches);
}

static void see(Model *m, const char *path, int mode, double *image_ms, double *vision_ms) {
    const Config *c = &m->config;
    double start = now_ms();
    Image full = image_load(path), square = image_square(full, c->image_size, mode);
    float *chw = need((size_t)3 * c->image_size * c->image_size, sizeof *chw);
    image_normalize(chw, square, c->mean, c->std);
    free(full.rgb);
    free(square.rgb);
    *image_ms = now_ms() - start;
    start = now_ms();
    see_pixels(m, chw);
    float done;
    K->get(&done, m->image[m->n_images - 1], sizeof done);       // waits for the device, so that the time is the tower's
    *vision_ms = now_ms() - start;
    free(chw);
}

// ----------------------------------------------------------------------------
// the prompt: a template around what the user says, <image> where a picture goes

static void push_row(Prompt *p, int id, int kind) {
    if (p->n == p->cap) {
        p->cap = p->cap ? 2 * p->cap : 1024;
        p->id = realloc(p->id, p->cap * sizeof *p->id);
        p->kind = realloc(p->kind, p->cap);
        if (!p->id || !p->kind) die(NULL, "out of memory");
    }
    p->id[p->n] = id;
    p->kind[p->n++] = (uint8_t)kind;
}

typedef struct { char *s; uint8_t *user; size_t n; } Text;   // bytes, and which of them the user said

static void say(Text *t, const char *s, size_t n, bool user) {
    t->s = realloc(t->s, t->n + n + 1);
    t->user = realloc(t->user, t->n + n + 1);
    if (!t->s || !t->user) die(NULL, "out of memory");
    memcpy(t->s + t->n, s, n);
    memset(t->user + t->n, user, n);
    t->n += n;
}
static void say_template(Text *t, const char *s) { say(t, s, strlen(s), false); }

// One piece of text, encoded by itself. A token belongs to the user if its last byte does: "▁What" does although the blank
// is the template's.
static void push_text(const Model *m, Prompt *p, const char *s, const uint8_t *user, size_t n, bool prefix) {
    int cap = tokenizer_encode(m->info.tok, s, n, prefix, NULL, 0), *id = need(cap, sizeof *id);
    tokenizer_encode(m->info.tok, s, n, prefix, id, cap);
    size_t at = 0;                                            // bytes of s that the tokens so far spell
    for (int i = 0; i < cap; i++) {
        int len;
        const char *piece = tokenizer_piece(m->info.tok, id[i], &len);
        if (len == 6 && !memcmp(piece, "<0x", 3)) len = 0, at++;                            // a byte piece
        for (int j = 0; j < len;) {
            bool blank = len - j >= 3 && !memcmp(piece + j, "\xe2\x96\x81", 3);
            if (!blank) j++, at++;
            else {
                if (!(prefix && i == 0 && j == 0)) at += at < n && s[at] == ' ' ? 1 : 3;    // SentencePiece's own blank spells nothing
                j += 3;
            }
        }
        size_t last = at ? at - 1 : 0;
        push_row(p, id[i], n && user[last < n ? last : n - 1] ? TEXT : TEMPLATE);
    }
    free(id);
}

static const char image_tag[] = "<image>";
static const char *find_tag(const char *s, size_t n) { return memmem(s, n, image_tag, sizeof image_tag - 1); }

// Text with pictures: split at <image>, every piece encoded as a string of its own, a picture's rows between them.
static void push_spliced(const Model *m, Prompt *p, const Text *t, bool prefix) {
    size_t at = 0;
    for (;;) {
        const char *tag = find_tag(t->s + at, t->n - at);
        size_t end = tag ? (size_t)(tag - t->s) : t->n;
        if (end > at) push_text(m, p, t->s + at, t->user + at, end - at, prefix);
        prefix = true;
        if (!tag) return;
        p->image_at = realloc(p->image_at, (p->n_images + 1) * sizeof *p->image_at);
        if (!p->image_at) die(NULL, "out of memory");
        p->image_at[p->n_images++] = p->n;
        for (int i = 0; i < m->config.n_patches; i++) push_row(p, -1, IMAGE);
        at = end + sizeof image_tag - 1;
    }
}

// Simignore's released scripts cut the prompt in four and encode each piece by itself (spec: P0 <image> P1 P2 P3; P2 the options).
// 7B: the text set is BOS and the option texts without their letters. 13B: the tokens of P2.
static void push_split(const Model *m, Prompt *p, const Text *t, int split) {
    const char *tag = find_tag(t->s, t->n), *end = t->s + t->n;
    const char *options = tag ? memmem(tag, end - tag, "Options:", 8) : NULL;
    const char *answer = options ? memmem(options, end - options, "\nAnswer with the option's letter", 32) : NULL;
    if (!answer || find_tag(tag + 1, end - tag - 1))
        die("simignore:released reads ScienceQA prompts: one <image>, then \"Options: (A) … (B) …\", then a line \"Answer with the option's letter …\"",
            "-p simignore:released: the question has no such parts");
    Text head = { t->s, t->user, tag + sizeof image_tag - 1 - t->s };
    push_spliced(m, p, &head, true);
    const char *cut[] = { tag + sizeof image_tag - 1, options, answer, end };
    for (int i = 0; i < 3; i++) push_text(m, p, cut[i], t->user + (cut[i] - t->s), cut[i + 1] - cut[i], true);

    char *o = need(answer - options + 1, 1);
    size_t n = answer - options;
    memcpy(o, options, n);
    if (split == SPLIT_7B) {                                  // "Options: (A) Maryland (B) New Hampshire" -> "Maryland New Hampshire"
        size_t to = 0, from = n > 9 ? 9 : n;                  // after "Options: "; each piece loses its "(X)", and the blank before it
        for (bool first = true; from < n; first = false) {
            bool letter = n - from >= 4 && o[from] == ' ' && o[from + 1] == '(' && o[from + 2] >= 'A' && o[from + 2] <= 'Z' && o[from + 3] == ')';
            if (first) from += 3;
            else if (letter) from += 4;
            else o[to++] = o[from++];
        }
        n = to ? to - 1 : 0;
        memmove(o, o + 1, n);
    }
    int count = tokenizer_encode(m->info.tok, o, n, true, NULL, 0);
    p->text_id = realloc(p->text_id, (count + 1) * sizeof *p->text_id);
    if (!p->text_id) die(NULL, "out of memory");
    p->n_text = 0;
    if (split == SPLIT_7B) p->text_id[p->n_text++] = m->config.bos_id;
    p->n_text += tokenizer_encode(m->info.tok, o, n, true, p->text_id + p->n_text, count);
    free(o);
}

static const char vicuna_system[] = "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.";
static const char llava_v1_system[] = "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.";
static const char milebench_system[] = "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language.";

// The rows of one turn. In later turns the answer's last token comes first: it was predicted but never fed.
static void prompt(const Model *m, Prompt *p, const Turn *turn) {
    const Config *c = &m->config;
    Text t = { 0 };
    int tags = 0, kind = turn->template;
    bool roles = kind == VICUNA_V1 || kind == LLAVA_V1 || kind == HF, prefix = true;
    const char *system = turn->system ? turn->system : kind == VICUNA_V1 ? vicuna_system : kind == LLAVA_V1 ? llava_v1_system : kind == MILEBENCH ? milebench_system : "";
    for (const char *s = turn->text; (s = find_tag(s, turn->text + turn->len - s)); s++) tags++;
    if (tags && tags != turn->n_images)
        die("write <image> once for each picture of this turn, or not at all: then the pictures go first", "the question has %d <image> for %d picture%s", tags, turn->n_images, turn->n_images == 1 ? "" : "s");
    if (kind == CHATML) die("take one of vicuna_v1, llava_v1, hf, plain, milebench, raw", "--template chatml: this is Qwen-VL's template, not LLaVA's");
    if (turn->system && !roles && kind != MILEBENCH) die("take another --template, or put the text into -i", "--system: template %s has no system text", template_names[kind]);

    if (turn->first) push_row(p, c->bos_id, TEMPLATE);
    else {
        bool ends = kind == VICUNA_V1 || kind == LLAVA_V1 || kind == MILEBENCH;    // these end an answer with </s>
        if (turn->last_id >= 0 && turn->last_id != c->eos_id) push_row(p, turn->last_id, ANSWER);
        if (ends) push_row(p, c->eos_id, TEMPLATE);
        if (kind == MILEBENCH) push_row(p, c->bos_id, TEMPLATE);
        if (ends) prefix = c->prefix_after_special;
    }
    if (turn->first && kind == MILEBENCH) { say_template(&t, "[INST] <<SYS>>\n"); say_template(&t, system); say_template(&t, "\n<</SYS>>\n\n"); }
    else if (kind == MILEBENCH) say_template(&t, "[INST] ");
    if (turn->first && roles && *system) { say_template(&t, system); say_template(&t, " "); }
    if (roles) say_template(&t, "USER: ");
    if (!tags)
        for (int i = 0; i < turn->n_images; i++) say_template(&t, kind == PLAIN || kind == RAW ? "<image>" : "<image>\n");
    say(&t, turn->text, turn->len, true);
    if (roles) say_template(&t, " ASSISTANT:");
    if (kind == MILEBENCH) say_template(&t, " [/INST]");

    int before = p->n_images;
    if (turn->split) push_split(m, p, &t, turn->split);
    else push_spliced(m, p, &t, prefix);
    if (p->n_images - before != turn->n_images) die("<image> belongs into the question", "--system: holds <image>");
    free(t.s);
    free(t.user);
}

// ----------------------------------------------------------------------------
// the forward pass

// All layers over the rows in s->x, then the logits of the wanted rows: n of those that leave the last layer, by h_want, or the last n.
static void decoder(Model *m, Runs *run, const int *h_want, int n_want) {
    const Config *c = &m->config;
    State *s = &m->s;
    const Rows *rows = &run->rows;
    double start = now_ms();
    run->tmp = s->w13x;
    for (int l = 0; l < c->n_layers; l++) {
        const Layer *w = &m->layers[l];
        if (run->prompt) progress("prompt, layer", l, c->n_layers, start);
        admit(run, l, s->x);                                                                // may send fewer rows on
        int T = rows->T;
        K->rmsnorm(s->xb, s->x, w->att_norm, T, c->dim, c->norm_eps);
        K->matmul(s->qkv, s->xb, w->wqkv, NULL, ACT_NONE, false, T);
        K->rope(s->qkv, m->cos_sin, NULL, rows, c->n_heads, c->n_kv_heads, c->head_dim);
        K->kv_append(run->kv, l, s->qkv, rows, c->n_heads);
        K->kv_attend(s->xb, s->lse, run->kv, l, s->qkv, rows, c->n_heads, visible(run), token_votes(run));
        vote(run, l, s->qkv, s->lse);                                                       // the last voters(l) queries add to the scores
        K->matmul(s->x, s->xb, w->wo, NULL, ACT_NONE, true, T);                             // true: adds to x
        K->rmsnorm(s->xb, s->x, w->ffn_norm, T, c->dim, c->norm_eps);
        K->matmul(s->w13x, s->xb, w->w13, NULL, ACT_NONE, false, T);
        K->silu_mul(s->hidden, s->w13x, T, c->hidden_dim);
        K->matmul(s->x, s->hidden, w->w2, NULL, ACT_NONE, true, T);
    }
    const float *last = s->x + (size_t)(rows->T - n_want) * c->dim;
    if (h_want) K->rows_copy(s->hidden, s->x, h_want, n_want, c->dim);
    K->rmsnorm(s->xb, h_want ? s->hidden : last, m->norm, n_want, c->dim, c->norm_eps);
    K->matmul(s->logits, s->xb, m->head, NULL, ACT_NONE, false, n_want);
}

static void forward(Model *m, Runs *run, const Prompt *p, const int *h_want, int n_want, float *h_logits) {
    const Config *c = &m->config;
    State *s = &m->s;
    if (p) {
        K->embed(s->x, m->tok_emb, run->rows.id, run->rows.T);
        for (int i = 0; i < p->n_images; i++)
            K->rows_copy(s->x + (size_t)p->image_at[i] * c->dim, m->image[i], NULL, c->n_patches, c->dim);
        decoder(m, run, h_want, n_want);
    } else {
        uint64_t key = ((uint64_t)(uintptr_t)run->kv << 13) + run->rows.B;                  // a decode step is one CUDA graph
        bool graph = !(run->chain->flags & DECODE_ADMIT);                                   // unless a policy reads from the device in the middle
        if (!graph || !K->replay(key)) {
            if (graph) K->record(key);
            K->embed(s->x, m->tok_emb, run->rows.id, run->rows.T);
            decoder(m, run, NULL, n_want);
            if (graph) K->stop();
        }
    }
    K->get(h_logits, s->logits, (size_t)n_want * c->vocab_size * sizeof(float));
}

const Arch llava = { "llava", open_llava, close_llava, info_llava, room, prompt, see, forward };

#ifndef NO_MAIN
#include "cli.h"
int main(int argc, char **argv) {
    calm_threads(argv);
    return cli(&llava, argc, argv);
}
#endif
