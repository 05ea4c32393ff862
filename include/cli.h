// cli.h: the command line of ./llava and ./qwenvl: options, one question or a chat, and what is printed around the answer.
//
// The answer goes to standard output and nothing else does, but for -h, --info, --tokens and -p help, which only print.

#ifndef CLI_H
#define CLI_H
#include <omp.h>
#include "compare.h"
#include "generate.h"
#include "image.h"

const Kernels *K;                // the back-end in use

typedef struct {
    const char *text, *text_file, *template, *system;
    bool chat;
    int n;
    double temperature, top_p, penalty;
    int top_k, n_answers;
    uint64_t seed;
    const char *policy, *drop, *keep, *pos;
    const char *backend, *kv, *image_mode;
    int threads, device, ctx;
    bool compare, tokens, show_info, quiet, verbose, help;
    const char *kept, *attention, *trace;
    int attention_layer;
    const char *force, *force_ids, *logits;
} Options;

enum { FLAG, STRING, COUNT, REAL, SEED };
typedef struct {
    const char *name, *longer;   // "-n", "--…" or NULL
    int kind;
    size_t at;                   // offset in Options
    double lo, hi;               // COUNT, REAL: what is allowed
    const char *value, *help;
} Option;

#define OPT(field) offsetof(Options, field)
static const Option option_table[] = {
    { NULL, NULL, FLAG, 0, 0, 0, NULL, "what to say" },
    { "-i", NULL, STRING, OPT(text), 0, 0, "TEXT", "the question; <image> where each picture goes, else they go first (\"Describe the image in detail.\")" },
    { "-f", NULL, STRING, OPT(text_file), 0, 0, "FILE", "the question from a file, to its last byte; - is standard input" },
    { NULL, "--template", STRING, OPT(template), 0, 0, "NAME", "vicuna_v1, llava_v1, hf, chatml, plain, milebench, raw (the model file's)" },
    { NULL, "--system", STRING, OPT(system), 0, 0, "TEXT", "the system prompt (the template's)" },
    { "-c", NULL, FLAG, OPT(chat), 0, 0, NULL, "chat: more turns from standard input, cache kept" },
    { NULL, NULL, FLAG, 0, 0, 0, NULL, "how to answer" },
    { "-n", NULL, COUNT, OPT(n), 1, 1 << 20, "N", "at most N new tokens (256)" },
    { "-t", NULL, REAL, OPT(temperature), 0, 1e6, "T", "temperature; 0: greedy (0)" },
    { NULL, "--top-k", COUNT, OPT(top_k), 1, 1 << 20, "N", "sample from the N most likely tokens (off)" },
    { NULL, "--top-p", REAL, OPT(top_p), 1e-9, 1, "P", "sample from the likeliest tokens that hold P together (off)" },
    { NULL, "--repeat-penalty", REAL, OPT(penalty), 1e-3, 1e3, "X", "divide the logits of tokens that were there by X (1)" },
    { "-s", NULL, SEED, OPT(seed), 0, 0, "SEED", "seed of sampling and of -p random (the time)" },
    { "-B", NULL, COUNT, OPT(n_answers), 1, 4096, "N", "N answers to the prompt as one batch, seeds SEED, SEED+1, … (1)" },
    { NULL, NULL, FLAG, 0, 0, 0, NULL, "what to forget" },
    { "-p", NULL, STRING, OPT(policy), 0, 0, "POLICY", "NAME[:FORM][:key=value,…], joined with +; -p help lists them (full)" },
    { "-r", NULL, STRING, OPT(drop), 0, 0, "R", "fraction dropped, 0 to 1 (0)" },
    { "-k", NULL, STRING, OPT(keep), 0, 0, "K", "fraction kept, instead of -r" },
    { NULL, "--pos", STRING, OPT(pos), 0, 0, "P", "next token's rotary position: true (its index) or slot (the cache's length) (the policy's)" },
    { NULL, NULL, FLAG, 0, 0, 0, NULL, "where it runs" },
    { "-b", NULL, STRING, OPT(backend), 0, 0, "B", "cpu or cuda (cuda if it was built in and a device answers)" },
    { "-j", NULL, COUNT, OPT(threads), 1, 4096, "N", "CPU threads (the cores this process may use)" },
    { NULL, "--device", COUNT, OPT(device), 0, 1024, "N", "which GPU (the launcher's local rank, else 0)" },
    { NULL, "--kv", STRING, OPT(kv), 0, 0, "TYPE", "type of the cache, f32 or f16 (f32 on the CPU, f16 on CUDA)" },
    { NULL, "--ctx", COUNT, OPT(ctx), 1, 1 << 20, "N", "longest sequence (what the prompt and -n need)" },
    { NULL, "--image-mode", STRING, OPT(image_mode), 0, 0, "M", "crop or pad: how a picture becomes square (the model file's)" },
    { NULL, NULL, FLAG, 0, 0, 0, NULL, "what to show" },
    { "-m", NULL, STRING, OPT(kept), 0, 0, "FILE.png", "what was kept, painted on the picture, a panel a layer" },
    { NULL, "--compare", FLAG, OPT(compare), 0, 0, NULL, "the full cache's answer beside it: where they part, KL divergence and agreement a step" },
    { NULL, "--attention", STRING, OPT(attention), 0, 0, "FILE.png", "the prompt's attention map, a panel a layer" },
    { NULL, "--attention-layer", COUNT, OPT(attention_layer), 0, 1000, "N", "this layer alone, large (all)" },
    { NULL, "--trace", STRING, OPT(trace), 0, 0, "FILE", "one JSON line an event: rows, plans, drops, tokens" },
    { NULL, "--tokens", FLAG, OPT(tokens), 0, 0, NULL, "print the prompt, a row a line: index, id, kind, piece; then stop" },
    { NULL, "--info", FLAG, OPT(show_info), 0, 0, NULL, "print what the model file holds and stop" },
    { "-q", NULL, FLAG, OPT(quiet), 0, 0, NULL, "nothing but the answer" },
    { "-v", NULL, FLAG, OPT(verbose), 0, 0, NULL, "more" },
    { "-h", "--help", FLAG, OPT(help), 0, 0, NULL, "this text" },
    { NULL, NULL, FLAG, 0, 0, 0, NULL, "to compare with other programs" },
    { NULL, "--force", STRING, OPT(force), 0, 0, "FILE", "the answer is this file's text, token by token, whatever the model would say" },
    { NULL, "--force-ids", STRING, OPT(force_ids), 0, 0, "FILE", "the same with ids, white space between" },
    { NULL, "--logits", STRING, OPT(logits), 0, 0, "FILE", "float32, a row of the vocabulary for each predicted token" },
};
#define N_OPTIONS (sizeof option_table / sizeof *option_table)

