// run.h: the cache of a model with its compression: one Run a sequence, what a forward pass tells them (admit, visible,
// token_votes, vote, compress), and how a plan is carried out. All that a model file knows of compression is here.
//
// A pass:   pass_prompt or pass_tokens   (which rows come)
//           for every layer: admit … append, attend … vote        <- the forward pass of a model file
//           compress                                              (the policy's plan, carried out)

#ifndef RUN_H
#define RUN_H
#include <string.h>
#include "error.h"
#include "kernels.h"
#include "policies.h"
#include "progress.h"

typedef struct Runs {
    int n_layers, n_heads, n_kv_heads, head_dim, dim;
    int n_seqs, ctx;             // sequences; longest sequence
    KV *kv;
    const Chain *chain;
    bool slot_pos;               // --pos slot: the next token's rotary position is the length of layer 0's cache
    const float *cos_sin;        // the model's table, for StreamingLLM's turn; back-end memory
    Mat embed;                   // the model's token table, for Simignore
    Run *seq;                    // (n_seqs,)
    uint8_t **kind;              // (n_seqs)(ctx,)
    uint8_t **visible;           // (n_seqs)(ctx,); all NULL unless a policy may hide keys
    int *text_id, n_text;        // Simignore's text set: ids (SPLIT_…), or none: the prompt's TEXT rows. Belongs to Runs: runs_free

    // the pass under way
    bool prompt;                 // the first rows of a sequence: policies that act once act on this pass
    bool decode;                 // one row for each of rows.B sequences
    bool hidden;                 // some key is hidden from this layer on
    Rows rows;                   // back-end memory, room for ctx rows or n_seqs, whichever is more
    int *h_id, *h_seq, *h_pos, *h_rot, *h_row;
    int *layer_rows;             // (n_layers,) rows that entered each layer, of each sequence
    const float *x, *qkv, *lse;  // x: what admit() saw; qkv, lse: what the last vote() saw
    int layer;                   // the layer that those are of
    float *tmp;                  // back-end scratch of (rows, dim), the model's
    bool *row_keep;
    float *sums;                 // (ctx,) a layer's column sums

    // the plan's arrays, packed (layer, kv head, slot); grown at a prompt, not while decoding
    size_t plan_room;
    int *p_pos, *p_into, *h_slot;
    float *p_score, *p_w;
    bool *p_keep;

    // told after a plan was made and before it is carried out (pictures, traces). Then decode steps bring positions and scores
    // to the host as well, and drop_lowest writes its choice into the plan
    void (*watch)(void *ctx, const struct Runs *r, const Run *run);
    // told when a layer of a prompt has looked at its keys (x, qkv, lse, rows and visible() are that layer's); of a decode step only
    // where a policy acts in admit then
    void (*watch_layer)(void *ctx, const struct Runs *r, int layer);
    void *watch_ctx;
} Runs;

static const Verbs run_verbs;

static inline int n_heads_of(const Runs *r) { return r->n_layers * r->n_kv_heads; }
static inline const Part *evictor(const Chain *c) {   // the part that acts on slots, or NULL
    return c->n && c->part[c->n - 1].policy->compress ? &c->part[c->n - 1] : NULL;
}

// A policy's own memory: a sequence has one block, the parts' one after the other.
static inline size_t part_mem(const Runs *r, int part) {
    const Policy *p = r->chain->part[part].policy;
    return pad64(p->mem_layer * r->n_layers + p->mem_token * r->ctx);
}
static inline size_t parts_mem(const Runs *r, int parts) {
    size_t bytes = 0;
    for (int i = 0; i < parts; i++) bytes += part_mem(r, i);
    return bytes;
}

