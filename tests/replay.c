// replay.c: replays golden files: what each method's released code decided on given inputs, against policies.c, run.h and the CPU
// back-end (and, for cases that carry a decoder, against llava.c's).
//
//     make replay && tests/replay FILE…
//
// Format: plain text, `#` comments; a case is a list of records that ends with `end`:
//     case NAME · method NAME · int|num|tol NAME VALUE · ints|expect_ints NAME N v… · tensor|expect_tensor NAME NDIM d… v… · step T
// A line a case; what is expected and not known here fails, so that nothing is skipped in silence (but order_…: ranks that only
// explain a decision). Exit status 1 if anything failed. A case runs in a process of its own: one that dies is one that failed.
// A file that breaks the format is an error, counts as one failure and ends there; the next file is read all the same.

#define NO_MAIN
#include "../llava.c"
#include <ctype.h>
#include <limits.h>
#include <setjmp.h>
#include <sys/wait.h>
#include "given.h"

// ----------------------------------------------------------------------------
// reading

enum { INT, NUM, TOL, INTS, TENSOR, EXPECT_INTS, EXPECT_TENSOR, N_KINDS };
static const char *const kind_names[N_KINDS] = { "int", "num", "tol", "ints", "tensor", "expect_ints", "expect_tensor" };

typedef struct {
    int kind, step;              // step -1: before the first
    char name[64];
    int n_dims, dim[8];
    size_t n;
    double value;                // INT, NUM, TOL
    int *i;                      // INTS …
    float *f;                    // TENSOR …
    bool used;
} Record;
typedef struct {
    char name[128], method[64];
    Record *record;
    int n, room, steps;          // steps: the last that has records
    bool failed;
} Case;

typedef struct {
    const char *path;
    char *text, *at, *end;
    int line, next_line;         // of the word read last; of what follows
    Case c;                      // under way
    jmp_buf broken;
} Reader;

// The file breaks the format: what follows in it is not read.
__attribute__((noreturn, format(printf, 2, 3)))
static void broken(Reader *r, const char *format, ...) {
    va_list args;
    fflush(stdout);
    fprintf(stderr, "error: %s:%d: ", r->path, r->line);
    if (*r->c.name) fprintf(stderr, "case %s: ", r->c.name);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    longjmp(r->broken, 1);
}

// The next word, or NULL at the end of the file.
static char *word(Reader *r) {
    char *p = r->at;
    for (;;) {
        while (isspace((unsigned char)*p)) r->next_line += *p++ == '\n';
        if (*p != '#') break;
        while (*p && *p != '\n') p++;
    }
    r->line = r->next_line;
    if (!*p) { r->at = p; return NULL; }
    char *start = p;
    while (*p && !isspace((unsigned char)*p) && *p != '#') p++;
    if (*p == '#') {                         // a comment right behind a word: blank it out
        char *c = p;
        while (*c && *c != '\n') *c++ = ' ';
    }
    r->next_line += *p == '\n';
    if (*p) *p++ = 0;
    r->at = p;
    return start;
}
static char *must(Reader *r, const char *what) {
    char *w = word(r);
    if (!w) broken(r, "ends where %s should stand", what);
    return w;
}
static double number(Reader *r, const char *what) {
    char *w = must(r, what), *end;
    double x = strtod(w, &end);
    if (end == w || *end || !isfinite(x)) broken(r, "`%s` is not a number (%s)", w, what);
    return x;
}
static int integer(Reader *r, const char *what, int lo, int hi) {
    double x = number(r, what);
    if (x != rint(x) || x < lo || x > hi) broken(r, "%s: %g: allowed are integers from %d to %d", what, x, lo, hi);
    return (int)x;
}

// What the parameters of a case may be: a broken one is an error, not a crash.
enum { MOST = 1 << 20 };
static const struct { const char *name; int lo, hi; } limits[] = {
    { "layers", 1, 1024 }, { "heads", 1, 1024 }, { "kv_heads", 1, 1024 }, { "head_dim", 1, 4096 }, { "dim", 1, 1 << 16 },
    { "hidden_dim", 1, 1 << 18 }, { "vocab", 1, MOST }, { "prompt", 1, MOST }, { "steps", 0, MOST }, { "image_start", 0, MOST }, { "image_len", 0, MOST }, { "k", 1, 1024 },
    { "keep", 0, MOST }, { "k_sim", 0, MOST }, { "i0", 0, MOST }, { "step", 1, MOST }, { "fastv_start", 0, MOST }, { "fastv_len", 0, MOST },
    { "start_size", 0, MOST }, { "recent_size", 0, MOST }, { "protect_size", 0, MOST }, { "distance", -MOST, MOST }, { "sinks", 0, MOST },
    { "window", 1, MOST }, { "pool", 1, MOST }, { "ratio", 0, 1 }, { "rho_L", 0, 1 }, { "hh_ratio", 0, 1 }, { "recent_ratio", 0, 1 } };

