// trace.h: --trace FILE: what happened to the cache, one JSON object a line, for tools.
//
// Tokens are named by their index in the sequence, layers and heads (kv heads) from 0. Every line has
//
//     event     what happened, below
//     policy    -p as it was given
//     seq       which answer of -B, else 0; the prompt is sequence 0's
//     step      tokens of the answer that were fed so far (a chat's later rows count too): 0 at the prompt
//
// and, by event, in the order in which they happen:
//
//     prompt    rows are about to be read (a chat: every turn). first: index of the first one; id: their ids (-1: an image row);
//               kind: "template", "text", "image" or "answer" for each; layers, kv_heads
//     rows      a policy let fewer rows into `layer` than into the one before it (before layer 0: than there are).
//               rows: how many entered; dropped: the others
//     hidden    from `layer` on, keys in the cache are not looked at. hidden: which
//     plan      after the prompt, for every `layer` and `head`. kept, dropped: the slots, both ascending; kept_score, dropped_score:
//               what they were ranked by, where the policy ranks (a null is no finite number), else 0; merged: [from, into, weight]
//               for every slot whose content is added to another's; merge_self and the rule for sums: include/policies.h, Head.w
//     drop      while decoding, for every head that loses a slot: layer, head, slots (how many there were), dropped, dropped_score
//     token     the next token of the answer was chosen: id, piece. Its step is the step that predicted it
//
// With fastv:recompute the prompt is read anew for every token: `rows` and `plan` come again, with that step.

#ifndef TRACE_H
#define TRACE_H
#include "run.h"

typedef struct {
    FILE *f;                     // NULL: nothing is traced
    const char *path;
    int n_prompt;                // rows of the first prompt
    uint8_t *here;               // (ctx,) tokens that entered the last layer of a prompt
    uint8_t *hidden;             // (n_seqs, ctx) tokens that the last layer did not look at
} Trace;

static inline void trace_event(const Trace *t, const char *event, const Runs *r, int seq) {
    int step = r->seq[seq].n_seen > t->n_prompt && t->n_prompt ? r->seq[seq].n_seen - t->n_prompt : 0;
    fprintf(t->f, "{\"event\":\"%s\",\"policy\":\"", event);
    for (const char *p = r->chain->name; *p; p++) fprintf(t->f, *p == '"' || *p == '\\' ? "\\%c" : (unsigned char)*p < 32 ? " " : "%c", *p);
    fprintf(t->f, "\",\"seq\":%d,\"step\":%d", seq, step);
}

static inline void trace_ints(const Trace *t, const char *name, const int *x, int n) {
    fprintf(t->f, ",\"%s\":[", name);
    for (int i = 0; i < n; i++) fprintf(t->f, "%s%d", i ? "," : "", x[i]);
    fputc(']', t->f);
}

static inline void trace_number(const Trace *t, const char *before, double x) {
    if (isfinite(x)) fprintf(t->f, "%s%.9g", before, x);
    else fprintf(t->f, "%snull", before);
}

// The tokens of [0, n) that are marked.
static inline void trace_marked(const Trace *t, const char *name, const uint8_t *mark, int n) {
    const char *comma = "";
    fprintf(t->f, ",\"%s\":[", name);
    for (int i = 0; i < n; i++) if (mark[i]) { fprintf(t->f, "%s%d", comma, i); comma = ","; }
    fputc(']', t->f);
}

// A string as JSON: what is not UTF-8 becomes U+FFFD.
static inline void trace_string(const Trace *t, const char *s, int n) {
    const unsigned char *p = (const unsigned char *)s, *end = p + n;
    fputc('"', t->f);
    while (p < end) {
        int more = *p < 0x80 ? 0 : *p >= 0xc2 && *p < 0xe0 ? 1 : *p >= 0xe0 && *p < 0xf0 ? 2 : *p >= 0xf0 && *p < 0xf5 ? 3 : -1, ok = more >= 0 && more < end - p;
        for (int i = 1; ok && i <= more; i++) ok = (p[i] & 0xc0) == 0x80;
        if (ok && more) ok = !(p[0] == 0xe0 && p[1] < 0xa0) && !(p[0] == 0xed && p[1] > 0x9f) && !(p[0] == 0xf0 && p[1] < 0x90) && !(p[0] == 0xf4 && p[1] > 0x8f);
        if (!ok) { fputs("\\ufffd", t->f); p++; continue; }
        if (*p == '"' || *p == '\\') fprintf(t->f, "\\%c", *p);
        else if (*p < 32 || *p == 127) fprintf(t->f, "\\u%04x", *p);
        else fwrite(p, 1, more + 1, t->f);
        p += more + 1;
    }
    fputc('"', t->f);
}

