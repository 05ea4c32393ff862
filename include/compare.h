// compare.h: --compare: what a policy costs, on the prompt at hand. Three runs over the same picture rows:
//
//     1. the full cache, unheard: its answer, and its logits at every step
//     2. the policy: the answer that is printed, as always
//     3. the policy again, fed the answer of 1 token by token: now both have read the same text, and their distributions compare
//
//     KL(full || policy) = sum_i p_i (log p_i - log q_i)      in nats; p, q: softmax of the logits of all ids that can be generated,
//     agreement          = share of steps at which both rank the same id first      before penalty and temperature
//
// Prints on standard error: the two answers side by side, >> where they part; a line a step; and a line of figures for programs:
//     full_tokens 27; policy_tokens 24; first_difference 12; agreement 0.926; kl_mean 0.0132; kl_max 0.201
// first_difference: index of the first token that differs, -1 where none does.

#ifndef COMPARE_H
#define COMPARE_H
#include "generate.h"

typedef struct {
    Talk full;                   // the talk of run 1, then of run 3
    Answer answer;               // of run 1
    Type kv_type;
    int n, room, vocab;
    float *row;                  // (n, vocab_size) logits of run 1
    double *kl;                  // (n,)
    int *first, *choice;         // (n,) the id that run 1, run 3 rank first
    const Info *info;
} Compare;

static void compare_keep(void *ctx, int i, const float *row) {
    Compare *c = ctx;
    if (i >= c->room) {
        c->room = 2 * i + 64;
        c->row = realloc(c->row, (size_t)c->room * c->vocab * sizeof *row);
        if (!c->row) die("take a smaller -n", "--compare: out of memory for the logits of %d steps", c->room);
    }
    memcpy(c->row + (size_t)i * c->vocab, row, c->vocab * sizeof *row);
    c->n = i + 1;
}

static inline int largest(const float *row, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) if (row[i] > row[best]) best = i;
    return best;
}

static void compare_step(void *ctx, int i, const float *q) {
    Compare *c = ctx;
    const float *p = c->row + (size_t)i * c->vocab;
    int n = c->info->n_pieces;
    double p_sum = 0, q_sum = 0, kl = 0;
    c->first[i] = largest(p, n);
    c->choice[i] = largest(q, n);
    float p_most = p[c->first[i]], q_most = q[c->choice[i]];
    for (int k = 0; k < n; k++) { p_sum += exp(p[k] - p_most); q_sum += exp(q[k] - q_most); }
    double shift = log(p_sum) + p_most - log(q_sum) - q_most;
    for (int k = 0; k < n; k++) {
        double w = exp(p[k] - p_most) / p_sum;
        if (w > 0) kl += w * ((double)p[k] - q[k] - shift);
    }
    c->kl[i] = kl > 0 ? kl : 0;  // rounding
}

// A silent copy of the talk with a cache of its own; `answer` is where it goes.
static inline void compare_talk(Compare *c, const Talk *t, const Chain *chain, Answer *answer) {
    const Runs *r = t->runs;
    c->full = *t;
    c->full.chain = chain;
    c->full.answer = answer;
    *answer = (Answer){ .sampler = t->answer[0].sampler, .seen = need(t->info->vocab_size, 1) };
    c->full.runs = runs_new(chain, r->n_layers, r->n_heads, r->n_kv_heads, r->head_dim, r->dim, 1, r->ctx, c->kv_type, r->slot_pos, r->seq[0].seed, t->info->cos_sin, r->embed);
    c->full.runs->n_text = r->n_text;
    c->full.runs->text_id = r->n_text ? memcpy(need(r->n_text, sizeof(int)), r->text_id, r->n_text * sizeof(int)) : NULL;
    c->full.mute = true;
    c->full.show = NULL;
    c->full.logits_file = NULL;
    c->full.on_logits_ctx = c;
}

// Run 1: before the talk itself answers.
static inline void compare_full(Compare *c, const Talk *t, Type kv_type) {
    static const Chain none;
    *c = (Compare){ .kv_type = kv_type, .vocab = t->info->vocab_size, .info = t->info };
    compare_talk(c, t, &none, &c->answer);
    c->full.on_logits = compare_keep;
    answer_turn(&c->full);
    runs_free(c->full.runs);
}

// Run 3.
static inline void compare_forced(Compare *c, const Talk *t) {
    Answer forced;
    compare_talk(c, t, t->chain, &forced);
    c->kl = need(c->n, sizeof *c->kl); c->first = need(c->n, sizeof(int)); c->choice = need(c->n, sizeof(int));
    c->full.on_logits = compare_step;
    c->full.force = c->answer.id;
    c->full.n_force = c->n;
    answer_turn(&c->full);
    runs_free(c->full.runs);
    free(forced.seen); free(forced.id); free(forced.text);
}

// ----------------------------------------------------------------------------
// printing

enum { COLUMN = 38 };            // of two, and " | " between