static void read_record(Reader *r, int kind, int step) {
    Case *c = &r->c;
    if (c->n == c->room) {
        c->record = realloc(c->record, (c->room = 2 * c->room + 64) * sizeof *c->record);
        if (!c->record) die(NULL, "out of memory");
    }
    Record *x = &c->record[c->n++];
    *x = (Record){ .kind = kind, .step = step, .n = 1 };
    char *name = must(r, "a name");
    if (strlen(name) >= sizeof x->name) broken(r, "`%s` is too long a name", name);
    strcpy(x->name, name);
    bool expected = kind == EXPECT_INTS || kind == EXPECT_TENSOR;
    for (int i = 0; kind != TOL && i < c->n - 1; i++) {
        const Record *y = &c->record[i];
        if (y->step == step && y->kind != TOL && expected == (y->kind > TENSOR) && !strcmp(y->name, x->name))
            broken(r, "%s stands twice in this step", x->name);
    }
    if (kind <= TOL) {
        x->value = number(r, x->name);
        if (kind == INT && (x->value != rint(x->value) || fabs(x->value) > INT_MAX)) broken(r, "%s must be an integer, not %g", x->name, x->value);
        for (size_t i = 0; kind != TOL && i < sizeof limits / sizeof *limits; i++) {
            bool layers = !strcmp(limits[i].name, "rho_L"), whole = limits[i].hi > 1;
            if (layers ? strncmp(x->name, "rho_L", 5) : strcmp(x->name, limits[i].name)) continue;
            if (x->value < limits[i].lo || x->value > limits[i].hi || (whole && x->value != rint(x->value)))
                broken(r, "%s %g: allowed are %s from %d to %d", x->name, x->value, whole ? "integers" : "numbers", limits[i].lo, limits[i].hi);
        }
        return;
    }
    x->n_dims = kind == INTS || kind == EXPECT_INTS ? 1 : integer(r, "the number of dimensions", 0, 8);
    for (int d = 0; d < x->n_dims; d++) {
        x->dim[d] = integer(r, "a size", 0, 1 << 30);
        if ((x->n *= x->dim[d]) > (size_t)(r->end - r->at)) broken(r, "%s has %zu values or more, and the file ends before", x->name, x->n);
    }
    if (kind == INTS || kind == EXPECT_INTS) x->i = need(x->n, sizeof *x->i);
    else x->f = need(x->n, sizeof *x->f);
    for (size_t i = 0; i < x->n; i++) {
        if (x->i) { x->i[i] = integer(r, x->name, -INT_MAX, INT_MAX); continue; }
        char *w = must(r, x->name), *end;
        x->f[i] = strtof(w, &end);
        if (end == w || *end || !isfinite(x->f[i])) broken(r, "`%s` is not a number (%s, of %zu values the one at %zu)", w, x->name, x->n, i);
    }
}

// The next case of a file; false at its end.
static bool read_case(Reader *r) {
    Case *c = &r->c;
    *c = (Case){ 0 };
    char *w = word(r);
    if (!w) return false;
    if (strcmp(w, "case")) broken(r, "`%s` where a case should begin", w);
    snprintf(c->name, sizeof c->name, "%s", must(r, "a case's name"));
    int step = -1;
    while (strcmp(w = must(r, "end"), "end")) {
        int kind = 0;
        while (kind < N_KINDS && strcmp(w, kind_names[kind])) kind++;
        if (kind < N_KINDS) read_record(r, kind, step);
        else if (!strcmp(w, "method")) snprintf(c->method, sizeof c->method, "%s", must(r, "a method"));
        else if (!strcmp(w, "step")) c->steps = step = integer(r, "step (they must rise)", step + 1, MOST);
        else broken(r, "unknown record `%s`", w);
    }
    for (int i = 0; i < c->n; i++)
        if (c->record[i].kind == INT && !strcmp(c->record[i].name, "steps") && c->record[i].value != c->steps)
            broken(r, "int steps %g, but the last step is %d", c->record[i].value, c->steps);
    return true;
}
static void case_free(Case *c) {
    for (int i = 0; i < c->n; i++) { free(c->record[i].i); free(c->record[i].f); }
    free(c->record);
    *c = (Case){ 0 };
}

// ----------------------------------------------------------------------------
// asking a case

static bool is_input(int kind) { return kind <= TENSOR; }

__attribute__((format(printf, 4, 5)))
static Record *find(Case *c, bool input, int step, const char *format, ...) {      // of this step, else of the whole case
    char name[64];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    Record *whole = NULL;
    for (int i = 0; i < c->n; i++) {
        Record *x = &c->record[i];
        if (is_input(x->kind) != input || x->kind == TOL || strcmp(x->name, name)) continue;
        if (x->step == step) { x->used = true; return x; }
        if (x->step < 0 && input) whole = x;
        if (x->step < 0 && step == 0) whole = x;
    }
    if (whole) whole->used = true;
    return whole;
}
static Record *typed(Record *x, bool ints) {
    if (x && !(ints ? (void *)x->i : (void *)x->f)) die(NULL, "%s must be a record of %s", x->name, ints ? "ints" : "a tensor");
    return x;
}
static bool has(Case *c, const char *name) { return find(c, true, -1, "%s", name) != NULL; }
static double value(Case *c, const char *name) {
    Record *x = find(c, true, -1, "%s", name);
    if (!x || x->i || x->f) die(NULL, "no `int %s` or `num %s`", name, name);
    return x->value;
}
static int value_or(Case *c, const char *name, int other) { return has(c, name) ? (int)value(c, name) : other; }

static double tolerance(const Case *c, const char *name, int step) {
    double tol = 0;
    for (int i = 0; i < c->n; i++)
        if (c->record[i].kind == TOL && !strcmp(c->record[i].name, name) && c->record[i].step <= step) tol = c->record[i].value;
    return tol;
}

__attribute__((format(printf, 2, 3)))
static void wrong(Case *c, const char *format, ...) {
    va_list args;
    if (c->failed) return;
    c->failed = true;
    printf("  %s: ", c->name);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
}

// Each expectation is compared where it is found; what is left over at the end is unknown.
static void same_ints(Case *c, const Record *want, const int *got, size_t n) {
    if (want->kind != EXPECT_INTS) { wrong(c, "step %d: %s must be expect_ints", want->step, want->name); return; }
    if (want->n != n) wrong(c, "step %d: %s: %zu where %zu are expected", want->step, want->name, n, want->n);
    for (size_t i = 0; i < n && i < want->n; i++)
        if (want->i[i] != got[i]) { wrong(c, "step %d: %s: [%zu] is %d, expected %d", want->step, want->name, i, got[i], want->i[i]); return; }
}
static void same_floats(Case *c, const Record *want, const float *got, size_t n) {
    double tol = tolerance(c, want->name, want->step);
    if (want->kind != EXPECT_TENSOR) { wrong(c, "step %d: %s must be expect_tensor", want->step, want->name); return; }
    if (want->n != n) { wrong(c, "step %d: %s: %zu values where %zu are expected", want->step, want->name, n, want->n); return; }
    for (size_t i = 0; i < n; i++)
        if (tol == 0 ? got[i] != want->f[i] : !(fabs((double)got[i] - want->f[i]) <= tol)) {
            wrong(c, "step %d: %s: [%zu] is %.9g, expected %.9g within %g", want->step, want->name, i, got[i], want->f[i], tol);
            return;
        }
}

