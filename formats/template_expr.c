// Tokens -> expressions. The order of the operators is that of Jinja2, which is not quite Python's.
#include <string.h>

#include "formats/template_internal.h"

// ---- tokens

bool parse_skip(struct parser *p, enum token_kind kind)
{
    if (p->token->kind != kind)
        return false;
    p->token++;
    p->run->line = p->token->line;
    return true;
}

static const char *token_name(enum token_kind kind)
{
    static const char *const names[] = {"the end of the template",
                                        "text",
                                        "'{%'",
                                        "'%}'",
                                        "'{{'",
                                        "'}}'",
                                        "a name",
                                        "a string",
                                        "an integer",
                                        "a number",
                                        "'+'",
                                        "'-'",
                                        "'*'",
                                        "'/'",
                                        "'//'",
                                        "'%'",
                                        "'**'",
                                        "'~'",
                                        "'=='",
                                        "'!='",
                                        "'<'",
                                        "'<='",
                                        "'>'",
                                        "'>='",
                                        "'in'",
                                        "'not in'",
                                        "'('",
                                        "')'",
                                        "'['",
                                        "']'",
                                        "'{'",
                                        "'}'",
                                        "'.'",
                                        "':'",
                                        "','",
                                        "'|'",
                                        "'='",
                                        "';'"};
    return names[kind];
}

void parse_unexpected(struct parser *p)
{
    if (p->token->kind == TOKEN_NAME)
        run_fail(p->run, "unexpected '%.*s'", (int)p->token->bytes, p->token->text);
    run_fail(p->run, "unexpected %s", token_name(p->token->kind));
}

void parse_expect(struct parser *p, enum token_kind kind, const char *what)
{
    if (parse_skip(p, kind))
        return;
    if (p->token->kind == TOKEN_NAME)
        run_fail(p->run, "expected %s, found '%.*s'", what ? what : token_name(kind), (int)p->token->bytes,
                 p->token->text);
    run_fail(p->run, "expected %s, found %s", what ? what : token_name(kind), token_name(p->token->kind));
}

static bool is_word(const struct token *token, const char *word)
{
    return token->kind == TOKEN_NAME && token->bytes == strlen(word) && !memcmp(token->text, word, token->bytes);
}

bool parse_at_word(const struct parser *p, const char *word) { return is_word(p->token, word); }

bool parse_skip_word(struct parser *p, const char *word) { return parse_at_word(p, word) && parse_skip(p, TOKEN_NAME); }

void parse_deeper(struct parser *p)
{
    if (++p->nesting > TEMPLATE_MAX_NESTING)
        run_fail(p->run, "blocks or expressions are nested more than %d deep", TEMPLATE_MAX_NESTING);
}

// ---- nodes

struct node *parse_node(struct parser *p, enum node_kind kind)
{
    struct node *node = run_alloc(p->run, 1, sizeof *node);
    node->kind = kind;
    node->line = p->token->line;
    return node;
}

// Evaluation goes as deep as a tree is high, also where operators only follow each other.
static void grow(struct parser *p, struct node *node, const struct node *child)
{
    if (child && child->height >= node->height)
        node->height = child->height + 1;
    if (node->height > TEMPLATE_MAX_OPERATORS)
        run_fail(p->run, "an expression has more than %d operators in a row", TEMPLATE_MAX_OPERATORS);
}

static struct node *node_of(struct parser *p, enum node_kind kind, struct node *a, struct node *b, struct node *c)
{
    struct node *node = parse_node(p, kind);
    node->a = a;
    node->b = b;
    node->c = c;
    if (a)
        node->line = a->line;
    grow(p, node, a);
    grow(p, node, b);
    grow(p, node, c);
    return node;
}

static struct node *node_const(struct parser *p, struct value value)
{
    struct node *node = parse_node(p, NODE_CONST);
    node->constant = value;
    return node;
}

static void add_item(struct parser *p, struct node *node, struct node *item)
{
    if ((node->count & (node->count - 1)) == 0) { // a power of two, or none: full
        struct node **items = run_alloc(p->run, node->count ? 2 * node->count : 1, sizeof *items);
        if (node->count)
            memcpy(items, node->items, node->count * sizeof *items);
        node->items = items;
    }
    node->items[node->count++] = item;
    grow(p, node, item);
}

