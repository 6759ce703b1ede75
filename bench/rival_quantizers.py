#!/usr/bin/env python3
"""Other people's four-bit weights: bench_quality_rivals.py runs this file with the interpreter of the environment that they are installed in.

    rival_quantizers.py version TOOL
    rival_quantizers.py quantize TOOL KIND[,KIND...] CHECKPOINT OUT --text FILE --sequences 64

`quantize` writes OUT/KIND/model.safetensors, the dequantized weights in float32 under the checkpoint's names, and prints one JSON object as a line for
each kind: bits of a weight of the layers' matrices, of all matrices, and the processor seconds of the tool without its imports and without this file's
own dequantizing; or what went wrong. The text is what calibrated kinds see: its first --sequences times 512 tokens.
"""
import argparse
import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import os
import resource
import struct
import sys
import tempfile
from pathlib import Path

import numpy

SEQUENCE = 512
MATRIX = []  # the importance matrix and the seconds that it took, once they are known: the same for every kind
OUTSIDE = ("model.embed_tokens.weight", "lm_head.weight")


def cpu_seconds():
    return sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


class Timer:
    def __init__(self):
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self):
        begin = cpu_seconds()
        yield
        self.seconds += cpu_seconds() - begin


def write_safetensors(path, tensors):
    header, end = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [end, end + 4 * values.size]}
        end += 4 * values.size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            file.write(numpy.ascontiguousarray(values, "<f4").tobytes())


def bits_of(count):
    """count: {name: (stored bits, weights)} of matrices."""
    layers = [value for name, value in count.items() if name not in OUTSIDE]
    return tuple(sum(bits for bits, _ in part) / sum(weights for _, weights in part) for part in (layers, list(count.values())))


def sequences_of(args):
    """[[512 token ids]], each with the token that begins a text."""
    from tokenizers import Tokenizer
    ids = Tokenizer.from_file(str(Path(args.checkpoint) / "tokenizer.json")).encode(Path(args.text).read_text(encoding="utf-8"),
                                                                                 add_special_tokens=False).ids
    bos = json.loads((Path(args.checkpoint) / "config.json").read_text())["bos_token_id"]
    cut = [[bos, *ids[first:first + SEQUENCE - 1]] for first in range(0, len(ids), SEQUENCE - 1)][:args.sequences]
    if len(cut) < args.sequences or len(cut[-1]) < SEQUENCE:
        raise SystemExit(f"{args.text}: fewer than {args.sequences} sequences of {SEQUENCE} tokens")
    return cut


def transformers_model(args):
    import torch
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(args.threads)
    return AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)


def linears_of(model):
    import torch
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"}


def state_of(model):
    """Without a head that is the embedding."""
    return {name: value.detach().float().numpy() for name, value in model.named_parameters()}


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


def write_gguf(checkpoint, tensors, out):
    """A Llama in float32 without a vocabulary; returns {GGUF name: checkpoint's name}."""
    import gguf
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "llama", use_temp_file=True)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    names = {table.get_name(name, try_suffixes=(".weight",)): name for name in tensors}
    for name, source in names.items():
        writer.add_tensor(name, turn(tensors[source], heads_of(source, config), 2))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return names, config


def heads_of(name, config):
    return config["num_attention_heads"] if "q_proj" in name else config["num_key_value_heads"] if "k_proj" in name else 0