// ----------------------------------------------------------------------------
// names

enum { CACHE, FASTV, SIMIGNORE };
static const struct { const char *method, *policy; int family; } methods[] = {
    { "elastic:released", "elastic:released", CACHE },
    { "h2o:released", "h2o:released", CACHE },
    { "streaming:released", "streaming:released", CACHE },
    { "prefixkv", "prefixkv", CACHE },
    { "prefixkv:online", "prefixkv:online", CACHE },
    { "h2o", "h2o:lookm", CACHE },
    { "snapkv", "snapkv:lookm", CACHE },
    { "lookm:evict", "lookm:released:merge=none", CACHE },
    { "lookm:pivot", "lookm:released:merge=pivot", CACHE },
    { "lookm:average:released", "lookm:released:merge=average", CACHE },
    { "lookm:weighted:released", "lookm:released:merge=weighted", CACHE },
    { "pivot", "lookm:released:prior=off,merge=pivot", CACHE },
    { "average", "lookm:released:prior=off,merge=average", CACHE },
    { "weighted", "lookm:released:prior=off,merge=weighted", CACHE },
    { "fastv", "fastv", FASTV },
    { "fastv:mask", "fastv:mask", FASTV },
    { "fastv:lmms", "fastv:lmms", FASTV },
    { "simignore", "simignore", SIMIGNORE },
    { "simignore:7b:released", "simignore:released-7b", SIMIGNORE },
    { "simignore:13b:released", "simignore:released-13b", SIMIGNORE },
    // for own cases: the papers' forms
    { "paper:elastic", "elastic", CACHE },
    { "paper:streaming", "streaming", CACHE },
    { "paper:h2o", "h2o", CACHE },
    { "paper:snapkv", "snapkv", CACHE },
    { "paper:lookm", "lookm", CACHE },
    { "paper:lookm:strict", "lookm:budget=strict", CACHE },
    { "paper:lookm:average", "lookm:merge=average", CACHE },
    { "paper:lookm:weighted", "lookm:merge=weighted", CACHE },
    { "paper:lookm:evict", "lookm:merge=none", CACHE },
};

// The policy of a case, with the case's parameters as its options. Always on: a ratio of 0 must decide nothing all the same.
static Chain chain_of(Case *c, const char *policy, int n_layers) {
    static const struct { const char *record, *option; int family; } names[] = {
        { "start_size", "start", CACHE }, { "distance", "distance", CACHE }, { "hh_ratio", "important", CACHE }, { "recent_ratio", "recent", CACHE },
        { "sinks", "sinks", CACHE }, { "window", "window", CACHE }, { "pool", "pool", CACHE },
        { "k", "k", FASTV }, { "keep", "keep", FASTV }, { "image_start", "start", FASTV }, { "image_len", "length", FASTV },
        { "k_sim", "tokens", SIMIGNORE }, { "i0", "i0", SIMIGNORE }, { "step", "step", SIMIGNORE }, { "k", "k", SIMIGNORE },
        { "fastv_start", "start", SIMIGNORE }, { "fastv_len", "length", SIMIGNORE }, { "keep", "keep", SIMIGNORE } };
    char spec[1024], *at = spec + sprintf(spec, "%s", policy);
    bool options = strchr(policy, '=') != NULL;
    int family = CACHE;
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++) if (!strcmp(methods[i].method, c->method)) family = methods[i].family;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (names[i].family != family || !has(c, names[i].record)) continue;
        if (!strcmp(policy, "simignore") && !strcmp(names[i].record, "i0")) { if (value(c, "i0") != 0) die(NULL, "simignore walks from rank 0"); continue; }
        if (!strcmp(policy, "simignore") && !strcmp(names[i].record, "step")) { if (value(c, "step") != 1) die(NULL, "simignore takes every pair"); continue; }
        if (!strcmp(names[i].option, "length") && value(c, names[i].record) < 1) continue;       // no image: nothing is ranked
        at += sprintf(at, "%c%s=%a", options ? ',' : ':', names[i].option, value(c, names[i].record));
        options = true;
    }
    if (!strcmp(policy, "h2o:released") && has(c, "recent_size"))
        sprintf(at, "%cbuffer=%d", options ? ',' : ':', value_or(c, "start_size", 1) + (int)value(c, "recent_size") + 1);
    if (value_or(c, "protect_size", 1) != 1) die(NULL, "protect_size is 1 in every release");
    Chain chain = policy_parse(spec, 0.5, n_layers);
    if (chain.n != 1) die(NULL, "%s: not one policy", spec);
    if (has(c, "ratio")) chain.part[0].ratio = value(c, "ratio");
    if (find(c, true, -1, "rho_L0")) {
        chain.part[0].conf = need(n_layers, sizeof(double));
        for (int l = 0; l < n_layers; l++) {
            char name[32];
            sprintf(name, "rho_L%d", l);
            chain.part[0].conf[l] = value(c, name);
        }
    }
    return chain;
}

// ----------------------------------------------------------------------------
// the plan, as it was before it was carried out

typedef struct { int n; int *keep, *into; float *score; } Seen;      // of one head
static struct { Case *c; Seen *head; int n_heads; bool prompt; } seen;

