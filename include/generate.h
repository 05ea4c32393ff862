// generate.h: from logits to an answer: the sampler, and the loop that reads a turn and answers it, for any model (Arch) and
// any number of answers side by side. Options come from cli.h; what leaves the cache is run.h's business.

#ifndef GENERATE_H
#define GENERATE_H
#include "model.h"
#include "progress.h"
#include "run.h"
#include "show.h"
#include "tokenizer.h"

typedef struct {                 // one answer's sampler
    double temperature;          // 0: greedy
    int top_k;                   // 0: off
    double top_p, penalty;       // 1: off
    uint64_t state;              // of the random numbers
} Sampler;

typedef struct { float logit; int id; } Candidate;

static inline double uniform(uint64_t *s) {                  // [0, 1), splitmix64
    uint64_t z = *s += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return (double)((z ^ z >> 31) >> 11) / 9007199254740992.0;
}

static int by_logit(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    return x->logit != y->logit ? (x->logit < y->logit ? 1 : -1) : x->id - y->id;
}

// The next token, in Hugging Face's order: repetition penalty, temperature, top-k, top-p, softmax, draw.
//
//     penalty: logit < 0 ? logit penalty : logit / penalty, once for every distinct id of the sequence so far (seen)
//     top-k:   ids whose logit is below the k-th largest go (ties stay)
//     top-p:   an id stays if the ids ranked above it hold less than p together; the first always stays
//
// logits: (n,), changed; ids from n on do not take part. seen: (n,). c: scratch of n. Greedy: the first of the largest.
static inline int sample(Sampler *s, float *logits, int n, const uint8_t *seen, Candidate *c) {
    if (s->penalty != 1)
        for (int i = 0; i < n; i++)
            if (seen[i]) logits[i] = (float)(logits[i] < 0 ? logits[i] * s->penalty : logits[i] / s->penalty);
    int best = 0;
    bool broken = false;
    for (int i = 0; i < n; i++) { broken |= isnan(logits[i]); if (logits[i] > logits[best]) best = i; }
    if (broken) die("export the model again; if its numbers overflow, with --type f32 or bf16", "the model's logits are no numbers (NaN)");
    if (s->temperature == 0) return best;
    for (int i = 0; i < n; i++) c[i] = (Candidate){ logits[i], i };
    if (s->top_k || s->top_p < 1) {
        qsort(c, n, sizeof *c, by_logit);
        if (s->top_k && s->top_k < n) {
            int k = s->top_k;
            while (k < n && c[k].logit == c[s->top_k - 1].logit) k++;
            n = k;
        }
    }
    double most = logits[best], sum = 0, above = 0;          // the temperature divides differences: however small, exp(0) is there
    for (int i = 0; i < n; i++) sum += exp((c[i].logit - most) / s->temperature);
    if (s->top_p < 1) {
        int keep = 0;
        while (keep < n && (keep == 0 || above < s->top_p * sum)) above += exp((c[keep++].logit - most) / s->temperature);
        n = keep;
        sum = above;
    }
    double u = uniform(&s->state) * sum;
    for (int i = 0; i < n; i++) if ((u -= exp((c[i].logit - most) / s->temperature)) < 0) return c[i].id;
    return c[n - 1].id;
}

typedef struct {                 // one answer under way
    Sampler sampler;
    uint8_t *seen;               // (vocab_size,) ids of the sequence so far, for the repetition penalty
    int *id, n, cap;             // tokens predicted
    bool ended;                  // by a stop token, by -n, or by the end of a forced answer
    Decoder decoder;
    char *text;                  // what has been printed or is held back
    size_t len, shown, room;
} Answer;

typedef struct {                 // what happened, for the last line
    int prompt_tokens, image_tokens, new_tokens, steps, tokens;
    double image_ms, vision_ms, prompt_ms, decode_ms;
} Figures;

typedef struct {                 // a conversation: a model, its caches, the answers
    const Arch *arch;
    Model *m;
    const Info *info;
    Runs *runs;
    const Chain *chain;
    int n_answers, n_new, ctx;   // -B, -n, --ctx
    Answer *answer;              // (n_answers,)
    const int *force;            // ids of the answer, n_force of them; NULL: the model's own
    int n_force;
    FILE *logits_file;
    const char *logits_path;
    float *logits;               // (n_answers, vocab_size)
    Candidate *candidates;
    Prompt prompt;               // of the turn under way
    bool mute;                   // prints nothing (compare.h)
    void (*on_logits)(void *ctx, int i, const float *row);   // told the logits of the i-th predicted token (compare.h)
    void *on_logits_ctx;
    Show *show;                  // pictures and traces; NULL: none
    Figures f;
} Talk;

static inline bool is_stop(const Info *info, int id) {
    for (int i = 0; i < info->n_stop; i++) if (info->stop_id[i] == id) return true;
    return false;
}

