// paint.h: a canvas, a few things to draw on it, and a PNG file of it. libc alone.
//
//     Canvas c = canvas_new(640, 480, WHITE);
//     canvas_text(&c, 8, 8, 2, BLACK, "layer %d", 3);
//     canvas_save(&c, "-m kept.png", f);
//
// What is painted stands in show.h. The test: `make build/test_paint && build/test_paint`.

#ifndef PAINT_H
#define PAINT_H
#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "error.h"

typedef struct { uint8_t r, g, b; } Color;
typedef struct {
    int w, h;
    uint8_t *rgb;               // (h, w, 3)
} Canvas;

#define WHITE ((Color){ 255, 255, 255 })
#define BLACK ((Color){ 0, 0, 0 })

static inline Canvas canvas_new(int w, int h, Color c) {
    Canvas a = { w, h, need((size_t)w * h, 3) };
    for (size_t i = 0; i < (size_t)w * h; i++) memcpy(a.rgb + 3 * i, &c, 3);
    return a;
}

// What lies outside is not drawn.
static inline void canvas_rect(Canvas *a, int x, int y, int w, int h, Color c) {
    for (int j = y < 0 ? 0 : y; j < y + h && j < a->h; j++)
        for (int i = x < 0 ? 0 : x; i < x + w && i < a->w; i++) memcpy(a->rgb + ((size_t)j * a->w + i) * 3, &c, 3);
}

// a where share is 0, b where it is 1
static inline Color mix(Color a, Color b, double share) {
    return (Color){ (uint8_t)(a.r + (b.r - a.r) * share + 0.5), (uint8_t)(a.g + (b.g - a.g) * share + 0.5), (uint8_t)(a.b + (b.b - a.b) * share + 0.5) };
}

// matplotlib's viridis, by a polynomial that stays within 5 of 255: x = 0 dark blue, 1 yellow
static inline Color viridis(double x) {
    static const double c[7][3] = { { 0.27773, 0.00541, 0.33410 }, { 0.10509, 1.40461, 1.38459 }, { -0.33086, 0.21485, 0.09510 }, { -4.63423, -5.79910, -19.33244 },
                                    { 6.22827, 14.17993, 56.69055 }, { 4.77638, -13.74515, -65.35303 }, { -5.43546, 4.64585, 26.31244 } };
    uint8_t v[3];
    for (int k = 0; k < 3; k++) {
        double y = 0;
        for (int i = 6; i >= 0; i--) y = y * x + c[i][k];
        v[k] = (uint8_t)(255 * (y < 0 ? 0 : y > 1 ? 1 : y) + 0.5);
    }
    return (Color){ v[0], v[1], v[2] };
}

// ----------------------------------------------------------------------------
// text: 5 x 8 dots a letter, the last row for what hangs below the line; 6 x 9 a step, times `size`

enum { FONT_W = 6, FONT_H = 9 };             // with the space around a letter

