// What the commands share. See commands.h.
#include "shard/commands.h"

#include <stdarg.h>
#include <stdio.h>

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

int commands_print_json(json_t *object, struct error *err)
{
    int failed = !object || json_dumpf(object, stdout, JSON_INDENT(2) | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(9));
    json_decref(object);
    if (failed || putchar('\n') == EOF || fflush(stdout))
        return error_set(err, ERR_IO, "cannot write the result to stdout");
    return 0;
}

int commands_report_build(const struct build_result *result, const struct plan *plan, const char *out_dir,
                          struct error *err)
{
    char written[32], rate[32], memory[32];
    double bytes_per_s = result->seconds > 0 ? (double)result->source_bytes / result->seconds : 0;
    uint64_t largest_rank_bytes = 0;
    for (uint32_t rank = 0; rank < plan->tp_size; rank++)
        if (plan->ranks[rank].file_bytes > largest_rank_bytes)
            largest_rank_bytes = plan->ranks[rank].file_bytes;
    if (common.json)
        return commands_print_json(
            json_pack("{s:i, s:s, s:i, s:I, s:I, s:I, s:f, s:f, s:I}", "schema_version", 1, "out_dir", out_dir,
                      "tp_size", (int)plan->tp_size, "source_bytes", (json_int_t)result->source_bytes, "written_bytes",
                      (json_int_t)result->written_bytes, "largest_rank_bytes", (json_int_t)largest_rank_bytes,
                      "seconds", result->seconds, "source_bytes_per_s", bytes_per_s, "peak_memory_bytes",
                      (json_int_t)result->peak_memory_bytes),
            err);
    commands_note("%s: %u rank file%s, %s, in %.1f s (%s/s of source, peak memory %s)", out_dir, plan->tp_size,
                  plan->tp_size == 1 ? "" : "s", progress_bytes_text(written, result->written_bytes), result->seconds,
                  progress_bytes_text(rate, (uint64_t)bytes_per_s),
                  progress_bytes_text(memory, result->peak_memory_bytes));
    return 0;
}
