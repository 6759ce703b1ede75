// Calibration statistics: the second moments of what a model's matrices multiply while it reads a text (formats/calibration_file.h). One layer
// at a time: all windows of the text go through a layer, their residuals wait in a file, and only that layer's moments are in memory. What is
// finished stays: an interrupted run goes on with the next layer. Any instruction set, any number of threads; the CPU backend alone.
#ifndef TPSHARD_ENGINE_CAPTURE_H
#define TPSHARD_ENGINE_CAPTURE_H

#include "engine/decoder.h"
#include "formats/calibration_file.h"

#include <stdint.h>

// The text, cut: every window begins at position 0 and has window_tokens tokens, the last one maybe fewer.
struct capture_text {
    const uint32_t *tokens;
    int64_t count, window_tokens;
};

// Called behind each layer that was done, and for layer -1 at the end.
typedef void capture_progress_fn(void *arg, int64_t layer);

// decoder: of one rank on the CPU backend, whose device holds a window's rows, a sequence of that length and pages 0, 1, ... for it. Residuals
// wait in `path`.residuals, 16 * hidden_size bytes for each token, which is removed at the end.
int capture_write(struct decoder *decoder, const struct capture_text *text, const char *path,
                  const struct calibration_header *header, capture_progress_fn *progress, void *arg, struct error *err);
// Most memory for moments at a time, and what the file will hold.
void capture_bytes(const struct model_desc *desc, uint64_t *memory_bytes, uint64_t *file_bytes);

#endif
