// Regular expressions: sets of characters to bytes, the parser, and its tree to nodes. See grammar_regex.h.
#include "engine/serve/grammar_regex.h"

#include "formats/utf8.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_CODE_POINT = 0x10FFFF, MAX_GROUPS_DEEP = 64, MAX_REPEAT = 10000, UNLIMITED = -1 };

// ---- sets ----------------------------------------------------------------------------------------------------------

void grammar_regex_add(struct regex_set *set, uint32_t low, uint32_t high)
{
    int at = 0, end;
    while (at < set->count && set->ranges[at].high + 1 < low)
        at++;
    for (end = at; end < set->count && set->ranges[end].low <= high + 1; end++) {
        low = low < set->ranges[end].low ? low : set->ranges[end].low;
        high = high > set->ranges[end].high ? high : set->ranges[end].high;
    }
    if (end == at && set->count == REGEX_MAX_RANGES) {
        set->full = true;
        return;
    }
    memmove(set->ranges + at + 1, set->ranges + end, (size_t)(set->count - end) * sizeof *set->ranges);
    set->count += 1 - (end - at);
    set->ranges[at] = (struct regex_range){low, high};
}

void grammar_regex_invert(struct regex_set *set)
{
    struct regex_set result = {.full = set->full};
    uint32_t next = 0;
    for (int i = 0; i < set->count; i++) {
        if (set->ranges[i].low > next)
            grammar_regex_add(&result, next, set->ranges[i].low - 1);
        next = set->ranges[i].high + 1;
    }
    if (next <= MAX_CODE_POINT)
        grammar_regex_add(&result, next, MAX_CODE_POINT);
    *set = result;
}

static void add_spaces(struct regex_set *set)
{
    static const struct regex_range spaces[] = {{9, 13},          {' ', ' '},       {0xA0, 0xA0},     {0x1680, 0x1680},
                                                {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F},
                                                {0x3000, 0x3000}, {0xFEFF, 0xFEFF}};
    for (size_t i = 0; i < sizeof spaces / sizeof *spaces; i++)
        grammar_regex_add(set, spaces[i].low, spaces[i].high);
}

// ---- characters to bytes -------------------------------------------------------------------------------------------

struct byte_edges { // of one node
    struct net_edge edges[REGEX_MAX_RANGES * 12];
    int count;
    uint32_t next, tails[4]; // tails[n]: n continuation bytes, then next; n from 1
};

static void add_edge(struct net *net, struct byte_edges *to, uint32_t low, uint32_t high, uint32_t target)
{
    if (to->count == (int)(sizeof to->edges / sizeof *to->edges)) {
        grammar_net_fail(net, ERR_USAGE);
        return;
    }
    to->edges[to->count++] = (struct net_edge){(uint8_t)low, (uint8_t)high, target};
}

static uint32_t tail(struct net *net, struct byte_edges *to, int bytes)
{
    if (bytes == 0)
        return to->next;
    if (to->tails[bytes] == NET_NOTHING) {
        uint32_t after = tail(net, to, bytes - 1), node = grammar_net_begin(net, NET_BYTES);
        grammar_net_edge(net, node, 0x80, 0xBF, after);
        to->tails[bytes] = node;
    }
    return to->tails[bytes];
}

// Characters of the same length whose encodings are all combinations of byte ranges.
static void add_sequence(struct net *net, struct byte_edges *to, uint32_t low, uint32_t high)
{
    uint8_t first[UTF8_MAX_BYTES], last[UTF8_MAX_BYTES];
    int bytes = (int)utf8_put((char *)first, low), at = bytes;
    utf8_put((char *)last, high);
    while (at > 1 && first[at - 1] == 0x80 && last[at - 1] == 0xBF)
        at--;
    uint32_t node = tail(net, to, bytes - at);
    while (--at > 0) {
        uint32_t before = grammar_net_begin(net, NET_BYTES);
        grammar_net_edge(net, before, first[at], last[at], node);
        node = before;
    }
    add_edge(net, to, first[0], last[0], node);
}

static void add_range(struct net *net, struct byte_edges *to, uint32_t low, uint32_t high)
{
    // The last characters of a length, and those before and behind the surrogates.
    static const uint32_t ends[] = {0x7F, 0x7FF, 0xD7FF, 0xDFFF, 0xFFFF};
    if (low > high || (low >= 0xD800 && high <= 0xDFFF))
        return;
    for (int i = 0; i < 5; i++) {
        if (low <= ends[i] && ends[i] < high) {
            add_range(net, to, low, ends[i]);
            add_range(net, to, ends[i] + 1, high);
            return;
        }
    }
    for (int i = 1; low >= 0x80 && i < 4; i++) {
        uint32_t mask = (1u << 6 * i) - 1;
        if ((low & ~mask) == (high & ~mask))
            break;
        uint32_t cut = low & mask ? low | mask : (high & mask) != mask ? (high & ~mask) - 1 : high;
        if (cut < high) {
            add_range(net, to, low, cut);
            add_range(net, to, cut + 1, high);
            return;
        }
    }
    add_sequence(net, to, low, high);
}

