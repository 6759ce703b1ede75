// Calibration files. Their checksums would stop nearly every mutation, so the target computes those of the header and of the heads of records anew
// (numbers keep theirs: their checks come last), wherever a head can stand. Whatever is accepted is in order and can be found; the writer goes on
// with any bytes or refuses them, and what it takes for finished holds heads that are sound.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "formats/calibration_file.h"
#include "formats/checked.h"
#include "formats/checksum.h"
#include "tests/fuzz/fuzz.h"

enum { HEADER_BYTES = 128, RECORD_BYTES = 64, MAX_FILE_BYTES = 1 << 16, MAX_COLS = 128 };

static uint8_t file[MAX_FILE_BYTES];
static float triangle[MAX_COLS * (MAX_COLS + 1) / 2];
static char path[64];
static int fd = -1;

static uint64_t field(size_t at, size_t bytes)
{
    uint64_t value = 0;
    memcpy(&value, file + at, bytes);
    return value;
}

static void put_checksum(size_t at, size_t begin, size_t count)
{
    uint64_t checksum = checksum_leaf(file + begin, count);
    memcpy(file + at, &checksum, sizeof checksum);
}

// Heads and numbers, as far as columns say where the next head is.
static void put_checksums(size_t size)
{
    if (size < HEADER_BYTES)
        return;
    put_checksum(HEADER_BYTES - 8, 0, HEADER_BYTES - 8);
    for (size_t at = HEADER_BYTES; size - at >= RECORD_BYTES;) {
        uint64_t cols = field(at + 24, 8), diagonal = cols * sizeof(float), next = at + RECORD_BYTES;
        bool has_triangle = field(at + 20, 4) != 0;
        if (field(at + 4, 4) == 1 && cols <= MAX_COLS) {
            uint64_t elems = has_triangle ? calibration_triangle_elems(cols) : 0, begin = next + round_up(diagonal, 64);
            uint64_t end = begin + round_up(elems * sizeof(float), 64);
            if (end <= size) {
                put_checksum(at + 40, next, diagonal);
                if (has_triangle)
                    put_checksum(at + 48, begin, elems * sizeof(float));
                next = end;
            }
        }
        put_checksum(at + RECORD_BYTES - 8, at, RECORD_BYTES - 8);
        at = next;
    }
}

static void put_file(size_t size)
{
    if (fd < 0) {
        fd = memfd_create("fuzz", MFD_CLOEXEC);
        CHECK(fd >= 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    CHECK(ftruncate(fd, 0) == 0 && pwrite(fd, file, size, 0) == (ssize_t)size);
}

static void check_reader(bool *accepted)
{
    struct calibration_file *opened = NULL;
    struct error err = {0};
    int rc = calibration_file_open(&opened, path, &err);
    *accepted = rc == 0;
    if (rc) {
        CHECK(rc == ERR_CORRUPT && err.msg[0] && !opened);
        return;
    }
    for (uint64_t i = 0; i < calibration_file_count(opened); i++) {
        bool has_triangle, found_triangle;
        const struct calibration_moments *m = calibration_file_at(opened, i, &has_triangle);
        CHECK(m->cols > 0 && m->cols <= CALIBRATION_MAX_COLS && m->input < CALIBRATION_INPUT_COUNT);
        CHECK(m == calibration_file_find(opened, m->input, m->layer, m->expert, &found_triangle));
        CHECK(has_triangle == found_triangle);
        for (uint64_t c = 0; c < m->cols; c++)
            CHECK(m->diagonal[c] >= 0 && m->diagonal[c] * 0 == 0);
        if (has_triangle && m->cols <= MAX_COLS && (rc = calibration_file_triangle(opened, m, triangle, &err)) != 0)
            CHECK(rc == ERR_CORRUPT && err.msg[0]);
    }
    calibration_file_close(opened);
}

static void check_writer(size_t size, bool accepted)
{
    struct calibration_header header;
    struct calibration_writer *writer = NULL;
    struct error err = {0};
    uint32_t layers_done = 0;
    bool finished = false;
    if (size < sizeof header)
        return;
    memcpy(&header, file, sizeof header);
    int rc = calibration_writer_open(&writer, path, &header, &layers_done, &finished, &err);
    CHECK(rc == 0); // the header is the same
    CHECK(!accepted || finished);
    CHECK(finished || layers_done <= header.num_layers);
    calibration_writer_close(writer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    bool accepted;
    if (size > MAX_FILE_BYTES)
        return 0;
    memcpy(file, data, size);
    put_checksums(size);
    put_file(size);
    check_reader(&accepted);
    check_writer(size, accepted);
    return 0;
}
