// Files: opened without ever blocking, read and written in full, replaced as a whole.
// Every function returns 0 or a negative code with err filled; anything the operating system refuses is ERR_IO
// (ERR_MEMORY for want of memory). Paths appear in messages as given. Safe to call from any thread.
#ifndef TPSHARD_FORMATS_FILE_IO_H
#define TPSHARD_FORMATS_FILE_IO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "formats/error.h"

// Opens a regular file for reading; symbolic links are followed (Hugging Face's cache is made of them). A FIFO,
// directory, socket or device is refused with a sentence and is never waited for.
// Success: the caller owns *fd (close) and *file_bytes is the size now. file_bytes may be null.
int file_open_read(int *fd, uint64_t *file_bytes, const char *path, struct error *err);

// Whether the name exists: what cannot be found out is an error, not an absence. A link that leads nowhere is there: reading it
// gives the reason.
int file_is_there(bool *there, const char *path, struct error *err);

// Reads exactly num_bytes at offset, through interruptions and short reads. A file that ends before is ERR_IO:
// it shrank since its size was taken. path is for the message.
int file_pread_full(int fd, void *buffer, uint64_t num_bytes, uint64_t offset, const char *path, struct error *err);
int file_pwrite_full(int fd, const void *buffer, uint64_t num_bytes, uint64_t offset, const char *path,
                     struct error *err);

// Reads a whole regular file of at most cap_bytes; a larger one is refused with too_large_code before anything is
// read. Success: the caller owns *out (free), *num_bytes long and followed by one NUL byte.
int file_read_all(uint8_t **out, uint64_t *num_bytes, const char *path, uint64_t cap_bytes, int too_large_code,
                  struct error *err);

// Makes dir_path/name hold exactly these bytes or, on failure or a crash at any moment, what it held before: writes
// a temporary file beside it, syncs, renames, syncs the directory. name is a plain file name. A crash can leave
// a file ".<name>.tmp-*" behind; a failure leaves none.
int file_write_atomic(const char *dir_path, const char *name, const void *bytes, uint64_t num_bytes, struct error *err);

// Gives a file its length and takes the space at once, so that a full disk is found before the work and not after. What was not there before
// reads as zeros. File systems that cannot reserve give the length alone.
int file_take_space(int fd, uint64_t num_bytes, const char *path, struct error *err);
// Makes what was written durable.
int file_sync(int fd, const char *path, struct error *err);

// Makes renames and new names in a directory durable. File systems that cannot sync a directory count as synced.
int file_sync_dir(const char *dir_path, struct error *err);

#endif