// Writes up to `width` characters of s and fills up with blanks.
static inline void print_padded(FILE *out, const char *s, size_t n, int width) {
    size_t i = 0;
    while (i < n) {
        if (((unsigned char)s[i] & 0xc0) != 0x80 && width-- == 0) { width = 0; break; }
        fputc((unsigned char)s[i] < 32 || s[i] == 127 ? ' ' : s[i], out);
        i++;
    }
    for (; width > 0; width--) fputc(' ', out);
}

// The next line of a text: as many words as fit, or a piece of a long one. Advances *s.
static inline size_t next_line(const char **s, const char *end, const char **line) {
    const char *p = *s, *space = NULL;
    int width = 0;
    while (p < end && *p != '\n') {
        if (((unsigned char)*p & 0xc0) != 0x80 && width++ == COLUMN) break;
        if (*p == ' ') space = p;
        p++;
    }
    bool cut = p < end && *p != '\n' && *p != ' ' && space;
    if (cut) p = space;
    *line = *s;
    *s = p < end && (*p == '\n' || *p == ' ') ? p + 1 : p;
    return p - *line;
}

// What is shown of the first n tokens of an answer, in bytes.
static inline size_t shown_bytes(const Talk *t, const Answer *a, int n) {
    Talk silent = { .info = t->info, .mute = true };
    Answer b = { 0 };
    for (int i = 0; i < n; i++) if (!is_stop(t->info, a->id[i])) show(&silent, &b, a->id[i]);
    free(b.text);
    return b.len < a->len ? b.len : a->len;
}

// An answer with >> before its token `at`.
static inline char *marked_text(const Talk *t, const Answer *a, int at, size_t *len) {
    char *s = need(a->len + 8, 1);
    size_t cut = at >= 0 ? shown_bytes(t, a, at) : a->len;
    while (at >= 0 && cut < a->len && a->text[cut] == ' ') cut++;
    *len = (size_t)sprintf(s, "%.*s%s%.*s", (int)cut, a->text ? a->text : "", at >= 0 ? ">>" : "", (int)(a->len - cut), a->text ? a->text + cut : "");
    return s;
}

static inline void print_piece(FILE *out, const Info *info, int id, int width) {
    int len = 0;
    const char *piece = tokenizer_piece(info->tok, id, &len);
    print_padded(out, piece, len, width);
}

// After the talk has answered: run 3, and the comparison.
static inline void compare_print(Compare *c, const Talk *t, FILE *out) {
    const Answer *a = &c->answer, *b = &t->answer[0];
    int differ = 0, agree = 0;
    double sum = 0, most = 0;
    compare_forced(c, t);
    while (differ < a->n && differ < b->n && a->id[differ] == b->id[differ]) differ++;
    if (differ == a->n && differ == b->n) differ = -1;

    size_t left, right;
    char *l = marked_text(t, a, differ, &left), *r = marked_text(t, b, differ, &right);
    const char *at[2] = { l, r }, *end[2] = { l + left, r + right }, *line;
    fputc('\n', out);
    print_padded(out, "full cache", 10, COLUMN);
    fprintf(out, " | %s\n", t->chain->name);
    for (int i = 0; i < 2 * COLUMN + 3; i++) fputc(i == COLUMN + 1 ? '+' : '-', out);
    fputc('\n', out);
    while (at[0] < end[0] || at[1] < end[1]) {
        size_t n = next_line(&at[0], end[0], &line);
        print_padded(out, line, n, COLUMN);
        n = next_line(&at[1], end[1], &line);
        fprintf(out, " | ");
        print_padded(out, line, n, 0 < n ? COLUMN : 0);
        fputc('\n', out);
    }
    for (int i = 0; i < c->n; i++) {
        sum += c->kl[i];
        if (c->kl[i] > most) most = c->kl[i];
        agree += c->first[i] == c->choice[i];
    }
    fprintf(out, "\nBoth are fed the answer of the full cache:\nstep  token           policy's choice    KL, nats\n");
    for (int i = 0; i < c->n; i++) {
        fprintf(out, "%4d  ", i);
        print_piece(out, t->info, a->id[i], 15);
        fputc(' ', out);
        print_piece(out, t->info, c->choice[i], 15);
        fprintf(out, " %c  %8.5f  ", c->first[i] == c->choice[i] ? ' ' : '<', c->kl[i]);
        for (int k = 0; most > 0 && k < (int)rint(20 * c->kl[i] / most); k++) fputc('#', out);
        fputc('\n', out);
    }
    fprintf(out, "full_tokens %d; policy_tokens %d; first_difference %d; agreement %.4g; kl_mean %.6g; kl_max %.6g\n", a->n, b->n, differ, (double)agree / c->n, sum / c->n, most);
    free(l); free(r);
}

static inline void compare_free(Compare *c) {
    free(c->answer.seen); free(c->answer.id); free(c->answer.text);
    free(c->row); free(c->kl); free(c->first); free(c->choice);
}

#endif
