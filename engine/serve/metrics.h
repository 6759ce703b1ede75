// Counters, gauges and histograms of the server, in Prometheus' text format (version 0.0.4). Any thread may count; nothing blocks.
//
// Names, meanings and units are vLLM's behind the prefix "tpengine_", or with vllm_names behind "vllm:", so that dashboards and autoscalers made
// for it work unchanged. What it does not have (ranks, start-up, HTTP) is called tpengine_* either way.
#ifndef TPSHARD_ENGINE_SERVE_METRICS_H
#define TPSHARD_ENGINE_SERVE_METRICS_H

#include "engine/serve/engine.h"
#include "engine/serve/http_server.h"

#include <stdbool.h>
#include <stdint.h>

struct metrics;

// What is known of a request of the API at its end. Times in seconds; negative: did not happen.
struct request_record {
    const char *route;           // "/v1/chat/completions"
    int status;                  // HTTP
    const char *finish_reason;   // "stop", "length", "tool_calls", "abort", "error"; NULL: no generation
    struct sequence_usage usage; // tokens summed over n, times of the longest
    double first_token_s, end_s; // since the request was complete
};

int metrics_create(struct metrics **out, const char *model_name, bool vllm_names, struct error *err);
void metrics_free(struct metrics *metrics);
void metrics_request(struct metrics *metrics, const struct request_record *record);
void metrics_token_gap(struct metrics *metrics, double seconds); // between tokens of a stream
void metrics_http(struct metrics *metrics, int status);          // every answer, of the API or not
// How long a phase of the last start took; phase is a literal: "listen", "prepare", "load", "ready".
void metrics_cold_start(struct metrics *metrics, const char *phase, double seconds);
// The whole page; malloc'ed, NUL-terminated; NULL without memory. engine and server may be NULL.
char *metrics_text(struct metrics *metrics, struct engine *engine, const struct http_server *server);

#endif
