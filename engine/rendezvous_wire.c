// Messages of a rendezvous and their tags. See rendezvous_wire.h.
#include "engine/rendezvous_wire.h"

#include <dlfcn.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

// OpenSSL, of which few runs need anything: loaded by the first that does.
static struct {
    unsigned char *(*hmac)(const EVP_MD *, const void *, int, const unsigned char *, size_t, unsigned char *,
                           unsigned *);
    const EVP_MD *(*sha256)(void);
} crypto;

static void load_crypto(void)
{
    void *library = dlopen("libcrypto.so.3", RTLD_NOW | RTLD_LOCAL);
    if (!library && !(library = dlopen("libcrypto.so.1.1", RTLD_NOW | RTLD_LOCAL)))
        return;
    *(void **)&crypto.sha256 = dlsym(library, "EVP_sha256");
    *(void **)&crypto.hmac = crypto.sha256 ? dlsym(library, "HMAC") : NULL;
} // cppcheck-suppress resourceLeak ; it stays loaded on purpose

// False where there is none to be had.
static bool hmac_sha256(uint8_t out[32], const void *key, size_t key_bytes, const void *text, size_t bytes)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    unsigned length = 32;
    pthread_once(&once, load_crypto);
    return crypto.hmac && crypto.hmac(crypto.sha256(), key, (int)key_bytes, text, bytes, out, &length);
}

// In a time that says nothing of where they differ.
static bool tags_equal(const uint8_t *a, const uint8_t *b)
{
    volatile uint8_t differ = 0;
    for (size_t i = 0; i < MEET_TAG_BYTES; i++)
        differ |= a[i] ^ b[i];
    return differ == 0;
}

int meet_key(uint8_t key[MEET_KEY_BYTES], const char *token, const char *job, struct error *err)
{
    static const char domain[] = "tpengine rendezvous 1: ";
    char text[sizeof domain + 512];
    size_t used = sizeof domain - 1, bytes = strnlen(job, 511);
    memcpy(text, domain, used);
    memcpy(text + used, job, bytes);
    token = token ? token : "";
    return hmac_sha256(key, token, strlen(token), text, used + bytes)
               ? 0
               : error_set(err, ERR_OTHER,
                           "ranks know each other by HMAC-SHA256 of OpenSSL's libcrypto.so, which this system lacks "
                           "(Debian: libssl3)");
}

int meet_nonce(uint8_t nonce[MEET_NONCE_BYTES], struct error *err)
{
    return getrandom(nonce, MEET_NONCE_BYTES, 0) == MEET_NONCE_BYTES
               ? 0
               : error_set_errno(err, "no random numbers can be had");
}

// Of what was said with the tag left out, behind the other side's nonce. False, and a tag of zeros, where there is none to be had.
static bool tag_of(uint8_t tag[MEET_TAG_BYTES], const uint8_t *key, const uint8_t *nonce, const uint8_t *said,
                   size_t bytes, size_t tag_at)
{
    enum { MOST = MEET_NONCE_BYTES + MEET_ANSWER_MAX_BYTES };
    uint8_t text[MOST];
    memcpy(text, nonce, MEET_NONCE_BYTES);
    memcpy(text + MEET_NONCE_BYTES, said, bytes);
    memset(text + MEET_NONCE_BYTES + tag_at, 0, MEET_TAG_BYTES);
    if (hmac_sha256(tag, key, MEET_KEY_BYTES, text, MEET_NONCE_BYTES + bytes))
        return true;
    memset(tag, 0, MEET_TAG_BYTES);
    return false;
}

void meet_hello_seal(struct meet_hello *hello, const uint8_t *key, const uint8_t *nonce)
{
    uint8_t tag[MEET_TAG_BYTES];
    tag_of(tag, key, nonce, (const uint8_t *)hello, sizeof *hello, offsetof(struct meet_hello, tag));
    memcpy(hello->tag, tag, sizeof tag);
}

bool meet_is_code(int32_t code) { return code < 0 && code >= -255; }

int meet_hello_check(const struct meet_hello *h, const uint8_t *key, const uint8_t *nonce, bool *genuine,
                     struct error *err)
{
    uint8_t tag[MEET_TAG_BYTES];
    if (memcmp(h->magic, MEET_HELLO, sizeof h->magic) != 0)
        return error_set(err, ERR_CORRUPT, "it does not speak as a rank of this version");
    *genuine = tag_of(tag, key, nonce, (const uint8_t *)h, sizeof *h, offsetof(struct meet_hello, tag)) &&
               tags_equal(tag, h->tag);
    if (h->purpose >= MEET_PURPOSES || h->rank >= MEET_MAX_RANKS || h->to >= MEET_MAX_RANKS || h->world < 1 ||
        h->world > MEET_MAX_RANKS || h->tp_size < 1 || h->tp_size > MEET_MAX_RANKS || h->pp_size < 1 ||
        h->pp_size > MEET_MAX_RANKS || h->port > 65535 || (h->purpose == MEET_JOIN && h->port == 0) ||
        (h->purpose == MEET_FAIL ? !meet_is_code(h->code) : h->code != 0))
        return error_set(err, ERR_CORRUPT, "it says numbers out of their ranges");
    if (!memchr(h->version, 0, sizeof h->version))
        return error_set(err, ERR_CORRUPT, "its version has no end");
    if (h->purpose == MEET_FAIL && !memchr(h->offer, 0, sizeof h->offer))
        return error_set(err, ERR_CORRUPT, "its sentence has no end");
    return 0;
}

void meet_answer_seal(uint8_t *answer, size_t bytes, const uint8_t *key, const uint8_t *nonce)
{
    const size_t at = offsetof(struct meet_answer, tag);
    uint8_t tag[MEET_TAG_BYTES];
    tag_of(tag, key, nonce, answer, bytes, at);
    memcpy(answer + at, tag, sizeof tag);
}

int meet_answer_rest(const struct meet_answer *head, size_t *rest, struct error *err)
{
    if (memcmp(head->magic, MEET_ANSWER, sizeof head->magic) != 0 || head->num_addresses > MEET_MAX_RANKS ||
        head->blob_bytes > MEET_BLOB_MAX_BYTES || head->reserved || (head->code && !meet_is_code(head->code)) ||
        !memchr(head->sentence, 0, sizeof head->sentence))
        return error_set(err, ERR_CORRUPT, "its answer is none of this version");
    *rest = head->num_addresses * sizeof(struct meet_address) + head->blob_bytes;
    return 0;
}

bool meet_answer_is_genuine(const uint8_t *answer, size_t bytes, const uint8_t *key, const uint8_t *nonce)
{
    uint8_t tag[MEET_TAG_BYTES];
    const size_t at = offsetof(struct meet_answer, tag);
    if (bytes < sizeof(struct meet_answer) || bytes > MEET_ANSWER_MAX_BYTES)
        return false;
    return tag_of(tag, key, nonce, answer, bytes, at) && tags_equal(tag, answer + at);
}
