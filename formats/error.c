// Error values. See error.h.
#include "formats/error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

// These are the functions themselves; the macros of the same names are for their callers.
#undef error_set
#undef error_set_errno

static void replace_control_characters(char *text)
{
    for (; *text; text++)
        if ((unsigned char)*text < 0x20 || *text == 0x7f)
            *text = '?';
}

int error_set(struct error *err, int code, const char *fmt, ...)
{
    if (!err)
        return code;
    va_list args;
    va_start(args, fmt);
    vsnprintf(err->msg, sizeof err->msg, fmt, args);
    va_end(args);
    replace_control_characters(err->msg);
    err->code = code;
    return code;
}

int error_set_errno(struct error *err, const char *fmt, ...)
{
    int saved = errno;
    int code = saved == ENOMEM ? ERR_MEMORY : ERR_IO;
    if (!err)
        return code;
    va_list args;
    va_start(args, fmt);
    vsnprintf(err->msg, sizeof err->msg, fmt, args);
    va_end(args);
    size_t used = strlen(err->msg);
    char reason[128];
    const char *text = strerror_r(saved, reason, sizeof reason);
    snprintf(err->msg + used, sizeof err->msg - used, ": %s", text);
    replace_control_characters(err->msg);
    err->code = code;
    return code;
}

int error_exit_code(int code) { return code < 0 ? -code : code; }
