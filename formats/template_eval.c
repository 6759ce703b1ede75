// Runs a parsed template: expressions give values, statements write to the run's builder.
//
// Scopes are those of Jinja2: for, macro, with and the block forms open one, if does not. A macro sees the scope that it was
// defined in, as it is when the macro is called.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "formats/template_internal.h"

// ---- scopes

const struct value *scope_find(const struct scope *scope, const char *name)
{
    for (; scope; scope = scope->parent)
        for (const struct variable *v = scope->variables; v; v = v->next)
            if (v->name == name)
                return &v->value;
    return NULL;
}

void scope_set(struct run *r, struct scope *scope, const char *name, struct value value)
{
    struct variable *v = scope->variables;
    while (v && v->name != name)
        v = v->next;
    if (!v) {
        v = run_alloc(r, 1, sizeof *v);
        *v = (struct variable){name, value, scope->variables};
        scope->variables = v;
    }
    v->value = value;
}

static struct scope *scope_new(struct run *r, struct scope *parent)
{
    struct scope *scope = run_alloc(r, 1, sizeof *scope);
    scope->parent = parent;
    return scope;
}

// ---- operators

static struct value repeat(struct run *r, struct value v, int64_t times)
{
    times = times > 0 ? times : 0;
    if (v.kind == VALUE_STRING) {
        struct builder b = builder_start(r);
        run_charge(r, v.string->bytes ? (uint64_t)times / 64 : 0);
        for (; v.string->bytes && times; times--)
            builder_add_string(&b, v.string);
        return value_string(builder_finish(&b));
    }
    size_t count;
    if (__builtin_mul_overflow(v.sequence->count, (uint64_t)times, &count))
        count = SIZE_MAX;
    struct value result = value_sequence(r, v.kind, count);
    run_charge(r, count / 64);
    for (size_t i = 0; i < count; i++)
        result.sequence->items[i] = v.sequence->items[i % v.sequence->count];
    return result;
}

static struct value add_sequences(struct run *r, struct value a, struct value b)
{
    size_t count = a.sequence->count + b.sequence->count;
    struct value result = value_sequence(r, a.kind, count);
    run_charge(r, count / 64);
    for (size_t i = 0; i < count; i++)
        result.sequence->items[i] =
            i < a.sequence->count ? a.sequence->items[i] : b.sequence->items[i - a.sequence->count];
    return result;
}

static struct value add_strings(struct run *r, const struct string *a, const struct string *b)
{
    bool markup = a->markup || b->markup;
    struct builder out = builder_start(r);
    builder_add_string(&out, markup && !a->markup ? strings_escape(r, a) : a);
    builder_add_string(&out, markup && !b->markup ? strings_escape(r, b) : b);
    struct string *s = (struct string *)builder_finish(&out);
    s->markup = markup;
    return value_string(s);
}

static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

static struct value int_power(struct run *r, int64_t base, int64_t exponent)
{
    int64_t result = 1;
    if (exponent < 0) {
        if (base == 0)
            run_fail(r, "0.0 cannot be raised to a negative power");
        return value_real(pow((double)base, (double)exponent));
    }
    if (base == 0 || base == 1)
        return value_int(exponent ? base : 1);
    if (base == -1)
        return value_int(exponent & 1 ? -1 : 1);
    for (; exponent; exponent--)
        if (__builtin_mul_overflow(result, base, &result))
            run_fail(r, "the result of '**' does not fit 64 bits");
    return value_int(result);
}

static struct value int_binary(struct run *r, int op, int64_t a, int64_t b)
{
    int64_t result = 0;
    bool overflow = false;
    switch (op) {
    case TOKEN_ADD:
        overflow = __builtin_add_overflow(a, b, &result);
        break;
    case TOKEN_SUB:
        overflow = __builtin_sub_overflow(a, b, &result);
        break;
    case TOKEN_MUL:
        overflow = __builtin_mul_overflow(a, b, &result);
        break;
    case TOKEN_POW:
        return int_power(r, a, b);
    default:
        if (b == 0)
            run_fail(r, op == TOKEN_DIV ? "division by zero" : "integer division or modulo by zero");
        if (op == TOKEN_DIV)
            return value_real((double)((long double)a / (long double)b));
        if (b == -1)
            overflow = op == TOKEN_FLOORDIV && __builtin_sub_overflow((int64_t)0, a, &result);
        else
            result = op == TOKEN_FLOORDIV ? floor_div(a, b) : a - floor_div(a, b) * b;
    }
    if (overflow)
        run_fail(r, "the result of an operator does not fit 64 bits");
    return value_int(result);
}