static const uint8_t font[95][5] = {         // ' ' to '~'; a byte is a column, its lowest bit on top
    {0,0,0,0,0}, {0,0,0x5f,0,0}, {0,7,0,7,0}, {0x14,0x7f,0x14,0x7f,0x14}, {0x24,0x2a,0x7f,0x2a,0x12}, {0x23,0x13,8,0x64,0x62}, {0x36,0x49,0x56,0x20,0x50},
    {0,5,3,0,0}, {0,0x1c,0x22,0x41,0}, {0,0x41,0x22,0x1c,0}, {0x14,8,0x3e,8,0x14}, {8,8,0x3e,8,8}, {0,0xb0,0x70,0,0}, {8,8,8,8,8}, {0,0x60,0x60,0,0}, {0x20,0x10,8,4,2},
    {0x3e,0x51,0x49,0x45,0x3e}, {0,0x42,0x7f,0x40,0}, {0x42,0x61,0x51,0x49,0x46}, {0x21,0x41,0x45,0x4b,0x31}, {0x18,0x14,0x12,0x7f,0x10},
    {0x27,0x45,0x45,0x45,0x39}, {0x3c,0x4a,0x49,0x49,0x30}, {1,0x71,9,5,3}, {0x36,0x49,0x49,0x49,0x36}, {6,0x49,0x49,0x29,0x1e},
    {0,0x36,0x36,0,0}, {0,0xb6,0x76,0,0}, {8,0x14,0x22,0x41,0}, {0x14,0x14,0x14,0x14,0x14}, {0,0x41,0x22,0x14,8}, {2,1,0x51,9,6}, {0x32,0x49,0x79,0x41,0x3e},
    {0x7e,0x11,0x11,0x11,0x7e}, {0x7f,0x49,0x49,0x49,0x36}, {0x3e,0x41,0x41,0x41,0x22}, {0x7f,0x41,0x41,0x22,0x1c}, {0x7f,0x49,0x49,0x49,0x41}, {0x7f,9,9,9,1},
    {0x3e,0x41,0x49,0x49,0x7a}, {0x7f,8,8,8,0x7f}, {0,0x41,0x7f,0x41,0}, {0x20,0x40,0x41,0x3f,1}, {0x7f,8,0x14,0x22,0x41}, {0x7f,0x40,0x40,0x40,0x40},
    {0x7f,2,0x0c,2,0x7f}, {0x7f,4,8,0x10,0x7f}, {0x3e,0x41,0x41,0x41,0x3e}, {0x7f,9,9,9,6}, {0x3e,0x41,0x51,0x21,0x5e}, {0x7f,9,0x19,0x29,0x46}, {0x46,0x49,0x49,0x49,0x31},
    {1,1,0x7f,1,1}, {0x3f,0x40,0x40,0x40,0x3f}, {0x1f,0x20,0x40,0x20,0x1f}, {0x3f,0x40,0x38,0x40,0x3f}, {0x63,0x14,8,0x14,0x63}, {7,8,0x70,8,7}, {0x61,0x51,0x49,0x45,0x43},
    {0,0x7f,0x41,0x41,0}, {2,4,8,0x10,0x20}, {0,0x41,0x41,0x7f,0}, {4,2,1,2,4}, {0x40,0x40,0x40,0x40,0x40}, {0,1,2,4,0},
    {0x20,0x54,0x54,0x54,0x78}, {0x7f,0x48,0x44,0x44,0x38}, {0x38,0x44,0x44,0x44,0x20}, {0x38,0x44,0x44,0x48,0x7f}, {0x38,0x54,0x54,0x54,0x18}, {8,0x7e,9,1,2},
    {0x18,0xa4,0xa4,0xa4,0x7c}, {0x7f,8,4,4,0x78}, {0,0x44,0x7d,0x40,0}, {0x40,0x80,0x84,0x7d,0}, {0x7f,0x10,0x28,0x44,0}, {0,0x41,0x7f,0x40,0}, {0x7c,4,0x18,4,0x78},
    {0x7c,8,4,4,0x78}, {0x38,0x44,0x44,0x44,0x38}, {0xfc,0x18,0x24,0x24,0x18}, {0x18,0x24,0x24,0x18,0xfc}, {0x7c,8,4,4,8}, {0x48,0x54,0x54,0x54,0x20}, {4,0x3f,0x44,0x40,0x20},
    {0x3c,0x40,0x40,0x20,0x7c}, {0x1c,0x20,0x40,0x20,0x1c}, {0x3c,0x40,0x30,0x40,0x3c}, {0x44,0x28,0x10,0x28,0x44}, {0x1c,0xa0,0xa0,0xa0,0x7c}, {0x44,0x64,0x54,0x4c,0x44},
    {0,8,0x36,0x41,0}, {0,0,0x7f,0,0}, {0,0x41,0x36,8,0}, {0x10,8,8,0x10,8}
};

