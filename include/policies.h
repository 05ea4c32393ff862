// policies.h: what a compression method sees of a sequence, and all that it may ask for.
//
// A policy WRITES A PLAN; the caller (run.h) carries it out: which slots stay, where the content of the others goes,
// which rows go on. Everything here is host memory. Slots are in token order; a policy never learns where they lie.

#ifndef POLICIES_H
#define POLICIES_H
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum { TEMPLATE, TEXT, IMAGE, ANSWER };   // where a token came from; the prompt builder marks it

typedef struct {             // one KV head of one layer; slots in token order
    int len, seen;           // slots now; rows that ever entered this layer (budgets are fractions of these)
    const int *pos;          // (len,) token index in the sequence, ascending. After the prompt; later only for policies with
                             //        DECODE_SCORES and for traces, else NULL
    float *score;            // (len,) votes so far: attention received, mean over the query heads of the group; given when pos is.
                             //        A page may write here what it ranks by, for traces: the cache's own votes stay as they are
    bool *keep;              // (len,) THE PLAN. true on entry; false: leaves
    int *into;               // (len,) -1 on entry; else the kept slot that this content is added to (a kept slot may be a source too).
                             //        NULL while decoding: nothing merges then
    float *w;                // (len,) 1 on entry: X[j] <- (X[j] + sum_i (w[i] X[i] + merge_self X[j])) / (1 + n), n sources i of j,
                             //        from unmerged rows. NULL while decoding
} Head;

typedef struct Run Run;

// What needs the keys, the queries or the device: run.h's on a back-end, a test's on given tensors. One launch and one copy for
// all heads of a layer, never one a head. Policies call the functions of the same names below.
typedef struct {
    void (*votes)(Run *r, int layer, int n, float *out);
    void (*text_cosine)(Run *r, float *out);
    void (*nearest_key)(Run *r, int layer);
    void (*drop_lowest)(Run *r, int lo, const int *from_end);
} Verbs;

struct Run {
    int n_layers, n_kv_heads;
    int ctx;                 // the longest that the sequence can get
    int n_prompt, n_seen;    // rows of the first prompt; rows of the sequence so far, this pass's included
    int step;                // 0: the prompt has just been read; t: the t-th token after it
    double ratio;            // fraction DROPPED, by strtod
    uint64_t seed;           // the run's, for `random`
    const uint8_t *kind;     // (n_seen,) by token index
    Head *head;              // (n_layers, n_kv_heads)
    float merge_self;        // 0 on entry. 0: mean and weighted; 0.5 with w = 0.5: LOOK-M's pivot
    bool renumber;           // false on entry. StreamingLLM: after the plan, turn kept keys to their slot's position
    int room;                // tokens to come on entry, after the prompt: places that every head gets beyond what stays. A page whose
                             // cache grows by less says so here, and the memory is not taken
    const char *note;        // NULL on entry. What the user should be told, once: where a page does other than it was asked to
    void *mem;               // the policy's own (Policy.mem…), zero before the prompt; saved with the cache
    int n_rows;              // admit and voters only: rows about to enter the layer
    const int *row;          // admit only: (n_rows,) their token indices, ascending
    bool *row_keep;          //        (n_rows,) false: goes no further (the last row always does). True on entry, unless another
                             //        policy of the sum has dropped the row
    uint8_t *visible;        // (n_seen,) by token index: keys that may be attended to. All 1 when a pass begins; holds for this
                             //        layer and deeper ones until a deeper admit changes it
    int n_text;              // admit at layer 0 only: columns of text_cosine, the rows of the text set
    const void *opts;        // this policy's options, parsed: see opt() in policies.c
    const Verbs *verbs;
    void *dev;               // what the verbs need; not the policy's business
};

typedef struct {             // what Elastic Cache and PrefixKV remember of a layer: theirs in Run.mem, (n_layers,)
    double rho;              // PrefixKV: fraction of the layer's rows that it drops
    int count, forget;       // PrefixKV's search: slots below the threshold; the same scaled to the budget
    int fixed_point;         // the slot that leaves while decoding
} LayerMemo;

