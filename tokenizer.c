// tokenizer.c: text to token ids and back, by SentencePiece's BPE, the tokenizer of LLaMA and so of LLaVA.
//
// Encoding starts from single characters and merges, again and again, the neighbours whose union is the best-scored piece
// of the vocabulary. Nothing is trained here and nothing is guessed: ids are those of the sentencepiece library.
//
//     "on mat" -> ▁on▁mat -> ▁ o n ▁ m a t -> … -> ▁on ▁mat
//
// Left out: tiktoken's BPE (kind 2); special tokens and templates, which the model files put between texts; SentencePiece's
// other model (unigram), normalisers, user-defined and unused pieces: a vocabulary that has them is refused.
//
// Alone: tests/test_tokenizer.c (build/test_tokenizer) and tests/tokenizer_cli.c use this file and nothing else of the engine.
//
// Paper: Sennrich et al. 2016, arXiv:1508.07909 (BPE); Kudo & Richardson 2018, arXiv:1808.06226 (SentencePiece)

#include <math.h>
#include <string.h>
#include "error.h"
#include "tokenizer.h"

#define HINT "export the checkpoint again with export/llava.py"
#define MAX_PIECES (1 << 20)
#define SPACE "\xE2\x96\x81"      // "▁" (U+2581), which stands for a space in all pieces
#define BROKEN "\xEF\xBF\xBD"     // U+FFFD, which stands for a byte that is not UTF-8
#define UNKNOWN_TEXT " \xE2\x81\x87 "    // what the library decodes <unk> to: " ⁇ "

enum { NORMAL = 1, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE };      // SentencePiece's own numbers
typedef struct { float score; uint32_t type, end; } Piece;              // as in the section; `end` in Tokenizer.text
typedef struct { uint32_t kind, n, bytes, zero; } Section;              // its head

struct Tokenizer {
    int n, max_piece;         // pieces; bytes of the longest
    Piece *piece;             // (n,)
    const char *text;         // all pieces' texts; lies in the mapped model file
    int byte_id[256];         // the piece <0xNN> of each byte
    uint32_t mask;            // hash table of the normal pieces: its size, a power of two >= 2 n, minus one
    int *table;               // (mask + 1,) id + 1; 0: free
};

// ----------------------------------------------------------------------------
// UTF-8 (table 3-7 of the Unicode standard): no surrogates, nothing longer than it need be, nothing past U+10FFFF

// Bytes of the character at s; 0: not a character; -1: n bytes end before it does.
static int utf8(const char *s, size_t n) {
    const uint8_t *b = (const uint8_t *)s;
    int len = b[0] < 0x80 ? 1 : b[0] < 0xC2 ? 0 : b[0] < 0xE0 ? 2 : b[0] < 0xF0 ? 3 : b[0] < 0xF5 ? 4 : 0;
    for (int i = 1; i < len; i++) {
        if ((size_t)i == n) return -1;
        uint8_t lo = 0x80, hi = 0xBF;
        if (i == 1 && b[0] == 0xE0) lo = 0xA0;
        if (i == 1 && b[0] == 0xED) hi = 0x9F;
        if (i == 1 && b[0] == 0xF0) lo = 0x90;
        if (i == 1 && b[0] == 0xF4) hi = 0x8F;
        if (b[i] < lo || b[i] > hi) return 0;
    }
    return len;
}

// ----------------------------------------------------------------------------
// the vocabulary

int tokenizer_size(const Tokenizer *t) { return t->n; }
int tokenizer_max_piece(const Tokenizer *t) { return t->max_piece; }

const char *tokenizer_piece(const Tokenizer *t, int id, int *len) {
    if (id < 0 || id >= t->n) { *len = 0; return NULL; }
    uint32_t start = id ? t->piece[id - 1].end : 0;
    *len = (int)(t->piece[id].end - start);
    return t->text + start;
}

