"""Rows of the feature table: template snippets, one feature each, and the variables that they see. Imported by
make_goldens_templates.py, which asks Jinja2 for the results."""

VARIABLES = {
    "s": "Hello World", "empty": "", "spaces": "  a b \n", "u": "Zoë & \"Straße\" 中文 🙂", "n": 3, "big": 9007199254740993,
    "zero": 0, "f": 1.5, "e": 1e22, "small": 1e-7, "whole": 2.0, "t": True, "no": False, "nil": None, "l": [3, 1, 2],
    "words": ["b", "A", "c"], "nested": [[1, 2], [3], []], "d": {"b": 1, "a": "x", "C": None},
    "m": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "n": 2}, {"role": "user", "content": ""}],
    "tool": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string", "enum": ["a", "b"]}},
                                        "required": ["x"]}, "strict": False, "score": 0.5, "nothing": None},
    "html": "<a href='x'>&</a>", "lines": "one\ntwo\n\nthree", "quote": "it's", "both": "a'b\"c", "ctrl": "a\tb\x01\\ \x7f",
    "csv": "a,b,,c", "path": "x.y.z", "num": "42", "bad": "4x", "items": [("a", 1)] and [["a", 1], ["b", 2]],
}

ROWS = r"""
{{ s }}
{{ s }}{{ n }}{{ f }}{{ t }}{{ nil }}{{ missing }}{{ empty }}
{{ e }} {{ small }} {{ whole }} {{ big }} {{ 1e16 }} {{ 1e15 }} {{ 0.0001 }} {{ 0.00001 }} {{ 123456789012345678.0 }} {{ 1.0e5 }} {{ 5e-324 }} {{ 0.1 + 0.2 }}
{{ l }} {{ words }} {{ d }} {{ nested }} {{ (1,) }} {{ (1, "a") }} {{ () }} {{ [] }} {{ {} }}
{{ [u] }} {{ [quote] }} {{ [both] }} {{ [ctrl] }} {{ ["\u200b\u00a0\xe9\U0001F642"] }}
{{ 1, 2 }}
{{ 'a' "b" 'c' }}
{{ "\n\t\\\'\"\x41\u00e9\101\q" }}
{{ 0x1F }} {{ 0b101 }} {{ 0o17 }} {{ 1_000 }} {{ 1_0.5_0 }}
{{ true }} {{ True }} {{ false }} {{ none }} {{ None }}
{{ n + 2 }} {{ n - 5 }} {{ n * 2 }} {{ n / 2 }} {{ n // 2 }} {{ n % 2 }} {{ n ** 2 }} {{ -n }} {{ +n }}
{{ -7 // 2 }} {{ -7 % 3 }} {{ 7 % -3 }} {{ -7 // -2 }} {{ 7.5 // 2 }} {{ -7.5 % 2 }} {{ 7 // 2.0 }} {{ 6 / 3 }}
{{ 2 ** 10 }} {{ 2 ** -1 }} {{ 2.0 ** 3 }} {{ 2 ** 0.5 }} {{ -2 ** 2 }} {{ 2 ** 3 ** 2 }}
{{ t + 1 }} {{ t * 3 }} {{ no + no }} {{ -t }}
{{ 1 / 0 }}
{{ 1 // 0 }}
{{ 1 % 0 }}
{{ s + 1 }}
{{ 1 + s }}
{{ s - s }}
{{ nil + 1 }}
{{ missing + 1 }}
{{ missing.x }}
{{ missing['x'] }}
{{ missing() }}
{{ missing < 1 }}
{{ missing == missing }} {{ missing != 1 }} {{ missing == none }} {{ missing is defined }} {{ not missing }} {{ missing or 'd' }} {{ missing and 1 }}
{{ missing ~ 'x' }}{{ missing|length }}{{ missing|list }}{{ missing|upper }}{{ missing|trim }}{{ missing|string }}
{% for x in missing %}{{ x }}{% else %}none{% endfor %}
{{ missing in l }} {{ 1 in missing }}
{{ s in missing }}
{{ [missing] }}
{{ missing|tojson }}
{{ missing|int }}
{{ d.missing }}|{{ d['missing'] }}|{{ d.missing is defined }}
{{ d.missing.more }}
{{ d.missing + 'x' }}
{{ nil.x }}|{{ n.x }}|{{ s.x }}|{{ l.x }}
{{ l[9] }}|{{ l[-4] }}|{{ s[100] }}|{{ nil[0] }}|{{ n[0] }}
{{ l[0] }}{{ l[-1] }}{{ s[0] }}{{ s[-1] }}{{ u[2] }}{{ u[-1] }}{{ l['0'] }}{{ l[true] }}
{{ l.0 }} {{ nested.0.1 }} {{ m.0.role }}
{{ s[1:3] }} {{ s[:-1] }} {{ s[::2] }} {{ s[::-1] }} {{ u[::-1] }} {{ s[5:1] }} {{ s[5:1:-1] }} {{ s[-3:] }} {{ s[:100] }} {{ s[100:] }}
{{ l[1:] }} {{ l[::-1] }} {{ l[:0] }} {{ (1,2,3)[1:] }} {{ l[-2:] }} {{ l[::2] }} {{ range(10)[2:8:3] }}
{{ l[::0] }}
{{ l['a':] }}|{{ d[1:] }}|{{ nil[1:] }}
{{ m[0].role }} {{ m[0]['role'] }} {{ m[0]["role"] ~ m[1].n }} {{ m[-1].content }} {{ m[1:][0].role }}
{{ d.items() }} {{ d.keys() }} {{ d.values() }} {{ d.items()|list }} {{ d|items|list }} {{ d|list }} {{ d|length }}
{{ d.get('a') }} {{ d.get('zz') }} {{ d.get('zz', 5) }} {{ d.get('C', 1) }}
{{ d['items'] is callable }} {{ d.items is callable }} {{ d.get is defined }} {{ d.keys()|length }}
{{ d.pop('a') }}
{{ l.append(4) }}
{{ d.update({}) }}
{{ l.append is defined }} {{ d.pop }}|
{% set _ = l.append(1) %}
{{ s.__class__ }}|{{ l.__len__ }}|{{ d.__class__.__mro__ }}
{{ s.__class__ }}|{{ s['__class__'] }}|{{ d.__init__ }}|{{ n.__add__ }}|
{{ ''.__class__.__mro__ }}
{{ l.count(3) }} {{ l.index(1) }} {{ (1,1).count(1) }}
{{ l.index(99) }}
{{ 1 == 1.0 }} {{ 1 == true }} {{ '1' == 1 }} {{ l == [3,1,2] }} {{ l == (3,1,2) }} {{ d == {"a":"x","b":1,"C":none} }} {{ none == false }}
{{ 1 < 2 < 3 }} {{ 1 < 2 > 3 }} {{ 3 > 2 > 1 }} {{ 1 == 1 != 2 }} {{ 'a' < 'b' }} {{ 'B' < 'a' }} {{ [1,2] < [1,3] }} {{ 'é' > 'z' }}
{{ 1 < 'a' }}
{{ none < 1 }}
{{ 1 in l }} {{ 9 in l }} {{ 'a' in d }} {{ 'ell' in s }} {{ '' in s }} {{ 1 not in l }} {{ not 1 in l }} {{ 'x' in 'xyz' in ['xyz'] }} {{ 1 in d.values() }}
{{ 1 in s }}
{{ 1 in n }}
{{ [] in d }}
{{ t and no }} {{ t or no }} {{ no or '' or 'x' }} {{ n and s }} {{ not t }} {{ not l }} {{ no and missing.x }}
{{ 'a' if t else 'b' }} {{ 'a' if no else 'b' }} {{ 'a' if no }}| {{ 'a' if no else 'b' if no else 'c' }} {{ ('a' if no) is defined }}
{{ s ~ n ~ nil ~ l ~ t }} {{ 1 ~ 2 }}
{{ 1 + 2 ~ 3 }} {{ 2 * 3 ~ 4 }} {{ 'a' ~ 1 + 2 }}
{{ s * 2 }} {{ 2 * s }} {{ '-' * 0 }}{{ '-' * -1 }} {{ [0] * 3 }} {{ (1,) * 2 }}
{{ l + [4] }} {{ (1,) + (2,) }}
{{ l + (1,) }}
{{ not t == no }} {{ (not t) == no }} {{ -1 is number }} {{ -1|abs }} {{ 1 + 1|string|length }}
{{ '%s-%d' % ('a', 3) }} {{ '%s' % s }} {{ '%5.2f|%-5s|%05d|%x' % (3.14159, 'ab', 42, 255) }} {{ '100%%' % () }} {{ '%(a)s' % {'a': 1} }} {{ '%r' % 'x' }} {{ '%+d' % 5 }} {{ '%e' % 12345.678 }} {{ '%g' % 0.0001 }}
{{ '%s %s' % 'a' }}
{{ '%s' % ('a', 'b') }}
{{ '%d' % 'a' }}
{{ '%s' % l }} {{ '%s' % [l] }} {{ '%s' % nil }} {{ '%s' % (l,) }}
{{ '{} {}'.format('a', 1) }} {{ '{1} {0}'.format('a', 'b') }} {{ '{x}'.format(x=2) }} {{ '{0[a]} {0.b}'.format(d) }} {{ '{:>5}|{:<5}|{:^5}|{:05d}|{:.2f}|{:,}|{:x}|{:+}'.format('a','b','c',42,3.14159,1234567,255,3) }} {{ '{{}}'.format() }} {{ '{!r}'.format('a') }} {{ '{:*^9}'.format(u[:3]) }} {{ '{:.1%}'.format(0.256) }} {{ '{:{}}|'.format('a', 4) }}
{{ '{}'.format() }}
{{ '{x}'.format() }}
{{ '{0.__class__}'.format(s) }}
{{ s.upper() }} {{ s.lower() }} {{ s.title() }} {{ s.swapcase() }} {{ 'hELLO wORLD'.capitalize() }} {{ u.upper() }} {{ u.lower() }} {{ "they're bill's 3rd-ary".title() }}
{{ 'ΑΣ ΑΣΑ Σ'.lower() }} {{ 'ﬁ ß ŉ ǆ'.upper() }} {{ 'ﬁ ß ŉ ǆ'.title() }} {{ 'İ'.lower()|length }}
{{ spaces.strip() }}|{{ spaces.lstrip() }}|{{ spaces.rstrip() }}|{{ 'xxaxx'.strip('x') }}|{{ 'abcba'.lstrip('ab') }}|{{ 'abcba'.rstrip('ab') }}|{{ ' x '.strip(none) }}|{{ '\u3000x\u00a0'.strip() }}|
{{ csv.split(',') }} {{ csv.split(',', 1) }} {{ csv.split(',', 0) }} {{ spaces.split() }} {{ ' a  b c '.split(none, 1) }} {{ csv.rsplit(',', 1) }} {{ ' a  b c '.rsplit(none, 1) }} {{ ''.split() }} {{ ''.split(',') }} {{ 'aXXb'.split('XX') }} {{ 'a b'.split(maxsplit=1) }}
{{ s.split('') }}
{{ '<think>a</think>b'.split('</think>')[-1] }} {{ '<think>a</think>b'.split('</think>')[0].split('<think>')[-1].strip('\n') }}
{{ lines.splitlines() }} {{ 'a\r\nb\rc\n'.splitlines() }} {{ 'a\nb'.splitlines(true) }}
{{ s.startswith('He') }} {{ s.startswith(('x', 'H')) }} {{ s.endswith('ld') }} {{ s.endswith(('a', 'b')) }} {{ s.startswith('') }} {{ s.startswith('W', 6) }} {{ s.endswith('o', 0, 5) }} {{ ''.startswith('') }}
{{ s.startswith(1) }}
{{ s.replace('l', 'L') }} {{ s.replace('l', 'L', 1) }} {{ s.replace('', '-') }} {{ s.replace('zz', '') }} {{ s.replace('o', '') }} {{ 'aaa'.replace('aa', 'b') }} {{ s.replace('', '-', 2) }}
{{ ', '.join(words) }} {{ ''.join([]) }} {{ '-'.join('abc') }} {{ ','.join(d) }}
{{ ','.join(l) }}
{{ s.find('o') }} {{ s.rfind('o') }} {{ s.find('zz') }} {{ s.index('W') }} {{ u.find('中') }} {{ s.find('o', 5) }} {{ s.find('', 20) }} {{ s.find('l', -3) }}
{{ s.index('zz') }}
{{ s.count('l') }} {{ s.count('') }} {{ 'aaaa'.count('aa') }} {{ s.count('o', 5) }}
{{ '12'.isdigit() }} {{ '1a'.isdigit() }} {{ ''.isdigit() }} {{ 'ab'.isalpha() }} {{ 'a1'.isalnum() }} {{ ' \t'.isspace() }} {{ 'AB1'.isupper() }} {{ 'ab1'.islower() }} {{ '12'.isnumeric() }} {{ '²'.isdigit() }} {{ '²'.isdecimal() }} {{ 'Ab Cd'.istitle() }} {{ 'é'.isascii() }} {{ '½'.isnumeric() }}
{{ 'a-b-c'.partition('-') }} {{ 'a-b-c'.rpartition('-') }} {{ 'abc'.partition('-') }} {{ 'abc'.rpartition('-') }}
{{ 'abc'.removeprefix('a') }} {{ 'abc'.removesuffix('c') }} {{ 'abc'.removeprefix('x') }} {{ '7'.zfill(3) }} {{ '-7'.zfill(3) }} {{ 'a'.ljust(3) }}| {{ 'a'.rjust(3, '*') }} {{ 'ab'.center(5) }}| {{ 'ab'.center(7, '-') }} {{ 'abc'.center(6, '.') }}
{{ s|upper }} {{ s|lower }} {{ 'hello wORLD'|capitalize }} {{ "a-b (c) d{e it's"|title }} {{ n|upper }} {{ spaces|trim }}| {{ 'xax'|trim('x') }} {{ s|length }} {{ u|length }} {{ l|length }} {{ d|count }}
{{ n|length }}
{{ nil|length }}
{{ l|first }} {{ l|last }} {{ s|first }} {{ s|last }} {{ []|first }}| {{ d|first }} {{ ''|last }}|
{{ nil|first }}
{{ l|join }} {{ l|join(', ') }} {{ m|join(',', attribute='role') }} {{ ''|join }} {{ words|join(d='-') }} {{ s|join('.') }} {{ [none, true, 1.0, [1]]|join('|') }}
{{ missing|default('x') }} {{ nil|default('x') }} {{ nil|default('x', true) }} {{ ''|default('y', boolean=true) }} {{ missing|d }}| {{ d.q|default({})|length }} {{ missing|default }}|
{{ l|sort }} {{ words|sort }} {{ words|sort(case_sensitive=true) }} {{ l|sort(reverse=true) }} {{ m|sort(attribute='content')|map(attribute='content')|list }} {{ m|sort(attribute='role,content')|map(attribute='content')|list }} {{ 'bca'|sort }}
{{ [1, 'a']|sort }}
{{ d|dictsort }} {{ {'b':2,'a':3}|dictsort(by='value') }} {{ {'b':2,'A':3}|dictsort(true) }} {{ {'b':2,'a':3}|dictsort(reverse=true) }}
{{ d|dictsort(by='value') }}
{{ l|unique|list }} {{ ['a','A','b']|unique|list }} {{ ['a','A']|unique(true)|list }} {{ m|unique(attribute='role')|map(attribute='content')|list }}
{{ l|min }} {{ l|max }} {{ words|min }} {{ words|max }} {{ []|min }}| {{ m|max(attribute='content') }} {{ l|sum }} {{ m|sum(attribute='zz', start=0)|string if no }} {{ nested|sum(start=[]) }}
{{ l|reverse|list }} {{ s|reverse }} {{ (1,2)|reverse|list }} {{ l|list }} {{ s|list }} {{ d|list }}
{{ m|map(attribute='role')|list }} {{ words|map('upper')|list }} {{ m|map(attribute='n', default=0)|list }} {{ nested|map('length')|list }} {{ nested|map(attribute=0)|list }} {{ words|map('replace', 'b', 'x')|join }} {{ m|map(attribute='n')|list|length }} {{ nested|map('join', '-')|list }}
{{ m|map()|list }}
{{ l|map('nope')|list }}
{{ m|selectattr('role', 'equalto', 'user')|list|length }} {{ m|selectattr('n')|map(attribute='n')|list }} {{ m|selectattr('n', 'defined')|list|length }} {{ m|rejectattr('role', '==', 'user')|map(attribute='content')|list }} {{ l|select('gt', 1)|list }} {{ l|select('odd')|list }} {{ l|reject('odd')|list }} {{ [0,1,'']|select|list }} {{ [0,1,'']|reject|list }} {{ m|selectattr('role', 'in', ['assistant'])|list|length }}
{{ (m|selectattr('role', 'equalto', 'zz')) is iterable }} {{ 'yes' if m|selectattr('role', 'equalto', 'zz') else 'no' }} {{ (m|map(attribute='role')) is sequence }} {{ (m|selectattr('role','equalto','user')|first).content }}
{{ (m|map(attribute='role'))|length }}
{% set x = m|map(attribute='role') %}{{ x|join(',') }}|{{ x|join(',') }}|{% for y in x %}{{ y }}{% endfor %}
{{ (m|map(attribute='role'))[0] }}|{{ m|map(attribute='role')|last }}
{{ l|select('nope')|list }}
{{ '42'|int }} {{ num|int + 1 }} {{ bad|int }} {{ bad|int(7) }} {{ f|int }} {{ '3.7'|int }} {{ 'ff'|int(0, 16) }} {{ '0x1F'|int(base=16) }} {{ t|int }} {{ nil|int }} {{ ' 5 '|int }} {{ '1_0'|int }} {{ '1e3'|int }} {{ '-'|int(9) }}
{{ '1.5'|float }} {{ 3|float }} {{ 'x'|float }} {{ 'x'|float(2.5) }} {{ '1e3'|float }} {{ 'inf'|float }} {{ 'nan'|float }} {{ nil|float }}
{{ -3|abs }} {{ (-3)|abs }} {{ (-1.5)|abs }} {{ 2.567|round(2) }} {{ 2.5|round }} {{ 3.5|round }} {{ 2.1|round(method='ceil') }} {{ 2.9|round(0, 'floor') }} {{ 7|round }} {{ 0.125|round(2) }} {{ 1234.5|round(-2) }}
{{ n|string ~ 1 }} {{ nil|string }} {{ l|string }} {{ d|string }} {{ f|string + 'x' }} {{ t|string }}
{{ lines|indent }}
{{ lines|indent(2, true) }}
{{ lines|indent(2, blank=true) }}
{{ lines|indent('> ', first=true) }}|{{ ''|indent }}|{{ 'a\n'|indent }}|{{ 'a'|indent(first=true) }}|
{{ s|replace('o', '0') }} {{ s|replace('o', '0', 1) }} {{ n|replace('3', 'x') }}
{{ s|truncate(5) }} {{ s|truncate(8, true) }} {{ s|truncate(9, false, '…', 0) }} {{ s|truncate }}
{{ s|wordcount }} {{ '%s=%s'|format('a', 1) }} {{ '%(x)s'|format(x=1) }} {{ s|center(15) }}| {{ l|batch(2)|list }} {{ l|batch(2, 'x')|list }}
{{ html|e }} {{ html|escape }} {{ html|safe }} {{ html|e|e }} {{ (html|safe) + '<' }} {{ (html|e) ~ '<' }} {{ '<' + (html|safe)|trim }}
{{ d|attr('a') }}|{{ d|attr('items') is defined }}|{{ s|attr('upper')() }}
{{ tool|tojson }}
{{ tool|tojson(indent=2) }}
{{ tool|tojson(indent=4, sort_keys=true) }}
{{ tool|tojson(separators=(',', ':')) }}
{{ [u, html, ctrl, both]|tojson }}
{{ [u, '\x7f']|tojson(ensure_ascii=true) }}
{{ [1, 1.0, 1e22, true, none, [], {}, (1, 2)]|tojson }} {{ {}|tojson(indent=2) }} {{ []|tojson(indent=2) }} {{ [[]]|tojson(indent=1) }} {{ [1]|tojson(indent=0) }} {{ [1]|tojson(indent='--') }}
{{ {1: 2, none: 3, true: 4, 1.5: 5}|tojson }} {{ s|tojson }} {{ n|tojson }} {{ 'inf'|float|tojson }} {{ 'nan'|float|tojson }}
{{ d.items()|tojson }}
{{ (l|map('string'))|tojson }}
{{ namespace(a=1)|tojson }}
{{ {(1,2): 3}|tojson }}
{{ {[]: 1} }}
{{ {'a': 1, 'a': 2} }} {{ {1: 'a', 1.0: 'b', true: 'c'} }} {{ {'x': [1, {'y': none}]} }} {{ {'a': 1,} }} {{ [1, 2,] }}
{{ s is string }} {{ n is number }} {{ t is number }} {{ f is float }} {{ n is integer }} {{ t is integer }} {{ t is boolean }} {{ d is mapping }} {{ l is sequence }} {{ d is sequence }} {{ s is sequence }} {{ n is sequence }} {{ l is iterable }} {{ n is iterable }} {{ s is iterable }} {{ nil is none }} {{ t is true }} {{ n is true }} {{ no is false }} {{ zero is false }} {{ missing is undefined }} {{ s is not none }} {{ s is not string }}
{{ 4 is divisibleby 2 }} {{ 4 is divisibleby(3) }} {{ 3 is odd }} {{ 4 is even }} {{ 1 is eq 1 }} {{ 1 is equalto 2 }} {{ 1 is ne 2 }} {{ 1 is lt 2 }} {{ 2 is ge(2) }} {{ 1 is in l }} {{ 'a' is in(d) }} {{ none is sameas none }} {{ 'abc' is lower }} {{ 'ABC' is upper }} {{ 'upper' is filter }} {{ 'nope' is filter }} {{ 'odd' is test }} {{ range is callable }} {{ s is escaped }} {{ missing is callable }} {{ missing is sequence }} {{ missing is iterable }} {{ missing is string }} {{ missing is none }} {{ missing is mapping }}
{{ s is nope }}
{{ s|nope }}
{{ 1 is string is number }}
{% if s is defined and s is string and not (n is string) %}ok{% endif %}
{% if no %}a{% elif zero %}b{% elif n %}c{% else %}d{% endif %}
{% if no %}a{% endif %}|{% if l %}b{% endif %}{% if not d %}c{% else %}e{% endif %}
{% for x in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.depth }};{% endfor %}
{% for x in l if x > 1 %}{{ x }}{{ loop.index }}{{ loop.last }}{{ loop.length }};{% endfor %}
{% for x in l if x > 9 %}{{ x }}{% else %}none{% endfor %}
{% for x in [] %}{% else %}empty{% endfor %}
{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}{% for k in d %}{{ k }}{% endfor %}{% for c in 'añ' %}[{{ c }}]{% endfor %}
{% for a, b in items %}{{ a }}{{ b }}{% endfor %}{% for (a, b) in items %}{{ a }}{% endfor %}{% for k, (a, b) in [[1, [2, 3]]] %}{{ k }}{{ a }}{{ b }}{% endfor %}
{% for a, b in l %}{{ a }}{% endfor %}
{% for a, b in nested %}{{ a }}{% endfor %}
{% for x in nil %}{% endfor %}
{% for x in n %}{% endfor %}
{% for x in range(3) %}{{ x }}{% endfor %}{% for x in range(1, 6, 2) %}{{ x }}{% endfor %}{% for x in range(3, 0, -1) %}{{ x }}{% endfor %}{{ range(3) }}{{ range(1, 5, 2) }}{{ range(4)|list }}{{ range(5)|length }}
{{ range(200000) }}
{{ range(0) }}{{ range(1, 2, 0) }}
{% for x in l %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% endfor %}{% for x in l %}{% if x == 1 %}{% break %}{% endif %}{{ x }}{% endfor %}
{% for x in l %}{% for y in 'ab' %}{{ loop.index }}{{ loop.depth }}{% if y == 'a' %}{% continue %}{% endif %}{% endfor %}{{ loop.index }}|{% endfor %}
{% for x in l %}{{ loop.cycle('a', 'b') }}{{ loop.changed(x > 1) }}{% endfor %}
{% for x in l %}{{ loop['index'] }}{{ loop.nope is defined }}{{ loop|length }}{% endfor %}
{{ loop is defined }}{% for x in l %}{% set loop_x = loop %}{% endfor %}{{ loop_x is defined }}
{% for x in l if loop.first %}{% endfor %}
{% set x = 1 %}{% for y in l %}{{ x }}{% set x = y %}{{ x }};{% endfor %}{{ x }}
{% set ns = namespace(x=1) %}{% for y in l %}{% set ns.x = ns.x + y %}{% endfor %}{{ ns.x }}{{ ns.missing }}{{ ns.missing is defined }}{{ ns }}
{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a }}{{ ns.b }}{{ ns['a'] }}{% set ns.c = [1] %}{{ ns.c }}{{ namespace() is mapping }}
{% set s.x = 1 %}
{% set d.x = 1 %}
{% set missing.x = 1 %}
{% set ns = namespace(_x=1) %}
{% set ns = namespace() %}{% set ns._y = 1 %}
{% set ns = namespace(found=false) %}{% for x in l if not ns.found %}{{ x }}{% set ns.found = true %}{% endfor %}
{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set (a, b) = (b, a) %}{{ a }}{{ b }}{% set c = 1, 2 %}{{ c }}
{% set a, b = l %}
{% set x %}a{{ n }}b{% endset %}[{{ x }}]{{ x is string }}
{% set x | upper | trim %} abc {% endset %}[{{ x }}]
{% set x %}{% set inner = 1 %}{% endset %}{{ inner is defined }}
{% filter upper %}ab{{ s }}{% endfilter %}{% filter replace('a', 'b')|upper %}aa{% endfilter %}
{% with a = 1, b = 2 %}{{ a }}{{ b }}{% set z = 3 %}{% endwith %}{{ a is defined }}{{ z is defined }}
{% if t %}{% set y = 5 %}{% endif %}{{ y }}
{% generation %}hi {{ s }}{% set q = 1 %}{% endgeneration %}{{ q is defined }}
{% macro f(a, b=2, c='x') %}[{{ a }},{{ b }},{{ c }}]{% endmacro %}{{ f(1) }}{{ f(1, 3) }}{{ f(a=5, c=6) }}{{ f() }}{{ f(1, c=none) }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, 2) }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(b=2) }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, a=2) }}
{% macro f(a, b=a ~ '!') %}{{ a }}{{ b }}{% endmacro %}{{ f('x') }}{{ f('x')|upper }}{{ f('x') + 'y' }}{{ f is callable }}{{ f(1)|length }}
{% macro f() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, x=3) }}{{ f() }}
{% macro f(n) %}{% if n > 0 %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(5) }}
{% macro f() %}{{ x }}{% endmacro %}{% set x = 1 %}{{ f() }}{% set x = 2 %}{{ f() }}
{% macro f() %}{{ y }}{% endmacro %}{% for y in l %}{{ f() }}{% endfor %}|
{% macro f() %}{% set x = 9 %}{{ x }}{% endmacro %}{% set x = 1 %}{{ f() }}{{ x }}
{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}B{% endmacro %}{{ a() }}
{% macro f(l) %}{% for x in l %}{{ loop.index }}{{ x }}{% if not loop.last %},{% endif %}{% endfor %}{% endmacro %}{% for y in [[1,2],[3]] %}{{ f(y) }}{{ loop.index }};{% endfor %}
{{ f() }}{% macro f() %}x{% endmacro %}
{{ raise_exception('bad ' ~ s) }}
{% if t %}{{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}{% endif %}
{{ 'ok' if t else raise_exception('no') }}
{{ dict(a=1, b=2) }} {{ dict() }} {{ dict({'x': 1}, y=2) }} {{ dict([['a', 1]]) }}
{{ f.bar }} {{ f.real is defined }}
{{ s() }}
{{ n.x() }}
{{ (1 if t else 2) + 3 }} {{ (l)[0] }} {{ (s).upper() }} {{ ('a','b')[1] }} {{ [1,2][0] }} {{ {'a': 1}.a }} {{ {'a': {'b': 2}}['a']['b'] }} {{ 'x'.join(['a','b']).upper() }}
{{ range(*[1, 4])|list }} {{ dict(**{'a': 1}) }} {% macro g(a, b) %}{{ a }}{{ b }}{% endmacro %}{{ g(*[1, 2]) }}{{ g(**{'b': 1, 'a': 2}) }}{{ g(1, *[2]) }}
{{ strftime_now('') }}|
{{ strftime_now('%%') }}
{{ '{{' }} {{ '%}' }} {{ "}}" }} {{ {'a': {'b': 1}} }}
{{ '<|im_start|>' + m[0]['role'] + '\n' + m[0]['content'] + '<|im_end|>' + '\n' }}
{%- for message in m %}{{- '<|' ~ message.role ~ '|>' }}{% if message.content %}{{ message.content | trim }}{% endif %}{{ '\n' if not loop.last else '' }}{%- endfor %}
{% for message in m[::-1] %}{% set index = (m|length - 1) - loop.index0 %}{{ index }}{{ message.role }}{% endfor %}
{% for message in m %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}{{ loop.index0 }}{% endfor %}
{{ m[0].tool_calls is defined and m[0].tool_calls }} {{ m[0].tool_calls is not none }} {{ m[0].content is string }} {{ not m[0].tool_calls }}
{% set content = m[0].content if m[0].content is string else m[0].content[0].text %}{{ content }}
{%- set loop_messages = m[1:] if m[0].role == 'system' else m -%}{{ loop_messages|length }}
{% if 'role' in m[0] and m[0]['role'] in ['user', 'system'] %}in{% endif %}{% if m[-1].role != 'assistant' %}gen{% endif %}
{{ tool.parameters.properties|items|list }} {% for k, v in tool.parameters.properties|items %}{{ k }}:{{ v.type }}{% if 'enum' in v %}{{ v.enum|join('|') }}{% endif %}{% endfor %}
{{ tool.parameters.required }} {{ tool.parameters.properties.keys()|list }} {{ tool['parameters']['properties']['x']['type'] }} {{ tool.name }}
{% nope %}
{% if t %}
{% endif %}
{% for %}
{% set %}
{{ }}
{{ 1 + }}
{{ (1 }}
{{ 'abc }}
{{ a b }}
{{ 1 if }}
{% if t %}{% endfor %}
{# open
{{ ] }}
{% set 1 = 2 %}
{% for x of l %}{% endfor %}
{{ f(a=1, 2) }}
{{ l. }}
{{ $ }}
{{ s|upper|nope }}
{% macro f(a=1, b) %}{% endmacro %}
{% set x = 'a' %}{% set x = x ~ 'b' %}{% set x = x + 'c' %}{{ x }}
{{ [1, [2, [3]]]|string }} {{ (l|list)[0] }} {{ {'a': l, 'b': d} }}
{{ l is sameas l }} {{ [] is sameas [] }} {{ true is sameas 1 }}
{{ 'a' 'b' ~ 'c' }} {{ not not t }} {{ - - 3 }} {{ 1 - -1 }} {{ 2 --1 }}
{{ d.a.upper() }} {{ d['a']|upper }} {{ d["b"] + 1 }} {{ d.C is none }} {{ d.b.c is defined }}
{{ 'abc'[1:][0] }} {{ 'abc'[::-1][0] }} {{ u[0:3] }} {{ u[-1:] }} {{ u|last }} {{ u|list|last }}
{{ s[:5] + '...' if s|length > 5 else s }} {{ (s|length > 5) }} {{ s|length == 11 and n == 3 }}
{{ (l|length)|string + 'x' }} {{ l|length * 2 }} {{ l|first + 1 }} {{ -l|first }}
{{ l|map('string')|join(', ') }} {{ l|map('string')|map('length')|sum }} {{ words|map('lower')|sort|join }}
{{ [['a', 1], ['b', 2]]|map('first')|list }} {{ [{'a': {'b': 1}}]|map(attribute='a.b')|list }} {{ [{'a': [5]}]|map(attribute='a.0')|list }}
{{ '%s' % missing }}| {{ '{}'.format(missing) }}| {{ [1]|join(missing) }} {{ missing|replace('a', 'b') }}|
{{ 1 is divisibleby 0 }}
{{ 'x' * 3 ~ '-' * 2 }} {{ 'ab' < 'abc' }} {{ '' < 'a' }} {{ 1.5 > 1 }} {{ true > false }} {{ (1, 2) < (1, 2, 0) }}
{{ 10 // 3 * 3 + 10 % 3 }} {{ 2 + 3 * 4 ** 2 / 8 }} {{ (2 + 3) * 4 }} {{ 7 // 2 ** 2 }} {{ 1 - 2 - 3 }} {{ 100 / 10 / 2 }}
{{ x if x is defined else 'undefined' }} {{ (missing or {}).get('a', 'z') }} {{ (missing|default({})).a is defined }}
{%- for k, v in {'a': 1, 'b': [2]}.items() -%} {{ k }}: {{ v|tojson }} {%- if not loop.last %}, {% endif -%} {%- endfor %}
{% for x in l recursive %}{{ x }}{% endfor %}
{% include 'x' %}
{% block a %}{% endblock %}
{{ self }}
{% for x in l|sort|reverse %}{{ x }}{% if not loop.last %}>{% endif %}{% endfor %}
{% for x in d|dictsort %}{{ x[0] }}{{ x.1 }}{% endfor %}{% for k, v in d|dictsort if v %}{{ k }}{% endfor %}
{% set t2 = (1, 2, 3) %}{{ t2[0] }} {{ t2|length }} {{ 2 in t2 }} {{ t2|list }} {{ t2 + (4,) }}
{{ lines.split('\n')|map('trim')|select|join(' ') }} {{ lines|replace('\n', '\\n') }}
{{ 'a\nb'|indent(2) }}|{{ 'a\r\nb'|indent(2) }}|
{{ '日本語'|upper }}{{ '日本語'[1] }}{{ '日本語'|length }}{{ '日本語'|reverse }}{{ '日本語'.center(7, '＊') }}
{{ 'é'|tojson }}{{ 'é'|tojson(ensure_ascii=True) }}{{ '🙂'|tojson(ensure_ascii=True) }}{{ '\u2028</script>'|tojson }}
{{ 1.0 }} {{ 1.10 }} {{ 100.0 }} {{ 1e100 }} {{ 1.5e-10 }} {{ 3.0 * 2 }} {{ 7 / 2 }} {{ 1e300 * 10 }} {{ 1e308 * 10 }} {{ -0.0 }}
{{ n == 3.0 }} {{ big + 0 == 9007199254740993 }} {{ big == 9007199254740992.0 }} {{ big > 9007199254740992.0 }}
""".strip("\n")

