"""How good, how fast and how large: perplexity, intervals, decoding speed, comparison tables."""

from retnet.evaluation.bootstrap import Difference, paired_bootstrap
from retnet.evaluation.comparison import compare_checkpoints
from retnet.evaluation.report import check_writable, format_comparison, to_json, write_json
from retnet.evaluation.scoring import evaluate_batches, score_documents
from retnet.evaluation.speed import CONTEXTS, Timing, decode_speed, interleaved
from retnet.evaluation.text import EvaluationText, text_of_file, validation_text
