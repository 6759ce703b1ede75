// The option table: one table per program gives the parser, --help, the man page and the shell completion, so that they cannot drift
// apart. Precedence: flag > environment (PREFIX_NAME, e.g. TPENGINE_MAX_TOKENS) > default (what the target holds beforehand).
#ifndef TPSHARD_FORMATS_OPTIONS_H
#define TPSHARD_FORMATS_OPTIONS_H

#include "formats/error.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

enum option_type { OPTION_FLAG, OPTION_INT, OPTION_NUMBER, OPTION_BYTES, OPTION_TEXT, OPTION_CHOICE, OPTION_LIST };

enum { OPTION_LIST_MAX = 64 };
struct option_list {
    const char *items[OPTION_LIST_MAX];
    int count;
    bool from_environment; // what the command line gives replaces it
};

struct option_spec {
    const char *name; // "max-tokens"; the table ends with a NULL name
    enum option_type
        type;    // FLAG: bool, INT: int64_t, NUMBER: double, BYTES: uint64_t ("24GiB", "800MB"), TEXT and CHOICE:
                 // const char *, LIST: struct option_list (the option may be repeated)
    void *value; // target; holds the default before parsing
    const char *argument; // "N", "FILE"; for CHOICE the words: "none|int8|int4|fp8"; NULL for a flag
    double min, max;      // INT and NUMBER: inclusive bounds
    const char *help;     // one sentence
};

struct command_spec {
    const char *name;      // "convert"; the table ends with a NULL name
    const char *arguments; // "model_dir out_dir"
    int min_arguments, max_arguments;
    const char *summary;               // one sentence
    const struct option_spec *options; // this command's own; NULL for none
    // Runs the command; positional arguments are argv[0 .. argc).
    int (*run)(int argc, char **argv, struct error *err);
};

struct program_spec {
    const char *name;                    // "tpshard"
    const char *summary;                 // one sentence
    const char *version;                 // "0.1.0 (abc1234)"
    const char *environment_prefix;      // "TPSHARD_"
    const struct command_spec *commands; // the first one is the default when the program allows the name to be left out
    bool default_command;
    const struct option_spec *common; // options of every command (--json, --quiet ...)
    const char *examples;             // a few lines for --help and the man page
    const char *exit_status;          // lines for the man page
    // Of a wrong command line, after its sentence was printed; all options that could be read have their values. May be NULL.
    void (*refused)(const struct command_spec *command, const struct error *why);
};

// Parses everything and runs the command. Handles --help, --version and the hidden --help-man, --help-completion-bash itself (stdout).
// Returns the exit status: of the command, or 2 with a sentence on stderr (and "did you mean") for a wrong command line.
// The command's error is printed once on stderr as "name: sentence"; one with an empty sentence is one that the command has printed.
int options_main(const struct program_spec *program, int argc, char **argv);

#endif
