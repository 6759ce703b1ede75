// Bodies of requests to the API: what they mean, and what is said about each that is wrong.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/serve/api_params.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

static const struct model_desc desc = {.vocab_size = 1000,
                                       .default_temperature = NAN,
                                       .default_top_p = NAN,
                                       .default_repetition_penalty = NAN,
                                       .default_top_k = -1};
static const struct model_desc tuned = {.vocab_size = 1000,
                                        .default_temperature = 0.6,
                                        .default_top_p = 0.9,
                                        .default_repetition_penalty = 1.05,
                                        .default_top_k = 20};
static const char *const names[] = {"served", "other"};

static int read_body(struct api_params *params, const char *body, size_t bytes, bool chat, const struct model_desc *of,
                     struct api_error *error)
{
    const struct api_model model = {.desc = of, .context = 100, .num_eos = 2};
    *params = (struct api_params){0};
    *error = (struct api_error){0};
    return api_params_read(params, body, bytes, chat, &model, names, COUNT(names), error);
}

// A body in single quotes, with members that make it a whole request.
static char *body_of(const char *members, bool chat)
{
    char *body = NULL;
    assert_true(asprintf(&body, "{%s%s%s}", chat ? "'messages':[{'role':'user','content':'a'}]" : "'prompt':'a'",
                         *members ? "," : "", members) > 0);
    for (char *c = body; *c; c++)
        if (*c == '\'')
            *c = '"';
    return body;
}

static int failures; // said at once, counted at the end of a table

static void refused(const char *body, size_t bytes, bool chat, int status, const char *param, const char *words)
{
    struct api_params params;
    struct api_error error;
    int rc = read_body(&params, body, bytes, chat, &desc, &error);
    bool as_wanted =
        words ? rc && error.status == status && strcmp(error.param, param) == 0 && strstr(error.message, words)
              : rc == 0;
    if (!as_wanted)
        print_error("%.200s: %s %d, %s: %s\n", body, rc ? "refused" : "taken", error.status, error.param,
                    error.message);
    failures += !as_wanted;
    api_params_clear(&params);
}

// ---- members -----------------------------------------------------------------------------------------------------

#define TOOL "{'type':'function','function':{'name':'f','parameters':{}}}"

