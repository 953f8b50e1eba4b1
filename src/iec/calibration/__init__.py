"""From the trajectories of a pipeline to a Calibration."""
