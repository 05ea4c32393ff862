// image.h: from a JPEG or PNG file to what a vision tower reads: decode, resize as Pillow does, crop or pad, normalise,
// cut into patches.
//
//     Image photo = image_load("img.jpg"), square = image_square(photo, 336, IMAGE_PAD);
//     image_normalize(chw, square, mean, std);  image_patches(x, chw, 336, 14);  image_free(photo);  image_free(square);
//
// stb_image does the decoding. Its version 2.27 trusts hostile files too far, so `check_jpeg` and `check_png` read the
// headers first and refuse what it would stumble over. EXIF orientation is ignored, as LLaVA and Qwen-VL do.
// The resize equals Pillow's bicubic to the byte, if doubles are doubles: compile with -ffp-contract=off.
// The test: `make build/test_image && build/test_image`; against Pillow itself: tests/image_parity.py.

#ifndef IMAGE_H
#define IMAGE_H
#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "error.h"

typedef struct {
    int w, h;
    uint8_t *rgb;               // (h, w, 3)
} Image;

enum { IMAGE_CROP, IMAGE_PAD, IMAGE_STRETCH,    // how a picture that is not square becomes one: see image_square
       IMAGE_PILLOW13 = 4 };                    // added to one of them: the pass order of Pillow 13, for parity checks

#ifndef IMAGE_MAX_MEGAPIXELS
#define IMAGE_MAX_MEGAPIXELS 64                 // of 10^6 pixels: a JPEG or PNG may declare sizes that no memory holds
#endif
#define IMAGE_MAX_SIDE 262144                   // so that 4096 times this, the longest side a crop is cut from, is an int
#define IMAGE_MAX_FILE ((size_t)1 << 30)
#define IMAGE_STRING_(x) #x
#define IMAGE_STRING(x) IMAGE_STRING_(x)

// ----------------------------------------------------------------------------
// stb_image, and the memory it may have
//
// All of its memory starts as zeros: an incomplete file then decodes to grey, not to what was in the heap. Growing is
// for PNG data that turn out longer than declared; `image_grow_max` ends that for data that inflate without end.

static _Thread_local size_t image_grow_max;

static inline void *image_grow(void *p, size_t old_bytes, size_t bytes) {
    void *q = bytes <= image_grow_max ? realloc(p, bytes) : NULL;
    if (q && bytes > old_bytes) memset((char *)q + old_bytes, 0, bytes - old_bytes);
    return q;
}

#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ONLY_JPEG
#define STBI_ONLY_PNG
#define STBI_NO_STDIO
#define STBI_NO_GIF
#define STBI_NO_LINEAR
#define STBI_FAILURE_USERMSG
#define STBI_ASSERT(x) ((void)0)                // a bad file is an error, not an abort; no index depends on these
#define STBI_MALLOC(bytes) calloc(1, bytes)
#define STBI_REALLOC_SIZED(p, old_bytes, bytes) image_grow(p, old_bytes, bytes)
#define STBI_FREE(p) free(p)
#define stbi_set_unpremultiply_on_load_thread stbi__unpremultiply_on_load_thread    // 2.27 declares it by a wrong name
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wunused-but-set-variable"
#pragma GCC diagnostic ignored "-Wsign-compare"
#include "stb_image.h"
#pragma GCC diagnostic pop

// ----------------------------------------------------------------------------
// before stb_image sees a file: NULL, or what is wrong with it

static const char *const image_truncated = "the file is truncated", *const image_corrupt = "the file is corrupt",
                  *const image_unsupported = "not a sequential or progressive JPEG of 8 bits and 1, 3 or 4 components: not supported";

static inline const char *check_size(uint32_t w, uint32_t h) {
    if (w == 0 || h == 0) return "the picture has no pixels";
    if (w > IMAGE_MAX_SIDE || h > IMAGE_MAX_SIDE) return "a side of the picture is longer than " IMAGE_STRING(IMAGE_MAX_SIDE) " pixels";
    if ((uint64_t)w * h > IMAGE_MAX_MEGAPIXELS * 1000000ull)
        return "the picture has more than " IMAGE_STRING(IMAGE_MAX_MEGAPIXELS) " megapixels";
    return NULL;
}

