// given.h: a back-end that is given its attention instead of computing it: the CPU's cache under votes from a list. Policies and
// run.h cannot tell. What only the forward pass would call is the CPU's own.

#ifndef GIVEN_H
#define GIVEN_H
#include "run.h"
#include "test.h"

static struct {
    int n_layers, n_heads, n_kv_heads, ctx;
    float *score;                // (n_layers, n_kv_heads, ctx) by token index
    int *pos;                    // (room,) the cache's positions, packed
    size_t room;
    const float *att;            // (n_heads, queries, keys) of the layer under way; NULL: votes by lot
    int queries, keys;
    uint64_t lot;                // state of the random votes
    int levels;                  // > 0: random votes take this many values, so that there are ties
} given;

static inline float given_vote(void) {
    double x = rnd(&given.lot);
    return (float)(given.levels ? floor(x * given.levels) / given.levels : x);
}
static inline float *given_scores(int layer, int g) { return given.score + ((size_t)layer * given.n_kv_heads + g) * given.ctx; }

// The positions in the cache now, packed.
static inline const int *given_pos(const KV *kv, int seq) {
    int len[given.n_layers * given.n_kv_heads];
    size_t n = 0;
    cpu.kv_lens(kv, seq, len);
    for (int i = 0; i < given.n_layers * given.n_kv_heads; i++) n += len[i];
    if (n > given.room) { given.pos = realloc(given.pos, n * sizeof(int)); given.room = n; }
    cpu.kv_read(kv, seq, given.pos, NULL, NULL, NULL, NULL);
    return given.pos;
}

// Queries q0 … of the given attention add what they gave to the slots of each kv head: rows [first, first + n) of the head's positions.
static inline void given_add(KV *kv, int seq, int layer, int n) {
    int len[given.n_layers * given.n_kv_heads], group = given.n_heads / given.n_kv_heads;
    const int *pos = given_pos(kv, seq);
    cpu.kv_lens(kv, seq, len);
    for (int i = 0; i < given.n_layers * given.n_kv_heads; pos += len[i++]) {
        if (i / given.n_kv_heads != layer) continue;
        float *score = given_scores(layer, i % given.n_kv_heads);
        if (!given.att) { for (int j = 0; j < len[i]; j++) score[pos[j]] += given_vote(); continue; }
        if (given.keys != len[i]) die(NULL, "attention over %d keys where layer %d has %d", given.keys, layer, len[i]);
        if (given.queries < n) die(NULL, "attention of %d queries where %d vote", given.queries, n);
        for (int q = given.queries - n; q < given.queries; q++)
            for (int j = 0; j < len[i]; j++) {
                float p = 0;
                for (int h = 0; h < group; h++) p += given.att[((size_t)(i % given.n_kv_heads * group + h) * given.queries + q) * given.keys + j];
                score[pos[j]] += p / group;
            }
    }
}

static inline void given_kv_vote(KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads, const uint8_t *const *visible, int n) {
    (void)qkv; (void)lse; (void)n_heads; (void)visible;
    given_add(kv, rows->seq[0], layer, n);
}

// In place of kv_attend's voting while decoding.
static inline void given_token_votes(Runs *r, int layer) {
    for (int b = 0; b < r->rows.B; b++) given_add(r->kv, r->h_seq[b], layer, 1);
}

static inline void given_column_sums(float *out, const KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads,
                              const uint8_t *const *visible, int n) {
    int len[given.n_layers * given.n_kv_heads];
    (void)qkv; (void)lse;
    cpu.kv_lens(kv, rows->seq[0], len);
    int keys = len[layer * given.n_kv_heads];
    memset(out, 0, keys * sizeof *out);
    if (!given.att) {
        const int *pos = given_pos(kv, rows->seq[0]);
        for (int i = 0; i < layer * given.n_kv_heads; i++) pos += len[i];
        for (int j = 0; j < keys; j++) out[j] = visible && visible[rows->seq[0]] && !visible[rows->seq[0]][pos[j]] ? 0 : given_vote();
        return;
    }
    if (given.keys != keys) die(NULL, "attention over %d keys where layer %d has %d", given.keys, layer, keys);
    if (given.queries < n) die(NULL, "attention of %d queries where %d vote", given.queries, n);
    for (int j = 0; j < keys; j++) {
        double sum = 0;
        for (int h = 0; h < n_heads; h++)
            for (int q = given.queries - n; q < given.queries; q++) sum += given.att[((size_t)h * given.queries + q) * keys + j];
        out[j] = (float)(sum / n_heads);
    }
}

static inline void given_kv_read(const KV *kv, int seq, int *pos, int *rot, float *score, float *k, float *v) {
    cpu.kv_read(kv, seq, pos, rot, NULL, k, v);
    if (!score) return;
    int len[given.n_layers * given.n_kv_heads];
    const int *p = given_pos(kv, seq);
    cpu.kv_lens(kv, seq, len);
    for (int i = 0; i < given.n_layers * given.n_kv_heads; i++)
        for (int j = 0; j < len[i]; j++) *score++ = given_scores(i / given.n_kv_heads, i % given.n_kv_heads)[*p++];
}

static inline void given_scores_clear(KV *kv, int seq) {
    (void)kv; (void)seq;
    memset(given.score, 0, (size_t)given.n_layers * given.n_kv_heads * given.ctx * sizeof(float));
}

static inline void given_drop_lowest(KV *kv, int seq, int lo, int from_end) {
    int n = given.n_layers * given.n_kv_heads, len[n], slot[n];
    const int *pos = given_pos(kv, seq);
    cpu.kv_lens(kv, seq, len);
    for (int i = 0; i < n; pos += len[i++]) {
        const float *score = given_scores(i / given.n_kv_heads, i % given.n_kv_heads);
        slot[i] = -1;
        for (int j = lo; j < len[i] - from_end; j++)
            if (slot[i] < 0 || score[pos[j]] < score[pos[slot[i]]]) slot[i] = j;
    }
    cpu.kv_drop(kv, seq, slot);
}

static Kernels given_kernels;
const Kernels *K = &given_kernels;

// Before runs_new. One sequence at a time has given votes.
static inline void given_start(int n_layers, int n_heads, int n_kv_heads, int ctx) {
    given_kernels = cpu;
    given_kernels.kv_vote = given_kv_vote;
    given_kernels.kv_column_sums = given_column_sums;
    given_kernels.kv_read = given_kv_read;
    given_kernels.kv_scores_clear = given_scores_clear;
    given_kernels.kv_drop_lowest = given_drop_lowest;
    K = &given_kernels;
    free(given.score);
    given.n_layers = n_layers; given.n_heads = n_heads; given.n_kv_heads = n_kv_heads; given.ctx = ctx;
    given.score = need((size_t)n_layers * n_kv_heads * ctx, sizeof(float));
    given.att = NULL;
}

#endif
