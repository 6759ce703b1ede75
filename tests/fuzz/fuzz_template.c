// Any bytes as a template, rendered with a small conversation: refused or rendered, within its limits, with marks that cover the
// text. Bytes behind a NUL are a JSON object of variables from a user.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "formats/template.h"

static const char CONVERSATION[] = "{\"messages\":[{\"role\":\"user\",\"content\":\" H\xC3\xA4llo\\n<|im_end|> "
                                   "\"},{\"role\":\"assistant\",\"content\":null,"
                                   "\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":{\"x\":[1,2.5,true]}}}]"
                                   "}],\"tools\":[{\"type\":\"function\"}],"
                                   "\"add_generation_prompt\":true,\"s\":\"a,b\",\"n\":3}";

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct template_limits limits = {.steps = 20000, .memory_bytes = 4 << 20, .output_bytes = 1 << 16};
    const uint8_t *nul = memchr(data, 0, size);
    size_t bytes = nul ? (size_t)(nul - data) : size, count = 0, covered = 0;
    struct template_variable variables[16];
    struct template_output out;
    struct template *tmpl;
    struct error err;
    const char *key;
    json_t *value;
    if (template_compile(&tmpl, (const char *)data, bytes, "fuzz", &err))
        return 0;
    json_t *given = nul ? json_loadb((const char *)nul + 1, size - bytes - 1, JSON_ALLOW_NUL, NULL) : NULL;
    if (!json_is_object(given)) {
        json_decref(given);
        given = json_loads(CONVERSATION, 0, NULL);
    }
    json_object_foreach(given, key, value)
    {
        enum template_origin origin = count % 2 ? TEMPLATE_FROM_USER : TEMPLATE_MESSAGES;
        if (count < 16)
            variables[count++] = (struct template_variable){key, value, origin};
    }
    if (template_render(&out, tmpl, variables, count, &limits, 1700000000, &err) == 0) {
        if (out.bytes > limits.output_bytes || out.text[out.bytes])
            abort();
        for (size_t i = 0; i < out.num_segments; i++) {
            if (out.segments[i].begin != covered || out.segments[i].end <= covered)
                abort();
            covered = out.segments[i].end;
        }
        if (covered != out.bytes)
            abort();
        template_output_clear(&out);
    } else if (!err.code || !err.msg[0]) {
        abort();
    }
    json_decref(given);
    template_free(tmpl);
    return 0;
}
