// Bounds to digits, and digits to nodes. See grammar_number.h.
#include "engine/serve/grammar_number.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_DIGITS = 18 };

struct decimal { // a magnitude; the sign is apart
    bool negative;
    uint8_t whole[MAX_DIGITS], fraction[MAX_DIGITS + 1]; // digits; fraction is filled up with zeros
    int num_whole, num_fraction;
    bool exclusive;
};

// ---- bounds to digits ----------------------------------------------------------------------------------------------

static struct decimal of_integer(int64_t value, bool exclusive)
{
    struct decimal d = {.negative = value < 0, .exclusive = exclusive};
    char text[32];
    d.num_whole =
        snprintf(text, sizeof text, "%llu", value < 0 ? 0 - (unsigned long long)value : (unsigned long long)value);
    for (int i = 0; i < d.num_whole && i < MAX_DIGITS; i++)
        d.whole[i] = (uint8_t)(text[i] - '0');
    return d;
}

// The shortest decimal that reads back as this double. false: it has too many digits.
static bool of_real(double value, bool exclusive, struct decimal *out)
{
    char text[40];
    struct decimal d = {.negative = value < 0, .exclusive = exclusive};
    int precision = 0;
    if (!(fabs(value) < 1e15))
        return false;
    do
        snprintf(text, sizeof text, "%.*f", precision, fabs(value));
    while (strtod(text, NULL) != fabs(value) && ++precision < NUMBER_REAL_DIGITS);
    char *point = strchr(text, '.');
    d.num_whole = (int)(point ? (size_t)(point - text) : strlen(text));
    d.num_fraction = point ? (int)strlen(point + 1) : 0;
    if (precision == NUMBER_REAL_DIGITS || d.num_whole + d.num_fraction > NUMBER_REAL_DIGITS)
        return false;
    for (int i = 0; i < d.num_whole; i++)
        d.whole[i] = (uint8_t)(text[i] - '0');
    for (int i = 0; i < d.num_fraction; i++)
        d.fraction[i] = (uint8_t)(point[1 + i] - '0');
    *out = d;
    return true;
}

// ---- digits to nodes -----------------------------------------------------------------------------------------------

struct range { // of magnitudes
    struct decimal low, high;
    int max_digits;
    bool integers;
    uint32_t next;
    uint32_t free[MAX_DIGITS + 1]; // free[n]: up to n digits, then next
};

static uint32_t free_digits(struct net *net, struct range *r, int count)
{
    if (r->free[count] == NET_NOTHING) {
        uint32_t fewer = free_digits(net, r, count - 1), node = grammar_net_begin(net, NET_BYTES);
        grammar_net_edge(net, node, '0', '9', fewer);
        r->free[count] = grammar_net_either(net, node, r->next);
    }
    return r->free[count];
}

static bool zeros_from(const struct decimal *d, int at)
{
    for (; at < d->num_fraction; at++)
        if (d->fraction[at])
            return false;
    return true;
}

// One digit, of those that keep a number within the bounds. at_low, at_high: the digits so far equal those of the bound. after[l][h] is where
// a digit leads that leaves the number at the lower (l) and upper (h) bound.
static uint32_t digit(struct net *net, int first, bool at_low, int low, bool at_high, int high, uint32_t after[2][2])
{
    int begin = at_low && low > first ? low : first, end = at_high ? high : 9;
    uint32_t node = NET_NOTHING;
    for (int d = begin; d <= end; d++) {
        uint32_t target = after[at_low && d == low][at_high && d == high];
        if (target == NET_NOTHING)
            continue;
        if (node == NET_NOTHING)
            node = grammar_net_begin(net, NET_BYTES);
        grammar_net_edge(net, node, (uint8_t)('0' + d), (uint8_t)('0' + d), target);
    }
    return node;
}

// What may follow a whole part of num_whole digits: the end, or a fraction.
static void fractions(struct net *net, struct range *r, int num_whole, uint32_t out[2][2])
{
    int most = r->integers ? 0 : r->max_digits - num_whole;
    uint32_t after[2][2], point[2][2];
    memset(after, 0xff, sizeof after);
    memset(point, 0xff, sizeof point);
    for (int at = most; at >= 0; at--) {
        uint32_t here[2][2];
        for (int low = 0; low < 2; low++) {
            for (int high = 0; high < 2; high++) {
                bool may_end = (!low || (zeros_from(&r->low, at) && !r->low.exclusive)) &&
                               (!high || !zeros_from(&r->high, at) || !r->high.exclusive);
                uint32_t more = NET_NOTHING;
                if (!low && !high && at > 0) {
                    here[0][0] = free_digits(net, r, most - at);
                    continue;
                }
                if (at < most)
                    more = digit(net, 0, low, r->low.fraction[at], high, r->high.fraction[at], after);
                if (at == 0 && more != NET_NOTHING)
                    more = grammar_net_text(net, ".", 1, more);
                here[low][high] = grammar_net_either(net, more, may_end ? r->next : NET_NOTHING);
            }
        }
        memcpy(after, here, sizeof after);
    }
    memcpy(out, after, sizeof after);
}