static const struct {
    const char *members;
    int routes;                // 1: completions, 2: chat, 3: both
    const char *param, *words; // of the refusal; words NULL: accepted
} members[] = {
    {"", 3, "", NULL},
    {"'unknown':{'x':[1,2]},'user':'u','priority':3,'store':true,'metadata':{}", 3, "", NULL},
    {"'temperature':null,'stop':null,'stream':null,'n':null,'tools':null,'seed':null", 3, "", NULL},
    {"'model':'other'", 3, "", NULL},
    {"'model':7", 3, "model", "model must be a string, found an integer"},

    {"'temperature':0", 3, "", NULL},
    {"'temperature':2", 3, "", NULL},
    {"'temperature':2.01", 3, "temperature", "temperature must be from 0 to 2, found 2.01"},
    {"'temperature':-0.1", 3, "temperature", "from 0 to 2"},
    {"'temperature':'1'", 3, "temperature", "temperature must be a number, found a string"},
    {"'temperature':true", 3, "temperature", "must be a number"},
    {"'temperature':[]", 3, "temperature", "must be a number"},
    {"'top_p':1", 3, "", NULL},
    {"'top_p':0", 3, "top_p", "from"},
    {"'top_p':1.1", 3, "top_p", "from"},
    {"'min_p':0", 3, "", NULL},
    {"'min_p':-1", 3, "min_p", "from 0 to 1"},
    {"'top_k':-1", 3, "", NULL},
    {"'top_k':0", 3, "", NULL},
    {"'top_k':2147483647", 3, "", NULL},
    {"'top_k':-2", 3, "top_k", "from -1 to"},
    {"'top_k':1.5", 3, "top_k", "must be an integer"},
    {"'top_k':9223372036854775807", 3, "top_k", "from -1 to"},
    {"'repetition_penalty':0", 3, "repetition_penalty", "from 0.01"},
    {"'repetition_penalty':1.1", 3, "", NULL},
    {"'frequency_penalty':-2,'presence_penalty':2", 3, "", NULL},
    {"'frequency_penalty':2.1", 3, "frequency_penalty", "from -2 to 2"},
    {"'presence_penalty':-2.1", 3, "presence_penalty", "from -2 to 2"},
    {"'seed':9223372036854775807", 3, "", NULL},
    {"'seed':-9223372036854775808", 3, "", NULL},
    {"'seed':9223372036854775808", 3, "", "not valid JSON"},
    {"'seed':1.0", 3, "seed", "must be an integer"},
    {"'n':1", 3, "", NULL},
    {"'n':16", 3, "", NULL},
    {"'n':0", 3, "n", "n must be from 1 to 16, found 0"},
    {"'n':17", 3, "n", "from 1 to 16"},
    {"'n':'2'", 3, "n", "integer"},
    {"'max_tokens':1", 3, "", NULL},
    {"'max_tokens':2147483647", 3, "", NULL},
    {"'max_tokens':0", 3, "max_tokens", "from 1"},
    {"'max_tokens':-5", 3, "max_tokens", "from 1"},
    {"'max_tokens':2147483648", 3, "max_tokens", "from 1"},
    {"'max_tokens':1e3", 3, "max_tokens", "integer"},
    {"'max_completion_tokens':0", 3, "max_completion_tokens", "from 1"},
    {"'min_tokens':-1", 3, "min_tokens", "from 0"},
    {"'min_tokens':6,'max_tokens':5", 3, "min_tokens", "min_tokens (6) is above max_tokens (5)"},

    {"'stop':[]", 3, "", NULL},
    {"'stop':'x'", 3, "", NULL},
    {"'stop':['a','b','c','d']", 3, "", NULL},
    {"'stop':['1','2','3','4','5','6','7','8','9','10','11','12','13','14','15','16']", 3, "", NULL},
    {"'stop':['1','2','3','4','5','6','7','8','9','10','11','12','13','14','15','16','17']", 3, "stop",
     "at most 16 strings, found 17"},
    {"'stop':''", 3, "stop", "from 1 to 4096 bytes"},
    {"'stop':['a','']", 3, "stop", "from 1 to 4096 bytes"},
    {"'stop':5", 3, "stop", "a string or a list of strings, found an integer"},
    {"'stop':[null]", 3, "stop", "a string or a list of strings"},
    {"'stop_token_ids':[0,999]", 3, "", NULL},
    {"'stop_token_ids':[1000]", 3, "stop_token_ids", "token id 1000 is not from 0 to 999"},
    {"'stop_token_ids':[-1]", 3, "stop_token_ids", "not from 0"},
    {"'stop_token_ids':['1']", 3, "stop_token_ids", "a list of token ids"},
    {"'stop_token_ids':1", 3, "stop_token_ids", "a list of token ids"},
    {"'ignore_eos':1", 3, "ignore_eos", "true or false"},
    {"'include_stop_str_in_output':'yes'", 3, "include_stop_str_in_output", "true or false"},
    {"'skip_special_tokens':0", 3, "skip_special_tokens", "true or false"},
    {"'logit_bias':{}", 3, "", NULL},
    {"'logit_bias':{'0':-100,'999':100.0}", 3, "", NULL},
    {"'logit_bias':{'1000':1}", 3, "logit_bias", "\"1000\" is not a token id from 0 to 999"},
    {"'logit_bias':{'x':1}", 3, "logit_bias", "not a token id"},
    {"'logit_bias':{'':1}", 3, "logit_bias", "not a token id"},
    {"'logit_bias':{'-1':1}", 3, "logit_bias", "not a token id"},
    {"'logit_bias':{'01':1}", 3, "logit_bias", "not a token id"},
    {"'logit_bias':{'1 ':1}", 3, "logit_bias", "not a token id"},
    {"'logit_bias':{'99999999999999999999999':1}", 3, "logit_bias", "not a token id"},
    {"'logit_bias':{'5':101}", 3, "logit_bias", "the bias of token 5"},
    {"'logit_bias':{'5':'1'}", 3, "logit_bias", "the bias of token 5"},
    {"'logit_bias':[1]", 3, "logit_bias", "an object"},

    {"'logprobs':true", 2, "", NULL},
    {"'logprobs':true,'top_logprobs':20", 2, "", NULL},
    {"'logprobs':false,'top_logprobs':0", 2, "", NULL},
    {"'logprobs':true,'top_logprobs':21", 2, "top_logprobs", "from 0 to 20"},
    {"'logprobs':true,'top_logprobs':-1", 2, "top_logprobs", "from 0 to 20"},
    {"'top_logprobs':3", 2, "top_logprobs", "needs \"logprobs\": true"},
    {"'logprobs':5", 2, "logprobs", "true or false"},
    {"'logprobs':0", 1, "", NULL},
    {"'logprobs':20", 1, "", NULL},
    {"'logprobs':21", 1, "logprobs", "from 0 to 20"},
    {"'logprobs':true", 1, "logprobs", "integer"},
    {"'stream':'true'", 3, "stream", "true or false"},
    {"'stream':true,'stream_options':{'include_usage':true}", 3, "", NULL},
    {"'stream':true,'stream_options':{'include_usage':1}", 3, "include_usage", "true or false"},
    {"'stream':true,'stream_options':true", 3, "stream_options", "an object"},
    {"'stream_options':{}", 3, "stream_options", "needs \"stream\": true"},
    {"'cache_salt':'s'", 3, "", NULL},
    {"'cache_salt':''", 3, "cache_salt", "from 1 to 1024 bytes"},
    {"'cache_salt':1", 3, "cache_salt", "a string"},
    {"'response_format':{'type':'text'}", 3, "", NULL},
    {"'response_format':{'type':'json_object'}", 3, "", NULL},
    {"'response_format':{'type':'json_schema','json_schema':{'name':'n','schema':{}}}", 3, "", NULL},
    {"'response_format':{'type':'json_schema','json_schema':{'schema':true,'strict':true}}", 3, "", NULL},
    {"'response_format':{'type':'xml'}", 3, "response_format.type", "found \"xml\""},
    {"'response_format':{}", 3, "response_format.type", "a string"},
    {"'response_format':'json'", 3, "response_format", "an object"},
    {"'response_format':{'type':'json_schema'}", 3, "response_format.json_schema", "an object with a schema"},
    {"'response_format':{'type':'json_schema','json_schema':{}}", 3, "response_format.json_schema.schema",
     "a JSON schema"},
    {"'response_format':{'type':'json_schema','json_schema':{'schema':[]}}", 3, "response_format.json_schema.schema",
     "a JSON schema"},

    {"'echo':true", 1, "echo", "not supported"},
    {"'echo':false,'suffix':'','best_of':1,'functions':[]", 3, "", NULL},
    {"'suffix':'x'", 1, "suffix", "not supported"},
    {"'best_of':2", 1, "best_of", "not supported"},
    {"'best_of':2,'n':2", 1, "", NULL},
    {"'prompt_logprobs':1", 3, "prompt_logprobs", "not supported"},
    {"'use_beam_search':true", 3, "use_beam_search", "not supported"},
    {"'functions':[{}]", 2, "functions", "use tools"},
    {"'guided_json':{}", 2, "guided_json", "use response_format"},
    {"'continue_final_message':true", 2, "continue_final_message", "not supported"},

    {"'tools':[]", 2, "", NULL},
    {"'tools':[" TOOL "]", 2, "", NULL},
    {"'tools':[" TOOL "],'tool_choice':'auto','parallel_tool_calls':false", 2, "", NULL},
    {"'tools':[" TOOL "],'tool_choice':'none'", 2, "", NULL},
    {"'tools':[" TOOL "],'tool_choice':'required'", 2, "", NULL},
    {"'tools':[" TOOL "],'tool_choice':{'type':'function','function':{'name':'f'}}", 2, "", NULL},
    {"'tools':[" TOOL "],'tool_choice':{'type':'function','function':{'name':'g'}}", 2, "tool_choice", "names \"g\""},
    {"'tools':[" TOOL "],'tool_choice':'any'", 2, "tool_choice", "must be"},
    {"'tools':[" TOOL "],'tool_choice':{}", 2, "tool_choice", "must be"},
    {"'tool_choice':'none'", 2, "", NULL},
    {"'tool_choice':'required'", 2, "tool_choice", "needs tools"},
    {"'tools':[" TOOL "],'tool_choice':'required','response_format':{'type':'json_object'}", 2, "response_format",
     "exclude each other"},
    {"'tools':{}", 2, "tools", "a list"},
    {"'tools':[1]", 2, "tools[0]", "must be {\"type\": \"function\""},
    {"'tools':[{'type':'retrieval'}]", 2, "tools[0]", "must be {\"type\": \"function\""},
    {"'tools':[" TOOL ",{'type':'function','function':{}}]", 2, "tools[1].function.name", "1 to 256"},
    {"'tools':[{'type':'function','function':{'name':''}}]", 2, "tools[0].function.name", "1 to 256"},
    {"'tools':[{'type':'function','function':{'name':'f','parameters':[]}}]", 2, "tools[0].function.parameters",
     "a JSON schema"},
    {"'tools':[{'type':'function','function':{'name':'f','description':5}}]", 2, "tools[0].function.description",
     "a string"},
    {"'parallel_tool_calls':1", 2, "parallel_tool_calls", "true or false"},
    {"'reasoning_effort':'high','enable_thinking':false", 2, "", NULL},
    {"'reasoning_effort':3", 2, "reasoning_effort", "a word"},
    {"'enable_thinking':'no'", 2, "enable_thinking", "true or false"},
    {"'chat_template_kwargs':{'a':1}", 2, "", NULL},
    {"'chat_template_kwargs':[]", 2, "chat_template_kwargs", "an object"},
    {"'add_generation_prompt':1", 2, "add_generation_prompt", "true or false"},
    {"'documents':[{}]", 2, "", NULL},
    {"'documents':'d'", 2, "documents", "a list"},
    {"'add_special_tokens':'x'", 1, "add_special_tokens", "true or false"},
};

