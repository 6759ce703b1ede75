// What the tables of family_tables.c mean. See families.h.
#include "shard/families.h"

#include "shard/family_tables.h"
#include "shard/text.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const struct family *family_find(const char *architecture)
{
    // A model that a plan of its own describes is named "Its architecture as a known one".
    const char *as = strstr(architecture, " as ");
    const char *name = as ? as + 4 : architecture;
    for (int i = 0; i < family_count; i++)
        if (strcmp(families[i].architecture, name) == 0)
            return &families[i];
    return NULL;
}

const char *family_list(void)
{
    static char list[2048];
    static bool made; // the same text whoever makes it
    if (!made) {
        size_t at = 0;
        for (int i = 0; i < family_count; i++)
            at += (size_t)snprintf(list + at, sizeof list - at, "%s%s", i ? ", " : "", families[i].architecture);
        made = true;
    }
    return list;
}

bool family_default(const struct family *family, const char *key, double *value)
{
    for (int i = 0; i < FAMILY_MAX_DEFAULTS && family->defaults[i].key; i++)
        if (strcmp(family->defaults[i].key, key) == 0) {
            *value = family->defaults[i].value;
            return true;
        }
    return false;
}

enum split family_split(const struct family_tensor *tensor)
{
    static const struct {
        const char *strategy;
        enum split split;
    } words[] = {
        {"colwise", SPLIT_OUT},
        {"embedding_rowwise", SPLIT_OUT},
        {"rowwise", SPLIT_IN},
        {"replicate", REPLICATE},
    };
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        if (strcmp(words[i].strategy, tensor->strategy) == 0)
            return words[i].split;
    assert(!"a family's table uses a word that has no meaning");
    return REPLICATE;
}

bool family_tensor_present(const struct family_tensor *tensor, const struct model_desc *model, int32_t layer)
{
    bool experts = layer >= 0 && model->layer_flags[layer] & LAYER_EXPERTS;
    bool local = false;
    switch (tensor->presence) {
    case ALWAYS:
        return true;
    case WITH_QKV_BIAS:
        return model->qkv_bias;
    case WITH_O_BIAS:
        return model->o_bias;
    case WITH_MLP_BIAS:
        return model->mlp_bias;
    case WITH_QK_NORM:
        return model->qk_norm != QK_NORM_NONE;
    case WITH_OWN_HEAD:
        return !model->tied_embeddings;
    case WITH_ROPE_LONG:
        return model->rope_original_context > 0;
    case WITH_ROPE_LOCAL:
        for (int64_t i = 0; i < model->num_layers; i++)
            local = local || model->layer_flags[i] & LAYER_LOCAL_ROPE;
        return local;
    case WITH_EXPERTS:
        return experts;
    case WITHOUT_EXPERTS:
        return !experts;
    case WITH_SHARED_EXPERT:
        return experts && model->experts.shared_size > 0;
    case WITH_SHARED_GATE:
        return experts && model->experts.shared_gate;
    case WITH_QUERY_LATENT:
        return model->latent.q_rank > 0;
    case WITHOUT_QUERY_LATENT:
        return model->latent.q_rank == 0;
    }
    return false;
}

bool family_ignores(const struct family *family, const struct model_desc *model, const char *name)
{
    static const char layers[] = "model.layers.", old_table[] = ".rotary_emb.inv_freq";
    for (size_t i = 0; i < sizeof family->ignored / sizeof *family->ignored && family->ignored[i]; i++)
        if (text_begins(name, family->ignored[i]))
            return true;
    if (text_ends(name, old_table))
        return true; // what old checkpoints carry besides weights
    if (family->prefix && text_begins(name, family->prefix))
        name += strlen(family->prefix);
    if (family->further_layers_ignored && text_begins(name, layers))
        return strtoll(name + strlen(layers), NULL, 10) >= model->num_layers;
    return model->tied_embeddings && strcmp(name, "lm_head.weight") == 0; // a copy of the embedding
}
