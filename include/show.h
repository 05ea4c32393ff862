// show.h: looks on while a model runs and shows what happened to its cache: -m paints what was kept, --attention draws attention
// maps, --trace writes it down (trace.h). Nothing here is called, and nothing computed, unless one of them was asked for.
//
// What it sees: every layer of a prompt (run.h: watch_layer) and every plan before it is carried out (run.h: watch).

#ifndef SHOW_H
#define SHOW_H
#include "model.h"
#include "paint.h"
#include "run.h"
#include "trace.h"

typedef struct {
    const char *kept_path, *attention_path;
    FILE *kept, *attention;      // open until their picture is saved; NULL: not asked for
    int attention_layer;         // -1: all
    Trace trace;
    int n_pictures, grid;        // the prompt's pictures; patches along a side of one
    Canvas *picture;             // (n_pictures,) as the model saw them, grid * cell pixels wide and high
    Runs *runs;
    int n, *image_at;            // rows of the first prompt; first row of each picture
    uint8_t *hidden;             // (n_layers, n) keys that a layer did not look at
    float **map;                 // (n_layers)(cells, cells) pooled attention; -1: no row or key there
    int block, cells;            // tokens a cell; cells along a side
} Show;

static const Color ink = { 40, 40, 40 }, merged_color = { 0, 185, 185 };
static const Color kind_color[] = { { 140, 140, 150 }, { 45, 110, 220 }, { 60, 175, 95 }, { 200, 60, 60 } };   // template, text, image, answer
static const char *const kind_label[] = { "template", "text", "image", "answer" };

// ----------------------------------------------------------------------------
// a contact sheet: a title, a panel for each layer, a legend

typedef struct {
    Canvas c;
    int cols, w, h, top, gap;    // panels a row; a panel's size, its label included; height of the title
} Sheet;

enum { LABEL_H = 22, LEGEND_H = 34 };

// Up to 5 panels stand in one row, more in rows of 8 at most, as long as these are not too wide.
static inline Sheet sheet_new(int n, int w, int h, const char *title, const char *below) {
    Sheet s = { .cols = n <= 5 ? n : (n + (n - 1) / 8) / ((n - 1) / 8 + 1), .w = w, .h = h + LABEL_H, .gap = 16, .top = 58 };
    while (s.cols > 1 && s.cols * (s.w + s.gap) > 1900) s.cols--;
    int rows = (n + s.cols - 1) / s.cols, width = s.cols * (s.w + s.gap) + s.gap, least = text_width(title, 1) + 2 * s.gap;
    if (least < text_width(below, 1) + 2 * s.gap) least = text_width(below, 1) + 2 * s.gap;
    if (least < 640) least = 640;                            // the legend
    if (width < least) width = least;
    s.c = canvas_new(width, s.top + rows * (s.h + s.gap) + LEGEND_H, WHITE);
    canvas_text(&s.c, s.gap, 16, text_width(title, 2) + 2 * s.gap <= width ? 2 : 1, BLACK, "%s", title);
    canvas_text(&s.c, s.gap, 40, 1, ink, "%s", below);
    return s;
}

// Writes the panel's label; *x, *y: where the panel itself begins.
__attribute__((format(printf, 5, 6)))
static inline void sheet_panel(Sheet *s, int i, int *x, int *y, const char *format, ...) {
    char label[64];
    va_list args;
    va_start(args, format);
    vsnprintf(label, sizeof label, format, args);
    va_end(args);
    *x = s->gap + i % s->cols * (s->w + s->gap);
    *y = s->top + i / s->cols * (s->h + s->gap) + LABEL_H;
    int size = text_width(label, 2) <= s->w ? 2 : 1;
    canvas_text(&s->c, *x, *y - FONT_H * size - 1, size, ink, "%s", label);
}

static inline void legend(Sheet *s, int *x, const char *text) {
    canvas_text(&s->c, *x, s->c.h - LEGEND_H + 9, 1, ink, "%s", text);
    *x += text_width(text, 1) + 12;
}
static inline void swatch(Sheet *s, int *x, Color c, const char *text) {
    int y = s->c.h - LEGEND_H + 6;
    canvas_rect(&s->c, *x, y, 12, 12, ink);
    canvas_rect(&s->c, *x + 1, y + 1, 10, 10, c);
    *x += 18;
    legend(s, x, text);
}

// ----------------------------------------------------------------------------
// -m: what was kept, painted on the picture
//
// A patch is as clear as the share of heads that keep it. What a layer lost, it lost to rows that did not come (FastV), to slots
// that left, or to keys that it may not look at; a slot whose content went into a kept one is tinted. The state is that after the
// prompt; what leaves while decoding is in the trace.

typedef struct { float *kept, *merged, *target; } Fate;      // (n,) by token: shares of the heads; target: some content came in

