#!/usr/bin/env python3
"""Golden data of the tokenizer tests: tests/golden/tokenizer/*.

Needs: Python 3.11 (its unicodedata is Unicode 14, as PCRE2 10.42) and `tokenizers` 0.23.

For each model family a small vocabulary is trained on text made here, put into a tokenizer.json with the family's
normalizer, pre-tokenizer, post-processor and decoder, and asked for
  - the ids of hand-picked nasty strings, and their decoded texts with and without special tokens,
  - a hash of ids for every block of 4096 code points, all Unicode scalar values (`code_point_line`),
  - a hash of ids for every 100 of 10,000 random strings (`random_string`, the same generator as in
    tests/test_tokenizer.c),
  - a hash of the decoded text of 1,000 random id sequences.
components.json holds single components and settings with the ids that they give on a tiny vocabulary which shows
where the text was cut.

A hash is h = (h ^ value) * 0x100000001B3 mod 2^64 over the values (ids, or bytes of text), from 0xCBF29CE484222325.
"""
import json
import multiprocessing
import pathlib
import unicodedata

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

assert unicodedata.unidata_version == "14.0.0", "run with Python 3.11: Unicode 14"
OUT = pathlib.Path(__file__).resolve().parent.parent / "tests/golden/tokenizer"
MASK = (1 << 64) - 1


class Random:
    """splitmix64"""

    def __init__(self, seed):
        self.state = seed

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def below(self, n):
        return self.next() % n


def hash_values(values, h=0xCBF29CE484222325):
    for value in values:
        h = ((h ^ value) * 0x100000001B3) & MASK
    return h


# ---------------------------------------------------------------- text to train on

WORDS = {
    "en": "the of and to in is that it for was on are as with his they at be this from have or by one had not but "
    "what all were when we there can an your which their said if do will each about how up out them then she many "
    "some so these would other into has more her two like him see time could no make than first been its who now "
    "people my made over did down only way find use may water long little very after words called just where most "
    "don't it's I'll we've you're they'd Hello World token model return static const void",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er "
    "hat dass sie nach wird bei größer Straße schön Übung",
    "fr": "le la les des est une dans qui pour pas sur avec son être l'été élève garçon où déjà",
    "ru": "и в не на я быть он с что а по это она этот к но они мы весь который из у привет мир",
    "el": "και το της να του η ο που με για τα από δεν είναι",
    "zh": "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对",
    "ja": "これはテストです日本語のテキストをトークンにするありがとうございます",
    "ko": "안녕하세요 세계 이것은 시험 입니다 그리고 한국어",
    "ar": "في من على أن إلى التي ما هذا السلام عليكم",
    "hi": "के है में की और का को नमस्ते दुनिया हिन्दी",
    "th": "สวัสดีชาวโลก ภาษาไทย",
    "sym": "1 2 3 10 42 100 1234 2024 3.14 == != <= -> () {} [] ; : , . ! ? ... \" ' # / // 😀 🎉 👍",
}


def training_text():
    rnd = Random(2024)
    lines = []
    for _ in range(4000):
        words = WORDS[["en", "en", "en", "de", "fr", "ru", "el", "zh", "ja", "ko", "ar", "hi", "th", "sym"][rnd.below(14)]].split()
        line = " ".join(words[rnd.below(len(words))] for _ in range(4 + rnd.below(10)))
        if rnd.below(8) == 0:
            line = "    " * (1 + rnd.below(3)) + line + ";\n\n"
        if rnd.below(4) == 0:
            line = line.capitalize() + "."
        lines.append(line)
    return lines


TEXT = training_text()


def train(pretokenizer, size, alphabet, special):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pretokenizer
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    tok.train_from_iterator(TEXT, trainer)
    model = json.loads(tok.to_str())["model"]
    return model["vocab"], [tuple(m) for m in model["merges"]]