static struct value real_binary(struct run *r, int op, double a, double b)
{
    switch (op) {
    case TOKEN_ADD:
        return value_real(a + b);
    case TOKEN_SUB:
        return value_real(a - b);
    case TOKEN_MUL:
        return value_real(a * b);
    case TOKEN_POW:
        if ((a == 0 && b < 0) || (a < 0 && floor(b) != b) || (isfinite(a) && isfinite(b) && isinf(pow(a, b))))
            run_fail(r, "'**' has no real result here");
        return value_real(pow(a, b));
    }
    if (b == 0)
        run_fail(r, "division by zero");
    if (op == TOKEN_DIV)
        return value_real(a / b);
    double rest = fmod(a, b);
    if (rest != 0 && (rest < 0) != (b < 0))
        rest += b;
    if (op == TOKEN_MOD)
        return value_real(rest != 0 ? rest : copysign(0, b));
    double quotient = (a - rest) / b, whole = floor(quotient);
    return value_real(whole + (quotient - whole > 0.5));
}

static const char *operator_name(int op)
{
    static const char *const names[] = {"+", "-", "*", "/", "//", "%", "**"};
    return names[op - TOKEN_ADD];
}

struct value eval_binary(struct run *r, int op, struct value a, struct value b)
{
    int64_t i, j;
    double x, y;
    value_refuse_undefined(r, a);
    if (op == TOKEN_MOD && a.kind == VALUE_STRING)
        return format_percent(r, a.string, b);
    value_refuse_undefined(r, b);
    if (value_is_number(a, &i, &x) && value_is_number(b, &j, &y))
        return a.kind == VALUE_FLOAT || b.kind == VALUE_FLOAT ? real_binary(r, op, x, y) : int_binary(r, op, i, j);
    bool list_a = a.kind == VALUE_LIST || a.kind == VALUE_TUPLE, list_b = b.kind == VALUE_LIST || b.kind == VALUE_TUPLE;
    if (op == TOKEN_ADD && a.kind == VALUE_STRING && b.kind == VALUE_STRING)
        return add_strings(r, a.string, b.string);
    if (op == TOKEN_ADD && list_a && a.kind == b.kind)
        return add_sequences(r, a, b);
    if (op == TOKEN_MUL && (list_a || a.kind == VALUE_STRING) && value_as_int(b, &j))
        return repeat(r, a, j);
    if (op == TOKEN_MUL && (list_b || b.kind == VALUE_STRING) && value_as_int(a, &i))
        return repeat(r, b, i);
    run_fail(r, "unsupported operand types for %s: '%s' and '%s'", operator_name(op), value_type_name(a),
             value_type_name(b));
}

bool eval_compare(struct run *r, int op, struct value a, struct value b)
{
    int order;
    switch (op) {
    case TOKEN_EQ:
        return value_equal(r, a, b);
    case TOKEN_NE:
        return !value_equal(r, a, b);
    case TOKEN_IN:
        return value_contains(r, b, a);
    case TOKEN_NOT_IN:
        return !value_contains(r, b, a);
    case TOKEN_LT:
        order = value_compare(r, a, b, "<");
        return order < 0;
    case TOKEN_LE:
        order = value_compare(r, a, b, "<=");
        return order <= 0;
    case TOKEN_GT:
        order = value_compare(r, a, b, ">");
        return order > 0 && order != 2;
    default:
        order = value_compare(r, a, b, ">=");
        return order >= 0 && order != 2;
    }
}

// ---- expressions

static struct value eval_or_none(struct run *r, const struct node *node, struct scope *scope)
{
    return node ? eval(r, node, scope) : value_none();
}

static struct value eval_name(struct run *r, const struct node *node, const struct scope *scope)
{
    const struct value *known = scope_find(scope, node->name);
    if (known && known->kind != VALUE_MISSING)
        return *known;
    const struct callable *global = call_global(node->name);
    if (global)
        return (struct value){.kind = VALUE_FUNCTION, .function = global};
    struct undefined *u = run_alloc(r, 1, sizeof *u);
    u->name = value_text(r, node->name);
    return (struct value){.kind = VALUE_UNDEFINED, .undefined = u};
}

static struct value eval_items(struct run *r, const struct node *node, struct scope *scope, enum value_kind kind)
{
    struct value v = value_sequence(r, kind, node->count);
    for (size_t i = 0; i < node->count; i++)
        v.sequence->items[i] = eval(r, node->items[i], scope);
    return v;
}