static inline double fates(const Show *s, const Runs *r, const Run *q, int layer, Fate f) {   // slots kept, mean over heads
    double slots = 0;
    for (int i = 0; i < s->n; i++) f.kept[i] = f.merged[i] = f.target[i] = 0;
    for (int h = layer * r->n_kv_heads; h < (layer + 1) * r->n_kv_heads; h++) {
        const Head *c = &q->head[h];
        for (int j = 0; j < c->len; j++) {
            bool kept = c->keep[j] && !s->hidden[layer * s->n + c->pos[j]], merged = c->into && c->into[j] >= 0;
            slots += kept;
            if (kept) f.kept[c->pos[j]] += 1.0f / r->n_kv_heads;
            else if (merged) f.merged[c->pos[j]] += 1.0f / r->n_kv_heads;
            if (merged) f.target[c->pos[c->into[j]]] += 1.0f / r->n_kv_heads;
        }
    }
    return slots / r->n_kv_heads;
}

// Dropped patches fade into what the picture is not: a dark one into light grey, any other into dark grey.
static const Color faded[2] = { { 45, 45, 55 }, { 225, 225, 230 } };
static inline bool is_dark(const Canvas *a) {
    double sum = 0;
    for (size_t i = 0; i < (size_t)a->w * a->h * 3; i++) sum += a->rgb[i];
    return sum / a->w / a->h / 3 < 80;
}

static inline void paint_picture(const Show *s, Canvas *c, int x, int y, int k, Fate f) {
    const Canvas *a = &s->picture[k];
    int cell = a->w / s->grid, dot = cell < 12 ? 2 : cell / 5;
    Color gone = faded[is_dark(a)];
    for (int j = 0; j < a->h; j++)
        for (int i = 0; i < a->w; i++) {
            int t = s->image_at[k] + j / cell * s->grid + i / cell;
            const uint8_t *p = a->rgb + ((size_t)j * a->w + i) * 3;
            Color clear = { p[0], p[1], p[2] }, tinted = mix(clear, merged_color, 0.6), dim = mix(gone, clear, 0.18);
            float kept = f.kept[t], merged = f.merged[t], rest = kept + merged;
            Color v = mix(dim, rest > 0 ? mix(clear, tinted, merged / rest) : dim, rest);
            if (cell >= 8 && (i % cell == 0 || j % cell == 0)) v = mix(v, (Color){ 128, 128, 128 }, 0.25);         // the grid
            canvas_rect(c, x + i, y + j, 1, 1, v);
        }
    for (int p = 0; p < s->grid * s->grid; p++)              // a dot on a patch that others went into
        if (f.target[s->image_at[k] + p] > 0)
            canvas_rect(c, x + p % s->grid * cell + (cell - dot) / 2, y + p / s->grid * cell + (cell - dot) / 2, dot, dot, merged_color);
}

// The prompt's other tokens from top to bottom; a notch where a picture stands.
static inline void paint_bar(const Show *s, Canvas *c, int x, int y, int w, int h, const uint8_t *kind, Fate f) {
    int n = 0, at = 0;
    for (int t = 0; t < s->n; t++) n += kind[t] != IMAGE;
    for (int t = 0; t < s->n; t++) {
        if (kind[t] == IMAGE) continue;
        int y0 = (int)((double)h * at / n), y1 = (int)((double)h * (at + 1) / n), line = y1 - y0 > 3;
        canvas_rect(c, x, y + y0, w, y1 - y0 - line, mix(mix(faded[1], kind_color[kind[t]], f.kept[t]), merged_color, f.merged[t]));
        at++;
    }
    for (int k = 0; k < s->n_pictures; k++) {
        int before = 0;
        for (int t = 0; t < s->image_at[k]; t++) before += kind[t] != IMAGE;
        canvas_rect(c, x - 3, y + (int)((double)h * before / n) - 2, w + 6, 3, BLACK);
    }
}

