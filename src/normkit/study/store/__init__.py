"""The store of a study: its trials, the workers that claim them, fingerprints of data and model."""
