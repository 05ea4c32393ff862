// policies.c: every published way to shrink the KV cache of a vision-language model, one page each.
//
// A page holds the method and nothing else: from scores it writes a plan (policies.h): which slots stay, where the content of
// the others goes, which rows go on. run.h carries the plan out. Nothing here knows a model or a back-end.
// First the verbs that the pages share, then the pages, then the table `policies`, then the words of the command line.
// A method of your own: a function among the pages, a row in the table. `make test` runs tests/test_policies.c, which tries
// every row of the table on thousands of random caches.
//
// Throughout: ratio is the fraction DROPPED; L, n, N are counts of slots; budgets are computed in double, in the order written
// (compiled with -ffp-contract=off: a fused multiply-add loses a slot at some lengths). Where a paper and its authors' code
// differ, NAME is the paper's method and NAME:released what the code decides.

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "error.h"
#include "policies.h"

// ----------------------------------------------------------------------------
// the options of the policy whose turn it is

static int option_at(const char *options, const char *name) {      // its place in Policy.options, or -1
    size_t len = strlen(name);
    for (int i = 0; *options; i++) {
        size_t n = strcspn(options, ","), word = strcspn(options, ",=");
        if (word == len && !memcmp(options, name, len)) return i;
        options += n + (options[n] == ',');
    }
    return -1;
}
static double opt(const Run *r, const char *name) {                 // NaN: neither given nor a default
    const Part *p = r->opts;
    int i = option_at(p->policy->options, name);
    return i < 0 ? NAN : p->opt[i];
}
static bool given(const Run *r, const char *name) { return !isnan(opt(r, name)); }
static bool chosen(const Run *r, const char *name, const char *word) {   // an option that is one of several words
    const Part *p = r->opts;
    int i = option_at(p->policy->options, name);
    return i >= 0 && p->text[i] && !strcmp(p->text[i], word);
}
static bool released(const Run *r) { return ((const Part *)r->opts)->policy->flags & RELEASED; }

static Head *head(const Run *r, int layer, int h) { return &r->head[layer * r->n_kv_heads + h]; }
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }

// Rows of the first prompt that reached this layer: what budgets that stay fixed while decoding are fractions of.
static int prompt_rows(const Run *r, const Head *c) { return c->seen - r->step; }

// How many slots are over the budget of (1 - ratio) of all that the layer has seen. The product is rounded before the
// subtraction, as in the released code of Elastic Cache and PrefixKV: at L = 10, ratio = 0.2 this is 2, fused it would be 1.
static int over_budget(int len, int seen, double ratio) { return (int)((double)len - (double)seen * (1.0 - ratio)); }

// The budget of H2O, LOOK-M and its baselines has two parts, "important" and "recent": each a fraction of the layer's prompt,
// by default half of what stays.
static int part(const Run *r, const Head *c, const char *name) {
    double fraction = given(r, name) ? opt(r, name) : (1.0 - r->ratio) / 2;
    return (int)((double)prompt_rows(r, c) * fraction);
}

// ----------------------------------------------------------------------------
// verbs: what the pages are written in

// One score list for the layer: head 0's becomes the mean over the heads.
static const float *mean_over_heads(Run *r, int layer) {
    Head *c = head(r, layer, 0);
    for (int h = 1; h < r->n_kv_heads; h++)
        for (int j = 0; j < c->len; j++) c->score[j] += head(r, layer, h)->score[j];
    for (int j = 0; j < c->len; j++) c->score[j] /= r->n_kv_heads;
    return c->score;
}

// Head 0's plan is the layer's.
static void same_for_heads(Run *r, int layer) {
    Head *a = head(r, layer, 0);
    for (int h = 1; h < r->n_kv_heads; h++) {
        Head *b = head(r, layer, h);
        memcpy(b->keep, a->keep, a->len * sizeof *a->keep);
        if (a->into) {
            memcpy(b->into, a->into, a->len * sizeof *a->into);
            memcpy(b->w, a->w, a->len * sizeof *a->w);
        }
        if (a->score) memcpy(b->score, a->score, a->len * sizeof *a->score);
    }
}

// Smooths scores, so that neighbours survive together: the mean over `width` slots, zeros beyond the ends, always / width.
static void pool(float *score, int n, int width) {
    float *raw = need(n, sizeof *raw);
    memcpy(raw, score, n * sizeof *raw);
    for (int j = 0; j < n; j++) {
        float sum = 0;
        for (int u = max(0, j - width / 2); u <= min(n - 1, j + width / 2); u++) sum += raw[u];
        score[j] = sum / width;
    }
    free(raw);
}

// Slots lo … hi-1 leave, whatever they score.
static void drop_range(bool *keep, int lo, int hi) {
    for (int j = lo; j < hi; j++) keep[j] = false;
}

// One slot leaves every head of a layer; past the end: none.
static void drop_slot(Run *r, int layer, int slot) {
    for (int h = 0; h < r->n_kv_heads; h++)
        if (slot < head(r, layer, h)->len) head(r, layer, h)->keep[slot] = false;
}

// The n-th largest of x[0 … len-1], 1 <= n <= len; reorders x. Quickselect (Hoare, CACM 1961, Algorithm 65) with partitions that
// do not branch: which way a score goes is a coin's toss, and a wrong guess costs more than two swaps.
static float nth_largest(float *x, int len, int n) {
    for (;;) {
        float pivot = x[len / 2];
        int above = 0, equal;
        for (int i = 0; i < len; i++) { float t = x[i]; x[i] = x[above]; x[above] = t; above += t > pivot; }
        if (n <= above) { len = above; continue; }
        equal = above;
        for (int i = above; i < len; i++) { float t = x[i]; x[i] = x[equal]; x[equal] = t; equal += t == pivot; }
        if (n <= equal || !equal) return pivot;      // !equal: the pivot is no number
        n -= equal;
        x += equal;
        len -= equal;
    }
}

// Of the slots in [lo, hi) that are `among` the candidates (NULL: all are), the n best stay; ties to the earlier slot.
// The others of [lo, hi) are left as they are.
static void keep_top_among(bool *keep, const bool *among, const float *score, int lo, int hi, int n) {
    if (hi <= lo) return;
    float *x = need(hi - lo, sizeof *x), cut = INFINITY;
    int len = 0, ties = 0;
    for (int j = lo; j < hi; j++)
        if (!among || among[j]) x[len++] = score[j];
    if (n < len) {
        if (n > 0) {
            cut = nth_largest(x, len, n);
            ties = n;
            for (int i = 0; i < len; i++) ties -= x[i] > cut;
        }
        for (int j = lo; j < hi; j++)
            if ((!among || among[j]) && !(score[j] > cut) && !(score[j] == cut && ties-- > 0)) keep[j] = false;
    }
    free(x);
}
static void keep_top(bool *keep, const float *score, int lo, int hi, int n) { keep_top_among(keep, NULL, score, lo, hi, n); }

// Of the slots in [lo, hi) the n lowest leave; ties: the earlier leaves, as a stable sort has it.
static void drop_bottom(bool *keep, const float *score, int lo, int hi, int n) {
    if (n <= 0 || hi <= lo) return;
    if (n >= hi - lo) { drop_range(keep, lo, hi); return; }
    float *x = need(hi - lo, sizeof *x);
    for (int j = lo; j < hi; j++) x[j - lo] = -score[j];
    float cut = nth_largest(x, hi - lo, n);
    int ties = n;
    for (int j = lo; j < hi; j++) ties -= -score[j] > cut;
    for (int j = lo; j < hi; j++)
        if (-score[j] > cut || (-score[j] == cut && ties-- > 0)) keep[j] = false;
    free(x);
}

