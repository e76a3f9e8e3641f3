"""From a model to text: prefill, decoding, sampling, streaming."""

from retnet.generation.chat import Chat, sample_answer
from retnet.generation.checks import check_finite, check_state_fits, check_text_fits, fit_length
from retnet.generation.console import converse, print_samples
from retnet.generation.decode import Step, Usage, decode_one, generate, make_step, prefill
from retnet.generation.options import add_loading_options, device_of, loading_arguments
from retnet.generation.prompt import decode_utf8, encode_prompt, read_messages, read_prompt
from retnet.generation.sampling import Sampler, Sampling
from retnet.generation.stream import evaluation_mode, sample_text, stream_text
