// reference.h: the naive double-precision version of every operation in kernels.h: the plainest loop that is right, never made
// fast. Both back-ends are held against it. All pointers are host memory; floats go in, doubles come out. Valid C and C++20.

#ifndef REFERENCE_H
#define REFERENCE_H
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "kernels.h"

// ----------------------------------------------------------------------------
// types

static inline double f16_ref(uint16_t h) {
    int sign = h >> 15, e = h >> 10 & 31, m = h & 1023;
    double x = e == 31 ? (m ? NAN : INFINITY) : e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
    return sign ? -x : x;
}
static inline uint16_t f16_from_ref(double x) {          // nearest, ties to even
    uint16_t sign = (uint16_t)(signbit(x) ? 0x8000 : 0);
    if (x != x) return 0x7e00;
    x = fabs(x);
    if (x >= 65520) return (uint16_t)(sign | 0x7c00);
    int e;
    frexp(x, &e);                                        // x < 2^e
    if (x == 0 || e < -13) e = -13;                      // subnormals: steps of 2^-24
    int m = (int)nearbyint(ldexp(x, 11 - e));            // 1024 … 2048, or less for a subnormal
    return (uint16_t)(sign | (((e + 13) << 10) + m));    // the exponent's field is e + 14, less the 1024 that m brings
}
static inline uint16_t bf16_from_ref(float x) { uint32_t u; memcpy(&u, &x, 4); return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16); }
static inline double bf16_ref(uint16_t h) { uint32_t u = (uint32_t)h << 16; float f; memcpy(&f, &u, 4); return f; }

static inline double weight_ref(Mat w, int row, int col) {
    const char *p = (const char *)w.data + (size_t)row * w.row_bytes;
    switch (w.type) {
        case F16:  return f16_ref(((const uint16_t *)p)[col]);
        case BF16: return bf16_ref(((const uint16_t *)p)[col]);
        case Q8_0: return ((const int8_t *)p)[col] * f16_ref(((const uint16_t *)((const char *)w.scale + (size_t)row * scale_row_bytes(w.cols)))[col / 32]);
        default:   return ((const float *)p)[col];
    }
}

// ----------------------------------------------------------------------------
// rows

