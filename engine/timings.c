// --timings: where the time from exec to the first token went.
//
// exec     CPU time of the process before main: loading the program and its libraries
// open     from main until the last rank had read its file's head and begun to load
// read     waiting for the store, verify comparing checksums, decode unpacking, copy to a device: seconds of all loading threads together
// load     from the first rank's beginning to load until the last one had everything in place
// warm_up  of the slowest rank, beside the load: its buffers
// first_token  from main until the first result was there
//
// Phases overlap: that is what the loader is for.
#include "engine/commands.h"

#include "formats/tokenizer_text.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static double seconds(int64_t from_ns, int64_t to_ns)
{
    return from_ns && to_ns > from_ns ? 1e-9 * (double)(to_ns - from_ns) : 0;
}

static json_t *seconds_or_null(int64_t from_ns, int64_t to_ns)
{
    return to_ns ? json_real(seconds(from_ns, to_ns)) : json_null();
}

// Paths and words of the system are any bytes; JSON takes UTF-8 alone.
static json_t *text_of(const char *text)
{
    size_t bytes = strlen(text);
    char *copy = malloc(bytes + 1);
    if (!copy)
        return NULL;
    memcpy(copy, text, bytes + 1);
    for (size_t at = 0; (at += tokenizer_text_valid_prefix(copy + at, bytes - at)) < bytes;)
        copy[at] = '?';
    json_t *string = json_string(copy);
    free(copy);
    return string;
}

static json_t *describe_rank(const struct rank_start *start, int rank, uint64_t file_bytes)
{
    const struct load_figures *load = &start->load;
    int64_t loaded_ns = atomic_load(&start->loaded_ns);
    json_t *object =
        json_pack("{s:i, s:I, s:f, s:f, s:f, s:o}", "rank", rank, "file_bytes", (json_int_t)file_bytes, "begin_s",
                  seconds(program_start.main_ns, start->begin_ns), "open_s", seconds(start->begin_ns, start->opened_ns),
                  "warm_up_s", seconds(start->load_ns, start->prepared_ns), "loaded_s",
                  seconds_or_null(program_start.main_ns, loaded_ns));
    json_t *more =
        json_pack("{s:s, s:o, s:i, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:I, s:o}", "path", load_path_name(load->path),
                  "why", text_of(load->why), "threads", load->threads, "read_bytes", (json_int_t)load->read_bytes,
                  "read_s", load->read_s, "verify_s", load->verify_s, "decode_s", load->decode_s, "copy_s",
                  load->copy_s, "wall_s", load->wall_s, "cpu_s", start->cpu_s, "fetched_again",
                  (json_int_t)load->fetched_again, "note", text_of(start->note));
    if (object && more && (!loaded_ns || json_object_update(object, more) == 0)) {
        json_decref(more);
        return object;
    }
    json_decref(more);
    json_decref(object);
    return NULL;
}

static json_t *describe_phases(const struct start_figures *figures, uint32_t ranks)
{
    double read_s = 0, verify_s = 0, decode_s = 0, copy_s = 0, warm_up_s = 0;
    int64_t first_load_ns = INT64_MAX, last_load_ns = 0, last_loaded_ns = 0;
    bool loaded = true;
    for (uint32_t r = 0; r < ranks; r++) {
        const struct rank_start *start = &figures->ranks[r];
        int64_t loaded_ns = atomic_load(&start->loaded_ns);
        double own_s = seconds(start->load_ns, start->prepared_ns);
        read_s += start->load.read_s;
        verify_s += start->load.verify_s;
        decode_s += start->load.decode_s;
        copy_s += start->load.copy_s;
        warm_up_s = own_s > warm_up_s ? own_s : warm_up_s;
        first_load_ns = start->load_ns < first_load_ns ? start->load_ns : first_load_ns;
        last_load_ns = start->load_ns > last_load_ns ? start->load_ns : last_load_ns;
        last_loaded_ns = loaded_ns > last_loaded_ns ? loaded_ns : last_loaded_ns;
        loaded &= loaded_ns > 0;
    }
    return json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:o, s:f, s:o}", "exec", program_start.exec_s, "open",
                     seconds(program_start.main_ns, last_load_ns), "read", read_s, "verify", verify_s, "decode",
                     decode_s, "copy", copy_s, "load", seconds_or_null(first_load_ns, loaded ? last_loaded_ns : 0),
                     "warm_up", warm_up_s, "first_token",
                     seconds_or_null(program_start.main_ns, figures->first_token_ns));
}

int print_timings(struct session *session, struct error *err)
{
    const struct manifest *manifest = session_manifest(session);
    if (!program_start.timings)
        return 0;
    const struct start_figures *figures = session_start_figures(session);
    json_t *ranks = json_array();
    for (uint32_t r = 0; r < manifest->num_ranks; r++)
        json_array_append_new(ranks, describe_rank(&figures->ranks[r], (int)r, manifest->ranks[r].bytes));
    bool complete = ranks && json_array_size(ranks) == manifest->num_ranks;
    json_t *object = json_pack("{s:i, s:o, s:o}", "schema_version", 1, "phases",
                               describe_phases(figures, (uint32_t)manifest->num_ranks), "ranks", ranks);
    char *text = object && complete ? json_dumps(object, JSON_COMPACT | JSON_REAL_PRECISION(9)) : NULL;
    json_decref(object);
    if (!text)
        return error_set(err, ERR_MEMORY, "no memory for the timings");
    fprintf(stderr, "%s\n", text);
    free(text);
    return 0;
}
