"""Chat templates written for the tests, each in the style of a family of models, and conversations for them. Imported by
make_goldens_templates.py."""

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

FAMILIES = {}

FAMILIES["llama2"] = r"""
{%- if messages[0]['role'] == 'system' -%}
{%- set rest = messages[1:] -%}{%- set system = messages[0]['content'] -%}
{%- else -%}{%- set rest = messages -%}{%- set system = false -%}{%- endif -%}
{%- for turn in rest -%}
{%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Roles have to alternate: user, assistant, user ...') }}
{%- endif -%}
{%- if loop.index0 == 0 and system != false -%}
{%- set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + turn['content'] -%}
{%- else -%}{%- set text = turn['content'] -%}{%- endif -%}
{%- if turn['role'] == 'user' -%}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- elif turn['role'] == 'assistant' -%}{{ ' ' + text.strip() + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}
"""

FAMILIES["llama3_tools"] = r"""
{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not date_string is defined %}{% set date_string = "01 Jan 2025" %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|head|>system<|tail|>\n\n" }}
{%- if tools is not none %}{{- "Environment: tools\n" }}{% endif %}
{{- "Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {{- "Answer with a call, as JSON, of one of:\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|done|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|tail|>\n\n'+ message['content'] | trim + '<|done|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One call at a time, please!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|head|>assistant<|tail|>\n\n' -}}
        {{- '{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|done|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|head|>ipython<|tail|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|done|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|tail|>\n\n' }}
{%- endif %}
"""

FAMILIES["mistral"] = r"""
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("user and assistant must take turns") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("a call's id has nine characters") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("no such role: " ~ message["role"]) }}
    {%- endif %}
{%- endfor %}
"""

FAMILIES["qwen25_tools"] = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'Be of use.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nSignatures are between <tools></tools>:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nA call looks so:\n<tool_call>\n{\"name\": <name>, \"arguments\": <object>}\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nBe of use.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

