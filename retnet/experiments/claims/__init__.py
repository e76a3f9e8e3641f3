"""What has been claimed of RetNet and its relatives, measured, each with a rule for its verdict."""