enum {                       // Policy.flags
    SLOT_POS      = 1,       // --pos slot by default
    EVERY_TOKEN   = 2,       // acts after every token, not after the prompt alone: later rows of a chat come one by one
    DECODE_VOTES  = 4,       // decode rows vote too (h2o)
    DECODE_SCORES = 8,       // at every token this pass's votes alone, on the host (h2o:released); with DECODE_VOTES and EVERY_TOKEN
    DECODE_ADMIT  = 16,      // admit at every token (fastv:mask); with EVERY_TOKEN
    RECOMPUTE     = 32,      // no cache: the prompt with the answer so far is read anew for every token (fastv:recompute)
    SPLIT_7B      = 64,      // simignore:released-7b's cut of the prompt, text set = BOS and the option texts without letters
    SPLIT_13B     = 128,     // simignore:released-13b's: text set = the option block
    RELEASED      = 256,     // what authors' code decides: does not compose with `+`
    PRUNES_ROWS   = 512,     // acts in admit, on rows; else it acts in compress, on slots
};

typedef struct {
    const char *name;        // "elastic", "elastic:released"
    const char *paper;       // "arXiv:2407.18121"
    const char *keeps;       // what it keeps, in a few words, for -p help
    const char *options;     // "start=1,merge=on|off,conf": names and defaults (of words the first), parsed, range-checked, printed
                             // by -p help. `r` is understood everywhere and stands here only where it has a default of its own
    int  (*voters)(const Run *r, int layer); // how many of the prompt's last queries vote in this layer; NULL: none, no scores
    void (*admit)(Run *r, int layer);        // before a layer reads its rows: row_keep, visible
    void (*compress)(Run *r);                // after a pass: keep, into, w
    int flags;
    size_t mem_layer, mem_token;             // bytes of Run.mem for every layer, and for every token of the longest sequence
} Policy;

// ----------------------------------------------------------------------------
// the verbs that need the back-end

void votes(Run *r, int layer, int n, float *out);    // admit: (n_seen,) by token index what that layer's last n queries gave, summed, mean over heads (FastV)
void text_cosine(Run *r, float *out);                // admit at layer 0: (image rows, n_text) (Simignore)
void nearest_key(Run *r, int layer);                 // compress: into = the most similar kept key, w = its cosine (LOOK-M); for slots whose keep is false
void drop_lowest(Run *r, int lo, const int *from_end); // compress while decoding: in each head the lowest score in [lo, len - from_end[layer]) leaves,
                                                     //         decided on the device (H2O); a head without such a slot keeps all

// ----------------------------------------------------------------------------
// what the command line says of policies: NAME[:FORM][:key=value,key=value…], joined with +

#define MAX_PARTS 4
#define MAX_OPTS 12
typedef struct {
    const Policy *policy;
    double ratio;            // fraction dropped: its own r=, or the run's
    double opt[MAX_OPTS];    // values in the order of Policy.options; NaN: neither given nor a default
    char *text[MAX_OPTS];    // for options that are words or file names; else NULL
    double *conf;            // (n_layers,) prefixkv: fractions dropped, from conf=FILE; NULL without
} Part;
typedef struct {
    int n;                   // parts that are on; 0: full cache
    Part part[MAX_PARTS];    // row pruners first, at most one evictor last
    int flags;               // all parts' flags
    char name[256];          // as given, for figures and traces
} Chain;

// Parses `spec` for a model of n_layers layers. ratio: -r's, or NaN where neither -r nor -k stands. Ends the program with an
// error that lists what there is where a name, an option or a value makes no sense. A part with ratio 0 and no amounts of its own is off.
Chain policy_parse(const char *spec, double ratio, int n_layers);
void policy_free(Chain *chain);
void policy_help(FILE *out);                         // the table of `-p help`
extern const Policy policies[];                      // ends with a row whose name is NULL

// -k K, the fraction kept, as the fraction dropped: the decimal next to 1 - K, so that -k 0.3 is -r 0.7 to the last bit.
static inline double ratio_of_keep(double keep) { return rint(1e12 * (1 - keep)) / 1e12; }

#endif