static inline void paint_kept(Show *s, const Runs *r, const Run *q) {
    int side = s->picture[0].w, across = s->n_pictures <= 4 ? s->n_pictures < 4 ? s->n_pictures : 2 : 4, down = (s->n_pictures + across - 1) / across;
    int w = across * (side + 4) - 4, h = down * (side + 4) - 4, bar = 12, x, y;
    Fate f = { need(s->n, sizeof(float)), need(s->n, sizeof(float)), need(s->n, sizeof(float)) };
    double all = 0;
    bool merged = false, differ = false, dropped = false;
    for (int l = 0; l < r->n_layers; l++) {
        all += fates(s, r, q, l, f) / r->n_layers;
        for (int t = 0; t < s->n; t++) {
            merged |= f.target[t] > 0;
            differ |= f.kept[t] > 0.001f && f.kept[t] < 0.999f;
            dropped |= f.kept[t] + f.merged[t] < 0.999f;
        }
    }
    char title[400], below[400] = "";
    snprintf(title, sizeof title, "%s: kept %.4g of %d slots (%.3g %%)", r->chain->name, rint(10 * all) / 10, s->n, 100 * all / s->n);
    for (int i = 0; i < r->chain->n; i++) {
        const Policy *p = r->chain->part[i].policy;
        size_t at = strlen(below);
        snprintf(below + at, sizeof below - at, "%s%s%s%s", at ? "; then " : "keeps ", p->keeps, *p->paper ? ", " : "", p->paper);
    }
    Sheet sheet = sheet_new(r->n_layers, w + 6 + bar, h, title, *below ? below : "keeps everything");
    for (int l = 0; l < r->n_layers; l++) {
        double slots = fates(s, r, q, l, f);
        sheet_panel(&sheet, l, &x, &y, "layer %d: kept %.4g of %d", l, rint(10 * slots) / 10, s->n);
        for (int k = 0; k < s->n_pictures; k++) paint_picture(s, &sheet.c, x + k % across * (side + 4), y + k / across * (side + 4), k, f);
        paint_bar(s, &sheet.c, x + w + 6, y, bar, h, q->kind, f);
    }
    x = sheet.gap;
    bool fades[2] = { false };
    for (int k = 0; k < s->n_pictures; k++) fades[is_dark(&s->picture[k])] = dropped;
    if (fades[0]) swatch(&sheet, &x, faded[0], fades[1] ? "" : "dropped");
    if (fades[1]) swatch(&sheet, &x, faded[1], "dropped");
    if (differ && dropped) legend(&sheet, &x, "(between: by some heads)");
    if (merged) swatch(&sheet, &x, merged_color, differ && !dropped ? "merged into others (between: in some heads)" : "merged into others, as the dotted ones");
    legend(&sheet, &x, "the bar, top to bottom:");
    swatch(&sheet, &x, kind_color[TEXT], "question");
    swatch(&sheet, &x, kind_color[TEMPLATE], "template");
    legend(&sheet, &x, "-- picture");
    snprintf(title, sizeof title, "-m %s", s->kept_path);
    canvas_save(&sheet.c, title, s->kept);
    s->kept = NULL;
    free(sheet.c.rgb); free(f.kept); free(f.merged); free(f.target);
}

// ----------------------------------------------------------------------------
// --attention: who looks at whom, a panel for each layer
//
//     map[t,j]     = mean over all heads of the attention that row t of the prompt gives to key j
//     cell[a,b]    = mean of map over blocks of 20 x 20 tokens, the remainder cut
//     colour       = viridis, logarithmic from 0.0007 to the layer's largest cell; white: the future
//
// Paper: FastV, arXiv:2403.06764, its attention figures; authors' code: plot_inefficient_attention.py, which draws prompt and answer,
// each layer in a file of its own, titled from 1. Here: the prompt alone, layers from 0. Prompts below 600 tokens take smaller blocks,
// so that a side has about 30 cells. Rows or keys that a policy left out: grey.

static const double map_low = 0.0007;

static inline void pool_map(Show *s, const Runs *r, int layer) {
    int T = r->rows.T, cells = s->cells;
    float *map = need((size_t)T * T, sizeof *map), *sum = need((size_t)cells * cells, sizeof *sum);
    int *count = need((size_t)cells * cells, sizeof *count);
    K->kv_map(map, r->kv, layer, r->qkv, r->lse, &r->rows, r->n_heads, visible(r));
    for (int t = 0; t < T; t++)
        for (int j = 0; j < T; j++) {
            int a = r->h_pos[t] / s->block, b = r->h_pos[j] / s->block;
            if (a >= cells || b >= cells || (r->hidden && !r->visible[r->h_seq[0]][r->h_pos[j]])) continue;
            sum[a * cells + b] += map[(size_t)t * T + j];
            count[a * cells + b]++;
        }
    for (int i = 0; i < cells * cells; i++) sum[i] = count[i] ? sum[i] / count[i] : -1;
    s->map[layer] = sum;
    free(map);
    free(count);
}

