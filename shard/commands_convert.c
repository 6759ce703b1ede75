// tpshard convert: checkpoint -> shard directory. See commands.h.
#include "shard/calibrate.h"
#include "shard/commands.h"
#include "shard/mix_text.h"
#include "shard/model_rows.h"
#include "shard/output_dir.h"
#include "shard/plan.h"
#include "shard/source_files.h"
#include "shard/statistics.h"
#include "shard/stop.h"

#include "formats/file_io.h"
#include "formats/tokenizer.h"
#include "kernels/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

static struct model_options model_options = MODEL_OPTIONS_DEFAULT;
static struct {
    int64_t threads;
    bool zstd, resume, force, dry_run;
    const char *calib, *calib_stats, *calib_method;
    int64_t calib_tokens;
} options = {.threads = -1, .calib_tokens = -1};

const struct option_spec convert_options[] = {
    MODEL_OPTION_SPECS(model_options),
    ZSTD_OPTION_SPEC(&options.zstd),
    THREADS_OPTION_SPEC(&options.threads),
    {"calib", OPTION_TEXT, &options.calib, "FILE", 0, 0,
     "quantize to four bits by what the matrices multiply while the model reads this text (plain, UTF-8): tpengine, "
     "which must stand beside tpshard, captures statistics first; out_dir.calib holds them and the weights in bf16 "
     "meanwhile, and both are removed at the end"},
    {"calib-stats", OPTION_TEXT, &options.calib_stats, "FILE", 0, 0,
     "with --calib: keep the statistics here, for verify --against, which needs them; alone: use those that are here"},
    {"calib-method", OPTION_CHOICE, &options.calib_method, "gptq|scales", 0, 0,
     "gptq (the default): codes make up for each other's errors; scales: the search for scales is weighted, and that "
     "is all"},
    {"calib-tokens", OPTION_INT, &options.calib_tokens, "N", 16, 1e9,
     "read the first N tokens of the text (default: 65536)"},
    {"resume", OPTION_FLAG, &options.resume, NULL, 0, 0, "go on with a run that was interrupted"},
    {"force", OPTION_FLAG, &options.force, NULL, 0, 0, "replace the model that is in out_dir"},
    {"dry-run", OPTION_FLAG, &options.dry_run, NULL, 0, 0, "write nothing; show what `tpshard plan` shows"},
    {0},
};

struct conversion {
    struct hf_config config;
    struct plan *plan;
    struct mix mix;
    struct model_rows rows;
    enum experts_mode experts;
    bool has_tokenizer;
    bool keep; // matrices of a quantized checkpoint as they are
    struct extras extras;
    struct source_files files;
    struct source_hasher *hasher;
    struct statistics_place place;
    struct calibration_file *statistics; // NULL: quantized without
    struct calibrate_source calibrated;
};

static int make_plan(struct conversion *c, const struct model_options *asked, struct error *err)
{
    struct plan_wish wish = commands_wish(asked, c->experts);
    wish.mix = &c->mix.choice;
    c->keep = plan_wish_keeps(&wish, c->rows.import);
    return plan_of_wish(&c->plan, &c->config.model, &c->rows.config, c->rows.import, &wish, err);
}

static void say_what_is_stored(const struct conversion *c)
{
    const char *first;
    char line[768];
    uint64_t mixed;
    char blocks[96];
    if (c->plan->quant.rotation) {
        rotate_text(blocks, sizeof blocks, c->plan);
        commands_note("note: rotated in blocks of %s%s", blocks,
                      c->config.model.tied_embeddings ? "; the head, which is the embedding, is stored apart from it"
                                                      : "");
    }
    if (c->mix.choice.list) {
        mix_text_line(line, sizeof line, c->mix.choice.list, c->mix.choice.count);
        commands_note("the layers' matrices take %.3f bits per weight: %s", c->mix.average, line);
    }
    if (!c->rows.import)
        return;
    if (!c->keep)
        commands_note("note: the checkpoint's weights (%s) are stored anew, with rounding; --quant keep stores them as "
                      "they are",
                      c->rows.config.name);
    else if ((mixed = import_mixed(c->rows.import, &first)) > 0)
        commands_note("note: %llu matrices are stored in bf16, since what is stored together is quantized in ways that "
                      "have no kind in common (the first begins with %s)",
                      (unsigned long long)mixed, first);
}