static inline int text_width(const char *s, int size) { return (int)strlen(s) * FONT_W * size; }

// What is not ASCII becomes '?'.
__attribute__((format(printf, 6, 7)))
static inline void canvas_text(Canvas *a, int x, int y, int size, Color c, const char *format, ...) {
    char s[512];
    va_list args;
    va_start(args, format);
    vsnprintf(s, sizeof s, format, args);
    va_end(args);
    for (const char *p = s; *p; p++, x += FONT_W * size) {
        const uint8_t *column = font[*p >= ' ' && *p <= '~' ? *p - ' ' : '?' - ' '];
        for (int i = 0; i < 5; i++)
            for (int j = 0; j < 8; j++) if (column[i] >> j & 1) canvas_rect(a, x + i * size, y + j * size, size, size, c);
    }
}

// ----------------------------------------------------------------------------
// PNG: 8-bit RGB, a filter a row, deflate with the fixed codes
//
// The matches are what counts: a contact sheet shows the same picture again and again, and a row of it lies within 32 KiB.
// Sources: RFC 2083 (PNG), RFC 1950 (zlib), RFC 1951 (deflate)

typedef struct { uint8_t *out; size_t n; uint64_t bits; int n_bits; } BitWriter;

static inline void put_bits(BitWriter *b, uint32_t v, int n) {                // lowest bit first
    b->bits |= (uint64_t)v << b->n_bits;
    for (b->n_bits += n; b->n_bits >= 8; b->n_bits -= 8, b->bits >>= 8) b->out[b->n++] = (uint8_t)b->bits;
}
static inline void put_code(BitWriter *b, uint32_t code, int n) {             // a Huffman code: highest bit first
    uint32_t v = 0;
    for (int i = 0; i < n; i++) v |= (code >> i & 1) << (n - 1 - i);
    put_bits(b, v, n);
}
static inline void put_symbol(BitWriter *b, int s) {                          // literal or length, RFC 1951, 3.2.6
    if (s < 144) put_code(b, 0x30 + s, 8);
    else if (s < 256) put_code(b, 0x190 + s - 144, 9);
    else if (s < 280) put_code(b, s - 256, 7);
    else put_code(b, 0xc0 + s - 280, 8);
}
static inline int log2_floor(uint32_t v) { int e = 0; while (v >>= 1) e++; return e; }

static inline void put_match(BitWriter *b, int len, int distance) {           // 3.2.5: symbols step by 4 (lengths), 2 (distances) an extra bit
    int l = len - 3, e = l < 8 ? 0 : log2_floor(l) - 2, d = distance - 1, f = d < 4 ? 0 : log2_floor(d) - 1;
    if (len == 258) put_symbol(b, 285);
    else {
        put_symbol(b, 257 + (l < 8 ? l : 4 * (e + 1) + (l >> e & 3)));
        put_bits(b, l & ((1 << e) - 1), e);
    }
    put_code(b, d < 4 ? d : 2 * (f + 1) + (d >> f & 1), 5);
    put_bits(b, d & ((1 << f) - 1), f);
}

// A zlib stream of n bytes; the caller frees it.
static inline uint8_t *zlib_pack(const uint8_t *s, size_t n, size_t *packed) {
    enum { HASH = 1 << 16 };
    BitWriter b = { .out = need(n + n / 8 + 64, 1) };
    size_t *last = need(HASH, sizeof *last);                                  // place of four bytes of this hash, plus 1
    uint32_t a1 = 1, a2 = 0;                                                  // Adler-32
    for (size_t i = 0; i < n; i++) { a1 = (a1 + s[i]) % 65521; a2 = (a2 + a1) % 65521; }
    put_bits(&b, 0x0178, 16);                                                 // deflate, 32 KiB; then one block with fixed codes
    put_bits(&b, 3, 3);
    for (size_t i = 0; i < n; ) {
        size_t len = 0, from = 0;
        if (i + 4 <= n) {
            uint32_t v;
            memcpy(&v, s + i, 4);
            size_t *h = &last[v * 2654435761u >> 16];
            from = *h;
            *h = i + 1;
            if (from-- && i - from <= 32768) while (len < 258 && i + len < n && s[from + len] == s[i + len]) len++;
        }
        if (len >= 4) { put_match(&b, (int)len, (int)(i - from)); i += len; }
        else put_symbol(&b, s[i++]);
    }
    put_symbol(&b, 256);
    put_bits(&b, 0, 7);                                                       // to the end of the byte
    b.n_bits = 0; b.bits = 0;
    for (int k = 0; k < 4; k++) put_bits(&b, (a2 << 16 | a1) >> (24 - 8 * k) & 255, 8);
    free(last);
    *packed = b.n;
    return b.out;
}