typedef struct {                                // what a JPEG has said about itself so far
    int w, h, n_comp, h_max, v_max, restart, n_scans;
    bool progressive;
    struct { int id, h, v, tq; bool seen; } comp[4];    // seen: a scan brought its DC coefficients
    unsigned tables[3];                         // bit t: Huffman table t for DC, for AC; quantisation table t is defined
} JpegInfo;

// Tables, in one segment s … end. Closes: a Huffman table of more than 256 codes writes past its arrays in 2.27.
static inline const char *check_jpeg_tables(JpegInfo *j, int marker, const uint8_t *s, const uint8_t *end) {
    while (s < end) {
        int kind = s[0] >> 4, t = s[0] & 15, codes = 0, room = 0, bytes = kind ? 129 : 65;
        if (kind > 1 || t > 3) return image_corrupt;
        if (marker == 0xC4) {
            if (end - s < 17) return image_corrupt;
            for (int i = 1; i <= 16; i++) codes += s[i], room += s[i] << (16 - i);
            if (codes > 256 || room > 65536) return image_corrupt;
            bytes = 17 + codes;
        }
        if (end - s < bytes) return image_corrupt;
        j->tables[marker == 0xC4 ? kind : 2] |= 1u << t;
        s += bytes;
    }
    return NULL;
}

// The frame header. Closes: sampling factors that are no integer ratio read past a row. (Of two components of one name
// the second never gets a scan; that is found at the end.)
static inline const char *check_jpeg_frame(JpegInfo *j, int marker, const uint8_t *s, int bytes) {
    if (j->n_comp || bytes < 6) return image_corrupt;
    j->progressive = marker == 0xC2;
    j->h = s[1] << 8 | s[2], j->w = s[3] << 8 | s[4], j->n_comp = s[5];
    if (s[0] != 8 || (j->n_comp != 1 && j->n_comp != 3 && j->n_comp != 4)) return image_unsupported;
    if (bytes != 6 + 3 * j->n_comp) return image_corrupt;
    for (int i = 0; i < j->n_comp; i++) {
        const uint8_t *c = s + 6 + 3 * i;
        j->comp[i].id = c[0], j->comp[i].h = c[1] >> 4, j->comp[i].v = c[1] & 15, j->comp[i].tq = c[2];
        if (j->comp[i].h < 1 || j->comp[i].h > 4 || j->comp[i].v < 1 || j->comp[i].v > 4 || c[2] > 3) return image_corrupt;
        if (j->comp[i].h > j->h_max) j->h_max = j->comp[i].h;
        if (j->comp[i].v > j->v_max) j->v_max = j->comp[i].v;
    }
    for (int i = 0; i < j->n_comp; i++)
        if (j->h_max % j->comp[i].h || j->v_max % j->comp[i].v) return "JPEG with fractional sampling ratios is not supported";
    return check_size(j->w, j->h);
}