static void look(void *ctx, const Runs *r, const Run *q) {
    (void)ctx;
    if (!r->prompt) return;
    for (int i = 0; i < n_heads_of(r); i++) {
        const Head *h = &q->head[i];
        Seen *s = &seen.head[i];
        *s = (Seen){ h->len, need(h->len, sizeof(int)), need(h->len, sizeof(int)), need(h->len, sizeof(float)) };
        for (int j = 0; j < h->len; j++) { s->keep[j] = h->keep[j]; s->into[j] = h->into[j]; s->score[j] = h->score[j]; }
    }
}

// Sources of the merges in one head, ascending, and where they went: positions (Elastic) or slots among what stays (LOOK-M).
static void check_merges(Case *c, const Record *source, const Record *target, const Seen *s, bool slots) {
    int *from = need(s->n, sizeof *from), *to = need(s->n, sizeof *to), n = 0, slot = 0;
    int *slot_of = need(s->n, sizeof *slot_of);
    for (int j = 0; j < s->n; j++) { slot_of[j] = slot; slot += s->keep[j]; }
    for (int j = 0; j < s->n; j++)
        if (s->into[j] >= 0) { from[n] = j; to[n++] = slots ? slot_of[s->into[j]] : s->into[j]; }
    if (source) same_ints(c, source, from, n);
    if (target) same_ints(c, target, to, n);
    free(from); free(to); free(slot_of);
}

// Everything that may be expected of a cache after a step.
static void check_cache(Case *c, Runs *r, int step) {
    Run *q = &r->seq[0];
    int H = r->n_kv_heads, d = r->head_dim;
    size_t all = 0, at = 0;
    for (int i = 0; i < n_heads_of(r); i++) all += q->head[i].len;
    int *pos = need(all, sizeof *pos);
    float *k = need(all * d, sizeof *k), *v = need(all * d, sizeof *v);
    K->kv_read(r->kv, 0, pos, NULL, NULL, k, v);
    const Record *x;
    const LayerMemo *memo = q->mem;
    bool has_memo = r->chain->part[0].policy->mem_layer;
    for (int l = 0; l < r->n_layers; l++) {
        size_t layer = 0;
        const Seen *s = &seen.head[l * H];
        for (int h = 0; h < H; h++) layer += q->head[l * H + h].len;
        for (int h = 0, from = 0; h < H; from += q->head[l * H + h].len, h++) {
            if ((x = find(c, false, step, "kept_L%d", l))) same_ints(c, x, pos + at + from, q->head[l * H + h].len);
            if ((x = find(c, false, step, "kept_L%d_H%d", l, h))) same_ints(c, x, pos + at + from, q->head[l * H + h].len);
            if (step == 0) {
                const Record *a = find(c, false, 0, "source_L%d_H%d", l, h), *b = find(c, false, 0, "target_L%d_H%d", l, h);
                if (a || b) check_merges(c, a, b, &s[h], true);
                a = find(c, false, 0, "sources_L%d", l);
                b = find(c, false, 0, "owners_L%d", l);
                if (a || b) check_merges(c, a, b, &s[h], false);
            }
        }
        if ((x = find(c, false, step, "k_L%d", l))) same_floats(c, x, k + at * d, layer * d);
        if ((x = find(c, false, step, "v_L%d", l))) same_floats(c, x, v + at * d, layer * d);
        if (step == 0 && (x = find(c, false, 0, "score_L%d", l))) {       // (heads, slots that were ranked)
            int n = x->n_dims == 2 && x->dim[0] == H ? x->dim[1] : -1;
            float *score = need((size_t)H * s->n, sizeof *score);
            for (int h = 0; h < H && n >= 0 && n <= s[h].n; h++) memcpy(score + (size_t)h * n, s[h].score, n * sizeof *score);
            same_floats(c, x, score, n < 0 || n > s->n ? 0 : (size_t)H * n);
            free(score);
        }
        at += layer;
    }
    if ((x = find(c, false, step, "score"))) {
        if (r->chain->flags & DECODE_SCORES) same_floats(c, x, q->mem, q->n_prompt > q->head[0].len ? q->n_prompt : q->head[0].len);
        else {                                                            // (layers, prompt), mean over heads
            float *score = need(r->n_layers * (size_t)q->n_prompt, sizeof *score);
            for (int l = 0; l < r->n_layers; l++)
                for (int j = 0; j < seen.head[l * H].n; j++) {
                    double sum = 0;
                    for (int h = 0; h < H; h++) sum += seen.head[l * H + h].score[j];
                    score[(size_t)l * q->n_prompt + j] = (float)(sum / H);
                }
            same_floats(c, x, score, r->n_layers * (size_t)q->n_prompt);
            free(score);
        }
    }
    int *list = need(r->n_layers, sizeof *list), next = next_rot(r, 0);
    if ((x = find(c, false, step, "next_pos"))) same_ints(c, x, &next, 1);
    if (has_memo && (x = find(c, false, step, "fixed_point"))) {
        for (int l = 0; l < r->n_layers; l++) list[l] = memo[l].fixed_point;
        same_ints(c, x, list, x->n == 1 ? 1 : r->n_layers);
    }
    if (has_memo && (x = find(c, false, step, "count"))) {
        for (int l = 0; l < r->n_layers; l++) list[l] = memo[l].count;
        same_ints(c, x, list, r->n_layers);
    }
    if (has_memo && (x = find(c, false, step, "forget"))) {
        for (int l = 0; l < r->n_layers; l++) list[l] = memo[l].forget;
        same_ints(c, x, list, r->n_layers);
    }
    if ((x = find(c, false, step, "budget"))) {
        int budget[2] = { (int)((double)q->n_prompt * value(c, "hh_ratio")), (int)((double)q->n_prompt * value(c, "recent_ratio")) };
        same_ints(c, x, budget, 2);
    }
    if ((x = find(c, false, step, "cache_len"))) {
        for (int l = 0; l < r->n_layers; l++) list[l] = q->head[l * H].len;
        same_ints(c, x, list, r->n_layers);
    }
    if ((x = find(c, false, step, "cache_len_released"))) {               // V-LMMS runs layer k - 1 twice and stores its tokens twice
        for (int l = 0; l < r->n_layers; l++) list[l] = q->head[l * H].len * (1 + (l == (int)value(c, "k") - 1));
        same_ints(c, x, list, r->n_layers);
    }
    free(list); free(pos); free(k); free(v);
}

