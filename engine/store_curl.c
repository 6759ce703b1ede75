// See store_curl.h.
#include "engine/store_curl.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

static const struct {
    const char *name;
    size_t offset;
} functions[] = {
    {"curl_global_init", offsetof(struct store_curl, global_init)},
    {"curl_easy_init", offsetof(struct store_curl, easy_init)},
    {"curl_easy_reset", offsetof(struct store_curl, easy_reset)},
    {"curl_easy_cleanup", offsetof(struct store_curl, easy_cleanup)},
    {"curl_easy_perform", offsetof(struct store_curl, easy_perform)},
    {"curl_easy_strerror", offsetof(struct store_curl, easy_strerror)},
    {"curl_slist_append", offsetof(struct store_curl, slist_append)},
    {"curl_slist_free_all", offsetof(struct store_curl, slist_free_all)},
    {"curl_easy_setopt", offsetof(struct store_curl, easy_setopt)},
    {"curl_easy_getinfo", offsetof(struct store_curl, easy_getinfo)},
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct store_curl curl;
static bool is_loaded;

static int load(struct error *err)
{
    struct store_curl loaded;
    void *library = dlopen("libcurl.so.4", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        library = dlopen("libcurl-gnutls.so.4", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return error_set(err, ERR_IO,
                         "a model behind a URL needs libcurl.so.4, which this system lacks (Debian: libcurl4)");
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        void *function = dlsym(library, functions[i].name);
        if (!function) {
            dlclose(library);
            return error_set(err, ERR_IO, "libcurl.so.4 has no %s: it is too old", functions[i].name);
        }
        memcpy((char *)&loaded + functions[i].offset, &function, sizeof function);
    }
    if (loaded.global_init(CURL_GLOBAL_DEFAULT))
        return error_set(err, ERR_IO, "libcurl.so.4 does not start");
    curl = loaded;
    return 0;
}

int store_curl_load(const struct store_curl **out, struct error *err)
{
    pthread_mutex_lock(&mutex);
    int rc = is_loaded ? 0 : load(err);
    is_loaded = !rc;
    pthread_mutex_unlock(&mutex);
    if (!rc)
        *out = &curl;
    return rc;
}

sigset_t store_curl_enter(void)
{
    sigset_t pipe, before;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe, &before);
    return before;
}

void store_curl_leave(const sigset_t *before)
{
    static const struct timespec none = {0};
    sigset_t pipe;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    if (sigismember(before, SIGPIPE))
        return;
    while (sigtimedwait(&pipe, NULL, &none) == SIGPIPE) {
    }
    pthread_sigmask(SIG_SETMASK, before, NULL);
}