// A scan header, then its data up to the next marker. Closes: tables used but never defined, AC before DC, and data too
// short for the declared size: a block costs at least a bit for its DC and, if sequential, one for its end.
static inline const char *check_jpeg_scan(JpegInfo *j, const uint8_t *s, int bytes, const uint8_t **data, const uint8_t *end) {
    int n = bytes > 0 ? s[0] : 0;
    if (n < 1 || n > j->n_comp || bytes != 4 + 2 * n) return image_corrupt;
    if (++j->n_scans > 100) return "JPEG of more than 100 scans is not supported";      // each may cost as much as a picture
    int first = s[1 + 2 * n], last = s[2 + 2 * n], high = s[3 + 2 * n] >> 4, low = s[3 + 2 * n] & 15;
    if (j->progressive ? last > 63 || first > last || (first == 0 ? last > 0 : n > 1) || high > 13 || low > 13 : first || high || low)
        return image_corrupt;
    bool opens = first == 0 && high == 0;           // brings DC coefficients: once for each component, and before all else
    int mcu_w = 8 * j->h_max, mcu_h = 8 * j->v_max;
    size_t n_mcu = (size_t)((j->w + mcu_w - 1) / mcu_w) * ((j->h + mcu_h - 1) / mcu_h), n_blocks = 0;
    for (int i = 0; i < n; i++) {
        int k = 0, dc = s[2 + 2 * i] >> 4, ac = s[2 + 2 * i] & 15;
        while (k < j->n_comp && j->comp[k].id != s[1 + 2 * i]) k++;
        if (k == j->n_comp || j->comp[k].seen == opens || !(j->tables[2] >> j->comp[k].tq & 1)) return image_corrupt;
        if ((opens && !(j->tables[0] >> dc & 1)) || ((first || !j->progressive) && !(j->tables[1] >> ac & 1))) return image_corrupt;
        j->comp[k].seen = true;
        n_blocks += n_mcu * j->comp[k].h * j->comp[k].v;
        if (n == 1) {                               // one component: its blocks, without those that only fill up an MCU
            int w = (j->w * j->comp[k].h + j->h_max - 1) / j->h_max, h = (j->h * j->comp[k].v + j->v_max - 1) / j->v_max;
            n_mcu = n_blocks = (size_t)((w + 7) / 8) * ((h + 7) / 8);
        }
    }
    size_t n_bytes = 0, n_restarts = 0;
    const uint8_t *p = *data;
    for (; end - p >= 2; p++, n_bytes++) {          // to a marker: 0xFF, then not 0 (0xFF itself), 0xFF (filling) or a restart
        if (p[0] != 0xFF || p[1] == 0 || p[1] == 0xFF) continue;
        if (p[1] < 0xD0 || p[1] > 0xD7) break;
        n_restarts++;
    }
    *data = p;
    if (end - p < 2 || 8 * n_bytes < n_blocks * (j->progressive ? first == 0 : 2)) return image_truncated;
    return j->restart && n_restarts < (n_mcu - 1) / j->restart ? image_truncated : NULL;
}

// JPEG (ITU T.81 annex B): segments of marker, length, content, up to an end marker that must be there.
static inline const char *check_jpeg(const uint8_t *p, size_t n) {
    JpegInfo j = {.h_max = 1, .v_max = 1};
    const uint8_t *end = p + n;
    for (p += 2;;) {
        if (!j.n_comp) while (p < end && *p != 0xFF) p++;       // padding before the frame: as stb_image
        if (p < end && *p != 0xFF) return image_corrupt;
        while (p < end && *p == 0xFF) p++;
        if (p == end) return image_truncated;
        int marker = *p++;
        if (marker == 0xD9) break;
        int bytes = end - p < 2 ? 2 : p[0] << 8 | p[1];
        if (marker < 0xC0 || (marker >= 0xD0 && marker <= 0xD8) || bytes < 2) return image_corrupt;     // those have no length
        if (end - p < bytes) return image_truncated;
        const uint8_t *s = p + 2;
        const char *error = NULL;
        p += bytes;
        if (marker == 0xC4 || marker == 0xDB) error = check_jpeg_tables(&j, marker, s, p);
        else if (marker <= 0xC2) error = check_jpeg_frame(&j, marker, s, bytes - 2);
        else if (marker < 0xD0) error = image_unsupported;
        else if (marker == 0xDA) error = check_jpeg_scan(&j, s, bytes - 2, &p, end);
        else if (marker == 0xDD && bytes == 4) j.restart = s[0] << 8 | s[1];
        if (error) return error;
    }
    for (int i = 0; i < j.n_comp; i++) if (!j.comp[i].seen) return image_truncated;
    return j.n_comp ? NULL : "the file holds no picture";
}

static inline uint32_t big_endian(const uint8_t *p) { return (uint32_t)p[0] << 24 | p[1] << 16 | p[2] << 8 | p[3]; }

