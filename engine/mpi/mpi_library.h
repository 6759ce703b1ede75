// MPI as a carrier of bytes between ranks (engine/comm_link.h), in a shared object of its own, so that tpengine runs where there
// is no MPI. engine/comm_mpi.c loads it. Built where Open MPI's headers are.
//
// All waits are the caller's: nothing in here blocks but start, which mpirun bounds. Errors of MPI come back as a lost rank or
// as text. One thread at a time calls in here.
#ifndef TPSHARD_ENGINE_MPI_MPI_LIBRARY_H
#define TPSHARD_ENGINE_MPI_MPI_LIBRARY_H

#include "engine/comm_link.h"

#define MPI_LIBRARY_ENTRY "tpengine_mpi_library"
enum { MPI_LIBRARY_ABI = 1 };

struct mpi_library {
    int abi;
    const struct comm_carrier *carrier;
    // Begins MPI for this process. Returns the carrier's data, for comm_open_link, and this rank; NULL: why says it.
    void *(*start)(int *rank, int *size, char *why, size_t why_bytes);
    // To be asked again and again, from when all is said: whether all ranks have come so far. From then on MPI is ended.
    bool (*end)(void);
    void (*abort)(int code); // ends this process and all other ranks; does not return
};
typedef const struct mpi_library *mpi_library_entry_fn(void);

#endif