// Where in the table a text stands, or where it would.
static uint32_t find(const Tokenizer *t, const char *text, int len) {
    uint32_t hash = 2166136261u, at;    // FNV-1a
    for (int i = 0; i < len; i++) hash = (hash ^ (uint8_t)text[i]) * 16777619u;
    for (at = hash & t->mask; t->table[at]; at = (at + 1) & t->mask) {
        int n;
        const char *piece = tokenizer_piece(t, t->table[at] - 1, &n);
        if (n == len && !memcmp(piece, text, len)) break;
    }
    return at;
}

// The normal piece of this text, or -1.
static int lookup(const Tokenizer *t, const char *text, int len) {
    return len > t->max_piece ? -1 : t->table[find(t, text, len)] - 1;
}

// The byte that a piece "<0xNN>" stands for, or -1.
static int byte_of(const char *s, int len) {
    static const char digits[] = "0123456789ABCDEF";
    if (len != 6 || memcmp(s, "<0x", 3) || s[5] != '>') return -1;
    const char *hi = memchr(digits, s[3], 16), *lo = memchr(digits, s[4], 16);
    return hi && lo ? (int)(hi - digits) * 16 + (int)(lo - digits) : -1;
}

// One piece, whose text is known to lie in the section: checks it and enters it where encoding looks for it.
static void add_piece(Tokenizer *t, int id, const char *path) {
    int len, byte;
    const char *s = tokenizer_piece(t, id, &len);
    const Piece *p = &t->piece[id];
    if (!isfinite(p->score)) die(HINT, "%s: tokenizer: the score of piece %d is not a number", path, id);
    for (int i = 0, c; i < len; i += c)
        if ((c = utf8(s + i, len - i)) <= 0) die(HINT, "%s: tokenizer: the text of piece %d is not UTF-8", path, id);
    switch (p->type) {
    case NORMAL: {
        uint32_t at = find(t, s, len);
        if (t->table[at]) die(HINT, "%s: tokenizer: pieces %d and %d have the same text", path, t->table[at] - 1, id);
        t->table[at] = id + 1;
        break;
    }
    case BYTE:
        byte = byte_of(s, len);
        if (byte < 0) die(HINT, "%s: tokenizer: piece %d should stand for a byte, like <0x0A>", path, id);
        if (t->byte_id[byte] >= 0) die(HINT, "%s: tokenizer: pieces %d and %d stand for the same byte", path, t->byte_id[byte], id);
        t->byte_id[byte] = id;
        break;
    case UNKNOWN: case CONTROL:    // no text becomes one of these
        break;
    case USER_DEFINED: case UNUSED:
        die("take a tokenizer.model without them, as LLaMA's", "%s: tokenizer: piece %d is user-defined or unused, which this program cannot encode", path, id);
    default:
        die(HINT, "%s: tokenizer: piece %d has the unknown type %u", path, id, p->type);
    }
}

