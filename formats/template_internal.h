// What the parts of the template interpreter share; no other file includes it.
//
//   template_lex.c      text -> tokens                    template_value.c    values: truth, equality, order, items
//   template_parse.c    tokens -> statements              template_print.c    values -> text: str, repr, JSON
//   template_expr.c     tokens -> expressions             template_strings.c  methods of strings
//   template_eval.c     runs them                         template_format.c   '%' and .format
//   template_call.c     arguments, functions, methods     template_filters.c  filters; template_tests.c: tests
//   template_memory.c   arena, marked strings             template_items.c    filters of sequences; template_case.c: case
//
// An error leaves by longjmp, from any depth: whatever is made lives in an arena, so nothing has to be put right on the way.
#ifndef TPSHARD_FORMATS_TEMPLATE_INTERNAL_H
#define TPSHARD_FORMATS_TEMPLATE_INTERNAL_H

#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "formats/template.h"

enum {
    TEMPLATE_MAX_NESTING = 64,    // blocks and brackets in a template, macros that call each other, depth of values
    TEMPLATE_MAX_OPERATORS = 200, // in a row: a + b + c ...
    TEMPLATE_MAX_DEPTH = 1000,    // of the evaluation, all in all
    TEMPLATE_MAX_PARAMETERS = 8,  // of a built-in callable
};

struct run;
struct builder;
struct node;

// ---- values

enum value_kind {
    VALUE_MISSING, // an argument that was not given; never seen by a template
    VALUE_UNDEFINED,
    VALUE_NONE,
    VALUE_BOOL,
    VALUE_INT,
    VALUE_FLOAT,
    VALUE_STRING,
    VALUE_LIST, // from here struct sequence
    VALUE_TUPLE,
    VALUE_RANGE,
    VALUE_KEYS, // dict views
    VALUE_VALUES,
    VALUE_ITEMS,
    VALUE_ITERATOR, // what filters such as map give: can be walked once
    VALUE_DICT,
    VALUE_NAMESPACE, // struct dict too
    VALUE_LOOP,
    VALUE_MACRO,
    VALUE_FUNCTION, // struct callable
    VALUE_METHOD,
};

struct value {
    enum value_kind kind;
    union {
        bool boolean;
        int64_t integer;
        double real;
        const struct string *string;
        struct sequence *sequence;
        struct dict *dict;
        struct loop *loop;
        const struct macro *macro;
        const struct callable *function;
        const struct method *method;
        const struct undefined *undefined; // NULL: nothing is known about it
    };
};

struct string {       // immutable
    const char *text; // valid UTF-8
    size_t bytes, chars;
    const uint8_t *marks; // [bytes] 1: the user's. NULL: `user` holds for all of it
    bool user;
    bool markup; // |safe: joined with '+', other strings are HTML-escaped
};

struct sequence {
    struct value *items;
    size_t count;
    size_t done;               // ITERATOR: what was walked already
    int64_t start, stop, step; // RANGE
};

struct dict_entry {
    struct value key, value;
};

struct dict { // in order of insertion
    struct dict_entry *entries;
    size_t count, capacity;
};

struct undefined {
    const char *object; // what it was looked for in: "dict object"; NULL: a variable
    struct value name;
    bool unsafe; // the sandbox hides it
};

struct args {
    const struct value *values;
    size_t count;
    const struct string *const *names; // of the named ones
    const struct value *named;
    size_t num_named;
};

// A filter, test, function or method. v: the arguments by parameter, MISSING where not given.
struct callable {
    const char *name;
    struct value (*call)(struct run *r, struct value self, const struct value *v,
                         const struct args *args); // NULL: unsupported
    const char *parameters;                        // "width first blank"; NULL: takes what is in args
    int required;                                  // so many must be given
};
const struct callable *callable_find(const struct callable *table,
                                     const char *name); // up to a NULL name; NULL: not there

struct method {
    const struct callable *callable;
    struct value self;
};

struct scope {
    struct scope *parent;
    struct variable {
        const char *name; // interned; of a for: "loop"
        struct value value;
        struct variable *next;
    } * variables;
};

struct macro {
    const struct node *node;
    struct scope *scope; // where it was defined
};