// The matrices that are not stored exactly, the worst first.
static void report_losses(const struct conversion *c)
{
    enum { SHOWN = 16 };
    struct import_loss *losses = NULL;
    uint64_t count = c->rows.import ? import_losses(c->rows.import, NULL, 0) : 0;
    if (count == 0)
        return;
    if (!(losses = calloc(count, sizeof *losses))) {
        commands_note("note: %llu matrices differ from the checkpoint's; there is no memory to list their errors",
                      (unsigned long long)count);
        return;
    }
    import_losses(c->rows.import, losses, count);
    commands_note("note: %llu matrices differ from the checkpoint's; error relative to the weights, root mean square:",
                  (unsigned long long)count);
    for (uint64_t i = 0; i < count && i < SHOWN; i++)
        commands_note("  %s %.3g %%", losses[i].source, 100 * losses[i].relative_rmse);
    if (count > SHOWN)
        commands_note("  the others: at most %.3g %%", 100 * losses[SHOWN].relative_rmse);
    free(losses);
}

static int threads(void) { return options.threads > 0 ? (int)options.threads : thread_pool_default_threads(); }

// Refuses now what would be refused behind heavy work.
static int check_out_dir(const char *out_dir, struct error *err)
{
    struct output_dir dir;
    int rc = output_dir_take(&dir, out_dir, options.force, true, err);
    if (!rc)
        output_dir_release(&dir, !dir.found_work);
    return rc;
}

// Everything that can be refused is refused here, before any heavy work: a mix of kinds, which measures the weights, comes behind all that does not need it.
static int prepare(struct conversion *c, const struct model_options *asked, const char *model_dir, const char *out_dir,
                   struct error *err)
{
    int rc;
    if ((rc = commands_check_mix(asked, err)) || (rc = commands_check_scales(asked, false, err)) ||
        (rc = commands_read_model(&c->config, &c->experts, model_dir, false, asked, err)) ||
        (rc = model_rows_open(&c->rows, model_dir, err)) ||
        (rc = extras_from_model(&c->extras, &c->has_tokenizer, model_dir, c->config.model.vocab_size, err)) ||
        (rc = source_files_list(&c->files, c->rows.checkpoint, model_dir, err)) ||
        (commands_mixes(asked) && (rc = check_out_dir(out_dir, err))) ||
        (rc = commands_make_mix(&c->mix, &c->config, model_dir, true, asked, threads(), err)) ||
        (rc = make_plan(c, asked, err)) || (rc = model_rows_init(&c->rows, c->plan, &c->config, err)))
        return rc;
    if (asked != &model_options) // for a capture: the notes are of the directory that was asked for
        return 0;
    char line[256];
    if (plan_empty_shares(c->plan, line, sizeof line))
        commands_note("warning: %s", line);
    if (!c->has_tokenizer)
        commands_note("note: %s has no tokenizer.json; the shards will work with token ids only, not with text",
                      model_dir);
    if (c->extras.warning[0])
        commands_note("warning: %s", c->extras.warning);
    if (c->rows.rounds_to_bf16)
        commands_note("note: the checkpoint's f16 or f32 weights are rounded to bf16");
    say_what_is_stored(c);
    return 0;
}

static int begin_hashing(void *arg, const struct progress *progress, struct error *err)
{
    struct conversion *c = arg;
    return source_hasher_start(&c->hasher, &c->files, progress, err);
}

static void cancel_hashing(void *arg)
{
    struct conversion *c = arg;
    struct error ignored;
    if (c->hasher)
        source_hasher_finish(c->hasher, true, &ignored);
    c->hasher = NULL;
}