static void test_members(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(members); i++)
        for (int chat = 0; chat < 2; chat++) {
            if (!(members[i].routes & (1 << chat)))
                continue;
            char *body = body_of(members[i].members, chat);
            refused(body, strlen(body), chat, 400, members[i].param, members[i].words);
            free(body);
        }
    char *body = body_of("'model':'missing'", true);
    refused(body, strlen(body), true, 404, "model", "\"missing\" is not served here; there is \"served\"");
    free(body);
    assert_int_equal(failures, 0);
}

// ---- whole bodies ------------------------------------------------------------------------------------------------

#define USER(content) "{'messages':[{'role':'user','content':" content "}]}"
#define CALL(function) "{'messages':[{'role':'assistant','tool_calls':[{'id':'1','function':" function "}]}]}"

static const struct {
    const char *body; // single quotes
    bool chat;
    const char *param, *words;
} bodies[] = {
    {"", true, "", "the body is empty"},
    {" ", true, "", "not valid JSON"},
    {"{", true, "", "not valid JSON"},
    {"{}{}", true, "", "not valid JSON"},
    {"[]", true, "", "must be a JSON object, found an array"},
    {"'a'", true, "", "not valid JSON"},
    {"{'a':1,'a':1}", true, "", "duplicate object key"},
    {"{'a':NaN}", true, "", "not valid JSON"},
    {"{'a':1e999}", true, "", "not valid JSON"},
    {"{'a':01}", true, "", "not valid JSON"},
    {"{'a':'\xff'}", true, "", "not valid JSON"},
    {"{'a':'\xc0\x80'}", true, "", "not valid JSON"},
    {"{'a':'\\ud800'}", true, "", "not valid JSON"},
    {"{'a':'\\udc00\\ud800'}", true, "", "not valid JSON"},
    {"{'a':'\\u0000'}", true, "", "not valid JSON"},
    {"\xef\xbb\xbf{}", true, "", "not valid JSON"},
    {"{}", true, "messages", "messages is missing"},
    {"{'messages':null}", true, "messages", "messages is missing"},
    {"{'messages':{}}", true, "messages", "messages must be a list, found an object"},
    {"{'messages':[]}", true, "messages", "from 1 to 65536 messages, found 0"},
    {"{'messages':[1]}", true, "messages[0]", "must be an object"},
    {"{'messages':[{}]}", true, "messages[0].role", "must be a string, found nothing"},
    {"{'messages':[{'role':1}]}", true, "messages[0].role", "must be a string"},
    {"{'messages':[{'role':'','content':''}]}", true, "messages[0].role", "must not be empty"},
    {"{'messages':[{'role':'user'}]}", true, "messages[0].content", "is missing"},
    {"{'messages':[{'role':'user','content':'a'},{'role':'user','content':1}]}", true, "messages[1].content",
     "a string or a list of parts"},
    {"{'messages':[{'role':'assistant'}]}", true, "", NULL},
    {"{'messages':[{'role':'stranger','content':'a'}]}", true, "", NULL},
    {USER("''"), true, "", NULL},
    {USER("null"), true, "messages[0].content", "is missing"},
    {USER("{}"), true, "messages[0].content", "a string or a list of parts, found an object"},
    {USER("[]"), true, "", NULL},
    {USER("[{'type':'text','text':'a'},{'type':'refusal','refusal':'b'}]"), true, "", NULL},
    {USER("[{'type':'text'}]"), true, "messages[0].content", "must have its text"},
    {USER("[{'text':'a'}]"), true, "messages[0].content", "an object with a type"},
    {USER("['a']"), true, "messages[0].content", "an object with a type"},
    {USER("[{'type':'image_url','image_url':{'url':'x'}}]"), true, "messages[0].content",
     "parts of type \"image_url\" are not supported"},
    {CALL("{'name':'f','arguments':'{}'}"), true, "", NULL},
    {CALL("{'name':'f','arguments':''}"), true, "", NULL},
    {CALL("{'name':'f','arguments':'broken'}"), true, "", NULL},
    {CALL("{'name':'f','arguments':{}}"), true, "", NULL},
    {CALL("{'name':'f','arguments':[]}"), true, "messages[0].tool_calls", "arguments must be JSON text"},
    {CALL("{}"), true, "messages[0].tool_calls", "must have a name"},
    {CALL("1"), true, "messages[0].tool_calls", "objects with a function"},
    {"{'messages':[{'role':'assistant','tool_calls':{}}]}", true, "messages[0].tool_calls", "must be a list"},

    {"{}", false, "prompt", "prompt is missing"},
    {"{'prompt':''}", false, "", NULL},
    {"{'prompt':1}", false, "prompt", "a string, a list of token ids"},
    {"{'prompt':[]}", false, "prompt", "must not be an empty list"},
    {"{'prompt':['a','b']}", false, "", NULL},
    {"{'prompt':[1,2]}", false, "", NULL},
    {"{'prompt':[[1],[2]]}", false, "", NULL},
    {"{'prompt':['1','2','3','4','5'],'n':13}", false, "prompt", "5 prompts with n = 13 are more than 64 choices"},
    {"{'prompt':['1','2','3','4'],'n':16}", false, "", NULL},
};