static const struct string *token_string(struct parser *p, const struct token *token)
{
    return string_new(p->run, token->text, token->bytes, false);
}

// ---- arguments

static void add_argument(struct parser *p, struct node ***list, size_t count, struct node *item)
{
    if ((count & (count - 1)) == 0) {
        struct node **items = run_alloc(p->run, count ? 2 * count : 1, sizeof *items);
        if (count)
            memcpy(items, *list, count * sizeof *items);
        *list = items;
    }
    (*list)[count] = item;
}

// Behind '('. The owner grows with what is in the list.
static struct node_args *parse_arguments(struct parser *p, struct node *owner)
{
    struct node_args *args = run_alloc(p->run, 1, sizeof *args);
    parse_deeper(p);
    for (bool first = true; !parse_skip(p, TOKEN_RPAREN); first = false) {
        struct node *value;
        if (!first) {
            parse_expect(p, TOKEN_COMMA, NULL);
            if (parse_skip(p, TOKEN_RPAREN))
                break;
        }
        if (parse_skip(p, TOKEN_MUL)) {
            if (args->star || args->double_star)
                parse_unexpected(p);
            args->star = value = parse_expression(p, true);
        } else if (parse_skip(p, TOKEN_POW)) {
            if (args->double_star)
                parse_unexpected(p);
            args->double_star = value = parse_expression(p, true);
        } else if (p->token->kind == TOKEN_NAME && p->token[1].kind == TOKEN_ASSIGN) {
            const struct string *name = token_string(p, p->token);
            if (args->double_star)
                parse_unexpected(p);
            for (size_t i = 0; i < args->num_named; i++)
                if (string_equal(args->names[i], name))
                    run_fail(p->run, "the argument '%s' is given twice", name->text);
            p->token += 2;
            value = parse_expression(p, true);
            size_t n = args->num_named++;
            add_argument(p, &args->named, n, value);
            if ((n & (n - 1)) == 0) {
                const struct string **names = run_alloc(p->run, n ? 2 * n : 1, sizeof *names);
                if (n)
                    memcpy(names, args->names, n * sizeof *names);
                args->names = names;
            }
            args->names[n] = name;
        } else {
            if (args->num_named || args->star || args->double_star)
                run_fail(p->run, "an argument without a name follows one with a name");
            value = parse_expression(p, true);
            add_argument(p, &args->values, args->count++, value);
        }
        grow(p, owner, value);
    }
    p->nesting--;
    return args;
}

// ---- values

static struct node *parse_list(struct parser *p)
{
    struct node *node = parse_node(p, NODE_LIST);
    for (bool first = true; !parse_skip(p, TOKEN_RBRACKET); first = false) {
        if (!first)
            parse_expect(p, TOKEN_COMMA, NULL);
        if (parse_skip(p, TOKEN_RBRACKET))
            break;
        add_item(p, node, parse_expression(p, true));
    }
    return node;
}

static struct node *parse_dict(struct parser *p)
{
    struct node *node = parse_node(p, NODE_DICT); // items: key, value, key, value ...
    for (bool first = true; !parse_skip(p, TOKEN_RBRACE); first = false) {
        if (!first)
            parse_expect(p, TOKEN_COMMA, NULL);
        if (parse_skip(p, TOKEN_RBRACE))
            break;
        add_item(p, node, parse_expression(p, true));
        parse_expect(p, TOKEN_COLON, NULL);
        add_item(p, node, parse_expression(p, true));
    }
    return node;
}

static struct node *parse_strings(struct parser *p) // neighbours are one string
{
    struct builder b = builder_start(p->run);
    struct node *node = parse_node(p, NODE_CONST);
    for (; p->token->kind == TOKEN_STRING; parse_skip(p, TOKEN_STRING))
        builder_add(&b, p->token->text, p->token->bytes, false);
    node->constant = value_string(builder_finish(&b));
    return node;
}