struct loop {
    struct run *run;
    const struct node *node; // the for statement, for its `if`
    struct scope *scope;
    const struct value *source; // what is walked
    size_t num_source, next_source;
    struct value *items;  // those that passed the `if`; equals source when there is none
    size_t count;         // known so far
    size_t index;         // of the current one
    struct value changed; // what changed() saw last
};

// ---- memory (template_memory.c)

struct arena {
    struct arena_chunk *chunks;
    uint64_t bytes, limit_bytes;
};
void *arena_alloc(struct arena *arena, size_t bytes); // zeroed; NULL: malloc failed, or arena->bytes passed the limit
void arena_free(struct arena *arena);

struct run { // one rendering, or one compilation
    struct arena arena;
    jmp_buf leave;
    struct error *err;
    const char *name; // of the template
    uint32_t line;    // of what is being done
    int bad_code;
    uint64_t steps, max_steps;
    uint64_t uncharged_bytes; // of work: less than a step's
    int depth, macro_depth;
    struct builder *out;
    int64_t now_s;
};

// Leaves with "<name>, line <line>: ...".
void run_fail(struct run *r, const char *fmt, ...) __attribute__((noreturn, format(printf, 2, 3)));
void run_charge(struct run *r, uint64_t steps);
void run_charge_bytes(struct run *r, uint64_t bytes); // a step for each KiB, however small the pieces
static inline void run_charge_items(struct run *r, uint64_t items) { run_charge_bytes(r, items * 64); } // looked at
void *run_alloc(struct run *r, size_t count, size_t size);
void run_enter(struct run *r); // one deeper
static inline void run_exit(struct run *r) { r->depth--; }

struct builder { // of a string; start with builder_start
    struct run *run;
    char *text;
    uint8_t *marks; // NULL while uniform
    bool user;
    size_t bytes, capacity;
    uint64_t limit_bytes; // 0: memory alone
};
struct builder builder_start(struct run *r);
void builder_add(struct builder *b, const char *text, size_t bytes, bool user);
void builder_add_text(struct builder *b, const char *text); // of the template
void builder_add_part(struct builder *b, const struct string *s, size_t begin, size_t end);
void builder_add_string(struct builder *b, const struct string *s);
const struct string *builder_finish(struct builder *b);

const struct string *string_new(struct run *r, const char *text, size_t bytes, bool user);
const struct string *string_part(struct run *r, const struct string *s, size_t begin, size_t end); // bytes
bool string_user_at(const struct string *s, size_t byte);
bool string_equal(const struct string *a, const struct string *b);
bool string_is(const struct string *s, const char *text);
size_t string_offset(struct run *r, const struct string *s, size_t chars); // byte where a character begins
// The first or last place of wanted in [begin, end), or SIZE_MAX.
size_t string_find(struct run *r, const struct string *s, const struct string *wanted, size_t begin, size_t end);
size_t string_find_last(struct run *r, const struct string *s, const struct string *wanted, size_t begin, size_t end);
uint32_t text_next(const char *text, size_t *at);                    // code point at *at, which moves on
bool text_is_space(uint32_t code_point);                             // as Python's str.isspace
size_t text_space_end(const char *text, size_t bytes, size_t at);    // behind the white space at `at`
size_t text_space_begin(const char *text, size_t begin, size_t end); // where the white space before end begins

// ---- values (template_value.c)