static char *unquote(const char *text)
{
    char *copy = strdup(text);
    for (char *c = copy; *c; c++)
        if (*c == '\'')
            *c = '"';
    return copy;
}

static void test_bodies(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(bodies); i++) {
        char *body = unquote(bodies[i].body);
        refused(body, strlen(body), bodies[i].chat, 400, bodies[i].param, bodies[i].words);
        free(body);
    }
    refused("{\"a\":\"\0\"}", 9, true, 400, "", "not valid JSON");
    assert_int_equal(failures, 0);
}

// What grows: depth, length, numbers of messages, tools and biases.
static char *repeated(const char *before, const char *item, int count, const char *after)
{
    struct api_text text = {0};
    api_text_puts(&text, before);
    for (int i = 0; i < count; i++) {
        api_text_printf(&text, "%s", i ? "," : "");
        api_text_printf(&text, item, i);
    }
    api_text_puts(&text, after);
    assert_false(text.failed);
    for (char *c = text.data; *c; c++)
        if (*c == '\'')
            *c = '"';
    return text.data;
}

static void check_repeated(const char *before, const char *item, int count, const char *after, const char *param,
                           const char *words)
{
    char *body = repeated(before, item, count, after);
    refused(body, strlen(body), strstr(before, "messages") != NULL, 400, param, words);
    free(body);
}