static int take_sources(void *arg, struct manifest *manifest, struct error *err)
{
    struct conversion *c = arg;
    int rc = source_hasher_finish(c->hasher, false, err);
    c->hasher = NULL;
    if (rc || (rc = source_files_to_manifest(&c->files, manifest, err)) || !c->statistics)
        return rc;
    return calibrate_check_model(c->statistics, manifest, true, c->place.file, err); // now that the hashes are known
}

static int write_directory(struct build_result *result, struct conversion *c, const struct build_options *how,
                           struct error *err)
{
    char key[512], statistics[CHECKSUM128_HEX_DIGITS + 1];
    const struct manifest_quant *quant = &c->plan->quant;
    char mix[CHECKSUM128_HEX_DIGITS + 1];
    checksum128_to_hex(quant->statistics, statistics);
    checksum128_to_hex(checksum_whole(c->mix.choice.list, c->mix.choice.count * sizeof *c->mix.choice.list), mix);
    snprintf(key, sizeof key,
             "%s convert tp %u pp %u experts %s linear %d embedding %d head %d group %u keep %d%s%s%s %s %s%s%s",
             build_tool_name(), c->plan->tp_size, c->plan->pp_size, experts_mode_name(c->plan->experts), quant->linear,
             quant->embedding, quant->head, quant->group_size, c->keep, how->compress ? " zstd" : "",
             quant->scales == WEIGHT_SCALES_LARGEST ? " scales max" : "", quant->rotation ? " rot" : "",
             calibration_method_name(quant->calibration), statistics, quant->millibits ? " mix " : "",
             quant->millibits ? mix : "");
    struct build_input input = {
        .plan = c->plan,
        .source = c->calibrated.base ? &c->calibrated.source : c->rows.source,
        .extras = &c->extras,
        .key = source_files_key(&c->files, key),
        .what = "convert",
        .source_bytes = source_files_bytes(&c->files),
        .sources = take_sources,
        .begin = begin_hashing,
        .fail = cancel_hashing,
        .arg = c,
    };
    return build_directory(result, &input, how, err);
}

static void close_conversion(struct conversion *c)
{
    calibrate_source_clear(&c->calibrated);
    calibration_file_close(c->statistics);
    source_files_clear(&c->files);
    extras_clear(&c->extras);
    model_rows_close(&c->rows);
    commands_mix_clear(&c->mix);
    plan_free(c->plan);
}

// ---- calibration -------------------------------------------------------------------------------------------------

static bool calibrates(void) { return options.calib || options.calib_stats; }

// By themselves, before anything is read.
static int check_options(struct error *err)
{
    if (!calibrates())
        return options.calib_method || options.calib_tokens > 0
                   ? error_set(err, ERR_USAGE,
                               "--calib-method and --calib-tokens say how to use a text: they go with --calib")
                   : 0;
    if (options.calib_tokens > 0 && !options.calib)
        return error_set(err, ERR_USAGE, "--calib-tokens says how much of a text is read: it goes with --calib");
    if (strcmp(model_options.scales, "search") != 0)
        return error_set(err, ERR_USAGE, "--calib searches scales, and --scales max does not: leave out one of them");
    return 0;
}

static int check_kinds(const struct conversion *c, struct error *err)
{
    if (c->keep)
        return error_set(
            err, ERR_USAGE,
            "--calib decides how weights are rounded, and what the checkpoint holds quantized is kept as it "
            "is: say --quant int4 to store it anew");
    if (calibrate_weights(c->plan) == 0)
        return error_set(err, ERR_USAGE,
                         "--calib decides about weights of four bits, of which there are none: say --quant int4");
    return 0;
}

// The description and the files of the checkpoint, as statistics name them.
static int describe(const struct conversion *c, struct manifest *out, struct error *err)
{
    out->version = MANIFEST_VERSION;
    out->model = c->plan->model;
    out->quant = c->plan->quant;
    return source_files_to_manifest(&c->files, out, err);
}

