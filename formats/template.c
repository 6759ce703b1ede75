// The two entries of the interpreter: compile and render. See template.h.
#include "formats/template.h"

#include <stdlib.h>
#include <string.h>

#include "formats/template_internal.h"
#include "formats/tokenizer_text.h"

enum { MAX_TEMPLATE_BYTES = 4 << 20 };

struct template
{
    struct arena arena; // everything below
    char *name;
    const struct node *statements;
    struct names names;
};

// ---- compiling

// Apart from the caller, so that no local variable of its lives through a longjmp.
static int parse_protected(struct run *r, struct template *tmpl, const char *text, size_t bytes)
{
    if (setjmp(r->leave))
        return r->err->code;
    struct token_array tokens = template_lex(r, text, bytes);
    struct parser parser = {.run = r, .token = tokens.tokens, .names = &tmpl->names};
    tmpl->statements = template_parse(&parser);
    return 0;
}

int template_compile(struct template **out, const char *text, size_t bytes, const char *name, struct error *err)
{
    struct error ignored = {0};
    err = err ? err : &ignored;
    if (bytes > MAX_TEMPLATE_BYTES)
        return error_set(err, ERR_MODEL, "%s: a template of %zu bytes is too large, at most 4 MiB are possible", name,
                         bytes);
    if (tokenizer_text_valid_prefix(text, bytes) != bytes)
        return error_set(err, ERR_MODEL, "%s: the template is not valid UTF-8", name);
    struct template *tmpl = calloc(1, sizeof *tmpl);
    struct run *r = calloc(1, sizeof *r);
    int rc = ERR_MEMORY;
    if (!tmpl || !r || !(tmpl->name = strdup(name))) {
        rc = error_set(err, ERR_MEMORY, "%s: out of memory for the template", name);
        goto done;
    }
    *r = (struct run){.arena.limit_bytes = 1 << 30,
                      .err = err,
                      .name = tmpl->name,
                      .line = 1,
                      .bad_code = ERR_MODEL,
                      .max_steps = 10000000};
    rc = parse_protected(r, tmpl, text, bytes);
    tmpl->arena = r->arena;
done:
    free(r);
    if (rc)
        template_free(tmpl);
    else
        *out = tmpl;
    return rc;
}

void template_free(struct template *tmpl)
{
    if (!tmpl)
        return;
    arena_free(&tmpl->arena);
    free(tmpl->name);
    free(tmpl);
}

// ---- rendering

static int collect_segments(struct template_output *out, const struct builder *b, struct error *err)
{
    size_t count = b->bytes > 0;
    for (size_t i = 1; b->marks && i < b->bytes; i++)
        count += b->marks[i] != b->marks[i - 1];
    struct text_segment *segments = calloc(count + 1, sizeof *segments);
    char *text = malloc(b->bytes + 1);
    if (!segments || !text) {
        free(segments);
        free(text);
        return error_set(err, ERR_MEMORY, "out of memory for the rendered chat");
    }
    if (b->bytes)
        memcpy(text, b->text, b->bytes);
    text[b->bytes] = 0;
    size_t at = 0;
    for (size_t begin = 0, end; begin < b->bytes; begin = end) {
        bool user = b->marks ? b->marks[begin] : b->user;
        for (end = begin + 1; end < b->bytes && (!b->marks || b->marks[end] == b->marks[begin]); end++)
            ;
        segments[at++] = (struct text_segment){begin, end, user};
    }
    *out = (struct template_output){text, b->bytes, segments, count};
    return 0;
}

static int render_protected(struct run *r, const struct template *tmpl, const struct template_variable *variables,
                            size_t count)
{
    if (setjmp(r->leave))
        return r->err->code;
    struct scope *globals = run_alloc(r, 1, sizeof *globals), *root = run_alloc(r, 1, sizeof *root);
    root->parent = globals;
    for (size_t i = 0; i < count; i++) {
        const char *name = names_find(&tmpl->names, variables[i].name, strlen(variables[i].name));
        if (name) // else nobody asks for it
            scope_set(r, globals, name, value_from_json(r, variables[i].value, variables[i].origin));
    }
    eval_block(r, tmpl->statements, root);
    return 0;
}

static uint64_t or_default(uint64_t value, uint64_t otherwise) { return value ? value : otherwise; }

int template_render(struct template_output *out, const struct template *tmpl, const struct template_variable *variables,
                    size_t count, const struct template_limits *limits, int64_t now_s, struct error *err)
{
    static const struct template_limits defaults;
    struct error ignored = {0};
    err = err ? err : &ignored;
    limits = limits ? limits : &defaults;
    struct run *r = calloc(1, sizeof *r);
    if (!r)
        return error_set(err, ERR_MEMORY, "out of memory to render the chat template");
    struct builder b = {.run = r, .limit_bytes = or_default(limits->output_bytes, 64 << 20)};
    *r = (struct run){.arena.limit_bytes = or_default(limits->memory_bytes, 256 << 20),
                      .err = err,
                      .name = tmpl->name,
                      .line = 1,
                      .bad_code = ERR_USAGE,
                      .max_steps = or_default(limits->steps, 1000000),
                      .out = &b,
                      .now_s = now_s};
    int rc = render_protected(r, tmpl, variables, count);
    if (!rc)
        rc = collect_segments(out, &b, err);
    arena_free(&r->arena);
    free(r);
    return rc;
}

void template_output_clear(struct template_output *out)
{
    free(out->text);
    free(out->segments);
    *out = (struct template_output){0};
}
