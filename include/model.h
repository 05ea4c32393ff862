// model.h: the flat model file: its layout byte by byte, mapping and validation. export/*.py writes it.
//
// All numbers are little-endian. One header, then the tensors' bytes, each matrix aligned to 64.
//
//     offset  bytes  what
//     0       8      magic "vlm.c\r\n\x1a"
//     8       4      u32 version (1)
//     12      4      u32 n_fields
//     16      4      u32 n_tensors
//     20      4      u32 0
//     24      8      u64 tokenizer offset, a multiple of 64
//     32      8      u64 tokenizer bytes
//     40      8      u64 file bytes: the length of the whole file
//     48      16     architecture, zero-padded: "llava", "qwenvl"
//     64             n_fields fields of 64 bytes:
//                        char name[40], zero-padded    u32 kind (0: integer, 1: float)    u32 0
//                        i64 or f64 value              8 zero bytes
//     …              n_tensors entries of 128 bytes:
//                        char name[64], zero-padded    u32 type (kernels.h: f32 0, f16 1, bf16 2, q8_0 3)
//                        u32 rows, u32 cols (a vector is one row)    u32 0
//                        u64 offset, u64 bytes = rows * row_bytes(type, cols)
//                        u64 scale offset, u64 scale bytes = rows * scale_row_bytes(cols); both 0 unless q8_0
//                        16 zero bytes
//     …              the tokenizer (tokenizer.h), then the matrices; offsets are multiples of 64, nothing overlaps
//
// A row of a matrix is padded with zeros to a multiple of 64 bytes. q8_0: rows of int8, and a second matrix of f16 scales,
// one for 32 inputs. Every count, offset and product is checked here, before anything is read through it.

#ifndef MODEL_H
#define MODEL_H
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "error.h"
#include "kernels.h"

#define MODEL_VERSION 1
#define MODEL_HINT "export the checkpoint again with export/llava.py"

typedef struct { char name[40]; uint32_t kind, zero; union { int64_t i; double f; } value; uint64_t zero2; } Field;
typedef struct { char name[64]; uint32_t type, rows, cols, zero; uint64_t offset, bytes, scale_offset, scale_bytes, zero2[2]; } Tensor;
typedef struct { char magic[8]; uint32_t version, n_fields, n_tensors, zero; uint64_t tok_offset, tok_bytes, file_bytes; char arch[16]; } FileHeader;
_Static_assert(sizeof(FileHeader) == 64 && sizeof(Field) == 64 && sizeof(Tensor) == 128, "the layout above");

typedef struct {
    const char *path;
    const uint8_t *data;      // the mapping
    size_t size;              // its bytes
    const FileHeader *header;
    const Field *field;       // (n_fields,)
    const Tensor *tensor;     // (n_tensors,)
} ModelFile;

static const char *const type_names[N_TYPES] = { "f32", "f16", "bf16", "q8_0" };

static inline int terminated(const char *s, size_t n) { return memchr(s, 0, n) != NULL && s[0]; }

typedef struct { uint64_t start, end; const char *name; } Extent;   // bytes of the file that belong to somebody
static int by_start(const void *a, const void *b) {
    const Extent *x = a, *y = b;
    return x->start < y->start ? -1 : x->start > y->start;
}

static inline Extent extent(const ModelFile *f, const char *name, uint64_t offset, uint64_t bytes) {
    if (offset % 64) die(MODEL_HINT, "%s: %s is not aligned to 64 bytes (offset %llu)", f->path, name, (unsigned long long)offset);
    if (offset > f->size || bytes > f->size - offset)
        die("the file is truncated or damaged: copy or " MODEL_HINT, "%s: %s lies past the end of the file", f->path, name);
    return (Extent){ offset, offset + bytes, name };
}

