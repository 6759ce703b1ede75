// The option table: parser, help, man page, completion. See options.h.
#include "formats/options.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

// ---- values ----------------------------------------------------------------------------------------------------

static int parse_number(const char *text, double *out)
{
    char *end;
    errno = 0;
    double value = strtod(text, &end);
    if (end == text || *end || errno == ERANGE || !isfinite(value) || isspace((unsigned char)*text))
        return -1;
    *out = value;
    return 0;
}

static int parse_int(const char *text, int64_t *out)
{
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (end == text || *end || errno == ERANGE || isspace((unsigned char)*text))
        return -1;
    *out = value;
    return 0;
}

// "24GiB", "800MB", "1e9", "4096"
static int parse_bytes(const char *text, uint64_t *out)
{
    static const struct {
        const char *unit;
        double factor;
    } units[] = {{"", 1},       {"B", 1},        {"K", 1024.0},   {"KiB", 1024.0}, {"KB", 1e3},
                 {"M", 0x1p20}, {"MiB", 0x1p20}, {"MB", 1e6},     {"G", 0x1p30},   {"GiB", 0x1p30},
                 {"GB", 1e9},   {"T", 0x1p40},   {"TiB", 0x1p40}, {"TB", 1e12}};
    char *end;
    errno = 0;
    double value = strtod(text, &end);
    if (end == text || errno == ERANGE || !(value >= 0) || !isdigit((unsigned char)*text))
        return -1;
    for (size_t i = 0; i < sizeof units / sizeof units[0]; i++) {
        if (strcmp(end, units[i].unit) == 0 && value * units[i].factor < 0x1p63) {
            *out = (uint64_t)(value * units[i].factor);
            return 0;
        }
    }
    return -1;
}

static bool is_choice(const char *choices, const char *text)
{
    size_t length = strlen(text);
    for (const char *at = choices; length; at++) {
        const char *bar = strchrnul(at, '|');
        if ((size_t)(bar - at) == length && memcmp(at, text, length) == 0)
            return true;
        if (!*bar)
            break;
        at = bar;
    }
    return false;
}

static int set_value(const struct option_spec *option, const char *origin, const char *text, struct error *err)
{
    switch (option->type) {
    case OPTION_FLAG:
        if (text && strcmp(text, "1") != 0 && strcmp(text, "0") != 0)
            return error_set(err, ERR_USAGE, "%s is a switch: 1 or 0, not \"%s\"", origin, text);
        *(bool *)option->value = !text || *text == '1';
        return 0;
    case OPTION_INT: {
        int64_t value;
        if (parse_int(text, &value) || !((double)value >= option->min && (double)value <= option->max))
            return error_set(err, ERR_USAGE, "%s needs a whole number from %.0f to %.0f, not \"%s\"", origin,
                             option->min, option->max, text);
        *(int64_t *)option->value = value;
        return 0;
    }
    case OPTION_NUMBER: {
        double value;
        if (parse_number(text, &value) || !(value >= option->min && value <= option->max))
            return error_set(err, ERR_USAGE, "%s needs a number from %g to %g, not \"%s\"", origin, option->min,
                             option->max, text);
        *(double *)option->value = value;
        return 0;
    }
    case OPTION_BYTES:
        if (parse_bytes(text, option->value))
            return error_set(err, ERR_USAGE, "%s needs a size such as 24GiB or 800MB, not \"%s\"", origin, text);
        return 0;
    case OPTION_CHOICE:
        if (!is_choice(option->argument, text))
            return error_set(err, ERR_USAGE, "%s must be one of %s, not \"%s\"", origin, option->argument, text);
        *(const char **)option->value = text;
        return 0;
    case OPTION_TEXT:
        *(const char **)option->value = text;
        return 0;
    case OPTION_LIST: {
        struct option_list *list = option->value;
        if (list->count == OPTION_LIST_MAX)
            return error_set(err, ERR_USAGE, "%s may be given at most %d times", origin, OPTION_LIST_MAX);
        list->items[list->count++] = text;
        return 0;
    }
    }
    return 0;
}

// ---- lookup ----------------------------------------------------------------------------------------------------

// Edit distance, for "did you mean"; both words are short.
static int distance(const char *a, const char *b)
{
    enum { MAX = 48 };
    size_t n = strlen(a), m = strlen(b);
    if (n >= MAX || m >= MAX)
        return MAX;
    int row[MAX];
    for (size_t j = 0; j <= m; j++)
        row[j] = (int)j;
    for (size_t i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= m; j++) {
            int best = diagonal + (a[i - 1] != b[j - 1]);
            if (row[j] + 1 < best)
                best = row[j] + 1;
            if (row[j - 1] + 1 < best)
                best = row[j - 1] + 1;
            diagonal = row[j];
            row[j] = best;
        }
    }
    return row[m];
}