static inline Runs *runs_new(const Chain *chain, int n_layers, int n_heads, int n_kv_heads, int head_dim, int dim, int n_seqs, int ctx,
                             Type kv_type, bool slot_pos, uint64_t seed, const float *cos_sin, Mat embed) {
    Runs *r = need(1, sizeof *r);
    *r = (Runs){ .n_layers = n_layers, .n_heads = n_heads, .n_kv_heads = n_kv_heads, .head_dim = head_dim, .dim = dim, .n_seqs = n_seqs, .ctx = ctx,
                 .chain = chain, .slot_pos = slot_pos, .cos_sin = cos_sin, .embed = embed };
    r->kv = K->kv_new(n_layers, n_kv_heads, head_dim, n_seqs, kv_type);
    size_t rows = ctx > n_seqs ? ctx : n_seqs;
    int *d = K->alloc(4 * rows * sizeof *d), *h = need(4 * rows, sizeof *h);      // one block, so that a pass is one copy
    r->rows = (Rows){ .id = d, .seq = d + rows, .pos = d + 2 * rows, .rot = d + 3 * rows };
    r->h_id = h; r->h_seq = h + rows; r->h_pos = h + 2 * rows; r->h_rot = h + 3 * rows;
    r->h_row = need(rows, sizeof(int)); r->row_keep = need(rows, 1); r->sums = need(ctx, sizeof(float));
    r->layer_rows = need(n_layers, sizeof(int));
    r->h_slot = need(n_heads_of(r), sizeof(int));
    r->seq = need(n_seqs, sizeof *r->seq);
    r->kind = need(n_seqs, sizeof *r->kind);
    r->visible = need(n_seqs, sizeof *r->visible);
    bool admits = false;
    for (int i = 0; i < chain->n; i++) admits |= chain->part[i].policy->admit != NULL;
    for (int s = 0; s < n_seqs; s++) {
        r->kind[s] = need(ctx, 1);
        if (admits) r->visible[s] = need(ctx, 1);
        r->seq[s] = (Run){ .n_layers = n_layers, .n_kv_heads = n_kv_heads, .ctx = ctx, .seed = seed, .kind = r->kind[s], .visible = r->visible[s],
                           .head = need(n_heads_of(r), sizeof(Head)), .mem = need(parts_mem(r, chain->n), 1), .verbs = &run_verbs, .dev = r };
    }
    return r;
}

