// test_image.c: pictures from file to patches. Resize and pipelines against vectors that Pillow wrote once (and, written
// out plainly here, against the formula); every PNG flavour against the formula that tests/images/make.py used; JPEG
// against what Pillow reads; and files that must be refused, each in a process of its own.
//
//     make build/test_image && build/test_image            from the root: it reads tests/images/

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include "image.h"
#include "test.h"

#ifndef __has_feature
#define __has_feature(x) 0
#endif

static const float clip_mean[3] = {0.48145466f, 0.4578275f, 0.40821073f}, clip_std[3] = {0.26862954f, 0.26130258f, 0.27577711f};

static Image image_new(int w, int h) { return (Image){w, h, need((size_t)w * h * 3, 1)}; }

static Image image_a(int w, int h) {            // noise-like
    Image m = image_new(w, h);
    for (int y = 0; y < h; y++)
        for (int x = 0; x < w; x++)
            for (int c = 0; c < 3; c++) m.rgb[((size_t)y * w + x) * 3 + c] = 37u * x + 91u * y + 53u * c + 11u * x * y;
    return m;
}

static Image image_b(int w, int h) {            // two ramps and a chessboard
    Image m = image_new(w, h);
    for (int y = 0; y < h; y++)
        for (int x = 0; x < w; x++) {
            uint8_t *p = m.rgb + ((size_t)y * w + x) * 3;
            p[0] = 255 * x / (w - 1), p[1] = 255 * y / (h - 1), p[2] = (x / 16 + y / 16) % 2 ? 200 : 0;
        }
    return m;
}

static Image image_random(int w, int h, uint64_t *seed) {
    Image m = image_new(w, h);
    bool extreme = rnd_int(seed, 2);            // 0 and 255 only: overshoots at both ends
    for (size_t i = 0; i < (size_t)w * h * 3; i++) m.rgb[i] = extreme ? 255 * rnd_int(seed, 2) : rnd_int(seed, 256);
    return m;
}

static uint32_t fnv(Image m) {
    uint32_t hash = 2166136261u;
    for (size_t i = 0; i < (size_t)m.w * m.h * 3; i++) hash = (hash ^ m.rgb[i]) * 16777619u;
    return hash;
}

static long byte_sum(Image m) {
    long sum = 0;
    for (size_t i = 0; i < (size_t)m.w * m.h * 3; i++) sum += m.rgb[i];
    return sum;
}

static bool same(Image a, Image b) { return a.w == b.w && a.h == b.h && !memcmp(a.rgb, b.rgb, (size_t)a.w * a.h * 3); }

static bool pixel_is(Image m, int x, int y, int r, int g, int b) {
    const uint8_t *p = m.rgb + ((size_t)y * m.w + x) * 3;
    return p[0] == r && p[1] == g && p[2] == b;
}

// ----------------------------------------------------------------------------
// resize: Pillow's vectors, and the formula written plainly

static void test_vectors(void) {
    static const struct { char kind; int w, h, to_w, to_h; long sum; uint32_t hash; } v[] = {
        {'A', 20, 15, 8, 6, 0, 0xeddfaa28},             {'A', 20, 15, 33, 25, 0, 0xd808d4ea},
        {'A', 640, 480, 448, 336, 57411108, 0xa7d83bdf}, {'B', 640, 480, 448, 336, 53447578, 0xfa2371e7},
        {'A', 640, 480, 448, 448, 76549727, 0xb3310a08}, {'B', 640, 480, 448, 448, 71261212, 0xb393f685},
        {'A', 500, 375, 448, 336, 57411693, 0x67104188}, {'B', 500, 375, 448, 336, 53429719, 0x45cf2b9a},
        {'A', 100, 77, 436, 336, 55832695, 0x4bf19404},  {'B', 100, 77, 436, 336, 51899060, 0x85db5141},
    };
    for (size_t i = 0; i < sizeof v / sizeof *v; i++)
        for (int mode = 0; mode <= IMAGE_PILLOW13; mode += IMAGE_PILLOW13) {        // both orders are the same for these
            Image in = v[i].kind == 'A' ? image_a(v[i].w, v[i].h) : image_b(v[i].w, v[i].h), out = image_resize(in, v[i].to_w, v[i].to_h, mode);
            check(fnv(out) == v[i].hash && (!v[i].sum || byte_sum(out) == v[i].sum), "%c(%d,%d) to %dx%d, mode %d: %08x, sum %ld",
                  v[i].kind, v[i].w, v[i].h, v[i].to_w, v[i].to_h, mode, fnv(out), byte_sum(out));
            image_free(in), image_free(out);
        }
    static const uint8_t small_red[] = {109, 135, 130, 99, 104, 170, 90, 171}, small_green[] = {139, 139, 119, 117, 128, 145, 100, 117},
                         large_red[] = {0, 5, 30, 52, 73, 95, 125, 160, 181, 210};
    Image in = image_a(20, 15), small = image_resize(in, 8, 6, 0), large = image_resize(in, 33, 25, 0);
    for (int x = 0; x < 8; x++) check(small.rgb[x * 3] == small_red[x] && small.rgb[(5 * 8 + x) * 3 + 1] == small_green[x], "A to 8x6, column %d", x);
    for (int x = 0; x < 10; x++) check(large.rgb[x * 3] == large_red[x], "A to 33x25, column %d", x);
    image_free(in), image_free(small), image_free(large);

    static const struct { int n, m, o, lo, len, k[4]; } lists[] = {
        {3, 2, 0, 0, 3, {2726634, 1635981, -168311}}, {640, 448, 0, 0, 4, {2903499, 1509605, -215166, -3634}}, {500, 448, 0, 0, 3, {3824833, 465769, -96297}}};
    for (int i = 0; i < 3; i++) {
        Axis a = axis_new(lists[i].n, lists[i].m, lists[i].o, 1, 0, lists[i].n);
        check(a.lo[0] == lists[i].lo && a.len[0] == lists[i].len && !memcmp(a.k, lists[i].k, a.len[0] * sizeof(int)) && a.outside[0] == 0,
              "coefficients %d to %d", lists[i].n, lists[i].m);
        axis_free(a);
    }
}

