// The tables of families.h: data alone, one entry for each architecture.
#ifndef TPSHARD_SHARD_FAMILY_TABLES_H
#define TPSHARD_SHARD_FAMILY_TABLES_H

#include "shard/families.h"

extern const struct family families[];
extern const int family_count;

#endif
