"""The main job: methods compared fairly on a model and data. Needs ``normkit[study]``."""
