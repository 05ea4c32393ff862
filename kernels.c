// kernels.c: every loop over weights, activations or cached keys, for the CPU, in the order of include/kernels.h (which has
// the equations and shapes). Leaves out: models, policies, files. `make build/bench && build/bench` says how fast it is.

#include <math.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
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

// Scratch that lives as long as the program: each slot grows to the largest pass it has seen, so that nothing is allocated
// while decoding. Contents are lost when it grows.
enum { S_ROWS, S_SUMS, S_MERGE, S_NEAREST, N_SCRATCH };
static void *scratch(int which, size_t bytes) {
    static void *p[N_SCRATCH];
    static size_t room[N_SCRATCH];
    if (bytes > room[which]) {
        free(p[which]);
        p[which] = mem_alloc(bytes);
        room[which] = pad64(bytes);
    }
    return p[which];
}

// ----------------------------------------------------------------------------
// types: f16 and bf16 are uint16_t; everything is float as soon as it is loaded

static inline float f16_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023;
    union { uint32_t u; float f; } x;
    if (e == 31) x.u = sign | 0x7f800000u | m << 13;
    else if (e)  x.u = sign | (e + 112) << 23 | m << 13;
    else { x.f = (float)m * 0x1p-24f; x.u |= sign; }
    return x.f;
}
static inline uint16_t float_f16(float f) {     // nearest, ties to even
    union { float f; uint32_t u; } x = { f };
    uint32_t sign = x.u >> 16 & 0x8000;
    x.u &= 0x7fffffffu;
    if (x.u > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (x.u >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
    if (x.u < 0x38800000u) { x.f += 0.5f; return (uint16_t)(sign | (x.u - 0x3f000000u)); }    // subnormal: the sum rounds at 2^-24
    x.u += 0xfff + (x.u >> 13 & 1);
    return (uint16_t)(sign | (x.u - 0x38000000u) >> 13);
}
static inline float bf16_float(uint16_t h) { union { uint32_t u; float f; } x = { (uint32_t)h << 16 }; return x.f; }

static void row_to_float(float *y, const void *x, Type type, int n) {
    if (type == F32) memcpy(y, x, (size_t)n * 4);
    else if (type == F16) for (int i = 0; i < n; i++) y[i] = f16_float(((const uint16_t *)x)[i]);
    else for (int i = 0; i < n; i++) y[i] = bf16_float(((const uint16_t *)x)[i]);
}
static void row_from_float(void *y, const float *x, Type type, int n) {
    if (type == F32) memcpy(y, x, (size_t)n * 4);
    else for (int i = 0; i < n; i++) ((uint16_t *)y)[i] = float_f16(x[i]);
}
static void weight_row(float *y, Mat w, int row) {
    const char *data = (const char *)w.data + row * w.row_bytes;
    if (w.type != Q8_0) { row_to_float(y, data, w.type, w.cols); return; }
    const uint16_t *scale = (const uint16_t *)((const char *)w.scale + row * scale_row_bytes(w.cols));
    for (int i = 0; i < w.cols; i++) y[i] = (float)((const int8_t *)data)[i] * f16_float(scale[i / 32]);
}
static float dot(const float *a, const float *b, int n) {
    float s[16] = {0}, sum = 0;
    int i = 0;
    for (; i + 16 <= n; i += 16) for (int j = 0; j < 16; j++) s[j] += a[i + j] * b[i + j];
    for (; i < n; i++) s[i % 16] += a[i] * b[i];
    for (int j = 0; j < 16; j++) sum += s[j];
    return sum;
}

// ----------------------------------------------------------------------------
// rows

static void embed(float *y, Mat table, const int *id, int T) {
    #pragma omp parallel for
    for (int t = 0; t < T; t++) if (id[t] >= 0) weight_row(y + (size_t)t * table.cols, table, id[t]);
}

static void rows_copy(float *y, const float *x, const int *h_row, int n, int dim) {
    if (!h_row && y == x) return;
    #pragma omp parallel for
    for (int i = 0; i < n; i++) memcpy(y + (size_t)i * dim, x + (size_t)(h_row ? h_row[i] : i) * dim, (size_t)dim * 4);
}

static void rmsnorm(float *y, const float *x, const float *w, int T, int dim, float eps) {
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        const float *xt = x + (size_t)t * dim;
        float scale = 1 / sqrtf(dot(xt, xt, dim) / dim + eps);
        for (int i = 0; i < dim; i++) y[(size_t)t * dim + i] = w[i] * xt[i] * scale;
    }
}

static void layernorm(float *y, const float *x, const float *w, const float *b, int T, int dim, float eps) {
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        const float *xt = x + (size_t)t * dim;
        float *yt = y + (size_t)t * dim;
        float mean = 0;
        for (int i = 0; i < dim; i++) mean += xt[i];
        mean /= dim;
        for (int i = 0; i < dim; i++) yt[i] = xt[i] - mean;
        float scale = 1 / sqrtf(dot(yt, yt, dim) / dim + eps);
        for (int i = 0; i < dim; i++) yt[i] = w[i] * yt[i] * scale + b[i];
    }
}

