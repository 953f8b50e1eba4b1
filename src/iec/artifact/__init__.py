"""Files that are whole or absent: atomic writes, safe reads, fingerprints."""