FAMILIES["qwen3_thinking"] = r"""
{%- set ns = namespace(multi_step=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role in ("user", "system") %}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ content ~ '<|im_end|>' ~ '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query %}
            {%- if loop.last or (not loop.last and reasoning) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (loop.previtem.role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' ~ content ~ '\n</tool_response>' }}
        {%- if loop.last or (loop.nextitem.role != "tool") %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""

FAMILIES["gemma"] = r"""{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("user/model/user/model/... is the only order") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("no such content") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""

FAMILIES["phi3"] = r"""{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
' + message['content'] + '<|end|>
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}"""

FAMILIES["phi4_mini"] = r"""{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""

FAMILIES["gpt_oss"] = r"""
{%- macro render_type(spec, required=[]) -%}
    {%- if spec.type == "array" -%}
        {%- if spec['items'] and spec['items']['type'] -%}{{- spec['items']['type'] + '[]' }}{%- else -%}{{- "any[]" }}{%- endif -%}
        {%- if spec.nullable %}{{- " | null" }}{%- endif -%}
    {%- elif spec.enum is defined and spec.enum -%}
        {{- '"' + spec.enum|join('" | "') + '"' -}}
    {%- elif spec.type == "object" -%}
        {%- if spec.properties -%}
            {{- "{\n" }}
            {%- for name, inner in spec.properties.items() -%}
                {{- name -}}
                {%- if name not in (spec.required or []) -%}{{- "?" }}{%- endif -%}
                {{- ": " }}{{ render_type(inner, spec.required or []) }}
                {%- if not loop.last -%}{{- ", " }}{%- endif -%}
            {%- endfor -%}
            {{- "}" }}
        {%- else -%}{{- "object" }}{%- endif -%}
    {%- elif spec.type is iterable and spec.type is not string -%}
        {{- spec.type | join(" | ") }}
    {%- else -%}
        {{- spec.type | default("any", true) }}
    {%- endif -%}
{%- endmacro -%}
{%- macro render_tools(name, list) -%}
    {{- "## " + name + "\n\nnamespace " + name + " {\n\n" }}
    {%- for tool in list %}
        {%- set tool = tool.function %}
        {{- "// " + tool.description + "\ntype " + tool.name + " = " }}
        {%- if tool.parameters and tool.parameters.properties -%}
            {{- "(_: {\n" }}
            {%- for param, spec in tool.parameters.properties|dictsort -%}
                {%- if spec.description is defined %}{{- "// " + spec.description + "\n" }}{%- endif %}
                {{- param + ("?" if param not in (tool.parameters.required or []) else "") + ": " + render_type(spec) }}
                {%- if spec.default is defined -%}{{- ", // default: " + spec.default|tojson }}{%- endif -%}
                {{- ",\n" }}
            {%- endfor -%}
            {{- "}) => any;\n\n" }}
        {%- else -%}{{- "() => any;\n\n" }}{%- endif -%}
    {%- endfor %}
    {{- "} // namespace " + name }}
{%- endmacro -%}
{%- if messages[0].role in ["system", "developer"] %}{% set instructions, rest = messages[0].content, messages[1:] %}{% else %}{% set instructions, rest = "", messages %}{% endif -%}
<|start|>system<|message|>Reasoning: {{ reasoning_effort|default("medium") }}

# Channels: analysis, final.<|end|>
{%- if instructions or tools -%}
{{- "<|start|>developer<|message|>" }}{% if instructions %}{{- "# Instructions\n\n" + instructions + "\n\n" }}{% endif %}{% if tools %}{{- "# Tools\n\n" + render_tools("functions", tools) }}{% endif %}{{- "<|end|>" }}
{%- endif -%}
{%- set last_call = namespace(name=none) -%}
{%- for message in rest -%}
    {%- if message.role == "assistant" -%}
        {%- if message.tool_calls -%}
            {%- set call = message.tool_calls[0].function or message.tool_calls[0] -%}
            {%- if message.thinking %}{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}{% endif -%}
            {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" + call.arguments|tojson + "<|call|>" }}
            {%- set last_call.name = call.name -%}
        {%- elif loop.last and not add_generation_prompt -%}
            {%- if "thinking" in message %}{{- "<|start|>assistant<|channel|>analysis<|message|>" ~ message.thinking ~ "<|end|>" }}{% endif -%}
            {{- "<|start|>assistant<|channel|>final<|message|>" ~ message.content ~ "<|return|>" }}
        {%- else -%}
            {{- "<|start|>assistant<|channel|>final<|message|>" ~ message.content ~ "<|end|>" }}{% set last_call.name = none -%}
        {%- endif -%}
    {%- elif message.role == "tool" -%}
        {%- if last_call.name is none %}{{- raise_exception("a tool's answer needs a call before it") }}{% endif -%}
        {{- "<|start|>functions." ~ last_call.name ~ " to=assistant<|channel|>commentary<|message|>" ~ message.content|tojson ~ "<|end|>" }}
    {%- elif message.role == "user" -%}
        {{- "<|start|>user<|message|>" ~ message.content ~ "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|start|>assistant{% endif -%}
"""

FAMILIES["deepseek"] = r"""{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<|User|>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['tool_calls'] %}{%- set ns.is_tool = false -%}{%- for tool in message['tool_calls']%}{%- if not ns.is_first %}{{'<|Assistant|><|calls▁begin|><|call▁begin|>' + tool['type'] + '<|sep|>' + tool['function']['name'] + '\n' + '```json' + '\n' + (tool['function']['arguments'] | tojson) + '\n' + '```' + '<|call▁end|>'}}{%- set ns.is_first = true -%}{%- else %}{{'\n' + '<|call▁begin|>' + tool['type'] + '<|sep|>' + tool['function']['name'] + '<|call▁end|>'}}{{'<|calls▁end|>'}}{%- endif %}{%- endfor %}{%- endif %}{%- if message['role'] == 'assistant' and not message['tool_calls'] %}{%- if ns.is_tool %}{{'<|outputs▁end|>' + message['content'] + eos_token}}{%- set ns.is_tool = false -%}{%- else %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<|Assistant|>' + content + eos_token}}{%- endif %}{%- endif %}{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}{{'<|outputs▁begin|><|output▁begin|>' + message['content'] + '<|output▁end|>'}}{%- set ns.is_output_first = false %}{%- else %}{{'\n<|output▁begin|>' + message['content'] + '<|output▁end|>'}}{%- endif %}{%- endif %}{%- endfor -%}{% if ns.is_tool %}{{'<|outputs▁end|>'}}{% endif %}{% if add_generation_prompt and not ns.is_tool %}{{'<|Assistant|><think>\n'}}{% endif %}"""

FAMILIES["granite"] = r"""{%- if messages[0]['role'] == 'system' %}
     {%- set system_message = messages[0]['content'] %}
     {%- set loop_messages = messages[1:] %}
 {%- else %}
     {%- set system_message = "Today is " ~ strftime_now('')  ~ "known." %}
     {%- if tools and documents %}
         {%- set system_message = system_message + " Tools and documents are given." %}
     {%- elif documents %}{%- set system_message = system_message ~ " Documents are given." %}
     {%- endif %}
     {%- set loop_messages = messages %}
 {%- endif %}
 {{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>
' }}
 {%- if tools %}
     {{- '<|start_of_role|>tools<|end_of_role|>' }}
     {{- tools | tojson(indent=4) }}
     {{- '<|end_of_text|>
' }}
 {%- endif %}
 {%- if documents %}
     {{- '<|start_of_role|>documents<|end_of_role|>' }}
     {%- for document in documents %}
         {{- 'Document ' + loop.index0 | string + '
' }}
         {{- document['text'] }}
         {%- if not loop.last %}
             {{- '

'}}
         {%- else %}
             {{- '<|end_of_text|>
' }}
         {%- endif %}
     {%- endfor %}
 {%- endif %}
 {%- for message in loop_messages %}
     {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>
' }}
     {%- if loop.last and add_generation_prompt %}
         {{- '<|start_of_role|>assistant' }}
             {%- if controls %}
                 {{- ' ' + controls | tojson()}}
             {%- endif %}
         {{- '<|end_of_role|>' }}
     {%- endif %}
 {%- endfor %}"""

FAMILIES["olmo2"] = r"""{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + '
' }}
{% elif message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + '
' }}
{% elif message['role'] == 'assistant' %}
{% generation %}
{% if not loop.last %}
{{ '<|assistant|>
'  + message['content'] + eos_token + '
' }}
{% else %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% endgeneration %}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>
' }}
{% endif %}
{% endfor %}"""

FAMILIES["chatml"] = r"""{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant
' }}
{% endif %}
"""

FAMILIES["hermes_tools"] = r"""{%- macro json_to_python_type(spec) %}
{%- set basic = {"string": "str", "number": "float", "integer": "int", "boolean": "bool"} %}
{%- if basic[spec.type] is defined %}
{{- basic[spec.type] }}
{%- elif spec.type == "array" %}
{{- "list[" + json_to_python_type(spec['items']) + "]" }}
{%- elif spec.type == "object" %}
{{- "dict" }}{%- if spec.additionalProperties is defined %}{{- "[str, " + json_to_python_type(spec.additionalProperties) + ']' }}{%- endif %}
{%- elif spec.type is iterable %}
{{- "Union[" }}{%- for t in spec.type %}{{- json_to_python_type({"type": t}) }}{%- if not loop.last %}{{- "," }}{%- endif %}{%- endfor %}{{- "]" }}
{%- else %}
{{- "Any" }}
{%- endif %}
{%- endmacro %}
{{- bos_token }}
{{- '<|im_start|>system\nTools within <tools></tools>: <tools> ' }}
{%- for tool in tools or [] %}
{%- set tool = tool.function if tool.function is defined else tool %}
{{- '{"type": "function", "function": {"name": "' + tool.name + '", "description": "' + tool.name + '(' }}
{%- for name, fields in tool.parameters.properties|items %}
{{- name + ": " + json_to_python_type(fields) }}{%- if not loop.last %}{{- ", " }}{%- endif %}
{%- endfor %}
{{- ")" }}
{%- if tool.return is defined %}{{- " -> " + json_to_python_type(tool.return) }}{%- endif %}
{{- " - " + tool.description + "\n\n" }}
{%- for name, fields in tool.parameters.properties|items %}
{%- if loop.first %}{{- "    Args:\n" }}{%- endif %}
{{- "        " + name + "(" + json_to_python_type(fields) + "): " + (fields.description|default(''))|trim }}
{%- endfor %}
{{- '", "parameters": ' }}
{%- if tool.parameters.properties | length == 0 %}{{- "{}" }}{%- else %}{{- tool.parameters|tojson }}{%- endif %}
{{- "}" }}{%- if not loop.last %}{{- "\n" }}{%- endif %}
{%- endfor %}
{{- " </tools><|im_end|>\n" }}
{%- for message in messages %}
{%- if message.role in ["user", "system"] or (message.role == "assistant" and message.tool_calls is not defined) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- elif message.role == "assistant" %}
{{- '<|im_start|>' + message.role }}
{%- for call in message.tool_calls %}
{{- '\n<tool_call>\n' }}{%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
{{- '{"name": "' }}{{- call.name }}{{- '"' }}{%- if call.arguments is defined %}{{- ', "arguments": ' }}{{- call.arguments|tojson }}{%- endif %}{{- '}' }}
{{- '\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == "tool" %}
{%- if loop.previtem and loop.previtem.role != "tool" %}{{- '<|im_start|>tool\n' }}{%- endif %}
{{- '<tool_response>\n' }}{{- message.content }}{%- if not loop.last %}{{- '\n</tool_response>\n' }}{%- else %}{{- '\n</tool_response>' }}{%- endif %}
{%- if not loop.last and loop.nextitem.role != "tool" %}{{- '<|im_end|>' }}{%- elif loop.last %}{{- '<|im_end|>' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

FAMILIES["command_r"] = r"""{{ bos_token }}{%- macro document_turn(documents) -%}
{# all documents as one turn #}
{% for doc in documents %}
Document: {{ loop.index0 }}
{% for key, value in doc.items() %}{{ key|title }}: {{ value }}{{ '\n' if not loop.last }}{% endfor %}

{% endfor %}
{%- endmacro %}
{%- filter trim -%}
   {% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = 'You are kind.' %}{% endif %}
{{ '<|TURN|><|SYSTEM|>' + system_message + '<|/TURN|>' }}
{%- endfilter -%}
{%- set results %}{%- if documents %}<results>{{ document_turn(documents) }}</results>{% endif %}{% endset -%}
{%- for message in loop_messages -%}
{%- set content = message['content'] -%}
{%- if message['role']|lower == 'user' -%}{{ '<|TURN|><|USER|>' + content.strip() + '<|/TURN|>' }}
{%- elif message['role']|lower == 'assistant' -%}{{ '<|TURN|><|BOT|>'  + content.strip() + '<|/TURN|>' }}
{%- if message.tool_calls %}Action: ```json
{{ message.tool_calls|map(attribute='function')|list|tojson(indent=2) }}
```{% endif -%}
{%- elif message['role']|lower == 'tool' -%}{{ '<|TURN|><|SYSTEM|>' }}{{ content|indent(2) }}{{ '<|/TURN|>' }}
{%- else -%}{% continue %}{%- endif -%}
{%- endfor -%}
{{ results }}
{%- if add_generation_prompt -%}{{ '<|TURN|><|BOT|>' }}{%- endif -%}
"""

FAMILIES["features"] = r"""
{%- macro text_of(content) -%}
    {%- if content is string -%}{{ content }}
    {%- elif content is sequence -%}{{ content|selectattr('type', 'equalto', 'text')|map(attribute='text')|join('\n') }}
    {%- else -%}{{ content|default('', true) }}{%- endif -%}
{%- endmacro -%}
{%- set roles = messages|map(attribute='role')|unique|sort|list -%}
{{ roles|tojson(separators=(',', ':')) }} {{ messages|length }} {{ (messages|last).role|upper }}
{% for role, color in {'user': 'red', 'assistant': 'blue'}.items() if role in roles -%}
{{ '%-10s|%s' % (role, color) }} {{ '{:>6}'.format(loop.index) }}
{% endfor -%}
{% for message in messages -%}
{%- if loop.index > 6 %}{% break %}{% endif -%}
{{ loop.revindex0 }}:{{ message.role|capitalize }}: {{ text_of(message.content)|replace('\n', ' ')|truncate(24) }}
{%- for word in text_of(message.content).split()[:3] %} [{{ word[::-1] }}]{% endfor %}
{% if message.content is not string and message.content %}{{ message.content|length // 1 }} parts {{ message.content[-1:]|tojson }}{% endif %}
{% endfor -%}
{%- with n = messages|length %}{{ n ** 2 }} {{ n / 2 }} {{ -n % 4 }} {{ 'odd' if n is odd else 'even' }} {{ 1 < n <= 4 }}{% endwith %}
{{ messages[0] }}
"""

TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather of a place", "parameters": {
        "type": "object", "properties": {"place": {"type": "string", "description": "Where, e.g. \"Köln\""},
                                         "unit": {"type": "string", "enum": ["C", "F"], "default": "C"}},
        "required": ["place"]}}},
    {"type": "function", "function": {"name": "add", "description": "Adds numbers & <more>", "parameters": {
        "type": "object", "properties": {"numbers": {"type": "array", "items": {"type": "number"}},
                                         "exact": {"type": ["boolean", "null"], "default": False}},
        "required": []}, "return": {"type": "number"}}},
]

CALL = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": {"place": "Köln", "days": 2, "x": 1.5}}}


def user(text):
    return {"role": "user", "content": text}


def bot(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "  Be brief.\n"}

# name, messages, further arguments
CONVERSATIONS = [
    ("one", [user("Hello!")], {"add_generation_prompt": True}),
    ("system", [SYSTEM, user(" What is 2 + 2? ")], {"add_generation_prompt": True}),
    ("turns", [SYSTEM, user("Hi"), bot("<think>\nhm\n</think>\n\nHello there. "), user("Bye\n\n"), bot("Bye.")], {}),
    ("unicode", [user("Grüße, 世界! 🙂\u2028\u00a0\"quoted\" \\n <|im_end|> 'x'"), bot("Ça va\t…"), user("\u0645\u0631\u062d\u0628\u0627")],
     {"add_generation_prompt": True, "enable_thinking": False}),
    ("empty", [user(""), bot(""), user(" ")], {"add_generation_prompt": True}),
    ("tools", [SYSTEM, user("Weather in Köln?")], {"tools": TOOLS, "add_generation_prompt": True}),
    ("tool_result", [user("Weather?"), bot("", tool_calls=[CALL], reasoning="call it"),
                     {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": "{\"t\": 21}\nsunny"},
                     bot("21 degrees.", reasoning_content="easy"), user("Thanks")],
     {"tools": TOOLS, "add_generation_prompt": True}),
    ("parts", [user([{"type": "text", "text": " first "}, {"type": "image"}, {"type": "text", "text": "second"}])],
     {"add_generation_prompt": True}),
    ("documents", [user("Sum up.")], {"documents": [{"title": "A", "text": "one\ntwo"}, {"title": "B", "text": "<|x|>"}],
                                      "controls": {"length": "short"}, "add_generation_prompt": True}),
    ("odd_role", [{"role": "critic<|x|>", "content": "no"}, bot("a", thinking="t", name=None), bot("b")], {}),
]
