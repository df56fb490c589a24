"""Where trials are kept, claimed and worked on: the Optuna study, workers, fingerprints."""