// Checks all that the header promises; ends the program at the first thing that is not so.
static inline void model_check(ModelFile *f) {
    const FileHeader *h = f->header;
    if (f->size < sizeof *h) die(MODEL_HINT, "%s: too short for a model file (%zu bytes)", f->path, f->size);
    if (memcmp(h->magic, "vlm.c\r\n\x1a", 8)) die(MODEL_HINT, "%s: not a model file of this project (wrong magic)", f->path);
    if (h->version != MODEL_VERSION) die("written by another exporter: " MODEL_HINT, "%s: expected version %d, found %u", f->path, MODEL_VERSION, h->version);
    if (h->file_bytes != f->size)
        die("the file is truncated or damaged: copy or " MODEL_HINT, "%s: %zu bytes, its header says %llu", f->path, f->size, (unsigned long long)h->file_bytes);
    if (!terminated(h->arch, sizeof h->arch)) die(MODEL_HINT, "%s: the architecture has no name", f->path);
    if (h->n_fields > 1024 || h->n_tensors > 16384) die(MODEL_HINT, "%s: %u fields and %u tensors are more than any model has", f->path, h->n_fields, h->n_tensors);
    uint64_t head = 64 + 64 * (uint64_t)h->n_fields + 128 * (uint64_t)h->n_tensors;
    if (head > f->size) die(MODEL_HINT, "%s: %u fields and %u tensors do not fit into the file", f->path, h->n_fields, h->n_tensors);
    f->field = (const Field *)(f->data + 64);
    f->tensor = (const Tensor *)(f->data + 64 + 64 * (size_t)h->n_fields);
    for (uint32_t i = 0; i < h->n_fields; i++) {
        const Field *x = &f->field[i];
        if (!terminated(x->name, sizeof x->name) || x->kind > 1) die(MODEL_HINT, "%s: field %u is broken", f->path, i);
        if (x->kind == 1 && !isfinite(x->value.f)) die(MODEL_HINT, "%s: field %s is not a number", f->path, x->name);
        for (uint32_t j = 0; j < i; j++)
            if (!strcmp(x->name, f->field[j].name)) die(MODEL_HINT, "%s: field %s stands there twice", f->path, x->name);
    }
    Extent *e = need(2 * (size_t)h->n_tensors + 2, sizeof *e);
    size_t n = 0;
    e[n++] = (Extent){ 0, head, "the header" };
    e[n++] = extent(f, "the tokenizer", h->tok_offset, h->tok_bytes);
    for (uint32_t i = 0; i < h->n_tensors; i++) {
        const Tensor *t = &f->tensor[i];
        if (!terminated(t->name, sizeof t->name)) die(MODEL_HINT, "%s: tensor %u has no name", f->path, i);
        if (t->type >= N_TYPES) die(MODEL_HINT, "%s: tensor %s has the unknown type %u", f->path, t->name, t->type);
        if (t->rows < 1 || t->cols < 1 || t->rows > INT32_MAX || t->cols > INT32_MAX / 4) die(MODEL_HINT, "%s: tensor %s has the shape (%u, %u)", f->path, t->name, t->rows, t->cols);
        if (t->bytes != t->rows * (uint64_t)row_bytes(t->type, t->cols)) die(MODEL_HINT, "%s: tensor %s: %llu bytes do not fit its shape (%u, %u)", f->path, t->name, (unsigned long long)t->bytes, t->rows, t->cols);
        e[n++] = extent(f, t->name, t->offset, t->bytes);
        if (t->type == Q8_0) {
            if (t->cols % 32) die(MODEL_HINT, "%s: tensor %s is q8_0 but its width %u is no multiple of 32", f->path, t->name, t->cols);
            if (t->scale_bytes != t->rows * (uint64_t)scale_row_bytes(t->cols)) die(MODEL_HINT, "%s: tensor %s: wrong size of its scales", f->path, t->name);
            e[n++] = extent(f, t->name, t->scale_offset, t->scale_bytes);
        }
        for (uint32_t j = 0; j < i; j++)
            if (!strcmp(t->name, f->tensor[j].name)) die(MODEL_HINT, "%s: tensor %s stands there twice", f->path, t->name);
    }
    qsort(e, n, sizeof *e, by_start);
    for (size_t i = 1; i < n; i++)
        if (e[i].start < e[i - 1].end) die(MODEL_HINT, "%s: %s and %s overlap", f->path, e[i - 1].name, e[i].name);
    free(e);
}

