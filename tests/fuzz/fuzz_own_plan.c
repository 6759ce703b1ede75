// A tp_plan of the user's own: any bytes may be refused; what is accepted can be checked against every kind of model.
#include "shard/own_plan.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const architectures[] = {"LlamaForCausalLM", "Qwen2MoeForCausalLM", "GptOssForCausalLM",
                                                "DeepseekV3ForCausalLM"};
    struct own_plan *plan;
    struct error err = {0};
    if (own_plan_parse(&plan, (const char *)data, size, "fuzz.json", &err)) {
        CHECK(err.code == ERR_USAGE && err.msg[0]);
        return 0;
    }
    for (size_t i = 0; i < sizeof architectures / sizeof *architectures; i++) {
        struct model_desc model = {.num_layers = 2, .layer_flags = {0, LAYER_EXPERTS}, .experts = {.num_experts = 2}};
        enum experts_mode experts = EXPERTS_TP;
        char note[256];
        snprintf(model.architecture, sizeof model.architecture, "%s", architectures[i]);
        int rc = own_plan_check(plan, &model, &experts, note, sizeof note, &err);
        CHECK(rc == 0 || ((rc == ERR_USAGE || rc == ERR_MODEL) && err.msg[0]));
    }
    own_plan_free(plan);
    return 0;
}