// PNG (ISO 15948): chunks of length, type, content, check sum, up to IEND. Closes: depths that a colour type does not
// have, a missing palette, and a picture larger than its data can inflate to (deflate: at most 258 bytes from 2 bits).
// *palette: the PLTE chunk, if any. *raw: bytes of the picture before compression, but for filters and padding.
static inline const char *check_png(const uint8_t *p, size_t n, const uint8_t **palette, size_t *raw) {
    static const char *const depths[7] = {"\1\2\4\10\20", "", "\10\20", "\1\2\4\10", "\10\20", "", "\10\20"};
    static const uint8_t channels[7] = {1, 0, 3, 1, 2, 0, 4};
    const uint8_t *end = p + n;
    size_t n_data = 0, bytes;
    int color = -1;
    for (p += 8;; p += bytes + 12) {
        if (end - p < 12 || (bytes = big_endian(p)) > (size_t)(end - p) - 12) return image_truncated;
        const uint8_t *type = p + 4, *s = p + 8;
        bool header = !memcmp(type, "IHDR", 4);
        if (header != (color < 0) || (header && bytes != 13)) return image_corrupt;     // the first chunk, and only the first
        if (header) {
            const char *error = check_size(big_endian(s), big_endian(s + 4));
            if (error) return error;
            color = s[9];
            if (color > 6 || s[8] == 0 || !strchr(depths[color], s[8]) || s[10] || s[11] || s[12] > 1) return image_corrupt;
            *raw = (size_t)big_endian(s) * big_endian(s + 4) * channels[color] * s[8] / 8;
        } else if (!memcmp(type, "PLTE", 4)) {
            if (*palette || n_data || bytes == 0 || bytes > 768 || bytes % 3) return image_corrupt;
            *palette = p;
        } else if (!memcmp(type, "IDAT", 4)) n_data += bytes;
        else if (!memcmp(type, "IEND", 4)) break;
        else if (!(type[0] & 32)) return "PNG with an unknown critical chunk is not supported";
    }
    if (n_data == 0 || (color == 3 && !*palette)) return image_corrupt;
    return *raw / 1032 > n_data ? image_truncated : NULL;
}

// ----------------------------------------------------------------------------
// decoding

// The picture in n bytes of JPEG or PNG; returns NULL, or why there is none. The caller frees it.
// 8-bit RGB: grey is replicated, a palette looked up, alpha dropped (not blended), of 16 bits the upper 8 stay.
// Differs from Pillow: JPEG pixels, by a few levels; 16-bit grey, which Pillow clips at 255.
static inline const char *image_decode(Image *image, const uint8_t *data, size_t n) {
    bool png = n >= 8 && !memcmp(data, "\x89PNG\r\n\x1a\n", 8), jpeg = n >= 3 && !memcmp(data, "\xff\xd8\xff", 3);
    const uint8_t *palette = NULL;
    uint8_t *copy = NULL;
    size_t raw = 0;
    int n_channels;
    if (n == 0) return "the file is empty";
    if (n > IMAGE_MAX_FILE) return "the file is larger than 1 GiB";
    if (!png && !jpeg) return "neither JPEG nor PNG";
    const char *error = png ? check_png(data, n, &palette, &raw) : check_jpeg(data, n);
    if (error) return error;
    if (palette && big_endian(palette) < 768) {     // stb_image leaves colours that are not there undefined: append black
        size_t head = palette - data + 8 + big_endian(palette), more = 768 - big_endian(palette);
        copy = need(n + more, 1);
        memcpy(copy, data, head);
        memcpy(copy + head + more, data + head, n - head);
        memcpy(copy + (palette - data), "\0\0\3", 4);           // 768; the check sum is not looked at
        data = copy, n += more;
    }
    image_grow_max = 4 * raw + 2 * n + 4096;        // 4: an interlaced picture has more rows, each padded to bytes
    image->rgb = stbi_load_from_memory(data, (int)n, &image->w, &image->h, &n_channels, 3);
    free(copy);
    return image->rgb ? NULL : stbi_failure_reason();
}

// The same from a file, which may be a pipe. Every error ends the program.
static inline Image image_load(const char *path) {
    static const char *const hint = "a picture is a JPEG or PNG file of at most 64 megapixels; convert or shrink others first";
    FILE *file = fopen(path, "rb");
    if (!file) die("check the path", "%s: %s", path, strerror(errno));
    size_t n = 0, room = 0, got = 1;
    uint8_t *data = NULL;
    for (; got && n <= IMAGE_MAX_FILE; n += got) {
        if (n == room) {
            room = room ? 2 * room : 65536;
            if (!(data = realloc(data, room))) die(hint, "%s: out of memory for %zu bytes", path, room);
        }
        got = fread(data + n, 1, room - n, file);
        if (n == 0 && got >= 8 && memcmp(data, "\xff\xd8", 2) && memcmp(data, "\x89PNG\r\n\x1a\n", 8)) break;   // no need to read a film to the end
    }
    if (!n) n = got;
    if (ferror(file)) die(hint, "%s: %s", path, strerror(errno));
    fclose(file);
    Image image = {0};
    const char *error = image_decode(&image, data, n);
    if (error) die(hint, "%s: %s", path, error);
    free(data);
    return image;
}