static void closer(const char *wanted, const char *name, const char **best, int *best_distance)
{
    int d = distance(wanted, name);
    if (d < *best_distance) {
        *best_distance = d;
        *best = name;
    }
}

static const struct option_spec *find_option(const struct option_spec *options, const char *name, size_t length)
{
    for (; options && options->name; options++)
        if (strlen(options->name) == length && memcmp(options->name, name, length) == 0)
            return options;
    return NULL;
}

static const struct command_spec *find_command(const struct program_spec *program, const char *name)
{
    for (const struct command_spec *command = program->commands; command->name; command++)
        if (strcmp(command->name, name) == 0)
            return command;
    return NULL;
}

static int unknown_option(const struct program_spec *program, const struct command_spec *command, const char *name,
                          struct error *err)
{
    const char *best = NULL;
    int best_distance = 4;
    for (const struct option_spec *o = command->options; o && o->name; o++)
        closer(name, o->name, &best, &best_distance);
    for (const struct option_spec *o = program->common; o && o->name; o++)
        closer(name, o->name, &best, &best_distance);
    if (best)
        return error_set(err, ERR_USAGE, "%s has no option --%s; did you mean --%s?", command->name, name, best);
    return error_set(err, ERR_USAGE, "%s has no option --%s; see %s %s --help", command->name, name, program->name,
                     command->name);
}

static int unknown_command(const struct program_spec *program, const char *name, struct error *err)
{
    const char *best = NULL;
    int best_distance = 4;
    for (const struct command_spec *command = program->commands; command->name; command++)
        closer(name, command->name, &best, &best_distance);
    if (best)
        return error_set(err, ERR_USAGE, "there is no command \"%s\"; did you mean \"%s\"?", name, best);
    return error_set(err, ERR_USAGE, "there is no command \"%s\"; see %s --help", name, program->name);
}

// ---- parsing ---------------------------------------------------------------------------------------------------

static void environment_name(char *buffer, size_t bytes, const char *prefix, const char *name)
{
    snprintf(buffer, bytes, "%s%s", prefix, name);
    for (char *c = buffer; *c; c++)
        *c = *c == '-' ? '_' : (char)toupper((unsigned char)*c);
}

// What is wrong first is told; what comes after it is read all the same.
static int keep_first(int first, int rc, struct error *err, const struct error *found)
{
    if (first || !rc)
        return first;
    *err = *found;
    return rc;
}

static int read_environment(const struct program_spec *program, const struct option_spec *option, struct error *err)
{
    struct error found;
    int first = 0;
    for (; option && option->name; option++) {
        char name[96];
        environment_name(name, sizeof name, program->environment_prefix, option->name);
        const char *text = getenv(name);
        if (text && *text)
            first = keep_first(first, set_value(option, name, text, &found), err, &found);
        if (text && *text && option->type == OPTION_LIST)
            ((struct option_list *)option->value)->from_environment = true;
    }
    return first;
}

// A list given on the command line replaces one from the environment.
static void forget_environment_list(const struct option_spec *option)
{
    if (option->type == OPTION_LIST && ((struct option_list *)option->value)->from_environment)
        *(struct option_list *)option->value = (struct option_list){.count = 0};
}

// The option argv[*i] and its value, beyond which *i is moved.
static int parse_option(const struct program_spec *program, const struct command_spec *command, int argc, char **argv,
                        int *i, struct error *err)
{
    char *word = argv[*i];
    if (word[1] != '-')
        return error_set(err, ERR_USAGE, "options are written with two dashes; \"%s\" is not one", word);
    const char *name = word + 2;
    size_t length = strcspn(name, "=");
    const struct option_spec *option = find_option(command->options, name, length);
    if (!option)
        option = find_option(program->common, name, length);
    if (!option) {
        char copy[64];
        snprintf(copy, sizeof copy, "%.*s", (int)(length < 60 ? length : 60), name);
        return unknown_option(program, command, copy, err);
    }
    const char *text = name[length] == '=' ? name + length + 1 : NULL;
    if (option->type != OPTION_FLAG && !text) {
        if (*i + 1 == argc)
            return error_set(err, ERR_USAGE, "--%s needs a value: --%s %s", option->name, option->name,
                             option->argument);
        text = argv[++*i];
    }
    char origin[80];
    snprintf(origin, sizeof origin, "--%s", option->name);
    forget_environment_list(option);
    return set_value(option, origin, text, err);
}

