// test_tokenizer.c: tokenizer.c against ids stored from the sentencepiece library, against a naive version, and against
// sections that are broken in every way we could think of and a thousand that nobody thought of.
//
//     build/test_tokenizer [MODEL.bin [mutations]]        from the repository's root; models/scenes-llava.bin unless given
//
// The stored strings (tests/tokenizer_strings.txt) belong to that model's vocabulary; tests/tokenizer_parity.py --store writes them.

#include <sys/wait.h>
#include "model.h"
#include "tokenizer.h"
#include "test.h"

#define STORED "tests/tokenizer_strings.txt"
#define MAX_TEXT 4096

enum { NORMAL = 1, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE };

// ----------------------------------------------------------------------------
// the plain versions

// One character by its code point; the number of bytes, or 0 where there is none.
static int utf8_ref(const uint8_t *s, size_t n) {
    static const uint32_t least[5] = { 0, 0, 0x80, 0x800, 0x10000 };
    int len = s[0] < 0x80 ? 1 : s[0] >> 5 == 6 ? 2 : s[0] >> 4 == 14 ? 3 : s[0] >> 3 == 30 ? 4 : 0;
    if (len == 0 || (size_t)len > n) return 0;
    uint32_t c = len == 1 ? s[0] : s[0] & (0x7F >> len);
    for (int i = 1; i < len; i++) {
        if (s[i] >> 6 != 2) return 0;
        c = c << 6 | (s[i] & 63);
    }
    return c < least[len] || (c >= 0xD800 && c < 0xE000) || c > 0x10FFFF ? 0 : len;
}

// The text with every broken byte replaced by U+FFFD; with `space` also every space by "▁".
static size_t clean_ref(char *out, const char *s, size_t n, bool space) {
    size_t m = 0;
    for (size_t i = 0; i < n; ) {
        int c = utf8_ref((const uint8_t *)s + i, n - i);
        const char *from = c == 0 ? "\xEF\xBF\xBD" : space && s[i] == ' ' ? "▁" : NULL;
        memcpy(out + m, from ? from : s + i, from ? 3 : c);
        m += from ? 3 : c;
        i += c ? c : 1;
    }
    return m;
}

typedef struct { const uint8_t *data; size_t bytes; uint32_t n; } Section;
typedef struct { float score; uint32_t type, end; } Entry;

static Entry entry(const Section *s, uint32_t i) {
    Entry e;
    memcpy(&e, s->data + 16 + 12 * (size_t)i, sizeof e);
    return e;
}
static const char *text_of(const Section *s, uint32_t i, int *len) {
    uint32_t start = i ? entry(s, i - 1).end : 0;
    *len = (int)(entry(s, i).end - start);
    return (const char *)s->data + 16 + 12 * (size_t)s->n + start;
}
// The piece of a type with this text, or -1; by looking at all of them.
static int piece_ref(const Section *s, uint32_t type, const char *text, int len) {
    for (uint32_t i = 0; i < s->n; i++) {
        int n;
        const char *p = text_of(s, i, &n);
        if (entry(s, i).type == type && n == len && !memcmp(p, text, len)) return (int)i;
    }
    return -1;
}

// Tries every pair of neighbours, merges the best, and begins again.
static int encode_ref(const Section *s, const char *text, size_t len, bool prefix, int *ids) {
    static char clean[3 * MAX_TEXT + 3];
    static int end[3 * MAX_TEXT + 3];    // where each symbol ends
    if (len == 0) return 0;
    size_t bytes = prefix ? 3 : 0;
    memcpy(clean, "▁", bytes);
    bytes += clean_ref(clean + bytes, text, len, true);
    int n = 0, n_ids = 0;
    for (size_t i = 0; i < bytes; ) end[n++] = (int)(i += utf8_ref((uint8_t *)clean + i, bytes - i));
    for (;;) {
        int best = -1;
        float best_score = 0;
        for (int i = 0; i + 1 < n; i++) {
            int start = i ? end[i - 1] : 0, id = piece_ref(s, NORMAL, clean + start, end[i + 1] - start);
            if (id >= 0 && (best < 0 || entry(s, id).score > best_score)) { best = i; best_score = entry(s, id).score; }
        }
        if (best < 0) break;
        for (int i = best; i + 1 < n; i++) end[i] = end[i + 1];
        n--;
    }
    for (int i = 0; i < n; i++) {
        int start = i ? end[i - 1] : 0, id = piece_ref(s, NORMAL, clean + start, end[i] - start);
        if (id >= 0) ids[n_ids++] = id;
        else for (int b = start; b < end[i]; b++) {
            char name[8];
            snprintf(name, sizeof name, "<0x%02X>", (uint8_t)clean[b]);
            ids[n_ids++] = piece_ref(s, BYTE, name, 6);
        }
    }
    return n_ids;
}