static bool has(const struct regex_set *set, uint32_t c)
{
    for (int i = 0; i < set->count; i++)
        if (set->ranges[i].low <= c && c <= set->ranges[i].high)
            return true;
    return false;
}

// Characters that a JSON string has escaped alone: \" \\ \b and so on, then \u00xx for what has no letter.
static void add_escapes(struct net *net, struct byte_edges *to, const struct regex_set *set)
{
    static const char named[] = "\"\\\b\f\n\r\t", letters[] = "\"\\bfnrt", digits[] = "0123456789abcdef";
    uint32_t tens[2], code = NET_NOTHING;
    for (uint32_t ten = 0; ten < 2; ten++) {
        tens[ten] = NET_NOTHING;
        for (uint32_t c = ten ? 16 : 1; c < 16 * (ten + 1); c++) {
            if (!has(set, c) || strchr(named, (int)c))
                continue;
            if (tens[ten] == NET_NOTHING)
                tens[ten] = grammar_net_begin(net, NET_BYTES);
            grammar_net_edge(net, tens[ten], (uint8_t)digits[c & 15], (uint8_t)digits[c & 15], to->next);
        }
    }
    if (tens[0] != NET_NOTHING || tens[1] != NET_NOTHING) {
        code = grammar_net_begin(net, NET_BYTES);
        grammar_net_edge(net, code, '0', '0', tens[0]);
        grammar_net_edge(net, code, '1', '1', tens[1]);
        code = grammar_net_text(net, "00", 2, code);
    }
    uint32_t node = NET_NOTHING;
    for (size_t i = 0; i <= strlen(named); i++) {
        bool last = !named[i];
        if (last ? code == NET_NOTHING : !has(set, (uint8_t)named[i]))
            continue;
        if (node == NET_NOTHING)
            node = grammar_net_begin(net, NET_BYTES);
        uint8_t letter = last ? 'u' : (uint8_t)letters[i];
        grammar_net_edge(net, node, letter, letter, last ? code : to->next);
    }
    if (node != NET_NOTHING)
        add_edge(net, to, '\\', '\\', node);
}

uint32_t grammar_regex_build_set(struct net *net, const struct regex_set *set, enum regex_form form, uint32_t next)
{
    struct byte_edges to;
    to.count = 0;
    to.next = next;
    to.tails[0] = to.tails[1] = to.tails[2] = to.tails[3] = NET_NOTHING;
    if (form == REGEX_JSON)
        add_escapes(net, &to, set);
    static const struct regex_range kept[] = {{0x20, 0x21}, {0x23, 0x5B}, {0x5D, MAX_CODE_POINT}};
    for (int i = 0; i < set->count; i++) {
        if (form == REGEX_PLAIN) {
            add_range(net, &to, set->ranges[i].low, set->ranges[i].high);
            continue;
        }
        for (int k = 0; k < 3; k++) {
            uint32_t low = set->ranges[i].low > kept[k].low ? set->ranges[i].low : kept[k].low;
            uint32_t high = set->ranges[i].high < kept[k].high ? set->ranges[i].high : kept[k].high;
            if (low <= high)
                add_range(net, &to, low, high);
        }
    }
    if (!to.count)
        return NET_NOTHING;
    uint32_t node = grammar_net_begin(net, NET_BYTES);
    for (int i = 0; i < to.count; i++)
        grammar_net_edge(net, node, to.edges[i].low, to.edges[i].high, to.edges[i].target);
    return node;
}

// ---- parsing -------------------------------------------------------------------------------------------------------

enum item_kind { ITEM_SET, ITEM_SEQUENCE, ITEM_EITHER, ITEM_REPEAT };

struct item {
    enum item_kind kind;
    int last, previous; // last child; the sibling before; 0: none
    int min, max;
    struct regex_set *set;
};

struct parser {
    const char *text, *at, *end;
    enum regex_extent extent;
    struct item *items; // [0] is unused
    int count, capacity, depth;
    struct error *err;
    int rc;
};

static int refuse(struct parser *p, const char *what)
{
    if (!p->rc)
        p->rc = error_set(p->err, ERR_USAGE, "%s (at byte %d)", what, (int)(p->at - p->text));
    return 0;
}

