"""What a comparison says: as a table, as JSON, as a folder with pictures."""

from retnet.evaluation.report.table import (
    format_comparison,
    format_interval,
    format_table,
    to_json,
)
