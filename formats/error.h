// Errors are values: a code and one sentence. Library code never prints or exits; main prints err.msg once
// and exits with error_exit_code(). Thread rule: a struct error belongs to one thread.
#ifndef TPSHARD_FORMATS_ERROR_H
#define TPSHARD_FORMATS_ERROR_H

// The negated code is the exit status of both programs; the meanings are documented in README.md.
enum {
    ERR_OTHER = -1,     // anything that fits nowhere else
    ERR_USAGE = -2,     // wrong command line
    ERR_MODEL = -3,     // bad or unsupported model (checkpoint, config, tokenizer)
    ERR_CORRUPT = -4,   // corrupt or mismatched shards
    ERR_IO = -5,        // the operating system refused to read or write
    ERR_GPU = -6,       // device or driver
    ERR_RANK = -7,      // a rank was lost or a deadline passed
    ERR_MEMORY = -8,    // out of memory
    ERR_HINDERED = -9,  // tpengine doctor: something hinders
    ERR_SIGINT = -130,  // stopped by the user (SIGINT)
    ERR_SIGTERM = -143, // stopped by SIGTERM
};

enum { ERROR_MSG_BYTES = 768 };

struct error {
    int code;                  // 0 or one of the above
    char msg[ERROR_MSG_BYTES]; // one sentence: file, tensor, what was wanted, what was found, what to do
};

// Formats the sentence into err (which may be null) and returns code, so that a caller can write
// `return error_set(err, ERR_IO, ...)`. Control characters from hostile input are replaced by '?'.
int error_set(struct error *err, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

// Like error_set, with ": strerror(errno)" appended. ENOMEM and ENOSPC keep their meaning in the code:
// ENOMEM becomes ERR_MEMORY, everything else ERR_IO.
int error_set_errno(struct error *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

// A failure is never 0. Compilers and static analysis see one file at a time; this tells them, so that they know what a
// caller that checks the result may rely on.
static inline int error_nonzero(int code)
{
    if (code == 0)
        __builtin_unreachable();
    return code;
}
#define error_set(err, ...) error_nonzero((error_set)(err, __VA_ARGS__))
#define error_set_errno(err, ...) error_nonzero((error_set_errno)(err, __VA_ARGS__))

// Exit status for an error code: 0 for 0, -code else.
int error_exit_code(int code);

#endif
