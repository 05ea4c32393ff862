// test_paint.c: paint.h: PNG files that another decoder reads back byte for byte, the drawing at and over the edges, the colours.
//
//     make build/test_paint && build/test_paint

#include "image.h"
#include "paint.h"
#include "test.h"

static size_t round_trip(const Canvas *a, const char *name) {
    char *file = NULL;
    size_t bytes = 0;
    canvas_save(a, name, open_memstream(&file, &bytes));
    Image got = { 0 };
    const char *why = image_decode(&got, (uint8_t *)file, bytes);
    check(!why && got.w == a->w && got.h == a->h && !memcmp(got.rgb, a->rgb, (size_t)a->w * a->h * 3), "%s, %d x %d: %s", name, a->w, a->h, why ? why : "other pixels");
    image_free(got);
    free(file);
    return bytes;
}

static bool is(const Canvas *a, int x, int y, Color c) { return !memcmp(a->rgb + ((size_t)y * a->w + x) * 3, &c, 3); }

// Flat, random and repeating pictures of odd sizes: stored literals of both code lengths, matches of all lengths and distances.
static void test_png(void) {
    uint64_t seed = 1;
    for (int i = 0; i < 200; i++) {
        int w = 1 + rnd_int(&seed, i < 100 ? 20 : 300), h = 1 + rnd_int(&seed, i < 100 ? 20 : 100), kind = i % 4, period = 1 + rnd_int(&seed, 3 * w);
        Canvas a = canvas_new(w, h, (Color){ 10, 20, 250 });
        for (int j = 0; kind && j < w * h * 3; j++)
            a.rgb[j] = kind == 1 ? (uint8_t)rnd_u64(&seed) : kind == 2 ? (j >= period ? a.rgb[j - period] : (uint8_t)rnd_u64(&seed)) : (uint8_t)(j / 3 % w + j / 3 / w + rnd_int(&seed, 3));
        round_trip(&a, "a canvas");
        free(a.rgb);
    }
    Canvas a = canvas_new(3000, 100, (Color){ 200, 0, 100 });
    size_t flat = round_trip(&a, "one colour");
    check(flat < 10000, "one colour takes %zu bytes", flat);
    for (int y = 0; y < a.h; y++)                             // a noisy tile, 20 times side by side: about one of them must be paid for
        for (int x = 0; x < a.w; x++)
            for (int k = 0; k < 3; k++) a.rgb[((size_t)y * a.w + x) * 3 + k] = x < 150 ? (uint8_t)rnd_u64(&seed) : a.rgb[((size_t)y * a.w + x - 150) * 3 + k];
    size_t sheet = round_trip(&a, "a sheet");
    check(sheet < 100 * 150 * 3 * 2, "a sheet of 20 equal noisy panels takes %zu bytes", sheet);
    free(a.rgb);
}

static void test_drawing(void) {
    Canvas a = canvas_new(20, 10, WHITE);
    canvas_rect(&a, -3, -3, 5, 5, BLACK);
    canvas_rect(&a, 18, 8, 100, 100, BLACK);
    canvas_rect(&a, 5, 5, 0, 3, BLACK);
    canvas_rect(&a, 50, 50, 3, 3, BLACK);
    int black = 0;
    for (int y = 0; y < 10; y++) for (int x = 0; x < 20; x++) black += is(&a, x, y, BLACK);
    check(black == 8 && is(&a, 1, 1, BLACK) && is(&a, 2, 1, WHITE) && is(&a, 18, 8, BLACK) && is(&a, 17, 8, WHITE), "rectangles: %d black pixels", black);
    free(a.rgb);

    a = canvas_new(7 * FONT_W, FONT_H, WHITE);
    canvas_text(&a, 0, 0, 1, BLACK, "%s%d|\xc3\xa9", "I ", 17);
    check(is(&a, 2, 0, BLACK) && is(&a, 2, 6, BLACK) && is(&a, 0, 3, WHITE), "I");
    for (int y = 0; y < FONT_H; y++) for (int x = FONT_W; x < 2 * FONT_W; x++) if (!is(&a, x, y, WHITE)) check(false, "a blank is not blank");
    bool same = true;
    Canvas b = canvas_new(7 * FONT_W, FONT_H, WHITE);
    canvas_text(&b, 5 * FONT_W, 0, 1, BLACK, "??");
    for (int y = 0; y < FONT_H; y++) for (int x = 5 * FONT_W; x < b.w; x++) same &= is(&a, x, y, WHITE) == is(&b, x, y, WHITE);
    check(same, "what is not ASCII is a ?");
    canvas_text(&b, -7, -3, 3, BLACK, "over the edge, and far out of it");
    free(a.rgb);
    free(b.rgb);

    for (int i = 0; i < 95; i++)                              // every letter but the blank has dots, no two are the same
        for (int j = 0; j < i; j++) if (!memcmp(font[i], font[j], 5)) check(false, "'%c' and '%c' look the same", i + ' ', j + ' ');
    check(text_width("abc", 2) == 36, "text_width");
}

static void test_colors(void) {
    static const struct { double x; Color c; } want[] = {     // matplotlib.cm.viridis
        { 0, { 68, 1, 84 } }, { 0.25, { 59, 82, 139 } }, { 0.5, { 33, 145, 140 } }, { 0.75, { 94, 201, 98 } }, { 1, { 253, 231, 37 } } };
    for (int i = 0; i < 5; i++) {
        Color c = viridis(want[i].x), w = want[i].c;
        check(abs(c.r - w.r) <= 5 && abs(c.g - w.g) <= 5 && abs(c.b - w.b) <= 5, "viridis(%g) is %d %d %d", want[i].x, c.r, c.g, c.b);
    }
    Color a = { 0, 100, 200 }, b = { 200, 0, 200 }, half = mix(a, b, 0.5), zero = mix(a, b, 0), one = mix(a, b, 1);
    check(half.r == 100 && half.g == 50 && half.b == 200 && !memcmp(&zero, &a, 3) && !memcmp(&one, &b, 3), "mix");
}

int main(void) {
    test_png();
    test_drawing();
    test_colors();
    return finish();
}