// The attention of a layer in this step, if the case gives it; checks its shape.
static void take_attention(Case *c, int step, int layer, int n_layers, int n_heads) {
    Record *x = find(c, true, step, "attn_L%d", layer);
    given.att = NULL;
    if (x && (x->step == step || step == 0)) {
        if (x->n_dims != 3 || x->dim[0] != n_heads) die(NULL, "attn_L%d: expected (%d heads, queries, keys)", layer, n_heads);
        given.att = x->f; given.queries = x->dim[1]; given.keys = x->dim[2];
        return;
    }
    x = find(c, true, step, "attn");
    if (!x || x->step > step || (x->step < 0 && step > 0)) return;
    if (x->n_dims != 4 || x->dim[1] != n_heads || (x->dim[0] != n_layers && x->dim[0] != 1)) die(NULL, "attn: expected (%d layers or 1, %d heads, queries, keys)", n_layers, n_heads);
    given.att = x->f + (x->dim[0] == 1 ? 0 : (size_t)layer * x->dim[1] * x->dim[2] * x->dim[3]);
    given.queries = x->dim[2]; given.keys = x->dim[3];
}

static void check_sizes(int layers, int heads, int kv_heads, int head_dim, int ctx) {
    if (heads % kv_heads) die(NULL, "%d heads do not share %d kv_heads evenly", heads, kv_heads);
    if (head_dim < 1 || 1.0 * (heads + 2 * kv_heads) * (layers + 1) * head_dim * ctx > 1 << 29)
        die(NULL, "impossible sizes: %d layers, %d heads, head_dim %d, %d tokens", layers, heads, head_dim, ctx);
}

// ----------------------------------------------------------------------------
// cases that give keys, values and attention: what stays in the cache, step by step

static void mark_images(Case *c, uint8_t *kind, int prompt) {
    Record *starts = typed(find(c, true, -1, "image_starts"), true);
    int len = value_or(c, "image_len", 0);
    memset(kind, TEXT, prompt);
    for (size_t i = 0; starts && i < starts->n; i++) {
        if (starts->i[i] < 0) die(NULL, "image_starts: %d", starts->i[i]);
        for (int j = starts->i[i]; j < prompt && j - starts->i[i] < len; j++) kind[j] = IMAGE;
    }
    if (!starts && has(c, "image_start"))
        for (int j = 0; j < len; j++) if ((int)value(c, "image_start") + j < prompt) kind[(int)value(c, "image_start") + j] = IMAGE;
}

static void replay_cache(Case *c, const char *policy) {
    int L = value(c, "layers"), n_heads = value(c, "heads"), H = value_or(c, "kv_heads", n_heads), prompt = value(c, "prompt");
    int steps = c->steps, ctx = prompt + steps + 1;
    Record *first = find(c, true, 0, "k");
    int d = first && first->n_dims == 4 ? first->dim[3] : value_or(c, "head_dim", 2), width = (n_heads + 2 * H) * d;
    check_sizes(L, n_heads, H, d, ctx);
    Chain chain = chain_of(c, policy, L);
    given_start(L, n_heads, H, ctx);
    Runs *r = runs_new(&chain, L, n_heads, H, d, 1, 1, ctx, F32, chain.flags & SLOT_POS, 0, NULL, (Mat){ 0 });
    seen.head = need(n_heads_of(r), sizeof *seen.head);
    r->watch = look;
    float *qkv = need((size_t)prompt * width, sizeof *qkv), x = 0;
    int *id = need(prompt, sizeof *id);
    uint8_t *kind = need(prompt, 1);
    mark_images(c, kind, prompt);
    for (int step = 0; step <= steps; step++) {
        int T = step ? 1 : prompt;
        if (step) pass_tokens(r, NULL, id, 1); else pass_prompt(r, 0, id, kind, T);
        Record *k = typed(find(c, true, step, "k"), false), *v = typed(find(c, true, step, "v"), false);
        if (!k || !v || (step && (k->step != step || v->step != step))) k = v = NULL;
        if (k && (k->n_dims != 4 || k->dim[0] != L || k->dim[1] != H || k->dim[2] != T || k->dim[3] != d || k->n != v->n))
            die(NULL, "step %d: k and v must be (%d, %d, %d, %d)", step, L, H, T, d);
        for (int l = 0; l < L; l++) {
            admit(r, l, &x);
            for (int t = 0; t < T; t++)
                for (int h = 0; h < H; h++)
                    for (int i = 0; i < d; i++) {
                        size_t at = (((size_t)l * H + h) * T + t) * d + i;
                        qkv[(size_t)t * width + (n_heads + h) * d + i] = k ? k->f[at] : 0;
                        qkv[(size_t)t * width + (n_heads + H + h) * d + i] = v ? v->f[at] : 0;
                    }
            K->kv_append(r->kv, l, qkv, &r->rows, n_heads);
            take_attention(c, step, l, L, n_heads);
            if (!given.att && (token_votes(r) || (r->prompt && evictor(&chain)->policy->voters))) die(NULL, "step %d: the method reads attention, and there is none", step);
            if (token_votes(r)) given_token_votes(r, l);
            vote(r, l, qkv, NULL);
        }
        compress(r, step ? -1 : steps);
        check_cache(c, r, step);
    }
}