static uint32_t magnitudes(struct net *net, struct range *r)
{
    uint32_t result = NET_NOTHING;
    for (int i = 0; i <= MAX_DIGITS; i++)
        r->free[i] = i ? NET_NOTHING : r->next;
    for (int length = r->low.num_whole; length <= r->high.num_whole; length++) {
        bool at_low = length == r->low.num_whole, at_high = length == r->high.num_whole;
        uint32_t after[2][2];
        fractions(net, r, length, after);
        for (int at = length - 1; at > 0; at--) {
            uint32_t here[2][2];
            for (int low = 0; low < 2; low++)
                for (int high = 0; high < 2; high++)
                    here[low][high] =
                        digit(net, 0, low && at_low, r->low.whole[at], high && at_high, r->high.whole[at], after);
            memcpy(after, here, sizeof after);
        }
        uint32_t all = digit(net, length > 1, at_low, r->low.whole[0], at_high, r->high.whole[0], after);
        result = grammar_net_either(net, all, result);
    }
    return result;
}

// a < b, as signed numbers.
static bool is_less(const struct decimal *a, const struct decimal *b)
{
    if (a->negative != b->negative)
        return a->negative;
    int order = a->num_whole - b->num_whole;
    if (!order)
        order = memcmp(a->whole, b->whole, (size_t)a->num_whole);
    if (!order)
        order = memcmp(a->fraction, b->fraction, sizeof a->fraction);
    return a->negative ? order > 0 : order < 0;
}

static uint32_t between(struct net *net, bool integers, struct decimal min, struct decimal max, uint32_t next)
{
    struct decimal zero = of_integer(0, false);
    struct range r = {
        .integers = integers, .max_digits = integers ? NUMBER_INTEGER_DIGITS : NUMBER_REAL_DIGITS, .next = next};
    uint32_t result = NET_NOTHING;
    if (!max.negative) {
        r.low = min.negative ? zero : min;
        r.high = max;
        result = magnitudes(net, &r);
    }
    if (min.negative) {
        zero.exclusive = true;
        r.low = max.negative ? max : zero;
        r.high = min;
        uint32_t below = magnitudes(net, &r);
        if (below != NET_NOTHING)
            result = grammar_net_either(net, result, grammar_net_text(net, "-", 1, below));
    }
    return result;
}

// ---- the two kinds -------------------------------------------------------------------------------------------------

// The bound as an integer that is allowed itself, within 18 digits. sign: 1 for a lower bound, -1 for an upper one.
static int64_t integer_bound(struct number_bound bound, int sign)
{
    const int64_t most = 999999999999999999;
    if (!bound.set)
        return -sign * most;
    if (!bound.is_integer) {
        double nearest = sign > 0 ? ceil(bound.real) : floor(bound.real);
        if (!(fabs(nearest) <= 9e17))
            return nearest > 0 ? most + (sign > 0) : -most - (sign < 0); // beyond: nothing, or no bound at all
        bound.exclusive = bound.exclusive && nearest == bound.real;
        bound.integer = (int64_t)nearest;
    }
    int64_t value = bound.integer < -most - 1 ? -most - 1 : bound.integer > most + 1 ? most + 1 : bound.integer;
    value += bound.exclusive ? sign : 0;
    return sign > 0 && value < -most ? -most : sign < 0 && value > most ? most : value;
}

static bool real_bound(struct number_bound bound, int sign, struct decimal *out)
{
    if (!bound.set) {
        *out = of_integer(-sign * 999999999999999, false);
        return true;
    }
    return of_real(bound.is_integer ? (double)bound.integer : bound.real, bound.exclusive, out);
}

int grammar_number_build(struct net *net, bool integers, struct number_bound min, struct number_bound max,
                         uint32_t next, uint32_t *out, struct error *err)
{
    struct decimal low, high;
    if (integers) {
        int64_t first = integer_bound(min, 1), last = integer_bound(max, -1);
        if (first > last)
            return error_set(err, ERR_USAGE, "no integer lies between the bounds");
        low = of_integer(first, false);
        high = of_integer(last, false);
    } else if (!real_bound(min, 1, &low) || !real_bound(max, -1, &high)) {
        return error_set(err, ERR_USAGE, "a bound has more than %d digits", (int)NUMBER_REAL_DIGITS);
    }
    uint32_t node = is_less(&high, &low) ? NET_NOTHING : between(net, integers, low, high, next);
    if (node == NET_NOTHING && !net->failed)
        return error_set(err, ERR_USAGE, "no number lies between the bounds");
    *out = node;
    return 0;
}
