"""Pure functions, tensors in and tensors out."""
