"""What is wrong with the normalization of a model: checks, the examination that feeds them, the diagnosis."""