static int new_item(struct parser *p, enum item_kind kind)
{
    if (p->rc)
        return 0;
    if (p->count == p->capacity) {
        int capacity = p->capacity ? 2 * p->capacity : 64;
        struct item *items = realloc(p->items, (size_t)capacity * sizeof *items);
        if (!items) {
            p->rc = error_set(p->err, ERR_MEMORY, "out of memory for a regular expression");
            return 0;
        }
        p->items = items;
        p->capacity = capacity;
    }
    p->items[p->count] = (struct item){.kind = kind};
    return p->count++;
}

static void append(struct parser *p, int parent, int child)
{
    if (p->rc)
        return;
    p->items[child].previous = p->items[parent].last;
    p->items[parent].last = child;
}

static int set_item(struct parser *p, const struct regex_set *set)
{
    int item = new_item(p, ITEM_SET);
    if (set->full)
        return refuse(p, "a character class has too many ranges");
    if (!item)
        return 0;
    if (!(p->items[item].set = malloc(sizeof *set))) {
        p->rc = error_set(p->err, ERR_MEMORY, "out of memory for a regular expression");
        return 0;
    }
    *p->items[item].set = *set;
    return item;
}

static bool next_is(const struct parser *p, char c) { return p->at < p->end && *p->at == c; }
static bool skip(struct parser *p, char c)
{
    bool is = next_is(p, c);
    p->at += is;
    return is;
}

static uint32_t next_character(struct parser *p)
{
    uint8_t lead = (uint8_t)*p->at++;
    int more = lead < 0xC0 ? 0 : lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
    uint32_t c = more == 0 ? lead : more == 1 ? lead & 0x1F : more == 2 ? lead & 0xF : lead & 7;
    for (; more > 0 && p->at < p->end; more--)
        c = c << 6 | ((uint8_t)*p->at++ & 0x3F);
    return c;
}

static uint32_t hexadecimal(struct parser *p, int digits)
{
    uint32_t value = 0;
    for (int i = 0; i < digits; i++) {
        char c = p->at < p->end ? *p->at : 'x';
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0)
            return (uint32_t)refuse(p, "an escape lacks hexadecimal digits");
        value = value * 16 + (uint32_t)digit;
        p->at++;
    }
    return value;
}

static uint32_t unicode_escape(struct parser *p)
{
    if (skip(p, '{')) {
        uint32_t value = 0;
        do
            value = value << 4 | hexadecimal(p, 1);
        while (!p->rc && value <= MAX_CODE_POINT && !next_is(p, '}'));
        if (value > MAX_CODE_POINT || !skip(p, '}'))
            refuse(p, "\\u{} names no character");
        return value;
    }
    uint32_t value = hexadecimal(p, 4);
    if (value >= 0xD800 && value < 0xDC00 && p->end - p->at >= 6 && p->at[0] == '\\' && p->at[1] == 'u') {
        p->at += 2;
        uint32_t low = hexadecimal(p, 4);
        if (low < 0xDC00 || low > 0xDFFF)
            refuse(p, "half a surrogate pair");
        value = 0x10000 + ((value - 0xD800) << 10) + (low & 0x3FF);
    }
    return value;
}

// What follows a backslash. *single: the set is this one character (and may begin a range in a class).
static void escape(struct parser *p, struct regex_set *set, bool in_class, uint32_t *character, bool *single)
{
    static const char names[] = "nrtfv", values[] = "\n\r\t\f\v";
    struct regex_set class = {0};
    *single = false;
    if (p->at == p->end) {
        refuse(p, "it ends in a backslash");
        return;
    }
    char c = *p->at++;
    const char *name = c ? strchr(names, c) : NULL;
    switch (c) {
    case 'd':
    case 'D':
        grammar_regex_add(&class, '0', '9');
        break;
    case 'w':
    case 'W':
        grammar_regex_add(&class, '0', '9');
        grammar_regex_add(&class, 'A', 'Z');
        grammar_regex_add(&class, '_', '_');
        grammar_regex_add(&class, 'a', 'z');
        break;
    case 's':
    case 'S':
        add_spaces(&class);
        break;
    default:
        *single = true;
        if (name)
            *character = (uint32_t)values[name - names];
        else if (c == 'b' && in_class)
            *character = '\b';
        else if (c == 'x')
            *character = hexadecimal(p, 2);
        else if (c == 'u')
            *character = unicode_escape(p);
        else if (c == '0' && !(p->at < p->end && *p->at >= '0' && *p->at <= '9'))
            *character = 0;
        else if ((c >= '0' && c <= '9') || c == 'k')
            refuse(p, "references are not supported");
        else if (c == 'b' || c == 'B')
            refuse(p, "\\b and \\B are not supported");
        else if (c == 'p' || c == 'P')
            refuse(p, "\\p is not supported");
        else if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'))
            refuse(p, "an unknown escape");
        else {
            p->at--;
            *character = next_character(p);
        }
    }
    if (c == 'D' || c == 'W' || c == 'S')
        grammar_regex_invert(&class);
    for (int i = 0; i < class.count; i++)
        grammar_regex_add(set, class.ranges[i].low, class.ranges[i].high);
    if (*single)
        grammar_regex_add(set, *character, *character);
}

