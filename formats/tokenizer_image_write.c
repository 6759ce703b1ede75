// Layout of a compiled tokenizer image. See tokenizer_image_write.h.
#include "formats/tokenizer_image_write.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "formats/checked.h"

enum { MOST_SLOTS = 1 << 28 };

static int out_of_memory(const char *file, struct error *err)
{
    return error_set(err, ERR_MEMORY, "%s: out of memory", file);
}

static bool insert_token(struct tokenizer_vocab_slot *slots, uint32_t slot_count, uint32_t id,
                         struct tokenizer_content content)
{
    uint64_t hash = tokenizer_image_hash(content.text, content.bytes);
    for (uint32_t probe = 0; probe < TOKENIZER_PROBE_LIMIT; probe++) {
        struct tokenizer_vocab_slot *slot = &slots[(uint32_t)(hash + probe) & (slot_count - 1)];
        if (slot->id == TOKENIZER_NONE) {
            *slot = (struct tokenizer_vocab_slot){(uint32_t)(hash >> 32), id};
            return true;
        }
    }
    return false;
}

// The hash table of contents, half full at most, larger if a token would lie too far from its home slot.
static int build_vocab(struct tokenizer_vocab_slot **out, uint32_t *slot_count,
                       const struct tokenizer_image_parts *parts, const char *file, struct error *err)
{
    uint32_t count = 16;
    while (count / 2 < parts->id_count)
        count *= 2;
    for (; count <= MOST_SLOTS; count *= 2) {
        struct tokenizer_vocab_slot *slots = malloc(count * sizeof *slots);
        if (!slots)
            return out_of_memory(file, err);
        memset(slots, 0xff, count * sizeof *slots);
        uint32_t id = 0;
        while (id < parts->id_count &&
               (!parts->contents[id].text || insert_token(slots, count, id, parts->contents[id])))
            id++;
        if (id == parts->id_count) {
            *out = slots;
            *slot_count = count;
            return 0;
        }
        free(slots);
    }
    return error_set(err, ERR_MODEL, "%s: the vocabulary does not fit into a hash table", file);
}

static bool insert_merge(struct tokenizer_merge_slot *slots, uint32_t slot_count, struct tokenizer_merge_slot merge)
{
    uint32_t hash = tokenizer_image_pair_hash(merge.left, merge.right);
    for (uint32_t probe = 0; probe < TOKENIZER_PROBE_LIMIT; probe++) {
        struct tokenizer_merge_slot *slot = &slots[(hash + probe) & (slot_count - 1)];
        if (slot->left == TOKENIZER_NONE || (slot->left == merge.left && slot->right == merge.right)) {
            *slot = merge;
            return true;
        }
    }
    return false;
}

static int build_merges(struct tokenizer_merge_slot **out, uint32_t *slot_count,
                        const struct tokenizer_image_parts *parts, const char *file, struct error *err)
{
    uint32_t count = 16;
    while (count / 2 < parts->merge_count)
        count *= 2;
    for (; count <= MOST_SLOTS; count *= 2) {
        struct tokenizer_merge_slot *slots = malloc(count * sizeof *slots);
        if (!slots)
            return out_of_memory(file, err);
        memset(slots, 0xff, count * sizeof *slots);
        size_t i = 0;
        while (i < parts->merge_count && insert_merge(slots, count, parts->merges[i]))
            i++;
        if (i == parts->merge_count) {
            *out = slots;
            *slot_count = count;
            return 0;
        }
        free(slots);
    }
    return error_set(err, ERR_MODEL, "%s: the merges do not fit into a hash table", file);
}

// Sections one behind the other, each at a multiple of 8. With bytes NULL only the size is counted.
struct writer {
    uint8_t *bytes;
    uint64_t at;
};

static void put(struct writer *writer, const void *section, uint64_t bytes)
{
    if (writer->bytes && bytes)
        memcpy(writer->bytes + writer->at, section, bytes);
    writer->at += round_up(bytes, 8);
}

static void put_ops(struct writer *writer, const struct tokenizer_step_list *list)
{
    put(writer, list->ops, list->count * sizeof *list->ops);
}

static void put_tokens(struct writer *writer, const struct tokenizer_image_parts *parts)
{
    uint64_t start = writer->at;
    for (uint32_t id = 0; id < parts->id_count; id++) {
        struct tokenizer_content content = parts->contents[id];
        if (writer->bytes && content.bytes)
            memcpy(writer->bytes + writer->at, content.text, content.bytes);
        writer->at += content.bytes;
    }
    writer->at = start + round_up(writer->at - start, 8);
}

