// kernels.h: every operation of the forward pass and of the cache, once. kernels.c implements the list for the CPU,
// kernels.cu for CUDA, in this order and under these headings; a model file calls them through `K`.
//
// Pointers are BACK-END memory (host memory for the CPU, device memory for CUDA) unless their name starts with `h_`:
// those are host memory and are the only data that crosses. All activations are float, row-major, one row a token.
// A row's bits do not depend on the rows beside it, nor on how many they are up to a point (matmul): the order of sums is fixed.
// Errors of the machine (no memory, a CUDA call that failed) end the program with `error: what: why`.

#ifndef KERNELS_H
#define KERNELS_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum { F32, F16, BF16, Q8_0, N_TYPES } Type;

// A weight matrix of a linear layer, y = x w^T. (rows = outputs, cols = inputs), row-major, rows padded to 64 bytes.
// Q8_0: data is int8; weight[o][i] = data[o][i] * scale[o][i / 32], the f16 scales in a matrix of their own beside it.
typedef struct {
    Type type;
    int rows, cols;
    size_t row_bytes;        // bytes from one row of data to the next, a multiple of 64
    const void *data;
    const uint16_t *scale;   // Q8_0: (rows, cols / 32) f16, rows scale_row_bytes(cols) apart; else NULL
} Mat;

static const int type_bytes[N_TYPES] = { 4, 2, 2, 1 };
static inline size_t pad64(size_t n) { return (n + 63) & ~(size_t)63; }
static inline size_t row_bytes(Type t, int cols) { return pad64((size_t)cols * type_bytes[t]); }
static inline size_t scale_row_bytes(int cols) { return pad64((size_t)cols / 32 * 2); }

typedef enum { ACT_NONE, ACT_GELU, ACT_QUICK_GELU } Act;

// The rows of one pass, in back-end memory. A pass is a prompt (T rows of ONE sequence, in token order) or a decode step
// (B rows, one for each of B sequences, T == B). B says how many sequences there are: 1 in a prompt.
typedef struct {
    int T, B;
    int *id;                 // (T,) token id; -1: an image row, already in x
    int *seq;                // (T,) which sequence's cache
    int *pos;                // (T,) token index in its sequence: the causal mask compares these
    int *rot;                // (T,) rotary position: a row of the cos_sin table
} Rows;

typedef struct KV KV;        // the cache; the back-end's own, see below