static struct node *parse_name(struct parser *p)
{
    static const struct {
        const char *name;
        enum value_kind kind;
        bool truth;
    } constants[] = {{"true", VALUE_BOOL, true},   {"True", VALUE_BOOL, true},  {"false", VALUE_BOOL, false},
                     {"False", VALUE_BOOL, false}, {"none", VALUE_NONE, false}, {"None", VALUE_NONE, false}};
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (parse_at_word(p, constants[i].name)) {
            struct node *node =
                node_const(p, constants[i].kind == VALUE_NONE ? value_none() : value_bool(constants[i].truth));
            p->token++;
            return node;
        }
    p->saw_varargs |= parse_at_word(p, "varargs");
    p->saw_kwargs |= parse_at_word(p, "kwargs");
    struct node *node = parse_node(p, NODE_NAME);
    node->name = parse_intern(p, p->token->text, p->token->bytes);
    p->token++;
    return node;
}

struct node *parse_primary(struct parser *p)
{
    struct node *node;
    switch (p->token->kind) {
    case TOKEN_NAME:
        return parse_name(p);
    case TOKEN_STRING:
        return parse_strings(p);
    case TOKEN_INT:
    case TOKEN_REAL:
        node = node_const(p, p->token->value);
        p->token++;
        return node;
    case TOKEN_LPAREN:
    case TOKEN_LBRACKET:
    case TOKEN_LBRACE:
        parse_deeper(p);
        if (parse_skip(p, TOKEN_LPAREN)) {
            node = parse_tuple(p, false, true, NULL, true);
            parse_expect(p, TOKEN_RPAREN, NULL);
        } else if (parse_skip(p, TOKEN_LBRACKET)) {
            node = parse_list(p);
        } else {
            p->token++;
            node = parse_dict(p);
        }
        p->nesting--;
        return node;
    default:
        parse_unexpected(p);
    }
}

struct node *parse_tuple(struct parser *p, bool simple, bool with_condition, const char *end_word, bool in_parentheses)
{
    struct node *tuple = parse_node(p, NODE_TUPLE);
    bool is_tuple = false;
    for (;;) {
        if (tuple->count) {
            parse_expect(p, TOKEN_COMMA, NULL);
        }
        enum token_kind kind = p->token->kind;
        if (kind == TOKEN_PRINT_END || kind == TOKEN_BLOCK_END || kind == TOKEN_RPAREN ||
            (end_word && parse_at_word(p, end_word)))
            break;
        add_item(p, tuple, simple ? parse_primary(p) : parse_expression(p, with_condition));
        if (p->token->kind != TOKEN_COMMA)
            break;
        is_tuple = true;
    }
    if (is_tuple || (!tuple->count && in_parentheses))
        return tuple;
    if (!tuple->count)
        parse_unexpected(p);
    return tuple->items[0];
}

// ---- what follows a value: .name [item] (arguments) |filter is test

static struct node *parse_subscript_part(struct parser *p)
{
    struct node *parts[3] = {NULL, NULL, NULL};
    int count = 0;
    bool slice = false;
    for (;;) {
        if (parse_skip(p, TOKEN_COLON)) {
            slice = true;
            if (++count == 3)
                parse_unexpected(p);
        } else if (p->token->kind == TOKEN_RBRACKET || p->token->kind == TOKEN_COMMA) {
            break;
        } else if (parts[count]) {
            parse_unexpected(p);
        } else {
            parts[count] = parse_expression(p, true);
        }
    }
    if (slice)
        return node_of(p, NODE_SLICE, parts[0], parts[1], parts[2]);
    if (!parts[0])
        parse_unexpected(p);
    return parts[0];
}

static struct node *parse_subscript(struct parser *p, struct node *object) // behind '['
{
    parse_deeper(p);
    struct node *part = parse_subscript_part(p);
    if (p->token->kind == TOKEN_COMMA) {
        struct node *tuple = parse_node(p, NODE_TUPLE);
        add_item(p, tuple, part);
        while (parse_skip(p, TOKEN_COMMA))
            add_item(p, tuple, parse_subscript_part(p));
        part = tuple;
    }
    parse_expect(p, TOKEN_RBRACKET, NULL);
    p->nesting--;
    return node_of(p, NODE_ITEM, object, part, NULL);
}