static inline void print_help(const char *program) {
    printf("usage:   %s MODEL IMAGE… [options]\n", program);
    printf("example: %s models/scenes-llava.bin models/scenes/1000.png -i \"How many shapes are there?\"\n", program);
    for (size_t i = 0; i < N_OPTIONS; i++) {
        const Option *o = &option_table[i];
        char left[64];
        if (!o->name && !o->longer) { printf("\n%s\n", o->help); continue; }
        snprintf(left, sizeof left, "%s%s%s %s", o->name ? o->name : "", o->name && o->longer ? ", " : "", o->longer ? o->longer : "", o->value ? o->value : "");
        printf("  %-20s %s\n", left, o->help);
    }
}

static inline double parse_real(const char *name, const char *value, double lo, double hi) {
    char *end;
    errno = 0;
    double v = strtod(value, &end);
    if (end == value || *end || !(v >= lo && v <= hi)) die(NULL, "%s %s: allowed is a number from %g to %g", name, value, lo, hi);
    return v;
}

static inline void set_option(Options *o, const Option *opt, const char *name, const char *value) {
    char *field = (char *)o + opt->at, *end;
    if (opt->kind == FLAG) *(bool *)field = true;
    if (opt->kind == STRING) *(const char **)field = value;
    if (opt->kind == REAL) *(double *)field = parse_real(name, value, opt->lo, opt->hi);
    if (opt->kind == COUNT) {
        errno = 0;
        long v = strtol(value, &end, 10);
        if (end == value || *end || errno || v < opt->lo || v > opt->hi) die(NULL, "%s %s: allowed is a whole number from %.0f to %.0f", name, value, opt->lo, opt->hi);
        *(int *)field = (int)v;
    }
    if (opt->kind == SEED) {
        errno = 0;
        unsigned long long v = strtoull(value, &end, 10);
        if (end == value || *end || errno || strchr(value, '-')) die(NULL, "%s %s: allowed is a whole number from 0 to 2^64 - 1", name, value);
        *(uint64_t *)field = v;
    }
}