// One pass along x, straight from the formula; along_y turns the picture.
static Image pass_ref(Image in, int m, bool along_y) {
    int n = along_y ? in.h : in.w;
    Image out = along_y ? image_new(in.w, m) : image_new(m, in.h);
    double scale = (double)n / m, f = scale > 1 ? scale : 1, S = 2 * f;
    for (int y = 0; y < out.h; y++)
        for (int x = 0; x < out.w; x++)
            for (int c = 0; c < 3; c++) {
                int o = along_y ? y : x, sum = 1 << 21;
                double center = (o + 0.5) * scale, W = 0;
                for (int pass = 0; pass < 2; pass++)
                    for (int j = 0; j < n; j++) {
                        if (j < (int)(center - S + 0.5) || j >= (int)(center + S + 0.5)) continue;
                        double t = fabs((j - center + 0.5) * (1 / f)), w = 0, a = -0.5;
                        if (t < 1) w = ((a + 2) * t - (a + 3)) * t * t + 1;
                        else if (t < 2) w = (((t - 5) * t + 8) * t - 4) * a;
                        if (pass == 0) { W += w; continue; }
                        w = w / W * (1 << 22);
                        sum += (int)(w < 0 ? w - 0.5 : w + 0.5) * in.rgb[((size_t)(along_y ? j : y) * in.w + (along_y ? x : j)) * 3 + c];
                    }
                sum >>= 22;
                out.rgb[((size_t)y * out.w + x) * 3 + c] = sum < 0 ? 0 : sum > 255 ? 255 : sum;
            }
    return out;
}

static Image resize_ref(Image in, int w, int h, bool y_first) {
    Image half = pass_ref(in, y_first ? h : w, y_first), out = pass_ref(half, y_first ? w : h, !y_first);
    image_free(half);
    return out;
}

static void test_resize(void) {
    uint64_t seed = 7;
    int n_new = 0;
    for (int i = 0; i < 300; i++) {
        int w = 1 + rnd_int(&seed, i % 5 ? 60 : 4), h = 1 + rnd_int(&seed, i % 7 ? 60 : 4), to_w = 1 + rnd_int(&seed, 60), to_h = 1 + rnd_int(&seed, 60);
        if (i % 11 == 0) to_w = w;
        if (i % 13 == 0) to_h = h;
        bool rule = to_h < h && h - to_h > 2 * (w - to_w);
        Image in = image_random(w, h, &seed), want = resize_ref(in, to_w, to_h, false), want13 = resize_ref(in, to_w, to_h, rule);
        Image got = image_resize(in, to_w, to_h, 0), got13 = image_resize(in, to_w, to_h, IMAGE_PILLOW13);
        check(same(got, want), "resize %dx%d to %dx%d", w, h, to_w, to_h);
        check(same(got13, want13), "resize %dx%d to %dx%d, Pillow 13", w, h, to_w, to_h);
        check(w != to_w || h != to_h || same(got, in), "resize %dx%d to itself", w, h);
        n_new += !same(want, want13);
        image_free(in), image_free(want), image_free(want13), image_free(got), image_free(got13);
    }
    check(n_new > 30, "the two orders of passes differed in %d cases only", n_new);
}