def turn(values, heads, first):
    """In GGUF the pairs of a head lie side by side; first 2: there, first head_dim / 2: and back."""
    if not heads:
        return values
    rows = values.shape[0] // heads
    return numpy.ascontiguousarray(values.reshape(heads, first, rows // first, -1).swapaxes(1, 2).reshape(values.shape))


def importance(args):
    """Mean square of each column of each matrix' input, what llama.cpp calls an importance matrix."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import torch
    from quality_model import Llama, read_safetensors
    torch.set_num_threads(args.threads)
    model = Llama(json.loads((Path(args.checkpoint) / "config.json").read_text()), read_safetensors(Path(args.checkpoint) / "model.safetensors"))
    sums, ids = {}, torch.tensor(sequences_of(args))

    def add(name, x):
        if name != "lm_head":  # left out by its makers' tool too
            sums[f"{name}.weight"] = sums.get(f"{name}.weight", 0) + x.double().square().sum(0)

    model.hook = add
    begin = cpu_seconds()
    for first in range(0, len(ids), 4):
        model.logits(ids[first:first + 4])
    return {name: (value / ids.numel()).float().numpy() for name, value in sums.items()}, cpu_seconds() - begin


def llama_cpp(args, timer):
    import gguf
    import llama_cpp as lib
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from quality_model import read_safetensors
    kind, _, with_matrix = args.kind.partition("+")
    if with_matrix not in ("", "imatrix"):
        raise ValueError(f"{args.kind}: no such kind")
    tensors = {name: value.numpy() for name, value in read_safetensors(Path(args.checkpoint) / "model.safetensors").items()}
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, None)
    lib.llama_backend_init()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        source, result = str(Path(folder) / "source.gguf"), str(Path(folder) / "result.gguf")
        names, config = write_gguf(args.checkpoint, tensors, source)
        params = lib.llama_model_quantize_default_params()
        params.nthread, params.ftype = args.threads, getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
        if with_matrix:
            MATRIX.extend([] if MATRIX else [importance(args)])
            matrix, seconds = MATRIX[0]
            timer.seconds += seconds
            entries = (lib.llama_model_imatrix_data * (len(matrix) + 1))()
            for entry, (name, source_name) in zip(entries, ((n, s) for n, s in names.items() if s in matrix)):
                entry.name, entry.size = name.encode(), matrix[source_name].size
                entry.data = matrix[source_name].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            params.imatrix = entries
        with timer.running():
            status = lib.llama_model_quantize(source.encode(), result.encode(), ctypes.byref(params))
        if status != 0:
            raise ValueError(f"llama_model_quantize: {status}")
        values, count = {}, {}
        for tensor in gguf.GGUFReader(result).tensors:
            name = names[tensor.name]
            value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32).reshape(tensors[name].shape)
            heads = heads_of(name, config)
            values[name] = turn(value, heads, config["head_dim"] // 2) if heads else value
            if value.ndim == 2:
                count[name] = (8 * tensor.data.nbytes, value.size)
    return values, count


# ---- half-quadratic quantization -------------------------------------------------------------------------------------


def hqq(args, timer):
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    model, group = transformers_model(args), int(args.kind.removeprefix("g"))
    values = state_of(model)
    count = {name: (16 * value.size, value.size) for name, value in values.items() if value.ndim == 2}
    for name, module in linears_of(model).items():
        with timer.running():
            quantized = HQQLinear(module, BaseQuantizeConfig(nbits=4, group_size=group, axis=1), del_orig=False, compute_dtype=torch.float32,
                                  device="cpu")
        values[f"{name}.weight"] = quantized.dequantize().float().numpy()
        count[f"{name}.weight"] = ((4 + 32 / group) * module.weight.numel(), module.weight.numel())  # a scale and a zero point in 16 bits each
    return values, count


# ---- llm-compressor: GPTQ and AWQ ------------------------------------------------------------------------------------


def llm_compressor(args, timer):
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    import torch
    if not torch.cuda.is_available():
        torch.Tensor.pin_memory = lambda tensor, *_: tensor  # it wants a driver where torch was built for one
    model, sequences = transformers_model(args), sequences_of(args)
    words = {"targets": "Linear", "ignore": ["lm_head"]}
    recipe = {"rtn": lambda: [QuantizationModifier(scheme="W4A16", **words)],
              "gptq": lambda: [GPTQModifier(scheme="W4A16", actorder=None, **words)],
              "gptq-static": lambda: [GPTQModifier(scheme="W4A16", actorder="static", **words)],
              "awq": lambda: [AWQModifier(scheme="W4A16_ASYM", **words)],
              "awq-sym": lambda: [AWQModifier(scheme="W4A16", **words)]}
    if args.kind not in recipe:
        raise ValueError(f"{args.kind}: no such kind")
    recipe = recipe[args.kind]()
    data = Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * SEQUENCE] * len(sequences)})
    with timer.running():
        oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=SEQUENCE, num_calibration_samples=len(sequences),
                shuffle_calibration_samples=False)
    values = state_of(model)
    count = {name: (16 * value.size, value.size) for name, value in values.items() if value.ndim == 2}
    values = {name: value for name, value in values.items() if not name.endswith(("_scale", "_zero_point", "_g_idx"))}
    count = {name: value for name, value in count.items() if name in values}
    for name, module in linears_of(model).items():
        scheme = module.quantization_scheme.weights
        weight = fake_quantize(module.weight.float(), module.weight_scale.float(), getattr(module, "weight_zero_point", None), scheme)
        values[f"{name}.weight"] = weight.detach().numpy()
        bits = 4 + (16 if scheme.symmetric else 20) / scheme.group_size  # the zero point has four bits
        count[f"{name}.weight"] = (bits * module.weight.numel(), module.weight.numel())
    return values, count


# ---- AutoRound -------------------------------------------------------------------------------------------------------


def auto_round(args, timer):
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer
    model, iterations = transformers_model(args), int(args.kind.removeprefix("i"))
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    batches = [torch.tensor([ids]) for ids in sequences_of(args)]
    with timer.running():
        rounder = AutoRound(model, tokenizer, scheme="W4A16", iters=iterations, nsamples=len(batches), seqlen=SEQUENCE, batch_size=8,
                            dataset=batches, device_map="cpu", amp=False)
        quantized = rounder.quantize()
    model = quantized[0] if isinstance(quantized, tuple) else quantized
    values = state_of(model)
    count = {name: (16 * value.size, value.size) for name, value in values.items() if value.ndim == 2}
    for name, module in linears_of(model).items():
        count[f"{name}.weight"] = ((4 + 16 / 128) * module.weight.numel(), module.weight.numel())
    return values, count


TOOLS = {"llama.cpp": (llama_cpp, "llama_cpp_python", ["llama_cpp", "gguf"]), "hqq": (hqq, "hqq", ["hqq.core.quantize"]),
         "llm-compressor": (llm_compressor, "llmcompressor", ["llmcompressor"]), "auto-round": (auto_round, "auto_round", ["auto_round"])}


def one_kind(quantize, args):
    folder, timer = Path(args.out) / args.kind, Timer()
    args.work = folder
    os.makedirs(folder, exist_ok=True)
    values, count = quantize(args, timer)
    write_safetensors(folder / "model.safetensors", values)
    layers, total = bits_of(count)
    return {"kind": args.kind, "bits_layers": layers, "bits_all": total, "seconds": timer.seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["version", "quantize"])
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("kinds", nargs="?", metavar="KIND,...")
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("out", nargs="?")
    parser.add_argument("--text")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    quantize, package, modules = TOOLS[args.tool]
    for module in modules:
        importlib.import_module(module)
    if args.what == "version":
        if args.tool == "llama.cpp":
            import llama_cpp as lib
            result = {"version": lib.__version__}
        else:
            result = {"version": importlib.metadata.version(package)}
    else:
        for args.kind in args.kinds.split(","):
            try:
                result = one_kind(quantize, args)
            except Exception as why:  # pylint: disable=broad-except
                result = {"kind": args.kind, "error": f"{type(why).__name__}: {str(why)[:300]}"}
            print("\n" + json.dumps(result), flush=True)
        os._exit(0)  # taking a tool down is nobody's figure
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
