// See rank_file.h.
#include "formats/rank_file.h"

#include "formats/repair_hint.h"

#include <inttypes.h>

static int check_hash(const char *path, const char *what, struct checksum128 found, struct checksum128 wanted,
                      const char *meaning, struct error *err)
{
    char found_hex[CHECKSUM128_HEX_DIGITS + 1], wanted_hex[CHECKSUM128_HEX_DIGITS + 1], hint[REPAIR_HINT_BYTES];
    if (checksum128_equal(found, wanted))
        return 0;
    checksum128_to_hex(found, found_hex);
    checksum128_to_hex(wanted, wanted_hex);
    return error_set(err, ERR_CORRUPT, "%s: its %s is %s, the manifest's %s: %s; %s", path, what, found_hex, wanted_hex,
                     meaning, repair_hint(hint, path));
}

int rank_file_check(const struct shard_file *file, const struct manifest *manifest, uint32_t rank, const char *path,
                    struct error *err)
{
    const struct shard_identity *identity = shard_file_identity(file);
    const struct manifest_file *wanted = &manifest->ranks[rank];
    char hint[REPAIR_HINT_BYTES];
    int64_t layer_begin = 0, num_layers = 0;
    int rc;
    if (manifest->pp_size > 1)
        manifest_stage(manifest->stage_layers, rank / manifest->tp_size, &layer_begin, &num_layers);
    if (identity->tp_size == manifest->tp_size && identity->pp_size == manifest->pp_size && manifest->pp_size > 1 &&
        (identity->rank != rank % manifest->tp_size || identity->pp_rank != rank / manifest->tp_size))
        return error_set(err, ERR_CORRUPT,
                         "%s: it is the file of rank %" PRIu32 " of stage %" PRIu32 ", but rank %" PRIu32
                         " of stage %" PRIu32 " belongs there; files were mixed up; %s",
                         path, identity->rank, identity->pp_rank, rank % manifest->tp_size, rank / manifest->tp_size,
                         repair_hint(hint, path));
    if (identity->pp_size != manifest->pp_size)
        return error_set(err, ERR_CORRUPT,
                         "%s: it is of a model of %" PRIu32 " stages, and this one has %" PRIu32
                         "; files were mixed up; %s",
                         path, identity->pp_size, manifest->pp_size, repair_hint(hint, path));
    if (identity->rank != rank % manifest->tp_size || identity->tp_size != manifest->tp_size)
        return error_set(err, ERR_CORRUPT,
                         "%s: it is the file of rank %" PRIu32 " of %" PRIu32 ", but rank %" PRIu32 " of %" PRIu32
                         " belongs there; files were mixed up; %s",
                         path, identity->rank, identity->tp_size, rank % manifest->tp_size, manifest->tp_size,
                         repair_hint(hint, path));
    if (identity->layer_begin != layer_begin || identity->num_layers != num_layers)
        return error_set(err, ERR_CORRUPT,
                         "%s: it holds %" PRIu32 " layers from layer %" PRIu32
                         " on, and the manifest gives its stage %" PRId64 " from layer %" PRId64 " on; %s",
                         path, identity->num_layers, identity->layer_begin, num_layers, layer_begin,
                         repair_hint(hint, path));
    if ((rc = check_hash(path, "contract", checksum128_from_bytes(identity->contract), manifest->contract,
                         "the file comes from another run, model or setting", err)))
        return rc;
    uint64_t file_bytes = shard_file_payload_offset(file) + shard_file_stored_bytes(file);
    if (file_bytes != wanted->bytes)
        return error_set(err, ERR_CORRUPT, "%s: the file has %" PRIu64 " bytes, the manifest says %" PRIu64 "; %s",
                         path, file_bytes, wanted->bytes, repair_hint(hint, path));
    return check_hash(path, "head's checksum", shard_file_root(file), wanted->hash, "the file was changed", err);
}

int rank_file_open(struct shard_file **out, const struct manifest *manifest, uint32_t rank, const char *path,
                   struct error *err)
{
    struct shard_file *file;
    int rc = shard_file_open(&file, path, err);
    if (rc)
        return rc == ERR_IO ? repair_hint_unopened(path, err) : rc;
    if ((rc = rank_file_check(file, manifest, rank, path, err)))
        shard_file_close(file);
    else
        *out = file;
    return rc;
}