static inline void image_free(Image image) { free(image.rgb); }

// ----------------------------------------------------------------------------
// resize: Pillow's bicubic with antialiasing, to the byte
//
//     out[o] = sum_j k[j] in[lo + j]         scale = n / m,  f = max(scale, 1),  c = (o + 0.5) scale
//     k[j]   = bicubic((lo + j - c + 0.5) / f), divided by their sum, in units of 2^-22
//
// for output o of m from inputs lo … hi - 1 of n, those within 2 f of the centre c. Two passes, along x and along y, each
// rounds to bytes. Pillow skips a pass that changes no size; its coefficients are a 1 and zeros, so we need not.
// Only a window of the result is computed, and the picture may lie on a larger canvas of one colour: what a crop drops,
// and padding, take no memory and no time.
// Source: Pillow, src/libImaging/Resample.c

typedef struct {                // one axis, for the n outputs of the window
    int n, *lo, *len;           // (n,) output i reads pixels lo[i] … lo[i] + len[i] - 1 of the picture,
    int *k, max_len;            // (n, max_len) with these coefficients
    int *outside, *total;       // (n,) sum of the coefficients on canvas that is not picture; sum of all
} Axis;

// Keys' cubic with a = -1/2, in Pillow's order of operations.
static inline double bicubic(double t) {
    const double a = -0.5;
    if (t < 0) t = -t;
    if (t < 1) return ((a + 2) * t - (a + 3)) * t * t + 1;
    if (t < 2) return (((t - 5) * t + 8) * t - 4) * a;
    return 0;
}

// Canvas length n to length m: outputs first … first + count - 1. The picture is canvas pixels at … at + size - 1.
static inline Axis axis_new(int n, int m, int first, int count, int at, int size) {
    double scale = (double)n / m, f = scale < 1 ? 1 : scale, support = 2 * f;
    Axis a = {.n = count, .max_len = (int)ceil(support) * 2 + 1};
    a.lo = need(count, sizeof(int)), a.len = need(count, sizeof(int));
    a.outside = need(count, sizeof(int)), a.total = need(count, sizeof(int));
    a.k = need((size_t)count * a.max_len, sizeof(int));
    double *w = need(a.max_len, sizeof(double));
    for (int i = 0; i < count; i++) {
        double c = (first + i + 0.5) * scale, sum = 0;
        int lo = (int)(c - support + 0.5), hi = (int)(c + support + 0.5);
        if (lo < 0) lo = 0;
        if (hi > n) hi = n;
        for (int j = lo; j < hi; j++) sum += w[j - lo] = bicubic((j - c + 0.5) * (1 / f));
        int from = lo > at ? lo : at, to = hi < at + size ? hi : at + size;     // of these, what lies on the picture
        if (to < from) from = to = at;
        for (int j = lo; j < hi; j++) {
            double v = (sum != 0 ? w[j - lo] / sum : w[j - lo]) * (1 << 22);
            int k = (int)(v < 0 ? v - 0.5 : v + 0.5);
            a.total[i] += k;
            if (j >= from && j < to) a.k[(size_t)i * a.max_len + j - from] = k;
            else a.outside[i] += k;
        }
        a.lo[i] = from - at, a.len[i] = to - from;
    }
    free(w);
    return a;
}

static inline void axis_free(Axis a) { free(a.lo), free(a.len), free(a.k), free(a.outside), free(a.total); }

// The pixels that an axis reads are *from … *to - 1; a.lo counts from *from afterwards.
static inline void axis_range(Axis a, int *from, int *to) {
    *from = INT32_MAX, *to = 0;
    for (int i = 0; i < a.n; i++)
        if (a.len[i]) {
            if (a.lo[i] < *from) *from = a.lo[i];
            if (a.lo[i] + a.len[i] > *to) *to = a.lo[i] + a.len[i];
        }
    if (*from > *to) *from = 0;
    for (int i = 0; i < a.n; i++) a.lo[i] = a.len[i] ? a.lo[i] - *from : 0;
}

