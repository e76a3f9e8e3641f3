"""From a model to text: prefill, decoding, sampling, streaming."""

from retnet.generation.checks import check_finite, check_text_fits
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
from retnet.generation.options import add_loading_options, loading_arguments
from retnet.generation.prompt import decode_utf8, encode_prompt, read_prompt
from retnet.generation.sampling import Sampler, Sampling
from retnet.generation.stream import (
    TextStream,
    evaluation_mode,
    sample_text,
    stopping_criteria,
    stream_text,
)

__all__ = [
    "ENDED",
    "Sampler",
    "Sampling",
    "Step",
    "TextStream",
    "Usage",
    "add_loading_options",
    "check_compiler",
    "check_finite",
    "check_text_fits",
    "decode_one",
    "decode_utf8",
    "encode_prompt",
    "evaluation_mode",
    "generate",
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
]
