#!/usr/bin/env python3
"""Other people's engines behind one command line: bench_rivals.py runs this file with the interpreter of the environment that they are installed in.

    rival_engines.py version ENGINE
    rival_engines.py convert ENGINE CHECKPOINT OUT FORMAT          FORMAT: int4, int4-head8, int8, bf16
    rival_engines.py measure ENGINE MODEL --threads 2 --prompt-tokens 512 --gen-tokens 64 --batch 1

Each prints one JSON object as its last line. An engine is a class: `convert` by its own tools; `open`, then `generate`, which takes a prompt of
token ids for each sequence and calls `token()` after each step of all of them. Tokens that come out are not looked at where an engine allows that:
this leaves sampling out of its time.
"""
import argparse
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path


class LlamaCpp:
    """llama.cpp through llama-cpp-python's bindings of its C interface."""

    @staticmethod
    def version():
        import llama_cpp
        importlib.import_module("gguf")  # what converting needs
        return llama_cpp.__version__

    @staticmethod
    def convert(checkpoint, out, form):
        """The package that llama.cpp's own converter is written with also quantizes: Q4_0 or Q8_0, the head alike or in Q8_0."""
        from gguf import GGMLQuantizationType as Kind
        write_gguf(checkpoint, out, *{"int4": (Kind.Q4_0, Kind.Q4_0), "int4-head8": (Kind.Q4_0, Kind.Q8_0), "int8": (Kind.Q8_0, Kind.Q8_0),
                                      "bf16": (Kind.BF16, Kind.BF16)}[form])

    def __init__(self, model, threads, context, batch):
        import llama_cpp
        self.lib = llama_cpp
        self.log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.log, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(model), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"{model}: cannot be loaded")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = context * batch, max(512, batch), 512, batch
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"{model}: no context")
        self.step = llama_cpp.llama_batch_init(max(512, batch), 0, 1)

    def decode(self, rows):
        """rows: (token, position, sequence, wanted)."""
        self.step.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            self.step.token[i], self.step.pos[i], self.step.logits[i] = token, position, wanted
            self.step.n_seq_id[i], self.step.seq_id[i][0] = 1, sequence
        status = self.lib.llama_decode(self.context, self.step)
        if status != 0:
            raise RuntimeError(f"llama_decode: {status}")

    def generate(self, prompts, gen_tokens, token):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        rows = [(t, i, s, i + 1 == len(prompt)) for s, prompt in enumerate(prompts) for i, t in enumerate(prompt)]
        for first in range(0, len(rows), 512):
            self.decode(rows[first:first + 512])
        self.lib.llama_synchronize(self.context)
        token()
        for i in range(gen_tokens - 1):
            self.decode([(prompt[i % len(prompt)], len(prompt) + i, s, True) for s, prompt in enumerate(prompts)])
            self.lib.llama_synchronize(self.context)
            token()


