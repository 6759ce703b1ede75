// libcurl, loaded when the first URL is opened: it brings some thirty libraries, and to link with them would cost every start 20 ms that
// only those who load from a URL get something for.
#ifndef TPSHARD_ENGINE_STORE_CURL_H
#define TPSHARD_ENGINE_STORE_CURL_H

#include "formats/error.h"

#include <curl/curl.h>
#include <signal.h>

// Each by the name it has there without "curl_".
struct store_curl {
    __typeof__(&curl_global_init) global_init;
    __typeof__(&curl_easy_init) easy_init;
    __typeof__(&curl_easy_reset) easy_reset;
    __typeof__(&curl_easy_cleanup) easy_cleanup;
    __typeof__(&curl_easy_perform) easy_perform;
    __typeof__(&curl_easy_strerror) easy_strerror;
    __typeof__(&curl_slist_append) slist_append;
    __typeof__(&curl_slist_free_all) slist_free_all;
    CURLcode (*easy_setopt)(CURL *easy, CURLoption option, ...);
    CURLcode (*easy_getinfo)(CURL *easy, CURLINFO info, ...);
};

// ERR_IO: it is not installed. Stays loaded; any thread, but before others are forked away from.
int store_curl_load(const struct store_curl **out, struct error *err);

// Around what may write to a connection: before 7.87 OpenSSL did it in a way that raises SIGPIPE when the other end is gone. enter holds
// the signal back in this thread, leave throws away what came and restores the mask that enter returned.
sigset_t store_curl_enter(void);
void store_curl_leave(const sigset_t *before);

#endif