Tokenizer *tokenizer_open(const uint8_t *data, size_t bytes, const char *path) {
    Section s;
    if (bytes < sizeof s) die(HINT, "%s: tokenizer: too short (%zu bytes)", path, bytes);
    memcpy(&s, data, sizeof s);
    if (s.kind == 2) die("LLaVA's models have the other kind", "%s: tokenizer: of kind 2 (tiktoken); this version reads kind 1 (SentencePiece) only", path);
    if (s.kind != 1) die(HINT, "%s: tokenizer: unknown kind %u", path, s.kind);
    if (s.n < 1 || s.n > MAX_PIECES) die(HINT, "%s: tokenizer: %u pieces, allowed are 1 to %d", path, s.n, MAX_PIECES);
    if (s.zero || s.bytes > INT32_MAX || sizeof s + s.n * sizeof(Piece) + s.bytes != bytes)
        die(HINT, "%s: tokenizer: %u pieces and %u bytes of text do not make up its %zu bytes", path, s.n, s.bytes, bytes);

    Tokenizer *t = need(1, sizeof *t);
    t->n = (int)s.n;
    t->piece = need(s.n, sizeof *t->piece);
    memcpy(t->piece, data + sizeof s, s.n * sizeof *t->piece);
    t->text = (const char *)data + sizeof s + s.n * sizeof *t->piece;
    for (uint32_t i = 0, start = 0; i < s.n; start = t->piece[i++].end) {
        uint32_t end = t->piece[i].end;
        if (end <= start || end > s.bytes) die(HINT, "%s: tokenizer: the text of piece %u ends at %u, but starts at %u of %u bytes", path, i, end, start, s.bytes);
        if ((int)(end - start) > t->max_piece) t->max_piece = (int)(end - start);
    }
    if (t->piece[s.n - 1].end != s.bytes) die(HINT, "%s: tokenizer: the texts have %u bytes, %u of them in pieces", path, s.bytes, t->piece[s.n - 1].end);

    uint32_t size = 2;
    while (size < 2 * s.n) size *= 2;
    t->mask = size - 1;
    t->table = need(size, sizeof *t->table);
    for (int b = 0; b < 256; b++) t->byte_id[b] = -1;
    for (int id = 0; id < t->n; id++) add_piece(t, id, path);
    for (int b = 0; b < 256; b++)
        if (t->byte_id[b] < 0) die(HINT, "%s: tokenizer: no piece for the byte <0x%02X> (a vocabulary without byte fallback?)", path, b);
    return t;
}

void tokenizer_close(Tokenizer *t) {
    free(t->piece);
    free(t->table);
    free(t);
}

// ----------------------------------------------------------------------------
// encoding: merge the best-scored pair of neighbours, until no pair makes a piece; among equals the leftmost
//
// All pairs wait in a heap, so n characters take O(n log n) steps. A merge changes its neighbours' pairs; their old entries stay
// in the heap and are known as stale by their length, because the span from a symbol to the end of the next one only grows.

typedef struct { int start, len, next, prev, id; } Symbol;    // bytes of the text; len 0: merged away; next, prev: -1 at the ends
typedef struct { float score; int left, len, id; } Pair;      // the symbol `left` and its next: len bytes together, the piece id

typedef struct {
    const Tokenizer *t;
    char *text;               // (3 len + 3,) the input, spaces as "▁", broken bytes as U+FFFD
    Symbol *sym;              // (len + 1,) one a character
    Pair *heap;               // (2 len + 2,) n - 1 pairs at first, and each of at most n - 1 merges takes one out and puts two in
    int bytes, n_sym, n_heap;
} Encoder;

static bool before(const Pair *a, const Pair *b) { return a->score > b->score || (a->score == b->score && a->left < b->left); }

static void push(Encoder *e, Pair p) {
    int i = e->n_heap++;
    for (; i && before(&p, &e->heap[(i - 1) / 2]); i = (i - 1) / 2) e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = p;
}

static Pair pop(Encoder *e) {
    Pair top = e->heap[0], last = e->heap[--e->n_heap];
    int i = 0;
    for (int child; (child = 2 * i + 1) < e->n_heap; i = child) {
        if (child + 1 < e->n_heap && before(&e->heap[child + 1], &e->heap[child])) child++;
        if (!before(&e->heap[child], &last)) break;
        e->heap[i] = e->heap[child];
    }
    e->heap[i] = last;
    return top;
}

// Puts the pair of `left` and its next into the heap, if together they make a piece.
static void offer(Encoder *e, int left) {
    if (left < 0 || e->sym[left].next < 0) return;
    int len = e->sym[left].len + e->sym[e->sym[left].next].len;
    int id = lookup(e->t, e->text + e->sym[left].start, len);
    if (id >= 0) push(e, (Pair){ e->t->piece[id].score, left, len, id });
}