typedef struct {
    const char *name;        // "cpu", "cuda"

    // ------------------------------------------------------------------------
    // memory

    void *(*alloc)(size_t bytes);                            // zeroed, aligned to 64 bytes; ends the program when there is none
    void (*release)(void *p);                                // NULL is allowed
    Mat (*weight)(Type type, int rows, int cols, const void *mapped, const void *scale);  // cpu: the mapped file itself; cuda: one copy
    void (*put)(void *dst, const void *h_src, size_t bytes); // host to back-end; h_src may be reused when it returns
    void (*get)(void *h_dst, const void *src, size_t bytes); // back-end to host, waits for all work before it

    // ------------------------------------------------------------------------
    // embed: table rows for tokens        y[t] = table[id[t]]; rows with id[t] < 0 are left as they are
    //
    // y: (T, table.cols)   table: (vocab_size, dim), any type   id: (T,)
    void (*embed)(float *y, Mat table, const int *id, int T);

    // rows_copy: gather rows              y[i] = x[h_row[i]], i = 0 … n-1; h_row NULL: y[i] = x[i]
    //
    // y: (n, dim), must not overlap x unless h_row is NULL and y == x   x: (…, dim)   h_row: (n,)
    void (*rows_copy)(float *y, const float *x, const int *h_row, int n, int dim);

    // ------------------------------------------------------------------------
    // rmsnorm: scale a row to unit root mean square, then by a learned weight
    //
    //     y[t,i] = w[i] * x[t,i] / sqrt(mean_j(x[t,j]^2) + eps)
    //
    // x, y: (T, dim), may be the same buffer   w: (dim,)
    // Paper: Zhang & Sennrich 2019, arXiv:1910.07467
    void (*rmsnorm)(float *y, const float *x, const float *w, int T, int dim, float eps);

    // layernorm: y[t,i] = w[i] * (x[t,i] - mean_t) / sqrt(var_t + eps) + b[i], var with divisor dim
    //
    // x, y: (T, dim), may be the same buffer   w, b: (dim,)
    // Paper: Ba et al. 2016, arXiv:1607.06450
    void (*layernorm)(float *y, const float *x, const float *w, const float *b, int T, int dim, float eps);

    // silu_mul: the gate of a SwiGLU feed-forward     y[t,i] = silu(g) * u,  g = w13x[t,i], u = w13x[t, hidden_dim + i]
    //
    // y: (T, hidden_dim)   w13x: (T, 2 hidden_dim)   silu(g) = g / (1 + exp(-g))
    // Paper: Shazeer 2020, arXiv:2002.05202
    void (*silu_mul)(float *y, const float *w13x, int T, int hidden_dim);

    // ------------------------------------------------------------------------
    // matmul: a linear layer              y = act(x w^T + bias), or y += act(x w^T + bias) where `add`
    //
    // y: (T, w.rows)   x: (T, w.cols)   bias: (w.rows,) or NULL
    // gelu(u) = u (1 + erf(u / sqrt 2)) / 2        quick_gelu(u) = u / (1 + exp(-1.702 u))
    // Reads every weight once a pass for few rows; tiled for many: from 65 rows on the CPU, from 17 on CUDA. The sums of both ways
    // differ in their order, so that a row has the same bits beside any others below that cut, and the same again from there on.
    void (*matmul)(float *y, const float *x, Mat w, const float *bias, Act act, bool add, int T);

    // ------------------------------------------------------------------------
    // rope: turn queries and keys by their position, pairs (i, i + head_dim / 2)
    //
    //     u'[i]     = u[i] cos φ - u[i + h] sin φ      φ = rot * theta^(-2i / head_dim), h = head_dim / 2
    //     u'[i + h] = u[i + h] cos φ + u[i] sin φ
    //
    // qkv: (T, (n_heads + 2 n_kv_heads) head_dim): queries, keys, values of a row side by side; values untouched
    // cos_sin: (positions, head_dim / 2, 2) cos and sin of φ, indexed by rows->rot
    // q_scale: (positions,) factor on the rotated query (Qwen's log n attention), indexed by rows->pos; or NULL
    // Paper: Su et al. 2021, arXiv:2104.09864
    void (*rope)(float *qkv, const float *cos_sin, const float *q_scale, const Rows *rows, int n_heads, int n_kv_heads, int head_dim);

    // attend: softmax attention without mask or cache (vision tower, resampler)
    //
    //     o[t,h] = sum_j p_j v[j,h],   p = softmax_j(q[t,h] . k[j,h] / sqrt(head_dim))
    //
    // o: (Tq, n_heads head_dim)   q: (Tq rows, q_stride apart)   k, v: (Tk rows, kv_stride apart); strides in floats. CUDA: all rows
    // begin at a multiple of 16 bytes.
    void (*attend)(float *o, const float *q, int q_stride, const float *k, const float *v, int kv_stride,
                   int Tq, int Tk, int n_heads, int head_dim);

    // ------------------------------------------------------------------------
    // the cache: (layer, sequence, kv head, slot), each slot with key (already rotated), value, pos, rot and score.
    // Lengths belong to a (layer, sequence, head). Callers see slots in TOKEN ORDER (ascending pos); where they lie is
    // the back-end's business (a slot that left while decoding is a hole, which the next append fills).
    //
    // "Packed" host arrays list layer by layer, head by head, slot by slot: (layer, kv head, slot), each list as long as
    // that head's cache is now.

    KV *(*kv_new)(int n_layers, int n_kv_heads, int head_dim, int n_seqs, Type type);   // type: F32 or F16
    void (*kv_free)(KV *kv);
    // THE ONLY allocation of the cache. Afterwards every head of the sequence has a place for the slots that it holds
    // and for `extra` more, no less and no more; what it holds is moved there and the old place is returned.
    void (*kv_reserve)(KV *kv, int seq, int extra);
    void (*kv_clear)(KV *kv, int seq);                       // forget all slots; the allocation goes too
    void (*kv_copy)(KV *kv, int to, int from);               // sequence `to` becomes a copy of `from`, with its room
    size_t (*kv_bytes)(const KV *kv);                        // bytes now allocated for keys and values of all sequences
    void (*kv_lens)(const KV *kv, int seq, int *h_len);      // (n_layers, n_kv_heads) slots held; kept on the host, never waits
    // The slots of a sequence, packed, in token order: any pointer may be NULL. h_k, h_v: (…, head_dim) as float (for tests and tools).
    void (*kv_read)(const KV *kv, int seq, int *h_pos, int *h_rot, float *h_score, float *h_k, float *h_v);

    // kv_append: the keys and values of a pass join one layer's cache, score 0
    // qkv: (T, (n_heads + 2 n_kv_heads) head_dim) after rope
    void (*kv_append)(KV *kv, int layer, const float *qkv, const Rows *rows, int n_heads);

    // kv_attend: causal attention of a pass over one layer's cache, which holds the pass's own rows already
    //
    //     p[t,h,j] = exp(q[t,h] . k[g,j] / sqrt(head_dim) - lse[t,h])  for slots j with pos[j] <= rows.pos[t] that are visible
    //     o[t,h]   = sum_j p[t,h,j] v[g,j],   g = h / (n_heads / n_kv_heads)
    //
    // o: (T, n_heads head_dim)   lse: (T, n_heads) log-sum-exp of each row's logits, which kv_vote reads
    // h_visible: one list for each sequence of the CACHE (indexed by rows.seq), (tokens,) by token index, 0: hidden. NULL, or a NULL list: all visible
    // vote: decode rows add p, mean over the query heads of a group, to the scores of their slots
    void (*kv_attend)(float *o, float *lse, KV *kv, int layer, const float *qkv, const Rows *rows, int n_heads,
                      const uint8_t *const *h_visible, bool vote);

    // kv_vote: the last n queries of a PROMPT pass add what they gave to the scores
    //
    //     score[g,j] += mean over the heads h of group g of  sum_{t = T-n}^{T-1} p[t,h,j]
    //
    // Deterministic: a second pass over the keys with the first pass's lse; no T x T map is ever stored.
    void (*kv_vote)(KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads,
                    const uint8_t *const *h_visible, int n);

    // kv_column_sums: the same for the host, mean over ALL heads: h_out[j] = mean_h sum_t p[t,h,j], in token order, (slots of head 0,).
    // rows: a pass of ONE sequence. The heads of the layer must hold the same tokens (true before compression; else their slots are matched by token index).
    void (*kv_column_sums)(float *h_out, const KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads,
                           const uint8_t *const *h_visible, int n);

    // kv_map: h_out[t,j] = mean_h p[t,h,j], (T, slots of head 0): the attention map of one layer, for pictures alone
    void (*kv_map)(float *h_out, const KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads,
                   const uint8_t *const *h_visible);

    void (*kv_scores_clear)(KV *kv, int seq);                // all scores of the sequence to 0

    // kv_nearest: where a leaving slot's content goes, by the cosine of rotated keys (LOOK-M's similarity)
    //
    //     into[i] = argmax_{j kept} cos(k[i], k[j]), the first maximum;   w[i] = that cosine;   for slots i with keep[i] false
    //
    // h_keep: (heads, slots) of this layer, packed; h_into, h_w likewise: kept slots are left as they are
    void (*kv_nearest)(int *h_into, float *h_w, const KV *kv, int seq, int layer, const bool *h_keep);

    // kv_apply: carry a plan out: merge from unmerged rows, then the slots with keep false leave (in place, or into holes)
    //
    //     X[j] <- (X[j] + sum_i (w[i] X[i] + self X[j])) / (1 + n)      X in {key, value}, over the n slots i with into[i] = j
    //
    // summed in ascending i in float. All arrays packed; h_into, h_w NULL: nothing merges. A kept slot may be a source too.
    // cos_sin: afterwards turn every kept key from its rotary position to its slot (StreamingLLM), rot = slot; NULL: leave them.
    void (*kv_apply)(KV *kv, int seq, const bool *h_keep, const int *h_into, const float *h_w, float self, const float *cos_sin);

    // kv_drop: one slot of every head leaves: h_slot (n_layers, n_kv_heads) in token order, -1: none of this head
    void (*kv_drop)(KV *kv, int seq, const int *h_slot);

    // kv_drop_lowest: in every head the slot with the lowest score among [lo, len - from_end) in token order leaves (ties: the
    // first); a head without a candidate keeps all. Decided on the device: lengths after it are known without asking.
    void (*kv_drop_lowest)(KV *kv, int seq, int lo, int from_end);

    // cosine: h_out[i,c] = a[i] . b[c] / (max(|a[i]|, 1e-12) max(|b[c]|, 1e-12))      a: (n, dim)  b: (m, dim)  h_out: (n, m)
    void (*cosine)(float *h_out, const float *a, int n, const float *b, int m, int dim);

    // ------------------------------------------------------------------------
    // a decode step as one CUDA graph:  if (!K->replay(key)) { K->record(key); forward(…); K->stop(); }
    // key: anything that names the shape of the pass and its pointers, not 0. The CPU has none: replay is false, the other two do nothing.
    bool (*replay)(uint64_t key);
    void (*record)(uint64_t key);
    void (*stop)(void);
} Kernels;

extern const Kernels cpu;
const Kernels *cuda(void);   // NULL: not built in, or no device; the reason was printed
extern const Kernels *K;     // the back-end in use: set once by -b, by each test for itself

#endif