// Splits argv into options (set at once) and positional arguments (moved to the front; *count of them).
static int parse_arguments(const struct program_spec *program, const struct command_spec *command, int argc,
                           char **argv, int *count, struct error *err)
{
    bool only_arguments = false;
    struct error found;
    int kept = 0, first = 0;
    for (int i = 0; i < argc; i++) {
        char *word = argv[i];
        if (only_arguments || word[0] != '-' || strcmp(word, "-") == 0) {
            argv[kept++] = word;
            continue;
        }
        if (strcmp(word, "--") == 0) {
            only_arguments = true;
            continue;
        }
        first = keep_first(first, parse_option(program, command, argc, argv, &i, &found), err, &found);
    }
    *count = kept;
    return first;
}

// ---- help ------------------------------------------------------------------------------------------------------

static void print_default(FILE *out, const struct option_spec *o)
{
    if (o->type == OPTION_INT && *(int64_t *)o->value >= 0)
        fprintf(out, " [%lld]", (long long)*(int64_t *)o->value);
    else if (o->type == OPTION_NUMBER && *(double *)o->value >= 0)
        fprintf(out, " [%g]", *(double *)o->value);
    else if ((o->type == OPTION_TEXT || o->type == OPTION_CHOICE) && *(const char **)o->value)
        fprintf(out, " [%s]", *(const char **)o->value);
}

static void print_options(FILE *out, const struct option_spec *option)
{
    for (; option && option->name; option++) {
        char head[120];
        snprintf(head, sizeof head, "--%s%s%s", option->name, option->argument ? " " : "",
                 option->argument ? option->argument : "");
        fprintf(out, strlen(head) > 28 ? "  %s\n%32s" : "  %-28s  ", head, "");
        fputs(option->help, out);
        print_default(out, option);
        fputc('\n', out);
    }
}

static void print_command_help(const struct program_spec *program, const struct command_spec *command)
{
    printf("%s %s [options] %s\n\n%s\n", program->name, command->name, command->arguments, command->summary);
    if (command->options && command->options->name) {
        printf("\nOptions:\n");
        print_options(stdout, command->options);
    }
    printf("\nCommon options:\n");
    print_options(stdout, program->common);
    printf("  --help                        this text\n  --version                     version and build\n");
    printf("\nEvery option can also come from the environment: --json is %sJSON.\n", program->environment_prefix);
}

static void print_help(const struct program_spec *program)
{
    printf("%s: %s\n\nCommands:\n", program->name, program->summary);
    for (const struct command_spec *command = program->commands; command->name; command++)
        printf("  %-9s %-24s %s\n", command->name, command->arguments, command->summary);
    if (program->default_command)
        printf("\nWithout a command's name, %s is meant.\n", program->commands->name);
    printf("\n%s\nOptions of a command: %s COMMAND --help\n", program->examples, program->name);
}

// roff: a backslash and a leading dot or quote have meanings of their own
static void print_roff(const char *text)
{
    bool line_start = true;
    for (; *text; text++) {
        if (line_start && (*text == '.' || *text == '\''))
            fputs("\\&", stdout);
        if (*text == '\\')
            fputs("\\e", stdout);
        else if (*text == '-')
            fputs("\\-", stdout);
        else
            putchar(*text);
        line_start = *text == '\n';
    }
}

static void print_man_options(const struct option_spec *option)
{
    for (; option && option->name; option++) {
        printf(".TP\n.B \\-\\-");
        print_roff(option->name);
        if (option->argument) {
            printf(" \\fI");
            print_roff(option->argument);
            printf("\\fR");
        }
        printf("\n");
        print_roff(option->help);
        print_default(stdout, option);
        printf("\n");
    }
}

static void print_man(const struct program_spec *program)
{
    printf(".TH %s 1 \"\" \"%s %s\"\n.SH NAME\n%s \\- ", program->name, program->name, program->version, program->name);
    print_roff(program->summary);
    printf("\n.SH SYNOPSIS\n");
    for (const struct command_spec *command = program->commands; command->name; command++)
        printf(".B %s %s\n[options] %s\n.br\n", program->name, command->name, command->arguments);
    for (const struct command_spec *command = program->commands; command->name; command++) {
        printf(".SH %s\n", command->name);
        print_roff(command->summary);
        printf("\n");
        print_man_options(command->options);
    }
    printf(".SH COMMON OPTIONS\n");
    print_man_options(program->common);
    printf(".SH ENVIRONMENT\nEvery option can also come from the environment: \\-\\-json is %sJSON. A "
           "flag goes "
           "before the environment.\n.SH EXIT STATUS\n.nf\n",
           program->environment_prefix);
    print_roff(program->exit_status);
    printf("\n.fi\n.SH EXAMPLES\n.nf\n");
    print_roff(program->examples);
    printf("\n.fi\n");
}

static void print_completion_words(const struct option_spec *option)
{
    for (; option && option->name; option++)
        printf(" --%s", option->name);
}