// What a capture runs on: the model as it is, or rotated, for one rank.
static int write_reference(const char *model_dir, const char *out_dir, struct error *err)
{
    struct model_options plain = model_options;
    struct conversion reference = {0};
    struct build_result result;
    const struct build_options how = {
        .out_dir = out_dir, .force = true, .resume = true, .quiet = common.quiet, .threads = threads()};
    plain.tp = plain.pp = 1;
    plain.quant = "none";
    plain.bits = -1;
    plain.kinds = plain.sensitivity = plain.among = plain.group_size = NULL;
    plain.embed = plain.head = NULL;
    plain.experts = "tp";
    plain.scales = "search";
    int rc = prepare(&reference, &plain, model_dir, out_dir, err);
    if (!rc)
        rc = write_directory(&result, &reference, &how, err);
    close_conversion(&reference);
    return rc;
}

static int capture(const struct conversion *c, const struct statistics_wish *wish, const char *model_dir,
                   const char *out_dir, struct error *err)
{
    int rc;
    if (!c->has_tokenizer)
        return error_set(err, ERR_USAGE, "%s has no tokenizer.json, and --calib needs one to read the text", model_dir);
    if ((rc = statistics_check(&c->place, wish, err)) || (rc = check_out_dir(out_dir, err)) ||
        (rc = statistics_place_take(&c->place, err)))
        return rc;
    stop_install();
    commands_note("note: capturing statistics; the weights stand in %s in bf16 meanwhile", c->place.shards);
    if ((rc = write_reference(model_dir, c->place.shards, err)) || (rc = statistics_capture(&c->place, wish, err)))
        return rc;
    statistics_remove_shards(&c->place);
    return 0;
}

// Tokens of the whole text.
static int count_tokens(const struct conversion *c, const char *path, uint64_t *count, struct error *err)
{
    enum { TEXT_CAP_BYTES = 1 << 30 };
    struct tokenizer *tokenizer = NULL;
    struct token_list ids = {0};
    uint8_t *text = NULL;
    uint64_t bytes;
    size_t image = 0;
    while (image < c->extras.count && strcmp(c->extras.files[image].name, "tokenizer.bin") != 0)
        image++;
    if (image == c->extras.count)
        return error_set(err, ERR_USAGE, "there is no tokenizer.json to count the tokens of %s", path);
    int rc = tokenizer_open(&tokenizer, c->extras.files[image].bytes, c->extras.files[image].num_bytes,
                            "tokenizer.json", err);
    if (!rc && (rc = file_read_all(&text, &bytes, path, TEXT_CAP_BYTES, ERR_USAGE, err)) == 0)
        rc = tokenizer_encode(tokenizer, (const char *)text, bytes, 0, &ids, err);
    *count = ids.count;
    free(ids.ids);
    free(text);
    tokenizer_close(tokenizer);
    return rc;
}

// Statistics that are there are of as many tokens as are wished, or of the whole text where that has fewer.
static int check_tokens(const struct conversion *c, const struct statistics_wish *wish, struct error *err)
{
    const struct calibration_header *header = calibration_file_header(c->statistics);
    uint64_t windows = (header->tokens + header->window_tokens - 1) / header->window_tokens, all = 0;
    uint64_t read = header->tokens - (c->plan->model.bos_token_id >= 0 ? windows : 0); // each begins with that token
    int rc;
    if (read == (uint64_t)wish->tokens)
        return 0;
    if (read < (uint64_t)wish->tokens && ((rc = count_tokens(c, wish->text, &all, err)) || read == all))
        return rc;
    return error_set(err, ERR_USAGE,
                     "%s: these statistics were captured from %llu tokens of the text, and wanted are %lld; say "
                     "--calib-tokens %llu to use them, or remove the file",
                     c->place.file, (unsigned long long)read, (long long)wish->tokens, (unsigned long long)read);
}

