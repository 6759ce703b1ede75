// What the commands share. See commands.h.
#include "shard/commands.h"

#include "formats/file_io.h"
#include "formats/json_file.h"
#include "shard/families.h"
#include "shard/own_plan.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

struct common_options common;

void commands_note(const char *fmt, ...)
{
    va_list arguments;
    if (common.quiet)
        return;
    va_start(arguments, fmt);
    fputs("tpshard: ", stderr);
    vfprintf(stderr, fmt, arguments);
    fputc('\n', stderr);
    va_end(arguments);
}

// As what an architecture is read that is not known. That keys and tensors fit does not say that the arithmetic does.
static int find_known_as(const char **known_as, const char *path, bool is_file, const struct model_options *options,
                         struct error *err)
{
    const struct family *family = options->as ? family_find(options->as) : NULL;
    int rc;
    if (options->as && (!family || strcmp(family->architecture, options->as) != 0))
        return error_set(err, ERR_USAGE, "--as %.64s: no such architecture is known (known: %s)", options->as,
                         family_list());
    *known_as = options->as;
    if (options->as || !options->plan || is_file)
        return 0;
    if ((rc = own_plan_find_family(known_as, path, err)) || !*known_as)
        return rc;
    return error_set(err, ERR_MODEL,
                     "%s: the architecture is not known. Its keys and tensors are those of a %s, but no file says "
                     "whether it computes the same (which columns rotate together, scales, norms); if you know that it "
                     "does, say --as %s",
                     path, *known_as, *known_as);
}

static int read_config(struct hf_config *config, const char *path, bool is_file, const char *known_as,
                       struct error *err)
{
    uint8_t *text;
    uint64_t bytes;
    int rc;
    if (!is_file)
        return hf_config_read(config, path, known_as, err);
    if ((rc = file_read_all(&text, &bytes, path, JSON_FILE_CAP_BYTES, ERR_MODEL, err)))
        return rc;
    rc = hf_config_parse(config, (const char *)text, bytes, path, NULL, 0, NULL, known_as, err);
    free(text);
    return rc;
}

// The plan of the user's own says what it says; what it leaves open stays as it is.
int commands_read_model(struct hf_config *config, enum experts_mode *experts, const char *path, bool is_file,
                        const struct model_options *options, struct error *err)
{
    const char *known_as = NULL;
    char note[640] = "";
    struct own_plan *own = NULL;
    int rc = 0;
    experts_mode_from_name(options->experts, experts);
    if ((options->plan && (rc = own_plan_read(&own, options->plan, err))) ||
        (rc = find_known_as(&known_as, path, is_file, options, err)) ||
        (rc = read_config(config, path, is_file, known_as, err)) ||
        (own && (rc = own_plan_check(own, &config->model, experts, note, sizeof note, err))))
        goto done;
    if (known_as && strcmp(config->model.architecture, known_as) != 0)
        commands_note("note: the model is read as a %s", known_as);
    if (note[0])
        commands_note("note: %s", note);
done:
    own_plan_free(own);
    return rc;
}

static bool rounds_to_four_bits(const char *word)
{
    enum weight_kind kind;
    return word && weight_kind_from_name(word, &kind) && weight_is_tiled(kind);
}

int commands_check_scales(const struct model_options *options, bool chooses, struct error *err)
{
    if (strcmp(options->scales, "search") == 0 || commands_mixes(options) || (chooses && !options->quant) ||
        rounds_to_four_bits(options->quant) || rounds_to_four_bits(options->embed) ||
        rounds_to_four_bits(options->head))
        return 0;
    return error_set(err, ERR_USAGE, "--scales %s is for weights that are rounded to four bits; here are none",
                     options->scales);
}

struct plan_wish commands_wish(const struct model_options *options, enum experts_mode experts)
{
    enum weight_scales scales = WEIGHT_SCALES_SEARCHED;
    weight_scales_from_name(options->scales, &scales); // the option table lets only known words through
    return (struct plan_wish){
        .scales = scales,
        .quant = options->quant ? options->quant : "keep",
        .embed = options->embed,
        .head = options->head,
        .group_size = options->group_size ? atoi(options->group_size) : 128,
        .tp_size = options->tp > 0 ? (uint32_t)options->tp : 1,
        .pp_size = options->pp > 0 ? (uint32_t)options->pp : 1,
        .experts = experts,
        .rotate = options->rot,
    };
}

int commands_print_json(json_t *object, struct error *err)
{
    bool no_memory = !object || json_file_no_memory();
    int failed = no_memory || json_dumpf(object, stdout, JSON_INDENT(2) | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(9));
    json_decref(object);
    if (no_memory || json_file_no_memory())
        return error_set(err, ERR_MEMORY, "out of memory for the result");
    if (failed || putchar('\n') == EOF || fflush(stdout))
        return error_set(err, ERR_IO, "cannot write the result to stdout");
    return 0;
}

int commands_report_build(const struct build_result *result, const struct plan *plan, const char *out_dir,
                          struct error *err)
{
    char written[32], rate[32], memory[32];
    double bytes_per_s = result->seconds > 0 ? (double)result->source_bytes / result->seconds : 0;
    if (common.json)
        return commands_print_json(
            json_pack("{s:i, s:s, s:i, s:i, s:I, s:I, s:I, s:I, s:f, s:f, s:I}", "schema_version", 1, "out_dir",
                      out_dir, "tp_size", (int)plan->tp_size, "pp_size", (int)plan->pp_size, "source_bytes",
                      (json_int_t)result->source_bytes, "written_bytes", (json_int_t)result->written_bytes,
                      "rank_bytes", (json_int_t)result->rank_bytes, "largest_rank_bytes",
                      (json_int_t)result->largest_rank_bytes, "seconds", result->seconds, "source_bytes_per_s",
                      bytes_per_s, "peak_memory_bytes", (json_int_t)result->peak_memory_bytes),
            err);
    commands_note("%s: %u rank file%s, %s, in %.1f s (%s/s of source, peak memory %s)", out_dir, plan->num_ranks,
                  plan->num_ranks == 1 ? "" : "s", progress_bytes_text(written, result->rank_bytes), result->seconds,
                  progress_bytes_text(rate, (uint64_t)bytes_per_s),
                  progress_bytes_text(memory, result->peak_memory_bytes));
    return 0;
}