static void print_completion(const struct program_spec *program)
{
    printf("# bash completion for %s\n_%s()\n{\n    local words cur=${COMP_WORDS[COMP_CWORD]}\n    case "
           "${COMP_WORDS[1]} in\n",
           program->name, program->name);
    for (const struct command_spec *command = program->commands; command->name; command++) {
        printf("    %s) words=\"", command->name);
        print_completion_words(command->options);
        print_completion_words(program->common);
        printf(" --help\" ;;\n");
    }
    printf("    *) words=\"");
    for (const struct command_spec *command = program->commands; command->name; command++)
        printf("%s ", command->name);
    printf("--help --version\" ;;\n    esac\n    [[ $COMP_CWORD -gt 1 && $cur != -* ]] && { COMPREPLY=(); return; }\n"
           "    mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$cur\")\n}\ncomplete -o default -F _%s %s\n",
           program->name, program->name);
}

// ---- main ------------------------------------------------------------------------------------------------------

static int fail(const struct program_spec *program, const struct error *err)
{
    if (err->msg[0])
        fprintf(stderr, "%s: %s\n", program->name, err->msg);
    return error_exit_code(err->code);
}

static int refuse(const struct program_spec *program, const struct command_spec *command, const struct error *err)
{
    int status = fail(program, err);
    if (program->refused)
        program->refused(command, err);
    return status;
}

// The environment, and the command line, which counts more.
static int read_options(const struct program_spec *program, const struct command_spec *command, int argc, char **argv,
                        int *count, struct error *err)
{
    struct error found;
    int first = keep_first(0, read_environment(program, program->common, &found), err, &found);
    first = keep_first(first, read_environment(program, command->options, &found), err, &found);
    return keep_first(first, parse_arguments(program, command, argc, argv, count, &found), err, &found);
}

static bool has_word(int argc, char **argv, const char *word)
{
    for (int i = 0; i < argc && strcmp(argv[i], "--") != 0; i++)
        if (strcmp(argv[i], word) == 0)
            return true;
    return false;
}

// "tool --quiet command ..." means "tool command ... --quiet".
static void common_flags_last(const struct program_spec *program, int argc, char **argv)
{
    for (int moved = 1; moved < argc && strncmp(argv[1], "--", 2) == 0; moved++) {
        const struct option_spec *option = find_option(program->common, argv[1] + 2, strlen(argv[1] + 2));
        if (!option || option->type != OPTION_FLAG)
            return;
        char *flag = argv[1];
        memmove(argv + 1, argv + 2, (size_t)(argc - 2) * sizeof *argv);
        argv[argc - 1] = flag;
    }
}

int options_main(const struct program_spec *program, int argc, char **argv)
{
    struct error err = {0};
    assert(program->commands && program->common);
    signal(SIGXFSZ, SIG_IGN); // a file-size limit is a write that fails, with a sentence, not the end of the process
    if (argc < 2 || strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "help") == 0) {
        print_help(program);
        return argc < 2 ? error_exit_code(ERR_USAGE) : 0;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("%s %s\n", program->name, program->version);
        return 0;
    }
    if (strcmp(argv[1], "--help-man") == 0) {
        print_man(program);
        return 0;
    }
    if (strcmp(argv[1], "--help-completion-bash") == 0) {
        print_completion(program);
        return 0;
    }
    common_flags_last(program, argc, argv);
    const struct command_spec *command = find_command(program, argv[1]);
    int skip = command ? 2 : 1;
    if (!command && program->default_command)
        command = program->commands;
    if (!command) {
        unknown_command(program, argv[1], &err);
        return fail(program, &err);
    }
    argc -= skip;
    argv += skip;
    if (has_word(argc, argv, "--help")) {
        print_command_help(program, command);
        return 0;
    }
    int count = 0;
    if (read_options(program, command, argc, argv, &count, &err))
        return refuse(program, command, &err);
    if (count < command->min_arguments || count > command->max_arguments) {
        if (skip == 1 && count == 1)
            unknown_command(program, argv[0], &err);
        else if (!command->arguments[0])
            error_set(&err, ERR_USAGE, "%s takes no arguments, and found \"%s\"; see %s %s --help", command->name,
                      argv[0], program->name, command->name);
        else
            error_set(&err, ERR_USAGE, "%s takes: %s; found %d argument%s; see %s %s --help", command->name,
                      command->arguments, count, count == 1 ? "" : "s", program->name, command->name);
        return refuse(program, command, &err);
    }
    int rc = command->run(count, argv, &err);
    if (!rc && (fflush(stdout) || ferror(stdout)))
        rc = error_set(&err, ERR_IO, "the result could not be written to standard output");
    return rc ? fail(program, &err) : 0;
}