// What was printed must have arrived.
static inline int printed(void) {
    if (fflush(stdout) || ferror(stdout)) die("is the disk full?", "standard output: %s", strerror(errno));
    return 0;
}

static inline bool blank(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

// Appends a token's text to an answer and prints what is certain: leading white space of an answer is not shown, trailing white
// space waits for what follows. id < 0: the end.
static inline void show(Talk *t, Answer *a, int id) {
    size_t most = (size_t)tokenizer_max_piece(t->info->tok) * 3 + 16;
    if (a->room - a->len < most) {
        a->room = 2 * a->room + most;
        a->text = realloc(a->text, a->room);
        if (!a->text) die(NULL, "out of memory");
    }
    int got = tokenizer_decode(t->info->tok, &a->decoder, id, a->text + a->len);
    if (a->len == 0) {                                       // nothing but white space so far
        int skip = 0;
        while (skip < got && blank(a->text[skip])) skip++;
        memmove(a->text, a->text + skip, got -= skip);
    }
    a->len += got;
    if (t->n_answers > 1 || t->mute) return;                 // several answers are printed one after the other, at the end
    size_t end = a->len;
    while (end > a->shown && blank(a->text[end - 1])) end--;
    fwrite(a->text + a->shown, 1, end - a->shown, stdout);
    printed();
    a->shown = end;
}

static inline void write_logits(Talk *t, const float *row) {
    if (t->logits_file && fwrite(row, sizeof *row, t->info->vocab_size, t->logits_file) != (size_t)t->info->vocab_size)
        die("is the disk full?", "--logits %s: %s", t->logits_path, strerror(errno));
}

// Takes the next token of an answer from its logits.
static inline void next_token(Talk *t, Answer *a, float *logits) {
    write_logits(t, logits);
    if (t->on_logits) t->on_logits(t->on_logits_ctx, a->n, logits);
    int id = t->force ? t->force[a->n] : sample(&a->sampler, logits, t->info->n_pieces, a->seen, t->candidates);
    if (a->n == a->cap) {
        a->cap = a->cap ? 2 * a->cap : 256;
        a->id = realloc(a->id, a->cap * sizeof *a->id);
        if (!a->id) die(NULL, "out of memory");
    }
    a->id[a->n++] = id;
    if (id < t->info->vocab_size) a->seen[id] = 1;
    t->f.new_tokens++;
    if (t->show && t->show->trace.f) {
        int len = 0;
        const char *piece = tokenizer_piece(t->info->tok, id, &len);
        trace_token(&t->show->trace, t->runs, (int)(a - t->answer), id, piece, len);
    }
    bool stop = !t->force && is_stop(t->info, id);
    if (!stop) show(t, a, id);
    a->ended = stop || a->n >= (t->force ? t->n_force : t->n_new) || interrupts;
    if (a->ended) show(t, a, -1);
}

// One pass over rows of sequence 0 that are no prompt of their own, one row at a time: a chat's later turn under a policy that acts at
// every token.
static inline void read_one_by_one(Talk *t) {
    Runs *r = t->runs;
    double start = now_ms();
    for (int i = 0; i < t->prompt.n; i++) {
        progress("rows read", i, t->prompt.n, start);
        pass_tokens(r, NULL, &t->prompt.id[i], 1);
        r->kind[0][r->seq[0].n_seen - 1] = t->prompt.kind[i];
        t->arch->forward(t->m, r, NULL, NULL, 1, t->logits);
        if (i + 1 < t->prompt.n) compress(r, -1);
    }
}

// Reads the rows of t->prompt into sequence 0 and answers: all of a turn. Fills t->answer and t->f.
static inline void answer_turn(Talk *t) {
    Runs *r = t->runs;
    Prompt *p = &t->prompt;
    const Info *info = t->info;
    bool first = r->seq[0].n_seen == 0, one_by_one = !first && t->chain->flags & EVERY_TOKEN;
    int n_new = t->force ? t->n_force : t->n_new, B = t->n_answers;
    if (r->seq[0].n_seen + p->n > t->ctx)
        die("ask for less, take fewer pictures, or a larger --ctx", "the prompt is longer than the context: %d tokens, --ctx is %d", r->seq[0].n_seen + p->n, t->ctx);
    int left = t->ctx - r->seq[0].n_seen - p->n + 1;         // tokens that can still be predicted: the last one is never fed
    if (n_new > left) {
        if (t->force) die("take a larger --ctx", "the prompt and the forced answer need %d tokens, --ctx is %d", r->seq[0].n_seen + p->n + n_new - 1, t->ctx);
        if (!quiet) fprintf(stderr, "note: --ctx %d leaves room for %d new tokens, not %d\n", t->ctx, left, n_new);
        n_new = left;
    }
    int save_new = t->n_new;
    t->n_new = n_new;
    t->f.prompt_tokens += p->n;
    for (int i = 0; i < p->n; i++) t->f.image_tokens += p->kind[i] == IMAGE;
    for (int b = 0; b < B; b++) {
        Answer *a = &t->answer[b];
        a->n = 0;
        a->ended = false;
        a->len = a->shown = 0;
        a->decoder = (Decoder){ 0 };
        for (int i = 0; i < p->n; i++) if (p->id[i] >= 0 && p->id[i] < info->vocab_size) a->seen[p->id[i]] = 1;
    }

    double start = now_ms();
    int rows = t->chain->flags & RECOMPUTE ? t->ctx : p->n;
    t->arch->room(t->m, rows > B ? rows : B, B, t->ctx);
    r->cos_sin = info->cos_sin;
    if (t->show) show_prompt(t->show, r, p, r->seq[0].n_seen);
    if (one_by_one) {
        K->kv_reserve(r->kv, 0, p->n + n_new);
        read_one_by_one(t);
    } else {
        pass_prompt(r, 0, p->id, p->kind, p->n);
        t->arch->forward(t->m, r, p, NULL, 1, t->logits);
    }
    for (int b = 1; b < B; b++) memcpy(t->logits + (size_t)b * info->vocab_size, t->logits, info->vocab_size * sizeof *t->logits);
    for (int b = 0; b < B; b++) next_token(t, &t->answer[b], t->logits + (size_t)b * info->vocab_size);   // the first token does not depend on the plan
    compress(r, one_by_one ? -1 : n_new - 1);
    for (int b = 1; b < B; b++) runs_copy(r, b, 0);
    t->f.prompt_ms += now_ms() - start;

    int *seq = need(B, sizeof *seq), *id = need(B, sizeof *id);
    for (;;) {
        int n = 0;
        for (int b = 0; b < B; b++)
            if (!t->answer[b].ended) { seq[n] = b; id[n++] = t->answer[b].id[t->answer[b].n - 1]; }
        if (!n) break;
        start = now_ms();
        if (t->chain->flags & RECOMPUTE) {                   // no cache: the prompt and the answer so far, anew, sequence by sequence
            for (int i = 0; i < n; i++) {
                Answer *a = &t->answer[seq[i]];
                int rows = p->n + a->n, *all = need(rows, sizeof *all);
                uint8_t *kind = need(rows, 1);
                memcpy(all, p->id, p->n * sizeof *all);
                memcpy(kind, p->kind, p->n);
                for (int j = 0; j < a->n; j++) { all[p->n + j] = a->id[j]; kind[p->n + j] = ANSWER; }
                runs_clear(r, seq[i]);
                pass_prompt(r, seq[i], all, kind, rows);
                t->arch->forward(t->m, r, p, NULL, 1, t->logits + (size_t)i * info->vocab_size);
                compress(r, 0);
                free(all);
                free(kind);
            }
        } else {
            pass_tokens(r, seq, id, n);
            t->arch->forward(t->m, r, NULL, NULL, n, t->logits);
            compress(r, -1);
        }
        t->f.decode_ms += now_ms() - start;
        t->f.steps++;
        t->f.tokens += n;
        for (int i = 0; i < n; i++) next_token(t, &t->answer[seq[i]], t->logits + (size_t)i * info->vocab_size);
    }
    free(seq);
    free(id);
    if (B == 1 && !t->mute) fputc('\n', stdout);
    else if (B > 1) for (int b = 0; b < B; b++) {
        Answer *a = &t->answer[b];
        while (a->len && blank(a->text[a->len - 1])) a->len--;
        fwrite(a->text, 1, a->len, stdout);
        fputc('\n', stdout);
    }
    printed();
    t->n_new = save_new;
}

// slots_kept of slots_seen, means over layers, heads and sequences
static inline void print_figures(const Talk *t, FILE *out) {
    const Runs *r = t->runs;
    double kept = 0, seen = 0;
    for (int s = 0; s < r->n_seqs; s++) {
        for (int i = 0; i < n_heads_of(r); i++) kept += r->seq[s].head[i].len;
        seen += r->seq[s].n_seen;
    }
    kept = rint(10 * kept / n_heads_of(r) / r->n_seqs) / 10;
    double token_ms = t->f.steps ? t->f.decode_ms / t->f.steps : 0;
    fprintf(out, "prompt_tokens %d; image_tokens %d; new_tokens %d; slots_kept %.10g; slots_seen %.10g; cache_bytes %zu; "
            "image_ms %.1f; vision_ms %.1f; prompt_ms %.1f; token_ms %.1f; tokens_per_s %.1f\n",
            t->f.prompt_tokens, t->f.image_tokens, t->f.new_tokens, kept, rint(10 * seen / r->n_seqs) / 10, K->kv_bytes(r->kv),
            t->f.image_ms, t->f.vision_ms, t->f.prompt_ms, token_ms, t->f.decode_ms > 0 ? 1e3 * t->f.tokens / t->f.decode_ms : 0);
}

#endif