// ----------------------------------------------------------------------------
// helpers

static bool same(const int *a, int n, const int *b, int m) { return n == m && !memcmp(a, b, n * sizeof *a); }

// Decodes id by id; `whole`: every step gave whole characters within its bound.
static size_t decode_all(const Tokenizer *t, const int *ids, int n, char *out, bool *whole) {
    Decoder d = { 0 };
    size_t bytes = 0;
    *whole = true;
    for (int i = 0; i <= n; i++) {
        int m = tokenizer_decode(t, &d, i < n ? ids[i] : -1, out + bytes);
        for (int k = 0, c; k < m; k += c)
            if ((c = utf8_ref((uint8_t *)out + bytes + k, m - k)) == 0) { *whole = false; break; }
        if (m > tokenizer_max_piece(t) + 16) *whole = false;
        bytes += m;
    }
    return bytes;
}

static size_t unescape(char *out, const char *s) {
    size_t n = 0;
    while (*s) {
        unsigned b;
        if (s[0] == '\\' && s[1] == 'x' && sscanf(s + 2, "%2x", &b) == 1) { out[n++] = (char)b; s += 4; }
        else out[n++] = *s++;
    }
    return n;
}

// A text of characters that the vocabulary may or may not know, with spaces and broken bytes.
static size_t random_text(uint64_t *seed, const char *const *alphabet, int n_alphabet, char *out, int n) {
    size_t m = 0;
    for (int i = 0; i < n; i++) {
        const char *c = alphabet[rnd_int(seed, n_alphabet)];
        m += (size_t)snprintf(out + m, 8, "%s", c);
    }
    return m;
}

// ----------------------------------------------------------------------------
// stored strings

static void test_stored(const Tokenizer *t, const Section *s) {
    static char text[MAX_TEXT], want[MAX_TEXT * 4], got[MAX_TEXT * 64];
    static int ids[3 * MAX_TEXT + 3], want_ids[3 * MAX_TEXT + 3];
    FILE *f = fopen(STORED, "r");
    check(f != NULL, "%s: %s (run this from the repository's root)", STORED, strerror(errno));
    if (!f) return;
    uint64_t hash = 0xcbf29ce484222325ull;    // FNV-1a
    for (size_t i = 0; i < s->bytes; i++) hash = (hash ^ s->data[i]) * 0x100000001b3ull;
    char *line = NULL;
    size_t room = 0;
    int n_lines = 0, n_heads = 0;
    for (ssize_t len; (len = getline(&line, &room, f)) > 0; ) {
        if (line[len - 1] == '\n') line[len - 1] = 0;
        if (line[0] == '#') continue;
        char *field[4], *rest = line;
        int n_fields = 0;
        while (n_fields < 4 && rest) field[n_fields++] = strsep(&rest, "\t");
        if (!strcmp(field[0], "vocabulary")) {
            check(n_fields == 3 && strtoul(field[1], NULL, 10) == s->n && strtoull(field[2], NULL, 16) == hash,
                  "%s belongs to another vocabulary: run tests/tokenizer_parity.py --store MODEL.bin", STORED);
            n_heads++;
            continue;
        }
        n_lines++;
        check(n_fields == 4 && strlen(field[1]) < MAX_TEXT && strlen(field[3]) < sizeof want, "%s: string %d is broken", STORED, n_lines);
        if (n_fields < 4) continue;
        int n_want = 0;
        for (char *p = field[2]; *p; ) want_ids[n_want++] = (int)strtol(p, &p, 10);
        size_t text_bytes = unescape(text, field[1]), want_bytes = unescape(want, field[3]);
        if (field[0][0] != 'd') {
            bool prefix = field[0][0] == 'e';
            int n = tokenizer_encode(t, text, text_bytes, prefix, ids, 3 * MAX_TEXT + 3);
            check(same(ids, n, want_ids, n_want), "ids of \"%s\" (%s)", field[1], field[0]);
            check(tokenizer_encode(t, text, text_bytes, prefix, NULL, 0) == n, "count alone of \"%s\"", field[1]);
            n = encode_ref(s, text, text_bytes, prefix, ids);
            check(same(ids, n, want_ids, n_want), "ids of \"%s\" (%s) by the naive version", field[1], field[0]);
        }
        bool whole;
        size_t n_got = decode_all(t, want_ids, n_want, got, &whole);
        check(n_got == want_bytes && !memcmp(got, want, n_got), "decoded: \"%.*s\" instead of \"%s\"", (int)n_got, got, field[3]);
        check(whole, "decoding \"%s\" gave half a character", field[3]);
    }
    check(n_heads == 1 && n_lines == 300, "%s: %d strings, expected 300", STORED, n_lines);
    free(line);
    fclose(f);
}