// g[k] = index of the k-th smallest of score[0 … n-1]; equal ones keep their order. To be freed.
typedef struct { float score; int at; } Ranked;
static int by_score(const void *a, const void *b) {
    const Ranked *x = a, *y = b;
    return x->score < y->score ? -1 : x->score > y->score ? 1 : x->at - y->at;
}
static int *argsort(const float *score, int n) {
    Ranked *x = need(n, sizeof *x);
    int *g = need(n, sizeof *g);
    for (int j = 0; j < n; j++) x[j] = (Ranked){ score[j], j };
    qsort(x, n, sizeof *x, by_score);
    for (int k = 0; k < n; k++) g[k] = x[k].at;
    free(x);
    return g;
}

// near[s] = the slot a with anchor[a] that is nearest to s, ties to the lower one; -1: there is none.
static void nearest_slot(int *near, const bool *anchor, int len) {
    int left = -1, right = -1;
    for (int s = 0; s < len; s++) near[s] = left = anchor[s] ? s : left;
    for (int s = len - 1; s >= 0; s--) {
        if (anchor[s]) right = s;
        if (right >= 0 && (near[s] < 0 || right - s < s - near[s])) near[s] = right;
    }
}

// How many of a layer's best slots it takes until their share of all attention reaches x; len + 1 if never.
// cdf: (len,) running sum of the normalised scores, largest first.
static int prefix_length(const float *cdf, int len, float x) {
    int lo = 0, hi = len;                    // the first index with cdf >= x
    while (lo < hi) {
        int mid = lo + (hi - lo) / 2;
        if (cdf[mid] >= x) hi = mid; else lo = mid + 1;
    }
    return lo + 1;
}

// How many places beyond its `len` slots a cache needs for the tokens to come, when one slot leaves wherever it is over budget and
// there is a slot p.
static int growth(const Run *r, int len, int seen, double ratio, int p) {
    int n = len, most = len;
    for (int t = 1; t <= r->room; t++) {
        most = max(most, ++n);
        n -= p < n && over_budget(n, seen + t, ratio) >= 1;
    }
    return most - len;
}
static int slots_kept(const Head *c) {
    int n = 0;
    for (int j = 0; j < c->len; j++) n += c->keep[j];
    return n;
}

// admit: which of the rows that are about to enter are image rows (of what other policies have left). The last row of the
// prompt must go on, so it is no candidate: where it is an image row, the budget of those that stay is one less.
static int image_rows(const Run *r, bool *among, int *taken) {
    int n = 0;
    *taken = 0;
    for (int i = 0; i < r->n_rows; i++) {
        bool image = r->kind[r->row[i]] == IMAGE && r->row_keep[i];
        n += image;
        among[i] = image && i < r->n_rows - 1;
        *taken += image && i == r->n_rows - 1;
    }
    return n;
}

// voters: every query of the prompt
static int all_queries(const Run *r, int layer) { (void)layer; return r->n_rows; }

void votes(Run *r, int layer, int n, float *out) { r->verbs->votes(r, layer, n, out); }
void text_cosine(Run *r, float *out) { r->verbs->text_cosine(r, out); }
void nearest_key(Run *r, int layer) { r->verbs->nearest_key(r, layer); }
void drop_lowest(Run *r, int lo, const int *from_end) { r->verbs->drop_lowest(r, lo, from_end); }

// ----------------------------------------------------------------------------
// random, stride: the controls that published tables should have had
//
//     stays = rint(n * (1 - ratio)) of n image slots; with what=all, L - trunc(L - L * (1 - ratio)) of all L slots
//
// The same slots in all layers and heads: `random` gives every token a lot that depends on the run's seed and the token alone
// (so a smaller budget keeps a subset of a larger one), `stride` spreads what stays evenly. `:rows` prunes image rows before
// layer 0, as FastV would if it ranked by nothing. With -B all answers go on from one prompt and so from one draw, by -s.
// Safe: with what=image all that is no image; a prompt's last row.

