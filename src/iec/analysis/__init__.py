"""Analysis of a pipeline's runs: recorded steps, spectral norms, growth of errors."""