# ---------------------------------------------------------------- components

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
O200K = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
TEKKEN = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
DEEPSEEK = [r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"]


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def byte_level(prefix=False, regex=False):
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": regex}


def sequence(key, *members):
    return {"type": "Sequence", key: list(members)}


def replace(old, new, kind="String"):
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def metaspace(scheme="always", cut=True):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": cut}


def template(front=(), back=()):
    special = lambda name: {"SpecialToken": {"id": name, "type_id": 0}}
    text = lambda n: {"Sequence": {"id": n, "type_id": 0}}
    ids = {name: {"id": name, "ids": [id], "tokens": [name]} for name, id in [*front, *back]}
    single = [*(special(n) for n, _ in front), text("A"), *(special(n) for n, _ in back)]
    return {"type": "TemplateProcessing", "single": single, "pair": [text("A"), text("B")], "special_tokens": ids}


def added(id, content, special=True, **flags):
    token = {"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": special}
    return token | flags


SPM_DECODER = sequence("decoders", replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                       {"type": "Strip", "content": " ", "start": 1, "stop": 0})
BYTE_DECODER = byte_level(True, True)


def number_added(vocab, tokens):
    """The ids that `tokenizers` gives: those of the vocabulary, else the next ones."""
    numbered, next_id = [], len(vocab)
    for token in tokens:
        numbered.append(token | {"id": vocab.get(token["content"], next_id)})
        next_id += token["content"] not in vocab
    return numbered


def tokenizer_json(vocab, merges, added_tokens=(), legacy_merges=False, normalizer=None, pre_tokenizer=None,
                   post_processor=None, decoder=None, **model):
    base = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    added_tokens = number_added(vocab, added_tokens)
    merges = [" ".join(m) for m in merges] if legacy_merges else [list(m) for m in merges]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens,
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": post_processor,
            "decoder": decoder, "model": base | model | {"vocab": vocab, "merges": merges}}


BYTE_LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def letters(data):
    """The byte-level letters of bytes (bytes that are no UTF-8 on their own go through a table)."""
    return "".join(BYTE_TABLE[b] for b in data)