// ----------------------------------------------------------------------------
// crop, pad, stretch, normalise, patches

static void test_pipelines(void) {
    Image b = image_b(640, 480), crop = image_square(b, 336, IMAGE_CROP), pad = image_square(b, 336, IMAGE_PAD), stretch = image_square(b, 448, IMAGE_STRETCH);
    size_t n = 336 * 336;
    float *chw = need(3 * n, sizeof(float)), *rows = need(3 * n, sizeof(float));
    check(crop.w == 336 && crop.h == 336 && pixel_is(crop, 0, 0, 31, 0, 192) && pixel_is(crop, 335, 335, 223, 255, 192), "crop: corners");
    image_normalize(chw, crop, clip_mean, clip_std);
    check(chw[0] == -1.3397113f && chw[n] == -1.7520971f && chw[2 * n] == 1.2500329f, "normalised: %.8g %.8g %.8g", chw[0], chw[n], chw[2 * n]);
    double sum = 0;
    for (size_t i = 0; i < 3 * n; i++) sum += chw[i];
    check(fabs(sum - 19480.43) < 0.005, "crop: normalised sum %.3f", sum);             // two digits are known

    Image bytes = image_new(256, 1);                                                    // every byte in every channel, bit for bit: the hash is numpy's
    for (int i = 0; i < 768; i++) bytes.rgb[i] = i / 3;
    image_normalize(rows, bytes, clip_mean, clip_std);
    check(fnv((Image){256, 4, (uint8_t *)rows}) == 0x2a4891e1, "normalised bits: %08x", fnv((Image){256, 4, (uint8_t *)rows}));
    image_free(bytes);

    image_patches(rows, chw, 336, 14);
    bool ok = true;
    for (int t = 0; t < 576; t++)
        for (int i = 0; i < 588; i++)
            ok &= rows[t * 588 + i] == chw[(i / 196) * n + (t / 24 * 14 + i / 14 % 14) * 336 + t % 24 * 14 + i % 14];
    check(ok, "patches: order");
    image_patches(rows, chw, 16, 5);                                                    // 3 x 3 patches; the last row and column are left
    check(rows[0] == chw[0] && rows[8 * 75] == chw[10 * 16 + 10] && rows[9 * 75 - 1] == chw[2 * 256 + 14 * 16 + 14], "patches that do not fill the picture");

    check(byte_sum(pad) == 39739726 && fnv(pad) == 0xe8e1eb53, "pad: sum %ld, hash %08x", byte_sum(pad), fnv(pad));
    check(pixel_is(pad, 0, 0, 122, 116, 104) && pixel_is(pad, 0, 41, 114, 108, 97) && pixel_is(pad, 0, 42, 8, 8, 7) && pixel_is(pad, 0, 43, 0, 0, 0), "pad: column 0");
    image_normalize(chw, pad, clip_mean, clip_std);
    sum = 0;
    for (size_t i = 0; i < 3 * n; i++) sum += chw[i];
    check(fabs(sum - 14267.79) < 0.005, "pad: normalised sum %.3f", sum);
    check(byte_sum(stretch) == 71261212 && fnv(stretch) == 0xb393f685, "stretch");
    image_free(b), image_free(crop), image_free(pad), image_free(stretch), free(chw), free(rows);
}

// The windows against the whole: a crop of the picture resized, and a resize of the picture padded.
static void test_windows(void) {
    uint64_t seed = 3;
    static const int sizes[] = {1, 7, 28, 112};
    for (int i = 0; i < 200; i++) {
        int w = 1 + rnd_int(&seed, 150), h = 1 + rnd_int(&seed, i % 4 ? 150 : 5), size = sizes[i % 4], side = w > h ? w : h, order = i & IMAGE_PILLOW13;
        Image in = image_random(w, h, &seed), square = image_new(side, side), want = image_new(size, size);
        Image whole = image_resize(in, w <= h ? size : size * w / h, h <= w ? size : size * h / w, order);
        for (int y = 0; y < size; y++)
            memcpy(want.rgb + (size_t)y * size * 3, whole.rgb + ((size_t)(y + (whole.h - size) / 2) * whole.w + (whole.w - size) / 2) * 3, size * 3);
        Image got = image_square(in, size, IMAGE_CROP | order);
        check(same(got, want), "crop of %dx%d to %d", w, h, size);
        for (int k = 0; k < side * side * 3; k++) square.rgb[k] = k % 3 == 0 ? 122 : k % 3 == 1 ? 116 : 104;
        for (int y = 0; y < h; y++)
            memcpy(square.rgb + ((size_t)(y + (w > h ? (w - h) / 2 : 0)) * side + (w < h ? (h - w) / 2 : 0)) * 3, in.rgb + (size_t)y * w * 3, w * 3);
        Image padded = image_resize(square, size, size, 0), got_pad = image_square(in, size, IMAGE_PAD | order);
        check(same(got_pad, padded), "pad of %dx%d to %d", w, h, size);
        image_free(in), image_free(square), image_free(want), image_free(whole), image_free(got), image_free(padded), image_free(got_pad);
    }
}

