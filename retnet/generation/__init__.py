"""From a checkpoint to text: loading, prefill, decoding, sampling, streaming."""

from retnet.generation.checkpoint import (
    DATA_RECORD,
    Checkpoint,
    check_finite,
    find_checkpoint,
    load_checkpoint,
)
from retnet.generation.console import print_samples, text_output
from retnet.generation.decode import (
    ENDED,
    Step,
    Usage,
    check_compiler,
    decode_one,
    generate,
    make_step,
    prefill,
    synchronize,
)
from retnet.generation.integrity import MANIFEST, find_damage, write_manifest
from retnet.generation.options import add_loading_options, loading_arguments
from retnet.generation.prompt import check_memory, decode_utf8, encode_prompt, read_prompt
from retnet.generation.sampling import Sampler, Sampling
from retnet.generation.stream import TextStream, sample_text, stopping_criteria, stream_text

__all__ = [
    "DATA_RECORD",
    "ENDED",
    "MANIFEST",
    "Checkpoint",
    "Sampler",
    "Sampling",
    "Step",
    "TextStream",
    "Usage",
    "add_loading_options",
    "check_compiler",
    "check_finite",
    "check_memory",
    "decode_one",
    "decode_utf8",
    "encode_prompt",
    "find_checkpoint",
    "find_damage",
    "generate",
    "load_checkpoint",
    "loading_arguments",
    "make_step",
    "prefill",
    "print_samples",
    "read_prompt",
    "sample_text",
    "stopping_criteria",
    "stream_text",
    "synchronize",
    "text_output",
    "write_manifest",
]
