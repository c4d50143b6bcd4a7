"""Saliency methods: one file and one YAML each, nothing else to edit."""
