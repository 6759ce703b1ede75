#!/usr/bin/env python3
"""Random texts of schemas' grammars, judged by the `jsonschema` package with its format checks: whatever a grammar lets through is valid. BUILD
names the build folder (default: build)."""
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.path.abspath(os.environ.get("BUILD", "build"))
COUNT = 60  # texts of each schema

try:
    import jsonschema
except ModuleNotFoundError as why:
    print(f"SKIP test_grammar_schema: no Python module {why.name}; scripts/setup installs it")
    sys.exit(0)

SCHEMAS = {
    "person": {"type": "object", "properties": {"name": {"type": "string", "minLength": 2, "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 130},
               "email": {"type": ["string", "null"], "format": "email"}, "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
               "state": {"enum": ["open", "closed", 3, None]}}, "required": ["name", "age", "state"], "additionalProperties": False},
    "integers": {"type": "array", "prefixItems": [{"type": "integer", "minimum": a, "maximum": b} for a, b in
                 ((0, 9), (-9, 9), (10, 10), (95, 1234), (-1234, -95), (-100000, 7), (999, 100001), (-1, 0), (0, 0))], "minItems": 9},
    "half open": {"type": "array", "prefixItems": [{"type": "integer", "exclusiveMinimum": 41}, {"type": "integer", "exclusiveMaximum": -7},
                  {"type": "number", "minimum": 0.125}, {"type": "number", "exclusiveMaximum": -3.5}], "minItems": 4},
    "numbers": {"type": "array", "prefixItems": [{"type": "number", "minimum": a, "exclusiveMaximum": b} for a, b in
                ((0, 1), (-1, 1), (0.25, 0.3), (9.75, 10.5), (-2.5, -2.25), (99, 1000.001), (-0.001, 0.001))], "minItems": 7},
    "string bounds": {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 4}, "minItems": 2, "maxItems": 5},
    "patterns": {"type": "array", "prefixItems": [{"pattern": p} for p in (r"^[a-c]{2,4}$", r"x+y|^z", r"^\d{3}-\w+$", r"^[^\"\\]$", r"^a?.b*$", r"^[\t ][^\t ]$", r"^(?:ab|c){2}\.$")],
                 "minItems": 7},
    "formats": {"type": "array", "prefixItems": [{"type": "string", "format": f} for f in ("date", "date-time", "time", "uuid", "ipv4", "email", "hostname", "duration")],
                "minItems": 8},
    "additional": {"properties": {"ab": {"type": "integer"}, "a": {"type": "null"}}, "required": ["z"], "additionalProperties": {"type": "boolean"}},
    "map": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}},
    "tree": {"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {"value": {"type": "number"}, "children": {"type": "array",
             "items": {"$ref": "#/$defs/node"}, "maxItems": 2}}, "required": ["value"], "additionalProperties": False}}},
    "union": {"anyOf": [{"type": "object", "properties": {"kind": {"const": "a"}, "x": {"type": "integer"}}, "required": ["kind", "x"]},
              {"type": "object", "properties": {"kind": {"const": "b"}, "y": {"$ref": "#"}}, "required": ["kind"]}, {"type": "null"}]},
    "one of": {"type": "array", "items": {"oneOf": [{"type": "integer"}, {"enum": ["a", None]}, {"type": "object", "properties": {"k": {"const": 1}, "v": {"type": "null"}},
               "required": ["k"]}, {"type": "object", "properties": {"k": {"enum": ["x", 2]}}, "required": ["k"]}, {"properties": {"n": {"type": "string"}}, "required": ["n"]}]},
               "maxItems": 6},
    "merge": {"allOf": [{"type": "object", "properties": {"a": {"minimum": 2}}}, {"properties": {"a": {"type": "integer", "maximum": 20}, "b": {"type": "string"}},
              "required": ["b"]}], "anyOf": [{"required": ["a"]}, {"properties": {"b": {"maxLength": 2}}}]},
    "enums": {"allOf": [{"enum": [1, 2, "x", "xy", "\n\"", None]}, {"enum": ["x", 2, "\n\"", None, True]}]},
    "items": {"prefixItems": [{"type": "integer"}, {"type": "string"}], "items": {"type": "null"}, "minItems": 1, "maxItems": 4},
    "any": {"type": "array", "maxItems": 3},
    "ref": {"$ref": "#/definitions/s", "maxLength": 3, "definitions": {"s": {"type": "string"}}},
}


def main():
    number = failures = 0
    program = os.path.join(BUILD, "tests", "test_grammar")
    print(f"1..{len(SCHEMAS)}")
    for name, schema in SCHEMAS.items():
        number += 1
        run = subprocess.run([program, "generate", str(COUNT)], input=json.dumps(schema), text=True, capture_output=True, check=False)
        validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        texts, problem = [], run.stderr.strip() if run.returncode else ""
        for line in run.stdout.splitlines():
            texts.append(json.loads(line))  # the text stands in a JSON string
            try:
                problem = problem or next((f"{texts[-1]}: {error.message}" for error in validator.iter_errors(json.loads(texts[-1]))), "")
            except ValueError as error:
                problem = problem or f"{texts[-1]}: {error}"
        if not problem and len(set(texts)) < min(COUNT // 6, 3):
            problem = f"only {len(set(texts))} texts"
        failures += bool(problem)
        print(f"{'not ok' if problem else 'ok'} {number} - {name}: {len(set(texts))} texts")
        if problem:
            print(f"# {problem}")
    return failures > 0


sys.exit(main())
