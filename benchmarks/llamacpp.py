"""llama.cpp as a contender: transformers' Llama written as a GGUF file, fed with token ids.

No tokenizer and no sampler take part: tokens go in by llama.cpp's batches, logits come out. Both
packages (benchmarks/requirements-llama.txt) may be absent.
"""

import contextlib
import ctypes
import importlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.contenders import Prepare

KINDS = ("f32", "q8_0", "q4_0")  # how matrices are stored; vectors are f32 in each
BLOCK = 32  # weights with a scale of their own in q8_0 and q4_0; rows are made of whole ones
PIECE = 2048  # tokens in one call that reads a context, llama.cpp's default
PAGE = 256  # tokens in which a text's cache grows
FLASH_UP_TO = PAGE  # tokens of a context up to which flash attention is the faster way on a CPU

Ids = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]


def absence() -> str | None:
    """Why llama.cpp cannot take part; None where it can."""
    try:
        importlib.import_module("gguf")
        importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:  # its library may be there and not load
        return str(error)
    return None


def write_gguf(model: LlamaForCausalLM, kind: str, path: Path) -> None:
    """Write a model, one of ``KINDS``, under the names and in the order of rows of llama.cpp."""
    gguf: Any = importlib.import_module("gguf")
    config: Any = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    turned = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.named_parameters():  # tied weights once: llama.cpp ties them, too
        array = weight.detach().float().numpy()
        heads = turned.get(name.split(".")[-2])
        if heads:
            array = _pairs_side_by_side(array, heads)
        own = names.get_name(name, try_suffixes=(".weight",))
        if array.ndim > 1:
            writer.add_tensor(own, gguf.quants.quantize(array, stored), raw_dtype=stored)
        else:
            writer.add_tensor(own, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pairs_side_by_side(weight: Logits, heads: int) -> Logits:
    """Rows of [heads * D, in] in the order in which llama.cpp turns them: 0, D/2, 1, ..."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


class LlamaCpp:
    """A GGUF file in llama.cpp, to be closed after use.

    Args:
        name: For the tables.
        path: The file.
        threads: Of the CPU.
    """

    def __init__(self, name: str, path: Path, threads: int) -> None:
        self.name, self.threads = name, threads
        self.library: Any = importlib.import_module("llama_cpp")
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
        self.library.llama_backend_init()
        parameters = self.library.llama_model_default_params()
        self.model = self.library.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")

    @property
    def num_parameters(self) -> int:
        return int(self.library.llama_model_n_params(self.model))

    def close(self) -> None:
        self.library.llama_model_free(self.model)

    @contextlib.contextmanager
    def texts(self, rows: int, longest: int) -> Iterator["Texts"]:
        """So many texts side by side, each of at most so many tokens."""
        one = Texts(self, rows, longest)
        try:
            yield one
        finally:
            one.close()


class Texts:
    """Texts side by side in one context of llama.cpp, each with a key-value cache of its own.

    Its settings are llama.cpp's defaults (keys and values are f16, texts share no cells), but for
    flash attention. That is its default too, and 1.06 times as fast as the plain one after 128
    tokens, but takes 1.6 times as long after 1,024 (AMD Zen 5); so the faster is taken.
    """

    def __init__(self, model: LlamaCpp, rows: int, longest: int) -> None:
        self.library, self.count = model.library, rows
        parameters = self.library.llama_context_default_params()
        room = -(-longest // PAGE) * PAGE  # for each
        flash = longest <= FLASH_UP_TO
        parameters.flash_attn_type = (
            self.library.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if flash
            else self.library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        parameters.n_ctx, parameters.n_seq_max = rows * room, rows
        parameters.n_batch = max(PIECE, rows)
        parameters.n_threads = parameters.n_threads_batch = model.threads
        self.context = self.library.llama_init_from_model(model.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no room for {rows} x {longest} tokens")
        self.memory = self.library.llama_get_memory(self.context)
        self.vocab_size = self.library.llama_vocab_n_tokens(
            self.library.llama_model_get_vocab(model.model)
        )
        self.length = 0
        self.batch = self.library.llama_batch_init(parameters.n_batch, 0, 1)
        size = (parameters.n_batch,)
        self.tokens, self.positions, self.wanted = (
            np.ctypeslib.as_array(field, shape=size)
            for field in (self.batch.token, self.batch.pos, self.batch.logits)
        )
        for i in range(parameters.n_batch):
            self.batch.n_seq_id[i] = 1

    def close(self) -> None:
        self.library.llama_batch_free(self.batch)
        self.library.llama_free(self.context)

    def read(self, ids: Ids) -> None:
        """Read the same tokens [T] in every text, which have none before: copies of the first."""
        for i in range(PIECE):
            self.batch.seq_id[i][0] = 0
        for start in range(0, len(ids), PIECE):
            piece = ids[start : start + PIECE]
            self.tokens[: len(piece)] = piece
            self.positions[: len(piece)] = np.arange(start, start + len(piece))
            self.wanted[: len(piece)] = 0
            self._decode(len(piece))
        self._spread(len(ids))

    def take(self, other: "Texts") -> None:
        """What the first text of a model of this size has read, beside as many: in every text."""
        size = self.library.llama_state_seq_get_size(other.context, 0)
        state = (ctypes.c_uint8 * size)()
        self.library.llama_state_seq_get_data(other.context, state, size, 0)
        if not self.library.llama_state_seq_set_data(self.context, state, size, 0):
            raise RuntimeError("llama.cpp does not take the state of another model")
        self._spread(other.length)

    def _spread(self, length: int) -> None:
        """Copy the first text, of so many tokens, to the others."""
        for row in range(1, self.count):
            self.library.llama_memory_seq_cp(self.memory, 0, row, -1, -1)
        for row in range(self.count):
            self.batch.seq_id[row][0] = row
        self.wanted[: self.count] = 1
        self.length = length

    def forget(self, length: int) -> None:
        """Remove what is behind so many tokens of each text."""
        assert length <= self.length
        if not self.library.llama_memory_seq_rm(self.memory, -1, length, -1):
            raise RuntimeError(f"llama.cpp does not take back what is after {length} tokens")
        self.length = length

    def step(self, tokens: Ids) -> Logits:
        """One token of each text [B] -> the logits that follow [B, vocab], good until the next."""
        self.tokens[: self.count] = tokens
        self.positions[: self.count] = self.length
        self._decode(self.count)
        self.length += 1
        logits = self.library.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, shape=(self.count, self.vocab_size))

    def _decode(self, count: int) -> None:
        self.batch.n_tokens = ctypes.c_int32(count)
        code = self.library.llama_decode(self.context, self.batch)
        if code:
            raise RuntimeError(f"llama_decode answers {code}")

    def decoding(self, context: int, tokens: int) -> Prepare:
        """Greedy decoding of so many tokens a text, each time after the first ``context`` ones."""

        def decode() -> None:
            token = np.zeros(self.count, dtype=np.int32)
            for _ in range(tokens):
                token = self.step(token).argmax(axis=1)

        def prepare() -> Callable[[], object]:
            self.forget(context)
            return decode

        return prepare


def token_ids(ids: Tensor) -> Ids:
    """One row of tokens [1, T] as llama.cpp takes them [T]."""
    return ids[0].cpu().numpy().astype(np.int32)