static inline uint8_t to_byte(int sum) {        // a weighted sum of bytes, in units of 2^-22: at most 1.4e9, Pillow's margin
    int v = (sum + (1 << 21)) >> 22;
    return v < 0 ? 0 : v > 255 ? 255 : v;
}

// y[t,o,c] = sum_j k[o,j] x[t, lo[o] + j, c] + outside[o] pad[c]
// y: (T, a.n, 3)   x: T rows, row_bytes apart   pad: (3,)
static inline void resize_x(uint8_t *y, const uint8_t *x, Axis a, const uint8_t *pad, int T, size_t row_bytes) {
    #pragma omp parallel for if ((size_t)T * a.n * a.max_len > 100000)       // less is done before the threads have met
    for (int t = 0; t < T; t++)
        for (int o = 0; o < a.n; o++) {
            const uint8_t *in = x + t * row_bytes + 3 * (size_t)a.lo[o];
            const int *k = a.k + (size_t)o * a.max_len;
            int r = a.outside[o] * pad[0], g = a.outside[o] * pad[1], b = a.outside[o] * pad[2];
            for (int j = 0; j < a.len[o]; j++, in += 3) r += k[j] * in[0], g += k[j] * in[1], b += k[j] * in[2];
            uint8_t *out = y + ((size_t)t * a.n + o) * 3;
            out[0] = to_byte(r), out[1] = to_byte(g), out[2] = to_byte(b);
        }
}

// y[o,i] = sum_j k[o,j] x[lo[o] + j, i] + outside[o] pad[i]
// y: (a.n, dim)   x: rows of dim bytes, row_bytes apart   pad: (dim,)
static inline void resize_y(uint8_t *y, const uint8_t *x, Axis a, const uint8_t *pad, int dim, size_t row_bytes) {
    enum { BLOCK = 1024 };
    #pragma omp parallel for if ((size_t)dim * a.n * a.max_len > 100000)
    for (int o = 0; o < a.n; o++)
        for (int i0 = 0; i0 < dim; i0 += BLOCK) {
            int sum[BLOCK], n = dim - i0 < BLOCK ? dim - i0 : BLOCK;
            for (int i = 0; i < n; i++) sum[i] = a.outside[o] * pad[i0 + i];
            for (int j = 0; j < a.len[o]; j++) {
                const uint8_t *in = x + (a.lo[o] + j) * row_bytes + i0;
                int k = a.k[(size_t)o * a.max_len + j];
                for (int i = 0; i < n; i++) sum[i] += k * in[i];
            }
            for (int i = 0; i < n; i++) y[(size_t)o * dim + i0 + i] = to_byte(sum[i]);
        }
}

// The picture `in` at (x0, y0) of a canvas (canvas_w, canvas_h) of colour pad; the canvas resized to (w, h); of that the
// window (cw, ch) at (cx, cy). y_first: along y, then along x, without padding only.
static inline Image resize_window(Image in, int canvas_w, int canvas_h, int x0, int y0, const uint8_t pad[3],
                                  int w, int h, int cx, int cy, int cw, int ch, bool y_first) {
    Axis ax = axis_new(canvas_w, w, cx, cw, x0, in.w), ay = axis_new(canvas_h, h, cy, ch, y0, in.h);
    Image out = {cw, ch, need((size_t)cw * ch * 3, 1)};
    size_t row_bytes = (size_t)in.w * 3;
    int left, right, top, bottom;               // what the window needs of the picture
    axis_range(ax, &left, &right), axis_range(ay, &top, &bottom);
    const uint8_t *from = in.rgb + top * row_bytes + 3 * (size_t)left;
    int nw = right - left, nh = bottom - top;
    uint8_t *half = need(y_first ? (size_t)nw * ch * 3 : (size_t)nh * cw * 3, 1), *row = need((size_t)cw + nw, 3);
    if (y_first) {
        resize_y(half, from, ay, row, nw * 3, row_bytes);                   // row: zeros, times coefficients of 0
        resize_x(out.rgb, half, ax, pad, ch, (size_t)nw * 3);
    } else {
        for (int i = 0; i < 3 * cw; i++) row[i] = to_byte(ax.total[i / 3] * pad[i % 3]);    // a canvas row beside the picture
        resize_x(half, from, ax, pad, nh, row_bytes);
        resize_y(out.rgb, half, ay, row, cw * 3, (size_t)cw * 3);
    }
    free(half), free(row), axis_free(ax), axis_free(ay);
    return out;
}