static inline void embed_ref(double *y, Mat table, const int *id, int T) {
    for (int t = 0; t < T; t++)
        for (int i = 0; id[t] >= 0 && i < table.cols; i++) y[(size_t)t * table.cols + i] = weight_ref(table, id[t], i);
}
static inline void rmsnorm_ref(double *y, const float *x, const float *w, int T, int dim, float eps) {
    for (int t = 0; t < T; t++, x += dim, y += dim) {
        double ss = 0;
        for (int i = 0; i < dim; i++) ss += (double)x[i] * x[i];
        for (int i = 0; i < dim; i++) y[i] = w[i] * x[i] / sqrt(ss / dim + eps);
    }
}
static inline void layernorm_ref(double *y, const float *x, const float *w, const float *b, int T, int dim, float eps) {
    for (int t = 0; t < T; t++, x += dim, y += dim) {
        double mean = 0, var = 0;
        for (int i = 0; i < dim; i++) mean += x[i] / (double)dim;
        for (int i = 0; i < dim; i++) var += (x[i] - mean) * (x[i] - mean) / dim;
        for (int i = 0; i < dim; i++) y[i] = w[i] * (x[i] - mean) / sqrt(var + eps) + b[i];
    }
}
static inline void silu_mul_ref(double *y, const float *w13x, int T, int hidden_dim) {
    for (int t = 0; t < T; t++)
        for (int i = 0; i < hidden_dim; i++) {
            double g = w13x[(size_t)t * 2 * hidden_dim + i], u = w13x[(size_t)t * 2 * hidden_dim + hidden_dim + i];
            y[(size_t)t * hidden_dim + i] = g / (1 + exp(-g)) * u;
        }
}
static inline double act_ref(double u, Act act) {
    return act == ACT_GELU ? u * (1 + erf(u / sqrt(2.0))) / 2 : act == ACT_QUICK_GELU ? u / (1 + exp(-1.702 * u)) : u;
}
// y0: what y held before (add), else NULL
static inline void matmul_ref(double *y, const float *y0, const float *x, Mat w, const float *bias, Act act, int T) {
    double *row = (double *)calloc((size_t)w.cols, sizeof *row);
    for (int o = 0; o < w.rows; o++) {
        for (int i = 0; i < w.cols; i++) row[i] = weight_ref(w, o, i);
        for (int t = 0; t < T; t++) {
            double u = bias ? bias[o] : 0;
            for (int i = 0; i < w.cols; i++) u += row[i] * x[(size_t)t * w.cols + i];
            y[(size_t)t * w.rows + o] = act_ref(u, act) + (y0 ? y0[(size_t)t * w.rows + o] : 0);
        }
    }
    free(row);
}
static inline void rope_ref(double *y, const float *qkv, const float *cos_sin, const float *q_scale, const Rows *rows, int n_heads, int n_kv_heads, int head_dim) {
    int half = head_dim / 2, n = n_heads + 2 * n_kv_heads;
    for (int t = 0; t < rows->T; t++)
        for (int h = 0; h < n; h++)
            for (int i = 0; i < half; i++) {
                size_t at = ((size_t)t * n + h) * head_dim + i;
                double a = qkv[at], b = qkv[at + half], c = cos_sin[(size_t)rows->rot[t] * head_dim + 2 * i], s = cos_sin[(size_t)rows->rot[t] * head_dim + 2 * i + 1];
                double f = h < n_heads && q_scale ? q_scale[rows->pos[t]] : 1;
                y[at] = h < n_heads + n_kv_heads ? (a * c - b * s) * f : a;
                y[at + half] = h < n_heads + n_kv_heads ? (b * c + a * s) * f : b;
            }
}
static inline double dot_ref(const float *a, const float *b, int n) {
    double s = 0;
    for (int i = 0; i < n; i++) s += (double)a[i] * b[i];
    return s;
}
static inline void attend_ref(double *o, const float *q, int q_stride, const float *k, const float *v, int kv_stride, int Tq, int Tk, int n_heads, int head_dim) {
    double *p = (double *)calloc((size_t)Tk, sizeof *p);
    for (int t = 0; t < Tq; t++)
        for (int h = 0; h < n_heads; h++) {
            double max = -INFINITY, sum = 0, *ot = o + ((size_t)t * n_heads + h) * head_dim;
            for (int j = 0; j < Tk; j++) {
                p[j] = dot_ref(q + (size_t)t * q_stride + h * head_dim, k + (size_t)j * kv_stride + h * head_dim, head_dim) / sqrt((double)head_dim);
                if (p[j] > max) max = p[j];
            }
            for (int j = 0; j < Tk; j++) sum += p[j] = exp(p[j] - max);
            for (int i = 0; i < head_dim; i++) {
                ot[i] = 0;
                for (int j = 0; j < Tk; j++) ot[i] += p[j] / sum * v[(size_t)j * kv_stride + h * head_dim + i];
            }
        }
    free(p);
}
static inline double cosine_ref(const float *a, const float *b, int dim) {
    return dot_ref(a, b, dim) / (fmax(sqrt(dot_ref(a, a, dim)), 1e-12) * fmax(sqrt(dot_ref(b, b, dim)), 1e-12));
}

// ----------------------------------------------------------------------------
// the cache: slots of every head in token order, moved about as they are told

typedef struct {
    int pos, rot;
    float score, *kv;                // (2, head_dim) key and value, as the cache holds them
} RefSlot;
typedef struct { int len, cap; RefSlot *slot; } RefHead;
typedef struct { int n_layers, n_kv_heads, head_dim, n_seqs; Type type; RefHead *head; } RefKV;

static inline RefHead *ref_head(const RefKV *kv, int seq, int layer, int h) { return &kv->head[((size_t)seq * kv->n_layers + layer) * kv->n_kv_heads + h]; }
static inline float ref_stored(const RefKV *kv, double x) { return kv->type == F16 ? (float)f16_ref(f16_from_ref(x)) : (float)x; }