def make_byte_table():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {b: chr(b) for b in printable}
    for n, b in enumerate(b for b in range(256) if b not in printable):
        table[b] = chr(256 + n)
    assert sorted(table.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    return table


BYTE_TABLE = make_byte_table()


def byte_vocab(size, probes=True):
    """A byte-level vocabulary. Its first merges join 'a', 'b', a space and an apostrophe with whatever stands beside
    them, so that ids show where a pattern cut the text."""
    pattern = pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"), BYTE_LETTERS])
    vocab, merges = train(pattern, size, sorted(BYTE_TABLE.values()), [])
    first = []
    if probes:
        leads, tails = [*range(0xC2, 0xF5)], [*range(0x80, 0xC0)]
        first += [(b"a", bytes([x])) for x in [*range(128), *leads]]
        first += [(bytes([x]), b"b") for x in [*range(128), *tails]]
        first += [(b" ", bytes([x])) for x in leads]
    first = [(letters(x), letters(y)) for x, y in first]
    for x, y in first:
        vocab.setdefault(x + y, len(vocab))
    return vocab, list(dict.fromkeys(first + merges))


def spm_vocab(size, mark_runs=False):
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    vocab, merges = train(pre_tokenizers.Metaspace(), size, list("abcdefghijklmnopqrstuvwxyz▁"), special)
    if mark_runs:
        for run in ("▁▁", "▁▁▁▁"):
            vocab[run] = len(vocab)
            merges.append((run[: len(run) // 2], run[len(run) // 2:]))
    return vocab, merges


def families():
    spm = dict(byte_fallback=True, fuse_unk=True, unk_token="<unk>", decoder=SPM_DECODER)
    bos = template(front=[("<s>", 1)])
    control = [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")]
    prepend = sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"))
    vocab, merges = spm_vocab(900, mark_runs=True)
    n = len(vocab)
    yield "llama2", tokenizer_json(vocab, merges, control, True, normalizer=prepend, post_processor=bos, **spm)
    normalized = [t | {"normalized": True} for t in control]
    old = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    yield "llama2_metaspace", tokenizer_json(vocab, merges, normalized, pre_tokenizer=old, post_processor=bos,
                                             **(spm | dict(decoder=old)))
    yield "llama2_normalized", tokenizer_json(vocab, merges, normalized, True, normalizer=prepend, post_processor=bos,
                                              **spm)
    inst = [added(n + i, t) for i, t in enumerate(["[INST]", "[/INST]", "[TOOL_CALLS]"])]
    yield "mistral_v3", tokenizer_json(vocab, merges, control + inst, pre_tokenizer=metaspace("first", False),
                                       post_processor=bos, **spm)
    phi = [added(n, "<|endoftext|>"), *(added(n + 1 + i, t, rstrip=True) for i, t in enumerate(
        ["<|assistant|>", "<|user|>", "<|end|>"])), added(n + 4, "<|left|>", lstrip=True),
        added(n + 5, "word", special=False, single_word=True, normalized=True), added(n + 6, "<|user"),
        added(n + 7, "  ", special=False)]
    yield "phi3", tokenizer_json(vocab, merges, control[:2] + [control[2] | {"rstrip": True, "special": False}] + phi,
                                 normalizer=prepend, **spm)
    gemma = [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>"),
             *(added(n + i, t, special=False) for i, t in enumerate(["\n\n", "\n\n\n", "\t", "<table>", "▁▁▁"])),
             added(n + 5, "<start_of_turn>"), added(n + 6, "<end_of_turn>")]
    yield "gemma", tokenizer_json(vocab, merges, gemma, normalizer=replace(" ", "▁"),
                                  pre_tokenizer=split(" ", "MergedWithPrevious", kind="String"),
                                  post_processor=template(front=[("<s>", 1)]),
                                  **(spm | dict(decoder=sequence("decoders", replace("▁", " "), {"type": "ByteFallback"},
                                                                 {"type": "Fuse"}))))
    vocab, merges = byte_vocab(700)
    n = len(vocab)
    chat = lambda *names: [added(n + i, t) for i, t in enumerate(names)]
    byte = lambda pattern: sequence("pretokenizers", *(split(p) for p in pattern), byte_level())
    yield "llama3", tokenizer_json(
        vocab, merges, chat("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"), True, pre_tokenizer=byte([LLAMA3]),
        decoder=BYTE_DECODER, ignore_merges=True,
        post_processor=sequence("processors", byte_level(True, True), template(front=[("<|begin_of_text|>", n)])))
    think = [added(n + 3 + i, t, special=False) for i, t in enumerate(["<think>", "</think>"])]
    yield "qwen", tokenizer_json(
        vocab, merges, chat("<|endoftext|>", "<|im_start|>", "<|im_end|>") + think, normalizer={"type": "NFC"},
        pre_tokenizer=byte([QWEN2]), decoder=byte_level(), post_processor=byte_level())
    yield "tekken", tokenizer_json(
        vocab, merges, chat("<s>", "</s>", "[INST]", "[/INST]"), pre_tokenizer=byte([TEKKEN]), decoder=BYTE_DECODER,
        ignore_merges=True, post_processor=template(front=[("<s>", n)], back=[("</s>", n + 1)]))
    yield "phi4", tokenizer_json(
        vocab, merges, [t | {"lstrip": True, "rstrip": True} for t in chat("<|endoftext|>", "<|im_start|>", "<|im_sep|>")],
        True, pre_tokenizer=byte([CL100K]), decoder=BYTE_DECODER, post_processor=byte_level(True, True))
    yield "gpt_oss", tokenizer_json(
        vocab, merges, chat("<|startoftext|>", "<|endoftext|>", "<|channel|>", "<|message|>"),
        pre_tokenizer=byte([O200K]), decoder=BYTE_DECODER, ignore_merges=False)
    yield "deepseek", tokenizer_json(
        vocab, merges, chat("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), pre_tokenizer=byte(DEEPSEEK),
        decoder=BYTE_DECODER, post_processor=template(front=[("<｜begin▁of▁sentence｜>", n)]))
    yield "gpt2_digits", tokenizer_json(
        vocab, merges, chat("<|endoftext|>"), decoder=byte_level(),
        pre_tokenizer=sequence("pretokenizers", {"type": "Digits", "individual_digits": True}, byte_level(True, True)))
    classes = [r"\w+|\p{Han}", r"\b", r"\p{Greek}|\p{Hiragana}", r"\d|\h"]
    yield "classes", tokenizer_json(vocab, merges, pre_tokenizer=byte(classes), decoder=byte_level())


# ---------------------------------------------------------------- texts to encode

STRINGS = [
    "", " ", "  ", "   ", "\n", "\n\n\n", "\r\n \r\n", "\t\t x", "a", " a", "a ", "Hello, World!", "hello  world   again",
    "Don't you'll WE'VE it'S 'quoted' I'm they'd", "don’t l’été", "123 1234 12345 1234567890 3.14159 ١٢٣٤ ४५६ ²³ Ⅷ ½",
    "    def f(x):\n        return x+1\n\n", "x = [1,2,3];\t// comment\r\n", "https://example.org/a?b=c&d=%20#e",
    "größer Straße ÜBUNG", "cafe\u0301 café Å \u212b e\u0301\u0323 \u1e69 s\u0323\u0307", "привет мир ΚΑΛΗΜΕΡΑ",
    "你好，世界。这是一个测试", "これはテストです。カタカナ", "한국어 텍스트 \u1112\u1161\u11ab", "السلام عليكم\u200f", "नमस्ते दुनिया", "สวัสดี",
    "😀😃🎉 👍🏽 👨\u200d👩\u200d👧\u200d👦 🇩🇪", "a\u00a0b\u3000c\u2028d\u2029e\u0085f\u200bg\ufeffh\u180ei", "\x00\x01\x1f\x7f", "\ufffd \ufffe \U0010ffff \U000e0041",
    "zalgo h̷̢e͈l͜l̶o", "ſ K 'ſ 'K ﬁ ŉ İ ı ß ẞ", "..!?...,,,;;;###$$$%%%", "<|begin_of_text|>Hello<|eot_id|>", "<s>[INST] hi [/INST] ok</s>",
    "<|user|>\n Hi <|end|>   \n<|assistant|>  x", "  <|left|> y  <|left|>", "word sword word. wordy (word) \u00e9word word\u00e9",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|> <think>\n</think>", "<|endoftext|><|endoftext|> <|endoftext|", "<｜begin▁of▁sentence｜>a▁b ▁ ▁▁c",
    "<start_of_turn>user\n\n\n\n\t<table>x</table>▁▁▁ ▁", "<unk><0x0A><0xZZ>a<unk>", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab",
    "                                                                     x", "thethethethethe of of of ofof", "AbCdEf ABCdef abcDEF ǅǈ ʰʱ aʰB",
    "𝒳𝓎𝔃 𐐀𐐨 𠀀𠀁 〇々", "line1\nline2\r\nline3\rline4\n", "1,000.50€ £5 -3 +4 1e10 0xFF", "𐐷Ω≈ç√∫˜µ≤≥÷", "a'b 'a ''s s' 'S'S", "_a_b__ a_b \u203f", "<", "<|", "</s", " <s> ",
    "日本語1テスト2 abc一二三", "e\u0301" * 30, "\u0e33 \u0f73 \u1100\u1161 \u0344 \u0958 \u2126",
]


# Digits that only Rust's own tables (Unicode 17) know; they concern the Digits pre-tokenizer.
RUST_ONLY_DIGITS = [(0x11DE0, 0x11DE9), (0x16FF4, 0x16FF6)]


def assigned_later(unassigned):
    """Ranges of code points that Unicode 14 does not have but Hugging Face's tables do: their categories decide where
    a text is cut, and PCRE2 10.42 does not know them. Code points that nobody knows are tested."""
    rust = {c for first, last in RUST_ONLY_DIGITS for c in range(first, last + 1)}
    ranges = []
    for c in range(0x110000):
        if 0xD800 <= c <= 0xDFFF or unicodedata.category(chr(c)) != "Cn" or (c in unassigned and c not in rust):
            continue
        if ranges and ranges[-1][1] + 1 == c:
            ranges[-1][1] = c
        else:
            ranges.append([c, c])
    return ranges


def unassigned_in_onig():
    """The set of code points that Oniguruma's \\p{Cn} matches."""
    matched = set()
    pattern = pre_tokenizers.Split(tokenizers.Regex(r"\p{Cn}"), "removed", invert=True)
    for start in range(0, 0x110000, 0x400):
        text = "".join(chr(c) for c in range(start, start + 0x400) if not 0xD800 <= c <= 0xDFFF)
        for piece, _ in pattern.pre_tokenize_str(text):
            matched.update(map(ord, piece))
    return matched


def code_point_lines(block, excluded):
    """64 code points each, in a neighbourhood that shows cuts."""
    for start in range(block * 4096, (block + 1) * 4096, 64):
        points = [c for c in range(start, start + 64) if not 0xD800 <= c <= 0xDFFF and c not in excluded]
        yield "".join(f"a{chr(c)}b {chr(c)}" for c in points)


SPACES = "\t\n\r\v\f\u0085\u00a0\u1680\u2000\u2003\u2028\u2029\u202f\u205f\u3000\u200b"
MARKS = [0x300, 0x301, 0x308, 0x323, 0x327, 0x328, 0x338, 0x345, 0x5B0, 0x64B, 0x93C, 0xE38, 0xF71, 0x3099, 0x20D0, 0x1D165]
PIECES = ["<s>", "</s>", "<|", "|>", "[INST]", "<|endoftext|>", "'s", "'LL", "▁", "  ", "\r\n", "ing", "the", "<unk>"]
# (first, last) of letters, by script; all assigned in Unicode 14.
LETTERS = [(0xC0, 0x24F), (0x391, 0x3A1), (0x3B1, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x620, 0x64A), (0x904, 0x939),
           (0xE01, 0xE30), (0x1100, 0x1112), (0x1161, 0x1175), (0x11A8, 0x11C2), (0x1E00, 0x1EFF), (0x3041, 0x3096),
           (0x30A1, 0x30FA), (0x4E00, 0x9FFC), (0xAC00, 0xD7A3), (0xF900, 0xFA6D), (0x10400, 0x1044F), (0x20000, 0x2A6DD)]


def random_string(rnd):
    text = []
    for _ in range(rnd.below(40)):
        kind = rnd.below(16)
        if kind < 5:
            text.append(chr(97 + rnd.below(26)))
        elif kind == 5:
            text.append(chr(65 + rnd.below(26)))
        elif kind == 6:
            text.append(chr(48 + rnd.below(10)))
        elif kind < 9:
            text.append(" ")
        elif kind == 9:
            text.append(SPACES[rnd.below(len(SPACES))])
        elif kind == 10:
            text.append(chr(33 + rnd.below(15)))
        elif kind < 13:
            first, last = LETTERS[rnd.below(len(LETTERS))]
            text.append(chr(first + rnd.below(last - first + 1)))
        elif kind == 13:
            text.append(chr(MARKS[rnd.below(len(MARKS))]))
        elif kind == 14:
            text.append(chr(0x1F600 + rnd.below(64)) if rnd.below(4) else "\u200d")
        else:
            text.append(PIECES[rnd.below(len(PIECES))])
    return "".join(text)


def random_strings():
    rnd = Random(1)
    return [random_string(rnd) for _ in range(10000)]


def random_ids(id_count):
    rnd = Random(2)
    return [[rnd.below(id_count) for _ in range(rnd.below(20))] for _ in range(1000)]


def ids_of(tok, texts):
    return [e.ids for e in tok.encode_batch(texts, add_special_tokens=False)]


def hash_block(tok, block, excluded):
    h = 0xCBF29CE484222325
    for ids in ids_of(tok, list(code_point_lines(block, excluded))):
        h = hash_values(ids, h)
    return f"{h:016x}"


def golden(document, excluded_ranges):
    tok = Tokenizer.from_str(json.dumps(document))
    id_count = tok.get_vocab_size(with_added_tokens=True)
    excluded = {c for first, last in excluded_ranges for c in range(first, last + 1)}
    blocks = [hash_block(tok, block, excluded) for block in range(0x110)]
    encoded = ids_of(tok, random_strings())
    blocks_random = []
    for start in range(0, len(encoded), 100):
        h = 0xCBF29CE484222325
        for ids in encoded[start:start + 100]:
            h = hash_values(ids, h)
        blocks_random.append(f"{h:016x}")
    h = 0xCBF29CE484222325
    for ids in random_ids(id_count):
        for skip in (False, True):
            h = hash_values(tok.decode(ids, skip_special_tokens=skip).encode(), h)
    ids = ids_of(tok, STRINGS)
    return {
        "tokens": id_count,
        "special": tok.encode("x", add_special_tokens=True).ids,
        "ids": ids,
        "decoded": [tok.decode(i, skip_special_tokens=False) for i in ids],
        "decoded_skipped": [tok.decode(i, skip_special_tokens=True) for i in ids],
        "code_points": blocks,
        "random": blocks_random,
        "random_decoded": f"{h:016x}",
    }


# ---------------------------------------------------------------- single components

def component_cases():
    """Each: settings on a vocabulary of 8 characters and all their pairs. Pairs show which neighbours stayed together."""
    alphabet = "ab-1 \n▁B"
    vocab = {c: i for i, c in enumerate(alphabet)}
    merges = []
    for x in alphabet:
        for y in alphabet:
            vocab[x + y] = len(vocab)
            merges.append((x, y))
    texts = ["a-b", "--a--b-", "ab ab  b", " a", "a1b11-1", "aB\nb\n", "-", "aaaa", "▁a b▁", "11111", "abBA-ab", "a \n b"]
    settings = []
    for behavior in ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]:
        for invert in (False, True):
            settings.append(dict(pre_tokenizer=split("-", behavior, invert, "String")))
            settings.append(dict(pre_tokenizer=split("[a-]|b", behavior, invert)))
            settings.append(dict(pre_tokenizer=split("a*", behavior, invert)))
            settings.append(dict(pre_tokenizer=split("(?=b)", behavior, invert)))
    for pattern in [r"1{1,2}+", r"1{2}?", r"1{1,2}?", r"1{,2}", r"a++b?", r"^[ab]", r"[ab]$", r".b", r"(?i:ab)", r"(?i)B", r"\h", r"\w",
                    r"\b", r"\B", r"\s", r"\S+", r"[^\S\n]", r"(?<=a)b", r"(?<!a)b", r"(?>a+)", r"\p{^L}", r"\P{L}", r"\x{61}", r"\x61",
                    r"\u0062", r"a|-(?:b|1)+", r"(a|b){2}+", r"\Aa", r"b\z", r"[\h-]", r"{", r"a{", r"\-", r"[]a]", r"a{1}", r"[a\-1]+"]:
        settings.append(dict(pre_tokenizer=split(pattern, "Isolated")))
    for scheme in ("always", "first", "never"):
        for cut in (False, True):
            settings.append(dict(pre_tokenizer=metaspace(scheme, cut), decoder=metaspace(scheme, cut)))
            settings.append(dict(pre_tokenizer=sequence("pretokenizers", split("-", kind="String"), metaspace(scheme, cut))))
    settings.append(dict(pre_tokenizer={"type": "Metaspace", "replacement": "▁", "str_rep": "▁", "add_prefix_space": False,
                                        "prepend_scheme": "never"}))
    for individual in (False, True):
        settings.append(dict(pre_tokenizer={"type": "Digits", "individual_digits": individual}))
    settings.append(dict(normalizer=replace("a", "")))
    settings.append(dict(normalizer=replace("a+", "b", "Regex")))
    settings.append(dict(normalizer=replace("a*", "-", "Regex")))
    settings.append(dict(normalizer=sequence("normalizers", replace("-", "ab"), sequence("normalizers", replace("b", "--")))))
    settings.append(dict(normalizer={"type": "Prepend", "prepend": "a-"}))
    settings.append(dict(added_tokens=[added(72, "ab"), added(73, "b-", lstrip=True), added(74, "a1", rstrip=True)]))
    settings.append(dict(added_tokens=[added(0, "a", single_word=True), added(72, "ab", normalized=True)],
                         normalizer=replace("-", "a")))
    settings.append(dict(added_tokens=[added(72, "a"), added(73, "aa"), added(74, "aab"), added(75, " ", rstrip=True)]))
    strip = lambda start, stop: {"type": "Strip", "content": "a", "start": start, "stop": stop}
    fuse = {"type": "Fuse"}
    for decoder in [strip(1, 0), strip(0, 1), strip(0, 2), sequence("decoders", fuse, strip(2, 0)),
                    sequence("decoders", fuse, strip(1, 1)), sequence("decoders", fuse, replace("ab", "B")),
                    sequence("decoders", replace("a+", "1", "Regex"), fuse, strip(3, 0), fuse),
                    replace("a", "aa"), {"type": "ByteFallback"}, byte_level(), sequence("decoders", byte_level(), strip(1, 0)),
                    sequence("decoders", byte_level(), strip(1, 1)), sequence("decoders")]:
        settings.append(dict(decoder=decoder))
    cases = []
    for setting in settings:
        document = tokenizer_json(vocab, merges, **setting)
        if "added_tokens" in setting:
            setting["added_tokens"] = document["added_tokens"]
        tok = Tokenizer.from_str(json.dumps(document))
        cases.append({"settings": setting, "ids": [tok.encode(t).ids for t in texts],
                      "decoded": [tok.decode(tok.encode(t).ids) for t in texts]})
    # Unknown characters, on the same vocabulary: with an unknown token, fused or not, and with some byte tokens.
    for model in [dict(unk_token="B"), dict(unk_token="B", fuse_unk=True), dict(unk_token="B", byte_fallback=True),
                  dict(byte_fallback=True), dict(ignore_merges=True), dict(unk_token="B", fuse_unk=True, byte_fallback=True)]:
        extra = {f"<0x{b:02X}>": 72 + i for i, b in enumerate("é".encode())}
        document = tokenizer_json(vocab | extra, merges, **model)
        tok = Tokenizer.from_str(json.dumps(document))
        unknown = ["aéb", "éé", "axxb", "xéx", "xxé", "aüéxb", "x", "ab", "abab", "", "-", "a"]
        cases.append({"model": model, "extra": extra, "texts": unknown, "ids": [tok.encode(t).ids for t in unknown],
                      "decoded": [tok.decode(tok.encode(t).ids) for t in unknown]})
    base = tokenizer_json(vocab, merges)
    return {"base": base, "texts": texts, "cases": cases}


def write(name, value):
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    (OUT / name).write_text(text + "\n", encoding="utf-8")


def write_family(name, document, excluded_ranges):
    write(f"{name}.tokenizer.json", document)
    write(f"{name}.golden.json", golden(document, excluded_ranges))
    print(name, len(document["model"]["vocab"]), "tokens", flush=True)


def main():  # takes about ten minutes on one core
    OUT.mkdir(parents=True, exist_ok=True)
    excluded_ranges = assigned_later(unassigned_in_onig())
    write("texts.json", {"strings": STRINGS, "excluded": excluded_ranges})
    write("components.json", component_cases())
    with multiprocessing.Pool() as pool:
        pool.starmap(write_family, [(name, document, excluded_ranges) for name, document in families()])
    print(sum(f.stat().st_size for f in OUT.iterdir()), "bytes;", len(excluded_ranges), "excluded ranges of",
          sum(b - a + 1 for a, b in excluded_ranges), "code points; tokenizers", tokenizers.__version__)


if __name__ == "__main__":
    main()