// ----------------------------------------------------------------------------
// FastV and Simignore without a decoder: rows go through admit alone

// What entered the last layer, and what it may see.
static void check_rows(Case *c, Runs *r, int step) {
    const Record *x;
    if ((x = find(c, false, step, "kept"))) same_ints(c, x, r->h_pos, r->rows.T);
    if ((x = find(c, false, step, "positions"))) same_ints(c, x, r->h_rot, r->rows.T);
}
static void check_visible(Case *c, Runs *r, int step) {
    const Record *x = find(c, false, step, "visible");
    if (!x) return;
    int *list = need(r->seq[0].n_seen, sizeof *list), n = 0;
    for (int t = 0; t < r->seq[0].n_seen; t++) if (r->visible[0][t]) list[n++] = t;
    same_ints(c, x, list, n);
    free(list);
}

static void replay_fastv(Case *c, const char *policy) {
    int L = value(c, "layers"), n_heads = value(c, "heads"), H = value_or(c, "kv_heads", n_heads), prompt = value(c, "prompt"), d = 2;
    int steps = c->steps, ctx = prompt + steps + 1, k = value(c, "k");
    check_sizes(L, n_heads, H, d, ctx);
    if (k >= L) die(NULL, "k = %d of %d layers", k, L);
    Chain chain = chain_of(c, policy, L);
    given_start(L, n_heads, H, ctx);
    Runs *r = runs_new(&chain, L, n_heads, H, d, 1, 1, ctx, F32, chain.flags & SLOT_POS, 0, NULL, (Mat){ 0 });
    seen.head = need(n_heads_of(r), sizeof *seen.head);
    float *qkv = need((size_t)prompt * (n_heads + 2 * H) * d, sizeof *qkv), *lse = need((size_t)prompt * n_heads, sizeof *lse), *rows = need(prompt, sizeof *rows);
    r->tmp = need(prompt, sizeof *r->tmp);
    int *id = need(prompt, sizeof *id);
    uint8_t *kind = need(prompt, 1);
    mark_images(c, kind, prompt);
    for (int step = 0; step <= steps; step++) {
        if (step) pass_tokens(r, NULL, id, 1); else pass_prompt(r, 0, id, kind, prompt);
        for (int l = 0; l < L; l++) {
            take_attention(c, step, k - 1, L, n_heads);
            if (l == k && !given.att && (!step || chain.flags & DECODE_ADMIT)) die(NULL, "step %d: no attention", step);
            admit(r, l, rows);
            K->kv_append(r->kv, l, qkv, &r->rows, n_heads);
            vote(r, l, qkv, lse);
        }
        check_rows(c, r, step);
        check_visible(c, r, step);
        compress(r, step ? -1 : steps);
        check_cache(c, r, step);
    }
}

// kept_image: which image rows the first stage left
static void check_images(Case *c, Runs *r, int image_start, int image_len) {
    const Record *x = find(c, false, 0, "kept_image");
    if (!x) return;
    bool ignores = r->chain->part[0].policy->mem_token;                   // hidden, not dropped
    const uint8_t *ignored = r->seq[0].mem;
    int *list = need(image_len, sizeof *list), n = 0;
    for (int i = 0; i < image_len; i++) {
        bool stays = ignores && !ignored[image_start + i];
        for (int t = 0; t < r->rows.T && !ignores; t++) stays |= r->h_pos[t] == image_start + i;
        if (stays) list[n++] = i;
    }
    same_ints(c, x, list, n);
    free(list);
}

static void check_stream(Case *c, bool block) {
    const Record *x, *p[4], *o = typed(find(c, true, -1, "o"), true);
    for (int i = 0; i < 4; i++) p[i] = typed(find(c, true, -1, "p%d", i), true);
    if ((x = find(c, false, 0, "stream"))) {
        int *list, n = 0, all = 2;
        for (int i = 0; i < 4; i++) { if (!p[i]) die(NULL, "no p%d", i); all += (int)p[i]->n; }
        list = need(all, sizeof *list);
        list[n++] = 1;                                                    // BOS
        for (int i = 0; i < 4; i++) {
            for (size_t j = 0; j < p[i]->n; j++) list[n++] = p[i]->i[j];
            if (i == 0) list[n++] = -200;                                 // the image
        }
        same_ints(c, x, list, n);
        free(list);
    }
    if ((x = find(c, false, 0, "text_set"))) {
        const Record *from = block ? p[2] : o;
        if (!from) die(NULL, "no ids for the text set");
        int *list = need(from->n + 1, sizeof *list), n = 0;
        if (!block) list[n++] = 1;
        for (size_t j = 0; j < from->n; j++) list[n++] = from->i[j];
        same_ints(c, x, list, n);
        free(list);
    }
}

// A matrix of a case as the back-end wants it: rows padded to 64 bytes. Several: stacked.
static Mat matrix(Case *c, int n, int layer, const char *const *name, int rows[], int cols) {
    int all = 0, at = 0;
    for (int i = 0; i < n; i++) all += rows[i];
    size_t stride = row_bytes(F32, cols) / sizeof(float);
    float *data = aligned_alloc(64, (all ? all : 1) * stride * sizeof *data);
    memset(data, 0, all * stride * sizeof *data);
    for (int i = 0; i < n; i++) {
        Record *x = layer < 0 ? find(c, true, -1, "%s", name[i]) : find(c, true, -1, "%s_L%d", name[i], layer);
        if (!x || !x->f || x->n != (size_t)rows[i] * cols) die(NULL, "tensor %s of layer %d: missing, or not (%d, %d)", name[i], layer, rows[i], cols);
        for (int o = 0; o < rows[i]; o++, at++) memcpy(data + at * stride, x->f + (size_t)o * cols, cols * sizeof *data);
    }
    return K->weight(F32, all, cols, data, NULL);
}