static void silu_mul(float *y, const float *w13x, int T, int hidden_dim) {
    #pragma omp parallel for
    for (int t = 0; t < T; t++) {
        const float *g = w13x + (size_t)t * 2 * hidden_dim, *u = g + hidden_dim;
        for (int i = 0; i < hidden_dim; i++) y[(size_t)t * hidden_dim + i] = g[i] / (1 + expf(-g[i])) * u[i];
    }
}

// ----------------------------------------------------------------------------
// matmul

static inline float act_of(float u, Act act) {
    if (act == ACT_GELU) return u * (1 + erff(u * 0.70710678f)) * 0.5f;
    if (act == ACT_QUICK_GELU) return u / (1 + expf(-1.702f * u));
    return u;
}

static void matmul(float *y, const float *x, Mat w, const float *bias, Act act, bool add, int T) {
    float *rows = scratch(S_ROWS, (size_t)omp_get_max_threads() * pad64(w.cols) * 4);
    #pragma omp parallel for
    for (int o = 0; o < w.rows; o++) {
        float *row = rows + omp_get_thread_num() * pad64(w.cols);
        weight_row(row, w, o);
        for (int t = 0; t < T; t++) {
            float u = act_of(dot(row, x + (size_t)t * w.cols, w.cols) + (bias ? bias[o] : 0), act), *at = y + (size_t)t * w.rows + o;
            *at = add ? *at + u : u;
        }
    }
}

// ----------------------------------------------------------------------------
// rope

static void rope(float *qkv, const float *cos_sin, const float *q_scale, const Rows *rows, int n_heads, int n_kv_heads, int head_dim) {
    int half = head_dim / 2;
    #pragma omp parallel for
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
// attend

static void attend(float *o, const float *q, int q_stride, const float *k, const float *v, int kv_stride,
                   int Tq, int Tk, int n_heads, int head_dim) {
    float *rows = scratch(S_ROWS, (size_t)omp_get_max_threads() * pad64(Tk) * 4), scale = 1 / sqrtf(head_dim);
    #pragma omp parallel for collapse(2)
    for (int t = 0; t < Tq; t++)
        for (int h = 0; h < n_heads; h++) {
            float *p = rows + omp_get_thread_num() * pad64(Tk), *ot = o + ((size_t)t * n_heads + h) * head_dim, max = -INFINITY, sum = 0;
            for (int j = 0; j < Tk; j++) {
                p[j] = scale * dot(q + (size_t)t * q_stride + (size_t)h * head_dim, k + (size_t)j * kv_stride + (size_t)h * head_dim, head_dim);
                max = fmaxf(max, p[j]);
            }
            memset(ot, 0, head_dim * 4);
            for (int j = 0; j < Tk; j++) {
                float e = expf(p[j] - max);
                sum += e;
                for (int i = 0; i < head_dim; i++) ot[i] += e * v[(size_t)j * kv_stride + (size_t)h * head_dim + i];
            }
            for (int i = 0; i < head_dim; i++) ot[i] /= sum;
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
    free(kv->head); free(kv->block); free(kv->block_bytes); free(kv);
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
            if (h_k) row_to_float(h_k + at * kv->head_dim, key_of(kv, h, j), kv->type, kv->head_dim);
            if (h_v) row_to_float(h_v + at * kv->head_dim, value_of(kv, h, j), kv->type, kv->head_dim);
        }
    }
}

