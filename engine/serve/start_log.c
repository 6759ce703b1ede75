// See start_log.h.
#include "engine/serve/start_log.h"

#include "engine/serve/log.h"

static void log_devices(const struct engine_stats *stats)
{
    for (int i = 0; i < stats->num_ranks; i++)
        if (stats->ranks[i].device[0])
            log_line(LOG_INFO, "device",
                     (struct log_field[]){{.key = "rank", .type = LOG_INTEGER, .integer = i},
                                          {.key = "device", .type = LOG_TEXT, .text = stats->ranks[i].device},
                                          {0}});
}

static void log_loads(struct session *session, const struct engine_stats *stats)
{
    const struct start_figures *start = session_start_figures(session);
    for (int i = 0; i < stats->num_ranks; i++) {
        const struct engine_rank *rank = &stats->ranks[i];
        const struct load_figures *load = &rank->load;
        log_line(LOG_INFO, "loaded",
                 (struct log_field[]){{.key = "rank", .type = LOG_INTEGER, .integer = i},
                                      {.key = "path", .type = LOG_TEXT, .text = load_path_name(load->path)},
                                      {.key = "why", .type = LOG_TEXT, .text = load->why},
                                      {.key = "threads", .type = LOG_INTEGER, .integer = load->threads},
                                      {.key = "read_bytes", .type = LOG_INTEGER, .integer = load->read_bytes},
                                      {.key = "file_bytes", .type = LOG_INTEGER, .integer = rank->file_bytes},
                                      {.key = "load_s", .type = LOG_SECONDS, .seconds = rank->load_s},
                                      {.key = "cpu_s", .type = LOG_SECONDS, .seconds = rank->load_cpu_s},
                                      {0}});
        if (start->ranks[i].note[0])
            log_line(LOG_WARNING, "not kept",
                     (struct log_field[]){{.key = "rank", .type = LOG_INTEGER, .integer = i},
                                          {.key = "reason", .type = LOG_TEXT, .text = start->ranks[i].note},
                                          {0}});
    }
}

void start_log(struct session *session, const struct engine_stats *stats)
{
    log_devices(stats);
    if (session_threads_note(session)[0])
        log_line(LOG_WARNING, "threads",
                 (struct log_field[]){{.key = "reason", .type = LOG_TEXT, .text = session_threads_note(session)}, {0}});
    log_loads(session, stats);
}