static int parse_class(struct parser *p)
{
    struct regex_set set = {0};
    bool inverted = skip(p, '^');
    while (!p->rc && !next_is(p, ']')) {
        uint32_t low = 0, high = 0;
        bool single = true;
        if (p->at == p->end)
            return refuse(p, "a class has no end");
        if (skip(p, '\\')) {
            escape(p, &set, true, &low, &single);
        } else {
            low = next_character(p);
            grammar_regex_add(&set, low, low);
        }
        if (!next_is(p, '-') || p->end - p->at < 2 || p->at[1] == ']')
            continue;
        p->at++;
        struct regex_set end = {0};
        bool end_single = true;
        if (skip(p, '\\'))
            escape(p, &end, true, &high, &end_single);
        else
            high = next_character(p);
        if (!single || !end_single || high < low)
            return refuse(p, "a range of a class is out of order");
        grammar_regex_add(&set, low, high);
    }
    p->at++;
    if (inverted)
        grammar_regex_invert(&set);
    return set_item(p, &set);
}

static int parse_either(struct parser *p);

static int parse_group(struct parser *p)
{
    if (skip(p, '?')) {
        bool named = next_is(p, '<') && p->end - p->at > 1 && p->at[1] != '=' && p->at[1] != '!';
        if (named) {
            while (p->at < p->end && *p->at != '>')
                p->at++;
            p->at += p->at < p->end;
        } else if (!skip(p, ':')) {
            return refuse(p, "look-around and flags are not supported");
        }
    }
    if (++p->depth > MAX_GROUPS_DEEP)
        return refuse(p, "groups are nested too deeply");
    int group = parse_either(p);
    p->depth--;
    if (!skip(p, ')'))
        return refuse(p, "a group has no end");
    return group;
}

static int parse_atom(struct parser *p)
{
    struct regex_set set = {0};
    uint32_t character;
    bool single;
    char c = *p->at;
    if (c == '*' || c == '+' || c == '?' || c == '{')
        return refuse(p, "a quantifier follows nothing");
    if (c == '^' || c == '$')
        return refuse(p, "^ and $ are supported at the ends of the expression alone");
    if (skip(p, '('))
        return parse_group(p);
    if (skip(p, '['))
        return parse_class(p);
    if (skip(p, '.')) {
        grammar_regex_add(&set, '\n', '\n');
        grammar_regex_add(&set, '\r', '\r');
        grammar_regex_add(&set, 0x2028, 0x2029);
        grammar_regex_invert(&set);
    } else if (skip(p, '\\')) {
        escape(p, &set, false, &character, &single);
    } else {
        character = next_character(p);
        grammar_regex_add(&set, character, character);
    }
    return set_item(p, &set);
}

static int number(struct parser *p)
{
    int value = 0;
    if (p->at == p->end || *p->at < '0' || *p->at > '9')
        return refuse(p, "a quantifier lacks its number");
    while (p->at < p->end && *p->at >= '0' && *p->at <= '9') {
        value = value * 10 + (*p->at++ - '0');
        if (value > MAX_REPEAT)
            return refuse(p, "a quantifier is above 10000");
    }
    return value;
}

// The atom with its quantifier, if there is one.
static int parse_repeat(struct parser *p, int atom)
{
    int min = 1, max = 1;
    if (skip(p, '*')) {
        min = 0;
        max = UNLIMITED;
    } else if (skip(p, '+')) {
        max = UNLIMITED;
    } else if (skip(p, '?')) {
        min = 0;
    } else if (skip(p, '{')) {
        min = max = number(p);
        if (skip(p, ','))
            max = next_is(p, '}') ? UNLIMITED : number(p);
        if (!skip(p, '}') || (max != UNLIMITED && max < min))
            return refuse(p, "a quantifier is not {n}, {n,} or {n,m}");
    } else {
        return atom;
    }
    skip(p, '?');
    if (next_is(p, '+') || next_is(p, '*') || next_is(p, '?') || next_is(p, '{'))
        return refuse(p, "two quantifiers in a row");
    int repeat = new_item(p, ITEM_REPEAT);
    append(p, repeat, atom);
    if (repeat) {
        p->items[repeat].min = min;
        p->items[repeat].max = max;
    }
    return repeat;
}