static struct value eval_dict(struct run *r, const struct node *node, struct scope *scope)
{
    struct dict *d = dict_new(r);
    for (size_t i = 0; i < node->count; i += 2) {
        struct value key = eval(r, node->items[i], scope);
        dict_set(r, d, key, eval(r, node->items[i + 1], scope));
    }
    return (struct value){.kind = VALUE_DICT, .dict = d};
}

static struct value eval_item(struct run *r, const struct node *node, struct scope *scope)
{
    struct value object = eval(r, node->a, scope);
    const struct node *key = node->b;
    if (key->kind != NODE_SLICE)
        return call_item(r, object, eval(r, key, scope));
    struct value start = eval_or_none(r, key->a, scope), stop = eval_or_none(r, key->b, scope);
    return strings_slice(r, object, start, stop, eval_or_none(r, key->c, scope));
}

static struct value eval_concat(struct run *r, const struct node *node, struct scope *scope)
{
    struct builder b = builder_start(r);
    for (size_t i = 0; i < node->count; i++)
        print_str(&b, eval(r, node->items[i], scope));
    return value_string(builder_finish(&b));
}

static struct value eval_comparison(struct run *r, const struct node *node, struct scope *scope)
{
    struct value left = eval(r, node->a, scope);
    bool holds = true;
    for (size_t i = 0; i < node->count && holds; i++) {
        struct value right = eval(r, node->items[i], scope);
        holds = eval_compare(r, node->ops[i], left, right);
        left = right;
    }
    return value_bool(holds);
}

static struct value eval_negate(struct run *r, const struct node *node, struct scope *scope)
{
    struct value v = eval(r, node->a, scope);
    int64_t i;
    double x;
    value_refuse_undefined(r, v);
    if (!value_is_number(v, &i, &x))
        run_fail(r, "bad operand type for unary %c: '%s'", node->kind == NODE_NEGATE ? '-' : '+', value_type_name(v));
    if (v.kind == VALUE_FLOAT)
        return value_real(node->kind == NODE_NEGATE ? -x : x);
    if (node->kind == NODE_NEGATE && __builtin_sub_overflow((int64_t)0, i, &i))
        run_fail(r, "the result of '-' does not fit 64 bits");
    return value_int(i);
}

static void add_keywords(struct run *r, struct value v, const struct string **names, struct value *named, size_t *count)
{
    if (v.kind != VALUE_DICT)
        run_fail(r, "what follows ** must be a mapping, not %s", value_type_name(v));
    for (size_t i = 0; i < v.dict->count; i++) {
        if (v.dict->entries[i].key.kind != VALUE_STRING)
            run_fail(r, "keywords must be strings");
        for (size_t j = 0; j < *count; j++)
            if (string_equal(names[j], v.dict->entries[i].key.string))
                run_fail(r, "the argument '%s' is given twice", value_str(r, v.dict->entries[i].key)->text);
        names[*count] = v.dict->entries[i].key.string;
        named[(*count)++] = v.dict->entries[i].value;
    }
}

static struct args eval_args(struct run *r, const struct node_args *nodes, struct scope *scope)
{
    if (!nodes)
        return (struct args){0};
    struct value double_star = {0};
    struct value *positional = run_alloc(r, nodes->count, sizeof *positional);
    size_t count = nodes->count, num_named = nodes->num_named;
    for (size_t i = 0; i < nodes->count; i++)
        positional[i] = eval(r, nodes->values[i], scope);
    if (nodes->star) {
        struct sequence more = value_items(r, eval(r, nodes->star, scope));
        struct value *all = run_alloc(r, count + more.count, sizeof *all);
        memcpy(all, positional, count * sizeof *all);
        if (more.count)
            memcpy(all + count, more.items, more.count * sizeof *all);
        positional = all;
        count += more.count;
    }
    struct value *direct = run_alloc(r, num_named, sizeof *direct);
    for (size_t i = 0; i < num_named; i++)
        direct[i] = eval(r, nodes->named[i], scope);
    if (!nodes->double_star)
        return (struct args){positional, count, nodes->names, direct, num_named};
    double_star = eval(r, nodes->double_star, scope);
    size_t most = num_named + (double_star.kind == VALUE_DICT ? double_star.dict->count : 0);
    const struct string **names = run_alloc(r, most, sizeof *names);
    struct value *named = run_alloc(r, most, sizeof *named);
    for (size_t i = 0; i < num_named; i++) {
        names[i] = nodes->names[i];
        named[i] = direct[i];
    }
    add_keywords(r, double_star, names, named, &num_named);
    return (struct args){positional, count, names, named, num_named};
}