// The order of the passes. Released results are of Pillows before 13: along x first, always. Pillow 13 goes along y first
// where the height shrinks by more than twice what the width does (PR 9549); other bytes then, by up to 22 levels.
static inline bool y_first(int in_w, int in_h, int w, int h, int mode) {
    return (mode & IMAGE_PILLOW13) && h < in_h && in_h - (int64_t)h > 2 * (in_w - (int64_t)w);
}

// The whole picture, to (w, h). mode: 0 or IMAGE_PILLOW13.
static inline Image image_resize(Image in, int w, int h, int mode) {
    return resize_window(in, in.w, in.h, 0, 0, (const uint8_t[3]){0}, w, h, 0, 0, w, h, y_first(in.w, in.h, w, h, mode));
}

// The picture as (size, size), three ways:
//     IMAGE_CROP     the shorter side to size, the longer to trunc(size longer / shorter); its middle stays
//                    Source: Hugging Face CLIPImageProcessor, as llava-hf runs it
//     IMAGE_PAD      on a square of the mean colour, the picture in its middle; that to (size, size)
//                    Source: LLaVA, llava/mm_utils.py, expand2square: all published LLaVA-1.5 numbers
//     IMAGE_STRETCH  to (size, size), aspect ignored
//                    Source: Qwen-VL, visual.py, image_transform
static inline Image image_square(Image in, int size, int mode) {
    static const uint8_t mean[3] = {122, 116, 104};                         // trunc(255 CLIP mean)
    const int w = in.w, h = in.h, side = w > h ? w : h, kind = mode & 3;
    if (size < 1 || size > 4096) die(NULL, "image size %d: expected 1 … 4096", size);
    if (kind == IMAGE_STRETCH) return image_resize(in, size, size, mode);
    if (kind == IMAGE_PAD)
        return resize_window(in, side, side, w < h ? (h - w) / 2 : 0, w > h ? (w - h) / 2 : 0, mean, size, size, 0, 0, size, size, false);
    int new_w = w <= h ? size : (int)((double)((int64_t)size * w) / h), new_h = h <= w ? size : (int)((double)((int64_t)size * h) / w);
    return resize_window(in, w, h, 0, 0, mean, new_w, new_h, (new_w - size) / 2, (new_h - size) / 2, size, size, y_first(w, h, new_w, new_h, mode));
}

// ----------------------------------------------------------------------------
// bytes to the vision tower's input

// out[c,y,x] = (byte / 255 - mean[c]) / std[c]     the quotient by 255 is a product in double, rounded to float
// out: (3, h, w)
// Source: Hugging Face CLIPImageProcessor: rescale, then normalize
static inline void image_normalize(float *out, Image image, const float mean[3], const float std[3]) {
    size_t n = (size_t)image.w * image.h;
    for (int c = 0; c < 3; c++)
        for (size_t i = 0; i < n; i++)
            out[c * n + i] = ((float)(image.rgb[i * 3 + c] * 0.00392156862745098) - mean[c]) / std[c];
}

// out[gy * g + gx, (c * patch + dy) * patch + dx] = chw[c, gy * patch + dy, gx * patch + dx],   g = size / patch
// out: (g * g, 3 * patch * patch)   chw: (3, size, size). Rows and columns past g * patch belong to no patch.
static inline void image_patches(float *out, const float *chw, int size, int patch) {
    int g = size / patch;
    for (int gy = 0; gy < g; gy++)
        for (int gx = 0; gx < g; gx++)
            for (int c = 0; c < 3; c++)
                for (int dy = 0; dy < patch; dy++, out += patch)
                    memcpy(out, chw + ((size_t)c * size + gy * patch + dy) * size + gx * patch, patch * sizeof(float));
}

#endif
