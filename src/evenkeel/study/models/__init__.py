"""The networks of the papers, sized for small images, all with BatchNorm; ``evenkeel.convert`` changes that."""

from evenkeel.study.models.build import build_model, model_names

__all__ = ["build_model", "model_names"]