static void test_sizes(void **state)
{
    (void)state;
    const char message[] = "{'role':'user','content':'%d'}";
    check_repeated("{'messages':[", message, 10000, "]}", "", NULL);
    check_repeated("{'messages':[", message, 65537, "]}", "messages", "found 65537");
    check_repeated("{'prompt':[", "'%d'", 65, "]}", "prompt", "65 prompts");
    check_repeated("{'prompt':[", "%d", 5000, "]}", "", NULL); // ids: looked at later
    check_repeated("{'prompt':'a','logit_bias':{", "'%d':1", 512, "}}", "", NULL);
    check_repeated("{'prompt':'a','logit_bias':{", "'%d':1", 513, "}}", "logit_bias", "at most 512");
    // What may not end the text yet takes places too: 2 end-of-sequence tokens, and 3 of the request.
    check_repeated("{'prompt':'a','min_tokens':1,'logit_bias':{", "'%d':1", 510, "}}", "", NULL);
    check_repeated("{'prompt':'a','min_tokens':1,'logit_bias':{", "'%d':1", 511, "}}", "logit_bias", "it may have 510");
    check_repeated("{'prompt':'a','min_tokens':1,'ignore_eos':true,'logit_bias':{", "'%d':1", 511, "}}", "", NULL);
    check_repeated("{'prompt':'a','min_tokens':1,'stop_token_ids':[1,2,3],'logit_bias':{", "'%d':1", 508, "}}",
                   "logit_bias", "it may have 507");
    check_repeated("{'prompt':'a','stop_token_ids':[1,2,3],'logit_bias':{", "'%d':1", 512, "}}", "", NULL);
    check_repeated("{'prompt':'a','stop_token_ids':[", "%d", 257, "]}", "stop_token_ids", "at most 256");
    check_repeated("{'messages':[{'role':'user','content':''}],'tools':[",
                   "{'type':'function','function':{'name':'f%d'}}", 257, "]}", "tools", "at most 256");
    // Nesting: jansson takes 2048 levels.
    char *deep = malloc(4 << 20);
    assert_non_null(deep);
    memset(deep, '[', 4 << 20);
    refused(deep, 4 << 20, true, 400, "", "not valid JSON");
    memcpy(deep, "{\"a\":", 5);
    memset(deep + 5, '[', 2049);
    memset(deep + 5 + 2049, ']', 2049);
    deep[5 + 2 * 2049] = '}';
    refused(deep, 6 + 2 * 2049, true, 400, "", "not valid JSON");
    // A stop string of 64 KiB.
    memcpy(deep, "{\"prompt\":\"\",\"stop\":\"", 21);
    memset(deep + 21, 'x', 65536);
    memcpy(deep + 21 + 65536, "\"}", 3);
    refused(deep, 21 + 65536 + 2, false, 400, "stop", "from 1 to 4096 bytes, found 65536");
    memcpy(deep + 21 + 4096, "\"}", 3);
    refused(deep, 21 + 4096 + 2, false, 400, "", NULL);
    assert_int_equal(failures, 0);
    free(deep);
}