// Shapes at the limits: they end, in memory of the order of the picture. 1 x 5000 cropped would be 336 x 1680000 uncropped.
static void test_extreme(void) {
    static const int shapes[][2] = {{1, 1}, {1, 2}, {1, 5000}, {5000, 1}, {1, 1 << 18}, {1 << 18, 1}, {256, 1 << 18}, {8000, 8000}};
    static const int sizes[] = {112, 336, 448};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int mode = IMAGE_CROP; mode <= IMAGE_STRETCH; mode++) {
            if ((shapes[i][0] == 256 && mode != IMAGE_STRETCH) || (shapes[i][0] == 8000 && mode != IMAGE_PAD)) continue;   // these take a second
            Image in = image_new(shapes[i][0], shapes[i][1]), out;
            memset(in.rgb, 200, (size_t)in.w * in.h * 3);
            out = image_square(in, sizes[mode], mode);
            int middle = (sizes[mode] / 2 * sizes[mode] + sizes[mode] / 2) * 3;
            bool narrow = mode == IMAGE_PAD && in.w != in.h;                  // a line of 200 among padding, or less
            check(out.w == sizes[mode] && out.h == out.w && (narrow ? out.rgb[middle] >= 122 : out.rgb[middle] == 200 && out.rgb[0] == 200),
                  "%dx%d, mode %d: %d", in.w, in.h, mode, out.rgb[middle]);
            image_free(in), image_free(out);
        }
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf("extreme shapes: peak memory %ld MB\n", usage.ru_maxrss / 1024);
#if !defined(__SANITIZE_ADDRESS__) && !__has_feature(address_sanitizer)
    check(usage.ru_maxrss < 700 * 1024, "a picture of 192 MB (and 336 MB between the passes of a 256 x 262144 one) took %ld MB", usage.ru_maxrss / 1024);
#endif
}

// ----------------------------------------------------------------------------
// files

typedef struct { uint8_t *data; size_t n; } Bytes;

static Bytes read_file(const char *name) {      // of tests/images
    char path[256];
    snprintf(path, sizeof path, "tests/images/%s", name);
    FILE *f = fopen(path, "rb");
    if (!f) die("run the test from the root of the repository", "%s: %s", path, strerror(errno));
    Bytes b = {need(1 << 20, 1), 0};
    b.n = fread(b.data, 1, 1 << 20, f);
    fclose(f);
    return b;
}

static const char *decode_error(Bytes b) {      // NULL: it decodes. The bytes are copied, so that a sanitizer sees their end
    uint8_t *exact = malloc(b.n);
    memcpy(exact, b.data, b.n);
    Image m = {0};
    const char *error = image_decode(&m, exact, b.n);
    free(exact);
    if (!error) image_free(m);
    return error;
}