// ----------------------------------------------------------------------------
// bytes to characters, one at a time

static void test_streaming(const Tokenizer *t, const Section *s) {
    static const char *const parts[] = { "a", " ", "é", "▁", "日", "🙂", "\xE2", "\x82", "\xAC", "\xF0", "\x9F", "\xED", "\xA0", "\xC0", "\xF4", "\x90", "\x80", "\xFF", "\xE0", "\x9F" };
    uint64_t seed = 1;
    char text[128], want[384], got[MAX_TEXT];
    int ids[128], byte[256];
    for (int b = 0; b < 256; b++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", b);
        byte[b] = piece_ref(s, BYTE, name, 6);
    }
    for (int round = 0; round < 2000; round++) {
        size_t n = random_text(&seed, parts, 20, text, 1 + rnd_int(&seed, 12));
        for (size_t i = 0; i < n; i++) ids[i] = byte[(uint8_t)text[i]];
        size_t n_want = clean_ref(want, text, n, false);
        bool whole;
        size_t n_got = decode_all(t, ids, (int)n, got, &whole);
        check(n_got == n_want && !memcmp(got, want, n_got) && whole, "bytes of round %d: \"%.*s\" instead of \"%.*s\"", round, (int)n_got, got, (int)n_want, want);
    }
    const char *euro = "€🙂";    // a character comes as soon as its last byte is there
    Decoder d = { 0 };
    for (int i = 0; i < 7; i++) {
        int n = tokenizer_decode(t, &d, byte[(uint8_t)euro[i]], got);
        check(n == (i == 2 ? 3 : i == 6 ? 4 : 0), "byte %d of two characters gave %d bytes", i, n);
    }
    d = (Decoder){ 0 };
    check(tokenizer_decode(t, &d, tokenizer_size(t), got) == 0 && tokenizer_decode(t, &d, INT32_MAX, got) == 0 && !d.started, "an id without a piece has text");
}

// ----------------------------------------------------------------------------
// sizes

static void test_sizes(const Tokenizer *t) {
    int ids[64], n = tokenizer_encode(t, "What is left of it?", 19, true, NULL, 0), len;
    for (int cap = 0; cap <= n; cap++) {
        for (int i = 0; i < 64; i++) ids[i] = -7;
        int m = tokenizer_encode(t, "What is left of it?", 19, true, ids, cap);
        check(n > 4 && m == n && ids[cap] == -7 && (!cap || ids[cap - 1] >= 0), "cap %d: %d ids", cap, m);
    }
    check(tokenizer_encode(t, "", 0, true, ids, 64) == 0 && tokenizer_encode(t, NULL, 0, false, ids, 64) == 0, "the empty text has ids");
    check(!tokenizer_piece(t, -1, &len) && len == 0 && !tokenizer_piece(t, tokenizer_size(t), &len) && len == 0, "pieces past the end");

    int big = 1000000;    // rescanning at every merge would take days
    char *text = malloc(big), *got = malloc(3 * (size_t)big + 64);
    int *many = malloc((3 * (size_t)big + 3) * sizeof *many);
    uint64_t seed = 2;
    for (int kind = 0; kind < 3; kind++) {
        for (int i = 0; i < big; i++) text[i] = kind == 0 ? ' ' : kind == 1 ? "abcde the of\n"[rnd_int(&seed, 13)] : (char)0xFF;
        n = tokenizer_encode(t, text, big, true, many, 3 * big + 3);
        bool whole;
        size_t bytes = decode_all(t, many, n, got, &whole);
        check(n <= 3 * big + 3 && bytes == (kind == 2 ? 3 : 1) * (size_t)big && whole, "long text %d: %d ids, %zu bytes", kind, n, bytes);
        if (kind < 2) check(!memcmp(got, text, big), "long text %d did not come back", kind);
    }
    free(text);
    free(got);
    free(many);
}

