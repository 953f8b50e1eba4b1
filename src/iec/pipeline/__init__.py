"""IEC in diffusers pipelines: enable, disable, summary; and the bundled models."""
