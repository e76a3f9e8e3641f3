"""Speed for one token at a time. Optional: without this folder's code models compute the same."""