static int get_statistics(struct conversion *c, const char *model_dir, const char *out_dir, struct error *err)
{
    const struct statistics_wish wish = {
        .text = options.calib,
        .file = options.calib_stats,
        .tokens = options.calib_tokens > 0 ? options.calib_tokens : 65536,
        .threads = threads(),
        .quiet = common.quiet,
    };
    struct manifest *manifest = calloc(1, sizeof *manifest);
    int rc;
    if (!manifest)
        return error_set(err, ERR_MEMORY, "out of memory");
    if ((rc = statistics_place_make(&c->place, out_dir, &wish, err)) || (rc = describe(c, manifest, err)) ||
        (rc = statistics_open(&c->statistics, &c->place, &wish, manifest, err)))
        goto done;
    if (c->statistics) {
        rc = wish.text ? check_tokens(c, &wish, err) : 0;
        goto done;
    }
    if ((rc = capture(c, &wish, model_dir, out_dir, err)))
        goto done;
    const struct statistics_wish captured = {.file = wish.file}; // there now, or the reason why it cannot be used
    rc = statistics_open(&c->statistics, &c->place, &captured, manifest, err);
done:
    manifest_free(manifest);
    return rc;
}

static int calibrate(struct conversion *c, const char *model_dir, const char *out_dir, struct error *err)
{
    struct manifest_quant *quant = &c->plan->quant;
    enum calibration_method method = CALIBRATION_GPTQ;
    int rc;
    if (options.calib_method)
        calibration_method_from_name(options.calib_method, &method);
    if ((rc = calibrate_check_memory(c->plan, method, err)) || (rc = get_statistics(c, model_dir, out_dir, err)))
        return rc;
    quant->calibration = method;
    quant->statistics = calibration_file_hash(c->statistics);
    if ((rc = calibrate_source_init(&c->calibrated, c->rows.source, c->plan, c->statistics, method, err)))
        return rc;
    uint64_t tokens = calibration_file_header(c->statistics)->tokens, widest = calibrate_widest(c->plan);
    if (method == CALIBRATION_GPTQ && tokens < widest)
        commands_note(
            "note: the statistics are of %llu tokens and the widest matrix has %llu columns; more tokens than "
            "columns say more",
            (unsigned long long)tokens, (unsigned long long)widest);
    return 0;
}

// tpengine, which read the text, is the only child.
static void say_cost(const struct conversion *c, double seconds)
{
    struct rusage children;
    double weights = (double)calibrate_weights(c->plan), per_billion = 1 / 60.0 / (1e-9 * weights);
    getrusage(RUSAGE_CHILDREN, &children);
    double reading = (double)(children.ru_utime.tv_sec + children.ru_stime.tv_sec) +
                     1e-6 * (double)(children.ru_utime.tv_usec + children.ru_stime.tv_usec);
    commands_note("note: %.3g million weights were quantized by statistics; CPU minutes per billion: %.2f to read the "
                  "text, %.2f to round",
                  1e-6 * weights, reading * per_billion, seconds * per_billion);
}

// ---- the command -------------------------------------------------------------------------------------------------

static int convert(struct conversion *c, const char *out_dir, struct error *err)
{
    const struct build_options how = {
        .out_dir = out_dir,
        .force = options.force,
        .resume = options.resume,
        .quiet = common.quiet,
        .compress = options.zstd,
        .threads = threads(),
    };
    struct build_result result;
    double begin = clock_process_cpu_s();
    int rc = write_directory(&result, c, &how, err);
    if (rc)
        return rc;
    report_losses(c);
    if (c->statistics) {
        say_cost(c, clock_process_cpu_s() - begin);
        statistics_place_remove(&c->place);
    }
    return commands_report_build(&result, c->plan, out_dir, err);
}

int convert_run(int argc, char **argv, struct error *err)
{
    struct conversion conversion = {0};
    int rc = check_options(err);
    if (rc)
        return rc;
    if (options.dry_run)
        return plan_report(argv[0], &model_options, err);
    if (argc < 2)
        return error_set(err, ERR_USAGE, "convert needs two arguments: model_dir out_dir");
    if (!(rc = prepare(&conversion, &model_options, argv[0], argv[1], err)) && calibrates() &&
        !(rc = check_kinds(&conversion, err)))
        rc = calibrate(&conversion, argv[0], argv[1], err);
    if (!rc)
        rc = convert(&conversion, argv[1], err);
    close_conversion(&conversion);
    return rc;
}
