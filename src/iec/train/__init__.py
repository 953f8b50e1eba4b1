"""Training of the bundled models from recipes: `iec train RECIPE`."""