ROWS = ROWS.split("\n") + [
    "{% macro f(x) -%}\n  {{ x }}\n{%- endmacro %}[{{ f('a') }}]",
    "a {# comment #} b{#- x -#}  c{# multi\nline #}d",
    "a {%- if t %} b {%- endif %} c {%+ if t %} d {% endif +%}\n e",
    "{% if t %}\n  x\n{% endif %}\ny\n  {% if t %}\n z\n  {% endif %}\nend\n",
    "  {%+ if t %}x{% endif %}\n  {#- c #}\nq\n  {# c #}\nr\n{# d +#}\ns",
    "a  {{- s -}}  b  {{ s }}\nc\n{{ s }}\n\nd\n   {{ s }}\n",
    "{% raw %}{{ not }} {% this %} {# at all #}{% endraw %}|{%- raw -%}  x {% if %} {%- endraw -%}  y",
    "{% raw %}\n a\n  {% endraw %}\nb {%+ raw %}c{% endraw +%}\nd",
    "x{% if t -%}\n   y\n{%- endif %}\n   z {%- set a = 1 -%}   w\n\t{% if t %}tab{% endif %}\n  text {% if t %}a{% endif %}\n",
    "a\r\nb\rc{% if t %}\r\nd{% endif %}\r\n",
    "{%- if t -%}\n\n  a\n\n{%- else -%}\n b\n{%- endif -%}\n\n",
    "{{ s }}\n", "{{ s }}\n\n", "\n{{ s }}", "  {% set a = 1 %}  \n  {% set b = 2 %}\nx\n",
    "{% for x in l %}\n  {{ x }}\n{% endfor %}\n", "{% for x in l -%}\n  {{ x }}\n{%- endfor %}\n",
    "\u00a0{% if t %}x{% endif %}\n\u3000 {%- if t %}y{% endif -%}\u00a0 z",
    "{{\n s\n | upper\n}}{%\nif t\n%}a{%\nendif\n%}", "{{ 'a\nb' }}{{ 'a\\\nb' }}",
]