static int anything(struct parser *p)
{
    struct regex_set set = {0};
    grammar_regex_add(&set, 0, MAX_CODE_POINT);
    int repeat = new_item(p, ITEM_REPEAT), item = set_item(p, &set);
    append(p, repeat, item);
    if (!p->rc)
        p->items[repeat].max = UNLIMITED;
    return repeat;
}

static int parse_sequence(struct parser *p)
{
    int sequence = new_item(p, ITEM_SEQUENCE);
    bool top = p->depth == 0, begins = top && skip(p, '^'), ends = false;
    if (top && !begins && p->extent == REGEX_SEARCH)
        append(p, sequence, anything(p));
    while (!p->rc && p->at < p->end && *p->at != '|' && *p->at != ')') {
        if (top && *p->at == '$' && (p->at + 1 == p->end || p->at[1] == '|')) {
            p->at++;
            ends = true;
            break;
        }
        int atom = parse_atom(p), repeat = parse_repeat(p, atom);
        append(p, sequence, repeat);
    }
    if (top && !ends && p->extent == REGEX_SEARCH)
        append(p, sequence, anything(p));
    return sequence;
}

static int parse_either(struct parser *p)
{
    int either = new_item(p, ITEM_EITHER);
    do {
        int sequence = parse_sequence(p);
        append(p, either, sequence);
    } while (!p->rc && skip(p, '|'));
    return either;
}

// ---- building ------------------------------------------------------------------------------------------------------

static uint32_t build(struct net *net, const struct parser *p, int index, enum regex_form form, uint32_t next);

// The body of a repeat once more, in front of `after`; with `next`, if it is a node, the body may also be left out. false: it made no
// difference, and no further time would. Empty bodies are repeated but once so, however deep they are nested.
static bool build_once_more(struct net *net, const struct parser *p, int body, enum regex_form form, uint32_t next,
                            uint32_t *after)
{
    uint32_t before = *after;
    *after = grammar_net_either(net, build(net, p, body, form, before), next);
    return *after != before && !net->failed;
}

static uint32_t build(struct net *net, const struct parser *p, int index, enum regex_form form, uint32_t next)
{
    const struct item *item = &p->items[index];
    uint32_t result = NET_NOTHING, after = next;
    if (net->failed || next == NET_NOTHING)
        return next;
    if (++net->regex_steps > NET_MAX_REGEX_STEPS) {
        grammar_net_fail(net, ERR_USAGE);
        return next;
    }
    switch (item->kind) {
    case ITEM_SET:
        return grammar_regex_build_set(net, item->set, form, next);
    case ITEM_SEQUENCE:
        for (int child = item->last; child; child = p->items[child].previous)
            next = build(net, p, child, form, next);
        return next;
    case ITEM_EITHER:
        for (int child = item->last; child; child = p->items[child].previous)
            result = grammar_net_either(net, build(net, p, child, form, next), result);
        return result;
    default:
        if (item->max == UNLIMITED) {
            after = grammar_net_later(net);
            uint32_t body = build(net, p, item->last, form, after);
            grammar_net_set(net, after, grammar_net_either(net, body, next));
        }
        for (int i = item->min; i < item->max; i++)
            if (!build_once_more(net, p, item->last, form, next, &after))
                break;
        for (int i = 0; i < item->min; i++)
            if (!build_once_more(net, p, item->last, form, NET_NOTHING, &after))
                break;
        return after;
    }
}

int grammar_regex_build(struct net *net, const char *expression, size_t bytes, enum regex_form form,
                        enum regex_extent extent, uint32_t next, uint32_t *out, struct error *err)
{
    struct parser p = {.text = expression, .at = expression, .end = expression + bytes, .extent = extent, .err = err};
    if (bytes > REGEX_MAX_BYTES)
        return error_set(err, ERR_USAGE, "it is longer than %d bytes", (int)REGEX_MAX_BYTES);
    p.count = 0;
    new_item(&p, ITEM_SEQUENCE); // 0 stands for none
    int root = parse_either(&p);
    if (!p.rc && p.at < p.end)
        refuse(&p, "a \")\" closes nothing");
    if (!p.rc)
        *out = build(net, &p, root, form, next);
    for (int i = 0; i < p.count; i++)
        free(p.items[i].set);
    free(p.items);
    return p.rc;
}
