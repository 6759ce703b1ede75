// tpengine logits: the raw logits of given tokens as a NumPy file, for comparison with other implementations.
#include "engine/commands.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct {
    const char *token_ids, *output;
} options;

const struct option_spec logits_options[] = {
    {"token-ids", OPTION_TEXT, &options.token_ids, "1,2,3", 0, 0, "the tokens, at positions 0, 1, 2 ..."},
    {"output", OPTION_TEXT, &options.output, "FILE.npy", 0, 0, "where the float32 array [tokens, vocab_size] goes"},
    SESSION_OPTION_LINES,
    {NULL, OPTION_FLAG, NULL, NULL, 0, 0, NULL},
};

// The .npy format, version 1.0: magic, header length, a Python dictionary padded to 64 bytes, then the array in C order.
static int write_npy(const char *path, const float *data, int64_t rows, int64_t cols, struct error *err)
{
    char header[128];
    memcpy(header, "\x93NUMPY\x01\x00\x76\x00", 10); // 0x76 = 118: the header's bytes after these ten
    int used = 10 + snprintf(header + 10, sizeof header - 10,
                             "{'descr': '<f4', 'fortran_order': False, 'shape': (%lld, %lld), }", (long long)rows,
                             (long long)cols);
    memset(header + used, ' ', sizeof header - (size_t)used);
    header[sizeof header - 1] = '\n';
    FILE *out = fopen(path, "we");
    if (!out)
        return error_set_errno(err, "%s", path);
    size_t count = (size_t)(rows * cols);
    bool ok = fwrite(header, 1, sizeof header, out) == sizeof header && fwrite(data, sizeof *data, count, out) == count;
    if (fclose(out) == 0 && ok)
        return 0;
    int rc = error_set_errno(err, "%s: writing", path);
    unlink(path); // half an array is worse than none
    return rc;
}

int logits_run(int argc, char **argv, struct error *err)
{
    (void)argc;
    struct session *session = NULL;
    struct token_list ids = {0};
    const float *logits;
    int rc;
    if (!options.token_ids || !options.output)
        return error_set(err, ERR_USAGE, "logits needs --token-ids 1,2,3 and --output FILE.npy");
    if ((rc = parse_token_ids(options.token_ids, &ids, err)))
        goto done;
    if (ids.count == 0) {
        rc = error_set(err, ERR_USAGE, "--token-ids holds no token");
        goto done;
    }
    if ((rc = choose_store(&session_options.store, argv[0], err)) ||
        (rc = session_open(&session, argv[0], &session_options, 1, (int64_t)ids.count, err)) ||
        (rc = session_forward(session, ids.ids, (int64_t)ids.count, 0, &logits, err)))
        goto done;
    int64_t vocab_size = session_manifest(session)->model.vocab_size;
    rc = write_npy(options.output, logits, (int64_t)ids.count, vocab_size, err);
    if (!rc && common_options.json)
        printf("{\"schema_version\": 1, \"tokens\": %zu, \"vocab_size\": %lld}\n", ids.count, (long long)vocab_size);
    if (!rc)
        rc = print_timings(session, err);
done:
    free(ids.ids);
    session_close(session);
    return rc;
}
