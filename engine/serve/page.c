// The embedded page and its policy. See page.h.
#include "engine/serve/page.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

__asm__(".section .rodata\n"
        ".global page_text\n"
        ".type page_text, @object\n"
        "page_text: .incbin \"engine/serve/page.html\"\n"
        "page_text_end: .byte 0\n"
        ".size page_text, . - page_text\n"
        ".balign 8\n"
        ".global page_bytes\n"
        ".type page_bytes, @object\n"
        ".size page_bytes, 8\n"
        "page_bytes: .quad page_text_end - page_text\n"
        ".text\n");

// ---- SHA-256 (FIPS 180-4), which browsers ask for ------------------------------------------------------------------

enum { BLOCK_BYTES = 64, HASH_BYTES = 32 };

static uint32_t rotated(uint32_t x, int by) { return x >> by | x << (32 - by); }

static const uint32_t round_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static void hash_block(uint32_t state[8], const uint8_t *block)
{
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 | (uint32_t)block[4 * i + 2] << 8 |
               block[4 * i + 3];
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + w[i - 7] + (rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3) +
               (rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10);
    memcpy(s, state, sizeof s);
    for (int i = 0; i < 64; i++) {
        uint32_t one = s[7] + (rotated(s[4], 6) ^ rotated(s[4], 11) ^ rotated(s[4], 25)) +
                       ((s[4] & s[5]) ^ (~s[4] & s[6])) + round_constants[i] + w[i];
        uint32_t two = (rotated(s[0], 2) ^ rotated(s[0], 13) ^ rotated(s[0], 22)) +
                       ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += one;
        s[0] = one + two;
    }
    for (int i = 0; i < 8; i++)
        state[i] += s[i];
}

static void hash_text(uint8_t out[HASH_BYTES], const char *text, size_t bytes)
{
    uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t last[2 * BLOCK_BYTES] = {0};
    size_t whole = bytes / BLOCK_BYTES * BLOCK_BYTES, rest = bytes - whole;
    size_t end = rest < BLOCK_BYTES - 8 ? BLOCK_BYTES : 2 * BLOCK_BYTES;
    for (size_t at = 0; at < whole; at += BLOCK_BYTES)
        hash_block(state, (const uint8_t *)text + at);
    memcpy(last, text + whole, rest);
    last[rest] = 0x80;
    for (size_t i = 0; i < 8; i++)
        last[end - 1 - i] = (uint8_t)(8 * (uint64_t)bytes >> 8 * i);
    for (size_t at = 0; at < end; at += BLOCK_BYTES)
        hash_block(state, last + at);
    for (int i = 0; i < HASH_BYTES; i++)
        out[i] = (uint8_t)(state[i / 4] >> (24 - 8 * (i % 4)));
}

static void base64(char out[45], const uint8_t hash[HASH_BYTES])
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (int i = 0; i < 11; i++) {
        uint32_t bits = (uint32_t)hash[3 * i] << 16 | (uint32_t)hash[3 * i + 1] << 8 | (i < 10 ? hash[3 * i + 2] : 0u);
        for (int digit = 0; digit < 4; digit++)
            *out++ = digits[bits >> (18 - 6 * digit) & 63];
    }
    out[-1] = '='; // 32 bytes are 43 digits
    *out = '\0';
}

// ---- the policy ------------------------------------------------------------------------------------------------------

// Hash of what stands between two tags.
static void hash_between(char out[45], const char *begin_tag, const char *end_tag)
{
    uint8_t hash[HASH_BYTES];
    const char *begin = strstr(page_text, begin_tag), *end = strstr(page_text, end_tag);
    begin = begin ? begin + strlen(begin_tag) : page_text;
    hash_text(hash, begin, end ? (size_t)(end - begin) : 0);
    base64(out, hash);
}

const char *page_policy(void)
{
    static char policy[512];
    char script[45], style[45];
    if (policy[0])
        return policy;
    hash_between(script, "<script>", "</script>");
    hash_between(style, "<style>", "</style>");
    snprintf(policy, sizeof policy,
             "default-src 'none'; script-src 'sha256-%s'; style-src 'sha256-%s'; connect-src 'self'; img-src data:; "
             "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
             script, style);
    return policy;
}