// The text set as a token table of its own: ids 0 … C-1.
static void set_text(Case *c, Runs *r, int dim) {
    Record *text = find(c, true, -1, "text");
    if (!text || text->n_dims != 2 || text->dim[1] != dim) die(NULL, "tensor text: missing, or not (C, %d)", dim);
    r->n_text = text->dim[0];
    r->text_id = need(r->n_text, sizeof *r->text_id);
    for (int i = 0; i < r->n_text; i++) r->text_id[i] = i;
    r->embed = matrix(c, 1, -1, (const char *[]){ "text" }, (int[]){ r->n_text }, dim);
}

static void replay_simignore(Case *c, const char *policy) {
    Record *image = find(c, true, -1, "image");
    if (!image || image->n_dims != 2) die(NULL, "tensor image: missing, or not (image_len, dim)");
    int L = value_or(c, "layers", value_or(c, "k", 5) + 1), n = image->dim[0], dim = image->dim[1], start = value_or(c, "image_start", 0);
    int prompt = value_or(c, "prompt", start + n + 1), n_heads = value_or(c, "heads", 1), k = value_or(c, "k", 5), width = 3 * n_heads * 2;
    if (prompt < start + n) die(NULL, "the image does not fit into the prompt");
    if (n < 1 || dim < 1) die(NULL, "tensor image: no rows");
    check_sizes(L, n_heads, n_heads, 2, prompt);
    Chain chain = chain_of(c, policy, L);
    given_start(L, n_heads, n_heads, prompt);
    Runs *r = runs_new(&chain, L, n_heads, n_heads, 2, dim, 1, prompt, F32, false, 0, NULL, (Mat){ 0 });
    set_text(c, r, dim);
    float *x = need((size_t)prompt * dim, sizeof *x), *qkv = need((size_t)prompt * width, sizeof *qkv), *lse = need((size_t)prompt * n_heads, sizeof *lse);
    memcpy(x + (size_t)start * dim, image->f, image->n * sizeof *x);
    r->tmp = need((size_t)prompt * dim, sizeof *r->tmp);
    int *id = need(prompt, sizeof *id);
    uint8_t *kind = need(prompt, 1);
    for (int t = 0; t < prompt; t++) kind[t] = t >= start && t < start + n ? IMAGE : TEMPLATE;
    pass_prompt(r, 0, id, kind, prompt);
    for (int l = 0; l < L; l++) {
        admit(r, l, x);
        if (l == 0) check_images(c, r, start, n);
        take_attention(c, 0, k - 1, L, n_heads);
        if (!given.att) break;                                            // the choice of image rows is all there is
        if (l == 0) check_visible(c, r, 0);
        K->kv_append(r->kv, l, qkv, &r->rows, n_heads);
        vote(r, l, qkv, lse);
    }
    if (given.att) check_rows(c, r, 0);
    check_stream(c, !strcmp(policy, "simignore:released-13b"));
}

// ----------------------------------------------------------------------------
// cases that carry a decoder: llava.c's, on weights in memory

static Model *model_of(Case *c) {
    Model *m = need(1, sizeof *m);
    Config *k = &m->config;
    int heads = value(c, "heads");
    *k = (Config){ .dim = value(c, "dim"), .hidden_dim = value(c, "hidden_dim"), .n_layers = value(c, "layers"), .n_heads = heads,
                   .n_kv_heads = value_or(c, "kv_heads", heads), .head_dim = value(c, "head_dim"), .vocab_size = value(c, "vocab"),
                   .norm_eps = (float)value(c, "norm_eps"), .rope_theta = (float)value(c, "rope_theta") };
    check_sizes(k->n_layers, k->n_heads, k->n_kv_heads, k->head_dim, (int)value(c, "prompt") + c->steps + 1);
    if (k->head_dim % 2) die(NULL, "int head_dim %d: the rotary embedding turns pairs", k->head_dim);
    int q = k->n_heads * k->head_dim, kv = k->n_kv_heads * k->head_dim;
    m->layers = need(k->n_layers, sizeof *m->layers);
    m->head = matrix(c, 1, -1, (const char *[]){ "head" }, (int[]){ k->vocab_size }, k->dim);
    m->tok_emb = find(c, true, -1, "embed") ? matrix(c, 1, -1, (const char *[]){ "embed" }, (int[]){ k->vocab_size }, k->dim) : m->head;
    m->norm = matrix(c, 1, -1, (const char *[]){ "norm" }, (int[]){ 1 }, k->dim).data;
    for (int l = 0; l < k->n_layers; l++)
        m->layers[l] = (Layer){
            .wqkv = matrix(c, 3, l, (const char *[]){ "wq", "wk", "wv" }, (int[]){ q, kv, kv }, k->dim),
            .wo = matrix(c, 1, l, (const char *[]){ "wo" }, (int[]){ k->dim }, q),
            .w13 = matrix(c, 2, l, (const char *[]){ "w1", "w3" }, (int[]){ k->hidden_dim, k->hidden_dim }, k->dim),
            .w2 = matrix(c, 1, l, (const char *[]){ "w2" }, (int[]){ k->dim }, k->hidden_dim),
            .att_norm = matrix(c, 1, l, (const char *[]){ "att_norm" }, (int[]){ 1 }, k->dim).data,
            .ffn_norm = matrix(c, 1, l, (const char *[]){ "ffn_norm" }, (int[]){ 1 }, k->dim).data };
    return m;
}

