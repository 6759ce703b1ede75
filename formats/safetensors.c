// The header of one safetensors file. See safetensors.h for what is accepted.
#include "formats/safetensors.h"

#include <stdlib.h>
#include <string.h>

#include "formats/checked.h"
#include "formats/json_scan.h"

// No description of a tensor is shorter than `"a":{"dtype":"U8","shape":[],"data_offsets":[0,0]}`.
enum { MIN_TENSOR_JSON_BYTES = 50 };

int safetensors_header_bytes(const uint8_t prefix[SAFETENSORS_PREFIX_BYTES], uint64_t file_bytes, const char *name,
                             uint64_t *header_bytes, struct error *err)
{
    uint64_t length = 0;
    if (file_bytes < SAFETENSORS_PREFIX_BYTES)
        return error_set(err, ERR_MODEL, "%s: has %llu bytes, too few for a safetensors file: download it again", name,
                         (unsigned long long)file_bytes);
    for (int i = SAFETENSORS_PREFIX_BYTES - 1; i >= 0; i--)
        length = length << 8 | prefix[i];
    if (length > SAFETENSORS_HEADER_CAP_BYTES)
        return error_set(
            err, ERR_MODEL,
            "%s: claims a header of %llu bytes, at most %d are accepted: not a safetensors file, or damaged", name,
            (unsigned long long)length, SAFETENSORS_HEADER_CAP_BYTES);
    if (length > file_bytes - SAFETENSORS_PREFIX_BYTES)
        return error_set(err, ERR_MODEL, "%s: the header of %llu bytes does not fit into the file of %llu: truncated",
                         name, (unsigned long long)length, (unsigned long long)file_bytes);
    *header_bytes = length;
    return 0;
}

bool safetensors_name_ok(const char *name, size_t bytes)
{
    if (bytes == 0 || bytes > SAFETENSORS_NAME_BYTES)
        return false;
    for (size_t i = 0; i < bytes; i++) {
        uint8_t c = (uint8_t)name[i];
        if (c < 0x20 || c == 0x7f)
            return false;
        if (c == 0xc2 && i + 1 < bytes && (uint8_t)name[i + 1] < 0xa0) // U+0080 to U+009F
            return false;
    }
    return true;
}