// ----------------------------------------------------------------------------
// made vocabularies: sections of our own

typedef struct { uint8_t data[1 << 16]; Section s; char text[1 << 14]; Entry entry[1024]; uint32_t bytes; } Made;

static void add(Made *m, const char *text, float score, uint32_t type) {
    size_t n = strlen(text);
    memcpy(m->text + m->bytes, text, n);
    m->entry[m->s.n++] = (Entry){ score, type, m->bytes += (uint32_t)n };
}
static void finish_made(Made *m) {
    uint32_t head[4] = { 1, m->s.n, m->bytes, 0 };
    memcpy(m->data, head, 16);
    memcpy(m->data + 16, m->entry, 12 * (size_t)m->s.n);
    memcpy(m->data + 16 + 12 * (size_t)m->s.n, m->text, m->bytes);
    m->s.data = m->data;
    m->s.bytes = 16 + 12 * (size_t)m->s.n + m->bytes;
}
// What every vocabulary needs: <unk>, and the bytes but `without` (-1: all).
static void begin_made(Made *m, int without) {
    memset(m, 0, sizeof *m);
    add(m, "<unk>", 0, UNKNOWN);
    add(m, "</s>", 0, CONTROL);
    for (int b = 0; b < 256; b++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", b);
        if (b != without) add(m, name, 0, BYTE);
    }
}

static void test_made(void) {
    static const char *const parts[] = { "a", "b", "▁", "é", " ", "\xE2", "🙂" };
    static Made m;
    uint64_t seed = 3;
    char text[256];
    int ids[800], want[800];
    for (int round = 0; round < 40; round++) {    // scores of few values: ties decide
        begin_made(&m, -1);
        int n_pieces = 1 + rnd_int(&seed, 60), n_scores = 1 + rnd_int(&seed, 6);
        for (int i = 0; i < n_pieces; i++) {
            random_text(&seed, parts, 4, text, 1 + rnd_int(&seed, 5));
            bool there = false;
            for (uint32_t k = 258, start = m.entry[257].end; k < m.s.n; start = m.entry[k++].end)
                there |= m.entry[k].end - start == strlen(text) && !memcmp(m.text + start, text, strlen(text));
            if (!there) add(&m, text, -(float)rnd_int(&seed, n_scores), NORMAL);
        }
        finish_made(&m);
        Tokenizer *t = tokenizer_open(m.data, m.s.bytes, "made");
        for (int i = 0; i < 100; i++) {
            size_t len = random_text(&seed, parts, 7, text, rnd_int(&seed, 40));
            bool prefix = i % 2;
            int n = tokenizer_encode(t, text, len, prefix, ids, 800), n_want = encode_ref(&m.s, text, len, prefix, want);
            check(same(ids, n, want, n_want), "made vocabulary %d: \"%.*s\" has other ids than the naive version's", round, (int)len, text);
        }
        tokenizer_close(t);
    }
    // Merges lead up to the texts of the byte <0x41> and of </s>, which are not for texts to become: "<0x41" ">" and "</s" ">".
    begin_made(&m, -1);
    static const char *const steps[] = { "<", ">", "0", "x", "4", "1", "/", "s", "<0", "<0x", "<0x4", "<0x41", "</", "</s" };
    for (int i = 0; i < 14; i++) add(&m, steps[i], -(float)i, NORMAL);
    finish_made(&m);
    Tokenizer *t = tokenizer_open(m.data, m.s.bytes, "made");
    const int special[] = { 258 + 11, 258 + 1, 258 + 13, 258 + 1 };
    int n = tokenizer_encode(t, "<0x41></s>", 10, false, ids, 800);
    check(same(ids, n, special, 4), "the text \"<0x41></s>\" became special");
    tokenizer_close(t);
}

// ----------------------------------------------------------------------------
// broken sections: read in a child, with a page behind their last byte that must not be touched

