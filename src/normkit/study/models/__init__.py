"""The networks of the papers, sized for small images, all with BatchNorm; ``normkit.convert`` changes that."""

from normkit.study.models.build import build_model, model_names

__all__ = ["build_model", "model_names"]
