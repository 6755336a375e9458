"""A small multimodal LLM with real language, built from weights and pictures that package registries carry."""