// Rows of sequence 0 from index `first` on are about to be read.
static inline void trace_prompt(Trace *t, const Runs *r, const int *id, const uint8_t *kind, int n, int first) {
    static const char *const kinds[] = { "template", "text", "image", "answer" };
    if (!t->here) { t->here = need(r->ctx, 1); t->hidden = need((size_t)r->n_seqs * r->ctx, 1); }
    if (first == 0) t->n_prompt = n;
    trace_event(t, "prompt", r, 0);
    fprintf(t->f, ",\"first\":%d,\"layers\":%d,\"kv_heads\":%d", first, r->n_layers, r->n_kv_heads);
    trace_ints(t, "id", id, n);
    fputs(",\"kind\":[", t->f);
    for (int i = 0; i < n; i++) fprintf(t->f, "%s\"%s\"", i ? "," : "", kinds[kind[i]]);
    fputs("]}\n", t->f);
}

// A layer has run: fewer rows, keys that it did not look at?
static inline void trace_layer(Trace *t, const Runs *r, int layer) {
    for (int b = 0; b < r->rows.B; b++) {
        int s = r->h_seq[b], n = r->seq[s].n_seen;
        uint8_t *hidden = t->hidden + (size_t)s * r->ctx;
        if (layer == 0) { memset(t->here, 1, n); memset(hidden, 0, n); }
        if (r->prompt) {
            uint8_t *gone = need(n, 1);
            memcpy(gone, t->here, n);
            for (int i = 0; i < r->rows.T; i++) gone[r->h_pos[i]] = 0;
            for (int i = 0; i < n; i++) t->here[i] &= !gone[i];
            if (memchr(gone, 1, n)) {
                trace_event(t, "rows", r, s);
                fprintf(t->f, ",\"layer\":%d,\"rows\":%d", layer, r->rows.T);
                trace_marked(t, "dropped", gone, n);
                fputs("}\n", t->f);
            }
            free(gone);
        }
        bool news = false;
        for (int i = 0; i < n; i++) {
            uint8_t now = r->hidden && !r->visible[s][i];
            news |= hidden[i] != now;
            hidden[i] = now;
        }
        if (!news) continue;
        trace_event(t, "hidden", r, s);
        fprintf(t->f, ",\"layer\":%d", layer);
        trace_marked(t, "hidden", hidden, n);
        fputs("}\n", t->f);
    }
}

// Slots of a head with this fate, and what they were ranked by.
static inline void trace_fate(const Trace *t, const Head *h, bool keep) {
    const char *name = keep ? "kept" : "dropped", *comma = "";
    fprintf(t->f, ",\"%s\":[", name);
    for (int j = 0; j < h->len; j++) if (h->keep[j] == keep) { fprintf(t->f, "%s%d", comma, h->pos[j]); comma = ","; }
    fprintf(t->f, "],\"%s_score\":[", name);
    comma = "";
    for (int j = 0; j < h->len; j++) if (h->keep[j] == keep) { trace_number(t, comma, h->score[j]); comma = ","; }
    fputc(']', t->f);
}

// A plan was made for sequence q.
static inline void trace_plan(const Trace *t, const Runs *r, const Run *q) {
    for (int i = 0; i < n_heads_of(r); i++) {
        const Head *h = &q->head[i];
        if (!r->prompt && (!h->len || !memchr(h->keep, 0, h->len))) continue;
        trace_event(t, r->prompt ? "plan" : "drop", r, (int)(q - r->seq));
        fprintf(t->f, ",\"layer\":%d,\"head\":%d", i / r->n_kv_heads, i % r->n_kv_heads);
        if (r->prompt) {
            const char *comma = "";
            trace_fate(t, h, true);
            trace_fate(t, h, false);
            fputs(",\"merged\":[", t->f);
            for (int j = 0; h->into && j < h->len; j++)
                if (h->into[j] >= 0) {
                    fprintf(t->f, "%s[%d,%d", comma, h->pos[j], h->pos[h->into[j]]);
                    trace_number(t, ",", h->w[j]);
                    fputc(']', t->f);
                    comma = ",";
                }
            trace_number(t, "],\"merge_self\":", q->merge_self);
        } else {
            fprintf(t->f, ",\"slots\":%d", h->len);
            trace_fate(t, h, false);
        }
        fputs("}\n", t->f);
    }
}

static inline void trace_token(const Trace *t, const Runs *r, int seq, int id, const char *piece, int len) {
    trace_event(t, "token", r, seq);
    fprintf(t->f, ",\"id\":%d,\"piece\":", id);
    trace_string(t, piece ? piece : "", piece ? len : 0);
    fputs("}\n", t->f);
}

static inline void trace_close(Trace *t) {
    if (t->f && (ferror(t->f) | fclose(t->f))) die("is the disk full?", "--trace %s: %s", t->path, strerror(errno));
    t->f = NULL;
    free(t->here);
    free(t->hidden);
}

#endif
