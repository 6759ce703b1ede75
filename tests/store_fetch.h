// A program of its own within test_store, for test_store.py: fetches a rank's file through the store as a loader does and writes it out.
#ifndef TPSHARD_TESTS_STORE_FETCH_H
#define TPSHARD_TESTS_STORE_FETCH_H

// fetch PLACE RANK OUT [cache=DIR] [limit=BYTES] [token=TEXT] [threads=N] [piece=BYTES] [stall=S] [pause=MS] [cancel=MS] [strict=1]
// Prints one line of JSON. Errors: a sentence on stderr, and the exit status of the programs.
int store_fetch_main(int argc, char **argv);

#endif
