"""How good, how fast and how large: perplexity, intervals, decoding speed, comparison tables."""

from retnet.evaluation.bootstrap import Difference, paired_bootstrap, t_interval
from retnet.evaluation.comparison import Comparison, compare_checkpoints
from retnet.evaluation.loading import load_contender, load_contenders
from retnet.evaluation.output import check_not_read, check_writable, write_json
from retnet.evaluation.report import (
    check_report_folder,
    find_out,
    format_comparison,
    to_json,
    write_report,
)
from retnet.evaluation.scoring import evaluate_batches, score_documents
from retnet.evaluation.speed import CONTEXTS, Timing, decode_speed, interleaved
from retnet.evaluation.text import EvaluationText, text_of_file, validation_text