// Fills the options and moves the files (model, pictures) to the front of argv; returns how many there are.
static inline int parse_options(Options *o, int argc, char **argv) {
    int n = 0;
    bool files = false;
    for (int i = 1; i < argc; i++) {
        char *a = argv[i];
        if (files || a[0] != '-' || !a[1]) { argv[n++] = a; continue; }
        if (!strcmp(a, "--")) { files = true; continue; }
        char *equals = !strncmp(a, "--", 2) ? strchr(a, '=') : NULL;
        size_t len = equals ? (size_t)(equals - a) : strlen(a);
        const Option *opt = NULL;
        for (size_t j = 0; j < N_OPTIONS && !opt; j++) {
            const char *names[] = { option_table[j].name, option_table[j].longer };
            for (int k = 0; k < 2; k++) if (names[k] && strlen(names[k]) == len && !strncmp(names[k], a, len)) opt = &option_table[j];
        }
        if (!opt) die("-h lists the options", "unknown option %s", a);
        if (equals && opt->kind == FLAG) die(NULL, "%s: takes no value", a);
        const char *value = equals ? equals + 1 : NULL;
        if (equals) *equals = 0;
        if (!value && opt->kind != FLAG && ++i == argc) die("-h lists the options", "%s: a value must follow (%s)", a, opt->value);
        set_option(o, opt, a, value ? value : argv[i]);
    }
    return n;
}

// Index of `word` among n names; the error lists them.
static inline int one_of(const char *option, const char *word, const char *const *names, int n) {
    char all[256] = "";
    for (int i = 0; i < n; i++) {
        if (!strcmp(word, names[i])) return i;
        snprintf(all + strlen(all), sizeof all - strlen(all), "%s%s", i ? ", " : "", names[i]);
    }
    die(NULL, "%s %s: allowed is one of %s", option, word, all);
}

// A whole file, or standard input for "-", with a zero behind its last byte.
static inline char *read_file(const char *option, const char *path, size_t *len) {
    FILE *f = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    if (!f) die(NULL, "%s %s: %s", option, path, strerror(errno));
    size_t room = 1 << 16, n = 0;
    char *s = need(room, 1);
    for (size_t got; (got = fread(s + n, 1, room - n - 1, f)) > 0; )
        if ((n += got) + 1 == room) {
            s = realloc(s, room *= 2);
            if (!s) die(NULL, "%s %s: out of memory", option, path);
        }
    if (ferror(f)) die(NULL, "%s %s: %s", option, path, strerror(errno));
    if (f != stdin) fclose(f);
    s[n] = 0;
    *len = n;
    return s;
}

// --force, --force-ids: the ids of the answer.
static inline int *forced_ids(const Options *o, const Info *info, int *n) {
    size_t len;
    int *id;
    if (o->force) {
        char *s = read_file("--force", o->force, &len);
        *n = tokenizer_encode(info->tok, s, len, true, NULL, 0);
        id = need(*n, sizeof *id);
        tokenizer_encode(info->tok, s, len, true, id, *n);
        free(s);
        if (!*n) die(NULL, "--force %s: the file is empty", o->force);
        return id;
    }
    char *s = read_file("--force-ids", o->force_ids, &len), *at = s, *end;
    id = need(len / 2 + 1, sizeof *id);
    *n = 0;
    for (;;) {
        while (*at && strchr(" \t\r\n\v\f", *at)) at++;
        if (at == s + len) break;
        long v = strtol(at, &end, 10);
        if (end == at || (*end && !strchr(" \t\r\n\v\f", *end)) || v < 0 || v >= info->vocab_size)
            die(NULL, "--force-ids %s: at byte %td: allowed are ids from 0 to %d, white space between", o->force_ids, at - s, info->vocab_size - 1);
        id[(*n)++] = (int)v;
        at = end;
    }
    free(s);
    if (!*n) die(NULL, "--force-ids %s: the file holds no ids", o->force_ids);
    return id;
}