// Reads the prompt's rows and then the case's tokens, with a policy or without (`logits_full`).
static void replay_decoder(Case *c, const char *policy, int family, bool full) {
    K = &cpu;
    Model *m = model_of(c);
    const Config *k = &m->config;
    int prompt = value(c, "prompt"), steps = c->steps, ctx = prompt + steps + 1;
    int image_start = value_or(c, "image_start", 0), image_len = value_or(c, "image_len", 0);
    Record *x = typed(find(c, true, -1, "x"), false), *tokens = typed(find(c, true, -1, "tokens"), true), *want;
    if (prompt < image_start + image_len) die(NULL, "the image does not fit into the prompt");
    for (size_t i = 0; tokens && i < tokens->n; i++)
        if (tokens->i[i] < 0 || tokens->i[i] >= k->vocab_size) die(NULL, "tokens: %d of a vocabulary of %d", tokens->i[i], k->vocab_size);
    if (!x || x->n != (size_t)prompt * k->dim) die(NULL, "tensor x: missing, or not (%d, %d)", prompt, k->dim);
    if (steps && (!tokens || tokens->n < (size_t)steps)) die(NULL, "fewer tokens than steps");
    Chain chain = full ? policy_parse("full", NAN, k->n_layers) : chain_of(c, policy, k->n_layers);
    room(m, prompt, 1, ctx);
    Runs *r = runs_new(&chain, k->n_layers, k->n_heads, k->n_kv_heads, k->head_dim, k->dim, 1, ctx, F32, chain.flags & SLOT_POS, 0, m->cos_sin, m->tok_emb);
    seen.head = need(n_heads_of(r), sizeof *seen.head);
    if (family == SIMIGNORE) set_text(c, r, k->dim);
    int *id = need(prompt, sizeof *id);
    uint8_t *kind = need(prompt, 1);
    float *logits = need(k->vocab_size, sizeof *logits);
    mark_images(c, kind, prompt);
    for (int t = 0; t < prompt; t++) id[t] = -1;
    for (int step = 0; step <= steps; step++) {
        if (step) {
            pass_tokens(r, NULL, &tokens->i[step - 1], 1);
            K->embed(m->s.x, m->tok_emb, r->rows.id, 1);
        } else {
            pass_prompt(r, 0, id, kind, prompt);
            K->put(m->s.x, x->f, x->n * sizeof(float));
        }
        decoder(m, r, NULL, 1);
        K->get(logits, m->s.logits, k->vocab_size * sizeof *logits);
        if (!full && step == 0 && family == SIMIGNORE) check_images(c, r, image_start, image_len);
        if (!full) { check_rows(c, r, step); if (family == FASTV) check_visible(c, r, step); }
        compress(r, step ? -1 : steps);
        if (!full) check_cache(c, r, step);
        if ((want = find(c, false, step, full ? "logits_full" : "logits"))) same_floats(c, want, logits, k->vocab_size);
    }
}

// ----------------------------------------------------------------------------

static bool replay_case(Case *c) {
    size_t i = 0;
    while (i < sizeof methods / sizeof *methods && strcmp(methods[i].method, c->method)) i++;
    if (i == sizeof methods / sizeof *methods) { wrong(c, "unknown method `%s`", c->method); return false; }
    const char *policy = methods[i].policy;
    bool decodes = find(c, true, -1, "wq_L0") != NULL, full = false;
    if (decodes) {
        for (int j = 0; j < c->n; j++) full |= !strcmp(c->record[j].name, "logits_full");
        replay_decoder(c, policy, methods[i].family, false);
        if (full) replay_decoder(c, policy, methods[i].family, true);
        if (methods[i].family == SIMIGNORE) check_stream(c, !strcmp(policy, "simignore:released-13b"));
    } else if (methods[i].family == CACHE) replay_cache(c, policy);
    else if (methods[i].family == FASTV) replay_fastv(c, policy);
    else replay_simignore(c, policy);
    for (int j = 0; j < c->n; j++)
        if (!is_input(c->record[j].kind) && !c->record[j].used && strncmp(c->record[j].name, "order_", 6))
            wrong(c, "step %d: do not know what %s %s is", c->record[j].step, kind_names[c->record[j].kind], c->record[j].name);
    return !c->failed;
}

static char *read_all(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    char *text = NULL;
    size_t n = 0, room = 0, got = 1;
    while (f && got) {
        if (n + 1 >= room && !(text = realloc(text, room = 2 * room + (1 << 16)))) die(NULL, "%s: out of memory", path);
        n += got = fread(text + n, 1, room - n - 1, f);
    }
    if (!f || ferror(f)) {
        fprintf(stderr, "error: %s: %s\n", path, strerror(errno));
        if (f) fclose(f);
        free(text);
        return NULL;
    }
    fclose(f);
    text[*size = n] = 0;
    return text;
}

static void replay_file(const char *path) {
    static Reader r;
    size_t size;
    r = (Reader){ .path = path, .next_line = 1, .text = read_all(path, &size) };
    if (!r.text) { n_failed++; return; }
    r.at = r.text;
    r.end = r.text + size;
    if (setjmp(r.broken)) {
        n_failed++;
        printf("FAILED %s: %s (%s)\n", path, *r.c.name ? r.c.name : "between cases", "not read to its end");
    } else {
        if (strlen(r.text) != size) { r.line = 0; broken(&r, "holds a zero byte: not a text file"); }
        int n = 0;
        for (; read_case(&r); n++) {
            fflush(stdout);
            pid_t child = fork();
            if (child == 0) {
                bool ok = replay_case(&r.c);
                fflush(stdout);
                _exit(!ok);
            }
            int status = 1;
            if (child < 0 || waitpid(child, &status, 0) < 0) die(NULL, "fork: %s", strerror(errno));
            if (status == 0) n_passed++; else n_failed++;
            printf("%s %s: %s (%s)\n", status == 0 ? "PASSED" : "FAILED", path, r.c.name, r.c.method);
            case_free(&r.c);
        }
        if (!n) broken(&r, "holds no case");
    }
    case_free(&r.c);
    free(r.text);
}

int main(int argc, char **argv) {
    if (argc < 2) die(NULL, "usage: tests/replay FILE…");
    quiet = true;
    for (int i = 1; i < argc; i++) replay_file(argv[i]);
    return finish();
}