static void test_png(void) {
    static const struct { const char *name; int color, depths; } types[] = {        // depths: powers of 2, so a mask
        {"grey", 0, 1 | 2 | 4 | 8 | 16}, {"rgb", 2, 8 | 16}, {"palette", 3, 1 | 2 | 4 | 8}, {"greya", 4, 8 | 16}, {"rgba", 6, 8 | 16}};
    static const char *const variants[] = {"", "i", "t", "short"};                  // plain, interlaced, tRNS, a palette of 100 colours
    int n = 0;
    for (int t = 0; t < 5; t++)
        for (int depth = 1; depth <= 16; depth *= 2)
            for (int variant = 0; variant < 4; variant++) {
                if (!(types[t].depths & depth) || (variant == 2 && (depth != 8 || t > 2)) || (variant == 3 && (depth != 8 || t != 2))) continue;
                char path[100];
                snprintf(path, sizeof path, "tests/images/%s%d%s.png", types[t].name, depth, variants[variant]);
                Image m = image_load(path);
                bool ok = m.w == 13 && m.h == 11;
                for (int i = 0; ok && i < 13 * 11 * 3; i++) {
                    int x = i / 3 % 13, y = i / 39, c = i % 3, channel = t == 1 || t == 4 ? c : 0;
                    int v = (37 * x + 91 * y + 53 * channel + 11 * x * y) % 256, s = depth < 8 ? v >> (8 - depth) : v, want = s;
                    if (t == 2) want = variant == 3 && s >= 100 ? 0 : (c == 0 ? 5 * s + 1 : c == 1 ? 3 * s + 2 : 255 - s) % 256;
                    else if (depth < 8) want = s * 255 / ((1 << depth) - 1);
                    ok = m.rgb[i] == want;
                }
                check(ok, "%s", path);
                n++;
                image_free(m);
            }
    check(n == 34, "%d PNG files", n);
    Image one = image_load("tests/images/rgb8-1x1.png"), five = image_load("tests/images/grey1i-5x5.png"), large = image_load("tests/images/grey1-large.png");
    check(one.w == 1 && one.h == 1 && pixel_is(one, 0, 0, 0, 53, 106), "1x1");
    check(five.w == 5 && five.h == 5 && pixel_is(five, 4, 1, (37 * 4 + 91 + 44) % 256 > 127 ? 255 : 0, five.rgb[27], five.rgb[27]), "5x5");
    check(large.w == 8000 && large.h == 8000 && pixel_is(large, 7998, 0, 255, 255, 255) && pixel_is(large, 7999, 0, 0, 0, 0) && pixel_is(large, 5, 7999, 0, 0, 0), "64 megapixels");
    image_free(one), image_free(five), image_free(large);
}

static void test_jpeg(void) {
    static const char *const pairs[][2] = {         // file, and which file's reading by Pillow it should resemble
        {"444.jpg", "444.jpg"}, {"422.jpg", "422.jpg"}, {"420.jpg", "420.jpg"}, {"progressive.jpg", "420.jpg"}, {"restart.jpg", "420.jpg"},
        {"exif.jpg", "420.jpg"}, {"optimized.jpg", "optimized.jpg"}, {"icc.jpg", "icc.jpg"}, {"rgb.jpg", "rgb.jpg"}, {"grey.jpg", "grey.jpg"},
        {"grey-progressive.jpg", "grey.jpg"}, {"1x1.jpg", "1x1.jpg"}, {"17x3.jpg", "17x3.jpg"}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        char path[100], want_path[100];
        snprintf(path, sizeof path, "tests/images/%s", pairs[i][0]), snprintf(want_path, sizeof want_path, "tests/images/%s.png", pairs[i][1]);
        Image got = image_load(path), want = image_load(want_path);
        int worst = got.w == want.w && got.h == want.h ? 0 : 999;
        for (int k = 0; worst < 999 && k < got.w * got.h * 3; k++) {
            if (!strcmp(pairs[i][0], "422.jpg") && k / 3 % got.w >= got.w - 2) continue;       // stb_image mixes up two samples there
            int d = abs(got.rgb[k] - want.rgb[k]);
            if (d > worst) worst = d;
        }
        check(worst <= 4, "%s: %d levels from Pillow", path, worst);       // other rounding in upsampling and colours
        image_free(got), image_free(want);
    }
}

static void test_truncated(void) {              // every beginning of every kind of file is an error
    static const char *const names[] = {"420.jpg", "progressive.jpg", "restart.jpg", "grey.jpg", "17x3.jpg", "rgb8.png", "rgba16i.png", "palette8t.png", "grey1i-5x5.png", "rgb8-1x1.png"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        Bytes b = read_file(names[i]);
        size_t n = b.n, n_accepted = 0;
        check(!decode_error(b), "%s whole: %s", names[i], decode_error(b));
        for (b.n = 0; b.n < n; b.n++) n_accepted += !decode_error(b);
        check(n_accepted == 0, "%s: %zu beginnings are accepted", names[i], n_accepted);
        free(b.data);
    }
}

// ----------------------------------------------------------------------------
// hostile files: one edit each, and words that the error must have

static size_t segment(Bytes b, int marker, int nth) {  // offset of the marker's 0xFF
    for (size_t p = 2; p + 4 < b.n; ) {
        if (b.data[p + 1] == marker && nth-- == 0) return p;
        bool scan = b.data[p + 1] == 0xDA;
        p += 2 + (b.data[p + 2] << 8 | b.data[p + 3]);
        while (scan && p + 1 < b.n && !(b.data[p] == 0xFF && b.data[p + 1] != 0 && (b.data[p + 1] & 0xF8) != 0xD0)) p++;
    }
    die(NULL, "no segment %02x", marker);
}

static void put_bytes(Bytes *b, size_t at, size_t remove, const void *insert, size_t n) {
    memmove(b->data + at + n, b->data + at + remove, b->n - at - remove);
    memcpy(b->data + at, insert, n);
    b->n += n - remove;
}