static void put_all(struct writer *writer, const struct tokenizer_image_header *header,
                    const struct tokenizer_image_parts *parts, const uint32_t *offsets,
                    const struct tokenizer_vocab_slot *vocab, const struct tokenizer_merge_slot *merges)
{
    const struct tokenizer_components *components = parts->components;
    put(writer, header, sizeof *header);
    put(writer, offsets, ((uint64_t)parts->id_count + 1) * sizeof *offsets);
    put(writer, parts->token_flags, parts->id_count);
    put(writer, vocab, header->vocab_slots * sizeof *vocab);
    put(writer, merges, header->merge_slots * sizeof *merges);
    put(writer, parts->byte_ids, 256 * sizeof *parts->byte_ids);
    put_ops(writer, &components->normalizer);
    put_ops(writer, &components->pretokenizer);
    put_ops(writer, &components->decoder);
    put(writer, parts->added_raw, parts->added_raw_count * sizeof *parts->added_raw);
    put(writer, parts->added_normalized, parts->added_normalized_count * sizeof *parts->added_normalized);
    put(writer, parts->decode_texts, parts->decode_text_count * sizeof *parts->decode_texts);
    put(writer, components->prefix_ids, components->prefix_count * sizeof *components->prefix_ids);
    put(writer, components->suffix_ids, components->suffix_count * sizeof *components->suffix_ids);
    put_tokens(writer, parts);
    put(writer, components->text.data, components->text.bytes);
}

static struct tokenizer_image_header make_header(const struct tokenizer_image_parts *parts)
{
    const struct tokenizer_components *components = parts->components;
    struct tokenizer_image_header header = {
        .version = TOKENIZER_IMAGE_VERSION,
        .header_bytes = sizeof header,
        .id_count = parts->id_count,
        .flags = parts->flags,
        .unk_id = parts->unk_id,
        .normalizer_ops = components->normalizer.count,
        .pretokenizer_ops = components->pretokenizer.count,
        .decoder_ops = components->decoder.count,
        .added_raw = parts->added_raw_count,
        .added_normalized = parts->added_normalized_count,
        .decode_texts = parts->decode_text_count,
        .prefix_ids = components->prefix_count,
        .suffix_ids = components->suffix_count,
        .op_text_bytes = components->text.bytes,
    };
    memcpy(header.magic, TOKENIZER_MAGIC, sizeof header.magic);
    for (uint32_t id = 0; id < parts->id_count; id++) {
        size_t bytes = parts->contents[id].bytes;
        header.token_text_bytes += bytes;
        if (parts->token_flags[id] & TOKEN_IN_MODEL && bytes > header.longest_token)
            header.longest_token = (uint32_t)bytes;
    }
    return header;
}

int tokenizer_image_write(uint8_t **out, size_t *out_bytes, const struct tokenizer_image_parts *parts, const char *file,
                          struct error *err)
{
    struct tokenizer_vocab_slot *vocab = NULL;
    struct tokenizer_merge_slot *merges = NULL;
    struct writer counting = {0}, writer = {0};
    struct tokenizer_image_header header = make_header(parts);
    int rc = 0;
    uint32_t *offsets = calloc((size_t)parts->id_count + 1, sizeof *offsets);
    if (!offsets) {
        rc = out_of_memory(file, err);
        goto done;
    }
    if (header.token_text_bytes > UINT32_MAX) {
        rc = error_set(err, ERR_MODEL, "%s: the vocabulary has %llu bytes of text, at most 4 GiB is possible", file,
                       (unsigned long long)header.token_text_bytes);
        goto done;
    }
    for (uint32_t id = 0; id < parts->id_count; id++)
        offsets[id + 1] = offsets[id] + (uint32_t)parts->contents[id].bytes;
    if ((rc = build_vocab(&vocab, &header.vocab_slots, parts, file, err)) ||
        (rc = build_merges(&merges, &header.merge_slots, parts, file, err)))
        goto done;
    put_all(&counting, &header, parts, offsets, vocab, merges);
    header.file_bytes = counting.at;
    if (!(writer.bytes = calloc(1, counting.at))) {
        rc = out_of_memory(file, err);
        goto done;
    }
    put_all(&writer, &header, parts, offsets, vocab, merges);
    *out = writer.bytes;
    *out_bytes = (size_t)writer.at;
done:
    free(offsets);
    free(vocab);
    free(merges);
    return rc;
}