static float lot(uint64_t seed, int token) {     // in [0, 1) (splitmix64: Steele et al. 2014)
    uint64_t z = seed + (uint64_t)(token + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (float)((z ^ (z >> 31)) >> 40) / 16777216.0f;
}

// Of n candidates m stay: the i-th where the running count of i * m / n steps up.
static void keep_stride(bool *keep, const bool *among, int len, int n, int m) {
    for (int j = 0, i = 0; j < len; j++) {
        if (!among[j]) continue;
        keep[j] = (int64_t)(i + 1) * m / n > (int64_t)i * m / n;
        i++;
    }
}

static void control(Run *r, bool strided) {
    bool all = chosen(r, "what", "all");
    #pragma omp parallel for
    for (int l = 0; l < r->n_layers; l++) {
        Head *c = head(r, l, 0);
        bool *among = need(c->len, sizeof *among);
        int n = 0;
        for (int j = 0; j < c->len; j++) {
            n += among[j] = all || r->kind[c->pos[j]] == IMAGE;
            if (!strided) c->score[j] = lot(r->seed, c->pos[j]);
        }
        int m = all ? n - over_budget(n, n, r->ratio) : (int)rint(n * (1.0 - r->ratio));
        if (strided) keep_stride(c->keep, among, c->len, n, m);
        else keep_top_among(c->keep, among, c->score, 0, c->len, m);
        same_for_heads(r, l);
        free(among);
    }
}
static void random_slots(Run *r) { control(r, false); }
static void stride_slots(Run *r) { control(r, true); }

static void control_rows(Run *r, int layer, bool strided) {
    if (layer) return;
    bool *among = need(r->n_rows, sizeof *among);
    float *score = need(r->n_rows, sizeof *score);
    int taken, n = image_rows(r, among, &taken), m = max(0, (int)rint(n * (1.0 - r->ratio)) - taken);
    for (int i = 0; i < r->n_rows; i++) score[i] = lot(r->seed, r->row[i]);
    if (strided) keep_stride(r->row_keep, among, r->n_rows, n - taken, m);
    else keep_top_among(r->row_keep, among, score, 0, r->n_rows, m);
    free(among);
    free(score);
}
static void random_rows(Run *r, int layer) { control_rows(r, layer, false); }
static void stride_rows(Run *r, int layer) { control_rows(r, layer, true); }

// ----------------------------------------------------------------------------
// StreamingLLM: the first tokens, which soak up attention, and the latest; nobody votes
//
//     keep = first `sinks`  +  last B - sinks        B = L - trunc(L - L * (1 - ratio)), L the prompt's length
//
// Paper: Xiao et al. 2023, arXiv:2309.17453. The cache keeps the size B: while decoding, the oldest slot behind
// the sinks leaves at every token. Positions are those within the cache, so kept keys are turned to their slot (renumber)
// and the next token stands at the slot count (--pos slot by default; with --pos true nothing is turned).
// Safe: the sinks. With B <= sinks they are all that stays.
//
// :released is Elastic Cache's LocalCache (github.com/liuzuyan/ElasticCache, kv_cache.py), the "StreamingLLM" row of its
// tables: keys keep their rotation while the next token stands at the slot count, one `start` token by default, and the cache
// grows with the answer:
//
//     f = trunc(n - N * (1 - ratio));   keep = first `start`  +  all from start + f on        n slots now, N rows seen

static void streaming(Run *r) {
    int sinks = opt(r, "sinks"), room = 0;
    for (int i = 0; i < r->n_layers * r->n_kv_heads; i++) {
        Head *c = &r->head[i];
        int L = prompt_rows(r, c), B = L - over_budget(L, L, r->ratio);
        drop_range(c->keep, sinks, c->len - max(0, B - sinks));
        room = max(room, 1 + max(0, max(sinks, B) - c->len));
    }
    r->renumber = true;
    r->room = min(r->room, room);
}

static void streaming_released(Run *r) {
    int start = opt(r, "start"), room = 0;
    for (int i = 0; i < r->n_layers * r->n_kv_heads; i++) {
        Head *c = &r->head[i];
        drop_range(c->keep, start, min(c->len, start + over_budget(c->len, c->seen, r->ratio)));
        if (!r->step) room = max(room, growth(r, slots_kept(c), c->seen, r->ratio, start));
    }
    r->room = min(r->room, room);
}

// ----------------------------------------------------------------------------
// H2O: the recent half of the budget, and the heavy hitters of the rest
//
//     score[j] = sum_t att[t,j]                   over every query t so far, one sum per kv head
//     keep     = last M  +  top N by score        N = trunc(L * important), M = trunc(L * recent), each (1 - ratio) / 2
//
// Paper: Zhang et al. 2023, arXiv:2306.14048. Scores go on while decoding (DECODE_VOTES) and at
// every token the lowest slot outside the last M leaves each head, so that N + M stay. Safe: the last M.
// Differs: the paper cuts at every token of the prompt; here the prompt is read whole, then cut.

static void h2o(Run *r) {
    int recent[r->n_layers], room = 0;           // one a layer: they have seen different numbers of rows where rows were pruned
    #pragma omp parallel for if (!r->step) reduction(max:room)
    for (int l = 0; l < r->n_layers; l++)
        for (int h = 0; h < r->n_kv_heads; h++) {
            Head *c = head(r, l, h);
            int M = part(r, c, "recent"), budget = part(r, c, "important") + M;
            recent[l] = c->len > budget ? M : c->len;
            room = max(room, 1 + max(0, budget - c->len));
            if (!r->step && c->len > budget) keep_top(c->keep, c->score, 0, c->len - M, budget - M);
        }
    r->room = min(r->room, room);
    if (r->step) drop_lowest(r, 0, recent);
}

// :released is Elastic Cache's H2OCache (kv_cache.py), the "H2O" row of its tables. One list for the whole model:
//
//     score[k] += mean over layers and heads of what slot k received       at the prompt and at every token
//     f = trunc(n - N * (1 - ratio))                                       n slots now, N rows seen
//     f > 1, prompt:  g = argsort(score[0 … L-2]);  keep = { k : g[k] > f } + the last
//     f = 1:          the lowest of [start, n - 2] leaves, and the list moves up behind it
//
// Three things there that H2O does not have: g[k] > f tests the INDEX of the k-th smallest where a rank was meant, so the
// choice has little to do with the scores; after it the list is not re-indexed, so slots inherit other tokens' votes; no recent
// window. Safe: the last slot; while decoding also the first `start`. L - f - 1 slots stay of the prompt.
// The release's list has 2,049 places and its last value is doubled when it moves up; longer prompts fail there, not here.

static void h2o_released(Run *r) {
    float *score = r->mem;                       // (ctx,)
    int len = head(r, 0, 0)->len, f = over_budget(len, head(r, 0, 0)->seen, r->ratio), start = opt(r, "start");
    for (int j = 0; j < len; j++) {
        double sum = 0;
        for (int i = 0; i < r->n_layers * r->n_kv_heads; i++) sum += r->head[i].score[j];
        score[j] += (float)(sum / (r->n_layers * r->n_kv_heads));
    }
    int stay = f <= 0 ? len : f == 1 ? len - (start < len - 1) : max(1, len - f - 1);
    r->room = growth(r, stay, head(r, 0, 0)->seen, r->ratio, start + 1);
    if (f <= 0) return;
    if (f > 1 && !r->step) {
        int *g = argsort(score, len - 1);
        for (int l = 0; l < r->n_layers; l++)
            for (int k = 0; k < len - 1; k++)
                if (g[k] <= f) drop_slot(r, l, k);
        free(g);
        return;
    }
    int p = start, end = opt(r, "buffer");       // the list moves up to its last place
    if (end > r->ctx || len > end) end = r->ctx;
    for (int k = start; k < len - 1; k++)
        if (score[k] < score[p]) p = k;
    if (p >= len - 1) return;                    // nothing between the first `start` and the last (the release ends here)
    for (int l = 0; l < r->n_layers; l++) drop_slot(r, l, p);
    memmove(score + p, score + p + 1, (end - 1 - p) * sizeof *score);
}

// ----------------------------------------------------------------------------
// SnapKV: what the end of the prompt looks at
//
//     score[j] = sum over the last `window` queries of att[t,j], then the mean over `pool` neighbours
//     keep     = the window  +  top N of the rest by score, per kv head, once, after the prompt
//
// Paper: Li et al. 2024, arXiv:2404.14469 (window 32 and kernel 5 in the authors' default configuration). Safe: the last M slots.
// M = the window, or trunc(L * recent); N = B - M with B = L - trunc(L - L * (1 - ratio)), or trunc(L * important).
// Differs: the authors' capacity is a constant (2,048, window included); here it follows the ratio.
//
// :lookm is the baseline row of LOOK-M's tables (github.com/SUSTechBruce/LOOK-M): the window is the recent part itself,
// M = trunc(L * recent) queries and slots, and N = trunc(L * important), each (1 - ratio) / 2. It alone of that
// release also compresses prompts without an image.

static int snapkv_window(const Run *r, int rows) {                   // queries that vote
    if (given(r, "window")) return min(opt(r, "window"), rows);
    return (int)((double)rows * (given(r, "recent") ? opt(r, "recent") : (1.0 - r->ratio) / 2));
}
static int snapkv_voters(const Run *r, int layer) { (void)layer; return snapkv_window(r, r->n_rows); }

static void snapkv(Run *r) {
    bool paper = !strcmp(((const Part *)r->opts)->policy->name, "snapkv");
    #pragma omp parallel for
    for (int i = 0; i < r->n_layers * r->n_kv_heads; i++) {
        Head *c = &r->head[i];
        int M = paper && !given(r, "recent") ? snapkv_window(r, c->len) : part(r, c, "recent");
        int N = paper && !given(r, "important") ? max(0, c->len - over_budget(c->len, c->len, r->ratio) - M) : part(r, c, "important");
        if (c->len < N + M) continue;
        pool(c->score, c->len - M, opt(r, "pool"));
        keep_top(c->keep, c->score, 0, c->len - M, N);
    }
}

// ----------------------------------------------------------------------------
// Elastic Cache: important slots stay as anchors, the others are averaged into the nearest one
//
//     score[j]  = sum_t mean_h att[t,h,j]         over the prompt's queries, one list a layer
//     f         = trunc(L - L * (1 - ratio))      slots to lose; all heads of a layer alike
//     anchors   = the L - start - 1 - f best of the middle, positions start … L-2
//     X[a]      = (X[a] + sum of the other middle slots nearest to a) / (1 + their number)        X in {key, value}
//     p         = L - f + distance                where, while decoding, the slot leaves whenever trunc(n - N * (1 - ratio)) >= 1
//
// Paper: Liu et al. 2024, arXiv:2407.18121. Ties of distance go to the lower anchor. Safe: the first `start`, the
// last, which receive nothing, and while decoding all before p (at least `start`; a distance > 0 is p itself).
// L - f slots stay, though never less than start + 1. merge=off drops instead of averaging.
//
// :released (github.com/liuzuyan/ElasticCache, kv_cache.py) differs in what an index means, with g = argsort(middle scores):
//
//     anchors = { start + k : g[k] >  f }         tests the INDEX of the k-th smallest score where its rank was meant
//     sources = {         k : g[k] <= f }         lacks `start`: sources are one to the left, may be position 0 or anchors
//
// so L - f - 1 slots stay. f = 1 at the prompt drops BOS, and so does every later eviction (p was never set); f <= 0
// leaves p at 0 too. Where no anchor would stay the release ends with an error; here f is taken so that one does.

static void elastic(Run *r) {
    int start = opt(r, "start"), distance = opt(r, "distance");
    bool merge = chosen(r, "merge", "on"), as_released = released(r), none = false;
    int room = 0;
    LayerMemo *memo = r->mem;
    #pragma omp parallel for if (!r->step) reduction(max:room) reduction(||:none)
    for (int l = 0; l < r->n_layers; l++) {
        Head *c = head(r, l, 0);
        int L = c->len, m = L - start - 1, f = over_budget(L, c->seen, r->ratio);
        if (r->step || (as_released && f < 2)) {
            if (f >= 1) drop_slot(r, l, memo[l].fixed_point);
            if (!r->step) room = max(room, growth(r, L - (f >= 1), c->seen, r->ratio, 0));
            continue;
        }
        const float *score = mean_over_heads(r, l);
        bool *anchor = need(L, sizeof *anchor), *source = need(L, sizeof *source);
        int *near = need(L, sizeof *near);
        if (as_released && m > 0) {
            if (f > m - 2) { f = m - 2; none = true; }
            int *g = argsort(score + start, m);
            for (int k = 0; k < m; k++) {
                anchor[start + k] = g[k] > f;
                source[k] = g[k] <= f;
            }
            free(g);
        } else {
            for (int j = start; j < L - 1; j++) anchor[j] = true;
            keep_top(anchor, score, start, L - 1, m - max(0, f));
            for (int j = start; j < L - 1; j++) source[j] = !anchor[j];
        }
        nearest_slot(near, anchor, L);
        for (int j = start; j < L - 1; j++) c->keep[j] = anchor[j];
        for (int j = 0; merge && j < L; j++)
            if (source[j]) c->into[j] = near[j];
        same_for_heads(r, l);
        memo[l].fixed_point = distance > 0 ? distance : max(start, L - max(0, f) + distance);
        room = max(room, growth(r, slots_kept(c), c->seen, r->ratio, memo[l].fixed_point));
        free(anchor);
        free(source);
        free(near);
    }
    r->room = min(r->room, room);
    if (none) r->note = "elastic:released: so many slots leave that no anchor would stay; one does";
}

// ----------------------------------------------------------------------------
// PrefixKV: every layer keeps its best slots until their share of attention reaches one common threshold
//
//     c[l,j]  = sum_t mean_h att[t,h,j]           over the prompt's queries
//     keep    = first `start`  +  last  +  the best of the middle, so that F_l leave
//     F_l     = rint(rho_l * L)                   rho_l from conf=FILE, one number a layer (the published JSON files)
//     p_l     = L - F_l + distance                where a slot leaves layer l whenever trunc(n_l - N * (1 - rho_l)) >= 1
//
// Paper: Wang et al. 2024, arXiv:2412.03409; code: github.com/THU-MIG/PrefixKV, prefixkv.py, which is what runs here. Paper and
// code agree on the method; the paper's r is what is kept, the code's and ours what is dropped. All heads of a layer alike, layers
// of different length. Ties: the earlier leaves. Safe: the first `start`, the last; while decoding all before p_l (a distance > 0
// is p_l itself; a p_l below 1 becomes half of what stayed).
//
// :online, and prefixkv without a file: rho_l from this prompt, F_l / L, by bisection on the threshold x:
//
//     count_l(x) = max(0, L - prefix_length_l(x) - start - 1)         slots of layer l outside the prefix that holds x of its attention
//     until |sum_l count_l(x) - target| < 5,  target = ratio * sum_l L;    F_l = trunc(count_l * target / sum count)

static void prefix_search(Run *r, LayerMemo *memo) {
    float *cdf[r->n_layers];
    int start = opt(r, "start");
    double target = 0, sum = 0, lo = 0, hi = 1;
    for (int l = 0; l < r->n_layers; l++) target += head(r, l, 0)->len;
    target *= r->ratio;
    #pragma omp parallel for
    for (int l = 0; l < r->n_layers; l++) {
        Head *c = head(r, l, 0);
        int *g = argsort(c->score, c->len);
        double all = 0, so_far = 0;
        for (int j = 0; j < c->len; j++) all += c->score[j];
        cdf[l] = need(c->len, sizeof **cdf);
        for (int j = 0; j < c->len; j++) cdf[l][j] = (float)(so_far += c->score[g[c->len - 1 - j]] / (float)all);
        free(g);
    }
    for (int i = 0; i < 200 && lo < hi; i++) {   // identical layers can step over the window of 5: stop some time
        double x = (lo + hi) / 2;
        sum = 0;
        for (int l = 0; l < r->n_layers; l++) {
            int len = head(r, l, 0)->len;
            sum += memo[l].count = max(0, len - prefix_length(cdf[l], len, (float)x) - start - 1);
        }
        if (fabsf((float)sum - (float)target) < 5) break;
        if (sum < target) hi = x; else lo = x;
    }
    for (int l = 0; l < r->n_layers; l++) {
        memo[l].forget = sum > 0 ? (int)(memo[l].count * target / sum) : 0;
        memo[l].rho = (double)memo[l].forget / max(1, head(r, l, 0)->len);
        free(cdf[l]);
    }
}

static void prefixkv(Run *r) {
    int start = opt(r, "start"), distance = opt(r, "distance");
    const double *conf = ((const Part *)r->opts)->conf;
    LayerMemo *memo = r->mem;
    if (r->step) {
        for (int l = 0; l < r->n_layers; l++) {
            Head *c = head(r, l, 0);
            if (over_budget(c->len, c->seen, memo[l].rho) >= 1) drop_slot(r, l, memo[l].fixed_point);
        }
        return;
    }
    #pragma omp parallel for
    for (int l = 0; l < r->n_layers; l++) {
        mean_over_heads(r, l);
        if (conf) {
            memo[l].rho = conf[l];
            memo[l].forget = (int)rint(conf[l] * (double)head(r, l, 0)->len);
        }
    }
    if (!conf) prefix_search(r, memo);
    int room = 0;
    #pragma omp parallel for reduction(max:room)
    for (int l = 0; l < r->n_layers; l++) {
        Head *c = head(r, l, 0);
        drop_bottom(c->keep, c->score, start, c->len - 1, memo[l].forget);
        same_for_heads(r, l);
        int stay = slots_kept(c), p = distance > 0 ? distance : c->len - memo[l].forget + distance;
        memo[l].fixed_point = p < 1 ? max(1, stay / 2) : p;
        room = max(room, growth(r, stay, c->seen, memo[l].rho, memo[l].fixed_point));
    }
    r->room = min(r->room, room);
}

// ----------------------------------------------------------------------------
// LOOK-M: text first, then what the prompt looked at; the dropped pictures live on in what stays
//
//     score[j] = sum_t att[t,j]                   over the prompt's queries, per kv head
//     W        = the last M slots                 N = trunc(L * important), M = trunc(L * recent), each (1 - ratio) / 2
//     T        = the N best before W, text before images (eq. 5: text gets + max score)
//     keep     = W  +  T  +  all text             eq. 8's union: more than N + M where the text before W alone is more than N
//     t(i)     = argmax_j cos(k[i], k[j])         over the kept slots j, for every dropped slot i
//     average    X[j] = (X[j] + sum_i X[i]) / (1 + n_j)                          eq. 10     X in {key, value}; i with t(i) = j
//     pivot      X[j] = (X[j] + sum_i (X[i] + X[j]) / 2) / (1 + n_j)             eq. 11, the default
//     weighted   X[j] = (X[j] + sum_i cos(k[i], k[j]) X[i]) / (1 + n_j)          eq. 12
//
// Paper: Wan et al. 2024, arXiv:2406.18139. Once, after the prompt; nothing leaves while decoding. Safe: W, the text.
// L <= N + M: nothing happens. budget=strict counts the text: exactly N + M stay. prior=off ranks text and images alike.
//
// :released (github.com/SUSTechBruce/LOOK-M at ecf0f51) differs from the paper's text in this:
//   - images get - 65516 in float32 instead, so their scores are compared rounded to multiples of 1/256
//   - average and weighted drop those whose cosine, averaged over heads rank by rank, is below the layer's mean
//   - average then adds the FIRST n dropped slots to the targets of the n that were chosen
//   - prior=off keeps slots 0 … 3 whatever they score (the lowest N of them where N < 4)
//   - prompts without an image are left alone
// h2o:lookm is its H2O row: top N and W, per head, once. roco is its RoCo row, "mean attention": the mean over the same L
// queries, so the very ranking of h2o:lookm (the published 7B rows are equal in all 11 columns). It is not EasyKV's RoCo.

static bool has_image(const Run *r) { return memchr(r->kind, IMAGE, r->n_prompt) != NULL; }

static void lookm_choose(Run *r, Head *c, bool prior) {
    int N = part(r, c, "important"), M = part(r, c, "recent"), E = c->len - M, n_text = 0;
    bool coarse = prior && released(r);
    if (c->len <= N + M) return;
    if (!prior) {
        int sinks = given(r, "sinks") ? min(N, opt(r, "sinks")) : 0;
        keep_top(c->keep, c->score, min(sinks, E), E, N - sinks);
        return;
    }
    bool *text = need(c->len, sizeof *text), *image = need(c->len, sizeof *image);
    float *score = need(c->len, sizeof *score);
    for (int j = 0; j < E; j++) {
        image[j] = r->kind[c->pos[j]] == IMAGE;
        n_text += text[j] = !image[j];
        score[j] = coarse ? c->score[j] + -65516.0f : c->score[j];
    }
    keep_top_among(c->keep, image, score, 0, E, max(0, N - n_text));
    if (chosen(r, "budget", "strict")) keep_top_among(c->keep, text, c->score, 0, E, N);
    free(text);
    free(image);
    free(score);
}

// After nearest_key: the release's filter, and average's slip. Rank i is the i-th dropped slot of EACH head: another token in each.
static void lookm_filter(Run *r, int layer, bool average) {
    Head *c = head(r, layer, 0);
    int H = r->n_kv_heads, P = 0, n = 0;
    for (int j = 0; j < c->len; j++) P += !c->keep[j];
    int *slot = need((size_t)H * P, sizeof *slot), *target = need((size_t)H * P, sizeof *target), *group = need(P, sizeof *group);
    double *m = need(P, sizeof *m), theta = 0;
    for (int h = 0; h < H; h++)
        for (int j = 0, i = 0; (c = head(r, layer, h), j < c->len); j++) {
            if (c->keep[j]) continue;
            slot[h * P + i] = j;
            target[h * P + i] = c->into[j];
            m[i++] += c->w[j] / (double)H;
        }
    for (int i = 0; i < P; i++) theta += m[i] / P;
    for (int i = 0; i < P; i++)
        if ((float)m[i] >= (float)theta) group[n++] = i;
    for (int h = 0; h < H; h++) {
        c = head(r, layer, h);
        for (int i = 0; i < P; i++) c->into[slot[h * P + i]] = -1;
        for (int x = 0; x < n; x++) c->into[slot[h * P + (average ? x : group[x])]] = target[h * P + group[x]];
    }
    free(slot);
    free(target);
    free(group);
    free(m);
}

static void lookm(Run *r) {
    bool prior = chosen(r, "prior", "on"), pivot = chosen(r, "merge", "pivot"), average = chosen(r, "merge", "average");
    if (released(r) && !has_image(r)) return;
    #pragma omp parallel for
    for (int i = 0; i < r->n_layers * r->n_kv_heads; i++) lookm_choose(r, &r->head[i], prior);
    if (chosen(r, "merge", "none")) return;
    for (int l = 0; l < r->n_layers; l++) {
        if (!memchr(head(r, l, 0)->keep, false, head(r, l, 0)->len)) continue;      // all heads of a layer keep as many
        nearest_key(r, l);
        if (released(r) && !pivot) lookm_filter(r, l, average);
        for (int h = 0; (pivot || average) && h < r->n_kv_heads; h++)
            for (int j = 0; j < head(r, l, h)->len; j++) head(r, l, h)->w[j] = pivot ? 0.5f : 1;
    }
    r->merge_self = pivot ? 0.5f : 0;
}

static void h2o_lookm(Run *r) {
    if (!has_image(r)) return;
    #pragma omp parallel for
    for (int i = 0; i < r->n_layers * r->n_kv_heads; i++) lookm_choose(r, &r->head[i], false);
}

// ----------------------------------------------------------------------------
// FastV: an image token that a shallow layer does not look at goes no further
//
//     score[j] = mean_h att[k-1][h, q, j]         of layer k-1, for the image rows j; q: the prompt's last query
//     keep     = rint(n * (1 - ratio)) of the n image rows, or `keep` of them; all that is no image
//
// Paper: Chen et al. 2024, arXiv:2403.06764, section 4.1; code: github.com/pkunlp-icler/FastV at d165972. Layers 0 … k-1 see
// everything; what is dropped never enters layer k and deeper ones; survivors keep their positions. Safe: what is no image; the
// prompt's last row.
// Differs: the paper ranks by what a token receives from all others, the authors' code by the last query alone. The code runs;
// score=all is the paper's text.
//
//   fastv            once, at the prompt (the release's Hugging Face version with cache); the answer attends to what was chosen then
//   fastv:mask       nothing leaves: deeper layers do not see the dropped keys, and every token chooses anew
//   fastv:recompute  no cache: the prompt and the answer so far are read, and pruned, anew for every token
//   fastv:lmms       the lmms-eval version: k = 3, trunc(n * (1 - ratio)), half dropped; its window 35 … 610 is the image
//
// start, length: the rows that are ranked, where they are not the image's. The release's scripts say start=36,length=576
// for an image at 35 … 610, so that its first token always stays and the text token behind it can go.

// Marks the candidates by token index and returns how many there are.
static int fastv_window(const Run *r, bool *among, int shift) {
    int first = -1, n_image = 0, n = 0;
    for (int i = 0; i < r->n_rows; i++)
        if (r->kind[r->row[i]] == IMAGE) { if (first < 0) first = r->row[i]; n_image++; }
    if (first < 0) return 0;
    bool window = given(r, "start") || given(r, "length") || shift;
    int start = given(r, "start") ? opt(r, "start") : first + shift, end = start + (given(r, "length") ? (int)opt(r, "length") : n_image);
    if (end > r->n_seen && given(r, "start"))
        die("the window is start … start + length - 1, by token index; without these options it is the image",
            "-p %s:start=%d,length=%d: reaches past the prompt's %d tokens", ((const Part *)r->opts)->policy->name, start, end - start, r->n_seen);
    for (int i = 0; i < r->n_rows; i++) {
        int t = r->row[i];
        among[t] = r->row_keep[i] && (window ? t >= start && t < end : r->kind[t] == IMAGE);
        n += among[t];
    }
    return n;
}

static int fastv_budget(const Run *r, int n) {
    const char *name = ((const Part *)r->opts)->policy->name;
    if (!given(r, "keep")) return !strcmp(name, "fastv:lmms") ? (int)(n * (1.0 - r->ratio)) : (int)rint(n * (1.0 - r->ratio));
    if (opt(r, "keep") > n) die("keep counts the image rows that stay", "-p %s:keep=%g: there are %d to choose from", name, opt(r, "keep"), n);
    return (int)opt(r, "keep");
}

static void fastv_prune(Run *r, int layer, bool *among, int n_keep) {
    int last = r->row[r->n_rows - 1];
    bool *stay = need(r->n_seen, sizeof *stay);
    float *score = need(r->n_seen, sizeof *score);
    if (among[last]) { among[last] = false; n_keep = max(0, n_keep - 1); }        // it goes on in any case
    votes(r, layer - 1, chosen(r, "score", "all") ? r->n_rows : 1, score);
    memset(stay, true, r->n_seen * sizeof *stay);
    keep_top_among(stay, among, score, 0, r->n_seen, n_keep);
    for (int i = 0; i < r->n_rows; i++) r->row_keep[i] &= stay[r->row[i]];
    free(stay);
    free(score);
}

static void fastv(Run *r, int layer) {
    if (layer != (int)opt(r, "k")) return;
    bool *among = need(r->n_seen, sizeof *among);
    int n = fastv_window(r, among, 0);
    if (n) fastv_prune(r, layer, among, fastv_budget(r, n));
    free(among);
}

static void fastv_mask(Run *r, int layer) {
    bool *among = r->mem;                        // (ctx,) chosen at the prompt, ranked at every token
    if (layer != (int)opt(r, "k")) return;
    if (!r->step && r->n_seen == r->n_prompt) fastv_window(r, among, 0);
    int n = 0;
    for (int j = 0; j < r->n_seen; j++) n += among[j];
    if (!n) return;
    bool *stay = need(r->n_seen, sizeof *stay);
    float *score = need(r->n_seen, sizeof *score);
    votes(r, layer - 1, chosen(r, "score", "all") ? r->n_rows : 1, score);
    memset(stay, true, r->n_seen * sizeof *stay);
    keep_top_among(stay, among, score, 0, r->n_seen, fastv_budget(r, n));
    for (int j = 0; j < r->n_seen; j++) r->visible[j] &= stay[j];
    free(stay);
    free(score);
}

// ----------------------------------------------------------------------------
// Simignore: image tokens that resemble no word of the text are not seen
//
//     sim[i,c] = cos(image row i, embedding of text token c)         before layer 0, no attention involved
//     keep     = the K image rows with the largest max_c sim[i,c]    K = `tokens`, or rint(n * (1 - ratio))
//
// Paper: Zhang et al. 2024, arXiv:2412.09817. Text: context, question, options, without the system part. Safe: what is
// no image; the prompt's last row. Differs: eq. 12 - 14 select K pairs; text, tables and code count K tokens, and so does this.
// The paper masks the others' keys in all layers; nobody sees them, so leaving their rows out gives the same values.
//
// :released-7b and :released-13b (github.com/FanshuoZeng/Simignore, the two ScienceQA scripts) do three things at once:
//   - another cut of the prompt, text set BOS + option texts (7b) or the option block (13b): SPLIT_…, the prompt builder's
//   - K rows (452 and 451 of 576) along the list of all pairs, best first, from rank i0 in strides of `step`; their keys are hidden
//     in layers 0 … k-1 only
//   - FastV at layer k (5 and 4) on top, which keeps a quarter (144) of the window 36 … 611. The image is at 35 … 610: its first
//     row comes back though ignored, and a text token is ranked. The mask ends there
// start, length: that window; by default the image's, one later. After the prompt the ignored slots leave layers 0 … k-1.

static int by_cosine(const void *a, const void *b) {              // largest first, then the smaller flat index
    const Ranked *x = a, *y = b;
    return x->score > y->score ? -1 : x->score < y->score ? 1 : x->at - y->at;
}

static void simignore(Run *r, int layer) {
    if (layer) return;
    bool *among = need(r->n_rows, sizeof *among);
    int taken, all = 0, n = image_rows(r, among, &taken);
    for (int i = 0; i < r->n_rows; i++) all += r->kind[r->row[i]] == IMAGE;
    if (n && !r->n_text) die("ask a question about the picture", "-p simignore: the prompt has no text to compare the image with");
    if (n) {
        float *sim = need((size_t)all * r->n_text, sizeof *sim), *best = need(r->n_rows, sizeof *best);
        int K = given(r, "tokens") ? (int)opt(r, "tokens") : (int)rint(n * (1.0 - r->ratio));
        if (K > n) r->note = "simignore: tokens is more than there are image rows; all stay";
        text_cosine(r, sim);
        for (int i = 0, image = 0; i < r->n_rows; i++) {
            if (r->kind[r->row[i]] != IMAGE) continue;
            best[i] = -INFINITY;
            for (int c = 0; c < r->n_text; c++) best[i] = fmaxf(best[i], sim[(size_t)image * r->n_text + c]);
            image++;
        }
        keep_top_among(r->row_keep, among, best, 0, r->n_rows, max(0, K - taken));
        free(sim);
        free(best);
    }
    free(among);
}

static void simignore_released(Run *r, int layer) {
    uint8_t *ignored = r->mem;                   // (ctx,) by token index
    if (layer == 0) {
        int n = 0, seen = 0;
        for (int i = 0; i < r->n_rows; i++) n += ignored[r->row[i]] = r->kind[r->row[i]] == IMAGE;
        int pairs = n * r->n_text, K = given(r, "tokens") ? (int)opt(r, "tokens") : (int)rint(n * (1.0 - r->ratio));
        if (!n) return;
        if (!r->n_text) die("ask a question with options about the picture", "-p simignore: the prompt has no text to compare the image with");
        int *image = need(n, sizeof *image);     // token index of image row i
        float *sim = need(pairs, sizeof *sim);
        Ranked *pair = need(pairs, sizeof *pair);
        for (int i = 0, at = 0; i < r->n_rows; i++)
            if (ignored[r->row[i]]) image[at++] = r->row[i];
        if (K > n) r->note = "simignore: tokens is more than there are image rows; all stay";
        text_cosine(r, sim);
        for (int p = 0; p < pairs; p++) pair[p] = (Ranked){ sim[p], p };
        qsort(pair, pairs, sizeof *pair, by_cosine);
        for (int p = opt(r, "i0"); seen < K && p < pairs; p += (int)opt(r, "step")) {
            uint8_t *one = &ignored[image[pair[p].at / r->n_text]];
            seen += *one;
            *one = false;
        }
        for (int t = 0; t < r->n_seen; t++) r->visible[t] = !ignored[t];
        free(image);
        free(sim);
        free(pair);
    } else if (layer == (int)opt(r, "k")) {
        bool *among = need(r->n_seen, sizeof *among);
        int n = fastv_window(r, among, 1);
        if (n) fastv_prune(r, layer, among, given(r, "keep") ? (int)opt(r, "keep") : (int)rint(n * 0.25));
        memset(r->visible, 1, r->n_seen);        // after the votes: layer k-1 did not see the ignored ones
        free(among);
    }
}

static void simignore_forget(Run *r) {
    const uint8_t *ignored = r->mem;
    for (int i = 0; i < (int)opt(r, "k") * r->n_kv_heads; i++)
        for (int j = 0; j < r->head[i].len; j++) r->head[i].keep[j] = !ignored[r->head[i].pos[j]];
}

// ----------------------------------------------------------------------------
// the table: one row a form. Fields in policies.h; a row of your own needs a name, two texts, options and .compress or .admit

#define LOOKM_OPTIONS "important,recent,merge=pivot|none|average|weighted,prior=on|off"
#define FASTV_OPTIONS "keep,start,length,score=last|all"
#define SIM_OPTIONS "tokens,start,length,keep"
const Policy policies[] = {
    { "full", "", "everything", "", .flags = 0 },
    { "random", "", "image slots by lot, the same everywhere", "what=image|all", .compress = random_slots },
    { "random:rows", "", "image rows by lot, before layer 0", "", .admit = random_rows, .flags = PRUNES_ROWS },
    { "stride", "", "image slots at even distances", "what=image|all", .compress = stride_slots },
    { "stride:rows", "", "image rows at even distances, before layer 0", "", .admit = stride_rows, .flags = PRUNES_ROWS },
    { "streaming", "arXiv:2309.17453", "first and latest slots, positions within the cache",
      "sinks=4", .compress = streaming, .flags = SLOT_POS | EVERY_TOKEN },
    { "streaming:released", "arXiv:2407.18121", "Elastic Cache's baseline: keys as rotated, grows",
      "start=1", .compress = streaming_released, .flags = SLOT_POS | EVERY_TOKEN | RELEASED },
    { "h2o", "arXiv:2306.14048", "recent slots and heavy hitters, a head, at every token",
      "important,recent", .voters = all_queries, .compress = h2o, .flags = EVERY_TOKEN | DECODE_VOTES },
    { "h2o:released", "arXiv:2407.18121", "Elastic Cache's baseline: one list for the model",
      "start=1,buffer=2049", .voters = all_queries, .compress = h2o_released,
      .flags = SLOT_POS | EVERY_TOKEN | DECODE_VOTES | DECODE_SCORES | RELEASED, .mem_token = sizeof(float) },
    { "h2o:lookm", "arXiv:2406.18139", "LOOK-M's baseline: recent and heavy, a head, once",
      "important,recent", .voters = all_queries, .compress = h2o_lookm },
    { "roco", "arXiv:2406.18139", "LOOK-M's RoCo row: the ranking of h2o:lookm",
      "important,recent", .voters = all_queries, .compress = h2o_lookm },
    { "snapkv", "arXiv:2404.14469", "the window, and what it looks at, a head, once",
      "window=32,pool=5,important,recent", .voters = snapkv_voters, .compress = snapkv },
    { "snapkv:lookm", "arXiv:2406.18139", "LOOK-M's baseline: window = the recent part",
      "window,pool=5,important,recent", .voters = snapkv_voters, .compress = snapkv },
    { "elastic", "arXiv:2407.18121", "anchors, with the others averaged into the nearest",
      "start=1,distance=-25,merge=on|off", .voters = all_queries, .compress = elastic, .flags = EVERY_TOKEN, .mem_layer = sizeof(LayerMemo) },
    { "elastic:released", "arXiv:2407.18121", "the same with the release's index mix-ups",
      "start=1,distance=-25,merge=on|off", .voters = all_queries, .compress = elastic,
      .flags = SLOT_POS | EVERY_TOKEN | RELEASED, .mem_layer = sizeof(LayerMemo) },
    { "prefixkv", "arXiv:2412.03409", "a layer's best, by a file or as :online",
      "start=1,distance=-25,conf", .voters = all_queries, .compress = prefixkv, .flags = SLOT_POS | EVERY_TOKEN, .mem_layer = sizeof(LayerMemo) },
    { "prefixkv:online", "arXiv:2412.03409", "a layer's best, up to one share of attention for all",
      "start=1,distance=-25", .voters = all_queries, .compress = prefixkv, .flags = SLOT_POS | EVERY_TOKEN, .mem_layer = sizeof(LayerMemo) },
    { "lookm", "arXiv:2406.18139", "text, recent, best images; the others merged in",
      LOOKM_OPTIONS ",budget=union|strict", .voters = all_queries, .compress = lookm },
    { "lookm:released", "arXiv:2406.18139", "the same with the release's filter and sinks",
      LOOKM_OPTIONS ",sinks=4", .voters = all_queries, .compress = lookm, .flags = RELEASED },
    { "fastv", "arXiv:2403.06764", "from layer k on, image rows that layer k-1 looked at",
      "k=2," FASTV_OPTIONS, .admit = fastv, .flags = PRUNES_ROWS },
    { "fastv:mask", "arXiv:2403.06764", "all slots, but deep layers see the chosen alone",
      "k=2," FASTV_OPTIONS, .admit = fastv_mask, .flags = PRUNES_ROWS | DECODE_ADMIT | EVERY_TOKEN, .mem_token = sizeof(bool) },
    { "fastv:recompute", "arXiv:2403.06764", "no cache: pruned anew for every token",
      "k=2," FASTV_OPTIONS, .admit = fastv, .flags = PRUNES_ROWS | RECOMPUTE },
    { "fastv:lmms", "arXiv:2403.06764", "lmms-eval's version of fastv", "r=0.5,k=3," FASTV_OPTIONS, .admit = fastv, .flags = PRUNES_ROWS },
    { "simignore", "arXiv:2412.09817", "image rows that resemble a word of the text", "tokens", .admit = simignore, .flags = PRUNES_ROWS },
    { "simignore:released-7b", "arXiv:2412.09817", "the same along pairs, then FastV at layer k",
      "r=0.21528,k=5,i0=1,step=1," SIM_OPTIONS, .admit = simignore_released, .compress = simignore_forget,
      .flags = RELEASED | SPLIT_7B, .mem_token = 1 },
    { "simignore:released-13b", "arXiv:2412.09817", "the same with the 13B script's numbers",
      "r=0.21701,k=4,i0=0,step=2," SIM_OPTIONS, .admit = simignore_released, .compress = simignore_forget,
      .flags = RELEASED | SPLIT_13B, .mem_token = 1 },
    { 0 }
};

// ----------------------------------------------------------------------------
// the words of the command line: NAME[:FORM][:key=value,key=value…], joined with +

// What numbers an option may be. Other names in a row of the table: any number.
static const struct { const char *name, *means; double lo, hi; bool whole; } ranges[] = {
    { "r", "fraction dropped; by default -r's", 0, 1, false },
    { "important", "fraction of the prompt kept for its scores; by default half of what stays (snapkv: all but the recent part)", 0, 1, false },
    { "recent", "fraction of the prompt kept as its end; by default the other half (snapkv: the window)", 0, 1, false },
    { "start", "first slots that are safe; fastv, simignore: first row that is ranked, by default the image's", 0, 1e9, true },
    { "sinks", "first slots that are safe", 0, 1e9, true },
    { "distance", "place of the fixed point: > 0 from the start, else from the end of what stays", -1e9, 1e9, true },
    { "buffer", "places of the release's score list", 1, 1e9, true },
    { "window", "queries at the prompt's end that vote; snapkv:lookm: by default the recent part", 1, 1e9, true },
    { "pool", "slots that a score is averaged over, an odd number", 1, 1e9, true },
    { "k", "first layer without the dropped rows: 1 to layers - 1", 1, 1e9, true },
    { "keep", "image rows that stay at layer k; by default by r", 0, 1e9, true },
    { "length", "rows that are ranked; by default as many as the image has", 1, 1e9, true },
    { "tokens", "image rows that stay; by default by r", 0, 1e9, true },
    { "i0", "first rank in the list of pairs", 0, 1e9, true },
    { "step", "stride in the list of pairs", 1, 1e9, true },
};
static const char *const meanings[][2] = {    // of options that are words or files
    { "conf", "prefixkv: a file with one fraction dropped a layer, [a, b, ...]; by default searched for on the prompt, as :online does" },
    { "what", "which slots may leave: image, all" },
    { "merge", "elastic: on, off (what leaves is dropped); lookm: pivot, average, weighted (by cosine), none" },
    { "prior", "on: text stays before images; off: scores alone" },
    { "budget", "union: all text stays, whatever the budget; strict: text counts" },
    { "score", "last: the prompt's last query ranks image rows; all: all queries do" },
};
static const char *const amounts[] = { "important", "recent", "conf", "tokens", "keep" };   // stand in place of -r

__attribute__((noreturn)) static void unknown_policy(const char *name) {
    char list[2048];
    int at = 0;
    for (const Policy *p = policies; p->name; p++) at += snprintf(list + at, sizeof list - at, "%s%s", at ? ", " : "there are ", p->name);
    die(list, "-p %s: no such policy", name);
}

__attribute__((noreturn)) static void bad_option(const Policy *p, const char *what, const char *why) {
    char list[512];
    const char *first = p->admit || p->compress ? "r (the fraction dropped)" : "no options";
    snprintf(list, sizeof list, "%s takes %s%s%s; -p help says more", p->name, first, *p->options ? " and " : "", p->options);
    die(list, "-p %s:%s: %s", p->name, what, why);
}

static void parse_number(Part *part, int at, const char *name, const char *value, int n_layers) {
    const Policy *p = part->policy;
    char what[256], why[256], *end;
    double x = strtod(value, &end), lo = -INFINITY, hi = INFINITY;
    bool whole = false;
    snprintf(what, sizeof what, "%s=%s", name, value);
    if (!*value || *end || !isfinite(x)) bad_option(p, what, "not a number");
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (!strcmp(name, ranges[i].name)) { lo = ranges[i].lo; hi = ranges[i].hi; whole = ranges[i].whole; }
    if (!strcmp(name, "k")) hi = n_layers - 1;
    if (hi < lo) bad_option(p, what, "the model has too few layers for it");
    snprintf(why, sizeof why, "allowed are %snumbers from %g to %g", whole ? "whole " : "", lo, hi);
    if (x < lo || x > hi || (whole && x != floor(x))) bad_option(p, what, why);
    if (!strcmp(name, "pool") && fmod(x, 2) != 1) bad_option(p, what, "allowed are odd numbers");
    if (at < 0) part->ratio = x;
    else part->opt[at] = x;
}

// One number a layer, as PrefixKV publishes them: [0.01, 0.37, …], fractions dropped.
static double *parse_conf(const Policy *p, const char *path, int n_layers) {
    char what[512], why[256];
    snprintf(what, sizeof what, "conf=%s", path);
    FILE *f = fopen(path, "r");
    if (!f) bad_option(p, what, strerror(errno));
    double *rho = need(n_layers, sizeof *rho), x;
    char mark = 0;
    int n = 0;
    bool ok = fscanf(f, " %c", &mark) == 1 && mark == '[';
    while (ok && mark != ']') {
        ok = fscanf(f, "%lf %c", &x, &mark) == 2 && x >= 0 && x <= 1 && (mark == ',' || mark == ']');
        if (ok && n < n_layers) rho[n] = x;
        n++;
    }
    if (!ok || fscanf(f, " %c", &mark) == 1) bad_option(p, what, "not a list [a, b, …] of fractions from 0 to 1");
    fclose(f);
    snprintf(why, sizeof why, "%d numbers for a model of %d layers", n, n_layers);
    if (n != n_layers) bad_option(p, what, why);
    return rho;
}

// The i-th of a list of options, "name", "name=number" or "name=word|word…", cut in two. False past the end.
static bool option_names(const char *options, int i, char *name, char *value) {
    for (; *options && i; i--) { options += strcspn(options, ","); options += *options == ','; }
    if (!*options) return false;
    int n = (int)strcspn(options, ","), word = (int)strcspn(options, ",=");
    sprintf(name, "%.*s", word, options);
    sprintf(value, "%.*s", word < n ? n - word - 1 : 0, options + word + 1);
    return true;
}

static void parse_option(Part *part, char *name, char *value, int n_layers) {
    const Policy *p = part->policy;
    char key[512], words[256];
    int at = option_at(p->options, name);
    if (!strcmp(name, "r") && (p->admit || p->compress)) { parse_number(part, -1, name, value, n_layers); return; }
    if (at < 0) bad_option(p, name, "no such option");
    option_names(p->options, at, key, words);
    if (!strcmp(name, "conf")) part->conf = parse_conf(p, value, n_layers);
    else if (!strchr(words, '|')) { parse_number(part, at, name, value, n_layers); return; }
    else {
        size_t len = strlen(value);
        char *w = words;
        while (*w && !(strcspn(w, "|") == len && !memcmp(w, value, len))) { w += strcspn(w, "|"); w += *w == '|'; }
        snprintf(key, sizeof key, "allowed are %s", words);
        if (!*w) { char what[512]; snprintf(what, sizeof what, "%.200s=%.200s", name, value); bad_option(p, what, key); }
    }
    free(part->text[at]);
    part->text[at] = need(strlen(value) + 1, 1);
    strcpy(part->text[at], value);
}

static bool is_given(const Part *part, const char *name) {
    int at = option_at(part->policy->options, name);
    return at >= 0 && (part->text[at] || !isnan(part->opt[at]));
}

static Part parse_part(char *spec, double ratio, int n_layers, bool *on) {
    Part part = { .ratio = NAN };
    char *options = spec + strcspn(spec, ":"), name[256], value[256];
    if (*options && strcspn(options + 1, ":=") == strcspn(options + 1, ":")) options += 1 + strcspn(options + 1, ":");     // NAME:FORM
    if (*options) *options++ = 0;
    for (part.policy = policies; part.policy->name && strcmp(part.policy->name, spec); part.policy++) {}
    if (!part.policy->name) unknown_policy(spec);
    for (int i = 0; i < MAX_OPTS; i++) part.opt[i] = NAN;
    for (char *next; *options; options = next) {
        next = options + strcspn(options, ",");
        if (*next) *next++ = 0;
        char *v = strchr(options, '=');
        if (!v) bad_option(part.policy, options, "options are written key=value");
        *v++ = 0;
        parse_option(&part, options, v, n_layers);
    }
    if (isnan(part.ratio)) part.ratio = ratio;
    bool amount = false, missing = false;
    for (size_t i = 0; i < sizeof amounts / sizeof *amounts; i++) amount |= is_given(&part, amounts[i]);
    bool window = strstr(part.policy->options, "window=") != NULL;                // snapkv: the recent part is the window by default
    if (is_given(&part, "important") != is_given(&part, "recent") && !(window && is_given(&part, "important"))) missing = isnan(part.ratio);
    if (missing) bad_option(part.policy, is_given(&part, "recent") ? "recent" : "important", "give both important and recent, or one of them and -r");
    for (int i = 0; option_names(part.policy->options, i, name, value); i++)       // defaults: first the ratio's, which decides
        if (!strcmp(name, "r") && isnan(part.ratio)) part.ratio = atof(value);
    if (isnan(part.ratio)) part.ratio = 0;
    *on = (part.policy->admit || part.policy->compress) && (amount || part.ratio > 0);
    for (int i = 0; *on && option_names(part.policy->options, i, name, value); i++) {
        bool words = strchr(value, '|') != NULL;
        value[strcspn(value, "|")] = 0;
        if (!*value || !strcmp(name, "r") || is_given(&part, name)) continue;
        if (words) parse_option(&part, name, value, n_layers);
        else parse_number(&part, i, name, value, n_layers);
    }
    return part;
}

static void part_free(Part *part) {
    for (int i = 0; i < MAX_OPTS; i++) free(part->text[i]);
    free(part->conf);
}

Chain policy_parse(const char *spec, double ratio, int n_layers) {
    Chain chain = { 0 };
    Part evictor = { 0 };
    int n = 0;
    bool alone = false;
    snprintf(chain.name, sizeof chain.name, "%s", spec);
    char *copy = need(strlen(spec) + 1, 1), *one = strcpy(copy, spec);
    for (char *next = one; next; one = next) {
        next = strchr(one, '+');
        while (next && !isalpha((unsigned char)next[1])) next = strchr(next + 1, '+');     // not the + of a number
        if (next) *next++ = 0;
        bool on;
        Part part = parse_part(one, ratio, n_layers, &on);
        alone |= part.policy->flags & (RELEASED | RECOMPUTE);
        if (n++ && alone) die("a released form, and fastv:recompute, which keeps no cache, stand alone", "-p %s: these do not go together", spec);
        if (!on) { part_free(&part); continue; }
        chain.flags |= part.policy->flags;
        if (part.policy->compress) {
            if (evictor.policy) die("join policies that prune rows (random:rows, stride:rows, fastv, simignore) with one that evicts slots",
                                    "-p %s: %s and %s both evict slots", spec, evictor.policy->name, part.policy->name);
            evictor = part;
        } else {
            if (chain.n == MAX_PARTS - 1) die(NULL, "-p %s: more than %d policies", spec, MAX_PARTS);
            chain.part[chain.n++] = part;
        }
    }
    if (evictor.policy) chain.part[chain.n++] = evictor;
    free(copy);
    return chain;
}

void policy_free(Chain *chain) {
    for (int i = 0; i < chain->n; i++) part_free(&chain->part[i]);
    chain->n = 0;
}

void policy_help(FILE *out) {
    fprintf(out, "-p NAME[:FORM][:key=value,key=value...], joined with +; -r R drops the fraction R, r=R does so for one policy of a sum\n\n");
    fprintf(out, "%-23s %-17s %-55s %s\n", "policy", "paper", "keeps", "options with their defaults");
    for (const Policy *p = policies; p->name; p++) fprintf(out, "%-23s %-17s %-55s %s\n", p->name, *p->paper ? p->paper : "-", p->keeps, p->options);
    fprintf(out, "\n%-12s %s\n", "option", "meaning");
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) fprintf(out, "%-12s %s\n", ranges[i].name, ranges[i].means);
    for (size_t i = 0; i < sizeof meanings / sizeof *meanings; i++) fprintf(out, "%-12s %s\n", meanings[i][0], meanings[i][1]);
    fputs("A word option lists its words, the default first. NAME is the paper's method, NAME:released what its authors' code decides.\n", out);
}
