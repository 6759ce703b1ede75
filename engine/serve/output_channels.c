#include "engine/serve/output_channels.h"

#include "engine/serve/output_parser.h"

#include <string.h>

void output_head_channel(struct output_head *head)
{
    if (head->bytes < sizeof head->text)
        head->text[head->bytes++] = ' '; // apart from a recipient before it
    head->has_channel = true;
    head->channel_at = head->bytes;
}

bool output_head_take(struct output_head *head, char byte)
{
    if (head->bytes < sizeof head->text && !head->bounded)
        head->text[head->bytes++] = byte;
    return ++head->taken_bytes <= sizeof head->text;
}

// The recipient " to=functions.NAME" anywhere in the head; its name.
static const char *find_function(const struct output_head *head, size_t *bytes)
{
    static const char mark[] = "to=functions.";
    const size_t mark_bytes = sizeof mark - 1;
    for (size_t at = 0; at + mark_bytes < head->bytes; at++) {
        const char *name = head->text + at + mark_bytes;
        size_t most = head->bytes - at - mark_bytes, count = 0;
        if (memcmp(head->text + at, mark, mark_bytes) != 0 || (at > 0 && head->text[at - 1] != ' '))
            continue;
        while (count < most && name[count] && strchr(OUTPUT_NAME_BYTES, name[count]))
            count++;
        *bytes = count;
        return count ? name : NULL;
    }
    return NULL;
}

enum output_message output_head_message(const struct output_head *head, const char **name, size_t *name_bytes)
{
    static const char analysis[] = "analysis";
    const size_t bytes = head->bytes - head->channel_at;
    if ((*name = find_function(head, name_bytes)))
        return MESSAGE_CALL;
    bool thinks = head->has_channel && bytes >= sizeof analysis - 1 &&
                  memcmp(head->text + head->channel_at, analysis, sizeof analysis - 1) == 0;
    return thinks ? MESSAGE_REASONING : MESSAGE_CONTENT;
}
