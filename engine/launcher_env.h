// Which rank this process is, where another program has started one process for each rank: by options, or by the variables of
// torchrun, Open MPI, Slurm or LeaderWorkerSet. The first that applies counts, in this order (the innermost launcher stands
// before those that may have started it):
//
//   options    --rank, --world-size, --master HOST:PORT (or TPENGINE_RANK, TPENGINE_WORLD_SIZE, TPENGINE_MASTER)
//   torchrun   RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; LOCAL_RANK. Its own store holds the port
//              (TORCHELASTIC_USE_AGENT_STORE=True): then it is the next one
//   mpi        OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE; MASTER_ADDR, and MASTER_PORT where wanted, if it is more
//              than one host
//   slurm      SLURM_PROCID, SLURM_STEP_NUM_TASKS or SLURM_NTASKS, SLURM_LOCALID, only in a step (SLURM_STEP_ID); the first host
//              of SLURM_STEP_NODELIST or SLURM_JOB_NODELIST, or MASTER_ADDR
//   lws        LWS_WORKER_INDEX, LWS_GROUP_SIZE, LWS_LEADER_ADDRESS
//   none       nobody: this process starts all ranks itself
//
// A launcher of one process counts as none, so a program in its shell runs as anywhere else; --launcher none does that in every
// case. --master takes the place of a launcher's address. What is set by halves, or contradicts itself, is refused.
#ifndef TPSHARD_ENGINE_LAUNCHER_ENV_H
#define TPSHARD_ENGINE_LAUNCHER_ENV_H

#include "formats/error.h"

#include <stdint.h>

#define LAUNCHER_CHOICES "auto|none|torchrun|mpi|slurm|lws"

enum { LAUNCHER_HOST_BYTES = 256, LAUNCHER_JOB_BYTES = 128, LAUNCHER_NOT_GIVEN = -1 };

struct launcher_options {
    const char *launcher;                 // a word of LAUNCHER_CHOICES
    int64_t rank, world_size, local_rank; // LAUNCHER_NOT_GIVEN
    const char *master;                   // "host:port", "[v6]:port"; NULL or "": not given
};

struct launcher_place {
    const char *launcher;           // "none", "options" or a word of LAUNCHER_CHOICES
    int rank, world_size;           // none: 0 of 1
    int local_rank;                 // on this host; LAUNCHER_NOT_GIVEN: not known
    int local_size;                 // ranks on this host; 0: not known
    char host[LAUNCHER_HOST_BYTES]; // where rank 0 listens; none: ""
    int port;
    char job[LAUNCHER_JOB_BYTES]; // tells this run from others of the same launcher; "": it does not say
};

// An environment: the value of a variable, NULL where it is not set.
typedef const char *launcher_variable(void *arg, const char *name);
// That of the process; arg is not used.
const char *launcher_process_variable(void *arg, const char *name);

// ERR_USAGE with a sentence that names the variables. Where all is known but the rank is out of its world, *out is set all the same; else not.
int launcher_find(struct launcher_place *out, const struct launcher_options *options, launcher_variable *get, void *arg,
                  struct error *err);

#endif