def write_gguf(checkpoint, out, kind, head_kind):
    """A Llama checkpoint in bf16 as a GGUF file without a vocabulary; vectors stay float32."""
    import gguf
    import numpy
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    writer = gguf.GGUFWriter(out, "llama", use_temp_file=True)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for path in sorted(Path(checkpoint).glob("*.safetensors")):
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            bits = numpy.memmap(path, "<u2", "r", 8 + header_bytes + begin, ((end - begin) // 2,)).reshape(entry["shape"])
            turned = heads if name.endswith("q_proj.weight") else kv_heads if name.endswith("k_proj.weight") else 0
            if turned:  # pairs of a head lie side by side in this format
                bits = bits.reshape(turned, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(entry["shape"])
            wanted = names.get_name(name, try_suffixes=(".weight",))
            values = (bits.astype(numpy.uint32) << 16).view(numpy.float32)
            if bits.ndim == 1:
                writer.add_tensor(wanted, values)
            else:
                wanted_kind = head_kind if name == "lm_head.weight" else kind
                writer.add_tensor(wanted, gguf.quants.quantize(values, wanted_kind), raw_dtype=wanted_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class OpenVino:
    """OpenVINO GenAI, models exported by optimum-intel and compressed by NNCF."""

    @staticmethod
    def version():
        import openvino_genai
        importlib.import_module("nncf")  # what converting needs
        return openvino_genai.__version__

    @staticmethod
    def convert(checkpoint, out, form):
        words = {"int4": ["--weight-format", "int4", "--group-size", "32", "--ratio", "1.0", "--sym", "--all-layers"],
                 "int4-head8": ["--weight-format", "int4", "--group-size", "128", "--ratio", "1.0", "--sym"],
                 "int8": ["--weight-format", "int8"], "bf16": ["--weight-format", "fp16"]}[form]
        subprocess.run([Path(sys.executable).with_name("optimum-cli"), "export", "openvino", "--model", checkpoint, "--task", "text-generation-with-past",
                        *words, out], check=True, stdout=sys.stderr)

    def __init__(self, model, threads, _context, _batch):
        import openvino
        import openvino_genai
        self.openvino, self.genai = openvino, openvino_genai
        self.pipe = openvino_genai.LLMPipeline(str(model), "CPU", INFERENCE_NUM_THREADS=threads)

    def generate(self, prompts, gen_tokens, token):
        import numpy
        config = self.genai.GenerationConfig(max_new_tokens=gen_tokens, ignore_eos=True, do_sample=False)
        ids = numpy.array(prompts, dtype=numpy.int64)
        inputs = self.genai.TokenizedInputs(self.openvino.Tensor(ids), self.openvino.Tensor(numpy.ones_like(ids)))
        if len(prompts) == 1:
            class Streamer(self.genai.StreamerBase):
                def __init__(streamer):
                    super().__init__()
                    streamer.left = gen_tokens

                def write(streamer, tokens):
                    for _ in range(len(tokens) if isinstance(tokens, list) else 1):
                        token()
                    return self.genai.StreamingStatus.RUNNING

                def end(streamer):
                    pass
            self.pipe.generate(inputs, config, Streamer())
            return None
        begin = time.monotonic()
        times = self.pipe.generate(inputs, config).perf_metrics  # no streamer for batches
        seconds = time.monotonic() - begin
        first_s = times.get_ttft().mean / 1e3
        return first_s, seconds - first_s


class OnnxRuntime:
    """ONNX Runtime GenAI, models made by its own builder; four bits with activations in eight (accuracy level 4), as its makers advise for CPUs."""

    @staticmethod
    def version():
        import onnxruntime_genai
        return onnxruntime_genai.__version__

    @staticmethod
    def convert(checkpoint, out, form):
        words = {"int4": ["-p", "int4", "--extra_options", "accuracy_level=4", "block_size=32", "is_symmetric=true"],
                 "int4-head8": ["-p", "int4", "--extra_options", "accuracy_level=4", "block_size=32", "is_symmetric=true",
                                "algo_config=rtn_last"],
                 "int8": ["-p", "int8"], "bf16": ["-p", "fp32"]}[form]
        cache = Path(f"{out}.cache")
        subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", out, "-e", "cpu", "-c", cache, *words],
                       check=True, stdout=sys.stderr)
        shutil.rmtree(cache, ignore_errors=True)

    def __init__(self, model, threads, context, batch):
        import onnxruntime_genai
        self.genai, self.context, self.batch = onnxruntime_genai, context, batch
        config = onnxruntime_genai.Config(str(model))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = onnxruntime_genai.Model(config)

    def generate(self, prompts, gen_tokens, token):
        import numpy
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(max_length=self.context, min_length=self.context, batch_size=len(prompts), do_sample=False)
        generator = self.genai.Generator(self.model, params)
        generator.append_tokens(numpy.array(prompts, dtype=numpy.int32))
        for _ in range(gen_tokens):
            generator.generate_next_token()
            token()


ENGINES = {"llama.cpp": LlamaCpp, "openvino": OpenVino, "onnxruntime": OnnxRuntime}


def status_kib(key):
    with open("/proc/self/status", encoding="ascii") as file:
        return next((int(line.split()[1]) for line in file if line.startswith(key + ":")), None)


def measure(args):
    source = random.Random(1)
    prompts = [[source.randrange(3, args.vocab) for _ in range(args.prompt_tokens)] for _ in range(args.batch)]
    opened = time.monotonic()
    engine = ENGINES[args.engine](args.model, args.threads, args.prompt_tokens + args.gen_tokens, args.batch)
    times = []
    result = {"load_s": time.monotonic() - opened}
    if args.first_token:
        engine.generate([prompts[0][:1]], 1, lambda: times.append(time.monotonic()))
        result["open_to_token_s"] = time.monotonic() - opened
        os.write(1, b"\n")  # what the caller waits for
    else:
        engine.generate([prompt[:2] for prompt in prompts], 2, lambda: None)  # warms up
        begin = time.monotonic()
        # An engine that cannot tell of each step tells the seconds of the first and of the others.
        first_s, others_s = engine.generate(prompts, args.gen_tokens, lambda: times.append(time.monotonic())) or (times[0] - begin, times[-1] - times[0])
        result["prefill_tokens_per_s"] = args.batch * args.prompt_tokens / first_s
        result["decode_tokens_per_s"] = args.batch * (args.gen_tokens - 1) / others_s
        if times and len(times) != args.gen_tokens:
            raise RuntimeError(f"{len(times)} tokens instead of {args.gen_tokens}")
    return {**result, "rss_kib": status_kib("VmRSS"), "peak_kib": status_kib("VmHWM"), "anonymous_kib": status_kib("RssAnon")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["version", "convert", "measure"])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", nargs="?", help="measure: a converted model; convert: a checkpoint")
    parser.add_argument("out", nargs="?", help="convert")
    parser.add_argument("format", nargs="?", choices=["int4", "int4-head8", "int8", "bf16"], help="convert")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--gen-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=32000, help="prompts are random tokens below this")
    parser.add_argument("--first-token", action="store_true", help="no more than the first token, as soon as possible")
    args = parser.parse_args()
    if args.what == "version":
        result = {"version": ENGINES[args.engine].version()}
    elif args.what == "convert":
        ENGINES[args.engine].convert(args.model, args.out, args.format)
        result = {}
    else:
        result = measure(args)
    print(json.dumps(result), flush=True)
    os._exit(0)  # taking an engine down is nobody's figure


if __name__ == "__main__":
    main()