static inline struct value value_none(void) { return (struct value){.kind = VALUE_NONE}; }
static inline struct value value_bool(bool b) { return (struct value){.kind = VALUE_BOOL, .boolean = b}; }
static inline struct value value_int(int64_t i) { return (struct value){.kind = VALUE_INT, .integer = i}; }
static inline struct value value_real(double f) { return (struct value){.kind = VALUE_FLOAT, .real = f}; }
static inline struct value value_string(const struct string *s)
{
    return (struct value){.kind = VALUE_STRING, .string = s};
}
static inline struct value value_undefined(void) { return (struct value){.kind = VALUE_UNDEFINED}; }
static inline bool value_is_sequence(struct value v) { return v.kind >= VALUE_LIST && v.kind <= VALUE_ITERATOR; }
static inline bool value_given(struct value v) { return v.kind != VALUE_MISSING; }
struct value value_text(struct run *r, const char *text);
struct value value_sequence(struct run *r, enum value_kind kind, size_t count); // items are filled by the caller
struct value value_undefined_in(struct run *r, struct value object, struct value name, bool unsafe);
const char *value_type_name(struct value v); // "str", "NoneType"
void value_fail_undefined(struct run *r, struct value v) __attribute__((noreturn));
void value_refuse_undefined(struct run *r, struct value v); // returns for every other value
bool value_true(struct run *r, struct value v);
bool value_equal(struct run *r, struct value a, struct value b);
int value_compare(struct run *r, struct value a, struct value b, const char *op); // order; fails where Python does
bool value_contains(struct run *r, struct value container, struct value item);
bool value_is_number(struct value v, int64_t *integer, double *real); // bool and int give both
bool value_as_int(struct value v, int64_t *out);                      // bool or int
int64_t value_need_int(struct run *r, struct value v, const char *what);
size_t value_length(struct run *r, struct value v);
// What iterating gives; an iterator is used up.
struct sequence value_items(struct run *r, struct value v);
struct dict *dict_new(struct run *r);
void dict_set(struct run *r, struct dict *d, struct value key, struct value value);
const struct value *dict_get(struct run *r, const struct dict *d, struct value key); // NULL: not there
struct value value_from_json(struct run *r, const json_t *json, enum template_origin origin);

// ---- text of values (template_print.c)

void print_str(struct builder *b, struct value v);  // str()
void print_repr(struct builder *b, struct value v); // repr()
const struct string *value_str(struct run *r, struct value v);
void print_real(char text[32], double value);
struct value print_json(struct run *r, struct value v, const struct value *options); // tojson; options: its parameters

// ---- program

enum node_kind {
    NODE_CONST,
    NODE_NAME,
    NODE_LIST,
    NODE_TUPLE,
    NODE_DICT,
    NODE_ATTRIBUTE,
    NODE_ITEM,
    NODE_SLICE,
    NODE_CALL,
    NODE_FILTER,
    NODE_TEST,
    NODE_NEGATE,
    NODE_PLUS,
    NODE_NOT,
    NODE_BINARY,
    NODE_CONCAT,
    NODE_COMPARE,
    NODE_AND,
    NODE_OR,
    NODE_CONDITION,
    // statements
    NODE_TEXT,
    NODE_PRINT,
    NODE_IF,
    NODE_FOR,
    NODE_SET,
    NODE_SET_BLOCK,
    NODE_MACRO,
    NODE_FILTER_BLOCK,
    NODE_WITH,
    NODE_SCOPE,
    NODE_BREAK,
    NODE_CONTINUE,
};

struct node_args {
    struct node **values;
    size_t count;
    const struct string **names;
    struct node **named;
    size_t num_named;
    struct node *star, *double_star;
};

// One kind for all: what a field means stands at each kind's case in template_eval.c.
struct node {
    enum node_kind kind;
    uint32_t line;
    int op; // enum token_kind
    int height;
    struct node *a, *b, *c;
    struct node *body, *otherwise; // lists of statements
    struct node *next;             // the statement behind this one
    struct node **items;
    int *ops;
    size_t count;
    struct value constant;
    const char *name; // interned; of a for: "loop"
    const struct callable *callable;
    struct node_args *args;
    bool takes_varargs, takes_kwargs;
};

enum token_kind {
    TOKEN_END,
    TOKEN_TEXT,
    TOKEN_BLOCK_BEGIN,
    TOKEN_BLOCK_END,
    TOKEN_PRINT_BEGIN,
    TOKEN_PRINT_END,
    TOKEN_NAME,
    TOKEN_STRING,
    TOKEN_INT,
    TOKEN_REAL,
    TOKEN_ADD,
    TOKEN_SUB,
    TOKEN_MUL,
    TOKEN_DIV,
    TOKEN_FLOORDIV,
    TOKEN_MOD,
    TOKEN_POW,
    TOKEN_TILDE,
    TOKEN_EQ,
    TOKEN_NE,
    TOKEN_LT,
    TOKEN_LE,
    TOKEN_GT,
    TOKEN_GE,
    TOKEN_IN,
    TOKEN_NOT_IN,
    TOKEN_LPAREN,
    TOKEN_RPAREN,
    TOKEN_LBRACKET,
    TOKEN_RBRACKET,
    TOKEN_LBRACE,
    TOKEN_RBRACE,
    TOKEN_DOT,
    TOKEN_COLON,
    TOKEN_COMMA,
    TOKEN_PIPE,
    TOKEN_ASSIGN,
    TOKEN_SEMICOLON,
};