static inline void paint_attention(Show *s, const Runs *r) {
    bool one = s->attention_layer >= 0;
    int cells = s->cells, px = (one ? 600 : r->n_layers > 8 ? 186 : 240) / cells, left = 4 * FONT_W + 10, bottom = FONT_H + 12, x, y;
    const uint8_t *kind = r->kind[r->h_seq[0]];
    if (px < 2) px = 2;
    int side = cells * px;
    char title[400];
    snprintf(title, sizeof title, "attention of %d tokens, mean over heads, blocks of %d%s%s", s->n, s->block, r->chain->n ? ", " : "", r->chain->n ? r->chain->name : "");
    Sheet sheet = sheet_new(one ? 1 : r->n_layers, left + side, side + bottom, title, "rows: who looks; columns: at whom; numbers: index of the token");
    for (int p = 0, l; (l = one ? s->attention_layer : p) < r->n_layers; p++) {
        float high = 0;
        for (int i = 0; i < cells * cells; i++) if (s->map[l][i] > high) high = s->map[l][i];
        double range = log(fmax(high, map_low * 1.01) / map_low);
        sheet_panel(&sheet, p, &x, &y, "layer %d, max %.2g", l, high);
        for (int i = 0; i < cells * cells; i++) {
            double v = log(fmax(s->map[l][i], map_low) / map_low) / range;
            Color c = s->map[l][i] < 0 ? (Color){ 200, 200, 200 } : i % cells > i / cells ? WHITE : viridis(v);
            canvas_rect(&sheet.c, x + left + i % cells * px, y + i / cells * px, px, px, c);
        }
        for (int i = 0; i < side; i++) {                     // what the tokens are
            Color c = kind_color[kind[i * s->block / px]];
            canvas_rect(&sheet.c, x + left - 6, y + i, 5, 1, c);
            canvas_rect(&sheet.c, x + left + i, y + side + 1, 1, 5, c);
        }
        int step = (cells + 5) / 6;
        for (int i = 0; i < cells; i += step) {              // token indices
            char tick[12];
            snprintf(tick, sizeof tick, "%d", i * s->block);
            canvas_text(&sheet.c, x + left - 8 - text_width(tick, 1), y + i * px, 1, ink, "%s", tick);
            canvas_text(&sheet.c, x + left + i * px, y + side + 9, 1, ink, "%s", tick);
        }
        if (one) break;
    }
    x = sheet.gap;
    legend(&sheet, &x, "0.0007");
    for (int i = 0; i < 100; i++) canvas_rect(&sheet.c, x + i, sheet.c.h - LEGEND_H + 6, 1, 12, viridis(i / 99.0));
    x += 112;
    legend(&sheet, &x, "max (log)");
    bool there[4] = { false };
    for (int t = 0; t < s->n; t++) there[kind[t]] = true;
    for (int k = 0; k < 4; k++) if (there[k]) swatch(&sheet, &x, kind_color[k], kind_label[k]);
    snprintf(title, sizeof title, "--attention %s", s->attention_path);
    canvas_save(&sheet.c, title, s->attention);
    s->attention = NULL;
    free(sheet.c.rgb);
}

// ----------------------------------------------------------------------------
// looking on

static inline void show_unwatch(Show *s) {                   // the rest of the run costs nothing
    if (s->trace.f) return;
    if (!s->kept) s->runs->watch = NULL;
    if (!s->kept && !s->attention) s->runs->watch_layer = NULL;
}

static void show_layer(void *ctx, const Runs *r, int layer) {
    Show *s = ctx;
    if (s->trace.f) trace_layer(&s->trace, r, layer);
    if (s->kept && r->hidden) for (int t = 0; t < s->n; t++) s->hidden[layer * s->n + t] = !r->visible[r->h_seq[0]][t];
    if (!s->attention) return;
    if (s->attention_layer < 0 || s->attention_layer == layer) pool_map(s, r, layer);
    if (layer == r->n_layers - 1) paint_attention(s, r);
    show_unwatch(s);
}

static void show_plan(void *ctx, const Runs *r, const Run *q) {
    Show *s = ctx;
    if (s->trace.f) trace_plan(&s->trace, r, q);
    if (s->kept) paint_kept(s, r, q);
    show_unwatch(s);
}

// Rows of sequence 0 are about to be read.
static inline void show_prompt(Show *s, Runs *r, const Prompt *p, int first) {
    if (s->trace.f) trace_prompt(&s->trace, r, p->id, p->kind, p->n, first);
    if (first) return;
    s->runs = r;
    s->n = p->n;
    s->image_at = p->image_at;
    s->block = p->n >= 600 ? 20 : p->n >= 60 ? p->n / 30 : 1;
    s->cells = p->n / s->block;
    s->map = need(r->n_layers, sizeof *s->map);
    s->hidden = need((size_t)r->n_layers * p->n, 1);
    r->watch_ctx = s;
    if (s->kept || s->trace.f) r->watch = show_plan;
    if (s->kept || s->attention || s->trace.f) r->watch_layer = show_layer;
}

static inline void show_close(Show *s) {
    trace_close(&s->trace);
    for (int l = 0; s->map && l < s->runs->n_layers; l++) free(s->map[l]);
    for (int k = 0; k < s->n_pictures; k++) free(s->picture[k].rgb);
    free(s->map); free(s->hidden); free(s->picture);
}

#endif