// The child's exit status (-1: a signal); what it wrote to stderr in `message`.
static int try_section(const uint8_t *data, size_t bytes, char *message, size_t room) {
    static const char *const texts[] = { "What is left of the red circle?", "  a▁b \xFF\xE2\x82 日本🙂\n\x00", "</s><0x0A>" };
    int ends[2];
    fflush(stdout);
    if (pipe(ends)) die(NULL, "pipe: %s", strerror(errno));
    pid_t child = fork();
    if (child < 0) die(NULL, "fork: %s", strerror(errno));
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        size_t page = (size_t)sysconf(_SC_PAGESIZE), size = (bytes + page - 1) / page * page;
        uint8_t *p = mmap(NULL, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED || mprotect(p + size, page, PROT_NONE)) _exit(77);
        p += size - bytes;
        memcpy(p, data, bytes);
        Tokenizer *t = tokenizer_open(p, bytes, "broken");
        int ids[256], n_ids = 0;
        char *out = need(1, tokenizer_max_piece(t) + 16);
        Decoder d = { 0 };
        for (int i = 0; i < 3; i++) {
            n_ids = tokenizer_encode(t, texts[i], strlen(texts[i]), i != 1, ids, 256);
            for (int k = 0; k < n_ids && k < 256; k++) if (ids[k] < 0 || ids[k] >= tokenizer_size(t)) _exit(78);
        }
        for (int id = 0; id < tokenizer_size(t) + 2; id++) tokenizer_decode(t, &d, id, out);
        tokenizer_decode(t, &d, -1, out);
        free(out);
        tokenizer_close(t);
        exit(0);
    }
    close(ends[1]);
    size_t n = 0;
    for (ssize_t got; (got = read(ends[0], message + n, room - 1 - n)) > 0; ) n += (size_t)got;
    message[n] = 0;
    close(ends[0]);
    int status;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void expect_error(const uint8_t *data, size_t bytes, const char *part) {
    char message[4096];
    int status = try_section(data, bytes, message, sizeof message);
    check(status == 1 && !strncmp(message, "error: broken: tokenizer: ", 26) && strstr(message, part) && strstr(message, "hint:"),
          "expected \"%s\", got status %d and \"%s\"", part, status, message);
}

static void put_u32(uint8_t *data, size_t offset, uint32_t value) { memcpy(data + offset, &value, 4); }

static void test_broken(void) {
    static Made m;
    uint8_t *d = m.data;
    size_t n, last;    // bytes; the last entry
#define FRESH() (begin_made(&m, -1), add(&m, "a", -1, NORMAL), add(&m, "ab", -2, NORMAL), finish_made(&m), n = m.s.bytes, last = 16 + 12 * (size_t)(m.s.n - 1))
    FRESH();
    char message[4096];
    check(try_section(d, n, message, sizeof message) == 0 && !message[0], "a good section is refused: %s", message);
    expect_error(d, 0, "too short");
    expect_error(d, 15, "too short");
    expect_error(d, 16, "do not make up");
    expect_error(d, n - 1, "do not make up");
    expect_error(d, n + 1, "do not make up");
    put_u32(d, 0, 0); expect_error(d, n, "unknown kind 0");
    put_u32(d, 0, 2); expect_error(d, n, "tiktoken");
    FRESH(); put_u32(d, 4, 0); expect_error(d, n, "0 pieces, allowed");
    put_u32(d, 8, 0); expect_error(d, 16, "0 pieces, allowed");
    put_u32(d, 4, (1 << 20) + 1); expect_error(d, n, "1048577 pieces, allowed");
    put_u32(d, 4, UINT32_MAX); expect_error(d, n, "4294967295 pieces, allowed");
    put_u32(d, 4, m.s.n + 1); expect_error(d, n, "do not make up");
    FRESH(); put_u32(d, 8, UINT32_MAX); expect_error(d, n, "do not make up");
    FRESH(); put_u32(d, 12, 1); expect_error(d, n, "do not make up");
    FRESH(); put_u32(d, last + 8, m.bytes + 1); expect_error(d, n, "ends at");
    put_u32(d, last + 8, UINT32_MAX); expect_error(d, n, "ends at");
    put_u32(d, last + 8, m.bytes - 1); expect_error(d, n, "in pieces");
    put_u32(d, last + 8, m.bytes - 2); expect_error(d, n, "ends at");    // empty
    FRESH(); put_u32(d, 16 + 8, 0); expect_error(d, n, "piece 0 ends at");
    put_u32(d, 16 + 8, 1000); expect_error(d, n, "piece 1 ends at");
    FRESH(); put_u32(d, last, 0x7FC00000); expect_error(d, n, "score of piece 259");
    put_u32(d, last, 0xFF800000); expect_error(d, n, "score of piece 259");
    FRESH(); put_u32(d, last + 4, 0); expect_error(d, n, "unknown type 0");
    put_u32(d, last + 4, 7); expect_error(d, n, "unknown type 7");
    put_u32(d, last + 4, USER_DEFINED); expect_error(d, n, "user-defined");
    put_u32(d, last + 4, UNUSED); expect_error(d, n, "unused");
    put_u32(d, last + 4, BYTE); expect_error(d, n, "should stand for a byte");
    FRESH(); d[n - 1] = 0xE2; expect_error(d, n, "not UTF-8");
    FRESH(); put_u32(d, 16 + 12 * 10 + 4, CONTROL); expect_error(d, n, "no piece for the byte <0x08>");
    begin_made(&m, 255); finish_made(&m); expect_error(d, m.s.bytes, "no piece for the byte <0xFF>");
    begin_made(&m, 255); add(&m, "<0xFf>", 0, BYTE); finish_made(&m); expect_error(d, m.s.bytes, "should stand for a byte");
    begin_made(&m, -1); add(&m, "<0x41>", 0, BYTE); finish_made(&m); expect_error(d, m.s.bytes, "same byte");
    begin_made(&m, -1); add(&m, "ab", 0, NORMAL); add(&m, "ab", -1, NORMAL); finish_made(&m); expect_error(d, m.s.bytes, "same text");
}