static struct value eval_call(struct run *r, const struct node *node, struct scope *scope)
{
    struct value function = eval(r, node->a, scope);
    struct args args = eval_args(r, node->args, scope);
    r->line = node->line;
    return call_value(r, function, &args);
}

// A filter applied to `inner`, or to its own value when inner is not given; a chain ends in the filter without one.
static struct value eval_filter(struct run *r, const struct node *node, struct scope *scope, struct value inner)
{
    struct value self = inner;
    if (node->a)
        self = value_given(inner) ? eval_filter(r, node->a, scope, inner) : eval(r, node->a, scope);
    struct args args = eval_args(r, node->args, scope);
    r->line = node->line;
    return call_callable(r, node->callable, "filter", self, &args);
}

static struct value eval_node(struct run *r, const struct node *node, struct scope *scope)
{
    struct value v;
    struct args args;
    switch (node->kind) {
    case NODE_CONST:
        return node->constant;
    case NODE_NAME:
        return eval_name(r, node, scope);
    case NODE_LIST:
        return eval_items(r, node, scope, VALUE_LIST);
    case NODE_TUPLE:
        return eval_items(r, node, scope, VALUE_TUPLE);
    case NODE_DICT:
        return eval_dict(r, node, scope);
    case NODE_ATTRIBUTE:
        return call_attribute(r, eval(r, node->a, scope), node->constant.string);
    case NODE_ITEM:
        return eval_item(r, node, scope);
    case NODE_SLICE: // in a tuple of subscripts; no value of a template takes those
        run_fail(r, "a slice cannot stand here");
    case NODE_CALL:
        return eval_call(r, node, scope);
    case NODE_FILTER:
        return eval_filter(r, node, scope, (struct value){.kind = VALUE_MISSING});
    case NODE_TEST:
        v = eval(r, node->a, scope);
        args = eval_args(r, node->args, scope);
        r->line = node->line;
        return call_callable(r, node->callable, "test", v, &args);
    case NODE_NEGATE:
    case NODE_PLUS:
        return eval_negate(r, node, scope);
    case NODE_NOT:
        return value_bool(!value_true(r, eval(r, node->a, scope)));
    case NODE_BINARY:
        v = eval(r, node->a, scope);
        return eval_binary(r, node->op, v, eval(r, node->b, scope));
    case NODE_CONCAT:
        return eval_concat(r, node, scope);
    case NODE_COMPARE:
        return eval_comparison(r, node, scope);
    case NODE_AND:
        v = eval(r, node->a, scope);
        return value_true(r, v) ? eval(r, node->b, scope) : v;
    case NODE_OR:
        v = eval(r, node->a, scope);
        return value_true(r, v) ? v : eval(r, node->b, scope);
    case NODE_CONDITION:
        if (value_true(r, eval(r, node->a, scope)))
            return eval(r, node->b, scope);
        return node->c ? eval(r, node->c, scope) : value_undefined();
    default:
        run_fail(r, "a statement cannot stand here");
    }
}

struct value eval(struct run *r, const struct node *node, struct scope *scope)
{
    run_enter(r);
    run_charge(r, 1);
    r->line = node->line;
    struct value v = eval_node(r, node, scope);
    run_exit(r);
    return v;
}

// ---- statements

enum flow { FLOW_ON, FLOW_BREAK, FLOW_CONTINUE };

static enum flow run_block(struct run *r, const struct node *statements, struct scope *scope);

static void assign(struct run *r, const struct node *target, struct value value, struct scope *scope)
{
    if (target->kind == NODE_NAME) {
        scope_set(r, scope, target->name, value);
        return;
    }
    if (target->kind == NODE_ATTRIBUTE) {
        struct value object = eval(r, target->a, scope);
        if (object.kind != VALUE_NAMESPACE)
            run_fail(r, "cannot assign attribute on non-namespace object");
        if (target->name[0] == '_')
            run_fail(r, "a namespace cannot have a member '%s' that begins with '_'", target->name);
        dict_set(r, object.dict, target->constant, value);
        return;
    }
    struct sequence items = value_items(r, value);
    if (items.count != target->count)
        run_fail(r, "%zu values cannot be assigned to %zu names", items.count, target->count);
    for (size_t i = 0; i < target->count; i++)
        assign(r, target->items[i], items.items[i], scope);
}