// --tokens: index, id, kind, piece with C escapes
static inline void print_tokens(const Prompt *p, const Info *info) {
    static const char *const kinds[] = { "template", "text", "image", "answer" };
    static const char plain[] = "\a\b\t\n\v\f\r\\", letter[] = "abtnvfr\\";
    for (int i = 0; i < p->n; i++) {
        int len = 7, id = p->id[i] >= 0 ? p->id[i] : info->image_id >= 0 ? info->image_id : -200;
        const char *piece = p->id[i] >= 0 ? tokenizer_piece(info->tok, id, &len) : "<image>";
        printf("%d\t%d\t%s\t", i, id, kinds[p->kind[i]]);
        for (int j = 0; piece && j < len; j++) {
            unsigned char ch = (unsigned char)piece[j];
            const char *escape = ch ? strchr(plain, ch) : NULL;
            if (escape) printf("\\%c", letter[escape - plain]);
            else if (ch < 32 || ch == 127) printf("\\%03o", ch);
            else putchar(ch);
        }
        putchar('\n');
    }
}

static inline void choose_backend(const Options *o) {
    static const char *const names[] = { "cpu", "cuda" };
    int b = o->backend ? one_of("-b", o->backend, names, 2) : -1;
    K = &cpu;
#ifdef HAVE_CUDA
    if (o->device >= 0) { char n[16]; snprintf(n, sizeof n, "%d", o->device); setenv("VLM_DEVICE", n, 1); }
    if (b != 0) {
        const Kernels *k = cuda();
        if (k) K = k;
        else if (b == 1) die("take -b cpu", "-b cuda: no device can be used");
    }
#else
    if (b == 1) die("build with make CUDA=1 where nvcc is installed, or take -b cpu", "-b cuda: not built in");
    if (o->device >= 0) die("build with make CUDA=1 where nvcc is installed", "--device %d: no CUDA back-end was built in", o->device);
#endif
    if (o->threads) omp_set_num_threads(o->threads);
}

// -r or -k as the fraction dropped; NaN where neither stands.
static inline double fraction_dropped(const Options *o) {
    if (o->drop && o->keep) die("give one of the two", "-r %s and -k %s: both say how much is dropped", o->drop, o->keep);
    if (o->drop) return parse_real("-r", o->drop, 0, 1);
    if (o->keep) return ratio_of_keep(parse_real("-k", o->keep, 0, 1));
    return NAN;
}

static inline FILE *open_output(const char *option, const char *path) {
    FILE *f = path ? fopen(path, "wb") : NULL;
    if (path && !f) die(NULL, "%s %s: %s", option, path, strerror(errno));
    return f;
}

// -m, --attention, --trace: their files, opened before anything is computed.
static inline Show show_open(const Options *o) {
    return (Show){ .kept_path = o->kept, .attention_path = o->attention, .attention_layer = o->attention_layer, .kept = open_output("-m", o->kept),
                   .attention = open_output("--attention", o->attention), .trace = { .f = open_output("--trace", o->trace), .path = o->trace } };
}

// A picture as the model sees it, for -m: cut or padded to a square, then scaled so that a patch has a whole number of pixels.
static inline void show_picture(Show *s, const char *path, int mode, const Info *info, int n_images) {
    int grid = (int)sqrt(info->image_rows + 0.5), side = (info->n_layers > 8 ? 168 : 272) / (n_images < 4 ? n_images : 4), cell = side < 4 * grid ? 4 : side / grid;
    Image full = image_load(path), square = image_square(full, info->image_size, mode), scaled = image_resize(square, grid * cell, grid * cell, 0);
    s->picture = realloc(s->picture, (s->n_pictures + 1) * sizeof *s->picture);
    if (!s->picture) die(NULL, "out of memory");
    s->grid = grid;
    s->picture[s->n_pictures++] = (Canvas){ scaled.w, scaled.h, scaled.rgb };
    image_free(full);
    image_free(square);
}

static inline void catch_interrupts(int flags) {   // SA_RESTART: a blocked write goes on afterwards, and no text is lost; 0: a read ends
    struct sigaction action = { .sa_handler = on_interrupt, .sa_flags = flags };
    sigaction(SIGINT, &action, NULL);
}

// A line of standard input as a string that the caller frees; NULL at the end of it or after Ctrl-C.
static inline char *read_turn(size_t *len) {
    char *line = NULL;
    size_t room = 0;
    if (isatty(0) && !quiet) fputs("> ", stderr);
    catch_interrupts(0);
    ssize_t n = getline(&line, &room, stdin);
    catch_interrupts(SA_RESTART);
    if (n < 0) { free(line); return NULL; }
    while (n && (line[n - 1] == '\n' || line[n - 1] == '\r')) line[--n] = 0;
    *len = (size_t)n;
    return line;
}

