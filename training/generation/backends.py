"""The rollout backends by name."""

from training.generation.hf import HuggingFaceGenerator

GENERATORS = {"hf": HuggingFaceGenerator}