static inline RefKV ref_new(int n_layers, int n_kv_heads, int head_dim, int n_seqs, Type type) {
    RefKV kv = { n_layers, n_kv_heads, head_dim, n_seqs, type, (RefHead *)calloc((size_t)n_seqs * n_layers * n_kv_heads, sizeof(RefHead)) };
    return kv;
}
static inline void ref_remove(RefHead *c, int slot) {
    free(c->slot[slot].kv);
    memmove(c->slot + slot, c->slot + slot + 1, (size_t)(--c->len - slot) * sizeof *c->slot);
}
static inline void ref_clear(RefKV *kv, int seq) {
    for (int i = 0; i < kv->n_layers * kv->n_kv_heads; i++) {
        RefHead *c = ref_head(kv, seq, 0, 0) + i;
        while (c->len) ref_remove(c, c->len - 1);
        free(c->slot);
        c->slot = NULL;
        c->cap = 0;
    }
}
static inline void ref_free(RefKV *kv) {
    for (int s = 0; s < kv->n_seqs; s++) ref_clear(kv, s);
    free(kv->head);
}
static inline void ref_reserve(RefKV *kv, int seq, int extra) {
    for (int i = 0; i < kv->n_layers * kv->n_kv_heads; i++) {
        RefHead *c = ref_head(kv, seq, 0, 0) + i;
        c->cap = c->len + extra;
        c->slot = (RefSlot *)realloc(c->slot, (size_t)(c->cap + 1) * sizeof *c->slot);
    }
}
static inline void ref_copy(RefKV *kv, int to, int from) {
    if (to == from) return;
    ref_clear(kv, to);
    for (int i = 0; i < kv->n_layers * kv->n_kv_heads; i++) {
        RefHead *a = ref_head(kv, to, 0, 0) + i, *b = ref_head(kv, from, 0, 0) + i;
        size_t bytes = (size_t)2 * kv->head_dim * sizeof(float);
        *a = *b;
        a->slot = (RefSlot *)calloc((size_t)a->cap + 1, sizeof *a->slot);
        for (int j = 0; j < a->len; j++) {
            a->slot[j] = b->slot[j];
            a->slot[j].kv = (float *)malloc(bytes);
            memcpy(a->slot[j].kv, b->slot[j].kv, bytes);
        }
    }
}
static inline size_t ref_bytes(const RefKV *kv) {
    size_t n = 0;
    for (int i = 0; i < kv->n_seqs * kv->n_layers * kv->n_kv_heads; i++) n += kv->head[i].cap;
    return n * 2 * kv->head_dim * type_bytes[kv->type];
}
static inline void ref_append(RefKV *kv, int layer, const float *qkv, const Rows *rows, int n_heads) {
    int d = kv->head_dim, G = kv->n_kv_heads;
    for (int t = 0; t < rows->T; t++)
        for (int g = 0; g < G; g++) {
            RefHead *c = ref_head(kv, rows->seq[t], layer, g);
            RefSlot s = { rows->pos[t], rows->rot[t], 0, (float *)malloc((size_t)2 * d * sizeof(float)) };
            for (int x = 0; x < 2; x++)
                for (int i = 0; i < d; i++) s.kv[x * d + i] = ref_stored(kv, qkv[((size_t)t * (n_heads + 2 * G) + n_heads + x * G + g) * d + i]);
            c->slot[c->len++] = s;
        }
}
// The logit of row t and head h for one slot, -INFINITY where it may not look.
static inline double ref_logit(const RefKV *kv, const RefSlot *s, const float *qkv, const Rows *rows, int n_heads, const uint8_t *const *h_visible, int t, int h) {
    const uint8_t *visible = h_visible ? h_visible[rows->seq[t]] : NULL;
    if (s->pos > rows->pos[t] || (visible && !visible[s->pos])) return -INFINITY;
    return dot_ref(qkv + ((size_t)t * (n_heads + 2 * kv->n_kv_heads) + h) * kv->head_dim, s->kv, kv->head_dim) / sqrt((double)kv->head_dim);
}
static inline void ref_attend(double *o, double *lse, RefKV *kv, int layer, const float *qkv, const Rows *rows, int n_heads, const uint8_t *const *h_visible, bool vote) {
    int d = kv->head_dim, group = n_heads / kv->n_kv_heads;
    for (int t = 0; t < rows->T; t++)
        for (int h = 0; h < n_heads; h++) {
            RefHead *c = ref_head(kv, rows->seq[t], layer, h / group);
            double *ot = o + ((size_t)t * n_heads + h) * d, *p = (double *)calloc((size_t)c->len + 1, sizeof *p), max = -INFINITY, sum = 0;
            for (int j = 0; j < c->len; j++) max = fmax(max, p[j] = ref_logit(kv, &c->slot[j], qkv, rows, n_heads, h_visible, t, h));
            for (int j = 0; j < c->len; j++) sum += p[j] = max > -INFINITY ? exp(p[j] - max) : 0;
            lse[(size_t)t * n_heads + h] = max + log(sum);
            for (int i = 0; i < d; i++) ot[i] = 0;
            for (int j = 0; j < c->len && sum > 0; j++) {
                for (int i = 0; i < d; i++) ot[i] += p[j] / sum * c->slot[j].kv[d + i];
                if (vote) c->slot[j].score += (float)(p[j] / sum / group);
            }
            free(p);
        }
}
// Row t's probability of a slot; lse: (T, n_heads) from ref_attend
static inline double ref_p(const RefKV *kv, const RefSlot *s, const float *qkv, const double *lse, const Rows *rows, int n_heads, const uint8_t *const *h_visible, int t, int h) {
    double l = lse[(size_t)t * n_heads + h];
    return l > -INFINITY ? exp(ref_logit(kv, s, qkv, rows, n_heads, h_visible, t, h) - l) : 0;
}
static inline void ref_vote(RefKV *kv, int layer, const float *qkv, const double *lse, const Rows *rows, int n_heads, const uint8_t *const *h_visible, int n) {
    int group = n_heads / kv->n_kv_heads;
    for (int g = 0; g < kv->n_kv_heads; g++) {
        RefHead *c = ref_head(kv, rows->seq[0], layer, g);
        for (int j = 0; j < c->len; j++) {
            double sum = 0;
            for (int h = g * group; h < (g + 1) * group; h++)
                for (int t = rows->T - n; t < rows->T; t++) sum += ref_p(kv, &c->slot[j], qkv, lse, rows, n_heads, h_visible, t, h);
            c->slot[j].score += (float)(sum / group);
        }
    }
}
// (T, slots of head 0); kv_column_sums is the sum of its last n rows
static inline void ref_map(double *out, const RefKV *kv, int layer, const float *qkv, const double *lse, const Rows *rows, int n_heads, const uint8_t *const *h_visible) {
    const RefHead *first = ref_head(kv, rows->seq[0], layer, 0);
    for (int t = 0; t < rows->T; t++)
        for (int j = 0; j < first->len; j++) {
            double sum = 0;
            for (int h = 0; h < n_heads; h++) {
                const RefHead *c = ref_head(kv, rows->seq[0], layer, h / (n_heads / kv->n_kv_heads));
                for (int i = 0; i < c->len; i++)
                    if (c->slot[i].pos == first->slot[j].pos) sum += ref_p(kv, &c->slot[i], qkv, lse, rows, n_heads, h_visible, t, h);
            }
            out[(size_t)t * first->len + j] = sum / n_heads;
        }
}
static inline double ref_cosine(const RefKV *kv, const RefSlot *a, const RefSlot *b) {
    double n = sqrt(dot_ref(a->kv, a->kv, kv->head_dim) * dot_ref(b->kv, b->kv, kv->head_dim));
    return n > 0 ? dot_ref(a->kv, b->kv, kv->head_dim) / n : 0;
}
// Turns a stored key by d positions: row |d| of the table, the sign of d on the sine.
static inline void ref_turn(const RefKV *kv, RefSlot *s, int d, const float *cos_sin) {
    int half = kv->head_dim / 2;
    for (int i = 0; i < half; i++) {
        double a = s->kv[i], b = s->kv[i + half], c = cos_sin[(size_t)abs(d) * kv->head_dim + 2 * i], n = cos_sin[(size_t)abs(d) * kv->head_dim + 2 * i + 1];
        if (d < 0) n = -n;
        s->kv[i] = ref_stored(kv, a * c - b * n);
        s->kv[i + half] = ref_stored(kv, b * c + a * n);
    }
}
static inline void ref_apply(RefKV *kv, int seq, const bool *keep, const int *into, const float *w, float self, const float *cos_sin) {
    int d2 = 2 * kv->head_dim;
    for (int i = 0; i < kv->n_layers * kv->n_kv_heads; i++) {
        RefHead *c = ref_head(kv, seq, 0, 0) + i;
        int len = c->len, left = 0;
        float *merged = (float *)calloc((size_t)len * d2 + 1, sizeof *merged);
        for (int j = 0; j < len; j++)
            for (int e = 0; e < d2; e++) {
                double sum = c->slot[j].kv[e];
                int n = 0;
                for (int s = 0; into && s < len; s++)
                    if (into[s] == j) { sum += (double)w[s] * c->slot[s].kv[e] + (double)self * c->slot[j].kv[e]; n++; }
                merged[(size_t)j * d2 + e] = n ? ref_stored(kv, sum / (1 + n)) : c->slot[j].kv[e];
            }
        for (int j = 0; j < len; j++) memcpy(c->slot[j].kv, merged + (size_t)j * d2, d2 * sizeof *merged);
        for (int j = 0; j < len; j++) if (!keep[j]) ref_remove(c, j - left++);
        for (int j = 0; cos_sin && j < c->len; j++) {
            if (j != c->slot[j].rot) ref_turn(kv, &c->slot[j], j - c->slot[j].rot, cos_sin);
            c->slot[j].rot = j;
        }
        free(merged);
        keep += len;
        if (into) { into += len; w += len; }
    }
}
// The slot that kv_drop_lowest takes from a head, -1: none
static inline int ref_lowest(const RefHead *c, int lo, int from_end) {
    int least = -1;
    for (int j = lo; j < c->len - from_end; j++) if (least < 0 || c->slot[j].score < c->slot[least].score) least = j;
    return least;
}

#endif
