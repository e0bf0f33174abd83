"""Diffusion: schedules, predictions, objectives and guidance. It knows latents and numbers, not networks."""

from smalti.diffusion.guidance import BackboneFunction, check_labels, guided_denoiser
from smalti.diffusion.labels import drop_labels, drop_mask
from smalti.diffusion.levels import CLEAN, SCHEDULES, Level, LevelBatch, Schedule, build_schedule
from smalti.diffusion.objectives import (
    BitsPerDim,
    Losses,
    ObjectiveConfig,
    bits_per_dim,
    draw_levels,
    losses_from_output,
    training_losses,
)
from smalti.diffusion.prediction import PREDICTIONS, Denoise, Denoised, add_noise, to_denoised
from smalti.diffusion.timesteps import keyed_uniforms

__all__ = [
    "CLEAN",
    "PREDICTIONS",
    "SCHEDULES",
    "BackboneFunction",
    "BitsPerDim",
    "Denoise",
    "Denoised",
    "Level",
    "LevelBatch",
    "Losses",
    "ObjectiveConfig",
    "Schedule",
    "add_noise",
    "bits_per_dim",
    "build_schedule",
    "check_labels",
    "draw_levels",
    "drop_labels",
    "drop_mask",
    "guided_denoiser",
    "keyed_uniforms",
    "losses_from_output",
    "to_denoised",
    "training_losses",
]
