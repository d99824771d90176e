"""Prompts: their types, their simulation in training, and the strategies of evaluation. Pure tensor code."""

from medsam2.prompts import initial as initial  # it registers the kinds of prompts
