// The real model of an API. Apart from api.c, so that tests with their own engine do without ranks.
#include "engine/serve/api_internal.h"

#include "engine/serve/log.h"
#include "engine/session.h"

#include <stdlib.h>
#include <string.h>

// ---- the model ---------------------------------------------------------------------------------------------------

_Static_assert(OUTPUT_MARKS <= (int)API_MAX_KEPT, "room for every mark");

static void find_marks(struct api *api, struct api_model *model)
{
    model->kept = api->kept;
    for (int i = 0; i < OUTPUT_MARKS; i++)
        if (output_format_has(model->format, i))
            model->num_kept += tokenizer_token_id(model->tokenizer, output_marks[i], &api->kept[model->num_kept]);
}

static int open_chat(struct api *api, struct api_model *model, struct session *session, struct error *err)
{
    int rc = store_chat(&api->chat, session_store(session), session_manifest(session), err);
    if (rc == ERR_MODEL) { // without one, or with one that cannot be used, completions remain
        const struct log_field fields[] = {{.key = "reason", .type = LOG_TEXT, .text = err->msg}, {.key = NULL}};
        log_line(LOG_WARNING, "no chat", fields);
        *err = (struct error){0};
        return 0;
    }
    if (rc)
        return rc;
    // What the template's text tells about the model's output.
    const char *text = chat_template_text(api->chat);
    model->chat = api->chat;
    model->format = output_format_find(text);
    model->knows_developer = strstr(text, "developer") != NULL;
    return 0;
}

// Without one there are no answers in a given form.
static int open_vocabulary(struct api *api, struct api_model *model, struct error *err)
{
    int rc = vocabulary_create(&api->vocabulary, model->tokenizer, model->eos_ids, model->num_eos, err);
    if (rc == ERR_MODEL) { // its tokens have no text each for itself
        const struct log_field fields[] = {{.key = "reason", .type = LOG_TEXT, .text = err->msg}, {.key = NULL}};
        log_line(LOG_WARNING, "no response_format", fields);
        *err = (struct error){0};
        return 0;
    }
    model->vocabulary = api->vocabulary;
    return rc;
}

int api_load(struct api *api, struct session *session, struct error *err)
{
    const struct manifest *manifest = session_manifest(session);
    struct api_model model = {.desc = &manifest->model, .context = session_context(session), .eos_ids = api->eos_ids};
    int rc = session_tokenizer(session, &model.tokenizer, err);
    if (rc)
        return rc;
    for (int i = 0; i < manifest->model.num_eos; i++)
        if (manifest->model.eos_token_ids[i] >= 0)
            api->eos_ids[model.num_eos++] = (uint32_t)manifest->model.eos_token_ids[i];
    find_marks(api, &model);
    if ((rc = open_chat(api, &model, session, err)) || (rc = open_vocabulary(api, &model, err)))
        return rc;
    api_set_model(api, &model);
    return 0;
}