static int compare_strings(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static int parse_metadata(struct json_scan *scan)
{
    // Keys are kept to find duplicates; a pair takes at least 6 bytes of text, so their number is bounded.
    int rc = json_scan_expect(scan, '{');
    char **keys = NULL, *key, *value, *keep = scan->strings;
    size_t count = 0, capacity = 0, bytes;
    bool first = true, more;
    while (!rc && !(rc = json_scan_next(scan, '}', &first, &more)) && more) {
        if ((rc = json_scan_key(scan, &key, &bytes)))
            break;
        if (strlen(key) != bytes) {
            rc = json_scan_fail(scan, "a key of __metadata__ holds NUL");
            break;
        }
        char *after_key = scan->strings;
        if ((rc = json_scan_string(scan, &value, NULL)))
            break;
        scan->strings = after_key;
        if (count == capacity) {
            capacity = capacity ? 2 * capacity : 16;
            char **grown = realloc(keys, capacity * sizeof *keys);
            if (!grown) {
                rc = error_set(scan->err, ERR_MEMORY, "%s: out of memory", scan->file_name);
                break;
            }
            keys = grown;
        }
        keys[count++] = key;
    }
    if (!rc && count)
        qsort(keys, count, sizeof *keys, compare_strings);
    for (size_t i = 1; !rc && i < count; i++)
        if (strcmp(keys[i - 1], keys[i]) == 0)
            rc = json_scan_fail(scan, "__metadata__ holds the key '%.200s' twice", keys[i]);
    free(keys);
    scan->strings = keep;
    return rc;
}

static int parse_dtype(struct json_scan *scan, struct safetensors_tensor *tensor)
{
    char *name;
    size_t bytes;
    int rc = json_scan_string(scan, &name, &bytes);
    if (rc)
        return rc;
    scan->strings = name;
    if (strlen(name) != bytes || !dtype_from_name(&tensor->dtype, name))
        return json_scan_fail(scan, "tensor '%.200s' has the dtype '%.40s', which is not supported", tensor->name,
                              name);
    return 0;
}

static int parse_shape(struct json_scan *scan, struct safetensors_tensor *tensor)
{
    bool first = true, more;
    int rc = json_scan_expect(scan, '[');
    while (!rc && !(rc = json_scan_next(scan, ']', &first, &more)) && more) {
        if (tensor->num_dims == SAFETENSORS_MAX_DIMS)
            return json_scan_fail(scan, "tensor '%.200s' has more than %d dimensions", tensor->name,
                                  SAFETENSORS_MAX_DIMS);
        rc = json_scan_uint(scan, &tensor->dims[tensor->num_dims++], "a dimension");
    }
    return rc;
}

// Sets offset, relative to the end of the header, and bytes.
static int parse_data_offsets(struct json_scan *scan, struct safetensors_tensor *tensor)
{
    uint64_t begin, end;
    int rc;
    if ((rc = json_scan_expect(scan, '[')) || (rc = json_scan_uint(scan, &begin, "a data offset")) ||
        (rc = json_scan_expect(scan, ',')) || (rc = json_scan_uint(scan, &end, "a data offset")) ||
        (rc = json_scan_expect(scan, ']')))
        return rc;
    if (end < begin)
        return json_scan_fail(scan, "tensor '%.200s' has reversed data_offsets", tensor->name);
    tensor->offset = begin;
    tensor->bytes = end - begin;
    return 0;
}

// Shape and dtype must need exactly the bytes that the offsets span.
static int check_bytes(const struct json_scan *scan, const struct safetensors_tensor *tensor)
{
    uint64_t elems = 1, bits;
    bool fits = true;
    for (int i = 0; i < tensor->num_dims; i++)
        fits = fits && checked_mul(elems, tensor->dims[i], &elems);
    if (!fits || !checked_mul(elems, (uint64_t)dtype_bits(tensor->dtype), &bits))
        return json_scan_fail(scan, "tensor '%.200s' has a shape that overflows 64 bits", tensor->name);
    uint64_t row_elems = tensor->num_dims ? tensor->dims[tensor->num_dims - 1] : 1;
    if (row_elems * (uint64_t)dtype_bits(tensor->dtype) % 8)
        return json_scan_fail(scan, "tensor '%.200s' (%s) has rows that do not fill whole bytes", tensor->name,
                              dtype_name(tensor->dtype));
    if (bits / 8 != tensor->bytes)
        return json_scan_fail(scan, "tensor '%.200s': shape and dtype %s need %llu bytes, data_offsets give %llu",
                              tensor->name, dtype_name(tensor->dtype), (unsigned long long)(bits / 8),
                              (unsigned long long)tensor->bytes);
    return 0;
}

static int parse_tensor(struct json_scan *scan, struct safetensors_tensor *tensor)
{
    static const struct {
        const char *key;
        int (*parse)(struct json_scan *scan, struct safetensors_tensor *tensor);
    } fields[] = {{"dtype", parse_dtype}, {"shape", parse_shape}, {"data_offsets", parse_data_offsets}};
    bool seen[3] = {false, false, false}, first = true, more;
    int rc = json_scan_expect(scan, '{');
    while (!rc && !(rc = json_scan_next(scan, '}', &first, &more)) && more) {
        char *key;
        if ((rc = json_scan_key(scan, &key, NULL)))
            return rc;
        scan->strings = key;
        int field = 0;
        while (field < 3 && strcmp(key, fields[field].key))
            field++;
        if (field == 3 || seen[field])
            return json_scan_fail(scan, "tensor '%.200s' has %s key '%.40s'", tensor->name,
                                  field == 3 ? "an unknown" : "twice the", key);
        seen[field] = true;
        rc = fields[field].parse(scan, tensor);
    }
    for (int field = 0; !rc && field < 3; field++)
        if (!seen[field])
            return json_scan_fail(scan, "tensor '%.200s' has no %s", tensor->name, fields[field].key);
    return rc ? rc : check_bytes(scan, tensor);
}

static int parse_members(struct json_scan *scan, struct safetensors_header *header)
{
    bool first = true, more, metadata_seen = false;
    int rc = json_scan_expect(scan, '{');
    while (!rc && !(rc = json_scan_next(scan, '}', &first, &more)) && more) {
        char *name;
        size_t bytes;
        if ((rc = json_scan_key(scan, &name, &bytes)))
            return rc;
        if (strcmp(name, "__metadata__") == 0 && bytes == strlen(name)) {
            scan->strings = name;
            if (metadata_seen)
                return json_scan_fail(scan, "__metadata__ occurs twice");
            metadata_seen = true;
            rc = parse_metadata(scan);
            continue;
        }
        if (!safetensors_name_ok(name, bytes))
            return json_scan_fail(scan,
                                  "a tensor's name must have 1 to %d bytes and no control characters, found '%.200s'",
                                  SAFETENSORS_NAME_BYTES, name);
        struct safetensors_tensor *tensor = &header->tensors[header->tensor_count++];
        tensor->name = name;
        rc = parse_tensor(scan, tensor);
    }
    return rc ? rc : json_scan_end(scan);
}

// An upper bound of the number of tensors: each opens a brace, and none is shorter than the minimum.
static size_t max_tensors(const uint8_t *json, size_t bytes)
{
    size_t braces = 0, by_length = bytes / MIN_TENSOR_JSON_BYTES + 1;
    for (size_t i = 0; i < bytes; i++)
        braces += json[i] == '{';
    return braces < by_length ? braces : by_length;
}

static int compare_offsets(const void *a, const void *b)
{
    const struct safetensors_tensor *x = *(struct safetensors_tensor *const *)a;
    const struct safetensors_tensor *y = *(struct safetensors_tensor *const *)b;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes; // an empty one comes before its neighbour
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(((const struct safetensors_tensor *)a)->name, ((const struct safetensors_tensor *)b)->name);
}

// Every byte of [data_offset, file_bytes) must belong to exactly one tensor. Makes offsets count from the file's start.
static int check_layout(struct safetensors_header *header, uint64_t data_offset, uint64_t file_bytes, const char *name,
                        struct error *err)
{
    int rc = 0;
    uint64_t data_bytes = file_bytes - data_offset, at = 0;
    struct safetensors_tensor **order = malloc((header->tensor_count + 1) * sizeof *order);
    if (!order)
        return error_set(err, ERR_MEMORY, "%s: no memory for %zu tensors", name, header->tensor_count);
    for (size_t i = 0; i < header->tensor_count; i++)
        order[i] = &header->tensors[i];
    qsort(order, header->tensor_count, sizeof *order, compare_offsets);
    for (size_t i = 0; !rc && i < header->tensor_count; i++) {
        struct safetensors_tensor *tensor = order[i];
        if (tensor->offset != at)
            rc = error_set(err, ERR_MODEL, "%s: tensor '%.200s' begins at data byte %llu, but %s %llu", name,
                           tensor->name, (unsigned long long)tensor->offset,
                           tensor->offset < at ? "the tensor before it ends at" : "nothing owns the bytes from",
                           (unsigned long long)at);
        else if (!checked_range(tensor->offset, tensor->bytes, data_bytes))
            rc = error_set(err, ERR_MODEL,
                           "%s: tensor '%.200s' ends at data byte %llu, but the file has only %llu: truncated", name,
                           tensor->name, (unsigned long long)(tensor->offset + tensor->bytes),
                           (unsigned long long)data_bytes);
        at += tensor->bytes;
        tensor->offset += data_offset;
    }
    free(order);
    if (!rc && at != data_bytes)
        rc = error_set(err, ERR_MODEL, "%s: the last %llu bytes of the file belong to no tensor", name,
                       (unsigned long long)(data_bytes - at));
    return rc;
}

static int sort_names(struct safetensors_header *header, const char *name, struct error *err)
{
    qsort(header->tensors, header->tensor_count, sizeof *header->tensors, compare_names);
    for (size_t i = 1; i < header->tensor_count; i++)
        if (strcmp(header->tensors[i - 1].name, header->tensors[i].name) == 0)
            return error_set(err, ERR_MODEL, "%s: the header holds tensor '%.200s' twice", name,
                             header->tensors[i].name);
    return 0;
}

int safetensors_parse(const uint8_t *header_and_prefix, size_t available, uint64_t file_bytes, const char *name,
                      struct safetensors_header **out, struct error *err)
{
    uint64_t json_bytes;
    uint64_t known_bytes = available < file_bytes ? available : file_bytes;
    int rc = safetensors_header_bytes(header_and_prefix, known_bytes, name, &json_bytes, err);
    if (rc)
        return rc;
    const uint8_t *json = header_and_prefix + SAFETENSORS_PREFIX_BYTES;
    struct safetensors_header *header = calloc(1, sizeof *header);
    if (header) {
        header->tensors = calloc(max_tensors(json, json_bytes) + 1, sizeof *header->tensors);
        header->names = malloc(json_bytes + 1);
    }
    if (!header || !header->tensors || !header->names) {
        rc = error_set(err, ERR_MEMORY, "%s: no memory for a header of %llu bytes", name,
                       (unsigned long long)json_bytes);
        goto fail;
    }
    struct json_scan scan = json_scan_start(json, json_bytes, header->names, name, err);
    if ((rc = parse_members(&scan, header)))
        goto fail;
    // Duplicates first: their overlap is only a consequence.
    if ((rc = sort_names(header, name, err)))
        goto fail;
    if ((rc = check_layout(header, SAFETENSORS_PREFIX_BYTES + json_bytes, file_bytes, name, err)))
        goto fail;
    *out = header;
    return 0;
fail:
    safetensors_free(header);
    return rc;
}

void safetensors_free(struct safetensors_header *header)
{
    if (!header)
        return;
    free(header->tensors);
    free(header->names);
    free(header);
}
