"""What a comparison says: as a table, as JSON, as a folder with pictures."""

from retnet.evaluation.report.findings import (
    COST_CONTEXTS,
    LIMIT_S,
    QUICK,
    QUICK_CONTEXTS,
    THOROUGH,
    Findings,
    Reach,
    find_out,
)
from retnet.evaluation.report.folder import check_report_folder, write_report
from retnet.evaluation.report.table import (
    format_comparison,
    format_interval,
    format_table,
    to_json,
)
