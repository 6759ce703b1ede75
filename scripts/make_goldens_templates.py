#!/usr/bin/env python3
"""Writes tests/golden/templates: what transformers makes of chat templates. Needs transformers >= 5 and Jinja2 >= 3.1.6.

features.json   variables, and rows [template, output] or [template, null] where Jinja2 refuses, or [template, null, text]
                where the template raised an exception with that text
families.json   templates by name, and cases of a template and a conversation
"""
import copy
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from jinja2.exceptions import TemplateError  # noqa: E402
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template  # noqa: E402

from template_families import CONVERSATIONS, FAMILIES, TOKENS  # noqa: E402
from template_features import ROWS, VARIABLES  # noqa: E402

OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "golden", "templates")


def attempt(render):
    try:
        return {"output": render()}
    except TemplateError as error:
        return {"raised": str(error)} if type(error) is TemplateError else {}
    except Exception:
        return {}


def feature(template):
    result = attempt(lambda: _compile_jinja_template(template).render(**copy.deepcopy(VARIABLES)))
    if "output" in result:
        return [template, result["output"]]
    return [template, None] + ([result["raised"]] if "raised" in result else [])


def case(family, name, messages, arguments):
    # As apply_chat_template does beforehand.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    result = attempt(lambda: render_jinja_template([messages], chat_template=FAMILIES[family], **TOKENS,
                                                   **copy.deepcopy(arguments))[0][0])
    return {"family": family, "conversation": name, **result}


def write(name, value):
    with open(os.path.join(OUT, name), "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=0, separators=(",", ":"))
        file.write("\n")


def main():
    os.makedirs(OUT, exist_ok=True)
    # What is left out on purpose, refused by name.
    unsupported = ("recursive", "{% block", "{{ self }}", "f.real")
    rows = [feature(template) for template in ROWS if not any(word in template for word in unsupported)]
    write("features.json", {"variables": VARIABLES, "rows": rows})
    conversations = {name: {"messages": messages, "arguments": arguments} for name, messages, arguments in CONVERSATIONS}
    cases = [case(family, *conversation) for family in FAMILIES for conversation in CONVERSATIONS]
    write("families.json", {"tokens": TOKENS, "templates": FAMILIES, "conversations": conversations, "cases": cases})
    print(len(rows), "features,", len(cases), "cases,", sum("output" in c for c in cases), "of them rendered")


if __name__ == "__main__":
    main()