// Maps and checks a model file. It stays mapped until model_close.
static inline ModelFile model_open(const char *path) {
    ModelFile f = { .path = path };
    int fd = open(path, O_RDONLY);
    if (fd < 0) die("give the path of a file that export/llava.py wrote", "%s: %s", path, strerror(errno));
    struct stat st;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) die("give the path of a file that export/llava.py wrote", "%s: not a file", path);
    f.size = (size_t)st.st_size;
    if (f.size < sizeof(FileHeader)) die(MODEL_HINT, "%s: too short for a model file (%zu bytes)", path, f.size);
    void *p = mmap(NULL, f.size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (p == MAP_FAILED) die("a 64-bit system can map files of any size: check limits (ulimit -v)", "%s: cannot map %zu bytes: %s", path, f.size, strerror(errno));
    f.data = p;
    f.header = p;
    model_check(&f);
    return f;
}

static inline void model_close(ModelFile *f) { munmap((void *)f->data, f->size); f->data = NULL; }

static inline const Field *model_field(const ModelFile *f, const char *name, uint32_t kind) {
    for (uint32_t i = 0; i < f->header->n_fields; i++)
        if (!strcmp(f->field[i].name, name)) {
            if (f->field[i].kind != kind) die(MODEL_HINT, "%s: field %s is of the wrong kind", f->path, name);
            return &f->field[i];
        }
    die(MODEL_HINT, "%s: field %s is missing", f->path, name);
}

// The value of a field, which must lie in [lo, hi].
static inline int model_int(const ModelFile *f, const char *name, int lo, int hi) {
    int64_t v = model_field(f, name, 0)->value.i;
    if (v < lo || v > hi) die(MODEL_HINT, "%s: field %s is %lld, allowed are %d to %d", f->path, name, (long long)v, lo, hi);
    return (int)v;
}
static inline double model_float(const ModelFile *f, const char *name, double lo, double hi) {
    double v = model_field(f, name, 1)->value.f;
    if (!(v >= lo && v <= hi)) die(MODEL_HINT, "%s: field %s is %g, allowed are %g to %g", f->path, name, v, lo, hi);
    return v;
}

static inline const Tensor *model_tensor(const ModelFile *f, const char *name, int rows, int cols) {
    for (uint32_t i = 0; i < f->header->n_tensors; i++) {
        const Tensor *t = &f->tensor[i];
        if (strcmp(t->name, name)) continue;
        if ((int64_t)t->rows != rows || (int64_t)t->cols != cols)
            die(MODEL_HINT, "%s: tensor %s has the shape (%u, %u), the model needs (%d, %d)", f->path, name, t->rows, t->cols, rows, cols);
        return t;
    }
    die(MODEL_HINT, "%s: tensor %s is missing", f->path, name);
}

// A weight matrix of the shape (rows, cols), handed to the back-end (K). `format` makes its name: "layers.%d.wqkv".
__attribute__((format(printf, 4, 5)))
static inline Mat model_mat(const ModelFile *f, int rows, int cols, const char *format, ...) {
    char name[64];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    const Tensor *t = model_tensor(f, name, rows, cols);
    return K->weight(t->type, rows, cols, f->data + t->offset, t->type == Q8_0 ? f->data + t->scale_offset : NULL);
}

// An f32 vector of n values, likewise: a norm, a bias.
__attribute__((format(printf, 3, 4)))
static inline const float *model_vec(const ModelFile *f, int n, const char *format, ...) {
    char name[64];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    const Tensor *t = model_tensor(f, name, 1, n);
    if (t->type != F32) die(MODEL_HINT, "%s: tensor %s must be f32", f->path, name);
    return K->weight(F32, 1, n, f->data + t->offset, NULL).data;
}

