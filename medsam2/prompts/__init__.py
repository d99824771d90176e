"""Prompts: their types, their simulation in training, and the strategies of evaluation. Pure tensor code."""