// ---- meanings ----------------------------------------------------------------------------------------------------

static struct api_params accepted(const char *members_text, bool chat, const struct model_desc *of)
{
    struct api_params params;
    struct api_error error;
    char *body = body_of(members_text, chat);
    if (read_body(&params, body, strlen(body), chat, of, &error))
        fail_msg("%s", error.message);
    free(body);
    return params;
}

static void test_defaults(void **state)
{
    (void)state;
    struct api_params params = accepted("", true, &desc), other;
    assert_true(params.sampling.temperature == 1 && params.sampling.top_p == 1 && params.sampling.top_k == 0);
    assert_true(params.sampling.repetition_penalty == 1 && params.sampling.min_p == 0);
    assert_true(params.n == 1 && params.max_tokens == 0 && params.num_logprobs == -1 && !params.stream);
    assert_true(params.add_generation_prompt && params.parallel_tool_calls && params.rules.skip_special);
    assert_string_equal(params.model_name, "served");
    other = accepted("", true, &desc);
    assert_true(other.sampling.seed != params.sampling.seed);
    api_params_clear(&params);
    api_params_clear(&other);
    params = accepted("", false, &tuned); // generation_config.json's
    assert_true(params.sampling.temperature == 0.6 && params.sampling.top_p == 0.9 && params.sampling.top_k == 20);
    assert_true(params.sampling.repetition_penalty == 1.05 && params.add_special_tokens);
    api_params_clear(&params);
    params = accepted("'temperature':0,'top_k':-1,'top_p':1,'repetition_penalty':1,'seed':-7", false, &tuned);
    assert_true(params.sampling.temperature == 0 && params.sampling.top_k == 0 && params.sampling.top_p == 1);
    assert_true(params.sampling.repetition_penalty == 1 && params.sampling.seed == (uint64_t)-7);
    api_params_clear(&params);
}

