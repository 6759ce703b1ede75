// tpshard: cuts a checkpoint into one file for each rank. The table of commands; everything else is in their files.
#include "shard/commands.h"

#include "version.h"

static const struct command_spec commands[] = {
    {"convert", "model_dir out_dir", 1, 2, "Writes one shard file for each rank.", convert_options, convert_run},
    {"plan", "model_dir|config.json", 1, 1, "Shows what each rank would hold and whether it fits.", plan_options,
     plan_run},
    {"inspect", "out_dir", 1, 1, "Shows the manifest and the tensors.", inspect_options, inspect_run},
    {"verify", "out_dir", 1, 1, "Checks every checksum, or every weight against its source.", verify_options,
     verify_run},
    {"reshard", "out_dir new_dir", 2, 2, "Cuts shards anew for another number of ranks, bit for bit as convert would.",
     reshard_options, reshard_run},
    {"repair", "out_dir", 1, 1, "Writes again what does not hold, and nothing else.", repair_options, repair_run},
    {"sums", "out_dir", 1, 1,
     "Writes SHA256SUMS: what to sign and publish with the files; warns when it changes a list that has been signed.",
     sums_options, sums_run},
    {0},
};

static const struct option_spec common_options[] = {
    {"json", OPTION_FLAG, &common.json, NULL, 0, 0, "report as one JSON object on stdout"},
    {"quiet", OPTION_FLAG, &common.quiet, NULL, 0, 0, "no progress and no notes on stderr"},
    {0},
};

static const struct program_spec program = {
    .name = "tpshard",
    .summary = "cuts, quantizes and packs a Hugging Face checkpoint into one checksummed file for each rank",
    .version = TPSHARD_VERSION " (" TPSHARD_COMMIT ")",
    .environment_prefix = "TPSHARD_",
    .commands = commands,
    .default_command = true,
    .common = common_options,
    .examples = "Examples:\n"
                "  tpshard --tp 2 --quant int4 Llama-3.1-8B llama-8b-tp2\n"
                "  tpshard plan --tp 4 --quant int4 --context 32768 --gpu-memory 24GiB Llama-3.1-70B\n"
                "  tpshard verify llama-8b-tp2\n"
                "  tpshard repair llama-8b-tp2 --from Llama-3.1-8B\n"
                "\n"
                "Publishing, and checking what was published, with the tools that everyone has:\n"
                "  tpshard sums llama-8b-tp2\n"
                "  ssh-keygen -Y sign -f ~/.ssh/id_ed25519 -n file llama-8b-tp2/SHA256SUMS\n"
                "  ssh-keygen -Y verify -f allowed_signers -I you@example.org -n file \\\n"
                "      -s llama-8b-tp2/SHA256SUMS.sig < llama-8b-tp2/SHA256SUMS\n"
                "  tpshard verify --sha256 llama-8b-tp2\n",
    .exit_status = "0    done\n"
                   "1    anything that fits nowhere else\n"
                   "2    wrong command line\n"
                   "3    bad or unsupported model\n"
                   "4    corrupt or mismatched shards\n"
                   "5    the operating system refused to read or write\n"
                   "8    out of memory\n"
                   "130  interrupted (SIGINT)\n"
                   "143  terminated (SIGTERM)\n",
};

int main(int argc, char **argv) { return options_main(&program, argc, argv); }