static void refused(const char *what, Bytes b, const char *words) {
    const char *error = decode_error(b);
    check(error && strstr(error, words), "%s: %s, expected \"%s\"", what, error ? error : "accepted", words);
    free(b.data);
}

static void test_bad_jpeg(void) {
    static const char *const corrupt = "corrupt", *const truncated = "truncated", *const unsupported = "not supported";
    uint8_t table[19 + 600] = {0xFF, 0xC4, 0, 0, 0x10};
    Bytes b = read_file("420.jpg");
    size_t sof = segment(b, 0xC0, 0), sos = segment(b, 0xDA, 0), dht = segment(b, 0xC4, 0), dqt = segment(b, 0xDB, 0);
    #define EDIT(what, file, words, ...) do { b = read_file(file); __VA_ARGS__; refused(what, b, words); } while (0)
    free(b.data);

    // tables
    table[5 + 15] = 255, table[5 + 14] = 255, table[2] = (17 + 510 + 2) >> 8, table[3] = (17 + 510 + 2) & 255;
    EDIT("510 Huffman codes", "420.jpg", corrupt, put_bytes(&b, dht, 0, table, 2 + 2 + 17 + 510));
    memset(table + 5, 0, 16), table[5] = 3, table[2] = 0, table[3] = 2 + 17 + 3;
    EDIT("3 Huffman codes of 1 bit", "420.jpg", corrupt, put_bytes(&b, dht, 0, table, 2 + 2 + 17 + 3));
    EDIT("Huffman table 4", "420.jpg", corrupt, b.data[dht + 4] = 0x04);
    EDIT("Huffman class 2", "420.jpg", corrupt, b.data[dht + 4] = 0x20);
    EDIT("Huffman table longer than its segment", "420.jpg", corrupt, b.data[dht + 5] = 200);
    EDIT("Huffman table never defined", "420.jpg", corrupt, b.data[dht + 4] = 3);
    EDIT("quantisation table 4", "420.jpg", corrupt, b.data[dqt + 4] = 4);
    EDIT("quantisation table of 32 bits", "420.jpg", corrupt, b.data[dqt + 4] = 0x20);
    EDIT("quantisation table shorter than 64", "420.jpg", corrupt, put_bytes(&b, dqt + 60, 1, "", 0), b.data[dqt + 3]--);
    EDIT("quantisation table never defined", "420.jpg", corrupt, b.data[dqt + 4] = 3);
    // frame
    EDIT("12 bits", "420.jpg", unsupported, b.data[sof + 4] = 12);
    EDIT("height 0", "420.jpg", "no pixels", b.data[sof + 5] = b.data[sof + 6] = 0);
    EDIT("width 0", "420.jpg", "no pixels", b.data[sof + 7] = b.data[sof + 8] = 0);
    EDIT("2 components", "420.jpg", unsupported, b.data[sof + 9] = 2);
    EDIT("4 components in the room of 3", "420.jpg", corrupt, b.data[sof + 9] = 4);
    EDIT("sampling 0", "420.jpg", corrupt, b.data[sof + 11] = 0x02);
    EDIT("sampling 5", "420.jpg", corrupt, b.data[sof + 11] = 0x52);
    EDIT("sampling 3 : 2", "420.jpg", unsupported, b.data[sof + 11] = 0x32, b.data[sof + 14] = 0x22);
    EDIT("quantisation table 9 used", "420.jpg", corrupt, b.data[sof + 12] = 9);
    EDIT("two components of one name", "420.jpg", corrupt, b.data[sof + 13] = b.data[sof + 10]);
    EDIT("two frames", "420.jpg", corrupt, { uint8_t copy[19]; memcpy(copy, b.data + sof, 19); put_bytes(&b, sof, 0, copy, 19); });
    EDIT("arithmetic coding", "420.jpg", unsupported, b.data[sof + 1] = 0xC9);
    EDIT("lossless", "420.jpg", unsupported, b.data[sof + 1] = 0xC3);
    EDIT("40000 x 40000", "420.jpg", "64 megapixels", b.data[sof + 5] = b.data[sof + 7] = 40000 >> 8);
    EDIT("64 megapixels and a bit", "420.jpg", "64 megapixels", memcpy(b.data + sof + 5, "\x1f\x41\x1f\x40", 4));
    EDIT("64 megapixels in 900 bytes", "420.jpg", truncated, memcpy(b.data + sof + 5, "\x1f\x40\x1f\x40", 4));
    EDIT("64 progressive megapixels in 900 bytes", "progressive.jpg", truncated, memcpy(b.data + segment(b, 0xC2, 0) + 5, "\x1f\x40\x1f\x40", 4));
    // scans
    EDIT("a scan before the frame", "420.jpg", corrupt, b.data[sof + 1] = 0xFE);
    EDIT("a scan of 0 components", "420.jpg", corrupt, b.data[sos + 4] = 0);
    EDIT("a scan of 4 of 3 components", "420.jpg", corrupt, b.data[sos + 4] = 4);
    EDIT("a scan of a component that is not there", "420.jpg", corrupt, b.data[sos + 5] = 77);
    EDIT("a component twice in a scan", "420.jpg", corrupt, b.data[sos + 7] = b.data[sos + 5]);
    EDIT("DC table 4", "420.jpg", corrupt, b.data[sos + 6] = 0x40);
    EDIT("AC table 4", "420.jpg", corrupt, b.data[sos + 6] = 0x04);
    EDIT("a sequential scan from 1", "420.jpg", corrupt, b.data[sos + 11] = 1);
    EDIT("a scan of one component only", "444.jpg", truncated, { size_t s = segment(b, 0xDA, 0); put_bytes(&b, s + 2, 9, "\0\10\1\1\0", 5); });
    EDIT("restarts that are not there", "420.jpg", truncated, put_bytes(&b, sos, 0, "\xff\xdd\0\4\0\1", 6));
    EDIT("segment past the end", "420.jpg", truncated, b.data[dqt + 2] = 0xF0);
    EDIT("segment of length 1", "420.jpg", corrupt, b.data[dqt + 2] = 0, b.data[dqt + 3] = 1);
    EDIT("restart marker among the segments", "420.jpg", corrupt, b.data[dqt + 1] = 0xD3);
    EDIT("nothing but start and end", "420.jpg", "no picture", memcpy(b.data + 2, "\xff\xd9", 2), b.n = 4);
    // progressive
    b = read_file("progressive.jpg");
    size_t dc = segment(b, 0xDA, 0), ac = segment(b, 0xDA, 1);
    free(b.data);
    EDIT("AC before DC", "progressive.jpg", corrupt, memset(b.data + dc, 0xFF, ac - dc));
    EDIT("spectral range backwards", "progressive.jpg", corrupt, b.data[ac + 7] = 9, b.data[ac + 8] = 8);
    EDIT("spectral range to 64", "progressive.jpg", corrupt, b.data[ac + 8] = 64);
    EDIT("DC and AC together", "progressive.jpg", corrupt, b.data[ac + 7] = 0);
    EDIT("shift of 14", "progressive.jpg", corrupt, b.data[ac + 9] = 14);
    EDIT("101 scans", "progressive.jpg", unsupported, for (int i = 0; i < 100; i++) put_bytes(&b, b.n - 2, 0, "\xff\xda\0\10\1\1\0\1\1\x10", 10));
}