// What a block writes, as a string.
static const struct string *capture(struct run *r, const struct node *statements, struct scope *scope)
{
    struct builder *out = r->out, own = builder_start(r);
    r->out = &own;
    run_block(r, statements, scope);
    r->out = out;
    return builder_finish(&own);
}

// Whether there is an item n; items that pass the loop's filter are found as far as somebody asks.
static bool loop_fetch(struct loop *loop, size_t n)
{
    struct run *r = loop->run;
    if (!loop->node->c)
        return n < loop->count;
    while (loop->count <= n && loop->next_source < loop->num_source) {
        struct value item = loop->source[loop->next_source++];
        struct scope *scope = scope_new(r, loop->scope);
        assign(r, loop->node->a, item, scope);
        if (value_true(r, eval(r, loop->node->c, scope)))
            loop->items[loop->count++] = item;
    }
    return n < loop->count;
}

struct value loop_attribute(struct run *r, struct loop *loop, const char *name)
{
    static const char *const names[] = {"index",     "index0",   "first",    "last",  "length", "revindex",
                                        "revindex0", "previtem", "nextitem", "depth", "depth0"};
    size_t which = 0;
    while (which < sizeof names / sizeof *names && strcmp(name, names[which]) != 0)
        which++;
    int64_t index = (int64_t)loop->index;
    if (which >= 4 && which <= 6) // these know the end
        loop_fetch(loop, SIZE_MAX - 1);
    switch (which) {
    case 0:
        return value_int(index + 1);
    case 1:
        return value_int(index);
    case 2:
        return value_bool(index == 0);
    case 3:
        return value_bool(!loop_fetch(loop, loop->index + 1));
    case 4:
        return value_int((int64_t)loop->count);
    case 5:
        return value_int((int64_t)loop->count - index);
    case 6:
        return value_int((int64_t)loop->count - index - 1);
    case 7:
        return index ? loop->items[index - 1] : value_undefined();
    case 8:
        return loop_fetch(loop, loop->index + 1) ? loop->items[index + 1] : value_undefined();
    case 9: // only recursive loops go deeper
        return value_int(1);
    case 10:
        return value_int(0);
    default:
        return value_undefined_in(r, (struct value){.kind = VALUE_LOOP}, value_text(r, name), false);
    }
}

static enum flow run_for(struct run *r, const struct node *node, struct scope *scope)
{
    struct sequence items = value_items(r, eval(r, node->b, scope));
    struct loop *loop = run_alloc(r, 1, sizeof *loop);
    *loop = (struct loop){.run = r,
                          .node = node,
                          .scope = scope,
                          .source = items.items,
                          .num_source = items.count,
                          .items = items.items,
                          .count = items.count};
    if (node->c) {
        loop->items = run_alloc(r, items.count, sizeof *loop->items);
        loop->count = 0;
    }
    bool any = false;
    for (; loop_fetch(loop, loop->index); loop->index++) {
        struct scope *inner = scope_new(r, scope);
        any = true;
        run_charge(r, 1);
        scope_set(r, inner, node->name, (struct value){.kind = VALUE_LOOP, .loop = loop});
        assign(r, node->a, loop->items[loop->index], inner);
        if (run_block(r, node->body, inner) == FLOW_BREAK)
            break;
    }
    return any ? FLOW_ON : run_block(r, node->otherwise, scope_new(r, scope));
}

static enum flow run_if(struct run *r, const struct node *node, struct scope *scope)
{
    for (; node; node = node->c) {
        if (value_true(r, eval(r, node->a, scope)))
            return run_block(r, node->body, scope);
        if (!node->c)
            return run_block(r, node->otherwise, scope);
    }
    return FLOW_ON;
}