static struct node *parse_attribute(struct parser *p, struct node *object) // behind '.'
{
    if (p->token->kind == TOKEN_INT) {
        struct node *index = node_const(p, p->token->value);
        p->token++;
        return node_of(p, NODE_ITEM, object, index, NULL);
    }
    struct node *node = node_of(p, NODE_ATTRIBUTE, object, NULL, NULL);
    if (p->token->kind != TOKEN_NAME)
        parse_expect(p, TOKEN_NAME, "a name or number behind '.'");
    node->name = parse_intern(p, p->token->text, p->token->bytes);
    node->constant = value_string(token_string(p, p->token));
    p->token++;
    return node;
}

static struct node *parse_call(struct parser *p, struct node *function) // behind '('
{
    struct node *node = node_of(p, NODE_CALL, function, NULL, NULL);
    node->args = parse_arguments(p, node);
    return node;
}

static struct node *parse_postfix(struct parser *p, struct node *node)
{
    for (;;) {
        if (parse_skip(p, TOKEN_DOT))
            node = parse_attribute(p, node);
        else if (parse_skip(p, TOKEN_LBRACKET))
            node = parse_subscript(p, node);
        else if (parse_skip(p, TOKEN_LPAREN))
            node = parse_call(p, node);
        else
            return node;
    }
}

static const struct callable *find_callable(struct parser *p, const char *what,
                                            const struct callable *find(const char *name))
{
    char name[64];
    if (p->token->kind != TOKEN_NAME)
        parse_expect(p, TOKEN_NAME, NULL);
    size_t bytes = p->token->bytes < sizeof name - 1 ? p->token->bytes : sizeof name - 1;
    memcpy(name, p->token->text, bytes);
    name[bytes] = 0;
    const struct callable *callable = find(name);
    if (!callable)
        run_fail(p->run, "there is no %s named '%s'", what, name);
    p->token++;
    return callable;
}

struct node *parse_filter(struct parser *p, struct node *value, bool begin_inline)
{
    while (begin_inline || parse_skip(p, TOKEN_PIPE)) {
        begin_inline = false;
        struct node *node = node_of(p, NODE_FILTER, value, NULL, NULL);
        node->line = p->token->line;
        node->callable = find_callable(p, "filter", template_filter);
        if (parse_skip(p, TOKEN_LPAREN))
            node->args = parse_arguments(p, node);
        value = node;
    }
    return value;
}

static bool begins_test_argument(const struct parser *p)
{
    switch (p->token->kind) {
    case TOKEN_NAME:
        return !parse_at_word(p, "else") && !parse_at_word(p, "or") && !parse_at_word(p, "and");
    case TOKEN_STRING:
    case TOKEN_INT:
    case TOKEN_REAL:
    case TOKEN_LPAREN:
    case TOKEN_LBRACKET:
    case TOKEN_LBRACE:
        return true;
    default:
        return false;
    }
}

static struct node *parse_test(struct parser *p, struct node *value) // behind "is"
{
    bool negated = parse_skip_word(p, "not");
    struct node *node = node_of(p, NODE_TEST, value, NULL, NULL);
    node->callable = find_callable(p, "test", template_test);
    if (parse_skip(p, TOKEN_LPAREN)) {
        node->args = parse_arguments(p, node);
    } else if (begins_test_argument(p)) {
        if (parse_at_word(p, "is"))
            run_fail(p->run, "tests with 'is' cannot follow each other");
        parse_deeper(p);
        struct node *argument = parse_postfix(p, parse_primary(p));
        p->nesting--;
        node->args = run_alloc(p->run, 1, sizeof *node->args);
        add_argument(p, &node->args->values, node->args->count++, argument);
        grow(p, node, argument);
    }
    return negated ? node_of(p, NODE_NOT, node, NULL, NULL) : node;
}

static struct node *parse_filters_and_tests(struct parser *p, struct node *node)
{
    for (;;) {
        if (p->token->kind == TOKEN_PIPE)
            node = parse_filter(p, node, false);
        else if (parse_skip_word(p, "is"))
            node = parse_test(p, node);
        else if (parse_skip(p, TOKEN_LPAREN)) // also behind a filter or test
            node = parse_call(p, node);
        else
            return node;
    }
}

// ---- operators, from the tightest to the loosest