static void add_character(Encoder *e, const char *c, int len) {
    int i = e->n_sym++;
    memcpy(e->text + e->bytes, c, len);
    e->sym[i] = (Symbol){ e->bytes, len, -1, i - 1, lookup(e->t, c, len) };
    if (i) e->sym[i - 1].next = i;
    e->bytes += len;
}

static void merge_all(Encoder *e) {
    for (int i = 0; i < e->n_sym; i++) offer(e, i);
    while (e->n_heap) {
        Pair p = pop(e);
        Symbol *left = &e->sym[p.left];
        if (left->len == 0 || left->next < 0) continue;
        Symbol *right = &e->sym[left->next];
        if (left->len + right->len != p.len) continue;    // stale
        left->len = p.len;
        left->id = p.id;
        left->next = right->next;
        right->len = 0;
        if (left->next >= 0) e->sym[left->next].prev = p.left;
        offer(e, left->prev);
        offer(e, p.left);
    }
}

int tokenizer_encode(const Tokenizer *t, const char *text, size_t len, bool prefix, int *ids, int cap) {
    if (len == 0) return 0;
    if (len > INT32_MAX / 3 - 3) die("give a shorter text", "a text of %zu bytes is too long", len);
    Encoder e = { .t = t, .text = need(len + 1, 3), .sym = need(len + 1, sizeof(Symbol)), .heap = need(len + 1, 2 * sizeof(Pair)) };
    if (prefix) add_character(&e, SPACE, 3);
    for (size_t i = 0; i < len; ) {
        int c = utf8(text + i, len - i);
        if (c <= 0) add_character(&e, BROKEN, 3);
        else if (text[i] == ' ') add_character(&e, SPACE, 3);
        else add_character(&e, text + i, c);
        i += c > 0 ? c : 1;
    }
    merge_all(&e);
    int n = 0;
    for (int i = 0; i >= 0; i = e.sym[i].next) {
        const Symbol *s = &e.sym[i];
        if (s->id >= 0) { if (n < cap) ids[n] = s->id; n++; continue; }
        for (int b = 0; b < s->len; b++, n++)    // a character that is no piece: its bytes
            if (n < cap) ids[n] = t->byte_id[(uint8_t)e.text[s->start + b]];
    }
    free(e.text);
    free(e.sym);
    free(e.heap);
    return n;
}

// ----------------------------------------------------------------------------
// decoding: "▁" is a space again, the first one of all is dropped; bytes wait until they make a character

// Writes the characters that stand complete among the held bytes; with `end` also what is left, as U+FFFD a byte.
static int drain(Decoder *d, bool end, char *out) {
    int n = 0, i = 0;
    while (i < d->n) {
        int c = utf8((char *)d->held + i, d->n - i);
        if (c < 0 && !end) break;
        memcpy(out + n, c > 0 ? (char *)d->held + i : BROKEN, c > 0 ? c : 3);
        n += c > 0 ? c : 3;
        i += c > 0 ? c : 1;
    }
    memmove(d->held, d->held + i, d->n -= i);
    return n;
}

int tokenizer_decode(const Tokenizer *t, Decoder *d, int id, char *out) {
    int len, n;
    const char *s = tokenizer_piece(t, id, &len);
    uint32_t type = s ? t->piece[id].type : CONTROL;    // the end, or a row of the model that has no piece: no text
    if (type == BYTE) {
        d->started = true;
        d->held[d->n++] = (uint8_t)byte_of(s, len);
        return drain(d, false, out);
    }
    n = drain(d, true, out);    // any other piece ends an unfinished character
    if (type == CONTROL) return n;
    if (type == UNKNOWN) { s = UNKNOWN_TEXT; len = sizeof UNKNOWN_TEXT - 1; }
    for (int i = 0; i < len; ) {
        bool space = len - i >= 3 && !memcmp(s + i, SPACE, 3);
        if (!space) out[n++] = s[i];
        else if (d->started) out[n++] = ' ';
        d->started = true;
        i += space ? 3 : 1;
    }
    return n;
}
