// See repair_hint.h.
#include "formats/repair_hint.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

const char *repair_hint(char out[REPAIR_HINT_BYTES], const char *name)
{
    static const char plain[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./-";
    const char *slash = strrchr(name, '/'), *dir = slash ? name : ".", *quote = "", *where = "", *here = "";
    int length = slash ? (int)(slash - name) + (slash == name) : 1;
    if (strstr(name, "://"))
        where = " where it was published";
    if (*where || length > REPAIR_HINT_BYTES / 2 || memchr(dir, '\'', (size_t)length)) {
        dir = "DIR";
        length = 3;
    } else if (strspn(dir, plain) < (size_t)length) {
        quote = "'";
    }
    if (*dir == '-') // no option
        here = "./";
    snprintf(out, REPAIR_HINT_BYTES,
             "repair it%s: tpshard repair %s%s%.*s%s --from SOURCE, the checkpoint or another copy", where, quote, here,
             length, dir, quote);
    return out;
}

int repair_hint_unopened(const char *path, struct error *err)
{
    char hint[REPAIR_HINT_BYTES];
    struct error cause = *err;
    struct stat status;
    if (stat(path, &status)) {
        if (errno != ENOENT && errno != ELOOP && errno != ENOTDIR)
            return cause.code;
        if (!lstat(path, &status) && S_ISLNK(status.st_mode))
            return error_set(err, ERR_CORRUPT, "%s: is a symbolic link that leads nowhere; remove it, then %s", path,
                             repair_hint(hint, path));
        return error_set(err, ERR_IO, "%s: there is no such file; %s", path, repair_hint(hint, path));
    }
    return S_ISREG(status.st_mode)
               ? cause.code
               : error_set(err, ERR_CORRUPT, "%s; remove it, then %s", cause.msg, repair_hint(hint, path));
}
