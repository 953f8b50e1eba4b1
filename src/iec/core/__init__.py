"""Pure torch mathematics: no models, no schedulers, no files."""
