// tpengine: the table of commands. Each command lives in a file of its own.
#include "engine/commands.h"

#include "engine/store_url.h"
#include "formats/json_file.h"
#include "kernels/clock.h"
#include "version.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct common_options common_options;
struct session_options session_options;
struct place_options place_options;
struct program_start program_start;

static const struct option_spec common[] = {
    {"json", OPTION_FLAG, &common_options.json, NULL, 0, 0, "report as one JSON object on standard output"},
    {"quiet", OPTION_FLAG, &common_options.quiet, NULL, 0, 0, "no notes on standard error"},
    {NULL, OPTION_FLAG, NULL, NULL, 0, 0, NULL},
};

// Commands that run ranks.
#define AMONG_RANKS(command)                                                                                           \
    static int command##_among_ranks(int argc, char **argv, struct error *err)                                         \
    {                                                                                                                  \
        return run_among_ranks(command##_run, argc, argv, err);                                                        \
    }
AMONG_RANKS(generate)
AMONG_RANKS(serve)
AMONG_RANKS(bench)
AMONG_RANKS(eval)
AMONG_RANKS(advise)
AMONG_RANKS(logits)

static const struct command_spec commands[] = {
    {"generate", "out_dir", 1, 1, "continue one or several prompts, streaming text to standard output",
     generate_options, generate_among_ranks},
    {"serve", "out_dir", 1, 1, "serve an OpenAI-compatible API over HTTP", serve_options, serve_among_ranks},
    {"bench", "out_dir", 1, 1, "measure prefill and decode; one result line", bench_options, bench_among_ranks},
    {"eval", "out_dir", 1, 1, "perplexity of a text; with a reference, KL divergence, agreement and errors by layer",
     eval_options, eval_among_ranks},
    {"advise", "out_dir", 1, 1,
     "measure what each codec of the sums over ranks costs; with --write, the advice that --wire auto takes",
     advise_options, advise_among_ranks},
    {"logits", "out_dir", 1, 1, "logits of token ids as a NumPy file, float32 [tokens, vocab_size]", logits_options,
     logits_among_ranks},
    {"tokenize", "out_dir TEXT|-", 2, 2, "token ids of a text, or with --decode the reverse", tokenize_options,
     tokenize_run},
    {"capture", "out_dir", 1, 1, "statistics of a model's inputs over a text, for tpshard convert --calib-stats",
     capture_options, capture_run},
    {"doctor", "", 0, 0,
     "what this machine offers to ranks: cards, links, times of exchanges, and the one thing to change", doctor_options,
     doctor_run},
    {NULL, NULL, 0, 0, NULL, NULL, NULL},
};

// A rank's process that does not begin would be waited for.
static void refused(const struct command_spec *command, const struct error *why)
{
    int (*const among_ranks[])(int, char **, struct error *) = {generate_among_ranks, serve_among_ranks,
                                                                bench_among_ranks,    eval_among_ranks,
                                                                advise_among_ranks,   logits_among_ranks};
    for (size_t i = 0; i < sizeof among_ranks / sizeof among_ranks[0]; i++)
        if (command->run == among_ranks[i])
            session_tell_others(&session_options, why);
}

static const struct program_spec program = {
    .refused = refused,
    .name = "tpengine",
    .summary = "run a sharded language model on tensor-parallel ranks",
    .version = TPSHARD_VERSION " (" TPSHARD_COMMIT ")",
    .environment_prefix = "TPENGINE_",
    .commands = commands,
    .common = common,
    .examples = "Examples:\n"
                "  tpengine generate out_dir --prompt \"Once upon a time\" --max-tokens 100\n"
                "  tpengine serve out_dir --port 8000 --api-key KEY\n"
                "  tpengine serve https://bucket.example/models/llama-70b-tp4 --cache /var/cache/tpengine\n"
                "  tpengine eval out_dir --text heldout.txt --json\n\n"
                "out_dir may be an http:// or https:// URL. TPENGINE_TOKEN of the environment is sent to it as a "
                "bearer token;\n"
                "SSL_CERT_FILE names authorities to trust instead of the system's.\n",
    .exit_status = "0    done\n1    other failure\n2    wrong command line\n3    bad or unsupported model\n4    "
                   "corrupt or mismatched "
                   "shards\n5    input or output failed\n6    GPU or driver\n7    a rank was lost or a deadline "
                   "passed\n8    out of "
                   "memory\n9    doctor: something hinders\n130  interrupted\n143  terminated",
};

int choose_store(struct store_options *out, const char *place, struct error *err)
{
    const char *token = getenv("TPENGINE_TOKEN");
    uint64_t limit = place_options.cache_limit_bytes;
    bool has_cache = place_options.cache_dir && place_options.cache_dir[0];
    if (limit && !has_cache)
        return error_set(err, ERR_USAGE, "--cache-limit without --cache DIR: there is nothing to limit");
    if (has_cache && place && !store_url_is_one(place) && !common_options.quiet)
        fprintf(stderr, "--cache is not used: %s is a directory\n", place);
    *out = (struct store_options){
        .cache_dir = has_cache ? place_options.cache_dir : NULL,
        .cache_limit_bytes = limit > INT64_MAX ? INT64_MAX : (int64_t)limit,
        .bearer_token = token && token[0] ? token : NULL,
    };
    return 0;
}

int print_report(json_t *report, struct error *err)
{
    char *text = report && !json_file_no_memory() ? json_dumps(report, JSON_INDENT(2) | JSON_REAL_PRECISION(17)) : NULL;
    json_decref(report);
    if (!text)
        return error_set(err, ERR_MEMORY, "no memory for the report");
    puts(text);
    free(text);
    return 0;
}

int read_text(const char *path, char **out, size_t *bytes, struct error *err)
{
    enum { MAX_TEXT_BYTES = 1 << 30 };
    bool standard = strcmp(path, "-") == 0;
    FILE *in = standard ? stdin : fopen(path, "re");
    if (!in)
        return error_set_errno(err, "%s", path);
    size_t capacity = 1 << 16, used = 0;
    char *text = malloc(capacity);
    int rc = 0;
    while (text) {
        used += fread(text + used, 1, capacity - used - 1, in);
        if (used + 1 < capacity || used > MAX_TEXT_BYTES)
            break;
        char *larger = realloc(text, capacity *= 2);
        if (!larger)
            free(text);
        text = larger;
    }
    if (!text)
        rc = error_set(err, ERR_MEMORY, "%s: no memory for the text", path);
    else if (used > MAX_TEXT_BYTES)
        rc = error_set(err, ERR_USAGE, "%s: more than 1 GiB of text", path);
    else if (ferror(in))
        rc = error_set_errno(err, "%s: reading", path);
    if (!standard)
        fclose(in);
    if (rc) {
        free(text);
        return rc;
    }
    text[used] = 0;
    *out = text;
    *bytes = used;
    return 0;
}

static void end_at_once(int number)
{
    static const char *const sentences[] = {"tpengine: stopped by SIGINT\n", "tpengine: stopped by SIGTERM\n"};
    const char *sentence = sentences[number == SIGTERM];
    ssize_t written = write(STDERR_FILENO, sentence, strlen(sentence));
    (void)written; // who does not listen sees the status
    _exit(128 + number);
}

// Until ranks run, a signal has nothing to put in order, but an exit status that is documented. One that is ignored stays so.
static void handle_signal(int number)
{
    struct sigaction now;
    if (sigaction(number, NULL, &now) == 0 && now.sa_handler == SIG_DFL)
        signal(number, end_at_once);
}

int main(int argc, char **argv)
{
    program_start = (struct program_start){.main_ns = clock_now_ns(), .exec_s = clock_process_cpu_s()};
    handle_signal(SIGINT);
    handle_signal(SIGTERM);
    session_options = session_defaults;
    serve_set_defaults();
    return options_main(&program, argc, argv);
}