struct token {
    enum token_kind kind;
    uint32_t line;
    const char *text; // TEXT, NAME, STRING (unescaped)
    size_t bytes;
    struct value value; // INT, REAL
};

struct token_array {
    struct token *tokens;
    size_t count;
};
struct token_array template_lex(struct run *r, const char *text, size_t bytes);

struct parser {
    struct run *run;
    const struct token *token;
    int nesting;
    bool saw_varargs, saw_kwargs;
    struct names *names;
};
struct names { // interned: equal names are one pointer
    const char **names;
    size_t count, capacity;
};
const char *parse_intern(struct parser *p, const char *text, size_t bytes);
const char *names_find(const struct names *names, const char *text, size_t bytes); // NULL: never mentioned

struct node *template_parse(struct parser *p); // template_parse.c
// template_expr.c
struct node *parse_node(struct parser *p, enum node_kind kind);
struct node *parse_expression(struct parser *p, bool with_condition);
struct node *parse_tuple(struct parser *p, bool simple, bool with_condition, const char *end_word, bool in_parentheses);
struct node *parse_filter(struct parser *p, struct node *value, bool begin_inline); // one or more; value may be NULL
struct node *parse_primary(struct parser *p);
bool parse_skip(struct parser *p, enum token_kind kind);
void parse_expect(struct parser *p, enum token_kind kind, const char *what);
bool parse_at_word(const struct parser *p, const char *word);
bool parse_skip_word(struct parser *p, const char *word);
void parse_deeper(struct parser *p);
void parse_unexpected(struct parser *p) __attribute__((noreturn));

// ---- running (template_eval.c, template_call.c)

struct value eval(struct run *r, const struct node *node, struct scope *scope);
void eval_block(struct run *r, const struct node *statements, struct scope *scope);
const struct value *scope_find(const struct scope *scope, const char *name);
void scope_set(struct run *r, struct scope *scope, const char *name, struct value value);
struct value eval_binary(struct run *r, int op, struct value a, struct value b);
bool eval_compare(struct run *r, int op, struct value a, struct value b);
struct value call_macro(struct run *r, const struct macro *macro, const struct args *args);
struct value loop_attribute(struct run *r, struct loop *loop, const char *name);

struct value call_value(struct run *r, struct value function, const struct args *args);
struct value call_callable(struct run *r, const struct callable *callable, const char *what, struct value self,
                           const struct args *args);
struct value call_attribute(struct run *r, struct value object, const struct string *name); // object.name
struct value call_item(struct run *r, struct value object, struct value key);               // object[key]
const struct callable *call_global(const char *name);                                       // range, dict, ...
// What template_filter or template_test finds for a name that is a value; NULL: nothing.
const struct callable *call_named(const struct string *name, const struct callable *find(const char *name));

const struct callable *template_filter(const char *name);
const struct callable *template_items_filter(const char *name); // its part in template_items.c
const struct callable *template_test(const char *name);
// Each ends with a NULL name.
extern const struct callable template_string_methods[], template_case_methods[];
struct value strings_slice(struct run *r, struct value object, struct value start, struct value stop,
                           struct value step);
struct value strings_join(struct run *r, const struct string *separator, struct sequence items, bool strict);
struct value strings_trim(struct run *r, const struct string *s, struct value chars, bool left, bool right);
struct value strings_replace(struct run *r, const struct string *s, const struct string *old, const struct string *with,
                             int64_t count);
struct value strings_title(struct run *r, const struct string *s, bool as_filter);
struct value strings_case(struct run *r, const struct string *s, char how); // 'u', 'l', 'c'apitalize, 's'wap
struct value strings_lines(struct run *r, const struct string *s, bool keep_ends);
const struct string *strings_escape(struct run *r, const struct string *s); // HTML
struct value format_percent(struct run *r, const struct string *format, struct value args);
struct value format_method(struct run *r, struct value self, const struct value *v, const struct args *args);

#endif
