// Tokens -> statements.
#include <stdlib.h>
#include <string.h>

#include "formats/template_internal.h"

// ---- names

const char *names_find(const struct names *names, const char *text, size_t bytes)
{
    for (size_t i = 0; i < names->count; i++)
        if (strlen(names->names[i]) == bytes && !memcmp(names->names[i], text, bytes))
            return names->names[i];
    return NULL;
}

const char *parse_intern(struct parser *p, const char *text, size_t bytes)
{
    struct names *names = p->names;
    run_charge_items(p->run, names->count); // many names make this slow
    const char *known = names_find(names, text, bytes);
    if (known)
        return known;
    if (names->count == names->capacity) {
        size_t capacity = names->capacity ? 2 * names->capacity : 64;
        const char **larger = run_alloc(p->run, capacity, sizeof *larger);
        if (names->count)
            memcpy(larger, names->names, names->count * sizeof *larger);
        names->names = larger;
        names->capacity = capacity;
    }
    char *copy = run_alloc(p->run, bytes + 1, 1);
    memcpy(copy, text, bytes);
    return names->names[names->count++] = copy;
}

static const char *parse_new_name(struct parser *p)
{
    if (p->token->kind != TOKEN_NAME)
        parse_expect(p, TOKEN_NAME, NULL);
    const char *name = parse_intern(p, p->token->text, p->token->bytes);
    p->token++;
    return name;
}

// ---- statements

static struct node *parse_statements(struct parser *p, const char *const *end_words);

static struct node *parse_body(struct parser *p, const char *const *end_words) // from behind the tag's expression
{
    parse_skip(p, TOKEN_COLON);
    parse_expect(p, TOKEN_BLOCK_END, "'%}'");
    return parse_statements(p, end_words);
}

// The tag `word`, at which the body ended.
static void parse_end(struct parser *p, const char *word)
{
    if (!parse_skip_word(p, word))
        parse_unexpected(p);
}

// What may be assigned to: a name, or a tuple or list of such; namespace members only outside of tuples.
static void check_target(struct parser *p, const struct node *node)
{
    if (node->kind == NODE_NAME)
        return;
    if (node->kind != NODE_TUPLE && node->kind != NODE_LIST)
        run_fail(p->run, "this cannot be assigned to");
    for (size_t i = 0; i < node->count; i++)
        check_target(p, node->items[i]);
}

static struct node *parse_target(struct parser *p, const char *end_word)
{
    struct node *node = parse_tuple(p, true, true, end_word, false);
    check_target(p, node);
    return node;
}

static struct node *parse_if(struct parser *p)
{
    static const char *const ends[] = {"elif", "else", "endif", NULL};
    static const char *const end[] = {"endif", NULL};
    struct node *node = parse_node(p, NODE_IF); // a: condition, body, otherwise: further branches
    struct node *branch = node;
    for (;;) {
        branch->a = parse_tuple(p, false, false, NULL, false);
        branch->body = parse_body(p, ends);
        if (parse_skip_word(p, "elif")) { // branches hang on each other by c
            branch = branch->c = parse_node(p, NODE_IF);
            continue;
        }
        if (parse_skip_word(p, "else"))
            branch->otherwise = parse_body(p, end);
        parse_end(p, "endif");
        return node;
    }
}

static struct node *parse_for(struct parser *p)
{
    static const char *const ends[] = {"else", "endfor", NULL};
    static const char *const end[] = {"endfor", NULL};
    struct node *node = parse_node(p, NODE_FOR); // a: target, b: what is walked, c: filter
    node->a = parse_target(p, "in");
    if (!parse_skip_word(p, "in"))
        run_fail(p->run, "expected 'in' in this for");
    node->b = parse_tuple(p, false, false, "recursive", false);
    if (parse_skip_word(p, "if"))
        node->c = parse_expression(p, true);
    if (parse_at_word(p, "recursive"))
        run_fail(p->run, "recursive loops are not supported");
    node->body = parse_body(p, ends);
    if (parse_skip_word(p, "else"))
        node->otherwise = parse_body(p, end);
    parse_end(p, "endfor");
    node->name = parse_intern(p, "loop", 4);
    return node;
}

static struct node *parse_set(struct parser *p)
{
    static const char *const end[] = {"endset", NULL};
    struct node *node = parse_node(p, NODE_SET); // a: target or NULL: name.member; b: value or, of a block, filters
    if (p->token->kind == TOKEN_NAME && p->token[1].kind == TOKEN_DOT) {
        struct node *object = parse_node(p, NODE_NAME);
        object->name = parse_new_name(p);
        p->token++;
        node->a = parse_node(p, NODE_ATTRIBUTE);
        node->a->a = object;
        node->a->name = parse_new_name(p);
        node->a->constant = value_text(p->run, node->a->name);
    } else {
        node->a = parse_target(p, NULL);
    }
    if (parse_skip(p, TOKEN_ASSIGN)) {
        node->b = parse_tuple(p, false, true, NULL, false);
        return node;
    }
    node->kind = NODE_SET_BLOCK;
    node->b = parse_filter(p, NULL, false);
    node->body = parse_body(p, end);
    parse_end(p, "endset");
    return node;
}

