"""Find what is wrong with the normalization of a model: examination, checks, diagnosis."""