static void test_bad_png(void) {
    Bytes b;
    EDIT("colour type 1", "rgb8.png", "corrupt", b.data[25] = 1);
    EDIT("colour type 7", "rgb8.png", "corrupt", b.data[25] = 7);
    EDIT("RGB of 4 bits", "rgb8.png", "corrupt", b.data[24] = 4);
    EDIT("depth 0", "rgb8.png", "corrupt", b.data[24] = 0);
    EDIT("palette of 16 bits", "palette8.png", "corrupt", b.data[24] = 16);
    EDIT("palette missing", "rgb8.png", "corrupt", b.data[25] = 3);
    EDIT("compression 1", "rgb8.png", "corrupt", b.data[26] = 1);
    EDIT("filter method 1", "rgb8.png", "corrupt", b.data[27] = 1);
    EDIT("interlacing 2", "rgb8.png", "corrupt", b.data[28] = 2);
    EDIT("width 0", "rgb8.png", "no pixels", b.data[19] = 0);
    EDIT("height 0", "rgb8.png", "no pixels", b.data[23] = 0);
    EDIT("width 2^31", "rgb8.png", "262144", b.data[16] = 0x80);
    EDIT("64 megapixels and a row", "rgb8.png", "64 megapixels", memcpy(b.data + 16, "\0\0\x1f\x40\0\0\x1f\x41", 8));
    EDIT("64 megapixels and a pixel", "rgb8.png", "64 megapixels", memcpy(b.data + 16, "\x00\x00\x14\x5d\x00\x00\x2f\xf5", 8));     // 5213 x 12277
    EDIT("64 megapixels in 600 bytes", "rgb8.png", "truncated", memcpy(b.data + 16, "\0\0\x1f\x40\0\0\x1f\x40", 8));
    EDIT("more rows than data", "rgb8.png", "orrupt", b.data[23] = 12);
    EDIT("chunk of 2 GB", "rgb8.png", "truncated", b.data[33] = 0x80);
    EDIT("no header", "rgb8.png", "corrupt", put_bytes(&b, 8, 25, "", 0));
    EDIT("two headers", "rgb8.png", "corrupt", { uint8_t copy[25]; memcpy(copy, b.data + 8, 25); put_bytes(&b, 33, 0, copy, 25); });
    EDIT("header of 12 bytes", "rgb8.png", "corrupt", b.data[11] = 12, put_bytes(&b, 16, 1, "", 0));
    EDIT("palette of 257 colours", "palette8.png", "corrupt", b.data[35] = 3, b.data[36] = 3, put_bytes(&b, 41, 0, "\1\2\3", 3));
    EDIT("palette of 1 2/3 colours", "palette1.png", "corrupt", b.data[36]--, put_bytes(&b, 41, 1, "", 0));
    EDIT("two palettes", "palette1.png", "corrupt", { uint8_t copy[18]; memcpy(copy, b.data + 33, 18); put_bytes(&b, 33, 0, copy, 18); });
    EDIT("critical chunk", "rgb8.png", "critical", b.data[37] = 'C');
    EDIT("Apple's CgBI", "rgb8.png", "critical", memcpy(b.data + 37, "CgBI", 4));
    EDIT("no data", "rgb8-1x1.png", "corrupt", for (size_t i = 33; i + 4 < b.n; i++) if (!memcmp(b.data + i, "IDAT", 4)) memcpy(b.data + i, "iDAT", 4));
    EDIT("1 MB of data for 1 pixel", "bad-bomb.png", "Out of memory", (void)0);
}