static void test_meanings(void **state)
{
    (void)state;
    struct api_params params =
        accepted("'max_tokens':5,'max_completion_tokens':7,'stop':['x','yz'],'stop_token_ids':[3,4],"
                 "'logit_bias':{'12':-1.5},'logprobs':true,'stream':true,'stream_options':{'include_usage':true},"
                 "'n':3,'reasoning_effort':'none','chat_template_kwargs':{'k':1},'cache_salt':'s','model':'other'",
                 true, &desc);
    assert_int_equal(params.max_tokens, 7);
    assert_int_equal(params.rules.stops.count, 2);
    assert_int_equal(params.rules.stops.items[1].bytes, 2);
    assert_true(params.num_stop_ids == 2 && params.stop_ids[1] == 4);
    assert_true(params.num_edits == 1 && params.edits[0].token == 12 && params.edits[0].add == -1.5f);
    assert_true(params.num_logprobs == 0 && params.stream && params.include_usage && params.n == 3);
    assert_true(json_is_false(json_object_get(params.options, "enable_thinking")));
    assert_int_equal(json_integer_value(json_object_get(params.options, "k")), 1);
    assert_string_equal(params.cache_salt, "s");
    assert_string_equal(params.model_name, "other");
    api_params_clear(&params);
    params = accepted("'tools':[{'type':'function','function':{'name':'f'}}]", true, &desc);
    char *tools = json_dumps(params.tools, JSON_COMPACT | JSON_SORT_KEYS);
    assert_string_equal(tools, "[{\"function\":{\"description\":\"\",\"name\":\"f\",\"parameters\":{\"properties\":{},"
                               "\"type\":\"object\"}},\"type\":\"function\"}]");
    free(tools);
    api_params_clear(&params);
    params = accepted("'tools':[" TOOL "],'tool_choice':'none'", true, &desc);
    assert_null(params.tools);
    api_params_clear(&params);
}

// Messages as templates want them.
static void test_messages(void **state)
{
    (void)state;
    char *body = unquote("{'messages':[{'role':'developer','content':[{'type':'text','text':'a'},{'type':'text','text':"
                         "'b'}]},{'role':'assistant','content':null,'tool_calls':[{'function':{'name':'f','arguments':"
                         "'{\\u0022x\\u0022:1}'}},{'function':{'name':'g','arguments':'{'}},{'function':{'name':'h'}}]"
                         "},{'role':'assistant','content':'','tool_calls':[]}]}");
    struct api_params params;
    struct api_error error;
    if (read_body(&params, body, strlen(body), true, &desc, &error))
        fail_msg("%s", error.message);
    char *text = json_dumps(params.messages, JSON_COMPACT | JSON_SORT_KEYS);
    assert_string_equal(text, "[{\"content\":\"a\\nb\",\"role\":\"system\"},"
                              "{\"content\":null,\"role\":\"assistant\",\"tool_calls\":["
                              "{\"function\":{\"arguments\":{\"x\":1},\"name\":\"f\"}},"
                              "{\"function\":{\"arguments\":\"{\",\"name\":\"g\"}},"
                              "{\"function\":{\"arguments\":{},\"name\":\"h\"}}]},"
                              "{\"content\":\"\",\"role\":\"assistant\"}]");
    free(text);
    free(body);
    api_params_clear(&params);
}

// What an error looks like, and that any text of a request fits into it.
static void test_errors(void **state)
{
    (void)state;
    struct api_error error = {0};
    struct api_text json = {0};
    char longest[5000];
    api_error_set(&error, 400, "c", "p", "a \"quoted\"\n\x01 %s", "word");
    api_error_write(&json, &error);
    assert_string_equal(json.data, "{\"error\":{\"message\":\"a \\\"quoted\\\"\\n\\u0001 word\","
                                   "\"type\":\"invalid_request_error\",\"param\":\"p\",\"code\":\"c\"}}");
    for (size_t i = 0; i + 3 < sizeof longest; i += 3)
        memcpy(longest + i, "\xe2\x82\xac", 4);
    for (int shift = 0; shift < 3; shift++) {
        api_text_clear(&json);
        api_error_set(&error, 500, NULL, longest, "%.*s%s", shift, "xx", longest);
        api_error_write(&json, &error);
        json_t *parsed = json_loads(json.data, 0, NULL);
        assert_non_null(parsed);
        assert_true(json_is_null(json_object_get(json_object_get(parsed, "error"), "code")));
        json_decref(parsed);
    }
    api_text_free(&json);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_members),  cmocka_unit_test(test_bodies),   cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_defaults), cmocka_unit_test(test_meanings), cmocka_unit_test(test_messages),
        cmocka_unit_test(test_errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