// --info: what the file holds.
static inline void model_info(const ModelFile *f, FILE *out) {
    const FileHeader *h = f->header;
    fprintf(out, "%s: %s, version %u, %zu bytes, tokenizer %llu bytes\n\n", f->path, h->arch, h->version, f->size, (unsigned long long)h->tok_bytes);
    for (uint32_t i = 0; i < h->n_fields; i++) {
        const Field *x = &f->field[i];
        if (x->kind) fprintf(out, "  %-24s %g\n", x->name, x->value.f);
        else fprintf(out, "  %-24s %lld\n", x->name, (long long)x->value.i);
    }
    fputc('\n', out);
    double params = 0;
    for (uint32_t i = 0; i < h->n_tensors; i++) {
        const Tensor *t = &f->tensor[i];
        fprintf(out, "  %-28s %-5s %8u x %-8u at %llu\n", t->name, type_names[t->type], t->rows, t->cols, (unsigned long long)t->offset);
        params += (double)t->rows * t->cols;
    }
    fprintf(out, "\n%u tensors, %.0f parameters\n", h->n_tensors, params);
}

// ----------------------------------------------------------------------------
// Arch: what a model file (llava.c, qwenvl.c) offers to the programs that run it

typedef struct Tokenizer Tokenizer;
typedef struct Runs Runs;
typedef struct Model Model;      // each model file's own

enum { VICUNA_V1, LLAVA_V1, HF, CHATML, PLAIN, MILEBENCH, RAW, N_TEMPLATES };
static const char *const template_names[N_TEMPLATES] = { "vicuna_v1", "llava_v1", "hf", "chatml", "plain", "milebench", "raw" };

typedef struct {                 // what the generate loop needs to know
    int dim, n_layers, n_heads, n_kv_heads, head_dim;
    int vocab_size, n_pieces;    // rows of the head; ids from n_pieces on are never generated
    int max_positions;
    int bos_id, n_stop, stop_id[4];
    int image_id, image_rows;    // what --tokens prints for an image row; rows a picture, a square of patches
    int image_size;              // pixels along a side of what the vision tower reads
    int template, image_mode;    // the model file's defaults
    Tokenizer *tok;
    Mat tok_emb;                 // (vocab_size, dim)
    const float *cos_sin;        // rotary table, back-end memory; valid after room()
} Info;

typedef struct {                 // the rows of one turn, as they enter the decoder
    int n, cap;
    int *id;                     // (n,) token id; -1: an image row
    uint8_t *kind;               // (n,) TEMPLATE, TEXT, IMAGE (policies.h)
    int n_images, *image_at;     // first row of each picture
    int n_text, *text_id;        // Simignore's text set, where the prompt was cut for it
} Prompt;

typedef struct {                 // what a turn is made of
    int template;
    const char *system;          // NULL: the template's
    const char *text;            // what the user says, len bytes; <image> stands where a picture goes
    size_t len;
    int n_images;                // pictures of this turn
    bool first;                  // the sequence starts here
    int last_id;                 // later turns: the last token of the answer, which was not fed yet; -1: none
    int split;                   // policies.h: SPLIT_7B, SPLIT_13B or 0
} Turn;

typedef struct {
    const char *name;            // as the model file says it
    Model *(*open)(const ModelFile *f);
    void (*close)(Model *m);
    const Info *(*info)(const Model *m);
    // Room for passes of up to `rows` rows, `want` of which give logits, and for `positions` rotary positions. Invalidates cos_sin.
    void (*room)(Model *m, int rows, int want, int positions);
    void (*prompt)(const Model *m, Prompt *p, const Turn *turn);          // p: zero, or freed arrays of an earlier turn
    // Reads a picture and runs the vision side; its rows wait in the model for forward(). mode: image.h's. Times in milliseconds.
    void (*see)(Model *m, const char *path, int mode, double *image_ms, double *vision_ms);
    // The pass that pass_prompt (p: its prompt) or pass_tokens (p NULL) of run.h began: all layers, then logits of the rows
    // h_want (indices among the rows that leave the last layer; NULL: the last n_want of them). h_logits: (n_want, vocab_size).
    void (*forward)(Model *m, Runs *r, const Prompt *p, const int *h_want, int n_want, float *h_logits);
} Arch;

extern const Arch llava, qwenvl;

#endif
