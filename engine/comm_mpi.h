// The collectives over MPI: one process a rank, started by mpirun or the like. MPI is in a library of its own, which is loaded
// when a process asks for it (engine/mpi/mpi_library.h). The deadlines, beats and texts are those of comm_link.h.
//
//   start -> open (with a region of the world's shape) -> ... -> comm_close -> end
//
// Where a rank is missing, MPI itself knows no deadline: who has told its error ends with comm_mpi_end(code), which takes all
// ranks with it.
#ifndef TPSHARD_ENGINE_COMM_MPI_H
#define TPSHARD_ENGINE_COMM_MPI_H

#include "engine/comm.h"

#define COMM_MPI_LIBRARY "libtpengine_mpi.so"

// Loads the library (NULL: beside the program, or in ../lib) and begins MPI. Not before a fork; once in a process. Receives
// this process's rank and the size of the world.
int comm_mpi_start(const char *library, int *rank, int *size, struct error *err);
// The world's end of this rank. region: as for comm_open_sockets, for `size` ranks. Success: caller owns *out.
int comm_open_mpi(struct comm **out, struct comm_region *region, int timeout_ms, struct error *err);
// After comm_close. code 0: waits until all ranks have come so far, at most timeout_ms, and ends MPI; ERR_RANK when one has
// not. Else, and after that error, ends all ranks of MPI, with this exit code here, and does not return.
int comm_mpi_end(int code, int timeout_ms, struct error *err);

#endif
