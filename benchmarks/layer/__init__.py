"""What ``benchmarks.single_layer`` is made of: one layer of every mixer beside softmax."""