static struct node *parse_unary(struct parser *p, bool with_filter)
{
    struct node *node;
    if (p->token->kind == TOKEN_SUB || p->token->kind == TOKEN_ADD) {
        enum node_kind kind = p->token->kind == TOKEN_SUB ? NODE_NEGATE : NODE_PLUS;
        p->token++;
        parse_deeper(p);
        node = node_of(p, kind, parse_unary(p, false), NULL, NULL);
        p->nesting--;
    } else {
        node = parse_primary(p);
    }
    node = parse_postfix(p, node);
    return with_filter ? parse_filters_and_tests(p, node) : node;
}

static struct node *binary(struct parser *p, int op, struct node *left, struct node *right)
{
    struct node *node = node_of(p, NODE_BINARY, left, right, NULL);
    node->op = op;
    return node;
}

static struct node *parse_power(struct parser *p)
{
    struct node *left = parse_unary(p, true);
    while (parse_skip(p, TOKEN_POW))
        left = binary(p, TOKEN_POW, left, parse_unary(p, true));
    return left;
}

static struct node *parse_product(struct parser *p)
{
    struct node *left = parse_power(p);
    while (p->token->kind == TOKEN_MUL || p->token->kind == TOKEN_DIV || p->token->kind == TOKEN_FLOORDIV ||
           p->token->kind == TOKEN_MOD) {
        int op = (p->token++)->kind;
        left = binary(p, op, left, parse_power(p));
    }
    return left;
}

static struct node *parse_concat(struct parser *p)
{
    struct node *first = parse_product(p);
    if (p->token->kind != TOKEN_TILDE)
        return first;
    struct node *node = parse_node(p, NODE_CONCAT);
    add_item(p, node, first);
    while (parse_skip(p, TOKEN_TILDE))
        add_item(p, node, parse_product(p));
    return node;
}

static struct node *parse_sum(struct parser *p)
{
    struct node *left = parse_concat(p);
    while (p->token->kind == TOKEN_ADD || p->token->kind == TOKEN_SUB) {
        int op = (p->token++)->kind;
        left = binary(p, op, left, parse_concat(p));
    }
    return left;
}

static int skip_comparison(struct parser *p)
{
    if (p->token->kind >= TOKEN_EQ && p->token->kind <= TOKEN_GE)
        return (p->token++)->kind;
    if (parse_skip_word(p, "in"))
        return TOKEN_IN;
    if (parse_at_word(p, "not") && is_word(&p->token[1], "in")) {
        p->token += 2;
        return TOKEN_NOT_IN;
    }
    return -1;
}

static struct node *parse_comparison(struct parser *p)
{
    struct node *first = parse_sum(p), *node = NULL;
    for (int op; (op = skip_comparison(p)) >= 0;) {
        if (!node)
            node = node_of(p, NODE_COMPARE, first, NULL, NULL);
        size_t n = node->count; // add_item grows items at the same counts
        if ((n & (n - 1)) == 0) {
            int *ops = run_alloc(p->run, n ? 2 * n : 1, sizeof *ops);
            if (n)
                memcpy(ops, node->ops, n * sizeof *ops);
            node->ops = ops;
        }
        node->ops[n] = op;
        add_item(p, node, parse_sum(p));
    }
    return node ? node : first;
}

static struct node *parse_not(struct parser *p)
{
    if (!parse_skip_word(p, "not"))
        return parse_comparison(p);
    parse_deeper(p);
    struct node *node = node_of(p, NODE_NOT, parse_not(p), NULL, NULL);
    p->nesting--;
    return node;
}

static struct node *parse_and(struct parser *p)
{
    struct node *left = parse_not(p);
    while (parse_skip_word(p, "and"))
        left = node_of(p, NODE_AND, left, parse_not(p), NULL);
    return left;
}

static struct node *parse_or(struct parser *p)
{
    struct node *left = parse_and(p);
    while (parse_skip_word(p, "or"))
        left = node_of(p, NODE_OR, left, parse_and(p), NULL);
    return left;
}

struct node *parse_expression(struct parser *p, bool with_condition)
{
    p->run->line = p->token->line;
    parse_deeper(p);
    struct node *node = parse_or(p);
    while (with_condition && parse_skip_word(p, "if")) { // a if b else c; c may be missing
        struct node *condition = parse_or(p);
        struct node *otherwise = parse_skip_word(p, "else") ? parse_expression(p, true) : NULL;
        node = node_of(p, NODE_CONDITION, condition, node, otherwise);
    }
    p->nesting--;
    return node;
}