static enum flow run_statement(struct run *r, const struct node *node, struct scope *scope)
{
    struct macro *macro;
    struct value v;
    switch (node->kind) {
    case NODE_TEXT:
        builder_add_string(r->out, node->constant.string);
        return FLOW_ON;
    case NODE_PRINT:
        print_str(r->out, eval(r, node->a, scope));
        return FLOW_ON;
    case NODE_IF:
        return run_if(r, node, scope);
    case NODE_FOR:
        return run_for(r, node, scope);
    case NODE_SET:
        assign(r, node->a, eval(r, node->b, scope), scope);
        return FLOW_ON;
    case NODE_SET_BLOCK:
        v = value_string(capture(r, node->body, scope_new(r, scope)));
        assign(r, node->a, node->b ? eval_filter(r, node->b, scope, v) : v, scope);
        return FLOW_ON;
    case NODE_FILTER_BLOCK:
        v = value_string(capture(r, node->body, scope_new(r, scope)));
        print_str(r->out, eval_filter(r, node->b, scope, v));
        return FLOW_ON;
    case NODE_WITH: {
        struct scope *inner = scope_new(r, scope);
        for (const struct node *set = node->otherwise; set; set = set->next)
            assign(r, set->a, eval(r, set->b, scope), inner);
        return run_block(r, node->body, inner);
    }
    case NODE_MACRO:
        macro = run_alloc(r, 1, sizeof *macro);
        *macro = (struct macro){node, scope};
        scope_set(r, scope, node->name, (struct value){.kind = VALUE_MACRO, .macro = macro});
        return FLOW_ON;
    case NODE_SCOPE:
        return run_block(r, node->body, scope_new(r, scope));
    case NODE_BREAK:
        return FLOW_BREAK;
    case NODE_CONTINUE:
        return FLOW_CONTINUE;
    default:
        run_fail(r, "an expression cannot stand here");
    }
}

static enum flow run_block(struct run *r, const struct node *statements, struct scope *scope)
{
    enum flow flow = FLOW_ON;
    run_enter(r);
    for (const struct node *node = statements; node && flow == FLOW_ON; node = node->next) {
        r->line = node->line;
        run_charge(r, 1);
        flow = run_statement(r, node, scope);
    }
    run_exit(r);
    return flow;
}

void eval_block(struct run *r, const struct node *statements, struct scope *scope) { run_block(r, statements, scope); }

// ---- macros

// The value of a parameter: given by place, by name, by its default, or undefined.
static struct value macro_argument(struct run *r, const struct macro *macro, size_t at, const struct args *args,
                                   struct scope *scope)
{
    const struct node *parameter = macro->node->items[at];
    if (at < args->count)
        return args->values[at];
    for (size_t i = 0; i < args->num_named; i++)
        if (string_is(args->names[i], parameter->name))
            return args->named[i];
    if (parameter->a)
        return eval(r, parameter->a, scope);
    struct undefined *u = run_alloc(r, 1, sizeof *u);
    u->name = value_text(r, parameter->name);
    return (struct value){.kind = VALUE_UNDEFINED, .undefined = u};
}

// Arguments by name that are no parameters.
static struct dict *extra_keywords(struct run *r, const struct macro *macro, const struct args *args)
{
    const struct node *node = macro->node;
    struct dict *extra = dict_new(r);
    for (size_t i = 0; i < args->num_named; i++) {
        size_t at = 0;
        while (at < node->count && !string_is(args->names[i], node->items[at]->name))
            at++;
        if (at < args->count && at < node->count)
            run_fail(r, "macro '%s' got the argument '%s' twice", node->name, node->items[at]->name);
        if (at == node->count)
            dict_set(r, extra, value_string(args->names[i]), args->named[i]);
    }
    return extra;
}

struct value call_macro(struct run *r, const struct macro *macro, const struct args *args)
{
    const struct node *node = macro->node;
    struct scope *scope = scope_new(r, macro->scope);
    struct dict *keywords = extra_keywords(r, macro, args);
    if (keywords->count && !node->takes_kwargs)
        run_fail(r, "macro '%s' takes no argument '%s'", node->name, value_str(r, keywords->entries[0].key)->text);
    if (args->count > node->count && !node->takes_varargs)
        run_fail(r, "macro '%s' takes not more than %zu argument(s)", node->name, node->count);
    if (++r->macro_depth > TEMPLATE_MAX_NESTING)
        run_fail(r, "macros call each other more than %d deep", TEMPLATE_MAX_NESTING);
    for (size_t i = 0; i < node->count; i++)
        scope_set(r, scope, node->items[i]->name, macro_argument(r, macro, i, args, scope));
    if (node->takes_kwargs)
        scope_set(r, scope, node->b->name, (struct value){.kind = VALUE_DICT, .dict = keywords});
    if (node->takes_varargs) {
        size_t count = args->count > node->count ? args->count - node->count : 0;
        struct value rest = value_sequence(r, VALUE_TUPLE, count);
        if (count)
            memcpy(rest.sequence->items, args->values + node->count, count * sizeof *args->values);
        scope_set(r, scope, node->a->name, rest);
    }
    const struct string *text = capture(r, node->body, scope);
    r->macro_depth--;
    return value_string(text);
}