static inline int cli(const Arch *arch, int argc, char **argv) {
    static const char *const modes[] = { "crop", "pad" }, *const kv_types[] = { "f32", "f16" }, *const positions[] = { "true", "slot" };
    Options o = { .n = 256, .top_p = 1, .penalty = 1, .n_answers = 1, .seed = (uint64_t)time(NULL), .policy = "full", .device = -1, .attention_layer = -1 };
    const char *program = argv[0];
    if (fcntl(1, F_GETFD) < 0) die(NULL, "standard output: %s", strerror(errno));
    for (int fd = 0; fd <= 2; fd++) if (fcntl(fd, F_GETFD) < 0) open("/dev/null", O_RDWR);  // else the next file opened takes its place
    int n_files = parse_options(&o, argc, argv), n_images = n_files - 1;
    char **image = argv + 1;
    if (o.help) { print_help(program); return printed(); }
    if (!strcmp(o.policy, "help")) { policy_help(stdout); return printed(); }
    if (n_files < 1) die("-h prints the options", "give a model file: %s MODEL IMAGE… [options]", program);
    quiet = o.quiet;

    // what was asked for, checked before anything is read
    if (o.text && o.text_file) die("give one of the two", "-i and -f: both are the question");
    if (o.force && o.force_ids) die("give one of the two", "--force and --force-ids: both are the answer");
    bool forced = o.force || o.force_ids;
    if (o.chat && (forced || o.n_answers > 1)) die(NULL, "-c: a chat takes no --force, --force-ids or -B");
    if (o.chat && o.text_file && !strcmp(o.text_file, "-")) die("give the question with -i", "-f -: standard input already holds the chat's turns");
    if (o.n_answers > 1 && (forced || o.logits)) die(NULL, "-B %d: --force, --force-ids and --logits are for one answer", o.n_answers);
    if (o.compare && (o.chat || o.n_answers > 1)) die(NULL, "--compare: compares one answer: not with %s", o.chat ? "-c" : "-B");
    if (o.kept && !n_images) die("give a picture; --trace FILE writes down what was kept without one", "-m %s: there is no picture to paint on", o.kept);
    if (o.attention_layer >= 0 && !o.attention) die("give --attention FILE.png as well", "--attention-layer %d: of which picture?", o.attention_layer);
    double ratio = fraction_dropped(&o);
    int kv_type = o.kv ? one_of("--kv", o.kv, kv_types, 2) : -1, pos = o.pos ? one_of("--pos", o.pos, positions, 2) : -1;
    int mode = o.image_mode ? one_of("--image-mode", o.image_mode, modes, 2) : -1;
    int template = o.template ? one_of("--template", o.template, template_names, N_TEMPLATES) : -1;
    choose_backend(&o);

    ModelFile file = model_open(argv[0]);
    if (o.show_info) { model_info(&file, stdout); return printed(); }
    if (strcmp(file.header->arch, arch->name)) die("each model file is run by the program of its name", "%s: holds a %s model, this is %s", argv[0], file.header->arch, arch->name);
    Model *m = arch->open(&file);
    const Info *info = arch->info(m);
    Chain chain = policy_parse(o.policy, ratio, info->n_layers);
    if (K != &cpu && chain.flags & (DECODE_ADMIT | RECOMPUTE) && !quiet)
        fprintf(stderr, "note: -p %s has the host look on at every token: its steps are no CUDA graph\n", chain.name);
    if (chain.flags & RECOMPUTE && o.chat) die("take fastv", "-c: fastv:recompute keeps no cache for a chat");

    if (o.attention_layer >= info->n_layers) die(NULL, "--attention-layer %d: the model has layers 0 to %d", o.attention_layer, info->n_layers - 1);

    size_t len = 0;
    char *text = o.text_file ? read_file("-f", o.text_file, &len) : NULL;
    const char *question = text ? text : o.text ? o.text : "Describe the image in detail.";
    if (!text) len = strlen(question);
    Turn turn = { .template = template >= 0 ? template : info->template, .system = o.system, .text = question, .len = len, .n_images = n_images,
                  .first = true, .last_id = -1, .split = chain.flags & (SPLIT_7B | SPLIT_13B) };
    Talk t = { .arch = arch, .m = m, .info = info, .chain = &chain, .n_answers = o.n_answers, .n_new = o.n, .logits_path = o.logits };
    arch->prompt(m, &t.prompt, &turn);
    if (o.tokens) { print_tokens(&t.prompt, info); return printed(); }

    if (forced) t.force = forced_ids(&o, info, &t.n_force);
    int n_new = forced ? t.n_force : o.n, longest = o.chat ? info->max_positions : t.prompt.n + n_new - 1;
    if (o.ctx > info->max_positions) die(NULL, "--ctx %d: the model was made for %d positions", o.ctx, info->max_positions);
    t.ctx = o.ctx ? o.ctx : longest < info->max_positions ? longest : info->max_positions;
    if (t.prompt.n > t.ctx) die("ask for less, take fewer pictures, or a larger --ctx (at most what --info calls max_positions)", "the prompt is longer than the context: %d tokens, the longest sequence is %d", t.prompt.n, t.ctx);

    Show looks = show_open(&o);
    catch_interrupts(SA_RESTART);
    for (int i = 0; i < n_images; i++) {
        double image_ms, vision_ms;
        arch->see(m, image[i], mode >= 0 ? mode : info->image_mode, &image_ms, &vision_ms);
        t.f.image_ms += image_ms;
        t.f.vision_ms += vision_ms;
        if (o.kept) show_picture(&looks, image[i], mode >= 0 ? mode : info->image_mode, info, n_images);
    }

    arch->room(m, t.prompt.n > o.n_answers ? t.prompt.n : o.n_answers, o.n_answers, t.ctx);
    bool slot = pos >= 0 ? pos : (chain.flags & SLOT_POS) != 0;
    Type cache = kv_type >= 0 ? (kv_type ? F16 : F32) : K == &cpu ? F32 : F16;
    t.runs = runs_new(&chain, info->n_layers, info->n_heads, info->n_kv_heads, info->head_dim, info->dim, o.n_answers, t.ctx, cache, slot, o.seed, info->cos_sin, info->tok_emb);
    if (turn.split) { t.runs->text_id = t.prompt.text_id; t.runs->n_text = t.prompt.n_text; t.prompt.text_id = NULL; }
    t.logits = need((size_t)o.n_answers * info->vocab_size, sizeof *t.logits);
    t.candidates = need(info->vocab_size, sizeof *t.candidates);
    t.answer = need(o.n_answers, sizeof *t.answer);
    for (int b = 0; b < o.n_answers; b++) {
        t.answer[b].sampler = (Sampler){ o.temperature, o.top_k, o.top_p, o.penalty, o.seed + b };
        t.answer[b].seen = need(info->vocab_size, 1);
    }
    if (o.logits && !(t.logits_file = fopen(o.logits, "wb"))) die(NULL, "--logits %s: %s", o.logits, strerror(errno));
    if (o.verbose) fprintf(stderr, "back-end %s, %d threads, cache %s, policy %s, template %s, positions %s, seed %llu\n", K->name, omp_get_max_threads(),
                           cache == F32 ? "f32" : "f16", chain.name[0] ? chain.name : "full", template_names[turn.template], slot ? "slot" : "true", (unsigned long long)o.seed);

    if (o.kept || o.attention || o.trace) t.show = &looks;
    Compare other = { 0 };
    if (o.compare) compare_full(&other, &t, cache);
    answer_turn(&t);
    if (o.compare && !interrupts) compare_print(&other, &t, stderr);
    while (o.chat) {
        int stopped = interrupts;
        interrupts = 0;
        size_t n;
        char *line = read_turn(&n);
        if (!line) { interrupts = interrupts || stopped; break; }
        const Answer *a = &t.answer[0];
        t.prompt.n = t.prompt.n_images = 0;
        Turn next = { .template = turn.template, .text = line, .len = n, .last_id = a->n ? a->id[a->n - 1] : -1 };
        arch->prompt(m, &t.prompt, &next);
        answer_turn(&t);
        free(line);
    }
    if (t.logits_file && fclose(t.logits_file)) die("is the disk full?", "--logits %s: %s", o.logits, strerror(errno));
    show_close(&looks);
    if (!o.quiet) print_figures(&t, stderr);
    int status = interrupts ? 130 : 0;

    for (int b = 0; b < o.n_answers; b++) { free(t.answer[b].seen); free(t.answer[b].id); free(t.answer[b].text); }
    compare_free(&other);
    runs_free(t.runs);
    policy_free(&chain);
    arch->close(m);
    model_close(&file);
    free(t.answer); free(t.logits); free(t.candidates); free((void *)t.force); free(text);
    free(t.prompt.id); free(t.prompt.kind); free(t.prompt.image_at); free(t.prompt.text_id);
    return status;
}

#endif
