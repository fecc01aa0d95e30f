"""The rollout backends by name."""

from collections.abc import Callable

from training.generation.hf import HuggingFaceGenerator
from training.generation.interface import Generator
from training.generation.native import NativeGenerator

GENERATORS: dict[str, Callable[..., Generator]] = {"native": NativeGenerator, "hf": HuggingFaceGenerator}