static inline void runs_free(Runs *r) {
    K->kv_free(r->kv);
    K->release(r->rows.id);
    for (int s = 0; s < r->n_seqs; s++) { free(r->kind[s]); free(r->visible[s]); free(r->seq[s].head); free(r->seq[s].mem); }
    void *all[] = { r->h_id, r->h_row, r->row_keep, r->sums, r->layer_rows, r->h_slot, r->seq, r->kind,
                    r->visible, r->p_pos, r->p_into, r->p_score, r->p_w, r->p_keep, r->text_id, r };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

// Forgets a sequence: the next prompt starts it anew.
static inline void runs_clear(Runs *r, int seq) {
    Run *q = &r->seq[seq];
    K->kv_clear(r->kv, seq);
    memset(q->head, 0, n_heads_of(r) * sizeof(Head));
    memset(q->mem, 0, parts_mem(r, r->chain->n));
    q->n_seen = q->n_prompt = q->step = 0;
}

// Sequence `to` goes on from where `from` is (-B: one prompt, several answers).
static inline void runs_copy(Runs *r, int to, int from) {
    Run *a = &r->seq[to], *b = &r->seq[from];
    K->kv_copy(r->kv, to, from);
    memcpy(a->head, b->head, n_heads_of(r) * sizeof(Head));
    memcpy(a->mem, b->mem, parts_mem(r, r->chain->n));
    memcpy(r->kind[to], r->kind[from], r->ctx);
    a->n_prompt = b->n_prompt; a->n_seen = b->n_seen; a->step = b->step;
}

static inline void rows_upload(Runs *r) {
    K->put(r->rows.id, r->h_id, (r->h_rot + r->rows.T - r->h_id) * sizeof(int));
}

// The rotary position of the row that enters a sequence next: its index, or the slots in layer 0's cache.
static inline int next_rot(const Runs *r, int seq) {
    return r->slot_pos ? r->seq[seq].head[0].len : r->seq[seq].n_seen;
}

// n more rows enter a sequence in the pass that begins.
static inline void pass_begin(Runs *r, int seq, int n) {
    Run *q = &r->seq[seq];
    q->n_seen += n;
    if (q->n_seen > r->ctx) die("take a larger --ctx", "a sequence of %d tokens where %d fit", q->n_seen, r->ctx);
    if (r->visible[seq]) memset(r->visible[seq], 1, q->n_seen);
    for (int l = 0; l < r->n_layers; l++) r->layer_rows[l] = n;
    r->hidden = false;
}

// A pass over T rows of one sequence: ids (-1: image row) and kinds. The first one of a sequence is its prompt; later ones are a
// chat's turns, which pass every layer and join the cache. Reserves the rows' places.
static inline void pass_prompt(Runs *r, int seq, const int *id, const uint8_t *kind, int T) {
    Run *q = &r->seq[seq];
    int rot = next_rot(r, seq), before = q->n_seen;
    r->prompt = before == 0;
    r->decode = false;
    r->rows.T = T;
    r->rows.B = 1;
    pass_begin(r, seq, T);
    if (r->prompt) q->n_prompt = T;
    for (int t = 0; t < T; t++) {
        r->h_id[t] = id[t]; r->h_seq[t] = seq; r->h_pos[t] = before + t; r->h_rot[t] = rot + t;
        r->kind[seq][before + t] = kind[t];
    }
    rows_upload(r);
    K->kv_reserve(r->kv, seq, T);
}

// A decode step: one token for each of B sequences, which ones in seq (NULL: the first B). There must be room (compress reserves it).
static inline void pass_tokens(Runs *r, const int *seq, const int *id, int B) {
    r->prompt = false;
    r->decode = true;
    r->rows.T = r->rows.B = B;
    for (int b = 0; b < B; b++) {
        int s = seq ? seq[b] : b;
        r->h_id[b] = id[b]; r->h_seq[b] = s; r->h_pos[b] = r->seq[s].n_seen; r->h_rot[b] = next_rot(r, s);
        pass_begin(r, s, 1);
        r->kind[s][r->h_pos[b]] = ANSWER;
        if (r->chain->flags & DECODE_SCORES) K->kv_scores_clear(r->kv, s);
    }
    rows_upload(r);
}

// ----------------------------------------------------------------------------
// what a forward pass calls

// It is one part's turn: its ratio, options and memory.
static inline void take_part(Runs *r, Run *q, int i) {
    q->ratio = r->chain->part[i].ratio;
    q->opts = &r->chain->part[i];
    q->mem = (char *)q->mem + parts_mem(r, i);      // leave_part takes it back
}
static inline void leave_part(Runs *r, Run *q, int i) {
    static const char *told;
    if (q->note && q->note != told && !quiet) fprintf(stderr, "note: %s\n", told = q->note);
    q->note = NULL;
    q->mem = (char *)q->mem - parts_mem(r, i);
}

// The parts of the sum look at the rows of sequence s, n of them from row `at` of the pass on.
static inline void admit_sequence(Runs *r, int layer, int s, int at, int n) {
    Run *q = &r->seq[s];
    memset(r->row_keep, 1, n);
    q->n_rows = n; q->row = r->h_pos + at; q->row_keep = r->row_keep;
    q->n_text = r->n_text;
    for (int i = 0; i < n && !r->n_text; i++) q->n_text += q->kind[q->row[i]] == TEXT;
    for (int i = 0; i < r->chain->n; i++) {
        if (!r->chain->part[i].policy->admit || (r->decode && !(r->chain->part[i].policy->flags & DECODE_ADMIT))) continue;
        take_part(r, q, i);
        r->chain->part[i].policy->admit(q, layer);
        leave_part(r, q, i);
    }
}

// Before a layer reads x: policies may send fewer rows on (a prompt) or hide keys.
static inline void admit(Runs *r, int layer, float *x) {
    if (!r->visible[0] || !(r->prompt || (r->decode && r->chain->flags & DECODE_ADMIT))) return;
    bool hidden = false;
    r->x = x;
    for (int b = 0; b < r->rows.B; b++) {
        int s = r->h_seq[b];
        admit_sequence(r, layer, s, b, r->decode ? 1 : r->rows.T);
        hidden |= memchr(r->visible[s], 0, r->seq[s].n_seen) != NULL;
    }
    r->hidden = hidden;                      // not before: votes() asks for what the layer above saw
    if (r->decode) return;
    int n = 0;
    for (int t = 0; t < r->rows.T; t++) {
        if (!r->row_keep[t] && t < r->rows.T - 1) continue;      // the last row's logits are what the pass is for
        r->h_row[n] = t;
        r->h_id[n] = r->h_id[t]; r->h_pos[n] = r->h_pos[t]; r->h_rot[n] = r->h_rot[t];
        n++;
    }
    if (n == r->rows.T) return;
    K->rows_copy(r->tmp, x, r->h_row, n, r->dim);
    K->rows_copy(x, r->tmp, NULL, n, r->dim);
    r->rows.T = n;
    rows_upload(r);
    for (int l = layer; l < r->n_layers; l++) r->layer_rows[l] = n;
}

static inline const uint8_t *const *visible(const Runs *r) { return r->hidden ? (const uint8_t *const *)r->visible : NULL; }

static inline bool token_votes(const Runs *r) { return r->decode && r->chain->flags & DECODE_VOTES; }

// After a layer's attention: the last voters(l) queries of a prompt add to the scores.
static inline void vote(Runs *r, int layer, const float *qkv, const float *lse) {
    r->layer = layer;
    r->qkv = qkv;
    r->lse = lse;
    if (r->watch_layer && (r->prompt || r->chain->flags & DECODE_ADMIT)) r->watch_layer(r->watch_ctx, r, layer);
    const Part *e = evictor(r->chain);
    if (!r->prompt || !e || !e->policy->voters) return;
    Run *q = &r->seq[r->h_seq[0]];
    q->n_rows = r->rows.T;
    take_part(r, q, r->chain->n - 1);
    int n = e->policy->voters(q, layer);
    leave_part(r, q, r->chain->n - 1);
    if (n > r->rows.T) n = r->rows.T;
    if (n > 0) K->kv_vote(r->kv, layer, qkv, lse, &r->rows, r->n_heads, visible(r), n);
}

// ----------------------------------------------------------------------------
// after a pass: the plan, and carrying it out

static inline void plan_grow(Runs *r, size_t n) {
    if (n <= r->plan_room) return;
    free(r->p_pos); free(r->p_score); free(r->p_keep); free(r->p_into); free(r->p_w);
    r->plan_room = n;
    r->p_pos = need(n, sizeof(int)); r->p_score = need(n, sizeof(float)); r->p_keep = need(n, 1);
    r->p_into = need(n, sizeof(int)); r->p_w = need(n, sizeof(float));
}

// What is no number (a model that overflows) ranks last, so that budgets hold all the same.
static inline void rank_last(float *score, size_t n) {
    for (size_t i = 0; i < n; i++) if (isnan(score[i])) score[i] = -INFINITY;
}

// The cache's positions and votes, under the heads of a sequence.
static inline void plan_scores(Runs *r, Run *q) {
    size_t n = 0;
    K->kv_read(r->kv, (int)(q - r->seq), r->p_pos, NULL, r->p_score, NULL, NULL);
    for (int i = 0; i < n_heads_of(r); i++) n += q->head[i].len;
    rank_last(r->p_score, n);
    for (int i = 0; i < n_heads_of(r); i++) {
        q->head[i].pos = r->p_pos + (q->head[i].keep - r->p_keep);
        q->head[i].score = r->p_score + (q->head[i].keep - r->p_keep);
    }
}

// Lays an empty plan under the heads of a sequence (everything stays) and returns how many slots there are. room: to come.
static inline size_t plan_begin(Runs *r, Run *q, bool merges, bool scores, int room) {
    size_t n = 0, at = 0;
    for (int i = 0; i < n_heads_of(r); i++) n += q->head[i].len;
    plan_grow(r, n + (room > 0 ? (size_t)room * n_heads_of(r) : 0));
    memset(r->p_keep, 1, n);
    for (size_t i = 0; merges && i < n; i++) { r->p_into[i] = -1; r->p_w[i] = 1; }
    for (int i = 0; i < n_heads_of(r); i++) {
        Head *h = &q->head[i];
        *h = (Head){ .len = h->len, .seen = h->seen, .keep = r->p_keep + at, .into = merges ? r->p_into + at : NULL, .w = merges ? r->p_w + at : NULL };
        at += h->len;
    }
    if (scores) plan_scores(r, q);
    q->merge_self = 0;
    q->renumber = false;
    q->room = room;
    return n;
}

// Merges, drops, turns; updates the lengths.
static inline void plan_carry_out(Runs *r, Run *q, size_t n, bool merges) {
    int seq = (int)(q - r->seq), most = 0;
    bool merge = false;
    for (int i = 0; i < n_heads_of(r); i++) {
        Head *h = &q->head[i];
        int gone = 0;
        r->h_slot[i] = -1;
        for (bool *p = h->keep; (p = memchr(p, 0, h->keep + h->len - p)); p++) { gone++; r->h_slot[i] = (int)(p - h->keep); }
        if (gone && gone == h->len)
            die("drop less (-r), or have the policy protect something", "-p %s: nothing at all would stay of %d slots in layer %d", r->chain->name, gone, i / r->n_kv_heads);
        if (gone > most) most = gone;
        h->len -= gone;
    }
    if (merges) for (size_t i = 0; i < n && !merge; i++) merge = r->p_into[i] >= 0;
    const float *turn = q->renumber && r->slot_pos ? r->cos_sin : NULL;
    if (!most && !merge && !turn) return;
    if (most <= 1 && !merge && !turn && q->step) K->kv_drop(r->kv, seq, r->h_slot);      // a hole a head; nothing moves
    else K->kv_apply(r->kv, seq, r->p_keep, merge ? r->p_into : NULL, merge ? r->p_w : NULL, q->merge_self, turn);
}

// After every pass. room: how many tokens are to come: the cache moves into an allocation of the size that it will need, which
// invalidates every pointer into its memory; -1: it stays where it is, as while decoding.
static inline void compress(Runs *r, int room) {
    const Part *e = evictor(r->chain);
    for (int b = 0; b < r->rows.B; b++) {
        int s = r->h_seq[b];
        Run *q = &r->seq[s];
        for (int i = 0; i < n_heads_of(r); i++) {
            q->head[i].len += r->layer_rows[i / r->n_kv_heads];
            q->head[i].seen += r->layer_rows[i / r->n_kv_heads];
        }
        if (!r->prompt) q->step += r->layer_rows[0];
        bool acts = e && (r->prompt || e->policy->flags & EVERY_TOKEN);
        if (acts || (r->prompt && r->watch)) {
            size_t n = plan_begin(r, q, r->prompt, r->prompt || r->watch || r->chain->flags & DECODE_SCORES, room);
            if (acts) {
                take_part(r, q, r->chain->n - 1);
                e->policy->compress(q);
                leave_part(r, q, r->chain->n - 1);
            }
            if (r->watch) r->watch(r->watch_ctx, r, q);
            plan_carry_out(r, q, n, r->prompt);
        }
        if (room >= 0) K->kv_reserve(r->kv, s, acts && q->room < room ? q->room : room);
    }
}

// ----------------------------------------------------------------------------
// the verbs on a back-end

static void run_votes(Run *q, int layer, int n, float *out) {
    Runs *r = q->dev;
    if (r->layer != layer) die(NULL, "votes: layer %d was asked for, layer %d has just run", layer, r->layer);
    int seq = (int)(q - r->seq), at = 0, width = (r->n_heads + 2 * r->n_kv_heads) * r->head_dim;
    int len = q->head[layer * r->n_kv_heads].len + r->layer_rows[layer];     // this pass's rows are there, but not counted yet
    while (r->h_seq[at] != seq) at++;                                        // this sequence's rows of the pass
    Rows rows = { .T = r->decode ? 1 : r->rows.T, .B = 1, .id = r->rows.id + at, .seq = r->rows.seq + at, .pos = r->rows.pos + at, .rot = r->rows.rot + at };
    K->kv_column_sums(r->sums, r->kv, layer, r->qkv + (size_t)at * width, r->lse + (size_t)at * r->n_heads, &rows, r->n_heads, visible(r), n < rows.T ? n : rows.T);
    rank_last(r->sums, len);
    memset(out, 0, q->n_seen * sizeof *out);
    if (len == q->n_seen) memcpy(out, r->sums, len * sizeof *out);
    else if (r->prompt) for (int j = 0; j < len; j++) out[r->h_pos[j]] = r->sums[j];
    else {                                                                   // slots that left before: a slot is not its token's index
        size_t before = 0, all = 0;
        for (int i = 0; i < n_heads_of(r); i++) {
            if (i == layer * r->n_kv_heads) before = all;
            all += q->head[i].len + (i / r->n_kv_heads <= layer ? r->layer_rows[i / r->n_kv_heads] : 0);
        }
        int *pos = need(all, sizeof *pos);
        K->kv_read(r->kv, seq, pos, NULL, NULL, NULL, NULL);
        for (int j = 0; j < len; j++) out[pos[before + j]] = r->sums[j];
        free(pos);
    }
}

static void run_text_cosine(Run *q, float *out) {
    Runs *r = q->dev;
    int T = r->rows.T, n_image = 0, n_text = 0;
    int *image = need(T, sizeof *image), *text = need(T, sizeof *text);
    for (int t = 0; t < T; t++) {
        if (q->kind[r->h_pos[t]] == IMAGE) image[n_image++] = t;
        if (q->kind[r->h_pos[t]] == TEXT) text[n_text++] = t;
    }
    float *a = K->alloc((size_t)n_image * r->dim * sizeof *a), *b = K->alloc((size_t)q->n_text * r->dim * sizeof *b);
    K->rows_copy(a, r->x, image, n_image, r->dim);
    if (r->n_text) {
        int *id = K->alloc(r->n_text * sizeof *id);
        K->put(id, r->text_id, r->n_text * sizeof *id);
        K->embed(b, r->embed, id, r->n_text);
        K->release(id);
    } else K->rows_copy(b, r->x, text, n_text, r->dim);
    K->cosine(out, a, n_image, b, q->n_text, r->dim);
    K->release(a);
    K->release(b);
    free(image);
    free(text);
}

static void run_nearest_key(Run *q, int layer) {
    Runs *r = q->dev;
    Head *c = &q->head[layer * r->n_kv_heads];
    K->kv_nearest(c->into, c->w, r->kv, (int)(q - r->seq), layer, c->keep);
}

static void run_drop_lowest(Run *q, int lo, const int *from_end) {
    Runs *r = q->dev;
    bool same = true;
    for (int l = 1; l < r->n_layers; l++) same &= from_end[l] == from_end[0];
    if (same && !r->watch) {
        K->kv_drop_lowest(r->kv, (int)(q - r->seq), lo, from_end[0]);
        for (int i = 0; i < n_heads_of(r); i++) q->head[i].len -= q->head[i].len - from_end[0] > lo;
        return;
    }
    if (!q->head[0].pos) plan_scores(r, q);      // somebody looks on, or layers differ (rows were pruned): decided here, by the same rule
    for (int i = 0; i < n_heads_of(r); i++) {
        Head *h = &q->head[i];
        int end = h->len - from_end[i / r->n_kv_heads], p = lo;
        for (int j = lo; j < end; j++) if (h->score[j] < h->score[p]) p = j;
        if (lo < end) h->keep[p] = false;
    }
}

static const Verbs run_verbs = { run_votes, run_text_cosine, run_nearest_key, run_drop_lowest };

#endif
