"""How good, how fast and how large: perplexity, intervals, decoding speed, comparison tables."""

from retnet.evaluation.bootstrap import Difference, paired_bootstrap
from retnet.evaluation.comparison import Comparison, compare_checkpoints
from retnet.evaluation.report import check_writable, format_comparison, to_json, write_json
from retnet.evaluation.scoring import DocumentScores, evaluate_batches, score_documents
from retnet.evaluation.speed import CONTEXTS, DecodeSpeed, Timing, decode_speed, interleaved
from retnet.evaluation.text import EvaluationText, text_of_file, validation_text

__all__ = [
    "CONTEXTS",
    "Comparison",
    "DecodeSpeed",
    "Difference",
    "DocumentScores",
    "EvaluationText",
    "Timing",
    "check_writable",
    "compare_checkpoints",
    "decode_speed",
    "evaluate_batches",
    "format_comparison",
    "interleaved",
    "paired_bootstrap",
    "score_documents",
    "text_of_file",
    "to_json",
    "validation_text",
    "write_json",
]
