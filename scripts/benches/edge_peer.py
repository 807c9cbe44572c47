"""llama.cpp as the peer of the edge bench. Runs in an environment of its own, never in ours.

`convert` writes the decoder of a model folder as GGUF (float16) and its quantized forms; `run` times one of them. The
same arithmetic is done as in `scripts.benches.edge_case`: a prompt of given ids, then greedy tokens one by one.
"""

import argparse
import ctypes
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def peak_mb() -> float:
    """Largest memory of this process so far, MB (getrusage would give the parent's, too)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1.024e-3 for line in lines if line.startswith("VmHWM:"))


def tensors(folder: Path) -> dict[str, tuple[Path, int, dict[str, Any]]]:
    """Where each tensor of a safetensors folder lies: file, start of its data, header."""
    found: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        found |= {name: (path, 8 + size, entry) for name, entry in header.items()}
    return found


def read(place: tuple[Path, int, dict[str, Any]]) -> np.ndarray:
    """A bfloat16, float16 or float32 tensor as float32."""
    path, start, entry = place
    begin, end = entry["data_offsets"]
    raw = np.memmap(path, np.uint8, "r", start + begin, (end - begin,))
    if entry["dtype"] == "BF16":
        wide = raw.view(np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(entry["shape"])
    return raw.view({"F16": np.float16, "F32": np.float32}[entry["dtype"]]).astype(np.float32).reshape(entry["shape"])


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order for rotary positions (pairs beside each other)."""
    width = weight.shape[0] // heads
    return weight.reshape(heads, 2, width // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def convert(model: Path, out: Path) -> None:
    """Write f16.gguf, q4_0.gguf and q8_0.gguf of the decoder of a model folder into `out`."""
    import gguf
    import llama_cpp

    text = json.loads((model / "config.json").read_text())["text_config"]
    writer = gguf.GGUFWriter(out / "f16.gguf", "llama")
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_dimension_count(text["hidden_size"] // text["num_attention_heads"])
    writer.add_vocab_size(text["vocab_size"])
    _vocabulary(writer, text["vocab_size"])
    for name, place in tensors(model).items():
        found = _gguf_name(name)
        if found is None:
            continue
        value = read(place)
        if ".attn_q." in found or ".attn_k." in found:
            heads = text["num_attention_heads" if ".attn_q." in found else "num_key_value_heads"]
            value = interleaved(value, heads)
        writer.add_tensor(found, value.astype(np.float32 if value.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, kind in (("q4_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0), ("q8_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0)):
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.nthread = kind, 2
        code = llama_cpp.llama_model_quantize(
            str(out / "f16.gguf").encode(), str(out / f"{name}.gguf").encode(), ctypes.byref(options)
        )
        if code:
            raise SystemExit(f"llama.cpp could not quantize to {name} (code {code}).")


def _vocabulary(writer: Any, size: int) -> None:
    """Made-up words: llama.cpp does not run without a vocabulary, and here only ids matter."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [f"w{number}" for number in range(size - len(words))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (size - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _gguf_name(name: str) -> str | None:
    """The GGUF name of a decoder's tensor; None for those of tower and projector."""
    if name.endswith("lm_head.weight"):
        return "output.weight"
    if "language_model" not in name:
        return None
    rest = name.split("model.")[-1]
    if rest == "embed_tokens.weight":
        return "token_embd.weight"
    if rest == "norm.weight":
        return "output_norm.weight"
    _, number, part = rest.split(".", 2)
    return f"blk.{number}.{_NAMES[part.removesuffix('.weight')]}.weight"


def _opened(path: Path, room: int, threads: int) -> tuple[Any, Any]:
    """Model (in memory, not mapped) and context with `room` positions."""
    import llama_cpp

    options = llama_cpp.llama_model_default_params()
    fields = [field[0] for field in options._fields_]
    if "load_mode" in fields:  # from 0.3.30 or so on
        options.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    elif "use_mmap" in fields:
        options.use_mmap = False
    else:
        raise SystemExit("This llama-cpp-python names memory mapping otherwise: its figures would mislead.")
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = room
    settings.n_threads = settings.n_threads_batch = threads
    return model, llama_cpp.llama_init_from_model(model, settings)


def run(path: Path, prompts: Path, new: int, threads: int, logits: Path | None) -> None:
    """Time a GGUF file on the first prompt and write the last logits of every prompt."""
    import llama_cpp

    ids = np.load(prompts)
    model, context = _opened(path, ids.shape[1] + new + 8, threads)
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def decode(tokens: list[int]) -> np.ndarray:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("llama.cpp could not decode.")
        pointer = llama_cpp.llama_get_logits_ith(context, -1)
        return np.ctypeslib.as_array(pointer, shape=(size,)).copy()

    decode(ids[0, :8].tolist())  # the first call sets things up
    seen = []
    for number, prompt in enumerate(ids):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        began = time.perf_counter()
        last = decode(prompt.tolist())
        first = time.perf_counter() - began
        seen.append(last)
        if number == 0:
            began = time.perf_counter()
            for _ in range(new):
                last = decode([int(last.argmax())])
            facts = {"first_token_seconds": first, "tokens_per_second": new / (time.perf_counter() - began)}
            facts["peak_rss_mb"] = peak_mb()
        if logits is None:
            break
    if logits is not None:
        np.save(logits, np.stack(seen))
    print("RESULT " + json.dumps(facts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--convert", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--logits", type=Path)
    given = parser.parse_args()
    if given.convert:
        convert(given.convert, given.out)
    else:
        run(given.run, given.prompts, given.new, given.threads, given.logits)