static void kv_append(KV *kv, int layer, const float *qkv, const Rows *rows, int n_heads) {
    int d = kv->head_dim, G = kv->n_kv_heads;
    #pragma omp parallel for
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

// The logit of one query and one slot, -INFINITY where the query may not look.
static float logit(const KV *kv, const Head *h, const float *q, int slot, int pos, const uint8_t *visible, float *row) {
    int p = h->pos[h->order[slot]];
    if (p > pos || (visible && !visible[p])) return -INFINITY;
    row_to_float(row, key_of(kv, h, slot), kv->type, kv->head_dim);
    return dot(q, row, kv->head_dim) / sqrtf(kv->head_dim);
}

static void kv_attend(float *o, float *lse, KV *kv, int layer, const float *qkv, const Rows *rows, int n_heads,
                      const uint8_t *const *h_visible, bool vote) {
    int d = kv->head_dim, G = kv->n_kv_heads, group = n_heads / G, most = 0;
    for (int t = 0; t < rows->T; t++) for (int g = 0; g < G; g++) most = head_of(kv, rows->seq[t], layer, g)->len > most ? head_of(kv, rows->seq[t], layer, g)->len : most;
    vote = vote && rows->T == rows->B;
    size_t room = pad64(most) + pad64(d);
    float *buf = scratch(S_ROWS, omp_get_max_threads() * room * 4);
    #pragma omp parallel for collapse(2)
    for (int t = 0; t < rows->T; t++)
        for (int g = 0; g < G; g++) {
            float *p = buf + omp_get_thread_num() * room, *row = p + pad64(most);
            Head *c = head_of(kv, rows->seq[t], layer, g);
            const uint8_t *visible = h_visible ? h_visible[rows->seq[t]] : NULL;
            for (int h = g * group; h < (g + 1) * group; h++) {
                const float *q = qkv + ((size_t)t * (n_heads + 2 * G) + h) * d;
                float *ot = o + ((size_t)t * n_heads + h) * d, max = -INFINITY, sum = 0;
                for (int j = 0; j < c->len; j++) {
                    p[j] = logit(kv, c, q, j, rows->pos[t], visible, row);
                    max = fmaxf(max, p[j]);
                }
                memset(ot, 0, d * 4);
                for (int j = 0; j < c->len && max > -INFINITY; j++) sum += p[j] = expf(p[j] - max);
                lse[(size_t)t * n_heads + h] = max + logf(sum);
                for (int j = 0; j < c->len && sum > 0; j++) {
                    p[j] /= sum;
                    row_to_float(row, value_of(kv, c, j), kv->type, d);
                    for (int i = 0; i < d; i++) ot[i] += p[j] * row[i];
                    if (vote) c->score[c->order[j]] += p[j] / group;
                }
            }
        }
}

// sums[j] += p[t,h,j] over the pass's rows t0 … T-1
static void add_probabilities(float *sums, const KV *kv, const Head *c, int h, const float *qkv, const float *lse, const Rows *rows,
                              int n_heads, const uint8_t *const *h_visible, int t0, int t1) {
    int d = kv->head_dim;
    float row[d];
    for (int j = 0; j < c->len; j++)
        for (int t = t0; t < t1; t++) {
            const float *q = qkv + ((size_t)t * (n_heads + 2 * kv->n_kv_heads) + h) * d;
            sums[j] += expf(logit(kv, c, q, j, rows->pos[t], h_visible ? h_visible[rows->seq[t]] : NULL, row) - lse[(size_t)t * n_heads + h]);
        }
}

static void kv_vote(KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads,
                    const uint8_t *const *h_visible, int n) {
    if (n <= 0) return;
    int group = n_heads / kv->n_kv_heads, most = 0;
    for (int g = 0; g < kv->n_kv_heads; g++) most = head_of(kv, rows->seq[0], layer, g)->len > most ? head_of(kv, rows->seq[0], layer, g)->len : most;
    float *all = scratch(S_SUMS, (size_t)kv->n_kv_heads * most * 4);
    #pragma omp parallel for
    for (int g = 0; g < kv->n_kv_heads; g++) {
        Head *c = head_of(kv, rows->seq[0], layer, g);
        float *sums = all + (size_t)g * most;
        memset(sums, 0, (size_t)c->len * 4);
        for (int h = g * group; h < (g + 1) * group; h++) add_probabilities(sums, kv, c, h, qkv, lse, rows, n_heads, h_visible, rows->T - n, rows->T);
        for (int j = 0; j < c->len; j++) c->score[c->order[j]] += sums[j] / group;
    }
}

// h_out[j] += sums of head c, its slots matched with those of head 0 by token index
static void add_matched(float *h_out, const Head *first, const Head *c, const float *sums, float scale) {
    for (int i = 0, j = 0; j < first->len; j++) {
        while (i < c->len && c->pos[c->order[i]] < first->pos[first->order[j]]) i++;
        if (i < c->len && c->pos[c->order[i]] == first->pos[first->order[j]]) h_out[j] += sums[i] * scale;
    }
}

static void column_sums(float *h_out, const KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads,
                        const uint8_t *const *h_visible, int t0, int t1) {
    int group = n_heads / kv->n_kv_heads, most = 0;
    Head *heads = head_of(kv, rows->seq[0], layer, 0);
    for (int g = 0; g < kv->n_kv_heads; g++) most = heads[g].len > most ? heads[g].len : most;
    float *all = scratch(S_SUMS, (size_t)n_heads * most * 4);
    memset(all, 0, (size_t)n_heads * most * 4);
    #pragma omp parallel for
    for (int h = 0; h < n_heads; h++)
        add_probabilities(all + (size_t)h * most, kv, &heads[h / group], h, qkv, lse, rows, n_heads, h_visible, t0, t1);
    memset(h_out, 0, (size_t)heads[0].len * 4);
    for (int h = 0; h < n_heads; h++) add_matched(h_out, &heads[0], &heads[h / group], all + (size_t)h * most, 1.0f / n_heads);
}

static void kv_column_sums(float *h_out, const KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads,
                           const uint8_t *const *h_visible, int n) {
    column_sums(h_out, kv, layer, qkv, lse, rows, n_heads, h_visible, rows->T - n, rows->T);
}

static void kv_map(float *h_out, const KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads,
                   const uint8_t *const *h_visible) {
    int len = head_of(kv, rows->seq[0], layer, 0)->len;
    for (int t = 0; t < rows->T; t++) column_sums(h_out + (size_t)t * len, kv, layer, qkv, lse, rows, n_heads, h_visible, t, t + 1);
}

static void kv_scores_clear(KV *kv, int seq) {
    for (int i = 0; i < n_heads_of(kv); i++) {
        Head *h = head_of(kv, seq, 0, 0) + i;
        if (h->cap) memset(h->score, 0, (size_t)h->cap * 4);
    }
}

static void kv_nearest(int *h_into, float *h_w, const KV *kv, int seq, int layer, const bool *h_keep) {
    int d = kv->head_dim, most = 0;
    Head *heads = head_of(kv, seq, layer, 0);
    for (int g = 0; g < kv->n_kv_heads; g++) most = heads[g].len > most ? heads[g].len : most;
    float *all = scratch(S_NEAREST, (size_t)kv->n_kv_heads * most * d * 4);
    #pragma omp parallel for
    for (int g = 0; g < kv->n_kv_heads; g++) {
        const Head *h = &heads[g];
        size_t at = 0;
        for (int i = 0; i < g; i++) at += heads[i].len;
        float *k = all + (size_t)g * most * d;
        for (int j = 0; j < h->len; j++) {
            row_to_float(k + (size_t)j * d, key_of(kv, h, j), kv->type, d);
            float norm = sqrtf(dot(k + (size_t)j * d, k + (size_t)j * d, d));
            for (int i = 0; i < d; i++) k[(size_t)j * d + i] *= norm > 0 ? 1 / norm : 0;
        }
        for (int i = 0; i < h->len; i++) {
            if (h_keep[at + i]) continue;
            h_into[at + i] = -1;
            h_w[at + i] = 0;
            for (int j = 0; j < h->len; j++) {
                if (!h_keep[at + j]) continue;
                float c = dot(k + (size_t)i * d, k + (size_t)j * d, d);
                if (h_into[at + i] < 0 || c > h_w[at + i]) { h_into[at + i] = j; h_w[at + i] = c; }
            }
        }
    }
}

// Keeps the slots with keep true: order becomes kept slots, then places that became free, then those that were.
static void head_keep(Head *h, const bool *keep, int *tmp) {
    int n = 0, gone = 0;
    for (int j = 0; j < h->len; j++)
        if (keep[j]) h->order[n++] = h->order[j];
        else tmp[gone++] = h->order[j];
    memcpy(h->order + n, tmp, gone * sizeof *tmp);
    h->len = n;
}

// The merges of one head: sums are built beside the cache, so that every source is read unmerged. at: (len,) row of a slot's sum
static void head_merge(const KV *kv, Head *h, const bool *keep, const int *into, const float *w, float self, float *sum, int *at, int *n) {
    int d = kv->head_dim;
    for (int x = 0; x < 2; x++) {                      // keys, then values
        int targets = 0;
        float row[d];
        memset(at, -1, h->len * sizeof *at);
        for (int i = 0; i < h->len; i++) {
            int j = into[i];
            if (j < 0 || !keep[j]) continue;
            float own[d];
            row_to_float(own, x ? value_of(kv, h, j) : key_of(kv, h, j), kv->type, d);
            row_to_float(row, x ? value_of(kv, h, i) : key_of(kv, h, i), kv->type, d);
            if (at[j] < 0) {
                at[j] = targets++;
                n[j] = 0;
                memcpy(sum + (size_t)at[j] * d, own, d * 4);
            }
            float *s = sum + (size_t)at[j] * d;
            for (int c = 0; c < d; c++) s[c] += w[i] * row[c] + self * own[c];
            n[j]++;
        }
        for (int j = 0; j < h->len; j++) {
            if (at[j] < 0) continue;
            float *s = sum + (size_t)at[j] * d;
            for (int c = 0; c < d; c++) s[c] /= 1 + n[j];
            row_from_float(x ? value_of(kv, h, j) : key_of(kv, h, j), s, kv->type, d);
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
        row_to_float(u, key_of(kv, h, j), kv->type, kv->head_dim);
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
    int most = 0;
    for (int i = 0; i < n_heads_of(kv); i++) most = heads[i].len > most ? heads[i].len : most;
    size_t room = (size_t)most * (kv->head_dim + 2);
    float *all = scratch(S_MERGE, room * 4);
    size_t at = 0;
    for (int i = 0; i < n_heads_of(kv); i++) {
        Head *h = &heads[i];
        int len = h->len, *row = (int *)(all + (size_t)most * kv->head_dim), *n = row + most;
        if (h_into) head_merge(kv, h, h_keep + at, h_into + at, h_w + at, self, all, row, n);
        head_keep(h, h_keep + at, row);
        if (cos_sin) head_renumber(kv, h, cos_sin);
        at += len;
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
    #pragma omp parallel for
    for (int i = 0; i < n_heads_of(kv); i++) {
        Head *h = head_of(kv, seq, 0, 0) + i;
        int least = -1;
        for (int j = lo; j < h->len - from_end; j++)
            if (least < 0 || h->score[h->order[j]] < h->score[h->order[least]]) least = j;
        if (least >= 0) head_drop(h, least);
    }
}

static void cosine(float *h_out, const float *a, int n, const float *b, int m, int dim) {
    #pragma omp parallel for
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
