"""What a run cost and how good its images are."""
