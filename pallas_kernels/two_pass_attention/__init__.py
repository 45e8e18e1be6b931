"""Prefill attention that also returns how much attention every key received."""