static struct node *parse_macro(struct parser *p)
{
    static const char *const end[] = {"endmacro", NULL};
    struct node *node = parse_node(p, NODE_MACRO); // items: parameters (names, with their defaults in a)
    bool varargs = p->saw_varargs, kwargs = p->saw_kwargs, had_default = false;
    node->name = parse_new_name(p);
    parse_expect(p, TOKEN_LPAREN, NULL);
    struct node **items = run_alloc(p->run, 1, sizeof *items);
    while (!parse_skip(p, TOKEN_RPAREN)) {
        if (node->count)
            parse_expect(p, TOKEN_COMMA, NULL);
        struct node *parameter = parse_node(p, NODE_NAME);
        parameter->name = parse_new_name(p);
        if (parse_skip(p, TOKEN_ASSIGN)) {
            parameter->a = parse_expression(p, true);
            had_default = true;
        } else if (had_default) {
            run_fail(p->run, "a parameter without a default follows one that has one");
        }
        struct node **more = run_alloc(p->run, node->count + 1, sizeof *more);
        memcpy(more, items, node->count * sizeof *more);
        more[node->count++] = parameter;
        items = more;
    }
    node->items = items;
    p->saw_varargs = p->saw_kwargs = false;
    node->body = parse_body(p, end);
    parse_end(p, "endmacro");
    node->takes_varargs = p->saw_varargs;
    node->takes_kwargs = p->saw_kwargs;
    node->a = parse_node(p, NODE_NAME);
    node->b = parse_node(p, NODE_NAME);
    node->a->name = parse_intern(p, "varargs", 7);
    node->b->name = parse_intern(p, "kwargs", 6);
    p->saw_varargs = varargs;
    p->saw_kwargs = kwargs;
    return node;
}

static struct node *parse_filter_block(struct parser *p)
{
    static const char *const end[] = {"endfilter", NULL};
    struct node *node = parse_node(p, NODE_FILTER_BLOCK); // b: the filters, innermost without a value
    node->b = parse_filter(p, NULL, true);
    node->body = parse_body(p, end);
    parse_end(p, "endfilter");
    return node;
}

static struct node *parse_with(struct parser *p)
{
    static const char *const end[] = {"endwith", NULL};
    struct node *node = parse_node(p, NODE_WITH); // otherwise: a list of NODE_SET
    struct node **tail = &node->otherwise;
    while (p->token->kind != TOKEN_BLOCK_END) {
        if (node->otherwise)
            parse_expect(p, TOKEN_COMMA, NULL);
        struct node *set = parse_node(p, NODE_SET);
        set->a = parse_primary(p);
        check_target(p, set->a);
        parse_expect(p, TOKEN_ASSIGN, NULL);
        set->b = parse_expression(p, true);
        *tail = set;
        tail = &set->next;
    }
    node->body = parse_body(p, end);
    parse_end(p, "endwith");
    return node;
}

static struct node *parse_generation(struct parser *p)
{
    static const char *const end[] = {"endgeneration", NULL};
    struct node *node = parse_node(p, NODE_SCOPE);
    parse_expect(p, TOKEN_BLOCK_END, "'%}'");
    node->body = parse_statements(p, end);
    parse_end(p, "endgeneration");
    return node;
}

static struct node *parse_jump(struct parser *p) { return parse_node(p, NODE_BREAK); }
static struct node *parse_continue(struct parser *p) { return parse_node(p, NODE_CONTINUE); }

static struct node *parse_statement(struct parser *p)
{
    static const struct {
        const char *word;
        struct node *(*parse)(struct parser *p); // NULL: known to Jinja2, but not supported
    } statements[] = {
        {"if", parse_if},
        {"for", parse_for},
        {"set", parse_set},
        {"macro", parse_macro},
        {"with", parse_with},
        {"filter", parse_filter_block},
        {"break", parse_jump},
        {"continue", parse_continue},
        {"generation", parse_generation},
        {"call", NULL},
        {"block", NULL},
        {"extends", NULL},
        {"include", NULL},
        {"import", NULL},
        {"from", NULL},
        {"autoescape", NULL},
        {"print", NULL},
    };
    if (p->token->kind != TOKEN_NAME)
        run_fail(p->run, "expected the name of a tag");
    for (size_t i = 0; i < sizeof statements / sizeof *statements; i++) {
        if (!parse_skip_word(p, statements[i].word))
            continue;
        if (!statements[i].parse)
            run_fail(p->run, "the tag '%s' is not supported in chat templates", statements[i].word);
        parse_deeper(p);
        struct node *node = statements[i].parse(p);
        p->nesting--;
        return node;
    }
    run_fail(p->run, "unknown tag '%.*s'", (int)p->token->bytes, p->token->text);
}

static bool at_end_word(const struct parser *p, const char *const *end_words)
{
    for (; end_words && *end_words; end_words++)
        if (parse_at_word(p, *end_words))
            return true;
    return false;
}

// Up to a tag whose name is among end_words; the name is not taken. NULL: up to the end of the template.
static struct node *parse_statements(struct parser *p, const char *const *end_words)
{
    struct node *first = NULL, **tail = &first;
    for (;;) {
        struct node *node = NULL;
        p->run->line = p->token->line;
        if (p->token->kind == TOKEN_END) {
            if (end_words)
                run_fail(p->run, "the template ends where {%% %s %%} is missing", end_words[0]);
            return first;
        }
        if (p->token->kind == TOKEN_TEXT) {
            node = parse_node(p, NODE_TEXT);
            node->constant = value_string(string_new(p->run, p->token->text, p->token->bytes, false));
            p->token++;
        } else if (parse_skip(p, TOKEN_PRINT_BEGIN)) {
            node = parse_node(p, NODE_PRINT);
            node->a = parse_tuple(p, false, true, NULL, false);
            parse_expect(p, TOKEN_PRINT_END, "'}}'");
        } else if (parse_skip(p, TOKEN_BLOCK_BEGIN)) {
            if (at_end_word(p, end_words))
                return first;
            node = parse_statement(p);
            parse_expect(p, TOKEN_BLOCK_END, "'%}'");
        } else {
            parse_unexpected(p);
        }
        *tail = node;
        tail = &node->next;
    }
}

struct node *template_parse(struct parser *p) { return parse_statements(p, NULL); }