// Random damage: bits, bytes, whole numbers, entries exchanged, the end cut off. The program must end by itself, with 0 or with an error.
static void test_mutations(const Section *s, int n_mutations) {
    uint64_t seed = 4;
    uint8_t *data = malloc(s->bytes);
    int n_status[2] = { 0, 0 };
    for (int round = 0; round < n_mutations; round++) {
        memcpy(data, s->data, s->bytes);
        size_t bytes = s->bytes, head = 16 + 12 * (size_t)s->n;
        for (int k = rnd_int(&seed, 3); k >= 0; k--) {
            size_t at = rnd_int(&seed, (int)bytes), e = 16 + 12 * (size_t)rnd_int(&seed, (int)s->n), e2 = 16 + 12 * (size_t)rnd_int(&seed, (int)s->n);
            uint32_t word = (uint32_t)rnd_int(&seed, 4), any = (uint32_t)rnd_u64(&seed);
            const uint32_t values[] = { 0, 1, 2, 3, 6, 7, s->n, s->n - 1, 0x7FFFFFFF, 0x80000000, UINT32_MAX, 0x7F800000, (uint32_t)bytes, any };
            uint32_t value = values[rnd_int(&seed, 14)];
            uint8_t swap[8];
            switch (rnd_int(&seed, 8)) {
            case 0: data[at] ^= 1 << word; break;
            case 1: data[at] = (uint8_t)any; break;
            case 2: put_u32(data, 4 * word, value); break;                       // the head
            case 3: put_u32(data, e + 4 * (word % 3), value); break;             // an entry
            case 4: put_u32(data, e, any); break;                                // a score
            case 5: data[head + at % (bytes - head)] = (uint8_t)any; break;      // a text
            case 6:                                                              // two entries exchange scores and types
                memcpy(swap, data + e, 8);
                memcpy(data + e, data + e2, 8);
                memcpy(data + e2, swap, 8);
                break;
            default: bytes = rnd_int(&seed, (int)s->bytes); k = 0;               // the end, cut off
            }
        }
        char message[4096];
        int status = try_section(data, bytes, message, sizeof message);
        check((status == 0 && !message[0]) || (status == 1 && !strncmp(message, "error: broken: tokenizer: ", 26)),
              "mutation %d: status %d, \"%s\"", round, status, message);
        if (status == 0 || status == 1) n_status[status]++;
    }
    check(n_status[0] > n_mutations / 20 && n_status[1] > n_mutations / 20, "mutations too tame or too wild");
    printf("%d mutations: %d harmless, %d refused\n", n_mutations, n_status[0], n_status[1]);
    free(data);
}

int main(int argc, char **argv) {
    ModelFile f = model_open(argc > 1 ? argv[1] : "models/scenes-llava.bin");
    Section s = { f.data + f.header->tok_offset, f.header->tok_bytes, 0 };
    Tokenizer *t = tokenizer_open(s.data, s.bytes, f.path);
    s.n = (uint32_t)tokenizer_size(t);
    test_stored(t, &s);
    test_streaming(t, &s);
    test_sizes(t);
    test_made();
    test_broken();
    test_mutations(&s, argc > 2 ? atoi(argv[2]) : 600);
    tokenizer_close(t);
    model_close(&f);
    return finish();
}