static inline int png_predict(int filter, int a, int b, int c) {              // left, above, above left
    int p = a + b - c, pa = abs(p - a), pb = abs(p - b), pc = abs(p - c);
    return filter == 0 ? 0 : filter == 1 ? a : filter == 2 ? b : filter == 3 ? (a + b) / 2 : pa <= pb && pa <= pc ? a : pb <= pc ? b : c;
}

// Every row behind the number of the filter that leaves the least: (h, 1 + 3 w)
static inline uint8_t *png_filter(const Canvas *a) {
    size_t n = (size_t)a->w * 3;
    uint8_t *out = need(a->h * (n + 1), 1), *zeros = need(n, 1), *row = need(n, 1);
    for (int y = 0; y < a->h; y++) {
        const uint8_t *x = a->rgb + y * n, *up = y ? x - n : zeros;
        long least = -1;
        for (int filter = 0; filter < 5; filter++) {
            long sum = 0;
            for (size_t i = 0; i < n; i++) {
                row[i] = (uint8_t)(x[i] - png_predict(filter, i < 3 ? 0 : x[i - 3], up[i], i < 3 ? 0 : up[i - 3]));
                sum += abs((int8_t)row[i]);
            }
            if (least >= 0 && sum >= least) continue;
            least = sum;
            out[y * (n + 1)] = (uint8_t)filter;
            memcpy(out + y * (n + 1) + 1, row, n);
        }
    }
    free(zeros);
    free(row);
    return out;
}

static inline void png_chunk(FILE *f, const char *type, const uint8_t *data, uint32_t n) {
    uint32_t crc = ~0u;
    uint8_t word[8] = { n >> 24, n >> 16, n >> 8, n, type[0], type[1], type[2], type[3] };
    for (size_t i = 4; i < (size_t)n + 8; i++) {
        crc ^= i < 8 ? word[i] : data[i - 8];
        for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
    }
    fwrite(word, 1, 8, f);
    fwrite(data, 1, n, f);
    fwrite((uint8_t[]){ ~crc >> 24, ~crc >> 16, ~crc >> 8, ~crc }, 1, 4, f);
}

// Writes the file and closes it. what: option and path, for the error.
static inline void canvas_save(const Canvas *a, const char *what, FILE *f) {
    uint8_t head[13] = { a->w >> 24, a->w >> 16, a->w >> 8, a->w, a->h >> 24, a->h >> 16, a->h >> 8, a->h, 8, 2 };   // 8 bit, RGB
    size_t n;
    uint8_t *rows = png_filter(a), *packed = zlib_pack(rows, (size_t)a->h * ((size_t)a->w * 3 + 1), &n);
    fwrite("\x89PNG\r\n\x1a\n", 1, 8, f);
    png_chunk(f, "IHDR", head, sizeof head);
    png_chunk(f, "IDAT", packed, (uint32_t)n);
    png_chunk(f, "IEND", packed, 0);
    if (ferror(f) | fclose(f)) die("is the disk full?", "%s: %s", what, strerror(errno));
    free(rows);
    free(packed);
}

#endif