// ----------------------------------------------------------------------------
// what the user sees

// image_load(path) in a child: exit status 1, and a message that starts with "error: " and has `words`.
static void load_fails(const char *path, const char *words) {
    int fd[2];
    check(pipe(fd) == 0, "pipe");
    pid_t pid = fork();
    if (pid == 0) {
        dup2(fd[1], 2), close(fd[0]), close(fd[1]);
        image_load(path);
        _exit(0);
    }
    close(fd[1]);
    char message[1000];
    size_t n = 0;
    for (ssize_t got; n < sizeof message - 1 && (got = read(fd[0], message + n, sizeof message - 1 - n)) > 0; ) n += got;
    message[n] = 0;
    close(fd[0]);
    int status;
    waitpid(pid, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 1 && !strncmp(message, "error: ", 7) && strstr(message, words) && strstr(message, path),
          "%s: status %d, \"%s\"", path, status, message);
}

static void bad_file(const char *what, const void *data, size_t n, const char *words) {
    char path[] = "/tmp/test_image_XXXXXX";
    int fd = mkstemp(path);
    check(fd >= 0 && write(fd, data, n) == (ssize_t)n, "%s: cannot write %s", what, path);
    close(fd);
    load_fails(path, words);
    unlink(path);
}

static void test_errors(void) {
    load_fails("tests/images/none.png", "No such file");
    load_fails("tests/images", "directory");
    load_fails("tests/images/make.py", "neither JPEG nor PNG");
    load_fails("tests/images/bad-bomb.png", "emory");
    bad_file("empty", "", 0, "empty");
    bad_file("GIF", "GIF89a\1\0\1\0\0\0\0;", 14, "neither JPEG nor PNG");
    bad_file("BMP", "BM\0\0\0\0\0\0\0\0", 10, "neither JPEG nor PNG");
    bad_file("one byte", "\xff", 1, "neither JPEG nor PNG");
    Bytes b = read_file("420.jpg");
    bad_file("half a JPEG", b.data, b.n / 2, "truncated");
    memcpy(b.data + segment(b, 0xC0, 0) + 5, "\x20\x01\x20\x00", 4);
    bad_file("large JPEG", b.data, b.n, "64 megapixels");
    free(b.data), b = read_file("rgb8.png");
    bad_file("half a PNG", b.data, b.n / 2, "truncated");
    memcpy(b.data + 16, "\0\0\x1f\x40\0\0\x1f\x41", 8);
    bad_file("large PNG", b.data, b.n, "64 megapixels");
    free(b.data);
}

int main(void) {
    test_errors();                              // first: it forks, which OpenMP's threads would not survive
    test_vectors();
    test_resize();
    test_pipelines();
    test_windows();
    test_extreme();
    test_png();
    test_jpeg();
    test_truncated();
    test_bad_jpeg();
    test_bad_png();
    return finish();
}
